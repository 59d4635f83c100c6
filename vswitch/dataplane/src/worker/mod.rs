//! One worker: its ports, its umem, its flows. The engine of the switch.
//!
//! The thread, the clock and the sleep belong to the daemon; here is one *turn*, a pass over the ports that may have
//! something. A port that has received and sent nothing for a while is handed out to be parked ([`Worker::take_idle`]) until
//! its owner sees its socket become readable, or it is sent to ([`Worker::take_roused`]); an idle port then costs nothing.

mod aside;

use std::sync::Arc;

use vswitch_net::PortId;
use vswitch_xsk::{Packet, Umem, prefetch};

use crate::bucket::Bucket;
use crate::burst::{Burst, Slot, follow, join_segments};
use crate::connection::Connections;
use crate::counters::Counters;
use crate::decide::is_cacheable;
use crate::egress::{Edit, Egress, Ports, Scratch, UnderWay};
use crate::event::{Event, Events};
use crate::fastpath::{Fast, FastIo, FastState};
use crate::miss::Miss;
use crate::parse::{Origin, parse, parse_frame, tag_of};
use crate::perf::{Perf, Stage};
use crate::port::PortIo;
use crate::shape::{Held, Queue, Shaped, may_wait};
use crate::snapshot::Snapshot;
use crate::table::flow::{Flow, FlowTable, Probe};
use crate::table::fragment::Fragments;
use crate::tagged;
use crate::verdict::{DropReason, Output};

/// Most packets of one receive call.
pub const BURST: usize = 64;

/// ICMP errors a second that one port may cause, and how many at once: enough for every path of a pod to be found out,
/// and too few to be of use against others.
const ERROR_RATE: u64 = 100;
const ERROR_BURST: u64 = 50;

/// Longest packet: an IP packet of 65,535 bytes and its Ethernet header with a tag.
const MAX_PACKET: usize = 65_535 + 18;

/// Sizes of a worker.
#[derive(Clone, Copy, Debug)]
pub struct WorkerConfig {
    /// Flow entries.
    pub flow_entries: usize,
    /// Seed of the flow hash; a secret of the process.
    pub seed: u64,
    /// Turns without a packet, either way, until a port counts as idle. With none, what is sent keeps no port from being idle.
    pub idle_turns: u32,
}

/// What a turn did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// Packets received.
    pub received: usize,
    /// Packets that went their way: those received, and those that had waited because of a rate.
    pub walked: usize,
    /// True if packets are still under way to the kernel, so that another turn is due soon.
    pub is_sending: bool,
    /// True if packets wait because of a rate, so that another turn is due soon.
    pub is_holding: bool,
}

/// One worker.
#[derive(Debug)]
pub struct Worker<P> {
    umem: Umem,
    ports: Ports<P>,
    /// Ports to poll.
    active: Vec<PortId>,
    /// For each port its turns without a packet, if it is polled.
    quiet: Vec<Option<u32>>,
    idle: Vec<PortId>,
    roused: Vec<PortId>,
    flows: FlowTable,
    counters: Counters,
    events: Events,
    fragments: Fragments,
    connections: Arc<Connections>,
    scratch: Scratch,
    /// Packets that wait because of the rate of the port that sent them, by port.
    from: Vec<Queue>,
    burst: Burst,
    perf: Perf,
    /// Flows that the kernel forwards; none if it never does.
    fast: Option<Box<Fast>>,
    config: WorkerConfig,
}

impl<P: PortIo> Worker<P> {
    /// A worker over `umem`, without ports. `connections` are all workers'.
    pub fn new(umem: Umem, config: WorkerConfig, connections: Arc<Connections>) -> Worker<P> {
        Worker {
            umem,
            ports: Ports { io: Vec::new(), busy: Vec::new(), under_way: Vec::new() },
            active: Vec::new(),
            quiet: Vec::new(),
            idle: Vec::new(),
            roused: Vec::new(),
            flows: FlowTable::new(config.flow_entries),
            counters: Counters::default(),
            events: Events::new(),
            fragments: Fragments::new(),
            connections,
            scratch: Scratch {
                whole: Vec::with_capacity(MAX_PACKET),
                part: Vec::with_capacity(MAX_PACKET),
                errors: Vec::new(),
                to: Vec::new(),
            },
            from: Vec::new(),
            burst: Burst::default(),
            perf: Perf::default(),
            fast: None,
            config,
        }
    }

    /// Lets flows be forwarded by somebody else, as far as that can.
    pub fn offload(&mut self, io: Box<dyn FastIo>) {
        self.flows.open_places();
        self.fast = Some(Box::new(Fast::new(io)));
    }

    /// How many flows are forwarded by somebody else; none if [`offload`](Self::offload) was not called.
    pub fn fast_state(&self) -> Option<FastState> {
        self.fast.as_ref().map(|fast| fast.state())
    }

    /// True if somebody else forwards flows, or has a moment ago, so that their counters must be read.
    pub fn has_fast_flows(&self) -> bool {
        self.fast.as_ref().is_some_and(|fast| !fast.is_empty())
    }

    /// Brings the counters of offloaded flows up to date.
    pub fn settle(&mut self, now_ns: u64) {
        if let Some(fast) = &mut self.fast {
            fast.harvest_all(&mut self.flows, &mut self.counters, now_ns);
        }
    }

    /// Adds a port; it is polled from the next turn on. Its counters start at zero.
    ///
    /// What stood at that id before comes back.
    pub fn insert_port(&mut self, port: PortId, io: P) -> Option<P> {
        let before = self.remove_port(port);
        if self.ports.io.len() <= port.index() {
            self.ports.io.resize_with(port.index() + 1, || None);
            self.ports.under_way.resize(port.index() + 1, UnderWay::Nothing);
            self.quiet.resize(port.index() + 1, None);
        }
        self.ports.io[port.index()] = Some(io);
        let known = self.scratch.errors.len();
        self.from.resize_with(self.ports.io.len(), Queue::default);
        self.scratch.to.resize_with(self.ports.io.len(), Queue::default);
        self.scratch.errors.extend((known..=port.index()).map(|_| Bucket::new(ERROR_RATE, ERROR_BURST)));
        self.counters.open(port);
        self.wake(port);
        // What `mark_busy`, `wake`, `park` and `flush` push must never allocate during a turn.
        let count = self.ports.io.len();
        for ports in [&mut self.ports.busy, &mut self.active, &mut self.idle, &mut self.roused] {
            ports.reserve(count);
        }
        before
    }

    /// Takes a port away, with whatever it still has under way.
    pub fn remove_port(&mut self, port: PortId) -> Option<P> {
        if let Some(fast) = &mut self.fast {
            fast.forget_port(port, &mut self.flows, &mut self.counters);
        }
        for ports in [&mut self.ports.busy, &mut self.active, &mut self.idle, &mut self.roused] {
            ports.retain(|&other| other != port);
        }
        self.discard_held(port);
        if let Some(under_way) = self.ports.under_way.get_mut(port.index()) {
            *under_way = UnderWay::Nothing;
            self.quiet[port.index()] = None;
        }
        self.ports.io.get_mut(port.index())?.take()
    }

    /// Polls a parked port again.
    pub fn wake(&mut self, port: PortId) {
        if let Some(quiet @ None) = self.quiet.get_mut(port.index()) {
            *quiet = Some(0);
            self.active.push(port);
        }
    }

    /// Has a port's queue flushed that was given packets by another way than this worker's.
    pub fn mark_sending(&mut self, port: PortId) {
        self.ports.mark_busy(port, UnderWay::New);
    }

    /// Ports that have become idle since the last call. They are not polled until [`wake`](Self::wake).
    pub fn take_idle(&mut self) -> impl Iterator<Item = PortId> + '_ {
        self.idle.drain(..)
    }

    /// Ports that were parked and are polled again, for something was sent to them alone since the last call. A port that only sends is better
    /// polled in vain than waited for: whoever waits is called by the kernel for each packet that it has done with.
    pub fn take_roused(&mut self) -> impl Iterator<Item = PortId> + '_ {
        self.roused.drain(..)
    }

    /// True if a port is polled: another turn is due at once.
    pub fn has_active(&self) -> bool {
        !self.active.is_empty()
    }

    /// One pass: receive, decide, send, and take sent frames back.
    pub fn turn(&mut self, now_ns: u64, snapshot: &Snapshot) -> Turn {
        self.counters.open_rules(snapshot.rules);
        self.perf.begin();
        if self.counters.held > 0 {
            self.release(now_ns, snapshot);
        }
        if let Some(fast) = &mut self.fast {
            fast.harvest(&mut self.flows, &mut self.counters, now_ns);
        }
        let mut received = 0;
        let mut at = 0;
        while at < self.active.len() {
            let port = self.active[at];
            let quiet = self.quiet[port.index()].unwrap_or_default();
            let count = match self.ports.io.get_mut(port.index()) {
                Some(Some(io)) => io.rx_burst(&mut self.umem, &mut self.burst.packets, BURST),
                _ => 0,
            };
            if count > 0 {
                received += count;
                self.quiet[port.index()] = Some(0);
                self.perf.burst(count);
                count_received(&mut self.counters, port, &self.burst.packets);
                self.limit(port, now_ns, snapshot);
                self.perf.lap(Stage::Receive);
                self.process(port, now_ns, snapshot);
            } else if quiet >= self.config.idle_turns && self.can_receive(port) {
                self.park(at);
                continue;
            } else {
                self.quiet[port.index()] = Some(quiet.saturating_add(1));
            }
            at += 1;
        }
        self.perf.lap(Stage::Receive);
        self.flush();
        self.perf.lap(Stage::Transmit);
        let walked = self.perf.end();
        Turn { received, walked, is_sending: !self.ports.busy.is_empty(), is_holding: self.counters.held > 0 }
    }

    /// Events since the last call.
    pub fn drain_events(&mut self) -> impl Iterator<Item = Event> + '_ {
        self.events.drain()
    }

    /// True if [`drain_events`](Self::drain_events) has something.
    pub fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    /// Counts an event that found its queue full.
    pub fn count_lost_event(&mut self) {
        self.counters.events_lost += 1;
    }

    /// The counters.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// What it saw of itself.
    pub fn perf(&self) -> &Perf {
        &self.perf
    }

    /// The umem.
    pub fn umem(&self) -> &Umem {
        &self.umem
    }

    /// The umem, to adopt sockets into and to reclaim frames.
    pub fn umem_mut(&mut self) -> &mut Umem {
        &mut self.umem
    }

    /// A port's device, to read its statistics.
    pub fn port(&self, port: PortId) -> Option<&P> {
        self.ports.io.get(port.index())?.as_ref()
    }

    /// All ports' devices.
    pub fn ports(&self) -> impl Iterator<Item = (PortId, &P)> {
        self.ports.io.iter().enumerate().filter_map(|(at, io)| Some((PortId(at as u16), io.as_ref()?)))
    }

    /// Port and umem together, for a port whose queues change, and for tests that put packets in and take them out.
    pub fn port_and_umem(&mut self, port: PortId) -> Option<(&mut P, &mut Umem)> {
        Some((self.ports.io.get_mut(port.index())?.as_mut()?, &mut self.umem))
    }

    /// Flows that matched since `since_ns`, at most `limit`.
    pub fn flows(&self, since_ns: u64, limit: usize) -> Vec<Flow> {
        self.flows.dump(since_ns).take(limit).collect()
    }

    /// False for a port that could not become readable, and so must not be waited for.
    fn can_receive(&self, port: PortId) -> bool {
        self.port(port).is_none_or(PortIo::can_receive)
    }

    /// Takes the port at `at` of the active list off it.
    fn park(&mut self, at: usize) {
        let port = self.active.swap_remove(at);
        self.quiet[port.index()] = None;
        self.idle.push(port);
    }

    /// Holds back what a port sends beyond its rate.
    fn limit(&mut self, port: PortId, now_ns: u64, snapshot: &Snapshot) {
        let limits = snapshot.port(port).and_then(|info| info.limits.as_ref());
        let (Some(limit), Some(queue)) =
            (limits.and_then(|limits| limits.from.as_ref()), self.from.get_mut(port.index()))
        else {
            return;
        };
        std::mem::swap(&mut self.burst.packets, &mut self.burst.offered);
        for packet in self.burst.offered.drain(..) {
            let may_wait = may_wait(&self.umem);
            match queue.offer(now_ns, limit, may_wait, Held { packet, request: None, ingress: port }) {
                Shaped::Passed(held) => self.burst.packets.push(held.packet),
                Shaped::Waiting => self.counters.held += 1,
                Shaped::Over(held) => {
                    self.counters.drop(port, DropReason::RateFrom);
                    self.umem.free_packet(held.packet);
                }
            }
        }
    }

    /// Lets go on what has waited long enough.
    fn release(&mut self, now_ns: u64, snapshot: &Snapshot) {
        for at in 0..self.from.len() {
            let port = PortId(at as u16);
            if !self.from[at].is_empty() {
                let limits = snapshot.port(port).and_then(|info| info.limits.as_ref());
                let limit = limits.and_then(|limits| limits.from.as_ref());
                while self.burst.packets.len() < BURST
                    && let Some(held) = self.from[at].next(now_ns, limit)
                {
                    self.counters.held -= 1;
                    self.burst.packets.push(held.packet);
                }
                self.process(port, now_ns, snapshot);
            }
            if !self.scratch.to[at].is_empty() {
                let Worker { umem, ports, counters, scratch, .. } = self;
                Egress { ports, umem, counters, snapshot, scratch, now_ns, is_quiet: false }.release(port);
            }
        }
    }

    /// What waits for or from a port that goes is dropped with it.
    fn discard_held(&mut self, port: PortId) {
        let queues = [self.from.get_mut(port.index()), self.scratch.to.get_mut(port.index())];
        for queue in queues.into_iter().flatten() {
            while let Some(held) = queue.pop() {
                self.counters.held -= 1;
                self.counters.drop(held.ingress, DropReason::NoPort);
                self.umem.free_packet(held.packet);
            }
        }
    }

    /// The walk of one burst: parse all, look all up, decide about the misses, then one loop a verdict.
    fn process(&mut self, ingress: PortId, now_ns: u64, snapshot: &Snapshot) {
        let Worker {
            umem,
            ports,
            flows,
            counters,
            events,
            fragments,
            connections,
            scratch,
            burst,
            perf,
            fast,
            config,
            ..
        } = self;
        let Burst { packets, slots, local, encap, coalesce, .. } = burst;
        let mut out = Egress { ports, umem, counters, snapshot, scratch, now_ns, is_quiet: false };
        for packet in packets.iter() {
            prefetch(packet.head().first_byte());
        }
        let is_tagged = snapshot.underlay.vlan.is_some() && snapshot.access(ingress).is_none();
        let is_mirrored = snapshot.port(ingress).is_some_and(|port| !port.mirrors_from.is_empty());
        let origin = Origin::of_port(ingress, snapshot);
        let mut used = 0;
        for packet in packets.drain(..) {
            if is_tagged && tagged::is_ours(&packet, snapshot) {
                tagged::take(packet, ingress, config.seed, &mut out, events);
                continue;
            }
            // Parsing takes the tag of a trunk off; who looks sees it.
            let tagged = is_mirrored.then(|| (tag_of(packet.head().data()), packet.len()));
            let Slot { packet: place, meta, translation, .. } = &mut slots[used];
            let packet = place.insert(packet);
            let parsed = match origin {
                Some(origin) => parse_frame(packet, origin, snapshot, config.seed, meta),
                None => parse(packet, ingress, snapshot, config.seed, meta),
            };
            if let Err(reason) = parsed.and_then(|()| follow(fragments, meta, now_ns, config.seed)) {
                if let Some(packet) = place.take() {
                    out.drop(packet, ingress, reason);
                }
                continue;
            }
            if let Some((tag, len)) = tagged {
                out.mirror_from(packet, meta, tag.filter(|_| packet.len() < len));
            }
            flows.prefetch(meta.hash);
            *translation = None;
            used += 1;
        }
        let slots = &mut slots[..used];
        perf.lap(Stage::Parse);
        perf.walked(used);
        let epoch = connections.epoch();
        for slot in slots.iter_mut() {
            slot.found = flows.find(slot.meta.hash);
        }
        for (at, slot) in slots.iter_mut().enumerate() {
            let meta = &slot.meta;
            let bytes = slot.packet.as_ref().map_or(0, Packet::len);
            let generation = snapshot.generation;
            // Made where it is read: the one that a call of a miss is shown must lie in memory.
            let probe = || Probe { key: &meta.key, generation, now_ns, bytes, seq: meta.seq, epoch };
            if let Some(at) = slot.found
                && let Some(action) = flows.hit(at, &probe())
            {
                slot.action = *action;
                out.counters.flow_hits += 1;
                if slot.action.is_translated {
                    slot.translation = Some(flows.translation(at));
                }
                if let Some(fast) = fast
                    && flows.is_due(at)
                {
                    fast.offer(flows, at, meta, snapshot, now_ns);
                }
            } else {
                out.counters.flow_misses += 1;
                let flow = meta.key.without_control();
                if let Some(fast) = fast
                    && let Some(place) = flows.find_exact(&flow, meta.hash).and_then(|at| flows.place(at))
                {
                    fast.sync(place, flows, out.counters, now_ns);
                }
                let miss = Miss { meta, now_ns, last_seq: flows.last_seq(&flow, meta.hash), connections };
                if meta.is_syn
                    && let Some(place) = flows.forget(&flow, meta.hash)
                    && let Some(fast) = fast
                {
                    fast.end(place, &flow, flows, now_ns);
                }
                let Some((action, admitted)) = miss.decide(&mut slot.packet, &mut out, events) else { continue };
                slot.action = action;
                slot.translation = admitted.leaves_as;
                if admitted.is_lasting && is_cacheable(meta) {
                    let leaves_as = admitted.leaves_as.as_ref();
                    let at = flows.insert(meta.hash, &probe(), action, leaves_as, admitted.window_bits);
                    if let Some(fast) = fast {
                        if let Some((place, evicted)) = flows.take_evicted() {
                            fast.end(place, &evicted, flows, now_ns);
                        }
                        fast.renew(flows, at, meta, snapshot, now_ns);
                    }
                }
            }
            match slot.action.output {
                Output::Encap { .. } => encap.push(at as u8),
                Output::Port(_) => local.push(at as u8),
                Output::Deny(rule) => {
                    if let Some(packet) = slot.packet.take() {
                        out.counters.deny(rule);
                        out.drop(packet, slot.meta.ingress, DropReason::PolicyDenied);
                    }
                }
            }
        }
        perf.lap(Stage::Lookup);
        if snapshot.access(ingress).is_none() && local.len() > 1 {
            join_segments(slots, local, coalesce, &mut out);
        }
        // First every header, then every packet: what was just written by the byte is not read at once by the word.
        for &at in encap.iter() {
            let Slot { packet, meta, action, translation, to, refused, .. } = &mut slots[usize::from(at)];
            let edit = Edit { rewrite: action.rewrite.as_ref(), translation: translation.as_ref() };
            if let (Some(packet), Output::Encap { peer, network }) = (packet, action.output) {
                match out.encapsulate(packet, meta, peer, network, edit) {
                    Ok(uplink) => *to = uplink,
                    Err(reason) => *refused = Some(reason),
                }
            }
        }
        for &at in local.iter() {
            let Slot { packet, meta, action, translation, l4, refused, .. } = &mut slots[usize::from(at)];
            let edit = Edit { rewrite: action.rewrite.as_ref(), translation: translation.as_ref() };
            if let (Some(packet), Output::Port(port)) = (packet, action.output) {
                match out.prepare(packet, meta, port, edit) {
                    Ok(start) => *l4 = start,
                    Err(reason) => *refused = Some(reason),
                }
            }
        }
        perf.lap(Stage::Rewrite);
        for at in encap.drain(..) {
            let Slot { packet, meta, action, translation, to, refused, .. } = &mut slots[usize::from(at)];
            if let (Some(packet), Output::Encap { peer, network }) = (packet.take(), action.output) {
                match refused.take() {
                    None => out.send(packet, meta.ingress, *to, None),
                    // What is cut goes out here, in its place among the others of its flow.
                    Some(reason) => {
                        let edit = Edit { rewrite: action.rewrite.as_ref(), translation: translation.as_ref() };
                        out.refuse_encap(packet, meta, (peer, network), reason, edit);
                    }
                }
            }
        }
        for at in local.drain(..) {
            let Slot { packet, meta, action, translation, l4, refused, .. } = &mut slots[usize::from(at)];
            if let (Some(packet), Output::Port(port)) = (packet.take(), action.output) {
                match refused.take() {
                    None => out.send_local(packet, meta, port, *l4),
                    Some(reason) => {
                        let edit = Edit { rewrite: action.rewrite.as_ref(), translation: translation.as_ref() };
                        out.refuse_local(packet, meta, port, reason, edit);
                    }
                }
            }
        }
        perf.lap(Stage::Queue);
    }

    /// Flushes every port that has something under way; what the kernel did not take stays for the next turn. A port that was
    /// sent to is not idle.
    fn flush(&mut self) {
        let Worker { umem, ports: Ports { io, busy, under_way }, active, quiet, roused, config, .. } = self;
        busy.retain(|&port| {
            let at = port.index();
            if under_way[at] == UnderWay::New && config.idle_turns > 0 && quiet[at].replace(0).is_none() {
                active.push(port);
                roused.push(port);
            }
            let done = match io.get_mut(at) {
                Some(Some(io)) => io.flush(umem),
                _ => true,
            };
            under_way[at] = if done { UnderWay::Nothing } else { UnderWay::Left };
            !done
        });
    }
}

fn count_received(counters: &mut Counters, ingress: PortId, packets: &[Packet]) {
    if let Some(port) = counters.port_mut(ingress) {
        port.rx_packets += packets.len() as u64;
        port.rx_bytes += packets.iter().map(|packet| packet.len() as u64).sum::<u64>();
    }
}
