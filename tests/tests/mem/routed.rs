//! Routed networks: the switch is everybody's gateway.

use smoltcp::wire::{ArpPacket, ArpRepr, Icmpv6Packet, Icmpv6Repr, Ipv6Packet, NdiscRepr};
use vswitch_api::PortInfo;
use vswitch_dataplane::DropReason;
use vswitch_net::GATEWAY_MAC;
use vswitch_tests::frames::{self, Ends};
use vswitch_tests::mem::Switch;

use super::mac;

/// A switch with one routed network and two pods.
pub(super) fn two_pods() -> (Switch, PortInfo, PortInfo) {
    two_pods_of(Switch::new())
}

/// Two pods of one routed network of that switch.
pub(super) fn two_pods_of(mut switch: Switch) -> (Switch, PortInfo, PortInfo) {
    switch
        .ask_json(r#"{"op":"network_add","name":"pods","vni":7,"ranges":["10.1.0.0/24","fd01::/64"],"router":["10.1.0.254","fd01::fe"]}"#)
        .expect("a network");
    let one = switch.add_port("one", "pods", mac(1), &[]);
    let two = switch.add_port("two", "pods", mac(2), &[]);
    (switch, one, two)
}

fn to_gateway(number: u8) -> Ends {
    Ends { from: mac(number), to: GATEWAY_MAC }
}

#[test]
fn packets_are_routed_with_new_macs_and_one_hop_less() {
    let (mut switch, one, two) = two_pods();
    for (source, destination) in [("10.1.0.1", "10.1.0.2"), ("fd01::1", "fd01::2")] {
        // The second packet of each takes the flow table's way; both must leave the same.
        for _ in 0..2 {
            switch.send(one.id, &frames::udp(to_gateway(1), source, destination, b"hello"));
            switch.settle();
            let out = switch.take(two.id);
            let expected = frames::udp_with(
                Ends { from: GATEWAY_MAC, to: mac(2) },
                source,
                destination,
                (1000, 2000),
                63,
                b"hello",
            );
            assert_eq!(out, [expected]);
        }
    }
    assert_eq!((switch.counters().flow_hits, switch.counters().flow_misses), (2, 2));
}

#[test]
fn partial_checksums_are_handed_on() {
    let (mut switch, one, two) = two_pods();
    for (source, destination) in [("10.1.0.1", "10.1.0.2"), ("fd01::1", "fd01::2")] {
        let frame = frames::partial(frames::udp(to_gateway(1), source, destination, &[7; 333]));
        assert!(!frames::is_valid_udp(&frame));
        switch.send(one.id, &frame);
        switch.settle();
        let out = switch.take(two.id);
        assert!(out.len() == 1 && frames::is_valid_udp(&out[0]), "completed as requested");
    }
}

#[test]
fn packets_of_many_frames_pass_whole() {
    let (mut switch, one, two) = two_pods();
    for length in [3840 - 42, 3841, 9000, 60_000] {
        let payload: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
        let frame = frames::partial(frames::udp(to_gateway(1), "10.1.0.1", "10.1.0.2", &payload));
        switch.send(one.id, &frame);
        switch.settle();
        let out = switch.take(two.id);
        assert!(out.len() == 1 && frames::is_valid_udp(&out[0]));
        assert_eq!(out[0][42..], payload);
    }
}

#[test]
fn the_gateway_answers_arp() {
    let (mut switch, one, _) = two_pods();
    switch.send(one.id, &frames::arp_request(mac(1), "10.1.0.1", "169.254.1.1"));
    switch.settle();
    let out = switch.take(one.id);
    let arp = ArpRepr::parse(&ArpPacket::new_checked(&out[0][14..]).unwrap()).unwrap();
    let ArpRepr::EthernetIpv4 { source_hardware_addr, source_protocol_addr, target_hardware_addr, .. } = arp else {
        panic!("{arp:?}")
    };
    assert_eq!(source_hardware_addr.0, GATEWAY_MAC.0);
    assert_eq!(source_protocol_addr.to_string(), "169.254.1.1");
    assert_eq!(target_hardware_addr.0, mac(1).0);
    assert_eq!(
        switch.drop_of(one.id, &frames::arp_request(mac(1), "10.1.0.1", "10.1.0.2")),
        Some(DropReason::NeighborIgnored)
    );
}

#[test]
fn the_gateway_answers_neighbor_solicitation() {
    let (mut switch, one, _) = two_pods();
    for (source, solicited) in [("fd01::1", true), ("::", false)] {
        switch.send(one.id, &frames::neighbor_solicitation(mac(1), source, "fe80::1"));
        switch.settle();
        let out = switch.take(one.id);
        let ip = Ipv6Packet::new_checked(&out[0][14..]).unwrap();
        assert_eq!(ip.hop_limit(), 255);
        let icmp = Icmpv6Packet::new_checked(ip.payload()).unwrap();
        let parsed = Icmpv6Repr::parse(&ip.src_addr(), &ip.dst_addr(), &icmp, &Default::default()).unwrap();
        let Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert { flags, target_addr, lladdr }) = parsed else {
            panic!("{parsed:?}")
        };
        assert_eq!(target_addr.to_string(), "fe80::1");
        assert_eq!(lladdr.unwrap().as_bytes(), GATEWAY_MAC.0);
        assert_eq!(flags.contains(smoltcp::wire::NdiscNeighborFlags::SOLICITED), solicited);
    }
    // Somebody checks whether an address is free: nobody here has it.
    let probe = frames::neighbor_solicitation(mac(1), "::", "fd01::1");
    assert_eq!(switch.drop_of(one.id, &probe), Some(DropReason::NeighborIgnored));
}

#[test]
fn a_pod_sends_with_its_own_addresses_only() {
    let (mut switch, one, two) = two_pods();
    let cases = [
        (frames::udp(to_gateway(2), "10.1.0.1", "10.1.0.2", b"x"), DropReason::SpoofedMac),
        (frames::udp(to_gateway(1), "10.1.0.2", "10.1.0.1", b"x"), DropReason::SpoofedAddress),
        (frames::udp(to_gateway(1), "fd01::2", "fd01::1", b"x"), DropReason::SpoofedAddress),
        (frames::udp(to_gateway(1), "169.254.1.1", "10.1.0.2", b"x"), DropReason::SpoofedAddress),
        (frames::arp_request(mac(1), "10.1.0.2", "169.254.1.1"), DropReason::SpoofedNeighbor),
        (frames::arp_request(mac(2), "10.1.0.1", "169.254.1.1"), DropReason::SpoofedMac),
        (
            frames::udp(Ends { from: vswitch_net::MacAddr([3; 6]), to: GATEWAY_MAC }, "10.1.0.1", "10.1.0.2", b"x"),
            DropReason::BadSourceMac,
        ),
    ];
    for (frame, reason) in cases {
        assert_eq!(switch.drop_of(one.id, &frame), Some(reason));
    }
    // What one pod may send, another may not, even when the flow is known.
    let frame = frames::udp(to_gateway(1), "10.1.0.1", "10.1.0.2", b"x");
    assert_eq!(switch.drop_of(one.id, &frame), None);
    assert_eq!(switch.drop_of(two.id, &frame), Some(DropReason::SpoofedMac));
}

#[test]
fn what_cannot_be_routed_is_counted_by_reason() {
    let (mut switch, one, _) = two_pods();
    let udp = |destination: &str, ttl| frames::udp_with(to_gateway(1), "10.1.0.1", destination, (1, 2), ttl, b"x");
    let cases = [
        (udp("10.9.9.9", 64), DropReason::NoRoute),
        (udp("10.1.0.2", 1), DropReason::TtlExpired),
        (udp("10.1.0.2", 0), DropReason::TtlExpired),
        (udp("169.254.1.1", 64), DropReason::ToGateway),
        (udp("169.254.7.7", 64), DropReason::LinkLocal),
        (udp("127.0.0.1", 64), DropReason::LinkLocal),
        (frames::udp(to_gateway(1), "fe80::99", "fd01::2", b"x"), DropReason::LinkLocal),
        (frames::udp(to_gateway(1), "::", "fd01::2", b"x"), DropReason::LinkLocal),
        (udp("224.0.0.1", 64), DropReason::RoutedMulticast),
        (udp("255.255.255.255", 64), DropReason::RoutedMulticast),
        (frames::udp(Ends { from: mac(1), to: mac(2) }, "10.1.0.1", "10.1.0.2", b"x"), DropReason::NotForGateway),
        (frames::udp_with(to_gateway(1), "fd01::1", "fd01::2", (1, 2), 1, b"x"), DropReason::TtlExpired),
    ];
    for (frame, reason) in cases {
        assert_eq!(switch.drop_of(one.id, &frame), Some(reason));
    }
    // A known flow does not save a packet whose hops are used up.
    assert_eq!(switch.drop_of(one.id, &udp("10.1.0.2", 64)), None);
    assert_eq!(switch.drop_of(one.id, &udp("10.1.0.2", 1)), Some(DropReason::TtlExpired));
}

#[test]
fn a_removed_port_gets_nothing_more() {
    let (mut switch, one, two) = two_pods();
    let frame = frames::udp(to_gateway(1), "10.1.0.1", "10.1.0.2", b"x");
    assert_eq!(switch.drop_of(one.id, &frame), None);
    switch.ask_json(r#"{"op":"port_del","link":"two"}"#).expect("done");
    assert_eq!(switch.drop_of(one.id, &frame), Some(DropReason::NoHost));
    let again = switch.add_port("three", "pods", mac(3), &["10.1.0.2"]);
    assert_ne!(again.id, two.id, "news about the old port are not taken for the new one's");
    switch.send(one.id, &frame);
    switch.settle();
    assert_eq!(switch.take(again.id)[0][..6], mac(3).0, "and the old flow is not");
}
