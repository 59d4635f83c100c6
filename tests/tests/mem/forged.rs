//! What one pod says in the name of another: never believed, and never at the other's cost.

use etherparse::PacketBuilder;
use vswitch_control::{Attached, Backend, Control, ControlConfig, HOST_PORT, HostState};
use vswitch_dataplane::DropReason;
use vswitch_net::{GATEWAY_MAC, PortId, checksum};
use vswitch_tests::frames::{self, Ends};
use vswitch_tests::mem::Switch;

use super::mac;

/// Three pods of a routed network: 10.1.0.2 to 10.1.0.4.
fn routed() -> (Switch, [PortId; 3]) {
    let mut switch = Switch::new();
    let network = r#"{"op":"network_add","name":"pods","vni":7,"subnets":["10.0.0.0/8"],"ranges":["10.1.0.0/24"]}"#;
    switch.ask_json(network).unwrap();
    let ports = [1, 2, 3].map(|number: u8| {
        switch.add_port(&format!("p{number}"), "pods", mac(number), &[&format!("10.1.0.{}", number + 1)]).id
    });
    (switch, ports)
}

/// A part of an IPv4 packet, as a fragment of its own.
fn cut(packet: &[u8], from: usize, to: usize, id: u16) -> Vec<u8> {
    let mut frame = packet[..34].to_vec();
    frame.extend_from_slice(&packet[34 + from..34 + to]);
    let has_more = if 34 + to < packet.len() { 0x2000 } else { 0 };
    frame[16..18].copy_from_slice(&((20 + to - from) as u16).to_be_bytes());
    frame[18..20].copy_from_slice(&id.to_be_bytes());
    frame[20..22].copy_from_slice(&((from / 8) as u16 | has_more).to_be_bytes());
    frame[24..26].fill(0);
    let sum = checksum::finish(checksum::sum(&frame[14..34]));
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame
}

#[test]
fn fragments_in_anothers_name_cost_the_other_nothing() {
    let (mut switch, ports) = routed();
    let datagram = |number| frames::udp(Ends { from: mac(number), to: GATEWAY_MAC }, "10.1.0.2", "10.1.0.3", &[7; 120]);
    for id in 0..100 {
        assert_eq!(switch.drop_of(ports[2], &cut(&datagram(3), 0, 64, id)), Some(DropReason::SpoofedAddress));
        assert_eq!(switch.drop_of(ports[0], &cut(&datagram(1), 0, 64, id)), None);
        assert_eq!(switch.drop_of(ports[0], &cut(&datagram(1), 64, 128, id)), None);
    }
    assert_eq!(switch.take(ports[1]).len(), 200);
}

#[test]
fn a_forged_error_does_not_pass_in_pieces() {
    let (mut switch, ports) = routed();
    let quote = frames::udp(Ends { from: mac(2), to: GATEWAY_MAC }, "10.9.9.9", "10.1.0.2", &[0; 60])[14..].to_vec();
    let mut error = Vec::new();
    let header = etherparse::Icmpv4Type::DestinationUnreachable(
        etherparse::icmpv4::DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: 68 },
    );
    PacketBuilder::ethernet2(mac(1).0, GATEWAY_MAC.0)
        .ipv4([10, 1, 0, 2], [10, 1, 0, 3], 9)
        .icmpv4(header)
        .write(&mut error, &quote)
        .unwrap();
    assert_eq!(switch.drop_of(ports[0], &error), Some(DropReason::ForgedError));
    let length = error.len() - 34;
    for id in 1..4 {
        assert_eq!(switch.drop_of(ports[0], &cut(&error, 0, 64, id)), Some(DropReason::ForgedError));
        // Of no use alone, and no key to the next one.
        assert_eq!(switch.drop_of(ports[0], &cut(&error, 64, length, id)), None);
    }
    assert!(switch.take(ports[1]).iter().all(|frame| frame.len() < 34 + 64));
}

#[test]
fn nobody_outside_speaks_as_a_pod_by_way_of_the_host() {
    let mut switch = Switch::new();
    switch.control = Control::new(ControlConfig { host_network: Some("pods".to_owned()), ..ControlConfig::default() });
    let network = r#"{"op":"network_add","name":"pods","vni":7,"subnets":["10.0.0.0/8"],"ranges":["10.1.0.0/24"]}"#;
    switch.ask_json(network).unwrap();
    switch.ask_json(r#"{"op":"peer_add","name":"other","vtep":"192.0.2.2"}"#).unwrap();
    switch.ask_json(r#"{"op":"route_add","network":"pods","prefix":"10.2.0.0/24","peer":"other"}"#).unwrap();
    switch.backend.attach(HOST_PORT, "host").unwrap();
    let (link, attached) = ("vswitch0".to_owned(), Attached::default());
    switch.control.set_host(Ok(HostState { link, mac: mac(99), attached, problem: None }));
    switch.add_port("one", "pods", mac(1), &["10.1.0.5"]);
    switch.add_port("two", "pods", mac(2), &["10.1.0.6"]);
    let mut from =
        |from| switch.drop_of(HOST_PORT, &frames::udp(Ends { from: mac(99), to: GATEWAY_MAC }, from, "10.1.0.6", b"x"));
    assert_eq!(from("10.1.0.5"), Some(DropReason::SpoofedAddress), "a pod here");
    assert_eq!(from("10.2.0.5"), Some(DropReason::SpoofedAddress), "a pod behind VXLAN");
    assert_eq!(from("10.1.0.1"), None, "the host itself");
    assert_eq!(from("198.51.100.7"), None, "the world");
}

#[test]
fn neighbor_discovery_is_for_ones_own_addresses_and_mac() {
    let mut switch = Switch::new();
    let network = r#"{"op":"network_add","name":"lan","vni":9,"mode":"bridged","subnets":["10.9.0.0/16","fd09::/64"]}"#;
    switch.ask_json(network).unwrap();
    let [one, two] = [1, 2].map(|number: u8| {
        let addresses = [format!("10.9.0.{number}"), format!("fd09::{number}")];
        switch.add_port(&format!("p{number}"), "lan", mac(number), &[&addresses[0], &addresses[1]]).id
    });
    switch.settle();
    switch.take(one);
    switch.take(two);
    let solicitation = |from: &str| frames::neighbor_solicitation(mac(1), from, "fd09::77");
    for from in ["fd09::1", "fe80::ff:fe00:1"] {
        assert_eq!(switch.drop_of(one, &solicitation(from)), None, "{from}");
    }
    assert_eq!(switch.take(two).len(), 2);
    for from in ["fd09::2", "fe80::abcd"] {
        assert_eq!(switch.drop_of(one, &solicitation(from)), Some(DropReason::SpoofedAddress), "{from}");
    }
    // Its own address, and at which MAC it is (RFC 4861 section 4.6.1).
    let with_option = |units: u8, of: u8| {
        let mut frame = solicitation("fd09::1");
        frame[18..20].copy_from_slice(&32_u16.to_be_bytes());
        frame.extend_from_slice(&[1, units]);
        frame.extend_from_slice(&mac(of).0);
        frame
    };
    assert_eq!(switch.drop_of(one, &with_option(1, 1)), None);
    assert_eq!(switch.drop_of(one, &with_option(1, 2)), Some(DropReason::SpoofedNeighbor));
    for units in [0, 2] {
        assert_eq!(switch.drop_of(one, &with_option(units, 1)), Some(DropReason::Malformed));
    }
}

#[test]
fn a_check_of_macs_at_least_weakens_no_network() {
    let mut switch = Switch::new();
    for (name, vni, is_checked) in [("strict", 1, true), ("loose", 2, false)] {
        switch
            .ask_json(&format!(
                r#"{{"op":"network_add","name":"{name}","vni":{vni},"ranges":["10.{vni}.0.0/24"],"spoof_check":{is_checked}}}"#
            ))
            .unwrap();
    }
    for (number, network, reason) in [(1_u8, "strict", Some(DropReason::SpoofedAddress)), (2, "loose", None)] {
        let receiver = switch.add_port(&format!("r{number}"), network, mac(9), &[&format!("10.{number}.0.9")]);
        let port = format!(
            r#"{{"op":"port_add","link":"p{number}","mac":"02:00:00:00:00:0{number}","network":"{network}","addresses":["10.{number}.0.5"],"check":"at_least_mac"}}"#
        );
        let Ok(vswitch_api::Answer::Port(info)) = switch.ask_json(&port) else { panic!("{port}") };
        let mut from = |mac| {
            let (source, destination) = (format!("10.{number}.0.77"), format!("10.{number}.0.9"));
            switch.drop_of(info.id, &frames::udp(Ends { from: mac, to: GATEWAY_MAC }, &source, &destination, b"x"))
        };
        assert_eq!(from(mac(number)), reason, "{network}");
        assert_eq!(from(mac(77)), Some(DropReason::SpoofedMac), "{network}");
        switch.take(receiver.id);
    }
}

/// In a bridged network neighbours speak link-local, and report about it.
#[test]
fn an_error_about_a_link_local_packet_is_believed_of_its_receiver() {
    let mut switch = Switch::new();
    let network = r#"{"op":"network_add","name":"lan","vni":9,"mode":"bridged","subnets":["fd09::/64"]}"#;
    switch.ask_json(network).unwrap();
    let [one, two] = [1, 2]
        .map(|number: u8| switch.add_port(&format!("p{number}"), "lan", mac(number), &[&format!("fd09::{number}")]).id);
    switch.settle();
    let local = |mac: vswitch_net::MacAddr| -> [u8; 16] {
        let [a, b, c, d, e, f] = mac.0;
        [0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f]
    };
    let unreachable = |sent_to: [u8; 16]| {
        let (mut quote, mut frame) = (Vec::new(), Vec::new());
        PacketBuilder::ipv6(local(mac(1)), sent_to, 64).udp(5, 6).write(&mut quote, b"hello").unwrap();
        let code = etherparse::icmpv6::DestUnreachableCode::Port;
        PacketBuilder::ethernet2(mac(2).0, mac(1).0)
            .ipv6(local(mac(2)), local(mac(1)), 64)
            .icmpv6(etherparse::Icmpv6Type::DestinationUnreachable(code))
            .write(&mut frame, &quote)
            .unwrap();
        frame
    };
    switch.take(one);
    assert_eq!(switch.drop_of(two, &unreachable(local(mac(2)))), None);
    assert_eq!(switch.take(one).len(), 1);
    assert_eq!(switch.drop_of(two, &unreachable(local(mac(3)))), Some(DropReason::ForgedError));
}
