//! What others do to links and addresses, looked at and put right.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::{debug, warn};
use vswitch_control::{Backend, HOST_PORT, PodRoutes};
use vswitch_link::LinkState;
use vswitch_link::plug::update_routes;
use vswitch_net::PortId;
use vswitch_xsk::Waiting;

use super::{Daemon, HOST_RETRY_NS};
use crate::backend::Again;
use crate::follow::Followed;
use crate::uplink;

impl Daemon {
    pub(crate) async fn refresh(&self) -> anyhow::Result<()> {
        let ports = || self.control.borrow().links().count();
        let before = ports();
        let refreshed = uplink::refresh(&self.kernel, &self.config.uplink, &self.control, &self.links).await;
        self.publish();
        if ports() != before {
            self.save();
        }
        let all = refreshed?;
        if self.config.host.network.is_some() {
            let own = self.kernel.all_addresses().await?;
            let own = own.into_iter().filter(|address| !address.is_loopback()).collect();
            self.control.borrow_mut().set_host_addresses(own);
        }
        self.check_host(&all).await;
        self.carry_out().await;
        let followed = self.look_at_followed(&all).await;
        self.update_pods().await;
        self.publish();
        followed
    }

    /// Which links the kernel can send to by itself: those that an offloaded flow may leave by.
    pub(crate) async fn look_for_targets(&self) {
        if !self.links.borrow().is_offloading() {
            return;
        }
        if let Ok(all) = self.kernel.links().await {
            self.links.borrow_mut().set_losses(&all);
        }
        let links = self.links.borrow().ifindexes();
        let targets = self.kernel.redirect_targets(&links).await;
        let is_lost = self.links.borrow_mut().set_targets(targets.as_ref());
        if is_lost {
            self.control.borrow_mut().invalidate();
        }
    }

    /// Sends silent ports to rest.
    pub(crate) fn rest_silent(&self) {
        self.links.borrow_mut().rest_silent();
    }

    /// Wakes ports at rest.
    pub(crate) fn wake(&self, called: BTreeSet<PortId>, waiting: &mut Waiting) -> Again {
        self.links.borrow_mut().wake(called, waiting)
    }

    /// The packets of ports at rest, once there are any such.
    #[expect(deprecated, reason = "the way without `unsafe`: the ring owns its descriptor and never gives it away")]
    pub(crate) fn take_waiting(&self) -> Option<AsyncFd<Waiting>> {
        let waiting = self.links.borrow_mut().take_waiting()?;
        match AsyncFd::with_interest(waiting, Interest::READABLE) {
            Ok(ring) => {
                self.links.borrow_mut().begin_rests();
                Some(ring)
            }
            Err(error) => {
                warn!("no port will rest, for nobody could hear it: {error}");
                None
            }
        }
    }

    /// What leaves the node fits the uplink as it is now: pods' routes follow its MTU.
    async fn update_pods(&self) {
        let wanted: BTreeMap<PortId, PodRoutes> =
            self.control.borrow().pod_routes().map(|pod| (pod.port, pod)).collect();
        // A pod that was taken over is not known: the MTU may be another than the former daemon knew.
        let known = self.pod_routes.replace(wanted.clone());
        let changed = wanted.values().filter(|pod| known.get(&pod.port).is_none_or(|known| known.routes != pod.routes));
        for PodRoutes { port, netns, mac, routes } in changed {
            match update_routes(Path::new(netns), *mac, routes).await {
                Ok(()) => debug!("routes of {netns} follow the uplink's MTU"),
                Err(error) => {
                    warn!("routes of {netns} keep their old MTU, which is tried again: {error}");
                    let mut pods = self.pod_routes.borrow_mut();
                    match known.get(port) {
                        Some(before) => pods.insert(*port, before.clone()),
                        None => pods.remove(port),
                    };
                }
            }
        }
    }

    /// The host's end of its veth may be deleted by anybody; then it is made again, as soon as it can be.
    async fn check_host(&self, all: &[LinkState]) {
        if self.config.host.network.is_none() {
            return;
        }
        let link = &self.config.host.link;
        let known = self.host.lock().await.as_ref().map(|host| all.iter().any(|link| host.is(link.ifindex)));
        match known {
            Some(true) => return,
            Some(false) => {
                warn!("link {link} is gone: it is made again");
                self.links.borrow_mut().detach(HOST_PORT);
                self.host.lock().await.take();
            }
            // Each try makes and deletes links, which is news that would wake the next.
            None if self.now_ns() < self.host_retry_ns.get() => return,
            None => {}
        }
        self.host_retry_ns.set(self.now_ns() + HOST_RETRY_NS);
        if let Err(error) = self.attach_host().await {
            let reason = format!("{error:#}; it is tried again");
            if self.control.borrow_mut().set_host(Err(reason.clone())) {
                warn!("host port {link}: {reason}");
            }
        }
    }

    /// Follows devices and uplinks that came or changed, and tells bridges of the stations here.
    async fn look_at_followed(&self, all: &[LinkState]) -> anyhow::Result<()> {
        if !Followed::is_needed(&self.config.routes, &self.control.borrow()) {
            return Ok(());
        }
        let uplinks: Vec<u32> = {
            let control = self.control.borrow();
            let names: Vec<&str> = control.uplinks().collect();
            all.iter().filter(|link| names.contains(&link.name.as_str())).map(|link| link.ifindex).collect()
        };
        let mut followed = self.followed.lock().await;
        followed.look(all, &uplinks, &self.control.borrow());
        followed.read(&self.kernel, &self.config.routes, &self.control).await?;
        followed.tell(&self.kernel, all, self.now_ns(), &self.control).await;
        Ok(())
    }
}
