//! From a text to objects, and what can be wrong on the way.

use std::net::IpAddr;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::model::{EndpointFacts, Policy, Source, Tier};
use crate::selector::Labels;
use crate::text::{self, Document, Lines, line_of};
use crate::{admin, cluster, inventory, network_policy, switch};

/// Kinds of objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `networking.k8s.io/v1`.
    NetworkPolicy,
    /// `policy.networking.k8s.io/v1alpha1`.
    AdminNetworkPolicy,
    /// `policy.networking.k8s.io/v1alpha1`.
    BaselineAdminNetworkPolicy,
    /// `policy.networking.k8s.io/v1alpha2`.
    ClusterNetworkPolicy,
    /// `vswitch.io/v1alpha1`.
    SwitchPolicy,
    /// `vswitch.io/v1alpha1`.
    Tier,
    /// `v1`.
    Namespace,
    /// `v1`.
    Pod,
    /// `v1`.
    Node,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Kind; 9] = [
        Kind::NetworkPolicy,
        Kind::AdminNetworkPolicy,
        Kind::BaselineAdminNetworkPolicy,
        Kind::ClusterNetworkPolicy,
        Kind::SwitchPolicy,
        Kind::Tier,
        Kind::Namespace,
        Kind::Pod,
        Kind::Node,
    ];

    /// As objects say it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::NetworkPolicy => "NetworkPolicy",
            Kind::AdminNetworkPolicy => "AdminNetworkPolicy",
            Kind::BaselineAdminNetworkPolicy => "BaselineAdminNetworkPolicy",
            Kind::ClusterNetworkPolicy => "ClusterNetworkPolicy",
            Kind::SwitchPolicy => "SwitchPolicy",
            Kind::Tier => "Tier",
            Kind::Namespace => "Namespace",
            Kind::Pod => "Pod",
            Kind::Node => "Node",
        }
    }

    /// The version that is read.
    pub fn api_version(self) -> &'static str {
        match self {
            Kind::NetworkPolicy => "networking.k8s.io/v1",
            Kind::AdminNetworkPolicy | Kind::BaselineAdminNetworkPolicy => "policy.networking.k8s.io/v1alpha1",
            Kind::ClusterNetworkPolicy => "policy.networking.k8s.io/v1alpha2",
            Kind::SwitchPolicy | Kind::Tier => "vswitch.io/v1alpha1",
            Kind::Namespace | Kind::Pod | Kind::Node => "v1",
        }
    }

    /// The kind that somebody means: its name in any case, its plural, or the short name that `kubectl` knows.
    pub fn of(word: &str) -> Option<Kind> {
        let word = word.to_ascii_lowercase();
        let short = match word.as_str() {
            "netpol" | "networkpolicies" => Some(Kind::NetworkPolicy),
            "anp" | "adminnetworkpolicies" => Some(Kind::AdminNetworkPolicy),
            "banp" | "baselineadminnetworkpolicies" => Some(Kind::BaselineAdminNetworkPolicy),
            "cnp" | "clusternetworkpolicies" => Some(Kind::ClusterNetworkPolicy),
            "switchpolicies" => Some(Kind::SwitchPolicy),
            "ns" => Some(Kind::Namespace),
            "po" => Some(Kind::Pod),
            "no" => Some(Kind::Node),
            _ => None,
        };
        short.or_else(|| {
            Kind::ALL.into_iter().find(|kind| {
                let name = kind.name().to_ascii_lowercase();
                word == name || word == format!("{name}s")
            })
        })
    }

    /// True if its objects have namespaces.
    pub fn is_namespaced(self) -> bool {
        matches!(self, Kind::NetworkPolicy | Kind::Pod)
    }
}

/// What a document says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// A policy.
    Policy(Policy),
    /// A tier.
    Tier(Tier),
    /// A namespace's labels.
    Namespace(Labels),
    /// A pod or a node.
    Endpoint(EndpointObject),
}

/// A pod or a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointObject {
    /// What policies may ask of it.
    pub facts: EndpointFacts,
    /// Its addresses, as far as they are known.
    pub addresses: Vec<IpAddr>,
}

/// An object, and what it was read from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Read {
    /// What it is called.
    pub id: crate::PolicyId,
    /// What it says.
    pub object: Object,
    /// Where it was written.
    pub source: Source,
    /// The document.
    pub value: Value,
    /// Lines of its rules.
    pub lines: Lines,
}

/// A text that was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{file}:{line}: {}{reason}", if path.is_empty() { String::new() } else { format!("{path}: ") })]
pub struct ReadError {
    /// The file, as the sender called it.
    pub file: String,
    /// Line, from 1.
    pub line: u32,
    /// The field.
    pub path: String,
    /// What is wrong, and what would be right.
    pub reason: String,
}

/// All objects of a text; those of a `List` one by one.
///
/// # Errors
///
/// The first thing that is wrong. Nothing is taken from such a text.
pub fn read(file: &str, text: &str) -> Result<Vec<Read>, ReadError> {
    let documents = text::documents(text).map_err(|refusal| ReadError {
        file: file.to_owned(),
        line: refusal.line,
        path: refusal.path,
        reason: refusal.reason,
    })?;
    let mut objects = Vec::new();
    for document in documents {
        for document in items(document) {
            objects.push(object(&Doc { file, document: &document })?);
        }
    }
    Ok(objects)
}

/// Reads an object again that was read before.
///
/// # Errors
///
/// As [`read`]; another version of the switch may have read it.
pub fn reread(file: &str, value: Value, lines: Lines) -> Result<Read, ReadError> {
    object(&Doc { file, document: &Document { value, lines } })
}

/// The documents of a list, or the one that is none.
fn items(document: Document) -> Vec<Document> {
    let is_list = document.value.get("kind").and_then(Value::as_str).is_some_and(|kind| kind.ends_with("List"));
    let Some(items) = document.value.get("items").and_then(Value::as_array).filter(|_| is_list) else {
        return vec![document];
    };
    let item = |(at, value): (usize, &Value)| {
        let prefix = format!("items[{at}]");
        let of_item = document.lines.range(prefix.clone()..).take_while(|(path, _)| path.starts_with(&prefix));
        let lines = of_item.map(|(path, line)| (path[prefix.len()..].trim_start_matches('.').to_owned(), *line));
        Document { value: value.clone(), lines: lines.collect() }
    };
    items.iter().enumerate().map(item).collect()
}

fn object(doc: &Doc<'_>) -> Result<Read, ReadError> {
    let word = |field: &str| doc.document.value.get(field).and_then(Value::as_str);
    let Some(name) = word("kind") else {
        return Err(doc.refuse("kind", "an object has `apiVersion` and `kind`"));
    };
    let kind = Kind::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| {
        let known = Kind::ALL.map(Kind::name).join(", ");
        doc.refuse("kind", format!("\"{name}\" is not known here; known are {known}"))
    })?;
    let version = word("apiVersion").unwrap_or_default();
    if version != kind.api_version() {
        let right = kind.api_version();
        return Err(doc.refuse("apiVersion", format!("\"{version}\" of {name} is not read here, {right} is")));
    }
    let metadata = doc.metadata(kind)?;
    let id = crate::PolicyId { kind, namespace: metadata.namespace.clone(), name: metadata.name.clone() };
    let object = match kind {
        Kind::NetworkPolicy => network_policy::read(doc, id.clone())?,
        Kind::AdminNetworkPolicy => admin::read(doc, id.clone())?,
        Kind::BaselineAdminNetworkPolicy => admin::read_baseline(doc, id.clone())?,
        Kind::ClusterNetworkPolicy => cluster::read(doc, id.clone())?,
        Kind::SwitchPolicy => switch::read(doc, id.clone())?,
        Kind::Tier => switch::read_tier(doc, &id)?,
        Kind::Namespace => inventory::namespace(doc, &id)?,
        Kind::Pod => inventory::pod(doc, &id)?,
        Kind::Node => inventory::node(doc)?,
    };
    let is_kept = |path: &str| path.is_empty() || (path.starts_with("spec.") && path.matches('.').count() == 1);
    let lines = doc.document.lines.iter().filter(|(path, _)| is_kept(path));
    Ok(Read {
        id,
        object,
        source: doc.source(),
        value: doc.document.value.clone(),
        lines: lines.map(|(path, line)| (path.clone(), *line)).collect(),
    })
}

/// A document on its way to an object.
pub(crate) struct Doc<'a> {
    pub(crate) file: &'a str,
    pub(crate) document: &'a Document,
}

/// What an object is called.
pub(crate) struct Metadata {
    namespace: Option<String>,
    name: String,
}

impl Doc<'_> {
    pub(crate) fn refuse(&self, path: &str, reason: impl Into<String>) -> ReadError {
        ReadError { file: self.file.to_owned(), line: self.line(path), path: path.to_owned(), reason: reason.into() }
    }

    pub(crate) fn line(&self, path: &str) -> u32 {
        line_of(&self.document.lines, path)
    }

    pub(crate) fn source(&self) -> Source {
        Source { file: self.file.to_owned(), line: self.line("") }
    }

    /// The document by its schema; fields that the schema does not have are refused, for one that is misspelt would select
    /// everybody.
    pub(crate) fn typed<T: DeserializeOwned + Serialize>(&self) -> Result<T, ReadError> {
        let mut value = self.document.value.clone();
        if let Some(fields) = value.as_object_mut() {
            // What others report about the object, where it has been used.
            fields.remove("status");
        }
        let typed: T = serde_path_to_error::deserialize(&value).map_err(|error| {
            let path = error.path().to_string();
            self.refuse(if path == "." { "" } else { &path }, error.inner().to_string())
        })?;
        let known = serde_json::to_value(&typed).map_err(|error| self.refuse("", error.to_string()))?;
        match unknown_field(&value, &known, "") {
            Some(path) => Err(self.refuse(&path, "the schema has no such field")),
            None => Ok(typed),
        }
    }

    fn metadata(&self, kind: Kind) -> Result<Metadata, ReadError> {
        let field = |field: &str| match self.document.value.get("metadata").and_then(|data| data.get(field)) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(_) => Err(self.refuse(&format!("metadata.{field}"), "must be a word")),
        };
        let name = field("name")?.ok_or_else(|| self.refuse("metadata.name", "an object has a name"))?;
        self.check_name("metadata.name", &name)?;
        let namespace = field("namespace")?;
        if let Some(namespace) = &namespace {
            self.check_name("metadata.namespace", namespace)?;
        }
        let namespace = if kind.is_namespaced() { namespace.or_else(|| Some("default".to_owned())) } else { None };
        Ok(Metadata { namespace, name })
    }

    /// A DNS subdomain (RFC 1123), as Kubernetes' names are.
    fn check_name(&self, path: &str, name: &str) -> Result<(), ReadError> {
        let is_label = |label: &str| {
            let is_inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            !label.is_empty() && label.chars().all(is_inner) && !label.starts_with('-') && !label.ends_with('-')
        };
        if name.len() <= 253 && name.split('.').all(is_label) {
            return Ok(());
        }
        Err(self.refuse(path, format!("\"{name}\" is no name: use lower case letters, digits, '-' and '.'")))
    }
}

/// The first field of `value` that `known` does not have.
fn unknown_field(value: &Value, known: &Value, path: &str) -> Option<String> {
    match (value, known) {
        (Value::Object(fields), Value::Object(others)) => fields.iter().find_map(|(key, field)| {
            let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            match others.get(key) {
                Some(other) => unknown_field(field, other, &path),
                None if field.is_null() => None,
                None => Some(path),
            }
        }),
        (Value::Array(items), Value::Array(others)) => items
            .iter()
            .zip(others)
            .enumerate()
            .find_map(|(at, (item, other))| unknown_field(item, other, &format!("{path}[{at}]"))),
        _ => None,
    }
}
