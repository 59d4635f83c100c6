//! What a port may be: limited, a trunk, isolated, its own mirror.

use vswitch_api::{Answer, PortInfo, Request};
use vswitch_control::UPLINK_PORT;
use vswitch_dataplane::DropReason;
use vswitch_net::{GATEWAY_MAC, MacAddr, PortId};
use vswitch_tests::frames::{self, Ends};
use vswitch_tests::mem::Switch;
use vswitch_tests::twin::WIRE_MACS;

use super::mac;
use super::routed::{two_pods, two_pods_of};

fn add(switch: &mut Switch, port: &str) -> PortInfo {
    match switch.ask_json(&format!(r#"{{"op":"port_add",{port}}}"#)) {
        Ok(Answer::Port(info)) => *info,
        other => panic!("{other:?}"),
    }
}

#[test]
fn rates_hold_both_ways_and_what_is_over_is_counted() {
    let (mut switch, one, _) = two_pods();
    let slow = add(
        &mut switch,
        r#""link":"slow","mac":"02:00:00:00:00:09","network":"pods","addresses":["10.1.0.9"],
           "bandwidth":{"ingress_rate":8000000,"ingress_burst":80000,"egress_rate":4000000,"egress_burst":80000}"#,
    );
    // 1,000 bytes with all headers: 8,000 bits.
    let frame = |from: u8, source: &str, to: &str| {
        frames::udp(Ends { from: mac(from), to: GATEWAY_MAC }, source, to, &[0; 1000 - 42])
    };
    let mut passed = (0, 0);
    for _ in 0..1000 {
        for _ in 0..2 {
            switch.send(one.id, &frame(1, "10.1.0.1", "10.1.0.9"));
        }
        switch.send(one.id, &frame(1, "10.1.0.1", "10.1.0.9"));
        switch.send(slow.id, &frame(9, "10.1.0.9", "10.1.0.1"));
        switch.settle();
        passed.0 += switch.take(slow.id).len();
        passed.1 += switch.take(one.id).len();
        switch.pass(1_000_000);
    }
    // What waits goes on when its time has come.
    for _ in 0..100 {
        switch.pass(1_000_000);
        switch.settle();
        passed.0 += switch.take(slow.id).len();
        passed.1 += switch.take(one.id).len();
    }
    // One second: a thousand and five hundred packets a second, ten at once, and what waited for 50 ms.
    assert!((1000..=1061).contains(&passed.0), "{passed:?}");
    assert!((500..=536).contains(&passed.1), "{passed:?}");
    assert_eq!(switch.counters().held, 0);
    let drops = |port: PortId, reason: DropReason| switch.counters().port(port).drops[reason.index()];
    assert_eq!(drops(slow.id, DropReason::RateFrom), 1000 - passed.1 as u64);
    assert_eq!(drops(one.id, DropReason::RateTo), 3000 - passed.0 as u64);
}

/// Three bridged networks with VLAN identifiers, the third one transparent.
fn vlans() -> Switch {
    let mut switch = Switch::new().with_uplink(WIRE_MACS[0], Some("192.0.2.1"), None, 1500);
    for (name, vni, more) in [("red", 10, ""), ("blue", 20, ""), ("plain", 30, r#","transparent":true"#)] {
        let network = format!(
            r#"{{"op":"network_add","name":"{name}","vni":{vni},"mode":"bridged","spoof_check":false,"vlan":{vni}{more}}}"#
        );
        switch.ask_json(&network).expect("a network");
    }
    switch
}

fn tagged(vid: u16, frame: &[u8]) -> Vec<u8> {
    let mut out = frame[..12].to_vec();
    out.extend_from_slice(&[0x81, 0]);
    out.extend_from_slice(&vid.to_be_bytes());
    out.extend_from_slice(&frame[12..]);
    out
}

fn frame(from: MacAddr, to: MacAddr) -> Vec<u8> {
    frames::udp(Ends { from, to }, "10.0.0.1", "10.0.0.2", b"hello")
}

#[test]
fn a_trunk_carries_its_vlans_and_no_others() {
    let mut switch = vlans();
    let trunk =
        add(&mut switch, r#""link":"trunk","mac":"02:00:00:00:00:01","network":"red","trunk":[20,30],"check":"none""#);
    let red = add(&mut switch, r#""link":"red","mac":"02:00:00:00:00:02","network":"red""#);
    let blue = add(&mut switch, r#""link":"blue","mac":"02:00:00:00:00:03","network":"blue""#);
    let ports = [trunk.id, red.id, blue.id];
    let run = |switch: &mut Switch, port: PortId, frame: &[u8]| -> Vec<Vec<Vec<u8>>> {
        switch.send(port, frame);
        switch.settle();
        ports.iter().map(|&port| switch.take(port)).collect()
    };
    let (a, b) = (mac(50), MacAddr::BROADCAST);
    // Untagged is the native VLAN, red; 20 is blue; a priority tag is native too.
    assert_eq!(run(&mut switch, trunk.id, &frame(a, b)), [vec![], vec![frame(a, b)], vec![]]);
    assert_eq!(run(&mut switch, trunk.id, &tagged(20, &frame(a, b))), [vec![], vec![], vec![frame(a, b)]]);
    assert_eq!(run(&mut switch, trunk.id, &tagged(0xe000, &frame(a, b))), [vec![], vec![frame(a, b)], vec![]]);
    assert_eq!(switch.drop_of(trunk.id, &tagged(77, &frame(a, b))), Some(DropReason::VlanNotAllowed));
    assert_eq!(switch.drop_of(trunk.id, &tagged(20, &tagged(9, &frame(a, b)))), Some(DropReason::Tagged));
    // And back, to the same MAC in two VLANs, each learned by itself. Twice: the flow table's way is the same.
    for _ in 0..2 {
        assert_eq!(run(&mut switch, red.id, &frame(mac(2), a)), [vec![frame(mac(2), a)], vec![], vec![]]);
        let expected = tagged(20, &frame(mac(3), a));
        assert_eq!(run(&mut switch, blue.id, &frame(mac(3), a)), [vec![expected], vec![], vec![]]);
    }
    // A checksum that is left to the device is completed at its place behind the tag.
    let partial = frames::partial(frame(mac(3), a));
    assert_eq!(run(&mut switch, blue.id, &partial)[0], [tagged(20, &frame(mac(3), a))]);
    assert_eq!(switch.drop_of(red.id, &tagged(20, &frame(a, b))), Some(DropReason::Tagged), "an access port");
}

#[test]
fn a_trunk_without_native_vlan_takes_tagged_frames_only() {
    let mut switch = vlans();
    let trunk = add(
        &mut switch,
        r#""link":"trunk","mac":"02:00:00:00:00:01","network":"red","trunk":[10,20],"native":false,"check":"none""#,
    );
    let red = add(&mut switch, r#""link":"red","mac":"02:00:00:00:00:02","network":"red""#);
    let (a, b) = (mac(50), MacAddr::BROADCAST);
    assert_eq!(switch.drop_of(trunk.id, &frame(a, b)), Some(DropReason::VlanNotAllowed));
    switch.send(trunk.id, &tagged(10, &frame(a, b)));
    switch.send(red.id, &frame(mac(2), b));
    switch.settle();
    assert_eq!(switch.take(red.id), [frame(a, b)]);
    assert_eq!(switch.take(trunk.id), [tagged(10, &frame(mac(2), b))]);
}

#[test]
fn a_transparent_network_carries_tags_as_they_are() {
    let mut switch = vlans();
    switch.ask_json(r#"{"op":"peer_add","name":"other","vtep":"192.0.2.2"}"#).unwrap();
    switch.resolve("192.0.2.2", WIRE_MACS[1]);
    let one = add(&mut switch, r#""link":"one","mac":"02:00:00:00:00:01","network":"plain""#);
    let trunk =
        add(&mut switch, r#""link":"trunk","mac":"02:00:00:00:00:02","network":"red","trunk":[30],"check":"none""#);
    // 802.1ad outside, 802.1Q inside.
    let mut double = tagged(7, &frame(mac(1), MacAddr::BROADCAST));
    double.splice(12..12, [0x88, 0xa8, 0, 5]);
    switch.send(one.id, &double);
    switch.settle();
    assert_eq!(switch.take(trunk.id), [tagged(30, &double)]);
    let wire = switch.take(UPLINK_PORT);
    assert_eq!(wire.len(), 1);
    assert_eq!(wire[0][50..], double[..]);
}

#[test]
fn isolated_ports_speak_with_others_only() {
    let mut switch = vlans();
    let isolated: Vec<PortInfo> = (1..=2)
        .map(|number| {
            let port =
                format!(r#""link":"i{number}","mac":"02:00:00:00:00:0{number}","network":"red","isolated":true"#);
            add(&mut switch, &port)
        })
        .collect();
    let open = add(&mut switch, r#""link":"open","mac":"02:00:00:00:00:03","network":"red""#);
    switch.send(isolated[0].id, &frame(mac(1), MacAddr::BROADCAST));
    switch.settle();
    assert_eq!((switch.take(isolated[1].id).len(), switch.take(open.id).len()), (0, 1));
    assert_eq!(switch.drop_of(isolated[0].id, &frame(mac(1), mac(2))), Some(DropReason::Isolated));
    assert_eq!(switch.drop_of(isolated[0].id, &frame(mac(1), mac(3))), None);
    assert_eq!(switch.drop_of(open.id, &frame(mac(3), mac(2))), None);
}

#[test]
fn hairpin_sends_back_what_came() {
    let mut switch = vlans();
    let port =
        add(&mut switch, r#""link":"p","mac":"02:00:00:00:00:01","network":"red","hairpin":true,"check":"none""#);
    let plain = add(&mut switch, r#""link":"q","mac":"02:00:00:00:00:02","network":"red","check":"none""#);
    for (port, expected) in [(port.id, None), (plain.id, Some(DropReason::SamePort))] {
        // Two stations behind one port, as a bridge in a pod has them.
        switch.send(port, &frame(mac(50), MacAddr::BROADCAST));
        switch.settle();
        assert_eq!(switch.drop_of(port, &frame(mac(51), mac(50))), expected);
    }
}

#[test]
fn checks_are_the_port_s_or_the_network_s() {
    let mut switch = vlans();
    let network = r#"{"op":"network_add","name":"lan","vni":40,"mode":"bridged","subnets":["10.0.0.0/24"]}"#;
    switch.ask_json(network).unwrap();
    let mut port = |number: u8, check: &str| {
        let port = format!(
            r#""link":"p{number}","mac":"02:00:00:00:00:0{number}","network":"lan","addresses":["10.0.0.10{number}"]{check}"#
        );
        add(&mut switch, &port).id
    };
    let ports = [port(1, ""), port(2, r#","check":"mac""#), port(3, r#","check":"none""#)];
    let expected = [
        (Some(DropReason::SpoofedAddress), Some(DropReason::SpoofedMac)),
        (None, Some(DropReason::SpoofedMac)),
        (None, None),
    ];
    for (at, (address, source)) in expected.into_iter().enumerate() {
        let own = mac(at as u8 + 1);
        assert_eq!(switch.drop_of(ports[at], &frame(own, MacAddr::BROADCAST)), address);
        assert_eq!(switch.drop_of(ports[at], &frame(mac(66), MacAddr::BROADCAST)), source);
    }
}

#[test]
fn a_worker_tells_where_its_time_goes() {
    let mut switch = Switch::new();
    switch.ask_json(r#"{"op":"network_add","name":"pods","vni":7,"ranges":["10.1.0.0/24"]}"#).unwrap();
    let pods: Vec<_> = (1..=2).map(|at| switch.add_port(&format!("p{at}"), "pods", mac(at), &[])).collect();
    let ends = Ends { from: mac(1), to: GATEWAY_MAC };
    let [source, destination] = [0, 1].map(|at| pods[at].addresses[0].addr().to_string());
    let frame = frames::udp(ends, &source, &destination, b"hello");
    for size in [1, 3, 64].repeat(40) {
        (0..size).for_each(|_| switch.send(pods[0].id, &frame));
        switch.settle();
    }
    let Answer::Perf { workers } = switch.ask(Request::Perf) else { panic!("another answer") };
    let perf = &workers[0];
    assert_eq!((perf.packets, perf.flow_hits + perf.flow_misses), (40 * 68, 40 * 68));
    assert_eq!(perf.bursts, [40, 40, 0, 0, 0, 0, 40]);
    let names: Vec<&str> = perf.stages.iter().map(|stage| stage.stage.as_str()).collect();
    assert_eq!(names, ["receive", "parse", "lookup", "rewrite", "queue", "transmit"]);
    assert!(perf.timed_packets > 0 && perf.timed_packets < perf.packets / 2, "{} were timed", perf.timed_packets);
    if cfg!(any(target_arch = "x86_64", target_arch = "aarch64")) {
        assert!(perf.stages.iter().all(|stage| stage.cycles > 0), "{:?}", perf.stages);
    }
}

#[test]
fn what_waited_for_a_port_to_wake_is_taken_in_like_all_else() {
    let (mut switch, one, two) = two_pods();
    let ends = Ends { from: mac(1), to: GATEWAY_MAC };
    let packet = |at: usize| frames::udp(ends, "10.1.0.1", "10.1.0.2", &vec![at as u8; 100 + at]);
    // More than a burst; and one that no pod may send.
    let mut packets: Vec<Vec<u8>> = (0..100).map(packet).collect();
    packets.insert(50, frames::udp(Ends { from: mac(5), to: GATEWAY_MAC }, "10.1.0.1", "10.1.0.2", b"forged"));
    switch.receive(one.id, &packets);
    switch.settle();
    let sent = switch.take(two.id);
    assert_eq!(sent.len(), 100);
    for (at, packet) in sent.iter().enumerate() {
        assert_eq!(packet[42..], vec![at as u8; 100 + at], "in their order");
    }
    let counters = switch.counters().port(one.id);
    assert_eq!((counters.rx_packets, counters.dropped()), (101, 1));
    assert_eq!(counters.drops[DropReason::SpoofedMac.index()], 1);
    // What nobody could take in is in the books, too.
    switch.backend.worker.count_lost(one.id, 7, DropReason::Resting);
    switch.settle();
    assert_eq!(switch.counters().port(one.id).drops[DropReason::Resting.index()], 7);
}

#[test]
fn without_memory_what_waited_is_dropped_and_counted() {
    let (mut switch, one, two) = two_pods();
    let frames: Vec<_> = std::iter::from_fn(|| switch.backend.worker.umem_mut().alloc()).collect();
    let packet = frames::udp(Ends { from: mac(1), to: GATEWAY_MAC }, "10.1.0.1", "10.1.0.2", b"hello");
    switch.receive(one.id, &[packet]);
    frames.into_iter().for_each(|frame| switch.backend.worker.umem_mut().free(frame));
    switch.settle();
    assert!(switch.take(two.id).is_empty());
    assert_eq!(switch.counters().port(one.id).drops[DropReason::NoFrames.index()], 1);
}

/// Ports that went idle, and that were sent to while they were.
fn parked(switch: &mut Switch) -> [Vec<PortId>; 2] {
    let mut ports = [switch.backend.worker.take_idle().collect(), switch.backend.worker.take_roused().collect()];
    ports.iter_mut().for_each(|ports: &mut Vec<PortId>| ports.sort());
    ports
}

#[test]
fn a_port_that_is_sent_to_is_not_idle() {
    let (mut switch, one, two) = two_pods_of(Switch::with_idle_turns(4));
    let packet = frames::udp(Ends { from: mac(1), to: GATEWAY_MAC }, "10.1.0.1", "10.1.0.2", b"hello");
    // The mirror of what the daemon does: a port with something to receive is woken.
    let send = |switch: &mut Switch| {
        switch.send(one.id, &packet);
        switch.backend.worker.wake(one.id);
        switch.settle();
        assert_eq!(switch.take(two.id).len(), 1);
    };
    (0..5).for_each(|_| switch.settle());
    assert_eq!(parked(&mut switch), [vec![one.id, two.id], vec![]]);
    assert!(!switch.backend.worker.has_active());

    send(&mut switch);
    assert_eq!(parked(&mut switch), [vec![], vec![two.id]]);
    for _ in 0..10 {
        send(&mut switch);
        assert_eq!(parked(&mut switch), [vec![], vec![]]);
    }
    (0..4).for_each(|_| switch.settle());
    assert_eq!(parked(&mut switch), [vec![one.id, two.id], vec![]]);

    // What the kernel does not take keeps nobody awake: it is looked at once a millisecond.
    switch.port(two.id).is_stuck = true;
    send(&mut switch);
    assert_eq!(parked(&mut switch), [vec![], vec![two.id]]);
    (0..4).for_each(|_| switch.settle());
    assert_eq!(parked(&mut switch), [vec![one.id, two.id], vec![]]);
}

#[test]
fn without_idle_turns_nobody_is_polled_for_being_sent_to() {
    let (mut switch, one, two) = two_pods_of(Switch::with_idle_turns(0));
    let packet = frames::udp(Ends { from: mac(1), to: GATEWAY_MAC }, "10.1.0.1", "10.1.0.2", b"hello");
    switch.settle();
    parked(&mut switch);
    switch.send(one.id, &packet);
    switch.backend.worker.wake(one.id);
    switch.settle();
    assert_eq!(switch.take(two.id).len(), 1);
    assert_eq!(parked(&mut switch), [vec![one.id], vec![]]);
}

#[test]
fn a_flood_has_nobody_polled() {
    let mut switch = Switch::with_idle_turns(4);
    let network = r#"{"op":"network_add","name":"lan","vni":5,"mode":"bridged","spoof_check":false}"#;
    switch.ask_json(network).expect("a network");
    let ports: Vec<PortId> = (1..=20).map(|at| switch.add_port(&format!("p{at}"), "lan", mac(at), &[]).id).collect();
    (0..5).for_each(|_| switch.settle());
    assert_eq!(parked(&mut switch), [ports.clone(), vec![]]);
    let flood = frames::udp(Ends { from: mac(1), to: MacAddr([0xff; 6]) }, "10.1.0.1", "10.1.0.255", b"hello");
    switch.send(ports[0], &flood);
    switch.backend.worker.wake(ports[0]);
    switch.settle();
    assert!(ports[1..].iter().all(|&port| switch.take(port).len() == 1));
    assert_eq!(parked(&mut switch), [vec![], vec![]]);
    // What is for one alone has that one polled.
    switch.send(ports[0], &frames::udp(Ends { from: mac(1), to: mac(7) }, "10.1.0.1", "10.1.0.7", b"hello"));
    switch.settle();
    assert_eq!(parked(&mut switch), [vec![], vec![ports[6]]]);
}
