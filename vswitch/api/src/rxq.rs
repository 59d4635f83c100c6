//! Receive queues: which worker polls which, what each has received, and how they are dealt out anew.

use serde::{Deserialize, Serialize};

/// To `rxq_list`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RxqInfo {
    /// All queues of all links.
    pub queues: Vec<QueueInfo>,
    /// All workers.
    pub workers: Vec<WorkerLoad>,
}

/// A queue of a link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueInfo {
    /// The link.
    pub link: String,
    /// The queue's number.
    pub queue: u32,
    /// The worker that polls it; none if it could not be bound again when it was moved.
    pub worker: Option<usize>,
    /// Packets received since that worker has it.
    pub packets: u64,
}

/// How long a worker did what since it started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerLoad {
    /// The worker.
    pub worker: usize,
    /// The core it is pinned to.
    pub core: Option<usize>,
    /// In turns that had packets, nanoseconds.
    pub busy_ns: u64,
    /// In all.
    pub all_ns: u64,
}

/// What a queue costs its worker: of a thousand parts of the worker's time, so many.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueLoad {
    /// The link.
    pub link: String,
    /// The queue's number.
    pub queue: u32,
    /// Thousandths of its worker's time.
    pub load: u32,
}

/// A queue that is to be polled by another worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueMove {
    /// The link.
    pub link: String,
    /// The queue's number.
    pub queue: u32,
    /// The worker to poll it.
    pub worker: usize,
}

/// To `rxq_rebalance`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RxqPlan {
    /// What is moved, or would be.
    pub moves: Vec<QueueMove>,
    /// The load of each worker's queues now, in thousandths of its time.
    pub before: Vec<u32>,
    /// The same after the moves.
    pub after: Vec<u32>,
    /// Whether the moves were made.
    pub is_applied: bool,
}
