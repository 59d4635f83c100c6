//! Many ports, and more packets than can be forwarded.

use std::time::Instant;

use xtask::lab::{self, Lab, Namespace};

use crate::{ALONE, assert_balanced, bench, node_with_pods};

#[test]
#[expect(clippy::disallowed_methods, reason = "the issue asks for the time; no assertion but a generous bound")]
fn two_hundred_and_fifty_ports() {
    const PORTS: usize = 250;
    let Some(mut bench) = bench("250") else { return };
    // One port is there already: the first one has the kernel pin the packet memory.
    let (daemon, _) = node_with_pods(&mut bench, &ALONE.replace("10.244.1.0/24", "10.244.0.0/22"), 1);
    let first = daemon.memory();
    let pods: Vec<_> = (0..PORTS).map(|number| bench.lab.namespace(&format!("p{number}")).unwrap()).collect();
    let start = Instant::now();
    let conflist = crate::conflist();
    let addresses: Vec<_> = pods.iter().map(|pod| daemon.add_pod(pod, &conflist).unwrap()).collect();
    let seconds = start.elapsed().as_secs_f64();
    let memory = daemon.memory();
    println!(
        "{PORTS} ports added in {seconds:.1} s; daemon {} MiB resident, {} MiB before them, packet memory and all: {} KiB a port",
        memory >> 20,
        first >> 20,
        (memory.saturating_sub(first) >> 10) / PORTS as u64
    );
    assert!(seconds < 30.0, "{seconds} s");
    for (at, pod) in pods.iter().enumerate() {
        let to = &addresses[(at + 97) % PORTS][0];
        assert!(pod.pings(to, 1, 3), "{} to {to}", pod.name);
    }
    assert_balanced(&daemon);
}

/// Starts a generator in a pod: 64-byte packets of so many flows to an address, as fast as it can.
pub(crate) fn generate(lab: &mut Lab, pod: &Namespace, [source, target]: [&str; 2], flows: u32, seconds: u64) {
    let pktgen = lab::binaries().join("pktgen");
    let (pktgen, mac) = (pktgen.to_string_lossy(), mac_of(pod).unwrap());
    let (flows, seconds) = (flows.to_string(), seconds.to_string());
    let ends = ["--source-mac", &mac, "--source", source, "--destination", target];
    let size = ["--flows", &flows, "--seconds", &seconds];
    lab.spawn(pod, &[&[&*pktgen, "send", "--link", "eth0"][..], &ends, &size].concat()).unwrap();
}

/// Pods that flood another.
const SENDERS: usize = 8;

#[test]
fn after_ten_times_its_capacity_the_next_ping_answers() {
    let Some(mut bench) = bench("over") else { return };
    let (daemon, pods) = node_with_pods(&mut bench, ALONE, SENDERS + 1);
    // Many pods flood one, each as fast as it can, with 64-byte packets and many flows.
    let target = &pods[SENDERS].1[0];
    for (pod, addresses) in &pods[..SENDERS] {
        generate(&mut bench.lab, pod, [&addresses[0], target], 1000, 5);
    }
    let before = daemon.ctl(&["stats"]).unwrap();
    lab::wait_for(30, || bench.lab.running() == 0).unwrap();
    let after = daemon.ctl(&["stats"]).unwrap();
    let lost: u64 = after["ports"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|port| port["sockets"].as_array().unwrap())
        .map(|socket| socket["rx_dropped"].as_u64().unwrap() + socket["rx_ring_full"].as_u64().unwrap())
        .sum();
    let forwarded = after["tx_packets"].as_u64().unwrap() - before["tx_packets"].as_u64().unwrap();
    let offered = forwarded + lost + after["drops"].as_u64().unwrap();
    println!(
        "offered {offered}, forwarded {forwarded}: {:.1} times what the switch can",
        offered as f64 / forwarded as f64
    );
    assert!(forwarded > 100_000, "{forwarded}");
    assert!(offered >= 10 * forwarded, "it was no overload of ten times");
    for (pod, _) in &pods[..SENDERS] {
        assert!(pod.pings(target, 1, 2), "{} after the flood", pod.name);
    }
    for (_, addresses) in &pods[..SENDERS] {
        assert!(pods[SENDERS].0.pings(&addresses[0], 1, 2), "the flooded pod to {}", addresses[0]);
    }
    assert_balanced(&daemon);
}

pub(crate) fn mac_of(pod: &Namespace) -> anyhow::Result<String> {
    let links: serde_json::Value = serde_json::from_str(&pod.run(5, &["ip", "-j", "link", "show", "eth0"])?)?;
    Ok(links[0]["address"].as_str().unwrap_or_default().to_owned())
}

#[test]
fn two_workers_share_the_work() {
    let Some(mut bench) = bench("two") else { return };
    let config = format!("[worker]\ncount = 2\numem_frames = 8192\n{ALONE}");
    let (daemon, pods) = node_with_pods(&mut bench, &config, 2);
    let queues = pods[0].0.run(5, &["ip", "-d", "link", "show", "eth0"]).unwrap();
    assert!(queues.contains("numtxqueues 2"), "{queues}");
    crate::serve_iperf3(&mut bench.lab, &pods[1].0);
    let rate = pods[0].0.iperf3(&pods[1].1[0], 2, &["-P", "8"]).unwrap();
    println!("TCP over two workers, 8 streams: {:.1} Gbit/s", rate / 1e9);
    let workers = daemon.ctl(&["status"]).unwrap()["workers"].clone();
    for worker in workers.as_array().unwrap() {
        assert!(worker["flow_hits"].as_u64().unwrap() > 1000, "{workers}");
    }
    assert_balanced(&daemon);
}

#[test]
fn a_port_too_many_is_refused_and_the_others_go_on() {
    let Some(mut bench) = bench("full") else { return };
    // Ports that never rest: those that may make room for each other, as `rest.rs` shows.
    let config = format!("[worker]\numem_frames = 1024\nrest_after_seconds = 0\n{ALONE}");
    let (daemon, pods) = node_with_pods(&mut bench, &config, 2);
    let mut error = String::new();
    for number in 0..16 {
        let pod = bench.lab.namespace(&format!("more{number}")).unwrap();
        if let Err(refused) = daemon.add_pod(&pod, &crate::conflist()) {
            error = refused.to_string();
            break;
        }
    }
    assert!(error.contains("raise worker.umem_frames"), "{error}");
    assert!(pods[0].0.pings(&pods[1].1[0], 5, 3));
    crate::serve_iperf3(&mut bench.lab, &pods[1].0);
    pods[0].0.iperf3(&pods[1].1[0], 1, &[]).unwrap();
    assert!(pods[1].0.pings(&pods[0].1[0], 5, 3));
    assert_balanced(&daemon);
}

/// The configuration of one of two nodes, with two workers.
fn two_workers(own: usize, other: usize) -> String {
    format!(
        "[worker]\ncount = 2\numem_frames = 8192\n[uplink]\nlink = \"wire\"\n[[network]]\nname = \"pods\"\nvni = 1\n\
         ranges = [\"10.244.{own}.0/24\"]\n[[peer]]\nname = \"other\"\nvtep = \"192.0.2.{other}\"\n[[route]]\n\
         network = \"pods\"\nprefix = \"10.244.{other}.0/24\"\npeer = \"other\"\n"
    )
}

/// A wire with so many queues between two nodes.
fn cable(nodes: &[Namespace; 2], queues: usize) {
    let queues = format!("numtxqueues {queues} numrxqueues {queues}");
    nodes[0].ip(&format!("link add wire {queues} type veth peer name wire {queues} netns {}", nodes[1].name)).unwrap();
    for (at, node) in nodes.iter().enumerate() {
        node.ip(&format!("addr add 192.0.2.{}/24 dev wire", at + 1)).unwrap();
        node.ip("link set wire up").unwrap();
    }
}

/// Two nodes with two workers each: every worker needs a queue of the uplink, and uses it.
#[test]
fn an_uplink_has_a_queue_for_every_worker() {
    let Some(mut bench) = bench("queues") else { return };
    let lab = &mut bench.lab;
    let nodes = [lab.namespace("one").unwrap(), lab.namespace("two").unwrap()];
    lab.wire([(&nodes[0], "wire", &["192.0.2.1/24"]), (&nodes[1], "wire", &["192.0.2.2/24"])], 1500).unwrap();
    let error = lab.daemon(&nodes[0], "one", &two_workers(1, 2)).expect_err("one queue for two workers").to_string();
    assert!(error.contains("fewer queues than the switch has workers"), "{error}");
    nodes[0].ip("link del wire").unwrap();
    cable(&nodes, 2);
    let daemons = [
        lab.daemon(&nodes[0], "one", &two_workers(1, 2)).unwrap(),
        lab.daemon(&nodes[1], "two", &two_workers(2, 1)).unwrap(),
    ];
    let pods = [crate::add_pod(lab, &daemons[0], "a"), crate::add_pod(lab, &daemons[1], "b")];
    pods[0].0.await_ping(&pods[1].1[0]).unwrap();
    crate::serve_iperf3(lab, &pods[1].0);
    let rate = pods[0].0.iperf3(&pods[1].1[0], 2, &["-P", "8"]).unwrap();
    println!("TCP over VXLAN, two workers a node, 8 streams: {:.2} Gbit/s", rate / 1e9);
    for daemon in &daemons {
        assert_balanced(daemon);
        assert_eq!(crate::dropped(daemon, "no-port"), 0);
    }
}

#[test]
fn pods_may_come_all_at_once() {
    const PODS: usize = 16;
    let Some(mut bench) = bench("burst") else { return };
    let (daemon, _) = node_with_pods(&mut bench, ALONE, 0);
    let pods: Vec<_> = (0..PODS).map(|number| bench.lab.namespace(&format!("p{number}")).unwrap()).collect();
    let conflist = crate::conflist();
    let addresses: Vec<Vec<String>> = std::thread::scope(|scope| {
        let adds: Vec<_> = pods.iter().map(|pod| scope.spawn(|| daemon.add_pod(pod, &conflist).unwrap())).collect();
        adds.into_iter().map(|add| add.join().unwrap()).collect()
    });
    for (at, pod) in pods.iter().enumerate() {
        assert!(pod.pings(&addresses[(at + 1) % PODS][0], 2, 3), "{}", pod.name);
    }
    assert_eq!(daemon.ctl(&["port", "list"]).unwrap()["ports"].as_array().unwrap().len(), PODS);
}

/// Queues of the uplink go from worker to worker while packets come, by hand and by what they cost.
#[test]
fn queues_are_dealt_out_anew() {
    let Some(mut bench) = bench("rxq") else { return };
    let lab = &mut bench.lab;
    let nodes = [lab.namespace("one").unwrap(), lab.namespace("two").unwrap()];
    cable(&nodes, 4);
    let daemons = [
        lab.daemon(&nodes[0], "one", &two_workers(1, 2)).unwrap(),
        lab.daemon(&nodes[1], "two", &two_workers(2, 1)).unwrap(),
    ];
    let pods = [crate::add_pod(lab, &daemons[0], "a"), crate::add_pod(lab, &daemons[1], "b")];
    pods[0].0.await_ping(&pods[1].1[0]).unwrap();
    let receiver = &daemons[1];
    assert_eq!(owners(receiver), [0, 1, 0, 1]);
    // By hand: one after the other, and no worker without a queue.
    let refused = receiver.run_ctl(&["rxq", "move", "wire", "7", "1"]).unwrap_err().to_string();
    assert!(refused.contains("link wire has no queue 7"), "{refused}");
    let refused = receiver.run_ctl(&["rxq", "move", "wire", "0", "2"]).unwrap_err().to_string();
    assert!(refused.contains("there is no worker 2"), "{refused}");
    receiver.run_ctl(&["rxq", "move", "wire", "0", "1"]).unwrap();
    assert_eq!(owners(receiver), [1, 1, 0, 1]);
    let refused = receiver.run_ctl(&["rxq", "move", "wire", "2", "1"]).unwrap_err().to_string();
    assert!(refused.contains("worker 0 would have no queue of link wire left"), "{refused}");
    assert!(pods[0].0.pings(&pods[1].1[0], 5, 2) && pods[1].0.pings(&pods[0].1[0], 5, 2));
    // By what they cost: the sender's workers send by queues 0 and 1, and one worker of the receiver has both.
    crate::serve_iperf3(lab, &pods[1].0);
    let load = pods[0].0.command(&["iperf3", "-J", "-c", &pods[1].1[0], "-t", "15", "-P", "8"]);
    let mut load = { load }.stdout(std::process::Stdio::piped()).spawn().unwrap();
    lab::wait_for(5, || loads(receiver).iter().filter(|&&packets| packets > 1000).count() == 2).unwrap();
    let plan = receiver.ctl(&["rxq", "rebalance"]).unwrap();
    assert_eq!(
        (plan["is_applied"].as_bool(), owners(receiver)),
        (Some(false), vec![1, 1, 0, 1]),
        "a plan only: {plan}"
    );
    assert!(!plan["moves"].as_array().unwrap().is_empty(), "{plan}");
    let plan = receiver.ctl(&["rxq", "rebalance", "--apply"]).unwrap();
    let peak = |loads: &serde_json::Value| loads.as_array().unwrap().iter().filter_map(|it| it.as_u64()).max();
    assert!(peak(&plan["after"]) < peak(&plan["before"]), "{plan}");
    let after = owners(receiver);
    assert_ne!(after[0], after[1], "{after:?}");
    println!("dealt out anew: {plan}");
    lab::wait_for(5, || loads(receiver).iter().filter(|&&packets| packets > 1000).count() == 2)
        .expect("both queues go on");
    let status = load.wait().unwrap();
    assert!(status.success(), "TCP went on");
    daemons.iter().for_each(assert_balanced);
}

/// Which worker has each queue of the wire.
fn owners(daemon: &lab::Daemon) -> Vec<u64> {
    queues(daemon).iter().map(|queue| queue["worker"].as_u64().unwrap()).collect()
}

/// What each queue of the wire received in a moment.
fn loads(daemon: &lab::Daemon) -> Vec<u64> {
    queues(daemon).iter().map(|queue| queue["packets"].as_u64().unwrap()).collect()
}

fn queues(daemon: &lab::Daemon) -> Vec<serde_json::Value> {
    let list = daemon.ctl(&["rxq", "list", "--seconds", "0.2"]).unwrap();
    list["queues"].as_array().unwrap().iter().filter(|queue| queue["link"] == "wire").cloned().collect()
}
