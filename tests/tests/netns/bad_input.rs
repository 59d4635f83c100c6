//! Garbage on the control socket and in configurations: one sentence, and nothing changes.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use vswitch_api::MAX_LINE_BYTES;

use serde_json::Value;
use xtask::lab;

use crate::{ALONE, bench, node_with_pods};

/// Sends bytes, closes the sending half if asked, and reads until the daemon closes.
fn talk(daemon: &lab::Daemon, bytes: &[u8], finish: bool) -> String {
    let mut stream = UnixStream::connect(&daemon.socket).unwrap();
    stream.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
    // The daemon may close before all of it is taken.
    let _ = stream.write_all(bytes);
    if finish {
        let _ = stream.shutdown(std::net::Shutdown::Write);
    }
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn the_control_socket_survives_everything() {
    let Some(mut bench) = bench("sock") else { return };
    let (daemon, _) = node_with_pods(&mut bench, ALONE, 1);
    let before = daemon.ctl(&["port", "list"]).unwrap();
    let long = vec![b'x'; MAX_LINE_BYTES + 100];
    let too_long = format!("the line is longer than {MAX_LINE_BYTES} bytes");
    let cases: [(&[u8], bool, &str); 7] = [
        (b"garbage\n", false, "this is no request"),
        (b"\xff\xfe\x00\n", false, "this is no request"),
        (b"{\"version\":1,\"request\":{\"op\":\"sta", true, "the line has no end"),
        (b"{\"version\":9,\"request\":{\"op\":\"status\"}}\n", false, "protocol version 9 is not spoken here"),
        (b"{\"version\":1,\"request\":{\"op\":\"reboot\"}}\n", false, "unknown variant `reboot`"),
        (b"{\"version\":1,\"request\":{\"op\":\"network_del\",\"nmae\":\"x\"}}\n", false, "unknown field `nmae`"),
        (&long, true, &too_long),
    ];
    for (bytes, finish, words) in cases {
        let answer = talk(&daemon, bytes, finish);
        let parsed: Value = serde_json::from_str(&answer).unwrap_or_else(|_| panic!("{words}: {answer:?}"));
        assert_eq!(parsed["error"]["code"], "bad_request");
        assert!(parsed["error"]["message"].as_str().unwrap().contains(words), "{answer}");
    }
    assert_eq!(daemon.ctl(&["port", "list"]).unwrap(), before);
    assert!(daemon.memory() < 1 << 30);
    // Two requests on one connection, the first refused for what it asks: the connection goes on.
    let answer = talk(&daemon, b"{\"version\":1,\"request\":{\"op\":\"network_del\",\"name\":\"x\"}}\n{\"version\":1,\"request\":{\"op\":\"network_list\"}}\n", true);
    let lines: Vec<Value> = answer.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(
        (lines.len(), &lines[0]["error"]["code"], &lines[1]["ok"]["kind"]),
        (2, &"not_found".into(), &"networks".into())
    );
}

#[test]
fn wrong_configurations_are_refused_in_one_sentence() {
    let Some(mut bench) = bench("conf") else { return };
    let node = bench.lab.namespace("node").unwrap();
    let cases = [
        ("[worker]\ncuont = 1", "unknown field `cuont`, expected one of `count`"),
        ("[uplink]\nlink = \"nope\"", "uplink.link: no link \"nope\" here"),
        (
            "[[network]]\nname = \"a\"\nvni = 1\nranges = [\"10.0.0.0/8\", \"10.1.0.0/16\"]",
            "ranges: 10.1.0.0/16 and 10.0.0.0/8 overlap",
        ),
        ("[[network]]\nname = \"a\"\nvni = 1\n[[network]]\nname = \"b\"\nvni = 1", "vni 1 belongs to network \"a\""),
        ("[[network]]\nname = \"a\"\nvni = 1\nranges = [\"10.0.0.0/33\"]", "line 6"),
        ("[[route]]\nnetwork = \"a\"\nprefix = \"10.0.0.0/8\"\npeer = \"x\"", "no network \"a\""),
        ("[worker]\ncores = [4096]", "core 4096 is not allowed here"),
    ];
    for (config, words) in cases {
        let error = bench.lab.daemon(&node, "node", config).expect_err(config).to_string();
        assert!(error.contains(words), "{config}: {error}");
        // What needs no look at the kernel is found without starting.
        let file = bench.lab.directory().join("node.toml");
        let check =
            Command::new(lab::binaries().join("vswitchd")).arg("--check").arg("--config").arg(file).output().unwrap();
        let found = String::from_utf8_lossy(&check.stderr).into_owned();
        let needs_the_kernel = config.contains("nope");
        assert_eq!(check.status.code(), Some(if needs_the_kernel { 0 } else { 1 }), "{config}: {found}");
        assert!(needs_the_kernel || found.contains(words), "{config}: {found}");
        let told = error.strip_prefix("vswitchd does not run: ").unwrap();
        assert_eq!(told.lines().filter(|line| line.starts_with("vswitchd:")).count(), 1, "{told}");
    }
}

#[test]
fn without_privilege_it_says_so() {
    let Some(bench) = bench("priv") else { return };
    let directory = bench.lab.directory().join("open");
    std::fs::create_dir_all(&directory).unwrap();
    let config = bench.lab.directory().join("p.toml");
    std::fs::write(&config, format!("[daemon]\nruntime_dir = \"{}\"\n{ALONE}", directory.display())).unwrap();
    // As nobody, who may not even write the runtime directory.
    let switchctl = lab::binaries().join("switchctl");
    let output = Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .arg(lab::binaries().join("vswitchd"))
        .arg("--config")
        .arg(&config)
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("run as root"), "{error}");
    let output = Command::new(switchctl).args(["--socket", "/nonexistent", "status"]).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2));
    assert!(error.contains("is the daemon running?"), "{error}");
}
