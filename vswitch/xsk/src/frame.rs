//! Frames and packets: owned chunks of a umem.

use std::ptr::NonNull;
use std::slice;

use crate::umem::CHUNK_BYTES;

/// Where the kernel puts the first byte of a received frame: `XDP_PACKET_HEADROOM`. Encapsulation grows into it.
pub const HEADROOM: usize = 256;

/// The most frames a packet can have: the kernel's `MAX_SKB_FRAGS` and the first one.
pub const MAX_FRAMES: usize = 18;

/// Room kept before a packet for the request to the kernel (`struct xsk_tx_metadata`).
pub(crate) const TX_METADATA_BYTES: usize = 24;

/// One chunk of a umem, owned, and the part of it that holds data.
///
/// Neither `Copy` nor `Clone`, and without a `Drop`: it goes back by [`Umem::free`](crate::Umem::free) or into a ring.
/// A frame that is forgotten is lost to its umem, and the memory then stays mapped; nothing dangles.
#[derive(Debug)]
pub struct Frame {
    /// First byte of the chunk.
    base: NonNull<u8>,
    chunk: u32,
    start: u16,
    len: u16,
}

// SAFETY: a frame is the only handle to its chunk, so it may be used from whichever thread holds it.
unsafe impl Send for Frame {}

impl Frame {
    /// Takes ownership of a chunk whose first byte is `base`.
    ///
    /// # Safety
    ///
    /// `base` must be the start of a chunk of [`CHUNK_BYTES`] that stays mapped as long as the frame lives, and nobody
    /// else, not the kernel either, may touch that chunk meanwhile.
    pub(crate) unsafe fn from_chunk(base: NonNull<u8>, chunk: u32, start: usize, len: usize) -> Frame {
        debug_assert!(start + len <= CHUNK_BYTES);
        Frame { base, chunk, start: start as u16, len: len as u16 }
    }

    /// The chunk's number in its umem.
    pub(crate) fn chunk(&self) -> u32 {
        self.chunk
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Offset of the first data byte in the chunk.
    pub(crate) fn start(&self) -> usize {
        usize::from(self.start)
    }

    /// Data bytes.
    pub fn len(&self) -> usize {
        usize::from(self.len)
    }

    /// True if the frame holds no data.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The data.
    #[inline(always)]
    pub fn data(&self) -> &[u8] {
        // SAFETY: the frame owns its chunk (`from_chunk`), and `start + len` never passes the chunk's end: every method
        // that changes one checks the sum.
        unsafe { slice::from_raw_parts(self.base.as_ptr().add(self.start()), self.len()) }
    }

    /// Where the data begins, to prefetch; the byte itself means nothing if the frame is empty.
    #[inline(always)]
    pub fn first_byte(&self) -> &u8 {
        // SAFETY: `start` is below the chunk's size whenever data follows, and the last byte of the chunk stands in for it
        // otherwise; the chunk is ours and initialized (it was mapped zeroed).
        unsafe { &*self.base.as_ptr().add(self.start().min(CHUNK_BYTES - 1)) }
    }

    /// The data, to change.
    #[inline(always)]
    pub fn data_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `data`, and `&mut self` makes the access exclusive.
        unsafe { slice::from_raw_parts_mut(self.base.as_ptr().add(self.start()), self.len()) }
    }

    /// Grows the data by `bytes` at its front, into the headroom; the new bytes hold whatever lay there.
    ///
    /// False, with nothing changed, if the headroom is too small. Room for the request to the kernel is never used up.
    #[inline]
    #[must_use]
    pub fn push_front(&mut self, bytes: usize) -> bool {
        if self.start() < bytes + TX_METADATA_BYTES {
            return false;
        }
        self.start -= bytes as u16;
        self.len += bytes as u16;
        true
    }

    /// Cuts `bytes` off the front. False, with nothing changed, if there are fewer.
    #[inline]
    #[must_use]
    pub fn pull_front(&mut self, bytes: usize) -> bool {
        if self.len() < bytes {
            return false;
        }
        self.start += bytes as u16;
        self.len -= bytes as u16;
        true
    }

    /// Sets the length of the data, its start unchanged; new bytes hold whatever lay there.
    ///
    /// False, with nothing changed, if the chunk ends before.
    #[must_use]
    pub fn set_len(&mut self, len: usize) -> bool {
        if self.start() + len > CHUNK_BYTES {
            return false;
        }
        self.len = len as u16;
        true
    }

    /// The request area that the kernel reads just before the data.
    pub(crate) fn metadata_mut(&mut self) -> Option<&mut [u8; TX_METADATA_BYTES]> {
        let at = self.start().checked_sub(TX_METADATA_BYTES)?;
        // SAFETY: the 24 bytes before `start` lie in the chunk that this frame owns, and hold no data of the slice that
        // `data` gives out; any bytes are a valid `[u8; 24]`.
        Some(unsafe { &mut *self.base.as_ptr().add(at).cast::<[u8; TX_METADATA_BYTES]>() })
    }
}

/// The frames of a packet after the first: a chain of chunks that the umem links.
#[derive(Debug, Default)]
pub(crate) struct Tail {
    pub(crate) first: u32,
    pub(crate) last: u32,
    pub(crate) frames: u8,
    pub(crate) bytes: u32,
}

/// A packet of 1 to 18 frames. Its headers lie in the first.
#[derive(Debug)]
pub struct Packet {
    pub(crate) head: Frame,
    pub(crate) tail: Tail,
}

impl Packet {
    /// A packet of one frame.
    pub fn new(head: Frame) -> Packet {
        Packet { head, tail: Tail::default() }
    }

    /// The first frame.
    #[inline(always)]
    pub fn head(&self) -> &Frame {
        &self.head
    }

    /// The first frame, to change.
    #[inline(always)]
    pub fn head_mut(&mut self) -> &mut Frame {
        &mut self.head
    }

    /// Bytes of all frames.
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.head.len() + self.tail.bytes as usize
    }

    /// True if the packet holds no data.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of frames, at least 1.
    #[inline(always)]
    pub fn frames(&self) -> usize {
        1 + usize::from(self.tail.frames)
    }
}
