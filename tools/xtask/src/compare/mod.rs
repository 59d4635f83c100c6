//! `cargo xtask compare`: the switch beside other switches, and beside what forwards without looking, in one run.
//!
//! Each round builds every system in turn, in namespaces of its own, and measures every case on it, so that what else the
//! machine does falls on all of them. Figures are medians over the rounds.

mod cases;
mod plot;
mod results;
mod systems;

use std::fs;

use anyhow::{Context, bail};
use clap::Args;
use xtask::lab::{self, Lab};

use cases::{Case, Figure};
use results::Results;
use systems::{Site, System, Topology};

const PREFIX: &str = "vswcmp";

/// What to compare.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Only the case of this name, or those whose names begin like this; `--list` prints all. May be given several times.
    #[arg(long)]
    case: Vec<String>,
    /// Only these systems. May be given several times.
    #[arg(long)]
    system: Vec<String>,
    /// How often each case runs on each system.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    rounds: u32,
    /// Seconds of a case.
    #[arg(long, default_value_t = 2.0, value_parser = parse_seconds)]
    seconds: f64,
    /// Print the cases and systems, and run nothing.
    #[arg(long)]
    list: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Write benches/RESULTS.md, results.json and results.svg.
    #[arg(long)]
    write: bool,
}

impl Options {
    /// Prints what can be chosen, if that was asked for.
    pub(crate) fn list(&self) -> bool {
        if self.list {
            Case::all().iter().for_each(|case| println!("{}", case.name()));
            println!("systems: {}", System::ALL.map(System::name).join(" "));
            println!("\n{}", results::CASES);
        }
        self.list
    }

    /// Looks whether what was chosen is there, before anything is built for it.
    ///
    /// # Errors
    ///
    /// The first name that is not.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        chosen_cases(&self.case)?;
        chosen_systems(&self.system)?;
        Ok(())
    }
}

/// Runs what was chosen.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    if let Some(reason) = lab::missing_privilege() {
        bail!("{reason}");
    }
    let chosen = [&options.case[..], &options.system].concat();
    let mut results = Results {
        machine: results::machine(),
        chosen,
        rounds: options.rounds,
        seconds: options.seconds,
        ..Results::default()
    };
    let cases = chosen_cases(&options.case)?;
    let mut systems = chosen_systems(&options.system)?;
    systems.retain(|system| match system.missing() {
        Some(reason) => {
            results.failures.push(format!("{}: {reason}", system.name()));
            false
        }
        None => true,
    });
    for round in 1..=options.rounds {
        for &system in &systems {
            measure(system, &cases, options.seconds, round, &mut results);
        }
    }
    if options.json {
        println!("{:#}", results.to_json());
    } else {
        println!("{}", results.table());
        if let Some(targets) = results.targets() {
            println!("\n{targets}");
        }
        results.failures.iter().for_each(|failure| println!("not measured: {failure}"));
    }
    if options.write {
        let directory = lab::workspace().join("benches");
        let write = |name: &str, text: String| {
            let file = directory.join(name);
            fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))
        };
        write("RESULTS.md", results.to_markdown())?;
        write("results.json", format!("{:#}\n", results.to_json()))?;
        plot::write(&results, &directory.join("results.svg"))?;
    }
    Ok(())
}

/// All cases of one system, topology by topology. What fails is said, and the rest goes on.
fn measure(system: System, cases: &[Case], seconds: f64, round: u32, results: &mut Results) {
    let mut rest: Vec<Case> = cases.iter().copied().filter(|case| case.is_for(system)).collect();
    while let Some(first) = rest.first() {
        let topology = first.topology();
        let here: Vec<Case> = rest.extract_if(.., |case| case.topology() == topology).collect();
        let mut site = match build(system, topology) {
            Ok(site) => site,
            Err(error) => {
                fail(results, format!("{topology:?} on {}: {error:#}", system.name()));
                continue;
            }
        };
        for case in here {
            let what = format!("{} on {}", case.name(), system.name());
            match case.measure(&mut site, seconds) {
                Ok(figures) => {
                    eprintln!(
                        "round {round}: {what}: {}",
                        figures.iter().map(Figure::to_text).collect::<Vec<_>>().join(", ")
                    );
                    results.add(system, &case.name(), figures);
                }
                Err(error) => fail(results, format!("{what}: {error:#}")),
            }
        }
    }
}

fn fail(results: &mut Results, failure: String) {
    eprintln!("{failure}");
    if !results.failures.contains(&failure) {
        results.failures.push(failure);
    }
}

fn build(system: System, topology: Topology) -> anyhow::Result<Site> {
    system.build(topology, Lab::new(PREFIX)?)
}

fn chosen_cases(names: &[String]) -> anyhow::Result<Vec<Case>> {
    let mut cases = Case::all();
    let is_whole = |name: &String| Case::all().iter().any(|case| case.name() == *name);
    let means = |name: &String, case: &Case| match is_whole(name) {
        true => case.name() == *name,
        false => case.name().starts_with(name.as_str()),
    };
    for name in names {
        if !cases.iter().any(|case| means(name, case)) {
            bail!("--case {name}: no case begins like that; `cargo xtask compare --list` prints all");
        }
    }
    cases.retain(|case| names.is_empty() || names.iter().any(|name| means(name, case)));
    Ok(cases)
}

fn chosen_systems(names: &[String]) -> anyhow::Result<Vec<System>> {
    let mut systems = System::ALL.to_vec();
    for name in names {
        if !systems.iter().any(|system| system.name() == name) {
            bail!("--system {name}: there is no such system; there are {}", System::ALL.map(System::name).join(", "));
        }
    }
    systems.retain(|system| names.is_empty() || names.iter().any(|name| name == system.name()));
    Ok(systems)
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.5..=600.0).contains(&seconds) => Ok(seconds),
        _ => Err("allowed are 0.5 to 600 seconds".to_owned()),
    }
}
