//! Requests: carried out, published, noted, answered.

use tracing::{debug, info, warn};
use vswitch_api::{Answer, ApiError, ErrorCode, Request};
use vswitch_control::Backend;

use super::Daemon;
use crate::host::HostLink;

impl Daemon {
    pub(crate) async fn handle(&self, request: Request) -> Result<Answer, ApiError> {
        let is_change = !request.is_question();
        let is_policy = request.is_policy();
        let asked = format!("{request}");
        if let Request::PortAdd(spec) = &request {
            self.check_link(&spec.link).await?;
        }
        // A mapped port that is not mapped is a pod that nobody reaches, and nobody is told.
        let mapped = match &request {
            Request::PortAdd(spec) if !spec.port_mappings.is_empty() => Some(spec.link.clone()),
            _ => None,
        };
        let mut answer = self.control.borrow_mut().handle(self.now_ns(), request, &mut *self.links.borrow_mut());
        if let (Some(link), Ok(_)) = (mapped, &answer) {
            self.carry_out().await;
            let failure = self.host.lock().await.as_ref().and_then(HostLink::rules_failure);
            if let Some(failure) = failure {
                let removal = Request::PortDel { link };
                let _ = self.control.borrow_mut().handle(self.now_ns(), removal, &mut *self.links.borrow_mut());
                answer = Err(ApiError::new(ErrorCode::System, format!("port_mappings: {failure}")));
            }
        }
        if let (true, Ok(Answer::Port(info))) = (is_change, &answer) {
            // Its routes are made by who plugged it in, as the answer says.
            let control = self.control.borrow();
            let mut plugged = control.pod_routes().filter(|pod| pod.port == info.id);
            self.pod_routes.borrow_mut().extend(plugged.next().map(|pod| (pod.port, pod)));
        }
        match &answer {
            Ok(_) if !is_change => debug!("{asked}"),
            Ok(_) => info!("{asked}"),
            Err(error) if !is_change => debug!("{asked}: refused: {error}"),
            Err(error) => info!("{asked}: refused: {error}"),
        }
        if is_change {
            self.publish();
            // Whoever is told that it is done may rely on it, for the very next packet and after a restart.
            let live = self.links.borrow().sync().map_err(|error| ApiError::new(ErrorCode::System, error));
            answer = answer.and_then(|done| live.and(self.note()).map(|()| done));
            if self.control.borrow_mut().settle_connections(&mut *self.links.borrow_mut()) {
                self.publish();
                let _ = self.links.borrow().sync();
            }
        }
        if is_change && !is_policy {
            self.save();
            self.carry_out().await;
            self.stale.notify_one();
        }
        answer
    }

    /// Notes what has changed of policies and endpoints.
    fn note(&self) -> Result<(), ApiError> {
        let entries = self.control.borrow_mut().take_journal();
        let noted = if entries.is_empty() { Ok(()) } else { self.store.append_journal(&entries) };
        let noted = noted.and_then(|()| if self.store.is_journal_long() { self.write_journal() } else { Ok(()) });
        noted.map_err(|error| {
            let message = format!("in force, but a restart will not know it: {error}; make room in daemon.runtime_dir");
            ApiError::new(ErrorCode::System, message)
        })
    }

    /// Gives up addresses that were translated and no connection uses any more.
    pub(crate) async fn drain(&self) {
        let is_news = self.control.borrow_mut().drain(self.now_ns(), &mut *self.links.borrow_mut());
        if is_news {
            self.carry_out().await;
        }
    }

    pub(super) fn write_journal(&self) -> std::io::Result<()> {
        self.store.rewrite_journal(&self.control.borrow().whole_journal())
    }

    /// Forgets silent connections, some shards at a time.
    pub(crate) fn sweep(&self, turn: usize) {
        const SHARDS_A_SECOND: usize = 32;
        let links = self.links.borrow();
        let connections = links.connections();
        (0..SHARDS_A_SECOND).for_each(|step| connections.sweep(self.now_ns(), turn * SHARDS_A_SECOND + step));
    }

    /// A port takes every packet of its link: a NIC of the host plugged in by mistake would cut the node off.
    async fn check_link(&self, name: &str) -> Result<(), ApiError> {
        let system = |error: vswitch_link::LinkError| ApiError::new(ErrorCode::System, error.to_string());
        let refuse = |message: String| Err(ApiError::new(ErrorCode::Invalid, message));
        match self.kernel.link(name).await.map_err(system)? {
            None => refuse(format!(
                "no link {name} in the daemon's network namespace: plug pods in from there (see `ip link show`)"
            )),
            Some(link) if !link.is_veth => {
                refuse(format!("link {name} is no veth: only the host end of a pod's veth can be a port"))
            }
            Some(link) if !self.kernel.addresses(link.ifindex).await.map_err(system)?.is_empty() => refuse(format!(
                "link {name} has addresses of the host: only the bare end of a pod's veth can be a port"
            )),
            Some(_) => Ok(()),
        }
    }

    pub(super) fn save(&self) {
        let state = self.control.borrow().state(self.store.boot_id());
        if let Err(error) = self.store.save(&state) {
            warn!("the state could not be written, a restart will not know the latest change: {error}");
        }
    }
}
