//! One worker's side of a port: the sockets of its queues, or what waits while a port at rest has none.

use std::collections::VecDeque;
use std::sync::Arc;

use crossbeam_channel::Sender;
use tokio::sync::Notify;
use vswitch_dataplane::{PortIo, may_wait};
use vswitch_net::PortId;
use vswitch_xsk::{Packet, TxChecksum, Umem, XskSocket};

/// Most frames that are held for a port at rest: as many as a socket may always send, so that all of them find room in it.
const HELD_FRAMES: usize = 64;

/// How a worker says that a port at rest has something to send.
#[derive(Clone, Debug)]
pub(crate) struct Bell {
    pub(crate) ports: Sender<PortId>,
    pub(crate) rung: Arc<Notify>,
}

impl Bell {
    /// False if it was not heard: the queue is full.
    fn ring(&self, port: PortId) -> bool {
        let is_heard = self.ports.try_send(port).is_ok();
        self.rung.notify_one();
        is_heard
    }
}

/// The queues of one port that belong to this worker. All receive; the first sends.
#[derive(Debug)]
pub(super) struct Queues {
    pub(super) sockets: Vec<XskSocket>,
    /// Where the next burst begins, so that one busy queue does not starve the others.
    pub(super) turn: usize,
    /// If the port is at rest: the sockets, if there are any, are not used yet.
    rest: Option<Rest>,
}

/// Packets to a port that has no socket for now.
#[derive(Debug)]
struct Rest {
    port: PortId,
    held: VecDeque<(Packet, Option<TxChecksum>)>,
    frames: usize,
    bell: Bell,
    is_heard: bool,
}

impl Queues {
    pub(super) fn new(sockets: Vec<XskSocket>) -> Queues {
        Queues { sockets, turn: 0, rest: None }
    }

    /// Gives the sockets away; what is to be sent waits from now on.
    pub(super) fn rest(&mut self, port: PortId, bell: Bell) -> Vec<XskSocket> {
        self.rest.get_or_insert_with(|| Rest { port, held: VecDeque::new(), frames: 0, bell, is_heard: false });
        self.turn = 0;
        std::mem::take(&mut self.sockets)
    }

    /// Gives those of a port at rest sockets. Packets may come to them, and are taken in from [`wake`](Self::wake) on.
    pub(super) fn prepare(&mut self, mut sockets: Vec<XskSocket>, umem: &mut Umem) {
        for socket in &mut sockets {
            // Nothing is taken, and the fill ring is filled.
            socket.rx_burst(umem, &mut Vec::new(), 0);
        }
        let before = std::mem::replace(&mut self.sockets, sockets);
        before.into_iter().for_each(|socket| socket.close(umem));
    }

    /// Ends the rest: what waited is sent with the next flush.
    pub(super) fn wake(&mut self, umem: &mut Umem) {
        for (packet, checksum) in self.take_held() {
            if let Err(packet) = self.tx_push(umem, packet, checksum) {
                umem.free_packet(packet);
            }
        }
    }

    /// Frees what waits, and gives the sockets away.
    pub(super) fn dissolve(mut self, umem: &mut Umem) -> Vec<XskSocket> {
        self.take_held().into_iter().for_each(|(packet, _)| umem.free_packet(packet));
        self.sockets
    }

    /// True while packets lie in the sockets' rings that nobody has looked at.
    pub(super) fn is_in_use(&mut self) -> bool {
        self.rest.is_none() && self.sockets.iter_mut().any(XskSocket::is_in_use)
    }

    fn take_held(&mut self) -> VecDeque<(Packet, Option<TxChecksum>)> {
        self.rest.take().map_or_else(VecDeque::new, |rest| rest.held)
    }
}

impl PortIo for Queues {
    fn rx_burst(&mut self, umem: &mut Umem, out: &mut Vec<Packet>, max: usize) -> usize {
        let count = if self.rest.is_some() { 0 } else { self.sockets.len() };
        let mut got = 0;
        for step in 0..count {
            let socket = &mut self.sockets[(self.turn + step) % count];
            got += socket.rx_burst(umem, out, max - got);
        }
        self.turn = if count > 0 { (self.turn + 1) % count } else { 0 };
        got
    }

    fn tx_push(&mut self, umem: &mut Umem, packet: Packet, checksum: Option<TxChecksum>) -> Result<(), Packet> {
        match (&mut self.rest, self.sockets.first_mut()) {
            (Some(rest), _) => rest.hold(umem, packet, checksum),
            (None, Some(socket)) => socket.tx_push(umem, packet, checksum),
            (None, None) => Err(packet),
        }
    }

    fn flush(&mut self, umem: &mut Umem) -> bool {
        match (&mut self.rest, self.sockets.first_mut()) {
            // Nothing can be done about what waits.
            (Some(_), _) => true,
            (None, Some(socket)) => socket.flush(umem) && !socket.is_sending(),
            (None, None) => true,
        }
    }

    fn can_receive(&self) -> bool {
        self.sockets.iter().all(XskSocket::can_receive)
    }
}

impl Rest {
    /// Holds a packet, as long as others find frames, and has the port woken.
    fn hold(&mut self, umem: &Umem, packet: Packet, checksum: Option<TxChecksum>) -> Result<(), Packet> {
        if !self.is_heard {
            self.is_heard = self.bell.ring(self.port);
        }
        if self.frames + packet.frames() > HELD_FRAMES || !may_wait(umem) {
            return Err(packet);
        }
        self.frames += packet.frames();
        self.held.push_back((packet, checksum));
        Ok(())
    }
}
