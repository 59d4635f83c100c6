//! Kubernetes NetworkPolicy (`networking.k8s.io/v1`).

use k8s_openapi::api::networking::v1::{NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::PolicyId;
use crate::model::{Action, NETWORK_POLICY, NamespaceMatch, Peer, Policy, PortMatch, Rule, Subject};
use crate::object::{Doc, Object, ReadError};

pub(crate) fn read(doc: &Doc<'_>, id: PolicyId) -> Result<Object, ReadError> {
    let policy: NetworkPolicy = doc.typed()?;
    let spec = policy.spec.ok_or_else(|| doc.refuse("spec", "a policy has a spec"))?;
    let namespace = id.namespace.clone().unwrap_or_default();
    let selector = spec.pod_selector.unwrap_or_default();
    let subject = Subject::Pods {
        namespaces: NamespaceMatch::Name(namespace.clone()),
        pods: doc.selector(&selector, "spec.podSelector")?,
    };
    let (mut has_ingress, mut has_egress) = (false, false);
    match &spec.policy_types {
        // Every policy is about ingress, and one with rules for egress about that too.
        None => (has_ingress, has_egress) = (true, spec.egress.as_ref().is_some_and(|rules| !rules.is_empty())),
        Some(types) => {
            for (at, word) in types.iter().enumerate() {
                match word.as_str() {
                    "Ingress" => has_ingress = true,
                    "Egress" => has_egress = true,
                    other => {
                        let path = format!("spec.policyTypes[{at}]");
                        return Err(doc.refuse(&path, format!("\"{other}\" is not allowed: use Ingress or Egress")));
                    }
                }
            }
            if types.is_empty() {
                (has_ingress, has_egress) = (true, spec.egress.as_ref().is_some_and(|rules| !rules.is_empty()));
            }
        }
    }
    let mut ingress = Vec::new();
    for (at, rule) in spec.ingress.iter().flatten().enumerate() {
        let path = format!("spec.ingress[{at}]");
        ingress.push(one_rule(doc, &namespace, &path, ("from", &rule.from), &rule.ports)?);
    }
    let mut egress = Vec::new();
    for (at, rule) in spec.egress.iter().flatten().enumerate() {
        let path = format!("spec.egress[{at}]");
        egress.push(one_rule(doc, &namespace, &path, ("to", &rule.to), &rule.ports)?);
    }
    Ok(Object::Policy(Policy {
        id,
        source: doc.source(),
        tier: NETWORK_POLICY.to_owned(),
        order: 0,
        subject,
        ingress: has_ingress.then_some(ingress),
        egress: has_egress.then_some(egress),
        applies_on_forward: false,
    }))
}

fn one_rule(
    doc: &Doc<'_>,
    namespace: &str,
    path: &str,
    (field, peers): (&str, &Option<Vec<NetworkPolicyPeer>>),
    ports: &Option<Vec<NetworkPolicyPort>>,
) -> Result<Rule, ReadError> {
    let mut all = Vec::new();
    for (at, one) in peers.iter().flatten().enumerate() {
        all.push(peer(doc, namespace, &format!("{path}.{field}[{at}]"), one)?);
    }
    let mut matches = Vec::new();
    for (at, one) in ports.iter().flatten().enumerate() {
        matches.push(port(doc, &format!("{path}.ports[{at}]"), one)?);
    }
    Ok(Rule {
        name: None,
        line: doc.line(path),
        path: path.to_owned(),
        action: Action::Allow,
        // No peers, or an empty list of them, is everybody; ports likewise.
        peers: (!all.is_empty()).then_some(all),
        ports: (!matches.is_empty()).then_some(matches),
    })
}

fn peer(doc: &Doc<'_>, namespace: &str, path: &str, peer: &NetworkPolicyPeer) -> Result<Peer, ReadError> {
    if let Some(block) = &peer.ip_block {
        if peer.pod_selector.is_some() || peer.namespace_selector.is_some() {
            return Err(doc.refuse(path, "an ipBlock stands alone: write selectors as another peer"));
        }
        let cidr = doc.prefix(&block.cidr, &format!("{path}.ipBlock.cidr"))?;
        let mut except = Vec::new();
        for (at, text) in block.except.iter().flatten().enumerate() {
            let path = format!("{path}.ipBlock.except[{at}]");
            let prefix = doc.prefix(text, &path)?;
            if !cidr.contains(&prefix) || prefix == cidr {
                return Err(doc.refuse(&path, format!("{prefix} lies not within {cidr}")));
            }
            except.push(prefix);
        }
        except.sort();
        return Ok(Peer::Cidr { cidr, except });
    }
    let pods = |selector: &Option<LabelSelector>| match selector {
        Some(selector) => doc.selector(selector, &format!("{path}.podSelector")),
        None => Ok(crate::Selector::default()),
    };
    match &peer.namespace_selector {
        Some(selector) => {
            let namespaces = NamespaceMatch::Labels(doc.selector(selector, &format!("{path}.namespaceSelector"))?);
            Ok(Peer::Pods { namespaces, pods: pods(&peer.pod_selector)? })
        }
        None if peer.pod_selector.is_some() => {
            let namespaces = NamespaceMatch::Name(namespace.to_owned());
            Ok(Peer::Pods { namespaces, pods: pods(&peer.pod_selector)? })
        }
        None => Err(doc.refuse(path, "a peer has `podSelector`, `namespaceSelector` or `ipBlock`")),
    }
}

fn port(doc: &Doc<'_>, path: &str, port: &NetworkPolicyPort) -> Result<PortMatch, ReadError> {
    let number = doc.protocol(port.protocol.as_deref().unwrap_or("TCP"), &format!("{path}.protocol"))?;
    match (&port.port, port.end_port) {
        (None, None) => Ok(PortMatch::Protocol(number)),
        (None, Some(_)) => Err(doc.refuse(&format!("{path}.endPort"), "a range needs its first port: set `port`")),
        (Some(IntOrString::Int(first)), last) => {
            let place = if last.is_some() { format!("{path}.endPort") } else { format!("{path}.port") };
            doc.ports(number, *first, last.unwrap_or(*first), &place)
        }
        (Some(IntOrString::String(_)), Some(_)) => {
            Err(doc.refuse(&format!("{path}.endPort"), "a range needs a number as its first port, not a name"))
        }
        (Some(IntOrString::String(name)), None) => {
            let is_word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            let is_name = (1..=15).contains(&name.len())
                && name.chars().all(is_word)
                && name.chars().any(|c| c.is_ascii_lowercase());
            if !is_name {
                return Err(doc.refuse(
                    &format!("{path}.port"),
                    format!("\"{name}\" is no name of a port: at most 15 lower case letters, digits and '-'"),
                ));
            }
            Ok(PortMatch::Named { name: name.clone(), protocol: Some(number) })
        }
    }
}
