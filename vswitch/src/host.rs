//! The host's side of the port into its stack: the veth, addresses, routes, and one table of nftables.
//!
//! What is wanted comes from control as a [`HostPlan`]; here it is compared with what was done, and the difference is
//! carried out. Everything is taken back when the daemon ends. After a crash the next daemon finds what was left by
//! name: the veth, the routes of our protocol number, the table `inet vswitch`, and a note of the forwarding setting.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, anyhow, bail};
use ipnet::IpNet;
use tracing::{info, warn};
use vswitch_control::HostPlan;
use vswitch_link::{HostRoute, Kernel};
use vswitch_net::{MacAddr, POD_LINK_MTU};

use crate::config::Host;

const FORWARDING_V4: &str = "/proc/sys/net/ipv4/ip_forward";
const FORWARDING_V6: &str = "/proc/sys/net/ipv6/conf/all/forwarding";

/// The veth and what was done with it.
#[derive(Debug)]
pub(crate) struct HostLink {
    config: Host,
    /// Where the former value of a setting that was changed is noted.
    note: PathBuf,
    ifindex: u32,
    /// The host's end.
    pub(crate) mac: MacAddr,
    done: HostPlan,
    routes: BTreeSet<(u32, HostRoute)>,
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
        workers: u32,
    ) -> anyhow::Result<HostLink> {
        kernel.remove_own_routes().await?;
        let mac = kernel.create_host_veth(&config.link, &config.switch_link(), POD_LINK_MTU, workers).await?;
        let link = kernel.link(&config.link).await?.ok_or_else(|| anyhow!("link {} is gone again", config.link))?;
        let host = HostLink {
            config: config.clone(),
            note: runtime_dir.join("ip_forward"),
            ifindex: link.ifindex,
            mac,
            done: HostPlan::default(),
            routes: BTreeSet::new(),
        };
        if config.forwarding {
            host.switch_forwarding_on();
        }
        Ok(host)
    }

    /// True as long as the link is the one that was made.
    pub(crate) fn is(&self, ifindex: u32) -> bool {
        self.ifindex == ifindex
    }

    /// What keeps packets from passing beyond the host, if anything.
    pub(crate) fn problem(&self) -> Option<String> {
        let is_off = |path: &str| fs::read_to_string(path).is_ok_and(|value| value.trim() == "0");
        let has_v6 = self.done.addresses.iter().any(IpAddr::is_ipv6);
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

    /// Carries out what is new in a plan.
    ///
    /// # Errors
    ///
    /// The kernel's; what was not done is tried again with the next plan.
    pub(crate) async fn carry_out(&mut self, kernel: &Kernel, plan: HostPlan) -> anyhow::Result<()> {
        if plan == self.done {
            return Ok(());
        }
        for &address in plan.addresses.iter().filter(|address| !self.done.addresses.contains(address)) {
            match kernel.add_address(self.ifindex, IpNet::from(address)).await {
                Ok(()) => {}
                Err(error) if error.errno() == Some(EEXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let own = plan.ranges.iter().map(|&prefix| (self.config.table, HostRoute { prefix, mtu: None }));
        let remote = plan.remote.iter().map(|&(prefix, mtu)| (MAIN_TABLE, HostRoute { prefix, mtu: Some(mtu) }));
        let wanted: BTreeSet<(u32, HostRoute)> = own.chain(remote).collect();
        let kept: BTreeSet<(u32, IpNet)> = wanted.iter().map(|(table, route)| (*table, route.prefix)).collect();
        for &(table, route) in self.routes.difference(&wanted) {
            if !kept.contains(&(table, route.prefix)) {
                kernel.remove_host_route(self.ifindex, table, route).await?;
            }
        }
        for &(table, route) in wanted.difference(&self.routes) {
            kernel.set_host_route(self.ifindex, table, route).await?;
        }
        self.routes = wanted;
        if plan.rules != self.done.rules {
            if plan.rules.as_ref().is_some_and(|rules| rules.contains(" dnat ")) {
                kernel.let_loopback_out(&self.config.link)?;
            }
            set_rules(plan.rules.as_deref())?;
        }
        self.done = plan;
        Ok(())
    }

    /// Takes everything back.
    pub(crate) async fn remove(self, kernel: &Kernel) {
        if self.done.rules.is_some()
            && let Err(error) = set_rules(None)
        {
            warn!("the table inet vswitch stays: {error:#}");
        }
        if let Err(error) = kernel.delete_link(&self.config.link).await {
            warn!("link {} stays: {error}", self.config.link);
        }
        // Routes in other tables go with the link.
        if let Ok(before) = fs::read_to_string(&self.note) {
            let _ = fs::write(FORWARDING_V4, before);
            let _ = fs::remove_file(&self.note);
        }
    }

    /// IPv4 only: with IPv6 forwarding a host stops to listen to its own router, which is not ours to decide.
    fn switch_forwarding_on(&self) {
        let Ok(before) = fs::read_to_string(FORWARDING_V4) else { return };
        if before.trim() != "0" {
            return;
        }
        // The note first: a crash between the two must not make the change permanent.
        let done = fs::write(&self.note, &before).and_then(|()| fs::write(FORWARDING_V4, "1"));
        match done {
            Ok(()) => info!("net.ipv4.ip_forward is on as long as the daemon runs"),
            Err(error) => warn!("net.ipv4.ip_forward could not be set: {error}"),
        }
    }
}

const EEXIST: i32 = 17;

/// The table that `ip route` shows.
const MAIN_TABLE: u32 = 254;

/// Replaces our table of nftables, in one transaction; none removes it.
fn set_rules(rules: Option<&str>) -> anyhow::Result<()> {
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
