//! What control needs of the world: links and the workers' numbers. The daemon's is real; tests have a small one.

use vswitch_dataplane::connection::Connections;
use vswitch_dataplane::{Counters, FastState, Perf, table::flow::Flow};
use vswitch_net::PortId;
use vswitch_xsk::{KickCounters, SocketStatistics};

/// How a link was attached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attached {
    /// `native` or `generic`.
    pub xdp_mode: String,
    /// Why not native, if so.
    pub xdp_fallback: Option<String>,
    /// `copy` or `zero-copy`, by queue.
    pub copy_modes: Vec<String>,
    /// Why not zero copy, if it was tried.
    pub zero_copy_refusal: Option<String>,
}

/// A port without sockets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortRest {
    /// As long as it is silent.
    Silent,
    /// Something is to be sent to or from it, and it cannot have any: why.
    Stuck(String),
}

/// One socket's numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketSample {
    /// The port.
    pub port: Option<PortId>,
    /// The queue of its link.
    pub queue: u32,
    /// The kernel's counters.
    pub kernel: SocketStatistics,
    /// Our side's.
    pub kicks: KickCounters,
    /// Frames kept in the fill ring.
    pub fill_depth: u32,
}

/// One worker's numbers.
#[derive(Clone, Debug, Default)]
pub struct WorkerSample {
    /// The core it is pinned to.
    pub core: Option<usize>,
    /// Its counters.
    pub counters: Counters,
    /// Chunks of its umem.
    pub umem_frames: usize,
    /// Of these, free.
    pub umem_free: usize,
    /// Passes over its ports.
    pub turns: u64,
    /// Times it slept.
    pub sleeps: u64,
    /// Sizes of its bursts, and what stages cost.
    pub perf: Perf,
    /// How long it did what.
    pub times: WorkerTimes,
    /// Its sockets.
    pub sockets: Vec<SocketSample>,
    /// What it has the kernel forward, if that is asked for.
    pub fast: Option<FastState>,
}

/// The state of the offload.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OffloadSample {
    /// Why nothing is offloaded, if so.
    pub problem: Option<String>,
    /// Packets that ports' links lost.
    pub lost: u64,
    /// Ports that take no part, each with why.
    pub without: Vec<(PortId, String)>,
}

/// How long a worker did what.
#[derive(Clone, Copy, Debug, Default)]
pub struct WorkerTimes {
    /// In turns that had packets, nanoseconds.
    pub busy_ns: u64,
    /// In turns that had none.
    pub idle_ns: u64,
    /// Asleep.
    pub asleep_ns: u64,
    /// Ticks of the processor's counter since the worker started.
    pub cycles: u64,
}

/// Some flows of one worker.
#[derive(Clone, Debug, Default)]
pub struct FlowSample {
    /// The worker.
    pub worker: usize,
    /// The flows.
    pub flows: Vec<Flow>,
}

/// The world as control needs it.
pub trait Backend {
    /// Attaches a pod's host link as a port: program, sockets, workers.
    ///
    /// # Errors
    ///
    /// A sentence with the remedy; nothing is left behind.
    fn attach(&mut self, port: PortId, link: &str) -> Result<Attached, String>;

    /// Detaches a port. The link stays.
    fn detach(&mut self, port: PortId);

    /// Every queue of every link, with the worker that polls it: none after a move that failed for good.
    fn queues(&self) -> Vec<(PortId, u32, Option<usize>)>;

    /// Has a queue polled by another worker. What arrives at it meanwhile is lost, and what the old worker had not sent by it.
    ///
    /// # Errors
    ///
    /// A sentence with the remedy. The queue is polled by who had it, or by nobody if that failed too.
    fn move_queue(&mut self, port: PortId, queue: u32, worker: usize) -> Result<(), String>;

    /// The numbers of every worker.
    fn sample(&mut self) -> Vec<WorkerSample>;

    /// Up to `limit` flows of each worker that had a packet since `since_ns`.
    fn flows(&mut self, since_ns: u64, limit: usize) -> Vec<FlowSample>;

    /// Lets a port be without sockets while it is silent: nothing is flooded to it, so that only what is meant for it wakes it.
    fn let_rest(&mut self, _port: PortId) {}

    /// Whether a port is without sockets now.
    fn rest(&self, _port: PortId) -> Option<PortRest> {
        None
    }

    /// The state of the offload, if it is asked for.
    fn offload(&self) -> Option<OffloadSample> {
        None
    }

    /// The connections of all workers.
    fn connections(&self) -> &Connections;

    /// Process id, seconds since start, resident bytes.
    fn process(&self) -> (u32, u64, u64);
}
