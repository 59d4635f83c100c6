//! A laboratory: nodes and pods as network namespaces, wires as veths, daemons and peers as processes.
//!
//! Everything has the laboratory's prefix in its name and ends with it: dropping a [`Lab`] stops the processes it
//! started, by pid, and deletes its namespaces, and with them all links. Nothing outside them is touched.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use serde_json::{Value, json};

/// Namespaces, processes and a directory that end together.
#[derive(Debug)]
pub struct Lab {
    prefix: String,
    directory: PathBuf,
    namespaces: Vec<Namespace>,
    processes: Vec<Child>,
    binaries: PathBuf,
}

/// A network namespace of a laboratory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Its full name, as `ip netns list` shows it.
    pub name: String,
}

/// A running vswitchd.
#[derive(Debug)]
pub struct Daemon {
    /// The namespace it runs in.
    pub node: Namespace,
    /// Its control socket.
    pub socket: PathBuf,
    /// Its configuration file.
    pub config: PathBuf,
    log: PathBuf,
    binaries: PathBuf,
    child: Option<Child>,
}

/// What a CNI command gave.
#[derive(Clone, Debug, PartialEq)]
pub struct CniOutput {
    /// True for exit code 0.
    pub is_ok: bool,
    /// Its standard output as JSON; null if it was empty.
    pub json: Value,
}

/// Where the binaries lie: the release build of this workspace.
pub fn binaries() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from).join("release")
}

/// The workspace's top directory.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap_or(Path::new(".")).to_owned()
}

/// Where a laboratory of this prefix has its files.
pub fn directory_of(prefix: &str) -> PathBuf {
    std::env::temp_dir().join(format!("vswitch-{prefix}"))
}

/// Why namespaces cannot be made here, if they cannot.
pub fn missing_privilege() -> Option<String> {
    let name = format!("vsw-probe-{}", std::process::id());
    match ip(&["netns", "add", &name]) {
        Ok(()) => {
            let _ = ip(&["netns", "del", &name]);
            None
        }
        Err(error) => Some(format!("cannot make network namespaces ({error:#}): run as root, with iproute2")),
    }
}

impl Lab {
    /// An empty laboratory. What an earlier one of the same prefix left behind is removed.
    ///
    /// # Errors
    ///
    /// If its directory cannot be made.
    pub fn new(prefix: &str) -> anyhow::Result<Lab> {
        let directory = directory_of(prefix);
        remove(prefix, &directory);
        fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
        Ok(Lab {
            prefix: prefix.to_owned(),
            directory,
            namespaces: Vec::new(),
            processes: Vec::new(),
            binaries: binaries(),
        })
    }

    /// A directory for files, gone with the laboratory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A new namespace with its loopback up.
    ///
    /// # Errors
    ///
    /// Those of `ip`.
    pub fn namespace(&mut self, name: &str) -> anyhow::Result<Namespace> {
        let namespace = Namespace { name: format!("{}-{name}", self.prefix) };
        ip(&["netns", "add", &namespace.name])?;
        self.namespaces.push(namespace.clone());
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// Deletes a namespace before the laboratory ends.
    ///
    /// # Errors
    ///
    /// Those of `ip`.
    pub fn delete(&mut self, namespace: &Namespace) -> anyhow::Result<()> {
        self.namespaces.retain(|other| other != namespace);
        ip(&["netns", "del", &namespace.name])
    }

    /// A wire: one veth between two namespaces, `(namespace, link, addresses)` at each end, up.
    ///
    /// # Errors
    ///
    /// Those of `ip`.
    pub fn wire(&mut self, ends: [(&Namespace, &str, &[&str]); 2], mtu: u32) -> anyhow::Result<()> {
        let [(here, link, _), (there, other, _)] = ends;
        here.ip(&format!("link add {link} mtu {mtu} type veth peer name {other} mtu {mtu} netns {}", there.name))?;
        for (namespace, link, addresses) in ends {
            for address in addresses {
                let nodad = if address.contains(':') { "nodad" } else { "" };
                namespace.ip(&format!("addr add {address} dev {link} {nodad}"))?;
            }
            namespace.ip(&format!("link set {link} up"))?;
        }
        Ok(())
    }

    /// Starts a vswitchd in a namespace, with this configuration, and waits until it answers. `[daemon]` is added.
    ///
    /// # Errors
    ///
    /// With the end of its log, if it does not.
    pub fn daemon(&mut self, node: &Namespace, name: &str, config: &str) -> anyhow::Result<Daemon> {
        let runtime = self.directory.join(name);
        fs::create_dir_all(&runtime)?;
        let file = self.directory.join(format!("{name}.toml"));
        fs::write(&file, format!("[daemon]\nruntime_dir = \"{}\"\n{config}", runtime.display()))?;
        let _ = fs::remove_file(self.directory.join(format!("{name}.log")));
        let mut daemon = Daemon {
            node: node.clone(),
            socket: runtime.join("vswitchd.sock"),
            config: file,
            log: self.directory.join(format!("{name}.log")),
            binaries: self.binaries.clone(),
            child: None,
        };
        daemon.start()?;
        Ok(daemon)
    }

    /// Writes a file of the laboratory that every user may read; its path.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn file(&self, name: &str, text: &str) -> anyhow::Result<String> {
        let path = self.directory.join(name);
        fs::write(&path, text)?;
        Ok(path.to_string_lossy().into_owned())
    }

    /// Starts a process in a namespace that the laboratory will stop; its pid. Its output goes to the laboratory's directory.
    ///
    /// # Errors
    ///
    /// If it cannot be started.
    pub fn spawn(&mut self, namespace: &Namespace, command: &[&str]) -> anyhow::Result<u32> {
        let log = self.directory.join(format!("process-{}.log", self.processes.len()));
        let log = fs::File::create(log)?;
        let mut child = namespace.command(command);
        let child = child.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn();
        let child = child.with_context(|| format!("cannot start {}", command[0]))?;
        let pid = child.id();
        self.processes.push(child);
        Ok(pid)
    }

    /// How many of the processes it spawned still run.
    pub fn running(&mut self) -> usize {
        self.processes.iter_mut().filter_map(|child| child.try_wait().ok()).filter(Option::is_none).count()
    }

    /// Leaves everything up; [`remove`] with the same prefix takes it down. The processes' pids are noted for that.
    ///
    /// # Errors
    ///
    /// If they cannot be noted.
    pub fn keep(mut self, daemons: &mut [Daemon]) -> anyhow::Result<()> {
        let children = daemons.iter_mut().filter_map(|daemon| daemon.child.take()).chain(self.processes.drain(..));
        let pids: Vec<String> = children.map(|child| child.id().to_string()).collect();
        fs::write(self.directory.join("pids"), pids.join("\n"))?;
        self.namespaces.clear();
        std::mem::forget(self);
        Ok(())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for child in &mut self.processes {
            let _ = child.kill();
            let _ = child.wait();
        }
        for namespace in &self.namespaces {
            let _ = ip(&["netns", "del", &namespace.name]);
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Takes down what [`Lab::keep`] left, or what a killed run left: processes by noted pid, namespaces by prefix.
pub fn remove(prefix: &str, directory: &Path) {
    for pid in fs::read_to_string(directory.join("pids")).unwrap_or_default().lines() {
        // A pid may have been given to somebody else since: only a process that runs in one of our namespaces is ours.
        if Command::new("ip")
            .args(["netns", "identify", pid])
            .output()
            .is_ok_and(|output| output.stdout.starts_with(prefix.as_bytes()))
        {
            let _ = Command::new("kill").arg(pid).status();
        }
    }
    let list = Command::new("ip").args(["netns", "list"]).output().map(|output| output.stdout).unwrap_or_default();
    let list = String::from_utf8_lossy(&list).into_owned();
    let ours = |name: &&str| name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('-'));
    for name in list.lines().filter_map(|line| line.split_whitespace().next()).filter(ours) {
        let _ = ip(&["netns", "del", name]);
    }
    let _ = fs::remove_dir_all(directory);
}

impl Namespace {
    /// Its path, for CNI and `nsenter`.
    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    /// Runs `ip` inside, with words separated by spaces.
    ///
    /// # Errors
    ///
    /// With what it printed, if it fails.
    pub fn ip(&self, words: &str) -> anyhow::Result<()> {
        let words: Vec<&str> = ["-n", &self.name].into_iter().chain(words.split_whitespace()).collect();
        ip(&words)
    }

    /// A command inside.
    pub fn command(&self, command: &[&str]) -> Command {
        let mut nsenter = Command::new("nsenter");
        nsenter.arg(format!("--net={}", self.path())).arg("--").args(command);
        nsenter
    }

    /// Runs a command inside, ended after `seconds`; its standard output.
    ///
    /// # Errors
    ///
    /// With what it printed, if it fails.
    pub fn run(&self, seconds: u32, command: &[&str]) -> anyhow::Result<String> {
        let limit = seconds.to_string();
        let output = self.command(&[&["timeout", &limit], command].concat()).stdin(Stdio::null()).output()?;
        checked(output, || command.join(" "))
    }

    /// True if `count` pings all come back, within `seconds`.
    pub fn pings(&self, address: &str, count: u32, seconds: u32) -> bool {
        let (count, limit) = (count.to_string(), seconds.to_string());
        self.run(seconds + 1, &["ping", "-q", "-n", "-i", "0.05", "-c", &count, "-w", &limit, address])
            .is_ok_and(|text| text.contains(" 0% packet loss"))
    }

    /// Waits until an address answers.
    ///
    /// # Errors
    ///
    /// If it does not within ten seconds.
    pub fn await_ping(&self, address: &str) -> anyhow::Result<()> {
        wait_for(10, || self.pings(address, 1, 1)).with_context(|| format!("{address} does not answer {}", self.name))
    }

    /// Measures TCP to an iperf3 server at `address`: received bits a second.
    ///
    /// # Errors
    ///
    /// iperf3's own.
    pub fn iperf3(&self, address: &str, seconds: u32, more: &[&str]) -> anyhow::Result<f64> {
        let time = seconds.to_string();
        let command = [&["iperf3", "-J", "--connect-timeout", "3000", "-t", &time, "-c", address], more].concat();
        let report: Value = serde_json::from_str(&self.run(seconds + 10, &command)?)?;
        report["end"]["sum_received"]["bits_per_second"].as_f64().ok_or_else(|| anyhow!("iperf3: {}", report["error"]))
    }
}

impl Daemon {
    /// Starts it, or starts it again.
    ///
    /// # Errors
    ///
    /// With the end of its log, if it does not answer within ten seconds.
    pub fn start(&mut self) -> anyhow::Result<()> {
        let log = fs::File::options().create(true).append(true).open(&self.log)?;
        let program = self.binaries.join("vswitchd");
        let child = self
            .node
            .command(&[&program.to_string_lossy(), "--config", &self.config.to_string_lossy()])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn();
        let mut child = child.context("cannot start vswitchd")?;
        let answered = wait_for(15, || self.ctl(&["status"]).is_ok() || matches!(child.try_wait(), Ok(Some(_))));
        if answered.is_err() || matches!(child.try_wait(), Ok(Some(_))) {
            let _ = child.kill();
            let _ = child.wait();
            bail!("vswitchd does not run: {}", self.log_end());
        }
        self.child = Some(child);
        Ok(())
    }

    /// Ends it with SIGTERM and waits; true if it said that all was well.
    pub fn stop(&mut self) -> bool {
        let Some(mut child) = self.child.take() else { return false };
        let _ = Command::new("kill").arg(child.id().to_string()).status();
        let ended = wait_for(10, || matches!(child.try_wait(), Ok(Some(_))));
        if ended.is_err() {
            let _ = child.kill();
        }
        child.wait().is_ok_and(|status| status.success())
    }

    /// Its process, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Stops it where it stands (SIGSTOP), or lets it go on (SIGCONT).
    pub fn suspend(&self, is_suspended: bool) {
        let signal = if is_suspended { "-STOP" } else { "-CONT" };
        if let Some(child) = &self.child {
            let _ = Command::new("kill").arg(signal).arg(child.id().to_string()).status();
        }
    }

    /// Ends it with SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Runs `switchctl -o json` against it.
    ///
    /// # Errors
    ///
    /// With its sentence, if it is refused.
    pub fn ctl(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        Ok(serde_json::from_str(&self.run_ctl(&[arguments, &["-o", "json"]].concat())?)?)
    }

    /// Runs `switchctl` against it; what it prints.
    ///
    /// # Errors
    ///
    /// With its sentence, if it is refused.
    pub fn run_ctl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let program = self.binaries.join("switchctl");
        let (program, socket) = (program.to_string_lossy(), self.socket.to_string_lossy());
        self.node.run(60, &[&[&*program, "--socket", &socket], arguments].concat())
    }

    /// Runs the CNI plugin on the node, as a runtime would.
    ///
    /// # Errors
    ///
    /// Only if it cannot be run; what it answers is in the output.
    pub fn cni(&self, command: &str, environment: &[(&str, &str)], netconf: &Value) -> anyhow::Result<CniOutput> {
        let program = self.binaries.join("vswitch-cni");
        let mut child = self
            .node
            .command(&[&program.to_string_lossy()])
            .env("CNI_COMMAND", command)
            .env("CNI_PATH", "/usr/lib/cni:/opt/cni/bin")
            .envs(environment.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start vswitch-cni")?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(netconf.to_string().as_bytes())?;
        }
        let output = child.wait_with_output()?;
        let json = if output.stdout.is_empty() {
            Value::Null
        } else {
            serde_json::from_slice(&output.stdout)
                .with_context(|| format!("vswitch-cni printed no JSON: {}", String::from_utf8_lossy(&output.stdout)))?
        };
        Ok(CniOutput { is_ok: output.status.success(), json })
    }

    /// Plugs a namespace in as a runtime does: the conflist's first plugin, ADD. Its addresses, IPv4 first.
    ///
    /// # Errors
    ///
    /// With the plugin's error object.
    pub fn add_pod(&self, pod: &Namespace, conflist: &Value) -> anyhow::Result<Vec<String>> {
        let path = pod.path();
        let environment = [
            ("CNI_CONTAINERID", pod.name.as_str()),
            ("CNI_NETNS", &path),
            ("CNI_IFNAME", "eth0"),
            ("CNI_ARGS", &format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={}", pod.name)),
        ];
        let output = self.cni("ADD", &environment, &self.netconf(conflist))?;
        if !output.is_ok {
            bail!("ADD of {}: {}", pod.name, output.json);
        }
        let ips = output.json["ips"].as_array().cloned().unwrap_or_default();
        let address = |ip: &Value| ip["address"].as_str().and_then(|text| text.split('/').next()).map(str::to_owned);
        Ok(ips.iter().filter_map(address).collect())
    }

    /// What a runtime makes of a conflist's first plugin, with this daemon's socket.
    pub fn netconf(&self, conflist: &Value) -> Value {
        let mut netconf = conflist["plugins"][0].clone();
        netconf["name"] = conflist["name"].clone();
        netconf["cniVersion"] = conflist["cniVersion"].clone();
        netconf["socket"] = json!(self.socket);
        netconf
    }

    /// Resident memory, bytes.
    pub fn memory(&self) -> u64 {
        self.ctl(&["status"]).ok().and_then(|status| status["memory_bytes"].as_u64()).unwrap_or(0)
    }

    /// The last lines of its log.
    pub fn log_end(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().rev().take(6).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Asks every 20 ms until it is true.
///
/// # Errors
///
/// If it is not within `seconds`.
#[expect(clippy::disallowed_methods, reason = "the laboratory waits for real processes")]
pub fn wait_for(seconds: u64, mut is_true: impl FnMut() -> bool) -> anyhow::Result<()> {
    let start = Instant::now();
    while !is_true() {
        if start.elapsed() > Duration::from_secs(seconds) {
            bail!("waited {seconds} seconds for nothing");
        }
        sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Runs `ip`.
fn ip(words: &[&str]) -> anyhow::Result<()> {
    let output = Command::new("ip").args(words).output().context("cannot run ip: install iproute2")?;
    checked(output, || format!("ip {}", words.join(" "))).map(drop)
}

fn checked(output: Output, what: impl Fn() -> String) -> anyhow::Result<String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if !output.status.success() {
        bail!("{} ({}): {} {}", what(), output.status, text(&output.stdout), text(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
