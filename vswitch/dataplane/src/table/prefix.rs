//! Prefixes that policies name: the longest that holds an address gives its zone.
//!
//! # What
//!
//! One hash table a family over (length, prefix). A lookup is a binary search over the lengths in use (Waldvogel, Varghese,
//! Turner and Plattner, "Scalable High Speed IP Routing Lookups", SIGCOMM 1997): a hit at a length says that the answer is
//! at least as long, a miss that it is shorter. For that, each prefix leaves marks at the lengths on the way to its own, and
//! each mark knows the longest prefix that holds it.
//!
//! # Why this way
//!
//! Policies name prefixes of many lengths, so trying each length ([`super::route`]) costs too much. This table is made anew
//! when a prefix comes or goes, which is rare, and is never changed.
//!
//! # Cost
//!
//! At most five probes for IPv4 and seven for IPv6, whatever the number of prefixes.

use std::hash::{BuildHasher, Hash};
use std::net::IpAddr;

use foldhash::fast::RandomState;
use hashbrown::HashTable;

/// Prefixes of both families.
#[derive(Clone, Debug, Default)]
pub struct Prefixes {
    v4: Tree<u32>,
    v6: Tree<u128>,
}

#[derive(Clone, Debug)]
struct Tree<B> {
    /// In use, ascending.
    lengths: Vec<u8>,
    table: HashTable<Mark<B>>,
    hasher: RandomState,
}

/// A prefix, or a mark on the way to a longer one.
#[derive(Clone, Copy, Debug)]
struct Mark<B> {
    bits: B,
    length: u8,
    /// The zone of the longest prefix that holds it.
    zone: u32,
}

trait Bits: Copy + Eq + Hash {
    fn masked(self, length: u8) -> Self;
}

impl Bits for u32 {
    #[inline]
    fn masked(self, length: u8) -> u32 {
        if length == 0 { 0 } else { self & (u32::MAX << (32 - length)) }
    }
}

impl Bits for u128 {
    #[inline]
    fn masked(self, length: u8) -> u128 {
        if length == 0 { 0 } else { self & (u128::MAX << (128 - length)) }
    }
}

impl Prefixes {
    /// A table of prefixes, each once, with their zones. What none of them holds is of zone 0.
    pub fn new(prefixes: impl IntoIterator<Item = (IpAddr, u8, u32)>) -> Prefixes {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for (address, length, zone) in prefixes {
            match address {
                IpAddr::V4(address) => v4.push((address.to_bits(), length, zone)),
                IpAddr::V6(address) => v6.push((address.to_bits(), length, zone)),
            }
        }
        Prefixes { v4: Tree::new(v4), v6: Tree::new(v6) }
    }

    /// The zone of an address.
    #[inline]
    pub fn lookup(&self, address: IpAddr) -> u32 {
        match address {
            IpAddr::V4(v4) => self.v4.lookup(v4.to_bits()),
            IpAddr::V6(v6) => self.v6.lookup(v6.to_bits()),
        }
    }
}

impl<B: Bits> Tree<B> {
    fn new(mut prefixes: Vec<(B, u8, u32)>) -> Tree<B> {
        // Shorter ones first: when one is put in, all that hold it are there.
        prefixes.sort_by_key(|(_, length, _)| *length);
        let mut lengths: Vec<u8> = prefixes.iter().map(|(_, length, _)| *length).collect();
        lengths.dedup();
        let mut tree =
            Tree { lengths, table: HashTable::with_capacity(prefixes.len()), hasher: RandomState::default() };
        // First the prefixes themselves, so that marks find the longest one that holds them.
        for (bits, length, zone) in &prefixes {
            tree.put(Mark { bits: bits.masked(*length), length: *length, zone: *zone });
        }
        for (bits, length, _) in &prefixes {
            let (mut low, mut high) = (0, tree.lengths.len());
            while low < high {
                let middle = usize::midpoint(low, high);
                let on_the_way = tree.lengths[middle];
                if on_the_way >= *length {
                    high = middle;
                    if on_the_way == *length {
                        break;
                    }
                    continue;
                }
                let bits = bits.masked(on_the_way);
                if tree.get(bits, on_the_way).is_none() {
                    let zone = tree.longest_before(bits, middle);
                    tree.put(Mark { bits, length: on_the_way, zone });
                }
                low = middle + 1;
            }
        }
        tree
    }

    #[inline]
    fn lookup(&self, address: B) -> u32 {
        let (mut low, mut high) = (0, self.lengths.len());
        let mut zone = 0;
        while low < high {
            let middle = usize::midpoint(low, high);
            let length = self.lengths[middle];
            match self.get(address.masked(length), length) {
                Some(mark) => {
                    zone = mark.zone;
                    low = middle + 1;
                }
                None => high = middle,
            }
        }
        zone
    }

    /// The zone of the longest prefix shorter than the length at `at`. Marks of that range may be met: they know theirs.
    fn longest_before(&self, bits: B, at: usize) -> u32 {
        let shorter = self.lengths[..at].iter().rev();
        let found = shorter.copied().find_map(|length| self.get(bits.masked(length), length));
        found.map_or(0, |mark| mark.zone)
    }

    #[inline]
    fn get(&self, bits: B, length: u8) -> Option<&Mark<B>> {
        let hash = self.hasher.hash_one((bits, length));
        self.table.find(hash, |mark| mark.length == length && mark.bits == bits)
    }

    fn put(&mut self, mark: Mark<B>) {
        let hash = self.hasher.hash_one((mark.bits, mark.length));
        self.table.insert_unique(hash, mark, |mark| self.hasher.hash_one((mark.bits, mark.length)));
    }
}

impl<B> Default for Tree<B> {
    fn default() -> Self {
        Tree { lengths: Vec::new(), table: HashTable::new(), hasher: RandomState::default() }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    /// Against trying every prefix.
    #[test]
    fn agrees_with_trying_them_all() {
        let mut seed = 0x5eed_u64;
        let mut random = move || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) as u32
        };
        for round in 0..200 {
            let mut prefixes = BTreeMap::new();
            for zone in 0..1 + random() % 60 {
                let length =
                    if round % 2 == 0 { (random() % 33) as u8 } else { [8, 16, 24, 32][random() as usize % 4] };
                // Few bits that differ, so that prefixes hold each other.
                let bits = (random() & 0x0301_0103).masked(length);
                prefixes.insert((bits, length), zone + 1);
            }
            let v4 = prefixes.iter().map(|((bits, length), zone)| (Ipv4Addr::from_bits(*bits).into(), *length, *zone));
            let wide = |bits: u32| u128::from(bits) << 96;
            let v6 =
                prefixes.iter().map(|((bits, length), zone)| (Ipv6Addr::from_bits(wide(*bits)).into(), *length, *zone));
            let table = Prefixes::new(v4.chain(v6));
            for _ in 0..200 {
                let address = random() & 0x0301_0103;
                let holds = |(bits, length): &(u32, u8)| address.masked(*length) == *bits;
                let best = prefixes.iter().filter(|(key, _)| holds(key)).max_by_key(|((_, length), _)| *length);
                let expected = best.map_or(0, |(_, zone)| *zone);
                assert_eq!(table.lookup(Ipv4Addr::from_bits(address).into()), expected);
                assert_eq!(table.lookup(Ipv6Addr::from_bits(wide(address)).into()), expected);
            }
        }
    }
}
