//! Requests about policies and endpoints.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use vswitch_api::{
    Answer, ApiError, ChangeInfo, EndpointInfo, EndpointName, EndpointSpec, ObjectName, PolicyDetail, PolicyDocument,
    PolicyInfo, RuleInfo,
};
use vswitch_dataplane::RuleCounters;
use vswitch_dataplane::table::policy::RuleId;
use vswitch_net::{NetworkIndex, PortId};
use vswitch_policy::{Action, Direction, Kind, Object, Policy, PolicyId, Read, Subject, Tier, reread, text::line_of};

use super::rules::RuleKey;
use super::store::{JournalEntry, endpoint_name, name_of, object_of};
use crate::backend::{Backend, WorkerSample};
use crate::checks::{check_unicast, invalid};
use crate::desired::not_found;
use crate::{Control, Dirty, Failsafe};

type Applied = Result<Answer, ApiError>;

impl Control {
    /// Reads texts and puts what they say in, or says what that would change.
    pub(crate) fn apply_policies(
        &mut self,
        documents: &[PolicyDocument],
        is_dry_run: bool,
        backend: &mut dyn Backend,
    ) -> Applied {
        let (add, mut changes) = self.read_policies(documents)?;
        if !is_dry_run {
            // Who applies knows what; who asks for the difference gets both.
            changes.iter_mut().for_each(|change| (change.before, change.after) = (None, None));
            let changed = add.into_iter().filter(|read| self.is_news(read)).collect();
            self.change_objects(changed, &[], backend);
        }
        Ok(Answer::Changes { changes })
    }

    /// Reads texts and checks them against what there is.
    pub(crate) fn read_policies(&self, documents: &[PolicyDocument]) -> Result<(Vec<Read>, Vec<ChangeInfo>), ApiError> {
        let mut reads: Vec<Read> = Vec::new();
        let mut places: BTreeMap<PolicyId, vswitch_policy::Source> = BTreeMap::new();
        for document in documents {
            let objects = vswitch_policy::read(&document.file, &document.text);
            for read in objects.map_err(|error| invalid(error.to_string()))? {
                if let Some(other) = places.insert(read.id.clone(), read.source.clone()) {
                    return Err(invalid(format!(
                        "{}:{}: {} is there twice: also at {}:{}",
                        read.source.file, read.source.line, read.id, other.file, other.line
                    )));
                }
                reads.push(read);
            }
        }
        if reads.is_empty() {
            return Err(invalid("there is no object in it: a document has `apiVersion` and `kind`"));
        }
        let known: BTreeSet<String> = self
            .policy
            .compiler
            .tiers()
            .iter()
            .map(|tier| tier.name.clone())
            .chain(reads.iter().filter(|read| read.id.kind == Kind::Tier).map(|read| read.id.name.clone()))
            .collect();
        for read in &reads {
            if let Object::Policy(policy) = &read.object
                && !known.contains(&policy.tier)
            {
                return Err(invalid(format!(
                    "{}:{}: spec.tier: there is no tier \"{}\": apply one of kind Tier first, or with it",
                    read.source.file,
                    line_of(&read.lines, "spec.tier"),
                    policy.tier
                )));
            }
        }
        self.check_tiers(&reads)?;
        let changes = reads.iter().map(|read| {
            let before = self.policy.objects.get(&read.id).map(|before| before.value.clone());
            let change = match &before {
                None => "created",
                Some(before) if *before == read.value => "unchanged",
                Some(_) => "changed",
            };
            ChangeInfo { name: name_of(&read.id), change: change.to_owned(), before, after: Some(read.value.clone()) }
        });
        let changes = changes.collect();
        Ok((reads, changes))
    }

    /// Which tier comes first must not be left to their names.
    fn check_tiers(&self, reads: &[Read]) -> Result<(), ApiError> {
        let mut orders: BTreeMap<String, i64> =
            self.policy.compiler.tiers().into_iter().map(|tier| (tier.name.clone(), tier.order)).collect();
        for read in reads {
            let Object::Tier(tier) = &read.object else { continue };
            orders.insert(tier.name.clone(), tier.order);
            if let Some((other, _)) = orders.iter().find(|(name, order)| **order == tier.order && **name != tier.name) {
                let line = line_of(&read.lines, "spec.order");
                let (file, order) = (&read.source.file, tier.order);
                return Err(invalid(format!(
                    "{file}:{line}: spec.order: {order} is tier \"{other}\"'s: choose another place"
                )));
            }
        }
        Ok(())
    }

    pub(crate) fn delete_policies(&mut self, names: &[ObjectName], backend: &mut dyn Backend) -> Applied {
        let mut ids = Vec::new();
        for name in names {
            ids.push(self.object_id(name)?);
        }
        for id in ids.iter().filter(|id| id.kind == Kind::Tier) {
            let is_user = |read: &&Read| {
                matches!(&read.object, Object::Policy(policy) if policy.tier == id.name) && !ids.contains(&read.id)
            };
            if let Some(user) = self.policy.objects.values().find(is_user) {
                return Err(invalid(format!("tier \"{}\" holds {}: delete that first, or with it", id.name, user.id)));
            }
        }
        let changes = ids.iter().map(|id| ChangeInfo {
            name: name_of(id),
            change: "deleted".to_owned(),
            before: self.policy.objects.get(id).map(|read| read.value.clone()),
            after: None,
        });
        let changes = changes.collect();
        self.change_objects(Vec::new(), &ids, backend);
        Ok(Answer::Changes { changes })
    }

    /// Takes over what a former daemon noted. A sentence for each entry that this one cannot read.
    pub(crate) fn replay(&mut self, journal: Vec<JournalEntry>, backend: &mut dyn Backend) -> Vec<String> {
        let mut lost = Vec::new();
        let mut objects: BTreeMap<PolicyId, Read> = BTreeMap::new();
        let mut endpoints: BTreeMap<EndpointName, EndpointSpec> = BTreeMap::new();
        for entry in journal {
            match entry {
                JournalEntry::Object { file, lines, value } => match reread(&file, value, lines) {
                    Ok(read) => {
                        if matches!(read.object, Object::Endpoint(_)) {
                            endpoints.remove(&endpoint_name(&read.id));
                        }
                        objects.insert(read.id.clone(), read);
                    }
                    Err(error) => lost.push(error.to_string()),
                },
                JournalEntry::ObjectGone(name) => objects.retain(|id, _| name_of(id) != name),
                JournalEntry::Endpoint(spec) => {
                    let name = EndpointName { namespace: spec.namespace.clone(), name: spec.name.clone() };
                    objects.remove(&object_of(&name));
                    endpoints.insert(name, spec);
                }
                JournalEntry::EndpointGone(name) => {
                    objects.remove(&object_of(&name));
                    endpoints.remove(&name);
                }
            }
        }
        self.change_objects(objects.into_values().collect(), &[], backend);
        for spec in endpoints.into_values() {
            let network = self.desired.index_of_name();
            self.policy.set_endpoint(spec, network);
        }
        // It is noted already.
        self.policy.take_journal();
        self.mark(Dirty::Change);
        lost
    }

    pub(crate) fn set_endpoints(&mut self, endpoints: Vec<EndpointSpec>) -> Applied {
        for spec in &endpoints {
            check_endpoint(spec)?;
            if let Some(network) = &spec.network {
                self.desired.network(Some(network))?;
            }
            for &address in &spec.addresses {
                check_unicast("addresses", address)?;
            }
        }
        for spec in endpoints {
            let network = self.desired.index_of_name();
            self.policy.set_endpoint(spec, network);
        }
        self.mark(Dirty::Change);
        Ok(Answer::Done)
    }

    pub(crate) fn delete_endpoints(&mut self, endpoints: &[EndpointName]) -> Applied {
        if let Some(unknown) = endpoints.iter().find(|name| !self.policy.knows(name)) {
            return Err(not_found(format!("no endpoint {unknown}: `switchctl endpoint list` shows them")));
        }
        for name in endpoints {
            self.policy.remove_endpoint(name);
        }
        self.mark(Dirty::Change);
        Ok(Answer::Done)
    }

    pub(crate) fn endpoint_list(&self) -> Vec<EndpointInfo> {
        let ports: Vec<_> = self
            .desired
            .ports
            .iter()
            .filter_map(|(&id, port)| Some((self.policy.port(id)?, port)))
            .map(|((name, facts, identity), port)| {
                let spec = &port.record.spec;
                EndpointInfo {
                    name: name.clone(),
                    identity: identity.0,
                    link: Some(spec.link.clone()),
                    network: self.desired.network_name(port.network),
                    addresses: spec.addresses.clone(),
                    labels: facts.labels.clone(),
                    ports: self.port_names(facts),
                    is_isolated: self.policy.compiler.sets_of(identity).map(|set| set.is_some()),
                }
            })
            .collect();
        let told = self.policy.endpoints().filter(|(name, ..)| ports.iter().all(|port| port.name != **name));
        let told: Vec<_> = told
            .map(|(name, spec, facts, identity)| EndpointInfo {
                name: name.clone(),
                identity: identity.0,
                link: None,
                network: self
                    .desired
                    .network(spec.network.as_deref())
                    .map(|entry| entry.spec.name.clone())
                    .unwrap_or_default(),
                addresses: spec.addresses.clone(),
                labels: facts.labels.clone(),
                ports: spec.ports.clone(),
                is_isolated: self.policy.compiler.sets_of(identity).map(|set| set.is_some()),
            })
            .collect();
        ports.into_iter().chain(told).collect()
    }

    fn port_names(&self, facts: &vswitch_policy::EndpointFacts) -> Vec<vswitch_api::NamedPort> {
        let protocol = |number| match number {
            17 => vswitch_api::Protocol::Udp,
            132 => vswitch_api::Protocol::Sctp,
            _ => vswitch_api::Protocol::Tcp,
        };
        let ports = facts.ports.iter().map(|port| vswitch_api::NamedPort {
            name: port.name.clone(),
            protocol: protocol(port.protocol),
            port: port.port,
        });
        ports.collect()
    }

    pub(crate) fn policy_list(&self, workers: &[WorkerSample]) -> Vec<PolicyInfo> {
        let counts = self.rule_counts(workers);
        let mut reads: Vec<&Read> = self.policy.objects.values().collect();
        let places: BTreeMap<&str, i64> =
            self.policy.compiler.tiers().into_iter().map(|tier| (tier.name.as_str(), tier.order)).collect();
        // As they are asked, and after them what they are about.
        reads.sort_by_key(|read| match &read.object {
            Object::Policy(policy) => (0, places.get(policy.tier.as_str()).copied(), policy.order, &read.id),
            Object::Tier(tier) => (1, Some(tier.order), 0, &read.id),
            Object::Namespace(_) | Object::Endpoint(_) => (2, None, 0, &read.id),
        });
        reads.into_iter().map(|read| self.policy_info(read, &counts)).collect()
    }

    pub(crate) fn policy_show(&self, name: &ObjectName, workers: &[WorkerSample]) -> Result<PolicyDetail, ApiError> {
        let id = self.object_id(name)?;
        let read = self.policy.objects.get(&id).ok_or_else(|| not_found(format!("no {id}")))?;
        let counts = self.rule_counts(workers);
        let mut rules = Vec::new();
        if let Object::Policy(policy) = &read.object {
            for direction in [Direction::Ingress, Direction::Egress] {
                for (at, rule) in policy.rules(direction).unwrap_or_default().iter().enumerate() {
                    let (connections, denied) = self.count_of(&counts, &id, direction, Some(at));
                    rules.push(RuleInfo {
                        path: rule.path.clone(),
                        line: rule.line,
                        name: rule.name.clone(),
                        action: action_name(rule.action).to_owned(),
                        connections,
                        denied,
                    });
                }
                let (_, denied) = self.count_of(&counts, &id, direction, None);
                if policy.rules(direction).is_some() && self.tier_denies(policy) {
                    rules.push(RuleInfo {
                        path: format!("{}: no rule matches", direction_name(direction)),
                        line: read.source.line,
                        name: None,
                        action: "deny".to_owned(),
                        connections: 0,
                        denied,
                    });
                }
            }
        }
        let links = self.ports_of(&id).filter_map(|port| Some(self.desired.ports.get(&port)?.record.spec.link.clone()));
        let links = links.collect();
        Ok(PolicyDetail { info: self.policy_info(read, &counts), rules, links, object: read.value.clone() })
    }

    /// Whether what no rule matches is denied by a policy's tier.
    fn tier_denies(&self, policy: &Policy) -> bool {
        let tiers = self.policy.compiler.tiers();
        tiers.iter().any(|tier| tier.name == policy.tier && tier.default == vswitch_policy::TierDefault::Deny)
    }

    fn policy_info(&self, read: &Read, counts: &BTreeMap<u32, RuleCounters>) -> PolicyInfo {
        let mut info = PolicyInfo {
            name: name_of(&read.id),
            file: read.source.file.clone(),
            line: read.source.line,
            tier: None,
            order: None,
            subject: String::new(),
            ingress: None,
            egress: None,
            ports: 0,
            connections: 0,
            denied: 0,
        };
        match &read.object {
            Object::Policy(policy) => {
                info.tier = Some(policy.tier.clone());
                info.order = Some(policy.order);
                info.subject = subject_text(&policy.subject);
                info.ingress = policy.ingress.as_ref().map(Vec::len);
                info.egress = policy.egress.as_ref().map(Vec::len);
                info.ports = self.ports_of(&read.id).count();
                for id in self.policy.compiler.rules.of(&read.id) {
                    let count = counts.get(&id.0).copied().unwrap_or_default();
                    info.connections += count.connections;
                    info.denied += count.denied;
                }
            }
            Object::Tier(Tier { order, default, .. }) => {
                info.order = Some(*order);
                info.subject = format!("what no rule matches: {default:?}").to_lowercase();
            }
            Object::Namespace(labels) => info.subject = labels_text(labels),
            Object::Endpoint(endpoint) => info.subject = labels_text(&endpoint.facts.labels),
        }
        info
    }

    /// Ports here that a policy is about.
    fn ports_of<'a>(&'a self, id: &'a PolicyId) -> impl Iterator<Item = PortId> + 'a {
        self.desired.ports.keys().copied().filter(move |&port| {
            let sets =
                self.policy.port(port).map_or([None; 2], |(.., identity)| self.policy.compiler.sets_of(identity));
            let mut policies = sets.into_iter().flat_map(|set| self.policy.compiler.policies_of(set));
            policies.any(|one| one.policy.id == *id)
        })
    }

    /// What rules did, by number, without what others did before under the same one.
    pub(crate) fn rule_counts(&self, workers: &[WorkerSample]) -> BTreeMap<u32, RuleCounters> {
        let mut sums = sum_rules(workers);
        for (number, (connections, denied)) in &self.policy.baseline {
            if let Some(count) = sums.get_mut(number) {
                count.connections = count.connections.saturating_sub(*connections);
                count.denied = count.denied.saturating_sub(*denied);
            }
        }
        sums
    }

    fn count_of(
        &self,
        counts: &BTreeMap<u32, RuleCounters>,
        id: &PolicyId,
        direction: Direction,
        at: Option<usize>,
    ) -> (u64, u64) {
        let key = RuleKey { policy: id.clone(), direction, at };
        let found = self.policy.compiler.rules.find(&key).and_then(|RuleId(number)| counts.get(&number));
        found.map_or((0, 0), |count| (count.connections, count.denied))
    }

    fn object_id(&self, name: &ObjectName) -> Result<PolicyId, ApiError> {
        let kind = Kind::of(&name.kind).ok_or_else(|| {
            let kinds = Kind::ALL.map(Kind::name).join(", ");
            invalid(format!("kind: \"{}\" is not known here; known are {kinds}", name.kind))
        })?;
        let namespace = kind.is_namespaced().then(|| name.namespace.clone().unwrap_or_else(|| "default".to_owned()));
        let id = PolicyId { kind, namespace, name: name.name.clone() };
        if self.policy.objects.contains_key(&id) {
            return Ok(id);
        }
        Err(not_found(format!("no {id}: `switchctl policy list` shows them")))
    }

    fn is_news(&self, read: &Read) -> bool {
        let before = self.policy.objects.get(&read.id);
        before.is_none_or(|before| before.value != read.value || before.source != read.source)
    }

    fn change_objects(&mut self, add: Vec<Read>, remove: &[PolicyId], backend: &mut dyn Backend) {
        let network = self.desired.index_of_name();
        self.policy.change(add, remove, network);
        let renewed = std::mem::take(&mut self.policy.compiler.rules.renewed);
        if !renewed.is_empty() {
            // They count from here.
            let sums = sum_rules(&backend.sample());
            for RuleId(number) in renewed {
                let count = sums.get(&number).copied().unwrap_or_default();
                self.policy.baseline.insert(number, (count.connections, count.denied));
            }
        }
        self.mark(Dirty::Change);
    }

    /// This node's own addresses, as its kernel has them.
    pub fn set_host_addresses(&mut self, addresses: Vec<IpAddr>) {
        self.host_addresses = addresses;
        self.settle_host_addresses();
    }

    /// Whatever leads to this node's stack is this node.
    pub(crate) fn settle_host_addresses(&mut self) {
        let Some(network) = self.host_network() else { return };
        let own = crate::routes::routers(&network.spec);
        let index = network.index;
        let all = own.into_iter().chain(self.host_addresses.iter().copied());
        let all: BTreeSet<(NetworkIndex, IpAddr)> = all.map(|address| (index, address)).collect();
        if self.policy.set_host_addresses(all) {
            self.mark(Dirty::Change);
        }
    }
}

/// Names, labels and ports as Kubernetes has them.
fn check_endpoint(spec: &EndpointSpec) -> Result<(), ApiError> {
    let is_name = |name: &str| {
        let is_word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
        !name.is_empty() && name.len() <= 253 && name.chars().all(is_word)
    };
    let is_word = |word: &str| {
        let is_inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        word.len() <= 63 && word.chars().all(is_inner)
    };
    if let Some(name) = spec.namespace.iter().chain([&spec.name]).find(|name| !is_name(name)) {
        return Err(invalid(format!("name: \"{name}\" is no name: use lower case letters, digits, '-' and '.'")));
    }
    for (key, value) in &spec.labels {
        let name = key.rsplit('/').next().unwrap_or_default();
        if name.is_empty() || !is_word(name) || !is_word(value) || key.matches('/').count() > 1 {
            return Err(invalid(format!(
                "labels: \"{key}={value}\" is no label: use at most 63 letters, digits, '-', '_' and '.'"
            )));
        }
    }
    match spec.ports.iter().find(|port| port.port == 0 || !is_name(&port.name) || port.name.len() > 15) {
        Some(port) => Err(invalid(format!(
            "ports: \"{}={}\" is no named port: at most 15 lower case letters, digits and '-', and 1 to 65535",
            port.name, port.port
        ))),
        None => Ok(()),
    }
}

fn sum_rules(workers: &[WorkerSample]) -> BTreeMap<u32, RuleCounters> {
    let mut sums: BTreeMap<u32, RuleCounters> = BTreeMap::new();
    for worker in workers {
        let counted = worker.counters.rules.iter().enumerate().filter(|(_, count)| **count != RuleCounters::default());
        for (number, count) in counted {
            let sum = sums.entry(number as u32).or_default();
            sum.connections += count.connections;
            sum.denied += count.denied;
        }
    }
    sums
}

/// Whom a policy is about, in words.
pub(crate) fn subject_text(subject: &Subject) -> String {
    match subject {
        Subject::Host => "this node".to_owned(),
        Subject::Pods { namespaces, pods } => super::explain::pods_text(namespaces, pods),
    }
}

fn labels_text(labels: &vswitch_policy::Labels) -> String {
    let words: Vec<String> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    words.join(",")
}

pub(crate) fn action_name(action: Action) -> &'static str {
    match action {
        Action::Allow => "allow",
        Action::Deny => "deny",
        Action::Pass => "pass",
        Action::Log => "log",
    }
}

pub(crate) fn direction_name(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    }
}

/// No name that an object may have.
const FAILSAFE_NAME: &str = "(failsafe)";

/// The policy that keeps ports of this node open, whatever others say.
pub(crate) fn failsafe(Failsafe { inbound, outbound }: &Failsafe) -> Option<Policy> {
    let rules = |ports: &[(u8, u16)], field: &str| {
        let port =
            |&(protocol, port): &(u8, u16)| vswitch_policy::PortMatch::Ports { protocol, first: port, last: port };
        (!ports.is_empty()).then(|| {
            vec![vswitch_policy::Rule {
                name: Some("failsafe".to_owned()),
                line: 0,
                path: format!("policy.failsafe_{field}"),
                action: Action::Allow,
                peers: None,
                ports: Some(ports.iter().map(port).collect()),
            }]
        })
    };
    let (ingress, egress) = (rules(inbound, "inbound"), rules(outbound, "outbound"));
    (ingress.is_some() || egress.is_some()).then(|| Policy {
        id: PolicyId { kind: Kind::SwitchPolicy, namespace: None, name: FAILSAFE_NAME.to_owned() },
        source: vswitch_policy::Source { file: "the configuration".to_owned(), line: 0 },
        tier: super::compiler::FAILSAFE.to_owned(),
        order: 0,
        subject: Subject::Host,
        ingress,
        egress,
        applies_on_forward: false,
    })
}
