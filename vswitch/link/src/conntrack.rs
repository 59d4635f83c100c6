//! What the kernel remembers of UDP to mapped ports, over ctnetlink (`linux/netfilter/nfnetlink_conntrack.h`).
//!
//! A rule of NAT is asked for the first packet of a flow alone. UDP has no end, so a client that goes on sending holds on
//! to what the rules said once: to a pod that is gone, or to the host itself from before the port was mapped.

use std::collections::BTreeSet;
use std::net::IpAddr;

use futures_util::StreamExt;
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_netfilter::conntrack::{ConntrackAttribute, ConntrackMessage, IPTuple, ProtoTuple, Protocol, Tuple};
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily};
use rtnetlink::proto::{ConnectionHandle, new_connection};
use rtnetlink::sys::SocketAddr;
use rtnetlink::sys::protocols::NETLINK_NETFILTER;

use crate::{Kernel, LinkError};

const ENOENT: i32 = 2;

/// Which flows of UDP at ports of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UdpFlows {
    /// Those that began there or elsewhere.
    All,
    /// Those that began there. An answer that is on its way when its flow is forgotten begins a new one, whose other half
    /// no rule is asked for.
    BegunHere,
}

impl Kernel {
    /// Forgets the UDP flows at ports of the host, so that the rules decide anew about their next packet; how many they
    /// were. Flows that only pass through the host are left alone.
    ///
    /// # Errors
    ///
    /// [`LinkError::Open`] or [`LinkError::Refused`].
    pub async fn forget_udp_flows(&self, ports: &BTreeSet<u16>, which: UdpFlows) -> Result<usize, LinkError> {
        if ports.is_empty() {
            return Ok(0);
        }
        let own: BTreeSet<IpAddr> = self.all_addresses().await?.into_iter().collect();
        let is_here =
            |(address, port): (IpAddr, u16)| ports.contains(&port) && (own.contains(&address) || address.is_loopback());
        let is_ours = |flow: &Flow| {
            flow.is_udp && (is_here(flow.source) || (which == UdpFlows::All && is_here(flow.destination)))
        };
        let (connection, handle, _) = new_connection::<NetfilterMessage>(NETLINK_NETFILTER).map_err(LinkError::Open)?;
        let connection = tokio::spawn(connection);
        let done = forget(&handle, is_ours).await;
        connection.abort();
        done
    }
}

async fn forget(
    handle: &ConnectionHandle<NetfilterMessage>,
    is_ours: impl Fn(&Flow) -> bool,
) -> Result<usize, LinkError> {
    let mut forgotten = 0;
    for family in [NetfilterProtoFamily::IPv4, NetfilterProtoFamily::IPv6] {
        let list = ConntrackMessage::Get(Vec::new());
        let flows = request(handle, family, list, NLM_F_DUMP).await.map_err(|source| refused("list", source))?;
        for tuple in flows.iter().filter_map(tuple).filter(|tuple| Flow::of(tuple).is_some_and(|flow| is_ours(&flow))) {
            let removal = ConntrackMessage::Delete(vec![ConntrackAttribute::CtaTupleOrig(tuple.clone())]);
            match request(handle, family, removal, NLM_F_ACK).await {
                Ok(_) => forgotten += 1,
                // It ended by itself.
                Err(error) if error.raw_os_error() == Some(ENOENT) => {}
                Err(error) => return Err(refused("delete", error)),
            }
        }
    }
    Ok(forgotten)
}

/// Whence the first packet of a flow came, and where it went.
struct Flow {
    is_udp: bool,
    source: (IpAddr, u16),
    destination: (IpAddr, u16),
}

impl Flow {
    fn of(tuple: &[Tuple]) -> Option<Flow> {
        let (mut protocol, mut addresses, mut ports) = (None, [None; 2], [None; 2]);
        for part in tuple {
            match part {
                Tuple::Ip(parts) => {
                    for part in parts {
                        match part {
                            IPTuple::SourceAddress(address) => addresses[0] = Some(*address),
                            IPTuple::DestinationAddress(address) => addresses[1] = Some(*address),
                            _ => {}
                        }
                    }
                }
                Tuple::Proto(parts) => {
                    for part in parts {
                        match part {
                            ProtoTuple::Protocol(of) => protocol = Some(*of),
                            ProtoTuple::SourcePort(port) => ports[0] = Some(*port),
                            ProtoTuple::DestinationPort(port) => ports[1] = Some(*port),
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        Some(Flow {
            is_udp: protocol? == Protocol::Udp,
            source: (addresses[0]?, ports[0]?),
            destination: (addresses[1]?, ports[1]?),
        })
    }
}

/// The addresses and ports of a flow's first packet.
fn tuple(message: &NetfilterMessage) -> Option<&Vec<Tuple>> {
    let NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)) = &message.inner else { return None };
    attributes.iter().find_map(|attribute| match attribute {
        ConntrackAttribute::CtaTupleOrig(tuple) => Some(tuple),
        _ => None,
    })
}

async fn request(
    handle: &ConnectionHandle<NetfilterMessage>,
    family: NetfilterProtoFamily,
    message: ConntrackMessage,
    flags: u16,
) -> Result<Vec<NetfilterMessage>, std::io::Error> {
    let message = NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), message);
    let mut message = NetlinkMessage::from(message);
    message.header.flags = NLM_F_REQUEST | flags;
    let mut answers = handle.request(message, SocketAddr::new(0, 0)).map_err(std::io::Error::other)?;
    let mut taken = Vec::new();
    while let Some(answer) = answers.next().await {
        match answer.payload {
            NetlinkPayload::InnerMessage(message) => taken.push(message),
            NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
            _ => {}
        }
    }
    Ok(taken)
}

fn refused(what: &str, source: std::io::Error) -> LinkError {
    LinkError::Refused { what: format!("{what} the kernel's UDP flows"), source }
}
