//! What workers counted and hold: flows, packets by port, drops by reason.

use std::collections::BTreeMap;
use std::net::IpAddr;

use vswitch_api::{DropInfo, FlowInfo, PerfInfo, PortStats, SocketInfo, StageInfo, StatsInfo, WorkerInfo};
use vswitch_dataplane::table::flow::Flow;
use vswitch_dataplane::{Action, DropReason, Output, PortCounters, Stage};
use vswitch_net::PortId;

use crate::Control;
use crate::backend::{Backend, WorkerSample};
use crate::policy::end_text;

/// A flow is shown if it had a packet within this time.
const FLOW_RECENT_NS: u64 = 10_000_000_000;

impl Control {
    pub(crate) fn flows(&self, now_ns: u64, limit: usize, backend: &mut dyn Backend) -> Vec<FlowInfo> {
        let samples = backend.flows(now_ns.saturating_sub(FLOW_RECENT_NS), limit);
        let flows = samples.iter().flat_map(|sample| sample.flows.iter().map(|flow| (sample.worker, flow)));
        flows.take(limit).map(|(worker, flow)| self.flow_info(now_ns, worker, flow)).collect()
    }

    fn flow_info(&self, now_ns: u64, worker: usize, flow: &Flow) -> FlowInfo {
        let Flow { entry: flow, translation: leaves_as, is_offloaded } = flow;
        let fields = flow.key.fields();
        let from = match fields.peer {
            Some(peer) => format!("peer {}", self.desired.peer_name(peer)),
            None => format!("port {}", self.link_name(fields.ingress)),
        };
        let with_port = |address: IpAddr, port: u16| end_text(fields.protocol, address, port);
        let (source, destination) = match fields.addresses {
            Some((source, destination)) => {
                (with_port(source, fields.ports.source), with_port(destination, fields.ports.destination))
            }
            None => (fields.source_mac.to_string(), fields.destination_mac.to_string()),
        };
        let Action { rewrite, output, .. } = flow.action;
        let action = match output {
            Output::Port(port) => format!("port {}", self.link_name(port)),
            Output::Encap { peer, network } => {
                let network = self.desired.network_name(network);
                format!("vxlan {network} to peer {}", self.desired.peer_name(peer))
            }
            Output::Deny(_) => "drop: policy-denied".to_owned(),
        };
        FlowInfo {
            worker,
            network: self.desired.network_name(fields.network),
            from,
            source,
            destination,
            protocol: protocol_name(fields.protocol, fields.addresses.is_some()),
            action: if rewrite.is_some() { format!("route, {action}") } else { action },
            leaves_as: leaves_as.map(|to| {
                let is_v6 = fields.addresses.is_some_and(|(source, _)| source.is_ipv6());
                to.ends(is_v6).map(|(address, port)| with_port(address, port))
            }),
            packets: flow.packets,
            bytes: flow.bytes,
            idle_ms: now_ns.saturating_sub(flow.used_ns) / 1_000_000,
            offloaded: *is_offloaded,
        }
    }

    pub(crate) fn perf(&self, workers: &[WorkerSample]) -> Vec<PerfInfo> {
        let info = |(worker, sample): (usize, &WorkerSample)| {
            let stage =
                |stage: Stage| StageInfo { stage: stage.name().to_owned(), cycles: sample.perf.cycles[stage as usize] };
            PerfInfo {
                worker,
                core: sample.core,
                busy_ns: sample.times.busy_ns,
                idle_ns: sample.times.idle_ns,
                asleep_ns: sample.times.asleep_ns,
                cycles: sample.times.cycles,
                turns: sample.turns,
                sleeps: sample.sleeps,
                packets: sample.counters.total().rx_packets - sample.counters.offloaded,
                offloaded: sample.counters.offloaded,
                flow_hits: sample.counters.flow_hits,
                flow_misses: sample.counters.flow_misses,
                bursts: sample.perf.bursts.to_vec(),
                timed_packets: sample.perf.timed_packets,
                stages: Stage::ALL.map(stage).to_vec(),
            }
        };
        workers.iter().enumerate().map(info).collect()
    }

    pub(crate) fn stats(&self, workers: &[WorkerSample]) -> StatsInfo {
        let ids = self.special_ports().chain(self.desired.ports.keys().copied());
        let ports = ids.map(|id| self.port_stats(id, workers)).collect();
        let mut total = PortCounters::default();
        workers.iter().for_each(|worker| total.add(&worker.counters.total()));
        StatsInfo {
            ports,
            rx_packets: total.rx_packets,
            tx_packets: total.tx_packets,
            drops: total.dropped(),
            copies: total.copies,
            merged: total.merged,
            is_balanced: workers.iter().all(|worker| worker.counters.balance().is_ok()),
        }
    }

    fn port_stats(&self, id: PortId, workers: &[WorkerSample]) -> PortStats {
        let mut sum = PortCounters::default();
        let mut sockets = Vec::new();
        for (worker, sample) in workers.iter().enumerate() {
            sum.add(&sample.counters.port(id));
            sockets.extend(sample.sockets.iter().filter(|socket| socket.port == Some(id)).map(|socket| SocketInfo {
                worker,
                rx_dropped: socket.kernel.rx_dropped,
                rx_ring_full: socket.kernel.rx_ring_full,
                rx_fill_ring_empty: socket.kernel.rx_fill_ring_empty,
                invalid_descs: socket.kernel.rx_invalid_descs + socket.kernel.tx_invalid_descs,
                fill_depth: socket.fill_depth,
                kicks: socket.kicks.kicks,
                kick_errors: socket.kicks.kick_errors,
                oversized: socket.kicks.oversized,
            }));
        }
        PortStats {
            id,
            link: self.link_name(id),
            rx_packets: sum.rx_packets,
            rx_bytes: sum.rx_bytes,
            tx_packets: sum.tx_packets,
            tx_bytes: sum.tx_bytes,
            drops: sum.dropped(),
            copies: sum.copies,
            merged: sum.merged,
            tx_refused: sum.tx_refused,
            sockets,
        }
    }

    pub(crate) fn drops(&self, workers: &[WorkerSample]) -> Vec<DropInfo> {
        let ids = || self.special_ports().chain(self.desired.ports.keys().copied());
        let count = |id: PortId, reason: DropReason| -> u64 {
            workers.iter().map(|worker| worker.counters.port(id).drops[reason.index()]).sum()
        };
        let total = |reason: DropReason| -> u64 {
            workers.iter().map(|worker| worker.counters.total().drops[reason.index()]).sum()
        };
        let mut drops: Vec<DropInfo> = DropReason::ALL
            .iter()
            .map(|&reason| DropInfo {
                reason: reason.name().to_owned(),
                packets: total(reason),
                meaning: reason.sentence().to_owned(),
                ports: ids()
                    .map(|id| (self.link_name(id), count(id, reason)))
                    .filter(|(_, count)| *count > 0)
                    .collect::<BTreeMap<_, _>>(),
            })
            .filter(|info| info.packets > 0)
            .collect();
        drops.sort_by_key(|info| std::cmp::Reverse(info.packets));
        drops
    }
}

pub(crate) fn worker_info(worker: usize, sample: &WorkerSample) -> WorkerInfo {
    WorkerInfo {
        worker,
        core: sample.core,
        umem_frames: sample.umem_frames,
        umem_free: sample.umem_free,
        errors_sent: sample.counters.errors_sent,
        errors_held: sample.counters.errors_held,
        flow_hits: sample.counters.flow_hits,
        flow_misses: sample.counters.flow_misses,
        events_lost: sample.counters.events_lost,
        turns: sample.turns,
        sleeps: sample.sleeps,
    }
}

fn protocol_name(protocol: u8, is_ip: bool) -> String {
    match protocol {
        _ if !is_ip => "ethernet".to_owned(),
        1 => "icmp".to_owned(),
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        58 => "icmpv6".to_owned(),
        132 => "sctp".to_owned(),
        other => format!("ip/{other}"),
    }
}
