//! Who is believed when several speak for a station, a peer or a route; and that what stood behind shows again.

use vswitch_api::Answer;
use vswitch_control::{Control, ControlConfig, UPLINK_PORT};
use vswitch_dataplane::DropReason;
use vswitch_net::{MacAddr, NetworkIndex, PortId};
use vswitch_tests::frames::{self, Ends};
use vswitch_tests::mem::Switch;
use vswitch_tests::twin::WIRE_MACS;

use super::{bad_input, mac};

/// A station that the kernel's device has, behind 192.0.2.2.
const FOLLOWED: MacAddr = MacAddr([2, 0, 0, 9, 9, 9]);

/// A bridged network with two ports; its FDB is fed from a device of the kernel's.
fn lan() -> (Switch, NetworkIndex, [PortId; 2]) {
    let mut switch = Switch::new().with_uplink(WIRE_MACS[0], Some("192.0.2.1"), None, 1500);
    let network = r#"{"op":"network_add","name":"lan","vni":9,"mode":"bridged","spoof_check":false,"follow":"vx9"}"#;
    switch.ask_json(network).unwrap();
    let ports = [1, 2].map(|number| switch.add_port(&format!("p{number}"), "lan", mac(number), &[]).id);
    let [(network, _)] = switch.control.followers()[..] else { panic!("one network follows") };
    switch.control.follow_station(network, FOLLOWED, "192.0.2.2".parse().ok());
    switch.control.follow_flood(network, "192.0.2.2".parse().unwrap(), true);
    switch.resolve("192.0.2.2", WIRE_MACS[1]);
    switch.settle();
    for port in ports {
        switch.take(port);
    }
    switch.take(UPLINK_PORT);
    (switch, network, ports)
}

/// How many copies of a packet to a station leave by the wire and by the other port.
fn goes(switch: &mut Switch, from: PortId, to: MacAddr, other: PortId) -> (usize, usize) {
    switch.send(from, &frames::udp(Ends { from: mac(1), to }, "10.9.0.1", "10.9.0.99", b"x"));
    switch.settle();
    (switch.take(UPLINK_PORT).len(), switch.take(other).len())
}

#[test]
fn a_followed_station_does_not_age_when_it_speaks() {
    let (mut switch, _, [one, two]) = lan();
    assert_eq!(goes(&mut switch, one, FOLLOWED, two), (1, 0));
    let spoken = frames::udp(Ends { from: FOLLOWED, to: mac(1) }, "10.9.0.99", "10.9.0.1", b"x");
    switch.send(UPLINK_PORT, &bad_input::outer("192.0.2.2", "192.0.2.1", 4789, 9, &spoken));
    switch.settle();
    assert_eq!(switch.take(one).len(), 1);
    switch.pass(301_000_000_000);
    assert_eq!(goes(&mut switch, one, FOLLOWED, two), (1, 0));
    // One that comes here is here, until it is silent; then it is where the kernel has it.
    let spoken = frames::udp(Ends { from: FOLLOWED, to: mac(1) }, "10.9.0.99", "10.9.0.1", b"x");
    switch.send(two, &spoken);
    switch.settle();
    switch.take(one);
    assert_eq!(goes(&mut switch, one, FOLLOWED, two), (0, 1));
    switch.pass(301_000_000_000);
    assert_eq!(goes(&mut switch, one, FOLLOWED, two), (1, 0));
    let Ok(Answer::Fdb { stations }) = switch.ask_json(r#"{"op":"fdb_list"}"#) else { panic!() };
    assert_eq!(stations.iter().filter(|station| station.mac == FOLLOWED).count(), 1);
}

#[test]
fn a_peer_that_was_asked_for_comes_and_goes_before_the_kernels() {
    let (mut switch, _, [one, two]) = lan();
    switch.ask_json(r#"{"op":"peer_add","name":"node2","vtep":"192.0.2.2"}"#).unwrap();
    assert_eq!(goes(&mut switch, one, FOLLOWED, two), (1, 0));
    assert_eq!(goes(&mut switch, one, MacAddr::BROADCAST, two), (1, 1), "once, though two say so");
    switch.ask_json(r#"{"op":"peer_del","name":"node2"}"#).unwrap();
    assert_eq!(goes(&mut switch, one, FOLLOWED, two), (1, 0));
    assert_eq!(goes(&mut switch, one, MacAddr::BROADCAST, two), (1, 1));
    // What the kernel has is the kernel's to name.
    let of_kernel = r#"{"op":"fdb_add","network":"lan","mac":"02:00:00:00:00:77","at":{"peer":"kernel-192.0.2.2"}}"#;
    assert!(switch.ask_json(of_kernel).unwrap_err().message.contains("add one of your own"));
}

#[test]
fn a_station_that_moved_away_is_found_when_its_port_goes() {
    let (mut switch, network, [one, two]) = lan();
    switch.control.follow_station(network, mac(2), "192.0.2.2".parse().ok());
    assert_eq!(goes(&mut switch, one, mac(2), two), (0, 1), "a port's own is here while it is");
    switch.ask_json(r#"{"op":"port_del","link":"p2"}"#).unwrap();
    switch.send(one, &frames::udp(Ends { from: mac(1), to: mac(2) }, "10.9.0.1", "10.9.0.2", b"x"));
    switch.settle();
    assert_eq!(switch.take(UPLINK_PORT).len(), 1);
}

#[test]
fn a_peer_of_both_families_takes_both_of_the_kernels_over() {
    let mut switch = Switch::new();
    switch.control = Control::new(ControlConfig { host_network: Some("pods".to_owned()), ..ControlConfig::default() });
    let network = r#"{"op":"network_add","name":"pods","vni":7,"subnets":["10.0.0.0/8","fd00::/8"],"ranges":["10.1.0.0/24","fd01::/64"]}"#;
    switch.ask_json(network).unwrap();
    let mut switch = switch.with_uplink(mac(200), Some("192.0.2.1"), Some("2001:db8::1"), 1500);
    switch.control.import_route("10.9.0.0/24".parse().unwrap(), "192.0.2.9".parse().ok());
    switch.control.import_route("fd09::/64".parse().unwrap(), "2001:db8::9".parse().ok());
    let both = r#"{"op":"peer_add","name":"node9","vtep":"192.0.2.9","other_vtep":"2001:db8::9"}"#;
    switch.ask_json(both).unwrap();
    let names = |switch: &mut Switch| match switch.ask_json(r#"{"op":"route_list"}"#) {
        Ok(Answer::Routes { routes }) => {
            routes.iter().filter(|route| route.is_imported).map(|route| route.to.to_string()).collect::<Vec<_>>()
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(names(&mut switch), ["peer node9", "peer node9"]);
    // The way of one family goes; both addresses are the peer's still.
    switch.control.import_route("fd09::/64".parse().unwrap(), None);
    switch.control.forget_unused_peers();
    let snapshot = switch.control.take_snapshot().unwrap();
    assert_eq!(snapshot.vteps.len(), 2);
    assert_eq!(snapshot.vteps.values().collect::<std::collections::BTreeSet<_>>().len(), 1);
    switch.ask_json(r#"{"op":"peer_del","name":"node9"}"#).unwrap();
    assert_eq!(names(&mut switch), ["peer kernel-192.0.2.9"]);
}

#[test]
fn a_mirror_waits_for_its_ports() {
    let (mut switch, _, _) = lan();
    switch.ask_json(r#"{"op":"mirror_add","name":"m","ports":["p1"],"to":{"port":"p2"}}"#).unwrap();
    let state = switch.control.state("boot");
    let mut next = Switch::new().with_uplink(WIRE_MACS[0], Some("192.0.2.1"), None, 1500);
    next.backend.broken.push("p1".to_owned());
    assert_eq!(next.control.restore(state, &mut next.backend).len(), 1);
    next.backend.broken.clear();
    next.control.adopt_waiting(|_| true, &mut next.backend);
    next.settle();
    let [one, two] = ["p1", "p2"].map(|link| next.control.links().find(|(_, other)| *other == link).unwrap().0);
    for port in [one, two] {
        next.take(port);
    }
    let reason = next.drop_of(one, &frames::udp(Ends { from: mac(1), to: mac(1) }, "10.9.0.1", "10.9.0.1", b"x"));
    assert_eq!(reason, Some(DropReason::SamePort));
    assert_eq!(next.take(two).len(), 1, "the mirror's copy");
}

#[test]
fn nobody_inherits_a_mirror_by_its_links_name() {
    let (mut switch, _, _) = lan();
    switch.ask_json(r#"{"op":"mirror_add","name":"m","ports":["p1"],"to":{"port":"p2"}}"#).unwrap();
    let state = switch.control.state("boot");
    let mirrors = |switch: &Switch| switch.control.state("boot").mirrors.len();
    for broken in ["p1", "p2"] {
        // The link is gone for good, while the daemon was away or while the port waited.
        let mut gone = state.clone();
        gone.ports.retain(|port| port.spec.link != broken);
        let mut next = Switch::new();
        assert_eq!(next.control.restore(gone, &mut next.backend), ["mirror \"m\": its ports are gone"]);
        assert_eq!(mirrors(&next), 0);
        let mut next = Switch::new();
        next.backend.broken.push(broken.to_owned());
        next.control.restore(state.clone(), &mut next.backend);
        assert_eq!(mirrors(&next), 1);
        next.control.adopt_waiting(|link| link != broken, &mut next.backend);
        assert_eq!((mirrors(&next), next.control.waiting()), (0, 0));
    }
}

#[test]
fn stations_wait_with_their_port() {
    let (mut switch, _, _) = lan();
    switch.ask_json(r#"{"op":"fdb_add","network":"lan","mac":"02:00:00:00:00:77","at":{"port":"p1"}}"#).unwrap();
    let state = switch.control.state("boot");
    let mut next = Switch::new().with_uplink(WIRE_MACS[0], Some("192.0.2.1"), None, 1500);
    next.backend.broken.push("p1".to_owned());
    assert_eq!(next.control.restore(state.clone(), &mut next.backend), ["port of link p1: no link p1"]);
    assert_eq!(next.control.state("boot").stations, state.stations, "another restart knows it");
    next.backend.broken.clear();
    next.control.adopt_waiting(|_| true, &mut next.backend);
    assert_eq!(next.control.state("boot").stations, state.stations);
    next.settle();
    let [one, two] = ["p1", "p2"].map(|link| next.control.links().find(|(_, other)| *other == link).unwrap().0);
    for port in [one, two] {
        next.take(port);
    }
    let to = MacAddr([2, 0, 0, 0, 0, 0x77]);
    next.send(two, &frames::udp(Ends { from: mac(2), to }, "10.9.0.2", "10.9.0.77", b"x"));
    next.settle();
    assert_eq!(next.take(one).len(), 1);
}

#[test]
fn a_peer_of_the_kernels_takes_what_was_seen_behind_it_along() {
    let (mut switch, network, [one, two]) = lan();
    let other = MacAddr([2, 0, 0, 9, 9, 8]);
    let spoken = frames::udp(Ends { from: other, to: mac(1) }, "10.9.0.98", "10.9.0.1", b"x");
    switch.send(UPLINK_PORT, &bad_input::outer("192.0.2.2", "192.0.2.1", 4789, 9, &spoken));
    switch.settle();
    switch.take(one);
    assert_eq!(goes(&mut switch, one, other, two), (1, 0));
    switch.control.follow_station(network, FOLLOWED, None);
    switch.control.follow_flood(network, "192.0.2.2".parse().unwrap(), false);
    switch.control.forget_unused_peers();
    switch.settle();
    assert_eq!(goes(&mut switch, one, other, two), (0, 1), "flooded, until it speaks again");
}

#[test]
fn what_comes_to_lead_to_this_node_leads_nowhere_else() {
    let (mut switch, network, [one, two]) = lan();
    switch.control.follow_station(network, FOLLOWED, "192.0.2.1".parse().ok());
    switch.settle();
    assert_eq!(goes(&mut switch, one, FOLLOWED, two), (1, 1), "flooded");
    let mut switch = Switch::new();
    switch.control = Control::new(ControlConfig { host_network: Some("pods".to_owned()), ..ControlConfig::default() });
    let network = r#"{"op":"network_add","name":"pods","vni":7,"subnets":["10.0.0.0/8"],"ranges":["10.1.0.0/24"]}"#;
    switch.ask_json(network).unwrap();
    let mut switch = switch.with_uplink(mac(200), Some("192.0.2.1"), None, 1500);
    let prefix = "10.9.0.0/24".parse().unwrap();
    assert!(switch.control.import_route(prefix, "192.0.2.9".parse().ok()));
    switch.control.import_route(prefix, "192.0.2.1".parse().ok());
    let Ok(Answer::Routes { routes }) = switch.ask_json(r#"{"op":"route_list"}"#) else { panic!() };
    assert!(!routes.iter().any(|route| route.is_imported), "{routes:?}");
}

#[test]
fn a_station_that_waits_is_listed_and_can_be_removed() {
    let (mut switch, _, _) = lan();
    switch.ask_json(r#"{"op":"fdb_add","network":"lan","mac":"02:00:00:00:00:77","at":{"port":"p1"}}"#).unwrap();
    let state = switch.control.state("boot");
    let wait = || {
        let mut next = Switch::new();
        next.backend.broken.push("p1".to_owned());
        next.control.restore(state.clone(), &mut next.backend);
        next.backend.broken.clear();
        let Ok(Answer::Fdb { stations }) = next.ask_json(r#"{"op":"fdb_list"}"#) else { panic!() };
        assert!(stations.iter().any(|station| station.mac == MacAddr([2, 0, 0, 0, 0, 0x77])), "{stations:?}");
        let Ok(Answer::Ports { ports }) = next.ask_json(r#"{"op":"port_list","link":"p1"}"#) else { panic!() };
        assert_eq!(ports[0].waiting.as_deref(), Some("no link p1"), "it says why it waits");
        next
    };
    let mut next = wait();
    next.ask_json(r#"{"op":"fdb_del","network":"lan","mac":"02:00:00:00:00:77"}"#).unwrap();
    next.control.adopt_waiting(|_| true, &mut next.backend);
    assert!(next.control.state("boot").stations.is_empty());
    // One that was moved meanwhile does not come back.
    let mut next = wait();
    next.ask_json(r#"{"op":"fdb_add","network":"lan","mac":"02:00:00:00:00:77","at":{"port":"p2"}}"#).unwrap();
    next.control.adopt_waiting(|_| true, &mut next.backend);
    let stations = next.control.state("boot").stations;
    assert_eq!((stations.len(), stations[0].at.to_string().as_str()), (1, "port p2"));
}
