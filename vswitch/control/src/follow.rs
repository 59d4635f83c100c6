//! Stations that the kernel's own VXLAN devices know, because a routing daemon (FRR, for EVPN) tells them.
//!
//! A bridged network may name such a device. Its forwarding entries become stations behind peers, and its entries for the
//! zero MAC, which is how EVPN's type-3 routes arrive, become peers to flood to. What spoke last is right: a followed
//! station replaces a learned one, and a packet from a port here replaces a followed one, until the routing daemon has
//! heard of the move and says so (RFC 7432 section 15).

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use vswitch_api::NetworkMode;
use vswitch_dataplane::Location;
use vswitch_net::{MacAddr, NetworkIndex, PeerIndex};

use crate::{Control, Dirty};

/// What one network's device knows.
#[derive(Debug, Default)]
pub(crate) struct Followed {
    stations: HashMap<MacAddr, PeerIndex>,
    /// Stations of each peer.
    counts: HashMap<PeerIndex, usize>,
    flood: BTreeSet<PeerIndex>,
    /// Addresses of stations elsewhere.
    addresses: HashMap<IpAddr, MacAddr>,
}

impl Followed {
    /// True if a station or a flood leads to the peer.
    pub(crate) fn uses(&self, peer: PeerIndex) -> bool {
        self.flood.contains(&peer) || self.counts.get(&peer).is_some_and(|&count| count > 0)
    }

    /// Peers that get the network's floods.
    pub(crate) fn flood(&self) -> impl Iterator<Item = PeerIndex> + '_ {
        self.flood.iter().copied()
    }

    pub(crate) fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.addresses.keys().copied()
    }

    pub(crate) fn stations(&self) -> impl Iterator<Item = (MacAddr, PeerIndex)> + '_ {
        self.stations.iter().map(|(&mac, &peer)| (mac, peer))
    }

    fn replace(&mut self, mac: MacAddr, peer: Option<PeerIndex>) -> Option<PeerIndex> {
        let before = match peer {
            Some(peer) => self.stations.insert(mac, peer),
            None => self.stations.remove(&mac),
        };
        if let Some(peer) = peer {
            *self.counts.entry(peer).or_default() += 1;
        }
        if let Some(count) = before.and_then(|before| self.counts.get_mut(&before)) {
            *count -= 1;
        }
        before
    }
}

impl Control {
    /// Takes note of a forwarding entry: a station behind a VTEP, or gone.
    pub fn follow_station(&mut self, network: NetworkIndex, mac: MacAddr, vtep: Option<IpAddr>) {
        if !self.desired.is_bridged(network) || mac.is_multicast() || mac.is_zero() {
            return;
        }
        let peer = match vtep {
            Some(vtep) => match self.imported_peer(vtep) {
                Some(peer) => Some(peer),
                None => return,
            },
            None => None,
        };
        let before = self.desired.followed.entry(network).or_default().replace(mac, peer);
        if before == peer || self.desired.is_static(network, mac) {
            return;
        }
        match (peer, before) {
            (Some(peer), _) => {
                self.learned.forget(network, mac);
                self.tables.fdb.insert(network, mac, Location::Peer(peer));
            }
            (None, Some(before)) if self.tables.fdb.lookup(network, mac) == Some(Location::Peer(before)) => {
                self.tables.fdb.remove(network, mac);
            }
            (None, _) => return,
        }
        self.mark(Dirty::Change);
    }

    /// Takes note of an entry for the zero MAC: a VTEP gets the network's floods, or no more.
    pub fn follow_flood(&mut self, network: NetworkIndex, vtep: IpAddr, is_there: bool) {
        if !self.desired.is_bridged(network) {
            return;
        }
        let Some(peer) = self.imported_peer(vtep) else { return };
        let flood = &mut self.desired.followed.entry(network).or_default().flood;
        let is_new = if is_there { flood.insert(peer) } else { flood.remove(&peer) };
        if is_new {
            self.mark(Dirty::Change);
        }
    }

    /// Takes note of an address of a station elsewhere, or that it is gone: ARP and neighbor discovery for it are answered.
    pub fn follow_address(&mut self, network: NetworkIndex, address: IpAddr, mac: Option<MacAddr>) {
        let entry = self.desired.networks.values().find(|entry| entry.index == network);
        if !entry.is_some_and(|entry| entry.spec.mode == NetworkMode::Bridged && entry.spec.neighbor_suppression) {
            return;
        }
        let addresses = &mut self.desired.followed.entry(network).or_default().addresses;
        let before = match mac {
            Some(mac) => addresses.insert(address, mac),
            None => addresses.remove(&address),
        };
        // A port here has its own addresses, whatever is said elsewhere.
        let is_own = self
            .desired
            .ports
            .values()
            .any(|port| port.network == network && port.record.spec.addresses.contains(&address));
        if before == mac || is_own {
            return;
        }
        match mac {
            Some(mac) => self.tables.neighbors.insert(network, address, mac),
            None => self.tables.neighbors.remove(network, address),
        }
        self.mark(Dirty::Addition);
    }

    /// Stations behind ports here, with the addresses that are known of them: what the kernel's device is to be told.
    pub fn local_stations(&self, network: NetworkIndex) -> Vec<(MacAddr, Vec<IpAddr>)> {
        let own = self.desired.ports.values().filter(|port| port.network == network);
        let own = own.map(|port| (port.record.spec.mac, port.record.spec.addresses.clone()));
        let learned = self
            .learned
            .iter()
            .filter(|((other, _), entry)| *other == network && matches!(entry.location, Location::Port(_)));
        own.chain(learned.map(|((_, mac), _)| (mac, Vec::new()))).collect()
    }

    /// The networks that follow a device of the kernel, with its name.
    pub fn followers(&self) -> Vec<(NetworkIndex, String)> {
        let following = |entry: &crate::desired::NetworkEntry| {
            let device = entry.spec.follow.clone()?;
            (entry.spec.mode == NetworkMode::Bridged).then_some((entry.index, device))
        };
        self.desired.networks.values().filter_map(following).collect()
    }
}
