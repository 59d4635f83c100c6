//! Requests about connections.

use std::net::{IpAddr, SocketAddr};

use vswitch_api::{Answer, ApiError, ConnectionFilter, ConnectionInfo, ConnectionsInfo};
use vswitch_dataplane::Translation;
use vswitch_dataplane::connection::{Entry, State};

use super::row::protocol_name;
use crate::backend::Backend;
use crate::checks::invalid;
use crate::{Control, Dirty};

const SECOND: u64 = 1_000_000_000;

impl Control {
    pub(crate) fn connection_list(
        &self,
        now_ns: u64,
        filter: &ConnectionFilter,
        limit: usize,
        backend: &mut dyn Backend,
    ) -> Result<Answer, ApiError> {
        let is_wanted = self.wanted(filter)?;
        let table = backend.connections();
        let entries = table.dump(now_ns, limit, is_wanted);
        let timeouts = table.config().timeouts;
        let counts = table.counts();
        let connections = entries.iter().map(|(entry, leaves_as)| {
            let text = |(address, port)| end_text(entry.key.protocol, address, port);
            let [source, destination] = entry.ends().map(text);
            let is_v6 = entry.ends()[0].0.is_ipv6();
            let idle = now_ns.saturating_sub(entry.used_ns);
            let timeout = entry.timeout_ns(&timeouts);
            ConnectionInfo {
                network: self.desired.network_name(entry.key.network),
                protocol: protocol_name(entry.key.protocol),
                source,
                destination,
                leaves_as: leaves_as.map(|to| to.ends(is_v6).map(text)),
                state: entry.state.name().to_owned(),
                age_seconds: now_ns.saturating_sub(entry.created_ns) / SECOND,
                idle_seconds: idle / SECOND,
                expires_seconds: timeout.saturating_sub(idle) / SECOND,
                is_picked_up: entry.is_picked_up,
                rules: entry.rules().into_iter().flatten().map(|rule| self.rule_text(rule)).collect(),
            }
        });
        Ok(Answer::Connections(Box::new(ConnectionsInfo {
            connections: connections.collect(),
            count: counts.count,
            limit: counts.limit,
            evicted: counts.evicted,
            expired: counts.expired,
            memory_bytes: counts.bytes,
        })))
    }

    pub(crate) fn connection_del(
        &mut self,
        filter: &ConnectionFilter,
        backend: &mut dyn Backend,
    ) -> Result<Answer, ApiError> {
        if *filter == ConnectionFilter::default() {
            return Err(invalid("say which connections: by network, address, port, protocol or state"));
        }
        let is_wanted = self.wanted(filter)?;
        let count = backend.connections().forget(is_wanted);
        // Flows that were made for them end with the generation.
        self.mark(Dirty::Change);
        Ok(Answer::Forgotten { count })
    }

    fn wanted(
        &self,
        filter: &ConnectionFilter,
    ) -> Result<impl Fn(&Entry, Option<&Translation>) -> bool + use<>, ApiError> {
        let network = match &filter.network {
            Some(name) => Some(self.desired.network(Some(name))?.index),
            None => None,
        };
        let protocol = match filter.protocol.as_deref() {
            None => None,
            Some(name) => Some(protocol_number(name)?),
        };
        let state = match filter.state.as_deref() {
            None => None,
            Some(name) => Some(State::ALL.into_iter().find(|state| state.name() == name).ok_or_else(|| {
                let names = State::ALL.map(State::name).join(", ");
                invalid(format!("state: \"{name}\" is not known; known are {names}"))
            })?),
        };
        let ConnectionFilter { address, port, .. } = *filter;
        Ok(move |entry: &Entry, leaves_as: Option<&Translation>| {
            network.is_none_or(|network| entry.key.network == network)
                && protocol.is_none_or(|protocol| entry.key.protocol == protocol)
                && state.is_none_or(|state| entry.state == state)
                && entry.all_ends(leaves_as).any(|(at, number)| {
                    address.is_none_or(|address| at == address) && port.is_none_or(|port| number == port)
                })
        })
    }
}

/// One end of a connection: with its port, if its protocol has ports.
pub(crate) fn end_text(protocol: u8, address: IpAddr, port: u16) -> String {
    match protocol {
        6 | 17 | 132 => SocketAddr::new(address, port).to_string(),
        _ => address.to_string(),
    }
}

/// A protocol's number by its name, or as it is.
pub(crate) fn protocol_number(name: &str) -> Result<u8, ApiError> {
    let known = [1_u8, 6, 17, 58, 132].into_iter().find(|&number| protocol_name(number) == name);
    known.or_else(|| name.parse().ok()).ok_or_else(|| {
        invalid(format!("protocol: \"{name}\" is not known: use tcp, udp, sctp, icmp, icmpv6 or a number"))
    })
}
