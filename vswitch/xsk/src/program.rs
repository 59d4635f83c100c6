//! The XDP programs: loaded once with aya, attached to each link, detached when dropped or when the process dies.
//!
//! Links share the programs and their maps: what a port has of its own is an entry in two maps. A program is attached by a
//! BPF link that lives as long as its descriptor (kernel 5.9), so that nothing stays on the device whatever ends the daemon.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Instant;
use std::{fmt, io};

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, Map, MapData, MapError, XskMap};
use aya::programs::xdp::XdpLink;
use aya::programs::{ProgramError as AyaProgramError, Xdp, XdpMode as AyaMode};
use aya::{Ebpf, EbpfError, EbpfLoader};
use vswitch_net::PortId;

use crate::fastpath::{FastPath, buckets_for};
use crate::waiting::Waiting;

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/switch.o"));

/// Its programs.
const POD: &str = "pod";
const UPLINK: &str = "uplink";

/// Sizes of maps in `sockets.h`.
const MAX_LINKS: u32 = 4096;
const MAX_QUEUES: u32 = 64;

/// What a program is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The host end of a pod's veth: every packet is the switch's.
    Pod,
    /// A NIC of the host, one of the first ports: only VXLAN to our VTEP is the switch's.
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

/// Whether a link is without sockets; `waiting.h` has the same numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// It has some.
    None = 0,
    /// It has none, and its packets wait for them.
    Waits = 1,
    /// It has none and cannot have any for now: its packets are counted as lost.
    Deaf = 2,
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
    /// The maps of the fast path cannot be shared.
    #[error("cannot map the table of offloaded flows: {0}; lower worker.offload_flows")]
    FastPath(#[source] io::Error),
    /// All places of the maps are taken.
    #[error("no room for another link: {MAX_LINKS} are attached")]
    Full,
    /// There is no room for such a queue.
    #[error("queue {0}: a link has at most {MAX_QUEUES}")]
    Queue(u32),
    /// A map could not be written.
    #[error("cannot write an XDP map: {0}")]
    Map(#[from] MapError),
}

/// The programs of all links, and the maps that they share. Loaded once.
pub struct Programs {
    ebpf: Ebpf,
    sockets: XskMap<MapData>,
    links: HashMap<MapData, u32, [u32; 4]>,
    lost: Array<MapData, u64>,
    vteps: Array<MapData, [u8; 24]>,
    local: Prefixes,
    cluster: Prefixes,
    /// Where packets of links at rest wait, until somebody takes it.
    waiting: Option<Waiting>,
    /// Places of links in the map of sockets that nobody has.
    places: Vec<u32>,
}

/// A program on a link; see [`Programs::detach`].
#[derive(Debug)]
pub struct AttachedProgram {
    _link: XdpLink,
    ifindex: u32,
    port: PortId,
    place: u32,
    is_fast: bool,
    rest: Rest,
    /// What had been lost at its place when that was last looked at.
    lost: u64,
    mode: XdpMode,
    /// Why native mode was not used, in the kernel's words.
    fallback_reason: Option<String>,
}

/// A map of prefixes and what it holds.
struct Prefixes {
    map: LpmTrie<MapData, [u8; 16], u8>,
    held: Vec<(IpAddr, u8)>,
}

impl Programs {
    /// Loads the programs. With `fast_flows`, links may forward so many flows by themselves; without, the fast path is there
    /// and has no room. `seed` is a secret for their hash, `start` the beginning of the daemon's clock.
    ///
    /// # Errors
    ///
    /// Each tells what to do; nothing is left behind.
    pub fn load(
        fast_flows: Option<u32>,
        seed: u64,
        start: Instant,
    ) -> Result<(Programs, Option<FastPath>), ProgramError> {
        let buckets = fast_flows.map_or(1, buckets_for);
        // No kernel BTF: the programs read packets and maps only.
        let mut ebpf =
            EbpfLoader::new().btf(None).map_max_entries("FLOWS", buckets).load(OBJECT).map_err(load_error)?;
        for name in [POD, UPLINK] {
            program(&mut ebpf, name)?.load().map_err(|error| load_error(error.into()))?;
        }
        let prefixes =
            |map: Map| -> Result<Prefixes, ProgramError> { Ok(Prefixes { map: map.try_into()?, held: Vec::new() }) };
        let fast_path = match fast_flows {
            None => None,
            Some(_) => {
                let map = |name| match ebpf.map(name) {
                    Some(Map::Array(data)) => Ok(data),
                    _ => Err(ProgramError::Missing(name)),
                };
                let fast_path = FastPath::new(map("FLOWS")?, map("TABLE")?, seed, start);
                Some(fast_path.map_err(ProgramError::FastPath)?)
            }
        };
        let programs = Programs {
            sockets: take_map(&mut ebpf, "SOCKETS")?.try_into()?,
            links: take_map(&mut ebpf, "LINKS")?.try_into()?,
            lost: take_map(&mut ebpf, "LOST")?.try_into()?,
            vteps: take_map(&mut ebpf, "VTEPS")?.try_into()?,
            local: prefixes(take_map(&mut ebpf, "LOCAL")?)?,
            cluster: prefixes(take_map(&mut ebpf, "CLUSTER")?)?,
            waiting: Some(Waiting::new(take_map(&mut ebpf, "WAITING")?.try_into()?)),
            places: (0..MAX_LINKS).rev().collect(),
            ebpf,
        };
        Ok((programs, fast_path))
    }

    /// Attaches the program of a port to a link.
    ///
    /// # Errors
    ///
    /// Each tells what to do; nothing is left behind.
    pub fn attach(
        &mut self,
        port: PortId,
        role: Role,
        ifindex: u32,
        preference: XdpPreference,
    ) -> Result<AttachedProgram, ProgramError> {
        let name = match role {
            Role::Pod => POD,
            Role::Uplink(vtep) => {
                self.write_vtep(port, vtep)?;
                UPLINK
            }
        };
        let program = program(&mut self.ebpf, name)?;
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
        let place = self.places.pop().ok_or(ProgramError::Full)?;
        let lost = self.lost.get(&place, 0)?;
        let attached = AttachedProgram {
            _link: link,
            ifindex,
            port,
            place,
            is_fast: false,
            rest: Rest::None,
            lost,
            mode,
            fallback_reason,
        };
        if let Err(error) = self.write_link(&attached) {
            self.places.push(place);
            return Err(error);
        }
        Ok(attached)
    }

    /// Takes a program off its link.
    pub fn detach(&mut self, attached: AttachedProgram) {
        // What is not there need not be removed; sockets leave their map when they are closed.
        let _: Result<(), MapError> = self.links.remove(&attached.ifindex);
        self.places.push(attached.place);
    }

    /// Sends the packets of `queue` to a socket.
    ///
    /// # Errors
    ///
    /// If the queue's number is 64 or more.
    pub fn set_socket(
        &mut self,
        attached: &AttachedProgram,
        queue: u32,
        socket: impl AsFd,
    ) -> Result<(), ProgramError> {
        if queue >= MAX_QUEUES {
            return Err(ProgramError::Queue(queue));
        }
        Ok(self.sockets.set(attached.place * MAX_QUEUES + queue, socket.as_fd().as_raw_fd(), 0)?)
    }

    /// Says whether a link is without sockets, and whether what comes from it waits ([`take_waiting`](Self::take_waiting)).
    ///
    /// # Errors
    ///
    /// Those of the map; then it is as before.
    pub fn set_rest(&mut self, attached: &mut AttachedProgram, rest: Rest) -> Result<(), ProgramError> {
        let before = std::mem::replace(&mut attached.rest, rest);
        self.write_link(attached).inspect_err(|_| attached.rest = before)
    }

    /// Sends a link's packets to its sockets no more.
    pub fn unset_sockets(&mut self, attached: &AttachedProgram, queues: u32) {
        for queue in 0..queues.min(MAX_QUEUES) {
            // What is not there need not be removed.
            let _: Result<(), MapError> = self.sockets.unset(attached.place * MAX_QUEUES + queue);
        }
    }

    /// How many packets of a link at rest found no room to wait since this was asked last.
    pub fn take_lost(&self, attached: &mut AttachedProgram) -> u64 {
        let lost = self.lost.get(&attached.place, 0).unwrap_or(attached.lost);
        lost.saturating_sub(std::mem::replace(&mut attached.lost, lost))
    }

    /// The packets of links at rest, for whoever binds their sockets. None if it was taken.
    pub fn take_waiting(&mut self) -> Option<Waiting> {
        self.waiting.take()
    }

    /// Lets flows of a link be forwarded there, or not.
    ///
    /// # Errors
    ///
    /// Those of the map.
    pub fn set_fast(&mut self, attached: &mut AttachedProgram, is_fast: bool) -> Result<(), ProgramError> {
        attached.is_fast = is_fast;
        self.write_link(attached)
    }

    /// Changes what an uplink's program takes.
    ///
    /// # Errors
    ///
    /// Those of the map.
    pub fn set_vtep(&mut self, attached: &AttachedProgram, vtep: Vtep) -> Result<(), ProgramError> {
        self.write_vtep(attached.port, vtep)
    }

    /// Changes what uplinks' programs take without VXLAN: what goes to one of `local`, this node's pods, from one of
    /// `cluster`. Prefixes are address and length.
    ///
    /// # Errors
    ///
    /// If there are more than 4,096 prefixes.
    pub fn set_direct(&mut self, local: &[(IpAddr, u8)], cluster: &[(IpAddr, u8)]) -> Result<(), ProgramError> {
        self.local.replace(local)?;
        self.cluster.replace(cluster)
    }

    /// Writes `struct link` of `sockets.h`.
    fn write_link(&mut self, attached: &AttachedProgram) -> Result<(), ProgramError> {
        let AttachedProgram { place, port, is_fast, rest, .. } = *attached;
        let value = [place, u32::from(port.0), u32::from(is_fast), rest as u32];
        Ok(self.links.insert(attached.ifindex, value, 0)?)
    }

    /// Writes `struct vtep` of `uplink.h`.
    fn write_vtep(&mut self, port: PortId, vtep: Vtep) -> Result<(), ProgramError> {
        let mut value = [0; 24];
        value[..16].copy_from_slice(&vtep.v6.map_or([0; 16], |address| address.octets()));
        value[16..20].copy_from_slice(&vtep.v4.map_or([0; 4], |address| address.octets()));
        value[20..22].copy_from_slice(&vtep.port.to_be_bytes());
        value[22..24].copy_from_slice(&vtep.vlan.unwrap_or(0).to_be_bytes());
        Ok(self.vteps.set(u32::from(port.0), value, 0)?)
    }
}

impl AttachedProgram {
    /// Where the program runs.
    pub fn mode(&self) -> XdpMode {
        self.mode
    }

    /// Why it does not run in native mode, if it does not.
    pub fn fallback_reason(&self) -> Option<&str> {
        self.fallback_reason.as_deref()
    }

    /// Whether flows of the link may be forwarded there.
    pub fn is_fast(&self) -> bool {
        self.is_fast
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

/// `struct prefix` of `uplink.h`.
fn key_of((address, length): (IpAddr, u8)) -> Key<[u8; 16]> {
    match address {
        IpAddr::V4(v4) => Key::new(96 + u32::from(length), v4.to_ipv6_mapped().octets()),
        IpAddr::V6(v6) => Key::new(u32::from(length), v6.octets()),
    }
}

impl fmt::Debug for Programs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Programs").finish_non_exhaustive()
    }
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut Xdp, ProgramError> {
    let program = ebpf.program_mut(name).ok_or(ProgramError::Missing(name))?;
    program.try_into().map_err(|error: AyaProgramError| load_error(error.into()))
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
