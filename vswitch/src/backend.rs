//! The world as control needs it: links get a program and sockets, workers get ports, and tell their numbers.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use vswitch_control::{Attached, Backend, FlowSample, MAX_UPLINKS, Own, WorkerSample};
use vswitch_dataplane::connection::Connections;
use vswitch_net::PortId;
use vswitch_xsk::{AttachedProgram, BoundSocket, CopyMode, Role, XdpMode, XdpPreference, ZeroCopy};

use crate::worker::{ANSWER_TIMEOUT, WorkerHandle};

/// Frames that a worker must have free to take another port: a fill ring's worth, and as many on their way.
const FRAMES_OF_A_PORT: usize = 128;

/// Workers and attached links.
#[derive(Debug)]
pub(crate) struct Links {
    workers: Vec<WorkerHandle>,
    attached: BTreeMap<PortId, AttachedLink>,
    connections: Arc<Connections>,
    xdp: XdpPreference,
    start: Instant,
}

#[derive(Debug)]
struct AttachedLink {
    ifindex: u32,
    program: AttachedProgram,
}

/// Most queues of a link: the size of the map in the XDP programs.
const MAX_QUEUES: u32 = 64;

impl Links {
    pub(crate) fn new(
        workers: Vec<WorkerHandle>,
        connections: Arc<Connections>,
        xdp: XdpPreference,
        start: Instant,
    ) -> Links {
        Links { workers, attached: BTreeMap::new(), connections, xdp, start }
    }

    /// Attaches the uplink with all its queues.
    pub(crate) fn attach_uplink(
        &mut self,
        port: PortId,
        ifindex: u32,
        role: Role,
        zero_copy: ZeroCopy,
    ) -> Result<Attached, String> {
        self.attach_link(port, ifindex, role, zero_copy)
    }

    /// The program of a port, to change what it takes.
    pub(crate) fn program(&mut self, port: PortId) -> Option<&mut AttachedProgram> {
        self.attached.get_mut(&port).map(|link| &mut link.program)
    }

    /// What uplinks take without VXLAN: what goes to a local prefix from one of the cluster.
    pub(crate) fn set_direct(&mut self, local: &[(IpAddr, u8)], cluster: &[(IpAddr, u8)]) -> Result<(), String> {
        for (_, link) in self.attached.iter_mut().filter(|(port, _)| port.index() < MAX_UPLINKS) {
            link.program.set_direct(local, cluster).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// Has a worker send packets of the switch's own, after the snapshot that they belong to was published.
    pub(crate) fn send_own(&self, packets: Vec<Own>) {
        if let (Some(worker), false) = (self.workers.first(), packets.is_empty()) {
            worker.originate(packets);
        }
    }

    /// Returns when every worker decides by what was published before.
    ///
    /// # Errors
    ///
    /// A sentence, if one does not say so.
    pub(crate) fn sync(&self) -> Result<(), String> {
        let waiting: Vec<_> = self.workers.iter().map(WorkerHandle::begin_sync).collect();
        match waiting.iter().position(|done| done.recv_timeout(ANSWER_TIMEOUT).is_err()) {
            None => Ok(()),
            Some(worker) => {
                Err(format!("worker {worker} does not answer: the change may not be in force; see `switchctl status`"))
            }
        }
    }

    /// The link index of a port.
    pub(crate) fn ifindex(&self, port: PortId) -> Option<u32> {
        self.attached.get(&port).map(|link| link.ifindex)
    }

    /// A port whose fill ring cannot be filled would be deaf, and say nothing.
    fn check_memory(&self) -> Result<(), String> {
        for (index, worker) in self.workers.iter().enumerate() {
            let free = worker.sample().map_or(0, |sample| sample.umem_free);
            if free < FRAMES_OF_A_PORT {
                return Err(format!(
                    "worker {index} has {free} free frames left, too few for another port: raise worker.umem_frames"
                ));
            }
        }
        Ok(())
    }

    /// Binds all queues of a link and deals them out to the workers. Each worker needs one, for a worker cannot send by
    /// another's.
    fn attach_link(&mut self, port: PortId, ifindex: u32, role: Role, zero_copy: ZeroCopy) -> Result<Attached, String> {
        let mut program = AttachedProgram::attach(role, ifindex, self.xdp).map_err(|error| error.to_string())?;
        let mut sockets: Vec<Vec<BoundSocket>> = self.workers.iter().map(|_| Vec::new()).collect();
        let mut copy_modes = Vec::new();
        let mut zero_copy_refusal = None;
        for queue in 0..MAX_QUEUES {
            let owner = queue as usize % self.workers.len();
            let socket = match self.workers[owner].binder.bind(ifindex, queue, zero_copy) {
                Ok(socket) => socket,
                // All queues are bound: what arrives at one without a socket would be lost.
                Err(error) if error.is_no_queue() && queue as usize >= self.workers.len() => break,
                Err(error) => return Err(error.to_string()),
            };
            program.set_socket(queue, &socket).map_err(|error| error.to_string())?;
            copy_modes.push(copy_mode_name(socket.copy_mode()).to_owned());
            zero_copy_refusal = zero_copy_refusal.or_else(|| socket.zero_copy_refusal().map(str::to_owned));
            sockets[owner].push(socket);
        }
        for (worker, sockets) in self.workers.iter().zip(sockets) {
            worker.insert(port, sockets);
        }
        let attached = Attached {
            xdp_mode: match program.mode() {
                XdpMode::Native => "native".to_owned(),
                XdpMode::Generic => "generic".to_owned(),
            },
            xdp_fallback: program.fallback_reason().map(str::to_owned),
            copy_modes,
            zero_copy_refusal,
        };
        self.attached.insert(port, AttachedLink { ifindex, program });
        Ok(attached)
    }
}

impl Backend for Links {
    fn attach(&mut self, port: PortId, link: &str) -> Result<Attached, String> {
        let ifindex = ifindex_of(link)?;
        self.check_memory()?;
        self.attach_link(port, ifindex, Role::Pod, ZeroCopy::Off)
    }

    fn detach(&mut self, port: PortId) {
        // The program first: then nothing new comes, and what is on its way finds its sockets still there.
        self.attached.remove(&port);
        self.workers.iter().for_each(|worker| worker.remove(port));
    }

    fn sample(&mut self) -> Vec<WorkerSample> {
        self.workers.iter().map(|worker| worker.sample().unwrap_or_default()).collect()
    }

    fn flows(&mut self, since_ns: u64, limit: usize) -> Vec<FlowSample> {
        self.workers.iter().filter_map(|worker| worker.flows(since_ns, limit)).collect()
    }

    fn connections(&self) -> &Connections {
        &self.connections
    }

    fn process(&self) -> (u32, u64, u64) {
        (std::process::id(), self.start.elapsed().as_secs(), resident_bytes())
    }
}

fn ifindex_of(link: &str) -> Result<u32, String> {
    use rustix::net::{AddressFamily, SocketType, netdevice, socket};
    let probe = socket(AddressFamily::UNIX, SocketType::DGRAM, None).map_err(|error| error.to_string())?;
    netdevice::name_to_index(&probe, link)
        .map_err(|_| format!("no link {link} in the daemon's network namespace: see `ip link show`"))
}

fn copy_mode_name(mode: CopyMode) -> &'static str {
    match mode {
        CopyMode::Copy => "copy",
        CopyMode::ZeroCopy => "zero-copy",
    }
}

/// `VmRSS` of `/proc/self/status`: pinned packet memory counts.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0) * 1024
}
