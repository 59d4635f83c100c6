//! The flow table of one worker: exact match, from key to compiled action.
//!
//! # What
//!
//! Buckets of four entries. A bucket's tags (16 bytes) lie together, so one cache line tells which entry, if any, to look
//! at; an entry is two lines, key and rest. The table never grows and never allocates after it is made.
//!
//! # Why this way
//!
//! An entry carries the generation of the snapshot it was decided by. Another generation is a miss, so a change of
//! policy or routes takes effect at once and nobody walks the table. An entry also ends after [`LIFETIME_NS`]: the miss
//! that follows refreshes learned addresses, which a packet on the hit path never touches.
//!
//! A full bucket gives up its stalest entry, else the one unused longest. A burst is looked up in two passes, so that the
//! cache misses of its packets overlap: [`FlowTable::prefetch`], then [`FlowTable::find`] and the entry's own prefetch.
//!
//! Of a TCP flow the newest sequence number is kept. A segment too far from it is a miss, and is judged by its connection
//! ([`crate::connection`]); so are segments that open or close one, whose keys are never stored.
//!
//! # Cost
//!
//! 144 bytes an entry. One probe a hit. What the packets of a translated flow become is kept in an array of its own, whose memory
//! the kernel gives when it is first written to: 40 bytes an entry more for those who translate.
//!
//! # References
//!
//! Open vSwitch's exact-match cache and OPTE's unified flow table have the same purpose; epochs are OPTE's word.

use vswitch_xsk::{filled, prefetch};

use crate::fastpath::OFFER_EVERY;
use crate::meta::FlowKey;
use crate::translate::Translation;
use crate::verdict::Action;

/// An entry is decided anew after this time.
pub const LIFETIME_NS: u64 = 5_000_000_000;

const WAYS: usize = 4;

/// One flow.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct FlowEntry {
    /// What its packets look like.
    pub key: FlowKey,
    /// Generation of the snapshot that decided, its low bits: an entry lives too short for them to come round.
    generation: u32,
    /// When it must be decided anew, in ticks of 2^24 ns.
    expires: u32,
    /// The newest TCP sequence number.
    seq: u32,
    /// How far another one may be from it: two to the power of this.
    window_bits: u8,
    /// False for an entry that was never used.
    is_used: bool,
    /// When it last matched.
    pub used_ns: u64,
    /// Packets matched.
    pub packets: u64,
    /// Bytes matched.
    pub bytes: u64,
    /// What to do.
    pub action: Action,
}

/// A flow as people are told of it.
#[derive(Clone, Copy, Debug)]
pub struct Flow {
    /// Its entry.
    pub entry: FlowEntry,
    /// What its packets become.
    pub translation: Option<Translation>,
    /// True if the kernel forwards it.
    pub is_offloaded: bool,
}

/// A packet as the table sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Probe<'a> {
    /// What it looks like.
    pub(crate) key: &'a FlowKey,
    /// Generation of the snapshot in use.
    pub(crate) generation: u64,
    /// The time.
    pub(crate) now_ns: u64,
    /// Its length.
    pub(crate) bytes: usize,
    /// Its TCP sequence number; 0 if it has none.
    pub(crate) seq: u32,
    /// The epoch of translated connections.
    pub(crate) epoch: u32,
}

/// The table.
#[derive(Debug)]
pub struct FlowTable {
    tags: Box<[[u32; WAYS]]>,
    entries: Box<[FlowEntry]>,
    /// What the packets of entries whose action says so become.
    translations: Box<[[u64; 5]]>,
    /// Which entries are forwarded in the kernel too: one more than their place there. Empty if none ever is.
    places: Box<[u32]>,
    /// One of these that made room for another flow.
    evicted: Option<(u32, FlowKey)>,
    mask: usize,
}

/// A flow as it is handed to the kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shortcut {
    /// What to do.
    pub(crate) action: Action,
    /// How far a sequence number may be from the last one.
    pub(crate) window_bits: u8,
    /// The last one.
    pub(crate) seq: u32,
    /// When it must be decided anew.
    pub(crate) expires_ns: u64,
}

/// The window of what has no sequence numbers: anything.
pub(crate) const NO_WINDOW: u8 = 31;

const UNUSED: FlowEntry = FlowEntry {
    key: FlowKey([0; 8]),
    generation: 0,
    expires: 0,
    seq: 0,
    window_bits: NO_WINDOW,
    is_used: false,
    used_ns: 0,
    packets: 0,
    bytes: 0,
    action: Action::NONE,
};

impl FlowTable {
    /// A table for `entries` flows, rounded up to a power of two, at least 16.
    pub fn new(entries: usize) -> FlowTable {
        let entries = entries.max(16).next_power_of_two();
        FlowTable {
            tags: filled([0; WAYS], entries / WAYS),
            entries: filled(UNUSED, entries),
            // Of zeros that the kernel gives when they are written to: most workers never translate.
            translations: vec![[0; 5]; entries].into_boxed_slice(),
            places: Box::default(),
            evicted: None,
            mask: entries / WAYS - 1,
        }
    }

    /// Makes room to note which entries are forwarded in the kernel.
    pub(crate) fn open_places(&mut self) {
        self.places = vec![0; self.entries.len()].into_boxed_slice();
    }

    /// A flow that made room for the one that was inserted last, and where in the kernel it was, if it was.
    pub(crate) fn take_evicted(&mut self) -> Option<(u32, FlowKey)> {
        self.evicted.take()
    }

    /// Where in the kernel the flow at `at` is, if it is.
    pub(crate) fn place(&self, at: usize) -> Option<u32> {
        self.places.get(at)?.checked_sub(1)
    }

    /// Notes where in the kernel it is.
    pub(crate) fn set_place(&mut self, at: usize, place: Option<u32>) {
        if let Some(known) = self.places.get_mut(at) {
            *known = place.map_or(0, |place| place + 1);
        }
    }

    /// True if the kernel is to hear of the flow at `at` now.
    #[inline(always)]
    pub(crate) fn is_due(&self, at: usize) -> bool {
        self.entries[at].packets.is_multiple_of(OFFER_EVERY)
    }

    /// The flow at `at`, to be handed to the kernel.
    pub(crate) fn shortcut(&self, at: usize, now_ns: u64) -> Shortcut {
        let FlowEntry { action, window_bits, seq, expires, .. } = self.entries[at];
        let ticks = i64::from(expires.wrapping_sub(tick(now_ns)) as i32);
        let expires_ns = (now_ns >> TICK_BITS).saturating_add_signed(ticks) << TICK_BITS;
        Shortcut { action, window_bits, seq, expires_ns }
    }

    /// Counts packets of a flow that were forwarded in the kernel, if it is still here.
    /// `seq` is their newest sequence number, however far it has come.
    pub(crate) fn count(&mut self, key: &FlowKey, hash: u64, packets: u64, bytes: u64, seq: Option<u32>, now_ns: u64) {
        let Some(at) = self.find_exact(key, hash) else { return };
        let entry = &mut self.entries[at];
        (entry.packets, entry.bytes) = (entry.packets + packets, entry.bytes.wrapping_add(bytes));
        entry.used_ns = now_ns;
        if let Some(seq) = seq.filter(|_| entry.window_bits != NO_WINDOW) {
            entry.seq = seq;
        }
    }

    /// The entry of a flow.
    pub(crate) fn find_exact(&self, key: &FlowKey, hash: u64) -> Option<usize> {
        self.find(hash).filter(|&at| self.entries[at].is_used && self.entries[at].key == *key)
    }

    /// Fetches the tags for a hash, ahead of [`find`](Self::find).
    #[inline(always)]
    pub fn prefetch(&self, hash: u64) {
        prefetch(&self.tags[hash as usize & self.mask]);
    }

    /// The entry that may hold the flow, by tag alone; its two cache lines are fetched.
    #[inline(always)]
    pub fn find(&self, hash: u64) -> Option<usize> {
        let bucket = hash as usize & self.mask;
        let tag = tag(hash);
        // All ways at once: which of them it is cannot be foreseen.
        let ways = self.tags[bucket].iter().enumerate().rev();
        let way = ways.fold(WAYS, |found, (way, &other)| if other == tag { way } else { found });
        if way == WAYS {
            return None;
        }
        let at = bucket * WAYS + way;
        let entry = &self.entries[at];
        prefetch(&entry.key);
        prefetch(&entry.generation);
        Some(at)
    }

    /// The action of the flow at `at`, if key and generation match, it has not expired, and the sequence number is near the
    /// last one; counts the packet.
    #[inline(always)]
    pub(crate) fn hit(&mut self, at: usize, probe: &Probe<'_>) -> Option<&Action> {
        let entry = &mut self.entries[at];
        let distance = probe.seq.wrapping_sub(entry.seq);
        if entry.generation != probe.generation as u32
            || (tick(probe.now_ns).wrapping_sub(entry.expires) as i32) >= 0
            || !entry.key.is_same(probe.key)
            || (distance as i32).unsigned_abs() >> entry.window_bits != 0
            || (entry.action.is_translated && epoch_of(&self.translations[at]) != probe.epoch)
        {
            return None;
        }
        if (distance as i32) > 0 {
            entry.seq = probe.seq;
        }
        entry.used_ns = probe.now_ns;
        entry.packets += 1;
        entry.bytes += probe.bytes as u64;
        Some(&entry.action)
    }

    /// What the packets of the flow at `at` become, if its action says that they are translated.
    #[inline]
    pub(crate) fn translation(&self, at: usize) -> Translation {
        Translation::from_words(self.translations[at])
    }

    /// The newest sequence number of a flow that is or was here.
    pub(crate) fn last_seq(&self, key: &FlowKey, hash: u64) -> Option<u32> {
        Some(self.entries[self.find_exact(key, hash)?].seq)
    }

    /// Forgets a flow, if it is here: its connection begins anew. Where in the kernel it was, if it was.
    pub(crate) fn forget(&mut self, key: &FlowKey, hash: u64) -> Option<u32> {
        let at = self.find(hash).filter(|&at| self.entries[at].key == *key)?;
        let place = self.place(at);
        self.set_place(at, None);
        self.entries[at] = UNUSED;
        self.tags[at / WAYS][at % WAYS] = 0;
        place
    }

    /// Stores a decision, in the flow's old place if it had one, and counts its packet; where that is. `window_bits`
    /// is [`NO_WINDOW`] for what has no sequence numbers.
    pub(crate) fn insert(
        &mut self,
        hash: u64,
        probe: &Probe<'_>,
        action: Action,
        translation: Option<&Translation>,
        window_bits: u8,
    ) -> usize {
        let Probe { key, generation, now_ns, bytes, seq, epoch } = *probe;
        let bucket = hash as usize & self.mask;
        let tag = tag(hash);
        let ways = &self.entries[bucket * WAYS..(bucket + 1) * WAYS];
        let same = (0..WAYS).find(|&way| self.tags[bucket][way] == tag && ways[way].key == *key);
        let way = same.unwrap_or_else(|| {
            (0..WAYS)
                .min_by_key(|&way| {
                    let is_live = ways[way].generation == generation as u32
                        && (tick(now_ns).wrapping_sub(ways[way].expires) as i32) < 0;
                    (self.tags[bucket][way] != 0, is_live, ways[way].used_ns)
                })
                .unwrap_or(0)
        });
        let at = bucket * WAYS + way;
        if let Some(translation) = translation {
            self.translations[at] = translation.to_words();
            self.translations[at][4] |= u64::from(epoch) << 32;
        }
        let entry = &mut self.entries[at];
        if same.is_none() {
            (entry.packets, entry.bytes) = (0, 0);
            if let Some(place @ 1..) = self.places.get_mut(at) {
                self.evicted = Some((std::mem::take(place) - 1, entry.key));
            }
        }
        self.tags[bucket][way] = tag;
        *entry = FlowEntry {
            key: *key,
            generation: generation as u32,
            expires: tick(now_ns.saturating_add(LIFETIME_NS)),
            seq,
            window_bits,
            is_used: true,
            used_ns: now_ns,
            packets: entry.packets + 1,
            bytes: entry.bytes + bytes as u64,
            action: Action { is_translated: translation.is_some(), ..action },
        };
        at
    }

    /// Flows that matched since `since_ns`.
    pub fn dump(&self, since_ns: u64) -> impl Iterator<Item = Flow> {
        let all = self.entries.iter().enumerate();
        let recent = all.filter(move |(_, entry)| entry.is_used && entry.used_ns >= since_ns);
        recent.map(|(at, entry)| Flow {
            entry: *entry,
            translation: entry.action.is_translated.then(|| self.translation(at)),
            is_offloaded: self.place(at).is_some(),
        })
    }
}

/// The epoch that a translation is of; it stands beside the ports.
#[inline(always)]
fn epoch_of(words: &[u64; 5]) -> u32 {
    (words[4] >> 32) as u32
}

/// About 17 ms.
const TICK_BITS: u32 = 24;

#[inline(always)]
fn tick(ns: u64) -> u32 {
    (ns >> TICK_BITS) as u32
}

/// Never zero, which marks an unused way.
#[inline(always)]
fn tag(hash: u64) -> u32 {
    (hash >> 32) as u32 | 1
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use vswitch_net::PortId;

    use super::*;
    use crate::verdict::Output;

    const SEED: u64 = 0x5eed_5eed_1234_abcd;

    fn action(port: u16) -> Action {
        Action::new(None, Output::Port(PortId(port)))
    }

    fn lookup(table: &mut FlowTable, key: &FlowKey, generation: u64, now_ns: u64) -> Option<Action> {
        let at = table.find(key.hash(SEED))?;
        table.hit(at, &Probe { key, generation, now_ns, bytes: 64, seq: 0, epoch: 0 }).copied()
    }

    fn insert(table: &mut FlowTable, key: &FlowKey, generation: u64, now_ns: u64, action: Action) {
        let probe = Probe { key, generation, now_ns, bytes: 64, seq: 0, epoch: 0 };
        table.insert(key.hash(SEED), &probe, action, None, NO_WINDOW);
    }

    #[test]
    fn a_sequence_number_far_away_is_a_miss() {
        let mut table = FlowTable::new(16);
        let key = FlowKey([9; 8]);
        let probe = |seq: u32| Probe { key: &key, generation: 1, now_ns: 1, bytes: 64, seq, epoch: 0 };
        table.insert(key.hash(SEED), &probe(u32::MAX - 10), action(1), None, 17);
        let mut hits = |seq: u32| table.find(key.hash(SEED)).and_then(|at| table.hit(at, &probe(seq))).is_some();
        assert!(hits(100), "numbers come round");
        assert!(hits(100 + (1 << 17) - 1), "the window moves along");
        assert!(!hits(100 + (1 << 19)) && !hits(0x8000_0000));
        assert!(hits(100), "again");
        assert_eq!(table.last_seq(&key, key.hash(SEED)), Some(100 + (1 << 17) - 1));
    }

    #[test]
    fn an_entry_is_two_cache_lines() {
        assert_eq!(size_of::<FlowEntry>(), 128);
    }

    #[test]
    fn another_generation_or_a_late_packet_is_a_miss() {
        let mut table = FlowTable::new(16);
        let key = FlowKey([9; 8]);
        insert(&mut table, &key, 5, 100, action(1));
        assert_eq!(lookup(&mut table, &key, 5, 101), Some(action(1)));
        assert_eq!(lookup(&mut table, &key, 6, 101), None);
        assert_eq!(lookup(&mut table, &key, 5, 100 + LIFETIME_NS + (1 << 24)), None);
        insert(&mut table, &key, 6, 200, action(2));
        assert_eq!(lookup(&mut table, &key, 6, 201), Some(action(2)));
        assert_eq!(table.dump(0).count(), 1, "decided anew in place");
        assert_eq!(table.dump(0).next().unwrap().entry.packets, 4);
    }

    /// Against a map: what the table says is never wrong, and with room to spare it is never silent.
    #[test]
    fn agrees_with_a_map() {
        let mut table = FlowTable::new(1 << 14);
        let mut map = BTreeMap::new();
        for i in 0..2000_u64 {
            let key = FlowKey([i % 700, i / 3 % 2, 0, 0, 1, 2, 3, 4]);
            let generation = 1 + i / 1000;
            insert(&mut table, &key, generation, i, action(i as u16));
            map.insert(key.0, (generation, action(i as u16)));
        }
        for (key, (generation, action)) in &map {
            assert_eq!(lookup(&mut table, &FlowKey(*key), *generation, 2000), Some(*action));
            assert_eq!(lookup(&mut table, &FlowKey(*key), 99, 2000), None);
        }
    }

    #[test]
    fn a_full_table_keeps_the_latest() {
        let mut table = FlowTable::new(64);
        for i in 0..10_000_u64 {
            let key = FlowKey([i; 8]);
            insert(&mut table, &key, 1, i, action(i as u16));
            assert_eq!(lookup(&mut table, &key, 1, i), Some(action(i as u16)));
        }
        assert!(table.dump(0).count() <= 64);
    }
}
