//! The life of an uplink: what happens to it is noticed, acted on, and told in one line.

use xtask::lab::{self, Daemon, Namespace};

use crate::{add_pod, assert_balanced, bench};

const CONFIG: &str = r#"
[uplink]
link = "wire"
[[network]]
name = "pods"
vni = 1
ranges = ["10.244.1.0/24"]
[[peer]]
name = "other"
vtep = "192.0.2.2"
router_mac = "0a:58:00:00:00:02"
[[route]]
network = "pods"
prefix = "10.244.2.0/24"
peer = "other"
"#;

/// The uplink's line of `switchctl status`.
fn line(daemon: &Daemon) -> String {
    let status = daemon.run_ctl(&["status"]).unwrap();
    status.lines().find(|line| line.starts_with("uplink")).unwrap_or_default().to_owned()
}

fn await_line(daemon: &Daemon, words: &[&str]) -> String {
    let told = lab::wait_for(10, || words.iter().all(|word| line(daemon).contains(word)));
    assert!(told.is_ok(), "{words:?} not in: {}", line(daemon));
    println!("{}", line(daemon));
    line(daemon)
}

fn default_mtu(pod: &Namespace) -> String {
    let text = pod.run(5, &["ip", "-4", "route", "show", "default"]).unwrap();
    text.split("mtu ").nth(1).unwrap_or_default().split_whitespace().next().unwrap_or_default().to_owned()
}

#[test]
fn an_uplink_changes_in_every_way() {
    let Some(mut bench) = bench("life") else { return };
    let lab = &mut bench.lab;
    let (node, other) = (lab.namespace("node").unwrap(), lab.namespace("other").unwrap());
    node.ip(&format!("link add wire numrxqueues 4 numtxqueues 4 type veth peer name wire netns {}", other.name))
        .unwrap();
    for (namespace, address) in [(&node, "192.0.2.1/24"), (&other, "192.0.2.2/24")] {
        namespace.ip(&format!("addr add {address} dev wire")).unwrap();
        namespace.ip("link set wire up").unwrap();
    }
    node.run(5, &["ethtool", "-L", "wire", "rx", "2", "tx", "2"]).unwrap();
    let mut daemon = lab.daemon(&node, "node", CONFIG).unwrap();
    let (pod, _) = add_pod(lab, &daemon, "pod");
    kernel_far(&other);
    let reaches = || lab::wait_for(10, || pod.pings("10.244.2.1", 1, 1)).unwrap();
    await_line(&daemon, &["uplink wire: up, mtu 1500, vtep 192.0.2.1", "copy,copy"]);
    reaches();
    assert_eq!(default_mtu(&pod), "1450");
    // Its MTU, and with it the pods' routes.
    node.ip("link set wire mtu 1400").unwrap();
    await_line(&daemon, &["mtu 1400", "mtu changed from 1500 to 1400"]);
    lab::wait_for(5, || default_mtu(&pod) == "1350").unwrap();
    // Also while there is no daemon.
    assert!(daemon.stop());
    node.ip("link set wire mtu 1500").unwrap();
    daemon.start().unwrap();
    lab::wait_for(5, || default_mtu(&pod) == "1450").unwrap();
    // Its queues.
    node.run(5, &["ethtool", "-L", "wire", "rx", "4", "tx", "4"]).unwrap();
    await_line(&daemon, &["copy,copy,copy,copy", "queues changed from 2 to 4"]);
    reaches();
    // The kernel itself keeps a queue from going while a socket is bound to it.
    // Its address.
    node.ip("addr add 192.0.2.7/24 dev wire").unwrap();
    node.ip("addr del 192.0.2.1/24 dev wire").unwrap();
    let _ = node.ip("addr add 192.0.2.7/24 dev wire");
    await_line(&daemon, &["vtep 192.0.2.7", "vtep changed to 192.0.2.7"]);
    node.ip("addr flush dev wire").unwrap();
    await_line(&daemon, &["vtep none"]);
    node.ip("addr add 192.0.2.1/24 dev wire").unwrap();
    await_line(&daemon, &["vtep 192.0.2.1 "]);
    reaches();
    // Down and up.
    other.ip("link set wire down").unwrap();
    await_line(&daemon, &["uplink wire: down: see `ip link show wire`"]);
    other.ip("link set wire up").unwrap();
    await_line(&daemon, &["uplink wire: up"]);
    restore(&other);
    reaches();
    // Its name.
    node.ip("link set wire down").unwrap();
    node.ip("link set wire name eth9").unwrap();
    node.ip("link set eth9 up").unwrap();
    await_line(&daemon, &["uplink eth9: up", "renamed from wire: set uplink.link = \"eth9\""]);
    reaches();
    // Gone, and back as another link of that name.
    node.ip("link del eth9").unwrap();
    await_line(&daemon, &["uplink wire: gone: see `ip link show wire`"]);
    lab.wire([(&node, "wire", &["192.0.2.1/24"]), (&other, "wire", &["192.0.2.2/24"])], 1500).unwrap();
    kernel_far(&other);
    await_line(&daemon, &["uplink wire: up"]);
    reaches();
    assert_balanced(&daemon);
}

/// The far end is the kernel's: a vxlan device with an address.
fn kernel_far(node: &Namespace) {
    let _ = node.ip("link del vx1");
    node.ip("link add vx1 type vxlan id 1 dev wire local 192.0.2.2 dstport 4789 nolearning").unwrap();
    node.ip("link set vx1 address 0a:58:00:00:00:02 up").unwrap();
    node.ip("addr add 10.244.2.1/32 dev vx1").unwrap();
    restore(node);
}

/// What the kernel forgets when a link goes down.
fn restore(node: &Namespace) {
    let _ = node.ip("neigh replace 10.244.1.0 lladdr 02:76:73:77:00:01 dev vx1 nud permanent");
    let _ = node.ip("route replace 10.244.1.0/24 via 10.244.1.0 dev vx1 onlink src 10.244.2.1");
    let _ = node.run(5, &["bridge", "fdb", "replace", "02:76:73:77:00:01", "dev", "vx1", "dst", "192.0.2.1"]);
}

/// A link whose driver has no XDP of its own.
#[test]
fn a_driver_that_refuses_native_mode_is_told() {
    let Some(mut bench) = bench("refuse") else { return };
    let lab = &mut bench.lab;
    let (node, other) = (lab.namespace("node").unwrap(), lab.namespace("other").unwrap());
    lab.wire([(&node, "nic", &[]), (&other, "wire", &["192.0.2.2/24"])], 1500).unwrap();
    node.ip("link add wire type bridge").unwrap();
    node.ip("link set nic master wire").unwrap();
    node.ip("addr add 192.0.2.1/24 dev wire").unwrap();
    node.ip("link set wire up").unwrap();
    let daemon = lab.daemon(&node, "node", CONFIG).unwrap();
    await_line(&daemon, &["xdp generic (the driver refused native mode", "a bridge link: always copy mode"]);
    let (pod, _) = add_pod(lab, &daemon, "pod");
    kernel_far(&other);
    lab::wait_for(10, || pod.pings("10.244.2.1", 1, 1)).unwrap();
    assert!(pod.pings("10.244.2.1", 20, 5));
    assert_balanced(&daemon);
}
