//! The generator's clock, and the line a second that says how it goes.

use std::time::{Duration, Instant};

use crate::{Count, Time};

/// Time since the start of a run.
#[derive(Debug)]
pub(crate) struct Clock {
    start: Instant,
    time: Time,
    /// When the next line is due, and what was counted at the last one.
    next: Duration,
    before: Count,
}

impl Clock {
    #[expect(clippy::disallowed_methods, reason = "a generator owns its clock")]
    pub(crate) fn start(time: Time) -> Clock {
        Clock { start: Instant::now(), time, next: SECOND, before: Count::default() }
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    pub(crate) fn is_over(&self) -> bool {
        self.elapsed() >= self.time.duration()
    }

    /// Prints a line to standard error, once a second, if it was asked for.
    pub(crate) fn progress(&mut self, count: &Count) {
        if !self.time.progress {
            return;
        }
        let elapsed = self.elapsed();
        if elapsed < self.next {
            return;
        }
        let seconds = (elapsed + SECOND).saturating_sub(self.next).as_secs_f64();
        let (packets, bytes) = (count.packets - self.before.packets, count.bytes - self.before.bytes);
        eprintln!(
            "{:6.1} s: {:.3} Mpps, {:.3} Gbit/s",
            elapsed.as_secs_f64(),
            packets as f64 / seconds / 1e6,
            bytes as f64 * 8.0 / seconds / 1e9
        );
        self.before = *count;
        self.next = elapsed + SECOND;
    }
}

const SECOND: Duration = Duration::from_secs(1);

/// CLOCK_MONOTONIC, which all processes of a machine and the kernel's programs read alike.
pub(crate) fn monotonic_ns() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
