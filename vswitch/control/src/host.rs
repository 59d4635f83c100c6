//! The port into the host's stack, and what the host's kernel is to be told because of it.
//!
//! The port is a veth: one end is the host's, with this node's address in the network and routes to it, the other end is a
//! port of the switch. Kubelet's probes, services of the host, and everything outside the cluster pass through it. What
//! control wants of the kernel is a [`HostPlan`]; the daemon carries it out, and takes it back when it ends.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use vswitch_api::{ApiError, PortMapping, PortSpec, Protocol};
use vswitch_net::MacAddr;

use crate::Control;
use crate::backend::Attached;
use crate::checks::{conflict, invalid};
use crate::desired::NetworkEntry;
use crate::routes::routers;

/// Address and length.
pub type Prefix = (IpAddr, u8);

/// The port as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostState {
    /// The host's end.
    pub link: String,
    /// MAC address of the host's end.
    pub mac: MacAddr,
    /// How the switch's end is attached.
    pub attached: Attached,
    /// What the host lacks for packets to pass beyond it; none if nothing.
    pub problem: Option<String>,
}

/// What the host's kernel is to be told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostPlan {
    /// Addresses of the host's end.
    pub addresses: Vec<IpAddr>,
    /// This node's own ranges, by way of the host's end: what a routing daemon may advertise.
    pub ranges: Vec<IpNet>,
    /// Other nodes' prefixes, and addresses that the switch translates, by way of the host's end, and their MTU.
    pub remote: Vec<(IpNet, u32)>,
    /// The rules of the table `inet vswitch`, for `nft -f`; none if there are none.
    pub rules: Option<String>,
    /// Ports of the host whose UDP these rules lead to pods, and where to.
    pub udp: BTreeSet<(u16, SocketAddr)>,
}

impl Control {
    /// What the host's kernel is to be told; none if no network is joined to it.
    pub fn host_plan(&self, link: &str) -> Option<HostPlan> {
        let network = self.host_network()?;
        let wire = self.wire_mtu(&network.spec);
        let asked = self.desired.routes.keys().filter(|(index, _)| *index == network.index);
        // The default route is the host's own affair.
        let remote = asked.map(|&(_, prefix)| (prefix, wire)).filter(|(prefix, _)| prefix.prefix_len() > 0);
        let translated = self.translated_addresses(network.index).into_iter().map(IpNet::from);
        let translated = translated.filter(|address| !network.spec.ranges.iter().any(|range| range.contains(address)));
        let ranges = if network.spec.ranges.is_empty() { &network.spec.subnets } else { &network.spec.ranges };
        Some(HostPlan {
            addresses: routers(&network.spec),
            ranges: ranges.clone(),
            remote: remote.chain(translated.map(|address| (address, wire))).collect(),
            rules: self.rules(network, link),
            udp: self.udp_mappings(network),
        })
    }

    /// What uplinks take without VXLAN: addresses of this node's pods, and of the cluster. Empty unless peers are routed
    /// to directly; none if no network is joined to the host.
    pub fn direct_prefixes(&self) -> Option<(Vec<Prefix>, Vec<Prefix>)> {
        self.host_network()?;
        let Some(network) = self.direct_network() else { return Some((Vec::new(), Vec::new())) };
        let list = |prefixes: &[IpNet]| prefixes.iter().map(|prefix| (prefix.addr(), prefix.prefix_len())).collect();
        Some((list(&network.spec.ranges), list(&network.spec.subnets)))
    }

    /// What flanneld writes to `/run/flannel/subnet.env`.
    pub fn subnet_env(&self) -> Option<String> {
        let network = self.host_network()?;
        let mut text = String::new();
        for (family, is_v6) in [("", false), ("IPV6_", true)] {
            let of_family =
                |prefixes: &[IpNet]| prefixes.iter().find(|prefix| prefix.addr().is_ipv6() == is_v6).copied();
            let Some(range) = of_family(&network.spec.ranges) else { continue };
            let cluster = of_family(&network.spec.subnets).unwrap_or(range);
            let gateway = routers(&network.spec).into_iter().find(|router| router.is_ipv6() == is_v6);
            let _ = writeln!(text, "FLANNEL_{family}NETWORK={cluster}");
            let _ = writeln!(text, "FLANNEL_{family}SUBNET={}/{}", gateway.unwrap_or(range.addr()), range.prefix_len());
        }
        let _ = writeln!(text, "FLANNEL_MTU={}", self.wire_mtu(&network.spec));
        let _ = writeln!(text, "FLANNEL_IPMASQ={}", self.config.masquerade);
        Some(text)
    }

    /// A mapped port leads from the host, so its network must be joined to it, and no other port may have it.
    pub(crate) fn check_mappings(&self, spec: &PortSpec, network: &NetworkEntry) -> Result<(), ApiError> {
        if !spec.port_mappings.is_empty() && !self.is_host_network(&network.spec) {
            return Err(invalid(format!(
                "port_mappings: network \"{}\" is not joined to the host: set [host] network = \"{0}\"",
                network.spec.name
            )));
        }
        for (at, mapping) in spec.port_mappings.iter().enumerate() {
            if mapping.host_port == 0 || mapping.container_port == 0 {
                return Err(invalid("port_mappings: 0 is no port; allowed are 1 to 65535"));
            }
            let others = self.desired.ports.values().map(|port| &port.record.spec);
            let others = others.flat_map(|spec| spec.port_mappings.iter().map(|mapping| (spec.link.as_str(), mapping)));
            let own = spec.port_mappings[..at].iter().map(|mapping| (spec.link.as_str(), mapping));
            if let Some((link, _)) = others.chain(own).find(|(_, other)| collides(other, mapping)) {
                return Err(conflict(format!(
                    "port_mappings: port {} of the host ({}) leads to the pod of link {link} already: \
                     `switchctl port show {link}`",
                    mapping.host_port,
                    mapping.protocol.name()
                )));
            }
        }
        Ok(())
    }

    /// A table of our own: nothing of anybody else's is read or touched.
    fn rules(&self, network: &NetworkEntry, link: &str) -> Option<String> {
        let mappings = self.mapping_rules(network);
        if mappings.is_empty() && !self.config.masquerade {
            return None;
        }
        let mut postrouting = String::new();
        // The kernel lets no packet from ::1 leave (RFC 4291 section 2.5.3), so there is none to masquerade.
        for (family, is_v6, local) in [("ip", false, Some("127.0.0.0/8")), ("ip6", true, None)] {
            let of_family = |prefix: &&IpNet| prefix.addr().is_ipv6() == is_v6;
            let own = if network.spec.ranges.is_empty() { &network.spec.subnets } else { &network.spec.ranges };
            let own: Vec<IpNet> = own.iter().filter(of_family).copied().collect();
            if own.is_empty() {
                continue;
            }
            let asked = self.desired.routes.keys().filter(|(index, _)| *index == network.index);
            let cluster =
                network.spec.subnets.iter().chain(&network.spec.ranges).chain(asked.map(|(_, prefix)| prefix));
            let cluster: Vec<IpNet> =
                cluster.filter(of_family).filter(|prefix| prefix.prefix_len() > 0).copied().collect();
            let (own, cluster) = (set(&own), set(&IpNet::aggregate(&cluster)));
            if !mappings.is_empty() {
                // What came to a mapped port from here, or from a pod of any node, must go back the way it came.
                if let Some(local) = local {
                    let _ = writeln!(postrouting, "    oifname \"{link}\" {family} saddr {local} masquerade");
                }
                let _ =
                    writeln!(postrouting, "    oifname \"{link}\" ct status dnat {family} saddr {cluster} masquerade");
            }
            if self.config.masquerade {
                let _ = writeln!(
                    postrouting,
                    "    oifname != \"{link}\" {family} saddr {own} {family} daddr != {cluster} masquerade"
                );
            }
        }
        let mut rules = String::from("table inet vswitch {\n");
        for (chain, hook) in [("prerouting", "prerouting priority dstnat"), ("output", "output priority -100")] {
            let _ = writeln!(rules, "  chain {chain} {{\n    type nat hook {hook}; policy accept;\n{mappings}  }}");
        }
        let _ = writeln!(
            rules,
            "  chain postrouting {{\n    type nat hook postrouting priority srcnat; policy accept;\n{postrouting}  }}\n}}"
        );
        Some(rules)
    }

    fn mapping_rules(&self, network: &NetworkEntry) -> String {
        self.mappings(network).map(|(mapping, address)| mapping_rule(mapping, address)).collect()
    }

    fn udp_mappings(&self, network: &NetworkEntry) -> BTreeSet<(u16, SocketAddr)> {
        self.mappings(network)
            .filter(|(mapping, _)| mapping.protocol == Protocol::Udp)
            .map(|(mapping, address)| (mapping.host_port, SocketAddr::new(address, mapping.container_port)))
            .collect()
    }

    /// Ports of the host that lead to pods of a network, and the pods' addresses.
    fn mappings(&self, network: &NetworkEntry) -> impl Iterator<Item = (&PortMapping, IpAddr)> {
        let index = network.index;
        let specs = self.desired.ports.values().filter(move |port| port.network == index).map(|port| &port.record.spec);
        specs.flat_map(|spec| {
            let of_pod = |mapping| spec.addresses.iter().map(move |&address| (mapping, address));
            spec.port_mappings.iter().flat_map(of_pod)
        })
    }
}

fn mapping_rule(mapping: &PortMapping, address: IpAddr) -> String {
    let PortMapping { host_port, container_port, protocol, host_ip } = mapping;
    let family = if address.is_ipv4() { "ip" } else { "ip6" };
    let to = match address {
        IpAddr::V4(v4) => format!("{v4}:{container_port}"),
        IpAddr::V6(v6) => format!("[{v6}]:{container_port}"),
    };
    let at = match host_ip {
        Some(host_ip) if host_ip.is_ipv4() != address.is_ipv4() => return String::new(),
        Some(host_ip) if host_ip.is_unspecified() => String::new(),
        Some(host_ip) => format!("{family} daddr {host_ip} "),
        None => String::new(),
    };
    let (protocol, nfproto) = (protocol.name(), if address.is_ipv4() { "ipv4" } else { "ipv6" });
    format!("    meta nfproto {nfproto} fib daddr type local {at}{protocol} dport {host_port} dnat {family} to {to}\n")
}

fn collides(one: &PortMapping, other: &PortMapping) -> bool {
    let everywhere = |ip: Option<IpAddr>| ip.is_none_or(|ip| ip.is_unspecified());
    (one.host_port, one.protocol) == (other.host_port, other.protocol)
        && (everywhere(one.host_ip) || everywhere(other.host_ip) || one.host_ip == other.host_ip)
}

fn set(prefixes: &[IpNet]) -> String {
    let list: Vec<String> = prefixes.iter().map(IpNet::to_string).collect();
    format!("{{ {} }}", list.join(", "))
}
