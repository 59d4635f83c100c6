//! The umem of one worker: who owns which chunk, and the free list.

use std::io;
use std::ptr::NonNull;
use std::slice;
use std::sync::Arc;

use crate::area::Area;
use crate::frame::{Frame, HEADROOM, MAX_FRAMES, Packet, Tail};
use crate::sys;

/// Size of a chunk: one page, so that a received frame holds 3,840 bytes and 17 of them a packet of a 65,000-byte link.
pub const CHUNK_BYTES: usize = 4096;

/// Data bytes of a chunk behind its headroom.
const USABLE_BYTES: usize = CHUNK_BYTES - HEADROOM;

/// A socket's number in its umem, for telling whose chunks are whose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(u16);

/// Who leaves which part of all chunks free, as a divisor: what can be done without leaves more than what cannot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reserve {
    /// Fill rings deeper than they must be.
    DeepRings = 4,
    /// Packets that wait, for a rate or for sockets.
    Waiting = 8,
    /// Long transmit queues: fill rings must find frames when a port cannot get rid of its packets.
    Sending = 16,
}

/// Chunks, their owners and the free list. Belongs to one worker.
#[derive(Debug)]
pub struct Umem {
    area: Arc<Area>,
    free: Vec<u32>,
    owners: Vec<Owner>,
    /// For a chunk in a packet's tail: the next chunk, and where its data lies.
    links: Vec<Link>,
    slots: Vec<bool>,
}

/// Where a chunk is. The kernel's numbers are checked against this before they are believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
struct Owner(u16);

#[derive(Clone, Copy, Debug, Default)]
struct Link {
    next: u32,
    start: u16,
    len: u16,
}

impl Owner {
    const FREE: Owner = Owner(0);
    const HELD: Owner = Owner(1);

    fn filling(slot: Slot) -> Owner {
        Owner(2 + 2 * slot.0)
    }

    fn sending(slot: Slot) -> Owner {
        Owner(3 + 2 * slot.0)
    }
}

impl Umem {
    /// Maps memory for `chunks` chunks.
    ///
    /// # Errors
    ///
    /// Those of `mmap(2)`; `InvalidInput` for no chunk or more than 2^20 (4 GiB).
    pub fn new(chunks: usize) -> io::Result<Umem> {
        if chunks == 0 || chunks > 1 << 20 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a umem has 1 to 1048576 chunks"));
        }
        Ok(Umem {
            area: Arc::new(Area::new(chunks * CHUNK_BYTES)?),
            free: (0..chunks as u32).rev().collect(),
            owners: vec![Owner::FREE; chunks],
            links: vec![Link::default(); chunks],
            slots: Vec::new(),
        })
    }

    /// Has the kernel give all pages now, from the NUMA node of the caller's core. A hint: a kernel that cannot (before 5.14) gives them
    /// as they are used.
    pub fn populate(&self) {
        sys::populate(self.area.base(), self.area.bytes());
    }

    /// Chunks in all.
    pub fn chunks(&self) -> usize {
        self.owners.len()
    }

    /// Chunks on the free list.
    #[inline(always)]
    pub fn free_chunks(&self) -> usize {
        self.free.len()
    }

    /// Free chunks beyond those that must stay free.
    #[inline(always)]
    pub fn free_beyond(&self, reserve: Reserve) -> usize {
        self.free.len().saturating_sub(self.owners.len() / reserve as usize)
    }

    /// A frame from the free list, empty, its data to start after the headroom. None if all chunks are in use.
    #[inline]
    pub fn alloc(&mut self) -> Option<Frame> {
        let chunk = self.free.pop()?;
        self.owners[chunk as usize] = Owner::HELD;
        // SAFETY: the chunk was free, so nobody else holds it; it is marked held now.
        Some(unsafe { self.frame(chunk, HEADROOM, 0) })
    }

    /// Gives a frame back.
    ///
    /// # Panics
    ///
    /// If the frame is of another umem.
    #[inline]
    pub fn free(&mut self, frame: Frame) {
        self.assert_ours(&frame);
        let chunk = frame.chunk();
        self.owners[chunk as usize] = Owner::FREE;
        self.free.push(chunk);
    }

    /// Gives all frames of a packet back.
    #[inline]
    pub fn free_packet(&mut self, packet: Packet) {
        let Packet { head, tail } = packet;
        self.free(head);
        let mut chunk = tail.first;
        for _ in 0..tail.frames {
            let next = self.links[chunk as usize].next;
            self.owners[chunk as usize] = Owner::FREE;
            self.free.push(chunk);
            chunk = next;
        }
    }

    /// Adds a frame at a packet's end. The frame comes back if the packet has 18 already.
    ///
    /// # Panics
    ///
    /// If either is of another umem.
    pub fn append(&mut self, packet: &mut Packet, frame: Frame) -> Result<(), Frame> {
        self.assert_ours(&packet.head);
        self.assert_ours(&frame);
        if packet.frames() == MAX_FRAMES {
            return Err(frame);
        }
        let chunk = frame.chunk();
        self.links[chunk as usize] = Link { next: 0, start: frame.start() as u16, len: frame.len() as u16 };
        let tail = &mut packet.tail;
        if tail.frames == 0 {
            tail.first = chunk;
        } else {
            self.links[tail.last as usize].next = chunk;
        }
        tail.last = chunk;
        tail.frames += 1;
        tail.bytes += frame.len() as u32;
        Ok(())
    }

    /// Adds all frames of `other` at a packet's end, its first one as it now begins.
    ///
    /// # Panics
    ///
    /// If either is of another umem, or they have more than 18 frames together.
    pub fn append_packet(&mut self, packet: &mut Packet, other: Packet) {
        assert!(packet.frames() + other.frames() <= MAX_FRAMES, "more than {MAX_FRAMES} frames");
        let Packet { head, tail } = other;
        // There is room, as just asserted.
        let appended = self.append(packet, head);
        debug_assert!(appended.is_ok());
        if tail.frames > 0 {
            self.links[packet.tail.last as usize].next = tail.first;
            packet.tail.last = tail.last;
            packet.tail.frames += tail.frames;
            packet.tail.bytes += tail.bytes;
        }
    }

    /// A packet of `front` and then `bytes` bytes of another packet, from the one at `from` on. None, with nothing taken, if
    /// chunks or frames run out, or the other packet is shorter.
    pub fn packet_of(&mut self, front: &[u8], other: &Packet, from: usize, bytes: usize) -> Option<Packet> {
        if from + bytes > other.len() || front.len() > USABLE_BYTES {
            return None;
        }
        let mut done = bytes.min(USABLE_BYTES - front.len());
        let mut head = self.alloc()?;
        if !head.set_len(front.len() + done) {
            self.free(head);
            return None;
        }
        let (start, rest) = head.data_mut().split_at_mut(front.len());
        start.copy_from_slice(front);
        self.read(other, from, rest);
        let mut packet = Packet::new(head);
        while done < bytes {
            let more = (bytes - done).min(USABLE_BYTES);
            let Some(mut frame) = self.alloc() else {
                self.free_packet(packet);
                return None;
            };
            // A chunk has as much behind its headroom.
            let fits = frame.set_len(more);
            debug_assert!(fits);
            self.read(other, from + done, frame.data_mut());
            if let Err(frame) = self.append(&mut packet, frame) {
                self.free(frame);
                self.free_packet(packet);
                return None;
            }
            done += more;
        }
        Some(packet)
    }

    /// Copies bytes of a packet, from the one at `from` on, as many as there is room for and as it has.
    fn read(&self, packet: &Packet, from: usize, into: &mut [u8]) {
        let (mut skip, mut done) = (from, 0);
        for piece in std::iter::once(packet.head.data()).chain(self.tail(packet)) {
            if skip >= piece.len() {
                skip -= piece.len();
                continue;
            }
            let piece = &piece[skip..];
            let count = piece.len().min(into.len() - done);
            into[done..done + count].copy_from_slice(&piece[..count]);
            (skip, done) = (0, done + count);
            if done == into.len() {
                return;
            }
        }
    }

    /// The data of a packet after its first frame, piece by piece.
    pub fn tail<'a>(&'a self, packet: &'a Packet) -> impl Iterator<Item = &'a [u8]> {
        self.assert_ours(&packet.head);
        let mut chunk = packet.tail.first;
        (0..packet.tail.frames).map(move |_| {
            let (piece, next) = self.tail_piece(packet, chunk);
            chunk = next;
            piece
        })
    }

    /// A packet with these bytes, in as many frames as they need. None, with nothing taken, if chunks or frames run out.
    pub fn packet_from(&mut self, bytes: &[u8]) -> Option<Packet> {
        let (first, rest) = bytes.split_at(bytes.len().min(USABLE_BYTES));
        let mut packet = Packet::new(self.frame_from(first)?);
        for piece in rest.chunks(USABLE_BYTES) {
            if !self.append_copy(&mut packet, piece) {
                self.free_packet(packet);
                return None;
            }
        }
        Some(packet)
    }

    /// A copy of a packet in frames of its own. None, with nothing taken, if chunks run out.
    pub fn copy_packet(&mut self, packet: &Packet) -> Option<Packet> {
        self.assert_ours(&packet.head);
        let mut copy = Packet::new(self.frame_from(packet.head.data())?);
        let mut chunk = packet.tail.first;
        for _ in 0..packet.tail.frames {
            let (piece, next) = self.tail_piece(packet, chunk);
            if !self.append_copy(&mut copy, piece) {
                self.free_packet(copy);
                return None;
            }
            chunk = next;
        }
        Some(copy)
    }

    /// A slot for a new socket.
    pub fn open_slot(&mut self) -> Slot {
        let at = self.slots.iter().position(|used| !used).unwrap_or_else(|| {
            self.slots.push(false);
            self.slots.len() - 1
        });
        self.slots[at] = true;
        Slot(at as u16)
    }

    /// Takes back every chunk that the kernel had for `slot`, and the slot.
    ///
    /// Call it only after the socket is closed: until then the kernel may write to them.
    pub(crate) fn close_slot(&mut self, slot: Slot) {
        for (chunk, owner) in self.owners.iter_mut().enumerate() {
            if *owner == Owner::filling(slot) || *owner == Owner::sending(slot) {
                *owner = Owner::FREE;
                self.free.push(chunk as u32);
            }
        }
        self.slots[usize::from(slot.0)] = false;
    }

    pub(crate) fn area(&self) -> &Arc<Area> {
        &self.area
    }

    /// Takes a chunk off the free list for a fill ring; its address in the umem.
    #[inline]
    pub(crate) fn lend_fill(&mut self, slot: Slot) -> Option<u64> {
        let chunk = self.free.pop()?;
        self.owners[chunk as usize] = Owner::filling(slot);
        Some(u64::from(chunk) * CHUNK_BYTES as u64)
    }

    /// A frame that the kernel received into, if the address really was lent for filling.
    #[inline]
    pub(crate) fn take_received(&mut self, slot: Slot, address: u64, len: u32) -> Option<Frame> {
        let (chunk, start) = split(address);
        let owner = self.owners.get_mut(chunk as usize)?;
        if *owner != Owner::filling(slot) || start + len as usize > CHUNK_BYTES {
            return None;
        }
        *owner = Owner::HELD;
        // SAFETY: the chunk was in this socket's fill ring and the kernel has now given it back in the rx ring, so it is
        // ours alone; the bounds were checked.
        Some(unsafe { self.frame(chunk, start, len as usize) })
    }

    /// Marks a frame as being sent by `slot` and gives its address.
    #[inline]
    pub(crate) fn lend_send(&mut self, slot: Slot, frame: Frame) -> (u64, u32) {
        self.assert_ours(&frame);
        self.owners[frame.chunk() as usize] = Owner::sending(slot);
        (u64::from(frame.chunk()) * CHUNK_BYTES as u64 + frame.start() as u64, frame.len() as u32)
    }

    /// As [`lend_send`](Self::lend_send), for each frame of a packet's tail in turn.
    pub(crate) fn lend_send_tail(&mut self, slot: Slot, tail: &Tail, mut each: impl FnMut(u64, u32)) {
        let mut chunk = tail.first;
        for _ in 0..tail.frames {
            let link = self.links[chunk as usize];
            self.owners[chunk as usize] = Owner::sending(slot);
            each(u64::from(chunk) * CHUNK_BYTES as u64 + u64::from(link.start), u32::from(link.len));
            chunk = link.next;
        }
    }

    /// Frees a chunk that the kernel completed, if it really was being sent by `slot`.
    #[inline]
    pub(crate) fn take_completed(&mut self, slot: Slot, address: u64) -> bool {
        let (chunk, _) = split(address);
        match self.owners.get_mut(chunk as usize) {
            Some(owner) if *owner == Owner::sending(slot) => {
                *owner = Owner::FREE;
                self.free.push(chunk);
                true
            }
            _ => false,
        }
    }

    /// A frame with these bytes; it starts inside the headroom if they are more than usually fit behind it.
    fn frame_from(&mut self, bytes: &[u8]) -> Option<Frame> {
        let mut frame = self.alloc()?;
        let fits = frame.push_front(bytes.len().saturating_sub(USABLE_BYTES)) && frame.set_len(bytes.len());
        if !fits {
            self.free(frame);
            return None;
        }
        frame.data_mut().copy_from_slice(bytes);
        Some(frame)
    }

    fn append_copy(&mut self, packet: &mut Packet, bytes: &[u8]) -> bool {
        let Some(frame) = self.frame_from(bytes) else { return false };
        match self.append(packet, frame) {
            Ok(()) => true,
            Err(frame) => {
                self.free(frame);
                false
            }
        }
    }

    /// The data of one chunk of a packet's tail, and the number of the next.
    fn tail_piece<'a>(&self, _owner: &'a Packet, chunk: u32) -> (&'a [u8], u32) {
        let link = self.links[chunk as usize];
        let base = self.chunk_base(chunk);
        // SAFETY: a packet owns the chunks of its tail exclusively and is borrowed for `'a`; `append` took start and
        // length from a frame, whose sum lies in the chunk; the memory outlives every packet (`drop`).
        let data = unsafe { slice::from_raw_parts(base.as_ptr().add(usize::from(link.start)), usize::from(link.len)) };
        (data, link.next)
    }

    /// A frame over a held chunk.
    ///
    /// # Safety
    ///
    /// The caller owns the chunk: it is marked held and no other frame of it exists.
    unsafe fn frame(&self, chunk: u32, start: usize, len: usize) -> Frame {
        // SAFETY: the chunk lies in the area (it came from a table of that size); ownership is the caller's promise; the
        // area outlives the frame, or is leaked (`drop`).
        unsafe { Frame::from_chunk(self.chunk_base(chunk), chunk, start, len) }
    }

    fn chunk_base(&self, chunk: u32) -> NonNull<u8> {
        assert!((chunk as usize) < self.owners.len());
        // SAFETY: the chunk's first byte lies inside the mapping, as just asserted.
        unsafe { self.area.base().add(chunk as usize * CHUNK_BYTES) }
    }

    #[inline(always)]
    fn assert_ours(&self, frame: &Frame) {
        assert!(frame.base() == self.chunk_base(frame.chunk()), "a frame of another umem");
    }
}

impl Drop for Umem {
    fn drop(&mut self) {
        if self.free.len() != self.owners.len() {
            // Frames are still out, with somebody or with the kernel: the memory must outlive them.
            std::mem::forget(self.area.clone());
        }
    }
}

fn split(address: u64) -> (u32, usize) {
    ((address / CHUNK_BYTES as u64) as u32, (address % CHUNK_BYTES as u64) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 31 + i / 256) as u8).collect()
    }

    fn contents(umem: &Umem, packet: &Packet) -> Vec<u8> {
        let mut all = packet.head().data().to_vec();
        umem.tail(packet).for_each(|piece| all.extend_from_slice(piece));
        all
    }

    #[test]
    fn packets_of_many_frames_keep_their_bytes() {
        let mut umem = Umem::new(64).unwrap();
        for len in [0, 1, 64, 3840, 3841, 9000, 65_014] {
            let packet = umem.packet_from(&bytes(len)).unwrap();
            assert_eq!(packet.len(), len);
            assert_eq!(packet.frames(), len.div_ceil(3840).max(1));
            let copy = umem.copy_packet(&packet).unwrap();
            assert_eq!(contents(&umem, &packet), bytes(len));
            assert_eq!(contents(&umem, &copy), bytes(len));
            umem.free_packet(packet);
            umem.free_packet(copy);
            assert_eq!(umem.free_chunks(), 64);
        }
    }

    #[test]
    fn packets_are_joined_and_cut() {
        let mut umem = Umem::new(64).unwrap();
        let all = bytes(20_000);
        let mut whole = umem.packet_from(&all[..9000]).unwrap();
        let rest = umem.packet_from(&all[9000..]).unwrap();
        umem.append_packet(&mut whole, rest);
        assert_eq!((whole.len(), whole.frames()), (20_000, 6));
        assert_eq!(contents(&umem, &whole), all);
        for (from, count) in [(0, 10), (3835, 1400), (8999, 2), (100, 19_900), (20_000, 0)] {
            let part = umem.packet_of(&[7; 54], &whole, from, count).unwrap();
            assert_eq!(contents(&umem, &part), [&[7; 54], &all[from..from + count]].concat(), "{from}, {count}");
            umem.free_packet(part);
        }
        assert!(umem.packet_of(&[], &whole, 19_999, 2).is_none());
        umem.free_packet(whole);
        assert_eq!(umem.free_chunks(), 64);
        let mut small = Umem::new(3).unwrap();
        let packet = small.packet_from(&all[..5000]).unwrap();
        assert!(small.packet_of(&[], &packet, 0, 5000).is_none());
        assert_eq!(small.free_chunks(), 1);
        small.free_packet(packet);
    }

    #[test]
    fn nothing_is_taken_when_chunks_run_out() {
        let mut umem = Umem::new(4).unwrap();
        assert!(umem.packet_from(&bytes(5 * 3840)).is_none());
        assert_eq!(umem.free_chunks(), 4);
        let packet = umem.packet_from(&bytes(3 * 3840)).unwrap();
        assert!(umem.copy_packet(&packet).is_none());
        umem.free_packet(packet);
        assert_eq!(umem.free_chunks(), 4);
        let mut big = Umem::new(32).unwrap();
        assert!(big.packet_from(&bytes(19 * 3840)).is_none());
        assert_eq!(big.free_chunks(), 32);
    }

    #[test]
    fn headers_move_inside_the_headroom_only() {
        let mut umem = Umem::new(1).unwrap();
        let mut frame = umem.alloc().unwrap();
        assert!(frame.set_len(100));
        assert!(frame.push_front(HEADROOM - TX_METADATA));
        assert!(!frame.push_front(1));
        assert!(!frame.pull_front(1 + frame.len()));
        assert!(frame.pull_front(frame.len()));
        assert!(!frame.set_len(CHUNK_BYTES));
        umem.free(frame);
    }

    const TX_METADATA: usize = crate::frame::TX_METADATA_BYTES;

    #[test]
    fn addresses_the_kernel_does_not_own_are_refused() {
        let mut umem = Umem::new(8).unwrap();
        let (one, two) = (umem.open_slot(), umem.open_slot());
        let address = umem.lend_fill(one).unwrap();
        assert!(umem.take_received(two, address, 60).is_none(), "another socket's");
        assert!(umem.take_received(one, address + 256, 4096).is_none(), "past the chunk");
        assert!(umem.take_received(one, 1 << 40, 60).is_none(), "past the umem");
        assert!(!umem.take_completed(one, address), "not being sent");
        let frame = umem.take_received(one, address + 256, 60).unwrap();
        assert!(umem.take_received(one, address + 256, 60).is_none(), "twice");
        let (sent, len) = umem.lend_send(two, frame);
        assert_eq!((sent, len), (address + 256, 60));
        assert!(umem.take_completed(two, sent));
        assert!(!umem.take_completed(two, sent), "twice");
        umem.lend_fill(one).unwrap();
        umem.close_slot(one);
        assert_eq!(umem.free_chunks(), 8);
        assert_eq!(umem.open_slot(), one);
    }

    #[test]
    #[should_panic(expected = "another umem")]
    fn frames_do_not_change_umems() {
        let (mut one, mut two) = (Umem::new(1).unwrap(), Umem::new(1).unwrap());
        let frame = one.alloc().unwrap();
        two.free(frame);
    }
}
