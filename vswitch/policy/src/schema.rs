//! What several kinds have in common: selectors, prefixes, ports.

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde::{Deserialize, Serialize};

use crate::model::{Action, NamespaceMatch, Peer, PortMatch, Rule, Subject, protocol};
use crate::object::{Doc, ReadError};
use crate::selector::{Operator, Requirement, Selector};

/// Pods of namespaces (`NamespacedPod`).
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct NamespacedPod {
    #[serde(default)]
    pub(crate) namespace_selector: LabelSelector,
    pub(crate) pod_selector: LabelSelector,
}

/// Whom an object of the cluster applies to. Exactly one field.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct ClusterSubject {
    pub(crate) namespaces: Option<LabelSelector>,
    pub(crate) pods: Option<NamespacedPod>,
}

/// A peer of an object of the cluster. Exactly one field; ingress has the first two only.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ClusterPeer {
    pub(crate) namespaces: Option<LabelSelector>,
    pub(crate) pods: Option<NamespacedPod>,
    pub(crate) nodes: Option<LabelSelector>,
    pub(crate) networks: Option<Vec<String>>,
    pub(crate) domain_names: Option<Vec<String>>,
}

impl Doc<'_> {
    pub(crate) fn selector(&self, selector: &LabelSelector, path: &str) -> Result<Selector, ReadError> {
        let mut requirements = Vec::new();
        for (key, value) in selector.match_labels.iter().flatten() {
            self.check_label(key, &format!("{path}.matchLabels"))?;
            let operator = Operator::In(vec![value.clone()]);
            requirements.push(Requirement { key: key.clone(), operator });
        }
        for (at, expression) in selector.match_expressions.iter().flatten().enumerate() {
            let path = format!("{path}.matchExpressions[{at}]");
            self.check_label(&expression.key, &format!("{path}.key"))?;
            let values = expression.values.clone().unwrap_or_default();
            let has_values = !values.is_empty();
            let operator = match expression.operator.as_str() {
                "In" => Operator::In(values),
                "NotIn" => Operator::NotIn(values),
                "Exists" => Operator::Exists,
                "DoesNotExist" => Operator::DoesNotExist,
                other => {
                    return Err(self.refuse(
                        &format!("{path}.operator"),
                        format!("there is no operator \"{other}\": use In, NotIn, Exists or DoesNotExist"),
                    ));
                }
            };
            let wants_values = matches!(operator, Operator::In(_) | Operator::NotIn(_));
            if wants_values != has_values {
                let must = if wants_values { "needs values" } else { "takes no values" };
                return Err(self.refuse(&format!("{path}.values"), format!("{} {must}", expression.operator)));
            }
            requirements.push(Requirement { key: expression.key.clone(), operator });
        }
        Ok(Selector::new(requirements))
    }

    fn check_label(&self, key: &str, path: &str) -> Result<(), ReadError> {
        let name = key.rsplit('/').next().unwrap_or_default();
        let is_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let is_right = !name.is_empty() && name.len() <= 63 && name.chars().all(is_word) && key.len() <= 317;
        if is_right { Ok(()) } else { Err(self.refuse(path, format!("\"{key}\" is no name of a label"))) }
    }

    pub(crate) fn prefix(&self, text: &str, path: &str) -> Result<IpNet, ReadError> {
        text.parse::<IpNet>()
            .map(|prefix| prefix.trunc())
            .map_err(|_| self.refuse(path, format!("\"{text}\" is no prefix: write 10.0.0.0/8 or fd00::/8")))
    }

    pub(crate) fn cluster_subject(&self, subject: &ClusterSubject) -> Result<Subject, ReadError> {
        let path = "spec.subject";
        match (&subject.namespaces, &subject.pods) {
            (Some(namespaces), None) => {
                let namespaces = NamespaceMatch::Labels(self.selector(namespaces, &format!("{path}.namespaces"))?);
                Ok(Subject::Pods { namespaces, pods: Selector::default() })
            }
            (None, Some(pods)) => {
                let (namespaces, pods) = self.namespaced(pods, &format!("{path}.pods"))?;
                Ok(Subject::Pods { namespaces, pods })
            }
            _ => Err(self.refuse(path, "exactly one of `namespaces` and `pods`")),
        }
    }

    fn namespaced(&self, pods: &NamespacedPod, path: &str) -> Result<(NamespaceMatch, Selector), ReadError> {
        let namespaces = self.selector(&pods.namespace_selector, &format!("{path}.namespaceSelector"))?;
        Ok((NamespaceMatch::Labels(namespaces), self.selector(&pods.pod_selector, &format!("{path}.podSelector"))?))
    }

    pub(crate) fn cluster_peers(
        &self,
        peers: &[ClusterPeer],
        is_egress: bool,
        path: &str,
    ) -> Result<Vec<Peer>, ReadError> {
        if peers.is_empty() {
            return Err(self.refuse(path, "at least one peer; `namespaces: {}` is every pod"));
        }
        let mut all = Vec::new();
        for (at, peer) in peers.iter().enumerate() {
            let path = format!("{path}[{at}]");
            match peer {
                ClusterPeer {
                    namespaces: Some(namespaces),
                    pods: None,
                    nodes: None,
                    networks: None,
                    domain_names: None,
                } => {
                    let namespaces = NamespaceMatch::Labels(self.selector(namespaces, &format!("{path}.namespaces"))?);
                    all.push(Peer::Pods { namespaces, pods: Selector::default() });
                }
                ClusterPeer { namespaces: None, pods: Some(pods), nodes: None, networks: None, domain_names: None } => {
                    let (namespaces, pods) = self.namespaced(pods, &format!("{path}.pods"))?;
                    all.push(Peer::Pods { namespaces, pods });
                }
                ClusterPeer {
                    namespaces: None,
                    pods: None,
                    nodes: Some(nodes),
                    networks: None,
                    domain_names: None,
                } if is_egress => {
                    all.push(Peer::Nodes(self.selector(nodes, &format!("{path}.nodes"))?));
                }
                ClusterPeer {
                    namespaces: None,
                    pods: None,
                    nodes: None,
                    networks: Some(networks),
                    domain_names: None,
                } if is_egress && !networks.is_empty() => {
                    for (at, network) in networks.iter().enumerate() {
                        let cidr = self.prefix(network, &format!("{path}.networks[{at}]"))?;
                        all.push(Peer::Cidr { cidr, except: Vec::new() });
                    }
                }
                ClusterPeer { domain_names: Some(_), .. } => {
                    let why = "peers by name are not known here, for they need answers of DNS: use `networks`";
                    return Err(self.refuse(&format!("{path}.domainNames"), why));
                }
                _ if is_egress => {
                    return Err(self.refuse(&path, "exactly one of `namespaces`, `pods`, `nodes` and `networks`"));
                }
                _ => return Err(self.refuse(&path, "exactly one of `namespaces` and `pods`")),
            }
        }
        Ok(all)
    }

    pub(crate) fn protocol(&self, name: &str, path: &str) -> Result<u8, ReadError> {
        match name {
            "TCP" => Ok(protocol::TCP),
            "UDP" => Ok(protocol::UDP),
            "SCTP" => Ok(protocol::SCTP),
            other => Err(self.refuse(path, format!("\"{other}\" is not allowed: use TCP, UDP or SCTP"))),
        }
    }

    pub(crate) fn port(&self, port: i32, path: &str) -> Result<u16, ReadError> {
        u16::try_from(port)
            .ok()
            .filter(|port| *port > 0)
            .ok_or_else(|| self.refuse(path, format!("{port} is not allowed; allowed are 1 to 65535")))
    }

    pub(crate) fn ports(&self, number: u8, first: i32, last: i32, path: &str) -> Result<PortMatch, ReadError> {
        let (first, end) = (self.port(first, path)?, self.port(last, path)?);
        if first > end {
            return Err(self.refuse(path, format!("the range ends ({end}) before it begins ({first})")));
        }
        Ok(PortMatch::Ports { protocol: number, first, last: end })
    }

    /// Reads the rules of one direction, each by `read`, which is given its path.
    pub(crate) fn rules<R>(
        &self,
        rules: Vec<R>,
        is_egress: bool,
        most: usize,
        read: impl Fn(R, String) -> Result<Rule, ReadError>,
    ) -> Result<Vec<Rule>, ReadError> {
        let path = format!("spec.{}", if is_egress { "egress" } else { "ingress" });
        self.most(rules.len(), most, &path)?;
        rules.into_iter().enumerate().map(|(at, rule)| read(rule, format!("{path}[{at}]"))).collect()
    }

    /// What a rule does, of what its kind allows.
    pub(crate) fn action(&self, text: &str, path: &str, allowed: &[(&str, Action)]) -> Result<Action, ReadError> {
        let known = allowed.iter().find(|(name, _)| *name == text).map(|&(_, action)| action);
        known.ok_or_else(|| {
            let names: Vec<&str> = allowed.iter().map(|&(name, _)| name).collect();
            let (last, others) = names.split_last().expect("every kind allows something");
            let path = format!("{path}.action");
            self.refuse(&path, format!("\"{text}\" is not allowed: use {} or {last}", others.join(", ")))
        })
    }

    /// The peers of a rule, with their path: `to` of egress and `from` of ingress, and never the other.
    pub(crate) fn peers<P>(
        &self,
        from: Option<Vec<P>>,
        to: Option<Vec<P>>,
        is_egress: bool,
        path: &str,
    ) -> Result<(Option<Vec<P>>, String), ReadError> {
        let (peers, field, stray, wrong) = if is_egress { (to, "to", from, "from") } else { (from, "from", to, "to") };
        if stray.is_some() {
            return Err(self.refuse(&format!("{path}.{wrong}"), "the schema has no such field"));
        }
        Ok((peers, format!("{path}.{field}")))
    }

    pub(crate) fn most(&self, count: usize, most: usize, path: &str) -> Result<(), ReadError> {
        if count <= most { Ok(()) } else { Err(self.refuse(path, format!("{count} are too many; at most {most}"))) }
    }

    pub(crate) fn priority(&self, priority: i32) -> Result<i64, ReadError> {
        if (0..=1000).contains(&priority) {
            return Ok(i64::from(priority));
        }
        Err(self.refuse("spec.priority", format!("{priority} is not allowed; allowed are 0 to 1000")))
    }
}
