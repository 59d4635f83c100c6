//! Services: addresses that belong to nobody, and the backends that answer for them.

use std::net::IpAddr;
use std::sync::Arc;

use vswitch_net::NetworkIndex;

use super::sharded::Sharded;
use crate::meta::words;

/// What a service is reached by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Front {
    /// Of the pods that reach it.
    pub network: NetworkIndex,
    /// Its address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// Layer 4 protocol number.
    pub protocol: u8,
}

/// Who answers for a service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Backends {
    /// Addresses and ports, each once.
    pub ends: Vec<(IpAddr, u16)>,
    /// Whether all connections of a client go to one of them.
    pub has_affinity: bool,
}

/// All services.
#[derive(Clone, Debug, Default)]
pub struct Services {
    table: Sharded<Front, Arc<Backends>>,
    /// How many services an address has.
    addresses: Sharded<(NetworkIndex, IpAddr), usize>,
    /// What the services of a backend, itself written as a front, are reached by.
    fronts: Sharded<Front, Vec<Front>>,
    count: usize,
}

impl Services {
    /// The backends of a service.
    pub fn lookup(&self, front: &Front) -> Option<&Backends> {
        self.table.get(front).map(Arc::as_ref)
    }

    /// True if an address is a service's, at whatever port.
    pub fn has_address(&self, network: NetworkIndex, address: IpAddr) -> bool {
        self.addresses.get(&(network, address)).is_some()
    }

    /// True if an answer of `backend` to a client may be a service's: one that would choose this backend for the client.
    pub fn may_answer(&self, backend: &Front, client: IpAddr, port: u16) -> bool {
        let end = (backend.address, backend.port);
        let fronts = self.fronts.get(backend).into_iter().flatten();
        fronts.filter_map(|front| self.lookup(front)).any(|backends| backends.choose(client, port) == Some(end))
    }

    /// Puts a service in, or changes it.
    pub fn insert(&mut self, front: Front, backends: Backends) {
        self.forget_backends(&front);
        for &(address, port) in &backends.ends {
            let backend = Front { address, port, ..front };
            let mut fronts = self.fronts.get(&backend).cloned().unwrap_or_default();
            fronts.push(front);
            self.fronts.insert(backend, fronts);
        }
        if self.table.insert(front, Arc::new(backends)).is_none() {
            self.count += 1;
            let address = (front.network, front.address);
            let known = self.addresses.get(&address).copied().unwrap_or(0);
            self.addresses.insert(address, known + 1);
        }
    }

    /// Takes a service away.
    pub fn remove(&mut self, front: &Front) {
        self.forget_backends(front);
        if self.table.remove(front).is_some() {
            self.count -= 1;
            let address = (front.network, front.address);
            match self.addresses.get(&address).copied() {
                Some(known) if known > 1 => drop(self.addresses.insert(address, known - 1)),
                _ => drop(self.addresses.remove(&address)),
            }
        }
    }

    fn forget_backends(&mut self, front: &Front) {
        for (address, port) in self.lookup(front).map(|known| known.ends.clone()).unwrap_or_default() {
            let backend = Front { address, port, ..*front };
            let mut fronts = self.fronts.get(&backend).cloned().unwrap_or_default();
            fronts.retain(|other| other != front);
            if fronts.is_empty() {
                self.fronts.remove(&backend);
            } else {
                self.fronts.insert(backend, fronts);
            }
        }
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

impl Backends {
    /// The backend of a client, always the same one for the same backends, whoever asks: a daemon that starts again goes on
    /// as the last one did.
    ///
    /// Without affinity it goes by the client's port, too. With it, a backend that comes takes its share of the clients over
    /// and moves no other, and one that goes gives its own away (Thaler and Ravishankar, "Using Name-Based Mappings to
    /// Increase Hit Rates", 1998); that costs a hash a backend.
    pub fn choose(&self, client: IpAddr, port: u16) -> Option<(IpAddr, u16)> {
        let client = words(client);
        if self.has_affinity {
            let weight = |&(address, port): &(IpAddr, u16)| {
                let [high, low] = words(address);
                mix(mix(client[0], client[1]) ^ high, low ^ u64::from(port))
            };
            return self.ends.iter().copied().max_by_key(weight);
        }
        let at = mix(mix(client[0] ^ u64::from(port) << 32, client[1]), client[0]) as u32;
        self.ends.get(((u64::from(at) * self.ends.len() as u64) >> 32) as usize).copied()
    }
}

/// Both halves of a product, so that every bit of the input counts.
fn mix(a: u64, b: u64) -> u64 {
    let product = u128::from(a ^ 0x9e37_79b9_7f4a_7c15).wrapping_mul(u128::from(b ^ 0xd6e8_feb8_6659_fd93));
    (product >> 64) as u64 ^ product as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backends(count: u8, has_affinity: bool) -> Backends {
        Backends { ends: (1..=count).map(|at| (IpAddr::from([10, 0, 0, at]), 80)).collect(), has_affinity }
    }

    #[test]
    fn connections_spread_evenly() {
        let backends = backends(10, false);
        let mut counts = [0_u32; 11];
        for client in 0..100_u8 {
            for port in 32_768..33_768 {
                let Some((IpAddr::V4(v4), _)) = backends.choose([10, 1, 0, client].into(), port) else { panic!() };
                counts[usize::from(v4.octets()[3])] += 1;
            }
        }
        assert!(counts[1..].iter().all(|&count| (9_000..11_000).contains(&count)), "{counts:?}");
    }

    #[test]
    fn a_client_with_affinity_stays_unless_its_backend_goes() {
        let (nine, ten) = (backends(9, true), backends(10, true));
        let clients = || (0..=255_u8).flat_map(|b| (0..4_u8).map(move |a| IpAddr::from([10, 1, a, b])));
        let mut moved = 0;
        for client in clients() {
            let before = ten.choose(client, 1000);
            assert_eq!(before, ten.choose(client, 2000));
            let after = nine.choose(client, 1000);
            if before != after {
                assert_eq!(before, Some((IpAddr::from([10, 0, 0, 10]), 80)), "only those of the one that went");
                moved += 1;
            }
        }
        assert!((60..150).contains(&moved), "a tenth of 1024: {moved}");
    }

    #[test]
    fn nobody_answers_for_an_empty_service() {
        assert_eq!(backends(0, false).choose([10, 1, 0, 1].into(), 1), None);
        assert_eq!(backends(0, true).choose([10, 1, 0, 1].into(), 1), None);
    }
}
