//! Services and addresses to leave with, as programs see them.

use std::path::Path;

use serde_json::{Value, json};
use xtask::lab::{self, Daemon, Namespace};

use crate::outside::{CONFIG, World, greet, seen_as, world};
use crate::{add_pod, assert_balanced, bench, dropped, is_listening};

/// The address that an egress rule gives.
const LEAVES_AS: [&str; 2] = ["203.0.113.50", "2001:db8:50::1"];

/// A node whose network says where services have their addresses.
fn config() -> String {
    format!("{CONFIG}services = [\"10.96.0.0/16\", \"fd96::/64\"]\n")
}

fn config_of(own: u8) -> String {
    let other = 3 - own;
    let text = config().replace("10.244.1.", &format!("10.244.{own}.")).replace("244:1:", &format!("244:{own}:"));
    format!(
        "{text}[[peer]]\nname = \"other\"\nvtep = \"192.0.2.{other}\"\n
[[route]]\nnetwork = \"pods\"\nprefix = \"10.244.{other}.0/24\"\npeer = \"other\"\n
[[route]]\nnetwork = \"pods\"\nprefix = \"fd00:10:244:{other}::/64\"\npeer = \"other\"\n"
    )
}

/// Sets a service of both families at 10.96.0.10 and fd96::10.
fn serve(daemon: &Daemon, port: &str, backends: [&str; 2], backend_port: u16) {
    for (address, backend) in ["10.96.0.10", "fd96::10"].iter().zip(backends) {
        let name = format!("shop/{}:{address}", port.replace('/', "-"));
        let at = if backend.contains(':') { format!("[{backend}]") } else { backend.to_owned() };
        let at = format!("{at}:{backend_port}");
        let words = ["service", "set", &name, "--address", address, "--port", port, "--backend", &at];
        daemon.run_ctl(&words).unwrap();
    }
}

/// The report of an iperf3 that has ended, and ended well.
fn finished(report: &Path) -> Value {
    let mut text = String::new();
    lab::wait_for(15, || {
        text = std::fs::read_to_string(report).unwrap_or_default();
        text.trim_end().ends_with('}')
    })
    .unwrap();
    let report: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(report["error"], json!(null), "{report}");
    report
}

/// What a datagram's sender hears: its answer, or the error.
fn ask(from: &Namespace, to: &str, port: u16) -> String {
    let program = "import socket, sys
s = socket.socket(socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(3); s.connect((sys.argv[1], int(sys.argv[2])))
try: s.send(b'hello'); print(s.recv(100).decode())
except OSError as e: print(type(e).__name__)";
    let printed = from.run(5, &["/usr/bin/python3", "-c", program, to, &port.to_string()]).unwrap();
    printed.trim().to_owned()
}

#[test]
fn services_are_answered_here_and_on_another_node() {
    let Some(mut bench) = bench("nat") else { return };
    let lab = &mut bench.lab;
    let nodes = [lab.namespace("node1").unwrap(), lab.namespace("node2").unwrap()];
    lab.wire([(&nodes[0], "wire", &["192.0.2.1/24"]), (&nodes[1], "wire", &["192.0.2.2/24"])], 1500).unwrap();
    let mut daemons: Vec<Daemon> = [1, 2]
        .map(|own| lab.daemon(&nodes[usize::from(own) - 1], &format!("node{own}"), &config_of(own)).unwrap())
        .into();
    let (client, own) = add_pod(lab, &daemons[0], "client");
    let (near, near_at) = add_pod(lab, &daemons[0], "near");
    let (far, far_at) = add_pod(lab, &daemons[1], "far");
    client.await_ping(&far_at[0]).unwrap();
    client.await_ping(&far_at[1]).unwrap();
    for pod in [&near, &far] {
        greet(lab, pod, 8080);
        lab.spawn(pod, &["iperf3", "-s"]).unwrap();
        assert!(is_listening(pod, 5201));
    }
    let urls = ["http://10.96.0.10/", "http://[fd96::10]/"];
    for (name, at, pod) in [("near", &near_at, &near), ("far", &far_at, &far)] {
        let backends = [at[0].as_str(), at[1].as_str()];
        serve(&daemons[0], "tcp/80", backends, 8080);
        serve(&daemons[0], "udp/53", backends, 5353);
        serve(&daemons[0], "tcp/5201", backends, 5201);
        // Who answers sees who asks: a pod, or the node.
        for (url, own) in urls.iter().zip(&own) {
            assert_eq!(seen_as(&client, url), *own, "{name}");
        }
        assert_eq!(seen_as(&nodes[0], urls[0]), "10.244.1.1", "{name}");
        // Nobody listens: the error reaches who asked.
        for service in ["10.96.0.10", "fd96::10"] {
            assert_eq!(ask(&client, service, 53), "ConnectionRefusedError", "{name} {service}");
        }
        let echo = "import socket
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); s.bind(('::', 5353))
while True:
    data, who = s.recvfrom(100); s.sendto(who[0].encode(), who)";
        lab.spawn(pod, &["/usr/bin/python3", "-c", echo]).unwrap();
        lab::wait_for(5, || pod.run(5, &["ss", "-Hlun"]).is_ok_and(|text| text.contains(":5353"))).unwrap();
        assert_eq!(ask(&client, "10.96.0.10", 53), format!("::ffff:{}", own[0]), "{name}");
        assert_eq!(ask(&client, "fd96::10", 53), own[1], "{name}");
        // Both ways, beside the same without translation.
        for more in [&[][..], &["-R"]] {
            let direct = client.iperf3(&at[0], 2, more).unwrap();
            let service = client.iperf3("10.96.0.10", 2, more).unwrap();
            println!("{name} {}: {:.2} of {:.2} Gbit/s", more.concat(), service / 1e9, direct / 1e9);
        }
    }
    // A backend reaches itself.
    serve(&daemons[0], "tcp/80", [&near_at[0], &near_at[1]], 8080);
    assert_eq!(seen_as(&near, urls[0]), "10.96.0.10");
    assert_eq!(seen_as(&near, urls[1]), "fd96::10");
    // Policies are about pods.
    let policy = json!({
        "apiVersion": "vswitch.io/v1alpha1", "kind": "SwitchPolicy", "metadata": {"name": "guarded"},
        "spec": {"subject": {"pods": {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "guarded"}}}},
                 "ingress": [{"action": "Allow", "from": [{"networks": [format!("{}/32", own[0])]}]}, {"action": "Deny"}]}
    });
    let file = lab.file("policy.json", &policy.to_string()).unwrap();
    daemons[0].run_ctl(&["policy", "apply", "-f", &file]).unwrap();
    let guarded = lab.namespace("guarded").unwrap();
    let words = ["port", "add", "--netns", &guarded.path(), "--pod", "shop/guarded", "--label", "app=guarded"];
    let port = daemons[0].ctl(&words).unwrap();
    let at = |family: usize| port["addresses"][family].as_str().unwrap().split('/').next().unwrap().to_owned();
    let (v4, v6) = (at(0), at(1));
    serve(&daemons[0], "tcp/80", [&v4, &v6], 8080);
    greet(lab, &guarded, 8080);
    assert_eq!(seen_as(&client, urls[0]), own[0]);
    let connect = "import socket; socket.create_connection(('10.96.0.10', 80), timeout=1)";
    assert!(near.run(3, &["/usr/bin/python3", "-c", connect]).is_err());
    let events = daemons[0].run_ctl(&["observe", "--last", "--endpoint", "shop/guarded"]).unwrap();
    assert!(events.contains("denied tcp") && events.contains(":8080)"), "{events}");
    println!("{}", daemons[0].run_ctl(&["service", "list"]).unwrap());
    // Where nobody answers, who asks hears of it at once.
    daemons[0].run_ctl(&["service", "set", "none", "--address", "10.96.0.11", "--port", "udp/53"]).unwrap();
    assert_eq!(ask(&client, "10.96.0.11", 53), "ConnectionRefusedError");
    assert_eq!(ask(&nodes[0], "10.96.0.11", 53), "ConnectionRefusedError", "the host hears it, too");
    assert_eq!(ask(&client, "10.96.0.11", 54), "ConnectionRefusedError", "no service at that port");
    // A backend on the host's side, as a cluster's own API has them.
    greet(lab, &nodes[0], 8000);
    daemons[0]
        .run_ctl(&[
            "service",
            "set",
            "api",
            "--address",
            "10.96.0.1",
            "--port",
            "tcp/443",
            "--backend",
            "192.0.2.1:8000",
        ])
        .unwrap();
    assert_eq!(seen_as(&client, "http://10.96.0.1:443/"), own[0]);
    assert_eq!(seen_as(&nodes[0], "http://10.96.0.1:443/"), "10.96.0.1");
    assert!(dropped(&daemons[0], "no-backend") > 0);
    // A connection goes on over a restart, by a crash.
    let report = lab.directory().join("report.json");
    let command = format!("iperf3 -J -t 6 -b 20M -c 10.96.0.10 > {}", report.display());
    lab.spawn(&client, &["sh", "-c", &command]).unwrap();
    lab::wait_for(5, || daemons[0].run_ctl(&["connection", "list", "--port", "5201"]).unwrap().contains("established"))
        .unwrap();
    println!("{}", daemons[0].run_ctl(&["connection", "list", "--port", "5201"]).unwrap());
    println!("{}", daemons[0].run_ctl(&["flow", "show", "10.96.0.10"]).unwrap());
    daemons[0].kill();
    daemons[0].start().unwrap();
    let report = finished(&report);
    let received = report["end"]["sum_received"]["bits_per_second"].as_f64().unwrap();
    assert!(received > 10e6, "{received}");
    daemons.iter().for_each(assert_balanced);
}

#[test]
fn pods_leave_with_an_address_of_their_own() {
    let Some(mut bench) = bench("snat") else { return };
    let World { node, internet, mut daemon, pod, addresses } = world(&mut bench, &config());
    let lab = &mut bench.lab;
    let (other, _) = add_pod(lab, &daemon, "other");
    greet(lab, &internet, 8001);
    internet.ip("route add 203.0.113.50/32 via 192.0.2.1").unwrap();
    internet.ip("route add 2001:db8:50::1/128 via 2001:db8::1").unwrap();
    pod.await_ping("198.51.100.1").unwrap();
    pod.await_ping("2001:db8:ff::1").unwrap();
    let urls = ["http://198.51.100.1:8001/", "http://[2001:db8:ff::1]:8001/"];
    let set = |more: &[&str]| {
        let words = ["egress", "set", "shop", "--address", LEAVES_AS[0], "--address", LEAVES_AS[1]];
        daemon.run_ctl(&[&words, more].concat()).unwrap()
    };
    set(&["--from", &format!("{}/32", addresses[0]), "--from", &format!("{}/128", addresses[1])]);
    for (url, expected) in urls.iter().zip(LEAVES_AS) {
        assert_eq!(seen_as(&pod, url), expected);
    }
    assert_eq!(seen_as(&other, urls[0]), "192.0.2.1", "who has no rule is masqueraded");
    assert!(pod.pings("198.51.100.1", 20, 5) && pod.pings("2001:db8:ff::1", 20, 5));
    assert_eq!(ask(&pod, "198.51.100.1", 9), "ConnectionRefusedError");
    assert_eq!(ask(&pod, "2001:db8:ff::1", 9), "ConnectionRefusedError");
    let list = daemon.run_ctl(&["connection", "list", "--address", LEAVES_AS[0]]).unwrap();
    assert!(list.contains("as 203.0.113.50"), "{list}");
    println!("{list}{}", daemon.run_ctl(&["egress", "list"]).unwrap());
    // All pods behind one address, with the same ports.
    set(&[]);
    let from_port = "import socket, sys
s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.settimeout(3)
s.bind(('', 40000)); s.connect(('198.51.100.1', 8001))
s.send(b'GET / HTTP/1.0\\r\\n\\r\\n'); data = b''
while True:
    more = s.recv(1000)
    if not more: break
    data += more
print(data.decode().split()[-1])";
    for from in [&pod, &other] {
        let printed = from.run(5, &["/usr/bin/python3", "-c", from_port]).unwrap();
        assert!(printed.trim().ends_with(LEAVES_AS[0]), "{printed}");
    }
    // Within the cluster nothing changes; nobody reaches the address unasked.
    assert!(pod.pings("10.244.1.1", 5, 3));
    assert!(!internet.pings(LEAVES_AS[0], 2, 2));
    assert!(node.run(5, &["ip", "route"]).unwrap().contains("203.0.113.50"));
    // What has begun goes on; what begins leaves as before.
    lab.spawn(&internet, &["iperf3", "-s"]).unwrap();
    assert!(is_listening(&internet, 5201));
    let report = lab.directory().join("report.json");
    let command = format!("iperf3 -J -t 4 -b 5M -c 198.51.100.1 > {}", report.display());
    lab.spawn(&pod, &["sh", "-c", &command]).unwrap();
    let list = || daemon.run_ctl(&["connection", "list", "--port", "5201", "--state", "established"]).unwrap();
    lab::wait_for(5, || list().contains("as 203.0.113.50")).unwrap();
    daemon.run_ctl(&["egress", "del", "shop"]).unwrap();
    assert_eq!(seen_as(&pod, urls[0]), "192.0.2.1");
    assert!(finished(&report)["end"]["sum_received"]["bits_per_second"].as_f64().unwrap() > 2e6);
    assert_balanced(&daemon);
    assert!(daemon.stop());
}
