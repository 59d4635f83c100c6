//! Members of multicast groups in bridged networks that snoop (RFC 4541).
//!
//! A member is a port or a peer. A port with one station behind it is out as soon as that leaves; one with several is asked
//! whether others stay; a peer stays until it is silent. Somebody must ask, or members fall silent: the switch asks its
//! ports itself, as querier, and the peers. What ports want is told to peers by control, and never passed on, so that
//! a port takes no more room there than it has here. Groups and members are bounded, and one port cannot take what is the
//! others'.

use std::collections::BTreeMap;
use std::net::IpAddr;

use vswitch_dataplane::{Location, Membership, Receivers};
use vswitch_net::{MacAddr, NetworkIndex};

/// A member that is not heard of is one no more: RFC 3376 section 8.4, robustness 2, interval 125 s, response 10 s.
pub(crate) const AGE_NS: u64 = 260_000_000_000;

/// How often members are asked (RFC 3376 section 8.2).
pub(crate) const ASK_NS: u64 = 125_000_000_000;

/// Most groups of one port.
const OF_PORT: usize = 128;

/// Most groups of one peer, behind which are all of its ports.
const OF_PEER: usize = 2048;

/// Most groups of one network.
const OF_NETWORK: usize = 4096;

/// A peer that comes may have members that it has not told of: for so long it gets everything.
pub(crate) const MEET_NS: u64 = 10_000_000_000;

/// Members that were asked after one has left are out after this time (RFC 2236 section 8.8, 8.9).
const LEAVE_NS: u64 = 2_000_000_000;

type Group = (NetworkIndex, IpAddr);

/// One of a group.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Member {
    pub(crate) seen_ns: u64,
    /// When it is one no more, unless it is heard of.
    until_ns: u64,
    /// The station that spoke last.
    pub(crate) station: MacAddr,
}

/// Who wants what.
#[derive(Debug, Default)]
pub(crate) struct Groups {
    members: BTreeMap<Group, BTreeMap<Location, Member>>,
    /// Where queries come from, and peers that were met lately; until when.
    routers: BTreeMap<(NetworkIndex, Location), u64>,
    /// Memberships that were not taken because a member had too many.
    refused: BTreeMap<Location, u64>,
}

impl Groups {
    /// Takes note. What changed, if anything has.
    pub(crate) fn heard(
        &mut self,
        now_ns: u64,
        network: NetworkIndex,
        at: Location,
        station: MacAddr,
        membership: Membership,
    ) -> Option<Heard> {
        match membership {
            Membership::Ask => None,
            Membership::Query => self.meet(network, at, now_ns + AGE_NS).then_some(Heard::Router),
            Membership::Join(group) => {
                let key = (network, group);
                let member = Member { seen_ns: now_ns, until_ns: now_ns + AGE_NS, station };
                if let Some(known) = self.members.get_mut(&key).and_then(|members| members.get_mut(&at)) {
                    *known = member;
                    return None;
                }
                let of_member = self.members.values().filter(|members| members.contains_key(&at)).count();
                let of_network = self.members.range((network, FIRST)..).take_while(|((other, _), _)| *other == network);
                let is_full = !self.members.contains_key(&key) && of_network.count() >= OF_NETWORK;
                let most = if matches!(at, Location::Port(_)) { OF_PORT } else { OF_PEER };
                if of_member >= most || is_full {
                    *self.refused.entry(at).or_default() += 1;
                    return None;
                }
                self.members.entry(key).or_default().insert(at, member);
                Some(Heard::Group(group))
            }
            Membership::Leave(_) if matches!(at, Location::Peer(_)) => None,
            Membership::Leave(group) => self.remove(network, group, at).then_some(Heard::Group(group)),
        }
    }

    /// Somebody behind a port has left a group, and others may be behind it. True if they are to be asked.
    pub(crate) fn leave_unless_heard(
        &mut self,
        now_ns: u64,
        network: NetworkIndex,
        group: IpAddr,
        at: Location,
    ) -> bool {
        let known = self.members.get_mut(&(network, group)).and_then(|members| members.get_mut(&at));
        known.map(|known| known.until_ns = known.until_ns.min(now_ns + LEAVE_NS)).is_some()
    }

    /// A router, or a peer that is met, gets everything for a while. True if that is new.
    pub(crate) fn meet(&mut self, network: NetworkIndex, at: Location, until_ns: u64) -> bool {
        let known = self.routers.insert((network, at), until_ns);
        if let Some(known) = known.filter(|&known| known > until_ns) {
            self.routers.insert((network, at), known);
        }
        known.is_none()
    }

    /// True if a port has the group.
    pub(crate) fn is_wanted_here(&self, network: NetworkIndex, group: IpAddr) -> bool {
        let mut members = self.members.get(&(network, group)).into_iter().flatten();
        members.any(|(at, _)| matches!(at, Location::Port(_)))
    }

    /// The groups that ports of a network want, each with one of their stations.
    pub(crate) fn wanted_here(&self, network: NetworkIndex) -> impl Iterator<Item = (IpAddr, MacAddr)> + '_ {
        self.groups(network).filter_map(|(group, members)| {
            let own = members.iter().find(|(at, _)| matches!(at, Location::Port(_)));
            own.map(|(_, member)| (group, member.station))
        })
    }

    /// Forgets who was silent too long; what changed.
    pub(crate) fn age(&mut self, now_ns: u64) -> Vec<(NetworkIndex, Heard)> {
        self.forget(|_, _, until_ns| now_ns >= until_ns)
    }

    /// How many memberships of a place were not taken.
    pub(crate) fn refused(&self, at: Location) -> u64 {
        self.refused.get(&at).copied().unwrap_or(0)
    }

    /// Forgets a place that is gone.
    pub(crate) fn forget_location(&mut self, at: Location) -> Vec<(NetworkIndex, Heard)> {
        self.refused.remove(&at);
        self.forget(|_, other, _| other == at)
    }

    /// Forgets a network.
    pub(crate) fn forget_network(&mut self, network: NetworkIndex) -> Vec<(NetworkIndex, Heard)> {
        self.forget(|other, _, _| other == network)
    }

    /// Who gets a group's packets: its members, and the routers.
    pub(crate) fn receivers(&self, network: NetworkIndex, group: IpAddr) -> Option<Receivers> {
        let members = self.members.get(&(network, group))?;
        Some(receivers(members.keys().copied().chain(self.routers_of(network))))
    }

    /// Who gets reports, and packets of groups that nobody here wants.
    pub(crate) fn routers(&self, network: NetworkIndex) -> Receivers {
        receivers(self.routers_of(network))
    }

    /// The groups of a network that have members.
    pub(crate) fn groups(&self, network: NetworkIndex) -> impl Iterator<Item = (IpAddr, &BTreeMap<Location, Member>)> {
        self.members
            .iter()
            .filter(move |((other, _), _)| *other == network)
            .map(|((_, group), members)| (*group, members))
    }

    fn routers_of(&self, network: NetworkIndex) -> impl Iterator<Item = Location> + '_ {
        self.routers.keys().filter(move |(other, _)| *other == network).map(|(_, at)| *at)
    }

    fn remove(&mut self, network: NetworkIndex, group: IpAddr, at: Location) -> bool {
        let Some(members) = self.members.get_mut(&(network, group)) else { return false };
        let was_there = members.remove(&at).is_some();
        if members.is_empty() {
            self.members.remove(&(network, group));
        }
        was_there
    }

    fn forget(&mut self, gone: impl Fn(NetworkIndex, Location, u64) -> bool) -> Vec<(NetworkIndex, Heard)> {
        let mut changed = Vec::new();
        self.members.retain(|&(network, group), members| {
            let before = members.len();
            members.retain(|&at, member| !gone(network, at, member.until_ns));
            if members.len() != before {
                changed.push((network, Heard::Group(group)));
            }
            !members.is_empty()
        });
        self.routers.retain(|&(network, at), &mut until_ns| {
            let goes = gone(network, at, until_ns);
            if goes {
                changed.push((network, Heard::Router));
            }
            !goes
        });
        changed
    }
}

/// What must be written into the snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// One group's receivers.
    Group(IpAddr),
    /// A router came or went: all groups of the network.
    Router,
}

/// Sorts before every group.
const FIRST: IpAddr = IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);

fn receivers(places: impl Iterator<Item = Location>) -> Receivers {
    let mut receivers = Receivers::default();
    for place in places {
        match place {
            Location::Port(port) if !receivers.ports.contains(&port) => receivers.ports.push(port),
            Location::Peer(peer) if !receivers.peers.contains(&peer) => receivers.peers.push(peer),
            _ => {}
        }
    }
    receivers
}

#[cfg(test)]
mod tests {
    use vswitch_net::{PeerIndex, PortId};

    use super::*;

    const NET: NetworkIndex = NetworkIndex(1);
    const ONE: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);

    fn group(number: u32) -> IpAddr {
        std::net::Ipv4Addr::from_bits(0xe100_0000 + number).into()
    }

    #[test]
    fn ports_leave_at_once_and_peers_when_silent() {
        let (port, peer) = (Location::Port(PortId(9)), Location::Peer(PeerIndex(1)));
        let mut groups = Groups::default();
        for at in [port, peer] {
            assert!(groups.heard(0, NET, at, ONE, Membership::Join(group(1))).is_some());
            groups.heard(1, NET, at, ONE, Membership::Leave(group(1)));
        }
        let left = groups.receivers(NET, group(1)).unwrap();
        assert_eq!((left.ports.len(), left.peers.len()), (0, 1));
        assert!(groups.age(AGE_NS - 1).is_empty());
        assert_eq!(groups.age(AGE_NS), [(NET, Heard::Group(group(1)))]);
        assert!(groups.receivers(NET, group(1)).is_none());
    }

    #[test]
    fn a_flood_of_joins_is_bounded_and_takes_nothing_from_others() {
        let mut groups = Groups::default();
        for number in 0..100_000 {
            groups.heard(0, NET, Location::Port(PortId(9)), ONE, Membership::Join(group(number)));
        }
        assert_eq!(groups.members.len(), OF_PORT);
        assert_eq!(groups.refused(Location::Port(PortId(9))), 100_000 - OF_PORT as u64);
        assert!(groups.heard(0, NET, Location::Port(PortId(10)), ONE, Membership::Join(group(500_000))).is_some());
    }
}
