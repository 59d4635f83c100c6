//! The kernel's tables as others write them: routes of routing daemons, forwarding entries of VXLAN devices.
//!
//! What there is comes first and whole, then changes one by one. When changes were lost, everything is read again and
//! compared. The other way, stations here are told to the bridge that a followed device belongs to, at a port of ours
//! there, so that the routing daemon finds them where it looks for stations.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;
use tracing::{debug, info, warn};
use vswitch_control::Control;
use vswitch_link::{
    Coming, ExternNeighbor, Forwarding, HOST_PROTOCOL, Kernel, KernelRoute, LinkError, LinkState, News, REMOTE_PROTOCOL,
};
use vswitch_net::{MacAddr, NetworkIndex};

use crate::config::Routes;

/// The bridge forgets a station that is not told again within five minutes.
const TELL_EVERY_NS: u64 = 60_000_000_000;

/// What is followed, as far as it is known.
#[derive(Debug, Default)]
pub(crate) struct Followed {
    routes: HashMap<IpNet, Candidates>,
    devices: BTreeMap<NetworkIndex, Device>,
    /// Links that are uplinks, by index.
    uplinks: Vec<u32>,
    /// Devices that are followed no more, whose bridges are to be told so.
    left: Vec<(NetworkIndex, Device)>,
    /// True until what is known is what the kernel has, changes that wait aside.
    is_stale: bool,
}

/// Takes back what an earlier daemon told the bridges of devices that this one does not follow.
pub(crate) async fn take_back(kernel: &Kernel, control: &std::cell::RefCell<Control>) {
    let wanted: Vec<String> = control.borrow().followers().iter().map(|(network, _)| face_of(*network)).collect();
    let Ok(all) = kernel.links().await else { return };
    let is_left = |link: &&LinkState| {
        let number = link.name.strip_prefix(FACE).is_some_and(|number| number.parse::<u16>().is_ok());
        link.is_veth && number && !wanted.contains(&link.name)
    };
    for face in all.iter().filter(is_left) {
        info!("{} is an earlier daemon's: it is removed", face.name);
        if let Some(bridge) = face.master
            && let Ok(told) = kernel.own_neighbors(bridge).await
        {
            for (address, _) in told {
                kernel.remove_neighbor(bridge, address).await;
            }
        }
        if let Err(error) = kernel.delete_pair(&face.name, &format!("{}-x", face.name)).await {
            warn!("link {} stays: {error}", face.name);
        }
    }
}

/// Our port of the bridge that a network's device belongs to.
const FACE: &str = "vsw-evpn";

fn face_of(network: NetworkIndex) -> String {
    format!("{FACE}{}", network.0)
}

/// The routes to a prefix, by priority and protocol, each with its gateways.
type Candidates = BTreeMap<(u32, u8), Vec<IpAddr>>;

/// A followed VXLAN device.
#[derive(Debug, Default)]
struct Device {
    ifindex: u32,
    /// True once it was said that there is no such link.
    is_missed: bool,
    stations: HashMap<MacAddr, IpAddr>,
    flood: HashSet<IpAddr>,
    /// The bridge that it is part of.
    bridge: u32,
    /// Addresses of stations elsewhere.
    addresses: HashMap<IpAddr, MacAddr>,
    /// Our port of the bridge, once made.
    face: Option<u32>,
    /// Addresses of stations here that the bridge was told of.
    told_addresses: HashMap<IpAddr, MacAddr>,
    /// Stations that the bridge was told of, and when.
    told: HashMap<MacAddr, u64>,
    /// Why the bridge could not be told of all.
    trouble: Option<String>,
}

impl Followed {
    /// Reads everything anew if it must be. What fails is tried again with the next call.
    pub(crate) async fn read(
        &mut self,
        kernel: &Kernel,
        config: &Routes,
        control: &std::cell::RefCell<Control>,
    ) -> Result<(), LinkError> {
        if !self.is_stale {
            return Ok(());
        }
        // A link is told to be down before its routes are dropped. Both happen under one lock of the kernel's, for which
        // this question waits.
        kernel.link("lo").await?;
        if config.is_importing() {
            let mut routes: HashMap<IpNet, Candidates> = HashMap::new();
            for route in kernel.kernel_routes().await? {
                let gateways = self.gateways_of(&route, config);
                if !gateways.is_empty() {
                    routes.entry(route.prefix).or_default().insert((route.priority, route.protocol), gateways);
                }
            }
            let mut control = control.borrow_mut();
            for prefix in self.routes.keys().filter(|prefix| !routes.contains_key(*prefix)) {
                control.import_route(*prefix, None);
            }
            for (prefix, candidates) in &routes {
                control.import_route(*prefix, best(candidates));
            }
            self.routes = routes;
            control.forget_unused_peers();
        }
        if !self.devices.is_empty() {
            let entries = kernel.forwarding().await?;
            let neighbors = kernel.extern_neighbors().await?;
            let mut control = control.borrow_mut();
            for (&network, device) in &mut self.devices {
                let ifindex = device.ifindex;
                let of_device = entries.iter().filter(|entry| entry.ifindex == ifindex);
                device.replace(network, of_device, &mut control);
                device.replace_addresses(network, &neighbors, &mut control);
            }
            control.forget_unused_peers();
        }
        self.is_stale = false;
        Ok(())
    }

    /// Takes a change in.
    pub(crate) fn hear(&mut self, news: News, config: &Routes, control: &mut Control) {
        match news {
            News::Route(route, coming) if config.is_importing() && route.table == config.table => {
                let key = (route.priority, route.protocol);
                let gateways = self.gateways_of(&route, config);
                if gateways.is_empty() && !self.routes.contains_key(&route.prefix) {
                    return;
                }
                let candidates = self.routes.entry(route.prefix).or_default();
                match coming {
                    Coming::Gone if route.prefix.addr().is_ipv6() => {
                        if let Some(known) = candidates.get_mut(&key) {
                            known.retain(|gateway| !gateways.contains(gateway));
                        }
                    }
                    Coming::Gone => {
                        candidates.remove(&key);
                    }
                    Coming::Replaced => {
                        candidates.retain(|(priority, _), _| *priority != route.priority);
                        candidates.insert(key, gateways);
                    }
                    Coming::Added => {
                        candidates.insert(key, gateways);
                    }
                }
                candidates.retain(|_, gateways| !gateways.is_empty());
                let best = best(candidates);
                if best.is_none() {
                    self.routes.remove(&route.prefix);
                }
                control.import_route(route.prefix, best);
            }
            News::Forwarding(entry, is_there) => {
                let device = self.devices.iter_mut().find(|(_, device)| device.ifindex == entry.ifindex);
                if let (Some((&network, device)), Some(vtep)) = (device, entry.vtep) {
                    device.hear(network, entry.mac, vtep, is_there, control);
                }
            }
            News::Neighbor(entry, is_there) => {
                let device = self.devices.iter_mut().find(|(_, device)| device.bridge == entry.ifindex);
                if let Some((&network, device)) = device {
                    device.hear_address(network, entry.address, entry.mac.filter(|_| is_there), control);
                }
            }
            News::Flushed { ifindex } => self.is_stale |= self.uplinks.contains(&ifindex),
            News::Route(..) => {}
        }
    }

    /// Changes may not have been heard.
    pub(crate) fn distrust(&mut self) {
        debug!("the kernel's tables are read again");
        self.is_stale = true;
    }

    /// Brings devices and uplinks up to date with the links there are.
    pub(crate) fn look(&mut self, all: &[LinkState], uplinks: &[u32], control: &Control) {
        let wanted = control.followers();
        self.is_stale |= self.uplinks != uplinks;
        self.uplinks = uplinks.to_vec();
        let devices = std::mem::take(&mut self.devices);
        let (kept, left) =
            devices.into_iter().partition(|(network, _)| wanted.iter().any(|(other, _)| other == network));
        self.devices = kept;
        self.left.extend::<BTreeMap<NetworkIndex, Device>>(left);
        for (network, name) in wanted {
            let link = all.iter().find(|link| link.name == name);
            let ifindex = link.map_or(0, |link| link.ifindex);
            let bridge = link.and_then(|link| link.master).unwrap_or(0);
            let device = self.devices.entry(network).or_default();
            if link.is_none() && !device.is_missed {
                warn!("network #{} follows {name}, and there is no such link yet", network.0);
            }
            device.is_missed = link.is_none();
            if (device.ifindex, device.bridge) != (ifindex, bridge) {
                info!("network #{} follows {name} ({ifindex})", network.0);
                device.ifindex = ifindex;
                device.bridge = bridge;
                self.is_stale = true;
            }
        }
    }

    /// Tells each device's bridge of the stations here. One that refuses is tried again with the next call.
    pub(crate) async fn tell(
        &mut self,
        kernel: &Kernel,
        all: &[LinkState],
        now_ns: u64,
        control: &std::cell::RefCell<Control>,
    ) {
        for (network, device) in std::mem::take(&mut self.left) {
            device.leave(network, kernel).await;
        }
        for (&network, device) in &mut self.devices {
            let Some(link) = all.iter().find(|link| link.ifindex == device.ifindex) else { continue };
            let Some(bridge) = link.master else { continue };
            let local = control.borrow().local_stations(network);
            let trouble = device.tell(network, kernel, (all, bridge), now_ns, local).await.err();
            let trouble = trouble.map(|error| error.to_string());
            if let Some(trouble) = trouble.as_ref().filter(|trouble| device.trouble.as_ref() != Some(trouble)) {
                warn!("the bridge of {} is not told of the stations here: {trouble}; it is tried again", link.name);
            }
            device.trouble = trouble;
        }
    }

    /// Takes our ports of bridges away.
    pub(crate) async fn remove(&self, kernel: &Kernel) {
        for (network, device) in &self.devices {
            device.leave(*network, kernel).await;
        }
    }

    /// True if there is anything to follow.
    pub(crate) fn is_needed(config: &Routes, control: &Control) -> bool {
        config.is_importing() || !control.followers().is_empty()
    }

    /// The gateways of a route that is to be followed: of the table, by a routing daemon, out of an uplink.
    fn gateways_of(&self, route: &KernelRoute, config: &Routes) -> Vec<IpAddr> {
        let is_wanted = route.table == config.table
            && ![HOST_PROTOCOL, REMOTE_PROTOCOL].contains(&route.protocol)
            && config.protocols.contains(&route.protocol);
        let by_uplink = |hop: &&vswitch_link::Route| self.uplinks.contains(&hop.ifindex);
        let gateways = route.next_hops.iter().filter(by_uplink).filter_map(|hop| hop.gateway);
        gateways.filter(|_| is_wanted).collect()
    }
}

/// The gateway of the route that the kernel would use: of the lowest priority, its first.
fn best(candidates: &Candidates) -> Option<IpAddr> {
    candidates.values().next()?.first().copied()
}

impl Device {
    async fn tell(
        &mut self,
        network: NetworkIndex,
        kernel: &Kernel,
        (all, bridge): (&[LinkState], u32),
        now_ns: u64,
        local: Vec<(MacAddr, Vec<IpAddr>)>,
    ) -> Result<(), LinkError> {
        let name = face_of(network);
        let face = match all.iter().find(|link| link.name == name) {
            Some(face) if face.master == Some(bridge) => face.ifindex,
            _ => kernel.create_bridge_face(&name, bridge).await?,
        };
        if self.face != Some(face) {
            self.told.clear();
            // What an earlier daemon told of stations that are gone is taken back below.
            self.told_addresses = kernel.own_neighbors(bridge).await?.into_iter().collect();
            self.face = Some(face);
        }
        let addresses: HashMap<IpAddr, MacAddr> =
            local.iter().flat_map(|(mac, addresses)| addresses.iter().map(|&address| (address, *mac))).collect();
        let stations: HashSet<MacAddr> = local.into_iter().map(|(mac, _)| mac).collect();
        let old: Vec<IpAddr> =
            self.told_addresses.keys().filter(|address| !addresses.contains_key(address)).copied().collect();
        for address in old {
            kernel.remove_neighbor(bridge, address).await;
            self.told_addresses.remove(&address);
        }
        for (address, mac) in addresses {
            if self.told_addresses.get(&address) != Some(&mac) {
                kernel.add_neighbor(bridge, address, mac).await?;
                self.told_addresses.insert(address, mac);
            }
        }
        let gone: Vec<MacAddr> = self.told.keys().filter(|mac| !stations.contains(mac)).copied().collect();
        for mac in gone {
            kernel.remove_forwarding(face, mac).await;
            self.told.remove(&mac);
        }
        for mac in stations {
            let is_due = self.told.get(&mac).is_none_or(|told| now_ns.saturating_sub(*told) >= TELL_EVERY_NS);
            if is_due {
                kernel.add_forwarding(face, mac).await?;
                self.told.insert(mac, now_ns);
                debug!("the bridge of network #{} was told of {mac}", network.0);
            }
        }
        Ok(())
    }

    /// Takes back what its bridge was told.
    async fn leave(&self, network: NetworkIndex, kernel: &Kernel) {
        for address in self.told_addresses.keys() {
            kernel.remove_neighbor(self.bridge, *address).await;
        }
        if self.face.is_some() {
            let _ = kernel.delete_link(&face_of(network)).await;
        }
    }

    fn hear(&mut self, network: NetworkIndex, mac: MacAddr, vtep: IpAddr, is_there: bool, control: &mut Control) {
        if mac.is_zero() {
            let is_new = if is_there { self.flood.insert(vtep) } else { self.flood.remove(&vtep) };
            if is_new {
                control.follow_flood(network, vtep, is_there);
            }
        } else if is_there {
            self.stations.insert(mac, vtep);
            // Said again after a move here that was not one: so it is always passed on.
            control.follow_station(network, mac, Some(vtep));
        } else if self.stations.get(&mac) == Some(&vtep) {
            self.stations.remove(&mac);
            control.follow_station(network, mac, None);
        }
    }

    fn hear_address(&mut self, network: NetworkIndex, address: IpAddr, mac: Option<MacAddr>, control: &mut Control) {
        match mac {
            Some(mac) => self.addresses.insert(address, mac),
            None => self.addresses.remove(&address),
        };
        control.follow_address(network, address, mac);
    }

    fn replace_addresses(&mut self, network: NetworkIndex, all: &[ExternNeighbor], control: &mut Control) {
        let ours = all.iter().filter(|entry| entry.ifindex == self.bridge);
        let now: HashMap<IpAddr, MacAddr> = ours.filter_map(|entry| Some((entry.address, entry.mac?))).collect();
        let gone: Vec<IpAddr> = self.addresses.keys().filter(|address| !now.contains_key(address)).copied().collect();
        gone.into_iter().for_each(|address| self.hear_address(network, address, None, control));
        now.into_iter().for_each(|(address, mac)| self.hear_address(network, address, Some(mac), control));
    }

    fn replace<'a>(
        &mut self,
        network: NetworkIndex,
        entries: impl Iterator<Item = &'a Forwarding>,
        control: &mut Control,
    ) {
        let (mut stations, mut flood) = (HashMap::new(), HashSet::new());
        for entry in entries {
            match entry.vtep {
                Some(vtep) if entry.mac.is_zero() => {
                    flood.insert(vtep);
                }
                Some(vtep) => {
                    stations.insert(entry.mac, vtep);
                }
                None => {}
            }
        }
        for mac in self.stations.keys().filter(|mac| !stations.contains_key(*mac)) {
            control.follow_station(network, *mac, None);
        }
        for (mac, vtep) in &stations {
            if self.stations.get(mac) != Some(vtep) {
                control.follow_station(network, *mac, Some(*vtep));
            }
        }
        for vtep in self.flood.difference(&flood) {
            control.follow_flood(network, *vtep, false);
        }
        for vtep in flood.difference(&self.flood) {
            control.follow_flood(network, *vtep, true);
        }
        self.stations = stations;
        self.flood = flood;
    }
}
