//! All policies of one subject in one direction, compiled into a table.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use vswitch_dataplane::table::policy::{Class, PolicySet, Row, RuleId, Usual};
use vswitch_dataplane::table::prefix::Prefixes;
use vswitch_policy::{Direction, NamedPort, Peer, Policy, PortMatch, Rule, TierDefault};

use super::row::{Line, build};

/// What a set is made of. Subjects with equal ones share it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SetKey {
    pub(crate) direction: Direction,
    /// Policies by number, in the order of tiers, orders and names.
    pub(crate) policies: Vec<u32>,
    /// The subject's named ports, as far as rules for ingress ask for them.
    pub(crate) ports: Vec<NamedPort>,
}

/// A policy as sets use it.
#[derive(Debug)]
pub(crate) struct Numbered {
    pub(crate) policy: Policy,
    /// Of its tier.
    pub(crate) tier_order: i64,
    pub(crate) tier_default: TierDefault,
    /// Numbers of its rules, ingress then egress.
    pub(crate) rules: [Vec<RuleId>; 2],
    /// The numbers under which its tier denies.
    pub(crate) defaults: [RuleId; 2],
}

/// What a row is made for.
#[derive(Clone, Copy)]
pub(crate) struct RowPeer<'a> {
    pub(crate) class: Class,
    /// Numbers of the peers in rules that mean its owner.
    pub(crate) terms: &'a [u32],
    /// Its owner's named ports.
    pub(crate) ports: &'a [NamedPort],
    pub(crate) zone: u32,
}

/// A set.
#[derive(Debug)]
pub(crate) struct Set {
    key: SetKey,
    /// Subjects that use it.
    pub(crate) users: usize,
    policies: Vec<Arc<Numbered>>,
    asks_for_names: bool,
    names_nodes: bool,
    /// Rules in order: position in `policies`, position in the policy.
    rules: Vec<(u32, u32)>,
    /// Rules without peers.
    for_all: Vec<u32>,
    /// Rules by the selectors that they name.
    by_term: HashMap<u32, Vec<u32>>,
    /// Rules by zone, for those that name prefixes.
    by_zone: Vec<Vec<u32>>,
    /// Equal rows are one.
    known: BTreeMap<Vec<u32>, Row>,
    pub(crate) table: Arc<PolicySet>,
}

/// Peers that are prefixes: rule in the high half, place in it in the low one.
type Marks = BTreeSet<u64>;

/// What happens to traffic with this node: rules of the tier of NetworkPolicy do not see it (Kubernetes API: "traffic to and
/// from the node where a pod is running is always allowed").
const SPARES_HOST: &str = "networkpolicy";

impl Set {
    /// Compiles a set; rows of classes are put in one by one. `term` numbers peers that are no prefixes, `universal` are those
    /// that mean every pod, `host` those that mean this node.
    pub(crate) fn new(
        key: SetKey,
        policies: Vec<Arc<Numbered>>,
        term: impl Fn(&Peer) -> Option<u32>,
        universal: &[u32],
        host: &[u32],
    ) -> Set {
        let is_egress = key.direction == Direction::Egress;
        let rules = policies.iter().flat_map(|policy| policy.policy.rules(key.direction).unwrap_or_default());
        let ports = rules.flat_map(|rule| rule.ports.iter().flatten());
        let asks_for_names = is_egress && ports.into_iter().any(|port| matches!(port, PortMatch::Named { .. }));
        let mut set = Set {
            key,
            users: 0,
            asks_for_names,
            names_nodes: false,
            policies,
            rules: Vec::new(),
            for_all: Vec::new(),
            by_term: HashMap::new(),
            by_zone: vec![Vec::new()],
            known: BTreeMap::new(),
            table: Arc::new(PolicySet::new(None, Vec::new())),
        };
        let mut prefixes: BTreeMap<IpNet, (Marks, Marks)> = BTreeMap::new();
        for (which, policy) in set.policies.iter().enumerate() {
            for (at, rule) in policy.policy.rules(set.key.direction).unwrap_or_default().iter().enumerate() {
                let position = set.rules.len() as u32;
                set.rules.push((which as u32, at as u32));
                let Some(peers) = &rule.peers else {
                    set.for_all.push(position);
                    continue;
                };
                for (which, peer) in peers.iter().enumerate() {
                    if let Peer::Cidr { cidr, except } = peer {
                        // A rule may name several that overlap: each has its own number while zones are made.
                        let mark = u64::from(position) << 32 | which as u64;
                        prefixes.entry(*cidr).or_default().0.insert(mark);
                        for except in except {
                            prefixes.entry(*except).or_default().1.insert(mark);
                        }
                    } else if let Some(term) = term(peer) {
                        set.names_nodes |= matches!(peer, Peer::Nodes(_));
                        let rules = set.by_term.entry(term).or_default();
                        if rules.last() != Some(&position) {
                            rules.push(position);
                        }
                    }
                }
            }
        }
        let table = set.zones(prefixes);
        let mut zones = Vec::new();
        for zone in 0..set.by_zone.len() as u32 {
            let mut usual = |mark: u32, terms: &[u32]| set.row(RowPeer { class: Class(mark), terms, ports: &[], zone });
            let (pods, host, world) = (usual(Class::POD, universal), usual(Class::HOST, host), usual(0, &[]));
            zones.push(Usual { pods, host, world });
        }
        set.table = Arc::new(PolicySet::new(table, zones));
        set
    }

    /// Gives each set of prefixes that hold an address a number, and each prefix the one of its own addresses.
    fn zones(&mut self, prefixes: BTreeMap<IpNet, (Marks, Marks)>) -> Option<Prefixes> {
        if prefixes.is_empty() {
            return None;
        }
        let mut numbers: BTreeMap<Marks, u32> = BTreeMap::from([(Marks::new(), 0)]);
        // Sorted by address and then length, so those that hold a prefix are the ones on the stack.
        let mut holders: Vec<(IpNet, Marks)> = Vec::new();
        let mut table = Vec::new();
        for (prefix, (added, taken)) in prefixes {
            while holders.last().is_some_and(|(holder, _)| !holder.contains(&prefix)) {
                holders.pop();
            }
            let mut marks = holders.last().map(|(_, marks)| marks.clone()).unwrap_or_default();
            marks.extend(added);
            marks.retain(|mark| !taken.contains(mark));
            let next = numbers.len() as u32;
            let zone = *numbers.entry(marks.clone()).or_insert(next);
            if zone == next {
                let mut rules: Vec<u32> = marks.iter().map(|mark| (mark >> 32) as u32).collect();
                rules.dedup();
                self.by_zone.push(rules);
            }
            table.push((prefix.addr(), prefix.prefix_len(), zone));
            holders.push((prefix, marks));
        }
        Some(Prefixes::new(table))
    }

    /// The selectors that its rules name.
    pub(crate) fn terms(&self) -> impl Iterator<Item = u32> {
        self.by_term.keys().copied()
    }

    /// Its direction, policies and ports.
    pub(crate) fn key(&self) -> &SetKey {
        &self.key
    }

    /// The zone of an address.
    pub(crate) fn zone(&self, address: IpAddr) -> u32 {
        self.table.zone(address)
    }

    /// True if rules ask for ports by the names that peers have for them.
    pub(crate) fn asks_for_names(&self) -> bool {
        self.asks_for_names
    }

    /// Makes the row of a class in a zone, if it is another than the usual one and not there yet.
    pub(crate) fn ensure(&mut self, peer: RowPeer<'_>) {
        if self.table.has(peer.class, peer.zone) {
            return;
        }
        let row = self.row(peer);
        if *row != *self.table.row(peer.class, peer.zone) {
            Arc::make_mut(&mut self.table).insert(peer.class, peer.zone, row);
        }
    }

    /// This node is meant by other selectors than before.
    pub(crate) fn set_host(&mut self, terms: &[u32]) {
        if !self.names_nodes {
            return;
        }
        for zone in self.table.zones() {
            let row = self.row(RowPeer { class: Class(Class::HOST), terms, ports: &[], zone });
            Arc::make_mut(&mut self.table).set_host(zone, row);
        }
    }

    /// Forgets a class.
    pub(crate) fn remove(&mut self, class: Class) {
        if self.table.zones().any(|zone| self.table.has(class, zone)) {
            Arc::make_mut(&mut self.table).remove(class);
        }
    }

    /// The rules that are for a peer, in order.
    fn rules_for(&self, peer: RowPeer<'_>) -> Vec<u32> {
        let mut rules = self.for_all.clone();
        rules.extend(peer.terms.iter().filter_map(|term| self.by_term.get(term)).flatten());
        rules.extend(self.by_zone.get(peer.zone as usize).into_iter().flatten());
        rules.sort_unstable();
        rules.dedup();
        rules
    }

    fn row(&mut self, peer: RowPeer<'_>) -> Row {
        let mut rules = self.rules_for(peer);
        let is_ingress = self.key.direction == Direction::Ingress;
        let is_host = peer.class.is_host();
        if is_host
            && is_ingress
            && self.policies.iter().all(|policy| policy.policy.subject != vswitch_policy::Subject::Host)
        {
            // The node looks after its pods, whatever they say.
            return build(std::iter::empty(), &[]);
        }
        if is_host {
            rules.retain(|&rule| self.policies[self.rules[rule as usize].0 as usize].policy.tier != SPARES_HOST);
        }
        let names = if is_ingress { self.key.ports.clone() } else { peer.ports.to_vec() };
        let is_shared = !is_host && (is_ingress || names.is_empty());
        if let Some(row) = self.known.get(&rules).filter(|_| is_shared) {
            return row.clone();
        }
        let row = build(self.lines(&rules, is_host), &names);
        if is_shared {
            self.known.insert(rules, row.clone());
        }
        row
    }

    /// The lines of a row: rules, and the ends of tiers.
    fn lines<'a>(&'a self, rules: &'a [u32], spares_host: bool) -> impl Iterator<Item = Line<'a>> {
        let direction = usize::from(self.key.direction == Direction::Egress);
        let mut next = rules.iter().peekable();
        (0..self.policies.len()).flat_map(move |which| {
            let policy = &self.policies[which];
            let mut lines = Vec::new();
            while let Some(&rule) = next.next_if(|&&rule| self.rules[rule as usize].0 as usize == which) {
                let at = self.rules[rule as usize].1 as usize;
                let Rule { action, ports, .. } = &self.rules_of(policy)[at];
                let id = policy.rules[direction][at];
                lines.push(Line::Rule { action: *action, ports: ports.as_deref(), id });
            }
            let tier = |at: usize| self.policies.get(at).map(|policy| &policy.policy.tier);
            if tier(which) != tier(which + 1) && !(spares_host && policy.policy.tier == SPARES_HOST) {
                // The first policy of the tier stands for it.
                let first = (0..=which).rev().take_while(|&at| tier(at) == tier(which)).last().unwrap_or(which);
                let id = self.policies[first].defaults[direction];
                lines.push(Line::TierEnd { default: policy.tier_default, id });
            }
            lines
        })
    }

    fn rules_of<'a>(&self, policy: &'a Numbered) -> &'a [Rule] {
        policy.policy.rules(self.key.direction).unwrap_or_default()
    }
}
