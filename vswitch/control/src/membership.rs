//! Questions and reports of multicast groups, as the switch sends them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use vswitch_net::{GATEWAY_MAC, MacAddr, checksum};

use crate::bridging::{ethernet, icmpv6};

/// Hop-by-hop options with a router alert (RFC 2711) and padding.
const ALERT_V6: [u8; 8] = [58, 0, 5, 2, 0, 0, 1, 0];

/// Asks who wants a group, of its family.
pub(crate) fn query(group: IpAddr, seconds: u8) -> Vec<u8> {
    match group {
        IpAddr::V4(v4) => igmp_query(Some(v4), seconds),
        IpAddr::V6(v6) => mld_query(Some(v6), seconds),
    }
}

/// A query of IGMPv2, which v3 hosts understand too (RFC 2236 section 2), from nobody (RFC 4541 section 2.1.1): for one
/// group, or for all.
pub(crate) fn igmp_query(group: Option<Ipv4Addr>, seconds: u8) -> Vec<u8> {
    let to = group.unwrap_or(Ipv4Addr::new(224, 0, 0, 1));
    igmp(GATEWAY_MAC, to, 0x11, seconds.saturating_mul(10), group.unwrap_or(Ipv4Addr::UNSPECIFIED))
}

/// A query of MLD (RFC 3810 section 5.1), from the link-local address of the gateway's MAC: for one group, or for all.
pub(crate) fn mld_query(group: Option<Ipv6Addr>, seconds: u8) -> Vec<u8> {
    let all = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let mut body = vec![130, 0, 0, 0];
    body.extend_from_slice(&(u16::from(seconds) * 1000).to_be_bytes());
    body.extend_from_slice(&[0, 0]);
    body.extend_from_slice(&group.unwrap_or(Ipv6Addr::UNSPECIFIED).octets());
    // Robustness 2, an interval of 125 seconds, no sources.
    body.extend_from_slice(&[2, 125, 0, 0]);
    let to = group.unwrap_or(all);
    icmpv6(group_mac_v6(to), GATEWAY_MAC, GATEWAY_MAC.link_local(), to, 1, &ALERT_V6, body)
}

/// What a station has said, said for it: that it wants a group. An IGMPv2 report from nobody (RFC 4541 section 2.1.1), or one
/// of MLDv1 (RFC 2710 section 3).
pub(crate) fn report(station: MacAddr, group: IpAddr) -> Vec<u8> {
    match group {
        IpAddr::V4(v4) => igmp(station, v4, 0x16, 0, v4),
        IpAddr::V6(v6) => {
            let mut body = vec![131, 0, 0, 0, 0, 0, 0, 0];
            body.extend_from_slice(&v6.octets());
            icmpv6(group_mac_v6(v6), station, station.link_local(), v6, 1, &ALERT_V6, body)
        }
    }
}

fn igmp(from: MacAddr, to: Ipv4Addr, kind: u8, code: u8, group: Ipv4Addr) -> Vec<u8> {
    let [_, b, c, d] = to.octets();
    let mut frame = ethernet(MacAddr([1, 0, 0x5e, b & 0x7f, c, d]), from, 0x0800);
    // Router alert (RFC 2113), precedence 6, hop limit 1, from nobody.
    let mut ip = [0x46, 0xc0, 0, 32, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 148, 4, 0, 0];
    ip[16..20].copy_from_slice(&to.octets());
    let sum = checksum::finish(checksum::sum(&ip));
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut message = [kind, code, 0, 0, 0, 0, 0, 0];
    message[4..].copy_from_slice(&group.octets());
    let sum = checksum::finish(checksum::sum(&message));
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    frame.extend_from_slice(&ip);
    frame.extend_from_slice(&message);
    frame
}

/// RFC 2464 section 7.
fn group_mac_v6(group: Ipv6Addr) -> MacAddr {
    let [.., c, d, e, f] = group.octets();
    MacAddr([0x33, 0x33, c, d, e, f])
}
