//! The veth into the host's own stack: made, addressed, routed to.

use std::net::IpAddr;

use futures_util::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkAttribute};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteProtocol,
};
use rtnetlink::sys::AsyncSocket;
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVeth};
use vswitch_net::{GATEWAY_V4, GATEWAY_V6, MacAddr};

use crate::follow::kernel_route;
use crate::veth::{route_message, seal};
use crate::{Kernel, LinkError, errno, ethtool, refused};

/// The protocol number of routes to pods here in the kernel's tables (`rtnetlink(7)`, `rtm_protocol`): one that nobody else
/// uses, so that routing daemons can tell what to advertise.
pub const HOST_PROTOCOL: u8 = 118;

/// That of routes by way of the switch to other nodes' pods, which are not this node's to advertise.
pub const REMOTE_PROTOCOL: u8 = 119;

const FAMILIES: [AddressFamily; 2] = [AddressFamily::Inet, AddressFamily::Inet6];

const ESRCH: i32 = 3;
const EEXIST: i32 = 17;

/// A route of the host to pods, by way of the switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostRoute {
    /// Destination.
    pub prefix: IpNet,
    /// MTU of the route; none for the link's.
    pub mtu: Option<u32>,
    /// Its protocol number, [`HOST_PROTOCOL`] or [`REMOTE_PROTOCOL`].
    pub protocol: u8,
}

impl Kernel {
    /// Makes the pair `host` and `switch`, both here and up. The switch's end is sealed from the host's stack; the host's
    /// end has segmentation offloads off, as a pod's has. What an earlier daemon left under these names goes first.
    ///
    /// # Errors
    ///
    /// [`LinkError::Taken`] or [`LinkError::Refused`]; nothing is left behind.
    pub async fn create_host_veth(
        &self,
        host: &str,
        switch: &str,
        mtu: u32,
        queues: u32,
        receives_xdp: bool,
    ) -> Result<MacAddr, LinkError> {
        self.delete_pair(host, switch).await?;
        let queues = [LinkAttribute::NumTxQueues(queues), LinkAttribute::NumRxQueues(queues)];
        let mut peer = LinkMessageBuilder::<LinkUnspec>::new().name(switch).mtu(mtu);
        let mut message = LinkMessageBuilder::<LinkVeth>::new(host, switch).mtu(mtu);
        for attribute in queues {
            peer = peer.append_extra_attribute(attribute.clone());
            message = message.append_extra_attribute(attribute);
        }
        let message = message.set_info_data(InfoData::Veth(InfoVeth::Peer(peer.build()))).build();
        let what = || format!("make the veth {host} and {switch}");
        self.handle.link().add(message).execute().await.map_err(|error| refused(what(), error))?;
        let done = self.prepare_host_veth(host, switch, receives_xdp).await;
        if done.is_err() {
            let _ = self.delete_link(host).await;
        }
        done
    }

    async fn prepare_host_veth(&self, host: &str, switch: &str, receives_xdp: bool) -> Result<MacAddr, LinkError> {
        seal(switch)?;
        // Pods of other nodes may be reached by another way than they come.
        write_setting("ipv4", host, "rp_filter", "2")?;
        ethtool::turn_off(None, host, false).await?;
        for name in [switch, host] {
            let up = LinkMessageBuilder::<LinkUnspec>::new().name(name).up().build();
            self.handle
                .link()
                .set(up)
                .execute()
                .await
                .map_err(|error| refused(format!("set link {name} up"), error))?;
        }
        if receives_xdp {
            ethtool::take_redirected(None, host).await?;
        }
        let link = self.link(host).await?;
        link.map(|link| link.mac).ok_or_else(|| LinkError::Refused {
            what: format!("use link {host}"),
            source: std::io::ErrorKind::NotFound.into(),
        })
    }

    /// Makes a link that is a port of a bridge and carries nothing: stations are told to the bridge as being there. Its
    /// index. What an earlier daemon left under this name goes first.
    ///
    /// # Errors
    ///
    /// [`LinkError::Taken`] or [`LinkError::Refused`]; nothing is left behind.
    pub async fn create_bridge_face(&self, name: &str, bridge: u32) -> Result<u32, LinkError> {
        let other = format!("{name}-x");
        self.delete_pair(name, &other).await?;
        let message = LinkMessageBuilder::<LinkVeth>::new(name, &other).build();
        let what = || format!("make the link {name}");
        self.handle.link().add(message).execute().await.map_err(|error| refused(what(), error))?;
        let mut index = 0;
        // What the bridge floods reaches the other end, and must not reach the host's stack.
        for end in [other.as_str(), name] {
            if let Err(error) = seal(end) {
                let _ = self.delete_link(name).await;
                return Err(error);
            }
        }
        for (name, master) in [(other.as_str(), None), (name, Some(bridge))] {
            let Some(link) = self.link(name).await? else { continue };
            index = link.ifindex;
            let mut up = LinkUnspec::new_with_index(link.ifindex).up();
            if let Some(master) = master {
                up = up.controller(master);
            }
            let done = self.handle.link().set(up.build()).execute().await;
            if let Err(error) = done {
                let _ = self.delete_link(name).await;
                return Err(refused(format!("make {name} a port of the bridge"), error));
            }
        }
        Ok(index)
    }

    /// Packets from the host's loopback addresses may leave by this link, as those to mapped ports must.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub fn let_loopback_out(&self, host: &str) -> Result<(), LinkError> {
        write_setting("ipv4", host, "route_localnet", "1")
    }

    /// Adds a route to pods to a table of the kernel's. False if somebody else has a route to that prefix there: it stays
    /// as it is.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub async fn add_host_route(&self, ifindex: u32, table: u32, route: HostRoute) -> Result<bool, LinkError> {
        match self.handle.route().add(host_route(ifindex, table, route)).execute().await {
            Ok(()) => Ok(true),
            Err(error) if errno(&error) == Some(EEXIST) => Ok(false),
            Err(error) => Err(refused(format!("set the host's route to {}", route.prefix), error)),
        }
    }

    /// Takes a route to pods away. It is fine if it is gone already.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub async fn remove_host_route(&self, ifindex: u32, table: u32, route: HostRoute) -> Result<(), LinkError> {
        match self.handle.route().del(host_route(ifindex, table, route)).execute().await {
            Err(error) if errno(&error) != Some(ESRCH) => {
                Err(refused(format!("remove the host's route to {}", route.prefix), error))
            }
            _ => Ok(()),
        }
    }

    /// Removes every route of our protocols: an earlier daemon's.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub async fn remove_own_routes(&self) -> Result<(), LinkError> {
        for message in own_routes().await? {
            let _ = self.handle.route().del(message).execute().await;
        }
        Ok(())
    }

    /// Tables and prefixes of the routes of our protocols.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub async fn host_routes(&self) -> Result<Vec<(u32, IpNet)>, LinkError> {
        let routes = own_routes().await?;
        Ok(routes.iter().filter_map(kernel_route).map(|route| (route.table, route.prefix)).collect())
    }
}

/// The routes of our protocols. The kernel picks them, which it does for a socket that asked to be taken at its word
/// (`NETLINK_GET_STRICT_CHK`): its tables may have a hundred thousand others.
async fn own_routes() -> Result<Vec<RouteMessage>, LinkError> {
    let (mut connection, handle, _) = rtnetlink::new_connection().map_err(LinkError::Open)?;
    connection.socket_mut().socket_mut().set_netlink_get_strict_chk(true).map_err(LinkError::Open)?;
    let connection = tokio::spawn(connection);
    let mut own = Vec::new();
    let both = [HOST_PROTOCOL, REMOTE_PROTOCOL].map(RouteProtocol::Other);
    for (protocol, family) in both.iter().flat_map(|&protocol| FAMILIES.map(|family| (protocol, family))) {
        let is_own = |message: &RouteMessage| message.header.protocol == protocol;
        let mut wanted = RouteMessage::default();
        wanted.header.address_family = family;
        wanted.header.protocol = protocol;
        let mut answers = handle.route().get(wanted).execute();
        while let Some(message) = answers.try_next().await.map_err(|error| refused("list the host's routes", error))? {
            own.extend(Some(message).filter(is_own));
        }
    }
    connection.abort();
    Ok(own)
}

fn host_route(ifindex: u32, table: u32, route: HostRoute) -> RouteMessage {
    let gateway: IpAddr = if route.prefix.addr().is_ipv4() { GATEWAY_V4.into() } else { GATEWAY_V6.into() };
    let mut message = route_message(ifindex, route.prefix, Some(gateway));
    message.attributes.retain(|attribute| !matches!(attribute, RouteAttribute::Gateway(_)));
    message.attributes.push(RouteAttribute::Gateway(match gateway {
        IpAddr::V4(v4) => RouteAddress::Inet(v4),
        IpAddr::V6(v6) => RouteAddress::Inet6(v6),
    }));
    // The gateway lies in none of the link's subnets.
    message.header.flags |= RouteFlags::Onlink;
    message.header.protocol = RouteProtocol::Other(route.protocol);
    if let Ok(small) = u8::try_from(table) {
        message.header.table = small;
    } else {
        message.header.table = 0;
        message.attributes.push(RouteAttribute::Table(table));
    }
    if let Some(mtu) = route.mtu {
        message.attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)]));
    }
    message
}

fn write_setting(family: &str, link: &str, name: &str, value: &str) -> Result<(), LinkError> {
    let path = format!("/proc/sys/net/{family}/conf/{link}/{name}");
    std::fs::write(&path, value).map_err(|source| LinkError::Refused { what: format!("write {path}"), source })
}
