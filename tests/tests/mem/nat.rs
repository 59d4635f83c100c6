//! Translated connections: services, and addresses to leave with. What leaves is read by smoltcp, checksums too.
//!
//! Pods `a` to `d` are 10.0.0.1 to 10.0.0.4 and fd00::1 to fd00::4; the world is 198.51.100.7 and 2001:db8::7, a port as well.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use proptest::prelude::*;
use smoltcp::wire::{
    EthernetFrame, EthernetProtocol, Icmpv4Packet, Icmpv6Packet, IpProtocol, Ipv4Packet, Ipv6Packet, TcpPacket,
    UdpPacket,
};
use vswitch_api::{Answer, ConnectionFilter, ConnectionInfo, ErrorCode, PolicyDocument, PortSpec, Request};
use vswitch_dataplane::DropReason;
use vswitch_dataplane::connection::ConnectionConfig;
use vswitch_net::{GATEWAY_MAC, PortId, checksum};
use vswitch_tests::frames::{Ends, Layer4, cut, packet, partial};
use vswitch_tests::mem::Switch;

use super::mac;

const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

const SECOND: u64 = 1_000_000_000;

/// The world's port, and its number.
const WORLD: usize = 4;

/// A switch with four pods and the world.
struct Node {
    switch: Switch,
    ports: Vec<PortId>,
    addresses: Vec<[String; 2]>,
}

/// What a frame says.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Seen {
    source: (IpAddr, u16),
    destination: (IpAddr, u16),
    /// Layer 4 and behind.
    body: Vec<u8>,
}

impl Node {
    fn new() -> Node {
        let mut switch = Switch::with_connections(ConnectionConfig { seed: 11, ..ConnectionConfig::default() });
        switch.ask_json(r#"{"op":"network_add","name":"pods","vni":7}"#).unwrap();
        let mut addresses: Vec<_> = (1..=4).map(|at| [format!("10.0.0.{at}"), format!("fd00::{at}")]).collect();
        addresses.push(["198.51.100.7".to_owned(), "2001:db8::7".to_owned()]);
        let ports = addresses.iter().zip(["a", "b", "c", "d", "world"]).enumerate().map(|(at, (own, name))| {
            let mut spec = PortSpec::new(name, mac(at as u8 + 1));
            spec.network = Some("pods".to_owned());
            spec.addresses = own.iter().map(|address| address.parse().unwrap()).collect();
            spec.labels.insert("pod".to_owned(), name.to_owned());
            let Answer::Port(info) = switch.ask(Request::PortAdd(spec)) else { panic!("no port") };
            info.id
        });
        let ports = ports.collect();
        Node { switch, ports, addresses }
    }

    fn service(&mut self, name: &str, at: &str, port: u16, protocol: &str, backends: &[&str]) {
        let backends: Vec<String> = backends.iter().map(|end| format!("\"{end}\"")).collect();
        let json = format!(
            r#"{{"op":"service_set","services":[{{"name":"{name}","address":"{at}","port":{port},"protocol":"{protocol}","backends":[{}]}}]}}"#,
            backends.join(",")
        );
        self.switch.ask_json(&json).unwrap();
    }

    /// Two services at 172.20.0.10 and fd20::10, of TCP, UDP and SCTP each, port 80, answered by `b` at 8080.
    fn with_services(mut self) -> Node {
        for protocol in ["tcp", "udp", "sctp"] {
            self.service(&format!("four-{protocol}"), "172.20.0.10", 80, protocol, &["10.0.0.2:8080"]);
            self.service(&format!("six-{protocol}"), "fd20::10", 80, protocol, &["[fd00::2]:8080"]);
        }
        self
    }

    /// All pods go to the world with 192.0.2.50 and 2001:db8:50::1.
    fn with_egress(mut self) -> Node {
        self.switch
            .ask_json(
                r#"{"op":"egress_set","name":"out","sources":["10.0.0.0/8","fd00::/8"],
                   "destinations":["198.51.100.0/24","2001:db8::/48"],"addresses":["192.0.2.50","2001:db8:50::1"]}"#,
            )
            .unwrap();
        self
    }

    fn own(&self, at: usize, is_v6: bool) -> String {
        self.addresses[at][usize::from(is_v6)].clone()
    }

    fn frame(&self, from: usize, to: &str, ports: (u16, u16), layer4: Layer4, payload: &[u8]) -> Vec<u8> {
        let ends = Ends { from: mac(from as u8 + 1), to: GATEWAY_MAC };
        packet(ends, &self.own(from, to.contains(':')), to, ports, layer4, payload)
    }

    /// Sends a frame and gives what came out, and where.
    fn pass(&mut self, from: usize, frame: &[u8]) -> Result<(usize, Vec<u8>), DropReason> {
        if let Some(reason) = self.switch.drop_of(self.ports[from], frame) {
            // The switch may have told who sent it.
            self.switch.take(self.ports[from]);
            return Err(reason);
        }
        let mut out = (0..self.ports.len()).flat_map(|at| {
            self.switch.take(self.ports[at]).into_iter().map(move |frame| (at, frame)).collect::<Vec<_>>()
        });
        let first = out.next().expect("a packet");
        assert!(out.next().is_none(), "one packet in, one packet out");
        Ok(first)
    }

    fn send(
        &mut self,
        from: usize,
        to: &str,
        ports: (u16, u16),
        layer4: Layer4,
        payload: &[u8],
    ) -> Result<(usize, Seen), DropReason> {
        let frame = self.frame(from, to, ports, layer4, payload);
        self.pass(from, &frame).map(|(at, frame)| (at, see(&frame)))
    }

    /// The answer to what came out, sent by who got it.
    fn answer(&mut self, to: &(usize, Seen), layer4: Layer4, payload: &[u8]) -> Result<(usize, Seen), DropReason> {
        let (at, Seen { source, destination, .. }) = to;
        self.send(*at, &source.0.to_string(), (destination.1, source.1), layer4, payload)
    }

    fn connections(&mut self) -> Vec<ConnectionInfo> {
        let request = Request::ConnectionList { filter: ConnectionFilter::default(), limit: 100 };
        let Answer::Connections(info) = self.switch.ask(request) else { panic!("no connections") };
        info.connections
    }

    /// Sweeps the whole table as often as an alias may survive.
    fn sweep(&mut self) {
        let (now_ns, connections) = (self.switch.now_ns, self.switch.backend.connections.clone());
        for shard in (0..connections.shards()).chain(0..connections.shards()) {
            connections.sweep(now_ns, shard);
        }
    }

    fn apply(&mut self, text: &str) {
        let document = PolicyDocument { file: "policy.yaml".to_owned(), text: text.to_owned() };
        self.switch.ask(Request::PolicyApply { documents: vec![document], dry_run: false });
    }
}

/// Reads a frame and makes sure that every checksum is right.
fn see(frame: &[u8]) -> Seen {
    let ethernet = EthernetFrame::new_checked(frame).unwrap();
    let (source, destination, protocol, body): (IpAddr, IpAddr, _, Vec<u8>) = match ethernet.ethertype() {
        EthernetProtocol::Ipv4 => {
            let ip = Ipv4Packet::new_checked(ethernet.payload()).unwrap();
            assert!(ip.verify_checksum(), "IP checksum");
            (ip.src_addr().into(), ip.dst_addr().into(), ip.next_header(), ip.payload().to_vec())
        }
        _ => {
            let ip = Ipv6Packet::new_checked(ethernet.payload()).unwrap();
            (ip.src_addr().into(), ip.dst_addr().into(), ip.next_header(), ip.payload().to_vec())
        }
    };
    let (from, to) = (source.into(), destination.into());
    let ports = match protocol {
        IpProtocol::Udp => {
            let udp = UdpPacket::new_checked(&body).unwrap();
            assert!(udp.verify_checksum(&from, &to), "UDP checksum");
            (udp.src_port(), udp.dst_port())
        }
        IpProtocol::Tcp => {
            let tcp = TcpPacket::new_checked(&body).unwrap();
            assert!(tcp.verify_checksum(&from, &to), "TCP checksum");
            (tcp.src_port(), tcp.dst_port())
        }
        IpProtocol::Icmp => {
            assert!(Icmpv4Packet::new_checked(&body).unwrap().verify_checksum(), "ICMP checksum");
            (word(&body, 4), word(&body, 4))
        }
        IpProtocol::Icmpv6 => {
            let (IpAddr::V6(from), IpAddr::V6(to)) = (source, destination) else { panic!() };
            assert!(Icmpv6Packet::new_checked(&body).unwrap().verify_checksum(&from, &to), "ICMPv6 checksum");
            (word(&body, 4), word(&body, 4))
        }
        _ => (word(&body, 0), word(&body, 2)),
    };
    Seen { source: (source, ports.0), destination: (destination, ports.1), body }
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn end(address: &str, port: u16) -> (IpAddr, u16) {
    (address.parse().unwrap(), port)
}

fn tcp(flags: u8, seq: u32, ack: u32) -> Layer4 {
    Layer4::Tcp { flags, seq, ack }
}

/// The service's address and its backend's, of both families.
const FAMILIES: [(&str, &str, &str); 2] = [("172.20.0.10", "10.0.0.1", "10.0.0.2"), ("fd20::10", "fd00::1", "fd00::2")];

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

/// The obvious way (RFC 9260 appendix A), bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 })
    })
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
    // Other ports of the address are nobody's.
    assert_eq!(node.send(0, "172.20.0.11", (1000, 81), tcp(SYN, 1, 0), b"").err(), Some(DropReason::NoRoute));
}

#[test]
fn connections_outlive_a_change_and_datagrams_follow_it() {
    let mut node = Node::new().with_services();
    let first = node.send(0, "172.20.0.10", (1000, 80), tcp(SYN, 1, 0), b"").unwrap();
    node.answer(&first, tcp(SYN | ACK, 50, 2), b"").unwrap();
    node.send(0, "172.20.0.10", (1000, 80), tcp(ACK, 2, 51), b"").unwrap();
    node.send(0, "172.20.0.10", (1000, 80), Layer4::Udp, b"x").unwrap();
    for protocol in ["tcp", "udp"] {
        node.service(&format!("four-{protocol}"), "172.20.0.10", 80, protocol, &["10.0.0.3:9090"]);
    }
    let stays = node.send(0, "172.20.0.10", (1000, 80), tcp(ACK, 2, 51), b"still").unwrap();
    assert_eq!((stays.0, stays.1.destination), (1, end("10.0.0.2", 8080)));
    let new = node.send(0, "172.20.0.10", (1001, 80), tcp(SYN, 1, 0), b"").unwrap();
    assert_eq!((new.0, new.1.destination), (2, end("10.0.0.3", 9090)));
    let moved = node.send(0, "172.20.0.10", (1000, 80), Layer4::Udp, b"x").unwrap();
    assert_eq!((moved.0, moved.1.destination), (2, end("10.0.0.3", 9090)));
    let Answer::Services { services } = node.switch.ask_json(r#"{"op":"service_list"}"#).unwrap() else { panic!() };
    let tcp_now = services.iter().find(|service| service.spec.name == "four-tcp").unwrap();
    assert_eq!(tcp_now.connections, [1], "of its backends now");
    node.switch.ask_json(r#"{"op":"service_del","names":["four-tcp","four-udp"]}"#).unwrap();
    let stays = node.send(0, "172.20.0.10", (1000, 80), tcp(ACK, 7, 51), b"still").unwrap();
    assert_eq!(stays.0, 1);
    assert_eq!(node.send(0, "172.20.0.10", (1000, 80), Layer4::Udp, b"x").err(), Some(DropReason::NoRoute));
    assert_eq!(node.send(0, "172.20.0.10", (1002, 80), tcp(SYN, 1, 0), b"").err(), Some(DropReason::NoRoute));
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

#[test]
fn bad_input_is_refused_with_a_remedy() {
    let mut node = Node::new();
    node.switch.ask_json(r#"{"op":"network_add","name":"lan","vni":8,"mode":"bridged"}"#).unwrap();
    node.switch
        .ask_json(r#"{"op":"network_add","name":"sub","vni":9,"subnets":["10.9.0.0/16"],"services":["172.21.0.0/16"]}"#)
        .unwrap();
    node.service("taken", "172.20.0.10", 80, "tcp", &["10.0.0.2:80"]);
    let service = |more: &str| format!(r#"{{"op":"service_set","services":[{{"name":"x",{more}}}]}}"#);
    let egress = |more: &str| format!(r#"{{"op":"egress_set","name":"x",{more}}}"#);
    let cases = [
        (service(r#""address":"172.20.0.9","port":0"#), "0 is no port"),
        (service(r#""address":"172.20.0.10","port":80"#), "another service's"),
        (service(r#""address":"224.0.0.1","port":80"#), "unicast"),
        (service(r#""address":"10.0.0.1","port":80"#), "a pod's"),
        (service(r#""address":"10.9.0.1","port":80,"network":"sub""#), "lies in 10.9.0.0/16"),
        (service(r#""address":"172.20.0.9","port":80,"network":"lan""#), "is bridged"),
        (service(r#""address":"172.20.0.9","port":80,"network":"sub""#), "none of the network's `services`"),
        (
            r#"{"op":"network_add","name":"y","vni":10,"services":["10.9.0.0/16"],"ranges":["10.9.1.0/24"]}"#
                .to_owned(),
            "overlaps",
        ),
        (
            r#"{"op":"network_add","name":"y","vni":10,"services":["10.9.0.0/16"],"mode":"bridged"}"#.to_owned(),
            "routed networks",
        ),
        (service(r#""address":"172.20.0.9","port":80,"network":"no""#), "no network"),
        (service(r#""address":"172.20.0.9","port":80,"backends":["10.0.0.2:0"]"#), "0 is no port"),
        (service(r#""address":"172.20.0.9","port":80,"backends":["[fd00::2]:80"]"#), "another family"),
        (service(r#""address":"172.20.0.9","port":80,"backends":["10.0.0.2:8","10.0.0.2:8"]"#), "twice"),
        (service(r#""address":"172.20.0.9","port":80,"backends":["172.20.0.9:8"]"#), "own address"),
        (r#"{"op":"service_del","names":["taken","gone"]}"#.to_owned(), "no service \"gone\""),
        (r#"{"op":"service_set","services":[{"name":"a b","address":"172.20.0.9","port":1}]}"#.to_owned(), "no name"),
        (egress(r#""addresses":[]"#), "at least one"),
        (egress(r#""addresses":["192.0.2.1","192.0.2.1"]"#), "twice"),
        (egress(r#""addresses":["10.0.0.1"]"#), "is a pod's"),
        (egress(r#""addresses":["192.0.2.1"],"network":"lan""#), "is bridged"),
        (egress(r#""addresses":["192.0.2.1"],"sources":["10.0.0.1/8"]"#), "bits set after its length"),
        (r#"{"op":"egress_del","name":"gone"}"#.to_owned(), "no egress rule"),
        (r#"{"op":"network_del","name":"pods"}"#.to_owned(), "ports"),
        (r#"{"op":"policy_explain","from":"10.0.0.1","to":"172.20.0.10","port":"tcp/80"}"#.to_owned(), "10.0.0.2:80"),
    ];
    for (json, message) in cases {
        let error = node.switch.ask_json(&json).expect_err(&json);
        assert!(error.message.contains(message), "{json}: {error}");
        assert_ne!(error.code, ErrorCode::BadRequest);
    }
    // Whole or not at all.
    let two = r#"{"op":"service_set","services":[{"name":"good","address":"172.20.0.20","port":80},{"name":"bad","address":"172.20.0.20","port":80}]}"#;
    assert!(node.switch.ask_json(two).is_err());
    let Answer::Services { services } = node.switch.ask_json(r#"{"op":"service_list"}"#).unwrap() else { panic!() };
    assert_eq!(services.len(), 1);
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

#[test]
fn services_and_rules_outlive_a_restart() {
    let mut node = Node::new().with_services().with_egress();
    let state = node.switch.control.state("boot");
    let mut next = Switch::new();
    let lost = next.control.restore(state, &mut next.backend);
    assert_eq!(lost, [] as [&str; 0]);
    for question in [r#"{"op":"service_list"}"#, r#"{"op":"egress_list"}"#] {
        assert_eq!(next.ask_json(question).unwrap(), node.switch.ask_json(question).unwrap());
    }
}
