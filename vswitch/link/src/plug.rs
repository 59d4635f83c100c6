//! A pod's interface: made, plugged into the switch and configured, or nothing at all.
//!
//! Used by the CNI plugin and by `switchctl port add --netns`. Whatever fails, what was done is undone.

use std::path::Path;

use vswitch_api::{Answer, ApiError, Client, ClientError, ErrorCode, PodRoute, PortInfo, PortSpec, Request};
use vswitch_net::{LIMITED_LINK_MTU, MacAddr, POD_LINK_MTU, POD_LINK_MTU_MIN};

use crate::{Kernel, KernelRoute, LinkError, Netns, Route, VethSpec, ethtool};

const EEXIST: i32 = 17;

/// `RTPROT_STATIC`, of the routes that are made here.
const PROTOCOL_STATIC: u8 = 4;

/// What the kernel gives an IPv6 route that asks for no priority (`IP6_RT_PRIO_USER`).
const USUAL_PRIORITY_V6: u32 = 1024;

/// Why a pod was not plugged in.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// The kernel refused.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The daemon refused, or is not there.
    #[error(transparent)]
    Daemon(#[from] ClientError),
    /// The pod has such an interface already.
    #[error("the namespace has an interface \"{0}\" already: delete it, or choose another name")]
    Exists(String),
    /// Another interface of the pod has the route.
    #[error("the namespace has a route to {0} already: only one of its interfaces can be of a routed network")]
    RouteExists(ipnet::IpNet),
    /// The kernel would refuse it without saying why.
    #[error("ifname: \"{0}\" is no interface name: 1 to 15 characters, no '/', ':' or space")]
    Ifname(String),
    /// The kernel would refuse it without saying why.
    #[error("mac: {0} is no station's address: choose a unicast one, as 02:00:00:00:00:01")]
    Mac(MacAddr),
    /// The kernel would refuse it without saying why.
    #[error("mtu: {0} is not allowed; allowed are {POD_LINK_MTU_MIN} to {POD_LINK_MTU}")]
    Mtu(u32),
    /// The path is the host's own namespace.
    #[error("{0} is the host's own network namespace: name the pod's")]
    OwnNamespace(String),
}

/// A pod's interface that does not exist yet.
#[derive(Clone, Debug)]
pub struct Plug<'a> {
    /// Path of the pod's namespace.
    pub netns: &'a Path,
    /// Name of the interface in the pod.
    pub ifname: &'a str,
    /// What the port shall be. Its link is the veth's end here, to be made.
    pub port: PortSpec,
}

/// The host link's name of a pod's interface: always the same for the same interface of the same container.
pub fn host_link(container_id: &str, ifname: &str) -> String {
    format!("vsw{:012x}", digest(container_id, ifname) & 0xffff_ffff_ffff)
}

/// The MAC address of a pod's interface, unless another is asked for; unicast and locally administered.
pub fn pod_mac(container_id: &str, ifname: &str) -> MacAddr {
    MacAddr::local_from(digest(ifname, container_id))
}

/// Makes the veth, plugs it in, configures the pod's end.
///
/// # Errors
///
/// Each tells what to do; nothing is left behind.
pub async fn plug(client: &mut Client, plug: &Plug<'_>) -> Result<PortInfo, PlugError> {
    let usual = if plug.port.bandwidth.is_unlimited() { POD_LINK_MTU } else { LIMITED_LINK_MTU };
    let mtu = plug.port.mtu.unwrap_or(usual);
    if !(POD_LINK_MTU_MIN..=POD_LINK_MTU).contains(&mtu) {
        return Err(PlugError::Mtu(mtu));
    }
    let is_bad = |c: char| c == '/' || c == ':' || c.is_whitespace();
    if plug.ifname.is_empty() || plug.ifname.len() > 15 || plug.ifname.contains(is_bad) {
        return Err(PlugError::Ifname(plug.ifname.to_owned()));
    }
    if plug.port.mac.is_multicast() || plug.port.mac.is_zero() {
        return Err(PlugError::Mac(plug.port.mac));
    }
    let netns = Netns::open(plug.netns)?;
    if netns.is_current() {
        return Err(PlugError::OwnNamespace(plug.netns.display().to_string()));
    }
    let (host, pod) = (Kernel::here()?, Kernel::within(&netns)?);
    if pod.link(plug.ifname).await?.is_some() {
        return Err(PlugError::Exists(plug.ifname.to_owned()));
    }
    let (queues, is_offloading) = match client.call(Request::Status)? {
        Answer::Status(status) => (status.workers.len() as u32, status.offload.is_some()),
        other => return Err(unexpected(&other)),
    };
    let port = PortSpec { mtu: Some(mtu), ..plug.port.clone() };
    let veth = VethSpec { host: &port.link, pod: plug.ifname, netns: &netns, mac: port.mac, mtu, queues };
    host.create_veth(&veth).await?;
    let result = async {
        let info = match client.call(Request::PortAdd(port.clone()))? {
            Answer::Port(info) => *info,
            other => return Err(unexpected(&other)),
        };
        configure(&pod, &netns, plug.ifname, mtu, &info).await?;
        if is_offloading {
            ethtool::take_redirected(Some(&netns), plug.ifname).await?;
        }
        Ok(info)
    }
    .await;
    if result.is_err() {
        // Undo in reverse. The first error is the one to tell.
        let _ = client.call(Request::PortDel { link: port.link.clone() });
        let _ = host.delete_link(&port.link).await;
    }
    result
}

/// Addresses and routes, as the switch says.
async fn configure(pod: &Kernel, netns: &Netns, ifname: &str, mtu: u32, info: &PortInfo) -> Result<(), PlugError> {
    let link = pod.link(ifname).await?.ok_or_else(|| {
        PlugError::Link(LinkError::Refused {
            what: format!("configure {ifname}"),
            source: std::io::ErrorKind::NotFound.into(),
        })
    })?;
    if info.addresses.iter().any(|address| address.addr().is_ipv6()) {
        enable_ipv6(netns, ifname)?;
    }
    // A link of another size is one with a rate, which large packets would make uneven, or one that was asked for.
    ethtool::turn_off(Some(netns), ifname, mtu == POD_LINK_MTU).await?;
    pod.set_up(link.ifindex).await?;
    for &address in &info.addresses {
        pod.add_address(link.ifindex, address).await?;
    }
    for route in &info.routes {
        match pod.add_route(link.ifindex, route).await {
            Err(error) if error.errno() == Some(EEXIST) => return Err(PlugError::RouteExists(route.destination)),
            other => other?,
        }
    }
    Ok(())
}

/// Brings the MTU of a pod's routes up to date, as it changes with the uplink's. Routes that the pod changed or removed are
/// its own affair.
///
/// # Errors
///
/// The kernel's. A pod whose namespace or interface is gone is no error.
pub async fn update_routes(netns: &Path, mac: MacAddr, routes: &[PodRoute]) -> Result<(), PlugError> {
    let Ok(netns) = Netns::open(netns) else { return Ok(()) };
    if netns.is_current() {
        return Ok(());
    }
    let pod = Kernel::within(&netns)?;
    let Some(link) = pod.links().await?.into_iter().find(|link| link.mac == mac) else { return Ok(()) };
    let known = pod.kernel_routes().await?;
    for route in routes {
        let is_ours = |known: &&KernelRoute| {
            let hop = Route { ifindex: link.ifindex, gateway: route.gateway, mtu: None };
            let priority = if route.destination.addr().is_ipv4() { 0 } else { USUAL_PRIORITY_V6 };
            (known.prefix, known.protocol, known.priority) == (route.destination, PROTOCOL_STATIC, priority)
                && matches!(known.next_hops[..], [next] if Route { mtu: None, ..next } == hop)
        };
        let ours = known.iter().find(is_ours);
        if ours.is_some_and(|ours| ours.next_hops[0].mtu != route.mtu) {
            pod.replace_route(link.ifindex, route).await?;
        }
    }
    Ok(())
}

/// Container runtimes may switch IPv6 off in a new namespace.
fn enable_ipv6(netns: &Netns, ifname: &str) -> Result<(), LinkError> {
    let path = format!("/proc/sys/net/ipv6/conf/{ifname}/disable_ipv6");
    let written = netns.run(|| match std::fs::read_to_string(&path) {
        Ok(value) if value.trim() == "0" => Ok(()),
        Ok(_) => std::fs::write(&path, "0"),
        Err(error) => Err(error),
    })?;
    written.map_err(|source| LinkError::Refused { what: format!("enable IPv6 ({path})"), source })
}

fn unexpected(answer: &Answer) -> PlugError {
    let message = format!("vswitchd gave another answer than was asked for ({answer:?}): use tools of its version");
    ClientError::Refused(ApiError::new(ErrorCode::BadRequest, message)).into()
}

/// FNV-1a, 64 bits: names must stay the same from one version to the next.
fn digest(first: &str, second: &str) -> u64 {
    let bytes = first.bytes().chain([0]).chain(second.bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_the_kernel_and_differ() {
        let link = host_link("0123456789abcdef", "eth0");
        assert_eq!(link.len(), 15);
        assert_eq!(link, host_link("0123456789abcdef", "eth0"));
        assert_ne!(link, host_link("0123456789abcdef", "eth1"));
        assert_ne!(link, host_link("0123456789abcdee", "eth0"));
        assert!(!pod_mac("x", "eth0").is_multicast());
    }
}
