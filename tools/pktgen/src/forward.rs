//! `pktgen forward`: the do-nothing forwarder.

use xsk_rs::FrameDesc;

use crate::clock::Clock;
use crate::link::{Direction, Link};
use crate::{Count, Time};

/// Moves packets both ways, and counts them.
pub(crate) fn run(from: &str, to: &str, time: Time) -> anyhow::Result<Count> {
    let [mut from, mut to] = Link::open([from, to], Direction::Both)?;
    let mut count = Count::default();
    let mut burst = Vec::new();
    let mut clock = Clock::start(time);
    while !clock.is_over() {
        let there = pass(&mut from, &mut to, &mut burst, &mut count)?;
        let back = pass(&mut to, &mut from, &mut burst, &mut count)?;
        if there + back == 0 {
            from.wait(0)?;
        }
        clock.progress(&count);
    }
    count.seconds = clock.elapsed().as_secs_f64();
    Ok(count)
}

/// One burst from one link to the other. Both share a umem, so no byte is copied; each keeps as many frames as it had.
fn pass(from: &mut Link, to: &mut Link, burst: &mut Vec<FrameDesc>, count: &mut Count) -> anyhow::Result<usize> {
    from.receive(burst);
    let received = burst.len();
    if received > 0 {
        count.bytes += burst.iter().map(|frame| frame.lengths().data() as u64).sum::<u64>();
        let sent = to.send(burst)?;
        count.packets += sent as u64;
        count.refused += burst.len() as u64;
        from.free.append(burst);
    } else {
        to.wake()?;
    }
    // Frames that `to` has sent came from `from`, and go back there.
    let before = to.free.len();
    to.reclaim();
    from.free.extend(to.free.drain(before..));
    from.refill();
    Ok(received)
}
