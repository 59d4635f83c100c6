//! Multicast groups of bridged networks that snoop: members here and behind peers, questions and reports.

use etherparse::PacketBuilder;
use vswitch_api::{Answer, FdbTarget};
use vswitch_control::UPLINK_PORT;
use vswitch_dataplane::DropReason;
use vswitch_net::{MacAddr, PortId, checksum};
use vswitch_tests::frames::{self, Ends};
use vswitch_tests::mem::Switch;
use vswitch_tests::twin::WIRE_MACS;

use super::lan::{add, drain, lan};
use super::{bad_input, mac};

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

/// As [`lan`], with snooping, after the peer had the time to tell of its members.
fn snooping() -> (Switch, [PortId; 3]) {
    let (mut switch, ports) = lan(r#","multicast_snooping":true"#);
    for _ in 0..12 {
        switch.pass(1_000_000_000);
        drain(&mut switch, &ports);
    }
    (switch, ports)
}

fn count(switch: &mut Switch) -> usize {
    match switch.ask_json(r#"{"op":"group_list"}"#) {
        Ok(Answer::Groups { groups }) => groups.len(),
        other => panic!("{other:?}"),
    }
}

fn over_the_wire(inner: &[u8]) -> Vec<u8> {
    bad_input::outer("192.0.2.2", "192.0.2.1", 4789, 9, inner)
}

#[test]
fn multicast_goes_to_members_only_where_it_is_snooped() {
    let (mut switch, ports) = snooping();
    switch.send(ports[0], &to_group(1));
    assert_eq!(drain(&mut switch, &ports), [0, 0, 0, 0], "nobody has asked");
    assert_eq!(switch.drop_of(ports[0], &to_group(1)), Some(DropReason::NoMember));
    for (kind, port) in [(0x16, 1), (0x22, 2)] {
        switch.send(ports[port], &igmp(port as u8 + 1, kind, GROUP));
        assert_eq!(
            drain(&mut switch, &ports),
            [0, 0, 0, usize::from(port == 1)],
            "peers hear of a group, hosts do not"
        );
    }
    switch.send(ports[0], &to_group(1));
    assert_eq!(drain(&mut switch, &ports), [0, 1, 1, 0]);
    switch.send(ports[1], &igmp(2, 0x17, GROUP));
    drain(&mut switch, &ports);
    switch.send(ports[0], &to_group(1));
    assert_eq!(drain(&mut switch, &ports), [0, 0, 1, 0], "one left");
    // Who asks from nowhere is no router, but another switch (RFC 4541 section 2.1.1); a router gets everything.
    let mut nowhere = igmp(2, 0x11, [224, 0, 0, 1]);
    nowhere[24..30].fill(0);
    let sum = checksum::finish(checksum::sum(&nowhere[14..34]));
    nowhere[24..26].copy_from_slice(&sum.to_be_bytes());
    switch.send(ports[1], &nowhere);
    drain(&mut switch, &ports);
    switch.send(ports[0], &to_group(1));
    assert_eq!(drain(&mut switch, &ports), [0, 0, 1, 0]);
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
    let (mut switch, ports) = snooping();
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
fn peers_are_asked_and_may_have_many_groups() {
    let (mut switch, ports) = snooping();
    switch.pass(126_000_000_000);
    assert_eq!(drain(&mut switch, &ports), [2, 2, 2, 2]);
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

/// A host with many groups says them all in one report, those of the link among them (RFC 3810 section 5.2).
#[test]
fn a_report_is_read_to_its_end() {
    let (mut switch, ports) = snooping();
    let mut body = vec![143, 0, 0, 0, 0, 0, 0, 60];
    for number in 0..60_u8 {
        let scope = if number % 3 == 0 { 2 } else { 5 };
        body.extend_from_slice(&[4, 0, 0, 0, 0xff, scope]);
        body.extend_from_slice(&[0; 13]);
        body.push(number);
    }
    let (from, to) = ("fe80::ff:fe00:1".parse().unwrap(), "ff02::16".parse().unwrap());
    let sum = checksum::pseudo_v6(from, to, 58, body.len() as u32) + checksum::sum(&body);
    body[2..4].copy_from_slice(&checksum::finish(sum).to_be_bytes());
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(mac(1).0, [0x33, 0x33, 0, 0, 0, 0x16])
        .ipv6(from.octets(), to.octets(), 1)
        .write(&mut frame, etherparse::IpNumber::IPV6_ICMP, &body)
        .unwrap();
    switch.send(ports[0], &frame);
    switch.settle();
    assert_eq!(count(&mut switch), 40);
}

/// What a port may not have here it takes nobody's room for elsewhere.
#[test]
fn peers_hear_of_no_more_groups_than_a_port_may_have() {
    let (mut switch, ports) = snooping();
    let mut told = Vec::new();
    for number in 0..1000_u16 {
        switch.send(ports[0], &igmp(1, 0x16, [239, 1, (number >> 8) as u8, number as u8]));
        switch.settle();
        told.extend(switch.take(UPLINK_PORT));
    }
    assert_eq!((count(&mut switch), told.len()), (128, 128));
    // And what they hear is what a station would have said, from nobody.
    let (mut other, others) = snooping();
    for report in told {
        other.send(UPLINK_PORT, &over_the_wire(&report[50..]));
        other.settle();
    }
    assert_eq!(count(&mut other), 128);
    assert_eq!(drain(&mut other, &others)[..3], [0, 0, 0]);
}

/// After a restart of this node a peer's members are found at once: it is asked, and until it has answered gets everything.
#[test]
fn a_peer_that_is_met_tells_of_its_members() {
    let (mut one, one_ports) = snooping();
    one.send(one_ports[1], &igmp(2, 0x16, GROUP));
    drain(&mut one, &one_ports);
    let (mut two, two_ports) = lan(r#","multicast_snooping":true"#);
    two.pass(1_000_000_000);
    two.settle();
    let asked = two.take(UPLINK_PORT);
    two.send(two_ports[0], &to_group(1));
    assert_eq!(drain(&mut two, &two_ports)[3], 1, "nothing is known yet");
    // Both answers, of which the second comes too soon after the first.
    let mut told = Vec::new();
    for question in &asked {
        one.send(UPLINK_PORT, &over_the_wire(&question[50..]));
        one.settle();
        told.extend(one.take(UPLINK_PORT));
    }
    assert_eq!((drain(&mut one, &one_ports)[..3].to_vec(), told.len()), (vec![0, 0, 0], 1));
    two.send(UPLINK_PORT, &over_the_wire(&told[0][50..]));
    for _ in 0..12 {
        two.pass(1_000_000_000);
        drain(&mut two, &two_ports);
    }
    two.send(two_ports[0], &to_group(1));
    assert_eq!(drain(&mut two, &two_ports), [0, 0, 0, 1]);
    let unwanted =
        frames::udp(Ends { from: mac(1), to: MacAddr([1, 0, 0x5e, 9, 9, 9]) }, "10.9.0.1", "239.9.9.9", b"x");
    assert_eq!(two.drop_of(two_ports[0], &unwanted), Some(DropReason::NoMember));
}

#[test]
fn one_of_two_behind_a_port_leaves_and_the_other_stays() {
    let mut switch = Switch::new().with_uplink(WIRE_MACS[0], Some("192.0.2.1"), None, 1500);
    let more = r#""mode":"bridged","spoof_check":false,"multicast_snooping":true"#;
    switch.ask_json(&format!(r#"{{"op":"network_add","name":"lan","vni":9,{more}}}"#)).unwrap();
    let shared = add(&mut switch, r#""link":"shared","mac":"02:00:00:00:00:01","network":"lan""#).id;
    let sender = add(&mut switch, r#""link":"sender","mac":"02:00:00:00:00:03","network":"lan""#).id;
    switch.pass(1_000_000_000);
    for station in [50, 51] {
        switch.send(shared, &igmp(station, 0x16, GROUP));
    }
    drain(&mut switch, &[shared, sender]);
    switch.send(shared, &igmp(50, 0x17, GROUP));
    switch.settle();
    let asked = switch.take(shared);
    // A question for the group alone (RFC 2236 section 3).
    assert_eq!((asked.len(), &asked[0][30..34], &asked[0][42..46]), (1, &GROUP[..], &GROUP[..]));
    switch.send(shared, &igmp(51, 0x16, GROUP));
    for (answers, members) in [(true, 1), (false, 0)] {
        if !answers {
            switch.send(shared, &igmp(51, 0x17, GROUP));
        }
        switch.settle();
        switch.pass(3_000_000_000);
        drain(&mut switch, &[shared, sender]);
        switch.send(sender, &to_group(3));
        assert_eq!(drain(&mut switch, &[shared, sender])[0], members);
    }
}
