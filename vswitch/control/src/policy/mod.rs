//! Policy: what was written, who it is about, and the tables that come of it.
//!
//! Objects and endpoints are kept as they came ([`store`]), compiled change by change ([`compiler`]), asked about
//! ([`explain`]), and told of ([`observe`]).

mod anchor;
mod compiler;
mod connections;
mod explain;
mod observe;
mod requests;
mod row;
mod rules;
mod set;
mod settle;
mod slab;
mod store;

pub use compiler::{Compiler, IdentityId, Owner};
pub(crate) use connections::end_text;
pub(crate) use observe::Observed;
pub(crate) use requests::failsafe;
pub use store::JournalEntry;
pub(crate) use store::{PolicyStore, is_of_runtime, port_name};
