//! The uplinks and the peers' next hops, as the kernel sees them now.
//!
//! [`refresh`] reads everything anew: the uplinks, their addresses, and for each peer the routes and the neighbors. It
//! runs when the kernel tells of a change and every few seconds; resolution is the kernel's own work, asked for here
//! because the switch's packets do not pass its stack. An uplink is followed by its index once it is attached, so it may be
//! renamed; what happened to it last stands in `switchctl status`.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::IpAddr;

use tracing::{debug, info, warn};
use vswitch_control::{Backend, Control, NextHop, UPLINK_PORT, UplinkState};
use vswitch_link::{Kernel, LinkError, LinkState, Neighbor, Route};
use vswitch_net::PortId;
use vswitch_xsk::{Role, Vtep, ZeroCopy};

use crate::backend::Links;
use crate::config::Uplink;

/// Neighbors of the uplinks, by link.
type Neighbors = BTreeMap<(u32, IpAddr), Neighbor>;

/// Brings control's view of the uplinks, the peers' next hops and the pods' links up to date. The links there are.
pub(crate) async fn refresh(
    kernel: &Kernel,
    config: &Uplink,
    control: &RefCell<Control>,
    links: &RefCell<Links>,
) -> Result<Vec<LinkState>, LinkError> {
    // Ports that are added while the kernel lists its links are not in that list, and not lost.
    let judged: Vec<PortId> = control.borrow().links().map(|(id, _)| id).collect();
    let all = kernel.links().await?;
    unplug_lost(&all, &judged, &mut control.borrow_mut(), &mut links.borrow_mut());
    let exists = |name: &str| all.iter().any(|link| link.name == name);
    control.borrow_mut().adopt_waiting(exists, &mut *links.borrow_mut());
    let mut present = Vec::new();
    for (at, name) in config.all().enumerate() {
        let port = PortId(UPLINK_PORT.0 + at as u16);
        // The attached link by its index, whatever it is called now; else the one of the name.
        let attached = links.borrow().ifindex(port);
        let link =
            all.iter().find(|link| Some(link.ifindex) == attached).or(all.iter().find(|link| link.name == *name));
        match link {
            Some(link) => present.push((port, name, link.clone())),
            None => lose(port, name, &mut control.borrow_mut(), &mut links.borrow_mut()),
        }
    }
    let vtep = match present.first() {
        Some((port, _, link)) => {
            let addresses = kernel.addresses(link.ifindex).await?;
            choose_vtep(config, &addresses, control.borrow().uplink(*port))
        }
        None => return Ok(all),
    };
    let own = kernel.all_addresses().await?;
    for (port, name, link) in &present {
        let queues = kernel.queues(&link.name).await;
        let change = Change { port: *port, name, link, vtep, queues, foreign: foreign_vtep(config, &own) };
        let updated = update(&change, config, &mut control.borrow_mut(), &mut links.borrow_mut());
        if let Err(error) = updated {
            let known = control.borrow().uplink(*port).is_some();
            if known || links.borrow().ifindex(*port).is_none() {
                warn!("uplink {name}: {error}");
            }
            if links.borrow().ifindex(*port).is_none() {
                control.borrow_mut().set_uplink(*port, Err(error));
            }
        }
    }
    if config.vlan.is_some() {
        // The kernel has no device under the tag; the switch asks for its peers itself.
        return Ok(all);
    }
    let mut neighbors = Neighbors::new();
    for (.., link) in &present {
        let of_link = kernel.neighbors(link.ifindex).await?;
        neighbors.extend(of_link.into_iter().map(|(address, neighbor)| ((link.ifindex, address), neighbor)));
    }
    let vteps: Vec<IpAddr> = control.borrow().vteps().collect();
    let uplinks: Vec<&LinkState> = present.iter().map(|(.., link)| link).collect();
    for peer in vteps {
        // What the kernel refuses for one peer must not keep it from the others.
        match next_hops(kernel, &all, &uplinks, &neighbors, peer).await {
            Ok(next_hops) => control.borrow_mut().set_next_hops(peer, next_hops),
            Err(error) => {
                debug!("peer {peer}: {error}");
                control.borrow_mut().set_next_hops(peer, Vec::new());
            }
        }
    }
    Ok(all)
}

async fn next_hops(
    kernel: &Kernel,
    all: &[LinkState],
    uplinks: &[&LinkState],
    neighbors: &Neighbors,
    peer: IpAddr,
) -> Result<Vec<NextHop>, LinkError> {
    let mut next_hops = Vec::new();
    let routes = match peer {
        // Only a gateway of an imported route is link-local. Its link is the one where it answers.
        IpAddr::V6(v6) if v6.is_unicast_link_local() => {
            let is_known =
                |link: &&LinkState| neighbors.get(&(link.ifindex, peer)).is_some_and(|known| known.mac.is_some());
            let of = |link: &LinkState| Route { ifindex: link.ifindex, gateway: None, mtu: None };
            let known: Vec<Route> = uplinks.iter().copied().filter(is_known).map(of).collect();
            if known.is_empty() { uplinks.iter().copied().map(of).collect() } else { known }
        }
        _ => kernel.routes_to(peer).await?,
    };
    for route in routes {
        let address = route.gateway.unwrap_or(peer);
        let mut next_hop = NextHop {
            link: all.iter().find(|link| link.ifindex == route.ifindex).map(|link| link.name.clone()),
            address: Some(address),
            mac: None,
            mtu: route.mtu,
        };
        if let Some(uplink) = uplinks.iter().find(|uplink| uplink.ifindex == route.ifindex) {
            let neighbor = neighbors.get(&(route.ifindex, address));
            next_hop.mac = neighbor.and_then(|neighbor| neighbor.mac);
            if uplink.is_up && !neighbor.is_some_and(|neighbor| neighbor.is_fresh) {
                kernel.resolve(uplink.ifindex, address).await?;
            }
        }
        next_hops.push(next_hop);
    }
    Ok(next_hops)
}

/// The addresses of the configuration, or the link's: those in use as long as it has them, or its oldest.
fn choose_vtep(config: &Uplink, addresses: &[IpAddr], known: Option<&UplinkState>) -> Vtep {
    let v4 = |address: &IpAddr| if let IpAddr::V4(v4) = address { Some(*v4) } else { None };
    let v6 = |address: &IpAddr| if let IpAddr::V6(v6) = address { Some(*v6) } else { None };
    let present = |address: IpAddr| addresses.contains(&address);
    let (first_v4, first_v6) = if config.vtep.is_empty() {
        let kept_v4 = known.and_then(|known| known.v4).filter(|&v4| present(v4.into()));
        let kept_v6 = known.and_then(|known| known.v6).filter(|&v6| present(v6.into()));
        // The kernel lists IPv4 addresses from the oldest on, and IPv6 addresses from the newest.
        (kept_v4.or_else(|| addresses.iter().find_map(v4)), kept_v6.or_else(|| addresses.iter().rev().find_map(v6)))
    } else {
        (config.vtep.iter().find_map(v4), config.vtep.iter().find_map(v6))
    };
    Vtep { v4: first_v4, v6: first_v6, port: config.udp_port, vlan: config.vlan }
}

/// A configured VTEP that no link of this node has. With a tag of our own the kernel need not know it.
fn foreign_vtep(config: &Uplink, own: &[IpAddr]) -> Option<IpAddr> {
    config.vtep.iter().find(|vtep| config.vlan.is_none() && !own.contains(vtep)).copied()
}

/// An uplink as the kernel has it now.
struct Change<'a> {
    port: PortId,
    /// Its name in the configuration.
    name: &'a str,
    link: &'a LinkState,
    vtep: Vtep,
    /// How many receive queues it has, if the driver tells.
    queues: Option<u32>,
    foreign: Option<IpAddr>,
}

/// Attaches the uplink if it is new, and tells control what it is now and what has changed.
fn update(change: &Change<'_>, config: &Uplink, control: &mut Control, links: &mut Links) -> Result<(), String> {
    let Change { port, name, link, vtep, queues, foreign } = change;
    let known = control.uplink(*port).cloned();
    let mut notes = Vec::new();
    let is_attached = links.ifindex(*port) == Some(link.ifindex);
    let bound = known.as_ref().map(|known| known.attached.copy_modes.len() as u32);
    let has_other_queues = is_attached && queues.is_some_and(|queues| bound.is_some_and(|bound| bound != queues));
    let attached = match &known {
        Some(known) if is_attached && !has_other_queues => {
            if (known.v4, known.v6) != (vtep.v4, vtep.v6) {
                links.set_vtep(*port, *vtep)?;
                notes.push(format!("vtep changed to {}", show_vtep(*vtep)));
            }
            if known.mtu != link.mtu {
                notes.push(format!("mtu changed from {} to {}", known.mtu, link.mtu));
            }
            known.attached.clone()
        }
        _ => {
            links.detach(*port);
            let zero_copy = if is_stacked(link) { ZeroCopy::Off } else { config.zero_copy.into() };
            let attached = links.attach_link(*port, link.ifindex, Role::Uplink(*vtep), zero_copy)?;
            info!("uplink {} attached: xdp {}, {}", link.name, attached.xdp_mode, attached.copy_modes.join(" "));
            match (has_other_queues, bound) {
                (true, Some(before)) => {
                    notes.push(format!("queues changed from {before} to {}", attached.copy_modes.len()));
                }
                _ if known.is_some() => notes.push("attached again".to_owned()),
                _ => {}
            }
            attached
        }
    };
    if let Some(known) = &known
        && known.is_up != link.is_up
    {
        info!("uplink {} is {}", link.name, if link.is_up { "up" } else { "down" });
    }
    notes.iter().for_each(|note| info!("uplink {}: {note}", link.name));
    let renamed = (link.name != *name).then(|| format!("renamed from {name}: set uplink.link = \"{}\"", link.name));
    let foreign = foreign.map(|vtep| format!("vtep {vtep} is no address of this node"));
    if let Some(foreign) = foreign.as_ref().filter(|_| known.is_none()) {
        warn!(
            "uplink {}: {foreign}: packets to it will not arrive; give the node the address, or correct uplink.vtep",
            link.name
        );
    }
    let stacked =
        is_stacked(link).then(|| format!("a {} link: always copy mode", link.kind.as_deref().unwrap_or_default()));
    let refused = attached.zero_copy_refusal.as_ref().map(|error| format!("zero copy refused: {error}"));
    if let Some(renamed) = renamed.as_ref().filter(|_| known.as_ref().is_some_and(|known| known.link != link.name)) {
        warn!("uplink {}: {renamed}", link.name);
    }
    let standing: Vec<String> = renamed.into_iter().chain(foreign).chain(stacked).chain(refused).collect();
    let before = known.as_ref().and_then(|known| known.note.as_deref());
    let before = before.and_then(|note| note.split("; ").find(|part| !is_standing(part)).map(str::to_owned));
    let last = notes.pop().or(before);
    let note: Vec<String> = standing.into_iter().chain(last).collect();
    control.set_uplink(
        *port,
        Ok(UplinkState {
            link: link.name.clone(),
            mac: link.mac,
            mtu: link.mtu,
            is_up: link.is_up,
            v4: vtep.v4,
            v6: vtep.v6,
            attached,
            note: (!note.is_empty()).then(|| note.join("; ")),
        }),
    );
    Ok(())
}

/// True for a link over others, which have the rings: a socket on it cannot share them.
fn is_stacked(link: &LinkState) -> bool {
    matches!(link.kind.as_deref(), Some("bond" | "vlan" | "team" | "bridge"))
}

/// True for what is said as long as it holds, and not once.
fn is_standing(note: &str) -> bool {
    note.starts_with("renamed")
        || note.contains(": always copy mode")
        || note.contains("is no address of this node")
        || note.contains("zero copy refused")
}

fn lose(port: PortId, name: &str, control: &mut Control, links: &mut Links) {
    if control.uplink(port).is_some() {
        warn!("uplink {name} is gone: it is attached again when it is back");
        links.detach(port);
    }
    control.set_uplink(port, Err(format!("gone: see `ip link show {name}`")));
}

/// A pod's end takes its veth along when its namespace goes; the port goes with it.
fn unplug_lost(all: &[LinkState], judged: &[PortId], control: &mut Control, links: &mut Links) {
    let lost: Vec<String> = control
        .links()
        .filter(|&(id, _)| judged.contains(&id) && !all.iter().any(|link| Some(link.ifindex) == links.ifindex(id)))
        .map(|(_, link)| link.to_owned())
        .collect();
    for link in lost {
        info!("link {link} is gone: its port is removed");
        // It was there a moment ago; removing it cannot be refused.
        let _ = control.handle(0, vswitch_api::Request::PortDel { link }, links);
    }
}

fn show_vtep(vtep: Vtep) -> String {
    let addresses = vtep.v4.map(IpAddr::from).into_iter().chain(vtep.v6.map(IpAddr::from));
    let list: Vec<String> = addresses.map(|address| address.to_string()).collect();
    if list.is_empty() { "none".to_owned() } else { list.join(" ") }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    #[test]
    fn configured_addresses_win() {
        let addresses: Vec<IpAddr> = ["192.0.2.1", "192.0.2.9", "2001:db8::1"].map(|a| a.parse().unwrap()).into();
        let mut config = Uplink::default();
        let vtep = choose_vtep(&config, &addresses, None);
        assert_eq!(vtep.v4, Some(Ipv4Addr::new(192, 0, 2, 1)));
        assert_eq!(vtep.v6, "2001:db8::1".parse::<Ipv6Addr>().ok());
        config.vtep = vec!["192.0.2.9".parse().unwrap()];
        let vtep = choose_vtep(&config, &addresses, None);
        assert_eq!((vtep.v4, vtep.v6), (Some(Ipv4Addr::new(192, 0, 2, 9)), None));
        assert_eq!(foreign_vtep(&config, &addresses), None);
        assert_eq!(foreign_vtep(&config, &addresses[..1]), Some("192.0.2.9".parse().unwrap()));
    }
}
