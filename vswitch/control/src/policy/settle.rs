//! The compiler's inside: whatever changed, identities settle into classes and sets, and sets get their rows.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use vswitch_dataplane::table::policy::Class;
use vswitch_net::NetworkIndex;
use vswitch_policy::{
    Direction, EndpointFacts, Labels, NamedPort, NamespaceMatch, Peer, Policy, PolicyId, PortMatch, Selector, Subject,
};

use super::anchor::Anchors;
use super::compiler::{ClassEntry, Compiler, DIRECTIONS, FAILSAFE, Looks};
use super::set::{RowPeer, Set, SetKey};

/// What is new for an identity.
#[derive(Debug, Default)]
struct Changes {
    policies: Vec<u32>,
    terms: Vec<u32>,
    is_left: bool,
}

impl Compiler {
    /// Has identities look at policies that went or came, and at selectors that came: those that may be meant.
    pub(super) fn look_at_identities(&mut self, gone: &[u32], come: &[u32], terms: &[u32]) {
        let mut changes: BTreeMap<u32, Changes> = BTreeMap::new();
        for &number in come {
            let Some(one) = self.numbered.get(number).cloned() else { continue };
            for identity in self.filed_identities.under(&Anchors::of_subject(&one.policy.subject)) {
                if self.is_meant(identity, |facts, labels| one.policy.subject.selects(facts, labels)) {
                    changes.entry(identity).or_default().policies.push(number);
                }
            }
        }
        for &term in terms {
            let Some(peer) = self.terms.get(term).cloned() else { continue };
            for identity in self.filed_identities.under(&Anchors::of_peer(&peer)) {
                if self.is_meant(identity, |facts, labels| peer.selects(facts, labels)) {
                    changes.entry(identity).or_default().terms.push(term);
                }
            }
        }
        for &number in gone {
            let Some(one) = self.numbered.get(number) else { continue };
            let candidates = self.filed_identities.under(&Anchors::of_subject(&one.policy.subject));
            for identity in candidates {
                if self.identities.get(identity).is_some_and(|identity| identity.policies.contains(&number)) {
                    changes.entry(identity).or_default().is_left = true;
                }
            }
        }
        let gone: BTreeSet<u32> = gone.iter().copied().collect();
        for (number, Changes { policies, terms, is_left }) in changes {
            let Some(identity) = self.identities.get_mut(number) else { continue };
            identity.policies.retain(|policy| !gone.contains(policy));
            identity.policies.extend(&policies);
            identity.terms.extend(&terms);
            if !terms.is_empty() {
                self.settle_class(number);
            }
            if is_left || !policies.is_empty() {
                self.settle_sets(number);
            }
        }
        self.settle_host();
    }

    fn is_meant(&self, identity: u32, selects: impl Fn(&EndpointFacts, &Labels) -> bool) -> bool {
        let facts = self.identities.get(identity).map(|identity| &identity.facts);
        facts.is_some_and(|facts| selects(facts, &self.labels_around(facts)))
    }

    /// Looks at an identity from scratch.
    pub(super) fn look_at(&mut self, number: u32) {
        let Some(identity) = self.identities.get(number) else { return };
        let labels = self.labels_around(&identity.facts);
        let facts = &identity.facts;
        let anchors = Anchors::of_endpoint(facts, &labels);
        let mut terms = self.filed_terms.under(&anchors);
        terms.retain(|&term| self.terms.get(term).is_some_and(|peer| peer.selects(facts, &labels)));
        let mut policies = self.filed_policies.under(&anchors);
        policies
            .retain(|&number| self.numbered.get(number).is_some_and(|one| one.policy.subject.selects(facts, &labels)));
        if let Some(identity) = self.identities.get_mut(number) {
            (identity.terms, identity.policies) = (terms, policies);
        }
        self.settle_class(number);
        self.settle_sets(number);
    }

    pub(super) fn labels_around(&self, facts: &EndpointFacts) -> Labels {
        facts.namespace.as_ref().map(|namespace| self.namespace_labels(namespace)).unwrap_or_default()
    }

    /// Puts an identity into the class of what it looks like.
    pub(super) fn settle_class(&mut self, number: u32) {
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
            entry.identities.insert(number);
        }
        if let Some(identity) = self.identities.get_mut(number) {
            identity.class = class;
        }
        // Its addresses go with it.
        let addresses = self.identities.get(number).map(|identity| identity.addresses.clone()).unwrap_or_default();
        addresses.into_iter().for_each(|key| self.enter_address(class, key));
        self.leave_class(before, number);
    }

    /// The selectors that mean this node.
    fn host_terms(&self) -> Vec<u32> {
        let identity = self.host_node.and_then(|id| self.identities.get(id.0));
        identity.map(|identity| identity.terms.iter().copied().collect()).unwrap_or_default()
    }

    /// Tells all sets which selectors mean this node.
    pub(super) fn settle_host_rows(&mut self) {
        let terms = self.host_terms();
        self.sets.iter_mut().for_each(|(_, set)| set.set_host(&terms));
    }

    fn make_class(&mut self, looks: Looks) -> u32 {
        let entry = ClassEntry { looks: looks.clone(), identities: BTreeSet::new() };
        let class = self.classes.insert(entry);
        for &term in &looks.terms {
            self.classes_of_term.entry(term).or_default().insert(class);
        }
        self.by_looks.insert(looks, class);
        class
    }

    /// An address of a class: sets that name one of its terms get a row for it.
    pub(super) fn enter_address(&mut self, class: u32, key: (NetworkIndex, IpAddr)) {
        let Some(entry) = self.classes.get(class) else { return };
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

    pub(super) fn leave_class(&mut self, class: u32, identity: u32) {
        let Some(entry) = self.classes.get_mut(class) else { return };
        entry.identities.remove(&identity);
        if !entry.identities.is_empty() {
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
    pub(super) fn forget_term(&mut self, term: u32) {
        let classes = self.classes_of_term.get(&term).cloned().unwrap_or_default();
        let all: Vec<u32> = classes
            .iter()
            .filter_map(|&class| self.classes.get(class))
            .flat_map(|class| &class.identities)
            .copied()
            .collect();
        for number in all {
            if let Some(identity) = self.identities.get_mut(number) {
                identity.terms.remove(&term);
            }
            self.settle_class(number);
        }
        self.classes_of_term.remove(&term);
        self.sets_of_term.remove(&term);
    }

    /// Gives an identity the sets of its policies.
    pub(super) fn settle_sets(&mut self, number: u32) {
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
    pub(super) fn settle_host(&mut self) {
        let of_host = |is_forwarded: bool| {
            let is_meant =
                move |policy: &Policy| policy.subject == Subject::Host && (!is_forwarded || policy.applies_on_forward);
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

    pub(super) fn enter_set(&mut self, key: SetKey) -> u32 {
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
        let mut set = Set::new(key.clone(), policies, |peer| terms.number(peer), &universal, &self.host_terms());
        // Those that only "every pod" means have the usual row.
        let named: Vec<u32> = set.terms().filter(|term| !universal.contains(term)).collect();
        let mut classes: BTreeSet<u32> =
            named.iter().filter_map(|term| self.classes_of_term.get(term)).flatten().copied().collect();
        if set.asks_for_names() {
            classes.extend(self.classes.iter().filter(|(_, class)| !class.looks.ports.is_empty()).map(|(at, _)| at));
        }
        for class in classes {
            let Some(entry) = self.classes.get(class) else { continue };
            let identities = entry.identities.iter().filter_map(|&number| self.identities.get(number));
            let addresses = identities.flat_map(|identity| identity.addresses.iter());
            let zones: BTreeSet<u32> = addresses.map(|(_, address)| set.zone(*address)).collect();
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

    pub(super) fn leave_set(&mut self, number: u32) {
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
}

/// The number of a class in the data path.
fn class_number(class: u32, entry: &ClassEntry) -> Class {
    // Zero is nobody's.
    Class((class + 1) | if entry.looks.is_pod { Class::POD } else { 0 })
}
