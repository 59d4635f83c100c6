//! What was measured: medians, ratios, and how they look as a table, as JSON and against what we want.

use std::collections::BTreeMap;
use std::process::Command;

use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Value, json};

use super::cases::Figure;
use super::systems::System;

/// All that was measured.
#[derive(Debug, Default)]
pub(super) struct Results {
    pub(super) rows: Vec<Row>,
    /// What could not be measured, and why.
    pub(super) failures: Vec<String>,
    /// What the figures depend on, as it was before the first of them.
    pub(super) machine: Vec<(&'static str, String)>,
    /// What was chosen of all; empty for all.
    pub(super) chosen: Vec<String>,
    pub(super) rounds: u32,
    pub(super) seconds: f64,
}

/// One figure of one case, by system.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) name: String,
    pub(super) unit: &'static str,
    runs: BTreeMap<&'static str, Vec<f64>>,
}

/// What we want to be true: one figure beside another's.
struct Target {
    what: &'static str,
    ours: (System, &'static str),
    theirs: (System, &'static str),
    /// The ratio ours / theirs must be at least, or at most, this.
    bound: Bound,
}

enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

/// What the project wants to show.
const TARGETS: &[Target] = &[
    Target::new("64 B local", System::Vswitch, "rate/local/64/10000", System::Forward, Bound::AtLeast(0.95)),
    Target::new("64 B local", System::Vswitch, "rate/local/64/10000", System::Ovs, Bound::AtLeast(1.5)),
    Target::new("64 B local, offload", System::VswitchOffload, "rate/local/64/10000", System::Ovs, Bound::AtLeast(3.0)),
    Target::new(
        "64 B local, offload",
        System::VswitchOffload,
        "rate/local/64/10000",
        System::Bridge,
        Bound::AtLeast(2.5),
    ),
    Target::new("64 B over VXLAN, out", System::Vswitch, "rate/encap/64/10000", System::Bridge, Bound::AtLeast(2.0)),
    Target::new("64 B over VXLAN, in", System::Vswitch, "rate/decap/64/10000", System::Bridge, Bound::AtLeast(2.0)),
    Target::new("TCP local, 1 stream", System::Vswitch, "tcp/local/1", System::Ovs, Bound::AtLeast(5.0)),
    Target::new("TCP local, 4 streams", System::Vswitch, "tcp/local/4", System::Ovs, Bound::AtLeast(5.0)),
    Target::new("TCP local, 1 stream", System::Vswitch, "tcp/local/1", System::Bridge, Bound::AtLeast(0.9)),
    Target::new("TCP local, 4 streams", System::Vswitch, "tcp/local/4", System::Bridge, Bound::AtLeast(0.5)),
    Target::new(
        "TCP over VXLAN, wire 1500, 1 stream",
        System::Vswitch,
        "tcp/wire1500/1",
        System::Bridge,
        Bound::AtLeast(1.0),
    ),
    Target::new(
        "TCP over VXLAN, wire 1500, 4 streams",
        System::Vswitch,
        "tcp/wire1500/4",
        System::Bridge,
        Bound::AtLeast(1.0),
    ),
    Target::new(
        "64 B over VXLAN, out, offload",
        System::VswitchOffload,
        "rate/encap/64/10000",
        System::Bridge,
        Bound::AtLeast(4.0),
    ),
    Target::new(
        "64 B over VXLAN, in, offload",
        System::VswitchOffload,
        "rate/decap/64/10000",
        System::Bridge,
        Bound::AtLeast(4.0),
    ),
    Target::new(
        "TCP over VXLAN, wire 1500, 1 stream, offload",
        System::VswitchOffload,
        "tcp/wire1500/1",
        System::Bridge,
        Bound::AtLeast(1.0),
    ),
    Target::new("RTT p99, busy", System::VswitchBusy, "rtt/local/tcp p99", System::Bridge, Bound::AtMost(1.2)),
    Target::new("RTT p99, adaptive", System::Vswitch, "rtt/local/tcp p99", System::Bridge, Bound::AtMost(2.0)),
    Target {
        what: "250 idle ports beside 2 busy ones",
        ours: (System::Vswitch, "idle-ports/250 with"),
        theirs: (System::Vswitch, "idle-ports/250 without"),
        bound: Bound::AtLeast(0.95),
    },
];

impl Target {
    const fn new(what: &'static str, ours: System, row: &'static str, theirs: System, bound: Bound) -> Target {
        Target { what, ours: (ours, row), theirs: (theirs, row), bound }
    }
}

impl Row {
    /// The middle of a system's runs.
    pub(super) fn median(&self, system: System) -> Option<f64> {
        median(self.runs.get(system.name())?)
    }

    /// How far apart a system's runs are: the smallest and the largest.
    fn spread(&self, system: System) -> Option<(f64, f64)> {
        let runs = self.runs.get(system.name())?;
        Some((runs.iter().copied().reduce(f64::min)?, runs.iter().copied().reduce(f64::max)?))
    }
}

fn median(runs: &[f64]) -> Option<f64> {
    let mut sorted = runs.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len().checked_sub(1)? / 2;
    Some((sorted[middle] + sorted[sorted.len() / 2]) / 2.0)
}

impl Results {
    pub(super) fn add(&mut self, system: System, case: &str, figures: Vec<Figure>) {
        for Figure { name, unit, value } in figures {
            let name = if name.is_empty() { case.to_owned() } else { format!("{case} {name}") };
            let at = self.rows.iter().position(|row| row.name == name).unwrap_or_else(|| {
                self.rows.push(Row { name, unit, runs: BTreeMap::new() });
                self.rows.len() - 1
            });
            self.rows[at].runs.entry(system.name()).or_default().push(value);
        }
    }

    pub(super) fn row(&self, name: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.name == name)
    }

    /// Systems that were measured.
    pub(super) fn systems(&self) -> Vec<System> {
        let has = |system: &System| self.rows.iter().any(|row| row.runs.contains_key(system.name()));
        System::ALL.into_iter().filter(has).collect()
    }

    /// Medians, and how many times a system's figure ours is.
    pub(super) fn table(&self) -> Table {
        let systems = self.systems();
        let mut table = new_table();
        let names = systems.iter().map(|system| system.name().to_owned());
        table.set_header(["case".to_owned(), "unit".to_owned()].into_iter().chain(names));
        for row in &self.rows {
            let cells = systems.iter().map(|&system| self.cell(row, system));
            table.add_row([row.name.clone(), row.unit.to_owned()].into_iter().chain(cells));
        }
        align(&mut table, 2);
        table
    }

    fn cell(&self, row: &Row, system: System) -> String {
        let Some(value) = row.median(system) else { return "-".to_owned() };
        let ours = row.median(System::Vswitch).filter(|_| system != System::Vswitch && value > 0.0);
        match ours {
            Some(ours) => format!("{} ({:.2})", digits(value), ours / value),
            None => digits(value),
        }
    }

    /// What we want, and what it is.
    pub(super) fn targets(&self) -> Option<Table> {
        let mut table = new_table();
        table.set_header(["what", "of", "wanted", "measured", ""]);
        let value = |(system, row): (System, &str)| self.row(row)?.median(system);
        for target in TARGETS {
            let (Some(ours), Some(theirs)) = (value(target.ours), value(target.theirs)) else { continue };
            let ratio = ours / theirs;
            let (wanted, is_met) = match target.bound {
                Bound::AtLeast(bound) => (format!("at least {bound}"), ratio >= bound),
                Bound::AtMost(bound) => (format!("at most {bound}"), ratio <= bound),
            };
            let of = match target.ours.0 == target.theirs.0 {
                true => target.theirs.1.to_owned(),
                false => format!("{} / {}", target.ours.0.name(), target.theirs.0.name()),
            };
            let verdict = if is_met { "yes" } else { "no" };
            table.add_row([target.what.to_owned(), of, wanted, format!("{ratio:.2}"), verdict.to_owned()]);
        }
        table.row_iter().next()?;
        Some(table)
    }

    /// All runs, with what they were run on.
    pub(super) fn to_json(&self) -> Value {
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|row| {
                let systems: BTreeMap<&str, Value> = row
                    .runs
                    .iter()
                    .map(|(&name, runs)| (name, json!({"median": median(runs), "runs": runs})))
                    .collect();
                json!({"case": row.name, "unit": row.unit, "systems": systems})
            })
            .collect();
        json!({
            "machine": self.machine, "chosen": self.chosen, "rounds": self.rounds, "seconds": self.seconds, "cases": rows,
            "failures": self.failures,
        })
    }

    /// The document that is kept beside the benches.
    pub(super) fn to_markdown(&self) -> String {
        let mut text = String::from(
            "# Results\n\nWritten by `cargo xtask compare --write`; the plot is `results.svg`, every run is in `results.json`.\n\n",
        );
        for (key, value) in &self.machine {
            text += &format!("- {key}: {value}\n");
        }
        text += &format!(
            "- medians of {} rounds, {} s each, alternating between the systems\n\n",
            self.rounds, self.seconds
        );
        if !self.chosen.is_empty() {
            text += &format!("Only a part of all cases: {}.\n\n", self.chosen.join(" "));
        }
        text += SYSTEMS;
        if let Some(mut targets) = self.targets() {
            text += &format!("\n## What we want\n\n{}\n", targets.load_preset(presets::ASCII_MARKDOWN));
        }
        if self.targets().is_some() {
            text += "\nWhat is missed, and why, is in `vswitch/ARCHITECTURE.md`, \"What was tried\".\n";
        }
        text += "\n## All cases\n\n";
        text += CASES;
        text += "\nMedians. In brackets is the figure of `vswitch` divided by that of the column: 2.00 means that `vswitch` has twice as much, which is\nbetter for packets and bits a second, and worse for times, losses and CPU.\n\n";
        text += &format!("{}\n", self.table().load_preset(presets::ASCII_MARKDOWN));
        text += "\n## How far runs are apart\n\n";
        if self.rounds == 1 {
            text += "Not known: there was one round. Two runs on a shared machine are easily 15 % apart.\n";
        } else {
            text += "The smallest and the largest of `vswitch`.\n\n";
            for row in &self.rows {
                if let Some((low, high)) = row.spread(System::Vswitch) {
                    text += &format!("- {}: {} to {} {}\n", row.name, digits(low), digits(high), row.unit);
                }
            }
        }
        if !self.failures.is_empty() {
            text += "\n## Not measured\n\n";
            self.failures.iter().for_each(|failure| text += &format!("- {}\n", first_line(failure)));
        }
        text
    }
}

const SYSTEMS: &str = "\
`vswitch` is one worker as shipped, `vswitch-busy` one that never sleeps, `vswitch-2` two workers; all with policies of both
ends, connections, the check of senders and counters on. `bridge` is the kernel's, with its VXLAN device where a wire is
crossed; `ovs` Open vSwitch's userspace datapath on AF_XDP ports; `forward` moves packets between two AF_XDP sockets and does
nothing else; `redirect` has the kernel redirect them by XDP. The generator and all that the kernel does on reception run on
the first core, a switch's one worker on the last; two workers, and a second node's, take the core before it, which on two cores is
the generator's. iperf3 is not pinned. Pods are as each system's own documents make them: those of `vswitch` have links of 65,000
bytes and leave checksums to it, and `subnet_mtu` of six times the wire's (not with the offload); those of `bridge` have 1,500 bytes with all offloads; those of `ovs` and `forward`, whose AF_XDP
ports take neither partial checksums nor segments, 1,500 bytes and `tx off`.
";

/// What the names of cases mean.
pub(super) const CASES: &str = "\
`rate/WAY/BYTES/FLOWS`: packets a second of a flood of UDP that arrive, between two pods here (`local`), to the wire (`encap`) or from it
(`decap`). `tcp/PLACE/STREAMS`: iperf3, between pods here or over a wire of that MTU, with `/both` ways at once. `rtt/PLACE/HOW`: round
trips of four bytes between programs in pods, over one socket or a connection each. `latency/LOAD`: one way, of single packets (`idle`), or at a
share of what the system passes. `cpu/packet`: processor time a packet of all cores. `cpu/idle`: of the switch's process with
nothing to do. `ndr`: the highest rate passed without loss, and with 0.1 % (RFC 2544 section 26.1, trials of a second): one pause of a core
that slept, or that somebody else had, is a loss. `idle-ports/250`: a flood between two pods, with and without 250 silent ones beside them.
";

/// What a program printed when it failed may be long.
fn first_line(failure: &str) -> String {
    const MOST: usize = 300;
    failure.lines().next().unwrap_or_default().chars().take(MOST).collect()
}

/// What the figures depend on.
pub(super) fn machine() -> Vec<(&'static str, String)> {
    let run = |command: &[&str]| {
        let output = Command::new(command[0]).args(&command[1..]).output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Some(text.lines().next()?.trim().to_owned())
    };
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cores = std::thread::available_parallelism().map_or(0, |count| count.get());
    [
        ("date", run(&["date", "-u", "+%Y-%m-%d"])),
        ("vswitch", run(&["git", "-C", &xtask::lab::workspace().to_string_lossy(), "describe", "--always", "--dirty"])),
        ("processor", model.map(|(_, name)| format!("{name}, {cores} cores"))),
        ("kernel", run(&["uname", "-r"])),
        ("Open vSwitch", run(&["ovs-vsctl", "--version"])),
        ("iperf3", run(&["iperf3", "--version"])),
    ]
    .into_iter()
    .map(|(key, value)| (key, value.unwrap_or_else(|| "none".to_owned())))
    .collect()
}

fn new_table() -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table
}

fn align(table: &mut Table, from: usize) {
    table.column_iter_mut().skip(from).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
}

/// Three digits that count.
fn digits(value: f64) -> String {
    match value.abs() {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        1.0.. => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_in_the_middle() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0]), Some(2.5));
    }

    #[test]
    fn targets_are_ratios_of_medians() {
        let figure = |value| vec![Figure { name: String::new(), unit: "Mpps", value }];
        let mut results = Results::default();
        for (system, value) in [(System::Vswitch, 0.9), (System::Forward, 1.0), (System::Ovs, 0.5)] {
            results.add(system, "rate/local/64/10000", figure(value));
        }
        let text = results.targets().unwrap().to_string();
        assert!(text.contains("0.90") && text.contains("1.80"), "{text}");
        let verdicts: Vec<&str> = text.lines().skip(1).filter_map(|line| line.split_whitespace().last()).collect();
        assert_eq!(verdicts, ["no", "yes"]);
    }
}
