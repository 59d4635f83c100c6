//! Ports and frames as NFV people have them: trunks, tags, groups, mirrors, several interfaces a pod. The far ends are
//! scapy and sockets, for not every kernel has VLAN devices.

use serde_json::{Value, json};
use xtask::lab::{self, Daemon, Lab, Namespace};

use crate::{add_pod, assert_balanced, bench, conflist, dropped};

const LANS: &str = r#"
[uplink]
link = "wire"
[[network]]
name = "red"
vni = 10
mode = "bridged"
vlan = 10
subnets = ["10.10.0.0/16"]
ranges = ["10.10.1.0/24"]
multicast_snooping = true
[[network]]
name = "blue"
vni = 20
mode = "bridged"
vlan = 20
subnets = ["10.20.0.0/16"]
ranges = ["10.20.1.0/24"]
[[network]]
name = "pods"
vni = 1
ranges = ["10.244.1.0/24"]
"#;

fn node(lab: &mut Lab, config: &str) -> (Daemon, Namespace) {
    let (node, other) = (lab.namespace("node").unwrap(), lab.namespace("other").unwrap());
    lab.wire([(&node, "wire", &["192.0.2.1/24"]), (&other, "wire", &["192.0.2.2/24"])], 1500).unwrap();
    (lab.daemon(&node, "node", config).unwrap(), other)
}

/// Plugs an interface in by CNI, with more of the configuration.
fn plug(daemon: &Daemon, pod: &Namespace, ifname: &str, more: Value) -> Value {
    let mut netconf = daemon.netconf(&conflist());
    if let Some(map) = netconf.as_object_mut() {
        map.remove("network");
        more.as_object().unwrap().iter().for_each(|(key, value)| {
            map.insert(key.clone(), value.clone());
        });
    }
    let path = pod.path();
    let environment = [("CNI_CONTAINERID", pod.name.as_str()), ("CNI_NETNS", path.as_str()), ("CNI_IFNAME", ifname)];
    let added = daemon.cni("ADD", &environment, &netconf).unwrap();
    assert!(added.is_ok, "{}", added.json);
    added.json
}

/// Runs scapy in a namespace; the last line that it prints, as JSON.
fn scapy(at: &Namespace, seconds: u32, program: &str) -> Value {
    let program = format!("import json, time\nfrom scapy.all import *\nconf.verb = 0\n{program}");
    let printed = at.run(seconds, &["/usr/bin/python3", "-c", &program]).unwrap();
    serde_json::from_str(printed.lines().last().unwrap_or("null")).unwrap()
}

#[test]
fn a_trunk_frame_by_frame() {
    let Some(mut bench) = bench("trunk") else { return };
    let lab = &mut bench.lab;
    let (daemon, _other) = node(lab, LANS);
    let pods = ["trunk", "red", "blue"].map(|name| lab.namespace(name).unwrap());
    // Keys as the reference bridge plugin has them.
    let spec = json!({"network": "red", "vlanTrunk": [{"minID": 1, "maxID": 100}], "mac": "02:00:00:00:00:01"});
    plug(&daemon, &pods[0], "eth0", spec);
    plug(&daemon, &pods[1], "eth0", json!({"vlan": 10, "mac": "02:00:00:00:00:02"}));
    plug(&daemon, &pods[2], "eth0", json!({"vlan": 20, "mac": "02:00:00:00:00:03"}));
    // From the trunk: untagged is red, 20 is blue, 30 is nobody's. What each receiver sees is compared to the byte.
    let listen = |pod: &Namespace, seconds: &str| {
        let program = format!(
            "import json\nfrom scapy.all import *\np = sniff(iface='eth0', timeout={seconds}, lfilter=lambda p: Raw in p and bytes(p[Raw]).startswith(b'mark'))\nprint(json.dumps([bytes(x).hex() for x in p]))"
        );
        let pod = pod.clone();
        std::thread::spawn(move || {
            let printed = pod.run(20, &["/usr/bin/python3", "-c", &program]).unwrap();
            serde_json::from_str::<Vec<String>>(printed.lines().last().unwrap()).unwrap()
        })
    };
    let receivers = [listen(&pods[1], "4"), listen(&pods[2], "4")];
    let sent = scapy(
        &pods[0],
        10,
        "time.sleep(2)
src = '02:00:00:00:00:01'
ip = IP(src='10.10.1.1', dst='10.10.9.9') / UDP(sport=1, dport=2)
frames = {
  'native': Ether(src=src, dst='ff:ff:ff:ff:ff:ff') / ip / Raw(b'mark native'),
  'blue': Ether(src=src, dst='ff:ff:ff:ff:ff:ff') / Dot1Q(vlan=20) / IP(src='10.10.1.1', dst='10.20.9.9') / UDP(sport=1, dport=2) / Raw(b'mark blue'),
  'none': Ether(src=src, dst='ff:ff:ff:ff:ff:ff') / Dot1Q(vlan=30) / ip / Raw(b'mark none'),
}
s = conf.L2socket(iface='eth0')
for f in frames.values(): s.send(f)
blue = frames['blue']
untagged = Ether(src=blue.src, dst=blue.dst) / blue[IP]
print(json.dumps({'native': bytes(frames['native']).hex(), 'blue': bytes(untagged).hex()}))",
    );
    let [red, blue] = receivers.map(|receiver| receiver.join().unwrap());
    assert_eq!(
        (red, blue),
        (vec![sent["native"].as_str().unwrap().into()], vec![sent["blue"].as_str().unwrap().into()])
    );
    // To the trunk: red comes untagged, blue with its tag.
    let trunk = listen(&pods[0], "4");
    for (pod, source, number) in [(&pods[1], "10.10.1.2", 2), (&pods[2], "10.20.1.1", 3)] {
        scapy(
            pod,
            10,
            &format!(
                "time.sleep(1)
conf.L2socket(iface='eth0').send(Ether(src='02:00:00:00:00:0{number}', dst='ff:ff:ff:ff:ff:ff') / IP(src='{source}', dst='10.10.9.9') / UDP(sport=1, dport=2) / Raw(b'mark {number}'))
print(1)"
            ),
        );
    }
    let seen: Vec<String> = trunk.join().unwrap();
    let tags: Vec<&str> = seen.iter().map(|frame| &frame[24..32]).collect();
    assert!(tags.len() == 2 && tags[0].starts_with("0800") && tags[1] == "81000014", "{seen:?}");
    assert!(dropped(&daemon, "vlan-not-allowed") > 0);
    assert_balanced(&daemon);
}

#[test]
fn an_uplink_with_a_tag_frame_by_frame() {
    let Some(mut bench) = bench("tagged") else { return };
    let lab = &mut bench.lab;
    let (daemon, other) = node(
        lab,
        r#"
[uplink]
link = "wire"
vlan = 100
vtep = ["203.0.113.1"]
[[network]]
name = "pods"
vni = 7
ranges = ["10.244.1.0/24"]
[[peer]]
name = "far"
vtep = "203.0.113.2"
[[route]]
network = "pods"
prefix = "10.244.2.0/24"
peer = "far"
"#,
    );
    let (pod, addresses) = add_pod(lab, &daemon, "pod");
    // A far end that is nothing but frames: it answers ARP and ICMP echo inside VXLAN, all under the tag 100.
    let far = "
mac = get_if_hwaddr('wire')
s = conf.L2socket(iface='wire')
seen = set()
def answer(p):
    if Dot1Q not in p or p[Dot1Q].vlan != 100 or p.src == mac: return
    tag = Ether(src=mac, dst=p.src) / Dot1Q(vlan=100)
    if ARP in p and p[ARP].op == 1 and p[ARP].pdst == '203.0.113.2':
        seen.add('arp'); s.send(tag / ARP(op=2, hwsrc=mac, psrc='203.0.113.2', hwdst=p.src, pdst=p[ARP].psrc))
    elif ARP in p and p[ARP].op == 2 and p[ARP].psrc == '203.0.113.1':
        seen.add('answered')
    elif UDP in p and p[UDP].dport == 4789:
        inner = Ether(bytes(p[UDP].payload)[8:])
        if ICMP in inner and inner[ICMP].type == 8:
            seen.add('vxlan')
            back = Ether(src='02:76:73:77:00:01', dst='02:76:73:77:00:01') / IP(src=inner[IP].dst, dst=inner[IP].src) / ICMP(type=0, id=inner[ICMP].id, seq=inner[ICMP].seq) / inner[ICMP].payload
            s.send(tag / IP(src='203.0.113.2', dst='203.0.113.1') / UDP(sport=55555, dport=4789, chksum=0) / Raw(bytes([8,0,0,0,0,0,7,0])) / back)
ask = Ether(src=mac, dst='ff:ff:ff:ff:ff:ff') / Dot1Q(vlan=100) / ARP(op=1, hwsrc=mac, psrc='203.0.113.2', pdst='203.0.113.1')
threading.Timer(4, lambda: s.send(ask)).start()
sniff(iface='wire', prn=answer, store=False, timeout=9)
print(json.dumps(sorted(seen)))";
    let answers = std::thread::spawn({
        let other = other.clone();
        move || scapy(&other, 25, far)
    });
    lab::wait_for(10, || daemon.ctl(&["status"]).unwrap()["peers_reachable"] == 1).unwrap();
    pod.await_ping("10.244.2.9").unwrap();
    let printed = pod.run(10, &["ping", "-q", "-n", "-i", "0.2", "-c", "5", "-W", "2", "10.244.2.9"]).unwrap();
    assert!(printed.contains(" 0% packet loss"), "{printed}");
    assert_eq!(answers.join().unwrap(), json!(["answered", "arp", "vxlan"]));
    assert_eq!(addresses.len(), 1);
    // Without the tag, or with another, nothing is ours.
    let before = daemon.ctl(&["stats"]).unwrap()["ports"][0]["rx_packets"].clone();
    scapy(
        &other,
        10,
        "mac = get_if_hwaddr('wire')
s = conf.L2socket(iface='wire')
vxlan = IP(src='203.0.113.2', dst='203.0.113.1') / UDP(sport=5, dport=4789) / Raw(bytes([8,0,0,0,0,0,7,0]) + bytes(60))
for tag in (Ether(src=mac, dst='ff:ff:ff:ff:ff:ff'), Ether(src=mac, dst='ff:ff:ff:ff:ff:ff') / Dot1Q(vlan=99)):
    for i in range(5): s.send(tag / vxlan)
print(1)",
    );
    assert_eq!(daemon.ctl(&["stats"]).unwrap()["ports"][0]["rx_packets"], before);
    assert_balanced(&daemon);
}

#[test]
fn two_receivers_join_and_leave() {
    let Some(mut bench) = bench("igmp") else { return };
    let lab = &mut bench.lab;
    let (daemon, _other) = node(lab, LANS);
    let pods = ["sender", "one", "two", "three"].map(|name| lab.namespace(name).unwrap());
    for pod in &pods {
        plug(&daemon, pod, "eth0", json!({"network": "red"}));
        pod.ip("route add 239.0.0.0/8 dev eth0").unwrap();
    }
    let receive = "import socket, struct, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(('', 5000))
time.sleep(float(sys.argv[1]))
own = sys.argv[2]
m = struct.pack('4s4s', socket.inet_aton('239.1.2.3'), socket.inet_aton(own))
s.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, m)
s.settimeout(0.2)
n, end = 0, time.time() + float(sys.argv[3])
while time.time() < end:
    try: s.recv(99); n += 1
    except TimeoutError: pass
s.setsockopt(socket.IPPROTO_IP, socket.IP_DROP_MEMBERSHIP, m)
print(n)
time.sleep(1)";
    let members = || daemon.ctl(&["group", "list"]).unwrap()["groups"].as_array().map_or(0, Vec::len);
    let run = |pod: usize, own: &str, seconds: &str| {
        let (pod, own, seconds) = (pods[pod].clone(), own.to_owned(), seconds.to_owned());
        std::thread::spawn(move || {
            let printed = pod.run(20, &["/usr/bin/python3", "-c", receive, "0", &own, &seconds]).unwrap();
            printed.trim().parse::<u64>().unwrap()
        })
    };
    let address = |pod: &Namespace| {
        let text = pod.run(5, &["ip", "-4", "-o", "addr", "show", "eth0"]).unwrap();
        text.split_whitespace().nth(3).unwrap().split('/').next().unwrap().to_owned()
    };
    let addresses: Vec<String> = pods.iter().map(address).collect();
    let receivers = [run(1, &addresses[1], "4"), run(2, &addresses[2], "4")];
    lab::wait_for(5, || members() == 2).unwrap_or_else(|_| {
        panic!("{} {}", daemon.run_ctl(&["group", "list"]).unwrap(), daemon.run_ctl(&["drops"]).unwrap())
    });
    let listed = daemon.run_ctl(&["group", "list"]).unwrap();
    assert!(listed.contains("239.1.2.3"), "{listed}");
    let before = daemon.ctl(&["stats"]).unwrap();
    let send = "import socket, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 4)
for i in range(100):
    s.sendto(b'x', ('239.1.2.3', 5000)); time.sleep(0.005)";
    pods[0].run(10, &["/usr/bin/python3", "-c", send]).unwrap();
    let after = daemon.ctl(&["stats"]).unwrap();
    let got: Vec<u64> = receivers.into_iter().map(|receiver| receiver.join().unwrap()).collect();
    assert_eq!(got, [100, 100]);
    // The third pod's link saw none of it.
    let sent = |stats: &Value| -> Vec<u64> {
        stats["ports"].as_array().unwrap().iter().filter_map(|port| port["tx_packets"].as_u64()).collect()
    };
    let difference: Vec<u64> = sent(&after).iter().zip(sent(&before)).map(|(after, before)| after - before).collect();
    let quiet = difference.last().unwrap();
    assert!(*quiet < 20, "the third receiver never joined, and got {quiet}: {difference:?}");
    // Both have left; nobody gets anything.
    lab::wait_for(5, || members() == 0).unwrap();
    pods[0].run(10, &["/usr/bin/python3", "-c", send]).unwrap();
    assert!(dropped(&daemon, "no-member") >= 100);
    assert_balanced(&daemon);
}

#[test]
fn tcpdump_sees_a_mirror() {
    let Some(mut bench) = bench("mirror") else { return };
    let lab = &mut bench.lab;
    let (daemon, _other) = node(lab, LANS);
    let (one, _) = add_pod_to(lab, &daemon, "one", "pods");
    let (two, two_ip) = add_pod_to(lab, &daemon, "two", "pods");
    let (probe, _) = add_pod_to(lab, &daemon, "probe", "blue");
    let link_of = |pod: &Namespace| {
        let ports = daemon.ctl(&["port", "list"]).unwrap();
        let found =
            ports["ports"].as_array().unwrap().iter().find(|port| port["netns"] == pod.path().as_str()).cloned();
        found.unwrap()["link"].as_str().unwrap().to_owned()
    };
    let (seen, spy) = (link_of(&one), link_of(&probe));
    daemon.run_ctl(&["mirror", "add", "watch", "--port", &seen, "--to-port", &spy]).unwrap();
    let shown = daemon.run_ctl(&["mirror", "list"]).unwrap();
    assert!(shown.contains("watch") && shown.contains("both"), "{shown}");
    let file = lab.directory().join("mirror.txt");
    let capture = format!("exec tcpdump -n -l -v -i eth0 icmp or tcp > {} 2>/dev/null", file.display());
    lab.spawn(&probe, &["sh", "-c", &capture]).unwrap();
    crate::serve_iperf3(lab, &two);
    let text = || std::fs::read_to_string(&file).unwrap_or_default();
    lab::wait_for(10, || {
        one.pings(&two_ip, 3, 2);
        let text = text();
        text.contains("echo request") && text.contains("echo reply")
    })
    .unwrap();
    let rate = one.iperf3(&two_ip, 1, &[]).unwrap();
    println!("mirrored TCP: {:.2} Gbit/s", rate / 1e9);
    lab::wait_for(5, || text().contains("Flags [S]")).unwrap();
    // Checksums were completed for the copy.
    let syn: String = text().lines().skip_while(|line| !line.contains("Flags [S]")).take(1).collect();
    assert!(syn.contains("(correct)"), "{syn}");
    daemon.run_ctl(&["mirror", "del", "watch"]).unwrap();
    assert_balanced(&daemon);
}

fn add_pod_to(lab: &mut Lab, daemon: &Daemon, name: &str, network: &str) -> (Namespace, String) {
    let pod = lab.namespace(name).unwrap();
    let result = plug(daemon, &pod, "eth0", json!({"network": network}));
    let address = result["ips"][0]["address"].as_str().unwrap().split('/').next().unwrap().to_owned();
    (pod, address)
}

/// As Multus calls: twice for one pod, with another interface name, the second without the default route.
#[test]
fn a_pod_has_a_routed_and_a_bridged_interface() {
    let Some(mut bench) = bench("multus") else { return };
    let lab = &mut bench.lab;
    let (daemon, _other) = node(lab, LANS);
    let pods = ["one", "two"].map(|name| lab.namespace(name).unwrap());
    let mut bridged = Vec::new();
    for pod in &pods {
        let first = plug(&daemon, pod, "eth0", json!({"network": "pods"}));
        let second =
            plug(&daemon, pod, "net1", json!({"network": "red", "isDefaultGateway": false, "macspoofchk": true}));
        // What Multus makes a network status of: the interface in the pod, its MAC, its addresses.
        for (result, ifname) in [(&first, "eth0"), (&second, "net1")] {
            let at = result["ips"][0]["interface"].as_u64().unwrap() as usize;
            let interface = &result["interfaces"][at];
            assert_eq!((&interface["name"], &interface["sandbox"]), (&json!(ifname), &json!(pod.path())));
            let link = pod.run(5, &["ip", "-o", "link", "show", ifname]).unwrap();
            assert!(link.contains(interface["mac"].as_str().unwrap()), "{link}");
        }
        let default = pod.run(5, &["ip", "-4", "route", "show", "default"]).unwrap();
        assert!(default.lines().count() == 1 && default.contains("dev eth0"), "{default}");
        bridged.push(second["ips"][0]["address"].as_str().unwrap().split('/').next().unwrap().to_owned());
    }
    pods[0].await_ping(&bridged[1]).unwrap();
    assert!(pods[0].pings(&bridged[1], 10, 3) && pods[0].pings("10.244.1.3", 10, 3));
    let ports = daemon.ctl(&["port", "list"]).unwrap();
    assert_eq!(ports["ports"].as_array().unwrap().len(), 4);
    // A second routed interface, too, as long as it leaves the default route alone.
    let third = plug(&daemon, &pods[0], "net2", json!({"network": "blue", "isDefaultGateway": false}));
    assert_eq!(third["ips"].as_array().unwrap().len(), 1);
    for (key, words) in [("promiscMode", "mirror"), ("enabledad", "duplicates"), ("disableContainerInterface", "down")]
    {
        let mut netconf = daemon.netconf(&conflist());
        netconf[key] = json!(true);
        let path = pods[0].path();
        let environment = [("CNI_CONTAINERID", "x"), ("CNI_NETNS", path.as_str()), ("CNI_IFNAME", "net9")];
        let refused = daemon.cni("ADD", &environment, &netconf).unwrap();
        assert!(!refused.is_ok && refused.json["msg"].as_str().unwrap().contains(words), "{}", refused.json);
    }
    assert_balanced(&daemon);
}
