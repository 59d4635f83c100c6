//! What runs beside each other on the control thread: requests, workers' news, the kernel's news.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::Receiver;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixListener;
use tokio::sync::Notify;
use tokio::task::spawn_local;
use tracing::{debug, warn};
use vswitch_dataplane::Event;
use vswitch_link::{Follower, Watch};
use vswitch_net::PortId;
use vswitch_xsk::Waiting;

use crate::backend::Again;
use crate::daemon::Daemon;
use crate::follow::Followed;
use crate::server;

/// Events that workers may be ahead of the control thread.
pub(crate) const EVENT_QUEUE: usize = 16_384;

/// Changes of the kernel's tables that are published together.
const FOLLOW_BATCH: usize = 4096;

/// Learned stations are published together, at most this often.
const LEARN_INTERVAL: Duration = Duration::from_millis(5);

/// News of the kernel come in flocks.
const NEWS_INTERVAL: Duration = Duration::from_millis(20);

/// The underlay is looked at this often even without news.
const REFRESH_INTERVAL: Duration = Duration::from_secs(2);

/// Answers requests, each connection by itself.
pub(crate) async fn serve(daemon: Rc<Daemon>, listener: UnixListener) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let daemon = daemon.clone();
                spawn_local(async move {
                    if let Err(error) = server::serve(stream, async |request| daemon.handle(request).await).await {
                        debug!("a connection broke: {error}");
                    }
                });
            }
            Err(error) => {
                // Out of descriptors, most likely; some will be free again.
                warn!("cannot accept a connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// How often addresses that are no longer translated are looked at.
const DRAIN_SECONDS: usize = 5;

/// Takes in what workers saw, and lets learned stations age.
pub(crate) async fn learn(daemon: Rc<Daemon>, events: Receiver<Event>, news: Arc<Notify>) {
    let mut second = tokio::time::interval(Duration::from_secs(1));
    second.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut seconds = 0;
    loop {
        tokio::select! {
            () = news.notified() => {}
            _ = second.tick() => {
                daemon.control.borrow_mut().tick(daemon.now_ns());
                daemon.sweep(seconds);
                daemon.rest_silent();
                daemon.look_for_targets().await;
                if seconds % DRAIN_SECONDS == 0 {
                    daemon.drain().await;
                }
                seconds += 1;
            }
        }
        let now_ns = daemon.now_ns();
        let wall_ms = wall_clock_ms();
        // No more than one queue's worth, so that requests get their turn.
        for event in events.try_iter().take(EVENT_QUEUE) {
            daemon.control.borrow_mut().learn(now_ns, wall_ms, event);
        }
        daemon.publish();
        tokio::time::sleep(LEARN_INTERVAL).await;
    }
}

/// Wakes ports at rest that have something to send or to get.
pub(crate) async fn wake(daemon: Rc<Daemon>, calls: Receiver<PortId>, rung: Arc<Notify>) {
    let mut waiting: Option<AsyncFd<Waiting>> = None;
    let mut again = Again::WhenCalled;
    loop {
        if waiting.is_none() {
            waiting = daemon.take_waiting();
        }
        let Some(ring) = &mut waiting else {
            rung.notified().await;
            continue;
        };
        tokio::select! {
            () = rung.notified() => {}
            () = tokio::time::sleep(NEWS_INTERVAL), if again == Again::Soon => {}
            ready = ring.readable_mut() => match ready {
                // What comes from now on makes it ready again, and what is there is taken below.
                Ok(mut ready) => ready.clear_ready(),
                Err(error) => warn!("ports at rest cannot be listened to: {error}"),
            }
        }
        again = daemon.wake(calls.try_iter().collect(), ring.get_mut());
        if again == Again::AtOnce {
            rung.notify_one();
        }
        tokio::task::yield_now().await;
    }
}

/// For people who read events: the clock on the wall.
#[expect(clippy::disallowed_methods, reason = "events tell the time of day")]
fn wall_clock_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}

/// Keeps the view of the underlay up to date.
pub(crate) async fn follow_kernel(daemon: Rc<Daemon>, watch: Watch) {
    let mut is_following = false;
    loop {
        // What was read before somebody listened may have changed since.
        if !is_following && Followed::is_needed(&daemon.config.routes, &daemon.control.borrow()) {
            let follower = listen_to_tables().await;
            daemon.followed.lock().await.distrust();
            spawn_local(follow_tables(daemon.clone(), follower));
            is_following = true;
        }
        if let Err(error) = daemon.refresh().await {
            warn!("the underlay could not be read: {error}");
        }
        tokio::time::sleep(NEWS_INTERVAL).await;
        tokio::select! {
            () = watch.changed() => {}
            () = daemon.stale.notified() => {}
            () = tokio::time::sleep(REFRESH_INTERVAL) => {}
        }
    }
}

/// Takes in what others write into the kernel's tables.
async fn follow_tables(daemon: Rc<Daemon>, mut follower: Follower) {
    loop {
        while let Some(first) = follower.next().await {
            let mut followed = daemon.followed.lock().await;
            let mut next = Some(first);
            let mut count = 0;
            while let Some(news) = next {
                followed.hear(news, &daemon.config.routes, &mut daemon.control.borrow_mut());
                count += 1;
                next = if count < FOLLOW_BATCH { follower.try_next() } else { None };
            }
            drop(followed);
            daemon.control.borrow_mut().forget_unused_peers();
            daemon.publish();
            daemon.stale.notify_one();
            tokio::time::sleep(LEARN_INTERVAL).await;
        }
        follower = listen_to_tables().await;
        let mut followed = daemon.followed.lock().await;
        followed.distrust();
        if let Err(error) = followed.read(&daemon.kernel, &daemon.config.routes, &daemon.control).await {
            warn!("the kernel's tables could not be read, which is tried again: {error}");
        }
        drop(followed);
        daemon.publish();
        daemon.stale.notify_one();
    }
}

async fn listen_to_tables() -> Follower {
    loop {
        match Follower::here() {
            Ok(follower) => return follower,
            // Out of descriptors, most likely; some will be free again.
            Err(error) => warn!("the kernel's tables cannot be followed, which is tried again: {error}"),
        }
        tokio::time::sleep(REFRESH_INTERVAL).await;
    }
}
