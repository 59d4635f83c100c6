//! Whether a packet arrived as it was sent: the layer 4 checksum, summed over all its frames. Asked of what changes a connection's
//! state, and by nobody else: receivers look for themselves.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use vswitch_net::checksum;
use vswitch_xsk::{Packet, Umem};

use crate::meta::{Checksum, Meta};
use crate::parse::{ICMP, ICMPV6, TCP, UDP, u16_at};

/// Whether the layer 4 checksum is right, as far as one packet tells. A partial one will be.
pub(crate) fn is_intact(packet: &Packet, umem: &Umem, meta: &Meta) -> bool {
    if meta.fragment.is_some() || !matches!(meta.checksum, Checksum::Complete) {
        return true;
    }
    let head = packet.head().data();
    let (start, end) = (usize::from(meta.l4), usize::from(meta.l3) + meta.l3_len as usize);
    let is_unused = meta.protocol == UDP && u16_at(head, start + 6) == Ok(0);
    let has_pseudo = match meta.protocol {
        TCP | UDP => !is_unused,
        ICMPV6 => true,
        ICMP => false,
        // SCTP has a CRC, which its receiver looks at (RFC 9260 section 6.8).
        _ => return true,
    };
    if is_unused {
        return true;
    }
    let Some(first) = head.get(start..end.min(head.len())) else { return true };
    let mut sum = checksum::sum(first);
    let mut rest = end.saturating_sub(head.len());
    let mut is_odd = first.len() % 2 == 1;
    for piece in umem.tail(packet) {
        let piece = &piece[..piece.len().min(rest)];
        rest -= piece.len();
        let part = checksum::fold(checksum::sum(piece));
        // After an odd piece the bytes of the next stand in the other halves of their words.
        sum += u32::from(if is_odd { part.swap_bytes() } else { part });
        is_odd ^= piece.len() % 2 == 1;
    }
    if has_pseudo {
        let length = (end - start) as u32;
        sum += match meta.addresses() {
            Some((IpAddr::V4(from), IpAddr::V4(to))) => pseudo_v4(from, to, meta.protocol, length),
            Some((IpAddr::V6(from), IpAddr::V6(to))) => pseudo_v6(from, to, meta.protocol, length),
            _ => return true,
        };
    }
    checksum::fold(sum) == 0xffff
}

fn pseudo_v4(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, length: u32) -> u32 {
    checksum::sum(&from.octets())
        + checksum::sum(&to.octets())
        + u32::from(protocol)
        + (length >> 16)
        + (length & 0xffff)
}

fn pseudo_v6(from: Ipv6Addr, to: Ipv6Addr, protocol: u8, length: u32) -> u32 {
    checksum::pseudo_v6(from, to, protocol, length)
}
