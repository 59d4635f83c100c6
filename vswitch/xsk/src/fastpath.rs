//! The fast path: flows that the XDP programs forward by themselves, as the switch has judged them.
//!
//! # What
//!
//! A hash map of the kernel leads from what a flow's packets look like ([`FastKey`]) to a *slot*, and a slot says what
//! becomes of them ([`FastFlow`]) and counts them. The programs are in `bpf/fastpath.h`. Slots, and the generation that is in
//! force, are arrays that the kernel and the switch both have mapped: a flow is renewed, stopped and counted without a system
//! call, and only a new key, and one that goes, needs one.
//!
//! # Why this way
//!
//! A slot is written while no key leads to it, and is given to another flow only some time after its key went
//! ([`FastTable::REST_NS`]): no program that found it can run that long. So nothing is ever half written, and no counter is
//! lost. What changes under a program's eyes is single words: generation, expiry, sequence number.
//!
//! # Thread-safety
//!
//! Each worker has slots of its own, a [`FastTable`]. The programs only add to the counters, and store newer sequence numbers.
//! All shared words are relaxed atomics; the system call that inserts a key orders them.
//!
//! # Cost
//!
//! 192 bytes a slot, and about as much for its key.
//!
//! # References
//!
//! Kernel documents `bpf/map_array.rst` (`BPF_F_MMAPABLE`) and `bpf/map_hash.rst`.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use aya::maps::{HashMap, Map, MapData, MapError};
use vswitch_net::{MacAddr, PortId};

use crate::sys;

/// Bytes of the headers that VXLAN over IPv4 puts before a packet.
pub const OUTER_BYTES: usize = 50;

/// Words of `struct flow` of `bpf/fastpath.h`, and which is where.
const WORDS: usize = 24;
const STAMP: usize = 0;
const EXPIRES: usize = 1;
const PACKETS: usize = 8;
const BYTES: usize = 9;
const SEQ: usize = 10;
const OUTER: usize = 16;

const FLAG_ROUTED: u32 = 1;
const FLAG_ENCAP: u32 = 2;
const FLAG_SEQUENCED: u32 = 4;

/// A generation that is never in force: the switch counts from one.
const STOPPED: u32 = 0;

/// What the packets of a flow look like. Ports and addresses as on the wire; IPv4 in the first four bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FastKey {
    /// Port that receives them.
    pub port: PortId,
    /// True for IPv6.
    pub is_v6: bool,
    /// TCP or UDP.
    pub protocol: u8,
    /// The network's identifier and the IPv4 VTEP that encapsulated them; zeros from a pod.
    pub vxlan: (u32, [u8; 4]),
    /// Source and destination port.
    pub ports: (u16, u16),
    /// Source address.
    pub source: [u8; 16],
    /// Destination address.
    pub destination: [u8; 16],
}

/// What becomes of a flow's packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FastFlow {
    /// Ethernet destination and source that they must have.
    pub macs: (MacAddr, MacAddr),
    /// The same as they leave, with one hop less; none if they stay as they are.
    pub rewrite: Option<(MacAddr, MacAddr)>,
    /// Largest frame, bytes without headers of VXLAN.
    pub max_bytes: u32,
    /// How far a TCP sequence number may be from the last one: two to the power of this.
    pub window_bits: Option<u8>,
    /// Headers of VXLAN to put before them, as for an empty packet.
    pub outer: Option<[u8; OUTER_BYTES]>,
    /// The link to send them by.
    pub ifindex: u32,
}

/// How long a flow holds, and where its sequence numbers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FastStamp {
    /// Generation of the snapshot that judged it.
    pub generation: u64,
    /// When it ends, by the daemon's clock.
    pub expires_ns: u64,
    /// The newest sequence number.
    pub seq: u32,
}

/// What a flow has forwarded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FastCounts {
    /// Packets.
    pub packets: u64,
    /// Bytes as they came, with their headers of VXLAN.
    pub bytes: u64,
    /// The newest sequence number.
    pub seq: u32,
}

/// The switch's side of the fast path. Made by [`Programs`](crate::Programs).
#[derive(Debug)]
pub struct FastPath {
    keys: OwnedFd,
    shared: Arc<Shared>,
    slots: u32,
}

/// One worker's part of it.
#[derive(Debug)]
pub struct FastTable {
    keys: HashMap<MapData, [u8; 48], u32>,
    shared: Arc<Shared>,
    free: VecDeque<u32>,
}

/// What all workers and the kernel share.
#[derive(Debug)]
struct Shared {
    flows: Mapped,
    generation: Mapped,
    /// By port: the link that it can be reached by from here, or zero.
    targets: Box<[AtomicU32]>,
    /// What the daemon's clock has less than the kernel's.
    behind_ns: u64,
}

/// An array of the kernel's, as words.
#[derive(Debug)]
struct Mapped {
    base: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: a mapping of atomic words, which any thread may read and write.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl FastPath {
    /// Over the maps `KEYS`, `FLOWS` and `GENERATION` of the programs; `now_ns` is the daemon's clock.
    ///
    /// # Errors
    ///
    /// Those of `mmap(2)` and `dup(2)`.
    pub(crate) fn new(keys: &MapData, flows: &MapData, generation: &MapData, now_ns: u64) -> io::Result<FastPath> {
        let slots = flows.info().map_err(io::Error::other)?.max_entries();
        let shared = Shared {
            flows: Mapped::new(flows, slots as usize * WORDS)?,
            generation: Mapped::new(generation, 1)?,
            targets: (0..=u16::MAX).map(|_| AtomicU32::new(0)).collect(),
            behind_ns: sys::monotonic_ns().saturating_sub(now_ns),
        };
        Ok(FastPath { keys: keys.fd().as_fd().try_clone_to_owned()?, shared: Arc::new(shared), slots })
    }

    /// The part of worker `index` of `count`.
    ///
    /// # Errors
    ///
    /// Those of `dup(2)`.
    pub fn table(&self, index: u32, count: u32) -> io::Result<FastTable> {
        let keys = MapData::from_fd(self.keys.try_clone()?).map_err(io::Error::other)?;
        let share = self.slots / count;
        Ok(FastTable {
            keys: Map::HashMap(keys).try_into().map_err(io::Error::other)?,
            shared: self.shared.clone(),
            free: (index * share..(index + 1) * share).collect(),
        })
    }

    /// How many flows it has room for.
    pub fn capacity(&self) -> u32 {
        self.slots
    }

    /// Puts a generation in force: flows of another one are the poll loop's again.
    pub fn set_generation(&self, generation: u64) {
        self.shared.generation.word(0).store(pair(stamp_of(generation), 0), Ordering::Release);
    }

    /// Tells by what link a port is reached from here; none if it is not. What flows there already is not stopped.
    pub fn set_target(&self, port: PortId, ifindex: Option<u32>) {
        self.shared.targets[port.index()].store(ifindex.unwrap_or(0), Ordering::Relaxed);
    }

    /// By what link a port is reached.
    pub fn target(&self, port: PortId) -> Option<u32> {
        self.shared.target(port)
    }
}

impl FastTable {
    /// How long a slot rests after its flow was removed, until it may be another's.
    pub const REST_NS: u64 = 20_000_000;

    /// How many flows it has room for when it is empty.
    pub fn capacity(&self) -> usize {
        self.free.len()
    }

    /// By what link a port is reached.
    pub fn target(&self, port: PortId) -> Option<u32> {
        self.shared.target(port)
    }

    /// Has a flow forwarded; its slot. In place of one with the same key, whose slot is then to be [freed](Self::free) after a
    /// rest. None if there is no room.
    pub fn insert(&mut self, key: &FastKey, flow: &FastFlow, stamp: FastStamp) -> Option<u32> {
        let slot = self.free.pop_front()?;
        for (at, word) in flow.words().into_iter().enumerate() {
            self.shared.flow_word(slot, at).store(word, Ordering::Relaxed);
        }
        self.renew(slot, stamp);
        match self.keys.insert(key.bytes(), slot, 0) {
            Ok(()) => Some(slot),
            Err(_) => {
                self.free.push_front(slot);
                None
            }
        }
    }

    /// Gives a flow another generation and more time.
    pub fn renew(&mut self, slot: u32, stamp: FastStamp) {
        let word = |at| self.shared.flow_word(slot, at);
        word(EXPIRES).store(stamp.expires_ns + self.shared.behind_ns, Ordering::Relaxed);
        word(SEQ).store(pair(stamp.seq, 0), Ordering::Relaxed);
        self.stamp(slot, stamp_of(stamp.generation));
    }

    /// Leaves a flow's packets to the poll loop, until it is [renewed](Self::renew).
    pub fn stop(&mut self, slot: u32) {
        self.stamp(slot, STOPPED);
    }

    /// What a flow has forwarded since it was inserted.
    pub fn counts(&self, slot: u32) -> FastCounts {
        let word = |at| self.shared.flow_word(slot, at).load(Ordering::Relaxed);
        FastCounts { packets: word(PACKETS), bytes: word(BYTES), seq: first(word(SEQ)) }
    }

    /// Stops a flow and forgets its key, if it is still its own. The slot is to be [freed](Self::free) after a rest.
    pub fn remove(&mut self, slot: u32, key: &FastKey) {
        self.stop(slot);
        if self.keys.get(&key.bytes(), 0).is_ok_and(|own| own == slot) {
            // Nothing to do if it is gone.
            let _: Result<(), MapError> = self.keys.remove(&key.bytes());
        }
    }

    /// Takes a slot back that has [rested](Self::REST_NS).
    pub fn free(&mut self, slot: u32) {
        self.free.push_back(slot);
    }

    /// The generation and the flags lie in one word.
    fn stamp(&mut self, slot: u32, generation: u32) {
        let word = self.shared.flow_word(slot, STAMP);
        // Nobody else writes it.
        word.store(pair(generation, second(word.load(Ordering::Relaxed))), Ordering::Release);
    }
}

impl FastKey {
    /// `struct flow_key`.
    fn bytes(&self) -> [u8; 48] {
        let mut bytes = [0; 48];
        bytes[..2].copy_from_slice(&self.port.0.to_ne_bytes());
        bytes[2] = if self.is_v6 { 6 } else { 4 };
        bytes[3] = self.protocol;
        bytes[4..8].copy_from_slice(&self.vxlan.0.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.vxlan.1);
        bytes[12..14].copy_from_slice(&self.ports.0.to_be_bytes());
        bytes[14..16].copy_from_slice(&self.ports.1.to_be_bytes());
        bytes[16..32].copy_from_slice(&self.source);
        bytes[32..].copy_from_slice(&self.destination);
        bytes
    }
}

impl FastFlow {
    /// `struct flow`, stopped.
    fn words(&self) -> [u64; WORDS] {
        let mut words = [0; WORDS];
        let flag = |is_set, flag| if is_set { flag } else { 0 };
        let flags = flag(self.rewrite.is_some(), FLAG_ROUTED)
            | flag(self.outer.is_some(), FLAG_ENCAP)
            | flag(self.window_bits.is_some(), FLAG_SEQUENCED);
        words[STAMP] = pair(STOPPED, flags);
        let (start, rest) = ethernet(self.macs);
        words[2] = start;
        words[3] = pair(rest, self.max_bytes);
        let (start, rest) = self.rewrite.map_or((0, 0), ethernet);
        words[4] = start;
        words[5] = pair(rest, self.ifindex);
        words[6] = pair(u32::from(self.window_bits.unwrap_or(0)), 0);
        if let Some(outer) = &self.outer {
            for (word, bytes) in words[OUTER..].iter_mut().zip(outer.chunks(8)) {
                let mut whole = [0; 8];
                whole[..bytes.len()].copy_from_slice(bytes);
                *word = u64::from_ne_bytes(whole);
            }
        }
        words
    }
}

impl Shared {
    fn flow_word(&self, slot: u32, at: usize) -> &AtomicU64 {
        self.flows.word(slot as usize * WORDS + at)
    }

    fn target(&self, port: PortId) -> Option<u32> {
        let ifindex = self.targets[port.index()].load(Ordering::Relaxed);
        (ifindex != 0).then_some(ifindex)
    }
}

impl Mapped {
    fn new(map: &MapData, words: usize) -> io::Result<Mapped> {
        let base = sys::map_shared(map.fd().as_fd(), words * size_of::<u64>(), 0)?;
        Ok(Mapped { base: base.cast(), words })
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at < self.words);
        // SAFETY: inside the mapping, as asserted, which is page aligned and lives as long as `self`; the kernel, too, reads
        // and writes it by aligned words or halves of them.
        unsafe { self.base.add(at).as_ref() }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and `word` hands out no reference that outlives `self`.
        unsafe { sys::unmap(self.base.cast(), self.words * size_of::<u64>()) };
    }
}

/// The low half of a generation; zero is kept for what is stopped.
fn stamp_of(generation: u64) -> u32 {
    (generation as u32).max(1)
}

/// Two words of C beside each other in memory.
fn pair(first: u32, second: u32) -> u64 {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&first.to_ne_bytes());
    bytes[4..].copy_from_slice(&second.to_ne_bytes());
    u64::from_ne_bytes(bytes)
}

fn first(pair: u64) -> u32 {
    let [a, b, c, d, ..] = pair.to_ne_bytes();
    u32::from_ne_bytes([a, b, c, d])
}

fn second(pair: u64) -> u32 {
    let [.., a, b, c, d] = pair.to_ne_bytes();
    u32::from_ne_bytes([a, b, c, d])
}

/// Destination and source as they begin an Ethernet header: 8 bytes and 4.
fn ethernet((destination, source): (MacAddr, MacAddr)) -> (u64, u32) {
    let mut bytes = [0; 12];
    bytes[..6].copy_from_slice(&destination.0);
    bytes[6..].copy_from_slice(&source.0);
    let [a, b, c, d, e, f, g, h, rest @ ..] = bytes;
    (u64::from_ne_bytes([a, b, c, d, e, f, g, h]), u32::from_ne_bytes(rest))
}
