//! A packet that no flow entry knows: decided about, judged, and taken to its end if it goes to no single place.
//!
//! [`Miss::decide`] gives the worker an action to forward by and to remember; floods, the switch's own answers and drops end here.

use vswitch_net::MacAddr;
use vswitch_xsk::Packet;

use crate::connection::Connections;
use crate::decide::{Decision, check, decide, known_neighbor};
use crate::egress::Egress;
use crate::event::{Events, FlowNews};
use crate::icmp;
use crate::judge::{self, Admitted, Passage, Refused};
use crate::meta::Meta;
use crate::multicast;
use crate::nat::{Turn, Turning};
use crate::port::PortIo;
use crate::reply;
use crate::snapshot::{NetworkMode, Snapshot};
use crate::verdict::{Action, DropReason, Output, Verdict};

/// A packet that no flow entry knows.
pub(crate) struct Miss<'a> {
    pub(crate) meta: &'a Meta,
    pub(crate) now_ns: u64,
    /// The newest sequence number of the flow that it belongs to.
    pub(crate) last_seq: Option<u32>,
    pub(crate) connections: &'a Connections,
}

impl Miss<'_> {
    /// The miss path. Gives the action to forward by and how long it holds, or takes the packet to its end itself.
    pub(crate) fn decide<P: PortIo>(
        &self,
        slot: &mut Option<Packet>,
        out: &mut Egress<'_, P>,
        events: &mut Events,
    ) -> Option<(Action, Admitted)> {
        let Miss { meta, now_ns, connections, .. } = *self;
        let turning = Turning { meta, snapshot: out.snapshot, connections, now_ns };
        let checked = check(meta, slot.as_ref()?.head().data(), out.snapshot);
        let packet = slot.as_mut()?;
        let turned = checked.and_then(|origin| Ok((origin, turning.turn(packet, out.umem)?)));
        let (origin, turn) = match turned {
            Ok(turned) => turned,
            Err(reason) => {
                refuse(slot.take()?, meta, reason, out);
                return None;
            }
        };
        let routed = turn.as_ref().map_or(meta, |turn| &turn.meta);
        let decision = decide(routed, slot.as_ref()?.head().data(), origin, out.snapshot);
        if let Some(location) = decision.learn
            && !events.seen(self.now_ns, meta.network, meta.source, location)
        {
            out.counters.events_lost += 1;
        }
        // What goes to many is judged for each receiver.
        if let Verdict::Forward(action) = decision.verdict {
            return self.admit(slot, turn.as_ref(), action, out, events);
        }
        finish(slot, meta, decision, out, events);
        None
    }

    /// What connections and policies say: the action, or a denial that may be remembered. None if the packet was dropped.
    fn admit<P: PortIo>(
        &self,
        slot: &mut Option<Packet>,
        turn: Option<&Turn>,
        action: Action,
        out: &mut Egress<'_, P>,
        events: &mut Events,
    ) -> Option<(Action, Admitted)> {
        let Miss { meta, now_ns, last_seq, connections } = *self;
        let to = if let Output::Port(port) = action.output { Some(port) } else { None };
        let packet = slot.as_ref()?;
        let passage =
            Passage { snapshot: out.snapshot, connections, umem: out.umem, packet, meta, turn, to, last_seq, now_ns };
        let judged = judge::admit(&passage);
        let (refused, rule) = match &judged {
            Ok(admitted) => (None, admitted.log),
            Err(refused) => (Some(refused.reason), refused.rule),
        };
        let is_news = rule.is_some() || refused.is_some();
        let key = turn.map_or(meta.key, |turn| turn.meta.key);
        if is_news && !events.flow(FlowNews { now_ns, key, to, refused, rule }) {
            out.counters.events_lost += 1;
        }
        match judged {
            Ok(admitted) => {
                admitted
                    .allowed_by
                    .into_iter()
                    .chain([admitted.log])
                    .flatten()
                    .for_each(|rule| out.counters.allow(rule));
                Some((action, admitted))
            }
            Err(Refused { rule: Some(rule), is_lasting: true, .. }) => {
                Some((Action::new(None, Output::Deny(rule)), judge::PASSED))
            }
            Err(Refused { reason, rule, .. }) => {
                rule.into_iter().for_each(|rule| out.counters.deny(rule));
                out.drop(slot.take()?, meta.ingress, reason);
                None
            }
        }
    }
}

/// Takes a packet that is not forwarded to its end.
fn finish<P: PortIo>(
    slot: &mut Option<Packet>,
    meta: &Meta,
    decision: Decision,
    out: &mut Egress<'_, P>,
    events: &mut Events,
) -> Option<()> {
    let packet = slot.as_ref()?;
    let network = out.snapshot.network(meta.network)?;
    if let (Some(_), Some(location)) = (&network.multicast_routers, decision.learn) {
        multicast::memberships(meta, packet.head().data(), |membership| {
            if !events.group(meta.network, meta.source, location, membership) {
                out.counters.events_lost += 1;
            }
        });
    }
    let mut packet = slot.take()?;
    match decision.verdict {
        Verdict::Flood | Verdict::Group => match storm(meta, out) {
            Err(reason) => out.drop(packet, meta.ingress, reason),
            Ok(()) if decision.verdict == Verdict::Group => out.multicast(packet, meta, network),
            Ok(()) => out.flood(packet, meta, network),
        },
        Verdict::Reply => match answer(&mut packet, meta, out.snapshot) {
            Ok(()) => out.back(packet, meta),
            Err(reason) => out.drop(packet, meta.ingress, reason),
        },
        Verdict::Drop(reason) => refuse(packet, meta, reason, out),
        Verdict::Forward(_) => {}
    }
    Some(())
}

/// Drops a packet, and says so to its sender where a router must.
fn refuse<P: PortIo>(packet: Packet, meta: &Meta, reason: DropReason, out: &mut Egress<'_, P>) {
    // Nothing that is dropped here is too big, so there are no pieces to send on.
    out.refuse(packet, meta, reason, 0, |out, piece, meta| out.back(piece, meta));
}

/// Whether a port may send another packet to many.
fn storm<P>(meta: &Meta, out: &Egress<'_, P>) -> Result<(), DropReason> {
    let storms = out.snapshot.port(meta.ingress).map_or(&[][..], |port| &port.storms);
    let Some((_, storm)) = storms.iter().find(|(network, _)| *network == meta.network) else { return Ok(()) };
    let (bucket, reason) = match () {
        () if meta.destination == MacAddr::BROADCAST => (&storm.broadcast, DropReason::StormBroadcast),
        () if meta.destination.is_multicast() => (&storm.multicast, DropReason::StormMulticast),
        () => (&storm.unknown, DropReason::StormUnknown),
    };
    if bucket.as_ref().is_none_or(|bucket| bucket.take(out.now_ns, 1)) { Ok(()) } else { Err(reason) }
}

fn answer(packet: &mut Packet, meta: &Meta, snapshot: &Snapshot) -> Result<(), DropReason> {
    match snapshot.network(meta.network).map(|network| network.mode) {
        Some(NetworkMode::Routed(gateway)) if icmp::is_echo_request(meta) => {
            icmp::answer_echo(packet, meta, gateway.mac)
        }
        Some(NetworkMode::Routed(gateway)) => {
            reply::answer(packet, meta, reply::Station { mac: gateway.mac, is_router: true })
        }
        Some(NetworkMode::Bridged) => {
            let mac = known_neighbor(meta, packet.head().data(), snapshot).ok_or(DropReason::NeighborIgnored)?;
            reply::answer(packet, meta, reply::Station { mac, is_router: false })
        }
        None => Err(DropReason::NeighborIgnored),
    }
}
