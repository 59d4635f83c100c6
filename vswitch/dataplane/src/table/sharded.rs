//! A hash map in shards, so that a copy with one change costs one shard.
//!
//! Readers hold the map inside a snapshot and never see it change. The writer clones the map (256 pointers), then
//! `Arc::make_mut` copies the one shard it writes to, if a snapshot still holds it.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash};
use std::sync::Arc;

const SHARDS: usize = 256;

#[derive(Clone, Debug)]
pub(crate) struct Sharded<K, V> {
    shards: Vec<Arc<HashMap<K, V, foldhash::fast::RandomState>>>,
    hasher: foldhash::fast::RandomState,
}

impl<K: Hash + Eq + Clone, V: Clone> Sharded<K, V> {
    pub(crate) fn get(&self, key: &K) -> Option<&V> {
        self.shards[self.shard(key)].get(key)
    }

    pub(crate) fn insert(&mut self, key: K, value: V) -> Option<V> {
        let shard = self.shard(&key);
        Arc::make_mut(&mut self.shards[shard]).insert(key, value)
    }

    pub(crate) fn remove(&mut self, key: &K) -> Option<V> {
        let shard = self.shard(key);
        // Copying a shard only to find nothing in it would be a waste.
        self.shards[shard].get(key)?;
        Arc::make_mut(&mut self.shards[shard]).remove(key)
    }

    pub(crate) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.len()).sum()
    }

    fn shard(&self, key: &K) -> usize {
        // The maps use the low bits of their own hash; the shard uses other bits of this one.
        (self.hasher.hash_one(key) >> 56) as usize % SHARDS
    }
}

impl<K, V> Default for Sharded<K, V> {
    fn default() -> Self {
        let empty = Arc::new(HashMap::default());
        Sharded { shards: vec![empty; SHARDS], hasher: foldhash::fast::RandomState::default() }
    }
}
