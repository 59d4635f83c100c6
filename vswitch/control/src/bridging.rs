//! What bridged networks do beyond forwarding: groups, known neighbors, mirrors, and what the switch itself sends there.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use vswitch_api::{
    Answer, ApiError, FdbTarget, GroupInfo, MirrorDirection, MirrorSpec, NetworkMode, PortSpec, SenderCheck,
};
pub use vswitch_dataplane::OwnWay;
use vswitch_dataplane::{Bucket, Location, Membership, Mirror, Receivers, Storm};
use vswitch_net::{MacAddr, NetworkIndex, PeerIndex, PortId, checksum};

use crate::checks::{check_name, conflict, invalid};
use crate::desired::{NetworkEntry, not_found};
use crate::groups::{ASK_NS, Heard, MEET_NS};
use crate::{Control, Dirty, membership};

/// A peer that asks for what is wanted here is told at most this often.
const TELL_NS: u64 = 1_000_000_000;

/// A packet that the switch sends of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Own {
    /// Where it goes.
    pub way: OwnWay,
    /// All of it, from the Ethernet header on.
    pub bytes: Vec<u8>,
}

impl Control {
    /// Packets to send, since the last call.
    pub fn take_own(&mut self) -> Vec<Own> {
        std::mem::take(&mut self.own)
    }

    /// Takes note of what a station said of a group, and tells the peers what is wanted here.
    pub(crate) fn hear_group(
        &mut self,
        now_ns: u64,
        network: NetworkIndex,
        at: Location,
        station: MacAddr,
        membership: Membership,
    ) {
        if !self.desired.is_at(network, at) || !self.snoops(network) {
            return;
        }
        match (membership, at) {
            (Membership::Ask, Location::Peer(peer)) => self.tell_groups(now_ns, network, peer),
            (Membership::Leave(group), Location::Port(port)) if self.has_many(port) => {
                if self.groups.leave_unless_heard(now_ns, network, group, at) {
                    self.own.push(Own { way: OwnWay::Ports(network), bytes: membership::query(group, 1) });
                }
                return;
            }
            _ => {}
        }
        let is_first = |group| !self.groups.is_wanted_here(network, group);
        let news = matches!((membership, at), (Membership::Join(group), Location::Port(_)) if is_first(group));
        if let Some(heard) = self.groups.heard(now_ns, network, at, station, membership) {
            self.set_group(network, heard);
            if let (true, Membership::Join(group)) = (news, membership) {
                self.own.push(Own { way: OwnWay::Peers(network), bytes: membership::report(station, group) });
            }
        }
    }

    /// True if several stations may be behind a port.
    fn has_many(&self, port: PortId) -> bool {
        self.desired.ports.get(&port).is_some_and(|entry| {
            let spec = &entry.record.spec;
            !spec.trunk.is_empty() || spec.hairpin || self.check_of(entry) == SenderCheck::None
        })
    }

    /// Answers another switch: what the ports here want. Once a second is enough.
    fn tell_groups(&mut self, now_ns: u64, network: NetworkIndex, peer: PeerIndex) {
        let told = self.told_groups_ns.insert((network, peer), now_ns);
        if let Some(told) = told.filter(|told| now_ns.saturating_sub(*told) < TELL_NS) {
            self.told_groups_ns.insert((network, peer), told);
            return;
        }
        let way = OwnWay::Peer(network, peer);
        let reports = self.groups.wanted_here(network).map(|(group, station)| membership::report(station, group));
        self.own.extend(reports.map(|bytes| Own { way, bytes }));
    }

    pub(crate) fn set_groups(&mut self, changed: Vec<(NetworkIndex, Heard)>) {
        changed.into_iter().for_each(|(network, heard)| self.set_group(network, heard));
    }

    fn set_group(&mut self, network: NetworkIndex, heard: Heard) {
        let groups: Vec<IpAddr> = match heard {
            Heard::Group(group) => vec![group],
            Heard::Router => self.groups.groups(network).map(|(group, _)| group).collect(),
        };
        for group in groups {
            self.tables.groups.set(network, group, self.groups.receivers(network, group));
        }
        // Nothing of this is in the flow table, so no entry is stale.
        self.mark(Dirty::Addition);
    }

    /// Who gets unwanted multicast of a network; none if it does not snoop.
    pub(crate) fn multicast_routers(&self, entry: &NetworkEntry) -> Option<Receivers> {
        entry.spec.multicast_snooping.then(|| self.groups.routers(entry.index))
    }

    fn snoops(&self, network: NetworkIndex) -> bool {
        self.desired.networks.values().any(|entry| entry.index == network && entry.spec.multicast_snooping)
    }

    /// Asks the ports and peers of snooping networks which groups they want, when it is time.
    pub(crate) fn ask_for_groups(&mut self, now_ns: u64) {
        let is_due = self.asked_ns.is_none_or(|asked| now_ns.saturating_sub(asked) >= ASK_NS);
        let snooping: Vec<NetworkIndex> = self
            .desired
            .networks
            .values()
            .filter(|entry| entry.spec.multicast_snooping)
            .map(|entry| entry.index)
            .collect();
        if is_due {
            // The first time nothing is known, and it is urgent.
            let seconds = if self.asked_ns.is_none() { 1 } else { 10 };
            self.asked_ns = Some(now_ns);
            for &network in &snooping {
                self.ask(OwnWay::Ports(network), seconds);
                self.ask(OwnWay::Peers(network), seconds);
            }
        }
        for network in snooping {
            self.meet_peers(now_ns, network);
        }
    }

    /// A peer that can be reached since lately is asked until it had the time to answer, and gets everything so long.
    fn meet_peers(&mut self, now_ns: u64, network: NetworkIndex) {
        let Some(entry) = self.desired.networks.values().find(|entry| entry.index == network) else { return };
        let is_reachable = |peer: &PeerIndex| {
            let entry = self.desired.peers.values().find(|entry| entry.index == *peer);
            entry.is_some_and(|entry| entry.spec.vteps().any(|vtep| self.underlay.ways(vtep).next().is_some()))
        };
        let peers: BTreeSet<PeerIndex> = self.flood_peers(entry).into_iter().filter(is_reachable).collect();
        self.met.retain(|(other, peer), _| *other != network || peers.contains(peer));
        self.told_groups_ns.retain(|(other, peer), _| *other != network || peers.contains(peer));
        for peer in peers {
            let met = *self.met.entry((network, peer)).or_insert(now_ns);
            if now_ns.saturating_sub(met) < MEET_NS {
                if self.groups.meet(network, Location::Peer(peer), met + MEET_NS) {
                    self.set_group(network, Heard::Router);
                }
                self.ask(OwnWay::Peer(network, peer), 1);
            }
        }
    }

    /// Asks for all groups, to be answered within so many seconds. Nobody takes who asks like this for a router.
    fn ask(&mut self, way: OwnWay, seconds: u8) {
        for bytes in [membership::igmp_query(None, seconds), membership::mld_query(None, seconds)] {
            self.own.push(Own { way, bytes });
        }
    }

    /// A station came to a port: others may have it elsewhere, and hear of the move now (RFC 5227 section 3, RFC 4861
    /// section 7.2.6).
    pub(crate) fn announce(&mut self, network: NetworkIndex, port: PortId, mac: MacAddr, addresses: &[IpAddr]) {
        for &address in addresses {
            let bytes = match address {
                IpAddr::V4(v4) => gratuitous_arp(mac, v4),
                IpAddr::V6(v6) => unsolicited_advertisement(mac, v6),
            };
            self.own.push(Own { way: OwnWay::Flood { network, from: port }, bytes });
        }
        if self.snoops(network) {
            // The newcomer is asked with all others; what it wants is known without waiting for the next round.
            self.ask(OwnWay::Ports(network), 10);
        }
    }

    /// The storm limits of the networks that a port carries; its buckets live as long as the port.
    pub(crate) fn storms_of(&self, port: &PortSpec, own: &NetworkEntry) -> Vec<(NetworkIndex, Arc<Storm>)> {
        let is_carried = |entry: &&NetworkEntry| {
            entry.index == own.index || entry.spec.vlan.is_some_and(|vid| port.trunk.contains(&vid))
        };
        let bucket = |rate: u64| (rate > 0).then(|| Bucket::new(rate, (rate / 10).max(10)));
        let storm = |entry: &NetworkEntry| {
            let limits = entry.spec.storm?;
            let storm = Storm {
                broadcast: bucket(limits.broadcast),
                multicast: bucket(limits.multicast),
                unknown: bucket(limits.unknown_unicast),
            };
            Some((entry.index, Arc::new(storm)))
        };
        self.desired.networks.values().filter(is_carried).filter_map(storm).collect()
    }

    pub(crate) fn add_mirror(&mut self, spec: MirrorSpec) -> Result<Answer, ApiError> {
        check_name("mirror", &spec.name)?;
        if self.desired.mirrors.contains_key(&spec.name) {
            return Err(conflict(format!("mirror \"{}\" exists: remove it first, or choose another name", spec.name)));
        }
        if spec.ports.is_empty() {
            return Err(invalid("ports: a mirror needs a port to look at"));
        }
        for link in &spec.ports {
            if self.desired.port_of_link(link).is_none() {
                return Err(not_found(format!("no port of link {link}: `switchctl port list` shows them")));
            }
        }
        match &spec.to {
            FdbTarget::Port(link) => {
                let is_seen = spec.ports.contains(link);
                if self.desired.port_of_link(link).is_none() || is_seen {
                    return Err(invalid(format!(
                        "to: {link} is no port, or one that is looked at: name another port (`switchctl port list`)"
                    )));
                }
                if spec.network.is_some() {
                    return Err(invalid("network: only a mirror to a peer travels in a network"));
                }
            }
            FdbTarget::Peer(peer) => {
                self.desired.own_peer(peer)?;
                let name = spec.network.as_deref().ok_or_else(|| {
                    invalid("network: a mirror to a peer needs the network (its VNI) that the copies travel in")
                })?;
                let network = self.desired.network(Some(name))?;
                if network.spec.mode != NetworkMode::Bridged {
                    return Err(invalid(format!("network: \"{name}\" is routed; copies travel in a bridged one")));
                }
            }
        }
        self.desired.mirrors.insert(spec.name.clone(), spec);
        self.mark(Dirty::Change);
        Ok(Answer::Done)
    }

    pub(crate) fn remove_mirror(&mut self, name: &str) -> Result<Answer, ApiError> {
        if self.desired.mirrors.remove(name).is_none() {
            return Err(not_found(format!("no mirror \"{name}\": `switchctl mirror list` shows them")));
        }
        self.mark(Dirty::Change);
        Ok(Answer::Done)
    }

    /// Who gets copies of what a port sends, and of what is sent to it.
    pub(crate) fn mirrors_of(&self, link: &str) -> (Vec<Mirror>, Vec<Mirror>) {
        let (mut from, mut to) = (Vec::new(), Vec::new());
        for spec in self.desired.mirrors.values().filter(|spec| spec.ports.iter().any(|port| port == link)) {
            let target = match &spec.to {
                FdbTarget::Port(link) => self.desired.port_of_link(link).map(Mirror::Port),
                FdbTarget::Peer(name) => {
                    let network = spec.network.as_ref().and_then(|name| self.desired.networks.get(name));
                    let peer = self.desired.peers.get(name);
                    peer.zip(network).map(|(peer, network)| Mirror::Peer(peer.index, network.index))
                }
            };
            let Some(target) = target else { continue };
            if spec.direction != MirrorDirection::To {
                from.push(target);
            }
            if spec.direction != MirrorDirection::From {
                to.push(target);
            }
        }
        (from, to)
    }

    pub(crate) fn group_list(&self, now_ns: u64) -> Vec<GroupInfo> {
        let mut groups = Vec::new();
        for entry in self.desired.networks.values() {
            for (group, members) in self.groups.groups(entry.index) {
                groups.extend(members.iter().map(|(&at, member)| GroupInfo {
                    network: entry.spec.name.clone(),
                    group,
                    at: self.target(at),
                    age_seconds: now_ns.saturating_sub(member.seen_ns) / 1_000_000_000,
                }));
            }
        }
        groups
    }
}

pub(crate) fn ethernet(to: MacAddr, from: MacAddr, ethertype: u16) -> Vec<u8> {
    [&to.0[..], &from.0[..], &ethertype.to_be_bytes()[..]].concat()
}

/// An announcement: a request for one's own address (RFC 5227 section 3).
fn gratuitous_arp(mac: MacAddr, address: Ipv4Addr) -> Vec<u8> {
    let mut frame = ethernet(MacAddr::BROADCAST, mac, 0x0806);
    frame.extend_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend_from_slice(&mac.0);
    frame.extend_from_slice(&address.octets());
    frame.extend_from_slice(&[0; 6]);
    frame.extend_from_slice(&address.octets());
    frame
}

/// An unsolicited neighbor advertisement that overrides (RFC 4861 section 7.2.6).
fn unsolicited_advertisement(mac: MacAddr, address: Ipv6Addr) -> Vec<u8> {
    let all = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let mut body = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
    body.extend_from_slice(&address.octets());
    body.extend_from_slice(&[2, 1]);
    body.extend_from_slice(&mac.0);
    icmpv6(MacAddr([0x33, 0x33, 0, 0, 0, 1]), mac, address, all, 255, &[], body)
}

pub(crate) fn icmpv6(
    to_mac: MacAddr,
    from_mac: MacAddr,
    from: Ipv6Addr,
    to: Ipv6Addr,
    hops: u8,
    options: &[u8],
    mut body: Vec<u8>,
) -> Vec<u8> {
    let sum = checksum::pseudo_v6(from, to, 58, body.len() as u32) + checksum::sum(&body);
    body[2..4].copy_from_slice(&checksum::finish(sum).to_be_bytes());
    let mut frame = ethernet(to_mac, from_mac, 0x86dd);
    let length = (options.len() + body.len()) as u16;
    frame.extend_from_slice(&[0x60, 0, 0, 0]);
    frame.extend_from_slice(&length.to_be_bytes());
    frame.extend_from_slice(&[if options.is_empty() { 58 } else { 0 }, hops]);
    frame.extend_from_slice(&from.octets());
    frame.extend_from_slice(&to.octets());
    frame.extend_from_slice(options);
    frame.extend_from_slice(&body);
    frame
}
