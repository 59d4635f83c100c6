//! Ports: checked, attached, put into the tables, and taken out again.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use vswitch_api::{Answer, ApiError, Attachment, Bandwidth, ErrorCode, FdbTarget, NetworkMode, PortSpec};
use vswitch_dataplane::connection::Entry;
use vswitch_dataplane::{Bucket, Limits, Location, Translation};
use vswitch_net::{POD_LINK_MTU, POD_LINK_MTU_MIN, PortId};

use crate::backend::Backend;
use crate::checks::{check_mac, check_unicast, conflict, exhausted, invalid, list};
use crate::desired::{NetworkEntry, PortEntry, not_found};
use crate::policy::{is_of_runtime, port_name};
use crate::routes::routers;
use crate::state::{PortRecord, Waiting};
use crate::{Control, Dirty, ipam};

impl Control {
    pub(crate) fn add_port(&mut self, mut spec: PortSpec, backend: &mut dyn Backend) -> Result<Answer, ApiError> {
        let network = self.desired.network(spec.network.as_deref())?.clone();
        self.check_port(&spec, &network)?;
        self.check_pod(&spec)?;
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

    /// A new pod's labels must be known, where that is wanted. One that was here before stays.
    fn check_pod(&self, spec: &PortSpec) -> Result<(), ApiError> {
        let pod = port_name(spec);
        if self.config.requires_endpoints && is_of_runtime(spec) && !self.policy.knows(&pod) {
            return Err(ApiError::new(
                ErrorCode::Unavailable,
                format!(
                    "pod {pod} is not known yet: tell of its labels first (`switchctl endpoint set {pod}`, or a Pod object)"
                ),
            ));
        }
        Ok(())
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
            if self.translated_addresses(network.index).contains(&address) {
                return Err(conflict(format!(
                    "address {address} is a service's or an egress rule's: `switchctl service list` and `egress list`"
                )));
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
                if record.spec.trunk.is_empty() {
                    backend.let_rest(id);
                }
                for &address in &record.spec.addresses {
                    self.desired.by_address.insert((network.index, address), id);
                }
            }
            NetworkMode::Bridged => {
                self.learned.forget(network.index, mac);
                self.announce(network.index, id, mac, &record.spec.addresses);
            }
        }
        let addresses = record.spec.addresses.clone();
        let limits = limits_of(&record.spec.bandwidth);
        let storms = self.storms_of(&record.spec, network);
        self.policy.add_port(id, network.index, &record.spec);
        self.desired.ports.insert(id, PortEntry { network: network.index, record, attached, limits, storms });
        self.settle_station(network.index, mac);
        for address in addresses {
            self.settle(network.index, address.into());
            self.settle_neighbor(network.index, address);
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

    pub(crate) fn remove_ports(&mut self, backend: &mut dyn Backend, goes: impl Fn(&PortRecord) -> bool) -> Answer {
        let ids: Vec<PortId> =
            self.desired.ports.iter().filter(|(_, port)| goes(&port.record)).map(|(&id, _)| id).collect();
        let ports = ids.iter().filter_map(|&id| self.port_info(id).ok());
        let ports = ports.chain(self.waiting_infos(&goes)).collect();
        for id in ids {
            self.remove_port(id, backend);
        }
        self.forget_waiting(|record| goes(record));
        Answer::Ports { ports }
    }

    /// Forgets ports that wait to be adopted. Their links' names may come again, and be others' then.
    pub(crate) fn forget_waiting(&mut self, goes: impl Fn(&PortRecord) -> bool) {
        let goes = |waiting: &Waiting| goes(&waiting.record);
        let (gone, kept): (Vec<_>, Vec<_>) = std::mem::take(&mut self.desired.waiting).into_iter().partition(goes);
        self.desired.waiting = kept;
        gone.iter().for_each(|waiting| self.desired.forget_link(&waiting.record.spec.link));
    }

    fn remove_port(&mut self, id: PortId, backend: &mut dyn Backend) {
        let Some(port) = self.desired.ports.remove(&id) else { return };
        backend.detach(id);
        self.policy.remove_port(id);
        // Whoever gets its addresses next has not begun its connections.
        let (network, addresses) = (port.network, &port.record.spec.addresses);
        if backend.connections().config().keeps_established {
            let is_its = |entry: &Entry, leaves_as: Option<&Translation>| {
                let mut ends = entry.all_ends(leaves_as);
                entry.key.network == network && ends.any(|(address, _)| addresses.contains(&address))
            };
            backend.connections().forget(is_its);
        }
        for &address in &port.record.spec.addresses {
            self.desired.by_address.remove(&(port.network, address));
            self.settle(port.network, address.into());
            self.settle_neighbor(port.network, address);
        }
        self.desired.refused.remove(&id);
        let link = &port.record.spec.link;
        self.desired.forget_link(link);
        let groups = self.groups.forget_location(Location::Port(id));
        self.set_groups(groups);
        let mut stations = self.learned.forget_location(Location::Port(id));
        stations.push((port.network, port.record.spec.mac));
        self.settle_stations(stations);
        self.remove_stations(|_, entry| entry.at == FdbTarget::Port(port.record.spec.link.clone()));
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
pub(crate) fn is_stale(port: &PortSpec, owner: &str, valid: &[Attachment]) -> bool {
    port.owner.as_deref() == Some(owner)
        && port.attachment.as_ref().is_none_or(|attachment| !valid.contains(attachment))
}
