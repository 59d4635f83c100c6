//! The six commands (CNI specification, section 2).

use std::net::IpAddr;
use std::time::Duration;

use vswitch_api::{Answer, Client, ClientError, PortInfo, PortSpec, Request, SenderCheck, StatusInfo};
use vswitch_link::plug::{Plug, host_link, plug, pod_mac};
use vswitch_link::{Kernel, KernelRoute, Netns};

use crate::error::{CniError, Code};
use crate::ipam::IpamPlugin;
use crate::netconf::{Environment, NetConf};
use crate::result::{CniResult, Interface, Ip, Route};

/// How long the daemon may take: adding a port binds sockets, and a queue of a dead process can take seconds to come free.
const TIMEOUT: Duration = Duration::from_secs(30);

/// A worker with less free packet memory than this takes no further port: its fill ring could not be filled.
const FRAMES_OF_A_PORT: usize = 128;

/// ADD: an interface, or nothing.
pub(crate) async fn add(conf: &NetConf) -> Result<CniResult, CniError> {
    let environment = Environment::of_attachment()?;
    let netns = environment.netns()?;
    // Before anything is taken: an IPAM plugin asked twice would lose the addresses of the first time.
    let pod = Netns::open(netns)?;
    if Kernel::within(&pod)?.link(&environment.ifname).await?.is_some() {
        return Err(CniError::new(
            Code::Exists,
            format!("the container has an interface \"{}\" already: call DEL first", environment.ifname),
        ));
    }
    let mut client = Client::connect(&conf.socket, TIMEOUT)?;
    let ipam = IpamPlugin::find(conf, &environment)?;
    let result = match ipam.as_ref().map(IpamPlugin::add).transpose() {
        Ok(delegated) => add_with(conf, &environment, delegated, &mut client).await,
        Err(error) => Err(error),
    };
    if result.is_err()
        && let Some(ipam) = &ipam
    {
        // The first error is the one to tell.
        let _ = ipam.call("DEL");
    }
    result
}

async fn add_with(
    conf: &NetConf,
    environment: &Environment,
    delegated: Option<CniResult>,
    client: &mut Client,
) -> Result<CniResult, CniError> {
    let Environment { container_id, ifname, .. } = environment;
    let link = host_link(container_id, ifname);
    let mut port = PortSpec::new(&link, conf.mac(environment)?.unwrap_or_else(|| pod_mac(container_id, ifname)));
    port.network = conf.network.clone();
    port.addresses = match &delegated {
        Some(result) => result.ips.iter().map(|ip| ip.address.addr()).collect(),
        None => conf.ips(environment)?,
    };
    port.mtu = conf.mtu;
    apply_bridge_keys(conf, &mut port, client)?;
    port.port_mappings = conf.port_mappings()?;
    port.bandwidth = conf.bandwidth();
    port.attachment = Some(environment.attachment());
    port.owner = Some(conf.name.clone());
    let netns = environment.netns()?;
    port.netns = Some(netns.display().to_string());
    port.labels = environment.labels();
    let info = plug(client, &Plug { netns, ifname, port }).await?;
    let host = Kernel::here()?.link(&link).await?;
    let mut result = conf.prev_result.clone().unwrap_or_default();
    let first = result.interfaces.len();
    result.interfaces.push(Interface::new(&link, host.map(|host| host.mac), Some(info.mtu), ""));
    result.interfaces.push(Interface::new(ifname, Some(info.mac), Some(info.mtu), netns.display().to_string()));
    result.ips.extend(info.addresses.iter().map(|&address| Ip {
        version: None,
        address,
        gateway: default_gateway(&info, address.addr()),
        interface: Some(first + 1),
    }));
    result.routes.extend(info.routes.iter().map(|route| {
        let mut own = Route::new(route.destination, route.gateway);
        own.mtu = route.mtu;
        own
    }));
    if let Some(dns) = conf.dns.clone().or(delegated.map(|result| result.dns)) {
        result.dns = dns;
    }
    Ok(result)
}

/// The keys of the reference `bridge` plugin, in the switch's words. VLANs are networks here.
fn apply_bridge_keys(conf: &NetConf, port: &mut PortSpec, client: &mut Client) -> Result<(), CniError> {
    let keys = &conf.bridge;
    port.default_route = keys.is_default_gateway.unwrap_or(true);
    port.hairpin = keys.hairpin_mode;
    port.isolated = keys.port_isolation;
    port.check = keys.macspoofchk.then_some(SenderCheck::AtLeastMac);
    if keys.ip_masq {
        let Answer::Status(status) = client.call(Request::Status)? else { return Ok(()) };
        if !status.host.is_some_and(|host| host.masquerade) {
            let msg = "ipMasq: the daemon does not masquerade: set [host] network and masquerade in its configuration";
            return Err(CniError::new(Code::InvalidConfig, msg));
        }
    }
    if keys.vlan == 0 && keys.vlan_trunk.is_empty() {
        return Ok(());
    }
    let Answer::Networks { networks } = client.call(Request::NetworkList)? else { return Ok(()) };
    let of_vlan = |vid: u16| networks.iter().find(|network| network.vlan == Some(vid));
    if keys.vlan != 0 {
        let network = of_vlan(keys.vlan).ok_or_else(|| {
            let msg = format!("vlan: no network of the switch has vlan {}: set `vlan` of one", keys.vlan);
            CniError::new(Code::InvalidConfig, msg)
        })?;
        port.network = Some(network.name.clone());
        return Ok(());
    }
    let native = match &port.network {
        Some(name) => networks.iter().find(|network| network.name == *name),
        None => networks.iter().min_by_key(|network| network.order),
    };
    port.native = keys.preserve_default_vlan.unwrap_or(true);
    let native_vid = native.filter(|_| port.native).and_then(|network| network.vlan);
    for trunk in &keys.vlan_trunk {
        match (trunk.id, trunk.min, trunk.max) {
            (Some(id), ..) => port.trunk.push(id),
            // Of a range those that exist.
            (None, Some(min), Some(max)) => {
                port.trunk
                    .extend(networks.iter().filter_map(|network| network.vlan).filter(|vid| (min..=max).contains(vid)));
            }
            _ => {}
        }
    }
    port.trunk.retain(|vid| Some(*vid) != native_vid);
    port.trunk.sort_unstable();
    port.trunk.dedup();
    Ok(())
}

/// DEL: what is gone already is fine, a daemon that is down too.
pub(crate) async fn del(conf: &NetConf) -> Result<(), CniError> {
    let environment = Environment::of_attachment()?;
    let link = host_link(&environment.container_id, &environment.ifname);
    match Client::connect(&conf.socket, TIMEOUT)
        .and_then(|mut client| client.call(Request::PortDel { link: link.clone() }))
    {
        // A daemon that starts later sees that the link is gone, and drops the port.
        Ok(_) | Err(ClientError::Connect { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    Kernel::here()?.delete_link(&link).await?;
    match IpamPlugin::find(conf, &environment)? {
        Some(ipam) => ipam.call("DEL"),
        None => Ok(()),
    }
}

/// CHECK: the port, the interface and its addresses are as ADD left them.
pub(crate) async fn check(conf: &NetConf) -> Result<(), CniError> {
    let environment = Environment::of_attachment()?;
    let previous = conf.prev_result.as_ref().ok_or_else(|| {
        CniError::new(Code::InvalidConfig, "CHECK needs prevResult: the runtime must pass what ADD gave")
    })?;
    let Environment { container_id, ifname, .. } = &environment;
    let link = host_link(container_id, ifname);
    let mut client = Client::connect(&conf.socket, TIMEOUT)?;
    let port = match client.call(Request::PortList { link: Some(link.clone()) }) {
        Ok(Answer::Ports { ports }) => ports.into_iter().next(),
        Ok(_) => None,
        Err(ClientError::Refused(_)) => None,
        Err(error) => return Err(error.into()),
    };
    let port = port.ok_or_else(|| drift(format!("the switch has no port of link {link}: call DEL and ADD")))?;
    let netns = Netns::open(environment.netns()?)?;
    let pod = Kernel::within(&netns)?;
    let inside = pod.link(ifname).await?.ok_or_else(|| drift(format!("the container has no interface {ifname}")))?;
    if inside.mac != port.mac {
        return Err(drift(format!("{ifname} has the MAC {}, the switch expects {}", inside.mac, port.mac)));
    }
    if let Some(reason) = &port.waiting {
        return Err(drift(format!("the switch has not taken {link} over from its last daemon: {reason}")));
    }
    if !inside.is_up {
        return Err(drift(format!("{ifname} is down")));
    }
    let addresses = pod.addresses(inside.ifindex).await?;
    let is_ours =
        |ip: &&Ip| ip.interface.and_then(|at| previous.interfaces.get(at)).is_some_and(|own| own.name == *ifname);
    for ip in previous.ips.iter().filter(is_ours) {
        if !addresses.contains(&ip.address.addr()) {
            return Err(drift(format!("{ifname} has lost its address {}", ip.address)));
        }
        if !port.addresses.iter().any(|address| address.addr() == ip.address.addr()) {
            return Err(drift(format!("the switch does not know the address {} of {ifname}", ip.address)));
        }
    }
    let routes = pod.kernel_routes().await?;
    let has = |prefix: &ipnet::IpNet| {
        let by_link = |route: &&KernelRoute| route.next_hops.iter().any(|hop| hop.ifindex == inside.ifindex);
        routes.iter().filter(by_link).any(|route| route.prefix == *prefix)
    };
    if let Some(lost) = port.routes.iter().find(|route| !has(&route.destination)) {
        return Err(drift(format!("{ifname} has lost its route to {}", lost.destination)));
    }
    match IpamPlugin::find(conf, &environment)? {
        Some(ipam) => ipam.call("CHECK"),
        None => Ok(()),
    }
}

/// STATUS: whether an ADD would be served.
pub(crate) fn status(conf: &NetConf) -> Result<(), CniError> {
    let unavailable = |error: ClientError| CniError::new(Code::Unavailable, error.to_string());
    let mut client = Client::connect(&conf.socket, TIMEOUT).map_err(unavailable)?;
    let Answer::Status(status) = client.call(Request::Status).map_err(unavailable)? else {
        return Err(CniError::new(Code::Unavailable, "vswitchd gave no status: use tools of its version"));
    };
    let Answer::Networks { networks } = client.call(Request::NetworkList).map_err(unavailable)? else {
        return Err(CniError::new(Code::Unavailable, "vswitchd gave no networks: use tools of its version"));
    };
    let network = match &conf.network {
        Some(name) => networks.into_iter().find(|network| network.name == *name),
        None => networks.into_iter().min_by_key(|network| network.order),
    };
    let Some(network) = network else {
        let name = conf.network.as_deref().unwrap_or("of any name");
        let msg = format!("the switch has no network {name}: `switchctl network list` shows what there is");
        return Err(CniError::new(Code::Unavailable, msg));
    };
    if let Some(shortage) = shortage(conf, &status, &network.name) {
        return Err(CniError::new(Code::Limited, shortage));
    }
    match IpamPlugin::find(conf, &Environment::of_network()?)? {
        Some(ipam) => ipam.call("STATUS"),
        None => Ok(()),
    }
}

/// GC: what no container uses any more goes.
pub(crate) async fn gc(conf: &NetConf) -> Result<(), CniError> {
    let valid = conf.valid_attachments()?;
    let mut client = Client::connect(&conf.socket, TIMEOUT)?;
    let answer = client.call(Request::PortGc { owner: conf.name.clone(), valid })?;
    let Answer::Ports { ports } = answer else { return Ok(()) };
    let kernel = Kernel::here()?;
    let mut first_error = Ok(());
    for port in ports {
        if let Err(error) = kernel.delete_link(&port.link).await {
            first_error = first_error.and(Err(error.into()));
        }
    }
    let ipam = match IpamPlugin::find(conf, &Environment::of_network()?)? {
        Some(ipam) => ipam.call("GC"),
        None => Ok(()),
    };
    first_error.and(ipam)
}

/// What an ADD would lack.
fn shortage(conf: &NetConf, status: &StatusInfo, network: &str) -> Option<String> {
    if let Some(worker) = status.workers.iter().find(|worker| worker.umem_free < FRAMES_OF_A_PORT) {
        return Some(format!(
            "worker {} has {} free frames left: raise worker.umem_frames",
            worker.worker, worker.umem_free
        ));
    }
    if conf.ipam_plugin().is_some() {
        return None;
    }
    for is_v6 in [false, true] {
        let mut ranges =
            status.ipam.iter().filter(|ipam| ipam.network == network && ipam.range.addr().is_ipv6() == is_v6);
        let first = ranges.next();
        if first.is_some_and(|first| first.free == 0) && ranges.all(|range| range.free == 0) {
            return Some(format!("no free address in the ranges of network \"{network}\": add a range"));
        }
    }
    None
}

fn default_gateway(info: &PortInfo, address: IpAddr) -> Option<IpAddr> {
    let is_default = |route: &&vswitch_api::PodRoute| {
        route.destination.prefix_len() == 0 && route.destination.addr().is_ipv4() == address.is_ipv4()
    };
    info.routes.iter().find(is_default).and_then(|route| route.gateway)
}

fn drift(msg: String) -> CniError {
    CniError::new(Code::Drift, msg)
}
