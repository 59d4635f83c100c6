//! Routing daemons from Debian: BIRD on one node, FRR on the other, and no peer in any configuration of ours.

use std::fs;
use std::os::unix::fs::chown;

use xtask::lab::{self, Daemon, Lab, Namespace};

use crate::{add_pod, assert_balanced, bench};

/// A daemon of FRR, ended with the laboratory.
pub(crate) fn frr(lab: &mut Lab, node: &Namespace, daemons: &[&str], config: &str) {
    // FRR's daemons find each other by a directory of their own, and give up root.
    let name = node.name.clone();
    let runtime = format!("/var/run/frr/{name}");
    fs::create_dir_all(&runtime).unwrap();
    let (uid, gid) = frr_user();
    chown(&runtime, Some(uid), Some(gid)).unwrap();
    let file = lab.file(&format!("{name}-frr.conf"), config).unwrap();
    for daemon in daemons {
        let (pid, program) = (format!("{runtime}/{daemon}.pid"), format!("/usr/lib/frr/{daemon}"));
        let options = ["-N", &name, "-f", &file, "-i", &pid, "-A", "127.0.0.1", "--log", "stdout"];
        lab.spawn(node, &[&[program.as_str()], &options[..]].concat()).unwrap();
    }
}

fn frr_user() -> (u32, u32) {
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    let line = passwd.lines().find(|line| line.starts_with("frr:")).unwrap();
    let fields: Vec<&str> = line.split(':').collect();
    (fields[2].parse().unwrap(), fields[3].parse().unwrap())
}

fn config(node: u8) -> String {
    format!(
        r#"
[uplink]
link = "wire"
[host]
network = "pods"
[routes]
import = "kernel"
[[network]]
name = "pods"
vni = 1
subnets = ["10.244.0.0/16", "fd00:10:244::/48"]
ranges = ["10.244.{node}.0/24", "fd00:10:244:{node}::/64"]
"#
    )
}

#[test]
fn bird_and_frr_make_pods_meet() {
    let Some(mut bench) = bench("bgp") else { return };
    let lab = &mut bench.lab;
    let nodes = [lab.namespace("node1").unwrap(), lab.namespace("node2").unwrap()];
    let addresses = [["192.0.2.1/24", "2001:db8::1/64"], ["192.0.2.2/24", "2001:db8::2/64"]];
    lab.wire([(&nodes[0], "wire", &addresses[0]), (&nodes[1], "wire", &addresses[1])], 1500).unwrap();
    let daemons: Vec<Daemon> =
        (0..2).map(|at| lab.daemon(&nodes[at], &format!("node{}", at + 1), &config(at as u8 + 1)).unwrap()).collect();
    let (near, near_ips) = add_pod(lab, &daemons[0], "near");
    let (far, far_ips) = add_pod(lab, &daemons[1], "far");
    assert!(!near.pings(&far_ips[0], 1, 1), "nobody has told anybody yet");
    let bird = lab
        .file(
            "bird.conf",
            "router id 192.0.2.1;
protocol device {}
protocol kernel { learn; ipv4 { import where krt_source = 118; export where source = RTS_BGP; }; }
protocol kernel kernel6 { learn; ipv6 { import where krt_source = 118; export where source = RTS_BGP; }; }
protocol bgp frr { local 192.0.2.1 as 65001; neighbor 192.0.2.2 as 65002; connect delay time 1; connect retry time 2; ipv4 { import all; export all; }; }
protocol bgp frr6 { local 2001:db8::1 as 65001; neighbor 2001:db8::2 as 65002; connect delay time 1; connect retry time 2; ipv6 { import all; export all; }; }
",
        )
        .unwrap();
    let control = lab.directory().join("bird.ctl").to_string_lossy().into_owned();
    lab.spawn(&nodes[0], &["bird", "-f", "-c", &bird, "-s", &control]).unwrap();
    frr(
        lab,
        &nodes[1],
        &["zebra", "bgpd"],
        "hostname node2
router bgp 65002
 bgp router-id 192.0.2.2
 no bgp ebgp-requires-policy
 neighbor 192.0.2.1 remote-as 65001
 neighbor 2001:db8::1 remote-as 65001
 neighbor 192.0.2.1 advertisement-interval 0
 neighbor 2001:db8::1 advertisement-interval 0
 address-family ipv4 unicast
  redistribute kernel
 exit-address-family
 address-family ipv6 unicast
  neighbor 2001:db8::1 activate
  redistribute kernel
 exit-address-family
",
    );
    for family in [0, 1] {
        lab::wait_for(60, || near.pings(&far_ips[family], 1, 1)).unwrap();
        assert!(near.pings(&far_ips[family], 20, 5) && far.pings(&near_ips[family], 20, 5));
    }
    // FRR takes the link-local next hop that IPv6 neighbors tell each other; the switch finds its link.
    println!("{}", daemons[1].run_ctl(&["peer", "list"]).unwrap());
    for (at, daemon) in daemons.iter().enumerate() {
        let routes = daemon.run_ctl(&["route", "list"]).unwrap();
        let prefix = format!("10.244.{}.0/24", 2 - at);
        let line = routes.lines().find(|line| line.contains(&prefix)).unwrap_or_default();
        assert!(line.contains(&format!("peer kernel-192.0.2.{}", 2 - at)) && line.contains("kernel"), "{routes}");
        let peers = daemon.run_ctl(&["peer", "list"]).unwrap();
        assert!(peers.contains("direct") && peers.contains("reachable"), "{peers}");
    }
    // Without VXLAN the whole wire is the pods'.
    crate::serve_iperf3(lab, &far);
    let rate = near.iperf3(&far_ips[0], 2, &[]).unwrap();
    println!("pod to pod, routed by BGP: {:.2} Gbit/s", rate / 1e9);
    assert!(rate > 1e8);
    // The hosts reach the pods of the other node too, by the same routes.
    assert!(nodes[0].pings(&far_ips[0], 5, 3) && nodes[1].pings(&near_ips[0], 5, 3));
    // What the routing daemon takes back is taken back here.
    for session in ["frr", "frr6"] {
        nodes[0].run(5, &["birdc", "-s", &control, "disable", session]).unwrap();
    }
    lab::wait_for(30, || !daemons[0].run_ctl(&["route", "list"]).unwrap().contains("10.244.2.0/24")).unwrap();
    lab::wait_for(30, || !daemons[1].run_ctl(&["peer", "list"]).unwrap().contains("kernel-")).unwrap();
    daemons.iter().for_each(assert_balanced);
}

/// IPv4 routes go with a link that goes down, and the kernel tells nobody.
#[test]
fn routes_that_the_kernel_drops_silently_are_dropped_here() {
    let Some(mut bench) = bench("silent") else { return };
    let lab = &mut bench.lab;
    let (node, other) = (lab.namespace("node").unwrap(), lab.namespace("other").unwrap());
    lab.wire([(&node, "wire", &["192.0.2.1/24"]), (&other, "wire", &["192.0.2.2/24"])], 1500).unwrap();
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
subnets = ["10.244.0.0/16"]
ranges = ["10.244.1.0/24"]
"#;
    let daemon = lab.daemon(&node, "node", config).unwrap();
    let imported = || {
        let routes = daemon.ctl(&["route", "list"]).unwrap();
        routes["routes"].as_array().unwrap().iter().filter(|route| route["is_imported"] == true).count()
    };
    let flap = "ip link set wire down; ip link set wire up";
    for lose in [flap, "ip addr flush dev wire"] {
        let add = (2..100).map(|number| format!("ip route add 10.244.{number}.0/24 via 192.0.2.2 proto bird\n"));
        node.run(20, &["sh", "-c", &add.collect::<String>()]).unwrap();
        lab::wait_for(5, || imported() == 98).unwrap();
        node.run(5, &["sh", "-c", lose]).unwrap();
        let kept = node.run(5, &["ip", "route", "show", "proto", "bird"]).unwrap().lines().count();
        assert_eq!(kept, 0, "the kernel drops them");
        lab::wait_for(5, || imported() == kept).unwrap_or_else(|_| panic!("{lose}: {} are left", imported()));
    }
}
