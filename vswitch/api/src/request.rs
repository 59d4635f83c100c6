//! Requests. Everything that changes the switch is one of these, whoever asks: config file, CNI or operator.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use vswitch_net::{MacAddr, Vni};

use crate::policy::{
    ConnectionFilter, EndpointName, EndpointSpec, ExplainSpec, NamedPort, ObjectName, ObserveFilter, PolicyDocument,
};
use crate::service::{EgressSpec, ServiceSpec};

/// A request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Everything about the daemon on one page.
    Status,
    /// Plugs a link in.
    PortAdd(PortSpec),
    /// Unplugs a port. Unplugging what is not there is fine.
    PortDel {
        /// The port's host link.
        link: String,
    },
    /// All ports, or those of one link.
    PortList {
        /// Only the port of this host link.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        link: Option<String>,
    },
    /// Unplugs all ports of one owner except those still valid (CNI GC).
    PortGc {
        /// The CNI network name whose ports are meant.
        owner: String,
        /// What stays.
        valid: Vec<Attachment>,
    },
    /// Adds a network.
    NetworkAdd(NetworkSpec),
    /// Removes a network that has no ports.
    NetworkDel {
        /// Its name.
        name: String,
    },
    /// All networks.
    NetworkList,
    /// Adds a peer.
    PeerAdd(PeerSpec),
    /// Removes a peer with its routes and static stations.
    PeerDel {
        /// Its name.
        name: String,
    },
    /// All peers.
    PeerList,
    /// Adds a static station.
    FdbAdd(FdbSpec),
    /// Removes a station, static or learned.
    FdbDel {
        /// Its network.
        network: String,
        /// Its address.
        mac: MacAddr,
    },
    /// Stations of one network, or of all.
    FdbList {
        /// The network.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        network: Option<String>,
    },
    /// Adds a route to a peer.
    RouteAdd(RouteSpec),
    /// Removes a route to a peer.
    RouteDel {
        /// Its network.
        network: String,
        /// Its prefix.
        prefix: IpNet,
    },
    /// Routes of one network, or of all; those to local ports too.
    RouteList {
        /// The network.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        network: Option<String>,
    },
    /// Copies what passes ports.
    MirrorAdd(MirrorSpec),
    /// Ends a mirror.
    MirrorDel {
        /// Its name.
        name: String,
    },
    /// All mirrors.
    MirrorList,
    /// Adds services; those of the same names are replaced: all of them or none.
    ServiceSet {
        /// The services.
        services: Vec<ServiceSpec>,
    },
    /// Removes services: all of them or none. Their TCP connections go on.
    ServiceDel {
        /// Their names.
        names: Vec<String>,
    },
    /// All services.
    ServiceList,
    /// Adds an egress rule, or replaces the one of its name.
    EgressSet(EgressSpec),
    /// Removes an egress rule. Its connections go on.
    EgressDel {
        /// Its name.
        name: String,
    },
    /// All egress rules.
    EgressList,
    /// Members of multicast groups, in networks that snoop.
    GroupList,
    /// Next hops of the underlay as the kernel resolved them.
    NeighborList,
    /// Flows that had a packet in the last ten seconds.
    FlowList {
        /// Most flows to show.
        #[serde(default = "default_flow_limit")]
        limit: usize,
    },
    /// Adds and replaces policies, tiers, namespaces, pods and nodes: all of them or none.
    PolicyApply {
        /// The texts.
        documents: Vec<PolicyDocument>,
        /// Only say what would change.
        #[serde(default, skip_serializing_if = "is_no")]
        dry_run: bool,
    },
    /// Removes objects: all of them or none.
    PolicyDelete {
        /// The objects.
        objects: Vec<ObjectName>,
    },
    /// All objects, policies in the order that they are asked in.
    PolicyList,
    /// One object with its rules.
    PolicyShow(ObjectName),
    /// Whether a connection may begin, and why.
    PolicyExplain(ExplainSpec),
    /// Tells of pods and nodes, here and elsewhere; those of the same names are replaced.
    EndpointSet {
        /// The endpoints.
        endpoints: Vec<EndpointSpec>,
    },
    /// Forgets pods and nodes.
    EndpointDel {
        /// Their names.
        endpoints: Vec<EndpointName>,
    },
    /// All pods and nodes that policies know.
    EndpointList,
    /// Connections.
    ConnectionList {
        /// Which.
        #[serde(default)]
        filter: ConnectionFilter,
        /// Most connections to show.
        #[serde(default = "default_flow_limit")]
        limit: usize,
    },
    /// Forgets connections: what goes on is judged anew.
    ConnectionDel {
        /// Which.
        filter: ConnectionFilter,
    },
    /// Connections that policies denied or want told, after a number.
    Observe {
        /// Those after this one; none for those that are still known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<u64>,
        /// Which.
        #[serde(default)]
        filter: ObserveFilter,
    },
    /// Counters by port.
    Stats,
    /// Drops by reason and port.
    Drops,
}

/// A link to plug in. The link exists, is up and lies in the daemon's network namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortSpec {
    /// The host link's name.
    pub link: String,
    /// Its network's name; none for the first network of the configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// The pod's MAC address.
    pub mac: MacAddr,
    /// The pod's addresses. If empty, the built-in IPAM gives one a family, where the network has ranges.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// MTU of the pod's link, bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Who plugged it in: the container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attachment: Option<Attachment>,
    /// Who owns it: the CNI network's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Path of the pod's network namespace, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns: Option<String>,
    /// Labels. `K8S_POD_NAMESPACE` and `K8S_POD_NAME` say which pod it is; policies see the others, unless the pod's own
    /// are known (`endpoint_set`).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Whether the pod's default route leads here. Not for a second interface beside one that has it.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub default_route: bool,
    /// What is checked of its packets; none for what the network says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<SenderCheck>,
    /// VLANs of a trunk port, each a network's `vlan`. Empty for an access port.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trunk: Vec<u16>,
    /// Whether a trunk port carries its own network without a tag (the native VLAN).
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub native: bool,
    /// Exchanges nothing with other isolated ports.
    #[serde(default, skip_serializing_if = "is_no")]
    pub isolated: bool,
    /// May get its own packets back.
    #[serde(default, skip_serializing_if = "is_no")]
    pub hairpin: bool,
    /// Bridged networks: stations seen here are believed nowhere else, and are not forgotten.
    #[serde(default, skip_serializing_if = "is_no")]
    pub sticky: bool,
    /// Bridged networks: most stations learned here; none for what the network lets it have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac_limit: Option<usize>,
    /// How much may pass.
    #[serde(default, skip_serializing_if = "Bandwidth::is_unlimited")]
    pub bandwidth: Bandwidth,
    /// Ports of the host that lead here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub port_mappings: Vec<PortMapping>,
    /// Ports of the pod that policies may name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub named_ports: Vec<NamedPort>,
}

/// What is checked of a packet from a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SenderCheck {
    /// Nothing: a router or a bridge is behind it.
    None,
    /// The source MAC.
    Mac,
    /// The source MAC and address, and what ARP and neighbor discovery claim.
    Full,
    /// The source MAC, or more where the network checks more.
    AtLeastMac,
}

impl SenderCheck {
    /// Its name in the protocol.
    pub fn name(self) -> &'static str {
        match self {
            SenderCheck::None => "none",
            SenderCheck::Mac => "mac",
            SenderCheck::Full => "full",
            SenderCheck::AtLeastMac => "at_least_mac",
        }
    }
}

/// Rates of a port (CNI conventions, `bandwidth`). Ingress is towards the pod. A rate of zero is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields, default)]
pub struct Bandwidth {
    /// Bits a second to the pod.
    #[serde(skip_serializing_if = "is_zero")]
    pub ingress_rate: u64,
    /// Bits at once to the pod.
    #[serde(skip_serializing_if = "is_zero")]
    pub ingress_burst: u64,
    /// Bits a second from the pod.
    #[serde(skip_serializing_if = "is_zero")]
    pub egress_rate: u64,
    /// Bits at once from the pod.
    #[serde(skip_serializing_if = "is_zero")]
    pub egress_burst: u64,
}

/// A port of the host that leads to a pod's (CNI conventions, `portMappings`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortMapping {
    /// The host's.
    pub host_port: u16,
    /// The pod's.
    pub container_port: u16,
    /// Of which protocol.
    #[serde(default)]
    pub protocol: Protocol,
    /// The host's address; none for all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
}

/// A protocol with ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// One interface of one container (CNI specification, section 2).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attachment {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
}

/// How a network forwards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkMode {
    /// By IP address; every pod's gateway is the switch.
    #[default]
    Routed,
    /// By MAC address, as one Ethernet.
    Bridged,
}

/// A network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkSpec {
    /// Its name.
    pub name: String,
    /// Its VXLAN network identifier.
    pub vni: Vni,
    /// Its manner of forwarding.
    #[serde(default)]
    pub mode: NetworkMode,
    /// The whole network's prefixes, on all nodes. A bridged pod's address has the prefix length of the one it lies in.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub subnets: Vec<IpNet>,
    /// What this node's built-in IPAM gives out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ranges: Vec<IpNet>,
    /// Routed networks: where services have their addresses. Pods reach them with the MTU of their links, as they do each
    /// other; a service elsewhere is reached with what fits the wire.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<IpNet>,
    /// Bridged networks: an IPv4 router in the network, for the pods' default route.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway_v4: Option<Ipv4Addr>,
    /// Bridged networks: an IPv6 router in the network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway_v6: Option<Ipv6Addr>,
    /// Whether a port may send with its own addresses only.
    #[serde(default = "yes")]
    pub spoof_check: bool,
    /// Routed networks: this node's own addresses, from which its ICMP errors come and by which the host's stack is
    /// reached. None for the first address of the first range of each family.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub router: Option<Vec<IpAddr>>,
    /// Routed networks: lower the segment size that TCP connections over the wire announce to what fits it.
    #[serde(default, skip_serializing_if = "is_no")]
    pub mss_clamp: bool,
    /// Bridged networks: a VXLAN device of the kernel whose forwarding entries are followed, for EVPN.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub follow: Option<String>,
    /// Its 802.1Q identifier on trunk ports, 1 to 4094.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<u16>,
    /// Bridged networks: answer ARP and neighbor discovery for stations that are known.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub neighbor_suppression: bool,
    /// Bridged networks: send multicast to those who have joined (IGMP and MLD snooping).
    #[serde(default, skip_serializing_if = "is_no")]
    pub multicast_snooping: bool,
    /// Bridged networks: how much each port may send to many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storm: Option<StormLimits>,
    /// Bridged networks: carry frames that have tags as they are (QinQ).
    #[serde(default, skip_serializing_if = "is_no")]
    pub transparent: bool,
    /// Bridged networks: learn stations from what they send. Off, all goes to all but what is for a port's own address: for
    /// copies of mirrors.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub learning: bool,
}

/// How much a port may send to many, in packets a second. Zero is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StormLimits {
    /// To everybody.
    pub broadcast: u64,
    /// To groups.
    pub multicast: u64,
    /// To stations that are not known.
    pub unknown_unicast: u64,
}

/// Copies of what passes ports (SPAN).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MirrorSpec {
    /// Its name.
    pub name: String,
    /// The ports to look at, by their host links.
    pub ports: Vec<String>,
    /// Which way.
    #[serde(default)]
    pub direction: MirrorDirection,
    /// Who gets the copies: a port, or a peer in VXLAN.
    pub to: FdbTarget,
    /// The bridged network that copies to a peer travel in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
}

/// Which way packets go that a mirror copies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MirrorDirection {
    /// Both.
    #[default]
    Both,
    /// From the port into the switch.
    From,
    /// From the switch to the port.
    To,
}

/// Another node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerSpec {
    /// Its name.
    pub name: String,
    /// Its VTEP.
    pub vtep: IpAddr,
    /// Its VTEP of the other family, for a node of both: used while the first is out of reach.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub other_vtep: Option<IpAddr>,
    /// Destination MAC of routed packets to it; another vswitch needs none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub router_mac: Option<MacAddr>,
    /// Bridged networks whose floods it gets; none for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub networks: Option<Vec<String>>,
    /// How packets of the host's network travel to it. Those of other networks always travel in VXLAN.
    #[serde(default, skip_serializing_if = "Encap::is_vxlan")]
    pub encap: Encap,
}

/// How packets of the network that is joined to the host travel to a peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Encap {
    /// In VXLAN.
    #[default]
    Vxlan,
    /// As they are if the peer is on the uplink's link, else in VXLAN.
    CrossSubnet,
    /// As they are: the underlay's routers know the pods' addresses.
    Direct,
}

/// A route to a peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteSpec {
    /// A routed network's name.
    pub network: String,
    /// Destination.
    pub prefix: IpNet,
    /// A peer's name.
    pub peer: String,
}

/// A static station.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FdbSpec {
    /// A bridged network's name.
    pub network: String,
    /// The station's address.
    pub mac: MacAddr,
    /// Where it is.
    pub at: FdbTarget,
    /// Its addresses, if ARP and neighbor discovery for it are to be answered.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
}

/// Where a station is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FdbTarget {
    /// Behind a port, named by its host link.
    Port(String),
    /// Behind a peer, by name.
    Peer(String),
}

impl PortSpec {
    /// A port with nothing but a link and a MAC.
    pub fn new(link: impl Into<String>, mac: MacAddr) -> PortSpec {
        PortSpec {
            link: link.into(),
            network: None,
            mac,
            addresses: Vec::new(),
            mtu: None,
            attachment: None,
            owner: None,
            netns: None,
            labels: BTreeMap::new(),
            default_route: true,
            check: None,
            trunk: Vec::new(),
            native: true,
            isolated: false,
            hairpin: false,
            sticky: false,
            mac_limit: None,
            bandwidth: Bandwidth::default(),
            port_mappings: Vec::new(),
            named_ports: Vec::new(),
        }
    }
}

impl Bandwidth {
    /// True if nothing is limited.
    pub fn is_unlimited(&self) -> bool {
        self.ingress_rate == 0 && self.egress_rate == 0
    }
}

impl PeerSpec {
    /// Its VTEPs, the first one first.
    pub fn vteps(&self) -> impl Iterator<Item = IpAddr> {
        [Some(self.vtep), self.other_vtep].into_iter().flatten()
    }
}

impl Encap {
    fn is_vxlan(&self) -> bool {
        *self == Encap::Vxlan
    }
}

impl Protocol {
    /// As nftables and people write it.
    pub fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => "sctp",
        }
    }
}

impl Request {
    /// True if it changes policies, endpoints or connections, and nothing else.
    pub fn is_policy(&self) -> bool {
        matches!(
            self,
            Request::PolicyApply { .. }
                | Request::PolicyDelete { .. }
                | Request::EndpointSet { .. }
                | Request::EndpointDel { .. }
                | Request::ConnectionDel { .. }
        )
    }

    /// True if it only asks, and changes nothing.
    pub fn is_question(&self) -> bool {
        matches!(
            self,
            Request::Status
                | Request::PortList { .. }
                | Request::NetworkList
                | Request::PeerList
                | Request::FdbList { .. }
                | Request::RouteList { .. }
                | Request::NeighborList
                | Request::MirrorList
                | Request::ServiceList
                | Request::EgressList
                | Request::GroupList
                | Request::FlowList { .. }
                | Request::PolicyApply { dry_run: true, .. }
                | Request::PolicyList
                | Request::PolicyShow(_)
                | Request::PolicyExplain(_)
                | Request::EndpointList
                | Request::ConnectionList { .. }
                | Request::Observe { .. }
                | Request::Stats
                | Request::Drops
        )
    }
}

/// As a line of the log.
impl std::fmt::Display for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Request::PortAdd(spec) => {
                write!(f, "port add {}", spec.link)?;
                if let Some(attachment) = &spec.attachment {
                    write!(f, " for {} of container {}", attachment.ifname, attachment.container_id)?;
                }
                match spec.labels.get("K8S_POD_NAME") {
                    Some(pod) => write!(f, ", pod {pod}"),
                    None => Ok(()),
                }
            }
            Request::PortDel { link } => write!(f, "port del {link}"),
            Request::PortGc { owner, valid } => write!(f, "port gc of {owner}, {} valid", valid.len()),
            Request::NetworkAdd(spec) => write!(f, "network add {} vni {}", spec.name, spec.vni),
            Request::NetworkDel { name } => write!(f, "network del {name}"),
            Request::PeerAdd(spec) => write!(f, "peer add {} vtep {}", spec.name, spec.vtep),
            Request::PeerDel { name } => write!(f, "peer del {name}"),
            Request::FdbAdd(spec) => write!(f, "fdb add {} in {} at {}", spec.mac, spec.network, spec.at),
            Request::FdbDel { network, mac } => write!(f, "fdb del {mac} in {network}"),
            Request::RouteAdd(spec) => write!(f, "route add {} in {} to peer {}", spec.prefix, spec.network, spec.peer),
            Request::RouteDel { network, prefix } => write!(f, "route del {prefix} in {network}"),
            Request::MirrorAdd(spec) => {
                write!(f, "mirror add {} of {} to {}", spec.name, spec.ports.join(","), spec.to)
            }
            Request::MirrorDel { name } => write!(f, "mirror del {name}"),
            Request::ServiceSet { services } => {
                let names: Vec<&str> = services.iter().map(|service| service.name.as_str()).collect();
                write!(f, "service set {}", few(&names))
            }
            Request::ServiceDel { names } => {
                write!(f, "service del {}", few(&names.iter().map(String::as_str).collect::<Vec<_>>()))
            }
            Request::EgressSet(spec) => write!(f, "egress set {}", spec.name),
            Request::EgressDel { name } => write!(f, "egress del {name}"),
            Request::PolicyApply { documents, dry_run } => {
                let files: Vec<&str> = documents.iter().map(|document| document.file.as_str()).collect();
                write!(f, "policy {} {}", if *dry_run { "diff" } else { "apply" }, files.join(","))
            }
            Request::PolicyDelete { objects } => {
                let names: Vec<String> = objects.iter().map(ToString::to_string).collect();
                write!(f, "policy delete {}", few(&names.iter().map(String::as_str).collect::<Vec<_>>()))
            }
            Request::ConnectionDel { filter } => {
                let filter = serde_json::to_string(filter).unwrap_or_default();
                write!(f, "connection del {filter}")
            }
            Request::EndpointSet { endpoints } => write!(f, "endpoint set, {}", endpoints.len()),
            Request::EndpointDel { endpoints } => write!(f, "endpoint del, {}", endpoints.len()),
            question => write!(f, "{question:?}"),
        }
    }
}

impl std::fmt::Display for FdbTarget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            FdbTarget::Port(link) => write!(f, "port {link}"),
            FdbTarget::Peer(name) => write!(f, "peer {name}"),
        }
    }
}

/// The first of many names.
fn few(names: &[&str]) -> String {
    let more = if names.len() > 10 { format!(" and {} more", names.len() - 10) } else { String::new() };
    format!("{}{more}", names[..names.len().min(10)].join(", "))
}

fn default_flow_limit() -> usize {
    1000
}

fn yes() -> bool {
    true
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
fn is_yes(value: &bool) -> bool {
    *value
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
fn is_no(value: &bool) -> bool {
    !*value
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
fn is_zero(value: &u64) -> bool {
    *value == 0
}
