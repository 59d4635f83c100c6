//! The other name of a translated connection: what its answers look like.
//!
//! A connection is found by what its first packet looks like. When its packets leave with other addresses, answers come to
//! others, and lie in another shard; there an alias leads to the connection. It holds hashes only: whether the connection
//! is still the one that is meant, and whether the answer is its answer, is seen there. So an alias that outlives its
//! connection leads to nothing, and nobody who holds a shard need wait for another one.

use hashbrown::HashTable;

use super::shard::{half, whole};

/// Where an answer's connection is.
#[derive(Clone, Copy, Debug)]
struct Alias {
    /// Half of the hash of the answer's key.
    half: u32,
    /// Whether the last look found no connection.
    is_lost: bool,
    /// The hash of the connection's key.
    connection: u64,
}

/// The aliases of a shard.
#[derive(Debug, Default)]
pub(super) struct Aliases(HashTable<Alias>);

impl Aliases {
    /// Hashes of the connections that answers of this hash may belong to.
    pub(super) fn lookup(&self, hash: u64) -> impl Iterator<Item = u64> + '_ {
        let half = half(hash);
        self.0.iter_hash(whole(half)).filter(move |alias| alias.half == half).map(|alias| alias.connection)
    }

    /// True if answers of this hash may belong to a connection.
    pub(super) fn is_taken(&self, hash: u64) -> bool {
        !self.0.is_empty() && self.lookup(hash).next().is_some()
    }

    pub(super) fn insert(&mut self, hash: u64, connection: u64) {
        let alias = Alias { half: half(hash), is_lost: false, connection };
        self.0.insert_unique(whole(alias.half), alias, |alias| whole(alias.half));
    }

    /// True if there was one.
    pub(super) fn remove(&mut self, hash: u64, connection: u64) -> bool {
        let half = half(hash);
        let found = self.0.find_entry(whole(half), |alias| alias.half == half && alias.connection == connection);
        found.map(|entry| entry.remove()).is_ok()
    }

    /// Halves of hashes, and connections, of all.
    pub(super) fn all(&self) -> Vec<(u32, u64)> {
        self.0.iter().map(|alias| (alias.half, alias.connection)).collect()
    }

    /// Takes note of whether an alias leads somewhere. One that has not for two looks goes; true then.
    pub(super) fn look(&mut self, half: u32, connection: u64, is_alive: bool) -> bool {
        let is_it = |alias: &Alias| alias.half == half && alias.connection == connection;
        let Ok(mut found) = self.0.find_entry(whole(half), is_it) else { return false };
        let was_lost = std::mem::replace(&mut found.get_mut().is_lost, !is_alive);
        let goes = was_lost && !is_alive;
        if goes {
            found.remove();
        }
        goes
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn bytes(&self) -> usize {
        self.0.allocation_size()
    }
}
