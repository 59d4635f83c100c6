//! The way out: one plain loop a verdict, headers changed in place, packets queued on ports.
//!
//! A packet whose checksum is partial is handed to a pod with the request to complete it, and no byte is summed; on its
//! way to the wire it is completed here.

use vswitch_net::{MacAddr, NetworkIndex, PeerIndex, PortId, checksum};
use vswitch_xsk::{Packet, TxChecksum, Umem};

use crate::counters::Counters;
use crate::meta::{Checksum, Kind, Meta};
use crate::parse::UDP;
use crate::port::PortIo;
use crate::snapshot::{Network, PortKind, Snapshot};
use crate::verdict::{DropReason, Rewrite};
use crate::vxlan::ETHERNET;

/// A worker's ports and what egress needs beside them.
#[derive(Debug)]
pub(crate) struct Ports<P> {
    pub(crate) io: Vec<Option<P>>,
    /// Ports with packets under way, and for each port whether it is among them.
    pub(crate) busy: Vec<PortId>,
    pub(crate) is_busy: Vec<bool>,
}

/// Where packets go out: the ports, the umem that copies come from, and the counters.
pub(crate) struct Egress<'a, P> {
    pub(crate) ports: &'a mut Ports<P>,
    pub(crate) umem: &'a mut Umem,
    pub(crate) counters: &'a mut Counters,
    pub(crate) snapshot: &'a Snapshot,
}

impl<P: PortIo> Egress<'_, P> {
    /// Out of a port of this switch.
    #[inline]
    pub(crate) fn local(&mut self, mut packet: Packet, meta: &Meta, port: PortId, rewrite: Option<Rewrite>) {
        let Some(info) = self.snapshot.port(port) else {
            return self.drop(packet, meta.ingress, DropReason::NoPort);
        };
        if let PortKind::Access(access) = &info.kind
            && access.network != meta.network
        {
            return self.drop(packet, meta.ingress, DropReason::NoPort);
        }
        if packet.len() > info.mtu as usize + ETHERNET {
            return self.drop(packet, meta.ingress, DropReason::TooBigForPort);
        }
        if let Some(rewrite) = rewrite
            && let Err(reason) = apply(&mut packet, meta, &rewrite)
        {
            return self.drop(packet, meta.ingress, reason);
        }
        let request = match meta.checksum {
            Checksum::Complete => None,
            Checksum::Partial { offset } => Some(TxChecksum { start: meta.l4, offset }),
        };
        self.send(packet, meta.ingress, port, request);
    }

    /// Through VXLAN to a peer.
    #[inline]
    pub(crate) fn encap(
        &mut self,
        mut packet: Packet,
        meta: &Meta,
        peer: PeerIndex,
        network: NetworkIndex,
        rewrite: Option<Rewrite>,
    ) {
        match self.encapsulate(&mut packet, meta, peer, network, rewrite) {
            Ok(port) => self.send(packet, meta.ingress, port, None),
            Err(reason) => self.drop(packet, meta.ingress, reason),
        }
    }

    /// To every other port of the network and, if it did not come from the wire, to every peer of it.
    pub(crate) fn flood(&mut self, packet: Packet, meta: &Meta, network: &Network) {
        let mut receivers = 0;
        for &port in network.ports.iter().filter(|&&port| port != meta.ingress) {
            receivers += 1;
            if let Some(copy) = self.copy(&packet, meta.ingress) {
                self.local(copy, meta, port, None);
            }
        }
        if meta.peer.is_none() {
            for &peer in &network.flood_peers {
                receivers += 1;
                if let Some(copy) = self.copy(&packet, meta.ingress) {
                    self.encap(copy, meta, peer, meta.network, None);
                }
            }
        }
        if receivers == 0 {
            return self.drop(packet, meta.ingress, DropReason::NoReceiver);
        }
        // Every receiver had a copy of its own; the original is the one too many.
        if let Some(counters) = self.counters.port_mut(meta.ingress) {
            counters.copies -= 1;
        }
        self.umem.free_packet(packet);
    }

    /// Back out of the port it came from.
    pub(crate) fn reply(&mut self, packet: Packet, meta: &Meta) {
        self.send(packet, meta.ingress, meta.ingress, None);
    }

    /// Counts and frees a packet.
    pub(crate) fn drop(&mut self, packet: Packet, ingress: PortId, reason: DropReason) {
        self.counters.drop(ingress, reason);
        self.umem.free_packet(packet);
    }

    #[inline]
    fn send(&mut self, packet: Packet, ingress: PortId, port: PortId, request: Option<TxChecksum>) {
        let bytes = packet.len() as u64;
        let Some(Some(io)) = self.ports.io.get_mut(port.index()) else {
            return self.drop(packet, ingress, DropReason::NoPort);
        };
        if let Err(packet) = io.tx_push(self.umem, packet, request) {
            if let Some(counters) = self.counters.port_mut(port) {
                counters.tx_refused += 1;
            }
            self.ports.mark_busy(port);
            return self.drop(packet, ingress, DropReason::TxFull);
        }
        self.ports.mark_busy(port);
        if let Some(counters) = self.counters.port_mut(port) {
            counters.tx_packets += 1;
            counters.tx_bytes += bytes;
        }
    }

    #[inline]
    fn encapsulate(
        &mut self,
        packet: &mut Packet,
        meta: &Meta,
        peer: PeerIndex,
        network: NetworkIndex,
        rewrite: Option<Rewrite>,
    ) -> Result<PortId, DropReason> {
        let network = self.snapshot.network(network).ok_or(DropReason::UnknownVni)?;
        let peer = self.snapshot.peer(peer).ok_or(DropReason::NoNeighbor)?;
        let reach = peer.reach.as_ref().ok_or(DropReason::NoNeighbor)?;
        let (header, inner) = (&reach.header, packet.len());
        if inner + header.len() > reach.mtu as usize + ETHERNET {
            return Err(DropReason::TooBigForWire);
        }
        if let Some(rewrite) = rewrite {
            apply(packet, meta, &rewrite)?;
        }
        if let Checksum::Partial { offset } = meta.checksum {
            complete(packet, meta, offset, self.umem);
        }
        let ecn = ecn(packet.head().data(), meta);
        let inner_sum = if header.needs_udp_checksum() { sum_from(packet, 0, inner, self.umem) } else { 0 };
        if !packet.head_mut().push_front(header.len()) {
            return Err(DropReason::NoHeadroom);
        }
        header.emit(packet.head_mut().data_mut(), network.vni, meta.hash, inner, ecn, || inner_sum);
        Ok(reach.port)
    }

    /// A copy, counted; none, counted as dropped, if there are no frames.
    fn copy(&mut self, packet: &Packet, ingress: PortId) -> Option<Packet> {
        if let Some(counters) = self.counters.port_mut(ingress) {
            counters.copies += 1;
        }
        let copy = self.umem.copy_packet(packet);
        if copy.is_none() {
            self.counters.drop(ingress, DropReason::NoFrames);
        }
        copy
    }
}

impl<P: PortIo> Ports<P> {
    #[inline(always)]
    pub(crate) fn mark_busy(&mut self, port: PortId) {
        if let Some(is_busy) = self.is_busy.get_mut(port.index())
            && !*is_busy
        {
            *is_busy = true;
            self.busy.push(port);
        }
    }
}

/// Both MACs, and one hop less.
#[inline]
fn apply(packet: &mut Packet, meta: &Meta, rewrite: &Rewrite) -> Result<(), DropReason> {
    if meta.ttl <= 1 {
        return Err(DropReason::TtlExpired);
    }
    let head = packet.head_mut().data_mut();
    write_macs(head, rewrite.destination, rewrite.source);
    let ip = &mut head[usize::from(meta.l3)..];
    match meta.kind {
        Kind::V4 => {
            let old = u16::from_be_bytes([ip[8], ip[9]]);
            ip[8] -= 1;
            let sum = checksum::update(u16::from_be_bytes([ip[10], ip[11]]), old, u16::from_be_bytes([ip[8], ip[9]]));
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        Kind::V6 => ip[7] -= 1,
        Kind::Arp | Kind::Other => {}
    }
    Ok(())
}

#[inline(always)]
fn write_macs(head: &mut [u8], destination: MacAddr, source: MacAddr) {
    head[..6].copy_from_slice(&destination.0);
    head[6..12].copy_from_slice(&source.0);
}

/// The ECN bits of the inner packet, to be shown outside (RFC 6040 section 4.1, normal mode).
#[inline(always)]
fn ecn(head: &[u8], meta: &Meta) -> u8 {
    let second = head.get(usize::from(meta.l3) + 1).copied().unwrap_or(0);
    match meta.kind {
        Kind::V4 => second & 3,
        Kind::V6 => second >> 4 & 3,
        Kind::Arp | Kind::Other => 0,
    }
}

/// Completes a partial checksum: the field holds the pseudo-header's sum, the rest is layer 4 from its start.
fn complete(packet: &mut Packet, meta: &Meta, offset: u16, umem: &Umem) {
    let l4 = usize::from(meta.l4);
    let end = usize::from(meta.l3) + meta.l3_len as usize;
    let sum = sum_from(packet, l4, end, umem);
    let value = if meta.protocol == UDP { checksum::finish_udp(sum) } else { checksum::finish(sum) };
    let field = l4 + usize::from(offset);
    packet.head_mut().data_mut()[field..field + 2].copy_from_slice(&value.to_be_bytes());
}

/// Sums the bytes `from..to` of a packet over all its frames.
fn sum_from(packet: &Packet, from: usize, to: usize, umem: &Umem) -> u32 {
    let head = packet.head().data();
    let (first, mut at) = (&head[from.min(head.len())..to.min(head.len())], head.len());
    let mut total = u64::from(checksum::sum(first));
    let mut is_odd = first.len() % 2 == 1;
    for piece in umem.tail(packet) {
        if at >= to {
            break;
        }
        let piece = &piece[..piece.len().min(to - at)];
        let sum = checksum::fold(checksum::sum(piece));
        // A piece that starts at an odd byte has its words the other way round (RFC 1071 section 2 B).
        total += u64::from(if is_odd { sum.swap_bytes() } else { sum });
        is_odd ^= piece.len() % 2 == 1;
        at += piece.len();
    }
    // At most 18 pieces of 16 bits.
    total as u32
}
