//! The switch's own answers: who has the gateway's address, or a station's that it knows.
//!
//! A request is turned into its answer in place and goes back out of the port it came from. Built with smoltcp's wire
//! types: this is not the hot path.

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr, HardwareAddress,
    Icmpv6Packet, Icmpv6Repr, IpProtocol, Ipv6Address, Ipv6Packet, Ipv6Repr, NdiscNeighborFlags, NdiscRepr,
};
use vswitch_net::MacAddr;
use vswitch_xsk::Packet;

use crate::meta::{Kind, Meta};
use crate::verdict::DropReason;

/// All nodes of the link (RFC 4291 section 2.7.1).
const ALL_NODES: Ipv6Address = Ipv6Address::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// Turns an ARP request or a neighbor solicitation into the answer of the station that it asks for.
///
/// # Errors
///
/// The reason to drop it, if it is not what [`decide`](crate::decide) took it for.
pub(crate) fn answer(packet: &mut Packet, meta: &Meta, station: Station) -> Result<(), DropReason> {
    if packet.frames() > 1 {
        return Err(DropReason::Malformed);
    }
    match meta.kind {
        Kind::Arp => answer_arp(packet, station),
        _ => answer_solicitation(packet, station),
    }
}

/// Who is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Station {
    pub(crate) mac: MacAddr,
    pub(crate) is_router: bool,
}

fn answer_arp(packet: &mut Packet, station: Station) -> Result<(), DropReason> {
    let request = packet.head().data().get(EthernetFrame::<&[u8]>::header_len()..).ok_or(DropReason::Truncated)?;
    let request =
        ArpPacket::new_checked(request).and_then(|arp| ArpRepr::parse(&arp)).map_err(|_| DropReason::Malformed)?;
    let ArpRepr::EthernetIpv4 { source_hardware_addr, source_protocol_addr, target_protocol_addr, .. } = request else {
        return Err(DropReason::Malformed);
    };
    let reply = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr: ethernet(station.mac),
        source_protocol_addr: target_protocol_addr,
        target_hardware_addr: source_hardware_addr,
        target_protocol_addr: source_protocol_addr,
    };
    let frame = EthernetRepr {
        src_addr: ethernet(station.mac),
        dst_addr: source_hardware_addr,
        ethertype: EthernetProtocol::Arp,
    };
    let bytes = resize(packet, frame.buffer_len() + reply.buffer_len())?;
    let mut out = EthernetFrame::new_unchecked(bytes);
    frame.emit(&mut out);
    reply.emit(&mut ArpPacket::new_unchecked(out.payload_mut()));
    Ok(())
}

fn answer_solicitation(packet: &mut Packet, station: Station) -> Result<(), DropReason> {
    let checksums = ChecksumCapabilities::default();
    let malformed = |_| DropReason::Malformed;
    let request = EthernetFrame::new_checked(packet.head().data()).map_err(malformed)?;
    let asker = request.src_addr();
    let ip = Ipv6Packet::new_checked(request.payload()).map_err(malformed)?;
    let (source, destination) = (ip.src_addr(), ip.dst_addr());
    let icmp = Icmpv6Packet::new_checked(ip.payload()).map_err(malformed)?;
    let Ok(Icmpv6Repr::Ndisc(NdiscRepr::NeighborSolicit { target_addr, .. })) =
        Icmpv6Repr::parse(&source, &destination, &icmp, &checksums)
    else {
        return Err(DropReason::Malformed);
    };
    // RFC 4861 section 7.2.4: the answer to an unspecified source goes to all nodes, unsolicited.
    let (to, to_mac, solicited) = if source.is_unspecified() {
        (ALL_NODES, EthernetAddress([0x33, 0x33, 0, 0, 0, 1]), NdiscNeighborFlags::empty())
    } else {
        (source, asker, NdiscNeighborFlags::SOLICITED)
    };
    let mac = ethernet(station.mac);
    let router = if station.is_router { NdiscNeighborFlags::ROUTER } else { NdiscNeighborFlags::empty() };
    let advertisement = Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert {
        flags: router | NdiscNeighborFlags::OVERRIDE | solicited,
        target_addr,
        lladdr: Some(HardwareAddress::Ethernet(mac).into()),
    });
    let ip = Ipv6Repr {
        src_addr: target_addr,
        dst_addr: to,
        next_header: IpProtocol::Icmpv6,
        payload_len: advertisement.buffer_len(),
        hop_limit: 255,
    };
    let frame = EthernetRepr { src_addr: mac, dst_addr: to_mac, ethertype: EthernetProtocol::Ipv6 };
    let bytes = resize(packet, frame.buffer_len() + ip.buffer_len() + advertisement.buffer_len())?;
    let mut out = EthernetFrame::new_unchecked(bytes);
    frame.emit(&mut out);
    let mut out = Ipv6Packet::new_unchecked(out.payload_mut());
    ip.emit(&mut out);
    advertisement.emit(&ip.src_addr, &ip.dst_addr, &mut Icmpv6Packet::new_unchecked(out.payload_mut()), &checksums);
    Ok(())
}

fn resize(packet: &mut Packet, length: usize) -> Result<&mut [u8], DropReason> {
    if packet.head_mut().set_len(length) { Ok(packet.head_mut().data_mut()) } else { Err(DropReason::NoHeadroom) }
}

fn ethernet(mac: MacAddr) -> EthernetAddress {
    EthernetAddress(mac.0)
}
