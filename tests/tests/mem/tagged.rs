//! Peers of an underlay with a tag of our own, which the switch finds itself.

use std::collections::BTreeSet;
use std::net::IpAddr;

use vswitch_control::{Attached, Backend, Control, ControlConfig, OwnWay, UplinkState};
use vswitch_dataplane::Event;
use vswitch_net::{GATEWAY_MAC, PortId};
use vswitch_tests::frames::{self, Ends};
use vswitch_tests::mem::Switch;
use vswitch_tests::twin::WIRE_MACS;

use super::mac;

const SECOND_NS: u64 = 1_000_000_000;

/// A switch with so many uplinks of the VLAN 100, and peers.
fn tagged(uplinks: u16, peers: usize) -> Switch {
    let mut switch = Switch::new();
    switch.control = Control::new(ControlConfig { vlan: Some(100), ..ControlConfig::default() });
    for at in 0..uplinks {
        switch.backend.attach(PortId(at), "wire").unwrap();
        let state = UplinkState {
            link: format!("wire{at}"),
            mac: WIRE_MACS[usize::from(at)],
            mtu: 1500,
            is_up: true,
            v4: "192.0.2.1".parse().ok(),
            v6: None,
            attached: Attached::default(),
            note: None,
        };
        switch.control.set_uplink(PortId(at), Ok(state));
    }
    for number in 0..peers {
        let request = format!(r#"{{"op":"peer_add","name":"p{number}","vtep":"{}"}}"#, address(number));
        switch.ask_json(&request).unwrap();
    }
    switch
}

fn address(number: usize) -> IpAddr {
    format!("192.0.{}.{}", 3 + number / 250, 1 + number % 250).parse().unwrap()
}

/// Questions that go out in a second: to all, and to one.
fn questions(switch: &mut Switch, now_ns: u64) -> (usize, usize) {
    switch.control.tick(now_ns);
    let own = switch.control.take_own();
    assert!(own.iter().all(|own| own.way == OwnWay::Port(PortId(0)) && own.bytes[12..16] == [0x81, 0, 0, 100]));
    let to_all = own.iter().filter(|own| own.bytes[..6] == [0xff; 6]).count();
    (to_all, own.len() - to_all)
}

#[test]
fn many_peers_are_asked_without_a_storm() {
    const PEERS: usize = 400;
    let mut switch = tagged(1, PEERS);
    let hear = |switch: &mut Switch, now_ns, number| {
        let event = Event::Neighbor { port: PortId(0), address: address(number), mac: mac(66) };
        switch.control.learn(now_ns, 0, event);
        assert!(switch.control.take_own().is_empty(), "an answer is no reason to ask");
    };
    switch.control.take_own();
    // Half of them answers, the rest is dead.
    let (mut to_all, mut to_one) = (Vec::new(), Vec::new());
    for second in 0..120 {
        let (all, one) = questions(&mut switch, second * SECOND_NS);
        to_all.push(all);
        to_one.push(one);
        (0..PEERS / 2).for_each(|number| hear(&mut switch, second * SECOND_NS, number));
    }
    assert!(to_all.iter().chain(&to_one).all(|&count| count <= 64), "{to_all:?} {to_one:?}");
    assert_eq!(to_one.iter().sum::<usize>(), 0, "who is heard of is not asked");
    // The dead ones are asked every sixteen seconds in the end.
    assert!(to_all[60..].iter().sum::<usize>() <= 200 * 5, "{to_all:?}");
    // Those who fall silent are asked, one by one and not all at once, before they are forgotten.
    let asked: Vec<(usize, usize)> = (120..150).map(|second| questions(&mut switch, second * SECOND_NS)).collect();
    assert!(asked[18..].iter().map(|(_, one)| one).sum::<usize>() >= 200, "{asked:?}");
}

#[test]
fn a_peer_is_reached_only_where_it_was_heard() {
    let mut switch = tagged(2, 1);
    switch.ask_json(r#"{"op":"network_add","name":"pods","vni":7,"ranges":["10.1.0.0/24"]}"#).unwrap();
    switch.ask_json(r#"{"op":"route_add","network":"pods","prefix":"10.2.0.0/24","peer":"p0"}"#).unwrap();
    let pod = switch.add_port("pod", "pods", mac(10), &["10.1.0.5"]).id;
    switch.pass(SECOND_NS);
    switch.settle();
    let mut sent = |from: &[u16], heard: &[u16]| {
        for &port in heard {
            let mut answer = frames::arp_request(mac(66), "192.0.3.1", "192.0.3.1");
            answer.splice(12..12, [0x81, 0, 0, 100]);
            switch.send(PortId(port), &answer);
        }
        switch.settle();
        (0..2).for_each(|port| drop(switch.take(PortId(port))));
        for number in 0..200 {
            let ends = Ends { from: mac(10), to: GATEWAY_MAC };
            switch.send(pod, &frames::udp_with(ends, "10.1.0.5", "10.2.0.2", (number, 80), 64, b"x"));
        }
        switch.settle();
        let used: BTreeSet<u16> = (0..2).filter(|&port| !switch.take(PortId(port)).is_empty()).collect();
        assert_eq!(used, from.iter().copied().collect());
    };
    sent(&[0], &[0]);
    sent(&[0, 1], &[1]);
}
