//! A pod: a smoltcp stack behind a port.

use std::collections::VecDeque;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr, IpEndpoint};
use vswitch_api::PortInfo;
use vswitch_net::PortId;

/// Bytes of a socket's buffers.
const BUFFER: usize = 16 << 10;

/// A stack with one TCP socket.
pub struct Pod {
    /// Its port.
    pub port: PortId,
    device: Queues,
    interface: Interface,
    sockets: SocketSet<'static>,
    tcp: SocketHandle,
}

/// The device: two queues.
#[derive(Debug)]
struct Queues {
    rx: VecDeque<Vec<u8>>,
    tx: VecDeque<Vec<u8>>,
    mtu: usize,
}

/// A received frame.
#[derive(Debug)]
pub struct Received(Vec<u8>);

/// Room for a frame to send.
#[derive(Debug)]
pub struct Room<'a>(&'a mut VecDeque<Vec<u8>>);

impl Pod {
    /// A pod configured as the switch says: addresses, and the default routes of its port.
    pub fn new(info: &PortInfo, mtu: usize) -> Pod {
        let mut device = Queues { rx: VecDeque::new(), tx: VecDeque::new(), mtu: mtu + 14 };
        let config = Config::new(EthernetAddress(info.mac.0).into());
        let mut interface = Interface::new(config, &mut device, Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            for address in &info.addresses {
                let cidr = IpCidr::new(address.addr().into(), address.prefix_len());
                addresses.push(cidr).expect("room for an address");
            }
        });
        for route in info.routes.iter().filter(|route| route.destination.prefix_len() == 0) {
            let added = match route.gateway {
                Some(std::net::IpAddr::V4(gateway)) => interface.routes_mut().add_default_ipv4_route(gateway).is_ok(),
                Some(std::net::IpAddr::V6(gateway)) => interface.routes_mut().add_default_ipv6_route(gateway).is_ok(),
                None => true,
            };
            assert!(added, "room for a route");
        }
        let buffer = || tcp::SocketBuffer::new(vec![0; BUFFER]);
        let mut sockets = SocketSet::new(Vec::new());
        let tcp = sockets.add(tcp::Socket::new(buffer(), buffer()));
        Pod { port: info.id, device, interface, sockets, tcp }
    }

    /// Its stack does what time and received frames ask for.
    pub fn poll(&mut self, now_ns: u64) {
        let now = Instant::from_micros((now_ns / 1000) as i64);
        self.interface.poll(now, &mut self.device, &mut self.sockets);
    }

    /// Gives it a frame.
    pub fn receive(&mut self, frame: Vec<u8>) {
        self.device.rx.push_back(frame);
    }

    /// Takes what it sent.
    pub fn take(&mut self) -> Vec<Vec<u8>> {
        self.device.tx.drain(..).collect()
    }

    /// Waits for a connection.
    pub fn listen(&mut self, port: u16) {
        self.socket().listen(port).expect("a closed socket");
    }

    /// Opens a connection.
    pub fn connect(&mut self, to: std::net::IpAddr, port: u16) {
        let remote = IpEndpoint::new(IpAddress::from(to), port);
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(self.tcp);
        socket.connect(self.interface.context(), remote, 49_999).expect("a closed socket");
    }

    /// The socket.
    pub fn socket(&mut self) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(self.tcp)
    }
}

impl Device for Queues {
    type RxToken<'a> = Received;
    type TxToken<'a> = Room<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received, Room<'_>)> {
        let frame = self.rx.pop_front()?;
        Some((Received(frame), Room(&mut self.tx)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Room<'_>> {
        Some(Room(&mut self.tx))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.mtu;
        capabilities.checksum.tcp = Checksum::Both;
        capabilities
    }
}

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(&self.0)
    }
}

impl TxToken for Room<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, write: F) -> R {
        let mut frame = vec![0; length];
        let result = write(&mut frame);
        self.0.push_back(frame);
        result
    }
}
