//! The forwarding database: where the stations of bridged networks are (802.1Q-2018 section 8.8).
//!
//! The data path only looks up. Learning, ageing and limits are control's (`vswitch-control`, `learned.rs`), which
//! writes what results.

use vswitch_net::{MacAddr, NetworkIndex};

use super::sharded::Sharded;
use crate::event::Location;

/// Stations by network and MAC.
#[derive(Clone, Debug, Default)]
pub struct Fdb {
    stations: Sharded<(NetworkIndex, MacAddr), Location>,
}

impl Fdb {
    /// Where a station is, if known.
    #[inline]
    pub fn lookup(&self, network: NetworkIndex, mac: MacAddr) -> Option<Location> {
        self.stations.get(&(network, mac)).copied()
    }

    /// Adds a station or moves it; where it was before.
    pub fn insert(&mut self, network: NetworkIndex, mac: MacAddr, location: Location) -> Option<Location> {
        self.stations.insert((network, mac), location)
    }

    /// Forgets a station; where it was.
    pub fn remove(&mut self, network: NetworkIndex, mac: MacAddr) -> Option<Location> {
        self.stations.remove(&(network, mac))
    }

    /// Number of stations.
    pub fn len(&self) -> usize {
        self.stations.len()
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
