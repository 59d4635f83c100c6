//! TCP from pod to pod on one node, beside Open vSwitch's AF_XDP ports, in one run.

use xtask::lab::Lab;
use xtask::ovs::Ovs;

use crate::{ALONE, bench, node_with_pods, serve_iperf3};

const SECONDS: u32 = 4;

#[test]
fn at_least_three_times_open_vswitch() {
    let Some(mut bench) = bench("ovs") else { return };
    let ours = {
        let (daemon, pods) = node_with_pods(&mut bench, ALONE, 2);
        serve_iperf3(&mut bench.lab, &pods[1].0);
        let rate = pods[0].0.iperf3(&pods[1].1[0], SECONDS, &[]).unwrap();
        drop(daemon);
        rate
    };
    println!("vswitch: {:.2} Gbit/s", ours / 1e9);
    if let Some(reason) = Ovs::missing() {
        println!("skipped: {reason}, no ratio");
        return;
    }
    let theirs = open_vswitch(&mut bench.lab).unwrap();
    println!("Open vSwitch, afxdp ports: {:.2} Gbit/s; ratio {:.1}", theirs / 1e9, ours / theirs);
    assert!(ours > 3.0 * theirs, "{ours} to {theirs} bit/s");
}

/// Two pods on a bridge of the userspace datapath with `afxdp` ports; bits a second.
fn open_vswitch(lab: &mut Lab) -> anyhow::Result<f64> {
    let node = lab.namespace("ovs")?;
    let pods = [lab.namespace("ovs0")?, lab.namespace("ovs1")?];
    for (number, pod) in pods.iter().enumerate() {
        node.ip(&format!("link add o{number} type veth peer name eth0 netns {}", pod.name))?;
        node.ip(&format!("link set o{number} up"))?;
        pod.ip("link set eth0 up")?;
        pod.ip(&format!("addr add 10.8.0.{}/24 dev eth0", number + 1))?;
        // Its documentation: checksum offload on a veth is not understood.
        pod.run(5, &["ethtool", "-K", "eth0", "tx", "off"])?;
    }
    let ovs = Ovs::start(lab, &node, "0x2")?;
    ovs.add_bridge("br0")?;
    for number in 0..2 {
        ovs.add_port("br0", &format!("o{number}"))?;
    }
    pods[0].await_ping("10.8.0.2")?;
    serve_iperf3(lab, &pods[1]);
    pods[0].iperf3("10.8.0.2", SECONDS, &[])
}
