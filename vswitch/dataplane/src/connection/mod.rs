//! Connections: what both directions of a conversation need to know of each other.
//!
//! # What
//!
//! One table for all workers: a reply may come to another worker than the request. A connection is found by its two ends
//! whatever direction a packet has. The entry knows who began, how far it has come ([`state`], [`tcp`]) and by which
//! snapshot it was last judged; [`crate::judge`] asks the policies.
//!
//! # Why this way
//!
//! Packets that hit the flow table never come here: only the first packet of a flow does, those that open or close a TCP or
//! SCTP connection, and one every few seconds when a flow entry ends. So 256 shards, each behind a lock, are met by
//! workers at once about never, and a lock is held for some hundred nanoseconds.
//!
//! Entries lie in slabs that grow by chunks, so that nothing is copied while a lock is held. Those without an answer are in
//! a list by age: when the table is full, the oldest of them makes room, and what has been answered stays.
//!
//! # Cost
//!
//! About 115 bytes a connection, both directions, index included.
//!
//! # References
//!
//! RFC 5382 (timeouts of TCP), RFC 4787 (UDP), RFC 5508 (ICMP), RFC 9293 (states), RFC 5961 (what a forged segment may do).

mod key;
mod shard;
pub mod state;
pub mod tcp;

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

pub use key::Key;
pub(crate) use key::{Tuple, quoted};
pub use shard::Entry;
pub(crate) use shard::{ELSEWHERE, Shard};
pub use state::{State, Timeouts};

use crate::table::policy::RuleId;

const SHARDS: usize = 256;

/// How the table is made.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionConfig {
    /// Most connections.
    pub limit: usize,
    /// Most connections that one pod may have begun.
    pub port_limit: usize,
    /// How long a silent connection is remembered.
    pub timeouts: Timeouts,
    /// Whether TCP connections that were not seen from their beginning are taken up, if policy allows them.
    pub pick_up: PickUp,
    /// Whether a connection goes on that a later policy would not have let begin.
    pub keeps_established: bool,
    /// Seed of the hash; a secret of the process.
    pub seed: u64,
}

/// When connections are taken up that were not seen from their beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PickUp {
    /// Never.
    Never,
    /// Until this time: those that a former daemon had.
    Until(u64),
    /// Always.
    Always,
}

/// The table.
#[derive(Debug)]
pub struct Connections {
    shards: Box<[Mutex<Shard>]>,
    count: AtomicUsize,
    /// By the port that they began at.
    by_port: Box<[AtomicU32]>,
    evicted: AtomicU64,
    expired: AtomicU64,
    config: ConnectionConfig,
}

/// What the table has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConnectionCounts {
    /// Connections now.
    pub count: usize,
    /// Most there may be.
    pub limit: usize,
    /// Unanswered ones that made room for others.
    pub evicted: u64,
    /// Forgotten after their time.
    pub expired: u64,
    /// Memory of entries and index, bytes.
    pub bytes: usize,
}

impl Default for ConnectionConfig {
    fn default() -> Self {
        ConnectionConfig {
            limit: 1 << 20,
            port_limit: 1 << 18,
            timeouts: Timeouts::default(),
            pick_up: PickUp::Never,
            keeps_established: false,
            seed: 0,
        }
    }
}

impl PickUp {
    pub(crate) fn is_on(self, now_ns: u64) -> bool {
        match self {
            PickUp::Never => false,
            PickUp::Until(end_ns) => now_ns < end_ns,
            PickUp::Always => true,
        }
    }
}

impl Connections {
    /// An empty table.
    pub fn new(config: ConnectionConfig) -> Connections {
        Connections {
            shards: (0..SHARDS).map(|_| Mutex::new(Shard::default())).collect(),
            count: AtomicUsize::new(0),
            by_port: (0..=u16::MAX).map(|_| AtomicU32::new(0)).collect(),
            evicted: AtomicU64::new(0),
            expired: AtomicU64::new(0),
            config,
        }
    }

    /// How it was made.
    pub fn config(&self) -> &ConnectionConfig {
        &self.config
    }

    /// The shard of a hash, for as long as the guard lives.
    pub(crate) fn shard(&self, hash: u64) -> MutexGuard<'_, Shard> {
        lock(&self.shards[shard_of(hash)])
    }

    /// Puts a new connection into its shard, which `shard` is. False if the table is full of connections that have been
    /// answered, or the pod that begins it has more than its share.
    pub(crate) fn insert(&self, shard: &mut Shard, hash: u64, entry: Entry, is_limited: bool) -> bool {
        let of_port = &self.by_port[entry.places[0].index()];
        if is_limited && of_port.load(Ordering::Relaxed) as usize >= self.config.port_limit {
            return false;
        }
        // A connection more or less than the limit, when workers meet here, is none the worse.
        if self.count.load(Ordering::Relaxed) >= self.config.limit && !self.make_room(shard, hash) {
            return false;
        }
        shard.insert(hash, entry);
        of_port.fetch_add(1, Ordering::Relaxed);
        self.count.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// Takes a connection out of its shard.
    pub(crate) fn remove(&self, shard: &mut Shard, at: u32) {
        self.by_port[shard.get(at).places[0].index()].fetch_sub(1, Ordering::Relaxed);
        shard.remove(at, self.config.seed);
        self.count.fetch_sub(1, Ordering::Relaxed);
    }

    /// Forgets the oldest unanswered connection of this shard, or of another one that nobody uses right now.
    fn make_room(&self, shard: &mut Shard, hash: u64) -> bool {
        let evict = |shard: &mut Shard| {
            let oldest = shard.oldest_unanswered();
            oldest.inspect(|&at| self.remove(shard, at)).is_some()
        };
        let own = shard_of(hash);
        let made = evict(shard)
            || (1..SHARDS).any(|step| {
                let other = self.shards[(own + step) % SHARDS].try_lock();
                other.is_ok_and(|mut other| evict(&mut other))
            });
        if made {
            self.evicted.fetch_add(1, Ordering::Relaxed);
        }
        made
    }

    /// Forgets what has been silent for its time, in one shard of [`shards`](Self::shards).
    pub fn sweep(&self, now_ns: u64, shard: usize) {
        let mut shard = lock(&self.shards[shard % SHARDS]);
        let silent = shard.expired(now_ns, &self.config.timeouts);
        self.expired.fetch_add(silent.len() as u64, Ordering::Relaxed);
        for at in silent {
            self.remove(&mut shard, at);
        }
    }

    /// Number of shards, for [`sweep`](Self::sweep).
    pub fn shards(&self) -> usize {
        SHARDS
    }

    /// Up to `limit` connections that `wanted` says are wanted.
    pub fn dump(&self, now_ns: u64, limit: usize, wanted: impl Fn(&Entry) -> bool) -> Vec<Entry> {
        let mut found = Vec::new();
        for shard in &self.shards {
            let shard = lock(shard);
            let live = shard.iter().filter(|(_, entry)| !entry.is_expired(now_ns, &self.config.timeouts));
            found.extend(live.map(|(_, entry)| entry).filter(|entry| wanted(entry)).take(limit - found.len()).copied());
            if found.len() >= limit {
                break;
            }
        }
        found
    }

    /// Forgets connections that `unwanted` says are unwanted; how many there were. Flows that were made for them end with the
    /// next generation.
    pub fn forget(&self, unwanted: impl Fn(&Entry) -> bool) -> usize {
        let mut forgotten = 0;
        for shard in &self.shards {
            let mut shard = lock(shard);
            let all: Vec<u32> = shard.iter().filter(|(_, entry)| unwanted(entry)).map(|(at, _)| at).collect();
            forgotten += all.len();
            for at in all {
                self.remove(&mut shard, at);
            }
        }
        forgotten
    }

    /// What the table has done, and what it takes.
    pub fn counts(&self) -> ConnectionCounts {
        ConnectionCounts {
            count: self.count.load(Ordering::Relaxed),
            limit: self.config.limit,
            evicted: self.evicted.load(Ordering::Relaxed),
            expired: self.expired.load(Ordering::Relaxed),
            bytes: self.shards.iter().map(|shard| lock(shard).bytes()).sum(),
        }
    }
}

impl Entry {
    /// True if one of its ends has one of these addresses.
    pub fn has_end(&self, addresses: &[std::net::IpAddr]) -> bool {
        self.key.ends().iter().any(|(address, _)| addresses.contains(address))
    }

    /// The rules that let it pass, of who began and of who answers.
    pub fn rules(&self) -> [Option<RuleId>; 2] {
        self.rules.map(|rule| (rule != RuleId::NONE).then_some(rule))
    }
}

fn shard_of(hash: u64) -> usize {
    (hash >> 56) as usize % SHARDS
}

/// A panic ends the process, so no lock is ever found poisoned.
fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}
