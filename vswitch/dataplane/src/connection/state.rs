//! How far a connection has come, and how long it is remembered when it falls silent.

/// State of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum State {
    /// TCP: SYN seen.
    SynSent,
    /// TCP: both SYNs seen.
    SynReceived,
    /// TCP: open.
    Established,
    /// TCP: one side has closed.
    FinWait,
    /// TCP: both sides have closed.
    TimeWait,
    /// TCP: reset.
    Closed,
    /// SCTP: INIT seen.
    Init,
    /// SCTP: open.
    Associated,
    /// SCTP: being closed, or aborted.
    Shutdown,
    /// Others: no answer yet.
    New,
    /// Others: answered.
    Replied,
}

/// How long a silent connection is remembered, by state, nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// TCP and SCTP before they are open.
    pub opening_ns: u64,
    /// Open TCP and SCTP. RFC 5382 asks for 2 hours and 4 minutes at least.
    pub established_ns: u64,
    /// TCP with one side closed.
    pub fin_wait_ns: u64,
    /// TCP with both sides closed (RFC 9293 section 3.4.2 has 2 MSL).
    pub time_wait_ns: u64,
    /// TCP and SCTP after a reset.
    pub closed_ns: u64,
    /// UDP without an answer.
    pub udp_new_ns: u64,
    /// UDP with one. RFC 4787 asks for 2 minutes at least.
    pub udp_replied_ns: u64,
    /// ICMP (RFC 5508 asks for 60 seconds at least).
    pub icmp_ns: u64,
    /// Other protocols.
    pub other_ns: u64,
}

const SECOND: u64 = 1_000_000_000;

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts {
            opening_ns: 30 * SECOND,
            established_ns: 8_000 * SECOND,
            fin_wait_ns: 120 * SECOND,
            time_wait_ns: 60 * SECOND,
            closed_ns: 10 * SECOND,
            udp_new_ns: 30 * SECOND,
            udp_replied_ns: 180 * SECOND,
            icmp_ns: 60 * SECOND,
            other_ns: 600 * SECOND,
        }
    }
}

impl Timeouts {
    /// The time of a state.
    pub fn of(&self, state: State, protocol: u8) -> u64 {
        use crate::parse::{ICMP, ICMPV6, UDP};
        match state {
            State::SynSent | State::SynReceived | State::Init => self.opening_ns,
            State::Established | State::Associated => self.established_ns,
            State::FinWait => self.fin_wait_ns,
            State::TimeWait => self.time_wait_ns,
            State::Closed | State::Shutdown => self.closed_ns,
            State::New | State::Replied if protocol == ICMP || protocol == ICMPV6 => self.icmp_ns,
            State::New if protocol == UDP => self.udp_new_ns,
            State::Replied if protocol == UDP => self.udp_replied_ns,
            State::New | State::Replied => self.other_ns,
        }
    }
}

impl State {
    /// All states.
    pub const ALL: [State; 11] = [
        State::SynSent,
        State::SynReceived,
        State::Established,
        State::FinWait,
        State::TimeWait,
        State::Closed,
        State::Init,
        State::Associated,
        State::Shutdown,
        State::New,
        State::Replied,
    ];

    /// As operators read it.
    pub fn name(self) -> &'static str {
        match self {
            State::SynSent => "syn-sent",
            State::SynReceived => "syn-received",
            State::Established => "established",
            State::FinWait => "fin-wait",
            State::TimeWait => "time-wait",
            State::Closed => "closed",
            State::Init => "init",
            State::Associated => "associated",
            State::Shutdown => "shutdown",
            State::New => "new",
            State::Replied => "replied",
        }
    }
}
