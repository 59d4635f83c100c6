//! One ring between us and the kernel: a single producer and a single consumer over shared memory.
//!
//! # What
//!
//! Two free-running 32-bit counters, `producer` and `consumer`, and a power-of-two array of entries. The entries between
//! consumer and producer belong to the consumer, the others to the producer. We produce into the fill and the tx ring
//! and consume the rx and the completion ring; the kernel does the opposite.
//!
//! # Why this way
//!
//! Both sides keep private copies of the other's counter and look at shared memory only when the copy says "empty" or
//! "full", so a burst costs one shared read and one shared write (kernel document `networking/af_xdp.rst`, "Rings").
//!
//! # Thread-safety
//!
//! Every shared word has one writer. Our release store of `producer` pairs with the kernel's acquire load of it
//! (`xskq_cons_*`), and makes the entries visible before the counter; our acquire load of `producer` pairs with the
//! kernel's release store, and makes its entries visible to us. The same holds for `consumer`, which orders our reads of
//! entries before the kernel's reuse of them. `flags` is a hint written by the kernel alone, read relaxed.

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::sys::{self, RingOffset};

/// The shared memory of one ring. Unmapped on drop.
#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the ring that holds the mapping is being dropped, and it alone used it.
        unsafe { sys::unmap(self.base, self.bytes) };
    }
}

/// The words and entries that both kinds of rings share.
#[derive(Debug)]
struct Shared<T> {
    producer: NonNull<AtomicU32>,
    consumer: NonNull<AtomicU32>,
    flags: NonNull<u32>,
    entries: NonNull<T>,
    size: u32,
    _mapping: Mapping,
}

// SAFETY: the pointers lead into a mapping that the value owns; it moves between threads as a whole.
unsafe impl<T: Send> Send for Shared<T> {}

impl<T: Copy> Shared<T> {
    fn map(fd: BorrowedFd<'_>, size: u32, offset: &RingOffset, page_offset: i64) -> io::Result<Shared<T>> {
        let bytes = offset.desc as usize + size as usize * size_of::<T>();
        let mapping = Mapping { base: sys::map_shared(fd, bytes, page_offset)?, bytes };
        Ok(Self::over(mapping, size, offset))
    }

    fn over(mapping: Mapping, size: u32, offset: &RingOffset) -> Shared<T> {
        assert!(size.is_power_of_two());
        assert!(mapping.bytes >= offset.desc as usize + size as usize * size_of::<T>());
        let at = |bytes: u64| {
            // SAFETY: the kernel's offsets lie before `desc`, and `desc` with the entries ends inside the mapping, as
            // asserted.
            unsafe { mapping.base.add(bytes as usize) }
        };
        Shared {
            producer: at(offset.producer).cast(),
            consumer: at(offset.consumer).cast(),
            flags: at(offset.flags).cast(),
            entries: at(offset.desc).cast(),
            size,
            _mapping: mapping,
        }
    }

    fn producer(&self) -> &AtomicU32 {
        // SAFETY: points to an aligned word in the mapping that `self` owns; the kernel too uses it as an atomic.
        unsafe { self.producer.as_ref() }
    }

    fn consumer(&self) -> &AtomicU32 {
        // SAFETY: as in `producer`.
        unsafe { self.consumer.as_ref() }
    }

    fn entry(&self, counter: u32) -> NonNull<T> {
        // SAFETY: the index is masked to the ring's size, which lies inside the mapping (`over`).
        unsafe { self.entries.add((counter & (self.size - 1)) as usize) }
    }

    fn needs_wakeup(&self) -> bool {
        // SAFETY: an aligned word in the mapping that only the kernel writes; volatile because it does so any time.
        let flags = unsafe { self.flags.as_ptr().read_volatile() };
        flags & libc::XDP_RING_NEED_WAKEUP != 0
    }
}

/// A ring that we fill: fill and tx.
#[derive(Debug)]
pub(crate) struct Producer<T> {
    shared: Shared<T>,
    /// Our counter, ahead of the shared one by what is not yet submitted.
    local: u32,
    /// The kernel's counter as last seen.
    consumer: u32,
}

impl<T: Copy> Producer<T> {
    pub(crate) fn map(fd: BorrowedFd<'_>, size: u32, offset: &RingOffset, page: i64) -> io::Result<Producer<T>> {
        Ok(Producer { shared: Shared::map(fd, size, offset, page)?, local: 0, consumer: 0 })
    }

    /// Entries that can be pushed; looks at the kernel's counter only if fewer than `wanted` are known to be free.
    #[inline]
    pub(crate) fn free(&mut self, wanted: u32) -> u32 {
        let free = self.shared.size - self.local.wrapping_sub(self.consumer);
        if free >= wanted {
            return free;
        }
        self.consumer = self.shared.consumer().load(Ordering::Acquire);
        self.shared.size - self.local.wrapping_sub(self.consumer)
    }

    /// Writes the next entry. The caller has asked [`free`](Self::free) for the room.
    #[inline]
    pub(crate) fn push(&mut self, entry: T) {
        debug_assert!(self.local.wrapping_sub(self.consumer) < self.shared.size);
        // SAFETY: the entry lies between our counter and the consumer's plus the size, so it is ours to write until the
        // release store in `submit`.
        unsafe { self.shared.entry(self.local).write(entry) };
        self.local = self.local.wrapping_add(1);
    }

    /// Shows everything pushed to the kernel.
    #[inline]
    pub(crate) fn submit(&mut self) {
        self.shared.producer().store(self.local, Ordering::Release);
    }

    /// Entries pushed that the kernel has not taken yet.
    #[inline]
    pub(crate) fn pending(&mut self) -> u32 {
        if self.local != self.consumer {
            self.consumer = self.shared.consumer().load(Ordering::Acquire);
        }
        self.local.wrapping_sub(self.consumer)
    }

    /// True if the kernel sleeps until it is called.
    #[inline]
    pub(crate) fn needs_wakeup(&self) -> bool {
        self.shared.needs_wakeup()
    }
}

/// A ring that we empty: rx and completion.
#[derive(Debug)]
pub(crate) struct Consumer<T> {
    shared: Shared<T>,
    /// Our counter, ahead of the shared one by what is not yet released.
    local: u32,
    /// The kernel's counter as last seen.
    producer: u32,
}

impl<T: Copy> Consumer<T> {
    pub(crate) fn map(fd: BorrowedFd<'_>, size: u32, offset: &RingOffset, page: i64) -> io::Result<Consumer<T>> {
        Ok(Consumer { shared: Shared::map(fd, size, offset, page)?, local: 0, producer: 0 })
    }

    /// True if the kernel has put an entry there that was not taken.
    pub(crate) fn has_next(&mut self) -> bool {
        self.producer = self.shared.producer().load(Ordering::Acquire);
        self.local != self.producer
    }

    /// The next entry, if the kernel has put one there.
    #[inline]
    pub(crate) fn pop(&mut self) -> Option<T> {
        if self.local == self.producer {
            self.producer = self.shared.producer().load(Ordering::Acquire);
            if self.local == self.producer {
                return None;
            }
        }
        // SAFETY: the entry lies before the producer's counter, read with acquire, so it is written and ours until the
        // release store in `release`.
        let entry = unsafe { self.shared.entry(self.local).read() };
        self.local = self.local.wrapping_add(1);
        Some(entry)
    }

    /// Gives everything popped back to the kernel.
    #[inline]
    pub(crate) fn release(&mut self) {
        self.shared.consumer().store(self.local, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFFSET: RingOffset = RingOffset { producer: 0, consumer: 64, flags: 128, desc: 192 };

    /// A producer and a consumer over the same memory: each the mock of the kernel for the other.
    fn pair(size: u32) -> (Producer<u64>, Consumer<u64>) {
        let bytes = 192 + size as usize * 8;
        let producer = Shared::over(Mapping { base: sys::map_anonymous(bytes).unwrap(), bytes }, size, &OFFSET);
        let consumer = Shared {
            producer: producer.producer,
            consumer: producer.consumer,
            flags: producer.flags,
            entries: producer.entries,
            size,
            _mapping: Mapping { base: sys::map_anonymous(4096).unwrap(), bytes: 4096 },
        };
        (Producer { shared: producer, local: 0, consumer: 0 }, Consumer { shared: consumer, local: 0, producer: 0 })
    }

    #[test]
    fn entries_arrive_once_and_in_order_past_the_wrap() {
        let (mut producer, mut consumer) = pair(8);
        let (mut next_in, mut next_out) = (0_u64, 0_u64);
        for round in 0..1000_u32 {
            let burst = (round % 9).min(producer.free(round % 9));
            for _ in 0..burst {
                producer.push(next_in);
                next_in += 1;
            }
            assert_eq!(consumer.pop().is_none(), next_in - u64::from(burst) == next_out, "unsubmitted is not seen");
            consumer.local = next_out as u32;
            producer.submit();
            for _ in 0..round % 5 {
                if let Some(entry) = consumer.pop() {
                    assert_eq!(entry, next_out);
                    next_out += 1;
                }
            }
            consumer.release();
            assert_eq!(u64::from(producer.pending()), next_in - next_out);
        }
        assert!(next_out > 500);
    }

    #[test]
    fn a_full_ring_says_so() {
        let (mut producer, mut consumer) = pair(4);
        assert_eq!(producer.free(8), 4);
        (0..4).for_each(|i| producer.push(i));
        producer.submit();
        assert_eq!(producer.free(1), 0);
        consumer.pop();
        assert_eq!(producer.free(1), 0, "not before it is released");
        consumer.release();
        assert_eq!(producer.free(1), 1);
    }

    #[test]
    fn counters_wrap_at_32_bits() {
        let (mut producer, mut consumer) = pair(4);
        let near = u32::MAX - 1;
        producer.shared.producer().store(near, Ordering::Relaxed);
        producer.shared.consumer().store(near, Ordering::Relaxed);
        (producer.local, producer.consumer, consumer.local, consumer.producer) = (near, near, near, near);
        for i in 0..16 {
            assert_eq!(producer.free(4), 4);
            producer.push(i);
            producer.submit();
            assert_eq!(consumer.pop(), Some(i));
            consumer.release();
        }
    }
}
