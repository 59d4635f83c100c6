//! The short way through the parser, which nearly all packets take.
//!
//! It accepts only what [`parse_any`](super::parse_any) accepts, and reads it alike: a test holds the two against each other. What it
//! refuses is not wrong, but read the long way, which says what is wrong if something is.

use vswitch_net::{MacAddr, checksum};
use vswitch_xsk::Packet;

use super::{ETHERNET, Origin, TCP, UDP};
use crate::connection::tcp;
use crate::meta::{Checksum, FlowKey, Kind, L4Key, Meta};
use crate::snapshot::Snapshot;

/// Bytes of the headers of a plain packet of UDP, and of TCP.
const PLAIN_UDP: usize = ETHERNET + 20 + 8;
const PLAIN_TCP: usize = ETHERNET + 20 + 20;

/// Reads a packet whose every field has a place known beforehand: whole, IPv4 without options, UDP or TCP that neither opens nor
/// closes anything. False for all others, with nothing written.
#[inline]
pub(super) fn parse_plain(packet: &Packet, origin: &Origin, snapshot: &Snapshot, seed: u64, meta: &mut Meta) -> bool {
    let (head, length) = (packet.head().data(), packet.len());
    let Some(bytes) = head.first_chunk::<PLAIN_UDP>() else { return false };
    let two = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    let four = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let mac = |at: usize| (u64::from(four(at)) << 32 | u64::from(four(at + 4))) >> 16;
    let Some(ip) = bytes[ETHERNET..].first_chunk() else { return false };
    let (total, protocol) = (usize::from(two(16)), bytes[23]);
    // The ethertype; version and header length; then what is set in fragments.
    if four(12) >> 8 != 0x08_0045 || two(20) & 0x3fff != 0 || checksum::fold_header(ip) != 0xffff {
        return false;
    }
    if ETHERNET + total > length {
        return false;
    }
    let (source, destination, ports) = (four(26), four(30), four(34));
    let (field, offset, seq);
    if protocol == UDP {
        let udp_length = usize::from(two(38));
        if udp_length < 8 || 20 + udp_length > total || ports as u16 == snapshot.underlay.udp_port {
            return false;
        }
        (field, offset, seq) = (two(40), 6, 0);
    } else {
        let Some(bytes) = head.first_chunk::<PLAIN_TCP>() else { return false };
        let header = usize::from(bytes[46] >> 4) * 4;
        if protocol != TCP || header < 20 || 20 + header > total || bytes[47] & tcp::CONTROL != 0 {
            return false;
        }
        (field, offset, seq) = (u16::from_be_bytes([bytes[50], bytes[51]]), 16, four(38));
    }
    let halves = |word: u32| (word >> 16) + (word & 0xffff);
    let pseudo = halves(source) + halves(destination) + u32::from(protocol) + (total - 20) as u32;
    let checksum = if field == checksum::fold(pseudo) { Checksum::Partial { offset } } else { Checksum::Complete };
    let Origin { ingress, network, peer, word } = *origin;
    let key = FlowKey::new(
        word,
        Kind::V4,
        protocol,
        false,
        (mac(0), mac(6)),
        L4Key { source: (ports >> 16) as u16, destination: ports as u16 },
        [u64::from(source), 0, u64::from(destination), 0],
    );
    *meta = Meta {
        key,
        hash: 0,
        ingress,
        network,
        peer,
        destination: MacAddr([bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5]]),
        source: MacAddr([bytes[6], bytes[7], bytes[8], bytes[9], bytes[10], bytes[11]]),
        kind: Kind::V4,
        l3: ETHERNET as u16,
        l4: ETHERNET as u16 + 20,
        l3_len: total as u32,
        protocol,
        ttl: bytes[22],
        fragment: None,
        is_syn: false,
        is_control: false,
        has_ports: true,
        seq,
        checksum,
        may_return: false,
    };
    // After all else was written, whose values would have to be kept meanwhile.
    meta.hash = key.hash(seed);
    true
}

#[cfg(test)]
mod tests {
    use vswitch_net::{NetworkIndex, PeerIndex, PortId};
    use vswitch_xsk::Umem;

    use super::super::parse_any;
    use super::*;

    const SEED: u64 = 0x5eed_0123_4567_89ab;

    /// A packet of TCP or UDP with a right IP checksum.
    fn packet(protocol: u8, length: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..length).map(|at| (at * 37 + 11) as u8).collect();
        bytes[12..24].copy_from_slice(&[8, 0, 0x45, 0, 0, 0, 0, 7, 0x40, 0, 64, protocol]);
        bytes[16..18].copy_from_slice(&((length - ETHERNET) as u16).to_be_bytes());
        bytes[38..40].copy_from_slice(&((length - 34) as u16).to_be_bytes());
        if let Some(tcp) = bytes.get_mut(46..48) {
            tcp.copy_from_slice(&[0x50, 0x10]);
        }
        complete(&mut bytes);
        bytes
    }

    fn complete(bytes: &mut [u8]) {
        bytes[24..26].fill(0);
        let sum = checksum::finish(checksum::sum(&bytes[14..34]));
        bytes[24..26].copy_from_slice(&sum.to_be_bytes());
    }

    /// What is read the short way is what the long way would have read.
    #[test]
    fn plain_packets_are_read_alike() {
        let mut umem = Umem::new(4).unwrap();
        let mut snapshot = Snapshot::default();
        snapshot.underlay.udp_port = 4789;
        let mut state = 1_u64;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below
        };
        let mut plain = 0;
        for turn in 0..60_000 {
            let mut bytes = packet([TCP, UDP][turn % 2], 42 + random(60));
            for _ in 0..random(3) {
                let at = random(bytes.len().min(60));
                bytes[at] = [0, 1, 6, 8, 17, 0x45, 0xff, random(256) as u8][random(8)];
            }
            match random(8) {
                0 => bytes[36..38].copy_from_slice(&4789_u16.to_be_bytes()),
                // The partial checksum, or nearly.
                1 => {
                    let room = u32::from(u16::from_be_bytes([bytes[16], bytes[17]])).saturating_sub(20);
                    let pseudo = checksum::sum(&bytes[26..34]) + u32::from(bytes[23]) + room;
                    let field = if bytes[23] == TCP { 50 } else { 40 };
                    let sum = checksum::fold(pseudo).wrapping_add(random(2) as u16);
                    bytes.iter_mut().skip(field).zip(sum.to_be_bytes()).for_each(|(byte, new)| *byte = new);
                }
                _ => {}
            }
            if random(8) > 0 {
                complete(&mut bytes);
            }
            let packet = umem.packet_from(&bytes).unwrap();
            let peer = (random(2) == 0).then_some(PeerIndex(3));
            let origin = || Origin::new(PortId(5), NetworkIndex(2), peer);
            let (mut short, mut long) = (Meta::default(), Meta::default());
            if parse_plain(&packet, &origin(), &snapshot, SEED, &mut short) {
                plain += 1;
                assert_eq!(parse_any(&packet, origin(), &snapshot, SEED, &mut long), Ok(()), "{bytes:?}");
                assert_eq!(format!("{short:?}"), format!("{long:?}"), "{bytes:?}");
            }
            umem.free_packet(packet);
        }
        assert!((20_000..55_000).contains(&plain), "{plain}");
    }
}
