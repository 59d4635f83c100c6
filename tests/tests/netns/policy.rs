//! Policies without a gap: while pods come, while policies change, while the daemon is gone and comes back, and what a change
//! costs.

#![allow(clippy::disallowed_methods, reason = "what a change costs is printed")]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::json;
use vswitch_api::{Answer, Client, EndpointSpec, PolicyDocument, Request};
use xtask::lab::{self, Daemon, Lab, Namespace};

use crate::load::generate;
use crate::{ALONE, assert_balanced, bench, conflist, dropped, is_listening, node_with_pods, serve_iperf3};

/// Sends to an address as fast as it can: UDP to port 9, and a TCP connection to port 80 now and then.
const HAMMER: &str = "import socket, sys, time
to = sys.argv[1]
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
while True:
    for _ in range(50):
        try: udp.sendto(b'x', (to, 9))
        except OSError: pass
    tcp = socket.socket(); tcp.setblocking(False)
    try: tcp.connect((to, 80))
    except OSError: pass
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\\1\\0\\0\\0\\0\\0\\0\\0')
    tcp.close(); time.sleep(.0001)";

/// Nobody reaches pods with the label `guard=yes`, but those with `app=friend`.
const GUARD: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: guard, namespace: default}
spec:
  podSelector: {matchLabels: {guard: \"yes\"}}
  ingress:
  - from: [{podSelector: {matchLabels: {app: friend}}}]
";

fn client(daemon: &Daemon) -> Client {
    Client::connect(&daemon.socket, Duration::from_secs(30)).unwrap()
}

fn apply(client: &mut Client, text: &str) {
    let documents = vec![PolicyDocument { file: "test.yaml".to_owned(), text: text.to_owned() }];
    client.call(Request::PolicyApply { documents, dry_run: false }).unwrap();
}

fn endpoint(name: &str, labels: &[(&str, &str)], addresses: &[&str]) -> EndpointSpec {
    EndpointSpec {
        namespace: Some("default".to_owned()),
        name: name.to_owned(),
        network: None,
        labels: labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        ports: Vec::new(),
    }
}

fn set(client: &mut Client, endpoints: Vec<EndpointSpec>) {
    client.call(Request::EndpointSet { endpoints }).unwrap();
}

/// A number of a namespace's own, `/proc/net/snmp`, by protocol and name there.
fn snmp(pod: &Namespace, protocol: &str, name: &str) -> u64 {
    let text = pod.run(5, &["cat", "/proc/net/snmp"]).unwrap();
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(protocol)).map(str::split_whitespace);
    let (mut names, mut values) = (lines.next().unwrap(), lines.next().unwrap());
    let place = names.position(|one| one == name).unwrap();
    values.nth(place).unwrap().parse().unwrap()
}

/// How many UDP datagrams and TCP segments a namespace has received, whether somebody listened or not.
fn received(pod: &Namespace) -> u64 {
    snmp(pod, "Udp:", "InDatagrams") + snmp(pod, "Udp:", "NoPorts") + snmp(pod, "Tcp:", "InSegs")
}

/// How many UDP datagrams came to ports that nobody serves.
pub(crate) fn no_ports(pod: &Namespace) -> u64 {
    snmp(pod, "Udp:", "NoPorts")
}

fn hammer(lab: &mut Lab, from: &Namespace, to: &str) {
    lab.spawn(from, &["/usr/bin/python3", "-c", HAMMER, to]).unwrap();
}

#[test]
fn a_thousand_times_a_pod_comes_under_fire_and_nothing_gets_through() {
    let Some(mut bench) = bench("born") else { return };
    let (daemon, pods) = node_with_pods(&mut bench, ALONE, 1);
    let mut asks = client(&daemon);
    let victim = bench.lab.namespace("victim").unwrap();
    let (address, path) = ("10.244.1.77", victim.path());
    hammer(&mut bench.lab, &pods[0].0, address);
    let netconf = daemon.netconf(&conflist());
    let cycle = |daemon: &Daemon| {
        let environment = [
            ("CNI_CONTAINERID", "victim"),
            ("CNI_NETNS", &path),
            ("CNI_IFNAME", "eth0"),
            ("CNI_ARGS", &format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=victim;IP={address}")),
        ];
        let added = daemon.cni("ADD", &environment, &netconf).unwrap();
        assert!(added.is_ok, "{}", added.json);
        assert!(daemon.cni("DEL", &environment, &netconf).unwrap().is_ok);
    };
    // Without a policy the fire arrives: the test can fail.
    for _ in 0..3 {
        cycle(&daemon);
    }
    let before = received(&victim);
    assert!(before > 0, "nobody fires");
    set(&mut asks, vec![endpoint("victim", &[("guard", "yes")], &[])]);
    apply(&mut asks, GUARD);
    let start = Instant::now();
    for turn in 0..1000 {
        cycle(&daemon);
        assert_eq!(received(&victim), before, "after ADD {turn}");
    }
    println!(
        "1000 times ADD and DEL under fire in {:.0?}: nothing came through, {} packets denied",
        start.elapsed(),
        dropped(&daemon, "policy-denied")
    );
    assert!(dropped(&daemon, "policy-denied") > 1000);
}

/// Seconds of UDP at a rate that the machine carries easily; datagrams sent and lost.
fn stream(from: &Namespace, to: &str, seconds: &str) -> (u64, u64) {
    let command = ["iperf3", "-J", "-u", "-b", "40M", "-l", "1000", "-t", seconds, "-c", to];
    let report: serde_json::Value = serde_json::from_str(&from.run(60, &command).unwrap()).unwrap();
    let sum = &report["end"]["sum"];
    (sum["packets"].as_u64().unwrap(), sum["lost_packets"].as_u64().unwrap())
}

#[test]
fn a_thousand_swaps_of_policy_lose_nothing_and_open_nothing() {
    let Some(mut bench) = bench("swap") else { return };
    let (daemon, pods) = node_with_pods(&mut bench, ALONE, 3);
    let names = [&pods[0].0.name, &pods[1].0.name, &pods[2].0.name].map(String::as_str);
    let mut asks = client(&daemon);
    set(
        &mut asks,
        vec![
            endpoint(names[0], &[("app", "friend")], &[]),
            endpoint(names[1], &[("guard", "yes")], &[]),
            endpoint(names[2], &[("app", "foe")], &[]),
        ],
    );
    apply(&mut asks, GUARD);
    serve_iperf3(&mut bench.lab, &pods[1].0);
    let target = pods[1].1[0].clone();
    let before = no_ports(&pods[1].0);
    hammer(&mut bench.lab, &pods[2].0, &target);
    let quiet = stream(&pods[0].0, &target, "12");
    let unread = snmp(&pods[1].0, "Udp:", "RcvbufErrors");
    let fired = std::thread::spawn({
        let (from, to) = (pods[0].0.clone(), target.clone());
        move || stream(&from, &to, "12")
    });
    let other =
        GUARD.replace("ingress:", "ingress:\n  - from: [{ipBlock: {cidr: 10.99.0.0/16}}]\n    ports: [{port: 80}]");
    let start = Instant::now();
    let (mut swaps, mut slowest) = (0, Duration::ZERO);
    while swaps < 1000 {
        let one = Instant::now();
        apply(&mut asks, if swaps % 2 == 0 { &other } else { GUARD });
        slowest = slowest.max(one.elapsed());
        swaps += 1;
        // Spread over the stream's time.
        let due = start + Duration::from_millis(11 * swaps);
        lab::wait_for(5, || Instant::now() >= due).unwrap();
    }
    let took = start.elapsed();
    let loud = fired.join().unwrap();
    // What reached the pod and was not read in time there is no loss of the switch.
    let unread = snmp(&pods[1].0, "Udp:", "RcvbufErrors") - unread;
    println!(
        "{swaps} swaps in {took:.1?}, the slowest live after {slowest:.1?}; UDP lost {} of {} in quiet, {} of {} meanwhile, {unread} of them in the pod's socket",
        quiet.1, quiet.0, loud.1, loud.0
    );
    assert_eq!(no_ports(&pods[1].0), before, "the foe got through");
    assert!(dropped(&daemon, "policy-denied") > 10_000);
    assert!(
        loud.1 <= quiet.1 + unread,
        "lost {} of {}, in quiet {}, unread {unread}; drops {}",
        loud.1,
        loud.0,
        quiet.1,
        daemon.ctl(&["drops"]).unwrap()
    );
    assert_balanced(&daemon);
}

/// Serves port 80 and writes down who came; keeps connections open and echoes.
const SERVE: &str = "import socket, sys, threading
server = socket.socket(); server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
server.bind(('0.0.0.0', 80)); server.listen(100)
def echo(one):
    while data := one.recv(100): one.send(data)
while True:
    one, who = server.accept()
    print(who[0], file=open(sys.argv[1], 'a'), flush=True)
    threading.Thread(target=echo, args=(one,), daemon=True).start()";

/// Keeps one connection and counts what comes back.
const TALK: &str = "import socket, sys, time
one = socket.create_connection((sys.argv[1], 80)); one.settimeout(20)
count = 0
while True:
    one.send(b'ping'); one.recv(100); count += 1
    open(sys.argv[2], 'w').write(str(count)); time.sleep(.02)";

#[test]
fn a_crash_under_a_flood_of_connects_lets_nothing_through() {
    let Some(mut bench) = bench("crash") else { return };
    let (mut daemon, pods) = node_with_pods(&mut bench, ALONE, 3);
    let names = [&pods[0].0.name, &pods[1].0.name, &pods[2].0.name].map(String::as_str);
    let mut asks = client(&daemon);
    set(&mut asks, vec![endpoint(names[0], &[("app", "friend")], &[]), endpoint(names[1], &[("guard", "yes")], &[])]);
    apply(&mut asks, GUARD);
    drop(asks);
    let (guests, count) = (bench.lab.file("guests", "").unwrap(), bench.lab.file("count", "0").unwrap());
    bench.lab.spawn(&pods[1].0, &["/usr/bin/python3", "-c", SERVE, &guests]).unwrap();
    assert!(is_listening(&pods[1].0, 80));
    let target = pods[1].1[0].clone();
    bench.lab.spawn(&pods[0].0, &["/usr/bin/python3", "-c", TALK, &target, &count]).unwrap();
    hammer(&mut bench.lab, &pods[2].0, &target);
    let talked = || std::fs::read_to_string(&count).unwrap().parse::<u64>().unwrap_or(0);
    lab::wait_for(10, || talked() > 5).unwrap();
    let read = || std::fs::read_to_string(&guests).unwrap();
    let datagrams = no_ports(&pods[1].0);
    for turn in 0..5 {
        daemon.kill();
        daemon.start().unwrap();
        let policies = daemon.ctl(&["policy", "list"]).unwrap();
        assert_eq!(policies["policies"][0]["name"]["name"], "guard", "{policies}");
        let before = talked();
        lab::wait_for(15, || talked() > before + 10)
            .unwrap_or_else(|_| panic!("the friend's connection broke, {turn}"));
    }
    let foe = &pods[2].1[0];
    assert_eq!(no_ports(&pods[1].0), datagrams, "a datagram of the foe got through");
    assert!(!read().contains(foe.as_str()), "{}", read());
    assert_eq!(read().lines().count(), 1, "the friend connected once");
    println!(
        "five crashes: {} pings of the friend came back, {} packets of the foe denied",
        talked(),
        dropped(&daemon, "policy-denied")
    );
    assert!(dropped(&daemon, "policy-denied") > 100);
}

/// A policy of its own for each of a thousand apps, and ten pods of each.
fn cluster() -> (Vec<EndpointSpec>, String) {
    let endpoints = (0..10_000).map(|pod| {
        let (app, address) = (format!("app{}", pod / 10), format!("10.100.{}.{}", pod / 250, 1 + pod % 250));
        let number = pod.to_string();
        endpoint(&format!("far{pod}"), &[("app", &app), ("pod", &number)], &[&address])
    });
    let policies: Vec<String> = (0..1000)
        .map(|app| {
            format!(
                "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: app{app}, namespace: default}}\nspec:\n  \
                 podSelector: {{matchLabels: {{app: app{app}}}}}\n  ingress:\n  - from: [{{podSelector: {{matchLabels: {{app: app{}}}}}}}]\n    \
                 ports: [{{port: 80}}]\n",
                (app + 1) % 1000
            )
        })
        .collect();
    (endpoints.collect(), policies.join("---\n"))
}

/// Packets a second that reach a pod from another one.
fn rate(lab: &mut Lab, daemon: &Daemon, pods: &[(Namespace, Vec<String>)], seconds: u64) -> f64 {
    let sent = |daemon: &Daemon| daemon.ctl(&["stats"]).unwrap()["tx_packets"].as_u64().unwrap();
    let (before, start) = (sent(daemon), Instant::now());
    generate(lab, &pods[0].0, [&pods[0].1[0], &pods[1].1[0]], 100, seconds);
    lab::wait_for(seconds + 20, || lab.running() == 0).unwrap();
    (sent(daemon) - before) as f64 / start.elapsed().as_secs_f64()
}

#[test]
fn a_change_is_live_at_once_among_ten_thousand_pods_and_a_thousand_policies() {
    let Some(mut bench) = bench("scale4") else { return };
    let (daemon, pods) = node_with_pods(&mut bench, ALONE, 2);
    let mut asks = client(&daemon);
    let before = daemon.memory();
    let (endpoints, policies) = cluster();
    let start = Instant::now();
    set(&mut asks, endpoints);
    let told = start.elapsed();
    apply(&mut asks, &policies);
    println!(
        "10000 identities told in {told:.1?}, 1000 policies live in {:.1?}; memory {} -> {} MiB",
        start.elapsed() - told,
        before >> 20,
        daemon.memory() >> 20
    );
    // The two pods here are of an app, and of the one that it lets in.
    let names = [&pods[0].0.name, &pods[1].0.name].map(String::as_str);
    let here = |client: &mut Client, app: &str| {
        let start = Instant::now();
        set(client, vec![endpoint(names[0], &[("app", app)], &[])]);
        start.elapsed()
    };
    set(&mut asks, vec![endpoint(names[1], &[("app", "app7")], &[])]);
    let policy = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: ping, namespace: default}
spec:
  podSelector: {matchLabels: {app: app7}}
  ingress: [{from: [{podSelector: {matchLabels: {app: app8}}}]}]
";
    apply(&mut asks, policy);
    let mut times = Vec::new();
    for turn in 0..20 {
        let is_friend = turn % 2 == 0;
        times.push(here(&mut asks, if is_friend { "app8" } else { "app9" }));
        // The very next packet is judged by it.
        assert_eq!(pods[0].0.pings(&pods[1].1[0], 1, 1), is_friend, "{turn}");
    }
    let mut far = Vec::new();
    for turn in 0..100 {
        let start = Instant::now();
        let (app, address) = (format!("app{turn}"), format!("10.100.0.{}", 1 + turn));
        set(&mut asks, vec![endpoint(&format!("far{turn}"), &[("app", &app), ("pod", "moved")], &[&address])]);
        far.push(start.elapsed());
    }
    times.sort();
    far.sort();
    println!(
        "a label of a pod here is live on all workers after {:.1?} (median), {:.1?} (slowest of 20); of a pod elsewhere {:.1?}, {:.1?} (of 100)",
        times[times.len() / 2],
        times[times.len() - 1],
        far[far.len() / 2],
        far[far.len() - 1]
    );
    here(&mut asks, "app8");
    let quiet = rate(&mut bench.lab, &daemon, &pods, 6);
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let churn = std::thread::spawn({
        let (stop, mut asks) = (stop.clone(), client(&daemon));
        move || {
            let (start, mut changes) = (Instant::now(), 0_u64);
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let (pod, app) = (changes % 10_000, format!("app{}", changes * 7 % 1000));
                let address = format!("10.100.{}.{}", pod / 250, 1 + pod % 250);
                set(&mut asks, vec![endpoint(&format!("far{pod}"), &[("app", &app)], &[&address])]);
                changes += 1;
                let due = start + Duration::from_millis(10 * changes);
                let _ = lab::wait_for(5, || Instant::now() >= due);
            }
            (changes, start.elapsed())
        }
    });
    let busy = rate(&mut bench.lab, &daemon, &pods, 6);
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let (changes, took) = churn.join().unwrap();
    println!(
        "forwarding {:.0} packets a second in quiet, {:.0} with {:.0} changes a second: {:.2}; memory {} MiB",
        quiet,
        busy,
        changes as f64 / took.as_secs_f64(),
        busy / quiet,
        daemon.memory() >> 20
    );
    assert!(changes > 100);
    assert_balanced(&daemon);
}

#[test]
fn switchctl_applies_explains_and_observes() {
    let Some(mut bench) = bench("tool") else { return };
    let (daemon, pods) = node_with_pods(&mut bench, ALONE, 2);
    let names = [&pods[0].0.name, &pods[1].0.name].map(|name| format!("default/{name}"));
    let file = bench.lab.file("guard.yaml", GUARD).unwrap();
    let run = |arguments: &[&str]| daemon.run_ctl(arguments);
    run(&["endpoint", "set", &names[1], "--label", "guard=yes", "--named-port", "web=tcp/80"]).unwrap();
    let diff = run(&["policy", "diff", "--file", &file]).unwrap();
    assert!(
        diff.contains("NetworkPolicy default/guard would be created") && diff.contains("+  podSelector:"),
        "{diff}"
    );
    assert_eq!(run(&["policy", "apply", "--file", &file]).unwrap(), "NetworkPolicy default/guard created\n");
    let list = run(&["policy", "list"]).unwrap();
    assert!(list.contains("default/guard") && list.contains("networkpolicy"), "{list}");
    assert!(!pods[0].0.pings(&pods[1].1[0], 1, 1));
    let explained = run(&["policy", "explain", "--from", &names[0], "--to", &names[1], "--port", "icmp"]).unwrap();
    assert!(explained.starts_with("denied: ") && explained.contains("to allow it: add a rule"), "{explained}");
    let observed = run(&["observe", "--last", "--endpoint", &names[1]]).unwrap();
    assert!(observed.contains("policy-denied, NetworkPolicy default/guard ingress: no rule matches"), "{observed}");
    let shown = run(&["policy", "show", "netpol", "guard"]).unwrap();
    assert!(shown.contains("kind: NetworkPolicy") && shown.contains("spec.ingress[0]"), "{shown}");
    run(&["endpoint", "set", &names[0], "--label", "app=friend"]).unwrap();
    assert!(pods[0].0.pings(&pods[1].1[0], 1, 1));
    let endpoints = run(&["endpoint", "list"]).unwrap();
    assert!(endpoints.contains("app=friend") && endpoints.contains("web=tcp/80"), "{endpoints}");
    let connections = run(&["connection", "list", "--protocol", "icmp"]).unwrap();
    assert!(connections.contains("replied") && connections.contains("guard spec.ingress[0]"), "{connections}");
    assert!(run(&["connection", "delete", "--protocol", "icmp"]).unwrap().contains("forgotten"));
    run(&["policy", "delete", "--file", &file]).unwrap();
    assert!(run(&["policy", "show", "netpol", "guard"]).is_err());
    // What is wrong has a line, and changes nothing.
    let wrong = bench.lab.file("wrong.yaml", &GUARD.replace("from:", "form:")).unwrap();
    let error = run(&["policy", "apply", "--file", &wrong]).unwrap_err().to_string();
    assert!(error.contains("wrong.yaml:8: spec.ingress[0].form: the schema has no such field"), "{error}");
    let json = daemon.ctl(&["policy", "list"]).unwrap();
    assert_eq!(json["policies"], json!([]));
    let _: BTreeMap<String, serde_json::Value> = serde_json::from_value(json).unwrap();
    let Ok(Answer::Events { last, .. }) =
        client(&daemon).call(Request::Observe { after: None, filter: Default::default() })
    else {
        panic!("no events")
    };
    assert!(last >= 1);
}
