//! What policy costs: a lookup by the number of rules, a packet that misses the flow table, and one that hits it.
//! Names are `what/case/rules`.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use vswitch_benches::policies::{By, Policies};
use vswitch_benches::{CountingAllocator, Rig, Way, allocations};
use vswitch_net::NetworkIndex;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const NETWORK: NetworkIndex = NetworkIndex(0);
const RULES: [usize; 3] = [10, 1_000, 100_000];
const FLOWS: usize = 10_000;

/// One direction of one connection: class of the peer, then the verdict. `hot` asks for ten peers, spread over the rules, as
/// a few connections at a time do; `all` for every rule's in no order, which asks the caches more than the tables.
fn lookups(criterion: &mut Criterion) {
    let cases = [("labels/hot", By::Labels, 10), ("labels/all", By::Labels, usize::MAX)];
    let prefixes = [("prefixes/hot", By::Prefixes, 10), ("prefixes/all", By::Prefixes, usize::MAX)];
    for (name, by, peers) in cases.into_iter().chain(prefixes) {
        let mut group = criterion.benchmark_group(format!("policy/lookup/{name}"));
        group.throughput(Throughput::Elements(1));
        for rules in RULES {
            let policies = Policies::new(rules, by);
            let subject = policies.compiler.subject(policies.subject);
            let set = subject.ingress.expect("policies for ingress");
            let classes = policies.compiler.classes();
            let count = rules.min(peers);
            let asked: Vec<_> = (0..count).map(|at| policies.peers[at * (rules / count)]).collect();
            let mut at = 0;
            group.bench_function(rules.to_string(), |bencher| {
                bencher.iter(|| {
                    at = (at + 7919) % count;
                    let peer = black_box(asked[at]);
                    set.judge(classes.lookup(NETWORK, peer), peer, 17, 85)
                });
            });
        }
        group.finish();
    }
}

/// Every packet of a burst is judged anew, both its ends having policies. "none" follows connections too, without policies.
fn misses(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("policy/miss");
    group.throughput(Throughput::Elements(Rig::BURST));
    let mut rig = Rig::new(Way::Local, FLOWS);
    group.bench_function("none", |bencher| bencher.iter(|| rig.miss()));
    for rules in RULES {
        let policies = Policies::new(rules, By::Labels);
        let mut rig = Rig::with_policy(Way::Local, FLOWS, Some(&policies));
        group.bench_function(rules.to_string(), |bencher| bencher.iter(|| rig.miss()));
    }
    group.finish();
}

fn hits(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("policy/hit");
    group.throughput(Throughput::Elements(Rig::BURST));
    let policies = Policies::new(RULES[2], By::Labels);
    for (name, policies) in [("none", None), ("100000", Some(&policies))] {
        let mut rig = Rig::with_policy(Way::Local, FLOWS, policies);
        let before = allocations();
        (0..1000).for_each(|_| rig.turn());
        assert_eq!(allocations() - before, 0, "the hit path allocates");
        group.bench_function(name, |bencher| bencher.iter(|| rig.turn()));
    }
    group.finish();
}

criterion_group!(benches, lookups, misses, hits);
criterion_main!(benches);
