//! Policies for benches: as many rules as wanted, compiled as control does it.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net};
use vswitch_control::policy::{Compiler, IdentityId, Owner};
use vswitch_dataplane::Snapshot;
use vswitch_net::{NetworkIndex, PortId};
use vswitch_policy::{
    Action, EndpointFacts, Kind, Labels, NamespaceMatch, Operator, Peer, Policy, PolicyId, PortMatch, Requirement,
    Rule, Selector, Source, Subject,
};

const NETWORK: NetworkIndex = NetworkIndex(0);

/// What rules name as their peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// Labels: each rule another pod's.
    Labels,
    /// Prefixes of lengths from 20 to 32: each rule another one.
    Prefixes,
}

/// A compiler with rules and peers.
#[derive(Debug)]
pub struct Policies {
    /// The compiler.
    pub compiler: Compiler,
    /// The pod whose policies they are.
    pub subject: IdentityId,
    /// An address that each rule is for.
    pub peers: Vec<IpAddr>,
}

/// The facts of a pod that is called by a number.
pub fn facts(number: usize) -> EndpointFacts {
    EndpointFacts {
        namespace: Some("bench".to_owned()),
        labels: Labels::from([("app".to_owned(), number.to_string())]),
        ports: Vec::new(),
    }
}

/// Pods with one label of a value.
pub fn selector(value: &str) -> Selector {
    Selector::new(vec![Requirement { key: "app".to_owned(), operator: Operator::In(vec![value.to_owned()]) }])
}

/// A policy of one namespace that lets peers in and out at a port each.
pub fn policy(name: &str, pods: Selector, peers: &[Peer]) -> Policy {
    let rule = |(at, peer): (usize, &Peer)| Rule {
        name: None,
        line: at as u32,
        path: format!("spec.ingress[{at}]"),
        action: Action::Allow,
        peers: Some(vec![peer.clone()]),
        ports: Some(vec![PortMatch::Ports { protocol: 17, first: 80, last: 120 }]),
    };
    let rules: Vec<Rule> = peers.iter().enumerate().map(rule).collect();
    Policy {
        id: PolicyId { kind: Kind::NetworkPolicy, namespace: Some("bench".to_owned()), name: name.to_owned() },
        source: Source::default(),
        tier: "networkpolicy".to_owned(),
        order: 0,
        subject: Subject::Pods { namespaces: NamespaceMatch::Name("bench".to_owned()), pods },
        ingress: Some(rules.clone()),
        egress: Some(rules),
        applies_on_forward: false,
    }
}

/// Pods of the namespace with a selector.
pub fn pods(selector: Selector) -> Peer {
    Peer::Pods { namespaces: NamespaceMatch::Name("bench".to_owned()), pods: selector }
}

impl Policies {
    /// `rules` rules for both pods of a rig, which let them meet each other, among others.
    ///
    /// # Panics
    ///
    /// If a prefix is none.
    pub fn new(rules: usize, by: By) -> Policies {
        let mut compiler = Compiler::new();
        let address = |number: usize| IpAddr::V4(Ipv4Addr::from_bits(0x0b00_0000 + ((number as u32) << 8)));
        let subject = compiler.acquire(&facts(0));
        // The pods of the rig have one identity, the one on the other node too.
        for own in [[10, 1, 0, 1], [10, 1, 0, 2], [10, 2, 0, 9]] {
            let own = IpAddr::from(own);
            compiler.set_address(NETWORK, own, Some(Owner::Identity(subject)));
        }
        let mut peers = Vec::new();
        let mut named = Vec::new();
        for number in 1..=rules {
            let at = address(number);
            peers.push(at);
            match by {
                By::Labels => {
                    let identity = compiler.acquire(&facts(number));
                    compiler.set_address(NETWORK, at, Some(Owner::Identity(identity)));
                    named.push(pods(selector(&number.to_string())));
                }
                By::Prefixes => {
                    let IpAddr::V4(v4) = at else { continue };
                    let prefix = Ipv4Net::new(v4, 20 + (number % 13) as u8).expect("a prefix").trunc();
                    named.push(Peer::Cidr { cidr: IpNet::V4(prefix), except: Vec::new() });
                }
            }
        }
        // The other pod of the rig is the last of them.
        named.push(pods(selector("0")));
        compiler.change(&[], vec![policy("bench", selector("0"), &named)], Vec::new());
        Policies { compiler, subject, peers }
    }

    /// Puts the policies into a snapshot, for these ports.
    pub fn hold(&self, snapshot: &mut Snapshot, ports: [PortId; 2]) {
        for port in ports {
            if let Some(Some(port)) = snapshot.ports.get_mut(port.index()) {
                Arc::make_mut(port).policy = self.compiler.subject(self.subject);
            }
        }
        snapshot.classes = self.compiler.classes().clone();
        snapshot.rules = self.compiler.rule_limit();
    }
}
