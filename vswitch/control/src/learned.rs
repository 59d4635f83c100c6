//! Learned stations: ageing, moves and limits (802.1Q-2018 section 8.8).
//!
//! A network holds so many learned stations and no more. When it is full, a newcomer takes the place of the oldest
//! station of whoever has the most; if that is the newcomer's own port or peer, it is not learned at all. One pod that
//! floods MAC addresses so takes nothing from the others, and its newcomers cost no search for a victim.

use std::collections::HashMap;

use vswitch_dataplane::Location;
use vswitch_net::{MacAddr, NetworkIndex};

type Station = (NetworkIndex, MacAddr);

/// Stations that were seen.
#[derive(Debug)]
pub(crate) struct Learned {
    stations: HashMap<Station, Entry>,
    /// Stations by where they are.
    counts: HashMap<(NetworkIndex, Location), usize>,
    totals: HashMap<NetworkIndex, usize>,
    ageing_ns: u64,
    limit: usize,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(crate) location: Location,
    pub(crate) seen_ns: u64,
    is_sticky: bool,
}

/// What a sighting changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Nothing: known, or not to be learned.
    None,
    /// A new station; another may have had to go.
    New {
        /// Who went.
        evicted: Option<MacAddr>,
    },
    /// A known station at a new place.
    Moved,
    /// The place has as many as it may, or the most of a network that is full.
    Refused,
}

/// What a place may do.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PlaceLimits {
    /// Most stations.
    pub(crate) most: Option<usize>,
    /// Stations seen here stay here.
    pub(crate) is_sticky: bool,
}

impl Learned {
    pub(crate) fn new(ageing_ns: u64, limit: usize) -> Learned {
        Learned { stations: HashMap::new(), counts: HashMap::new(), totals: HashMap::new(), ageing_ns, limit }
    }

    pub(crate) fn seen(
        &mut self,
        now_ns: u64,
        network: NetworkIndex,
        mac: MacAddr,
        location: Location,
        limits: PlaceLimits,
    ) -> Change {
        let is_full = limits
            .most
            .is_some_and(|most| self.counts.get(&(network, location)).is_some_and(|&count| count >= most) || most == 0);
        if let Some(entry) = self.stations.get_mut(&(network, mac)) {
            if entry.location == location {
                entry.seen_ns = now_ns;
                return Change::None;
            }
            if entry.is_sticky || is_full {
                return if is_full { Change::Refused } else { Change::None };
            }
            entry.seen_ns = now_ns;
            entry.is_sticky = limits.is_sticky;
            let before = std::mem::replace(&mut entry.location, location);
            self.uncount(network, before);
            self.count(network, location);
            return Change::Moved;
        }
        if is_full {
            return Change::Refused;
        }
        let mut evicted = None;
        if self.totals.get(&network).is_some_and(|&total| total >= self.limit) {
            let Some(victim) = self.victim(network, location) else { return Change::Refused };
            self.forget(network, victim);
            evicted = Some(victim);
        }
        self.stations.insert((network, mac), Entry { location, seen_ns: now_ns, is_sticky: limits.is_sticky });
        self.count(network, location);
        Change::New { evicted }
    }

    /// Forgets and returns the stations that were silent too long.
    pub(crate) fn age(&mut self, now_ns: u64) -> Vec<Station> {
        let ageing_ns = self.ageing_ns;
        self.forget_where(|_, entry| !entry.is_sticky && now_ns.saturating_sub(entry.seen_ns) >= ageing_ns)
    }

    /// Forgets and returns the stations at a place that is gone.
    pub(crate) fn forget_location(&mut self, location: Location) -> Vec<Station> {
        self.forget_where(|_, entry| entry.location == location)
    }

    /// Forgets and returns the stations of a network.
    pub(crate) fn forget_network(&mut self, network: NetworkIndex) -> Vec<Station> {
        self.forget_where(|station, _| station.0 == network)
    }

    /// Forgets one station. True if it was known.
    pub(crate) fn forget(&mut self, network: NetworkIndex, mac: MacAddr) -> bool {
        match self.stations.remove(&(network, mac)) {
            Some(entry) => {
                self.uncount(network, entry.location);
                true
            }
            None => false,
        }
    }

    pub(crate) fn location(&self, network: NetworkIndex, mac: MacAddr) -> Option<Location> {
        self.stations.get(&(network, mac)).map(|entry| entry.location)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Station, Entry)> + '_ {
        self.stations.iter().map(|(&station, &entry)| (station, entry))
    }

    /// The oldest station of the place that has the most; none if that place is the newcomer's own.
    fn victim(&self, network: NetworkIndex, newcomer: Location) -> Option<MacAddr> {
        let of_network = self.counts.iter().filter(|((other, _), _)| *other == network);
        let (&(_, greediest), &most) = of_network.max_by_key(|&(&(_, location), &count)| (count, location))?;
        if self.counts.get(&(network, newcomer)).is_some_and(|&count| count >= most) {
            return None;
        }
        let theirs =
            self.stations.iter().filter(|((other, _), entry)| *other == network && entry.location == greediest);
        theirs.min_by_key(|(_, entry)| entry.seen_ns).map(|((_, mac), _)| *mac)
    }

    fn forget_where(&mut self, gone: impl Fn(&Station, &Entry) -> bool) -> Vec<Station> {
        let stations: Vec<Station> =
            self.stations.iter().filter(|(station, entry)| gone(station, entry)).map(|(&station, _)| station).collect();
        for &(network, mac) in &stations {
            self.forget(network, mac);
        }
        stations
    }

    fn count(&mut self, network: NetworkIndex, location: Location) {
        *self.counts.entry((network, location)).or_default() += 1;
        *self.totals.entry(network).or_default() += 1;
    }

    fn uncount(&mut self, network: NetworkIndex, location: Location) {
        if let Some(count) = self.counts.get_mut(&(network, location)) {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&(network, location));
            }
        }
        if let Some(total) = self.totals.get_mut(&network) {
            *total -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use vswitch_net::PortId;

    use super::*;

    const NET: NetworkIndex = NetworkIndex(0);

    fn at(port: u16) -> Location {
        Location::Port(PortId(port))
    }

    #[test]
    fn stations_age_from_their_last_sighting() {
        let mut learned = Learned::new(100, 8);
        let mac = MacAddr::local_from(1);
        assert_eq!(learned.seen(0, NET, mac, at(1), PlaceLimits::default()), Change::New { evicted: None });
        assert_eq!(learned.seen(50, NET, mac, at(1), PlaceLimits::default()), Change::None);
        assert!(learned.age(149).is_empty());
        assert_eq!(learned.age(150), [(NET, mac)]);
        assert!(learned.counts.is_empty());
    }

    #[test]
    fn a_flooding_port_takes_nothing_from_the_others() {
        let mut learned = Learned::new(u64::MAX, 100);
        for i in 0..10 {
            learned.seen(0, NET, MacAddr::local_from(i), at(1), PlaceLimits::default());
        }
        for i in 0..10_000 {
            learned.seen(1, NET, MacAddr::local_from(1000 + i), at(2), PlaceLimits::default());
        }
        assert_eq!(learned.counts[&(NET, at(1))], 10);
        assert_eq!(learned.counts[&(NET, at(2))], 90);
        // A newcomer elsewhere takes a place from the greedy one, its oldest.
        let change = learned.seen(2, NET, MacAddr::local_from(50), at(1), PlaceLimits::default());
        assert!(matches!(change, Change::New { evicted: Some(_) }));
        assert_eq!(learned.counts[&(NET, at(2))], 89);
        assert_eq!(learned.stations.len(), 100);
    }

    #[test]
    fn a_move_is_told_once() {
        let mut learned = Learned::new(u64::MAX, 100);
        let mac = MacAddr::local_from(1);
        learned.seen(0, NET, mac, at(1), PlaceLimits::default());
        assert_eq!(learned.seen(1, NET, mac, at(2), PlaceLimits::default()), Change::Moved);
        assert_eq!(learned.seen(2, NET, mac, at(2), PlaceLimits::default()), Change::None);
        assert_eq!(learned.forget_location(at(1)), []);
        assert_eq!(learned.forget_location(at(2)), [(NET, mac)]);
    }
}
