//! Rates: a token bucket that workers share without a lock.
//!
//! # What
//!
//! The generic cell rate algorithm (ITU-T I.371, annex A): one number, the time at which the bucket would be full again.
//! A packet moves it on by what the packet costs; a packet that would move it further than the burst ahead of now is too
//! much. Equivalent to a token bucket, with nothing to refill.
//!
//! # Thread-safety
//!
//! One atomic word, changed by compare-and-swap; it orders nothing else, so all accesses are relaxed. Two workers that
//! send for one port at once both pay.

use std::sync::atomic::{AtomicU64, Ordering};

const SECOND_NS: u64 = 1_000_000_000;

/// A bucket. What it counts, bits or packets, is its owner's.
#[derive(Debug)]
pub struct Bucket {
    /// Units a second.
    rate: u64,
    /// How far ahead of now the bucket may be, ns.
    burst_ns: u64,
    full_at_ns: AtomicU64,
}

impl Bucket {
    /// A full bucket of `burst` units that gains `rate` units a second. A rate of zero is taken for one.
    pub fn new(rate: u64, burst: u64) -> Bucket {
        let rate = rate.max(1);
        Bucket { rate, burst_ns: time_of(burst, rate), full_at_ns: AtomicU64::new(0) }
    }

    /// How long the bucket takes to gain `units`, ns.
    pub fn time_of(&self, units: u64) -> u64 {
        time_of(units, self.rate)
    }

    /// Takes `units` out, if they are there.
    #[inline]
    pub fn take(&self, now_ns: u64, units: u64) -> bool {
        let cost = time_of(units, self.rate);
        let mut full_at = self.full_at_ns.load(Ordering::Relaxed);
        loop {
            let next = full_at.max(now_ns).saturating_add(cost);
            // A packet larger than the whole burst passes when the bucket is full, or it never would.
            if next - now_ns > self.burst_ns && full_at > now_ns {
                return false;
            }
            match self.full_at_ns.compare_exchange_weak(full_at, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(other) => full_at = other,
            }
        }
    }
}

fn time_of(units: u64, rate: u64) -> u64 {
    u64::try_from(u128::from(units) * u128::from(SECOND_NS) / u128::from(rate)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_then_the_rate() {
        let bucket = Bucket::new(1000, 10);
        assert_eq!((0..100).filter(|_| bucket.take(5, 1)).count(), 10);
        // A millisecond a unit.
        assert!(!bucket.take(900_000, 1));
        assert!(bucket.take(1_000_005, 1));
        assert!(!bucket.take(1_000_006, 1));
        let passed = (0..10_000_u64).filter(|at| bucket.take(SECOND_NS + at * 100_000, 1)).count();
        assert!((1000..=1011).contains(&passed), "{passed} in one second");
    }

    #[test]
    fn what_is_larger_than_the_burst_passes_alone() {
        let bucket = Bucket::new(8000, 100);
        assert!(bucket.take(0, 12_000));
        assert!(!bucket.take(SECOND_NS, 1), "and is paid for");
        assert!(bucket.take(SECOND_NS * 3 / 2, 1));
    }

    #[test]
    fn workers_share_it() {
        let bucket = Bucket::new(1, 1000);
        let passed: usize = std::thread::scope(|scope| {
            let work = || (0..1000).filter(|_| bucket.take(7, 1)).count();
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(work)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(passed, 1000);
    }
}
