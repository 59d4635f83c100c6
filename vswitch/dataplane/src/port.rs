//! The device seam: what the data path needs of a port.

use vswitch_xsk::{Packet, TxChecksum, Umem, XskSocket};

/// One worker's side of a port: one queue of a link, or memory in tests.
pub trait PortIo {
    /// Moves up to `max` received packets to `out`; returns how many.
    fn rx_burst(&mut self, umem: &mut Umem, out: &mut Vec<Packet>, max: usize) -> usize;

    /// Queues a packet, with a request to complete its checksum if there is one.
    ///
    /// # Errors
    ///
    /// The packet comes back if there is no room.
    fn tx_push(&mut self, umem: &mut Umem, packet: Packet, checksum: Option<TxChecksum>) -> Result<(), Packet>;

    /// False while there is no frame to receive into; the port is then polled until there is one.
    fn can_receive(&self) -> bool {
        true
    }

    /// Sends what is queued and takes sent frames back. True if nothing is under way any more.
    fn flush(&mut self, umem: &mut Umem) -> bool;
}

impl PortIo for XskSocket {
    #[inline]
    fn rx_burst(&mut self, umem: &mut Umem, out: &mut Vec<Packet>, max: usize) -> usize {
        XskSocket::rx_burst(self, umem, out, max)
    }

    #[inline]
    fn tx_push(&mut self, umem: &mut Umem, packet: Packet, checksum: Option<TxChecksum>) -> Result<(), Packet> {
        XskSocket::tx_push(self, umem, packet, checksum)
    }

    #[inline]
    fn flush(&mut self, umem: &mut Umem) -> bool {
        XskSocket::flush(self, umem) && !self.is_sending()
    }

    fn can_receive(&self) -> bool {
        XskSocket::can_receive(self)
    }
}
