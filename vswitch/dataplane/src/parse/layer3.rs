//! The headers of IPv4 and IPv6, as far as layer 4: options, extension headers, fragments.

use vswitch_net::checksum;

use super::{byte_at, u16_at, u32_at};
use crate::meta::{Fragment, Kind};
use crate::verdict::DropReason;
use crate::vxlan::ETHERNET;

/// Extension headers of IPv6 (IANA protocol numbers).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;
const MOBILITY: u8 = 135;

/// IPv6 extension headers followed before giving up.
const MAX_EXTENSIONS: usize = 8;

/// What the layer 3 header says.
pub(super) struct Layer3 {
    pub(super) kind: Kind,
    pub(super) l4: usize,
    pub(super) end: usize,
    pub(super) protocol: u8,
    pub(super) ttl: u8,
    pub(super) fragment: Option<Fragment>,
    /// A fragment after the first has no layer 4 header.
    pub(super) has_l4: bool,
    /// Words 4 to 7 of the key.
    pub(super) addresses: [u64; 4],
    /// Sum of the addresses, for the pseudo-header.
    pub(super) address_sum: u32,
}

/// IPv4 (RFC 791), options included.
#[inline(always)]
pub(super) fn parse_v4(head: &[u8], length: usize) -> Result<Layer3, DropReason> {
    let ip: &[u8; 20] = head[ETHERNET..].first_chunk().ok_or(DropReason::Truncated)?;
    let header = usize::from(ip[0] & 0xf) * 4;
    if ip[0] >> 4 != 4 || header < 20 {
        return Err(DropReason::Malformed);
    }
    let is_right = if header == 20 {
        checksum::fold_header(ip) == 0xffff
    } else {
        let whole = head.get(ETHERNET..ETHERNET + header).ok_or(DropReason::Truncated)?;
        checksum::fold(checksum::sum(whole)) == 0xffff
    };
    if !is_right {
        return Err(DropReason::BadIpChecksum);
    }
    let total = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
    if total < header || ETHERNET + total > length {
        return Err(DropReason::BadLength);
    }
    let flags = u16::from_be_bytes([ip[6], ip[7]]);
    let fragment = (flags & 0x3fff != 0).then(|| Fragment {
        id: u32::from(u16::from_be_bytes([ip[4], ip[5]])),
        offset: (flags & 0x1fff) << 3,
        bytes: (total - header) as u32,
        has_more: flags & 0x2000 != 0,
    });
    if fragment.is_some_and(is_impossible) {
        return Err(DropReason::BadFragment);
    }
    let source = u32::from_be_bytes([ip[12], ip[13], ip[14], ip[15]]);
    let destination = u32::from_be_bytes([ip[16], ip[17], ip[18], ip[19]]);
    let halves = |word: u32| (word >> 16) + (word & 0xffff);
    Ok(Layer3 {
        kind: Kind::V4,
        l4: ETHERNET + header,
        end: ETHERNET + total,
        protocol: ip[9],
        ttl: ip[8],
        fragment,
        has_l4: flags & 0x1fff == 0,
        addresses: [u64::from(source), 0, u64::from(destination), 0],
        address_sum: halves(source) + halves(destination),
    })
}

/// IPv6 (RFC 8200) and the extension headers before layer 4.
#[inline]
pub(super) fn parse_v6(head: &[u8], length: usize) -> Result<Layer3, DropReason> {
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
        fragment: None,
        has_l4: true,
        addresses: [word(8), word(16), word(24), word(32)],
        address_sum: checksum::sum(&ip[8..40]),
    };
    for _ in 0..MAX_EXTENSIONS {
        let size = match layer3.protocol {
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS | MOBILITY => 8 + 8 * usize::from(byte_at(head, layer3.l4 + 1)?),
            AUTHENTICATION => 8 + 4 * usize::from(byte_at(head, layer3.l4 + 1)?),
            FRAGMENT => {
                let field = u16_at(head, layer3.l4 + 2)?;
                let part = Fragment {
                    id: u32_at(head, layer3.l4 + 4)?,
                    offset: field & 0xfff8,
                    bytes: end.checked_sub(layer3.l4 + 8).ok_or(DropReason::BadLength)? as u32,
                    has_more: field & 1 != 0,
                };
                if layer3.fragment.is_some() || is_impossible(part) {
                    return Err(DropReason::BadFragment);
                }
                // A whole packet with a fragment header is no fragment (RFC 6946).
                layer3.fragment = (part.offset != 0 || part.has_more).then_some(part);
                layer3.has_l4 = part.offset == 0;
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

/// A part that no stack makes: beyond the largest packet, or before the last and not of whole units.
fn is_impossible(part: Fragment) -> bool {
    u32::from(part.offset) + part.bytes > 0xffff
        || (part.has_more && (part.bytes == 0 || !part.bytes.is_multiple_of(8)))
}
