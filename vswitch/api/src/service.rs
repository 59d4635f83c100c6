//! Requests and answers about address translation: services, and addresses to leave with.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::defaults::is_no;
use crate::port::Protocol;

/// An address and port that nobody has, and who answers for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceSpec {
    /// Its name; in Kubernetes' words a service's port, as `shop/web:http`.
    pub name: String,
    /// The routed network whose pods reach it; none for the first network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// Its address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// Of which protocol.
    #[serde(default)]
    pub protocol: Protocol,
    /// Who answers, each an address and a port: pods here or on other nodes. With none, who asks is refused.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backends: Vec<SocketAddr>,
    /// Which connections go to one backend.
    #[serde(default, skip_serializing_if = "Affinity::is_none")]
    pub affinity: Affinity,
}

/// Which connections of a service go to one backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Affinity {
    /// Each goes to any.
    #[default]
    None,
    /// Those of one client address.
    ClientIp,
}

/// Addresses that pods leave with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EgressSpec {
    /// Its name.
    pub name: String,
    /// A routed network; none for the first network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// Which pods of this node, by their addresses. Empty for all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<IpNet>,
    /// Where they go. Empty for everywhere beyond the network's own prefixes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub destinations: Vec<IpNet>,
    /// What they leave with: addresses whose packets come to this node, and that no pod has. A pod keeps to one; other
    /// pods share them.
    pub addresses: Vec<IpAddr>,
}

/// A service, with what it does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServiceInfo {
    /// What was asked for.
    #[serde(flatten)]
    pub spec: ServiceSpec,
    /// Its backends, with their connections of this node; then those that are no more, and still have some.
    pub targets: Vec<BackendInfo>,
}

/// Who answers for a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendInfo {
    /// Address and port.
    pub backend: SocketAddr,
    /// Connections that are not over.
    pub connections: usize,
    /// True if it gets no new ones.
    #[serde(default, skip_serializing_if = "is_no")]
    pub is_leaving: bool,
}

/// An egress rule, with what it does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EgressInfo {
    /// What was asked for.
    #[serde(flatten)]
    pub spec: EgressSpec,
    /// Connections that leave with its addresses now.
    pub connections: usize,
}

impl Affinity {
    fn is_none(&self) -> bool {
        *self == Affinity::None
    }
}
