//! A node configured exactly as flanneld's vxlan backend leaves one, beside two of ours that have moved.

use std::fs;

use xtask::lab::{self, Daemon, Namespace};

use crate::{add_pod, assert_balanced, bench, is_listening, serve_iperf3};

/// flannel.1's MAC on the kernel's node, as its annotation would tell.
const THEIR_MAC: &str = "0a:58:00:00:00:02";

/// Our routers' MACs, as flanneld would read them from our nodes' annotations (backend-data, VtepMAC). Its forwarding
/// table tells nodes apart by them.
fn own_mac(node: u8) -> String {
    format!("02:00:00:00:00:0{node}")
}

fn config(own: u8, env: &str) -> String {
    let mut config = format!(
        r#"
[uplink]
link = "wire"
udp_port = 8472
router_mac = "{}"
[host]
network = "pods"
subnet_env = "{env}"
[[network]]
name = "pods"
vni = 1
subnets = ["10.244.0.0/16"]
ranges = ["10.244.{own}.0/24"]
"#,
        own_mac(own)
    );
    for other in (1..=3).filter(|&other| other != own) {
        let mac = if other == 2 { THEIR_MAC.to_owned() } else { own_mac(other) };
        config += &format!(
            "[[peer]]\nname = \"node{other}\"\nvtep = \"192.0.2.{other}\"\nrouter_mac = \"{mac}\"\n[[route]]\nnetwork = \"pods\"\nprefix = \"10.244.{other}.0/24\"\npeer = \"node{other}\"\n"
        );
    }
    config
}

/// What flanneld and the bridge plugin leave on node 2, with a pod at 10.244.2.7.
fn leave_flannel(theirs: &Namespace, far: &Namespace) {
    theirs.ip("link add flannel.1 type vxlan id 1 dev wire local 192.0.2.2 dstport 8472 nolearning").unwrap();
    theirs.ip(&format!("link set flannel.1 address {THEIR_MAC} mtu 1450 up")).unwrap();
    theirs.ip("addr add 10.244.2.0/32 dev flannel.1").unwrap();
    for other in [1, 3] {
        let (mac, vtep) = (own_mac(other), format!("192.0.2.{other}"));
        theirs.ip(&format!("neigh replace 10.244.{other}.0 lladdr {mac} dev flannel.1 nud permanent")).unwrap();
        theirs.ip(&format!("route replace 10.244.{other}.0/24 via 10.244.{other}.0 dev flannel.1 onlink")).unwrap();
        let entry = ["bridge", "fdb", "replace", &mac, "dev", "flannel.1", "dst", &vtep, "self", "permanent"];
        theirs.run(5, &entry).unwrap();
    }
    for command in ["link add cni0 type bridge", "addr add 10.244.2.1/24 dev cni0", "link set cni0 mtu 1450 up"] {
        theirs.ip(command).unwrap();
    }
    theirs.run(5, &["sysctl", "-qw", "net.ipv4.ip_forward=1"]).unwrap();
    theirs.ip(&format!("link add veth0 mtu 1450 type veth peer name eth0 mtu 1450 netns {}", far.name)).unwrap();
    theirs.ip("link set veth0 master cni0 up").unwrap();
    far.ip("addr add 10.244.2.7/24 dev eth0").unwrap();
    far.ip("link set eth0 up").unwrap();
    far.ip("route add default via 10.244.2.1").unwrap();
}

#[test]
fn a_node_of_flannel_and_two_of_ours_exchange_tcp() {
    let Some(mut bench) = bench("flannel") else { return };
    let lab = &mut bench.lab;
    let [one, theirs, three, lan, far] =
        ["one", "theirs", "three", "lan", "far"].map(|name| lab.namespace(name).unwrap());
    lan.ip("link add br0 type bridge").unwrap();
    lan.ip("link set br0 up").unwrap();
    for (number, node) in [(1, &one), (2, &theirs), (3, &three)] {
        let port = format!("p{number}");
        lab.wire([(node, "wire", &[&format!("192.0.2.{number}/24")]), (&lan, &port, &[])], 1500).unwrap();
        lan.ip(&format!("link set {port} master br0")).unwrap();
    }
    let env = lab.directory().join("flannel/subnet.env");
    leave_flannel(&theirs, &far);
    let daemons: Vec<Daemon> = [(1, &one), (3, &three)]
        .map(|(own, node)| {
            let env = if own == 1 { env.clone() } else { lab.directory().join("flannel/three.env") };
            lab.daemon(node, &format!("node{own}"), &config(own, &env.display().to_string())).unwrap()
        })
        .into();
    assert_eq!(
        fs::read_to_string(&env).unwrap(),
        "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
    );
    let (pod, addresses) = add_pod(lab, &daemons[0], "pod");
    let (third, third_addresses) = add_pod(lab, &daemons[1], "third");
    for daemon in &daemons {
        lab::wait_for(10, || daemon.ctl(&["status"]).unwrap()["peers_reachable"] == 2).unwrap();
    }
    let (own, third_own) = (addresses[0].as_str(), third_addresses[0].as_str());
    for (from, to) in [(&pod, "10.244.2.7"), (&far, own), (&far, third_own), (&third, "10.244.2.7"), (&pod, third_own)]
    {
        from.await_ping(to).unwrap();
        assert!(from.pings(to, 20, 5), "{} to {to}", from.name);
    }
    // Node to pod, as kubelets and API servers do, both ways.
    assert!(theirs.pings(own, 5, 3) && one.pings("10.244.2.7", 5, 3));
    // A port of the node, at its address among the pods', from pods of all nodes.
    let web = lab.namespace("web").unwrap();
    daemons[0].run_ctl(&["port", "add", "--netns", &web.path(), "--publish", "8080:80"]).unwrap();
    lab.spawn(&web, &["/usr/bin/python3", "-m", "http.server", "80"]).unwrap();
    assert!(is_listening(&web, 80));
    for from in [&pod, &far, &third] {
        let program = "import urllib.request as r; print(r.urlopen('http://10.244.1.1:8080/', timeout=3).status)";
        assert_eq!(from.run(5, &["/usr/bin/python3", "-c", program]).unwrap().trim(), "200", "{}", from.name);
    }
    serve_iperf3(lab, &pod);
    serve_iperf3(lab, &far);
    for (from, to) in [(&pod, "10.244.2.7"), (&far, own)] {
        let rate = from.iperf3(to, 2, &[]).unwrap();
        println!("{} to {to}: {:.2} Gbit/s", from.name, rate / 1e9);
        assert!(rate > 1e8);
    }
    daemons.iter().for_each(assert_balanced);
}
