//! Receive queues: who polls which, and dealing them out anew by what they cost.
//!
//! It is the queues of uplinks that move. A pod's link has one for each worker, and the kernel chooses among them for the pod. A worker
//! can send to a link by a queue of its own only, so each keeps at least one of every link, at every moment.

use std::collections::BTreeMap;

use vswitch_api::{Answer, ApiError, ErrorCode, QueueInfo, QueueLoad, QueueMove, RxqInfo, RxqPlan, WorkerLoad};
use vswitch_net::PortId;

use crate::backend::{Backend, WorkerSample};
use crate::{Control, is_uplink};

/// A plan goes on as long as a step takes this share, as a divisor, off the load of the busiest worker.
const WORTH_DIVISOR: u32 = 20;

/// A worker that does nothing but one queue.
const FULL_LOAD: u32 = 1000;

/// Which worker polls a queue.
type Owners = BTreeMap<(PortId, u32), Option<usize>>;

/// A queue of a link, and the worker that is to poll it.
type Move = (PortId, u32, usize);

/// A queue as the plan sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Queue {
    port: PortId,
    queue: u32,
    worker: usize,
    load: u32,
}

impl Control {
    pub(crate) fn rxq(&self, workers: &[WorkerSample], backend: &dyn Backend) -> RxqInfo {
        let received = |worker: usize, port: PortId, queue: u32| {
            let sockets = workers.get(worker).map_or(&[][..], |sample| &sample.sockets);
            let socket = sockets.iter().find(|socket| (socket.port, socket.queue) == (Some(port), queue));
            socket.map_or(0, |socket| socket.kicks.received)
        };
        let queues = backend.queues().into_iter().map(|(port, queue, worker)| QueueInfo {
            link: self.link_name(port),
            queue,
            worker,
            packets: worker.map_or(0, |worker| received(worker, port, queue)),
        });
        let load = |(worker, sample): (usize, &WorkerSample)| {
            let times = sample.times;
            WorkerLoad {
                worker,
                core: sample.core,
                busy_ns: times.busy_ns,
                all_ns: times.busy_ns + times.idle_ns + times.asleep_ns,
            }
        };
        RxqInfo { queues: queues.collect(), workers: workers.iter().enumerate().map(load).collect() }
    }

    /// Has queues polled by other workers.
    pub(crate) fn move_queues(&self, moves: &[QueueMove], backend: &mut dyn Backend) -> Result<Answer, ApiError> {
        let workers = backend.sample().len();
        let owners = owners(backend);
        let mut left = Vec::new();
        for QueueMove { link, queue, worker } in moves {
            let not_found = |message: String| ApiError::new(ErrorCode::NotFound, message);
            let port = owners.keys().map(|&(port, _)| port).find(|&port| self.link_name(port) == *link);
            let port = port.ok_or_else(|| not_found(format!("no link {link} here: `switchctl rxq list` shows all")))?;
            if !is_uplink(port) {
                let message = format!(
                    "link {link} leads to a pod or the host, and has a queue for each worker: only queues of uplinks move"
                );
                return Err(ApiError::new(ErrorCode::Invalid, message));
            }
            let Some(owner) = owners.get(&(port, *queue)) else {
                return Err(not_found(format!("link {link} has no queue {queue}: `switchctl rxq list` shows all")));
            };
            if *worker >= workers {
                let last = workers.saturating_sub(1);
                return Err(not_found(format!(
                    "there is no worker {worker}: they are numbered 0 to {last} (worker.count)"
                )));
            }
            if *owner != Some(*worker) {
                left.push((port, *queue, *worker));
            }
        }
        let order = in_order(owners, left).map_err(|(port, worker)| {
            let link = self.link_name(port);
            ApiError::new(
                ErrorCode::Invalid,
                format!("worker {worker} would have no queue of link {link} left, and could not send to it: give it another one first"),
            )
        })?;
        for (port, queue, worker) in order {
            backend.move_queue(port, queue, worker).map_err(|error| {
                let link = self.link_name(port);
                ApiError::new(
                    ErrorCode::System,
                    format!("queue {queue} of {link} was not moved, nor what was to follow: {error}"),
                )
            })?;
        }
        Ok(Answer::Done)
    }

    /// Plans, and moves if that is wanted.
    pub(crate) fn rebalance(
        &self,
        loads: &[QueueLoad],
        is_applied: bool,
        backend: &mut dyn Backend,
    ) -> Result<Answer, ApiError> {
        let workers = backend.sample().len();
        if let Some(wrong) = loads.iter().find(|load| load.load > FULL_LOAD) {
            let QueueLoad { link, queue, load } = wrong;
            let message = format!(
                "load {load} of queue {queue} of {link}: allowed are 0 to {FULL_LOAD}, thousandths of a worker"
            );
            return Err(ApiError::new(ErrorCode::Invalid, message));
        }
        let known: BTreeMap<(&str, u32), u32> =
            loads.iter().map(|load| ((load.link.as_str(), load.queue), load.load)).collect();
        let mut queues: Vec<Queue> = owners(backend)
            .into_iter()
            .filter_map(|((port, queue), worker)| {
                let load = known.get(&(self.link_name(port).as_str(), queue)).copied().unwrap_or(0);
                Some(Queue { port, queue, worker: worker?, load })
            })
            .collect();
        let before = sums(&queues, workers);
        let old = queues.clone();
        while step(&mut queues, workers) {}
        let moves: Vec<QueueMove> = old
            .iter()
            .zip(&queues)
            .filter(|(old, new)| old.worker != new.worker)
            .map(|(_, new)| QueueMove { link: self.link_name(new.port), queue: new.queue, worker: new.worker })
            .collect();
        if is_applied && !moves.is_empty() {
            self.move_queues(&moves, backend)?;
        }
        let after = sums(&queues, workers);
        Ok(Answer::Plan(RxqPlan { moves, before, after, is_applied }))
    }
}

fn owners(backend: &dyn Backend) -> Owners {
    backend.queues().into_iter().map(|(port, queue, worker)| ((port, queue), worker)).collect()
}

/// Moves in an order in which no worker is ever without a queue of a link; else a link and the worker that would be.
fn in_order(mut owners: Owners, mut left: Vec<Move>) -> Result<Vec<Move>, (PortId, usize)> {
    let mut order = Vec::new();
    while !left.is_empty() {
        let has_another = |&(port, queue, _): &Move| match owners.get(&(port, queue)) {
            Some(&Some(owner)) => {
                owners.iter().any(|(&(at, number), &other)| (at, other) == (port, Some(owner)) && number != queue)
            }
            // Nobody loses it.
            _ => true,
        };
        let Some(next) = left.iter().position(has_another) else {
            let (port, queue, _) = left[0];
            return Err((port, owners.get(&(port, queue)).copied().flatten().unwrap_or(0)));
        };
        let (port, queue, worker) = left.remove(next);
        owners.insert((port, queue), Some(worker));
        order.push((port, queue, worker));
    }
    Ok(order)
}

/// The load of each worker.
fn sums(queues: &[Queue], workers: usize) -> Vec<u32> {
    let mut sums = vec![0_u32; workers];
    queues.iter().for_each(|queue| sums[queue.worker] += queue.load);
    sums
}

/// The move of an uplink's queue, or the exchange of two of one link, that leaves the busiest worker and its counterpart the least load.
/// False if none is worth it.
fn step(queues: &mut [Queue], workers: usize) -> bool {
    let sums = sums(queues, workers);
    let Some((busiest, &peak)) = sums.iter().enumerate().max_by_key(|(_, load)| **load) else { return false };
    let count = |port: PortId, worker: usize| {
        queues.iter().filter(|other| (other.port, other.worker) == (port, worker)).count()
    };
    let mut best: Option<(u32, usize, usize, Option<usize>)> = None;
    let movable = queues.iter().enumerate().filter(|(_, queue)| queue.worker == busiest && is_uplink(queue.port));
    for (at, queue) in movable {
        let has_more = count(queue.port, busiest) > 1;
        for to in (0..workers).filter(|&to| to != busiest) {
            let back = queues.iter().enumerate().filter(|(_, other)| (other.port, other.worker) == (queue.port, to));
            let moved = has_more.then_some(None);
            // One of the two gives before it gets.
            let may_exchange = has_more || count(queue.port, to) > 1;
            for exchange in moved.into_iter().chain(back.filter(|_| may_exchange).map(|(other, _)| Some(other))) {
                let returned = exchange.map_or(0, |other: usize| queues[other].load);
                let load = (peak - queue.load + returned).max(sums[to] - returned + queue.load);
                if best.is_none_or(|(least, ..)| load < least) {
                    best = Some((load, at, to, exchange));
                }
            }
        }
    }
    let is_worth = |&(load, ..): &(u32, usize, usize, Option<usize>)| load + (peak / WORTH_DIVISOR).max(1) <= peak;
    let Some((_, at, to, exchange)) = best.filter(is_worth) else { return false };
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
        // Two links: what worker 0 has one queue of is neither moved nor exchanged, for it would be without for a moment.
        let queues =
            vec![queue(0, 0, 0, 500), queue(0, 1, 1, 0), queue(1, 0, 0, 300), queue(1, 1, 1, 0), queue(1, 2, 0, 200)];
        let (owners, loads) = plan(queues, 2);
        assert_eq!((owners, loads), (vec![0, 1, 1, 0, 1], vec![500, 500]));
    }

    #[test]
    fn the_queues_of_pods_stay_and_count() {
        let pod = 3 + crate::MAX_UPLINKS as u16;
        let queues = vec![
            queue(0, 0, 0, 100),
            queue(0, 1, 1, 0),
            queue(0, 2, 0, 300),
            queue(pod, 0, 0, 500),
            queue(pod, 1, 1, 0),
        ];
        let (owners, loads) = plan(queues, 2);
        assert_eq!((owners, loads), (vec![1, 0, 1, 0, 1], vec![500, 400]));
    }

    #[test]
    fn moves_are_ordered_so_that_nobody_is_without_a_queue() {
        let port = PortId(0);
        let owners: Owners =
            [(0, Some(0)), (1, Some(1)), (2, Some(1)), (3, None)].map(|(queue, at)| ((port, queue), at)).into();
        let to = |queue, worker| (port, queue, worker);
        // Worker 0 gets before it gives.
        assert_eq!(in_order(owners.clone(), vec![to(0, 1), to(1, 0)]), Ok(vec![to(1, 0), to(0, 1)]));
        assert_eq!(in_order(owners.clone(), vec![to(3, 0), to(0, 1)]), Ok(vec![to(3, 0), to(0, 1)]));
        assert_eq!(in_order(owners, vec![to(0, 1)]), Err((port, 0)));
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
