//! Desired state: what was asked for, and the questions the checks ask of it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use vswitch_api::{
    ApiError, EgressSpec, ErrorCode, FdbSpec, FdbTarget, MirrorSpec, NetworkMode, NetworkSpec, PeerSpec, ServiceSpec,
};
use vswitch_dataplane::{Limits, Location, Storm};
use vswitch_net::{MacAddr, NetworkIndex, PeerIndex, PortId};

use crate::backend::Attached;
use crate::egress::EgressEntry;
use crate::follow::Followed;
use crate::learned::PlaceLimits;
use crate::routes::routers;
use crate::services::ServiceEntry;
use crate::state::{PortRecord, State, Waiting};
use crate::{HOST_PORT, is_uplink};

/// What was asked for.
#[derive(Debug, Default)]
pub(crate) struct Desired {
    pub(crate) networks: BTreeMap<String, NetworkEntry>,
    pub(crate) peers: BTreeMap<String, PeerEntry>,
    pub(crate) ports: BTreeMap<PortId, PortEntry>,
    pub(crate) routes: BTreeMap<(NetworkIndex, IpNet), RouteEntry>,
    pub(crate) stations: BTreeMap<(NetworkIndex, MacAddr), StationEntry>,
    /// Ports of routed networks by their addresses.
    pub(crate) by_address: BTreeMap<(NetworkIndex, IpAddr), PortId>,
    /// Peers by their VTEPs.
    pub(crate) by_vtep: BTreeMap<IpAddr, PeerIndex>,
    /// Gateways of routes that routing daemons gave the kernel, and how many routes each has.
    pub(crate) imported: HashMap<(NetworkIndex, IpNet), IpAddr>,
    pub(crate) imported_counts: HashMap<IpAddr, usize>,
    pub(crate) mirrors: BTreeMap<String, MirrorSpec>,
    pub(crate) services: BTreeMap<String, ServiceEntry>,
    pub(crate) egress: BTreeMap<String, EgressEntry>,
    /// Services and egress rules of a former daemon that could not be taken over: they are tried again at the next start.
    pub(crate) parked_services: Vec<ServiceSpec>,
    pub(crate) parked_egress: Vec<EgressSpec>,
    /// Stations that ports with a limit had too many of.
    pub(crate) refused: BTreeMap<PortId, u64>,
    /// What the kernel's own VXLAN devices know of bridged networks.
    pub(crate) followed: BTreeMap<NetworkIndex, Followed>,
    /// Where the built-in IPAM goes on looking, by network and range, so that an address is not reused at once.
    pub(crate) cursors: BTreeMap<(String, IpNet), u128>,
    /// Ports of a former daemon that could not be adopted yet. Their addresses stay theirs.
    pub(crate) waiting: Vec<Waiting>,
    last_port: u16,
    last_network: u16,
    last_peer: u16,
    /// True while the configuration file is being applied.
    pub(crate) is_configuring: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct NetworkEntry {
    pub(crate) index: NetworkIndex,
    pub(crate) spec: NetworkSpec,
    pub(crate) is_configured: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct PeerEntry {
    pub(crate) index: PeerIndex,
    pub(crate) spec: PeerSpec,
    pub(crate) is_configured: bool,
    /// Made for a route or a station of the kernel's, and gone with it.
    pub(crate) is_imported: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct PortEntry {
    pub(crate) network: NetworkIndex,
    pub(crate) record: PortRecord,
    pub(crate) attached: Attached,
    pub(crate) limits: Option<Arc<Limits>>,
    pub(crate) storms: Vec<(NetworkIndex, Arc<Storm>)>,
}

#[derive(Clone, Debug)]
pub(crate) struct RouteEntry {
    pub(crate) peer: String,
    pub(crate) is_configured: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct StationEntry {
    pub(crate) at: FdbTarget,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) is_configured: bool,
}

impl Desired {
    /// The network of a name; the first configured one (the lowest index) for none.
    pub(crate) fn network(&self, name: Option<&str>) -> Result<&NetworkEntry, ApiError> {
        let found = match name {
            Some(name) => self.networks.get(name),
            None => self.networks.values().min_by_key(|network| network.index),
        };
        found.ok_or_else(|| match name {
            Some(name) => not_found(format!("no network \"{name}\": `switchctl network list` shows them")),
            None => {
                not_found("there is no network yet: add a [[network]] to the configuration, or `switchctl network add`")
            }
        })
    }

    /// From names of networks to their numbers; the first network for none.
    pub(crate) fn index_of_name(&self) -> impl Fn(Option<&str>) -> Option<NetworkIndex> + use<> {
        let first = self.network(None).ok().map(|network| network.index);
        let by_name: HashMap<String, NetworkIndex> =
            self.networks.iter().map(|(name, network)| (name.clone(), network.index)).collect();
        move |name| name.map_or(first, |name| by_name.get(name).copied())
    }

    pub(crate) fn network_name(&self, index: NetworkIndex) -> String {
        let named = self.networks.iter().find(|(_, network)| network.index == index);
        named.map_or_else(|| format!("#{}", index.0), |(name, _)| name.clone())
    }

    pub(crate) fn is_bridged(&self, index: NetworkIndex) -> bool {
        self.networks.values().any(|network| network.index == index && network.spec.mode == NetworkMode::Bridged)
    }

    pub(crate) fn peer(&self, name: &str) -> Result<&PeerEntry, ApiError> {
        self.peers.get(name).ok_or_else(|| not_found(format!("no peer \"{name}\": `switchctl peer list` shows them")))
    }

    /// A peer that a request may name: one that somebody asked for.
    pub(crate) fn own_peer(&self, name: &str) -> Result<&PeerEntry, ApiError> {
        let peer = self.peer(name)?;
        if peer.is_imported {
            return Err(ApiError::new(
                ErrorCode::Invalid,
                format!(
                    "peer \"{name}\" is known from the kernel's tables and goes with them: add one of your own for it \
                     (`switchctl peer add NAME {}`)",
                    peer.spec.vtep
                ),
            ));
        }
        Ok(peer)
    }

    pub(crate) fn peer_of(&self, index: PeerIndex) -> Option<&PeerEntry> {
        self.peers.values().find(|peer| peer.index == index)
    }

    pub(crate) fn peer_name(&self, index: PeerIndex) -> String {
        let named = self.peers.iter().find(|(_, peer)| peer.index == index);
        named.map_or_else(|| format!("#{}", index.0), |(name, _)| name.clone())
    }

    pub(crate) fn port_of_link(&self, link: &str) -> Option<PortId> {
        self.ports.iter().find(|(_, port)| port.record.spec.link == link).map(|(&id, _)| id)
    }

    pub(crate) fn link_name(&self, port: PortId) -> String {
        match self.ports.get(&port) {
            Some(entry) => entry.record.spec.link.clone(),
            None if port == HOST_PORT => "host".to_owned(),
            None if is_uplink(port) => format!("uplink {port}"),
            None => format!("#{port}"),
        }
    }

    /// True if learning must leave a station alone: it is configured, or a port's own.
    pub(crate) fn is_static(&self, network: NetworkIndex, mac: MacAddr) -> bool {
        self.stations.contains_key(&(network, mac))
            || self.ports.values().any(|port| port.network == network && port.record.spec.mac == mac)
    }

    /// Addresses in use in a network.
    pub(crate) fn addresses(&self, network: NetworkIndex) -> BTreeSet<IpAddr> {
        let ports = self.ports.values().filter(|port| port.network == network);
        let name = self.network_name(network);
        let waiting = self.waiting.iter().map(|waiting| &waiting.record.spec);
        let waiting = waiting.filter(|spec| spec.network.as_deref() == Some(&name));
        let specs = ports.map(|port| &port.record.spec).chain(waiting);
        let own = self.networks.get(&name).map(|network| routers(&network.spec)).unwrap_or_default();
        let egress = self.egress.values().filter(|rule| rule.network == network);
        let egress = egress.flat_map(|rule| rule.spec.addresses.iter().copied());
        specs.flat_map(|spec| spec.addresses.iter().copied()).chain(own).chain(egress).collect()
    }

    /// How many stations a place may have, and whether they stay there.
    pub(crate) fn limits_at(&self, location: Location) -> PlaceLimits {
        let Location::Port(port) = location else { return PlaceLimits::default() };
        self.ports.get(&port).map_or_else(PlaceLimits::default, |entry| PlaceLimits {
            most: entry.record.spec.mac_limit,
            is_sticky: entry.record.spec.sticky,
        })
    }

    /// The network of an 802.1Q identifier.
    pub(crate) fn network_of_vlan(&self, vid: u16) -> Option<NetworkIndex> {
        self.networks.values().find(|network| network.spec.vlan == Some(vid)).map(|network| network.index)
    }

    /// True if a port carries a network, tagged or not.
    pub(crate) fn is_in(&self, port: &PortEntry, network: NetworkIndex) -> bool {
        let spec = &port.record.spec;
        (port.network == network && spec.native)
            || spec.trunk.iter().any(|&vid| self.network_of_vlan(vid) == Some(network))
    }

    /// True if a place exists and belongs to a bridged network.
    pub(crate) fn is_at(&self, network: NetworkIndex, location: Location) -> bool {
        self.is_bridged(network)
            && match location {
                Location::Port(port) => self.ports.get(&port).is_some_and(|entry| self.is_in(entry, network)),
                Location::Peer(peer) => self.peers.values().any(|entry| entry.index == peer),
            }
    }

    /// Forgets what only makes sense with a port: mirrors to it and of it.
    pub(crate) fn forget_link(&mut self, link: &str) {
        let at = FdbTarget::Port(link.to_owned());
        self.mirrors.retain(|_, mirror| {
            mirror.ports.retain(|other| other != link);
            !mirror.ports.is_empty() && mirror.to != at
        });
    }

    /// Forgets a station that waits with its port. True if there was one.
    pub(crate) fn forget_waiting_station(&mut self, network: &str, mac: MacAddr) -> bool {
        let is_meant = |station: &FdbSpec| station.network == network && station.mac == mac;
        let holder = self.waiting.iter_mut().find(|waiting| waiting.stations.iter().any(is_meant));
        holder.map(|waiting| waiting.stations.retain(|station| !is_meant(station))).is_some()
    }

    pub(crate) fn free_port(&mut self) -> Option<PortId> {
        let waiting = self.waiting.iter().map(|waiting| waiting.record.id.0);
        let used: BTreeSet<u16> = self.ports.keys().map(|id| id.0).chain(waiting).chain(0..=HOST_PORT.0).collect();
        next_free(&mut self.last_port, &used).map(PortId)
    }

    pub(crate) fn free_network(&mut self) -> Option<NetworkIndex> {
        let used = self.networks.values().map(|network| network.index.0).collect();
        next_free(&mut self.last_network, &used).map(NetworkIndex)
    }

    pub(crate) fn insert_peer(&mut self, entry: PeerEntry) {
        for vtep in entry.spec.vteps() {
            self.by_vtep.insert(vtep, entry.index);
        }
        self.peers.insert(entry.spec.name.clone(), entry);
    }

    pub(crate) fn remove_peer(&mut self, name: &str) -> Option<PeerEntry> {
        let entry = self.peers.remove(name)?;
        for vtep in entry.spec.vteps() {
            if self.by_vtep.get(&vtep) == Some(&entry.index) {
                self.by_vtep.remove(&vtep);
            }
        }
        Some(entry)
    }

    pub(crate) fn free_peer(&mut self) -> Option<PeerIndex> {
        let used = self.peers.values().map(|peer| peer.index.0).collect();
        next_free(&mut self.last_peer, &used).map(PeerIndex)
    }

    /// What must survive a restart: what requests made, and not what the configuration file says anyway.
    pub(crate) fn state(&self, boot_id: &str) -> State {
        // In the order of making, which decides where ports go that name no network.
        let mut networks: Vec<&NetworkEntry> = self.networks.values().collect();
        networks.sort_by_key(|entry| entry.index);
        State {
            boot_id: boot_id.to_owned(),
            networks: values(networks.into_iter(), |entry| (!entry.is_configured).then(|| entry.spec.clone())),
            peers: values(self.peers.values(), |entry| {
                (!entry.is_configured && !entry.is_imported).then(|| entry.spec.clone())
            }),
            routes: values(self.routes.iter(), |((network, prefix), entry)| {
                (!entry.is_configured).then(|| vswitch_api::RouteSpec {
                    network: self.network_name(*network),
                    prefix: *prefix,
                    peer: entry.peer.clone(),
                })
            }),
            stations: values(self.stations.iter(), |((network, mac), entry)| {
                (!entry.is_configured).then(|| FdbSpec {
                    network: self.network_name(*network),
                    mac: *mac,
                    at: entry.at.clone(),
                    addresses: entry.addresses.clone(),
                })
            })
            .into_iter()
            .chain(self.waiting.iter().flat_map(|waiting| waiting.stations.iter().cloned()))
            .collect(),
            ports: self
                .ports
                .values()
                .map(|entry| &entry.record)
                .chain(self.waiting.iter().map(|waiting| &waiting.record))
                .cloned()
                .collect(),
            mirrors: self.mirrors.values().cloned().collect(),
            services: values(self.services.values(), |entry| {
                let network = Some(self.network_name(entry.front.network));
                (!entry.is_configured).then(|| ServiceSpec { network, ..entry.spec.clone() })
            })
            .into_iter()
            .chain(self.parked_services.iter().cloned())
            .collect(),
            egress: values(self.egress.values(), |entry| {
                let network = Some(self.network_name(entry.network));
                (!entry.is_configured).then(|| EgressSpec { network, ..entry.spec.clone() })
            })
            .into_iter()
            .chain(self.parked_egress.iter().cloned())
            .collect(),
            cursors: self
                .cursors
                .iter()
                .map(|((network, range), at)| (network.clone(), *range, at.to_string()))
                .collect(),
        }
    }
}

pub(crate) fn not_found(message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorCode::NotFound, message)
}

/// A number that was not given out lately, so that news about its last owner are not taken for its next one's. Numbers
/// index arrays, so they stay within twice of what is in use.
fn next_free(last: &mut u16, used: &BTreeSet<u16>) -> Option<u16> {
    let limit = (used.len() * 2).clamp(1024, usize::from(u16::MAX)) as u32;
    let found =
        (1..=limit).map(|step| ((u32::from(*last) + step) % limit) as u16).find(|number| !used.contains(number))?;
    *last = found;
    Some(found)
}

fn values<T, U>(from: impl Iterator<Item = T>, keep: impl FnMut(T) -> Option<U>) -> Vec<U> {
    from.filter_map(keep).collect()
}
