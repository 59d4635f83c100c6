//! What NICs do for TCP, done here: a large packet of a pod is cut into what the wire carries (segmentation), and packets
//! from the wire that follow each other become a large one (coalescing). The stacks of both pods, and the crossings of both
//! veths, then see one packet where there were up to eighteen.
//!
//! # What is cut
//!
//! A TCP packet that is larger than its way out. Each piece has the headers of the whole with its own lengths, sequence number and
//! IPv4 identification; FIN and PSH stand in the last, CWR in the first (RFC 3168 section 6.1.2).
//!
//! # What is joined
//!
//! Packets of one burst and one flow whose sequence numbers follow, with nothing but data: no SYN, FIN, RST or URG, no other
//! acknowledgment, options, hops or marks than the first one's (as Linux's GRO, `net/ipv4/tcp_offload.c`), to an address of the port's
//! own: who passes a large packet on cannot know in what sizes it came. The last one's window counts. Payloads are chained
//! where they lie. Each checksum is looked at before, for the joined packet gets a partial one, and what was
//! damaged would pass for right. Nothing waits for a later burst.

use vswitch_net::checksum;
use vswitch_xsk::{Packet, Umem};

use crate::connection::tcp::{ACK, CWR, FIN, PSH, RST, SYN, URG};
use crate::intact::is_intact;
use crate::meta::{Checksum, FlowKey, Kind, Meta};
use crate::parse::TCP;

const TCP_HEADER: usize = 20;
/// Offset of the checksum in a TCP header.
const TCP_CHECKSUM: u16 = 16;
/// Longest headers of a packet that is cut: Ethernet, IPv4 and TCP with all options.
const MAX_HEADERS: usize = 14 + 60 + 60;

/// Flows of a burst that are joined at the same time.
const OPEN: usize = 8;

/// A packet on its way to be cut.
#[derive(Debug)]
pub(crate) struct Segments {
    header: [u8; MAX_HEADERS],
    length: usize,
    l3: usize,
    l4: usize,
    kind: Kind,
    payload: usize,
    /// Most payload of a piece.
    most: usize,
    at: usize,
    count: u16,
    pseudo: u32,
}

impl Segments {
    /// The pieces of a TCP packet, none an IP packet larger than `mtu`. None if it must stay whole.
    pub(crate) fn of(packet: &Packet, meta: &Meta, mtu: usize) -> Option<Segments> {
        if meta.protocol != TCP || meta.fragment.is_some() || !meta.has_l4() {
            return None;
        }
        let head = packet.head().data();
        let (l3, l4) = (usize::from(meta.l3), usize::from(meta.l4));
        if meta.kind == Kind::V6 && l4 - l3 != 40 {
            // One of the headers in between may be about the whole, as an authentication is.
            return None;
        }
        let tcp = head.get(l4..l4 + TCP_HEADER)?;
        let length = l4 + usize::from(tcp[12] >> 4) * 4;
        let payload = (l3 + meta.l3_len as usize).checked_sub(length)?;
        let most = mtu.checked_sub(length - l3).filter(|&most| most > 0)?;
        if tcp[13] & (SYN | RST | URG) != 0 || payload <= most {
            return None;
        }
        let mut header = [0; MAX_HEADERS];
        header.get_mut(..length)?.copy_from_slice(head.get(..length)?);
        let (source, destination) = meta.address_words();
        let pseudo = sum_of(source) + sum_of(destination) + u32::from(TCP);
        Some(Segments { header, length, l3, l4, kind: meta.kind, payload, most, at: 0, count: 0, pseudo })
    }

    /// The next piece and its facts: a packet whose checksum is partial.
    pub(crate) fn next(
        &mut self,
        packet: &Packet,
        meta: &Meta,
        umem: &mut Umem,
    ) -> Option<Result<(Packet, Meta), NoFrame>> {
        let bytes = self.payload.checked_sub(self.at).filter(|&left| left > 0)?.min(self.most);
        let mut header = self.header;
        let l3_len = self.length - self.l3 + bytes;
        let is_last = self.at + bytes == self.payload;
        let ip = &mut header[self.l3..self.l4];
        if self.kind == Kind::V4 {
            let id = u16::from_be_bytes([ip[4], ip[5]]).wrapping_add(self.count);
            ip[2..4].copy_from_slice(&(l3_len as u16).to_be_bytes());
            ip[4..6].copy_from_slice(&id.to_be_bytes());
            finish_v4(ip);
        } else {
            ip[4..6].copy_from_slice(&((l3_len - 40) as u16).to_be_bytes());
        }
        let seq = meta.seq.wrapping_add(self.at as u32);
        let l4_len = (l3_len - (self.l4 - self.l3)) as u32;
        let tcp = &mut header[self.l4..self.length];
        tcp[4..8].copy_from_slice(&seq.to_be_bytes());
        tcp[13] &= if is_last { 0xff } else { !(FIN | PSH) } & if self.at == 0 { 0xff } else { !CWR };
        tcp[16..18].copy_from_slice(&checksum::fold(self.pseudo + l4_len).to_be_bytes());
        let from = self.length + self.at;
        self.at += bytes;
        self.count = self.count.wrapping_add(1);
        let piece = umem.packet_of(&header[..self.length], packet, from, bytes);
        let checksum = Checksum::Partial { offset: TCP_CHECKSUM };
        Some(piece.ok_or(NoFrame).map(|piece| (piece, Meta { l3_len: l3_len as u32, seq, checksum, ..*meta })))
    }
}

/// There is no free frame for a piece.
#[derive(Debug)]
pub(crate) struct NoFrame;

/// The flows of a burst to whose last packet more may be joined.
#[derive(Debug, Default)]
pub(crate) struct Coalesce {
    open: [Option<Open>; OPEN],
    /// The next to be replaced.
    turn: usize,
}

/// A packet that may grow.
#[derive(Clone, Copy, Debug)]
struct Open {
    key: FlowKey,
    /// Whose it is, in the words of the caller.
    place: u8,
    next_seq: u32,
}

/// What becomes of a packet.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Offer {
    /// It may be joined to the packet at this place, and to no other.
    Follows(u8),
    /// It stays what it is.
    Alone,
}

/// A packet as a candidate: a TCP segment with data.
#[derive(Clone, Copy, Debug)]
struct Segment {
    /// Where the data begins.
    data: usize,
    payload: usize,
    flags: u8,
}

impl Coalesce {
    /// Forgets the last burst.
    pub(crate) fn clear(&mut self) {
        self.open = [None; OPEN];
    }

    /// Says whether a packet follows one that was offered before; it may be followed itself from then on.
    pub(crate) fn offer(&mut self, place: u8, packet: &Packet, meta: &Meta, umem: &Umem) -> Offer {
        // What opens or closes has another key, and keeps its place too.
        let key = meta.key.without_control();
        let known = self.open.iter().position(|open| open.is_some_and(|open| open.key.is_same(&key)));
        let segment = segment_of(packet, meta).filter(|_| is_intact(packet, umem, meta));
        let Some(segment) = segment else {
            // Whatever it is, what comes after it must stay after it.
            if let Some(known) = known {
                self.open[known] = None;
            }
            return Offer::Alone;
        };
        let next_seq = meta.seq.wrapping_add(segment.payload as u32);
        if let Some(known) = known
            && let Some(open) = &mut self.open[known]
            && open.next_seq == meta.seq
        {
            open.next_seq = next_seq;
            return Offer::Follows(open.place);
        }
        let at = known.unwrap_or_else(|| {
            self.turn = (self.turn + 1) % OPEN;
            self.turn
        });
        self.open[at] = (segment.flags & PSH == 0).then_some(Open { key: meta.key, place, next_seq });
        Offer::Alone
    }

    /// The packet at `place` could not be followed: the one at `next` may be.
    pub(crate) fn replace(&mut self, place: u8, next: u8) {
        for open in self.open.iter_mut().flatten() {
            if open.place == place {
                open.place = next;
            }
        }
    }

    /// Nothing follows the packet at `place` any more.
    pub(crate) fn close(&mut self, place: u8) {
        for open in &mut self.open {
            if open.is_some_and(|open| open.place == place) {
                *open = None;
            }
        }
    }
}

/// Joins `other`, whose data follows, to `packet`; or gives it back if they differ in more than that, or become larger than
/// `mtu`. True in the answer if more may follow.
pub(crate) fn join(
    packet: &mut Packet,
    meta: &mut Meta,
    mut other: Packet,
    other_meta: &Meta,
    mtu: u32,
    umem: &mut Umem,
) -> Result<bool, Packet> {
    let segments = (segment_of(packet, meta), segment_of(&other, other_meta));
    let (Some(first), Some(second)) = segments else { return Err(other) };
    let length = meta.l3_len as usize + second.payload;
    if length > mtu as usize || length > 0xffff || !are_alike(packet, meta, &other, other_meta) {
        return Err(other);
    }
    let at = usize::from(other_meta.l4) + 14;
    let Some(&window) = other.head().data().get(at..).and_then(|bytes| bytes.first_chunk::<2>()) else {
        return Err(other);
    };
    if packet.frames() + other.frames() > vswitch_xsk::MAX_FRAMES || !other.head_mut().pull_front(second.data) {
        return Err(other);
    }
    umem.append_packet(packet, other);
    meta.l3_len = length as u32;
    let (l3, l4) = (usize::from(meta.l3), usize::from(meta.l4));
    let (source, destination) = meta.address_words();
    let pseudo = sum_of(source) + sum_of(destination) + u32::from(TCP);
    let head = packet.head_mut().data_mut();
    let ip = &mut head[l3..l4];
    if meta.kind == Kind::V4 {
        ip[2..4].copy_from_slice(&(length as u16).to_be_bytes());
        finish_v4(ip);
    } else {
        ip[4..6].copy_from_slice(&((length - 40) as u16).to_be_bytes());
    }
    let tcp = &mut head[l4..first.data];
    tcp[13] |= second.flags & PSH;
    // The later window counts.
    tcp[14..16].copy_from_slice(&window);
    let l4_len = (length - (l4 - l3)) as u32;
    tcp[16..18].copy_from_slice(&checksum::fold(pseudo + l4_len).to_be_bytes());
    meta.checksum = Checksum::Partial { offset: TCP_CHECKSUM };
    Ok(second.flags & PSH == 0)
}

/// A whole TCP segment with data and nothing to say beside it.
fn segment_of(packet: &Packet, meta: &Meta) -> Option<Segment> {
    if meta.protocol != TCP || meta.is_control || meta.fragment.is_some() || !meta.has_l4() {
        return None;
    }
    let (l3, l4) = (usize::from(meta.l3), usize::from(meta.l4));
    let end = l3 + meta.l3_len as usize;
    let tcp = packet.head().data().get(l4..l4 + TCP_HEADER)?;
    let data = l4 + usize::from(tcp[12] >> 4) * 4;
    let flags = tcp[13];
    let has_no_options = meta.kind != Kind::V4 || l4 - l3 == 20;
    // Padding after the end would come to lie in the middle.
    let is_whole = packet.len() == end && packet.head().len() > data;
    let payload = end.checked_sub(data)?;
    (flags & !PSH == ACK && has_no_options && is_whole && payload > 0).then_some(Segment { data, payload, flags })
}

/// The same headers but for lengths, identification, checksums, sequence number, window and PSH.
fn are_alike(one: &Packet, meta: &Meta, other: &Packet, other_meta: &Meta) -> bool {
    let (l3, l4) = (usize::from(meta.l3), usize::from(meta.l4));
    if (meta.l3, meta.l4, meta.ttl) != (other_meta.l3, other_meta.l4, other_meta.ttl) {
        return false;
    }
    let (one, other) = (one.head().data(), other.head().data());
    let same = |from: usize, to: usize| one.get(from..to).is_some_and(|bytes| other.get(from..to) == Some(bytes));
    let ip = match meta.kind {
        // Type of service; flags and offset. Hops and addresses were compared.
        Kind::V4 => same(l3 + 1, l3 + 2) && same(l3 + 6, l3 + 8),
        // Traffic class and flow label; extension headers.
        _ => same(l3, l3 + 4) && same(l3 + 40, l4),
    };
    let data = l4 + usize::from(one[l4 + 12] >> 4) * 4;
    // Acknowledgment and data offset; options.
    ip && same(l4 + 8, l4 + 13) && same(l4 + TCP_HEADER, data)
}

/// The checksum of an IPv4 header that was changed.
fn finish_v4(ip: &mut [u8]) {
    ip[10..12].fill(0);
    let sum = checksum::finish(checksum::sum(ip));
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
}

/// Sum of an address in the words of a key.
fn sum_of(words: [u64; 2]) -> u32 {
    checksum::sum(&words[0].to_be_bytes()) + checksum::sum(&words[1].to_be_bytes())
}
