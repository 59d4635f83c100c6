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
//! comes by the new sockets. What finds either queue full is dropped and counted. A port that goes to rest loses nothing: first
//! nothing goes to its sockets any more, then its workers take in what is there, then they are closed.
//!
//! Where memory is short, ports silent for a moment rest too, so that those that speak have it.

use std::collections::{BTreeMap, BTreeSet};
use std::iter;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tracing::{debug, warn};
use vswitch_control::{Backend, HOST_PORT, MAX_UPLINKS, WorkerSample};
use vswitch_net::PortId;
use vswitch_xsk::{Waiting, WaitingPacket};

use super::Links;
use super::attach::first_owner;

/// How often it is looked who is silent, at most.
const LOOK_NS: u64 = 5_000_000_000;

/// How long a port must be silent to rest when memory is short.
const SILENT_WHEN_SHORT_NS: u64 = 1_000_000_000;

/// Most ports that go to rest at a time: closing a socket takes the kernel milliseconds, and requests wait meanwhile.
const AT_A_TIME: usize = 8;

/// How long the kernel may still be at a burst that it began before it was told that the port rests.
const LAST_BURST: Duration = Duration::from_millis(5);

/// How long after it could not be woken that is tried again for a port.
const WAKE_AGAIN_NS: u64 = 900_000_000;

/// Most packets that are taken in at once.
const TAKEN_AT_ONCE: usize = 2048;

/// Who rests when.
#[derive(Debug)]
pub(super) struct Resting {
    /// Silence after which a port rests; none if none does.
    pub(super) after_ns: Option<u64>,
    looked_ns: u64,
    /// Ports that could not be woken, and when that is tried again.
    stuck: BTreeMap<PortId, u64>,
}

/// What was last seen of a port.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seen {
    pub(super) is_resting: bool,
    /// Packets in both directions, and since when there have been no more.
    packets: u64,
    since_ns: u64,
}

/// A port that has sockets again, which its program does not know yet.
struct Woken {
    port: PortId,
    descriptors: Vec<(u32, Arc<OwnedFd>)>,
}

impl Seen {
    /// Of a port that is attached now.
    pub(super) fn from(now_ns: u64) -> Seen {
        Seen { since_ns: now_ns, ..Seen::default() }
    }
}

impl Resting {
    pub(super) fn new(after_ns: Option<u64>) -> Resting {
        Resting { after_ns, looked_ns: 0, stuck: BTreeMap::new() }
    }
}

impl Links {
    /// Sends ports to rest that are silent, some at a time. Call it every second.
    pub(crate) fn rest_silent(&mut self) {
        let Some(after_ns) = self.resting.after_ns else { return };
        if !self.resting.stuck.is_empty() {
            self.bell.rung.notify_one();
        }
        let now_ns = self.now_ns();
        if now_ns < self.resting.looked_ns + after_ns.min(LOOK_NS) {
            return;
        }
        self.look(now_ns);
        let silent = self.silent(now_ns, after_ns);
        self.rest(&silent[..silent.len().min(AT_A_TIME)]);
        if silent.len() <= AT_A_TIME {
            self.resting.looked_ns = now_ns;
        }
    }

    /// Wakes ports that something is to be sent to, and those that packets came from. True if more wait than were taken.
    pub(crate) fn wake(&mut self, mut called: BTreeSet<PortId>, waiting: &mut Waiting) -> bool {
        let mut packets: Vec<WaitingPacket> = iter::from_fn(|| waiting.take()).take(TAKEN_AT_ONCE).collect();
        called.extend(packets.iter().map(|packet| packet.port));
        called.extend(self.resting.stuck.keys());
        let now_ns = self.now_ns();
        let mut woken = Vec::new();
        for port in called {
            let stuck = self.resting.stuck.remove(&port);
            if let Some(again_ns) = stuck.filter(|&again_ns| now_ns < again_ns) {
                self.resting.stuck.insert(port, again_ns);
                continue;
            }
            match self.bind_again(port) {
                Ok(None) => {}
                Ok(Some(port)) => woken.push(port),
                Err(error) => {
                    if stuck.is_none() {
                        warn!("port {port} cannot be woken, which is tried again: {error}");
                    }
                    self.resting.stuck.insert(port, now_ns + WAKE_AGAIN_NS);
                }
            }
        }
        // The kernel has frames for them before it is told of them.
        if !woken.is_empty()
            && let Err(error) = self.sync()
        {
            warn!("ports are woken, and packets may be lost: {error}");
        }
        let lost: Vec<(PortId, u64)> = woken.into_iter().map(|woken| (woken.port, self.connect_again(woken))).collect();
        // What came until the last socket was there, before what comes by them.
        packets.extend(iter::from_fn(|| waiting.take()).take(TAKEN_AT_ONCE));
        let is_more = packets.len() >= TAKEN_AT_ONCE;
        self.take_in(packets);
        for (port, lost) in lost {
            debug!("port {port} is awake");
            self.workers.iter().for_each(|worker| worker.wake(port));
            if let (Some(worker), 1..) = (self.workers.first(), lost) {
                worker.count_lost(port, lost);
            }
        }
        is_more
    }

    /// The packets of ports at rest, once there are any such.
    pub(crate) fn take_waiting(&mut self) -> Option<Waiting> {
        self.programs.as_mut()?.take_waiting()
    }

    /// Has silent ports rest until every worker has the memory of another port.
    ///
    /// # Errors
    ///
    /// A sentence with the remedy, if all others are busy.
    pub(super) fn make_room(&mut self) -> Result<(), String> {
        let Err(mut error) = self.check_memory() else { return Ok(()) };
        if self.resting.after_ns.is_none() {
            return Err(error);
        }
        let now_ns = self.now_ns();
        self.look(now_ns);
        for port in self.silent(now_ns, SILENT_WHEN_SHORT_NS) {
            self.rest(&[port]);
            match self.check_memory() {
                Ok(()) => return Ok(()),
                Err(still) => error = still,
            }
        }
        Err(error)
    }

    /// Takes note of who has had packets.
    fn look(&mut self, now_ns: u64) {
        let samples: Vec<WorkerSample> = self.workers.iter().filter_map(|worker| worker.sample()).collect();
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
    }

    /// Pods' ports that have been silent for so long, or never had a packet; the longest first.
    fn silent(&self, now_ns: u64, for_ns: u64) -> Vec<PortId> {
        let pods = self.attached.iter().filter(|(port, _)| port.index() >= MAX_UPLINKS && **port != HOST_PORT);
        let mut silent: Vec<(u64, PortId)> = pods
            .filter(|(_, link)| !link.seen.is_resting && now_ns.saturating_sub(link.seen.since_ns) >= for_ns)
            .map(|(&port, link)| (link.seen.since_ns, port))
            .collect();
        silent.sort_unstable();
        silent.into_iter().map(|(_, port)| port).collect()
    }

    /// Takes the sockets of ports away.
    #[expect(
        clippy::disallowed_methods,
        reason = "runs on the control thread, which has the kernel close sockets next"
    )]
    fn rest(&mut self, ports: &[PortId]) {
        let Some(programs) = &mut self.programs else { return };
        let mut leaving = Vec::new();
        for port in ports {
            let Some(link) = self.attached.get_mut(port) else { continue };
            match programs.begin_rest(&mut link.program) {
                Ok(()) => {
                    link.seen.is_resting = true;
                    leaving.push(*port);
                }
                Err(error) => warn!("port {port} cannot rest: {error}"),
            }
        }
        if leaving.is_empty() {
            return;
        }
        thread::sleep(LAST_BURST);
        for port in leaving {
            debug!("port {port} is at rest");
            let is_done = self.workers.iter().all(|worker| worker.rest(port));
            if !is_done {
                warn!("port {port} goes to rest, and a worker does not answer: see `switchctl status`");
            }
        }
        // Whoever wakes them may not have had anybody to listen to until now.
        self.bell.rung.notify_one();
    }

    /// Binds the queues of a port at rest again, and hands the sockets to its workers. None if it is not at rest.
    fn bind_again(&mut self, port: PortId) -> Result<Option<Woken>, String> {
        if !self.is_resting(port) {
            return Ok(None);
        }
        self.make_room()?;
        let Some(link) = self.attached.get(&port) else { return Ok(None) };
        // To ask for one more queue than there is costs as much as a socket.
        let sockets = self.bind(link.ifindex, link.zero_copy, link.owners.len() as u32)?;
        let descriptors = sockets.iter().flatten().map(|socket| (socket.queue(), socket.descriptor())).collect();
        for (worker, sockets) in self.workers.iter().zip(sockets) {
            worker.prepare(port, sockets);
        }
        Ok(Some(Woken { port, descriptors }))
    }

    /// Has the program send packets to the sockets of a port at rest. How many found no room to wait for that.
    fn connect_again(&mut self, Woken { port, descriptors }: Woken) -> u64 {
        let now_ns = self.now_ns();
        let (Some(link), Some(programs)) = (self.attached.get_mut(&port), &mut self.programs) else { return 0 };
        let connected = descriptors.iter().try_for_each(|(queue, fd)| programs.set_socket(&link.program, *queue, fd));
        let lost = connected.and_then(|()| programs.end_rest(&mut link.program));
        link.seen.is_resting = false;
        link.seen.since_ns = now_ns;
        lost.unwrap_or_else(|error| {
            warn!("port {port} is woken, and its program was not told: {error}");
            0
        })
    }

    /// Hands packets to the workers of their queues, those of a port together.
    fn take_in(&self, packets: Vec<WaitingPacket>) {
        let owner = |packet: &WaitingPacket| (packet.port, first_owner(packet.queue as usize, self.workers.len()));
        for together in packets.chunk_by(|one, next| owner(one) == owner(next)) {
            let (port, worker) = owner(&together[0]);
            self.workers[worker].receive(port, together.iter().map(|packet| packet.bytes.clone()).collect());
        }
    }

    pub(super) fn now_ns(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }
}
