//! What the benches share: an allocator that counts, ports that cost next to nothing, and a switch to drive.

mod allocations;
mod rig;

pub use allocations::{CountingAllocator, allocations};
pub use rig::{Rig, Way};
