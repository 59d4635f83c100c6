//! Packets to send, written by etherparse.

use std::net::IpAddr;

use anyhow::bail;
use etherparse::PacketBuilder;
use vswitch_net::MacAddr;

/// Shape of the packets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) macs: (MacAddr, MacAddr),
    pub(crate) addresses: (IpAddr, IpAddr),
    pub(crate) port: u16,
    /// Ethernet frame, without its check sequence.
    pub(crate) size: usize,
}

/// One packet a flow; flows differ in their source port.
pub(crate) fn packets(shape: &Shape, flows: u16) -> anyhow::Result<Vec<Vec<u8>>> {
    (0..flows).map(|flow| packet(shape, 1024_u16.wrapping_add(flow))).collect()
}

fn packet(shape: &Shape, source_port: u16) -> anyhow::Result<Vec<u8>> {
    let start = PacketBuilder::ethernet2(shape.macs.0.0, shape.macs.1.0);
    let (ip, headers) = match shape.addresses {
        (IpAddr::V4(source), IpAddr::V4(destination)) => (start.ipv4(source.octets(), destination.octets(), 64), 42),
        (IpAddr::V6(source), IpAddr::V6(destination)) => (start.ipv6(source.octets(), destination.octets(), 64), 62),
        _ => bail!("--source and --destination are of two families: name two of one"),
    };
    if shape.size < headers {
        bail!("--size {} is smaller than the headers: at least {headers}", shape.size);
    }
    let mut bytes = Vec::with_capacity(shape.size);
    ip.udp(source_port, shape.port).write(&mut bytes, &vec![0; shape.size - headers])?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_have_the_size_asked_for() {
        for (source, destination, size) in [("10.0.0.1", "10.0.0.2", 64), ("fd00::1", "fd00::2", 1400)] {
            let shape = Shape {
                macs: (MacAddr([2; 6]), MacAddr([4; 6])),
                addresses: (source.parse().unwrap(), destination.parse().unwrap()),
                port: 9,
                size,
            };
            let packets = packets(&shape, 3).unwrap();
            assert_eq!(packets.len(), 3);
            assert!(packets.iter().all(|packet| packet.len() == size));
            assert_ne!(packets[0], packets[1]);
        }
    }
}
