//! Requests. Everything that changes the switch is one of these, whoever asks: config file, CNI or operator.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use vswitch_net::{MacAddr, Vni};

/// A request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Everything about the daemon on one page.
    Status,
    /// Plugs a link in.
    PortAdd(PortSpec),
    /// Unplugs a port. Unplugging what is not there is fine.
    PortDel {
        /// The port's host link.
        link: String,
    },
    /// All ports, or those of one link.
    PortList {
        /// Only the port of this host link.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        link: Option<String>,
    },
    /// Unplugs all ports of one owner except those still valid (CNI GC).
    PortGc {
        /// The CNI network name whose ports are meant.
        owner: String,
        /// What stays.
        valid: Vec<Attachment>,
    },
    /// Adds a network.
    NetworkAdd(NetworkSpec),
    /// Removes a network that has no ports.
    NetworkDel {
        /// Its name.
        name: String,
    },
    /// All networks.
    NetworkList,
    /// Adds a peer.
    PeerAdd(PeerSpec),
    /// Removes a peer with its routes and static stations.
    PeerDel {
        /// Its name.
        name: String,
    },
    /// All peers.
    PeerList,
    /// Adds a static station.
    FdbAdd(FdbSpec),
    /// Removes a station, static or learned.
    FdbDel {
        /// Its network.
        network: String,
        /// Its address.
        mac: MacAddr,
    },
    /// Stations of one network, or of all.
    FdbList {
        /// The network.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        network: Option<String>,
    },
    /// Adds a route to a peer.
    RouteAdd(RouteSpec),
    /// Removes a route to a peer.
    RouteDel {
        /// Its network.
        network: String,
        /// Its prefix.
        prefix: IpNet,
    },
    /// Routes of one network, or of all; those to local ports too.
    RouteList {
        /// The network.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        network: Option<String>,
    },
    /// Next hops of the underlay as the kernel resolved them.
    NeighborList,
    /// Flows that had a packet in the last ten seconds.
    FlowList {
        /// Most flows to show.
        #[serde(default = "default_flow_limit")]
        limit: usize,
    },
    /// Counters by port.
    Stats,
    /// Drops by reason and port.
    Drops,
}

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
    /// Labels, such as the pod's name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
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

/// How a network forwards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkMode {
    /// By IP address; every pod's gateway is the switch.
    #[default]
    Routed,
    /// By MAC address, as one Ethernet.
    Bridged,
}

/// A network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkSpec {
    /// Its name.
    pub name: String,
    /// Its VXLAN network identifier.
    pub vni: Vni,
    /// Its manner of forwarding.
    #[serde(default)]
    pub mode: NetworkMode,
    /// The whole network's prefixes, on all nodes. A bridged pod's address has the prefix length of the one it lies in.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub subnets: Vec<IpNet>,
    /// What this node's built-in IPAM gives out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ranges: Vec<IpNet>,
    /// Bridged networks: an IPv4 router in the network, for the pods' default route.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway_v4: Option<Ipv4Addr>,
    /// Bridged networks: an IPv6 router in the network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway_v6: Option<Ipv6Addr>,
    /// Whether a port may send with its own addresses only.
    #[serde(default = "yes")]
    pub spoof_check: bool,
}

/// Another node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerSpec {
    /// Its name.
    pub name: String,
    /// Its VTEP.
    pub vtep: IpAddr,
    /// Destination MAC of routed packets to it; another vswitch needs none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub router_mac: Option<MacAddr>,
    /// Bridged networks whose floods it gets; none for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub networks: Option<Vec<String>>,
}

/// A route to a peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteSpec {
    /// A routed network's name.
    pub network: String,
    /// Destination.
    pub prefix: IpNet,
    /// A peer's name.
    pub peer: String,
}

/// A static station.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FdbSpec {
    /// A bridged network's name.
    pub network: String,
    /// The station's address.
    pub mac: MacAddr,
    /// Where it is.
    pub at: FdbTarget,
}

/// Where a station is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FdbTarget {
    /// Behind a port, named by its host link.
    Port(String),
    /// Behind a peer, by name.
    Peer(String),
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
        }
    }
}

impl Request {
    /// True if it only asks, and changes nothing.
    pub fn is_question(&self) -> bool {
        matches!(
            self,
            Request::Status
                | Request::PortList { .. }
                | Request::NetworkList
                | Request::PeerList
                | Request::FdbList { .. }
                | Request::RouteList { .. }
                | Request::NeighborList
                | Request::FlowList { .. }
                | Request::Stats
                | Request::Drops
        )
    }
}

/// As a line of the log.
impl std::fmt::Display for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Request::PortAdd(spec) => {
                write!(f, "port add {}", spec.link)?;
                if let Some(attachment) = &spec.attachment {
                    write!(f, " for {} of container {}", attachment.ifname, attachment.container_id)?;
                }
                match spec.labels.get("K8S_POD_NAME") {
                    Some(pod) => write!(f, ", pod {pod}"),
                    None => Ok(()),
                }
            }
            Request::PortDel { link } => write!(f, "port del {link}"),
            Request::PortGc { owner, valid } => write!(f, "port gc of {owner}, {} valid", valid.len()),
            Request::NetworkAdd(spec) => write!(f, "network add {} vni {}", spec.name, spec.vni),
            Request::NetworkDel { name } => write!(f, "network del {name}"),
            Request::PeerAdd(spec) => write!(f, "peer add {} vtep {}", spec.name, spec.vtep),
            Request::PeerDel { name } => write!(f, "peer del {name}"),
            Request::FdbAdd(spec) => write!(f, "fdb add {} in {} at {}", spec.mac, spec.network, spec.at),
            Request::FdbDel { network, mac } => write!(f, "fdb del {mac} in {network}"),
            Request::RouteAdd(spec) => write!(f, "route add {} in {} to peer {}", spec.prefix, spec.network, spec.peer),
            Request::RouteDel { network, prefix } => write!(f, "route del {prefix} in {network}"),
            question => write!(f, "{question:?}"),
        }
    }
}

impl std::fmt::Display for FdbTarget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            FdbTarget::Port(link) => write!(f, "port {link}"),
            FdbTarget::Peer(name) => write!(f, "peer {name}"),
        }
    }
}

fn default_flow_limit() -> usize {
    1000
}

fn yes() -> bool {
    true
}
