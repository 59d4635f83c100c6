//! Two switches joined by a wire that may lose and reorder, on one virtual clock.

use vswitch_control::UPLINK_PORT;
use vswitch_net::MacAddr;

use crate::mem::Switch;
use crate::pod::Pod;

/// What the wire does to a packet, in packets of a thousand.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wire {
    /// Lost.
    pub loss: u64,
    /// Held back behind the ones that follow.
    pub reorder: u64,
}

/// Two switches, their pods and the wire.
pub struct Twin {
    /// The switches.
    pub switches: [Switch; 2],
    /// Pods of each.
    pub pods: [Vec<Pod>; 2],
    wire: Wire,
    /// Packets held back, by the switch that shall get them.
    held: [Vec<Vec<u8>>; 2],
    random: u64,
    /// Packets the wire lost.
    pub lost: u64,
    /// Packets the wire reordered.
    pub reordered: u64,
}

/// MAC addresses of the two uplinks.
pub const WIRE_MACS: [MacAddr; 2] = [MacAddr([2, 0, 0, 0, 1, 1]), MacAddr([2, 0, 0, 0, 1, 2])];

/// A step of the clock.
const STEP_NS: u64 = 1_000_000;

impl Twin {
    /// Two switches that reach each other over the underlay of one family.
    pub fn new(vteps: [&str; 2], wire: Wire, seed: u64) -> Twin {
        let switch = |at: usize| {
            let (own, other) = (vteps[at], vteps[1 - at]);
            let is_v6 = own.contains(':');
            let mut switch =
                Switch::new().with_uplink(WIRE_MACS[at], (!is_v6).then_some(own), is_v6.then_some(own), 1500);
            switch.ask_json(&format!(r#"{{"op":"peer_add","name":"other","vtep":"{other}"}}"#)).expect("a peer");
            switch.resolve(other, WIRE_MACS[1 - at]);
            switch
        };
        Twin {
            switches: [switch(0), switch(1)],
            pods: [Vec::new(), Vec::new()],
            wire,
            held: [Vec::new(), Vec::new()],
            random: seed | 1,
            lost: 0,
            reordered: 0,
        }
    }

    /// One millisecond: pods speak, switches forward, the wire carries.
    pub fn step(&mut self) {
        for at in 0..2 {
            let now_ns = self.switches[at].now_ns;
            for pod in &mut self.pods[at] {
                pod.poll(now_ns);
                for frame in pod.take() {
                    self.switches[at].send(pod.port, &frame);
                }
            }
            self.switches[at].settle();
        }
        for at in 0..2 {
            let sent = self.switches[at].take(UPLINK_PORT);
            self.carry(1 - at, sent);
        }
        for at in 0..2 {
            self.switches[at].settle();
            for pod in &mut self.pods[at] {
                for frame in self.switches[at].take(pod.port) {
                    pod.receive(frame);
                }
            }
            self.switches[at].pass(STEP_NS);
        }
    }

    /// Steps until it is true.
    ///
    /// # Panics
    ///
    /// If it is not within `steps`.
    pub fn until(&mut self, steps: usize, mut is_true: impl FnMut(&mut Twin) -> bool) {
        for _ in 0..steps {
            if is_true(self) {
                return;
            }
            self.step();
        }
        panic!("not within {steps} ms");
    }

    fn carry(&mut self, to: usize, packets: Vec<Vec<u8>>) {
        let late = std::mem::take(&mut self.held[to]);
        for packet in packets {
            if self.chance(self.wire.loss) {
                self.lost += 1;
            } else if self.chance(self.wire.reorder) {
                self.reordered += 1;
                self.held[to].push(packet);
            } else {
                self.switches[to].send(UPLINK_PORT, &packet);
            }
        }
        late.iter().for_each(|packet| self.switches[to].send(UPLINK_PORT, packet));
    }

    fn chance(&mut self, of_thousand: u64) -> bool {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % 1000 < of_thousand
    }
}
