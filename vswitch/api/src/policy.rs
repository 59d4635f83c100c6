//! What requests and answers say of policies, endpoints, connections and flows.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::port::Protocol;

/// A text with objects, YAML or JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyDocument {
    /// What errors call it: the file's name.
    pub file: String,
    /// The text.
    pub text: String,
}

/// What an object is called.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ObjectName {
    /// Its kind, as `NetworkPolicy`.
    pub kind: String,
    /// Its namespace, for kinds that have one; `default` if none is named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Its name.
    pub name: String,
}

/// A pod or a node somewhere in the cluster: its labels and its addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointSpec {
    /// The pod's namespace; none for a node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Its name.
    pub name: String,
    /// The network of its addresses; none for the first one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// Its labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Its addresses; those of a pod here are known from its port.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// Its ports that have names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<NamedPort>,
}

/// What an endpoint is called.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointName {
    /// The pod's namespace; none for a node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Its name.
    pub name: String,
}

/// A port that a pod has a name for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NamedPort {
    /// The name.
    pub name: String,
    /// The protocol.
    #[serde(default)]
    pub protocol: Protocol,
    /// The port.
    pub port: u16,
}

/// What `policy_explain` asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExplainSpec {
    /// Who begins: `NAMESPACE/POD`, a link, an address, or `host`.
    pub from: String,
    /// Who answers.
    pub to: String,
    /// `tcp/80`, `udp/53`, `sctp/7`, `icmp`, `icmp/8/0`, `icmpv6/128`, or a protocol's number.
    pub port: String,
}

/// Which connections.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConnectionFilter {
    /// Of this network.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// With an end of this address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// With an end of this port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Of this protocol, by name or number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
    /// In this state.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
}

/// Which flow events.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ObserveFilter {
    /// Of a pod (`NAMESPACE/POD`, or a namespace alone with a slash at its end), a link, an address, or `host`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// `denied` or `allowed`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verdict: Option<String>,
    /// Dropped for this reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// A policy, a tier, or another object.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyInfo {
    /// What it is called.
    pub name: ObjectName,
    /// The file that it came from.
    pub file: String,
    /// Its line there.
    pub line: u32,
    /// Its tier, for policies.
    pub tier: Option<String>,
    /// Its place in the tier, or the tier's place.
    pub order: Option<i64>,
    /// Whom it is about, in words.
    pub subject: String,
    /// Rules for connections to the subject; none if it does not speak of them.
    pub ingress: Option<usize>,
    /// Rules for connections that the subject opens.
    pub egress: Option<usize>,
    /// Ports here that it is about.
    pub ports: usize,
    /// Connections that it let begin.
    pub connections: u64,
    /// Packets that it denied.
    pub denied: u64,
}

/// One policy with its rules.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyDetail {
    /// About it.
    #[serde(flatten)]
    pub info: PolicyInfo,
    /// Its rules, and what happens where none matches.
    pub rules: Vec<RuleInfo>,
    /// Links of the ports here that it is about.
    pub links: Vec<String>,
    /// The object.
    pub object: Value,
}

/// A rule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RuleInfo {
    /// Where it is in the object.
    pub path: String,
    /// Its line.
    pub line: u32,
    /// Its name, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// `allow`, `deny`, `pass` or `log`.
    pub action: String,
    /// Connections that it let begin.
    pub connections: u64,
    /// Packets that it denied.
    pub denied: u64,
}

/// What became of an object, or would.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChangeInfo {
    /// What it is called.
    pub name: ObjectName,
    /// `created`, `changed`, `unchanged` or `deleted`.
    pub change: String,
    /// The object before, for those who ask what would change, and of what is deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Value>,
    /// The object after, for those who ask what would change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Value>,
}

/// A verdict and its reasons.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExplainInfo {
    /// Whether the connection may begin.
    pub is_allowed: bool,
    /// Who begins, in words.
    pub from: String,
    /// Who answers, in words.
    pub to: String,
    /// What for, in words.
    pub port: String,
    /// What the policies of each end say, of who begins first.
    pub ends: Vec<ExplainedEnd>,
    /// What would have to change for the opposite; none where nothing speaks against it.
    pub remedy: Option<String>,
}

/// What the policies of one end say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExplainedEnd {
    /// `egress` or `ingress`.
    pub direction: String,
    /// The end.
    pub endpoint: String,
    /// Whether they allow it.
    pub is_allowed: bool,
    /// Why, in one sentence.
    pub reason: String,
    /// The rule that decided, if one did.
    pub decided_by: Option<ExplainedRule>,
    /// All rules that were looked at, in order.
    pub rules: Vec<ExplainedRule>,
}

/// A rule that was looked at.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExplainedRule {
    /// The object.
    pub object: ObjectName,
    /// Its tier.
    pub tier: String,
    /// Where it was written.
    pub file: String,
    /// The line of the rule.
    pub line: u32,
    /// Where it is in the object.
    pub path: String,
    /// What it does.
    pub action: String,
    /// Whether it matches, and if not why not.
    pub why: String,
    /// True if it matches.
    pub is_match: bool,
}

/// An endpoint that policies know.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EndpointInfo {
    /// What it is called.
    #[serde(flatten)]
    pub name: EndpointName,
    /// The number of its labels, namespace and named ports; the same for all that have the same.
    pub identity: u32,
    /// The link of its port, if it is here.
    pub link: Option<String>,
    /// Its network.
    pub network: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its ports that have names.
    pub ports: Vec<NamedPort>,
    /// Whether a policy speaks of connections to it, and of those that it opens.
    pub is_isolated: [bool; 2],
}

/// A connection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ConnectionInfo {
    /// Its network.
    pub network: String,
    /// The protocol's name.
    pub protocol: String,
    /// Who began, with its port.
    pub source: String,
    /// Who answers.
    pub destination: String,
    /// Source and destination that its packets leave with, if not with those that they come with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leaves_as: Option<[String; 2]>,
    /// How far it has come.
    pub state: String,
    /// Seconds since it began.
    pub age_seconds: u64,
    /// Seconds since it was last looked at; packets in between are not seen for up to five.
    pub idle_seconds: u64,
    /// Seconds until it is forgotten, if it stays silent.
    pub expires_seconds: u64,
    /// True if it was not seen from its beginning: who began is a guess.
    pub is_picked_up: bool,
    /// Rules that let it begin.
    pub rules: Vec<String>,
}

/// Connections, and the table that they are in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ConnectionsInfo {
    /// The connections.
    pub connections: Vec<ConnectionInfo>,
    /// How many there are, whether they are shown or not.
    pub count: usize,
    /// Most there may be.
    pub limit: usize,
    /// Unanswered ones that made room for others.
    pub evicted: u64,
    /// Forgotten after their time.
    pub expired: u64,
    /// Memory that the table takes, bytes.
    pub memory_bytes: usize,
}

/// A connection that a policy denied, or wants told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FlowEvent {
    /// Its number; numbers that are left out were lost.
    pub number: u64,
    /// Milliseconds since 1970.
    pub time_ms: u64,
    /// `denied` or `allowed`.
    pub verdict: String,
    /// Its network.
    pub network: String,
    /// Who sent it, in words.
    pub from: String,
    /// Its address and port.
    pub source: String,
    /// Whom it was for, in words.
    pub to: String,
    /// Its address and port.
    pub destination: String,
    /// The protocol's name.
    pub protocol: String,
    /// Why it was dropped; none if it was allowed.
    pub reason: Option<String>,
    /// The rule that denied it, or wants it told.
    pub rule: Option<String>,
}

impl std::fmt::Display for ObjectName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{} {namespace}/{}", self.kind, self.name),
            None => write!(f, "{} {}", self.kind, self.name),
        }
    }
}

impl std::fmt::Display for EndpointName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{namespace}/{}", self.name),
            None => write!(f, "node {}", self.name),
        }
    }
}
