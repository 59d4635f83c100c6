//! Bridged networks: learning, ageing, moves, flooding, split horizon.

use vswitch_api::{Answer, FdbTarget};
use vswitch_control::UPLINK_PORT;
use vswitch_dataplane::DropReason;
use vswitch_net::{MacAddr, PortId};
use vswitch_tests::frames::{self, Ends};
use vswitch_tests::mem::Switch;
use vswitch_tests::twin::{Twin, WIRE_MACS, Wire};

use super::mac;

const NETWORK: &str = r#"{"op":"network_add","name":"lan","vni":9,"mode":"bridged","spoof_check":false}"#;

fn three_ports() -> (Switch, [PortId; 3]) {
    let mut switch = Switch::new();
    switch.ask_json(NETWORK).expect("a network");
    let ports = [1, 2, 3].map(|number| switch.add_port(&format!("p{number}"), "lan", mac(number), &[]).id);
    (switch, ports)
}

fn frame(from: MacAddr, to: MacAddr) -> Vec<u8> {
    frames::udp(Ends { from, to }, "10.0.0.1", "10.0.0.2", b"x")
}

/// How many packets each port sent.
fn sent(switch: &mut Switch, ports: &[PortId]) -> Vec<usize> {
    ports.iter().map(|&port| switch.take(port).len()).collect()
}

fn place(switch: &mut Switch, station: MacAddr) -> Option<FdbTarget> {
    let Answer::Fdb { stations } = switch.ask_json(r#"{"op":"fdb_list"}"#).expect("a list") else { panic!() };
    stations.into_iter().find(|info| info.mac == station).map(|info| info.at)
}

#[test]
fn broadcast_and_unknown_go_to_all_others_and_known_to_one() {
    let (mut switch, ports) = three_ports();
    switch.send(ports[0], &frame(mac(1), MacAddr::BROADCAST));
    switch.settle();
    assert_eq!(sent(&mut switch, &ports), [0, 1, 1]);
    switch.send(ports[0], &frame(mac(1), mac(99)));
    switch.settle();
    assert_eq!(sent(&mut switch, &ports), [0, 1, 1], "unknown unicast");
    switch.send(ports[0], &frame(mac(1), mac(3)));
    switch.settle();
    assert_eq!(sent(&mut switch, &ports), [0, 0, 1], "a port's own MAC is known from the start");
    assert_eq!(switch.counters().total().copies, 2, "two floods to two ports");
}

#[test]
fn stations_behind_a_port_are_learned_moved_and_forgotten() {
    let (mut switch, ports) = three_ports();
    let station = mac(50);
    switch.send(ports[0], &frame(station, MacAddr::BROADCAST));
    switch.settle();
    sent(&mut switch, &ports);
    assert_eq!(place(&mut switch, station), Some(FdbTarget::Port("p1".into())));
    let towards = frame(mac(3), station);
    switch.send(ports[2], &towards);
    switch.settle();
    assert_eq!(sent(&mut switch, &ports), [1, 0, 0]);
    // It moves: the flow that was made a moment ago must not survive.
    switch.send(ports[1], &frame(station, MacAddr::BROADCAST));
    switch.settle();
    sent(&mut switch, &ports);
    assert_eq!(place(&mut switch, station), Some(FdbTarget::Port("p2".into())));
    switch.send(ports[2], &towards);
    switch.settle();
    assert_eq!(sent(&mut switch, &ports), [0, 1, 0]);
    // It is silent too long.
    switch.pass(301_000_000_000);
    assert_eq!(place(&mut switch, station), None);
    switch.send(ports[2], &towards);
    switch.settle();
    assert_eq!(sent(&mut switch, &ports), [1, 1, 0]);
}

#[test]
fn a_station_that_speaks_does_not_age() {
    let (mut switch, ports) = three_ports();
    let station = mac(50);
    for _ in 0..100 {
        // Always the same flow, so that most packets only touch the flow table.
        for _ in 0..5 {
            switch.send(ports[0], &frame(station, mac(3)));
            switch.settle();
        }
        switch.pass(6_000_000_000);
        sent(&mut switch, &ports);
    }
    assert_eq!(place(&mut switch, station), Some(FdbTarget::Port("p1".into())));
}

#[test]
fn static_stations_do_not_move() {
    let (mut switch, ports) = three_ports();
    switch.ask_json(r#"{"op":"fdb_add","network":"lan","mac":"02:00:00:00:00:32","at":{"port":"p1"}}"#).expect("done");
    switch.send(ports[1], &frame(mac(50), MacAddr::BROADCAST));
    switch.send(ports[1], &frame(mac(3), MacAddr::BROADCAST));
    switch.settle();
    assert_eq!(place(&mut switch, mac(50)), Some(FdbTarget::Port("p1".into())));
    assert_eq!(place(&mut switch, mac(3)), Some(FdbTarget::Port("p3".into())), "nor does a port's own");
}

#[test]
fn spoof_check_holds_stations_to_their_port() {
    let mut switch = Switch::new();
    switch
        .ask_json(r#"{"op":"network_add","name":"lan","vni":9,"mode":"bridged","subnets":["10.0.0.0/24"]}"#)
        .expect("a network");
    let port = switch.add_port("p1", "lan", mac(1), &["10.0.0.1"]).id;
    assert_eq!(switch.drop_of(port, &frame(mac(2), mac(3))), Some(DropReason::SpoofedMac));
    let forged = frames::udp(Ends { from: mac(1), to: mac(3) }, "10.0.0.9", "10.0.0.2", b"x");
    assert_eq!(switch.drop_of(port, &forged), Some(DropReason::SpoofedAddress));
    assert_eq!(
        switch.drop_of(port, &frames::arp_request(mac(1), "10.0.0.9", "10.0.0.2")),
        Some(DropReason::SpoofedNeighbor)
    );
    assert_eq!(switch.drop_of(port, &frame(mac(1), MacAddr::BROADCAST)), Some(DropReason::NoReceiver));
}

/// What was judged honest once must not open the way for what is not: such packets are judged one by one.
#[test]
fn an_honest_packet_opens_no_way_for_a_forged_one() {
    let mut switch = Switch::new();
    let network = r#"{"op":"network_add","name":"lan","vni":9,"mode":"bridged","subnets":["10.0.0.0/24","fd00::/64"]}"#;
    switch.ask_json(network).expect("a network");
    let port = switch.add_port("p1", "lan", mac(1), &["10.0.0.1", "fd00::1"]).id;
    switch.add_port("p2", "lan", mac(2), &["10.0.0.2", "fd00::2"]);
    let arp = |sender: &str| {
        let mut frame = frames::arp_request(mac(1), sender, "10.0.0.2");
        frame[..6].copy_from_slice(&mac(2).0);
        frame
    };
    let na =
        |target: &str| frames::neighbor_advertisement(Ends { from: mac(1), to: mac(2) }, "fd00::1", "fd00::2", target);
    for _ in 0..2 {
        assert_eq!(switch.drop_of(port, &arp("10.0.0.1")), None);
        assert_eq!(switch.drop_of(port, &arp("10.0.0.9")), Some(DropReason::SpoofedNeighbor));
        assert_eq!(switch.drop_of(port, &na("fd00::1")), None);
        assert_eq!(switch.drop_of(port, &na("fd00::9")), Some(DropReason::SpoofedNeighbor));
        assert_eq!(switch.drop_of(port, &na("fe80::ff:fe00:1")), None, "its own link-local address");
        assert_eq!(switch.drop_of(port, &na("fe80::1")), Some(DropReason::SpoofedNeighbor));
    }
    let mut advertisement = na("fd00::1");
    advertisement[54] = 134;
    assert_eq!(switch.drop_of(port, &advertisement), Some(DropReason::SpoofedNeighbor), "a pod is no router");
}

/// News of a station may come after its port is gone, and its number somebody else's.
#[test]
fn late_news_are_not_believed() {
    let (mut switch, ports) = three_ports();
    let late = vswitch_dataplane::Event::Seen {
        network: vswitch_net::NetworkIndex(1),
        mac: mac(50),
        location: vswitch_dataplane::Location::Port(ports[0]),
    };
    switch.control.learn(switch.now_ns, 0, late);
    assert_eq!(place(&mut switch, mac(50)), Some(FdbTarget::Port("p1".into())), "the index is the network's");
    switch.ask_json(r#"{"op":"port_del","link":"p1"}"#).expect("done");
    switch.control.learn(switch.now_ns, 0, late);
    assert_eq!(place(&mut switch, mac(50)), None);
}

#[test]
fn what_must_not_be_bridged_is_counted_by_reason() {
    let (mut switch, ports) = three_ports();
    let reserved = MacAddr([0x01, 0x80, 0xc2, 0, 0, 0x0e]);
    let mut tagged = frame(mac(1), mac(2));
    tagged[12..14].copy_from_slice(&[0x81, 0x00]);
    let cases = [
        (frame(mac(1), reserved), DropReason::ReservedMac),
        (frame(MacAddr([3; 6]), mac(2)), DropReason::BadSourceMac),
        (frame(MacAddr([0; 6]), mac(2)), DropReason::BadSourceMac),
        (frame(mac(1), mac(1)), DropReason::SamePort),
        (tagged, DropReason::Tagged),
    ];
    for (frame, reason) in cases {
        assert_eq!(switch.drop_of(ports[0], &frame), Some(reason));
    }
}

#[test]
fn floods_reach_every_node_once_and_never_come_back() {
    let mut twin = Twin::new(["192.0.2.1", "192.0.2.2"], Wire::default(), 1);
    let ports = [0, 1].map(|at| {
        twin.switches[at].ask_json(NETWORK).expect("a network");
        [1, 2].map(|number| {
            let own = mac(10 * (at as u8 + 1) + number);
            twin.switches[at].add_port(&format!("p{number}"), "lan", own, &[]).id
        })
    });
    twin.switches[0].send(ports[0][0], &frame(mac(11), MacAddr::BROADCAST));
    twin.step();
    assert_eq!(sent(&mut twin.switches[0], &ports[0]), [0, 1]);
    assert_eq!(sent(&mut twin.switches[1], &ports[1]), [1, 1]);
    assert_eq!(twin.switches[1].take(UPLINK_PORT).len(), 0, "split horizon");
    assert_eq!(place(&mut twin.switches[1], mac(11)), Some(FdbTarget::Peer("other".into())));
    // The answer goes to the one node, the one port.
    twin.switches[1].send(ports[1][1], &frame(mac(22), mac(11)));
    twin.step();
    twin.step();
    assert_eq!(sent(&mut twin.switches[0], &ports[0]), [1, 0]);
    assert_eq!(sent(&mut twin.switches[1], &ports[1]), [0, 0]);
    // A station that is said to be behind the sender's own node stays there.
    let back = frames::udp(Ends { from: mac(12), to: mac(11) }, "10.0.0.1", "10.0.0.2", b"x");
    let header = vswitch_dataplane::vxlan::OuterHeader::new(
        (WIRE_MACS[0], WIRE_MACS[1]),
        "192.0.2.1".parse().unwrap(),
        "192.0.2.2".parse().unwrap(),
        4789,
        None,
    )
    .unwrap();
    let mut packet = vec![0; header.len()];
    header.emit(&mut packet, vswitch_net::Vni::try_from(9).unwrap(), 0, back.len(), 0, || 0);
    packet.extend_from_slice(&back);
    assert_eq!(twin.switches[1].drop_of(UPLINK_PORT, &packet), Some(DropReason::SplitHorizon));
}
