//! pktgen: sends, counts or forwards packets over AF_XDP.
//!
//! Built on xsk-rs, on purpose another implementation of AF_XDP than the switch's own, so that one checks the other.
//! `forward` does nothing but move packets between two links: it is the ceiling that a switch is measured against.
#![deny(unsafe_code)]

mod forward;
mod link;
mod send;
mod sink;
mod template;

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use serde_json::{Value, json};

/// Sends, counts or forwards packets over AF_XDP.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Print the result as JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Sends UDP packets out of a link.
    Send(send::Options),
    /// Receives and counts packets of a link.
    Sink {
        /// The link.
        #[arg(long)]
        link: String,
        #[command(flatten)]
        time: Time,
    },
    /// Moves packets between two links, both ways, and looks at none.
    Forward {
        /// One link.
        #[arg(long)]
        from: String,
        /// The other.
        #[arg(long)]
        to: String,
        #[command(flatten)]
        time: Time,
    },
}

#[derive(Clone, Copy, Debug, Args)]
struct Time {
    /// How long, in seconds; at most an hour.
    #[arg(long, default_value_t = 10.0, value_parser = parse_seconds)]
    seconds: f64,
}

impl Time {
    fn duration(self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }
}

/// What was counted.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    packets: u64,
    bytes: u64,
    /// Packets that could not be sent.
    refused: u64,
    seconds: f64,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let counted = match &arguments.command {
        Command::Send(options) => send::run(options),
        Command::Sink { link, time } => sink::run(link, time.duration()),
        Command::Forward { from, to, time } => forward::run(from, to, time.duration()),
    };
    match counted {
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

fn print(count: &Count, as_json: bool) {
    let seconds = count.seconds.max(1e-9);
    let (pps, bps) = (count.packets as f64 / seconds, count.bytes as f64 * 8.0 / seconds);
    if as_json {
        let object: Value = json!({
            "packets": count.packets, "bytes": count.bytes, "refused": count.refused,
            "seconds": count.seconds, "packets_per_second": pps, "bits_per_second": bps,
        });
        println!("{object}");
    } else {
        println!(
            "{} packets in {:.2} s: {:.3} Mpps, {:.3} Gbit/s; {} refused",
            count.packets,
            count.seconds,
            pps / 1e6,
            bps / 1e9,
            count.refused
        );
    }
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if seconds > 0.0 && seconds <= 3600.0 => Ok(seconds),
        _ => Err("allowed are more than 0 and at most 3600 seconds".to_owned()),
    }
}
