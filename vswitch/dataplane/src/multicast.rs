//! Who wants which group: IGMP and MLD, read as they pass (RFC 4541).
//!
//! [`memberships`] reads a report, a leave or a query; control keeps the groups and puts them into the snapshot. Messages
//! are read from copies of nothing: the packet goes on to routers and peers.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use vswitch_net::{GATEWAY_MAC, checksum};

use crate::meta::{Kind, Meta};
use crate::parse::{ICMPV6, u16_at, u32_at, v6_at};

const IGMP: u8 = 2;

/// Groups read out of one report: as many as a port may have.
const MOST: usize = 128;

/// What a station says of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Membership {
    /// It wants the group's packets.
    Join(IpAddr),
    /// It wants them no more.
    Leave(IpAddr),
    /// It asks: a multicast router is there.
    Query,
    /// It asks, and is none: another switch that snoops (RFC 4541 section 2.1.1).
    Ask,
}

/// True for an IP packet to a group that is not of this link alone: 224.0.0.0/24 and ff02::/16 go to all
/// (RFC 4541 section 2.1.2).
pub(crate) fn is_snooped(meta: &Meta) -> bool {
    meta.addresses().is_some_and(|(_, destination)| is_group(destination))
}

fn is_group(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_multicast() && v4.octets()[..3] != [224, 0, 0],
        IpAddr::V6(v6) => v6.is_multicast() && v6.octets()[1] & 15 > 2,
    }
}

/// True for IGMP and MLD messages: they go to routers and peers, not to other members.
pub(crate) fn is_report(meta: &Meta, head: &[u8]) -> bool {
    let kind = head.get(usize::from(meta.l4)).copied().unwrap_or(0);
    match meta.kind {
        Kind::V4 => meta.protocol == IGMP && matches!(kind, 0x12 | 0x16 | 0x17 | 0x22),
        Kind::V6 => meta.protocol == ICMPV6 && matches!(kind, 131 | 132 | 143),
        Kind::Arp | Kind::Other => false,
    }
}

/// True for the question of another switch that snoops, and is no router.
pub(crate) fn is_ask(meta: &Meta, head: &[u8]) -> bool {
    let kind = head.get(usize::from(meta.l4)).copied().unwrap_or(0);
    match (meta.kind, meta.addresses()) {
        (Kind::V4, Some((source, _))) => meta.protocol == IGMP && kind == 0x11 && source.is_unspecified(),
        (Kind::V6, Some((source, _))) => {
            meta.protocol == ICMPV6 && kind == 130 && source == IpAddr::V6(GATEWAY_MAC.link_local())
        }
        _ => false,
    }
}

/// What a packet says of groups; nothing for packets that are no such message, or a wrong one.
pub(crate) fn memberships(meta: &Meta, head: &[u8], mut each: impl FnMut(Membership)) {
    let l4 = usize::from(meta.l4);
    let end = usize::from(meta.l3) + meta.l3_len as usize;
    // Of this link: a hop limit of one, and all in one frame (RFC 3376 section 4, RFC 3810 section 5).
    let Some(body) = head.get(l4..end).filter(|body| body.len() >= 8 && meta.ttl == 1 && meta.fragment.is_none())
    else {
        return;
    };
    match meta.kind {
        Kind::V4 if meta.protocol == IGMP && checksum::fold(checksum::sum(body)) == 0xffff => {
            igmp(is_ask(meta, head), body, &mut each)
        }
        Kind::V6 if meta.protocol == ICMPV6 => {
            let Some((IpAddr::V6(source), IpAddr::V6(destination))) = meta.addresses() else { return };
            let pseudo = checksum::pseudo_v6(source, destination, ICMPV6, body.len() as u32);
            if checksum::fold(pseudo + checksum::sum(body)) == 0xffff {
                mld(is_ask(meta, head), source, body, &mut each);
            }
        }
        _ => {}
    }
}

fn igmp(is_ask: bool, body: &[u8], each: &mut impl FnMut(Membership)) {
    let group = |at: usize| u32_at(body, at).map(|bits| IpAddr::V4(Ipv4Addr::from_bits(bits))).ok();
    match body[0] {
        0x11 if is_ask => each(Membership::Ask),
        0x11 => each(Membership::Query),
        0x12 | 0x16 => each_group(group(4), Membership::Join, each),
        0x17 => each_group(group(4), Membership::Leave, each),
        0x22 => records(body, 4, group, each),
        _ => {}
    }
}

fn mld(is_ask: bool, source: Ipv6Addr, body: &[u8], each: &mut impl FnMut(Membership)) {
    let group = |at: usize| v6_at(body, at).map(|v6: Ipv6Addr| IpAddr::V6(v6)).ok();
    match body[0] {
        130 if is_ask => each(Membership::Ask),
        // A router's question comes from a link-local address (RFC 3810 section 5.1.14).
        130 if source.is_unicast_link_local() => each(Membership::Query),
        131 => each_group(group(8), Membership::Join, each),
        132 => each_group(group(8), Membership::Leave, each),
        143 => records(body, 16, group, each),
        _ => {}
    }
}

/// Group records of IGMPv3 and MLDv2 (RFC 3376 section 4.2.4, RFC 3810 section 5.2.5): sources are not told apart.
fn records(body: &[u8], address: usize, group: impl Fn(usize) -> Option<IpAddr>, each: &mut impl FnMut(Membership)) {
    let count = usize::from(u16_at(body, 6).unwrap_or(0));
    let (mut at, mut heard) = (8, 0);
    for _ in 0..count {
        let (Some(&kind), Some(&auxiliary), Ok(sources)) = (body.get(at), body.get(at + 1), u16_at(body, at + 2))
        else {
            return;
        };
        let what = match (kind, sources) {
            // To include nothing is to leave.
            (1 | 3, 0) => Some(Membership::Leave as fn(IpAddr) -> Membership),
            (1..=5, _) => Some(Membership::Join as fn(IpAddr) -> Membership),
            _ => None,
        };
        // Groups of the link are in every report, and are of no interest.
        if let (Some(what), Some(group)) = (what, group(at + 4).filter(|&group| is_group(group))) {
            each(what(group));
            heard += 1;
            if heard == MOST {
                return;
            }
        }
        at += 4 + address + usize::from(sources) * address + usize::from(auxiliary) * 4;
    }
}

fn each_group(group: Option<IpAddr>, what: fn(IpAddr) -> Membership, each: &mut impl FnMut(Membership)) {
    if let Some(group) = group.filter(|group| is_group(*group)) {
        each(what(group));
    }
}
