//! A part of the table: a slab, its index, and the list of those without an answer.

use hashbrown::HashTable;
use vswitch_net::PortId;

use super::alias::Aliases;
use super::key::{Key, Tuple};
use super::state::{State, Timeouts};
use crate::table::policy::RuleId;
use crate::translate::Translation;

/// In the place of a port: behind the wire, or not known.
pub(crate) const ELSEWHERE: PortId = PortId(u16::MAX);

/// The end of a list.
pub(crate) const END: u32 = u32::MAX;

const CHUNK: usize = 64;

/// A connection.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// What it is found by.
    pub key: Key,
    /// When it began.
    pub created_ns: u64,
    /// When its last packet came by here; packets of its flows do so every few seconds.
    pub used_ns: u64,
    /// Generation of the snapshot that judged it last.
    pub generation: u64,
    /// Who began, then who answers.
    pub(crate) ends: [End; 2],
    /// The rules that let it pass, of who began and of who answers.
    pub(crate) rules: [RuleId; 2],
    /// Neighbors in the list of those without an answer; of a free place, the next free one.
    links: [u32; 2],
    /// The ports of who began and of who answers, as judged; [`ELSEWHERE`] for the wire.
    pub(crate) places: [PortId; 2],
    /// How far it has come.
    pub state: State,
    /// True if the key's low end began.
    pub is_from_low: bool,
    /// True if both sides have spoken.
    pub is_replied: bool,
    /// True if it was not seen from its beginning: who began is a guess.
    pub is_picked_up: bool,
    /// Which ends have spoken: one bit each.
    pub(crate) heard: u8,
    /// TCP: two SYNs that crossed.
    pub(crate) is_crossed: bool,
    is_used: bool,
    is_listed: bool,
    /// True if its packets leave with other addresses or ports than they came with.
    pub(crate) is_translated: bool,
    /// True if the next packet of who began begins it anew.
    pub(crate) is_retired: bool,
}

/// What is known of one end of a TCP connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct End {
    /// The number after the last byte that was seen of it.
    pub(crate) next: u32,
    /// The shift of the windows that it announces.
    pub(crate) shift: u8,
    pub(crate) has_scale: bool,
    /// True if `next` means something.
    pub(crate) is_seen: bool,
    /// True if it has sent a FIN.
    pub(crate) is_closed: bool,
}

/// A part of the table.
#[derive(Debug)]
pub(crate) struct Shard {
    /// Places, each with half of its key's hash, so that growing touches no entry.
    index: HashTable<(u32, u32)>,
    chunks: Vec<Box<[Entry; CHUNK]>>,
    free: u32,
    /// Those without an answer: oldest and newest.
    oldest: u32,
    newest: u32,
    /// What those that are translated leave as, in the places of their entries; a chunk without any has none.
    translations: Vec<Option<Box<[Translation; CHUNK]>>>,
    pub(super) aliases: Aliases,
}

impl Default for Shard {
    fn default() -> Self {
        Shard {
            index: HashTable::new(),
            chunks: Vec::new(),
            free: END,
            oldest: END,
            newest: END,
            translations: Vec::new(),
            aliases: Aliases::default(),
        }
    }
}

impl Entry {
    /// A connection that begins now.
    pub(crate) fn new(key: Key, is_from_low: bool, places: [PortId; 2], state: State, now_ns: u64) -> Entry {
        Entry {
            key,
            created_ns: now_ns,
            used_ns: now_ns,
            generation: 0,
            ends: [End::default(); 2],
            rules: [RuleId::NONE; 2],
            links: [END; 2],
            places,
            state,
            is_from_low,
            is_replied: false,
            is_picked_up: false,
            heard: 0,
            is_crossed: false,
            is_used: true,
            is_listed: false,
            is_translated: false,
            is_retired: false,
        }
    }

    /// A packet of who began, as it comes.
    pub(crate) fn tuple(&self) -> Tuple {
        self.key.tuple(self.is_from_low)
    }

    /// True if it has been silent for its time.
    pub fn is_expired(&self, now_ns: u64, timeouts: &Timeouts) -> bool {
        now_ns.saturating_sub(self.used_ns) >= self.timeout_ns(timeouts)
    }

    /// True if it is over for a packet of one side: silent for its time, closed and the packet `begins` a new one, or retired.
    pub(crate) fn is_over(&self, now_ns: u64, timeouts: &Timeouts, begins: bool, side: usize) -> bool {
        let is_closed = matches!(self.state, State::TimeWait | State::Closed | State::Shutdown);
        self.is_expired(now_ns, timeouts) || (begins && is_closed) || (self.is_retired && side == 0)
    }

    /// How long it is remembered in silence. What only one side speaks of is not open, whatever that side says.
    pub fn timeout_ns(&self, timeouts: &Timeouts) -> u64 {
        match self.state {
            State::Established | State::Associated if !self.is_replied => timeouts.opening_ns,
            state => timeouts.of(state, self.key.protocol),
        }
    }
}

impl Shard {
    #[inline]
    pub(crate) fn find(&self, hash: u64, key: &Key) -> Option<u32> {
        let half = half(hash);
        let found = self.index.find(whole(half), |&(at, other)| other == half && self.get(at).key == *key);
        found.map(|&(at, _)| at)
    }

    #[inline]
    pub(crate) fn get(&self, at: u32) -> &Entry {
        &self.chunks[at as usize / CHUNK][at as usize % CHUNK]
    }

    #[inline]
    pub(crate) fn get_mut(&mut self, at: u32) -> &mut Entry {
        &mut self.chunks[at as usize / CHUNK][at as usize % CHUNK]
    }

    /// What the packets of who began leave as, if not as they come.
    pub(crate) fn translation(&self, at: u32) -> Option<&Translation> {
        if !self.get(at).is_translated {
            return None;
        }
        self.translations[at as usize / CHUNK].as_ref().map(|chunk| &chunk[at as usize % CHUNK])
    }

    /// What the packets of one side leave as, if not as they come.
    pub(crate) fn leaves_as(&self, at: u32, side: usize) -> Option<Translation> {
        let to = self.translation(at)?;
        Some(if side == 0 { *to } else { self.get(at).tuple().reverse().ends() })
    }

    /// What an answer looks like when it comes, if the connection is translated.
    pub(super) fn answer(&self, at: u32) -> Option<Tuple> {
        self.translation(at).map(|to| self.get(at).tuple().translated(to).reverse())
    }

    /// A translated connection whose key has this half of a hash, and whose answers have this key.
    pub(super) fn find_answered_by(&self, hash: u64, answers: &Key) -> Option<u32> {
        let half = half(hash);
        let is_it = |&(at, other): &(u32, u32)| {
            other == half && self.answer(at).is_some_and(|answer| answer.key(self.get(at).key.network).0 == *answers)
        };
        self.index.find(whole(half), is_it).map(|&(at, _)| at)
    }

    /// True if there is a translated connection of this hash whose answers' key has that half of one.
    pub(super) fn is_answered_by(&self, hash: u64, answers: u32, seed: u64) -> bool {
        let own = half(hash);
        let is_it = |&(at, other): &(u32, u32)| {
            let network = self.get(at).key.network;
            other == own && self.answer(at).is_some_and(|answer| half(answer.key(network).0.hash(seed)) == answers)
        };
        self.index.find(whole(own), is_it).is_some()
    }

    /// Puts a connection in whose key is not there; it is in the list of those without an answer.
    pub(crate) fn insert(&mut self, hash: u64, mut entry: Entry, translation: Option<Translation>) {
        entry.is_translated = translation.is_some();
        if self.free == END {
            self.grow(entry);
        }
        let at = self.free;
        self.free = self.get(at).links[0];
        *self.get_mut(at) = entry;
        if !entry.is_replied {
            self.list(at);
        }
        if let Some(translation) = translation {
            let chunk = self.translations[at as usize / CHUNK].get_or_insert_with(|| Box::new([translation; CHUNK]));
            chunk[at as usize % CHUNK] = translation;
        }
        let half = half(hash);
        self.index.insert_unique(whole(half), (at, half), |&(_, half)| whole(half));
    }

    pub(crate) fn remove(&mut self, at: u32, seed: u64) {
        self.unlist(at);
        let half = half(self.get(at).key.hash(seed));
        if let Ok(found) = self.index.find_entry(whole(half), |&(other, _)| other == at) {
            found.remove();
        }
        let free = self.free;
        let entry = self.get_mut(at);
        entry.is_used = false;
        entry.links[0] = free;
        self.free = at;
    }

    /// It has been answered: it makes room for nobody any more.
    pub(crate) fn unlist(&mut self, at: u32) {
        let entry = self.get_mut(at);
        if !entry.is_listed {
            return;
        }
        entry.is_listed = false;
        let [before, after] = std::mem::replace(&mut entry.links, [END; 2]);
        match before {
            END => self.oldest = after,
            before => self.get_mut(before).links[1] = after,
        }
        match after {
            END => self.newest = before,
            after => self.get_mut(after).links[0] = before,
        }
    }

    fn list(&mut self, at: u32) {
        let newest = self.newest;
        let entry = self.get_mut(at);
        entry.is_listed = true;
        entry.links = [newest, END];
        match newest {
            END => self.oldest = at,
            newest => self.get_mut(newest).links[1] = at,
        }
        self.newest = at;
    }

    pub(crate) fn oldest_unanswered(&self) -> Option<u32> {
        (self.oldest != END).then_some(self.oldest)
    }

    pub(crate) fn expired(&self, now_ns: u64, timeouts: &Timeouts) -> Vec<u32> {
        self.iter().filter(|(_, entry)| entry.is_expired(now_ns, timeouts)).map(|(at, _)| at).collect()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &Entry)> {
        let all = self.chunks.iter().flat_map(|chunk| chunk.iter());
        all.enumerate().filter(|(_, entry)| entry.is_used).map(|(at, entry)| (at as u32, entry))
    }

    /// Memory taken, bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.chunks.len() * size_of::<[Entry; CHUNK]>()
            + self.chunks.capacity() * size_of::<usize>()
            + self.index.allocation_size()
            + self.translations.capacity() * size_of::<usize>()
            + self.translations.iter().flatten().count() * size_of::<[Translation; CHUNK]>()
            + self.aliases.bytes()
    }

    fn grow(&mut self, like: Entry) {
        let first = (self.chunks.len() * CHUNK) as u32;
        let empty = Entry { is_used: false, is_listed: false, is_translated: false, ..like };
        let mut chunk = Box::new([empty; CHUNK]);
        for (at, entry) in (first..).zip(chunk.iter_mut()) {
            let is_last = at + 1 == first + CHUNK as u32;
            entry.links = [if is_last { END } else { at + 1 }, END];
        }
        self.chunks.push(chunk);
        self.translations.push(None);
        self.free = first;
    }
}

/// The half of a hash that the index keeps; the other half has chosen the shard.
pub(super) fn half(hash: u64) -> u32 {
    hash as u32
}

/// A hash of the index: it takes the lowest bits for the slot and the highest for the tag.
pub(super) fn whole(half: u32) -> u64 {
    u64::from(half) << 32 | u64::from(half)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use vswitch_net::NetworkIndex;

    use super::super::key::Tuple;
    use super::*;

    fn entry(number: u64, now_ns: u64) -> Entry {
        let tuple = Tuple {
            source: [number, 0],
            destination: [u64::MAX, 0],
            ports: (1, 2),
            protocol: 17,
            is_v6: false,
            is_echo: None,
        };
        Entry::new(tuple.key(NetworkIndex(0)).0, true, [PortId(1), ELSEWHERE], State::New, now_ns)
    }

    #[test]
    fn an_entry_is_small() {
        assert!(size_of::<Entry>() <= 112, "{}", size_of::<Entry>());
    }

    /// Against a map and a queue: inserts, answers, removals and evictions in a long random order.
    #[test]
    fn agrees_with_a_map() {
        const SEED: u64 = 7;
        let mut shard = Shard::default();
        let mut map = BTreeMap::new();
        let mut waiting = Vec::new();
        let mut state = 1_u64;
        for turn in 0..20_000_u64 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let number = (state >> 40) % 500;
            let one = entry(number, turn);
            let hash = one.key.hash(SEED);
            let found = shard.find(hash, &one.key);
            assert_eq!(found.is_some(), map.contains_key(&number));
            match ((state >> 33) % 4, found) {
                (0 | 1, None) => {
                    shard.insert(hash, one, None);
                    map.insert(number, turn);
                    waiting.push(number);
                }
                (0, Some(at)) => {
                    shard.unlist(at);
                    waiting.retain(|other| *other != number);
                }
                (2, Some(at)) => {
                    shard.remove(at, SEED);
                    map.remove(&number);
                    waiting.retain(|other| *other != number);
                }
                (3, _) => {
                    let oldest = shard.oldest_unanswered();
                    assert_eq!(oldest.map(|at| shard.get(at).key), waiting.first().map(|&first| entry(first, 0).key));
                    if let Some(at) = oldest {
                        shard.remove(at, SEED);
                        map.remove(&waiting.remove(0));
                    }
                }
                _ => {}
            }
            assert_eq!(shard.iter().count(), map.len());
        }
    }
}
