//! A port: a link to plug in, and what may pass it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use vswitch_net::MacAddr;

use crate::defaults::{is_no, is_yes, is_zero, yes};
use crate::policy::NamedPort;

/// A link to plug in. The link exists, is up and lies in the daemon's network namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortSpec {
    /// The host link's name.
    pub link: String,
    /// Its network's name; none for the first network of the configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// The pod's MAC address.
    pub mac: MacAddr,
    /// The pod's addresses. If empty, the built-in IPAM gives one a family, where the network has ranges.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// MTU of the pod's link, bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Who plugged it in: the container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attachment: Option<Attachment>,
    /// Who owns it: the CNI network's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Path of the pod's network namespace, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns: Option<String>,
    /// Labels. `K8S_POD_NAMESPACE` and `K8S_POD_NAME` say which pod it is; policies see the others, unless the pod's own
    /// are known (`endpoint_set`).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Whether the pod's default route leads here. Not for a second interface beside one that has it.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub default_route: bool,
    /// What is checked of its packets; none for what the network says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<SenderCheck>,
    /// VLANs of a trunk port, each a network's `vlan`. Empty for an access port.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trunk: Vec<u16>,
    /// Whether a trunk port carries its own network without a tag (the native VLAN).
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub native: bool,
    /// Exchanges nothing with other isolated ports.
    #[serde(default, skip_serializing_if = "is_no")]
    pub isolated: bool,
    /// May get its own packets back.
    #[serde(default, skip_serializing_if = "is_no")]
    pub hairpin: bool,
    /// Bridged networks: stations seen here are believed nowhere else, and are not forgotten.
    #[serde(default, skip_serializing_if = "is_no")]
    pub sticky: bool,
    /// Bridged networks: most stations learned here; none for what the network lets it have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac_limit: Option<usize>,
    /// How much may pass.
    #[serde(default, skip_serializing_if = "Bandwidth::is_unlimited")]
    pub bandwidth: Bandwidth,
    /// Ports of the host that lead here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub port_mappings: Vec<PortMapping>,
    /// Ports of the pod that policies may name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub named_ports: Vec<NamedPort>,
}

/// What is checked of a packet from a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SenderCheck {
    /// Nothing: a router or a bridge is behind it.
    None,
    /// The source MAC.
    Mac,
    /// The source MAC and address, and what ARP and neighbor discovery claim.
    Full,
    /// The source MAC, or more where the network checks more.
    AtLeastMac,
}

impl SenderCheck {
    /// Its name in the protocol.
    pub fn name(self) -> &'static str {
        match self {
            SenderCheck::None => "none",
            SenderCheck::Mac => "mac",
            SenderCheck::Full => "full",
            SenderCheck::AtLeastMac => "at_least_mac",
        }
    }
}

/// Rates of a port (CNI conventions, `bandwidth`). Ingress is towards the pod. A rate of zero is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields, default)]
pub struct Bandwidth {
    /// Bits a second to the pod.
    #[serde(skip_serializing_if = "is_zero")]
    pub ingress_rate: u64,
    /// Bits at once to the pod.
    #[serde(skip_serializing_if = "is_zero")]
    pub ingress_burst: u64,
    /// Bits a second from the pod.
    #[serde(skip_serializing_if = "is_zero")]
    pub egress_rate: u64,
    /// Bits at once from the pod.
    #[serde(skip_serializing_if = "is_zero")]
    pub egress_burst: u64,
}

/// A port of the host that leads to a pod's (CNI conventions, `portMappings`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortMapping {
    /// The host's.
    pub host_port: u16,
    /// The pod's.
    pub container_port: u16,
    /// Of which protocol.
    #[serde(default)]
    pub protocol: Protocol,
    /// The host's address; none for all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
}

/// A protocol with ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// One interface of one container (CNI specification, section 2).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attachment {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
}

impl PortSpec {
    /// A port with nothing but a link and a MAC.
    pub fn new(link: impl Into<String>, mac: MacAddr) -> PortSpec {
        PortSpec {
            link: link.into(),
            network: None,
            mac,
            addresses: Vec::new(),
            mtu: None,
            attachment: None,
            owner: None,
            netns: None,
            labels: BTreeMap::new(),
            default_route: true,
            check: None,
            trunk: Vec::new(),
            native: true,
            isolated: false,
            hairpin: false,
            sticky: false,
            mac_limit: None,
            bandwidth: Bandwidth::default(),
            port_mappings: Vec::new(),
            named_ports: Vec::new(),
        }
    }
}

impl Bandwidth {
    /// True if nothing is limited.
    pub fn is_unlimited(&self) -> bool {
        self.ingress_rate == 0 && self.egress_rate == 0
    }
}

impl Protocol {
    /// As nftables and people write it.
    pub fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => "sctp",
        }
    }
}
