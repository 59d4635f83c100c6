//! The pipeline over memory: 64-byte packets in bursts of 64, throughput in packets. Names are `what/case/flows`.
//!
//! `io/none` is the cost of giving and taking frames, contained in all others. Every hit bench also counts allocations,
//! and refuses to report a number if there was one.

use std::sync::Barrier;
use std::thread;
use std::time::Instant;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use vswitch_benches::policies::{By, Policies};
use vswitch_benches::{CountingAllocator, Rig, Way, allocations};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// Turns whose allocations are counted.
const COUNTED_TURNS: u64 = 10_000;

fn hits(criterion: &mut Criterion) {
    let ways = [("local", Way::Local), ("service", Way::Service), ("encap", Way::Encap), ("decap", Way::Decap)];
    for (name, way) in ways {
        let mut group = criterion.benchmark_group(format!("hit/{name}"));
        group.throughput(Throughput::Elements(Rig::BURST));
        for flows in [1, 10_000, 1_000_000] {
            let mut rig = None;
            group.bench_function(flows.to_string(), |bencher| {
                let rig = rig.get_or_insert_with(|| sober(&format!("hit/{name}/{flows}"), Rig::new(way, flows)));
                bencher.iter(|| rig.turn());
            });
        }
        group.finish();
    }
}

/// Routed, both ends under a policy of a thousand rules, connections followed, encapsulated: what the project is measured by.
fn policed(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("hit/policy-encap");
    group.throughput(Throughput::Elements(Rig::BURST));
    for flows in [10_000, 1_000_000] {
        let mut rig = None;
        group.bench_function(flows.to_string(), |bencher| {
            let rig = rig.get_or_insert_with(|| {
                let policies = Policies::new(1000, By::Labels);
                sober(&format!("hit/policy-encap/{flows}"), Rig::with_policy(Way::Encap, flows, Some(&policies)))
            });
            bencher.iter(|| rig.turn());
        });
    }
    group.finish();
}

/// Workers beside each other, each pinned, over one table of connections: all packets that they forward in the time that the
/// slowest takes.
#[expect(clippy::disallowed_methods, reason = "criterion is told the time of threads that it does not run")]
fn workers(criterion: &mut Criterion) {
    let cores = core_affinity::get_core_ids().unwrap_or_default();
    let mut group = criterion.benchmark_group("workers/policy-encap");
    for count in [1, 2] {
        group.throughput(Throughput::Elements(Rig::BURST * count as u64));
        let mut rigs = None;
        group.bench_function(count.to_string(), |bencher| {
            let rigs = rigs
                .get_or_insert_with(|| Rig::workers(count, Way::Encap, 10_000, Some(&Policies::new(1000, By::Labels))));
            bencher.iter_custom(|turns| {
                let barrier = Barrier::new(count);
                let (barrier, cores) = (&barrier, &cores);
                thread::scope(|scope| {
                    let threads: Vec<_> = rigs
                        .iter_mut()
                        .enumerate()
                        .map(|(at, rig)| {
                            scope.spawn(move || {
                                cores.get(at).map(|&core| core_affinity::set_for_current(core));
                                barrier.wait();
                                let start = Instant::now();
                                (0..turns).for_each(|_| rig.turn());
                                start.elapsed()
                            })
                        })
                        .collect();
                    let times = threads.into_iter().map(|thread| thread.join().expect("a worker"));
                    times.max().unwrap_or_default()
                })
            });
        });
    }
    group.finish();
}

/// The rig, once it has been seen not to allocate: a figure of a hit path that does would mean nothing.
fn sober(name: &str, mut rig: Rig) -> Rig {
    let before = allocations();
    (0..COUNTED_TURNS).for_each(|_| rig.turn());
    let count = allocations() - before;
    println!("{name}: {count} allocations in {} packets", COUNTED_TURNS * Rig::BURST);
    assert_eq!(count, 0, "the hit path allocates");
    rig
}

fn misses(criterion: &mut Criterion) {
    for (name, way) in [("local", Way::Local), ("service", Way::Service), ("encap", Way::Encap)] {
        let mut group = criterion.benchmark_group(format!("miss/{name}"));
        group.throughput(Throughput::Elements(Rig::BURST));
        let mut rig = None;
        group.bench_function("10000", |bencher| {
            let rig = rig.get_or_insert_with(|| Rig::new(way, 10_000));
            bencher.iter(|| rig.miss());
        });
        group.finish();
    }
}

fn io(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("io");
    group.throughput(Throughput::Elements(Rig::BURST));
    let mut rig = Rig::new(Way::Local, 10_000);
    group.bench_function("none", |bencher| bencher.iter(|| rig.io()));
    group.finish();
}

criterion_group!(benches, io, hits, policed, workers, misses);
criterion_main!(benches);
