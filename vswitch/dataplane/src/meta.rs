//! What parsing found out about a packet: offsets, key, checksum state.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use vswitch_net::{MacAddr, NetworkIndex, PeerIndex, PortId};

use crate::parse::{ICMP, ICMPV6};
use crate::translate::Translation;

/// One packet's facts. Offsets count from the packet's current start.
#[derive(Clone, Copy, Debug)]
pub struct Meta {
    /// Flow key.
    pub key: FlowKey,
    /// Hash of the key.
    pub hash: u64,
    /// Port that received it.
    pub ingress: PortId,
    /// The network it belongs to.
    pub network: NetworkIndex,
    /// The peer that sent it, if it came from the wire.
    pub peer: Option<PeerIndex>,
    /// Ethernet destination.
    pub destination: MacAddr,
    /// Ethernet source.
    pub source: MacAddr,
    /// Layer 3 protocol.
    pub kind: Kind,
    /// Offset of the layer 3 header.
    pub l3: u16,
    /// Offset of the layer 4 header; meaningless for [`Kind::Arp`] and [`Kind::Other`].
    pub l4: u16,
    /// Bytes from the start of the layer 3 header to the end of the IP packet.
    pub l3_len: u32,
    /// Layer 4 protocol number.
    pub protocol: u8,
    /// Time to live or hop limit.
    pub ttl: u8,
    /// What the header says of fragmentation; none for a whole packet.
    pub fragment: Option<Fragment>,
    /// A TCP segment that opens a connection: SYN is set.
    pub is_syn: bool,
    /// What opens or closes a TCP or SCTP connection. Its key is no flow's.
    pub is_control: bool,
    /// True if the ports are known: the packet has them, or the first fragment of its datagram had.
    pub has_ports: bool,
    /// TCP sequence number; 0 if there is none.
    pub seq: u32,
    /// State of the layer 4 checksum.
    pub checksum: Checksum,
    /// True if it may go back to where it came from, for it leaves with another source.
    pub may_return: bool,
}

/// Which part of a datagram a packet is (RFC 791 section 3.1, RFC 8200 section 4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Identification.
    pub id: u32,
    /// Where it belongs, bytes.
    pub offset: u16,
    /// Bytes of it, without headers.
    pub bytes: u32,
    /// False for the last one.
    pub has_more: bool,
}

/// Layer 3 protocol of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
    /// ARP.
    Arp,
    /// Anything else.
    Other,
}

/// State of a packet's layer 4 checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// In the packet, right or wrong, or there is none.
    Complete,
    /// The field, this many bytes into the layer 4 header, holds the folded pseudo-header sum: the sender left the rest
    /// to the device (kernel document `networking/checksum-offloads`).
    ///
    /// No metadata tells this for a received packet; the field's value does. A complete checksum that happens to look
    /// like this is completed to the same value again if it was right.
    Partial {
        /// Offset of the field in the layer 4 header.
        offset: u16,
    },
}

/// Exact-match key of a flow: eight words.
///
/// | word | holds |
/// |---|---|
/// | 0 | ingress port, peer, network, kind and protocol |
/// | 1 | destination MAC, marks: fragment, control |
/// | 2 | source MAC |
/// | 3 | layer 4 ports, or the ICMP type, code and echo id |
/// | 4, 5 | source address |
/// | 6, 7 | destination address |
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct FlowKey(pub [u64; 8]);

/// The layer 4 half of a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct L4Key {
    /// Source port, or ICMP type and code.
    pub source: u16,
    /// Destination port, or ICMP echo id.
    pub destination: u16,
}

impl L4Key {
    fn word(self) -> u64 {
        u64::from(self.source) << 16 | u64::from(self.destination)
    }
}

/// A key in the words of an operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowFields {
    /// Port that received the packets.
    pub ingress: PortId,
    /// Peer that sent them, if they came from the wire.
    pub peer: Option<PeerIndex>,
    /// Network.
    pub network: NetworkIndex,
    /// Ethernet destination.
    pub destination_mac: MacAddr,
    /// Ethernet source.
    pub source_mac: MacAddr,
    /// Addresses, source first, for IP.
    pub addresses: Option<(IpAddr, IpAddr)>,
    /// Layer 4 protocol number.
    pub protocol: u8,
    /// Layer 4 ports.
    pub ports: L4Key,
}

const NO_PEER: u16 = u16::MAX;

/// The mark of a key that no flow has.
const CONTROL: u64 = 1 << 49;

impl FlowKey {
    /// Builds a key. `addresses` are the words 4 to 7.
    #[inline(always)]
    pub(crate) fn new(
        origin: u64,
        kind: Kind,
        protocol: u8,
        is_fragment: bool,
        (destination, source): (u64, u64),
        ports: L4Key,
        addresses: [u64; 4],
    ) -> FlowKey {
        FlowKey([
            origin | (kind as u64) << 8 | u64::from(protocol),
            destination | u64::from(is_fragment) << 48,
            source,
            ports.word(),
            addresses[0],
            addresses[1],
            addresses[2],
            addresses[3],
        ])
    }

    /// Where a packet comes from, as the key has it.
    #[inline]
    pub(crate) fn origin(ingress: PortId, peer: Option<PeerIndex>, network: NetworkIndex) -> u64 {
        let peer = peer.map_or(NO_PEER, |peer| peer.0);
        u64::from(ingress.0) << 48 | u64::from(peer) << 32 | u64::from(network.0) << 16
    }

    /// Equality without a call, for the hit path.
    #[inline(always)]
    pub(crate) fn is_same(&self, other: &FlowKey) -> bool {
        self.0.iter().zip(&other.0).fold(0, |different, (one, two)| different | (one ^ two)) == 0
    }

    /// Mixes the eight words into one, seeded so that nobody outside can aim at a bucket.
    #[inline(always)]
    pub fn hash(&self, seed: u64) -> u64 {
        let [a, b, c, d, e, f, g, h] = self.0;
        let other = seed.rotate_left(29) ^ 0x9e37_79b9_7f4a_7c15;
        let one = fold(a ^ seed, b ^ other);
        let two = fold(c ^ seed, d ^ other);
        let three = fold(e ^ seed, f ^ other);
        let four = fold(g ^ seed, h ^ other);
        // Each in a place of its own: what is alike in two of them must not cancel out.
        fold(one ^ three.rotate_left(41) ^ other, two ^ four.rotate_left(23) ^ seed)
    }

    /// The key of a segment that opens or closes a connection of this flow.
    pub(crate) fn with_control(mut self) -> FlowKey {
        self.0[1] |= CONTROL;
        self
    }

    /// The key of the flow that such a segment belongs to.
    pub(crate) fn without_control(mut self) -> FlowKey {
        self.0[1] &= !CONTROL;
        self
    }

    /// The key taken apart.
    pub fn fields(&self) -> FlowFields {
        let [facts, destination, source, ports, s0, s1, d0, d1] = self.0;
        let peer = (facts >> 32) as u16;
        let both = |is_v6: bool| Some((address([s0, s1], is_v6), address([d0, d1], is_v6)));
        FlowFields {
            ingress: PortId((facts >> 48) as u16),
            peer: (peer != NO_PEER).then_some(PeerIndex(peer)),
            network: NetworkIndex((facts >> 16) as u16),
            destination_mac: mac(destination),
            source_mac: mac(source),
            addresses: match (facts >> 8) as u8 {
                kind if kind == Kind::V4 as u8 => both(false),
                kind if kind == Kind::V6 as u8 => both(true),
                _ => None,
            },
            protocol: facts as u8,
            ports: L4Key { source: (ports >> 16) as u16, destination: ports as u16 },
        }
    }
}

impl Default for Meta {
    /// Of no packet: what [`parse`](crate::parse::parse) writes over.
    fn default() -> Meta {
        Meta {
            key: FlowKey::default(),
            hash: 0,
            ingress: PortId(u16::MAX),
            network: NetworkIndex(u16::MAX),
            peer: None,
            destination: MacAddr::default(),
            source: MacAddr::default(),
            kind: Kind::Other,
            l3: 0,
            l4: 0,
            l3_len: 0,
            protocol: 0,
            ttl: 0,
            fragment: None,
            is_syn: false,
            is_control: false,
            has_ports: false,
            seq: 0,
            checksum: Checksum::Complete,
            may_return: false,
        }
    }
}

impl Meta {
    /// Gives a later fragment the ports of its datagram's first, and with them its flow.
    pub(crate) fn lend_ports(&mut self, ports: L4Key, seed: u64) {
        self.key.0[3] = ports.word();
        self.has_ports = true;
        self.hash = self.key.without_control().hash(seed);
    }

    /// The packet with the destination that it goes to. Its source stays, which is what it is judged by.
    pub(crate) fn turned(&self, to: &Translation) -> Meta {
        let mut key = self.key;
        [key.0[6], key.0[7]] = to.destination;
        if self.protocol != ICMP && self.protocol != ICMPV6 {
            key.0[3] = L4Key { source: key.fields().ports.source, destination: to.ports.1 }.word();
        }
        let may_return = to.source != [key.0[4], key.0[5]];
        Meta { key, may_return, ..*self }
    }

    /// True if the layer 4 header is in this packet.
    pub fn has_l4(&self) -> bool {
        self.fragment.is_none_or(|fragment| fragment.offset == 0)
    }

    /// Source and destination address, for IP.
    pub fn addresses(&self) -> Option<(IpAddr, IpAddr)> {
        self.key.fields().addresses
    }

    /// The same as words, source first.
    pub(crate) fn address_words(&self) -> ([u64; 2], [u64; 2]) {
        let [.., s0, s1, d0, d1] = self.key.0;
        ([s0, s1], [d0, d1])
    }
}

/// The words of an address, as a key has them.
pub(crate) fn words(address: IpAddr) -> [u64; 2] {
    match address {
        IpAddr::V4(v4) => [u64::from(v4.to_bits()), 0],
        IpAddr::V6(v6) => [(v6.to_bits() >> 64) as u64, v6.to_bits() as u64],
    }
}

/// The address of words.
pub(crate) fn address(words: [u64; 2], is_v6: bool) -> IpAddr {
    if is_v6 {
        Ipv6Addr::from_bits(u128::from(words[0]) << 64 | u128::from(words[1])).into()
    } else {
        Ipv4Addr::from_bits(words[0] as u32).into()
    }
}

/// High and low half of the 128-bit product: every input bit reaches every output bit.
#[inline(always)]
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a).wrapping_mul(u128::from(b));
    (product >> 64) as u64 ^ product as u64
}

fn mac(word: u64) -> MacAddr {
    let [_, _, a, b, c, d, e, f] = word.to_be_bytes();
    MacAddr([a, b, c, d, e, f])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_gives_back_its_fields() {
        let (to, from) = (MacAddr([1, 2, 3, 4, 5, 6]), MacAddr([0xff, 0xfe, 0, 0, 0, 1]));
        let ports = L4Key { source: 0xffff, destination: 80 };
        let key = FlowKey::new(
            FlowKey::origin(PortId(7), Some(PeerIndex(9)), NetworkIndex(3)),
            Kind::V4,
            6,
            true,
            (to.to_u64(), from.to_u64()),
            ports,
            [0x0a00_0001, 0, 0x0a00_0002, 0],
        );
        let fields = key.fields();
        assert_eq!((fields.ingress, fields.peer, fields.network), (PortId(7), Some(PeerIndex(9)), NetworkIndex(3)));
        assert_eq!((fields.destination_mac, fields.source_mac, fields.ports), (to, from, ports));
        let (source, destination) = fields.addresses.unwrap();
        assert_eq!((source.to_string(), destination.to_string()), ("10.0.0.1".into(), "10.0.0.2".into()));
    }

    #[test]
    fn near_keys_spread() {
        let hashes: std::collections::HashSet<u64> =
            (0..4096_u64).map(|i| FlowKey([1, 2, 3, i, 5, 6, 7, 8]).hash(42) & 0xfff).collect();
        // 4,096 balls in 4,096 bins leave about 63 % of the bins used.
        assert!((2400..2800).contains(&hashes.len()), "{}", hashes.len());
        assert_ne!(FlowKey([0; 8]).hash(1), FlowKey([0; 8]).hash(2));
    }

    /// Whatever flows differ in, they spread over the buckets of a table as evenly as by chance.
    #[test]
    fn flows_that_are_alike_spread() {
        const FLOWS: u64 = 1 << 16;
        const BUCKETS: usize = 1 << 12;
        let key = |word: usize, at: u64| {
            let mut key =
                FlowKey([0x0009_ffff_0002_0006, 0x0276_7377_0001, 0x0200_0000_0009, 0, 0x0a01_0001, 0, 0x0a02_0001, 0]);
            key.0[word] ^= at;
            key
        };
        let by_word = (0..8).map(|word| (0..FLOWS).map(|at| key(word, at)).collect());
        // Many sources and many targets; ports of both ends; and what would cancel out if two words went in alike.
        let by_two = [(4, 6), (3, 4), (0, 4), (1, 5), (2, 6), (4, 5)].map(|(one, other)| {
            let low = |at: u64| (at & 0xff, at >> 8);
            (0..FLOWS)
                .map(|at| {
                    let mut key = key(one, low(at).0);
                    key.0[other] ^= low(at).1;
                    key
                })
                .collect()
        });
        for flows in by_word.chain(by_two) {
            let flows: Vec<FlowKey> = flows;
            for shift in [0, 20, 52] {
                let mut filled = vec![0; BUCKETS];
                for flow in &flows {
                    filled[(flow.hash(0x5eed_0123_4567_89ab) >> shift) as usize % BUCKETS] += 1;
                }
                // 16 on average, with a standard deviation of 4.
                assert!(filled.iter().all(|&count| count < 48), "{:?}, {shift}", flows[1]);
                assert!(filled.iter().filter(|&&count| count == 0).count() < 8, "{:?}, {shift}", flows[1]);
            }
        }
    }
}
