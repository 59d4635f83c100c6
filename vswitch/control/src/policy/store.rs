//! Objects and endpoints as they came, and whose addresses are whose.
//!
//! An address has one owner: this node, before a port here, before an endpoint that somebody told of. Whatever comes
//! or goes, [`PolicyStore::settle`] looks at all three.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vswitch_api::{EndpointName, EndpointSpec, PortSpec, Protocol};
use vswitch_dataplane::table::policy::Subject;
use vswitch_net::{NetworkIndex, PortId};
use vswitch_policy::{EndpointFacts, EndpointObject, NamedPort, Object, Policy, PolicyId, Read, Tier, protocol};

use super::compiler::{Compiler, IdentityId, Owner};

/// Labels of a port that say which pod it is.
const POD_NAMESPACE: &str = "K8S_POD_NAMESPACE";
const POD_NAME: &str = "K8S_POD_NAME";
const RUNTIME_PREFIX: &str = "K8S_";

/// One change of what a restart must know, as a line of the journal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JournalEntry {
    /// An object as it was read.
    Object {
        /// Its file.
        file: String,
        /// Lines of its rules.
        lines: BTreeMap<String, u32>,
        /// The object.
        value: Value,
    },
    /// An object that went.
    ObjectGone(vswitch_api::ObjectName),
    /// An endpoint.
    Endpoint(EndpointSpec),
    /// An endpoint that went.
    EndpointGone(EndpointName),
}

#[derive(Debug)]
struct Endpoint {
    spec: EndpointSpec,
    facts: EndpointFacts,
    identity: IdentityId,
    /// Its addresses, in the network of its name.
    claims: Vec<(NetworkIndex, IpAddr)>,
}

#[derive(Debug)]
struct PortEndpoint {
    name: EndpointName,
    /// What the port itself says.
    own: EndpointFacts,
    identity: IdentityId,
    network: NetworkIndex,
    addresses: Vec<IpAddr>,
}

/// Who says that an address is his.
#[derive(Debug, Default)]
struct Claims {
    is_host: bool,
    port: Option<PortId>,
    /// The newest last: of several it is who has the address now.
    endpoints: Vec<EndpointName>,
}

/// The store.
#[derive(Debug)]
pub(crate) struct PolicyStore {
    pub(crate) compiler: Compiler,
    pub(crate) objects: BTreeMap<PolicyId, Read>,
    endpoints: BTreeMap<EndpointName, Endpoint>,
    ports: BTreeMap<PortId, PortEndpoint>,
    claims: BTreeMap<(NetworkIndex, IpAddr), Claims>,
    host_addresses: BTreeSet<(NetworkIndex, IpAddr)>,
    journal: Vec<JournalEntry>,
    /// What numbers of rules had counted when they were given out again.
    pub(crate) baseline: BTreeMap<u32, (u64, u64)>,
}

impl PolicyStore {
    /// An empty store; `failsafe` are the ports of this node that no policy closes.
    pub(crate) fn new(failsafe: Option<Policy>) -> PolicyStore {
        let mut compiler = Compiler::new();
        compiler.change(&[], failsafe.into_iter().collect(), Vec::new());
        PolicyStore {
            compiler,
            objects: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            ports: BTreeMap::new(),
            claims: BTreeMap::new(),
            host_addresses: BTreeSet::new(),
            journal: Vec::new(),
            baseline: BTreeMap::new(),
        }
    }

    /// What a restart must know of what has changed since the last call.
    pub(crate) fn take_journal(&mut self) -> Vec<JournalEntry> {
        std::mem::take(&mut self.journal)
    }

    /// All that a restart must know.
    pub(crate) fn whole_journal(&self) -> Vec<JournalEntry> {
        let objects = self.objects.values().map(of_object);
        let told = self.endpoints.iter().filter(|(name, _)| !self.is_object(name));
        objects.chain(told.map(|(_, endpoint)| JournalEntry::Endpoint(endpoint.spec.clone()))).collect()
    }

    /// Puts objects in and takes others away; all of them are right.
    pub(crate) fn change(
        &mut self,
        add: Vec<Read>,
        remove: &[PolicyId],
        network: impl Fn(Option<&str>) -> Option<NetworkIndex>,
    ) {
        let mut policies = Vec::new();
        let mut tiers: BTreeMap<String, Tier> =
            self.compiler.own_tiers().into_iter().map(|tier| (tier.name.clone(), tier)).collect();
        let mut gone = Vec::new();
        for id in remove {
            let Some(read) = self.objects.remove(id) else { continue };
            self.journal.push(JournalEntry::ObjectGone(name_of(id)));
            match read.object {
                Object::Policy(_) => gone.push(id.clone()),
                Object::Tier(tier) => drop(tiers.remove(&tier.name)),
                Object::Namespace(_) => self.compiler.set_namespace(&id.name, None),
                Object::Endpoint(_) => self.forget_endpoint(&endpoint_name(id)),
            }
        }
        for read in add {
            self.journal.push(of_object(&read));
            match &read.object {
                Object::Policy(policy) => policies.push(policy.clone()),
                Object::Tier(tier) => drop(tiers.insert(tier.name.clone(), tier.clone())),
                Object::Namespace(labels) => self.compiler.set_namespace(&read.id.name, Some(labels.clone())),
                Object::Endpoint(object) => self.put_endpoint(spec_of(&read.id, object), &network),
            }
            self.objects.insert(read.id.clone(), read);
        }
        if !policies.is_empty() || !gone.is_empty() || !tiers.values().eq(self.compiler.own_tiers().iter()) {
            self.compiler.change(&gone, policies, tiers.into_values().collect());
        }
    }

    /// Tells of an endpoint.
    pub(crate) fn set_endpoint(&mut self, spec: EndpointSpec, network: impl Fn(Option<&str>) -> Option<NetworkIndex>) {
        // The latest word on an endpoint is the one that counts, in whichever form it came.
        self.drop_object(&EndpointName { namespace: spec.namespace.clone(), name: spec.name.clone() });
        self.journal.push(JournalEntry::Endpoint(spec.clone()));
        self.put_endpoint(spec, network);
    }

    /// Forgets an endpoint. False if there was none.
    pub(crate) fn remove_endpoint(&mut self, name: &EndpointName) -> bool {
        let is_known = self.endpoints.contains_key(name);
        if is_known {
            self.drop_object(name);
            self.journal.push(JournalEntry::EndpointGone(name.clone()));
            self.forget_endpoint(name);
        }
        is_known
    }

    /// True if an endpoint was told of.
    pub(crate) fn knows(&self, name: &EndpointName) -> bool {
        self.endpoints.contains_key(name)
    }

    /// All endpoints that were told of.
    pub(crate) fn endpoints(&self) -> impl Iterator<Item = (&EndpointName, &EndpointSpec, &EndpointFacts, IdentityId)> {
        self.endpoints.iter().map(|(name, entry)| (name, &entry.spec, &entry.facts, entry.identity))
    }

    /// A port comes.
    pub(crate) fn add_port(&mut self, port: PortId, network: NetworkIndex, spec: &PortSpec) {
        let (name, own) = (port_name(spec), port_facts(spec));
        let facts = self.endpoints.get(&name).map_or_else(|| own.clone(), |told| told_of(&told.facts, &own));
        let identity = self.compiler.acquire(&facts);
        // It may speak from its link-local address, too, where links are shared.
        let link_local = IpAddr::V6(spec.mac.link_local());
        let addresses: Vec<IpAddr> = spec.addresses.iter().copied().chain([link_local]).collect();
        self.ports.insert(port, PortEndpoint { name, own, identity, network, addresses: addresses.clone() });
        for address in addresses {
            self.claims.entry((network, address)).or_default().port = Some(port);
            self.settle(network, address);
        }
    }

    /// A port goes.
    pub(crate) fn remove_port(&mut self, port: PortId) {
        let Some(entry) = self.ports.remove(&port) else { return };
        for address in entry.addresses {
            if let Some(claims) = self.claims.get_mut(&(entry.network, address)) {
                claims.port = None;
            }
            self.settle(entry.network, address);
        }
        self.compiler.release(entry.identity);
    }

    /// This node's own addresses, in the network that leads to its stack. True if they are others than before.
    pub(crate) fn set_host_addresses(&mut self, addresses: BTreeSet<(NetworkIndex, IpAddr)>) -> bool {
        if self.host_addresses == addresses {
            return false;
        }
        let before = std::mem::replace(&mut self.host_addresses, addresses);
        let changed: Vec<_> = before.symmetric_difference(&self.host_addresses).copied().collect();
        for key in changed {
            self.claims.entry(key).or_default().is_host = self.host_addresses.contains(&key);
            self.settle(key.0, key.1);
        }
        self.settle_host_node();
        true
    }

    /// Networks came or went: endpoints look for theirs again.
    pub(crate) fn look_for_networks(&mut self, network: impl Fn(Option<&str>) -> Option<NetworkIndex>) {
        let specs: Vec<EndpointSpec> = self.endpoints.values().map(|endpoint| endpoint.spec.clone()).collect();
        specs.into_iter().for_each(|spec| self.put_endpoint(spec, &network));
    }

    /// What the data path holds against connections of a port.
    pub(crate) fn subject(&self, port: PortId) -> Subject {
        self.ports.get(&port).map(|entry| self.compiler.subject(entry.identity)).unwrap_or_default()
    }

    /// A port's name, facts and identity.
    pub(crate) fn port(&self, port: PortId) -> Option<(&EndpointName, &EndpointFacts, IdentityId)> {
        let entry = self.ports.get(&port)?;
        Some((&entry.name, self.compiler.facts(entry.identity)?, entry.identity))
    }

    /// Who has an address, by name.
    pub(crate) fn name_at(&self, network: NetworkIndex, address: IpAddr) -> Option<String> {
        let claims = self.claims.get(&(network, address))?;
        match (claims.is_host, claims.port.and_then(|port| self.ports.get(&port))) {
            (true, _) => Some("host".to_owned()),
            (false, Some(port)) => Some(port.name.to_string()),
            (false, None) => claims.endpoints.last().map(ToString::to_string),
        }
    }

    fn put_endpoint(&mut self, spec: EndpointSpec, network: impl Fn(Option<&str>) -> Option<NetworkIndex>) {
        let name = EndpointName { namespace: spec.namespace.clone(), name: spec.name.clone() };
        let facts = endpoint_facts(&spec);
        let identity = self.compiler.acquire(&facts);
        let index = network(spec.network.as_deref());
        let claims: Vec<_> =
            index.into_iter().flat_map(|index| spec.addresses.iter().map(move |&at| (index, at))).collect();
        let entry = Endpoint { spec, facts, identity, claims: claims.clone() };
        let before = self.endpoints.insert(name.clone(), entry);
        for key in before.iter().flat_map(|before| before.claims.iter()).filter(|key| !claims.contains(key)) {
            self.unclaim(*key, &name);
        }
        for key in claims {
            let endpoints = &mut self.claims.entry(key).or_default().endpoints;
            if !endpoints.contains(&name) {
                endpoints.push(name.clone());
            }
            self.settle(key.0, key.1);
        }
        self.follow_name(&name);
        self.settle_host_node();
        if let Some(before) = before {
            self.compiler.release(before.identity);
        }
    }

    fn forget_endpoint(&mut self, name: &EndpointName) {
        let Some(entry) = self.endpoints.remove(name) else { return };
        entry.claims.iter().for_each(|&key| self.unclaim(key, name));
        self.follow_name(name);
        self.settle_host_node();
        self.compiler.release(entry.identity);
    }

    fn unclaim(&mut self, key: (NetworkIndex, IpAddr), name: &EndpointName) {
        if let Some(claims) = self.claims.get_mut(&key) {
            claims.endpoints.retain(|other| other != name);
        }
        self.settle(key.0, key.1);
    }

    /// Ports of a pod have the facts that were told of it.
    fn follow_name(&mut self, name: &EndpointName) {
        let named: Vec<PortId> = self.ports.iter().filter(|(_, port)| port.name == *name).map(|(&id, _)| id).collect();
        for id in named {
            let told = self.endpoints.get(name).map(|endpoint| &endpoint.facts);
            let Some(port) = self.ports.get_mut(&id) else { continue };
            let facts = told.map_or_else(|| port.own.clone(), |told| told_of(told, &port.own));
            let now = self.compiler.acquire(&facts);
            let before = std::mem::replace(&mut port.identity, now);
            let (network, addresses) = (port.network, port.addresses.clone());
            addresses.into_iter().for_each(|address| self.settle(network, address));
            self.compiler.release(before);
        }
    }

    /// This node is the one that was told of with one of its addresses.
    fn settle_host_node(&mut self) {
        let claims = self.host_addresses.iter().filter_map(|key| self.claims.get(key));
        let node = claims.flat_map(|claims| &claims.endpoints).rev().find(|name| name.namespace.is_none());
        let identity = node.and_then(|name| self.endpoints.get(name)).map(|endpoint| endpoint.identity);
        self.compiler.set_host_node(identity);
    }

    /// Gives an address the owner that it has now.
    fn settle(&mut self, network: NetworkIndex, address: IpAddr) {
        let key = (network, address);
        let owner = self.claims.get(&key).and_then(|claims| {
            let port = claims.port.and_then(|port| self.ports.get(&port)).map(|port| port.identity);
            let told = claims.endpoints.last().and_then(|name| self.endpoints.get(name)).map(|entry| entry.identity);
            if claims.is_host { Some(Owner::Host) } else { port.or(told).map(Owner::Identity) }
        });
        if owner.is_none() {
            self.claims.remove(&key);
        }
        self.compiler.set_address(network, address, owner);
    }

    /// Forgets the Pod or Node object of an endpoint, of which something else is said now.
    fn drop_object(&mut self, name: &EndpointName) {
        let id = object_of(name);
        if self.objects.remove(&id).is_some() {
            self.journal.push(JournalEntry::ObjectGone(name_of(&id)));
        }
    }

    fn is_object(&self, name: &EndpointName) -> bool {
        self.objects.contains_key(&object_of(name))
    }
}

/// An object's name in the protocol.
pub(crate) fn name_of(id: &PolicyId) -> vswitch_api::ObjectName {
    vswitch_api::ObjectName { kind: id.kind.name().to_owned(), namespace: id.namespace.clone(), name: id.name.clone() }
}

/// The object that an endpoint would come from.
pub(crate) fn object_of(name: &EndpointName) -> PolicyId {
    let kind = if name.namespace.is_some() { vswitch_policy::Kind::Pod } else { vswitch_policy::Kind::Node };
    PolicyId { kind, namespace: name.namespace.clone(), name: name.name.clone() }
}

/// The name of a port's pod.
pub(crate) fn port_name(spec: &PortSpec) -> EndpointName {
    let namespace = spec.labels.get(POD_NAMESPACE).cloned().unwrap_or_else(|| "default".to_owned());
    // A port without a pod is called by its link.
    let name = spec.labels.get(POD_NAME).cloned().unwrap_or_else(|| spec.link.clone());
    EndpointName { namespace: Some(namespace), name }
}

/// What is told of a pod counts; ports that nobody tells of have the names that the pod came with.
fn told_of(told: &EndpointFacts, own: &EndpointFacts) -> EndpointFacts {
    let ports = if told.ports.is_empty() { own.ports.clone() } else { told.ports.clone() };
    EndpointFacts { ports, ..told.clone() }
}

/// True for a port whose pod has a name in its cluster.
pub(crate) fn is_of_runtime(spec: &PortSpec) -> bool {
    spec.labels.contains_key(POD_NAME)
}

fn port_facts(spec: &PortSpec) -> EndpointFacts {
    let labels = spec.labels.iter().filter(|(key, _)| !key.starts_with(RUNTIME_PREFIX));
    EndpointFacts {
        namespace: port_name(spec).namespace,
        labels: labels.map(|(key, value)| (key.clone(), value.clone())).collect(),
        ports: named_ports(&spec.named_ports),
    }
}

fn endpoint_facts(spec: &EndpointSpec) -> EndpointFacts {
    EndpointFacts { namespace: spec.namespace.clone(), labels: spec.labels.clone(), ports: named_ports(&spec.ports) }
}

fn named_ports(ports: &[vswitch_api::NamedPort]) -> Vec<NamedPort> {
    let number = |protocol| match protocol {
        Protocol::Tcp => protocol::TCP,
        Protocol::Udp => protocol::UDP,
        Protocol::Sctp => protocol::SCTP,
    };
    let named = ports.iter().map(|port| NamedPort {
        name: port.name.clone(),
        protocol: number(port.protocol),
        port: port.port,
    });
    let sorted: BTreeSet<NamedPort> = named.collect();
    sorted.into_iter().collect()
}

pub(crate) fn endpoint_name(id: &PolicyId) -> EndpointName {
    EndpointName { namespace: id.namespace.clone(), name: id.name.clone() }
}

fn spec_of(id: &PolicyId, object: &EndpointObject) -> EndpointSpec {
    let protocol_of = |number| match number {
        protocol::UDP => Protocol::Udp,
        protocol::SCTP => Protocol::Sctp,
        _ => Protocol::Tcp,
    };
    let port = |port: &NamedPort| vswitch_api::NamedPort {
        name: port.name.clone(),
        protocol: protocol_of(port.protocol),
        port: port.port,
    };
    EndpointSpec {
        namespace: id.namespace.clone(),
        name: id.name.clone(),
        network: None,
        labels: object.facts.labels.clone(),
        addresses: object.addresses.clone(),
        ports: object.facts.ports.iter().map(port).collect(),
    }
}

fn of_object(read: &Read) -> JournalEntry {
    JournalEntry::Object { file: read.source.file.clone(), lines: read.lines.clone(), value: read.value.clone() }
}
