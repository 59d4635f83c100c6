//! The control thread: the one writer. Socket, kernel news, workers' events and time all end in [`Control`].

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use arc_swap::ArcSwap;
use crossbeam_channel::Receiver;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio::task::spawn_local;
use tracing::{debug, info, warn};
use vswitch_api::{Answer, ApiError, ErrorCode, Request};
use vswitch_control::{Backend, Control, ControlConfig, UPLINK_PORT};
use vswitch_dataplane::{Event, Snapshot};
use vswitch_link::{Kernel, Watch};

use crate::backend::Links;
use crate::config::{Config, Poll};
use crate::store::Store;
use crate::worker::{Setup, Shared, WorkerHandle, choose_cores};
use crate::{server, uplink};

/// Events that workers may be ahead of the control thread.
const EVENT_QUEUE: usize = 16_384;

/// Learned stations are published together, at most this often.
const LEARN_INTERVAL: Duration = Duration::from_millis(5);

/// News of the kernel come in flocks.
const NEWS_INTERVAL: Duration = Duration::from_millis(20);

/// The underlay is looked at this often even without news.
const REFRESH_INTERVAL: Duration = Duration::from_secs(2);

/// Everything the control thread owns.
struct Daemon {
    config: Config,
    store: Store,
    kernel: Kernel,
    control: RefCell<Control>,
    links: RefCell<Links>,
    snapshot: Arc<ArcSwap<Snapshot>>,
    /// Wakes the refresh of the underlay, after a request that may need it.
    stale: Notify,
    start: Instant,
}

/// Runs the daemon until a signal ends it.
///
/// # Errors
///
/// What keeps it from starting, with the remedy.
pub(crate) async fn run(config: Config) -> anyhow::Result<()> {
    let store = Store::open(&config.daemon.runtime_dir).map_err(|error| anyhow!(error))?;
    let watch = Watch::here()?;
    let (daemon, events, news) = Daemon::start(config, store)?;
    let daemon = Rc::new(daemon);
    daemon.configure()?;
    daemon.attach_uplink().await?;
    daemon.restore();
    daemon.publish();
    let socket = daemon.config.socket();
    let listener = server::listen(&socket).with_context(|| {
        format!("cannot listen at {}: set daemon.socket to a path that can be written", socket.display())
    })?;
    info!("listening at {}", socket.display());
    spawn_local(serve(daemon.clone(), listener));
    spawn_local(learn(daemon.clone(), events, news));
    spawn_local(follow_kernel(daemon.clone(), watch));
    tell_systemd("READY=1");
    wait_for_end().await?;
    tell_systemd("STOPPING=1");
    info!("stopping; pods keep their links and addresses");
    let _ = std::fs::remove_file(&socket);
    daemon.save();
    Ok(())
}

/// Checks what can be checked of a configuration without a daemon: all but whether the uplink is there.
///
/// # Errors
///
/// What would keep the daemon from starting.
pub(crate) fn check(config: &Config) -> anyhow::Result<()> {
    choose_cores(&config.worker.cores, config.worker.count).map_err(|error| anyhow!(error))?;
    let mut control = Control::new(control_config(config));
    // A configuration adds no ports, so there is nothing to attach.
    let mut links = Links::new(Vec::new(), config.daemon.xdp_mode.into(), clock_start());
    configure(config, &mut control, &mut links)
}

/// Applies the configuration file.
fn configure(config: &Config, control: &mut Control, links: &mut Links) -> anyhow::Result<()> {
    for request in config.requests() {
        let what = match &request {
            Request::NetworkAdd(spec) => format!("[[network]] \"{}\"", spec.name),
            Request::PeerAdd(spec) => format!("[[peer]] \"{}\"", spec.name),
            Request::RouteAdd(spec) => format!("[[route]] {}", spec.prefix),
            other => format!("{other:?}"),
        };
        control.configure(request, links).map_err(|error| anyhow!("configuration, {what}: {error}"))?;
    }
    Ok(())
}

fn control_config(config: &Config) -> ControlConfig {
    ControlConfig {
        udp_port: config.uplink.udp_port,
        uplink: config.uplink.link.clone(),
        fdb_ageing_ns: config.fdb.ageing_seconds.saturating_mul(1_000_000_000),
        fdb_limit: config.fdb.limit,
    }
}

#[expect(clippy::disallowed_methods, reason = "the daemon's clock starts here")]
fn clock_start() -> Instant {
    Instant::now()
}

impl Daemon {
    fn start(config: Config, store: Store) -> anyhow::Result<(Daemon, Receiver<Event>, Arc<Notify>)> {
        let start = clock_start();
        let snapshot = Arc::new(ArcSwap::from_pointee(Snapshot::default()));
        let (events, inbox) = crossbeam_channel::bounded(EVENT_QUEUE);
        let news = Arc::new(Notify::new());
        let shared = Shared { snapshot: snapshot.clone(), events, news: news.clone(), start };
        let sizes = &config.worker;
        let cores = choose_cores(&sizes.cores, sizes.count).map_err(|error| anyhow!(error))?;
        let is_busy = sizes.poll == Poll::Busy;
        let workers = (0..sizes.count)
            .map(|index| {
                let setup = Setup {
                    index,
                    core: cores[index],
                    umem_frames: sizes.umem_frames,
                    flow_entries: sizes.flow_entries,
                    idle_turns: if is_busy { u32::MAX } else { sizes.idle_turns },
                    is_busy,
                    seed: random_seed(),
                };
                WorkerHandle::start(setup, shared.clone()).with_context(|| {
                    format!("cannot start worker {index}: lower worker.umem_frames or worker.flow_entries")
                })
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        let control = Control::new(control_config(&config));
        let links = Links::new(workers, config.daemon.xdp_mode.into(), start);
        let daemon = Daemon {
            config,
            store,
            kernel: Kernel::here()?,
            control: RefCell::new(control),
            links: RefCell::new(links),
            snapshot,
            stale: Notify::new(),
            start,
        };
        Ok((daemon, inbox, news))
    }

    fn configure(&self) -> anyhow::Result<()> {
        configure(&self.config, &mut self.control.borrow_mut(), &mut self.links.borrow_mut())
    }

    async fn attach_uplink(&self) -> anyhow::Result<()> {
        let Some(link) = &self.config.uplink.link else { return Ok(()) };
        if self.kernel.link(link).await?.is_none() {
            return Err(anyhow!("uplink.link: no link \"{link}\" here: name one that `ip link show` lists"));
        }
        self.refresh().await?;
        if self.control.borrow().uplink().is_none() {
            return Err(anyhow!("the uplink {link} could not be attached; the reason is above"));
        }
        Ok(())
    }

    /// Adopts the ports of the last daemon.
    fn restore(&self) {
        let state = match self.store.load() {
            Ok(Some(state)) => state,
            Ok(None) => return,
            Err(error) => return warn!("{error}"),
        };
        let before = state.ports.len();
        let lost = self.control.borrow_mut().restore(state, &mut *self.links.borrow_mut());
        lost.iter().for_each(|sentence| warn!("not taken over: {sentence}"));
        info!("{} of {before} ports taken over", self.control.borrow().links().count());
    }

    async fn handle(&self, request: Request) -> Result<Answer, ApiError> {
        let is_change = !request.is_question();
        let asked = format!("{request}");
        if let Request::PortAdd(spec) = &request {
            self.check_link(&spec.link).await?;
        }
        let answer = self.control.borrow_mut().handle(self.now_ns(), request, &mut *self.links.borrow_mut());
        match &answer {
            Ok(_) if !is_change => debug!("{asked}"),
            Ok(_) => info!("{asked}"),
            Err(error) => info!("{asked}: refused: {error}"),
        }
        if is_change {
            self.publish();
            self.save();
            self.stale.notify_one();
        }
        answer
    }

    /// A port takes every packet of its link: a NIC of the host plugged in by mistake would cut the node off.
    async fn check_link(&self, name: &str) -> Result<(), ApiError> {
        let system = |error: vswitch_link::LinkError| ApiError::new(ErrorCode::System, error.to_string());
        let refuse = |message: String| Err(ApiError::new(ErrorCode::Invalid, message));
        match self.kernel.link(name).await.map_err(system)? {
            None => refuse(format!(
                "no link {name} in the daemon's network namespace: plug pods in from there (see `ip link show`)"
            )),
            Some(link) if !link.is_veth => {
                refuse(format!("link {name} is no veth: only the host end of a pod's veth can be a port"))
            }
            Some(link) if !self.kernel.addresses(link.ifindex).await.map_err(system)?.is_empty() => refuse(format!(
                "link {name} has addresses of the host: only the bare end of a pod's veth can be a port"
            )),
            Some(_) => Ok(()),
        }
    }

    async fn refresh(&self) -> anyhow::Result<()> {
        let ports = || self.control.borrow().links().count();
        let before = ports();
        let refreshed = uplink::refresh(&self.kernel, &self.config.uplink, &self.control, &self.links).await;
        self.publish();
        if ports() != before {
            self.save();
        }
        Ok(refreshed?)
    }

    fn publish(&self) {
        if let Some(snapshot) = self.control.borrow_mut().take_snapshot() {
            self.snapshot.store(snapshot);
        }
    }

    fn save(&self) {
        let state = self.control.borrow().state(self.store.boot_id());
        if let Err(error) = self.store.save(&state) {
            warn!("the state could not be written, a restart will not know the latest change: {error}");
        }
    }

    fn now_ns(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let links = self.links.get_mut();
        links.detach(UPLINK_PORT);
    }
}

async fn serve(daemon: Rc<Daemon>, listener: UnixListener) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let daemon = daemon.clone();
                spawn_local(async move {
                    if let Err(error) = server::serve(stream, async |request| daemon.handle(request).await).await {
                        debug!("a connection broke: {error}");
                    }
                });
            }
            Err(error) => {
                // Out of descriptors, most likely; some will be free again.
                warn!("cannot accept a connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Takes in what workers saw, and lets learned stations age.
async fn learn(daemon: Rc<Daemon>, events: Receiver<Event>, news: Arc<Notify>) {
    let mut second = tokio::time::interval(Duration::from_secs(1));
    second.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = news.notified() => {}
            _ = second.tick() => daemon.control.borrow_mut().tick(daemon.now_ns()),
        }
        let now_ns = daemon.now_ns();
        // No more than one queue's worth, so that requests get their turn.
        for event in events.try_iter().take(EVENT_QUEUE) {
            daemon.control.borrow_mut().learn(now_ns, event);
        }
        daemon.publish();
        tokio::time::sleep(LEARN_INTERVAL).await;
    }
}

/// Keeps the view of the underlay up to date.
async fn follow_kernel(daemon: Rc<Daemon>, watch: Watch) {
    loop {
        if let Err(error) = daemon.refresh().await {
            warn!("the underlay could not be read: {error}");
        }
        tokio::time::sleep(NEWS_INTERVAL).await;
        tokio::select! {
            () = watch.changed() => {}
            () = daemon.stale.notified() => {}
            () = tokio::time::sleep(REFRESH_INTERVAL) => {}
        }
    }
}

async fn wait_for_end() -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    loop {
        tokio::select! {
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            _ = hangup.recv() => warn!("the configuration is read at start only: restart to apply it; pods keep their links"),
        }
    }
}

/// `sd_notify(3)`: one datagram, if systemd asked for it.
fn tell_systemd(state: &str) {
    if let Some(path) = std::env::var_os("NOTIFY_SOCKET")
        && let Ok(socket) = std::os::unix::net::UnixDatagram::unbound()
    {
        let _ = socket.send_to(state.as_bytes(), path);
    }
}

/// Unpredictable: the standard library seeds its hasher from the system's random source.
fn random_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}
