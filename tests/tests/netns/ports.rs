//! What a port and a network may be told, each as an operator would try it: with `switchctl`, pods and their own programs.

use serde_json::Value;
use xtask::lab::{self, Daemon, Lab, Namespace};

use crate::{assert_balanced, bench, dropped};

const LANS: &str = r#"
[uplink]
link = "wire"
[[network]]
name = "lan"
vni = 10
mode = "bridged"
subnets = ["10.10.0.0/16", "fd00:10::/64"]
ranges = ["10.10.1.0/24", "fd00:10::100/120"]
multicast_snooping = true
[[network]]
name = "qinq"
vni = 20
mode = "bridged"
transparent = true
spoof_check = false
[[peer]]
name = "other"
vtep = "192.0.2.2"
"#;

fn node(lab: &mut Lab) -> (Daemon, Namespace) {
    let (node, other) = (lab.namespace("node").unwrap(), lab.namespace("other").unwrap());
    lab.wire([(&node, "wire", &["192.0.2.1/24"]), (&other, "wire", &["192.0.2.2/24"])], 1500).unwrap();
    let daemon = lab.daemon(&node, "node", LANS).unwrap();
    lab::wait_for(10, || daemon.ctl(&["status"]).unwrap()["peers_reachable"] == 1).unwrap();
    (daemon, other)
}

/// A pod plugged in by `switchctl port add`; its link and its addresses.
fn plug(lab: &mut Lab, daemon: &Daemon, name: &str, more: &[&str]) -> (Namespace, String, Vec<String>) {
    let pod = lab.namespace(name).unwrap();
    let path = pod.path();
    let added = daemon.ctl(&[&["port", "add", "--netns", path.as_str()], more].concat()).unwrap();
    let addresses = added["addresses"]
        .as_array()
        .unwrap()
        .iter()
        .map(|address| address.as_str().unwrap().split('/').next().unwrap().to_owned());
    (pod, added["link"].as_str().unwrap().to_owned(), addresses.collect())
}

/// A raw socket that prints in hex what arrives, not what leaves, and has "mark" in it. The kernel takes the outermost tag
/// off and tells of it beside the frame (`packet(7)`, `PACKET_AUXDATA`): here it is put back.
const LISTEN: &str = "import socket, struct, sys, time
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
s.setsockopt(263, 8, 1)
s.bind(('eth0', 0)); s.settimeout(.2)
end = time.time() + float(sys.argv[1])
print('ready', file=open(sys.argv[2], 'w'), flush=True)
while time.time() < end:
    try: frame, beside, _, at = s.recvmsg(2000, 100)
    except TimeoutError: continue
    if at[2] == socket.PACKET_OUTGOING or b'mark' not in frame: continue
    status, _, _, _, _, tci, tpid = struct.unpack('=IIIHHHH', beside[0][2])
    if status & 0x10: frame = frame[:12] + struct.pack('!HH', tpid, tci) + frame[12:]
    print(frame.hex())";

/// Sends frames given in hex.
fn send(from: &Namespace, frames: &[String]) {
    let program = "import socket, sys
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW); s.bind(('eth0', 0))
for frame in sys.argv[1:]: s.send(bytes.fromhex(frame))";
    let mut command = vec!["/usr/bin/python3", "-c", program];
    command.extend(frames.iter().map(String::as_str));
    from.run(5, &command).unwrap();
}

/// Hears for a few seconds, in which `then` is done.
fn hear(lab: &Lab, at: &Namespace, then: impl FnOnce()) -> Vec<String> {
    let ready = lab.file(&format!("ready-{}", at.name), "").unwrap();
    let listener = std::thread::spawn({
        let (at, ready) = (at.clone(), ready.clone());
        move || at.run(10, &["/usr/bin/python3", "-c", LISTEN, "2", &ready]).unwrap()
    });
    lab::wait_for(5, || std::fs::read_to_string(&ready).unwrap().contains("ready")).unwrap();
    then();
    listener.join().unwrap().lines().map(str::to_owned).collect()
}

/// A frame of an EtherType that nobody reads, with "mark" and a number in it.
fn frame(destination: &str, source: &str, tags: &str, number: u8) -> String {
    let [destination, source] = [destination, source].map(|mac| mac.replace(':', ""));
    format!("{destination}{source}{tags}88b56d61726b{number:02x}{}", "00".repeat(50))
}

#[test]
fn isolated_hairpin_and_sticky_ports() {
    let Some(mut bench) = bench("ports") else { return };
    let lab = &mut bench.lab;
    let (daemon, _other) = node(lab);
    let (one, _, _) = plug(lab, &daemon, "one", &["--network", "lan", "--isolated"]);
    let (_two, _, two_ips) = plug(lab, &daemon, "two", &["--network", "lan", "--isolated"]);
    let (_open, _, open_ips) = plug(lab, &daemon, "open", &["--network", "lan"]);
    for (address, reaches) in [(&open_ips[0], true), (&open_ips[1], true), (&two_ips[0], false), (&two_ips[1], false)] {
        let got = if reaches { one.await_ping(address).is_ok() } else { one.pings(address, 2, 2) };
        assert_eq!(got, reaches, "{address}");
    }
    assert!(dropped(&daemon, "isolated") > 0, "{}", daemon.run_ctl(&["drops"]).unwrap());

    // Two stations behind one port, as behind a bridge in a virtual machine: they hear each other if it is a hairpin.
    let (first, second) = ("02:00:00:00:0a:01", "02:00:00:00:0a:02");
    let broadcast = "ff:ff:ff:ff:ff:ff";
    for (name, more, hears) in [("turn", &["--hairpin"][..], 1), ("straight", &[][..], 0)] {
        let (pod, ..) = plug(lab, &daemon, name, &[&["--network", "qinq", "--check", "none"], more].concat());
        pod.ip("link set eth0 promisc on").unwrap();
        send(&pod, &[frame(broadcast, first, "", 1), frame(broadcast, second, "", 1)]);
        lab::wait_for(5, || daemon.run_ctl(&["fdb", "list"]).unwrap().contains(second)).unwrap();
        let wanted = frame(second, first, "", 2);
        let heard = hear(lab, &pod, || send(&pod, std::slice::from_ref(&wanted)));
        assert_eq!(heard, vec![wanted; hears], "{name}");
        lab.delete(&pod).unwrap();
        lab::wait_for(5, || !daemon.run_ctl(&["fdb", "list"]).unwrap().contains(second)).unwrap();
    }

    // What was seen at a sticky port is believed nowhere else; at another it moves.
    let (sticky, link, _) = plug(lab, &daemon, "sticky", &["--network", "qinq", "--sticky"]);
    let (thief, other, _) = plug(lab, &daemon, "thief", &["--network", "qinq"]);
    let at = |mac: &str| -> String {
        let listed = daemon.ctl(&["fdb", "list", "--network", "qinq"]).unwrap();
        let found = listed["stations"].as_array().unwrap().iter().find(|station| station["mac"] == mac).cloned();
        found.map_or(String::new(), |station| station["at"].to_string())
    };
    send(&sticky, &[frame(broadcast, first, "", 1)]);
    send(&thief, &[frame(broadcast, second, "", 1)]);
    lab::wait_for(5, || at(first).contains(&link) && at(second).contains(&other)).unwrap();
    let before = dropped(&daemon, "sticky-mac");
    send(&thief, &[frame(broadcast, first, "", 1)]);
    send(&sticky, &[frame(broadcast, second, "", 1)]);
    lab::wait_for(5, || at(second).contains(&link)).unwrap();
    assert!(at(first).contains(&link), "{}", at(first));
    assert_eq!(dropped(&daemon, "sticky-mac"), before + 1);
    assert_balanced(&daemon);
}

#[test]
fn a_transparent_network_and_a_mirror_to_a_peer() {
    let Some(mut bench) = bench("qinq") else { return };
    let lab = &mut bench.lab;
    let (daemon, other) = node(lab);
    let (one, _, _) = plug(lab, &daemon, "one", &["--network", "qinq"]);
    let (two, _, _) = plug(lab, &daemon, "two", &["--network", "qinq"]);
    // One tag, two, and the outer of 802.1ad: each arrives as it was.
    let tags = ["", "81000005", "88a8006481000005", "8100006481000005"];
    let sent: Vec<String> =
        (1..).zip(tags).map(|(number, tags)| frame("ff:ff:ff:ff:ff:ff", "02:00:00:00:0b:01", tags, number)).collect();
    assert_eq!(hear(lab, &two, || send(&one, &sent)), sent);

    // A mirror to a peer: that node's own tools see the inner packets.
    let (near, link, _) = plug(lab, &daemon, "near", &["--network", "lan"]);
    let (_far, _, far_ips) = plug(lab, &daemon, "far", &["--network", "lan"]);
    near.await_ping(&far_ips[0]).unwrap();
    daemon.run_ctl(&["mirror", "add", "tap", "--port", &link, "--to-peer", "other", "--network", "qinq"]).unwrap();
    let file = lab.directory().join("mirror.txt");
    let capture = format!("exec tcpdump -n -l -i wire udp port 4789 > {} 2>/dev/null", file.display());
    lab.spawn(&other, &["sh", "-c", &capture]).unwrap();
    let text = || std::fs::read_to_string(&file).unwrap_or_default();
    lab::wait_for(10, || {
        near.pings(&far_ips[0], 2, 2);
        let text = text();
        ["vni 20", "ICMP echo request", "ICMP echo reply"].iter().all(|words| text.contains(words))
    })
    .unwrap();
    daemon.run_ctl(&["mirror", "del", "tap"]).unwrap();
    assert_balanced(&daemon);
}

#[test]
fn an_ipv6_group_reaches_those_who_joined() {
    let Some(mut bench) = bench("mld") else { return };
    let lab = &mut bench.lab;
    let (daemon, _other) = node(lab);
    let pods: Vec<Namespace> =
        ["sender", "member", "stranger"].map(|name| plug(lab, &daemon, name, &["--network", "lan"]).0).into();
    let join = "import socket, struct, time
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
s.bind(('::', 5000))
s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, socket.inet_pton(10, 'ff15::123') + struct.pack('@I', socket.if_nametoindex('eth0')))
s.settimeout(.2)
n, end = 0, time.time() + 5
while time.time() < end:
    try: s.recv(99); n += 1
    except TimeoutError: pass
print(n)";
    let member = std::thread::spawn({
        let pod = pods[1].clone();
        move || pod.run(15, &["/usr/bin/python3", "-c", join]).unwrap()
    });
    let listed = || daemon.run_ctl(&["group", "list"]).unwrap();
    lab::wait_for(5, || listed().contains("ff15::123")).unwrap_or_else(|_| panic!("{}", listed()));
    let received = |pod: &Namespace| -> u64 {
        pod.run(5, &["cat", "/sys/class/net/eth0/statistics/rx_packets"]).unwrap().trim().parse().unwrap()
    };
    let before = received(&pods[2]);
    let send = "import socket, time
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, socket.if_nametoindex('eth0'))
for i in range(100): s.sendto(b'x', ('ff15::123', 5000)); time.sleep(.005)";
    pods[0].run(10, &["/usr/bin/python3", "-c", send]).unwrap();
    let quiet = received(&pods[2]) - before;
    assert_eq!(member.join().unwrap().trim(), "100");
    assert!(quiet < 20, "the stranger got {quiet}");
    lab::wait_for(5, || !listed().contains("ff15::123")).unwrap();
    assert_balanced(&daemon);
}

#[test]
fn a_peer_of_both_families_and_segments_that_fit() {
    let Some(mut bench) = bench("dual") else { return };
    let lab = &mut bench.lab;
    let nodes = [lab.namespace("node1").unwrap(), lab.namespace("node2").unwrap()];
    let ends = [["192.0.2.1/24", "2001:db8::1/64"], ["192.0.2.2/24", "2001:db8::2/64"]];
    // In the middle, for what the switch takes from a link no tcpdump there sees.
    let lan = lab.namespace("lan").unwrap();
    lan.ip("link add br0 type bridge").unwrap();
    lan.ip("link set br0 up").unwrap();
    for ((node, own), port) in nodes.iter().zip(&ends).zip(["p1", "p2"]) {
        lab.wire([(node, "wire", own), (&lan, port, &[])], 1500).unwrap();
        lan.ip(&format!("link set {port} master br0")).unwrap();
    }
    let daemons: Vec<Daemon> = [1, 2]
        .iter()
        .map(|&own| {
            let other = 3 - own;
            let config = format!(
                r#"
[uplink]
link = "wire"
[[network]]
name = "pods"
vni = 1
ranges = ["10.244.{own}.0/24", "fd00:10:244:{own}::/64"]
mss_clamp = true
[[peer]]
name = "other"
vtep = "192.0.2.{other}"
other_vtep = "2001:db8::{other}"
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
            lab.daemon(&nodes[own - 1], &format!("node{own}"), &config).unwrap()
        })
        .collect();
    let (near, _) = crate::add_pod(lab, &daemons[0], "near");
    let (far, far_ips) = crate::add_pod(lab, &daemons[1], "far");
    near.await_ping(&far_ips[0]).unwrap();
    let file = lab.directory().join("wire.txt");
    let capture = format!("exec tcpdump -n -l -i br0 udp port 4789 >> {} 2>/dev/null", file.display());
    lab.spawn(&lan, &["sh", "-c", &capture]).unwrap();
    let text = || std::fs::read_to_string(&file).unwrap_or_default();
    let travels = |family: &str| {
        std::fs::write(&file, "").unwrap();
        lab::wait_for(10, || near.pings(&far_ips[0], 2, 2) && near.pings(&far_ips[1], 2, 2) && text().contains(family))
            .unwrap_or_else(|_| panic!("{family}: {}", text()));
    };
    travels("IP 192.0.2.1.");
    // The first family's way is lost on both nodes, and comes back.
    let states = || -> Vec<Value> {
        daemons.iter().map(|daemon| daemon.ctl(&["peer", "list"]).unwrap()["peers"][0].clone()).collect()
    };
    nodes.iter().for_each(|node| node.ip("route del 192.0.2.0/24").unwrap());
    travels("IP6 2001:db8::1.");
    assert!(states().iter().all(|peer| peer["state"] == "reachable"), "{:?}", states());
    nodes.iter().for_each(|node| node.ip("route add 192.0.2.0/24 dev wire").unwrap());
    travels("IP 192.0.2.1.");

    // Pods that believe the way to be as wide as their link: their segments fit the wire all the same.
    for (pod, addresses) in
        [(&near, ["10.244.2.0/24", "fd00:10:244:2::/64"]), (&far, ["10.244.1.0/24", "fd00:10:244:1::/64"])]
    {
        pod.ip(&format!("route add {} via 169.254.1.1 dev eth0", addresses[0])).unwrap();
        pod.ip(&format!("route add {} via fe80::1 dev eth0", addresses[1])).unwrap();
    }
    let server = "import socket, sys
s = socket.socket(socket.AF_INET6); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind(('::', 81)); s.listen()
while True:
    c = s.accept()[0]; c.sendall(b'%d' % c.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)); c.close()";
    lab.spawn(&far, &["/usr/bin/python3", "-c", server]).unwrap();
    assert!(crate::is_listening(&far, 81));
    let client = "import socket, sys
c = socket.create_connection((sys.argv[1], 81), 3); print(c.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG), c.recv(99).decode())";
    for (address, headers) in far_ips.iter().zip([40, 60]) {
        let printed = near.run(5, &["/usr/bin/python3", "-c", client, address]).unwrap();
        // Both ends leave room for timestamps, twelve bytes.
        let segment = 1500 - 70 - headers - 12;
        assert_eq!(printed.trim(), format!("{segment} {segment}"), "{address}");
    }
    daemons.iter().for_each(assert_balanced);
}
