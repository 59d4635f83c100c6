//! What the project's tasks and its namespace tests share: a laboratory of network namespaces, links and processes.
//!
//! Depends on nothing that must be installed first: `cargo xtask setup` has to build on a bare machine.
#![forbid(unsafe_code)]

pub mod lab;
pub mod ovs;
pub mod setup;
