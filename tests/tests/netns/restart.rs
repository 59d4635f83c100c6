//! A restart of the daemon: ports are adopted, pods go on.

use xtask::lab;

use crate::{ALONE, assert_balanced, bench, node_with_pods};

#[test]
fn ports_are_adopted_after_stop_and_after_kill() {
    let Some(mut bench) = bench("adopt") else { return };
    let (mut daemon, pods) = node_with_pods(&mut bench, ALONE, 3);
    daemon.run_ctl(&["network", "add", "extra", "--vni", "77"]).unwrap();
    let before = (daemon.ctl(&["port", "list"]).unwrap(), daemon.ctl(&["network", "list"]).unwrap());
    for end in ["stop", "kill"] {
        if end == "stop" {
            assert!(daemon.stop());
        } else {
            daemon.kill();
        }
        assert!(!pods[0].0.pings(&pods[1].1[0], 1, 1), "nobody forwards");
        daemon.start().unwrap();
        assert_eq!(
            (daemon.ctl(&["port", "list"]).unwrap(), daemon.ctl(&["network", "list"]).unwrap()),
            before,
            "after {end}"
        );
        for (pod, _) in &pods {
            for (_, addresses) in &pods {
                assert!(pod.pings(&addresses[0], 3, 3), "{} to {} after {end}", pod.name, addresses[0]);
                assert!(pod.pings(&addresses[1], 3, 3), "{} to {} after {end}", pod.name, addresses[1]);
            }
        }
    }
    assert_balanced(&daemon);
}

#[test]
fn a_pod_that_went_while_nobody_looked_leaves_nothing() {
    let Some(mut bench) = bench("gone") else { return };
    let (mut daemon, pods) = node_with_pods(&mut bench, ALONE, 2);
    let list = |daemon: &lab::Daemon| daemon.ctl(&["port", "list"]).unwrap()["ports"].as_array().unwrap().len();
    daemon.kill();
    bench.lab.delete(&pods[0].0).unwrap();
    // The kernel takes a namespace's links away in its own time.
    let has_two = || daemon.node.run(5, &["ip", "-o", "link"]).unwrap().matches(": vsw").count() == 2;
    lab::wait_for(10, || !has_two()).unwrap();
    daemon.start().unwrap();
    assert_eq!(list(&daemon), 1);
    // And one that goes while the daemon runs.
    bench.lab.delete(&pods[1].0).unwrap();
    lab::wait_for(10, || list(&daemon) == 0).unwrap();
    let status = daemon.ctl(&["status"]).unwrap();
    assert_eq!(status["ipam"][0]["used"], 0);
    let frames = &status["workers"][0];
    assert_eq!(frames["umem_free"], frames["umem_frames"], "every frame came home");
}
