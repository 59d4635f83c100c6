//! EVPN (RFC 7432, RFC 8365): FRR speaks it, with the kernel's bridge and vxlan device as the face it knows, and the
//! switch carries the packets.

use serde_json::{Value, json};
use xtask::lab::{self, Daemon, Lab, Namespace};

use crate::bgp::frr;
use crate::{assert_balanced, bench, conflist};

const CONFIG: &str = r#"
[uplink]
link = "wire"
[[network]]
name = "lan"
vni = 100
mode = "bridged"
subnets = ["10.9.0.0/16"]
follow = "vx100"
"#;

fn speak(lab: &mut Lab, node: &Namespace, number: u8) {
    let other = 3 - number;
    node.ip("link add br100 type bridge").unwrap();
    node.ip(&format!("link add vx100 type vxlan id 100 local 192.0.2.{number} dstport 4789 nolearning")).unwrap();
    node.ip("link set vx100 master br100 up").unwrap();
    node.ip("link set br100 up").unwrap();
    let config = format!(
        "hostname node{number}
router bgp 6500{number}
 bgp router-id 192.0.2.{number}
 no bgp ebgp-requires-policy
 neighbor 192.0.2.{other} remote-as 6500{other}
 address-family l2vpn evpn
  neighbor 192.0.2.{other} activate
  advertise-all-vni
 exit-address-family
"
    );
    frr(lab, node, &["zebra", "bgpd"], &config);
}

/// Plugs a pod in with a MAC and an address of its own.
fn plug(daemon: &Daemon, pod: &Namespace, number: u8) {
    let mut netconf = daemon.netconf(&conflist());
    netconf["network"] = json!("lan");
    netconf["mac"] = json!(format!("02:00:00:00:09:{number:02x}"));
    netconf["ips"] = json!([format!("10.9.0.{number}")]);
    let path = pod.path();
    let environment = [("CNI_CONTAINERID", pod.name.as_str()), ("CNI_NETNS", path.as_str()), ("CNI_IFNAME", "eth0")];
    let added = daemon.cni("ADD", &environment, &netconf).unwrap();
    assert!(added.is_ok, "{}", added.json);
}

/// Where a switch has the station.
fn place(daemon: &Daemon, number: u8) -> Value {
    let mac = format!("02:00:00:00:09:{number:02x}");
    let list = daemon.ctl(&["fdb", "list"]).unwrap();
    let found = list["stations"].as_array().unwrap().iter().find(|station| station["mac"] == mac.as_str()).cloned();
    found.map_or(Value::Null, |station| station["at"].clone())
}

#[test]
fn frr_tells_of_stations_floods_and_moves() {
    let Some(mut bench) = bench("evpn") else { return };
    let lab = &mut bench.lab;
    let nodes = [lab.namespace("node1").unwrap(), lab.namespace("node2").unwrap()];
    lab.wire([(&nodes[0], "wire", &["192.0.2.1/24"]), (&nodes[1], "wire", &["192.0.2.2/24"])], 1500).unwrap();
    let daemons: Vec<Daemon> =
        (0..2).map(|at| lab.daemon(&nodes[at], &format!("node{}", at + 1), CONFIG).unwrap()).collect();
    for (at, node) in nodes.iter().enumerate() {
        speak(lab, node, at as u8 + 1);
    }
    let pods: Vec<Namespace> = ["one", "two", "mover"].iter().map(|name| lab.namespace(name).unwrap()).collect();
    plug(&daemons[0], &pods[0], 1);
    plug(&daemons[1], &pods[1], 2);
    plug(&daemons[0], &pods[2], 3);
    // Type 2: each node knows the other's stations before a packet was sent. Type 3: and whom to flood to.
    let remote = |vtep: u8| json!({"peer": format!("kernel-192.0.2.{vtep}")});
    lab::wait_for(90, || place(&daemons[0], 2) == remote(2) && place(&daemons[1], 1) == remote(1)).unwrap_or_else(
        |_| {
            let shown =
                nodes[0].run(5, &["vtysh", "-N", &nodes[0].name, "-c", "show bgp l2vpn evpn"]).unwrap_or_default();
            panic!("{shown}\n{}", daemons[0].run_ctl(&["fdb", "list"]).unwrap());
        },
    );
    assert!(pods[0].pings("10.9.0.2", 20, 5), "ARP by the flood set, then by the stations");
    assert!(pods[1].pings("10.9.0.3", 20, 5));
    let shown = nodes[1].run(5, &["vtysh", "-N", &nodes[1].name, "-c", "show bgp l2vpn evpn"]).unwrap();
    assert!(
        shown.contains("[2]:[0]:[48]:[02:00:00:00:09:01]") && shown.contains("[3]:[0]:[32]:[192.0.2.1]"),
        "{shown}"
    );
    // Addresses travel with type 2 as well: ARP for a station elsewhere is answered here.
    assert!(shown.contains("[2]:[0]:[48]:[02:00:00:00:09:01]:[32]:[10.9.0.1]"), "{shown}");
    let floods = || daemons[1].ctl(&["stats"]).unwrap()["copies"].as_u64().unwrap_or(0);
    pods[1].ip("neigh flush dev eth0").unwrap();
    let before = floods();
    assert!(pods[1].pings("10.9.0.1", 3, 2));
    assert_eq!(floods(), before, "nobody else was asked");
    // The mover goes from the first node to the second, with its MAC and address.
    let path = pods[2].path();
    let environment =
        [("CNI_CONTAINERID", pods[2].name.as_str()), ("CNI_NETNS", path.as_str()), ("CNI_IFNAME", "eth0")];
    assert!(daemons[0].cni("DEL", &environment, &daemons[0].netconf(&conflist())).unwrap().is_ok);
    plug(&daemons[1], &pods[2], 3);
    lab::wait_for(60, || place(&daemons[0], 3) == remote(2)).unwrap();
    assert!(pods[0].pings("10.9.0.3", 20, 5), "after the move");
    // Routes and the bridge's ports of ours go with the daemons.
    daemons.iter().for_each(assert_balanced);
    for (mut daemon, node) in daemons.into_iter().zip(&nodes) {
        assert!(daemon.stop());
        assert!(!node.run(5, &["ip", "link"]).unwrap().contains("vsw-evpn"));
    }
}

/// One network's bridge that takes nothing keeps no other network from following the wire.
#[test]
fn a_bridge_that_refuses_is_told_of_alone() {
    let Some(mut bench) = bench("brdown") else { return };
    let lab = &mut bench.lab;
    let node = lab.namespace("node").unwrap();
    lab.wire([(&node, "wire", &["192.0.2.1/24"]), (&node, "other", &[])], 1500).unwrap();
    node.ip("link add br100 type bridge").unwrap();
    node.ip("link add vx100 type vxlan id 100 local 192.0.2.1 dstport 4790 nolearning").unwrap();
    node.ip("link set vx100 master br100 up").unwrap();
    let config = r#"
[uplink]
link = "wire"
[[network]]
name = "pods"
vni = 1
ranges = ["10.244.1.0/24"]
[[network]]
name = "lan"
vni = 100
mode = "bridged"
subnets = ["10.20.0.0/24"]
ranges = ["10.20.0.0/24"]
follow = "vx100"
"#;
    let mut daemon = lab.daemon(&node, "node", config).unwrap();
    let plug = |lab: &mut Lab, daemon: &Daemon, name: &str, network: &str| {
        let pod = lab.namespace(name).unwrap();
        daemon.run_ctl(&["port", "add", "--netns", &pod.path(), "--network", network]).unwrap();
        pod
    };
    plug(lab, &daemon, "station", "lan");
    let log = lab.directory().join("node.log");
    let refusals = || std::fs::read_to_string(&log).unwrap().matches("is not told of the stations here").count();
    lab::wait_for(10, || refusals() > 0).expect("a bridge that is down refuses");
    let pod = plug(lab, &daemon, "pod", "pods");
    let mtu = |of: &str| pod.run(5, &["ip", "route", "show", "default"]).unwrap().contains(&format!("mtu {of}"));
    assert!(mtu("1450"));
    node.ip("link set wire mtu 1400").unwrap();
    lab::wait_for(10, || mtu("1350")).unwrap();
    assert_eq!(refusals(), 1, "said once");
    node.ip("link set br100 up").unwrap();
    let is_told = || node.run(5, &["bridge", "fdb", "show", "br", "br100"]).unwrap().contains("dev vsw-evpn");
    lab::wait_for(10, is_told).unwrap();
    // After a crash, a daemon that does not follow the device takes back what the last one told its bridge.
    daemon.kill();
    let rest = config.replace("follow = \"vx100\"", "");
    let _daemon = lab.daemon(&node, "node", &rest).unwrap();
    assert!(!node.run(5, &["ip", "link"]).unwrap().contains("vsw-evpn"));
    assert!(!node.run(5, &["ip", "neigh", "show", "dev", "br100"]).unwrap().contains("10.20.0"));
}
