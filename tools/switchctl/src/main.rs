//! switchctl: what an operator asks the switch and tells it.
//!
//! Every command is one request of the control protocol (`vswitch-api`); `-o json` prints the daemon's answer as it came.
#![forbid(unsafe_code)]

mod arguments;
mod output;
mod perf;
mod policy;
mod port;
mod rxq;
mod service;

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser};
use vswitch_api::{Answer, Client, ClientError, FdbSpec, FdbTarget, Request, RouteSpec, sentence};

use crate::arguments::{
    Arguments, Command, FdbCommand, FlowCommand, Format, GroupCommand, ListCommand, MirrorCommand, NetworkCommand,
    PeerCommand, PortCommand, RouteCommand, StatsCommand,
};
use crate::policy::PolicyCommand;
use crate::service::ServiceCommand;

const TIMEOUT: Duration = Duration::from_secs(60);

/// 0: done. 1: refused, by the daemon or because something does not exist. 2: failed.
fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("switchctl: {}", sentence(error.as_ref()));
            let is_refusal = matches!(error.downcast_ref::<ClientError>(), Some(ClientError::Refused(_)));
            ExitCode::from(if is_refusal || error.is::<output::Missing>() { 1 } else { 2 })
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    if let Command::Completions { shell } = &arguments.command {
        let mut script = Vec::new();
        clap_complete::generate(*shell, &mut Arguments::command(), "switchctl", &mut script);
        return Ok(io::stdout().write_all(&script)?);
    }
    let mut client = Client::connect(&arguments.socket, TIMEOUT)?;
    if let Command::Observe(observe) = &arguments.command {
        return policy::observe(&mut client, observe, arguments.output);
    }
    let answer = ask(&mut client, &arguments.command)?;
    let mut out = io::stdout().lock();
    match arguments.output {
        Format::Json => writeln!(out, "{}", serde_json::to_string_pretty(&answer)?)?,
        Format::Text => output::print(&mut out, &answer, is_show(&arguments.command))?,
    }
    Ok(())
}

/// Sends the command's request, and narrows a list to what `show` names.
fn ask(client: &mut Client, command: &Command) -> anyhow::Result<Answer> {
    let request = match command {
        Command::Status => Request::Status,
        Command::Port(PortCommand::Add(add)) => return port::add(client, add),
        Command::Port(PortCommand::Del(del)) => return port::del(client, del),
        Command::Port(PortCommand::List) => Request::PortList { link: None },
        Command::Port(PortCommand::Show { link }) => Request::PortList { link: Some(link.clone()) },
        Command::Network(NetworkCommand::List) => Request::NetworkList,
        Command::Network(NetworkCommand::Show { name }) => {
            return output::only(client.call(Request::NetworkList)?, name);
        }
        Command::Network(NetworkCommand::Add(add)) => Request::NetworkAdd(add.spec()),
        Command::Network(NetworkCommand::Del { name }) => Request::NetworkDel { name: name.clone() },
        Command::Peer(PeerCommand::List) => Request::PeerList,
        Command::Peer(PeerCommand::Show { name }) => return output::only(client.call(Request::PeerList)?, name),
        Command::Peer(PeerCommand::Add(add)) => Request::PeerAdd(add.spec()),
        Command::Peer(PeerCommand::Del { name }) => Request::PeerDel { name: name.clone() },
        Command::Fdb(FdbCommand::List { network }) => Request::FdbList { network: network.clone() },
        Command::Fdb(FdbCommand::Show { mac }) => {
            return output::only(client.call(Request::FdbList { network: None })?, &mac.to_string());
        }
        Command::Fdb(FdbCommand::Add { network, mac, port, peer, ips }) => Request::FdbAdd(FdbSpec {
            network: network.clone(),
            mac: *mac,
            at: match (port, peer) {
                (Some(link), _) => FdbTarget::Port(link.clone()),
                (None, peer) => FdbTarget::Peer(peer.clone().unwrap_or_default()),
            },
            addresses: ips.clone(),
        }),
        Command::Fdb(FdbCommand::Del { network, mac }) => Request::FdbDel { network: network.clone(), mac: *mac },
        Command::Route(RouteCommand::List { network }) => Request::RouteList { network: network.clone() },
        Command::Route(RouteCommand::Show { prefix }) => {
            return output::only(client.call(Request::RouteList { network: None })?, &prefix.to_string());
        }
        Command::Route(RouteCommand::Add { network, prefix, peer }) => {
            Request::RouteAdd(RouteSpec { network: network.clone(), prefix: *prefix, peer: peer.clone() })
        }
        Command::Route(RouteCommand::Del { network, prefix }) => {
            Request::RouteDel { network: network.clone(), prefix: *prefix }
        }
        Command::Mirror(MirrorCommand::List) => Request::MirrorList,
        Command::Mirror(MirrorCommand::Add(add)) => Request::MirrorAdd(add.spec()),
        Command::Mirror(MirrorCommand::Del { name }) => Request::MirrorDel { name: name.clone() },
        Command::Group(GroupCommand::List) => Request::GroupList,
        Command::Neighbor(ListCommand::List) => Request::NeighborList,
        Command::Neighbor(ListCommand::Show { name }) => {
            return output::only(client.call(Request::NeighborList)?, name);
        }
        Command::Flow(FlowCommand::List { limit }) => Request::FlowList { limit: *limit },
        Command::Flow(FlowCommand::Show { address, limit }) => {
            return output::only(client.call(Request::FlowList { limit: *limit })?, &address.to_string());
        }
        Command::Stats { command: None | Some(StatsCommand::List) } => Request::Stats,
        Command::Stats { command: Some(StatsCommand::Show { link }) } => {
            return output::only(client.call(Request::Stats)?, link);
        }
        Command::Drops { command: None | Some(ListCommand::List) } => Request::Drops,
        Command::Drops { command: Some(ListCommand::Show { name }) } => {
            return output::only(client.call(Request::Drops)?, name);
        }
        Command::Perf(arguments) => return perf::perf(client, arguments),
        Command::Rxq(command) => return rxq::rxq(client, command),
        Command::Service(command) => return service::service(client, command),
        Command::Egress(command) => return service::egress(client, command),
        Command::Policy(command) => return policy::policy(client, command),
        Command::Endpoint(command) => return policy::endpoint(client, command),
        Command::Connection(command) => return policy::connection(client, command),
        Command::Completions { .. } | Command::Observe(_) => return Ok(Answer::Done),
    };
    Ok(client.call(request)?)
}

/// Whether an answer is shown with all that it has.
fn is_show(command: &Command) -> bool {
    matches!(
        command,
        Command::Port(PortCommand::Show { .. } | PortCommand::Add(_))
            | Command::Network(NetworkCommand::Show { .. })
            | Command::Peer(PeerCommand::Show { .. })
            | Command::Service(ServiceCommand::Show { .. })
            | Command::Stats { command: Some(StatsCommand::Show { .. }) }
            | Command::Drops { command: Some(ListCommand::Show { .. }) }
            | Command::Policy(PolicyCommand::Diff { .. } | PolicyCommand::Explain { verbose: true, .. })
    )
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
