//! A worker thread: the clock, the sleep and the commands around [`vswitch_dataplane::Worker`].
//!
//! The thread turns as long as a port is active. A port without packets for a while is armed in an epoll set and not
//! polled; with no active port left the thread lingers ([`Linger`]) and then sleeps there. Commands come over a queue, with
//! an eventfd to end a sleep.

mod commands;
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
use vswitch_control::{SocketSample, WorkerSample, WorkerTimes};
use vswitch_dataplane::connection::Connections;
use vswitch_dataplane::{Event, Snapshot, Worker, WorkerConfig};
use vswitch_net::PortId;
use vswitch_xsk::{Umem, XskSocket, cycles};

use crate::config::Poll;
use crate::linger::Linger;

use self::commands::Leaving;
use self::handle::Command;
pub(crate) use self::handle::{ANSWER_TIMEOUT, WorkerHandle};
pub(crate) use self::queues::Bell;
use self::queues::Queues;

/// While ports are polled, parked ones are looked at every so many turns.
const PARKED_CHECK_TURNS: u32 = 32;

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

struct WorkerThread {
    worker: Worker<Queues>,
    inbox: Receiver<Command>,
    snapshot: Cache<Arc<ArcSwap<Snapshot>>, Arc<Snapshot>>,
    shared: Shared,
    setup: Setup,
    sleeper: OwnedFd,
    waker: Arc<OwnedFd>,
    linger: Linger,
    /// Ports that are to rest.
    leaving: Vec<Leaving>,
    /// What sockets had counted that ports at rest gave away.
    retired: Vec<SocketSample>,
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
            retired: Vec::new(),
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
    /// each packet that comes, and for each that it has sent.
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
        // After the idle ones, for the same turn may have sent to one of those.
        let roused: Vec<PortId> = self.worker.take_roused().collect();
        roused.into_iter().for_each(|port| self.poll(port));
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
        let of = |(port, queues): (PortId, &'_ Queues)| -> Vec<SocketSample> {
            queues.sockets.iter().map(|socket| sample_of(port, socket)).collect()
        };
        let mut sockets: Vec<SocketSample> = self.worker.ports().flat_map(of).collect();
        self.retired.iter().for_each(|before| add_sample(&mut sockets, before));
        WorkerSample {
            core: self.setup.core,
            counters: self.worker.counters().clone(),
            umem_frames: self.worker.umem().chunks(),
            umem_free: self.worker.umem().free_chunks(),
            turns: self.turns,
            sleeps: self.sleeps,
            perf: self.worker.perf().clone(),
            times: WorkerTimes { cycles: cycles().wrapping_sub(self.start_cycles), ..self.times },
            sockets,
            fast: self.worker.fast_state(),
        }
    }
}

/// Adds what a socket that is gone had counted to its queue's numbers.
fn add_sample(samples: &mut Vec<SocketSample>, gone: &SocketSample) {
    match samples.iter_mut().find(|sample| (sample.port, sample.queue) == (gone.port, gone.queue)) {
        Some(sample) => {
            sample.kernel.add(&gone.kernel);
            sample.kicks.add(&gone.kicks);
        }
        None => samples.push(SocketSample { fill_depth: 0, ..*gone }),
    }
}

fn sample_of(port: PortId, socket: &XskSocket) -> SocketSample {
    SocketSample {
        port: Some(port),
        queue: socket.queue(),
        // A link that is gone has no statistics any more.
        kernel: socket.statistics().unwrap_or_default(),
        kicks: socket.counters(),
        fill_depth: socket.fill_depth(),
    }
}
