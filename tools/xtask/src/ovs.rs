//! An Open vSwitch of a laboratory's own: database, sockets and logs in its directory.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::lab::{self, Lab, Namespace};

const SWITCH: &str = "/usr/lib/openvswitch-switch/ovs-vswitchd";

/// A running Open vSwitch. Its processes are the laboratory's.
#[derive(Debug)]
pub struct Ovs {
    node: Namespace,
    directory: PathBuf,
    /// Process of the switch.
    pub pid: u32,
}

impl Ovs {
    /// Why there is none here, if there is not.
    pub fn missing() -> Option<String> {
        let is_there = |program: &str| {
            let paths = std::env::var_os("PATH").unwrap_or_default();
            std::env::split_paths(&paths).any(|path| path.join(program).exists())
        };
        let is_missing =
            !Path::new(SWITCH).exists() || !["ovsdb-tool", "ovsdb-server", "ovs-vsctl"].into_iter().all(is_there);
        is_missing.then(|| "openvswitch-switch is not installed, or not in PATH: see `cargo xtask setup`".to_owned())
    }

    /// Starts one in a namespace, its poll loops on the cores of this mask.
    ///
    /// # Errors
    ///
    /// If it does not come up.
    pub fn start(lab: &mut Lab, node: &Namespace, cores: &str) -> anyhow::Result<Ovs> {
        let directory = lab.directory().join(format!("ovs-{}", node.name));
        fs::create_dir_all(&directory)?;
        let mut ovs = Ovs { node: node.clone(), directory, pid: 0 };
        let (database, socket) = (ovs.file("conf.db"), ovs.file("db.sock"));
        node.run(10, &["ovsdb-tool", "create", &database, "/usr/share/openvswitch/vswitch.ovsschema"])?;
        let environment = format!("OVS_RUNDIR={0} OVS_LOGDIR={0} OVS_DBDIR={0}", ovs.directory.display());
        let control = ovs.file("s.ctl");
        let server = format!("ovsdb-server {database} --remote=punix:{socket} --unixctl={control}");
        lab.spawn(node, &["sh", "-c", &format!("exec env {environment} {server}")])?;
        lab::wait_for(5, || Path::new(&socket).exists()).context("ovsdb-server does not start")?;
        ovs.vsctl(&["--no-wait", "init"])?;
        ovs.vsctl(&["--no-wait", "set", "Open_vSwitch", ".", &format!("other_config:pmd-cpu-mask={cores}")])?;
        let control = ovs.file("v.ctl");
        let switch = format!("exec env {environment} {SWITCH} unix:{socket} --unixctl={control}");
        ovs.pid = lab.spawn(node, &["sh", "-c", &switch])?;
        Ok(ovs)
    }

    /// A bridge of the userspace datapath.
    ///
    /// # Errors
    ///
    /// Those of `ovs-vsctl`.
    pub fn add_bridge(&self, name: &str) -> anyhow::Result<()> {
        self.vsctl(&["add-br", name, "--", "set", "bridge", name, "datapath_type=netdev"])
    }

    /// A link as an AF_XDP port.
    ///
    /// # Errors
    ///
    /// Those of `ovs-vsctl`.
    pub fn add_port(&self, bridge: &str, link: &str) -> anyhow::Result<()> {
        self.vsctl(&["add-port", bridge, link, "--", "set", "interface", link, "type=afxdp"])
    }

    /// Runs `ovs-vsctl`.
    ///
    /// # Errors
    ///
    /// With what it printed.
    pub fn vsctl(&self, words: &[&str]) -> anyhow::Result<()> {
        let database = format!("--db=unix:{}", self.file("db.sock"));
        self.node.run(15, &[&["ovs-vsctl", "--timeout=10", &database], words].concat()).map(drop)
    }

    fn file(&self, name: &str) -> String {
        self.directory.join(name).display().to_string()
    }
}

impl Drop for Ovs {
    /// Some of its scripts leave /dev/null a plain file.
    fn drop(&mut self) {
        use std::os::unix::fs::FileTypeExt;
        if !fs::metadata("/dev/null").is_ok_and(|data| data.file_type().is_char_device()) {
            let _ = fs::remove_file("/dev/null");
            let _ = std::process::Command::new("mknod").args(["-m", "666", "/dev/null", "c", "1", "3"]).status();
        }
    }
}
