//! What bridged networks do beyond forwarding: groups, neighbors, storms, limits, mirrors, announcements.

use vswitch_api::{Answer, FdbTarget, PortInfo};
use vswitch_control::UPLINK_PORT;
use vswitch_dataplane::DropReason;
use vswitch_net::{MacAddr, PortId, checksum};
use vswitch_tests::frames::{self, Ends};
use vswitch_tests::mem::Switch;
use vswitch_tests::twin::WIRE_MACS;

use super::{bad_input, mac};

pub(super) fn add(switch: &mut Switch, port: &str) -> PortInfo {
    match switch.ask_json(&format!(r#"{{"op":"port_add",{port}}}"#)) {
        Ok(Answer::Port(info)) => *info,
        other => panic!("{other:?}"),
    }
}

/// A bridged network "lan" with a peer and three ports; `more` is more of the network.
pub(super) fn lan(more: &str) -> (Switch, [PortId; 3]) {
    let mut switch = Switch::new().with_uplink(WIRE_MACS[0], Some("192.0.2.1"), None, 1500);
    switch
        .ask_json(&format!(
            r#"{{"op":"network_add","name":"lan","vni":9,"mode":"bridged","subnets":["10.9.0.0/16","fd09::/64"]{more}}}"#
        ))
        .unwrap();
    switch.ask_json(r#"{"op":"peer_add","name":"other","vtep":"192.0.2.2"}"#).unwrap();
    switch.resolve("192.0.2.2", WIRE_MACS[1]);
    let ports = [1, 2, 3].map(|number| {
        let port = format!(
            r#""link":"p{number}","mac":"02:00:00:00:00:0{number}","network":"lan","check":"mac","addresses":["10.9.0.{number}","fd09::{number}"]"#
        );
        add(&mut switch, &port).id
    });
    drain(&mut switch, &ports);
    (switch, ports)
}

/// How many packets left by each port, the wire last.
pub(super) fn drain(switch: &mut Switch, ports: &[PortId]) -> Vec<usize> {
    switch.settle();
    ports.iter().chain([&UPLINK_PORT]).map(|&port| switch.take(port).len()).collect()
}

#[test]
fn known_stations_are_answered_for_unless_told_not_to() {
    for (more, is_answered) in [("", true), (r#","neighbor_suppression":false"#, false)] {
        let (mut switch, ports) = lan(more);
        let fdb = r#"{"op":"fdb_add","network":"lan","mac":"02:00:00:00:00:77","at":{"peer":"other"},"addresses":["10.9.0.77"]}"#;
        switch.ask_json(fdb).unwrap();
        for (asked, owner) in [("10.9.0.2", mac(2)), ("10.9.0.77", mac(0x77))] {
            switch.send(ports[0], &frames::arp_request(mac(1), "10.9.0.1", asked));
            switch.settle();
            let out = switch.take(ports[0]);
            assert_eq!(out.len(), usize::from(is_answered), "{asked}");
            if let Some(answer) = out.first() {
                assert_eq!(answer[22..28], owner.0, "the station's own MAC");
            }
            let others = drain(&mut switch, &ports);
            assert_eq!(others, if is_answered { [0, 0, 0, 0] } else { [0, 1, 1, 1] });
        }
        switch.send(ports[0], &frames::neighbor_solicitation(mac(1), "fd09::1", "fd09::2"));
        switch.settle();
        assert_eq!(switch.take(ports[0]).len(), usize::from(is_answered));
        drain(&mut switch, &ports);
        // Strangers, and what stations say of themselves, go to all.
        for (sender, asked) in [("10.9.0.1", "10.9.0.200"), ("10.9.0.1", "10.9.0.1")] {
            switch.send(ports[0], &frames::arp_request(mac(1), sender, asked));
            assert_eq!(drain(&mut switch, &ports), [0, 1, 1, 1], "{asked}");
        }
    }
}

#[test]
fn storms_are_stilled_by_kind_and_port() {
    let (mut switch, ports) = lan(r#","storm":{"broadcast":100,"multicast":200,"unknown_unicast":300}"#);
    let frame = |to: MacAddr| frames::udp(Ends { from: mac(1), to }, "10.9.0.1", "10.9.0.9", b"x");
    let cases = [
        (MacAddr::BROADCAST, DropReason::StormBroadcast, 10),
        (MacAddr([1, 0, 0, 0, 0, 9]), DropReason::StormMulticast, 20),
        (mac(99), DropReason::StormUnknown, 30),
    ];
    for (to, reason, burst) in cases {
        for _ in 0..1000 {
            switch.send(ports[0], &frame(to));
        }
        assert_eq!(drain(&mut switch, &ports), [0, burst, burst, burst]);
        assert_eq!(switch.counters().port(ports[0]).drops[reason.index()], 1000 - burst as u64);
        switch.send(ports[1], &frames::udp(Ends { from: mac(2), to }, "10.9.0.2", "10.9.0.9", b"x"));
        assert_eq!(drain(&mut switch, &ports), [1, 0, 1, 1], "another port is not meant");
    }
    switch.send(ports[0], &frame(mac(2)));
    assert_eq!(drain(&mut switch, &ports), [0, 1, 0, 0], "nor is what goes to one");
}

#[test]
fn sticky_and_limited_ports() {
    let (mut switch, ports) = lan("");
    let sticky =
        add(&mut switch, r#""link":"s","mac":"02:00:00:00:00:04","network":"lan","check":"none","sticky":true"#);
    let limited =
        add(&mut switch, r#""link":"l","mac":"02:00:00:00:00:05","network":"lan","check":"none","mac_limit":3"#);
    let from = |number: u8, to: MacAddr| frames::udp(Ends { from: mac(number), to }, "10.9.0.9", "10.9.0.8", b"x");
    switch.send(sticky.id, &from(50, MacAddr::BROADCAST));
    switch.settle();
    assert_eq!(switch.drop_of(limited.id, &from(50, MacAddr::BROADCAST)), Some(DropReason::StickyMac));
    switch.pass(400_000_000_000);
    assert_eq!(switch.drop_of(limited.id, &from(50, MacAddr::BROADCAST)), Some(DropReason::StickyMac), "for good");
    for number in 100..200 {
        switch.send(limited.id, &from(number, MacAddr::BROADCAST));
    }
    switch.settle();
    let Ok(Answer::Fdb { stations }) = switch.ask_json(r#"{"op":"fdb_list"}"#) else { panic!() };
    let here = stations.iter().filter(|info| info.at == FdbTarget::Port("l".into()) && !info.is_static).count();
    assert_eq!(here, 3);
    let Ok(Answer::Ports { ports: infos }) = switch.ask_json(r#"{"op":"port_list","link":"l"}"#) else { panic!() };
    assert_eq!(infos[0].stations_refused, 97);
    let all: Vec<PortId> = ports.into_iter().chain([sticky.id]).collect();
    drain(&mut switch, &all);
}

#[test]
fn mirrors_copy_both_ways_to_a_port_and_to_a_peer() {
    let (mut switch, ports) = lan("");
    let span = r#"{"op":"network_add","name":"span","vni":99,"mode":"bridged","spoof_check":false}"#;
    switch.ask_json(span).unwrap();
    let probe = add(&mut switch, r#""link":"probe","mac":"02:00:00:00:00:0f","network":"span""#);
    switch.ask_json(r#"{"op":"mirror_add","name":"here","ports":["p1"],"to":{"port":"probe"}}"#).unwrap();
    switch
        .ask_json(r#"{"op":"mirror_add","name":"there","ports":["p1"],"direction":"from","to":{"peer":"other"},"network":"span"}"#)
        .unwrap();
    drain(&mut switch, &[probe.id]);
    let out = frames::udp(Ends { from: mac(1), to: mac(2) }, "10.9.0.1", "10.9.0.2", b"request");
    let back = frames::udp(Ends { from: mac(2), to: mac(1) }, "10.9.0.2", "10.9.0.1", b"answer");
    // Twice: on the flow table's way too. And with checksums that are left to the device.
    for _ in 0..2 {
        switch.send(ports[0], &frames::partial(out.clone()));
        switch.send(ports[1], &frames::partial(back.clone()));
        switch.settle();
        assert_eq!(switch.take(ports[1]), std::slice::from_ref(&out));
        assert_eq!(switch.take(ports[0]), std::slice::from_ref(&back));
        assert_eq!(switch.take(probe.id), [out.clone(), back.clone()]);
        let wire = switch.take(UPLINK_PORT);
        assert_eq!(wire.len(), 1, "from the port only");
        assert_eq!((&wire[0][46..49], &wire[0][50..]), (&[0, 0, 99][..], &out[..]));
    }
    for (request, words) in [
        (r#"{"op":"mirror_add","name":"x","ports":["p1"],"to":{"port":"p1"}}"#, "or one that is looked at"),
        (r#"{"op":"mirror_add","name":"x","ports":["nope"],"to":{"port":"p1"}}"#, "no port of link nope"),
        (r#"{"op":"mirror_add","name":"x","ports":["p1"],"to":{"peer":"other"}}"#, "needs the network"),
        (r#"{"op":"mirror_add","name":"here","ports":["p1"],"to":{"port":"p2"}}"#, "exists"),
        (r#"{"op":"network_del","name":"span"}"#, "ports"),
    ] {
        let error = switch.ask_json(request).unwrap_err();
        assert!(error.message.contains(words), "{error}");
    }
    // It ends with what it looks at.
    switch.ask_json(r#"{"op":"port_del","link":"p1"}"#).unwrap();
    let Ok(Answer::Mirrors { mirrors }) = switch.ask_json(r#"{"op":"mirror_list"}"#) else { panic!() };
    assert!(mirrors.is_empty());
}

#[test]
fn a_port_that_comes_announces_itself() {
    let (mut switch, ports) = lan("");
    let new = add(
        &mut switch,
        r#""link":"new","mac":"02:00:00:00:00:09","network":"lan","addresses":["10.9.0.9","fd09::9"]"#,
    );
    switch.settle();
    assert!(switch.take(new.id).is_empty(), "not to itself");
    let (here, wire) = (switch.take(ports[0]), switch.take(UPLINK_PORT));
    assert_eq!((here.len(), wire.len()), (2, 2));
    let arp = &here[0];
    assert_eq!((&arp[..6], &arp[6..12]), (&[0xff; 6][..], &mac(9).0[..]));
    assert_eq!((&arp[28..32], &arp[38..42]), (&[10, 9, 0, 9][..], &[10, 9, 0, 9][..]), "for its own address");
    let icmp = smoltcp::wire::Icmpv6Packet::new_checked(&here[1][54..]).unwrap();
    let ip = smoltcp::wire::Ipv6Packet::new_checked(&here[1][14..]).unwrap();
    assert!(icmp.verify_checksum(&ip.src_addr(), &ip.dst_addr()));
    assert_eq!(icmp.target_addr().to_string(), "fd09::9");
    assert_eq!(wire[0][50..], arp[..], "and over the wire");
}

#[test]
fn a_trunk_is_stilled_by_the_limits_of_each_of_its_networks() {
    let mut switch = Switch::new();
    let networks = [
        r#""name":"red","vni":10,"vlan":10"#,
        r#""name":"blue","vni":20,"vlan":20,"storm":{"broadcast":100,"multicast":100,"unknown_unicast":100}"#,
    ];
    for network in networks {
        switch.ask_json(&format!(r#"{{"op":"network_add","mode":"bridged","spoof_check":false,{network}}}"#)).unwrap();
    }
    let trunk = add(&mut switch, r#""link":"t","mac":"02:00:00:00:00:01","network":"red","trunk":[20]"#).id;
    let red = add(&mut switch, r#""link":"r","mac":"02:00:00:00:00:02","network":"red""#).id;
    let blue = add(&mut switch, r#""link":"b","mac":"02:00:00:00:00:03","network":"blue""#).id;
    let frame = frames::udp(Ends { from: mac(1), to: MacAddr::BROADCAST }, "10.9.0.1", "10.9.0.9", b"x");
    let tagged = [&frame[..12], &[0x81, 0, 0, 20], &frame[12..]].concat();
    for _ in 0..1000 {
        switch.send(trunk, &frame);
        switch.send(trunk, &tagged);
    }
    switch.settle();
    assert_eq!((switch.take(red).len(), switch.take(blue).len()), (1000, 10));
}

#[test]
fn a_tag_is_not_counted_in_a_ports_mtu() {
    let mut switch = Switch::new();
    let network =
        r#"{"op":"network_add","name":"plain","vni":30,"mode":"bridged","spoof_check":false,"transparent":true}"#;
    switch.ask_json(network).unwrap();
    let [one, two] = [1, 2].map(|number| {
        add(
            &mut switch,
            &format!(r#""link":"p{number}","mac":"02:00:00:00:00:0{number}","network":"plain","mtu":1500"#),
        )
        .id
    });
    let frame = |bytes| {
        let frame =
            frames::udp(Ends { from: mac(1), to: mac(2) }, "10.9.0.1", "10.9.0.2", &std::vec::from_elem(7, bytes));
        [&frame[..12], &[0x88, 0xa8, 0, 20], &frame[12..]].concat()
    };
    assert_eq!(switch.drop_of(one, &frame(1472)), None);
    assert_eq!(switch.take(two)[0].len(), 1518);
    assert_eq!(switch.drop_of(one, &frame(1473)), Some(DropReason::TooBigForPort));
}

#[test]
fn stations_behind_one_hairpin_find_each_other() {
    let mut switch = Switch::new().with_uplink(WIRE_MACS[0], Some("192.0.2.1"), None, 1500);
    let more = r#""mode":"bridged","spoof_check":false,"subnets":["10.9.0.0/16"]"#;
    switch.ask_json(&format!(r#"{{"op":"network_add","name":"lan","vni":9,{more}}}"#)).unwrap();
    let pin = add(&mut switch, r#""link":"pin","mac":"02:00:00:00:00:01","network":"lan","hairpin":true"#).id;
    let other =
        add(&mut switch, r#""link":"other","mac":"02:00:00:00:00:02","network":"lan","addresses":["10.9.0.2"]"#);
    switch.settle();
    assert!(switch.take(pin).len() == 1 && switch.take(other.id).is_empty(), "an announcement does not come back");
    switch.send(pin, &frames::arp_request(mac(50), "10.9.0.50", "10.9.0.51"));
    assert_eq!(drain(&mut switch, &[pin, other.id])[..2], [1, 1]);
    switch.send(pin, &frames::udp(Ends { from: mac(50), to: mac(51) }, "10.9.0.50", "10.9.0.51", b"x"));
    assert_eq!(drain(&mut switch, &[pin, other.id])[..2], [1, 1], "nobody knows where it is");
    switch.send(pin, &frames::udp(Ends { from: mac(51), to: mac(50) }, "10.9.0.51", "10.9.0.50", b"x"));
    assert_eq!(drain(&mut switch, &[pin, other.id])[..2], [1, 0]);
}

/// A station that is not known may be anywhere, also where its packet fits.
#[test]
fn a_flood_is_no_reason_to_speak() {
    let (mut switch, ports) = lan("");
    let mut frame = frames::udp(Ends { from: mac(1), to: mac(0x88) }, "10.9.0.1", "10.9.0.88", &[0; 3000]);
    frame[20] |= 0x40;
    frame[24..26].fill(0);
    let sum = checksum::finish(checksum::sum(&frame[14..34]));
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    switch.send(ports[0], &frame);
    assert_eq!(drain(&mut switch, &ports), [0, 1, 1, 0]);
    // Where it is known to be behind a peer, its sender is told what fits.
    let station = r#"{"op":"fdb_add","network":"lan","mac":"02:00:00:00:00:88","at":{"peer":"other"}}"#;
    switch.ask_json(station).unwrap();
    switch.send(ports[0], &frame);
    assert_eq!(drain(&mut switch, &ports), [1, 0, 0, 0]);
    assert_eq!(switch.counters().errors_sent, 1);
    // What nobody is told of is not counted as told.
    switch.control.set_next_hops("192.0.2.2".parse().unwrap(), Vec::new());
    switch.settle();
    let small = frames::udp(Ends { from: mac(1), to: mac(0x88) }, "10.9.0.1", "10.9.0.88", b"x");
    assert_eq!(switch.drop_of(ports[0], &small), Some(DropReason::NoNeighbor));
    assert_eq!((switch.counters().errors_sent, switch.counters().errors_held), (1, 0));
}

#[test]
fn a_mirror_shows_the_tags_of_a_trunk() {
    let mut switch = Switch::new().with_uplink(WIRE_MACS[0], Some("192.0.2.1"), None, 1500);
    for (name, vni) in [("red", 10), ("blue", 20), ("span", 99)] {
        let more = format!(r#""vni":{vni},"mode":"bridged","spoof_check":false,"vlan":{vni}"#);
        switch.ask_json(&format!(r#"{{"op":"network_add","name":"{name}",{more}}}"#)).unwrap();
    }
    let trunk = add(&mut switch, r#""link":"t","mac":"02:00:00:00:00:01","network":"red","trunk":[20]"#).id;
    let blue = add(&mut switch, r#""link":"b","mac":"02:00:00:00:00:03","network":"blue""#).id;
    let probe = add(&mut switch, r#""link":"probe","mac":"02:00:00:00:00:0f","network":"span""#).id;
    switch.ask_json(r#"{"op":"mirror_add","name":"m","ports":["t"],"to":{"port":"probe"}}"#).unwrap();
    drain(&mut switch, &[trunk, blue, probe]);
    let out = frames::udp(Ends { from: mac(1), to: mac(3) }, "10.9.0.1", "10.9.0.9", b"x");
    let back = frames::udp(Ends { from: mac(3), to: mac(1) }, "10.9.0.9", "10.9.0.1", b"x");
    // With a priority, too; and with a checksum that is left to the device.
    let tagged = |frame: &[u8], high| [&frame[..12], &[0x81, 0, high, 20], &frame[12..]].concat();
    switch.send(trunk, &tagged(&frames::partial(out.clone()), 0xa0));
    switch.settle();
    switch.send(blue, &back);
    switch.settle();
    assert_eq!(switch.take(probe), [tagged(&out, 0xa0), tagged(&back, 0)]);
}

#[test]
fn where_nothing_is_learned_all_copies_reach_all_ports() {
    let mut switch = Switch::new().with_uplink(WIRE_MACS[0], Some("192.0.2.1"), None, 1500);
    let network = r#"{"op":"network_add","name":"span","vni":9,"mode":"bridged","spoof_check":false,"learning":false}"#;
    switch.ask_json(network).unwrap();
    switch.ask_json(r#"{"op":"peer_add","name":"other","vtep":"192.0.2.2"}"#).unwrap();
    let probe = add(&mut switch, r#""link":"probe","mac":"02:00:00:00:00:0f","network":"span""#).id;
    drain(&mut switch, &[probe]);
    // Both sides of a conversation, as a mirror elsewhere sends them.
    for ends in [Ends { from: mac(1), to: mac(2) }, Ends { from: mac(2), to: mac(1) }] {
        let copy = frames::udp(ends, "10.9.0.1", "10.9.0.2", b"x");
        for _ in 0..2 {
            switch.send(UPLINK_PORT, &bad_input::outer("192.0.2.2", "192.0.2.1", 4789, 9, &copy));
            switch.settle();
            assert_eq!(switch.take(probe), std::slice::from_ref(&copy));
        }
    }
    let routed = r#"{"op":"network_add","name":"x","vni":8,"learning":false}"#;
    assert!(switch.ask_json(routed).unwrap_err().message.contains("learning = false"));
}
