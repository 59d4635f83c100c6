//! Addresses that pods leave with.

use std::collections::HashSet;

use proptest::prelude::*;
use vswitch_control::{ControlConfig, HOST_PORT};
use vswitch_dataplane::DropReason;
use vswitch_net::{GATEWAY_MAC, PortId};
use vswitch_tests::frames::{Ends, Layer4, packet};
use vswitch_tests::mem::Switch;

use super::{ACK, Node, SECOND, SYN, WORLD, end, mac, see, tcp};

#[test]
fn pods_share_an_address_to_leave_with() {
    for is_v6 in [false, true] {
        let mut node = Node::new().with_egress();
        let world = node.own(WORLD, is_v6);
        let own = if is_v6 { "2001:db8:50::1" } else { "192.0.2.50" };
        let ping = |asks| Layer4::Icmp(if is_v6 { 129 - u8::from(asks) } else { 8 * u8::from(asks) }, 0);
        let kinds = [
            (tcp(SYN, 1, 0), tcp(SYN | ACK, 9, 2), (1000, 53)),
            (Layer4::Udp, Layer4::Udp, (1000, 53)),
            (ping(true), ping(false), (1000, 1)),
        ];
        for (ask, tell, ports) in kinds {
            let asked: Vec<_> = (0..4).map(|pod| node.send(pod, &world, ports, ask, b"hello").unwrap()).collect();
            let mut lefts = HashSet::new();
            for (pod, (at, seen)) in asked.iter().enumerate() {
                assert_eq!((*at, seen.source.0), (WORLD, end(own, 0).0));
                assert!(lefts.insert(seen.source.1), "a port of its own");
                assert_eq!(pod == 0, seen.source.1 == 1000, "the first keeps its port");
            }
            for (pod, asked) in asked.iter().enumerate() {
                // The identifier of a ping is both its ports.
                let is_ping = matches!(ask, Layer4::Icmp(..));
                let told = if is_ping {
                    node.send(WORLD, own, (asked.1.source.1, 1), tell, b"hello").unwrap()
                } else {
                    node.answer(asked, tell, b"hello").unwrap()
                };
                let pods = node.own(pod, is_v6);
                assert_eq!((told.0, told.1.destination), (pod, end(&pods, 1000)));
                assert_eq!(told.1.source.0, end(&world, 0).0);
            }
        }
        // What is of no connection does not show who sent it.
        let timestamp = Layer4::Icmp(if is_v6 { 150 } else { 13 }, 0);
        assert_eq!(node.send(0, &world, (1, 1), timestamp, b"x").err(), Some(DropReason::Untranslatable));
        let stranger = node.frame(WORLD, &node.own(0, is_v6), (5, 6), Layer4::Udp, b"never sent");
        let error = node.send(0, &world, (0, 0), Layer4::Icmp(if is_v6 { 1 } else { 3 }, 3), &stranger[14..]);
        assert_eq!(error.err(), Some(DropReason::Untranslatable));
        // Nobody has asked for this one.
        assert_eq!(node.send(WORLD, own, (53, 999), Layer4::Udp, b"x").err(), Some(DropReason::NoRoute));
        // Where the rule does not lead nothing changes.
        let near = node.own(1, is_v6);
        assert_eq!(node.send(0, &near, (1, 2), Layer4::Udp, b"x").unwrap().1.source.0, end(&node.own(0, is_v6), 0).0);
    }
}

/// Sixty-four thousand ports, and no more, lead to one end of the world.
#[test]
fn ports_run_out_and_come_back() {
    let mut node = Node::new().with_egress();
    let mut left = 0;
    let mut refused = 0;
    for number in 0..70_000_u32 {
        // Two pods, each with every port.
        let (pod, port) = ((number / 35_000) as usize, (number % 35_000) as u16 + 1);
        match node.send(pod, "198.51.100.7", (port, 53), Layer4::Udp, b"") {
            Ok(_) => left += 1,
            Err(reason) => {
                assert_eq!(reason, DropReason::NoNatPort);
                refused += 1;
            }
        }
    }
    assert!(left > 60_000 && left <= 65_535 && refused > 0, "{left} left, {refused} refused");
    let counts = node.switch.backend.connections.counts();
    println!("{} translated connections, {} bytes each", counts.count, counts.bytes / counts.count);
    assert!(counts.bytes / counts.count <= 256);
    node.switch.pass(31 * SECOND);
    node.sweep();
    assert_eq!(node.switch.backend.connections.counts().count, 0);
    node.send(0, "198.51.100.7", (7, 53), Layer4::Udp, b"").unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    /// Packets and errors of translated connections, damaged and cut anywhere behind the addresses: nothing panics, no frame is
    /// lost, and no pod's address shows where the rule hides it.
    #[test]
    fn damaged_packets_are_survived(
        damages in prop::collection::vec((0_usize..6, 34_usize..140, any::<u8>(), prop::option::of(34_usize..140)), 1..30)
    ) {
        let mut node = Node::new().with_services().with_egress();
        let datagram = node.frame(0, "172.20.0.10", (1000, 80), Layer4::Udp, b"question");
        let (_, arrived) = node.pass(0, &datagram).unwrap();
        let out = node.frame(0, "198.51.100.7", (1000, 53), Layer4::Udp, b"question");
        let (_, left) = node.pass(0, &out).unwrap();
        let answer = node.frame(WORLD, "192.0.2.50", (53, 1000), Layer4::Udp, b"answer");
        let six = node.frame(0, "fd20::10", (1000, 80), tcp(SYN, 1, 0), b"");
        let of_backend = node.frame(1, "10.0.0.1", (0, 0), Layer4::Icmp(3, 3), &arrived[14..]);
        let of_world = node.frame(WORLD, "192.0.2.50", (0, 0), Layer4::Icmp(3, 1), &left[14..]);
        let frames = [(0, datagram), (0, out), (WORLD, answer), (0, six), (1, of_backend), (WORLD, of_world)];
        for (which, at, byte, end) in damages {
            let (from, mut frame) = frames[which].clone();
            let at = at.min(frame.len() - 1);
            frame[at] = byte;
            frame.truncate(end.unwrap_or(frame.len()));
            node.switch.send(node.ports[from], &frame);
            node.switch.settle();
            for frame in node.switch.take(node.ports[WORLD]) {
                // Nothing of IPv4 goes there as a pod.
                prop_assert!(frame[12..14] != [8, 0] || frame[26..29] != [10, 0, 0], "{frame:?}");
            }
            node.ports.clone().into_iter().for_each(|port| drop(node.switch.take(port)));
        }
    }
}

/// Without destinations a rule is for what leaves by way of the host, and neither for pods nor for the node itself.
#[test]
fn a_rule_without_destinations_is_for_what_lies_beyond() {
    let config = ControlConfig { host_network: Some("pods".to_owned()), ..ControlConfig::default() };
    let host_mac = mac(99);
    let network = r#"{"op":"network_add","name":"pods","vni":7,"ranges":["10.1.0.0/24"]}"#;
    let mut switch = Switch::with_host(config, host_mac, network);
    switch.control.set_host_addresses(vec!["203.0.113.7".parse().unwrap()]);
    let pods: Vec<PortId> = (1..=2).map(|at| switch.add_port(&format!("p{at}"), "pods", mac(at), &[]).id).collect();
    switch.ask_json(r#"{"op":"egress_set","name":"out","addresses":["192.0.2.50"]}"#).unwrap();
    let mut left = |to: &str, at: PortId| {
        let frame = packet(Ends { from: mac(1), to: GATEWAY_MAC }, "10.1.0.2", to, (1000, 53), Layer4::Udp, b"x");
        assert_eq!(switch.drop_of(pods[0], &frame), None, "{to}");
        see(&switch.take(at)[0]).source
    };
    assert_eq!(left("10.1.0.3", pods[1]), end("10.1.0.2", 1000));
    assert_eq!(left("10.1.0.1", HOST_PORT), end("10.1.0.2", 1000));
    assert_eq!(left("203.0.113.7", HOST_PORT), end("10.1.0.2", 1000));
    assert_eq!(left("198.51.100.7", HOST_PORT), end("192.0.2.50", 1000));
    let answer =
        packet(Ends { from: host_mac, to: GATEWAY_MAC }, "198.51.100.7", "192.0.2.50", (53, 1000), Layer4::Udp, b"y");
    assert_eq!(switch.drop_of(HOST_PORT, &answer), None);
    assert_eq!(see(&switch.take(pods[0])[0]).destination, end("10.1.0.2", 1000));
}

/// A sender of datagrams has no end by which it would notice that a rule came or went.
#[test]
fn datagrams_follow_the_rule() {
    let mut node = Node::new();
    let source = |node: &mut Node| {
        node.switch.pass(SECOND);
        node.send(0, "198.51.100.7", (1000, 53), Layer4::Udp, b"x").unwrap().1.source
    };
    assert_eq!(source(&mut node), end("10.0.0.1", 1000));
    let mut node = node.with_egress();
    assert_eq!(source(&mut node), end("192.0.2.50", 1000));
    node.switch.ask_json(r#"{"op":"egress_del","name":"out"}"#).unwrap();
    assert_eq!(source(&mut node), end("10.0.0.1", 1000));
}

/// After a restart nobody knows who began. A pod that serves waits for its client; one that asks goes on with its port.
#[test]
fn what_was_under_way_goes_on_as_it_did() {
    let mut node = Node::new().with_egress();
    let data = tcp(ACK, 2, 51);
    assert_eq!(node.send(0, "198.51.100.7", (80, 5000), data, b"page").err(), Some(DropReason::NoConnection));
    node.send(WORLD, "10.0.0.1", (5000, 80), data, b"more").unwrap();
    let served = node.send(0, "198.51.100.7", (80, 5000), data, b"page").unwrap();
    assert_eq!(served.1.source, end("10.0.0.1", 80));
    let asked = node.send(0, "198.51.100.7", (45_000, 443), data, b"request").unwrap();
    assert_eq!(asked.1.source, end("192.0.2.50", 45_000));
}

/// Extension headers that reach beyond the first frame: nothing behind them can be rewritten, and nothing is.
#[test]
fn headers_beyond_the_first_frame_are_refused() {
    for protocol in [99, 136] {
        let mut node = Node::new().with_egress();
        let mut frame = node.frame(0, "2001:db8::7", (1, 2), Layer4::Udp, &[0; 4500]);
        frame[20] = 60;
        for (at, next) in [(54, 60), (54 + 2048, protocol)] {
            frame[at] = next;
            frame[at + 1] = 255;
        }
        assert_eq!(node.pass(0, &frame).err(), Some(DropReason::Truncated), "{protocol}");
    }
}

/// Packets that pass after a rule is in force, and before connections are looked at, change nothing.
#[test]
fn what_passes_meanwhile_follows_the_rule_too() {
    let mut node = Node::new();
    let before = node.send(0, "198.51.100.7", (1000, 53), Layer4::Udp, b"x").unwrap();
    assert_eq!(before.1.source, end("10.0.0.1", 1000));
    let rule = r#"{"op":"egress_set","name":"out","destinations":["198.51.100.0/24"],"addresses":["192.0.2.50"]}"#;
    let request = serde_json::from_str(rule).unwrap();
    node.switch.control.handle(node.switch.now_ns, request, &mut node.switch.backend).unwrap();
    node.switch.pass(SECOND);
    for _ in 0..3 {
        node.send(0, "198.51.100.7", (1000, 53), Layer4::Udp, b"x").unwrap();
        assert_eq!(node.answer(&before, Layer4::Udp, b"y").unwrap().0, 0);
    }
    assert!(node.switch.control.settle_connections(&mut node.switch.backend));
    node.switch.pass(1);
    assert_eq!(node.answer(&before, Layer4::Udp, b"y").unwrap().0, 0, "answers pass until it speaks again");
    let after = node.send(0, "198.51.100.7", (1000, 53), Layer4::Udp, b"x").unwrap();
    assert_eq!(after.1.source, end("192.0.2.50", 1000));
    assert_eq!(node.answer(&after, Layer4::Udp, b"y").unwrap().1.destination, end("10.0.0.1", 1000));
    node.switch.pass(6 * SECOND);
    assert_eq!(node.answer(&before, Layer4::Udp, b"y").err(), Some(DropReason::NoConnection), "not by both ways");
}
