//! The memory of a umem: one anonymous mapping, unmapped only when no frame can point into it any more.

use std::io;
use std::ptr::NonNull;

use crate::sys;

/// A mapping of whole chunks. Whoever holds an `Arc` of it keeps the addresses valid.
#[derive(Debug)]
pub(crate) struct Area {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: an `Area` is an address and a length. It hands out neither references nor copies of bytes; those who do
// (`Frame`, `Umem`) own the chunk they touch exclusively.
unsafe impl Send for Area {}
// SAFETY: as above; all methods take `&self` and only tell the address and the length.
unsafe impl Sync for Area {}

impl Area {
    /// Maps `bytes` of zeroed memory, page aligned.
    pub(crate) fn new(bytes: usize) -> io::Result<Area> {
        Ok(Area { base: sys::map_anonymous(bytes)?, bytes })
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and is not used after this: frames that are still out keep an `Arc` alive
        // (see `Umem::drop`), and the kernel holds its own pins on the pages.
        unsafe { sys::unmap(self.base, self.bytes) };
    }
}
