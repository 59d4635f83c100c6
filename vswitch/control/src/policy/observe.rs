//! Flow events: what workers tell of connections that policies denied or want told, with names.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};

use vswitch_api::{Answer, ApiError, FlowEvent, ObserveFilter};
use vswitch_dataplane::table::policy::RuleId;
use vswitch_dataplane::{DropReason, FlowNews};
use vswitch_net::{NetworkIndex, PortId};

use super::row::protocol_name;
use crate::backend::WorkerSample;
use crate::checks::invalid;
use crate::{Control, is_uplink};

/// Events that are kept for those who ask.
const KEPT: usize = 4096;

/// The latest events.
#[derive(Debug, Default)]
pub(crate) struct Observed {
    events: VecDeque<FlowEvent>,
    last: u64,
}

impl Control {
    /// Takes note of a flow event. `wall_ms` is the wall clock's time.
    pub(crate) fn observed(&mut self, wall_ms: u64, news: &FlowNews) {
        let fields = news.key.fields();
        let Some((source, destination)) = fields.addresses else { return };
        let with_port = |address: IpAddr, port: u16| match fields.protocol {
            6 | 17 | 132 => SocketAddr::new(address, port).to_string(),
            _ => address.to_string(),
        };
        let from = self.name_of_end(fields.network, source, Some(fields.ingress));
        let to = self.name_of_end(fields.network, destination, news.to);
        self.observed.last += 1;
        let event = FlowEvent {
            number: self.observed.last,
            time_ms: wall_ms,
            verdict: if news.refused.is_some() { "denied" } else { "allowed" }.to_owned(),
            network: self.desired.network_name(fields.network),
            from,
            source: with_port(source, fields.ports.source),
            to,
            destination: with_port(destination, fields.ports.destination),
            protocol: protocol_name(fields.protocol),
            reason: news.refused.map(|reason| reason.name().to_owned()),
            rule: news.rule.map(|rule| self.rule_text(rule)),
        };
        if self.observed.events.len() == KEPT {
            self.observed.events.pop_front();
        }
        self.observed.events.push_back(event);
    }

    pub(crate) fn observe(
        &self,
        after: Option<u64>,
        filter: &ObserveFilter,
        workers: &[WorkerSample],
    ) -> Result<Answer, ApiError> {
        if let Some(verdict) = &filter.verdict
            && !["denied", "allowed"].contains(&verdict.as_str())
        {
            return Err(invalid(format!("verdict: \"{verdict}\" is not known: use denied or allowed")));
        }
        if let Some(reason) = &filter.reason
            && !DropReason::ALL.iter().any(|known| known.name() == reason)
        {
            return Err(invalid(format!(
                "reason: \"{reason}\" is not known: `switchctl drops` names those that happen"
            )));
        }
        let endpoint = filter.endpoint.as_ref().map(|end| {
            let port = self.desired.port_of_link(end).and_then(|port| self.policy.port(port));
            port.map_or_else(|| end.clone(), |(name, ..)| name.to_string())
        });
        let is_wanted = |event: &&FlowEvent| {
            event.number > after.unwrap_or(0)
                && filter.verdict.as_ref().is_none_or(|verdict| event.verdict == *verdict)
                && filter.reason.as_ref().is_none_or(|reason| event.reason.as_ref() == Some(reason))
                && endpoint.as_ref().is_none_or(|end| is_end(event, end))
        };
        let events = self.observed.events.iter().filter(is_wanted).cloned().collect();
        let lost = workers.iter().map(|worker| worker.counters.events_lost).sum();
        Ok(Answer::Events { events, last: self.observed.last, lost })
    }

    /// A rule in words: object, place and line.
    pub(crate) fn rule_text(&self, rule: RuleId) -> String {
        let Some(key) = self.policy.compiler.rules.key(rule) else { return "a rule that is gone".to_owned() };
        let policy = self.policy.compiler.policy(&key.policy);
        let place = match (key.at, policy) {
            (Some(at), Some(policy)) => match policy.rules(key.direction).and_then(|rules| rules.get(at)) {
                Some(rule) => format!(" {} ({}:{})", rule.path, policy.source.file, rule.line),
                None => String::new(),
            },
            (None, Some(policy)) => {
                let direction = super::requests::direction_name(key.direction);
                format!(" {direction}: no rule matches ({}:{})", policy.source.file, policy.source.line)
            }
            (_, None) => String::new(),
        };
        format!("{}{place}", key.policy)
    }

    /// Who an end of a flow is, in words.
    fn name_of_end(&self, network: NetworkIndex, address: IpAddr, port: Option<PortId>) -> String {
        if let Some(name) = self.policy.name_at(network, address) {
            return name;
        }
        match port {
            Some(port) if !is_uplink(port) && self.desired.ports.contains_key(&port) => self.desired.link_name(port),
            _ => "world".to_owned(),
        }
    }
}

/// True if one end of an event is what was asked for.
fn is_end(event: &FlowEvent, wanted: &str) -> bool {
    let is_meant = |name: &str, at: &str| {
        let address = at.parse::<SocketAddr>().map_or_else(|_| at.to_owned(), |at| at.ip().to_string());
        name == wanted || (wanted.ends_with('/') && name.starts_with(wanted)) || address == wanted
    };
    is_meant(&event.from, &event.source) || is_meant(&event.to, &event.destination)
}
