//! How long a worker with nothing to do stays awake.
//!
//! # What
//!
//! A sleep costs two switches of context and, on an idle core, the way out of a halt: tens of microseconds that an answer waits for.
//! So a worker lingers before it sleeps: it looks whether a packet came, and gives the core to whoever else wants it
//! (`sched_yield(2)`) between two looks.
//!
//! # Why this way
//!
//! How long is learned, as KVM learns how long to poll before a halt (kernel document `virt/kvm/halt-polling.rst`). A packet that ended
//! a sleep tells how long there was nothing to do: if that was short, staying awake would have been better, and the next sleep is put off
//! for longer; if it was long, lingering is in vain, and the next sleep comes sooner. Pings and requests then find the worker awake, and
//! a quiet node's worker sleeps at once.
//!
//! A worker that is busy for much of its time does not linger: what it would gain is little beside its work, and the core is better
//! given to those who make and take the packets.

/// A packet that comes within this time after the last is better awaited awake. Also the longest time to linger.
const WORTH_NS: u64 = 100_000;

/// Where lingering starts, and below which it is not worth it.
const LEAST_NS: u64 = 12_500;

/// Share of time, as a divisor, from which on a worker counts as busy, and over how long that is looked at.
const BUSY_DIVISOR: u64 = 3;
const WINDOW_NS: u64 = 1_000_000;

/// What one worker has learned.
#[derive(Debug, Default)]
pub(crate) struct Linger {
    span_ns: u64,
    /// Since when there has been nothing to do.
    idle_from_ns: Option<u64>,
    /// When the last window began, and how long the worker had been busy in all by then.
    window: (u64, u64),
    is_busy: bool,
}

impl Linger {
    /// True if a worker that finds nothing to do at `now_ns`, and was busy for `busy_ns` since it started, stays awake.
    pub(crate) fn goes_on(&mut self, now_ns: u64, busy_ns: u64) -> bool {
        let (from_ns, busy_before_ns) = self.window;
        if now_ns - from_ns >= WINDOW_NS {
            self.is_busy = (busy_ns - busy_before_ns) * BUSY_DIVISOR > now_ns - from_ns;
            self.window = (now_ns, busy_ns);
        }
        let idle_from_ns = *self.idle_from_ns.get_or_insert(now_ns);
        !self.is_busy && now_ns < idle_from_ns + self.span_ns
    }

    /// There is something to do: what comes after it is another time.
    pub(crate) fn interrupt(&mut self) {
        self.idle_from_ns = None;
    }

    /// Takes in that a packet ended a sleep at `now_ns`. What else ends one, a command or a timeout, teaches nothing.
    pub(crate) fn learn(&mut self, now_ns: u64) {
        let Some(idle_from_ns) = self.idle_from_ns else { return };
        if now_ns - idle_from_ns <= WORTH_NS {
            self.span_ns = (self.span_ns * 2).clamp(LEAST_NS, WORTH_NS);
        } else {
            self.span_ns /= 2;
            if self.span_ns < LEAST_NS {
                self.span_ns = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A worker that meets a packet after each of so many gaps, and is never busy; how long it lingered in all.
    fn lingered(linger: &mut Linger, now_ns: &mut u64, gap_ns: u64, count: usize) -> u64 {
        const STEP_NS: u64 = 500;
        let mut total = 0;
        for _ in 0..count {
            linger.interrupt();
            let arrival_ns = *now_ns + gap_ns;
            while *now_ns < arrival_ns && linger.goes_on(*now_ns, 0) {
                *now_ns += STEP_NS;
                total += STEP_NS;
            }
            if *now_ns < arrival_ns {
                *now_ns = arrival_ns;
                linger.learn(*now_ns);
            }
        }
        total
    }

    #[test]
    fn it_lingers_for_what_comes_soon_and_not_for_what_does_not() {
        let (mut linger, mut now_ns) = (Linger::default(), 0);
        let mut lingered = |linger: &mut Linger, gap_ns, count| lingered(linger, &mut now_ns, gap_ns, count);
        lingered(&mut linger, 60_000, 20);
        assert_eq!(linger.span_ns, WORTH_NS, "long enough to meet every packet");
        assert_eq!(lingered(&mut linger, 60_000, 10), 600_000, "awake all the time");
        // A gap that is longer than it would ever linger, though the sleep at its end is short.
        lingered(&mut linger, 150_000, 10);
        assert_eq!(linger.span_ns, 0);
        assert_eq!(lingered(&mut linger, 150_000, 100), 0, "nothing is spent on what it gains nothing from");
    }

    #[test]
    fn timeouts_do_not_begin_it_anew() {
        let mut linger = Linger::default();
        linger.goes_on(0, 0);
        linger.learn(30_000);
        linger.interrupt();
        assert!(linger.goes_on(1_000_000, 0));
        assert!(!linger.goes_on(1_000_000 + LEAST_NS, 0));
        assert!(!linger.goes_on(2_500_000, 0), "after a sleep that nothing ended");
    }

    #[test]
    fn who_is_busy_does_not_linger() {
        let mut linger = Linger { span_ns: WORTH_NS, ..Linger::default() };
        assert!(linger.goes_on(WINDOW_NS, WINDOW_NS / 10));
        linger.interrupt();
        assert!(!linger.goes_on(2 * WINDOW_NS, WINDOW_NS / 10 + WINDOW_NS / 2));
        linger.interrupt();
        assert!(linger.goes_on(3 * WINDOW_NS, WINDOW_NS / 10 + WINDOW_NS / 2), "and does again when that is over");
    }
}
