//! The one model that all policy objects become.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::selector::{Labels, Selector};

/// Protocol numbers (IANA) that rules name.
pub mod protocol {
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMPv6.
    pub const ICMPV6: u8 = 58;
    /// SCTP.
    pub const SCTP: u8 = 132;
}

/// Into the subject, or out of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// Connections to the subject.
    Ingress,
    /// Connections that the subject opens.
    Egress,
}

/// What a rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// Allows; no further rule is looked at.
    Allow,
    /// Denies; no further rule is looked at.
    Deny,
    /// Goes on with the next tier.
    Pass,
    /// Tells of the connection, and goes on with the next rule.
    Log,
}

/// What an object is called.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PolicyId {
    /// Its kind.
    pub kind: crate::object::Kind,
    /// Its namespace; none for an object of the cluster.
    pub namespace: Option<String>,
    /// Its name.
    pub name: String,
}

/// Where an object was written.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Source {
    /// The file, as the sender called it.
    pub file: String,
    /// The line it begins at, from 1.
    pub line: u32,
}

/// A policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// What it is called.
    pub id: PolicyId,
    /// Where it was written.
    pub source: Source,
    /// The name of its tier.
    pub tier: String,
    /// Its place in the tier: lower comes first.
    pub order: i64,
    /// To whom it applies.
    pub subject: Subject,
    /// Rules for connections to the subject; none if it does not speak of them.
    pub ingress: Option<Vec<Rule>>,
    /// Rules for connections that the subject opens; none if it does not speak of them.
    pub egress: Option<Vec<Rule>>,
    /// Host policies: whether they also judge what the host only forwards.
    pub applies_on_forward: bool,
}

/// A tier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tier {
    /// Its name.
    pub name: String,
    /// Its place: lower comes first.
    pub order: i64,
    /// What happens to what no rule of it matched.
    pub default: TierDefault,
}

/// What happens to a subject's connections that no rule of a tier matched, if a policy of the tier selects it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TierDefault {
    /// The next tier decides.
    Pass,
    /// They are denied.
    Deny,
}

/// To whom a policy applies.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Subject {
    /// Pods.
    Pods {
        /// Of these namespaces.
        namespaces: NamespaceMatch,
        /// With these labels.
        pods: Selector,
    },
    /// This node's own stack.
    Host,
}

/// Which namespaces.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NamespaceMatch {
    /// One, by name.
    Name(String),
    /// Those with these labels.
    Labels(Selector),
}

/// A rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Its name, if it has one.
    pub name: Option<String>,
    /// Where it was written.
    pub line: u32,
    /// Where it is in the object, as `spec.ingress[0]`.
    pub path: String,
    /// What it does.
    pub action: Action,
    /// With whom; none for everybody.
    pub peers: Option<Vec<Peer>>,
    /// Of what; none for everything.
    pub ports: Option<Vec<PortMatch>>,
}

/// The other side of a connection.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Peer {
    /// Pods.
    Pods {
        /// Of these namespaces.
        namespaces: NamespaceMatch,
        /// With these labels.
        pods: Selector,
    },
    /// Addresses.
    Cidr {
        /// All of these,
        cidr: IpNet,
        /// but not those.
        except: Vec<IpNet>,
    },
    /// Nodes of the cluster.
    Nodes(Selector),
}

/// What a connection is for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PortMatch {
    /// Ports of a protocol, both ends included.
    Ports {
        /// The protocol's number.
        protocol: u8,
        /// The first.
        first: u16,
        /// The last.
        last: u16,
    },
    /// The port that the receiving pod calls so.
    Named {
        /// Its name.
        name: String,
        /// Its protocol; none for any.
        protocol: Option<u8>,
    },
    /// ICMP messages.
    Icmp(IcmpMatch),
    /// All of a protocol.
    Protocol(u8),
}

/// ICMP messages of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IcmpMatch {
    /// ICMP or ICMPv6, by number.
    pub protocol: u8,
    /// The type; none for all.
    pub kind: Option<u8>,
    /// The code; none for all.
    pub code: Option<u8>,
}

/// A port that a pod has a name for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamedPort {
    /// The name.
    pub name: String,
    /// The protocol's number.
    pub protocol: u8,
    /// The port.
    pub port: u16,
}

/// What policies may ask of a pod or a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointFacts {
    /// Its namespace; none for a node.
    pub namespace: Option<String>,
    /// Its labels.
    pub labels: Labels,
    /// Its named ports, sorted.
    pub ports: Vec<NamedPort>,
}

/// What policies may ask of a peer: who it is, if it is anybody known, and its address.
#[derive(Clone, Copy, Debug)]
pub struct PeerFacts<'a> {
    /// The pod or node, with its namespace's labels.
    pub endpoint: Option<(&'a EndpointFacts, &'a Labels)>,
    /// Its address.
    pub address: IpAddr,
}

impl NamespaceMatch {
    /// True for a namespace of this name, with these labels.
    pub fn matches(&self, name: &str, labels: &Labels) -> bool {
        match self {
            NamespaceMatch::Name(only) => only == name,
            NamespaceMatch::Labels(selector) => selector.matches(labels),
        }
    }
}

impl Subject {
    /// True if a pod is meant.
    pub fn selects(&self, endpoint: &EndpointFacts, namespace_labels: &Labels) -> bool {
        match self {
            Subject::Pods { namespaces, pods } => is_pod(namespaces, pods, endpoint, namespace_labels),
            Subject::Host => false,
        }
    }
}

impl Peer {
    /// True if a pod or node is meant. Addresses are [`holds`](Self::holds)'s.
    pub fn selects(&self, endpoint: &EndpointFacts, namespace_labels: &Labels) -> bool {
        match self {
            Peer::Pods { namespaces, pods } => is_pod(namespaces, pods, endpoint, namespace_labels),
            Peer::Nodes(selector) => endpoint.namespace.is_none() && selector.matches(&endpoint.labels),
            Peer::Cidr { .. } => false,
        }
    }

    /// True if an address is meant.
    pub fn holds(&self, address: IpAddr) -> bool {
        match self {
            Peer::Cidr { cidr, except } => {
                cidr.contains(&address) && !except.iter().any(|except| except.contains(&address))
            }
            Peer::Pods { .. } | Peer::Nodes(_) => false,
        }
    }

    /// True if this is the peer.
    pub fn matches(&self, peer: PeerFacts<'_>) -> bool {
        self.holds(peer.address) || peer.endpoint.is_some_and(|(endpoint, labels)| self.selects(endpoint, labels))
    }
}

fn is_pod(namespaces: &NamespaceMatch, pods: &Selector, endpoint: &EndpointFacts, namespace_labels: &Labels) -> bool {
    endpoint.namespace.as_ref().is_some_and(|name| namespaces.matches(name, namespace_labels))
        && pods.matches(&endpoint.labels)
}

impl Policy {
    /// Its rules of one direction; none if it does not speak of it.
    pub fn rules(&self, direction: Direction) -> Option<&[Rule]> {
        match direction {
            Direction::Ingress => self.ingress.as_deref(),
            Direction::Egress => self.egress.as_deref(),
        }
    }
}

impl std::fmt::Display for PolicyId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{} {namespace}/{}", self.kind.name(), self.name),
            None => write!(f, "{} {}", self.kind.name(), self.name),
        }
    }
}

/// The tiers that are always there.
///
/// | name | order | default | holds |
/// |---|---|---|---|
/// | `admin` | 1,000 | pass | AdminNetworkPolicy, ClusterNetworkPolicy of tier Admin |
/// | `switch` | 500,000 | pass | SwitchPolicy that names no tier |
/// | `networkpolicy` | 1,000,000 | deny | NetworkPolicy |
/// | `baseline` | 10,000,000 | pass | BaselineAdminNetworkPolicy, ClusterNetworkPolicy of tier Baseline |
pub fn builtin_tiers() -> Vec<Tier> {
    let tier = |name: &str, order, default| Tier { name: name.to_owned(), order, default };
    vec![
        tier(ADMIN, 1_000, TierDefault::Pass),
        tier(SWITCH, 500_000, TierDefault::Pass),
        tier(NETWORK_POLICY, 1_000_000, TierDefault::Deny),
        tier(BASELINE, 10_000_000, TierDefault::Pass),
    ]
}

pub(crate) const ADMIN: &str = "admin";
pub(crate) const SWITCH: &str = "switch";
pub(crate) const NETWORK_POLICY: &str = "networkpolicy";
pub(crate) const BASELINE: &str = "baseline";
