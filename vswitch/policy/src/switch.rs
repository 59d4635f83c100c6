//! SwitchPolicy and Tier (`vswitch.io/v1alpha1`): what Kubernetes' own objects cannot say.
//!
//! Tiers of one's own, `Log`, ICMP types, any protocol, networks as sources, and this node's own stack as the subject.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use serde::{Deserialize, Serialize};

use crate::PolicyId;
use crate::cluster::{Protocol, protocols};
use crate::model::{Action, Peer, Policy, Rule, SWITCH, Subject, Tier, TierDefault, builtin_tiers};
use crate::object::{Doc, Object, ReadError};
use crate::schema::{ClusterPeer, ClusterSubject, NamespacedPod};

#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct SwitchPolicy {
    api_version: String,
    kind: String,
    metadata: ObjectMeta,
    spec: Spec,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    tier: Option<String>,
    order: Option<i64>,
    subject: OwnSubject,
    apply_on_forward: Option<bool>,
    ingress: Option<Vec<OwnRule>>,
    egress: Option<Vec<OwnRule>>,
}

/// Whom it applies to. Exactly one field.
#[derive(Debug, Deserialize, Serialize)]
struct OwnSubject {
    namespaces: Option<LabelSelector>,
    pods: Option<NamespacedPod>,
    host: Option<Host>,
}

#[derive(Debug, Deserialize, Serialize)]
struct Host {}

#[derive(Debug, Deserialize, Serialize)]
struct OwnRule {
    name: Option<String>,
    action: String,
    from: Option<Vec<OwnPeer>>,
    to: Option<Vec<OwnPeer>>,
    protocols: Option<Vec<Protocol>>,
}

/// A peer. Exactly one field, but for `except`, which goes with `networks`.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct OwnPeer {
    namespaces: Option<LabelSelector>,
    pods: Option<NamespacedPod>,
    nodes: Option<LabelSelector>,
    networks: Option<Vec<String>>,
    except: Option<Vec<String>>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct TierObject {
    api_version: String,
    kind: String,
    metadata: ObjectMeta,
    spec: TierSpec,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct TierSpec {
    order: i64,
    default_action: Option<String>,
}

pub(crate) fn read(doc: &Doc<'_>, id: PolicyId) -> Result<Object, ReadError> {
    let policy: SwitchPolicy = doc.typed()?;
    let spec = policy.spec;
    let subject = match spec.subject {
        OwnSubject { namespaces: None, pods: None, host: Some(_) } => Subject::Host,
        OwnSubject { namespaces, pods, host: None } => doc.cluster_subject(&ClusterSubject { namespaces, pods })?,
        _ => return Err(doc.refuse("spec.subject", "exactly one of `namespaces`, `pods` and `host`")),
    };
    let applies_on_forward = spec.apply_on_forward.unwrap_or(false);
    if applies_on_forward && subject != Subject::Host {
        return Err(doc.refuse("spec.applyOnForward", "only the host forwards: set `subject.host`"));
    }
    Ok(Object::Policy(Policy {
        id,
        source: doc.source(),
        tier: spec.tier.unwrap_or_else(|| SWITCH.to_owned()),
        order: spec.order.unwrap_or(0),
        subject,
        ingress: rules(doc, spec.ingress, false)?,
        egress: rules(doc, spec.egress, true)?,
        applies_on_forward,
    }))
}

pub(crate) fn read_tier(doc: &Doc<'_>, id: &PolicyId) -> Result<Object, ReadError> {
    let tier: TierObject = doc.typed()?;
    if builtin_tiers().iter().any(|builtin| builtin.name == id.name) {
        return Err(doc.refuse("metadata.name", format!("tier \"{}\" is always there: choose another name", id.name)));
    }
    let default = match tier.spec.default_action.as_deref() {
        None | Some("Deny") => TierDefault::Deny,
        Some("Pass") => TierDefault::Pass,
        Some(other) => {
            return Err(doc.refuse("spec.defaultAction", format!("\"{other}\" is not allowed: use Deny or Pass")));
        }
    };
    Ok(Object::Tier(Tier { name: id.name.clone(), order: tier.spec.order, default }))
}

/// The rules of one direction. `ingress: []` speaks of it and has no rule, so that the tier's default decides.
fn rules(doc: &Doc<'_>, rules: Option<Vec<OwnRule>>, is_egress: bool) -> Result<Option<Vec<Rule>>, ReadError> {
    let Some(rules) = rules else { return Ok(None) };
    let allowed = [("Allow", Action::Allow), ("Deny", Action::Deny), ("Pass", Action::Pass), ("Log", Action::Log)];
    let read = |rule: OwnRule, path: String| {
        let action = doc.action(&rule.action, &path, &allowed)?;
        let (peers, peers_path) = doc.peers(rule.from, rule.to, is_egress, &path)?;
        let peers = peers.map(|list| own_peers(doc, &list, &peers_path)).transpose()?;
        let ports = protocols(doc, rule.protocols.as_deref(), &format!("{path}.protocols"), true)?;
        Ok(Rule { name: rule.name, line: doc.line(&path), action, peers, ports, path })
    };
    doc.rules(rules, is_egress, usize::MAX, read).map(Some)
}

fn own_peers(doc: &Doc<'_>, peers: &[OwnPeer], path: &str) -> Result<Vec<Peer>, ReadError> {
    let mut all = Vec::new();
    for (at, peer) in peers.iter().enumerate() {
        let path = format!("{path}[{at}]");
        let OwnPeer { namespaces, pods, nodes, networks, except } = peer.clone();
        if except.is_some() && networks.is_none() {
            return Err(doc.refuse(&format!("{path}.except"), "goes with `networks`"));
        }
        // What is said of the peer must name its place in the list.
        let one = [ClusterPeer { namespaces, pods, nodes, networks, domain_names: None }];
        let mut read = doc.cluster_peers(&one, true, &path).map_err(|mut error| {
            error.path = error.path.replacen(&format!("{path}[0]"), &path, 1);
            error
        })?;
        for (at, text) in except.iter().flatten().enumerate() {
            let path = format!("{path}.except[{at}]");
            let prefix = doc.prefix(text, &path)?;
            let mut is_within = false;
            for peer in &mut read {
                if let Peer::Cidr { cidr, except } = peer
                    && cidr.contains(&prefix)
                {
                    is_within = true;
                    except.push(prefix);
                }
            }
            if !is_within {
                return Err(doc.refuse(&path, format!("{prefix} lies within none of `networks`")));
            }
        }
        all.append(&mut read);
    }
    if all.is_empty() {
        return Err(doc.refuse(path, "at least one peer; leave it out for everybody"));
    }
    Ok(all)
}
