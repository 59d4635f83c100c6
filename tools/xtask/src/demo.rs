//! `cargo xtask demo`: two nodes, four pods, real traffic, and a verdict a line.

use std::fs;
use std::process::Command;

use anyhow::{Context, bail};
use serde_json::{Value, json};
use xtask::lab::{self, Daemon, Lab, Namespace};

/// Everything of the demo has this in its name.
const PREFIX: &str = "vswdemo";

const MEGABYTE: usize = 1 << 20;

/// A line of the table.
struct Line {
    what: String,
    is_ok: bool,
    detail: String,
}

/// Two nodes and their pods.
struct Demo {
    lab: Lab,
    daemons: Vec<Daemon>,
    /// Pods and their addresses, two a node.
    pods: Vec<(Namespace, Vec<String>)>,
    lines: Vec<Line>,
    /// A namespace that knows the nodes and nothing else.
    internet: Namespace,
}

/// Runs the demo. True if every line holds.
pub(crate) fn run(keep: bool, as_json: bool) -> anyhow::Result<bool> {
    if let Some(reason) = lab::missing_privilege() {
        bail!("{reason}");
    }
    if directory().exists() {
        eprintln!("demo: the one that was kept is removed first");
    }
    let mut demo = Demo::build()?;
    demo.check_pings();
    demo.check_tcp();
    demo.check_http();
    demo.check_underlay();
    demo.check_outside();
    demo.check_sizes();
    demo.check_translation();
    demo.check_policy();
    demo.check_switchctl();
    let Demo { lab, mut daemons, pods, mut lines, .. } = demo;
    if keep {
        print(&lines, as_json);
        explain(&daemons, &pods);
        lab.keep(&mut daemons)?;
    } else {
        lines.push(check_leftovers(lab, daemons));
        print(&lines, as_json);
    }
    Ok(lines.iter().all(|line| line.is_ok))
}

/// Removes what `--keep` left.
pub(crate) fn down() {
    if !directory().exists() {
        println!("no demo is up");
        return;
    }
    lab::remove(PREFIX, &directory());
    println!("the demo is gone");
}

/// Where a kept demo has its files.
fn directory() -> std::path::PathBuf {
    lab::directory_of(PREFIX)
}

impl Demo {
    fn build() -> anyhow::Result<Demo> {
        let mut lab = Lab::new(PREFIX)?;
        let nodes = [lab.namespace("node1")?, lab.namespace("node2")?];
        let addresses = [["192.0.2.1/24", "2001:db8::1/64"], ["192.0.2.2/24", "2001:db8::2/64"]];
        lab.wire([(&nodes[0], "wire", &addresses[0]), (&nodes[1], "wire", &addresses[1])], 1500)?;
        let conflist: Value =
            serde_json::from_str(&fs::read_to_string(lab::workspace().join("config/10-vswitch.conflist"))?)?;
        let mut daemons = Vec::new();
        let mut pods = Vec::new();
        for (at, node) in nodes.iter().enumerate() {
            let daemon = lab.daemon(node, &format!("node{}", at + 1), &config(at + 1))?;
            for name in ["a", "b"] {
                let pod = lab.namespace(&format!("pod{}{name}", at + 1))?;
                pod.ip("link set lo up")?;
                let addresses = daemon.add_pod(&pod, &conflist)?;
                pods.push((pod, addresses));
            }
            daemons.push(daemon);
        }
        for daemon in &daemons {
            lab::wait_for(10, || daemon.ctl(&["status"]).is_ok_and(|status| status["peers_reachable"] == 1))
                .context("the peers do not become reachable")?;
        }
        let internet = internet(&mut lab, &nodes[0])?;
        Ok(Demo { lab, daemons, pods, lines: Vec::new(), internet })
    }

    /// The pod to test from, and the ones to test to: on its node, and on the other.
    fn ends(&self) -> (Namespace, [(&'static str, usize); 2]) {
        (self.pods[0].0.clone(), [("on one node", 1), ("across the wire", 2)])
    }

    fn check_pings(&mut self) {
        let (from, targets) = self.ends();
        for (place, at) in targets {
            for (family, address) in [("IPv4", 0), ("IPv6", 1)] {
                let address = self.pods[at].1.get(address).cloned().unwrap_or_default();
                let is_ok = from.await_ping(&address).is_ok() && from.pings(&address, 20, 5);
                self.line(format!("ping {family} {place}"), is_ok, format!("20 of 20 from {address}"));
            }
        }
    }

    fn check_tcp(&mut self) {
        let (from, targets) = self.ends();
        for (place, at) in targets {
            let (pod, addresses) = self.pods[at].clone();
            let served = self.lab.spawn(&pod, &["iperf3", "-s"]).is_ok() && is_listening(&pod, 5201);
            for (way, more) in [("there", &[][..]), ("back", &["-R"][..])] {
                let rate =
                    if served { from.iperf3(&addresses[0], 2, more) } else { Err(anyhow::anyhow!("no iperf3 server")) };
                self.measured(format!("TCP {place}, {way}"), rate.map(|bits| format!("{:.2} Gbit/s", bits / 1e9)));
            }
        }
    }

    fn check_http(&mut self) {
        let (from, targets) = self.ends();
        for (place, at) in targets {
            let (pod, addresses) = self.pods[at].clone();
            let result = fetch(&mut self.lab, &from, &pod, &addresses[0]);
            self.measured(format!("HTTP {place}"), result);
        }
    }

    fn check_underlay(&mut self) {
        let (one, two) = (self.daemons[0].node.clone(), self.daemons[1].node.clone());
        let is_ok = one.pings("192.0.2.2", 20, 5) && one.pings("2001:db8::2", 20, 5);
        self.line("node to node, not VXLAN: ping", is_ok, "20 of 20, IPv4 and IPv6");
        let rate = match self.lab.spawn(&two, &["iperf3", "-s"]) {
            Ok(_) if is_listening(&two, 5201) => one.iperf3("192.0.2.2", 1, &[]),
            _ => Err(anyhow::anyhow!("no iperf3 server")),
        };
        self.measured("node to node, not VXLAN: TCP", rate.map(|bits| format!("{:.2} Gbit/s", bits / 1e9)));
    }

    /// The host's stack, and the world behind it.
    fn check_outside(&mut self) {
        let (pod, addresses) = self.pods[0].clone();
        let node = self.daemons[0].node.clone();
        let probe = addresses.iter().all(|address| node.pings(address, 20, 5));
        self.line("host to pod: ping", probe, format!("20 of 20 to {}", addresses.join(" and ")));
        let host = ["10.244.1.1", "192.0.2.1"];
        let is_ok = host.iter().all(|address| pod.pings(address, 20, 5));
        self.line("pod to host: ping", is_ok, format!("20 of 20 to {}", host.join(" and ")));
        let internet = self.internet.clone();
        let seen = serve_addresses(&mut self.lab, &internet).and_then(|()| ask_address(&pod, "198.51.100.1"));
        let seen = seen.and_then(|seen| match seen.as_str() {
            "203.0.113.1" => Ok("the answer came back, and the node's 203.0.113.1 was seen as the caller".to_owned()),
            other => bail!("seen as {other} and not as the node"),
        });
        self.measured("pod to internet, source NAT and back", seen);
    }

    /// Paths and sizes.
    fn check_sizes(&mut self) {
        let (pod, _) = self.pods[0].clone();
        let (far, addresses) = self.pods[2].clone();
        let hops = pod.run(20, &["traceroute", "-n", "-q", "1", "-w", "2", &addresses[0]]).map(|text| {
            let hop = |line: &str| line.split_whitespace().nth(1).unwrap_or("*").to_owned();
            text.lines().skip(1).map(hop).collect::<Vec<_>>().join(" ")
        });
        let is_ok = hops.as_ref().is_ok_and(|hops| *hops == format!("10.244.1.1 10.244.2.1 {}", addresses[0]));
        self.line("traceroute through both nodes", is_ok, hops.unwrap_or_else(|error| format!("{error:#}")));
        let served = echo_datagrams(&mut self.lab, &far);
        for size in [9_000, 60_000] {
            let sent = match &served {
                Ok(()) => send_datagrams(&pod, &addresses, size),
                Err(error) => Err(anyhow::anyhow!("{error:#}")),
            };
            self.measured(format!("UDP datagram of {size} bytes across the wire"), sent);
        }
        let found = discover(&pod, &addresses[0]);
        self.measured("path MTU discovery with DF", found);
    }

    fn check_translation(&mut self) {
        let asked = self.ask_a_service();
        self.measured("a service, answered on both nodes", asked);
        let left = self.leave_with_an_address();
        self.measured("pod to internet with an address of its own", left);
    }

    /// The HTTP servers of both nodes answer at one address.
    fn ask_a_service(&self) -> anyhow::Result<String> {
        let (node, from) = (&self.daemons[0], &self.pods[0].0);
        let backends = [1, 2].map(|at| format!("{}:8080", self.pods[at].1[0]));
        let set = ["service", "set", "shop/web:http", "--address", "10.96.0.10", "--port", "tcp/80", "--backend"];
        node.run_ctl(&[&set[..], &[&backends[0], "--backend", &backends[1]]].concat())?;
        for _ in 0..20 {
            from.run(5, &["busybox", "wget", "-q", "-O", "/dev/null", "http://10.96.0.10/file"])?;
        }
        // Those that are over, too.
        let listed = node.ctl(&["connection", "list", "--address", "10.96.0.10", "--port", "80"])?;
        node.run_ctl(&["service", "del", "shop/web:http"])?;
        let connections = listed["connections"].as_array().cloned().unwrap_or_default();
        let counts = backends
            .map(|backend| connections.iter().filter(|one| one["leaves_as"][1].as_str() == Some(&backend)).count());
        if counts.contains(&0) || counts.iter().sum::<usize>() != 20 {
            bail!("connections of the two: {counts:?}");
        }
        Ok(format!("20 of 20 by 10.96.0.10, {} on this node and {} on the other", counts[0], counts[1]))
    }

    fn leave_with_an_address(&self) -> anyhow::Result<String> {
        let (node, (pod, addresses)) = (&self.daemons[0], &self.pods[0]);
        self.internet.ip("route replace 198.51.100.50/32 via 203.0.113.1")?;
        let source = format!("{}/32", addresses[0]);
        node.run_ctl(&["egress", "set", "demo", "--from", &source, "--address", "198.51.100.50"])?;
        let seen = ask_address(pod, "198.51.100.1");
        node.run_ctl(&["egress", "del", "demo"])?;
        match seen?.as_str() {
            "198.51.100.50" => Ok("seen as 198.51.100.50, and not as the node".to_owned()),
            other => bail!("seen as {other}"),
        }
    }

    fn check_policy(&mut self) {
        let result = self.guard_a_pod();
        self.measured("policy: a stranger is denied, a label lets it in", result);
    }

    /// A pod of the second node lets in pods with a label only; one of the first node gets it.
    fn guard_a_pod(&self) -> anyhow::Result<String> {
        let (node, from, to) = (&self.daemons[1], &self.pods[0], &self.pods[2]);
        let name = |pod: &Namespace| format!("default/{}", pod.name);
        let (stranger, guarded) = (name(&from.0), name(&to.0));
        let file = self.lab.file("guard.yaml", GUARD)?;
        node.run_ctl(&["endpoint", "set", &guarded, "--label", "app=guarded"])?;
        node.run_ctl(&["endpoint", "set", &stranger, "--label", "app=stranger", "--ip", &from.1[0]])?;
        node.run_ctl(&["policy", "apply", "--file", &file])?;
        let is_denied = !from.0.pings(&to.1[0], 3, 1);
        let why = node.run_ctl(&["policy", "explain", "--from", &stranger, "--to", &guarded, "--port", "icmp"])?;
        node.run_ctl(&["endpoint", "set", &stranger, "--label", "app=friend", "--ip", &from.1[0]])?;
        let is_allowed = from.0.pings(&to.1[0], 20, 5);
        node.run_ctl(&["policy", "delete", "--file", &file])?;
        if !is_denied || !is_allowed {
            bail!("denied as a stranger: {is_denied}; allowed as a friend: {is_allowed}; {why}");
        }
        Ok(why.lines().nth(2).unwrap_or_default().trim().to_owned())
    }

    fn check_switchctl(&mut self) {
        for at in 0..self.daemons.len() {
            let node = format!("node{}", at + 1);
            let daemon = &self.daemons[at];
            let status = daemon.ctl(&["status"]).unwrap_or_default();
            let stats = daemon.ctl(&["stats"]).unwrap_or_default();
            let flows = daemon.ctl(&["flow", "list"]).unwrap_or_default();
            let uplink = &status["uplinks"][0];
            let detail = format!(
                "{} ports, uplink xdp {} {}, {} of {} peers reachable, {} MiB",
                status["ports"],
                uplink["xdp_mode"].as_str().unwrap_or("-"),
                uplink["copy_modes"][0].as_str().unwrap_or("-"),
                status["peers_reachable"],
                status["peers"],
                status["memory_bytes"].as_u64().unwrap_or(0) >> 20
            );
            let is_ok = status["ports"] == 2 && status["peers_reachable"] == 1;
            let detail_stats = format!(
                "rx {} = tx {} + drops {} + merged {} - copies {}; {} recent flows",
                stats["rx_packets"],
                stats["tx_packets"],
                stats["drops"],
                stats["merged"],
                stats["copies"],
                flows["flows"].as_array().map_or(0, Vec::len)
            );
            let is_balanced =
                stats["is_balanced"] == true && stats["rx_packets"].as_u64().is_some_and(|packets| packets > 0);
            let has_flows = flows["flows"].as_array().is_some_and(|flows| !flows.is_empty());
            self.line(format!("switchctl status, {node}"), is_ok, detail);
            self.line(format!("switchctl stats, {node}"), is_balanced && has_flows, detail_stats);
        }
    }

    fn line(&mut self, what: impl Into<String>, is_ok: bool, detail: impl Into<String>) {
        self.lines.push(Line { what: what.into(), is_ok, detail: detail.into() });
    }

    fn measured(&mut self, what: impl Into<String>, result: anyhow::Result<String>) {
        let is_ok = result.is_ok();
        self.line(what, is_ok, result.unwrap_or_else(|error| format!("{error:#}")));
    }
}

/// Nobody reaches pods with the label `app=guarded` but those with `app=friend`.
const GUARD: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: guard, namespace: default}
spec:
  podSelector: {matchLabels: {app: guarded}}
  ingress:
  - from: [{podSelector: {matchLabels: {app: friend}}}]
";

fn config(node: usize) -> String {
    let other = 3 - node;
    format!(
        r#"
[worker]
cores = [{core}]
umem_frames = 16384

[uplink]
link = "wire"

[host]
network = "pods"

[[network]]
name = "pods"
vni = 1
subnets = ["10.244.0.0/16", "fd00:10:244::/48"]
ranges = ["10.244.{node}.0/24", "fd00:10:244:{node}::/64"]

[[peer]]
name = "node{other}"
vtep = "192.0.2.{other}"

[[route]]
network = "pods"
prefix = "10.244.{other}.0/24"
peer = "node{other}"

[[route]]
network = "pods"
prefix = "fd00:10:244:{other}::/64"
peer = "node{other}"
"#,
        core = (node - 1) % std::thread::available_parallelism().map_or(1, usize::from)
    )
}

/// Beyond the first node: it knows the node's address on their common link, and no pod.
fn internet(lab: &mut Lab, node: &Namespace) -> anyhow::Result<Namespace> {
    let internet = lab.namespace("internet")?;
    lab.wire([(node, "world", &["203.0.113.1/24"]), (&internet, "world", &["203.0.113.9/24"])], 1500)?;
    internet.ip("addr add 198.51.100.1/32 dev lo")?;
    node.ip("route add default via 203.0.113.9")?;
    Ok(internet)
}

/// A server that tells each caller its address.
fn serve_addresses(lab: &mut Lab, at: &Namespace) -> anyhow::Result<()> {
    let program = "import socketserver
class H(socketserver.BaseRequestHandler):
    def handle(self): self.request.sendall(self.client_address[0].encode())
socketserver.TCPServer(('0.0.0.0', 7), H).serve_forever()";
    lab.spawn(at, &["/usr/bin/python3", "-c", program])?;
    if is_listening(at, 7) { Ok(()) } else { bail!("no server in {}", at.name) }
}

fn ask_address(from: &Namespace, server: &str) -> anyhow::Result<String> {
    let program = "import socket, sys; print(socket.create_connection((sys.argv[1], 7), 3).recv(99).decode())";
    Ok(from.run(5, &["/usr/bin/python3", "-c", program, server])?.trim().to_owned())
}

/// A server that sends datagrams back.
fn echo_datagrams(lab: &mut Lab, at: &Namespace) -> anyhow::Result<()> {
    let program = "import socket
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
s.bind(('::', 7))
while True:
    data, peer = s.recvfrom(65535)
    s.sendto(data, peer)";
    lab.spawn(at, &["/usr/bin/python3", "-c", program])?;
    let listening = || at.run(5, &["ss", "-Hlun"]).is_ok_and(|text| text.contains(":7 "));
    lab::wait_for(5, listening).context("no echo server")
}

/// A datagram there and back, by each family.
fn send_datagrams(from: &Namespace, addresses: &[String], size: usize) -> anyhow::Result<String> {
    let program = "import socket, sys
size = int(sys.argv[1])
data = bytes(i * 31 % 251 for i in range(size))
for to in sys.argv[2:]:
    s = socket.socket(socket.AF_INET6 if ':' in to else socket.AF_INET, socket.SOCK_DGRAM)
    s.settimeout(3)
    s.sendto(data, (to, 7))
    assert s.recv(65535) == data, to";
    let size = size.to_string();
    let mut command = vec!["/usr/bin/python3", "-c", program, &size];
    command.extend(addresses.iter().map(String::as_str));
    from.run(10, &command)?;
    Ok("came back as sent, IPv4 and IPv6".to_owned())
}

/// A route without MTU, so that only the switch can tell what fits.
fn discover(from: &Namespace, address: &str) -> anyhow::Result<String> {
    from.ip(&format!("route add {address}/32 via 169.254.1.1 dev eth0"))?;
    let ping =
        |size: &str| from.command(&["ping", "-n", "-M", "do", "-s", size, "-c", "1", "-W", "2", address]).output();
    let told = String::from_utf8_lossy(&ping("4000")?.stdout).into_owned();
    let line = told.lines().find(|line| line.contains("needed")).unwrap_or_default().trim().to_owned();
    let mtu: u32 = line.rsplit(' ').next().and_then(|end| end.trim_end_matches(')').parse().ok()).unwrap_or(0);
    let fits = mtu > 28 && ping(&(mtu - 28).to_string())?.status.success();
    from.ip(&format!("route del {address}/32"))?;
    if fits { Ok(line) } else { bail!("told \"{line}\", and what should fit does not") }
}

/// A megabyte from a server in a pod, compared byte by byte.
fn fetch(lab: &mut Lab, from: &Namespace, pod: &Namespace, address: &str) -> anyhow::Result<String> {
    let home = lab.directory().join(format!("www-{}", pod.name));
    fs::create_dir_all(&home)?;
    let bytes: Vec<u8> = (0..MEGABYTE).map(|at| (at * 7 + at / 251) as u8).collect();
    fs::write(home.join("file"), &bytes)?;
    lab.spawn(pod, &["busybox", "httpd", "-f", "-p", "8080", "-h", &home.to_string_lossy()])?;
    if !is_listening(pod, 8080) {
        bail!("no HTTP server in {}", pod.name);
    }
    let got = home.join("got");
    let (url, path) = (format!("http://{address}:8080/file"), got.to_string_lossy());
    from.run(20, &["busybox", "wget", "-q", "-O", &path, &url])?;
    let got = fs::read(&got)?;
    if got != bytes {
        bail!("{} bytes came, and they are not the ones that were sent", got.len());
    }
    Ok(format!("{MEGABYTE} bytes, all as sent"))
}

fn is_listening(namespace: &Namespace, port: u16) -> bool {
    let wanted = format!(":{port}");
    let listening = || namespace.run(5, &["ss", "-Hltn"]).is_ok_and(|text| text.contains(&wanted));
    lab::wait_for(5, listening).is_ok()
}

/// Takes everything down, and looks for what stayed.
fn check_leftovers(lab: Lab, mut daemons: Vec<Daemon>) -> Line {
    let nodes: Vec<Namespace> = daemons.iter().map(|daemon| daemon.node.clone()).collect();
    let is_clean_exit = daemons.iter_mut().map(Daemon::stop).fold(true, |all, one| all & one);
    let programs: usize = nodes
        .iter()
        .map(|node| node.run(5, &["ip", "-d", "link", "show"]).map_or(1, |text| text.matches("prog/xdp").count()))
        .sum();
    drop(daemons);
    drop(lab);
    let list = Command::new("ip").args(["netns", "list"]).output().map(|output| output.stdout).unwrap_or_default();
    let namespaces = String::from_utf8_lossy(&list).lines().filter(|line| line.starts_with(PREFIX)).count();
    let is_ok = is_clean_exit && programs == 0 && namespaces == 0;
    let detail =
        format!("daemons ended well: {is_clean_exit}; {programs} XDP programs and {namespaces} namespaces left");
    Line { what: "nothing left behind".to_owned(), is_ok, detail }
}

fn print(lines: &[Line], as_json: bool) {
    if as_json {
        let lines: Vec<Value> =
            lines.iter().map(|line| json!({"what": line.what, "ok": line.is_ok, "detail": line.detail})).collect();
        println!("{}", json!({ "lines": lines }));
        return;
    }
    let width = lines.iter().map(|line| line.what.len()).max().unwrap_or(0);
    for Line { what, is_ok, detail } in lines {
        println!("{}  {what:width$}  {detail}", if *is_ok { "ok  " } else { "FAIL" });
    }
}

fn explain(daemons: &[Daemon], pods: &[(Namespace, Vec<String>)]) {
    println!("\nThe demo stays up. `cargo xtask demo --down` removes it.");
    let binaries = lab::binaries();
    for daemon in daemons {
        println!(
            "  {}: nsenter --net={} {}/switchctl --socket {} status",
            daemon.node.name,
            daemon.node.path(),
            binaries.display(),
            daemon.socket.display()
        );
    }
    for (pod, addresses) in pods {
        println!("  {}: {}; ip netns exec {} bash", pod.name, addresses.join(" "), pod.name);
    }
}
