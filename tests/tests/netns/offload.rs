//! Flows that are forwarded in the kernel: the same packets as by the poll loop, and no longer than they may.

use serde_json::Value;
use xtask::lab::{self, Daemon, Namespace};

use crate::policy::no_ports;
use crate::{Bench, add_pod, assert_balanced, bench, node_with_pods};

const OFFLOADING: &str = r#"
[worker]
offload = "xdp"
[uplink]
link = "wire"
[[network]]
name = "pods"
vni = 7
ranges = ["10.244.1.0/24", "fd00:10:244:1::/64"]
subnets = ["10.244.0.0/16", "fd00:10:244::/48"]
[[peer]]
name = "far"
vtep = "192.0.2.2"
[[route]]
network = "pods"
prefix = "10.244.2.0/24"
peer = "far"
[[route]]
network = "pods"
prefix = "fd00:10:244:2::/64"
peer = "far"
"#;

/// Sends frames of several kinds, each so many times and always the same, one every half millisecond.
///
/// Arguments: device, destination MAC, addresses (source and destination, v4 and v6), how often, and for VXLAN the outer
/// destination's MAC.
const SEND: &str = r#"
import socket, sys, time
from scapy.all import Ether, IP, IPv6, UDP, TCP, VXLAN, Raw, get_if_hwaddr
dev, mac, s4, d4, s6, d6, count = sys.argv[1:8]
own = get_if_hwaddr(dev)
outer = None
if len(sys.argv) > 8:
    outer = Ether(src=own, dst=sys.argv[8]) / IP(src='192.0.2.2', dst='192.0.2.1', id=0, flags='DF') / UDP(sport=50000, dport=4789, chksum=0) / VXLAN(flags=8, vni=7)
    own = mac
eth = Ether(src=own, dst=mac)
frames = []
for ip in (IP(src=s4, dst=d4, id=77, tos=8), IPv6(src=s6, dst=d6, tc=8)):
    frames.append(eth / ip / UDP(sport=1000, dport=9000) / Raw(b'datagram'))
    frames.append(eth / ip / TCP(sport=1000, dport=9000, flags='PA', seq=1 << 20, ack=7, window=500) / Raw(b'segment' * 150))
frames = [bytes(outer / frame if outer else frame) for frame in frames]
out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
out.bind((dev, 0))
for _ in range(int(count)):
    for frame in frames:
        out.send(frame); time.sleep(.0005)
"#;

/// Prints how many frames a device receives with port 9000 in them, and how many different ones, once there are as many as asked
/// or nothing more comes.
const WATCH: &str = r#"
import socket, sys
dev, wanted = sys.argv[1], int(sys.argv[2])
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
s.bind((dev, 0)); s.settimeout(5)
print('ready', file=open(sys.argv[3], 'w'), flush=True)
seen, count = {}, 0
try:
    while count < wanted:
        frame, where = s.recvfrom(65535)
        if where[2] != 4 and b'\x03\xe8\x23\x28' in frame:
            count += 1; seen[frame] = seen.get(frame, 0) + 1
except TimeoutError: pass
print(count, len(seen), flush=True)
"#;

const ROUNDS: u64 = 300;
const KINDS: u64 = 4;

fn offload(daemon: &Daemon) -> Value {
    daemon.ctl(&["status"]).unwrap()["offload"].clone()
}

fn forwarded(daemon: &Daemon) -> u64 {
    offload(daemon)["packets"].as_u64().unwrap()
}

fn mac_of(namespace: &Namespace, link: &str) -> String {
    let links: Value = serde_json::from_str(&namespace.run(5, &["ip", "-j", "link", "show", link]).unwrap()).unwrap();
    links[0]["address"].as_str().unwrap().to_owned()
}

/// A link there, and its addresses.
struct End<'a> {
    namespace: &'a Namespace,
    link: &'a str,
    addresses: [&'a str; 2],
}

/// Sends frames of all kinds from one end to the other; all arrive, those by the poll loop and those by the kernel alike.
fn compare(bench: &mut Bench, daemon: &Daemon, from: &End<'_>, to: &End<'_>, mac: &str, outer: Option<&str>) {
    let count = (ROUNDS * KINDS).to_string();
    let ready = bench.lab.file("ready", "").unwrap();
    let watcher = to.namespace.command(&["/usr/bin/python3", "-c", WATCH, to.link, &count, &ready]);
    let watcher = { watcher }.stdout(std::process::Stdio::piped()).spawn().unwrap();
    lab::wait_for(10, || std::fs::read_to_string(&ready).is_ok_and(|text| text.contains("ready"))).unwrap();
    let before = forwarded(daemon);
    let rounds = ROUNDS.to_string();
    let [s4, s6] = from.addresses;
    let [d4, d6] = to.addresses;
    let mut command = vec!["/usr/bin/python3", "-c", SEND, from.link, mac, s4, d4, s6, d6, &rounds];
    command.extend(outer);
    from.namespace.run(60, &command).unwrap();
    let seen = String::from_utf8(watcher.wait_with_output().unwrap().stdout).unwrap();
    assert_eq!(seen.trim(), format!("{} {KINDS}", ROUNDS * KINDS), "frames, and different ones");
    let by_kernel = forwarded(daemon) - before;
    println!("{by_kernel} of {count} frames were forwarded in the kernel, and look like the others");
    assert!(by_kernel > ROUNDS * KINDS * 8 / 10, "{by_kernel}");
    assert!(by_kernel < ROUNDS * KINDS, "the first ones are judged");
}

fn await_links(daemon: &Daemon) {
    let all = || offload(daemon)["without"].as_array().is_some_and(Vec::is_empty);
    lab::wait_for(10, all).unwrap_or_else(|_| panic!("{}", offload(daemon)));
}

#[test]
fn the_kernel_forwards_what_the_poll_loop_would() {
    let Some(mut bench) = bench("fast") else { return };
    let (node, far) = (bench.lab.namespace("node").unwrap(), bench.lab.namespace("far").unwrap());
    bench.lab.wire([(&node, "wire", &["192.0.2.1/24"]), (&far, "wire", &["192.0.2.2/24"])], 1500).unwrap();
    far.run(5, &["ethtool", "-K", "wire", "gro", "on"]).unwrap();
    let daemon = bench.lab.daemon(&node, "node", OFFLOADING).unwrap();
    let pods = ["pod0", "pod1"].map(|name| add_pod(&mut bench.lab, &daemon, name));
    lab::wait_for(10, || daemon.ctl(&["status"]).unwrap()["peers_reachable"] == 1).unwrap();
    await_links(&daemon);
    let gateway = "02:76:73:77:00:01";
    let [one, other] = [0, 1].map(|at: usize| {
        let addresses = [pods[at].1[0].as_str(), pods[at].1[1].as_str()];
        End { namespace: &pods[at].0, link: "eth0", addresses }
    });
    let far = End { namespace: &far, link: "wire", addresses: ["10.244.2.9", "fd00:10:244:2::9"] };
    compare(&mut bench, &daemon, &one, &other, gateway, None);
    compare(&mut bench, &daemon, &one, &far, gateway, None);
    compare(&mut bench, &daemon, &far, &other, gateway, Some(&mac_of(&node, "wire")));
    // Real stacks on top: what they leave to the device is completed on the way out, and told to the receiver here.
    bench.lab.spawn(other.namespace, &["iperf3", "-s"]).unwrap();
    lab::wait_for(5, || other.namespace.run(5, &["ss", "-Hltn"]).is_ok_and(|text| text.contains(":5201"))).unwrap();
    assert!(one.namespace.iperf3(other.addresses[0], 2, &[]).unwrap() > 1e8);
    assert!(one.namespace.iperf3(other.addresses[1], 2, &["-u", "-b", "20M", "-l", "800"]).unwrap() > 1e7);
    assert_balanced(&daemon);
}

/// Sends a datagram with a whole checksum every millisecond for as long as it lives.
const STREAM: &str = "import socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
# SO_NO_CHECK: a checksum of zero is whole.
s.setsockopt(socket.SOL_SOCKET, 11, 1); s.bind(('', 1000))
while True:
    try: s.sendto(b'x', (sys.argv[1], 9))
    except OSError: pass
    time.sleep(.001)";

const DENY: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: default}
spec:
  podSelector: {}
  policyTypes: [Ingress]
";

#[test]
fn a_change_ends_what_the_kernel_forwards_and_a_lost_link_does_not() {
    let Some(mut bench) = bench("fast") else { return };
    let config = format!("[worker]\noffload = \"xdp\"\noffload_flows = 64\n{}", crate::ALONE);
    let (daemon, pods) = node_with_pods(&mut bench, &config, 2);
    let (from, to) = (&pods[0].0, &pods[1].0);
    let target = pods[1].1[0].clone();
    // The policy is for pods, and must know which these are.
    for (pod, addresses) in &pods {
        let object = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {}, namespace: default}}\nstatus: {{podIP: {}}}\n",
            pod.name, addresses[0]
        );
        let file = bench.lab.file("pod.yaml", &object).unwrap();
        daemon.run_ctl(&["policy", "apply", "-f", &file]).unwrap();
    }
    await_links(&daemon);
    bench.lab.spawn(from, &["/usr/bin/python3", "-c", STREAM, &target]).unwrap();
    let grows = |what: &dyn Fn() -> u64| {
        let before = what();
        lab::wait_for(10, || what() > before + 200)
    };
    grows(&|| forwarded(&daemon)).unwrap();
    let flows = daemon.ctl(&["flow", "list"]).unwrap();
    assert!(flows["flows"].as_array().unwrap().iter().any(|flow| flow["offloaded"] == true), "{flows}");

    let file = bench.lab.file("deny.yaml", DENY).unwrap();
    for _ in 0..20 {
        daemon.run_ctl(&["policy", "apply", "-f", &file]).unwrap();
        let (got, by_kernel) = (no_ports(to), forwarded(&daemon));
        std::thread::park_timeout(std::time::Duration::from_millis(50));
        assert_eq!((no_ports(to), forwarded(&daemon)), (got, by_kernel), "datagrams after the policy was in force");
        daemon.run_ctl(&["policy", "delete", "-f", &file]).unwrap();
        grows(&|| forwarded(&daemon)).unwrap();
    }

    // More flows than there is room for: nobody loses anything that the rings can hold while a worker waits for its core.
    let many = "import socket, sys, time
for port in range(2000, 3000):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.setsockopt(socket.SOL_SOCKET, 11, 1); s.bind(('', port))
    for _ in range(40): s.sendto(b'x', (sys.argv[1], 10))
    s.close(); time.sleep(.002)";
    let before = no_ports(to);
    from.run(60, &["/usr/bin/python3", "-c", many, &target]).unwrap();
    let have_come = lab::wait_for(5, || no_ports(to) >= before + 40_000);
    assert!(have_come.is_ok(), "{} of 40000; {}", no_ports(to) - before, daemon.ctl(&["drops"]).unwrap());
    let full = offload(&daemon);
    assert!(full["refused"].as_u64().unwrap() > 0, "{full}");
    assert!(full["flows"].as_u64().unwrap() <= 64, "{full}");

    // The kernel cannot send there any more: what flowed there comes back to the poll loop within a second or two.
    to.run(5, &["ethtool", "-K", "eth0", "gro", "off"]).unwrap();
    lab::wait_for(5, || !offload(&daemon)["without"].as_array().unwrap().is_empty()).unwrap();
    let reason = offload(&daemon)["without"][0]["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("gro on"), "{reason}");
    grows(&|| no_ports(to)).unwrap();
    let by_kernel = forwarded(&daemon);
    grows(&|| no_ports(to)).unwrap();
    assert_eq!(forwarded(&daemon), by_kernel);
    assert_balanced(&daemon);
}
