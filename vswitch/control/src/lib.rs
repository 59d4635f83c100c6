//! Intent: what the switch shall be, and the snapshot the data path reads.
//!
//! ```text
//! request -> Control::handle -> apply (check everything, then change desired state) -> compile -> Snapshot
//! ```
//!
//! # What
//!
//! [`Control`] holds the desired state (networks, peers, ports, routes, static stations), what was learned (stations) and
//! what the kernel told (uplink, next hops), and compiles all three into a [`Snapshot`]. It has no socket, no thread and no
//! clock: requests and time are arguments, and what only the kernel can do is behind the [`Backend`] trait.
//!
//! # Why this way
//!
//! A request is checked whole before the first field changes, so it either happens or leaves nothing. Config file, CNI
//! and `switchctl` send the same requests, so there is one way in and one set of checks.
//!
//! # Cost
//!
//! A change copies the arrays of ports, networks and peers (pointers) and one shard of the table it touches.
#![forbid(unsafe_code)]

mod apply;
mod backend;
mod bridging;
mod checks;
mod compile;
mod counts;
mod desired;
mod egress;
mod follow;
mod groups;
mod host;
mod ipam;
mod learned;
mod membership;
pub mod policy;
mod ports;
mod report;
mod routes;
mod rxq;
mod services;
mod state;
mod stations;
mod tagged;
mod translations;
mod underlay;

use std::collections::BTreeMap;
use std::sync::Arc;

pub use backend::{Attached, Backend, FlowSample, OffloadSample, PortRest, SocketSample, WorkerSample, WorkerTimes};
pub use bridging::{Own, OwnWay};
pub use host::{HostPlan, HostState};
pub use state::{PortRecord, State};
pub use underlay::{NextHop, UplinkState};
use vswitch_api::{Answer, ApiError, Encap, Request};
use vswitch_dataplane::{Event, Location, Snapshot};
use vswitch_net::{MacAddr, NetworkIndex, PeerIndex, PortId};

use crate::compile::Tables;
use crate::desired::Desired;
use crate::groups::Groups;
use crate::learned::{Change, Learned};
pub use crate::policy::JournalEntry;
use crate::policy::{Observed, PolicyStore};
use crate::tagged::TaggedNeighbor;
use crate::translations::{Translated, Unsettled};
use crate::underlay::UnderlayView;

/// The port number of the first uplink; the others follow it.
pub const UPLINK_PORT: PortId = PortId(0);

/// Most uplinks.
pub const MAX_UPLINKS: usize = 8;

/// The port number of the port that leads into the host's stack.
pub const HOST_PORT: PortId = PortId(MAX_UPLINKS as u16);

pub(crate) fn is_uplink(port: PortId) -> bool {
    port.index() < MAX_UPLINKS
}

/// Limits and times that the configuration sets.
#[derive(Clone, Debug)]
pub struct ControlConfig {
    /// UDP port of VXLAN.
    pub udp_port: u16,
    /// 802.1Q identifier of the underlay.
    pub vlan: Option<u16>,
    /// With a tag: routers of the underlay, if peers are not on its link.
    pub gateways: Vec<std::net::IpAddr>,
    /// Another MAC address of this router, for what peers send to it in VXLAN.
    pub router_mac: Option<MacAddr>,
    /// The links that shall be the uplinks, whether they are there now or not.
    pub uplinks: Vec<String>,
    /// The network that is joined to the host's stack.
    pub host_network: Option<String>,
    /// Whether routes of the kernel are followed.
    pub is_importing: bool,
    /// How packets travel to the peers that imported routes lead to.
    pub import_encap: Encap,
    /// Whether what leaves the cluster by way of the host gets the host's address.
    pub masquerade: bool,
    /// Ports of this node that no policy closes.
    pub failsafe: Failsafe,
    /// Whether a pod of a container runtime waits until somebody has told of its labels.
    pub requires_endpoints: bool,
    /// A learned station is forgotten after this long without a packet.
    pub fdb_ageing_ns: u64,
    /// Most learned stations of one network.
    pub fdb_limit: usize,
}

/// Ports of this node that no policy closes, each a protocol's number and a port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Failsafe {
    /// Towards this node.
    pub inbound: Vec<(u8, u16)>,
    /// From this node.
    pub outbound: Vec<(u8, u16)>,
}

/// What a pod's routes should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodRoutes {
    /// Its port.
    pub port: PortId,
    /// Path of its namespace.
    pub netns: String,
    /// MAC address of its interface.
    pub mac: MacAddr,
    /// The routes.
    pub routes: Vec<vswitch_api::PodRoute>,
}

/// The one writer of everything the switch decides by.
#[derive(Debug)]
pub struct Control {
    config: ControlConfig,
    desired: Desired,
    /// The port into the host's stack, or why there is none.
    host: Result<HostState, String>,
    learned: Learned,
    groups: Groups,
    /// When members of groups were last asked.
    asked_ns: Option<u64>,
    /// When peers were met in networks that snoop.
    met: BTreeMap<(NetworkIndex, PeerIndex), u64>,
    /// When peers were told of the groups here.
    told_groups_ns: BTreeMap<(NetworkIndex, PeerIndex), u64>,
    /// Packets to send.
    own: Vec<Own>,
    /// With a tag: who was heard on the underlay, and when.
    neighbors: BTreeMap<(PortId, std::net::IpAddr), TaggedNeighbor>,
    underlay: UnderlayView,
    policy: PolicyStore,
    observed: Observed,
    /// Addresses of this node, as its kernel has them.
    host_addresses: Vec<std::net::IpAddr>,
    /// What connections have not been looked at for.
    unsettled: Unsettled,
    /// Addresses that translation spoke for, and connections may still use.
    draining: Translated,
    tables: Tables,
    generation: u64,
    dirty: Dirty,
}

/// What must be published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Dirty {
    Nothing,
    /// Something new that no flow entry depends on.
    Addition,
    /// Something that flow entries may have been decided by.
    Change,
}

impl Default for ControlConfig {
    fn default() -> Self {
        ControlConfig {
            udp_port: vswitch_net::VXLAN_PORT,
            vlan: None,
            gateways: Vec::new(),
            router_mac: None,
            uplinks: Vec::new(),
            host_network: None,
            is_importing: false,
            import_encap: Encap::Direct,
            masquerade: true,
            failsafe: Failsafe::default(),
            requires_endpoints: false,
            fdb_ageing_ns: 300_000_000_000,
            fdb_limit: 8192,
        }
    }
}

impl Control {
    /// A switch with nothing in it.
    pub fn new(config: ControlConfig) -> Control {
        Control {
            desired: Desired::default(),
            host: Err("not attached yet".to_owned()),
            learned: Learned::new(config.fdb_ageing_ns, config.fdb_limit),
            groups: Groups::default(),
            asked_ns: None,
            met: BTreeMap::new(),
            told_groups_ns: BTreeMap::new(),
            own: Vec::new(),
            neighbors: BTreeMap::new(),
            underlay: UnderlayView::new(config.udp_port, &config.uplinks),
            policy: PolicyStore::new(policy::failsafe(&config.failsafe)),
            observed: Observed::default(),
            host_addresses: Vec::new(),
            unsettled: Unsettled::default(),
            draining: Translated::new(),
            config,
            tables: Tables::default(),
            generation: 0,
            dirty: Dirty::Change,
        }
    }

    /// Carries a request out, whole or not at all. `now_ns` never goes back.
    ///
    /// # Errors
    ///
    /// A code and a sentence that names the remedy; nothing was changed.
    pub fn handle(&mut self, now_ns: u64, request: Request, backend: &mut dyn Backend) -> Result<Answer, ApiError> {
        if request.is_question() { self.report(now_ns, request, backend) } else { self.apply(request, backend) }
    }

    /// Carries out a request of the configuration file: what it makes is not written to the state.
    ///
    /// # Errors
    ///
    /// As [`handle`](Self::handle).
    pub fn configure(&mut self, request: Request, backend: &mut dyn Backend) -> Result<Answer, ApiError> {
        self.desired.is_configuring = true;
        let answer = self.apply(request, backend);
        self.desired.is_configuring = false;
        answer
    }

    /// Takes note of what a worker saw. `wall_ms` is the wall clock's time, in milliseconds since 1970.
    pub fn learn(&mut self, now_ns: u64, wall_ms: u64, event: Event) {
        let (network, mac, location) = match event {
            Event::Seen { network, mac, location } => (network, mac, location),
            Event::Neighbor { port, address, mac } => return self.hear_neighbor(now_ns, port, address, mac),
            Event::Flow(news) => return self.observed(wall_ms, &news),
            Event::Group { network, station, location, membership } => {
                return self.hear_group(now_ns, network, location, station, membership);
            }
        };
        // News may be older than the removal of what they are about.
        if self.desired.is_static(network, mac) || !self.desired.is_at(network, location) {
            return;
        }
        if matches!(location, Location::Peer(_)) && self.is_followed(network, mac) {
            return;
        }
        let limits = self.desired.limits_at(location);
        match self.learned.seen(now_ns, network, mac, location, limits) {
            Change::None => {}
            Change::Refused => {
                if let Location::Port(port) = location {
                    *self.desired.refused.entry(port).or_default() += 1;
                }
            }
            Change::New { evicted } => {
                if let Some(evicted) = evicted {
                    self.settle_station(network, evicted);
                }
                let is_change = evicted.is_some() || self.is_followed(network, mac);
                self.settle_station(network, mac);
                self.mark(if is_change { Dirty::Change } else { Dirty::Addition });
            }
            Change::Moved => {
                self.settle_station(network, mac);
                self.mark(Dirty::Change);
            }
        }
    }

    /// Lets time pass: stations that were silent too long are forgotten. Call it about once a second.
    pub fn tick(&mut self, now_ns: u64) {
        let silent = self.learned.age(now_ns);
        if !silent.is_empty() {
            self.settle_stations(silent);
            self.mark(Dirty::Change);
        }
        let silent = self.groups.age(now_ns);
        self.set_groups(silent);
        self.ask_for_groups(now_ns);
        self.resolve_tagged(now_ns);
    }

    /// Tells what an uplink is now, or why it is not usable.
    pub fn set_uplink(&mut self, port: PortId, uplink: Result<UplinkState, String>) {
        if self.underlay.set_uplink(port, uplink) {
            self.mark(Dirty::Change);
        }
    }

    /// An uplink as last told.
    pub fn uplink(&self, port: PortId) -> Option<&UplinkState> {
        self.underlay.uplink(port)
    }

    /// The links that are uplinks now.
    pub fn uplinks(&self) -> impl Iterator<Item = &str> {
        self.underlay.present().map(|(_, state)| state.link.as_str())
    }

    /// The port into the host's stack as last told.
    pub fn host(&self) -> Option<&HostState> {
        self.host.as_ref().ok()
    }

    /// Tells what the port into the host's stack is now, or why there is none.
    /// True if that is news.
    pub fn set_host(&mut self, host: Result<HostState, String>) -> bool {
        let is_news = self.host != host;
        if is_news {
            self.host = host;
            if let Some(index) = self.host_network().map(|network| network.index) {
                self.settle_network(index);
            }
            self.settle_host_addresses();
            self.mark(Dirty::Change);
        }
        is_news
    }

    /// VTEPs of all peers, whose next hops are wanted.
    pub fn vteps(&self) -> impl Iterator<Item = std::net::IpAddr> + '_ {
        self.desired.peers.values().flat_map(|peer| peer.spec.vteps())
    }

    /// Tells how the kernel would reach a VTEP: by so many ways of equal cost.
    pub fn set_next_hops(&mut self, vtep: std::net::IpAddr, next_hops: Vec<NextHop>) {
        let is_wanted = self.desired.by_vtep.contains_key(&vtep);
        if is_wanted && self.underlay.next_hops.get(&vtep) != Some(&next_hops) {
            self.underlay.next_hops.insert(vtep, next_hops);
            self.mark(Dirty::Change);
        }
    }

    /// The links of all access ports, with their numbers.
    pub fn links(&self) -> impl Iterator<Item = (PortId, &str)> {
        self.desired.ports.iter().map(|(&id, port)| (id, port.record.spec.link.as_str()))
    }

    /// The routes that each pod should have, with its namespace and MAC address.
    pub fn pod_routes(&self) -> impl Iterator<Item = PodRoutes> + '_ {
        self.desired.ports.keys().filter_map(|&id| {
            let info = self.port_info(id).ok()?;
            Some(PodRoutes { port: id, netns: info.netns?, mac: info.mac, routes: info.routes })
        })
    }

    /// The next snapshot, if anything has changed since the last one.
    pub fn take_snapshot(&mut self) -> Option<Arc<Snapshot>> {
        match self.dirty {
            Dirty::Nothing => return None,
            Dirty::Addition => {}
            Dirty::Change => self.generation += 1,
        }
        self.dirty = Dirty::Nothing;
        Some(Arc::new(self.compile()))
    }

    /// Has every flow decided anew, as after a change: something that is not in the snapshot is otherwise.
    pub fn invalidate(&mut self) {
        self.mark(Dirty::Change);
    }

    /// What a restart must know of policies and endpoints, and what has changed since the last call.
    pub fn take_journal(&mut self) -> Vec<JournalEntry> {
        self.policy.take_journal()
    }

    /// All that a restart must know of policies and endpoints.
    pub fn whole_journal(&self) -> Vec<JournalEntry> {
        self.policy.whole_journal()
    }

    /// Takes over what a former daemon knew of policies and endpoints; before [`restore`](Self::restore). What cannot be
    /// taken over is named in the result.
    pub fn restore_policies(&mut self, journal: Vec<JournalEntry>, backend: &mut dyn Backend) -> Vec<String> {
        self.replay(journal, backend)
    }

    /// What must survive a restart.
    pub fn state(&self, boot_id: &str) -> State {
        self.desired.state(boot_id)
    }

    /// Takes over what a former daemon left: its networks, peers and routes, then its ports, whose links are attached
    /// again. What cannot be taken over is named in the result.
    pub fn restore(&mut self, state: State, backend: &mut dyn Backend) -> Vec<String> {
        state::restore(self, state, backend)
    }

    /// Tries again to adopt ports that [`restore`](Self::restore) could not. Those whose links are gone are forgotten.
    pub fn adopt_waiting(&mut self, link_exists: impl Fn(&str) -> bool, backend: &mut dyn Backend) {
        state::adopt_waiting(self, link_exists, backend);
    }

    /// Ports that wait to be adopted.
    pub fn waiting(&self) -> usize {
        self.desired.waiting.len()
    }

    fn mark(&mut self, dirty: Dirty) {
        self.dirty = self.dirty.max(dirty);
    }
}
