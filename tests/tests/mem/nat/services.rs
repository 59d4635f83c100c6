//! Services: who answers, and who is seen.

use vswitch_api::{Answer, PortSpec, Request};
use vswitch_dataplane::DropReason;
use vswitch_net::{GATEWAY_MAC, checksum};
use vswitch_tests::frames::{Ends, Layer4, crc32c, cut, packet, partial};

use super::{ACK, FAMILIES, Node, RST, SYN, WORLD, end, mac, see, tcp, word};

#[test]
fn a_connection_through_a_service() {
    for (service, client, backend) in FAMILIES {
        let mut node = Node::new().with_services();
        let syn = node.send(0, service, (1000, 80), tcp(SYN, 1, 0), b"").unwrap();
        assert_eq!((syn.0, syn.1.source, syn.1.destination), (1, end(client, 1000), end(backend, 8080)));
        let answer = node.answer(&syn, tcp(SYN | ACK, 50, 2), b"").unwrap();
        assert_eq!((answer.0, answer.1.source, answer.1.destination), (0, end(service, 80), end(client, 1000)));
        node.send(0, service, (1000, 80), tcp(ACK, 2, 51), b"").unwrap();
        let hits = node.switch.counters().flow_hits;
        for turn in 0..3_u32 {
            let asked = node.send(0, service, (1000, 80), tcp(ACK, 2 + turn * 8, 51 + turn * 6), b"question").unwrap();
            assert_eq!((asked.0, asked.1.destination), (1, end(backend, 8080)));
            let told = node.answer(&asked, tcp(ACK, 51 + turn * 6, 10 + turn * 8), b"answer").unwrap();
            assert_eq!((told.0, told.1.source), (0, end(service, 80)));
            assert!(told.1.body.ends_with(b"answer"));
        }
        assert!(node.switch.counters().flow_hits >= hits + 4, "by the flow table's way");
        let all = node.connections();
        assert_eq!(all.len(), 1);
        assert_eq!((&all[0].state[..], all[0].leaves_as.is_some()), ("established", true));
        // Nobody else may speak as the service, or to its client as the backend does, on other ports.
        let forged = node.send(2, client, (8080, 1000), tcp(ACK, 51, 10), b"x");
        assert_eq!(forged.map(|(at, seen)| (at, seen.source.0)), Ok((0, end(&node.own(2, client.contains(':')), 0).0)));
    }
}

#[test]
fn datagrams_and_sctp_and_what_the_device_completes() {
    for (service, client, backend) in FAMILIES {
        let mut node = Node::new().with_services();
        let asked = node.send(0, service, (1000, 80), Layer4::Udp, b"odd").unwrap();
        assert_eq!((asked.0, asked.1.destination), (1, end(backend, 8080)));
        let told = node.answer(&asked, Layer4::Udp, b"answers").unwrap();
        assert_eq!((told.0, told.1.source, told.1.destination), (0, end(service, 80), end(client, 1000)));
        // A checksum that is left to the device is of the new addresses.
        let left = partial(node.frame(0, service, (1001, 80), Layer4::Udp, b"hello"));
        let (at, out) = node.pass(0, &left).unwrap();
        assert_eq!((at, see(&out).destination), (1, end(backend, 8080)));
        // SCTP has a CRC, and so it is computed anew when ports change.
        let init = node.send(0, service, (1000, 80), Layer4::Sctp(1), b"").unwrap();
        assert_eq!((init.0, init.1.source, init.1.destination), (1, end(client, 1000), end(backend, 8080)));
        let mut body = init.1.body.clone();
        let crc = body[8..12].to_vec();
        body[8..12].fill(0);
        assert_eq!(crc, crc32c(&body).to_le_bytes());
        let told = node.answer(&init, Layer4::Sctp(2), b"").unwrap();
        assert_eq!((told.0, told.1.source), (0, end(service, 80)));
    }
    // IPv4 datagrams may have no checksum (RFC 768).
    let mut node = Node::new().with_services();
    let mut frame = node.frame(0, "172.20.0.10", (1000, 80), Layer4::Udp, b"hello");
    frame[40..42].fill(0);
    let (_, out) = node.pass(0, &frame).unwrap();
    assert_eq!((word(&out, 36), word(&out, 40)), (8080, 0));
}

#[test]
fn policies_speak_of_backends() {
    let mut node = Node::new().with_services();
    node.apply(
        "
apiVersion: vswitch.io/v1alpha1
kind: SwitchPolicy
metadata: {name: b}
spec:
  subject: {pods: {namespaceSelector: {}, podSelector: {matchLabels: {pod: b}}}}
  ingress:
  - action: Allow
    from: [{pods: {namespaceSelector: {}, podSelector: {matchLabels: {pod: a}}}}]
    protocols: [{tcp: {destinationPort: {number: 8080}}}, {udp: {destinationPort: {number: 8080}}}]
  - action: Deny
",
    );
    for (service, ..) in FAMILIES {
        let syn = node.send(0, service, (1000, 80), tcp(SYN, 1, 0), b"").unwrap();
        assert_eq!(syn.0, 1);
        node.answer(&syn, tcp(SYN | ACK, 50, 2), b"").unwrap();
        assert_eq!(node.send(2, service, (1000, 80), tcp(SYN, 1, 0), b"").err(), Some(DropReason::PolicyDenied));
        assert_eq!(node.send(2, service, (1000, 80), Layer4::Udp, b"x").err(), Some(DropReason::PolicyDenied));
        // What belongs to no connection is none, and leaves with nobody's address.
        assert_eq!(node.send(0, service, (1001, 80), tcp(ACK, 9, 9), b"x").err(), Some(DropReason::NoConnection));
        assert_eq!(node.send(0, service, (1001, 80), tcp(RST, 9, 9), b"").err(), Some(DropReason::NoConnection));
    }
    // Events name the pod that answers.
    let Answer::Events { events, .. } = node.switch.ask_json(r#"{"op":"observe"}"#).unwrap() else { panic!() };
    assert!(events.iter().any(|event| event.destination == "10.0.0.2:8080"), "{events:?}");
    // A stray reset is no reason to send anything anywhere, policies or not.
    let mut node = Node::new().with_services();
    assert_eq!(node.send(0, "172.20.0.10", (1001, 80), tcp(RST, 9, 9), b"").err(), Some(DropReason::NoConnection));
}

#[test]
fn errors_quote_what_their_receiver_sent() {
    for (service, client, backend) in FAMILIES {
        let mut node = Node::new().with_services().with_egress();
        let is_v6 = service.contains(':');
        let (kind, code) = if is_v6 { (1, 4) } else { (3, 3) };
        let unreachable = Layer4::Icmp(kind, code);
        let l3 = if is_v6 { 40 } else { 20 };
        // From the backend, about a datagram of the client.
        let (_, arrived) = node.pass(0, &node.frame(0, service, (1000, 80), Layer4::Udp, b"question")).unwrap();
        let (at, error) = node.send(1, client, (0, 0), unreachable, &arrived[14..]).unwrap();
        assert_eq!((at, error.source.0, error.destination.0), (0, end(service, 0).0, end(client, 0).0));
        let sent = node.frame(0, service, (1000, 80), Layer4::Udp, b"question");
        assert_quotes(&error.body[8..], &sent[14..], is_v6);
        // From the client, about an answer of the backend.
        let (_, answer) = node.pass(1, &node.frame(1, client, (8080, 1000), Layer4::Udp, b"answer")).unwrap();
        let (at, error) = node.send(0, service, (0, 0), unreachable, &answer[14..]).unwrap();
        assert_eq!((at, error.source.0, error.destination.0), (1, end(client, 0).0, end(backend, 0).0));
        assert_quotes(&error.body[8..], &node.frame(1, client, (8080, 1000), Layer4::Udp, b"answer")[14..], is_v6);
        // From the world, about a ping and a datagram that left with another address.
        let world = node.own(WORLD, is_v6);
        let own = if is_v6 { "2001:db8:50::1" } else { "192.0.2.50" };
        let ping = Layer4::Icmp(if is_v6 { 128 } else { 8 }, 0);
        for (layer4, ports) in [(Layer4::Udp, (1000, 53)), (ping, (77, 1))] {
            let sent = node.frame(0, &world, ports, layer4, b"hello, world");
            let (at, arrived) = node.pass(0, &sent).unwrap();
            assert_eq!((at, see(&arrived).source.0), (WORLD, end(own, 0).0));
            let (at, error) = node.send(WORLD, own, (0, 0), unreachable, &arrived[14..]).unwrap();
            assert_eq!((at, error.source.0, error.destination.0), (0, end(&world, 0).0, end(client, 0).0));
            assert_quotes(&error.body[8..], &sent[14..], is_v6);
            // As much as an error must have, and less.
            let (_, error) = node.send(WORLD, own, (0, 0), unreachable, &arrived[14..14 + l3 + 8]).unwrap();
            assert_eq!(error.body[8 + l3..8 + l3 + 4], sent[14 + l3..14 + l3 + 4]);
            assert!(node.send(WORLD, own, (0, 0), unreachable, &arrived[14..14 + l3 + 2]).is_err());
        }
    }
}

/// A quoted packet is as it was sent, one hop later.
fn assert_quotes(quote: &[u8], sent: &[u8], is_v6: bool) {
    let mut sent = sent.to_vec();
    if is_v6 {
        sent[7] -= 1;
    } else {
        sent[8] -= 1;
        sent[10..12].fill(0);
        let sum = checksum::finish(checksum::sum(&sent[..20]));
        sent[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    assert_eq!(quote, sent);
}

#[test]
fn who_reaches_himself_by_a_service() {
    for (service, _, backend) in FAMILIES {
        let mut node = Node::new().with_services();
        let syn = node.send(1, service, (1000, 80), tcp(SYN, 1, 0), b"").unwrap();
        assert_eq!((syn.0, syn.1.source, syn.1.destination), (1, end(service, 1000), end(backend, 8080)));
        let answer = node.answer(&syn, tcp(SYN | ACK, 50, 2), b"").unwrap();
        assert_eq!((answer.0, answer.1.source, answer.1.destination), (1, end(service, 80), end(backend, 1000)));
    }
}

#[test]
fn a_service_without_backends_refuses() {
    let mut node = Node::new();
    node.service("nobody", "172.20.0.11", 80, "tcp", &[]);
    let frame = node.frame(0, "172.20.0.11", (1000, 80), tcp(SYN, 1, 0), b"");
    assert_eq!(node.switch.drop_of(node.ports[0], &frame), Some(DropReason::NoBackend));
    let told = node.switch.take(node.ports[0]);
    let error = see(&told[0]);
    assert_eq!((error.body[0], error.body[1]), (3, 3), "port unreachable");
    assert_eq!(error.body[8..8 + 40], frame[14..54]);
    // Other ports of the address are no service's.
    assert_eq!(node.send(0, "172.20.0.11", (1000, 81), tcp(SYN, 1, 0), b"").err(), Some(DropReason::NoService));
}

#[test]
fn fragments_are_translated_like_their_first() {
    let mut node = Node::new().with_services();
    let whole = node.frame(0, "172.20.0.10", (1000, 80), Layer4::Udp, &[7; 100]);
    let mut out = Vec::new();
    for (from, to) in [(0, 64), (64, 108)] {
        let (at, part) = node.pass(0, &cut(&whole, from, to, 1)).unwrap();
        assert_eq!(at, 1);
        assert_eq!(checksum::fold(checksum::sum(&part[14..34])), 0xffff);
        assert_eq!(part[30..34], [10, 0, 0, 2]);
        out.extend_from_slice(&part[34..]);
    }
    let ends = Ends { from: mac(1), to: mac(2) };
    let direct = packet(ends, "10.0.0.1", "10.0.0.2", (1000, 8080), Layer4::Udp, &[7; 100]);
    assert_eq!(out, direct[34..], "put together, checksum and all");
}

#[test]
fn sctp_that_is_damaged_or_in_pieces_is_not_signed_anew() {
    let mut node = Node::new().with_services();
    let good = node.frame(0, "172.20.0.10", (1000, 80), Layer4::Sctp(1), &[7; 100]);
    let mut damaged = good.clone();
    damaged[60] ^= 1;
    assert_eq!(node.pass(0, &damaged).err(), Some(DropReason::BadChecksum));
    assert_eq!(node.pass(0, &cut(&good, 0, 64, 1)).err(), Some(DropReason::Untranslatable));
    let (at, out) = node.pass(0, &good).unwrap();
    assert_eq!((at, see(&out).destination), (1, end("10.0.0.2", 8080)));
}

/// A pod with two addresses is behind one port, whichever of them answers.
#[test]
fn a_backend_behind_the_port_that_asks_sees_the_service() {
    let mut node = Node::new();
    let mut spec = PortSpec::new("two", mac(9));
    spec.network = Some("pods".to_owned());
    spec.addresses = vec!["10.0.0.20".parse().unwrap(), "10.0.0.21".parse().unwrap()];
    let Answer::Port(info) = node.switch.ask(Request::PortAdd(spec)) else { panic!("no port") };
    node.service("other", "172.20.0.12", 80, "udp", &["10.0.0.21:80"]);
    let frame =
        packet(Ends { from: mac(9), to: GATEWAY_MAC }, "10.0.0.20", "172.20.0.12", (1000, 80), Layer4::Udp, b"x");
    assert_eq!(node.switch.drop_of(info.id, &frame), None);
    let seen = see(&node.switch.take(info.id)[0]);
    assert_eq!((seen.source, seen.destination), (end("172.20.0.12", 1000), end("10.0.0.21", 80)));
}
