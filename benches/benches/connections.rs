//! The connection table at its limits: a million connections, and a flood of ten million sources beside established ones.
//!
//! Memory and rates are printed; that established connections live through the flood is checked.

#![allow(clippy::disallowed_methods, reason = "a bench reads the clock")]

use std::time::Instant;

use vswitch_benches::flood::Flood;

const MILLION: u64 = 1_000_000;

fn main() {
    // `cargo bench` and `cargo test` hand arguments to every harness.
    if std::env::args().any(|argument| argument == "--test" || argument == "--list") {
        return;
    }
    let mut flood = Flood::new(1 << 20);
    let (generated, _) = timed(|| flood.generate(MILLION));
    let (opened, _) = timed(|| flood.open(MILLION));
    let counts = flood.counts();
    assert_eq!(counts.count as u64, MILLION, "every connection was taken");
    let bytes = counts.bytes as f64 / counts.count as f64;
    let each = (opened - generated) / MILLION as f64;
    println!("a million connections: {bytes:.0} bytes each, both directions, index included");
    println!(
        "set up: {:.0} ns each without making the packet ({:.2} million a second and core); {:.0} ns with",
        each * 1e9,
        1e-6 / each,
        opened / MILLION as f64 * 1e9
    );
    // Answered and acknowledged: established.
    let mut flood = Flood::new(1 << 20);
    const ESTABLISHED: u64 = 100_000;
    flood.establish(ESTABLISHED);
    let (flooded, _) = timed(|| flood.open_from(ESTABLISHED, 10 * MILLION));
    let counts = flood.counts();
    println!(
        "flood of ten million sources: {:.2} million SYN a second; {} connections of at most {}, {} made room",
        10.0 / flooded,
        counts.count,
        counts.limit,
        counts.evicted
    );
    let alive = flood.alive(ESTABLISHED);
    println!("{alive} of {ESTABLISHED} established connections go on after it");
    assert_eq!(alive, ESTABLISHED);
}

fn timed<T>(run: impl FnOnce() -> T) -> (f64, T) {
    let start = Instant::now();
    let value = run();
    (start.elapsed().as_secs_f64(), value)
}
