//! Rules in order to a row: who decides about each protocol and port.

use std::collections::BTreeMap;

use vswitch_dataplane::table::policy::{Judgement, Row, RuleId, Step, step};
use vswitch_policy::{Action, IcmpMatch, NamedPort, PortMatch, TierDefault, protocol};

/// A rule that is for the peer in question, or the end of a tier.
pub(crate) enum Line<'a> {
    /// A rule.
    Rule { action: Action, ports: Option<&'a [PortMatch]>, id: RuleId },
    /// The end of a tier that has a policy for the subject, and the number under which it denies.
    TierEnd { default: TierDefault, id: RuleId },
}

/// After the last place: protocols have eight bits and ports sixteen.
const END: u32 = 1 << 24;

/// Places that no rule has decided about, up to `end`.
#[derive(Clone, Copy)]
struct Open {
    end: u32,
    log: Option<RuleId>,
    /// Left to the next tier by a rule.
    is_passed: bool,
}

/// The first line that matches a place decides about it. `names` are the ports that the receiving side has names for.
pub(crate) fn build<'a>(lines: impl Iterator<Item = Line<'a>>, names: &[NamedPort]) -> Row {
    let mut open = BTreeMap::from([(0, Open { end: END, log: None, is_passed: false })]);
    let mut decided = Vec::new();
    for line in lines {
        if open.is_empty() {
            break;
        }
        match line {
            Line::Rule { action, ports, id } => match ports {
                None => apply(&mut open, &mut decided, (0, END), action, id),
                Some(ports) => {
                    for port in ports {
                        spans(port, names, |span| apply(&mut open, &mut decided, span, action, id));
                    }
                }
            },
            Line::TierEnd { default, id } => {
                if default == TierDefault::Deny {
                    open.retain(|&from, one| {
                        if !one.is_passed {
                            decided.push((from, judgement(false, id, one.log)));
                        }
                        one.is_passed
                    });
                }
                open.values_mut().for_each(|one| one.is_passed = false);
            }
        }
    }
    decided.extend(open.iter().map(|(&from, one)| (from, judgement(true, RuleId::NONE, one.log))));
    decided.sort_by_key(|(from, _)| *from);
    let mut steps: Vec<Step> = Vec::with_capacity(decided.len());
    for (from, judgement) in decided {
        if steps.last().is_none_or(|last| last.judgement != judgement) {
            steps.push(Step { from, judgement });
        }
    }
    steps.into()
}

fn judgement(is_allowed: bool, rule: RuleId, log: Option<RuleId>) -> Judgement {
    Judgement { is_allowed, rule, log }
}

/// Lets a rule act on what of a span is still open in its tier.
fn apply(
    open: &mut BTreeMap<u32, Open>,
    decided: &mut Vec<(u32, Judgement)>,
    (from, end): (u32, u32),
    action: Action,
    id: RuleId,
) {
    cut(open, from);
    cut(open, end);
    let inside: Vec<u32> = open.range(from..end).filter(|(_, one)| !one.is_passed).map(|(&at, _)| at).collect();
    for at in inside {
        let Some(one) = open.get_mut(&at) else { continue };
        match action {
            Action::Log => one.log = one.log.or(Some(id)),
            Action::Pass => one.is_passed = true,
            Action::Allow | Action::Deny => {
                decided.push((at, judgement(action == Action::Allow, id, one.log)));
                open.remove(&at);
            }
        }
    }
}

/// Makes a place the beginning of what is open there.
fn cut(open: &mut BTreeMap<u32, Open>, at: u32) {
    let Some((&from, one)) = open.range_mut(..at).next_back() else { return };
    if from < at && at < one.end {
        let rest = *one;
        one.end = at;
        open.insert(at, rest);
    }
}

/// The places that a match means, from and to.
fn spans(port: &PortMatch, names: &[NamedPort], mut take: impl FnMut((u32, u32))) {
    let all = |number: u8| (step(number, 0), step(number, 0) + (1 << 16));
    match port {
        PortMatch::Ports { protocol, first, last } => take((step(*protocol, *first), step(*protocol, *last) + 1)),
        PortMatch::Protocol(number) => take(all(*number)),
        PortMatch::Named { name, protocol: wanted } => {
            let named = names.iter().filter(|named| named.name == *name);
            for named in named.filter(|named| wanted.is_none_or(|wanted| wanted == named.protocol)) {
                take((step(named.protocol, named.port), step(named.protocol, named.port) + 1));
            }
        }
        PortMatch::Icmp(IcmpMatch { protocol, kind, code }) => match (kind, code) {
            (None, _) => take(all(*protocol)),
            (Some(kind), None) => {
                let first = u16::from(*kind) << 8;
                take((step(*protocol, first), step(*protocol, first | 0xff) + 1));
            }
            (Some(kind), Some(code)) => {
                let place = step(*protocol, u16::from(*kind) << 8 | u16::from(*code));
                take((place, place + 1));
            }
        },
    }
}

/// The name of a protocol, as `explain` and `observe` say it.
pub(crate) fn protocol_name(number: u8) -> String {
    match number {
        protocol::ICMP => "icmp".to_owned(),
        protocol::TCP => "tcp".to_owned(),
        protocol::UDP => "udp".to_owned(),
        protocol::ICMPV6 => "icmpv6".to_owned(),
        protocol::SCTP => "sctp".to_owned(),
        other => format!("ip/{other}"),
    }
}
