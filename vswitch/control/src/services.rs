//! Requests about services.
//!
//! What is said is for connections that begin; those that there are keep what they have ([`crate::translations`] has the
//! exceptions).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;

use vswitch_api::{Affinity, Answer, ApiError, BackendInfo, Protocol, ServiceInfo, ServiceSpec};
use vswitch_dataplane::table::service::{Backends, Front};
use vswitch_net::NetworkIndex;

use crate::backend::Backend;
use crate::checks::{check_unicast, conflict, invalid, list};
use crate::desired::not_found;
use crate::translations::{UDP, live};
use crate::{Control, Dirty};

/// Longest name of a service: a namespace, a service and a port of Kubernetes.
const LONGEST_NAME: usize = 253;

/// A service as it was asked for.
#[derive(Clone, Debug)]
pub(crate) struct ServiceEntry {
    pub(crate) spec: ServiceSpec,
    pub(crate) front: Front,
    pub(crate) is_configured: bool,
}

impl Control {
    pub(crate) fn set_services(&mut self, services: Vec<ServiceSpec>) -> Result<Answer, ApiError> {
        let is_configured = self.desired.is_configuring;
        let mut entries = Vec::with_capacity(services.len());
        for spec in services {
            let name = spec.name.clone();
            let front = self.check_service(&spec).map_err(|error| {
                ApiError::new(error.code, format!("service \"{}\": {}", name.escape_default(), error.message))
            })?;
            entries.push(ServiceEntry { spec, front, is_configured });
        }
        let names: BTreeSet<&str> = entries.iter().map(|entry| entry.spec.name.as_str()).collect();
        if names.len() < entries.len() {
            return Err(invalid("services: two of one name: name each once"));
        }
        let kept = self.desired.services.values().filter(|entry| !names.contains(entry.spec.name.as_str()));
        let mut fronts: BTreeSet<Front> = kept.map(|entry| entry.front).collect();
        for ServiceEntry { spec, front, .. } in &entries {
            if !fronts.insert(*front) {
                let (at, protocol) = (SocketAddr::new(front.address, front.port), spec.protocol.name());
                return Err(conflict(format!(
                    "service \"{}\": {at} ({protocol}) is another service's: `switchctl service list` shows whose",
                    spec.name
                )));
            }
        }
        for ServiceEntry { spec, front, .. } in &entries {
            let is_service = |backend: &&SocketAddr| {
                fronts.contains(&Front { address: backend.ip(), port: backend.port(), ..*front })
            };
            if let Some(backend) = spec.backends.iter().find(is_service) {
                return Err(invalid(format!(
                    "service \"{}\": backends: {backend} is a service itself: name who answers for it",
                    spec.name
                )));
            }
        }
        let before = self.translated();
        for entry in &entries {
            if let Some(before) = self.desired.services.get(&entry.spec.name).map(|before| before.front) {
                self.remove_front(&before);
            }
        }
        for entry in entries {
            let has_affinity = entry.spec.affinity == Affinity::ClientIp;
            let ends = entry.spec.backends.iter().map(|backend| (backend.ip(), backend.port())).collect();
            self.tables.services.insert(entry.front, Backends { ends, has_affinity });
            self.unsettled.fronts.insert(entry.front);
            self.desired.parked_services.retain(|parked| parked.name != entry.spec.name);
            self.desired.services.insert(entry.spec.name.clone(), entry);
        }
        self.drain_since(&before);
        self.mark(Dirty::Change);
        Ok(Answer::Done)
    }

    fn remove_front(&mut self, front: &Front) {
        self.tables.services.remove(front);
        self.unsettled.fronts.insert(*front);
    }

    fn check_service(&self, spec: &ServiceSpec) -> Result<Front, ApiError> {
        let is_good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/' | ':');
        if spec.name.is_empty() || spec.name.len() > LONGEST_NAME || !spec.name.chars().all(is_good) {
            return Err(invalid(format!(
                "it is no name for a service: 1 to {LONGEST_NAME} letters, digits, '-', '_', '.', '/' or ':'"
            )));
        }
        let network = self.routed(spec.network.as_deref())?;
        let ServiceSpec { address, port, .. } = *spec;
        check_unicast("address", address)?;
        if let Some(prefix) = network.spec.subnets.iter().chain(&network.spec.ranges).find(|own| own.contains(&address))
        {
            return Err(invalid(format!(
                "address: {address} lies in {prefix}, where pods have their addresses: choose one outside"
            )));
        }
        let services = &network.spec.services;
        if !services.is_empty() && !services.iter().any(|prefix| prefix.contains(&address)) {
            return Err(invalid(format!(
                "address: {address} lies in none of the network's `services` ({}): choose one inside, or extend them",
                list(services)
            )));
        }
        self.check_nobodys("address", network, address)?;
        if self.egress_addresses(network.index).any(|egress| egress == address) {
            return Err(conflict(format!("address: {address} is an egress rule's: `switchctl egress list`")));
        }
        if port == 0 {
            return Err(invalid("port: 0 is no port; allowed are 1 to 65535"));
        }
        for (at, backend) in spec.backends.iter().enumerate() {
            check_unicast("backends", backend.ip())?;
            if backend.port() == 0 {
                return Err(invalid(format!("backends: {backend}: 0 is no port; allowed are 1 to 65535")));
            }
            if backend.is_ipv4() != address.is_ipv4() {
                return Err(invalid(format!(
                    "backends: {backend} is of another family than {address}: make a service of each family"
                )));
            }
            if spec.backends[..at].contains(backend) {
                return Err(invalid(format!("backends: {backend} is there twice")));
            }
            if backend.ip() == address {
                return Err(invalid(format!("backends: {backend} is the service's own address")));
            }
            if spec.protocol == Protocol::Udp && backend.port() == self.underlay.udp_port {
                return Err(invalid(format!(
                    "backends: {backend}: UDP port {} is VXLAN's, which no pod sends",
                    backend.port()
                )));
            }
        }
        Ok(Front { network: network.index, address, port, protocol: number(spec.protocol) })
    }

    pub(crate) fn remove_services(&mut self, names: &[String]) -> Result<Answer, ApiError> {
        let is_parked = |name: &str| self.desired.parked_services.iter().any(|parked| parked.name == name);
        let is_known = |name: &&String| self.desired.services.contains_key(*name) || is_parked(name);
        if let Some(missing) = names.iter().find(|name| !is_known(name)) {
            let missing = missing.escape_default();
            return Err(not_found(format!("no service \"{missing}\": `switchctl service list` shows them")));
        }
        let before = self.translated();
        for name in names {
            self.desired.parked_services.retain(|parked| parked.name != *name);
            if let Some(entry) = self.desired.services.remove(name) {
                self.remove_front(&entry.front);
            }
        }
        self.drain_since(&before);
        self.mark(Dirty::Change);
        Ok(Answer::Done)
    }

    pub(crate) fn service_list(&self, now_ns: u64, backend: &mut dyn Backend) -> Answer {
        // Connections by front and backend.
        let mut counts: HashMap<Front, BTreeMap<SocketAddr, usize>> = HashMap::new();
        live(now_ns, backend, |entry, ends, leaves_as| {
            let (network, protocol) = (entry.key.network, entry.key.protocol);
            let front = Front { network, address: ends[1].ip(), port: ends[1].port(), protocol };
            *counts.entry(front).or_default().entry(leaves_as[1]).or_default() += 1;
        });
        let infos = self.desired.services.values().map(|entry| {
            let none = BTreeMap::new();
            let counts = counts.get(&entry.front).unwrap_or(&none);
            let named = entry.spec.backends.iter().map(|&backend| BackendInfo {
                backend,
                connections: counts.get(&backend).copied().unwrap_or(0),
                is_leaving: false,
            });
            let leaving = counts.iter().filter(|(backend, _)| !entry.spec.backends.contains(backend));
            let leaving =
                leaving.map(|(&backend, &connections)| BackendInfo { backend, connections, is_leaving: true });
            let network = Some(self.desired.network_name(entry.front.network));
            ServiceInfo { targets: named.chain(leaving).collect(), spec: ServiceSpec { network, ..entry.spec.clone() } }
        });
        Answer::Services { services: infos.collect() }
    }

    /// The service at an address and port, if there is one.
    pub(crate) fn service_at(&self, network: NetworkIndex, end: SocketAddr, protocol: u8) -> Option<&ServiceSpec> {
        let front = Front { network, address: end.ip(), port: end.port(), protocol };
        self.desired.services.values().find(|entry| entry.front == front).map(|entry| &entry.spec)
    }
}

fn number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => UDP,
        Protocol::Sctp => 132,
    }
}
