//! Mechanism: AF_XDP as move-only frames, four rings and sockets, and the XDP programs that feed them.
//!
//! # What
//!
//! A *umem* is memory cut into chunks of 4,096 bytes. A chunk is always in exactly one place: on the free list, in a
//! [`Frame`] that somebody holds, or with the kernel, in the fill or the transmit ring of one socket. A [`Packet`] is
//! 1 to 18 frames; headers lie in the first, the rest is carried and hardly ever read.
//!
//! ```text
//!   Umem::alloc -> Frame -> fill ring -> (kernel) -> rx ring -> Packet -> tx ring -> (kernel) -> completion -> free list
//! ```
//!
//! # Why this way
//!
//! The switch moves a packet's start (it encapsulates in place), asks the kernel for checksums (TX metadata), and shares
//! one umem among all sockets of a worker. No published binding does all three, so this crate speaks to the system calls
//! itself. Descriptors are plain integers to the kernel; here they are [`Frame`]s that are neither `Copy` nor `Clone`,
//! so that giving one twice does not compile, and every address that the kernel hands back is checked against the table
//! of owners before it becomes a frame again. A kernel that lied could lose us frames, not memory safety.
//!
//! ```compile_fail
//! let mut umem = vswitch_xsk::Umem::new(16).unwrap();
//! let frame = umem.alloc().unwrap();
//! umem.free(frame);
//! umem.free(frame); // use of moved value
//! ```
//!
//! # Thread-safety
//!
//! A [`Umem`] and all sockets over it belong to one worker; none of it is shared, so there are no locks. Only the
//! [`Binder`], which makes sockets on the control thread, shares the memory itself, and it never reads it. The rings'
//! producer and consumer words are shared with the kernel: see [`mod@ring`] for who pairs with whom.
//!
//! # Cost
//!
//! A frame is 16 bytes; alloc and free are a push and a pop. One system call a burst transmits; receiving needs none.
//!
//! # References
//!
//! Kernel documents `networking/af_xdp.rst` and `networking/xsk-tx-metadata.rst`, header `linux/if_xdp.h`.

mod area;
mod bind;
mod cycles;
mod depth;
mod fastpath;
mod frame;
mod huge;
mod prefetch;
mod program;
pub mod ring;
mod socket;
mod sys;
mod umem;
mod waiting;

pub use bind::{BindError, Binder, BoundSocket, Patience, ZeroCopy};
pub use cycles::cycles;
pub use fastpath::{FastCounts, FastFlow, FastKey, FastPath, FastStamp, FastTable, FastTarget, MAX_SUM, OUTER_BYTES};
pub use frame::{Frame, HEADROOM, MAX_FRAMES, Packet};
pub use huge::filled;
pub use prefetch::prefetch;
pub use program::{AttachedProgram, ProgramError, Programs, Rest, Role, Vtep, XdpMode, XdpPreference};
pub use socket::{Closing, CopyMode, KickCounters, SocketStatistics, TxChecksum, XskSocket};
pub use umem::{CHUNK_BYTES, Reserve, Slot, Umem};
pub use waiting::{Waiting, WaitingPacket};
