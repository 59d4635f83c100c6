//! The way out: one plain loop a verdict, headers changed in place, packets queued on ports.
//!
//! A packet whose checksum is partial is handed to a pod with the request to complete it, and no byte is summed; on its
//! way to the wire it is completed here.

use std::net::IpAddr;

use vswitch_net::{MacAddr, NetworkIndex, PeerIndex, PortId, checksum};
use vswitch_xsk::{Packet, TxChecksum, Umem};

use crate::bucket::Bucket;
use crate::counters::Counters;
use crate::icmp::{self, Speaker};
use crate::intact::is_intact;
use crate::meta::{Checksum, Kind, Meta};
use crate::offload::{NoFrame, Segments};
use crate::parse::{TCP, UDP};
use crate::port::PortIo;
use crate::segment;
use crate::shape::{Held, Queue, Shaped, may_wait};
use crate::snapshot::{Access, NetworkMode, Path, Port, PortKind, Snapshot};
use crate::table::route::NextHop;
use crate::translate::{Translation, translate};
use crate::verdict::{DropReason, Rewrite};
use crate::vxlan::{ETHERNET, ETHERTYPE_VLAN, TAG};

/// A worker's ports and what egress needs beside them.
#[derive(Debug)]
pub(crate) struct Ports<P> {
    pub(crate) io: Vec<Option<P>>,
    /// Ports with packets under way, and for each port what it has.
    pub(crate) busy: Vec<PortId>,
    pub(crate) under_way: Vec<UnderWay>,
}

/// What a port has under way to the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum UnderWay {
    #[default]
    Nothing,
    /// Only what the kernel did not take in an earlier turn, copies of what goes to many, or words of the switch's own.
    Left,
    /// Something of this turn for this port.
    New,
}

/// Where packets go out: the ports, the umem that copies come from, and the counters.
pub(crate) struct Egress<'a, P> {
    pub(crate) ports: &'a mut Ports<P>,
    pub(crate) umem: &'a mut Umem,
    pub(crate) counters: &'a mut Counters,
    pub(crate) snapshot: &'a Snapshot,
    pub(crate) scratch: &'a mut Scratch,
    pub(crate) now_ns: u64,
    /// True while what goes out is no reason to speak to anybody: copies, and packets of the switch's own.
    pub(crate) is_quiet: bool,
}

/// Room to build packets in. Taken once, so that nothing is allocated a packet.
#[derive(Debug)]
pub(crate) struct Scratch {
    /// A packet, all frames in a row.
    pub(crate) whole: Vec<u8>,
    /// One that is made of it.
    pub(crate) part: Vec<u8>,
    /// How many ICMP errors each port may still cause, by port.
    pub(crate) errors: Vec<Bucket>,
    /// Packets that wait to be sent to a port with a rate, by port.
    pub(crate) to: Vec<Queue>,
}

/// What is written into a packet on its way out.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Edit<'a> {
    /// Of a routed packet: both MAC addresses, and one hop less.
    pub(crate) rewrite: Option<&'a Rewrite>,
    /// Other addresses and ports.
    pub(crate) translation: Option<&'a Translation>,
}

impl Edit<'_> {
    pub(crate) const NONE: Edit<'static> = Edit { rewrite: None, translation: None };
}

impl<P: PortIo> Egress<'_, P> {
    /// Out of a port of this switch.
    pub(crate) fn local(&mut self, mut packet: Packet, meta: &Meta, port: PortId, edit: Edit<'_>) {
        match self.prepare(&mut packet, meta, port, edit) {
            Ok(l4) => self.send_local(packet, meta, port, l4),
            Err(reason) => self.refuse_local(packet, meta, port, reason, edit),
        }
    }

    /// Out of a port of this switch, once it is [prepared](Self::prepare).
    #[inline]
    pub(crate) fn send_local(&mut self, packet: Packet, meta: &Meta, port: PortId, l4: u16) {
        let Some(info) = self.snapshot.port(port) else {
            return self.drop(packet, meta.ingress, DropReason::NoPort);
        };
        let request = match meta.checksum {
            Checksum::Complete => None,
            Checksum::Partial { offset } => Some(TxChecksum { start: l4, offset }),
        };
        if !info.mirrors_to.is_empty() {
            self.mirror_to(&packet, meta, &info.mirrors_to, l4);
        }
        match info.limits.as_ref().and_then(|limits| limits.to.as_ref()) {
            None => self.send(packet, meta.ingress, port, request),
            Some(limit) => self.shape(packet, meta.ingress, port, limit, request),
        }
    }

    /// Takes a packet that could not be prepared for a port to its end.
    #[cold]
    #[inline(never)]
    pub(crate) fn refuse_local(
        &mut self,
        packet: Packet,
        meta: &Meta,
        port: PortId,
        reason: DropReason,
        edit: Edit<'_>,
    ) {
        let most = |port: &Port| if meta.protocol == TCP { port.tcp_mtu } else { port.mtu };
        let mtu = self.snapshot.port(port).map_or(0, most);
        let again = |egress: &mut Self, part: Packet, meta: &Meta| egress.local(part, meta, port, edit);
        self.refuse(packet, meta, reason, mtu, again);
    }

    /// Through VXLAN to a peer, or straight to it.
    pub(crate) fn encap(
        &mut self,
        mut packet: Packet,
        meta: &Meta,
        peer: PeerIndex,
        network: NetworkIndex,
        edit: Edit<'_>,
    ) {
        match self.encapsulate(&mut packet, meta, peer, network, edit) {
            Ok(port) => self.send(packet, meta.ingress, port, None),
            Err(reason) => self.refuse_encap(packet, meta, (peer, network), reason, edit),
        }
    }

    /// Takes a packet that could not be encapsulated to its end.
    #[cold]
    #[inline(never)]
    pub(crate) fn refuse_encap(
        &mut self,
        packet: Packet,
        meta: &Meta,
        (peer, network): (PeerIndex, NetworkIndex),
        reason: DropReason,
        edit: Edit<'_>,
    ) {
        let mtu = self.mtu_to(peer, network, meta.hash);
        let again = |egress: &mut Self, part: Packet, meta: &Meta| egress.encap(part, meta, peer, network, edit);
        self.refuse(packet, meta, reason, mtu, again);
    }

    /// Back to where the packet of `meta` came from: the port, the peer, or the peer behind an address of the underlay.
    pub(crate) fn back(&mut self, packet: Packet, meta: &Meta) {
        let came_from = match meta.peer {
            Some(peer) => Some(peer),
            None if self.snapshot.access(meta.ingress).is_some() => None,
            None => match meta.addresses().and_then(|(source, _)| self.snapshot.routes.lookup(meta.network, source)) {
                Some(NextHop::Peer(peer)) => Some(peer),
                _ => return self.drop(packet, meta.ingress, DropReason::NotDirect),
            },
        };
        match came_from {
            Some(peer) => self.encap(packet, meta, peer, meta.network, Edit::NONE),
            None => self.local(packet, meta, meta.ingress, Edit::NONE),
        }
    }

    /// A packet that goes no further. Where a router must say so, it does (RFC 1812 section 4.3); and what is too big and
    /// may be cut, as TCP always may, is cut, each piece going on by `again`.
    pub(crate) fn refuse(
        &mut self,
        mut packet: Packet,
        meta: &Meta,
        reason: DropReason,
        mtu: u32,
        again: impl Fn(&mut Self, Packet, &Meta),
    ) {
        let is_too_big = matches!(reason, DropReason::TooBigForWire | DropReason::TooBigForPort);
        if is_too_big && let Some(segments) = Segments::of(&packet, meta, mtu as usize) {
            return self.segment(packet, meta, segments, again);
        }
        if is_too_big && segment::may_fragment(meta, packet.head().data()) {
            return self.fragment(packet, meta, mtu as usize, again);
        }
        if !self.is_quiet
            && icmp::may_answer(reason, meta, packet.head().data())
            && let Some(speaker) = self.speaker(meta, reason)
            && self.may_speak(meta.ingress)
        {
            if let Checksum::Partial { offset } = meta.checksum {
                // The sender gets its packet quoted as the wire would have carried it.
                complete(&mut packet, meta, offset, self.umem);
            }
            self.speak(&packet, meta, reason, mtu, speaker);
        }
        self.drop(packet, meta.ingress, reason);
    }

    /// Takes one from the errors that a port may cause.
    fn may_speak(&mut self, ingress: PortId) -> bool {
        let may = self.scratch.errors.get(ingress.index()).is_some_and(|bucket| bucket.take(self.now_ns, 1));
        if may {
            self.counters.errors_sent += 1;
        } else {
            self.counters.errors_held += 1;
        }
        may
    }

    fn speak(&mut self, packet: &Packet, meta: &Meta, reason: DropReason, mtu: u32, speaker: Speaker) {
        let mut message = std::mem::take(&mut self.scratch.part);
        if icmp::error(reason, meta, packet.head().data(), mtu, speaker, &mut message) {
            if let Some(counters) = self.counters.port_mut(meta.ingress) {
                counters.copies += 1;
            }
            match self.umem.packet_from(&message) {
                Some(answer) => self.back(answer, &icmp::meta_of_error(meta, message.len())),
                None => self.counters.drop(meta.ingress, DropReason::NoFrames),
            }
        }
        self.scratch.part = message;
    }

    /// As whom the switch speaks to the sender of a packet. In a routed network it is a router with an address of its own;
    /// in a bridged one it has none, and says only what size would pass, as the destination.
    fn speaker(&self, meta: &Meta, reason: DropReason) -> Option<Speaker> {
        let network = self.snapshot.network(meta.network)?;
        match network.mode {
            NetworkMode::Routed(gateway) => {
                let is_here = self.snapshot.access(meta.ingress).is_some();
                let is_host = is_here && !self.snapshot.is_pod(meta.ingress);
                let address = match meta.kind {
                    // The node's own address in the network is the host's, which believes nothing that comes from itself, nor
                    // from where it has no route to.
                    Kind::V4 if is_host => meta.addresses().map(|(_, destination)| destination),
                    Kind::V4 => network.router_v4.or(is_here.then_some(gateway.v4)).map(IpAddr::V4),
                    _ => network.router_v6.or(is_here.then_some(gateway.v6)).map(IpAddr::V6),
                };
                let to =
                    meta.peer.and_then(|peer| self.snapshot.peer(peer)).map_or(meta.source, |peer| peer.router_mac);
                Some(Speaker { address: address?, macs: (gateway.mac, to) })
            }
            NetworkMode::Bridged if reason == DropReason::TooBigForWire || reason == DropReason::TooBigForPort => {
                let (_, destination) = meta.addresses()?;
                Some(Speaker { address: destination, macs: (meta.destination, meta.source) })
            }
            NetworkMode::Bridged => None,
        }
    }

    /// Cuts a TCP packet into segments that fit.
    fn segment(
        &mut self,
        packet: Packet,
        meta: &Meta,
        mut segments: Segments,
        again: impl Fn(&mut Self, Packet, &Meta),
    ) {
        // The segments get checksums of their own: what is damaged must not become right.
        if !is_intact(&packet, self.umem, meta) {
            return self.drop(packet, meta.ingress, DropReason::BadChecksum);
        }
        let mut count = 0;
        while let Some(next) = segments.next(&packet, meta, self.umem) {
            count += 1;
            match next {
                Ok((segment, meta)) => again(self, segment, &meta),
                Err(NoFrame) => self.counters.drop(meta.ingress, DropReason::NoFrames),
            }
        }
        self.umem.free_packet(packet);
        if let Some(counters) = self.counters.port_mut(meta.ingress) {
            counters.copies = counters.copies.wrapping_add(count).wrapping_sub(1);
        }
    }

    /// Cuts an IPv4 packet into what fits (RFC 791 section 3.2).
    fn fragment(&mut self, mut packet: Packet, meta: &Meta, mtu: usize, again: impl Fn(&mut Self, Packet, &Meta)) {
        if let Checksum::Partial { offset } = meta.checksum {
            complete(&mut packet, meta, offset, self.umem);
        }
        let mut whole = std::mem::take(&mut self.scratch.whole);
        let mut part = std::mem::take(&mut self.scratch.part);
        whole.clear();
        whole.extend_from_slice(packet.head().data());
        self.umem.tail(&packet).for_each(|piece| whole.extend_from_slice(piece));
        self.umem.free_packet(packet);
        let mut pieces = 0_u64;
        for piece in segment::Pieces::of(&whole, meta, mtu) {
            pieces += 1;
            let meta = piece.emit(&whole, meta, &mut part);
            match self.umem.packet_from(&part) {
                Some(piece) => again(self, piece, &meta),
                None => self.counters.drop(meta.ingress, DropReason::NoFrames),
            }
        }
        if let Some(counters) = self.counters.port_mut(meta.ingress) {
            counters.copies = counters.copies.wrapping_add(pieces).wrapping_sub(1);
            if pieces == 0 {
                // Not even a header fits.
                counters.copies = counters.copies.wrapping_add(1);
                counters.drops[DropReason::TooBigForWire.index()] += 1;
            }
        }
        self.scratch.whole = whole;
        self.scratch.part = part;
    }

    /// Counts and frees a packet.
    pub(crate) fn drop(&mut self, packet: Packet, ingress: PortId, reason: DropReason) {
        self.counters.drop(ingress, reason);
        self.umem.free_packet(packet);
    }

    /// Out of a port here, when its rate allows.
    #[inline(never)]
    fn shape(&mut self, packet: Packet, ingress: PortId, port: PortId, limit: &Bucket, request: Option<TxChecksum>) {
        let Some(queue) = self.scratch.to.get_mut(port.index()) else {
            return self.send(packet, ingress, port, request);
        };
        match queue.offer(self.now_ns, limit, may_wait(self.umem), Held { packet, request, ingress }) {
            Shaped::Passed(held) => self.send(held.packet, ingress, port, held.request),
            Shaped::Waiting => self.counters.held += 1,
            Shaped::Over(held) => self.drop(held.packet, ingress, DropReason::RateTo),
        }
    }

    /// Sends what has waited long enough for a port.
    pub(crate) fn release(&mut self, port: PortId) {
        let limits = self.snapshot.port(port).and_then(|info| info.limits.as_ref());
        let limit = limits.and_then(|limits| limits.to.as_ref());
        while let Some(queue) = self.scratch.to.get_mut(port.index())
            && let Some(held) = queue.next(self.now_ns, limit)
        {
            self.counters.held -= 1;
            self.send(held.packet, held.ingress, port, held.request);
        }
    }

    #[inline]
    pub(crate) fn send(&mut self, packet: Packet, ingress: PortId, port: PortId, request: Option<TxChecksum>) {
        let bytes = packet.len() as u64;
        let Some(Some(io)) = self.ports.io.get_mut(port.index()) else {
            return self.drop(packet, ingress, DropReason::NoPort);
        };
        if let Err(packet) = io.tx_push(self.umem, packet, request) {
            if let Some(counters) = self.counters.port_mut(port) {
                counters.tx_refused += 1;
            }
            self.mark_busy(port);
            return self.drop(packet, ingress, DropReason::TxFull);
        }
        self.mark_busy(port);
        if let Some(counters) = self.counters.port_mut(port) {
            counters.tx_packets += 1;
            counters.tx_bytes += bytes;
        }
    }

    /// Makes a packet ready for a port here; where its layer 4 begins then.
    #[inline]
    pub(crate) fn prepare(
        &mut self,
        packet: &mut Packet,
        meta: &Meta,
        port: PortId,
        edit: Edit<'_>,
    ) -> Result<u16, DropReason> {
        let info = self.snapshot.port(port).ok_or(DropReason::NoPort)?;
        let PortKind::Access(access) = &info.kind else { return Err(DropReason::NoPort) };
        let tag = access.tag_of(meta.network).ok_or(DropReason::NoPort)?;
        if !fits(packet, info) || (meta.l3_len > info.tcp_mtu && goes_beyond(meta, access)) {
            return Err(DropReason::TooBigForPort);
        }
        if meta.is_syn && meta.peer.is_some() {
            self.clamp(packet, meta);
        }
        self.apply(packet, meta, edit)?;
        let Some(vid) = tag else { return Ok(meta.l4) };
        push_tag(packet, vid)?;
        Ok(meta.l4 + TAG as u16)
    }

    /// Puts the headers of the way to a peer before a packet; the uplink that it leaves by.
    #[inline]
    pub(crate) fn encapsulate(
        &mut self,
        packet: &mut Packet,
        meta: &Meta,
        peer: PeerIndex,
        network: NetworkIndex,
        edit: Edit<'_>,
    ) -> Result<PortId, DropReason> {
        let is_direct = self.snapshot.is_direct(peer, network);
        let network = self.snapshot.network(network).ok_or(DropReason::UnknownVni)?;
        let peer = self.snapshot.peer(peer).ok_or(DropReason::NoNeighbor)?;
        let path = peer.path(meta.hash).ok_or(DropReason::NoNeighbor)?;
        let (header, inner) = (&path.header, packet.len());
        let room = if is_direct { 0 } else { header.overhead() };
        if inner + room > path.mtu as usize + ETHERNET {
            return Err(DropReason::TooBigForWire);
        }
        if meta.is_syn {
            self.clamp(packet, meta);
        }
        self.apply(packet, meta, edit)?;
        if let Checksum::Partial { offset } = meta.checksum {
            complete(packet, meta, offset, self.umem);
        }
        if is_direct {
            let link_layer = header.link_layer();
            if !packet.head_mut().push_front(link_layer.len() + 2 - ETHERNET) {
                return Err(DropReason::NoHeadroom);
            }
            packet.head_mut().data_mut()[..link_layer.len()].copy_from_slice(link_layer);
            return Ok(path.port);
        }
        let ecn = ecn(packet.head().data(), meta);
        let inner_sum = if header.needs_udp_checksum() { sum_from(packet, 0, inner, self.umem) } else { 0 };
        if !packet.head_mut().push_front(header.len()) {
            return Err(DropReason::NoHeadroom);
        }
        header.emit(packet.head_mut().data_mut(), network.vni, meta.hash, inner, ecn, || inner_sum);
        Ok(path.port)
    }

    /// Largest IP packet of a network that a flow can send to a peer.
    fn mtu_to(&self, peer: PeerIndex, network: NetworkIndex, hash: u64) -> u32 {
        let path = self.snapshot.peer(peer).and_then(|peer| peer.path(hash));
        let room = |path: &Path| if self.snapshot.is_direct(peer, network) { 0 } else { path.header.overhead() as u32 };
        path.map_or(0, |path| path.mtu.saturating_sub(room(path)))
    }

    /// Writes into a packet what its way says.
    #[inline(always)]
    fn apply(&self, packet: &mut Packet, meta: &Meta, edit: Edit<'_>) -> Result<(), DropReason> {
        if let Some(rewrite) = edit.rewrite {
            route(packet, meta, rewrite)?;
        }
        if let Some(translation) = edit.translation {
            translate(packet, meta, translation, self.umem)?;
        }
        Ok(())
    }

    /// A flood must not have every port of its network polled.
    #[inline(always)]
    fn mark_busy(&mut self, port: PortId) {
        self.ports.mark_busy(port, if self.is_quiet { UnderWay::Left } else { UnderWay::New });
    }

    fn clamp(&self, packet: &mut Packet, meta: &Meta) {
        if let Some(mss) = self.snapshot.network(meta.network).and_then(|network| network.mss) {
            segment::clamp(packet.head_mut().data_mut(), meta, mss);
        }
    }
}

impl<P: PortIo> Ports<P> {
    /// Has a port flushed, and polled if it was sent something of its own.
    #[inline(always)]
    pub(crate) fn mark_busy(&mut self, port: PortId, what: UnderWay) {
        if let Some(under_way) = self.under_way.get_mut(port.index())
            && *under_way < what
        {
            if *under_way == UnderWay::Nothing {
                self.busy.push(port);
            }
            *under_way = what;
        }
    }
}

/// True for TCP that is for somebody behind a port, and not for the port's own addresses.
#[cold]
fn goes_beyond(meta: &Meta, access: &Access) -> bool {
    let is_own = meta.addresses().is_some_and(|(_, destination)| access.addresses.contains(&destination));
    meta.protocol == TCP && !is_own
}

fn is_tagged(head: &[u8]) -> bool {
    matches!(head.get(12..14), Some([0x81, 0] | [0x88, 0xa8]))
}

/// A tag is not counted, as the kernel counts it for a link (`is_skb_forwardable`).
#[inline]
pub(crate) fn fits(packet: &Packet, port: &Port) -> bool {
    let most = port.mtu as usize + ETHERNET;
    packet.len() <= most || (packet.len() <= most + TAG && is_tagged(packet.head().data()))
}

/// Both MACs, and one hop less.
#[inline(always)]
fn route(packet: &mut Packet, meta: &Meta, rewrite: &Rewrite) -> Result<(), DropReason> {
    if meta.ttl <= 1 {
        return Err(DropReason::TtlExpired);
    }
    let head = packet.head_mut().data_mut();
    write_macs(head, rewrite.destination, rewrite.source);
    let ip: &mut [u8; 12] = head[usize::from(meta.l3)..].first_chunk_mut().ok_or(DropReason::Truncated)?;
    match meta.kind {
        Kind::V4 => {
            ip[8] -= 1;
            let sum = checksum::after_hop(u16::from_be_bytes([ip[10], ip[11]]));
            [ip[10], ip[11]] = sum.to_be_bytes();
        }
        Kind::V6 => ip[7] -= 1,
        Kind::Arp | Kind::Other => {}
    }
    Ok(())
}

/// Puts an 802.1Q tag after the MAC addresses.
pub(crate) fn push_tag(packet: &mut Packet, tag: u16) -> Result<(), DropReason> {
    if !packet.head_mut().push_front(TAG) {
        return Err(DropReason::NoHeadroom);
    }
    let head = packet.head_mut().data_mut();
    head.copy_within(TAG..TAG + 12, 0);
    head[12..14].copy_from_slice(&ETHERTYPE_VLAN.to_be_bytes());
    head[14..16].copy_from_slice(&tag.to_be_bytes());
    Ok(())
}

#[inline(always)]
fn write_macs(head: &mut [u8], destination: MacAddr, source: MacAddr) {
    let head = &mut head[..12];
    head[..6].copy_from_slice(&destination.0);
    head[6..].copy_from_slice(&source.0);
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
pub(crate) fn complete(packet: &mut Packet, meta: &Meta, offset: u16, umem: &Umem) {
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
