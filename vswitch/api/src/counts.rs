//! Answers about what workers counted: flows, packets, drops.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use vswitch_net::PortId;

/// One worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerInfo {
    /// Its number.
    pub worker: usize,
    /// The core it is pinned to, if it is.
    pub core: Option<usize>,
    /// Chunks of its umem.
    pub umem_frames: usize,
    /// Of these, free.
    pub umem_free: usize,
    /// ICMP errors sent.
    pub errors_sent: u64,
    /// ICMP errors not sent, because a port had caused too many.
    pub errors_held: u64,
    /// Flow lookups that hit.
    pub flow_hits: u64,
    /// Flow lookups that missed.
    pub flow_misses: u64,
    /// Events lost because the control thread was slow.
    pub events_lost: u64,
    /// Passes over the ports.
    pub turns: u64,
    /// Times it slept.
    pub sleeps: u64,
}

/// Where one worker's time goes. All numbers grow from its start; what lies between two answers is their difference.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PerfInfo {
    /// The worker.
    pub worker: usize,
    /// The core it is pinned to, if it is.
    pub core: Option<usize>,
    /// Nanoseconds in passes over the ports that had packets.
    pub busy_ns: u64,
    /// In passes that had none.
    pub idle_ns: u64,
    /// Asleep.
    pub asleep_ns: u64,
    /// Ticks of the processor's counter in all that time.
    pub cycles: u64,
    /// Passes over the ports.
    pub turns: u64,
    /// Times it slept.
    pub sleeps: u64,
    /// Packets received, without those that the kernel forwarded.
    pub packets: u64,
    /// Packets that the kernel forwarded.
    #[serde(default)]
    pub offloaded: u64,
    /// Flow lookups that hit.
    pub flow_hits: u64,
    /// Flow lookups that missed.
    pub flow_misses: u64,
    /// Bursts of 1, 2 and 3, 4 to 7, 8 to 15, 16 to 31, 32 to 63 and 64 packets.
    pub bursts: Vec<u64>,
    /// Packets whose stages were timed: one pass in 31 is.
    pub timed_packets: u64,
    /// The stages in the order of a packet's walk.
    pub stages: Vec<StageInfo>,
}

/// What a stage cost the packets that were timed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageInfo {
    /// Its name.
    pub stage: String,
    /// Ticks of the processor's counter.
    pub cycles: u64,
}

impl PerfInfo {
    /// What happened since an earlier answer about the same worker. Numbers that a restart set back are those since it.
    pub fn since(&self, earlier: &PerfInfo) -> PerfInfo {
        let is_again = self.turns < earlier.turns || self.worker != earlier.worker;
        let none = PerfInfo::default();
        let earlier = if is_again { &none } else { earlier };
        let less = |now: &[u64], then: &[u64]| {
            now.iter().enumerate().map(|(at, now)| now.saturating_sub(then.get(at).copied().unwrap_or(0))).collect()
        };
        let stages = self.stages.iter().enumerate().map(|(at, now)| StageInfo {
            stage: now.stage.clone(),
            cycles: now.cycles.saturating_sub(earlier.stages.get(at).map_or(0, |then| then.cycles)),
        });
        PerfInfo {
            worker: self.worker,
            core: self.core,
            busy_ns: self.busy_ns.saturating_sub(earlier.busy_ns),
            idle_ns: self.idle_ns.saturating_sub(earlier.idle_ns),
            asleep_ns: self.asleep_ns.saturating_sub(earlier.asleep_ns),
            cycles: self.cycles.saturating_sub(earlier.cycles),
            turns: self.turns.saturating_sub(earlier.turns),
            sleeps: self.sleeps.saturating_sub(earlier.sleeps),
            packets: self.packets.saturating_sub(earlier.packets),
            offloaded: self.offloaded.saturating_sub(earlier.offloaded),
            flow_hits: self.flow_hits.saturating_sub(earlier.flow_hits),
            flow_misses: self.flow_misses.saturating_sub(earlier.flow_misses),
            bursts: less(&self.bursts, &earlier.bursts),
            timed_packets: self.timed_packets.saturating_sub(earlier.timed_packets),
            stages: stages.collect(),
        }
    }
}

/// A flow of one worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowInfo {
    /// The worker.
    pub worker: usize,
    /// The network.
    pub network: String,
    /// Where its packets come from.
    pub from: String,
    /// Source, with port if it has one.
    pub source: String,
    /// Destination, with port if it has one.
    pub destination: String,
    /// Protocol.
    pub protocol: String,
    /// What is done with them.
    pub action: String,
    /// Source and destination that they leave with, if not with those that they come with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leaves_as: Option<[String; 2]>,
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
    /// Milliseconds since the last packet.
    pub idle_ms: u64,
    /// True if the kernel forwards it.
    #[serde(default)]
    pub offloaded: bool,
}

/// Counters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatsInfo {
    /// By port.
    pub ports: Vec<PortStats>,
    /// All workers: packets received.
    pub rx_packets: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Packets dropped.
    pub drops: u64,
    /// Extra packets made by flooding and by cutting large ones.
    pub copies: u64,
    /// Packets that were joined to the one before.
    #[serde(default)]
    pub merged: u64,
    /// Whether `rx = tx + drops + merged - copies`.
    pub is_balanced: bool,
}

/// Counters of a port, all workers together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PortStats {
    /// Its number.
    pub id: PortId,
    /// Its link.
    pub link: String,
    /// Packets received from it.
    pub rx_packets: u64,
    /// Bytes received from it.
    pub rx_bytes: u64,
    /// Packets sent to it.
    pub tx_packets: u64,
    /// Bytes sent to it.
    pub tx_bytes: u64,
    /// Packets from it that were dropped.
    pub drops: u64,
    /// Extra packets made of what it sent.
    pub copies: u64,
    /// Packets from it that were joined to the one before.
    #[serde(default)]
    pub merged: u64,
    /// Packets it could not take.
    pub tx_refused: u64,
    /// Its sockets.
    pub sockets: Vec<SocketInfo>,
}

/// The kernel's counters of a socket (`XDP_STATISTICS`), and ours.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketInfo {
    /// Worker that owns it.
    pub worker: usize,
    /// Dropped by the kernel before we saw them, for other reasons than a full ring.
    pub rx_dropped: u64,
    /// Dropped by the kernel because the rx ring was full.
    pub rx_ring_full: u64,
    /// Times the fill ring was empty.
    pub rx_fill_ring_empty: u64,
    /// Invalid descriptors, either way.
    pub invalid_descs: u64,
    /// Frames kept in the fill ring.
    pub fill_depth: u32,
    /// Transmit calls.
    pub kicks: u64,
    /// Of these, failed.
    pub kick_errors: u64,
    /// Packets in more than 18 frames.
    pub oversized: u64,
}

/// A reason and how often.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DropInfo {
    /// Short name.
    pub reason: String,
    /// How often.
    pub packets: u64,
    /// What it means and what to look at.
    pub meaning: String,
    /// By the port that sent the packets, named by its link.
    pub ports: BTreeMap<String, u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(turns: u64) -> PerfInfo {
        let stages = vec![StageInfo { stage: "parse".into(), cycles: 10 * turns }];
        PerfInfo { turns, packets: 2 * turns, bursts: vec![turns, 0], stages, ..PerfInfo::default() }
    }

    #[test]
    fn what_lies_between_two_answers_is_their_difference() {
        assert_eq!(at(7).since(&at(3)), at(4));
        assert_eq!(at(3).since(&at(7)), at(3), "after a restart");
    }
}
