//! Requests: carried out whole, or refused with a sentence and nothing changed.

use serde_json::json;
use vswitch_api::{Answer, ErrorCode, QueueLoad, QueueMove, Request};
use vswitch_control::{Control, WorkerSample};
use vswitch_net::PortId;
use vswitch_tests::mem::Switch;

use super::mac;
use super::routed::two_pods;

/// A switch with something of everything.
fn furnished() -> Switch {
    let (mut switch, ..) = two_pods();
    for request in [
        r#"{"op":"network_add","name":"lan","vni":9,"mode":"bridged","subnets":["10.9.0.0/16"],"ranges":["10.9.1.0/24"]}"#,
        r#"{"op":"peer_add","name":"node2","vtep":"192.0.2.2"}"#,
        r#"{"op":"route_add","network":"pods","prefix":"10.2.0.0/24","peer":"node2"}"#,
        r#"{"op":"fdb_add","network":"lan","mac":"02:00:00:00:00:aa","at":{"peer":"node2"}}"#,
        r#"{"op":"network_add","name":"named","vni":10,"mode":"bridged"}"#,
        r#"{"op":"peer_add","name":"node3","vtep":"192.0.2.33","networks":["named"]}"#,
        r#"{"op":"network_add","name":"open","vni":11}"#,
        r#"{"op":"port_add","link":"guest","mac":"02:00:00:00:00:08","network":"open","addresses":["10.5.0.5"]}"#,
        r#"{"op":"route_add","network":"open","prefix":"10.5.0.6/32","peer":"node2"}"#,
    ] {
        switch.ask_json(request).expect("carried out");
    }
    switch
}

/// Everything that can be listed.
fn inventory(switch: &mut Switch) -> serde_json::Value {
    let lists = ["port_list", "network_list", "peer_list", "fdb_list", "route_list", "neighbor_list", "status"];
    let mut all = serde_json::Map::new();
    for list in lists {
        let answer = switch.ask_json(&format!(r#"{{"op":"{list}"}}"#)).expect("a list");
        all.insert(list.to_owned(), json!(answer));
    }
    all.into()
}

#[test]
fn refused_requests_change_nothing_and_say_why() {
    let mut switch = furnished();
    switch.backend.broken = vec!["broken".to_owned()];
    let before = inventory(&mut switch);
    let cases = [
        (r#"{"op":"network_add","name":"pods","vni":8}"#, ErrorCode::Conflict, "network \"pods\" exists"),
        (r#"{"op":"network_add","name":"x","vni":7}"#, ErrorCode::Conflict, "vni 7 belongs to network \"pods\""),
        (r#"{"op":"network_add","name":"a b","vni":8}"#, ErrorCode::Invalid, "\"a b\" is no name for a network"),
        (
            r#"{"op":"network_add","name":"x","vni":8,"ranges":["10.0.0.1/24"]}"#,
            ErrorCode::Invalid,
            "ranges: 10.0.0.1/24 has bits set after its length: write 10.0.0.0/24",
        ),
        (
            r#"{"op":"network_add","name":"x","vni":8,"ranges":["10.0.0.0/24","10.0.0.128/25"]}"#,
            ErrorCode::Invalid,
            "overlap",
        ),
        (
            r#"{"op":"network_add","name":"x","vni":8,"subnets":["10.0.0.0/24"],"ranges":["10.0.1.0/24"]}"#,
            ErrorCode::Invalid,
            "lies in none of the network's subnets",
        ),
        (
            r#"{"op":"network_add","name":"x","vni":8,"gateway_v4":"10.0.0.1"}"#,
            ErrorCode::Invalid,
            "for bridged networks",
        ),
        (r#"{"op":"network_del","name":"pods"}"#, ErrorCode::Conflict, "has 2 ports"),
        (r#"{"op":"network_del","name":"nope"}"#, ErrorCode::NotFound, "no network \"nope\""),
        (
            r#"{"op":"route_add","network":"pods","prefix":"10.1.0.1/32","peer":"node2"}"#,
            ErrorCode::Conflict,
            "overlaps",
        ),
        (r#"{"op":"network_del","name":"named"}"#, ErrorCode::Conflict, "peer \"node3\" names network \"named\""),
        (
            r#"{"op":"route_add","network":"open","prefix":"10.5.0.5/32","peer":"node2"}"#,
            ErrorCode::Conflict,
            "is the address of a port",
        ),
        (
            r#"{"op":"port_add","link":"x","mac":"02:00:00:00:00:07","network":"open","addresses":["10.5.0.6"]}"#,
            ErrorCode::Conflict,
            "is routed to peer",
        ),
        (
            r#"{"op":"port_add","link":"x","mac":"02:00:00:00:00:07","network":"named","addresses":["10.5.0.6"]}"#,
            ErrorCode::Invalid,
            "is bridged and has no subnets",
        ),
        (r#"{"op":"peer_add","name":"node2","vtep":"192.0.2.9"}"#, ErrorCode::Conflict, "exists"),
        (r#"{"op":"peer_add","name":"x","vtep":"192.0.2.2"}"#, ErrorCode::Conflict, "belongs to peer \"node2\""),
        (r#"{"op":"peer_add","name":"x","vtep":"224.0.0.1"}"#, ErrorCode::Invalid, "vtep: 224.0.0.1 is not allowed"),
        (
            r#"{"op":"peer_add","name":"x","vtep":"192.0.2.3","router_mac":"ff:ff:ff:ff:ff:ff"}"#,
            ErrorCode::Invalid,
            "router_mac",
        ),
        (
            r#"{"op":"peer_add","name":"x","vtep":"192.0.2.3","networks":["nope"]}"#,
            ErrorCode::NotFound,
            "no network \"nope\"",
        ),
        (r#"{"op":"peer_del","name":"nope"}"#, ErrorCode::NotFound, "no peer \"nope\""),
        (
            r#"{"op":"route_add","network":"lan","prefix":"10.3.0.0/24","peer":"node2"}"#,
            ErrorCode::Invalid,
            "is bridged and has no routes",
        ),
        (
            r#"{"op":"route_add","network":"pods","prefix":"10.1.0.0/25","peer":"node2"}"#,
            ErrorCode::Conflict,
            "overlaps this node's own range",
        ),
        (
            r#"{"op":"route_add","network":"pods","prefix":"10.2.0.0/24","peer":"node2"}"#,
            ErrorCode::Conflict,
            "leads to peer \"node2\" already",
        ),
        (r#"{"op":"route_add","network":"pods","prefix":"10.3.0.0/24","peer":"nope"}"#, ErrorCode::NotFound, "no peer"),
        (r#"{"op":"route_del","network":"pods","prefix":"10.3.0.0/24"}"#, ErrorCode::NotFound, "no route 10.3.0.0/24"),
        (
            r#"{"op":"fdb_add","network":"pods","mac":"02:00:00:00:00:bb","at":{"peer":"node2"}}"#,
            ErrorCode::Invalid,
            "is routed and has no stations",
        ),
        (
            r#"{"op":"fdb_add","network":"lan","mac":"02:00:00:00:00:aa","at":{"peer":"node2"}}"#,
            ErrorCode::Conflict,
            "static station",
        ),
        (
            r#"{"op":"fdb_add","network":"lan","mac":"02:00:00:00:00:bb","at":{"port":"one"}}"#,
            ErrorCode::Invalid,
            "is not in network \"lan\"",
        ),
        (r#"{"op":"fdb_del","network":"lan","mac":"02:00:00:00:00:bb"}"#, ErrorCode::NotFound, "no station"),
        (r#"{"op":"port_add","link":"one","mac":"02:00:00:00:00:07"}"#, ErrorCode::Conflict, "plugged in already"),
        (
            r#"{"op":"port_add","link":"x","mac":"02:00:00:00:00:01"}"#,
            ErrorCode::Conflict,
            "mac 02:00:00:00:00:01 belongs to the port of link one",
        ),
        (r#"{"op":"port_add","link":"x","mac":"03:00:00:00:00:01"}"#, ErrorCode::Invalid, "no station's address"),
        (
            r#"{"op":"port_add","link":"x","mac":"02:00:00:00:00:07","addresses":["10.1.0.1"]}"#,
            ErrorCode::Conflict,
            "belongs to the port of link one",
        ),
        (
            r#"{"op":"port_add","link":"x","mac":"02:00:00:00:00:07","addresses":["127.0.0.1"]}"#,
            ErrorCode::Invalid,
            "ips: 127.0.0.1",
        ),
        (
            r#"{"op":"port_add","link":"x","mac":"02:00:00:00:00:07","network":"lan","addresses":["10.8.0.1"]}"#,
            ErrorCode::Invalid,
            "in none of the subnets",
        ),
        (
            r#"{"op":"port_add","link":"x","mac":"02:00:00:00:00:07","mtu":100}"#,
            ErrorCode::Invalid,
            "mtu: 100 is not allowed; allowed are 1280 to 65000",
        ),
        (r#"{"op":"port_add","link":"broken","mac":"02:00:00:00:00:07"}"#, ErrorCode::System, "no link broken"),
        (
            r#"{"op":"port_add","link":"x","mac":"02:00:00:00:00:07","network":"nope"}"#,
            ErrorCode::NotFound,
            "no network \"nope\"",
        ),
    ];
    for (request, code, words) in cases {
        let error = switch.ask_json(request).expect_err(request);
        assert_eq!(error.code, code, "{request}");
        assert!(error.message.contains(words), "{request}: {}", error.message);
        assert!(!error.message.contains('\n'));
        assert_eq!(inventory(&mut switch), before, "{request} changed something");
    }
}

#[test]
fn addresses_run_out_and_come_back() {
    let mut switch = Switch::new();
    switch.ask_json(r#"{"op":"network_add","name":"small","vni":1,"ranges":["10.1.0.0/30"]}"#).expect("a network");
    let first = switch.add_port("a", "small", mac(1), &[]);
    switch.add_port("b", "small", mac(2), &[]);
    let third = r#"{"op":"port_add","link":"c","mac":"02:00:00:00:00:03"}"#;
    let error = switch.ask_json(third).expect_err("none left");
    assert_eq!(error.code, ErrorCode::Exhausted);
    switch.ask_json(r#"{"op":"port_del","link":"a"}"#).expect("done");
    let Answer::Port(info) = switch.ask_json(third).expect("one is free again") else { panic!() };
    assert_eq!(info.addresses, first.addresses);
}

#[test]
fn gc_removes_what_one_owner_no_longer_uses() {
    let mut switch = furnished();
    for (container, owner) in [("c1", "net"), ("c2", "net"), ("c3", "other")] {
        let number = container.as_bytes()[1];
        let request = json!({"op": "port_add", "link": container, "mac": mac(number), "owner": owner,
            "attachment": {"container_id": container, "ifname": "eth0"}});
        switch.ask_json(&request.to_string()).expect("carried out");
    }
    let gc = |valid: serde_json::Value| json!({"op": "port_gc", "owner": "net", "valid": valid}).to_string();
    let gone = |answer: Answer| match answer {
        Answer::Ports { ports } => ports.into_iter().map(|port| port.link).collect::<Vec<_>>(),
        other => panic!("{other:?}"),
    };
    let valid = json!([{"container_id": "c1", "ifname": "eth0"}, {"container_id": "c2", "ifname": "eth1"}]);
    assert_eq!(gone(switch.ask_json(&gc(valid)).expect("done")), ["c2"]);
    assert_eq!(gone(switch.ask_json(&gc(json!([]))).expect("done")), ["c1"]);
    let Answer::Ports { ports } = switch.ask(Request::PortList { link: None }) else { panic!() };
    assert_eq!(ports.iter().map(|port| port.link.as_str()).collect::<Vec<_>>(), ["one", "two", "guest", "c3"]);
}

#[test]
fn a_restart_takes_everything_over() {
    let mut switch = furnished();
    let before = inventory(&mut switch);
    let state = serde_json::to_string(&switch.control.state("boot")).expect("JSON");
    let mut again = Switch::new();
    let lost = again.control.restore(serde_json::from_str(&state).expect("a state"), &mut again.backend);
    assert_eq!(lost, Vec::<String>::new());
    let after = inventory(&mut again);
    for list in ["port_list", "network_list", "peer_list", "fdb_list", "route_list"] {
        assert_eq!(after[list], before[list]);
    }
    // A link that is gone costs its port, and nothing else.
    let mut third = Switch::new();
    third.backend.broken = vec!["one".to_owned()];
    let lost = third.control.restore(serde_json::from_str(&state).expect("a state"), &mut third.backend);
    assert_eq!(lost, ["port of link one: no link one"]);
    assert_eq!((third.control.links().count(), third.control.waiting()), (2, 1));
    // It waits: its addresses stay its own, a further restart knows it, and it is adopted when its link can be attached.
    let Answer::Port(other) =
        third.ask_json(r#"{"op":"port_add","link":"x","mac":"02:00:00:00:00:07","network":"pods"}"#).unwrap()
    else {
        panic!()
    };
    assert!(!other.addresses.iter().any(|address| address.addr().to_string() == "10.1.0.1"));
    assert_eq!(third.control.state("boot").ports.len(), 4);
    third.backend.broken.clear();
    third.control.adopt_waiting(|_| true, &mut third.backend);
    assert_eq!((third.control.links().count(), third.control.waiting()), (4, 0));
}

#[test]
fn what_the_configuration_made_is_not_state() {
    let mut control = Control::new(Default::default());
    let mut backend = Switch::new().backend;
    let network = serde_json::from_str(r#"{"op":"network_add","name":"pods","vni":7}"#).expect("a request");
    control.configure(network, &mut backend).expect("carried out");
    assert!(control.state("boot").networks.is_empty());
}

/// Queues are dealt out anew as asked, or not at all.
#[test]
fn queues_go_where_a_worker_is() {
    let mut switch = Switch::new();
    let (link, pod) = (PortId(0), PortId(20));
    switch.backend.others = vec![WorkerSample::default(); 2];
    let queues =
        vec![(link, 0, Some(0)), (link, 1, Some(1)), (link, 2, Some(2)), (link, 3, Some(2)), (pod, 0, Some(0))];
    switch.backend.queues = queues.clone();
    let Answer::Rxq(info) = switch.ask(Request::RxqList) else { panic!("another answer") };
    let owners: Vec<Option<usize>> = info.queues.iter().map(|queue| queue.worker).collect();
    assert_eq!(owners, [0, 1, 2, 2, 0].map(Some));
    let name = info.queues[0].link.clone();
    let to = |queue, worker| QueueMove { link: name.clone(), queue, worker };
    let ask = |switch: &mut Switch, moves: Vec<QueueMove>| {
        switch.try_ask(Request::RxqMove { moves }).map_err(|error| error.to_string())
    };
    // All are checked before the first is moved.
    for (moves, sentence) in [
        (vec![to(2, 0), to(9, 2)], "has no queue 9"),
        (vec![to(2, 0), to(1, 7)], "there is no worker 7: they are numbered 0 to 2"),
        (vec![to(1, 2)], "worker 1 would have no queue"),
        (vec![QueueMove { link: info.queues[4].link.clone(), queue: 0, worker: 1 }], "only queues of uplinks move"),
        (vec![QueueMove { link: "eth9".into(), queue: 0, worker: 1 }], "no link eth9 here"),
    ] {
        let error = ask(&mut switch, moves).unwrap_err();
        assert!(error.contains(sentence), "{error}");
        assert_eq!(switch.backend.queues, queues);
    }
    // Worker 1 gets one before it gives one.
    assert_eq!(ask(&mut switch, vec![to(1, 2), to(3, 1)]), Ok(Answer::Done));
    let owners = |switch: &Switch| switch.backend.queues.iter().map(|queue| queue.2.unwrap()).collect::<Vec<_>>();
    assert_eq!(owners(&switch), [0, 2, 2, 1, 0]);
    switch.backend.broken_queues = vec![0];
    let error = ask(&mut switch, vec![to(2, 0), to(0, 1)]).unwrap_err();
    assert!(error.contains("queue 0 of") && error.contains("was not moved"), "{error}");
    assert_eq!(owners(&switch), [0, 2, 0, 1, 0]);
    switch.backend.broken_queues.clear();
    let load = |queue, load| QueueLoad { link: name.clone(), queue, load };
    let rebalance = |switch: &mut Switch, loads: Vec<QueueLoad>, dry_run| match switch
        .try_ask(Request::RxqRebalance { loads, dry_run })
    {
        Ok(Answer::Plan(plan)) => Ok((plan.before, plan.after, plan.is_applied)),
        Ok(other) => panic!("{other:?}"),
        Err(error) => Err(error.to_string()),
    };
    let error = rebalance(&mut switch, vec![load(0, u32::MAX), load(2, u32::MAX)], false).unwrap_err();
    assert!(error.contains("allowed are 0 to 1000"), "{error}");
    let loads = || vec![load(0, 500), load(2, 400), load(3, 300)];
    let planned = (vec![900, 300, 0], vec![400, 300, 500]);
    assert_eq!(rebalance(&mut switch, loads(), true), Ok((planned.0.clone(), planned.1.clone(), false)));
    assert_eq!(owners(&switch), [0, 2, 0, 1, 0]);
    assert_eq!(rebalance(&mut switch, loads(), false), Ok((planned.0, planned.1, true)));
    assert_eq!(owners(&switch), [2, 2, 0, 1, 0]);
}
