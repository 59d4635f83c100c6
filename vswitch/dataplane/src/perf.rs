//! Where a worker's time goes: how many packets its bursts have, and what each stage of the walk costs a packet.
//!
//! Bursts are always counted. Stages are timed in one turn of [`SAMPLE`], with the processor's counter, so that looking costs
//! less than a hundredth of what is looked at. The model is Open vSwitch's `pmd-perf-show`.

use vswitch_xsk::cycles;

/// One turn in so many is timed: a prime, so that turns which alternate are both met.
const SAMPLE: u32 = 31;

/// Sizes of bursts are told apart by powers of two: 1, 2 and 3, 4 to 7, ..., 64.
pub const BURST_BUCKETS: usize = 7;

/// A part of the walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Stage {
    /// Taking packets out of the receive ring, and giving frames to the fill ring.
    Receive,
    /// Reading headers.
    Parse,
    /// Finding flow entries; deciding about those that have none.
    Lookup,
    /// Writing headers, and joining segments.
    Rewrite,
    /// Putting packets into the transmit rings.
    Queue,
    /// Showing them to the kernel, whose transmit is most of it, and taking frames back.
    Transmit,
}

impl Stage {
    /// All of them, in the order of the walk.
    pub const ALL: [Stage; 6] =
        [Stage::Receive, Stage::Parse, Stage::Lookup, Stage::Rewrite, Stage::Queue, Stage::Transmit];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Receive => "receive",
            Stage::Parse => "parse",
            Stage::Lookup => "lookup",
            Stage::Rewrite => "rewrite",
            Stage::Queue => "queue",
            Stage::Transmit => "transmit",
        }
    }
}

/// What one worker saw of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Perf {
    /// Bursts by their size.
    pub bursts: [u64; BURST_BUCKETS],
    /// Cycles of the timed turns that had packets, by stage.
    pub cycles: [u64; Stage::ALL.len()],
    /// Packets of these turns.
    pub timed_packets: u64,
    /// Turns since the last one that was timed.
    turns: u32,
    /// When the stage under way began; none in a turn that is not timed.
    since: Option<u64>,
    /// Of the turn under way.
    turn: [u64; Stage::ALL.len()],
    /// Packets of the turn under way.
    packets: usize,
}

impl Perf {
    /// A turn begins.
    #[inline(always)]
    pub(crate) fn begin(&mut self) {
        self.turns += 1;
        if self.turns == SAMPLE {
            self.turns = 0;
            self.turn = [0; Stage::ALL.len()];
            self.since = Some(cycles());
        }
    }

    /// A stage ends, and the next begins.
    #[inline(always)]
    pub(crate) fn lap(&mut self, stage: Stage) {
        if let Some(since) = &mut self.since {
            let now = cycles();
            self.turn[stage as usize] += now.wrapping_sub(*since);
            *since = now;
        }
    }

    /// A burst came.
    #[inline(always)]
    pub(crate) fn burst(&mut self, packets: usize) {
        self.bursts[(packets.max(1).ilog2() as usize).min(BURST_BUCKETS - 1)] += 1;
    }

    /// So many packets go their way.
    #[inline(always)]
    pub(crate) fn walked(&mut self, packets: usize) {
        self.packets += packets;
    }

    /// The turn ends; how many packets went their way. One without packets says nothing of what packets cost.
    #[inline(always)]
    pub(crate) fn end(&mut self) -> usize {
        let packets = std::mem::take(&mut self.packets);
        if self.since.take().is_some() && packets > 0 {
            self.timed_packets += packets as u64;
            self.cycles.iter_mut().zip(self.turn).for_each(|(total, turn)| *total += turn);
        }
        packets
    }
}
