//! Across the wire: what is encapsulated is right by smoltcp's and etherparse's reading, for both underlays.

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use vswitch_api::PortInfo;
use vswitch_control::{Control, ControlConfig, UPLINK_PORT};
use vswitch_dataplane::DropReason;
use vswitch_net::{GATEWAY_MAC, MacAddr, checksum};
use vswitch_tests::frames::{self, Ends};
use vswitch_tests::mem::Switch;
use vswitch_tests::twin::{Twin, WIRE_MACS, Wire};

use super::{bad_input, mac};

const UNDERLAYS: [[&str; 2]; 2] = [["192.0.2.1", "192.0.2.2"], ["2001:db8::1", "2001:db8::2"]];

/// Two nodes of a routed network, a pod on each.
pub(super) fn routed(vteps: [&str; 2], wire: Wire, seed: u64) -> (Twin, [Vec<PortInfo>; 2]) {
    let mut twin = Twin::new(vteps, wire, seed);
    let pods = [0, 1].map(|at| {
        let (own, other) = (at + 1, 2 - at);
        let switch = &mut twin.switches[at];
        let network =
            format!(r#"{{"op":"network_add","name":"pods","vni":66,"ranges":["10.{own}.0.0/24","fd0{own}::/64"],"router":["10.{own}.0.254","fd0{own}::fe"]}}"#);
        switch.ask_json(&network).expect("a network");
        for prefix in [format!("10.{other}.0.0/24"), format!("fd0{other}::/64")] {
            let route = format!(r#"{{"op":"route_add","network":"pods","prefix":"{prefix}","peer":"other"}}"#);
            switch.ask_json(&route).expect("a route");
        }
        (0..2).map(|number| switch.add_port(&format!("p{number}"), "pods", mac(10 * own as u8 + number), &[])).collect()
    });
    (twin, pods)
}

/// Two nodes of a bridged network of IPv4, two pods on each.
pub(super) fn bridged(vteps: [&str; 2], wire: Wire, seed: u64) -> (Twin, [Vec<PortInfo>; 2]) {
    let mut twin = Twin::new(vteps, wire, seed);
    let pods = [0, 1].map(|at| {
        let own = at + 1;
        let switch = &mut twin.switches[at];
        let ranges = format!(r#""subnets":["10.9.0.0/16"],"ranges":["10.9.{own}.0/24"]"#);
        let network = format!(r#"{{"op":"network_add","name":"lan","vni":9,"mode":"bridged",{ranges}}}"#);
        switch.ask_json(&network).expect("a network");
        (0..2).map(|number| switch.add_port(&format!("p{number}"), "lan", mac(10 * own as u8 + number), &[])).collect()
    });
    (twin, pods)
}

/// Sends a packet from the first pod of the first node to the first of the second; what crossed the wire.
fn cross(twin: &mut Twin, pods: &[Vec<PortInfo>; 2], frame: &[u8]) -> Vec<Vec<u8>> {
    twin.switches[0].send(pods[0][0].id, frame);
    twin.switches[0].settle();
    let wire = twin.switches[0].take(UPLINK_PORT);
    for packet in &wire {
        twin.switches[1].send(UPLINK_PORT, packet);
    }
    twin.switches[1].settle();
    wire
}

fn udp(source: &str, destination: &str, payload: &[u8]) -> Vec<u8> {
    frames::udp(Ends { from: mac(10), to: GATEWAY_MAC }, source, destination, payload)
}

#[test]
fn packets_cross_with_right_headers_and_checksums() {
    for vteps in UNDERLAYS {
        let (mut twin, pods) = routed(vteps, Wire::default(), 1);
        for (source, destination) in [("10.1.0.1", "10.2.0.1"), ("fd01::1", "fd02::1")] {
            for (frame, ttl) in
                [(udp(source, destination, &[3; 99]), 62), (frames::partial(udp(source, destination, &[4; 100])), 62)]
            {
                let wire = cross(&mut twin, &pods, &frame);
                assert_eq!(wire.len(), 1);
                check_outer(&wire[0], vteps);
                let out = twin.switches[1].take(pods[1][0].id);
                assert_eq!(out.len(), 1);
                assert!(frames::is_valid_udp(&out[0]), "the inner checksum was completed before the wire");
                let ends = Ends { from: GATEWAY_MAC, to: mac(20) };
                let expected = frames::udp_with(
                    ends,
                    source,
                    destination,
                    (1000, 2000),
                    ttl,
                    &frame[frame.len() - (frame.len() - if source.contains(':') { 62 } else { 42 })..],
                );
                assert_eq!(out[0], expected);
            }
        }
    }
}

/// The outer packet as etherparse sees it.
fn check_outer(packet: &[u8], vteps: [&str; 2]) {
    let sliced = SlicedPacket::from_ethernet(packet).expect("a packet");
    let Some(TransportSlice::Udp(udp)) = &sliced.transport else { panic!("no UDP") };
    assert_eq!(udp.destination_port(), 4789);
    assert!(udp.source_port() >= 49_152);
    match sliced.net.as_ref().expect("IP") {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            assert_eq!([header.source_addr().to_string(), header.destination_addr().to_string()], vteps);
            assert_eq!(header.header_checksum(), header.to_header().calc_header_checksum());
            assert!(header.dont_fragment() && header.ttl() == 64);
            assert_eq!(udp.checksum(), 0, "RFC 7348 section 5");
        }
        NetSlice::Ipv6(ip) => {
            let header = ip.header();
            assert_eq!([header.source_addr().to_string(), header.destination_addr().to_string()], vteps);
            let pseudo = checksum::pseudo_v6(header.source_addr(), header.destination_addr(), 17, udp.length().into());
            assert_eq!(checksum::fold(pseudo + checksum::sum(udp.slice())), 0xffff);
        }
        NetSlice::Arp(_) => panic!("ARP"),
    }
    assert_eq!((&packet[..6], &packet[6..12]), (&WIRE_MACS[1].0[..], &WIRE_MACS[0].0[..]));
    assert_eq!(udp.payload()[..8], [8, 0, 0, 0, 0, 0, 66, 0]);
}

#[test]
fn source_ports_spread_over_flows_and_stay_with_each() {
    let (mut twin, pods) = routed(UNDERLAYS[0], Wire::default(), 1);
    let mut ports = std::collections::HashSet::new();
    for flow in 0..1000_u16 {
        let frame =
            frames::udp_with(Ends { from: mac(10), to: GATEWAY_MAC }, "10.1.0.1", "10.2.0.1", (flow, 80), 64, b"x");
        let seen: Vec<[u8; 2]> =
            (0..2).map(|_| cross(&mut twin, &pods, &frame)[0][34..36].try_into().unwrap()).collect();
        assert_eq!(seen[0], seen[1]);
        ports.insert(seen[0]);
        twin.switches[1].take(pods[1][0].id);
    }
    assert!(ports.len() > 900, "{} source ports for 1000 flows", ports.len());
}

#[test]
fn what_does_not_fit_the_wire_is_dropped_with_its_reason() {
    for (vteps, fits) in [(UNDERLAYS[0], 1450), (UNDERLAYS[1], 1430)] {
        let (mut twin, pods) = routed(vteps, Wire::default(), 1);
        let switch = &mut twin.switches[0];
        assert_eq!(switch.drop_of(pods[0][0].id, &udp("10.1.0.1", "10.2.0.1", &vec![0; fits - 28])), None);
        assert_eq!(
            switch.drop_of(pods[0][0].id, &udp("10.1.0.1", "10.2.0.1", &vec![0; fits - 27])),
            Some(DropReason::TooBigForWire)
        );
        let default = pods[0][0].routes.iter().find(|route| route.destination.prefix_len() == 0).unwrap();
        assert_eq!(default.mtu, Some(fits as u32), "and the pod was told so");
    }
}

#[test]
fn an_unresolved_peer_is_a_reason() {
    let (mut twin, pods) = routed(UNDERLAYS[0], Wire::default(), 1);
    let switch = &mut twin.switches[0];
    switch.control.set_next_hops("192.0.2.2".parse().unwrap(), Vec::new());
    switch.settle();
    switch.ask_json(r#"{"op":"peer_add","name":"third","vtep":"192.0.2.3"}"#).expect("a peer");
    assert_eq!(switch.drop_of(pods[0][0].id, &udp("10.1.0.1", "10.2.0.1", b"x")), Some(DropReason::NoNeighbor));
    switch.resolve("192.0.2.2", WIRE_MACS[1]);
    assert_eq!(switch.drop_of(pods[0][0].id, &udp("10.1.0.1", "10.2.0.1", b"x")), None);
}

#[test]
fn congestion_marks_come_inside() {
    let (mut twin, pods) = routed(UNDERLAYS[0], Wire::default(), 1);
    // RFC 6040 section 4.2: the inner mark, what a router on the way writes outside, and what comes out.
    let marks = [
        (0, 3, None),
        (1, 3, Some(3)),
        (2, 3, Some(3)),
        (3, 3, Some(3)),
        (2, 1, Some(1)),
        (0, 1, Some(0)),
        (1, 2, Some(1)),
    ];
    for (inner, outer, expected) in marks {
        let mut frame = udp("10.1.0.1", "10.2.0.1", b"x");
        frame[15] = inner;
        frame[24..26].fill(0);
        let sum = checksum::finish(checksum::sum(&frame[14..34]));
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
        twin.switches[0].send(pods[0][0].id, &frame);
        twin.switches[0].settle();
        let mut packet = twin.switches[0].take(UPLINK_PORT).remove(0);
        assert_eq!(packet[15] & 3, inner, "shown outside");
        let old = u16::from_be_bytes([packet[14], packet[15]]);
        packet[15] = packet[15] & !3 | outer;
        let new = u16::from_be_bytes([packet[14], packet[15]]);
        let sum = checksum::update(u16::from_be_bytes([packet[24], packet[25]]), old, new);
        packet[24..26].copy_from_slice(&sum.to_be_bytes());
        let reason = twin.switches[1].drop_of(UPLINK_PORT, &packet);
        let out = twin.switches[1].take(pods[1][0].id);
        match expected {
            Some(mark) => {
                assert_eq!(out[0][15] & 3, mark);
                assert!(frames::is_valid_udp(&out[0]));
            }
            None => assert_eq!(reason, Some(DropReason::EcnNotCapable)),
        }
    }
}

/// Nodes that tell their peers apart by MAC, as Flannel's do, need one of each.
#[test]
fn a_router_may_have_a_name_of_its_own() {
    let own = MacAddr([2, 0, 0, 0, 7, 7]);
    let config = ControlConfig { router_mac: Some(own), ..ControlConfig::default() };
    let mut switch = Switch::new();
    switch.control = Control::new(config);
    let mut switch = switch.with_uplink(WIRE_MACS[0], Some("192.0.2.1"), None, 1500);
    switch.ask_json(r#"{"op":"network_add","name":"pods","vni":9,"ranges":["10.1.0.0/24"]}"#).unwrap();
    switch.ask_json(r#"{"op":"peer_add","name":"other","vtep":"192.0.2.2"}"#).unwrap();
    let pod = switch.add_port("pod", "pods", mac(1), &["10.1.0.5"]).id;
    let mut sent = |to: MacAddr| {
        let inner = frames::udp(Ends { from: mac(9), to }, "10.2.0.5", "10.1.0.5", b"x");
        let reason = switch.drop_of(UPLINK_PORT, &bad_input::outer("192.0.2.2", "192.0.2.1", 4789, 9, &inner));
        (reason, switch.take(pod).len())
    };
    assert_eq!([sent(GATEWAY_MAC), sent(own)], [(None, 1), (None, 1)]);
    assert_eq!(sent(mac(77)), (Some(DropReason::NotForGateway), 0));
    // A pod has no business with it.
    let frame = frames::udp(Ends { from: mac(1), to: own }, "10.1.0.5", "10.2.0.5", b"x");
    assert_eq!(switch.drop_of(pod, &frame), Some(DropReason::NotForGateway));
}
