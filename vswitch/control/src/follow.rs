//! Stations that the kernel's own VXLAN devices know, because a routing daemon (FRR, for EVPN) tells them.
//!
//! A bridged network may name such a device. Its forwarding entries become stations behind peers, and its entries for the
//! zero MAC, which is how EVPN's type-3 routes arrive, become peers to flood to. What spoke last is right: a followed
//! station replaces a learned one, and a packet from a port here replaces a followed one, until the routing daemon has
//! heard of the move and says so (RFC 7432 section 15). What a peer sends teaches nothing about a followed station.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use vswitch_api::NetworkMode;
use vswitch_dataplane::Location;
use vswitch_net::{MacAddr, NetworkIndex};

use crate::{Control, Dirty};

/// What one network's device knows.
#[derive(Debug, Default)]
pub(crate) struct Followed {
    stations: HashMap<MacAddr, IpAddr>,
    /// Stations of each VTEP.
    counts: HashMap<IpAddr, usize>,
    /// VTEPs that get the network's floods.
    flood: BTreeSet<IpAddr>,
    /// Addresses of stations elsewhere.
    addresses: HashMap<IpAddr, MacAddr>,
}

impl Followed {
    /// True if a station or a flood leads to the VTEP.
    pub(crate) fn uses(&self, vtep: IpAddr) -> bool {
        self.flood.contains(&vtep) || self.counts.get(&vtep).is_some_and(|&count| count > 0)
    }

    /// VTEPs that get the network's floods.
    pub(crate) fn flood(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.flood.iter().copied()
    }

    pub(crate) fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.addresses.keys().copied()
    }

    pub(crate) fn stations(&self) -> impl Iterator<Item = (MacAddr, IpAddr)> + '_ {
        self.stations.iter().map(|(&mac, &vtep)| (mac, vtep))
    }

    pub(crate) fn vtep_of(&self, mac: MacAddr) -> Option<IpAddr> {
        self.stations.get(&mac).copied()
    }

    pub(crate) fn owner_of(&self, address: IpAddr) -> Option<MacAddr> {
        self.addresses.get(&address).copied()
    }

    fn replace(&mut self, mac: MacAddr, vtep: Option<IpAddr>) -> Option<IpAddr> {
        let before = match vtep {
            Some(vtep) => self.stations.insert(mac, vtep),
            None => self.stations.remove(&mac),
        };
        if let Some(vtep) = vtep {
            *self.counts.entry(vtep).or_default() += 1;
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
        // One behind a VTEP that can be no peer, as this node itself, is not there, and no more where it was.
        let vtep = vtep.filter(|&vtep| self.imported_peer(vtep).is_some());
        let before = self.desired.followed.entry(network).or_default().replace(mac, vtep);
        if vtep.is_some() {
            self.learned.forget(network, mac);
        } else if before.is_none() {
            return;
        }
        self.settle_station(network, mac);
        self.mark(Dirty::Change);
    }

    /// Takes note of an entry for the zero MAC: a VTEP gets the network's floods, or no more.
    pub fn follow_flood(&mut self, network: NetworkIndex, vtep: IpAddr, is_there: bool) {
        if !self.desired.is_bridged(network) || (is_there && self.imported_peer(vtep).is_none()) {
            return;
        }
        let flood = &mut self.desired.followed.entry(network).or_default().flood;
        let is_new = if is_there { flood.insert(vtep) } else { flood.remove(&vtep) };
        if is_new {
            self.mark(Dirty::Change);
        }
    }

    /// Takes note of an address of a station elsewhere, or that it is gone: ARP and neighbor discovery for it are answered.
    pub fn follow_address(&mut self, network: NetworkIndex, address: IpAddr, mac: Option<MacAddr>) {
        if !self.desired.is_bridged(network) {
            return;
        }
        let addresses = &mut self.desired.followed.entry(network).or_default().addresses;
        let before = match mac {
            Some(mac) => addresses.insert(address, mac),
            None => addresses.remove(&address),
        };
        if before != mac {
            self.settle_neighbor(network, address);
            self.mark(Dirty::Addition);
        }
    }

    /// True if the kernel's device of a network has a station.
    pub(crate) fn is_followed(&self, network: NetworkIndex, mac: MacAddr) -> bool {
        self.desired.followed.get(&network).is_some_and(|followed| followed.vtep_of(mac).is_some())
    }

    /// Brings all that goes by some VTEPs up to date, after their peers came or went.
    pub(crate) fn settle_vteps(&mut self, vteps: &[IpAddr]) {
        for &vtep in vteps {
            let is_wanted = self.desired.imported_counts.get(&vtep).is_some_and(|&count| count > 0)
                || self.desired.followed.values().any(|followed| followed.uses(vtep));
            if is_wanted {
                self.imported_peer(vtep);
            }
        }
        let routes = self.desired.imported.iter().filter(|(_, gateway)| vteps.contains(gateway));
        let routes: Vec<_> = routes.map(|(&key, _)| key).collect();
        routes.into_iter().for_each(|(network, prefix)| self.settle(network, prefix));
        let of_network = |(&network, followed): (&NetworkIndex, &Followed)| {
            let stations = followed.stations().filter(|(_, vtep)| vteps.contains(vtep));
            stations.map(|(mac, _)| (network, mac)).collect::<Vec<_>>()
        };
        let stations = self.desired.followed.iter().flat_map(of_network).collect();
        self.settle_stations(stations);
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
