//! The miss path: one packet meets the tables.
//!
//! Anti-spoofing first, then what the switch answers itself (ARP and neighbor solicitation for a gateway), then the FDB
//! or the routes. The verdict is pure; learning and the flow entry are the caller's.

use std::net::IpAddr;

use vswitch_net::{MacAddr, PortId};

use crate::event::Location;
use crate::icmp;
use crate::meta::{Kind, Meta};
use crate::multicast;
use crate::parse::{ICMPV6, u16_at, u32_at, v6_at};
use crate::snapshot::{Access, Gateway, Network, NetworkMode, PortKind, SenderCheck, Snapshot};
use crate::table::policy::Class;
use crate::table::route::NextHop;
use crate::verdict::{Action, DropReason, Output, Rewrite, Verdict};

/// ICMPv6 types of neighbor discovery (RFC 4861 section 4).
const ROUTER_SOLICITATION: u8 = 133;
const NEIGHBOR_SOLICITATION: u8 = 135;
const NEIGHBOR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;

/// Options of neighbor discovery that tell a MAC address (RFC 4861 section 4.6.1).
const SOURCE_LINK_LAYER: u8 = 1;
const TARGET_LINK_LAYER: u8 = 2;

/// A verdict, and whether the sender's address is to be learned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// What to do.
    pub verdict: Verdict,
    /// Where the sender was seen, for bridged networks.
    pub learn: Option<Location>,
}

/// Which side a packet came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// From a port here.
    Port,
    /// From another node.
    Wire,
}

/// Whether a packet's sender may have sent it, by the snapshot alone. `head` is the first frame that `meta` was parsed from.
///
/// # Errors
///
/// Why not.
pub fn check(meta: &Meta, head: &[u8], snapshot: &Snapshot) -> Result<Origin, DropReason> {
    let network = snapshot.network(meta.network).ok_or(DropReason::UnknownVni)?;
    if meta.source.is_multicast() || meta.source.is_zero() {
        return Err(DropReason::BadSourceMac);
    }
    match snapshot.port(meta.ingress).map(|port| &port.kind) {
        Some(PortKind::Access(access)) => check_sender(meta, head, access, network, snapshot).map(|()| Origin::Port),
        Some(PortKind::Uplink(_)) if meta.peer.is_some() => check_peer(meta, snapshot).map(|()| Origin::Wire),
        Some(PortKind::Uplink(_)) => check_direct(meta, snapshot).map(|()| Origin::Wire),
        None => Err(DropReason::NoPort),
    }
}

/// Decides about a packet that [`check`] let pass, by the snapshot alone.
pub fn decide(meta: &Meta, head: &[u8], origin: Origin, snapshot: &Snapshot) -> Decision {
    match snapshot.network(meta.network).map(|network| (network, network.mode)) {
        None => drop_it(DropReason::UnknownVni),
        Some((network, NetworkMode::Bridged)) => bridge(meta, head, network, snapshot),
        Some((_, NetworkMode::Routed(gateway))) => {
            let verdict = route(meta, head, &gateway, origin, snapshot).unwrap_or_else(Verdict::Drop);
            Decision { verdict, learn: None }
        }
    }
}

/// Whether packets like this one may take the flow table's way: not those whose contents are judged, which no key holds.
pub(crate) fn is_cacheable(meta: &Meta) -> bool {
    meta.kind != Kind::Arp
        && !meta.is_control
        && (meta.has_ports || meta.fragment.is_none())
        && !is_discovery(meta)
        && !icmp::is_error(meta)
        && !icmp::is_fragment(meta)
}

/// Forwarding by MAC (802.1Q-2018 section 8.6).
fn bridge(meta: &Meta, head: &[u8], network: &Network, snapshot: &Snapshot) -> Decision {
    if is_reserved(meta.destination) {
        return drop_it(DropReason::ReservedMac);
    }
    let here = match meta.peer {
        Some(peer) => Location::Peer(peer),
        None => Location::Port(meta.ingress),
    };
    if let Some(Location::Port(owner)) = snapshot.fdb.lookup(meta.network, meta.source)
        && here != Location::Port(owner)
        && snapshot.access(owner).is_some_and(|access| access.is_sticky)
    {
        return drop_it(DropReason::StickyMac);
    }
    let verdict = if meta.destination.is_multicast() {
        let is_group = network.multicast_routers.is_some()
            && (multicast::is_snooped(meta)
                || multicast::is_report(meta, head)
                || (meta.peer.is_some() && multicast::is_ask(meta, head)));
        match () {
            () if meta.peer.is_none() && known_neighbor(meta, head, snapshot).is_some() => Verdict::Reply,
            () if is_group => Verdict::Group,
            () => Verdict::Flood,
        }
    } else {
        match (snapshot.fdb.lookup(meta.network, meta.destination), meta.peer) {
            (None, _) => Verdict::Flood,
            (Some(Location::Port(port)), None) if port == meta.ingress && !is_hairpin(port, snapshot) => {
                Verdict::Drop(DropReason::SamePort)
            }
            (Some(Location::Port(port)), _) if are_isolated(meta.ingress, port, snapshot) => {
                Verdict::Drop(DropReason::Isolated)
            }
            (Some(Location::Port(port)), _) => Verdict::Forward(Action::new(None, Output::Port(port))),
            (Some(Location::Peer(_)), Some(_)) => Verdict::Drop(DropReason::SplitHorizon),
            (Some(Location::Peer(peer)), None) => {
                Verdict::Forward(Action::new(None, Output::Encap { peer, network: meta.network }))
            }
        }
    };
    Decision { verdict, learn: network.learns.then_some(here) }
}

/// The station that an ARP request or a neighbor solicitation asks for, if the switch knows it: asking is answered here
/// and goes no further. What a station says of itself, or asks about its own address, goes to all.
pub(crate) fn known_neighbor(meta: &Meta, head: &[u8], snapshot: &Snapshot) -> Option<MacAddr> {
    let asked: IpAddr = match meta.kind {
        Kind::Arp => {
            let arp = Arp::parse(head, usize::from(meta.l3)).ok()?;
            (arp.is_request && arp.sender != arp.target).then_some(arp.target)?.into()
        }
        Kind::V6 if is_discovery(meta) && icmp_type(meta) == NEIGHBOR_SOLICITATION && meta.ttl == 255 => {
            v6_at(head, usize::from(meta.l4) + 8).ok()?.into()
        }
        _ => return None,
    };
    snapshot.neighbors.lookup(meta.network, asked).filter(|mac| *mac != meta.source)
}

/// Forwarding by IP (RFC 1812 section 5).
fn route(
    meta: &Meta,
    head: &[u8],
    gateway: &Gateway,
    origin: Origin,
    snapshot: &Snapshot,
) -> Result<Verdict, DropReason> {
    let is_from_pod = origin == Origin::Port;
    match meta.kind {
        Kind::Other => return Err(DropReason::NotIp),
        Kind::Arp => {
            return if is_from_pod { answer_arp(meta, head, gateway) } else { Err(DropReason::NeighborIgnored) };
        }
        Kind::V4 | Kind::V6 => {}
    }
    let (source, destination) = meta.addresses().ok_or(DropReason::NotIp)?;
    if is_discovery(meta) {
        return if is_from_pod { answer_solicitation(meta, head, gateway) } else { Err(DropReason::NeighborIgnored) };
    }
    let is_broadcast = destination == IpAddr::V4(std::net::Ipv4Addr::BROADCAST);
    if destination.is_multicast() || is_broadcast || meta.destination.is_multicast() {
        return Err(DropReason::RoutedMulticast);
    }
    if meta.destination != gateway.mac {
        return Err(DropReason::NotForGateway);
    }
    if destination == IpAddr::V4(gateway.v4) || destination == IpAddr::V6(gateway.v6) {
        return if is_from_pod { to_gateway(meta) } else { Err(DropReason::ToGateway) };
    }
    if stays_on_link(source) || stays_on_link(destination) {
        return Err(DropReason::LinkLocal);
    }
    if icmp::is_error(meta) && !icmp::quotes(meta, head, |_| true) {
        return Err(DropReason::ForgedError);
    }
    let next_hop = snapshot.routes.lookup(meta.network, destination);
    if next_hop == Some(NextHop::Gateway) {
        return to_gateway(meta);
    }
    if meta.ttl <= 1 {
        return Err(DropReason::TtlExpired);
    }
    match next_hop {
        None => Err(DropReason::NoRoute),
        Some(NextHop::Nowhere) => Err(DropReason::NoHost),
        Some(NextHop::Gateway) => to_gateway(meta),
        Some(NextHop::Port { port, .. }) if port == meta.ingress && !meta.may_return && !is_hairpin(port, snapshot) => {
            Err(DropReason::SamePort)
        }
        Some(NextHop::Port { port, .. }) if are_isolated(meta.ingress, port, snapshot) => Err(DropReason::Isolated),
        Some(NextHop::Port { port, mac }) => {
            let rewrite = Some(Rewrite { destination: mac, source: gateway.mac });
            Ok(Verdict::Forward(Action::new(rewrite, Output::Port(port))))
        }
        Some(NextHop::Peer(_)) if !is_from_pod => Err(DropReason::SplitHorizon),
        Some(NextHop::Peer(peer)) => {
            let mac = snapshot.peer(peer).ok_or(DropReason::NoNeighbor)?.router_mac;
            let rewrite = Some(Rewrite { destination: mac, source: gateway.mac });
            Ok(Verdict::Forward(Action::new(rewrite, Output::Encap { peer, network: meta.network })))
        }
    }
}

/// The gateway answers ping, and nothing else.
fn to_gateway(meta: &Meta) -> Result<Verdict, DropReason> {
    if icmp::is_echo_request(meta) { Ok(Verdict::Reply) } else { Err(DropReason::ToGateway) }
}

fn are_isolated(one: PortId, other: PortId, snapshot: &Snapshot) -> bool {
    let is_isolated = |port| snapshot.access(port).is_some_and(|access| access.is_isolated);
    one != other && is_isolated(one) && is_isolated(other)
}

fn is_hairpin(port: PortId, snapshot: &Snapshot) -> bool {
    snapshot.access(port).is_some_and(|access| access.is_hairpin)
}

/// Another node speaks for its own pods, and never for one that is here: who has an address decides what it may.
fn check_peer(meta: &Meta, snapshot: &Snapshot) -> Result<(), DropReason> {
    let Some((source, _)) = meta.addresses() else { return Ok(()) };
    let is_here = match snapshot.routes.lookup(meta.network, source) {
        Some(NextHop::Port { port, .. }) => {
            snapshot.access(port).is_some_and(|access| access.addresses.contains(&source))
        }
        Some(_) => false,
        // A bridged network knows who has an address from its ports' own.
        None => snapshot
            .neighbors
            .lookup(meta.network, source)
            .and_then(|mac| snapshot.fdb.lookup(meta.network, mac))
            .is_some_and(|location| matches!(location, Location::Port(_))),
    };
    // This node's own address is whoever speaks from it, too.
    let is_this_node = snapshot.classes.lookup(meta.network, source).is_host();
    if is_here || is_this_node { Err(DropReason::SpoofedAddress) } else { Ok(()) }
}

/// What comes from the wire without VXLAN comes from a peer that is routed to directly, and from an address behind it.
fn check_direct(meta: &Meta, snapshot: &Snapshot) -> Result<(), DropReason> {
    let (source, _) = meta.addresses().ok_or(DropReason::NotDirect)?;
    match snapshot.routes.lookup(meta.network, source) {
        Some(NextHop::Peer(peer)) if snapshot.is_direct(peer, meta.network) => Ok(()),
        _ => Err(DropReason::NotDirect),
    }
}

/// A pod sends with its own MAC and addresses only, and claims no others in ARP and neighbor discovery.
fn check_sender(
    meta: &Meta,
    head: &[u8],
    access: &Access,
    network: &Network,
    snapshot: &Snapshot,
) -> Result<(), DropReason> {
    match access.check {
        SenderCheck::None => return Ok(()),
        SenderCheck::Elsewhere => return check_elsewhere(meta, snapshot),
        SenderCheck::Mac | SenderCheck::Full => {}
    }
    if meta.source != access.mac {
        return Err(DropReason::SpoofedMac);
    }
    if access.check == SenderCheck::Mac || access.addresses.is_empty() {
        // Whose addresses are not known may have any but those that are somebody's.
        let source = meta.addresses().map(|(source, _)| source).filter(|source| !access.addresses.contains(source));
        let is_anothers = source.is_some_and(|source| {
            snapshot.classes.lookup(meta.network, source) != Class::WORLD
                && source != IpAddr::V6(access.mac.link_local())
        });
        return if is_anothers { Err(DropReason::SpoofedAddress) } else { Ok(()) };
    }
    let owns = |address: IpAddr| access.addresses.contains(&address);
    match meta.kind {
        Kind::Arp => {
            let arp = Arp::parse(head, usize::from(meta.l3))?;
            // An address probe has no sender yet (RFC 5227 section 1.1).
            let is_own = arp.sender.is_unspecified() || owns(arp.sender.into());
            if is_own && arp.sender_mac == access.mac { Ok(()) } else { Err(DropReason::SpoofedNeighbor) }
        }
        Kind::V4 | Kind::V6 => {
            let (source, _) = meta.addresses().ok_or(DropReason::NotIp)?;
            // A host may speak from its link-local address, and from none before it has one (RFC 4862 section 5.4). A
            // routed network takes neither further, so there it may be any.
            let is_local = |address: IpAddr| match address {
                IpAddr::V4(_) => false,
                IpAddr::V6(v6) if network.mode == NetworkMode::Bridged => v6 == access.mac.link_local(),
                IpAddr::V6(v6) => v6.is_unicast_link_local(),
            };
            // Without an address one may ask whether it is free, and join groups.
            let is_none_yet = meta.kind == Kind::V6
                && source.is_unspecified()
                && (network.mode != NetworkMode::Bridged || is_discovery(meta) || meta.destination.is_multicast());
            if !is_none_yet && !is_local(source) && !owns(source) {
                return Err(DropReason::SpoofedAddress);
            }
            if is_discovery(meta) {
                check_discovery(meta, head, access)?;
            }
            // Somebody who forwards for nobody can only report about what was sent to it.
            if icmp::is_error(meta) && !icmp::quotes(meta, head, |to| owns(to) || is_local(to)) {
                return Err(DropReason::ForgedError);
            }
            Ok(())
        }
        Kind::Other => Ok(()),
    }
}

/// What comes from the host's stack may have been sent by anybody in the world, but by no pod: those have ports, and
/// peers that encapsulate, of their own.
fn check_elsewhere(meta: &Meta, snapshot: &Snapshot) -> Result<(), DropReason> {
    let Some((source, _)) = meta.addresses() else { return Ok(()) };
    match snapshot.routes.lookup(meta.network, source) {
        Some(NextHop::Port { port, .. }) if port != meta.ingress => Err(DropReason::SpoofedAddress),
        Some(NextHop::Peer(peer)) if !snapshot.is_direct(peer, meta.network) => Err(DropReason::SpoofedAddress),
        _ => Ok(()),
    }
}

/// What a pod may say in neighbor discovery: it is no router, it has its own addresses and the link-local one of its
/// MAC, and they are at that MAC.
fn check_discovery(meta: &Meta, head: &[u8], access: &Access) -> Result<(), DropReason> {
    let message = usize::from(meta.l4);
    let options = match icmp_type(meta) {
        ROUTER_SOLICITATION => message + 8,
        NEIGHBOR_SOLICITATION => message + 24,
        NEIGHBOR_ADVERTISEMENT => {
            let target = v6_at(head, message + 8)?;
            if !access.addresses.contains(&target.into()) && target != access.mac.link_local() {
                return Err(DropReason::SpoofedNeighbor);
            }
            message + 24
        }
        _ => return Err(DropReason::SpoofedNeighbor),
    };
    let end = (usize::from(meta.l3) + meta.l3_len as usize).min(head.len());
    let mut rest = head.get(options..end).ok_or(DropReason::Truncated)?;
    // RFC 4861 section 4.6.
    while let [kind, units, ..] = *rest {
        let (option, behind) = rest.split_at_checked(usize::from(units) * 8).ok_or(DropReason::Malformed)?;
        if option.is_empty() {
            return Err(DropReason::Malformed);
        }
        if (kind == SOURCE_LINK_LAYER || kind == TARGET_LINK_LAYER) && option[2..8] != access.mac.0 {
            return Err(DropReason::SpoofedNeighbor);
        }
        rest = behind;
    }
    Ok(())
}

fn answer_arp(meta: &Meta, head: &[u8], gateway: &Gateway) -> Result<Verdict, DropReason> {
    let arp = Arp::parse(head, usize::from(meta.l3))?;
    if arp.is_request && arp.target == gateway.v4 { Ok(Verdict::Reply) } else { Err(DropReason::NeighborIgnored) }
}

fn answer_solicitation(meta: &Meta, head: &[u8], gateway: &Gateway) -> Result<Verdict, DropReason> {
    // RFC 4861 section 7.1.1: a hop limit below 255 comes from another link.
    if icmp_type(meta) == NEIGHBOR_SOLICITATION
        && meta.ttl == 255
        && v6_at(head, usize::from(meta.l4) + 8)? == gateway.v6
    {
        Ok(Verdict::Reply)
    } else {
        Err(DropReason::NeighborIgnored)
    }
}

/// Addresses that a router must not forward from or to.
fn stays_on_link(address: IpAddr) -> bool {
    address.is_unspecified()
        || address.is_loopback()
        || address.is_multicast()
        || match address {
            IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        }
}

pub(crate) fn is_discovery(meta: &Meta) -> bool {
    meta.kind == Kind::V6
        && meta.protocol == ICMPV6
        && meta.fragment.is_none()
        && (ROUTER_SOLICITATION..=REDIRECT).contains(&icmp_type(meta))
}

fn icmp_type(meta: &Meta) -> u8 {
    (meta.key.fields().ports.source >> 8) as u8
}

/// 01:80:c2:00:00:00 to 0f (802.1Q-2018 table 8-1).
fn is_reserved(mac: MacAddr) -> bool {
    mac.0[..5] == [0x01, 0x80, 0xc2, 0, 0] && mac.0[5] < 16
}

fn drop_it(reason: DropReason) -> Decision {
    Decision { verdict: Verdict::Drop(reason), learn: None }
}

/// ARP for IPv4 over Ethernet (RFC 826).
struct Arp {
    is_request: bool,
    sender_mac: MacAddr,
    sender: std::net::Ipv4Addr,
    target: std::net::Ipv4Addr,
}

impl Arp {
    fn parse(head: &[u8], at: usize) -> Result<Arp, DropReason> {
        let bytes: &[u8; 28] = head.get(at..).and_then(|rest| rest.first_chunk()).ok_or(DropReason::Truncated)?;
        if bytes[..6] != [0, 1, 8, 0, 6, 4] {
            return Err(DropReason::Malformed);
        }
        let [_, _, _, _, _, _, _, _, a, b, c, d, e, f, ..] = *bytes;
        Ok(Arp {
            is_request: u16_at(bytes, 6)? == 1,
            sender_mac: MacAddr([a, b, c, d, e, f]),
            sender: u32_at(bytes, 14)?.into(),
            target: u32_at(bytes, 24)?.into(),
        })
    }
}
