//! The one reader of untrusted bytes.
//!
//! [`parse`] checks every field it relies on against the bytes that are there, and gives either a [`Meta`] whose offsets
//! hold for the rest of the walk, or the reason to drop. It never panics: bytes are read through [`u16_at`] and its
//! siblings, or from slices whose length was just checked. etherparse is the oracle in `tests/mem`.
//!
//! Headers must lie in the packet's first frame (at least 3,840 bytes), which no real packet exceeds.

mod layer3;
mod plain;

use std::net::Ipv6Addr;

use vswitch_net::checksum;
use vswitch_net::{MacAddr, NetworkIndex, PeerIndex, PortId};
use vswitch_xsk::Packet;

use self::layer3::{Layer3, parse_v4, parse_v6};
use self::plain::parse_plain;
use crate::connection::tcp;
use crate::meta::{Checksum, FlowKey, Kind, L4Key, Meta};
use crate::snapshot::{Access, NetworkMode, PortKind, Snapshot};
use crate::verdict::DropReason;
use crate::vxlan::{self, ETHERNET, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_VLAN, Outer, TAG, VID};

const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_QINQ: u16 = 0x88a8;

/// Protocol numbers (IANA).
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMP: u8 = 1;
pub(crate) const IGMP: u8 = 2;
pub(crate) const ICMPV6: u8 = 58;
pub(crate) const SCTP: u8 = 132;

/// The marks of RFC 3168 (section 5): able to be marked, both ways to say so, and congestion experienced.
const ECT_0: u8 = 2;
const ECT_1: u8 = 1;
const ECN_CE: u8 = 3;

/// Reads a packet that came in at `ingress` into `meta`, which means nothing after an error. A VXLAN packet for our VTEP is
/// decapsulated, once: the packet then starts at its inner frame.
///
/// Facts are written where they will be read: what a function gives back by value is copied, and the copy waits for
/// stores of single fields to become one load.
///
/// # Errors
///
/// The reason to drop it.
#[inline]
pub fn parse(
    packet: &mut Packet,
    ingress: PortId,
    snapshot: &Snapshot,
    seed: u64,
    meta: &mut Meta,
) -> Result<(), DropReason> {
    let port = snapshot.port(ingress).ok_or(DropReason::NoPort)?;
    match &port.kind {
        PortKind::Access(access) => {
            let network = if access.vlans.is_empty() { access.network } else { untag(packet, access)? };
            parse_frame(packet, Origin::new(ingress, network, None), snapshot, seed, meta)
        }
        PortKind::Uplink(uplink) => {
            let outer = match vxlan::parse_outer(packet.head().data(), packet.len(), &snapshot.underlay) {
                Err(DropReason::NotVxlan) if snapshot.underlay.direct.is_some() => {
                    return parse_direct(packet, ingress, *uplink, snapshot, seed, meta);
                }
                other => other?,
            };
            let network = *snapshot.vnis.get(&outer.vni).ok_or(DropReason::UnknownVni)?;
            let peer = match snapshot.vteps.get(&outer.source) {
                Some(peer) => *peer,
                None if snapshot.underlay.is_ours(outer.source) => return Err(DropReason::SpoofedVtep),
                None => return Err(DropReason::UnknownPeer),
            };
            decapsulate(packet, &outer)?;
            parse_frame(packet, Origin::new(ingress, network, Some(peer)), snapshot, seed, meta)?;
            if outer.ecn & ECT_1 != 0 {
                carry_mark(packet.head_mut().data_mut(), meta, outer.ecn)?;
            }
            if snapshot.underlay.router_mac == Some(meta.destination)
                && let Some(NetworkMode::Routed(gateway)) = snapshot.network(network).map(|network| network.mode)
            {
                // This router has a name of its own for nodes that tell their peers apart by MAC.
                meta.destination = gateway.mac;
            }
            Ok(())
        }
    }
}

/// A packet of the underlay that is not encapsulated: from a peer that is routed to directly. The network is the one
/// that the underlay routes; from which peer it comes is judged on the miss path, by its source.
fn parse_direct(
    packet: &mut Packet,
    ingress: PortId,
    uplink: MacAddr,
    snapshot: &Snapshot,
    seed: u64,
    meta: &mut Meta,
) -> Result<(), DropReason> {
    let network = snapshot.underlay.direct.ok_or(DropReason::NotVxlan)?;
    if let Some(vid) = snapshot.underlay.vlan {
        if vlan_of(packet.head().data()) != Some(vid) {
            return Err(DropReason::NotVxlan);
        }
        pop_tag(packet)?;
    }
    parse_frame(packet, Origin::new(ingress, network, None), snapshot, seed, meta)?;
    if meta.destination != uplink {
        return Err(DropReason::NotForGateway);
    }
    if let Some(NetworkMode::Routed(gateway)) = snapshot.network(network).map(|network| network.mode) {
        // The uplink's address is this router's, on that side.
        meta.destination = gateway.mac;
    }
    Ok(())
}

/// The network of a packet from a trunk port; the tag that named it is taken off (802.1Q-2018 section 6.9).
fn untag(packet: &mut Packet, access: &Access) -> Result<NetworkIndex, DropReason> {
    let Some(vid) = vlan_of(packet.head().data()) else {
        return access.native().ok_or(DropReason::VlanNotAllowed);
    };
    let found = access.vlans.iter().find(|(other, _)| *other == vid).map(|&(_, network)| network);
    let network = match found {
        Some(network) => network,
        // A priority tag names no VLAN.
        None if vid == 0 => access.native().ok_or(DropReason::VlanNotAllowed)?,
        None => return Err(DropReason::VlanNotAllowed),
    };
    pop_tag(packet)?;
    Ok(network)
}

/// The VLAN of the outermost tag, if that is an 802.1Q one.
pub(crate) fn vlan_of(head: &[u8]) -> Option<u16> {
    tag_of(head).map(|tag| tag & VID)
}

/// The outermost tag, priority and all, if that is an 802.1Q one.
pub(crate) fn tag_of(head: &[u8]) -> Option<u16> {
    let [.., t0, t1, v0, v1] = head.first_chunk::<16>()?;
    (u16::from_be_bytes([*t0, *t1]) == ETHERTYPE_VLAN).then(|| u16::from_be_bytes([*v0, *v1]))
}

pub(crate) fn pop_tag(packet: &mut Packet) -> Result<(), DropReason> {
    let head = packet.head_mut();
    if head.len() < ETHERNET + TAG {
        return Err(DropReason::Truncated);
    }
    head.data_mut().copy_within(..12, TAG);
    if head.pull_front(TAG) { Ok(()) } else { Err(DropReason::Truncated) }
}

/// Reads a packet that the switch made itself.
///
/// # Errors
///
/// The reason to drop it.
pub(crate) fn parse_own(
    packet: &Packet,
    ingress: PortId,
    network: NetworkIndex,
    snapshot: &Snapshot,
    seed: u64,
) -> Result<Meta, DropReason> {
    let mut meta = Meta::default();
    parse_frame(packet, Origin::new(ingress, network, None), snapshot, seed, &mut meta)?;
    Ok(meta)
}

/// Where packets come from; the same for all of a burst, if that is a pod's.
#[derive(Clone, Copy)]
pub(crate) struct Origin {
    ingress: PortId,
    network: NetworkIndex,
    peer: Option<PeerIndex>,
    /// What of it the key has.
    word: u64,
}

impl Origin {
    #[inline]
    fn new(ingress: PortId, network: NetworkIndex, peer: Option<PeerIndex>) -> Origin {
        Origin { ingress, network, peer, word: FlowKey::origin(ingress, peer, network) }
    }

    /// Of an access port's packets, whatever they are.
    pub(crate) fn of_port(ingress: PortId, snapshot: &Snapshot) -> Option<Origin> {
        let access = snapshot.access(ingress).filter(|access| access.vlans.is_empty())?;
        Some(Origin::new(ingress, access.network, None))
    }
}

fn decapsulate(packet: &mut Packet, outer: &Outer) -> Result<(), DropReason> {
    let surplus = packet.len() - outer.header - outer.inner;
    if surplus > 0 {
        // Padding after the outer packet. Only short packets are padded, and those have one frame.
        let kept = packet.head().len().checked_sub(surplus).filter(|_| packet.frames() == 1);
        if !packet.head_mut().set_len(kept.ok_or(DropReason::BadLength)?) {
            return Err(DropReason::BadLength);
        }
    }
    if packet.head_mut().pull_front(outer.header) { Ok(()) } else { Err(DropReason::Truncated) }
}

/// As [`parse`], from a place that is known, and without what lies before the frame.
#[inline(always)]
pub(crate) fn parse_frame(
    packet: &Packet,
    origin: Origin,
    snapshot: &Snapshot,
    seed: u64,
    meta: &mut Meta,
) -> Result<(), DropReason> {
    if parse_plain(packet, &origin, snapshot, seed, meta) {
        return Ok(());
    }
    parse_any(packet, origin, snapshot, seed, meta)
}

/// The long way, for whatever it is.
#[inline(never)]
fn parse_any(
    packet: &Packet,
    origin: Origin,
    snapshot: &Snapshot,
    seed: u64,
    meta: &mut Meta,
) -> Result<(), DropReason> {
    let (head, length) = (packet.head().data(), packet.len());
    let ethernet: &[u8; ETHERNET] = head.first_chunk().ok_or(DropReason::Truncated)?;
    let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, t0, t1] = *ethernet;
    let destination = MacAddr([d0, d1, d2, d3, d4, d5]);
    let source = MacAddr([s0, s1, s2, s3, s4, s5]);
    let ethertype = u16::from_be_bytes([t0, t1]);
    let macs = (destination, source);
    // Each with a walk of its own: what is constant for a protocol is constant in its code.
    match ethertype {
        ETHERTYPE_IPV4 => {
            let layer3 = parse_v4(head, length)?;
            finish(head, macs, &layer3, &origin, snapshot, seed, meta)
        }
        ETHERTYPE_IPV6 => {
            let layer3 = parse_v6(head, length)?;
            finish(head, macs, &layer3, &origin, snapshot, seed, meta)
        }
        ETHERTYPE_VLAN | ETHERTYPE_QINQ
            if !snapshot.network(origin.network).is_some_and(|network| network.is_transparent) =>
        {
            Err(DropReason::Tagged)
        }
        other => {
            let layer3 = Layer3 {
                kind: if other == ETHERTYPE_ARP { Kind::Arp } else { Kind::Other },
                l4: ETHERNET,
                end: length,
                protocol: 0,
                ttl: 0,
                fragment: None,
                has_l4: false,
                addresses: [u64::from(other), 0, 0, 0],
                address_sum: 0,
            };
            finish(head, macs, &layer3, &origin, snapshot, seed, meta)
        }
    }
}

/// Layer 4, and all facts into `meta`.
#[inline(always)]
fn finish(
    head: &[u8],
    macs: (MacAddr, MacAddr),
    layer3: &Layer3,
    origin: &Origin,
    snapshot: &Snapshot,
    seed: u64,
    meta: &mut Meta,
) -> Result<(), DropReason> {
    let L4 { ports, checksum, flags, is_control, seq } = if layer3.has_l4 { parse_l4(head, layer3)? } else { L4::NONE };
    if layer3.protocol == UDP && layer3.has_l4 && ports.destination == snapshot.underlay.udp_port {
        return Err(DropReason::NestedVxlan);
    }
    let Origin { ingress, network, peer, word } = *origin;
    let key = FlowKey::new(
        word,
        layer3.kind,
        layer3.protocol,
        layer3.fragment.is_some(),
        (macs.0.to_u64(), macs.1.to_u64()),
        ports,
        layer3.addresses,
    );
    *meta = Meta {
        key: if is_control { key.with_control() } else { key },
        // All of a connection goes one way, what opens and closes it too.
        hash: key.hash(seed),
        ingress,
        network,
        peer,
        destination: macs.0,
        source: macs.1,
        kind: layer3.kind,
        l3: ETHERNET as u16,
        l4: layer3.l4 as u16,
        l3_len: (layer3.end - ETHERNET) as u32,
        protocol: layer3.protocol,
        ttl: layer3.ttl,
        fragment: layer3.fragment,
        is_syn: flags & tcp::SYN != 0,
        is_control,
        has_ports: layer3.has_l4,
        seq,
        checksum,
        may_return: false,
    };
    Ok(())
}

/// What the layer 4 header says.
struct L4 {
    ports: L4Key,
    checksum: Checksum,
    /// Of TCP.
    flags: u8,
    is_control: bool,
    seq: u32,
}

impl L4 {
    const NONE: L4 = L4::new(L4Key { source: 0, destination: 0 }, Checksum::Complete);

    const fn new(ports: L4Key, checksum: Checksum) -> L4 {
        L4 { ports, checksum, flags: 0, is_control: false, seq: 0 }
    }
}

/// Ports and the checksum's state.
#[inline(always)]
fn parse_l4(head: &[u8], layer3: &Layer3) -> Result<L4, DropReason> {
    let at = layer3.l4;
    let room = layer3.end - at;
    let need = match layer3.protocol {
        TCP => 20,
        UDP => 8,
        SCTP => 12,
        ICMP | ICMPV6 => 8,
        // What is behind the headers may be rewritten, so it must begin where they are.
        _ if at > head.len() => return Err(DropReason::Truncated),
        _ => return Ok(L4::NONE),
    };
    if room < need {
        return Err(DropReason::Truncated);
    }
    let bytes = head.get(at..at + need).ok_or(DropReason::Truncated)?;
    let word = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    match layer3.protocol {
        TCP => {
            let header = usize::from(bytes[12] >> 4) * 4;
            if header < 20 {
                return Err(DropReason::Malformed);
            }
            if header > room {
                return Err(DropReason::Truncated);
            }
            let checksum = checksum_state(layer3, word(16), 16, room);
            let ports = L4Key { source: word(0), destination: word(2) };
            let flags = bytes[13];
            let seq = u32::from_be_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
            Ok(L4 { ports, checksum, flags, is_control: flags & tcp::CONTROL != 0, seq })
        }
        UDP => {
            let length = usize::from(word(4));
            // A jumbo or offloaded datagram may say 0 (RFC 2675); a fragment says the length of the whole.
            if length != 0 && (length < 8 || (length > room && layer3.fragment.is_none())) {
                return Err(DropReason::BadLength);
            }
            let checksum = match word(6) {
                0 => Checksum::Complete,
                field => checksum_state(layer3, field, 6, room),
            };
            Ok(L4::new(L4Key { source: word(0), destination: word(2) }, checksum))
        }
        SCTP => {
            let ports = L4Key { source: word(0), destination: word(2) };
            // What is not data, or about data, opens or closes (RFC 9260 section 3.2).
            let is_control = head.get(at + need).is_none_or(|chunk| !matches!(chunk, 0 | 3 | 4 | 5));
            Ok(L4 { is_control, ..L4::new(ports, Checksum::Complete) })
        }
        _ => {
            let id = if has_echo_id(layer3.protocol, bytes[0]) && room >= 6 { u16_at(head, at + 4)? } else { 0 };
            Ok(L4::new(L4Key { source: word(0), destination: id }, Checksum::Complete))
        }
    }
}

/// Partial, if the field holds the folded pseudo-header sum.
#[inline(always)]
fn checksum_state(layer3: &Layer3, field: u16, offset: u16, room: usize) -> Checksum {
    if layer3.fragment.is_some() {
        // A stack completes the sum before it fragments.
        return Checksum::Complete;
    }
    let pseudo = layer3.address_sum + u32::from(layer3.protocol) + room as u32;
    if field == checksum::fold(pseudo) { Checksum::Partial { offset } } else { Checksum::Complete }
}

/// Echo request or reply, of either ICMP.
fn has_echo_id(protocol: u8, kind: u8) -> bool {
    match protocol {
        ICMP => matches!(kind, 0 | 8),
        _ => matches!(kind, 128 | 129),
    }
}

/// Carries an outer mark inside (RFC 6040 section 4.2): congestion, and ECT(1) where the inner packet says ECT(0).
#[cold]
fn carry_mark(head: &mut [u8], meta: &Meta, outer: u8) -> Result<(), DropReason> {
    let marked = |inner: u8| match (inner, outer) {
        (0, ECN_CE) => Err(DropReason::EcnNotCapable),
        (_, ECN_CE) => Ok(ECN_CE),
        (ECT_0, ECT_1) => Ok(ECT_1),
        _ => Ok(inner),
    };
    let ip = &mut head[usize::from(meta.l3)..];
    match meta.kind {
        Kind::V4 => {
            let old = u16::from_be_bytes([ip[0], ip[1]]);
            ip[1] = ip[1] & !3 | marked(ip[1] & 3)?;
            let sum = checksum::update(u16::from_be_bytes([ip[10], ip[11]]), old, u16::from_be_bytes([ip[0], ip[1]]));
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        Kind::V6 => ip[1] = ip[1] & !0x30 | marked(ip[1] >> 4 & 3)? << 4,
        Kind::Arp | Kind::Other => {}
    }
    Ok(())
}

#[inline(always)]
pub(crate) fn byte_at(bytes: &[u8], at: usize) -> Result<u8, DropReason> {
    bytes.get(at).copied().ok_or(DropReason::Truncated)
}

/// The big-endian word at `at`.
///
/// # Errors
///
/// [`DropReason::Truncated`] if the bytes end before.
#[inline(always)]
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Result<u16, DropReason> {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map(|two| u16::from_be_bytes(*two)).ok_or(DropReason::Truncated)
}

/// The big-endian double word at `at`.
///
/// # Errors
///
/// [`DropReason::Truncated`] if the bytes end before.
#[inline(always)]
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Result<u32, DropReason> {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .map(|four| u32::from_be_bytes(*four))
        .ok_or(DropReason::Truncated)
}

/// The IPv6 address at `at`.
///
/// # Errors
///
/// [`DropReason::Truncated`] if the bytes end before.
pub(crate) fn v6_at(bytes: &[u8], at: usize) -> Result<Ipv6Addr, DropReason> {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk::<16>())
        .map(|octets| Ipv6Addr::from(*octets))
        .ok_or(DropReason::Truncated)
}
