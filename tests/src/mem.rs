//! One switch over memory.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Arc;

use vswitch_api::{Answer, ApiError, PortInfo, PortSpec, Request};
use vswitch_control::{
    Attached, Backend, Control, ControlConfig, FlowSample, HOST_PORT, HostState, NextHop, Own, UPLINK_PORT,
    UplinkState, WorkerSample,
};
use vswitch_dataplane::connection::{ConnectionConfig, Connections};
use vswitch_dataplane::{Counters, DropReason, PortIo, Snapshot, Worker, WorkerConfig};
use vswitch_net::{MacAddr, PortId, checksum};
use vswitch_xsk::{Packet, TxChecksum, Umem};

/// Frames of a switch in memory.
const FRAMES: usize = 2048;

/// Packets that a port in memory takes before it says that it is full.
const QUEUE: usize = 4096;

/// A port that is two queues.
#[derive(Debug, Default)]
pub struct MemPort {
    /// Packets to be received by the switch.
    pub rx: VecDeque<Vec<u8>>,
    /// Packets that the switch sent. Requested checksums are completed, as a receiving stack would take them.
    pub tx: VecDeque<Vec<u8>>,
    /// Says that something is under way for as long as this is true.
    pub is_stuck: bool,
}

impl PortIo for MemPort {
    fn rx_burst(&mut self, umem: &mut Umem, out: &mut Vec<Packet>, max: usize) -> usize {
        let mut count = 0;
        while count < max
            && let Some(bytes) = self.rx.pop_front()
        {
            out.push(umem.packet_from(&bytes).expect("frames for a burst"));
            count += 1;
        }
        count
    }

    fn tx_push(&mut self, umem: &mut Umem, packet: Packet, request: Option<TxChecksum>) -> Result<(), Packet> {
        if self.tx.len() >= QUEUE {
            return Err(packet);
        }
        let mut bytes = packet.head().data().to_vec();
        umem.tail(&packet).for_each(|piece| bytes.extend_from_slice(piece));
        umem.free_packet(packet);
        if let Some(TxChecksum { start, offset }) = request {
            let (start, field) = (usize::from(start), usize::from(start + offset));
            let sum = checksum::finish(checksum::sum(&bytes[start..]));
            bytes[field..field + 2].copy_from_slice(&sum.to_be_bytes());
        }
        self.tx.push_back(bytes);
        Ok(())
    }

    fn flush(&mut self, _: &mut Umem) -> bool {
        !self.is_stuck
    }
}

/// Ports in memory for control to attach.
#[derive(Debug)]
pub struct MemBackend {
    /// The worker.
    pub worker: Worker<MemPort>,
    /// Its connections.
    pub connections: Arc<Connections>,
    /// Links whose attachment shall fail.
    pub broken: Vec<String>,
    /// Workers beside it, that exist in samples only.
    pub others: Vec<WorkerSample>,
    /// Queues, which exist in these words only.
    pub queues: Vec<(PortId, u32, Option<usize>)>,
    /// Those of them that cannot be moved.
    pub broken_queues: Vec<u32>,
}

impl Backend for MemBackend {
    fn attach(&mut self, port: PortId, link: &str) -> Result<Attached, String> {
        if self.broken.iter().any(|broken| broken == link) {
            return Err(format!("no link {link}"));
        }
        self.worker.insert_port(port, MemPort::default());
        Ok(Attached { xdp_mode: "memory".to_owned(), ..Attached::default() })
    }

    fn detach(&mut self, port: PortId) {
        self.worker.remove_port(port);
    }

    fn queues(&self) -> Vec<(PortId, u32, Option<usize>)> {
        self.queues.clone()
    }

    fn move_queue(&mut self, port: PortId, queue: u32, worker: usize) -> Result<(), String> {
        if self.broken_queues.contains(&queue) {
            return Err("it is broken".to_owned());
        }
        let known = self.queues.iter_mut().find(|(at, number, _)| (*at, *number) == (port, queue));
        known.ok_or("no such queue")?.2 = Some(worker);
        Ok(())
    }

    fn sample(&mut self) -> Vec<WorkerSample> {
        let (counters, perf) = (self.worker.counters().clone(), self.worker.perf().clone());
        let mut samples = vec![WorkerSample { counters, perf, ..WorkerSample::default() }];
        samples.extend(self.others.iter().cloned());
        samples
    }

    fn flows(&mut self, since_ns: u64, limit: usize) -> Vec<FlowSample> {
        vec![FlowSample { worker: 0, flows: self.worker.flows(since_ns, limit) }]
    }

    fn connections(&self) -> &Connections {
        &self.connections
    }

    fn process(&self) -> (u32, u64, u64) {
        (0, 0, 0)
    }
}

/// A switch.
#[derive(Debug)]
pub struct Switch {
    /// Control.
    pub control: Control,
    /// Worker and ports.
    pub backend: MemBackend,
    snapshot: Arc<Snapshot>,
    /// The virtual clock.
    pub now_ns: u64,
}

impl Switch {
    /// A switch without uplink, networks and ports.
    pub fn new() -> Switch {
        Switch::with_idle_turns(u32::MAX)
    }

    /// The same, with a table of connections of one's own.
    pub fn with_connections(config: ConnectionConfig) -> Switch {
        Switch::with(config, u32::MAX)
    }

    /// The same, with a worker that parks ports which were idle for so many turns. Who has it wakes them.
    pub fn with_idle_turns(idle_turns: u32) -> Switch {
        Switch::with(ConnectionConfig { seed: 0xc0ff_ee11, ..ConnectionConfig::default() }, idle_turns)
    }

    fn with(config_of_connections: ConnectionConfig, idle_turns: u32) -> Switch {
        let umem = Umem::new(FRAMES).expect("memory");
        let config = WorkerConfig { flow_entries: 1024, seed: 0x0123_4567_89ab_cdef, idle_turns };
        let connections = Arc::new(Connections::new(config_of_connections));
        let worker = Worker::new(umem, config, connections.clone());
        let mut switch = Switch {
            control: Control::new(ControlConfig::default()),
            backend: MemBackend {
                worker,
                connections,
                broken: Vec::new(),
                others: Vec::new(),
                queues: Vec::new(),
                broken_queues: Vec::new(),
            },
            snapshot: Arc::default(),
            now_ns: 1,
        };
        switch.publish();
        switch
    }

    /// A switch whose host's stack is joined to the network that `network`, a request, makes.
    pub fn with_host(config: ControlConfig, host: MacAddr, network: &str) -> Switch {
        let mut switch = Switch::new();
        switch.control = Control::new(config);
        switch.ask_json(network).expect("a network");
        switch.backend.attach(HOST_PORT, "host").expect("memory");
        let (link, attached) = ("vswitch0".to_owned(), Attached::default());
        switch.control.set_host(Ok(HostState { link, mac: host, attached, problem: None }));
        switch
    }

    /// Gives the switch an uplink.
    pub fn with_uplink(mut self, mac: MacAddr, v4: Option<&str>, v6: Option<&str>, mtu: u32) -> Switch {
        self.backend.attach(UPLINK_PORT, "wire").expect("memory");
        let state = UplinkState {
            link: "wire".to_owned(),
            mac,
            mtu,
            is_up: true,
            v4: v4.map(|v4| v4.parse().expect("address")),
            v6: v6.map(|v6| v6.parse().expect("address")),
            attached: Attached::default(),
            note: None,
        };
        self.control.set_uplink(UPLINK_PORT, Ok(state));
        self.publish();
        self
    }

    /// Tells how to reach a VTEP on the wire.
    pub fn resolve(&mut self, vtep: &str, mac: MacAddr) {
        let vtep: IpAddr = vtep.parse().expect("address");
        let next_hop = NextHop { link: Some("wire".to_owned()), address: Some(vtep), mac: Some(mac), mtu: None };
        self.control.set_next_hops(vtep, vec![next_hop]);
        self.publish();
    }

    /// Sends a request; it must be carried out.
    pub fn ask(&mut self, request: Request) -> Answer {
        self.try_ask(request).expect("a request that is carried out")
    }

    /// Sends a request.
    ///
    /// # Errors
    ///
    /// Control's.
    pub fn try_ask(&mut self, request: Request) -> Result<Answer, ApiError> {
        let answer = self.control.handle(self.now_ns, request, &mut self.backend);
        self.publish();
        if self.control.settle_connections(&mut self.backend) {
            self.publish();
        }
        answer
    }

    /// Sends a request written as JSON.
    ///
    /// # Errors
    ///
    /// Control's.
    pub fn ask_json(&mut self, json: &str) -> Result<Answer, ApiError> {
        self.try_ask(serde_json::from_str(json).expect("a request"))
    }

    /// Plugs a port in.
    pub fn add_port(&mut self, link: &str, network: &str, mac: MacAddr, addresses: &[&str]) -> PortInfo {
        let mut spec = PortSpec::new(link, mac);
        spec.network = Some(network.to_owned());
        spec.addresses = addresses.iter().map(|address| address.parse().expect("address")).collect();
        match self.ask(Request::PortAdd(spec)) {
            Answer::Port(info) => *info,
            other => panic!("{other:?}"),
        }
    }

    /// Puts a packet into a port.
    pub fn send(&mut self, port: PortId, bytes: &[u8]) {
        self.port(port).rx.push_back(bytes.to_vec());
    }

    /// Has the worker take packets in that came from a port by another way than its device.
    pub fn receive(&mut self, port: PortId, packets: &[Vec<u8>]) {
        let packets: Vec<&[u8]> = packets.iter().map(|packet| &packet[..]).collect();
        self.backend.worker.receive(port, self.now_ns, &self.snapshot, &packets);
    }

    /// Takes what a port sent.
    pub fn take(&mut self, port: PortId) -> Vec<Vec<u8>> {
        self.port(port).tx.drain(..).collect()
    }

    /// Turns until nothing is received any more, learns, and checks the books.
    ///
    /// # Panics
    ///
    /// If a packet ended in no counter or in two, or a frame did not come home.
    pub fn settle(&mut self) {
        loop {
            let turn = self.backend.worker.turn(self.now_ns, &self.snapshot);
            let events: Vec<_> = self.backend.worker.drain_events().collect();
            events.into_iter().for_each(|event| self.control.learn(self.now_ns, self.now_ns / 1_000_000, event));
            self.publish();
            if turn.received == 0 {
                break;
            }
        }
        let umem = self.backend.worker.umem();
        if self.counters().held == 0 {
            assert_eq!(umem.free_chunks(), umem.chunks(), "frames that did not come home");
        }
        assert_eq!(self.counters().balance(), Ok(()), "rx = tx + drops + merged - copies");
    }

    /// Sends one packet and gives the reason why it was dropped, if it was.
    pub fn drop_of(&mut self, port: PortId, bytes: &[u8]) -> Option<DropReason> {
        let before = self.counters().total();
        self.send(port, bytes);
        self.settle();
        let after = self.counters().total();
        DropReason::ALL.iter().copied().find(|reason| after.drops[reason.index()] > before.drops[reason.index()])
    }

    /// Lets time pass.
    pub fn pass(&mut self, ns: u64) {
        self.now_ns += ns;
        self.control.tick(self.now_ns);
        self.publish();
    }

    /// The worker's counters.
    pub fn counters(&self) -> &Counters {
        self.backend.worker.counters()
    }

    /// A port's two queues.
    pub fn port(&mut self, port: PortId) -> &mut MemPort {
        self.backend.worker.port_and_umem(port).expect("a port").0
    }

    fn publish(&mut self) {
        if let Some(snapshot) = self.control.take_snapshot() {
            self.snapshot = snapshot;
        }
        for Own { way, bytes } in self.control.take_own() {
            self.backend.worker.originate(self.now_ns, &self.snapshot, way, &bytes);
        }
    }
}

impl Default for Switch {
    fn default() -> Self {
        Switch::new()
    }
}
