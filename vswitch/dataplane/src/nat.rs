//! Address translation, the decision: which packets leave with other addresses than they came with.
//!
//! # What
//!
//! A packet to a service's address goes to one of its backends; a packet from a pod to where an egress rule says leaves with
//! the rule's address. Both belong to a connection that remembers it ([`crate::connection`]), and so do its answers, which
//! are turned back, and ICMP errors, in which the quoted packet is turned back, too.
//!
//! # Where
//!
//! [`Turning::turn`] comes before the route is looked up, since that depends on the destination. What it gives is the packet as it is
//! routed and judged: from who really sent it, to who really gets it. So policies speak of pods, and never of a service's
//! address. When the packet is admitted, the connection keeps what it leaves as ([`leave`]), and the flow entry does, too.
//!
//! # References
//!
//! RFC 3022 (NAT), RFC 4787, RFC 5382 and RFC 5508 (what it owes to UDP, TCP and ICMP).

use std::net::IpAddr;

use vswitch_xsk::{Packet, Umem};

use crate::connection::{Connections, Found, Sought, Tuple, quoted};
use crate::icmp;
use crate::intact::is_intact;
use crate::judge::begins_anew;
use crate::meta::{Kind, Meta, address, words};
use crate::parse::{SCTP, TCP, UDP};
use crate::snapshot::Snapshot;
use crate::table::route::NextHop;
use crate::table::service::Front;
use crate::translate::{Translation, translate_error};
use crate::verdict::DropReason;

/// Ports that are tried for a connection whose own is taken.
const TRIES: u16 = 64;

/// The first port that a connection is given; those below are of services.
const FIRST_PORT: u16 = 1024;

/// The first port that Linux gives to who asks (`ip_local_port_range`); those below are of who serves.
const EPHEMERAL: u16 = 32_768;

/// A packet that leaves with other addresses or ports.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Turn {
    /// The packet from who sent it to who gets it, as it is routed and judged.
    pub(crate) meta: Meta,
    /// What it leaves as, if its connection is known, or what it shall leave as. None for an ICMP error, which is changed
    /// already.
    pub(crate) leaves_as: Option<Translation>,
    /// True for an answer, which can begin nothing.
    pub(crate) is_answer: bool,
}

/// Who asks.
#[derive(Clone, Copy)]
pub(crate) struct Turning<'a> {
    pub(crate) meta: &'a Meta,
    pub(crate) snapshot: &'a Snapshot,
    pub(crate) connections: &'a Connections,
    pub(crate) now_ns: u64,
}

/// What a connection that begins now leaves as: as is wanted, or with another source port if answers would be taken for
/// another connection's.
///
/// # Errors
///
/// [`DropReason::NoNatPort`] if there is none.
pub(crate) fn leave(
    connections: &Connections,
    sought: &Sought,
    wanted: Translation,
    now_ns: u64,
) -> Result<Translation, DropReason> {
    let is_free = |to: &Translation| connections.reserve(sought.tuple.translated(to).reverse(), sought, now_ns);
    if is_free(&wanted) {
        return Ok(wanted);
    }
    let is_echo = sought.tuple.is_echo.is_some();
    if !is_echo && !matches!(sought.tuple.protocol, TCP | UDP | SCTP) {
        return Err(DropReason::NoNatPort);
    }
    let count = u16::MAX - FIRST_PORT + 1;
    let start = (sought.hash >> 13) as u16 % count;
    let ports =
        (0..TRIES).map(|step| FIRST_PORT + (u32::from(start) + u32::from(step) * 509).rem_euclid(count.into()) as u16);
    let mut candidates = ports.map(|port| match is_echo {
        true => Translation { ports: (port, port), ..wanted },
        false => Translation { ports: (port, wanted.ports.1), ..wanted },
    });
    candidates.find(is_free).ok_or(DropReason::NoNatPort)
}

impl Turn {
    fn new(meta: &Meta, leaves_as: Translation, is_answer: bool) -> Turn {
        Turn { meta: meta.turned(&leaves_as), leaves_as: Some(leaves_as), is_answer }
    }
}

impl<'a> Turning<'a> {
    /// What becomes of a packet's addresses; none if nothing. An ICMP error is changed at once.
    ///
    /// # Errors
    ///
    /// Why it goes nowhere.
    pub(crate) fn turn(&self, packet: &mut Packet, umem: &Umem) -> Result<Option<Turn>, DropReason> {
        let Turning { meta, snapshot, connections, .. } = *self;
        if !connections.are_translated() && snapshot.services.is_empty() && snapshot.egress.is_empty() {
            return Ok(None);
        }
        if !matches!(meta.kind, Kind::V4 | Kind::V6) {
            return Ok(None);
        }
        if icmp::is_error(meta) {
            return self.error(packet, umem);
        }
        let is_whole = meta.has_ports || meta.fragment.is_none();
        let Some(tuple) = Tuple::of(meta).filter(|_| is_whole) else { return self.untranslatable() };
        let begins = begins_anew(meta, packet.head().data());
        if let Some(found) = self.find(tuple, begins) {
            let Found { shard, at, side, is_after } = &found;
            match (side, is_after) {
                // Nobody answers with a service's own address, nor to a pod whose address does not show.
                (1, true) => return Err(DropReason::NoConnection),
                // As if it had been translated already: another connection, which must leave with another port.
                (_, true) => {}
                (&side, false) => return Ok(shard.leaves_as(*at, side).map(|to| Turn::new(meta, to, side == 1))),
            }
        }
        self.begin(&tuple, begins)
    }

    fn find(&self, tuple: Tuple, begins: bool) -> Option<Found<'a>> {
        let found = self.connections.find(&self.connections.seek(tuple, self.meta.network)).ok()?;
        let timeouts = &self.connections.config().timeouts;
        let is_over = found.shard.get(found.at).is_over(self.now_ns, timeouts, begins, found.side);
        (!is_over).then_some(found)
    }

    /// What begins a connection, or may: a service's backend, and the address to leave with.
    fn begin(&self, tuple: &Tuple, begins: bool) -> Result<Option<Turn>, DropReason> {
        let Turning { meta, snapshot, .. } = *self;
        let Some((source, destination)) = meta.addresses() else { return Ok(None) };
        let mut to = tuple.ends();
        if tuple.protocol == TCP
            && !begins
            && self.connections.waits_for_clients(self.now_ns)
            && self.is_for_own(destination)
        {
            let backend = Front { network: meta.network, address: source, port: tuple.ports.0, protocol: TCP };
            if snapshot.services.may_answer(&backend, destination, tuple.ports.1) {
                return Err(DropReason::NoConnection);
            }
        }
        if matches!(tuple.protocol, TCP | UDP | SCTP) && self.is_own(source) {
            let Meta { network, protocol, .. } = *meta;
            let front = Front { network, address: destination, port: tuple.ports.1, protocol };
            if let Some(backends) = snapshot.services.lookup(&front) {
                let (address, port) = backends.choose(source, tuple.ports.0).ok_or(DropReason::NoBackend)?;
                if protocol == UDP && port == snapshot.underlay.udp_port {
                    return Err(DropReason::NestedVxlan);
                }
                (to.destination, to.ports.1) = (words(address), port);
                let is_behind = matches!(snapshot.routes.lookup(network, address), Some(NextHop::Port { port, .. }) if port == meta.ingress);
                if is_behind {
                    // A backend would answer to itself; so it answers to the service.
                    to.source = tuple.destination;
                }
            } else if snapshot.services.has_address(network, destination) {
                return Err(DropReason::NoService);
            }
        }
        if let Some(own) = self.egress_address(source, address(to.destination, tuple.is_v6)) {
            if matches!(tuple.protocol, TCP | SCTP) && !begins && tuple.ports.0 < EPHEMERAL {
                // It was under way, and by its port the pod serves: who asked has its own address, and will speak again.
                return Err(DropReason::NoConnection);
            }
            to.source = words(own);
        }
        Ok((to != tuple.ends()).then(|| Turn::new(meta, to, false)))
    }

    /// True for what goes to a pod here or to this node itself.
    fn is_for_own(&self, destination: IpAddr) -> bool {
        let Turning { meta, snapshot, .. } = *self;
        let next_hop = snapshot.routes.lookup(meta.network, destination);
        matches!(next_hop, Some(NextHop::Port { port, .. }) if snapshot.is_pod(port))
            || snapshot.classes.lookup(meta.network, destination).is_host()
    }

    /// True for what comes from a pod here or from this node itself: each node translates for its own.
    fn is_own(&self, source: IpAddr) -> bool {
        let Turning { meta, snapshot, .. } = *self;
        let is_host = || snapshot.classes.lookup(meta.network, source).is_host();
        meta.peer.is_none() && (snapshot.is_pod(meta.ingress) || (snapshot.access(meta.ingress).is_some() && is_host()))
    }

    /// What a pod leaves with by an egress rule.
    fn egress_address(&self, source: IpAddr, destination: IpAddr) -> Option<IpAddr> {
        let Turning { meta, snapshot, .. } = *self;
        let rules = snapshot.egress.get(&meta.network)?;
        let stays = match destination {
            IpAddr::V4(v4) => v4.is_link_local() || v4.is_multicast() || v4.is_broadcast(),
            IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.is_multicast(),
        };
        if stays || meta.peer.is_some() || !snapshot.is_pod(meta.ingress) {
            return None;
        }
        // Beyond the network is what leaves by way of the host, and is not the host.
        let is_beyond = || {
            let next_hop = snapshot.routes.lookup(meta.network, destination);
            let is_out = matches!(next_hop, Some(NextHop::Port { port, .. }) if !snapshot.is_pod(port));
            is_out && !snapshot.classes.lookup(meta.network, destination).is_host()
        };
        rules.lookup(source, destination, is_beyond)
    }

    /// What is of no connection leaves as it is, and not at all where a rule hides who sent it.
    fn untranslatable(&self) -> Result<Option<Turn>, DropReason> {
        let hidden = self.meta.addresses().and_then(|(source, destination)| self.egress_address(source, destination));
        if hidden.is_some() { Err(DropReason::Untranslatable) } else { Ok(None) }
    }

    /// An ICMP error about a packet that was translated: its receiver gets its own packet quoted, and hears of it from whom
    /// it sent it to.
    fn error(&self, packet: &mut Packet, umem: &Umem) -> Result<Option<Turn>, DropReason> {
        let meta = self.meta;
        let quote = quoted(meta, packet.head().data());
        let found = quote.ok().and_then(|quote| Some((quote, self.find(quote.tuple, false)?)));
        let Some((quote, found)) = found else { return self.untranslatable() };
        let Found { shard, at, side, is_after } = &found;
        if !is_after {
            return Ok(None);
        }
        let Some(to) = shard.translation(*at) else { return Ok(None) };
        let came = shard.get(*at).tuple();
        // As the quoted packet came, and as it left.
        let (came, left) = match side {
            0 => (came, came.translated(to)),
            _ => (came.translated(to).reverse(), came.reverse()),
        };
        drop(found);
        let [.., s0, s1, d0, d1] = meta.key.0;
        if [d0, d1] != left.source {
            // No word about anything that its receiver has sent.
            return Ok(None);
        }
        if !is_intact(packet, umem, meta) {
            return Err(DropReason::BadChecksum);
        }
        let source = if [s0, s1] == left.destination { came.destination } else { [s0, s1] };
        let outer = Translation { source, destination: came.source, ports: (0, 0) };
        translate_error(packet, meta, &quote, &came, &outer);
        Ok(Some(Turn { meta: meta.turned(&outer), leaves_as: None, is_answer: true }))
    }
}
