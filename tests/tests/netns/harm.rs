//! People who mean no good, with a neighbour beside them: what they do is counted by its reason, and the neighbour's ping
//! loses nothing.

use std::thread::{self, JoinHandle};

use serde_json::{Value, json};
use xtask::lab::{self, Daemon, Namespace};

use crate::{add_pod, assert_balanced, bench, conflist, dropped};

const CONFIG: &str = r#"
[uplink]
link = "wire"
[[network]]
name = "pods"
vni = 1
ranges = ["10.244.1.0/24", "fd00:10:244:1::/64"]
[[network]]
name = "lan"
vni = 9
mode = "bridged"
subnets = ["10.9.0.0/16"]
ranges = ["10.9.1.0/24"]
multicast_snooping = true
storm = { broadcast = 500, unknown_unicast = 500 }
[[network]]
name = "open"
vni = 10
mode = "bridged"
spoof_check = false
[[peer]]
name = "other"
vtep = "192.0.2.2"
[[route]]
network = "pods"
prefix = "10.244.2.0/24"
peer = "other"
"#;

/// Frames from one namespace's eth0, as fast as a raw socket takes them; `frames` is Python that yields them.
fn flood(at: &Namespace, frames: &str) {
    let program = format!(
        "import socket, struct, time
def sum16(b):
    if len(b) % 2: b += b'\\0'
    s = sum(struct.unpack('!%dH' % (len(b) // 2), b))
    while s >> 16: s = (s & 0xffff) + (s >> 16)
    return ~s & 0xffff
def ip4(src, dst, proto, payload, id=1, frag=0, ttl=64):
    h = struct.pack('!BBHHHBBH4s4s', 0x45, 0, 20 + len(payload), id, frag, ttl, proto, 0, socket.inet_aton(src), socket.inet_aton(dst))
    return h[:10] + struct.pack('!H', sum16(h)) + h[12:] + payload
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(('eth0', 0))
own = s.getsockname()[4]
gate = bytes.fromhex('027673770001')
{frames}
n = 0
for f in frames():
    try: s.send(f)
    except OSError: pass
    n += 1
print(n)"
    );
    let printed = at.run(40, &["/usr/bin/python3", "-c", &program]).unwrap();
    println!("{} sent {} frames", at.name, printed.trim());
}

/// A neighbour's ping of so many bytes, until the attack is over: everything must come back.
fn neighbour(from: &Namespace, to: &str, seconds: u32, size: &'static str) -> JoinHandle<String> {
    let (from, to) = (from.clone(), to.to_owned());
    thread::spawn(move || {
        let count = (seconds * 20).to_string();
        from.run(seconds + 15, &["ping", "-q", "-n", "-s", size, "-i", "0.05", "-W", "2", "-c", &count, &to])
            .unwrap_or_else(|error| error.to_string())
    })
}

fn assert_unharmed(ping: JoinHandle<String>, what: &str) {
    let printed = ping.join().unwrap();
    assert!(printed.contains(" 0% packet loss"), "{what}: {printed}");
}

fn plug(daemon: &Daemon, pod: &Namespace, more: Value) -> String {
    let mut netconf = daemon.netconf(&conflist());
    for (key, value) in more.as_object().unwrap() {
        netconf[key] = value.clone();
    }
    let path = pod.path();
    let environment = [("CNI_CONTAINERID", pod.name.as_str()), ("CNI_NETNS", path.as_str()), ("CNI_IFNAME", "eth0")];
    let added = daemon.cni("ADD", &environment, &netconf).unwrap();
    assert!(added.is_ok, "{}", added.json);
    added.json["ips"][0]["address"].as_str().unwrap().split('/').next().unwrap().to_owned()
}

#[test]
fn in_a_routed_network() {
    let Some(mut bench) = bench("harm") else { return };
    let lab = &mut bench.lab;
    let (node, other) = (lab.namespace("node").unwrap(), lab.namespace("other").unwrap());
    lab.wire([(&node, "wire", &["192.0.2.1/24"]), (&other, "wire", &["192.0.2.2/24"])], 1500).unwrap();
    let daemon = lab.daemon(&node, "node", CONFIG).unwrap();
    let (attacker, own) = add_pod(lab, &daemon, "attacker");
    let (one, speaker) = add_pod(lab, &daemon, "one");
    let (third, three) = add_pod(lab, &daemon, "three");
    let (_two, two) = add_pod(lab, &daemon, "two");
    let own = &own[0];
    one.await_ping(&three[0]).unwrap();
    // Their datagrams travel in fragments.
    for pod in [&one, &third] {
        pod.ip("link set eth0 mtu 1500").unwrap();
    }
    lab::wait_for(10, || daemon.ctl(&["status"]).unwrap()["peers_reachable"] == 1).unwrap();
    let before = daemon.memory();
    let (victim, speaker, listener) = (&two[0], &speaker[0], &three[0]);
    let attacks: [(&str, String, &[&str]); 7] = [
        (
            "forged ICMP errors",
            format!("def frames():
    quote = ip4('10.244.1.99', '10.244.2.1', 6, bytes(8))
    body = struct.pack('!BBHI', 3, 4, 0, 68) + quote
    f = gate + own + b'\\x08\\0' + ip4('{own}', '{victim}', 1, body)
    g = gate + own + b'\\x08\\0' + ip4('10.244.1.1', '{victim}', 1, body)
    for i in range(20000): yield f; yield g"),
            &["forged-error", "spoofed-address"],
        ),
        (
            "overlapping fragments",
            format!("def frames():
    udp = struct.pack('!HHHH', 1, 2, 72, 0) + bytes(56)
    for i in range(20000):
        yield gate + own + b'\\x08\\0' + ip4('{own}', '{victim}', 17, udp, i & 0xffff, 0x2000)
        yield gate + own + b'\\x08\\0' + ip4('{own}', '{victim}', 17, udp, i & 0xffff, 4)"),
            &["fragment-overlap"],
        ),
        (
            "fragments of every number in the neighbour's name",
            format!("def frames():
    for i in range(65536): yield gate + own + b'\\x08\\0' + ip4('{speaker}', '{listener}', 1, bytes(64), i, 0x2000)"),
            &["spoofed-address"],
        ),
        (
            "a flood of fragments",
            format!("def frames():
    for i in range(60000): yield gate + own + b'\\x08\\0' + ip4('{own}', '10.244.1.%d' % (i % 250), 17, bytes(64), i & 0xffff, 0x2000 | 1 + i % 1000)"),
            &["no-host"],
        ),
        (
            "ARP and ND poisoning, and an announcement of the gateway",
            format!("def frames():
    arp = lambda op, sender, target: b'\\xff' * 6 + own + b'\\x08\\x06' + struct.pack('!HHBBH', 1, 0x800, 6, 4, op) + own + socket.inet_aton(sender) + bytes(6) + socket.inet_aton(target)
    na = own and bytes.fromhex('333300000001') + own + b'\\x86\\xdd' + struct.pack('!IHBB', 0x60000000, 32, 58, 255) + socket.inet_pton(10, 'fe80::1') + socket.inet_pton(10, 'ff02::1') + struct.pack('!BBHI', 136, 0, 0, 0x20000000) + socket.inet_pton(10, 'fe80::1') + b'\\x02\\x01' + own
    for i in range(10000):
        yield arp(2, '{victim}', '10.244.1.9'); yield arp(1, '169.254.1.1', '169.254.1.1'); yield na"),
            &["spoofed-neighbor"],
        ),
        (
            "addresses and MACs of others",
            format!("def frames():
    import os
    for i in range(20000):
        yield gate + os.urandom(5).join([b'\\x02', b'']) + b'\\x08\\0' + ip4('{own}', '{victim}', 17, bytes(8))
        yield gate + own + b'\\x08\\0' + ip4('10.244.1.%d' % (i % 250 + 5), '{victim}', 17, bytes(8))"),
            &["spoofed-mac", "spoofed-address"],
        ),
        (
            "errors asked for",
            format!("def frames():
    f = gate + own + b'\\x08\\0' + ip4('{own}', '203.0.113.9', 17, bytes(600))
    for i in range(40000): yield f"),
            &["no-route"],
        ),
    ];
    for (what, frames, reasons) in attacks {
        let counts: Vec<u64> = reasons.iter().map(|reason| dropped(&daemon, reason)).collect();
        let ping = neighbour(&one, &three[0], 2, "3000");
        flood(&attacker, &frames);
        assert_unharmed(ping, what);
        for (reason, before) in reasons.iter().zip(counts) {
            let now = dropped(&daemon, reason);
            println!("{what}: {} {reason}", now - before);
            assert!(now - before > 100, "{what}: {reason}");
        }
    }
    let after = daemon.memory();
    assert!(after < before + (8 << 20), "memory: {before} bytes before, {after} after");
    let status = daemon.ctl(&["status"]).unwrap();
    assert!(status["workers"][0]["errors_sent"].as_u64().unwrap() < 5_000, "ICMP errors are limited");
    assert_balanced(&daemon);
}

#[test]
fn in_a_bridged_network() {
    let Some(mut bench) = bench("harml") else { return };
    let lab = &mut bench.lab;
    let (node, other) = (lab.namespace("node").unwrap(), lab.namespace("other").unwrap());
    lab.wire([(&node, "wire", &["192.0.2.1/24"]), (&other, "wire", &["192.0.2.2/24"])], 1500).unwrap();
    let daemon = lab.daemon(&node, "node", CONFIG).unwrap();
    let names = ["attacker", "one", "two"];
    let pods = names.map(|name| lab.namespace(name).unwrap());
    // The attacker's port believes any sender, as a router's or a bridge's does.
    let link_of = |at: usize| plug(&daemon, &pods[at], json!({"network": "lan"}));
    let (one, two) = (link_of(1), link_of(2));
    daemon
        .run_ctl(&[
            "port",
            "add",
            "--netns",
            &pods[0].path(),
            "--network",
            "lan",
            "--check",
            "none",
            "--mac-limit",
            "100",
        ])
        .unwrap();
    pods[1].await_ping(&two).unwrap();
    let before = daemon.memory();
    let attacks: [(&str, &str, &str); 2] = [
        (
            "a million MAC addresses",
            "def frames():
    tail = own + b'\\x08\\0' + ip4('10.9.1.9', '10.9.1.8', 17, bytes(8))
    for i in range(1000000): yield b'\\x02\\x99\\0\\0\\0\\x01' + b'\\x06\\0' + struct.pack('!I', i) + tail[6:]",
            "storm-unknown",
        ),
        (
            "IGMP joins",
            "def frames():
    for i in range(50000):
        group = struct.pack('!I', 0xef000000 + i)
        body = b'\\x16\\0\\0\\0' + group
        body = body[:2] + struct.pack('!H', sum16(body)) + body[4:]
        yield b'\\x01\\0\\x5e' + group[1:] + own + b'\\x08\\0' + ip4('10.9.1.9', socket.inet_ntoa(group), 2, body, ttl=1)",
            "",
        ),
    ];
    for (what, frames, reason) in attacks {
        let seconds = if reason.is_empty() { 2 } else { 8 };
        let ping = neighbour(&pods[1], &two, seconds, "56");
        flood(&pods[0], frames);
        assert_unharmed(ping, what);
        if !reason.is_empty() {
            println!("{what}: {} {reason}", dropped(&daemon, reason));
            assert!(dropped(&daemon, reason) > 1000);
        }
    }
    let stations = daemon.ctl(&["fdb", "list"]).unwrap()["stations"].as_array().unwrap().len();
    let groups = daemon.ctl(&["group", "list"]).unwrap()["groups"].as_array().unwrap().len();
    let after = daemon.memory();
    println!("{stations} stations, {groups} groups, {} KiB more memory", after.saturating_sub(before) >> 10);
    assert!(stations < 120 && groups <= 140, "{stations} stations, {groups} groups");
    assert!(after < before + (8 << 20), "memory: {before} bytes before, {after} after");
    let ports = daemon.ctl(&["port", "list"]).unwrap();
    let refused =
        |what: &str| -> u64 { ports["ports"].as_array().unwrap().iter().filter_map(|port| port[what].as_u64()).sum() };
    println!("{} stations and {} groups refused", refused("stations_refused"), refused("groups_refused"));
    assert!(refused("stations_refused") > 100 && refused("groups_refused") > 1000, "{ports}");
    assert!(pods[2].pings(&one, 20, 5));
    // Without any limit of the port, the network's holds, and a checked pod claims nobody's address.
    let open = lab.namespace("open").unwrap();
    daemon.run_ctl(&["port", "add", "--netns", &open.path(), "--network", "open", "--check", "none"]).unwrap();
    let sly = lab.namespace("sly").unwrap();
    plug(&daemon, &sly, json!({"network": "lan"}));
    let attacks: [(&Namespace, &str, String, &str); 2] = [
        (
            &open,
            "MAC addresses without a limit",
            "def frames():
    for i in range(100000): yield b'\\x02\\x99\\0\\0\\0\\x01' + b'\\x06\\0' + struct.pack('!I', i) + b'\\x08\\0' + ip4('10.9.1.9', '10.9.1.8', 17, bytes(8))"
                .to_owned(),
            "",
        ),
        (
            &sly,
            "ARP and ND in the name of a neighbour",
            format!("def frames():
    arp = lambda op: b'\\xff' * 6 + own + b'\\x08\\x06' + struct.pack('!HHBBH', 1, 0x800, 6, 4, op) + own + socket.inet_aton('{two}') + bytes(6) + socket.inet_aton('{one}')
    v6 = lambda source: bytes.fromhex('333300000001') + own + b'\\x86\\xdd' + struct.pack('!IHBB', 0x60000000, 32, 58, 255) + socket.inet_pton(10, source) + socket.inet_pton(10, 'ff02::1')
    na = v6('fe80::1') + struct.pack('!BBHI', 136, 0, 0, 0x20000000) + socket.inet_pton(10, 'fe80::1') + b'\\x02\\x01' + own
    ns = v6('fe80::1') + struct.pack('!BBHI', 135, 0, 0, 0) + socket.inet_pton(10, 'fe80::2') + b'\\x01\\x01' + own
    for i in range(10000): yield arp(1); yield arp(2); yield na; yield ns"),
            "spoofed-neighbor",
        ),
    ];
    for (attacker, what, frames, reason) in attacks {
        let before = dropped(&daemon, reason);
        let ping = neighbour(&pods[1], &two, 3, "56");
        flood(attacker, &frames);
        assert_unharmed(ping, what);
        if !reason.is_empty() {
            println!("{what}: {} {reason}", dropped(&daemon, reason) - before);
            assert!(dropped(&daemon, reason) - before > 1000, "{what}");
        }
    }
    let listed = daemon.ctl(&["fdb", "list", "--network", "open"]).unwrap()["stations"].as_array().unwrap().len();
    let ports = daemon.ctl(&["port", "list"]).unwrap();
    let of_open = ports["ports"].as_array().unwrap().iter().find(|port| port["network"] == "open").unwrap();
    let refused = of_open["stations_refused"].as_u64().unwrap();
    println!("{listed} stations of 100000 in a network without limits of its ports, {refused} refused");
    assert!(refused > 1000, "{ports}");
    assert!((100..=8193).contains(&listed), "the limit of a network is 8192: {listed}");
    // Nobody believes the sly one: the neighbour is where it was.
    pods[1].run(5, &["ip", "neigh", "flush", "dev", "eth0"]).unwrap();
    assert!(pods[1].pings(&two, 20, 5));
    assert_balanced(&daemon);
}

/// From the wire: a peer with our address, and routes that lead in a circle.
#[test]
fn on_the_wire() {
    let Some(mut bench) = bench("harmw") else { return };
    let lab = &mut bench.lab;
    let nodes = [lab.namespace("node1").unwrap(), lab.namespace("node2").unwrap()];
    lab.wire([(&nodes[0], "wire", &["192.0.2.1/24"]), (&nodes[1], "wire", &["192.0.2.2/24"])], 1500).unwrap();
    let daemons: Vec<Daemon> = [1, 2]
        .iter()
        .map(|&own| {
            let other = 3 - own;
            // Both send 10.99.0.0/16 to each other.
            let config = format!(
                r#"
[uplink]
link = "wire"
[[network]]
name = "pods"
vni = 1
ranges = ["10.244.{own}.0/24"]
[[peer]]
name = "other"
vtep = "192.0.2.{other}"
[[route]]
network = "pods"
prefix = "10.244.{other}.0/24"
peer = "other"
[[route]]
network = "pods"
prefix = "10.99.0.0/16"
peer = "other"
"#
            );
            lab.daemon(&nodes[own - 1], &format!("node{own}"), &config).unwrap()
        })
        .collect();
    let (pod, own) = add_pod(lab, &daemons[0], "pod");
    let (one, _) = add_pod(lab, &daemons[0], "one");
    let (_far, far) = add_pod(lab, &daemons[1], "far");
    one.await_ping(&far[0]).unwrap();
    let ping = neighbour(&one, &far[0], 2, "56");
    let own = &own[0];
    flood(
        &pod,
        &format!(
            "def frames():
    f = gate + own + b'\\x08\\0' + ip4('{own}', '10.99.1.1', 17, bytes(64))
    for i in range(20000): yield f"
        ),
    );
    assert_unharmed(ping, "a circle of routes");
    let turned = dropped(&daemons[1], "split-horizon");
    println!("a circle of routes: {turned} of 20000 turned away by the second node, none came back");
    assert!(turned > 1000 && dropped(&daemons[0], "split-horizon") == 0);
    // A forged outer source: our own VTEP, and a stranger.
    let ping = neighbour(&one, &far[0], 2, "56");
    let forge = "import json
from scapy.all import *
conf.verb = 0
mac, to = get_if_hwaddr('wire'), '%s'
s = conf.L2socket(iface='wire')
for source in ('192.0.2.1', '192.0.2.66'):
    f = bytes(Ether(src=mac, dst=to) / IP(src=source, dst='192.0.2.1') / UDP(sport=5, dport=4789) / Raw(bytes([8,0,0,0,0,0,1,0]) + bytes(60)))
    for i in range(2000): s.send(f)";
    let link = nodes[0].run(5, &["ip", "-o", "link", "show", "wire"]).unwrap();
    let mac = link.split("link/ether ").nth(1).unwrap().split_whitespace().next().unwrap();
    nodes[1].run(20, &["/usr/bin/python3", "-c", &forge.replace("%s", mac)]).unwrap();
    assert_unharmed(ping, "a peer that claims our VTEP");
    let counts = ["spoofed-vtep", "unknown-peer"].map(|reason| dropped(&daemons[0], reason));
    println!("of 2000 each: {} spoofed-vtep, {} unknown-peer", counts[0], counts[1]);
    // A burst after a silence may find the fill ring short.
    assert!(counts.iter().all(|&count| count > 100), "{}", daemons[0].run_ctl(&["drops"]).unwrap());
    daemons.iter().for_each(assert_balanced);
}
