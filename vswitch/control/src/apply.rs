//! Requests that change something: every check first, then the change.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use vswitch_api::{
    Answer, ApiError, Attachment, Bandwidth, Encap, ErrorCode, FdbSpec, FdbTarget, NetworkMode, NetworkSpec, PeerSpec,
    PortSpec, Request, RouteSpec,
};
use vswitch_dataplane::{Bucket, Limits, Location};
use vswitch_net::{MacAddr, NetworkIndex, POD_LINK_MTU, POD_LINK_MTU_MIN, PortId};

use crate::backend::Backend;
use crate::desired::{NetworkEntry, PeerEntry, PortEntry, RouteEntry, StationEntry, not_found};
use crate::routes::routers;
use crate::state::PortRecord;
use crate::{Control, Dirty, ipam};

type Applied = Result<Answer, ApiError>;

impl Control {
    pub(crate) fn apply(&mut self, request: Request, backend: &mut dyn Backend) -> Applied {
        match request {
            Request::PortAdd(spec) => self.add_port(spec, backend),
            Request::PortDel { link } => Ok(self.remove_ports(backend, |port| port.spec.link == link)),
            Request::PortGc { owner, valid } => {
                Ok(self.remove_ports(backend, |port| is_stale(&port.spec, &owner, &valid)))
            }
            Request::NetworkAdd(spec) => self.add_network(spec),
            Request::NetworkDel { name } => self.remove_network(&name),
            Request::PeerAdd(spec) => self.add_peer(spec),
            Request::PeerDel { name } => self.remove_peer(&name),
            Request::RouteAdd(spec) => self.add_route(spec),
            Request::RouteDel { network, prefix } => self.remove_route(&network, prefix),
            Request::FdbAdd(spec) => self.add_station(spec),
            Request::FdbDel { network, mac } => self.remove_station(&network, mac),
            Request::MirrorAdd(spec) => self.add_mirror(spec),
            Request::MirrorDel { name } => self.remove_mirror(&name),
            other => Err(ApiError::new(ErrorCode::BadRequest, format!("{other:?} changes nothing"))),
        }
    }

    fn add_network(&mut self, spec: NetworkSpec) -> Applied {
        check_name("network", &spec.name)?;
        if self.desired.networks.contains_key(&spec.name) {
            return Err(conflict(format!("network \"{}\" exists: remove it first, or choose another name", spec.name)));
        }
        if let Some(other) = self.desired.networks.values().find(|other| other.spec.vni == spec.vni) {
            let (vni, name) = (spec.vni, &other.spec.name);
            return Err(conflict(format!("vni {vni} belongs to network \"{name}\": each network needs its own")));
        }
        for (key, prefixes) in [("subnets", &spec.subnets), ("ranges", &spec.ranges)] {
            check_prefixes(key, prefixes)?;
        }
        for range in &spec.ranges {
            let is_inside = spec.subnets.is_empty() || spec.subnets.iter().any(|subnet| subnet.contains(range));
            if !is_inside {
                return Err(invalid(format!("ranges: {range} lies in none of the network's subnets")));
            }
        }
        if spec.mode == NetworkMode::Routed && (spec.gateway_v4.is_some() || spec.gateway_v6.is_some()) {
            return Err(invalid(
                "gateway_v4 and gateway_v6 are for bridged networks: in a routed one the switch is the gateway",
            ));
        }
        self.check_network_ports(&spec)?;
        let index = self.desired.free_network().ok_or_else(|| exhausted("there are 65535 networks already"))?;
        let is_configured = self.desired.is_configuring;
        self.desired.networks.insert(spec.name.clone(), NetworkEntry { index, spec, is_configured });
        self.settle_network(index);
        self.mark(Dirty::Change);
        Ok(Answer::Done)
    }

    /// What concerns the host, trunks and the node's own addresses.
    fn check_network_ports(&self, spec: &NetworkSpec) -> Result<(), ApiError> {
        let is_routed = spec.mode == NetworkMode::Routed;
        for &router in spec.router.iter().flatten() {
            check_unicast("router", router)?;
            if !is_routed {
                return Err(invalid("router is for routed networks: a bridged one takes gateway_v4 and gateway_v6"));
            }
            let of_family = spec.router.iter().flatten().filter(|other| other.is_ipv4() == router.is_ipv4());
            if of_family.count() > 1 {
                return Err(invalid("router: one address of each family, not more"));
            }
        }
        if spec.mss_clamp && !is_routed {
            return Err(invalid("mss_clamp is for routed networks: a bridged one is changed by nobody"));
        }
        if is_routed && (spec.multicast_snooping || spec.storm.is_some() || spec.follow.is_some()) {
            return Err(invalid(
                "multicast_snooping, storm and follow are for bridged networks: a routed one floods nothing",
            ));
        }
        if spec.transparent && is_routed {
            return Err(invalid("transparent is for bridged networks: a routed one carries no tags"));
        }
        if let Some(vid) = spec.vlan {
            if !(1..=4094).contains(&vid) {
                return Err(invalid(format!("vlan: {vid} is not allowed; allowed are 1 to 4094 (802.1Q)")));
            }
            if let Some(other) = self.desired.networks.values().find(|other| other.spec.vlan == Some(vid)) {
                return Err(conflict(format!("vlan {vid} belongs to network \"{}\" already", other.spec.name)));
            }
        }
        if self.is_host_network(spec) && (!is_routed || routers(spec).is_empty()) {
            return Err(invalid(format!(
                "network \"{}\" is to be joined to the host: it must be routed, with ranges or a router address",
                spec.name
            )));
        }
        Ok(())
    }

    fn remove_network(&mut self, name: &str) -> Applied {
        if self.config.host_network.as_deref() == Some(name) {
            return Err(conflict(format!("network \"{name}\" is joined to the host: take it out of [host] first")));
        }
        let index = self.desired.network(Some(name))?.index;
        let ports =
            self.desired.ports.values().filter(|port| port.network == index || self.desired.is_in(port, index)).count();
        if ports > 0 {
            return Err(conflict(format!(
                "network \"{name}\" has {ports} ports: remove them first (`switchctl port list`)"
            )));
        }
        if let Some(mirror) = self.desired.mirrors.values().find(|mirror| mirror.network.as_deref() == Some(name)) {
            return Err(conflict(format!("mirror \"{}\" travels in network \"{name}\": remove it first", mirror.name)));
        }
        if let Some(peer) =
            self.desired.peers.values().find(|peer| peer.spec.networks.iter().flatten().any(|other| other == name))
        {
            return Err(conflict(format!(
                "peer \"{}\" names network \"{name}\": remove the peer first",
                peer.spec.name
            )));
        }
        let routes: Vec<IpNet> =
            self.desired.routes.keys().filter(|(network, _)| *network == index).map(|&(_, prefix)| prefix).collect();
        for prefix in routes {
            self.desired.routes.remove(&(index, prefix));
            self.settle(index, prefix);
        }
        let groups = self.groups.forget_network(index);
        self.set_groups(groups);
        let mut stations = self.learned.forget_network(index);
        self.desired.stations.retain(|&(network, mac), entry| {
            if network == index {
                stations.push((network, mac));
                entry.addresses.iter().for_each(|&address| self.tables.neighbors.remove(network, address));
            }
            network != index
        });
        self.forget_stations(stations);
        if let Some(entry) = self.desired.networks.remove(name) {
            self.unsettle_network(&entry);
        }
        self.mark(Dirty::Change);
        Ok(Answer::Done)
    }

    fn add_peer(&mut self, spec: PeerSpec) -> Applied {
        check_name("peer", &spec.name)?;
        if self.desired.peers.contains_key(&spec.name) {
            return Err(conflict(format!("peer \"{}\" exists: remove it first, or choose another name", spec.name)));
        }
        check_unicast("vtep", spec.vtep)?;
        if let Some(other) =
            self.desired.peers.values().find(|other| other.spec.vtep == spec.vtep && !other.is_imported)
        {
            return Err(conflict(format!("vtep {} belongs to peer \"{}\" already", spec.vtep, other.spec.name)));
        }
        if self.underlay.is_ours(spec.vtep) {
            return Err(invalid(format!("vtep {} is this node's own: name another node's", spec.vtep)));
        }
        if let Some(mac) = spec.router_mac {
            check_mac("router_mac", mac)?;
        }
        for name in spec.networks.iter().flatten() {
            self.desired.network(Some(name))?;
        }
        if spec.encap != Encap::Vxlan && self.host_network().is_none_or(|network| network.spec.subnets.is_empty()) {
            return Err(invalid(
                "encap: without VXLAN only the network that is joined to the host can travel, if it says what the \
                 cluster's addresses are: set [host] network, and its `subnets`",
            ));
        }
        let index = match self.desired.by_vtep.get(&spec.vtep) {
            // Known from a routing daemon so far; its routes now lead to the one that was asked for.
            Some(&index) => {
                let name = self.desired.peer_name(index);
                self.desired.remove_peer(&name);
                index
            }
            None => self.desired.free_peer().ok_or_else(|| exhausted("there are 65535 peers already"))?,
        };
        let is_configured = self.desired.is_configuring;
        self.desired.insert_peer(PeerEntry { index, spec, is_configured, is_imported: false });
        self.mark(Dirty::Change);
        Ok(Answer::Done)
    }

    fn remove_peer(&mut self, name: &str) -> Applied {
        let (index, vtep) = self.desired.peer(name).map(|peer| (peer.index, peer.spec.vtep))?;
        let routes: Vec<(NetworkIndex, IpNet)> =
            self.desired.routes.iter().filter(|(_, route)| route.peer == name).map(|(&key, _)| key).collect();
        for (network, prefix) in routes {
            self.desired.routes.remove(&(network, prefix));
            self.settle(network, prefix);
        }
        let groups = self.groups.forget_location(Location::Peer(index));
        self.set_groups(groups);
        self.desired.mirrors.retain(|_, mirror| mirror.to != FdbTarget::Peer(name.to_owned()));
        let mut stations = self.learned.forget_location(Location::Peer(index));
        self.desired.stations.retain(|&station, entry| {
            let goes = entry.at == FdbTarget::Peer(name.to_owned());
            if goes {
                entry.addresses.iter().for_each(|&address| self.tables.neighbors.remove(station.0, address));
                stations.push(station);
            }
            !goes
        });
        self.forget_stations(stations);
        self.desired.remove_peer(name);
        self.underlay.next_hops.remove(&vtep);
        self.desired.imported_counts.remove(&index);
        let imported: Vec<_> =
            self.desired.imported.iter().filter(|(_, peer)| **peer == index).map(|(&key, _)| key).collect();
        for (network, prefix) in imported {
            // A routing daemon still knows them: they go on by a peer of their own.
            self.desired.imported.remove(&(network, prefix));
            self.import_route(prefix, Some(vtep));
            self.settle(network, prefix);
        }
        self.mark(Dirty::Change);
        Ok(Answer::Done)
    }

    fn add_route(&mut self, spec: RouteSpec) -> Applied {
        let network = self.desired.network(Some(&spec.network))?;
        if network.spec.mode != NetworkMode::Routed {
            return Err(invalid(format!(
                "network \"{}\" is bridged and has no routes: add a station with `switchctl fdb add`",
                spec.network
            )));
        }
        check_prefix("prefix", &spec.prefix)?;
        if let Some(range) = network.spec.ranges.iter().find(|range| range.contains(&spec.prefix)) {
            return Err(conflict(format!("route {} overlaps this node's own range {range}", spec.prefix)));
        }
        if self.desired.addresses(network.index).iter().any(|&address| IpNet::from(address) == spec.prefix) {
            return Err(conflict(format!("{} is the address of a port of this node", spec.prefix.addr())));
        }
        self.desired.peer(&spec.peer)?;
        let key = (network.index, spec.prefix);
        if let Some(route) = self.desired.routes.get(&key) {
            return Err(conflict(format!(
                "route {} leads to peer \"{}\" already: remove it first",
                spec.prefix, route.peer
            )));
        }
        let is_configured = self.desired.is_configuring;
        self.desired.routes.insert(key, RouteEntry { peer: spec.peer, is_configured });
        self.settle(key.0, key.1);
        self.mark(Dirty::Change);
        Ok(Answer::Done)
    }

    fn remove_route(&mut self, network: &str, prefix: IpNet) -> Applied {
        let index = self.desired.network(Some(network))?.index;
        if self.desired.routes.remove(&(index, prefix)).is_none() {
            return Err(not_found(format!(
                "no route {prefix} to a peer: `switchctl route list --network {network}` shows them"
            )));
        }
        self.settle(index, prefix);
        self.mark(Dirty::Change);
        Ok(Answer::Done)
    }

    fn add_station(&mut self, spec: FdbSpec) -> Applied {
        let network = self.desired.network(Some(&spec.network))?;
        if network.spec.mode != NetworkMode::Bridged {
            return Err(invalid(format!(
                "network \"{}\" is routed and has no stations: add a route with `switchctl route add`",
                spec.network
            )));
        }
        check_mac("mac", spec.mac)?;
        let index = network.index;
        if self.desired.is_static(index, spec.mac) {
            return Err(conflict(format!("{} is a static station or a port's own already", spec.mac)));
        }
        let location = self.locate(&spec.at).ok_or_else(|| not_found(format!("no {}", spec.at)))?;
        if let Location::Port(port) = location
            && self.desired.ports.get(&port).is_none_or(|entry| !self.desired.is_in(entry, index))
        {
            return Err(invalid(format!("{} is not in network \"{}\"", spec.at, spec.network)));
        }
        for &address in &spec.addresses {
            check_unicast("addresses", address)?;
        }
        let suppresses = network.spec.neighbor_suppression;
        self.learned.forget(index, spec.mac);
        self.tables.fdb.insert(index, spec.mac, location);
        for &address in spec.addresses.iter().filter(|_| suppresses) {
            self.tables.neighbors.insert(index, address, spec.mac);
        }
        let is_configured = self.desired.is_configuring;
        let FdbSpec { mac, at, addresses, .. } = spec;
        self.desired.stations.insert((index, mac), StationEntry { at, addresses, is_configured });
        self.mark(Dirty::Change);
        Ok(Answer::Done)
    }

    fn remove_station(&mut self, network: &str, mac: MacAddr) -> Applied {
        let index = self.desired.network(Some(network))?.index;
        let entry = self.desired.stations.remove(&(index, mac));
        for &address in entry.iter().flat_map(|entry| &entry.addresses) {
            self.tables.neighbors.remove(index, address);
        }
        let was_static = entry.is_some();
        if !self.learned.forget(index, mac) && !was_static {
            return Err(not_found(format!(
                "no station {mac} to remove: `switchctl fdb list --network {network}` shows them"
            )));
        }
        self.tables.fdb.remove(index, mac);
        self.mark(Dirty::Change);
        Ok(Answer::Done)
    }

    fn add_port(&mut self, mut spec: PortSpec, backend: &mut dyn Backend) -> Applied {
        let network = self.desired.network(spec.network.as_deref())?.clone();
        self.check_port(&spec, &network)?;
        let allocated = self.allocate(&mut spec, &network)?;
        let id = self.desired.free_port().ok_or_else(|| exhausted("all 65534 port numbers are in use"))?;
        spec.network = Some(network.spec.name.clone());
        let mtu = spec.mtu.unwrap_or(POD_LINK_MTU);
        self.insert_port(PortRecord { id, spec, mtu }, &network, backend)?;
        for (range, address) in allocated {
            self.desired.cursors.insert((network.spec.name.clone(), range), ipam::number(address));
        }
        self.port_info(id).map(|info| Answer::Port(Box::new(info)))
    }

    /// Everything that can be wrong with a port.
    pub(crate) fn check_port(&self, spec: &PortSpec, network: &NetworkEntry) -> Result<(), ApiError> {
        check_mac("mac", spec.mac)?;
        if self.desired.port_of_link(&spec.link).is_some() {
            return Err(conflict(format!("link {} is plugged in already: `switchctl port list` shows it", spec.link)));
        }
        if self.underlay.is_uplink(&spec.link) {
            return Err(conflict(format!("link {} is the uplink: name a pod's link", spec.link)));
        }
        self.check_port_options(spec, network)?;
        let own = routers(&network.spec);
        if let Some(attachment) = &spec.attachment
            && let Some(other) =
                self.desired.ports.values().find(|port| port.record.spec.attachment.as_ref() == Some(attachment))
        {
            return Err(conflict(format!(
                "interface {} of container {} is plugged in already, by link {}",
                attachment.ifname, attachment.container_id, other.record.spec.link
            )));
        }
        let others =
            || self.desired.ports.values().filter(|port| port.network == network.index).map(|port| &port.record.spec);
        if let Some(other) = others().find(|other| other.mac == spec.mac) {
            return Err(conflict(format!("mac {} belongs to the port of link {} already", spec.mac, other.link)));
        }
        for &address in &spec.addresses {
            check_unicast("ips", address)?;
            if own.contains(&address) {
                return Err(conflict(format!(
                    "address {address} is this node's own in network \"{}\": choose another one, or set `router`",
                    network.spec.name
                )));
            }
            if let Some(other) = others().find(|other| other.addresses.contains(&address)) {
                return Err(conflict(format!("address {address} belongs to the port of link {} already", other.link)));
            }
            if let Some(route) = self.desired.routes.get(&(network.index, IpNet::from(address))) {
                return Err(conflict(format!(
                    "address {address} is routed to peer \"{}\": remove the route first",
                    route.peer
                )));
            }
            let subnets = &network.spec.subnets;
            if network.spec.mode == NetworkMode::Bridged && subnets.is_empty() && network.spec.ranges.is_empty() {
                return Err(invalid(format!(
                    "network \"{}\" is bridged and has no subnets: set them, for they say what is on a pod's link",
                    network.spec.name
                )));
            }
            if !subnets.is_empty() && !subnets.iter().any(|subnet| subnet.contains(&address)) {
                return Err(invalid(format!(
                    "ips: {address} lies in none of the subnets of network \"{}\" ({})",
                    network.spec.name,
                    list(subnets)
                )));
            }
        }
        match spec.mtu {
            Some(mtu) if !(POD_LINK_MTU_MIN..=POD_LINK_MTU).contains(&mtu) => {
                Err(invalid(format!("mtu: {mtu} is not allowed; allowed are {POD_LINK_MTU_MIN} to {POD_LINK_MTU}")))
            }
            _ => Ok(()),
        }
    }

    /// VLANs, rates and mapped ports.
    fn check_port_options(&self, spec: &PortSpec, network: &NetworkEntry) -> Result<(), ApiError> {
        if (!spec.trunk.is_empty() || !spec.native) && network.spec.mode != NetworkMode::Bridged {
            return Err(invalid(format!("trunk: network \"{}\" is routed, and a trunk is not", network.spec.name)));
        }
        if network.spec.mode == NetworkMode::Routed && (spec.sticky || spec.mac_limit.is_some()) {
            return Err(invalid("sticky and mac_limit are for ports of bridged networks: a routed one learns nothing"));
        }
        if spec.trunk.is_empty() && !spec.native {
            return Err(invalid("native: a port that carries no VLAN and nothing without a tag carries nothing"));
        }
        for &vid in &spec.trunk {
            let of_vid = self.desired.networks.values().find(|network| network.spec.vlan == Some(vid));
            let Some(of_vid) = of_vid else {
                return Err(not_found(format!(
                    "no network has vlan {vid}: set `vlan` of one (`switchctl network list` shows them)"
                )));
            };
            if of_vid.spec.mode != NetworkMode::Bridged {
                return Err(invalid(format!("vlan {vid} is network \"{}\", which is routed", of_vid.spec.name)));
            }
            if of_vid.index == network.index && spec.native {
                return Err(invalid(format!(
                    "vlan {vid} is network \"{}\", which is carried without a tag: leave it out of the trunk, or set native to false",
                    of_vid.spec.name
                )));
            }
        }
        self.check_mappings(spec, network)
    }

    /// Attaches a checked port and puts it into the tables.
    pub(crate) fn insert_port(
        &mut self,
        record: PortRecord,
        network: &NetworkEntry,
        backend: &mut dyn Backend,
    ) -> Result<(), ApiError> {
        let attached =
            backend.attach(record.id, &record.spec.link).map_err(|error| ApiError::new(ErrorCode::System, error))?;
        let (id, mac) = (record.id, record.spec.mac);
        match network.spec.mode {
            NetworkMode::Routed => {
                for &address in &record.spec.addresses {
                    self.desired.by_address.insert((network.index, address), id);
                }
            }
            NetworkMode::Bridged => {
                self.learned.forget(network.index, mac);
                self.tables.fdb.insert(network.index, mac, Location::Port(id));
                for &address in record.spec.addresses.iter().filter(|_| network.spec.neighbor_suppression) {
                    self.tables.neighbors.insert(network.index, address, mac);
                }
                self.announce(network.index, id, mac, &record.spec.addresses);
            }
        }
        let addresses = record.spec.addresses.clone();
        let limits = limits_of(&record.spec.bandwidth);
        let storm = Control::storm_of(network).map(Arc::new);
        self.desired.ports.insert(id, PortEntry { network: network.index, record, attached, limits, storm });
        for address in addresses {
            self.settle(network.index, address.into());
        }
        self.mark(Dirty::Change);
        Ok(())
    }

    /// One free address of each family that the network has ranges for, unless addresses were asked for.
    fn allocate(&self, spec: &mut PortSpec, network: &NetworkEntry) -> Result<Vec<(IpNet, IpAddr)>, ApiError> {
        if !spec.addresses.is_empty() {
            return Ok(Vec::new());
        }
        let mut used = self.desired.addresses(network.index);
        used.extend(network.spec.gateway_v4.map(IpAddr::from));
        used.extend(network.spec.gateway_v6.map(IpAddr::from));
        let mut allocated = Vec::new();
        for is_v6 in [false, true] {
            let ranges: Vec<&IpNet> =
                network.spec.ranges.iter().filter(|range| range.addr().is_ipv6() == is_v6).collect();
            if ranges.is_empty() {
                continue;
            }
            let found = ranges.iter().find_map(|&range| {
                let cursor = self.desired.cursors.get(&(network.spec.name.clone(), *range)).copied();
                Some((*range, ipam::allocate(range, cursor, &used)?))
            });
            let (range, address) = found.ok_or_else(|| {
                exhausted(format!(
                    "no free address in {} of network \"{}\": remove ports or add a range",
                    list(&network.spec.ranges),
                    network.spec.name
                ))
            })?;
            spec.addresses.push(address);
            allocated.push((range, address));
        }
        if network.spec.mode == NetworkMode::Routed && spec.addresses.is_empty() {
            return Err(invalid(format!(
                "network \"{}\" has no ranges to take an address from: set `ranges`, or give the port `ips`",
                network.spec.name
            )));
        }
        Ok(allocated)
    }

    fn remove_ports(&mut self, backend: &mut dyn Backend, goes: impl Fn(&PortRecord) -> bool) -> Answer {
        let ids: Vec<PortId> =
            self.desired.ports.iter().filter(|(_, port)| goes(&port.record)).map(|(&id, _)| id).collect();
        let ports = ids.iter().filter_map(|&id| self.port_info(id).ok()).collect();
        for id in ids {
            self.remove_port(id, backend);
        }
        self.desired.waiting.retain(|record| !goes(record));
        Answer::Ports { ports }
    }

    fn remove_port(&mut self, id: PortId, backend: &mut dyn Backend) {
        let Some(port) = self.desired.ports.remove(&id) else { return };
        backend.detach(id);
        for &address in &port.record.spec.addresses {
            self.desired.by_address.remove(&(port.network, address));
            self.tables.neighbors.remove(port.network, address);
            self.settle(port.network, address.into());
        }
        self.tables.fdb.remove(port.network, port.record.spec.mac);
        self.desired.refused.remove(&id);
        let link = &port.record.spec.link;
        self.desired.mirrors.retain(|_, mirror| {
            mirror.ports.retain(|other| other != link);
            !mirror.ports.is_empty() && mirror.to != FdbTarget::Port(link.clone())
        });
        let groups = self.groups.forget_location(Location::Port(id));
        self.set_groups(groups);
        let mut stations = self.learned.forget_location(Location::Port(id));
        let at = FdbTarget::Port(port.record.spec.link);
        self.desired.stations.retain(|&station, entry| {
            if entry.at == at {
                entry.addresses.iter().for_each(|&address| self.tables.neighbors.remove(station.0, address));
                stations.push(station);
            }
            entry.at != at
        });
        self.forget_stations(stations);
        self.mark(Dirty::Change);
    }
}

/// The rates of a port as the data path holds them; its buckets live as long as the port.
fn limits_of(bandwidth: &Bandwidth) -> Option<Arc<Limits>> {
    // A burst of nothing is not meant: a tenth of a second's worth, and a large packet at least.
    let bucket = |rate: u64, burst: u64| {
        let burst = if burst == 0 { (rate / 10).max(u64::from(POD_LINK_MTU) * 8) } else { burst };
        (rate > 0).then(|| Bucket::new(rate, burst))
    };
    (!bandwidth.is_unlimited()).then(|| {
        Arc::new(Limits {
            from: bucket(bandwidth.egress_rate, bandwidth.egress_burst),
            to: bucket(bandwidth.ingress_rate, bandwidth.ingress_burst),
        })
    })
}

/// True for a port that a CNI network owns and no container uses any more.
fn is_stale(port: &PortSpec, owner: &str, valid: &[Attachment]) -> bool {
    port.owner.as_deref() == Some(owner)
        && port.attachment.as_ref().is_none_or(|attachment| !valid.contains(attachment))
}

pub(crate) fn full_length(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

pub(crate) fn check_name(what: &str, name: &str) -> Result<(), ApiError> {
    let is_good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > 63 || !name.chars().all(is_good) {
        return Err(invalid(format!("\"{name}\" is no name for a {what}: 1 to 63 letters, digits, '-', '_' or '.'")));
    }
    Ok(())
}

fn check_mac(key: &str, mac: MacAddr) -> Result<(), ApiError> {
    if mac.is_multicast() || mac.is_zero() {
        return Err(invalid(format!(
            "{key}: {mac} is no station's address: choose a unicast one, as 02:00:00:00:00:01"
        )));
    }
    Ok(())
}

fn check_unicast(key: &str, address: IpAddr) -> Result<(), ApiError> {
    let is_wrong = address.is_unspecified()
        || address.is_multicast()
        || address.is_loopback()
        || match address {
            IpAddr::V4(v4) => v4.is_broadcast() || v4.is_link_local(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
    if is_wrong {
        return Err(invalid(format!(
            "{key}: {address} is not allowed; allowed are unicast addresses that are routable"
        )));
    }
    Ok(())
}

fn check_prefix(key: &str, prefix: &IpNet) -> Result<(), ApiError> {
    if prefix.addr() != prefix.network() {
        return Err(invalid(format!("{key}: {prefix} has bits set after its length: write {}", prefix.trunc())));
    }
    Ok(())
}

fn check_prefixes(key: &str, prefixes: &[IpNet]) -> Result<(), ApiError> {
    for (at, prefix) in prefixes.iter().enumerate() {
        check_prefix(key, prefix)?;
        if let Some(other) = prefixes[..at].iter().find(|other| other.contains(prefix) || prefix.contains(*other)) {
            return Err(invalid(format!("{key}: {prefix} and {other} overlap: keep one of them")));
        }
    }
    Ok(())
}

fn list(prefixes: &[IpNet]) -> String {
    prefixes.iter().map(IpNet::to_string).collect::<Vec<_>>().join(", ")
}

pub(crate) fn invalid(message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorCode::Invalid, message)
}

pub(crate) fn conflict(message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorCode::Conflict, message)
}

fn exhausted(message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorCode::Exhausted, message)
}
