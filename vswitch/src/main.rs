//! vswitchd: the daemon of a node. Threads, clock, sockets and files around control and the data path.
#![forbid(unsafe_code)]

mod backend;
mod config;
mod cores;
mod daemon;
mod follow;
mod host;
mod judging;
mod linger;
mod server;
mod store;
mod tasks;
mod uplink;
mod worker;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use crate::config::Config;

/// A userspace virtual switch on AF_XDP: the daemon of a node.
#[derive(Debug, Parser)]
#[command(name = "vswitchd", version)]
struct Arguments {
    /// The configuration file; `config/vswitch.toml` documents every key.
    #[arg(long, short, default_value = "/etc/vswitch/vswitch.toml")]
    config: PathBuf,
    /// Reads and checks the configuration, and ends. Links are looked for at start only.
    #[arg(long)]
    check: bool,
}

/// 0: ended by a signal, or the configuration is fine. 1: the configuration was refused. 2: the daemon failed.
fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_env("VSWITCH_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    let config = match Config::read(&arguments.config) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("vswitchd: {error}");
            return ExitCode::from(1);
        }
    };
    if arguments.check {
        if let Err(error) = daemon::check(&config) {
            eprintln!("vswitchd: {}: {}", arguments.config.display(), vswitch_api::sentence(error.as_ref()));
            return ExitCode::from(1);
        }
        config.doubts().iter().for_each(|doubt| eprintln!("vswitchd: {doubt}"));
        println!("{} is fine", arguments.config.display());
        return ExitCode::SUCCESS;
    }
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vswitchd: {}", vswitch_api::sentence(error.as_ref()));
            ExitCode::from(2)
        }
    }
}

fn run(config: Config) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, daemon::run(config))
}
