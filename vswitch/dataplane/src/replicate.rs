//! Packets that go to many: floods, groups, mirrors. Each receiver gets a copy of its own, and the books balance.

use vswitch_net::{PeerIndex, PortId};
use vswitch_xsk::Packet;

use crate::egress::{Edit, Egress, complete, fits, push_tag};
use crate::judge;
use crate::meta::{Checksum, Meta};
use crate::multicast::{self, Membership};
use crate::port::PortIo;
use crate::snapshot::{Mirror, Network};
use crate::verdict::DropReason;
use crate::vxlan::TAG;

impl<P: PortIo> Egress<'_, P> {
    /// To every other port of the network and, if it did not come from the wire, to every peer of it.
    pub(crate) fn flood(&mut self, packet: Packet, meta: &Meta, network: &Network) {
        self.replicate(packet, meta, &network.ports, &network.flood_peers, DropReason::NoReceiver);
    }

    /// To every other port of the network.
    pub(crate) fn flood_ports(&mut self, packet: Packet, meta: &Meta, network: &Network) {
        self.replicate(packet, meta, &network.ports, &[], DropReason::NoReceiver);
    }

    /// To every peer of the network.
    pub(crate) fn flood_peers(&mut self, packet: Packet, meta: &Meta, network: &Network) {
        self.replicate(packet, meta, &[], &network.flood_peers, DropReason::NoReceiver);
    }

    /// To the members of a packet's group, and to multicast routers. A report goes to routers only, behind peers if control
    /// knows of all that it says: peers are told by control, which takes no more of a port than it may have. Questions of
    /// other switches end here, and are answered by control.
    pub(crate) fn multicast(&mut self, packet: Packet, meta: &Meta, network: &Network) {
        let Some(routers) = &network.multicast_routers else { return self.flood(packet, meta, network) };
        let head = packet.head().data();
        if multicast::is_report(meta, head) {
            let may_pass = !routers.peers.is_empty() && self.is_known(meta, head);
            let peers = if may_pass { &routers.peers[..] } else { &[] };
            return self.replicate(packet, meta, &routers.ports, peers, DropReason::NoReceiver);
        }
        if multicast::is_ask(meta, head) {
            return self.drop(packet, meta.ingress, DropReason::NoReceiver);
        }
        let group = meta.addresses().map(|(_, group)| group);
        let members = group.and_then(|group| self.snapshot.groups.lookup(meta.network, group)).unwrap_or(routers);
        self.replicate(packet, meta, &members.ports, &members.peers, DropReason::NoMember);
    }

    /// True if control has taken all memberships of a report from a port here.
    fn is_known(&self, meta: &Meta, head: &[u8]) -> bool {
        let mut is_known = true;
        multicast::memberships(meta, head, |membership| {
            if let Membership::Join(group) = membership {
                let members = self.snapshot.groups.lookup(meta.network, group);
                is_known &= members.is_some_and(|members| members.ports.contains(&meta.ingress));
            }
        });
        is_known
    }

    fn replicate(&mut self, packet: Packet, meta: &Meta, ports: &[PortId], peers: &[PeerIndex], nobody: DropReason) {
        let mut receivers = 0;
        let sender = self.snapshot.access(meta.ingress);
        let is_isolated = sender.is_some_and(|sender| sender.is_isolated);
        // A hairpin has several stations behind it, which must find each other; it sends nothing of the switch's own.
        let is_hairpin = !self.is_quiet && sender.is_some_and(|sender| sender.is_hairpin);
        let was_quiet = std::mem::replace(&mut self.is_quiet, true);
        for &port in ports {
            let is_receiver = if port == meta.ingress {
                is_hairpin
            } else {
                !is_isolated || self.snapshot.access(port).is_none_or(|receiver| !receiver.is_isolated)
            };
            if !is_receiver {
                continue;
            }
            receivers += 1;
            if !judge::may_flood(self.snapshot, meta, Some(port)) {
                self.refuse_copy(meta.ingress);
                continue;
            }
            if let Some(copy) = self.copy(&packet, meta.ingress) {
                self.local(copy, meta, port, Edit::NONE);
            }
        }
        if meta.peer.is_none() {
            let may_leave = peers.is_empty() || judge::may_flood(self.snapshot, meta, None);
            for &peer in peers {
                receivers += 1;
                if !may_leave {
                    self.refuse_copy(meta.ingress);
                } else if let Some(copy) = self.copy(&packet, meta.ingress) {
                    self.encap(copy, meta, peer, meta.network, Edit::NONE);
                }
            }
        }
        self.is_quiet = was_quiet;
        if receivers == 0 {
            return self.drop(packet, meta.ingress, nobody);
        }
        // Every receiver had a copy of its own; the original is the one too many.
        if let Some(counters) = self.counters.port_mut(meta.ingress) {
            counters.copies -= 1;
        }
        self.umem.free_packet(packet);
    }

    /// Copies of what a port sent, as it came, to whom they are due: with the tag that parsing took off, if any.
    pub(crate) fn mirror_from(&mut self, packet: &Packet, meta: &Meta, tag: Option<u16>) {
        let snapshot = self.snapshot;
        for &mirror in snapshot.port(meta.ingress).map_or(&[][..], |port| &port.mirrors_from) {
            self.mirror(packet, meta, mirror, meta.l4, tag);
        }
    }

    /// Copies of what a port is sent, as it gets it.
    #[cold]
    #[inline(never)]
    pub(crate) fn mirror_to(&mut self, packet: &Packet, meta: &Meta, mirrors: &[Mirror], l4: u16) {
        mirrors.iter().for_each(|&mirror| self.mirror(packet, meta, mirror, l4, None));
    }

    /// A copy to one who gets it. It keeps no order with the packet itself, and is lost before it is.
    fn mirror(&mut self, packet: &Packet, meta: &Meta, mirror: Mirror, l4: u16, tag: Option<u16>) {
        let Some(mut copy) = self.copy(packet, meta.ingress) else { return };
        if let Some(Err(reason)) = tag.map(|tag| push_tag(&mut copy, tag)) {
            return self.drop(copy, meta.ingress, reason);
        }
        let l4 = if tag.is_some() { l4 + TAG as u16 } else { l4 };
        // Of no connection with its segment size, and never a reason to speak to the sender.
        let meta = Meta { l3: meta.l3 + (l4 - meta.l4), l4, is_syn: false, is_control: false, ..*meta };
        match mirror {
            Mirror::Port(port) => {
                if let Checksum::Partial { offset } = meta.checksum {
                    // Who looks wants to see the packet as the wire would have it.
                    complete(&mut copy, &meta, offset, self.umem);
                }
                if self.snapshot.port(port).is_some_and(|info| fits(&copy, info)) {
                    self.send(copy, meta.ingress, port, None);
                } else {
                    self.drop(copy, meta.ingress, DropReason::TooBigForPort);
                }
            }
            Mirror::Peer(peer, network) => match self.encapsulate(&mut copy, &meta, peer, network, Edit::NONE) {
                Ok(port) => self.send(copy, meta.ingress, port, None),
                Err(reason) => self.drop(copy, meta.ingress, reason),
            },
        }
    }

    /// A copy that its receiver's policies do not let pass.
    fn refuse_copy(&mut self, ingress: PortId) {
        if let Some(counters) = self.counters.port_mut(ingress) {
            counters.copies += 1;
        }
        self.counters.drop(ingress, DropReason::PolicyDenied);
    }

    /// A copy, counted; none, counted as dropped, if there are no frames.
    fn copy(&mut self, packet: &Packet, ingress: PortId) -> Option<Packet> {
        if let Some(counters) = self.counters.port_mut(ingress) {
            counters.copies += 1;
        }
        let copy = self.umem.copy_packet(packet);
        if copy.is_none() {
            self.counters.drop(ingress, DropReason::NoFrames);
        }
        copy
    }
}
