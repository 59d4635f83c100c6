//! A hundred thousand routes and stations that others wrote into the kernel.

use std::fmt::Write;
use std::process::Stdio;
use std::time::Instant;

use xtask::lab::{self, Daemon, Namespace};

use crate::{add_pod, bench, conflist};

const MANY: usize = 100_000;

/// Runs a batch of `ip` or `bridge` commands.
fn batch(node: &Namespace, program: &str, commands: &str) {
    let mut child = node.command(&[program, "-batch", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), commands.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
}

/// How many routes or stations a network has.
fn count(daemon: &Daemon, name: &str, what: &str) -> usize {
    let networks = daemon.ctl(&["network", "list"]).unwrap();
    let network = networks["networks"].as_array().unwrap().iter().find(|network| network["name"] == name).cloned();
    network.and_then(|network| network[what].as_u64()).unwrap() as usize
}

#[expect(clippy::disallowed_methods, reason = "the time that it takes is printed")]
#[test]
fn a_hundred_thousand_routes_and_stations_are_followed() {
    let Some(mut bench) = bench("scale") else { return };
    let lab = &mut bench.lab;
    let (node, other) = (lab.namespace("node").unwrap(), lab.namespace("other").unwrap());
    lab.wire([(&node, "wire", &["192.0.2.1/24"]), (&other, "wire", &["192.0.2.2/24"])], 1500).unwrap();
    node.ip("link add vx9 type vxlan id 9 local 192.0.2.1 dstport 4789 nolearning").unwrap();
    node.ip("link set vx9 up").unwrap();
    let config = r#"
[uplink]
link = "wire"
[host]
network = "pods"
[routes]
import = "kernel"
[[network]]
name = "pods"
vni = 1
subnets = ["10.0.0.0/8"]
ranges = ["10.255.1.0/24"]
[[network]]
name = "lan"
vni = 9
mode = "bridged"
subnets = ["10.200.0.0/24"]
ranges = ["10.200.0.0/25"]
follow = "vx9"
"#;
    let mut daemon = lab.daemon(&node, "node", config).unwrap();
    let (pod, _) = add_pod(lab, &daemon, "pod");
    let idle = daemon.memory();
    let (mut routes, mut stations) = (String::new(), String::new());
    for number in 0..MANY {
        let (a, b, c) = (number >> 16, number >> 8 & 255, number & 255);
        writeln!(routes, "route add 10.{}.{b}.{c}/32 via 192.0.2.2 dev wire proto bird", a + 1).unwrap();
        writeln!(stations, "fdb add 02:00:00:{a:02x}:{b:02x}:{c:02x} dev vx9 dst 192.0.2.2 self extern_learn").unwrap();
    }
    let start = Instant::now();
    batch(&node, "ip", &routes);
    let written = start.elapsed();
    lab::wait_for(60, || count(&daemon, "pods", "routes") == MANY).unwrap();
    println!("{MANY} routes: written in {written:.1?}, usable {:.1?} after the last", start.elapsed() - written);
    let start = Instant::now();
    batch(&node, "bridge", &stations);
    let written = start.elapsed();
    lab::wait_for(60, || count(&daemon, "lan", "stations") == MANY).unwrap();
    println!("{MANY} stations: written in {written:.1?}, usable {:.1?} after the last", start.elapsed() - written);
    println!("daemon {} MiB resident, {} MiB before", daemon.memory() >> 20, idle >> 20);
    // The last route works: the far end sees the packet, as it is, at its own MAC.
    let last = format!("10.{}.{}.{}", ((MANY - 1) >> 16) + 1, (MANY - 1) >> 8 & 255, (MANY - 1) & 255);
    other.ip(&format!("addr add {last}/32 dev lo")).unwrap();
    other.ip("route add 10.255.1.0/24 via 192.0.2.1").unwrap();
    pod.await_ping(&last).unwrap();
    // So does the last station: a VXLAN device of the kernel's at the far end.
    let station = format!("02:00:00:{:02x}:{:02x}:{:02x}", (MANY - 1) >> 16, (MANY - 1) >> 8 & 255, (MANY - 1) & 255);
    let bridged = lab.namespace("bridged").unwrap();
    let mut netconf = conflist();
    netconf["plugins"][0]["network"] = "lan".into();
    let own = daemon.add_pod(&bridged, &netconf).unwrap();
    other
        .ip(&format!("link add vx9 address {station} type vxlan id 9 local 192.0.2.2 remote 192.0.2.1 dstport 4789"))
        .unwrap();
    other.ip("link set vx9 up").unwrap();
    other.ip("addr add 10.200.0.200/24 dev vx9").unwrap();
    bridged.ip(&format!("neigh add 10.200.0.200 lladdr {station} dev eth0")).unwrap();
    bridged.await_ping("10.200.0.200").unwrap();
    assert!(own[0].starts_with("10.200.0."), "{own:?}");
    // A daemon that starts finds them all.
    assert!(daemon.stop());
    let start = Instant::now();
    daemon.start().unwrap();
    lab::wait_for(60, || count(&daemon, "pods", "routes") == MANY && count(&daemon, "lan", "stations") > MANY).unwrap();
    println!("after a restart all were usable within {:.1?} of its start", start.elapsed());
    // And lets go of them as fast.
    let start = Instant::now();
    node.ip("route flush proto bird").unwrap();
    lab::wait_for(60, || count(&daemon, "pods", "routes") == 0).unwrap();
    println!("all routes gone {:.1?} after `ip route flush`", start.elapsed());
    // While it does not listen, its socket keeps the first of the news and loses the others: that the first are gone.
    daemon.suspend(true);
    batch(&node, "ip", &routes);
    let first_half = routes.lines().take(MANY / 2).map(|line| line.replace("add", "del") + "\n");
    batch(&node, "ip", &first_half.collect::<String>());
    let start = Instant::now();
    daemon.suspend(false);
    lab::wait_for(60, || count(&daemon, "pods", "routes") == MANY / 2).unwrap();
    println!("routes that changed while it was suspended were right {:.1?} after it went on", start.elapsed());
    lab::wait_for(3, || count(&daemon, "pods", "routes") != MANY / 2).unwrap_err();
}
