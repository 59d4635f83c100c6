//! One AF_XDP socket: a queue of a port, with its four rings.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::depth::{FILL_MIN, FillDepth};
use crate::frame::{Packet, TX_METADATA_BYTES};
use crate::ring::{Consumer, Producer};
use crate::sys::{self, Desc};
use crate::umem::{Reserve, Slot, Umem};

/// Calls of `sendto` in one turn for one socket. Each carries the kernel's budget; what is left waits a turn.
const KICKS_A_TURN: u32 = 8;

/// Frames that a socket may have on their way when no more than [`Reserve::Sending`] is free.
const SEND_WHEN_LOW: u32 = 64;

/// Whether the driver moves packets to user space itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyMode {
    /// The kernel copies. The only mode of a veth.
    Copy,
    /// The device writes into the umem.
    ZeroCopy,
}

/// The kernel's counters of a socket (`XDP_STATISTICS`, kernel document `networking/af_xdp.rst`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketStatistics {
    /// Dropped for reasons other than those below.
    pub rx_dropped: u64,
    /// Dropped because a fill descriptor was invalid.
    pub rx_invalid_descs: u64,
    /// Descriptors that the kernel refused to send.
    pub tx_invalid_descs: u64,
    /// Dropped because the rx ring was full: the worker was too slow.
    pub rx_ring_full: u64,
    /// Times the fill ring had nothing to receive into.
    pub rx_fill_ring_empty: u64,
    /// Times the tx ring was found empty.
    pub tx_ring_empty: u64,
}

impl SocketStatistics {
    /// Adds those of a socket that was there before.
    pub fn add(&mut self, other: &SocketStatistics) {
        self.rx_dropped += other.rx_dropped;
        self.rx_invalid_descs += other.rx_invalid_descs;
        self.tx_invalid_descs += other.tx_invalid_descs;
        self.rx_ring_full += other.rx_ring_full;
        self.rx_fill_ring_empty += other.rx_fill_ring_empty;
        self.tx_ring_empty += other.tx_ring_empty;
    }
}

/// What the socket's own side counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KickCounters {
    /// Calls of `sendto`.
    pub kicks: u64,
    /// Calls that failed with something else than "not now".
    pub kick_errors: u64,
    /// Descriptors from the kernel that were not lent to it. Always zero unless the kernel errs.
    pub strange_descs: u64,
    /// Packets the kernel sent down in more than 18 frames, dropped.
    pub oversized: u64,
    /// Packets received.
    pub received: u64,
}

impl KickCounters {
    /// Adds those of a socket that was there before.
    pub fn add(&mut self, other: &KickCounters) {
        self.kicks += other.kicks;
        self.kick_errors += other.kick_errors;
        self.strange_descs += other.strange_descs;
        self.oversized += other.oversized;
        self.received += other.received;
    }
}

/// A checksum that the receiving stack or device shall complete, in bytes from the packet's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TxChecksum {
    /// Where summing starts: the layer 4 header.
    pub start: u16,
    /// Where the checksum field lies, from `start`. It holds the folded pseudo-header sum.
    pub offset: u16,
}

/// A bound socket. Receives from and sends to one queue of one link.
#[derive(Debug)]
pub struct XskSocket {
    slot: Slot,
    queue: u32,
    mode: CopyMode,
    rx: Consumer<Desc>,
    tx: Producer<Desc>,
    fill: Producer<u64>,
    completion: Consumer<u64>,
    /// Frames lent to the fill ring, those included that the kernel holds for a packet not yet complete.
    filled: u32,
    fill_depth: FillDepth,
    /// Frames on their way, from `push` until completion.
    sending: u32,
    unsubmitted: bool,
    /// A packet whose last frame has not come yet.
    partial: Option<Packet>,
    /// The rest of a packet that is being skipped.
    skipping: bool,
    counters: KickCounters,
    /// Declared last: the rings are unmapped before the socket closes.
    fd: Arc<OwnedFd>,
}

/// The rings and descriptor of a socket, before a worker takes it over.
#[derive(Debug)]
pub(crate) struct Rings {
    pub(crate) rx: Consumer<Desc>,
    pub(crate) tx: Producer<Desc>,
    pub(crate) fill: Producer<u64>,
    pub(crate) completion: Consumer<u64>,
}

impl XskSocket {
    pub(crate) fn new(fd: Arc<OwnedFd>, queue: u32, rings: Rings, mode: CopyMode, slot: Slot) -> XskSocket {
        let Rings { rx, tx, fill, completion } = rings;
        XskSocket {
            slot,
            queue,
            mode,
            rx,
            tx,
            fill,
            completion,
            filled: 0,
            fill_depth: FillDepth::new(),
            sending: 0,
            unsubmitted: false,
            partial: None,
            skipping: false,
            counters: KickCounters::default(),
            fd,
        }
    }

    /// Keeps more frames ready than a pod's socket does: many share the link. It is one of so many of that link.
    pub fn expect_many(mut self, umem: &Umem, sockets: usize) -> XskSocket {
        self.fill_depth = FillDepth::of_many(umem, sockets);
        self
    }

    /// The queue of its link that it is bound to.
    pub fn queue(&self) -> u32 {
        self.queue
    }

    /// Whether the kernel copies.
    pub fn copy_mode(&self) -> CopyMode {
        self.mode
    }

    /// Frames that wait in the fill ring at most now; grows with use.
    pub fn fill_depth(&self) -> u32 {
        self.fill_depth.frames()
    }

    /// Counters of this side.
    pub fn counters(&self) -> KickCounters {
        self.counters
    }

    /// Counters of the kernel's side.
    ///
    /// # Errors
    ///
    /// Those of `getsockopt(2)`; a device that is gone is none.
    pub fn statistics(&self) -> io::Result<SocketStatistics> {
        let raw = sys::statistics(self.fd.as_fd())?;
        Ok(SocketStatistics {
            rx_dropped: raw.rx_dropped,
            rx_invalid_descs: raw.rx_invalid_descs,
            tx_invalid_descs: raw.tx_invalid_descs,
            rx_ring_full: raw.rx_ring_full,
            rx_fill_ring_empty: raw.rx_fill_ring_empty_descs,
            tx_ring_empty: raw.tx_ring_empty_descs,
        })
    }

    /// Moves up to `max` received packets to `out` and refills the fill ring. Returns how many came.
    #[inline]
    pub fn rx_burst(&mut self, umem: &mut Umem, out: &mut Vec<Packet>, max: usize) -> usize {
        let before = out.len();
        let mut frames = 0;
        while out.len() - before < max {
            let Some(desc) = self.rx.pop() else { break };
            frames += 1;
            let more = desc.options & libc::XDP_PKT_CONTD != 0;
            let Some(frame) = umem.take_received(self.slot, desc.addr, desc.len) else {
                self.counters.strange_descs += 1;
                continue;
            };
            self.filled = self.filled.saturating_sub(1);
            if self.skipping {
                umem.free(frame);
                self.skipping = more;
                continue;
            }
            let packet = match self.partial.take() {
                None => Packet::new(frame),
                Some(mut packet) => match umem.append(&mut packet, frame) {
                    Ok(()) => packet,
                    Err(frame) => {
                        umem.free(frame);
                        umem.free_packet(packet);
                        self.counters.oversized += 1;
                        self.skipping = more;
                        continue;
                    }
                },
            };
            if more {
                self.partial = Some(packet);
            } else {
                out.push(packet);
            }
        }
        if frames > 0 {
            self.rx.release();
            self.fill_depth.fit(self.fill.pending(), umem);
        }
        if self.filled < self.fill_depth.frames() {
            self.refill(umem);
        }
        let count = out.len() - before;
        self.counters.received += count as u64;
        count
    }

    /// Queues a packet for [`flush`](Self::flush), with the request to complete a checksum if there is one.
    ///
    /// # Errors
    ///
    /// The packet comes back if the ring, or the umem's reserve, has no room for all its frames.
    #[inline]
    pub fn tx_push(&mut self, umem: &mut Umem, packet: Packet, checksum: Option<TxChecksum>) -> Result<(), Packet> {
        let frames = packet.frames() as u32;
        if !self.has_room(umem, frames) {
            return Err(packet);
        }
        let Packet { mut head, tail } = packet;
        let mut options = 0;
        if let Some(checksum) = checksum
            && let Some(metadata) = head.metadata_mut()
        {
            write_metadata(metadata, checksum);
            options |= libc::XDP_TX_METADATA;
        }
        let (addr, len) = umem.lend_send(self.slot, head);
        if tail.frames > 0 {
            options |= libc::XDP_PKT_CONTD;
        }
        self.tx.push(Desc { addr, len, options });
        let tx = &mut self.tx;
        let mut left = tail.frames;
        umem.lend_send_tail(self.slot, &tail, |addr, len| {
            left -= 1;
            tx.push(Desc { addr, len, options: if left > 0 { libc::XDP_PKT_CONTD } else { 0 } });
        });
        self.sending += frames;
        self.unsubmitted = true;
        Ok(())
    }

    /// Shows queued packets to the kernel, has it transmit until its ring is empty or it says "not now", and takes
    /// completed frames back. Call it every turn: what was not taken is offered again.
    ///
    /// True if nothing is left to transmit.
    #[inline]
    pub fn flush(&mut self, umem: &mut Umem) -> bool {
        if self.unsubmitted {
            self.tx.submit();
            self.unsubmitted = false;
        }
        if self.sending == 0 {
            return true;
        }
        let mut pending = self.tx.pending();
        for _ in 0..KICKS_A_TURN {
            if pending == 0 || !self.tx.needs_wakeup() {
                break;
            }
            self.reclaim(umem);
            self.kick();
            let now = self.tx.pending();
            if now == pending {
                break;
            }
            pending = now;
        }
        self.reclaim(umem);
        pending == 0
    }

    /// True if the kernel has frames for a full packet; false when the umem had none to give.
    pub fn can_receive(&self) -> bool {
        self.filled >= FILL_MIN / 2
    }

    /// True while packets lie in its rings: received and not taken, or to be sent and not looked at by the kernel.
    pub fn is_in_use(&mut self) -> bool {
        self.unsubmitted || self.tx.pending() > 0 || self.rx.has_next()
    }

    /// True while frames are with the kernel for sending.
    pub fn is_sending(&self) -> bool {
        self.sending > 0
    }

    /// Closes the socket and takes every frame back, those with the kernel too.
    pub fn close(self, umem: &mut Umem) {
        let (fd, closing) = self.close_later(umem);
        drop(fd);
        closing.reclaim(umem);
    }

    /// First half of closing, for a worker that must not wait for the kernel: what comes back is to be dropped on another
    /// thread, and [`Closing::reclaim`] called after that.
    pub fn close_later(mut self, umem: &mut Umem) -> (Arc<OwnedFd>, Closing) {
        if let Some(packet) = self.partial.take() {
            umem.free_packet(packet);
        }
        (self.fd, Closing { slot: self.slot })
    }

    fn has_room(&mut self, umem: &Umem, frames: u32) -> bool {
        if self.tx.free(frames) < frames {
            return false;
        }
        umem.free_beyond(Reserve::Sending) > 0 || self.sending + frames <= SEND_WHEN_LOW
    }

    fn refill(&mut self, umem: &mut Umem) {
        let depth = self.fill_depth.frames();
        let wanted = (depth - self.filled).min(self.fill.free(depth));
        let mut lent = 0;
        while lent < wanted
            && let Some(address) = umem.lend_fill(self.slot)
        {
            self.fill.push(address);
            lent += 1;
        }
        if lent > 0 {
            self.filled += lent;
            self.fill.submit();
            if self.mode == CopyMode::ZeroCopy && self.fill.needs_wakeup() {
                let _ = sys::kick_rx(self.fd.as_fd());
            }
        }
    }

    fn kick(&mut self) {
        self.counters.kicks += 1;
        if let Err(error) = sys::kick_tx(self.fd.as_fd()) {
            // EAGAIN: budget or send buffer used up. EBUSY, ENOBUFS: the device's queue is full. All pass.
            if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY | libc::ENOBUFS)) {
                self.counters.kick_errors += 1;
            }
        }
    }

    fn reclaim(&mut self, umem: &mut Umem) {
        let mut done = 0;
        while let Some(address) = self.completion.pop() {
            if umem.take_completed(self.slot, address) {
                done += 1;
            } else {
                self.counters.strange_descs += 1;
            }
        }
        if done > 0 {
            self.completion.release();
            self.sending = self.sending.saturating_sub(done);
        }
    }
}

impl AsFd for XskSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What is left of a socket whose descriptor is being closed elsewhere: the frames the kernel had.
#[derive(Debug)]
#[must_use = "frames stay lost until `reclaim`"]
pub struct Closing {
    slot: Slot,
}

impl Closing {
    /// Takes the frames back. Call it only when the descriptor from [`XskSocket::close_later`] has been dropped.
    pub fn reclaim(self, umem: &mut Umem) {
        umem.close_slot(self.slot);
    }
}

/// Writes `struct xsk_tx_metadata`: flags, then the checksum request (kernel document `networking/xsk-tx-metadata.rst`).
fn write_metadata(metadata: &mut [u8; TX_METADATA_BYTES], checksum: TxChecksum) {
    metadata[..8].copy_from_slice(&u64::from(libc::XDP_TXMD_FLAGS_CHECKSUM).to_ne_bytes());
    metadata[8..10].copy_from_slice(&checksum.start.to_ne_bytes());
    metadata[10..12].copy_from_slice(&checksum.offset.to_ne_bytes());
    metadata[12..].fill(0);
}
