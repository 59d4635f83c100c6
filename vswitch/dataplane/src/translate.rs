//! Address translation, the mechanism: new addresses and ports written into a packet, and every checksum that covers them.
//!
//! What becomes of which packet is decided elsewhere ([`crate::nat`]). Checksums are changed by what changed under them
//! (RFC 1624), so no byte of the rest is read; SCTP's is a CRC and is computed anew.

use std::net::IpAddr;

use vswitch_net::checksum;
use vswitch_xsk::{Packet, Umem};

use crate::connection::{Quote, Tuple};
use crate::meta::{Checksum, Kind, Meta, address};
use crate::parse::{ICMP, ICMPV6, SCTP, TCP, UDP};
use crate::verdict::DropReason;

const DCCP: u8 = 33;
const UDP_LITE: u8 = 136;

/// The addresses and ports that a packet is to have. Addresses are words as in a [`FlowKey`](crate::meta::FlowKey).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Translation {
    /// Source address.
    pub source: [u64; 2],
    /// Destination address.
    pub destination: [u64; 2],
    /// Source and destination port; for an echo, its identifier twice.
    pub ports: (u16, u16),
}

impl Translation {
    /// In the form that the flow table keeps.
    pub(crate) fn to_words(self) -> [u64; 5] {
        let ports = u64::from(self.ports.0) << 16 | u64::from(self.ports.1);
        [self.source[0], self.source[1], self.destination[0], self.destination[1], ports]
    }

    pub(crate) fn from_words(words: [u64; 5]) -> Translation {
        let [s0, s1, d0, d1, ports] = words;
        Translation { source: [s0, s1], destination: [d0, d1], ports: ((ports >> 16) as u16, ports as u16) }
    }

    /// Source and destination as people read them.
    pub fn ends(&self, is_v6: bool) -> [(IpAddr, u16); 2] {
        [(address(self.source, is_v6), self.ports.0), (address(self.destination, is_v6), self.ports.1)]
    }
}

/// What bytes that were written over mean for a checksum that covers them.
#[derive(Clone, Copy, Debug, Default)]
struct Change(u32);

impl Change {
    /// Writes over bytes that begin at an even distance from the start of what a checksum covers.
    fn write(&mut self, at: &mut [u8], new: &[u8]) {
        for (old, new) in at.chunks_exact_mut(2).zip(new.chunks_exact(2)) {
            let (before, after) = (u16::from_be_bytes([old[0], old[1]]), u16::from_be_bytes([new[0], new[1]]));
            if before != after {
                self.0 += u32::from(!before) + u32::from(after);
                old.copy_from_slice(new);
            }
        }
    }

    fn and(self, other: Change) -> Change {
        Change(self.0 + other.0)
    }

    /// Of a checksum (RFC 1624, equation 3).
    fn of_checksum(self, old: u16) -> u16 {
        checksum::finish(u32::from(!old) + self.0)
    }

    /// Of a sum that is not complemented, as a partial checksum is.
    fn of_sum(self, old: u16) -> u16 {
        checksum::fold(u32::from(old) + self.0)
    }
}

/// What was changed of a packet, by what covers it.
#[derive(Clone, Copy, Debug, Default)]
struct Changes {
    /// The addresses: they are in the header of IPv4, and in most pseudo-headers.
    addresses: Change,
    /// The ports, or the identifier.
    ports: Change,
}

/// Writes addresses and ports into a packet. A later fragment has no ports.
///
/// # Errors
///
/// [`DropReason::BadChecksum`] or [`DropReason::Untranslatable`] for SCTP whose CRC is wrong, or not in one piece, and would have
/// to be computed anew.
pub(crate) fn translate(packet: &mut Packet, meta: &Meta, to: &Translation, umem: &Umem) -> Result<(), DropReason> {
    let (l3, l4) = (usize::from(meta.l3), usize::from(meta.l4));
    let has_crc = meta.protocol == SCTP && meta.has_l4() && has_other_ports(packet, l4, to);
    if has_crc && meta.fragment.is_some() {
        return Err(DropReason::Untranslatable);
    }
    if has_crc && crc(packet, meta, umem) != packet.head().data()[l4 + 8..l4 + 12] {
        return Err(DropReason::BadChecksum);
    }
    let head = packet.head_mut().data_mut();
    let mut changes =
        Changes { addresses: write_addresses(&mut head[l3..], meta.kind == Kind::V6, to), ..Changes::default() };
    if !meta.has_l4() {
        return Ok(());
    }
    let layer4 = &mut head[l4..];
    changes.ports = write_ports(layer4, meta.protocol, to);
    match meta.checksum {
        Checksum::Partial { offset } => {
            let field = usize::from(offset);
            let sum = u16::from_be_bytes([layer4[field], layer4[field + 1]]);
            layer4[field..field + 2].copy_from_slice(&changes.addresses.of_sum(sum).to_be_bytes());
        }
        Checksum::Complete => fit_checksum(layer4, meta.protocol, changes),
    }
    if has_crc {
        let crc = crc(packet, meta, umem);
        packet.head_mut().data_mut()[l4 + 8..l4 + 12].copy_from_slice(&crc);
    }
    Ok(())
}

/// Writes what its receiver has sent over the packet that an ICMP error quotes, and over the error's own addresses.
/// `outer` has no ports.
pub(crate) fn translate_error(packet: &mut Packet, meta: &Meta, quote: &Quote, inner: &Tuple, outer: &Translation) {
    let (l3, l4, end) = (usize::from(meta.l3), usize::from(meta.l4), quote.end);
    let head = packet.head_mut().data_mut();
    // What covers the quote covers every byte that changes in it, checksums too.
    let before = checksum::sum(&head[l4..end]);
    let to = inner.ends();
    let mut changes =
        Changes { addresses: write_addresses(&mut head[quote.l3..end], inner.is_v6, &to), ..Changes::default() };
    let layer4 = &mut head[quote.l4.min(end)..end];
    if layer4.len() >= 8 {
        changes.ports = write_ports(layer4, inner.protocol, &to);
        fit_checksum(layer4, inner.protocol, changes);
    }
    let after = checksum::sum(&head[l4..end]);
    let addresses = write_addresses(&mut head[l3..], meta.kind == Kind::V6, outer);
    let pseudo = if meta.protocol == ICMPV6 { addresses } else { Change::default() };
    let all = Change(u32::from(!checksum::fold(before)) + u32::from(checksum::fold(after))).and(pseudo);
    let field = l4 + 2;
    let sum = all.of_checksum(u16::from_be_bytes([head[field], head[field + 1]]));
    head[field..field + 2].copy_from_slice(&sum.to_be_bytes());
}

/// Both addresses of an IP header, and the header's own checksum.
fn write_addresses(ip: &mut [u8], is_v6: bool, to: &Translation) -> Change {
    let mut change = Change::default();
    for (place, address) in [to.source, to.destination].into_iter().enumerate() {
        if is_v6 {
            let at = 8 + 16 * place;
            change.write(&mut ip[at..at + 8], &address[0].to_be_bytes());
            change.write(&mut ip[at + 8..at + 16], &address[1].to_be_bytes());
        } else {
            let at = 12 + 4 * place;
            change.write(&mut ip[at..at + 4], &(address[0] as u32).to_be_bytes());
        }
    }
    if !is_v6 {
        let sum = change.of_checksum(u16::from_be_bytes([ip[10], ip[11]]));
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    change
}

/// Ports, or the identifier of an echo.
fn write_ports(layer4: &mut [u8], protocol: u8, to: &Translation) -> Change {
    let mut change = Change::default();
    match protocol {
        TCP | UDP | SCTP => {
            change.write(&mut layer4[..2], &to.ports.0.to_be_bytes());
            change.write(&mut layer4[2..4], &to.ports.1.to_be_bytes());
        }
        ICMP | ICMPV6 if matches!(layer4[0], 0 | 8 | 128 | 129) => {
            change.write(&mut layer4[4..6], &to.ports.0.to_be_bytes());
        }
        _ => {}
    }
    change
}

/// A complete checksum of layer 4, if it is there.
fn fit_checksum(layer4: &mut [u8], protocol: u8, changes: Changes) {
    let (field, covered) = match protocol {
        TCP => (16, changes.addresses.and(changes.ports)),
        // UDP-Lite (RFC 3828) and DCCP (RFC 4340) have theirs where UDP has it.
        UDP | UDP_LITE | DCCP => (6, changes.addresses.and(changes.ports)),
        ICMP => (2, changes.ports),
        ICMPV6 => (2, changes.addresses.and(changes.ports)),
        _ => return,
    };
    let Some(&[high, low]) = layer4.get(field..).and_then(|rest| rest.first_chunk()) else { return };
    let old = u16::from_be_bytes([high, low]);
    let new = match (protocol, old) {
        // Not used (RFC 768).
        (UDP, 0) => return,
        (UDP, _) if covered.of_checksum(old) == 0 => 0xffff,
        _ => covered.of_checksum(old),
    };
    layer4[field..field + 2].copy_from_slice(&new.to_be_bytes());
}

/// True if the ports of an SCTP packet change.
fn has_other_ports(packet: &Packet, l4: usize, to: &Translation) -> bool {
    let ports = &packet.head().data()[l4..l4 + 4];
    ports[..2] != to.ports.0.to_be_bytes() || ports[2..] != to.ports.1.to_be_bytes()
}

/// The CRC of an SCTP packet (RFC 9260 appendix A), over all its frames with the field as zero.
fn crc(packet: &Packet, meta: &Meta, umem: &Umem) -> [u8; 4] {
    let (l4, end) = (usize::from(meta.l4), usize::from(meta.l3) + meta.l3_len as usize);
    let head = packet.head().data();
    let mut crc = crc32c::crc32c(&head[l4..l4 + 8]);
    crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc = crc32c::crc32c_append(crc, &head[l4 + 12..end.min(head.len())]);
    let mut rest = end.saturating_sub(head.len());
    for piece in umem.tail(packet) {
        let piece = &piece[..piece.len().min(rest)];
        crc = crc32c::crc32c_append(crc, piece);
        rest -= piece.len();
    }
    crc.to_le_bytes()
}
