//! Which cores the workers run on: those of the NUMA node that the NIC hangs on, where there are such.
//!
//! A worker makes its packet memory and its tables itself once it is pinned, so that they lie on its own node (the kernel gives memory
//! from the node of who first writes to it, `admin-guide/mm/numa_memory_policy.rst`).

use std::fs;
use std::path::Path;

/// Where the kernel tells of links and nodes.
pub(crate) const SYSFS: &str = "/sys";

/// The cores that this process may use.
pub(crate) fn allowed() -> Vec<usize> {
    core_affinity::get_core_ids().unwrap_or_default().iter().map(|core| core.id).collect()
}

/// The cores on the NUMA node of a link's device; none if it has no device, or one that says no node.
pub(crate) fn near(sysfs: &Path, link: &str) -> Vec<usize> {
    let read = |path: &str| fs::read_to_string(sysfs.join(path)).unwrap_or_default();
    // -1 says that it is the same from everywhere.
    let Ok(node) = read(&format!("class/net/{link}/device/numa_node")).trim().parse::<u32>() else { return Vec::new() };
    parse_list(&read(&format!("devices/system/node/node{node}/cpulist")))
}

/// The cores to pin `count` workers to: those named, else the last ones allowed, near ones first; the first core is the busiest with
/// interrupts.
///
/// # Errors
///
/// A sentence, if a core that is named may not be used.
pub(crate) fn choose(
    named: &[usize],
    count: usize,
    allowed: &[usize],
    near: &[usize],
) -> Result<Vec<Option<usize>>, String> {
    if let Some(wrong) = named.iter().find(|core| !allowed.contains(core)) {
        return Err(format!("worker.cores: core {wrong} is not allowed here; allowed are {allowed:?}"));
    }
    if !named.is_empty() {
        return Ok(named.iter().copied().map(Some).collect());
    }
    if count > allowed.len() {
        // With fewer cores than workers nothing is pinned: the scheduler does better.
        return Ok(vec![None; count]);
    }
    let (mut cores, far): (Vec<usize>, Vec<usize>) = allowed.iter().rev().partition(|core| near.contains(core));
    cores.extend(far);
    Ok(cores.into_iter().take(count).map(Some).collect())
}

/// A list as the kernel writes it: `0-3,8`.
fn parse_list(text: &str) -> Vec<usize> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.trim().parse::<usize>().ok()?..=last.trim().parse::<usize>().ok()?)
    };
    text.trim().split(',').filter_map(range).flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_near_the_nic_come_first() {
        let allowed: Vec<usize> = (0..8).collect();
        let chosen = |named: &[usize], count, near: &[usize]| choose(named, count, &allowed, near).unwrap();
        assert_eq!(chosen(&[], 2, &[]), [Some(7), Some(6)]);
        assert_eq!(chosen(&[], 3, &[0, 1, 2, 3]), [Some(3), Some(2), Some(1)]);
        assert_eq!(chosen(&[], 5, &[2, 3]), [Some(3), Some(2), Some(7), Some(6), Some(5)]);
        assert_eq!(chosen(&[5, 1], 2, &[0, 1, 2, 3]), [Some(5), Some(1)], "who names them knows");
        assert_eq!(chosen(&[], 9, &[]), [None; 9]);
        assert!(choose(&[9], 1, &allowed, &[]).unwrap_err().contains("core 9 is not allowed"));
    }

    #[test]
    fn the_node_of_a_link_is_read_as_the_kernel_tells_it() {
        let sysfs = std::env::temp_dir().join(format!("vswitch-cores-{}", std::process::id()));
        let write = |path: &str, text: &str| {
            let file = sysfs.join(path);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        };
        write("class/net/eth0/device/numa_node", "1\n");
        write("class/net/eth1/device/numa_node", "-1\n");
        write("devices/system/node/node1/cpulist", "8-10,24\n");
        assert_eq!(near(&sysfs, "eth0"), [8, 9, 10, 24]);
        assert!(near(&sysfs, "eth1").is_empty());
        assert!(near(&sysfs, "wire").is_empty());
        fs::remove_dir_all(&sysfs).unwrap();
    }
}
