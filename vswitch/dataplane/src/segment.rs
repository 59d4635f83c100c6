//! Sizes: IPv4 fragmentation, and the largest segment that a TCP connection is told.

use vswitch_net::checksum;

use crate::meta::{Checksum, Fragment, Kind, Meta};

const IPV4: usize = 20;
const DONT_FRAGMENT: u8 = 0x40;
const MORE_FRAGMENTS: u16 = 0x2000;
/// An option with this bit stands in every fragment (RFC 791 section 3.1).
const COPIED: u8 = 0x80;
const END_OF_OPTIONS: u8 = 0;
const NO_OPERATION: u8 = 1;

const TCP_HEADER: usize = 20;
const MSS: u8 = 2;

/// True for an IPv4 packet whose sender lets it be cut.
pub(crate) fn may_fragment(meta: &Meta, head: &[u8]) -> bool {
    meta.kind == Kind::V4 && head.get(usize::from(meta.l3) + 6).is_some_and(|flags| flags & DONT_FRAGMENT == 0)
}

/// The pieces of a packet: where each begins in the payload, and how long it is.
#[derive(Debug)]
pub(crate) struct Pieces {
    header: usize,
    payload: usize,
    room: usize,
    at: usize,
}

/// One piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    header: usize,
    at: usize,
    bytes: usize,
    is_last: bool,
}

impl Pieces {
    /// The pieces of `packet`, a whole IPv4 packet with its Ethernet header, none larger than `mtu`. None at all if not
    /// even eight bytes fit beside the header.
    pub(crate) fn of(packet: &[u8], meta: &Meta, mtu: usize) -> Pieces {
        let header = packet.get(usize::from(meta.l3)).map_or(IPV4, |first| usize::from(first & 0xf) * 4);
        let room = mtu.saturating_sub(header) / 8 * 8;
        let payload = if room == 0 { 0 } else { (meta.l3_len as usize).saturating_sub(header) };
        Pieces { header, payload, room, at: 0 }
    }
}

impl Iterator for Pieces {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        let at = self.at;
        let bytes = self.payload.checked_sub(at).filter(|&left| left > 0)?.min(self.room);
        self.at += bytes;
        Some(Piece { header: self.header, at, bytes, is_last: self.at == self.payload })
    }
}

impl Piece {
    /// Writes the piece with its headers into `out`, which is emptied first; its facts.
    pub(crate) fn emit(&self, packet: &[u8], meta: &Meta, out: &mut Vec<u8>) -> Meta {
        let l3 = usize::from(meta.l3);
        let l4 = l3 + self.header;
        out.clear();
        out.extend_from_slice(&packet[..l4]);
        out.extend_from_slice(&packet[l4 + self.at..l4 + self.at + self.bytes]);
        let ip = &mut out[l3..l4];
        let length = self.header + self.bytes;
        ip[2..4].copy_from_slice(&(length as u16).to_be_bytes());
        let before = u16::from_be_bytes([ip[6], ip[7]]);
        // A fragment may be cut again: its pieces begin where it began, and more follow unless it was the last.
        let offset = (before & 0x1fff) + (self.at / 8) as u16;
        let has_more = !self.is_last || before & MORE_FRAGMENTS != 0;
        let flags = offset | if has_more { MORE_FRAGMENTS } else { 0 };
        ip[6..8].copy_from_slice(&flags.to_be_bytes());
        if offset > 0 {
            blank_options(&mut ip[IPV4..]);
        }
        ip[10..12].fill(0);
        let sum = checksum::finish(checksum::sum(ip));
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        let id = u32::from(u16::from_be_bytes([ip[4], ip[5]]));
        let fragment = Fragment { id, offset: offset << 3, bytes: self.bytes as u32, has_more };
        Meta { l3_len: length as u32, fragment: Some(fragment), checksum: Checksum::Complete, ..*meta }
    }
}

/// Replaces the options that only the first fragment has by such as say nothing.
fn blank_options(mut options: &mut [u8]) {
    while let [kind, rest @ ..] = options {
        let length = match *kind {
            END_OF_OPTIONS => return,
            NO_OPERATION => 1,
            _ => usize::from(rest.first().copied().unwrap_or(0)).max(2),
        };
        let length = length.min(options.len());
        let (option, after) = options.split_at_mut(length);
        if option[0] & COPIED == 0 {
            option.fill(NO_OPERATION);
        }
        options = after;
    }
}

/// Lowers the largest segment that a SYN announces (RFC 9293 section 3.7.1) to the family's of `mss`; never raises it.
pub(crate) fn clamp(head: &mut [u8], meta: &Meta, (v4, v6): (u16, u16)) {
    let limit = if meta.kind == Kind::V4 { v4 } else { v6 };
    let l4 = usize::from(meta.l4);
    let Some(length) = head.get(l4 + 12).map(|offset| usize::from(offset >> 4) * 4) else { return };
    let Some(tcp) = head.get_mut(l4..l4 + length).filter(|tcp| tcp.len() >= TCP_HEADER) else { return };
    let mut at = TCP_HEADER;
    while at + 1 < tcp.len() {
        let (kind, size) = (tcp[at], usize::from(tcp[at + 1]));
        match kind {
            END_OF_OPTIONS => return,
            NO_OPERATION => at += 1,
            MSS if size == 4 && at + 4 <= tcp.len() => return lower(tcp, at + 2, limit, meta.checksum),
            _ if size < 2 => return,
            _ => at += size,
        }
    }
}

fn lower(tcp: &mut [u8], at: usize, limit: u16, state: Checksum) {
    let old = u16::from_be_bytes([tcp[at], tcp[at + 1]]);
    if old <= limit {
        return;
    }
    tcp[at..at + 2].copy_from_slice(&limit.to_be_bytes());
    // A partial checksum holds no byte of the segment yet.
    if state == Checksum::Complete {
        // At an odd place the two bytes lie in two words, the other way round (RFC 1071 section 2 B).
        let as_summed = |value: u16| if at.is_multiple_of(2) { value } else { value.swap_bytes() };
        let field = u16::from_be_bytes([tcp[16], tcp[17]]);
        tcp[16..18].copy_from_slice(&checksum::update(field, as_summed(old), as_summed(limit)).to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_are_not_copied_are_blanked() {
        // Record route (7) is not copied, router alert (148) is.
        let mut options = [7, 7, 4, 1, 2, 3, 4, 148, 4, 0, 0, 0];
        blank_options(&mut options);
        assert_eq!(options, [1, 1, 1, 1, 1, 1, 1, 148, 4, 0, 0, 0]);
        // A length that lies ends with the header.
        let mut options = [7, 200, 1, 2];
        blank_options(&mut options);
        assert_eq!(options, [1, 1, 1, 1]);
        let mut options = [7, 0, 7, 0];
        blank_options(&mut options);
        assert_eq!(options, [1; 4]);
    }

    #[test]
    fn a_lowered_mss_keeps_the_checksum_right() {
        for padding in 0..4 {
            let mut tcp = vec![0; TCP_HEADER];
            tcp.extend(vec![NO_OPERATION; padding]);
            tcp.extend([MSS, 4, 0x23, 0x28]);
            tcp.resize(tcp.len().next_multiple_of(4), END_OF_OPTIONS);
            tcp[12] = ((tcp.len() / 4) << 4) as u8;
            let sum = checksum::finish(checksum::sum(&tcp));
            tcp[16..18].copy_from_slice(&sum.to_be_bytes());
            lower(&mut tcp, TCP_HEADER + padding + 2, 1410, Checksum::Complete);
            assert_eq!(checksum::fold(checksum::sum(&tcp)), 0xffff);
            assert_eq!(tcp[TCP_HEADER + padding + 2..][..2], 1410_u16.to_be_bytes());
            let before = tcp.clone();
            lower(&mut tcp, TCP_HEADER + padding + 2, 9000, Checksum::Complete);
            assert_eq!(tcp, before, "never raised");
        }
    }

    #[test]
    fn pieces_cover_the_payload_once() {
        for (payload, mtu) in [(8000, 1500), (1480, 1500), (1481, 1500), (65_000, 68), (9, 28)] {
            let mut covered = 0;
            let pieces = Pieces { header: 20, payload, room: (mtu - 20) / 8 * 8, at: 0 };
            for piece in pieces {
                assert_eq!(piece.at, covered);
                assert!(piece.bytes + 20 <= mtu && (piece.is_last || piece.bytes % 8 == 0));
                covered += piece.bytes;
            }
            assert_eq!(covered, payload);
        }
    }
}
