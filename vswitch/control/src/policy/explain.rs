//! Why a connection may begin or not: the same rules as compiled, read one by one.
//!
//! The verdict is the tables'; the reasons are found by walking the policies that the tables were made of, in order. Should
//! the two ever disagree, the answer says so.

use std::net::{IpAddr, SocketAddr};

use vswitch_api::{ApiError, ExplainInfo, ExplainSpec, ExplainedEnd, ExplainedRule};
use vswitch_net::{NetworkIndex, PortId};
use vswitch_policy::{
    Action, Direction, EndpointFacts, IcmpMatch, Labels, NamedPort, NamespaceMatch, Peer, PeerFacts, PortMatch, Rule,
    Selector, TierDefault, protocol,
};

use super::compiler::Owner;
use super::connections::protocol_number;
use super::requests::{action_name, direction_name};
use super::row::protocol_name;
use super::set::Numbered;
use super::store::name_of;
use crate::Control;
use crate::checks::invalid;
use crate::desired::not_found;

/// An end of a connection that was asked about.
struct End {
    text: String,
    network: Option<NetworkIndex>,
    address: IpAddr,
    who: Who,
}

enum Who {
    Port(PortId),
    Host,
    /// Known, and elsewhere.
    Endpoint(EndpointFacts),
    World,
}

/// What a connection is for.
#[derive(Clone, Copy)]
struct Purpose {
    protocol: u8,
    port: u16,
}

impl Control {
    pub(crate) fn explain(&self, spec: &ExplainSpec) -> Result<ExplainInfo, ApiError> {
        let (mut from, mut to) = (self.end("from", &spec.from)?, self.end("to", &spec.to)?);
        let network = match (from.network, to.network) {
            (Some(one), Some(other)) if one != other => {
                return Err(invalid(format!(
                    "{} is in network \"{}\" and {} in \"{}\": networks do not meet",
                    from.text,
                    self.desired.network_name(one),
                    to.text,
                    self.desired.network_name(other)
                )));
            }
            (Some(network), _) | (None, Some(network)) => network,
            (None, None) => self.desired.network(None)?.index,
        };
        self.same_family(&mut from, &mut to)?;
        let purpose = purpose(&spec.port, from.address.is_ipv6())?;
        let asked = SocketAddr::new(to.address, purpose.port);
        if let Some(service) = self.service_at(network, asked, purpose.protocol) {
            let protocol = protocol_name(purpose.protocol);
            let asking = |end: &SocketAddr| format!("--to {} --port {protocol}/{}", end.ip(), end.port());
            let backends: Vec<String> = service.backends.iter().map(asking).collect();
            return Err(invalid(format!(
                "to: {asked} is service \"{}\", and policies speak of who answers for it: ask with {}",
                service.name,
                if backends.is_empty() { "a backend, when it has any".to_owned() } else { backends.join(", or ") }
            )));
        }
        let ends = vec![
            self.explain_end(Direction::Egress, network, &from, &to, purpose),
            self.explain_end(Direction::Ingress, network, &to, &from, purpose),
        ];
        let is_allowed = ends.iter().all(|end| end.is_allowed);
        let remedy = ends.iter().find(|end| !end.is_allowed).map(|end| self.remedy(end, &from, &to, purpose));
        Ok(ExplainInfo {
            is_allowed,
            from: format!("{} ({})", from.text, from.address),
            to: format!("{} ({})", to.text, to.address),
            port: purpose.to_string(),
            ends,
            remedy,
        })
    }

    /// Who is meant: a pod by name, a link, an address, or this node.
    fn end(&self, field: &str, text: &str) -> Result<End, ApiError> {
        if text == "host" {
            let network = self.host_network().ok_or_else(|| {
                not_found(format!("{field}: this node is in no network: set `host.network` of the configuration"))
            })?;
            let own = crate::routes::routers(&network.spec);
            let address = *own.first().ok_or_else(|| not_found(format!("{field}: this node has no address there")))?;
            return Ok(End { text: "host".to_owned(), network: Some(network.index), address, who: Who::Host });
        }
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(self.end_at(address));
        }
        let is_named = |id: PortId| {
            self.policy.port(id).is_some_and(|(name, ..)| name.to_string() == text)
                || self.desired.ports.get(&id).is_some_and(|port| port.record.spec.link == text)
        };
        if let Some((&id, port)) = self.desired.ports.iter().find(|(id, _)| is_named(**id)) {
            let Some(&address) = port.record.spec.addresses.first() else {
                return Err(invalid(format!("{field}: {text} has no address that is known: name one")));
            };
            let name = self.policy.port(id).map_or_else(|| text.to_owned(), |(name, ..)| name.to_string());
            return Ok(End { text: name, network: Some(port.network), address, who: Who::Port(id) });
        }
        if let Some((name, endpoint, facts, _)) = self
            .policy
            .endpoints()
            .find(|(name, ..)| name.to_string() == text || (name.namespace.is_none() && name.name == text))
        {
            let Some(&address) = endpoint.addresses.first() else {
                return Err(invalid(format!("{field}: {text} has no address that is known yet")));
            };
            let network = self.desired.network(endpoint.network.as_deref()).ok().map(|network| network.index);
            return Ok(End { text: name.to_string(), network, address, who: Who::Endpoint(facts.clone()) });
        }
        Err(not_found(format!(
            "{field}: there is no \"{text}\": name NAMESPACE/POD, a link, an address or host (see `switchctl endpoint list`)"
        )))
    }

    fn end_at(&self, address: IpAddr) -> End {
        let networks: Vec<NetworkIndex> = self.desired.networks.values().map(|network| network.index).collect();
        let owner = networks.iter().find_map(|&network| Some((network, self.policy.compiler.owner(network, address)?)));
        let port = self.desired.ports.iter().find(|(_, port)| port.record.spec.addresses.contains(&address));
        let (network, who) = match (port, owner) {
            (_, Some((network, Owner::Host))) => (Some(network), Who::Host),
            (Some((&id, port)), _) => (Some(port.network), Who::Port(id)),
            (None, Some((network, Owner::Identity(identity)))) => {
                let facts = self.policy.compiler.facts(identity).cloned().unwrap_or_default();
                (Some(network), Who::Endpoint(facts))
            }
            (None, None) => (None, Who::World),
        };
        let name = network.and_then(|network| self.policy.name_at(network, address));
        End { text: name.unwrap_or_else(|| "world".to_owned()), network, address, who }
    }

    /// Both ends have addresses of one family, if they can.
    fn same_family(&self, from: &mut End, to: &mut End) -> Result<(), ApiError> {
        let addresses = |end: &End| match end.who {
            Who::Port(id) => self.desired.ports.get(&id).map(|port| port.record.spec.addresses.clone()),
            Who::Host => self.host_network().map(|network| crate::routes::routers(&network.spec)),
            _ => None,
        };
        for (one, other) in [(0, 1), (1, 0)] {
            let ends = [&*from, &*to];
            let wanted = ends[other].address.is_ipv6();
            if ends[one].address.is_ipv6() == wanted {
                return Ok(());
            }
            let found = addresses(ends[one]).into_iter().flatten().find(|address| address.is_ipv6() == wanted);
            if let Some(address) = found {
                if one == 0 {
                    from.address = address;
                } else {
                    to.address = address;
                }
                return Ok(());
            }
        }
        Err(invalid(format!("{} and {} have no addresses of one family", from.address, to.address)))
    }

    fn explain_end(
        &self,
        direction: Direction,
        network: NetworkIndex,
        own: &End,
        other: &End,
        purpose: Purpose,
    ) -> ExplainedEnd {
        let at = usize::from(direction == Direction::Egress);
        let compiler = &self.policy.compiler;
        let (set, subject) = match own.who {
            Who::Port(id) => {
                let set = self.policy.port(id).and_then(|(.., identity)| compiler.sets_of(identity)[at]);
                (set, self.policy.subject(id))
            }
            Who::Host => (compiler.host_sets()[at], compiler.host_subject()),
            // What leaves by this node's stack is forwarded by it, if policies ask for that.
            Who::World if self.host_network().is_some_and(|host| host.index == network) => {
                let forwarded = compiler.host_subject().forwarded;
                (compiler.host_sets()[2 + at], forwarded.map(|subject| (*subject).clone()).unwrap_or_default())
            }
            Who::Endpoint(_) | Who::World => (None, Default::default()),
        };
        let table = if at == 0 { &subject.ingress } else { &subject.egress };
        let class = compiler.classes().lookup(network, other.address);
        let compiled = table.as_ref().map(|set| set.judge(class, other.address, purpose.protocol, purpose.port));
        let mut end = ExplainedEnd {
            direction: direction_name(direction).to_owned(),
            endpoint: own.text.clone(),
            is_allowed: compiled.is_none_or(|judgement| judgement.is_allowed),
            reason: String::new(),
            decided_by: None,
            rules: Vec::new(),
        };
        match own.who {
            Who::Endpoint(_) => {
                end.reason = "it is on another node, whose switch judges it".to_owned();
                return end;
            }
            Who::World if set.is_none() => {
                end.reason = "it is none of ours: no policy speaks of it".to_owned();
                return end;
            }
            _ => {}
        }
        let is_with_node = matches!(other.who, Who::Host) && !matches!(own.who, Who::Host);
        if is_with_node && direction == Direction::Ingress {
            end.reason = "the node may always reach its own pods".to_owned();
            return end;
        }
        let policies = compiler.policies_of(set);
        if policies.is_empty() {
            end.reason = format!("no policy speaks of {} of {}", direction_name(direction), own.text);
            return end;
        }
        let (verdict, reason) = self.walk(&policies, direction, is_with_node, (own, other), purpose, &mut end);
        end.reason = reason;
        if verdict != end.is_allowed {
            end.reason = format!(
                "the tables say otherwise than the rules ({}): this is a defect of the switch, please report it",
                end.reason
            );
        }
        end
    }

    /// Walks policies in order, notes what was looked at, and says who decides.
    fn walk(
        &self,
        policies: &[&Numbered],
        direction: Direction,
        is_with_node: bool,
        (own, other): (&End, &End),
        purpose: Purpose,
        end: &mut ExplainedEnd,
    ) -> (bool, String) {
        let facts = |end: &End| match &end.who {
            Who::Port(id) => self.policy.port(*id).map(|(_, facts, _)| facts.clone()),
            Who::Endpoint(facts) => Some(facts.clone()),
            Who::Host | Who::World => None,
        };
        let around = |facts: &EndpointFacts| {
            facts.namespace.as_ref().map(|name| self.policy.compiler.namespace_labels(name)).unwrap_or_default()
        };
        let peer = facts(other).map(|facts| (around(&facts), facts));
        let peer_facts =
            PeerFacts { endpoint: peer.as_ref().map(|(labels, facts)| (facts, labels)), address: other.address };
        let receiver = if direction == Direction::Ingress { facts(own) } else { facts(other) };
        let names: Vec<NamedPort> = receiver.map(|facts| facts.ports).unwrap_or_default();
        let mut spared = Vec::new();
        let mut at = 0;
        while at < policies.len() {
            let tier = &policies[at].policy.tier;
            let of_tier = policies[at..].iter().take_while(|one| one.policy.tier == *tier).count();
            let here = &policies[at..at + of_tier];
            at += of_tier;
            if is_with_node && tier == "networkpolicy" {
                spared.extend(here.iter().map(|one| one.policy.id.to_string()));
                continue;
            }
            let mut is_passed = false;
            'tier: for one in here {
                for rule in one.policy.rules(direction).unwrap_or_default() {
                    let why_not = why_not(rule, peer_facts, &names, purpose);
                    let explained = ExplainedRule {
                        object: name_of(&one.policy.id),
                        tier: tier.clone(),
                        file: one.policy.source.file.clone(),
                        line: rule.line,
                        path: rule.path.clone(),
                        action: action_name(rule.action).to_owned(),
                        is_match: why_not.is_none(),
                        why: why_not.clone().unwrap_or_else(|| "matches".to_owned()),
                    };
                    end.rules.push(explained.clone());
                    if why_not.is_some() {
                        continue;
                    }
                    let by = format!("{} {} ({}:{})", one.policy.id, rule.path, one.policy.source.file, rule.line);
                    match rule.action {
                        Action::Log => {}
                        Action::Pass => {
                            is_passed = true;
                            break 'tier;
                        }
                        Action::Allow => {
                            end.decided_by = Some(explained);
                            return (true, format!("allowed by {by}"));
                        }
                        Action::Deny => {
                            end.decided_by = Some(explained);
                            return (false, format!("denied by {by}"));
                        }
                    }
                }
            }
            let first = here[0];
            if !is_passed && first.tier_default == TierDefault::Deny {
                let names: Vec<String> = here.iter().map(|one| one.policy.id.to_string()).collect();
                return (false, format!("isolated by {}, and no rule of tier {tier} allows it", names.join(", ")));
            }
        }
        if !spared.is_empty() {
            return (true, format!("NetworkPolicies do not keep pods from their own node ({})", spared.join(", ")));
        }
        (true, "no rule matches, and what no rule matches is allowed".to_owned())
    }

    /// What would have to change for a connection to be allowed at an end.
    fn remedy(&self, end: &ExplainedEnd, from: &End, to: &End, purpose: Purpose) -> String {
        let other = if end.direction == "egress" { to } else { from };
        let preposition = if end.direction == "egress" { "to" } else { "from" };
        let wanted = format!("allows {} {purpose} {preposition} {} ({})", end.direction, other.text, other.address);
        match &end.decided_by {
            Some(rule) => format!(
                "change {} at {}:{} ({}), or put a rule before it that {wanted}",
                rule.object, rule.file, rule.line, rule.path
            ),
            None => match end.rules.iter().find(|rule| rule.why.starts_with("port")) {
                Some(near) if matches!(purpose.protocol, protocol::TCP | protocol::UDP | protocol::SCTP) => format!(
                    "add {purpose} to the ports of {} at {}:{} ({}), or another rule that {wanted}",
                    near.object, near.file, near.line, near.path
                ),
                _ => format!(
                    "add a rule that {wanted} to a policy of {}, in this tier or an earlier one (SwitchPolicy can name any protocol)",
                    end.endpoint
                ),
            },
        }
    }
}

/// Why a rule does not match; none if it does.
fn why_not(rule: &Rule, peer: PeerFacts<'_>, names: &[NamedPort], purpose: Purpose) -> Option<String> {
    if let Some(peers) = &rule.peers
        && !peers.iter().any(|one| one.matches(peer))
    {
        let reasons: Vec<String> = peers.iter().map(|one| peer_reason(one, peer)).collect();
        return Some(format!("peer: {}", reasons.join("; ")));
    }
    if let Some(ports) = &rule.ports
        && !ports.iter().any(|one| is_about(one, names, purpose))
    {
        let wanted: Vec<String> = ports.iter().map(|one| port_text(one, names)).collect();
        return Some(format!("port: {purpose} is none of {}", wanted.join(", ")));
    }
    None
}

/// Why a peer is not the one that a rule means.
fn peer_reason(wanted: &Peer, peer: PeerFacts<'_>) -> String {
    match (wanted, peer.endpoint) {
        (Peer::Cidr { cidr, except }, _) => match except.iter().find(|except| except.contains(&peer.address)) {
            Some(except) => format!("{} is in {except}, which is excepted from {cidr}", peer.address),
            None => format!("{} is not in {cidr}", peer.address),
        },
        (Peer::Nodes(_), _) => "it is no such node".to_owned(),
        (Peer::Pods { .. }, None) => "it is no pod".to_owned(),
        (Peer::Pods { namespaces, pods }, Some((facts, labels))) => {
            let namespace = facts.namespace.clone().unwrap_or_default();
            match namespaces {
                NamespaceMatch::Name(only) if *only != namespace => format!("its namespace is {namespace}, not {only}"),
                NamespaceMatch::Labels(selector) if !selector.matches(labels) => {
                    format!("its namespace {namespace} does not have {}", unmet(selector, labels))
                }
                _ => format!("it does not have {}", unmet(pods, &facts.labels)),
            }
        }
    }
}

fn unmet(selector: &Selector, labels: &Labels) -> String {
    selector.unmet(labels).map(ToString::to_string).unwrap_or_default()
}

fn is_about(wanted: &PortMatch, names: &[NamedPort], purpose: Purpose) -> bool {
    let Purpose { protocol, port } = purpose;
    match wanted {
        PortMatch::Ports { protocol: number, first, last } => *number == protocol && (*first..=*last).contains(&port),
        PortMatch::Protocol(number) => *number == protocol,
        PortMatch::Named { name, protocol: number } => names.iter().any(|named| {
            named.name == *name
                && named.protocol == protocol
                && named.port == port
                && number.is_none_or(|number| number == protocol)
        }),
        PortMatch::Icmp(IcmpMatch { protocol: number, kind, code }) => {
            *number == protocol
                && kind.is_none_or(|kind| u16::from(kind) == port >> 8)
                && code.is_none_or(|code| u16::from(code) == port & 0xff)
        }
    }
}

fn port_text(wanted: &PortMatch, names: &[NamedPort]) -> String {
    match wanted {
        PortMatch::Ports { protocol, first, last } if first == last => format!("{}/{first}", protocol_name(*protocol)),
        PortMatch::Ports { protocol, first, last } => format!("{}/{first}-{last}", protocol_name(*protocol)),
        PortMatch::Protocol(number) => protocol_name(*number),
        PortMatch::Named { name, .. } => match names.iter().find(|named| named.name == *name) {
            Some(named) => format!("\"{name}\" ({}/{})", protocol_name(named.protocol), named.port),
            None => format!("\"{name}\", which the receiver has no port of that name for"),
        },
        PortMatch::Icmp(IcmpMatch { protocol, kind: None, .. }) => protocol_name(*protocol),
        PortMatch::Icmp(IcmpMatch { protocol, kind: Some(kind), code: None }) => {
            format!("{}/{kind}", protocol_name(*protocol))
        }
        PortMatch::Icmp(IcmpMatch { protocol, kind: Some(kind), code: Some(code) }) => {
            format!("{}/{kind}/{code}", protocol_name(*protocol))
        }
    }
}

/// Pods in words.
pub(crate) fn pods_text(namespaces: &NamespaceMatch, pods: &Selector) -> String {
    let what = if pods.is_empty() { "all pods".to_owned() } else { format!("pods {pods}") };
    match namespaces {
        NamespaceMatch::Name(name) => format!("{what} of {name}"),
        NamespaceMatch::Labels(selector) if selector.is_empty() => format!("{what} of all namespaces"),
        NamespaceMatch::Labels(selector) => format!("{what} of namespaces {selector}"),
    }
}

/// Reads what a connection is for.
fn purpose(text: &str, is_v6: bool) -> Result<Purpose, ApiError> {
    let wrong = || {
        invalid(format!(
            "port: \"{text}\" is not understood: write tcp/80, udp/53, sctp/7, icmp, icmp/8/0 or a protocol's number"
        ))
    };
    let mut words = text.split('/');
    let name = words.next().unwrap_or_default();
    let mut protocol = protocol_number(name).map_err(|_| wrong())?;
    if name == "icmp" && is_v6 {
        protocol = protocol::ICMPV6;
    }
    let numbers: Vec<&str> = words.collect();
    let port = match (protocol, &numbers[..]) {
        (protocol::TCP | protocol::UDP | protocol::SCTP, [port]) => port.parse().map_err(|_| wrong())?,
        // An echo, as ping asks.
        (protocol::ICMP, []) => 8 << 8,
        (protocol::ICMPV6, []) => 128 << 8,
        (protocol::ICMP | protocol::ICMPV6, [kind, rest @ ..]) if rest.len() <= 1 => {
            let kind: u8 = kind.parse().map_err(|_| wrong())?;
            let code: u8 = rest.first().unwrap_or(&"0").parse().map_err(|_| wrong())?;
            u16::from(kind) << 8 | u16::from(code)
        }
        (protocol::TCP | protocol::UDP | protocol::SCTP, _) => return Err(wrong()),
        (_, []) => 0,
        _ => return Err(wrong()),
    };
    Ok(Purpose { protocol, port })
}

impl std::fmt::Display for Purpose {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = protocol_name(self.protocol);
        match self.protocol {
            protocol::TCP | protocol::UDP | protocol::SCTP => write!(f, "{name}/{}", self.port),
            protocol::ICMP | protocol::ICMPV6 => write!(f, "{name}/{}/{}", self.port >> 8, self.port & 0xff),
            _ => f.write_str(&name),
        }
    }
}
