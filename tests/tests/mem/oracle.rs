//! The parser against etherparse: where both accept a packet they read the same.

use std::net::IpAddr;

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use proptest::prelude::*;
use vswitch_dataplane::meta::{Checksum, Kind, Meta};
use vswitch_dataplane::parse::parse;
use vswitch_dataplane::{Access, DropReason, Network, NetworkMode, Port, PortKind, SenderCheck, Snapshot};
use vswitch_net::{MacAddr, NetworkIndex, PortId, Vni};
use vswitch_xsk::Umem;

/// IP authentication header (RFC 4302).
const AUTHENTICATION: u8 = 51;

fn snapshot() -> Snapshot {
    let access = Access::new(NetworkIndex(0), MacAddr([2; 6]), Vec::new(), SenderCheck::None);
    let network = Network {
        vni: Vni::try_from(1).unwrap(),
        mode: NetworkMode::Bridged,
        router_v4: None,
        router_v6: None,
        mss: None,
        is_transparent: false,
        learns: true,
        multicast_routers: None,
        ports: vec![PortId(0)],
        flood_peers: Vec::new(),
    };
    let mut snapshot =
        Snapshot { ports: vec![Some(Port::new(65_000, PortKind::Access(access)).into())], ..Snapshot::default() };
    snapshot.networks = vec![Some(network.into())];
    snapshot.underlay.udp_port = 4789;
    snapshot
}

fn read(bytes: &[u8]) -> Result<Meta, DropReason> {
    let mut umem = Umem::new(32).unwrap();
    let mut packet = umem.packet_from(bytes).unwrap();
    let mut meta = Meta::default();
    let parsed = parse(&mut packet, PortId(0), &snapshot(), 1, &mut meta);
    umem.free_packet(packet);
    parsed.map(|()| meta)
}

/// Compares all that the two have in common.
fn compare(bytes: &[u8], meta: &Meta) {
    if meta.kind == Kind::V4 && meta.protocol == AUTHENTICATION {
        // etherparse looks behind an IPv4 authentication header; to a switch it is a protocol like another.
        return;
    }
    let sliced = SlicedPacket::from_ethernet(bytes).expect("accepted here, refused by etherparse");
    let Some(net) = &sliced.net else { return };
    let addresses: (IpAddr, IpAddr) = match net {
        NetSlice::Ipv4(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        NetSlice::Ipv6(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        NetSlice::Arp(_) => return,
    };
    assert_eq!(meta.addresses(), Some(addresses));
    let payload = match net {
        NetSlice::Ipv4(ip) => ip.payload(),
        NetSlice::Ipv6(ip) => ip.payload(),
        NetSlice::Arp(_) => return,
    };
    assert_eq!(meta.protocol, payload.ip_number.0);
    assert_eq!(meta.fragment.is_some(), payload.fragmented);
    assert_eq!(usize::from(meta.l4), payload.payload.as_ptr() as usize - bytes.as_ptr() as usize);
    let ports = meta.key.fields().ports;
    match &sliced.transport {
        Some(TransportSlice::Udp(udp)) => {
            assert_eq!((ports.source, ports.destination), (udp.source_port(), udp.destination_port()));
        }
        Some(TransportSlice::Tcp(tcp)) => {
            assert_eq!((ports.source, ports.destination), (tcp.source_port(), tcp.destination_port()));
        }
        _ => {}
    }
}

fn build(v6: bool, tcp: bool, options: usize, payload: &[u8]) -> Vec<u8> {
    let start = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let ip = if v6 {
        start.ipv6([1; 16], [2; 16], 64)
    } else {
        let mut header =
            etherparse::Ipv4Header::new(0, 64, etherparse::IpNumber::UDP, [10, 0, 0, 1], [10, 0, 0, 2]).unwrap();
        header.options = vec![1; options * 4].as_slice().try_into().unwrap();
        start.ip(etherparse::IpHeaders::Ipv4(header, Default::default()))
    };
    let mut bytes = Vec::new();
    if tcp {
        ip.tcp(1234, 80, 7, 1000).write(&mut bytes, payload).unwrap();
    } else {
        ip.udp(1234, 80).write(&mut bytes, payload).unwrap();
    }
    bytes
}

#[test]
fn partial_and_complete_checksums_are_told_apart() {
    for v6 in [false, true] {
        for tcp in [false, true] {
            let bytes = build(v6, tcp, 0, b"some payload");
            assert_eq!(read(&bytes).unwrap().checksum, Checksum::Complete);
            let offset = if tcp { 16 } else { 6 };
            let partial = vswitch_tests::frames::partial(bytes);
            assert_eq!(read(&partial).unwrap().checksum, Checksum::Partial { offset });
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn good_packets_are_read_alike(v6: bool, tcp: bool, options in 0_usize..10, payload in prop::collection::vec(any::<u8>(), 0..100)) {
        let bytes = build(v6, tcp, options, &payload);
        compare(&bytes, &read(&bytes).expect("a good packet"));
    }

    #[test]
    fn damaged_packets_are_read_alike_or_refused(
        v6: bool, tcp: bool,
        changes in prop::collection::vec((12_usize..80, any::<u8>()), 1..5),
        payload in prop::collection::vec(any::<u8>(), 0..60),
    ) {
        let mut bytes = build(v6, tcp, 0, &payload);
        for (at, value) in changes {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        if !v6 {
            bytes[24..26].fill(0);
            let sum = vswitch_net::checksum::finish(vswitch_net::checksum::sum(&bytes[14..34]));
            bytes[24..26].copy_from_slice(&sum.to_be_bytes());
        }
        if let Ok(meta) = read(&bytes) {
            compare(&bytes, &meta);
        }
    }
}
