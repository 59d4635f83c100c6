//! VXLAN: the outer headers, read and written (RFC 7348 section 5).

use std::net::{IpAddr, Ipv4Addr};

use vswitch_net::checksum;
use vswitch_net::{MacAddr, Vni};

use crate::parse::{u16_at, u32_at, v6_at};
use crate::snapshot::Underlay;
use crate::verdict::DropReason;

pub(crate) const ETHERNET: usize = 14;
/// Bytes of an 802.1Q tag, and the bits of its identifier.
pub(crate) const TAG: usize = 4;
pub(crate) const VID: u16 = 0xfff;
const IPV4: usize = 20;
const IPV6: usize = 40;
const UDP: usize = 8;
const VXLAN: usize = 8;

pub(crate) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(crate) const ETHERTYPE_IPV6: u16 = 0x86dd;
pub(crate) const ETHERTYPE_VLAN: u16 = 0x8100;

/// The I flag: the VNI is valid.
const FLAG_VNI: u8 = 0x08;

/// The lowest port of the dynamic range, from which the source port is chosen (RFC 7348 section 5, RFC 6335 section 6).
const ENTROPY_BASE: u16 = 49_152;

/// Hops of an outer packet.
const OUTER_TTL: u8 = 64;

/// Outer headers over IPv4 without a tag.
const V4_HEADER: usize = ETHERNET + IPV4 + UDP + VXLAN;

/// Longest outer header.
pub const MAX_HEADER: usize = ETHERNET + TAG + IPV6 + UDP + VXLAN;

/// What lies before the inner frame of a received packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outer {
    /// The sending VTEP.
    pub source: IpAddr,
    /// The network's identifier.
    pub vni: Vni,
    /// Bytes before the inner frame.
    pub header: usize,
    /// Bytes of the inner frame.
    pub inner: usize,
    /// The two ECN bits of the outer IP header.
    pub ecn: u8,
}

/// Reads the outer headers of a packet from the uplink.
///
/// `head` is the first frame, `length` the whole packet.
///
/// # Errors
///
/// The reason to drop it.
#[inline]
pub fn parse_outer(head: &[u8], length: usize, underlay: &Underlay) -> Result<Outer, DropReason> {
    let mut l3 = ETHERNET;
    let mut ethertype = u16_at(head, 12)?;
    let mut vlan = 0;
    if ethertype == ETHERTYPE_VLAN {
        vlan = u16_at(head, ETHERNET)? & VID;
        ethertype = u16_at(head, ETHERNET + 2)?;
        l3 += TAG;
    }
    // A tag with identifier zero says a priority and no VLAN.
    if vlan != underlay.vlan.unwrap_or(0) {
        return Err(DropReason::NotVxlan);
    }
    let (source, ours, udp, ip_end, ecn);
    match ethertype {
        ETHERTYPE_IPV4 => {
            let header = head.get(l3..l3 + IPV4).ok_or(DropReason::Truncated)?;
            let ihl = usize::from(header[0] & 0xf) * 4;
            if header[0] >> 4 != 4 || ihl < IPV4 {
                return Err(DropReason::Malformed);
            }
            let options = head.get(l3..l3 + ihl).ok_or(DropReason::Truncated)?;
            if checksum::fold(checksum::sum(options)) != 0xffff {
                return Err(DropReason::BadIpChecksum);
            }
            if u16_at(header, 6)? & 0x3fff != 0 || header[9] != 17 {
                return Err(DropReason::NotVxlan);
            }
            source = IpAddr::V4(Ipv4Addr::from_bits(u32_at(header, 12)?));
            ours = underlay.v4 == Some(Ipv4Addr::from_bits(u32_at(header, 16)?));
            udp = l3 + ihl;
            ip_end = l3 + usize::from(u16_at(header, 2)?);
            ecn = header[1] & 3;
        }
        ETHERTYPE_IPV6 => {
            let header = head.get(l3..l3 + IPV6).ok_or(DropReason::Truncated)?;
            if header[0] >> 4 != 6 {
                return Err(DropReason::Malformed);
            }
            if header[6] != 17 {
                return Err(DropReason::NotVxlan);
            }
            source = IpAddr::V6(v6_at(header, 8)?);
            ours = underlay.v6 == Some(v6_at(header, 24)?);
            udp = l3 + IPV6;
            ip_end = udp + usize::from(u16_at(header, 4)?);
            ecn = (header[1] >> 4) & 3;
        }
        _ => return Err(DropReason::NotVxlan),
    }
    if !ours {
        return Err(DropReason::NotVxlan);
    }
    let header = head.get(udp..udp + UDP + VXLAN).ok_or(DropReason::Truncated)?;
    if u16_at(header, 2)? != underlay.udp_port {
        return Err(DropReason::NotVxlan);
    }
    let udp_end = udp + usize::from(u16_at(header, 4)?);
    if udp_end < udp + UDP + VXLAN || udp_end > ip_end || ip_end > length {
        return Err(DropReason::BadLength);
    }
    if header[8] & FLAG_VNI == 0 {
        return Err(DropReason::BadVxlan);
    }
    let vni = Vni::try_from(u32_at(header, 12)? >> 8).map_err(|_| DropReason::BadVxlan)?;
    let before = udp + UDP + VXLAN;
    Ok(Outer { source, vni, header: before, inner: udp_end - before, ecn })
}

/// Outer headers to one peer, written once, patched for each packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OuterHeader {
    bytes: [u8; MAX_HEADER],
    length: u8,
    /// Where the IP header starts.
    l3: u8,
    is_v6: bool,
    /// IPv4: sum of the IP header with length zero. IPv6: sum of the pseudo-header's addresses and protocol.
    sum: u32,
}

impl OuterHeader {
    /// Headers from our VTEP to a peer's, with an 802.1Q tag if the underlay has one. None if the two are not of one family.
    pub fn new(
        (source_mac, destination_mac): (MacAddr, MacAddr),
        source: IpAddr,
        destination: IpAddr,
        udp_port: u16,
        vlan: Option<u16>,
    ) -> Option<OuterHeader> {
        let mut bytes = [0; MAX_HEADER];
        let mut l3 = ETHERNET;
        if let Some(vid) = vlan {
            bytes[12..14].copy_from_slice(&ETHERTYPE_VLAN.to_be_bytes());
            bytes[14..16].copy_from_slice(&(vid & VID).to_be_bytes());
            l3 += TAG;
        }
        bytes[..6].copy_from_slice(&destination_mac.0);
        bytes[6..12].copy_from_slice(&source_mac.0);
        let (ethertype, udp, sum) = match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let ip = &mut bytes[l3..l3 + IPV4];
                ip[0] = 0x45;
                // Never fragmented (RFC 7348 section 4.3): DF, and then the identification may be zero (RFC 6864).
                ip[6] = 0x40;
                ip[8] = OUTER_TTL;
                ip[9] = 17;
                ip[12..16].copy_from_slice(&source.octets());
                ip[16..20].copy_from_slice(&destination.octets());
                (ETHERTYPE_IPV4, l3 + IPV4, checksum::sum(ip))
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let ip = &mut bytes[l3..l3 + IPV6];
                ip[0] = 0x60;
                ip[6] = 17;
                ip[7] = OUTER_TTL;
                ip[8..24].copy_from_slice(&source.octets());
                ip[24..40].copy_from_slice(&destination.octets());
                (ETHERTYPE_IPV6, l3 + IPV6, checksum::pseudo_v6(source, destination, 17, 0))
            }
            _ => return None,
        };
        bytes[l3 - 2..l3].copy_from_slice(&ethertype.to_be_bytes());
        bytes[udp + 2..udp + 4].copy_from_slice(&udp_port.to_be_bytes());
        bytes[udp + UDP] = FLAG_VNI;
        Some(OuterHeader { bytes, length: (udp + UDP + VXLAN) as u8, l3: l3 as u8, is_v6: source.is_ipv6(), sum })
    }

    /// Bytes that [`emit`](Self::emit) writes.
    #[inline(always)]
    pub fn len(&self) -> usize {
        usize::from(self.length)
    }

    /// Bytes of an outer IP packet that the inner one does not get: all headers but the outer Ethernet's.
    #[inline]
    pub fn overhead(&self) -> usize {
        self.len() - usize::from(self.l3) + ETHERNET
    }

    /// Never: a header has bytes.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// True if the outer UDP checksum is needed: over IPv6 (RFC 8200 section 8.1). Over IPv4 it is zero (RFC 7348
    /// section 5).
    #[inline(always)]
    pub fn needs_udp_checksum(&self) -> bool {
        self.is_v6
    }

    /// What stands before the ethertype of the outer packet: both MACs, and the tag if there is one. A packet that is not
    /// encapsulated gets this and nothing else.
    #[inline]
    pub fn link_layer(&self) -> &[u8] {
        &self.bytes[..usize::from(self.l3) - 2]
    }

    /// Writes the headers at the front of `head`, which holds at least [`len`](Self::len) bytes.
    ///
    /// `hash` is the inner flow's, `inner` the inner frame's length, `ecn` the two bits to show outside. `inner_sum`, the
    /// sum of the whole inner frame, is called for only where the outer checksum needs it.
    #[inline]
    pub fn emit(&self, head: &mut [u8], vni: Vni, hash: u64, inner: usize, ecn: u8, inner_sum: impl FnOnce() -> u32) {
        let length = self.len();
        let head = &mut head[..length];
        let udp_length = (UDP + VXLAN + inner) as u16;
        let entropy = ENTROPY_BASE | (hash >> 50) as u16;
        // The usual one with every place in it known beforehand.
        if !self.needs_udp_checksum()
            && length == V4_HEADER
            && let (Some(head), Some(bytes)) = (head.first_chunk_mut::<V4_HEADER>(), self.bytes.first_chunk())
        {
            *head = *bytes;
            self.patch_v4(head, ETHERNET, ecn, udp_length);
            patch_udp(head, V4_HEADER - UDP - VXLAN, entropy, udp_length, vni);
            return;
        }
        head.copy_from_slice(&self.bytes[..length]);
        let (l3, udp_at) = (usize::from(self.l3), length - UDP - VXLAN);
        if !self.needs_udp_checksum() {
            self.patch_v4(head, l3, ecn, udp_length);
            patch_udp(head, udp_at, entropy, udp_length, vni);
            return;
        }
        head[l3 + 1] = ecn << 4;
        head[l3 + 4..l3 + 6].copy_from_slice(&udp_length.to_be_bytes());
        patch_udp(head, udp_at, entropy, udp_length, vni);
        let udp = &mut head[udp_at..];
        let sum = self.sum + u32::from(udp_length) + checksum::sum(udp) + u32::from(checksum::fold(inner_sum()));
        udp[6..8].copy_from_slice(&checksum::finish_udp(sum).to_be_bytes());
    }

    #[inline(always)]
    fn patch_v4(&self, head: &mut [u8], l3: usize, ecn: u8, udp_length: u16) {
        let total = udp_length + IPV4 as u16;
        head[l3 + 1] = ecn;
        head[l3 + 2..l3 + 4].copy_from_slice(&total.to_be_bytes());
        let sum = checksum::finish(self.sum + u32::from(ecn) + u32::from(total));
        head[l3 + 10..l3 + 12].copy_from_slice(&sum.to_be_bytes());
    }
}

#[inline(always)]
fn patch_udp(head: &mut [u8], at: usize, entropy: u16, udp_length: u16, vni: Vni) {
    head[at..at + 2].copy_from_slice(&entropy.to_be_bytes());
    head[at + 4..at + 6].copy_from_slice(&udp_length.to_be_bytes());
    // Its lowest byte is reserved.
    head[at + 12..at + 16].copy_from_slice(&(vni.number() << 8).to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn underlay() -> Underlay {
        Underlay {
            v4: Some(Ipv4Addr::new(192, 0, 2, 2)),
            v6: Some("2001:db8::2".parse().unwrap()),
            udp_port: 4789,
            ..Underlay::default()
        }
    }

    fn emitted(source: &str, destination: &str, inner: &[u8]) -> Vec<u8> {
        let macs = (MacAddr([2, 0, 0, 0, 0, 1]), MacAddr([2, 0, 0, 0, 0, 2]));
        let header = OuterHeader::new(macs, source.parse().unwrap(), destination.parse().unwrap(), 4789, None).unwrap();
        let mut packet = vec![0xaa; header.len()];
        packet.extend_from_slice(inner);
        let vni = Vni::try_from(0x12_3456).unwrap();
        header.emit(&mut packet, vni, u64::MAX, inner.len(), 1, || checksum::sum(inner));
        packet
    }

    #[test]
    fn what_is_emitted_is_parsed() {
        for (source, destination, header) in [("192.0.2.1", "192.0.2.2", 50), ("2001:db8::1", "2001:db8::2", 70)] {
            let packet = emitted(source, destination, &[7; 101]);
            let outer = parse_outer(&packet, packet.len(), &underlay()).unwrap();
            assert_eq!(outer.source, source.parse::<IpAddr>().unwrap());
            assert_eq!((outer.vni.number(), outer.header, outer.inner, outer.ecn), (0x12_3456, header, 101, 1));
        }
    }

    #[test]
    fn checksums_are_right() {
        let packet = emitted("192.0.2.1", "192.0.2.2", &[7; 101]);
        assert_eq!(checksum::fold(checksum::sum(&packet[14..34])), 0xffff);
        assert_eq!(packet[40..42], [0, 0], "no UDP checksum over IPv4");
        let packet = emitted("2001:db8::1", "2001:db8::2", &[7; 101]);
        let (source, destination) = ("2001:db8::1".parse().unwrap(), "2001:db8::2".parse().unwrap());
        let pseudo = checksum::pseudo_v6(source, destination, 17, (packet.len() - 54) as u32);
        assert_eq!(checksum::fold(pseudo + checksum::sum(&packet[54..])), 0xffff);
    }

    #[test]
    fn what_is_not_ours_is_told_apart() {
        let good = emitted("192.0.2.1", "192.0.2.2", &[7; 60]);
        let parse = |packet: &[u8]| parse_outer(packet, packet.len(), &underlay()).unwrap_err();
        let with = |at: usize, value: u8| {
            let mut packet = good.clone();
            packet[at] = value;
            let sum = {
                packet[24..26].fill(0);
                checksum::finish(checksum::sum(&packet[14..34]))
            };
            packet[24..26].copy_from_slice(&sum.to_be_bytes());
            packet
        };
        assert_eq!(parse(&with(33, 3)), DropReason::NotVxlan, "another address");
        assert_eq!(parse(&with(37, 1)), DropReason::NotVxlan, "another port");
        assert_eq!(parse(&with(23, 6)), DropReason::NotVxlan, "TCP");
        assert_eq!(parse(&with(20, 0x20)), DropReason::NotVxlan, "a fragment");
        assert_eq!(parse(&with(42, 0)), DropReason::BadVxlan, "no I flag");
        assert_eq!(parse(&with(39, 0)), DropReason::BadLength, "UDP too short");
        assert_eq!(parse(&with(17, 0xff)), DropReason::BadLength, "IP too long");
        assert_eq!(parse(&with(14, 0x44)), DropReason::Malformed, "IHL of 16");
        let mut bad = good.clone();
        bad[22] ^= 1;
        assert_eq!(parse(&bad), DropReason::BadIpChecksum);
        for length in 0..50 {
            assert_eq!(parse(&good[..length]), DropReason::Truncated, "{length}");
        }
    }
}
