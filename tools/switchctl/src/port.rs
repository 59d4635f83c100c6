//! `port add` and `port del`: the two commands that also touch links.

use vswitch_api::{Answer, Client, PortSpec, Request};
use vswitch_link::Kernel;
use vswitch_link::plug::{Plug, host_link, plug, pod_mac};

use crate::arguments::{PortAdd, PortDel};

pub(crate) fn add(client: &mut Client, add: &PortAdd) -> anyhow::Result<Answer> {
    let (link, mac) = match (&add.netns, &add.link) {
        (Some(netns), _) => {
            // The namespace's own path stands for the container.
            let id = netns.display().to_string();
            (host_link(&id, &add.ifname), add.mac.unwrap_or_else(|| pod_mac(&id, &add.ifname)))
        }
        (None, link) => (link.clone().unwrap_or_default(), add.mac.unwrap_or_default()),
    };
    let mut port = PortSpec::new(link, mac);
    port.network.clone_from(&add.network);
    port.addresses.clone_from(&add.ips);
    port.mtu = add.mtu;
    port.labels = add.labels.iter().cloned().collect();
    if let Some(pod) = &add.pod {
        let (namespace, name) = pod.split_once('/').unwrap_or(("default", pod));
        port.labels.insert("K8S_POD_NAMESPACE".to_owned(), namespace.to_owned());
        port.labels.insert("K8S_POD_NAME".to_owned(), name.to_owned());
    }
    port.named_ports = add.named_ports.clone();
    port.default_route = !add.no_default_route;
    port.check = add.check;
    port.trunk.clone_from(&add.trunk);
    port.native = !add.no_native;
    port.isolated = add.isolated;
    port.hairpin = add.hairpin;
    port.sticky = add.sticky;
    port.mac_limit = add.mac_limit;
    port.bandwidth.ingress_rate = add.ingress_rate;
    port.bandwidth.egress_rate = add.egress_rate;
    port.port_mappings.clone_from(&add.publish);
    let Some(netns) = &add.netns else { return Ok(client.call(Request::PortAdd(port))?) };
    port.netns = Some(netns.display().to_string());
    let plugged = runtime()?.block_on(plug(client, &Plug { netns, ifname: &add.ifname, port }))?;
    Ok(Answer::Port(Box::new(plugged)))
}

pub(crate) fn del(client: &mut Client, del: &PortDel) -> anyhow::Result<Answer> {
    let answer = client.call(Request::PortDel { link: del.link.clone() })?;
    if let Answer::Ports { ports } = &answer
        && ports.is_empty()
    {
        return Err(
            crate::output::Missing(format!("no port of link {}: `switchctl port list` shows them", del.link)).into()
        );
    }
    // Names that start like this are made by `plug` only.
    if !del.keep_link && del.link.starts_with("vsw") {
        runtime()?.block_on(async { Kernel::here()?.delete_link(&del.link).await })?;
    }
    Ok(Answer::Done)
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}
