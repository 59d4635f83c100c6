//! A link becomes a port: a program, a socket for each queue, and workers that poll them.

use vswitch_control::Attached;
use vswitch_net::PortId;
use vswitch_xsk::{AttachedProgram, BindError, BoundSocket, CopyMode, Patience, Programs, Role, XdpMode, ZeroCopy};

use super::rest::Seen;
use super::{AttachedLink, Links, Offload};

/// Frames that a worker must have free to take another port: a fill ring's worth, and as many on their way.
pub(super) const FRAMES_OF_A_PORT: usize = 128;

/// Most queues of a link: the size of the map in the XDP programs.
const MAX_QUEUES: u32 = 64;

impl Links {
    /// The programs, loaded if they are not yet. An offload that cannot be does not keep them from it.
    fn load(&mut self) -> Result<&mut Programs, String> {
        if self.programs.is_none() {
            let wanted = if let Offload::Wanted(flows) = self.offload { Some(flows) } else { None };
            let (programs, fast_path) = match Programs::load(wanted, self.seed, self.start) {
                Err(error) if wanted.is_some() => {
                    self.offload = Offload::Failed(error.to_string());
                    Programs::load(None, self.seed, self.start).map_err(|error| error.to_string())?
                }
                loaded => loaded.map_err(|error| error.to_string())?,
            };
            if let Some(fast_path) = fast_path {
                let share = wanted.unwrap_or(0) as usize / self.workers.len();
                self.workers.iter().for_each(|worker| worker.offload(fast_path.table(share)));
                self.offload = Offload::On(fast_path);
            }
            self.programs = Some(programs);
        }
        self.programs.as_mut().ok_or_else(|| "the XDP programs are not loaded".to_owned())
    }

    /// A port whose fill ring cannot be filled would be deaf, and say nothing.
    pub(super) fn check_memory(&self) -> Result<(), String> {
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
    pub(crate) fn attach_link(
        &mut self,
        port: PortId,
        ifindex: u32,
        role: Role,
        zero_copy: ZeroCopy,
    ) -> Result<Attached, String> {
        let xdp = self.xdp;
        let mut program = self.load()?.attach(port, role, ifindex, xdp).map_err(|error| error.to_string())?;
        let bound = self.bind(ifindex, zero_copy, MAX_QUEUES, Patience::Long).map_err(|error| error.to_string());
        let bound = bound.and_then(|sockets| Ok((self.connect(&mut program, &sockets)?, sockets)));
        let (attached, sockets) = match bound {
            Ok(bound) => bound,
            Err(error) => {
                self.load()?.detach(program);
                return Err(error);
            }
        };
        for (worker, sockets) in self.workers.iter().zip(sockets) {
            worker.insert(port, sockets);
        }
        let owners = (0..attached.copy_modes.len()).map(|queue| Some(first_owner(queue, self.workers.len()))).collect();
        let seen = Seen::from(self.now_ns());
        self.attached
            .insert(port, AttachedLink { ifindex, zero_copy, owners, lost: None, is_looked_at: false, program, seen });
        Ok(attached)
    }

    /// A socket for each queue of a link, of which there are so many at most, by worker.
    pub(super) fn bind(
        &mut self,
        ifindex: u32,
        zero_copy: ZeroCopy,
        most: u32,
        patience: Patience,
    ) -> Result<Vec<Vec<BoundSocket>>, BindError> {
        let mut sockets: Vec<Vec<BoundSocket>> = self.workers.iter().map(|_| Vec::new()).collect();
        for queue in 0..most {
            let owner = first_owner(queue as usize, self.workers.len());
            match self.workers[owner].binder.bind(ifindex, queue, zero_copy, patience) {
                Ok(socket) => sockets[owner].push(socket),
                // All queues are bound: what arrives at one without a socket would be lost.
                Err(error) if error.is_no_queue() && queue as usize >= self.workers.len() => break,
                Err(error) => return Err(error),
            }
        }
        Ok(sockets)
    }

    /// Has a link's program send its packets to the sockets.
    fn connect(&mut self, program: &mut AttachedProgram, sockets: &[Vec<BoundSocket>]) -> Result<Attached, String> {
        let is_offloading = self.is_offloading();
        let programs = self.programs.as_mut().ok_or("the XDP programs are not loaded")?;
        let mut all: Vec<&BoundSocket> = sockets.iter().flatten().collect();
        all.sort_unstable_by_key(|socket| socket.queue());
        for socket in &all {
            programs.set_socket(program, socket.queue(), socket).map_err(|error| error.to_string())?;
        }
        // In generic mode a packet is the stack's already, and nothing is gained.
        let is_fast = is_offloading && program.mode() == XdpMode::Native;
        programs.set_fast(program, is_fast).map_err(|error| error.to_string())?;
        Ok(Attached {
            xdp_mode: match program.mode() {
                XdpMode::Native => "native".to_owned(),
                XdpMode::Generic => "generic".to_owned(),
            },
            xdp_fallback: program.fallback_reason().map(str::to_owned),
            copy_modes: all.iter().map(|socket| copy_mode_name(socket.copy_mode()).to_owned()).collect(),
            zero_copy_refusal: all.iter().find_map(|socket| socket.zero_copy_refusal().map(str::to_owned)),
        })
    }
}

/// Who gets a queue of a link that is attached.
pub(super) fn first_owner(queue: usize, workers: usize) -> usize {
    queue % workers
}

fn copy_mode_name(mode: CopyMode) -> &'static str {
    match mode {
        CopyMode::Copy => "copy",
        CopyMode::ZeroCopy => "zero-copy",
    }
}
