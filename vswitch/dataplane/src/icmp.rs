//! The switch as a router: its ICMP errors, and its answers to ping.
//!
//! # What
//!
//! [`error`] writes the message that RFC 1812 section 4.3 and RFC 4443 section 3 ask of a router for a packet that it
//! does not forward. Which drop reasons speak, and how, is one table, [`Message::of`]. In a bridged network the switch is no
//! router; there it speaks only of size, and with the destination's address, as the kernel's own tunnels do.
//!
//! # What is never answered
//!
//! ICMP errors, later fragments, and packets from or to an address that is not one host's (RFC 1812 section 4.3.2.7,
//! RFC 4443 section 2.4 e). How often errors are sent at all is the caller's to limit.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr, Icmpv4Message, Icmpv4Packet, Icmpv6Message,
    Icmpv6Packet, IpProtocol, Ipv4Packet, Ipv4Repr, Ipv6Packet, Ipv6Repr,
};
use vswitch_net::{MacAddr, checksum};
use vswitch_xsk::Packet;

use crate::meta::{Checksum, Kind, L4Key, Meta};
use crate::parse::{ICMP, ICMPV6, TCP, UDP, u32_at, v6_at};
use crate::verdict::DropReason;
use crate::vxlan::ETHERNET;

const IPV4: usize = 20;
const IPV6: usize = 40;
/// Type, code, checksum, and four bytes that depend on the type.
const HEADER: usize = 8;

/// Longest error: RFC 1812 section 4.3.2.3, and the smallest MTU of IPv6 (RFC 4443 section 2.4 c).
const MAX_V4: usize = 576;
const MAX_V6: usize = 1280;

/// Hops of what the switch itself sends.
const TTL: u8 = 64;

/// Internetwork control (RFC 1812 section 4.3.2.5).
const PRECEDENCE: u8 = 0xc0;

const ECHO_REPLY_V4: u8 = 0;
const ECHO_REQUEST_V4: u8 = 8;
const ECHO_REQUEST_V6: u8 = 128;
const ECHO_REPLY_V6: u8 = 129;

/// Who speaks, and to whom.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Speaker {
    /// Our address in the packet's network, of its family.
    pub(crate) address: IpAddr,
    /// Ethernet source and destination of the message.
    pub(crate) macs: (MacAddr, MacAddr),
}

/// Type, code and the second word of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Message {
    kind: u8,
    code: u8,
    word: u32,
}

impl Message {
    /// What to say for a reason; none for reasons that are dropped in silence.
    fn of(reason: DropReason, meta: &Meta, source: IpAddr, mtu: u32) -> Option<Message> {
        let is_v4 = meta.kind == Kind::V4;
        let say = |v4: (u8, u8), v6: (u8, u8)| {
            let (kind, code) = if is_v4 { v4 } else { v6 };
            Some(Message { kind, code, word: 0 })
        };
        match reason {
            DropReason::TtlExpired => say((11, 0), (3, 0)),
            DropReason::NoRoute => say((3, 0), (1, 0)),
            DropReason::NoHost | DropReason::NoNeighbor => say((3, 1), (1, 3)),
            DropReason::TooBigForWire | DropReason::TooBigForPort if is_v4 => {
                Some(Message { kind: 3, code: 4, word: mtu.min(0xffff) })
            }
            DropReason::TooBigForWire | DropReason::TooBigForPort => Some(Message { kind: 2, code: 0, word: mtu }),
            DropReason::NoBackend | DropReason::NoService => say((3, 3), (1, 4)),
            DropReason::ToGateway => match meta.protocol {
                TCP | UDP => say((3, 3), (1, 4)),
                ICMP | ICMPV6 => None,
                _ if is_v4 => say((3, 2), (4, 1)),
                // The pointer leads to the next-header field of the fixed header.
                _ if usize::from(meta.l4) == ETHERNET + IPV6 => Some(Message { kind: 4, code: 1, word: 6 }),
                _ => None,
            },
            // Beyond the scope of the source address.
            DropReason::LinkLocal => match source {
                IpAddr::V6(v6) if v6.is_unicast_link_local() => say((3, 0), (1, 2)),
                _ => None,
            },
            _ => None,
        }
    }
}

/// True if an error about this reason may be sent for this packet. `head` is its first frame.
pub(crate) fn may_answer(reason: DropReason, meta: &Meta, head: &[u8]) -> bool {
    let Some((source, destination)) = meta.addresses() else { return false };
    if meta.source.is_multicast() || meta.destination.is_multicast() || !meta.has_l4() {
        return false;
    }
    let is_one_host = |address: IpAddr| match address {
        IpAddr::V4(v4) => !v4.is_unspecified() && !v4.is_multicast() && !v4.is_broadcast() && !v4.is_loopback(),
        IpAddr::V6(v6) => !v6.is_unspecified() && !v6.is_multicast() && !v6.is_loopback(),
    };
    !is_error_head(meta, head)
        && is_one_host(source)
        && is_one_host(destination)
        && Message::of(reason, meta, source, 0).is_some()
}

/// True for an ICMP error or redirect.
pub(crate) fn is_error_head(meta: &Meta, head: &[u8]) -> bool {
    head.get(usize::from(meta.l4)).is_some_and(|&kind| meta.has_l4() && is_error_kind(meta, kind))
}

/// As [`is_error_head`], from the flow key.
pub(crate) fn is_error(meta: &Meta) -> bool {
    meta.has_l4() && is_error_kind(meta, (meta.key.fields().ports.source >> 8) as u8)
}

fn is_error_kind(meta: &Meta, kind: u8) -> bool {
    match meta.protocol {
        ICMP => meta.kind == Kind::V4 && matches!(kind, 3 | 4 | 5 | 11 | 12),
        ICMPV6 => meta.kind == Kind::V6 && (kind < 128 || kind == 137),
        _ => false,
    }
}

/// True for a fragment of an ICMP message, which may be one of an error.
pub(crate) fn is_fragment(meta: &Meta) -> bool {
    meta.fragment.is_some() && (meta.protocol == ICMP || meta.protocol == ICMPV6)
}

/// True if an error quotes a packet that its receiver may have sent: one with the receiver as source, and a destination
/// that who reports may have.
pub(crate) fn quotes(meta: &Meta, head: &[u8], may_have: impl Fn(IpAddr) -> bool) -> bool {
    let quote = usize::from(meta.l4) + HEADER;
    let quoted: Option<(IpAddr, IpAddr)> = match meta.kind {
        Kind::V4 => u32_at(head, quote + 12).and_then(|from| Ok((v4(from), v4(u32_at(head, quote + 16)?)))).ok(),
        Kind::V6 => v6_at(head, quote + 8).and_then(|from| Ok((from.into(), v6_at(head, quote + 24)?.into()))).ok(),
        Kind::Arp | Kind::Other => None,
    };
    match (quoted, meta.addresses()) {
        (Some((from, to)), Some((_, receiver))) => from == receiver && may_have(to),
        _ => false,
    }
}

fn v4(bits: u32) -> IpAddr {
    IpAddr::V4(bits.into())
}

/// Writes the error about a packet into `out`, which is emptied first. `head` is the packet's first frame, as it came.
/// False if there is none to write.
pub(crate) fn error(
    reason: DropReason,
    meta: &Meta,
    head: &[u8],
    mtu: u32,
    speaker: Speaker,
    out: &mut Vec<u8>,
) -> bool {
    let Some((source, _)) = meta.addresses() else { return false };
    let Some(message) = Message::of(reason, meta, source, mtu) else { return false };
    let ip = head.get(usize::from(meta.l3)..).unwrap_or_default();
    let ip = &ip[..ip.len().min(meta.l3_len as usize)];
    match (speaker.address, source) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let quote = &ip[..ip.len().min(MAX_V4 - IPV4 - HEADER)];
            emit_v4(message, quote, (from, to), speaker.macs, out);
            true
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let quote = &ip[..ip.len().min(MAX_V6 - IPV6 - HEADER)];
            emit_v6(message, quote, (from, to), speaker.macs, out);
            true
        }
        _ => false,
    }
}

/// The facts of a message that [`error`] wrote about the packet that `meta` was parsed from.
pub(crate) fn meta_of_error(meta: &Meta, length: usize) -> Meta {
    let (protocol, header) = if meta.kind == Kind::V4 { (ICMP, IPV4) } else { (ICMPV6, IPV6) };
    Meta {
        l3: ETHERNET as u16,
        l4: (ETHERNET + header) as u16,
        l3_len: (length - ETHERNET) as u32,
        protocol,
        ttl: TTL,
        fragment: None,
        is_syn: false,
        is_control: false,
        checksum: Checksum::Complete,
        ..*meta
    }
}

fn emit_v4(
    message: Message,
    quote: &[u8],
    (from, to): (Ipv4Addr, Ipv4Addr),
    macs: (MacAddr, MacAddr),
    out: &mut Vec<u8>,
) {
    out.clear();
    out.resize(ETHERNET + IPV4 + HEADER + quote.len(), 0);
    ethernet(macs, EthernetProtocol::Ipv4, out);
    let ip = Ipv4Repr {
        src_addr: from,
        dst_addr: to,
        next_header: IpProtocol::Icmp,
        payload_len: HEADER + quote.len(),
        hop_limit: TTL,
    };
    let mut packet = Ipv4Packet::new_unchecked(&mut out[ETHERNET..]);
    ip.emit(&mut packet, &ChecksumCapabilities::default());
    packet.set_dscp(PRECEDENCE >> 2);
    packet.fill_checksum();
    let body = packet.payload_mut();
    body[4..8].copy_from_slice(&message.word.to_be_bytes());
    body[HEADER..].copy_from_slice(quote);
    let mut icmp = Icmpv4Packet::new_unchecked(body);
    icmp.set_msg_type(Icmpv4Message::from(message.kind));
    icmp.set_msg_code(message.code);
    icmp.fill_checksum();
}

fn emit_v6(
    message: Message,
    quote: &[u8],
    (from, to): (Ipv6Addr, Ipv6Addr),
    macs: (MacAddr, MacAddr),
    out: &mut Vec<u8>,
) {
    out.clear();
    out.resize(ETHERNET + IPV6 + HEADER + quote.len(), 0);
    ethernet(macs, EthernetProtocol::Ipv6, out);
    let ip = Ipv6Repr {
        src_addr: from,
        dst_addr: to,
        next_header: IpProtocol::Icmpv6,
        payload_len: HEADER + quote.len(),
        hop_limit: TTL,
    };
    let mut packet = Ipv6Packet::new_unchecked(&mut out[ETHERNET..]);
    ip.emit(&mut packet);
    let body = packet.payload_mut();
    body[4..8].copy_from_slice(&message.word.to_be_bytes());
    body[HEADER..].copy_from_slice(quote);
    let mut icmp = Icmpv6Packet::new_unchecked(body);
    icmp.set_msg_type(Icmpv6Message::from(message.kind));
    icmp.set_msg_code(message.code);
    icmp.fill_checksum(&from, &to);
}

fn ethernet((from, to): (MacAddr, MacAddr), ethertype: EthernetProtocol, out: &mut [u8]) {
    let frame = EthernetRepr { src_addr: EthernetAddress(from.0), dst_addr: EthernetAddress(to.0), ethertype };
    frame.emit(&mut EthernetFrame::new_unchecked(out));
}

/// True for a whole echo request.
pub(crate) fn is_echo_request(meta: &Meta) -> bool {
    let L4Key { source, .. } = meta.key.fields().ports;
    let kind = (source >> 8) as u8;
    meta.fragment.is_none()
        && match meta.kind {
            Kind::V4 => meta.protocol == ICMP && kind == ECHO_REQUEST_V4,
            Kind::V6 => meta.protocol == ICMPV6 && kind == ECHO_REQUEST_V6,
            Kind::Arp | Kind::Other => false,
        }
}

/// Turns an echo request into its reply, in place: addresses change sides, which no checksum notices, and the type.
///
/// # Errors
///
/// [`DropReason::Malformed`] if it is none.
pub(crate) fn answer_echo(packet: &mut Packet, meta: &Meta, from: MacAddr) -> Result<(), DropReason> {
    let (l3, l4) = (usize::from(meta.l3), usize::from(meta.l4));
    let head = packet.head_mut().data_mut();
    if !is_echo_request(meta) || head.len() < l4 + 4 {
        return Err(DropReason::Malformed);
    }
    head[..6].copy_from_slice(&meta.source.0);
    head[6..12].copy_from_slice(&from.0);
    let reply = match meta.kind {
        Kind::V4 => {
            let ip = &mut head[l3..];
            let (source, destination) = ip[12..20].split_at_mut(4);
            source.swap_with_slice(destination);
            let old = u16::from_be_bytes([ip[8], ip[9]]);
            ip[8] = TTL;
            let sum = checksum::update(u16::from_be_bytes([ip[10], ip[11]]), old, u16::from_be_bytes([ip[8], ip[9]]));
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
            ECHO_REPLY_V4
        }
        _ => {
            let ip = &mut head[l3..];
            let (source, destination) = ip[8..40].split_at_mut(16);
            source.swap_with_slice(destination);
            ip[7] = TTL;
            ECHO_REPLY_V6
        }
    };
    let icmp = &mut head[l4..];
    let old = u16::from_be_bytes([icmp[0], icmp[1]]);
    icmp[0] = reply;
    let sum = checksum::update(u16::from_be_bytes([icmp[2], icmp[3]]), old, u16::from_be_bytes([icmp[0], icmp[1]]));
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    Ok(())
}
