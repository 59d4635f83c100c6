//! A worker thread: the clock, the sleep and the commands around [`vswitch_dataplane::Worker`].
//!
//! The thread turns as long as a port is active. A port without packets for a while is armed in an epoll set and not
//! polled; with no active port left the thread lingers ([`Linger`]) and then sleeps there. Commands come over a queue, with
//! an eventfd to end a sleep.

mod handle;
mod queues;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, Cache};
use crossbeam_channel::{Receiver, Sender, TrySendError};
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use tokio::sync::Notify;
use vswitch_control::{FlowSample, MAX_UPLINKS, Own, SocketSample, WorkerSample, WorkerTimes};
use vswitch_dataplane::connection::Connections;
use vswitch_dataplane::{DropReason, Event, Snapshot, Worker, WorkerConfig};
use vswitch_net::PortId;
use vswitch_xsk::{BoundSocket, Closing, Umem, XskSocket, cycles};

use crate::config::Poll;
use crate::linger::Linger;

use self::handle::Command;
pub(crate) use self::handle::{ANSWER_TIMEOUT, WorkerHandle};
pub(crate) use self::queues::Bell;
use self::queues::Queues;

/// While ports are polled, parked ones are looked at every so many turns.
const PARKED_CHECK_TURNS: u32 = 32;

/// How long a port that is to rest may still send.
const LEAVING_TURNS: u32 = 1000;

/// Longest sleep; a shorter one while sent frames are still with the kernel.
const SLEEP: Duration = Duration::from_millis(500);
const SLEEP_WHILE_SENDING: Duration = Duration::from_millis(1);

/// Sleep while flows are forwarded in the kernel, whose counters are to be read in turn.
const SLEEP_WHILE_OFFLOADING: Duration = Duration::from_millis(20);

/// Marks the eventfd among the ports in the epoll set.
const WAKER: u64 = u64::MAX;

/// What all workers share.
#[derive(Clone, Debug)]
pub(crate) struct Shared {
    pub(crate) snapshot: Arc<ArcSwap<Snapshot>>,
    pub(crate) events: Sender<Event>,
    pub(crate) news: Arc<Notify>,
    pub(crate) bell: Bell,
    pub(crate) connections: Arc<Connections>,
    pub(crate) start: Instant,
}

/// How a worker is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    pub(crate) index: usize,
    pub(crate) core: Option<usize>,
    pub(crate) umem_frames: usize,
    pub(crate) flow_entries: usize,
    pub(crate) idle_turns: u32,
    pub(crate) poll: Poll,
    pub(crate) seed: u64,
}

impl Setup {
    fn config(&self) -> WorkerConfig {
        let idle_turns = match self.poll {
            Poll::Busy => u32::MAX,
            Poll::Adaptive => self.idle_turns,
            Poll::Interrupt => 0,
        };
        WorkerConfig { flow_entries: self.flow_entries, seed: self.seed, idle_turns }
    }
}

/// A port that is to rest.
struct Leaving {
    port: PortId,
    answer: Sender<Vec<(Arc<OwnedFd>, Closing)>>,
    turns: u32,
}

struct WorkerThread {
    worker: Worker<Queues>,
    inbox: Receiver<Command>,
    snapshot: Cache<Arc<ArcSwap<Snapshot>>, Arc<Snapshot>>,
    shared: Shared,
    setup: Setup,
    sleeper: OwnedFd,
    waker: Arc<OwnedFd>,
    linger: Linger,
    leaving: Vec<Leaving>,
    turns: u64,
    sleeps: u64,
    times: WorkerTimes,
    /// When the times were last added to, and the processor's counter at the start.
    since_ns: u64,
    start_cycles: u64,
}

impl WorkerThread {
    /// A worker over `umem`. It sleeps at `sleeper`, which `waker` ends.
    fn new(
        umem: Umem,
        setup: Setup,
        shared: Shared,
        inbox: Receiver<Command>,
        sleeper: OwnedFd,
        waker: Arc<OwnedFd>,
    ) -> WorkerThread {
        WorkerThread {
            worker: Worker::new(umem, setup.config(), shared.connections.clone()),
            inbox,
            snapshot: Cache::new(shared.snapshot.clone()),
            shared,
            setup,
            sleeper,
            waker,
            linger: Linger::default(),
            leaving: Vec::new(),
            turns: 0,
            sleeps: 0,
            times: WorkerTimes::default(),
            since_ns: 0,
            start_cycles: 0,
        }
    }

    fn run(mut self) {
        self.start_cycles = cycles();
        self.since_ns = self.shared.start.elapsed().as_nanos() as u64;
        let mut is_busy = false;
        let mut since_check = 0;
        loop {
            while let Ok(command) = self.inbox.try_recv() {
                if !self.obey(command) {
                    return;
                }
            }
            let now_ns = self.shared.start.elapsed().as_nanos() as u64;
            let spent_ns = now_ns - self.since_ns;
            *(if is_busy { &mut self.times.busy_ns } else { &mut self.times.idle_ns }) += spent_ns;
            self.since_ns = now_ns;
            let turn = self.worker.turn(now_ns, self.snapshot.load());
            self.turns += 1;
            is_busy = turn.walked > 0;
            if self.worker.has_events() {
                self.report();
            }
            if !self.leaving.is_empty() {
                self.let_rest();
            }
            self.park();
            since_check += 1;
            if self.worker.has_active() {
                self.linger.interrupt();
                if since_check >= PARKED_CHECK_TURNS {
                    since_check = 0;
                    self.wait(Duration::ZERO);
                }
            } else {
                since_check = 0;
                let stays_awake = match self.setup.poll {
                    Poll::Busy => true,
                    Poll::Adaptive => self.linger.goes_on(now_ns, self.times.busy_ns),
                    Poll::Interrupt => false,
                };
                if stays_awake {
                    thread::yield_now();
                    self.wait(Duration::ZERO);
                    continue;
                }
                self.sleeps += 1;
                let slept_from_ns = self.shared.start.elapsed().as_nanos() as u64;
                let is_packet = self.wait(match () {
                    () if turn.is_sending || turn.is_holding => SLEEP_WHILE_SENDING,
                    () if self.worker.has_fast_flows() => SLEEP_WHILE_OFFLOADING,
                    () => SLEEP,
                });
                // What it did before it slept is counted here, for the next turn begins with the wake-up.
                let woken_ns = self.shared.start.elapsed().as_nanos() as u64;
                *(if is_busy { &mut self.times.busy_ns } else { &mut self.times.idle_ns }) +=
                    slept_from_ns - self.since_ns;
                self.times.asleep_ns += woken_ns - slept_from_ns;
                if is_packet {
                    self.linger.learn(woken_ns);
                }
                self.since_ns = woken_ns;
                is_busy = false;
            }
        }
    }

    /// False to stop.
    fn obey(&mut self, command: Command) -> bool {
        match command {
            Command::Insert(port, sockets) => {
                let count = sockets.len();
                let sockets: Vec<XskSocket> =
                    sockets.into_iter().map(|socket| self.adopt(port, socket, count)).collect();
                self.insert(port, sockets);
            }
            Command::Prepare(port, sockets) => {
                let count = sockets.len();
                let sockets: Vec<XskSocket> =
                    sockets.into_iter().map(|socket| self.adopt(port, socket, count)).collect();
                match self.worker.port_and_umem(port) {
                    Some((queues, umem)) => queues.prepare(sockets, umem),
                    None => self.discard(Queues::new(sockets)),
                }
            }
            Command::Wake(port) => {
                if let Some((queues, umem)) = self.worker.port_and_umem(port) {
                    queues.wake(umem);
                    self.poll(port);
                }
            }
            Command::Remove(port, answer) => {
                let queues = self.worker.remove_port(port);
                let sockets = queues.map_or_else(Vec::new, |queues| queues.dissolve(self.worker.umem_mut()));
                self.give_away(sockets, &answer);
            }
            Command::Rest(port, answer) => {
                // Not before what has come is taken in.
                self.poll(port);
                self.leaving.push(Leaving { port, answer, turns: 0 });
            }
            Command::Receive(port, packets) => {
                let now_ns = self.shared.start.elapsed().as_nanos() as u64;
                self.worker.receive(port, now_ns, self.snapshot.load(), &packets);
            }
            Command::Lost(port, packets) => self.worker.count_lost(port, packets, DropReason::Resting),
            Command::AddQueue(port, socket) => {
                let count = self.worker.port(port).map_or(0, |queues| queues.sockets.len()) + 1;
                let socket = self.adopt(port, *socket, count);
                match self.worker.port_and_umem(port) {
                    Some((queues, _)) => queues.sockets.push(socket),
                    None => self.insert(port, vec![socket]),
                }
                self.poll(port);
            }
            Command::RemoveQueue(port, queue, answer) => {
                let sockets = self.worker.port_and_umem(port).map_or_else(Vec::new, |(queues, _)| {
                    queues.turn = 0;
                    queues.sockets.extract_if(.., |socket| socket.queue() == queue).collect()
                });
                self.give_away(sockets, &answer);
            }
            Command::Reclaim(closing) => {
                closing.into_iter().for_each(|closing| closing.reclaim(self.worker.umem_mut()));
            }
            Command::Offload(table) => self.worker.offload(Box::new(table)),
            Command::Originate(packets) => {
                let now_ns = self.shared.start.elapsed().as_nanos() as u64;
                let snapshot = self.snapshot.load();
                for Own { way, bytes } in packets {
                    self.worker.originate(now_ns, snapshot, way, &bytes);
                }
            }
            Command::Sync(answer) => {
                let _ = answer.send(());
            }
            Command::Sample(answer) => {
                self.worker.settle(self.shared.start.elapsed().as_nanos() as u64);
                let _ = answer.send(self.sample());
            }
            Command::Flows { since_ns, limit, answer } => {
                self.worker.settle(self.shared.start.elapsed().as_nanos() as u64);
                let flows = self.worker.flows(since_ns, limit);
                let _ = answer.send(FlowSample { worker: self.setup.index, flows });
            }
            Command::Stop => return false,
        }
        true
    }

    /// Makes a port.
    fn insert(&mut self, port: PortId, sockets: Vec<XskSocket>) {
        if let Some(before) = self.worker.insert_port(port, Queues::new(sockets)) {
            self.discard(before);
        }
    }

    /// Closes the sockets of ports that are to rest, once what they had received was taken in, and what they had to send was
    /// looked at by the kernel; that it waits for no longer than a link may need that is up.
    fn let_rest(&mut self) {
        for mut leaving in std::mem::take(&mut self.leaving) {
            let port = leaving.port;
            leaving.turns += 1;
            let is_unsent = self.worker.port_and_umem(port).is_some_and(|(queues, _)| queues.is_unsent());
            if is_unsent && leaving.turns < LEAVING_TURNS {
                self.leaving.push(leaving);
                continue;
            }
            let sockets = match self.worker.port_and_umem(port) {
                Some((queues, _)) => queues.rest(port, self.shared.bell.clone()),
                None => Vec::new(),
            };
            self.give_away(sockets, &leaving.answer);
        }
    }

    /// Makes a socket one of this worker's.
    /// It is one of so many of its port.
    fn adopt(&mut self, port: PortId, socket: BoundSocket, count: usize) -> XskSocket {
        let umem = self.worker.umem_mut();
        let socket = socket.adopt(umem);
        if port.index() < MAX_UPLINKS { socket.expect_many(umem, count) } else { socket }
    }

    /// Gives sockets to whoever closes them.
    fn give_away(&mut self, sockets: Vec<XskSocket>, answer: &Sender<Vec<(Arc<OwnedFd>, Closing)>>) {
        let closing: Vec<(Arc<OwnedFd>, Closing)> = sockets
            .into_iter()
            .map(|socket| {
                // It is there only while the port is parked.
                let _ = epoll::delete(&self.sleeper, &socket);
                socket.close_later(self.worker.umem_mut())
            })
            .collect();
        if let Err(unheard) = answer.send(closing) {
            // Nobody waits any more: close here, whatever it takes.
            for (fd, closing) in unheard.0 {
                drop(fd);
                closing.reclaim(self.worker.umem_mut());
            }
        }
    }

    fn discard(&mut self, queues: Queues) {
        let umem = self.worker.umem_mut();
        queues.dissolve(umem).into_iter().for_each(|socket| socket.close(umem));
    }

    fn report(&mut self) {
        let mut lost = 0;
        for event in self.worker.drain_events() {
            if let Err(TrySendError::Full(_)) = self.shared.events.try_send(event) {
                lost += 1;
            }
        }
        (0..lost).for_each(|_| self.worker.count_lost_event());
        self.shared.news.notify_one();
    }

    /// Has epoll listen to the ports that went idle. Those that are polled are not in its set: the kernel would call it for
    /// each packet that comes.
    fn park(&mut self) {
        let idle: Vec<PortId> = self.worker.take_idle().collect();
        for port in idle {
            let sockets = self.worker.port(port).map_or(&[][..], |queues| &queues.sockets);
            let mut is_heard = true;
            for socket in sockets {
                let data = epoll::EventData::new_u64(u64::from(port.0));
                // It may be there already, if a queue came while the port was parked.
                is_heard &= matches!(
                    epoll::add(&self.sleeper, socket, data, epoll::EventFlags::IN),
                    Ok(()) | Err(Errno::EXIST)
                );
            }
            if !is_heard {
                // The kernel has no room for it: polled on, for it would never be heard of again.
                self.worker.wake(port);
            }
        }
    }

    /// Sleeps until a parked port is readable or a command came, and wakes those ports. True if there was one.
    fn wait(&mut self, timeout: Duration) -> bool {
        let mut ready = [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 64];
        let timeout = Timespec { tv_sec: 0, tv_nsec: timeout.as_nanos() as i64 };
        let Ok(count) = epoll::wait(&self.sleeper, &mut ready[..], Some(&timeout)) else { return false };
        let mut is_packet = false;
        for event in &ready[..count] {
            match event.data.u64() {
                WAKER => {
                    let _ = rustix::io::read(&self.waker, &mut [0; 8]);
                }
                port => {
                    self.poll(PortId(port as u16));
                    is_packet = true;
                }
            }
        }
        is_packet
    }

    /// Has a port polled that may be parked.
    fn poll(&mut self, port: PortId) {
        for socket in self.worker.port(port).map_or(&[][..], |queues| &queues.sockets) {
            let _ = epoll::delete(&self.sleeper, socket);
        }
        self.worker.wake(port);
    }

    fn sample(&self) -> WorkerSample {
        let sockets = self.worker.ports().flat_map(|(port, queues)| {
            queues.sockets.iter().map(move |socket| SocketSample {
                port: Some(port),
                queue: socket.queue(),
                // A link that is gone has no statistics any more.
                kernel: socket.statistics().unwrap_or_default(),
                kicks: socket.counters(),
                fill_depth: socket.fill_depth(),
            })
        });
        WorkerSample {
            core: self.setup.core,
            counters: self.worker.counters().clone(),
            umem_frames: self.worker.umem().chunks(),
            umem_free: self.worker.umem().free_chunks(),
            turns: self.turns,
            sleeps: self.sleeps,
            perf: self.worker.perf().clone(),
            times: WorkerTimes { cycles: cycles().wrapping_sub(self.start_cycles), ..self.times },
            sockets: sockets.collect(),
            fast: self.worker.fast_state(),
        }
    }
}
