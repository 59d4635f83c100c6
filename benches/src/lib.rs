//! What the benches share: an allocator that counts, ports that cost next to nothing, and a switch to drive.

mod allocations;
pub mod flood;
pub mod policies;
mod rig;

pub use allocations::{CountingAllocator, allocations};
pub use rig::{Rig, Way};
