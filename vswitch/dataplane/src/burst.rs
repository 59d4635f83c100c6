//! One burst on its walk: its packets, what is known of each, and what needs more than one of them at a time.
//!
//! The walk itself is [`Worker::process`](crate::Worker); here is what it writes to.

use vswitch_net::PortId;
use vswitch_xsk::Packet;

use crate::egress::Egress;
use crate::meta::{Fragment, Kind, Meta, address};
use crate::offload::{self, Coalesce, Offer};
use crate::parse::TCP;
use crate::port::PortIo;
use crate::snapshot::{Port, PortKind};
use crate::table::fragment::{DatagramKey, Fragments};
use crate::translate::Translation;
use crate::verdict::{Action, DropReason, Output};
use crate::worker::BURST;

/// One burst on its walk. Allocated once.
#[derive(Debug)]
pub(crate) struct Burst {
    pub(crate) packets: Vec<Packet>,
    /// Packets of a port with a rate, before it lets them pass.
    pub(crate) offered: Vec<Packet>,
    /// Parsed packets, in order; written over by every burst.
    pub(crate) slots: Box<[Slot]>,
    /// Positions in `slots`, by verdict.
    pub(crate) local: Vec<u8>,
    pub(crate) encap: Vec<u8>,
    pub(crate) coalesce: Coalesce,
}

/// One packet of a burst; taken out when it leaves.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) packet: Option<Packet>,
    pub(crate) meta: Meta,
    /// The flow entry that may match.
    pub(crate) found: Option<usize>,
    /// Meaningful from the lookup on, for a packet that goes a single way.
    pub(crate) action: Action,
    /// What its addresses and ports become.
    pub(crate) translation: Option<Translation>,
    /// Once it is encapsulated: the uplink.
    pub(crate) to: PortId,
    /// Once it is prepared for a port here: where its layer 4 begins.
    pub(crate) l4: u16,
    /// Why it could not be made ready.
    pub(crate) refused: Option<DropReason>,
}

impl Default for Burst {
    fn default() -> Burst {
        Burst {
            packets: Vec::with_capacity(BURST),
            offered: Vec::with_capacity(BURST),
            slots: (0..BURST).map(|_| Slot::default()).collect(),
            local: Vec::with_capacity(BURST),
            encap: Vec::with_capacity(BURST),
            coalesce: Coalesce::default(),
        }
    }
}

impl Default for Slot {
    fn default() -> Slot {
        let to = PortId(u16::MAX);
        Slot {
            packet: None,
            meta: Meta::default(),
            found: None,
            action: Action::NONE,
            translation: None,
            to,
            l4: 0,
            refused: None,
        }
    }
}

/// Makes large packets of TCP from the wire, where the receiver takes them.
pub(crate) fn join_segments<P: PortIo>(
    slots: &mut [Slot],
    local: &[u8],
    coalesce: &mut Coalesce,
    out: &mut Egress<'_, P>,
) {
    coalesce.clear();
    for &at in local {
        let (before, rest) = slots.split_at_mut(usize::from(at));
        let Slot { packet, meta, action, translation, .. } = &mut rest[0];
        let info = if let Output::Port(port) = action.output { out.snapshot.port(port) } else { None };
        let (Some(data), Some(info)) = (&*packet, info) else { continue };
        if meta.protocol != TCP || info.limits.is_some() || !info.mirrors_to.is_empty() {
            continue;
        }
        // Who only passes it on could not: nothing says any more in what sizes it came.
        if !is_own(info, meta, translation.as_ref()) {
            continue;
        }
        let Offer::Follows(place) = coalesce.offer(at, data, meta, out.umem) else { continue };
        let first = &mut before[usize::from(place)];
        let (Some(whole), Some(next)) = (&mut first.packet, packet.take()) else { continue };
        match offload::join(whole, &mut first.meta, next, meta, info.tcp_mtu, out.umem) {
            Ok(may_go_on) => {
                if let Some(counters) = out.counters.port_mut(meta.ingress) {
                    counters.merged += 1;
                }
                if !may_go_on {
                    coalesce.close(place);
                }
            }
            Err(next) => {
                *packet = Some(next);
                coalesce.replace(place, at);
            }
        }
    }
}

/// True for a packet to one of the port's own addresses.
fn is_own(info: &Port, meta: &Meta, translation: Option<&Translation>) -> bool {
    let PortKind::Access(access) = &info.kind else { return false };
    let (_, destination) = meta.address_words();
    let words = translation.map_or(destination, |translation| translation.destination);
    access.addresses.contains(&address(words, meta.kind == Kind::V6))
}

/// A fragment belongs to the flow of its datagram.
#[inline(always)]
pub(crate) fn follow(fragments: &mut Fragments, meta: &mut Meta, now_ns: u64, seed: u64) -> Result<(), DropReason> {
    match meta.fragment {
        None => Ok(()),
        Some(fragment) => follow_fragment(fragments, meta, fragment, now_ns, seed),
    }
}

#[cold]
fn follow_fragment(
    fragments: &mut Fragments,
    meta: &mut Meta,
    fragment: Fragment,
    now_ns: u64,
    seed: u64,
) -> Result<(), DropReason> {
    let own = meta.has_l4().then(|| meta.key.fields().ports);
    let key = DatagramKey::of(meta, fragment);
    if let Some(ports) = fragments.follow(now_ns, key, key.hash(seed), fragment, own)? {
        meta.lend_ports(ports, seed);
    }
    Ok(())
}
