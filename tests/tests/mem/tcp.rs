//! Four smoltcp pods on two switches exchange TCP over a wire that loses and reorders.

use vswitch_api::PortInfo;
use vswitch_tests::pod::Pod;
use vswitch_tests::twin::{Twin, Wire};

use super::vxlan::{bridged, routed};

const BYTES: usize = 200_000;

fn byte(at: usize) -> u8 {
    (at * 31 + at / 255) as u8
}

/// Two nodes with two pods each.
type Nodes = (Twin, [Vec<PortInfo>; 2]);

/// Each pod of the first node sends to one of the second; true bytes in true order must come out.
///
/// smoltcp takes no ARP answer from a gateway outside its prefix, so its IPv4 is tried bridged and its IPv6 routed.
fn exchange(nodes: Nodes) -> Twin {
    exchange_of(1400, nodes)
}

/// The same by pods whose links have this MTU.
pub(super) fn exchange_of(mtu: usize, (mut twin, ports): Nodes) -> Twin {
    for (pods, infos) in twin.pods.iter_mut().zip(&ports) {
        *pods = infos.iter().map(|info| Pod::new(info, mtu)).collect();
    }
    for (number, info) in ports[1].iter().enumerate() {
        twin.pods[1][number].listen(80);
        twin.pods[0][number].connect(info.addresses.last().expect("an address").addr(), 80);
    }
    let (mut sent, mut received) = ([0; 2], [0; 2]);
    twin.until(120_000, |twin| {
        for number in 0..2 {
            let sender = twin.pods[0][number].socket();
            while sender.can_send() && sent[number] < BYTES {
                let piece: Vec<u8> = (sent[number]..BYTES.min(sent[number] + 1000)).map(byte).collect();
                sent[number] += sender.send_slice(&piece).expect("an open connection");
            }
            let receiver = twin.pods[1][number].socket();
            while receiver.can_recv() {
                let mut piece = [0; 1000];
                let count = receiver.recv_slice(&mut piece).expect("an open connection");
                for (at, got) in piece[..count].iter().enumerate() {
                    assert_eq!(*got, byte(received[number] + at));
                }
                received[number] += count;
            }
        }
        received == [BYTES; 2]
    });
    twin
}

const UNDERLAYS: [[&str; 2]; 2] = [["192.0.2.1", "192.0.2.2"], ["2001:db8::1", "2001:db8::2"]];

#[test]
fn over_a_good_wire() {
    for vteps in UNDERLAYS {
        for nodes in [routed(vteps, Wire::default(), 1), bridged(vteps, Wire::default(), 1)] {
            let twin = exchange(nodes);
            assert_eq!(twin.lost, 0);
            let counters = twin.switches[0].counters();
            assert!(counters.flow_hits > counters.flow_misses);
        }
    }
}

#[test]
fn over_a_wire_that_loses_and_reorders() {
    let wire = Wire { loss: 30, reorder: 50 };
    for vteps in UNDERLAYS {
        for nodes in [routed(vteps, wire, 0x5eed), bridged(vteps, wire, 0x5eed)] {
            let twin = exchange(nodes);
            assert!(twin.lost > 5 && twin.reordered > 5, "{} lost, {} reordered", twin.lost, twin.reordered);
        }
    }
}

#[test]
fn on_one_node() {
    let none = Wire::default();
    for (mut twin, ports) in [routed(UNDERLAYS[0], none, 1), bridged(UNDERLAYS[0], none, 1)] {
        twin.pods[0] = ports[0].iter().map(|info| Pod::new(info, 9000)).collect();
        twin.pods[0][1].listen(80);
        twin.pods[0][0].connect(ports[0][1].addresses.last().expect("an address").addr(), 80);
        twin.until(1000, |twin| twin.pods[0][0].socket().can_send());
        twin.pods[0][0].socket().send_slice(b"hello").expect("an open connection");
        twin.until(1000, |twin| twin.pods[0][1].socket().can_recv());
        let other = twin.switches[1].counters().total();
        assert!(
            other.rx_packets <= 4,
            "all but ARP and the ports' announcements stayed on the node: {}",
            other.rx_packets
        );
    }
}
