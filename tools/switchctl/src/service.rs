//! Services and egress rules: their commands, and how the answers look.

use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};

use clap::{Args, Subcommand};
use ipnet::IpNet;
use vswitch_api::{Affinity, Answer, Client, EgressInfo, EgressSpec, Protocol, Request, ServiceInfo, ServiceSpec};

use crate::arguments::word;
use crate::output::{only, or_dash, row, table};

#[derive(Debug, Subcommand)]
pub(crate) enum ServiceCommand {
    /// All services, with their connections.
    List,
    /// One service, a line a backend.
    Show {
        /// Its name.
        name: String,
    },
    /// Adds a service, or replaces the one of its name.
    Set(ServiceSet),
    /// Removes services; their TCP connections go on.
    Del {
        /// Their names.
        #[arg(required = true)]
        names: Vec<String>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct ServiceSet {
    /// Its name, as shop/web:http.
    name: String,
    /// Its address: one that no pod has, outside the network's subnets.
    #[arg(long)]
    address: IpAddr,
    /// Its protocol and port, as tcp/80.
    #[arg(long, value_parser = parse_port)]
    port: (Protocol, u16),
    /// Who answers, as 10.244.1.3:8080 or [fd00::3]:8080; may be repeated. With none, who asks is refused.
    #[arg(long = "backend", value_name = "ADDRESS:PORT", value_parser = parse_backend)]
    backends: Vec<SocketAddr>,
    /// Which connections go to one backend: none, or those of a client address.
    #[arg(long, value_parser = word::<Affinity>(&["none", "client_ip"]), default_value = "none")]
    affinity: Affinity,
    /// The routed network whose pods reach it; the first one unless named.
    #[arg(long)]
    network: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum EgressCommand {
    /// All egress rules, with their connections.
    List,
    /// Adds an egress rule, or replaces the one of its name.
    Set(EgressSet),
    /// Removes an egress rule; its connections go on.
    Del {
        /// Its name.
        name: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct EgressSet {
    /// Its name.
    name: String,
    /// An address to leave with, whose packets come to this node; may be repeated.
    #[arg(long = "address", required = true)]
    addresses: Vec<IpAddr>,
    /// Pods of this node that it is for; may be repeated; all of them unless named.
    #[arg(long = "from", value_name = "PREFIX", value_parser = parse_prefix)]
    sources: Vec<IpNet>,
    /// Where they go; may be repeated; everywhere beyond the network unless named.
    #[arg(long = "to", value_name = "PREFIX", value_parser = parse_prefix)]
    destinations: Vec<IpNet>,
    /// A routed network; the first one unless named.
    #[arg(long)]
    network: Option<String>,
}

pub(crate) fn service(client: &mut Client, command: &ServiceCommand) -> anyhow::Result<Answer> {
    let request = match command {
        ServiceCommand::List => Request::ServiceList,
        ServiceCommand::Show { name } => return only(client.call(Request::ServiceList)?, name),
        ServiceCommand::Set(set) => {
            let ServiceSet { name, address, port: (protocol, port), backends, affinity, network } = set;
            let spec = ServiceSpec {
                name: name.clone(),
                network: network.clone(),
                address: *address,
                port: *port,
                protocol: *protocol,
                backends: backends.clone(),
                affinity: *affinity,
            };
            Request::ServiceSet { services: vec![spec] }
        }
        ServiceCommand::Del { names } => Request::ServiceDel { names: names.clone() },
    };
    Ok(client.call(request)?)
}

pub(crate) fn egress(client: &mut Client, command: &EgressCommand) -> anyhow::Result<Answer> {
    let request = match command {
        EgressCommand::List => Request::EgressList,
        EgressCommand::Set(set) => Request::EgressSet(EgressSpec {
            name: set.name.clone(),
            network: set.network.clone(),
            sources: set.sources.clone(),
            destinations: set.destinations.clone(),
            addresses: set.addresses.clone(),
        }),
        EgressCommand::Del { name } => Request::EgressDel { name: name.clone() },
    };
    Ok(client.call(request)?)
}

/// Prints all services, or one with all that it has.
pub(crate) fn print_services(out: &mut impl Write, services: &[ServiceInfo], is_show: bool) -> io::Result<()> {
    let at = |spec: &ServiceSpec| SocketAddr::new(spec.address, spec.port);
    let affinity = |spec: &ServiceSpec| if spec.affinity == Affinity::ClientIp { "client_ip" } else { "-" };
    if !is_show {
        let rows = services.iter().map(|ServiceInfo { spec, targets }| {
            let total: usize = targets.iter().map(|target| target.connections).sum();
            let (network, protocol) = (or_dash(spec.network.as_ref()), spec.protocol.name());
            row([&spec.name, &network, &at(spec), &protocol, &spec.backends.len(), &affinity(spec), &total])
        });
        return table(out, ["SERVICE", "NETWORK", "AT", "PROTOCOL", "BACKENDS", "AFFINITY", "CONNECTIONS"], rows);
    }
    for ServiceInfo { spec, targets } in services {
        let network = spec.network.as_ref().map_or(String::new(), |network| format!(", network {network}"));
        let (protocol, affinity) = (spec.protocol.name(), affinity(spec));
        writeln!(out, "service {}: {} ({protocol}), affinity {affinity}{network}", spec.name, at(spec))?;
        let rows = targets.iter().map(|target| {
            let state = if target.is_leaving { "leaving: no new ones" } else { "" };
            row([&target.backend, &target.connections, &state])
        });
        table(out, ["BACKEND", "CONNECTIONS", ""], rows)?;
    }
    Ok(())
}

pub(crate) fn print_egress(out: &mut impl Write, rules: &[EgressInfo]) -> io::Result<()> {
    let list = |prefixes: &[IpNet], none: &str| match prefixes {
        [] => none.to_owned(),
        some => some.iter().map(IpNet::to_string).collect::<Vec<_>>().join(","),
    };
    let rows = rules.iter().map(|EgressInfo { spec, connections }| {
        let addresses: Vec<String> = spec.addresses.iter().map(IpAddr::to_string).collect();
        let (sources, destinations) = (list(&spec.sources, "all"), list(&spec.destinations, "beyond the network"));
        let network = or_dash(spec.network.as_ref());
        row([&spec.name, &network, &sources, &destinations, &addresses.join(","), connections])
    });
    table(out, ["EGRESS", "NETWORK", "FROM", "TO", "LEAVES AS", "CONNECTIONS"], rows)
}

/// A protocol and a port, as tcp/80.
fn parse_port(text: &str) -> Result<(Protocol, u16), String> {
    let parsed = text.split_once('/').and_then(|(protocol, port)| {
        let protocol = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter().find(|one| one.name() == protocol)?;
        Some((protocol, port.parse().ok().filter(|&port| port > 0)?))
    });
    parsed.ok_or_else(|| "write tcp, udp or sctp, and a port, as tcp/80".to_owned())
}

fn parse_backend(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "write an address and a port, as 10.244.1.3:8080 or [fd00::3]:8080".to_owned())
}

/// A prefix, or an address, which is one of full length.
fn parse_prefix(text: &str) -> Result<IpNet, String> {
    let address = || text.parse::<IpAddr>().map(IpNet::from);
    text.parse().or_else(|_| address()).map_err(|_| "write a prefix or an address, as 10.244.1.0/28".to_owned())
}
