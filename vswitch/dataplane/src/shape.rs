//! Shaping: what is over a port's rate waits for its turn, and only what would wait too long is dropped.
//!
//! # Why this way
//!
//! A bucket alone drops whatever comes too early. On one node the round trip takes a tenth of a millisecond, so a TCP at
//! 50 Mbit/s has less than one segment under way; each drop then costs it a timeout, and it gets less than half its rate.
//! A short queue before the bucket gives it the round trip that it needs. Only ports with a rate have one.
//!
//! # Cost
//!
//! Nothing for other ports. A limited one holds at most [`MOST`] packets and [`LONGEST_NS`] of its rate, and all of them
//! together no more frames than leave a worker an eighth of its umem: rings that cannot be filled lose everybody's packets.

use std::collections::VecDeque;

use vswitch_net::PortId;
use vswitch_xsk::{Packet, Reserve, TxChecksum, Umem};

use crate::bucket::Bucket;

/// Packets that wait for one port in one direction. Their frames come out of the worker's umem.
const MOST: usize = 256;

/// A packet that would wait longer is dropped.
const LONGEST_NS: u64 = 50_000_000;

/// A packet that waits, with all that is needed to go on.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) packet: Packet,
    pub(crate) request: Option<TxChecksum>,
    /// The port that sent it.
    pub(crate) ingress: PortId,
}

/// Whether there are frames for packets that wait: for a rate, or for the sockets of a port at rest.
pub fn may_wait(umem: &Umem) -> bool {
    umem.free_beyond(Reserve::Waiting) > 0
}

/// Packets that wait, in order.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    held: VecDeque<Held>,
    bits: u64,
}

/// What becomes of a packet that comes to a limited port.
#[derive(Debug)]
pub(crate) enum Shaped {
    /// Goes on now.
    Passed(Held),
    /// Waits.
    Waiting,
    /// Would wait too long.
    Over(Held),
}

impl Queue {
    /// Lets a packet pass, wait, or be dropped.
    pub(crate) fn offer(&mut self, now_ns: u64, limit: &Bucket, may_wait: bool, held: Held) -> Shaped {
        let bits = held.packet.len() as u64 * 8;
        if self.held.is_empty() && limit.take(now_ns, bits) {
            return Shaped::Passed(held);
        }
        let wait_ns = limit.time_of(self.bits + bits);
        // A packet that alone is more than the longest wait may wait alone.
        if !may_wait || self.held.len() >= MOST || (wait_ns > LONGEST_NS && !self.held.is_empty()) {
            return Shaped::Over(held);
        }
        if self.held.capacity() == 0 {
            self.held.reserve(MOST);
        }
        self.bits += bits;
        self.held.push_back(held);
        Shaped::Waiting
    }

    /// The next packet whose time has come; any, if the port has no rate any more.
    pub(crate) fn next(&mut self, now_ns: u64, limit: Option<&Bucket>) -> Option<Held> {
        let bits = self.held.front()?.packet.len() as u64 * 8;
        if limit.is_none_or(|limit| limit.take(now_ns, bits)) { self.pop() } else { None }
    }

    /// The next packet, whatever the time.
    pub(crate) fn pop(&mut self) -> Option<Held> {
        let held = self.held.pop_front()?;
        self.bits -= held.packet.len() as u64 * 8;
        Some(held)
    }

    /// True if nothing waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }
}
