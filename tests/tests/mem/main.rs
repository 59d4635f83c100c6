//! Whole switches in memory: no privilege, no clock, no thread. After every step all counters are compared.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod bad_input;
mod bridged;
mod connections;
mod control;
mod fastpath;
mod floors;
mod forged;
mod groups;
mod host;
mod lan;
mod model;
mod nat;
mod offload;
mod oracle;
mod policy;
mod policy_cases;
mod ports;
mod precedence;
mod routed;
mod router;
mod tagged;
mod tcp;
mod underlay;
mod vxlan;

use vswitch_net::MacAddr;

/// The MAC of station `number`.
fn mac(number: u8) -> MacAddr {
    MacAddr([2, 0, 0, 0, 0, number])
}
