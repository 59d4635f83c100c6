//! The world as control needs it: links get a program and sockets, workers get ports, and tell their numbers.

mod attach;
mod rest;

pub(crate) use self::rest::Again;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vswitch_control::{Attached, Backend, FlowSample, OffloadSample, Own, PortRest, WorkerSample};
use vswitch_dataplane::connection::Connections;
use vswitch_link::LinkState;
use vswitch_net::PortId;
use vswitch_xsk::{AttachedProgram, FastPath, FastTarget, Patience, Programs, Role, Vtep, XdpPreference, ZeroCopy};

use crate::worker::{ANSWER_TIMEOUT, Bell, WorkerHandle};

use self::attach::FRAMES_OF_A_PORT;
use self::rest::{Resting, Seen};

/// Workers and attached links.
#[derive(Debug)]
pub(crate) struct Links {
    workers: Vec<WorkerHandle>,
    /// Loaded when the first link is attached.
    programs: Option<Programs>,
    attached: BTreeMap<PortId, AttachedLink>,
    connections: Arc<Connections>,
    xdp: XdpPreference,
    offload: Offload,
    /// Whether the kernel tells which links XDP can send to; none if it was not asked yet.
    knows_targets: Option<bool>,
    /// What links have lost that are detached.
    lost_before: u64,
    /// A secret for the hash of offloaded flows.
    seed: u64,
    resting: Resting,
    bell: Bell,
    start: Instant,
}

/// How links are attached.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinkSetup {
    pub(crate) xdp: XdpPreference,
    /// How many flows to have the kernel forward, if any.
    pub(crate) offload_flows: Option<u32>,
    /// How long a port is silent until it rests, if ever.
    pub(crate) rest_after: Option<Duration>,
    pub(crate) seed: u64,
    pub(crate) start: Instant,
}

/// Flows that the programs forward by themselves.
#[derive(Debug)]
enum Offload {
    /// Nobody wants it.
    Off,
    /// So many, as soon as the programs are loaded.
    Wanted(u32),
    On(FastPath),
    Failed(String),
}

#[derive(Debug)]
struct AttachedLink {
    ifindex: u32,
    zero_copy: ZeroCopy,
    /// Which worker has each queue; none if it could not be bound again.
    owners: Vec<Option<usize>>,
    /// What the link had lost when it was first looked at, and has lost now.
    lost: Option<(u64, u64)>,
    /// Whether it was looked at if XDP can send to it.
    is_looked_at: bool,
    program: AttachedProgram,
    seen: Seen,
}

impl AttachedLink {
    /// Why flows of the link are not forwarded by the programs, if so; `is_target` says whether they can send to it.
    fn unfit(&self, is_target: bool) -> Option<&'static str> {
        if !self.program.is_fast() {
            Some("its XDP program runs in generic mode")
        } else if !self.is_looked_at {
            Some("it is new: whether the kernel can redirect packets to it is known in a second")
        } else if !is_target {
            Some(
                "the kernel cannot redirect packets to it: its other end, in the pod, needs `ethtool -K IFNAME gro on`, as one that is \
                 plugged in anew has, or its driver XDP",
            )
        } else {
            None
        }
    }

    /// Packets that the link has lost since it was attached.
    fn lost(&self) -> u64 {
        self.lost.map_or(0, |(before, now)| now.saturating_sub(before))
    }
}

impl Links {
    pub(crate) fn new(
        workers: Vec<WorkerHandle>,
        connections: Arc<Connections>,
        bell: Bell,
        setup: LinkSetup,
    ) -> Links {
        let LinkSetup { xdp, offload_flows, rest_after, seed, start } = setup;
        let offload = offload_flows.map_or(Offload::Off, Offload::Wanted);
        Links {
            workers,
            programs: None,
            attached: BTreeMap::new(),
            connections,
            xdp,
            offload,
            knows_targets: None,
            lost_before: 0,
            seed,
            resting: Resting::new(rest_after),
            bell,
            start,
        }
    }

    /// Changes what an uplink takes.
    pub(crate) fn set_vtep(&mut self, port: PortId, vtep: Vtep) -> Result<(), String> {
        let (Some(programs), Some(link)) = (&mut self.programs, self.attached.get(&port)) else { return Ok(()) };
        programs.set_vtep(&link.program, vtep).map_err(|error| error.to_string())
    }

    /// What uplinks take without VXLAN: what goes to a local prefix from one of the cluster.
    pub(crate) fn set_direct(&mut self, local: &[(IpAddr, u8)], cluster: &[(IpAddr, u8)]) -> Result<(), String> {
        let Some(programs) = &mut self.programs else { return Ok(()) };
        programs.set_direct(local, cluster).map_err(|error| error.to_string())
    }

    /// Puts the generation of the published snapshot in force in the kernel.
    pub(crate) fn set_generation(&self, generation: u64) {
        if let Offload::On(fast_path) = &self.offload {
            fast_path.set_generation(generation);
        }
    }

    /// True if flows are offloaded, so that it must be known which links the kernel can send to.
    pub(crate) fn is_offloading(&self) -> bool {
        matches!(self.offload, Offload::On(_))
    }

    /// Tells which links XDP can send to. True if one is lost, so that flows there must come back.
    ///
    /// Without an answer all stays as it was.
    pub(crate) fn set_targets(&mut self, targets: Option<&BTreeMap<u32, bool>>) -> bool {
        let Offload::On(fast_path) = &self.offload else { return false };
        let Some(targets) = targets else {
            self.knows_targets.get_or_insert(false);
            return false;
        };
        self.knows_targets = Some(true);
        let mut is_lost = false;
        for (&port, link) in &mut self.attached {
            let ifindex = link.ifindex;
            let takes_frags = targets.get(&ifindex).filter(|_| link.program.is_fast());
            let target = takes_frags.map(|&takes_frags| FastTarget { ifindex, takes_frags });
            link.is_looked_at = true;
            is_lost |= fast_path.target(port).is_some_and(|known| target != Some(known));
            fast_path.set_target(port, target);
        }
        is_lost
    }

    /// Takes note of what links have lost: of what the kernel forwards nobody else tells.
    pub(crate) fn set_losses(&mut self, all: &[LinkState]) {
        for link in self.attached.values_mut() {
            if let Some(state) = all.iter().find(|state| state.ifindex == link.ifindex) {
                let (before, _) = link.lost.unwrap_or((state.tx_dropped, 0));
                link.lost = Some((before, state.tx_dropped));
            }
        }
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

    /// The link indices of all ports.
    pub(crate) fn ifindexes(&self) -> Vec<u32> {
        self.attached.values().map(|link| link.ifindex).collect()
    }
}

impl Backend for Links {
    fn attach(&mut self, port: PortId, link: &str) -> Result<Attached, String> {
        let ifindex = ifindex_of(link)?;
        self.make_room()?;
        self.attach_link(port, ifindex, Role::Pod, ZeroCopy::Off)
    }

    fn detach(&mut self, port: PortId) {
        // The program first: then nothing new comes, and what is on its way finds its sockets still there.
        self.forget_rest(port);
        if let (Some(link), Some(programs)) = (self.attached.remove(&port), &mut self.programs) {
            self.lost_before += link.lost();
            programs.detach(link.program);
        }
        if let Offload::On(fast_path) = &self.offload {
            fast_path.set_target(port, None);
        }
        self.workers.iter().for_each(|worker| worker.remove(port));
    }

    fn queues(&self) -> Vec<(PortId, u32, Option<usize>)> {
        let of = |(&port, link): (&PortId, &AttachedLink)| {
            let owners = link.owners.clone();
            owners.into_iter().enumerate().map(move |(queue, owner)| (port, queue as u32, owner))
        };
        self.attached.iter().flat_map(of).collect()
    }

    fn move_queue(&mut self, port: PortId, queue: u32, to: usize) -> Result<(), String> {
        // Before anything is closed: who gets it must be able to take it.
        let free = self.workers[to].sample().map(|sample| sample.umem_free);
        match free {
            None => return Err(format!("worker {to} does not answer: see `switchctl status`")),
            Some(free) if free < FRAMES_OF_A_PORT => {
                return Err(format!("worker {to} has {free} free frames left, too few: raise worker.umem_frames"));
            }
            Some(_) => {}
        }
        let (Some(link), Some(programs)) = (self.attached.get_mut(&port), &mut self.programs) else {
            return Err("the link is gone".to_owned());
        };
        let owner = link.owners.get_mut(queue as usize).ok_or("the link has no such queue")?;
        if let Some(from) = *owner
            && !self.workers[from].remove_queue(port, queue)
        {
            return Err(format!("worker {from} does not answer: see `switchctl status`"));
        }
        let mut bind = |worker: &mut WorkerHandle| {
            let socket = worker
                .binder
                .bind(link.ifindex, queue, link.zero_copy, Patience::Long)
                .map_err(|error| error.to_string())?;
            programs.set_socket(&link.program, queue, &socket).map_err(|error| error.to_string())?;
            worker.add_queue(port, socket);
            Ok(())
        };
        let Err(error) = bind(&mut self.workers[to]) else {
            *owner = Some(to);
            return Ok(());
        };
        // Back to where it was, so that it is not deaf.
        match owner.map(|from| bind(&mut self.workers[from])) {
            Some(Ok(())) => Err(error),
            _ => {
                *owner = None;
                Err(format!("{error}; nobody polls it now: move it again, to any worker"))
            }
        }
    }

    fn sample(&mut self) -> Vec<WorkerSample> {
        self.settle_all_lost();
        self.workers.iter().map(|worker| worker.sample().unwrap_or_default()).collect()
    }

    fn flows(&mut self, since_ns: u64, limit: usize) -> Vec<FlowSample> {
        self.workers.iter().filter_map(|worker| worker.flows(since_ns, limit)).collect()
    }

    fn let_rest(&mut self, port: PortId) {
        if let Some(link) = self.attached.get_mut(&port) {
            link.seen.may_rest = true;
        }
    }

    fn rest(&self, port: PortId) -> Option<PortRest> {
        self.rest_of(port)
    }

    fn offload(&self) -> Option<OffloadSample> {
        let fast_path = match &self.offload {
            Offload::Off => return None,
            Offload::Wanted(_) => None,
            Offload::On(fast_path) => Some(fast_path),
            Offload::Failed(error) => {
                return Some(OffloadSample { problem: Some(error.clone()), ..OffloadSample::default() });
            }
        };
        let reason = |(&port, link): (&PortId, &AttachedLink)| {
            let is_target = fast_path.is_none_or(|fast_path| fast_path.target(port).is_some());
            Some((port, link.unfit(is_target)?.to_owned()))
        };
        let without = self.attached.iter().filter_map(reason);
        if self.knows_targets == Some(false) {
            let problem = "the kernel does not tell which links XDP can send to: it needs the netlink family \"netdev\", Linux 6.3 or newer";
            return Some(OffloadSample { problem: Some(problem.to_owned()), ..OffloadSample::default() });
        }
        Some(OffloadSample {
            problem: None,
            lost: self.lost_before + self.attached.values().map(AttachedLink::lost).sum::<u64>(),
            without: without.collect(),
        })
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

/// `VmRSS` of `/proc/self/status`: pinned packet memory counts.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0) * 1024
}
