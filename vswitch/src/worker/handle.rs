//! The control thread's end of a worker: it starts it, tells it what to do, and asks it.
//!
//! Nothing here waits for a packet. What has an answer waits for the worker's next turn, [`ANSWER_TIMEOUT`] at most.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};
use rustix::event::{EventfdFlags, epoll, eventfd};
use vswitch_control::{FlowSample, Own, WorkerSample};
use vswitch_net::PortId;
use vswitch_xsk::{Binder, BoundSocket, Closing, FastTable, Umem, WaitingPacket};

use super::{Setup, Shared, WAKER, WorkerThread};

/// How long a command may take: a worker answers between two turns.
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// The daemon's end of a worker.
#[derive(Debug)]
pub(crate) struct WorkerHandle {
    pub(crate) binder: Binder,
    commands: Sender<Command>,
    waker: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

/// What a worker is told between two turns.
pub(super) enum Command {
    Insert(PortId, Vec<BoundSocket>),
    Remove(PortId, Sender<Vec<(Arc<OwnedFd>, Closing)>>),
    AddQueue(PortId, Box<BoundSocket>),
    Prepare(PortId, Vec<BoundSocket>),
    Wake(PortId),
    Rest(PortId, Sender<Vec<(Arc<OwnedFd>, Closing)>>),
    Receive(Vec<WaitingPacket>),
    Lost(PortId, u64),
    RemoveQueue(PortId, u32, Sender<Vec<(Arc<OwnedFd>, Closing)>>),
    Reclaim(Vec<Closing>),
    Offload(FastTable),
    Sample(Sender<WorkerSample>),
    Originate(Vec<Own>),
    Sync(Sender<()>),
    Flows { since_ns: u64, limit: usize, answer: Sender<FlowSample> },
    Stop,
}

impl WorkerHandle {
    /// Starts the worker's thread, which maps its memory.
    ///
    /// # Errors
    ///
    /// Those of `mmap(2)`, `epoll_create(2)` and `eventfd(2)`, and of starting a thread.
    pub(crate) fn start(setup: Setup, shared: Shared) -> io::Result<WorkerHandle> {
        let (commands, inbox) = crossbeam_channel::unbounded();
        let waker = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
        let sleeper = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&sleeper, &waker, epoll::EventData::new_u64(WAKER), epoll::EventFlags::IN)?;
        let (ready, is_ready) = crossbeam_channel::bounded(1);
        let woken = waker.clone();
        let thread = thread::Builder::new().name(format!("worker-{}", setup.index)).spawn(move || {
            if let Some(id) = setup.core {
                core_affinity::set_for_current(core_affinity::CoreId { id });
            }
            // Once pinned, so that memory and tables lie on the worker's own NUMA node.
            let umem = match Umem::new(setup.umem_frames) {
                Ok(umem) => umem,
                Err(error) => return drop(ready.send(Err(error))),
            };
            umem.populate();
            let binder = Binder::new(&umem);
            let thread = WorkerThread::new(umem, setup, shared, inbox, sleeper, woken);
            if ready.send(Ok(binder)).is_ok() {
                thread.run();
            }
        })?;
        let binder = is_ready.recv().map_err(|_| io::Error::other("the thread ended"))??;
        Ok(WorkerHandle { binder, commands, waker, thread: Some(thread) })
    }

    /// Hands a port's sockets over; they are polled from the next turn on.
    pub(crate) fn insert(&self, port: PortId, sockets: Vec<BoundSocket>) {
        self.send(Command::Insert(port, sockets));
    }

    /// Has the worker give the sockets of a silent port away; what is to be sent to it waits from then on, and rings the bell.
    /// [`finish`](Self::finish) closes them.
    pub(crate) fn begin_rest(&self, port: PortId) -> Receiver<Vec<(Arc<OwnedFd>, Closing)>> {
        self.ask(|answer| Command::Rest(port, answer))
    }

    /// Hands sockets for a port at rest over. They take packets in as soon as the worker has answered, which
    /// [`wake`](Self::wake) has it look at.
    pub(crate) fn prepare(&self, port: PortId, sockets: Vec<BoundSocket>) {
        self.send(Command::Prepare(port, sockets));
    }

    /// Ends the rest of a port: what waits for it is sent, and its sockets are polled.
    pub(crate) fn wake(&self, port: PortId) {
        self.send(Command::Wake(port));
    }

    /// Hands packets over that came from ports at rest.
    pub(crate) fn receive(&self, packets: Vec<WaitingPacket>) {
        self.send(Command::Receive(packets));
    }

    /// Has packets counted that came from a port at rest and were lost.
    pub(crate) fn count_lost(&self, port: PortId, packets: u64) {
        self.send(Command::Lost(port, packets));
    }

    /// Hands one more queue of a port's over.
    pub(crate) fn add_queue(&self, port: PortId, socket: BoundSocket) {
        self.send(Command::AddQueue(port, Box::new(socket)));
    }

    /// Takes one queue of a port's away and closes its socket. False if the worker does not answer.
    pub(crate) fn remove_queue(&self, port: PortId, queue: u32) -> bool {
        self.close(|answer| Command::RemoveQueue(port, queue, answer))
    }

    /// Takes a port away and closes its sockets.
    pub(crate) fn remove(&self, port: PortId) {
        self.close(|answer| Command::Remove(port, answer));
    }

    /// Has the worker give sockets away, and closes them here, off the data path. False if it does not answer.
    fn close(&self, command: impl FnOnce(Sender<Vec<(Arc<OwnedFd>, Closing)>>) -> Command) -> bool {
        self.finish(self.ask(command), ANSWER_TIMEOUT)
    }

    fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Receiver<T> {
        let (answer, answered) = crossbeam_channel::bounded(1);
        self.send(command(answer));
        answered
    }

    /// Closes sockets that the worker gives away. False if it does not answer in time.
    pub(crate) fn finish(&self, sockets: Receiver<Vec<(Arc<OwnedFd>, Closing)>>, timeout: Duration) -> bool {
        let answer = sockets.recv_timeout(timeout);
        // An answer that comes later finds nobody, and the worker closes them itself.
        drop(sockets);
        let Ok(sockets) = answer else { return false };
        let closing = sockets
            .into_iter()
            .map(|(fd, closing)| {
                drop(fd);
                closing
            })
            .collect();
        self.send(Command::Reclaim(closing));
        true
    }

    /// Lets flows be forwarded in the kernel.
    pub(crate) fn offload(&self, table: FastTable) {
        self.send(Command::Offload(table));
    }

    /// Sends packets of the switch's own.
    pub(crate) fn originate(&self, packets: Vec<Own>) {
        self.send(Command::Originate(packets));
    }

    /// Asks for an answer between two turns: what was published before is what all later packets meet.
    pub(crate) fn begin_sync(&self) -> Receiver<()> {
        self.ask(Command::Sync)
    }

    /// The worker's numbers.
    pub(crate) fn sample(&self) -> Option<WorkerSample> {
        self.ask(Command::Sample).recv_timeout(ANSWER_TIMEOUT).ok()
    }

    /// Some of the worker's flows.
    pub(crate) fn flows(&self, since_ns: u64, limit: usize) -> Option<FlowSample> {
        self.ask(|answer| Command::Flows { since_ns, limit, answer }).recv_timeout(ANSWER_TIMEOUT).ok()
    }

    fn send(&self, command: Command) {
        // The receiver lives as long as the thread, which ends only by `Stop`.
        let _ = self.commands.send(command);
        let _ = rustix::io::write(&self.waker, &1_u64.to_ne_bytes());
    }
}

impl Drop for WorkerHandle {
    fn drop(&mut self) {
        self.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
