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
//! finds out who began them, but nothing is dropped for what a connection is or is not.

use std::net::IpAddr;

use vswitch_net::{NetworkIndex, PortId};
use vswitch_xsk::{Packet, Umem};

use crate::connection::{Connections, ELSEWHERE, Entry, State, Tuple, quoted, tcp};
use crate::decide::is_discovery;
use crate::icmp;
use crate::intact::is_intact;
use crate::meta::{Kind, Meta};
use crate::parse::{ICMP, ICMPV6, IGMP, SCTP, TCP, byte_at};
use crate::snapshot::{SenderCheck, Snapshot};
use crate::table::flow::NO_WINDOW;
use crate::table::policy::{Class, Judgement, RuleId, Subject};
use crate::verdict::DropReason;

/// What is asked.
pub(crate) struct Passage<'a> {
    pub(crate) snapshot: &'a Snapshot,
    pub(crate) connections: &'a Connections,
    pub(crate) umem: &'a Umem,
    pub(crate) packet: &'a Packet,
    pub(crate) meta: &'a Meta,
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
    Admitted { window_bits: NO_WINDOW, allowed_by: [None; 2], log: None, is_lasting: true };

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
    let Passage { snapshot, meta, .. } = *passage;
    let sender = snapshot.port(meta.ingress).map(|port| &port.policy);
    let receiver = passage.to.and_then(|port| snapshot.port(port)).map(|port| &port.policy);
    let Some((source, destination)) = meta.addresses() else {
        return may_be_unread(meta, sender, receiver).then_some(PASSED).ok_or(DropReason::PolicyUnread.into());
    };
    if is_of_link(meta) {
        return Ok(PASSED);
    }
    // Nobody is protected from himself.
    let is_own = passage.to == Some(meta.ingress);
    let from = End { subject: sender.filter(|_| !is_own), address: source };
    let to = End { subject: receiver.filter(|_| !is_own), address: destination };
    let is_policed = from.is_policed() || to.is_policed();
    // What changes nothing is its receiver's to check.
    let is_change = meta.is_control || icmp::is_error(meta);
    if is_policed && is_change && !is_intact(passage.packet, passage.umem, meta) {
        return Err(DropReason::BadChecksum.into());
    }
    if icmp::is_error(meta) {
        return related(passage, from, to, is_policed);
    }
    if !meta.has_ports && meta.fragment.is_some() {
        return unjudged(passage, from, to);
    }
    let ask = |from, to, port| {
        let Meta { network, protocol, .. } = *meta;
        Question { snapshot, network, from, to, protocol, port: Some(port) }.answer()
    };
    match Tuple::of(meta) {
        None => {
            // ICMP that belongs to no question: each is judged by itself, by type and code.
            let answer = ask(from, to, meta.key.fields().ports.source);
            answer.judgement.admit(|| false).map(|log| Admitted { log, ..PASSED })
        }
        Some(tuple) => follow(passage, &tuple, from, to, is_policed, ask),
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
fn follow<'a>(
    passage: &Passage<'_>,
    tuple: &Tuple,
    from: End<'a>,
    to: End<'a>,
    is_policed: bool,
    ask: impl Fn(End<'a>, End<'a>, u16) -> Answer,
) -> Result<Admitted, Refused> {
    let Passage { snapshot, connections, meta, now_ns, .. } = *passage;
    let head = passage.packet.head().data();
    let (key, is_low) = tuple.key(meta.network);
    let hash = key.hash(connections.config().seed);
    let segment = (meta.protocol == TCP && meta.has_l4()).then(|| tcp::Segment::parse(meta, head)).transpose()?;
    if is_policed && let Some(segment) = &segment {
        if segment.is_impossible() {
            return Err(DropReason::TcpFlags.into());
        }
        if meta.is_control && meta.fragment.is_some() {
            return Err(DropReason::FragmentedSyn.into());
        }
    }
    let (there, back) = (port_of(meta), port_back(meta));
    let place = |port: PortId| if snapshot.access(port).is_some() { port } else { ELSEWHERE };
    let (here, there_at) = (place(meta.ingress), passage.to.map_or(ELSEWHERE, place));
    let mut shard = connections.shard(hash);
    if let Some(at) = shard.find(hash, &key) {
        let entry = shard.get_mut(at);
        let is_over = entry.is_expired(now_ns, &connections.config().timeouts)
            || segment.is_some_and(|segment| tcp::is_reuse(entry.state, &segment))
            || (entry.state == State::Shutdown && sctp_begins(meta, head));
        if !is_over {
            let side = usize::from(is_low != entry.is_from_low);
            // What would begin one must be allowed to, from whichever side.
            let is_beginning = segment.is_some_and(|segment| tcp::is_beginning(entry, side, &segment))
                || (side == 1 && sctp_begins(meta, head));
            if is_beginning {
                ask(from, to, there).judgement.admit(|| false)?;
            }
            // Who began has a place, and policies; the same addresses elsewhere are others.
            let places = if side == 0 { [here, there_at] } else { [there_at, here] };
            if entry.places != places {
                entry.generation = 0;
            }
            // As who began would be judged now; if that was a guess, as either might have been.
            let is_guess = entry.is_picked_up;
            let again = |side: usize| if side == 0 { ask(from, to, there) } else { ask(to, from, back) };
            let refused = judge_again(entry, snapshot, connections, || {
                let answer = again(side);
                if is_guess && !answer.judgement.is_allowed { again(1 - side) } else { answer }
            });
            if let Some(refused) = refused {
                // Another end than the one it was judged for is no reason to end it.
                if entry.places == places {
                    connections.remove(&mut shard, at);
                }
                return Err(refused);
            }
            entry.places = places;
            match step(entry, side, segment.as_ref(), meta, head, passage.last_seq, now_ns) {
                Err(reason) if is_policed => return Err(reason.into()),
                // Nobody asked to be protected from it.
                Err(_) => return Ok(Admitted { is_lasting: false, ..PASSED }),
                Ok(()) => {}
            }
            entry.used_ns = now_ns;
            entry.heard |= 1 << side;
            entry.is_replied |= is_assured(entry);
            let window_bits = if segment.is_some() { tcp::window_bits(entry, side) } else { NO_WINDOW };
            if entry.is_replied {
                shard.unlist(at);
            }
            return Ok(Admitted { window_bits, ..PASSED });
        }
        connections.remove(&mut shard, at);
    }
    // Nothing is known of it.
    if is_policed && !is_intact(passage.packet, passage.umem, meta) {
        return Err(DropReason::BadChecksum.into());
    }
    let begins = match (tuple.is_echo, &segment, meta.protocol) {
        (Some(asks), ..) => asks,
        (_, Some(segment), _) => segment.flags & (tcp::SYN | tcp::ACK | tcp::RST) == tcp::SYN,
        (.., TCP) => false,
        (.., SCTP) => sctp_chunk(meta, head) == Some(SCTP_INIT),
        _ => true,
    };
    let may_pick_up = connections.config().pick_up.is_on(now_ns);
    if !begins && is_policed && !(may_pick_up && tuple.is_echo.is_none()) {
        return Err(DropReason::NoConnection.into());
    }
    let is_reset = segment.is_some_and(|segment| segment.flags & tcp::RST != 0);
    if !begins && (is_reset || tuple.is_echo.is_some() || (segment.is_none() && meta.protocol == TCP)) {
        return if is_policed {
            Err(DropReason::NoConnection.into())
        } else {
            Ok(Admitted { is_lasting: false, ..PASSED })
        };
    }
    let answer = ask(from, to, there);
    let mut began = 0;
    let mut judgement = answer.judgement;
    let mut rules = answer.rules;
    if !judgement.is_allowed && !begins {
        // Taken up in the middle: this may be the answering side.
        let reverse = ask(to, from, back);
        if reverse.judgement.is_allowed {
            (began, judgement, rules) = (1, reverse.judgement, reverse.rules);
        }
    }
    let log = judgement.admit(|| !ask(to, from, back).judgement.is_allowed)?;
    let (state, mut ends) = match (&segment, meta.protocol) {
        (Some(segment), _) => tcp::begin(segment),
        (None, SCTP) => (if begins { State::Init } else { State::Associated }, Default::default()),
        _ => (State::New, Default::default()),
    };
    if began == 1 {
        ends.swap(0, 1);
    }
    let places = if began == 0 { [here, there_at] } else { [there_at, here] };
    let mut entry = Entry::new(key, is_low == (began == 0), places, state, now_ns);
    entry.heard = 1 << began;
    entry.generation = snapshot.generation;
    entry.ends = ends;
    entry.rules = rules;
    entry.is_picked_up = !begins;
    let window_bits = if segment.is_some() { tcp::window_bits(&entry, began) } else { NO_WINDOW };
    // The host speaks for many.
    let is_limited = snapshot.access(meta.ingress).is_some_and(|access| access.check != SenderCheck::Elsewhere);
    if !connections.insert(&mut shard, hash, entry, is_limited) && is_policed {
        return Err(DropReason::ConnectionsFull.into());
    }
    let allowed_by = rules.map(|rule| (rule != RuleId::NONE).then_some(rule));
    Ok(Admitted { window_bits, allowed_by, log, is_lasting: true })
}

/// Judges a connection again that another generation has judged. The refusal, if it is no longer allowed.
fn judge_again(
    entry: &mut Entry,
    snapshot: &Snapshot,
    connections: &Connections,
    ask: impl FnOnce() -> Answer,
) -> Option<Refused> {
    if entry.generation == snapshot.generation {
        return None;
    }
    entry.generation = snapshot.generation;
    if connections.config().keeps_established && entry.is_replied {
        return None;
    }
    let answer = ask();
    entry.rules = answer.rules;
    answer.judgement.admit(|| false).err()
}

/// Takes a connection one packet further.
fn step(
    entry: &mut Entry,
    side: usize,
    segment: Option<&tcp::Segment>,
    meta: &Meta,
    head: &[u8],
    last_seq: Option<u32>,
    now_ns: u64,
) -> Result<(), DropReason> {
    match (meta.protocol, segment) {
        (TCP, Some(segment)) => tcp::advance(entry, side, segment, last_seq, now_ns)?,
        (TCP, None) => {}
        (SCTP, _) => {
            // RFC 9260 section 3.2: COOKIE ACK opens; ABORT and the three of SHUTDOWN close.
            entry.state = match (sctp_chunk(meta, head), entry.state) {
                (Some(SCTP_COOKIE_ACK), _) => State::Associated,
                (Some(6 | 7 | 8 | 14), _) => State::Shutdown,
                (_, state) => state,
            };
        }
        _ if side == 1 => entry.state = State::Replied,
        _ => {}
    }
    Ok(())
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

/// An INIT where something is known already.
fn sctp_begins(meta: &Meta, head: &[u8]) -> bool {
    meta.protocol == SCTP && meta.has_l4() && sctp_chunk(meta, head) == Some(SCTP_INIT)
}

/// An ICMP error goes the way of the connection that it quotes.
fn related(passage: &Passage<'_>, from: End<'_>, to: End<'_>, is_policed: bool) -> Result<Admitted, Refused> {
    let Passage { snapshot, connections, meta, now_ns, .. } = *passage;
    let unrelated = || if is_policed { Err(DropReason::UnrelatedError.into()) } else { Ok(PASSED) };
    let Ok(tuple) = quoted(meta, passage.packet.head().data()) else { return unrelated() };
    if tuple.source != [meta.key.0[6], meta.key.0[7]] {
        // It is no word about anything that its receiver has sent.
        return unrelated();
    }
    let (key, is_low) = tuple.key(meta.network);
    let hash = key.hash(connections.config().seed);
    let shard = connections.shard(hash);
    let Some(at) = shard.find(hash, &key) else { return unrelated() };
    let entry = shard.get(at);
    if entry.is_expired(now_ns, &connections.config().timeouts) {
        return unrelated();
    }
    // The quoted packet came from who gets the error, so that is an end of the connection; who reports may be a router
    // on the way, and only if it is the other end its policies are known here.
    let began_by_receiver = is_low == entry.is_from_low;
    let [low, high] = entry.key.ends();
    let (other, _) = if is_low { high } else { low };
    let reporter = End { subject: from.subject.filter(|_| from.address == other), address: other };
    let port = if tuple.is_echo.is_some() {
        let kind: u16 = if tuple.protocol == ICMP { 8 } else { 128 };
        kind << 8
    } else if began_by_receiver {
        tuple.ports.1
    } else {
        tuple.ports.0
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
        let judge = |set: &crate::table::policy::PolicySet, peer: &End<'_>| match self.port {
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
