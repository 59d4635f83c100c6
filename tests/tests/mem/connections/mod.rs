//! Connections between pods with policies: what is one, what ends one, and what only looks like one.
//!
//! `a` may open TCP and UDP port 80 of `b`, and ping it; `b` may open nothing. Each packet is one that a stack could send, or an
//! attacker.

mod others;
mod table;
mod tcp;

use vswitch_api::{Answer, ConnectionFilter, ConnectionInfo, PolicyDocument, PortSpec, Request, SenderCheck};
use vswitch_dataplane::DropReason;
use vswitch_dataplane::connection::ConnectionConfig;
use vswitch_net::{GATEWAY_MAC, PortId};
use vswitch_tests::frames::{Ends, Layer4, packet};
use vswitch_tests::mem::Switch;

use super::mac;

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const PSH: u8 = 8;
const ACK: u8 = 16;

const SECOND: u64 = 1_000_000_000;

/// `b` lets `a` in at port 80 of TCP and UDP and for pings, and may itself go nowhere.
const POLICY: &str = "
apiVersion: vswitch.io/v1alpha1
kind: SwitchPolicy
metadata: {name: b}
spec:
  subject: {pods: {namespaceSelector: {}, podSelector: {matchLabels: {pod: b}}}}
  ingress:
  - action: Allow
    from: [{pods: {namespaceSelector: {}, podSelector: {matchLabels: {pod: a}}}}]
    protocols: [{tcp: {destinationPort: {number: 80}}}, {udp: {destinationPort: {number: 80}}}, {icmp: {type: 8}}, {icmpv6: {type: 128}}]
  - action: Deny
  egress:
  - action: Deny
";

/// Two pods; numbers of packets are by `a` first.
struct Pair {
    switch: Switch,
    ports: [PortId; 2],
}

/// Who sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    A,
    B,
}

impl Pair {
    fn new(config: ConnectionConfig) -> Pair {
        let mut switch = Switch::with_connections(ConnectionConfig { seed: 11, ..config });
        switch.ask_json(r#"{"op":"network_add","name":"pods","vni":7,"subnets":["10.0.0.0/8"]}"#).unwrap();
        let ports = ["a", "b"].map(|name| {
            let number = name.as_bytes()[0] - b'a' + 1;
            let mut spec = PortSpec::new(name, mac(number));
            spec.network = Some("pods".to_owned());
            spec.addresses = vec![address(number).parse().unwrap()];
            spec.labels.insert("pod".to_owned(), name.to_owned());
            let Answer::Port(info) = switch.ask(Request::PortAdd(spec)) else { panic!("no port") };
            info.id
        });
        let mut pair = Pair { switch, ports };
        pair.apply(POLICY);
        pair
    }

    /// A third pod, which may send with any address; its label `pod` is as is said.
    fn add_router(&mut self, label: &str) -> PortId {
        let mut spec = PortSpec::new("c", mac(3));
        spec.network = Some("pods".to_owned());
        spec.addresses = vec![address(3).parse().unwrap()];
        spec.check = Some(SenderCheck::None);
        spec.labels.insert("pod".to_owned(), label.to_owned());
        let Answer::Port(info) = self.switch.ask(Request::PortAdd(spec)) else { panic!("no port") };
        info.id
    }

    fn apply(&mut self, text: &str) {
        let document = PolicyDocument { file: "policy.yaml".to_owned(), text: text.to_owned() };
        self.switch.ask(Request::PolicyApply { documents: vec![document], dry_run: false });
    }

    /// Sends a packet, `a` from port 1000 to `b`'s port 80. Why it was dropped, if it was; else it has arrived.
    fn send(&mut self, by: By, layer4: Layer4, payload: &[u8]) -> Option<DropReason> {
        self.send_ports(by, (1000, 80), layer4, payload)
    }

    fn send_ports(&mut self, by: By, ports: (u16, u16), layer4: Layer4, payload: &[u8]) -> Option<DropReason> {
        let frame = frame(by, ports, layer4, payload);
        self.send_frame(by, &frame)
    }

    fn send_frame(&mut self, by: By, frame: &[u8]) -> Option<DropReason> {
        let (from, to) = if by == By::A { (0, 1) } else { (1, 0) };
        let reason = self.switch.drop_of(self.ports[from], frame);
        let arrived = self.switch.take(self.ports[to]).len();
        assert_eq!(arrived, usize::from(reason.is_none()), "{reason:?}");
        reason
    }

    fn tcp(&mut self, by: By, flags: u8, seq: u32, ack: u32, payload: &[u8]) -> Option<DropReason> {
        self.send(by, Layer4::Tcp { flags, seq, ack }, payload)
    }

    /// Opens the connection: `a` begins at 1000, `b` at 5000.
    fn open(&mut self) {
        assert_eq!(self.tcp(By::A, SYN, 1000, 0, b""), None);
        assert_eq!(self.state(), "syn-sent");
        assert_eq!(self.tcp(By::B, SYN | ACK, 5000, 1001, b""), None);
        assert_eq!(self.state(), "syn-received");
        assert_eq!(self.tcp(By::A, ACK, 1001, 5001, b""), None);
        assert_eq!(self.state(), "established");
    }

    fn connections(&mut self) -> Vec<ConnectionInfo> {
        let request = Request::ConnectionList { filter: ConnectionFilter::default(), limit: 100 };
        let Answer::Connections(info) = self.switch.ask(request) else { panic!("no connections") };
        info.connections
    }

    /// The state of the one connection; empty if there is none.
    fn state(&mut self) -> String {
        let all = self.connections();
        assert!(all.len() <= 1, "{all:?}");
        all.first().map(|one| one.state.clone()).unwrap_or_default()
    }
}

fn address(number: u8) -> String {
    format!("10.1.0.{number}")
}

fn frame(by: By, (a, b): (u16, u16), layer4: Layer4, payload: &[u8]) -> Vec<u8> {
    let (from, to, ports) = if by == By::A { (1, 2, (a, b)) } else { (2, 1, (b, a)) };
    packet(Ends { from: mac(from), to: GATEWAY_MAC }, &address(from), &address(to), ports, layer4, payload)
}
