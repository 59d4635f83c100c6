//! The host's own stack, and the world behind it.

use serde_json::json;
use xtask::lab::{self, Daemon, Lab, Namespace};

use crate::{Bench, add_pod, assert_balanced, bench, conflist, dropped, is_listening};

/// A node that a router, the "internet", reaches at 192.0.2.1 and 2001:db8::1.
pub(crate) const CONFIG: &str = r#"
[uplink]
link = "wire"
[host]
network = "pods"
[[network]]
name = "pods"
vni = 1
subnets = ["10.244.0.0/16", "fd00:10:244::/48"]
ranges = ["10.244.1.0/24", "fd00:10:244:1::/64"]
"#;

pub(crate) struct World {
    pub(crate) node: Namespace,
    pub(crate) internet: Namespace,
    pub(crate) daemon: Daemon,
    pub(crate) pod: Namespace,
    pub(crate) addresses: Vec<String>,
}

/// A node, a pod, and a namespace that knows the node and nothing of pods.
pub(crate) fn world(bench: &mut Bench, config: &str) -> World {
    let lab = &mut bench.lab;
    let (node, internet) = (lab.namespace("node").unwrap(), lab.namespace("internet").unwrap());
    lab.wire(
        [
            (&node, "wire", &["192.0.2.1/24", "2001:db8::1/64"]),
            (&internet, "wire", &["192.0.2.9/24", "2001:db8::9/64"]),
        ],
        1500,
    )
    .unwrap();
    internet.ip("addr add 198.51.100.1/32 dev lo").unwrap();
    internet.ip("addr add 2001:db8:ff::1/128 dev lo").unwrap();
    node.ip("route add default via 192.0.2.9").unwrap();
    node.ip("route add default via 2001:db8::9").unwrap();
    node.run(5, &["sysctl", "-qw", "net.ipv6.conf.all.forwarding=1"]).unwrap();
    let daemon = lab.daemon(&node, "node", config).unwrap();
    let (pod, addresses) = add_pod(lab, &daemon, "pod");
    World { node, internet, daemon, pod, addresses }
}

/// Serves a TCP greeting that tells the client's address.
pub(crate) fn greet(lab: &mut Lab, at: &Namespace, port: u16) {
    let program = "import http.server,socket,sys
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(self.client_address[0].encode())
    def log_message(self, *a): pass
class S(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    daemon_threads = True
S(('::', int(sys.argv[1])), H).serve_forever()";
    lab.spawn(at, &["/usr/bin/python3", "-c", program, &port.to_string()]).unwrap();
    assert!(is_listening(at, port));
}

/// As whom a server sees the caller.
pub(crate) fn seen_as(from: &Namespace, url: &str) -> String {
    let program = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=3).read().decode())";
    let text = from.run(5, &["/usr/bin/python3", "-c", program, url]).unwrap();
    text.trim().trim_start_matches("::ffff:").to_owned()
}

#[test]
fn host_and_pods_reach_each_other_and_pods_the_world() {
    let Some(mut bench) = bench("out") else { return };
    let World { node, internet, daemon, pod, addresses } = world(&mut bench, CONFIG);
    let lab = &mut bench.lab;
    let (v4, v6) = (&addresses[0], &addresses[1]);
    assert_eq!((v4.as_str(), v6.as_str()), ("10.244.1.2", "fd00:10:244:1::2"), "the first address is the node's own");
    // Probes, both families: kubelet's way.
    for address in [v4, v6] {
        node.await_ping(address).unwrap();
        assert!(node.pings(address, 20, 5), "host to {address}");
    }
    greet(lab, &pod, 80);
    greet(lab, &node, 8000);
    greet(lab, &internet, 8001);
    assert_eq!(seen_as(&node, &format!("http://{v4}/")), "10.244.1.1");
    assert_eq!(seen_as(&node, &format!("http://[{v6}]/")), "fd00:10:244:1::1");
    // The host's services, at its address in the network and at its address in the world.
    for url in ["http://10.244.1.1:8000/", "http://192.0.2.1:8000/"] {
        assert_eq!(seen_as(&pod, url), *v4, "{url}");
    }
    assert_eq!(seen_as(&pod, "http://[2001:db8::1]:8000/"), *v6);
    // The world sees the node.
    assert_eq!(seen_as(&pod, "http://198.51.100.1:8001/"), "192.0.2.1");
    assert_eq!(seen_as(&pod, "http://[2001:db8:ff::1]:8001/"), "2001:db8::1");
    // And reaches pods, where it has a route to them.
    internet.ip("route add 10.244.1.0/24 via 192.0.2.1").unwrap();
    assert_eq!(seen_as(&internet, &format!("http://{v4}/")), "192.0.2.9");
    let status = daemon.run_ctl(&["status"]).unwrap();
    let line = "host vswitch0: network pods, addresses 10.244.1.1,fd00:10:244:1::1, masquerades; up";
    assert!(status.contains(line), "{status}");
    assert_balanced(&daemon);
}

#[test]
fn what_others_take_away_comes_back() {
    let Some(mut bench) = bench("heal") else { return };
    let World { node, mut daemon, addresses, .. } = world(&mut bench, CONFIG);
    let lab = &mut bench.lab;
    let has = |command: &[&str], text: &str| node.run(5, command).unwrap().contains(text);
    let reaches = || addresses.iter().all(|address| node.pings(address, 1, 1));
    let says = |text: &str| daemon.run_ctl(&["status"]).unwrap().contains(text);
    let comes = |what: &str, is_true: &dyn Fn() -> bool| {
        lab::wait_for(15, is_true).unwrap_or_else(|_| panic!("{what}: {}", daemon.run_ctl(&["status"]).unwrap()));
    };
    // A firewall that is loaded anew, one that empties our table alone, and an operator who cleans up.
    let meanwhile = [
        ("flush ruleset", "route del 10.244.1.0/24 dev vswitch0"),
        ("flush table inet vswitch", "addr flush dev vswitch0"),
        ("delete chain inet vswitch postrouting", "link set vswitch0-sw down"),
    ];
    for (rules, links) in meanwhile {
        node.run(5, &["nft", rules]).unwrap();
        node.ip(links).unwrap();
        comes(rules, &|| has(&["nft", "list", "ruleset"], "masquerade"));
        comes(links, &|| has(&["ip", "addr", "show", "vswitch0"], "10.244.1.1/32") && reaches());
    }
    // A link that is down has no routes, and says so; one that was so only for a moment has lost them too.
    node.ip("link set vswitch0 down").unwrap();
    comes("down", &|| says("down: `ip link set vswitch0 up`"));
    node.ip("link set vswitch0 up").unwrap();
    comes("up", &|| reaches() && says("masquerades; up"));
    node.run(5, &["sh", "-c", "ip link set vswitch0 down; ip link set vswitch0 up"]).unwrap();
    comes("down and up", &|| has(&["ip", "addr", "show", "vswitch0"], "fd00:10:244:1::1/128") && reaches());
    // What somebody put in the place of ours is his, and told of, until it is gone.
    node.ip("route replace 10.244.1.0/24 via 192.0.2.9").unwrap();
    comes("another's route", &|| says("the host has other routes to 10.244.1.0/24"));
    node.ip("route del 10.244.1.0/24 via 192.0.2.9").unwrap();
    comes("route again", &|| reaches() && says("masquerades; up"));
    let take = lab.file("take", "link del vswitch0\nlink add vswitch0 type veth peer name vswitch0-xx\n").unwrap();
    // The switch may be faster.
    comes("a name that is taken", &|| node.run(5, &["ip", "-batch", &take]).is_ok());
    comes("another's link", &|| says("is not the switch's"));
    node.ip("link del vswitch0").unwrap();
    comes("link", &|| reaches() && says("masquerades; up"));
    assert!(daemon.stop());
    assert!(!has(&["ip", "link"], "vswitch0") && !has(&["nft", "list", "ruleset"], "vswitch"));
    assert!(has(&["sysctl", "net.ipv4.ip_forward"], "= 0"));
}

#[test]
fn a_daemon_that_cannot_start_or_crashed_leaves_nothing() {
    let Some(mut bench) = bench("inv3") else { return };
    let lab = &mut bench.lab;
    let node = lab.namespace("node").unwrap();
    lab.wire([(&node, "wire", &["192.0.2.1/24", "2001:db8::1/64"]), (&node, "other", &[])], 1500).unwrap();
    lab::wait_for(5, || !node.run(5, &["ip", "addr"]).unwrap().contains("tentative")).unwrap();
    let before = inventory(&node);
    let refused = lab.daemon(&node, "node", &format!("socket = \"/proc/none/x.sock\"\n{CONFIG}")).unwrap_err();
    assert!(refused.to_string().contains("set daemon.socket"), "{refused:#}");
    assert_eq!(inventory(&node), before);
    // A crash, and then a configuration without the host, or with another name for its link.
    let rest = CONFIG.replace("[host]\nnetwork = \"pods\"\n", "");
    for (config, is_joined) in [(rest, false), (CONFIG.replace("[host]", "[host]\nlink = \"pods0\""), true)] {
        let mut crashed = lab.daemon(&node, "node", CONFIG).unwrap();
        assert!(node.run(5, &["ip", "link"]).unwrap().contains("vswitch0"));
        crashed.kill();
        let mut daemon = lab.daemon(&node, "node", &config).unwrap();
        assert!(!node.run(5, &["ip", "link"]).unwrap().contains("vswitch0"));
        assert_eq!(node.run(5, &["nft", "list", "ruleset"]).unwrap().contains("inet vswitch"), is_joined);
        assert!(daemon.stop());
        assert_eq!(inventory(&node), before);
    }
}

#[test]
fn a_pod_gets_no_further_than_it_should() {
    let Some(mut bench) = bench("bypass") else { return };
    let config = format!("{CONFIG}\n[[network]]\nname = \"other\"\nvni = 2\nranges = [\"10.77.0.0/24\"]\n");
    let World { daemon, pod, .. } = world(&mut bench, &config);
    let lab = &mut bench.lab;
    let stranger = lab.namespace("stranger").unwrap();
    let mut other = conflist();
    other["plugins"][0]["network"] = json!("other");
    let addresses = daemon.add_pod(&stranger, &other).unwrap();
    assert!(!pod.pings(&addresses[0], 2, 2), "another network");
    // VXLAN to any VTEP, the node's own and others'.
    let send = "import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for to in ('192.0.2.1', '192.0.2.9', '10.244.1.1'):
    s.sendto(bytes([8,0,0,0,0,0,2,0]) + bytes(60), (to, 4789))";
    let before = dropped(&daemon, "nested-vxlan");
    pod.run(5, &["/usr/bin/python3", "-c", send]).unwrap();
    lab::wait_for(5, || dropped(&daemon, "nested-vxlan") == before + 3).unwrap();
    assert_balanced(&daemon);
}

#[test]
fn ports_of_the_host_lead_to_pods() {
    let Some(mut bench) = bench("hostport") else { return };
    let World { node, internet, daemon, .. } = world(&mut bench, CONFIG);
    let lab = &mut bench.lab;
    let web = lab.namespace("web").unwrap();
    let mut netconf = daemon.netconf(&conflist());
    netconf["runtimeConfig"] = json!({"portMappings": [
        {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
        {"hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": "192.0.2.1"},
    ]});
    let path = web.path();
    let environment = [("CNI_CONTAINERID", "web"), ("CNI_NETNS", path.as_str()), ("CNI_IFNAME", "eth0")];
    let added = daemon.cni("ADD", &environment, &netconf).unwrap();
    assert!(added.is_ok, "{}", added.json);
    greet(lab, &web, 80);
    let (pod, _) = add_pod(lab, &daemon, "client");
    // From outside, from the node itself by any of its addresses, from another pod, and from the pod itself.
    assert_eq!(seen_as(&internet, "http://192.0.2.1:8080/"), "192.0.2.9");
    assert_eq!(seen_as(&internet, "http://[2001:db8::1]:8080/"), "2001:db8::9");
    for url in ["http://192.0.2.1:8080/", "http://127.0.0.1:8080/", "http://10.244.1.1:8080/"] {
        seen_as(&node, url);
    }
    seen_as(&pod, "http://192.0.2.1:8080/");
    seen_as(&web, "http://192.0.2.1:8080/");
    let rules = node.run(5, &["nft", "list", "table", "inet", "vswitch"]).unwrap();
    assert!(rules.contains("udp dport 5353 dnat ip to 10.244.1.3:53"), "{rules}");
    // Another pod cannot have the same port; when this one goes, its rule goes.
    let other = lab.namespace("rival").unwrap();
    let path = other.path();
    let rival = [("CNI_CONTAINERID", "rival"), ("CNI_NETNS", path.as_str()), ("CNI_IFNAME", "eth0")];
    let refused = daemon.cni("ADD", &rival, &netconf).unwrap();
    assert!(!refused.is_ok && refused.json["msg"].as_str().unwrap().contains("8080"), "{}", refused.json);
    assert!(daemon.cni("DEL", &environment, &netconf).unwrap().is_ok);
    lab::wait_for(5, || !node.run(5, &["nft", "list", "table", "inet", "vswitch"]).unwrap().contains("8080")).unwrap();
}

/// The kernel asks its rules for the first packet of a flow alone, and one of UDP that never pauses never ends.
#[test]
fn udp_that_never_pauses_follows_a_mapped_port() {
    let Some(mut bench) = bench("udpport") else { return };
    let World { node, internet, mut daemon, .. } = world(&mut bench, CONFIG);
    let lab = &mut bench.lab;
    // Answers with its name.
    let server = "import socket, sys
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); s.bind(('::', int(sys.argv[1])))
while True:
    try: s.sendto(sys.argv[2].encode(), s.recvfrom(99)[1])
    except OSError: pass";
    // Two sockets, one a family, that send ten times a second; who answers them is noted.
    let client = "import pathlib, socket, sys, time
ends = []
for to in (('192.0.2.1', 5353), ('2001:db8::1', 5353)):
    s = socket.socket(socket.AF_INET if '.' in to[0] else socket.AF_INET6, socket.SOCK_DGRAM)
    s.settimeout(.1); ends.append((s, to))
while True:
    heard = []
    for s, to in ends:
        try: s.sendto(b'who', to); heard.append(s.recv(99).decode())
        except OSError: heard.append('nobody')
    pathlib.Path(sys.argv[1]).write_text(' '.join(heard)); time.sleep(.05)";
    lab.spawn(&node, &["/usr/bin/python3", "-c", server, "5353", "node"]).unwrap();
    let heard = lab.file("heard", "").unwrap();
    lab.spawn(&internet, &["/usr/bin/python3", "-c", client, &heard]).unwrap();
    let answers = |who: &str| {
        let both = format!("{who} {who}");
        lab::wait_for(5, || std::fs::read_to_string(&heard).unwrap() == both)
            .unwrap_or_else(|_| panic!("{} instead of {both}", std::fs::read_to_string(&heard).unwrap()));
    };
    answers("node");
    let mut netconf = daemon.netconf(&conflist());
    netconf["runtimeConfig"] = json!({"portMappings": [{"hostPort": 5353, "containerPort": 53, "protocol": "udp"}]});
    for name in ["one", "two", "three"] {
        let pod = lab.namespace(name).unwrap();
        lab.spawn(&pod, &["/usr/bin/python3", "-c", server, "53", name]).unwrap();
        let path = pod.path();
        let environment = [("CNI_CONTAINERID", name), ("CNI_NETNS", path.as_str()), ("CNI_IFNAME", "eth0")];
        let added = daemon.cni("ADD", &environment, &netconf).unwrap();
        assert!(added.is_ok, "{}", added.json);
        answers(name);
        if name != "three" {
            assert!(daemon.cni("DEL", &environment, &netconf).unwrap().is_ok);
        }
        if name == "two" {
            answers("node");
        }
    }
    assert!(daemon.stop());
    answers("node");
}

#[test]
fn rates_of_the_bandwidth_capability_hold() {
    let Some(mut bench) = bench("rate") else { return };
    let World { node, daemon, .. } = world(&mut bench, CONFIG);
    let lab = &mut bench.lab;
    let slow = lab.namespace("slow").unwrap();
    let mut netconf = daemon.netconf(&conflist());
    netconf["runtimeConfig"] = json!({"bandwidth":
        {"ingressRate": 50_000_000, "ingressBurst": 4_000_000, "egressRate": 20_000_000, "egressBurst": 4_000_000}});
    let path = slow.path();
    let environment = [("CNI_CONTAINERID", "slow"), ("CNI_NETNS", path.as_str()), ("CNI_IFNAME", "eth0")];
    assert!(daemon.cni("ADD", &environment, &netconf).unwrap().is_ok);
    crate::serve_iperf3(lab, &slow);
    for (more, rate) in [(&[][..], 50e6), (&["-R"][..], 20e6)] {
        let got = node.iperf3("10.244.1.3", 3, more).unwrap();
        println!("{:.1} Mbit/s of {:.0}", got / 1e6, rate / 1e6);
        // The burst lets more through at first.
        assert!((rate * 0.7..rate * 1.4).contains(&got), "{got} of {rate}");
    }
    // What is far beyond a rate is dropped, both ways.
    for more in [&[][..], &["-R"][..]] {
        node.iperf3("10.244.1.3", 1, &[&["-u", "-b", "200M"], more].concat()).unwrap();
    }
    for reason in ["rate-from", "rate-to"] {
        assert!(dropped(&daemon, reason) > 0, "{reason}");
    }
}

/// Everything of the host that could have been changed.
pub(crate) fn inventory(node: &Namespace) -> String {
    let settings = "find /proc/sys/net -type f -readable ! -name 'stable_secret' ! -name 'flush' ! -path '*/vswitch0*' ! -path '*nf_conntrack_count*' -exec sh -c 'for f; do echo \"$f $(cat $f 2>/dev/null)\"; done' _ {} + | sort";
    let parts: [&[&str]; 8] = [
        &["ip", "-d", "link", "show"],
        &["ip", "addr", "show"],
        &["ip", "route", "show", "table", "all"],
        &["ip", "-6", "route", "show", "table", "all"],
        &["ip", "rule", "show"],
        &["nft", "list", "ruleset"],
        &["bridge", "fdb", "show"],
        &["sh", "-c", settings],
    ];
    let volatile = |line: &&str| !line.contains("valid_lft") && !line.contains("expires");
    let text: String = parts.iter().map(|part| node.run(20, part).unwrap() + "\n").collect();
    text.lines().filter(volatile).collect::<Vec<_>>().join("\n")
}

#[test]
fn nothing_of_the_host_is_changed_after_stop() {
    let Some(mut bench) = bench("inv2") else { return };
    let lab = &mut bench.lab;
    let (node, internet) = (lab.namespace("node").unwrap(), lab.namespace("internet").unwrap());
    lab.wire([(&node, "wire", &["192.0.2.1/24", "2001:db8::1/64"]), (&internet, "wire", &["192.0.2.9/24"])], 1500)
        .unwrap();
    // Somebody else's rules, which are none of ours.
    node.run(5, &["nft", "add table inet mine; add chain inet mine c { type filter hook forward priority 0; }"])
        .unwrap();
    // A node that another network serves still: its routes to pods of here and of elsewhere, and a hardened kernel.
    for prefix in ["10.244.1.0/24", "10.244.2.0/24"] {
        node.ip(&format!("route add {prefix} via 192.0.2.9")).unwrap();
    }
    node.run(5, &["sysctl", "-w", "net.ipv4.conf.all.accept_redirects=0", "net.ipv4.conf.wire.forwarding=1"]).unwrap();
    lab::wait_for(5, || !node.run(5, &["ip", "addr"]).unwrap().contains("tentative")).unwrap();
    let before = inventory(&node);
    assert!(before.contains("ip_forward 0") && before.contains("table inet mine"), "the list is of this namespace");
    let mut daemon = lab.daemon(&node, "node", CONFIG).unwrap();
    let (pod, _) = add_pod(lab, &daemon, "pod");
    let during = inventory(&node);
    assert!(during.contains("ip_forward 1"), "there is something to take back");
    let status = daemon.run_ctl(&["status"]).unwrap();
    assert!(status.contains("the host has other routes to 10.244.1.0/24"), "{status}");
    assert!(node.run(5, &["nft", "list", "ruleset"]).unwrap().contains("masquerade"));
    daemon.kill();
    daemon.start().unwrap();
    lab.delete(&pod).unwrap();
    lab::wait_for(5, || daemon.ctl(&["status"]).unwrap()["ports"] == 0).unwrap();
    assert!(daemon.stop());
    let difference = |one: &str, other: &str| -> Vec<String> {
        one.lines().filter(|line| !other.lines().any(|also| also == *line)).map(str::to_owned).collect()
    };
    let after = inventory(&node);
    assert_eq!((difference(&before, &after), difference(&after, &before)), (vec![], vec![]));
}

#[test]
fn a_mapped_port_that_the_kernel_refuses_is_no_port() {
    let Some(mut bench) = bench("refused") else { return };
    let lab = &mut bench.lab;
    let node = lab.namespace("node").unwrap();
    lab.wire([(&node, "wire", &["192.0.2.1/24"]), (&node, "other", &[])], 1500).unwrap();
    // Somebody else owns the table, as long as it runs.
    let own = "(echo 'add table inet vswitch { flags owner; }'; sleep 60) | nft -i";
    lab.spawn(&node, &["sh", "-c", own]).unwrap();
    lab::wait_for(5, || node.run(5, &["nft", "list", "tables"]).unwrap().contains("inet vswitch")).unwrap();
    let daemon = lab
        .daemon(&node, "node", &CONFIG.replace("network = \"pods\"", "network = \"pods\"\nmasquerade = false"))
        .unwrap();
    let web = lab.namespace("web").unwrap();
    let mut netconf = daemon.netconf(&conflist());
    netconf["runtimeConfig"] = json!({"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]});
    let path = web.path();
    let environment = [("CNI_CONTAINERID", "web"), ("CNI_NETNS", path.as_str()), ("CNI_IFNAME", "eth0")];
    let refused = daemon.cni("ADD", &environment, &netconf).unwrap();
    assert!(
        !refused.is_ok && refused.json["msg"].as_str().unwrap().contains("nft refused our table"),
        "{}",
        refused.json
    );
    assert_eq!(daemon.ctl(&["status"]).unwrap()["ports"], 0);
    assert!(!web.run(5, &["ip", "link"]).unwrap().contains("eth0"), "nothing is left of it");
}
