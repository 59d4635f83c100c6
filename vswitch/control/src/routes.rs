//! Which next hop a prefix has, of all that speak for it.
//!
//! ```text
//! a port's address  >  a route that was asked for  >  an imported route  >  the network's own
//! ```
//!
//! The network's own are: this node's address in it, its ranges and subnets (addresses that are ours to give out, and
//! that nobody has), and everything else by way of the host, if the network is joined to it. [`Control::settle`] looks at
//! all four and writes the winner into the table, so that whatever comes or goes, what stood behind it shows again.

use std::net::IpAddr;

use ipnet::IpNet;
use vswitch_api::{Encap, NetworkMode, NetworkSpec, PeerSpec};
use vswitch_dataplane::table::route::NextHop;
use vswitch_net::{NetworkIndex, PeerIndex};

use crate::desired::{NetworkEntry, PeerEntry};
use crate::{Control, Dirty, HOST_PORT, ipam};

impl Control {
    /// Brings the table up to date about one prefix.
    pub(crate) fn settle(&mut self, network: NetworkIndex, prefix: IpNet) {
        let (address, length) = (prefix.addr(), prefix.prefix_len());
        match self.next_hop_of(network, prefix) {
            Some(hop) => self.tables.routes.insert(network, address, length, hop),
            None => self.tables.routes.remove(network, address, length),
        };
    }

    /// Settles what a network says by itself.
    pub(crate) fn settle_network(&mut self, index: NetworkIndex) {
        let Some(entry) = self.desired.networks.values().find(|entry| entry.index == index) else { return };
        for prefix in own_prefixes(&entry.spec) {
            self.settle(index, prefix);
        }
    }

    /// Takes a network's own prefixes out of the table, after the network is gone.
    pub(crate) fn unsettle_network(&mut self, entry: &NetworkEntry) {
        if let Some(followed) = self.desired.followed.remove(&entry.index) {
            for (mac, _) in followed.stations() {
                self.tables.fdb.remove(entry.index, mac);
            }
            followed.addresses().for_each(|address| self.tables.neighbors.remove(entry.index, address));
        }
        let imported = self.desired.imported.keys().filter(|(network, _)| *network == entry.index);
        let imported: Vec<IpNet> = imported.map(|&(_, prefix)| prefix).collect();
        for prefix in imported {
            self.forget_import((entry.index, prefix));
            self.settle(entry.index, prefix);
        }
        for prefix in own_prefixes(&entry.spec) {
            self.settle(entry.index, prefix);
        }
    }

    fn next_hop_of(&self, network: NetworkIndex, prefix: IpNet) -> Option<NextHop> {
        let is_host = prefix.prefix_len() == prefix.max_prefix_len();
        if is_host && let Some(&port) = self.desired.by_address.get(&(network, prefix.addr())) {
            let mac = self.desired.ports.get(&port)?.record.spec.mac;
            return Some(NextHop::Port { port, mac });
        }
        let key = (network, prefix);
        let asked = self.desired.routes.get(&key).and_then(|route| self.desired.peers.get(&route.peer));
        if let Some(peer) = asked {
            return Some(NextHop::Peer(peer.index));
        }
        if let Some(&peer) = self.desired.imported.get(&key).and_then(|gateway| self.desired.by_vtep.get(gateway)) {
            return Some(NextHop::Peer(peer));
        }
        let entry = self.desired.networks.values().find(|entry| entry.index == network)?;
        if entry.spec.mode != NetworkMode::Routed {
            return None;
        }
        let host = self.host().filter(|_| self.is_host_network(&entry.spec));
        let to_host = host.map(|host| NextHop::Port { port: HOST_PORT, mac: host.mac });
        if is_host && routers(&entry.spec).contains(&prefix.addr()) {
            return Some(to_host.unwrap_or(NextHop::Gateway));
        }
        if entry.spec.ranges.contains(&prefix) || entry.spec.subnets.contains(&prefix) {
            return Some(NextHop::Nowhere);
        }
        if prefix.prefix_len() == 0 { to_host } else { None }
    }

    /// True for the network that is joined to the host.
    pub(crate) fn is_host_network(&self, spec: &NetworkSpec) -> bool {
        self.config.host_network.as_ref() == Some(&spec.name)
    }

    /// The network that is joined to the host.
    pub(crate) fn host_network(&self) -> Option<&NetworkEntry> {
        self.desired.networks.get(self.config.host_network.as_ref()?)
    }

    /// Takes note of a route of the kernel's: to a gateway, or gone. Only the host's network takes part, and only with
    /// prefixes that are the cluster's: inside its subnets if it has any, and never the default route.
    ///
    /// True if the switch has the route now, or had it.
    pub fn import_route(&mut self, prefix: IpNet, gateway: Option<IpAddr>) -> bool {
        let Some(network) = self.host_network() else { return false };
        let (index, spec) = (network.index, &network.spec);
        let is_ours = spec.ranges.iter().any(|range| range.contains(&prefix));
        let is_cluster = spec.subnets.is_empty() || spec.subnets.iter().any(|subnet| subnet.contains(&prefix));
        if prefix.prefix_len() == 0 || is_ours || !is_cluster {
            return false;
        }
        let key = (index, prefix);
        let before = self.desired.imported.get(&key).copied();
        if before == gateway {
            return gateway.is_some();
        }
        // A gateway that can be no peer, as this node itself, is none; what the prefix had before is gone all the same.
        let gateway = gateway.filter(|&gateway| self.imported_peer(gateway).is_some());
        if before.is_none() && gateway.is_none() {
            return false;
        }
        self.forget_import(key);
        if let Some(gateway) = gateway {
            self.desired.imported.insert(key, gateway);
            *self.desired.imported_counts.entry(gateway).or_default() += 1;
        }
        self.settle(index, prefix);
        self.mark(Dirty::Change);
        true
    }

    fn forget_import(&mut self, key: (NetworkIndex, IpNet)) {
        let Some(before) = self.desired.imported.remove(&key) else { return };
        if let Some(count) = self.desired.imported_counts.get_mut(&before) {
            *count -= 1;
            if *count == 0 {
                self.desired.imported_counts.remove(&before);
            }
        }
    }

    /// Removes the peers that imports made and no route leads to any more. Call it after a batch of imports.
    pub fn forget_unused_peers(&mut self) {
        let unused = self.desired.peers.values().filter(|peer| peer.is_imported && !self.is_used(peer));
        let unused: Vec<(PeerIndex, PeerSpec)> = unused.map(|peer| (peer.index, peer.spec.clone())).collect();
        for (index, spec) in unused {
            self.forget_peer(index);
            for vtep in spec.vteps() {
                self.underlay.next_hops.remove(&vtep);
            }
            self.mark(Dirty::Change);
        }
    }

    fn is_used(&self, peer: &PeerEntry) -> bool {
        peer.spec.vteps().any(|vtep| {
            self.desired.imported_counts.contains_key(&vtep)
                || self.desired.followed.values().any(|followed| followed.uses(vtep))
        })
    }

    /// The peer behind a gateway: one that was asked for, or one made now.
    pub(crate) fn imported_peer(&mut self, vtep: IpAddr) -> Option<PeerIndex> {
        if let Some(&peer) = self.desired.by_vtep.get(&vtep) {
            return Some(peer);
        }
        if self.underlay.is_ours(vtep) {
            return None;
        }
        let index = self.desired.free_peer()?;
        let spec = PeerSpec {
            name: format!("kernel-{vtep}"),
            vtep,
            other_vtep: None,
            router_mac: None,
            networks: Some(Vec::new()),
            encap: self.config.import_encap,
        };
        let entry = PeerEntry { index, spec, is_configured: false, is_imported: true };
        self.desired.insert_peer(entry);
        self.mark(Dirty::Change);
        Some(index)
    }

    /// Whether packets of a network may have to travel in VXLAN.
    pub(crate) fn may_encapsulate(&self, spec: &NetworkSpec) -> bool {
        let mut peers = self.desired.peers.values().peekable();
        let all_direct = match peers.peek() {
            None => self.config.import_encap == Encap::Direct && self.config.is_importing,
            Some(_) => peers.all(|peer| peer.spec.encap == Encap::Direct),
        };
        !(self.is_host_network(spec) && all_direct)
    }
}

/// This node's own addresses in a network.
pub(crate) fn routers(spec: &NetworkSpec) -> Vec<IpAddr> {
    if spec.mode != NetworkMode::Routed {
        return Vec::new();
    }
    if let Some(router) = &spec.router {
        return router.clone();
    }
    [false, true]
        .into_iter()
        .filter_map(|is_v6| spec.ranges.iter().find(|range| range.addr().is_ipv6() == is_v6))
        .filter_map(ipam::router)
        .collect()
}

/// The prefixes that a network speaks for by itself.
fn own_prefixes(spec: &NetworkSpec) -> Vec<IpNet> {
    let routers = routers(spec).into_iter().map(IpNet::from);
    let everything = [IpNet::V4(ipnet::Ipv4Net::default()), IpNet::V6(ipnet::Ipv6Net::default())];
    routers.chain(spec.ranges.iter().copied()).chain(spec.subnets.iter().copied()).chain(everything).collect()
}
