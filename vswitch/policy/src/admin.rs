//! AdminNetworkPolicy and BaselineAdminNetworkPolicy (`policy.networking.k8s.io/v1alpha1`).

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};

use crate::PolicyId;
use crate::model::{ADMIN, Action, BASELINE, Policy, PortMatch, Rule};
use crate::object::{Doc, Object, ReadError};
use crate::schema::{ClusterPeer, ClusterSubject};

/// Most rules of one direction.
const MAX_RULES: usize = 100;
/// Most peers or ports of a rule.
const MAX_ITEMS: usize = 100;

#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct AdminNetworkPolicy {
    api_version: String,
    kind: String,
    metadata: ObjectMeta,
    spec: Spec,
}

#[derive(Debug, Deserialize, Serialize)]
struct Spec {
    priority: Option<i32>,
    subject: ClusterSubject,
    ingress: Option<Vec<AdminRule>>,
    egress: Option<Vec<AdminRule>>,
}

#[derive(Debug, Deserialize, Serialize)]
struct AdminRule {
    name: Option<String>,
    action: String,
    from: Option<Vec<ClusterPeer>>,
    to: Option<Vec<ClusterPeer>>,
    ports: Option<Vec<AdminPort>>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct AdminPort {
    port_number: Option<PortNumber>,
    named_port: Option<String>,
    port_range: Option<PortRange>,
}

#[derive(Debug, Deserialize, Serialize)]
struct PortNumber {
    protocol: String,
    port: i32,
}

#[derive(Debug, Deserialize, Serialize)]
struct PortRange {
    protocol: Option<String>,
    start: i32,
    end: i32,
}

pub(crate) fn read(doc: &Doc<'_>, id: PolicyId) -> Result<Object, ReadError> {
    let policy: AdminNetworkPolicy = doc.typed()?;
    let Some(priority) = policy.spec.priority else {
        return Err(doc.refuse("spec.priority", "an AdminNetworkPolicy has a priority, 0 to 1000"));
    };
    let order = doc.priority(priority)?;
    convert(doc, id, policy, ADMIN, order)
}

pub(crate) fn read_baseline(doc: &Doc<'_>, id: PolicyId) -> Result<Object, ReadError> {
    let policy: AdminNetworkPolicy = doc.typed()?;
    if id.name != "default" {
        return Err(doc.refuse("metadata.name", "there is one BaselineAdminNetworkPolicy, and its name is \"default\""));
    }
    if policy.spec.priority.is_some() {
        return Err(doc.refuse("spec.priority", "the schema has no such field"));
    }
    // After the ClusterNetworkPolicies of the same tier, whose orders end at 1000.
    convert(doc, id, policy, BASELINE, 1001)
}

fn convert(
    doc: &Doc<'_>,
    id: PolicyId,
    policy: AdminNetworkPolicy,
    tier: &str,
    order: i64,
) -> Result<Object, ReadError> {
    let spec = policy.spec;
    let subject = doc.cluster_subject(&spec.subject)?;
    let is_baseline = tier == BASELINE;
    Ok(Object::Policy(Policy {
        id,
        source: doc.source(),
        tier: tier.to_owned(),
        order,
        subject,
        ingress: rules(doc, spec.ingress, false, is_baseline)?,
        egress: rules(doc, spec.egress, true, is_baseline)?,
        applies_on_forward: false,
    }))
}

/// The rules of one direction; none if there are none, for then the policy does not speak of it.
fn rules(
    doc: &Doc<'_>,
    rules: Option<Vec<AdminRule>>,
    is_egress: bool,
    is_baseline: bool,
) -> Result<Option<Vec<Rule>>, ReadError> {
    let allowed = [("Allow", Action::Allow), ("Deny", Action::Deny), ("Pass", Action::Pass)];
    let allowed = if is_baseline { &allowed[..2] } else { &allowed };
    let read = |rule: AdminRule, path: String| {
        let action = doc.action(&rule.action, &path, allowed)?;
        let (peers, peers_path) = doc.peers(rule.from, rule.to, is_egress, &path)?;
        let peers = peers.unwrap_or_default();
        doc.most(peers.len(), MAX_ITEMS, &peers_path)?;
        let ports = match rule.ports {
            None => None,
            Some(ports) if ports.is_empty() => {
                return Err(doc.refuse(&format!("{path}.ports"), "at least one; leave `ports` out for all"));
            }
            Some(ports) => {
                doc.most(ports.len(), MAX_ITEMS, &format!("{path}.ports"))?;
                let each = ports.iter().enumerate().map(|(at, one)| port(doc, &format!("{path}.ports[{at}]"), one));
                Some(each.collect::<Result<Vec<_>, _>>()?)
            }
        };
        let peers = Some(doc.cluster_peers(&peers, is_egress, &peers_path)?);
        Ok(Rule { name: rule.name, line: doc.line(&path), action, peers, ports, path })
    };
    let all = doc.rules(rules.unwrap_or_default(), is_egress, MAX_RULES, read)?;
    Ok((!all.is_empty()).then_some(all))
}

fn port(doc: &Doc<'_>, path: &str, port: &AdminPort) -> Result<PortMatch, ReadError> {
    match port {
        AdminPort { port_number: Some(one), named_port: None, port_range: None } => {
            let path = format!("{path}.portNumber");
            let number = doc.protocol(&one.protocol, &format!("{path}.protocol"))?;
            doc.ports(number, one.port, one.port, &format!("{path}.port"))
        }
        AdminPort { port_number: None, named_port: Some(name), port_range: None } => {
            Ok(PortMatch::Named { name: name.clone(), protocol: None })
        }
        AdminPort { port_number: None, named_port: None, port_range: Some(range) } => {
            let path = format!("{path}.portRange");
            let number = doc.protocol(range.protocol.as_deref().unwrap_or("TCP"), &format!("{path}.protocol"))?;
            doc.ports(number, range.start, range.end, &path)
        }
        _ => Err(doc.refuse(path, "exactly one of `portNumber`, `namedPort` and `portRange`")),
    }
}
