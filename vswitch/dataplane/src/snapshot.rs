//! The snapshot: everything the data path decides by, immutable.
//!
//! Control compiles it and publishes it whole; a worker reads one snapshot for one turn. Big tables inside are shared by
//! shards, so that the next snapshot costs what changed and not what there is.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use vswitch_net::{MacAddr, NetworkIndex, PeerIndex, PortId, Vni};

use crate::bucket::Bucket;
use crate::table::egress::EgressByNetwork;
use crate::table::fdb::Fdb;
use crate::table::group::Groups;
use crate::table::neighbor::Neighbors;
use crate::table::policy::{Classes, Subject};
use crate::table::route::Routes;
use crate::table::service::Services;
use crate::vxlan::OuterHeader;

/// All that the data path knows.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Stamp of flow entries. It changes whenever an entry made before could now be wrong.
    pub generation: u64,
    /// By [`PortId`].
    pub ports: Vec<Option<Arc<Port>>>,
    /// By [`NetworkIndex`].
    pub networks: Vec<Option<Arc<Network>>>,
    /// By [`PeerIndex`].
    pub peers: Vec<Option<Arc<Peer>>>,
    /// Networks by VNI.
    pub vnis: HashMap<Vni, NetworkIndex, foldhash::fast::RandomState>,
    /// Peers by the address they send from.
    pub vteps: HashMap<IpAddr, PeerIndex, foldhash::fast::RandomState>,
    /// This node's VTEP.
    pub underlay: Underlay,
    /// Stations of bridged networks.
    pub fdb: Fdb,
    /// Routes of routed networks.
    pub routes: Routes,
    /// Stations of bridged networks by their addresses, whose ARP and neighbor discovery the switch answers.
    pub neighbors: Neighbors,
    /// Members of multicast groups.
    pub groups: Groups,
    /// Addresses that nobody has, and who answers for them.
    pub services: Services,
    /// What pods leave a routed network with, by network.
    pub egress: EgressByNetwork,
    /// What policies may ask about addresses.
    pub classes: Classes,
    /// Rules have numbers below this.
    pub rules: u32,
}

/// This node's VTEP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Underlay {
    /// IPv4 address.
    pub v4: Option<Ipv4Addr>,
    /// IPv6 address.
    pub v6: Option<Ipv6Addr>,
    /// UDP port of VXLAN, ours and the peers'.
    pub udp_port: u16,
    /// 802.1Q identifier of the underlay; none if it is untagged.
    pub vlan: Option<u16>,
    /// The network whose addresses the underlay routes, if peers are routed to directly.
    pub direct: Option<NetworkIndex>,
    /// Another MAC address of this router, for what peers send to it in VXLAN.
    pub router_mac: Option<MacAddr>,
}

/// A port.
#[derive(Clone, Debug)]
pub struct Port {
    /// Largest IP packet of the link, bytes.
    pub mtu: u32,
    /// Largest TCP packet, bytes: larger ones are cut. Less than the link's where what is behind it forwards.
    pub tcp_mtu: u32,
    /// What it leads to.
    pub kind: PortKind,
    /// What policies say of it.
    pub policy: Subject,
    /// How much may pass; none for as much as there is.
    pub limits: Option<Arc<Limits>>,
    /// How much of what goes to many may come, by network; as much as there is in others.
    pub storms: Vec<(NetworkIndex, Arc<Storm>)>,
    /// Who gets a copy of what the port sends.
    pub mirrors_from: Vec<Mirror>,
    /// Who gets a copy of what is sent to the port.
    pub mirrors_to: Vec<Mirror>,
}

/// How much of what goes to many may come from a port, in packets a second.
#[derive(Debug, Default)]
pub struct Storm {
    /// To everybody.
    pub broadcast: Option<Bucket>,
    /// To a group.
    pub multicast: Option<Bucket>,
    /// To a station that is not known.
    pub unknown: Option<Bucket>,
}

/// Who gets copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mirror {
    /// A port here.
    Port(PortId),
    /// A peer, in VXLAN, in this network.
    Peer(PeerIndex, NetworkIndex),
}

/// Who gets a group's packets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Receivers {
    /// Ports here.
    pub ports: Vec<PortId>,
    /// Peers.
    pub peers: Vec<PeerIndex>,
}

/// How much may pass a port, in bits a second.
#[derive(Debug, Default)]
pub struct Limits {
    /// From the port into the switch.
    pub from: Option<Bucket>,
    /// From the switch to the port.
    pub to: Option<Bucket>,
}

/// What a port leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortKind {
    /// A pod, or the host's stack.
    Access(Access),
    /// The wire; the link's own MAC address.
    Uplink(MacAddr),
}

/// A pod's port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// Its network.
    pub network: NetworkIndex,
    /// The pod's MAC address.
    pub mac: MacAddr,
    /// The pod's addresses. Empty means that they are not known and not checked (bridged networks only).
    pub addresses: Vec<IpAddr>,
    /// What is checked of a sender.
    pub check: SenderCheck,
    /// Whether packets without a tag belong to `network`. Only a trunk port may refuse them.
    pub has_native: bool,
    /// A trunk's tagged networks, by 802.1Q identifier. Empty for an access port.
    pub vlans: Vec<(u16, NetworkIndex)>,
    /// Exchanges nothing with other isolated ports.
    pub is_isolated: bool,
    /// May get its own packets back.
    pub is_hairpin: bool,
    /// Stations seen here are believed nowhere else.
    pub is_sticky: bool,
}

/// What is checked of a packet from a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SenderCheck {
    /// Nothing: a router is behind it.
    None,
    /// That the source is no pod's: the host's stack is behind it.
    Elsewhere,
    /// The source MAC.
    Mac,
    /// The source MAC, the source address, and what ARP and neighbor discovery claim.
    Full,
}

/// A network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// Its identifier on the wire.
    pub vni: Vni,
    /// Its manner of forwarding.
    pub mode: NetworkMode,
    /// This node's own IPv4 address in a routed network: the source of its ICMP errors.
    pub router_v4: Option<Ipv4Addr>,
    /// This node's own IPv6 address in a routed network.
    pub router_v6: Option<Ipv6Addr>,
    /// Largest TCP segment, IPv4 and IPv6, written into what opens a connection over the wire.
    pub mss: Option<(u16, u16)>,
    /// Whether 802.1Q and 802.1ad tags are carried as payload.
    pub is_transparent: bool,
    /// Whether stations are learned from what they send.
    pub learns: bool,
    /// Who gets multicast that nobody has asked for, if the network knows who has asked; none if it goes to all.
    pub multicast_routers: Option<Receivers>,
    /// Ports here, for flooding.
    pub ports: Vec<PortId>,
    /// Peers to replicate floods to (head-end replication).
    pub flood_peers: Vec<PeerIndex>,
}

/// How a network forwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetworkMode {
    /// By MAC address.
    Bridged,
    /// By IP address; the switch is every port's gateway.
    Routed(Gateway),
}

/// The gateway of a routed network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gateway {
    /// Its MAC, on ports and as the source of routed packets.
    pub mac: MacAddr,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
}

/// Another node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its VTEP.
    pub vtep: IpAddr,
    /// Destination MAC of routed packets to it, inside VXLAN.
    pub router_mac: MacAddr,
    /// True if the network that the underlay routes is sent to it without encapsulation.
    pub is_direct: bool,
    /// Ways to it, of equal cost. Empty until the kernel has resolved a next hop.
    pub paths: Vec<Path>,
}

/// One way to a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Path {
    /// The uplink.
    pub port: PortId,
    /// Largest outer IP packet, bytes.
    pub mtu: u32,
    /// What to put before a packet.
    pub header: OuterHeader,
}

impl Underlay {
    /// True for an address of our VTEP.
    pub fn is_ours(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(v4) => self.v4 == Some(v4),
            IpAddr::V6(v6) => self.v6 == Some(v6),
        }
    }
}

impl Port {
    /// A port without limits and mirrors.
    pub fn new(mtu: u32, kind: PortKind) -> Port {
        Port {
            mtu,
            tcp_mtu: mtu,
            kind,
            policy: Subject::default(),
            limits: None,
            storms: Vec::new(),
            mirrors_from: Vec::new(),
            mirrors_to: Vec::new(),
        }
    }
}

impl Access {
    /// A port of one network, without tags.
    pub fn new(network: NetworkIndex, mac: MacAddr, addresses: Vec<IpAddr>, check: SenderCheck) -> Access {
        Access {
            network,
            mac,
            addresses,
            check,
            has_native: true,
            vlans: Vec::new(),
            is_isolated: false,
            is_hairpin: false,
            is_sticky: false,
        }
    }

    /// The network of packets without a tag.
    pub fn native(&self) -> Option<NetworkIndex> {
        self.has_native.then_some(self.network)
    }

    /// How a packet of `network` leaves by this port: none if not at all, else its tag.
    #[inline]
    pub fn tag_of(&self, network: NetworkIndex) -> Option<Option<u16>> {
        if self.has_native && network == self.network {
            return Some(None);
        }
        self.vlans.iter().find(|(_, other)| *other == network).map(|&(vid, _)| Some(vid))
    }
}

impl Peer {
    /// The path of a flow: the same for all its packets, others for other flows.
    #[inline]
    pub fn path(&self, hash: u64) -> Option<&Path> {
        match &self.paths[..] {
            [] => None,
            [one] => Some(one),
            many => many.get((((hash & 0xffff_ffff) * many.len() as u64) >> 32) as usize),
        }
    }
}

impl Snapshot {
    /// A port, if it exists.
    #[inline(always)]
    pub fn port(&self, port: PortId) -> Option<&Port> {
        self.ports.get(port.index())?.as_deref()
    }

    /// What an access port leads to; none for an uplink.
    #[inline]
    pub fn access(&self, port: PortId) -> Option<&Access> {
        match self.port(port).map(|port| &port.kind) {
            Some(PortKind::Access(access)) => Some(access),
            _ => None,
        }
    }

    /// True for a pod's port, and not the host's.
    #[inline]
    pub fn is_pod(&self, port: PortId) -> bool {
        self.access(port).is_some_and(|access| access.check != SenderCheck::Elsewhere)
    }

    /// True if packets of the network go to the peer as they are.
    #[inline]
    pub fn is_direct(&self, peer: PeerIndex, network: NetworkIndex) -> bool {
        self.underlay.direct == Some(network) && self.peer(peer).is_some_and(|peer| peer.is_direct)
    }

    /// A network, if it exists.
    #[inline(always)]
    pub fn network(&self, network: NetworkIndex) -> Option<&Network> {
        self.networks.get(network.index())?.as_deref()
    }

    /// A peer, if it exists.
    #[inline(always)]
    pub fn peer(&self, peer: PeerIndex) -> Option<&Peer> {
        self.peers.get(peer.index())?.as_deref()
    }
}
