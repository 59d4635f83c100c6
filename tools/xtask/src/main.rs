//! `cargo xtask`: setup, demo, compare, test and ci. Each does all that it needs.
#![forbid(unsafe_code)]

mod compare;
mod demo;

use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};
use xtask::{lab, setup};

/// The project's tasks.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Installs the Debian packages that are missing, and says which.
    Setup,
    /// Two nodes with two pods each: traffic of all kinds, and a verdict a line.
    Demo {
        /// Leave it up to explore.
        #[arg(long)]
        keep: bool,
        /// Remove what --keep left.
        #[arg(long, conflicts_with = "keep")]
        down: bool,
        /// Print the table as JSON.
        #[arg(long)]
        json: bool,
    },
    /// The switch beside other switches: rates, latency, TCP, CPU, as medians and ratios.
    Compare(compare::Options),
    /// Runs every test: units, in memory, and in network namespaces.
    Test,
    /// Formatting, lints and every test, as continuous integration does.
    Ci,
}

/// Programs that demo and namespace tests run, built for release.
const PROGRAMS: &[&str] = &["vswitch", "vswitch-cni", "switchctl", "pktgen"];

fn main() -> ExitCode {
    match run(Arguments::parse().task) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(task: Task) -> anyhow::Result<bool> {
    match task {
        Task::Setup => setup::run()?,
        Task::Demo { down: true, .. } => demo::down(),
        Task::Demo { keep, json, .. } => {
            setup::run()?;
            build(&PROGRAMS[..3])?;
            return demo::run(keep, json);
        }
        Task::Compare(options) if options.list() => {}
        Task::Compare(options) => {
            options.check()?;
            setup::run()?;
            build(PROGRAMS)?;
            compare::run(&options)?;
        }
        Task::Test => test()?,
        Task::Ci => {
            setup::run()?;
            cargo(&["fmt", "--all", "--check"])?;
            cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"])?;
            test()?;
        }
    }
    Ok(true)
}

fn test() -> anyhow::Result<()> {
    setup::run()?;
    build(PROGRAMS)?;
    cargo(&["test", "--workspace"])
}

fn build(packages: &[&str]) -> anyhow::Result<()> {
    let packages = packages.iter().flat_map(|package| ["-p", package]);
    cargo(&["build", "--release", "--quiet"].into_iter().chain(packages).collect::<Vec<_>>())
}

fn cargo(arguments: &[&str]) -> anyhow::Result<()> {
    eprintln!("+ cargo {}", arguments.join(" "));
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let status =
        Command::new(cargo).args(arguments).current_dir(lab::workspace()).status().context("cannot run cargo")?;
    if !status.success() {
        bail!("cargo {} failed ({status})", arguments[0]);
    }
    Ok(())
}
