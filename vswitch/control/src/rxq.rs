//! Receive queues: who polls which, and dealing them out anew by what they cost.
//!
//! A worker can send to a link by a queue of its own only, so each keeps at least one of every link. A pod's link has as many queues as
//! there are workers, so it is the queues of uplinks that move.

use std::collections::BTreeMap;

use vswitch_api::{Answer, ApiError, ErrorCode, QueueInfo, QueueLoad, QueueMove, RxqInfo, RxqPlan, WorkerLoad};
use vswitch_net::PortId;

use crate::Control;
use crate::backend::{Backend, WorkerSample};

/// A plan goes on as long as a step takes this share, as a divisor, off the load of the busiest worker.
const WORTH_DIVISOR: u32 = 20;

/// A queue as the plan sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Queue {
    port: PortId,
    queue: u32,
    worker: usize,
    load: u32,
}

impl Control {
    pub(crate) fn rxq(&self, workers: &[WorkerSample]) -> RxqInfo {
        let mut queues: Vec<QueueInfo> = workers
            .iter()
            .enumerate()
            .flat_map(|(worker, sample)| sample.sockets.iter().map(move |socket| (worker, socket)))
            .filter_map(|(worker, socket)| {
                let link = self.link_name(socket.port?);
                Some(QueueInfo { link, queue: socket.queue, worker, packets: socket.kicks.received })
            })
            .collect();
        queues.sort_by(|one, other| (&one.link, one.queue).cmp(&(&other.link, other.queue)));
        let load = |(worker, sample): (usize, &WorkerSample)| {
            let times = sample.times;
            WorkerLoad {
                worker,
                core: sample.core,
                busy_ns: times.busy_ns,
                all_ns: times.busy_ns + times.idle_ns + times.asleep_ns,
            }
        };
        RxqInfo { queues, workers: workers.iter().enumerate().map(load).collect() }
    }

    /// Has queues polled by other workers: all of them, or none if one cannot be.
    pub(crate) fn move_queues(&self, moves: &[QueueMove], backend: &mut dyn Backend) -> Result<Answer, ApiError> {
        let samples = backend.sample();
        let mut owners = owners(&samples);
        let mut changes = Vec::new();
        for wanted in moves {
            let QueueMove { link, queue, worker } = wanted;
            let port = self.port_of_link(link, &owners)?;
            let Some(owner) = owners.get_mut(&(port, *queue)) else {
                return Err(ApiError::new(
                    ErrorCode::NotFound,
                    format!("link {link} has no queue {queue}: `switchctl rxq list` shows all"),
                ));
            };
            if *worker >= samples.len() {
                let last = samples.len() - 1;
                return Err(ApiError::new(
                    ErrorCode::NotFound,
                    format!("there is no worker {worker}: they are numbered 0 to {last} (worker.count)"),
                ));
            }
            if *owner != *worker {
                *owner = *worker;
                changes.push((port, *queue, *worker));
            }
        }
        for &(port, ..) in &changes {
            if let Some(without) = (0..samples.len())
                .find(|&worker| !owners.iter().any(|(&(at, _), &owner)| at == port && owner == worker))
            {
                return Err(ApiError::new(
                    ErrorCode::Invalid,
                    format!(
                        "worker {without} would have no queue of link {} left, and could not send to it: give it another one first",
                        self.link_name(port)
                    ),
                ));
            }
        }
        backend.move_queues(&changes).map_err(|error| ApiError::new(ErrorCode::System, error))?;
        Ok(Answer::Done)
    }

    /// Plans, and moves if that is wanted.
    pub(crate) fn rebalance(
        &self,
        loads: &[QueueLoad],
        is_applied: bool,
        backend: &mut dyn Backend,
    ) -> Result<Answer, ApiError> {
        let samples = backend.sample();
        let known: BTreeMap<(&str, u32), u32> =
            loads.iter().map(|load| ((load.link.as_str(), load.queue), load.load)).collect();
        let mut queues: Vec<Queue> = owners(&samples)
            .into_iter()
            .map(|((port, queue), worker)| {
                let load = known.get(&(self.link_name(port).as_str(), queue)).copied().unwrap_or(0);
                Queue { port, queue, worker, load }
            })
            .collect();
        let before = sums(&queues, samples.len());
        let old = queues.clone();
        while step(&mut queues, samples.len()) {}
        let moves: Vec<QueueMove> = old
            .iter()
            .zip(&queues)
            .filter(|(old, new)| old.worker != new.worker)
            .map(|(_, new)| QueueMove { link: self.link_name(new.port), queue: new.queue, worker: new.worker })
            .collect();
        if is_applied && !moves.is_empty() {
            self.move_queues(&moves, backend)?;
        }
        let after = sums(&queues, samples.len());
        Ok(Answer::Plan(RxqPlan { moves, before, after, is_applied }))
    }

    fn port_of_link(&self, link: &str, owners: &BTreeMap<(PortId, u32), usize>) -> Result<PortId, ApiError> {
        owners.keys().map(|&(port, _)| port).find(|&port| self.link_name(port) == link).ok_or_else(|| {
            ApiError::new(ErrorCode::NotFound, format!("no link {link} here: `switchctl rxq list` shows all"))
        })
    }
}

/// Which worker polls each queue.
fn owners(samples: &[WorkerSample]) -> BTreeMap<(PortId, u32), usize> {
    let sockets = samples.iter().enumerate().flat_map(|(at, sample)| sample.sockets.iter().map(move |it| (at, it)));
    sockets.filter_map(|(worker, socket)| Some(((socket.port?, socket.queue), worker))).collect()
}

/// The load of each worker.
fn sums(queues: &[Queue], workers: usize) -> Vec<u32> {
    let mut sums = vec![0_u32; workers];
    queues.iter().for_each(|queue| sums[queue.worker] += queue.load);
    sums
}

/// The move, or the exchange of two queues of one link, that leaves the busiest worker and its counterpart the least load.
/// False if none is worth it.
fn step(queues: &mut [Queue], workers: usize) -> bool {
    let sums = sums(queues, workers);
    let Some((busiest, &peak)) = sums.iter().enumerate().max_by_key(|(_, load)| **load) else { return false };
    let mut best: Option<(u32, usize, usize, Option<usize>)> = None;
    for (at, queue) in queues.iter().enumerate().filter(|(_, queue)| queue.worker == busiest) {
        let rest = queues.iter().filter(|other| other.port == queue.port && other.worker == busiest).count() - 1;
        for to in (0..workers).filter(|&to| to != busiest) {
            let back = queues.iter().enumerate().filter(|(_, other)| other.port == queue.port && other.worker == to);
            let moved = (rest > 0).then_some(None);
            for exchange in moved.into_iter().chain(back.map(|(other, _)| Some(other))) {
                let returned = exchange.map_or(0, |other: usize| queues[other].load);
                let load = (peak - queue.load + returned).max(sums[to] - returned + queue.load);
                if best.is_none_or(|(least, ..)| load < least) {
                    best = Some((load, at, to, exchange));
                }
            }
        }
    }
    let Some((load, at, to, exchange)) = best.filter(|(load, ..)| load + (peak / WORTH_DIVISOR).max(1) <= peak) else {
        return false;
    };
    debug_assert!(load < peak);
    queues[at].worker = to;
    if let Some(other) = exchange {
        queues[other].worker = busiest;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(port: u16, queue: u32, worker: usize, load: u32) -> Queue {
        Queue { port: PortId(port), queue, worker, load }
    }

    fn plan(mut queues: Vec<Queue>, workers: usize) -> (Vec<usize>, Vec<u32>) {
        while step(&mut queues, workers) {}
        (queues.iter().map(|queue| queue.worker).collect(), sums(&queues, workers))
    }

    #[test]
    fn load_is_spread_over_workers() {
        let queues = vec![queue(0, 0, 0, 300), queue(0, 1, 1, 10), queue(0, 2, 0, 320), queue(0, 3, 1, 20)];
        let (_, loads) = plan(queues, 2);
        assert_eq!(loads.iter().max(), Some(&330), "{loads:?}");
    }

    #[test]
    fn each_worker_keeps_a_queue_of_every_link() {
        // The only way to spread it would leave worker 1 without a queue of the link, or with the same load.
        assert_eq!(plan(vec![queue(0, 0, 0, 900), queue(0, 1, 1, 0)], 2).0, [0, 1]);
        // Exchanging the busy queue of one link for an idle one helps.
        let queues =
            vec![queue(0, 0, 0, 500), queue(0, 1, 1, 0), queue(3, 0, 0, 400), queue(3, 1, 1, 0), queue(3, 2, 0, 5)];
        let (owners, loads) = plan(queues.clone(), 2);
        assert_eq!(loads.iter().max(), Some(&500), "{loads:?}");
        for (port, worker) in [(0, 0), (0, 1), (3, 0), (3, 1)] {
            let has = queues.iter().zip(&owners).any(|(queue, &owner)| queue.port == PortId(port) && owner == worker);
            assert!(has, "worker {worker}, port {port}: {owners:?}");
        }
    }

    #[test]
    fn what_is_even_stays() {
        let queues = vec![queue(0, 0, 0, 300), queue(0, 1, 1, 290), queue(0, 2, 0, 10), queue(0, 3, 1, 15)];
        assert_eq!(plan(queues, 2).0, [0, 1, 0, 1]);
    }

    /// Against every way to deal the queues out.
    #[test]
    fn plans_are_near_the_best() {
        for seed in 0..200_u32 {
            let load = |at: u32| (seed.wrapping_mul(2_654_435_761).wrapping_add(at * 40_503) >> 7) % 400;
            let queues: Vec<Queue> = (0..6).map(|at| queue(0, at, at as usize % 2, load(at))).collect();
            let total: u32 = queues.iter().map(|queue| queue.load).sum();
            let best = (1..63_u32)
                .map(|mask| {
                    let one: u32 =
                        queues.iter().filter(|queue| mask >> queue.queue & 1 == 1).map(|queue| queue.load).sum();
                    one.max(total - one)
                })
                .min()
                .unwrap();
            let (_, loads) = plan(queues, 2);
            let peak = *loads.iter().max().unwrap();
            assert!(peak <= best + best / 5, "seed {seed}: {peak} where {best} is possible");
        }
    }
}
