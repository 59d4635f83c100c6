//! Connections that look alike, begin again, or make room: whose answers are whose.

use std::collections::{HashMap, HashSet};

use vswitch_dataplane::DropReason;
use vswitch_dataplane::connection::ConnectionConfig;
use vswitch_tests::frames::Layer4;

use super::{ACK, FAMILIES, FIN, Node, RST, SECOND, SYN, Seen, WORLD, end, tcp};

/// The same addresses and ports, once by the service and once directly: no answer is taken for the other one's.
#[test]
fn connections_that_look_alike_leave_with_other_ports() {
    for (service, client, backend) in FAMILIES {
        for is_direct_first in [false, true] {
            let mut node = Node::new().with_services();
            let mut ends = [(service, 80), (backend, 8080)];
            if is_direct_first {
                ends.reverse();
            }
            let asked = ends.map(|(to, port)| node.send(0, to, (1000, port), Layer4::Udp, b"question").unwrap());
            assert!(asked.iter().all(|(at, seen)| (*at, seen.destination) == (1, end(backend, 8080))));
            assert_eq!(asked[0].1.source, end(client, 1000));
            assert_eq!(asked[1].1.source.0, end(client, 0).0);
            assert_ne!(asked[1].1.source.1, 1000);
            for turn in 0..2 {
                for ((to, port), asked) in ends.iter().zip(&asked) {
                    let told = node.answer(asked, Layer4::Udp, b"answer").unwrap();
                    assert_eq!((told.0, told.1.source), (0, end(to, *port)), "turn {turn}");
                    assert_eq!(told.1.destination, end(client, 1000));
                }
            }
            assert_eq!(node.connections().len(), 2);
        }
    }
}

/// Against a map of what left as what: answers go back to who asked, and no two connections share what answers look like.
#[test]
fn agrees_with_a_map() {
    let mut node = Node::new().with_egress();
    node.service("one", "172.20.0.10", 80, "udp", &["10.0.0.2:80", "10.0.0.3:80", "10.0.0.4:80"]);
    node.service("two", "172.20.0.11", 80, "udp", &["10.0.0.2:80", "198.51.100.7:80"]);
    let targets = [("172.20.0.10", 80), ("172.20.0.11", 80), ("10.0.0.2", 80), ("10.0.0.3", 80), ("198.51.100.7", 80)];
    // A pod, a target and a port: what it left as, and whose what left is.
    type Asked = (usize, usize, u16);
    let mut known: HashMap<Asked, (usize, Seen)> = HashMap::new();
    let mut looks: HashMap<(usize, Seen), Asked> = HashMap::new();
    let mut state = 7_u64;
    let mut dice = move |sides: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) % sides
    };
    let (mut answered, mut shifted) = (0, 0);
    for turn in 0..60_000 {
        if turn % 15_000 == 14_999 {
            // All is forgotten, and what was taken is free again.
            node.switch.pass(200 * SECOND);
            node.sweep();
            assert_eq!(node.switch.backend.connections.counts().count, 0);
            (known, looks) = (HashMap::new(), HashMap::new());
        }
        let (pod, target, port) = (dice(4) as usize, dice(5) as usize, 1000 + dice(40) as u16);
        let (to, to_port) = targets[target];
        if node.own(pod, false) == to {
            continue;
        }
        let key = (pod, target, port);
        let (at, mut seen) = node.send(pod, to, (port, to_port), Layer4::Udp, b"q").unwrap();
        seen.body.clear();
        let before = known.entry(key).or_insert_with(|| (at, seen.clone()));
        assert_eq!(*before, (at, seen.clone()), "{key:?} goes on as it began");
        let owner = looks.entry((at, seen.clone())).or_insert(key);
        assert_eq!(*owner, key, "{seen:?}");
        shifted += usize::from(seen.source.1 != port);
        if dice(2) == 0 {
            let told = node.answer(&(at, seen), Layer4::Udp, b"a").unwrap();
            assert_eq!((told.0, told.1.source), (pod, end(to, to_port)));
            assert_eq!(told.1.destination, (node.own(pod, false).parse().unwrap(), port));
            answered += 1;
        }
    }
    println!("{answered} answers went back to who asked, {shifted} packets left with another port");
    assert!(answered > 20_000 && shifted > 1_000);
}

/// After a start a backend that is the first to speak waits for its client, for a while: what it says is not taken for an
/// answer of its own address.
#[test]
fn backends_wait_for_their_clients_after_a_start() {
    let mut node = Node::new().with_services();
    node.switch.backend.connections.wait_for_clients(4 * SECOND);
    let data = tcp(ACK, 51, 2);
    assert_eq!(node.send(1, "10.0.0.1", (8080, 1000), data, b"x").err(), Some(DropReason::NoConnection));
    // Other ports, and other pods, are no service's.
    node.send(1, "10.0.0.1", (8081, 1000), data, b"x").unwrap();
    node.send(2, "10.0.0.1", (8080, 1000), data, b"x").unwrap();
    let asked = node.send(0, "172.20.0.10", (1000, 80), tcp(ACK, 2, 51), b"question").unwrap();
    let told = node.answer(&asked, data, b"answer").unwrap();
    assert_eq!((told.0, told.1.source), (0, end("172.20.0.10", 80)));
    // One that was asked directly goes on when the time is over, or its client speaks.
    assert_eq!(node.send(1, "10.0.0.1", (8080, 1001), data, b"x").err(), Some(DropReason::NoConnection));
    node.switch.pass(4 * SECOND);
    assert_eq!(node.send(1, "10.0.0.1", (8080, 1001), data, b"x").unwrap().1.source, end("10.0.0.2", 8080));
}

/// A daemon that starts again knows no connection, and goes on with the backend that the last one chose.
#[test]
fn a_client_goes_on_where_it_was() {
    let new = || {
        let mut node = Node::new();
        node.service("three", "172.20.0.10", 80, "tcp", &["10.0.0.2:80", "10.0.0.3:80", "10.0.0.4:80"]);
        node
    };
    let (mut before, mut after) = (new(), new());
    let mut chosen = HashSet::new();
    for port in 1000..1030 {
        let syn = before.send(0, "172.20.0.10", (port, 80), tcp(SYN, 1, 0), b"").unwrap();
        let data = after.send(0, "172.20.0.10", (port, 80), tcp(ACK, 2, 51), b"data").unwrap();
        assert_eq!((syn.0, syn.1.destination), (data.0, data.1.destination));
        let told = after.answer(&data, tcp(ACK, 51, 6), b"answer").unwrap();
        assert_eq!((told.0, told.1.source), (0, end("172.20.0.10", 80)));
        chosen.insert(syn.0);
    }
    assert_eq!(chosen.len(), 3);
}

/// A rule is for connections that begin: what was there, and what others begin, goes on, whether the table has translated
/// connections or not.
#[test]
fn what_was_there_goes_on() {
    for is_busy in [false, true] {
        let mut node = Node::new();
        let before = node.send(0, "198.51.100.7", (40_000, 80), tcp(SYN, 1, 0), b"").unwrap();
        node.answer(&before, tcp(SYN | ACK, 50, 2), b"").unwrap();
        let mut node = node.with_egress().with_services();
        if is_busy {
            node.send(1, "198.51.100.7", (1000, 53), Layer4::Udp, b"x").unwrap();
        }
        let on = node.send(0, "198.51.100.7", (40_000, 80), tcp(ACK, 2, 51), b"data").unwrap();
        assert_eq!(on.1.source, end("10.0.0.1", 40_000), "busy: {is_busy}");
        // The world asks a pod, whose answer is from where it was asked.
        let asked = node.send(WORLD, "10.0.0.1", (5000, 80), tcp(SYN, 1, 0), b"").unwrap();
        let told = node.answer(&asked, tcp(SYN | ACK, 50, 2), b"").unwrap();
        assert_eq!((told.0, told.1.source), (WORLD, end("10.0.0.1", 80)), "busy: {is_busy}");
    }
}

#[test]
fn who_has_more_than_his_share_takes_no_room_from_others() {
    let config = ConnectionConfig { seed: 11, limit: 4096, port_limit: 100, ..ConnectionConfig::default() };
    let mut node = Node::with(config).with_services().with_egress();
    let mut refused = 0;
    for number in 0..20_000_u32 {
        let (port, to) = (1 + (number % 60_000) as u16, if number % 2 == 0 { "172.20.0.10" } else { "198.51.100.7" });
        refused +=
            usize::from(node.send(0, to, (port, 80), Layer4::Udp, b"").err() == Some(DropReason::ConnectionsFull));
    }
    assert!(refused > 19_000);
    for pod in [2, 3] {
        for port in 2000..2040 {
            node.send(pod, "172.20.0.10", (port, 80), tcp(SYN, 1, 0), b"").unwrap();
            let left = node.send(pod, "198.51.100.7", (port, 81), tcp(SYN, 1, 0), b"").unwrap();
            assert!(pod == 3 || left.1.source.1 == port, "no port is taken by what never began");
        }
    }
}

/// A connection makes room for another one, which leaves as it did: the flow table must not go on for the first.
#[test]
fn a_port_that_is_given_away_is_nobody_elses() {
    let config = ConnectionConfig { seed: 11, limit: 1, ..ConnectionConfig::default() };
    let mut node = Node::with(config).with_egress();
    let world = "198.51.100.7";
    let first = node.send(0, world, (1000, 53), Layer4::Udp, b"x").unwrap();
    assert_eq!(node.send(0, world, (1000, 53), Layer4::Udp, b"x").unwrap(), first, "a hit");
    let second = node.send(1, world, (1000, 53), Layer4::Udp, b"x").unwrap();
    let told = node.answer(&second, Layer4::Udp, b"y").unwrap();
    assert_eq!(told.0, 1);
    // The first begins again, and not as the second, which has been answered.
    let again = node.send(0, world, (1000, 53), Layer4::Udp, b"x");
    assert_ne!(again.as_ref().map(|(_, seen)| seen.source).ok(), Some(second.1.source), "{again:?}");
    assert_eq!(node.answer(&second, Layer4::Udp, b"y").unwrap().0, 1);
}

#[test]
fn a_port_that_is_used_again_begins_a_new_connection() {
    for ending in [FIN | ACK, RST | ACK] {
        let mut node = Node::new().with_services();
        let syn = node.send(0, "172.20.0.10", (1000, 80), tcp(SYN, 1, 0), b"").unwrap();
        node.answer(&syn, tcp(SYN | ACK, 50, 2), b"").unwrap();
        node.send(0, "172.20.0.10", (1000, 80), tcp(ACK, 2, 51), b"").unwrap();
        node.answer(&syn, tcp(ending, 51, 2), b"").unwrap();
        node.send(0, "172.20.0.10", (1000, 80), tcp(ending, 2, 52), b"").unwrap();
        node.service("four-tcp", "172.20.0.10", 80, "tcp", &["10.0.0.3:9090"]);
        let again = node.send(0, "172.20.0.10", (1000, 80), tcp(SYN, 900_000, 0), b"").unwrap();
        assert_eq!((again.0, again.1.destination), (2, end("10.0.0.3", 9090)));
        let told = node.answer(&again, tcp(SYN | ACK, 5, 900_001), b"").unwrap();
        assert_eq!((told.0, told.1.source, told.1.destination), (0, end("172.20.0.10", 80), end("10.0.0.1", 1000)));
    }
}
