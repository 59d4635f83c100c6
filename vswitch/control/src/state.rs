//! What survives a restart, as one JSON document in the runtime directory.
//!
//! Written whole after every change. Ports name their links; after a reboot the links are gone, and with them the ports:
//! the boot id tells the two cases apart even if names are used again.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use vswitch_api::{
    EgressSpec, ErrorCode, FdbSpec, FdbTarget, MirrorSpec, NetworkSpec, PeerSpec, PortSpec, Request, RouteSpec,
    ServiceSpec,
};
use vswitch_net::PortId;

use crate::Control;
use crate::backend::Backend;
use crate::desired::Desired;

/// A port as it was plugged in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortRecord {
    /// Its number.
    pub id: PortId,
    /// What was asked for, addresses filled in.
    pub spec: PortSpec,
    /// MTU of its link.
    pub mtu: u32,
}

/// A port of a former daemon that could not be adopted yet.
#[derive(Debug)]
pub(crate) struct Waiting {
    pub(crate) record: PortRecord,
    /// Why.
    pub(crate) reason: String,
    /// Stations that were asked for at it.
    pub(crate) stations: Vec<FdbSpec>,
}

/// The document.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// `/proc/sys/kernel/random/boot_id` when it was written.
    pub boot_id: String,
    /// Networks that requests made.
    pub networks: Vec<NetworkSpec>,
    /// Peers that requests made.
    pub peers: Vec<PeerSpec>,
    /// Routes that requests made.
    pub routes: Vec<RouteSpec>,
    /// Stations that requests made.
    pub stations: Vec<FdbSpec>,
    /// All ports.
    pub ports: Vec<PortRecord>,
    /// Mirrors.
    #[serde(default)]
    pub mirrors: Vec<MirrorSpec>,
    /// Services that requests made.
    #[serde(default)]
    pub services: Vec<ServiceSpec>,
    /// Egress rules that requests made.
    #[serde(default)]
    pub egress: Vec<EgressSpec>,
    /// Network, range and last address of the built-in IPAM; numbers as text, being larger than JSON's.
    pub cursors: Vec<(String, IpNet, String)>,
}

/// Restores in the order of dependence. Gives a sentence for everything that could not be.
pub(crate) fn restore(control: &mut Control, state: State, backend: &mut dyn Backend) -> Vec<String> {
    let mut lost = Vec::new();
    let State { networks, peers, routes, stations, ports, mirrors, services, egress, cursors, .. } = state;
    let early = networks.into_iter().map(Request::NetworkAdd).chain(peers.into_iter().map(Request::PeerAdd));
    for request in early.chain(routes.into_iter().map(Request::RouteAdd)) {
        if let Err(error) = control.apply(request, backend) {
            let is_conflict = error.code == ErrorCode::Conflict;
            let why = if is_conflict { "what a request made gives way to the configuration: " } else { "" };
            lost.push(format!("{why}{}", error.message));
        }
    }
    // What has another of its name in the configuration has given way. All at once, or one by one if any is in the way: what
    // cannot be taken over keeps nothing else from it.
    let services: Vec<ServiceSpec> =
        services.into_iter().filter(|spec| !control.desired.services.contains_key(&spec.name)).collect();
    if control.apply(Request::ServiceSet { services: services.clone() }, backend).is_err() {
        for spec in services {
            if let Err(error) = control.apply(Request::ServiceSet { services: vec![spec.clone()] }, backend) {
                lost.push(format!("{}; it is kept for the next start", error.message));
                control.desired.parked_services.push(spec);
            }
        }
    }
    for spec in egress.into_iter().filter(|spec| !control.desired.egress.contains_key(&spec.name)).collect::<Vec<_>>() {
        if let Err(error) = control.apply(Request::EgressSet(spec.clone()), backend) {
            lost.push(format!("egress rule \"{}\": {}; it is kept for the next start", spec.name, error.message));
            control.desired.parked_egress.push(spec);
        }
    }
    for (network, range, at) in cursors {
        if let Ok(at) = at.parse() {
            control.desired.cursors.insert((network, range), at);
        }
    }
    for record in ports {
        if let Err(error) = adopt(control, record.clone(), backend) {
            lost.push(format!("port of link {}: {error}", record.spec.link));
            control.desired.waiting.push(Waiting { record, reason: error, stations: Vec::new() });
        }
    }
    for station in stations {
        let of = |waiting: &&mut Waiting| station.at == FdbTarget::Port(waiting.record.spec.link.clone());
        if let Some(waiting) = control.desired.waiting.iter_mut().find(of) {
            waiting.stations.push(station);
            continue;
        }
        if let Err(error) = control.apply(Request::FdbAdd(station), backend) {
            lost.push(error.message);
        }
    }
    // A mirror waits, like the ports that it names; one whose ports are gone would wait for others of the same names.
    let is_there = |desired: &Desired, link: &str| {
        desired.port_of_link(link).is_some() || desired.waiting.iter().any(|waiting| waiting.record.spec.link == link)
    };
    for mut mirror in mirrors {
        mirror.ports.retain(|link| is_there(&control.desired, link));
        let has_end = if let FdbTarget::Port(link) = &mirror.to { is_there(&control.desired, link) } else { true };
        if mirror.ports.is_empty() || !has_end {
            lost.push(format!("mirror \"{}\": its ports are gone", mirror.name));
        } else {
            control.desired.mirrors.insert(mirror.name.clone(), mirror);
        }
    }
    lost
}

/// Tries again to adopt ports that wait, with the stations that were asked for at them. Those whose links are gone are
/// forgotten.
pub(crate) fn adopt_waiting(control: &mut Control, link_exists: impl Fn(&str) -> bool, backend: &mut dyn Backend) {
    control.forget_waiting(|record| !link_exists(&record.spec.link));
    for waiting in std::mem::take(&mut control.desired.waiting) {
        match adopt(control, waiting.record.clone(), backend) {
            Err(reason) => control.desired.waiting.push(Waiting { reason, ..waiting }),
            Ok(()) => {
                for station in waiting.stations {
                    // One that was asked for again meanwhile is there already.
                    let _ = control.apply(Request::FdbAdd(station), backend);
                }
            }
        }
    }
}

/// Makes a port again of its record.
pub(crate) fn adopt(control: &mut Control, record: PortRecord, backend: &mut dyn Backend) -> Result<(), String> {
    let network = control.desired.network(record.spec.network.as_deref()).map_err(|error| error.message)?.clone();
    control.check_port(&record.spec, &network).map_err(|error| error.message)?;
    if control.desired.ports.contains_key(&record.id) {
        return Err(format!("number {} is taken", record.id));
    }
    control.insert_port(record, &network, backend).map_err(|error| error.message)
}
