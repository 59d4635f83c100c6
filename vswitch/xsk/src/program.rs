//! The XDP programs: loaded with aya, attached to a link, detached when dropped or when the process dies.
//!
//! A program is attached by a BPF link that lives as long as its descriptor (kernel 5.9), so that nothing stays on the
//! device whatever ends the daemon.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};
use std::{fmt, io};

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, Map, MapData, MapError, XskMap};
use aya::programs::xdp::XdpLink;
use aya::programs::{ProgramError as AyaProgramError, Xdp, XdpMode as AyaMode};
use aya::{Ebpf, EbpfError, EbpfLoader};

static POD: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/pod.o"));
static UPLINK: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/uplink.o"));

/// What a program is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The host end of a pod's veth: every packet is the switch's.
    Pod,
    /// A NIC of the host: only VXLAN to our VTEP is the switch's.
    Uplink(Vtep),
}

/// What an uplink's program takes for the switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vtep {
    /// Our IPv4 underlay address.
    pub v4: Option<Ipv4Addr>,
    /// Our IPv6 underlay address.
    pub v6: Option<Ipv6Addr>,
    /// Our UDP port.
    pub port: u16,
    /// 802.1Q identifier of the underlay.
    pub vlan: Option<u16>,
}

/// Where in the kernel the program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XdpMode {
    /// In the driver.
    Native,
    /// In the stack, for drivers without XDP.
    Generic,
}

/// Which mode to try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XdpPreference {
    /// Native, and generic if the driver refuses.
    Auto,
    /// Native or an error.
    Native,
    /// Generic.
    Generic,
}

/// Why a program is not on a link.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// The kernel refused the program or a map.
    #[error(
        "cannot load the XDP program: {}; run as root or with CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN, where the kernel's lockdown mode allows it",
        first_line(.0)
    )]
    Load(#[source] Box<EbpfError>),
    /// The link refused the program.
    #[error(
        "cannot attach the XDP program to link {ifindex}: {source}; another XDP program may be attached (`ip link show`), or the driver refuses this MTU"
    )]
    Attach {
        /// The link.
        ifindex: u32,
        /// What the kernel said.
        source: Box<AyaProgramError>,
    },
    /// The object lacks a program or a map: it was not built from this source.
    #[error("the XDP object has no \"{0}\": build the switch again from a clean tree")]
    Missing(&'static str),
    /// A map could not be written.
    #[error("cannot write an XDP map: {0}")]
    Map(#[from] MapError),
}

/// A program on a link. Detached on drop.
///
/// Only the link and the maps are kept: what was needed to load them is not needed by 250 ports.
pub struct AttachedProgram {
    _link: XdpLink,
    sockets: XskMap<MapData>,
    uplink: Option<UplinkMaps>,
    mode: XdpMode,
    /// Why native mode was not used, in the kernel's words.
    fallback_reason: Option<String>,
}

/// What an uplink's program looks up.
struct UplinkMaps {
    vtep: Array<MapData, [u8; 24]>,
    local: Prefixes,
    cluster: Prefixes,
}

/// A map of prefixes and what it holds.
struct Prefixes {
    map: LpmTrie<MapData, [u8; 16], u8>,
    held: Vec<(IpAddr, u8)>,
}

impl AttachedProgram {
    /// Loads a program of its own for `ifindex` and attaches it.
    ///
    /// # Errors
    ///
    /// Each tells what to do; nothing is left behind.
    pub fn attach(role: Role, ifindex: u32, preference: XdpPreference) -> Result<AttachedProgram, ProgramError> {
        let (object, name) = match role {
            Role::Pod => (POD, "pod"),
            Role::Uplink(_) => (UPLINK, "uplink"),
        };
        // No kernel BTF: the programs read packets and maps only, and parsing it would cost every port its time.
        let mut ebpf = EbpfLoader::new().btf(None).load(object).map_err(load_error)?;
        let sockets = take_map(&mut ebpf, "SOCKETS")?.try_into()?;
        let uplink = match role {
            Role::Pod => None,
            Role::Uplink(vtep) => {
                let mut map = take_map(&mut ebpf, "VTEP")?.try_into()?;
                write_vtep(&mut map, vtep)?;
                let mut prefixes = |name| -> Result<Prefixes, ProgramError> {
                    Ok(Prefixes { map: take_map(&mut ebpf, name)?.try_into()?, held: Vec::new() })
                };
                Some(UplinkMaps { vtep: map, local: prefixes("LOCAL")?, cluster: prefixes("CLUSTER")? })
            }
        };
        let program: &mut Xdp = ebpf
            .program_mut(name)
            .ok_or(ProgramError::Missing(name))?
            .try_into()
            .map_err(|error: AyaProgramError| load_error(error.into()))?;
        program.load().map_err(|error| load_error(error.into()))?;
        let attach = |program: &mut Xdp, mode| program.attach_to_if_index(ifindex, mode);
        let refused = |source| ProgramError::Attach { ifindex, source: Box::new(source) };
        let (id, mode, fallback_reason) = match preference {
            XdpPreference::Generic => {
                let id = attach(program, AyaMode::Skb).map_err(refused)?;
                (id, XdpMode::Generic, Some("generic mode was asked for".to_owned()))
            }
            XdpPreference::Native => (attach(program, AyaMode::Driver).map_err(refused)?, XdpMode::Native, None),
            XdpPreference::Auto => match attach(program, AyaMode::Driver) {
                Ok(id) => (id, XdpMode::Native, None),
                Err(native) => {
                    let id = attach(program, AyaMode::Skb).map_err(refused)?;
                    (id, XdpMode::Generic, Some(format!("the driver refused native mode: {}", root_cause(&native))))
                }
            },
        };
        let link = program.take_link(id).map_err(refused)?;
        Ok(AttachedProgram { _link: link, sockets, uplink, mode, fallback_reason })
    }

    /// Sends the packets of `queue` to a socket.
    ///
    /// # Errors
    ///
    /// If the queue's number is 64 or more.
    pub fn set_socket(&mut self, queue: u32, socket: impl AsFd) -> Result<(), ProgramError> {
        Ok(self.sockets.set(queue, socket.as_fd().as_raw_fd(), 0)?)
    }

    /// Changes what an uplink's program takes.
    ///
    /// # Errors
    ///
    /// If this is the program of a pod port.
    pub fn set_vtep(&mut self, vtep: Vtep) -> Result<(), ProgramError> {
        write_vtep(&mut self.uplink.as_mut().ok_or(ProgramError::Missing("VTEP"))?.vtep, vtep)
    }

    /// Changes what an uplink's program takes without VXLAN: what goes to one of `local`, this node's pods, from one of
    /// `cluster`. Prefixes are address and length.
    ///
    /// # Errors
    ///
    /// If this is the program of a pod port, or there are more than 4,096 prefixes.
    pub fn set_direct(&mut self, local: &[(IpAddr, u8)], cluster: &[(IpAddr, u8)]) -> Result<(), ProgramError> {
        let maps = self.uplink.as_mut().ok_or(ProgramError::Missing("LOCAL"))?;
        maps.local.replace(local)?;
        maps.cluster.replace(cluster)
    }

    /// Where the program runs.
    pub fn mode(&self) -> XdpMode {
        self.mode
    }

    /// Why it does not run in native mode, if it does not.
    pub fn fallback_reason(&self) -> Option<&str> {
        self.fallback_reason.as_deref()
    }
}

impl Prefixes {
    fn replace(&mut self, wanted: &[(IpAddr, u8)]) -> Result<(), ProgramError> {
        for prefix in wanted.iter().filter(|prefix| !self.held.contains(prefix)) {
            self.map.insert(&key_of(*prefix), 1, 0)?;
        }
        for prefix in self.held.iter().filter(|prefix| !wanted.contains(prefix)) {
            self.map.remove(&key_of(*prefix))?;
        }
        self.held = wanted.to_vec();
        Ok(())
    }
}

/// `struct prefix` of `uplink.c`.
fn key_of((address, length): (IpAddr, u8)) -> Key<[u8; 16]> {
    match address {
        IpAddr::V4(v4) => Key::new(96 + u32::from(length), v4.to_ipv6_mapped().octets()),
        IpAddr::V6(v6) => Key::new(u32::from(length), v6.octets()),
    }
}

impl fmt::Debug for AttachedProgram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AttachedProgram").field("mode", &self.mode).finish_non_exhaustive()
    }
}

/// Writes `struct vtep` of `uplink.c`.
fn write_vtep(map: &mut Array<MapData, [u8; 24]>, vtep: Vtep) -> Result<(), ProgramError> {
    let mut value = [0; 24];
    value[..16].copy_from_slice(&vtep.v6.map_or([0; 16], |address| address.octets()));
    value[16..20].copy_from_slice(&vtep.v4.map_or([0; 4], |address| address.octets()));
    value[20..22].copy_from_slice(&vtep.port.to_be_bytes());
    value[22..24].copy_from_slice(&vtep.vlan.unwrap_or(0).to_be_bytes());
    Ok(map.set(0, value, 0)?)
}

fn take_map(ebpf: &mut Ebpf, name: &'static str) -> Result<Map, ProgramError> {
    ebpf.take_map(name).ok_or(ProgramError::Missing(name))
}

/// The verifier's whole log would bury the sentence.
fn first_line(error: &EbpfError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

fn load_error(error: EbpfError) -> ProgramError {
    ProgramError::Load(Box::new(error))
}

fn root_cause(error: &AyaProgramError) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    match cause.downcast_ref::<io::Error>() {
        Some(error) => error.to_string(),
        None => cause.to_string(),
    }
}
