//! Which selectors can mean an endpoint at all, and which endpoints a selector can mean.
//!
//! Most selectors name a value that a label must have, or a namespace. Such a selector is filed under that, its *anchor*; an
//! endpoint need only be compared with those under what it has. So neither looks at all of the other.

use std::collections::{BTreeSet, HashMap};

use vswitch_policy::{EndpointFacts, Labels, NamespaceMatch, Operator, Peer, Selector, Subject};

/// What a selector is filed under.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Anchor {
    Label(String, String),
    Namespace(String),
    NamespaceLabel(String, String),
    /// Anything could be meant.
    Any,
}

/// Numbers by anchor.
#[derive(Debug, Default)]
pub(crate) struct Filed {
    by_anchor: HashMap<Anchor, BTreeSet<u32>>,
}

/// What is filed: selectors under one of the things that they ask for, or endpoints under all that they have.
#[derive(Debug)]
pub(crate) struct Anchors(Vec<Anchor>);

impl Anchors {
    /// Of a peer that is no prefix.
    pub(crate) fn of_peer(peer: &Peer) -> Anchors {
        match peer {
            Peer::Pods { namespaces, pods } => Anchors::of_pods(namespaces, pods),
            Peer::Nodes(selector) => Anchors(values(selector, Anchor::Label).unwrap_or_else(|| vec![Anchor::Any])),
            Peer::Cidr { .. } => Anchors(Vec::new()),
        }
    }

    /// Of a subject.
    pub(crate) fn of_subject(subject: &Subject) -> Anchors {
        match subject {
            Subject::Pods { namespaces, pods } => Anchors::of_pods(namespaces, pods),
            Subject::Host => Anchors(Vec::new()),
        }
    }

    fn of_pods(namespaces: &NamespaceMatch, pods: &Selector) -> Anchors {
        let by_pods = values(pods, Anchor::Label);
        Anchors(by_pods.unwrap_or_else(|| match namespaces {
            NamespaceMatch::Name(name) => vec![Anchor::Namespace(name.clone())],
            NamespaceMatch::Labels(selector) => {
                values(selector, Anchor::NamespaceLabel).unwrap_or_else(|| vec![Anchor::Any])
            }
        }))
    }

    /// Of an endpoint.
    pub(crate) fn of_endpoint(facts: &EndpointFacts, namespace_labels: &Labels) -> Anchors {
        let pair = |make: fn(String, String) -> Anchor| {
            move |(key, value): (&String, &String)| make(key.clone(), value.clone())
        };
        let labels = facts.labels.iter().map(pair(Anchor::Label));
        let of_namespace = namespace_labels.iter().map(pair(Anchor::NamespaceLabel));
        let namespace = facts.namespace.iter().map(|name| Anchor::Namespace(name.clone()));
        Anchors(labels.chain(of_namespace).chain(namespace).chain([Anchor::Any]).collect())
    }
}

/// The values of which a label must have one, for the requirement with the fewest.
fn values(selector: &Selector, make: fn(String, String) -> Anchor) -> Option<Vec<Anchor>> {
    let required = selector.requirements.iter().filter_map(|requirement| match &requirement.operator {
        Operator::In(values) => Some((&requirement.key, values)),
        _ => None,
    });
    let (key, values) = required.min_by_key(|(_, values)| values.len())?;
    Some(values.iter().map(|value| make(key.clone(), value.clone())).collect())
}

impl Filed {
    pub(crate) fn insert(&mut self, anchors: &Anchors, number: u32) {
        for anchor in &anchors.0 {
            self.by_anchor.entry(anchor.clone()).or_default().insert(number);
        }
    }

    pub(crate) fn remove(&mut self, anchors: &Anchors, number: u32) {
        for anchor in &anchors.0 {
            if let Some(numbers) = self.by_anchor.get_mut(anchor) {
                numbers.remove(&number);
                if numbers.is_empty() {
                    self.by_anchor.remove(anchor);
                }
            }
        }
    }

    /// What is filed under any of these.
    pub(crate) fn under(&self, anchors: &Anchors) -> BTreeSet<u32> {
        anchors.0.iter().filter_map(|anchor| self.by_anchor.get(anchor)).flatten().copied().collect()
    }
}
