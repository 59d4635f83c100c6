//! ClusterNetworkPolicy (`policy.networking.k8s.io/v1alpha2`).

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};

use crate::PolicyId;
use crate::model::{ADMIN, Action, BASELINE, IcmpMatch, Policy, PortMatch, Rule, protocol};
use crate::object::{Doc, Object, ReadError};
use crate::schema::{ClusterPeer, ClusterSubject};

/// Most rules of one direction, peers or protocols of a rule.
const MAX_ITEMS: usize = 25;

#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct ClusterNetworkPolicy {
    api_version: String,
    kind: String,
    metadata: ObjectMeta,
    spec: Spec,
}

#[derive(Debug, Deserialize, Serialize)]
struct Spec {
    tier: String,
    priority: i32,
    subject: ClusterSubject,
    ingress: Option<Vec<ClusterRule>>,
    egress: Option<Vec<ClusterRule>>,
}

#[derive(Debug, Deserialize, Serialize)]
struct ClusterRule {
    name: Option<String>,
    action: String,
    from: Option<Vec<ClusterPeer>>,
    to: Option<Vec<ClusterPeer>>,
    protocols: Option<Vec<Protocol>>,
}

/// What a rule says of protocols. Exactly one field; the last three are of SwitchPolicy alone.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Protocol {
    tcp: Option<Ports>,
    udp: Option<Ports>,
    sctp: Option<Ports>,
    destination_named_port: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    icmp: Option<Icmp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    icmpv6: Option<Icmp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    number: Option<u8>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct Ports {
    destination_port: Option<Port>,
}

#[derive(Debug, Deserialize, Serialize)]
struct Port {
    number: Option<i32>,
    range: Option<Range>,
}

#[derive(Debug, Deserialize, Serialize)]
struct Range {
    start: i32,
    end: i32,
}

#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
struct Icmp {
    #[serde(rename = "type")]
    kind: Option<u8>,
    code: Option<u8>,
}

pub(crate) fn read(doc: &Doc<'_>, id: PolicyId) -> Result<Object, ReadError> {
    let policy: ClusterNetworkPolicy = doc.typed()?;
    let spec = policy.spec;
    let tier = match spec.tier.as_str() {
        "Admin" => ADMIN,
        "Baseline" => BASELINE,
        other => {
            return Err(doc.refuse("spec.tier", format!("\"{other}\" is not allowed: use Admin or Baseline")));
        }
    };
    let order = doc.priority(spec.priority)?;
    let subject = doc.cluster_subject(&spec.subject)?;
    Ok(Object::Policy(Policy {
        id,
        source: doc.source(),
        tier: tier.to_owned(),
        order,
        subject,
        ingress: rules(doc, spec.ingress, false)?,
        egress: rules(doc, spec.egress, true)?,
        applies_on_forward: false,
    }))
}

fn rules(doc: &Doc<'_>, rules: Option<Vec<ClusterRule>>, is_egress: bool) -> Result<Option<Vec<Rule>>, ReadError> {
    let allowed = [("Accept", Action::Allow), ("Deny", Action::Deny), ("Pass", Action::Pass)];
    let read = |rule: ClusterRule, path: String| {
        let action = doc.action(&rule.action, &path, &allowed)?;
        if rule.name.as_ref().is_some_and(|name| name.len() > 100) {
            return Err(doc.refuse(&format!("{path}.name"), "at most 100 characters"));
        }
        let (peers, peers_path) = doc.peers(rule.from, rule.to, is_egress, &path)?;
        let peers = peers.unwrap_or_default();
        doc.most(peers.len(), MAX_ITEMS, &peers_path)?;
        let ports = protocols(doc, rule.protocols.as_deref(), &format!("{path}.protocols"), false)?;
        let has_name = ports.iter().flatten().any(|port| matches!(port, PortMatch::Named { .. }));
        if let Some(at) = peers.iter().position(|peer| peer.nodes.is_some() || peer.networks.is_some())
            && has_name
        {
            let path = format!("{peers_path}[{at}]");
            return Err(doc.refuse(&path, "nodes and networks have no named ports: give the port's number"));
        }
        let peers = Some(doc.cluster_peers(&peers, is_egress, &peers_path)?);
        Ok(Rule { name: rule.name, line: doc.line(&path), action, peers, ports, path })
    };
    let all = doc.rules(rules.unwrap_or_default(), is_egress, MAX_ITEMS, read)?;
    Ok((!all.is_empty()).then_some(all))
}

/// What a rule says of protocols; `is_own` for SwitchPolicy, which may name more of them.
pub(crate) fn protocols(
    doc: &Doc<'_>,
    protocols: Option<&[Protocol]>,
    path: &str,
    is_own: bool,
) -> Result<Option<Vec<PortMatch>>, ReadError> {
    let Some(protocols) = protocols else { return Ok(None) };
    if protocols.is_empty() {
        return Err(doc.refuse(path, "at least one; leave `protocols` out for all"));
    }
    doc.most(protocols.len(), MAX_ITEMS, path)?;
    let each = protocols.iter().enumerate().map(|(at, one)| protocol_match(doc, &format!("{path}[{at}]"), one, is_own));
    each.collect::<Result<Vec<_>, _>>().map(Some)
}

fn protocol_match(doc: &Doc<'_>, path: &str, one: &Protocol, is_own: bool) -> Result<PortMatch, ReadError> {
    let choices = [
        one.tcp.is_some(),
        one.udp.is_some(),
        one.sctp.is_some(),
        one.destination_named_port.is_some(),
        one.icmp.is_some(),
        one.icmpv6.is_some(),
        one.number.is_some(),
    ];
    let is_foreign = !is_own && choices[4..].contains(&true);
    if choices.iter().filter(|is_there| **is_there).count() != 1 || is_foreign {
        let more = if is_own { "`icmp`, `icmpv6`, `number`, " } else { "" };
        return Err(doc.refuse(path, format!("exactly one of `tcp`, `udp`, `sctp`, {more}`destinationNamedPort`")));
    }
    let icmp = |number: u8, icmp: Icmp| match icmp {
        Icmp { kind: None, code: Some(_) } => Err(doc.refuse(path, "a code needs a type")),
        Icmp { kind, code } => Ok(PortMatch::Icmp(IcmpMatch { protocol: number, kind, code })),
    };
    match one {
        Protocol { tcp: Some(ports), .. } => of_ports(doc, protocol::TCP, ports, &format!("{path}.tcp")),
        Protocol { udp: Some(ports), .. } => of_ports(doc, protocol::UDP, ports, &format!("{path}.udp")),
        Protocol { sctp: Some(ports), .. } => of_ports(doc, protocol::SCTP, ports, &format!("{path}.sctp")),
        Protocol { icmp: Some(one), .. } => icmp(protocol::ICMP, *one),
        Protocol { icmpv6: Some(one), .. } => icmp(protocol::ICMPV6, *one),
        Protocol { number: Some(number), .. } => Ok(PortMatch::Protocol(*number)),
        Protocol { destination_named_port, .. } => {
            Ok(PortMatch::Named { name: destination_named_port.clone().unwrap_or_default(), protocol: None })
        }
    }
}

fn of_ports(doc: &Doc<'_>, number: u8, ports: &Ports, path: &str) -> Result<PortMatch, ReadError> {
    let path = format!("{path}.destinationPort");
    match &ports.destination_port {
        None => Ok(PortMatch::Protocol(number)),
        Some(Port { number: Some(port), range: None }) => doc.ports(number, *port, *port, &format!("{path}.number")),
        Some(Port { number: None, range: Some(range) }) => {
            doc.ports(number, range.start, range.end, &format!("{path}.range"))
        }
        Some(_) => Err(doc.refuse(&path, "exactly one of `number` and `range`")),
    }
}
