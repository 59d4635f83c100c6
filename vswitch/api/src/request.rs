//! Requests. Everything that changes the switch is one of these, whoever asks: config file, CNI or operator.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use vswitch_net::MacAddr;

use crate::defaults::is_no;
use crate::network::{FdbSpec, MirrorSpec, NetworkSpec, PeerSpec, RouteSpec};
use crate::policy::{
    ConnectionFilter, EndpointName, EndpointSpec, ExplainSpec, ObjectName, ObserveFilter, PolicyDocument,
};
use crate::port::{Attachment, PortSpec};
use crate::rxq::{QueueLoad, QueueMove};
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
    /// Where the workers' time goes.
    Perf,
    /// Drops by reason and port.
    Drops,
    /// Receive queues, and which worker polls which.
    RxqList,
    /// Has queues of uplinks polled by other workers. All are checked before the first is moved; then they are moved one after the
    /// other, and an error names the one that could not be.
    RxqMove {
        /// The queues.
        moves: Vec<QueueMove>,
    },
    /// Deals queues out anew, by what they cost.
    RxqRebalance {
        /// What each costs its worker; a queue that is not named costs nothing.
        loads: Vec<QueueLoad>,
        /// Only say what would be moved.
        #[serde(default, skip_serializing_if = "is_no")]
        dry_run: bool,
    },
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
                | Request::Perf
                | Request::Drops
                | Request::RxqList
                | Request::RxqRebalance { dry_run: true, .. }
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
            Request::EgressSet(spec) => write!(f, "egress set {}", spec.name.escape_default()),
            Request::EgressDel { name } => write!(f, "egress del {}", name.escape_default()),
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
            Request::RxqMove { moves } => {
                let moves = moves.iter().map(|it| format!("{} {} to worker {}", it.link, it.queue, it.worker));
                write!(f, "rxq move {}", moves.collect::<Vec<_>>().join(", "))
            }
            Request::RxqRebalance { loads, .. } => write!(f, "rxq rebalance of {} queues", loads.len()),
            Request::EndpointSet { endpoints } => write!(f, "endpoint set, {}", endpoints.len()),
            Request::EndpointDel { endpoints } => write!(f, "endpoint del, {}", endpoints.len()),
            question => write!(f, "{question:?}"),
        }
    }
}

/// The first of many names.
fn few(names: &[&str]) -> String {
    let more = if names.len() > 10 { format!(" and {} more", names.len() - 10) } else { String::new() };
    let shown: Vec<String> = names.iter().take(10).map(|name| name.escape_default().to_string()).collect();
    format!("{}{more}", shown.join(", "))
}

fn default_flow_limit() -> usize {
    1000
}
