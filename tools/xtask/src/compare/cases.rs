//! What is measured, and how.

use std::fs;
use std::process::{Child, Stdio};
use std::time::Instant;

use anyhow::{Context, bail};
use serde_json::Value;
use xtask::lab;

use super::systems::{Site, System, Topology, pktgen};

/// Flows of the cases that are not about their number.
const FLOWS: u32 = 10_000;

/// Steps of the search for a rate without loss; how many trials of a rate must fail one after another, and how long each lasts.
const SEARCH_STEPS: u32 = 8;
const TRIALS: usize = 3;
const TRIAL_SECONDS: f64 = 1.0;

/// Rate of the cases that are about the cost of a packet, and not about how many pass.
const MODEST_RATE: u64 = 200_000;

const IDLE_PORTS: usize = 250;

/// One thing to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Case {
    /// Packets a second from the first end to the second.
    Rate(Way, Size, u32),
    /// iperf3 over so many streams.
    Tcp(Topology, u32, Direction),
    /// Round trips of one byte.
    RoundTrip(Topology, &'static str),
    /// How long packets take, at a share of what the system can.
    Latency(Load),
    /// CPU time of the whole machine a packet, without the generator's, at a rate that all can do.
    CpuPerPacket,
    /// CPU of the switching processes without traffic.
    IdleCpu,
    /// The highest rates without loss and with one packet of a thousand lost (RFC 2544 section 26.1, RFC 1242).
    NoDrop,
    /// What ports with nothing to say cost those that have.
    IdlePorts,
}

/// Which way packets of [`Case::Rate`] go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// From pod to pod.
    Local,
    /// From a pod to the wire.
    Encap,
    /// From the wire to a pod.
    Decap,
}

/// Sizes of packets: of all, or a mix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Size {
    Bytes(u32),
    Imix,
}

/// Which way TCP's data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    One,
    Both,
}

/// Share of the highest rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Load {
    Idle,
    Percent(u32),
}

/// A number and what it is.
#[derive(Clone, Debug)]
pub(super) struct Figure {
    pub(super) name: String,
    pub(super) unit: &'static str,
    pub(super) value: f64,
}

impl Figure {
    pub(super) fn to_text(&self) -> String {
        format!("{} {:.3} {}", self.name, self.value, self.unit).trim_start().to_owned()
    }
}

impl Case {
    /// All of them.
    pub(super) fn all() -> Vec<Case> {
        let mut cases = Vec::new();
        for way in [Way::Local, Way::Encap, Way::Decap] {
            for bytes in [64, 512, 1400] {
                for flows in [1, 100, FLOWS, 1_000_000] {
                    cases.push(Case::Rate(way, Size::Bytes(bytes), flows));
                }
            }
        }
        cases.push(Case::Rate(Way::Local, Size::Imix, FLOWS));
        for topology in [Topology::Local, Topology::Wire(1500), Topology::Wire(9000)] {
            for streams in [1, 4, 16] {
                cases.push(Case::Tcp(topology, streams, Direction::One));
                cases.push(Case::Tcp(topology, streams, Direction::Both));
            }
        }
        for topology in [Topology::Local, Topology::Wire(1500)] {
            cases.extend(["udp", "tcp", "connect"].map(|transport| Case::RoundTrip(topology, transport)));
        }
        cases.extend([Load::Idle, Load::Percent(50), Load::Percent(90)].map(Case::Latency));
        cases.extend([Case::CpuPerPacket, Case::IdleCpu, Case::NoDrop, Case::IdlePorts]);
        cases
    }

    /// Its name, by which it is chosen.
    pub(super) fn name(self) -> String {
        match self {
            Case::Rate(way, size, flows) => {
                let way = match way {
                    Way::Local => "local",
                    Way::Encap => "encap",
                    Way::Decap => "decap",
                };
                match size {
                    Size::Bytes(bytes) => format!("rate/{way}/{bytes}/{flows}"),
                    Size::Imix => format!("rate/{way}/imix/{flows}"),
                }
            }
            Case::Tcp(topology, streams, direction) => {
                let both = if direction == Direction::Both { "/both" } else { "" };
                format!("tcp/{}/{streams}{both}", place(topology))
            }
            Case::RoundTrip(topology, transport) => format!("rtt/{}/{transport}", place(topology)),
            Case::Latency(Load::Idle) => "latency/idle".into(),
            Case::Latency(Load::Percent(percent)) => format!("latency/{percent}%"),
            Case::CpuPerPacket => "cpu/packet".into(),
            Case::IdleCpu => "cpu/idle".into(),
            Case::NoDrop => "ndr".into(),
            Case::IdlePorts => format!("idle-ports/{IDLE_PORTS}"),
        }
    }

    pub(super) fn topology(self) -> Topology {
        match self {
            Case::Rate(Way::Encap | Way::Decap, ..) => Topology::Edge,
            Case::Tcp(topology, ..) | Case::RoundTrip(topology, _) => topology,
            _ => Topology::Local,
        }
    }

    /// True if it makes sense for a system.
    pub(super) fn is_for(self, system: System) -> bool {
        match self {
            Case::IdlePorts => system == System::Vswitch,
            Case::IdleCpu => !matches!(system, System::Bridge | System::Redirect),
            // A worker beside the generator could not be told from it.
            Case::CpuPerPacket => system != System::VswitchTwo,
            // Two workers on this machine's last two cores; across the wire there would be four.
            _ if system == System::VswitchTwo => self.topology() == Topology::Local,
            Case::Rate(Way::Local, ..) | Case::Latency(_) | Case::NoDrop => true,
            _ => system.is_switch(),
        }
    }

    /// Measures it.
    pub(super) fn measure(self, site: &mut Site, seconds: f64) -> anyhow::Result<Vec<Figure>> {
        let figure = |name: &str, unit, value| vec![Figure { name: name.to_owned(), unit, value }];
        match self {
            Case::Rate(way, size, flows) => {
                let report = flood(site, &Flood { way, size, flows, rate: None, stamp: None, seconds })?;
                Ok(figure("", "Mpps", number(&report, "packets_per_second")? / 1e6))
            }
            Case::Tcp(_, streams, direction) => Ok(figure("", "Gbit/s", tcp(site, streams, direction, seconds)? / 1e9)),
            Case::RoundTrip(_, transport) => round_trips(site, transport, seconds),
            Case::Latency(load) => latency(site, load, seconds),
            Case::CpuPerPacket => Ok(figure("", "ns", cpu_per_packet(site, seconds)?)),
            Case::IdleCpu => Ok(figure("", "% of a core", idle_cpu(site, seconds)?)),
            Case::NoDrop => no_drop(site),
            Case::IdlePorts => idle_ports(site, seconds),
        }
    }
}

fn place(topology: Topology) -> String {
    match topology {
        Topology::Local => "local".into(),
        Topology::Wire(mtu) => format!("wire{mtu}"),
        Topology::Edge => "edge".into(),
    }
}

/// Packets from the kernel's generator to the kernel's sink.
struct Flood {
    way: Way,
    size: Size,
    flows: u32,
    rate: Option<u64>,
    stamp: Option<u32>,
    seconds: f64,
}

impl Flood {
    fn at(rate: Option<u64>, seconds: f64) -> Flood {
        Flood { way: Way::Local, size: Size::Bytes(64), flows: FLOWS, rate, stamp: None, seconds }
    }

    /// What the sink leaves out: every flow is new once.
    fn warm(&self) -> f64 {
        0.7 + f64::from(self.flows) / 250_000.0
    }

    fn generator(&self, site: &Site, seconds: f64) -> anyhow::Result<Child> {
        let Site { ends: [near, far], next_hops, uplink, .. } = site;
        let (from, to, hop) = match self.way {
            Way::Local | Way::Encap => (near, far, &next_hops[0]),
            Way::Decap => (far, near, &next_hops[1]),
        };
        let mut words: Vec<String> =
            [pktgen().as_str(), "--json", "--core", "0", "send", "--kernel", "--link", &from.link]
                .map(str::to_owned)
                .to_vec();
        let mut add = |name: &str, value: &str| words.extend([name.to_owned(), value.to_owned()]);
        add("--source-mac", if self.way == Way::Decap { FAR_SOURCE } else { &from.mac });
        add("--destination-mac", hop);
        add("--source", &from.address);
        add("--destination", &to.address);
        add("--flows", &self.flows.to_string());
        add("--seconds", &seconds.to_string());
        let overhead = if self.way == Way::Decap { 50 } else { 0 };
        match self.size {
            Size::Bytes(bytes) => add("--size", &(bytes + overhead).to_string()),
            Size::Imix => words.push("--imix".into()),
        }
        let mut add = |name: &str, value: &str| words.extend([name.to_owned(), value.to_owned()]);
        if let Some(rate) = self.rate {
            add("--rate", &rate.to_string());
        }
        if let Some(every) = self.stamp {
            add("--stamp", &every.to_string());
        }
        if self.way == Way::Decap {
            add("--vni", "1");
            add("--outer-source-mac", &from.mac);
            add("--outer-destination-mac", uplink);
            add("--outer-source", "192.0.2.2");
            add("--outer-destination", "192.0.2.1");
        }
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        start(&from.namespace, &words)
    }

    fn sink(&self, site: &Site, warm: f64, seconds: f64) -> anyhow::Result<Child> {
        let to = match self.way {
            Way::Local | Way::Encap => &site.ends[1],
            Way::Decap => &site.ends[0],
        };
        let (warm, seconds) = (warm.to_string(), seconds.to_string());
        let words =
            [&pktgen(), "--json", "sink", "--kernel", "--link", &to.link, "--warm", &warm, "--seconds", &seconds];
        start(&to.namespace, &words)
    }
}

/// The MAC address of a pod that exists on another node only.
const FAR_SOURCE: &str = "02:00:00:00:00:09";

/// What the sink says, once flows are known.
fn flood(site: &Site, flood: &Flood) -> anyhow::Result<Value> {
    let warm = flood.warm();
    let sink = flood.sink(site, warm, flood.seconds)?;
    let generator = flood.generator(site, warm + flood.seconds + 0.4)?;
    let report = finish(sink);
    finish(generator)?;
    report
}

fn tcp(site: &mut Site, streams: u32, direction: Direction, seconds: f64) -> anyhow::Result<f64> {
    let [from, to] = &site.ends;
    let (client, server, address) = (from.namespace.clone(), to.namespace.clone(), to.address.clone());
    serve(site, &server, &["iperf3", "-s"], 5201)?;
    let (streams, seconds) = (streams.to_string(), seconds.ceil() as u32 + 1);
    let mut more = vec!["-P", &streams, "-O", "1"];
    if direction == Direction::Both {
        more.push("--bidir");
    }
    let time = seconds.to_string();
    let command = [&["iperf3", "-J", "--connect-timeout", "3000", "-t", &time, "-c", &address], &more[..]].concat();
    let report: Value = serde_json::from_str(&client.run(seconds + 15, &command)?)?;
    let mut bits =
        number(&report["end"]["sum_received"], "bits_per_second").with_context(|| report["error"].to_string())?;
    if direction == Direction::Both {
        bits += number(&report["end"]["sum_received_bidir_reverse"], "bits_per_second")?;
    }
    Ok(bits)
}

fn round_trips(site: &mut Site, transport: &str, seconds: f64) -> anyhow::Result<Vec<Figure>> {
    let [from, to] = &site.ends;
    let (client, server, at) = (from.namespace.clone(), to.namespace.clone(), format!("{}:5202", to.address));
    serve(site, &server, &[&pktgen(), "answer", "--at", &at, "--seconds", "3600"], 5202)?;
    if transport == "connect" {
        // Ports that wait after each connection shall not run out.
        client.run(5, &["sysctl", "-qw", "net.ipv4.ip_local_port_range=1024 65535", "net.ipv4.tcp_tw_reuse=1"])?;
    }
    let time = seconds.to_string();
    let command = [&pktgen(), "--json", "rtt", "--to", &at, "--transport", transport, "--seconds", &time];
    let report: Value = serde_json::from_str(&client.run(seconds as u32 + 15, &command)?)?;
    let mut figures = vec![Figure { name: "rate".into(), unit: "1/s", value: number(&report, "packets_per_second")? }];
    figures.extend(percentiles(&report["latency"])?);
    Ok(figures)
}

fn latency(site: &Site, load: Load, seconds: f64) -> anyhow::Result<Vec<Figure>> {
    let rate = match load {
        Load::Idle => 1000,
        Load::Percent(percent) => {
            let highest = number(&flood(site, &Flood::at(None, 1.0))?, "packets_per_second")?;
            (highest * f64::from(percent) / 100.0) as u64
        }
    };
    // Ten thousand stamps or so, and a packet that is measured disturbs no other.
    let every = (rate / 5000).max(1) as u32;
    let report = flood(site, &Flood { stamp: Some(every), ..Flood::at(Some(rate), seconds) })?;
    percentiles(&report["latency"])
}

fn percentiles(latency: &Value) -> anyhow::Result<Vec<Figure>> {
    ["p50", "p99", "p99.9"]
        .into_iter()
        .map(|name| Ok(Figure { name: name.into(), unit: "us", value: number(latency, &format!("{name}_us"))? }))
        .collect()
}

#[expect(clippy::disallowed_methods, reason = "a measurement owns its clock")]
fn cpu_per_packet(site: &Site, seconds: f64) -> anyhow::Result<f64> {
    let flood = Flood::at(Some(MODEST_RATE), seconds);
    let sink = flood.sink(site, flood.warm(), seconds)?;
    let generator = flood.generator(site, flood.warm() + seconds + 0.4)?;
    pause(flood.warm());
    let (start, before) = (Instant::now(), switching_seconds()?);
    pause(seconds);
    let (spent, elapsed) = (switching_seconds()? - before, start.elapsed());
    let report = finish(sink)?;
    finish(generator)?;
    let packets = number(&report, "packets_per_second")? * elapsed.as_secs_f64();
    if packets < 1.0 {
        bail!("no packet arrived");
    }
    Ok(spent * 1e9 / packets)
}

fn idle_cpu(site: &Site, seconds: f64) -> anyhow::Result<f64> {
    let sum = || site.pids.iter().map(|&pid| process_seconds(pid)).sum::<anyhow::Result<f64>>();
    // Until what was under way before is over.
    pause(1.0);
    let before = sum()?;
    pause(seconds);
    Ok((sum()? - before) / seconds * 100.0)
}

/// By halves between nothing and what passes at most.
fn no_drop(site: &Site) -> anyhow::Result<Vec<Figure>> {
    let highest = number(&flood(site, &Flood::at(None, 1.0))?, "packets_per_second")?;
    let mut figures = Vec::new();
    let mut good = 0.0;
    for (name, tolerated) in [("without loss", 0.0), ("with 0.1 % loss", 0.001)] {
        let mut bad = highest * 1.1;
        let mut passed: f64 = 0.0;
        for _ in 0..SEARCH_STEPS {
            let rate = (good + bad) / 2.0;
            let mut trial = try_rate(site, rate as u64)?;
            // On a machine that others use too, one pause of it is no limit of the switch.
            for _ in 1..TRIALS {
                if trial.loss > tolerated {
                    trial = try_rate(site, rate as u64)?;
                }
            }
            let is_good = trial.loss <= tolerated;
            if is_good {
                // What really passed, and not what was asked for.
                passed = passed.max(trial.received);
            }
            if is_good && trial.offered >= 0.98 * rate {
                good = rate;
            } else {
                bad = rate;
            }
        }
        figures.push(Figure { name: name.into(), unit: "Mpps", value: passed / 1e6 });
    }
    Ok(figures)
}

/// What came of one rate; packets a second, and the share of packets that did not arrive.
struct Trial {
    offered: f64,
    received: f64,
    loss: f64,
}

fn try_rate(site: &Site, rate: u64) -> anyhow::Result<Trial> {
    let trial = Flood::at(Some(rate.max(1)), TRIAL_SECONDS);
    // The sink is there before the first packet and after the last.
    let sink = trial.sink(site, 0.0, TRIAL_SECONDS + 2.5)?;
    let to = &site.ends[1];
    let has_sink =
        || to.namespace.run(5, &["ip", "link", "show", &to.link]).is_ok_and(|text| text.contains("prog/xdp"));
    lab::wait_for(5, has_sink).context("the sink does not start")?;
    let sent = finish(trial.generator(site, TRIAL_SECONDS)?)?;
    let received = number(&finish(sink)?, "packets")?;
    let (packets, seconds) = (number(&sent, "packets")?, number(&sent, "seconds")?);
    if packets < 1.0 {
        bail!("nothing was sent");
    }
    Ok(Trial { offered: packets / seconds, received: received / seconds, loss: (packets - received) / packets })
}

fn idle_ports(site: &mut Site, seconds: f64) -> anyhow::Result<Vec<Figure>> {
    let rate =
        |site: &Site| flood(site, &Flood::at(None, seconds)).and_then(|report| number(&report, "packets_per_second"));
    let without = rate(site)?;
    site.add_idle(IDLE_PORTS)?;
    // Announcements of the new pods go first.
    pause(2.0);
    let with = rate(site)?;
    Ok(vec![
        Figure { name: "without".into(), unit: "Mpps", value: without / 1e6 },
        Figure { name: "with".into(), unit: "Mpps", value: with / 1e6 },
    ])
}

/// Has a server listen, if none does yet.
fn serve(site: &mut Site, namespace: &lab::Namespace, command: &[&str], port: u16) -> anyhow::Result<()> {
    let is_listening = || {
        let filter = format!("sport = :{port}");
        namespace.run(5, &["ss", "-Hltn", &filter]).is_ok_and(|text| !text.trim().is_empty())
    };
    if is_listening() {
        return Ok(());
    }
    site.lab.spawn(namespace, command)?;
    lab::wait_for(5, is_listening).with_context(|| format!("{} does not listen", command[0]))
}

/// Seconds that were not the generator's since the machine started: interrupts everywhere, and all else but on the first
/// core, where the generator has nothing beside it.
fn switching_seconds() -> anyhow::Result<f64> {
    let text = fs::read_to_string("/proc/stat")?;
    let mut total = 0.0;
    for line in text.lines().skip(1).take_while(|line| line.starts_with("cpu")) {
        let ticks: Vec<f64> = line.split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
        // user nice system idle iowait irq softirq (proc(5)).
        let of = |places: &[usize]| places.iter().filter_map(|&at| ticks.get(at)).sum::<f64>();
        total += of(&[5, 6]);
        if !line.starts_with("cpu0 ") {
            total += of(&[0, 1, 2]);
        }
    }
    Ok(total / TICKS)
}

/// Seconds of CPU that a process has had.
fn process_seconds(pid: u32) -> anyhow::Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).context("a process has ended early")?;
    // The name may hold spaces; what follows its bracket does not.
    let rest = text.rsplit_once(')').context("/proc/PID/stat")?.1;
    let ticks: Vec<f64> = rest.split_whitespace().skip(11).take(2).filter_map(|word| word.parse().ok()).collect();
    Ok(ticks.iter().sum::<f64>() / TICKS)
}

/// Clock ticks a second, USER_HZ on every architecture.
const TICKS: f64 = 100.0;

fn start(namespace: &lab::Namespace, command: &[&str]) -> anyhow::Result<Child> {
    let mut command_line = namespace.command(command);
    let child = command_line.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    child.with_context(|| format!("cannot start {}", command[0]))
}

/// What a pktgen printed.
fn finish(child: Child) -> anyhow::Result<Value> {
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn number(value: &Value, key: &str) -> anyhow::Result<f64> {
    value[key].as_f64().with_context(|| format!("no {key} in {value}"))
}

fn pause(seconds: f64) {
    std::thread::park_timeout(std::time::Duration::from_secs_f64(seconds));
}
