//! The pipeline over memory: 64-byte packets in bursts of 64, throughput in packets. Names are `what/case/flows`.
//!
//! `io/none` is the cost of giving and taking frames, contained in all others. Every hit bench also counts allocations,
//! and refuses to report a number if there was one.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
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
            group.bench_function(flows.to_string(), |bencher| {
                let mut rig = Rig::new(way, flows);
                let before = allocations();
                (0..COUNTED_TURNS).for_each(|_| rig.turn());
                let count = allocations() - before;
                println!("hit/{name}/{flows}: {count} allocations in {} packets", COUNTED_TURNS * Rig::BURST);
                assert_eq!(count, 0, "the hit path allocates");
                bencher.iter(|| rig.turn());
            });
        }
        group.finish();
    }
}

fn misses(criterion: &mut Criterion) {
    for (name, way) in [("local", Way::Local), ("service", Way::Service), ("encap", Way::Encap)] {
        let mut group = criterion.benchmark_group(format!("miss/{name}"));
        group.throughput(Throughput::Elements(Rig::BURST));
        group.bench_function("10000", |bencher| {
            let mut rig = Rig::new(way, 10_000);
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

criterion_group!(benches, io, hits, misses);
criterion_main!(benches);
