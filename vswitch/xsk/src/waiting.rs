//! Packets of links at rest, which have no sockets: copies in a BPF ring buffer that all links share.
//!
//! The program `pod` writes them, the control thread reads them when it binds the link's sockets, and workers take them in before
//! what comes by the sockets. The ring holds 1 MiB, about 650 small packets; what finds it full is dropped and counted.
//!
//! References: kernel document `bpf/ringbuf.rst`; `bpf/waiting.h` here for the format.

use std::fmt;
use std::os::fd::{AsRawFd, RawFd};

use aya::maps::{MapData, RingBuf};
use vswitch_net::PortId;

/// Bytes before the packet in a record: port, queue, length, nothing.
const HEADER: usize = 16;

/// The ring. Its descriptor is readable while a packet waits.
pub struct Waiting {
    ring: RingBuf<MapData>,
}

/// A packet that came from a link at rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaitingPacket {
    /// The link's port.
    pub port: PortId,
    /// The queue that it came to.
    pub queue: u32,
    /// The packet.
    pub bytes: Vec<u8>,
}

impl Waiting {
    pub(crate) fn new(ring: RingBuf<MapData>) -> Waiting {
        Waiting { ring }
    }

    /// The oldest packet, taken out.
    pub fn take(&mut self) -> Option<WaitingPacket> {
        loop {
            let record = self.ring.next()?;
            if let Some(packet) = read(&record) {
                return Some(packet);
            }
        }
    }
}

impl fmt::Debug for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waiting").finish_non_exhaustive()
    }
}

impl AsRawFd for Waiting {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

/// `struct waiting` of `waiting.h`. None if it is not one, which would be a mistake of the program.
fn read(record: &[u8]) -> Option<WaitingPacket> {
    let (header, bytes) = record.split_at_checked(HEADER)?;
    let field = |at: usize| Some(u32::from_ne_bytes(header.get(at..at + 4)?.try_into().ok()?));
    let port = PortId(u16::try_from(field(0)?).ok()?);
    Some(WaitingPacket { port, queue: field(4)?, bytes: bytes.get(..field(8)? as usize)?.to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_and_a_strange_one_is_not() {
        let header = |port: u32, length: u32| [port, 3, length, 0].map(u32::to_ne_bytes).concat();
        let record = [header(12, 5), b"hello, and room".to_vec()].concat();
        let packet = WaitingPacket { port: PortId(12), queue: 3, bytes: b"hello".to_vec() };
        assert_eq!(read(&record), Some(packet));
        assert_eq!(read(&record[..HEADER + 4]), None, "shorter than it says");
        assert_eq!(read(&record[..HEADER - 1]), None);
        assert_eq!(read(&header(70_000, 0)), None, "no such port");
    }
}
