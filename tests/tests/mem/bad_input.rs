//! Bytes from people who mean no good: counted by reason, never a panic, never a frame lost.

use proptest::prelude::*;
use vswitch_control::UPLINK_PORT;
use vswitch_dataplane::DropReason;
use vswitch_dataplane::vxlan::OuterHeader;
use vswitch_net::{GATEWAY_MAC, Vni, checksum};
use vswitch_tests::frames::{self, Ends};
use vswitch_tests::twin::{WIRE_MACS, Wire};

use super::routed::two_pods;
use super::{mac, vxlan};

fn inner() -> Vec<u8> {
    frames::udp(Ends { from: GATEWAY_MAC, to: GATEWAY_MAC }, "10.2.0.1", "10.1.0.1", b"hello")
}

/// A VXLAN packet to the first node, as its peer would send it.
pub(super) fn outer(source: &str, destination: &str, port: u16, vni: u32, inner: &[u8]) -> Vec<u8> {
    let macs = (WIRE_MACS[1], WIRE_MACS[0]);
    let header = OuterHeader::new(macs, source.parse().unwrap(), destination.parse().unwrap(), port, None).unwrap();
    let mut packet = vec![0; header.len()];
    header.emit(&mut packet, Vni::try_from(vni).unwrap(), 0, inner.len(), 0, || checksum::sum(inner));
    packet.extend_from_slice(inner);
    packet
}

#[test]
fn what_the_wire_brings_is_counted_by_reason() {
    let (mut twin, _) = vxlan::routed(["192.0.2.1", "192.0.2.2"], Wire::default(), 1);
    let switch = &mut twin.switches[0];
    let good = outer("192.0.2.2", "192.0.2.1", 4789, 66, &inner());
    let nested =
        frames::udp_with(Ends { from: mac(20), to: GATEWAY_MAC }, "10.2.0.1", "10.1.0.1", (5, 4789), 64, &good);
    let mut fragment = good.clone();
    fragment[20] = 0x20;
    fragment[24..26].fill(0);
    let sum = checksum::finish(checksum::sum(&fragment[14..34]));
    fragment[24..26].copy_from_slice(&sum.to_be_bytes());
    let mut no_vni = good.clone();
    no_vni[42] = 0;
    let mut long_udp = good.clone();
    long_udp[38..40].copy_from_slice(&[0xff, 0xff]);
    let cases = [
        (good.clone(), None),
        (outer("192.0.2.2", "192.0.2.1", 4789, 67, &inner()), Some(DropReason::UnknownVni)),
        (outer("192.0.2.9", "192.0.2.1", 4789, 66, &inner()), Some(DropReason::UnknownPeer)),
        (outer("192.0.2.2", "192.0.2.7", 4789, 66, &inner()), Some(DropReason::NotVxlan)),
        (outer("192.0.2.2", "192.0.2.1", 4790, 66, &inner()), Some(DropReason::NotVxlan)),
        (outer("192.0.2.2", "192.0.2.1", 4789, 66, &nested), Some(DropReason::NestedVxlan)),
        (outer("192.0.2.2", "192.0.2.1", 4789, 66, &inner()[..20]), Some(DropReason::Truncated)),
        (outer("192.0.2.2", "192.0.2.1", 4789, 66, &[]), Some(DropReason::Truncated)),
        (fragment, Some(DropReason::NotVxlan)),
        (no_vni, Some(DropReason::BadVxlan)),
        (long_udp, Some(DropReason::BadLength)),
        (good[..40].to_vec(), Some(DropReason::Truncated)),
        (good[..good.len() - 1].to_vec(), Some(DropReason::BadLength)),
        (vec![], Some(DropReason::Truncated)),
        (vec![0; 65_000], Some(DropReason::NotVxlan)),
    ];
    for (at, (packet, reason)) in cases.into_iter().enumerate() {
        assert_eq!(switch.drop_of(UPLINK_PORT, &packet), reason, "case {at}");
    }
}

#[test]
fn what_a_pod_sends_is_counted_by_reason() {
    let (mut switch, one, _) = two_pods();
    let ends = Ends { from: mac(1), to: GATEWAY_MAC };
    let v4 = frames::udp(ends, "10.1.0.1", "10.1.0.2", b"hello");
    let v6 = frames::udp(ends, "fd01::1", "fd01::2", b"hello");
    let with = |frame: &[u8], at: usize, bytes: &[u8]| {
        let mut frame = frame.to_vec();
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        if frame[12] == 8 && frame[13] == 0 && at != 24 {
            frame[24..26].fill(0);
            let header = usize::from(frame[14] & 15).max(5) * 4;
            let sum = checksum::finish(checksum::sum(&frame[14..14 + header.min(frame.len() - 14)]));
            frame[24..26].copy_from_slice(&sum.to_be_bytes());
        }
        frame
    };
    let mut chain = frames::udp(ends, "fd01::1", "fd01::2", &[0; 200]);
    chain[20] = 60;
    for at in 0..20 {
        chain[54 + at * 8] = 60;
        chain[55 + at * 8] = 0;
    }
    let loops = frames::udp_with(ends, "10.1.0.1", "10.1.0.2", (1, 4789), 64, &v4);
    let cases = [
        (v4[..13].to_vec(), DropReason::Truncated),
        (v4[..20].to_vec(), DropReason::Truncated),
        (with(&v4, 14, &[0x55]), DropReason::Malformed),
        (with(&v4, 14, &[0x44]), DropReason::Malformed),
        (with(&v4, 24, &[1, 2]), DropReason::BadIpChecksum),
        (with(&v4, 16, &[0xff, 0xff]), DropReason::BadLength),
        (with(&v4, 16, &[0, 10]), DropReason::BadLength),
        (with(&v4, 16, &[0, 24]), DropReason::Truncated),
        (with(&v4, 38, &[0, 7]), DropReason::BadLength),
        (with(&v4, 38, &[0x20, 0]), DropReason::BadLength),
        (with(&v4, 23, &[6]), DropReason::Truncated),
        (with(&v6, 14, &[0x45]), DropReason::Malformed),
        (with(&v6, 18, &[0xff, 0xff]), DropReason::BadLength),
        (with(&v6, 20, &[60]), DropReason::BadLength),
        (chain, DropReason::TooManyHeaders),
        (loops, DropReason::NestedVxlan),
        (with(&v4, 12, &[0x08, 0x06]), DropReason::Malformed),
        (with(&v4, 12, &[0x88, 0xa8]), DropReason::Tagged),
        (with(&v4, 12, &[0x12, 0x34]), DropReason::NotIp),
    ];
    for (at, (frame, reason)) in cases.into_iter().enumerate() {
        assert_eq!(switch.drop_of(one.id, &frame), Some(reason), "case {at}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    /// Anything at all, on a pod's port and on the uplink: `settle` checks books and frames.
    #[test]
    fn any_bytes_are_survived(packets in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 1..20)) {
        let (mut twin, pods) = vxlan::routed(["192.0.2.1", "192.0.2.2"], Wire::default(), 1);
        for packet in &packets {
            twin.switches[0].send(UPLINK_PORT, packet);
            twin.switches[0].send(pods[0][0].id, packet);
        }
        twin.switches[0].settle();
    }

    /// A good packet with a few bytes changed gets deeper than noise does.
    #[test]
    fn damaged_packets_are_survived(
        changes in prop::collection::vec((0_usize..100, any::<u8>()), 1..6),
        cut in 0_usize..120,
        repair: bool,
    ) {
        let (mut twin, pods) = vxlan::routed(["192.0.2.1", "192.0.2.2"], Wire::default(), 1);
        let tunnelled = outer("192.0.2.2", "192.0.2.1", 4789, 66, &inner());
        let ends = Ends { from: mac(10), to: GATEWAY_MAC };
        let plain = [
            frames::udp(ends, "10.1.0.1", "10.1.0.2", b"hello"),
            frames::udp(ends, "fd01::1", "fd02::1", b"hello"),
            frames::arp_request(mac(10), "10.1.0.1", "169.254.1.1"),
            frames::neighbor_solicitation(mac(10), "fd01::1", "fe80::1"),
        ];
        for (port, packet) in plain.iter().map(|packet| (pods[0][0].id, packet)).chain([(UPLINK_PORT, &tunnelled)]) {
            let mut packet = packet.clone();
            for &(at, value) in &changes {
                if let Some(byte) = packet.get_mut(at) {
                    *byte = value;
                }
            }
            if repair && packet.len() >= 34 {
                packet[24..26].fill(0);
                let sum = checksum::finish(checksum::sum(&packet[14..34]));
                packet[24..26].copy_from_slice(&sum.to_be_bytes());
            }
            packet.truncate(packet.len().saturating_sub(cut / 4));
            twin.switches[0].send(port, &packet);
        }
        twin.switches[0].settle();
    }
}
