//! Latencies: one histogram, its summary, its file.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::V2Serializer;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, Tag};
use serde_json::{Value, json};

/// Longest latency that is told apart: a minute.
const MAX_NS: u64 = 60_000_000_000;

/// What is said of a histogram; microseconds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Summary {
    pub(crate) samples: u64,
    min: f64,
    p50: f64,
    p99: f64,
    p999: f64,
    max: f64,
}

/// An empty histogram of nanoseconds, three digits.
pub(crate) fn histogram() -> Histogram<u64> {
    // The bounds are constants and right.
    Histogram::new_with_bounds(1, MAX_NS, 3).unwrap_or_else(|_| unreachable!())
}

/// Writes it in HdrHistogram's log format, one interval, for its plotter and others that read it.
#[expect(clippy::disallowed_methods, reason = "the log says when it was written")]
pub(crate) fn write(histogram: &Histogram<u64>, file: &Path) -> anyhow::Result<()> {
    let name = file.display();
    let mut output = File::create(file).with_context(|| format!("cannot write {name}"))?;
    let mut serializer = V2Serializer::new();
    let mut log = IntervalLogWriterBuilder::new()
        .add_comment("latency, nanoseconds")
        .with_start_time(SystemTime::now())
        .begin_log_with(&mut output, &mut serializer)
        .with_context(|| format!("cannot write {name}"))?;
    log.write_histogram(histogram, Duration::ZERO, Duration::ZERO, Tag::new("latency"))
        .map_err(|error| anyhow::anyhow!("cannot write {name}: {error:?}"))
}

impl Summary {
    pub(crate) fn of(histogram: &Histogram<u64>) -> Summary {
        let micros = |ns: u64| ns as f64 / 1e3;
        Summary {
            samples: histogram.len(),
            min: micros(histogram.min()),
            p50: micros(histogram.value_at_quantile(0.5)),
            p99: micros(histogram.value_at_quantile(0.99)),
            p999: micros(histogram.value_at_quantile(0.999)),
            max: micros(histogram.max()),
        }
    }

    pub(crate) fn to_json(self) -> Value {
        json!({
            "samples": self.samples, "min_us": self.min, "p50_us": self.p50, "p99_us": self.p99, "p99.9_us": self.p999,
            "max_us": self.max,
        })
    }

    pub(crate) fn to_text(self) -> String {
        format!(
            "latency of {}: min {:.1}, p50 {:.1}, p99 {:.1}, p99.9 {:.1}, max {:.1} us",
            self.samples, self.min, self.p50, self.p99, self.p999, self.max
        )
    }
}
