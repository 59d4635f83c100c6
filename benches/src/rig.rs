//! A worker with two ports and an uplink over memory, driven in bursts of 64.
//!
//! A port gives frames that hold copies of one packet with the ports of the next flow, and takes frames back at once. What
//! that alone costs is the bench `io`; subtract it to see the pipeline.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use vswitch_dataplane::connection::{ConnectionConfig, Connections};
use vswitch_dataplane::table::route::NextHop;
use vswitch_dataplane::table::service::{Backends, Front};
use vswitch_dataplane::vxlan::OuterHeader;
use vswitch_dataplane::{
    Access, BURST, Gateway, Network, NetworkMode, Path, Peer, Port, PortIo, PortKind, SenderCheck, Snapshot, Underlay,
    Worker, WorkerConfig,
};
use vswitch_net::{GATEWAY_MAC, GATEWAY_V4, GATEWAY_V6, MacAddr, NetworkIndex, PeerIndex, PortId, Vni, checksum};
use vswitch_xsk::{Packet, TxChecksum, Umem};

use crate::policies::Policies;

const UPLINK: PortId = PortId(0);
const POD: PortId = PortId(1);
const OTHER_POD: PortId = PortId(2);
const SERVICE: [u8; 4] = [10, 96, 0, 10];
const NETWORK: NetworkIndex = NetworkIndex(0);
const MACS: [MacAddr; 3] = [MacAddr([2, 0, 0, 0, 0, 0]), MacAddr([2, 0, 0, 0, 0, 1]), MacAddr([2, 0, 0, 0, 0, 2])];

/// The way of the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From pod to pod, routed.
    Local,
    /// From pod to pod by a service's address, translated.
    Service,
    /// From a pod to the wire, routed and encapsulated.
    Encap,
    /// From the wire to a pod, decapsulated and routed.
    Decap,
}

/// A worker to drive.
#[derive(Debug)]
pub struct Rig {
    worker: Worker<Memory>,
    snapshot: Snapshot,
    now_ns: u64,
}

/// A port that gives packets of one flow after the other, and swallows what it is sent.
#[derive(Debug, Default)]
struct Memory {
    source: Option<Source>,
    sent: u64,
}

/// Packets that differ in their UDP ports alone.
#[derive(Debug)]
struct Source {
    packet: Vec<u8>,
    /// Where the UDP header is.
    udp: usize,
    /// Sum of what the UDP checksum covers, with ports of zero.
    sum: u32,
    /// The first flow, how many there are, and which is next.
    first: usize,
    flows: usize,
    next: usize,
}

impl Source {
    fn new(way: Way, first: usize, flows: usize) -> Source {
        let packet = packet(way);
        let udp = packet.len() - (64 - 34);
        let sum = u32::from(!u16::from_be_bytes([packet[udp + 6], packet[udp + 7]]));
        Source { packet, udp, sum, first, flows, next: 0 }
    }

    /// Writes the next packet into a frame; the flow's number is in both ports.
    fn take(&mut self, umem: &mut Umem) -> Option<Packet> {
        let mut packet = umem.packet_from(&self.packet)?;
        let flow = self.first + self.next;
        let (source, destination) = ((flow % 50_000) as u16 + 1024, (flow / 50_000) as u16 + 80);
        let udp = &mut packet.head_mut().data_mut()[self.udp..self.udp + 8];
        udp[..2].copy_from_slice(&source.to_be_bytes());
        udp[2..4].copy_from_slice(&destination.to_be_bytes());
        let sum = checksum::finish_udp(self.sum + u32::from(source) + u32::from(destination));
        udp[6..8].copy_from_slice(&sum.to_be_bytes());
        self.next = if self.next + 1 == self.flows { 0 } else { self.next + 1 };
        Some(packet)
    }
}

impl PortIo for Memory {
    fn rx_burst(&mut self, umem: &mut Umem, out: &mut Vec<Packet>, max: usize) -> usize {
        let Some(source) = &mut self.source else { return 0 };
        let before = out.len();
        out.extend((0..max).map_while(|_| source.take(umem)));
        out.len() - before
    }

    fn tx_push(&mut self, umem: &mut Umem, packet: Packet, _: Option<TxChecksum>) -> Result<(), Packet> {
        umem.free_packet(packet);
        self.sent += 1;
        Ok(())
    }

    fn flush(&mut self, _: &mut Umem) -> bool {
        true
    }
}

impl Rig {
    /// Packets a turn.
    pub const BURST: u64 = BURST as u64;

    /// A rig for `flows` flows of 64-byte packets, warm.
    ///
    /// # Panics
    ///
    /// If the packets do not all come out at the other end.
    pub fn new(way: Way, flows: usize) -> Rig {
        Rig::with_policy(way, flows, None)
    }

    /// The same, both pods under policies that a compiler has made; it knows them by their addresses.
    ///
    /// # Panics
    ///
    /// If the packets do not all come out at the other end.
    pub fn with_policy(way: Way, flows: usize, policies: Option<&Policies>) -> Rig {
        let most = ConnectionConfig::default().limit;
        // Only what is translated or judged needs its connection.
        let port_limit =
            if way == Way::Service || policies.is_some() { most } else { ConnectionConfig::default().port_limit };
        let config = ConnectionConfig { seed: 0x77aa, port_limit, ..ConnectionConfig::default() };
        Rig::over(Arc::new(Connections::new(config)), way, 0, flows, policies)
    }

    /// As many workers as asked for, each with `flows` flows of its own, over one table of connections.
    ///
    /// # Panics
    ///
    /// If the packets do not all come out at the other end.
    pub fn workers(count: usize, way: Way, flows: usize, policies: Option<&Policies>) -> Vec<Rig> {
        let port_limit = ConnectionConfig::default().limit;
        let config = ConnectionConfig { seed: 0x77aa, port_limit, ..ConnectionConfig::default() };
        let connections = Arc::new(Connections::new(config));
        (0..count).map(|at| Rig::over(connections.clone(), way, at * flows, flows, policies)).collect()
    }

    fn over(connections: Arc<Connections>, way: Way, first: usize, flows: usize, policies: Option<&Policies>) -> Rig {
        let umem = Umem::new(1024).expect("memory");
        let config = WorkerConfig { flow_entries: (flows * 4).max(1024), seed: 0x9d3c_77a1, idle_turns: u32::MAX };
        let mut worker = Worker::new(umem, config, connections);
        let (from, to) = match way {
            Way::Local | Way::Service => (POD, OTHER_POD),
            Way::Encap => (POD, UPLINK),
            Way::Decap => (UPLINK, POD),
        };
        for port in [UPLINK, POD, OTHER_POD] {
            let source = (port == from).then(|| Source::new(way, first, flows));
            worker.insert_port(port, Memory { source, sent: 0 });
        }
        let mut rig = Rig { worker, snapshot: snapshot(), now_ns: 1 };
        if way == Way::Service {
            // A service for each port that the flows have.
            for port in 80..=80 + (flows / 50_000) as u16 {
                let front = Front { network: NETWORK, address: SERVICE.into(), port, protocol: 17 };
                let ends = vec![([10, 1, 0, 2].into(), port)];
                rig.snapshot.services.insert(front, Backends { ends, has_affinity: false });
            }
        }
        if let Some(policies) = policies {
            policies.hold(&mut rig.snapshot, [POD, OTHER_POD]);
        }
        let turns = flows.div_ceil(BURST) * 2;
        (0..turns).for_each(|_| rig.turn());
        let sent = rig.worker.port(to).map_or(0, |port| port.sent);
        assert_eq!(sent, (turns * BURST) as u64, "packets that did not come out");
        rig
    }

    /// One burst.
    pub fn turn(&mut self) {
        self.now_ns += 1000;
        self.worker.turn(self.now_ns, &self.snapshot);
    }

    /// One burst that misses the flow table with every packet.
    pub fn miss(&mut self) {
        self.snapshot.generation += 1;
        self.turn();
    }

    /// What giving and taking a burst of frames costs, and nothing else.
    pub fn io(&mut self) {
        let Some((port, umem)) = self.worker.port_and_umem(POD) else { return };
        let mut burst = Vec::with_capacity(BURST);
        port.rx_burst(umem, &mut burst, BURST);
        for packet in burst.drain(..) {
            // A port in memory never refuses.
            let _ = port.tx_push(umem, packet, None);
        }
    }
}

pub(crate) fn snapshot() -> Snapshot {
    let access = |number: usize| {
        let address: IpAddr = Ipv4Addr::new(10, 1, 0, number as u8).into();
        let access = Access::new(NETWORK, MACS[number], vec![address], SenderCheck::Full);
        Some(Arc::new(Port::new(65_000, PortKind::Access(access))))
    };
    let uplink = Port::new(1500, PortKind::Uplink(MACS[0]));
    let gateway = Gateway { mac: GATEWAY_MAC, v4: GATEWAY_V4, v6: GATEWAY_V6 };
    let network = Network {
        vni: vni(),
        mode: NetworkMode::Routed(gateway),
        router_v4: None,
        router_v6: None,
        mss: None,
        is_transparent: false,
        learns: true,
        multicast_routers: None,
        ports: vec![POD, OTHER_POD],
        flood_peers: Vec::new(),
    };
    let (ours, theirs) = (Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2));
    let header = OuterHeader::new((MACS[0], MACS[1]), ours.into(), theirs.into(), 4789, None).expect("one family");
    let paths = vec![Path { port: UPLINK, mtu: 1500, header }];
    let peer = Peer { vtep: theirs.into(), router_mac: GATEWAY_MAC, is_direct: false, paths };
    let mut snapshot = Snapshot {
        generation: 1,
        ports: vec![Some(Arc::new(uplink)), access(1), access(2)],
        networks: vec![Some(Arc::new(network))],
        peers: vec![Some(Arc::new(peer))],
        underlay: Underlay { v4: Some(ours), udp_port: 4789, ..Underlay::default() },
        ..Snapshot::default()
    };
    snapshot.vnis.insert(vni(), NETWORK);
    snapshot.vteps.insert(theirs.into(), PeerIndex(0));
    for (number, port) in [(1, POD), (2, OTHER_POD)] {
        let hop = NextHop::Port { port, mac: MACS[number] };
        snapshot.routes.insert(NETWORK, Ipv4Addr::new(10, 1, 0, number as u8).into(), 32, hop);
    }
    snapshot.routes.insert(NETWORK, Ipv4Addr::new(10, 2, 0, 0).into(), 24, NextHop::Peer(PeerIndex(0)));
    snapshot
}

fn packet(way: Way) -> Vec<u8> {
    match way {
        Way::Local => udp(MACS[1], [10, 1, 0, 1], [10, 1, 0, 2]),
        Way::Service => udp(MACS[1], [10, 1, 0, 1], SERVICE),
        Way::Encap => udp(MACS[1], [10, 1, 0, 1], [10, 2, 0, 9]),
        Way::Decap => {
            let inner = udp(GATEWAY_MAC, [10, 2, 0, 9], [10, 1, 0, 1]);
            let ends = (Ipv4Addr::new(192, 0, 2, 2).into(), Ipv4Addr::new(192, 0, 2, 1).into());
            let header = OuterHeader::new((MACS[1], MACS[0]), ends.0, ends.1, 4789, None).expect("one family");
            let mut packet = vec![0; header.len()];
            header.emit(&mut packet, vni(), 0, inner.len(), 0, || 0);
            packet.extend_from_slice(&inner);
            packet
        }
    }
}

/// A UDP packet of 64 bytes with ports of zero.
fn udp(from: MacAddr, source: [u8; 4], destination: [u8; 4]) -> Vec<u8> {
    let mut packet = vec![0; 64];
    packet[..6].copy_from_slice(&GATEWAY_MAC.0);
    packet[6..12].copy_from_slice(&from.0);
    packet[12..14].copy_from_slice(&[8, 0]);
    packet[14..24].copy_from_slice(&[0x45, 0, 0, 50, 0, 0, 0, 0, 64, 17]);
    packet[26..30].copy_from_slice(&source);
    packet[30..34].copy_from_slice(&destination);
    let sum = checksum::finish(checksum::sum(&packet[14..34]));
    packet[24..26].copy_from_slice(&sum.to_be_bytes());
    packet[38..40].copy_from_slice(&30_u16.to_be_bytes());
    let segment = checksum::sum(&packet[34..]) + checksum::sum(&packet[26..34]) + 17 + 30;
    packet[40..42].copy_from_slice(&checksum::finish_udp(segment).to_be_bytes());
    packet
}

fn vni() -> Vni {
    Vni::try_from(1).expect("a VNI")
}
