//! TCP from as many clients as wanted to one pod with a policy, by way of the port into the host's stack.

use std::net::Ipv4Addr;
use std::sync::Arc;

use vswitch_dataplane::connection::{ConnectionConfig, ConnectionCounts, Connections};
use vswitch_dataplane::table::policy::{Judgement, PolicySet, Row, RuleId, Step, Subject, Usual};
use vswitch_dataplane::{Access, Port, PortIo, PortKind, SenderCheck, Snapshot, Worker, WorkerConfig};
use vswitch_net::{GATEWAY_MAC, MacAddr, NetworkIndex, PortId, checksum};
use vswitch_xsk::{Packet, TxChecksum, Umem};

use crate::rig;

const POD: PortId = PortId(1);
const HOST: PortId = PortId(3);
const HOST_MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 3]);
const POD_MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
const SYN: u8 = 2;
const ACK: u8 = 16;

/// Both ports: each makes the segments of its side, from client `next` to `end`.
#[derive(Debug)]
struct Clients {
    template: Vec<u8>,
    /// The sum of the segment without the client's address.
    sum: u32,
    is_client: bool,
    next: u64,
    end: u64,
    received: u64,
}

/// A worker between clients and a pod.
#[derive(Debug)]
pub struct Flood {
    worker: Worker<Clients>,
    connections: Arc<Connections>,
    snapshot: Snapshot,
    now_ns: u64,
}

impl Clients {
    fn new(is_client: bool) -> Clients {
        Clients { template: Vec::new(), sum: 0, is_client, next: 0, end: 0, received: 0 }
    }

    /// What the next segments are.
    fn set(&mut self, flags: u8, (seq, ack): (u32, u32), clients: std::ops::Range<u64>) {
        let mut packet = vec![0; 54];
        let (from, ports) = if self.is_client { (HOST_MAC, [40_000_u16, 80]) } else { (POD_MAC, [80, 40_000]) };
        packet[..6].copy_from_slice(&GATEWAY_MAC.0);
        packet[6..12].copy_from_slice(&from.0);
        packet[12..14].copy_from_slice(&[8, 0]);
        packet[14..24].copy_from_slice(&[0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6]);
        let pod = if self.is_client { 30 } else { 26 };
        packet[pod..pod + 4].copy_from_slice(&[10, 1, 0, 1]);
        packet[34..36].copy_from_slice(&ports[0].to_be_bytes());
        packet[36..38].copy_from_slice(&ports[1].to_be_bytes());
        packet[38..42].copy_from_slice(&seq.to_be_bytes());
        packet[42..46].copy_from_slice(&ack.to_be_bytes());
        packet[46..50].copy_from_slice(&[0x50, flags, 0xff, 0xff]);
        self.sum = checksum::sum(&packet[34..]) + checksum::sum(&[10, 1, 0, 1]) + 6 + 20;
        self.template = packet;
        (self.next, self.end) = (clients.start, clients.end);
    }

    fn make(&mut self) -> Option<&[u8]> {
        if self.next == self.end {
            return None;
        }
        // 11.0.0.0/8 has room for sixteen million.
        let client = Ipv4Addr::from_bits(0x0b00_0000 + self.next as u32).octets();
        self.next += 1;
        let at = if self.is_client { 26 } else { 30 };
        self.template[at..at + 4].copy_from_slice(&client);
        self.template[24..26].fill(0);
        let sum = checksum::finish(checksum::sum(&self.template[14..34]));
        self.template[24..26].copy_from_slice(&sum.to_be_bytes());
        let sum = checksum::finish(self.sum + checksum::sum(&client));
        self.template[50..52].copy_from_slice(&sum.to_be_bytes());
        Some(&self.template)
    }
}

impl PortIo for Clients {
    fn rx_burst(&mut self, umem: &mut Umem, out: &mut Vec<Packet>, max: usize) -> usize {
        let before = out.len();
        while out.len() - before < max
            && let Some(bytes) = self.make()
            && let Some(packet) = umem.packet_from(bytes)
        {
            out.push(packet);
        }
        out.len() - before
    }

    fn tx_push(&mut self, umem: &mut Umem, packet: Packet, _: Option<TxChecksum>) -> Result<(), Packet> {
        umem.free_packet(packet);
        self.received += 1;
        Ok(())
    }

    fn flush(&mut self, _: &mut Umem) -> bool {
        true
    }
}

impl Flood {
    /// A table of at most `limit` connections.
    ///
    /// # Panics
    ///
    /// If there is no memory.
    pub fn new(limit: usize) -> Flood {
        let connections =
            Arc::new(Connections::new(ConnectionConfig { limit, seed: 5, ..ConnectionConfig::default() }));
        let config = WorkerConfig { flow_entries: 131_072, seed: 3, idle_turns: u32::MAX };
        let mut worker = Worker::new(Umem::new(1024).expect("memory"), config, connections.clone());
        worker.insert_port(POD, Clients::new(false));
        worker.insert_port(HOST, Clients::new(true));
        let mut snapshot = rig::snapshot();
        let access = Access::new(NetworkIndex(0), HOST_MAC, Vec::new(), SenderCheck::Elsewhere);
        let route = vswitch_dataplane::table::route::NextHop::Port { port: HOST, mac: HOST_MAC };
        snapshot.routes.insert(NetworkIndex(0), Ipv4Addr::new(11, 0, 0, 0).into(), 8, route);
        snapshot.ports.push(Some(Arc::new(Port::new(65_000, PortKind::Access(access)))));
        // The pod serves port 80 of TCP to everybody, and opens nothing.
        let verdict = |is_allowed| Judgement { is_allowed, rule: RuleId(1), log: None };
        let step = |from, is_allowed| Step { from, judgement: verdict(is_allowed) };
        let serves: Row = vec![step(0, false), step(6 << 16 | 80, true), step(6 << 16 | 81, false)].into();
        let closed: Row = vec![step(0, false)].into();
        let set = |row: &Row| {
            Arc::new(PolicySet::new(None, vec![Usual { pods: row.clone(), host: row.clone(), world: row.clone() }]))
        };
        let subject = Subject { ingress: Some(set(&serves)), egress: Some(set(&closed)), forwarded: None };
        snapshot.rules = 2;
        if let Some(port) = &mut snapshot.ports[POD.index()] {
            Arc::make_mut(port).policy = subject;
        }
        Flood { worker, connections, snapshot, now_ns: 1 }
    }

    /// Makes segments and gives them to nobody: what making them costs.
    pub fn generate(&mut self, clients: u64) {
        let mut port = Clients::new(true);
        port.set(SYN, (1000, 0), 0..clients);
        let Some((_, umem)) = self.worker.port_and_umem(HOST) else { return };
        let mut burst = Vec::with_capacity(64);
        while port.rx_burst(umem, &mut burst, 64) > 0 {
            burst.drain(..).for_each(|packet| umem.free_packet(packet));
        }
    }

    /// So many clients send a SYN each.
    pub fn open(&mut self, clients: u64) {
        self.open_from(0, clients);
    }

    /// So many clients after the first ones send a SYN each.
    pub fn open_from(&mut self, first: u64, clients: u64) {
        self.send(HOST, SYN, (1000, 0), first..first + clients);
    }

    /// So many clients open connections, all the way.
    pub fn establish(&mut self, clients: u64) {
        self.open(clients);
        self.send(POD, SYN | ACK, (5000, 1001), 0..clients);
        self.send(HOST, ACK, (1001, 5001), 0..clients);
    }

    /// How many of the first clients still hear from the pod.
    pub fn alive(&mut self, clients: u64) -> u64 {
        // Flow entries are of another generation: each packet is judged by its connection.
        self.snapshot.generation += 1;
        self.send(POD, ACK, (5001, 1001), 0..clients)
    }

    /// The table.
    pub fn counts(&self) -> ConnectionCounts {
        self.connections.counts()
    }

    /// Sends from one side; how many arrived at the other.
    fn send(&mut self, from: PortId, flags: u8, numbers: (u32, u32), clients: std::ops::Range<u64>) -> u64 {
        let to = if from == HOST { POD } else { HOST };
        let received = |flood: &Flood| flood.worker.port(to).map_or(0, |port| port.received);
        let before = received(self);
        if let Some((port, _)) = self.worker.port_and_umem(from) {
            port.set(flags, numbers, clients);
        }
        loop {
            self.now_ns += 10_000;
            if self.worker.turn(self.now_ns, &self.snapshot).received == 0 {
                return received(self) - before;
            }
        }
    }
}
