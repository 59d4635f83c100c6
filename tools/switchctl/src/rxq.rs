//! `switchctl rxq`: which worker polls which receive queue, what each costs, and dealing them out anew.

use std::io::{self, Write};
use std::thread;
use std::time::Duration;

use clap::{Args, Subcommand};
use vswitch_api::{Answer, Client, QueueInfo, QueueLoad, QueueMove, Request, RxqInfo, RxqPlan, WorkerLoad};

use crate::output::{row, table};
use crate::perf::parse_seconds;

#[derive(Debug, Subcommand)]
pub(crate) enum RxqCommand {
    /// All queues, their workers, and what each receives and costs.
    List(Interval),
    /// Plan which worker should poll which queue, by what each costs; `--apply` moves them.
    ///
    /// The queues of a pod's link stay where they are: it has one for each worker, who sends by it. What arrives at a queue while it
    /// moves does not reach the switch, and what its worker had not sent by it is lost. A restart deals queues out as at the first.
    Rebalance {
        #[command(flatten)]
        interval: Interval,
        /// Move the queues, instead of saying only which.
        #[arg(long)]
        apply: bool,
    },
    /// Have a queue polled by another worker.
    Move {
        /// The link.
        link: String,
        /// The queue's number.
        queue: u32,
        /// The worker's number.
        worker: usize,
    },
}

/// How long to look.
#[derive(Debug, Args)]
pub(crate) struct Interval {
    /// Look for so many seconds.
    #[arg(long, default_value_t = 1.0, value_parser = parse_seconds)]
    seconds: f64,
}

/// A list with what it says of an interval.
#[derive(Debug)]
pub(crate) struct Measured {
    now: RxqInfo,
    earlier: RxqInfo,
}

/// Carries a command out, and prints what came of it.
pub(crate) fn rxq(client: &mut Client, command: &RxqCommand) -> anyhow::Result<Answer> {
    match command {
        RxqCommand::List(interval) => {
            let Measured { now, earlier } = measure(client, interval)?;
            Ok(Answer::Rxq(Box::new(since(&now, &earlier))))
        }
        RxqCommand::Rebalance { interval, apply } => {
            let loads = measure(client, interval)?.loads();
            Ok(client.call(Request::RxqRebalance { loads, dry_run: !apply })?)
        }
        RxqCommand::Move { link, queue, worker } => {
            let moves = vec![QueueMove { link: link.clone(), queue: *queue, worker: *worker }];
            Ok(client.call(Request::RxqMove { moves })?)
        }
    }
}

fn measure(client: &mut Client, interval: &Interval) -> anyhow::Result<Measured> {
    let mut ask = || match client.call(Request::RxqList)? {
        Answer::Rxq(info) => Ok(*info),
        other => anyhow::bail!("the daemon answered something else: {other:?}"),
    };
    let earlier = ask()?;
    thread::park_timeout(Duration::from_secs_f64(interval.seconds));
    Ok(Measured { now: ask()?, earlier })
}

impl Measured {
    fn loads(&self) -> Vec<QueueLoad> {
        loads(&since(&self.now, &self.earlier))
    }
}

/// What happened in between.
fn since(now: &RxqInfo, earlier: &RxqInfo) -> RxqInfo {
    let mut since = now.clone();
    for queue in &mut since.queues {
        let same = |it: &&QueueInfo| (&it.link, it.queue, it.worker) == (&queue.link, queue.queue, queue.worker);
        if let Some(before) = earlier.queues.iter().find(same) {
            queue.packets = queue.packets.saturating_sub(before.packets);
        }
    }
    for (worker, before) in since.workers.iter_mut().zip(&earlier.workers) {
        worker.busy_ns = worker.busy_ns.saturating_sub(before.busy_ns);
        worker.all_ns = worker.all_ns.saturating_sub(before.all_ns);
    }
    since
}

/// A worker's busy time falls on its queues by their packets.
fn loads(since: &RxqInfo) -> Vec<QueueLoad> {
    let load = |queue: &QueueInfo| {
        let all: u64 =
            since.queues.iter().filter(|other| other.worker == queue.worker).map(|other| other.packets).sum();
        let worker = worker_of(since, queue);
        let busy = worker.map_or(0.0, |worker| worker.busy_ns as f64 / worker.all_ns.max(1) as f64);
        let load = (busy * queue.packets as f64 / all.max(1) as f64 * 1000.0).round() as u32;
        QueueLoad { link: queue.link.clone(), queue: queue.queue, load }
    };
    since.queues.iter().map(load).collect()
}

/// The worker that polls a queue.
fn worker_of<'a>(info: &'a RxqInfo, queue: &QueueInfo) -> Option<&'a WorkerLoad> {
    info.workers.iter().find(|worker| Some(worker.worker) == queue.worker)
}

/// Prints what happened in an interval.
pub(crate) fn print(out: &mut impl Write, since: &RxqInfo) -> io::Result<()> {
    let lines = since.queues.iter().zip(loads(since)).map(|(queue, load)| {
        let worker = worker_of(since, queue);
        let core = worker.and_then(|worker| worker.core).map_or_else(|| "-".to_owned(), |core| core.to_string());
        let seconds = worker.map_or(0.0, |worker| worker.all_ns as f64 / 1e9);
        let rate = queue.packets as f64 / seconds.max(1e-9);
        let name = queue.worker.map_or_else(|| "nobody".to_owned(), |worker| worker.to_string());
        row([&queue.link, &queue.queue, &name, &core, &format!("{rate:.0}"), &percent(load.load)])
    });
    table(out, ["LINK", "QUEUE", "WORKER", "CORE", "PACKETS/S", "LOAD"], lines)
}

/// Prints a plan.
pub(crate) fn print_plan(out: &mut impl Write, plan: &RxqPlan) -> io::Result<()> {
    if plan.moves.is_empty() {
        writeln!(
            out,
            "nothing to move: no other way to deal the queues out is worth it (each worker keeps one of every link, so an uplink needs more queues than there are workers)"
        )?;
    }
    let verb = if plan.is_applied { "moved" } else { "would move" };
    for QueueMove { link, queue, worker } in &plan.moves {
        writeln!(out, "{verb} queue {queue} of {link} to worker {worker}")?;
    }
    let lines = plan
        .before
        .iter()
        .zip(&plan.after)
        .enumerate()
        .map(|(worker, (before, after))| row([&worker, &percent(*before), &percent(*after)]));
    table(out, ["WORKER", "LOAD NOW", "LOAD THEN"], lines)?;
    if !plan.is_applied && !plan.moves.is_empty() {
        writeln!(out, "`switchctl rxq rebalance --apply` measures again, and moves them")?;
    }
    Ok(())
}

fn percent(thousandths: u32) -> String {
    format!("{:.1} %", f64::from(thousandths) / 10.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(packets: [u64; 3], busy_ns: [u64; 2]) -> RxqInfo {
        let owners = [0, 1, 0];
        let queue = |at: usize| QueueInfo {
            link: "eth0".into(),
            queue: at as u32,
            worker: Some(owners[at]),
            packets: packets[at],
        };
        let worker =
            |at: usize| WorkerLoad { worker: at, core: Some(at + 2), busy_ns: busy_ns[at], all_ns: 2_000_000_000 };
        RxqInfo { queues: (0..3).map(queue).collect(), workers: (0..2).map(worker).collect() }
    }

    #[test]
    fn busy_time_falls_on_queues_by_their_packets() {
        let mut now = info([1300, 50, 200], [1_800_000_000, 0]);
        now.workers.iter_mut().for_each(|worker| worker.all_ns = 3_000_000_000);
        let since = since(&now, &info([1000, 50, 100], [1_000_000_000, 0]));
        let loads: Vec<u32> = loads(&since).iter().map(|load| load.load).collect();
        assert_eq!(loads, [600, 0, 200]);
        let mut page = Vec::new();
        print(&mut page, &since).unwrap();
        let page = String::from_utf8(page).unwrap();
        let cells: Vec<Vec<&str>> = page.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(cells[1], ["eth0", "0", "0", "2", "300", "60.0", "%"], "{page}");
    }

    #[test]
    fn a_plan_says_what_it_does() {
        let moves = vec![QueueMove { link: "eth0".into(), queue: 2, worker: 1 }];
        let plan = RxqPlan { moves, before: vec![800, 0], after: vec![600, 200], is_applied: false };
        let text = |plan: &RxqPlan| {
            let mut page = Vec::new();
            print_plan(&mut page, plan).unwrap();
            String::from_utf8(page).unwrap()
        };
        assert!(text(&plan).starts_with("would move queue 2 of eth0 to worker 1\n"));
        assert!(text(&RxqPlan { is_applied: true, ..plan.clone() }).starts_with("moved queue 2"));
        assert!(text(&RxqPlan { moves: Vec::new(), ..plan }).starts_with("nothing to move"));
    }
}
