//! pktgen: sends, counts, forwards and times packets.
//!
//! Over AF_XDP it is built on xsk-rs, on purpose another implementation than the switch's own, so that one checks the other.
//! `forward` does nothing but move packets between two links: it is the ceiling that a switch is measured against;
//! `redirect` has the kernel do the same, and is the ceiling of that.
#![deny(unsafe_code)]

mod clock;
mod forward;
mod kernel;
mod latency;
mod link;
mod rtt;
mod send;
mod sink;
mod template;
mod traffic;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use serde_json::{Value, json};

/// Sends, counts, forwards and times packets.
///
/// A run says how many packets there were, at which rate over its whole time (`sink --warm` begins to count later), and how many
/// were refused: had no room where they should go, or got no answer. Ctrl-C ends it early.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Print the result as JSON.
    #[arg(long, global = true)]
    json: bool,
    /// Run on this core.
    #[arg(long, global = true)]
    core: Option<usize>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Sends UDP packets out of a link.
    Send(send::Options),
    /// Sends the packets of a capture.
    Replay(send::ReplayOptions),
    /// Receives and counts packets of a link.
    Sink(sink::Options),
    /// Moves packets between two links, both ways, and looks at none.
    Forward(Pair),
    /// Has the kernel redirect packets between two links, by XDP.
    ///
    /// The other ends of both must be able to take them: a veth's needs `ethtool -K IFNAME gro on`, or an XDP program.
    Redirect(Pair),
    /// Times round trips to `pktgen answer`.
    Rtt(rtt::Options),
    /// Answers `pktgen rtt`, over UDP and TCP.
    Answer {
        /// Where to listen.
        #[arg(long)]
        at: SocketAddr,
        #[command(flatten)]
        time: Time,
    },
}

#[derive(Debug, Args)]
struct Pair {
    /// One link.
    #[arg(long)]
    from: String,
    /// The other.
    #[arg(long)]
    to: String,
    #[command(flatten)]
    time: Time,
}

#[derive(Clone, Copy, Debug, Args)]
struct Time {
    /// How long, in seconds; at most an hour.
    #[arg(long, default_value_t = 10.0, value_parser = parse_seconds)]
    seconds: f64,
    /// Say once a second, on standard error, how it goes.
    #[arg(long)]
    progress: bool,
}

impl Time {
    fn of(seconds: f64) -> Time {
        Time { seconds, progress: false }
    }

    fn duration(self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }
}

/// What was counted.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    packets: u64,
    bytes: u64,
    /// Packets that could not be sent, questions without an answer.
    refused: u64,
    seconds: f64,
    latency: latency::Summary,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(count) => {
            print(&count, arguments.json);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("pktgen: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<Count> {
    clock::end_on_signal()?;
    if let Some(id) = arguments.core
        && !core_affinity::set_for_current(core_affinity::CoreId { id })
    {
        anyhow::bail!("--core {id}: not allowed here; `taskset -p $$` shows the cores that are");
    }
    match &arguments.command {
        Command::Send(options) => send::run(options),
        Command::Replay(options) => send::replay(options),
        Command::Sink(options) => sink::run(options),
        Command::Rtt(options) => rtt::run(options),
        Command::Answer { at, time } => rtt::answer(*at, *time),
        Command::Forward(Pair { from, to, .. }) | Command::Redirect(Pair { from, to, .. }) if from == to => {
            anyhow::bail!("--from and --to are both {from}: name two links")
        }
        Command::Forward(Pair { from, to, time }) => forward::run(from, to, *time),
        Command::Redirect(Pair { from, to, time }) => kernel::redirect(from, to, *time),
    }
}

fn print(count: &Count, as_json: bool) {
    let seconds = count.seconds.max(1e-9);
    let (pps, bps) = (count.packets as f64 / seconds, count.bytes as f64 * 8.0 / seconds);
    let has_latency = count.latency.samples > 0;
    if as_json {
        let mut object: Value = json!({
            "packets": count.packets, "bytes": count.bytes, "refused": count.refused,
            "seconds": count.seconds, "packets_per_second": pps, "bits_per_second": bps,
        });
        if has_latency {
            object["latency"] = count.latency.to_json();
        }
        println!("{object}");
        return;
    }
    let rate = clock::rate(pps, bps);
    println!("{} packets in {:.2} s: {rate}; {} refused", count.packets, count.seconds, count.refused);
    if has_latency {
        println!("{}", count.latency.to_text());
    }
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if seconds > 0.0 && seconds <= 3600.0 => Ok(seconds),
        _ => Err("allowed are more than 0 and at most 3600 seconds".to_owned()),
    }
}

fn parse_warm(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.0..=60.0).contains(&seconds) => Ok(seconds),
        _ => Err("allowed are 0 to 60 seconds".to_owned()),
    }
}
