//! `switchctl perf`: where the workers' time goes.

use std::io::{self, Write};
use std::thread;
use std::time::Duration;

use clap::Args;
use vswitch_api::{Answer, Client, PerfInfo, Request};

use crate::output::{row, table};

/// Sizes of bursts, as the daemon tells them apart.
const BURSTS: [&str; 7] = ["1", "2-3", "4-7", "8-15", "16-31", "32-63", "64"];

/// What to look at.
#[derive(Debug, Args)]
pub(crate) struct PerfArguments {
    /// Look for so many seconds.
    #[arg(long, default_value_t = 1.0, value_parser = parse_seconds)]
    seconds: f64,
    /// All since the workers started, at once.
    #[arg(long, conflicts_with = "seconds")]
    total: bool,
}

/// Asks twice, and gives what happened in between.
pub(crate) fn perf(client: &mut Client, arguments: &PerfArguments) -> anyhow::Result<Answer> {
    let earlier = client.call(Request::Perf)?;
    if arguments.total {
        return Ok(earlier);
    }
    thread::park_timeout(Duration::from_secs_f64(arguments.seconds));
    Ok(match (earlier, client.call(Request::Perf)?) {
        (Answer::Perf { workers: earlier }, Answer::Perf { workers }) => {
            let none = PerfInfo::default();
            let since = |(at, now): (usize, &PerfInfo)| now.since(earlier.get(at).unwrap_or(&none));
            Answer::Perf { workers: workers.iter().enumerate().map(since).collect() }
        }
        (_, other) => other,
    })
}

/// Prints each worker's page.
pub(crate) fn print(out: &mut impl Write, workers: &[PerfInfo]) -> io::Result<()> {
    for (at, worker) in workers.iter().enumerate() {
        if at > 0 {
            writeln!(out)?;
        }
        print_worker(out, worker)?;
    }
    Ok(())
}

fn print_worker(out: &mut impl Write, perf: &PerfInfo) -> io::Result<()> {
    let all_ns = perf.busy_ns + perf.idle_ns + perf.asleep_ns;
    let seconds = all_ns as f64 / 1e9;
    let core = perf.core.map_or_else(|| "not pinned".to_owned(), |core| format!("core {core}"));
    let [busy, idle, asleep] = [perf.busy_ns, perf.idle_ns, perf.asleep_ns].map(|ns| percent(ns, all_ns));
    writeln!(
        out,
        "worker {}, {core}, {seconds:.2} s: busy {busy}, idle {idle}, asleep {asleep}; {} turns, {} sleeps",
        perf.worker, perf.turns, perf.sleeps
    )?;
    let lookups = perf.flow_hits + perf.flow_misses;
    writeln!(
        out,
        "  {} packets, {:.3} Mpps; {} of flow lookups hit",
        perf.packets,
        perf.packets as f64 / seconds.max(1e-9) / 1e6,
        percent(perf.flow_hits, lookups)
    )?;
    if perf.offloaded > 0 {
        let rate = perf.offloaded as f64 / seconds.max(1e-9) / 1e6;
        writeln!(out, "  {} more were forwarded in the kernel, {rate:.3} Mpps", perf.offloaded)?;
    }
    if perf.timed_packets > 0 && perf.cycles > 0 {
        let ns_a_cycle = all_ns as f64 / perf.cycles as f64;
        let all: u64 = perf.stages.iter().map(|stage| stage.cycles).sum();
        let a_packet = |cycles: u64| cycles as f64 / perf.timed_packets as f64;
        let line = |name: &str, cycles: u64| {
            let each = a_packet(cycles);
            row([&name, &format!("{each:.0}"), &format!("{:.0}", each * ns_a_cycle), &percent(cycles, all)])
        };
        let stages = perf.stages.iter().map(|stage| line(&stage.stage, stage.cycles));
        writeln!(out)?;
        let head = ["  STAGE", "CYCLES A PACKET", "NANOSECONDS", "SHARE"];
        let lines = stages.chain([line("all", all)]).map(|mut cells| {
            cells[0].insert_str(0, "  ");
            cells
        });
        table(out, head, lines)?;
        writeln!(
            out,
            "  ({} packets were timed: one turn in 31 is; cycles are ticks of the processor's counter; transmit is mostly the kernel's,\n  \
             who delivers to a pod's link within the call)",
            perf.timed_packets
        )?;
    }
    let bursts: u64 = perf.bursts.iter().sum();
    if bursts > 0 {
        let sizes = BURSTS.iter().zip(&perf.bursts).filter(|(_, count)| **count > 0);
        let sizes: Vec<String> = sizes.map(|(size, &count)| format!("{size}: {}", percent(count, bursts))).collect();
        let mean = perf.packets as f64 / bursts as f64;
        writeln!(out, "\n  {mean:.1} packets a burst; bursts of {}", sizes.join(", "))?;
    }
    Ok(())
}

fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "-".to_owned() } else { format!("{:.1} %", part as f64 * 100.0 / whole as f64) }
}

pub(crate) fn parse_seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("allowed are 0.1 to 3600 seconds".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vswitch_api::StageInfo;

    #[test]
    fn a_page_says_what_the_numbers_mean() {
        let stage = |stage: &str, cycles| StageInfo { stage: stage.into(), cycles };
        let perf = PerfInfo {
            core: Some(1),
            busy_ns: 750_000_000,
            idle_ns: 150_000_000,
            asleep_ns: 100_000_000,
            cycles: 2_000_000_000,
            packets: 640,
            offloaded: 2_000_000,
            flow_hits: 630,
            flow_misses: 10,
            bursts: vec![0, 0, 0, 0, 0, 0, 10],
            timed_packets: 64,
            stages: vec![stage("parse", 6400), stage("transmit", 57_600)],
            ..PerfInfo::default()
        };
        let mut page = Vec::new();
        print(&mut page, &[perf, PerfInfo::default()]).unwrap();
        let page = String::from_utf8(page).unwrap();
        for part in [
            "worker 0, core 1, 1.00 s: busy 75.0 %, idle 15.0 %, asleep 10.0 %",
            "640 packets, 0.001 Mpps; 98.4 % of flow lookups hit",
            "2000000 more were forwarded in the kernel, 2.000 Mpps",
            "64.0 packets a burst; bursts of 64: 100.0 %",
            "worker 0, not pinned, 0.00 s: busy -",
        ] {
            assert!(page.contains(part), "{part} in {page}");
        }
        let cells: Vec<Vec<&str>> = page.lines().map(|line| line.split_whitespace().collect()).collect();
        assert!(cells.contains(&vec!["parse", "100", "50", "10.0", "%"]), "{page}");
        assert!(cells.contains(&vec!["all", "1000", "500", "100.0", "%"]), "{page}");
    }
}
