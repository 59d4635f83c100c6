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
//! Entries lie in slabs that grow by chunks, so that only the index is ever copied while a lock is held. Those without an
//! answer are in a list by age: when the table is full, the oldest of them makes room, and what has been answered stays.
//!
//! A connection that is translated has a second name, what its answers look like ([`alias`]).
//!
//! # Cost
//!
//! 132 bytes a connection, both directions, index included; about 220 for one that is translated.
//!
//! # References
//!
//! RFC 5382 (timeouts of TCP), RFC 4787 (UDP), RFC 5508 (ICMP), RFC 9293 (states), RFC 5961 (what a forged segment may do).

mod alias;
mod key;
mod shard;
pub mod state;
pub mod tcp;

use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

pub use key::Key;
pub(crate) use key::{Quote, Tuple, quoted};
pub use shard::Entry;
pub(crate) use shard::{ELSEWHERE, Shard};
pub use state::{State, Timeouts};
use vswitch_net::NetworkIndex;

use crate::table::flow::LIFETIME_NS;
use crate::table::policy::RuleId;
use crate::translate::Translation;

const SHARDS: usize = 256;

/// Aliases that a shard may have, beside twice as many as it may have connections.
const ALIASES_OF_A_SHARD: usize = 64;

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
    /// Those that are translated, and their aliases; more of these are some whose connections are gone.
    translated: AtomicUsize,
    aliases: AtomicUsize,
    /// Changes when what answers to a translated connection look like may become another's: flow entries made before are void.
    epoch: AtomicU32,
    /// Until this time what may be a service's answer waits for its client to speak.
    clients_first_until_ns: AtomicU64,
    evicted: AtomicU64,
    expired: AtomicU64,
    config: ConnectionConfig,
}

/// A packet's place in the table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sought {
    pub(crate) tuple: Tuple,
    pub(crate) key: Key,
    pub(crate) hash: u64,
    /// Whether it is of the key's low end.
    pub(crate) is_low: bool,
}

/// A packet's connection.
#[derive(Debug)]
pub(crate) struct Found<'a> {
    pub(crate) shard: MutexGuard<'a, Shard>,
    pub(crate) at: u32,
    /// Whose packet it is: of who began (0) or who answers (1).
    pub(crate) side: usize,
    /// True if it looks as the connection's packets do after translation, and not before.
    pub(crate) is_after: bool,
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
            translated: AtomicUsize::new(0),
            aliases: AtomicUsize::new(0),
            epoch: AtomicU32::new(0),
            clients_first_until_ns: AtomicU64::new(0),
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

    /// True if any connection is translated.
    pub(crate) fn are_translated(&self) -> bool {
        self.translated.load(Ordering::Relaxed) > 0
    }

    /// After a start: until this time what may be a service's answer waits for its client to speak first, for only that tells
    /// whom it was asked as.
    pub fn wait_for_clients(&self, until_ns: u64) {
        self.clients_first_until_ns.store(until_ns, Ordering::Relaxed);
    }

    pub(crate) fn waits_for_clients(&self, now_ns: u64) -> bool {
        now_ns < self.clients_first_until_ns.load(Ordering::Relaxed)
    }

    /// Flow entries of translated connections hold as long as this does not change.
    pub(crate) fn epoch(&self) -> u32 {
        self.epoch.load(Ordering::Relaxed)
    }

    /// Makes flow entries of translated connections void.
    pub(crate) fn end_epoch(&self) {
        self.epoch.fetch_add(1, Ordering::Relaxed);
    }

    /// Where a packet is to be looked for.
    pub(crate) fn seek(&self, tuple: Tuple, network: NetworkIndex) -> Sought {
        let (key, is_low) = tuple.key(network);
        Sought { tuple, key, hash: key.hash(self.config.seed), is_low }
    }

    /// A packet's connection; or else its shard, to begin one there. What it looks like as it comes counts for more than what
    /// another connection's packets look like after translation.
    pub(crate) fn find(&self, sought: &Sought) -> Result<Found<'_>, MutexGuard<'_, Shard>> {
        // Two connections of one hash are rare, more are not looked at.
        let others = match self.find_by_key(sought) {
            Ok(found) if !found.is_after => return Ok(found),
            Err(shard) if !shard.aliases.is_taken(sought.hash) => return Err(shard),
            Ok(Found { shard, .. }) | Err(shard) => {
                let mut others = shard.aliases.lookup(sought.hash);
                [others.next(), others.next()]
            }
        };
        let others = || others.into_iter().flatten().filter_map(|connection| self.find_by_answer(connection, sought));
        if let Some(found) = others().find(|found| !found.is_after) {
            return Ok(found);
        }
        self.find_by_key(sought).or_else(|own| {
            drop(own);
            others().next().ok_or_else(|| self.shard(sought.hash))
        })
    }

    fn find_by_answer(&self, connection: u64, sought: &Sought) -> Option<Found<'_>> {
        let shard = self.shard(connection);
        let at = shard.find_answered_by(connection, &sought.key)?;
        let to = shard.translation(at)?;
        let Tuple { source, ports, .. } = sought.tuple;
        let is_answer = (to.destination, to.ports.1) == (source, ports.0);
        Some(Found { at, side: usize::from(is_answer), is_after: !is_answer, shard })
    }

    /// As [`find`](Self::find), by what packets of who began look like alone.
    pub(crate) fn find_by_key(&self, sought: &Sought) -> Result<Found<'_>, MutexGuard<'_, Shard>> {
        let shard = self.shard(sought.hash);
        let Some(at) = shard.find(sought.hash, &sought.key) else { return Err(shard) };
        let entry = shard.get(at);
        let side = usize::from(sought.is_low != entry.is_from_low);
        let is_after = side == 1 && entry.is_translated;
        Ok(Found { shard, at, side, is_after })
    }

    /// Lets answers that look so lead to a connection that is about to begin. False if those of another one do.
    pub(crate) fn reserve(&self, answer: Tuple, connection: &Sought, now_ns: u64) -> bool {
        let answer = self.seek(answer, connection.key.network);
        let mut shard = self.shard(answer.hash);
        if let Some(at) = shard.find(answer.hash, &answer.key) {
            if !shard.get(at).is_expired(now_ns, &self.config.timeouts) {
                return false;
            }
            self.remove(&mut shard, at);
        }
        let is_full = shard.aliases.len() >= ALIASES_OF_A_SHARD + 2 * self.config.limit / SHARDS;
        if is_full || shard.aliases.is_taken(answer.hash) {
            return false;
        }
        shard.aliases.insert(answer.hash, connection.hash);
        self.aliases.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// Takes back what [`reserve`](Self::reserve) gave, for a connection that has not begun after all.
    pub(crate) fn release(&self, answer: Tuple, connection: &Sought) {
        let answer = self.seek(answer, connection.key.network);
        let is_removed = self.shard(answer.hash).aliases.remove(answer.hash, connection.hash);
        self.aliases.fetch_sub(usize::from(is_removed), Ordering::Relaxed);
    }

    /// Puts a new connection into its shard, which `shard` is. False if the table is full of connections that have been
    /// answered, or the pod that begins it has more than its share.
    pub(crate) fn insert(
        &self,
        shard: &mut Shard,
        hash: u64,
        entry: Entry,
        translation: Option<Translation>,
        is_limited: bool,
    ) -> bool {
        let of_port = &self.by_port[entry.places[0].index()];
        if is_limited && of_port.load(Ordering::Relaxed) as usize >= self.config.port_limit {
            return false;
        }
        // A connection more or less than the limit, when workers meet here, is none the worse.
        if self.count.load(Ordering::Relaxed) >= self.config.limit && !self.make_room(shard, hash, entry.created_ns) {
            return false;
        }
        shard.insert(hash, entry, translation);
        self.translated.fetch_add(usize::from(translation.is_some()), Ordering::Relaxed);
        of_port.fetch_add(1, Ordering::Relaxed);
        self.count.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// Takes a connection out of its shard. What its answers look like may be another's at once.
    pub(crate) fn remove(&self, shard: &mut Shard, at: u32) {
        if shard.get(at).is_translated {
            self.end_epoch();
        }
        self.remove_silent(shard, at);
    }

    /// Takes a connection out of its shard that has been silent for longer than a flow entry lives, or that begins anew.
    pub(crate) fn remove_silent(&self, shard: &mut Shard, at: u32) {
        let entry = shard.get(at);
        self.by_port[entry.places[0].index()].fetch_sub(1, Ordering::Relaxed);
        if let Some(answer) = shard.answer(at) {
            let own = entry.key.hash(self.config.seed);
            let answer = self.seek(answer, entry.key.network).hash;
            self.translated.fetch_sub(1, Ordering::Relaxed);
            let is_removed = if shard_of(own) == shard_of(answer) {
                shard.aliases.remove(answer, own)
            } else {
                // One that somebody holds is left for the sweep: whoever waits for a second lock may wait for ever.
                let other = self.shards[shard_of(answer)].try_lock();
                other.is_ok_and(|mut other| other.aliases.remove(answer, own))
            };
            self.aliases.fetch_sub(usize::from(is_removed), Ordering::Relaxed);
        }
        shard.remove(at, self.config.seed);
        self.count.fetch_sub(1, Ordering::Relaxed);
    }

    /// Forgets the oldest unanswered connection of this shard, or of another one that nobody uses right now.
    fn make_room(&self, shard: &mut Shard, hash: u64, now_ns: u64) -> bool {
        let evict = |shard: &mut Shard| {
            let oldest = shard.oldest_unanswered();
            oldest.inspect(|&at| {
                // No flow entry is as old as that.
                match now_ns.saturating_sub(shard.get(at).used_ns) > 2 * LIFETIME_NS {
                    true => self.remove_silent(shard, at),
                    false => self.remove(shard, at),
                }
            });
            oldest.is_some()
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

    /// Forgets what has been silent for its time, in one shard of [`shards`](Self::shards), and aliases that lead to nothing.
    pub fn sweep(&self, now_ns: u64, shard: usize) {
        let own = &self.shards[shard % SHARDS];
        let mut shard = lock(own);
        let silent = shard.expired(now_ns, &self.config.timeouts);
        self.expired.fetch_add(silent.len() as u64, Ordering::Relaxed);
        for at in silent {
            self.remove_silent(&mut shard, at);
        }
        if self.aliases.load(Ordering::Relaxed) == self.translated.load(Ordering::Relaxed) {
            return;
        }
        let aliases = shard.aliases.all();
        drop(shard);
        for (half, connection) in aliases {
            let is_alive = self.shard(connection).is_answered_by(connection, half, self.config.seed);
            // Its connection may be about to begin: the next look tells.
            let is_removed = lock(own).aliases.look(half, connection, is_alive);
            self.aliases.fetch_sub(usize::from(is_removed), Ordering::Relaxed);
        }
    }

    /// Number of shards, for [`sweep`](Self::sweep).
    pub fn shards(&self) -> usize {
        SHARDS
    }

    /// Up to `limit` connections that `wanted` says are wanted, with what the packets of who began leave as, if that is
    /// something else than they come as.
    pub fn dump(
        &self,
        now_ns: u64,
        limit: usize,
        mut wanted: impl FnMut(&Entry, Option<&Translation>) -> bool,
    ) -> Vec<(Entry, Option<Translation>)> {
        let mut found = Vec::new();
        for shard in &self.shards {
            let shard = lock(shard);
            let live = shard.iter().filter(|(_, entry)| !entry.is_expired(now_ns, &self.config.timeouts));
            let all = live.map(|(at, entry)| (entry, shard.translation(at)));
            let wanted = all.filter(|&(entry, translation)| wanted(entry, translation));
            found.extend(wanted.take(limit - found.len()).map(|(entry, to)| (*entry, to.copied())));
            if found.len() >= limit {
                break;
            }
        }
        found
    }

    /// Forgets connections that `unwanted` says are unwanted; how many there were. Flows that were made for them end with the
    /// next generation.
    pub fn forget(&self, mut unwanted: impl FnMut(&Entry, Option<&Translation>) -> bool) -> usize {
        let mut forgotten = 0;
        for shard in &self.shards {
            let mut shard = lock(shard);
            let all: Vec<u32> =
                shard.iter().filter(|&(at, entry)| unwanted(entry, shard.translation(at))).map(|(at, _)| at).collect();
            forgotten += all.len();
            for at in all {
                self.remove(&mut shard, at);
            }
        }
        forgotten
    }

    /// Lets connections that `unwanted` says are unwanted begin anew with the next packet of who began them; their answers
    /// pass until then. True if there were any: flows that were made for them end with the next generation.
    pub fn retire(&self, mut unwanted: impl FnMut(&Entry, Option<&Translation>) -> bool) -> bool {
        let mut has_any = false;
        for shard in &self.shards {
            let mut shard = lock(shard);
            let all: Vec<u32> =
                shard.iter().filter(|&(at, entry)| unwanted(entry, shard.translation(at))).map(|(at, _)| at).collect();
            has_any |= !all.is_empty();
            all.into_iter().for_each(|at| shard.get_mut(at).is_retired = true);
        }
        has_any
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
    /// Who began and whom it asked for, with their ports.
    pub fn ends(&self) -> [(IpAddr, u16); 2] {
        let [low, high] = self.key.ends();
        if self.is_from_low { [low, high] } else { [high, low] }
    }

    /// All ends by which it may be known: as its packets come, and as they leave.
    pub fn all_ends(&self, leaves_as: Option<&Translation>) -> impl Iterator<Item = (IpAddr, u16)> {
        let is_v6 = self.ends()[0].0.is_ipv6();
        self.ends().into_iter().chain(leaves_as.map(|to| to.ends(is_v6)).into_iter().flatten())
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
