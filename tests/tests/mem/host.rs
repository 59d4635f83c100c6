//! The port into the host's stack, and the routes that kernel and switch have from each other.

use vswitch_control::{ControlConfig, HOST_PORT};
use vswitch_dataplane::DropReason;
use vswitch_net::{GATEWAY_MAC, MacAddr};
use vswitch_tests::frames::{self, Ends};
use vswitch_tests::mem::Switch;

use super::mac;

const HOST_MAC: MacAddr = MacAddr([2, 0, 0, 0, 9, 9]);

/// A switch whose network "pods" is joined to the host, with one pod, 10.1.0.2.
fn joined() -> Switch {
    let config = ControlConfig { host_network: Some("pods".to_owned()), ..ControlConfig::default() };
    let network = r#"{"op":"network_add","name":"pods","vni":7,"subnets":["10.0.0.0/8","fd00::/8"],"ranges":["10.1.0.0/24","fd01::/64"]}"#;
    let mut switch = Switch::with_host(config, HOST_MAC, network);
    switch.add_port("one", "pods", mac(1), &[]);
    switch
}

#[test]
fn the_host_is_reached_and_everything_beyond_it() {
    let mut switch = joined();
    let pod = switch.control.links().next().unwrap().0;
    let pod_ends = Ends { from: mac(1), to: GATEWAY_MAC };
    for to in ["10.1.0.1", "8.8.8.8", "fd01::1", "2001:db8::8"] {
        let from = if to.contains(':') { "fd01::2" } else { "10.1.0.2" };
        assert_eq!(switch.drop_of(pod, &frames::udp(pod_ends, from, to, b"x")), None, "{to}");
        let out = switch.take(HOST_PORT);
        assert_eq!(out[0][..12], [HOST_MAC.0, GATEWAY_MAC.0].concat());
    }
    // Addresses of the cluster that nobody has do not leak to the host.
    for (to, reason) in [("10.1.0.77", DropReason::NoHost), ("10.99.0.1", DropReason::NoHost)] {
        assert_eq!(switch.drop_of(pod, &frames::udp(pod_ends, "10.1.0.2", to, b"x")), Some(reason));
    }
    switch.take(pod);
    // From the host, with whatever source: it routes.
    let host = Ends { from: HOST_MAC, to: GATEWAY_MAC };
    for from in ["10.1.0.1", "192.0.2.77"] {
        assert_eq!(switch.drop_of(HOST_PORT, &frames::udp(host, from, "10.1.0.2", b"x")), None);
        assert_eq!(switch.take(pod).len(), 1);
    }
    assert_eq!(
        switch.drop_of(HOST_PORT, &frames::udp(host, "192.0.2.77", "8.8.8.8", b"x")),
        Some(DropReason::SamePort),
        "no loop between host and switch"
    );
    // The VTEP of any node is out of a pod's reach.
    let forged = frames::udp_with(pod_ends, "10.1.0.2", "192.0.2.1", (5, 4789), 64, &[8, 0, 0, 0, 0, 0, 7, 0]);
    assert_eq!(switch.drop_of(pod, &forged), Some(DropReason::NestedVxlan));
}

#[test]
fn the_gateway_speaks_arp_with_the_host_too() {
    let mut switch = joined();
    switch.send(HOST_PORT, &frames::arp_request(HOST_MAC, "192.0.2.1", "169.254.1.1"));
    switch.settle();
    assert_eq!(switch.take(HOST_PORT).len(), 1, "whatever address the host asks from");
}

#[test]
fn the_host_is_told_what_there_is() {
    let mut switch = joined();
    switch.ask_json(r#"{"op":"peer_add","name":"node2","vtep":"192.0.2.2"}"#).unwrap();
    switch.ask_json(r#"{"op":"route_add","network":"pods","prefix":"10.2.0.0/24","peer":"node2"}"#).unwrap();
    let mapped = r#"{"op":"port_add","link":"web","mac":"02:00:00:00:00:05","network":"pods","port_mappings":[
        {"host_port":8080,"container_port":80},{"host_port":53,"container_port":5353,"protocol":"udp","host_ip":"192.0.2.1"}]}"#;
    switch.ask_json(mapped).unwrap();
    let plan = switch.control.host_plan("vswitch0").unwrap();
    let text: Vec<String> = plan.addresses.iter().map(ToString::to_string).collect();
    assert_eq!(text, ["10.1.0.1", "fd01::1"]);
    assert_eq!(plan.ranges.len(), 2);
    assert_eq!(plan.remote[0].0.to_string(), "10.2.0.0/24");
    let rules = plan.rules.unwrap();
    for line in [
        "tcp dport 8080 dnat ip to 10.1.0.3:80",
        "tcp dport 8080 dnat ip6 to [fd01::3]:80",
        "ip daddr 192.0.2.1 udp dport 53 dnat ip to 10.1.0.3:5353",
        "oifname != \"vswitch0\" ip saddr { 10.1.0.0/24 } ip daddr != { 10.0.0.0/8 } masquerade",
    ] {
        assert!(rules.contains(line), "{rules}");
    }
    let again = r#"{"op":"port_add","link":"x","mac":"02:00:00:00:00:06","network":"pods","port_mappings":[{"host_port":8080,"container_port":81}]}"#;
    let error = switch.ask_json(again).unwrap_err();
    assert!(error.message.contains("port 8080 of the host (tcp) leads to the pod of link web already"), "{error}");
    switch.ask_json(r#"{"op":"port_del","link":"web"}"#).unwrap();
    switch.ask_json(again).unwrap();
}

#[test]
fn routes_of_the_kernel_are_followed() {
    let mut switch = joined().with_uplink(mac(200), Some("192.0.2.1"), None, 1500);
    let gateway = "192.0.2.9";
    let prefix = "10.9.0.0/24".parse().unwrap();
    let refused = ["0.0.0.0/0", "10.1.0.0/25", "192.168.0.0/16"];
    for prefix in refused {
        assert!(!switch.control.import_route(prefix.parse().unwrap(), gateway.parse().ok()), "{prefix}");
    }
    assert!(switch.control.import_route(prefix, gateway.parse().ok()));
    switch.resolve(gateway, mac(201));
    let pod = switch.control.links().next().unwrap().0;
    let frame = frames::udp(Ends { from: mac(1), to: GATEWAY_MAC }, "10.1.0.2", "10.9.0.5", b"x");
    assert_eq!(switch.drop_of(pod, &frame), None);
    let wire = switch.take(vswitch_control::UPLINK_PORT);
    let expected =
        frames::udp_with(Ends { from: mac(200), to: mac(201) }, "10.1.0.2", "10.9.0.5", (1000, 2000), 63, b"x");
    assert_eq!(wire, [expected], "as it is, with the underlay's MAC addresses");
    // A route that was asked for is stronger; when it goes, the imported one shows again.
    switch.ask_json(r#"{"op":"peer_add","name":"static","vtep":"192.0.2.3"}"#).unwrap();
    switch.ask_json(r#"{"op":"route_add","network":"pods","prefix":"10.9.0.0/24","peer":"static"}"#).unwrap();
    assert_eq!(switch.drop_of(pod, &frame), Some(DropReason::NoNeighbor));
    switch.ask_json(r#"{"op":"peer_del","name":"static"}"#).unwrap();
    assert_eq!(switch.drop_of(pod, &frame), None);
    assert!(switch.control.import_route(prefix, None));
    switch.control.forget_unused_peers();
    switch.settle();
    assert_eq!(switch.drop_of(pod, &frame), Some(DropReason::NoHost));
    let Ok(vswitch_api::Answer::Peers { peers }) = switch.ask_json(r#"{"op":"peer_list"}"#) else { panic!() };
    assert!(peers.is_empty(), "{peers:?}");
}
