//! Making sockets: registration of the memory, ring sizes, and the ways a bind may have to fall back.
//!
//! The control thread owns the [`Binder`] of each worker. It binds (which may take the kernel milliseconds) and hands a
//! [`BoundSocket`] over; the worker adopts it into its umem and packets flow.
//!
//! All sockets of a worker share one umem. The kernel lets a socket join by naming another one that is bound, so the
//! binder remembers every socket it made; if all are gone, the same memory is registered afresh. A socket that joins
//! inherits copy or zero-copy mode, therefore memory is registered at most once for each mode, and both registrations
//! are of the same chunks.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use crate::area::Area;
use crate::frame::TX_METADATA_BYTES;
use crate::ring::{Consumer, Producer};
use crate::socket::{CopyMode, Rings, XskSocket};
use crate::sys;
use crate::umem::{CHUNK_BYTES, Umem};

/// Entries of the fill and the completion ring.
const FRAME_RING: u32 = 4096;

/// Entries of the rx and the tx ring: 2,048 small packets, or 120 of 64 kB.
const PACKET_RING: u32 = 2048;

/// Packets that one `sendto` may carry, where the kernel lets us choose.
const TX_BUDGET: u32 = 256;

/// Bytes on their way before the kernel says "not now": a full tx ring of the largest packets.
const SEND_BUFFER_BYTES: u32 = 16 << 20;

/// How long a bind waits between two tries for a queue that somebody has not let go yet.
const BUSY_WAIT: Duration = Duration::from_millis(10);

/// How long a bind tries a queue that is busy: the kernel frees what belongs to a closed socket in its own time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// For a second: it may be that of a process that was killed.
    Long,
    /// Once: the caller comes back.
    None,
}

impl Patience {
    fn retries(self) -> u32 {
        match self {
            Patience::Long => 100,
            Patience::None => 0,
        }
    }
}

/// Whether to try zero copy first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroCopy {
    /// Try, and fall back to copying.
    Auto,
    /// Do not try. Right for a veth, which never can.
    Off,
}

/// Why a queue could not be bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// AF_XDP is not there or not allowed.
    #[error(
        "cannot open an AF_XDP socket: {0}; run as root or with CAP_NET_RAW, CAP_NET_ADMIN and CAP_BPF, on a kernel with CONFIG_XDP_SOCKETS"
    )]
    Open(#[source] io::Error),
    /// The memory was refused.
    #[error(
        "cannot register {bytes} bytes of packet memory: {source}; Linux 6.8 or newer is needed, and a `memlock` limit above that size (or CAP_IPC_LOCK)"
    )]
    Register {
        /// Size of the memory.
        bytes: usize,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Rings could not be made.
    #[error("cannot set up the rings of an AF_XDP socket: {0}")]
    Rings(#[source] io::Error),
    /// The queue was refused.
    #[error("cannot bind an AF_XDP socket to queue {queue} of link {ifindex}: {source}; {}", bind_remedy(source))]
    Bind {
        /// The link.
        ifindex: u32,
        /// The queue.
        queue: u32,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl BindError {
    /// True if somebody else has the queue.
    pub fn is_busy(&self) -> bool {
        matches!(self, BindError::Bind { source, .. } if source.raw_os_error() == Some(libc::EBUSY))
    }

    /// True if the link does not use a queue of that number.
    pub fn is_no_queue(&self) -> bool {
        matches!(self, BindError::Bind { source, .. } if source.raw_os_error() == Some(libc::EINVAL))
    }
}

fn bind_remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EBUSY) => "another program has an AF_XDP socket on that queue: stop it",
        Some(libc::EINVAL) => {
            "the link uses fewer queues than the switch has workers: give it more (`ethtool -L`; a pod's link gets them when it is plugged in anew), or lower worker.count"
        }
        Some(libc::ENODEV) => "the link is gone",
        _ => "see `ip -d link show` for the link's driver and state",
    }
}

/// Binds sockets over one worker's memory.
#[derive(Debug)]
pub struct Binder {
    area: Arc<Area>,
    copying: Vec<Weak<OwnedFd>>,
    zero_copying: Vec<Weak<OwnedFd>>,
}

/// A bound socket that no worker has adopted yet.
#[derive(Debug)]
pub struct BoundSocket {
    fd: Arc<OwnedFd>,
    queue: u32,
    rings: Rings,
    mode: CopyMode,
    zero_copy_refusal: Option<String>,
}

impl Binder {
    /// A binder over the memory of `umem`.
    pub fn new(umem: &Umem) -> Binder {
        Binder { area: umem.area().clone(), copying: Vec::new(), zero_copying: Vec::new() }
    }

    /// Binds to one queue of a link in the caller's network namespace.
    ///
    /// # Errors
    ///
    /// Each tells what to do; nothing is left behind.
    pub fn bind(
        &mut self,
        ifindex: u32,
        queue: u32,
        zero_copy: ZeroCopy,
        patience: Patience,
    ) -> Result<BoundSocket, BindError> {
        let mut zero_copy_refusal = None;
        if zero_copy == ZeroCopy::Auto {
            match self.bind_as(CopyMode::ZeroCopy, ifindex, queue, patience) {
                Ok(socket) => return Ok(socket),
                // A queue that somebody has is no word on zero copy.
                Err(error) if error.is_busy() => return Err(error),
                Err(BindError::Bind { source, .. }) => zero_copy_refusal = Some(source.to_string()),
                Err(_) => {}
            }
        }
        Ok(BoundSocket { zero_copy_refusal, ..self.bind_as(CopyMode::Copy, ifindex, queue, patience)? })
    }

    fn bind_as(
        &mut self,
        mode: CopyMode,
        ifindex: u32,
        queue: u32,
        patience: Patience,
    ) -> Result<BoundSocket, BindError> {
        let donors = match mode {
            CopyMode::Copy => &mut self.copying,
            CopyMode::ZeroCopy => &mut self.zero_copying,
        };
        donors.retain(|donor| donor.strong_count() > 0);
        // The newest donors are the likeliest to be bound still.
        for donor in donors.iter().rev().filter_map(Weak::upgrade) {
            let (fd, rings) = open()?;
            match bind_patiently(fd.as_fd(), (ifindex, queue), libc::XDP_SHARED_UMEM, Some(donor.as_fd()), patience) {
                Ok(()) => return Ok(adopt(donors, fd, queue, rings, mode)),
                // The donor's link is gone; ask the next.
                Err(error) if error.raw_os_error() == Some(libc::EBADF) => {}
                Err(source) => return Err(BindError::Bind { ifindex, queue, source }),
            }
        }
        let (fd, rings) = open()?;
        let bytes = self.area.bytes();
        // SAFETY: the area stays mapped while frames exist (`Umem::drop`), the kernel pins its pages itself, and chunks
        // are put into a fill ring only while `Umem` counts them as the kernel's.
        unsafe { sys::register_umem(fd.as_fd(), self.area.base(), bytes, CHUNK_BYTES, TX_METADATA_BYTES) }
            .map_err(|source| BindError::Register { bytes, source })?;
        let flags = libc::XDP_USE_NEED_WAKEUP
            | libc::XDP_USE_SG
            | match mode {
                CopyMode::Copy => libc::XDP_COPY,
                CopyMode::ZeroCopy => libc::XDP_ZEROCOPY,
            };
        bind_patiently(fd.as_fd(), (ifindex, queue), flags, None, patience).map_err(|source| BindError::Bind {
            ifindex,
            queue,
            source,
        })?;
        Ok(adopt(donors, fd, queue, rings, mode))
    }
}

impl BoundSocket {
    /// Makes the socket one of `umem`'s.
    pub fn adopt(self, umem: &mut Umem) -> XskSocket {
        let slot = umem.open_slot();
        XskSocket::new(self.fd, self.queue, self.rings, self.mode, slot)
    }

    /// Its descriptor, for the programs' map after it was adopted.
    pub fn descriptor(&self) -> Arc<OwnedFd> {
        self.fd.clone()
    }

    /// Its queue.
    pub fn queue(&self) -> u32 {
        self.queue
    }

    /// Whether the kernel copies.
    pub fn copy_mode(&self) -> CopyMode {
        self.mode
    }

    /// What the kernel said when zero copy was tried and refused.
    pub fn zero_copy_refusal(&self) -> Option<&str> {
        self.zero_copy_refusal.as_deref()
    }
}

impl AsFd for BoundSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn adopt(donors: &mut Vec<Weak<OwnedFd>>, fd: OwnedFd, queue: u32, rings: Rings, mode: CopyMode) -> BoundSocket {
    let fd = Arc::new(fd);
    donors.push(Arc::downgrade(&fd));
    BoundSocket { fd, queue, rings, mode, zero_copy_refusal: None }
}

fn open() -> Result<(OwnedFd, Rings), BindError> {
    let socket = sys::socket().map_err(BindError::Open)?;
    let fd = socket.as_fd();
    let rings = make_rings(fd).map_err(BindError::Rings)?;
    // Both only make sending faster; older kernels know neither and send less a call.
    let _ = sys::set_tx_budget(fd, TX_BUDGET);
    let _ = sys::set_send_buffer(fd, SEND_BUFFER_BYTES);
    Ok((socket, rings))
}

fn make_rings(fd: BorrowedFd<'_>) -> io::Result<Rings> {
    sys::set_ring_size(fd, libc::XDP_UMEM_FILL_RING, FRAME_RING)?;
    sys::set_ring_size(fd, libc::XDP_UMEM_COMPLETION_RING, FRAME_RING)?;
    sys::set_ring_size(fd, libc::XDP_RX_RING, PACKET_RING)?;
    sys::set_ring_size(fd, libc::XDP_TX_RING, PACKET_RING)?;
    let at = sys::mmap_offsets(fd)?;
    Ok(Rings {
        fill: Producer::map(fd, FRAME_RING, &at.fr, libc::XDP_UMEM_PGOFF_FILL_RING as i64)?,
        completion: Consumer::map(fd, FRAME_RING, &at.cr, libc::XDP_UMEM_PGOFF_COMPLETION_RING as i64)?,
        rx: Consumer::map(fd, PACKET_RING, &at.rx, libc::XDP_PGOFF_RX_RING)?,
        tx: Producer::map(fd, PACKET_RING, &at.tx, libc::XDP_PGOFF_TX_RING)?,
    })
}

/// A process that was killed lets go of its queues a little later: the kernel frees pools from a work queue.
#[expect(
    clippy::disallowed_methods,
    reason = "runs on the control thread, where a link is attached or a queue moved, a second at most"
)]
fn bind_patiently(
    fd: BorrowedFd<'_>,
    (ifindex, queue): (u32, u32),
    flags: u16,
    share_with: Option<BorrowedFd<'_>>,
    patience: Patience,
) -> io::Result<()> {
    let mut tries = 0;
    loop {
        match sys::bind(fd, ifindex, queue, flags, share_with) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && tries < patience.retries() => {
                tries += 1;
                thread::sleep(BUSY_WAIT);
            }
            other => return other,
        }
    }
}
