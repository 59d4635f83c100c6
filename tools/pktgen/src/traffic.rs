//! What to send: the options that all senders share, and the templates that come of them.

use std::net::IpAddr;

use anyhow::{Context, bail};
use clap::Args;
use vswitch_net::{MacAddr, Vni};

use crate::template::{Ends, SOURCES, Shape, Template};

/// Bytes of a frame behind the kernel's headroom.
const MAX_SIZE: usize = 3840;

/// Sizes of the simple IMIX and how often each comes (IP packets of 40, 576 and 1500 bytes, 7:4:1), in an order that
/// spreads them. The smallest is padded to what Ethernet allows.
const IMIX_SIZES: [usize; 3] = [64, 590, 1514];
const IMIX: [u8; 12] = [0, 1, 0, 1, 0, 2, 0, 1, 0, 1, 0, 0];

/// What to send.
#[derive(Debug, Args)]
pub(crate) struct Traffic {
    /// Source MAC address.
    #[arg(long)]
    source_mac: MacAddr,
    /// Destination MAC address; a routed pod's gateway unless named.
    #[arg(long, default_value_t = vswitch_net::GATEWAY_MAC)]
    destination_mac: MacAddr,
    /// Source address.
    #[arg(long)]
    source: IpAddr,
    /// Destination address.
    #[arg(long)]
    destination: IpAddr,
    /// Destination UDP port of the first flow.
    #[arg(long, default_value_t = 9)]
    port: u16,
    /// Bytes of a packet from its (outer) Ethernet header on.
    #[arg(long, default_value_t = 64, value_parser = parse_size)]
    size: usize,
    /// Sizes of 64, 590 and 1514 bytes, seven, four and one of twelve.
    #[arg(long, conflicts_with = "size")]
    imix: bool,
    /// Flows, told apart by their ports: 60,000 source ports, then the next destination port.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    flows: u32,
    /// Packets a second; as fast as it goes unless named.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    pub(crate) rate: Option<u64>,
    /// One packet in so many says when it was sent, for the sink on this machine to tell how long it took.
    #[arg(long, value_name = "PACKETS", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) stamp: Option<u32>,
    /// Encapsulate in VXLAN with this identifier; the next four say between whom.
    #[arg(long, requires_all = ["outer_source_mac", "outer_destination_mac", "outer_source", "outer_destination"])]
    vni: Option<u32>,
    /// The sending VTEP's MAC address.
    #[arg(long, requires = "vni")]
    outer_source_mac: Option<MacAddr>,
    /// MAC address of the next hop to the receiving VTEP.
    #[arg(long, requires = "vni")]
    outer_destination_mac: Option<MacAddr>,
    /// The sending VTEP.
    #[arg(long, requires = "vni")]
    outer_source: Option<IpAddr>,
    /// The receiving VTEP.
    #[arg(long, requires = "vni")]
    outer_destination: Option<IpAddr>,
}

/// Templates and the order that they come in.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) templates: Vec<Template>,
    /// Places in `templates`, repeated.
    pub(crate) pattern: Vec<u8>,
    pub(crate) flows: u32,
    pub(crate) port: u16,
}

impl Traffic {
    /// The packets of these options.
    ///
    /// # Errors
    ///
    /// If they cannot be: of two families, smaller than their headers.
    pub(crate) fn plan(&self) -> anyhow::Result<Plan> {
        let ends = Ends { macs: (self.source_mac, self.destination_mac), addresses: (self.source, self.destination) };
        if u32::from(self.port) + (self.flows - 1) / SOURCES > 0xffff {
            bail!("--port {} leaves no destination ports for --flows {}: name a lower one", self.port, self.flows);
        }
        let outer = self.outer()?;
        let (sizes, pattern) = if self.imix { (&IMIX_SIZES[..], &IMIX[..]) } else { (&[self.size][..], &[0][..]) };
        let templates: anyhow::Result<Vec<Template>> =
            sizes.iter().map(|&size| Template::new(&Shape { ends, port: self.port, size, outer })).collect();
        let templates = templates?;
        if self.stamp.is_some()
            && let Some(small) = templates.iter().find(|template| template.stamp.is_none())
        {
            bail!("a packet of {} bytes has no room for a time stamp: 16 bytes after the headers", small.bytes.len());
        }
        Ok(Plan { templates, pattern: pattern.to_vec(), flows: self.flows, port: self.port })
    }

    fn outer(&self) -> anyhow::Result<Option<(Ends, Vni)>> {
        let Some(vni) = self.vni else { return Ok(None) };
        let vni = Vni::try_from(vni).map_err(|error| anyhow::anyhow!("--vni: {error}"))?;
        let need = "clap asks for all of them";
        let ends = Ends {
            macs: (self.outer_source_mac.context(need)?, self.outer_destination_mac.context(need)?),
            addresses: (self.outer_source.context(need)?, self.outer_destination.context(need)?),
        };
        Ok(Some((ends, vni)))
    }
}

fn parse_size(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(size) if size <= MAX_SIZE => Ok(size),
        _ => Err(format!("allowed are at most {MAX_SIZE} bytes: a packet has one frame here")),
    }
}
