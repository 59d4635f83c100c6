//! From desired state to snapshot.

use std::net::IpAddr;
use std::sync::Arc;

use vswitch_api::{FdbTarget, NetworkMode};
use vswitch_dataplane::table::{fdb::Fdb, route};
use vswitch_dataplane::vxlan::OuterHeader;
use vswitch_dataplane::{
    Access, Gateway, Location, Network, NetworkMode as Mode, Peer, Port, PortKind, Reach, Snapshot, Underlay,
};
use vswitch_net::{GATEWAY_MAC, GATEWAY_V4, GATEWAY_V6, PortId};

use crate::desired::{NetworkEntry, PeerEntry};
use crate::{Control, UPLINK_PORT};

/// The big tables, changed in place as requests come and cloned, by pointers, into each snapshot.
#[derive(Debug, Default)]
pub(crate) struct Tables {
    pub(crate) fdb: Fdb,
    pub(crate) routes: route::Routes,
}

/// The gateway of every routed network.
const GATEWAY: Gateway = Gateway { mac: GATEWAY_MAC, v4: GATEWAY_V4, v6: GATEWAY_V6 };

impl Control {
    pub(crate) fn compile(&self) -> Snapshot {
        let uplink = self.underlay.uplink.as_ref();
        Snapshot {
            generation: self.generation,
            ports: self.compile_ports(),
            networks: by_index(
                self.desired.networks.values().map(|entry| (entry.index.index(), self.compile_network(entry))),
            ),
            peers: by_index(self.desired.peers.values().map(|entry| (entry.index.index(), self.compile_peer(entry)))),
            vnis: self.desired.networks.values().map(|entry| (entry.spec.vni, entry.index)).collect(),
            vteps: self.desired.peers.values().map(|entry| (entry.spec.vtep, entry.index)).collect(),
            underlay: Underlay {
                v4: uplink.and_then(|uplink| uplink.v4),
                v6: uplink.and_then(|uplink| uplink.v6),
                udp_port: self.underlay.udp_port,
            },
            fdb: self.tables.fdb.clone(),
            routes: self.tables.routes.clone(),
        }
    }

    fn compile_ports(&self) -> Vec<Option<Arc<Port>>> {
        let access = self.desired.ports.iter().map(|(id, entry)| {
            let spec = &entry.record.spec;
            let access = Access { network: entry.network, mac: spec.mac, addresses: spec.addresses.clone() };
            (id.index(), Port { mtu: entry.record.mtu, kind: PortKind::Access(access) })
        });
        let uplink = self
            .underlay
            .uplink
            .as_ref()
            .map(|uplink| (UPLINK_PORT.index(), Port { mtu: uplink.mtu, kind: PortKind::Uplink }));
        by_index(access.chain(uplink))
    }

    fn compile_network(&self, entry: &NetworkEntry) -> Network {
        let ports: Vec<PortId> =
            self.desired.ports.iter().filter(|(_, port)| port.network == entry.index).map(|(&id, _)| id).collect();
        let gets_floods = |peer: &&PeerEntry| match &peer.spec.networks {
            None => true,
            Some(names) => names.contains(&entry.spec.name),
        };
        Network {
            vni: entry.spec.vni,
            mode: match entry.spec.mode {
                NetworkMode::Bridged => Mode::Bridged,
                NetworkMode::Routed => Mode::Routed(GATEWAY),
            },
            spoof_check: entry.spec.spoof_check,
            ports,
            flood_peers: self.desired.peers.values().filter(gets_floods).map(|peer| peer.index).collect(),
        }
    }

    fn compile_peer(&self, entry: &PeerEntry) -> Peer {
        Peer {
            vtep: entry.spec.vtep,
            router_mac: entry.spec.router_mac.unwrap_or(GATEWAY_MAC),
            reach: self.compile_reach(entry.spec.vtep),
        }
    }

    fn compile_reach(&self, vtep: IpAddr) -> Option<Reach> {
        let uplink = self.underlay.uplink.as_ref().filter(|uplink| uplink.is_up)?;
        let next_hop = self.underlay.next_hops.get(&vtep)?;
        if next_hop.link.as_deref() != Some(&uplink.link) {
            return None;
        }
        let macs = (uplink.mac, next_hop.mac?);
        let header = OuterHeader::new(macs, uplink.vtep_for(vtep)?, vtep, self.underlay.udp_port)?;
        Some(Reach { port: UPLINK_PORT, mtu: uplink.mtu, header })
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
