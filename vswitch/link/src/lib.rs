//! Links of the kernel: veths and namespaces for pods, routes and neighbors for the underlay, over rtnetlink.
//!
//! The daemon uses it to watch the uplink and to resolve peers; the CNI plugin and `switchctl` use [`plug`](mod@plug) to
//! make a pod's interface. Nothing here touches a link, an address or a route that it did not make.
#![forbid(unsafe_code)]

mod conntrack;
mod ethtool;
mod follow;
mod host;
mod netdev;
mod netns;
pub mod plug;
mod underlay;
mod veth;

use std::net::IpAddr;

pub use conntrack::UdpFlows;
pub use follow::{Coming, ExternNeighbor, Follower, Forwarding, KernelRoute, News};
use futures_util::{Stream, TryStreamExt};
pub use host::{HOST_PROTOCOL, HostRoute, REMOTE_PROTOCOL};
pub use netns::Netns;
use rtnetlink::Handle;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
pub use underlay::{Neighbor, Route, Watch};
pub use veth::VethSpec;
use vswitch_net::MacAddr;

/// What the kernel refused, and what for.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Netlink is not there.
    #[error("cannot open a netlink socket: {0}")]
    Open(#[source] std::io::Error),
    /// The kernel refused an operation.
    #[error("cannot {what}: {source}")]
    Refused {
        /// The operation.
        what: String,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// A link of somebody else has the name that ours should get.
    #[error(
        "link {name} is there already and is not the switch's: choose another name, or remove it (`ip -d link show {name}`)"
    )]
    Taken {
        /// The name.
        name: String,
    },
    /// The namespace cannot be entered.
    #[error(
        "cannot enter the network namespace {path}: {source}; name its file, as /run/netns/blue (`ip netns list`, `lsns -t net`)"
    )]
    Netns {
        /// Its path.
        path: String,
        /// Why.
        source: std::io::Error,
    },
}

/// A netlink connection to one network namespace.
#[derive(Debug)]
pub struct Kernel {
    handle: Handle,
    connection: JoinHandle<()>,
    /// Held while a table is dumped.
    dumping: Mutex<()>,
}

/// A link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkState {
    /// Its index.
    pub ifindex: u32,
    /// Its name.
    pub name: String,
    /// Its MAC address; zeros if it has none.
    pub mac: MacAddr,
    /// Its MTU.
    pub mtu: u32,
    /// Administratively up.
    pub is_enabled: bool,
    /// Administratively up, and with a carrier.
    pub is_up: bool,
    /// Receive queues.
    pub rx_queues: u32,
    /// True for a veth.
    pub is_veth: bool,
    /// Packets that were sent to it and lost there: of a veth, because the other end takes them too slowly.
    pub tx_dropped: u64,
    /// The bridge or bond that it is part of.
    pub master: Option<u32>,
    /// `vlan`, `bond`, ... as the kernel names the kind of a link that is no plain device.
    pub kind: Option<String>,
}

impl LinkError {
    /// The kernel's error number, if it gave one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            LinkError::Open(source) | LinkError::Refused { source, .. } | LinkError::Netns { source, .. } => {
                source.raw_os_error()
            }
            LinkError::Taken { .. } => None,
        }
    }
}

impl Kernel {
    /// Connects in the namespace of the calling thread. Call it within a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`LinkError::Open`].
    pub fn here() -> Result<Kernel, LinkError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(LinkError::Open)?;
        Ok(Kernel { handle, connection: tokio::spawn(connection), dumping: Mutex::default() })
    }

    /// Connects in another namespace.
    ///
    /// # Errors
    ///
    /// [`LinkError::Netns`] or [`LinkError::Open`].
    pub fn within(netns: &Netns) -> Result<Kernel, LinkError> {
        // A netlink socket belongs for life to the namespace of the thread that opened it.
        let runtime = tokio::runtime::Handle::current();
        let opened = netns.run(move || {
            let _guard = runtime.enter();
            rtnetlink::new_connection().map(|(connection, handle, _)| (connection, handle))
        })?;
        let (connection, handle) = opened.map_err(LinkError::Open)?;
        Ok(Kernel { handle, connection: tokio::spawn(connection), dumping: Mutex::default() })
    }

    /// What `take` makes of each answer to a request for a whole table. The kernel answers one such request of a socket
    /// at a time and refuses another (`EBUSY`): here they wait for each other.
    async fn dump<M, S, T>(
        &self,
        what: &str,
        request: impl FnOnce() -> S,
        mut take: impl FnMut(M) -> Option<T>,
    ) -> Result<Vec<T>, LinkError>
    where
        S: Stream<Item = Result<M, rtnetlink::Error>>,
    {
        let _turn = self.dumping.lock().await;
        let mut answers = std::pin::pin!(request());
        let mut taken = Vec::new();
        while let Some(answer) = answers.try_next().await.map_err(|error| refused(what, error))? {
            taken.extend(take(answer));
        }
        Ok(taken)
    }

    /// The link of a name; none if there is none.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub async fn link(&self, name: &str) -> Result<Option<LinkState>, LinkError> {
        let found = self.handle.link().get().match_name(name.to_owned()).execute().try_next().await;
        match found {
            Ok(message) => Ok(message.map(|message| link_state(&message))),
            Err(error) if errno(&error) == Some(ENODEV) => Ok(None),
            Err(error) => Err(refused(format!("look up link {name}"), error)),
        }
    }

    /// All links.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub async fn links(&self) -> Result<Vec<LinkState>, LinkError> {
        self.dump("list links", || self.handle.link().get().execute(), |message| Some(link_state(&message))).await
    }

    /// Addresses of all links, usable from elsewhere or not.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub async fn all_addresses(&self) -> Result<Vec<IpAddr>, LinkError> {
        use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
        let address = |attribute: &AddressAttribute| match attribute {
            AddressAttribute::Local(address) | AddressAttribute::Address(address) => Some(*address),
            _ => None,
        };
        let of_link = |message: AddressMessage| Some(message.attributes.iter().filter_map(address).collect::<Vec<_>>());
        let all = self.dump("list addresses", || self.handle.address().get().execute(), of_link).await?;
        Ok(all.into_iter().flatten().collect())
    }

    /// Addresses of a link that are usable from elsewhere and will be: not link-local, tentative, duplicate, deprecated or
    /// temporary. In the kernel's order.
    ///
    /// # Errors
    ///
    /// [`LinkError::Refused`].
    pub async fn addresses(&self, ifindex: u32) -> Result<Vec<IpAddr>, LinkError> {
        use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
        let usable = |message: AddressMessage| {
            let is_v6 = message.header.family == rtnetlink::packet_route::AddressFamily::Inet6;
            let flags = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Flags(flags) => Some(*flags),
                _ => None,
            });
            // The bit of a temporary IPv6 address is that of a secondary IPv4 one, which is as good as another.
            let passing = AddressFlags::Tentative | AddressFlags::Dadfailed | AddressFlags::Deprecated;
            let passing = if is_v6 { passing | AddressFlags::Secondary } else { passing };
            let is_passing = flags.is_some_and(|flags| flags.intersects(passing));
            if message.header.index != ifindex || message.header.scope != AddressScope::Universe || is_passing {
                return None;
            }
            let local = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(address) => Some(*address),
                _ => None,
            });
            let plain = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(address) => Some(*address),
                _ => None,
            });
            local.or(plain)
        };
        let request = || self.handle.address().get().set_link_index_filter(ifindex).execute();
        self.dump("list addresses", request, usable).await
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

pub(crate) const ENODEV: i32 = 19;

fn link_state(message: &LinkMessage) -> LinkState {
    let mut state = LinkState {
        ifindex: message.header.index,
        name: String::new(),
        mac: MacAddr::default(),
        mtu: 0,
        is_enabled: message.header.flags.contains(LinkFlags::Up),
        is_up: message.header.flags.contains(LinkFlags::Up | LinkFlags::LowerUp),
        rx_queues: 1,
        is_veth: false,
        tx_dropped: 0,
        master: None,
        kind: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => state.name.clone_from(name),
            LinkAttribute::Address(bytes) => {
                if let Ok(mac) = <[u8; 6]>::try_from(bytes.as_slice()) {
                    state.mac = MacAddr(mac);
                }
            }
            LinkAttribute::Mtu(mtu) => state.mtu = *mtu,
            LinkAttribute::NumRxQueues(queues) => state.rx_queues = *queues,
            LinkAttribute::Stats64(stats) => state.tx_dropped = stats.tx_dropped,
            LinkAttribute::Controller(index) => state.master = Some(*index),
            LinkAttribute::LinkInfo(infos) => {
                state.kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
                state.is_veth = state.kind.as_deref() == Some("veth");
            }
            _ => {}
        }
    }
    state
}

/// The kernel's error number of a failed request.
pub(crate) fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.code.map(|code| code.get().abs()),
        _ => None,
    }
}

pub(crate) fn refused(what: impl Into<String>, error: rtnetlink::Error) -> LinkError {
    let source = match errno(&error) {
        Some(number) => std::io::Error::from_raw_os_error(number),
        None => std::io::Error::other(error.to_string()),
    };
    LinkError::Refused { what: what.into(), source }
}
