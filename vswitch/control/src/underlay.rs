//! What the kernel told of the underlay: the uplink and the next hops of peers.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use vswitch_net::{MacAddr, POD_LINK_MTU, VXLAN_OVERHEAD_V4, VXLAN_OVERHEAD_V6};

use crate::backend::Attached;

/// What every Ethernet carries; taken for an uplink that is not there yet.
const ETHERNET_MTU: u32 = 1500;

/// The uplink as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UplinkState {
    /// Its name.
    pub link: String,
    /// Its MAC address.
    pub mac: MacAddr,
    /// Its MTU.
    pub mtu: u32,
    /// Whether the link is up and running.
    pub is_up: bool,
    /// Our IPv4 VTEP.
    pub v4: Option<Ipv4Addr>,
    /// Our IPv6 VTEP.
    pub v6: Option<Ipv6Addr>,
    /// How it is attached.
    pub attached: Attached,
}

/// How the kernel would reach a VTEP.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NextHop {
    /// The link of the route.
    pub link: Option<String>,
    /// The gateway, or the VTEP itself if it is on the link.
    pub address: Option<IpAddr>,
    /// The MAC address, once resolved.
    pub mac: Option<MacAddr>,
}

#[derive(Debug)]
pub(crate) struct UnderlayView {
    pub(crate) uplink: Option<UplinkState>,
    pub(crate) next_hops: BTreeMap<IpAddr, NextHop>,
    pub(crate) udp_port: u16,
    /// The link that shall be the uplink.
    pub(crate) expected: Option<String>,
}

impl UplinkState {
    /// Our address of a peer's family.
    pub(crate) fn vtep_for(&self, peer: IpAddr) -> Option<IpAddr> {
        match peer {
            IpAddr::V4(_) => self.v4.map(IpAddr::V4),
            IpAddr::V6(_) => self.v6.map(IpAddr::V6),
        }
    }
}

impl UnderlayView {
    pub(crate) fn new(udp_port: u16, expected: Option<String>) -> UnderlayView {
        UnderlayView { uplink: None, next_hops: BTreeMap::new(), udp_port, expected }
    }

    /// MTU of routes that leave the node: the uplink's, less the largest header that may come to be used. A pod keeps
    /// what it was told, so a peer of the other family that comes later must be served too.
    pub(crate) fn wire_mtu(&self, mut peers: impl Iterator<Item = IpAddr>) -> u32 {
        let (mtu, may_be_v6) = match &self.uplink {
            Some(uplink) => {
                (uplink.mtu, uplink.v6.is_some() || uplink.v4.is_none() || peers.any(|peer| peer.is_ipv6()))
            }
            None if self.expected.is_some() => (ETHERNET_MTU, true),
            None => return POD_LINK_MTU,
        };
        let overhead = if may_be_v6 { VXLAN_OVERHEAD_V6 } else { VXLAN_OVERHEAD_V4 };
        mtu.saturating_sub(overhead).min(POD_LINK_MTU)
    }

    /// What stands between us and a peer, or `reachable`.
    pub(crate) fn peer_state(&self, vtep: IpAddr) -> String {
        let Some(uplink) = &self.uplink else {
            return match &self.expected {
                Some(link) => format!("the uplink {link} is gone: see `ip link show`"),
                None => "no uplink: set uplink.link in the configuration".to_owned(),
            };
        };
        if uplink.vtep_for(vtep).is_none() {
            let family = if vtep.is_ipv4() { "IPv4" } else { "IPv6" };
            return format!("no {family} VTEP: give {} an {family} address or set uplink.vtep", uplink.link);
        }
        match self.next_hops.get(&vtep) {
            None => "not looked up yet".to_owned(),
            Some(NextHop { link: None, .. }) => format!("no route to {vtep}: see `ip route get {vtep}`"),
            Some(NextHop { link: Some(link), .. }) if *link != uplink.link => {
                format!("the route to {vtep} leaves by {link}, not by the uplink {}", uplink.link)
            }
            Some(NextHop { mac: None, address, .. }) => match address {
                Some(address) => format!("no neighbor entry for {address}: is it up? see `ip neigh show {address}`"),
                None => "no next hop".to_owned(),
            },
            Some(_) => "reachable".to_owned(),
        }
    }
}
