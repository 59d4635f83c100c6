//! Addresses of stations in bridged networks, as far as they are certain.

use std::net::IpAddr;

use vswitch_net::{MacAddr, NetworkIndex};

use super::sharded::Sharded;

/// MAC addresses by network and address.
#[derive(Clone, Debug, Default)]
pub struct Neighbors {
    stations: Sharded<(NetworkIndex, IpAddr), MacAddr>,
}

impl Neighbors {
    /// Whose an address is.
    pub fn lookup(&self, network: NetworkIndex, address: IpAddr) -> Option<MacAddr> {
        self.stations.get(&(network, address)).copied()
    }

    /// Says whose an address is.
    pub fn insert(&mut self, network: NetworkIndex, address: IpAddr, mac: MacAddr) {
        self.stations.insert((network, address), mac);
    }

    /// Forgets an address.
    pub fn remove(&mut self, network: NetworkIndex, address: IpAddr) {
        self.stations.remove(&(network, address));
    }
}
