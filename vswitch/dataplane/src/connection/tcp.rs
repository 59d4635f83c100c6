//! TCP as somebody in between sees it.
//!
//! # What
//!
//! [`advance`] takes one segment through the state machine of RFC 9293, as far as a third party can know it: who has sent a
//! SYN, who a FIN, and whether a sequence number may be true. Windows are checked loosely: a segment must lie within the
//! largest window that its receiver can announce of the last one that was seen in its direction. Acknowledgements are
//! not looked at but in the handshake.
//!
//! # Why loosely
//!
//! Most segments take the flow table's way, which remembers one sequence number a flow and sends what is too far from it
//! here. What a blind attacker needs is to guess one in some thousands instead of one in two; what the stacks themselves
//! check (RFC 5961) they check anyway.

use super::shard::{End, Entry};
use super::state::State;
use crate::meta::Meta;
use crate::parse::{byte_at, u32_at};
use crate::verdict::DropReason;

/// Flags (RFC 9293 section 3.1).
pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const PSH: u8 = 8;
pub(crate) const ACK: u8 = 16;
pub(crate) const URG: u8 = 32;
/// Congestion window reduced (RFC 3168 section 6.1).
pub(crate) const CWR: u8 = 128;

/// Flags whose segments change a connection's state, and so never take the flow table's way.
pub(crate) const CONTROL: u8 = FIN | SYN | RST;

/// Largest shift of a window (RFC 7323 section 2.3), and what is announced with it at most.
const MAX_SHIFT: u8 = 14;
const MAX_WINDOW: i32 = 0xffff << MAX_SHIFT;

/// What is known of windows when the handshake was not seen: as much as may be.
const UNKNOWN_SHIFT: u8 = MAX_SHIFT;

/// Older knowledge of a sequence number than this is none: at ten gigabits a second, as many bytes as a window can have pass in
/// less.
const STALE_NS: u64 = 500_000_000;

/// One segment's header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) flags: u8,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    /// Bytes of data.
    pub(crate) data: u32,
    /// The window's shift that a SYN announces.
    pub(crate) shift: Option<u8>,
}

impl Segment {
    /// Reads the header at `meta.l4`.
    ///
    /// # Errors
    ///
    /// [`DropReason::Truncated`] or [`DropReason::Malformed`] if it disagrees with itself.
    pub(crate) fn parse(meta: &Meta, head: &[u8]) -> Result<Segment, DropReason> {
        let at = usize::from(meta.l4);
        let header = usize::from(byte_at(head, at + 12)? >> 4) * 4;
        let flags = byte_at(head, at + 13)?;
        let room = (usize::from(meta.l3) + meta.l3_len as usize).saturating_sub(at);
        if header < 20 || header > room {
            return Err(DropReason::Malformed);
        }
        let options = head.get(at + 20..at + header).ok_or(DropReason::Truncated)?;
        Ok(Segment {
            flags,
            seq: u32_at(head, at + 4)?,
            ack: u32_at(head, at + 8)?,
            data: (room - header) as u32,
            shift: if flags & SYN != 0 { window_shift(options) } else { None },
        })
    }

    fn has(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }

    /// True for what begins a connection.
    pub(crate) fn begins(&self) -> bool {
        self.flags & (SYN | ACK | RST) == SYN
    }

    /// The number after its last byte; SYN and FIN count as one each.
    fn end(&self) -> u32 {
        let marks = u32::from(self.has(SYN)) + u32::from(self.has(FIN));
        self.seq.wrapping_add(self.data).wrapping_add(marks)
    }

    /// True if no stack sends these flags together (RFC 9293 section 3.10.7).
    pub(crate) fn is_impossible(&self) -> bool {
        let marks = self.flags & (SYN | FIN | RST);
        marks.count_ones() > 1 && marks != FIN | RST || self.flags & (SYN | FIN | RST | ACK) == 0
    }
}

/// The window scale option (RFC 7323 section 2.2).
fn window_shift(mut options: &[u8]) -> Option<u8> {
    loop {
        match *options {
            [0, ..] | [] => return None,
            [1, ref rest @ ..] => options = rest,
            [3, 3, shift, ..] => return Some(shift.min(MAX_SHIFT)),
            [_, length, ..] if length >= 2 => options = options.get(usize::from(length)..)?,
            _ => return None,
        }
    }
}

/// What a connection that begins with this segment knows.
pub(crate) fn begin(segment: &Segment) -> (State, [End; 2]) {
    let mut ends = [End::default(); 2];
    ends[0].see(segment.end());
    if segment.has(SYN) {
        ends[0].shift = segment.shift.unwrap_or(0);
        ends[0].has_scale = segment.shift.is_some();
        return (State::SynSent, ends);
    }
    // Taken up in the middle.
    for end in &mut ends {
        (end.shift, end.has_scale) = (UNKNOWN_SHIFT, true);
    }
    (if segment.has(FIN) { State::FinWait } else { State::Established }, ends)
}

/// Whether a segment would begin a connection, were there none: such a one is judged as a beginning, whatever is known,
/// but when it crosses the other's.
pub(crate) fn is_beginning(entry: &Entry, from: usize, segment: &Segment) -> bool {
    let is_again = matches!(entry.state, State::SynSent) || (entry.state == State::SynReceived && entry.is_crossed);
    let is_own = from == 0 && !entry.is_picked_up;
    segment.has(SYN) && !segment.has(ACK) && !is_again && !is_own
}

/// One segment. `from` is the end that sent it, 0 for who began; `last` the newest sequence number that the flow table
/// has seen of it, if there is one.
///
/// # Errors
///
/// Why the segment cannot be of this connection; it was left as it was.
pub(crate) fn advance(
    entry: &mut Entry,
    from: usize,
    segment: &Segment,
    last: Option<u32>,
    now_ns: u64,
) -> Result<(), DropReason> {
    let to = 1 - from;
    let is_known = |entry: &Entry, end: usize| entry.ends[end].is_seen;
    match entry.state {
        State::SynSent => return advance_opening(entry, from, segment),
        State::SynReceived if segment.has(SYN) => {
            // Again, or the answer to the second SYN of two that crossed.
            if is_known(entry, from) && segment.end() != entry.ends[from].next && segment.data == 0 {
                return Err(DropReason::TcpWindow);
            }
            if segment.has(ACK) && entry.is_crossed {
                entry.state = State::Established;
            }
            return Ok(());
        }
        // A new SYN on an open connection: its receiver answers by what it knows, and that may end it (RFC 5961 section 4).
        _ if segment.has(SYN) => return Ok(()),
        State::Closed => return Ok(()),
        _ => {}
    }
    if is_known(entry, from) {
        let is_stale = last.is_none() && now_ns.saturating_sub(entry.used_ns) > STALE_NS;
        // Either may be the newer: the flow table's is of this worker, this one of the last segment that somebody judged. Which
        // one cannot be told from the numbers, for between two judgements they may have come half round.
        let window = window(&entry.ends[to]);
        let is_near = |seen: u32| (segment.seq.wrapping_sub(seen) as i32).unsigned_abs() <= window;
        let is_far = !is_near(entry.ends[from].next) && !last.is_some_and(is_near);
        if !is_stale && is_far {
            return Err(DropReason::TcpWindow);
        }
        if is_stale && is_far && segment.has(RST) {
            // Nobody here knows; its receiver does.
            return Ok(());
        }
    }
    entry.ends[from].see(segment.end());
    if segment.has(RST) {
        entry.state = State::Closed;
        return Ok(());
    }
    if segment.has(FIN) {
        entry.ends[from].is_closed = true;
    }
    let closed = entry.ends.iter().filter(|end| end.is_closed).count();
    entry.state = match (entry.state, closed) {
        (State::TimeWait, _) | (_, 2) => State::TimeWait,
        (_, 1) => State::FinWait,
        (State::SynReceived, _) if from == 0 || entry.is_crossed => State::Established,
        (state, _) => state,
    };
    Ok(())
}

/// The answer to a SYN.
fn advance_opening(entry: &mut Entry, from: usize, segment: &Segment) -> Result<(), DropReason> {
    if from == 0 {
        if segment.has(RST) {
            entry.state = State::Closed;
            return Ok(());
        }
        if !segment.has(SYN) || segment.has(ACK) {
            return Err(DropReason::TcpState);
        }
        // Again, maybe with another number: the newest counts.
        entry.ends[0] = End { shift: segment.shift.unwrap_or(0), has_scale: segment.shift.is_some(), ..End::default() };
        entry.ends[0].see(segment.end());
        return Ok(());
    }
    let is_answer = segment.has(ACK) && segment.ack == entry.ends[0].next;
    if segment.has(RST) {
        // RFC 9293 section 3.10.7.3: it must acknowledge the SYN.
        if !is_answer {
            return Err(DropReason::TcpWindow);
        }
        entry.state = State::Closed;
        return Ok(());
    }
    if !segment.has(SYN) {
        // Who answers still has an older connection; who asked will reset it (RFC 9293 section 3.5.1).
        return if segment.has(ACK) { Ok(()) } else { Err(DropReason::TcpState) };
    }
    if segment.has(ACK) && !is_answer {
        return Err(DropReason::TcpWindow);
    }
    entry.is_crossed = !segment.has(ACK);
    entry.ends[1].shift = segment.shift.unwrap_or(0);
    entry.ends[1].has_scale = segment.shift.is_some();
    entry.ends[1].see(segment.end());
    if !(entry.ends[0].has_scale && entry.ends[1].has_scale) {
        // Windows are scaled if both say so (RFC 7323 section 2.2).
        entry.ends.iter_mut().for_each(|end| end.shift = 0);
    }
    entry.state = State::SynReceived;
    Ok(())
}

/// How far a segment may be from the last one that was seen: the largest window that its receiver can announce, and as
/// much again as one offloaded packet carries.
fn window(receiver: &End) -> u32 {
    (0xffff_u32 << receiver.shift) + 0x1_0000
}

/// How far a segment of one direction may be from the last one, for the flow table: a power of two.
pub(crate) fn window_bits(entry: &Entry, from: usize) -> u8 {
    17 + entry.ends[1 - from].shift.min(MAX_SHIFT - 1)
}

impl End {
    /// Takes note of the number after a segment's last byte.
    fn see(&mut self, end: u32) {
        let ahead = end.wrapping_sub(self.next) as i32;
        // What lies behind by more than any window is not old: numbers came round since the last judgement.
        if !self.is_seen || !(-MAX_WINDOW..=0).contains(&ahead) {
            self.next = end;
        }
        self.is_seen = true;
    }
}
