//! Peers on an underlay with a tag of our own: the kernel has no device there, so the switch asks for them itself.
//!
//! Whom to ask for is known: the peers, or the gateways of the configuration. Answers of anybody else are not kept.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};

use vswitch_net::{MacAddr, PortId};

use crate::bridging::{OwnWay, ethernet, icmpv6};
use crate::underlay::{NextHop, UplinkState};
use crate::{Control, Own};

/// A neighbor is asked for again after this long, and forgotten after three times that.
const FRESH_NS: u64 = 20_000_000_000;

/// Longest time between two questions for one that does not answer.
const PATIENCE_NS: u64 = 16_000_000_000;

/// Most questions of one uplink at a time. The rest is asked a second later.
const QUESTIONS: usize = 64;

const SECOND_NS: u64 = 1_000_000_000;

/// What is known of a neighbor on one uplink.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct TaggedNeighbor {
    mac: Option<MacAddr>,
    seen_ns: u64,
    asked_ns: Option<u64>,
    /// Questions since it was heard of.
    questions: u32,
}

impl Control {
    /// Takes note of who told of himself on an uplink.
    pub(crate) fn hear_neighbor(&mut self, now_ns: u64, port: PortId, address: IpAddr, mac: MacAddr) {
        let of_family = |gateway: &&IpAddr| gateway.is_ipv4() == address.is_ipv4();
        let peers: Vec<IpAddr> = match self.config.gateways.iter().find(of_family) {
            Some(gateway) if *gateway == address => {
                self.vteps().filter(|peer| peer.is_ipv4() == address.is_ipv4()).collect()
            }
            Some(_) => Vec::new(),
            None => self.desired.by_vtep.get(&address).map(|_| address).into_iter().collect(),
        };
        if peers.is_empty() || mac.is_multicast() || mac.is_zero() {
            return;
        }
        let neighbor = TaggedNeighbor { mac: Some(mac), seen_ns: now_ns, asked_ns: None, questions: 0 };
        self.neighbors.insert((port, address), neighbor);
        peers.into_iter().for_each(|peer| self.tell_next_hops(peer));
    }

    /// Asks for neighbors that are not known, or were not heard of for a while, and tells what is known.
    pub(crate) fn resolve_tagged(&mut self, now_ns: u64) {
        if self.config.vlan.is_none() {
            return;
        }
        let wanted: BTreeSet<IpAddr> = self.vteps().map(|peer| self.tagged_hop(peer)).collect();
        let uplinks: Vec<(PortId, UplinkState)> =
            self.underlay.present().map(|(port, state)| (port, state.clone())).collect();
        self.neighbors
            .retain(|(port, address), _| wanted.contains(address) && uplinks.iter().any(|(other, _)| other == port));
        for neighbor in self.neighbors.values_mut() {
            if now_ns.saturating_sub(neighbor.seen_ns) >= 3 * FRESH_NS {
                neighbor.mac = None;
            }
        }
        for (port, state) in uplinks.iter().filter(|(_, state)| state.is_up) {
            let due = wanted.iter().copied().filter(|&address| {
                let neighbor = self.neighbors.get(&(*port, address)).copied().unwrap_or_default();
                neighbor.is_due(now_ns, address)
            });
            let due: Vec<IpAddr> = due.take(QUESTIONS).collect();
            for address in due {
                let neighbor = self.neighbors.entry((*port, address)).or_default();
                neighbor.asked_ns = Some(now_ns);
                neighbor.questions = neighbor.questions.saturating_add(1);
                let mac = neighbor.mac;
                if let Some(bytes) = self.question(state, address, mac) {
                    self.own.push(Own { way: OwnWay::Port(*port), bytes });
                }
            }
        }
        let peers: Vec<IpAddr> = self.vteps().collect();
        peers.into_iter().for_each(|peer| self.tell_next_hops(peer));
    }

    fn tell_next_hops(&mut self, peer: IpAddr) {
        let address = self.tagged_hop(peer);
        let hop = |(port, state): (PortId, &UplinkState)| NextHop {
            link: Some(state.link.clone()),
            address: Some(address),
            mac: self.neighbors.get(&(port, address)).and_then(|neighbor| neighbor.mac),
            mtu: None,
        };
        let hops = self.underlay.present().map(hop).collect();
        self.set_next_hops(peer, hops);
    }

    /// The gateway of a peer's family, or the peer itself.
    fn tagged_hop(&self, peer: IpAddr) -> IpAddr {
        let of_family = self.config.gateways.iter().find(|gateway| gateway.is_ipv4() == peer.is_ipv4());
        of_family.copied().unwrap_or(peer)
    }

    /// An ARP request (RFC 826) or a neighbor solicitation (RFC 4861 section 4.3), with the tag; to all, or to who is asked
    /// only whether he is still there.
    fn question(&self, uplink: &UplinkState, address: IpAddr, known: Option<MacAddr>) -> Option<Vec<u8>> {
        let mut frame = match (self.underlay.vtep_for(address)?, address) {
            (IpAddr::V4(own), IpAddr::V4(asked)) => {
                let mut frame = ethernet(known.unwrap_or(MacAddr::BROADCAST), uplink.mac, 0x0806);
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
                icmpv6(known.unwrap_or(MacAddr([0x33, 0x33, 0xff, d, e, f])), uplink.mac, own, group, 255, &[], body)
            }
            _ => return None,
        };
        let [high, low] = self.config.vlan?.to_be_bytes();
        frame.splice(12..12, [0x81, 0, high, low]);
        Some(frame)
    }
}

impl TaggedNeighbor {
    /// True if it is time to ask. Those of one hour are not asked in one moment, and the silent ones ever less often.
    fn is_due(&self, now_ns: u64, address: IpAddr) -> bool {
        let spread = match address {
            IpAddr::V4(v4) => v4.octets()[3],
            IpAddr::V6(v6) => v6.octets()[15],
        };
        let fresh_ns = FRESH_NS + u64::from(spread % 8) * SECOND_NS;
        if self.mac.is_some() && now_ns.saturating_sub(self.seen_ns) < fresh_ns {
            return false;
        }
        let patience_ns = (SECOND_NS << self.questions.saturating_sub(1).min(10)).min(PATIENCE_NS);
        self.asked_ns.is_none_or(|asked| now_ns.saturating_sub(asked) >= patience_ns)
    }
}
