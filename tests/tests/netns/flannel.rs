//! A node configured exactly as flanneld's vxlan backend leaves one, beside ours.

use std::fs;

use xtask::lab;

use crate::{add_pod, assert_balanced, bench, serve_iperf3};

/// flannel.1's MAC on the kernel's node, as its annotation would tell.
const THEIR_MAC: &str = "0a:58:00:00:00:02";

#[test]
fn a_node_of_flannel_and_ours_exchange_tcp() {
    let Some(mut bench) = bench("flannel") else { return };
    let lab = &mut bench.lab;
    let (ours, theirs) = (lab.namespace("ours").unwrap(), lab.namespace("theirs").unwrap());
    lab.wire([(&ours, "wire", &["192.0.2.1/24"]), (&theirs, "wire", &["192.0.2.2/24"])], 1500).unwrap();
    let env = lab.directory().join("flannel/subnet.env");
    let config = format!(
        r#"
[uplink]
link = "wire"
udp_port = 8472
[host]
network = "pods"
subnet_env = "{}"
[[network]]
name = "pods"
vni = 1
subnets = ["10.244.0.0/16"]
ranges = ["10.244.1.0/24"]
[[peer]]
name = "theirs"
vtep = "192.0.2.2"
router_mac = "{THEIR_MAC}"
[[route]]
network = "pods"
prefix = "10.244.2.0/24"
peer = "theirs"
"#,
        env.display()
    );
    let daemon = lab.daemon(&ours, "ours", &config).unwrap();
    let text = fs::read_to_string(&env).unwrap();
    assert_eq!(
        text,
        "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
    );
    let (pod, addresses) = add_pod(lab, &daemon, "pod");
    // Our router MAC is what flanneld would read from our node's annotation (backend-data, VtepMAC).
    let ours_mac = "02:76:73:77:00:01";
    for command in [
        "link add flannel.1 type vxlan id 1 dev wire local 192.0.2.2 dstport 8472 nolearning".to_owned(),
        format!("link set flannel.1 address {THEIR_MAC} mtu 1450 up"),
        "addr add 10.244.2.0/32 dev flannel.1".to_owned(),
        format!("neigh add 10.244.1.0 lladdr {ours_mac} dev flannel.1 nud permanent"),
        "route add 10.244.1.0/24 via 10.244.1.0 dev flannel.1 onlink".to_owned(),
        "link add cni0 type bridge".to_owned(),
        "addr add 10.244.2.1/24 dev cni0".to_owned(),
        "link set cni0 mtu 1450 up".to_owned(),
    ] {
        theirs.ip(&command).unwrap();
    }
    theirs.run(5, &["bridge", "fdb", "append", ours_mac, "dev", "flannel.1", "dst", "192.0.2.1"]).unwrap();
    theirs.run(5, &["sysctl", "-qw", "net.ipv4.ip_forward=1"]).unwrap();
    let far = lab.namespace("far").unwrap();
    theirs.ip(&format!("link add veth0 mtu 1450 type veth peer name eth0 mtu 1450 netns {}", far.name)).unwrap();
    theirs.ip("link set veth0 master cni0 up").unwrap();
    far.ip("addr add 10.244.2.7/24 dev eth0").unwrap();
    far.ip("link set eth0 up").unwrap();
    far.ip("route add default via 10.244.2.1").unwrap();
    lab::wait_for(10, || daemon.ctl(&["status"]).unwrap()["peers_reachable"] == 1).unwrap();
    pod.await_ping("10.244.2.7").unwrap();
    assert!(pod.pings("10.244.2.7", 20, 5) && far.pings(&addresses[0], 20, 5));
    // Node to pod, as kubelets and API servers do, both ways.
    assert!(theirs.pings(&addresses[0], 5, 3) && ours.pings("10.244.2.7", 5, 3));
    serve_iperf3(lab, &pod);
    serve_iperf3(lab, &far);
    for (from, to) in [(&pod, "10.244.2.7"), (&far, addresses[0].as_str())] {
        let rate = from.iperf3(to, 2, &[]).unwrap();
        println!("{} to {to}: {:.2} Gbit/s", from.name, rate / 1e9);
        assert!(rate > 1e8);
    }
    assert_balanced(&daemon);
}
