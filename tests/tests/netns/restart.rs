//! A restart of the daemon: ports are adopted, pods go on.

use xtask::lab;

use crate::{ALONE, assert_balanced, bench, node_with_pods};

#[test]
fn ports_are_adopted_after_stop_and_after_kill() {
    let Some(mut bench) = bench("adopt") else { return };
    let (mut daemon, pods) = node_with_pods(&mut bench, ALONE, 3);
    daemon.run_ctl(&["network", "add", "extra", "--vni", "77"]).unwrap();
    let before = (daemon.ctl(&["port", "list"]).unwrap(), daemon.ctl(&["network", "list"]).unwrap());
    for end in ["stop", "kill"] {
        if end == "stop" {
            assert!(daemon.stop());
        } else {
            daemon.kill();
        }
        assert!(!pods[0].0.pings(&pods[1].1[0], 1, 1), "nobody forwards");
        daemon.start().unwrap();
        assert_eq!(
            (daemon.ctl(&["port", "list"]).unwrap(), daemon.ctl(&["network", "list"]).unwrap()),
            before,
            "after {end}"
        );
        for (pod, _) in &pods {
            for (_, addresses) in &pods {
                assert!(pod.pings(&addresses[0], 3, 3), "{} to {} after {end}", pod.name, addresses[0]);
                assert!(pod.pings(&addresses[1], 3, 3), "{} to {} after {end}", pod.name, addresses[1]);
            }
        }
    }
    assert_balanced(&daemon);
}

#[test]
fn a_pod_that_went_while_nobody_looked_leaves_nothing() {
    let Some(mut bench) = bench("gone") else { return };
    let (mut daemon, pods) = node_with_pods(&mut bench, ALONE, 2);
    let list = |daemon: &lab::Daemon| daemon.ctl(&["port", "list"]).unwrap()["ports"].as_array().unwrap().len();
    daemon.kill();
    bench.lab.delete(&pods[0].0).unwrap();
    // The kernel takes a namespace's links away in its own time.
    let has_two = || daemon.node.run(5, &["ip", "-o", "link"]).unwrap().matches(": vsw").count() == 2;
    lab::wait_for(10, || !has_two()).unwrap();
    daemon.start().unwrap();
    assert_eq!(list(&daemon), 1);
    // And one that goes while the daemon runs.
    bench.lab.delete(&pods[1].0).unwrap();
    lab::wait_for(10, || list(&daemon) == 0).unwrap();
    let status = daemon.ctl(&["status"]).unwrap();
    assert_eq!(status["ipam"][0]["used"], 0);
    let frames = &status["workers"][0];
    assert_eq!(frames["umem_free"], frames["umem_frames"], "every frame came home");
}

/// While no switch runs, a pod must not find the host behind its link, however hard it tries.
#[test]
fn without_the_daemon_pods_do_not_reach_the_host() {
    let Some(mut bench) = bench("seal") else { return };
    let (mut daemon, pods) = node_with_pods(&mut bench, ALONE, 1);
    let (node, pod) = (daemon.node.clone(), &pods[0].0);
    node.ip("addr add 10.99.0.1/32 dev lo").unwrap();
    node.ip("addr add fd99::1/128 dev lo nodad").unwrap();
    let port = daemon.ctl(&["port", "list"]).unwrap()["ports"][0]["link"].as_str().unwrap().to_owned();
    let links: serde_json::Value =
        serde_json::from_str(&node.run(5, &["ip", "-j", "link", "show", &port]).unwrap()).unwrap();
    let mac = links[0]["address"].as_str().unwrap();
    daemon.kill();
    // It need not ask for the MAC of the other end: it knows it.
    for gateway in ["169.254.1.1", "fe80::1"] {
        pod.ip(&format!("neigh replace {gateway} lladdr {mac} dev eth0 nud permanent")).unwrap();
    }
    assert!(!pod.pings("10.99.0.1", 3, 1));
    assert!(!pod.pings("fd99::1", 3, 1));
    let received = |file: &str| {
        let text = node.run(5, &["cat", file]).unwrap();
        text.lines().filter(|line| line.contains("Icmp")).map(str::to_owned).collect::<Vec<_>>().join("\n")
    };
    let v4 = received("/proc/net/snmp");
    let names: Vec<&str> = v4.lines().find(|line| line.starts_with("Icmp: InMsgs")).unwrap().split(' ').collect();
    let values: Vec<&str> =
        v4.lines().find(|line| line.starts_with("Icmp: ") && !line.contains("InMsgs")).unwrap().split(' ').collect();
    let echoes = names.iter().position(|name| *name == "InEchos").unwrap();
    assert_eq!(values[echoes], "0", "{v4}");
    let v6 = received("/proc/net/snmp6");
    assert!(v6.lines().any(|line| line.split_whitespace().eq(["Icmp6InEchos", "0"])), "{v6}");
    // The neighbor cache has it for sure: asking gets no answer.
    for gateway in ["169.254.1.1", "fe80::1"] {
        pod.ip(&format!("neigh del {gateway} dev eth0")).unwrap();
    }
    pod.ip("route replace 10.99.0.1 dev eth0").unwrap();
    assert!(!pod.pings("10.99.0.1", 2, 1));
    assert!(!pod.run(5, &["ip", "neigh", "show", "10.99.0.1"]).unwrap().contains(mac), "ARP was answered");
}

/// Pod links have as many queues as there were workers.
#[test]
fn another_number_of_workers_loses_no_port() {
    let Some(mut bench) = bench("count") else { return };
    let config = |count: usize| format!("[worker]\ncount = {count}\numem_frames = 8192\n{ALONE}");
    let (mut daemon, pods) = node_with_pods(&mut bench, &config(2), 2);
    let set = |daemon: &lab::Daemon, count: usize| {
        let text = std::fs::read_to_string(&daemon.config).unwrap();
        let changed = text
            .lines()
            .map(|line| if line.starts_with("count") { format!("count = {count}") } else { line.to_owned() });
        std::fs::write(&daemon.config, changed.collect::<Vec<_>>().join("\n")).unwrap();
    };
    let counts = |daemon: &lab::Daemon| {
        let status = daemon.ctl(&["status"]).unwrap();
        (status["ports"].as_u64().unwrap(), status["ports_waiting"].as_u64().unwrap())
    };
    // Fewer workers take all queues.
    daemon.stop();
    set(&daemon, 1);
    daemon.start().unwrap();
    assert_eq!(counts(&daemon), (2, 0));
    crate::serve_iperf3(&mut bench.lab, &pods[1].0);
    pods[0].0.iperf3(&pods[1].1[0], 1, &["-P", "8"]).unwrap();
    // More workers than queues: the ports wait, and nobody gets their addresses.
    daemon.stop();
    set(&daemon, 3);
    daemon.start().unwrap();
    assert_eq!(counts(&daemon), (0, 2));
    let (_, late) = crate::add_pod(&mut bench.lab, &daemon, "late");
    assert!(!pods.iter().any(|(_, addresses)| addresses[0] == late[0]));
    daemon.kill();
    set(&daemon, 2);
    daemon.start().unwrap();
    assert_eq!(counts(&daemon), (3, 0));
    assert!(pods[0].0.pings(&pods[1].1[0], 5, 3));
    assert!(pods[0].0.pings(&late[0], 5, 3));
}

/// A restart brings the MTU of pods' routes up to date, and nothing else of a pod's table.
#[test]
fn routes_that_a_pod_made_its_own_stay() {
    let Some(mut bench) = bench("own") else { return };
    let node = bench.lab.namespace("node").unwrap();
    bench.lab.wire([(&node, "wire", &["192.0.2.1/24"]), (&node, "other", &[])], 1500).unwrap();
    let config = format!("[uplink]\nlink = \"wire\"\n{ALONE}");
    let mut daemon = bench.lab.daemon(&node, "node", &config).unwrap();
    let [plain, tunnel, none] = ["plain", "tunnel", "none"].map(|name| crate::add_pod(&mut bench.lab, &daemon, name).0);
    tunnel.ip("link add tun7 type veth peer name tun8").unwrap();
    tunnel.ip("link set tun7 up").unwrap();
    tunnel.ip("route replace default dev tun7").unwrap();
    tunnel.ip("-6 route replace default via fe80::9 dev eth0").unwrap();
    none.ip("route del default").unwrap();
    let routes = |pod: &lab::Namespace| {
        ["-4", "-6"].map(|family| pod.run(5, &["ip", family, "route", "show", "default"]).unwrap())
    };
    let before = [routes(&tunnel), routes(&none)];
    assert!(routes(&plain)[0].contains("mtu 1450"), "{:?}", routes(&plain));
    assert!(daemon.stop());
    node.ip("link set wire mtu 1400").unwrap();
    daemon.start().unwrap();
    lab::wait_for(10, || routes(&plain).iter().all(|route| route.contains("mtu 1350"))).unwrap();
    lab::wait_for(10, || routes(&none)[1].contains("mtu 1350")).unwrap();
    assert_eq!(routes(&tunnel), before[0]);
    assert_eq!(routes(&none)[0], before[1][0]);
}
