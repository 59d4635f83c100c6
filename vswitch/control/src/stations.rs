//! Where a station of a bridged network is, and whose an address is, of all that speak for it.
//!
//! ```text
//! a port's own  >  a station that was asked for  >  one that was seen  >  one that the kernel's device has
//! ```
//!
//! [`Control::settle_station`] and [`Control::settle_neighbor`] look at all of them and write the winner into the tables,
//! so that whatever comes or goes, what stood behind it shows again.

use std::collections::HashSet;
use std::net::IpAddr;

use vswitch_dataplane::Location;
use vswitch_net::{MacAddr, NetworkIndex};

use crate::Control;
use crate::follow::Followed;

impl Control {
    /// Brings the FDB up to date about one station.
    pub(crate) fn settle_station(&mut self, network: NetworkIndex, mac: MacAddr) {
        match self.location_of(network, mac) {
            Some(location) => self.tables.fdb.insert(network, mac, location),
            None => self.tables.fdb.remove(network, mac),
        };
    }

    /// The same for several.
    pub(crate) fn settle_stations(&mut self, stations: Vec<(NetworkIndex, MacAddr)>) {
        stations.into_iter().for_each(|(network, mac)| self.settle_station(network, mac));
    }

    /// Brings the neighbor table up to date about one address.
    pub(crate) fn settle_neighbor(&mut self, network: NetworkIndex, address: IpAddr) {
        match self.owner_of(network, address) {
            Some(mac) => self.tables.neighbors.insert(network, address, mac),
            None => self.tables.neighbors.remove(network, address),
        }
    }

    /// Stations of a network that are known from nearer than the kernel's device.
    pub(crate) fn nearer_stations(&self, network: NetworkIndex) -> HashSet<MacAddr> {
        let own = self.desired.ports.values().filter(|port| port.network == network);
        let asked = self.desired.stations.keys().filter(|(other, _)| *other == network);
        let seen = self.learned.iter().filter(|((other, _), _)| *other == network);
        let own = own.map(|port| port.record.spec.mac);
        own.chain(asked.map(|(_, mac)| *mac)).chain(seen.map(|((_, mac), _)| mac)).collect()
    }

    fn location_of(&self, network: NetworkIndex, mac: MacAddr) -> Option<Location> {
        if !self.desired.is_bridged(network) {
            return None;
        }
        let own = |port: &crate::desired::PortEntry| port.network == network && port.record.spec.mac == mac;
        if let Some((&port, _)) = self.desired.ports.iter().find(|(_, port)| own(port)) {
            return Some(Location::Port(port));
        }
        if let Some(asked) = self.desired.stations.get(&(network, mac)) {
            return self.locate(&asked.at);
        }
        if let Some(location) = self.learned.location(network, mac) {
            return Some(location);
        }
        let vtep = self.desired.followed.get(&network)?.vtep_of(mac)?;
        self.desired.by_vtep.get(&vtep).map(|&peer| Location::Peer(peer))
    }

    fn owner_of(&self, network: NetworkIndex, address: IpAddr) -> Option<MacAddr> {
        let entry = self.desired.networks.values().find(|entry| entry.index == network)?;
        if !self.desired.is_bridged(network) || !entry.spec.neighbor_suppression {
            return None;
        }
        let has = |addresses: &[IpAddr]| addresses.contains(&address);
        let ports = self.desired.ports.values().filter(|port| port.network == network);
        let own = ports.map(|port| &port.record.spec).find(|spec| has(&spec.addresses)).map(|spec| spec.mac);
        let mut asked = self.desired.stations.iter().filter(|((other, _), _)| *other == network);
        own.or_else(|| asked.find(|(_, entry)| has(&entry.addresses)).map(|((_, mac), _)| *mac))
            .or_else(|| self.desired.followed.get(&network).and_then(|followed: &Followed| followed.owner_of(address)))
    }
}
