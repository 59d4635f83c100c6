//! The system calls of AF_XDP, each wrapped once. Constants are those of `linux/if_xdp.h`, by way of libc.

use std::ffi::c_void;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};

pub(crate) use libc::{xdp_desc as Desc, xdp_mmap_offsets as MmapOffsets, xdp_ring_offset as RingOffset};

/// `XDP_MAX_TX_SKB_BUDGET` (Linux 6.17): packets that one `sendto` may transmit in copy mode.
const XDP_MAX_TX_SKB_BUDGET: libc::c_int = 9;

/// Opens an AF_XDP socket in the caller's network namespace.
pub(crate) fn socket() -> io::Result<OwnedFd> {
    // SAFETY: no pointers are passed; the result is checked before it is owned.
    let fd = check(unsafe { libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the descriptor is new and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Registers memory as the umem of a socket (`XDP_UMEM_REG`).
///
/// # Safety
///
/// The memory must stay mapped while any socket uses the registration, and the kernel may write to every chunk that is
/// put into a fill ring.
pub(crate) unsafe fn register_umem(
    fd: BorrowedFd<'_>,
    base: NonNull<u8>,
    bytes: usize,
    chunk_bytes: usize,
    tx_metadata_bytes: usize,
) -> io::Result<()> {
    let request = libc::xdp_umem_reg {
        addr: base.as_ptr() as u64,
        len: bytes as u64,
        chunk_size: chunk_bytes as u32,
        headroom: 0,
        flags: libc::XDP_UMEM_TX_METADATA_LEN,
        tx_metadata_len: tx_metadata_bytes as u32,
    };
    set_option(fd, libc::SOL_XDP, libc::XDP_UMEM_REG, &request)
}

/// Sets the number of entries of one ring; `ring` is `XDP_RX_RING` or one of its three siblings.
pub(crate) fn set_ring_size(fd: BorrowedFd<'_>, ring: libc::c_int, entries: u32) -> io::Result<()> {
    set_option(fd, libc::SOL_XDP, ring, &entries)
}

/// Lets one `sendto` carry up to `packets`. Kernels before 6.17 refuse; they carry 32.
pub(crate) fn set_tx_budget(fd: BorrowedFd<'_>, packets: u32) -> io::Result<()> {
    set_option(fd, libc::SOL_XDP, XDP_MAX_TX_SKB_BUDGET, &packets)
}

/// Bytes of packets that may be on their way in copy mode before `sendto` says EAGAIN.
pub(crate) fn set_send_buffer(fd: BorrowedFd<'_>, bytes: u32) -> io::Result<()> {
    set_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &bytes)
}

/// Where the words of the four rings lie in their mappings.
pub(crate) fn mmap_offsets(fd: BorrowedFd<'_>) -> io::Result<MmapOffsets> {
    get_option(fd, libc::XDP_MMAP_OFFSETS)
}

/// The kernel's counters of one socket.
pub(crate) fn statistics(fd: BorrowedFd<'_>) -> io::Result<libc::xdp_statistics> {
    get_option(fd, libc::XDP_STATISTICS)
}

/// Binds a socket to a queue of a device; `share_with` names a bound socket whose umem to use.
pub(crate) fn bind(
    fd: BorrowedFd<'_>,
    ifindex: u32,
    queue: u32,
    flags: u16,
    share_with: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let address = libc::sockaddr_xdp {
        sxdp_family: libc::AF_XDP as u16,
        sxdp_flags: flags,
        sxdp_ifindex: ifindex,
        sxdp_queue_id: queue,
        sxdp_shared_umem_fd: share_with.map_or(0, |fd| fd.as_raw_fd() as u32),
    };
    // SAFETY: the pointer and the length describe `address`, which outlives the call.
    check(unsafe {
        libc::bind(fd.as_raw_fd(), ptr::from_ref(&address).cast(), size_of_val(&address) as libc::socklen_t)
    })?;
    Ok(())
}

/// Asks the kernel to transmit what lies in the tx ring.
pub(crate) fn kick_tx(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: a null buffer of length zero is what AF_XDP expects.
    let sent = unsafe { libc::sendto(fd.as_raw_fd(), ptr::null(), 0, libc::MSG_DONTWAIT, ptr::null(), 0) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Asks the driver to look at the fill ring, where it sleeps until told (zero copy).
pub(crate) fn kick_rx(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: as in `kick_tx`; null pointers mean that no source address is wanted.
    let got = unsafe {
        libc::recvfrom(fd.as_raw_fd(), ptr::null_mut(), 0, libc::MSG_DONTWAIT, ptr::null_mut(), ptr::null_mut())
    };
    if got < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Maps memory of the kernel's, a ring of a socket or an array, shared and populated.
pub(crate) fn map_shared(fd: BorrowedFd<'_>, bytes: usize, page_offset: i64) -> io::Result<NonNull<u8>> {
    map(bytes, libc::MAP_SHARED | libc::MAP_POPULATE, fd.as_raw_fd(), page_offset)
}

/// Maps zeroed memory of our own, huge pages welcome.
pub(crate) fn map_anonymous(bytes: usize) -> io::Result<NonNull<u8>> {
    let base = map(bytes, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1, 0)?;
    // SAFETY: the range was just mapped and is ours. A hint only: failure changes nothing.
    unsafe { libc::madvise(base.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
    Ok(base)
}

/// Has the kernel give the pages of a mapping. A hint only: failure changes nothing.
pub(crate) fn populate(base: NonNull<u8>, bytes: usize) {
    // SAFETY: reads no memory of ours and changes no contents: pages that are there stay as they are (madvise(2)).
    unsafe { libc::madvise(base.as_ptr().cast(), bytes, libc::MADV_POPULATE_WRITE) };
}

/// Asks for huge pages under memory that nobody has written to yet. A hint only: failure changes nothing.
pub(crate) fn advise_huge<T>(memory: &mut [mem::MaybeUninit<T>]) {
    const PAGE: usize = 4096;
    let (start, bytes) = (memory.as_mut_ptr() as usize, size_of_val(memory));
    let (first, end) = (start.next_multiple_of(PAGE), (start + bytes) / PAGE * PAGE);
    if first < end {
        // SAFETY: whole pages inside memory that is ours by `&mut`; the advice changes neither contents nor protection.
        unsafe { libc::madvise(first as *mut c_void, end - first, libc::MADV_HUGEPAGE) };
    }
}

/// The kernel's clock that never goes back, as programs read it.
pub(crate) fn monotonic_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer leads to `time`. The clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Unmaps what one of the functions above mapped.
///
/// # Safety
///
/// Nothing may use the range afterwards.
pub(crate) unsafe fn unmap(base: NonNull<u8>, bytes: usize) {
    // SAFETY: the caller promises that the range is a mapping of ours that nobody uses any more.
    unsafe { libc::munmap(base.as_ptr().cast(), bytes) };
}

fn map(bytes: usize, flags: libc::c_int, fd: libc::c_int, offset: i64) -> io::Result<NonNull<u8>> {
    // SAFETY: a null hint lets the kernel choose a free range, so no existing memory is replaced.
    let base = unsafe { libc::mmap(ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, fd, offset) };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mmap gave the null page"))
}

fn set_option<T>(fd: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int, value: &T) -> io::Result<()> {
    // SAFETY: pointer and length describe `value`, a plain C struct or integer that outlives the call.
    check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            ptr::from_ref(value).cast::<c_void>(),
            size_of::<T>() as libc::socklen_t,
        )
    })?;
    Ok(())
}

/// Reads an option of level `SOL_XDP`.
fn get_option<T: Plain>(fd: BorrowedFd<'_>, name: libc::c_int) -> io::Result<T> {
    let mut length = size_of::<T>() as libc::socklen_t;
    // SAFETY: `Plain` types are valid when all their bytes are zero.
    let mut value: T = unsafe { mem::zeroed() };
    // SAFETY: pointer and length describe `value`, and the kernel writes at most `length` bytes of plain integers.
    check(unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_XDP, name, ptr::from_mut(&mut value).cast::<c_void>(), &mut length)
    })?;
    if length as usize != size_of::<T>() {
        return Err(io::Error::other(
            "this kernel's AF_XDP options are older than the ones used: Linux 6.8 or newer is needed",
        ));
    }
    Ok(value)
}

/// C structs of integers only: any bytes are a value.
///
/// # Safety
///
/// The type has no padding that matters, no pointer, no niche.
unsafe trait Plain {}
// SAFETY: eight-byte integers throughout.
unsafe impl Plain for MmapOffsets {}
// SAFETY: eight-byte integers throughout.
unsafe impl Plain for libc::xdp_statistics {}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
