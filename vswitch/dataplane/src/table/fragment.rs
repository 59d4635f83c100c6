//! Fragments: which connection the later ones of a datagram belong to (virtual reassembly).
//!
//! # What
//!
//! Only a datagram's first fragment has ports. This table remembers them, by sender, source, destination, protocol and
//! identification, and lends them to the fragments that follow, so that they meet the flow entry of the first. Nothing
//! is held back and nothing is put together; the receiver does that.
//!
//! It also keeps, for every datagram, which eight-byte units it has seen. A fragment that covers one of them again is
//! dropped, and the rest of the datagram with it: overlapping fragments serve to pass one datagram for another
//! (RFC 1858 section 4, RFC 3128), and IPv6 forbids them (RFC 5722 section 4).
//!
//! # Cost
//!
//! About 1 KiB a datagram under way, 1 MiB a worker, made once. A full bucket gives up its oldest datagram; the fragments
//! of that one then go by addresses alone.
//!
//! # References
//!
//! RFC 791 section 3.2, RFC 8200 section 4.5.

use crate::meta::{FlowKey, Fragment, Kind, L4Key, Meta};
use crate::verdict::DropReason;

/// A datagram whose fragments stay out this long is forgotten.
pub const LIFETIME_NS: u64 = 2_000_000_000;

const BUCKETS: usize = 256;
const WAYS: usize = 4;
/// Eight-byte units of the largest datagram, in words of 64.
const WORDS: usize = 65_536 / 8 / 64;

/// What the fragments of one datagram have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DatagramKey {
    /// Who sent it, as far as the switch can tell, in which network and, for IPv4, its protocol. Nobody has a say in the
    /// datagrams of another.
    pub origin: u64,
    /// Words 4 to 7 of the flow key.
    pub addresses: [u64; 4],
    /// Identification.
    pub id: u32,
}

/// The datagrams under way.
#[derive(Debug)]
pub struct Fragments {
    datagrams: Box<[Datagram]>,
}

#[derive(Clone, Debug)]
struct Datagram {
    key: DatagramKey,
    since_ns: u64,
    ports: Option<L4Key>,
    /// Units seen, and how many.
    seen: Box<[u64; WORDS]>,
    count: u32,
    /// Units of the whole datagram, once the last fragment was here.
    total: Option<u32>,
    is_overlapping: bool,
}

impl DatagramKey {
    /// The datagram that a fragment belongs to. IPv6 tells datagrams apart without the protocol, which later fragments
    /// need not repeat (RFC 8200 section 4.5).
    pub fn of(meta: &Meta, fragment: Fragment) -> DatagramKey {
        let protocol = if meta.kind == Kind::V4 { meta.protocol } else { 0 };
        let [.., s0, s1, d0, d1] = meta.key.0;
        let sender = match meta.peer {
            Some(peer) => 1 << 16 | u64::from(peer.0),
            None => u64::from(meta.ingress.0),
        };
        let origin = sender << 32 | u64::from(meta.network.0) << 16 | (meta.kind as u64) << 8 | u64::from(protocol);
        DatagramKey { origin, addresses: [s0, s1, d0, d1], id: fragment.id }
    }

    /// Spreads datagrams over the table.
    pub fn hash(&self, seed: u64) -> u64 {
        let [s0, s1, d0, d1] = self.addresses;
        FlowKey([self.origin, 0, 0, u64::from(self.id), s0, s1, d0, d1]).hash(seed)
    }
}

impl Fragments {
    /// An empty table, all of its memory taken.
    pub fn new() -> Fragments {
        let empty = Datagram {
            key: DatagramKey { origin: 0, addresses: [0; 4], id: 0 },
            since_ns: 0,
            ports: None,
            seen: Box::new([0; WORDS]),
            count: 0,
            total: Some(0),
            is_overlapping: false,
        };
        Fragments { datagrams: vec![empty; BUCKETS * WAYS].into_boxed_slice() }
    }

    /// Takes note of a fragment and gives the ports of its datagram, if they are known. `ports` are the first fragment's
    /// own.
    ///
    /// # Errors
    ///
    /// [`DropReason::FragmentOverlap`].
    pub fn follow(
        &mut self,
        now_ns: u64,
        key: DatagramKey,
        hash: u64,
        fragment: Fragment,
        ports: Option<L4Key>,
    ) -> Result<Option<L4Key>, DropReason> {
        let bucket = hash as usize % BUCKETS * WAYS;
        let ways = &mut self.datagrams[bucket..bucket + WAYS];
        let is_live =
            |datagram: &Datagram| !datagram.is_complete() && now_ns.saturating_sub(datagram.since_ns) < LIFETIME_NS;
        let known = ways.iter().position(|way| way.key == key && is_live(way));
        let oldest = || (0..WAYS).min_by_key(|&at| (is_live(&ways[at]), ways[at].since_ns)).unwrap_or(0);
        let at = known.unwrap_or_else(oldest);
        let datagram = &mut ways[at];
        if known.is_none() {
            datagram.restart(key, now_ns);
        }
        datagram.cover(fragment)?;
        datagram.ports = ports.or(datagram.ports);
        Ok(datagram.ports)
    }
}

impl Default for Fragments {
    fn default() -> Self {
        Fragments::new()
    }
}

impl Datagram {
    fn restart(&mut self, key: DatagramKey, now_ns: u64) {
        self.key = key;
        self.since_ns = now_ns;
        self.ports = None;
        self.seen.fill(0);
        self.count = 0;
        self.total = None;
        self.is_overlapping = false;
    }

    /// All its fragments were here.
    fn is_complete(&self) -> bool {
        self.total.is_some_and(|total| self.count >= total) && !self.is_overlapping
    }

    fn cover(&mut self, fragment: Fragment) -> Result<(), DropReason> {
        let first = usize::from(fragment.offset / 8);
        let units = (fragment.bytes as usize).div_ceil(8).max(1);
        let end = (first + units).min(WORDS * 64);
        let bit = |unit: usize| (unit / 64, 1_u64 << (unit % 64));
        let seen_before = (first..end).any(|unit| self.seen[bit(unit).0] & bit(unit).1 != 0);
        let is_beyond =
            self.total.is_some_and(|total| end as u32 > total) || (!fragment.has_more && (end as u32) < self.highest());
        if self.is_overlapping || seen_before || is_beyond {
            self.is_overlapping = true;
            return Err(DropReason::FragmentOverlap);
        }
        for unit in first..end {
            let (word, mask) = bit(unit);
            self.seen[word] |= mask;
        }
        self.count += (end - first) as u32;
        if !fragment.has_more {
            self.total = Some(end as u32);
        }
        Ok(())
    }

    /// One more than the last unit seen.
    fn highest(&self) -> u32 {
        let last = self.seen.iter().rposition(|&word| word != 0);
        last.map_or(0, |word| (word as u32 + 1) * 64 - self.seen[word].leading_zeros())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PORTS: L4Key = L4Key { source: 7, destination: 9 };

    fn key(id: u32) -> DatagramKey {
        DatagramKey { origin: 1, addresses: [1, 0, 2, 0], id }
    }

    fn part(offset: u16, bytes: u32, has_more: bool) -> Fragment {
        Fragment { id: 0, offset, bytes, has_more }
    }

    #[test]
    fn later_fragments_get_the_ports_of_the_first() {
        let mut table = Fragments::new();
        assert_eq!(table.follow(0, key(1), 5, part(1480, 1480, true), None), Ok(None), "too early");
        assert_eq!(table.follow(0, key(1), 5, part(0, 1480, true), Some(PORTS)), Ok(Some(PORTS)));
        assert_eq!(table.follow(0, key(2), 5, part(1480, 20, false), None), Ok(None), "of another datagram");
        assert_eq!(table.follow(0, key(1), 5, part(2960, 20, false), None), Ok(Some(PORTS)));
        // Complete: the identification may be used again at once.
        assert_eq!(table.follow(0, key(1), 5, part(0, 1480, true), Some(PORTS)), Ok(Some(PORTS)));
        assert_eq!(table.follow(LIFETIME_NS, key(1), 5, part(1480, 8, true), None), Ok(None), "forgotten");
    }

    #[test]
    fn overlap_ends_the_datagram() {
        for (offset, bytes, has_more) in [(0, 1480, true), (1472, 1480, true), (8, 8, true), (1480, 8, false)] {
            let mut table = Fragments::new();
            table.follow(0, key(1), 5, part(0, 1480, true), Some(PORTS)).unwrap();
            table.follow(0, key(1), 5, part(2960, 1480, true), None).unwrap();
            let overlap = Err(DropReason::FragmentOverlap);
            assert_eq!(table.follow(0, key(1), 5, part(offset, bytes, has_more), None), overlap, "{offset}");
            assert_eq!(table.follow(0, key(1), 5, part(4440, 8, false), None), overlap, "the rest goes with it");
        }
    }

    #[test]
    fn what_comes_after_the_end_is_an_overlap() {
        let mut table = Fragments::new();
        table.follow(0, key(1), 5, part(1480, 20, false), None).unwrap();
        assert_eq!(table.follow(0, key(1), 5, part(2960, 8, true), None), Err(DropReason::FragmentOverlap));
    }

    #[test]
    fn a_flood_is_bounded_and_the_latest_win() {
        let mut table = Fragments::new();
        for id in 0..100_000 {
            table.follow(u64::from(id), key(id), u64::from(id), part(0, 8, true), Some(PORTS)).unwrap();
        }
        assert_eq!(table.datagrams.len(), BUCKETS * WAYS);
        assert_eq!(table.follow(100_000, key(99_999), 99_999, part(8, 8, true), None), Ok(Some(PORTS)));
    }

    /// Against sets of bytes: never an overlap passed, never a gap refused.
    #[test]
    fn agrees_with_a_set_of_bytes() {
        let mut random = 0x2545_f491_u64;
        let mut next = move |below: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % below
        };
        for round in 0..500 {
            let mut table = Fragments::new();
            let mut seen = std::collections::BTreeSet::new();
            let mut is_bad = false;
            for _ in 0..12 {
                let (offset, units) = (next(40) as u16 * 8, 1 + next(5) as u32);
                let bytes: Vec<u32> = (0..units).map(|unit| u32::from(offset) / 8 + unit).collect();
                is_bad |= bytes.iter().any(|unit| seen.contains(unit));
                let result = table.follow(0, key(1), 5, part(offset, units * 8, true), None);
                assert_eq!(result.is_err(), is_bad, "round {round}");
                seen.extend(bytes);
            }
        }
    }
}
