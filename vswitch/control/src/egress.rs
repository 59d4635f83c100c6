//! Requests about addresses that pods leave with.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use vswitch_api::{Answer, ApiError, EgressInfo, EgressSpec};
use vswitch_dataplane::table::egress::{EgressRule, EgressRules, Prefix};
use vswitch_net::NetworkIndex;

use crate::backend::Backend;
use crate::checks::{check_name, check_prefixes, check_unicast, conflict, invalid};
use crate::desired::{NetworkEntry, not_found};
use crate::translations::live;
use crate::{Control, Dirty};

/// An egress rule as it was asked for.
#[derive(Clone, Debug)]
pub(crate) struct EgressEntry {
    pub(crate) spec: EgressSpec,
    pub(crate) network: NetworkIndex,
    pub(crate) is_configured: bool,
}

impl Control {
    pub(crate) fn set_egress(&mut self, spec: EgressSpec) -> Result<Answer, ApiError> {
        check_name("egress rule", &spec.name)?;
        let network = self.routed(spec.network.as_deref())?;
        self.check_egress(&spec, network)?;
        if self.desired.is_configuring && self.desired.egress.contains_key(&spec.name) {
            return Err(conflict(format!("egress rule \"{}\" is there twice: name each once", spec.name)));
        }
        let before = self.translated();
        let (network, is_configured) = (network.index, self.desired.is_configuring);
        self.desired.parked_egress.retain(|parked| parked.name != spec.name);
        let name = spec.name.clone();
        let replaced = self.desired.egress.insert(name, EgressEntry { spec, network, is_configured });
        self.settle_egress(network);
        if let Some(elsewhere) = replaced.map(|entry| entry.network).filter(|other| *other != network) {
            self.settle_egress(elsewhere);
        }
        self.drain_since(&before);
        self.mark(Dirty::Change);
        Ok(Answer::Done)
    }

    fn check_egress(&self, spec: &EgressSpec, network: &NetworkEntry) -> Result<(), ApiError> {
        check_prefixes("sources", &spec.sources)?;
        check_prefixes("destinations", &spec.destinations)?;
        if spec.addresses.is_empty() {
            return Err(invalid("addresses: name at least one address to leave with"));
        }
        for (at, &address) in spec.addresses.iter().enumerate() {
            check_unicast("addresses", address)?;
            if spec.addresses[..at].contains(&address) {
                return Err(invalid(format!("addresses: {address} is there twice")));
            }
            self.check_nobodys("addresses", network, address)?;
            if network.spec.services.iter().any(|prefix| prefix.contains(&address))
                || self.tables.services.has_address(network.index, address)
            {
                return Err(conflict(format!(
                    "addresses: {address} is a service's, or lies in the network's `services`"
                )));
            }
            let is_source = |source: &IpNet| source.addr().is_ipv4() == address.is_ipv4();
            if !spec.sources.is_empty() && !spec.sources.iter().any(is_source) {
                return Err(invalid(format!(
                    "addresses: {address} has no source of its family: name one, or leave the address out"
                )));
            }
        }
        for (key, prefixes) in [("sources", &spec.sources), ("destinations", &spec.destinations)] {
            let has_address =
                |prefix: &&IpNet| spec.addresses.iter().any(|one| one.is_ipv4() == prefix.addr().is_ipv4());
            if let Some(prefix) = prefixes.iter().find(|prefix| !has_address(prefix)) {
                return Err(invalid(format!(
                    "{key}: there is no address of the family of {prefix} to leave with: name one"
                )));
            }
        }
        let mut own = network.spec.subnets.iter().chain(&network.spec.ranges);
        let is_inside =
            |prefix: &&IpNet| spec.destinations.iter().any(|to| to.contains(*prefix) || prefix.contains(to));
        if let Some(prefix) = own.find(is_inside) {
            return Err(invalid(format!(
                "destinations: they overlap {prefix}, where pods are, which know each other by their own addresses"
            )));
        }
        Ok(())
    }

    pub(crate) fn remove_egress(&mut self, name: &str) -> Result<Answer, ApiError> {
        let before = self.translated();
        let Some(entry) = self.desired.egress.remove(name) else {
            let parked = self.desired.parked_egress.len();
            self.desired.parked_egress.retain(|parked| parked.name != name);
            if self.desired.parked_egress.len() < parked {
                return Ok(Answer::Done);
            }
            let name = name.escape_default();
            return Err(not_found(format!("no egress rule \"{name}\": `switchctl egress list` shows them")));
        };
        self.settle_egress(entry.network);
        self.drain_since(&before);
        self.mark(Dirty::Change);
        Ok(Answer::Done)
    }

    /// Compiles the rules of a network, by their names.
    fn settle_egress(&mut self, network: NetworkIndex) {
        let everyone = [IpNet::V4(Default::default()), IpNet::V6(Default::default())];
        let rules = self.desired.egress.values().filter(|rule| rule.network == network).map(|rule| EgressRule {
            sources: prefixes(if rule.spec.sources.is_empty() { &everyone } else { &rule.spec.sources }),
            destinations: prefixes(&rule.spec.destinations),
            addresses: rule.spec.addresses.clone(),
        });
        let rules: Vec<EgressRule> = rules.collect();
        if rules.is_empty() {
            self.tables.egress.remove(&network);
        } else {
            self.tables.egress.insert(network, Arc::new(EgressRules::new(&rules)));
        }
        self.unsettled.egress.insert(network);
    }

    /// Addresses of a network that pods leave with.
    pub(crate) fn egress_addresses(&self, network: NetworkIndex) -> impl Iterator<Item = IpAddr> {
        let rules = self.desired.egress.values().filter(move |entry| entry.network == network);
        rules.flat_map(|entry| entry.spec.addresses.iter().copied())
    }

    pub(crate) fn egress_list(&self, now_ns: u64, backend: &mut dyn Backend) -> Answer {
        let mut counts: HashMap<(NetworkIndex, IpAddr), usize> = HashMap::new();
        live(now_ns, backend, |entry, ends, leaves_as| {
            if ends[0].ip() != leaves_as[0].ip() {
                *counts.entry((entry.key.network, leaves_as[0].ip())).or_default() += 1;
            }
        });
        let infos = self.desired.egress.values().map(|entry| {
            let count = |address: &IpAddr| counts.get(&(entry.network, *address)).copied().unwrap_or(0);
            let network = Some(self.desired.network_name(entry.network));
            let connections = entry.spec.addresses.iter().map(count).sum();
            EgressInfo { connections, spec: EgressSpec { network, ..entry.spec.clone() } }
        });
        Answer::Egress { rules: infos.collect() }
    }
}

fn prefixes(list: &[IpNet]) -> Vec<Prefix> {
    list.iter().map(|prefix| (prefix.addr(), prefix.prefix_len())).collect()
}
