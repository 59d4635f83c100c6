//! Compiled policy: what a subject lets pass.
//!
//! # What
//!
//! Two steps. [`Classes`] turns an address into a [`Class`]: a number for all that selectors may ask about its owner (labels,
//! namespace, named ports). A [`PolicySet`] is what all policies of one subject say in one direction: by class, and by the
//! zone that the set's own prefixes put the address in, a [`Row`]; and a row is a step function over (protocol, port).
//!
//! # Why this way
//!
//! A rule's cost is paid when it is compiled. Owners that no rule tells apart have one class, and addresses that no prefix
//! of a set tells apart one zone; so neither pods nor rules make a lookup longer. Most classes have the usual row of
//! their zone, of which there is one for pods, one for this node and one for the rest of the world: only the others take
//! room.
//!
//! # Cost
//!
//! One probe for the class; for sets with prefixes at most five or seven for the zone (see [`super::prefix`]); one for the row;
//! and a binary search over the row's steps, which are as many as the rules for that peer have ports.

use std::hash::BuildHasher;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use foldhash::fast::RandomState;
use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use vswitch_net::NetworkIndex;

use super::prefix::Prefixes;
use super::sharded::Sharded;

/// What policies may ask about an address, as a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Class(pub u32);

/// A rule, or a tier's default where it denies. Counters are by this number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleId(pub u32);

/// The verdict of one subject.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Judgement {
    /// Whether it lets the connection pass.
    pub is_allowed: bool,
    /// The rule that decided.
    pub rule: RuleId,
    /// The first rule that wants it told.
    pub log: Option<RuleId>,
}

/// From here on a verdict holds, up to the next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Step {
    /// [`step`] of a protocol and port.
    pub from: u32,
    /// The verdict.
    pub judgement: Judgement,
}

/// Steps in order; the first is at zero.
pub type Row = Arc<[Step]>;

/// What all policies of one subject say in one direction.
#[derive(Clone, Debug)]
pub struct PolicySet {
    prefixes: Option<Prefixes>,
    /// By zone; the first is for addresses that no prefix holds.
    zones: Vec<Usual>,
    /// By class and zone in one word.
    rows: HashTable<(u64, Row)>,
    hasher: RandomState,
}

/// The rows of a zone for classes without one of their own.
#[derive(Clone, Debug)]
pub struct Usual {
    /// For pods.
    pub pods: Row,
    /// For this node.
    pub host: Row,
    /// For all others.
    pub world: Row,
}

/// The policies of a port.
#[derive(Clone, Debug, Default)]
pub struct Subject {
    /// For connections to it; none if no policy speaks of them.
    pub ingress: Option<Arc<PolicySet>>,
    /// For connections that it opens.
    pub egress: Option<Arc<PolicySet>>,
    /// The port into the host's stack: what applies instead to addresses that are not this node's.
    pub forwarded: Option<Arc<Subject>>,
}

/// From addresses to classes.
#[derive(Clone, Debug, Default)]
pub struct Classes {
    /// By network and address in one word, which is quick to hash.
    v4: Sharded<u64, Class>,
    v6: Sharded<(u128, NetworkIndex), Class>,
}

impl Subject {
    /// True if a policy speaks of it.
    #[inline]
    pub fn is_policed(&self) -> bool {
        self.ingress.is_some() || self.egress.is_some() || self.forwarded.is_some()
    }
}

impl Class {
    /// Nobody that is known.
    pub const WORLD: Class = Class(0);
    /// The marks of classes of pods, and of this node.
    pub const POD: u32 = 1 << 31;
    /// See [`POD`](Self::POD).
    pub const HOST: u32 = 1 << 30;

    /// True if it is a pod's.
    pub fn is_pod(self) -> bool {
        self.0 & Class::POD != 0
    }

    /// True if it is this node's.
    pub fn is_host(self) -> bool {
        self.0 & Class::HOST != 0
    }
}

impl RuleId {
    /// No rule: what happens where none speaks.
    pub const NONE: RuleId = RuleId(0);
}

#[inline]
fn key(class: Class, zone: u32) -> u64 {
    u64::from(class.0) << 32 | u64::from(zone)
}

/// The place of a protocol and port in a row. ICMP has the type in the port's high byte and the code in its low one.
#[inline]
pub fn step(protocol: u8, port: u16) -> u32 {
    u32::from(protocol) << 16 | u32::from(port)
}

impl PolicySet {
    /// A set with its zones, of which there is at least one, and the prefixes that lead to them.
    pub fn new(prefixes: Option<Prefixes>, zones: Vec<Usual>) -> PolicySet {
        PolicySet { prefixes, zones, rows: HashTable::new(), hasher: RandomState::default() }
    }

    /// The zone of an address.
    #[inline]
    pub fn zone(&self, address: IpAddr) -> u32 {
        self.prefixes.as_ref().map_or(0, |prefixes| prefixes.lookup(address))
    }

    /// Gives a class a row of its own in a zone.
    pub fn insert(&mut self, class: Class, zone: u32, row: Row) {
        let key = key(class, zone);
        let hasher = &self.hasher;
        match self.rows.entry(hasher.hash_one(key), |(other, _)| *other == key, |(key, _)| hasher.hash_one(key)) {
            Entry::Occupied(mut entry) => entry.get_mut().1 = row,
            Entry::Vacant(entry) => drop(entry.insert((key, row))),
        }
    }

    /// Gives this node another row in a zone.
    pub fn set_host(&mut self, zone: u32, row: Row) {
        if let Some(usual) = self.zones.get_mut(zone as usize) {
            usual.host = row;
        }
    }

    /// True if a class has a row of its own in a zone.
    pub fn has(&self, class: Class, zone: u32) -> bool {
        let key = key(class, zone);
        self.rows.find(self.hasher.hash_one(key), |(other, _)| *other == key).is_some()
    }

    /// All zones.
    pub fn zones(&self) -> std::ops::Range<u32> {
        0..self.zones.len() as u32
    }

    /// Takes the rows of a class away.
    pub fn remove(&mut self, class: Class) {
        for zone in 0..self.zones.len() as u32 {
            let key = key(class, zone);
            if let Ok(entry) = self.rows.find_entry(self.hasher.hash_one(key), |(other, _)| *other == key) {
                entry.remove();
            }
        }
    }

    /// The row of a class in a zone.
    #[inline]
    pub fn row(&self, class: Class, zone: u32) -> &[Step] {
        let key = key(class, zone);
        if class != Class::WORLD
            && let Some((_, row)) = self.rows.find(self.hasher.hash_one(key), |(other, _)| *other == key)
        {
            return row;
        }
        match self.zones.get(zone as usize) {
            Some(usual) if class.is_pod() => &usual.pods,
            Some(usual) if class.is_host() => &usual.host,
            Some(usual) => &usual.world,
            None => &[],
        }
    }

    /// What the subject says to a connection with a peer of this class and address.
    #[inline]
    pub fn judge(&self, class: Class, address: IpAddr, protocol: u8, port: u16) -> Judgement {
        at(self.row(class, self.zone(address)), step(protocol, port))
    }

    /// What the subject says when the port is not known: it lets pass only what it would let pass for all ports.
    pub fn judge_unknown(&self, class: Class, address: IpAddr, protocol: u8) -> Judgement {
        let row = self.row(class, self.zone(address));
        let (first, last) = (step(protocol, 0), step(protocol, u16::MAX));
        let inside = row.iter().filter(|one| one.from > first && one.from <= last).map(|one| one.judgement);
        inside.fold(at(row, first), |all, one| if all.is_allowed { one } else { all })
    }
}

#[inline]
fn word(network: NetworkIndex, address: Ipv4Addr) -> u64 {
    u64::from(network.0) << 32 | u64::from(address.to_bits())
}

#[inline]
fn at(row: &[Step], step: u32) -> Judgement {
    let after = row.partition_point(|one| one.from <= step);
    match row.get(after.wrapping_sub(1)) {
        Some(one) => one.judgement,
        // Rows begin at zero; one that does not lets nothing pass.
        None => Judgement { is_allowed: false, rule: RuleId::NONE, log: None },
    }
}

impl Classes {
    /// The class of an address.
    #[inline]
    pub fn lookup(&self, network: NetworkIndex, address: IpAddr) -> Class {
        let known = match address {
            IpAddr::V4(v4) => self.v4.get(&word(network, v4)),
            IpAddr::V6(v6) => self.v6.get(&(v6.to_bits(), network)),
        };
        known.copied().unwrap_or(Class::WORLD)
    }

    /// Makes an address somebody's.
    pub fn insert(&mut self, network: NetworkIndex, address: IpAddr, class: Class) {
        match address {
            IpAddr::V4(v4) => self.v4.insert(word(network, v4), class),
            IpAddr::V6(v6) => self.v6.insert((v6.to_bits(), network), class),
        };
    }

    /// Makes an address nobody's.
    pub fn remove(&mut self, network: NetworkIndex, address: IpAddr) {
        match address {
            IpAddr::V4(v4) => self.v4.remove(&word(network, v4)),
            IpAddr::V6(v6) => self.v6.remove(&(v6.to_bits(), network)),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(steps: &[(u32, bool)]) -> Row {
        let judgement = |at: usize, is_allowed| Judgement { is_allowed, rule: RuleId(at as u32), log: None };
        steps.iter().enumerate().map(|(at, &(from, yes))| Step { from, judgement: judgement(at, yes) }).collect()
    }

    #[test]
    fn steps_hold_up_to_the_next() {
        let open = row(&[(0, false), (step(6, 80), true), (step(6, 82), false)]);
        let [closed, all] = [false, true].map(|is_allowed| row(&[(0, is_allowed)]));
        let mut set = PolicySet::new(None, vec![Usual { pods: closed.clone(), host: closed, world: all }]);
        let pod = Class(7 | Class::POD);
        let address: IpAddr = "10.0.0.1".parse().unwrap();
        let judge = |set: &PolicySet, class, protocol, port| set.judge(class, address, protocol, port).is_allowed;
        assert!(!judge(&set, pod, 6, 80) && judge(&set, Class::WORLD, 6, 80));
        set.insert(pod, 0, open);
        let allowed: Vec<u16> = (0..=u16::MAX).filter(|&port| judge(&set, pod, 6, port)).collect();
        assert_eq!(allowed, [80, 81]);
        assert!(!judge(&set, pod, 17, 80) && !judge(&set, Class(8 | Class::POD), 6, 80));
        assert!(!set.judge_unknown(pod, address, 6).is_allowed);
        assert!(set.judge_unknown(Class::WORLD, address, 6).is_allowed);
        set.remove(pod);
        assert!(set.rows.is_empty() && !judge(&set, pod, 6, 80));
    }
}
