//! A page of obvious code: what policies mean, without tables. The oracle of the compiled ones.

use std::net::IpAddr;

use ipnet::IpNet;
use vswitch_policy::{
    Action, Direction, EndpointFacts, Labels, NamedPort, NamespaceMatch, Operator, Peer, Policy, PortMatch, Rule,
    Selector, Subject, Tier, TierDefault,
};

/// One end of a connection.
#[derive(Clone, Debug)]
pub enum Who {
    /// A pod or another node, with the labels of its namespace.
    Endpoint(EndpointFacts, Labels),
    /// This node's own stack, and what was told of the node.
    Host(Option<EndpointFacts>),
    /// Nobody that is known.
    World,
}

/// One end and its address.
#[derive(Clone, Debug)]
pub struct End {
    /// Who it is.
    pub who: Who,
    /// Its address.
    pub address: IpAddr,
}

/// What a connection is for: protocol number, and port or ICMP type and code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Purpose {
    /// Protocol number.
    pub protocol: u8,
    /// Port, or ICMP type in the high byte and code in the low one.
    pub port: u16,
}

/// True if both ends allow a connection.
pub fn is_allowed(tiers: &[Tier], policies: &[Policy], from: &End, to: &End, purpose: Purpose) -> bool {
    allows(tiers, policies, Direction::Egress, from, to, purpose)
        && allows(tiers, policies, Direction::Ingress, to, from, purpose)
}

/// True if the policies of `own` allow a connection with `other`.
pub fn allows(
    tiers: &[Tier],
    policies: &[Policy],
    direction: Direction,
    own: &End,
    other: &End,
    purpose: Purpose,
) -> bool {
    let is_with_node = matches!(other.who, Who::Host(_)) && matches!(own.who, Who::Endpoint(..));
    if is_with_node && direction == Direction::Ingress {
        return true;
    }
    let mut tiers: Vec<&Tier> = tiers.iter().collect();
    tiers.sort_by_key(|tier| (tier.order, &tier.name));
    'tiers: for tier in tiers {
        if is_with_node && tier.name == "networkpolicy" {
            continue;
        }
        let is_meant = |policy: &&Policy| {
            policy.tier == tier.name && policy.rules(direction).is_some() && selects(&policy.subject, &own.who)
        };
        let mut meant: Vec<&Policy> = policies.iter().filter(is_meant).collect();
        meant.sort_by_key(|policy| (policy.order, &policy.id));
        for rule in meant.iter().flat_map(|policy| policy.rules(direction).unwrap_or_default()) {
            // Ports have names at the end that receives.
            let receiver = if direction == Direction::Ingress { own } else { other };
            if !is_for(rule, other) || !is_about(rule, receiver, purpose) {
                continue;
            }
            match rule.action {
                Action::Allow => return true,
                Action::Deny => return false,
                Action::Pass => continue 'tiers,
                Action::Log => {}
            }
        }
        if !meant.is_empty() && tier.default == TierDefault::Deny {
            return false;
        }
    }
    true
}

fn selects(subject: &Subject, who: &Who) -> bool {
    match (subject, who) {
        (Subject::Pods { namespaces, pods }, Who::Endpoint(facts, labels)) => is_pod(namespaces, pods, facts, labels),
        (Subject::Host, Who::Host(_)) => true,
        _ => false,
    }
}

fn is_for(rule: &Rule, other: &End) -> bool {
    let Some(peers) = &rule.peers else { return true };
    peers.iter().any(|peer| match (peer, &other.who) {
        (Peer::Cidr { cidr, except }, _) => {
            is_in(*cidr, other.address) && !except.iter().any(|except| is_in(*except, other.address))
        }
        (Peer::Pods { namespaces, pods }, Who::Endpoint(facts, labels)) => is_pod(namespaces, pods, facts, labels),
        (Peer::Nodes(selector), Who::Endpoint(facts, _) | Who::Host(Some(facts))) => {
            facts.namespace.is_none() && meets(selector, &facts.labels)
        }
        _ => false,
    })
}

fn is_pod(namespaces: &NamespaceMatch, pods: &Selector, facts: &EndpointFacts, labels: &Labels) -> bool {
    let Some(namespace) = &facts.namespace else { return false };
    let is_there = match namespaces {
        NamespaceMatch::Name(name) => name == namespace,
        NamespaceMatch::Labels(selector) => meets(selector, labels),
    };
    is_there && meets(pods, &facts.labels)
}

fn meets(selector: &Selector, labels: &Labels) -> bool {
    selector.requirements.iter().all(|requirement| {
        let value = labels.get(&requirement.key);
        match &requirement.operator {
            Operator::In(values) => values.iter().any(|one| Some(one) == value),
            Operator::NotIn(values) => !values.iter().any(|one| Some(one) == value),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    })
}

/// Bit by bit.
fn is_in(prefix: IpNet, address: IpAddr) -> bool {
    let bits = |address: IpAddr| match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()) << 96,
        IpAddr::V6(v6) => v6.to_bits(),
    };
    let (one, other) = (bits(prefix.addr()), bits(address));
    prefix.addr().is_ipv4() == address.is_ipv4()
        && (0..prefix.prefix_len()).all(|bit| one << bit >> 127 == other << bit >> 127)
}

fn is_about(rule: &Rule, receiver: &End, purpose: Purpose) -> bool {
    let names: &[NamedPort] = if let Who::Endpoint(facts, _) = &receiver.who { &facts.ports } else { &[] };
    let Purpose { protocol, port } = purpose;
    rule.ports.as_ref().is_none_or(|ports| {
        ports.iter().any(|one| match one {
            PortMatch::Ports { protocol: wanted, first, last } => {
                *wanted == protocol && (*first..=*last).contains(&port)
            }
            PortMatch::Protocol(wanted) => *wanted == protocol,
            PortMatch::Named { name, protocol: wanted } => names.iter().any(|named| {
                named.name == *name
                    && named.protocol == protocol
                    && named.port == port
                    && wanted.is_none_or(|wanted| wanted == protocol)
            }),
            PortMatch::Icmp(icmp) => {
                icmp.protocol == protocol
                    && icmp.kind.is_none_or(|kind| u16::from(kind) == port >> 8)
                    && icmp.code.is_none_or(|code| u16::from(code) == port & 0xff)
            }
        })
    })
}
