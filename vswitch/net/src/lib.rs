//! Facts: the small types that every floor above shares.
//!
//! Ids are newtypes so that a port number is never taken for a VNI; addresses print and parse the way operators write
//! them; checksums follow RFC 1071. Nothing here knows a packet, a socket or a table.
#![forbid(unsafe_code)]

pub mod checksum;
mod id;
mod mac;

pub use id::{NetworkIndex, PeerIndex, PortId, Vni, VniError};
pub use mac::{MacAddr, MacParseError};

/// The MTU of a pod's link: local TCP then uses segments of this size and needs no segmentation offload.
///
/// A frame of this size and its Ethernet header fill 17 chunks of 3,840 usable bytes; the kernel takes at most 18.
pub const POD_LINK_MTU: u32 = 65_000;

/// The MTU of the link of a pod whose rate is limited: a rate is kept by dropping, and a TCP that loses segments of 65,000
/// bytes keeps far below it.
pub const LIMITED_LINK_MTU: u32 = 1500;

/// The smallest MTU of a pod's link: what IPv6 needs (RFC 8200 section 5).
pub const POD_LINK_MTU_MIN: u32 = 1280;

/// Bytes that VXLAN over IPv4 adds to an IP packet: inner Ethernet 14, VXLAN 8, UDP 8, IPv4 20 (RFC 7348 section 5).
pub const VXLAN_OVERHEAD_V4: u32 = 50;

/// Bytes that VXLAN over IPv6 adds to an IP packet: as over IPv4, with an IPv6 header of 40.
pub const VXLAN_OVERHEAD_V6: u32 = 70;

/// The link-local IPv4 gateway that every routed pod uses (RFC 3927 range, never routed).
pub const GATEWAY_V4: std::net::Ipv4Addr = std::net::Ipv4Addr::new(169, 254, 1, 1);

/// The link-local IPv6 gateway that every routed pod uses.
pub const GATEWAY_V6: std::net::Ipv6Addr = std::net::Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// The MAC address of the gateway, the same on every node, so that a routed packet needs no neighbor state between nodes.
pub const GATEWAY_MAC: MacAddr = MacAddr([0x02, 0x76, 0x73, 0x77, 0x00, 0x01]);

/// The UDP port that IANA assigned to VXLAN (RFC 7348 section 8).
pub const VXLAN_PORT: u16 = 4789;
