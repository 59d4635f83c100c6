//! ARP and neighbor discovery of an underlay with a tag of our own, which the kernel has no device for.
//!
//! Such packets come to the switch, and here it is a host: who asks for our VTEP is answered, and who tells of himself is
//! reported, so that control knows how to reach peers.

use std::net::IpAddr;

use vswitch_net::{MacAddr, PortId};
use vswitch_xsk::Packet;

use crate::egress::{Egress, push_tag};
use crate::event::Events;
use crate::meta::{Kind, Meta};
use crate::parse::{parse_own, pop_tag, u16_at, u32_at, v6_at, vlan_of};
use crate::port::PortIo;
use crate::reply::{self, Station};
use crate::snapshot::{PortKind, Snapshot};
use crate::verdict::DropReason;
use crate::vxlan::{ETHERNET, TAG};

const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ICMPV6: u8 = 58;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;

/// True for ARP and neighbor discovery with the underlay's tag.
pub(crate) fn is_ours(packet: &Packet, snapshot: &Snapshot) -> bool {
    let head = packet.head().data();
    let (Some(vid), Ok(ethertype)) = (snapshot.underlay.vlan, u16_at(head, ETHERNET + 2)) else { return false };
    let at = ETHERNET + TAG;
    vlan_of(head) == Some(vid)
        && match ethertype {
            ETHERTYPE_ARP => true,
            ETHERTYPE_IPV6 => {
                let byte = |offset: usize| head.get(at + offset).copied();
                byte(6) == Some(ICMPV6) && matches!(byte(40), Some(SOLICITATION | ADVERTISEMENT))
            }
            _ => false,
        }
}

/// Takes such a packet in: reports its sender, and answers if it asks for our VTEP.
pub(crate) fn take<P: PortIo>(
    mut packet: Packet,
    ingress: PortId,
    seed: u64,
    out: &mut Egress<'_, P>,
    events: &mut Events,
) {
    match answer(&mut packet, ingress, seed, out.snapshot, events) {
        Ok(()) => out.send(packet, ingress, ingress, None),
        Err(reason) => out.drop(packet, ingress, reason),
    }
}

fn answer(
    packet: &mut Packet,
    ingress: PortId,
    seed: u64,
    snapshot: &Snapshot,
    events: &mut Events,
) -> Result<(), DropReason> {
    let Some(PortKind::Uplink(own)) = snapshot.port(ingress).map(|port| &port.kind) else {
        return Err(DropReason::NoPort);
    };
    let vid = snapshot.underlay.vlan.ok_or(DropReason::NotVxlan)?;
    pop_tag(packet)?;
    // The network is none: these packets belong to the underlay.
    let meta = parse_own(packet, ingress, vswitch_net::NetworkIndex(u16::MAX), snapshot, seed)?;
    let (sender, mac, asked) = read(packet.head().data(), &meta)?;
    if snapshot.underlay.is_ours(sender) {
        return Err(DropReason::SpoofedVtep);
    }
    if !sender.is_unspecified() {
        events.neighbor(ingress, sender, mac);
    }
    if !asked.is_some_and(|asked| snapshot.underlay.is_ours(asked)) {
        return Err(DropReason::NeighborIgnored);
    }
    reply::answer(packet, &meta, Station { mac: *own, is_router: false })?;
    push_tag(packet, vid)
}

/// Who speaks, his MAC address, and whom he asks for.
fn read(head: &[u8], meta: &Meta) -> Result<(IpAddr, MacAddr, Option<IpAddr>), DropReason> {
    let l3 = usize::from(meta.l3);
    if meta.kind == Kind::Arp {
        let mac = head.get(l3 + 8..l3 + 14).and_then(|bytes| bytes.try_into().ok()).ok_or(DropReason::Truncated)?;
        let is_request = u16_at(head, l3 + 6)? == 1;
        let (sender, target) = (u32_at(head, l3 + 14)?, u32_at(head, l3 + 24)?);
        let address = |bits: u32| IpAddr::V4(bits.into());
        return Ok((address(sender), MacAddr(mac), is_request.then(|| address(target))));
    }
    // RFC 4861 section 7.1: a hop limit below 255 comes from another link.
    if meta.kind != Kind::V6 || meta.ttl != 255 {
        return Err(DropReason::NeighborIgnored);
    }
    let (source, _) = meta.addresses().ok_or(DropReason::NotIp)?;
    let target = IpAddr::V6(v6_at(head, usize::from(meta.l4) + 8)?);
    match head.get(usize::from(meta.l4)) {
        Some(&SOLICITATION) => Ok((source, meta.source, Some(target))),
        // Who advertises speaks of the target.
        _ => Ok((target, meta.source, None)),
    }
}
