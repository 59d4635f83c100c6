//! The table: judged again, made room for, listed, and bound to ports.

use std::net::IpAddr;

use vswitch_api::{Answer, ConnectionFilter, PolicyDocument, PortSpec, Request};
use vswitch_dataplane::DropReason;
use vswitch_dataplane::connection::ConnectionConfig;
use vswitch_net::GATEWAY_MAC;
use vswitch_tests::frames::{Ends, Layer4, packet};
use vswitch_tests::mem::Switch;

use super::{ACK, By, POLICY, PSH, Pair, SECOND, SYN, address, mac};

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
    let other = pair.add_router("b");
    pair.open();
    pair.apply(&POLICY.replace("{tcp: {destinationPort: {number: 80}}}, ", ""));
    // With the addresses and numbers of `a`, from another port, whose pod may go nowhere.
    let ends = Ends { from: mac(3), to: GATEWAY_MAC };
    let data = Layer4::Tcp { flags: ACK | PSH, seq: 1001, ack: 5001 };
    let forged = packet(ends, &address(1), &address(2), (1000, 80), data, b"x");
    assert_eq!(pair.switch.drop_of(other, &forged), Some(DropReason::PolicyDenied));
    assert_eq!(pair.tcp(By::A, ACK | PSH, 1001, 5001, b"x"), Some(DropReason::PolicyDenied));
}
