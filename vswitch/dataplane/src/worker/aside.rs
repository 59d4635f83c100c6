//! Packets that come by no device: what the switch makes itself, and what waited while its port had none.

use vswitch_net::PortId;

use super::{BURST, Worker, count_received};
use crate::counters::OWN;
use crate::egress::{Edit, Egress};
use crate::event::OwnWay;
use crate::parse::parse_own;
use crate::port::PortIo;
use crate::snapshot::Snapshot;
use crate::verdict::DropReason;

impl<P: PortIo> Worker<P> {
    /// Takes in what came from a port by another way than its device: while it had none.
    pub fn receive(&mut self, port: PortId, now_ns: u64, snapshot: &Snapshot, packets: &[&[u8]]) {
        self.counters.open_rules(snapshot.rules);
        for burst in packets.chunks(BURST) {
            for bytes in burst {
                match self.umem.packet_from(bytes) {
                    Some(packet) => self.burst.packets.push(packet),
                    None => self.count_lost(port, 1, DropReason::NoFrames),
                }
            }
            count_received(&mut self.counters, port, &self.burst.packets);
            self.limit(port, now_ns, snapshot);
            self.process(port, now_ns, snapshot);
        }
        self.flush();
    }

    /// Counts packets from a port that nobody could take in.
    pub fn count_lost(&mut self, port: PortId, packets: u64, reason: DropReason) {
        if let Some(counters) = self.counters.port_mut(port) {
            counters.rx_packets += packets;
            counters.drops[reason.index()] += packets;
        }
    }

    /// Sends a packet that the switch itself made.
    pub fn originate(&mut self, now_ns: u64, snapshot: &Snapshot, way: OwnWay, bytes: &[u8]) {
        let Worker { umem, ports, counters, scratch, config, .. } = self;
        let mut out = Egress { ports, umem, counters, snapshot, scratch, now_ns, is_quiet: true };
        let (network, ingress) = match way {
            OwnWay::Flood { network, from } => (network, from),
            OwnWay::Ports(network) | OwnWay::Peers(network) | OwnWay::Peer(network, _) => (network, OWN),
            OwnWay::Port(port) => {
                if let Some(packet) = out.umem.packet_from(bytes) {
                    count_received(out.counters, OWN, std::slice::from_ref(&packet));
                    out.send(packet, OWN, port, None);
                }
                return self.flush();
            }
        };
        // A frame that is taken must be sent or dropped.
        let Some(info) = snapshot.network(network) else { return };
        let Some(packet) = out.umem.packet_from(bytes) else { return };
        count_received(out.counters, ingress, std::slice::from_ref(&packet));
        match (parse_own(&packet, ingress, network, snapshot, config.seed), way) {
            (Err(reason), _) => out.drop(packet, ingress, reason),
            (Ok(meta), OwnWay::Peer(_, peer)) => out.encap(packet, &meta, peer, network, Edit::NONE),
            (Ok(meta), OwnWay::Peers(_)) => out.flood_peers(packet, &meta, info),
            (Ok(meta), OwnWay::Ports(_)) => out.flood_ports(packet, &meta, info),
            (Ok(meta), _) => out.flood(packet, &meta, info),
        }
        self.flush();
    }
}
