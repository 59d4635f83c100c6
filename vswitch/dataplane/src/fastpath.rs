//! Flows handed to the kernel: which may go, for how long, and what they counted there.
//!
//! # What
//!
//! The XDP programs of a link forward a flow by themselves ([`vswitch_xsk::FastPath`]) if its flow entry says nothing that they
//! cannot do: TCP or UDP, to another link or to a peer over IPv4, without translation, rates, mirrors and
//! tags. [`Fast`] offers a flow once it has sent a few packets, gives it more time whenever it is judged anew, and brings its
//! counters home.
//!
//! # Why this way
//!
//! What the kernel forwards is as fresh as a flow entry: it has the same generation and ends at the same time. Then its next
//! packet comes up, is judged, and the flow goes on in the kernel. Whatever the programs find unusual comes up too.
//!
//! # Cost
//!
//! One comparison a hit, and some stores an offer. Counters are read in turn, all of them every second or two.

use std::collections::VecDeque;
use std::fmt;

use vswitch_net::PortId;
use vswitch_xsk::{FastCounts, FastFlow, FastKey, FastStamp, FastTable, FastTarget, MAX_SUM, OUTER_BYTES};

use crate::counters::Counters;
use crate::meta::{Checksum, FlowKey, Kind, Meta, address};
use crate::parse::{TCP, UDP};
use crate::snapshot::{PortKind, Snapshot};
use crate::table::flow::{FlowTable, NO_WINDOW};
use crate::verdict::{Action, Output, Rewrite};
use crate::vxlan::ETHERNET;

/// Every so many packets that the poll loop has of a flow, the kernel hears of it.
pub(crate) const OFFER_EVERY: u64 = 16;

/// How often some of the counters are read, and in how many turns all of them.
const HARVEST_NS: u64 = 10_000_000;
const HARVEST_TURNS: usize = 100;

/// A flow that ended this long ago, and was not renewed, is forgotten.
const FORGET_NS: u64 = 1_000_000_000;

/// Who forwards flows: the kernel, or a test.
pub trait FastIo: fmt::Debug + Send {
    /// How many flows it has room for.
    fn capacity(&self) -> usize;
    /// By what link a port is reached; none if it is not.
    fn target(&self, port: PortId) -> Option<FastTarget>;
    /// Takes a flow; its slot, or none if there is no room.
    fn insert(&mut self, key: &FastKey, flow: &FastFlow, stamp: FastStamp) -> Option<u32>;
    /// Gives a flow another generation and more time.
    fn renew(&mut self, slot: u32, stamp: FastStamp);
    /// Tells a flow of a newer sequence number.
    fn follow(&mut self, slot: u32, seq: u32);
    /// Leaves a flow's packets to the poll loop. Its slot rests, unless it is renewed.
    fn stop(&mut self, slot: u32);
    /// What a flow has forwarded since it was taken.
    fn counts(&self, slot: u32) -> FastCounts;
    /// Takes a slot back that has rested.
    fn free(&mut self, slot: u32);
}

impl FastIo for FastTable {
    fn capacity(&self) -> usize {
        FastTable::capacity(self)
    }

    fn target(&self, port: PortId) -> Option<FastTarget> {
        FastTable::target(self, port)
    }

    fn insert(&mut self, key: &FastKey, flow: &FastFlow, stamp: FastStamp) -> Option<u32> {
        FastTable::insert(self, key, flow, stamp)
    }

    fn renew(&mut self, slot: u32, stamp: FastStamp) {
        FastTable::renew(self, slot, stamp);
    }

    fn follow(&mut self, slot: u32, seq: u32) {
        FastTable::follow(self, slot, seq);
    }

    fn stop(&mut self, slot: u32) {
        FastTable::stop(self, slot);
    }

    fn counts(&self, slot: u32) -> FastCounts {
        FastTable::counts(self, slot)
    }

    fn free(&mut self, slot: u32) {
        FastTable::free(self, slot);
    }
}

/// What a worker has in the kernel.
#[derive(Debug)]
pub(crate) struct Fast {
    io: Box<dyn FastIo>,
    /// A flow entry knows its place here.
    held: Vec<Option<Held>>,
    vacant: Vec<u32>,
    /// No place from here on was ever taken.
    top: usize,
    live: usize,
    /// Slots whose flows are gone, and since when; none until a harvest that finds them in front tells the time.
    resting: VecDeque<(Option<u64>, Resting)>,
    /// Where the next harvest begins, and when.
    cursor: usize,
    next_ns: u64,
    refused: u64,
}

/// A flow in the kernel.
#[derive(Clone, Copy, Debug)]
struct Held {
    slot: u32,
    key: FastKey,
    flow: FastFlow,
    expires_ns: u64,
    books: Books,
}

/// Where a flow's packets are counted.
#[derive(Clone, Copy, Debug)]
struct Books {
    entry: FlowKey,
    hash: u64,
    ingress: PortId,
    egress: PortId,
    /// Bytes that a packet has more as it leaves.
    more: i64,
    /// Bytes of the headers that it comes in.
    outer: u64,
    counted: FastCounts,
}

#[derive(Clone, Copy, Debug)]
struct Resting {
    slot: u32,
    books: Books,
}

/// How many flows are where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FastState {
    /// Flows that there is room for.
    pub capacity: usize,
    /// Flows that the kernel forwards.
    pub flows: usize,
    /// Times that one found no room.
    pub refused: u64,
}

impl Fast {
    pub(crate) fn new(io: Box<dyn FastIo>) -> Fast {
        let capacity = io.capacity();
        Fast {
            io,
            held: vec![None; capacity],
            vacant: (0..capacity as u32).rev().collect(),
            top: 0,
            live: 0,
            resting: VecDeque::with_capacity(capacity),
            cursor: 0,
            next_ns: 0,
            refused: 0,
        }
    }

    pub(crate) fn state(&self) -> FastState {
        FastState { capacity: self.held.len(), flows: self.live, refused: self.refused }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.live == 0 && self.resting.is_empty()
    }

    /// Hands the flow at `at` of the flow table to the kernel, if it may go there and is not there yet. `meta` is one of its
    /// packets.
    #[cold]
    pub(crate) fn offer(&mut self, flows: &mut FlowTable, at: usize, meta: &Meta, snapshot: &Snapshot, now_ns: u64) {
        let entry = flows.shortcut(at, now_ns);
        if let Some(place) = flows.place(at) {
            match self.held.get(place as usize).and_then(Option::as_ref) {
                Some(held) if held.books.entry == meta.key => return self.io.follow(held.slot, entry.seq),
                // What was there is another's now, or nobody's.
                _ => flows.set_place(at, None),
            }
        }
        if self.vacant.is_empty() {
            self.refused += 1;
            return;
        }
        let Some((key, flow, mut books)) = self.plan(meta, &entry.action, entry.window_bits, snapshot) else { return };
        // The programs would leave it to the poll loop.
        if meta.checksum != Checksum::Complete && !flow.completes {
            return;
        }
        let stamp = FastStamp { generation: snapshot.generation, expires_ns: entry.expires_ns, seq: entry.seq };
        let Some(slot) = self.io.insert(&key, &flow, stamp) else {
            self.refused += 1;
            return;
        };
        let Some(place) = self.vacant.pop() else { return };
        books.counted.seq = entry.seq;
        self.held[place as usize] = Some(Held { slot, key, flow, expires_ns: entry.expires_ns, books });
        self.top = self.top.max(place as usize + 1);
        self.live += 1;
        flows.set_place(at, Some(place));
    }

    /// The flow at `at` was judged anew: it goes on in the kernel, if it is still the same there.
    #[cold]
    pub(crate) fn renew(&mut self, flows: &mut FlowTable, at: usize, meta: &Meta, snapshot: &Snapshot, now_ns: u64) {
        let Some(place) = flows.place(at) else { return };
        let entry = flows.shortcut(at, now_ns);
        let plan = self.plan(meta, &entry.action, entry.window_bits, snapshot);
        let held = self.held.get_mut(place as usize).and_then(Option::as_mut);
        let Some(held) = held.filter(|held| held.books.entry == meta.key) else { return flows.set_place(at, None) };
        match plan {
            Some((key, flow, _)) if (key, flow) == (held.key, held.flow) => {
                held.expires_ns = entry.expires_ns;
                let stamp = FastStamp { generation: snapshot.generation, expires_ns: entry.expires_ns, seq: entry.seq };
                self.io.renew(held.slot, stamp);
            }
            _ => self.forget(place, flows, now_ns),
        }
    }

    /// Brings the counters and the sequence number of one flow home.
    #[cold]
    pub(crate) fn sync(&mut self, place: u32, flows: &mut FlowTable, counters: &mut Counters, now_ns: u64) {
        if let Some(held) = self.held.get_mut(place as usize).and_then(Option::as_mut) {
            held.books.settle(self.io.counts(held.slot), Some(flows), counters, now_ns);
        }
    }

    /// Ends the flow `key`, if it is at `place`: its connection begins anew, or its flow entry makes room for another.
    #[cold]
    pub(crate) fn end(&mut self, place: u32, key: &FlowKey, flows: &mut FlowTable, now_ns: u64) {
        if self.held.get(place as usize).and_then(Option::as_ref).is_some_and(|held| held.books.entry == *key) {
            self.forget(place, flows, now_ns);
        }
    }

    /// Reads some of the counters, if it is time, and forgets flows that have ended.
    pub(crate) fn harvest(&mut self, flows: &mut FlowTable, counters: &mut Counters, now_ns: u64) {
        if now_ns < self.next_ns {
            return;
        }
        self.next_ns = now_ns + HARVEST_NS;
        let end = (self.cursor + self.top.div_ceil(HARVEST_TURNS)).min(self.top);
        self.read(self.cursor..end, flows, counters, now_ns);
        self.cursor = if end == self.top { 0 } else { end };
        // Those of a port that went rest from when they are in front.
        for (since_ns, _) in self.resting.iter_mut().take_while(|(since_ns, _)| since_ns.is_none()) {
            *since_ns = Some(now_ns);
        }
        while let Some(&(Some(since_ns), resting)) = self.resting.front()
            && now_ns >= since_ns + FastTable::REST_NS
        {
            self.resting.pop_front();
            let Resting { slot, mut books } = resting;
            books.settle(self.io.counts(slot), None, counters, now_ns);
            self.io.free(slot);
        }
    }

    /// Reads all counters.
    pub(crate) fn harvest_all(&mut self, flows: &mut FlowTable, counters: &mut Counters, now_ns: u64) {
        self.read(0..self.top, flows, counters, now_ns);
        for (_, Resting { slot, books }) in &mut self.resting {
            books.settle(self.io.counts(*slot), None, counters, now_ns);
        }
    }

    /// Forgets all flows from and to a port.
    ///
    /// Who takes a port away has no clock: what is forgotten rests from a later harvest on.
    pub(crate) fn forget_port(&mut self, port: PortId, flows: &mut FlowTable, counters: &mut Counters) {
        if self.live == 0 {
            return;
        }
        let (now_ns, known) = (self.next_ns, self.resting.len());
        self.harvest_all(flows, counters, now_ns);
        for place in 0..self.top {
            let is_its = |held: &Held| held.books.ingress == port || held.books.egress == port;
            if self.held[place].as_ref().is_some_and(is_its) {
                self.forget(place as u32, flows, now_ns);
            }
        }
        self.resting.range_mut(known..).for_each(|(since_ns, _)| *since_ns = None);
    }

    fn read(&mut self, places: std::ops::Range<usize>, flows: &mut FlowTable, counters: &mut Counters, now_ns: u64) {
        if self.live == 0 {
            return;
        }
        for place in places {
            let Some(held) = &mut self.held[place] else { continue };
            held.books.settle(self.io.counts(held.slot), Some(flows), counters, now_ns);
            if now_ns >= held.expires_ns + FORGET_NS {
                self.forget(place as u32, flows, now_ns);
            }
        }
    }

    fn forget(&mut self, place: u32, flows: &mut FlowTable, now_ns: u64) {
        let Some(held) = self.held.get_mut(place as usize).and_then(Option::take) else { return };
        let Books { entry, hash, .. } = held.books;
        if let Some(at) = flows.find_exact(&entry, hash).filter(|&at| flows.place(at) == Some(place)) {
            flows.set_place(at, None);
        }
        self.io.stop(held.slot);
        self.resting.push_back((Some(now_ns), Resting { slot: held.slot, books: held.books }));
        self.vacant.push(place);
        self.live -= 1;
    }

    /// What the kernel would have to do with the packets of a flow; none if that is more than it can.
    fn plan(
        &self,
        meta: &Meta,
        action: &Action,
        window_bits: u8,
        snapshot: &Snapshot,
    ) -> Option<(FastKey, FastFlow, Books)> {
        let is_plain = matches!(meta.protocol, TCP | UDP) && meta.fragment.is_none() && !action.is_translated;
        let from = snapshot.port(meta.ingress)?;
        if !is_plain || from.limits.is_some() || !from.mirrors_from.is_empty() {
            return None;
        }
        let vxlan = match (&from.kind, meta.peer) {
            (PortKind::Access(access), None) if access.native() == Some(meta.network) => (0, [0; 4]),
            (PortKind::Uplink(_), Some(peer)) if snapshot.underlay.vlan.is_none() => {
                let std::net::IpAddr::V4(vtep) = snapshot.peer(peer)?.vtep else { return None };
                (snapshot.network(meta.network)?.vni.number(), vtep.octets())
            }
            _ => return None,
        };
        let (egress, max_bytes, outer) = match action.output {
            Output::Port(port) => {
                let to = snapshot.port(port)?;
                let PortKind::Access(access) = &to.kind else { return None };
                if access.tag_of(meta.network)?.is_some() || to.limits.is_some() || !to.mirrors_to.is_empty() {
                    return None;
                }
                let mtu = if meta.protocol == TCP { to.mtu.min(to.tcp_mtu) } else { to.mtu };
                (port, mtu as usize + ETHERNET, None)
            }
            Output::Encap { peer, network } if !snapshot.is_direct(peer, network) => {
                let path = snapshot.peer(peer)?.path(meta.hash)?;
                if path.header.len() != OUTER_BYTES {
                    return None;
                }
                let mut outer = [0; OUTER_BYTES];
                path.header.emit(&mut outer, snapshot.network(network)?.vni, meta.hash, 0, 0, || 0);
                (path.port, (path.mtu as usize + ETHERNET).checked_sub(path.header.overhead())?, Some(outer))
            }
            Output::Encap { .. } | Output::Deny(_) => return None,
        };
        let fields = meta.key.fields();
        let rewrite = |rewrite: Rewrite| (rewrite.destination, rewrite.source);
        let flow = FastFlow {
            // As in the packet, and not as parsing reads another address of the router.
            macs: (fields.destination_mac, fields.source_mac),
            rewrite: action.rewrite.map(rewrite),
            max_bytes: max_bytes as u32,
            window_bits: (window_bits != NO_WINDOW).then_some(window_bits),
            // Packets of a flow shall all go one way, or they would overtake each other: no pod's is too large then. What comes from
            // a wire has its checksum, and may look as if not.
            completes: max_bytes <= MAX_SUM as usize || meta.peer.is_some(),
            outer,
            to: self.io.target(egress)?,
        };
        let came_in = if meta.peer.is_some() { OUTER_BYTES } else { 0 };
        let books = Books {
            entry: meta.key,
            hash: meta.hash,
            ingress: meta.ingress,
            egress,
            more: if outer.is_some() { OUTER_BYTES as i64 } else { 0 } - came_in as i64,
            outer: came_in as u64,
            counted: FastCounts::default(),
        };
        Some((key_of(meta, vxlan), flow, books))
    }
}

impl Books {
    /// Counts what came since the last time.
    fn settle(&mut self, now: FastCounts, flows: Option<&mut FlowTable>, counters: &mut Counters, now_ns: u64) {
        let packets = now.packets.wrapping_sub(self.counted.packets);
        let bytes = now.bytes.wrapping_sub(self.counted.bytes);
        // The programs count bytes first: those of a packet that is not counted yet are left for the next time.
        if packets == 0 {
            return;
        }
        let is_new_seq = now.seq != self.counted.seq;
        self.counted = now;
        counters.offloaded += packets;
        if let Some(port) = counters.port_mut(self.ingress) {
            port.rx_packets += packets;
            port.rx_bytes += bytes;
        }
        if let Some(port) = counters.port_mut(self.egress) {
            port.tx_packets += packets;
            port.tx_bytes = port.tx_bytes.wrapping_add_signed(bytes as i64 + self.more * packets as i64);
        }
        if let Some(flows) = flows {
            // A flow's bytes are those inside.
            let inner = bytes.wrapping_sub(self.outer * packets);
            flows.count(&self.entry, self.hash, packets, inner, is_new_seq.then_some(now.seq), now_ns);
        }
    }
}

/// The key in the kernel of the flow that a packet is of.
fn key_of(meta: &Meta, vxlan: (u32, [u8; 4])) -> FastKey {
    let is_v6 = meta.kind == Kind::V6;
    let (source, destination) = meta.address_words();
    let bytes = |words| {
        let mut bytes = [0; 16];
        match address(words, is_v6) {
            std::net::IpAddr::V4(v4) => bytes[..4].copy_from_slice(&v4.octets()),
            std::net::IpAddr::V6(v6) => bytes = v6.octets(),
        }
        bytes
    };
    let ports = meta.key.fields().ports;
    FastKey {
        port: meta.ingress,
        is_v6,
        protocol: meta.protocol,
        vxlan,
        ports: (ports.source, ports.destination),
        source: bytes(source),
        destination: bytes(destination),
    }
}
