//! What XDP can do with a link (kernel document `netlink/specs/netdev`).

use std::collections::BTreeMap;

use futures_util::StreamExt;
use genetlink::GenetlinkHandle;
use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload, NlasIterator,
    ParseableParametrized,
};
use netlink_packet_generic::{GenlFamily, GenlHeader, GenlMessage};

use crate::Kernel;

const DEV_GET: u8 = 1;
const DEV_IFINDEX: u16 = 1;
const DEV_XDP_FEATURES: u16 = 3;

/// `NETDEV_XDP_ACT_NDO_XMIT` and `NETDEV_XDP_ACT_NDO_XMIT_SG`: takes packets that XDP redirects to it, and those of several
/// frames.
const CAN_BE_SENT_TO: u64 = 4;
const TAKES_FRAGS: u64 = 64;

impl Kernel {
    /// Of some links here, those that XDP can send to, and whether they take packets of several frames. None if the kernel does
    /// not tell: it has no such family before Linux 6.3.
    pub async fn redirect_targets(&self, links: &[u32]) -> Option<BTreeMap<u32, bool>> {
        let (connection, mut handle, _) = genetlink::new_connection().ok()?;
        let connection = tokio::spawn(connection);
        let mut targets = Some(BTreeMap::new());
        // Not in one dump: its messages lack the mark that more follow, and readers stop after the first.
        for &ifindex in links {
            match (features(&mut handle, ifindex).await, &mut targets) {
                (None, _) => targets = None,
                (Some(features), Some(targets)) if features & CAN_BE_SENT_TO != 0 => {
                    targets.insert(ifindex, features & TAKES_FRAGS != 0);
                }
                _ => {}
            }
        }
        connection.abort();
        targets
    }
}

/// What XDP can do with a link: nothing, if it is gone. None if there was no answer.
async fn features(handle: &mut GenetlinkHandle, ifindex: u32) -> Option<u64> {
    let link = DefaultNla::new(DEV_IFINDEX, ifindex.to_ne_bytes().to_vec());
    let mut body = vec![0; link.buffer_len()];
    link.emit(&mut body);
    let mut message = NetlinkMessage::from(GenlMessage::from_payload(Netdev { command: DEV_GET, body }));
    message.header.flags = NLM_F_REQUEST;
    let answer = handle.request(message).await.ok()?.next().await?.ok()?;
    let NetlinkPayload::InnerMessage(answer) = answer.payload else { return Some(0) };
    let mut attributes = NlasIterator::new(&answer.payload.body[..]).filter_map(Result::ok);
    let features = attributes.find(|attribute| attribute.kind() == DEV_XDP_FEATURES)?;
    features.value().try_into().ok().map(u64::from_ne_bytes)
}

/// A message of the family.
#[derive(Clone, Debug)]
struct Netdev {
    command: u8,
    body: Vec<u8>,
}

impl GenlFamily for Netdev {
    fn family_name() -> &'static str {
        "netdev"
    }

    fn command(&self) -> u8 {
        self.command
    }

    fn version(&self) -> u8 {
        1
    }
}

impl Emitable for Netdev {
    fn buffer_len(&self) -> usize {
        self.body.len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        buffer[..self.body.len()].copy_from_slice(&self.body);
    }
}

impl ParseableParametrized<[u8], GenlHeader> for Netdev {
    fn parse_with_param(body: &[u8], header: GenlHeader) -> Result<Netdev, DecodeError> {
        Ok(Netdev { command: header.cmd, body: body.to_vec() })
    }
}
