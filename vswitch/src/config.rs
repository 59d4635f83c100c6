//! The configuration file. `config/vswitch.toml` documents every key.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use vswitch_api::{EgressSpec, Encap, NetworkSpec, PeerSpec, Request, RouteSpec, ServiceSpec};
use vswitch_control::MAX_UPLINKS;
use vswitch_net::MacAddr;
use vswitch_xsk::{XdpPreference, ZeroCopy};

use crate::judging;

/// Longest silence until a port rests, seconds: a year.
const MAX_REST_AFTER: u64 = 31_536_000;

/// The file.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Config {
    pub(crate) daemon: Daemon,
    pub(crate) worker: Worker,
    pub(crate) uplink: Uplink,
    pub(crate) host: Host,
    pub(crate) routes: Routes,
    pub(crate) fdb: Fdb,
    pub(crate) policy: judging::Policy,
    pub(crate) connections: judging::Connections,
    pub(crate) network: Vec<NetworkSpec>,
    pub(crate) peer: Vec<PeerSpec>,
    pub(crate) route: Vec<RouteSpec>,
    pub(crate) service: Vec<ServiceSpec>,
    pub(crate) egress: Vec<EgressSpec>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Daemon {
    pub(crate) runtime_dir: PathBuf,
    pub(crate) socket: Option<PathBuf>,
    pub(crate) xdp_mode: XdpMode,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Worker {
    pub(crate) count: usize,
    pub(crate) cores: Vec<usize>,
    pub(crate) poll: Poll,
    pub(crate) idle_turns: u32,
    pub(crate) rest_after_seconds: u64,
    pub(crate) umem_frames: usize,
    pub(crate) flow_entries: usize,
    pub(crate) offload: Offload,
    pub(crate) offload_flows: u32,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Uplink {
    pub(crate) link: Option<String>,
    pub(crate) links: Vec<String>,
    pub(crate) vlan: Option<u16>,
    pub(crate) gateway: Vec<IpAddr>,
    pub(crate) router_mac: Option<MacAddr>,
    pub(crate) vtep: Vec<IpAddr>,
    pub(crate) udp_port: u16,
    pub(crate) zero_copy: ZeroCopyMode,
}

/// The port into the host's stack.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Host {
    pub(crate) network: Option<String>,
    pub(crate) link: String,
    pub(crate) masquerade: bool,
    pub(crate) forwarding: bool,
    pub(crate) table: u32,
    pub(crate) subnet_env: Option<PathBuf>,
}

/// Routes that others give the kernel.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Routes {
    pub(crate) import: Import,
    pub(crate) table: u32,
    pub(crate) protocols: Vec<u8>,
    pub(crate) encap: Encap,
}

/// Where routes come from, besides requests.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Import {
    None,
    Kernel,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Fdb {
    pub(crate) ageing_seconds: u64,
    pub(crate) limit: usize,
}

/// What a worker does with nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Poll {
    /// Spins, stays awake for as long as that was worth it lately, and then sleeps until a socket is readable.
    Adaptive,
    /// Sleeps at once.
    Interrupt,
    /// Never sleeps.
    Busy,
}

/// Who forwards flows that were judged.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Offload {
    /// The worker.
    Off,
    /// The XDP programs, as far as they can.
    Xdp,
}

#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum XdpMode {
    Auto,
    Native,
    Generic,
}

#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ZeroCopyMode {
    Auto,
    Off,
}

impl Default for Daemon {
    fn default() -> Self {
        Daemon { runtime_dir: "/run/vswitch".into(), socket: None, xdp_mode: XdpMode::Auto }
    }
}

impl Default for Worker {
    fn default() -> Self {
        Worker {
            count: 1,
            cores: Vec::new(),
            poll: Poll::Adaptive,
            idle_turns: 200,
            rest_after_seconds: 60,
            umem_frames: 32_768,
            flow_entries: 131_072,
            offload: Offload::Off,
            offload_flows: 65_536,
        }
    }
}

impl Default for Uplink {
    fn default() -> Self {
        Uplink {
            link: None,
            links: Vec::new(),
            vlan: None,
            gateway: Vec::new(),
            router_mac: None,
            vtep: Vec::new(),
            udp_port: vswitch_net::VXLAN_PORT,
            zero_copy: ZeroCopyMode::Auto,
        }
    }
}

impl Default for Host {
    fn default() -> Self {
        Host {
            network: None,
            link: "vswitch0".to_owned(),
            masquerade: true,
            forwarding: true,
            table: 254,
            subnet_env: None,
        }
    }
}

impl Default for Routes {
    fn default() -> Self {
        // Routing daemons, by their numbers in /etc/iproute2/rt_protos.
        let protocols = vec![11, 12, 13, 14, 15, 17, 18, 42, 99, 186, 187, 188, 189, 192];
        Routes { import: Import::None, table: 254, protocols, encap: Encap::Direct }
    }
}

impl Host {
    /// The switch's end of the veth.
    pub(crate) fn switch_link(&self) -> String {
        format!("{}-sw", self.link)
    }
}

impl Worker {
    /// How many flows to have the kernel forward, if any.
    pub(crate) fn offloaded(&self) -> Option<u32> {
        (self.offload == Offload::Xdp).then_some(self.offload_flows)
    }

    /// How long a port is silent until it rests, if ever.
    pub(crate) fn rest_after(&self) -> Option<Duration> {
        (self.rest_after_seconds > 0).then(|| Duration::from_secs(self.rest_after_seconds))
    }
}

impl Routes {
    pub(crate) fn is_importing(&self) -> bool {
        self.import == Import::Kernel
    }
}

impl Uplink {
    /// The uplinks in the order of the file.
    pub(crate) fn all(&self) -> impl Iterator<Item = &String> {
        self.link.iter().chain(&self.links)
    }
}

impl Default for Fdb {
    fn default() -> Self {
        Fdb { ageing_seconds: 300, limit: 8192 }
    }
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    ///
    /// One sentence that names file, line, key and what is allowed.
    pub(crate) fn read(path: &Path) -> Result<Config, String> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| format!("cannot read {}: {error}; name another file with --config", path.display()))?;
        Config::parse(&text).map_err(|error| format!("{}: {error}", path.display()))
    }

    fn parse(text: &str) -> Result<Config, String> {
        let config: Config = toml::from_str(text).map_err(|error| {
            let line = error.span().map(|span| 1 + text[..span.start.min(text.len())].matches('\n').count());
            let message = error.message().replace('\n', ", ");
            match line {
                Some(line) => {
                    let words = text.lines().nth(line - 1).unwrap_or_default().trim();
                    format!("line {line}, `{words}`: {message}")
                }
                None => message,
            }
        })?;
        config.check()?;
        Ok(config)
    }

    /// What is allowed, and hardly meant.
    pub(crate) fn doubts(&self) -> Vec<String> {
        let mut doubts = Vec::new();
        if self.worker.offloaded().is_some() {
            let wide = self.network.iter().filter(|network| network.subnet_mtu.is_some());
            doubts.extend(wide.map(|network| {
                format!(
                    "network {}: subnet_mtu makes packets that worker.offload cannot forward: choose one of the two",
                    network.name
                )
            }));
        }
        let mut cores = self.worker.cores.clone();
        cores.sort_unstable();
        if let Some(twice) = cores.windows(2).find(|pair| pair[0] == pair[1]) {
            doubts.push(format!("worker.cores: two workers share core {}: name one core a worker", twice[0]));
        }
        doubts
    }

    /// Where the daemon listens.
    pub(crate) fn socket(&self) -> PathBuf {
        self.daemon.socket.clone().unwrap_or_else(|| self.daemon.runtime_dir.join("vswitchd.sock"))
    }

    /// The requests that make what the file describes.
    pub(crate) fn requests(&self) -> impl Iterator<Item = Request> + '_ {
        let networks = self.network.iter().cloned().map(Request::NetworkAdd);
        let peers = self.peer.iter().cloned().map(Request::PeerAdd);
        let routes = self.route.iter().cloned().map(Request::RouteAdd);
        let services = (!self.service.is_empty()).then(|| Request::ServiceSet { services: self.service.clone() });
        let egress = self.egress.iter().cloned().map(Request::EgressSet);
        networks.chain(peers).chain(routes).chain(services).chain(egress)
    }

    fn check(&self) -> Result<(), String> {
        let Worker { count, cores, umem_frames, flow_entries, offload_flows, .. } = &self.worker;
        if !(1..=64).contains(count) {
            return Err(format!("worker.count: {count} is not allowed; allowed are 1 to 64"));
        }
        if !cores.is_empty() && cores.len() != *count {
            return Err(format!("worker.cores: {} cores for {count} workers; name one a worker, or none", cores.len()));
        }
        if !(1024..=1 << 20).contains(umem_frames) {
            return Err(format!("worker.umem_frames: {umem_frames} is not allowed; allowed are 1024 to 1048576"));
        }
        if !(16..=1 << 26).contains(flow_entries) {
            return Err(format!("worker.flow_entries: {flow_entries} is not allowed; allowed are 16 to 67108864"));
        }
        if !(64..=1 << 22).contains(offload_flows) {
            return Err(format!("worker.offload_flows: {offload_flows} is not allowed; allowed are 64 to 4194304"));
        }
        let rest_after = self.worker.rest_after_seconds;
        if rest_after > MAX_REST_AFTER {
            return Err(format!(
                "worker.rest_after_seconds: {rest_after} is not allowed; allowed are 0 (never) to {MAX_REST_AFTER}"
            ));
        }
        let uplinks: Vec<&String> = self.uplink.all().collect();
        if uplinks.len() > MAX_UPLINKS {
            return Err(format!("uplink.links: {} links; allowed are {MAX_UPLINKS}", uplinks.len()));
        }
        if let Some(twice) = uplinks.iter().enumerate().find(|(at, name)| uplinks[..*at].contains(name)) {
            return Err(format!("uplink.links: {} stands there twice", twice.1));
        }
        if self.uplink.vlan.is_some_and(|vid| !(1..=4094).contains(&vid)) {
            return Err("uplink.vlan: allowed are 1 to 4094 (802.1Q)".to_owned());
        }
        if self.uplink.vlan.is_some() && self.uplink.vtep.is_empty() {
            return Err(
                "uplink.vlan: set uplink.vtep too: with a tag of our own the kernel has no address there".to_owned()
            );
        }
        if self.uplink.vlan.is_none() && !self.uplink.gateway.is_empty() {
            return Err("uplink.gateway is for uplinks with a vlan: else the kernel's routes lead to peers".to_owned());
        }
        if self.host.link.is_empty() || self.host.link.len() > 12 {
            return Err(
                "host.link: allowed are names of 1 to 12 characters, for \"-sw\" is added to one end".to_owned()
            );
        }
        if self.host.table == 0 || self.routes.table == 0 {
            return Err("host.table and routes.table: 0 is no table of the kernel's; 254 is the main one".to_owned());
        }
        if self.routes.is_importing() && self.host.network.is_none() {
            return Err("routes.import: set host.network, the network that takes part in the host's routing".to_owned());
        }
        if self.routes.is_importing() && self.uplink.all().next().is_none() {
            return Err("routes.import: set uplink.link, by which the imported routes leave".to_owned());
        }
        if let Some(name) = &self.host.network
            && !self.network.iter().any(|network| network.name == *name)
        {
            return Err(format!("host.network: there is no [[network]] \"{name}\" in the file"));
        }
        if self.uplink.udp_port == 0 {
            return Err("uplink.udp_port: 0 is not allowed; allowed are 1 to 65535".to_owned());
        }
        self.policy.failsafe()?;
        self.connections.check()?;
        if self.fdb.ageing_seconds == 0 || self.fdb.limit == 0 {
            return Err("fdb.ageing_seconds and fdb.limit: 0 is not allowed; allowed is 1 or more".to_owned());
        }
        Ok(())
    }
}

impl From<XdpMode> for XdpPreference {
    fn from(mode: XdpMode) -> XdpPreference {
        match mode {
            XdpMode::Auto => XdpPreference::Auto,
            XdpMode::Native => XdpPreference::Native,
            XdpMode::Generic => XdpPreference::Generic,
        }
    }
}

impl From<ZeroCopyMode> for ZeroCopy {
    fn from(mode: ZeroCopyMode) -> ZeroCopy {
        match mode {
            ZeroCopyMode::Auto => ZeroCopy::Auto,
            ZeroCopyMode::Off => ZeroCopy::Off,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_file_says_the_defaults() {
        let shipped = Config::parse(include_str!("../../config/vswitch.toml")).unwrap();
        let defaults = Config::default();
        assert_eq!(
            (&shipped.daemon, &shipped.worker, &shipped.fdb),
            (&defaults.daemon, &defaults.worker, &defaults.fdb)
        );
        assert_eq!((&shipped.policy, &shipped.connections), (&defaults.policy, &defaults.connections));
        assert_eq!((shipped.uplink.udp_port, shipped.uplink.zero_copy), (4789, ZeroCopyMode::Auto));
        assert!(!shipped.network.is_empty());
    }

    #[test]
    fn errors_name_the_line_the_key_and_what_is_allowed() {
        for (text, wanted) in [
            ("[worker]\ncuont = 1", "line 2, `cuont = 1`: unknown field `cuont`, expected one of `count`"),
            ("[worker]\nrest_after_seconds = -1", "line 2, `rest_after_seconds = -1`: invalid value"),
            ("[worker]\nrest_after_seconds = 99999999999", "allowed are 0 (never) to 31536000"),
            ("[worker]\ncount = 0", "worker.count: 0 is not allowed; allowed are 1 to 64"),
            ("[uplink]\nvtep = [\"300.1.1.1\"]", "line 2"),
            ("[[network]]\nname = \"a\"\nvni = 16777216", "16777216 is no VNI: allowed are 0 to 16777215"),
            ("[[network]]\nname = \"a\"\nvni = 1\nmode = \"routing\"", "expected `routed` or `bridged`"),
            ("[worker", "line 1"),
        ] {
            let error = Config::parse(text).unwrap_err();
            assert!(error.contains(wanted), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn what_is_hardly_meant_is_said() {
        let doubts = |text: &str| Config::parse(text).unwrap().doubts().join("; ");
        assert_eq!(doubts(""), "");
        assert!(doubts("[worker]\ncount = 2\ncores = [1, 1]").contains("share core 1"));
        let network = "[[network]]\nname = \"a\"\nvni = 1\nranges = [\"10.1.0.0/24\"]\nsubnets = [\"10.1.0.0/16\"]\nsubnet_mtu = 9000";
        assert_eq!(doubts(network), "");
        assert!(doubts(&format!("[worker]\noffload = \"xdp\"\n{network}")).contains("choose one of the two"));
    }
}
