//! Which flows are handed to the kernel, how they are kept there, and that what it forwards is in the books.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use vswitch_api::{PortInfo, Request};
use vswitch_dataplane::FastIo;
use vswitch_net::{GATEWAY_MAC, PortId};
use vswitch_tests::frames::{Ends, partial, udp, udp_with};
use vswitch_tests::mem::Switch;
use vswitch_xsk::{FastCounts, FastFlow, FastKey, FastStamp, FastTarget};

use super::mac;

const PACKETS: usize = 16;

/// The kernel, as far as the data path knows it.
#[derive(Clone, Debug, Default)]
struct Kernel(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    slots: BTreeMap<u32, Slot>,
    freed: Vec<u32>,
    next: u32,
}

#[derive(Debug)]
struct Slot {
    key: FastKey,
    flow: FastFlow,
    /// None if it is stopped.
    stamp: Option<FastStamp>,
    counts: FastCounts,
}

impl Kernel {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// The only flow, if there is one that is not stopped.
    fn only(&self) -> Option<(FastKey, FastFlow, FastStamp)> {
        let state = self.state();
        let mut live = state.slots.values().filter_map(|slot| Some((slot.key, slot.flow, slot.stamp?)));
        let only = live.next();
        assert!(live.next().is_none(), "more than one flow");
        only
    }

    /// Forwards so many packets of the only flow.
    fn forward(&self, packets: u64, bytes: u64) {
        let mut state = self.state();
        let slot = state.slots.values_mut().find(|slot| slot.stamp.is_some()).unwrap();
        slot.counts.packets += packets;
        slot.counts.bytes += packets * bytes;
    }
}

impl FastIo for Kernel {
    fn capacity(&self) -> usize {
        2
    }

    fn target(&self, port: PortId) -> Option<FastTarget> {
        Some(FastTarget { ifindex: u32::from(port.0) + 100, takes_frags: true })
    }

    fn insert(&mut self, key: &FastKey, flow: &FastFlow, stamp: FastStamp) -> Option<u32> {
        let mut state = self.state();
        state.next += 1;
        let slot = state.next;
        state.slots.insert(slot, Slot { key: *key, flow: *flow, stamp: Some(stamp), counts: FastCounts::default() });
        Some(slot)
    }

    fn renew(&mut self, slot: u32, stamp: FastStamp) {
        self.state().slots.get_mut(&slot).unwrap().stamp = Some(stamp);
    }

    fn follow(&mut self, _: u32, _: u32) {}

    fn stop(&mut self, slot: u32) {
        self.state().slots.get_mut(&slot).unwrap().stamp = None;
    }

    fn counts(&self, slot: u32) -> FastCounts {
        self.state().slots[&slot].counts
    }

    fn free(&mut self, slot: u32) {
        let mut state = self.state();
        assert!(state.slots.remove(&slot).unwrap().stamp.is_none(), "freed while it forwards");
        state.freed.push(slot);
    }
}

/// Two pods of a routed network, and a kernel that takes flows.
fn switch() -> (Switch, [PortInfo; 2], Kernel) {
    let mut switch = Switch::new();
    switch.ask_json(r#"{"op":"network_add","name":"pods","vni":1,"ranges":["10.1.0.0/24"]}"#).unwrap();
    let ports = [1, 2].map(|at| switch.add_port(&format!("veth{at}"), "pods", mac(at), &[&format!("10.1.0.1{at}")]));
    let kernel = Kernel::default();
    switch.backend.worker.offload(Box::new(kernel.clone()));
    (switch, ports, kernel)
}

fn datagram() -> Vec<u8> {
    udp(Ends { from: mac(1), to: GATEWAY_MAC }, "10.1.0.11", "10.1.0.12", b"hello")
}

fn send(switch: &mut Switch, from: &PortInfo, frame: &[u8], count: usize) {
    // One a burst: those of the first burst of a flow are all judged.
    for _ in 0..count {
        switch.send(from.id, frame);
        switch.settle();
    }
}

#[test]
fn a_flow_is_offered_counted_renewed_and_forgotten() {
    let (mut switch, [one, other], kernel) = switch();
    let frame = datagram();
    send(&mut switch, &one, &frame, PACKETS - 1);
    assert_eq!(kernel.only(), None, "not for a few packets");
    send(&mut switch, &one, &frame, 1);
    let (key, flow, stamp) = kernel.only().expect("a flow");
    assert_eq!((key.port, key.ports, key.vxlan), (one.id, (1000, 2000), (0, [0; 4])));
    assert_eq!((key.source[..4].to_vec(), key.destination[..4].to_vec()), (vec![10, 1, 0, 11], vec![10, 1, 0, 12]));
    assert_eq!(flow.macs, (GATEWAY_MAC, mac(1)));
    assert_eq!(flow.rewrite, Some((mac(2), GATEWAY_MAC)));
    assert_eq!((flow.to.ifindex, flow.outer, flow.window_bits), (u32::from(other.id.0) + 100, None, None));

    // What the kernel forwards is as if the worker had.
    kernel.forward(1000, frame.len() as u64);
    switch.backend.worker.settle(switch.now_ns);
    switch.settle();
    let total = (PACKETS + 1000) as u64;
    let counters = switch.counters();
    assert_eq!((counters.port(one.id).rx_packets, counters.port(other.id).tx_packets), (total, total));
    assert_eq!(counters.port(other.id).tx_bytes, total * frame.len() as u64);
    assert_eq!(counters.offloaded, 1000);
    let flows = switch.backend.worker.flows(0, 10);
    assert_eq!((flows.len(), flows[0].entry.packets, flows[0].is_offloaded), (1, total, true));

    // The next packet that comes up after its time gives it more.
    switch.pass(stamp.expires_ns);
    send(&mut switch, &one, &frame, 1);
    let (_, _, renewed) = kernel.only().expect("a flow");
    assert!(renewed.expires_ns > switch.now_ns && renewed.generation == stamp.generation);

    // One that is not renewed is forgotten, and its last packets are counted.
    kernel.forward(1, frame.len() as u64);
    (0..500).for_each(|_| {
        switch.pass(20_000_000);
        switch.settle();
    });
    assert_eq!(kernel.only(), None);
    assert_eq!(kernel.state().freed.len(), 1);
    assert_eq!(switch.counters().offloaded, 1001);

    // Another flow takes its place in the kernel; when it comes back both are there, and neither disturbs the other.
    let ends = Ends { from: mac(1), to: GATEWAY_MAC };
    let second = udp_with(ends, "10.1.0.11", "10.1.0.12", (7, 7), 64, b"hello");
    send(&mut switch, &one, &second, PACKETS);
    assert!(
        !switch
            .backend
            .worker
            .flows(0, 10)
            .iter()
            .any(|flow| flow.entry.key.fields().ports.source == 1000 && flow.is_offloaded)
    );
    send(&mut switch, &one, &frame, PACKETS * 2);
    let live = kernel.state().slots.values().filter(|slot| slot.stamp.is_some()).count();
    assert_eq!(live, 2);
    assert!(switch.backend.worker.flows(0, 10).iter().all(|flow| flow.is_offloaded));
    assert_eq!(switch.backend.worker.fast_state().unwrap().flows, 2);
}

#[test]
fn a_change_is_judged_before_it_is_renewed_and_a_port_takes_its_flows_along() {
    let (mut switch, [one, other], kernel) = switch();
    let frame = datagram();
    send(&mut switch, &one, &frame, PACKETS);
    let (_, _, before) = kernel.only().expect("a flow");
    switch.ask_json(r#"{"op":"network_add","name":"more","vni":2,"ranges":["10.2.0.0/24"]}"#).unwrap();
    let (_, _, same) = kernel.only().expect("a flow");
    assert_eq!(same.generation, before.generation, "of a generation that is no longer in force");
    send(&mut switch, &one, &frame, 1);
    let (_, _, after) = kernel.only().expect("a flow");
    assert!(after.generation > before.generation);
    switch.ask(Request::PortDel { link: other.link.clone() });
    assert_eq!(kernel.only(), None);
}

#[test]
fn what_the_kernel_cannot_do_is_not_offered() {
    let (mut switch, [one, other], kernel) = switch();
    let count = PACKETS * 2;
    // Between pods of one node packets may be too large to be summed in the kernel.
    send(&mut switch, &one, &partial(datagram()), count);
    assert_eq!(kernel.only(), None, "a checksum that is left to the device");
    let probe = switch.add_port("probe", "pods", mac(3), &["10.1.0.13"]);
    let mirror =
        format!(r#"{{"op":"mirror_add","name":"m","ports":["{}"],"to":{{"port":"{}"}}}}"#, other.link, probe.link);
    switch.ask_json(&mirror).unwrap();
    send(&mut switch, &one, &datagram(), count);
    assert_eq!(kernel.only(), None, "to a port whose packets others see, too");
    switch.ask_json(r#"{"op":"mirror_del","name":"m"}"#).unwrap();
    send(&mut switch, &one, &datagram(), count);
    assert!(kernel.only().is_some());
}

#[test]
fn without_room_the_worker_forwards() {
    let (mut switch, [one, other], kernel) = switch();
    for port in 0..5_u16 {
        let ends = Ends { from: mac(1), to: GATEWAY_MAC };
        let frame = udp_with(ends, "10.1.0.11", "10.1.0.12", (5000 + port, 80), 64, b"hello");
        send(&mut switch, &one, &frame, PACKETS * 2);
    }
    assert_eq!(switch.take(other.id).len(), 5 * 2 * PACKETS);
    assert_eq!(kernel.state().slots.len(), 2);
    let state = switch.backend.worker.fast_state().unwrap();
    assert_eq!((state.capacity, state.flows), (2, 2));
    assert!(state.refused >= 3, "{state:?}");
}
