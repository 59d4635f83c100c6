//! A pod's veth: made, configured, deleted.

use std::net::IpAddr;
use std::os::fd::AsRawFd;

use ipnet::IpNet;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkAttribute};
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteMetric, RouteScope};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};
use vswitch_api::PodRoute;
use vswitch_net::MacAddr;

use crate::{ENODEV, Kernel, LinkError, Netns, errno, refused};

/// A veth to make: one end here, one in a pod.
#[derive(Clone, Debug)]
pub struct VethSpec<'a> {
    /// Name of the end here.
    pub host: &'a str,
    /// Name of the pod's end.
    pub pod: &'a str,
    /// The pod's namespace.
    pub netns: &'a Netns,
    /// MAC address of the pod's end.
    pub mac: MacAddr,
    /// MTU of both ends.
    pub mtu: u32,
    /// Queues of both ends: one a worker of the switch.
    pub queues: u32,
}

impl Kernel {
    /// Makes a veth, its pod end in the pod's namespace, its end here up.
    ///
    /// The end here is sealed: while no switch runs, what the pod sends must not reach the host's stack.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`]; nothing is left behind.
    pub async fn create_veth(&self, spec: &VethSpec<'_>) -> Result<(), LinkError> {
        let queues = [LinkAttribute::NumTxQueues(spec.queues), LinkAttribute::NumRxQueues(spec.queues)];
        let mut pod = LinkMessageBuilder::<LinkUnspec>::new()
            .name(spec.pod)
            .mtu(spec.mtu)
            .address(spec.mac.0.to_vec())
            // A packet that the switch is to cut must fit the link of a pod here, which gets it whole.
            .append_extra_attribute(LinkAttribute::GsoMaxSize(spec.mtu))
            .setns_by_fd(spec.netns.as_raw_fd());
        let mut host = LinkMessageBuilder::<LinkVeth>::new(spec.host, spec.pod).mtu(spec.mtu);
        for attribute in queues {
            pod = pod.append_extra_attribute(attribute.clone());
            host = host.append_extra_attribute(attribute);
        }
        let host = host.set_info_data(InfoData::Veth(InfoVeth::Peer(pod.build()))).build();
        let what = || format!("make the veth {} with its end {} in the pod", spec.host, spec.pod);
        self.handle.link().add(host).execute().await.map_err(|error| refused(what(), error))?;
        let up = LinkMessageBuilder::<LinkUnspec>::new().name(spec.host).up().build();
        let sealed = seal(spec.host);
        let done = match sealed {
            Ok(()) => self
                .handle
                .link()
                .set(up)
                .execute()
                .await
                .map_err(|error| refused(format!("set link {} up", spec.host), error)),
            Err(error) => Err(error),
        };
        if done.is_err() {
            let _ = self.delete_link(spec.host).await;
        }
        done
    }

    /// Deletes a link. True if there was one.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub async fn delete_link(&self, name: &str) -> Result<bool, LinkError> {
        let Some(link) = self.link(name).await? else { return Ok(false) };
        match self.handle.link().del(link.ifindex).execute().await {
            Ok(()) => Ok(true),
            Err(error) if errno(&error) == Some(ENODEV) => Ok(false),
            Err(error) => Err(refused(format!("delete link {name}"), error)),
        }
    }

    /// Deletes a pair that an earlier daemon left: a veth of this name whose other end has the other name.
    ///
    /// # Errors
    ///
    /// [`LinkError::Taken`] for any other link of either name; it stays.
    pub async fn delete_pair(&self, name: &str, other: &str) -> Result<(), LinkError> {
        let ends = [self.link(name).await?, self.link(other).await?];
        match ends {
            [None, None] => Ok(()),
            [Some(one), Some(two)] if one.is_veth && two.is_veth => self.delete_link(name).await.map(|_| ()),
            [one, _] => {
                let name = if one.is_some() { name } else { other };
                Err(LinkError::Taken { name: name.to_owned() })
            }
        }
    }

    /// Sets a link up.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub async fn set_up(&self, ifindex: u32) -> Result<(), LinkError> {
        let up = LinkUnspec::new_with_index(ifindex).up().build();
        self.handle.link().set(up).execute().await.map_err(|error| refused("set the pod's link up", error))
    }

    /// Adds an address to a link, without duplicate detection and without a route of its own.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub async fn add_address(&self, ifindex: u32, address: IpNet) -> Result<(), LinkError> {
        let mut request = self.handle.address().add(ifindex, address.addr(), address.prefix_len());
        let flags = AddressFlags::Nodad | AddressFlags::Noprefixroute;
        request.message_mut().attributes.push(AddressAttribute::Flags(flags));
        request.execute().await.map_err(|error| refused(format!("add address {address}"), error))
    }

    /// As [`add_route`](Self::add_route), or changes the route that is there.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub async fn replace_route(&self, ifindex: u32, route: &PodRoute) -> Result<(), LinkError> {
        self.handle
            .route()
            .add(pod_route(ifindex, route))
            .replace()
            .execute()
            .await
            .map_err(|error| refused(format!("change route {}", route.destination), error))
    }

    /// Adds a route out of a link; without a gateway the destination is on the link.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub async fn add_route(&self, ifindex: u32, route: &PodRoute) -> Result<(), LinkError> {
        self.handle
            .route()
            .add(pod_route(ifindex, route))
            .execute()
            .await
            .map_err(|error| refused(format!("add route {}", route.destination), error))
    }
}

/// The metrics that a route keeps whatever the network says, as bits by their numbers: `RTAX_MTU` is 2 (`linux/rtnetlink.h`).
const LOCKED_MTU: u32 = 1 << 2;

fn pod_route(ifindex: u32, route: &PodRoute) -> RouteMessage {
    let mut message = route_message(ifindex, route.destination, route.gateway);
    if let Some(mtu) = route.mtu {
        let mut metrics = vec![RouteMetric::Mtu(mtu)];
        metrics.extend(route.is_locked.then_some(RouteMetric::Lock(LOCKED_MTU)));
        message.attributes.push(RouteAttribute::Metrics(metrics));
    }
    message
}

/// Closes the host's stack to a link of ours (kernel document `networking/ip-sysctl.rst`). No route leads to the link, so
/// strict reverse path filtering drops every IPv4 packet from it; ARP is not answered; IPv6 is off.
pub(crate) fn seal(link: &str) -> Result<(), LinkError> {
    let settings = [("ipv4", "rp_filter", "1"), ("ipv4", "arp_ignore", "8"), ("ipv6", "disable_ipv6", "1")];
    for (family, name, value) in settings {
        let path = format!("/proc/sys/net/{family}/conf/{link}/{name}");
        match std::fs::write(&path, value) {
            Ok(()) => {}
            // A kernel without the family.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(LinkError::Refused { what: format!("write {path}"), source }),
        }
    }
    Ok(())
}

pub(crate) fn route_message(ifindex: u32, destination: IpNet, gateway: Option<IpAddr>) -> RouteMessage {
    let scope = if gateway.is_none() { RouteScope::Link } else { RouteScope::Universe };
    match destination {
        IpNet::V4(v4) => {
            let mut builder = RouteMessageBuilder::<std::net::Ipv4Addr>::new()
                .destination_prefix(v4.network(), v4.prefix_len())
                .output_interface(ifindex)
                .scope(scope);
            if let Some(IpAddr::V4(gateway)) = gateway {
                builder = builder.gateway(gateway);
            }
            builder.build()
        }
        IpNet::V6(v6) => {
            let mut builder = RouteMessageBuilder::<std::net::Ipv6Addr>::new()
                .destination_prefix(v6.network(), v6.prefix_len())
                .output_interface(ifindex);
            if let Some(IpAddr::V6(gateway)) = gateway {
                builder = builder.gateway(gateway);
            }
            builder.build()
        }
    }
}
