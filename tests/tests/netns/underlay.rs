//! Ways between nodes: several uplinks, subnets, sizes.

use xtask::lab::{self, Daemon, Lab, Namespace};

use crate::{Bench, add_pod, assert_balanced, bench};

/// Sends numbered datagrams on eight sockets, one every ten milliseconds each, and prints the longest silence of any.
const STREAMS: &str = r#"
import socket, sys, time, threading
to, seconds = sys.argv[1], float(sys.argv[2])
socks = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(8)]
last = [time.time()] * 8
gap = [0.0] * 8
count = [0] * 8
def listen(i):
    while True:
        socks[i].recv(99)
        now = time.time()
        gap[i] = max(gap[i], now - last[i]); last[i] = now; count[i] += 1
for s in socks: s.sendto(b'x', (to, 7))
for i in range(8): threading.Thread(target=listen, args=(i,), daemon=True).start()
end = time.time() + seconds
while time.time() < end:
    for s in socks: s.sendto(b'x', (to, 7))
    time.sleep(0.01)
time.sleep(0.1)
now = time.time()
print(max(max(g, now - l) for g, l in zip(gap, last)), min(count))
"#;

const ECHO: &str = "import socket
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
s.bind(('::', 7))
while True:
    data, peer = s.recvfrom(65535)
    s.sendto(data, peer)";

fn echo(lab: &mut Lab, at: &Namespace) {
    lab.spawn(at, &["/usr/bin/python3", "-c", ECHO]).unwrap();
    lab::wait_for(5, || at.run(5, &["ss", "-Hlun"]).is_ok_and(|text| text.contains(":7 "))).unwrap();
}

fn sent(daemon: &Daemon, link: &str) -> u64 {
    let stats = daemon.ctl(&["stats"]).unwrap();
    let port = stats["ports"].as_array().unwrap().iter().find(|port| port["link"] == link).cloned();
    port.and_then(|port| port["tx_packets"].as_u64()).unwrap_or(0)
}

#[test]
fn flows_leave_a_cut_uplink_within_a_second() {
    let Some(mut bench) = bench("ecmp") else { return };
    let lab = &mut bench.lab;
    let nodes = [lab.namespace("node1").unwrap(), lab.namespace("node2").unwrap()];
    for (at, net) in ["192.0.2", "198.51.100"].iter().enumerate() {
        let (link, ends) = (format!("wire{at}"), [format!("{net}.1/24"), format!("{net}.2/24")]);
        lab.wire([(&nodes[0], &link, &[&ends[0]]), (&nodes[1], &link, &[&ends[1]])], 1500).unwrap();
    }
    let daemons: Vec<Daemon> = [1, 2]
        .iter()
        .map(|&own| {
            let (node, other) = (&nodes[own - 1], 3 - own);
            node.ip(&format!("addr add 203.0.113.{own}/32 dev lo")).unwrap();
            node.ip(&format!(
                "route add 203.0.113.{other}/32 nexthop via 192.0.2.{other} dev wire0 nexthop via 198.51.100.{other} dev wire1"
            ))
            .unwrap();
            let config = format!(
                r#"
[uplink]
links = ["wire0", "wire1"]
vtep = ["203.0.113.{own}"]
[[network]]
name = "pods"
vni = 1
ranges = ["10.244.{own}.0/24"]
[[peer]]
name = "other"
vtep = "203.0.113.{other}"
[[route]]
network = "pods"
prefix = "10.244.{other}.0/24"
peer = "other"
"#
            );
            lab.daemon(node, &format!("node{own}"), &config).unwrap()
        })
        .collect();
    let (near, _) = add_pod(lab, &daemons[0], "near");
    let (far, far_ips) = add_pod(lab, &daemons[1], "far");
    let both = || daemons[0].ctl(&["peer", "list"]).unwrap()["peers"][0]["uplinks"].as_array().map(Vec::len) == Some(2);
    lab::wait_for(10, both).unwrap();
    near.await_ping(&far_ips[0]).unwrap();
    echo(lab, &far);
    let cut = nodes[1].clone();
    let streams = std::thread::spawn({
        let (near, to) = (near.clone(), far_ips[0].clone());
        move || near.run(15, &["/usr/bin/python3", "-c", STREAMS, &to, "4"])
    });
    let both_carry = || ["wire0", "wire1"].iter().all(|link| sent(&daemons[0], link) > 150);
    lab::wait_for(3, both_carry).expect("both uplinks carry flows");
    cut.ip("link set wire1 down").unwrap();
    let printed = streams.join().unwrap().unwrap();
    let numbers: Vec<f64> = printed.split_whitespace().map(|word| word.parse().unwrap()).collect();
    println!("longest silence of eight flows: {:.0} ms; each had at least {} answers", numbers[0] * 1e3, numbers[1]);
    assert!(numbers[0] < 1.0 && numbers[1] > 200.0, "{printed}");
    let status = daemons[0].run_ctl(&["status"]).unwrap();
    assert!(status.contains("uplink wire1: down: see `ip link show wire1`"), "{status}");
    cut.ip("link set wire1 up").unwrap();
    // The kernel drops the routes of a link that goes down; whoever manages them puts them back.
    cut.ip("route replace 203.0.113.1/32 nexthop via 192.0.2.1 dev wire0 nexthop via 198.51.100.1 dev wire1").unwrap();
    lab::wait_for(10, both).unwrap();
    daemons.iter().for_each(assert_balanced);
}

/// Three nodes: two on one link, one behind a router.
#[test]
fn only_what_crosses_a_subnet_is_encapsulated() {
    let Some(mut bench) = bench("cross") else { return };
    let lab = &mut bench.lab;
    let names = ["node1", "node2", "node3"];
    let nodes: Vec<Namespace> = names.iter().map(|name| lab.namespace(name).unwrap()).collect();
    let (lan, router) = (lab.namespace("lan").unwrap(), lab.namespace("router").unwrap());
    lan.ip("link add br0 type bridge").unwrap();
    lan.ip("link set br0 up").unwrap();
    let addresses = ["192.0.2.1", "192.0.2.2", "198.51.100.3"];
    for (at, (node, address)) in nodes[..2].iter().zip(addresses).enumerate() {
        let port = format!("p{at}");
        lab.wire([(node, "wire", &[&format!("{address}/24")]), (&lan, &port, &[])], 1500).unwrap();
        lan.ip(&format!("link set {port} master br0")).unwrap();
        node.ip("route add 198.51.100.0/24 via 192.0.2.254").unwrap();
    }
    lab.wire([(&router, "lan", &["192.0.2.254/24"]), (&lan, "p9", &[])], 1500).unwrap();
    lan.ip("link set p9 master br0").unwrap();
    lab.wire([(&router, "far", &["198.51.100.254/24"]), (&nodes[2], "wire", &["198.51.100.3/24"])], 1500).unwrap();
    nodes[2].ip("route add 192.0.2.0/24 via 198.51.100.254").unwrap();
    router.run(5, &["sysctl", "-qw", "net.ipv4.ip_forward=1"]).unwrap();
    let daemons: Vec<Daemon> = (0..3)
        .map(|at| {
            let mut config = format!(
                r#"
[uplink]
link = "wire"
[host]
network = "pods"
[[network]]
name = "pods"
vni = 1
subnets = ["10.244.0.0/16"]
ranges = ["10.244.{}.0/24"]
"#,
                at + 1
            );
            for other in (0..3).filter(|&other| other != at) {
                let (name, vtep, number) = (names[other], addresses[other], other + 1);
                config += &format!(
                    "[[peer]]\nname = \"{name}\"\nvtep = \"{vtep}\"\nencap = \"cross_subnet\"\n[[route]]\nnetwork = \"pods\"\nprefix = \"10.244.{number}.0/24\"\npeer = \"{name}\"\n"
                );
            }
            lab.daemon(&nodes[at], names[at], &config).unwrap()
        })
        .collect();
    let pods: Vec<(Namespace, Vec<String>)> =
        (0..3).map(|at| add_pod(lab, &daemons[at], &format!("pod{}", at + 1))).collect();
    lab::wait_for(10, || daemons.iter().all(|daemon| daemon.ctl(&["status"]).unwrap()["peers_reachable"] == 2))
        .unwrap();
    let seen = lab.directory().join("seen.txt");
    let capture = format!("exec tcpdump -n -l -i br0 'icmp or udp port 4789' > {} 2>/dev/null", seen.display());
    lab.spawn(&lan, &["sh", "-c", &capture]).unwrap();
    for (from, to) in [(0, 1), (0, 2), (1, 2)] {
        pods[from].0.await_ping(&pods[to].1[0]).unwrap();
        assert!(pods[from].0.pings(&pods[to].1[0], 20, 5), "{} to {}", from + 1, to + 1);
    }
    lab::wait_for(5, || std::fs::read_to_string(&seen).is_ok_and(|text| text.contains("VXLAN"))).unwrap();
    let seen = std::fs::read_to_string(&seen).unwrap();
    let has = |words: &[&str]| seen.lines().any(|line| words.iter().all(|word| line.contains(word)));
    assert!(has(&["10.244.1.2 > 10.244.2.2: ICMP echo request"]), "plain on the link");
    assert!(!has(&["192.0.2.1.", "> 192.0.2.2.4789"]) && !has(&["192.0.2.2.", "> 192.0.2.1.4789"]));
    assert!(has(&["192.0.2.1.", "> 198.51.100.3.4789: VXLAN"]), "VXLAN to the other subnet: {seen}");
    crate::serve_iperf3(lab, &pods[1].0);
    let rate = pods[0].0.iperf3(&pods[1].1[0], 1, &[]).unwrap();
    println!("straight: {:.2} Gbit/s", rate / 1e9);
    daemons.iter().for_each(assert_balanced);
}

/// Datagrams of all sizes, and TCP that is told what fits, over a wire of this MTU.
fn sizes(bench: &mut Bench, mtu: u32, vteps: [&str; 2], more: &str) {
    let lab = &mut bench.lab;
    let nodes = [lab.namespace("node1").unwrap(), lab.namespace("node2").unwrap()];
    let length = if vteps[0].contains(':') { 64 } else { 24 };
    let ends = vteps.map(|vtep| format!("{vtep}/{length}"));
    lab.wire([(&nodes[0], "wire", &[&ends[0]]), (&nodes[1], "wire", &[&ends[1]])], mtu).unwrap();
    let daemons: Vec<Daemon> = (0..2)
        .map(|at| {
            let (own, other, vtep) = (at + 1, 2 - at, vteps[1 - at]);
            let config = format!(
                r#"
[uplink]
link = "wire"
[[network]]
name = "pods"
vni = 1
ranges = ["10.244.{own}.0/24", "fd00:10:244:{own}::/64"]
{more}
[[peer]]
name = "other"
vtep = "{vtep}"
[[route]]
network = "pods"
prefix = "10.244.{other}.0/24"
peer = "other"
[[route]]
network = "pods"
prefix = "fd00:10:244:{other}::/64"
peer = "other"
"#
            );
            lab.daemon(&nodes[at], &format!("node{own}"), &config).unwrap()
        })
        .collect();
    let (near, _) = add_pod(lab, &daemons[0], "near");
    let (far, far_ips) = add_pod(lab, &daemons[1], "far");
    lab::wait_for(10, || daemons[0].ctl(&["status"]).unwrap()["peers_reachable"] == 1).unwrap();
    far_ips.iter().for_each(|address| near.await_ping(address).unwrap());
    echo(lab, &far);
    let program = "import socket, sys
for to in sys.argv[1:]:
    s = socket.socket(socket.AF_INET6 if ':' in to else socket.AF_INET, socket.SOCK_DGRAM)
    s.settimeout(3)
    for size in (1, 1000, 1372, 1472, 1500, 4000, 9000, 30000, 60000, 65000):
        data = bytes(i * 31 % 251 for i in range(size))
        s.sendto(data, (to, 7))
        assert s.recv(65535) == data, (to, size)
print('all')";
    let printed = near.run(30, &["/usr/bin/python3", "-c", program, &far_ips[0], &far_ips[1]]).unwrap();
    assert_eq!(printed.trim(), "all");
    if !more.is_empty() {
        // TCP in large packets is cut and joined, and nobody is told of what the wire carries.
        crate::serve_iperf3(lab, &far);
        let route = near.run(5, &["ip", "route", "show", "10.244.0.0/16"]).unwrap();
        assert!(route.contains("mtu lock 9000"), "{route}");
        let rate = near.iperf3(&far_ips[0], 2, &[]).unwrap();
        let sockets = near.run(5, &["ip", "route", "get", &far_ips[0]]).unwrap();
        assert!(sockets.contains("mtu lock 9000"), "{sockets}");
        println!("wire of {mtu}, routes of 9000: {:.2} Gbit/s", rate / 1e9);
        // Who forbids to cut hears of it each time.
        let too_big =
            near.command(&["ping", "-n", "-M", "do", "-s", "5000", "-c", "1", "-W", "2", &far_ips[0]]).output();
        let told = String::from_utf8_lossy(&too_big.unwrap().stdout).into_owned();
        assert!(told.contains("mtu = 1450"), "{told}");
        let copies = daemons[0].ctl(&["stats"]).unwrap()["copies"].as_u64().unwrap();
        let merged = daemons[1].ctl(&["stats"]).unwrap()["merged"].as_u64().unwrap();
        assert!(copies > 10_000 && merged > 10_000, "{copies} cut, {merged} joined");
        return daemons.iter().for_each(assert_balanced);
    }
    // A pod that thinks the whole path is as wide as its link is told better, by both families' ways.
    near.ip(&format!("route add {}/32 via 169.254.1.1 dev eth0", far_ips[0])).unwrap();
    near.ip(&format!("route add {}/128 via fe80::1 dev eth0", far_ips[1])).unwrap();
    let wire = mtu - if length == 64 { 70 } else { 50 };
    crate::serve_iperf3(lab, &far);
    for address in &far_ips {
        let too_big = near.command(&["ping", "-n", "-M", "do", "-s", "20000", "-c", "1", "-W", "2", address]).output();
        let told = String::from_utf8_lossy(&too_big.unwrap().stdout).into_owned();
        let words = if address.contains(':') { format!("Packet too big: mtu={wire}") } else { format!("mtu = {wire}") };
        assert!(told.contains(&words), "{told}");
        let rate = near.iperf3(address, 1, &[]).unwrap();
        println!("wire of {mtu} over {}, discovered, to {address}: {:.2} Gbit/s", vteps[0], rate / 1e9);
        assert!(rate > 1e8);
        let route = near.run(5, &["ip", "route", "get", address]).unwrap();
        assert!(route.contains(&format!("mtu {wire} ")), "{route}");
    }
    daemons.iter().for_each(assert_balanced);
}

#[test]
fn every_size_crosses_a_wire_of_1500() {
    let Some(mut bench) = bench("mtu15") else { return };
    sizes(&mut bench, 1500, ["192.0.2.1", "192.0.2.2"], "");
}

#[test]
fn every_size_crosses_a_wire_of_9000() {
    let Some(mut bench) = bench("mtu90") else { return };
    sizes(&mut bench, 9000, ["192.0.2.1", "192.0.2.2"], "");
}

#[test]
fn every_size_crosses_with_routes_that_are_wider_than_the_wire() {
    let Some(mut bench) = bench("wide") else { return };
    sizes(
        &mut bench,
        1500,
        ["192.0.2.1", "192.0.2.2"],
        "subnets = [\"10.244.0.0/16\", \"fd00:10:244::/48\"]\nsubnet_mtu = 9000",
    );
}

#[test]
fn every_size_crosses_an_underlay_of_ipv6() {
    let Some(mut bench) = bench("mtu6") else { return };
    sizes(&mut bench, 1500, ["2001:db8::1", "2001:db8::2"], "");
}
