//! The real daemon, real veths, and other people's programs as peers, in network namespaces.
//!
//! One test at a time: they measure, and the machine is shared. Without the privilege to make namespaces a test is
//! skipped and says so; with `CI` set that is a failure. Programs come from the release build: run `cargo xtask test`.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod bad_input;
mod bgp;
mod cni;
mod evpn;
mod flannel;
mod harm;
mod host;
mod icmp;
mod kernel_peer;
mod life;
mod load;
mod nat;
mod nfv;
mod offload;
mod outside;
mod podman;
mod policy;
mod policy_cases;
mod ports;
mod rest;
mod restart;
mod scale;
mod throughput;
mod underlay;

use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};
use xtask::lab::{self, Daemon, Lab, Namespace};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A laboratory, and the right to be the only one.
struct Bench {
    lab: Lab,
    _turn: MutexGuard<'static, ()>,
}

/// A laboratory; none, said aloud, where namespaces cannot be made.
fn bench(name: &str) -> Option<Bench> {
    let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(reason) = lab::missing_privilege() {
        assert!(std::env::var_os("CI").is_none(), "{reason}");
        eprintln!("skipped: {reason}");
        return None;
    }
    Some(Bench { lab: Lab::new(&format!("vswt-{name}")).unwrap(), _turn: turn })
}

/// The configuration of a node with one routed network and no uplink.
const ALONE: &str = r#"
[[network]]
name = "pods"
vni = 1
ranges = ["10.244.1.0/24", "fd00:10:244:1::/64"]
"#;

/// A conflist as shipped, for the network "pods".
fn conflist() -> Value {
    let text = std::fs::read_to_string(lab::workspace().join("config/10-vswitch.conflist")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// A node with a daemon, and so many pods plugged in by the CNI plugin; each with its addresses.
fn node_with_pods(bench: &mut Bench, config: &str, pods: usize) -> (Daemon, Vec<(Namespace, Vec<String>)>) {
    let node = bench.lab.namespace("node").unwrap();
    let daemon = bench.lab.daemon(&node, "node", config).unwrap();
    let pods = (0..pods).map(|number| add_pod(&mut bench.lab, &daemon, &format!("pod{number}"))).collect();
    (daemon, pods)
}

fn add_pod(lab: &mut Lab, daemon: &Daemon, name: &str) -> (Namespace, Vec<String>) {
    let pod = lab.namespace(name).unwrap();
    let addresses = daemon.add_pod(&pod, &conflist()).unwrap();
    (pod, addresses)
}

/// Checks the books of a daemon at rest.
fn assert_balanced(daemon: &Daemon) {
    let mut stats = json!(null);
    let balanced = lab::wait_for(3, || {
        stats = daemon.ctl(&["stats"]).unwrap();
        stats["is_balanced"] == true
    });
    assert!(
        balanced.is_ok(),
        "rx {} tx {} drops {} merged {} copies {}",
        stats["rx_packets"],
        stats["tx_packets"],
        stats["drops"],
        stats["merged"],
        stats["copies"]
    );
}

/// How many packets a daemon has dropped for a reason.
fn dropped(daemon: &Daemon, reason: &str) -> u64 {
    let drops = daemon.ctl(&["drops"]).unwrap();
    let found = drops["drops"].as_array().unwrap().iter().find(|drop| drop["reason"] == reason).cloned();
    found.map_or(0, |drop| drop["packets"].as_u64().unwrap())
}

fn is_listening(namespace: &Namespace, port: u16) -> bool {
    let wanted = format!(":{port}");
    lab::wait_for(5, || namespace.run(5, &["ss", "-Hltn"]).is_ok_and(|text| text.contains(&wanted))).is_ok()
}

/// Starts an iperf3 server.
fn serve_iperf3(lab: &mut Lab, namespace: &Namespace) {
    lab.spawn(namespace, &["iperf3", "-s"]).unwrap();
    assert!(is_listening(namespace, 5201));
}
