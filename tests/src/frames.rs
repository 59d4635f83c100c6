//! Frames for tests, written with smoltcp's wire types so that another implementation than ours makes them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr, Icmpv6Packet,
    Icmpv6Repr, IpProtocol, Ipv4Packet, Ipv4Repr, Ipv6Packet, Ipv6Repr, NdiscRepr, UdpPacket, UdpRepr,
};
use vswitch_net::MacAddr;

/// Both ends of a frame.
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    /// Sender's MAC.
    pub from: MacAddr,
    /// Receiver's MAC.
    pub to: MacAddr,
}

/// A layer 4 header of a protocol, as it stands before its checksum.
#[derive(Clone, Copy, Debug)]
pub enum Layer4 {
    /// TCP: flags, sequence number, acknowledgement.
    Tcp {
        /// FIN 1, SYN 2, RST 4, PSH 8, ACK 16.
        flags: u8,
        /// Sequence number.
        seq: u32,
        /// Acknowledgement number.
        ack: u32,
    },
    /// UDP.
    Udp,
    /// SCTP, with the type of the first chunk.
    Sctp(u8),
    /// ICMP or ICMPv6: type, code; the ports are identifier and sequence number.
    Icmp(u8, u8),
}

/// An IP packet of any of these protocols, checksums right.
pub fn packet(
    ends: Ends,
    source: &str,
    destination: &str,
    ports: (u16, u16),
    layer4: Layer4,
    payload: &[u8],
) -> Vec<u8> {
    let addresses: (IpAddr, IpAddr) = (source.parse().expect("address"), destination.parse().expect("address"));
    let is_v6 = addresses.0.is_ipv6();
    let [s, d] = [ports.0.to_be_bytes(), ports.1.to_be_bytes()];
    let mut body: Vec<u8> = vec![s[0], s[1], d[0], d[1]];
    let (protocol, sum_at) = match layer4 {
        Layer4::Tcp { flags, seq, ack } => {
            body.extend(seq.to_be_bytes());
            body.extend(ack.to_be_bytes());
            // Of a SYN, the option that says how windows are scaled.
            let has_option = flags & 2 != 0;
            body.extend([if has_option { 0x60 } else { 0x50 }, flags, 0xff, 0xff, 0, 0, 0, 0]);
            if has_option {
                body.extend([3, 3, 7, 0]);
            }
            (6, Some(16))
        }
        Layer4::Udp => {
            body.extend((8 + payload.len() as u16).to_be_bytes());
            body.extend([0, 0]);
            (17, Some(6))
        }
        Layer4::Sctp(chunk) => {
            body.extend([0, 0, 0, 1, 0, 0, 0, 0, chunk, 0, 0, 4]);
            (132, None)
        }
        Layer4::Icmp(kind, code) => {
            body.splice(0..0, [kind, code, 0, 0]);
            (if is_v6 { 58 } else { 1 }, Some(2))
        }
    };
    body.extend(payload);
    let pseudo = match addresses {
        (IpAddr::V4(from), IpAddr::V4(to)) if protocol != 1 => {
            let mut sum = vswitch_net::checksum::sum(&from.octets()) + vswitch_net::checksum::sum(&to.octets());
            sum += u32::from(protocol) + body.len() as u32;
            sum
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => vswitch_net::checksum::pseudo_v6(from, to, protocol, body.len() as u32),
        _ => 0,
    };
    if let Some(at) = sum_at {
        let sum = vswitch_net::checksum::finish(pseudo + vswitch_net::checksum::sum(&body));
        body[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    }
    if protocol == 132 {
        let sum = crc32c(&body);
        body[8..12].copy_from_slice(&sum.to_le_bytes());
    }
    let caps = ChecksumCapabilities::default();
    match addresses {
        (IpAddr::V4(src_addr), IpAddr::V4(dst_addr)) => {
            let next_header = IpProtocol::from(protocol);
            let ip = Ipv4Repr { src_addr, dst_addr, next_header, payload_len: body.len(), hop_limit: 64 };
            let mut bytes = ethernet(ends, EthernetProtocol::Ipv4, 20 + body.len());
            ip.emit(&mut Ipv4Packet::new_unchecked(&mut bytes[14..]), &caps);
            bytes[34..].copy_from_slice(&body);
            bytes
        }
        (IpAddr::V6(src_addr), IpAddr::V6(dst_addr)) => {
            let next_header = IpProtocol::from(protocol);
            let ip = Ipv6Repr { src_addr, dst_addr, next_header, payload_len: body.len(), hop_limit: 64 };
            let mut bytes = ethernet(ends, EthernetProtocol::Ipv6, 40 + body.len());
            ip.emit(&mut Ipv6Packet::new_unchecked(&mut bytes[14..]));
            bytes[54..].copy_from_slice(&body);
            bytes
        }
        _ => panic!("two families"),
    }
}

/// One part of a frame's IPv4 packet: the bytes `from..to` of what is behind its header.
pub fn cut(whole: &[u8], from: usize, to: usize, id: u16) -> Vec<u8> {
    let to = to.min(whole.len() - 34);
    let mut part = whole[..34].to_vec();
    part.extend_from_slice(&whole[34 + from..34 + to]);
    part[16..18].copy_from_slice(&((20 + to - from) as u16).to_be_bytes());
    part[18..20].copy_from_slice(&id.to_be_bytes());
    let more = if 34 + to < whole.len() { 0x2000 } else { 0 };
    part[20..22].copy_from_slice(&((from / 8) as u16 | more).to_be_bytes());
    part[24..26].fill(0);
    let sum = vswitch_net::checksum::finish(vswitch_net::checksum::sum(&part[14..34]));
    part[24..26].copy_from_slice(&sum.to_be_bytes());
    part
}

/// SCTP's checksum the obvious way (RFC 9260 appendix A), bit by bit.
pub fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 })
    })
}

/// A UDP datagram from port 1000 to 2000, of IPv4 or IPv6 as the addresses are.
pub fn udp(ends: Ends, source: &str, destination: &str, payload: &[u8]) -> Vec<u8> {
    udp_with(ends, source, destination, (1000, 2000), 64, payload)
}

/// A UDP datagram.
pub fn udp_with(ends: Ends, source: &str, destination: &str, ports: (u16, u16), ttl: u8, payload: &[u8]) -> Vec<u8> {
    let udp = UdpRepr { src_port: ports.0, dst_port: ports.1 };
    let length = 8 + payload.len();
    let caps = ChecksumCapabilities::default();
    let pair = (source.parse().expect("address"), destination.parse().expect("address"));
    match pair {
        (IpAddr::V4(src_addr), IpAddr::V4(dst_addr)) => {
            let ip = Ipv4Repr { src_addr, dst_addr, next_header: IpProtocol::Udp, payload_len: length, hop_limit: ttl };
            let mut bytes = ethernet(ends, EthernetProtocol::Ipv4, 20 + length);
            let mut packet = Ipv4Packet::new_unchecked(&mut bytes[14..]);
            ip.emit(&mut packet, &caps);
            let mut datagram = UdpPacket::new_unchecked(packet.payload_mut());
            udp.emit(
                &mut datagram,
                &src_addr.into(),
                &dst_addr.into(),
                payload.len(),
                |to| to.copy_from_slice(payload),
                &caps,
            );
            bytes
        }
        (IpAddr::V6(src_addr), IpAddr::V6(dst_addr)) => {
            let ip = Ipv6Repr { src_addr, dst_addr, next_header: IpProtocol::Udp, payload_len: length, hop_limit: ttl };
            let mut bytes = ethernet(ends, EthernetProtocol::Ipv6, 40 + length);
            let mut packet = Ipv6Packet::new_unchecked(&mut bytes[14..]);
            ip.emit(&mut packet);
            let mut datagram = UdpPacket::new_unchecked(packet.payload_mut());
            udp.emit(
                &mut datagram,
                &src_addr.into(),
                &dst_addr.into(),
                payload.len(),
                |to| to.copy_from_slice(payload),
                &caps,
            );
            bytes
        }
        _ => panic!("two families"),
    }
}

/// An ARP request.
pub fn arp_request(from: MacAddr, sender: &str, target: &str) -> Vec<u8> {
    let arp = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr: EthernetAddress(from.0),
        source_protocol_addr: sender.parse::<Ipv4Addr>().expect("address"),
        target_hardware_addr: EthernetAddress([0; 6]),
        target_protocol_addr: target.parse::<Ipv4Addr>().expect("address"),
    };
    let mut bytes = ethernet(Ends { from, to: MacAddr::BROADCAST }, EthernetProtocol::Arp, 28);
    arp.emit(&mut ArpPacket::new_unchecked(&mut bytes[14..]));
    bytes
}

/// A neighbor solicitation, without the source's link-layer address option.
pub fn neighbor_solicitation(from: MacAddr, source: &str, target: &str) -> Vec<u8> {
    let target: Ipv6Addr = target.parse().expect("address");
    let source: Ipv6Addr = source.parse().expect("address");
    let octets = target.octets();
    let destination = Ipv6Addr::new(
        0xff02,
        0,
        0,
        0,
        0,
        1,
        0xff00 | u16::from(octets[13]),
        u16::from_be_bytes([octets[14], octets[15]]),
    );
    let to = MacAddr([0x33, 0x33, 0xff, octets[13], octets[14], octets[15]]);
    let icmp = Icmpv6Repr::Ndisc(NdiscRepr::NeighborSolicit { target_addr: target, lladdr: None });
    let ip = Ipv6Repr {
        src_addr: source,
        dst_addr: destination,
        next_header: IpProtocol::Icmpv6,
        payload_len: icmp.buffer_len(),
        hop_limit: 255,
    };
    let mut bytes = ethernet(Ends { from, to }, EthernetProtocol::Ipv6, 40 + icmp.buffer_len());
    let mut packet = Ipv6Packet::new_unchecked(&mut bytes[14..]);
    ip.emit(&mut packet);
    let mut message = Icmpv6Packet::new_unchecked(packet.payload_mut());
    icmp.emit(&source, &destination, &mut message, &ChecksumCapabilities::default());
    bytes
}

/// A neighbor advertisement.
pub fn neighbor_advertisement(ends: Ends, source: &str, destination: &str, target: &str) -> Vec<u8> {
    let (source, destination): (Ipv6Addr, Ipv6Addr) =
        (source.parse().expect("address"), destination.parse().expect("address"));
    let icmp = Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert {
        flags: smoltcp::wire::NdiscNeighborFlags::OVERRIDE,
        target_addr: target.parse().expect("address"),
        lladdr: Some(smoltcp::wire::HardwareAddress::Ethernet(EthernetAddress(ends.from.0)).into()),
    });
    let ip = Ipv6Repr {
        src_addr: source,
        dst_addr: destination,
        next_header: IpProtocol::Icmpv6,
        payload_len: icmp.buffer_len(),
        hop_limit: 255,
    };
    let mut bytes = ethernet(ends, EthernetProtocol::Ipv6, 40 + icmp.buffer_len());
    let mut packet = Ipv6Packet::new_unchecked(&mut bytes[14..]);
    ip.emit(&mut packet);
    let mut message = Icmpv6Packet::new_unchecked(packet.payload_mut());
    icmp.emit(&source, &destination, &mut message, &ChecksumCapabilities::default());
    bytes
}

/// A frame whose UDP or TCP checksum is left to the device, as Linux leaves it: the field holds the pseudo-header's sum.
pub fn partial(mut frame: Vec<u8>) -> Vec<u8> {
    use vswitch_net::checksum;
    let (l4, protocol, pseudo) = if frame[12..14] == [8, 0] {
        let length = (frame.len() - 34) as u32;
        (34, frame[23], checksum::sum(&frame[26..34]) + length)
    } else {
        let length = (frame.len() - 54) as u32;
        (54, frame[20], checksum::sum(&frame[22..54]) + length)
    };
    let field = l4 + if protocol == 17 { 6 } else { 16 };
    let sum = checksum::fold(pseudo + u32::from(protocol));
    frame[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    frame
}

/// True if IP and UDP checksums are right, as smoltcp sees it.
pub fn is_valid_udp(frame: &[u8]) -> bool {
    let Ok(ethernet) = EthernetFrame::new_checked(frame) else { return false };
    match ethernet.ethertype() {
        EthernetProtocol::Ipv4 => Ipv4Packet::new_checked(ethernet.payload()).is_ok_and(|ip| {
            let ends = (ip.src_addr().into(), ip.dst_addr().into());
            ip.verify_checksum()
                && UdpPacket::new_checked(ip.payload()).is_ok_and(|udp| udp.verify_checksum(&ends.0, &ends.1))
        }),
        EthernetProtocol::Ipv6 => Ipv6Packet::new_checked(ethernet.payload()).is_ok_and(|ip| {
            let ends = (ip.src_addr().into(), ip.dst_addr().into());
            UdpPacket::new_checked(ip.payload()).is_ok_and(|udp| udp.verify_checksum(&ends.0, &ends.1))
        }),
        _ => false,
    }
}

fn ethernet(ends: Ends, ethertype: EthernetProtocol, payload: usize) -> Vec<u8> {
    let mut bytes = vec![0; 14 + payload];
    let repr = EthernetRepr { src_addr: EthernetAddress(ends.from.0), dst_addr: EthernetAddress(ends.to.0), ethertype };
    repr.emit(&mut EthernetFrame::new_unchecked(&mut bytes[..]));
    bytes
}
