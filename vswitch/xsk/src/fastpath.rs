//! The fast path: flows that the XDP programs forward by themselves, as the switch has judged them.
//!
//! # What
//!
//! A hash table in memory that the kernel and the switch both have mapped: buckets of four *slots*. A slot says what a flow's
//! packets look like ([`FastKey`]), what becomes of them ([`FastFlow`]), until when ([`FastStamp`]), and counts them
//! ([`FastCounts`]). The programs, in `bpf/fastpath.h`, look a packet up and do it.
//!
//! # Why this way
//!
//! A hash map of the kernel's takes a system call to write and three cache lines to read before the action is found. Here a
//! flow is inserted, renewed, stopped and counted by plain stores and loads, and found by one cache line.
//!
//! # Thread-safety
//!
//! A slot belongs to the worker that claimed it, who alone writes key, action and stamp; the programs only add to the
//! counters and store newer sequence numbers. A slot that is not stopped is never changed but for its stamp and the sequence
//! number. A stopped one rests for [`FastTable::REST_NS`] until it may be claimed anew: programs run for a microsecond and are
//! not put aside, but the machine below may be. The stamp is stored last, with release; the programs read it first, and what they read next depends on it. All shared words are atomics.
//!
//! # Cost
//!
//! 192 bytes a slot. A hit reads two cache lines, or three to encapsulate; what is not there reads four, at once.
//!
//! # References
//!
//! Kernel document `bpf/map_array.rst` (`BPF_F_MMAPABLE`).

use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use aya::maps::MapData;
use vswitch_net::{MacAddr, PortId};

use crate::sys;

/// Bytes of the headers that VXLAN over IPv4 puts before a packet.
pub const OUTER_BYTES: usize = 50;

/// Words of `struct flow` of `bpf/fastpath.h`, and which is where.
const WORDS: usize = 24;
const KEY_WORDS: usize = 6;
const STAMP: usize = 6;
const EXPIRES: usize = 7;
const ACTION: usize = 8;
const PACKETS: usize = 12;
const BYTES: usize = 13;
const SEQ: usize = 14;
const OUTER: usize = 16;

/// Slots of a bucket.
const WAYS: usize = 4;

const FLAG_ROUTED: u32 = 1;
const FLAG_ENCAP: u32 = 2;
const FLAG_SEQUENCED: u32 = 4;
const FLAG_COMPLETE: u32 = 8;
const FLAG_FRAGS: u32 = 16;

/// Largest frame whose checksum the programs can complete.
pub const MAX_SUM: u32 = 3584;

/// A generation that is never in force: zero and one are both told as one.
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
    /// Whether a checksum that is left to the device is completed, in frames of up to [`MAX_SUM`].
    pub completes: bool,
    /// Headers of VXLAN to put before them, as for an empty packet.
    pub outer: Option<[u8; OUTER_BYTES]>,
    /// The link to send them by.
    pub to: FastTarget,
}

/// A link that XDP can send to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FastTarget {
    /// Its index.
    pub ifindex: u32,
    /// Whether it takes packets of several frames.
    pub takes_frags: bool,
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
#[derive(Clone, Debug)]
pub struct FastPath {
    shared: Arc<Shared>,
}

/// What a worker has of it.
#[derive(Debug)]
pub struct FastTable {
    shared: Arc<Shared>,
    /// How many flows it may have.
    capacity: usize,
}

/// What all workers and the kernel share.
#[derive(Debug)]
struct Shared {
    flows: Mapped,
    table: Mapped,
    /// Which slots belong to somebody.
    claims: Box<[AtomicBool]>,
    mask: u32,
    seed: u64,
    /// By port: the link that it can be reached by from here, or zero; the upper half says whether it takes several frames.
    targets: Box<[AtomicU64]>,
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

/// How many buckets are needed for so many flows: twice the room, so that few of them find their bucket full.
pub(crate) fn buckets_for(flows: u32) -> u32 {
    (flows * 2).div_ceil(WAYS as u32).next_power_of_two()
}

impl FastPath {
    /// Over the maps `FLOWS` and `TABLE` of the programs, which are given the `seed` of the hash; `start` is where the daemon's
    /// clock began.
    ///
    /// # Errors
    ///
    /// Those of `mmap(2)`.
    pub(crate) fn new(flows: &MapData, table: &MapData, seed: u64, start: Instant) -> io::Result<FastPath> {
        let buckets = flows.info().map_err(io::Error::other)?.max_entries();
        let slots = buckets as usize * WAYS;
        let shared = Shared {
            flows: Mapped::new(flows, slots * WORDS)?,
            table: Mapped::new(table, 2)?,
            claims: (0..slots).map(|_| AtomicBool::new(false)).collect(),
            mask: buckets - 1,
            seed,
            targets: (0..=u16::MAX).map(|_| AtomicU64::new(0)).collect(),
            behind_ns: sys::monotonic_ns().saturating_sub(start.elapsed().as_nanos() as u64),
        };
        shared.table.word(1).store(seed, Ordering::Relaxed);
        let fast_path = FastPath { shared: Arc::new(shared) };
        fast_path.set_generation(0);
        Ok(fast_path)
    }

    /// A worker's part, for so many flows.
    pub fn table(&self, capacity: usize) -> FastTable {
        FastTable { shared: self.shared.clone(), capacity }
    }

    /// Puts a generation in force: flows of another one are the poll loop's again.
    pub fn set_generation(&self, generation: u64) {
        let word = pair(stamp_of(generation), self.shared.mask);
        self.shared.table.word(0).store(word, Ordering::Release);
    }

    /// Tells by what link a port is reached from here; none if it is not. What flows there already is not stopped.
    pub fn set_target(&self, port: PortId, target: Option<FastTarget>) {
        let word = target.map_or(0, |to| u64::from(to.takes_frags) << 32 | u64::from(to.ifindex));
        self.shared.targets[port.index()].store(word, Ordering::Relaxed);
    }

    /// By what link a port is reached.
    pub fn target(&self, port: PortId) -> Option<FastTarget> {
        self.shared.target(port)
    }
}

impl FastTable {
    /// How long a slot rests after its flow was stopped, until it may be another's.
    pub const REST_NS: u64 = 2_000_000_000;

    /// How many flows it may have.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// By what link a port is reached.
    pub fn target(&self, port: PortId) -> Option<FastTarget> {
        self.shared.target(port)
    }

    /// Has a flow forwarded; its slot. None if there is no room in its bucket.
    pub fn insert(&mut self, key: &FastKey, flow: &FastFlow, stamp: FastStamp) -> Option<u32> {
        let key = key.words();
        let bucket = (hash_of(&key, self.shared.seed) as u32 & self.shared.mask) as usize;
        let slot = (bucket * WAYS..(bucket + 1) * WAYS).find(|&slot| self.shared.claim(slot))? as u32;
        let (action, flags) = flow.words(stamp.seq);
        let words = key.into_iter().chain([pair(STOPPED, flags), 0]).chain(action);
        for (at, word) in words.enumerate() {
            self.shared.word(slot, at).store(word, Ordering::Relaxed);
        }
        self.renew(slot, stamp);
        Some(slot)
    }

    /// Gives a flow another generation and more time.
    pub fn renew(&mut self, slot: u32, stamp: FastStamp) {
        let word = |at| self.shared.word(slot, at);
        word(EXPIRES).store(stamp.expires_ns + self.shared.behind_ns, Ordering::Relaxed);
        self.follow(slot, stamp.seq);
        self.stamp(slot, stamp_of(stamp.generation));
    }

    /// Tells a flow of a newer sequence number: its packets may pass the poll loop, too.
    pub fn follow(&mut self, slot: u32, seq: u32) {
        let word = self.shared.word(slot, SEQ);
        let known = word.load(Ordering::Relaxed);
        // If a program stores one meanwhile, the next packet puts it right.
        if (seq.wrapping_sub(first(known)) as i32) > 0 {
            word.store(pair(seq, second(known)), Ordering::Relaxed);
        }
    }

    /// Leaves a flow's packets to the poll loop, until it is [renewed](Self::renew).
    pub fn stop(&mut self, slot: u32) {
        self.stamp(slot, STOPPED);
    }

    /// What a flow has forwarded since it was inserted.
    pub fn counts(&self, slot: u32) -> FastCounts {
        // Packets first: the programs count their bytes before them.
        let packets = self.shared.word(slot, PACKETS).load(Ordering::Acquire);
        let word = |at| self.shared.word(slot, at).load(Ordering::Relaxed);
        FastCounts { packets, bytes: word(BYTES), seq: first(word(SEQ)) }
    }

    /// Gives a slot back that was stopped and has [rested](Self::REST_NS).
    pub fn free(&mut self, slot: u32) {
        self.shared.claims[slot as usize].store(false, Ordering::Release);
    }

    /// The generation and the flags lie in one word.
    fn stamp(&mut self, slot: u32, generation: u32) {
        let word = self.shared.word(slot, STAMP);
        // Nobody else writes it.
        word.store(pair(generation, second(word.load(Ordering::Relaxed))), Ordering::Release);
    }
}

impl FastKey {
    /// `struct flow_key`.
    fn words(&self) -> [u64; KEY_WORDS] {
        let mut bytes = [0; KEY_WORDS * 8];
        bytes[..2].copy_from_slice(&self.port.0.to_ne_bytes());
        bytes[2] = if self.is_v6 { 6 } else { 4 };
        bytes[3] = self.protocol;
        bytes[4..8].copy_from_slice(&self.vxlan.0.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.vxlan.1);
        bytes[12..14].copy_from_slice(&self.ports.0.to_be_bytes());
        bytes[14..16].copy_from_slice(&self.ports.1.to_be_bytes());
        bytes[16..32].copy_from_slice(&self.source);
        bytes[32..].copy_from_slice(&self.destination);
        words_of(&bytes)
    }
}

impl FastFlow {
    /// The rest of `struct flow`, and the flags.
    fn words(&self, seq: u32) -> ([u64; WORDS - ACTION], u32) {
        let flag = |is_set, flag| if is_set { flag } else { 0 };
        let flags = flag(self.rewrite.is_some(), FLAG_ROUTED)
            | flag(self.outer.is_some(), FLAG_ENCAP)
            | flag(self.window_bits.is_some(), FLAG_SEQUENCED)
            | flag(self.completes, FLAG_COMPLETE)
            | flag(self.to.takes_frags, FLAG_FRAGS);
        let mut words = [0; WORDS - ACTION];
        let (start, rest) = ethernet(self.macs);
        words[0] = start;
        words[1] = pair(rest, self.max_bytes);
        let (start, rest) = self.rewrite.map_or((0, 0), ethernet);
        words[2] = start;
        words[3] = pair(rest, self.to.ifindex);
        words[SEQ - ACTION] = pair(seq, u32::from(self.window_bits.unwrap_or(0)));
        let mut outer = [0; (WORDS - OUTER) * 8];
        outer[..OUTER_BYTES].copy_from_slice(self.outer.as_ref().unwrap_or(&[0; OUTER_BYTES]));
        words[OUTER - ACTION..].copy_from_slice(&words_of::<{ WORDS - OUTER }>(&outer));
        (words, flags)
    }
}

impl Shared {
    fn word(&self, slot: u32, at: usize) -> &AtomicU64 {
        self.flows.word(slot as usize * WORDS + at)
    }

    /// True if the slot was nobody's.
    fn claim(&self, slot: usize) -> bool {
        let claim = &self.claims[slot];
        !claim.load(Ordering::Relaxed) && !claim.swap(true, Ordering::Acquire)
    }

    fn target(&self, port: PortId) -> Option<FastTarget> {
        let word = self.targets[port.index()].load(Ordering::Relaxed);
        (word != 0).then_some(FastTarget { ifindex: word as u32, takes_frags: word >> 32 != 0 })
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

/// `hash_of` of `bpf/fastpath.h`.
fn hash_of(key: &[u64; KEY_WORDS], seed: u64) -> u64 {
    let (mut one, mut two) = (seed, !seed);
    for words in key.chunks_exact(2) {
        one = (one ^ words[0]).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        two = (two ^ words[1]).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        one ^= one >> 32;
        two ^= two >> 32;
    }
    one = (one ^ two).wrapping_mul(0x94d0_49bb_1331_11eb);
    one ^ one >> 32
}

/// Words as they lie in memory; of as many bytes as they have.
fn words_of<const N: usize>(bytes: &[u8]) -> [u64; N] {
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = bytes.try_into().map_or(0, u64::from_ne_bytes);
    }
    words
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
