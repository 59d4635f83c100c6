//! Offloads of a pod's link, over ethtool netlink (kernel document `networking/ethtool-netlink.rst`, FEATURES_SET).

use futures_util::StreamExt;
use genetlink::GenetlinkHandle;
use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, NLA_F_NESTED, NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
    ParseableParametrized,
};
use netlink_packet_generic::{GenlFamily, GenlHeader, GenlMessage};

use crate::{LinkError, Netns};

/// What a pod must not leave to a device that is not there.
///
/// A frame of the switch does not say into what pieces it should be cut, nor that it wants a CRC. Checksums of TCP and
/// UDP stay offloaded: the switch completes or hands them on. Local TCP has large segments by the link's MTU.
const OFF: &[&str] = &[
    "tx-tcp-segmentation",
    "tx-tcp6-segmentation",
    "tx-tcp-ecn-segmentation",
    "tx-tcp-mangleid-segmentation",
    "tx-udp-segmentation",
    "tx-gre-segmentation",
    "tx-gre-csum-segmentation",
    "tx-ipxip4-segmentation",
    "tx-ipxip6-segmentation",
    "tx-udp_tnl-segmentation",
    "tx-udp_tnl-csum-segmentation",
    "tx-sctp-segmentation",
    "tx-checksum-sctp",
];

const FEATURES_SET: u8 = 12;
const HEADER: u16 = 1;
const HEADER_DEV_NAME: u16 = 2;
const WANTED: u16 = 3;
const BITSET_BITS: u16 = 3;
const BITSET_BIT: u16 = 1;
const BIT_NAME: u16 = 2;

/// The kernel's answers for a feature that it does not know or that the device does not have.
const UNKNOWN: [i32; 2] = [22, 95];

/// Turns the offloads off on a link of another namespace.
///
/// # Errors
///
/// [`LinkError::Refused`], not for features that the kernel does not know.
pub(crate) async fn turn_off(netns: &Netns, ifname: &str) -> Result<(), LinkError> {
    let runtime = tokio::runtime::Handle::current();
    let opened = netns.run(move || {
        let _guard = runtime.enter();
        genetlink::new_connection().map(|(connection, handle, _)| (connection, handle))
    })?;
    let (connection, mut handle) = opened.map_err(LinkError::Open)?;
    let connection = tokio::spawn(connection);
    let mut result = Ok(());
    for feature in OFF {
        result = request(&mut handle, ifname, feature).await;
        if result.is_err() {
            break;
        }
    }
    connection.abort();
    result
}

async fn request(handle: &mut GenetlinkHandle, ifname: &str, feature: &str) -> Result<(), LinkError> {
    let failed = |source| LinkError::Refused { what: format!("turn {feature} of {ifname} off"), source };
    let other = |error: genetlink::GenetlinkError| failed(std::io::Error::other(error.to_string()));
    let off = FeatureOff { ifname: ifname.to_owned(), feature: feature.to_owned() };
    let mut message = NetlinkMessage::from(GenlMessage::from_payload(off));
    message.header.flags = NLM_F_REQUEST | NLM_F_ACK;
    let mut answers = handle.request(message).await.map_err(other)?;
    while let Some(answer) = answers.next().await {
        if let Ok(NetlinkMessage { payload: NetlinkPayload::Error(error), .. }) = answer
            && let Some(code) = error.code.map(|code| code.get().abs())
            && !UNKNOWN.contains(&code)
        {
            return Err(failed(std::io::Error::from_raw_os_error(code)));
        }
    }
    Ok(())
}

/// ETHTOOL_MSG_FEATURES_SET with one bit in the mask and not in the value.
#[derive(Clone, Debug)]
struct FeatureOff {
    ifname: String,
    feature: String,
}

impl FeatureOff {
    fn attributes(&self) -> [DefaultNla; 2] {
        let name = |kind, text: &str| bytes(&[DefaultNla::new(kind, [text.as_bytes(), &[0]].concat())]);
        let bit = nested(BITSET_BIT, name(BIT_NAME, &self.feature));
        let bits = nested(BITSET_BITS, bytes(&[bit]));
        [nested(HEADER, name(HEADER_DEV_NAME, &self.ifname)), nested(WANTED, bytes(&[bits]))]
    }
}

impl GenlFamily for FeatureOff {
    fn family_name() -> &'static str {
        "ethtool"
    }

    fn command(&self) -> u8 {
        FEATURES_SET
    }

    fn version(&self) -> u8 {
        1
    }
}

impl Emitable for FeatureOff {
    fn buffer_len(&self) -> usize {
        self.attributes().as_slice().buffer_len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        self.attributes().as_slice().emit(buffer);
    }
}

impl ParseableParametrized<[u8], GenlHeader> for FeatureOff {
    /// The kernel answers with what changed; that it is an answer is enough.
    fn parse_with_param(_: &[u8], _: GenlHeader) -> Result<FeatureOff, DecodeError> {
        Ok(FeatureOff { ifname: String::new(), feature: String::new() })
    }
}

fn nested(kind: u16, value: Vec<u8>) -> DefaultNla {
    DefaultNla::new(kind | NLA_F_NESTED, value)
}

fn bytes(attributes: &[DefaultNla]) -> Vec<u8> {
    let mut buffer = vec![0; attributes.buffer_len()];
    attributes.emit(&mut buffer);
    buffer
}
