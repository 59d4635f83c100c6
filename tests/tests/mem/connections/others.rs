//! UDP, ICMP, SCTP, fragments and floods.

use vswitch_api::{Answer, PolicyDocument, PortSpec, Request};
use vswitch_dataplane::DropReason;
use vswitch_dataplane::connection::ConnectionConfig;
use vswitch_net::GATEWAY_MAC;
use vswitch_tests::frames::{Ends, Layer4, cut, packet};
use vswitch_tests::mem::Switch;

use super::{ACK, By, FIN, POLICY, PSH, Pair, RST, SECOND, SYN, address, frame, mac};

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
    let router = pair.add_router("c");
    pair.open();
    pair.apply(&POLICY.replace("{tcp: {destinationPort: {number: 80}}}, ", ""));
    let quoted = frame(By::B, (1000, 80), Layer4::Tcp { flags: ACK, seq: 5001, ack: 1001 }, b"data");
    let ends = Ends { from: mac(3), to: GATEWAY_MAC };
    let error = packet(ends, &address(3), &address(2), (0, 0), Layer4::Icmp(3, 1), &quoted[14..]);
    pair.switch.drop_of(router, &error);
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
