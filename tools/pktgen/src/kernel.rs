//! What runs in the kernel: a generator over live frames of `BPF_PROG_TEST_RUN` (kernel document `bpf/bpf_prog_run`), a
//! counting sink, and a redirect between two links.

use anyhow::{Context, anyhow, bail};
use aya::Ebpf;
use aya::maps::{Array, DevMap, MapData, PerCpuArray};
use aya::programs::{Xdp, XdpMode};
use aya::{EbpfLoader, TestRun, TestRunAttrs, TestRunOptions};
use hdrhistogram::Histogram;
use rustix::net::{AddressFamily, SocketType};

use crate::clock::Clock;
use crate::template::{FIRST_SOURCE, SOURCES, Template};
use crate::traffic::{Plan, Traffic};
use crate::{Count, Time, latency};

static GENERATE: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/generate.o"));
static COUNT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/count.o"));
static REDIRECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/redirect.o"));

/// Live frames of one round in the kernel.
const BATCH: u32 = 64;

/// Frames of the first run, by which the rate is known. A run costs tens of milliseconds to set up; but what is to keep a rate
/// shall not last longer than asked either.
const FIRST_RUN: u32 = 2_000_000;
const FIRST_RUN_AT_RATE: u32 = 200_000;

/// Sizes of `struct template`, `struct settings`, and where things are in them.
const MAX_HEADERS: usize = 160;
const TEMPLATE_BYTES: usize = 16 + MAX_HEADERS;
const SETTINGS_BYTES: usize = 40 + 16;

/// Largest packet: a page without the kernel's head and tail room.
const MAX_SIZE: usize = 3400;

/// As in `count.c`.
const STEP_BITS: u32 = 6;
const STEPS: u64 = 1 << STEP_BITS;

/// Has the kernel make packets and redirect them to a link.
pub(crate) fn generate(link: &str, plan: &Plan, traffic: &Traffic, time: Time) -> anyhow::Result<Count> {
    let size = plan.templates.iter().map(|template| template.bytes.len()).max().unwrap_or(0);
    if size > MAX_SIZE {
        return Err(anyhow!("--size {size}: a packet of --kernel has at most {MAX_SIZE} bytes"));
    }
    // Headers are written in words of eight bytes.
    for template in &plan.templates {
        let headers = header_bytes(template, traffic.stamp.is_some()).next_multiple_of(8);
        if headers > template.bytes.len() {
            bail!("--size {}: a packet of --kernel like this has at least {headers} bytes", template.bytes.len());
        }
    }
    let mut ebpf = load(GENERATE)?;
    let mut templates: Array<_, [u8; TEMPLATE_BYTES]> = map(&mut ebpf, "TEMPLATES")?;
    for (at, template) in plan.templates.iter().enumerate() {
        templates.set(at as u32, encode_template(template, traffic.stamp.is_some()), 0)?;
    }
    let mut settings: Array<_, [u8; SETTINGS_BYTES]> = map(&mut ebpf, "SETTINGS")?;
    settings.set(0, encode_settings(index_of(link)?, size, plan, traffic), 0)?;
    let progress: Array<_, [u64; 4]> = map(&mut ebpf, "PROGRESS")?;
    let program: &mut Xdp = ebpf.program_mut("generate").context("the object has no program")?.try_into()?;
    program.load().context("cannot load the generator: run as root")?;
    let frame = vec![0; size];
    let mut clock = Clock::start(time);
    let mut count = Count::default();
    let mut run = if traffic.rate.is_some() { FIRST_RUN_AT_RATE } else { FIRST_RUN };
    let mut frames = 0_u64;
    while !clock.is_over() {
        let mut options = TestRunOptions::new();
        options.data_in = Some(&frame);
        options.repeat = run;
        options.attrs = TestRunAttrs::new().xdp_live_frames(BATCH);
        program.test_run(options).context(
            "the kernel does not run live frames: it needs Linux 5.18 or newer, and the link's other end XDP or GRO",
        )?;
        frames += u64::from(run);
        let [packets, bytes, ..] = progress.get(&0, 0)?;
        (count.packets, count.bytes, count.seconds) = (packets, bytes, clock.elapsed().as_secs_f64());
        clock.progress(&count);
        // The rest in one run, if it goes on like that; in runs of a second where each is to be told of.
        let left = if time.progress { 1.0 } else { (time.seconds - count.seconds).max(0.0) };
        run = (frames as f64 / count.seconds * left).clamp(f64::from(BATCH), 4e9) as u32;
    }
    Ok(count)
}

/// Counts what a link receives, in the kernel.
pub(crate) fn count(link: &str, warm: f64, time: Time) -> anyhow::Result<(Count, Histogram<u64>)> {
    let mut ebpf = load(COUNT)?;
    let counts: PerCpuArray<_, [u64; 2]> = map(&mut ebpf, "COUNT")?;
    let latencies: PerCpuArray<_, u64> = map(&mut ebpf, "LATENCY")?;
    attach(&mut ebpf, "count", link)?;
    wait(&Clock::start(Time::of(warm)));
    // What takes its time first, then the count, then the clock.
    let earlier = samples(&latencies)?;
    let before = total(&counts)?;
    let mut clock = Clock::start(time);
    let mut count = Count::default();
    while !clock.is_over() {
        std::thread::park_timeout(std::time::Duration::from_millis(5));
        if time.progress {
            let [packets, bytes] = total(&counts)?;
            (count.packets, count.bytes) = (packets - before[0], bytes - before[1]);
            clock.progress(&count);
        }
    }
    count.seconds = clock.elapsed().as_secs_f64();
    let [packets, bytes] = total(&counts)?;
    (count.packets, count.bytes) = (packets - before[0], bytes - before[1]);
    let mut latency = latency::histogram();
    for (bucket, (after, before)) in samples(&latencies)?.into_iter().zip(earlier).enumerate() {
        if after > before {
            latency.saturating_record_n(middle_of(bucket as u64), after - before);
        }
    }
    Ok((count, latency))
}

/// Redirects everything between two links, for as long as asked. Packets are counted when they are handed to the other link.
pub(crate) fn redirect(from: &str, to: &str, time: Time) -> anyhow::Result<Count> {
    let mut attached = Vec::new();
    let mut counts = Vec::new();
    for (here, there) in [(from, to), (to, from)] {
        let mut ebpf = load(REDIRECT)?;
        let mut other: DevMap<MapData> = ebpf.take_map("OTHER").context("the object has no map OTHER")?.try_into()?;
        other.set(0, index_of(there)?, None, 0)?;
        let of_link: PerCpuArray<_, [u64; 2]> = map(&mut ebpf, "COUNT")?;
        attach(&mut ebpf, "redirect", here)?;
        counts.push(of_link);
        attached.push((ebpf, other));
    }
    let mut clock = Clock::start(time);
    let mut count = Count::default();
    while !clock.is_over() {
        std::thread::park_timeout(std::time::Duration::from_millis(5));
        if time.progress {
            add_up(&counts, &mut count)?;
            clock.progress(&count);
        }
    }
    count.seconds = clock.elapsed().as_secs_f64();
    add_up(&counts, &mut count)?;
    Ok(count)
}

fn add_up(counts: &[PerCpuArray<MapData, [u64; 2]>], count: &mut Count) -> anyhow::Result<()> {
    (count.packets, count.bytes) = (0, 0);
    for of_link in counts {
        let [packets, bytes] = total(of_link)?;
        (count.packets, count.bytes) = (count.packets + packets, count.bytes + bytes);
    }
    Ok(())
}

fn load(object: &[u8]) -> anyhow::Result<Ebpf> {
    EbpfLoader::new().btf(None).load(object).context("cannot load the XDP program: run as root")
}

fn map<M>(ebpf: &mut Ebpf, name: &str) -> anyhow::Result<M>
where
    M: TryFrom<aya::maps::Map, Error = aya::maps::MapError>,
{
    Ok(ebpf.take_map(name).with_context(|| format!("the object has no map {name}"))?.try_into()?)
}

fn attach(ebpf: &mut Ebpf, name: &str, link: &str) -> anyhow::Result<()> {
    let program: &mut Xdp = ebpf.program_mut(name).context("the object has no program")?.try_into()?;
    program.load().context("cannot load the XDP program: run as root")?;
    program.attach(link, XdpMode::Driver).with_context(|| {
        format!(
            "cannot attach to {link}: is it there, and has it no XDP program (`ip link show`; `ip link set {link} xdp off` takes one off)?"
        )
    })?;
    Ok(())
}

fn index_of(link: &str) -> anyhow::Result<u32> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    rustix::net::netdevice::name_to_index(socket, link)
        .with_context(|| format!("there is no link {link} in this network namespace"))
}

fn wait(clock: &Clock) {
    while !clock.is_over() {
        std::thread::park_timeout(std::time::Duration::from_millis(5));
    }
}

/// Packets and bytes over all cores.
fn total(counts: &PerCpuArray<MapData, [u64; 2]>) -> anyhow::Result<[u64; 2]> {
    let each = counts.get(&0, 0)?;
    Ok(each.iter().fold([0, 0], |sum, count| [sum[0] + count[0], sum[1] + count[1]]))
}

/// The histogram of `count.c`, over all cores.
fn samples(latencies: &PerCpuArray<MapData, u64>) -> anyhow::Result<Vec<u64>> {
    (0..latencies.len()).map(|at| Ok(latencies.get(&at, 0)?.iter().sum())).collect()
}

/// The value in the middle of a bucket: the reverse of `bucket_of` in `count.c`.
fn middle_of(bucket: u64) -> u64 {
    if bucket < STEPS {
        return bucket;
    }
    let (shift, step) = (bucket / STEPS - 1, bucket % STEPS + STEPS);
    (step << shift) + ((1_u64 << shift) >> 1)
}

/// Bytes that are written anew for each packet. A frame is used again and again: where a stamp was, the next packet writes
/// zeros.
fn header_bytes(template: &Template, is_stamped: bool) -> usize {
    let stamp = template.stamp.as_ref().filter(|_| is_stamped);
    stamp.map_or(template.udp + 8, |stamp| stamp.end)
}

/// `struct template` of `generate.c`.
fn encode_template(template: &Template, is_stamped: bool) -> [u8; TEMPLATE_BYTES] {
    let stamp = template.stamp.clone().filter(|_| is_stamped);
    let headers = header_bytes(template, is_stamped);
    let mut value = [0; TEMPLATE_BYTES];
    value[..4].copy_from_slice(&(template.bytes.len() as u32).to_ne_bytes());
    value[4..6].copy_from_slice(&(headers as u16).to_ne_bytes());
    value[6..8].copy_from_slice(&(template.udp as u16).to_ne_bytes());
    value[8..10].copy_from_slice(&(template.entropy.unwrap_or(0) as u16).to_ne_bytes());
    value[10..12].copy_from_slice(&(stamp.map_or(0, |stamp| stamp.start) as u16).to_ne_bytes());
    // There words are added as they lie.
    let sum = u16::from_ne_bytes((template.sum as u16).to_be_bytes());
    value[12..16].copy_from_slice(&u32::from(sum).to_ne_bytes());
    let bytes = &template.bytes[..headers.min(template.bytes.len()).min(MAX_HEADERS)];
    value[16..16 + bytes.len()].copy_from_slice(bytes);
    value
}

/// `struct settings` of `generate.c`.
fn encode_settings(ifindex: u32, size: usize, plan: &Plan, traffic: &Traffic) -> [u8; SETTINGS_BYTES] {
    let mut value = [0; SETTINGS_BYTES];
    let words = [ifindex, size as u32, plan.flows, plan.pattern.len() as u32, traffic.stamp.unwrap_or(0)];
    for (at, word) in words.into_iter().enumerate() {
        value[at * 4..at * 4 + 4].copy_from_slice(&word.to_ne_bytes());
    }
    value[20..22].copy_from_slice(&FIRST_SOURCE.to_ne_bytes());
    value[22..24].copy_from_slice(&plan.port.to_ne_bytes());
    value[24..28].copy_from_slice(&SOURCES.to_ne_bytes());
    let interval = traffic.rate.map_or(0, |rate| (1_000_000_000_u64 << 16) / rate);
    value[32..40].copy_from_slice(&interval.to_ne_bytes());
    value[40..40 + plan.pattern.len()].copy_from_slice(&plan.pattern);
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_and_their_middles_agree() {
        for (bucket, ns) in [(0, 0), (63, 63), (64, 64), (127, 127), (128, 129), (129, 131), (192, 258)] {
            assert_eq!(middle_of(bucket), ns, "{bucket}");
        }
        assert!((0..2560).map(middle_of).is_sorted());
    }
}
