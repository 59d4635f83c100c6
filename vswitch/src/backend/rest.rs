//! Ports at rest: without sockets, as long as they are silent.
//!
//! # Why
//!
//! For each socket the kernel keeps 128 bytes a frame of the worker's whole packet memory, beside its rings: 4 MiB with the
//! default. A node of 250 pods would spend a gigabyte on pods that say nothing.
//!
//! # How
//!
//! What comes from a port at rest waits in a BPF ring buffer ([`Waiting`]), what goes to it in its worker; both ring here, and
//! the sockets are bound again, which takes some milliseconds. Nothing overtakes: packets that wait are taken in before what
//! comes by the new sockets. What finds either queue full is dropped and counted. A port that goes to rest loses nothing either:
//! first nothing goes to its sockets any more, then its workers take in what is there, then they are closed.
//!
//! Where packet memory is short, ports silent for a moment rest too. A port for which there is none even so, or whose queues
//! somebody else has, is *stuck*: it is tried again every second, and until then what comes from it is counted in the kernel,
//! where it costs nobody else anything. A queue that was its own a moment ago is waited for: the port *lingers*.
//!
//! Ports of bridged networks do not rest: every flood would wake all of them.

use std::collections::{BTreeMap, BTreeSet};
use std::iter;
use std::ops::Bound;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tracing::{debug, warn};
use vswitch_control::{PortRest, WorkerSample};
use vswitch_net::PortId;
use vswitch_xsk::{Patience, Rest, Waiting, WaitingPacket};

use super::Links;
use super::attach::first_owner;
use crate::worker::ANSWER_TIMEOUT;

/// How often it is looked who is silent, at most.
const LOOK_NS: u64 = 5_000_000_000;

/// How long a port must be silent to rest when memory is short.
const SILENT_WHEN_SHORT_NS: u64 = 1_000_000_000;

/// Most sockets that are closed, or bound, at a time: each takes the kernel milliseconds, and requests wait meanwhile.
const SOCKETS_AT_A_TIME: usize = 8;

/// How long the kernel may have a queue that was closed, before a port counts as stuck, and how often it is asked.
const FREED_NS: u64 = 1_000_000_000;
const ASKED_NS: u64 = 20_000_000;

/// How long the kernel may still be at a burst that it began before it was told that the port rests.
const LAST_BURST: Duration = Duration::from_millis(5);

/// Most packets that are taken in at once.
const TAKEN_AT_ONCE: usize = 2048;

/// Who rests when.
#[derive(Debug)]
pub(super) struct Resting {
    /// Silence after which a port rests; none if none does.
    after_ns: Option<u64>,
    /// Whether somebody hears what comes from ports at rest.
    is_heard: bool,
    looked_ns: u64,
    /// Ports to wake, and the last one that had its turn.
    called: BTreeSet<PortId>,
    last: Option<PortId>,
    /// Ports to wake whose queues the kernel has not let go yet.
    lingering: BTreeMap<PortId, Lingering>,
    /// Ports that could not be woken, and why.
    stuck: BTreeMap<PortId, String>,
}

/// What is known of a port.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seen {
    pub(super) may_rest: bool,
    is_resting: bool,
    /// Packets in both directions, and since when there have been no more.
    packets: u64,
    since_ns: u64,
}

/// Since when a port lingers, and when the kernel is asked again.
#[derive(Clone, Copy, Debug)]
struct Lingering {
    since_ns: u64,
    due_ns: u64,
}

/// When ports at rest are to be looked at again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Again {
    /// When somebody calls.
    WhenCalled,
    /// In some milliseconds: the kernel has something to finish.
    Soon,
    /// There is more to do.
    AtOnce,
}

/// A port that has sockets again, which its program does not know yet.
struct Woken {
    port: PortId,
    descriptors: Vec<(u32, Arc<OwnedFd>)>,
}

impl Resting {
    pub(super) fn new(after: Option<Duration>) -> Resting {
        Resting {
            after_ns: after.map(|after| after.as_nanos() as u64),
            is_heard: false,
            looked_ns: 0,
            called: BTreeSet::new(),
            last: None,
            lingering: BTreeMap::new(),
            stuck: BTreeMap::new(),
        }
    }

    /// Calls those that linger when it is time, and not before, whatever comes from them.
    fn call_lingering(&mut self, now_ns: u64) {
        for (&port, lingering) in &self.lingering {
            if lingering.due_ns <= now_ns {
                self.called.insert(port);
            } else {
                self.called.remove(&port);
            }
        }
    }

    /// The port to wake next: the one after the last, so that all have their turn.
    fn next_called(&self) -> Option<PortId> {
        let after = self.last.map_or(Bound::Unbounded, Bound::Excluded);
        self.called.range((after, Bound::Unbounded)).next().or(self.called.first()).copied()
    }

    /// Notes that a port has its turn.
    fn take_turn(&mut self, port: PortId) {
        self.called.remove(&port);
        self.last = Some(port);
    }

    /// Notes that the kernel has not let go a port's queues. False if that takes too long.
    fn linger(&mut self, port: PortId, now_ns: u64) -> bool {
        let due_ns = now_ns + ASKED_NS;
        let lingering = self.lingering.entry(port).or_insert(Lingering { since_ns: now_ns, due_ns });
        lingering.due_ns = due_ns;
        now_ns - lingering.since_ns < FREED_NS
    }
}

impl Seen {
    /// Of a port that is attached now.
    pub(super) fn from(now_ns: u64) -> Seen {
        Seen { since_ns: now_ns, ..Seen::default() }
    }
}

impl Links {
    /// The packets of ports at rest, for who listens and then says [so](Self::begin_rests). None if there are no programs yet.
    pub(crate) fn take_waiting(&mut self) -> Option<Waiting> {
        self.programs.as_mut()?.take_waiting()
    }

    /// From now on ports may rest.
    pub(crate) fn begin_rests(&mut self) {
        self.resting.is_heard = true;
    }

    /// Sends ports to rest that are silent, some at a time, and tries again to wake those that are stuck. Call it every second.
    pub(crate) fn rest_silent(&mut self) {
        let Some(after_ns) = self.resting.after_ns else { return };
        self.resting.called.extend(self.resting.stuck.keys());
        if !self.resting.is_heard || !self.resting.called.is_empty() {
            self.bell.rung.notify_one();
        }
        let now_ns = self.now_ns();
        if now_ns < self.resting.looked_ns + after_ns.min(LOOK_NS) || !self.look() {
            return;
        }
        let silent = self.silent(after_ns);
        self.rest(&silent[..silent.len().min(self.at_a_time())]);
        if silent.len() <= self.at_a_time() {
            self.resting.looked_ns = self.now_ns();
        }
    }

    /// Takes in what came from ports at rest, and wakes some of those that it came from or goes to.
    pub(crate) fn wake(&mut self, called: BTreeSet<PortId>, waiting: &mut Waiting) -> Again {
        self.resting.called.extend(called);
        let packets = self.taken(waiting);
        let mut is_more = packets.len() == TAKEN_AT_ONCE;
        let woken = self.bind_called();
        // The kernel has frames for the new sockets before it is told of them.
        if !woken.is_empty()
            && let Err(error) = self.sync()
        {
            warn!("ports are woken, and packets may be lost: {error}");
        }
        let connected: Vec<PortId> = woken.into_iter().filter_map(|woken| self.connect_again(woken)).collect();
        // What came until the last of them was there, before what comes by them.
        let late = self.taken(waiting);
        is_more |= late.len() == TAKEN_AT_ONCE;
        self.take_in(packets);
        self.take_in(late);
        for port in connected {
            debug!("port {port} is awake");
            self.workers.iter().for_each(|worker| worker.wake(port));
            self.settle_lost(port);
        }
        self.resting.call_lingering(self.now_ns());
        match () {
            () if is_more || !self.resting.called.is_empty() => Again::AtOnce,
            () if !self.resting.lingering.is_empty() => Again::Soon,
            () => Again::WhenCalled,
        }
    }

    /// Whether a port is at rest.
    pub(super) fn rest_of(&self, port: PortId) -> Option<PortRest> {
        self.attached.get(&port).filter(|link| link.seen.is_resting)?;
        let stuck = self.resting.stuck.get(&port).cloned();
        Some(stuck.map_or(PortRest::Silent, PortRest::Stuck))
    }

    /// Counts what was lost of ports at rest.
    pub(super) fn settle_all_lost(&mut self) {
        let resting = self.attached.iter().filter(|(_, link)| link.seen.is_resting);
        let resting: Vec<PortId> = resting.map(|(&port, _)| port).collect();
        resting.into_iter().for_each(|port| self.settle_lost(port));
    }

    /// Counts what was lost of a port while it was at rest.
    pub(super) fn settle_lost(&mut self, port: PortId) {
        let (Some(link), Some(programs)) = (self.attached.get_mut(&port), &self.programs) else { return };
        if let (Some(worker), lost @ 1..) = (self.workers.first(), programs.take_lost(&mut link.program)) {
            worker.count_lost(port, lost);
        }
    }

    /// Forgets a port that is detached.
    pub(super) fn forget_rest(&mut self, port: PortId) {
        self.settle_lost(port);
        self.resting.called.remove(&port);
        self.resting.lingering.remove(&port);
        self.resting.stuck.remove(&port);
    }

    /// Has silent ports rest until every worker has the memory of another port.
    ///
    /// # Errors
    ///
    /// A sentence with the remedy, if all others are busy.
    pub(super) fn make_room(&mut self) -> Result<(), String> {
        while let Err(error) = self.check_memory() {
            if self.resting.after_ns.is_none() || !self.resting.is_heard || !self.look() {
                return Err(error);
            }
            match self.silent(SILENT_WHEN_SHORT_NS).first() {
                Some(&port) if self.rest(&[port]) => {}
                _ => return Err(error),
            }
        }
        Ok(())
    }

    /// Takes note of who has had packets. False if a worker does not answer.
    fn look(&mut self) -> bool {
        let now_ns = self.now_ns();
        let samples: Option<Vec<WorkerSample>> = self.workers.iter().map(|worker| worker.sample()).collect();
        let Some(samples) = samples else { return false };
        for (port, link) in &mut self.attached {
            let of = |sample: &WorkerSample| {
                let counters = sample.counters.port(*port);
                counters.rx_packets + counters.tx_packets
            };
            let packets = samples.iter().map(of).sum();
            if packets != link.seen.packets {
                link.seen.packets = packets;
                link.seen.since_ns = now_ns;
            }
        }
        true
    }

    /// Ports that may rest and have been silent for so long; the longest first.
    fn silent(&self, for_ns: u64) -> Vec<PortId> {
        let now_ns = self.now_ns();
        let awake = self.attached.iter().filter(|(_, link)| link.seen.may_rest && !link.seen.is_resting);
        let mut silent: Vec<(u64, PortId)> = awake
            .filter(|(_, link)| now_ns.saturating_sub(link.seen.since_ns) >= for_ns)
            .map(|(&port, link)| (link.seen.since_ns, port))
            .collect();
        silent.sort_unstable();
        silent.into_iter().map(|(_, port)| port).collect()
    }

    /// Takes the sockets of ports away. False if that cannot be: of none of them, or because a worker does not answer.
    #[expect(
        clippy::disallowed_methods,
        reason = "runs on the control thread, which has the kernel close sockets next"
    )]
    fn rest(&mut self, ports: &[PortId]) -> bool {
        let Some(programs) = self.programs.as_mut().filter(|_| self.resting.is_heard) else { return false };
        let mut leaving = Vec::new();
        for port in ports {
            let Some(link) = self.attached.get_mut(port) else { continue };
            match programs.set_rest(&mut link.program, Rest::Waits) {
                Ok(()) => {
                    programs.unset_sockets(&link.program, link.owners.len() as u32);
                    link.seen.is_resting = true;
                    leaving.push(*port);
                }
                Err(error) => warn!("port {port} cannot rest: {error}"),
            }
        }
        if leaving.is_empty() {
            return false;
        }
        thread::sleep(LAST_BURST);
        debug!("at rest: ports {leaving:?}");
        self.close_sockets(&leaving)
    }

    /// Closes the sockets of ports at rest. False if a worker does not answer.
    fn close_sockets(&self, ports: &[PortId]) -> bool {
        let of_port = |&port: &PortId| self.workers.iter().map(move |worker| (worker, worker.begin_rest(port)));
        let leaving: Vec<_> = ports.iter().flat_map(of_port).collect();
        // Who does not answer is not waited for twice, and the sockets of the others are closed all the same.
        let is_closed = leaving.into_iter().fold(true, |is_closed, (worker, sockets)| {
            worker.finish(sockets, if is_closed { ANSWER_TIMEOUT } else { Duration::ZERO }) && is_closed
        });
        if !is_closed {
            warn!("ports go to rest, and a worker does not answer: see `switchctl status`");
        }
        is_closed
    }

    /// Binds the queues of some of the ports that are called. Where memory is short, the others are stuck as well.
    fn bind_called(&mut self) -> Vec<Woken> {
        self.resting.call_lingering(self.now_ns());
        let attached = &self.attached;
        self.resting.called.retain(|port| attached.get(port).is_some_and(|link| link.seen.is_resting));
        let mut woken = Vec::new();
        for _ in 0..self.at_a_time() {
            let Some(port) = self.resting.next_called() else { break };
            if let Err(error) = self.make_room() {
                for port in std::mem::take(&mut self.resting.called) {
                    self.stick(port, error.clone());
                }
                break;
            }
            self.resting.take_turn(port);
            woken.extend(self.bind_again(port));
        }
        woken
    }

    /// Binds the queues of a port at rest, and hands the sockets to its workers. What it had before it went to rest may not be free
    /// yet; then its packets wait on.
    fn bind_again(&mut self, port: PortId) -> Option<Woken> {
        let now_ns = self.now_ns();
        let link = self.attached.get(&port)?;
        // To ask for one more queue than there is costs as much as a socket.
        let queues = link.owners.len() as u32;
        let sockets = match self.bind(link.ifindex, link.zero_copy, queues, Patience::None) {
            Err(error) if error.is_busy() && !self.resting.stuck.contains_key(&port) => {
                if !self.resting.linger(port, now_ns) {
                    self.stick(port, error.to_string());
                }
                return None;
            }
            Err(error) => {
                self.stick(port, error.to_string());
                return None;
            }
            Ok(sockets) => sockets,
        };
        self.resting.lingering.remove(&port);
        let descriptors = sockets.iter().flatten().map(|socket| (socket.queue(), socket.descriptor())).collect();
        for (worker, sockets) in self.workers.iter().zip(sockets) {
            worker.prepare(port, sockets);
        }
        Some(Woken { port, descriptors })
    }

    /// Most ports that go to rest, or wake, at a time.
    fn at_a_time(&self) -> usize {
        (SOCKETS_AT_A_TIME / self.workers.len().max(1)).max(1)
    }

    /// Has the program send packets to the new sockets of a port. The port, if that can be.
    fn connect_again(&mut self, Woken { port, descriptors }: Woken) -> Option<PortId> {
        let now_ns = self.now_ns();
        let (link, programs) = (self.attached.get_mut(&port)?, self.programs.as_mut()?);
        let connected = descriptors.iter().try_for_each(|(queue, fd)| programs.set_socket(&link.program, *queue, fd));
        let connected = connected.and_then(|()| programs.set_rest(&mut link.program, Rest::None));
        // The worker's shall be the last ones: what it gives away must be closed before its frames are anybody else's.
        drop(descriptors);
        match connected {
            Ok(()) => {
                link.seen.is_resting = false;
                link.seen.since_ns = now_ns;
                if self.resting.stuck.remove(&port).is_some() {
                    warn!("port {port} could be woken");
                }
                Some(port)
            }
            Err(error) => {
                programs.unset_sockets(&link.program, link.owners.len() as u32);
                self.close_sockets(&[port]);
                self.stick(port, error.to_string());
                None
            }
        }
    }

    /// Notes that a port cannot be woken. What comes from it is counted as lost until it can.
    fn stick(&mut self, port: PortId, error: String) {
        self.resting.lingering.remove(&port);
        let (Some(link), Some(programs)) = (self.attached.get_mut(&port), &mut self.programs) else { return };
        if let Err(error) = programs.set_rest(&mut link.program, Rest::Deaf) {
            warn!("port {port}: {error}");
        }
        if !self.resting.stuck.contains_key(&port) {
            warn!("port {port} cannot be woken, which is tried again every second: {error}");
        }
        self.resting.stuck.insert(port, error);
    }

    /// What waits, as much as is taken at once; its ports are called.
    fn taken(&mut self, waiting: &mut Waiting) -> Vec<WaitingPacket> {
        let packets: Vec<WaitingPacket> = iter::from_fn(|| waiting.take()).take(TAKEN_AT_ONCE).collect();
        self.resting.called.extend(packets.iter().map(|packet| packet.port));
        packets
    }

    /// Hands packets to the workers of their queues.
    fn take_in(&self, mut packets: Vec<WaitingPacket>) {
        for (index, worker) in self.workers.iter().enumerate() {
            let is_its = |packet: &mut WaitingPacket| first_owner(packet.queue as usize, self.workers.len()) == index;
            let its: Vec<WaitingPacket> = packets.extract_if(.., is_its).collect();
            if !its.is_empty() {
                worker.receive(its);
            }
        }
    }

    pub(super) fn now_ns(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_lingers_is_asked_about_when_it_is_time() {
        let mut resting = Resting::new(None);
        let (one, other) = (PortId(9), PortId(10));
        assert!(resting.linger(one, 1_000));
        resting.called.extend([one, other]);
        resting.call_lingering(2_000);
        assert_eq!(resting.called, BTreeSet::from([other]), "what comes from it asks nobody");
        resting.call_lingering(1_000 + ASKED_NS);
        assert_eq!(resting.called, BTreeSet::from([one, other]));
        // Called and not tried yet, it stays so.
        resting.call_lingering(1_001 + ASKED_NS);
        assert_eq!(resting.called, BTreeSet::from([one, other]));
        assert!(resting.linger(one, FREED_NS));
        assert!(!resting.linger(one, 1_000 + FREED_NS), "too long");
    }

    #[test]
    fn all_that_are_called_have_their_turn() {
        let mut resting = Resting::new(None);
        let ports: Vec<PortId> = (5..9).map(PortId).collect();
        let mut turns = Vec::new();
        for _ in 0..8 {
            resting.called.extend(&ports);
            // Whose turn fails has it the next time.
            assert_eq!(resting.next_called(), resting.next_called());
            let port = resting.next_called().expect("a port");
            resting.take_turn(port);
            turns.push(port);
        }
        assert_eq!(turns, [&ports[..], &ports].concat());
        resting.called.clear();
        assert_eq!(resting.next_called(), None);
    }
}
