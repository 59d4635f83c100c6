//! Real containers, started by podman on our conflist: two on one node, one on another.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use xtask::lab::{self, Daemon, Lab, Namespace};

use crate::{assert_balanced, bench};

/// A podman of its own on a node: configuration, storage and state in the laboratory's directory.
struct Podman {
    node: Namespace,
    directory: PathBuf,
}

impl Podman {
    fn new(lab: &Lab, daemon: &Daemon, name: &str) -> anyhow::Result<Podman> {
        let podman = Podman { node: daemon.node.clone(), directory: lab.directory().join(format!("podman-{name}")) };
        let at = |file: &str| podman.directory.join(file);
        for directory in ["net.d", "tmp"] {
            fs::create_dir_all(at(directory))?;
        }
        // The shipped conflist, with this daemon's socket.
        let mut conflist = crate::conflist();
        conflist["plugins"][0]["socket"] = serde_json::json!(daemon.socket);
        fs::write(at("net.d/10-vswitch.conflist"), conflist.to_string())?;
        fs::write(
            at("containers.conf"),
            format!(
                "[network]\nnetwork_backend = \"cni\"\ncni_plugin_dirs = [\"{}\", \"/usr/lib/cni\"]\nnetwork_config_dir = \"{}\"\n\
                 default_network = \"vswitch\"\n[engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\nruntime = \"runc\"\n\
                 [containers]\nlog_driver = \"k8s-file\"\ndefault_ulimits = [\"nofile=16384:16384\", \"nproc=16384:16384\"]\n",
                lab::binaries().display(),
                at("net.d").display()
            ),
        )?;
        fs::write(
            at("storage.conf"),
            format!(
                "[storage]\ndriver = \"overlay\"\ngraphroot = \"{}\"\nrunroot = \"{}\"\n",
                at("root").display(),
                at("runroot").display()
            ),
        )?;
        fs::write(at("policy.json"), r#"{"default":[{"type":"insecureAcceptAnything"}]}"#)?;
        Ok(podman)
    }

    fn run(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let at = |file: &str| self.directory.join(file).display().to_string();
        let (conf, storage, tmp) = (
            format!("CONTAINERS_CONF={}", at("containers.conf")),
            format!("CONTAINERS_STORAGE_CONF={}", at("storage.conf")),
            at("tmp"),
        );
        let command = ["env", &conf, &storage, "podman", "--tmpdir", &tmp];
        self.node.run(60, &[&command[..], arguments].concat())
    }

    fn load(&self, image: &Path) -> anyhow::Result<()> {
        let policy = self.directory.join("policy.json").display().to_string();
        let image = image.display().to_string();
        let with_policy = self.run(&["load", "--signature-policy", &policy, "-q", "-i", &image]);
        with_policy.or_else(|_| self.run(&["load", "-q", "-i", &image])).map(drop)
    }

    /// Starts a container with an HTTP server; its IPv4 address.
    fn start(&self, name: &str) -> anyhow::Result<String> {
        let command = r#"["/bin/sh","-c","httpd -p 80 -h /www; exec sleep 3600"]"#;
        self.run(&[
            "run",
            "-d",
            "--name",
            name,
            "--network",
            "vswitch",
            "--entrypoint",
            command,
            "localhost/busybox:1",
        ])?;
        let format = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
        let address = self.run(&["inspect", name, "--format", format])?.trim().to_owned();
        if address.is_empty() {
            bail!("{name} has no address");
        }
        Ok(address)
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        let _ = self.run(&["rm", "-f", "-a", "-t", "0"]);
        let _ = std::process::Command::new("umount").arg("-R").arg(self.directory.join("root/overlay")).output();
    }
}

/// An image of nothing but busybox, in the form that `docker save` writes.
fn make_image(directory: &Path) -> anyhow::Result<PathBuf> {
    let (script, image) = (directory.join("image.py"), directory.join("image.tar"));
    fs::write(&script, include_str!("image.py"))?;
    let output =
        std::process::Command::new("python3").arg(&script).arg(&image).output().context("cannot run python3")?;
    if !output.status.success() {
        bail!("no image: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(image)
}

fn config(own: u8, other: u8) -> String {
    format!(
        r#"
[worker]
umem_frames = 8192
[uplink]
link = "wire"
[[network]]
name = "pods"
vni = 5
ranges = ["10.77.{own}.0/24"]
[[peer]]
name = "other"
vtep = "192.0.2.{other}"
[[route]]
network = "pods"
prefix = "10.77.{other}.0/24"
peer = "other"
"#
    )
}

#[test]
fn containers_reach_each_other_on_one_node_and_across_two() {
    let Some(mut bench) = bench("pm") else { return };
    let lab = &mut bench.lab;
    let nodes = [lab.namespace("one").unwrap(), lab.namespace("two").unwrap()];
    lab.wire([(&nodes[0], "wire", &["192.0.2.1/24"]), (&nodes[1], "wire", &["192.0.2.2/24"])], 1500).unwrap();
    let daemons =
        [lab.daemon(&nodes[0], "one", &config(1, 2)).unwrap(), lab.daemon(&nodes[1], "two", &config(2, 1)).unwrap()];
    let image = make_image(lab.directory()).unwrap();
    let podmans: Vec<Podman> =
        daemons.iter().zip(["one", "two"]).map(|(daemon, name)| Podman::new(lab, daemon, name).unwrap()).collect();
    for podman in &podmans {
        podman.load(&image).unwrap();
    }
    let here = podmans[0].start("c1").unwrap();
    let neighbor = podmans[0].start("c2").unwrap();
    let far = podmans[1].start("c3").unwrap();
    for (podman, name, to) in [
        (&podmans[0], "c1", &neighbor),
        (&podmans[0], "c2", &here),
        (&podmans[0], "c1", &far),
        (&podmans[1], "c3", &here),
    ] {
        let ping = lab::wait_for(10, || {
            podman
                .run(&["exec", name, "ping", "-c", "3", "-W", "2", to])
                .is_ok_and(|text| text.contains(" 0% packet loss"))
        });
        assert!(ping.is_ok(), "{name} to {to}");
        let page = podman.run(&["exec", name, "wget", "-q", "-O", "-", &format!("http://{to}/")]).unwrap();
        assert_eq!(page, "hello\n", "{name} from {to}");
    }
    let ports = daemons[0].ctl(&["port", "list"]).unwrap();
    assert_eq!(ports["ports"].as_array().unwrap().len(), 2);
    assert_eq!(ports["ports"][0]["owner"], "vswitch");
    for podman in &podmans {
        podman.run(&["rm", "-f", "-a", "-t", "0"]).unwrap();
    }
    for daemon in &daemons {
        assert_eq!(daemon.ctl(&["port", "list"]).unwrap()["ports"], serde_json::json!([]), "podman called DEL");
        let links = daemon.node.run(5, &["ip", "-o", "link"]).unwrap();
        assert!(!links.contains(": vsw"), "{links}");
        assert_balanced(daemon);
    }
}
