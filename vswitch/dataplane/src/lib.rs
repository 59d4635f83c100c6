//! The data path: packets in, verdicts, packets out. Pure: no clock, thread, lock, log or allocation a packet.
//!
//! # The walk
//!
//! ```text
//! rx ring -> worker::turn -> parse -> flow lookup --hit-----------------------> egress -> tx ring
//!                                        \--miss--> decide: spoof, learn, route/FDB --/
//! ```
//!
//! A flow that has been looked up a few times may be handed to the kernel, where allowed: `fastpath`.
//!
//! [`Worker::turn`] is given the time and a [`Snapshot`]; it polls its ports, and runs each burst through
//! [`mod@parse`], [`table::flow`], [`mod@decide`] and [`mod@egress`]. Time is an argument and ports are a trait, so the
//! same code runs over AF_XDP in the daemon and over memory in tests and benches.
//!
//! # Counting
//!
//! Every packet ends in exactly one counter: `rx = tx + drops + merged - copies`, where a copy is one more packet made by
//! flooding. See [`Counters`].
#![forbid(unsafe_code)]

mod bucket;
mod burst;
pub mod connection;
mod counters;
pub mod decide;
pub mod egress;
mod event;
mod fastpath;
mod icmp;
mod intact;
mod judge;
pub mod meta;
mod miss;
mod multicast;
mod nat;
mod offload;
pub mod parse;
mod perf;
mod port;
mod replicate;
mod reply;
mod segment;
mod shape;
mod snapshot;
pub mod table;
mod tagged;
mod translate;
mod verdict;
pub mod vxlan;
mod worker;

pub use bucket::Bucket;
pub use counters::{Counters, PortCounters, RuleCounters};
pub use event::{Event, FlowNews, Location, OwnWay};
pub use fastpath::{FastIo, FastState};
pub use multicast::Membership;
pub use perf::{BURST_BUCKETS, Perf, Stage};
pub use port::PortIo;
pub use shape::may_wait;
pub use snapshot::{
    Access, Gateway, Limits, Mirror, Network, NetworkMode, Path, Peer, Port, PortKind, Receivers, SenderCheck,
    Snapshot, Storm, Underlay,
};
pub use translate::Translation;
pub use verdict::{Action, DropReason, Output, Rewrite, Verdict};
pub use worker::{BURST, Turn, Worker, WorkerConfig};
