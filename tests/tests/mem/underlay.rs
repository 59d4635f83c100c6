//! Ways to a peer: straight, across subnets, by several uplinks, with a tag.

use vswitch_api::{NetworkMode, NetworkSpec, Request};
use vswitch_control::{Attached, Backend, Control, ControlConfig, NextHop, UPLINK_PORT, UplinkState};
use vswitch_dataplane::DropReason;
use vswitch_net::{GATEWAY_MAC, MacAddr, PortId};
use vswitch_tests::frames::{self, Ends};
use vswitch_tests::mem::Switch;

use super::mac;

const UPLINK_MACS: [MacAddr; 2] = [MacAddr([2, 0, 0, 0, 1, 1]), MacAddr([2, 0, 0, 0, 1, 2])];
const SECOND: PortId = PortId(1);

fn uplink(at: usize, is_up: bool) -> UplinkState {
    UplinkState {
        link: format!("wire{at}"),
        mac: UPLINK_MACS[at],
        mtu: 1500,
        is_up,
        v4: "192.0.2.1".parse().ok(),
        v6: None,
        attached: Attached::default(),
        note: None,
    }
}

/// A switch with two uplinks, one pod 10.1.0.2, and a peer with a route to 10.2.0.0/24.
fn switch(encap: &str, vlan: Option<u16>) -> (Switch, PortId) {
    let mut switch = Switch::new();
    switch.control =
        Control::new(ControlConfig { host_network: Some("pods".to_owned()), vlan, ..ControlConfig::default() });
    for (at, port) in [UPLINK_PORT, SECOND].into_iter().enumerate() {
        switch.backend.attach(port, "wire").unwrap();
        switch.control.set_uplink(port, Ok(uplink(at, true)));
    }
    let network = NetworkSpec {
        name: "pods".to_owned(),
        vni: 7.try_into().unwrap(),
        mode: NetworkMode::Routed,
        subnets: vec!["10.0.0.0/8".parse().unwrap()],
        ranges: vec!["10.1.0.0/24".parse().unwrap()],
        services: Vec::new(),
        subnet_mtu: None,
        gateway_v4: None,
        gateway_v6: None,
        spoof_check: true,
        router: None,
        mss_clamp: true,
        follow: None,
        vlan: None,
        transparent: false,
        learning: true,
        neighbor_suppression: true,
        multicast_snooping: false,
        storm: None,
    };
    switch.ask(Request::NetworkAdd(network));
    switch.ask_json(&format!(r#"{{"op":"peer_add","name":"other","vtep":"192.0.2.2","encap":"{encap}"}}"#)).unwrap();
    switch.ask_json(r#"{"op":"route_add","network":"pods","prefix":"10.2.0.0/24","peer":"other"}"#).unwrap();
    let pod = switch.add_port("one", "pods", mac(1), &[]).id;
    (switch, pod)
}

fn hop(link: &str, address: &str, number: u8) -> NextHop {
    NextHop { link: Some(link.to_owned()), address: address.parse().ok(), mac: Some(mac(number)), mtu: None }
}

fn resolve(switch: &mut Switch, hops: Vec<NextHop>) {
    switch.control.set_next_hops("192.0.2.2".parse().unwrap(), hops);
    switch.settle();
}

fn packet(source_port: u16) -> Vec<u8> {
    let ends = Ends { from: mac(1), to: GATEWAY_MAC };
    frames::udp_with(ends, "10.1.0.2", "10.2.0.5", (source_port, 80), 64, b"hello")
}

fn is_vxlan(frame: &[u8]) -> bool {
    frame.len() > packet(1).len() && frame[36..38] == [0x12, 0xb5]
}

#[test]
fn a_peer_on_the_link_needs_no_vxlan_across_subnets() {
    for (encap, gateway, expected) in [
        ("vxlan", "192.0.2.2", true),
        ("cross_subnet", "192.0.2.2", false),
        ("cross_subnet", "192.0.2.254", true),
        ("direct", "192.0.2.254", false),
    ] {
        let (mut switch, pod) = switch(encap, None);
        resolve(&mut switch, vec![hop("wire0", gateway, 100)]);
        assert_eq!(switch.drop_of(pod, &packet(1)), None);
        let out = switch.take(UPLINK_PORT);
        assert_eq!(is_vxlan(&out[0]), expected, "{encap} by {gateway}");
        if !expected {
            let ends = Ends { from: UPLINK_MACS[0], to: mac(100) };
            let straight = frames::udp_with(ends, "10.1.0.2", "10.2.0.5", (1, 80), 63, b"hello");
            assert_eq!(out, [straight]);
        }
    }
}

#[test]
fn what_comes_straight_must_come_from_behind_its_peer() {
    let (mut switch, pod) = switch("direct", None);
    resolve(&mut switch, vec![hop("wire0", "192.0.2.2", 100)]);
    let from = |source: &str, to: MacAddr| frames::udp(Ends { from: mac(100), to }, source, "10.1.0.2", b"hello");
    for _ in 0..2 {
        assert_eq!(switch.drop_of(UPLINK_PORT, &from("10.2.0.5", UPLINK_MACS[0])), None);
        let ends = Ends { from: GATEWAY_MAC, to: mac(1) };
        assert_eq!(switch.take(pod), [frames::udp_with(ends, "10.2.0.5", "10.1.0.2", (1000, 2000), 63, b"hello")]);
    }
    assert_eq!(switch.drop_of(UPLINK_PORT, &from("10.3.0.5", UPLINK_MACS[0])), Some(DropReason::NotDirect));
    assert_eq!(switch.drop_of(UPLINK_PORT, &from("10.1.0.2", UPLINK_MACS[0])), Some(DropReason::NotDirect));
    assert_eq!(switch.drop_of(UPLINK_PORT, &from("10.2.0.5", mac(77))), Some(DropReason::NotForGateway));
    // An error goes back the way the packet came.
    let lost = frames::udp(Ends { from: mac(100), to: UPLINK_MACS[0] }, "10.2.0.5", "10.1.0.77", b"hello");
    assert_eq!(switch.drop_of(UPLINK_PORT, &lost), Some(DropReason::NoHost));
    let out = switch.take(UPLINK_PORT);
    assert_eq!((&out[0][..6], &out[0][26..34]), (&mac(100).0[..], &[10, 1, 0, 1, 10, 2, 0, 5][..]));
}

#[test]
fn flows_spread_over_uplinks_and_leave_a_lost_one() {
    let (mut switch, pod) = switch("vxlan", None);
    resolve(&mut switch, vec![hop("wire0", "192.0.2.2", 100), hop("wire1", "192.0.2.2", 101)]);
    let run = |switch: &mut Switch| -> Vec<(usize, usize)> {
        (0..500)
            .map(|flow| {
                switch.send(pod, &packet(flow));
                switch.settle();
                (switch.take(UPLINK_PORT).len(), switch.take(SECOND).len())
            })
            .collect()
    };
    let first = run(&mut switch);
    let by_first = first.iter().filter(|way| **way == (1, 0)).count();
    assert!((150..350).contains(&by_first), "{by_first} of 500 by the first uplink");
    assert_eq!(run(&mut switch), first, "a flow keeps its way");
    switch.control.set_uplink(SECOND, Ok(uplink(1, false)));
    switch.settle();
    assert!(run(&mut switch).iter().all(|way| *way == (1, 0)), "all by the one that is left");
    switch.control.set_uplink(UPLINK_PORT, Err("gone".to_owned()));
    switch.settle();
    assert_eq!(switch.drop_of(pod, &packet(1)), Some(DropReason::NoNeighbor));
}

#[test]
fn a_tag_of_the_underlay_is_written_and_wanted() {
    for encap in ["vxlan", "direct"] {
        let (mut switch, pod) = switch(encap, Some(100));
        resolve(&mut switch, vec![hop("wire0", "192.0.2.2", 100)]);
        assert_eq!(switch.drop_of(pod, &packet(1)), None);
        let out = switch.take(UPLINK_PORT);
        assert_eq!(out[0][12..18], [0x81, 0, 0, 100, 8, 0], "{encap}");
        // What was sent is turned round, and comes back in.
        let mut back = out[0].clone();
        let (to, from) = back[..12].split_at_mut(6);
        to.swap_with_slice(from);
        let at = if encap == "vxlan" { 18 } else { 0 };
        if at > 0 {
            back[30..38].rotate_left(4);
            back[54..60].copy_from_slice(&GATEWAY_MAC.0);
            back[80..88].rotate_left(4);
        } else {
            back[30..38].rotate_left(4);
        }
        assert_eq!(switch.drop_of(UPLINK_PORT, &back), None);
        assert_eq!(switch.take(pod).len(), 1);
    }
}

#[test]
fn a_syn_announces_what_fits_the_wire() {
    let (mut switch, pod) = switch("vxlan", None);
    resolve(&mut switch, vec![hop("wire0", "192.0.2.2", 100)]);
    let mut frame = Vec::new();
    etherparse::PacketBuilder::ethernet2(mac(1).0, GATEWAY_MAC.0)
        .ipv4([10, 1, 0, 2], [10, 2, 0, 5], 64)
        .tcp(1000, 80, 1, 1000)
        .syn()
        .options(&[etherparse::TcpOptionElement::Noop, etherparse::TcpOptionElement::MaximumSegmentSize(64_960)])
        .unwrap()
        .write(&mut frame, &[])
        .unwrap();
    assert_eq!(switch.drop_of(pod, &frame), None);
    let out = switch.take(UPLINK_PORT);
    let inner = etherparse::SlicedPacket::from_ethernet(&out[0][50..]).unwrap();
    let Some(etherparse::TransportSlice::Tcp(tcp)) = inner.transport else { panic!() };
    let mss = tcp.options_iterator().find_map(|option| match option {
        Ok(etherparse::TcpOptionElement::MaximumSegmentSize(mss)) => Some(mss),
        _ => None,
    });
    assert_eq!(mss, Some(1450 - 40));
    assert_eq!(tcp.to_header().calc_checksum_ipv4_raw([10, 1, 0, 2], [10, 2, 0, 5], &[]), Ok(tcp.checksum()));
}

/// Two switches with a tagged underlay, which nobody resolves for them.
#[test]
fn peers_under_a_tag_find_each_other() {
    for (vteps, family) in [(["192.0.2.1", "192.0.2.2"], 4), (["2001:db8::1", "2001:db8::2"], 6)] {
        let mut switches = [0, 1].map(|at| {
            let mut switch = Switch::new();
            switch.control = Control::new(ControlConfig { vlan: Some(100), ..ControlConfig::default() });
            switch.backend.attach(UPLINK_PORT, "wire").unwrap();
            let own = vteps[at];
            let state = UplinkState {
                v4: (family == 4).then(|| own.parse().unwrap()),
                v6: (family == 6).then(|| own.parse().unwrap()),
                ..uplink(at, true)
            };
            switch.control.set_uplink(UPLINK_PORT, Ok(state));
            let (mine, theirs) = (at + 1, 2 - at);
            let network = format!(r#"{{"op":"network_add","name":"pods","vni":7,"ranges":["10.{mine}.0.0/24"]}}"#);
            switch.ask_json(&network).unwrap();
            let other = vteps[1 - at];
            switch.ask_json(&format!(r#"{{"op":"peer_add","name":"other","vtep":"{other}"}}"#)).unwrap();
            let route =
                format!(r#"{{"op":"route_add","network":"pods","prefix":"10.{theirs}.0.0/24","peer":"other"}}"#);
            switch.ask_json(&route).unwrap();
            switch
        });
        let pods = [0, 1].map(|at| switches[at].add_port("pod", "pods", mac(10 + at as u8), &[]).id);
        let exchange = |switches: &mut [Switch; 2]| {
            for at in [0, 1, 0, 1] {
                for packet in switches[at].take(UPLINK_PORT) {
                    assert_eq!(packet[12..16], [0x81, 0, 0, 100]);
                    switches[1 - at].send(UPLINK_PORT, &packet);
                }
                switches[1 - at].settle();
            }
        };
        switches[0].pass(1_000_000_000);
        exchange(&mut switches);
        let frame = frames::udp(Ends { from: mac(10), to: GATEWAY_MAC }, "10.1.0.2", "10.2.0.2", b"hello");
        assert_eq!(switches[0].drop_of(pods[0], &frame), None, "{family}");
        exchange(&mut switches);
        assert_eq!(switches[1].take(pods[1]).len(), 1);
        // A peer that is silent is forgotten.
        switches[0].pass(61_000_000_000);
        assert_eq!(switches[0].drop_of(pods[0], &frame), Some(DropReason::NoNeighbor));
        // Who claims our own VTEP is not believed.
        if family == 4 {
            let mut forged = frames::arp_request(mac(66), "192.0.2.1", "192.0.2.2");
            forged.splice(12..12, [0x81, 0, 0, 100]);
            assert_eq!(switches[0].drop_of(UPLINK_PORT, &forged), Some(DropReason::SpoofedVtep));
        }
    }
}

#[test]
fn a_peer_of_both_families_is_reached_by_either() {
    let mut switch = Switch::new().with_uplink(UPLINK_MACS[0], Some("192.0.2.1"), Some("2001:db8::1"), 1500);
    switch.ask_json(r#"{"op":"network_add","name":"pods","vni":7,"ranges":["10.1.0.0/24"]}"#).unwrap();
    let peer = r#"{"op":"peer_add","name":"other","vtep":"192.0.2.2","other_vtep":"2001:db8::2"}"#;
    switch.ask_json(peer).unwrap();
    switch.ask_json(r#"{"op":"route_add","network":"pods","prefix":"10.2.0.0/24","peer":"other"}"#).unwrap();
    let pod = switch.add_port("one", "pods", mac(1), &[]).id;
    switch.resolve("2001:db8::2", mac(100));
    assert_eq!(switch.drop_of(pod, &packet(1)), None);
    let by_v6 = switch.take(UPLINK_PORT);
    assert_eq!(by_v6[0][12..14], [0x86, 0xdd], "the first is not resolved yet");
    switch.resolve("192.0.2.2", mac(101));
    assert_eq!(switch.drop_of(pod, &packet(1)), None);
    assert_eq!(switch.take(UPLINK_PORT)[0][12..14], [8, 0]);
    // From either it is the same peer: what it sends over IPv6 comes in, too.
    let mut back = by_v6[0].clone();
    back[22..54].rotate_left(16);
    back[70..76].copy_from_slice(&GATEWAY_MAC.0);
    back[96..104].rotate_left(4);
    let sum = {
        back[60..62].fill(0);
        let length = (back.len() - 54) as u32;
        let (from, to): ([u8; 16], [u8; 16]) = (back[22..38].try_into().unwrap(), back[38..54].try_into().unwrap());
        let pseudo = vswitch_net::checksum::pseudo_v6(from.into(), to.into(), 17, length);
        vswitch_net::checksum::finish_udp(pseudo + vswitch_net::checksum::sum(&back[54..]))
    };
    back[60..62].copy_from_slice(&sum.to_be_bytes());
    assert_eq!(switch.drop_of(UPLINK_PORT, &back), None);
    assert_eq!(switch.take(pod).len(), 1);
    for (more, words) in [
        (r#""vtep":"192.0.2.3","other_vtep":"192.0.2.4""#, "of the other family"),
        (r#""vtep":"192.0.2.3","other_vtep":"2001:db8::2""#, "belongs to peer"),
    ] {
        let error = switch.ask_json(&format!(r#"{{"op":"peer_add","name":"x",{more}}}"#)).unwrap_err();
        assert!(error.message.contains(words), "{error}");
    }
}
