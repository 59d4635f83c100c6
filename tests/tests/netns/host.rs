//! The host keeps what is the host's.

use serde_json::Value;

use crate::outside::inventory;
use crate::{bench, is_listening};

const CONFIG: &str = r#"
[uplink]
link = "wire"
[[network]]
name = "pods"
vni = 1
ranges = ["10.244.1.0/24"]
[[peer]]
name = "other"
vtep = "192.0.2.2"
"#;

#[test]
fn a_connection_between_nodes_survives_start_stop_and_kill() {
    let Some(mut bench) = bench("tcp") else { return };
    let lab = &mut bench.lab;
    let (node, other) = (lab.namespace("node").unwrap(), lab.namespace("other").unwrap());
    lab.wire([(&node, "wire", &["192.0.2.1/24"]), (&other, "wire", &["192.0.2.2/24"])], 1500).unwrap();
    lab.spawn(&other, &["iperf3", "-s"]).unwrap();
    assert!(is_listening(&other, 5201));
    let report = lab.directory().join("report.json");
    let command = format!("iperf3 -J -t 8 -i 0.5 -b 50M -c 192.0.2.2 > {}", report.display());
    lab.spawn(&node, &["sh", "-c", &command]).unwrap();
    let mut daemon = lab.daemon(&node, "node", CONFIG).unwrap();
    assert!(node.run(5, &["ip", "link", "show", "wire"]).unwrap().contains("xdp"), "attached");
    assert!(daemon.stop(), "it ends well");
    assert!(!node.run(5, &["ip", "link", "show", "wire"]).unwrap().contains("xdp"), "and leaves no program");
    daemon.start().unwrap();
    daemon.kill();
    xtask::lab::wait_for(5, || !node.run(5, &["ip", "link", "show", "wire"]).unwrap().contains("xdp")).unwrap();
    daemon.start().unwrap();
    let mut text = String::new();
    xtask::lab::wait_for(15, || {
        text = std::fs::read_to_string(&report).unwrap_or_default();
        text.trim_end().ends_with('}')
    })
    .unwrap();
    let report: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(report["error"], Value::Null);
    let intervals = report["intervals"].as_array().unwrap();
    let silent = intervals.iter().filter(|part| part["sum"]["bytes"] == 0).count();
    assert!(intervals.len() >= 14 && silent == 0, "{silent} of {} half seconds without a byte", intervals.len());
}

#[test]
fn nothing_of_the_host_is_changed_after_stop() {
    let Some(mut bench) = bench("inv") else { return };
    let lab = &mut bench.lab;
    let (node, other) = (lab.namespace("node").unwrap(), lab.namespace("other").unwrap());
    lab.wire([(&node, "wire", &["192.0.2.1/24", "2001:db8::1/64"]), (&other, "wire", &["192.0.2.2/24"])], 1500)
        .unwrap();
    // The link-local address takes its time.
    xtask::lab::wait_for(5, || !node.run(5, &["ip", "addr"]).unwrap().contains("tentative")).unwrap();
    let before = inventory(&node);
    let mut daemon = lab.daemon(&node, "node", CONFIG).unwrap();
    assert!(node.pings("192.0.2.2", 5, 3), "the NIC keeps its addresses and traffic");
    assert!(daemon.stop());
    assert_eq!(inventory(&node), before);
}

#[test]
fn a_peer_comes_goes_and_comes_back() {
    let Some(mut bench) = bench("peer") else { return };
    let lab = &mut bench.lab;
    let (node, other) = (lab.namespace("node").unwrap(), lab.namespace("other").unwrap());
    lab.wire([(&node, "wire", &["192.0.2.1/24"]), (&other, "wire", &[])], 1500).unwrap();
    let daemon = lab.daemon(&node, "node", CONFIG).unwrap();
    let state = || daemon.ctl(&["peer", "list"]).unwrap()["peers"][0]["state"].as_str().unwrap_or_default().to_owned();
    assert!(state().contains("no neighbor entry for 192.0.2.2"), "{}", state());
    other.ip("addr add 192.0.2.2/24 dev wire").unwrap();
    xtask::lab::wait_for(10, || state() == "reachable").unwrap();
    node.ip("addr flush dev wire").unwrap();
    xtask::lab::wait_for(10, || state().contains("no IPv4 VTEP")).unwrap();
    node.ip("addr add 192.0.2.1/24 dev wire").unwrap();
    xtask::lab::wait_for(10, || state() == "reachable").unwrap();
    other.ip("link set wire down").unwrap();
    let uplink = || daemon.ctl(&["status"]).unwrap()["uplinks"][0]["state"].as_str().unwrap_or_default().to_owned();
    xtask::lab::wait_for(10, || uplink().starts_with("down")).unwrap();
    other.ip("link set wire up").unwrap();
    xtask::lab::wait_for(10, || uplink() == "up" && state() == "reachable").unwrap();
}
