//! The CNI plugin as the specification words it (containernetworking/cni, SPEC.md).

use serde_json::{Value, json};
use xtask::lab::{CniOutput, Daemon, Namespace};

use crate::{ALONE, bench, conflist, node_with_pods};

/// One attachment, to call commands for.
struct Caller<'a> {
    daemon: &'a Daemon,
    container: &'a str,
    netns: String,
    netconf: Value,
}

impl<'a> Caller<'a> {
    fn new(daemon: &'a Daemon, pod: &'a Namespace) -> Caller<'a> {
        Caller { daemon, container: &pod.name, netns: pod.path(), netconf: daemon.netconf(&conflist()) }
    }

    fn with(mut self, key: &str, value: Value) -> Caller<'a> {
        self.netconf[key] = value;
        self
    }

    fn call(&self, command: &str) -> CniOutput {
        let environment = [
            ("CNI_CONTAINERID", self.container),
            ("CNI_NETNS", self.netns.as_str()),
            ("CNI_IFNAME", "eth0"),
            ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0"),
        ];
        self.daemon.cni(command, &environment, &self.netconf).unwrap()
    }

    fn ok(&self, command: &str) -> Value {
        let output = self.call(command);
        assert!(output.is_ok, "{command}: {}", output.json);
        output.json
    }

    /// Calls a command that must fail with this code; its sentence.
    fn fails(&self, command: &str, code: u32) -> String {
        let output = self.call(command);
        assert!(!output.is_ok, "{command} succeeded: {}", output.json);
        assert_eq!(output.json["code"], code, "{}", output.json);
        let message = output.json["msg"].as_str().unwrap().to_owned();
        assert!(!message.contains('\n'));
        message
    }
}

fn ports(daemon: &Daemon) -> Vec<Value> {
    daemon.ctl(&["port", "list"]).unwrap()["ports"].as_array().unwrap().clone()
}

/// The switch's links on the node.
fn links(daemon: &Daemon) -> usize {
    daemon.node.run(5, &["ip", "-o", "link"]).unwrap().matches(": vsw").count()
}

#[test]
fn add_gives_a_full_result_in_the_version_asked_for() {
    let Some(mut bench) = bench("add") else { return };
    let (daemon, _) = node_with_pods(&mut bench, ALONE, 0);
    for version in ["0.4.0", "1.0.0", "1.1.0"] {
        let pod = bench.lab.namespace(&format!("v{}", version.replace('.', ""))).unwrap();
        let dns = json!({"nameservers": ["10.96.0.10"], "search": ["svc.cluster.local"]});
        let caller = Caller::new(&daemon, &pod).with("cniVersion", json!(version)).with("dns", dns.clone());
        let result = caller.ok("ADD");
        assert_eq!(result["cniVersion"], version);
        assert_eq!(result["dns"], dns);
        let interfaces = result["interfaces"].as_array().unwrap();
        assert_eq!((&interfaces[1]["name"], &interfaces[1]["sandbox"]), (&json!("eth0"), &json!(pod.path())));
        assert!(interfaces[0]["name"].as_str().unwrap().starts_with("vsw") && interfaces[0]["mac"].is_string());
        assert_eq!(interfaces[1]["mtu"].is_number(), version == "1.1.0");
        let ips = result["ips"].as_array().unwrap();
        assert_eq!(ips.len(), 2);
        assert_eq!(ips[0]["gateway"], "169.254.1.1");
        assert_eq!(ips[0]["interface"], 1);
        assert_eq!(ips[0]["version"].is_string(), version == "0.4.0");
        let routes = result["routes"].as_array().unwrap();
        assert!(routes.iter().any(|route| route["dst"] == "0.0.0.0/0" && route["gw"] == "169.254.1.1"));
        assert!(routes.iter().any(|route| route["dst"] == "::/0" && route["gw"] == "fe80::1"));
        let address = ips[0]["address"].as_str().unwrap();
        assert!(pod.run(5, &["ip", "addr", "show", "eth0"]).unwrap().contains(address));
        let port = &ports(&daemon).pop().unwrap();
        assert_eq!(port["labels"], json!({"K8S_POD_NAMESPACE": "shop", "K8S_POD_NAME": "cart-0"}));
        assert_eq!(port["attachment"]["container_id"], pod.name);
    }
}

#[test]
fn version_status_and_unknown_versions() {
    let Some(mut bench) = bench("ver") else { return };
    let (mut daemon, pods) = node_with_pods(&mut bench, &ALONE.replace("10.244.1.0/24", "10.244.1.0/31"), 1);
    let pod = &pods[0].0;
    let version = Caller::new(&daemon, pod).ok("VERSION");
    assert_eq!(version, json!({"cniVersion": "1.0.0", "supportedVersions": ["0.4.0", "1.0.0", "1.1.0"]}));
    let old = Caller::new(&daemon, pod).with("cniVersion", json!("0.2.0")).fails("ADD", 1);
    assert!(old.contains("0.4.0, 1.0.0, 1.1.0"), "{old}");
    assert!(Caller::new(&daemon, pod).fails("STATUS", 1).contains("STATUS came with CNI 1.1.0"));
    let status = |daemon: &Daemon, pod| Caller::new(daemon, pod).with("cniVersion", json!("1.1.0")).call("STATUS");
    assert!(status(&daemon, pod).is_ok);
    let second = bench.lab.namespace("second").unwrap();
    daemon.add_pod(&second, &conflist()).unwrap();
    let full = status(&daemon, pod);
    assert_eq!(full.json["code"], 51, "no address left: {}", full.json);
    daemon.stop();
    let down = status(&daemon, pod);
    assert_eq!(down.json["code"], 50);
    assert!(down.json["msg"].as_str().unwrap().contains("is the daemon running?"));
    assert!(Caller::new(&daemon, pod).fails("FLY", 4).contains("is unknown"));
}

#[test]
fn a_second_add_is_refused_and_harms_nothing() {
    let Some(mut bench) = bench("twice") else { return };
    let (daemon, pods) = node_with_pods(&mut bench, ALONE, 2);
    let before = ports(&daemon);
    let message = Caller::new(&daemon, &pods[0].0).fails("ADD", 101);
    assert!(message.contains("has an interface \"eth0\" already"), "{message}");
    assert_eq!(ports(&daemon), before);
    assert!(pods[0].0.pings(&pods[1].1[0], 3, 3));
}

#[test]
fn del_is_content_with_everything() {
    let Some(mut bench) = bench("del") else { return };
    let (mut daemon, pods) = node_with_pods(&mut bench, ALONE, 3);
    let first = Caller::new(&daemon, &pods[0].0);
    assert_eq!(first.ok("DEL"), Value::Null);
    assert!(!pods[0].0.run(5, &["ip", "-o", "link"]).unwrap().contains("eth0"));
    // Runtimes call it again, with an empty namespace.
    let mut again = Caller::new(&daemon, &pods[0].0);
    again.netns = String::new();
    again.ok("DEL");
    assert_eq!((ports(&daemon).len(), links(&daemon)), (2, 2));
    // The namespace is gone before DEL comes.
    bench.lab.delete(&pods[1].0).unwrap();
    Caller::new(&daemon, &pods[1].0).ok("DEL");
    assert_eq!((ports(&daemon).len(), links(&daemon)), (1, 1));
    // The daemon is down; when it comes back, it forgets the port.
    daemon.stop();
    Caller::new(&daemon, &pods[2].0).ok("DEL");
    assert_eq!(links(&daemon), 0);
    daemon.start().unwrap();
    assert_eq!(ports(&daemon).len(), 0);
    assert_eq!(daemon.ctl(&["status"]).unwrap()["ipam"][0]["used"], 0);
}

#[test]
fn a_failed_add_leaves_nothing() {
    let Some(mut bench) = bench("fail") else { return };
    let (mut daemon, pods) = node_with_pods(&mut bench, &ALONE.replace("10.244.1.0/24", "10.244.1.0/32"), 1);
    let pod = bench.lab.namespace("late").unwrap();
    let clean = |daemon: &Daemon| {
        assert_eq!((ports(daemon).len(), links(daemon)), (1, 1));
        assert!(!pod.run(5, &["ip", "-o", "link"]).unwrap().contains("eth0"));
    };
    assert!(Caller::new(&daemon, &pod).fails("ADD", 100).contains("no free address"));
    clean(&daemon);
    let taken = json!([pods[0].1[0]]);
    assert!(Caller::new(&daemon, &pod).with("ips", taken).fails("ADD", 100).contains("belongs to the port of link"));
    clean(&daemon);
    assert!(Caller::new(&daemon, &pod).with("network", json!("nope")).fails("ADD", 7).contains("no network \"nope\""));
    clean(&daemon);
    assert!(
        Caller::new(&daemon, &pod).with("mtu", json!(70_000)).fails("ADD", 7).contains("allowed are 1280 to 65000")
    );
    clean(&daemon);
    let mut missing = Caller::new(&daemon, &pod);
    missing.netns = "/run/netns/vswt-nowhere".to_owned();
    assert!(missing.fails("ADD", 3).contains("cannot enter the network namespace"));
    clean(&daemon);
    let mut unset = Caller::new(&daemon, &pod);
    unset.netns = String::new();
    assert!(unset.fails("ADD", 4).contains("CNI_NETNS is not set"));
    let mut own = Caller::new(&daemon, &pod);
    own.netns = daemon.node.path();
    assert!(own.fails("ADD", 4).contains("host's own network namespace"));
    clean(&daemon);
    daemon.stop();
    assert!(Caller::new(&daemon, &pod).fails("ADD", 11).contains("is the daemon running?"));
    daemon.start().unwrap();
    clean(&daemon);
}

#[test]
fn the_configuration_decides_addresses_mac_and_mtu() {
    let Some(mut bench) = bench("wish") else { return };
    let config = format!(
        "{ALONE}\n[[network]]\nname = \"blue\"\nvni = 2\nmode = \"bridged\"\nsubnets = [\"10.50.0.0/16\"]\ngateway_v4 = \"10.50.0.1\"\n"
    );
    let (daemon, _) = node_with_pods(&mut bench, &config, 0);
    let pod = bench.lab.namespace("pod").unwrap();
    let caller = Caller::new(&daemon, &pod)
        .with("network", json!("blue"))
        .with("mac", json!("02:11:22:33:44:55"))
        .with("ips", json!(["10.50.1.9/16"]))
        .with("mtu", json!(1400));
    let result = caller.ok("ADD");
    assert_eq!(result["ips"][0], json!({"address": "10.50.1.9/16", "gateway": "10.50.0.1", "interface": 1}));
    let link = pod.run(5, &["ip", "addr", "show", "eth0"]).unwrap();
    assert!(link.contains("02:11:22:33:44:55") && link.contains("mtu 1400") && link.contains("10.50.1.9/16"), "{link}");
    let routes = pod.run(5, &["ip", "route"]).unwrap();
    assert!(routes.contains("default via 10.50.0.1"), "{routes}");
    // What a runtime asks for by capability wins.
    let second = bench.lab.namespace("second").unwrap();
    let wishes = json!({"mac": "02:11:22:33:44:66", "ips": ["10.50.1.10"]});
    let caller = Caller::new(&daemon, &second)
        .with("network", json!("blue"))
        .with("ips", json!(["10.50.1.11"]))
        .with("runtimeConfig", wishes);
    let result = caller.ok("ADD");
    assert_eq!(result["ips"][0]["address"], "10.50.1.10/16");
    assert_eq!(result["interfaces"][1]["mac"], "02:11:22:33:44:66");
}

#[test]
fn wrong_configurations_are_refused_in_one_sentence() {
    let Some(mut bench) = bench("nc") else { return };
    let (daemon, _) = node_with_pods(&mut bench, ALONE, 0);
    let pod = bench.lab.namespace("pod").unwrap();
    for (key, value, code, words) in [
        ("brigde", json!("cni0"), 7, "unknown key \"brigde\" in the network configuration; allowed are cniVersion"),
        ("ips", json!(["10.0.0"]), 7, "ips: \"10.0.0\" is no address"),
        ("mac", json!("02:00"), 7, "\"02:00\" is no MAC address"),
        ("mac", json!("03:00:00:00:00:01"), 7, "mac: 03:00:00:00:00:01 is no station's address"),
        ("mtu", json!("big"), 7, "invalid type: string \"big\", expected u32"),
        ("ipam", json!({"type": "no-such-plugin"}), 7, "no plugin \"no-such-plugin\" in CNI_PATH"),
        ("ipam", json!({"type": "../evil"}), 7, "is no plugin's name"),
    ] {
        let message = Caller::new(&daemon, &pod).with(key, value).fails("ADD", code);
        assert!(message.contains(words), "{message}");
    }
    let mut named = Caller::new(&daemon, &pod);
    named.container = "../etc";
    assert!(named.fails("ADD", 4).contains("CNI_CONTAINERID"));
    // Keys with a slash are a runtime's own.
    Caller::new(&daemon, &pod).with("example.org/note", json!(1)).ok("ADD");
    assert_eq!(ports(&daemon).len(), 1);
}

#[test]
fn check_tells_what_drifted() {
    let Some(mut bench) = bench("check") else { return };
    let (daemon, _) = node_with_pods(&mut bench, ALONE, 0);
    let pod = bench.lab.namespace("pod").unwrap();
    let result = Caller::new(&daemon, &pod).ok("ADD");
    assert!(Caller::new(&daemon, &pod).fails("CHECK", 7).contains("CHECK needs prevResult"));
    let check = || Caller::new(&daemon, &pod).with("prevResult", result.clone());
    check().ok("CHECK");
    pod.ip("route del default").unwrap();
    assert!(check().fails("CHECK", 102).contains("eth0 has lost its route to 0.0.0.0/0"));
    let address = result["ips"][0]["address"].as_str().unwrap();
    pod.ip(&format!("addr del {address} dev eth0")).unwrap();
    assert!(check().fails("CHECK", 102).contains("has lost its address"));
    pod.ip("link set eth0 down").unwrap();
    assert!(check().fails("CHECK", 102).contains("eth0 is down"));
    pod.ip("link del eth0").unwrap();
    // The switch notices by itself; until then the interface is missing, afterwards the port.
    let message = check().fails("CHECK", 102);
    assert!(message.contains("no interface eth0") || message.contains("no port of link"), "{message}");
}

#[test]
fn gc_keeps_what_is_valid() {
    let Some(mut bench) = bench("gc") else { return };
    let (daemon, pods) = node_with_pods(&mut bench, ALONE, 3);
    let gc = |valid: Value| {
        Caller::new(&daemon, &pods[0].0).with("cniVersion", json!("1.1.0")).with("cni.dev/valid-attachments", valid)
    };
    assert!(
        Caller::new(&daemon, &pods[0].0)
            .with("cniVersion", json!("1.1.0"))
            .fails("GC", 7)
            .contains("cni.dev/valid-attachments")
    );
    gc(json!([{"containerID": pods[1].0.name, "ifname": "eth0"}, {"containerID": "gone", "ifname": "eth0"}])).ok("GC");
    assert_eq!((ports(&daemon).len(), links(&daemon)), (1, 1));
    assert_eq!(ports(&daemon)[0]["attachment"]["container_id"], pods[1].0.name);
    // Another CNI network's ports are not ours to judge.
    gc(json!([])).with("name", json!("another")).ok("GC");
    assert_eq!(ports(&daemon).len(), 1);
    gc(json!([])).ok("GC");
    assert_eq!((ports(&daemon).len(), links(&daemon)), (0, 0));
}

#[test]
fn addresses_may_come_from_host_local() {
    let Some(mut bench) = bench("ipam") else { return };
    let (daemon, _) = node_with_pods(&mut bench, ALONE, 0);
    let leases = bench.lab.directory().join("leases");
    let ipam = json!({"type": "host-local", "dataDir": leases, "ranges": [[{"subnet": "10.60.0.0/30"}]],
        "routes": [{"dst": "0.0.0.0/0"}]});
    let pods: Vec<Namespace> = ["a", "b"].map(|name| bench.lab.namespace(name).unwrap()).into();
    let caller = |pod| Caller::new(&daemon, pod).with("ipam", ipam.clone());
    let held = || {
        std::fs::read_dir(leases.join("vswitch"))
            .unwrap()
            .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with("10."))
            .count()
    };
    let result = caller(&pods[0]).ok("ADD");
    assert_eq!(result["ips"][0]["address"], "10.60.0.2/32");
    assert_eq!(held(), 1);
    // A second ADD must not give the first one's lease back.
    caller(&pods[0]).fails("ADD", 101);
    assert_eq!(held(), 1);
    // One usable address beside the gateway: the plugin's own error passes through, and nothing is left.
    let output = caller(&pods[1]).call("ADD");
    assert!(
        !output.is_ok && output.json["msg"].as_str().unwrap().contains("no IP addresses available"),
        "{}",
        output.json
    );
    assert_eq!((held(), links(&daemon)), (1, 1));
    // The daemon refuses after the plugin gave an address: the lease goes back.
    caller(&pods[0]).ok("DEL");
    assert_eq!(held(), 0);
    assert!(caller(&pods[1]).with("network", json!("nope")).fails("ADD", 7).contains("nope"));
    assert_eq!((held(), links(&daemon)), (0, 0));
}

#[test]
fn a_previous_result_is_kept() {
    let Some(mut bench) = bench("prev") else { return };
    let (daemon, _) = node_with_pods(&mut bench, ALONE, 0);
    let pod = bench.lab.namespace("pod").unwrap();
    let previous = json!({"cniVersion": "1.0.0", "interfaces": [{"name": "lo", "sandbox": pod.path()}],
        "ips": [{"address": "127.0.0.1/8", "interface": 0}], "routes": [], "dns": {}});
    let result = Caller::new(&daemon, &pod).with("prevResult", previous).ok("ADD");
    assert_eq!(result["interfaces"].as_array().unwrap().len(), 3);
    assert_eq!(result["ips"][0]["address"], "127.0.0.1/8");
    assert_eq!(result["ips"][1]["interface"], 2);
}
