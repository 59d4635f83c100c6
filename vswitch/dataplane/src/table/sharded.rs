//! A hash table in shards, so that a copy with one change costs one shard.
//!
//! Readers hold the table inside a snapshot and never see it change. The writer clones the table (256 pointers), then
//! `Arc::make_mut` copies the one shard it writes to, if a snapshot still holds it. One hash serves shard and slot.

use std::hash::{BuildHasher, Hash};
use std::sync::Arc;

use hashbrown::HashTable;

const SHARDS: usize = 256;

#[derive(Clone, Debug)]
pub(crate) struct Sharded<K, V> {
    shards: Vec<Arc<HashTable<(K, V)>>>,
    hasher: foldhash::fast::RandomState,
}

impl<K: Hash + Eq + Clone, V: Clone> Sharded<K, V> {
    #[inline]
    pub(crate) fn get(&self, key: &K) -> Option<&V> {
        let hash = self.hasher.hash_one(key);
        self.shards[shard(hash)].find(hash, |(other, _)| other == key).map(|(_, value)| value)
    }

    pub(crate) fn insert(&mut self, key: K, value: V) -> Option<V> {
        let hash = self.hasher.hash_one(&key);
        let table = Arc::make_mut(&mut self.shards[shard(hash)]);
        if let Some((_, before)) = table.find_mut(hash, |(other, _)| *other == key) {
            return Some(std::mem::replace(before, value));
        }
        table.insert_unique(hash, (key, value), |(key, _)| self.hasher.hash_one(key));
        None
    }

    pub(crate) fn remove(&mut self, key: &K) -> Option<V> {
        let hash = self.hasher.hash_one(key);
        // Copying a shard only to find nothing in it would be a waste.
        self.get(key)?;
        let table = Arc::make_mut(&mut self.shards[shard(hash)]);
        let entry = table.find_entry(hash, |(other, _)| other == key).ok()?;
        Some(entry.remove().0.1)
    }

    pub(crate) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.len()).sum()
    }
}

impl<K, V> Default for Sharded<K, V> {
    fn default() -> Self {
        let empty = Arc::new(HashTable::new());
        Sharded { shards: vec![empty; SHARDS], hasher: foldhash::fast::RandomState::default() }
    }
}

/// Bits that the table inside does not use: it takes the lowest for the slot and the highest seven for the tag.
fn shard(hash: u64) -> usize {
    (hash >> 40) as usize % SHARDS
}
