//! From policies and endpoints to tables, change by change.
//!
//! # What
//!
//! Three things are made once and shared. A *term* is a selector that some rule names as a peer. An *identity* is a set of
//! facts (namespace, labels, named ports) that some endpoint has; it knows the terms that mean it, and the policies
//! whose subject it is. A *class* is what identities look like to rules: the terms, and the named ports that rules ask for. The data
//! path knows classes only.
//!
//! # Why this way
//!
//! A change costs what it touches. New labels are looked at by every selector once; if no selector tells them from
//! the old ones, no table changes. A new policy looks at every identity once. Rows are made for the pairs of set and class
//! that a rule brings together, and for no others.
//!
//! # Cost
//!
//! A change of labels: one evaluation of every selector, and one row for each set that names one that changed. A
//! change of policy: one evaluation of its selectors for every identity, and its sets anew.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use vswitch_dataplane::table::policy::{Class, Classes, RuleId, Subject};
use vswitch_net::NetworkIndex;
use vswitch_policy::{
    Direction, EndpointFacts, Labels, NamedPort, NamespaceMatch, Peer, Policy, PolicyId, PortMatch, Selector, Tier,
    TierDefault, builtin_tiers,
};

use super::rules::{RuleKey, RuleNumbers};
use super::set::{Numbered, RowPeer, Set, SetKey};

/// The number of an identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IdentityId(pub u32);

/// Who has an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A pod, or another node.
    Identity(IdentityId),
    /// This node.
    Host,
}

/// The compiler.
#[derive(Debug, Default)]
pub struct Compiler {
    tiers: BTreeMap<String, Tier>,
    policies: BTreeMap<PolicyId, u32>,
    numbered: Slab<Arc<Numbered>>,
    namespaces: BTreeMap<String, Labels>,
    terms: Interner<Peer>,
    /// Names of ports that rules for egress ask for, and by how many rules.
    port_names: BTreeMap<String, usize>,
    identities: Slab<Identity>,
    by_facts: HashMap<EndpointFacts, IdentityId>,
    classes: Slab<ClassEntry>,
    by_looks: HashMap<Looks, u32>,
    sets: Slab<Set>,
    by_key: HashMap<SetKey, u32>,
    /// Sets that name a term.
    sets_of_term: HashMap<u32, BTreeSet<u32>>,
    classes_of_term: HashMap<u32, BTreeSet<u32>>,
    addresses: BTreeMap<(NetworkIndex, IpAddr), Owner>,
    /// Sets of this node's own stack: ingress, egress, and the same for what it forwards.
    host_sets: [Option<u32>; 4],
    table: Classes,
    pub(crate) rules: RuleNumbers,
}

#[derive(Debug)]
struct Identity {
    facts: EndpointFacts,
    users: usize,
    terms: BTreeSet<u32>,
    /// Policies whose subject it is.
    policies: BTreeSet<u32>,
    class: u32,
    /// Ingress, then egress.
    sets: [Option<u32>; 2],
}

/// What an identity looks like to rules.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Looks {
    is_pod: bool,
    terms: Vec<u32>,
    ports: Vec<NamedPort>,
}

#[derive(Debug)]
struct ClassEntry {
    looks: Looks,
    users: usize,
    addresses: BTreeSet<(NetworkIndex, IpAddr)>,
}

/// The tier of the ports that no policy closes.
pub(crate) const FAILSAFE: &str = "failsafe";

const DIRECTIONS: [Direction; 2] = [Direction::Ingress, Direction::Egress];

/// The one class of this node's own addresses.
const HOST_CLASS: Class = Class(Class::HOST);

impl Compiler {
    /// A compiler without policies.
    pub fn new() -> Compiler {
        Compiler { tiers: all_tiers(Vec::new()), ..Compiler::default() }
    }

    /// The table of classes.
    pub fn classes(&self) -> &Classes {
        &self.table
    }

    /// Rules have numbers below this.
    pub fn rule_limit(&self) -> u32 {
        self.rules.limit()
    }

    /// The tiers, in order.
    pub fn tiers(&self) -> Vec<&Tier> {
        let mut tiers: Vec<&Tier> = self.tiers.values().collect();
        tiers.sort_by(|one, other| (one.order, &one.name).cmp(&(other.order, &other.name)));
        tiers
    }

    /// Takes policies away and puts others in; `tiers` are all tiers that are not always there, by name. A policy whose tier is
    /// not known is the caller's to refuse.
    pub fn change(&mut self, remove: &[PolicyId], add: Vec<Policy>, tiers: Vec<Tier>) {
        let mut gone = Vec::new();
        for id in remove.iter().chain(add.iter().map(|policy| &policy.id)) {
            if let Some(number) = self.policies.remove(id) {
                gone.push(number);
            }
        }
        let mut added: Vec<Policy> = add;
        if tiers != self.own_tiers() {
            // All policies take their places anew.
            for (id, number) in std::mem::take(&mut self.policies) {
                if let Some(numbered) = self.numbered.get(number) {
                    debug_assert_eq!(numbered.policy.id, id);
                    added.push(numbered.policy.clone());
                }
                gone.push(number);
            }
            self.tiers = all_tiers(tiers);
        }
        let mut terms = Vec::new();
        let mut names_changed = false;
        let mut numbers = Vec::new();
        for policy in added {
            names_changed |= self.count_names(&policy, true);
            for peer in peers(&policy) {
                if let Some(term) = self.terms.acquire(peer) {
                    terms.push(term);
                }
            }
            numbers.push(self.number(policy));
        }
        self.look_at_identities(&gone, &numbers, &terms);
        for number in gone {
            let Some(numbered) = self.numbered.remove(number) else { continue };
            let policy = &numbered.policy;
            names_changed |= self.count_names(policy, false);
            for peer in peers(policy) {
                if let Some(term) = self.terms.release(peer) {
                    self.forget_term(term);
                }
            }
            match self.policies.get(&policy.id).and_then(|&number| self.numbered.get(number)) {
                None => self.rules.retain(&policy.id, |_| false),
                Some(now) => {
                    let now = now.clone();
                    let lengths = now.rules.each_ref().map(Vec::len);
                    let direction = |key: &RuleKey| usize::from(key.direction == Direction::Egress);
                    self.rules.retain(&policy.id, |key| key.at.is_none_or(|at| at < lengths[direction(key)]));
                }
            }
        }
        if names_changed {
            let all: Vec<u32> = self.identities.keys().collect();
            all.into_iter().for_each(|identity| self.settle_class(identity));
        }
    }

    /// Tiers that are not always there.
    pub fn own_tiers(&self) -> Vec<Tier> {
        let builtin = builtin_tiers();
        let is_own = |tier: &&Tier| tier.name != FAILSAFE && !builtin.iter().any(|other| other.name == tier.name);
        self.tiers.values().filter(is_own).cloned().collect()
    }

    /// A policy.
    pub fn policy(&self, id: &PolicyId) -> Option<&Policy> {
        Some(&self.numbered.get(*self.policies.get(id)?)?.policy)
    }

    /// Names or renames a namespace's labels. None takes them away: a namespace that nobody has described has its name only.
    pub fn set_namespace(&mut self, name: &str, labels: Option<Labels>) {
        let before = self.namespace_labels(name);
        match labels {
            Some(labels) => self.namespaces.insert(name.to_owned(), labels),
            None => self.namespaces.remove(name),
        };
        if self.namespace_labels(name) == before {
            return;
        }
        let of_namespace: Vec<u32> = self
            .identities
            .iter()
            .filter(|(_, identity)| identity.facts.namespace.as_deref() == Some(name))
            .map(|(number, _)| number)
            .collect();
        of_namespace.into_iter().for_each(|identity| self.look_at(identity));
    }

    /// The labels of a namespace.
    pub fn namespace_labels(&self, name: &str) -> Labels {
        let own = self.namespaces.get(name).cloned();
        own.unwrap_or_else(|| Labels::from([("kubernetes.io/metadata.name".to_owned(), name.to_owned())]))
    }

    /// The identity of facts; it lives until it was released as often.
    pub fn acquire(&mut self, facts: &EndpointFacts) -> IdentityId {
        if let Some(&known) = self.by_facts.get(facts) {
            if let Some(identity) = self.identities.get_mut(known.0) {
                identity.users += 1;
            }
            return known;
        }
        let identity = Identity {
            facts: facts.clone(),
            users: 1,
            terms: BTreeSet::new(),
            policies: BTreeSet::new(),
            class: u32::MAX,
            sets: [None; 2],
        };
        let number = self.identities.insert(identity);
        self.by_facts.insert(facts.clone(), IdentityId(number));
        self.look_at(number);
        IdentityId(number)
    }

    /// Gives an identity back.
    pub fn release(&mut self, id: IdentityId) {
        let Some(identity) = self.identities.get_mut(id.0) else { return };
        identity.users -= 1;
        if identity.users > 0 {
            return;
        }
        let Some(identity) = self.identities.remove(id.0) else { return };
        self.by_facts.remove(&identity.facts);
        self.leave_class(identity.class);
        identity.sets.into_iter().flatten().for_each(|set| self.leave_set(set));
    }

    /// The facts of an identity.
    pub fn facts(&self, id: IdentityId) -> Option<&EndpointFacts> {
        self.identities.get(id.0).map(|identity| &identity.facts)
    }

    /// How many identities there are.
    pub fn identities(&self) -> usize {
        self.identities.len()
    }

    /// What the data path is to hold against connections of an identity.
    pub fn subject(&self, id: IdentityId) -> Subject {
        let sets = self.identities.get(id.0).map_or([None; 2], |identity| identity.sets);
        self.subject_of(sets)
    }

    /// The same for this node's own stack.
    pub fn host_subject(&self) -> Subject {
        let [ingress, egress, forwarded_in, forwarded_out] = self.host_sets;
        let own = self.subject_of([ingress, egress]);
        let forwarded = self.subject_of([forwarded_in, forwarded_out]);
        let is_any = self.host_sets.iter().any(Option::is_some);
        Subject { forwarded: is_any.then(|| Arc::new(forwarded)), ..own }
    }

    /// Makes an address somebody's, or nobody's.
    pub fn set_address(&mut self, network: NetworkIndex, address: IpAddr, owner: Option<Owner>) {
        let key = (network, address);
        let before = match owner {
            Some(owner) => self.addresses.insert(key, owner),
            None => self.addresses.remove(&key),
        };
        if before == owner {
            return;
        }
        if let Some(class) = self.class_of_owner(before).and_then(|class| self.classes.get_mut(class)) {
            class.addresses.remove(&key);
        }
        match owner {
            None => self.table.remove(network, address),
            Some(Owner::Host) => self.table.insert(network, address, HOST_CLASS),
            Some(Owner::Identity(id)) => {
                let Some(class) = self.identities.get(id.0).map(|identity| identity.class) else { return };
                self.enter_address(class, key);
            }
        }
    }

    /// Who has an address.
    pub fn owner(&self, network: NetworkIndex, address: IpAddr) -> Option<Owner> {
        self.addresses.get(&(network, address)).copied()
    }

    /// Sets, rows that they have of their own, and classes.
    pub fn sizes(&self) -> (usize, usize, usize) {
        (self.sets.len(), self.sets.iter().map(|(_, set)| set.len()).sum(), self.classes.len())
    }

    /// The policies of a subject in one direction, in order; none of the facts are looked at again.
    pub(crate) fn policies_of(&self, set: Option<u32>) -> Vec<&Numbered> {
        let key = set.and_then(|set| self.sets.get(set)).map(Set::key);
        let numbers = key.into_iter().flat_map(|key| key.policies.iter());
        numbers.filter_map(|&number| self.numbered.get(number).map(Arc::as_ref)).collect()
    }

    /// The sets of an identity: ingress, then egress.
    pub(crate) fn sets_of(&self, id: IdentityId) -> [Option<u32>; 2] {
        self.identities.get(id.0).map_or([None; 2], |identity| identity.sets)
    }

    pub(crate) fn host_sets(&self) -> [Option<u32>; 4] {
        self.host_sets
    }

    fn subject_of(&self, [ingress, egress]: [Option<u32>; 2]) -> Subject {
        let table = |set: Option<u32>| set.and_then(|set| self.sets.get(set)).map(|set| set.table.clone());
        Subject { ingress: table(ingress), egress: table(egress), forwarded: None }
    }

    /// Gives a policy and its rules numbers.
    fn number(&mut self, policy: Policy) -> u32 {
        let rules = DIRECTIONS.map(|direction| {
            let count = policy.rules(direction).map_or(0, <[_]>::len);
            let key = |at| RuleKey { policy: policy.id.clone(), direction, at };
            (0..count).map(|at| self.rules.number(&key(Some(at)))).collect::<Vec<RuleId>>()
        });
        let defaults =
            DIRECTIONS.map(|direction| self.rules.number(&RuleKey { policy: policy.id.clone(), direction, at: None }));
        let tier = self.tiers.get(&policy.tier);
        let id = policy.id.clone();
        let numbered = Numbered {
            tier_order: tier.map_or(0, |tier| tier.order),
            tier_default: tier.map_or(TierDefault::Deny, |tier| tier.default),
            policy,
            rules,
            defaults,
        };
        let number = self.numbered.insert(Arc::new(numbered));
        self.policies.insert(id, number);
        number
    }

    /// Counts the names of ports that rules for egress ask for; true if there is one more or one less.
    fn count_names(&mut self, policy: &Policy, is_added: bool) -> bool {
        let ports = policy.egress.iter().flatten().flat_map(|rule| rule.ports.iter().flatten());
        let mut is_changed = false;
        for port in ports {
            let PortMatch::Named { name, .. } = port else { continue };
            let count = self.port_names.entry(name.clone()).or_default();
            *count = if is_added { *count + 1 } else { count.saturating_sub(1) };
            is_changed |= *count == usize::from(is_added);
            if *count == 0 {
                self.port_names.remove(name);
            }
        }
        is_changed
    }

    /// Has all identities look at policies that went or came, and at selectors that came.
    fn look_at_identities(&mut self, gone: &[u32], come: &[u32], terms: &[u32]) {
        let all: Vec<u32> = self.identities.keys().collect();
        let come: Vec<(u32, Arc<Numbered>)> =
            come.iter().filter_map(|&number| Some((number, self.numbered.get(number)?.clone()))).collect();
        let terms: Vec<(u32, Peer)> =
            terms.iter().filter_map(|&term| Some((term, self.terms.get(term)?.clone()))).collect();
        for number in all {
            let Some(identity) = self.identities.get(number) else { continue };
            let labels = self.labels_around(&identity.facts);
            let facts = &identity.facts;
            let new_policies: Vec<u32> = come
                .iter()
                .filter(|(_, one)| one.policy.subject.selects(facts, &labels))
                .map(|(number, _)| *number)
                .collect();
            let new_terms: Vec<u32> =
                terms.iter().filter(|(_, peer)| peer.selects(facts, &labels)).map(|(term, _)| *term).collect();
            let is_left = gone.iter().any(|gone| identity.policies.contains(gone));
            if new_policies.is_empty() && new_terms.is_empty() && !is_left {
                continue;
            }
            let Some(identity) = self.identities.get_mut(number) else { continue };
            identity.policies.retain(|policy| !gone.contains(policy));
            identity.policies.extend(&new_policies);
            identity.terms.extend(&new_terms);
            if !new_terms.is_empty() {
                self.settle_class(number);
            }
            if is_left || !new_policies.is_empty() {
                self.settle_sets(number);
            }
        }
        self.settle_host();
    }

    /// Looks at an identity from scratch.
    fn look_at(&mut self, number: u32) {
        let Some(identity) = self.identities.get(number) else { return };
        let labels = self.labels_around(&identity.facts);
        let facts = &identity.facts;
        let terms = self.terms.iter().filter(|(_, peer)| peer.selects(facts, &labels)).map(|(term, _)| term).collect();
        let selected = self.numbered.iter().filter(|(_, one)| one.policy.subject.selects(facts, &labels));
        let policies = selected.map(|(number, _)| number).collect();
        if let Some(identity) = self.identities.get_mut(number) {
            (identity.terms, identity.policies) = (terms, policies);
        }
        self.settle_class(number);
        self.settle_sets(number);
    }

    fn labels_around(&self, facts: &EndpointFacts) -> Labels {
        facts.namespace.as_ref().map(|namespace| self.namespace_labels(namespace)).unwrap_or_default()
    }

    /// Puts an identity into the class of what it looks like.
    fn settle_class(&mut self, number: u32) {
        let Some(identity) = self.identities.get(number) else { return };
        let asked = |port: &&NamedPort| self.port_names.contains_key(&port.name);
        let looks = Looks {
            is_pod: identity.facts.namespace.is_some(),
            terms: identity.terms.iter().copied().collect(),
            ports: identity.facts.ports.iter().filter(asked).cloned().collect(),
        };
        let before = identity.class;
        if self.classes.get(before).is_some_and(|class| class.looks == looks) {
            return;
        }
        let class = match self.by_looks.get(&looks) {
            Some(&known) => known,
            None => self.make_class(looks),
        };
        if let Some(entry) = self.classes.get_mut(class) {
            entry.users += 1;
        }
        if let Some(identity) = self.identities.get_mut(number) {
            identity.class = class;
        }
        // Its addresses go with it.
        let owner = Owner::Identity(IdentityId(number));
        let of_before = self.classes.get(before).map(|class| class.addresses.clone()).unwrap_or_default();
        for key in of_before {
            if self.addresses.get(&key) == Some(&owner) {
                if let Some(class) = self.classes.get_mut(before) {
                    class.addresses.remove(&key);
                }
                self.enter_address(class, key);
            }
        }
        self.leave_class(before);
    }

    fn make_class(&mut self, looks: Looks) -> u32 {
        let entry = ClassEntry { looks: looks.clone(), users: 0, addresses: BTreeSet::new() };
        let class = self.classes.insert(entry);
        for &term in &looks.terms {
            self.classes_of_term.entry(term).or_default().insert(class);
        }
        self.by_looks.insert(looks, class);
        class
    }

    /// An address of a class: sets that name one of its terms get a row for it.
    fn enter_address(&mut self, class: u32, key: (NetworkIndex, IpAddr)) {
        let Some(entry) = self.classes.get_mut(class) else { return };
        entry.addresses.insert(key);
        let number = class_number(class, entry);
        let looks = entry.looks.clone();
        self.table.insert(key.0, key.1, number);
        let sets: BTreeSet<u32> =
            looks.terms.iter().filter_map(|term| self.sets_of_term.get(term)).flatten().copied().collect();
        for set in sets {
            if let Some(set) = self.sets.get_mut(set) {
                let zone = set.zone(key.1);
                set.ensure(RowPeer { class: number, terms: &looks.terms, ports: &looks.ports, zone });
            }
        }
        if !looks.ports.is_empty() {
            // Rules for everybody may ask for names of ports.
            self.name_ports(number, &looks, key.1);
        }
    }

    /// Rows of a class whose ports have names, in all sets whose rules may ask for them.
    fn name_ports(&mut self, number: Class, looks: &Looks, address: IpAddr) {
        for (_, set) in self.sets.iter_mut() {
            if set.asks_for_names() {
                let zone = set.zone(address);
                set.ensure(RowPeer { class: number, terms: &looks.terms, ports: &looks.ports, zone });
            }
        }
    }

    fn leave_class(&mut self, class: u32) {
        let Some(entry) = self.classes.get_mut(class) else { return };
        entry.users -= 1;
        if entry.users > 0 {
            return;
        }
        let Some(entry) = self.classes.remove(class) else { return };
        self.by_looks.remove(&entry.looks);
        let number = class_number(class, &entry);
        let mut sets = BTreeSet::new();
        for term in &entry.looks.terms {
            if let Some(classes) = self.classes_of_term.get_mut(term) {
                classes.remove(&class);
            }
            sets.extend(self.sets_of_term.get(term).into_iter().flatten().copied());
        }
        if !entry.looks.ports.is_empty() {
            sets.extend(self.sets.iter().filter(|(_, set)| set.asks_for_names()).map(|(number, _)| number));
        }
        for set in sets {
            if let Some(set) = self.sets.get_mut(set) {
                set.remove(number);
            }
        }
    }

    /// No rule names it any more. Identities forget it, and may look like others now.
    fn forget_term(&mut self, term: u32) {
        let all: Vec<u32> = self
            .identities
            .iter_mut()
            .filter_map(|(number, identity)| identity.terms.remove(&term).then_some(number))
            .collect();
        all.into_iter().for_each(|identity| self.settle_class(identity));
        self.classes_of_term.remove(&term);
        self.sets_of_term.remove(&term);
    }

    /// Gives an identity the sets of its policies.
    fn settle_sets(&mut self, number: u32) {
        for (at, direction) in DIRECTIONS.into_iter().enumerate() {
            let Some(identity) = self.identities.get(number) else { return };
            let policies: Vec<u32> = identity.policies.iter().copied().collect();
            let key = self.set_key(direction, policies, &identity.facts.ports);
            let before = identity.sets[at];
            let now = key.map(|key| self.enter_set(key));
            if let Some(identity) = self.identities.get_mut(number) {
                identity.sets[at] = now;
            }
            before.into_iter().for_each(|set| self.leave_set(set));
        }
    }

    /// The sets of this node's own stack.
    fn settle_host(&mut self) {
        let of_host = |is_forwarded: bool| {
            let is_meant = move |policy: &Policy| {
                policy.subject == vswitch_policy::Subject::Host && (!is_forwarded || policy.applies_on_forward)
            };
            self.numbered.iter().filter(move |(_, one)| is_meant(&one.policy)).map(|(number, _)| number)
        };
        // What is about to go is not among those that have names.
        let live: BTreeSet<u32> = self.policies.values().copied().collect();
        let wanted = [false, true].map(|is_forwarded| {
            let mut all: Vec<u32> = of_host(is_forwarded).filter(|number| live.contains(number)).collect();
            let is_failsafe = |number: &u32| self.numbered.get(*number).is_some_and(|one| one.policy.tier == FAILSAFE);
            if all.iter().all(is_failsafe) {
                // There is nothing that it must be safe from.
                all.clear();
            }
            DIRECTIONS.map(|direction| self.set_key(direction, all.clone(), &[]))
        });
        let before = self.host_sets;
        let [[ingress, egress], [forwarded_in, forwarded_out]] = wanted;
        self.host_sets = [ingress, egress, forwarded_in, forwarded_out].map(|key| key.map(|key| self.enter_set(key)));
        before.into_iter().flatten().for_each(|set| self.leave_set(set));
    }

    /// The key of a set; none if no policy speaks of the direction.
    fn set_key(&self, direction: Direction, policies: Vec<u32>, ports: &[NamedPort]) -> Option<SetKey> {
        let mut ordered: Vec<(i64, &str, i64, &PolicyId, u32)> = Vec::new();
        let mut names = BTreeSet::new();
        for number in policies {
            let Some(one) = self.numbered.get(number) else { continue };
            let Some(rules) = one.policy.rules(direction) else { continue };
            ordered.push((one.tier_order, &one.policy.tier, one.policy.order, &one.policy.id, number));
            for port in rules.iter().flat_map(|rule| rule.ports.iter().flatten()) {
                if let PortMatch::Named { name, .. } = port {
                    names.insert(name.as_str());
                }
            }
        }
        if ordered.is_empty() {
            return None;
        }
        ordered.sort();
        let is_asked = |port: &&NamedPort| direction == Direction::Ingress && names.contains(port.name.as_str());
        Some(SetKey {
            direction,
            policies: ordered.into_iter().map(|(.., number)| number).collect(),
            ports: ports.iter().filter(is_asked).cloned().collect(),
        })
    }

    fn enter_set(&mut self, key: SetKey) -> u32 {
        let number = match self.by_key.get(&key) {
            Some(&known) => known,
            None => self.make_set(key),
        };
        if let Some(set) = self.sets.get_mut(number) {
            set.users += 1;
        }
        number
    }

    fn make_set(&mut self, key: SetKey) -> u32 {
        let policies = key.policies.iter().filter_map(|&number| self.numbered.get(number).cloned()).collect();
        let everybody =
            Peer::Pods { namespaces: NamespaceMatch::Labels(Selector::default()), pods: Selector::default() };
        let universal: Vec<u32> = self.terms.number(&everybody).into_iter().collect();
        let terms = &self.terms;
        let mut set = Set::new(key.clone(), policies, |peer| terms.number(peer), &universal);
        // Those that only "every pod" means have the usual row.
        let named: Vec<u32> = set.terms().filter(|term| !universal.contains(term)).collect();
        let mut classes: BTreeSet<u32> =
            named.iter().filter_map(|term| self.classes_of_term.get(term)).flatten().copied().collect();
        if set.asks_for_names() {
            classes.extend(self.classes.iter().filter(|(_, class)| !class.looks.ports.is_empty()).map(|(at, _)| at));
        }
        for class in classes {
            let Some(entry) = self.classes.get(class) else { continue };
            let zones: BTreeSet<u32> = entry.addresses.iter().map(|(_, address)| set.zone(*address)).collect();
            let number = class_number(class, entry);
            let Looks { terms, ports, .. } = &entry.looks;
            zones.into_iter().for_each(|zone| set.ensure(RowPeer { class: number, terms, ports, zone }));
        }
        let number = self.sets.insert(set);
        for term in named {
            self.sets_of_term.entry(term).or_default().insert(number);
        }
        self.by_key.insert(key, number);
        number
    }

    fn leave_set(&mut self, number: u32) {
        let Some(set) = self.sets.get_mut(number) else { return };
        set.users -= 1;
        if set.users > 0 {
            return;
        }
        let Some(set) = self.sets.remove(number) else { return };
        self.by_key.remove(set.key());
        for term in set.terms() {
            if let Some(sets) = self.sets_of_term.get_mut(&term) {
                sets.remove(&number);
            }
        }
    }

    fn class_of_owner(&self, owner: Option<Owner>) -> Option<u32> {
        match owner? {
            Owner::Identity(id) => self.identities.get(id.0).map(|identity| identity.class),
            Owner::Host => None,
        }
    }
}

/// Tiers by name, with those that are always there and the one of the ports that no policy closes.
fn all_tiers(own: Vec<Tier>) -> BTreeMap<String, Tier> {
    let failsafe = Tier { name: FAILSAFE.to_owned(), order: i64::MIN, default: TierDefault::Pass };
    let tiers = builtin_tiers().into_iter().chain([failsafe]).chain(own);
    tiers.map(|tier| (tier.name.clone(), tier)).collect()
}

/// The number of a class in the data path.
fn class_number(class: u32, entry: &ClassEntry) -> Class {
    // Zero is nobody's.
    Class((class + 1) | if entry.looks.is_pod { Class::POD } else { 0 })
}

/// All peers of a policy that are no prefixes.
fn peers(policy: &Policy) -> impl Iterator<Item = &Peer> {
    let rules = policy.ingress.iter().flatten().chain(policy.egress.iter().flatten());
    let peers = rules.flat_map(|rule| rule.peers.iter().flatten());
    peers.filter(|peer| !matches!(peer, Peer::Cidr { .. }))
}

/// Values by number; numbers of values that are gone are given out again.
#[derive(Debug)]
struct Slab<T> {
    items: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Slab { items: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slab<T> {
    fn insert(&mut self, item: T) -> u32 {
        match self.free.pop() {
            Some(number) => {
                self.items[number as usize] = Some(item);
                number
            }
            None => {
                self.items.push(Some(item));
                self.items.len() as u32 - 1
            }
        }
    }

    fn remove(&mut self, number: u32) -> Option<T> {
        let item = self.items.get_mut(number as usize)?.take()?;
        self.free.push(number);
        Some(item)
    }

    fn get(&self, number: u32) -> Option<&T> {
        self.items.get(number as usize)?.as_ref()
    }

    fn get_mut(&mut self, number: u32) -> Option<&mut T> {
        self.items.get_mut(number as usize)?.as_mut()
    }

    fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.items.iter().enumerate().filter_map(|(at, item)| Some((at as u32, item.as_ref()?)))
    }

    fn iter_mut(&mut self) -> impl Iterator<Item = (u32, &mut T)> {
        self.items.iter_mut().enumerate().filter_map(|(at, item)| Some((at as u32, item.as_mut()?)))
    }

    fn keys(&self) -> impl Iterator<Item = u32> {
        self.iter().map(|(number, _)| number)
    }

    fn len(&self) -> usize {
        self.items.len() - self.free.len()
    }
}

/// Values that are shared, by number.
#[derive(Debug)]
struct Interner<T> {
    items: Slab<(T, usize)>,
    numbers: HashMap<T, u32>,
}

impl<T> Default for Interner<T> {
    fn default() -> Self {
        Interner { items: Slab::default(), numbers: HashMap::new() }
    }
}

impl<T: Clone + Eq + std::hash::Hash> Interner<T> {
    /// One more user; the number, if the value is new.
    fn acquire(&mut self, value: &T) -> Option<u32> {
        if let Some(&number) = self.numbers.get(value) {
            if let Some((_, users)) = self.items.get_mut(number) {
                *users += 1;
            }
            return None;
        }
        let number = self.items.insert((value.clone(), 1));
        self.numbers.insert(value.clone(), number);
        Some(number)
    }

    /// One user less; the number, if it was the last.
    fn release(&mut self, value: &T) -> Option<u32> {
        let number = *self.numbers.get(value)?;
        let (_, users) = self.items.get_mut(number)?;
        *users -= 1;
        if *users > 0 {
            return None;
        }
        self.items.remove(number);
        self.numbers.remove(value);
        Some(number)
    }

    fn number(&self, value: &T) -> Option<u32> {
        self.numbers.get(value).copied()
    }

    fn get(&self, number: u32) -> Option<&T> {
        self.items.get(number).map(|(value, _)| value)
    }

    fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.items.iter().map(|(number, (value, _))| (number, value))
    }
}
