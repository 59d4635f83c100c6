//! What bridged networks do beyond forwarding: groups, neighbors, storms, limits, mirrors, announcements.

use etherparse::PacketBuilder;
use vswitch_api::{Answer, FdbTarget, PortInfo};
use vswitch_control::UPLINK_PORT;
use vswitch_dataplane::DropReason;
use vswitch_net::{MacAddr, PortId, checksum};
use vswitch_tests::frames::{self, Ends};
use vswitch_tests::mem::Switch;
use vswitch_tests::twin::WIRE_MACS;

use super::{bad_input, mac};

fn add(switch: &mut Switch, port: &str) -> PortInfo {
    match switch.ask_json(&format!(r#"{{"op":"port_add",{port}}}"#)) {
        Ok(Answer::Port(info)) => *info,
        other => panic!("{other:?}"),
    }
}

/// A bridged network "lan" with a peer and three ports; `more` is more of the network.
fn lan(more: &str) -> (Switch, [PortId; 3]) {
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
fn drain(switch: &mut Switch, ports: &[PortId]) -> Vec<usize> {
    switch.settle();
    ports.iter().chain([&UPLINK_PORT]).map(|&port| switch.take(port).len()).collect()
}

fn igmp(from: u8, kind: u8, group: [u8; 4]) -> Vec<u8> {
    let mut body = vec![kind, 0, 0, 0, group[0], group[1], group[2], group[3]];
    if kind == 0x22 {
        // IGMPv3: one record, "exclude nothing".
        body = vec![0x22, 0, 0, 0, 0, 0, 0, 1, 4, 0, 0, 0, group[0], group[1], group[2], group[3]];
    }
    let sum = checksum::finish(checksum::sum(&body));
    body[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut frame = Vec::new();
    let to = [1, 0, 0x5e, group[1] & 127, group[2], group[3]];
    PacketBuilder::ethernet2(mac(from).0, to)
        .ipv4([10, 9, 0, from], group, 1)
        .write(&mut frame, etherparse::IpNumber(2), &body)
        .unwrap();
    frame
}

fn to_group(from: u8) -> Vec<u8> {
    let ends = Ends { from: mac(from), to: MacAddr([1, 0, 0x5e, 1, 2, 3]) };
    frames::udp(ends, &format!("10.9.0.{from}"), "239.1.2.3", b"x")
}

const GROUP: [u8; 4] = [239, 1, 2, 3];

#[test]
fn multicast_goes_to_members_only_where_it_is_snooped() {
    let (mut switch, ports) = lan(r#","multicast_snooping":true"#);
    switch.send(ports[0], &to_group(1));
    assert_eq!(drain(&mut switch, &ports), [0, 0, 0, 0], "nobody has asked");
    assert_eq!(switch.drop_of(ports[0], &to_group(1)), Some(DropReason::NoMember));
    for (kind, port) in [(0x16, 1), (0x22, 2)] {
        switch.send(ports[port], &igmp(port as u8 + 1, kind, GROUP));
        assert_eq!(drain(&mut switch, &ports), [0, 0, 0, 1], "a report goes to peers, not to other hosts");
    }
    switch.send(ports[0], &to_group(1));
    assert_eq!(drain(&mut switch, &ports), [0, 1, 1, 0]);
    switch.send(ports[1], &igmp(2, 0x17, GROUP));
    drain(&mut switch, &ports);
    switch.send(ports[0], &to_group(1));
    assert_eq!(drain(&mut switch, &ports), [0, 0, 1, 0], "one left");
    // A router gets everything from then on.
    switch.send(ports[1], &igmp(2, 0x11, [224, 0, 0, 1]));
    drain(&mut switch, &ports);
    switch.send(ports[0], &to_group(1));
    assert_eq!(drain(&mut switch, &ports), [0, 1, 1, 0]);
    let Ok(Answer::Groups { groups }) = switch.ask_json(r#"{"op":"group_list"}"#) else { panic!() };
    assert_eq!((groups.len(), &groups[0].at), (1, &FdbTarget::Port("p3".into())));
    // Link-local groups go to all (RFC 4541), and so does what is no IP.
    let mdns =
        frames::udp(Ends { from: mac(1), to: MacAddr([1, 0, 0x5e, 0, 0, 251]) }, "10.9.0.1", "224.0.0.251", b"x");
    switch.send(ports[0], &mdns);
    assert_eq!(drain(&mut switch, &ports), [0, 1, 1, 1]);
    // Who is silent is forgotten.
    switch.pass(261_000_000_000);
    drain(&mut switch, &ports);
    assert_eq!(switch.drop_of(ports[0], &to_group(1)), Some(DropReason::NoMember));
}

#[test]
fn members_are_asked_by_both_families() {
    let (mut switch, ports) = lan(r#","multicast_snooping":true"#);
    switch.pass(126_000_000_000);
    switch.settle();
    let asked = switch.take(ports[0]);
    assert_eq!(asked.len(), 2);
    let v4 = etherparse::SlicedPacket::from_ethernet(&asked[0]).unwrap();
    let Some(etherparse::NetSlice::Ipv4(ip)) = v4.net else { panic!() };
    assert_eq!((ip.header().ttl(), ip.payload().payload[0]), (1, 0x11));
    assert_eq!(checksum::fold(checksum::sum(ip.payload().payload)), 0xffff);
    let v6 = etherparse::SlicedPacket::from_ethernet(&asked[1]).unwrap();
    let Some(etherparse::NetSlice::Ipv6(ip)) = v6.net else { panic!() };
    let (from, to) = (ip.header().source_addr(), ip.header().destination_addr());
    let body = ip.payload().payload;
    assert_eq!((ip.header().hop_limit(), body[0], from.is_unicast_link_local()), (1, 130, true));
    let sum = checksum::pseudo_v6(from, to, 58, body.len() as u32) + checksum::sum(body);
    assert_eq!(checksum::fold(sum), 0xffff);
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
fn peers_are_not_asked_and_may_have_many_groups() {
    let (mut switch, ports) = lan(r#","multicast_snooping":true"#);
    switch.pass(126_000_000_000);
    assert_eq!(drain(&mut switch, &ports), [2, 2, 2, 0], "who asked a peer would get all of its multicast");
    // A thousand groups of pods behind the peer; a port has 128 and what is beyond is counted.
    let taken = |switch: &mut Switch| match switch.ask_json(r#"{"op":"group_list"}"#) {
        Ok(Answer::Groups { groups }) => groups.len(),
        other => panic!("{other:?}"),
    };
    let group = |number: u16| [239, 1, (number >> 8) as u8, number as u8];
    for number in 0..1000 {
        let frame = bad_input::outer("192.0.2.2", "192.0.2.1", 4789, 9, &igmp(9, 0x16, group(number)));
        switch.send(UPLINK_PORT, &frame);
        switch.settle();
    }
    assert_eq!(taken(&mut switch), 1000);
    for number in 0..200 {
        switch.send(ports[0], &igmp(1, 0x16, group(2000 + number)));
        switch.settle();
    }
    assert_eq!(taken(&mut switch), 1128);
    let Ok(Answer::Ports { ports }) = switch.ask_json(r#"{"op":"port_list"}"#) else { panic!() };
    assert_eq!(ports.iter().map(|port| port.groups_refused).collect::<Vec<_>>(), [72, 0, 0]);
}
