//! Counters of one worker. Plain numbers: the worker owns them, and hands out copies when asked.

use vswitch_net::PortId;

use crate::table::policy::RuleId;
use crate::verdict::DropReason;

/// What one worker counted for one port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortCounters {
    /// Packets received.
    pub rx_packets: u64,
    /// Bytes received, from the Ethernet header on, without the frame check sequence.
    pub rx_bytes: u64,
    /// Packets queued for sending.
    pub tx_packets: u64,
    /// Bytes queued for sending.
    pub tx_bytes: u64,
    /// Packets this port could not take; each is a drop of the port it came from.
    pub tx_refused: u64,
    /// Extra packets made of what this port sent, by flooding it or cutting it.
    pub copies: u64,
    /// Packets from this port that became part of the one before.
    pub merged: u64,
    /// Packets from this port that were dropped, by reason.
    pub drops: [u64; DropReason::COUNT],
}

/// In the place of a port: packets that the switch itself made.
pub const OWN: PortId = PortId(u16::MAX);

/// What one worker counted for all its ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    ports: Vec<PortCounters>,
    /// Of packets that the switch itself made.
    own: PortCounters,
    /// Sum of ports whose numbers were given to others since.
    retired: PortCounters,
    /// Flow lookups that found a valid entry.
    pub flow_hits: u64,
    /// Flow lookups that did not.
    pub flow_misses: u64,
    /// Packets that the kernel forwarded, of flows that were offloaded. They are in their ports' counters too.
    pub offloaded: u64,
    /// ICMP errors sent.
    pub errors_sent: u64,
    /// ICMP errors not sent, because the port had caused too many.
    pub errors_held: u64,
    /// Packets that wait because of a rate; they are in no other counter yet.
    pub held: u64,
    /// Events for the control thread that found their queue full.
    pub events_lost: u64,
    /// What each rule did, by its number.
    pub rules: Vec<RuleCounters>,
}

/// What one rule did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RuleCounters {
    /// Connections that it let begin.
    pub connections: u64,
    /// Packets that it denied.
    pub denied: u64,
}

impl Default for PortCounters {
    fn default() -> Self {
        PortCounters {
            rx_packets: 0,
            rx_bytes: 0,
            tx_packets: 0,
            tx_bytes: 0,
            tx_refused: 0,
            copies: 0,
            merged: 0,
            drops: [0; DropReason::COUNT],
        }
    }
}

impl PortCounters {
    /// All drops.
    pub fn dropped(&self) -> u64 {
        self.drops.iter().sum()
    }

    /// Adds another worker's counters of the same port.
    pub fn add(&mut self, other: &PortCounters) {
        self.rx_packets += other.rx_packets;
        self.rx_bytes += other.rx_bytes;
        self.tx_packets += other.tx_packets;
        self.tx_bytes += other.tx_bytes;
        self.tx_refused += other.tx_refused;
        self.copies += other.copies;
        self.merged += other.merged;
        for (mine, theirs) in self.drops.iter_mut().zip(&other.drops) {
            *mine += theirs;
        }
    }
}

impl Counters {
    /// Makes room for a port and sets its counters to zero.
    pub fn open(&mut self, port: PortId) {
        if self.ports.len() <= port.index() {
            self.ports.resize(port.index() + 1, PortCounters::default());
        }
        let before = std::mem::take(&mut self.ports[port.index()]);
        self.retired.add(&before);
    }

    /// The counters of a port; zeros if it never existed.
    pub fn port(&self, port: PortId) -> PortCounters {
        if port == OWN { self.own } else { self.ports.get(port.index()).copied().unwrap_or_default() }
    }

    /// The counters of a port that was opened.
    #[inline(always)]
    pub(crate) fn port_mut(&mut self, port: PortId) -> Option<&mut PortCounters> {
        if port == OWN { Some(&mut self.own) } else { self.ports.get_mut(port.index()) }
    }

    /// Counts a drop for the port that the packet came from.
    #[inline]
    pub(crate) fn drop(&mut self, ingress: PortId, reason: DropReason) {
        if let Some(port) = self.port_mut(ingress) {
            port.drops[reason.index()] += 1;
        }
    }

    /// All ports together, those too that are gone.
    pub fn total(&self) -> PortCounters {
        let mut total = self.retired;
        total.add(&self.own);
        self.ports.iter().for_each(|port| total.add(port));
        total
    }

    /// Makes room for rules, so that counting them never does.
    pub(crate) fn open_rules(&mut self, count: u32) {
        if self.rules.len() < count as usize {
            self.rules.resize(count as usize, RuleCounters::default());
        }
    }

    /// Counts a packet that a rule denied.
    pub(crate) fn deny(&mut self, rule: RuleId) {
        if let Some(counters) = self.rules.get_mut(rule.0 as usize) {
            counters.denied += 1;
        }
    }

    /// Counts a connection that a rule let begin.
    pub(crate) fn allow(&mut self, rule: RuleId) {
        if let Some(counters) = self.rules.get_mut(rule.0 as usize) {
            counters.connections += 1;
        }
    }

    /// Checks `rx = tx + drops + merged - copies` over all ports, with what waits under way; the two sides if they differ.
    ///
    /// # Errors
    ///
    /// Both sides, received first.
    pub fn balance(&self) -> Result<(), (u64, u64)> {
        let total = self.total();
        let ended = (total.tx_packets + total.dropped() + total.merged + self.held).wrapping_sub(total.copies);
        if total.rx_packets == ended { Ok(()) } else { Err((total.rx_packets, ended)) }
    }
}
