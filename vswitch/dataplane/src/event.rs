//! What a worker tells the control thread: learned MAC addresses, members of groups, stations of a tagged underlay, and
//! connections that policies deny or want told. Bounded, and what says the same twice is told once.

use std::net::IpAddr;

use vswitch_net::{MacAddr, NetworkIndex, PeerIndex, PortId};

use crate::bucket::Bucket;
use crate::meta::FlowKey;
use crate::multicast::Membership;
use crate::table::policy::RuleId;
use crate::verdict::DropReason;

/// Where a station is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Location {
    /// Behind a port of this switch.
    Port(PortId),
    /// Behind a peer.
    Peer(PeerIndex),
}

/// Where a packet of the switch's own goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnWay {
    /// To a network's ports and peers, as if it came from a port.
    Flood {
        /// The network.
        network: NetworkIndex,
        /// The port that it goes out for, and not back to.
        from: PortId,
    },
    /// To a network's ports.
    Ports(NetworkIndex),
    /// To a network's peers.
    Peers(NetworkIndex),
    /// To one peer, in a network.
    Peer(NetworkIndex, PeerIndex),
    /// Out of one port, as it is.
    Port(PortId),
}

/// News from the data path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A station sent a packet: new, moved, or still there.
    Seen {
        /// Its network.
        network: NetworkIndex,
        /// Its address.
        mac: MacAddr,
        /// Where it is.
        location: Location,
    },
    /// Somebody of a tagged underlay told of himself.
    Neighbor {
        /// The uplink that he was heard on.
        port: PortId,
        /// His address.
        address: IpAddr,
        /// His MAC address.
        mac: MacAddr,
    },
    /// A station said something of a multicast group.
    Group {
        /// Its network.
        network: NetworkIndex,
        /// Its address.
        station: MacAddr,
        /// Where it is.
        location: Location,
        /// What it said.
        membership: Membership,
    },
    /// A connection that a policy denied, or wants told.
    Flow(FlowNews),
}

/// A connection that a policy denied, or wants told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowNews {
    /// When.
    pub now_ns: u64,
    /// Its packet, from who sent it to who gets it.
    pub key: FlowKey,
    /// The port that it was for, if that is one here.
    pub to: Option<PortId>,
    /// Why it was dropped; none if it was allowed.
    pub refused: Option<DropReason>,
    /// The rule that denied it, or wants it told.
    pub rule: Option<RuleId>,
}

/// A station that is still where it was is reported this often.
const REPEAT_NS: u64 = 1_000_000_000;

/// Slots of the filter. Stations that share one are reported more often than needed, never less.
const SLOTS: usize = 4096;

/// Events that a worker keeps until they are drained.
const CAPACITY: usize = 1024;

/// Of these, about groups: who floods them takes no room from stations.
const GROUPS: usize = 256;

/// Of these, about flows, and how many of them a worker tells a second: enough to see what is going on.
const FLOWS: usize = 256;
const FLOW_RATE: u64 = 200;

/// Collects events, at most one a second for the same station at the same place.
#[derive(Debug)]
pub(crate) struct Events {
    queue: Vec<Event>,
    /// How many in the queue are about groups, and about flows.
    groups: usize,
    flows: usize,
    /// How many flows may still be told.
    budget: Bucket,
    recent: Box<[(u64, Location, u64)]>,
}

impl Events {
    pub(crate) fn new() -> Events {
        let none = (u64::MAX, Location::Port(PortId(u16::MAX)), 0);
        Events {
            queue: Vec::with_capacity(CAPACITY + GROUPS + FLOWS),
            groups: 0,
            flows: 0,
            budget: Bucket::new(FLOW_RATE, FLOW_RATE),
            recent: vec![none; SLOTS].into_boxed_slice(),
        }
    }

    /// Notes that a station was seen. False if the queue was full.
    pub(crate) fn seen(&mut self, now_ns: u64, network: NetworkIndex, mac: MacAddr, location: Location) -> bool {
        let station = mac.to_u64() | u64::from(network.0) << 48;
        let slot = (station.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52) as usize;
        let (known, place, until) = self.recent[slot];
        if known == station && place == location && now_ns < until {
            return true;
        }
        if self.queue.len() - self.groups - self.flows == CAPACITY {
            return false;
        }
        self.recent[slot] = (station, location, now_ns.saturating_add(REPEAT_NS));
        self.queue.push(Event::Seen { network, mac, location });
        true
    }

    /// Notes what was said of a group. False if there was too much of that.
    pub(crate) fn group(
        &mut self,
        network: NetworkIndex,
        station: MacAddr,
        location: Location,
        membership: Membership,
    ) -> bool {
        let has_room = self.groups < GROUPS;
        if has_room {
            self.groups += 1;
            self.queue.push(Event::Group { network, station, location, membership });
        }
        has_room
    }

    /// Notes a neighbor of a tagged underlay. What finds no room is asked for again.
    pub(crate) fn neighbor(&mut self, port: PortId, address: IpAddr, mac: MacAddr) {
        if self.groups < GROUPS {
            self.groups += 1;
            self.queue.push(Event::Neighbor { port, address, mac });
        }
    }

    /// Notes a flow. False if there were too many.
    pub(crate) fn flow(&mut self, news: FlowNews) -> bool {
        let has_room = self.flows < FLOWS && self.budget.take(news.now_ns, 1);
        if has_room {
            self.flows += 1;
            self.queue.push(Event::Flow(news));
        }
        has_room
    }

    pub(crate) fn drain(&mut self) -> impl Iterator<Item = Event> + '_ {
        (self.groups, self.flows) = (0, 0);
        self.queue.drain(..)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeats_are_held_back_and_moves_are_not() {
        let mut events = Events::new();
        let (network, mac) = (NetworkIndex(3), MacAddr([2, 0, 0, 0, 0, 9]));
        let (here, there) = (Location::Port(PortId(1)), Location::Peer(PeerIndex(1)));
        assert!(events.seen(0, network, mac, here));
        assert!(events.seen(1, network, mac, here));
        assert!(events.seen(2, network, mac, there));
        assert!(events.seen(REPEAT_NS + 2, network, mac, there));
        let place = |event| match event {
            Event::Seen { location, .. } => Some(location),
            _ => None,
        };
        let places: Vec<_> = events.drain().filter_map(place).collect();
        assert_eq!(places, [here, there, there]);
    }

    #[test]
    fn a_flood_of_stations_is_bounded() {
        let mut events = Events::new();
        let lost = (0..10_000_u64)
            .filter(|&i| !events.seen(0, NetworkIndex(0), MacAddr::local_from(i), Location::Port(PortId(0))))
            .count();
        assert_eq!(events.drain().count() + lost, 10_000);
        assert_eq!(lost, 10_000 - CAPACITY);
    }
}
