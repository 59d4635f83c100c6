//! Large packets of TCP: cut on their way to the wire, joined on their way from it, and never another byte, number or mark
//! than the sender's.

use std::collections::BTreeMap;

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use vswitch_api::PortInfo;
use vswitch_control::{ControlConfig, HOST_PORT, UPLINK_PORT};
use vswitch_dataplane::DropReason;
use vswitch_net::GATEWAY_MAC;
use vswitch_tests::frames::{self, Ends, Layer4, packet};
use vswitch_tests::mem::Switch;
use vswitch_tests::twin::{Twin, Wire};

use super::vxlan::routed;
use super::{mac, tcp};

const FIN: u8 = 1;
const PSH: u8 = 8;
const ACK: u8 = 16;
const CWR: u8 = 128;

const UNDERLAYS: [[&str; 2]; 2] = [["192.0.2.1", "192.0.2.2"], ["2001:db8::1", "2001:db8::2"]];
const ENDS: [(&str, &str); 2] = [("10.1.0.1", "10.2.0.1"), ("fd01::1", "fd02::1")];

/// A TCP packet as a receiver reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Segment {
    ports: (u16, u16),
    seq: u32,
    ack: u32,
    flags: u8,
    payload: Vec<u8>,
    is_valid: bool,
    id: Option<u16>,
    ip_bytes: usize,
}

fn read(frame: &[u8]) -> Segment {
    let sliced = SlicedPacket::from_ethernet(frame).expect("headers that agree");
    let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { panic!("no TCP") };
    let (sum, id) = match sliced.net.expect("IP") {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            assert_eq!(header.header_checksum(), header.to_header().calc_header_checksum());
            (tcp.calc_checksum_ipv4(header.source(), header.destination()), Some(header.identification()))
        }
        NetSlice::Ipv6(ip) => (tcp.calc_checksum_ipv6(ip.header().source(), ip.header().destination()), None),
        NetSlice::Arp(_) => panic!("ARP"),
    };
    Segment {
        ports: (tcp.source_port(), tcp.destination_port()),
        seq: tcp.sequence_number(),
        ack: tcp.acknowledgment_number(),
        flags: frame[frame.len() - tcp.payload().len() - usize::from(tcp.data_offset()) * 4 + 13],
        payload: tcp.payload().to_vec(),
        is_valid: tcp.checksum() == sum.expect("a length that fits"),
        id,
        ip_bytes: frame.len() - 14,
    }
}

fn bytes(count: usize, seed: usize) -> Vec<u8> {
    (0..count).map(|at| (at * 31 + at / 251 + seed) as u8).collect()
}

fn data(ends: (&str, &str), ports: (u16, u16), flags: u8, seq: u32, payload: &[u8]) -> Vec<u8> {
    let macs = Ends { from: mac(10), to: GATEWAY_MAC };
    packet(macs, ends.0, ends.1, ports, Layer4::Tcp { flags, seq, ack: 77 }, payload)
}

/// Lets a pod of the first node send; what crosses the wire.
fn send(twin: &mut Twin, pods: &[Vec<PortInfo>; 2], frames: &[Vec<u8>]) -> Vec<Vec<u8>> {
    frames.iter().for_each(|frame| twin.switches[0].send(pods[0][0].id, frame));
    twin.switches[0].settle();
    twin.switches[0].take(UPLINK_PORT)
}

/// Lets packets of the wire arrive in one burst; what the pod gets.
fn arrive(twin: &mut Twin, pods: &[Vec<PortInfo>; 2], wire: &[Vec<u8>]) -> Vec<Segment> {
    wire.iter().for_each(|packet| twin.switches[1].send(UPLINK_PORT, packet));
    twin.switches[1].settle();
    twin.switches[1].take(pods[1][0].id).iter().map(|frame| read(frame)).collect()
}

#[test]
fn a_large_packet_crosses_in_pieces_and_arrives_in_few() {
    for (vteps, overhead) in UNDERLAYS.into_iter().zip([50, 70]) {
        for ends in ENDS {
            for is_partial in [false, true] {
                let (mut twin, pods) = routed(vteps, Wire::default(), 1);
                let payload = bytes(20_000, 3);
                let mut frame = data(ends, (1000, 80), ACK | PSH | FIN | CWR, 0xffff_f000, &payload);
                if is_partial {
                    frame = frames::partial(frame);
                }
                let wire = send(&mut twin, &pods, &[frame]);
                let pieces: Vec<Segment> = wire.iter().map(|packet| read(&packet[overhead..])).collect();
                assert_eq!(pieces.len(), 15);
                assert!(wire.iter().all(|packet| packet.len() <= 1514));
                assert!(wire[..14].iter().all(|packet| packet.len() == 1514), "none is smaller than it must be");
                let mut seq = 0xffff_f000_u32;
                for (at, piece) in pieces.iter().enumerate() {
                    let marks = if at == 14 { PSH | FIN } else { 0 } | if at == 0 { CWR } else { 0 };
                    assert_eq!((piece.seq, piece.ack, piece.flags), (seq, 77, ACK | marks), "{at}");
                    assert!(piece.is_valid);
                    assert_eq!(piece.id, pieces[0].id.map(|id| id + at as u16));
                    seq = seq.wrapping_add(piece.payload.len() as u32);
                }
                assert_eq!(pieces.iter().flat_map(|piece| piece.payload.clone()).collect::<Vec<u8>>(), payload);
                assert_eq!(twin.switches[0].counters().total().copies, 14);
                // The first has a mark that the others have not, and the last closes: they stay alone.
                let arrived = arrive(&mut twin, &pods, &wire);
                assert_eq!(
                    arrived.iter().map(|segment| segment.payload.len()).max(),
                    Some(13 * pieces[1].payload.len())
                );
                assert_eq!(arrived.len(), 3);
                assert!(arrived.iter().all(|segment| segment.is_valid));
                assert_eq!(arrived.into_iter().flat_map(|segment| segment.payload).collect::<Vec<u8>>(), payload);
                assert_eq!(twin.switches[1].counters().total().merged, 12);
            }
        }
    }
}

#[test]
fn what_is_damaged_is_neither_cut_nor_joined() {
    let (mut twin, pods) = routed(UNDERLAYS[0], Wire::default(), 1);
    let mut frame = data(ENDS[0], (1000, 80), ACK, 1, &bytes(5000, 1));
    frame[3000] ^= 1;
    assert_eq!(twin.switches[0].drop_of(pods[0][0].id, &frame), Some(DropReason::BadChecksum));
    let frames: Vec<Vec<u8>> = (0..4).map(|at| data(ENDS[0], (1000, 80), ACK, 1 + at * 100, &bytes(100, 1))).collect();
    let mut wire = send(&mut twin, &pods, &frames);
    *wire[1].last_mut().unwrap() ^= 1;
    let arrived = arrive(&mut twin, &pods, &wire);
    let lengths: Vec<(usize, bool)> = arrived.iter().map(|segment| (segment.payload.len(), segment.is_valid)).collect();
    assert_eq!(lengths, [(100, true), (100, false), (200, true)], "its receiver shall see that it is damaged");
}

#[test]
fn only_what_follows_and_is_alike_is_joined() {
    let follows = |flags: u8, seq: u32, count: usize| data(ENDS[0], (1000, 80), flags, seq, &bytes(count, 0));
    let other = |ack: u32| {
        let macs = Ends { from: mac(10), to: GATEWAY_MAC };
        packet(macs, ENDS[0].0, ENDS[0].1, (1000, 80), Layer4::Tcp { flags: ACK, seq: 101, ack }, &bytes(100, 0))
    };
    let with_tos = |tos: u8| {
        let mut frame = follows(ACK, 101, 100);
        frame[15] = tos;
        frame[24..26].fill(0);
        let sum = vswitch_net::checksum::finish(vswitch_net::checksum::sum(&frame[14..34]));
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
        frame
    };
    let cases: [(&str, Vec<Vec<u8>>, usize); 9] = [
        ("follows", vec![follows(ACK, 1, 100), follows(ACK, 101, 100)], 1),
        ("a gap", vec![follows(ACK, 1, 100), follows(ACK, 102, 100)], 2),
        ("again", vec![follows(ACK, 1, 100), follows(ACK, 1, 100)], 2),
        ("after a push", vec![follows(ACK | PSH, 1, 100), follows(ACK, 101, 100)], 2),
        ("up to a push", vec![follows(ACK, 1, 100), follows(ACK | PSH, 101, 100), follows(ACK, 201, 100)], 2),
        ("another acknowledgment", vec![follows(ACK, 1, 100), other(78)], 2),
        ("congestion marked", vec![follows(ACK, 1, 100), with_tos(3)], 2),
        ("around one without data", vec![follows(ACK, 1, 100), follows(ACK, 101, 0), follows(ACK, 101, 100)], 3),
        ("the end", vec![follows(ACK, 1, 100), follows(ACK | FIN, 101, 100)], 2),
    ];
    for (what, frames, expected) in cases {
        let (mut twin, pods) = routed(UNDERLAYS[0], Wire::default(), 1);
        let wire = send(&mut twin, &pods, &frames);
        assert_eq!(arrive(&mut twin, &pods, &wire).len(), expected, "{what}");
    }
}

/// Bursts of five flows with gaps, repetitions, pushes and damage: for each flow the receiver gets the same bytes at the same
/// numbers in the same order, and no damaged byte becomes right.
#[test]
fn any_burst_says_the_same_joined() {
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut below = move |most: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % most
    };
    let mut merged = 0;
    for round in 0..300 {
        let (mut twin, pods) = routed(UNDERLAYS[round % 2], Wire::default(), 1);
        let mut seqs = [1_u32; 5];
        let frames: Vec<Vec<u8>> = (0..50)
            .map(|_| {
                let flow = below(5) as usize;
                let count = [0, 1, 17, 100, 1000, 1318][below(6) as usize];
                let flags = if below(8) == 0 { ACK | PSH } else { ACK };
                let jump = if below(10) == 0 { 5 } else { 0 };
                let seq = seqs[flow].wrapping_add(jump);
                seqs[flow] = seq.wrapping_add(count as u32);
                data(ENDS[(flow / 3) % 2], (1000 + flow as u16, 80), flags, seq, &bytes(count, seq as usize))
            })
            .collect();
        let mut wire = send(&mut twin, &pods, &frames);
        assert_eq!(wire.len(), 50);
        for packet in &mut wire {
            if below(12) == 0 {
                *packet.last_mut().unwrap() ^= 0x10;
            }
        }
        let overhead = if round % 2 == 0 { 50 } else { 70 };
        let sent = stream(wire.iter().map(|packet| read(&packet[overhead..])));
        let received = stream(arrive(&mut twin, &pods, &wire).into_iter());
        assert_eq!(sent, received, "round {round}");
        merged += twin.switches[1].counters().total().merged;
    }
    assert!(merged > 1000, "{merged} joined: the test shows nothing");
}

/// By flow: every byte with its number and whether it is right, pushes, in order.
fn stream(segments: impl Iterator<Item = Segment>) -> BTreeMap<u16, Vec<(u32, u8, bool)>> {
    let mut streams: BTreeMap<u16, Vec<(u32, u8, bool)>> = BTreeMap::new();
    for segment in segments {
        let stream = streams.entry(segment.ports.0).or_default();
        let numbered = segment.payload.iter().zip(segment.seq..);
        stream.extend(numbered.map(|(&byte, seq)| (seq, byte, segment.is_valid)));
        if segment.flags & PSH != 0 {
            stream.push((segment.seq.wrapping_add(segment.payload.len() as u32), PSH, segment.is_valid));
        }
    }
    streams
}

#[test]
fn what_is_cut_keeps_its_place() {
    let (mut twin, pods) = routed(UNDERLAYS[0], Wire::default(), 1);
    let frames = [(1, 100), (101, 20_000), (20_101, 100), (20_201, 3000), (23_201, 1)]
        .map(|(seq, count)| data(ENDS[0], (1000, 80), ACK, seq, &bytes(count, 0)));
    let wire = send(&mut twin, &pods, &frames);
    let mut next = 1;
    for packet in &wire {
        let piece = read(&packet[50..]);
        assert_eq!(piece.seq, next);
        next += piece.payload.len() as u32;
    }
    assert_eq!(next, 23_202);
}

#[test]
fn the_last_window_counts() {
    let (mut twin, pods) = routed(UNDERLAYS[0], Wire::default(), 1);
    let with_window = |seq: u32, window: u16| {
        let mut frame = data(ENDS[0], (1000, 80), ACK, seq, &bytes(100, 0));
        let sum = u16::from_be_bytes([frame[50], frame[51]]);
        let sum = vswitch_net::checksum::update(sum, u16::from_be_bytes([frame[48], frame[49]]), window);
        frame[48..50].copy_from_slice(&window.to_be_bytes());
        frame[50..52].copy_from_slice(&sum.to_be_bytes());
        frame
    };
    let wire = send(&mut twin, &pods, &[with_window(1, 0), with_window(101, 4242)]);
    wire.iter().for_each(|packet| twin.switches[1].send(UPLINK_PORT, packet));
    twin.switches[1].settle();
    let got = twin.switches[1].take(pods[1][0].id);
    assert_eq!(got.len(), 1);
    assert!(read(&got[0]).is_valid);
    assert_eq!(got[0][48..50], 4242_u16.to_be_bytes());
}

/// A pod that routes must pass on what it gets in the sizes in which it came.
#[test]
fn what_a_pod_is_to_pass_on_is_not_joined() {
    let (mut twin, pods) = super::vxlan::bridged(UNDERLAYS[0], Wire::default(), 1);
    for (destination, count) in [("10.9.2.1", 1), ("172.16.0.1", 2)] {
        let (from, to) = (mac(10), mac(20));
        let frame = |seq: u32| {
            let macs = Ends { from, to };
            packet(macs, "10.9.1.1", destination, (1000, 80), Layer4::Tcp { flags: ACK, seq, ack: 7 }, &bytes(100, 0))
        };
        // The stations find each other first.
        let hello = frames::udp(Ends { from: to, to: from }, "10.9.2.1", "10.9.1.1", b"hello");
        twin.switches[1].send(pods[1][0].id, &hello);
        twin.switches[1].settle();
        for packet in twin.switches[1].take(UPLINK_PORT) {
            twin.switches[0].send(UPLINK_PORT, &packet);
        }
        twin.switches[0].settle();
        // Announcements of ports that came.
        (0..2).for_each(|at| twin.switches[at].settle());
        let _ = (twin.switches[0].take(UPLINK_PORT), twin.switches[1].take(pods[1][0].id));
        let wire = send(&mut twin, &pods, &[frame(1), frame(101)]);
        assert_eq!(arrive(&mut twin, &pods, &wire).len(), count, "{destination}");
    }
}

#[test]
fn stacks_that_send_large_packets_understand_each_other() {
    for wire in [Wire::default(), Wire { loss: 30, reorder: 30 }] {
        let twin = tcp::exchange_of(9000, routed(UNDERLAYS[0], wire, 5));
        let [cut, joined] = [0, 1].map(|at| twin.switches[at].counters().total());
        assert!(cut.copies > 50, "{} pieces", cut.copies);
        assert!(joined.merged > 20, "{} joined", joined.merged);
    }
}

#[test]
fn what_the_host_forwards_is_cut_and_what_it_keeps_is_not() {
    let config = ControlConfig { host_network: Some("pods".to_owned()), ..ControlConfig::default() };
    let network = r#"{"op":"network_add","name":"pods","vni":7,"ranges":["10.1.0.0/24"],"subnets":["10.0.0.0/8"]}"#;
    let mut switch = Switch::with_host(config, mac(99), network).with_uplink(mac(1), Some("192.0.2.1"), None, 1500);
    let pod = switch.add_port("p", "pods", mac(10), &[]);
    let source = pod.addresses[0].addr().to_string();
    for (destination, count) in [("198.51.100.1", 4), ("10.1.0.1", 1)] {
        switch.send(pod.id, &data((&source, destination), (1000, 80), ACK, 1, &bytes(5000, 0)));
        switch.settle();
        let got: Vec<Segment> = switch.take(HOST_PORT).iter().map(|frame| read(frame)).collect();
        assert_eq!(got.len(), count, "{destination}");
        assert!(got.iter().all(|segment| segment.is_valid && (count == 1 || segment.ip_bytes <= 1450)));
    }
}
