//! Answers as text: a table for a list, lines for one thing.

use std::fmt::Display;
use std::io::{self, Write};

use comfy_table::{ContentArrangement, Table, presets};

use vswitch_api::{
    Answer, DropInfo, Encap, FlowInfo, HostInfo, NetworkInfo, OffloadInfo, PortInfo, PortStats, StatsInfo, StatusInfo,
    UplinkInfo,
};

use crate::{perf, policy, rxq, service};

/// Free addresses that nobody counts any more.
const PLENTY: u64 = 1 << 32;

/// What `show` names does not exist.
#[derive(Debug)]
pub(crate) struct Missing(pub(crate) String);

impl Display for Missing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Missing {}

/// Keeps what `name` names.
///
/// # Errors
///
/// [`Missing`] if there is nothing of that name.
pub(crate) fn only(mut answer: Answer, name: &str) -> anyhow::Result<Answer> {
    let (is_empty, what) = match &mut answer {
        Answer::Networks { networks } => keep(networks, "network", |network| network.name == name),
        Answer::Peers { peers } => keep(peers, "peer", |peer| peer.name == name),
        Answer::Fdb { stations } => keep(stations, "station", |station| station.mac.to_string() == name),
        Answer::Routes { routes } => keep(routes, "route", |route| route.prefix.to_string() == name),
        Answer::Neighbors { neighbors } => {
            keep(neighbors, "next hop of peer", |hop| hop.peers.iter().any(|peer| peer == name))
        }
        Answer::Flows { flows } => {
            let ends = |flow: &FlowInfo| {
                let come = [flow.source.clone(), flow.destination.clone()];
                come.into_iter().chain(flow.leaves_as.clone().into_iter().flatten()).collect::<Vec<_>>()
            };
            keep(flows, "flow of", |flow| ends(flow).iter().any(|end| is_end(end, name)))
        }
        Answer::Services { services } => keep(services, "service", |service| service.spec.name == name),
        Answer::Stats(stats) => keep(&mut stats.ports, "port of link", |port| port.link == name),
        Answer::Drops { drops } => keep(drops, "drop for the reason", |drop| drop.reason == name),
        _ => (false, ""),
    };
    if is_empty {
        Err(Missing(format!("no {what} {name}: the same command with `list` shows them")).into())
    } else {
        Ok(answer)
    }
}

fn keep<T>(items: &mut Vec<T>, what: &'static str, matches: impl FnMut(&T) -> bool) -> (bool, &'static str) {
    items.retain(matches);
    (items.is_empty(), what)
}

/// True if an end of a flow, with or without a port, is the address.
fn is_end(end: &str, address: &str) -> bool {
    end == address
        || end.strip_prefix(address).is_some_and(|rest| rest.starts_with(':'))
        || end.starts_with(&format!("[{address}]"))
}

/// Prints an answer.
pub(crate) fn print(out: &mut impl Write, answer: &Answer, is_show: bool) -> io::Result<()> {
    if policy::print(out, answer, is_show)? {
        return Ok(());
    }
    match answer {
        // Printed above.
        Answer::Changes { .. }
        | Answer::Policies { .. }
        | Answer::Policy(_)
        | Answer::Explained(_)
        | Answer::Endpoints { .. }
        | Answer::Connections(_)
        | Answer::Forgotten { .. }
        | Answer::Events { .. }
        | Answer::Done => Ok(()),
        Answer::Status(status) => print_status(out, status),
        Answer::Port(port) => print_port(out, port),
        Answer::Ports { ports } if is_show => ports.iter().try_for_each(|port| print_port(out, port)),
        Answer::Ports { ports } => {
            let row = |port: &PortInfo| {
                row([
                    &port.id,
                    &port.link,
                    &port.network,
                    &join(&port.addresses),
                    &port.mac,
                    &if port.waiting.is_some() { "waiting" } else { &port.xdp_mode },
                    &match port.rest.as_deref() {
                        None => port.copy_modes.join(","),
                        Some("at rest") => "at rest".to_owned(),
                        Some(_) => "stuck".to_owned(),
                    },
                    &name_of(port),
                ])
            };
            table(out, ["ID", "LINK", "NETWORK", "ADDRESSES", "MAC", "XDP", "SOCKETS", "POD"], ports.iter().map(row))
        }
        Answer::Networks { networks } => table(
            out,
            [
                "NETWORK",
                "VNI",
                "VLAN",
                "MODE",
                "SUBNETS",
                "RANGES",
                "ROUTER",
                "SPOOF CHECK",
                "PORTS",
                "WIRE MTU",
                "OPTIONS",
            ],
            networks.iter().map(|network| {
                let mode = format!("{:?}", network.mode).to_lowercase();
                row([
                    &network.name,
                    &network.vni,
                    &or_dash(network.vlan),
                    &mode,
                    &join(&network.subnets),
                    &join(&network.ranges),
                    &join(&network.router),
                    &on(network.spoof_check),
                    &network.ports,
                    &network.wire_mtu,
                    &network_options(network),
                ])
            }),
        ),
        Answer::Peers { peers } => table(
            out,
            ["PEER", "VTEP", "ENCAP", "ROUTER MAC", "NETWORKS", "UPLINKS", "STATE"],
            peers.iter().map(|peer| {
                let networks = match &peer.networks {
                    None => "all".to_owned(),
                    Some(names) if names.is_empty() => "-".to_owned(),
                    Some(names) => names.join(","),
                };
                let encap = match peer.encap {
                    Encap::Vxlan => "vxlan",
                    Encap::CrossSubnet => "cross_subnet",
                    Encap::Direct => "direct",
                };
                let uplinks = if peer.uplinks.is_empty() { "-".to_owned() } else { peer.uplinks.join(",") };
                let vteps = join(&[Some(peer.vtep), peer.other_vtep].into_iter().flatten().collect::<Vec<_>>());
                row([&peer.name, &vteps, &encap, &peer.router_mac, &networks, &uplinks, &peer.state])
            }),
        ),
        Answer::Fdb { stations } => table(
            out,
            ["NETWORK", "MAC", "AT", "KIND", "AGE"],
            stations.iter().map(|station| {
                let kind = if station.is_static { "static" } else { "learned" };
                let age = station.age_seconds.map_or_else(|| "-".to_owned(), |seconds| format!("{seconds}s"));
                row([&station.network, &station.mac, &station.at, &kind, &age])
            }),
        ),
        Answer::Routes { routes } => table(
            out,
            ["NETWORK", "PREFIX", "TO", "FROM"],
            routes.iter().map(|route| {
                let from = if route.is_imported { "kernel" } else { "-" };
                row([&route.network, &route.prefix, &route.to, &from])
            }),
        ),
        Answer::Mirrors { mirrors } => table(
            out,
            ["MIRROR", "PORTS", "DIRECTION", "TO", "NETWORK"],
            mirrors.iter().map(|mirror| {
                let direction = format!("{:?}", mirror.direction).to_lowercase();
                row([&mirror.name, &mirror.ports.join(","), &direction, &mirror.to, &or_dash(mirror.network.as_ref())])
            }),
        ),
        Answer::Services { services } => service::print_services(out, services, is_show),
        Answer::Egress { rules } => service::print_egress(out, rules),
        Answer::Groups { groups } => table(
            out,
            ["NETWORK", "GROUP", "AT", "AGE"],
            groups.iter().map(|group| {
                let age = format!("{}s", group.age_seconds);
                row([&group.network, &group.group, &group.at, &age])
            }),
        ),
        Answer::Neighbors { neighbors } => table(
            out,
            ["PEERS", "NEXT HOP", "LINK", "MAC", "STATE"],
            neighbors.iter().map(|hop| {
                row([
                    &hop.peers.join(","),
                    &or_dash(hop.address),
                    &or_dash(hop.link.as_ref()),
                    &or_dash(hop.mac),
                    &hop.state,
                ])
            }),
        ),
        Answer::Flows { flows } => table(
            out,
            ["WORKER", "NETWORK", "FROM", "PROTOCOL", "SOURCE", "DESTINATION", "ACTION", "PACKETS", "BYTES", "IDLE"],
            flows.iter().map(|flow| {
                let idle = format!("{}ms", flow.idle_ms);
                let [source, destination] = ends([&flow.source, &flow.destination], flow.leaves_as.as_ref());
                row([
                    &flow.worker,
                    &flow.network,
                    &flow.from,
                    &flow.protocol,
                    &source,
                    &destination,
                    &if flow.offloaded { format!("{}, offloaded", flow.action) } else { flow.action.clone() },
                    &flow.packets,
                    &flow.bytes,
                    &idle,
                ])
            }),
        ),
        Answer::Stats(stats) => print_stats(out, stats, is_show),
        Answer::Perf { workers } => perf::print(out, workers),
        Answer::Rxq(info) => rxq::print(out, info),
        Answer::Plan(plan) => rxq::print_plan(out, plan),
        Answer::Drops { drops } if drops.is_empty() => writeln!(out, "nothing was dropped"),
        Answer::Drops { drops } => print_drops(out, drops, is_show),
    }
}

/// Source and destination, and what they leave as if that is something else.
pub(crate) fn ends(come: [&String; 2], leave: Option<&[String; 2]>) -> [String; 2] {
    let leave = leave.map_or(come, |[source, destination]| [source, destination]);
    [0, 1].map(|at| if come[at] == leave[at] { come[at].clone() } else { format!("{} as {}", come[at], leave[at]) })
}

fn print_status(out: &mut impl Write, status: &StatusInfo) -> io::Result<()> {
    writeln!(
        out,
        "vswitchd {}, pid {}, up {}, {} MiB resident, generation {}",
        status.version,
        status.pid,
        duration(status.uptime_seconds),
        status.memory_bytes >> 20,
        status.generation
    )?;
    if status.uplinks.is_empty() {
        writeln!(out, "uplink: none; this node is on its own")?;
    }
    status.uplinks.iter().try_for_each(|uplink| print_uplink(out, uplink))?;
    if let Some(HostInfo { link, network, addresses, masquerade, state }) = &status.host {
        let masquerade = if *masquerade { "masquerades" } else { "does not masquerade" };
        writeln!(out, "host {link}: network {network}, addresses {}, {masquerade}; {state}", join(addresses))?;
    }
    writeln!(
        out,
        "{} ports, {} of them at rest, {} networks, {} of {} peers reachable",
        status.ports, status.ports_resting, status.networks, status.peers_reachable, status.peers
    )?;
    if status.ports_stuck > 0 {
        writeln!(out, "{} ports cannot be woken: see `switchctl port show LINK`", status.ports_stuck)?;
    }
    if status.ports_waiting > 0 {
        writeln!(
            out,
            "{} ports of the last daemon wait to be adopted: see `switchctl port list`",
            status.ports_waiting
        )?;
    }
    status.offload.iter().try_for_each(|offload| print_offload(out, offload))?;
    for ipam in &status.ipam {
        let free = if ipam.free > PLENTY { "plenty".to_owned() } else { ipam.free.to_string() };
        writeln!(out, "addresses of {} in {}: {} used, {free} free", ipam.network, ipam.range, ipam.used)?;
    }
    table(
        out,
        ["WORKER", "CORE", "FRAMES FREE", "FLOW HITS", "MISSES", "ICMP SENT", "HELD", "EVENTS LOST", "TURNS", "SLEEPS"],
        status.workers.iter().map(|worker| {
            let frames = format!("{} of {}", worker.umem_free, worker.umem_frames);
            row([
                &worker.worker,
                &or_dash(worker.core),
                &frames,
                &worker.flow_hits,
                &worker.flow_misses,
                &worker.errors_sent,
                &worker.errors_held,
                &worker.events_lost,
                &worker.turns,
                &worker.sleeps,
            ])
        }),
    )
}

fn print_offload(out: &mut impl Write, offload: &OffloadInfo) -> io::Result<()> {
    let OffloadInfo { state, flows, capacity, refused, packets, lost, without } = offload;
    write!(out, "offload: {state}, {flows} of {capacity} flows, {packets} packets forwarded in the kernel")?;
    if *refused > 0 {
        write!(out, "; {refused} times there was no room for a flow: raise worker.offload_flows")?;
    }
    if *lost > 0 {
        write!(out, "; {lost} packets lost by links whose other ends take them too slowly")?;
    }
    writeln!(out)?;
    without.iter().try_for_each(|link| writeln!(out, "  without {}: {}", link.link, link.reason))
}

/// One line, with the reason if something is amiss.
fn print_uplink(out: &mut impl Write, uplink: &UplinkInfo) -> io::Result<()> {
    if uplink.copy_modes.is_empty() {
        return writeln!(out, "uplink {}: {}", uplink.link, uplink.state);
    }
    let vteps = [uplink.vtep_v4.map(|v4| v4.to_string()), uplink.vtep_v6.map(|v6| v6.to_string())];
    let vteps: Vec<String> = vteps.into_iter().flatten().collect();
    writeln!(
        out,
        "uplink {}: {}, mtu {}, vtep {} port {}, xdp {}, {}{}",
        uplink.link,
        uplink.state,
        uplink.mtu,
        if vteps.is_empty() { "none".to_owned() } else { vteps.join(" ") },
        uplink.udp_port,
        mode(&uplink.xdp_mode, uplink.xdp_fallback.as_deref()),
        uplink.copy_modes.join(","),
        uplink.note.as_ref().map_or_else(String::new, |note| format!("; {note}"))
    )
}

fn print_port(out: &mut impl Write, port: &PortInfo) -> io::Result<()> {
    writeln!(out, "port {} on link {}, network {}", port.id, port.link, port.network)?;
    writeln!(out, "  mac {}, mtu {}, addresses {}", port.mac, port.mtu, join(&port.addresses))?;
    if let Some(reason) = &port.waiting {
        writeln!(out, "  waits to be adopted since the last daemon: {reason}")?;
        return Ok(());
    }
    writeln!(out, "  xdp {}, {}", mode(&port.xdp_mode, port.xdp_fallback.as_deref()), port.copy_modes.join(","))?;
    match port.rest.as_deref() {
        None => {}
        Some("at rest") => {
            writeln!(out, "  at rest: without sockets until a packet comes (worker.rest_after_seconds)")?;
        }
        Some(reason) => writeln!(out, "  {reason}")?,
    }
    for route in &port.routes {
        write!(out, "  route {}", route.destination)?;
        route.gateway.map_or(Ok(()), |gateway| write!(out, " via {gateway}"))?;
        route.mtu.map_or(Ok(()), |mtu| write!(out, " mtu {mtu}"))?;
        writeln!(out)?;
    }
    let limit = port.mac_limit.map(|most| format!("at most {most} stations"));
    let options: Vec<&str> = port.options.iter().chain(&limit).map(String::as_str).collect();
    let check = port.check.map(|check| format!("sender check {}", check.name()));
    let options: Vec<&str> = check.as_deref().into_iter().chain(options).collect();
    if !options.is_empty() {
        writeln!(out, "  {}", options.join(", "))?;
    }
    if port.stations_refused > 0 {
        writeln!(out, "  {} stations beyond its limit were not learned", port.stations_refused)?;
    }
    if port.groups_refused > 0 {
        writeln!(out, "  {} memberships of groups beyond its limit were not taken", port.groups_refused)?;
    }
    if !port.trunk.is_empty() {
        writeln!(out, "  trunk, vlans {}", join(&port.trunk))?;
    }
    if !port.bandwidth.is_unlimited() {
        let rate = |bits: u64| if bits == 0 { "unlimited".to_owned() } else { format!("{bits} bit/s") };
        let (to, from) = (rate(port.bandwidth.ingress_rate), rate(port.bandwidth.egress_rate));
        writeln!(out, "  to the pod {to}, from it {from}")?;
    }
    for mapping in &port.port_mappings {
        writeln!(
            out,
            "  port {}{} of the host leads to {}/{}",
            mapping.host_ip.map_or_else(String::new, |ip| format!("{ip} ")),
            mapping.host_port,
            mapping.container_port,
            mapping.protocol.name()
        )?;
    }
    if let Some(attachment) = &port.attachment {
        writeln!(out, "  container {} interface {}", attachment.container_id, attachment.ifname)?;
    }
    if let Some(netns) = &port.netns {
        writeln!(out, "  namespace {netns}")?;
    }
    port.labels.iter().try_for_each(|(key, value)| writeln!(out, "  label {key}={value}"))
}

fn print_stats(out: &mut impl Write, stats: &StatsInfo, is_show: bool) -> io::Result<()> {
    let port = |port: &PortStats| {
        row([
            &port.id,
            &port.link,
            &port.rx_packets,
            &port.rx_bytes,
            &port.tx_packets,
            &port.tx_bytes,
            &port.drops,
            &port.copies,
            &port.merged,
            &port.tx_refused,
        ])
    };
    table(
        out,
        ["ID", "LINK", "RX PACKETS", "RX BYTES", "TX PACKETS", "TX BYTES", "DROPS", "COPIES", "MERGED", "TX REFUSED"],
        stats.ports.iter().map(port),
    )?;
    if is_show {
        let sockets = stats.ports.iter().flat_map(|port| &port.sockets);
        return table(
            out,
            [
                "WORKER",
                "KERNEL DROPPED",
                "RX RING FULL",
                "FILL EMPTY",
                "INVALID",
                "FILL DEPTH",
                "KICKS",
                "KICK ERRORS",
                "OVERSIZED",
            ],
            sockets.map(|socket| {
                row([
                    &socket.worker,
                    &socket.rx_dropped,
                    &socket.rx_ring_full,
                    &socket.rx_fill_ring_empty,
                    &socket.invalid_descs,
                    &socket.fill_depth,
                    &socket.kicks,
                    &socket.kick_errors,
                    &socket.oversized,
                ])
            }),
        );
    }
    writeln!(
        out,
        "all: rx {} {} tx {} + drops {} + merged {} - copies {}",
        stats.rx_packets,
        if stats.is_balanced { "=" } else { "!=" },
        stats.tx_packets,
        stats.drops,
        stats.merged,
        stats.copies
    )
}

fn print_drops(out: &mut impl Write, drops: &[DropInfo], is_show: bool) -> io::Result<()> {
    table(
        out,
        ["REASON", "PACKETS", "MEANING"],
        drops.iter().map(|drop| row([&drop.reason, &drop.packets, &drop.meaning])),
    )?;
    if is_show {
        let ports = drops.iter().flat_map(|drop| &drop.ports);
        table(out, ["FROM LINK", "PACKETS"], ports.map(|(link, packets)| row([link, packets])))?;
    }
    Ok(())
}

pub(crate) fn table<const N: usize>(
    out: &mut impl Write,
    head: [&str; N],
    rows: impl Iterator<Item = Vec<String>>,
) -> io::Result<()> {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(head).add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.lines().try_for_each(|line| writeln!(out, "{}", line.trim_end()))
}

pub(crate) fn row<const N: usize>(cells: [&dyn Display; N]) -> Vec<String> {
    cells.map(ToString::to_string).into()
}

fn network_options(network: &NetworkInfo) -> String {
    let storm =
        network.storm.map(|storm| format!("storm {}/{}/{}", storm.broadcast, storm.multicast, storm.unknown_unicast));
    let all: Vec<&str> = network.options.iter().chain(&storm).map(String::as_str).collect();
    if all.is_empty() { "-".to_owned() } else { all.join(",") }
}

fn name_of(port: &PortInfo) -> String {
    let label = |key: &str| port.labels.get(key).cloned();
    match (label("K8S_POD_NAMESPACE"), label("K8S_POD_NAME")) {
        (Some(namespace), Some(name)) => format!("{namespace}/{name}"),
        (None, Some(name)) => name,
        _ => port.netns.clone().unwrap_or_else(|| "-".to_owned()),
    }
}

fn mode(mode: &str, fallback: Option<&str>) -> String {
    fallback.map_or_else(|| mode.to_owned(), |reason| format!("{mode} ({reason})"))
}

fn join<T: Display>(list: &[T]) -> String {
    if list.is_empty() { "-".to_owned() } else { list.iter().map(T::to_string).collect::<Vec<_>>().join(",") }
}

pub(crate) fn or_dash(value: Option<impl Display>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

fn on(value: bool) -> &'static str {
    if value { "on" } else { "off" }
}

fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{}h", seconds / 86_400, seconds / 3600 % 24),
    }
}
