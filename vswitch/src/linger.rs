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
//! How long is learned, as KVM learns how long to poll before a halt (kernel document `virt/kvm/halt-polling.rst`): a sleep that a packet
//! ended soon was too early, so the next one is put off for longer; one that lasted was right, and the next comes sooner. Pings and
//! requests then find the worker awake, and a quiet node's worker sleeps at once.
//!
//! A worker that is busy for much of its time does not linger: what it would gain is little beside its work, and the core is better
//! given to those who make and take the packets.

/// A sleep that a packet ends within this time would have been better spent awake. Also the longest time to linger.
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
    until_ns: Option<u64>,
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
        !self.is_busy && now_ns < *self.until_ns.get_or_insert(now_ns + self.span_ns)
    }

    /// There is something to do: what comes after it is another time.
    pub(crate) fn interrupt(&mut self) {
        self.until_ns = None;
    }

    /// Takes in how long a sleep was, and whether a packet ended it.
    pub(crate) fn learn(&mut self, slept_ns: u64, is_packet: bool) {
        self.until_ns = None;
        if slept_ns > WORTH_NS {
            self.span_ns /= 2;
            if self.span_ns < LEAST_NS {
                self.span_ns = 0;
            }
        } else if is_packet {
            self.span_ns = (self.span_ns * 2).clamp(LEAST_NS, WORTH_NS);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_sleeps_make_it_linger_and_long_ones_do_not() {
        let mut linger = Linger::default();
        assert!(!linger.goes_on(1000, 0), "nothing was learned yet");
        for _ in 0..10 {
            linger.learn(30_000, true);
        }
        assert!(linger.goes_on(5000, 0));
        assert!(linger.goes_on(5000 + WORTH_NS - 1, 0));
        assert!(!linger.goes_on(5000 + WORTH_NS, 0));
        linger.interrupt();
        assert!(linger.goes_on(5000 + WORTH_NS, 0), "counted anew after something came");
        for _ in 0..4 {
            linger.learn(400_000, true);
        }
        assert!(!linger.goes_on(9_000_000, 0));
    }

    #[test]
    fn who_is_busy_does_not_linger() {
        let mut linger = Linger::default();
        linger.learn(30_000, true);
        assert!(linger.goes_on(WINDOW_NS, WINDOW_NS / 10));
        linger.interrupt();
        assert!(!linger.goes_on(2 * WINDOW_NS, WINDOW_NS / 10 + WINDOW_NS * 3 / 4));
        assert!(linger.goes_on(3 * WINDOW_NS, WINDOW_NS / 10 + WINDOW_NS * 3 / 4), "and does again when that is over");
    }

    #[test]
    fn commands_and_timers_teach_nothing() {
        let mut linger = Linger::default();
        linger.learn(10, false);
        assert!(!linger.goes_on(1, 0));
    }
}
