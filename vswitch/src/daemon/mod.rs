//! The control thread: the one writer. Socket, kernel news, workers' events and time all end in [`Control`].

mod refresh;
mod requests;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, anyhow};
use arc_swap::ArcSwap;
use crossbeam_channel::Receiver;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Mutex, Notify};
use tokio::task::spawn_local;
use tracing::{info, warn};
use vswitch_api::Request;
use vswitch_control::{Backend, Control, ControlConfig, HOST_PORT, HostState, PodRoutes, UPLINK_PORT};
use vswitch_dataplane::connection::Connections;
use vswitch_dataplane::{Event, Snapshot};
use vswitch_link::{Kernel, Watch};
use vswitch_net::PortId;

use crate::backend::{LinkSetup, Links};
use crate::config::Config;
use crate::follow::Followed;
use crate::host::HostLink;
use crate::store::Store;
use crate::tasks::EVENT_QUEUE;
use crate::worker::{Bell, Setup, Shared, WorkerHandle};
use crate::{cores, follow, host, server, tasks};

/// A host port that could not be made is tried again this much later.
const HOST_RETRY_NS: u64 = 5_000_000_000;

/// How long after a start the backends of services wait for their clients: a segment that was lost meanwhile comes again within
/// this time (RFC 6298).
const CLIENTS_FIRST_NS: u64 = 4_000_000_000;

/// Everything the control thread owns.
pub(crate) struct Daemon {
    pub(crate) config: Config,
    store: Store,
    pub(crate) kernel: Kernel,
    pub(crate) control: RefCell<Control>,
    links: RefCell<Links>,
    snapshot: Arc<ArcSwap<Snapshot>>,
    /// Wakes the refresh of the underlay, after a request that may need it.
    pub(crate) stale: Notify,
    /// The port into the host's stack, once made.
    host: Mutex<Option<HostLink>>,
    /// When it is tried again to make it, if it was lost and could not be.
    host_retry_ns: Cell<u64>,
    pub(crate) followed: Mutex<Followed>,
    /// Routes that pods are known to have.
    pod_routes: RefCell<BTreeMap<PortId, PodRoutes>>,
    start: Instant,
}

/// What workers say.
struct Heard {
    events: Receiver<Event>,
    news: Arc<Notify>,
    /// Ports at rest that something is to be sent to.
    calls: Receiver<PortId>,
    rung: Arc<Notify>,
}

/// Runs the daemon until a signal ends it.
///
/// # Errors
///
/// What keeps it from starting, with the remedy.
pub(crate) async fn run(config: Config) -> anyhow::Result<()> {
    let store = Store::open(&config.daemon.runtime_dir).map_err(|error| anyhow!(error))?;
    let watch = Watch::here()?;
    let (daemon, heard) = Daemon::start(config, store)?;
    let daemon = Rc::new(daemon);
    daemon.configure()?;
    // A daemon that crashed could not.
    daemon.leave_host().await;
    let ended = live(&daemon, watch, heard).await;
    daemon.leave_host().await;
    ended
}

/// From the first link to the signal that ends it.
async fn live(daemon: &Rc<Daemon>, watch: Watch, heard: Heard) -> anyhow::Result<()> {
    if let Some(network) = &daemon.config.host.network {
        daemon.attach_host().await.with_context(|| format!("the host cannot be joined to network \"{network}\""))?;
    }
    daemon.attach_uplinks().await?;
    daemon.restore()?;
    follow::take_back(&daemon.kernel, &daemon.control).await;
    daemon.links.borrow().connections().wait_for_clients(daemon.now_ns() + CLIENTS_FIRST_NS);
    daemon.publish();
    daemon.carry_out().await;
    let socket = daemon.config.socket();
    let listener = server::listen(&socket).with_context(|| {
        format!("cannot listen at {}: set daemon.socket to a path that can be written", socket.display())
    })?;
    info!("listening at {}", socket.display());
    spawn_local(tasks::serve(daemon.clone(), listener));
    spawn_local(tasks::learn(daemon.clone(), heard.events, heard.news));
    spawn_local(tasks::wake(daemon.clone(), heard.calls, heard.rung));
    spawn_local(tasks::follow_kernel(daemon.clone(), watch));
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
    cores_of(config)?;
    let mut control = Control::new(control_config(config));
    // A configuration adds no ports, so there is nothing to attach.
    let connections = Arc::new(Connections::new(config.connections.config(&config.policy, 0)));
    let mut links = Links::new(Vec::new(), connections, bell().0, link_setup(config, clock_start()));
    configure(config, &mut control, &mut links)
}

/// The core of each worker.
fn cores_of(config: &Config) -> anyhow::Result<Vec<Option<usize>>> {
    let near: Vec<usize> = config.uplink.all().flat_map(|link| cores::near(Path::new(cores::SYSFS), link)).collect();
    let sizes = &config.worker;
    let chosen = cores::choose(&sizes.cores, sizes.count, &cores::allowed(), &near).map_err(|error| anyhow!(error))?;
    for core in chosen.iter().flatten().filter(|core| !near.is_empty() && !near.contains(core)) {
        warn!(
            "core {core} is not on the NUMA node of the uplink: packets cross between nodes; cores {near:?} are near"
        );
    }
    Ok(chosen)
}

/// Applies the configuration file.
fn configure(config: &Config, control: &mut Control, links: &mut Links) -> anyhow::Result<()> {
    for request in config.requests() {
        let what = match &request {
            Request::NetworkAdd(spec) => format!("[[network]] \"{}\"", spec.name),
            Request::PeerAdd(spec) => format!("[[peer]] \"{}\"", spec.name),
            Request::RouteAdd(spec) => format!("[[route]] {}", spec.prefix),
            Request::ServiceSet { .. } => "[[service]]".to_owned(),
            Request::EgressSet(spec) => format!("[[egress]] \"{}\"", spec.name),
            other => other.to_string(),
        };
        control.configure(request, links).map_err(|error| anyhow!("configuration, {what}: {error}"))?;
    }
    Ok(())
}

fn control_config(config: &Config) -> ControlConfig {
    ControlConfig {
        udp_port: config.uplink.udp_port,
        vlan: config.uplink.vlan,
        gateways: config.uplink.gateway.clone(),
        router_mac: config.uplink.router_mac,
        uplinks: config.uplink.all().cloned().collect(),
        host_network: config.host.network.clone(),
        is_importing: config.routes.is_importing(),
        import_encap: config.routes.encap,
        masquerade: config.host.masquerade,
        // Checked when it was read.
        failsafe: config.policy.failsafe().unwrap_or_default(),
        requires_endpoints: config.policy.require_endpoints,
        fdb_ageing_ns: config.fdb.ageing_seconds.saturating_mul(1_000_000_000),
        fdb_limit: config.fdb.limit,
    }
}

fn link_setup(config: &Config, start: Instant) -> LinkSetup {
    LinkSetup {
        xdp: config.daemon.xdp_mode.into(),
        offload_flows: config.worker.offloaded(),
        rest_after: config.worker.rest_after(),
        seed: random_seed(),
        start,
    }
}

/// What workers ring when a port at rest is to be woken, and who listens. It holds as many calls as there are ports.
fn bell() -> (Bell, Receiver<PortId>) {
    let (ports, calls) = crossbeam_channel::bounded(usize::from(u16::MAX));
    (Bell { ports, rung: Arc::new(Notify::new()) }, calls)
}

#[expect(clippy::disallowed_methods, reason = "the daemon's clock starts here")]
fn clock_start() -> Instant {
    Instant::now()
}

impl Daemon {
    fn start(config: Config, store: Store) -> anyhow::Result<(Daemon, Heard)> {
        let start = clock_start();
        let snapshot = Arc::new(ArcSwap::from_pointee(Snapshot::default()));
        let (events, inbox) = crossbeam_channel::bounded(EVENT_QUEUE);
        let news = Arc::new(Notify::new());
        let connections = Arc::new(Connections::new(config.connections.config(&config.policy, random_seed())));
        let (bell, calls) = bell();
        let heard = Heard { events: inbox, news: news.clone(), calls, rung: bell.rung.clone() };
        let shared = Shared {
            snapshot: snapshot.clone(),
            events,
            news,
            bell: bell.clone(),
            connections: connections.clone(),
            start,
        };
        let sizes = &config.worker;
        let cores = cores_of(&config)?;
        let workers = (0..sizes.count)
            .map(|index| {
                let setup = Setup {
                    index,
                    core: cores[index],
                    umem_frames: sizes.umem_frames,
                    flow_entries: sizes.flow_entries,
                    idle_turns: sizes.idle_turns,
                    poll: sizes.poll,
                    seed: random_seed(),
                };
                WorkerHandle::start(setup, shared.clone()).with_context(|| {
                    format!("cannot start worker {index}: lower worker.umem_frames or worker.flow_entries")
                })
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        config.doubts().iter().for_each(|doubt| warn!("{doubt}"));
        let control = Control::new(control_config(&config));
        let links = Links::new(workers, connections, bell, link_setup(&config, start));
        let daemon = Daemon {
            config,
            store,
            kernel: Kernel::here()?,
            control: RefCell::new(control),
            links: RefCell::new(links),
            snapshot,
            stale: Notify::new(),
            host: Mutex::new(None),
            host_retry_ns: Cell::new(0),
            followed: Mutex::new(Followed::default()),
            pod_routes: RefCell::new(BTreeMap::new()),
            start,
        };
        Ok((daemon, heard))
    }

    fn configure(&self) -> anyhow::Result<()> {
        configure(&self.config, &mut self.control.borrow_mut(), &mut self.links.borrow_mut())
    }

    /// A missing uplink is a mistake in the configuration, as long as there is no other.
    async fn attach_uplinks(&self) -> anyhow::Result<()> {
        let Some(first) = self.config.uplink.all().next() else { return Ok(()) };
        let mut is_there = false;
        for link in self.config.uplink.all() {
            is_there |= self.kernel.link(link).await?.is_some();
        }
        if !is_there {
            return Err(anyhow!("uplink.link: no link \"{first}\" here: name one that `ip link show` lists"));
        }
        self.refresh().await?;
        let count = self.config.uplink.all().count() as u16;
        let is_attached = |at: u16| self.control.borrow().uplink(PortId(UPLINK_PORT.0 + at)).is_some();
        if !(0..count).any(is_attached) {
            return Err(anyhow!("the uplink {first} could not be attached; the reason is above"));
        }
        Ok(())
    }

    /// Makes the port into the host's stack.
    async fn attach_host(&self) -> anyhow::Result<()> {
        let (host, runtime_dir) = (&self.config.host, &self.config.daemon.runtime_dir);
        let link = HostLink::create(&self.kernel, host, runtime_dir, &self.config.worker).await?;
        let attached =
            self.links.borrow_mut().attach(HOST_PORT, &host.switch_link()).map_err(|error| anyhow!(error))?;
        info!("host port {} attached: xdp {}", host.link, attached.xdp_mode);
        self.control.borrow_mut().set_host(Ok(HostState {
            link: host.link.clone(),
            mac: link.mac,
            attached,
            problem: None,
        }));
        *self.host.lock().await = Some(link);
        Ok(())
    }

    /// Tells the host's kernel what control wants of it, and looks whether the host lets packets pass.
    pub(crate) async fn carry_out(&self) {
        let mut host = self.host.lock().await;
        let Some(host) = host.as_mut() else { return };
        let plan = self.control.borrow().host_plan(&self.config.host.link);
        if let Some(plan) = plan {
            host.carry_out(&self.kernel, self.now_ns(), plan).await;
        }
        self.write_subnet_env();
        let known = self.control.borrow().host().cloned();
        if let Some(known) = known {
            self.control.borrow_mut().set_host(Ok(HostState { problem: host.problem(), ..known }));
        }
    }

    /// What flanneld leaves for CNI plugins, for those who read it.
    fn write_subnet_env(&self) {
        let Some(path) = &self.config.host.subnet_env else { return };
        let Some(text) = self.control.borrow().subnet_env() else { return };
        if std::fs::read_to_string(path).is_ok_and(|before| before == text) {
            return;
        }
        let written = path.parent().map_or(Ok(()), std::fs::create_dir_all).and_then(|()| std::fs::write(path, text));
        if let Err(error) = written {
            warn!("cannot write {}: {error}; set host.subnet_env to a path that can be written", path.display());
        }
    }

    /// Takes back what was done to the host.
    async fn leave_host(&self) {
        self.followed.lock().await.remove(&self.kernel).await;
        let host = self.host.lock().await.take();
        if host.is_some() {
            self.links.borrow_mut().detach(HOST_PORT);
        }
        host::take_back(&self.kernel, &self.config.daemon.runtime_dir, host).await;
    }

    /// Adopts the ports of the last daemon.
    fn restore(&self) -> anyhow::Result<()> {
        // First what protects the ports, then the ports.
        let journal = self.store.load_journal().map_err(|error| anyhow!(error))?;
        let lost = self.control.borrow_mut().restore_policies(journal, &mut *self.links.borrow_mut());
        if let Some(sentence) = lost.first() {
            return Err(anyhow!(
                "a policy of the last daemon cannot be taken over ({sentence}): move policy.jsonl in {} away to start without them",
                self.config.daemon.runtime_dir.display()
            ));
        }
        self.write_journal().context("policies cannot be noted: make room in daemon.runtime_dir")?;
        let state = match self.store.load() {
            Ok(Some(state)) => state,
            Ok(None) => return Ok(()),
            Err(error) => {
                warn!("{error}");
                return Ok(());
            }
        };
        let before = state.ports.len();
        let lost = self.control.borrow_mut().restore(state, &mut *self.links.borrow_mut());
        lost.iter().for_each(|sentence| warn!("not taken over: {sentence}"));
        info!("{} of {before} ports taken over", self.control.borrow().links().count());
        Ok(())
    }

    pub(crate) fn publish(&self) {
        let snapshot = self.control.borrow_mut().take_snapshot();
        if let Some(snapshot) = snapshot {
            if let Some((local, cluster)) = self.control.borrow().direct_prefixes()
                && let Err(error) = self.links.borrow_mut().set_direct(&local, &cluster)
            {
                warn!("direct routing: {error}");
            }
            let generation = snapshot.generation;
            self.snapshot.store(snapshot);
            // What was judged before ends in the kernel too.
            self.links.borrow().set_generation(generation);
        }
        let own = self.control.borrow_mut().take_own();
        self.links.borrow().send_own(own);
    }

    pub(crate) fn now_ns(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let links = self.links.get_mut();
        (0..HOST_PORT.0).for_each(|port| links.detach(PortId(port)));
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
