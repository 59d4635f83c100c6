//! `pktgen sink`.

use std::time::{Duration, Instant};

use crate::Count;
use crate::link::{Direction, Link};

/// Counts what a link receives.
#[expect(clippy::disallowed_methods, reason = "a generator owns its clock")]
pub(crate) fn run(name: &str, time: Duration) -> anyhow::Result<Count> {
    let [mut link] = Link::open([name], Direction::Both)?;
    let mut count = Count::default();
    let mut received = Vec::new();
    let start = Instant::now();
    while start.elapsed() < time {
        if link.receive(&mut received) == 0 {
            link.wait(10)?;
            continue;
        }
        count.packets += received.len() as u64;
        count.bytes += received.iter().map(|frame| frame.lengths().data() as u64).sum::<u64>();
        link.free.append(&mut received);
        link.refill();
    }
    count.seconds = start.elapsed().as_secs_f64();
    Ok(count)
}
