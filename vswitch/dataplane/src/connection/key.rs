//! What a connection is found by.

use std::net::IpAddr;

use vswitch_net::NetworkIndex;

use crate::meta::{Kind, Meta, address};
use crate::parse::{ICMP, ICMPV6, SCTP, TCP, UDP, byte_at, u16_at, u32_at, v6_at};
use crate::translate::Translation;
use crate::verdict::DropReason;

/// Both ends of a connection, the lower one first, so that both directions have one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Key {
    low: [u64; 2],
    high: [u64; 2],
    low_port: u16,
    high_port: u16,
    /// Networks do not know each other's connections.
    pub network: NetworkIndex,
    /// Layer 4 protocol number.
    pub protocol: u8,
    flags: u8,
}

const IS_V6: u8 = 1;
/// Who began is part of an echo's key: two hosts may ping each other with one identifier.
const LOW_ASKS: u8 = 2;

/// One direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tuple {
    pub(crate) source: [u64; 2],
    pub(crate) destination: [u64; 2],
    pub(crate) ports: (u16, u16),
    pub(crate) protocol: u8,
    pub(crate) is_v6: bool,
    /// For an echo: whether the source asks.
    pub(crate) is_echo: Option<bool>,
}

impl Tuple {
    /// Of a packet. None for what has no connections: other protocols than IP, and ICMP that asks for no answer.
    pub(crate) fn of(meta: &Meta) -> Option<Tuple> {
        let is_v6 = match meta.kind {
            Kind::V4 => false,
            Kind::V6 => true,
            Kind::Arp | Kind::Other => return None,
        };
        let [_, _, _, _, s0, s1, d0, d1] = meta.key.0;
        let ports = meta.key.fields().ports;
        let is_icmp = meta.protocol == ICMP || meta.protocol == ICMPV6;
        let is_echo = if is_icmp { Some(asks(meta.protocol, (ports.source >> 8) as u8)?) } else { None };
        Some(Tuple {
            source: [s0, s1],
            destination: [d0, d1],
            ports: match is_echo {
                Some(_) => (ports.destination, ports.destination),
                None => (ports.source, ports.destination),
            },
            protocol: meta.protocol,
            is_v6,
            is_echo,
        })
    }

    /// The key, and whether the source is its low end.
    pub(crate) fn key(&self, network: NetworkIndex) -> (Key, bool) {
        let is_low = (self.source, self.ports.0) <= (self.destination, self.ports.1);
        let ends = [(self.source, self.ports.0), (self.destination, self.ports.1)];
        let [low, high] = if is_low { ends } else { [ends[1], ends[0]] };
        let flags = (u8::from(self.is_v6) * IS_V6) | (u8::from(self.is_echo == Some(is_low)) * LOW_ASKS);
        let key = Key {
            low: low.0,
            high: high.0,
            low_port: low.1,
            high_port: high.1,
            network,
            protocol: self.protocol,
            flags,
        };
        (key, is_low)
    }

    /// What its answers look like.
    pub(crate) fn reverse(&self) -> Tuple {
        Tuple {
            source: self.destination,
            destination: self.source,
            ports: (self.ports.1, self.ports.0),
            is_echo: self.is_echo.map(|asks| !asks),
            ..*self
        }
    }

    /// What it looks like when it leaves so.
    pub(crate) fn translated(&self, to: &Translation) -> Tuple {
        Tuple { source: to.source, destination: to.destination, ports: to.ports, ..*self }
    }

    /// Where it leads, and whence.
    pub(crate) fn ends(&self) -> Translation {
        Translation { source: self.source, destination: self.destination, ports: self.ports }
    }
}

impl Key {
    /// A packet of the low end, or of the high one.
    pub(crate) fn tuple(&self, is_low: bool) -> Tuple {
        let is_icmp = self.protocol == ICMP || self.protocol == ICMPV6;
        let from_low = Tuple {
            source: self.low,
            destination: self.high,
            ports: (self.low_port, self.high_port),
            protocol: self.protocol,
            is_v6: self.flags & IS_V6 != 0,
            is_echo: is_icmp.then_some(self.flags & LOW_ASKS != 0),
        };
        if is_low { from_low } else { from_low.reverse() }
    }

    /// Seeded, so that nobody outside can aim at a shard.
    #[inline]
    pub(crate) fn hash(&self, seed: u64) -> u64 {
        let fold = |a: u64, b: u64| {
            let product = u128::from(a).wrapping_mul(u128::from(b));
            (product >> 64) as u64 ^ product as u64
        };
        let facts = u64::from(self.low_port) << 48
            | u64::from(self.high_port) << 32
            | u64::from(self.network.0) << 16
            | u64::from(self.protocol) << 8
            | u64::from(self.flags);
        let one = fold(self.low[0] ^ seed, self.low[1] ^ 0x9e37_79b9_7f4a_7c15 ^ seed.rotate_left(17));
        let two = fold(
            self.high[0] ^ seed.rotate_left(31) ^ 0xbf58_476d_1ce4_e5b9,
            self.high[1] ^ 0x94d0_49bb_1331_11eb ^ seed.rotate_left(43),
        );
        fold(one ^ facts ^ 0x2545_f491_4f6c_dd1d, two ^ seed.rotate_left(7) ^ facts.rotate_left(29))
    }

    /// Address and port of the low end, then of the high one.
    pub fn ends(&self) -> [(IpAddr, u16); 2] {
        [(self.address(self.low), self.low_port), (self.address(self.high), self.high_port)]
    }

    fn address(&self, words: [u64; 2]) -> IpAddr {
        address(words, self.flags & IS_V6 != 0)
    }
}

/// Whether an ICMP message asks; none for one that belongs to no question.
fn asks(protocol: u8, kind: u8) -> Option<bool> {
    match (protocol, kind) {
        (ICMP, 8) | (ICMPV6, 128) => Some(true),
        (ICMP, 0) | (ICMPV6, 129) => Some(false),
        _ => None,
    }
}

/// A packet that an ICMP error quotes (RFC 1812 section 4.3.2.3, RFC 4443 section 2.4).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Quote {
    /// As it went.
    pub(crate) tuple: Tuple,
    /// Where its layer 3 and layer 4 begin, counted from the start of the frame that quotes it.
    pub(crate) l3: usize,
    pub(crate) l4: usize,
    /// Where the quote ends.
    pub(crate) end: usize,
}

/// The packet that an ICMP error quotes.
///
/// # Errors
///
/// [`DropReason::UnrelatedError`] if it quotes too little, or a later fragment.
pub(crate) fn quoted(meta: &Meta, head: &[u8]) -> Result<Quote, DropReason> {
    quote(meta, head).map_err(|_| DropReason::UnrelatedError)
}

fn quote(meta: &Meta, head: &[u8]) -> Result<Quote, DropReason> {
    let l3 = usize::from(meta.l4) + 8;
    let end = (usize::from(meta.l3) + meta.l3_len as usize).min(head.len());
    let ip = head.get(l3..end).ok_or(DropReason::Truncated)?;
    let is_v6 = meta.kind == Kind::V6;
    let (protocol, l4, source, destination) = if is_v6 {
        let words = |at: usize| v6_at(ip, at).map(|v6| [(v6.to_bits() >> 64) as u64, v6.to_bits() as u64]);
        let (mut protocol, mut l4) = (byte_at(ip, 6)?, 40);
        // What a stack sends has at most these before layer 4.
        while matches!(protocol, 0 | 43 | 44 | 60) {
            if protocol == 44 && u16_at(ip, l4 + 2)? & 0xfff8 != 0 {
                return Err(DropReason::Truncated);
            }
            let size = if protocol == 44 { 8 } else { 8 + 8 * usize::from(byte_at(ip, l4 + 1)?) };
            protocol = byte_at(ip, l4)?;
            l4 += size;
        }
        (protocol, l4, words(8)?, words(24)?)
    } else {
        if u16_at(ip, 6)? & 0x1fff != 0 {
            return Err(DropReason::Truncated);
        }
        let words = |at: usize| u32_at(ip, at).map(|v4| [u64::from(v4), 0]);
        let header = usize::from(byte_at(ip, 0)? & 0xf) * 4;
        if header < 20 {
            return Err(DropReason::Malformed);
        }
        (byte_at(ip, 9)?, header, words(12)?, words(16)?)
    };
    let (ports, is_echo) = match protocol {
        TCP | UDP | SCTP => ((u16_at(ip, l4)?, u16_at(ip, l4 + 2)?), None),
        ICMP | ICMPV6 => {
            let is_asking = asks(protocol, byte_at(ip, l4)?).ok_or(DropReason::Malformed)?;
            let id = u16_at(ip, l4 + 4)?;
            ((id, id), Some(is_asking))
        }
        _ => ((0, 0), None),
    };
    let tuple = Tuple { source, destination, ports, protocol, is_v6, is_echo };
    Ok(Quote { tuple, l3, l4: l3 + l4, end })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuple(source: u64, destination: u64, ports: (u16, u16), is_echo: Option<bool>) -> Tuple {
        Tuple { source: [source, 0], destination: [destination, 0], ports, protocol: 6, is_v6: false, is_echo }
    }

    #[test]
    fn both_directions_have_one_key() {
        let (there, is_low) = tuple(1, 2, (1000, 80), None).key(NetworkIndex(3));
        let (back, is_back_low) = tuple(2, 1, (80, 1000), None).key(NetworkIndex(3));
        assert_eq!((there, is_low, is_back_low), (back, true, false));
        assert_ne!(there, tuple(1, 2, (1000, 80), None).key(NetworkIndex(4)).0);
        assert_eq!(there.hash(1), back.hash(1));
        assert_ne!(there.hash(1), there.hash(2));
    }

    #[test]
    fn two_that_ping_each_other_have_two_keys() {
        let ask = tuple(1, 2, (9, 9), Some(true)).key(NetworkIndex(0)).0;
        let answer = tuple(2, 1, (9, 9), Some(false)).key(NetworkIndex(0)).0;
        let ask_back = tuple(2, 1, (9, 9), Some(true)).key(NetworkIndex(0)).0;
        assert_eq!(ask, answer);
        assert_ne!(ask, ask_back);
    }
}
