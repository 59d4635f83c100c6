//! Packets to send: a few templates, written by etherparse, in which only ports and a time stamp change.

use std::net::IpAddr;
use std::ops::Range;

use anyhow::bail;
use etherparse::PacketBuilder;
use vswitch_net::{MacAddr, Vni, checksum};

/// Source ports in use before the next destination port.
pub(crate) const SOURCES: u32 = 60_000;

/// The lowest source port.
pub(crate) const FIRST_SOURCE: u16 = 1024;

/// What stands before a time stamp, as it lies in memory: `stamp.h`.
pub(crate) const STAMP: u64 = 0x0102_006e_6567_6b70;
const STAMP_BYTES: usize = 16;

const ETHERNET_IPV4: usize = 14 + 20;
const ETHERNET_IPV6: usize = 14 + 40;
const UDP: usize = 8;
const VXLAN: usize = 8;
const VXLAN_PORT: u16 = 4789;

/// Who sends what to whom.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ends {
    /// Source and destination.
    pub(crate) macs: (MacAddr, MacAddr),
    /// Source and destination.
    pub(crate) addresses: (IpAddr, IpAddr),
}

/// The shape of a packet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) ends: Ends,
    /// Destination port of the first flow.
    pub(crate) port: u16,
    /// Ethernet frame, without its check sequence; the outer one with VXLAN.
    pub(crate) size: usize,
    /// What it is encapsulated in.
    pub(crate) outer: Option<(Ends, Vni)>,
}

/// A packet, and where it changes.
#[derive(Clone, Debug)]
pub(crate) struct Template {
    /// All of it, with ports and the checksum over them zero.
    pub(crate) bytes: Vec<u8>,
    /// Destination port of the first flow.
    pub(crate) port: u16,
    /// Where the UDP header is.
    pub(crate) udp: usize,
    /// Where the outer UDP source port is.
    pub(crate) entropy: Option<usize>,
    /// Where a time stamp has room.
    pub(crate) stamp: Option<Range<usize>>,
    /// Sum of what the UDP checksum covers, in big-endian words.
    pub(crate) sum: u32,
}

impl Template {
    /// Writes a packet of this shape.
    pub(crate) fn new(shape: &Shape) -> anyhow::Result<Template> {
        let (outer, mut bytes) = match shape.outer {
            None => (0, Vec::with_capacity(shape.size)),
            Some((ends, vni)) => {
                let mut bytes = udp(ends, 0, VXLAN_PORT, shape.size)?;
                let start = headers(ends.addresses.0);
                // Over IPv4 there is none (RFC 7348 section 5); over IPv6 nothing else may follow, so none either
                // (RFC 6935).
                bytes[start - 2..start].fill(0);
                bytes[start] = 0x08;
                bytes[start + 4..start + 7].copy_from_slice(&vni.number().to_be_bytes()[1..]);
                (start + VXLAN, bytes)
            }
        };
        let start = outer + headers(shape.ends.addresses.0);
        if shape.size < start {
            bail!("--size {} is smaller than the headers: at least {start}", shape.size);
        }
        bytes.truncate(outer);
        bytes.extend(udp(shape.ends, 0, 0, shape.size - outer)?);
        let udp = start - UDP;
        let sum = !u16::from_be_bytes([bytes[udp + 6], bytes[udp + 7]]);
        bytes[udp + 6..udp + 8].fill(0);
        Ok(Template {
            udp,
            port: shape.port,
            entropy: shape.outer.map(|(ends, _)| headers(ends.addresses.0) - UDP),
            stamp: (shape.size >= start + STAMP_BYTES).then_some(start..start + STAMP_BYTES),
            sum: u32::from(sum),
            bytes,
        })
    }

    /// Makes `packet`, a copy of the template's bytes, one of a flow, with the time it is sent if that is to be measured.
    pub(crate) fn patch(&self, packet: &mut [u8], flow: u32, sent_ns: Option<u64>) {
        let source = FIRST_SOURCE + (flow % SOURCES) as u16;
        let destination = self.port.wrapping_add((flow / SOURCES) as u16);
        let mut sum = self.sum + u32::from(source) + u32::from(destination);
        if let (Some(place), Some(sent_ns)) = (&self.stamp, sent_ns) {
            let place = &mut packet[place.clone()];
            place[..8].copy_from_slice(&STAMP.to_ne_bytes());
            place[8..].copy_from_slice(&sent_ns.to_ne_bytes());
            sum += checksum::sum(place);
        }
        let udp = &mut packet[self.udp..];
        udp[..2].copy_from_slice(&source.to_be_bytes());
        udp[2..4].copy_from_slice(&destination.to_be_bytes());
        udp[6..8].copy_from_slice(&checksum::finish_udp(sum).to_be_bytes());
        if let Some(entropy) = self.entropy {
            packet[entropy..entropy + 2].copy_from_slice(&(0xc000 | (flow & 0x3fff) as u16).to_be_bytes());
        }
    }
}

/// The time stamp of a received packet, if it has one.
pub(crate) fn stamp_of(packet: &[u8]) -> Option<u64> {
    let start = match packet.get(12..14)? {
        [0x08, 0x00] => ETHERNET_IPV4 + UDP,
        [0x86, 0xdd] => ETHERNET_IPV6 + UDP,
        _ => return None,
    };
    let (magic, rest) = packet.get(start..)?.split_first_chunk()?;
    (u64::from_ne_bytes(*magic) == STAMP).then(|| rest.first_chunk().map(|sent| u64::from_ne_bytes(*sent)))?
}

/// Bytes up to the end of the UDP header.
fn headers(address: IpAddr) -> usize {
    if address.is_ipv4() { ETHERNET_IPV4 + UDP } else { ETHERNET_IPV6 + UDP }
}

/// A UDP packet with a payload of zeros.
fn udp(ends: Ends, source: u16, destination: u16, size: usize) -> anyhow::Result<Vec<u8>> {
    let start = PacketBuilder::ethernet2(ends.macs.0.0, ends.macs.1.0);
    let ip = match ends.addresses {
        (IpAddr::V4(source), IpAddr::V4(destination)) => start.ipv4(source.octets(), destination.octets(), 64),
        (IpAddr::V6(source), IpAddr::V6(destination)) => start.ipv6(source.octets(), destination.octets(), 64),
        _ => bail!("source and destination are of two families: name two of one"),
    };
    let headers = headers(ends.addresses.0);
    let Some(payload) = size.checked_sub(headers) else {
        bail!("--size {size} is smaller than the headers: at least {headers}");
    };
    let mut bytes = Vec::with_capacity(size);
    ip.udp(source, destination).write(&mut bytes, &vec![0; payload])?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{SlicedPacket, TransportSlice};

    fn ends(source: &str, destination: &str) -> Ends {
        Ends {
            macs: (MacAddr([2; 6]), MacAddr([4; 6])),
            addresses: (source.parse().unwrap(), destination.parse().unwrap()),
        }
    }

    fn shape(source: &str, destination: &str, size: usize) -> Shape {
        Shape { ends: ends(source, destination), port: 9, size, outer: None }
    }

    /// The ports of a packet whose checksum is right.
    fn ports(packet: &[u8]) -> (u16, u16) {
        let sliced = SlicedPacket::from_ethernet(packet).unwrap();
        let Some(TransportSlice::Udp(udp)) = sliced.transport else { panic!("no UDP") };
        let sum = match sliced.net.unwrap() {
            etherparse::NetSlice::Ipv4(ip) => {
                udp.to_header().calc_checksum_ipv4(&ip.header().to_header(), udp.payload())
            }
            etherparse::NetSlice::Ipv6(ip) => {
                udp.to_header().calc_checksum_ipv6(&ip.header().to_header(), udp.payload())
            }
            etherparse::NetSlice::Arp(_) => panic!("ARP"),
        };
        assert_eq!(udp.checksum(), sum.unwrap());
        (udp.source_port(), udp.destination_port())
    }

    #[test]
    fn every_flow_has_ports_of_its_own_and_a_right_checksum() {
        for (source, destination, size) in [("10.0.0.1", "10.0.0.2", 64), ("fd00::1", "fd00::2", 1400)] {
            let template = Template::new(&shape(source, destination, size)).unwrap();
            assert_eq!(template.bytes.len(), size);
            let mut seen = std::collections::HashSet::new();
            for flow in [0, 1, SOURCES - 1, SOURCES, 999_999] {
                let mut packet = template.bytes.clone();
                template.patch(&mut packet, flow, None);
                assert!(seen.insert(ports(&packet)), "{flow}");
                assert_eq!(stamp_of(&packet), None);
                if size > 80 {
                    template.patch(&mut packet, flow, Some(0x1234_5678_9abc));
                    ports(&packet);
                    assert_eq!(stamp_of(&packet), Some(0x1234_5678_9abc));
                }
            }
        }
    }

    #[test]
    fn vxlan_carries_a_whole_packet() {
        let outer = (ends("192.0.2.1", "192.0.2.2"), Vni::try_from(7).unwrap());
        let template = Template::new(&Shape { outer: Some(outer), ..shape("10.0.0.1", "10.0.0.2", 114) }).unwrap();
        let mut packet = template.bytes.clone();
        template.patch(&mut packet, 5, None);
        assert_eq!(packet.len(), 114);
        assert_eq!(packet[36..38], VXLAN_PORT.to_be_bytes());
        assert_eq!(packet[42..50], [8, 0, 0, 0, 0, 0, 7, 0]);
        assert_eq!(ports(&packet[50..]), (FIRST_SOURCE + 5, 9));
        assert_eq!(packet[34..36], (0xc000_u16 + 5).to_be_bytes());
    }

    #[test]
    fn what_does_not_fit_is_said() {
        assert!(Template::new(&shape("10.0.0.1", "10.0.0.2", 41)).is_err());
        assert!(Template::new(&shape("10.0.0.1", "fd00::2", 80)).is_err());
    }
}
