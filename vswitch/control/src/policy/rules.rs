//! Numbers of rules, which counters are kept by.

use std::collections::{BTreeMap, BTreeSet};

use vswitch_dataplane::table::policy::RuleId;
use vswitch_policy::{Direction, PolicyId};

/// What a number stands for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct RuleKey {
    /// The policy. For the end of a tier, the first one of it that speaks of the subject.
    pub(crate) policy: PolicyId,
    pub(crate) direction: Direction,
    /// Its place in the policy; none for what happens if no rule matches.
    pub(crate) at: Option<usize>,
}

/// Numbers given out. A number is used again when its rule is gone, after all others: what was counted under it before is
/// taken off.
#[derive(Debug)]
pub(crate) struct RuleNumbers {
    keys: Vec<Option<RuleKey>>,
    by_key: BTreeMap<RuleKey, RuleId>,
    free: BTreeSet<u32>,
    /// Numbers that were given out again, and have not been looked at since.
    pub(crate) renewed: Vec<RuleId>,
}

impl Default for RuleNumbers {
    fn default() -> Self {
        // Zero is nobody's.
        RuleNumbers { keys: vec![None], by_key: BTreeMap::new(), free: BTreeSet::new(), renewed: Vec::new() }
    }
}

impl RuleNumbers {
    /// The number of a rule, its old one if it has one.
    pub(crate) fn number(&mut self, key: &RuleKey) -> RuleId {
        if let Some(&known) = self.by_key.get(key) {
            return known;
        }
        let id = match self.free.pop_first() {
            Some(number) => {
                self.keys[number as usize] = Some(key.clone());
                self.renewed.push(RuleId(number));
                RuleId(number)
            }
            None => {
                self.keys.push(Some(key.clone()));
                RuleId(self.keys.len() as u32 - 1)
            }
        };
        self.by_key.insert(key.clone(), id);
        id
    }

    /// Frees the numbers of a policy, but those that `stays` keeps.
    pub(crate) fn retain(&mut self, policy: &PolicyId, stays: impl Fn(&RuleKey) -> bool) {
        let first = RuleKey { policy: policy.clone(), direction: Direction::Ingress, at: None };
        let of_policy = self.by_key.range(first..).take_while(|(key, _)| key.policy == *policy);
        let gone: Vec<RuleKey> = of_policy.map(|(key, _)| key).filter(|key| !stays(key)).cloned().collect();
        for key in gone {
            if let Some(id) = self.by_key.remove(&key) {
                self.keys[id.0 as usize] = None;
                self.free.insert(id.0);
            }
        }
    }

    /// What a number stands for.
    pub(crate) fn key(&self, id: RuleId) -> Option<&RuleKey> {
        self.keys.get(id.0 as usize)?.as_ref()
    }

    /// Numbers are below this.
    pub(crate) fn limit(&self) -> u32 {
        self.keys.len() as u32
    }

    /// The number of a rule, if it has one.
    pub(crate) fn find(&self, key: &RuleKey) -> Option<RuleId> {
        self.by_key.get(key).copied()
    }

    /// The numbers of a policy.
    pub(crate) fn of<'a>(&'a self, policy: &'a PolicyId) -> impl Iterator<Item = RuleId> + 'a {
        let first = RuleKey { policy: policy.clone(), direction: Direction::Ingress, at: None };
        self.by_key.range(first..).take_while(move |(key, _)| key.policy == *policy).map(|(_, &id)| id)
    }
}
