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
    Direction, EndpointFacts, Labels, NamedPort, Peer, Policy, PolicyId, PortMatch, Tier, TierDefault, builtin_tiers,
};

use super::anchor::{Anchors, Filed};
use super::rules::{RuleKey, RuleNumbers};
use super::set::{Numbered, Set, SetKey};
use super::slab::{Interner, Slab};

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
    pub(super) tiers: BTreeMap<String, Tier>,
    pub(super) policies: BTreeMap<PolicyId, u32>,
    pub(super) numbered: Slab<Arc<Numbered>>,
    pub(super) namespaces: BTreeMap<String, Labels>,
    pub(super) terms: Interner<Peer>,
    /// Terms, policies by their subjects, and identities, by what they ask for or have.
    pub(super) filed_terms: Filed,
    pub(super) filed_policies: Filed,
    pub(super) filed_identities: Filed,
    /// Names of ports that rules for egress ask for, and by how many rules.
    pub(super) port_names: BTreeMap<String, usize>,
    pub(super) identities: Slab<Identity>,
    pub(super) by_facts: HashMap<EndpointFacts, IdentityId>,
    pub(super) classes: Slab<ClassEntry>,
    pub(super) by_looks: HashMap<Looks, u32>,
    pub(super) sets: Slab<Set>,
    pub(super) by_key: HashMap<SetKey, u32>,
    /// Sets that name a term.
    pub(super) sets_of_term: HashMap<u32, BTreeSet<u32>>,
    pub(super) classes_of_term: HashMap<u32, BTreeSet<u32>>,
    pub(super) addresses: BTreeMap<(NetworkIndex, IpAddr), Owner>,
    /// Sets of this node's own stack: ingress, egress, and the same for what it forwards.
    pub(super) host_sets: [Option<u32>; 4],
    /// The node that this one is.
    pub(super) host_node: Option<IdentityId>,
    pub(super) table: Classes,
    pub(crate) rules: RuleNumbers,
}

#[derive(Debug)]
pub(super) struct Identity {
    pub(super) facts: EndpointFacts,
    pub(super) users: usize,
    pub(super) terms: BTreeSet<u32>,
    /// Policies whose subject it is.
    pub(super) policies: BTreeSet<u32>,
    pub(super) class: u32,
    pub(super) addresses: BTreeSet<(NetworkIndex, IpAddr)>,
    /// Ingress, then egress.
    pub(super) sets: [Option<u32>; 2],
}

/// What an identity looks like to rules.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Looks {
    pub(super) is_pod: bool,
    pub(super) terms: Vec<u32>,
    pub(super) ports: Vec<NamedPort>,
}

#[derive(Debug)]
pub(super) struct ClassEntry {
    pub(super) looks: Looks,
    /// The identities that look like this.
    pub(super) identities: BTreeSet<u32>,
}

/// The tier of the ports that no policy closes.
pub(crate) const FAILSAFE: &str = "failsafe";

pub(super) const DIRECTIONS: [Direction; 2] = [Direction::Ingress, Direction::Egress];

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
                    self.filed_terms.insert(&Anchors::of_peer(peer), term);
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
            self.filed_policies.remove(&Anchors::of_subject(&policy.subject), number);
            for peer in peers(policy) {
                if let Some(term) = self.terms.release(peer) {
                    self.filed_terms.remove(&Anchors::of_peer(peer), term);
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
        if self.host_node.is_some() {
            self.settle_host_rows();
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
        let after = self.namespace_labels(name);
        if after == before {
            return;
        }
        let of_namespace: Vec<(u32, EndpointFacts)> = self
            .identities
            .iter()
            .filter(|(_, identity)| identity.facts.namespace.as_deref() == Some(name))
            .map(|(number, identity)| (number, identity.facts.clone()))
            .collect();
        for (number, facts) in of_namespace {
            self.filed_identities.remove(&Anchors::of_endpoint(&facts, &before), number);
            self.filed_identities.insert(&Anchors::of_endpoint(&facts, &after), number);
            self.look_at(number);
        }
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
            addresses: BTreeSet::new(),
            sets: [None; 2],
        };
        let number = self.identities.insert(identity);
        self.by_facts.insert(facts.clone(), IdentityId(number));
        let labels = self.labels_around(facts);
        self.filed_identities.insert(&Anchors::of_endpoint(facts, &labels), number);
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
        let labels = self.labels_around(&identity.facts);
        self.filed_identities.remove(&Anchors::of_endpoint(&identity.facts, &labels), id.0);
        self.by_facts.remove(&identity.facts);
        self.leave_class(identity.class, id.0);
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
        if let Some(Owner::Identity(before)) = before
            && let Some(identity) = self.identities.get_mut(before.0)
        {
            identity.addresses.remove(&key);
        }
        match owner {
            None => self.table.remove(network, address),
            Some(Owner::Host) => self.table.insert(network, address, HOST_CLASS),
            Some(Owner::Identity(id)) => {
                let Some(identity) = self.identities.get_mut(id.0) else { return };
                identity.addresses.insert(key);
                let class = identity.class;
                self.enter_address(class, key);
            }
        }
    }

    /// Says which node this one is, for rules that select nodes.
    pub fn set_host_node(&mut self, node: Option<IdentityId>) {
        if self.host_node != node {
            self.host_node = node;
            self.settle_host_rows();
        }
    }

    /// Who has an address.
    pub fn owner(&self, network: NetworkIndex, address: IpAddr) -> Option<Owner> {
        self.addresses.get(&(network, address)).copied()
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
        let anchors = Anchors::of_subject(&policy.subject);
        let numbered = Numbered {
            tier_order: tier.map_or(0, |tier| tier.order),
            tier_default: tier.map_or(TierDefault::Deny, |tier| tier.default),
            policy,
            rules,
            defaults,
        };
        let number = self.numbered.insert(Arc::new(numbered));
        self.filed_policies.insert(&anchors, number);
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
}

/// Tiers by name, with those that are always there and the one of the ports that no policy closes.
fn all_tiers(own: Vec<Tier>) -> BTreeMap<String, Tier> {
    let failsafe = Tier { name: FAILSAFE.to_owned(), order: i64::MIN, default: TierDefault::Pass };
    let tiers = builtin_tiers().into_iter().chain([failsafe]).chain(own);
    tiers.map(|tier| (tier.name.clone(), tier)).collect()
}

/// All peers of a policy that are no prefixes.
fn peers(policy: &Policy) -> impl Iterator<Item = &Peer> {
    let rules = policy.ingress.iter().flatten().chain(policy.egress.iter().flatten());
    let peers = rules.flat_map(|rule| rule.peers.iter().flatten());
    peers.filter(|peer| !matches!(peer, Peer::Cidr { .. }))
}
