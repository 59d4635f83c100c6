//! The built-in IPAM: addresses of this node's ranges.
//!
//! There is no list of leases. An address is in use if a port has it, and ports live only as long as their links, so
//! nothing can leak: not by a crash between two files, not by a hard reboot. A cursor a range makes a freed address the
//! last to be given out again.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// Addresses of a range that may be given out, first and last: not the network's own and, for IPv4, not its broadcast.
pub(crate) fn bounds(range: &IpNet) -> (u128, u128) {
    match range {
        IpNet::V4(v4) => {
            let (first, last) = (u128::from(v4.network().to_bits()), u128::from(v4.broadcast().to_bits()));
            if v4.prefix_len() >= 31 { (first, last) } else { (first + 1, last - 1) }
        }
        IpNet::V6(v6) => {
            // The first one is the subnet-router anycast address (RFC 4291 section 2.6.1).
            let (first, last) = (v6.network().to_bits(), v6.broadcast().to_bits());
            if v6.prefix_len() >= 127 { (first, last) } else { (first + 1, last) }
        }
    }
}

/// The address that this node itself has in a range: the first, unless the range is too small to give one away.
pub(crate) fn router(range: &IpNet) -> Option<IpAddr> {
    let (first, last) = bounds(range);
    (last - first >= 2).then(|| address(range, first))
}

/// The next free address after `cursor`, going round once.
pub(crate) fn allocate(range: &IpNet, cursor: Option<u128>, used: &BTreeSet<IpAddr>) -> Option<IpAddr> {
    let (first, last) = bounds(range);
    let start = cursor.filter(|at| (first..last).contains(at)).map_or(first, |at| at + 1);
    // One more try than addresses in use must find a free one, if there is any.
    let tries = used.len() as u128 + 1;
    let size = last - first + 1;
    (0..tries.min(size)).map(|step| address(range, first + (start - first + step) % size)).find(|at| !used.contains(at))
}

/// How many addresses of a range are in use, and how many are free.
pub(crate) fn usage(range: &IpNet, used: &BTreeSet<IpAddr>) -> (u64, u64) {
    let (first, last) = bounds(range);
    let taken = used.iter().filter(|at| range.contains(*at)).count() as u64;
    let size = u64::try_from(last - first).unwrap_or(u64::MAX).saturating_add(1);
    (taken, size.saturating_sub(taken))
}

/// An address as a number of its family.
pub(crate) fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

fn address(range: &IpNet, number: u128) -> IpAddr {
    match range {
        IpNet::V4(_) => Ipv4Addr::from_bits(number as u32).into(),
        IpNet::V6(_) => Ipv6Addr::from_bits(number).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn gives_every_address_once_and_then_none() {
        for (range, count) in [("10.0.0.0/29", 6), ("10.0.0.0/31", 2), ("10.0.0.7/32", 1), ("fd00::/125", 7)] {
            let (range, mut used, mut cursor) = (net(range), BTreeSet::new(), None);
            while let Some(address) = allocate(&range, cursor, &used) {
                assert!(range.contains(&address));
                assert!(used.insert(address), "twice");
                cursor = Some(number(address));
            }
            assert_eq!(used.len(), count, "{range}");
            assert_eq!(usage(&range, &used), (count as u64, 0));
        }
    }

    #[test]
    fn a_freed_address_comes_last() {
        let range = net("10.0.0.0/29");
        let mut used: BTreeSet<IpAddr> = ["10.0.0.1", "10.0.0.2"].map(|a| a.parse().unwrap()).into();
        used.remove(&"10.0.0.1".parse::<IpAddr>().unwrap());
        let cursor = Some(number("10.0.0.2".parse().unwrap()));
        assert_eq!(allocate(&range, cursor, &used), Some("10.0.0.3".parse().unwrap()));
    }

    #[test]
    fn large_ranges_are_no_matter() {
        let range = net("fd00::/64");
        assert_eq!(allocate(&range, None, &BTreeSet::new()), Some("fd00::1".parse().unwrap()));
        assert_eq!(usage(&range, &BTreeSet::new()), (0, u64::MAX));
    }
}
