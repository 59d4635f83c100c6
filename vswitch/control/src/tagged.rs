//! Peers on an underlay with a tag of our own: the kernel has no device there, so the switch asks for them itself.
//!
//! Whom to ask for is known: the peers, or the gateways of the configuration. Answers of anybody else are not kept.

use std::net::{IpAddr, Ipv6Addr};

use vswitch_net::{MacAddr, PortId};

use crate::bridging::{OwnWay, ethernet, icmpv6};
use crate::underlay::{NextHop, UplinkState};
use crate::{Control, Own};

/// A neighbor is asked for again after this long, and forgotten after three times that.
const FRESH_NS: u64 = 20_000_000_000;

impl Control {
    /// Takes note of who told of himself.
    pub(crate) fn hear_neighbor(&mut self, now_ns: u64, address: IpAddr, mac: MacAddr) {
        if self.wanted().any(|wanted| wanted == address) {
            self.neighbors.insert(address, (mac, now_ns));
            self.resolve_tagged(now_ns);
        }
    }

    /// Asks for neighbors that are not known, or were not heard of for a while, and tells what is known.
    pub(crate) fn resolve_tagged(&mut self, now_ns: u64) {
        if self.config.vlan.is_none() {
            return;
        }
        let wanted: Vec<IpAddr> = self.wanted().collect();
        self.neighbors
            .retain(|address, (_, seen)| wanted.contains(address) && now_ns.saturating_sub(*seen) < 3 * FRESH_NS);
        let uplinks: Vec<(PortId, UplinkState)> =
            self.underlay.present().map(|(port, state)| (port, state.clone())).collect();
        for address in wanted {
            let known = self.neighbors.get(&address).copied();
            let is_fresh = known.is_some_and(|(_, seen)| now_ns.saturating_sub(seen) < FRESH_NS);
            for (port, state) in uplinks.iter().filter(|(_, state)| state.is_up && !is_fresh) {
                if let Some(bytes) = self.question(state, address) {
                    self.own.push(Own { way: OwnWay::Port(*port), bytes });
                }
            }
        }
        let peers: Vec<IpAddr> = self.vteps().collect();
        for peer in peers {
            let address = self.tagged_hop(peer);
            let mac = self.neighbors.get(&address).map(|(mac, _)| *mac);
            let hop = |(_, state): &(PortId, UplinkState)| NextHop {
                link: Some(state.link.clone()),
                address: Some(address),
                mac,
                mtu: None,
            };
            self.set_next_hops(peer, uplinks.iter().map(hop).collect());
        }
    }

    /// Next hops of all peers, each once.
    fn wanted(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let hops: std::collections::BTreeSet<IpAddr> = self.vteps().map(|peer| self.tagged_hop(peer)).collect();
        hops.into_iter()
    }

    /// The gateway of a peer's family, or the peer itself.
    fn tagged_hop(&self, peer: IpAddr) -> IpAddr {
        let of_family = self.config.gateways.iter().find(|gateway| gateway.is_ipv4() == peer.is_ipv4());
        of_family.copied().unwrap_or(peer)
    }

    /// An ARP request (RFC 826) or a neighbor solicitation (RFC 4861 section 4.3), with the tag.
    fn question(&self, uplink: &UplinkState, address: IpAddr) -> Option<Vec<u8>> {
        let mut frame = match (self.underlay.vtep_for(address)?, address) {
            (IpAddr::V4(own), IpAddr::V4(asked)) => {
                let mut frame = ethernet(MacAddr::BROADCAST, uplink.mac, 0x0806);
                frame.extend_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
                frame.extend_from_slice(&uplink.mac.0);
                frame.extend_from_slice(&own.octets());
                frame.extend_from_slice(&[0; 6]);
                frame.extend_from_slice(&asked.octets());
                frame
            }
            (IpAddr::V6(own), IpAddr::V6(asked)) => {
                let [.., d, e, f] = asked.octets();
                let group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(d), u16::from_be_bytes([e, f]));
                let mut body = vec![135, 0, 0, 0, 0, 0, 0, 0];
                body.extend_from_slice(&asked.octets());
                body.extend_from_slice(&[1, 1]);
                body.extend_from_slice(&uplink.mac.0);
                icmpv6(MacAddr([0x33, 0x33, 0xff, d, e, f]), uplink.mac, own, group, 255, &[], body)
            }
            _ => return None,
        };
        let [high, low] = self.config.vlan?.to_be_bytes();
        frame.splice(12..12, [0x81, 0, high, low]);
        Some(frame)
    }
}
