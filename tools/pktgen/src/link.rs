//! One queue of a link, by xsk-rs: descriptors in, descriptors out. The one file that calls its unsafe functions.
#![allow(unsafe_code)]

use std::num::NonZeroU32;
use std::str::FromStr;

use anyhow::{Context, anyhow};
use xsk_rs::config::{BindFlags, Interface, LibxdpFlags, QueueSize, SocketConfig, UmemConfig};
use xsk_rs::{CompQueue, FillQueue, FrameDesc, RxQueue, Socket, TxQueue, Umem};

/// Frames of a umem; half of them for each link that shares it.
const FRAMES: u32 = 8192;

/// Entries of each ring.
const RING: u32 = 2048;

/// Packets of one burst.
pub(crate) const BURST: usize = 64;

/// A link's queue 0.
pub(crate) struct Link {
    umem: Umem,
    tx: TxQueue,
    rx: RxQueue,
    fill: FillQueue,
    completion: CompQueue,
    /// Frames at hand. A descriptor is here, in `received` of the caller, or with the kernel, never in two places.
    pub(crate) free: Vec<FrameDesc>,
    scratch: Vec<FrameDesc>,
}

/// Whether a link shall receive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// Loads libxdp's program, which takes every packet of the queue.
    Both,
    /// No program: packets stay the host's.
    SendOnly,
}

impl Link {
    /// Opens queue 0 of `names`, all over one umem.
    pub(crate) fn open<const N: usize>(names: [&str; N], direction: Direction) -> anyhow::Result<[Link; N]> {
        let ring = QueueSize::new(RING).map_err(|error| anyhow!("{error}"))?;
        let umem_config = UmemConfig::builder()
            .fill_queue_size(ring)
            .comp_queue_size(ring)
            .build()
            .map_err(|error| anyhow!("{error}"))?;
        let count = NonZeroU32::new(FRAMES).context("frames")?;
        let (umem, descs) = Umem::new(umem_config, count, false)
            .context("cannot register packet memory: run as root, with a high `ulimit -l`")?;
        let inhibit = match direction {
            Direction::Both => LibxdpFlags::empty(),
            Direction::SendOnly => LibxdpFlags::XSK_LIBXDP_FLAGS_INHIBIT_PROG_LOAD,
        };
        let config = SocketConfig::builder()
            .rx_queue_size(ring)
            .tx_queue_size(ring)
            .libxdp_flags(inhibit)
            .bind_flags(BindFlags::XDP_USE_NEED_WAKEUP)
            .build();
        let mut shares = descs.chunks(descs.len() / N);
        let links = names.map(|name| {
            let share = shares.next().unwrap_or_default().to_vec();
            Link::on(name, config, umem.clone(), share).with_context(|| {
                format!("cannot open link {name}: does it exist here, is it up, is its queue 0 free, and the MTU of it and of its other end at most 3498 (libxdp's program takes packets of one frame; `switchctl port add --mtu 1500` makes such pods)?")
            })
        });
        let mut opened = Vec::new();
        for link in links {
            let mut link = link?;
            if direction == Direction::Both {
                link.refill();
            }
            opened.push(link);
        }
        opened.try_into().map_err(|_| anyhow!("another number of links"))
    }

    fn on(name: &str, config: SocketConfig, umem: Umem, free: Vec<FrameDesc>) -> anyhow::Result<Link> {
        let interface = Interface::from_str(name)?;
        // SAFETY: no (link, queue) pair is bound twice over this umem.
        let (tx, rx, rings) = unsafe { Socket::new(config, &umem, &interface, 0) }?;
        let (fill, completion) = rings.ok_or_else(|| anyhow!("no fill and completion ring"))?;
        Ok(Link { umem, tx, rx, fill, completion, free, scratch: vec![FrameDesc::default(); BURST] })
    }

    /// Writes a packet into a frame.
    pub(crate) fn write(&mut self, frame: &mut FrameDesc, packet: &[u8]) -> anyhow::Result<()> {
        use std::io::Write;
        // SAFETY: the frame is of this umem and at hand, so the kernel does not touch it.
        let mut data = unsafe { self.umem.data_mut(frame) };
        let mut cursor = data.cursor();
        cursor.set_pos(0);
        cursor.write_all(packet).context("the packet is larger than a frame")
    }

    /// The bytes of a received frame.
    pub(crate) fn read(&self, frame: &FrameDesc) -> &[u8] {
        // SAFETY: the frame is of this umem and at hand, so the kernel does not touch it.
        unsafe { self.umem.data(frame) }.contents()
    }

    /// Receives up to a burst into `received`; returns how many came.
    pub(crate) fn receive(&mut self, received: &mut Vec<FrameDesc>) -> usize {
        // SAFETY: the descriptors that come were given to the fill ring and to nobody else.
        let count = unsafe { self.rx.consume(&mut self.scratch) };
        received.extend_from_slice(&self.scratch[..count]);
        count
    }

    /// Waits up to `ms` for something to receive.
    pub(crate) fn wait(&mut self, ms: i32) -> std::io::Result<bool> {
        self.rx.poll(ms)
    }

    /// Sends `frames` and wakes the kernel; what the ring had no room for comes back.
    pub(crate) fn send(&mut self, frames: &mut Vec<FrameDesc>) -> std::io::Result<usize> {
        // The ring takes all or nothing; offer what fits.
        let room = (self.tx.nb_free(frames.len() as u32) as usize).min(frames.len());
        let rest = frames.split_off(room);
        // SAFETY: the frames are at hand and written; they are not touched again until completed.
        let sent = unsafe { self.tx.produce(frames) };
        debug_assert_eq!(sent, room);
        *frames = rest;
        self.wake()?;
        Ok(sent)
    }

    /// Has the kernel go on sending.
    pub(crate) fn wake(&mut self) -> std::io::Result<()> {
        if self.tx.needs_wakeup()
            && let Err(error) = self.tx.wakeup()
            // EAGAIN, EBUSY, ENOBUFS: not now.
            && !matches!(error.raw_os_error(), Some(11 | 16 | 105))
        {
            return Err(error);
        }
        Ok(())
    }

    /// Takes completed frames back; returns how many.
    pub(crate) fn reclaim(&mut self) -> usize {
        let mut total = 0;
        loop {
            // SAFETY: the descriptors that come were given to the tx ring and to nobody else.
            let count = unsafe { self.completion.consume(&mut self.scratch) };
            self.free.extend_from_slice(&self.scratch[..count]);
            total += count;
            if count < self.scratch.len() {
                return total;
            }
        }
    }

    /// Gives free frames to the fill ring, as many as it takes.
    pub(crate) fn refill(&mut self) {
        let room = (self.fill.nb_free(RING) as usize).min(self.free.len());
        let frames = self.free.split_off(self.free.len() - room);
        // SAFETY: the frames were at hand; they are not touched again until received.
        let given = unsafe { self.fill.produce(&frames) };
        debug_assert_eq!(given, room);
    }
}
