//! What the kernel knows of the underlay: routes, neighbors, and news of both.

use std::net::IpAddr;
use std::sync::Arc;

use futures_util::{StreamExt, TryStreamExt};
use rtnetlink::packet_route::neighbour::{NeighbourFlags, NeighbourMessage, NeighbourState};
use rtnetlink::packet_route::route::{RouteFlags, RouteType};
use rtnetlink::{MulticastGroup, RouteMessageBuilder};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use vswitch_net::MacAddr;

use crate::{Kernel, LinkError, errno, follow, refused};

/// How the kernel would send to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// The outgoing link.
    pub ifindex: u32,
    /// The gateway; none if the destination is on the link.
    pub gateway: Option<IpAddr>,
    /// The route's own MTU, if it has one.
    pub mtu: Option<u32>,
}

/// A neighbor entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbor {
    /// Its MAC, unless it could not be resolved.
    pub mac: Option<MacAddr>,
    /// True if the kernel is sure of it, or is about to make sure.
    pub is_fresh: bool,
}

/// Tells when links, addresses, routes or neighbors change. Stops when dropped.
#[derive(Debug)]
pub struct Watch {
    changed: Arc<Notify>,
    tasks: [JoinHandle<()>; 2],
}

impl Watch {
    /// Watches the namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// [`LinkError::Open`].
    pub fn here() -> Result<Watch, LinkError> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Neigh,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ];
        let (connection, _, mut messages) = rtnetlink::new_multicast_connection(&groups).map_err(LinkError::Open)?;
        let changed = Arc::new(Notify::new());
        let notify = changed.clone();
        let tasks = [
            tokio::spawn(connection),
            tokio::spawn(async move {
                while messages.next().await.is_some() {
                    notify.notify_one();
                }
            }),
        ];
        Ok(Watch { changed, tasks })
    }

    /// Waits for the next change. Changes in between are one.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Kernel {
    /// The ways to an address, of equal cost; empty if there is none.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub async fn routes_to(&self, destination: IpAddr) -> Result<Vec<Route>, LinkError> {
        let mut message = match destination {
            IpAddr::V4(v4) => RouteMessageBuilder::<std::net::Ipv4Addr>::new().destination_prefix(v4, 32).build(),
            IpAddr::V6(v6) => RouteMessageBuilder::<std::net::Ipv6Addr>::new().destination_prefix(v6, 128).build(),
        };
        // The table's entry with all its next hops, and not the one that the kernel would choose for a packet.
        message.header.flags |= RouteFlags::FibMatch;
        let found = match self.handle.route().get(message).execute().try_next().await {
            Ok(found) => found,
            // ENETUNREACH, EHOSTUNREACH, EINVAL, EACCES: an unreachable, blackhole or prohibit route, or none.
            Err(error) if matches!(errno(&error), Some(101 | 113 | 22 | 13)) => None,
            Err(error) => return Err(refused(format!("look up the route to {destination}"), error)),
        };
        let unicast = found.filter(|message| message.header.kind == RouteType::Unicast);
        Ok(unicast.as_ref().map(follow::next_hops).unwrap_or_default())
    }

    /// Neighbor entries of a link, by address.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub async fn neighbors(&self, ifindex: u32) -> Result<Vec<(IpAddr, Neighbor)>, LinkError> {
        let neighbor = |message: NeighbourMessage| {
            if message.header.ifindex != ifindex {
                return None;
            }
            let (address, mac) = follow::address_and_mac(&message);
            let state = message.header.state;
            let is_known = !matches!(state, NeighbourState::Failed | NeighbourState::Incomplete | NeighbourState::None);
            let is_fresh = is_known && state != NeighbourState::Stale;
            Some((address?, Neighbor { mac: mac.filter(|_| is_known), is_fresh }))
        };
        self.dump("list neighbors", || self.handle.neighbours().get().execute(), neighbor).await
    }

    /// Has the kernel resolve a neighbor, as sending to it would (`NTF_USE`).
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub async fn resolve(&self, ifindex: u32, address: IpAddr) -> Result<(), LinkError> {
        self.handle
            .neighbours()
            .add(ifindex, address)
            .state(NeighbourState::None)
            .flags(NeighbourFlags::Use)
            .replace()
            .execute()
            .await
            .map_err(|error| refused(format!("resolve {address}"), error))
    }
}
