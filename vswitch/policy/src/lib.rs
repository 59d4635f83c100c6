//! Policy objects: what people write, read into one model.
//!
//! # What
//!
//! [`read`] takes a text of YAML or JSON documents and gives [`Object`]s: Kubernetes' NetworkPolicy, AdminNetworkPolicy,
//! BaselineAdminNetworkPolicy and ClusterNetworkPolicy, the switch's own SwitchPolicy and Tier, and what policies are
//! about: Namespace, Pod and Node. All policies become one [`Policy`]: a subject, a place in an order, and rules.
//!
//! # Why this way
//!
//! A text is refused whole, with file, line and field, before anything is changed. So the text is first made a tree that knows
//! its lines ([`text`]), the tree a typed object by the schema that Kubernetes publishes, and the object a [`Policy`]; an
//! error of any step is a path into the tree, and the tree has the line.
//!
//! # The order of rules
//!
//! [`Tier`]s by order; in a tier, policies by order and then by name; in a policy, rules as written. The first rule that
//! matches and is not `Log` decides; `Pass` goes on with the next tier. Where no rule of a tier matches, but a policy of it
//! selects the subject, the tier's default decides. After the last tier everything is allowed.
//!
//! # References
//!
//! Kubernetes API `networking.k8s.io/v1`; `policy.networking.k8s.io` `v1alpha1` and `v1alpha2` (kubernetes-sigs/network-policy-api).
#![forbid(unsafe_code)]

mod admin;
mod cluster;
mod inventory;
mod model;
mod network_policy;
mod object;
mod schema;
mod selector;
mod switch;
pub mod text;

pub use model::{
    Action, Direction, EndpointFacts, IcmpMatch, NamedPort, NamespaceMatch, Peer, PeerFacts, Policy, PolicyId,
    PortMatch, Rule, Source, Subject, Tier, TierDefault, builtin_tiers, protocol,
};
pub use object::{EndpointObject, Kind, Object, Read, ReadError, read, reread};
pub use selector::{Labels, Operator, Requirement, Selector};
