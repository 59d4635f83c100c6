//! The command line.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use ipnet::IpNet;
use serde::de::DeserializeOwned;
use vswitch_api::{
    Encap, FdbTarget, MirrorDirection, MirrorSpec, NamedPort, NetworkMode, NetworkSpec, PeerSpec, PortMapping,
    Protocol, SenderCheck, StormLimits,
};
use vswitch_net::{MacAddr, Vni};

use crate::perf::PerfArguments;
use crate::policy::{ConnectionCommand, EndpointCommand, Observe, PolicyCommand, named_port};
use crate::rxq::RxqCommand;
use crate::service::{EgressCommand, ServiceCommand};

/// Sees and steers a vswitchd.
#[derive(Debug, Parser)]
#[command(version, infer_subcommands = true)]
pub(crate) struct Arguments {
    /// The daemon's control socket.
    #[arg(long, global = true, env = "VSWITCH_SOCKET", default_value = vswitch_api::DEFAULT_SOCKET)]
    pub(crate) socket: PathBuf,
    /// How to print.
    #[arg(long, short, global = true, value_enum, default_value = "text")]
    pub(crate) output: Format,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Format {
    /// Tables for people.
    Text,
    /// The daemon's answer.
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// The daemon on one page: workers, uplink, addresses, memory.
    Status,
    /// Ports: links of pods.
    #[command(subcommand)]
    Port(PortCommand),
    /// Networks: one VNI each, routed or bridged.
    #[command(subcommand)]
    Network(NetworkCommand),
    /// Peers: other nodes' VTEPs.
    #[command(subcommand)]
    Peer(PeerCommand),
    /// Stations of bridged networks.
    #[command(subcommand)]
    Fdb(FdbCommand),
    /// Routes of routed networks.
    #[command(subcommand)]
    Route(RouteCommand),
    /// Next hops of the underlay, as the kernel resolved them.
    #[command(subcommand)]
    Neighbor(ListCommand),
    /// Flows that had a packet in the last ten seconds.
    #[command(subcommand)]
    Flow(FlowCommand),
    /// Counters by port.
    Stats {
        #[command(subcommand)]
        command: Option<StatsCommand>,
    },
    /// Where the workers' time goes: by stage, busy, idle and asleep, with the sizes of bursts.
    Perf(PerfArguments),
    /// Receive queues: which worker polls which, and dealing them out anew.
    #[command(subcommand)]
    Rxq(RxqCommand),
    /// Copies of what passes ports.
    #[command(subcommand)]
    Mirror(MirrorCommand),
    /// Members of multicast groups, in networks that snoop.
    #[command(subcommand)]
    Group(GroupCommand),
    /// Addresses that nobody has, and who answers for them.
    #[command(subcommand)]
    Service(ServiceCommand),
    /// Addresses that pods leave the cluster with.
    #[command(subcommand)]
    Egress(EgressCommand),
    /// Policies, tiers, namespaces, pods and nodes.
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Pods and nodes as policies see them: labels, addresses, identities.
    #[command(subcommand)]
    Endpoint(EndpointCommand),
    /// Connections that the switch follows.
    #[command(subcommand)]
    Connection(ConnectionCommand),
    /// Connections that policies deny or want told, as they happen.
    Observe(Observe),
    /// Drops by reason.
    Drops {
        #[command(subcommand)]
        command: Option<ListCommand>,
    },
    /// Prints the completions for a shell.
    Completions {
        /// The shell.
        shell: Shell,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum PortCommand {
    /// All ports.
    List,
    /// One port.
    Show {
        /// Its host link.
        link: String,
    },
    /// Plugs in a namespace (its interface is made) or a link that exists.
    Add(Box<PortAdd>),
    /// Unplugs a port; the link goes too if the switch made it.
    Del(PortDel),
}

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("what").required(true).args(["netns", "link"])))]
pub(crate) struct PortAdd {
    /// The namespace to plug in, as /run/netns/blue; an interface is made in it. Or name a --link.
    #[arg(long)]
    pub(crate) netns: Option<PathBuf>,
    /// Name of the interface in the namespace.
    #[arg(long, default_value = "eth0")]
    pub(crate) ifname: String,
    /// A link of this host to plug in as it is; needs --mac of what is behind it.
    #[arg(long, requires = "mac")]
    pub(crate) link: Option<String>,
    /// The network; the first one unless named.
    #[arg(long)]
    pub(crate) network: Option<String>,
    /// MAC address of the pod's interface.
    #[arg(long)]
    pub(crate) mac: Option<MacAddr>,
    /// Addresses; if none is named, the built-in IPAM gives one a family.
    #[arg(long = "ip", value_name = "ADDRESS")]
    pub(crate) ips: Vec<IpAddr>,
    /// MTU of the pod's link.
    #[arg(long)]
    pub(crate) mtu: Option<u32>,
    /// Leave the namespace's default route alone: another interface has it.
    #[arg(long)]
    pub(crate) no_default_route: bool,
    /// What is checked of its packets, instead of what the network says.
    #[arg(long, value_parser = word::<SenderCheck>(&["none", "mac", "full"]))]
    pub(crate) check: Option<SenderCheck>,
    /// A VLAN of a trunk port; may be repeated. `--network` is the native one.
    #[arg(long = "trunk", value_name = "VLAN")]
    pub(crate) trunk: Vec<u16>,
    /// A trunk port that takes tagged frames only.
    #[arg(long, requires = "trunk")]
    pub(crate) no_native: bool,
    /// Exchange nothing with other isolated ports.
    #[arg(long)]
    pub(crate) isolated: bool,
    /// Send back what comes for the port itself.
    #[arg(long)]
    pub(crate) hairpin: bool,
    /// Believe stations seen here nowhere else.
    #[arg(long)]
    pub(crate) sticky: bool,
    /// Most stations learned here.
    #[arg(long)]
    pub(crate) mac_limit: Option<usize>,
    /// Bits a second to the pod, as 20M; a rate makes the MTU of its link 1500.
    #[arg(long, value_name = "BITS", value_parser = parse_rate, default_value = "0")]
    pub(crate) ingress_rate: u64,
    /// Bits a second from the pod, as 20M.
    #[arg(long, value_name = "BITS", value_parser = parse_rate, default_value = "0")]
    pub(crate) egress_rate: u64,
    /// A port of the host that leads to one of the pod, as 8080:80 or 53:53/udp; may be repeated.
    #[arg(long = "publish", value_name = "HOST:POD", value_parser = parse_mapping)]
    pub(crate) publish: Vec<PortMapping>,
    /// Labels, for policies and for people.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = parse_label)]
    pub(crate) labels: Vec<(String, String)>,
    /// The pod that it is; in namespace "default" unless named.
    #[arg(long, value_name = "NAMESPACE/POD")]
    pub(crate) pod: Option<String>,
    /// A port of the pod that policies may name; may be repeated.
    #[arg(long = "named-port", value_name = "NAME=PROTOCOL/PORT", value_parser = named_port)]
    pub(crate) named_ports: Vec<NamedPort>,
}

#[derive(Debug, Args)]
pub(crate) struct PortDel {
    /// The port's host link.
    pub(crate) link: String,
    /// Leave the link there.
    #[arg(long)]
    pub(crate) keep_link: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum NetworkCommand {
    /// All networks.
    List,
    /// One network.
    Show {
        /// Its name.
        name: String,
    },
    /// Adds a network.
    Add(NetworkAdd),
    /// Removes a network without ports.
    Del {
        /// Its name.
        name: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct NetworkAdd {
    name: String,
    /// VXLAN network identifier.
    #[arg(long, value_parser = parse_vni)]
    vni: Vni,
    /// Forward by MAC instead of by IP.
    #[arg(long)]
    bridged: bool,
    /// A prefix of the whole network; may be repeated.
    #[arg(long = "subnet", value_name = "PREFIX")]
    subnets: Vec<IpNet>,
    /// What this node's IPAM gives out; may be repeated.
    #[arg(long = "range", value_name = "PREFIX")]
    ranges: Vec<IpNet>,
    /// MTU of pods' routes to the subnets, where all nodes are switches like this one, which cut TCP and join it.
    #[arg(long, value_name = "BYTES")]
    subnet_mtu: Option<u32>,
    /// Where services have their addresses, in a routed network; may be repeated.
    #[arg(long = "services", value_name = "PREFIX")]
    services: Vec<IpNet>,
    /// An IPv4 router in a bridged network.
    #[arg(long)]
    gateway_v4: Option<Ipv4Addr>,
    /// An IPv6 router in a bridged network.
    #[arg(long)]
    gateway_v6: Option<Ipv6Addr>,
    /// Let ports send with any address.
    #[arg(long)]
    no_spoof_check: bool,
    /// This node's own address in a routed network; one a family; the first of the ranges unless named.
    #[arg(long = "router", value_name = "ADDRESS")]
    router: Vec<IpAddr>,
    /// Lower the segment size that TCP connections over the wire announce.
    #[arg(long)]
    mss_clamp: bool,
    /// 802.1Q identifier on trunk ports.
    #[arg(long)]
    vlan: Option<u16>,
    /// Carry frames that have tags as they are (QinQ).
    #[arg(long)]
    transparent: bool,
    /// Learn no stations: for copies of mirrors.
    #[arg(long)]
    no_learning: bool,
    /// Let ARP and neighbor discovery reach every port, even for stations that are known.
    #[arg(long)]
    no_neighbor_suppression: bool,
    /// Send multicast to those who have joined.
    #[arg(long)]
    multicast_snooping: bool,
    /// Broadcasts a second that each port may send.
    #[arg(long, value_name = "PACKETS", default_value_t = 0)]
    storm_broadcast: u64,
    /// Multicast packets a second that each port may send.
    #[arg(long, value_name = "PACKETS", default_value_t = 0)]
    storm_multicast: u64,
    /// Packets a second to unknown stations that each port may send.
    #[arg(long, value_name = "PACKETS", default_value_t = 0)]
    storm_unknown: u64,
    /// A VXLAN device of the kernel whose forwarding entries are followed, for EVPN.
    #[arg(long, value_name = "DEVICE")]
    follow: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PeerCommand {
    /// All peers.
    List,
    /// One peer.
    Show {
        /// Its name.
        name: String,
    },
    /// Adds a peer.
    Add(PeerAdd),
    /// Removes a peer, with its routes.
    Del {
        /// Its name.
        name: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct PeerAdd {
    name: String,
    /// Its VTEP address.
    #[arg(long)]
    vtep: IpAddr,
    /// Its VTEP of the other family, used while the first is out of reach.
    #[arg(long, value_name = "VTEP")]
    other_vtep: Option<IpAddr>,
    /// Inner destination MAC of routed packets to it; not needed for a vswitch.
    #[arg(long)]
    router_mac: Option<MacAddr>,
    /// A bridged network whose broadcasts it gets; may be repeated; all unless named.
    #[arg(long = "network")]
    networks: Vec<String>,
    /// How packets of the host's network travel to it.
    #[arg(long, value_parser = word::<Encap>(&["vxlan", "cross_subnet", "direct"]), default_value = "vxlan")]
    encap: Encap,
}

#[derive(Debug, Subcommand)]
pub(crate) enum FdbCommand {
    /// Stations of one network, or of all.
    List {
        /// The network.
        #[arg(long)]
        network: Option<String>,
    },
    /// One station.
    Show {
        /// Its MAC address.
        mac: MacAddr,
    },
    /// Adds a static station.
    #[command(group(ArgGroup::new("at").required(true).args(["port", "peer"])))]
    Add {
        /// Its MAC address.
        mac: MacAddr,
        /// Its network.
        #[arg(long)]
        network: String,
        /// Behind the port of this link.
        #[arg(long, value_name = "LINK")]
        port: Option<String>,
        /// Behind this peer.
        #[arg(long)]
        peer: Option<String>,
        /// An address of it, to answer ARP and neighbor discovery for; may be repeated.
        #[arg(long = "ip", value_name = "ADDRESS")]
        ips: Vec<IpAddr>,
    },
    /// Removes a station.
    Del {
        /// Its MAC address.
        mac: MacAddr,
        /// Its network.
        #[arg(long)]
        network: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum MirrorCommand {
    /// All mirrors.
    List,
    /// Adds a mirror.
    Add(MirrorAdd),
    /// Ends a mirror.
    Del {
        /// Its name.
        name: String,
    },
}

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("to").required(true).args(["to_port", "to_peer"])))]
pub(crate) struct MirrorAdd {
    name: String,
    /// The link of a port to look at; may be repeated.
    #[arg(long = "port", value_name = "LINK", required = true)]
    ports: Vec<String>,
    /// Which way: both, from (the port) or to (the port).
    #[arg(long, value_parser = word::<MirrorDirection>(&["both", "from", "to"]), default_value = "both")]
    direction: MirrorDirection,
    /// The link of the port that gets the copies.
    #[arg(long, value_name = "LINK")]
    to_port: Option<String>,
    /// The peer that gets the copies, in VXLAN.
    #[arg(long, value_name = "PEER", requires = "network")]
    to_peer: Option<String>,
    /// The bridged network that copies to a peer travel in.
    #[arg(long)]
    network: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum GroupCommand {
    /// All members.
    List,
}

impl MirrorAdd {
    pub(crate) fn spec(&self) -> MirrorSpec {
        let to = match (&self.to_peer, &self.to_port) {
            (Some(peer), _) => FdbTarget::Peer(peer.clone()),
            (None, port) => FdbTarget::Port(port.clone().unwrap_or_default()),
        };
        MirrorSpec {
            name: self.name.clone(),
            ports: self.ports.clone(),
            direction: self.direction,
            to,
            network: self.network.clone(),
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum RouteCommand {
    /// Routes of one network, or of all.
    List {
        /// The network.
        #[arg(long)]
        network: Option<String>,
    },
    /// The route of a prefix.
    Show {
        /// The prefix.
        prefix: IpNet,
    },
    /// Adds a route to a peer.
    Add {
        /// Destination.
        prefix: IpNet,
        /// A routed network.
        #[arg(long)]
        network: String,
        /// The peer.
        #[arg(long)]
        peer: String,
    },
    /// Removes a route to a peer.
    Del {
        /// Destination.
        prefix: IpNet,
        /// Its network.
        #[arg(long)]
        network: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum FlowCommand {
    /// All recent flows.
    List {
        /// Most to show.
        #[arg(long, default_value_t = 1000)]
        limit: usize,
    },
    /// Flows from or to an address.
    Show {
        /// The address.
        address: IpAddr,
        /// Most to look through.
        #[arg(long, default_value_t = 100_000)]
        limit: usize,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum StatsCommand {
    /// All ports.
    List,
    /// One port, with its sockets.
    Show {
        /// Its link.
        link: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum ListCommand {
    /// All.
    List,
    /// One.
    Show {
        /// Its name: for `neighbor` a peer's, for `drops` a reason's as `drops` lists them.
        name: String,
    },
}

impl NetworkAdd {
    pub(crate) fn spec(&self) -> NetworkSpec {
        NetworkSpec {
            name: self.name.clone(),
            vni: self.vni,
            mode: if self.bridged { NetworkMode::Bridged } else { NetworkMode::Routed },
            subnets: self.subnets.clone(),
            ranges: self.ranges.clone(),
            services: self.services.clone(),
            subnet_mtu: self.subnet_mtu,
            gateway_v4: self.gateway_v4,
            gateway_v6: self.gateway_v6,
            spoof_check: !self.no_spoof_check,
            router: (!self.router.is_empty()).then(|| self.router.clone()),
            mss_clamp: self.mss_clamp,
            vlan: self.vlan,
            transparent: self.transparent,
            learning: !self.no_learning,
            neighbor_suppression: !self.no_neighbor_suppression,
            multicast_snooping: self.multicast_snooping,
            storm: (self.storm_broadcast + self.storm_multicast + self.storm_unknown > 0).then_some(StormLimits {
                broadcast: self.storm_broadcast,
                multicast: self.storm_multicast,
                unknown_unicast: self.storm_unknown,
            }),
            follow: self.follow.clone(),
        }
    }
}

impl PeerAdd {
    pub(crate) fn spec(&self) -> PeerSpec {
        PeerSpec {
            name: self.name.clone(),
            vtep: self.vtep,
            other_vtep: self.other_vtep,
            router_mac: self.router_mac,
            networks: (!self.networks.is_empty()).then(|| self.networks.clone()),
            encap: self.encap,
        }
    }
}

fn parse_vni(text: &str) -> Result<Vni, String> {
    let number: u32 = text.parse().map_err(|_| format!("{text} is no VNI: allowed are 0 to 16777215"))?;
    Vni::try_from(number).map_err(|error| error.to_string())
}

/// One of some words of the protocol, by its own names for them.
pub(crate) fn word<T: DeserializeOwned + Clone + Send + Sync + 'static>(
    words: &'static [&'static str],
) -> impl TypedValueParser<Value = T> {
    PossibleValuesParser::new(words).try_map(|word| serde_json::from_value(word.into()))
}

/// Bits a second, with k, M or G for a thousand, a million, a thousand million.
fn parse_rate(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.as_bytes().last() {
        Some(b'k' | b'K') => (&text[..text.len() - 1], 1_000),
        Some(b'M') => (&text[..text.len() - 1], 1_000_000),
        Some(b'G') => (&text[..text.len() - 1], 1_000_000_000),
        _ => (text, 1),
    };
    let rate = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
    rate.ok_or_else(|| format!("\"{text}\" is no rate: write bits a second, as 20000000 or 20M"))
}

fn parse_mapping(text: &str) -> Result<PortMapping, String> {
    let wrong = || format!("\"{text}\" is no mapping: write HOST:POD or HOST:POD/udp, as 8080:80");
    let (ports, protocol) = match text.split_once('/') {
        Some((ports, "tcp")) => (ports, Protocol::Tcp),
        Some((ports, "udp")) => (ports, Protocol::Udp),
        Some((ports, "sctp")) => (ports, Protocol::Sctp),
        Some(_) => return Err(wrong()),
        None => (text, Protocol::Tcp),
    };
    let (host, pod) = ports.split_once(':').ok_or_else(wrong)?;
    let number = |text: &str| text.parse().map_err(|_| wrong());
    Ok(PortMapping { host_port: number(host)?, container_port: number(pod)?, protocol, host_ip: None })
}

pub(crate) fn parse_label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| format!("\"{text}\" is no label: write KEY=VALUE"))?;
    Ok((key.to_owned(), value.to_owned()))
}
