//! What others write into the kernel's tables: routes of routing daemons, forwarding entries of VXLAN devices.
//!
//! First comes what is there ([`Kernel::kernel_routes`], [`Kernel::forwarding`]), then what changes ([`Follower`]). A
//! follower that falls behind ends; whoever listens opens another and reads everything anew.

use std::net::IpAddr;

use futures_util::StreamExt;
use ipnet::IpNet;
use netlink_packet_core::{NLM_F_REPLACE, NetlinkPayload};
use rtnetlink::MulticastGroup;
use rtnetlink::packet_route::link::LinkFlags;
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteNextHopFlags, RouteProtocol, RouteType, RouteVia,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::sys::AsyncSocket;
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_recv_buffer_size_force};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use vswitch_net::MacAddr;

use crate::underlay::Route;
use crate::{HOST_PROTOCOL, Kernel, LinkError, refused};

/// Room for news that come faster than they are read, bytes.
const RECEIVE_BUFFER: usize = 16 << 20;

/// News that may wait to be read.
const QUEUE: usize = 65_536;

/// A route in a table of the kernel's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelRoute {
    /// Its table.
    pub table: u32,
    /// Who made it (`rtm_protocol`).
    pub protocol: u8,
    /// Lower wins.
    pub priority: u32,
    /// Destination.
    pub prefix: IpNet,
    /// Next hops; empty for a route that leads nowhere (blackhole, unreachable, ...).
    pub next_hops: Vec<Route>,
}

/// An entry of a forwarding table (`bridge fdb`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forwarding {
    /// The device.
    pub ifindex: u32,
    /// The station; all zeros for what floods.
    pub mac: MacAddr,
    /// The VTEP behind which it is; none for what is not in a VXLAN device's own table.
    pub vtep: Option<IpAddr>,
}

/// A neighbor entry that a routing daemon made (`extern_learn`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExternNeighbor {
    /// The link, a bridge.
    pub ifindex: u32,
    /// The address.
    pub address: IpAddr,
    /// Whose it is; none for an entry that goes.
    pub mac: Option<MacAddr>,
}

/// What becomes of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coming {
    /// It is there, beside others of its prefix.
    Added,
    /// It is there, in the place of what the prefix had at its priority.
    Replaced,
    /// Its next hops are gone; an IPv6 route may have others still.
    Gone,
}

/// A change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// A route came, whole, or went.
    Route(KernelRoute, Coming),
    /// A forwarding entry came (true) or went.
    Forwarding(Forwarding, bool),
    /// An address of a station elsewhere came (true) or went: a neighbor entry that a routing daemon made.
    Neighbor(ExternNeighbor, bool),
    /// A link went down or away, or lost an IPv4 address: the kernel drops IPv4 routes then, and tells nobody of them.
    Flushed {
        /// The link.
        ifindex: u32,
    },
}

/// Hears of changes, until some were lost. Stops when dropped.
#[derive(Debug)]
pub struct Follower {
    news: mpsc::Receiver<News>,
    tasks: [JoinHandle<()>; 2],
}

impl Follower {
    /// Listens in the namespace of the calling thread. Call it within a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`LinkError::Open`].
    pub fn here() -> Result<Follower, LinkError> {
        let groups = [
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Neigh,
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
        ];
        let (mut connection, _, mut messages) =
            rtnetlink::new_multicast_connection(&groups).map_err(LinkError::Open)?;
        // Beyond what the system allows everybody, if we may; less only means that more is read anew.
        let socket = connection.socket_mut().socket_mut();
        let _ = set_socket_recv_buffer_size_force(&*socket, RECEIVE_BUFFER)
            .or_else(|_| set_socket_recv_buffer_size(&*socket, RECEIVE_BUFFER));
        let (sender, receiver) = mpsc::channel(QUEUE);
        let listen = async move {
            while let Some((message, _)) = messages.next().await {
                // A socket that lost something says so first, then gives what it kept from before, and keeps losing
                // without another word until all of that is read. None of it is of use.
                if matches!(message.payload, NetlinkPayload::Overrun(_)) {
                    return;
                }
                let is_replacing = message.header.flags & NLM_F_REPLACE != 0;
                if let Some(news) = news(message.payload, is_replacing)
                    && sender.try_send(news).is_err()
                {
                    return;
                }
            }
        };
        Ok(Follower { news: receiver, tasks: [tokio::spawn(connection), tokio::spawn(listen)] })
    }

    /// The next change; none if changes were lost.
    pub async fn next(&mut self) -> Option<News> {
        self.news.recv().await
    }

    /// A change that is there already.
    pub fn try_next(&mut self) -> Option<News> {
        self.news.try_recv().ok()
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Kernel {
    /// All unicast routes of all tables.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub async fn kernel_routes(&self) -> Result<Vec<KernelRoute>, LinkError> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut all = RouteMessage::default();
            all.header.address_family = family;
            let request = || self.handle.route().get(all).execute();
            routes.extend(self.dump("list routes", request, |message| kernel_route(&message)).await?);
        }
        Ok(routes)
    }

    /// The forwarding tables of all bridges and VXLAN devices.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub async fn forwarding(&self) -> Result<Vec<Forwarding>, LinkError> {
        let request = || self.handle.neighbours().get().set_address_family(AddressFamily::Bridge).execute();
        self.dump("list forwarding entries", request, |message| forwarding(&message)).await
    }

    /// Neighbor entries that routing daemons made, of all links.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub async fn extern_neighbors(&self) -> Result<Vec<ExternNeighbor>, LinkError> {
        let request = || self.handle.neighbours().get().execute();
        self.dump("list neighbors", request, |message| extern_neighbor(&message)).await
    }

    /// Gives a bridge the address of a station here, as if it had resolved it.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub async fn add_neighbor(&self, ifindex: u32, address: IpAddr, mac: MacAddr) -> Result<(), LinkError> {
        let request = self.handle.neighbours().add(ifindex, address).link_layer_address(&mac.0);
        let mut request = request.state(NeighbourState::Permanent).replace();
        request.message_mut().attributes.push(NeighbourAttribute::Protocol(RouteProtocol::Other(HOST_PROTOCOL)));
        request.execute().await.map_err(|error| refused(format!("tell the bridge of {address}"), error))
    }

    /// What [`add_neighbor`](Self::add_neighbor) has told a bridge, by this daemon or an earlier one.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub async fn own_neighbors(&self, ifindex: u32) -> Result<Vec<(IpAddr, MacAddr)>, LinkError> {
        let own = NeighbourAttribute::Protocol(RouteProtocol::Other(HOST_PROTOCOL));
        let entry = |message: NeighbourMessage| {
            let is_own = message.header.ifindex == ifindex && message.attributes.contains(&own);
            is_own.then(|| address_and_mac(&message)).and_then(|(address, mac)| Some((address?, mac?)))
        };
        self.dump("list neighbors", || self.handle.neighbours().get().execute(), entry).await
    }

    /// Takes such an address away again. It is fine if it is gone.
    pub async fn remove_neighbor(&self, ifindex: u32, address: IpAddr) {
        let mut message = NeighbourMessage::default();
        message.header.family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        message.header.ifindex = ifindex;
        let address = match address {
            IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
            IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
        };
        message.attributes.push(NeighbourAttribute::Destination(address));
        let _ = self.handle.neighbours().del(message).execute().await;
    }

    /// Tells the bridge of `ifindex`, one of its ports, that a station is behind that port. Tell it again before the
    /// bridge forgets (five minutes).
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub async fn add_forwarding(&self, ifindex: u32, mac: MacAddr) -> Result<(), LinkError> {
        self.handle
            .neighbours()
            .add_bridge(ifindex, &mac.0)
            .state(NeighbourState::Reachable)
            .flags(NeighbourFlags::Controller)
            .replace()
            .execute()
            .await
            .map_err(|error| refused(format!("tell the bridge of station {mac}"), error))
    }

    /// Takes a station away again. It is fine if the bridge has forgotten it, or has it elsewhere.
    pub async fn remove_forwarding(&self, ifindex: u32, mac: MacAddr) {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = ifindex;
        message.header.flags = NeighbourFlags::Controller;
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
        let _ = self.handle.neighbours().del(message).execute().await;
    }
}

fn news(payload: NetlinkPayload<RouteNetlinkMessage>, is_replacing: bool) -> Option<News> {
    match payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(message)) => {
            let coming = if is_replacing { Coming::Replaced } else { Coming::Added };
            kernel_route(&message).map(|route| News::Route(route, coming))
        }
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelRoute(message)) => {
            kernel_route(&message).map(|route| News::Route(route, Coming::Gone))
        }
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(message)) => {
            let neighbor = || extern_neighbor(&message).map(|entry| News::Neighbor(entry, true));
            forwarding(&message).map(|entry| News::Forwarding(entry, true)).or_else(neighbor)
        }
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelNeighbour(message)) => {
            let neighbor = || extern_neighbor(&message).map(|entry| News::Neighbor(entry, false));
            forwarding(&message).map(|entry| News::Forwarding(entry, false)).or_else(neighbor)
        }
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(message)) => {
            let is_down = !message.header.flags.contains(LinkFlags::Up);
            is_down.then_some(News::Flushed { ifindex: message.header.index })
        }
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(message)) => {
            Some(News::Flushed { ifindex: message.header.index })
        }
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelAddress(message)) => {
            Some(News::Flushed { ifindex: message.header.index })
        }
        _ => None,
    }
}

/// A route as far as it is of interest; none for local and multicast ones and those of the routing cache.
pub(crate) fn kernel_route(message: &RouteMessage) -> Option<KernelRoute> {
    use rtnetlink::packet_route::route::RouteFlags;
    let is_v6 = message.header.address_family == AddressFamily::Inet6;
    let is_of_interest = matches!(
        message.header.kind,
        RouteType::Unicast | RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit
    );
    if !is_of_interest || message.header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    let mut address: IpAddr =
        if is_v6 { std::net::Ipv6Addr::UNSPECIFIED.into() } else { std::net::Ipv4Addr::UNSPECIFIED.into() };
    let (mut table, mut priority) = (u32::from(message.header.table), 0);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(v4)) => address = (*v4).into(),
            RouteAttribute::Destination(RouteAddress::Inet6(v6)) => address = (*v6).into(),
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Priority(number) => priority = *number,
            _ => {}
        }
    }
    let next_hops = if message.header.kind == RouteType::Unicast { next_hops(message) } else { Vec::new() };
    let prefix = IpNet::new(address, message.header.destination_prefix_length).ok()?.trunc();
    Some(KernelRoute { table, protocol: message.header.protocol.into(), priority, prefix, next_hops })
}

/// The next hops of a route, those left out whose link is known to be dead.
pub(crate) fn next_hops(message: &RouteMessage) -> Vec<Route> {
    let mut hops = Vec::new();
    let mtu = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Metrics(metrics) => metrics.iter().find_map(|metric| match metric {
            RouteMetric::Mtu(mtu) => Some(*mtu),
            _ => None,
        }),
        _ => None,
    });
    let single = next_hop(&message.attributes, 0);
    hops.extend((single.ifindex != 0).then_some(single));
    for attribute in &message.attributes {
        if let RouteAttribute::MultiPath(many) = attribute {
            let is_dead = RouteNextHopFlags::Dead | RouteNextHopFlags::Linkdown;
            let alive = many.iter().filter(|hop| !hop.flags.intersects(is_dead));
            hops.extend(alive.map(|hop| next_hop(&hop.attributes, hop.interface_index)));
        }
    }
    hops.iter_mut().for_each(|hop| hop.mtu = mtu);
    hops
}

fn next_hop(attributes: &[RouteAttribute], ifindex: u32) -> Route {
    let mut hop = Route { ifindex, gateway: None, mtu: None };
    for attribute in attributes {
        match attribute {
            RouteAttribute::Oif(index) => hop.ifindex = *index,
            RouteAttribute::Gateway(RouteAddress::Inet(v4)) | RouteAttribute::Via(RouteVia::Inet(v4)) => {
                hop.gateway = Some((*v4).into());
            }
            RouteAttribute::Gateway(RouteAddress::Inet6(v6)) | RouteAttribute::Via(RouteVia::Inet6(v6)) => {
                hop.gateway = Some((*v6).into());
            }
            _ => {}
        }
    }
    hop
}

fn extern_neighbor(message: &NeighbourMessage) -> Option<ExternNeighbor> {
    let is_extern = message.header.flags.contains(NeighbourFlags::ExtLearned);
    let is_ip = matches!(message.header.family, AddressFamily::Inet | AddressFamily::Inet6);
    let (address, mac) = address_and_mac(message);
    (is_extern && is_ip).then_some(ExternNeighbor { ifindex: message.header.ifindex, address: address?, mac })
}

/// Both as far as they are there.
pub(crate) fn address_and_mac(message: &NeighbourMessage) -> (Option<IpAddr>, Option<MacAddr>) {
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => address = Some(IpAddr::V4(*v4)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => address = Some(IpAddr::V6(*v6)),
            // The crate knows no family for a bridge's entries, and gives the bytes.
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
                let v4 = <[u8; 4]>::try_from(bytes.as_slice()).ok().map(IpAddr::from);
                address = v4.or_else(|| <[u8; 16]>::try_from(bytes.as_slice()).ok().map(IpAddr::from));
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = <[u8; 6]>::try_from(bytes.as_slice()).ok().map(MacAddr);
            }
            _ => {}
        }
    }
    (address, mac)
}

fn forwarding(message: &NeighbourMessage) -> Option<Forwarding> {
    if message.header.family != AddressFamily::Bridge {
        return None;
    }
    let (vtep, mac) = address_and_mac(message);
    Some(Forwarding { ifindex: message.header.ifindex, mac: mac?, vtep })
}
