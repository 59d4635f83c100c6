//! One worker's side of a port: the sockets of its queues.

use vswitch_dataplane::PortIo;
use vswitch_xsk::{Packet, TxChecksum, Umem, XskSocket};

/// The queues of one port that belong to this worker. All receive; the first sends.
#[derive(Debug)]
pub(super) struct Queues {
    pub(super) sockets: Vec<XskSocket>,
    /// Where the next burst begins, so that one busy queue does not starve the others.
    pub(super) turn: usize,
}

impl PortIo for Queues {
    fn rx_burst(&mut self, umem: &mut Umem, out: &mut Vec<Packet>, max: usize) -> usize {
        let count = self.sockets.len();
        let mut got = 0;
        for step in 0..count {
            let socket = &mut self.sockets[(self.turn + step) % count];
            got += socket.rx_burst(umem, out, max - got);
        }
        self.turn = if count > 0 { (self.turn + 1) % count } else { 0 };
        got
    }

    fn tx_push(&mut self, umem: &mut Umem, packet: Packet, checksum: Option<TxChecksum>) -> Result<(), Packet> {
        match self.sockets.first_mut() {
            Some(socket) => socket.tx_push(umem, packet, checksum),
            None => Err(packet),
        }
    }

    fn flush(&mut self, umem: &mut Umem) -> bool {
        match self.sockets.first_mut() {
            Some(socket) => socket.flush(umem) && !socket.is_sending(),
            None => true,
        }
    }

    fn can_receive(&self) -> bool {
        self.sockets.iter().all(XskSocket::can_receive)
    }
}
