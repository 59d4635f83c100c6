//! The switch as a router: ICMP errors, echo, fragments. Read back with etherparse and smoltcp; `tests/netns/icmp.rs` has
//! scapy compare every byte.

use etherparse::{IcmpEchoHeader, PacketBuilder};
use smoltcp::wire::{Icmpv4Packet, Icmpv6Packet, Ipv4Packet, Ipv6Packet};
use vswitch_control::UPLINK_PORT;
use vswitch_dataplane::DropReason;
use vswitch_net::{GATEWAY_MAC, PortId};
use vswitch_tests::frames::{self, Ends};
use vswitch_tests::mem::Switch;
use vswitch_tests::twin::Wire;

use super::routed::two_pods;
use super::{mac, vxlan};

fn ends(number: u8) -> Ends {
    Ends { from: mac(number), to: GATEWAY_MAC }
}

/// An ICMP error: family, source, type, code, second word, quote.
#[derive(Debug, PartialEq, Eq)]
struct Told {
    from: String,
    to: String,
    kind: u8,
    code: u8,
    word: u32,
    quote: Vec<u8>,
}

/// Reads an error; its checksums must be right.
fn told(frame: &[u8]) -> Told {
    let word = |bytes: &[u8]| u32::from_be_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
    if frame[12..14] == [8, 0] {
        let ip = Ipv4Packet::new_checked(&frame[14..]).unwrap();
        assert!(ip.verify_checksum());
        assert_eq!(ip.dscp(), 48, "RFC 1812 section 4.3.2.5");
        let icmp = Icmpv4Packet::new_checked(ip.payload()).unwrap();
        assert!(icmp.verify_checksum());
        Told {
            from: ip.src_addr().to_string(),
            to: ip.dst_addr().to_string(),
            kind: icmp.msg_type().into(),
            code: icmp.msg_code(),
            word: word(ip.payload()),
            quote: ip.payload()[8..].to_vec(),
        }
    } else {
        let ip = Ipv6Packet::new_checked(&frame[14..]).unwrap();
        let icmp = Icmpv6Packet::new_checked(ip.payload()).unwrap();
        assert!(icmp.verify_checksum(&ip.src_addr(), &ip.dst_addr()));
        Told {
            from: ip.src_addr().to_string(),
            to: ip.dst_addr().to_string(),
            kind: icmp.msg_type().into(),
            code: icmp.msg_code(),
            word: word(ip.payload()),
            quote: ip.payload()[8..].to_vec(),
        }
    }
}

/// What comes back for a packet.
fn answer(switch: &mut Switch, port: PortId, frame: &[u8]) -> Vec<Vec<u8>> {
    switch.send(port, frame);
    switch.settle();
    switch.take(port)
}

fn dont_fragment(mut frame: Vec<u8>, is_set: bool) -> Vec<u8> {
    frame[20] = if is_set { 0x40 } else { 0 };
    frame[24..26].fill(0);
    let sum = vswitch_net::checksum::finish(vswitch_net::checksum::sum(&frame[14..34]));
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame
}

#[test]
fn each_reason_has_its_error() {
    let (mut switch, one, _) = two_pods();
    let udp = |to: &str, ttl: u8| {
        let from = if to.contains(':') { "fd01::1" } else { "10.1.0.1" };
        frames::udp_with(ends(1), from, to, (1000, 2000), ttl, &[7; 900])
    };
    let cases = [
        (udp("10.1.0.2", 1), (11, 0)),
        (udp("10.1.0.77", 9), (3, 1)),
        (udp("8.8.8.8", 9), (3, 0)),
        (udp("169.254.1.1", 9), (3, 3)),
        (udp("10.1.0.254", 9), (3, 3)),
        (udp("fd01::2", 1), (3, 0)),
        (udp("fd01::77", 9), (1, 3)),
        (udp("2001:db8::1", 9), (1, 0)),
        (udp("fd01::fe", 9), (1, 4)),
    ];
    for (frame, (kind, code)) in cases {
        let out = answer(&mut switch, one.id, &frame);
        assert_eq!(out.len(), 1, "{kind}/{code}");
        let told = told(&out[0]);
        let is_v6 = told.from.contains(':');
        assert_eq!((told.kind, told.code, told.word), (kind, code, 0));
        assert_eq!(told.from, if is_v6 { "fd01::fe" } else { "10.1.0.254" });
        assert_eq!(told.to, if is_v6 { "fd01::1" } else { "10.1.0.1" });
        let (limit, header) = if is_v6 { (1280, 48) } else { (576, 28) };
        assert_eq!(told.quote, frame[14..14 + (frame.len() - 14).min(limit - header)]);
        assert_eq!((&out[0][..6], &out[0][6..12]), (&mac(1).0[..], &GATEWAY_MAC.0[..]));
    }
    // A partial checksum is quoted complete.
    let frame = udp("10.1.0.77", 9);
    assert_eq!(told(&answer(&mut switch, one.id, &frames::partial(frame.clone()))[0]).quote, frame[14..][..548]);
}

#[test]
fn errors_are_never_answered_and_neither_are_groups() {
    let (mut switch, one, _) = two_pods();
    let error = answer(&mut switch, one.id, &frames::udp(ends(1), "10.1.0.1", "10.1.0.77", b"x"));
    let mut error = error[0].clone();
    // The same error, sent by the pod to nobody.
    error[..6].copy_from_slice(&GATEWAY_MAC.0);
    error[6..12].copy_from_slice(&mac(1).0);
    error[26..34].copy_from_slice(&[10, 1, 0, 1, 10, 1, 0, 77]);
    // About a packet that its receiver may have sent.
    error[54..62].copy_from_slice(&[10, 1, 0, 77, 10, 1, 0, 1]);
    let error = dont_fragment(error, true);
    assert_eq!(switch.drop_of(one.id, &error), Some(DropReason::NoHost));
    assert_eq!(switch.take(one.id), Vec::<Vec<u8>>::new());
    let mut later = frames::udp(ends(1), "10.1.0.1", "10.1.0.77", &[0; 64]);
    later[21] = 9;
    let later = {
        later[20] = 0;
        later[24..26].fill(0);
        let sum = vswitch_net::checksum::finish(vswitch_net::checksum::sum(&later[14..34]));
        later[24..26].copy_from_slice(&sum.to_be_bytes());
        later
    };
    assert_eq!(switch.drop_of(one.id, &later), Some(DropReason::NoHost));
    assert_eq!(switch.take(one.id), Vec::<Vec<u8>>::new(), "a later fragment");
}

#[test]
fn a_forged_error_goes_nowhere() {
    let (mut twin, pods) = vxlan::routed(["192.0.2.1", "192.0.2.2"], Wire::default(), 1);
    let switch = &mut twin.switches[0];
    let (attacker, victim) = (pods[0][0].id, pods[0][1].id);
    // As the switch itself would tell it, about a packet of somebody: from 10.1.0.1, to 10.1.0.2.
    let error = |quoted_source: [u8; 4], quoted_destination: [u8; 4]| {
        let quote = {
            let mut quote = frames::udp(ends(11), "10.1.0.2", "10.2.0.1", b"secret")[14..].to_vec();
            quote[12..16].copy_from_slice(&quoted_source);
            quote[16..20].copy_from_slice(&quoted_destination);
            quote
        };
        let mut frame = Vec::new();
        let header = etherparse::Icmpv4Type::DestinationUnreachable(
            etherparse::icmpv4::DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: 68 },
        );
        PacketBuilder::ethernet2(mac(10).0, GATEWAY_MAC.0)
            .ipv4([10, 1, 0, 1], [10, 1, 0, 2], 9)
            .icmpv4(header)
            .write(&mut frame, &quote)
            .unwrap();
        frame
    };
    for _ in 0..2 {
        let sender = [10, 1, 0, 1];
        assert_eq!(switch.drop_of(attacker, &error([10, 1, 0, 99], sender)), Some(DropReason::ForgedError));
        assert_eq!(switch.drop_of(attacker, &error([10, 1, 0, 2], [10, 2, 0, 1])), Some(DropReason::ForgedError));
        assert_eq!(switch.drop_of(attacker, &error([10, 1, 0, 2], sender)), None, "about what the receiver sent to it");
    }
    assert_eq!(switch.take(victim).len(), 2);
    // And never in another's name.
    let mut named = error([10, 1, 0, 2], [10, 1, 0, 1]);
    named[26..30].copy_from_slice(&[10, 1, 0, 254]);
    let named = dont_fragment(named, false);
    assert_eq!(switch.drop_of(attacker, &named), Some(DropReason::SpoofedAddress));
}

#[test]
fn errors_are_limited_by_port() {
    let (mut switch, one, two) = two_pods();
    let lost = |from: u8| frames::udp(ends(from), &format!("10.1.0.{from}"), "10.1.0.77", b"x");
    for _ in 0..1000 {
        switch.send(one.id, &lost(1));
    }
    switch.settle();
    assert_eq!(switch.take(one.id).len(), 50);
    assert_eq!((switch.counters().errors_sent, switch.counters().errors_held), (50, 950));
    assert_eq!(answer(&mut switch, two.id, &lost(2)).len(), 1, "another port has its own");
    switch.pass(100_000_000);
    for _ in 0..1000 {
        switch.send(one.id, &lost(1));
    }
    switch.settle();
    assert_eq!(switch.take(one.id).len(), 10, "a tenth of a second's worth");
}

#[test]
fn the_gateway_answers_ping() {
    let (mut switch, one, _) = two_pods();
    let payload: Vec<u8> = (0..9000).map(|at| at as u8).collect();
    for (from, to) in
        [("10.1.0.1", "169.254.1.1"), ("10.1.0.1", "10.1.0.254"), ("fd01::1", "fd01::fe"), ("fd01::1", "fe80::1")]
    {
        let builder = PacketBuilder::ethernet2(mac(1).0, GATEWAY_MAC.0);
        let mut frame = Vec::new();
        match (from.parse().unwrap(), to.parse().unwrap()) {
            (std::net::IpAddr::V4(from), std::net::IpAddr::V4(to)) => builder
                .ipv4(from.octets(), to.octets(), 9)
                .icmpv4_echo_request(7, 8)
                .write(&mut frame, &payload)
                .unwrap(),
            (std::net::IpAddr::V6(from), std::net::IpAddr::V6(to)) => builder
                .ipv6(from.octets(), to.octets(), 9)
                .icmpv6_echo_request(7, 8)
                .write(&mut frame, &payload)
                .unwrap(),
            _ => unreachable!(),
        }
        let out = answer(&mut switch, one.id, &frame);
        assert_eq!(out.len(), 1, "{to}");
        let sliced = etherparse::SlicedPacket::from_ethernet(&out[0]).unwrap();
        let wanted = IcmpEchoHeader { id: 7, seq: 8 };
        match sliced.transport.unwrap() {
            etherparse::TransportSlice::Icmpv4(icmp) => {
                assert_eq!(icmp.icmp_type(), etherparse::Icmpv4Type::EchoReply(wanted));
                assert_eq!(icmp.payload(), payload);
                assert_eq!(vswitch_net::checksum::fold(vswitch_net::checksum::sum(icmp.slice())), 0xffff);
            }
            etherparse::TransportSlice::Icmpv6(icmp) => {
                assert_eq!(icmp.icmp_type(), etherparse::Icmpv6Type::EchoReply(wanted));
                let ip = Ipv6Packet::new_checked(&out[0][14..]).unwrap();
                assert!(icmp.is_checksum_valid(ip.src_addr().octets(), ip.dst_addr().octets()));
                assert_eq!(ip.src_addr().to_string(), to);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn both_nodes_of_a_path_are_seen() {
    for vteps in [["192.0.2.1", "192.0.2.2"], ["2001:db8::1", "2001:db8::2"]] {
        let (mut twin, pods) = vxlan::routed(vteps, Wire::default(), 1);
        let port = pods[0][0].id;
        for (from, to, hops) in
            [("10.1.0.1", "10.2.0.1", ["10.1.0.254", "10.2.0.254"]), ("fd01::1", "fd02::1", ["fd01::fe", "fd02::fe"])]
        {
            for (ttl, hop) in hops.iter().enumerate() {
                let frame = frames::udp_with(ends(10), from, to, (1000, 33_434), 1 + ttl as u8, b"probe");
                twin.switches[0].send(port, &frame);
                twin.switches[0].settle();
                for packet in twin.switches[0].take(UPLINK_PORT) {
                    twin.switches[1].send(UPLINK_PORT, &packet);
                }
                twin.switches[1].settle();
                for packet in twin.switches[1].take(UPLINK_PORT) {
                    twin.switches[0].send(UPLINK_PORT, &packet);
                }
                twin.switches[0].settle();
                let out = twin.switches[0].take(port);
                assert_eq!(out.len(), 1, "hop {ttl} to {to}");
                let told = told(&out[0]);
                assert_eq!(told.from, *hop);
                assert_eq!(told.kind, if to.contains(':') { 3 } else { 11 });
            }
        }
    }
}

#[test]
fn what_is_too_big_is_told_so_or_cut() {
    let (mut twin, pods) = vxlan::routed(["192.0.2.1", "192.0.2.2"], Wire::default(), 1);
    let (switch, port) = (&mut twin.switches[0], pods[0][0].id);
    let payload: Vec<u8> = (0..5000).map(|at| (at % 251) as u8).collect();
    let big = |from: &str, to: &str| frames::udp(ends(10), from, to, &payload);
    let out = answer(switch, port, &dont_fragment(big("10.1.0.1", "10.2.0.1"), true));
    let v4 = told(&out[0]);
    assert_eq!((v4.kind, v4.code, v4.word), (3, 4, 1450));
    let out = answer(switch, port, &big("fd01::1", "fd02::1"));
    let v6 = told(&out[0]);
    assert_eq!((v6.kind, v6.code, v6.word), (2, 0, 1450));
    // The same answers on the flow table's way.
    assert_eq!(told(&answer(switch, port, &big("fd01::1", "fd02::1"))[0]), v6);
    assert!(switch.take(UPLINK_PORT).is_empty());
    // Without DF it is cut, and the far end puts it together again.
    for frame in [big("10.1.0.1", "10.2.0.1"), frames::partial(big("10.1.0.1", "10.2.0.1"))] {
        assert!(answer(switch, port, &dont_fragment(frame.clone(), false)).is_empty());
        let pieces = switch.take(UPLINK_PORT);
        assert_eq!(pieces.len(), 4);
        let mut whole = vec![0; 5008];
        for piece in &pieces {
            assert!(piece.len() <= 1514);
            let ip = Ipv4Packet::new_checked(&piece[64..]).unwrap();
            assert!(ip.verify_checksum() && ip.hop_limit() == 63);
            let at = usize::from(ip.frag_offset());
            whole[at..at + ip.payload().len()].copy_from_slice(ip.payload());
        }
        assert_eq!(whole[8..], payload);
        let sum = vswitch_net::checksum::sum(&whole) + vswitch_net::checksum::sum(&frame[26..34]) + 17 + 5008;
        assert_eq!(vswitch_net::checksum::fold(sum), 0xffff, "the UDP checksum holds");
    }
}

/// A piece of a UDP datagram.
fn piece(from: &str, offset: usize, bytes: &[u8], has_more: bool, id: u16) -> Vec<u8> {
    let mut frame = frames::udp(ends(1), from, "10.1.0.2", &bytes[8..]);
    frame[34..].copy_from_slice(bytes);
    frame[18..20].copy_from_slice(&id.to_be_bytes());
    frame[20..22].copy_from_slice(&((offset / 8) as u16 | if has_more { 0x2000 } else { 0 }).to_be_bytes());
    frame[24..26].fill(0);
    let sum = vswitch_net::checksum::finish(vswitch_net::checksum::sum(&frame[14..34]));
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame
}

#[test]
fn fragments_follow_the_first_and_overlap_ends_them() {
    let (mut switch, one, two) = two_pods();
    let mut first = vec![0; 64];
    first[..8].copy_from_slice(&[0x03, 0xe8, 0x07, 0xd0, 0, 128, 0, 0]);
    for (offset, more) in [(0, true), (64, false)] {
        switch.send(one.id, &piece("10.1.0.1", offset, &first, more, 7));
    }
    switch.settle();
    assert_eq!(switch.take(two.id).len(), 2);
    let Ok(vswitch_api::Answer::Flows { flows }) = switch.ask_json(r#"{"op":"flow_list"}"#) else { panic!() };
    assert_eq!(flows.len(), 1, "{flows:?}");
    assert_eq!((flows[0].packets, flows[0].destination.as_str()), (2, "10.1.0.2:2000"));
    // Teardrop: the second covers bytes of the first.
    assert_eq!(switch.drop_of(one.id, &piece("10.1.0.1", 0, &first, true, 8)), None);
    let overlap = Some(DropReason::FragmentOverlap);
    assert_eq!(switch.drop_of(one.id, &piece("10.1.0.1", 56, &first, true, 8)), overlap);
    assert_eq!(switch.drop_of(one.id, &piece("10.1.0.1", 120, &first, false, 8)), overlap);
    assert_eq!(switch.drop_of(one.id, &piece("10.1.0.1", 65_528, &first, false, 9)), Some(DropReason::BadFragment));
    assert_eq!(switch.drop_of(one.id, &piece("10.1.0.1", 8, &first[..20], true, 9)), Some(DropReason::BadFragment));
}
