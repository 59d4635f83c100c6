//! Judging: may this packet pass, by the connection that it belongs to, or by the policies of both ends?
//!
//! # What
//!
//! [`admit`] comes after the route is known and before a flow entry is made. What belongs to a connection passes, if the
//! connection was judged by this generation or is allowed by it still; what begins one is judged: the sender's policies for
//! egress, then the receiver's for ingress. Policies are compiled ([`crate::table::policy`]), connections are in one table
//! ([`crate::connection`]).
//!
//! # Who is protected
//!
//! An end with policies is *policed*. Between ends that are not, connections are followed, so that a policy that comes later
//! finds out who began them, but nothing is dropped for what a connection is or is not; and no pod begins more of them than
//! its share, so that others find room.

use std::net::IpAddr;
use std::sync::MutexGuard;

use vswitch_net::{NetworkIndex, PortId};
use vswitch_xsk::{Packet, Umem};

use crate::connection::{Connections, ELSEWHERE, Entry, Found, Quote, Shard, Sought, State, Tuple, quoted, tcp};
use crate::decide::is_discovery;
use crate::icmp;
use crate::intact::is_intact;
use crate::meta::{Kind, Meta, address};
use crate::nat::{self, Turn};
use crate::parse::{ICMP, ICMPV6, IGMP, SCTP, TCP, byte_at};
use crate::snapshot::Snapshot;
use crate::table::flow::NO_WINDOW;
use crate::table::policy::{Class, Judgement, PolicySet, RuleId, Subject};
use crate::translate::Translation;
use crate::verdict::DropReason;

/// What is asked.
pub(crate) struct Passage<'a> {
    pub(crate) snapshot: &'a Snapshot,
    pub(crate) connections: &'a Connections,
    pub(crate) umem: &'a Umem,
    pub(crate) packet: &'a Packet,
    pub(crate) meta: &'a Meta,
    /// What it leaves as, if not as it came.
    pub(crate) turn: Option<&'a Turn>,
    /// The port that it goes to, if that is one here.
    pub(crate) to: Option<PortId>,
    /// The newest sequence number of its flow.
    pub(crate) last_seq: Option<u32>,
    pub(crate) now_ns: u64,
}

/// It may pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Admitted {
    /// How far the flow's sequence numbers may be from each other.
    pub(crate) window_bits: u8,
    /// Rules that allowed a new connection, of who began and of who answers.
    pub(crate) allowed_by: [Option<RuleId>; 2],
    /// A rule that wants it told.
    pub(crate) log: Option<RuleId>,
    /// False if another packet of the same flow may be judged otherwise.
    pub(crate) is_lasting: bool,
    /// What it leaves as, if not as it came.
    pub(crate) leaves_as: Option<Translation>,
}

/// It may not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refused {
    pub(crate) reason: DropReason,
    /// The rule that denies it, if one does.
    pub(crate) rule: Option<RuleId>,
    /// True if its answers would be denied too, so that no connection can ever change the verdict.
    pub(crate) is_lasting: bool,
}

impl From<DropReason> for Refused {
    fn from(reason: DropReason) -> Self {
        Refused { reason, rule: None, is_lasting: false }
    }
}

/// Passes without a connection.
pub(crate) const PASSED: Admitted =
    Admitted { window_bits: NO_WINDOW, allowed_by: [None; 2], log: None, is_lasting: true, leaves_as: None };

/// One end of a connection: its policies, if it is here, and its address.
#[derive(Clone, Copy)]
struct End<'a> {
    subject: Option<&'a Subject>,
    address: IpAddr,
}

/// A connection as policies see it.
struct Question<'a> {
    snapshot: &'a Snapshot,
    network: NetworkIndex,
    from: End<'a>,
    to: End<'a>,
    protocol: u8,
    /// None if it is not known.
    port: Option<u16>,
}

/// What both ends say.
struct Answer {
    /// The one that decided: of who denies, else of who has policies.
    judgement: Judgement,
    rules: [RuleId; 2],
}

/// Whether a packet may pass.
///
/// # Errors
///
/// Why not.
pub(crate) fn admit(passage: &Passage<'_>) -> Result<Admitted, Refused> {
    let Passage { snapshot, turn, .. } = *passage;
    // From who sent it to who gets it.
    let meta = turn.map_or(passage.meta, |turn| &turn.meta);
    let sender = snapshot.port(meta.ingress).map(|port| &port.policy);
    let receiver = passage.to.and_then(|port| snapshot.port(port)).map(|port| &port.policy);
    let Some((source, destination)) = meta.addresses() else {
        return may_be_unread(meta, sender, receiver).then_some(PASSED).ok_or(DropReason::PolicyUnread.into());
    };
    if is_of_link(meta) {
        return Ok(PASSED);
    }
    // Nobody is protected from himself; the host speaks for many.
    let is_own = passage.to == Some(meta.ingress) && snapshot.is_pod(meta.ingress);
    let from = End { subject: sender.filter(|_| !is_own), address: source };
    let to = End { subject: receiver.filter(|_| !is_own), address: destination };
    let is_policed = from.is_policed() || to.is_policed();
    // What changes nothing is its receiver's to check.
    let is_change = meta.is_control || (icmp::is_error(meta) && turn.is_none());
    if is_policed && is_change && !is_intact(passage.packet, passage.umem, passage.meta) {
        return Err(DropReason::BadChecksum.into());
    }
    if icmp::is_error(meta) {
        return related(passage, from, to, is_policed);
    }
    if !meta.has_ports && meta.fragment.is_some() {
        return unjudged(passage, from, to);
    }
    match Tuple::of(passage.meta) {
        None => {
            // ICMP that belongs to no question: each is judged by itself, by type and code.
            let Meta { network, protocol, .. } = *meta;
            let question = Question { snapshot, network, from, to, protocol, port: Some(port_of(meta)) };
            question.answer().judgement.admit(|| false).map(|log| Admitted { log, ..PASSED })
        }
        Some(tuple) => follow(&Walk::new(passage, tuple, from, to, is_policed)?),
    }
}

/// Whether a packet that goes to many may go to one of them, a port here or a peer: by addresses and ports alone, for nobody
/// has asked for it.
pub(crate) fn may_flood(snapshot: &Snapshot, meta: &Meta, to: Option<PortId>) -> bool {
    let subject = |port| snapshot.port(port).map(|port| &port.policy);
    let (sender, receiver) = (subject(meta.ingress), to.and_then(subject));
    let Some((source, destination)) = meta.addresses() else { return may_be_unread(meta, sender, receiver) };
    if is_of_link(meta) {
        return true;
    }
    let from = End { subject: sender, address: source };
    let to = End { subject: receiver, address: destination };
    let port = (meta.has_ports || meta.fragment.is_none()).then(|| port_of(meta));
    let question = Question { snapshot, network: meta.network, from, to, protocol: meta.protocol, port };
    question.answer().judgement.is_allowed
}

/// What belongs to a connection, or may begin one.
fn follow(walk: &Walk<'_>) -> Result<Admitted, Refused> {
    let Passage { connections, meta, now_ns, .. } = *walk.passage;
    if walk.is_policed
        && let Some(segment) = &walk.segment
    {
        if segment.is_impossible() {
            return Err(DropReason::TcpFlags.into());
        }
        if meta.is_control && meta.fragment.is_some() {
            return Err(DropReason::FragmentedSyn.into());
        }
    }
    let sought = connections.seek(walk.tuple, meta.network);
    loop {
        let Found { mut shard, at, side, is_after } = match connections.find(&sought) {
            Ok(found) => found,
            Err(shard) => return walk.begin(shard, &sought, false),
        };
        let begins = begins_anew(meta, walk.passage.packet.head().data());
        let is_over = shard.get(at).is_over(now_ns, &connections.config().timeouts, begins, side);
        match (is_over, is_after, side) {
            (true, ..) => {
                // Flow entries hold on if the new one leaves as this one did.
                if shard.leaves_as(at, side) != walk.wanted() {
                    connections.end_epoch();
                }
                connections.remove_silent(&mut shard, at);
            }
            (false, false, _) => return walk.go_on(&mut shard, at, side),
            // It looks as another's packets do when they have been translated, and must not be taken for one of them.
            (false, true, 0) => {
                drop(shard);
                return walk.begin(connections.shard(sought.hash), &sought, true);
            }
            (false, true, _) => return Err(DropReason::NoConnection.into()),
        }
    }
}

/// A packet beside its connection.
struct Walk<'a> {
    passage: &'a Passage<'a>,
    tuple: Tuple,
    /// Its header, if it is TCP and has one.
    segment: Option<tcp::Segment>,
    /// The type of its first chunk, if it is SCTP and has one.
    chunk: Option<u8>,
    from: End<'a>,
    to: End<'a>,
    is_policed: bool,
}

impl<'a> Walk<'a> {
    fn new(
        passage: &'a Passage<'a>,
        tuple: Tuple,
        from: End<'a>,
        to: End<'a>,
        is_policed: bool,
    ) -> Result<Walk<'a>, DropReason> {
        let (meta, head) = (passage.meta, passage.packet.head().data());
        let has = |protocol: u8| meta.protocol == protocol && meta.has_l4();
        let segment = has(TCP).then(|| tcp::Segment::parse(meta, head)).transpose()?;
        let chunk = if has(SCTP) { sctp_chunk(meta, head) } else { None };
        Ok(Walk { passage, tuple, segment, chunk, from, to, is_policed })
    }

    /// What it is to leave as, if not as it came.
    fn wanted(&self) -> Option<Translation> {
        self.passage.turn.and_then(|turn| turn.leaves_as)
    }

    /// What policies say if this packet is of who began (0) or of who answers (1).
    fn ask(&self, side: usize) -> Answer {
        let Passage { snapshot, .. } = *self.passage;
        let meta = self.passage.turn.map_or(self.passage.meta, |turn| &turn.meta);
        let (from, to, port) = match side {
            0 => (self.from, self.to, port_of(meta)),
            _ => (self.to, self.from, port_back(meta)),
        };
        Question { snapshot, network: meta.network, from, to, protocol: meta.protocol, port: Some(port) }.answer()
    }

    /// The ports of who began and of who answers, if this packet is of that side.
    fn places(&self, side: usize) -> [PortId; 2] {
        let Passage { snapshot, meta, to, .. } = *self.passage;
        let place = |port: PortId| if snapshot.access(port).is_some() { port } else { ELSEWHERE };
        let (here, there) = (place(meta.ingress), to.map_or(ELSEWHERE, place));
        if side == 0 { [here, there] } else { [there, here] }
    }

    /// One packet more of a connection that is known.
    fn go_on(&self, shard: &mut Shard, at: u32, side: usize) -> Result<Admitted, Refused> {
        let Passage { snapshot, connections, last_seq, now_ns, .. } = *self.passage;
        let leaves_as = shard.leaves_as(at, side);
        if leaves_as != self.wanted() {
            // Begun or ended by another worker since the packet was routed.
            return Err(DropReason::NoConnection.into());
        }
        let entry = shard.get_mut(at);
        // What would begin one must be allowed to, from whichever side.
        let is_beginning = self.segment.is_some_and(|segment| tcp::is_beginning(entry, side, &segment))
            || (side == 1 && self.chunk == Some(SCTP_INIT));
        if is_beginning {
            self.ask(0).judgement.admit(|| false)?;
        }
        // The same addresses at other ports are others, of whom nothing was judged yet.
        let places = self.places(side);
        let is_elsewhere = entry.places != places;
        let may_stay = connections.config().keeps_established && entry.is_replied;
        if is_elsewhere || (entry.generation != snapshot.generation && !may_stay) {
            // As who began would be judged now; if that was a guess, as either might have been.
            let mut answer = self.ask(side);
            if entry.is_picked_up && !answer.judgement.is_allowed {
                answer = self.ask(1 - side);
            }
            if let Err(refused) = answer.judgement.admit(|| false) {
                if !is_elsewhere {
                    connections.remove(shard, at);
                }
                return Err(refused);
            }
            entry.rules = answer.rules;
        }
        (entry.generation, entry.places) = (snapshot.generation, places);
        match self.step(entry, side, last_seq, now_ns) {
            Err(reason) if self.is_policed => return Err(reason.into()),
            // Nobody asked to be protected from it.
            Err(_) => return Ok(Admitted { is_lasting: false, leaves_as, ..PASSED }),
            Ok(()) => {}
        }
        entry.used_ns = now_ns;
        entry.heard |= 1 << side;
        entry.is_replied |= is_assured(entry);
        let window_bits = self.window_bits(entry, side);
        if entry.is_replied {
            shard.unlist(at);
        }
        Ok(Admitted { window_bits, leaves_as, ..PASSED })
    }

    /// The first packet of a connection, or of one that was under way. `shard` is its own. It must leave with another port if
    /// it `is_taken` for one of another connection otherwise.
    fn begin<'s>(&self, mut shard: MutexGuard<'s, Shard>, sought: &Sought, is_taken: bool) -> Result<Admitted, Refused>
    where
        'a: 's,
    {
        let Passage { snapshot, connections, meta, now_ns, turn, .. } = *self.passage;
        if turn.is_some_and(|turn| turn.is_answer) {
            return Err(DropReason::NoConnection.into());
        }
        let leaves_as = self.wanted().or(is_taken.then(|| self.tuple.ends()));
        if self.is_policed && !is_intact(self.passage.packet, self.passage.umem, meta) {
            return Err(DropReason::BadChecksum.into());
        }
        let begins = self.begins();
        let is_echo = self.tuple.is_echo.is_some();
        if !begins && self.is_policed && (is_echo || !connections.config().pick_up.is_on(now_ns)) {
            return Err(DropReason::NoConnection.into());
        }
        // What ends one, or says too little, is no reason to take one up.
        let is_reset = self.segment.is_some_and(|segment| segment.flags & tcp::RST != 0);
        let is_headless = meta.protocol == TCP && self.segment.is_none();
        if !begins && (is_reset || is_echo || is_headless) {
            let passed = Admitted { is_lasting: false, ..PASSED };
            let may_pass = !self.is_policed && leaves_as.is_none();
            return if may_pass { Ok(passed) } else { Err(DropReason::NoConnection.into()) };
        }
        let (mut began, mut answer) = (0, self.ask(0));
        if !answer.judgement.is_allowed && !begins && leaves_as.is_none() {
            // Taken up in the middle: this may be the answering side.
            let reverse = self.ask(1);
            if reverse.judgement.is_allowed {
                (began, answer) = (1, reverse);
            }
        }
        let log = answer.judgement.admit(|| !self.ask(1).judgement.is_allowed)?;
        let (state, mut ends) = match (&self.segment, meta.protocol) {
            (Some(segment), _) => tcp::begin(segment),
            (None, SCTP) => (if begins { State::Init } else { State::Associated }, Default::default()),
            _ => (State::New, Default::default()),
        };
        if began == 1 {
            ends.swap(0, 1);
        }
        let leaves_as = match leaves_as {
            None => None,
            Some(wanted) => {
                // No two shards are locked at once.
                drop(shard);
                let leaves_as = nat::leave(connections, sought, wanted, now_ns)?;
                match connections.find_by_key(sought) {
                    Err(own) => shard = own,
                    // Another worker has begun it meanwhile; who sent this will send it again.
                    Ok(found) => {
                        drop(found);
                        connections.release(sought.tuple.translated(&leaves_as).reverse(), sought);
                        return Err(DropReason::NoConnection.into());
                    }
                }
                Some(leaves_as)
            }
        };
        let mut entry = Entry::new(sought.key, sought.is_low == (began == 0), self.places(began), state, now_ns);
        entry.heard = 1 << began;
        entry.generation = snapshot.generation;
        entry.ends = ends;
        entry.rules = answer.rules;
        entry.is_picked_up = !begins;
        let window_bits = self.window_bits(&entry, began);
        // The host speaks for many.
        let is_limited = snapshot.is_pod(meta.ingress);
        let is_known = connections.insert(&mut shard, sought.hash, entry, leaves_as, is_limited);
        drop(shard);
        if !is_known && let Some(leaves_as) = leaves_as {
            connections.release(sought.tuple.translated(&leaves_as).reverse(), sought);
            return Err(DropReason::ConnectionsFull.into());
        }
        if !is_known && self.is_policed {
            return Err(DropReason::ConnectionsFull.into());
        }
        Ok(Admitted { window_bits, allowed_by: entry.rules(), log, is_lasting: true, leaves_as })
    }

    /// True for what begins a connection, were there none.
    fn begins(&self) -> bool {
        match (self.tuple.is_echo, &self.segment, self.tuple.protocol) {
            (Some(asks), ..) => asks,
            (_, Some(segment), _) => segment.begins(),
            (.., TCP) => false,
            (.., SCTP) => self.chunk == Some(SCTP_INIT),
            _ => true,
        }
    }

    /// Takes a connection one packet further.
    fn step(&self, entry: &mut Entry, side: usize, last_seq: Option<u32>, now_ns: u64) -> Result<(), DropReason> {
        match (self.tuple.protocol, &self.segment) {
            (TCP, Some(segment)) => tcp::advance(entry, side, segment, last_seq, now_ns)?,
            (TCP, None) => {}
            // RFC 9260 section 3.2: COOKIE ACK opens; ABORT and the three of SHUTDOWN close.
            (SCTP, _) => match self.chunk {
                Some(SCTP_COOKIE_ACK) => entry.state = State::Associated,
                Some(6 | 7 | 8 | 14) => entry.state = State::Shutdown,
                _ => {}
            },
            _ if side == 1 => entry.state = State::Replied,
            _ => {}
        }
        Ok(())
    }

    fn window_bits(&self, entry: &Entry, side: usize) -> u8 {
        if self.segment.is_some() { tcp::window_bits(entry, side) } else { NO_WINDOW }
    }
}

/// True for a connection whose both ends have shown that they mean it, so that it makes room for nobody.
fn is_assured(entry: &Entry) -> bool {
    let is_open = matches!(
        entry.state,
        State::Established | State::FinWait | State::TimeWait | State::Associated | State::Replied
    );
    is_open && entry.heard == BOTH
}

/// Both ends have spoken.
const BOTH: u8 = 3;

/// An ICMP error goes the way of the connection that it quotes.
fn related(passage: &Passage<'_>, from: End<'_>, to: End<'_>, is_policed: bool) -> Result<Admitted, Refused> {
    let Passage { snapshot, connections, meta, now_ns, .. } = *passage;
    let unrelated = || if is_policed { Err(DropReason::UnrelatedError.into()) } else { Ok(PASSED) };
    let Ok(Quote { tuple, .. }) = quoted(meta, passage.packet.head().data()) else { return unrelated() };
    if to.address != address(tuple.source, tuple.is_v6) {
        // It is no word about anything that its receiver has sent.
        return unrelated();
    }
    let Ok(found) = connections.find(&connections.seek(tuple, meta.network)) else { return unrelated() };
    let Found { shard, at, side, is_after } = &found;
    let entry = shard.get(*at);
    if entry.is_expired(now_ns, &connections.config().timeouts) || *is_after {
        return unrelated();
    }
    // The quoted packet came from who gets the error, so that is an end of the connection; who reports may be a router
    // on the way, and only if it is the other end its policies are known here.
    let left = entry.tuple();
    let left = shard.translation(*at).map_or(left, |to| left.translated(to));
    let began_by_receiver = *side == 0;
    let other = if began_by_receiver { left.destination } else { entry.tuple().source };
    let other = address(other, tuple.is_v6);
    let reporter = End { subject: from.subject.filter(|_| from.address == other), address: other };
    let port = if tuple.is_echo.is_some() {
        let kind: u16 = if tuple.protocol == ICMP { 8 } else { 128 };
        kind << 8
    } else {
        left.ports.1
    };
    let (protocol, network) = (tuple.protocol, meta.network);
    let ask = || {
        let (from, to) = if began_by_receiver { (to, reporter) } else { (reporter, to) };
        Question { snapshot, network, from, to, protocol, port: Some(port) }.answer()
    };
    // Who reports may be neither end, so the connection itself is not judged by this; the error is.
    let is_judged =
        entry.generation == snapshot.generation || (connections.config().keeps_established && entry.is_replied);
    if is_judged { Ok(PASSED) } else { ask().judgement.admit(|| false).map(|_| PASSED) }
}

/// A later fragment that came before its first: without ports only what is allowed for all of them passes.
fn unjudged(passage: &Passage<'_>, from: End<'_>, to: End<'_>) -> Result<Admitted, Refused> {
    let Meta { network, protocol, .. } = *passage.meta;
    let question = Question { snapshot: passage.snapshot, network, from, to, protocol, port: None };
    if question.answer().judgement.is_allowed { Ok(PASSED) } else { Err(DropReason::FragmentUnjudged.into()) }
}

impl End<'_> {
    fn is_policed(&self) -> bool {
        self.subject.is_some_and(Subject::is_policed)
    }

    /// What applies to this end: the host has other policies for what it only forwards.
    fn subject(&self, own: impl FnOnce() -> Class) -> Option<&Subject> {
        let subject = self.subject?;
        match &subject.forwarded {
            Some(forwarded) if !own().is_host() => Some(forwarded),
            _ => Some(subject),
        }
    }
}

impl Question<'_> {
    fn answer(&self) -> Answer {
        let class = |end: &End<'_>| self.snapshot.classes.lookup(self.network, end.address);
        let judge = |set: &PolicySet, peer: &End<'_>| match self.port {
            Some(port) => set.judge(class(peer), peer.address, self.protocol, port),
            None => set.judge_unknown(class(peer), peer.address, self.protocol),
        };
        let egress = self.from.subject(|| class(&self.from)).and_then(|subject| subject.egress.as_deref());
        let egress = egress.map(|set| judge(set, &self.to));
        if let Some(judgement) = egress.filter(|judgement| !judgement.is_allowed) {
            return Answer { judgement, rules: [judgement.rule, RuleId::NONE] };
        }
        let ingress = self.to.subject(|| class(&self.to)).and_then(|subject| subject.ingress.as_deref());
        let ingress = ingress.map(|set| judge(set, &self.from));
        let rule = |judgement: Option<Judgement>| judgement.map_or(RuleId::NONE, |judgement| judgement.rule);
        let log = egress.and_then(|one| one.log).or(ingress.and_then(|one| one.log));
        let last = ingress.or(egress).unwrap_or(Judgement { is_allowed: true, rule: RuleId::NONE, log: None });
        Answer { judgement: Judgement { log, ..last }, rules: [rule(egress), rule(ingress)] }
    }
}

impl Judgement {
    /// The rule that wants it told, if it is allowed; the refusal otherwise.
    fn admit(self, is_lasting: impl FnOnce() -> bool) -> Result<Option<RuleId>, Refused> {
        if self.is_allowed {
            return Ok(self.log);
        }
        Err(Refused { reason: DropReason::PolicyDenied, rule: Some(self.rule), is_lasting: is_lasting() })
    }
}

/// True for what begins a connection, even where there was one that is over: a SYN, or SCTP's INIT.
pub(crate) fn begins_anew(meta: &Meta, head: &[u8]) -> bool {
    match meta.protocol {
        TCP if meta.is_syn => tcp::Segment::parse(meta, head).is_ok_and(|segment| segment.begins()),
        SCTP if meta.has_l4() => sctp_chunk(meta, head) == Some(SCTP_INIT),
        _ => false,
    }
}

const SCTP_INIT: u8 = 1;
const SCTP_COOKIE_ACK: u8 = 11;

/// The type of the first chunk (RFC 9260 section 3.2).
fn sctp_chunk(meta: &Meta, head: &[u8]) -> Option<u8> {
    byte_at(head, usize::from(meta.l4) + 12).ok()
}

/// Whether a frame that is neither IPv4 nor IPv6 may pass: ARP may; others cannot be judged, and could be anything (a tag that
/// its receiver takes off, say), so they pass between ends without policies only.
fn may_be_unread(meta: &Meta, sender: Option<&Subject>, receiver: Option<&Subject>) -> bool {
    let is_policed = |subject: Option<&Subject>| subject.is_some_and(Subject::is_policed);
    meta.kind == Kind::Arp || !(is_policed(sender) || is_policed(receiver))
}

/// How neighbors and groups are found, without which there is no link to have a policy on: neighbor discovery, IGMP, and
/// multicast listener discovery (RFC 3810 section 5).
fn is_of_link(meta: &Meta) -> bool {
    let kind = (meta.key.fields().ports.source >> 8) as u8;
    let is_mld = meta.protocol == ICMPV6 && meta.fragment.is_none() && matches!(kind, 130..=132 | 143);
    // Both kinds are of one link, and prove it by their hops (RFC 4861 section 7.1, RFC 3810 section 5, RFC 3376 section 4).
    (is_discovery(meta) && meta.ttl == 255)
        || (meta.destination.is_multicast() && meta.ttl == 1 && (meta.protocol == IGMP || is_mld))
}

/// The port that policies ask for: the receiver's, or the ICMP type and code.
fn port_of(meta: &Meta) -> u16 {
    let ports = meta.key.fields().ports;
    match meta.protocol {
        ICMP | ICMPV6 => ports.source,
        _ => ports.destination,
    }
}

/// The port that policies ask for if this is an answer.
fn port_back(meta: &Meta) -> u16 {
    let ports = meta.key.fields().ports;
    match meta.protocol {
        ICMP => 8 << 8,
        ICMPV6 => 128 << 8,
        _ => ports.source,
    }
}
