//! The systems that are compared, and the same few topologies built with each.

use std::fs;

use anyhow::Context;
use serde_json::Value;
use xtask::lab::{self, Daemon, Lab, Namespace};
use xtask::ovs::Ovs;

/// Addresses where the system switches by MAC: one subnet for all.
const BRIDGED: [&str; 2] = ["10.9.0.1", "10.9.0.2"];

/// Who is far away in [`Topology::Edge`]: a pod on another node.
const FAR_MAC: &str = "02:00:00:00:00:09";
const FAR_BRIDGED: &str = "10.9.0.9";
const FAR_ROUTED: &str = "10.244.2.9";
const VNI: &str = "1";

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum System {
    /// The switch as it is shipped: one worker that sleeps when it has nothing to do.
    Vswitch,
    /// The same with a worker that never sleeps.
    VswitchBusy,
    /// Two workers.
    VswitchTwo,
    /// As shipped, with judged flows offloaded to XDP.
    VswitchOffload,
    /// The kernel's bridge, and its VXLAN device.
    Bridge,
    /// Open vSwitch's userspace datapath on AF_XDP ports.
    Ovs,
    /// `pktgen forward`: AF_XDP, and nothing done.
    Forward,
    /// `pktgen redirect`: XDP in the kernel, and nothing done.
    Redirect,
}

/// What is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Topology {
    /// Two pods on one node.
    Local,
    /// A pod on each of two nodes, with VXLAN over a wire of this MTU.
    Wire(u32),
    /// A pod, and a wire whose other end is the generator or the sink of VXLAN.
    Edge,
}

/// One end of the traffic.
#[derive(Debug)]
pub(super) struct End {
    pub(super) namespace: Namespace,
    pub(super) link: String,
    pub(super) address: String,
    pub(super) mac: String,
}

/// A topology that stands. It goes when it is dropped.
#[derive(Debug)]
pub(super) struct Site {
    pub(super) ends: [End; 2],
    /// Where packets go from the first end, and from the second.
    pub(super) next_hops: [String; 2],
    /// In [`Topology::Edge`]: the MAC address of the node's link, and who speaks VXLAN.
    pub(super) uplink: String,
    /// Processes that switch.
    pub(super) pids: Vec<u32>,
    pub(super) daemons: Vec<Daemon>,
    _ovs: Vec<Ovs>,
    pub(super) lab: Lab,
}

impl System {
    pub(super) const ALL: [System; 8] = [
        System::Vswitch,
        System::VswitchBusy,
        System::VswitchTwo,
        System::VswitchOffload,
        System::Bridge,
        System::Ovs,
        System::Forward,
        System::Redirect,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            System::Vswitch => "vswitch",
            System::VswitchBusy => "vswitch-busy",
            System::VswitchTwo => "vswitch-2",
            System::VswitchOffload => "vswitch-offload",
            System::Bridge => "bridge",
            System::Ovs => "ovs",
            System::Forward => "forward",
            System::Redirect => "redirect",
        }
    }

    /// True if it is ours.
    pub(super) fn is_ours(self) -> bool {
        matches!(self, System::Vswitch | System::VswitchBusy | System::VswitchTwo | System::VswitchOffload)
    }

    /// True if it is a switch, and not a ceiling that moves packets and knows no addresses.
    pub(super) fn is_switch(self) -> bool {
        !matches!(self, System::Forward | System::Redirect)
    }

    /// Why it cannot be measured here.
    pub(super) fn missing(self) -> Option<String> {
        if self == System::Ovs { Ovs::missing() } else { None }
    }

    /// Builds a topology.
    pub(super) fn build(self, topology: Topology, lab: Lab) -> anyhow::Result<Site> {
        let mut site = match (self, topology) {
            _ if self.is_ours() => self.ours(topology, lab)?,
            (_, Topology::Local) => self.local(lab)?,
            (_, Topology::Wire(mtu)) => self.wire(mtu, lab)?,
            (_, Topology::Edge) => self.edge(lab)?,
        };
        site.pids.extend(site.daemons.iter().filter_map(Daemon::pid));
        Ok(site)
    }

    fn ours(self, topology: Topology, mut lab: Lab) -> anyhow::Result<Site> {
        let node = lab.namespace("node1")?;
        let other = (topology != Topology::Local).then(|| lab.namespace("node2")).transpose()?;
        let mut daemons = Vec::new();
        match (&other, topology) {
            (None, _) => daemons.push(lab.daemon(&node, "node1", &self.config(1, ""))?),
            (Some(other), Topology::Wire(mtu)) => {
                cable(&mut lab, &node, other, mtu)?;
                let wide = self.wide_routes(mtu);
                daemons.push(lab.daemon(&node, "node1", &self.config(1, &(wide.clone() + &underlay(2))))?);
                daemons.push(lab.daemon(other, "node2", &self.config(2, &(wide + &underlay(1))))?);
            }
            (Some(other), _) => {
                cable(&mut lab, &node, other, 1500)?;
                daemons.push(lab.daemon(&node, "node1", &self.config(1, &underlay(2)))?);
            }
        }
        let conflist = fs::read_to_string(lab::workspace().join("config/10-vswitch.conflist"))?;
        let conflist: Value = serde_json::from_str(&conflist)?;
        let mut pods = Vec::new();
        for (at, daemon) in [&daemons[0], daemons.last().unwrap_or(&daemons[0])].into_iter().enumerate() {
            if at == 1 && topology == Topology::Edge {
                break;
            }
            let pod = lab.namespace(&format!("pod{}", at + 1))?;
            let addresses = daemon.add_pod(&pod, &conflist)?;
            let address = addresses.first().cloned().context("the pod got no address")?;
            pods.push(End { link: "eth0".into(), mac: mac_of(&pod, "eth0")?, namespace: pod, address });
        }
        // What both pods are is known to both nodes, and policies of both speak of what they send: nothing is switched off.
        let mut objects = POLICIES.to_owned();
        for (name, address) in pods.iter().map(|end| (end.namespace.name.as_str(), end.address.as_str())) {
            objects += &pod_object(name, address);
        }
        if topology == Topology::Edge {
            objects += &pod_object("far", FAR_ROUTED);
        }
        let file = lab.file("policies.yaml", &objects)?;
        for daemon in &daemons {
            daemon.run_ctl(&["policy", "apply", "-f", &file])?;
        }
        if topology != Topology::Local {
            for daemon in &daemons {
                lab::wait_for(10, || daemon.ctl(&["status"]).is_ok_and(|status| status["peers_reachable"] == 1))
                    .context("the peer does not become reachable")?;
            }
        }
        if let Some(other) = &other
            && topology == Topology::Edge
        {
            pods.push(far_end(other, FAR_ROUTED)?);
        }
        let gateway = "02:76:73:77:00:01".to_owned();
        let ends = <[End; 2]>::try_from(pods).map_err(|_| anyhow::anyhow!("two ends"))?;
        Site::new(lab, ends, [gateway.clone(), gateway], &node, daemons, Vec::new())
    }

    /// What the documents say to clusters of this switch alone: a key of the network.
    fn wide_routes(self, wire: u32) -> String {
        if self == System::VswitchOffload { String::new() } else { format!("subnet_mtu = {}\n", wire * 6) }
    }

    fn config(self, node: u32, underlay: &str) -> String {
        let (count, poll) = match self {
            System::VswitchTwo => (2, "adaptive"),
            System::VswitchBusy => (1, "busy"),
            _ => (1, "adaptive"),
        };
        // Two nodes on one machine shall not share a core.
        let cores = if count == 1 {
            format!("cores = [{}]", last_core().saturating_sub(node as usize - 1))
        } else {
            String::new()
        };
        let offload = if self == System::VswitchOffload { "xdp" } else { "off" };
        format!(
            "[worker]\ncount = {count}\npoll = \"{poll}\"\n{cores}\noffload = \"{offload}\"\nflow_entries = 2097152\n\
             [connections]\nlimit = 2097152\nport_limit = 2097152\n\
             [[network]]\nname = \"pods\"\nvni = {VNI}\nranges = [\"10.244.{node}.0/24\"]\nsubnets = [\"10.244.0.0/16\"]\n{underlay}"
        )
    }

    fn local(self, mut lab: Lab) -> anyhow::Result<Site> {
        let node = lab.namespace("node1")?;
        let pods = [lab.namespace("pod1")?, lab.namespace("pod2")?];
        let mut links = Vec::new();
        for (at, pod) in pods.iter().enumerate() {
            links.push(self.plug(&node, pod, at, 1500)?);
        }
        let mut ovs = Vec::new();
        let mut pids = Vec::new();
        match self {
            System::Bridge => bridge(&node, &links)?,
            System::Ovs => {
                let switch = Ovs::start(&mut lab, &node, &mask(last_core()))?;
                switch.add_bridge("br0")?;
                links.iter().try_for_each(|link| switch.add_port("br0", link))?;
                pids.push(switch.pid);
                ovs.push(switch);
            }
            System::Forward | System::Redirect => {
                let verb = if self == System::Forward { "forward" } else { "redirect" };
                let core = last_core().to_string();
                let command =
                    [&pktgen(), verb, "--core", &core, "--from", &links[0], "--to", &links[1], "--seconds", "3600"];
                pids.push(lab.spawn(&node, &command)?);
            }
            _ => {}
        }
        let [one, two] = pods;
        let ends = [end(one, BRIDGED[0])?, end(two, BRIDGED[1])?];
        let next_hops = [ends[1].mac.clone(), ends[0].mac.clone()];
        let mut site = Site::new(lab, ends, next_hops, &node, Vec::new(), ovs)?;
        site.pids = pids;
        if self.is_switch() {
            site.ends[0].namespace.await_ping(BRIDGED[1])?;
        } else {
            // They have no command to ask whether they are ready.
            lab::wait_for(10, || site.ends[0].namespace.pings(BRIDGED[1], 1, 1))?;
        }
        Ok(site)
    }

    fn wire(self, mtu: u32, mut lab: Lab) -> anyhow::Result<Site> {
        let nodes = [lab.namespace("node1")?, lab.namespace("node2")?];
        cable(&mut lab, &nodes[0], &nodes[1], mtu)?;
        let mut ends = Vec::new();
        let (mut ovs, mut pids) = (Vec::new(), Vec::new());
        for (at, node) in nodes.iter().enumerate() {
            let pod = lab.namespace(&format!("pod{}", at + 1))?;
            let link = self.plug(node, &pod, at, mtu - 50)?;
            let (here, there) = (format!("192.0.2.{}", at + 1), format!("192.0.2.{}", 2 - at));
            if let Some(switch) = self.tunnel(&mut lab, node, &link, &here, &there, last_core().saturating_sub(at))? {
                pids.push(switch.pid);
                ovs.push(switch);
            }
            ends.push(end(pod, BRIDGED[at])?);
        }
        let ends = <[End; 2]>::try_from(ends).map_err(|_| anyhow::anyhow!("two ends"))?;
        let next_hops = [ends[1].mac.clone(), ends[0].mac.clone()];
        let mut site = Site::new(lab, ends, next_hops, &nodes[0], Vec::new(), ovs)?;
        site.pids = pids;
        site.ends[0].namespace.await_ping(BRIDGED[1])?;
        Ok(site)
    }

    fn edge(self, mut lab: Lab) -> anyhow::Result<Site> {
        let (node, other) = (lab.namespace("node1")?, lab.namespace("node2")?);
        cable(&mut lab, &node, &other, 1500)?;
        let pod = lab.namespace("pod1")?;
        let link = self.plug(&node, &pod, 0, 1450)?;
        let ovs = self.tunnel(&mut lab, &node, &link, "192.0.2.1", "192.0.2.2", last_core())?;
        if self == System::Bridge {
            node.run(5, &["bridge", "fdb", "replace", FAR_MAC, "dev", "vx0", "master", "static"])?;
            node.run(5, &["bridge", "fdb", "replace", FAR_MAC, "dev", "vx0", "dst", "192.0.2.2", "self", "static"])?;
        }
        let ends = [end(pod, BRIDGED[0])?, far_end(&other, FAR_BRIDGED)?];
        let next_hops = [FAR_MAC.to_owned(), ends[0].mac.clone()];
        let pids = ovs.iter().map(|ovs| ovs.pid).collect();
        let mut site = Site::new(lab, ends, next_hops, &node, Vec::new(), ovs.into_iter().collect())?;
        site.pids = pids;
        Ok(site)
    }

    /// A veth from a node to a pod; its name on the node.
    fn plug(self, node: &Namespace, pod: &Namespace, at: usize, mtu: u32) -> anyhow::Result<String> {
        let link = format!("pod{}", at + 1);
        node.ip(&format!("link add name {link} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {}", pod.name))?;
        node.ip(&format!("link set {link} up"))?;
        pod.ip(&format!("addr add {}/24 dev eth0", BRIDGED[at]))?;
        pod.ip("link set eth0 up")?;
        match self {
            // What a veth without XDP needs to be given frames by XDP.
            System::Bridge => node.run(5, &["ethtool", "-K", &link, "gro", "on"])?,
            // The same at the pod's end, for what the kernel redirects there.
            System::Redirect => pod.run(5, &["ethtool", "-K", "eth0", "tx", "off", "gro", "on"])?,
            // Its documentation: checksum offload on a veth is not understood. Nor is it by a socket of one frame.
            _ => pod.run(5, &["ethtool", "-K", "eth0", "tx", "off"])?,
        };
        Ok(link)
    }

    /// VXLAN from a node to another one.
    fn tunnel(
        self,
        lab: &mut Lab,
        node: &Namespace,
        link: &str,
        here: &str,
        there: &str,
        core: usize,
    ) -> anyhow::Result<Option<Ovs>> {
        if self == System::Bridge {
            node.ip(&format!("link add vx0 type vxlan id {VNI} local {here} remote {there} dstport 4789 dev wire"))?;
            bridge(node, &[link.to_owned(), "vx0".to_owned()])?;
            return Ok(None);
        }
        let ovs = Ovs::start(lab, node, &mask(core))?;
        // Its tunnels ask its own bridge for the way, so the node's address moves there.
        ovs.add_bridge("phy")?;
        let mac = mac_of(node, "wire")?;
        ovs.vsctl(&["set", "bridge", "phy", &format!("other-config:hwaddr=\"{mac}\"")])?;
        ovs.add_port("phy", "wire")?;
        node.ip("addr flush dev wire")?;
        node.ip(&format!("addr add {here}/24 dev phy"))?;
        node.ip("link set phy up")?;
        ovs.add_bridge("br0")?;
        ovs.add_port("br0", link)?;
        let (remote, key) = (format!("options:remote_ip={there}"), format!("options:key={VNI}"));
        ovs.vsctl(&["add-port", "br0", "vx0", "--", "set", "interface", "vx0", "type=vxlan", &remote, &key])?;
        Ok(Some(ovs))
    }
}

impl Site {
    fn new(
        lab: Lab,
        ends: [End; 2],
        next_hops: [String; 2],
        node: &Namespace,
        daemons: Vec<Daemon>,
        ovs: Vec<Ovs>,
    ) -> anyhow::Result<Site> {
        let uplink = mac_of(node, "wire").unwrap_or_default();
        Ok(Site { ends, next_hops, uplink, pids: Vec::new(), daemons, _ovs: ovs, lab })
    }

    /// Adds pods that have nothing to say.
    pub(super) fn add_idle(&mut self, count: usize) -> anyhow::Result<()> {
        let conflist = fs::read_to_string(lab::workspace().join("config/10-vswitch.conflist"))?;
        let conflist: Value = serde_json::from_str(&conflist)?;
        for at in 0..count {
            let pod = self.lab.namespace(&format!("idle{at}"))?;
            self.daemons.first().context("only our own switch has idle pods")?.add_pod(&pod, &conflist)?;
        }
        Ok(())
    }
}

/// The workspace's pktgen.
pub(super) fn pktgen() -> String {
    lab::binaries().join("pktgen").to_string_lossy().into_owned()
}

/// The core that switches; the first one generates.
pub(super) fn last_core() -> usize {
    std::thread::available_parallelism().map_or(1, |count| count.get()) - 1
}

fn mask(core: usize) -> String {
    format!("{:#x}", 1_u64 << core)
}

/// A wire between two nodes that is like a cable: whole checksums, no packets larger than its MTU.
fn cable(lab: &mut Lab, one: &Namespace, other: &Namespace, mtu: u32) -> anyhow::Result<()> {
    lab.wire([(one, "wire", &["192.0.2.1/24"]), (other, "wire", &["192.0.2.2/24"])], mtu)?;
    for node in [one, other] {
        // A NIC has NAPI, and with it GRO.
        node.run(5, &["ethtool", "-K", "wire", "tx", "off", "tso", "off", "gso", "off", "gro", "on"])?;
    }
    Ok(())
}

fn bridge(node: &Namespace, links: &[String]) -> anyhow::Result<()> {
    node.ip("link add br0 type bridge")?;
    for link in links {
        node.ip(&format!("link set {link} master br0"))?;
        node.ip(&format!("link set {link} up"))?;
    }
    node.ip("link set br0 up")
}

fn underlay(peer: u32) -> String {
    format!(
        "[uplink]\nlink = \"wire\"\n[[peer]]\nname = \"peer\"\nvtep = \"192.0.2.{peer}\"\n\
         [[route]]\nnetwork = \"pods\"\nprefix = \"10.244.{peer}.0/24\"\npeer = \"peer\"\n"
    )
}

fn end(namespace: Namespace, address: &str) -> anyhow::Result<End> {
    let mac = mac_of(&namespace, "eth0")?;
    Ok(End { namespace, link: "eth0".into(), address: address.to_owned(), mac })
}

fn far_end(namespace: &Namespace, address: &str) -> anyhow::Result<End> {
    let mac = mac_of(namespace, "wire")?;
    Ok(End { namespace: namespace.clone(), link: "wire".into(), address: address.to_owned(), mac })
}

/// The MAC address of a link.
fn mac_of(namespace: &Namespace, link: &str) -> anyhow::Result<String> {
    let text = namespace.run(5, &["ip", "-j", "link", "show", link])?;
    let links: Value = serde_json::from_str(&text)?;
    Ok(links[0]["address"].as_str().context("a link without an address")?.to_owned())
}

/// Policies that speak of all traffic between the pods, and allow it by a rule that must be looked for.
const POLICIES: &str = "apiVersion: v1
kind: Namespace
metadata: {name: default}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: compared, namespace: default}
spec:
  podSelector: {matchLabels: {app: compared}}
  policyTypes: [Ingress, Egress]
  ingress: [{from: [{podSelector: {matchLabels: {app: compared}}}]}]
  egress: [{to: [{podSelector: {matchLabels: {app: compared}}}]}]
";

fn pod_object(name: &str, address: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: default, labels: {{app: compared}}}}\n\
         spec: {{containers: [{{name: c}}]}}\nstatus: {{podIP: {address}, podIPs: [{{ip: {address}}}]}}\n"
    )
}
