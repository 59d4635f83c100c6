//! What becomes of a packet, and why not.

use vswitch_net::{MacAddr, NetworkIndex, PeerIndex, PortId};

use crate::table::policy::RuleId;

/// The decision about one packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As a flow entry says.
    Forward(Action),
    /// To every other port of the network, and to its peers if it came from a port here.
    Flood,
    /// To the members of its group, and to multicast routers.
    Group,
    /// Back to where it came from: the packet was turned into the switch's own answer.
    Reply,
    /// Nowhere.
    Drop(DropReason),
}

/// What a flow entry does with its packets: what is changed, then the way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(align(8))]
pub struct Action {
    /// What to change, for routed packets.
    pub rewrite: Option<Rewrite>,
    /// Whether addresses and ports change, too; the flow table keeps beside the action what they become.
    pub is_translated: bool,
    /// Where they go. A way to a proxy, or through a cipher, would be one more of these.
    pub output: Output,
}

/// A way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// A port of this switch.
    Port(PortId),
    /// Through VXLAN to a peer.
    Encap {
        /// The peer.
        peer: PeerIndex,
        /// The network whose VNI to use.
        network: NetworkIndex,
    },
    /// Nowhere: a rule denies it, and would deny its answers too.
    Deny(RuleId),
}

/// What routing changes: both MAC addresses; the hop count goes down by one with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewrite {
    /// New destination.
    pub destination: MacAddr,
    /// New source.
    pub source: MacAddr,
}

impl Action {
    /// To nobody; in the place of one that is not known yet.
    pub(crate) const NONE: Action =
        Action { rewrite: None, is_translated: false, output: Output::Port(PortId(u16::MAX)) };

    /// One that changes no address.
    pub fn new(rewrite: Option<Rewrite>, output: Output) -> Action {
        Action { rewrite, is_translated: false, output }
    }
}

macro_rules! drop_reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident, $name:literal, $sentence:literal;)+) => {
        /// Why a packet was dropped. One counter each; the sentence is what an operator reads.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum DropReason {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl DropReason {
            /// All reasons, in the order of their counters.
            pub const ALL: &'static [DropReason] = &[$(DropReason::$variant,)+];

            /// A short name, stable, for scripts.
            pub fn name(self) -> &'static str {
                match self { $(DropReason::$variant => $name,)+ }
            }

            /// What happened and what to look at.
            pub fn sentence(self) -> &'static str {
                match self { $(DropReason::$variant => $sentence,)+ }
            }
        }
    };
}

drop_reasons! {
    /// A header does not fit the packet.
    Truncated, "truncated", "the packet ends inside a header";
    /// A length field disagrees with the packet or with another one.
    BadLength, "bad-length", "a length field says more or less than the packet holds";
    /// Version, header length or another fixed field is wrong.
    Malformed, "malformed", "a header field has a value that the protocol does not allow";
    /// The IPv4 header checksum is wrong (RFC 1812 section 5.2.2).
    BadIpChecksum, "bad-ip-checksum", "the IPv4 header checksum is wrong: look for damage on the link";
    /// More IPv6 extension headers than are followed.
    TooManyHeaders, "too-many-headers", "more than 8 IPv6 extension headers in a row";
    /// A fragment that no stack makes (RFC 791 section 3.2, RFC 8200 section 4.5).
    BadFragment, "bad-fragment", "a fragment that is empty, not of whole units, or beyond the largest packet";
    /// A fragment that covers bytes which were there before (RFC 3128, RFC 5722).
    FragmentOverlap, "fragment-overlap", "fragments overlap: one datagram is made to look like another";
    /// A tag that the trunk port does not carry, or none where there must be one.
    VlanNotAllowed, "vlan-not-allowed", "the port carries no such VLAN: see `switchctl port show LINK`";
    /// An inner 802.1Q tag (RFC 7348 section 6.1).
    Tagged, "vlan-tag", "an 802.1Q tag where none is allowed (RFC 7348 section 6.1)";
    /// The source MAC is a group address or zero.
    BadSourceMac, "bad-source-mac", "the source MAC is multicast or zero";
    /// 01:80:c2:00:00:0x: not for forwarding (802.1Q-2018 section 8.6.3).
    ReservedMac, "reserved-mac", "a link-local control frame (01:80:c2:00:00:0x) is not forwarded";
    /// Not VXLAN to our VTEP.
    NotVxlan, "not-vxlan", "the packet from the uplink is not VXLAN to an address and port of this node";
    /// The VXLAN header lacks the I flag (RFC 7348 section 5).
    BadVxlan, "bad-vxlan", "the VXLAN header has no VNI flag";
    /// No network has this VNI.
    UnknownVni, "unknown-vni", "no network of this node has the packet's VNI: compare `switchctl network list` on both nodes";
    /// The sender is no peer of ours.
    UnknownPeer, "unknown-peer", "the sending VTEP is not a peer: add it with `switchctl peer add`";
    /// A peer that claims our VTEP address.
    SpoofedVtep, "spoofed-vtep", "a packet from the wire has this node's own VTEP as its source: two nodes have one address, or somebody forges it";
    /// Not encapsulated, and not from a peer that may do so.
    NotDirect, "not-direct", "a packet from the wire without VXLAN, whose source is behind no peer of direct routing";
    /// VXLAN to our port inside a network: a loop, or a pod that forges overlay traffic.
    NestedVxlan, "nested-vxlan", "VXLAN inside a network: a loop, or a pod that forges overlay packets";
    /// Congestion mark on a packet whose sender cannot read it (RFC 6040 section 4.2).
    EcnNotCapable, "ecn-not-capable", "marked congested on the way, and its sender does not speak ECN (RFC 6040)";
    /// The port sent with another port's MAC.
    SpoofedMac, "spoofed-mac", "the source MAC is not the port's";
    /// The port sent with an address that is not its own.
    SpoofedAddress, "spoofed-address", "the source address is none of the port's";
    /// The port claimed an address that is not its own in ARP or ND.
    SpoofedNeighbor, "spoofed-neighbor", "ARP or neighbor discovery claims an address that is none of the port's";
    /// A routed packet for another MAC than the gateway's.
    NotForGateway, "not-for-gateway", "a routed network takes packets for the gateway's MAC only";
    /// A routed packet whose hops are used up.
    TtlExpired, "ttl-expired", "time to live or hop limit is used up";
    /// No route.
    NoRoute, "no-route", "no route to the destination: see `switchctl route list`";
    /// An address of a range of this node, or of the network's subnets, that nobody has.
    NoHost, "no-host", "nobody has the destination address: see `switchctl port list` and `switchctl route list`";
    /// More than the port's rate.
    RateFrom, "rate-from", "the port sends more than its egress rate";
    /// More than the receiving port's rate.
    RateTo, "rate-to", "more than the receiving port's ingress rate";
    /// Too many broadcasts.
    StormBroadcast, "storm-broadcast", "more broadcasts than the network lets a port send";
    /// Too much multicast.
    StormMulticast, "storm-multicast", "more multicast than the network lets a port send";
    /// Too much to stations that are not known.
    StormUnknown, "storm-unknown", "more packets to unknown stations than the network lets a port send";
    /// A station of a sticky port is seen elsewhere.
    StickyMac, "sticky-mac", "the source MAC belongs to a sticky port, and was seen elsewhere";
    /// Multicast that nobody has asked for.
    NoMember, "no-member", "nobody has joined the multicast group";
    /// Both ports are isolated.
    Isolated, "isolated", "both ports are isolated from each other";
    /// An ICMP error about a packet that its receiver did not send (RFC 5927 section 4.1).
    ForgedError, "forged-error", "an ICMP error that quotes a packet which its receiver cannot have sent";
    /// A policy does not allow it.
    PolicyDenied, "policy-denied", "a policy denies it: see `switchctl policy explain` and `switchctl observe`";
    /// Neither IPv4 nor IPv6, where policies would have to judge it.
    PolicyUnread, "policy-unread", "a frame that policies cannot judge (a tag, or another protocol than IP) at a port that has some";
    /// Of no connection that is known, between ends that policies protect.
    NoConnection, "no-connection", "it belongs to no connection, and is none that may begin one";
    /// TCP that cannot be where the connection is.
    TcpState, "tcp-state", "a TCP segment that cannot follow what was seen of its connection";
    /// TCP outside of the window (RFC 9293 section 3.10.7.4).
    TcpWindow, "tcp-window", "a TCP segment far outside of its connection's window";
    /// TCP flags that no stack sends together.
    TcpFlags, "tcp-flags", "TCP flags that no stack sends together";
    /// A SYN in pieces.
    FragmentedSyn, "fragmented-syn", "a TCP segment that opens or closes a connection, in fragments";
    /// A later fragment whose first was not seen, between ends whose policies ask for ports.
    FragmentUnjudged, "fragment-unjudged", "a fragment without ports came before its first, and policies ask for ports";
    /// The layer 4 checksum is wrong.
    BadChecksum, "bad-checksum", "the TCP, UDP, SCTP or ICMP checksum is wrong: look for damage on the link";
    /// An ICMP error about nothing that is known.
    UnrelatedError, "unrelated-error", "an ICMP error that quotes no connection";
    /// A service without backends.
    NoBackend, "no-backend", "the service has no backend: see `switchctl service list`";
    /// A service's address, at a port that no service has.
    NoService, "no-service", "a service's address, and none of its services has that port and protocol: see `switchctl service list`";
    /// All ports that a translated connection could leave with are taken.
    NoNatPort, "no-nat-port", "every port tried is taken at the address that the connection would leave with: give the egress rule more addresses";
    /// It cannot leave with other addresses or ports, and must.
    Untranslatable, "untranslatable", "cannot be translated: of no connection that an egress rule could hide (other ICMP, an error about nothing known, a fragment without its first), or SCTP in fragments";
    /// The connection table is full.
    ConnectionsFull, "connections-full", "the connection table is full of answered connections: raise `connections.limit`";
    /// For the gateway's own address, which offers nothing but ARP and neighbor discovery.
    ToGateway, "to-gateway", "the gateway's address offers nothing but ARP, neighbor discovery and ping";
    /// From or to a link-local, loopback or unspecified address (RFC 4291 section 2.5.6, RFC 3927 section 7).
    LinkLocal, "link-local", "link-local and unspecified addresses are not routed";
    /// Multicast or broadcast in a routed network.
    RoutedMulticast, "routed-multicast", "a routed network forwards no multicast and no broadcast";
    /// An ARP or ND message that asks nothing of the switch.
    NeighborIgnored, "neighbor-ignored", "ARP or neighbor discovery that is not for the gateway";
    /// Another protocol than IP in a routed network.
    NotIp, "not-ip", "a routed network carries IPv4, IPv6, ARP and neighbor discovery only";
    /// From the wire to the wire.
    SplitHorizon, "split-horizon", "what came from a peer is not sent to a peer";
    /// The destination is where it came from.
    SamePort, "same-port", "the destination is behind the port that sent it";
    /// Nobody to flood to.
    NoReceiver, "no-receiver", "nobody else is in the network";
    /// The peer's next hop is not resolved.
    NoNeighbor, "no-neighbor", "the kernel has no route or no neighbor for the peer yet: see `switchctl peer list`";
    /// Larger than the uplink carries.
    TooBigForWire, "too-big-for-wire", "larger than the uplink's MTU with its VXLAN headers: see the pod's route MTU";
    /// Larger than the port's link carries.
    TooBigForPort, "too-big-for-port", "larger than the port's MTU";
    /// The headers do not fit before the packet.
    NoHeadroom, "no-headroom", "no room before the packet for the VXLAN headers";
    /// The port is gone or being removed.
    NoPort, "no-port", "the port is gone";
    /// The port's transmit ring is full.
    TxFull, "tx-full", "the port's transmit queue is full: the receiver is slower than the sender";
    /// From a port at rest, and the queue of those who wait for its sockets was full.
    Resting, "resting", "from a port at rest, and more at once than waits until it has sockets again, or it is stuck: see `switchctl port list`";
    /// No free frame for a copy.
    NoFrames, "no-frames", "no free frame for a copy: raise `worker.umem_frames`";
}

impl DropReason {
    /// How many there are.
    pub const COUNT: usize = DropReason::ALL.len();

    /// The position of the counter.
    pub fn index(self) -> usize {
        self as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_positions_match() {
        for (at, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(reason.index(), at);
            assert_eq!(DropReason::ALL.iter().filter(|other| other.name() == reason.name()).count(), 1);
        }
    }

    #[test]
    fn an_action_is_small() {
        assert!(size_of::<Action>() <= 24);
    }
}
