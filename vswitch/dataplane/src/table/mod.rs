//! The tables: flows (one a worker), stations and routes (in the snapshot).

pub mod egress;
pub mod fdb;
pub mod flow;
pub mod fragment;
pub mod group;
pub mod neighbor;
pub mod policy;
pub mod prefix;
pub mod route;
pub mod service;
mod sharded;
