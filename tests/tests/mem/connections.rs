//! Connections between pods with policies: what is one, what ends one, and what only looks like one.
//!
//! `a` may open TCP and UDP port 80 of `b`, and ping it; `b` may open nothing. Each packet is one that a stack could send, or an
//! attacker.

use std::net::IpAddr;

use vswitch_api::{Answer, ConnectionFilter, ConnectionInfo, PolicyDocument, PortSpec, Request};
use vswitch_dataplane::DropReason;
use vswitch_dataplane::connection::{ConnectionConfig, PickUp};
use vswitch_net::{GATEWAY_MAC, PortId, checksum};
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

#[test]
fn a_connection_opens_talks_and_closes() {
    let mut pair = Pair::new(ConnectionConfig::default());
    assert_eq!(pair.tcp(By::B, SYN, 1, 0, b""), Some(DropReason::PolicyDenied), "not that way round");
    pair.open();
    for _ in 0..3 {
        assert_eq!(pair.tcp(By::A, ACK | PSH, 1001, 5001, b"question"), None);
        assert_eq!(pair.tcp(By::B, ACK | PSH, 5001, 1009, b"answer"), None);
    }
    // Half closed: the other side goes on.
    assert_eq!(pair.tcp(By::A, FIN | ACK, 1009, 5007, b""), None);
    assert_eq!(pair.state(), "fin-wait");
    pair.switch.pass(100 * SECOND);
    assert_eq!(pair.tcp(By::B, ACK | PSH, 5007, 1010, b"still here"), None);
    assert_eq!(pair.tcp(By::B, FIN | ACK, 5017, 1010, b""), None);
    assert_eq!(pair.state(), "time-wait");
    assert_eq!(pair.tcp(By::A, ACK, 1010, 5018, b""), None);
    // The last acknowledgement was lost: the FIN comes again.
    pair.switch.pass(50 * SECOND);
    assert_eq!(pair.tcp(By::B, FIN | ACK, 5017, 1010, b""), None);
    assert_eq!(pair.tcp(By::A, ACK, 1010, 5018, b""), None);
    pair.switch.pass(61 * SECOND);
    assert_eq!(pair.connections(), []);
    assert_eq!(pair.tcp(By::B, ACK, 5018, 1010, b"late"), Some(DropReason::NoConnection));
}

#[test]
fn a_port_in_time_wait_is_used_again_and_judged_again() {
    let mut pair = Pair::new(ConnectionConfig::default());
    pair.open();
    pair.tcp(By::A, FIN | ACK, 1001, 5001, b"");
    pair.tcp(By::B, FIN | ACK, 5001, 1002, b"");
    assert_eq!(pair.state(), "time-wait");
    assert_eq!(pair.tcp(By::A, SYN, 900_000, 0, b""), None);
    assert_eq!(pair.state(), "syn-sent");
    assert_eq!(pair.tcp(By::B, SYN | ACK, 700_000, 900_001, b""), None);
    assert_eq!(pair.tcp(By::A, ACK, 900_001, 700_001, b""), None);
    assert_eq!(pair.state(), "established");
    pair.tcp(By::A, FIN | ACK, 900_001, 700_001, b"");
    pair.tcp(By::B, FIN | ACK, 700_001, 900_002, b"");
    // From the other side it would be another connection, which is not allowed.
    assert_eq!(pair.tcp(By::B, SYN, 1, 0, b""), Some(DropReason::PolicyDenied));
}

#[test]
fn two_syns_that_cross_are_one_connection() {
    let mut pair = Pair::new(ConnectionConfig::default());
    assert_eq!(pair.tcp(By::A, SYN, 1000, 0, b""), None);
    // It is denied as a beginning, but it is none.
    assert_eq!(pair.tcp(By::B, SYN, 5000, 0, b""), None);
    assert_eq!(pair.state(), "syn-received");
    assert_eq!(pair.tcp(By::A, SYN | ACK, 1000, 5001, b""), None);
    assert_eq!(pair.tcp(By::B, SYN | ACK, 5000, 1001, b""), None);
    assert_eq!(pair.state(), "established");
    assert_eq!(pair.tcp(By::B, ACK | PSH, 5001, 1001, b"data"), None);
}

#[test]
fn a_reset_with_a_wrong_number_is_ignored() {
    let mut pair = Pair::new(ConnectionConfig::default());
    pair.open();
    for seq in [1001 + (1 << 28), 0x9000_0000] {
        assert_eq!(pair.tcp(By::A, RST, seq, 0, b""), Some(DropReason::TcpWindow));
        assert_eq!(pair.state(), "established");
    }
    // Far on, by the flow table's way: the numbers that it saw count.
    let mut seq = 1001_u32;
    for _ in 0..2000 {
        assert_eq!(pair.tcp(By::A, ACK | PSH, seq, 5001, &[0; 1000]), None);
        seq = seq.wrapping_add(1000);
    }
    assert_eq!(pair.tcp(By::A, RST, seq.wrapping_add(40_000_000), 0, b""), Some(DropReason::TcpWindow));
    assert_eq!(pair.tcp(By::A, ACK | PSH, seq, 5001, b"still"), None);
    assert_eq!(pair.tcp(By::A, RST | ACK, seq + 5, 5001, b""), None);
    assert_eq!(pair.state(), "closed");
    // An answer to a SYN must know its number.
    let mut pair = Pair::new(ConnectionConfig::default());
    pair.tcp(By::A, SYN, 1000, 0, b"");
    assert_eq!(pair.tcp(By::B, RST | ACK, 0, 77, b""), Some(DropReason::TcpWindow));
    assert_eq!(pair.tcp(By::B, SYN | ACK, 5000, 77, b""), Some(DropReason::TcpWindow));
    assert_eq!(pair.state(), "syn-sent");
    assert_eq!(pair.tcp(By::B, RST | ACK, 0, 1001, b""), None);
    assert_eq!(pair.state(), "closed");
}

#[test]
fn what_is_far_out_of_the_window_is_counted() {
    let mut pair = Pair::new(ConnectionConfig::default());
    pair.open();
    assert_eq!(pair.tcp(By::A, ACK | PSH, 1001, 5001, b"x"), None);
    // Windows are scaled by 128: eight megabytes are as much as may be outstanding.
    assert_eq!(pair.tcp(By::A, ACK | PSH, 1001 + 8_000_000, 5001, b"x"), None);
    assert_eq!(pair.tcp(By::A, ACK | PSH, 1001 + 40_000_000, 5001, b"x"), Some(DropReason::TcpWindow));
    assert_eq!(pair.tcp(By::B, ACK | PSH, 5001 + 40_000_000, 1001, b"x"), Some(DropReason::TcpWindow));
    // Without the option on both sides windows are small.
    let mut pair = Pair::new(ConnectionConfig::default());
    pair.tcp(By::A, SYN, 1000, 0, b"");
    let mut plain = frame(By::B, (1000, 80), Layer4::Tcp { flags: SYN | ACK, seq: 5000, ack: 1001 }, b"");
    // The scale option becomes three that do nothing, and the checksum follows.
    let sum = u16::from_be_bytes([plain[50], plain[51]]);
    let sum = checksum::update(sum, 0x0303, 0x0101);
    let sum = checksum::update(sum, 0x0700, 0x0100);
    plain[54..58].copy_from_slice(&[1, 1, 1, 0]);
    plain[50..52].copy_from_slice(&sum.to_be_bytes());
    assert_eq!(pair.send_frame(By::B, &plain), None);
    assert_eq!(pair.tcp(By::A, ACK, 1001, 5001, b""), None);
    assert_eq!(pair.tcp(By::A, ACK | PSH, 1001 + 60_000, 5001, b"x"), None);
    assert_eq!(pair.tcp(By::A, ACK | PSH, 1001 + 1_000_000, 5001, b"x"), Some(DropReason::TcpWindow));
}

#[test]
fn what_no_stack_sends_is_counted_by_reason() {
    let mut pair = Pair::new(ConnectionConfig::default());
    for flags in [SYN | FIN, SYN | RST, 0, PSH] {
        assert_eq!(pair.tcp(By::A, flags, 1, 0, b""), Some(DropReason::TcpFlags), "{flags:#x}");
    }
    assert_eq!(pair.tcp(By::A, ACK, 1, 1, b"x"), Some(DropReason::NoConnection));
    assert_eq!(pair.tcp(By::A, SYN | ACK, 1, 1, b""), Some(DropReason::NoConnection));
    assert_eq!(pair.tcp(By::A, RST, 1, 1, b""), Some(DropReason::NoConnection));
    let mut damaged = frame(By::A, (1000, 80), Layer4::Tcp { flags: SYN, seq: 1, ack: 0 }, b"");
    damaged[50] ^= 1;
    assert_eq!(pair.send_frame(By::A, &damaged), Some(DropReason::BadChecksum));
    let mut damaged = frame(By::A, (1000, 80), Layer4::Udp, b"hello");
    damaged[43] ^= 1;
    assert_eq!(pair.send_frame(By::A, &damaged), Some(DropReason::BadChecksum));
    // Without a checksum there is none to be wrong (RFC 768).
    let mut without = frame(By::A, (1000, 80), Layer4::Udp, b"hello");
    without[40..42].fill(0);
    assert_eq!(pair.send_frame(By::A, &without), None);
    pair.tcp(By::A, SYN, 1000, 0, b"");
    assert_eq!(pair.tcp(By::A, ACK, 1001, 1, b""), Some(DropReason::TcpState), "nobody has answered yet");
}

/// One part of an IPv4 packet.
fn cut(whole: &[u8], from: usize, to: usize, id: u16) -> Vec<u8> {
    let to = to.min(whole.len() - 34);
    let mut part = whole[..34].to_vec();
    part.extend_from_slice(&whole[34 + from..34 + to]);
    part[16..18].copy_from_slice(&((20 + to - from) as u16).to_be_bytes());
    part[18..20].copy_from_slice(&id.to_be_bytes());
    let more = if 34 + to < whole.len() { 0x2000 } else { 0 };
    part[20..22].copy_from_slice(&((from / 8) as u16 | more).to_be_bytes());
    part[24..26].fill(0);
    let sum = checksum::finish(checksum::sum(&part[14..34]));
    part[24..26].copy_from_slice(&sum.to_be_bytes());
    part
}

#[test]
fn fragments_are_judged_like_their_first() {
    let mut pair = Pair::new(ConnectionConfig::default());
    let datagram = |port: u16| frame(By::A, (1000, port), Layer4::Udp, &[7; 100]);
    assert_eq!(pair.send_frame(By::A, &cut(&datagram(80), 0, 64, 1)), None);
    assert_eq!(pair.send_frame(By::A, &cut(&datagram(80), 64, 200, 1)), None);
    assert_eq!(pair.send_frame(By::A, &cut(&datagram(81), 0, 64, 2)), Some(DropReason::PolicyDenied));
    assert_eq!(pair.send_frame(By::A, &cut(&datagram(81), 64, 200, 2)), Some(DropReason::PolicyDenied));
    // Without its first nobody knows its ports.
    assert_eq!(pair.send_frame(By::A, &cut(&datagram(80), 64, 200, 3)), Some(DropReason::FragmentUnjudged));
    // One that makes the first look like another one.
    assert_eq!(pair.send_frame(By::A, &cut(&datagram(80), 0, 64, 4)), None);
    assert_eq!(pair.send_frame(By::A, &cut(&datagram(81), 0, 64, 4)), Some(DropReason::FragmentOverlap));
    // A SYN has no reason to come in pieces.
    let syn = frame(By::A, (1000, 80), Layer4::Tcp { flags: SYN, seq: 1, ack: 0 }, &[7; 100]);
    assert_eq!(pair.send_frame(By::A, &cut(&syn, 0, 64, 5)), Some(DropReason::FragmentedSyn));
}

#[test]
fn udp_and_ping_are_answered_and_nothing_else() {
    let mut pair = Pair::new(ConnectionConfig::default());
    assert_eq!(pair.send(By::B, Layer4::Udp, b"unasked"), Some(DropReason::PolicyDenied));
    assert_eq!(pair.send(By::A, Layer4::Udp, b"question"), None);
    assert_eq!(pair.state(), "new");
    assert_eq!(pair.send(By::B, Layer4::Udp, b"answer"), None);
    assert_eq!(pair.state(), "replied");
    assert_eq!(pair.send_ports(By::B, (1001, 80), Layer4::Udp, b"x"), Some(DropReason::PolicyDenied));
    pair.switch.pass(181 * SECOND);
    assert_eq!(pair.send(By::B, Layer4::Udp, b"too late"), Some(DropReason::PolicyDenied));
    // Pings, by identifier; of the other side none, though it has the same one.
    let echo = |kind| Layer4::Icmp(kind, 0);
    assert_eq!(pair.send_ports(By::B, (7, 9), echo(0), b""), Some(DropReason::NoConnection));
    assert_eq!(pair.send_ports(By::A, (9, 1), echo(8), b""), None);
    // The frame's ports are identifier and sequence number, whoever sends.
    let answer = packet(Ends { from: mac(2), to: GATEWAY_MAC }, &address(2), &address(1), (9, 1), echo(0), b"");
    assert_eq!(pair.send_frame(By::B, &answer), None);
    let ask_back = packet(Ends { from: mac(2), to: GATEWAY_MAC }, &address(2), &address(1), (9, 1), echo(8), b"");
    assert_eq!(pair.send_frame(By::B, &ask_back), Some(DropReason::PolicyDenied));
    // A type that no rule names.
    assert_eq!(pair.send_ports(By::A, (9, 1), echo(13), b""), Some(DropReason::PolicyDenied));
}

#[test]
fn icmp_errors_belong_to_the_connection_that_they_quote() {
    let mut pair = Pair::new(ConnectionConfig::default());
    let error = |quoted: &[u8]| {
        let ends = Ends { from: mac(2), to: GATEWAY_MAC };
        packet(ends, &address(2), &address(1), (0, 0), Layer4::Icmp(3, 3), &quoted[14..])
    };
    let asked = frame(By::A, (1000, 80), Layer4::Udp, b"question");
    assert_eq!(pair.send_frame(By::B, &error(&asked)), Some(DropReason::UnrelatedError));
    assert_eq!(pair.send_frame(By::A, &asked), None);
    assert_eq!(pair.send_frame(By::B, &error(&asked)), None);
    let other = frame(By::A, (1001, 80), Layer4::Udp, b"question");
    assert_eq!(pair.send_frame(By::B, &error(&other)), Some(DropReason::UnrelatedError));
    assert_eq!(pair.send_frame(By::B, &error(&asked[..36])), Some(DropReason::UnrelatedError), "too short to tell");
}

#[test]
fn an_error_about_a_connection_does_not_keep_it_alive() {
    let mut pair = Pair::new(ConnectionConfig::default());
    // A third pod, a router on the way for all that anybody knows.
    let mut spec = PortSpec::new("c", mac(3));
    spec.network = Some("pods".to_owned());
    spec.addresses = vec![address(3).parse().unwrap()];
    spec.check = Some(vswitch_api::SenderCheck::None);
    let Answer::Port(router) = pair.switch.ask(Request::PortAdd(spec)) else { panic!("no port") };
    pair.open();
    pair.apply(&POLICY.replace("{tcp: {destinationPort: {number: 80}}}, ", ""));
    let quoted = frame(By::B, (1000, 80), Layer4::Tcp { flags: ACK, seq: 5001, ack: 1001 }, b"data");
    let ends = Ends { from: mac(3), to: GATEWAY_MAC };
    let error = packet(ends, &address(3), &address(2), (0, 0), Layer4::Icmp(3, 1), &quoted[14..]);
    pair.switch.drop_of(router.id, &error);
    pair.switch.take(pair.ports[1]);
    assert_eq!(pair.tcp(By::A, ACK | PSH, 1001, 5001, b"x"), Some(DropReason::PolicyDenied), "judged anew");
}

#[test]
fn what_is_flooded_reaches_only_those_who_let_it_in() {
    let mut switch = Switch::new();
    switch.ask_json(r#"{"op":"network_add","name":"lan","vni":7,"mode":"bridged","subnets":["10.0.0.0/8"]}"#).unwrap();
    let ports = ["a", "b", "c"].map(|name| {
        let number = name.as_bytes()[0] - b'a' + 1;
        let mut spec = PortSpec::new(name, mac(number));
        spec.network = Some("lan".to_owned());
        spec.addresses = vec![address(number).parse().unwrap()];
        spec.labels.insert("pod".to_owned(), name.to_owned());
        let Answer::Port(info) = switch.ask(Request::PortAdd(spec)) else { panic!("no port") };
        info.id
    });
    let text = POLICY.replace(
        "from: [{pods: {namespaceSelector: {}, podSelector: {matchLabels: {pod: a}}}}]",
        "from: [{networks: [10.1.0.1/32]}]",
    );
    let documents = vec![PolicyDocument { file: "policy.yaml".to_owned(), text }];
    switch.ask(Request::PolicyApply { documents, dry_run: false });
    ports.iter().for_each(|&port| drop(switch.take(port)));
    let mut heard = |from: u8, to: vswitch_net::MacAddr, frame: Option<Vec<u8>>, port: u16| {
        let ends = Ends { from: mac(from), to };
        let destination = if to == vswitch_net::MacAddr::BROADCAST { "10.255.255.255".to_owned() } else { address(9) };
        let frame =
            frame.unwrap_or_else(|| packet(ends, &address(from), &destination, (1000, port), Layer4::Udp, b"x"));
        switch.send(ports[usize::from(from) - 1], &frame);
        switch.settle();
        ports.map(|port| switch.take(port).len())
    };
    let (everybody, nobody) = (vswitch_net::MacAddr::BROADCAST, mac(9));
    assert_eq!(heard(1, everybody, None, 80), [0, 1, 1], "b lets a in at port 80");
    assert_eq!(heard(1, everybody, None, 81), [0, 0, 1]);
    assert_eq!(heard(1, nobody, None, 81), [0, 0, 1], "a station that nobody knows");
    assert_eq!(heard(3, everybody, None, 80), [1, 0, 0]);
    assert_eq!(heard(2, everybody, None, 80), [0, 0, 0], "b may say nothing");
    let arp = vswitch_tests::frames::arp_request(mac(2), &address(2), &address(9));
    assert_eq!(heard(2, everybody, Some(arp), 0), [1, 0, 1], "but ask who is there");
}

#[test]
fn a_later_policy_cuts_what_it_does_not_allow() {
    let mut pair = Pair::new(ConnectionConfig::default());
    pair.open();
    assert_eq!(pair.send(By::A, Layer4::Udp, b"x"), None);
    pair.apply(&POLICY.replace("{tcp: {destinationPort: {number: 80}}}, ", ""));
    assert_eq!(pair.tcp(By::B, ACK | PSH, 5001, 1001, b"x"), Some(DropReason::PolicyDenied), "whoever speaks first");
    assert_eq!(pair.tcp(By::A, ACK | PSH, 1001, 5001, b"x"), Some(DropReason::NoConnection));
    assert_eq!(pair.send(By::B, Layer4::Udp, b"x"), None, "this one is allowed still");
    // Back again, it must begin anew.
    pair.apply(POLICY);
    assert_eq!(pair.tcp(By::A, ACK | PSH, 1001, 5001, b"x"), Some(DropReason::NoConnection));
    // A label does the same.
    let mut pair = Pair::new(ConnectionConfig::default());
    pair.open();
    pair.switch
        .ask_json(r#"{"op":"endpoint_set","endpoints":[{"namespace":"default","name":"a","labels":{"pod":"x"}}]}"#)
        .unwrap();
    assert_eq!(pair.tcp(By::A, ACK | PSH, 1001, 5001, b"x"), Some(DropReason::PolicyDenied));
    // Unless they may live on.
    let mut pair = Pair::new(ConnectionConfig { keeps_established: true, ..ConnectionConfig::default() });
    pair.open();
    pair.apply(&POLICY.replace("{tcp: {destinationPort: {number: 80}}}, ", ""));
    assert_eq!(pair.tcp(By::B, ACK | PSH, 5001, 1001, b"x"), None);
    assert_eq!(
        pair.send_ports(By::A, (1001, 80), Layer4::Tcp { flags: SYN, seq: 1, ack: 0 }, b""),
        Some(DropReason::PolicyDenied)
    );
}

#[test]
fn connections_without_a_beginning_are_taken_up_if_that_is_wanted() {
    let mut pair = Pair::new(ConnectionConfig { pick_up: PickUp::Until(60 * SECOND), ..ConnectionConfig::default() });
    assert_eq!(pair.tcp(By::B, ACK | PSH, 5001, 1001, b"x"), None, "an answer of what `a` may have begun");
    assert!(pair.connections()[0].is_picked_up);
    assert_eq!(pair.connections()[0].source, "10.1.0.1:1000", "who began is who may");
    assert_eq!(pair.tcp(By::A, ACK | PSH, 1001, 5001, b"x"), None);
    assert_eq!(
        pair.send_ports(By::B, (1000, 81), Layer4::Tcp { flags: ACK, seq: 1, ack: 1 }, b"x"),
        Some(DropReason::PolicyDenied)
    );
    assert_eq!(
        pair.tcp(By::B, SYN, 1, 0, b""),
        Some(DropReason::PolicyDenied),
        "what begins one is judged, whatever is known"
    );
    pair.switch.pass(61 * SECOND);
    let late = Layer4::Tcp { flags: ACK, seq: 1, ack: 1 };
    assert_eq!(pair.send_ports(By::A, (1002, 80), late, b"x"), Some(DropReason::NoConnection));
}

#[test]
fn without_policies_nothing_is_dropped_for_its_connection() {
    let mut pair = Pair::new(ConnectionConfig::default());
    pair.switch.ask_json(r#"{"op":"policy_delete","objects":[{"kind":"SwitchPolicy","name":"b"}]}"#).unwrap();
    for (flags, seq) in [(ACK, 1), (SYN | FIN, 1), (ACK, 1 << 30), (RST, 1 << 31), (SYN, 9), (ACK, 5)] {
        assert_eq!(pair.tcp(By::A, flags, seq, 0, b"x"), None);
    }
    assert_eq!(pair.send_ports(By::B, (9, 1), Layer4::Icmp(0, 0), b""), None);
    // But it is known who began when a policy comes.
    pair.apply(POLICY);
    assert_eq!(pair.tcp(By::B, ACK, 1, 5, b"x"), None);
}

#[test]
fn a_full_table_keeps_what_was_answered() {
    let mut pair = Pair::new(ConnectionConfig { limit: 1024, ..ConnectionConfig::default() });
    for port in 0..512_u16 {
        assert_eq!(pair.send_ports(By::A, (10_000 + port, 80), Layer4::Udp, b"x"), None);
        assert_eq!(pair.send_ports(By::B, (10_000 + port, 80), Layer4::Udp, b"x"), None);
    }
    // A flood of SYNs, ten times what there is room for.
    for port in 0..10_000_u16 {
        let syn = Layer4::Tcp { flags: SYN, seq: 1, ack: 0 };
        assert_eq!(pair.send_ports(By::A, (20_000 + port, 80), syn, b""), None);
    }
    let request = Request::ConnectionList { filter: ConnectionFilter::default(), limit: 10 };
    let Answer::Connections(info) = pair.switch.ask(request) else { panic!("no connections") };
    assert_eq!(info.count, 1024);
    assert_eq!(info.evicted, 10_000 - 512);
    for port in 0..512_u16 {
        assert_eq!(pair.send_ports(By::B, (10_000 + port, 80), Layer4::Udp, b"x"), None, "{port}");
    }
    // Full of answered ones there is no room for more.
    let mut pair = Pair::new(ConnectionConfig { limit: 1024, ..ConnectionConfig::default() });
    for port in 0..1024_u16 {
        pair.send_ports(By::A, (10_000 + port, 80), Layer4::Udp, b"x");
        pair.send_ports(By::B, (10_000 + port, 80), Layer4::Udp, b"x");
    }
    assert_eq!(pair.send(By::A, Layer4::Udp, b"x"), Some(DropReason::ConnectionsFull));
}

#[test]
fn connections_are_listed_filtered_and_forgotten() {
    let mut pair = Pair::new(ConnectionConfig::default());
    pair.open();
    pair.send(By::A, Layer4::Udp, b"x");
    let ask = |pair: &mut Pair, filter: &str| {
        let answer = pair.switch.ask_json(&format!(r#"{{"op":"connection_list","filter":{filter}}}"#))?;
        let Answer::Connections(info) = answer else { panic!("no connections") };
        Ok::<usize, vswitch_api::ApiError>(info.connections.len())
    };
    for (filter, count) in [
        ("{}", 2),
        (r#"{"protocol":"tcp"}"#, 1),
        (r#"{"protocol":"17"}"#, 1),
        (r#"{"state":"established"}"#, 1),
        (r#"{"address":"10.1.0.2"}"#, 2),
        (r#"{"address":"10.1.0.2","port":80}"#, 2),
        (r#"{"address":"10.1.0.1","port":80}"#, 0),
        (r#"{"network":"pods"}"#, 2),
    ] {
        assert_eq!(ask(&mut pair, filter), Ok(count), "{filter}");
    }
    for wrong in [r#"{"protocol":"tpc"}"#, r#"{"state":"open"}"#, r#"{"network":"x"}"#] {
        assert!(ask(&mut pair, wrong).is_err());
    }
    assert!(pair.switch.ask_json(r#"{"op":"connection_del","filter":{}}"#).is_err(), "not all by mistake");
    let gone = pair.switch.ask_json(r#"{"op":"connection_del","filter":{"protocol":"tcp"}}"#).unwrap();
    assert_eq!(gone, Answer::Forgotten { count: 1 });
    assert_eq!(pair.tcp(By::A, ACK | PSH, 1001, 5001, b"x"), Some(DropReason::NoConnection));
    assert_eq!(pair.send(By::B, Layer4::Udp, b"x"), None);
}

#[test]
fn networks_do_not_know_each_others_connections() {
    let mut pair = Pair::new(ConnectionConfig::default());
    pair.open();
    // The same addresses in another network: nothing of the first is known there.
    pair.switch.ask_json(r#"{"op":"network_add","name":"other","vni":8,"subnets":["10.0.0.0/8"]}"#).unwrap();
    let ports = ["c", "d"].map(|name| {
        let number = name.as_bytes()[0] - b'a' + 1;
        let mut spec = PortSpec::new(name, mac(number));
        spec.network = Some("other".to_owned());
        let address: IpAddr = address(number - 2).parse().unwrap();
        spec.addresses = vec![address];
        spec.labels.insert("pod".to_owned(), if name == "c" { "a" } else { "b" }.to_owned());
        let Answer::Port(info) = pair.switch.ask(Request::PortAdd(spec)) else { panic!("no port") };
        info.id
    });
    let ends = Ends { from: mac(3), to: GATEWAY_MAC };
    let data =
        packet(ends, &address(1), &address(2), (1000, 80), Layer4::Tcp { flags: ACK, seq: 1001, ack: 5001 }, b"x");
    assert_eq!(pair.switch.drop_of(ports[0], &data), Some(DropReason::NoConnection));
}

#[test]
fn sctp_begins_with_init() {
    let mut pair = Pair::new(ConnectionConfig::default());
    pair.apply(&POLICY.replace("{udp: {destinationPort: {number: 80}}}", "{sctp: {destinationPort: {number: 80}}}"));
    let chunk = |pair: &mut Pair, by, kind| pair.send(by, Layer4::Sctp(kind), b"");
    assert_eq!(chunk(&mut pair, By::A, 0), Some(DropReason::NoConnection));
    assert_eq!(chunk(&mut pair, By::B, 1), Some(DropReason::PolicyDenied));
    for (by, kind) in [(By::A, 1), (By::B, 2), (By::A, 10), (By::B, 11), (By::A, 0), (By::B, 3)] {
        assert_eq!(chunk(&mut pair, by, kind), None, "{kind}");
    }
    assert_eq!(pair.state(), "associated");
    assert_eq!(chunk(&mut pair, By::B, 7), None);
    assert_eq!(pair.state(), "shutdown");
}

#[test]
fn a_stray_segment_opens_no_way_for_a_beginning() {
    for pick_up in [PickUp::Never, PickUp::Always] {
        let mut pair = Pair::new(ConnectionConfig { pick_up, ..ConnectionConfig::default() });
        pair.switch.ask_json(r#"{"op":"policy_delete","objects":[{"kind":"SwitchPolicy","name":"b"}]}"#).unwrap();
        let to_22 = |flags| Layer4::Tcp { flags, seq: 1, ack: 0 };
        // Before anybody has a policy, and from the middle.
        assert_eq!(pair.send_ports(By::A, (1001, 22), to_22(ACK), b""), None);
        // `b` lets in nobody at that port, and may go anywhere itself, so that it might have begun this.
        pair.apply(&POLICY.replace("  egress:\n  - action: Deny\n", ""));
        assert_eq!(pair.send_ports(By::A, (1001, 22), to_22(ACK), b"x"), None, "the answer to what `b` may have begun");
        assert_eq!(pair.send_ports(By::A, (1001, 22), to_22(SYN), b""), Some(DropReason::PolicyDenied));
        pair.switch.pass(3600 * SECOND);
        assert_eq!(pair.send_ports(By::A, (1001, 22), to_22(SYN), b""), Some(DropReason::PolicyDenied));
    }
    // Nor does the end of one that the other side had begun.
    let mut pair = Pair::new(ConnectionConfig::default());
    pair.apply(&POLICY.replace("  egress:\n  - action: Deny\n", ""));
    let of_b =
        |pair: &mut Pair, by, flags, seq, ack| pair.send_ports(by, (22, 3000), Layer4::Tcp { flags, seq, ack }, b"");
    assert_eq!(of_b(&mut pair, By::B, SYN, 1, 0), None);
    assert_eq!(of_b(&mut pair, By::A, SYN | ACK, 9, 2), None);
    assert_eq!(of_b(&mut pair, By::B, ACK, 2, 10), None);
    assert_eq!(of_b(&mut pair, By::B, FIN | ACK, 2, 10), None);
    assert_eq!(of_b(&mut pair, By::A, SYN, 77, 0), Some(DropReason::PolicyDenied));
}

#[test]
fn what_only_one_side_says_takes_no_room_for_long() {
    let mut pair = Pair::new(ConnectionConfig { limit: 1024, ..ConnectionConfig::default() });
    pair.switch.ask_json(r#"{"op":"policy_delete","objects":[{"kind":"SwitchPolicy","name":"b"}]}"#).unwrap();
    for port in 0..3000 {
        pair.send_ports(By::A, (10_000 + port, 9), Layer4::Tcp { flags: ACK, seq: 1, ack: 1 }, b"");
    }
    pair.apply(POLICY);
    assert_eq!(pair.tcp(By::A, SYN, 1000, 0, b""), None);
    pair.switch.pass(31 * SECOND);
    assert_eq!(pair.connections(), []);
}

#[test]
fn a_pod_begins_no_more_than_its_share() {
    let mut pair = Pair::new(ConnectionConfig { port_limit: 100, ..ConnectionConfig::default() });
    for port in 0..100 {
        assert_eq!(pair.send_ports(By::A, (10_000 + port, 80), Layer4::Udp, b""), None);
    }
    assert_eq!(pair.send_ports(By::A, (9_999, 80), Layer4::Udp, b""), Some(DropReason::ConnectionsFull));
    assert_eq!(pair.send_ports(By::A, (10_000, 80), Layer4::Udp, b""), None);
    pair.switch.pass(31 * SECOND);
    let connections = &pair.switch.backend.connections;
    (0..connections.shards()).for_each(|shard| connections.sweep(pair.switch.now_ns, shard));
    assert_eq!(pair.send_ports(By::A, (9_999, 80), Layer4::Udp, b""), None, "room comes with time");
}

#[test]
fn a_connection_belongs_to_the_ports_that_it_was_judged_for() {
    let mut switch = Switch::new();
    switch.ask_json(r#"{"op":"network_add","name":"lan","vni":7,"mode":"bridged","subnets":["10.0.0.0/8"]}"#).unwrap();
    let ports = ["x", "b", "c"].map(|name| {
        let number = if name == "x" { 1 } else { name.as_bytes()[0] - b'a' + 1 };
        let mut spec = PortSpec::new(name, mac(number));
        spec.network = Some("lan".to_owned());
        spec.addresses = vec![address(number).parse().unwrap()];
        spec.labels.insert("pod".to_owned(), name.to_owned());
        let Answer::Port(info) = switch.ask(Request::PortAdd(spec)) else { panic!("no port") };
        info.id
    });
    let documents = vec![PolicyDocument { file: "policy.yaml".to_owned(), text: POLICY.to_owned() }];
    switch.ask(Request::PolicyApply { documents, dry_run: false });
    ports.iter().for_each(|&port| drop(switch.take(port)));
    let mut send = |station: u8, layer4| {
        let ends = Ends { from: mac(1), to: mac(station) };
        switch.drop_of(ports[0], &packet(ends, &address(1), &address(2), (1000, 80), layer4, b""))
    };
    for layer4 in [Layer4::Tcp { flags: SYN, seq: 1, ack: 0 }, Layer4::Udp] {
        assert_eq!(send(2, layer4), Some(DropReason::PolicyDenied));
        // To another station with the address of `b`, and to one that nobody knows.
        assert_eq!(send(3, layer4), None);
        send(9, layer4);
        assert_eq!(send(2, layer4), Some(DropReason::PolicyDenied));
    }
}

#[test]
fn a_refusal_elsewhere_says_nothing_of_a_connection_here() {
    // `b` lets `a` in, and then no longer; what comes from elsewhere in between must not count as a look at it.
    let mut pair = Pair::new(ConnectionConfig::default());
    let mut spec = PortSpec::new("c", mac(3));
    spec.network = Some("pods".to_owned());
    spec.addresses = vec![address(3).parse().unwrap()];
    spec.check = Some(vswitch_api::SenderCheck::None);
    spec.labels.insert("pod".to_owned(), "b".to_owned());
    let Answer::Port(other) = pair.switch.ask(Request::PortAdd(spec)) else { panic!("no port") };
    pair.open();
    pair.apply(&POLICY.replace("{tcp: {destinationPort: {number: 80}}}, ", ""));
    // With the addresses and numbers of `a`, from another port, whose pod may go nowhere.
    let ends = Ends { from: mac(3), to: GATEWAY_MAC };
    let data = Layer4::Tcp { flags: ACK | PSH, seq: 1001, ack: 5001 };
    let forged = packet(ends, &address(1), &address(2), (1000, 80), data, b"x");
    assert_eq!(pair.switch.drop_of(other.id, &forged), Some(DropReason::PolicyDenied));
    assert_eq!(pair.tcp(By::A, ACK | PSH, 1001, 5001, b"x"), Some(DropReason::PolicyDenied));
}
