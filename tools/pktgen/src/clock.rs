//! The generator's clock, and the line a second that says how it goes.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::{Count, Time};

/// Whether the run was interrupted.
static INTERRUPTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// Has SIGINT and SIGTERM end a run as its time does: what was counted is printed, and links are left as they were. A second one
/// ends the program at once.
///
/// # Errors
///
/// Those of `sigaction(2)`.
pub(crate) fn end_on_signal() -> std::io::Result<()> {
    let flag = INTERRUPTED.get_or_init(Arc::default);
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 130, flag.clone())?;
        signal_hook::flag::register(signal, flag.clone())?;
    }
    Ok(())
}

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
            || INTERRUPTED.get().is_some_and(|interrupted| interrupted.load(Ordering::Relaxed))
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
        let rate = rate(packets as f64 / seconds, bytes as f64 * 8.0 / seconds);
        eprintln!("{:6.1} s: {rate}", elapsed.as_secs_f64());
        self.before = *count;
        self.next = elapsed + SECOND;
    }
}

/// Packets and bits a second, in units that say something.
pub(crate) fn rate(pps: f64, bps: f64) -> String {
    let packets = if pps < 1e5 { format!("{pps:.0} packets/s") } else { format!("{:.3} Mpps", pps / 1e6) };
    let bits = if bps < 1e8 { format!("{:.3} Mbit/s", bps / 1e6) } else { format!("{:.3} Gbit/s", bps / 1e9) };
    format!("{packets}, {bits}")
}

const SECOND: Duration = Duration::from_secs(1);

/// CLOCK_MONOTONIC, which all processes of a machine and the kernel's programs read alike.
pub(crate) fn monotonic_ns() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
