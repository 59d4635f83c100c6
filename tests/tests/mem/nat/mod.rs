//! Translated connections: services, and addresses to leave with. What leaves is read by smoltcp, checksums too.
//!
//! Pods `a` to `d` are 10.0.0.1 to 10.0.0.4 and fd00::1 to fd00::4; the world is 198.51.100.7 and 2001:db8::7, a port as well.

mod alike;
mod egress;
mod requests;
mod services;

use std::net::IpAddr;

use smoltcp::wire::{
    EthernetFrame, EthernetProtocol, Icmpv4Packet, Icmpv6Packet, IpProtocol, Ipv4Packet, Ipv6Packet, TcpPacket,
    UdpPacket,
};
use vswitch_api::{Answer, ConnectionFilter, ConnectionInfo, PolicyDocument, PortSpec, Request};
use vswitch_dataplane::DropReason;
use vswitch_dataplane::connection::ConnectionConfig;
use vswitch_net::{GATEWAY_MAC, PortId};
use vswitch_tests::frames::{Ends, Layer4, packet};
use vswitch_tests::mem::Switch;

use super::mac;

const FIN: u8 = 1;
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
        Node::with(ConnectionConfig { seed: 11, ..ConnectionConfig::default() })
    }

    fn with(config: ConnectionConfig) -> Node {
        let mut switch = Switch::with_connections(config);
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
