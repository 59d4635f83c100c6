//! `pktgen send`.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use clap::Args;
use vswitch_net::MacAddr;

use crate::link::{BURST, Direction, Link};
use crate::template::{Shape, packets};
use crate::{Count, Time};

/// Bytes of a frame behind the kernel's headroom.
const MAX_SIZE: usize = 3840;

/// What to send.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The link to send from, in this network namespace.
    #[arg(long)]
    link: String,
    /// Source MAC address.
    #[arg(long)]
    source_mac: MacAddr,
    /// Destination MAC address; a routed pod's gateway unless named.
    #[arg(long, default_value_t = vswitch_net::GATEWAY_MAC)]
    destination_mac: MacAddr,
    /// Source address.
    #[arg(long)]
    source: IpAddr,
    /// Destination address.
    #[arg(long)]
    destination: IpAddr,
    /// Destination UDP port.
    #[arg(long, default_value_t = 9)]
    port: u16,
    /// Bytes of a packet from its Ethernet header on.
    #[arg(long, default_value_t = 64, value_parser = parse_size)]
    size: usize,
    /// Flows, told apart by their source ports.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    flows: u16,
    /// Packets a second; as fast as it goes unless named.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    rate: Option<u64>,
    #[command(flatten)]
    time: Time,
}

/// Sends for as long as asked.
#[expect(clippy::disallowed_methods, reason = "a generator owns its clock")]
pub(crate) fn run(options: &Options) -> anyhow::Result<Count> {
    let shape = Shape {
        macs: (options.source_mac, options.destination_mac),
        addresses: (options.source, options.destination),
        port: options.port,
        size: options.size,
    };
    let packets = packets(&shape, options.flows)?;
    let [mut link] = Link::open([options.link.as_str()], Direction::SendOnly)?;
    let mut count = Count::default();
    let mut next = packets.iter().cycle();
    let mut burst = Vec::with_capacity(BURST);
    let start = Instant::now();
    loop {
        let elapsed = start.elapsed();
        if elapsed >= options.time.duration() {
            count.seconds = elapsed.as_secs_f64();
            break;
        }
        let due = options.rate.map_or(u64::MAX, |rate| due(rate, elapsed).saturating_sub(count.packets));
        link.reclaim();
        while (burst.len() as u64) < due.min(BURST as u64)
            && let Some(mut frame) = link.free.pop()
        {
            let packet = next.next().map_or(&[][..], Vec::as_slice);
            link.write(&mut frame, packet)?;
            burst.push(frame);
        }
        if burst.is_empty() {
            link.wake()?;
            continue;
        }
        let sent = link.send(&mut burst)? as u64;
        count.packets += sent;
        count.bytes += sent * options.size as u64;
        link.free.append(&mut burst);
    }
    // What still lies in the ring goes out, or is given up after a moment.
    while start.elapsed() < options.time.duration() + Duration::from_millis(100) {
        link.wake()?;
        link.reclaim();
    }
    Ok(count)
}

fn parse_size(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(size) if size <= MAX_SIZE => Ok(size),
        _ => Err(format!("allowed are at most {MAX_SIZE} bytes: a packet has one frame here")),
    }
}

fn due(rate: u64, elapsed: Duration) -> u64 {
    (rate as f64 * elapsed.as_secs_f64()) as u64
}
