//! How many frames a socket keeps in its fill ring: few while it is quiet, more as they are used up, for as long as memory lasts.

use crate::frame::MAX_FRAMES;
use crate::umem::{Reserve, Umem};

/// Frames of a quiet socket: a burst of 64 small packets, or three of 64 kB.
pub(crate) const FILL_MIN: u32 = 64;

/// The same for the socket of a link that many share, as an uplink: what all of them send while a worker wakes up.
const FILL_MIN_SHARED: u32 = 512;

/// Of a umem, as a divisor, what such sockets of one link may keep at most together while they are quiet.
const SHARE_DIVISOR: usize = 16;

/// Frames of a busy socket: 2,048 small packets or 120 of 64 kB may come before the worker's next look.
const FILL_MAX: u32 = 2048;

/// A deep ring's share of what such rings may take, as a divisor.
const DEEP_DIVISOR: usize = 2;

/// Bursts that found the fill ring nearly full until it is made half as deep: minutes of a port with something to do, for the next
/// flood may come while the worker sleeps; and the same for one that has more than its share, so that others get theirs.
const EASY_BURSTS: u32 = 1_000_000;
const EASY_BURSTS_BEYOND_SHARE: u32 = 10_000;

/// What a fill ring shall hold.
#[derive(Debug)]
pub(crate) struct FillDepth {
    target: u32,
    min: u32,
    /// Bursts in a row that found it nearly full.
    easy_bursts: u32,
}

impl FillDepth {
    /// Of a socket that is new.
    pub(crate) fn new() -> FillDepth {
        FillDepth { target: FILL_MIN, min: FILL_MIN, easy_bursts: 0 }
    }

    /// Of one of so many sockets of a link that many share.
    pub(crate) fn of_many(umem: &Umem, sockets: usize) -> FillDepth {
        let share = ((umem.chunks() / SHARE_DIVISOR / sockets.max(1)).max(1) as u32).next_power_of_two();
        let min = share.clamp(FILL_MIN, FILL_MIN_SHARED);
        FillDepth { target: min, min, easy_bursts: 0 }
    }

    /// Frames, a power of two.
    #[inline(always)]
    pub(crate) fn frames(&self) -> u32 {
        self.target
    }

    /// Fits it to the use that a burst shows, which left `pending` frames for the kernel: doubled when that had used up half of it
    /// since the last look, as far as its share of what is free goes; halved after many looks that found it nearly full.
    #[inline]
    pub(crate) fn fit(&mut self, pending: u32, umem: &Umem) {
        let share = umem.free_beyond(Reserve::DeepRings) / DEEP_DIVISOR;
        let depth = self.target as usize;
        if pending * 2 < self.target {
            self.easy_bursts = 0;
            if self.target < FILL_MAX && depth * 2 <= share {
                self.target *= 2;
            }
        } else if pending * 8 > self.target * 7 && self.target > self.min {
            self.easy_bursts += 1;
            if self.easy_bursts >= if depth > share { EASY_BURSTS_BEYOND_SHARE } else { EASY_BURSTS } {
                self.easy_bursts = 0;
                self.target /= 2;
            }
        }
    }
}

const _: () = assert!(MAX_FRAMES as u32 <= FILL_MIN && FILL_MIN.is_power_of_two() && FILL_MAX.is_power_of_two());

#[cfg(test)]
mod tests {
    use std::iter;

    use super::*;
    use crate::frame::Frame;

    /// A ring that is used up between two looks, and filled again.
    fn use_up(ring: &mut (FillDepth, Vec<Frame>), umem: &mut Umem) {
        ring.0.fit(0, umem);
        ring.1.extend(iter::from_fn(|| umem.alloc()).take(ring.0.frames() as usize - ring.1.len()));
    }

    #[test]
    fn busy_rings_grow_and_leave_others_their_part() {
        let mut umem = Umem::new(8192).expect("memory");
        let quiet = |umem: &mut Umem| iter::from_fn(|| umem.alloc()).take(FILL_MIN as usize).collect();
        let mut rings: Vec<_> = (0..20).map(|_| (FillDepth::new(), quiet(&mut umem))).collect();
        (0..10).for_each(|_| use_up(&mut rings[0], &mut umem));
        assert_eq!(rings[0].0.frames(), FILL_MAX / 2, "half of what is free beyond a quarter");
        for step in 0..200 {
            use_up(&mut rings[step % 20], &mut umem);
            assert!(umem.free_beyond(Reserve::DeepRings) > 0, "{step}: {} free", umem.free_chunks());
        }
        assert!(rings.iter().all(|(depth, _)| depth.frames() > FILL_MIN), "{rings:?}");
        // Who has more than the share that is left gives it back soon, and no more than that.
        let share = umem.free_beyond(Reserve::DeepRings) / DEEP_DIVISOR;
        let depth = &mut rings[0].0;
        (0..3 * EASY_BURSTS_BEYOND_SHARE).for_each(|_| depth.fit(depth.frames(), &umem));
        assert!(depth.frames() < FILL_MAX / 2 && depth.frames() as usize * 2 > share, "{depth:?} {share}");
        rings.into_iter().flat_map(|(_, frames)| frames).for_each(|frame| umem.free(frame));
        assert_eq!(umem.free_chunks(), 8192);
    }

    #[test]
    fn a_ring_keeps_its_depth_through_minutes_of_little_to_do() {
        let umem = Umem::new(8192).expect("memory");
        let mut depth = FillDepth::new();
        (0..5).for_each(|_| depth.fit(0, &umem));
        assert_eq!(depth.frames(), FILL_MAX);
        (0..EASY_BURSTS - 1).for_each(|_| depth.fit(FILL_MAX, &umem));
        assert_eq!(depth.frames(), FILL_MAX);
        depth.fit(FILL_MAX, &umem);
        assert_eq!(depth.frames(), FILL_MAX / 2);
        (0..20 * EASY_BURSTS).for_each(|_| depth.fit(depth.frames(), &umem));
        assert_eq!(depth.frames(), FILL_MIN);
        assert_eq!(FillDepth::of_many(&umem, 2).frames(), 256);
    }
}
