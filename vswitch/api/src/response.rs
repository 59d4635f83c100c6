//! Answers. Field names are what `switchctl -o json` prints.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use vswitch_net::{MacAddr, PortId, Vni};

use crate::counts::{DropInfo, FlowInfo, PerfInfo, StatsInfo, WorkerInfo};
use crate::defaults::is_no;
use crate::network::{Encap, FdbTarget, MirrorSpec, NetworkMode, StormLimits};
use crate::policy::{ChangeInfo, ConnectionsInfo, EndpointInfo, ExplainInfo, FlowEvent, PolicyDetail, PolicyInfo};
use crate::port::{Attachment, Bandwidth, PortMapping, SenderCheck};
use crate::rxq::{RxqInfo, RxqPlan};
use crate::service::{EgressInfo, ServiceInfo};

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Answer {
    /// Done; nothing to tell.
    Done,
    /// To `status`.
    Status(Box<StatusInfo>),
    /// To `port_add`.
    Port(Box<PortInfo>),
    /// To `port_list`; to `port_gc` and `port_del`: the ports that went.
    Ports {
        /// The ports.
        ports: Vec<PortInfo>,
    },
    /// To `network_list`.
    Networks {
        /// The networks.
        networks: Vec<NetworkInfo>,
    },
    /// To `peer_list`.
    Peers {
        /// The peers.
        peers: Vec<PeerInfo>,
    },
    /// To `fdb_list`.
    Fdb {
        /// The stations.
        stations: Vec<FdbInfo>,
    },
    /// To `route_list`.
    Routes {
        /// The routes.
        routes: Vec<RouteInfo>,
    },
    /// To `mirror_list`.
    Mirrors {
        /// The mirrors.
        mirrors: Vec<MirrorSpec>,
    },
    /// To `service_list`.
    Services {
        /// The services.
        services: Vec<ServiceInfo>,
    },
    /// To `egress_list`.
    Egress {
        /// The rules.
        rules: Vec<EgressInfo>,
    },
    /// To `group_list`.
    Groups {
        /// The members.
        groups: Vec<GroupInfo>,
    },
    /// To `neighbor_list`.
    Neighbors {
        /// The next hops.
        neighbors: Vec<NeighborInfo>,
    },
    /// To `flow_list`.
    Flows {
        /// The flows.
        flows: Vec<FlowInfo>,
    },
    /// To `policy_apply` and `policy_delete`.
    Changes {
        /// What became of each object, or would.
        changes: Vec<ChangeInfo>,
    },
    /// To `policy_list`.
    Policies {
        /// The objects.
        policies: Vec<PolicyInfo>,
    },
    /// To `policy_show`.
    Policy(Box<PolicyDetail>),
    /// To `policy_explain`.
    Explained(Box<ExplainInfo>),
    /// To `endpoint_list`.
    Endpoints {
        /// The endpoints.
        endpoints: Vec<EndpointInfo>,
    },
    /// To `connection_list`.
    Connections(Box<ConnectionsInfo>),
    /// To `rxq_list`.
    Rxq(Box<RxqInfo>),
    /// To `rxq_rebalance`.
    Plan(RxqPlan),
    /// To `connection_del`.
    Forgotten {
        /// How many connections.
        count: usize,
    },
    /// To `observe`.
    Events {
        /// The events.
        events: Vec<FlowEvent>,
        /// The number of the last event there was, to ask for those after it.
        last: u64,
        /// News of workers that were lost since the start, for there were too many.
        lost: u64,
    },
    /// To `stats`.
    Stats(Box<StatsInfo>),
    /// To `perf`.
    Perf {
        /// One a worker.
        workers: Vec<PerfInfo>,
    },
    /// To `drops`.
    Drops {
        /// Reasons with their counts, the largest first.
        drops: Vec<DropInfo>,
    },
}

/// The daemon on one page.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusInfo {
    /// The daemon's version.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// Seconds since start.
    pub uptime_seconds: u64,
    /// Generation of the published snapshot.
    pub generation: u64,
    /// Workers.
    pub workers: Vec<WorkerInfo>,
    /// The uplinks.
    pub uplinks: Vec<UplinkInfo>,
    /// The host's own port, if there is one.
    pub host: Option<HostInfo>,
    /// Number of ports.
    pub ports: usize,
    /// Of these, ports without sockets for as long as they are silent.
    #[serde(default)]
    pub ports_resting: usize,
    /// Of these, ports that cannot have any though something waits for them.
    #[serde(default)]
    pub ports_stuck: usize,
    /// Ports of a former daemon that could not be adopted yet; the log says why.
    pub ports_waiting: usize,
    /// Number of networks.
    pub networks: usize,
    /// Number of peers.
    pub peers: usize,
    /// Number of peers whose next hop is resolved.
    pub peers_reachable: usize,
    /// Addresses of the built-in IPAM, by network.
    pub ipam: Vec<IpamInfo>,
    /// Resident memory of the daemon, bytes.
    pub memory_bytes: u64,
    /// The offload of flows to the kernel, if it is asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offload: Option<OffloadInfo>,
}

/// The offload of flows to the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OffloadInfo {
    /// `on`, or why nothing is offloaded.
    pub state: String,
    /// Flows that the kernel forwards now.
    pub flows: usize,
    /// Flows that there is room for.
    pub capacity: usize,
    /// Times that a flow found no room.
    pub refused: u64,
    /// Packets that the kernel forwarded.
    pub packets: u64,
    /// Packets that links lost on their way out, forwarded by whomever: their other ends took them too slowly.
    pub lost: u64,
    /// Links that take no part.
    pub without: Vec<OffloadLinkInfo>,
}

/// A link that takes no part in the offload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OffloadLinkInfo {
    /// The link.
    pub link: String,
    /// Why.
    pub reason: String,
}

/// The port that leads into the host's stack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostInfo {
    /// The host's link.
    pub link: String,
    /// The network that it joins.
    pub network: String,
    /// The host's addresses there.
    pub addresses: Vec<IpAddr>,
    /// Whether what leaves the cluster gets the host's address.
    pub masquerade: bool,
    /// `up`, or what is missing.
    pub state: String,
}

/// Addresses of one network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpamInfo {
    /// The network.
    pub network: String,
    /// The range.
    pub range: IpNet,
    /// In use.
    pub used: u64,
    /// Free.
    pub free: u64,
}

/// The uplink.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UplinkInfo {
    /// The link's name.
    pub link: String,
    /// What state it is in, and why.
    pub state: String,
    /// What happened to it last, or is amiss with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Its MAC address.
    pub mac: MacAddr,
    /// Its MTU.
    pub mtu: u32,
    /// Our IPv4 VTEP.
    pub vtep_v4: Option<Ipv4Addr>,
    /// Our IPv6 VTEP.
    pub vtep_v6: Option<Ipv6Addr>,
    /// UDP port of VXLAN.
    pub udp_port: u16,
    /// `native` or `generic`.
    pub xdp_mode: String,
    /// Why not native, if so.
    pub xdp_fallback: Option<String>,
    /// `copy` or `zero-copy`, by queue.
    pub copy_modes: Vec<String>,
}

/// A port.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PortInfo {
    /// Its number.
    pub id: PortId,
    /// Its host link.
    pub link: String,
    /// Its network.
    pub network: String,
    /// The pod's MAC address.
    pub mac: MacAddr,
    /// The pod's addresses with the prefix length to configure.
    pub addresses: Vec<IpNet>,
    /// MTU of the pod's link.
    pub mtu: u32,
    /// Routes to configure in the pod.
    pub routes: Vec<PodRoute>,
    /// Who plugged it in.
    pub attachment: Option<Attachment>,
    /// Who owns it.
    pub owner: Option<String>,
    /// Path of the pod's network namespace.
    pub netns: Option<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Stations that were not learned because the port, or its network, had too many.
    #[serde(default)]
    pub stations_refused: u64,
    /// Memberships of multicast groups that were not taken because the port had too many.
    #[serde(default)]
    pub groups_refused: u64,
    /// What is checked of its packets; none for a port that waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<SenderCheck>,
    /// `isolated`, `hairpin`, `sticky`, `no native network`: what was asked for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
    /// Most stations that are learned here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac_limit: Option<usize>,
    /// VLANs of a trunk.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trunk: Vec<u16>,
    /// Rates.
    #[serde(default, skip_serializing_if = "Bandwidth::is_unlimited")]
    pub bandwidth: Bandwidth,
    /// Ports of the host that lead here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub port_mappings: Vec<PortMapping>,
    /// `native` or `generic`.
    pub xdp_mode: String,
    /// Why not native, if so.
    pub xdp_fallback: Option<String>,
    /// `copy` or `zero-copy`, by queue.
    pub copy_modes: Vec<String>,
    /// If it has no sockets: `at rest`, as long as it is silent; or why it cannot have any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rest: Option<String>,
    /// Why it is no port yet, if it is one of the last daemon that waits to be adopted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<String>,
}

/// A route in a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodRoute {
    /// Destination.
    pub destination: IpNet,
    /// Gateway; none for a route on the link.
    pub gateway: Option<IpAddr>,
    /// MTU of the route; none for the link's.
    pub mtu: Option<u32>,
    /// True if path MTU discovery is left to those who ask for it: what is too large for the way may be cut there.
    #[serde(default, skip_serializing_if = "is_no")]
    pub is_locked: bool,
}

/// A network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkInfo {
    /// Its name.
    pub name: String,
    /// Its VNI.
    pub vni: Vni,
    /// Its mode.
    pub mode: NetworkMode,
    /// Its prefixes.
    pub subnets: Vec<IpNet>,
    /// This node's ranges.
    pub ranges: Vec<IpNet>,
    /// Where its services have their addresses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<IpNet>,
    /// This node's own addresses in it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub router: Vec<IpAddr>,
    /// Its 802.1Q identifier on trunk ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<u16>,
    /// The kernel's VXLAN device that it follows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub follow: Option<String>,
    /// Whether senders are checked.
    pub spoof_check: bool,
    /// `snooping`, `transparent`, `mss clamp`, ...: what differs from the usual.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
    /// How much each port may send to many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storm: Option<StormLimits>,
    /// Ports here.
    pub ports: usize,
    /// Routes to peers, asked for and imported.
    pub routes: usize,
    /// Stations of a bridged network, of all kinds.
    pub stations: usize,
    /// MTU of routes that leave the node.
    pub wire_mtu: u32,
    /// Its place in the order of making; ports that name no network go to the lowest.
    pub order: u16,
}

/// A peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerInfo {
    /// Its name.
    pub name: String,
    /// Its VTEP.
    pub vtep: IpAddr,
    /// Its VTEP of the other family.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub other_vtep: Option<IpAddr>,
    /// MAC of its router.
    pub router_mac: MacAddr,
    /// Bridged networks whose floods it gets; none for all.
    pub networks: Option<Vec<String>>,
    /// How packets of the host's network travel to it.
    pub encap: Encap,
    /// True if a routing daemon made it known.
    pub is_imported: bool,
    /// The uplinks that lead to it.
    pub uplinks: Vec<String>,
    /// Whether packets can be sent to it, or why not.
    pub state: String,
}

/// A station.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdbInfo {
    /// Its network.
    pub network: String,
    /// Its address.
    pub mac: MacAddr,
    /// Where it is.
    pub at: FdbTarget,
    /// True if it was configured, or is a port's own.
    pub is_static: bool,
    /// Seconds since it was last reported, for learned ones.
    pub age_seconds: Option<u64>,
}

/// A route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteInfo {
    /// Its network.
    pub network: String,
    /// Destination.
    pub prefix: IpNet,
    /// Where it leads.
    pub to: FdbTarget,
    /// True if a routing daemon made it known.
    #[serde(default)]
    pub is_imported: bool,
}

/// A member of a multicast group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupInfo {
    /// Its network.
    pub network: String,
    /// The group.
    pub group: IpAddr,
    /// Where it is.
    pub at: FdbTarget,
    /// Seconds since it last said so.
    pub age_seconds: u64,
}

/// A next hop of the underlay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NeighborInfo {
    /// Peers behind it.
    pub peers: Vec<String>,
    /// The next hop's address.
    pub address: Option<IpAddr>,
    /// The link.
    pub link: Option<String>,
    /// Its MAC, once resolved.
    pub mac: Option<MacAddr>,
    /// `reachable`, or what is missing.
    pub state: String,
}
