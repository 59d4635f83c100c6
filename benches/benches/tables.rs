//! The tables of the miss path: routes and stations, by size. Names are `what/case/entries`.

use std::net::{IpAddr, Ipv4Addr};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use vswitch_benches::CountingAllocator;
use vswitch_dataplane::Location;
use vswitch_dataplane::table::fdb::Fdb;
use vswitch_dataplane::table::route::{NextHop, Routes};
use vswitch_net::{MacAddr, NetworkIndex, PeerIndex};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

const NETWORK: NetworkIndex = NetworkIndex(0);

fn routes(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("route/lookup");
    group.throughput(Throughput::Elements(1));
    for entries in [100_u32, 100_000] {
        let mut routes = Routes::default();
        let prefix = |number: u32| IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + (number << 8)));
        for number in 0..entries {
            routes.insert(NETWORK, prefix(number), 24, NextHop::Peer(PeerIndex(number as u16)));
        }
        let mut number = 0;
        group.bench_function(entries.to_string(), |bencher| {
            bencher.iter(|| {
                number = (number + 7919) % entries;
                routes.lookup(NETWORK, prefix(number))
            });
        });
    }
    group.finish();
}

fn stations(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("fdb/lookup");
    group.throughput(Throughput::Elements(1));
    for entries in [100_u64, 100_000] {
        let mut fdb = Fdb::default();
        for number in 0..entries {
            fdb.insert(NETWORK, MacAddr::local_from(number), Location::Peer(PeerIndex(number as u16)));
        }
        let mut number = 0;
        group.bench_function(entries.to_string(), |bencher| {
            bencher.iter(|| {
                number = (number + 7919) % entries;
                fdb.lookup(NETWORK, MacAddr::local_from(number))
            });
        });
    }
    group.finish();
}

criterion_group!(benches, routes, stations);
criterion_main!(benches);
