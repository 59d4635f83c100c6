//! Routes: the longest matching prefix decides (RFC 1812 section 5.2.4.3).
//!
//! # What
//!
//! One hash table a family over (network, length, prefix) and, a network and family, the set of lengths in use. A lookup
//! tries the lengths from the longest down. Overlay routing tables have few lengths (/32, /24, /16, /0), and only flow
//! misses look here, so this beats a trie in memory and in the cost of a change: one shard is copied.
//!
//! # Cost
//!
//! One probe a length in use, at most 33 for IPv4 and 129 for IPv6. An IPv4 route takes 18 bytes, so that a hundred
//! thousand of them still lie near the core.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use vswitch_net::{MacAddr, NetworkIndex, PeerIndex, PortId};

use super::sharded::Sharded;

/// Where a route leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextHop {
    /// To a pod here.
    Port {
        /// Its port.
        port: PortId,
        /// The pod's MAC.
        mac: MacAddr,
    },
    /// To another node.
    Peer(PeerIndex),
    /// To the gateway itself.
    Gateway,
    /// To nobody: the prefix is ours to give out, and nobody has the address.
    Nowhere,
}

/// An IPv4 prefix, all bits beyond the length zero, in eight bytes that need no alignment of eight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct V4 {
    network: NetworkIndex,
    length: u16,
    bits: [u16; 2],
}

/// An IPv6 prefix, all bits beyond the length zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct V6 {
    bits: [u64; 2],
    length: u16,
    network: NetworkIndex,
}

/// Routes of all networks.
#[derive(Clone, Debug, Default)]
pub struct Routes {
    v4: Sharded<V4, NextHop>,
    v6: Sharded<V6, NextHop>,
    /// Lengths in use, a network and family (true: IPv6).
    lengths: HashMap<(NetworkIndex, bool), Lengths, foldhash::fast::RandomState>,
}

/// How many routes each length has.
#[derive(Clone, Debug)]
struct Lengths {
    counts: Vec<u32>,
    /// Lengths in use, longest first.
    used: Vec<u8>,
}

impl Default for Lengths {
    fn default() -> Self {
        Lengths { counts: vec![0; 129], used: Vec::new() }
    }
}

impl Routes {
    /// The next hop of the longest prefix that holds `address`.
    pub fn lookup(&self, network: NetworkIndex, address: IpAddr) -> Option<NextHop> {
        let used = &self.lengths.get(&(network, address.is_ipv6()))?.used;
        let found = match address {
            IpAddr::V4(v4) => used.iter().find_map(|&length| self.v4.get(&V4::new(network, v4, length))),
            IpAddr::V6(v6) => used.iter().find_map(|&length| self.v6.get(&V6::new(network, v6, length))),
        };
        found.copied()
    }

    /// The next hop of exactly this prefix.
    pub fn get(&self, network: NetworkIndex, address: IpAddr, length: u8) -> Option<NextHop> {
        match address {
            IpAddr::V4(v4) => self.v4.get(&V4::new(network, v4, length)).copied(),
            IpAddr::V6(v6) => self.v6.get(&V6::new(network, v6, length)).copied(),
        }
    }

    /// Adds a route, or changes its next hop; the one before.
    pub fn insert(&mut self, network: NetworkIndex, address: IpAddr, length: u8, next_hop: NextHop) -> Option<NextHop> {
        let before = match address {
            IpAddr::V4(v4) => self.v4.insert(V4::new(network, v4, length), next_hop),
            IpAddr::V6(v6) => self.v6.insert(V6::new(network, v6, length), next_hop),
        };
        if before.is_none() {
            self.lengths.entry((network, address.is_ipv6())).or_default().add(length);
        }
        before
    }

    /// Takes a route away; what it was.
    pub fn remove(&mut self, network: NetworkIndex, address: IpAddr, length: u8) -> Option<NextHop> {
        let before = match address {
            IpAddr::V4(v4) => self.v4.remove(&V4::new(network, v4, length)),
            IpAddr::V6(v6) => self.v6.remove(&V6::new(network, v6, length)),
        };
        if before.is_some()
            && let Some(lengths) = self.lengths.get_mut(&(network, address.is_ipv6()))
        {
            lengths.remove(length);
        }
        before
    }

    /// Number of routes.
    pub fn len(&self) -> usize {
        self.v4.len() + self.v6.len()
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Lengths {
    fn add(&mut self, length: u8) {
        let count = &mut self.counts[usize::from(length)];
        *count += 1;
        if *count == 1 {
            let at = self.used.partition_point(|&other| other > length);
            self.used.insert(at, length);
        }
    }

    fn remove(&mut self, length: u8) {
        let count = &mut self.counts[usize::from(length)];
        *count -= 1;
        if *count == 0 {
            self.used.retain(|&other| other != length);
        }
    }
}

impl V4 {
    #[inline(always)]
    fn new(network: NetworkIndex, address: Ipv4Addr, length: u8) -> V4 {
        let mask = u32::MAX.checked_shl(32 - u32::from(length.min(32))).unwrap_or(0);
        let bits = address.to_bits() & mask;
        V4 { network, length: length.into(), bits: [(bits >> 16) as u16, bits as u16] }
    }
}

impl Hash for V4 {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let [high, low] = self.bits.map(u64::from);
        state.write_u64(u64::from(self.network.0) << 48 | u64::from(self.length) << 32 | high << 16 | low);
    }
}

impl V6 {
    #[inline(always)]
    fn new(network: NetworkIndex, address: Ipv6Addr, length: u8) -> V6 {
        let mask = u128::MAX.checked_shl(128 - u32::from(length.min(128))).unwrap_or(0);
        let bits = address.to_bits() & mask;
        V6 { bits: [(bits >> 64) as u64, bits as u64], length: length.into(), network }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NET: NetworkIndex = NetworkIndex(0);

    fn v4(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn the_longest_prefix_wins_and_families_do_not_mix() {
        let mut routes = Routes::default();
        routes.insert(NET, v4("0.0.0.0"), 0, NextHop::Peer(PeerIndex(0)));
        routes.insert(NET, v4("10.0.0.0"), 8, NextHop::Peer(PeerIndex(1)));
        routes.insert(NET, v4("10.1.2.3"), 32, NextHop::Peer(PeerIndex(2)));
        routes.insert(NET, "a00::".parse().unwrap(), 8, NextHop::Peer(PeerIndex(3)));
        for (address, peer) in [("10.1.2.3", 2), ("10.1.2.4", 1), ("11.0.0.1", 0)] {
            assert_eq!(routes.lookup(NET, v4(address)), Some(NextHop::Peer(PeerIndex(peer))));
        }
        assert_eq!(routes.lookup(NET, "b00::1".parse().unwrap()), None);
        assert_eq!(routes.lookup(NetworkIndex(1), v4("10.1.2.3")), None);
        routes.remove(NET, v4("10.1.2.3"), 32);
        assert_eq!(routes.lookup(NET, v4("10.1.2.3")), Some(NextHop::Peer(PeerIndex(1))));
    }

    /// Against a plain list, with a seeded stream of inserts, removes and lookups.
    #[test]
    fn agrees_with_a_list_that_is_searched_whole() {
        let mut random = 0x1234_5678_u64;
        let mut next = move || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        let mut routes = Routes::default();
        let mut list: Vec<(IpAddr, u8, NextHop)> = Vec::new();
        for step in 0..20_000_u32 {
            // Few bits vary, so that prefixes nest and collide.
            let (address, width) = if next() % 2 == 0 {
                (IpAddr::V4(Ipv4Addr::from_bits((next() as u32) & 0xc0c0_00c3)), 32)
            } else {
                (IpAddr::V6(Ipv6Addr::from_bits(u128::from(next() & 0xc3) << 120 | u128::from(next() & 3))), 128)
            };
            let length = (next() % (width + 1)) as u8;
            let (bits, is_v6) = align(address);
            let same = |entry: &(IpAddr, u8, NextHop)| {
                let (other, v6) = align(entry.0);
                entry.1 == length && v6 == is_v6 && mask(other, length) == mask(bits, length)
            };
            match next() % 4 {
                0 | 1 => {
                    let hop = NextHop::Peer(PeerIndex(step as u16));
                    let before = list.iter().position(same).map(|at| list.swap_remove(at).2);
                    list.push((address, length, hop));
                    assert_eq!(routes.insert(NET, address, length, hop), before);
                }
                2 => {
                    let before = list.iter().position(same).map(|at| list.swap_remove(at).2);
                    assert_eq!(routes.remove(NET, address, length), before);
                }
                _ => {
                    let best = list
                        .iter()
                        .filter(|(prefix, length, _)| {
                            let (other, v6) = align(*prefix);
                            v6 == is_v6 && mask(other, *length) == mask(bits, *length)
                        })
                        .max_by_key(|(_, length, _)| *length)
                        .map(|(_, _, hop)| *hop);
                    assert_eq!(routes.lookup(NET, address), best);
                }
            }
            assert_eq!(routes.len(), list.len());
        }
    }
    /// The oracle's own idea of a prefix.
    fn align(address: IpAddr) -> (u128, bool) {
        match address {
            IpAddr::V4(v4) => (u128::from(v4.to_bits()) << 96, false),
            IpAddr::V6(v6) => (v6.to_bits(), true),
        }
    }

    fn mask(bits: u128, length: u8) -> u128 {
        if length == 0 { 0 } else { bits & (u128::MAX << (128 - u32::from(length.min(128)))) }
    }
}
