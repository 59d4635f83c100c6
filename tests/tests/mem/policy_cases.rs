//! Policy cases in memory: every pair, every port and protocol, both families, with packets there and back.

use std::collections::{BTreeMap, BTreeSet};

use vswitch_api::{Answer, ExplainSpec, ObjectName, Protocol, Request};
use vswitch_net::{GATEWAY_MAC, PortId};
use vswitch_tests::frames::{Ends, Layer4, packet};
use vswitch_tests::mem::Switch;
use vswitch_tests::netpol::{Case, NAMESPACES, Pod, Service, cases, inventory, world};

use crate::mac;

/// A switch with the nine pods.
struct World {
    switch: Switch,
    pods: Vec<(Pod, PortId)>,
    /// Source ports are never used twice, so that no connection of one case is one of the next.
    next_port: u16,
    is_bridged: bool,
}

impl World {
    fn new(is_bridged: bool) -> World {
        let mut switch = Switch::new();
        let mode = if is_bridged { "bridged" } else { "routed" };
        let add = format!(
            r#"{{"op":"network_add","name":"pods","vni":1,"mode":"{mode}",
                "subnets":["192.168.1.0/24","fd00:192:168:1::/64"]}}"#
        );
        switch.ask_json(&add).unwrap();
        let pods = world()
            .into_iter()
            .map(|pod| {
                let [v4, v6] = pod.addresses();
                let mut spec = vswitch_api::PortSpec::new(format!("veth{}", pod.number), mac(pod.number));
                spec.network = Some("pods".to_owned());
                spec.addresses = vec![v4.parse().unwrap(), v6.parse().unwrap()];
                spec.labels.insert("K8S_POD_NAMESPACE".to_owned(), pod.namespace.to_owned());
                spec.labels.insert("K8S_POD_NAME".to_owned(), pod.name.to_owned());
                let Answer::Port(info) = switch.ask(Request::PortAdd(spec)) else { panic!("no port") };
                (pod, info.id)
            })
            .collect();
        inventory().into_iter().for_each(|request| drop(switch.ask(request)));
        let pods: Vec<(Pod, PortId)> = pods;
        // What the switch says when a port comes.
        pods.iter().for_each(|(_, port)| drop(switch.take(*port)));
        World { switch, pods, next_port: 10_000, is_bridged }
    }

    /// Sends one packet for every pair and service, and answers to those that arrive, which must arrive too. Those that did,
    /// by source, destination and service.
    fn meet(&mut self, services: &[Service], family: usize) -> BTreeSet<(usize, usize, usize)> {
        let mut sent = BTreeMap::new();
        for from in 0..self.pods.len() {
            for to in (0..self.pods.len()).filter(|to| *to != from) {
                for (at, service) in services.iter().enumerate() {
                    self.next_port = if self.next_port == u16::MAX { 10_000 } else { self.next_port + 1 };
                    let layer4 = match service.protocol {
                        Protocol::Tcp => Layer4::Tcp { flags: 2, seq: 100, ack: 0 },
                        Protocol::Udp => Layer4::Udp,
                        Protocol::Sctp => Layer4::Sctp(1),
                    };
                    self.send(from, to, (self.next_port, service.port), layer4, family);
                    sent.insert(self.next_port, (from, to, at));
                }
            }
        }
        let arrived: BTreeSet<_> = self.arrivals(family).into_iter().map(|(at, ports)| (at, ports.0)).collect();
        let mut answers = BTreeSet::new();
        for &(at, port) in &arrived {
            let (from, to, service) = sent[&port];
            assert_eq!(at, to, "a packet came to somebody else");
            let layer4 = match services[service].protocol {
                Protocol::Tcp => Layer4::Tcp { flags: 18, seq: 900, ack: 101 },
                Protocol::Udp => Layer4::Udp,
                Protocol::Sctp => Layer4::Sctp(2),
            };
            self.send(to, from, (services[service].port, port), layer4, family);
            answers.insert((from, port));
        }
        let answered: BTreeSet<_> = self.arrivals(family).into_iter().map(|(at, ports)| (at, ports.1)).collect();
        assert_eq!(answered, answers, "what was allowed is answered");
        arrived.into_iter().map(|(_, port)| sent[&port]).collect()
    }

    fn send(&mut self, from: usize, to: usize, ports: (u16, u16), layer4: Layer4, family: usize) {
        let ((from, port), (to, _)) = (self.pods[from].clone(), &self.pods[to]);
        let gateway = if self.is_bridged { mac(to.number) } else { GATEWAY_MAC };
        let ends = Ends { from: mac(from.number), to: gateway };
        let frame = packet(ends, &from.addresses()[family], &to.addresses()[family], ports, layer4, b"");
        self.switch.send(port, &frame);
    }

    /// What has come to each pod: source and destination port.
    fn arrivals(&mut self, family: usize) -> Vec<(usize, (u16, u16))> {
        self.switch.settle();
        let l4 = if family == 0 { 34 } else { 54 };
        let mut all = Vec::new();
        for at in 0..self.pods.len() {
            for frame in self.switch.take(self.pods[at].1) {
                let word = |at: usize| u16::from_be_bytes([frame[l4 + at], frame[l4 + at + 1]]);
                all.push((at, (word(0), word(2))));
            }
        }
        all
    }

    fn explain(&mut self, from: &str, to: &str, service: Service) -> [bool; 2] {
        let spec = ExplainSpec { from: from.to_owned(), to: to.to_owned(), port: service.text() };
        let Answer::Explained(info) = self.switch.ask(Request::PolicyExplain(spec)) else { panic!("no answer") };
        for end in &info.ends {
            assert!(!end.reason.contains("defect"), "{end:?}");
        }
        let [egress, ingress] = &info.ends[..] else { panic!("two ends") };
        [egress.is_allowed, ingress.is_allowed]
    }

    /// Compares every mark of a case's tables; how many there were.
    fn run(&mut self, case: &Case) -> usize {
        self.switch.ask(case.apply());
        let mut marks = 0;
        let families = if case.is_v4_only { 0..1 } else { 0..2 };
        let all: Vec<Pod> = self.pods.iter().map(|(pod, _)| pod.clone()).collect();
        for (from, source) in all.iter().enumerate() {
            for (to, destination) in all.iter().enumerate() {
                let pair = (source.number, destination.number);
                for (at, &service) in case.services.iter().enumerate() {
                    let what = || {
                        let (source, destination) = (source.title(), destination.title());
                        format!("{}: {source} to {destination} {}", case.name, service.text())
                    };
                    let expected = case.tables.combined[&pair][at];
                    let says = self.explain(&source.addresses()[0], &destination.addresses()[0], service);
                    for (table, said) in [(&case.tables.egress, says[0]), (&case.tables.ingress, says[1])] {
                        if let Some(table) = table {
                            assert_eq!(said, table[&pair][at], "explain, one side of {}", what());
                        }
                    }
                    if from == to {
                        // What a pod sends to itself never leaves it.
                        continue;
                    }
                    assert_eq!(says == [true; 2], expected, "explain, {}", what());
                }
            }
        }
        for family in families {
            let met = self.meet(&case.services, family);
            for (from, source) in all.iter().enumerate() {
                for (to, destination) in all.iter().enumerate().filter(|(to, _)| *to != from) {
                    let expected = &case.tables.combined[&(source.number, destination.number)];
                    for (at, service) in case.services.iter().enumerate() {
                        marks += 1;
                        let (source, destination) = (source.title(), destination.title());
                        assert_eq!(
                            met.contains(&(from, to, at)),
                            expected[at],
                            "{}, family {family}: {source} to {destination} {}",
                            case.name,
                            service.text()
                        );
                    }
                }
            }
        }
        let names = self.switch.ask(Request::PolicyList);
        let Answer::Policies { policies } = names else { panic!("no list") };
        let objects: Vec<ObjectName> =
            policies.into_iter().map(|policy| policy.name).filter(|name| !is_of_world(name)).collect();
        self.switch.ask(Request::PolicyDelete { objects });
        // Pods that the case described are the world's again.
        inventory().into_iter().for_each(|request| drop(self.switch.ask(request)));
        marks
    }
}

fn is_of_world(name: &ObjectName) -> bool {
    name.kind == "Namespace" && NAMESPACES.contains(&name.name.as_str())
}

#[test]
fn every_case_holds_for_every_packet() {
    let mut world = World::new(false);
    let all = cases();
    let marks: usize = all.iter().map(|case| world.run(case)).sum();
    println!("{} cases, {marks} connections tried", all.len());
    assert!(all.len() >= 107 && marks > 60_000, "{} cases, {marks} connections", all.len());
}

#[test]
fn policies_hold_in_bridged_networks_too() {
    let mut world = World::new(true);
    // A third of them: the policies are the same, only the way is another.
    let marks: usize = cases().iter().step_by(3).map(|case| world.run(case)).sum();
    assert!(marks > 10_000, "{marks} connections");
}
