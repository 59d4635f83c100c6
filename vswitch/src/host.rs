//! The host's side of the port into its stack: the veth, addresses, routes, and one table of nftables.
//!
//! What is wanted comes from control as a [`HostPlan`]; here it is compared with what was done, and the difference is
//! carried out. Everything is taken back when the daemon ends, and when it cannot start. After a crash the next daemon
//! finds a note in the runtime directory, and takes back what it names and what is known by name: the veth, the routes of
//! our protocol number, the table `inet vswitch`, and the forwarding settings.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, anyhow, bail};
use ipnet::IpNet;
use tracing::{info, warn};
use vswitch_control::HostPlan;
use vswitch_link::{HOST_PROTOCOL, HostRoute, Kernel, LinkError, REMOTE_PROTOCOL, UdpFlows};
use vswitch_net::{MacAddr, POD_LINK_MTU};

use crate::config::{Host, Worker};

/// What a note may name.
const SETTINGS: &str = "/proc/sys/net/";
const FORWARDING_V4: &str = "/proc/sys/net/ipv4/ip_forward";
const ALL_V4: &str = "/proc/sys/net/ipv4/conf/all";
const FORWARDING_V6: &str = "/proc/sys/net/ipv6/conf/all/forwarding";

/// The veth and what was done with it.
#[derive(Debug)]
pub(crate) struct HostLink {
    config: Host,
    /// What is to be taken back; noted in a file too, for the next daemon.
    noted: String,
    ifindex: u32,
    /// The host's end.
    pub(crate) mac: MacAddr,
    done: HostPlan,
    addresses: BTreeSet<IpAddr>,
    routes: BTreeSet<(u32, HostRoute)>,
    /// The rules of our table that the kernel was given.
    rules: Option<String>,
    /// What `nft` makes of them.
    listed: Option<String>,
    /// What these rules do with UDP.
    udp: BTreeSet<(u16, SocketAddr)>,
    /// Ports whose flows of UDP are looked for once more, and when.
    udp_again: (BTreeSet<u16>, u64),
    /// What of the plan could not be done; none if all was.
    failure: Option<String>,
    is_down: bool,
    /// When it was last looked whether all is there still.
    looked_ns: u64,
}

impl HostLink {
    /// Makes the veth; queues are one a worker.
    ///
    /// # Errors
    ///
    /// The kernel's, as a sentence.
    pub(crate) async fn create(
        kernel: &Kernel,
        config: &Host,
        runtime_dir: &Path,
        worker: &Worker,
    ) -> anyhow::Result<HostLink> {
        // A link that was lost is noted already, with what was done beside it.
        let note = note_of(runtime_dir);
        let noted = match fs::read_to_string(&note) {
            Ok(noted) => noted,
            Err(_) => format!("{NOTED_LINK} {}\n", config.link),
        };
        fs::write(&note, &noted).with_context(|| format!("cannot write {}", note.display()))?;
        kernel.remove_own_routes().await?;
        let (queues, receives_xdp) = (worker.count as u32, worker.offloaded().is_some());
        let switch = config.switch_link();
        let mac = kernel.create_host_veth(&config.link, &switch, POD_LINK_MTU, queues, receives_xdp).await?;
        let link = kernel.link(&config.link).await?.ok_or_else(|| anyhow!("link {} is gone again", config.link))?;
        let mut host = HostLink {
            config: config.clone(),
            noted,
            ifindex: link.ifindex,
            mac,
            done: HostPlan::default(),
            addresses: BTreeSet::new(),
            routes: BTreeSet::new(),
            // Those of a link that was lost are replaced.
            rules: list_rules().ok().flatten().map(|_| String::new()),
            listed: None,
            udp: BTreeSet::new(),
            udp_again: (BTreeSet::new(), 0),
            failure: None,
            is_down: false,
            looked_ns: 0,
        };
        if config.forwarding {
            host.switch_forwarding_on(runtime_dir);
        }
        Ok(host)
    }

    /// True as long as the link is the one that was made.
    pub(crate) fn is(&self, ifindex: u32) -> bool {
        self.ifindex == ifindex
    }

    /// What keeps packets from passing beyond the host, if anything.
    pub(crate) fn problem(&self) -> Option<String> {
        if self.is_down {
            return Some(format!("down: `ip link set {} up`", self.config.link));
        }
        if let Some(failure) = &self.failure {
            return Some(format!("up, but {failure}"));
        }
        let is_off = |path: &str| fs::read_to_string(path).is_ok_and(|value| value.trim() == "0");
        let has_v6 = self.addresses.iter().any(IpAddr::is_ipv6);
        if is_off(FORWARDING_V4) {
            return Some("up, but the host forwards no IPv4: `sysctl -w net.ipv4.ip_forward=1`".to_owned());
        }
        if has_v6 && is_off(FORWARDING_V6) {
            return Some(
                "up; the host forwards no IPv6, so pods reach it and not beyond: `sysctl -w net.ipv6.conf.all.forwarding=1`"
                    .to_owned(),
            );
        }
        None
    }

    /// Why the rules of the last plan are not the kernel's, if they are not.
    pub(crate) fn rules_failure(&self) -> Option<String> {
        let failure = self.failure.clone()?;
        (self.rules != self.done.rules).then_some(failure)
    }

    /// Carries out what is new in a plan. What could not be done is told by [`problem`](Self::problem), and tried again with
    /// the next call.
    pub(crate) async fn carry_out(&mut self, kernel: &Kernel, now_ns: u64, plan: HostPlan) {
        if now_ns.saturating_sub(self.looked_ns) >= LOOK_EVERY_NS {
            self.looked_ns = now_ns;
            self.look(kernel).await;
        }
        if !self.udp_again.0.is_empty() && now_ns >= self.udp_again.1 {
            let (ports, _) = std::mem::take(&mut self.udp_again);
            forget_udp_flows(kernel, &ports, UdpFlows::BegunHere).await;
        }
        if self.is_down || (plan == self.done && self.failure.is_none()) {
            return;
        }
        let before = self.failure.take();
        // One of them must not keep the others from being done.
        let steps = [
            self.set_addresses(kernel, &plan).await,
            self.set_routes(kernel, &plan).await,
            self.set_rules(kernel, now_ns, &plan).await,
        ];
        let failures: Vec<String> =
            steps.into_iter().filter_map(Result::err).map(|error| format!("{error:#}")).collect();
        self.failure = (!failures.is_empty()).then(|| failures.join("; "));
        if let Some(failure) = self.failure.as_ref().filter(|failure| before.as_ref() != Some(failure)) {
            warn!("host port {}: {failure}; it is tried again", self.config.link);
        }
        self.done = plan;
    }

    /// Finds out what somebody else took away or changed: a firewall that is loaded anew flushes all tables, and a link
    /// that was down has no routes.
    async fn look(&mut self, kernel: &Kernel) {
        self.look_at_links(kernel).await;
        if self.is_down {
            return;
        }
        if self.rules.is_some()
            && let Ok(listed) = list_rules()
            && listed != self.listed
        {
            warn!("the table inet vswitch was changed or removed by somebody: it is made again");
            self.rules = Some(String::new());
            self.udp.clear();
            self.done = HostPlan::default();
        }
        if let Ok(there) = kernel.addresses(self.ifindex).await {
            let lost: Vec<IpAddr> = self.addresses.iter().filter(|address| !there.contains(address)).copied().collect();
            for address in lost {
                warn!("the host's address {address} was removed by somebody: it is made again");
                self.addresses.remove(&address);
                self.done = HostPlan::default();
            }
        }
        if let Ok(there) = kernel.host_routes().await {
            let there: BTreeSet<(u32, IpNet)> = there.into_iter().collect();
            let is_lost = |(table, route): &&(u32, HostRoute)| !there.contains(&(*table, route.prefix));
            let lost: Vec<(u32, HostRoute)> = self.routes.iter().filter(is_lost).copied().collect();
            for (table, route) in lost {
                warn!("the host's route to {} was removed by somebody: it is made again", route.prefix);
                self.routes.remove(&(table, route));
                self.done = HostPlan::default();
            }
        }
    }

    async fn look_at_links(&mut self, kernel: &Kernel) {
        let Ok(links) = kernel.links().await else { return };
        let find = |name: &str| links.iter().find(|link| link.name == name);
        let switch_link = self.config.switch_link();
        // The switch's end is nobody else's; the host's end may be down on purpose.
        if let Some(end) = find(&switch_link).filter(|end| !end.is_enabled) {
            warn!("link {switch_link} was set down by somebody: it is set up again");
            if let Err(error) = kernel.set_up(end.ifindex).await {
                warn!("{error}");
            }
        }
        let is_down = !find(&self.config.link).is_some_and(|end| end.is_enabled);
        if self.is_down != is_down {
            self.is_down = is_down;
            if is_down {
                warn!("link {} is down: the host and its pods do not reach each other", self.config.link);
            }
        }
    }

    async fn set_addresses(&mut self, kernel: &Kernel, plan: &HostPlan) -> anyhow::Result<()> {
        for &address in &plan.addresses {
            if self.addresses.contains(&address) {
                continue;
            }
            match kernel.add_address(self.ifindex, IpNet::from(address)).await {
                Ok(()) => {}
                Err(error) if error.errno() == Some(EEXIST) => {}
                Err(error) => return Err(error.into()),
            }
            self.addresses.insert(address);
        }
        Ok(())
    }

    /// The host reaches pods by its main table; another one is for routing daemons to read.
    async fn set_routes(&mut self, kernel: &Kernel, plan: &HostPlan) -> anyhow::Result<()> {
        let tables = BTreeSet::from([MAIN_TABLE, self.config.table]);
        let own = |table| {
            plan.ranges.iter().map(move |&prefix| (table, HostRoute { prefix, mtu: None, protocol: HOST_PROTOCOL }))
        };
        let own = tables.into_iter().flat_map(own);
        let remote = plan
            .remote
            .iter()
            .map(|&(prefix, mtu)| (MAIN_TABLE, HostRoute { prefix, mtu: Some(mtu), protocol: REMOTE_PROTOCOL }));
        let wanted: BTreeSet<(u32, HostRoute)> = own.chain(remote).collect();
        let old: Vec<_> = self.routes.difference(&wanted).copied().collect();
        for (table, route) in old {
            kernel.remove_host_route(self.ifindex, table, route).await?;
            self.routes.remove(&(table, route));
        }
        let new: Vec<_> = wanted.difference(&self.routes).copied().collect();
        let mut taken = Vec::new();
        for (table, route) in new {
            if kernel.add_host_route(self.ifindex, table, route).await? {
                self.routes.insert((table, route));
            } else {
                taken.push(route.prefix.to_string());
            }
        }
        if !taken.is_empty() {
            bail!(
                "the host has other routes to {} (`ip route show`), which are left alone: the host reaches those pods by \
                 them until they are removed",
                taken.join(", ")
            );
        }
        Ok(())
    }

    async fn set_rules(&mut self, kernel: &Kernel, now_ns: u64, plan: &HostPlan) -> anyhow::Result<()> {
        if plan.rules == self.rules {
            return Ok(());
        }
        if plan.rules.as_ref().is_some_and(|rules| rules.contains(" dnat ")) {
            kernel.let_loopback_out(&self.config.link)?;
        }
        replace_rules(plan.rules.as_deref())?;
        self.rules = plan.rules.clone();
        self.listed = list_rules()?;
        let changed = self.udp.symmetric_difference(&plan.udp).map(|&(port, _)| port).collect();
        self.udp = plan.udp.clone();
        forget_udp_flows(kernel, &changed, UdpFlows::All).await;
        if !changed.is_empty() {
            self.udp_again.0.extend(changed);
            self.udp_again.1 = now_ns + UDP_AGAIN_NS;
        }
        Ok(())
    }

    /// IPv4 only: with IPv6 forwarding a host stops to listen to its own router, which is not ours to decide.
    fn switch_forwarding_on(&mut self, runtime_dir: &Path) {
        let Ok(before) = fs::read_to_string(FORWARDING_V4) else { return };
        if before.trim() != "0" {
            return;
        }
        // The note first: a crash between the two must not make the change permanent.
        self.noted = format!("{NOTED_LINK} {}\n{}", self.config.link, note_settings());
        let done = fs::write(note_of(runtime_dir), &self.noted).and_then(|()| fs::write(FORWARDING_V4, "1"));
        match done {
            Ok(()) => info!("net.ipv4.ip_forward is on as long as the daemon runs"),
            Err(error) => warn!("net.ipv4.ip_forward could not be set: {error}"),
        }
    }
}

const EEXIST: i32 = 17;

/// An answer of the host's is on its way for no longer than this.
const UDP_AGAIN_NS: u64 = 1_000_000_000;

/// Others may take away what was done to the host; so often it is looked.
const LOOK_EVERY_NS: u64 = 5_000_000_000;

/// The table that `ip route` shows.
const MAIN_TABLE: u32 = 254;

/// In the note, before the name of the host's end.
const NOTED_LINK: &str = "link";

fn note_of(runtime_dir: &Path) -> PathBuf {
    runtime_dir.join("host")
}

/// Takes back what was done to the host, by this daemon or by an earlier one of the same runtime directory: rules, flows
/// of UDP that they led to pods, routes, veth, settings. Nothing if nothing was done.
pub(crate) async fn take_back(kernel: &Kernel, runtime_dir: &Path, held: Option<HostLink>) {
    let path = note_of(runtime_dir);
    let Some(note) = fs::read_to_string(&path).ok().or_else(|| Some(held.as_ref()?.noted.clone())) else { return };
    let udp_ports = held.iter().flat_map(|held| &held.udp).map(|&(port, _)| port).collect();
    let has_rules = list_rules().is_ok_and(|rules| rules.is_some());
    if has_rules && let Err(error) = replace_rules(None) {
        warn!("the table inet vswitch stays: {error:#}");
    }
    forget_udp_flows(kernel, &udp_ports, UdpFlows::All).await;
    if let Err(error) = kernel.remove_own_routes().await {
        warn!("routes of the host to pods stay: {error}");
    }
    let (links, settings): (Vec<_>, Vec<_>) =
        note.lines().filter_map(|line| line.split_once(' ')).partition(|(key, _)| *key == NOTED_LINK);
    for (_, link) in links {
        let config = Host { link: link.to_owned(), ..Host::default() };
        match kernel.delete_pair(link, &config.switch_link()).await {
            // Somebody else's by now.
            Ok(()) | Err(LinkError::Taken { .. }) => {}
            Err(error) => warn!("link {link} stays: {error}"),
        }
    }
    // Forwarding first, which changes the others. Links may be gone.
    for (path, value) in settings.into_iter().filter(|(path, _)| path.starts_with(SETTINGS)) {
        let _ = fs::write(path, value);
    }
    let _ = fs::remove_file(path);
}

/// Forwarding, and all that the kernel changes with it (kernel document `networking/ip-sysctl.rst`): each link's own, and
/// whether redirects are accepted. One setting and its value a line.
fn note_settings() -> String {
    let mut paths = vec![PathBuf::from(FORWARDING_V4), PathBuf::from(ALL_V4).join("accept_redirects")];
    let links = fs::read_dir(Path::new(ALL_V4).with_file_name("")).into_iter().flatten().flatten();
    paths.extend(links.map(|link| link.path().join("forwarding")).filter(|path| !path.starts_with(ALL_V4)));
    let line = |path: PathBuf| Some(format!("{} {}\n", path.display(), fs::read_to_string(&path).ok()?.trim()));
    paths.into_iter().filter_map(line).collect()
}

/// Flows that are there already do not ask the rules.
async fn forget_udp_flows(kernel: &Kernel, ports: &BTreeSet<u16>, which: UdpFlows) {
    if let Err(error) = kernel.forget_udp_flows(ports, which).await {
        warn!("{error}: UDP to ports {ports:?} that comes already goes on as it did, until it pauses");
    }
}

/// Our table as `nft` shows it; none if there is none.
fn list_rules() -> anyhow::Result<Option<String>> {
    let output = match Command::new("nft").args(["list", "table", "inet", "vswitch"]).stdin(Stdio::null()).output() {
        Ok(output) => output,
        // Without it there was nobody to make one.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).context("cannot run nft"),
    };
    if output.status.success() {
        return Ok(Some(String::from_utf8_lossy(&output.stdout).into_owned()));
    }
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("No such file or directory") {
        return Ok(None);
    }
    bail!("nft does not list our table: {}", said.trim().replace('\n', "; "))
}

/// Replaces our table of nftables, in one transaction; none removes it.
fn replace_rules(rules: Option<&str>) -> anyhow::Result<()> {
    let text = format!("add table inet vswitch\ndelete table inet vswitch\n{}", rules.unwrap_or_default());
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run nft: install nftables, or set [host] masquerade = false and map no ports")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(text.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("nft refused our table: {}", String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; "));
    }
    Ok(())
}
