//! TCP from pod to pod on one node, beside Open vSwitch's AF_XDP ports, in one run.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use xtask::lab::{self, Lab, Namespace};

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
    if !Path::new("/usr/lib/openvswitch-switch/ovs-vswitchd").exists() {
        println!("skipped: openvswitch-switch is not installed, no ratio");
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
    let ovs = Ovs::start(lab, &node)?;
    ovs.vsctl(&node, &["add-br", "br0", "--", "set", "bridge", "br0", "datapath_type=netdev"])?;
    for number in 0..2 {
        let port = format!("o{number}");
        ovs.vsctl(&node, &["add-port", "br0", &port, "--", "set", "interface", &port, "type=afxdp"])?;
    }
    pods[0].await_ping("10.8.0.2")?;
    serve_iperf3(lab, &pods[1]);
    let rate = pods[0].iperf3("10.8.0.2", SECONDS, &[]);
    ovs.repair_dev_null();
    rate
}

/// An Open vSwitch of its own: database, sockets and logs in the laboratory's directory.
struct Ovs {
    directory: PathBuf,
}

impl Ovs {
    fn start(lab: &mut Lab, node: &Namespace) -> anyhow::Result<Ovs> {
        let ovs = Ovs { directory: lab.directory().join("ovs") };
        fs::create_dir_all(&ovs.directory)?;
        let (database, socket) = (ovs.file("conf.db"), ovs.file("db.sock"));
        node.run(10, &["ovsdb-tool", "create", &database, "/usr/share/openvswitch/vswitch.ovsschema"])?;
        let environment = format!("OVS_RUNDIR={0} OVS_LOGDIR={0} OVS_DBDIR={0}", ovs.directory.display());
        let server = format!(
            "env {environment} ovsdb-server {database} --remote=punix:{socket} --unixctl={}",
            ovs.file("s.ctl")
        );
        lab.spawn(node, &["sh", "-c", &format!("exec {server}")])?;
        lab::wait_for(5, || Path::new(&socket).exists()).context("ovsdb-server does not start")?;
        ovs.vsctl(node, &["--no-wait", "init"])?;
        let switch = format!(
            "env {environment} /usr/lib/openvswitch-switch/ovs-vswitchd unix:{socket} --unixctl={}",
            ovs.file("v.ctl")
        );
        lab.spawn(node, &["sh", "-c", &format!("exec {switch}")])?;
        Ok(ovs)
    }

    fn vsctl(&self, node: &Namespace, words: &[&str]) -> anyhow::Result<()> {
        let database = format!("--db=unix:{}", self.file("db.sock"));
        node.run(15, &[&["ovs-vsctl", "--timeout=10", &database], words].concat()).map(drop)
    }

    fn file(&self, name: &str) -> String {
        self.directory.join(name).display().to_string()
    }

    /// Some of its scripts leave /dev/null a plain file.
    fn repair_dev_null(&self) {
        use std::os::unix::fs::FileTypeExt;
        if !fs::metadata("/dev/null").is_ok_and(|data| data.file_type().is_char_device()) {
            let _ = fs::remove_file("/dev/null");
            let _ = std::process::Command::new("mknod").args(["-m", "666", "/dev/null", "c", "1", "3"]).status();
        }
    }
}
