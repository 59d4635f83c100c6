//! The floors: a crate depends on floors below it only, and nobody loosens that unnoticed.

use std::collections::BTreeMap;
use std::fs;

/// Crate, folder, floor. Neighbours on one floor do not depend on each other.
const FLOORS: &[(&str, &str, u8)] = &[
    ("vswitch-net", "vswitch/net", 0),
    ("vswitch-api", "vswitch/api", 0),
    ("vswitch-xsk", "vswitch/xsk", 1),
    ("vswitch-link", "vswitch/link", 1),
    ("vswitch-policy", "vswitch/policy", 1),
    ("vswitch-dataplane", "vswitch/dataplane", 2),
    ("vswitch-control", "vswitch/control", 3),
    ("vswitch", "vswitch", 4),
    ("vswitch-cni", "cni", 4),
    ("switchctl", "tools/switchctl", 4),
    ("pktgen", "tools/pktgen", 4),
    ("xtask", "tools/xtask", 4),
];

/// The one dependency inside a floor.
const EXCEPTION: (&str, &str) = ("vswitch-api", "vswitch-net");

fn manifest(folder: &str) -> toml::Table {
    let path = xtask::lab::workspace().join(folder).join("Cargo.toml");
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).parse().expect("a manifest")
}

#[test]
fn crates_depend_downward_only() {
    let floors: BTreeMap<&str, u8> = FLOORS.iter().map(|&(name, _, floor)| (name, floor)).collect();
    let mut seen = 0;
    for &(name, folder, floor) in FLOORS {
        let manifest = manifest(folder);
        assert_eq!(manifest["package"]["name"].as_str(), Some(name));
        for dependency in manifest["dependencies"].as_table().expect("dependencies").keys() {
            let Some(&below) = floors.get(dependency.as_str()) else { continue };
            seen += 1;
            let is_allowed = below < floor || (name, dependency.as_str()) == EXCEPTION;
            assert!(is_allowed, "{name} (floor {floor}) depends on {dependency} (floor {below})");
        }
    }
    assert!(seen > 15, "only {seen} dependencies seen");
}

#[test]
fn every_crate_has_a_floor_and_the_lints() {
    let workspace = manifest(".");
    let members = workspace["workspace"]["members"].as_array().expect("members");
    for member in members.iter().filter_map(|member| member.as_str()) {
        let is_known = FLOORS.iter().any(|&(_, folder, _)| folder == member) || ["benches", "tests"].contains(&member);
        assert!(is_known, "{member} has no floor");
        assert_eq!(manifest(member)["lints"]["workspace"].as_bool(), Some(true), "{member} does without the lints");
    }
}

#[test]
fn unsafe_code_is_where_it_may_be() {
    for &(name, folder, _) in FLOORS {
        let root = ["lib.rs", "main.rs"].map(|file| xtask::lab::workspace().join(folder).join("src").join(file));
        let may = ["vswitch-xsk", "pktgen"].contains(&name);
        for root in root.iter().filter(|root| root.exists()) {
            let source = fs::read_to_string(root).expect("a source file");
            assert!(
                may || source.contains("#![forbid(unsafe_code)]"),
                "{} does not forbid unsafe code",
                root.display()
            );
        }
    }
}
