//! `pktgen send` and `pktgen replay`, over AF_XDP.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use pcap_file::pcap::PcapReader;

use crate::clock::{Clock, monotonic_ns};
use crate::link::{BURST, Direction, Link};
use crate::traffic::{Plan, Traffic};
use crate::{Count, Time, kernel};

/// Most packets of a capture that are replayed.
const MAX_REPLAYED: usize = 1_000_000;

/// `pktgen send`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The link to send from, in this network namespace.
    #[arg(long)]
    link: String,
    /// Make the packets in the kernel: several million a second on one core. A veth's other end must run XDP or GRO.
    #[arg(long)]
    kernel: bool,
    #[command(flatten)]
    traffic: Traffic,
    #[command(flatten)]
    time: Time,
}

/// `pktgen replay`.
#[derive(Debug, Args)]
pub(crate) struct ReplayOptions {
    /// The link to send from, in this network namespace.
    #[arg(long)]
    link: String,
    /// A pcap file of Ethernet frames.
    #[arg(long)]
    file: PathBuf,
    /// Packets a second; as fast as it goes unless named.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    rate: Option<u64>,
    /// Begin again at its end, as long as there is time.
    #[arg(long = "loop")]
    repeats: bool,
    #[command(flatten)]
    time: Time,
}

/// Sends for as long as asked.
pub(crate) fn run(options: &Options) -> anyhow::Result<Count> {
    let Options { link, traffic, time, .. } = options;
    let plan = traffic.plan()?;
    if options.kernel {
        return kernel::generate(link, &plan, traffic, *time);
    }
    let mut at = Place::default();
    pump(link, traffic.rate, *time, |buffer| {
        let template = &plan.templates[usize::from(plan.pattern[at.size])];
        buffer.clear();
        buffer.extend_from_slice(&template.bytes);
        let stamp = traffic.stamp.filter(|every| at.packet.is_multiple_of(u64::from(*every)));
        template.patch(buffer, at.flow, stamp.map(|_| monotonic_ns()));
        at.step(&plan);
        true
    })
}

/// Sends what a capture holds.
pub(crate) fn replay(options: &ReplayOptions) -> anyhow::Result<Count> {
    let packets = read(&options.file)?;
    let mut next = 0;
    pump(&options.link, options.rate, options.time, |buffer| {
        if next == packets.len() {
            if !options.repeats {
                return false;
            }
            next = 0;
        }
        buffer.clear();
        buffer.extend_from_slice(&packets[next]);
        next += 1;
        true
    })
}

/// Which packet is next.
#[derive(Debug, Default)]
struct Place {
    packet: u64,
    flow: u32,
    size: usize,
}

impl Place {
    fn step(&mut self, plan: &Plan) {
        self.packet += 1;
        self.flow = (self.flow + 1) % plan.flows;
        self.size = (self.size + 1) % plan.pattern.len();
    }
}

/// Sends what `next` writes, until it says false or the time is over.
fn pump(
    name: &str,
    rate: Option<u64>,
    time: Time,
    mut next: impl FnMut(&mut Vec<u8>) -> bool,
) -> anyhow::Result<Count> {
    let [mut link] = Link::open([name], Direction::SendOnly)?;
    let mut count = Count::default();
    let mut clock = Clock::start(time);
    let mut buffer = Vec::new();
    let (mut burst, mut bytes) = (Vec::with_capacity(BURST), Vec::with_capacity(BURST));
    let mut is_done = false;
    while !(clock.is_over() || is_done && burst.is_empty()) {
        let due = rate.map_or(u64::MAX, |rate| due(rate, clock.elapsed()).saturating_sub(count.packets));
        link.reclaim();
        while !is_done
            && (burst.len() as u64) < due.min(BURST as u64)
            && let Some(mut frame) = link.free.pop()
        {
            is_done = !next(&mut buffer);
            if is_done {
                link.free.push(frame);
                break;
            }
            link.write(&mut frame, &buffer)?;
            bytes.push(buffer.len() as u64);
            burst.push(frame);
        }
        if burst.is_empty() {
            link.wake()?;
            continue;
        }
        // What finds no room is kept and offered again: nothing is made twice, and every stamp says when it was first due.
        let sent = link.send(&mut burst)?;
        count.packets += sent as u64;
        count.bytes += bytes.drain(..sent).sum::<u64>();
        clock.progress(&count);
    }
    count.refused = burst.len() as u64;
    count.seconds = clock.elapsed().as_secs_f64();
    // What still lies in the ring goes out, or is given up after a moment.
    let end = clock.elapsed() + Duration::from_millis(100);
    while clock.elapsed() < end {
        link.wake()?;
        link.reclaim();
    }
    Ok(count)
}

fn read(file: &Path) -> anyhow::Result<Vec<Vec<u8>>> {
    let name = file.display();
    let reader = File::open(file).with_context(|| format!("cannot open {name}"))?;
    let mut reader = PcapReader::new(reader).with_context(|| {
        format!("{name} is no pcap file: write one by `tcpdump -w`, or `editcap -F pcap` from pcapng")
    })?;
    if reader.header().datalink != pcap_file::DataLink::ETHERNET {
        bail!("{name} has frames of {:?}: only Ethernet can be sent", reader.header().datalink);
    }
    let mut packets = Vec::new();
    while let Some(packet) = reader.next_packet() {
        let packet = packet.with_context(|| format!("{name}, packet {}", packets.len() + 1))?;
        if packet.data.len() != packet.orig_len as usize {
            bail!("{name}, packet {}: cut off when it was captured; capture with `tcpdump -s 0`", packets.len() + 1);
        }
        packets.push(packet.data.into_owned());
        if packets.len() > MAX_REPLAYED {
            bail!("{name} has more than {MAX_REPLAYED} packets: cut it, with `editcap -r` say");
        }
    }
    if packets.is_empty() {
        bail!("{name} has no packets");
    }
    Ok(packets)
}

fn due(rate: u64, elapsed: Duration) -> u64 {
    (rate as f64 * elapsed.as_secs_f64()) as u64
}
