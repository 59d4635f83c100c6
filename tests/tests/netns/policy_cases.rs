//! Policy cases with real sockets: nine pods in namespaces, TCP and UDP, both families.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use serde_json::{Value, json};
use vswitch_api::{Client, ObjectName, Protocol, Request};
use vswitch_tests::netpol::{Case, NAMESPACES, Pod, cases, inventory, world};
use xtask::lab::{self, Daemon, Namespace};

use crate::{assert_balanced, bench};

/// How much longer than for what is allowed an answer is waited for that should not come, in seconds.
const LONGER: &str = "0.2";

const CLUSTER: &str = r#"
[[network]]
name = "pods"
vni = 1
subnets = ["192.168.1.0/24", "fd00:192:168:1::/64"]
"#;

/// A pod with a program that serves and asks.
struct Prober {
    pod: Pod,
    child: Child,
    asks: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Prober {
    fn start(pod: Pod, namespace: &Namespace) -> Prober {
        let program = lab::workspace().join("tests/tests/netns/prober.py");
        let mut command = namespace.command(&["/usr/bin/python3", program.to_str().unwrap(), LONGER]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (asks, answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut prober = Prober { pod, child, asks, answers };
        assert_eq!(prober.line(), "ready");
        prober
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    fn ask(&mut self, targets: &[Value]) {
        writeln!(self.asks, "{}", json!(targets)).unwrap();
    }

    fn answer(&mut self) -> Vec<bool> {
        serde_json::from_str(&self.line()).unwrap()
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Tries what a case says about TCP and UDP; how many connections that were.
fn run(case: &Case, daemon: &Daemon, probers: &mut [Prober]) -> usize {
    let mut client = Client::connect(&daemon.socket, std::time::Duration::from_secs(10)).unwrap();
    client.call(case.apply()).unwrap();
    let families = if case.is_v4_only { 0..1 } else { 0..2 };
    let services: Vec<usize> =
        (0..case.services.len()).filter(|&at| case.services[at].protocol != Protocol::Sctp).collect();
    let others: Vec<Pod> = world();
    let (mut tried, mut wrong) = (0, Vec::new());
    let targets = |own: &Pod| {
        let mut all = Vec::new();
        for other in others.iter().filter(|other| **other != *own) {
            for family in families.clone() {
                all.extend(services.iter().map(|&at| (other.clone(), family, at)));
            }
        }
        all
    };
    for prober in probers.iter_mut() {
        let list: Vec<Value> = targets(&prober.pod)
            .iter()
            .map(|(other, family, at)| {
                let service = case.services[*at];
                let expected = case.tables.combined[&(prober.pod.number, other.number)][*at];
                json!([other.addresses()[*family], service.protocol.name(), service.port, expected])
            })
            .collect();
        prober.ask(&list);
    }
    for prober in probers.iter_mut() {
        let answers = prober.answer();
        for ((other, family, at), has_met) in targets(&prober.pod).into_iter().zip(answers) {
            tried += 1;
            if has_met != case.tables.combined[&(prober.pod.number, other.number)][at] {
                let (from, to) = (prober.pod.title(), other.title());
                wrong.push(format!("{from} to {to} {}, family {family}: {has_met}", case.services[at].text()));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{}: {wrong:#?}; {:#}",
        case.name,
        daemon.run_ctl(&["observe", "--last", "--endpoint", "x/a"]).unwrap()
    );
    let Ok(vswitch_api::Answer::Policies { policies }) = client.call(Request::PolicyList) else { panic!("no list") };
    let is_of_world = |name: &ObjectName| name.kind == "Namespace" && NAMESPACES.contains(&name.name.as_str());
    let objects = policies.into_iter().map(|policy| policy.name).filter(|name| !is_of_world(name)).collect();
    client.call(Request::PolicyDelete { objects }).unwrap();
    inventory().into_iter().for_each(|request| drop(client.call(request).unwrap()));
    tried
}

#[test]
fn policy_cases_hold_for_real_sockets() {
    let Some(mut bench) = bench("cases") else { return };
    let node = bench.lab.namespace("node").unwrap();
    let daemon = bench.lab.daemon(&node, "node", CLUSTER).unwrap();
    let mut probers = Vec::new();
    for pod in world() {
        let namespace = bench.lab.namespace(&format!("{}{}", pod.namespace, pod.name)).unwrap();
        let [v4, v6] = pod.addresses();
        let (path, title) = (namespace.path(), pod.title());
        daemon.ctl(&["port", "add", "--netns", &path, "--ip", &v4, "--ip", &v6, "--pod", &title]).unwrap();
        probers.push(Prober::start(pod, &namespace));
    }
    let mut client = Client::connect(&daemon.socket, std::time::Duration::from_secs(10)).unwrap();
    inventory().into_iter().for_each(|request| drop(client.call(request).unwrap()));
    let all = cases();
    let tried: usize = all.iter().map(|case| run(case, &daemon, &mut probers)).sum();
    println!("{} cases, {tried} connections of TCP and UDP tried", all.len());
    assert!(all.len() >= 107 && tried > 40_000);
    assert_balanced(&daemon);
}
