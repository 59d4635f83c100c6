//! `cargo xtask setup`: the Debian packages that building and testing need.

use std::process::{Command, Stdio};

use anyhow::{Context, bail};

/// Package, and what it is for.
const PACKAGES: &[(&str, &str)] = &[
    ("clang", "compiles the XDP programs"),
    ("llvm", "strips them; libxdp's own build asks for it"),
    ("libelf-dev", "libxdp, under pktgen and the tests"),
    ("libpcap-dev", "libxdp"),
    ("zlib1g-dev", "libxdp"),
    ("pkg-config", "libxdp"),
    ("m4", "libxdp"),
    ("make", "libxdp"),
    ("gcc", "libxdp"),
    ("linux-libc-dev", "kernel headers for the XDP programs"),
    ("iproute2", "namespaces and links of demo and tests"),
    ("iputils-ping", "ping"),
    ("procps", "kill"),
    ("iperf3", "TCP throughput"),
    ("ethtool", "offloads of the links of Open vSwitch, which cannot take them"),
    ("tcpdump", "captures in tests"),
    ("busybox-static", "a small HTTP server and client, and the container image"),
    ("containernetworking-plugins", "host-local, the delegated IPAM plugin of the tests"),
    ("podman", "real containers on our conflist"),
    ("runc", "podman's runtime"),
    ("openvswitch-switch", "the peer of the throughput ratio"),
    ("python3", "packs the container image; small servers of tests"),
    ("python3-scapy", "another decoder: reads the ICMP errors, makes frames with tags"),
    ("nftables", "masquerade and mapped ports of the host"),
    ("traceroute", "paths in the demo"),
    ("bird2", "a routing daemon of the tests"),
    ("frr", "a routing daemon of the tests, for BGP and EVPN"),
];

/// Installs what is missing, and says what.
///
/// # Errors
///
/// If something is missing and cannot be installed; the sentence names it.
pub fn run() -> anyhow::Result<()> {
    let missing: Vec<&(&str, &str)> = PACKAGES.iter().filter(|(package, _)| !is_installed(package)).collect();
    if missing.is_empty() {
        eprintln!("setup: all {} Debian packages are there", PACKAGES.len());
        return Ok(());
    }
    for (package, purpose) in &missing {
        eprintln!("setup: installing {package} ({purpose})");
    }
    let names: Vec<&str> = missing.iter().map(|(package, _)| *package).collect();
    apt(&["update"])?;
    apt(&[&["install", "-y", "--no-install-recommends"], &names[..]].concat())
        .with_context(|| format!("cannot install {}: install them by hand, then go on", names.join(" ")))
}

fn is_installed(package: &str) -> bool {
    let status = Command::new("dpkg-query").args(["-W", "-f", "${Status}", package]).stderr(Stdio::null()).output();
    status.is_ok_and(|output| output.stdout.ends_with(b"ok installed"))
}

fn apt(arguments: &[&str]) -> anyhow::Result<()> {
    let status = Command::new("apt-get")
        .args(["-q"])
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .context("cannot run apt-get: on another system than Debian install the packages of its kind by hand")?;
    if !status.success() {
        bail!("apt-get {} failed ({status}): is this root, and is there a network?", arguments[0]);
    }
    Ok(())
}
