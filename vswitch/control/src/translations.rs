//! What services and egress rules have in common: whose their addresses may be, and what becomes of connections when they
//! change.
//!
//! A connection keeps what it began with, and the host its route to the address for as long as one does. Only what has no end
//! by which its sides would notice (datagrams) begins anew when it would go another way now.

use std::collections::{BTreeSet, HashSet};
use std::net::{IpAddr, SocketAddr};

use vswitch_api::{ApiError, NetworkMode};
use vswitch_dataplane::Translation;
use vswitch_dataplane::connection::{Entry, State};
use vswitch_dataplane::table::route::NextHop;
use vswitch_dataplane::table::service::Front;
use vswitch_net::NetworkIndex;

use crate::backend::Backend;
use crate::checks::{conflict, invalid};
use crate::desired::NetworkEntry;
use crate::routes::routers;
use crate::{Control, Dirty, HOST_PORT};

pub(crate) const UDP: u8 = 17;
const TCP: u8 = 6;
const SCTP: u8 = 132;

/// What has changed since connections were last looked at.
#[derive(Debug, Default)]
pub(crate) struct Unsettled {
    pub(crate) fronts: HashSet<Front>,
    pub(crate) egress: BTreeSet<NetworkIndex>,
}

/// Addresses that translation speaks for.
pub(crate) type Translated = BTreeSet<(NetworkIndex, IpAddr)>;

impl Control {
    pub(crate) fn routed(&self, name: Option<&str>) -> Result<&NetworkEntry, ApiError> {
        let network = self.desired.network(name)?;
        if network.spec.mode != NetworkMode::Routed {
            return Err(invalid(format!(
                "network: \"{}\" is bridged; addresses are translated where the switch routes",
                network.spec.name
            )));
        }
        Ok(network)
    }

    /// Refuses an address that somebody has.
    pub(crate) fn check_nobodys(&self, key: &str, network: &NetworkEntry, address: IpAddr) -> Result<(), ApiError> {
        let waiting = self.desired.waiting.iter().map(|waiting| &waiting.record.spec);
        let mut waiting = waiting.filter(|spec| spec.network.as_deref().is_none_or(|name| name == network.spec.name));
        let is_routed = |prefix: &ipnet::IpNet| prefix.prefix_len() > 0 && prefix.contains(&address);
        let routes = self.desired.routes.keys().chain(self.desired.imported.keys());
        let whose = match () {
            () if self.desired.by_address.contains_key(&(network.index, address))
                || waiting.any(|spec| spec.addresses.contains(&address)) =>
            {
                "is a pod's"
            }
            () if routers(&network.spec).contains(&address)
                || self.host_addresses.contains(&address)
                || self.underlay.is_ours(address) =>
            {
                "is this node's"
            }
            () if self.desired.by_vtep.contains_key(&address) || self.underlay.is_next_hop(address) => {
                "is another node's"
            }
            () if routes.clone().any(|(of, prefix)| *of == network.index && is_routed(prefix)) => "is routed to a peer",
            () => return Ok(()),
        };
        Err(conflict(format!("{key}: {address} {whose}: choose one that nobody has")))
    }

    /// What names a network, and so must go before it does.
    pub(crate) fn translations_of(&self, network: NetworkIndex) -> Option<String> {
        let service = self.desired.services.values().find(|entry| entry.front.network == network);
        let egress = self.desired.egress.values().find(|entry| entry.network == network);
        let service = service.map(|entry| format!("service \"{}\"", entry.spec.name));
        service.or_else(|| egress.map(|entry| format!("egress rule \"{}\"", entry.spec.name)))
    }

    /// All addresses that translation speaks for.
    pub(crate) fn translated(&self) -> Translated {
        let services = self.desired.services.values().map(|entry| (entry.front.network, entry.front.address));
        let egress = self.desired.egress.values();
        services.chain(egress.flat_map(|rule| rule.spec.addresses.iter().map(|&one| (rule.network, one)))).collect()
    }

    /// Addresses of a network whose packets are to come to the switch, because translation speaks for them, or did so and
    /// connections still use them.
    pub(crate) fn translated_addresses(&self, network: NetworkIndex) -> BTreeSet<IpAddr> {
        let all = self.translated().into_iter().chain(self.draining.iter().copied());
        all.filter(|(of, _)| *of == network).map(|(_, address)| address).collect()
    }

    /// What translation no longer speaks for is kept for its connections.
    pub(crate) fn drain_since(&mut self, before: &Translated) {
        let now = self.translated();
        self.draining.extend(before.difference(&now));
        self.draining.retain(|address| !now.contains(address));
    }

    /// Gives up addresses that no connection uses any more. True if there were any.
    pub fn drain(&mut self, now_ns: u64, backend: &mut dyn Backend) -> bool {
        if self.draining.is_empty() {
            return false;
        }
        let mut used = Translated::new();
        live(now_ns, backend, |entry, ends, leaves_as| {
            let both = [ends[1].ip(), leaves_as[0].ip()].map(|address| (entry.key.network, address));
            used.extend(both.into_iter().filter(|one| self.draining.contains(one)));
        });
        let before = self.draining.len();
        self.draining.retain(|address| used.contains(address));
        self.draining.len() < before
    }

    /// Lets datagrams' connections begin anew that would go another way since the last request. Call it after the request is
    /// in force on every worker: one that has not heard of it would begin them as they were. True if there were any, and a
    /// snapshot with them that flow entries do not outlive.
    pub fn settle_connections(&mut self, backend: &mut dyn Backend) -> bool {
        let changed = std::mem::take(&mut self.unsettled);
        if changed.fronts.is_empty() && changed.egress.is_empty() {
            return false;
        }
        let has_any = backend.connections().retire(|entry, leaves_as| self.is_stale(&changed, entry, leaves_as));
        if has_any {
            self.mark(Dirty::Change);
        }
        has_any
    }

    fn is_stale(&self, changed: &Unsettled, entry: &Entry, leaves_as: Option<&Translation>) -> bool {
        let (network, protocol) = (entry.key.network, entry.key.protocol);
        if protocol == TCP || protocol == SCTP {
            return false;
        }
        let [source, asked] = entry.ends();
        let [left, answering] = leaves_as.map_or([source, asked], |to| to.ends(source.0.is_ipv6()));
        let front = Front { network, address: asked.0, port: asked.1, protocol };
        if changed.fronts.contains(&front) {
            let is_backend = |ends: &[(IpAddr, u16)]| ends.contains(&answering);
            return match self.tables.services.lookup(&front) {
                Some(backends) => !is_backend(&backends.ends),
                None => answering != asked,
            };
        }
        // Who reaches itself leaves as the service.
        let is_own = left.0 == asked.0 || !self.desired.by_address.contains_key(&(network, source.0));
        if !changed.egress.contains(&network) || is_own {
            return false;
        }
        let is_beyond = || self.is_beyond(network, answering.0);
        let rules = self.tables.egress.get(&network);
        let wanted = rules.and_then(|rules| rules.lookup(source.0, answering.0, is_beyond));
        left.0 != wanted.unwrap_or(source.0)
    }

    /// True for what leaves a network by way of the host, and is not the host.
    fn is_beyond(&self, network: NetworkIndex, address: IpAddr) -> bool {
        let next_hop = self.tables.routes.lookup(network, address);
        let own = self.desired.networks.values().find(|entry| entry.index == network);
        matches!(next_hop, Some(NextHop::Port { port, .. }) if port == HOST_PORT)
            && !self.host_addresses.contains(&address)
            && !own.is_some_and(|entry| routers(&entry.spec).contains(&address))
    }
}

/// Looks at every translated connection that is not over: who began it and whom it asked for, and what that leaves as.
pub(crate) fn live(
    now_ns: u64,
    backend: &mut dyn Backend,
    mut each: impl FnMut(&Entry, [SocketAddr; 2], [SocketAddr; 2]),
) {
    backend.connections().dump(now_ns, usize::MAX, |entry, leaves_as| {
        let is_over = matches!(entry.state, State::TimeWait | State::Closed | State::Shutdown);
        if let (Some(to), false) = (leaves_as, is_over) {
            let ends = entry.ends();
            each(entry, ends.map(SocketAddr::from), to.ends(ends[0].0.is_ipv6()).map(SocketAddr::from));
        }
        false
    });
}
