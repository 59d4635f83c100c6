//! Requests, changes and restarts.

use vswitch_api::{Answer, ErrorCode};
use vswitch_control::ControlConfig;
use vswitch_dataplane::DropReason;
use vswitch_net::GATEWAY_MAC;
use vswitch_tests::frames::{Ends, Layer4, packet};
use vswitch_tests::mem::Switch;

use super::{ACK, Node, SECOND, SYN, end, mac, tcp};

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
    let target = |at: usize| (tcp_now.targets[at].connections, tcp_now.targets[at].is_leaving);
    assert_eq!((target(0), target(1)), ((1, false), (1, true)), "its backend now, and the one before");
    node.switch.ask_json(r#"{"op":"service_del","names":["four-tcp","four-udp"]}"#).unwrap();
    let stays = node.send(0, "172.20.0.10", (1000, 80), tcp(ACK, 7, 51), b"still").unwrap();
    assert_eq!(stays.0, 1);
    assert_eq!(node.send(0, "172.20.0.10", (1000, 80), Layer4::Udp, b"x").err(), Some(DropReason::NoService));
    assert_eq!(node.send(0, "172.20.0.10", (1002, 80), tcp(SYN, 1, 0), b"").err(), Some(DropReason::NoService));
}

#[test]
fn bad_input_is_refused_with_a_remedy() {
    let mut node = Node::new();
    node.switch.ask_json(r#"{"op":"network_add","name":"lan","vni":8,"mode":"bridged"}"#).unwrap();
    node.switch
        .ask_json(r#"{"op":"network_add","name":"sub","vni":9,"subnets":["10.9.0.0/16"],"services":["172.21.0.0/16"]}"#)
        .unwrap();
    node.service("taken", "172.20.0.10", 80, "tcp", &["10.0.0.2:80"]);
    node.switch.ask_json(r#"{"op":"peer_add","name":"other","vtep":"192.0.2.2"}"#).unwrap();
    node.switch.ask_json(r#"{"op":"route_add","network":"pods","prefix":"198.18.0.0/24","peer":"other"}"#).unwrap();
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
        (service(r#""address":"172.20.0.9","port":80,"backends":["10.0.0.2:0"]"#), "10.0.0.2:0: 0 is no port"),
        (service(r#""address":"172.20.0.9","port":80,"backends":["172.20.0.10:80"]"#), "is a service itself"),
        (service(r#""address":"172.20.0.9","port":80,"protocol":"udp","backends":["10.0.0.2:4789"]"#), "VXLAN"),
        (service(r#""address":"192.0.2.2","port":80"#), "another node's"),
        (service(r#""address":"198.18.0.1","port":80"#), "routed to a peer"),
        (egress(r#""addresses":["192.0.2.2"]"#), "another node's"),
        (egress(r#""addresses":["198.18.0.1"]"#), "routed to a peer"),
        (egress(r#""addresses":["172.20.0.10"]"#), "is a service's"),
        (egress(r#""addresses":["172.21.0.10"],"network":"sub""#), "is a service's"),
        (egress(r#""addresses":["192.0.2.1"],"sources":["fd00::/8"]"#), "no source of its family"),
        (egress(r#""addresses":["192.0.2.1"],"destinations":["fd00::/8"]"#), "no address of the family"),
        (egress(r#""addresses":["192.0.2.1"],"destinations":["10.9.1.0/24"],"network":"sub""#), "overlap 10.9.0.0/16"),
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
        (
            r#"{"op":"policy_explain","from":"10.0.0.1","to":"172.20.0.10","port":"tcp/80"}"#.to_owned(),
            "--to 10.0.0.2 --port tcp/80",
        ),
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

#[test]
fn two_services_change_places() {
    let mut node = Node::new();
    let set = |one: &str, two: &str| {
        format!(
            r#"{{"op":"service_set","services":[
            {{"name":"one","address":"172.20.0.1{one}","port":80,"backends":["10.0.0.2:80"]}},
            {{"name":"two","address":"172.20.0.1{two}","port":80,"backends":["10.0.0.3:80"]}}]}}"#
        )
    };
    node.switch.ask_json(&set("1", "2")).unwrap();
    node.switch.ask_json(&set("2", "1")).unwrap();
    for (at, port) in [("172.20.0.11", 2), ("172.20.0.12", 1)] {
        assert_eq!(node.send(0, at, (1000, 80), tcp(SYN, 1, 0), b"").unwrap().0, port, "{at}");
    }
}

/// What a former daemon had and this configuration does not allow is kept, for the next one.
#[test]
fn services_that_cannot_be_restored_are_kept() {
    let node = Node::new().with_services().with_egress();
    let state = node.switch.control.state("boot");
    assert_eq!((state.services.len(), state.egress.len()), (6, 1));
    assert!(state.services.iter().all(|service| service.network.as_deref() == Some("pods")));
    let mut next = Switch::new();
    next.ask_json(r#"{"op":"network_add","name":"pods","vni":7,"services":["172.21.0.0/16","192.0.2.0/24"]}"#).unwrap();
    let lost = next.control.restore(state.clone(), &mut next.backend);
    assert!(lost.len() == 8 && lost[1].contains("it is kept for the next start"), "{lost:?}");
    let kept = next.control.state("boot");
    assert_eq!((&kept.services, &kept.egress), (&state.services, &state.egress));
    // One that is set anew is not kept twice.
    next.ask_json(r#"{"op":"service_set","services":[{"name":"four-tcp","address":"172.21.0.1","port":80}]}"#).unwrap();
    assert_eq!(next.control.state("boot").services.len(), 6);
}

/// The host keeps its route to an address for as long as a connection uses it.
#[test]
fn an_address_is_given_up_after_its_last_connection() {
    let config = ControlConfig { host_network: Some("pods".to_owned()), ..ControlConfig::default() };
    let network = r#"{"op":"network_add","name":"pods","vni":7,"ranges":["10.1.0.0/24"]}"#;
    let mut switch = Switch::with_host(config, mac(99), network);
    let pod = switch.add_port("one", "pods", mac(1), &[]).id;
    let routes = |switch: &Switch| {
        let plan = switch.control.host_plan("vswitch0").unwrap();
        plan.remote.iter().map(|(prefix, _)| prefix.to_string()).collect::<Vec<_>>()
    };
    switch.ask_json(r#"{"op":"egress_set","name":"out","addresses":["192.0.2.50"]}"#).unwrap();
    assert_eq!(routes(&switch), ["192.0.2.50/32"]);
    let syn =
        packet(Ends { from: mac(1), to: GATEWAY_MAC }, "10.1.0.2", "198.51.100.7", (40_000, 80), tcp(SYN, 1, 0), b"");
    assert_eq!(switch.drop_of(pod, &syn), None);
    switch.ask_json(r#"{"op":"egress_del","name":"out"}"#).unwrap();
    assert!(!switch.control.drain(switch.now_ns, &mut switch.backend));
    assert_eq!(routes(&switch), ["192.0.2.50/32"]);
    switch.pass(31 * SECOND);
    assert!(switch.control.drain(switch.now_ns, &mut switch.backend));
    assert_eq!(routes(&switch), [] as [&str; 0]);
}
