//! The harness of the in-memory tests: whole switches over memory, on a virtual clock.
//!
//! A [`Switch`] is real control and a real worker; only its ports are queues. After every turn it checks that every packet
//! ended in one counter and that every frame came home. A [`Twin`](twin::Twin) joins two of them by a wire that may lose
//! and reorder, with smoltcp stacks as pods.
#![forbid(unsafe_code)]

pub mod frames;
pub mod mem;
pub mod naive;
pub mod netpol;
pub mod pod;
pub mod twin;
