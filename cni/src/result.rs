//! Results, in the form of the version that was asked for (CNI specification, section 5, "Success").

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use vswitch_net::MacAddr;

/// Versions of the specification that are spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Version {
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

impl Version {
    pub(crate) const ALL: [Version; 3] = [Version::V0_4_0, Version::V1_0_0, Version::V1_1_0];

    pub(crate) fn parse(text: &str) -> Option<Version> {
        Version::ALL.into_iter().find(|version| version.name() == text)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Version::V0_4_0 => "0.4.0",
            Version::V1_0_0 => "1.0.0",
            Version::V1_1_0 => "1.1.0",
        }
    }

    pub(crate) fn list() -> String {
        Version::ALL.map(Version::name).join(", ")
    }
}

/// A result; also what a delegated IPAM plugin gives and what `prevResult` holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct CniResult {
    #[serde(default)]
    pub(crate) cni_version: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) interfaces: Vec<Interface>,
    #[serde(default)]
    pub(crate) ips: Vec<Ip>,
    #[serde(default)]
    pub(crate) routes: Vec<Route>,
    #[serde(default)]
    pub(crate) dns: Dns,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Interface {
    pub(crate) name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mac: Option<MacAddr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mtu: Option<u32>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) sandbox: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) socket_path: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none", rename = "pciID")]
    pub(crate) pci_id: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ip {
    /// `4` or `6`; gone since 1.0.0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) version: Option<String>,
    pub(crate) address: IpNet,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) gateway: Option<IpAddr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) interface: Option<usize>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Route {
    pub(crate) dst: IpNet,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) gw: Option<IpAddr>,
    /// Since 1.1.0, as the four below.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mtu: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) advmss: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) priority: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) table: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) scope: Option<u32>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Dns {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) nameservers: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) domain: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) search: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) options: Vec<String>,
}

impl CniResult {
    /// The result with exactly the fields that `version` knows.
    pub(crate) fn into_version(mut self, version: Version) -> CniResult {
        self.cni_version = version.name().to_owned();
        for ip in &mut self.ips {
            let family = if ip.address.addr().is_ipv4() { "4" } else { "6" };
            ip.version = (version == Version::V0_4_0).then(|| family.to_owned());
        }
        if version < Version::V1_1_0 {
            for interface in &mut self.interfaces {
                (interface.mtu, interface.socket_path, interface.pci_id) = (None, None, None);
            }
            for route in &mut self.routes {
                let Route { dst, gw, .. } = *route;
                *route = Route::new(dst, gw);
            }
        }
        self
    }
}

impl Route {
    pub(crate) fn new(dst: IpNet, gw: Option<IpAddr>) -> Route {
        Route { dst, gw, mtu: None, advmss: None, priority: None, table: None, scope: None }
    }
}

impl Interface {
    pub(crate) fn new(
        name: impl Into<String>,
        mac: Option<MacAddr>,
        mtu: Option<u32>,
        sandbox: impl Into<String>,
    ) -> Interface {
        Interface { name: name.into(), mac, mtu, sandbox: sandbox.into(), socket_path: None, pci_id: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result() -> CniResult {
        let mut route = Route::new("0.0.0.0/0".parse().unwrap(), "169.254.1.1".parse().ok());
        route.mtu = Some(1450);
        CniResult {
            interfaces: vec![Interface::new("eth0", Some(MacAddr([2; 6])), Some(65_000), "/run/netns/a")],
            ips: vec![Ip { version: None, address: "10.0.0.2/32".parse().unwrap(), gateway: None, interface: Some(0) }],
            routes: vec![route],
            ..CniResult::default()
        }
    }

    #[test]
    fn each_version_has_its_own_fields() {
        let json = |version| serde_json::to_string(&result().into_version(version)).unwrap();
        let (old, plain, new) = (json(Version::V0_4_0), json(Version::V1_0_0), json(Version::V1_1_0));
        assert!(old.contains(r#""version":"4""#) && !old.contains("mtu"));
        assert!(
            !plain.contains(r#""version":"4""#) && !plain.contains("mtu") && plain.contains(r#""cniVersion":"1.0.0""#)
        );
        assert!(new.contains(r#""mtu":65000"#) && new.contains(r#""mtu":1450"#));
    }
}
