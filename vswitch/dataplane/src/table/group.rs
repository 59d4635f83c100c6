//! Members of multicast groups in networks that know who has asked.

use std::net::IpAddr;
use std::sync::Arc;

use vswitch_net::NetworkIndex;

use super::sharded::Sharded;
use crate::snapshot::Receivers;

/// Receivers by network and group.
#[derive(Clone, Debug, Default)]
pub struct Groups {
    members: Sharded<(NetworkIndex, IpAddr), Arc<Receivers>>,
}

impl Groups {
    /// Who gets a group's packets, if anybody has asked.
    pub fn lookup(&self, network: NetworkIndex, group: IpAddr) -> Option<&Receivers> {
        self.members.get(&(network, group)).map(Arc::as_ref)
    }

    /// Sets a group's receivers; none removes it.
    pub fn set(&mut self, network: NetworkIndex, group: IpAddr, receivers: Option<Receivers>) {
        match receivers {
            Some(receivers) => self.members.insert((network, group), Arc::new(receivers)),
            None => self.members.remove(&(network, group)),
        };
    }
}
