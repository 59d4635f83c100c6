//! What a worker does when it is told, between two turns.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crossbeam_channel::Sender;
use rustix::event::epoll;
use vswitch_control::{FlowSample, MAX_UPLINKS, Own};
use vswitch_dataplane::DropReason;
use vswitch_net::PortId;
use vswitch_xsk::{BoundSocket, Closing, XskSocket};

use super::handle::Command;
use super::queues::Queues;
use super::{WorkerThread, add_sample, sample_of};

/// How long a port that is to rest may still have packets.
const LEAVING_TURNS: u32 = 1000;

/// A port that is to rest.
pub(super) struct Leaving {
    port: PortId,
    answer: Sender<Vec<(Arc<OwnedFd>, Closing)>>,
    turns: u32,
}

impl WorkerThread {
    /// False to stop.
    pub(super) fn obey(&mut self, command: Command) -> bool {
        match command {
            Command::Insert(port, sockets) => {
                let sockets = self.adopt_all(port, sockets);
                self.insert(port, sockets);
            }
            Command::Prepare(port, sockets) => {
                let sockets = self.adopt_all(port, sockets);
                match self.worker.port_and_umem(port) {
                    Some((queues, umem)) => queues.prepare(sockets, umem),
                    None => self.discard(Queues::new(sockets)),
                }
            }
            Command::Wake(port) => {
                if let Some((queues, umem)) = self.worker.port_and_umem(port) {
                    queues.wake(umem);
                    self.worker.mark_sending(port);
                    self.poll(port);
                }
            }
            Command::Remove(port, answer) => {
                self.forget(port);
                let queues = self.worker.remove_port(port);
                let sockets = queues.map_or_else(Vec::new, |queues| queues.dissolve(self.worker.umem_mut()));
                self.give_away(sockets, &answer);
            }
            Command::Rest(port, answer) => {
                // Not before what has come is taken in.
                self.poll(port);
                self.leaving.push(Leaving { port, answer, turns: 0 });
            }
            Command::Receive(packets) => {
                let now_ns = self.shared.start.elapsed().as_nanos() as u64;
                for of_port in packets.chunk_by(|one, next| one.port == next.port) {
                    let bytes: Vec<&[u8]> = of_port.iter().map(|packet| &packet.bytes[..]).collect();
                    self.worker.receive(of_port[0].port, now_ns, self.snapshot.load(), &bytes);
                }
            }
            Command::Lost(port, packets) => self.worker.count_lost(port, packets, DropReason::Resting),
            Command::AddQueue(port, socket) => {
                let count = self.worker.port(port).map_or(0, |queues| queues.sockets.len()) + 1;
                let socket = self.adopt(port, *socket, count);
                match self.worker.port_and_umem(port) {
                    Some((queues, _)) => queues.sockets.push(socket),
                    None => self.insert(port, vec![socket]),
                }
                self.poll(port);
            }
            Command::RemoveQueue(port, queue, answer) => {
                let sockets = self.worker.port_and_umem(port).map_or_else(Vec::new, |(queues, _)| {
                    queues.turn = 0;
                    queues.sockets.extract_if(.., |socket| socket.queue() == queue).collect()
                });
                self.give_away(sockets, &answer);
            }
            Command::Reclaim(closing) => {
                closing.into_iter().for_each(|closing| closing.reclaim(self.worker.umem_mut()));
            }
            Command::Offload(table) => self.worker.offload(Box::new(table)),
            Command::Originate(packets) => {
                let now_ns = self.shared.start.elapsed().as_nanos() as u64;
                let snapshot = self.snapshot.load();
                for Own { way, bytes } in packets {
                    self.worker.originate(now_ns, snapshot, way, &bytes);
                }
            }
            Command::Sync(answer) => {
                let _ = answer.send(());
            }
            Command::Sample(answer) => {
                self.worker.settle(self.shared.start.elapsed().as_nanos() as u64);
                let _ = answer.send(self.sample());
            }
            Command::Flows { since_ns, limit, answer } => {
                self.worker.settle(self.shared.start.elapsed().as_nanos() as u64);
                let flows = self.worker.flows(since_ns, limit);
                let _ = answer.send(FlowSample { worker: self.setup.index, flows });
            }
            Command::Stop => return false,
        }
        true
    }

    /// Makes a port.
    fn insert(&mut self, port: PortId, sockets: Vec<XskSocket>) {
        self.forget(port);
        if let Some(before) = self.worker.insert_port(port, Queues::new(sockets)) {
            self.discard(before);
        }
    }

    /// Closes the sockets of ports that are to rest, once what they had received was taken in, and what they had to send was
    /// looked at by the kernel; that it waits for no longer than a link may need that is up.
    pub(super) fn let_rest(&mut self) {
        for mut leaving in std::mem::take(&mut self.leaving) {
            let port = leaving.port;
            leaving.turns += 1;
            let is_in_use = self.worker.port_and_umem(port).is_some_and(|(queues, _)| queues.is_in_use());
            if is_in_use && leaving.turns < LEAVING_TURNS {
                self.leaving.push(leaving);
                continue;
            }
            let sockets = match self.worker.port_and_umem(port) {
                Some((queues, _)) => queues.rest(port, self.shared.bell.clone()),
                None => Vec::new(),
            };
            sockets.iter().for_each(|socket| add_sample(&mut self.retired, &sample_of(port, socket)));
            self.give_away(sockets, &leaving.answer);
        }
    }

    /// Makes sockets of a port this worker's.
    fn adopt_all(&mut self, port: PortId, sockets: Vec<BoundSocket>) -> Vec<XskSocket> {
        let count = sockets.len();
        sockets.into_iter().map(|socket| self.adopt(port, socket, count)).collect()
    }

    /// Forgets what is known of a port that goes, or comes anew.
    fn forget(&mut self, port: PortId) {
        self.leaving.retain(|leaving| leaving.port != port);
        self.retired.retain(|sample| sample.port != Some(port));
    }

    /// Makes a socket one of this worker's: one of so many of its port.
    fn adopt(&mut self, port: PortId, socket: BoundSocket, count: usize) -> XskSocket {
        let umem = self.worker.umem_mut();
        let socket = socket.adopt(umem);
        if port.index() < MAX_UPLINKS { socket.expect_many(umem, count) } else { socket }
    }

    /// Gives sockets to whoever closes them.
    fn give_away(&mut self, sockets: Vec<XskSocket>, answer: &Sender<Vec<(Arc<OwnedFd>, Closing)>>) {
        let closing: Vec<(Arc<OwnedFd>, Closing)> = sockets
            .into_iter()
            .map(|socket| {
                // It is there only while the port is parked.
                let _ = epoll::delete(&self.sleeper, &socket);
                socket.close_later(self.worker.umem_mut())
            })
            .collect();
        if let Err(unheard) = answer.send(closing) {
            // Nobody waits any more: close here, whatever it takes.
            for (fd, closing) in unheard.0 {
                drop(fd);
                closing.reclaim(self.worker.umem_mut());
            }
        }
    }

    fn discard(&mut self, queues: Queues) {
        let umem = self.worker.umem_mut();
        queues.dissolve(umem).into_iter().for_each(|socket| socket.close(umem));
    }
}
