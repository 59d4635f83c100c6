//! Requests that only ask; what workers counted is in `counts.rs`.

use std::collections::HashMap;
use std::net::IpAddr;

use ipnet::IpNet;
use vswitch_api::{
    Answer, ApiError, ErrorCode, FdbInfo, FdbTarget, HostInfo, IpamInfo, NeighborInfo, NetworkInfo, NetworkMode,
    NetworkSpec, OffloadInfo, OffloadLinkInfo, PeerInfo, PeerSpec, PodRoute, PortInfo, PortSpec, Request, RouteInfo,
    StatusInfo, UplinkInfo,
};
use vswitch_dataplane::Location;
use vswitch_net::{GATEWAY_MAC, GATEWAY_V4, GATEWAY_V6, MacAddr, NetworkIndex, PortId};

use crate::backend::{Attached, Backend, OffloadSample, PortRest, WorkerSample};
use crate::checks::full_length;
use crate::counts::worker_info;
use crate::desired::{NetworkEntry, not_found};
use crate::follow::Followed;
use crate::routes::routers;
use crate::state::{PortRecord, Waiting};
use crate::underlay::Uplink;
use crate::{Control, HOST_PORT, ipam};

impl Control {
    pub(crate) fn report(&self, now_ns: u64, request: Request, backend: &mut dyn Backend) -> Result<Answer, ApiError> {
        Ok(match request {
            Request::Status => Answer::Status(Box::new(self.status(backend))),
            Request::PortList { link: None } => {
                let info = |&id| Some(PortInfo { rest: rest_of(backend, id), ..self.port_info(id).ok()? });
                let ports = self.desired.ports.keys().filter_map(info);
                Answer::Ports { ports: ports.chain(self.waiting_infos(|_| true)).collect() }
            }
            Request::PortList { link: Some(link) } => {
                let found = match self.desired.port_of_link(&link) {
                    Some(id) => Some(PortInfo { rest: rest_of(backend, id), ..self.port_info(id)? }),
                    None => self.waiting_infos(|record| record.spec.link == link).next(),
                };
                let found = found
                    .ok_or_else(|| not_found(format!("no port of link {link}: `switchctl port list` shows them")))?;
                Answer::Ports { ports: vec![found] }
            }
            Request::NetworkList => Answer::Networks {
                networks: self.desired.networks.values().map(|entry| self.network_info(entry)).collect(),
            },
            Request::PeerList => Answer::Peers { peers: self.peers() },
            Request::FdbList { network } => Answer::Fdb { stations: self.stations(now_ns, self.filter(network)?) },
            Request::RouteList { network } => Answer::Routes { routes: self.routes(self.filter(network)?) },
            Request::MirrorList => Answer::Mirrors { mirrors: self.desired.mirrors.values().cloned().collect() },
            Request::ServiceList => self.service_list(now_ns, backend),
            Request::EgressList => self.egress_list(now_ns, backend),
            Request::GroupList => Answer::Groups { groups: self.group_list(now_ns) },
            Request::NeighborList => Answer::Neighbors { neighbors: self.neighbors() },
            Request::FlowList { limit } => Answer::Flows { flows: self.flows(now_ns, limit, backend) },
            Request::PolicyApply { documents, .. } => {
                let (_, changes) = self.read_policies(&documents)?;
                Answer::Changes { changes }
            }
            Request::PolicyList => Answer::Policies { policies: self.policy_list(&backend.sample()) },
            Request::PolicyShow(name) => Answer::Policy(Box::new(self.policy_show(&name, &backend.sample())?)),
            Request::PolicyExplain(spec) => Answer::Explained(Box::new(self.explain(&spec)?)),
            Request::EndpointList => Answer::Endpoints { endpoints: self.endpoint_list() },
            Request::ConnectionList { filter, limit } => self.connection_list(now_ns, &filter, limit, backend)?,
            Request::Observe { after, filter } => self.observe(after, &filter, &backend.sample())?,
            Request::Stats => Answer::Stats(Box::new(self.stats(&backend.sample()))),
            Request::Perf => Answer::Perf { workers: self.perf(&backend.sample()) },
            Request::RxqList => Answer::Rxq(Box::new(self.rxq(&backend.sample(), backend))),
            Request::RxqRebalance { loads, .. } => self.rebalance(&loads, false, backend)?,
            Request::Drops => Answer::Drops { drops: self.drops(&backend.sample()) },
            other => return Err(ApiError::new(ErrorCode::BadRequest, format!("{other:?} is no question"))),
        })
    }

    /// Ports of the last daemon that wait to be adopted, and why.
    pub(crate) fn waiting_infos(&self, is_meant: impl Fn(&PortRecord) -> bool) -> impl Iterator<Item = PortInfo> {
        let meant = self.desired.waiting.iter().filter(move |waiting| is_meant(&waiting.record));
        meant.map(|Waiting { record, reason, .. }| PortInfo {
            network: record.spec.network.clone().unwrap_or_default(),
            addresses: record.spec.addresses.iter().map(|&address| address.into()).collect(),
            waiting: Some(reason.clone()),
            ..record_info(record)
        })
    }

    /// A port with all that its pod needs to know.
    pub(crate) fn port_info(&self, id: PortId) -> Result<PortInfo, ApiError> {
        let entry = self.desired.ports.get(&id).ok_or_else(|| not_found(format!("no port {id}")))?;
        let name = self.desired.network_name(entry.network);
        let network = self.desired.network(Some(&name))?;
        let spec = &entry.record.spec;
        let Attached { xdp_mode, xdp_fallback, copy_modes, .. } = entry.attached.clone();
        Ok(PortInfo {
            network: name.clone(),
            addresses: spec.addresses.iter().map(|&address| pod_prefix(address, network)).collect(),
            routes: self.routes_of(network, spec, entry.record.mtu),
            stations_refused: self.desired.refused.get(&id).copied().unwrap_or(0),
            groups_refused: self.groups.refused(Location::Port(id)),
            check: Some(self.check_of(entry)),
            xdp_mode,
            xdp_fallback,
            copy_modes,
            ..record_info(&entry.record)
        })
    }

    /// Local destinations get the link's MTU, all others what fits the wire.
    fn routes_of(&self, network: &NetworkEntry, spec: &PortSpec, mtu: u32) -> Vec<PodRoute> {
        let addresses = &spec.addresses;
        let wire = Some(self.wire_mtu(&network.spec).min(mtu));
        let mut routes = Vec::new();
        for is_v6 in [false, true] {
            if !addresses.iter().any(|address| address.is_ipv6() == is_v6) {
                continue;
            }
            let of_family = |prefix: &&IpNet| prefix.addr().is_ipv6() == is_v6;
            let anywhere: IpNet = if is_v6 { IpNet::V6(Default::default()) } else { IpNet::V4(Default::default()) };
            let (on_link, gateway): (Vec<IpNet>, Option<IpAddr>) = match network.spec.mode {
                NetworkMode::Routed if is_v6 => (Vec::new(), Some(GATEWAY_V6.into())),
                NetworkMode::Routed => (vec![IpNet::from(IpAddr::V4(GATEWAY_V4))], Some(GATEWAY_V4.into())),
                NetworkMode::Bridged => {
                    let gateway = if is_v6 {
                        network.spec.gateway_v6.map(IpAddr::from)
                    } else {
                        network.spec.gateway_v4.map(IpAddr::from)
                    };
                    (prefixes(network).filter(of_family).copied().collect(), gateway)
                }
            };
            let on_link_mtu = if network.spec.mode == NetworkMode::Bridged { wire } else { None };
            routes.extend(on_link.into_iter().map(|destination| PodRoute {
                destination,
                gateway: None,
                mtu: on_link_mtu,
                is_locked: false,
            }));
            if network.spec.mode == NetworkMode::Routed {
                let local = network.spec.ranges.iter().chain(&network.spec.services).filter(of_family);
                routes.extend(local.map(|&destination| PodRoute { destination, gateway, mtu: None, is_locked: false }));
            }
            // Where another interface has the default route, the network's own prefixes are all that is left.
            // IPv6 datagrams are never cut on their way (RFC 8200 section 5), so those routes tell what the wire carries.
            let wanted = network.spec.subnet_mtu.filter(|_| !is_v6);
            if network.spec.mode == NetworkMode::Routed && (!spec.default_route || wanted.is_some()) {
                let mtu = wanted.map(|wanted| wanted.min(mtu)).or(wire);
                let is_locked = mtu > wire;
                let is_here = |prefix: &&IpNet| network.spec.ranges.contains(prefix);
                let rest = network.spec.subnets.iter().filter(of_family).filter(|prefix| !is_here(prefix));
                routes.extend(rest.map(|&destination| PodRoute { destination, gateway, mtu, is_locked }));
            }
            if gateway.is_some() && spec.default_route {
                routes.push(PodRoute { destination: anywhere, gateway, mtu: wire, is_locked: false });
            }
        }
        routes
    }

    fn status(&self, backend: &mut dyn Backend) -> StatusInfo {
        let (pid, uptime_seconds, memory_bytes) = backend.process();
        let workers = backend.sample();
        let peers = self.peers();
        let rests: Vec<PortRest> = self.desired.ports.keys().filter_map(|&port| backend.rest(port)).collect();
        StatusInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid,
            uptime_seconds,
            generation: self.generation,
            workers: workers.iter().enumerate().map(|(worker, sample)| worker_info(worker, sample)).collect(),
            uplinks: self.underlay.uplinks().iter().map(|uplink| self.uplink_info(uplink)).collect(),
            host: self.host_info(),
            ports: self.desired.ports.len(),
            ports_resting: rests.len(),
            ports_stuck: rests.iter().filter(|rest| matches!(rest, PortRest::Stuck(_))).count(),
            ports_waiting: self.waiting(),
            networks: self.desired.networks.len(),
            peers: peers.len(),
            peers_reachable: peers.iter().filter(|peer| peer.state == "reachable").count(),
            ipam: self.desired.networks.values().flat_map(|network| self.ipam(network)).collect(),
            memory_bytes,
            offload: backend.offload().map(|sample| self.offload_info(sample, &workers)),
        }
    }

    fn offload_info(&self, sample: OffloadSample, workers: &[WorkerSample]) -> OffloadInfo {
        let states = || workers.iter().filter_map(|worker| worker.fast);
        let link = |(port, reason)| OffloadLinkInfo { link: self.link_name(port), reason };
        OffloadInfo {
            state: sample.problem.unwrap_or_else(|| "on".to_owned()),
            flows: states().map(|state| state.flows).sum(),
            capacity: states().map(|state| state.capacity).sum(),
            refused: states().map(|state| state.refused).sum(),
            packets: workers.iter().map(|worker| worker.counters.offloaded).sum(),
            lost: sample.lost,
            without: sample.without.into_iter().map(link).collect(),
        }
    }

    fn uplink_info(&self, uplink: &Uplink) -> UplinkInfo {
        let empty = UplinkInfo {
            link: uplink.name.clone(),
            state: String::new(),
            note: None,
            mac: MacAddr::default(),
            mtu: 0,
            vtep_v4: None,
            vtep_v6: None,
            udp_port: self.underlay.udp_port,
            xdp_mode: String::new(),
            xdp_fallback: None,
            copy_modes: Vec::new(),
        };
        match &uplink.state {
            Err(reason) => UplinkInfo { state: reason.clone(), ..empty },
            Ok(state) => {
                let word =
                    if state.is_up { "up".to_owned() } else { format!("down: see `ip link show {}`", state.link) };
                let attached = state.attached.clone();
                UplinkInfo {
                    link: state.link.clone(),
                    state: word,
                    note: state.note.clone(),
                    mac: state.mac,
                    mtu: state.mtu,
                    vtep_v4: state.v4,
                    vtep_v6: state.v6,
                    xdp_mode: attached.xdp_mode,
                    xdp_fallback: attached.xdp_fallback,
                    copy_modes: attached.copy_modes,
                    ..empty
                }
            }
        }
    }

    fn host_info(&self) -> Option<HostInfo> {
        let network = self.host_network()?;
        let problem = match &self.host {
            Ok(host) => host.problem.clone(),
            Err(reason) => Some(reason.clone()),
        };
        Some(HostInfo {
            link: self.host().map(|host| host.link.clone()).unwrap_or_default(),
            network: network.spec.name.clone(),
            addresses: routers(&network.spec),
            masquerade: self.config.masquerade,
            state: problem.unwrap_or_else(|| "up".to_owned()),
        })
    }

    fn ipam(&self, network: &NetworkEntry) -> Vec<IpamInfo> {
        let (mut used, own) = (self.desired.addresses(network.index), routers(&network.spec));
        // The node's own addresses are neither a pod's nor free.
        used.retain(|address| !own.contains(address));
        let info = |range: &IpNet| {
            let (used, free) = ipam::usage(range, &used);
            let free = free - own.iter().filter(|address| range.contains(*address)).count() as u64;
            IpamInfo { network: network.spec.name.clone(), range: *range, used, free }
        };
        network.spec.ranges.iter().map(info).collect()
    }

    fn network_info(&self, entry: &NetworkEntry) -> NetworkInfo {
        NetworkInfo {
            name: entry.spec.name.clone(),
            vni: entry.spec.vni,
            mode: entry.spec.mode,
            subnets: entry.spec.subnets.clone(),
            ranges: entry.spec.ranges.clone(),
            services: entry.spec.services.clone(),
            router: routers(&entry.spec),
            vlan: entry.spec.vlan,
            follow: entry.spec.follow.clone(),
            spoof_check: entry.spec.spoof_check,
            options: network_options(&entry.spec),
            storm: entry.spec.storm,
            ports: self.desired.ports.values().filter(|port| port.network == entry.index).count(),
            routes: self.desired.routes.keys().filter(|(network, _)| *network == entry.index).count()
                + self.desired.imported.keys().filter(|(network, _)| *network == entry.index).count(),
            stations: self.station_count(entry.index),
            wire_mtu: self.wire_mtu(&entry.spec),
            order: entry.index.0,
        }
    }

    fn station_count(&self, network: NetworkIndex) -> usize {
        let own =
            self.desired.ports.values().filter(|port| port.network == network && self.desired.is_bridged(network));
        self.desired.stations.keys().filter(|(other, _)| *other == network).count()
            + own.count()
            + self.followed_stations(network).count()
            + self.learned.iter().filter(|((other, _), _)| *other == network).count()
    }

    /// Stations that only the kernel's device has, with their VTEPs.
    fn followed_stations(&self, network: NetworkIndex) -> impl Iterator<Item = (MacAddr, IpAddr)> + '_ {
        let nearer = self.nearer_stations(network);
        let all = self.desired.followed.get(&network).into_iter().flat_map(Followed::stations);
        all.filter(move |(mac, _)| !nearer.contains(mac))
    }

    fn peers(&self) -> Vec<PeerInfo> {
        let info = |entry: &crate::desired::PeerEntry| PeerInfo {
            name: entry.spec.name.clone(),
            vtep: entry.spec.vtep,
            other_vtep: entry.spec.other_vtep,
            router_mac: entry.spec.router_mac.unwrap_or(GATEWAY_MAC),
            networks: entry.spec.networks.clone(),
            encap: entry.spec.encap,
            is_imported: entry.is_imported,
            uplinks: self.peer_uplinks(&entry.spec),
            state: self.peer_state(&entry.spec),
        };
        self.desired.peers.values().map(info).collect()
    }

    fn peer_uplinks(&self, spec: &PeerSpec) -> Vec<String> {
        let ways =
            spec.vteps().map(|vtep| self.underlay.ways(vtep).map(|(_, uplink, _)| uplink.link.clone()).collect());
        ways.into_iter().find(|links: &Vec<String>| !links.is_empty()).unwrap_or_default()
    }

    fn peer_state(&self, spec: &PeerSpec) -> String {
        let states: Vec<String> = spec.vteps().map(|vtep| self.underlay.peer_state(vtep)).collect();
        match states.iter().position(|state| state == "reachable") {
            Some(_) => "reachable".to_owned(),
            None => states.into_iter().next().unwrap_or_default(),
        }
    }

    fn stations(&self, now_ns: u64, only: Option<NetworkIndex>) -> Vec<FdbInfo> {
        let wanted = |network: NetworkIndex| only.is_none_or(|only| only == network);
        let configured =
            self.desired.stations.iter().map(|(&(network, mac), entry)| (network, mac, entry.at.clone(), None));
        let own = self.desired.ports.values().filter(|port| self.desired.is_bridged(port.network)).map(|port| {
            let spec = &port.record.spec;
            (port.network, spec.mac, FdbTarget::Port(spec.link.clone()), None)
        });
        let names = self.peer_names();
        let followed = self.desired.followed.keys().flat_map(|&network| {
            let names = &names;
            self.followed_stations(network).filter_map(move |(mac, vtep)| {
                Some((network, mac, FdbTarget::Peer(names.get(&vtep)?.to_string()), None))
            })
        });
        let learned = self.learned.iter().map(|((network, mac), entry)| {
            let age = now_ns.saturating_sub(entry.seen_ns) / 1_000_000_000;
            (network, mac, self.target(entry.location), Some(age))
        });
        let waiting = self.desired.waiting.iter().flat_map(|waiting| &waiting.stations).filter_map(|station| {
            let network = self.desired.network(Some(&station.network)).ok()?.index;
            Some((network, station.mac, station.at.clone(), None))
        });
        let mut stations: Vec<FdbInfo> = configured
            .chain(own)
            .chain(waiting)
            .chain(followed)
            .chain(learned)
            .filter(|&(network, ..)| wanted(network))
            .map(|(network, mac, at, age_seconds)| FdbInfo {
                network: self.desired.network_name(network),
                mac,
                at,
                is_static: age_seconds.is_none(),
                age_seconds,
            })
            .collect();
        stations.sort_by(|a, b| (&a.network, a.mac).cmp(&(&b.network, b.mac)));
        stations
    }

    fn routes(&self, only: Option<NetworkIndex>) -> Vec<RouteInfo> {
        let wanted = |network: NetworkIndex| only.is_none_or(|only| only == network);
        let to_peers = self
            .desired
            .routes
            .iter()
            .map(|(&(network, prefix), entry)| (network, prefix, FdbTarget::Peer(entry.peer.clone()), false));
        let names = self.peer_names();
        let imported = self.desired.imported.iter().filter_map(|(&(network, prefix), gateway)| {
            Some((network, prefix, FdbTarget::Peer(names.get(gateway)?.to_string()), true))
        });
        let to_ports =
            self.desired.ports.values().filter(|port| !self.desired.is_bridged(port.network)).flat_map(|port| {
                let spec = &port.record.spec;
                spec.addresses
                    .iter()
                    .map(|&address| (port.network, IpNet::from(address), FdbTarget::Port(spec.link.clone()), false))
            });
        let to_host = self.host().into_iter().zip(self.host_network()).flat_map(|(host, network)| {
            let addresses = routers(&network.spec).into_iter().map(IpNet::from);
            let everything = [IpNet::V4(Default::default()), IpNet::V6(Default::default())];
            let prefixes = addresses.chain(everything);
            prefixes.map(|prefix| (network.index, prefix, FdbTarget::Port(host.link.clone()), false))
        });
        let mut routes: Vec<RouteInfo> = to_peers
            .chain(imported)
            .chain(to_ports)
            .chain(to_host)
            .filter(|&(network, ..)| wanted(network))
            .map(|(network, prefix, to, is_imported)| RouteInfo {
                network: self.desired.network_name(network),
                prefix,
                to,
                is_imported,
            })
            .collect();
        routes.sort_by(|a, b| (&a.network, a.prefix).cmp(&(&b.network, b.prefix)));
        routes
    }

    /// Peers by their VTEPs.
    fn peer_names(&self) -> HashMap<IpAddr, &str> {
        let of_peer = |peer: &'_ crate::desired::PeerEntry| peer.spec.vteps().collect::<Vec<_>>();
        let peers = self.desired.peers.values();
        peers.flat_map(|peer| of_peer(peer).into_iter().map(|vtep| (vtep, peer.spec.name.as_str()))).collect()
    }

    fn neighbors(&self) -> Vec<NeighborInfo> {
        let info = |(vtep, hop): (&IpAddr, &crate::NextHop)| {
            let peers = self.desired.peers.values().filter(|peer| peer.spec.vteps().any(|other| other == *vtep));
            NeighborInfo {
                peers: peers.map(|peer| peer.spec.name.clone()).collect(),
                address: hop.address,
                link: hop.link.clone(),
                mac: hop.mac,
                state: self.underlay.peer_state(*vtep),
            }
        };
        let each = self.underlay.next_hops.iter().flat_map(|(vtep, hops)| hops.iter().map(move |hop| (vtep, hop)));
        each.map(info).collect()
    }

    fn filter(&self, network: Option<String>) -> Result<Option<NetworkIndex>, ApiError> {
        network.map(|name| self.desired.network(Some(&name)).map(|network| network.index)).transpose()
    }

    /// MTU of a network's routes that leave the node.
    pub(crate) fn wire_mtu(&self, spec: &NetworkSpec) -> u32 {
        if self.may_encapsulate(spec) { self.underlay.encapsulated_mtu(self.vteps()) } else { self.underlay.mtu() }
    }

    /// Uplinks and the host's port, as far as they are there.
    pub(crate) fn special_ports(&self) -> impl Iterator<Item = PortId> + '_ {
        self.underlay.present().map(|(port, _)| port).chain(self.host().map(|_| HOST_PORT))
    }

    pub(crate) fn link_name(&self, port: PortId) -> String {
        match (self.underlay.uplink(port), self.host()) {
            (Some(uplink), _) => uplink.link.clone(),
            (None, Some(host)) if port == HOST_PORT => host.link.clone(),
            _ => self.desired.link_name(port),
        }
    }

    pub(crate) fn target(&self, location: Location) -> FdbTarget {
        match location {
            Location::Port(port) => FdbTarget::Port(self.desired.link_name(port)),
            Location::Peer(peer) => FdbTarget::Peer(self.desired.peer_name(peer)),
        }
    }
}

fn prefixes(network: &NetworkEntry) -> impl Iterator<Item = &IpNet> {
    if network.spec.subnets.is_empty() { network.spec.ranges.iter() } else { network.spec.subnets.iter() }
}

/// A routed pod's address stands alone; a bridged pod's lies in its subnet.
fn pod_prefix(address: IpAddr, network: &NetworkEntry) -> IpNet {
    let length = match network.spec.mode {
        NetworkMode::Routed => full_length(address),
        NetworkMode::Bridged => {
            prefixes(network).find(|prefix| prefix.contains(&address)).map_or(full_length(address), IpNet::prefix_len)
        }
    };
    IpNet::new_assert(address, length)
}

/// What of a network differs from the usual.
fn network_options(spec: &NetworkSpec) -> Vec<String> {
    let mut options = named(&[
        (spec.mss_clamp, "mss clamp"),
        (spec.multicast_snooping, "snooping"),
        (spec.transparent, "transparent"),
        (!spec.learning, "no learning"),
        (!spec.neighbor_suppression, "no suppression"),
    ]);
    options.extend(spec.subnet_mtu.map(|mtu| format!("subnet mtu {mtu}")));
    options
}

/// The names of what holds.
fn named(all: &[(bool, &str)]) -> Vec<String> {
    all.iter().filter(|(holds, _)| *holds).map(|(_, name)| (*name).to_owned()).collect()
}

/// What a record says by itself.
fn rest_of(backend: &dyn Backend, port: PortId) -> Option<String> {
    Some(match backend.rest(port)? {
        PortRest::Silent => "at rest".to_owned(),
        PortRest::Stuck(reason) => format!("cannot be woken: {reason}"),
    })
}

fn record_info(record: &PortRecord) -> PortInfo {
    let spec = &record.spec;
    PortInfo {
        id: record.id,
        link: spec.link.clone(),
        network: String::new(),
        mac: spec.mac,
        addresses: Vec::new(),
        mtu: record.mtu,
        routes: Vec::new(),
        attachment: spec.attachment.clone(),
        owner: spec.owner.clone(),
        netns: spec.netns.clone(),
        labels: spec.labels.clone(),
        stations_refused: 0,
        groups_refused: 0,
        check: None,
        options: named(&[
            (spec.isolated, "isolated"),
            (spec.hairpin, "hairpin"),
            (spec.sticky, "sticky"),
            (!spec.native, "no native network"),
        ]),
        mac_limit: spec.mac_limit,
        trunk: spec.trunk.clone(),
        bandwidth: spec.bandwidth,
        port_mappings: spec.port_mappings.clone(),
        xdp_mode: String::new(),
        xdp_fallback: None,
        copy_modes: Vec::new(),
        rest: None,
        waiting: None,
    }
}
