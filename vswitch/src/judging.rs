//! The parts of the configuration that policies and connections have: `[policy]` and `[connections]`.

use serde::Deserialize;
use vswitch_control::Failsafe;
use vswitch_dataplane::connection::{ConnectionConfig, PickUp, Timeouts};

const SECOND: u64 = 1_000_000_000;

/// How policies are held.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Policy {
    pub(crate) failsafe_inbound: Vec<String>,
    pub(crate) failsafe_outbound: Vec<String>,
    pub(crate) require_endpoints: bool,
    pub(crate) keep_established: bool,
}

/// The table of connections.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Connections {
    pub(crate) limit: usize,
    pub(crate) port_limit: usize,
    pub(crate) pick_up: PickUpMode,
    pub(crate) pick_up_seconds: u64,
    /// Times in seconds.
    pub(crate) opening: u64,
    pub(crate) established: u64,
    pub(crate) fin_wait: u64,
    pub(crate) time_wait: u64,
    pub(crate) closed: u64,
    pub(crate) udp_new: u64,
    pub(crate) udp_replied: u64,
    pub(crate) icmp: u64,
    pub(crate) other: u64,
}

/// When TCP connections are taken up that were not seen from their beginning.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum PickUpMode {
    Never,
    Restart,
    Always,
}

impl Default for Policy {
    fn default() -> Self {
        // Those of Calico: remote login, DHCP, BGP, etcd, Typha, and the API server.
        let inbound =
            ["tcp/22", "udp/68", "tcp/179", "tcp/2379", "tcp/2380", "tcp/5473", "tcp/6443", "tcp/6666", "tcp/6667"];
        let outbound =
            ["udp/53", "udp/67", "tcp/179", "tcp/2379", "tcp/2380", "tcp/5473", "tcp/6443", "tcp/6666", "tcp/6667"];
        Policy {
            failsafe_inbound: inbound.map(str::to_owned).to_vec(),
            failsafe_outbound: outbound.map(str::to_owned).to_vec(),
            require_endpoints: false,
            keep_established: false,
        }
    }
}

impl Default for Connections {
    fn default() -> Self {
        let Timeouts {
            opening_ns,
            established_ns,
            fin_wait_ns,
            time_wait_ns,
            closed_ns,
            udp_new_ns,
            udp_replied_ns,
            icmp_ns,
            other_ns,
        } = Timeouts::default();
        Connections {
            limit: ConnectionConfig::default().limit,
            port_limit: ConnectionConfig::default().port_limit,
            pick_up: PickUpMode::Restart,
            pick_up_seconds: 60,
            opening: opening_ns / SECOND,
            established: established_ns / SECOND,
            fin_wait: fin_wait_ns / SECOND,
            time_wait: time_wait_ns / SECOND,
            closed: closed_ns / SECOND,
            udp_new: udp_new_ns / SECOND,
            udp_replied: udp_replied_ns / SECOND,
            icmp: icmp_ns / SECOND,
            other: other_ns / SECOND,
        }
    }
}

impl Policy {
    /// The ports that no policy closes, protocol and port: towards this node, and from it.
    pub(crate) fn failsafe(&self) -> Result<Failsafe, String> {
        let read = |key: &str, ports: &[String]| {
            let port = |text: &String| {
                let (protocol, port) = text.split_once('/')?;
                let number = match protocol {
                    "tcp" => 6,
                    "udp" => 17,
                    "sctp" => 132,
                    _ => return None,
                };
                Some((number, port.parse().ok().filter(|port| *port > 0)?))
            };
            let wrong = |text: &String| format!("policy.{key}: \"{text}\" is no port: write tcp/22, udp/53 or sctp/7");
            ports.iter().map(|text| port(text).ok_or_else(|| wrong(text))).collect::<Result<Vec<_>, _>>()
        };
        Ok(Failsafe {
            inbound: read("failsafe_inbound", &self.failsafe_inbound)?,
            outbound: read("failsafe_outbound", &self.failsafe_outbound)?,
        })
    }
}

impl Connections {
    /// The table that this describes.
    pub(crate) fn config(&self, policy: &Policy, seed: u64) -> ConnectionConfig {
        let ns = |seconds: u64| seconds.saturating_mul(SECOND);
        ConnectionConfig {
            limit: self.limit,
            port_limit: self.port_limit,
            timeouts: Timeouts {
                opening_ns: ns(self.opening),
                established_ns: ns(self.established),
                fin_wait_ns: ns(self.fin_wait),
                time_wait_ns: ns(self.time_wait),
                closed_ns: ns(self.closed),
                udp_new_ns: ns(self.udp_new),
                udp_replied_ns: ns(self.udp_replied),
                icmp_ns: ns(self.icmp),
                other_ns: ns(self.other),
            },
            pick_up: match self.pick_up {
                PickUpMode::Never => PickUp::Never,
                PickUpMode::Restart => PickUp::Until(ns(self.pick_up_seconds)),
                PickUpMode::Always => PickUp::Always,
            },
            keeps_established: policy.keep_established,
            seed,
        }
    }

    /// What cannot be.
    pub(crate) fn check(&self) -> Result<(), String> {
        if !(1024..=1 << 26).contains(&self.limit) {
            return Err(format!("connections.limit: {} is not allowed; allowed are 1024 to 67108864", self.limit));
        }
        // A flow entry lives for five seconds without a look at its connection.
        let times = [
            ("opening", self.opening),
            ("established", self.established),
            ("fin_wait", self.fin_wait),
            ("time_wait", self.time_wait),
            ("closed", self.closed),
            ("udp_new", self.udp_new),
            ("udp_replied", self.udp_replied),
            ("icmp", self.icmp),
            ("other", self.other),
        ];
        match times.into_iter().find(|(_, seconds)| *seconds < 6) {
            Some((key, seconds)) => {
                Err(format!("connections.{key}: {seconds} seconds are not allowed; allowed are 6 or more"))
            }
            None => Ok(()),
        }
    }
}
