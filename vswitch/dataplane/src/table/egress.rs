//! Addresses that pods leave a network with, by who they are and where they go.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use vswitch_net::NetworkIndex;

use super::prefix::Prefixes;

/// Address and length of a prefix.
pub type Prefix = (IpAddr, u8);

/// One rule.
#[derive(Clone, Debug, Default)]
pub struct EgressRule {
    /// Whom it is for.
    pub sources: Vec<Prefix>,
    /// Where to. Empty for everywhere beyond the network.
    pub destinations: Vec<Prefix>,
    /// What they leave with; of both families, or of one that it then is for.
    pub addresses: Vec<IpAddr>,
}

/// The rules of all networks that have some.
pub type EgressByNetwork = HashMap<NetworkIndex, Arc<EgressRules>, foldhash::fast::RandomState>;

/// The rules of a network.
#[derive(Clone, Debug, Default)]
pub struct EgressRules {
    /// From a source to its list of rules; 0 is none.
    sources: Prefixes,
    /// Lists of rules, those of the longest prefix first.
    lists: Vec<Vec<u32>>,
    rules: Vec<Compiled>,
}

#[derive(Clone, Debug)]
struct Compiled {
    /// 1 for where it is for; none for what goes beyond the network.
    destinations: Option<Prefixes>,
    addresses: Vec<IpAddr>,
}

impl EgressRules {
    /// Compiles rules. Of several for one source the one of the longest prefix is asked first, of those of one prefix
    /// the first.
    pub fn new(rules: &[EgressRule]) -> EgressRules {
        let mut prefixes: Vec<Prefix> = rules.iter().flat_map(|rule| rule.sources.iter().copied()).collect();
        prefixes.sort_unstable();
        prefixes.dedup();
        let mut lists = vec![Vec::new()];
        let mut zones = Vec::new();
        for &prefix in &prefixes {
            let lengths = rules.iter().enumerate().filter_map(|(at, rule)| {
                let holding = rule.sources.iter().filter(|&&source| holds(source, prefix));
                Some((holding.map(|source| source.1).max()?, at as u32))
            });
            let mut list: Vec<(u8, u32)> = lengths.collect();
            list.sort_by_key(|&(length, at)| (std::cmp::Reverse(length), at));
            zones.push((prefix.0, prefix.1, lists.len() as u32));
            lists.push(list.into_iter().map(|(_, at)| at).collect());
        }
        EgressRules { sources: Prefixes::new(zones), lists, rules: rules.iter().map(Compiled::new).collect() }
    }

    /// What a packet leaves with, if not with its own address. `is_beyond` says whether it leaves the network.
    pub fn lookup(&self, source: IpAddr, destination: IpAddr, is_beyond: impl Fn() -> bool) -> Option<IpAddr> {
        let list = self.lists.get(self.sources.lookup(source) as usize)?;
        list.iter().find_map(|&at| self.rules[at as usize].address(source, destination, &is_beyond))
    }
}

impl Compiled {
    fn new(rule: &EgressRule) -> Compiled {
        let prefixes = || rule.destinations.iter().map(|&(address, length)| (address, length, 1));
        let destinations = (!rule.destinations.is_empty()).then(|| Prefixes::new(prefixes()));
        Compiled { destinations, addresses: rule.addresses.clone() }
    }

    fn address(&self, source: IpAddr, destination: IpAddr, is_beyond: &impl Fn() -> bool) -> Option<IpAddr> {
        let is_meant = match &self.destinations {
            Some(prefixes) => prefixes.lookup(destination) == 1,
            None => is_beyond(),
        };
        if !is_meant {
            return None;
        }
        let of_family = || self.addresses.iter().filter(|address| address.is_ipv4() == source.is_ipv4());
        // A pod keeps its address; pods spread over several.
        let number = match source {
            IpAddr::V4(v4) => u128::from(v4.to_bits()),
            IpAddr::V6(v6) => v6.to_bits(),
        };
        of_family().nth((number % (of_family().count().max(1) as u128)) as usize).copied()
    }
}

/// True if the first prefix holds all of the second one.
fn holds(wide: Prefix, narrow: Prefix) -> bool {
    let (bits, other, width) = match (wide.0, narrow.0) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (u128::from(a.to_bits()) << 96, u128::from(b.to_bits()) << 96, 32),
        (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits(), b.to_bits(), 128),
        _ => return false,
    };
    let length = wide.1.min(width);
    let mask = if length == 0 { 0 } else { u128::MAX << (128 - u32::from(length)) };
    wide.1 <= narrow.1 && (bits ^ other) & mask == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn prefixes(texts: &[&str]) -> Vec<Prefix> {
        let parse = |text: &&str| text.split_once('/').map(|(address, length)| (ip(address), length.parse().unwrap()));
        texts.iter().filter_map(parse).collect()
    }

    fn rule(sources: &[&str], destinations: &[&str], addresses: &[&str]) -> EgressRule {
        EgressRule {
            sources: prefixes(sources),
            destinations: prefixes(destinations),
            addresses: addresses.iter().map(|text| ip(text)).collect(),
        }
    }

    #[test]
    fn the_longest_source_is_asked_first() {
        let rules = EgressRules::new(&[
            rule(&["10.0.0.0/8"], &[], &["192.0.2.1"]),
            rule(&["10.1.0.0/16"], &["198.51.100.0/24"], &["192.0.2.2"]),
            rule(&["10.1.2.3/32", "fd00::/8"], &[], &["192.0.2.3", "2001:db8::3"]),
        ]);
        let of = |source: &str, destination: &str| {
            let is_beyond = || !destination.starts_with("10.") && !destination.starts_with("fd");
            rules.lookup(ip(source), ip(destination), is_beyond).map(|ip| ip.to_string())
        };
        assert_eq!(of("10.2.0.1", "198.51.100.1").as_deref(), Some("192.0.2.1"));
        assert_eq!(of("10.1.0.1", "198.51.100.1").as_deref(), Some("192.0.2.2"));
        assert_eq!(of("10.1.0.1", "203.0.113.1").as_deref(), Some("192.0.2.1"), "the next rule");
        assert_eq!(of("10.1.2.3", "198.51.100.1").as_deref(), Some("192.0.2.3"));
        assert_eq!(of("10.1.0.1", "10.9.0.1"), None);
        assert_eq!(of("172.16.0.1", "198.51.100.1"), None);
        assert_eq!(of("fd00::1", "2001:db8::9").as_deref(), Some("2001:db8::3"));
        assert_eq!(of("fd00::1", "fd00::2"), None);
        assert_eq!(EgressRules::default().lookup(ip("10.0.0.1"), ip("198.51.100.1"), || true), None);
    }

    #[test]
    fn pods_spread_over_addresses() {
        let rules = EgressRules::new(&[rule(&["10.0.0.0/8"], &[], &["192.0.2.1", "192.0.2.2", "2001:db8::1"])]);
        let of = |last: u8| rules.lookup([10, 0, 0, last].into(), ip("198.51.100.1"), || true);
        assert_eq!((of(1), of(2), of(3)), (Some(ip("192.0.2.2")), Some(ip("192.0.2.1")), Some(ip("192.0.2.2"))));
    }
}
