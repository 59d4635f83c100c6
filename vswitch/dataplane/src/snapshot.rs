//! The snapshot: everything the data path decides by, immutable.
//!
//! Control compiles it and publishes it whole; a worker reads one snapshot for one turn. Big tables inside are shared by
//! shards, so that the next snapshot costs what changed and not what there is.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use vswitch_net::{MacAddr, NetworkIndex, PeerIndex, PortId, Vni};

use crate::table::fdb::Fdb;
use crate::table::route::Routes;
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
}

/// A port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Largest IP packet of the link, bytes.
    pub mtu: u32,
    /// What it leads to.
    pub kind: PortKind,
}

/// What a port leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortKind {
    /// A pod.
    Access(Access),
    /// The wire.
    Uplink,
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
}

/// A network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// Its identifier on the wire.
    pub vni: Vni,
    /// Its manner of forwarding.
    pub mode: NetworkMode,
    /// Whether ports may send with their own addresses only.
    pub spoof_check: bool,
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
    /// The port and header to reach it by; none until the kernel has resolved its next hop.
    pub reach: Option<Reach>,
}

/// How to reach a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reach {
    /// The uplink.
    pub port: PortId,
    /// Largest outer IP packet, bytes.
    pub mtu: u32,
    /// What to put before a packet.
    pub header: OuterHeader,
}

impl Snapshot {
    /// A port, if it exists.
    #[inline(always)]
    pub fn port(&self, port: PortId) -> Option<&Port> {
        self.ports.get(port.index())?.as_deref()
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
