//! `pktgen sink`: counts what a link receives, and how long stamped packets took.

use std::path::PathBuf;

use clap::Args;
use hdrhistogram::Histogram;

use crate::clock::{Clock, monotonic_ns};
use crate::link::{Direction, Link};
use crate::template::stamp_of;
use crate::{Count, Time, kernel, latency};

/// `pktgen sink`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The link.
    #[arg(long)]
    link: String,
    /// Count in the kernel, UDP alone: no process has to keep up.
    #[arg(long)]
    kernel: bool,
    /// Seconds that pass before it counts.
    #[arg(long, default_value_t = 0.0, value_parser = crate::parse_warm)]
    warm: f64,
    /// Write the latencies of stamped packets to this file, in HdrHistogram's log format (nanoseconds).
    #[arg(long)]
    hdr: Option<PathBuf>,
    #[command(flatten)]
    time: Time,
}

/// Counts what a link receives.
pub(crate) fn run(options: &Options) -> anyhow::Result<Count> {
    let (count, latency) =
        if options.kernel { kernel::count(&options.link, options.warm, options.time)? } else { receive(options)? };
    if let Some(file) = &options.hdr {
        latency::write(&latency, file)?;
    }
    Ok(Count { latency: latency::Summary::of(&latency), ..count })
}

fn receive(options: &Options) -> anyhow::Result<(Count, Histogram<u64>)> {
    let [mut link] = Link::open([options.link.as_str()], Direction::Both)?;
    let mut count = Count::default();
    let mut latency = latency::histogram();
    let mut received = Vec::new();
    let mut warm = Some(Clock::start(Time::of(options.warm)));
    let mut clock = Clock::start(options.time);
    loop {
        if warm.as_ref().is_some_and(Clock::is_over) {
            (warm, count) = (None, Count::default());
            latency.reset();
            clock = Clock::start(options.time);
        }
        if warm.is_none() && clock.is_over() {
            break;
        }
        if link.receive(&mut received) == 0 {
            link.wait(1)?;
            continue;
        }
        let now_ns = monotonic_ns();
        for frame in &received {
            let data = link.read(frame);
            count.packets += 1;
            count.bytes += data.len() as u64;
            if let Some(sent_ns) = stamp_of(data) {
                latency.saturating_record(now_ns.saturating_sub(sent_ns));
            }
        }
        link.free.append(&mut received);
        link.refill();
        if warm.is_none() {
            clock.progress(&count);
        }
    }
    count.seconds = clock.elapsed().as_secs_f64();
    Ok((count, latency))
}
