//! The other side is the kernel's own bridge and vxlan device.

use xtask::lab::{self, Namespace};

use crate::{Bench, assert_balanced, bench, serve_iperf3};

/// Our node, the kernel's node, and a pod on each, in one bridged network.
fn exchange(bench: &mut Bench, local: &str, remote: &str, udp_port: u16, mode: &str) {
    let lab = &mut bench.lab;
    let (ours, theirs) = (lab.namespace("ours").unwrap(), lab.namespace("theirs").unwrap());
    let length = if local.contains(':') { 64 } else { 24 };
    let ends = [format!("{local}/{length}"), format!("{remote}/{length}")];
    lab.wire([(&ours, "wire", &[&ends[0]]), (&theirs, "wire", &[&ends[1]])], 1500).unwrap();
    let config = format!(
        r#"
xdp_mode = "{mode}"
[uplink]
link = "wire"
udp_port = {udp_port}
[[network]]
name = "pods"
vni = 42
mode = "bridged"
subnets = ["10.9.0.0/16", "fd09::/64"]
ranges = ["10.9.1.0/24", "fd09::1:0/112"]
[[peer]]
name = "kernel"
vtep = "{remote}"
"#
    );
    let daemon = lab.daemon(&ours, "ours", &config).unwrap();
    let (pod, addresses) = crate::add_pod(lab, &daemon, "pod");
    let far = kernel_node(lab, &theirs, local, remote, udp_port);
    lab::wait_for(10, || daemon.ctl(&["status"]).unwrap()["peers_reachable"] == 1).unwrap();
    for (from, to) in [(&pod, ["10.9.2.1", "fd09::2:1"]), (&far, [addresses[0].as_str(), addresses[1].as_str()])] {
        for address in to {
            from.await_ping(address).unwrap();
            assert!(from.pings(address, 20, 5), "ping of {address}");
        }
    }
    serve_iperf3(lab, &pod);
    serve_iperf3(lab, &far);
    for (from, to) in
        [(&pod, "10.9.2.1"), (&pod, "fd09::2:1"), (&far, addresses[0].as_str()), (&far, addresses[1].as_str())]
    {
        let rate = from.iperf3(to, 1, &[]).unwrap();
        println!("{} to {to}: {:.2} Gbit/s", from.name, rate / 1e9);
        assert!(rate > 1e8, "TCP to {to}: {rate} bit/s");
    }
    let stations = daemon.ctl(&["fdb", "list"]).unwrap();
    let learned = stations["stations"].as_array().unwrap().iter().any(|station| station["at"]["peer"] == "kernel");
    assert!(learned, "the far pod was not learned: {stations}");
    assert_balanced(&daemon);
}

/// A node of nothing but the kernel's devices, its pod behind a bridge.
fn kernel_node(lab: &mut lab::Lab, node: &Namespace, our_vtep: &str, own_vtep: &str, udp_port: u16) -> Namespace {
    let pod = lab.namespace("far").unwrap();
    node.ip("link add br0 type bridge").unwrap();
    node.ip(&format!("link add vx0 type vxlan id 42 local {own_vtep} remote {our_vtep} dstport {udp_port} dev wire"))
        .unwrap();
    node.ip(&format!("link add p0 type veth peer name eth0 netns {}", pod.name)).unwrap();
    for link in ["vx0", "p0"] {
        node.ip(&format!("link set {link} master br0 up")).unwrap();
    }
    node.ip("link set br0 up").unwrap();
    let mtu = if own_vtep.contains(':') { 1430 } else { 1450 };
    pod.ip(&format!("link set eth0 mtu {mtu} up")).unwrap();
    pod.ip("addr add 10.9.2.1/16 dev eth0").unwrap();
    pod.ip("addr add fd09::2:1/64 dev eth0 nodad").unwrap();
    pod
}

#[test]
fn over_ipv4_port_4789() {
    let Some(mut bench) = bench("k4") else { return };
    exchange(&mut bench, "192.0.2.1", "192.0.2.2", 4789, "auto");
}

#[test]
fn over_ipv4_port_8472() {
    let Some(mut bench) = bench("k48") else { return };
    exchange(&mut bench, "192.0.2.1", "192.0.2.2", 8472, "auto");
}

#[test]
fn over_ipv6_port_4789() {
    let Some(mut bench) = bench("k6") else { return };
    exchange(&mut bench, "2001:db8::1", "2001:db8::2", 4789, "auto");
}

#[test]
fn over_ipv6_port_8472() {
    let Some(mut bench) = bench("k68") else { return };
    exchange(&mut bench, "2001:db8::1", "2001:db8::2", 8472, "auto");
}

/// For drivers without XDP of their own.
#[test]
fn in_generic_mode() {
    let Some(mut bench) = bench("kg") else { return };
    exchange(&mut bench, "192.0.2.1", "192.0.2.2", 4789, "generic");
}
