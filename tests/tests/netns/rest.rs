//! Ports at rest: silent pods have no sockets, and nobody notices.

use xtask::lab::{self, Daemon, Namespace};

use crate::{ALONE, assert_balanced, bench, dropped, node_with_pods};

/// A node whose pods rest as soon as they are silent, with so many workers.
fn restless(workers: usize) -> String {
    format!("[worker]\ncount = {workers}\numem_frames = 8192\nrest_after_seconds = 1\n{ALONE}")
}

/// Waits until so many ports are at rest.
fn await_rest(daemon: &Daemon, ports: usize) {
    let resting = || daemon.ctl(&["status"]).unwrap()["ports_resting"] == ports;
    lab::wait_for(60, resting).unwrap();
}

/// How many of so many pings in a row are answered, 2 ms from one to the next.
fn answered(pod: &Namespace, address: &str, count: usize) -> usize {
    let count = count.to_string();
    let text = pod.run(20, &["ping", "-c", &count, "-i", "0.002", "-W", "2", address]).unwrap_or_default();
    let received = text.split(" received").next().and_then(|before| before.rsplit(' ').next());
    received.and_then(|received| received.parse().ok()).unwrap_or_default()
}

#[test]
fn silent_pods_rest_and_lose_nothing_when_they_wake() {
    for workers in [1, 2] {
        let Some(mut bench) = bench("rest") else { return };
        let (daemon, mut pods) = node_with_pods(&mut bench, &restless(workers), 3);
        for _ in 0..2 {
            await_rest(&daemon, 3);
            let status = daemon.ctl(&["status"]).unwrap();
            for worker in status["workers"].as_array().unwrap() {
                assert_eq!(worker["umem_free"], worker["umem_frames"], "no frame is with the kernel");
            }
            let stats = daemon.ctl(&["stats"]).unwrap();
            let sockets = |port: &serde_json::Value| port["sockets"].as_array().unwrap().clone();
            for port in stats["ports"].as_array().unwrap() {
                let sockets = sockets(port);
                assert_eq!(sockets.len(), workers, "what those had counted that were: {port}");
                assert!(sockets.iter().all(|socket| socket["fill_depth"] == 0), "{port}");
            }
            let list = daemon.run_ctl(&["port", "list"]).unwrap();
            assert_eq!(list.matches("at rest").count(), 3, "{list}");
            // The first packet finds the sender asleep, and then the receiver.
            assert_eq!(answered(&pods[0].0, &pods[1].1[0], 50), 50);
            assert_eq!(answered(&pods[2].0, &pods[0].1[1], 50), 50);
        }
        crate::serve_iperf3(&mut bench.lab, &pods[1].0);
        await_rest(&daemon, 3);
        pods[0].0.iperf3(&pods[1].1[0], 1, &[]).unwrap();
        assert_eq!(dropped(&daemon, "resting"), 0);
        // One that goes while it rests leaves nothing, and the others are none the worse.
        await_rest(&daemon, 3);
        let (gone, _) = pods.remove(2);
        bench.lab.delete(&gone).unwrap();
        lab::wait_for(10, || daemon.ctl(&["status"]).unwrap()["ports"] == 2).unwrap();
        assert_eq!(answered(&pods[0].0, &pods[1].1[0], 5), 5);
        assert_balanced(&daemon);
    }
}

#[test]
fn a_pod_that_wakes_with_a_flood_is_counted() {
    let Some(mut bench) = bench("wake") else { return };
    let (daemon, pods) = node_with_pods(&mut bench, &restless(1), 2);
    await_rest(&daemon, 2);
    let (from, to) = (pods[0].1[0].as_str(), pods[1].1[0].as_str());
    crate::load::generate(&mut bench.lab, &pods[0].0, [from, to], 100, 1);
    lab::wait_for(10, || bench.lab.running() == 0).unwrap();
    let (waking, full) = (dropped(&daemon, "resting"), dropped(&daemon, "tx-full"));
    println!(
        "of a flood from rest to rest: {waking} found no room to wait for the sender's sockets, {full} for the receiver's"
    );
    assert!(pods[1].0.pings(from, 1, 2));
    assert_balanced(&daemon);
    // Each packet that the program saw is in the books of the switch or of a socket.
    let seen = || {
        let stats = daemon.ctl(&["stats"]).unwrap();
        let link = daemon.ctl(&["port", "list"]).unwrap()["ports"][0]["link"].clone();
        let port = stats["ports"].as_array().unwrap().iter().find(|port| port["link"] == link).unwrap().clone();
        let of = |socket: &serde_json::Value| {
            socket["rx_dropped"].as_u64().unwrap() + socket["rx_ring_full"].as_u64().unwrap()
        };
        let lost: u64 = port["sockets"].as_array().unwrap().iter().map(of).sum();
        port["rx_packets"].as_u64().unwrap() + lost
    };
    assert!(sent(&pods[0].0) > 100_000, "{}", sent(&pods[0].0));
    // Nothing but a late neighbor solicitation may come between two looks.
    lab::wait_for(5, || seen() == sent(&pods[0].0)).unwrap_or_else(|_| {
        panic!("{} sent, {} counted", sent(&pods[0].0), seen());
    });
    let port = daemon.ctl(&["port", "list"]).unwrap()["ports"][0].clone();
    assert!(port.get("rest").is_none(), "{port}");
}

/// Packets that a pod's link has given to the other end.
fn sent(pod: &Namespace) -> u64 {
    let text = pod.run(5, &["ip", "-j", "-s", "link", "show", "eth0"]).unwrap();
    let links: serde_json::Value = serde_json::from_str(&text).unwrap();
    links[0]["stats64"]["tx"]["packets"].as_u64().unwrap()
}

/// Speaks a dozen times, with silences that end about when the port goes to rest.
const HESITANT: &str = "import random, socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(12):
    time.sleep(random.uniform(.9, 2.2)); s.sendto(b'x', (sys.argv[1], 9))";

#[test]
fn who_speaks_while_it_goes_to_rest_is_heard() {
    let Some(mut bench) = bench("late") else { return };
    let (daemon, pods) = node_with_pods(&mut bench, &restless(2), 8);
    let before: Vec<u64> = pods.iter().map(|(pod, _)| crate::policy::no_ports(pod)).collect();
    for (at, (pod, _)) in pods.iter().enumerate() {
        let to = &pods[(at + 1) % pods.len()].1[0];
        bench.lab.spawn(pod, &["/usr/bin/python3", "-c", HESITANT, to]).unwrap();
    }
    lab::wait_for(40, || bench.lab.running() == 0).unwrap();
    let all = lab::wait_for(3, || {
        pods.iter().zip(&before).all(|((pod, _), before)| crate::policy::no_ports(pod) == before + 12)
    });
    let came: Vec<u64> =
        pods.iter().zip(&before).map(|((pod, _), before)| crate::policy::no_ports(pod) - before).collect();
    assert!(all.is_ok(), "{came:?} of 12 each; {}\n{}", daemon.ctl(&["drops"]).unwrap(), daemon.log_end());
    assert!(!daemon.log_end().contains("cannot be woken"), "{}", daemon.log_end());
    assert_balanced(&daemon);
}

/// The others rest so that those who speak have memory: more pods than there are fill rings for.
#[test]
fn memory_for_a_few_serves_many() {
    const PODS: usize = 18;
    let Some(mut bench) = bench("many") else { return };
    // Room for a dozen ports.
    let config = format!("[worker]\numem_frames = 1024\nrest_after_seconds = 3600\n{ALONE}");
    let (daemon, _) = node_with_pods(&mut bench, &config, 0);
    let pods: Vec<_> = (0..PODS).map(|number| bench.lab.namespace(&format!("p{number}")).unwrap()).collect();
    let conflist = crate::conflist();
    let mut addresses = Vec::new();
    for pod in &pods {
        // A new pod says something; it takes a moment until it is silent enough to make room for the next.
        lab::wait_for(10, || {
            daemon.add_pod(pod, &conflist).is_ok_and(|of| {
                addresses.push(of);
                true
            })
        })
        .unwrap();
    }
    for (at, pod) in pods.iter().enumerate() {
        let to = &addresses[(at + 7) % PODS][0];
        // Until there is memory for both, packets are lost.
        pod.await_ping(to).unwrap_or_else(|error| panic!("{} to {to}: {error}\n{}", pod.name, daemon.log_end()));
    }
    assert!(daemon.ctl(&["status"]).unwrap()["ports_resting"].as_u64().unwrap() >= 3);
    assert_balanced(&daemon);
}

/// No memory for one more port, and that one floods: the others do not notice, the books balance, and it has its turn later.
#[test]
fn a_port_that_cannot_be_woken_harms_nobody() {
    const SPEAKERS: usize = 15;
    let Some(mut bench) = bench("deaf") else { return };
    let config = format!("[worker]\numem_frames = 1024\nrest_after_seconds = 2\n{ALONE}");
    let (daemon, pods) = node_with_pods(&mut bench, &config, 0);
    assert!(pods.is_empty());
    let pods: Vec<_> = (0..=SPEAKERS).map(|number| bench.lab.namespace(&format!("p{number}")).unwrap()).collect();
    let conflist = crate::conflist();
    let mut addresses = Vec::new();
    let mut add = |pod| {
        lab::wait_for(10, || {
            daemon.add_pod(pod, &conflist).is_ok_and(|of| {
                addresses.push(of);
                true
            })
        })
    };
    // The last one first: it rests while the others come and speak.
    add(&pods[SPEAKERS]).unwrap();
    await_rest(&daemon, 1);
    for pod in &pods[..SPEAKERS] {
        add(pod).unwrap();
    }
    let flooder = (&pods[SPEAKERS], addresses[0][0].clone());
    let of = |at: usize| addresses[1 + at][0].clone();
    for (at, pod) in pods[..SPEAKERS].iter().enumerate() {
        bench.lab.spawn(pod, &["ping", "-q", "-i", "0.2", "-w", "12", &of((at + 1) % SPEAKERS)]).unwrap();
    }
    crate::load::generate(&mut bench.lab, flooder.0, [&flooder.1, &of(0)], 100, 6);
    let stuck = || daemon.ctl(&["status"]).unwrap()["ports_stuck"] == 1;
    lab::wait_for(5, stuck).unwrap();
    let list = daemon.run_ctl(&["port", "list"]).unwrap();
    assert_eq!(list.matches("stuck").count(), 1, "{list}");
    for (at, pod) in pods[..5].iter().enumerate() {
        let worst = worst_ms(pod, &of(at + 1));
        println!("while a port floods that cannot be woken: {worst} ms");
        assert!(worst < 500.0, "{worst} ms");
    }
    assert!(dropped(&daemon, "resting") > 10_000);
    // The others fall silent.
    lab::wait_for(30, || bench.lab.running() == 0).unwrap();
    assert_balanced(&daemon);
    lab::wait_for(20, || flooder.0.pings(&of(0), 1, 1)).unwrap();
    assert_balanced(&daemon);
}

/// The longest of five round trips.
fn worst_ms(pod: &Namespace, address: &str) -> f64 {
    let text = pod.run(10, &["ping", "-c", "5", "-i", "0.05", "-W", "2", address]).unwrap_or_default();
    let times = text.split("time=").skip(1).filter_map(|rest| rest.split(' ').next()?.parse::<f64>().ok());
    let times: Vec<f64> = times.collect();
    if times.len() < 5 { f64::INFINITY } else { times.into_iter().fold(0.0, f64::max) }
}

/// One pod speaks to forty that rest, all at once.
#[test]
fn one_pod_wakes_many() {
    const PODS: usize = 40;
    let Some(mut bench) = bench("sweep") else { return };
    let (daemon, _) = node_with_pods(&mut bench, &restless(1), 0);
    let pods: Vec<_> = (0..PODS).map(|number| bench.lab.namespace(&format!("p{number}")).unwrap()).collect();
    let conflist = crate::conflist();
    let addresses: Vec<_> = pods.iter().map(|pod| daemon.add_pod(pod, &conflist).unwrap()[0].clone()).collect();
    await_rest(&daemon, PODS);
    for address in &addresses[1..] {
        bench.lab.spawn(&pods[0], &["ping", "-q", "-c", "1", "-W", "5", address]).unwrap();
    }
    lab::wait_for(20, || bench.lab.running() == 0).unwrap();
    let stats = daemon.ctl(&["stats"]).unwrap();
    let ports = stats["ports"].as_array().unwrap();
    let answered =
        ports.iter().filter(|port| port["tx_packets"].as_u64() > Some(0) && port["rx_packets"].as_u64() > Some(0));
    assert_eq!(answered.count(), PODS, "{stats}");
    assert_eq!((dropped(&daemon, "resting"), dropped(&daemon, "tx-full")), (0, 0));
    assert_balanced(&daemon);
}

/// A daemon that is killed and comes again finds the programs gone and the pods where they were.
#[test]
fn a_restart_takes_ports_at_rest_over() {
    let Some(mut bench) = bench("again") else { return };
    let (mut daemon, pods) = node_with_pods(&mut bench, &restless(1), 2);
    await_rest(&daemon, 2);
    daemon.kill();
    daemon.start().unwrap();
    assert_eq!(answered(&pods[0].0, &pods[1].1[0], 5), 5);
    await_rest(&daemon, 2);
    assert_eq!(answered(&pods[1].0, &pods[0].1[0], 5), 5);
    assert_balanced(&daemon);
}

/// What the kernel and the daemon need for pods, bytes. The kernel's part is the whole machine's.
fn memory(daemon: &Daemon) -> i64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let field = |name: &str| -> i64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    };
    (field("Slab:") + field("VmallocUsed:")) * 1024 + daemon.memory() as i64
}

/// The bound, with what a socket costs beside it.
#[test]
fn an_idle_pod_costs_less_than_0_3_megabytes() {
    const PODS: usize = 24;
    let Some(mut bench) = bench("cost") else { return };
    let config = format!("[worker]\nrest_after_seconds = 5\n{ALONE}");
    let (daemon, _) = node_with_pods(&mut bench, &config, 1);
    // The namespaces are the pods' own.
    let pods: Vec<_> = (0..PODS).map(|number| bench.lab.namespace(&format!("p{number}")).unwrap()).collect();
    let before = memory(&daemon);
    let a_pod = || (memory(&daemon) - before) / PODS as i64;
    for pod in &pods {
        daemon.add_pod(pod, &crate::conflist()).unwrap();
    }
    let awake = a_pod();
    await_rest(&daemon, PODS + 1);
    // The kernel frees in its own time.
    let at_rest = lab::wait_for(20, || a_pod() < 300_000);
    println!("a pod, kernel and daemon: {} KiB awake, {} KiB at rest", awake >> 10, a_pod() >> 10);
    assert!(at_rest.is_ok(), "{} bytes", a_pod());
}
