//! Compiled policy against the naive evaluator: a million random pairs of policies and connections, with changes of
//! policies, labels and addresses in between.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use vswitch_api::{Answer, PolicyDocument, PortSpec, Request};
use vswitch_control::policy::{Compiler, IdentityId, Owner};
use vswitch_net::{GATEWAY_MAC, NetworkIndex, PortId};
use vswitch_policy::{
    Action, Direction, EndpointFacts, IcmpMatch, Kind, Labels, NamedPort, NamespaceMatch, Operator, Peer, Policy,
    PolicyId, PortMatch, Requirement, Rule, Selector, Source, Subject, Tier, TierDefault, builtin_tiers,
};
use vswitch_tests::frames::{self, Ends, Layer4};
use vswitch_tests::mem::Switch;
use vswitch_tests::naive::{self, End, Purpose, Who};

const NETWORK: NetworkIndex = NetworkIndex(0);

/// A small generator: the same worlds every time.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }

    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    fn some<T>(&mut self, most: usize, make: impl Fn(&mut Random) -> T) -> Vec<T> {
        (0..1 + self.below(most)).map(|_| make(self)).collect()
    }
}

const NAMESPACES: [&str; 4] = ["w", "x", "y", "z"];
const PORTS: [u16; 5] = [0, 53, 80, 81, 65535];
const PROTOCOLS: [u8; 6] = [1, 6, 17, 58, 132, 47];
const NAMES: [&str; 3] = ["web", "dns", "all"];

fn labels(random: &mut Random) -> Labels {
    let keys = ["app", "tier", "env"];
    let all = keys.iter().filter_map(|key| {
        let value = random.below(4);
        (value > 0).then(|| ((*key).to_owned(), value.to_string()))
    });
    all.collect()
}

fn selector(random: &mut Random) -> Selector {
    if random.one_in(3) {
        return Selector::default();
    }
    let requirement = |random: &mut Random| {
        let values = |random: &mut Random| random.some(2, |random| (1 + random.below(3)).to_string());
        let operator = match random.below(5) {
            0 | 1 => Operator::In(values(random)),
            2 => Operator::NotIn(values(random)),
            3 => Operator::Exists,
            _ => Operator::DoesNotExist,
        };
        Requirement { key: (*random.pick(&["app", "tier", "env", "team"])).to_owned(), operator }
    };
    Selector::new(random.some(2, requirement))
}

fn namespaces(random: &mut Random) -> NamespaceMatch {
    match random.below(2) {
        0 => NamespaceMatch::Name((*random.pick(&NAMESPACES)).to_owned()),
        _ => NamespaceMatch::Labels(selector(random)),
    }
}

fn prefix(random: &mut Random) -> IpNet {
    let text = match random.below(4) {
        0 => format!("10.{}.0.0/{}", random.below(2), 8 + random.below(9)),
        1 => format!("10.0.{}.{}/{}", random.below(2), random.below(32), 16 + random.below(17)),
        2 => format!("fd00::{:x}/{}", random.below(32), 8 + random.below(121)),
        _ => (*random.pick(&["0.0.0.0/0", "::/0", "10.0.0.0/24", "10.0.0.16/28"])).to_owned(),
    };
    text.parse::<IpNet>().expect("a prefix").trunc()
}

fn peer(random: &mut Random) -> Peer {
    match random.below(5) {
        0 | 1 => Peer::Pods { namespaces: namespaces(random), pods: selector(random) },
        2 => Peer::Pods { namespaces: NamespaceMatch::Labels(Selector::default()), pods: Selector::default() },
        3 => Peer::Nodes(selector(random)),
        _ => {
            let cidr = prefix(random);
            let inner = (0..random.below(3)).map(|_| prefix(random));
            let except = inner.filter(|inner| cidr.contains(inner) && *inner != cidr).collect();
            Peer::Cidr { cidr, except }
        }
    }
}

fn port(random: &mut Random) -> PortMatch {
    let protocol = *random.pick(&[6, 17, 132]);
    match random.below(6) {
        0 | 1 => {
            let (one, other) = (*random.pick(&PORTS), *random.pick(&PORTS));
            PortMatch::Ports { protocol, first: one.min(other), last: one.max(other) }
        }
        2 => PortMatch::Protocol(*random.pick(&PROTOCOLS)),
        3 | 4 => {
            let name = (*random.pick(&NAMES)).to_owned();
            PortMatch::Named { name, protocol: random.one_in(2).then_some(protocol) }
        }
        _ => {
            let kind = random.one_in(2).then(|| random.below(10) as u8);
            let code = kind.and_then(|_| random.one_in(2).then(|| random.below(3) as u8));
            PortMatch::Icmp(IcmpMatch { protocol: *random.pick(&[1, 58]), kind, code })
        }
    }
}

fn policy(random: &mut Random, name: usize) -> Policy {
    let (kind, tier) = *random.pick(&[
        (Kind::NetworkPolicy, "networkpolicy"),
        (Kind::NetworkPolicy, "networkpolicy"),
        (Kind::AdminNetworkPolicy, "admin"),
        (Kind::ClusterNetworkPolicy, "baseline"),
        (Kind::SwitchPolicy, "switch"),
        (Kind::SwitchPolicy, "own"),
    ]);
    let actions: &[Action] = match kind {
        Kind::NetworkPolicy => &[Action::Allow],
        Kind::SwitchPolicy => &[Action::Allow, Action::Deny, Action::Pass, Action::Log],
        _ => &[Action::Allow, Action::Deny, Action::Pass],
    };
    let rule = |random: &mut Random| Rule {
        name: None,
        line: 1,
        path: String::new(),
        action: *random.pick(actions),
        peers: (!random.one_in(4)).then(|| random.some(3, peer)),
        ports: (!random.one_in(3)).then(|| random.some(3, port)),
    };
    let rules = |random: &mut Random| match random.below(4) {
        0 => None,
        1 if kind == Kind::NetworkPolicy => Some(Vec::new()),
        _ => Some(random.some(3, rule)),
    };
    let subject = if kind == Kind::SwitchPolicy && random.one_in(3) {
        Subject::Host
    } else {
        Subject::Pods { namespaces: namespaces(random), pods: selector(random) }
    };
    Policy {
        id: PolicyId { kind, namespace: None, name: format!("p{name}") },
        source: Source::default(),
        tier: tier.to_owned(),
        order: random.below(3) as i64,
        subject,
        ingress: rules(random),
        egress: rules(random),
        applies_on_forward: false,
    }
}

fn facts(random: &mut Random) -> EndpointFacts {
    let is_node = random.one_in(8);
    let named = |random: &mut Random| NamedPort {
        name: (*random.pick(&NAMES)).to_owned(),
        protocol: *random.pick(&[6, 17, 132]),
        port: *random.pick(&PORTS),
    };
    let mut ports = if is_node { Vec::new() } else { random.some(3, named) };
    ports.sort();
    ports.dedup();
    EndpointFacts {
        namespace: (!is_node).then(|| (*random.pick(&NAMESPACES)).to_owned()),
        labels: labels(random),
        ports,
    }
}

fn address(random: &mut Random) -> IpAddr {
    match random.below(2) {
        0 => format!("10.{}.{}.{}", random.below(2), random.below(2), random.below(32)),
        _ => format!("fd00::{:x}", random.below(64)),
    }
    .parse()
    .expect("an address")
}

/// A world, twice: as the compiler has it and as it is.
struct World {
    compiler: Compiler,
    tiers: Vec<Tier>,
    policies: BTreeMap<PolicyId, Policy>,
    namespaces: BTreeMap<String, Labels>,
    endpoints: BTreeMap<IpAddr, (EndpointFacts, IdentityId)>,
    host: IpAddr,
    host_facts: Option<(EndpointFacts, IdentityId)>,
}

impl World {
    fn new(random: &mut Random) -> World {
        let mut world = World {
            compiler: Compiler::new(),
            tiers: builtin_tiers(),
            policies: BTreeMap::new(),
            namespaces: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            host: "10.0.0.1".parse().expect("an address"),
            host_facts: None,
        };
        let default = *random.pick(&[TierDefault::Deny, TierDefault::Pass]);
        let own = Tier { name: "own".to_owned(), order: *random.pick(&[5, 700_000, 20_000_000]), default };
        world.tiers.push(own.clone());
        world.compiler.change(&[], Vec::new(), vec![own]);
        world.compiler.set_address(NETWORK, world.host, Some(Owner::Host));
        for _ in 0..14 {
            world.add_endpoint(random);
        }
        world
    }

    fn add_endpoint(&mut self, random: &mut Random) {
        let (address, facts) = (address(random), facts(random));
        if address == self.host {
            return;
        }
        let identity = self.compiler.acquire(&facts);
        self.compiler.set_address(NETWORK, address, Some(Owner::Identity(identity)));
        if let Some((_, before)) = self.endpoints.insert(address, (facts, identity)) {
            self.compiler.release(before);
        }
    }

    fn change(&mut self, random: &mut Random) {
        match random.below(8) {
            0..=2 => {
                let policies = random.some(2, |random| {
                    let name = random.below(8);
                    policy(random, name)
                });
                let mut by_id = BTreeMap::new();
                policies.into_iter().for_each(|policy| {
                    by_id.insert(policy.id.clone(), policy);
                });
                let own = self.compiler.own_tiers();
                self.compiler.change(&[], by_id.values().cloned().collect(), own);
                self.policies.append(&mut by_id);
            }
            3 => {
                if let Some(id) = self.policies.keys().nth(random.below(8)).cloned() {
                    self.policies.remove(&id);
                    let own = self.compiler.own_tiers();
                    self.compiler.change(&[id], Vec::new(), own);
                }
            }
            4 => self.add_endpoint(random),
            5 => {
                // This node is another one, or nobody says which.
                let facts = EndpointFacts { namespace: None, labels: labels(random), ports: Vec::new() };
                let now = (!random.one_in(3)).then(|| (facts.clone(), self.compiler.acquire(&facts)));
                self.compiler.set_host_node(now.as_ref().map(|(_, identity)| *identity));
                if let Some((_, before)) = std::mem::replace(&mut self.host_facts, now) {
                    self.compiler.release(before);
                }
            }
            6 => {
                let name = *random.pick(&NAMESPACES);
                let mut labels = labels(random);
                labels.insert("kubernetes.io/metadata.name".to_owned(), name.to_owned());
                self.namespaces.insert(name.to_owned(), labels.clone());
                self.compiler.set_namespace(name, Some(labels));
            }
            _ => {
                if let Some(&address) = self.endpoints.keys().nth(random.below(12)) {
                    let (_, identity) = self.endpoints.remove(&address).expect("one of the keys");
                    self.compiler.set_address(NETWORK, address, None);
                    self.compiler.release(identity);
                }
            }
        }
    }

    fn end(&self, random: &mut Random) -> End {
        let address = match random.below(8) {
            0 => self.host,
            1 => address(random),
            _ => *self.endpoints.keys().nth(random.below(self.endpoints.len())).expect("an endpoint"),
        };
        let who = match self.endpoints.get(&address) {
            _ if address == self.host => Who::Host(self.host_facts.as_ref().map(|(facts, _)| facts.clone())),
            Some((facts, _)) => {
                let labels = facts.namespace.as_ref().map(|name| self.compiler.namespace_labels(name));
                Who::Endpoint(facts.clone(), labels.unwrap_or_default())
            }
            None => Who::World,
        };
        End { who, address }
    }

    /// What the tables say, as the data path reads them.
    fn compiled(&self, direction: Direction, own: &End, other: &End, purpose: Purpose) -> bool {
        let subject = match &own.who {
            Who::Endpoint(facts, _) if facts.namespace.is_some() => {
                self.compiler.subject(self.endpoints[&own.address].1)
            }
            Who::Host(_) => self.compiler.host_subject(),
            _ => return true,
        };
        let set = if direction == Direction::Ingress { subject.ingress } else { subject.egress };
        let class = self.compiler.classes().lookup(NETWORK, other.address);
        set.is_none_or(|set| set.judge(class, other.address, purpose.protocol, purpose.port).is_allowed)
    }

    /// Compares both for one connection; true if it is allowed.
    fn check(&self, policies: &[Policy], random: &mut Random) -> bool {
        let (from, to) = (self.end(random), self.end(random));
        let purpose = match random.below(4) {
            0 => Purpose {
                protocol: *random.pick(&[1, 58]),
                port: (random.below(10) as u16) << 8 | random.below(3) as u16,
            },
            1 => Purpose { protocol: *random.pick(&PROTOCOLS), port: random.below(65_536) as u16 },
            _ => Purpose { protocol: *random.pick(&[6, 17, 132]), port: *random.pick(&PORTS) },
        };
        let mut is_allowed = true;
        for (direction, own, other) in [(Direction::Egress, &from, &to), (Direction::Ingress, &to, &from)] {
            let naive = naive::allows(&self.tiers, policies, direction, own, other, purpose);
            let compiled = self.compiled(direction, own, other, purpose);
            assert_eq!(
                compiled, naive,
                "{direction:?} of {own:?} with {other:?} for {purpose:?} under {policies:#?} and {:?}",
                self.tiers
            );
            is_allowed &= naive;
        }
        is_allowed
    }
}

#[test]
fn a_million_random_connections_are_judged_as_the_naive_evaluator_does() {
    const WORLDS: usize = 250;
    const CHANGES: usize = 40;
    const CONNECTIONS: usize = 100;
    let mut random = Random(0x5eed);
    let (mut allowed, mut all) = (0, 0);
    for _ in 0..WORLDS {
        let mut world = World::new(&mut random);
        for _ in 0..CHANGES {
            world.change(&mut random);
            let policies: Vec<Policy> = world.policies.values().cloned().collect();
            for _ in 0..CONNECTIONS {
                all += 1;
                allowed += usize::from(world.check(&policies, &mut random));
            }
        }
    }
    println!("{all} connections, {allowed} allowed");
    assert_eq!(all, 1_000_000);
    // A generator that denies or allows about everything would show little.
    assert!((all / 5..all * 4 / 5).contains(&allowed), "{allowed} of {all}");
}

/// Six pods of a routed switch, as the naive evaluator sees them.
struct Talk {
    switch: Switch,
    pods: Vec<(PortId, EndpointFacts)>,
    policies: BTreeMap<PolicyId, Policy>,
    /// Who began, with which ports, source first.
    connections: BTreeSet<(usize, usize, (u16, u16))>,
}

impl Talk {
    fn new() -> Talk {
        let mut switch = Switch::new();
        switch.ask_json(r#"{"op":"network_add","name":"pods","vni":7,"subnets":["10.0.0.0/8"]}"#).unwrap();
        let pods = (0..6_usize).map(|number| {
            let mut spec = PortSpec::new(format!("p{number}"), crate::mac(number as u8 + 1));
            spec.network = Some("pods".to_owned());
            spec.addresses = vec![Talk::address(number)];
            spec.labels.insert("app".to_owned(), (number % 4).to_string());
            let Answer::Port(info) = switch.ask(Request::PortAdd(spec)) else { panic!("no port") };
            let labels = Labels::from([("app".to_owned(), (number % 4).to_string())]);
            (info.id, EndpointFacts { namespace: Some("default".to_owned()), labels, ports: Vec::new() })
        });
        let pods = pods.collect();
        Talk { switch, pods, policies: BTreeMap::new(), connections: BTreeSet::new() }
    }

    fn address(number: usize) -> IpAddr {
        format!("10.0.0.{}", number + 1).parse().unwrap()
    }

    /// Another policy, or one less.
    fn change(&mut self, random: &mut Random) {
        let name = format!("p{}", random.below(4));
        if random.one_in(4) {
            let id = PolicyId { kind: Kind::NetworkPolicy, namespace: Some("default".to_owned()), name: name.clone() };
            if self.policies.remove(&id).is_some() {
                let delete =
                    format!(r#"{{"op":"policy_delete","objects":[{{"kind":"NetworkPolicy","name":"{name}"}}]}}"#);
                self.switch.ask_json(&delete).unwrap();
            }
            return;
        }
        let app = |random: &mut Random| format!("{{matchLabels: {{app: \"{}\"}}}}", random.below(4));
        let rules = |random: &mut Random, field: &str| {
            let rule = |random: &mut Random| {
                let peers = [format!("{field}: [{{podSelector: {}}}], ", app(random)), String::new()];
                let port = *random.pick(&[53, 80, 1000]);
                format!("{{{}ports: [{{protocol: UDP, port: {port}}}]}}", random.pick(&peers))
            };
            random.some(2, rule).join(", ")
        };
        let text = format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}}}\nspec:\n  podSelector: {}\n  policyTypes: [{}]\n  ingress: [{}]\n  egress: [{}]\n",
            app(random),
            random.pick(&["Ingress", "Egress", "Ingress, Egress"]),
            rules(random, "from"),
            rules(random, "to"),
        );
        for read in vswitch_policy::read("model", &text).unwrap() {
            let vswitch_policy::Object::Policy(policy) = read.object else { panic!("no policy") };
            self.policies.insert(policy.id.clone(), policy);
        }
        let documents = vec![PolicyDocument { file: "model".to_owned(), text }];
        self.switch.ask(Request::PolicyApply { documents, dry_run: false });
    }

    /// One datagram; true if both the switch and the oracle let it pass.
    fn send(&mut self, random: &mut Random) -> bool {
        let (from, to) = (random.below(6), random.below(6));
        if from == to {
            return false;
        }
        let ports = (*random.pick(&[53, 80, 1000]), *random.pick(&[53, 80, 1000]));
        let policies: Vec<Policy> = self.policies.values().cloned().collect();
        let end = |number: usize| End {
            who: Who::Endpoint(
                self.pods[number].1.clone(),
                Labels::from([("kubernetes.io/metadata.name".to_owned(), "default".to_owned())]),
            ),
            address: Talk::address(number),
        };
        let allows = |from: usize, to: usize, port: u16| {
            naive::is_allowed(&builtin_tiers(), &policies, &end(from), &end(to), Purpose { protocol: 17, port })
        };
        let (there, back) = ((from, to, ports), (to, from, (ports.1, ports.0)));
        let known = [there, back].into_iter().find(|one| self.connections.contains(one));
        let expected = match known {
            Some(one) => allows(one.0, one.1, one.2.1),
            None => allows(from, to, ports.1),
        };
        match (known, expected) {
            (Some(one), false) => drop(self.connections.remove(&one)),
            (None, true) => drop(self.connections.insert(there)),
            _ => {}
        }
        let frame = frames::packet(
            Ends { from: crate::mac(from as u8 + 1), to: GATEWAY_MAC },
            &Talk::address(from).to_string(),
            &Talk::address(to).to_string(),
            ports,
            Layer4::Udp,
            b"x",
        );
        let reason = self.switch.drop_of(self.pods[from].0, &frame);
        assert_eq!(
            self.switch.take(self.pods[to].0).len(),
            usize::from(expected),
            "{there:?} {known:?} {reason:?} {policies:#?}"
        );
        expected
    }
}

#[test]
fn packets_pass_as_the_naive_evaluator_and_a_set_of_connections_say() {
    let mut random = Random(77);
    let (mut passed, mut all) = (0, 0);
    for _ in 0..25 {
        let mut talk = Talk::new();
        for _ in 0..20 {
            talk.change(&mut random);
            for _ in 0..60 {
                all += 1;
                passed += usize::from(talk.send(&mut random));
            }
        }
    }
    println!("{all} packets, {passed} passed");
    assert!((all / 5..all * 4 / 5).contains(&passed), "{passed} of {all}");
}
