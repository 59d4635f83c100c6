//! What the runtime gives: the environment and the network configuration on standard input.

use std::collections::BTreeMap;
use std::env;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::{Map, Value};
use vswitch_api::{Attachment, Bandwidth, PortMapping, Protocol};
use vswitch_net::MacAddr;

use crate::error::{CniError, Code};
use crate::result::{CniResult, Dns, Version};

/// The network configuration, section 1 of the specification, with our own keys.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct NetConf {
    #[serde(default)]
    pub(crate) cni_version: String,
    pub(crate) name: String,
    /// The daemon's control socket.
    #[serde(default = "default_socket")]
    pub(crate) socket: PathBuf,
    /// The switch's network; none for its first one.
    #[serde(default)]
    pub(crate) network: Option<String>,
    #[serde(default)]
    mac: Option<MacAddr>,
    #[serde(default)]
    ips: Vec<String>,
    #[serde(default)]
    pub(crate) mtu: Option<u32>,
    /// Keys of the reference `bridge` plugin that mean the same here.
    #[serde(flatten)]
    pub(crate) bridge: BridgeKeys,
    #[serde(default)]
    ipam: Option<Ipam>,
    #[serde(default)]
    pub(crate) dns: Option<Dns>,
    #[serde(default)]
    runtime_config: Wishes,
    #[serde(default)]
    args: Args,
    #[serde(default)]
    pub(crate) prev_result: Option<CniResult>,
    #[serde(default, rename = "cni.dev/valid-attachments")]
    valid_attachments: Option<Vec<ValidAttachment>>,
    /// The whole configuration, to hand to a delegated IPAM plugin.
    #[serde(skip)]
    pub(crate) raw: Vec<u8>,
}

/// Keys that conflists of the reference `bridge` plugin have, by its names.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct BridgeKeys {
    /// The network, if `network` does not name it.
    bridge: Option<String>,
    /// Routed networks have a gateway anyway, and its address is nobody's choice.
    #[allow(dead_code, reason = "accepted, and true of every routed network")]
    is_gateway: bool,
    /// False for an interface beside the one that has the default route.
    pub(crate) is_default_gateway: Option<bool>,
    #[allow(dead_code, reason = "there is no address of a bridge to replace")]
    force_address: bool,
    pub(crate) ip_masq: bool,
    #[allow(dead_code, reason = "the daemon has its own way to masquerade")]
    ip_masq_backend: Option<String>,
    pub(crate) hairpin_mode: bool,
    promisc_mode: bool,
    pub(crate) vlan: u16,
    pub(crate) vlan_trunk: Vec<VlanTrunk>,
    pub(crate) preserve_default_vlan: Option<bool>,
    pub(crate) macspoofchk: bool,
    enabledad: bool,
    disable_container_interface: bool,
    pub(crate) port_isolation: bool,
}

/// VLANs of a trunk: one, or all that exist from one to another.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct VlanTrunk {
    #[serde(default)]
    pub(crate) id: Option<u16>,
    #[serde(default, rename = "minID")]
    pub(crate) min: Option<u16>,
    #[serde(default, rename = "maxID")]
    pub(crate) max: Option<u16>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Ipam {
    #[serde(default, rename = "type")]
    kind: String,
}

/// What a runtime may ask for by capability.
#[derive(Clone, Debug, Default, Deserialize)]
struct Wishes {
    #[serde(default)]
    mac: Option<MacAddr>,
    #[serde(default)]
    ips: Vec<String>,
    #[serde(default, rename = "portMappings")]
    port_mappings: Vec<WishedMapping>,
    #[serde(default)]
    bandwidth: WishedBandwidth,
}

/// As the CNI conventions write it.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct WishedMapping {
    host_port: u16,
    container_port: u16,
    #[serde(default)]
    protocol: String,
    #[serde(default, rename = "hostIP")]
    host_ip: String,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct WishedBandwidth {
    ingress_rate: u64,
    ingress_burst: u64,
    egress_rate: u64,
    egress_burst: u64,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Args {
    #[serde(default)]
    cni: Wishes,
}

#[derive(Clone, Debug, Deserialize)]
struct ValidAttachment {
    #[serde(rename = "containerID")]
    container_id: String,
    ifname: String,
}

/// Keys that are ours or the specification's. Others are refused, but for names with a slash, which runtimes may add.
const KEYS: &[&str] = &[
    "cniVersion",
    "cniVersions",
    "name",
    "type",
    "socket",
    "network",
    "mac",
    "ips",
    "mtu",
    "ipam",
    "dns",
    "runtimeConfig",
    "capabilities",
    "args",
    "prevResult",
    "disableCheck",
    "disableGC",
    "loadOnlyInlinedPlugins",
    "bridge",
    "isGateway",
    "isDefaultGateway",
    "forceAddress",
    "ipMasq",
    "ipMasqBackend",
    "hairpinMode",
    "promiscMode",
    "vlan",
    "vlanTrunk",
    "preserveDefaultVlan",
    "macspoofchk",
    "enabledad",
    "disableContainerInterface",
    "portIsolation",
];

impl NetConf {
    /// Decodes and checks a configuration.
    pub(crate) fn parse(raw: Vec<u8>) -> Result<NetConf, CniError> {
        let decode = |error: serde_json::Error| {
            CniError::new(Code::Decode, format!("the network configuration is no JSON object: {error}"))
        };
        let map: Map<String, Value> = serde_json::from_slice(&raw).map_err(decode)?;
        if let Some(key) = map.keys().find(|key| !KEYS.contains(&key.as_str()) && !key.contains('/')) {
            let allowed = KEYS.join(", ");
            return Err(invalid(format!("unknown key \"{key}\" in the network configuration; allowed are {allowed}")));
        }
        let mut conf: NetConf = serde_json::from_value(Value::Object(map))
            .map_err(|error| invalid(format!("the network configuration is wrong: {error}")))?;
        if conf.name.is_empty() {
            return Err(invalid("name: a network needs one".to_owned()));
        }
        conf.bridge.check()?;
        if conf.network.is_none() {
            conf.network = conf.bridge.bridge.clone();
        }
        conf.raw = raw;
        Ok(conf)
    }

    /// The version asked for, which is the version answered.
    pub(crate) fn version(&self) -> Result<Version, CniError> {
        Version::parse(&self.cni_version).ok_or_else(|| {
            CniError::new(
                Code::IncompatibleVersion,
                format!("cniVersion \"{}\" is not spoken; set it to one of {}", self.cni_version, Version::list()),
            )
        })
    }

    /// The IPAM plugin to delegate to; none for the built-in one.
    pub(crate) fn ipam_plugin(&self) -> Option<&str> {
        self.ipam.as_ref().map(|ipam| ipam.kind.as_str()).filter(|kind| !kind.is_empty())
    }

    /// The MAC asked for: by the runtime first, then by its arguments, then by the configuration.
    pub(crate) fn mac(&self, environment: &Environment) -> Result<Option<MacAddr>, CniError> {
        let argument = environment.args.get("MAC").map(|mac| {
            mac.parse().map_err(|error| CniError::new(Code::InvalidEnvironment, format!("CNI_ARGS, MAC: {error}")))
        });
        Ok(self.runtime_config.mac.or(self.args.cni.mac).or(argument.transpose()?).or(self.mac))
    }

    /// The addresses asked for, with or without a prefix length.
    pub(crate) fn ips(&self, environment: &Environment) -> Result<Vec<IpAddr>, CniError> {
        let argument = environment.args.get("IP").map(|ips| ips.split(',').map(str::to_owned).collect());
        let wishes = [&self.runtime_config.ips, &self.args.cni.ips];
        let chosen = match wishes.into_iter().find(|ips| !ips.is_empty()) {
            Some(ips) => ips.clone(),
            None => argument.unwrap_or_else(|| self.ips.clone()),
        };
        chosen.iter().map(|text| parse_ip(text)).collect()
    }

    /// Ports of the host that the runtime wants to lead to the pod. A host port of zero asks for none.
    pub(crate) fn port_mappings(&self) -> Result<Vec<PortMapping>, CniError> {
        let mappings = self.runtime_config.port_mappings.iter().filter(|mapping| mapping.host_port != 0);
        mappings
            .map(|mapping| {
                let protocol = match mapping.protocol.to_lowercase().as_str() {
                    "" | "tcp" => Protocol::Tcp,
                    "udp" => Protocol::Udp,
                    "sctp" => Protocol::Sctp,
                    other => {
                        return Err(invalid(format!(
                            "portMappings: protocol \"{other}\" is unknown; allowed are tcp, udp and sctp"
                        )));
                    }
                };
                let host_ip = match mapping.host_ip.as_str() {
                    "" => None,
                    text => Some(parse_ip(text)?),
                };
                let WishedMapping { host_port, container_port, .. } = *mapping;
                Ok(PortMapping { host_port, container_port, protocol, host_ip })
            })
            .collect()
    }

    /// Rates that the runtime wants.
    pub(crate) fn bandwidth(&self) -> Bandwidth {
        let WishedBandwidth { ingress_rate, ingress_burst, egress_rate, egress_burst } = self.runtime_config.bandwidth;
        Bandwidth { ingress_rate, ingress_burst, egress_rate, egress_burst }
    }

    /// The attachments that GC must keep.
    pub(crate) fn valid_attachments(&self) -> Result<Vec<Attachment>, CniError> {
        let valid = self.valid_attachments.as_ref().ok_or_else(|| {
            invalid("GC needs cni.dev/valid-attachments: a list, empty if no container is left".to_owned())
        })?;
        let own = |valid: &ValidAttachment| Attachment {
            container_id: valid.container_id.clone(),
            ifname: valid.ifname.clone(),
        };
        Ok(valid.iter().map(own).collect())
    }
}

impl BridgeKeys {
    /// What the switch does not do is refused, and not passed over.
    fn check(&self) -> Result<(), CniError> {
        let refused = [
            (self.promisc_mode, "promiscMode: a port gets what is for it; to see more, make a mirror"),
            (self.enabledad, "enabledad: the switch gives out addresses once, and duplicates are not looked for"),
            (self.disable_container_interface, "disableContainerInterface: an interface that is down is no attachment"),
        ];
        if let Some((_, reason)) = refused.iter().find(|(is_set, _)| *is_set) {
            return Err(invalid(format!("{reason}; leave the key out")));
        }
        if self.vlan != 0 && !self.vlan_trunk.is_empty() {
            return Err(invalid("vlan and vlanTrunk: a port is of one VLAN or a trunk, not both".to_owned()));
        }
        for trunk in &self.vlan_trunk {
            let is_range = matches!((trunk.min, trunk.max), (Some(min), Some(max)) if min <= max);
            let is_whole = if trunk.id.is_some() { trunk.min.is_none() && trunk.max.is_none() } else { is_range };
            if !is_whole {
                return Err(invalid(
                    "vlanTrunk: each entry has an id, or a minID and a maxID that is not less".to_owned(),
                ));
            }
        }
        Ok(())
    }
}

/// `CNI_*` variables.
#[derive(Clone, Debug, Default)]
pub(crate) struct Environment {
    pub(crate) container_id: String,
    pub(crate) netns: Option<PathBuf>,
    pub(crate) ifname: String,
    pub(crate) args: BTreeMap<String, String>,
    pub(crate) path: Vec<PathBuf>,
}

impl Environment {
    /// Reads what concerns one attachment.
    pub(crate) fn of_attachment() -> Result<Environment, CniError> {
        let container_id = variable("CNI_CONTAINERID")?;
        let ifname = variable("CNI_IFNAME")?;
        let starts_well = container_id.starts_with(|c: char| c.is_ascii_alphanumeric());
        if !starts_well || !container_id.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-')) {
            return Err(wrong(format!(
                "CNI_CONTAINERID \"{container_id}\" is not allowed: letters, digits, '_', '.' and '-'"
            )));
        }
        let is_bad = |c: char| c == '/' || c == ':' || c.is_whitespace();
        if ifname.len() > 15 || matches!(ifname.as_str(), "." | "..") || ifname.contains(is_bad) {
            return Err(wrong(format!(
                "CNI_IFNAME \"{ifname}\" is no interface name: at most 15 characters, no '/', ':' or space"
            )));
        }
        Ok(Environment { container_id, ifname, ..Environment::of_network()? })
    }

    /// Reads what concerns no attachment.
    pub(crate) fn of_network() -> Result<Environment, CniError> {
        let text = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        let args = text("CNI_ARGS").unwrap_or_default();
        let args = args
            .split(';')
            .filter(|pair| !pair.is_empty())
            .map(|pair| {
                let (key, value) = pair
                    .split_once('=')
                    .ok_or_else(|| wrong(format!("CNI_ARGS: \"{pair}\" is no pair; write KEY=VALUE;KEY=VALUE")))?;
                Ok((key.to_owned(), value.to_owned()))
            })
            .collect::<Result<_, CniError>>()?;
        Ok(Environment {
            container_id: String::new(),
            netns: text("CNI_NETNS").map(PathBuf::from),
            ifname: String::new(),
            args,
            path: text("CNI_PATH").map(|paths| env::split_paths(&paths).collect()).unwrap_or_default(),
        })
    }

    /// The namespace, for commands that need one.
    pub(crate) fn netns(&self) -> Result<&Path, CniError> {
        self.netns
            .as_deref()
            .ok_or_else(|| wrong("CNI_NETNS is not set: the runtime must name the container's namespace".to_owned()))
    }

    pub(crate) fn attachment(&self) -> Attachment {
        Attachment { container_id: self.container_id.clone(), ifname: self.ifname.clone() }
    }

    /// What is kept with the port: all arguments but those that are instructions.
    pub(crate) fn labels(&self) -> BTreeMap<String, String> {
        let is_label = |key: &str| !matches!(key, "IgnoreUnknown" | "IP" | "MAC");
        self.args.iter().filter(|(key, _)| is_label(key)).map(|(key, value)| (key.clone(), value.clone())).collect()
    }
}

fn variable(name: &str) -> Result<String, CniError> {
    match env::var(name) {
        Ok(value) if !value.is_empty() => Ok(value),
        _ => Err(wrong(format!("{name} is not set: this program is called by a container runtime"))),
    }
}

fn parse_ip(text: &str) -> Result<IpAddr, CniError> {
    let net = text.parse::<IpNet>().map(|net| net.addr());
    net.or_else(|_| text.parse())
        .map_err(|_| invalid(format!("ips: \"{text}\" is no address; write 10.0.0.2 or fd00::2")))
}

fn default_socket() -> PathBuf {
    PathBuf::from(vswitch_api::DEFAULT_SOCKET)
}

fn invalid(msg: String) -> CniError {
    CniError::new(Code::InvalidConfig, msg)
}

fn wrong(msg: String) -> CniError {
    CniError::new(Code::InvalidEnvironment, msg)
}
