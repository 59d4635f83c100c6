//! Requests that change something: every check first, then the change.

use ipnet::IpNet;
use vswitch_api::{
    Answer, ApiError, Encap, ErrorCode, FdbSpec, FdbTarget, NetworkMode, NetworkSpec, PeerSpec, Request, RouteSpec,
};
use vswitch_dataplane::Location;
use vswitch_net::{MacAddr, NetworkIndex, POD_LINK_MTU, POD_LINK_MTU_MIN, PeerIndex};

use crate::backend::Backend;
use crate::checks::{check_mac, check_name, check_prefix, check_prefixes, check_unicast, conflict, exhausted, invalid};
use crate::desired::{NetworkEntry, PeerEntry, RouteEntry, StationEntry, not_found};
use crate::ports::is_stale;
use crate::routes::routers;
use crate::{Control, Dirty};

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
            Request::ServiceSet { services } => self.set_services(services),
            Request::ServiceDel { names } => self.remove_services(&names),
            Request::EgressSet(spec) => self.set_egress(spec),
            Request::EgressDel { name } => self.remove_egress(&name),
            Request::PolicyApply { documents, dry_run } => self.apply_policies(&documents, dry_run, backend),
            Request::PolicyDelete { objects } => self.delete_policies(&objects, backend),
            Request::EndpointSet { endpoints } => self.set_endpoints(endpoints),
            Request::EndpointDel { endpoints } => self.delete_endpoints(&endpoints),
            Request::ConnectionDel { filter } => self.connection_del(&filter, backend),
            Request::RxqMove { moves } => self.move_queues(&moves, backend),
            Request::RxqRebalance { loads, .. } => self.rebalance(&loads, true, backend),
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
        for (key, prefixes) in [("subnets", &spec.subnets), ("ranges", &spec.ranges), ("services", &spec.services)] {
            check_prefixes(key, prefixes)?;
        }
        let pods = || spec.subnets.iter().chain(&spec.ranges);
        let is_pods = |prefix: &&IpNet| pods().any(|pods| pods.contains(*prefix) || prefix.contains(pods));
        if let Some(prefix) = spec.services.iter().find(is_pods) {
            return Err(invalid(format!("services: {prefix} overlaps the pods' addresses: choose another one")));
        }
        if let Some(mtu) = spec.subnet_mtu {
            if spec.mode != NetworkMode::Routed || spec.subnets.is_empty() {
                return Err(invalid(
                    "subnet_mtu is for routed networks with subnets: it is the MTU of routes to these",
                ));
            }
            if !(POD_LINK_MTU_MIN..=POD_LINK_MTU).contains(&mtu) {
                return Err(invalid(format!(
                    "subnet_mtu: {mtu} is not allowed; allowed are {POD_LINK_MTU_MIN} to {POD_LINK_MTU}"
                )));
            }
        }
        if spec.mode != NetworkMode::Routed && !spec.services.is_empty() {
            return Err(invalid("services are for routed networks: in a bridged one nobody is asked for a way"));
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
        self.policy.look_for_networks(self.desired.index_of_name());
        self.settle_host_addresses();
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
        if !spec.learning && (is_routed || spec.multicast_snooping || spec.follow.is_some()) {
            return Err(invalid(
                "learning = false is for bridged networks that neither snoop nor follow a device: all goes to all there",
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
        let is_without_router = |range: &&IpNet| {
            is_routed && !routers(spec).iter().any(|router| router.is_ipv4() == range.addr().is_ipv4())
        };
        if let Some(range) = spec.ranges.iter().find(is_without_router).filter(|_| self.is_host_network(spec)) {
            return Err(invalid(format!(
                "ranges: {range} is too small to have an address of this node in it: set `router`"
            )));
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
        if let Some(what) = self.translations_of(index) {
            return Err(conflict(format!("{what} is of network \"{name}\": remove it first")));
        }
        let routes: Vec<IpNet> =
            self.desired.routes.keys().filter(|(network, _)| *network == index).map(|&(_, prefix)| prefix).collect();
        for prefix in routes {
            self.desired.routes.remove(&(index, prefix));
            self.settle(index, prefix);
        }
        let groups = self.groups.forget_network(index);
        self.set_groups(groups);
        let stations = self.learned.forget_network(index);
        self.settle_stations(stations);
        self.remove_stations(|network, _| network == index);
        if let Some(entry) = self.desired.networks.remove(name) {
            self.unsettle_network(&entry);
        }
        self.policy.look_for_networks(self.desired.index_of_name());
        self.mark(Dirty::Change);
        Ok(Answer::Done)
    }

    fn add_peer(&mut self, spec: PeerSpec) -> Applied {
        check_name("peer", &spec.name)?;
        if self.desired.peers.contains_key(&spec.name) {
            return Err(conflict(format!("peer \"{}\" exists: remove it first, or choose another name", spec.name)));
        }
        if spec.other_vtep.is_some_and(|other| other.is_ipv4() == spec.vtep.is_ipv4()) {
            return Err(invalid("other_vtep: it must be of the other family than vtep"));
        }
        for vtep in spec.vteps() {
            check_unicast("vtep", vtep)?;
            let owner = self.desired.by_vtep.get(&vtep).and_then(|&index| self.desired.peer_of(index));
            if let Some(other) = owner.filter(|other| !other.is_imported) {
                return Err(conflict(format!("vtep {vtep} belongs to peer \"{}\" already", other.spec.name)));
            }
            if self.underlay.is_ours(vtep) {
                return Err(invalid(format!("vtep {vtep} is this node's own: name another node's")));
            }
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
        let index = self.desired.free_peer().ok_or_else(|| exhausted("there are 65535 peers already"))?;
        let vteps: Vec<_> = spec.vteps().collect();
        for vtep in &vteps {
            // Known from the kernel's tables so far; what goes by it now goes by the one that was asked for.
            if let Some(&known) = self.desired.by_vtep.get(vtep) {
                self.forget_peer(known);
            }
        }
        let is_configured = self.desired.is_configuring;
        self.desired.insert_peer(PeerEntry { index, spec, is_configured, is_imported: false });
        self.settle_vteps(&vteps);
        self.mark(Dirty::Change);
        Ok(Answer::Done)
    }

    fn remove_peer(&mut self, name: &str) -> Applied {
        let (index, spec) = self.desired.peer(name).map(|peer| (peer.index, peer.spec.clone()))?;
        if self.desired.peers.get(name).is_some_and(|peer| peer.is_imported) {
            return Err(conflict(format!(
                "peer \"{name}\" is known from the kernel's tables and goes with them: remove what leads to {}",
                spec.vtep
            )));
        }
        if let Some(mirror) = self.desired.mirrors.values().find(|mirror| mirror.to == FdbTarget::Peer(name.to_owned()))
        {
            return Err(conflict(format!("mirror \"{}\" goes to peer \"{name}\": remove it first", mirror.name)));
        }
        let routes: Vec<(NetworkIndex, IpNet)> =
            self.desired.routes.iter().filter(|(_, route)| route.peer == name).map(|(&key, _)| key).collect();
        for (network, prefix) in routes {
            self.desired.routes.remove(&(network, prefix));
            self.settle(network, prefix);
        }
        self.remove_stations(|_, entry| entry.at == FdbTarget::Peer(name.to_owned()));
        self.forget_peer(index);
        let vteps: Vec<_> = spec.vteps().collect();
        // What the kernel's tables still lead there goes on by a peer of its own.
        self.settle_vteps(&vteps);
        for vtep in vteps {
            if !self.desired.by_vtep.contains_key(&vtep) {
                self.underlay.next_hops.remove(&vtep);
            }
        }
        self.mark(Dirty::Change);
        Ok(Answer::Done)
    }

    /// Takes a peer away, with what was heard from it.
    pub(crate) fn forget_peer(&mut self, index: PeerIndex) {
        let groups = self.groups.forget_location(Location::Peer(index));
        self.set_groups(groups);
        let stations = self.learned.forget_location(Location::Peer(index));
        self.settle_stations(stations);
        let name = self.desired.peer_name(index);
        self.desired.remove_peer(&name);
    }

    /// Takes stations away that were asked for.
    pub(crate) fn remove_stations(&mut self, goes: impl Fn(NetworkIndex, &StationEntry) -> bool) {
        let gone: Vec<_> = self
            .desired
            .stations
            .iter()
            .filter(|((network, _), entry)| goes(*network, entry))
            .map(|(&key, _)| key)
            .collect();
        for (network, mac) in gone {
            self.forget_station(network, mac);
        }
    }

    fn forget_station(&mut self, network: NetworkIndex, mac: MacAddr) -> bool {
        let entry = self.desired.stations.remove(&(network, mac));
        for &address in entry.iter().flat_map(|entry| &entry.addresses) {
            self.settle_neighbor(network, address);
        }
        self.settle_station(network, mac);
        entry.is_some()
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
        self.desired.own_peer(&spec.peer)?;
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
        if self.desired.imported.contains_key(&(index, prefix)) && !self.desired.routes.contains_key(&(index, prefix)) {
            return Err(conflict(format!("route {prefix} comes from the kernel's table: `ip route del {prefix}`")));
        }
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
        let location = self
            .locate(&spec.at)
            .ok_or_else(|| not_found(format!("no {}: `switchctl peer list` and `port list` show them", spec.at)))?;
        if let Location::Port(port) = location
            && self.desired.ports.get(&port).is_none_or(|entry| !self.desired.is_in(entry, index))
        {
            return Err(invalid(format!("{} is not in network \"{}\"", spec.at, spec.network)));
        }
        for &address in &spec.addresses {
            check_unicast("addresses", address)?;
        }
        if let FdbTarget::Peer(name) = &spec.at {
            self.desired.own_peer(name)?;
        }
        self.learned.forget(index, spec.mac);
        self.desired.forget_waiting_station(&spec.network, spec.mac);
        let is_configured = self.desired.is_configuring;
        let FdbSpec { mac, at, addresses, .. } = spec;
        let entry = StationEntry { at, addresses: addresses.clone(), is_configured };
        self.desired.stations.insert((index, mac), entry);
        self.settle_station(index, mac);
        addresses.into_iter().for_each(|address| self.settle_neighbor(index, address));
        self.mark(Dirty::Change);
        Ok(Answer::Done)
    }

    fn remove_station(&mut self, network: &str, mac: MacAddr) -> Applied {
        let index = self.desired.network(Some(network))?.index;
        let was_learned = self.learned.forget(index, mac);
        let waited = self.desired.forget_waiting_station(network, mac);
        if !self.forget_station(index, mac) && !was_learned && !waited {
            return Err(not_found(format!(
                "no station {mac} to remove: `switchctl fdb list --network {network}` shows them"
            )));
        }
        self.mark(Dirty::Change);
        Ok(Answer::Done)
    }
}
