//! Offloads of a pod's link and queues of an uplink, over ethtool netlink (kernel document
//! `networking/ethtool-netlink.rst`).

use futures_util::StreamExt;
use genetlink::GenetlinkHandle;
use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, NLA_F_NESTED, NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
    NlasIterator, ParseableParametrized,
};
use netlink_packet_generic::{GenlFamily, GenlHeader, GenlMessage};

use crate::{Kernel, LinkError, Netns};

/// What a pod must not leave to a device that is not there.
///
/// A frame of the switch does not say into what datagrams it should be cut, nor that it wants a CRC. Checksums of TCP and
/// UDP stay offloaded: the switch completes or hands them on.
const OFF: &[&str] = &[
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

/// Cutting TCP, which the switch does where it must: in the path's size, which the sender's is too.
const TCP: &[&str] =
    &["tx-tcp-segmentation", "tx-tcp6-segmentation", "tx-tcp-ecn-segmentation", "tx-tcp-mangleid-segmentation"];

const FEATURES_SET: u8 = 12;
const CHANNELS_GET: u8 = 17;
const CHANNELS_RX_COUNT: u16 = 6;
const CHANNELS_COMBINED_COUNT: u16 = 9;
const HEADER: u16 = 1;
const HEADER_DEV_NAME: u16 = 2;
const WANTED: u16 = 3;
const BITSET_BITS: u16 = 3;
const BITSET_BIT: u16 = 1;
const BIT_NAME: u16 = 2;
const BIT_VALUE: u16 = 3;

/// The kernel's answers for a feature that it does not know or that the device does not have.
const UNKNOWN: [i32; 2] = [22, 95];

/// What XDP can send to a veth's other end by: its packets are then received in turns (`veth.c`).
const GRO: &str = "rx-gro";

/// Turns the offloads off on a link, here or in another namespace; that of TCP too unless it `may_segment`.
///
/// # Errors
///
/// [`LinkError::Refused`], not for features that the kernel does not know.
pub(crate) async fn turn_off(netns: Option<&Netns>, ifname: &str, may_segment: bool) -> Result<(), LinkError> {
    let tcp = if may_segment { &[][..] } else { TCP };
    set(netns, ifname, OFF.iter().chain(tcp), false).await
}

/// Has a link, here or in another namespace, take what XDP redirects to its other end. It must be up, or nobody hears of it.
///
/// # Errors
///
/// [`LinkError::Refused`].
pub(crate) async fn take_redirected(netns: Option<&Netns>, ifname: &str) -> Result<(), LinkError> {
    set(netns, ifname, [&GRO], true).await
}

async fn set(
    netns: Option<&Netns>,
    ifname: &str,
    features: impl IntoIterator<Item = &&'static str>,
    is_on: bool,
) -> Result<(), LinkError> {
    let runtime = tokio::runtime::Handle::current();
    let open = move || {
        let _guard = runtime.enter();
        genetlink::new_connection().map(|(connection, handle, _)| (connection, handle))
    };
    let opened = match netns {
        Some(netns) => netns.run(open)?,
        None => open(),
    };
    let (connection, mut handle) = opened.map_err(LinkError::Open)?;
    let connection = tokio::spawn(connection);
    let mut result = Ok(());
    for feature in features {
        result = request(&mut handle, ifname, feature, is_on).await;
        if result.is_err() {
            break;
        }
    }
    connection.abort();
    result
}

impl Kernel {
    /// How many receive queues a link uses now; none if its driver does not tell (CHANNELS_GET).
    pub async fn queues(&self, ifname: &str) -> Option<u32> {
        let (connection, mut handle, _) = genetlink::new_connection().ok()?;
        let connection = tokio::spawn(connection);
        let count = channels(&mut handle, ifname).await;
        connection.abort();
        count
    }
}

async fn channels(handle: &mut GenetlinkHandle, ifname: &str) -> Option<u32> {
    let ask = Ethtool { command: CHANNELS_GET, body: bytes(&[header(ifname)]) };
    let mut message = NetlinkMessage::from(GenlMessage::from_payload(ask));
    message.header.flags = NLM_F_REQUEST;
    let mut answers = handle.request(message).await.ok()?;
    let answer = answers.next().await?.ok()?;
    let NetlinkPayload::InnerMessage(answer) = answer.payload else { return None };
    let count = |wanted: u16| {
        let attributes = NlasIterator::new(&answer.payload.body[..]).filter_map(Result::ok);
        let value = attributes
            .filter(|attribute| attribute.kind() == wanted)
            .find_map(|attribute| <[u8; 4]>::try_from(attribute.value()).ok().map(u32::from_ne_bytes));
        value.unwrap_or(0)
    };
    let queues = count(CHANNELS_RX_COUNT) + count(CHANNELS_COMBINED_COUNT);
    (queues > 0).then_some(queues)
}

async fn request(handle: &mut GenetlinkHandle, ifname: &str, feature: &str, is_on: bool) -> Result<(), LinkError> {
    let state = if is_on { "on" } else { "off" };
    let failed = |source| LinkError::Refused { what: format!("turn {feature} of {ifname} {state}"), source };
    let other = |error: genetlink::GenetlinkError| failed(std::io::Error::other(error.to_string()));
    // One bit in the mask, and in the value if it has that mark.
    let mut parts = vec![text(BIT_NAME, feature)];
    parts.extend(is_on.then(|| DefaultNla::new(BIT_VALUE, Vec::new())));
    let wanted = nested(WANTED, bytes(&[nested(BITSET_BITS, bytes(&[nested(BITSET_BIT, bytes(&parts))]))]));
    let set = Ethtool { command: FEATURES_SET, body: bytes(&[header(ifname), wanted]) };
    let mut message = NetlinkMessage::from(GenlMessage::from_payload(set));
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

/// A message of the family: a command and its attributes.
#[derive(Clone, Debug)]
struct Ethtool {
    command: u8,
    body: Vec<u8>,
}

impl GenlFamily for Ethtool {
    fn family_name() -> &'static str {
        "ethtool"
    }

    fn command(&self) -> u8 {
        self.command
    }

    fn version(&self) -> u8 {
        1
    }
}

impl Emitable for Ethtool {
    fn buffer_len(&self) -> usize {
        self.body.len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        buffer[..self.body.len()].copy_from_slice(&self.body);
    }
}

impl ParseableParametrized<[u8], GenlHeader> for Ethtool {
    fn parse_with_param(body: &[u8], header: GenlHeader) -> Result<Ethtool, DecodeError> {
        Ok(Ethtool { command: header.cmd, body: body.to_vec() })
    }
}

fn header(ifname: &str) -> DefaultNla {
    nested(HEADER, bytes(&[text(HEADER_DEV_NAME, ifname)]))
}

fn text(kind: u16, text: &str) -> DefaultNla {
    DefaultNla::new(kind, [text.as_bytes(), &[0]].concat())
}

fn nested(kind: u16, value: Vec<u8>) -> DefaultNla {
    DefaultNla::new(kind | NLA_F_NESTED, value)
}

fn bytes(attributes: &[DefaultNla]) -> Vec<u8> {
    let mut buffer = vec![0; attributes.buffer_len()];
    attributes.emit(&mut buffer);
    buffer
}
