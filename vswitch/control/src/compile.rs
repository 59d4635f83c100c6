//! From desired state to snapshot.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use vswitch_api::{self as api, Encap, FdbTarget, NetworkMode};
use vswitch_dataplane::table::{
    egress::EgressByNetwork, fdb::Fdb, group::Groups, neighbor::Neighbors, route, service::Services,
};
use vswitch_dataplane::vxlan::OuterHeader;
use vswitch_dataplane::{
    Access, Gateway, Location, Network, NetworkMode as Mode, Path, Peer, Port, PortKind, SenderCheck, Snapshot,
    Underlay,
};
use vswitch_net::{GATEWAY_MAC, GATEWAY_V4, GATEWAY_V6, POD_LINK_MTU, PeerIndex, PortId};

use crate::desired::{NetworkEntry, PeerEntry, PortEntry};
use crate::follow::Followed;
use crate::routes::routers;
use crate::underlay::{NextHop, UplinkState};
use crate::{Control, HOST_PORT};

/// The big tables, changed in place as requests come and cloned, by pointers, into each snapshot.
#[derive(Debug, Default)]
pub(crate) struct Tables {
    pub(crate) neighbors: Neighbors,
    pub(crate) groups: Groups,
    pub(crate) fdb: Fdb,
    pub(crate) routes: route::Routes,
    pub(crate) services: Services,
    pub(crate) egress: EgressByNetwork,
}

/// Headers of IP and TCP without options.
const TCP_V4: u16 = 40;
const TCP_V6: u16 = 60;

/// The gateway of every routed network.
const GATEWAY: Gateway = Gateway { mac: GATEWAY_MAC, v4: GATEWAY_V4, v6: GATEWAY_V6 };

impl Control {
    pub(crate) fn compile(&self) -> Snapshot {
        Snapshot {
            generation: self.generation,
            ports: self.compile_ports(),
            networks: by_index(
                self.desired.networks.values().map(|entry| (entry.index.index(), self.compile_network(entry))),
            ),
            peers: by_index(self.desired.peers.values().map(|entry| (entry.index.index(), self.compile_peer(entry)))),
            vnis: self.desired.networks.values().map(|entry| (entry.spec.vni, entry.index)).collect(),
            vteps: self.desired.by_vtep.iter().map(|(&vtep, &index)| (vtep, index)).collect(),
            underlay: Underlay {
                v4: self.underlay.v4(),
                v6: self.underlay.v6(),
                udp_port: self.underlay.udp_port,
                vlan: self.config.vlan,
                direct: self.direct_network().map(|network| network.index),
                router_mac: self.config.router_mac,
            },
            fdb: self.tables.fdb.clone(),
            routes: self.tables.routes.clone(),
            neighbors: self.tables.neighbors.clone(),
            groups: self.tables.groups.clone(),
            services: self.tables.services.clone(),
            egress: self.tables.egress.clone(),
            classes: self.policy.compiler.classes().clone(),
            rules: self.policy.compiler.rule_limit(),
        }
    }

    /// The host's network, if packets of it may travel as they are.
    pub(crate) fn direct_network(&self) -> Option<&NetworkEntry> {
        let is_direct = self.desired.peers.values().any(|peer| peer.spec.encap != Encap::Vxlan);
        self.host_network().filter(|_| is_direct)
    }

    fn compile_ports(&self) -> Vec<Option<Arc<Port>>> {
        let access = self.desired.ports.iter().map(|(id, entry)| {
            let kind = PortKind::Access(self.compile_access(entry));
            let (mirrors_from, mirrors_to) = self.mirrors_of(&entry.record.spec.link);
            let port = Port {
                mtu: entry.record.mtu,
                tcp_mtu: entry.record.mtu,
                kind,
                policy: self.policy.subject(*id),
                limits: entry.limits.clone(),
                storms: entry.storms.clone(),
                mirrors_from,
                mirrors_to,
            };
            (id.index(), port)
        });
        let uplinks = self
            .underlay
            .present()
            .map(|(port, uplink)| (port.index(), Port::new(uplink.mtu, PortKind::Uplink(uplink.mac))));
        let host = self.host().zip(self.host_network()).map(|(host, network)| {
            // The host routes: packets of all the world come from it, but none of a pod.
            let access = Access::new(network.index, host.mac, routers(&network.spec), SenderCheck::Elsewhere);
            let policy = self.policy.compiler.host_subject();
            // What the host forwards must fit the wire; nothing tells its stack where to cut.
            let tcp_mtu = self.wire_mtu(&network.spec);
            (HOST_PORT.index(), Port { policy, tcp_mtu, ..Port::new(POD_LINK_MTU, PortKind::Access(access)) })
        });
        by_index(access.chain(uplinks).chain(host))
    }

    fn compile_access(&self, entry: &PortEntry) -> Access {
        let spec = &entry.record.spec;
        let check = match self.check_of(entry) {
            api::SenderCheck::None => SenderCheck::None,
            api::SenderCheck::Mac | api::SenderCheck::AtLeastMac => SenderCheck::Mac,
            api::SenderCheck::Full => SenderCheck::Full,
        };
        Access {
            has_native: spec.native,
            vlans: spec.trunk.iter().filter_map(|&vid| Some((vid, self.desired.network_of_vlan(vid)?))).collect(),
            is_isolated: spec.isolated,
            is_hairpin: spec.hairpin,
            is_sticky: spec.sticky,
            ..Access::new(entry.network, spec.mac, spec.addresses.clone(), check)
        }
    }

    /// What is checked of a port's packets: what was asked for it, or else what its network says.
    pub(crate) fn check_of(&self, entry: &PortEntry) -> api::SenderCheck {
        let network = self.desired.networks.values().find(|network| network.index == entry.network);
        let is_checked = network.is_some_and(|network| network.spec.spoof_check);
        match entry.record.spec.check {
            Some(api::SenderCheck::AtLeastMac) | None if is_checked => api::SenderCheck::Full,
            Some(api::SenderCheck::AtLeastMac) => api::SenderCheck::Mac,
            Some(asked) => asked,
            None => api::SenderCheck::None,
        }
    }

    fn compile_network(&self, entry: &NetworkEntry) -> Network {
        let ports = self.desired.ports.iter().filter(|(_, port)| self.desired.is_in(port, entry.index));
        let routers = routers(&entry.spec);
        Network {
            vni: entry.spec.vni,
            mode: match entry.spec.mode {
                NetworkMode::Bridged => Mode::Bridged,
                NetworkMode::Routed => Mode::Routed(GATEWAY),
            },
            router_v4: routers.iter().find_map(|&router| if let IpAddr::V4(v4) = router { Some(v4) } else { None }),
            router_v6: routers.iter().find_map(|&router| if let IpAddr::V6(v6) = router { Some(v6) } else { None }),
            mss: entry.spec.mss_clamp.then(|| {
                let wire = self.wire_mtu(&entry.spec).min(0xffff) as u16;
                (wire.saturating_sub(TCP_V4), wire.saturating_sub(TCP_V6))
            }),
            is_transparent: entry.spec.transparent,
            learns: entry.spec.learning,
            multicast_routers: self.multicast_routers(entry),
            ports: ports.map(|(&id, _)| id).collect(),
            flood_peers: self.flood_peers(entry).into_iter().collect(),
        }
    }

    /// Peers that get a network's floods.
    pub(crate) fn flood_peers(&self, entry: &NetworkEntry) -> BTreeSet<PeerIndex> {
        let gets_floods = |peer: &&PeerEntry| match &peer.spec.networks {
            None => true,
            Some(names) => names.contains(&entry.spec.name),
        };
        let asked = self.desired.peers.values().filter(gets_floods).map(|peer| peer.index);
        let followed = self.desired.followed.get(&entry.index).into_iter().flat_map(Followed::flood);
        asked.chain(followed.filter_map(|vtep| self.desired.by_vtep.get(&vtep).copied())).collect()
    }

    fn compile_peer(&self, entry: &PeerEntry) -> Peer {
        // The first that can be reached; of none it is the first that is said to be out of reach.
        let reachable = |vtep: &IpAddr| self.underlay.ways(*vtep).next().is_some();
        let vtep = entry.spec.vteps().find(reachable).unwrap_or(entry.spec.vtep);
        let mut ways = self.underlay.ways(vtep).peekable();
        let is_direct = match entry.spec.encap {
            Encap::Vxlan => false,
            Encap::Direct => true,
            Encap::CrossSubnet => ways.peek().is_some_and(|(.., hop)| hop.address == Some(vtep)),
        };
        let path = |(port, uplink, hop): (PortId, &UplinkState, &NextHop)| {
            let macs = (uplink.mac, hop.mac?);
            let own = self.underlay.vtep_for(vtep)?;
            let header = OuterHeader::new(macs, own, vtep, self.underlay.udp_port, self.config.vlan)?;
            Some(Path { port, mtu: hop.mtu.map_or(uplink.mtu, |mtu| mtu.min(uplink.mtu)), header })
        };
        let router_mac = entry.spec.router_mac.unwrap_or(GATEWAY_MAC);
        Peer { vtep, router_mac, is_direct, paths: ways.filter_map(path).collect() }
    }

    /// Where a station or route target is, in the data path's terms.
    pub(crate) fn locate(&self, target: &FdbTarget) -> Option<Location> {
        match target {
            FdbTarget::Port(link) => self.desired.port_of_link(link).map(Location::Port),
            FdbTarget::Peer(name) => self.desired.peers.get(name).map(|peer| Location::Peer(peer.index)),
        }
    }
}

fn by_index<T>(items: impl Iterator<Item = (usize, T)>) -> Vec<Option<Arc<T>>> {
    let mut array = Vec::new();
    for (at, item) in items {
        if array.len() <= at {
            array.resize_with(at + 1, || None);
        }
        array[at] = Some(Arc::new(item));
    }
    array
}
