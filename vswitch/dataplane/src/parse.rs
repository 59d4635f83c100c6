//! The one reader of untrusted bytes.
//!
//! [`parse`] checks every field it relies on against the bytes that are there, and gives either a [`Meta`] whose offsets
//! hold for the rest of the walk, or the reason to drop. It never panics: bytes are read through [`u16_at`] and its
//! siblings, or from slices whose length was just checked. etherparse is the oracle in `tests/mem`.
//!
//! Headers must lie in the packet's first frame (at least 3,840 bytes), which no real packet exceeds.

use std::net::Ipv6Addr;

use vswitch_net::checksum;
use vswitch_net::{MacAddr, PortId};
use vswitch_xsk::Packet;

use crate::meta::{Checksum, FlowKey, Kind, L4Key, Meta};
use crate::snapshot::{PortKind, Snapshot};
use crate::verdict::DropReason;
use crate::vxlan::{self, ETHERNET, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_VLAN, Outer};

const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_QINQ: u16 = 0x88a8;

/// Protocol numbers (IANA).
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMP: u8 = 1;
pub(crate) const ICMPV6: u8 = 58;
const SCTP: u8 = 132;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;
const MOBILITY: u8 = 135;

/// IPv6 extension headers followed before giving up.
const MAX_EXTENSIONS: usize = 8;

/// Outer congestion-experienced mark (RFC 3168).
const ECN_CE: u8 = 3;

/// Reads a packet that came in at `ingress`. A VXLAN packet for our VTEP is decapsulated, once: the packet then starts
/// at its inner frame.
///
/// # Errors
///
/// The reason to drop it.
#[inline]
pub fn parse(packet: &mut Packet, ingress: PortId, snapshot: &Snapshot, seed: u64) -> Result<Meta, DropReason> {
    let port = snapshot.port(ingress).ok_or(DropReason::NoPort)?;
    match &port.kind {
        PortKind::Access(access) => {
            let origin = Origin { ingress, network: access.network, peer: None };
            parse_inner(packet.head().data(), packet.len(), origin, snapshot.underlay.udp_port, seed)
        }
        PortKind::Uplink => {
            let outer = vxlan::parse_outer(packet.head().data(), packet.len(), &snapshot.underlay)?;
            let network = *snapshot.vnis.get(&outer.vni).ok_or(DropReason::UnknownVni)?;
            let peer = *snapshot.vteps.get(&outer.source).ok_or(DropReason::UnknownPeer)?;
            decapsulate(packet, &outer)?;
            let origin = Origin { ingress, network, peer: Some(peer) };
            let meta = parse_inner(packet.head().data(), packet.len(), origin, snapshot.underlay.udp_port, seed)?;
            if outer.ecn == ECN_CE {
                mark_congested(packet.head_mut().data_mut(), &meta)?;
            }
            Ok(meta)
        }
    }
}

struct Origin {
    ingress: PortId,
    network: vswitch_net::NetworkIndex,
    peer: Option<vswitch_net::PeerIndex>,
}

/// What the layer 3 header says.
struct Layer3 {
    kind: Kind,
    l4: usize,
    end: usize,
    protocol: u8,
    ttl: u8,
    is_fragment: bool,
    /// A fragment after the first has no layer 4 header.
    has_l4: bool,
    /// Words 4 to 7 of the key.
    addresses: [u64; 4],
    /// Sum of the addresses, for the pseudo-header.
    address_sum: u32,
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

#[inline]
fn parse_inner(head: &[u8], length: usize, origin: Origin, vxlan_port: u16, seed: u64) -> Result<Meta, DropReason> {
    let ethernet: &[u8; ETHERNET] = head.first_chunk().ok_or(DropReason::Truncated)?;
    let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, t0, t1] = *ethernet;
    let destination = MacAddr([d0, d1, d2, d3, d4, d5]);
    let source = MacAddr([s0, s1, s2, s3, s4, s5]);
    let ethertype = u16::from_be_bytes([t0, t1]);
    let layer3 = match ethertype {
        ETHERTYPE_IPV4 => parse_v4(head, length)?,
        ETHERTYPE_IPV6 => parse_v6(head, length)?,
        ETHERTYPE_VLAN | ETHERTYPE_QINQ => return Err(DropReason::Tagged),
        other => Layer3 {
            kind: if other == ETHERTYPE_ARP { Kind::Arp } else { Kind::Other },
            l4: ETHERNET,
            end: length,
            protocol: 0,
            ttl: 0,
            is_fragment: false,
            has_l4: false,
            addresses: [u64::from(other), 0, 0, 0],
            address_sum: 0,
        },
    };
    let (ports, checksum) =
        if layer3.has_l4 { parse_l4(head, &layer3)? } else { (L4Key::default(), Checksum::Complete) };
    if layer3.protocol == UDP && layer3.has_l4 && ports.destination == vxlan_port {
        return Err(DropReason::NestedVxlan);
    }
    let Origin { ingress, network, peer } = origin;
    let key = FlowKey::new(
        ingress,
        peer,
        network,
        layer3.kind,
        layer3.protocol,
        layer3.is_fragment,
        (destination, source),
        ports,
        layer3.addresses,
    );
    Ok(Meta {
        key,
        hash: key.hash(seed),
        ingress,
        network,
        peer,
        destination,
        source,
        kind: layer3.kind,
        l3: ETHERNET as u16,
        l4: layer3.l4 as u16,
        l3_len: (layer3.end - ETHERNET) as u32,
        protocol: layer3.protocol,
        ttl: layer3.ttl,
        is_fragment: layer3.is_fragment,
        checksum,
    })
}

/// IPv4 (RFC 791), options included.
#[inline]
fn parse_v4(head: &[u8], length: usize) -> Result<Layer3, DropReason> {
    let ip: &[u8; 20] = head[ETHERNET..].first_chunk().ok_or(DropReason::Truncated)?;
    let header = usize::from(ip[0] & 0xf) * 4;
    if ip[0] >> 4 != 4 || header < 20 {
        return Err(DropReason::Malformed);
    }
    let whole = head.get(ETHERNET..ETHERNET + header).ok_or(DropReason::Truncated)?;
    if checksum::fold(checksum::sum(whole)) != 0xffff {
        return Err(DropReason::BadIpChecksum);
    }
    let total = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
    if total < header || ETHERNET + total > length {
        return Err(DropReason::BadLength);
    }
    let fragment = u16::from_be_bytes([ip[6], ip[7]]);
    let source = u32::from_be_bytes([ip[12], ip[13], ip[14], ip[15]]);
    let destination = u32::from_be_bytes([ip[16], ip[17], ip[18], ip[19]]);
    let halves = |word: u32| (word >> 16) + (word & 0xffff);
    Ok(Layer3 {
        kind: Kind::V4,
        l4: ETHERNET + header,
        end: ETHERNET + total,
        protocol: ip[9],
        ttl: ip[8],
        is_fragment: fragment & 0x3fff != 0,
        has_l4: fragment & 0x1fff == 0,
        addresses: [u64::from(source), 0, u64::from(destination), 0],
        address_sum: halves(source) + halves(destination),
    })
}

/// IPv6 (RFC 8200) and the extension headers before layer 4.
#[inline]
fn parse_v6(head: &[u8], length: usize) -> Result<Layer3, DropReason> {
    let ip: &[u8; 40] = head[ETHERNET..].first_chunk().ok_or(DropReason::Truncated)?;
    if ip[0] >> 4 != 6 {
        return Err(DropReason::Malformed);
    }
    let end = ETHERNET + 40 + usize::from(u16::from_be_bytes([ip[4], ip[5]]));
    if end > length {
        return Err(DropReason::BadLength);
    }
    let word = |at: usize| {
        u64::from_be_bytes([ip[at], ip[at + 1], ip[at + 2], ip[at + 3], ip[at + 4], ip[at + 5], ip[at + 6], ip[at + 7]])
    };
    let mut layer3 = Layer3 {
        kind: Kind::V6,
        l4: ETHERNET + 40,
        end,
        protocol: ip[6],
        ttl: ip[7],
        is_fragment: false,
        has_l4: true,
        addresses: [word(8), word(16), word(24), word(32)],
        address_sum: checksum::sum(&ip[8..40]),
    };
    for _ in 0..MAX_EXTENSIONS {
        let size = match layer3.protocol {
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS | MOBILITY => 8 + 8 * usize::from(byte_at(head, layer3.l4 + 1)?),
            AUTHENTICATION => 8 + 4 * usize::from(byte_at(head, layer3.l4 + 1)?),
            FRAGMENT => {
                layer3.is_fragment = true;
                layer3.has_l4 = u16_at(head, layer3.l4 + 2)? & 0xfff8 == 0;
                8
            }
            _ => return Ok(layer3),
        };
        let next = byte_at(head, layer3.l4)?;
        layer3.l4 += size;
        if layer3.l4 > end {
            return Err(DropReason::BadLength);
        }
        layer3.protocol = next;
        if !layer3.has_l4 {
            // What follows in a later fragment is data, whatever its first byte says.
            return Ok(layer3);
        }
    }
    Err(DropReason::TooManyHeaders)
}

/// Ports and the checksum's state.
#[inline]
fn parse_l4(head: &[u8], layer3: &Layer3) -> Result<(L4Key, Checksum), DropReason> {
    let at = layer3.l4;
    let room = layer3.end - at;
    let need = match layer3.protocol {
        TCP => 20,
        UDP => 8,
        SCTP => 12,
        ICMP | ICMPV6 => 4,
        _ => return Ok((L4Key::default(), Checksum::Complete)),
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
            Ok((L4Key { source: word(0), destination: word(2) }, checksum))
        }
        UDP => {
            let length = usize::from(word(4));
            // A jumbo or offloaded datagram may say 0 (RFC 2675); a fragment says the length of the whole.
            if length != 0 && (length < 8 || (length > room && !layer3.is_fragment)) {
                return Err(DropReason::BadLength);
            }
            let checksum = match word(6) {
                0 => Checksum::Complete,
                field => checksum_state(layer3, field, 6, room),
            };
            Ok((L4Key { source: word(0), destination: word(2) }, checksum))
        }
        SCTP => Ok((L4Key { source: word(0), destination: word(2) }, Checksum::Complete)),
        _ => {
            let id = if has_echo_id(layer3.protocol, bytes[0]) && room >= 6 { u16_at(head, at + 4)? } else { 0 };
            Ok((L4Key { source: word(0), destination: id }, Checksum::Complete))
        }
    }
}

/// Partial, if the field holds the folded pseudo-header sum.
#[inline(always)]
fn checksum_state(layer3: &Layer3, field: u16, offset: u16, room: usize) -> Checksum {
    if layer3.is_fragment {
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

/// Carries an outer congestion mark inside (RFC 6040 section 4.2, default mode).
fn mark_congested(head: &mut [u8], meta: &Meta) -> Result<(), DropReason> {
    match meta.kind {
        Kind::V4 => {
            let ip = &mut head[usize::from(meta.l3)..];
            if ip[1] & 3 == 0 {
                return Err(DropReason::EcnNotCapable);
            }
            let old = u16::from_be_bytes([ip[0], ip[1]]);
            ip[1] |= ECN_CE;
            let sum = checksum::update(u16::from_be_bytes([ip[10], ip[11]]), old, u16::from_be_bytes([ip[0], ip[1]]));
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        Kind::V6 => {
            let ip = &mut head[usize::from(meta.l3)..];
            if ip[1] & 0x30 == 0 {
                return Err(DropReason::EcnNotCapable);
            }
            ip[1] |= ECN_CE << 4;
        }
        Kind::Arp | Kind::Other => {}
    }
    Ok(())
}

#[inline(always)]
fn byte_at(bytes: &[u8], at: usize) -> Result<u8, DropReason> {
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
