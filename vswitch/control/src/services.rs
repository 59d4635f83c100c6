//! Requests about address translation: services, and addresses that pods leave with.
//!
//! What is said here is for connections that begin; those that there are keep what they have. Only datagrams that would go
//! to a backend for ever that is none any more are begun anew.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use vswitch_api::{
    Affinity, Answer, ApiError, EgressInfo, EgressSpec, NetworkMode, Protocol, ServiceInfo, ServiceSpec,
};
use vswitch_dataplane::Translation;
use vswitch_dataplane::connection::Entry;
use vswitch_dataplane::table::egress::{EgressRule, EgressRules, Prefix};
use vswitch_dataplane::table::service::{Backends, Front};
use vswitch_net::NetworkIndex;

use crate::backend::Backend;
use crate::checks::{check_name, check_prefixes, check_unicast, conflict, invalid, list};
use crate::desired::{NetworkEntry, not_found};
use crate::routes::routers;
use crate::{Control, Dirty};

const UDP: u8 = 17;

/// Longest name of a service: a namespace, a service and a port of Kubernetes.
const LONGEST_NAME: usize = 253;

/// A service as it was asked for.
#[derive(Clone, Debug)]
pub(crate) struct ServiceEntry {
    pub(crate) spec: ServiceSpec,
    pub(crate) front: Front,
    pub(crate) is_configured: bool,
}

/// An egress rule as it was asked for.
#[derive(Clone, Debug)]
pub(crate) struct EgressEntry {
    pub(crate) spec: EgressSpec,
    pub(crate) network: NetworkIndex,
    pub(crate) is_configured: bool,
}

impl Control {
    pub(crate) fn set_services(
        &mut self,
        services: Vec<ServiceSpec>,
        backend: &mut dyn Backend,
    ) -> Result<Answer, ApiError> {
        let is_configured = self.desired.is_configuring;
        let mut entries = Vec::with_capacity(services.len());
        for spec in services {
            let front = self.check_service(&spec)?;
            entries.push(ServiceEntry { spec, front, is_configured });
        }
        let names: BTreeSet<&str> = entries.iter().map(|entry| entry.spec.name.as_str()).collect();
        if names.len() < entries.len() {
            return Err(invalid("services: two of one name: name each once"));
        }
        let kept = self.desired.services.values().filter(|entry| !names.contains(entry.spec.name.as_str()));
        let mut fronts: BTreeSet<_> = BTreeSet::new();
        for entry in kept.chain(&entries) {
            let Front { network, address, port, protocol } = entry.front;
            if !fronts.insert((network, address, port, protocol)) {
                let (at, protocol) = (SocketAddr::new(address, port), entry.spec.protocol.name());
                return Err(conflict(format!(
                    "service \"{}\": {at} ({protocol}) is another service's: `switchctl service list` shows whose",
                    entry.spec.name
                )));
            }
        }
        for entry in entries {
            if let Some(before) = self.desired.services.get(&entry.spec.name) {
                self.tables.services.remove(&before.front);
            }
            let has_affinity = entry.spec.affinity == Affinity::ClientIp;
            let ends = entry.spec.backends.iter().map(|backend| (backend.ip(), backend.port())).collect();
            self.tables.services.insert(entry.front, Backends { ends, has_affinity });
            forget_datagrams(&entry, backend);
            self.desired.services.insert(entry.spec.name.clone(), entry);
        }
        self.mark(Dirty::Change);
        Ok(Answer::Done)
    }

    fn check_service(&self, spec: &ServiceSpec) -> Result<Front, ApiError> {
        let name = &spec.name;
        let is_good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/' | ':');
        if name.is_empty() || name.len() > LONGEST_NAME || !name.chars().all(is_good) {
            return Err(invalid(format!(
                "\"{name}\" is no name for a service: 1 to {LONGEST_NAME} letters, digits, '-', '_', '.', '/' or ':'"
            )));
        }
        let of_service = |error: ApiError| ApiError::new(error.code, format!("service \"{name}\": {}", error.message));
        let network = self.routed(spec.network.as_deref()).map_err(of_service)?;
        check_unicast("address", spec.address).map_err(of_service)?;
        let own = network.spec.subnets.iter().chain(&network.spec.ranges).find(|prefix| prefix.contains(&spec.address));
        if let Some(prefix) = own {
            return Err(of_service(invalid(format!(
                "address: {} lies in {prefix}, where pods have their addresses: choose one outside",
                spec.address
            ))));
        }
        let services = &network.spec.services;
        if !services.is_empty() && !services.iter().any(|prefix| prefix.contains(&spec.address)) {
            return Err(of_service(invalid(format!(
                "address: {} lies in none of the network's `services` ({})",
                spec.address,
                list(services)
            ))));
        }
        let is_taken = self.desired.by_address.contains_key(&(network.index, spec.address));
        if is_taken || routers(&network.spec).contains(&spec.address) {
            return Err(of_service(conflict(format!("address: {} is a pod's or this node's", spec.address))));
        }
        if spec.port == 0 || spec.backends.iter().any(|backend| backend.port() == 0) {
            return Err(of_service(invalid("port: 0 is no port; allowed are 1 to 65535")));
        }
        for (at, backend) in spec.backends.iter().enumerate() {
            check_unicast("backends", backend.ip()).map_err(of_service)?;
            if backend.is_ipv4() != spec.address.is_ipv4() {
                return Err(of_service(invalid(format!(
                    "backends: {backend} is of another family than {}: make a service of each family",
                    spec.address
                ))));
            }
            if spec.backends[..at].contains(backend) {
                return Err(of_service(invalid(format!("backends: {backend} is there twice"))));
            }
            if backend.ip() == spec.address {
                return Err(of_service(invalid(format!("backends: {backend} is the service's own address"))));
            }
        }
        Ok(Front { network: network.index, address: spec.address, port: spec.port, protocol: number(spec.protocol) })
    }

    pub(crate) fn remove_services(&mut self, names: &[String], backend: &mut dyn Backend) -> Result<Answer, ApiError> {
        if let Some(missing) = names.iter().find(|name| !self.desired.services.contains_key(*name)) {
            return Err(not_found(format!("no service \"{missing}\": `switchctl service list` shows them")));
        }
        for name in names {
            if let Some(mut entry) = self.desired.services.remove(name) {
                self.tables.services.remove(&entry.front);
                entry.spec.backends.clear();
                forget_datagrams(&entry, backend);
            }
        }
        self.mark(Dirty::Change);
        Ok(Answer::Done)
    }

    pub(crate) fn set_egress(&mut self, spec: EgressSpec) -> Result<Answer, ApiError> {
        check_name("egress rule", &spec.name)?;
        let network = self.routed(spec.network.as_deref())?;
        check_prefixes("sources", &spec.sources)?;
        check_prefixes("destinations", &spec.destinations)?;
        if spec.addresses.is_empty() {
            return Err(invalid("addresses: name at least one address to leave with"));
        }
        for (at, &address) in spec.addresses.iter().enumerate() {
            check_unicast("addresses", address)?;
            if spec.addresses[..at].contains(&address) {
                return Err(invalid(format!("addresses: {address} is there twice")));
            }
            if self.desired.by_address.contains_key(&(network.index, address)) {
                return Err(conflict(format!("addresses: {address} is a pod's: choose one that nobody has")));
            }
        }
        let (network, is_configured) = (network.index, self.desired.is_configuring);
        self.desired.egress.insert(spec.name.clone(), EgressEntry { spec, network, is_configured });
        self.mark(Dirty::Change);
        Ok(Answer::Done)
    }

    pub(crate) fn remove_egress(&mut self, name: &str) -> Result<Answer, ApiError> {
        if self.desired.egress.remove(name).is_none() {
            return Err(not_found(format!("no egress rule \"{name}\": `switchctl egress list` shows them")));
        }
        self.mark(Dirty::Change);
        Ok(Answer::Done)
    }

    fn routed(&self, name: Option<&str>) -> Result<&NetworkEntry, ApiError> {
        let network = self.desired.network(name)?;
        if network.spec.mode != NetworkMode::Routed {
            return Err(invalid(format!(
                "network: \"{}\" is bridged; addresses are translated where the switch routes",
                network.spec.name
            )));
        }
        Ok(network)
    }

    /// What names a network, and so must go before it does.
    pub(crate) fn translations_of(&self, network: NetworkIndex) -> Option<String> {
        let service = self.desired.services.values().find(|entry| entry.front.network == network);
        let egress = self.desired.egress.values().find(|entry| entry.network == network);
        let service = service.map(|entry| format!("service \"{}\"", entry.spec.name));
        service.or_else(|| egress.map(|entry| format!("egress rule \"{}\"", entry.spec.name)))
    }

    /// Addresses of a network that translation speaks for: packets to them are to come to the switch.
    pub(crate) fn translated_addresses(&self, network: NetworkIndex) -> BTreeSet<IpAddr> {
        let services = self.desired.services.values().map(|entry| &entry.front);
        let services = services.filter(|front| front.network == network).map(|front| front.address);
        services.chain(self.egress_addresses(network)).collect()
    }

    /// Addresses of a network that pods leave with.
    pub(crate) fn egress_addresses(&self, network: NetworkIndex) -> impl Iterator<Item = IpAddr> {
        let rules = self.desired.egress.values().filter(move |entry| entry.network == network);
        rules.flat_map(|entry| entry.spec.addresses.iter().copied())
    }

    pub(crate) fn compile_egress(&self, entry: &NetworkEntry) -> Option<Arc<EgressRules>> {
        let own = entry.spec.subnets.iter().chain(&entry.spec.ranges).copied();
        let routes =
            self.desired.routes.keys().filter(|(network, prefix)| *network == entry.index && prefix.prefix_len() > 0);
        let own: Vec<IpNet> = own.chain(routes.map(|&(_, prefix)| prefix)).collect();
        let everyone = [IpNet::V4(Default::default()), IpNet::V6(Default::default())];
        let rules = self.desired.egress.values().filter(|rule| rule.network == entry.index).map(|rule| {
            let EgressSpec { sources, destinations, addresses, .. } = &rule.spec;
            EgressRule {
                sources: prefixes(if sources.is_empty() { &everyone } else { sources }),
                destinations: prefixes(destinations),
                except: if destinations.is_empty() { prefixes(&own) } else { Vec::new() },
                addresses: addresses.clone(),
            }
        });
        let rules: Vec<EgressRule> = rules.collect();
        (!rules.is_empty()).then(|| Arc::new(EgressRules::new(&rules)))
    }

    pub(crate) fn service_list(&self, now_ns: u64, backend: &mut dyn Backend) -> Answer {
        let counts = Counts::of(now_ns, backend);
        let infos = self.desired.services.values().map(|entry| ServiceInfo {
            connections: entry.spec.backends.iter().map(|&end| counts.of_backend(&entry.front, end)).collect(),
            spec: ServiceSpec { network: Some(self.desired.network_name(entry.front.network)), ..entry.spec.clone() },
        });
        Answer::Services { services: infos.collect() }
    }

    pub(crate) fn egress_list(&self, now_ns: u64, backend: &mut dyn Backend) -> Answer {
        let counts = Counts::of(now_ns, backend);
        let infos = self.desired.egress.values().map(|entry| EgressInfo {
            connections: entry.spec.addresses.iter().map(|&own| counts.of_source(entry.network, own)).sum(),
            spec: EgressSpec { network: Some(self.desired.network_name(entry.network)), ..entry.spec.clone() },
        });
        Answer::Egress { rules: infos.collect() }
    }

    /// The service at an address and port, if there is one.
    pub(crate) fn service_at(&self, network: NetworkIndex, end: SocketAddr, protocol: u8) -> Option<&ServiceSpec> {
        let front = Front { network, address: end.ip(), port: end.port(), protocol };
        self.desired.services.values().find(|entry| entry.front == front).map(|entry| &entry.spec)
    }
}

/// Translated connections, counted.
struct Counts {
    backends: std::collections::HashMap<(NetworkIndex, u8, SocketAddr, SocketAddr), usize>,
    sources: std::collections::HashMap<(NetworkIndex, IpAddr), usize>,
}

impl Counts {
    fn of(now_ns: u64, backend: &mut dyn Backend) -> Counts {
        let mut counts = Counts { backends: Default::default(), sources: Default::default() };
        backend.connections().dump(now_ns, usize::MAX, |entry, leaves_as| {
            if let Some(to) = leaves_as {
                let [source, asked] = entry.ends();
                let [left, answering] = to.ends(source.0.is_ipv6());
                let network = entry.key.network;
                let key = (network, entry.key.protocol, SocketAddr::from(asked), SocketAddr::from(answering));
                *counts.backends.entry(key).or_default() += 1;
                if left.0 != source.0 {
                    *counts.sources.entry((network, left.0)).or_default() += 1;
                }
            }
            false
        });
        counts
    }

    fn of_backend(&self, front: &Front, backend: SocketAddr) -> usize {
        let asked = SocketAddr::new(front.address, front.port);
        self.backends.get(&(front.network, front.protocol, asked, backend)).copied().unwrap_or(0)
    }

    fn of_source(&self, network: NetworkIndex, address: IpAddr) -> usize {
        self.sources.get(&(network, address)).copied().unwrap_or(0)
    }
}

/// Datagrams have no end by which a client would notice that nobody answers any more: those of a service that go to none of
/// its backends begin anew.
fn forget_datagrams(service: &ServiceEntry, backend: &mut dyn Backend) {
    let front = service.front;
    if front.protocol != UDP {
        return;
    }
    backend.connections().forget(|entry: &Entry, leaves_as: Option<&Translation>| {
        let [source, asked] = entry.ends();
        let answering = leaves_as.map(|to| SocketAddr::from(to.ends(source.0.is_ipv6())[1]));
        (entry.key.network, entry.key.protocol) == (front.network, UDP)
            && asked == (front.address, front.port)
            && answering.is_none_or(|answering| !service.spec.backends.contains(&answering))
    });
}

fn number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => UDP,
        Protocol::Sctp => 132,
    }
}

fn prefixes(list: &[IpNet]) -> Vec<Prefix> {
    list.iter().map(|prefix| (prefix.addr(), prefix.prefix_len())).collect()
}
