//! The Internet checksum (RFC 1071), as sums that can be joined and changed.
//!
//! A *sum* is the one's-complement sum of 16-bit big-endian words, kept in 32 or 64 bits and not yet folded. A
//! *checksum* is the complement of a folded sum, as it stands in a header. A *partial* checksum is what Linux leaves in
//! a header whose completion it asked the device for: the folded, uncomplemented sum of the pseudo-header
//! (kernel document `networking/checksum-offloads`).

use std::net::Ipv6Addr;

/// Adds the bytes of one contiguous piece. Pieces before the last must have even length.
///
/// Words are added in the machine's order, four bytes at a time: the one's-complement sum does not depend on byte order but for
/// one swap at the end (RFC 1071 section 2 B). Each of eight lanes has room for the carries of 2^32 words, so that no addition
/// waits for another one's, and the compiler makes vectors of them.
pub fn sum(bytes: &[u8]) -> u32 {
    let (blocks, rest) = bytes.as_chunks::<32>();
    let mut lanes = [0_u64; 8];
    for block in blocks {
        let (words, _) = block.as_chunks::<4>();
        lanes.iter_mut().zip(words).for_each(|(lane, word)| *lane += u64::from(u32::from_ne_bytes(*word)));
    }
    let (words, rest) = rest.as_chunks::<4>();
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    let tail: u64 = words.iter().chain([&last]).map(|word| u64::from(u32::from_ne_bytes(*word))).sum();
    let folded = fold64(lanes.iter().map(|lane| (lane & 0xffff_ffff) + (lane >> 32)).sum::<u64>() + tail);
    u32::from(u16::from_be_bytes(folded.to_ne_bytes()))
}

/// The folded sum of an IPv4 header without options: all ones if its checksum is right (RFC 791 section 3.1).
#[inline(always)]
pub fn fold_header(header: &[u8; 20]) -> u16 {
    let word = |at: usize| u64::from(u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]));
    let wide = word(0) + word(4) + word(8) + word(12) + word(16);
    let wide = (wide & 0xffff_ffff) + (wide >> 32);
    let wide = (wide & 0xffff) + (wide >> 16);
    let wide = (wide & 0xffff) + (wide >> 16);
    u16::from_be_bytes((((wide & 0xffff) + (wide >> 16)) as u16).to_ne_bytes())
}

/// Folds the carries back until 16 bits are left.
#[inline]
pub fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The checksum of a sum: its folded complement.
#[inline]
pub fn finish(sum: u32) -> u16 {
    !fold(sum)
}

/// As [`finish`], for UDP: an all-zero result is sent as all ones (RFC 768).
#[inline]
pub fn finish_udp(sum: u32) -> u16 {
    match finish(sum) {
        0 => 0xffff,
        checksum => checksum,
    }
}

/// The sum of the IPv6 pseudo-header (RFC 8200 section 8.1).
pub fn pseudo_v6(source: Ipv6Addr, destination: Ipv6Addr, protocol: u8, length: u32) -> u32 {
    sum(&source.octets()) + sum(&destination.octets()) + u32::from(protocol) + length_sum(length)
}

/// The checksum after one 16-bit word under it changed from `old` to `new` (RFC 1624, equation 3).
#[inline]
pub fn update(checksum: u16, old: u16, new: u16) -> u16 {
    finish(u32::from(!checksum) + u32::from(!old) + u32::from(new))
}

/// The checksum of an IPv4 header after its time to live went down by one: [`update`] of a word that is 0x100 less,
/// whatever it was.
#[inline]
pub fn after_hop(checksum: u16) -> u16 {
    let sum = u32::from(!checksum) + 0xfeff;
    !((sum & 0xffff) + (sum >> 16)) as u16
}

fn length_sum(length: u32) -> u32 {
    (length >> 16) + (length & 0xffff)
}

fn fold64(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The obvious way, word by word.
    fn naive(bytes: &[u8]) -> u16 {
        let mut total: u32 = 0;
        for pair in bytes.chunks(2) {
            total += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
        }
        fold(total)
    }

    #[test]
    fn agrees_with_the_obvious_sum() {
        let bytes: Vec<u8> = (0..600_u32).map(|i| (i * 7 + i / 3) as u8).collect();
        for from in 0..4 {
            for to in from..bytes.len() {
                assert_eq!(fold(sum(&bytes[from..to])), naive(&bytes[from..to]), "{from}..{to}");
            }
        }
        assert_eq!(fold(sum(&[0xff; 64])), 0xffff);
    }

    #[test]
    fn a_header_is_summed_like_any_bytes() {
        for start in 0..=255_u8 {
            let header: [u8; 20] = std::array::from_fn(|at| start.wrapping_mul(at as u8 ^ 0x5a).wrapping_add(start));
            assert_eq!(fold_header(&header), naive(&header));
        }
        assert_eq!(fold_header(&[0xff; 20]), 0xffff);
        assert_eq!(fold_header(&[0; 20]), 0);
    }

    #[test]
    fn rfc1071_example() {
        assert_eq!(fold(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7])), 0xddf2);
    }

    #[test]
    fn update_equals_a_new_sum() {
        let mut header = [0x45, 0, 0, 84, 1, 2, 0x40, 0, 64, 1, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        let before = finish(sum(&header));
        let old = u16::from_be_bytes([header[8], header[9]]);
        header[8] = 63;
        let new = u16::from_be_bytes([header[8], header[9]]);
        assert_eq!(update(before, old, new), finish(sum(&header)));
    }

    #[test]
    fn a_hop_less_is_an_update() {
        for checksum in 0..=u16::MAX {
            for old in [0x0100, 0x0111, 0x4006, 0xff11, 0xffff] {
                assert_eq!(after_hop(checksum), update(checksum, old, old - 0x100));
            }
        }
    }

    #[test]
    fn udp_never_sends_zero() {
        assert_eq!(finish_udp(0xffff), 0xffff);
    }
}
