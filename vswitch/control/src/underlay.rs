//! What the kernel told of the underlay: the uplinks and the next hops of peers.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use vswitch_net::{MacAddr, POD_LINK_MTU, PortId, VXLAN_OVERHEAD_V4, VXLAN_OVERHEAD_V6};

use crate::UPLINK_PORT;
use crate::backend::Attached;

/// What every Ethernet carries; taken for an uplink that is not there yet.
const ETHERNET_MTU: u32 = 1500;

/// An uplink as it is now.
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
    /// What happened to it last, in a sentence; none if nothing has.
    pub note: Option<String>,
}

/// One way in which the kernel would reach a VTEP.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NextHop {
    /// The link of the route.
    pub link: Option<String>,
    /// The gateway, or the VTEP itself if it is on the link.
    pub address: Option<IpAddr>,
    /// The MAC address, once resolved.
    pub mac: Option<MacAddr>,
    /// The route's MTU, if it is less than the link's.
    pub mtu: Option<u32>,
}

#[derive(Debug)]
pub(crate) struct UnderlayView {
    uplinks: Vec<Uplink>,
    /// Ways of equal cost to each VTEP.
    pub(crate) next_hops: BTreeMap<IpAddr, Vec<NextHop>>,
    pub(crate) udp_port: u16,
}

/// A link that shall be an uplink.
#[derive(Debug)]
pub(crate) struct Uplink {
    /// Its name in the configuration.
    pub(crate) name: String,
    pub(crate) port: PortId,
    /// What it is, or why it is not usable.
    pub(crate) state: Result<UplinkState, String>,
}

impl UnderlayView {
    pub(crate) fn new(udp_port: u16, expected: &[String]) -> UnderlayView {
        let uplinks = expected.iter().enumerate().map(|(at, name)| Uplink {
            name: name.clone(),
            port: PortId(UPLINK_PORT.0 + at as u16),
            state: Err(format!("gone: see `ip link show {name}`")),
        });
        UnderlayView { uplinks: uplinks.collect(), next_hops: BTreeMap::new(), udp_port }
    }

    /// True if it was told something new.
    pub(crate) fn set_uplink(&mut self, port: PortId, state: Result<UplinkState, String>) -> bool {
        if self.uplinks.iter().all(|uplink| uplink.port != port) {
            let name = state.as_ref().map_or_else(|_| String::new(), |state| state.link.clone());
            self.uplinks.push(Uplink { name, port, state });
            return true;
        }
        let Some(uplink) = self.uplinks.iter_mut().find(|uplink| uplink.port == port) else { return false };
        let is_new = uplink.state != state;
        uplink.state = state;
        is_new
    }

    pub(crate) fn uplinks(&self) -> &[Uplink] {
        &self.uplinks
    }

    /// Those that are there, with their ports.
    pub(crate) fn present(&self) -> impl Iterator<Item = (PortId, &UplinkState)> {
        self.uplinks.iter().filter_map(|uplink| Some((uplink.port, uplink.state.as_ref().ok()?)))
    }

    pub(crate) fn uplink(&self, port: PortId) -> Option<&UplinkState> {
        self.present().find(|(other, _)| *other == port).map(|(_, state)| state)
    }

    /// True for a link that is an uplink, or shall be one.
    pub(crate) fn is_uplink(&self, link: &str) -> bool {
        self.uplinks.iter().any(|uplink| uplink.name == link) || self.present().any(|(_, state)| state.link == link)
    }

    /// Our VTEP of IPv4. All uplinks have the same.
    pub(crate) fn v4(&self) -> Option<Ipv4Addr> {
        self.present().find_map(|(_, state)| state.v4)
    }

    /// Our VTEP of IPv6.
    pub(crate) fn v6(&self) -> Option<Ipv6Addr> {
        self.present().find_map(|(_, state)| state.v6)
    }

    /// Our address of a peer's family.
    pub(crate) fn vtep_for(&self, peer: IpAddr) -> Option<IpAddr> {
        match peer {
            IpAddr::V4(_) => self.v4().map(IpAddr::V4),
            IpAddr::V6(_) => self.v6().map(IpAddr::V6),
        }
    }

    pub(crate) fn is_ours(&self, address: IpAddr) -> bool {
        self.vtep_for(address) == Some(address)
    }

    /// The MTU of what leaves the node as it is: the smallest of the uplinks'.
    pub(crate) fn mtu(&self) -> u32 {
        let smallest = self.present().map(|(_, state)| state.mtu).min();
        smallest.unwrap_or(if self.uplinks.is_empty() { POD_LINK_MTU } else { ETHERNET_MTU }).min(POD_LINK_MTU)
    }

    /// The MTU of what leaves the node in VXLAN: less the largest header that may come to be used. A pod keeps what it was
    /// told, so a peer of the other family that comes later must be served too.
    pub(crate) fn encapsulated_mtu(&self, mut peers: impl Iterator<Item = IpAddr>) -> u32 {
        if self.uplinks.is_empty() {
            return POD_LINK_MTU;
        }
        let may_be_v6 = self.v6().is_some() || self.v4().is_none() || peers.any(|peer| peer.is_ipv6());
        let overhead = if may_be_v6 { VXLAN_OVERHEAD_V6 } else { VXLAN_OVERHEAD_V4 };
        self.mtu().saturating_sub(overhead)
    }

    /// The uplinks that lead to a peer now, and the next hop of each.
    pub(crate) fn ways(&self, vtep: IpAddr) -> impl Iterator<Item = (PortId, &UplinkState, &NextHop)> {
        self.next_hops.get(&vtep).into_iter().flatten().filter_map(|hop| {
            let link = hop.link.as_deref()?;
            let (port, state) = self.present().find(|(_, state)| state.link == link && state.is_up)?;
            hop.mac.map(|_| (port, state, hop))
        })
    }

    /// True for an address of the underlay that packets to peers go by.
    pub(crate) fn is_next_hop(&self, address: IpAddr) -> bool {
        self.next_hops.values().flatten().any(|hop| hop.address == Some(address))
    }

    /// What stands between us and a peer, or `reachable`.
    pub(crate) fn peer_state(&self, vtep: IpAddr) -> String {
        if self.is_ours(vtep) {
            return "this node's own address: name another node's".to_owned();
        }
        let [first, ..] = &self.uplinks[..] else {
            return "no uplink: set uplink.link in the configuration".to_owned();
        };
        if let (None, Err(reason)) = (self.present().next(), &first.state) {
            return format!("the uplink {} is not usable: {reason}", first.name);
        }
        if self.vtep_for(vtep).is_none() {
            let family = if vtep.is_ipv4() { "IPv4" } else { "IPv6" };
            return format!("no {family} VTEP: give {} an {family} address or set uplink.vtep", first.name);
        }
        if self.ways(vtep).next().is_some() {
            return "reachable".to_owned();
        }
        match self.next_hops.get(&vtep).map(|hops| hops.first()) {
            None => "not looked up yet".to_owned(),
            Some(None | Some(NextHop { link: None, .. })) => {
                format!("no route to {vtep}: see `ip route get {vtep}`")
            }
            Some(Some(NextHop { link: Some(link), address, .. })) => {
                match self.present().find(|(_, state)| state.link == *link) {
                    None => format!("the route to {vtep} leaves by {link}, which is no uplink"),
                    Some((_, state)) if !state.is_up => format!("{link} is down: see `ip link show {link}`"),
                    Some(_) => match address {
                        Some(address) => {
                            format!("no neighbor entry for {address}: is it up? see `ip neigh show {address}`")
                        }
                        None => "no next hop".to_owned(),
                    },
                }
            }
        }
    }
}
