//! Networks, and what leads beyond a node: peers, routes, stations, mirrors.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use vswitch_net::{MacAddr, Vni};

use crate::defaults::{is_no, is_yes, yes};

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
    /// Routed networks: where services have their addresses. Pods reach them with the MTU of their links, as they do each
    /// other; a service elsewhere is reached with what fits the wire.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<IpNet>,
    /// Routed networks: MTU of pods' routes to the IPv4 prefixes of `subnets`, bytes; none for what the wire carries. More is for
    /// clusters whose nodes all are switches like this: TCP is cut here to what the wire carries, and joined there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subnet_mtu: Option<u32>,
    /// Bridged networks: an IPv4 router in the network, for the pods' default route.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway_v4: Option<Ipv4Addr>,
    /// Bridged networks: an IPv6 router in the network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway_v6: Option<Ipv6Addr>,
    /// Whether a port may send with its own addresses only.
    #[serde(default = "yes")]
    pub spoof_check: bool,
    /// Routed networks: this node's own addresses, from which its ICMP errors come and by which the host's stack is
    /// reached. None for the first address of the first range of each family.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub router: Option<Vec<IpAddr>>,
    /// Routed networks: lower the segment size that TCP connections over the wire announce to what fits it.
    #[serde(default, skip_serializing_if = "is_no")]
    pub mss_clamp: bool,
    /// Bridged networks: a VXLAN device of the kernel whose forwarding entries are followed, for EVPN.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub follow: Option<String>,
    /// Its 802.1Q identifier on trunk ports, 1 to 4094.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<u16>,
    /// Bridged networks: answer ARP and neighbor discovery for stations that are known.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub neighbor_suppression: bool,
    /// Bridged networks: send multicast to those who have joined (IGMP and MLD snooping).
    #[serde(default, skip_serializing_if = "is_no")]
    pub multicast_snooping: bool,
    /// Bridged networks: how much each port may send to many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storm: Option<StormLimits>,
    /// Bridged networks: carry frames that have tags as they are (QinQ).
    #[serde(default, skip_serializing_if = "is_no")]
    pub transparent: bool,
    /// Bridged networks: learn stations from what they send. Off, all goes to all but what is for a port's own address: for
    /// copies of mirrors.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub learning: bool,
}

/// How much a port may send to many, in packets a second. Zero is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StormLimits {
    /// To everybody.
    pub broadcast: u64,
    /// To groups.
    pub multicast: u64,
    /// To stations that are not known.
    pub unknown_unicast: u64,
}

/// Another node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerSpec {
    /// Its name.
    pub name: String,
    /// Its VTEP.
    pub vtep: IpAddr,
    /// Its VTEP of the other family, for a node of both: used while the first is out of reach.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub other_vtep: Option<IpAddr>,
    /// Destination MAC of routed packets to it; another vswitch needs none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub router_mac: Option<MacAddr>,
    /// Bridged networks whose floods it gets; none for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub networks: Option<Vec<String>>,
    /// How packets of the host's network travel to it. Those of other networks always travel in VXLAN.
    #[serde(default, skip_serializing_if = "Encap::is_vxlan")]
    pub encap: Encap,
}

/// How packets of the network that is joined to the host travel to a peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Encap {
    /// In VXLAN.
    #[default]
    Vxlan,
    /// As they are if the peer is on the uplink's link, else in VXLAN.
    CrossSubnet,
    /// As they are: the underlay's routers know the pods' addresses.
    Direct,
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
    /// Its addresses, if ARP and neighbor discovery for it are to be answered.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
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

/// Copies of what passes ports (SPAN).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MirrorSpec {
    /// Its name.
    pub name: String,
    /// The ports to look at, by their host links.
    pub ports: Vec<String>,
    /// Which way.
    #[serde(default)]
    pub direction: MirrorDirection,
    /// Who gets the copies: a port, or a peer in VXLAN.
    pub to: FdbTarget,
    /// The bridged network that copies to a peer travel in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
}

/// Which way packets go that a mirror copies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MirrorDirection {
    /// Both.
    #[default]
    Both,
    /// From the port into the switch.
    From,
    /// From the switch to the port.
    To,
}

impl PeerSpec {
    /// Its VTEPs, the first one first.
    pub fn vteps(&self) -> impl Iterator<Item = IpAddr> {
        [Some(self.vtep), self.other_vtep].into_iter().flatten()
    }
}

impl Encap {
    fn is_vxlan(&self) -> bool {
        *self == Encap::Vxlan
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
