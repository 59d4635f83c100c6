//! The uplink and the peers' next hops, as the kernel sees them now.
//!
//! [`refresh`] reads everything anew: the uplink, its addresses, and for each peer the route and the neighbor. It runs
//! when the kernel tells of a change and every few seconds; resolution is the kernel's own work, asked for here because
//! the switch's packets do not pass its stack.

use std::collections::BTreeMap;
use std::net::IpAddr;

use tracing::{debug, info, warn};
use vswitch_control::{Backend, Control, NextHop, UPLINK_PORT, UplinkState};
use vswitch_link::{Kernel, LinkError, LinkState, Neighbor};
use vswitch_net::PortId;
use vswitch_xsk::{Role, Vtep};

use crate::backend::Links;
use crate::config::Uplink;

/// Brings control's view of the uplink, the peers' next hops and the pods' links up to date.
pub(crate) async fn refresh(
    kernel: &Kernel,
    config: &Uplink,
    control: &std::cell::RefCell<Control>,
    links: &std::cell::RefCell<Links>,
) -> Result<(), LinkError> {
    // Ports that are added while the kernel lists its links are not in that list, and not lost.
    let judged: Vec<PortId> = control.borrow().links().map(|(id, _)| id).collect();
    let all = kernel.links().await?;
    unplug_lost(&all, &judged, &mut control.borrow_mut(), &mut links.borrow_mut());
    let exists = |name: &str| all.iter().any(|link| link.name == name);
    control.borrow_mut().adopt_waiting(exists, &mut *links.borrow_mut());
    let Some(name) = &config.link else { return Ok(()) };
    let Some(link) = all.iter().find(|link| link.name == *name) else {
        lose(name, &mut control.borrow_mut(), &mut links.borrow_mut());
        return Ok(());
    };
    let vtep = choose_vtep(config, &kernel.addresses(link.ifindex).await?);
    let updated = update_uplink(link, vtep, config, &mut control.borrow_mut(), &mut links.borrow_mut());
    if let Err(error) = updated {
        warn!("uplink {name}: {error}");
        if links.borrow().ifindex(UPLINK_PORT).is_none() {
            control.borrow_mut().set_uplink(None);
        }
        return Ok(());
    }
    let vteps: Vec<IpAddr> = control.borrow().vteps().collect();
    let neighbors: BTreeMap<IpAddr, Neighbor> = kernel.neighbors(link.ifindex).await?.into_iter().collect();
    for peer in vteps {
        // What the kernel refuses for one peer must not keep it from the others.
        match next_hop(kernel, &all, link, &neighbors, peer).await {
            Ok(next_hop) => control.borrow_mut().set_next_hop(peer, next_hop),
            Err(error) => {
                debug!("peer {peer}: {error}");
                control.borrow_mut().set_next_hop(peer, NextHop::default());
            }
        }
    }
    Ok(())
}

async fn next_hop(
    kernel: &Kernel,
    all: &[LinkState],
    uplink: &LinkState,
    neighbors: &BTreeMap<IpAddr, Neighbor>,
    peer: IpAddr,
) -> Result<NextHop, LinkError> {
    let Some(route) = kernel.route_to(peer).await? else { return Ok(NextHop::default()) };
    let address = route.gateway.unwrap_or(peer);
    let mut next_hop = NextHop {
        link: all.iter().find(|link| link.ifindex == route.ifindex).map(|link| link.name.clone()),
        address: Some(address),
        mac: None,
    };
    if route.ifindex == uplink.ifindex {
        let neighbor = neighbors.get(&address);
        next_hop.mac = neighbor.and_then(|neighbor| neighbor.mac);
        if uplink.is_up && !neighbor.is_some_and(|neighbor| neighbor.is_fresh) {
            kernel.resolve(uplink.ifindex, address).await?;
        }
    }
    Ok(next_hop)
}

/// The addresses of the configuration, or the link's first ones.
fn choose_vtep(config: &Uplink, addresses: &[IpAddr]) -> Vtep {
    let candidates = if config.vtep.is_empty() { addresses } else { &config.vtep };
    Vtep {
        v4: candidates.iter().find_map(|address| if let IpAddr::V4(v4) = address { Some(*v4) } else { None }),
        v6: candidates.iter().find_map(|address| if let IpAddr::V6(v6) = address { Some(*v6) } else { None }),
        port: config.udp_port,
    }
}

/// Attaches the uplink if it is new, and tells control what it is now.
fn update_uplink(
    link: &LinkState,
    vtep: Vtep,
    config: &Uplink,
    control: &mut Control,
    links: &mut Links,
) -> Result<(), String> {
    let known = control.uplink().cloned();
    let attached = match (links.ifindex(UPLINK_PORT), &known) {
        (Some(ifindex), Some(known)) if ifindex == link.ifindex => {
            if (known.v4, known.v6) != (vtep.v4, vtep.v6)
                && let Some(program) = links.program(UPLINK_PORT)
            {
                program.set_vtep(vtep).map_err(|error| error.to_string())?;
                info!("vtep is now {} {}", show(vtep.v4), show(vtep.v6));
            }
            known.attached.clone()
        }
        _ => {
            links.detach(UPLINK_PORT);
            let role = Role::Uplink(vtep);
            let attached = links.attach_uplink(UPLINK_PORT, link.ifindex, role, config.zero_copy.into())?;
            info!("uplink {} attached: xdp {}, {}", link.name, attached.xdp_mode, attached.copy_modes.join(" "));
            attached
        }
    };
    control.set_uplink(Some(UplinkState {
        link: link.name.clone(),
        mac: link.mac,
        mtu: link.mtu,
        is_up: link.is_up,
        v4: vtep.v4,
        v6: vtep.v6,
        attached,
    }));
    Ok(())
}

fn lose(name: &str, control: &mut Control, links: &mut Links) {
    if control.uplink().is_some() {
        warn!("uplink {name} is gone: peers are unreachable until it is back");
        links.detach(UPLINK_PORT);
        control.set_uplink(None);
    }
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

fn show<T: std::fmt::Display>(address: Option<T>) -> String {
    address.map_or_else(|| "-".to_owned(), |address| address.to_string())
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    #[test]
    fn configured_addresses_win() {
        let addresses: Vec<IpAddr> = ["192.0.2.1", "192.0.2.9", "2001:db8::1"].map(|a| a.parse().unwrap()).into();
        let mut config = Uplink::default();
        let vtep = choose_vtep(&config, &addresses);
        assert_eq!(vtep.v4, Some(Ipv4Addr::new(192, 0, 2, 1)));
        assert_eq!(vtep.v6, "2001:db8::1".parse::<Ipv6Addr>().ok());
        config.vtep = vec!["192.0.2.9".parse().unwrap()];
        let vtep = choose_vtep(&config, &addresses);
        assert_eq!((vtep.v4, vtep.v6), (Some(Ipv4Addr::new(192, 0, 2, 9)), None));
    }
}
