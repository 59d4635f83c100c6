//! What policies are about: namespaces, pods and nodes, as Kubernetes describes them.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use serde_json::Value;

use crate::PolicyId;
use crate::model::{EndpointFacts, NamedPort};
use crate::object::{Doc, EndpointObject, Object, ReadError};
use crate::selector::Labels;

/// The label that every namespace has.
const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

pub(crate) fn namespace(doc: &Doc<'_>, id: &PolicyId) -> Result<Object, ReadError> {
    let namespace: Namespace = doc.typed()?;
    let mut labels: Labels = namespace.metadata.labels.unwrap_or_default();
    labels.insert(NAMESPACE_NAME.to_owned(), id.name.clone());
    Ok(Object::Namespace(labels))
}

pub(crate) fn pod(doc: &Doc<'_>, id: &PolicyId) -> Result<Object, ReadError> {
    let pod: Pod = doc.typed()?;
    let mut ports = Vec::new();
    let spec = pod.spec.unwrap_or_default();
    for (at, container) in spec.containers.iter().enumerate() {
        for (which, port) in container.ports.iter().flatten().enumerate() {
            let path = format!("spec.containers[{at}].ports[{which}]");
            let protocol = doc.protocol(port.protocol.as_deref().unwrap_or("TCP"), &format!("{path}.protocol"))?;
            let number = doc.port(port.container_port, &format!("{path}.containerPort"))?;
            if let Some(name) = &port.name {
                ports.push(NamedPort { name: name.clone(), protocol, port: number });
            }
        }
    }
    ports.sort();
    ports.dedup();
    // Pods of the host's network have its addresses, and are no pods to policy.
    let is_of_host = spec.host_network.unwrap_or(false);
    // And those of one that has ended may be another's by now.
    let phase = doc.document.value.get("status").and_then(|status| status.get("phase")).and_then(Value::as_str);
    let has_ended = matches!(phase, Some("Succeeded" | "Failed"));
    let addresses = if is_of_host || has_ended { Vec::new() } else { addresses(doc, "podIPs", "ip")? };
    let facts =
        EndpointFacts { namespace: id.namespace.clone(), labels: pod.metadata.labels.unwrap_or_default(), ports };
    Ok(Object::Endpoint(EndpointObject { facts, addresses }))
}

pub(crate) fn node(doc: &Doc<'_>) -> Result<Object, ReadError> {
    let node: Node = doc.typed()?;
    let facts = EndpointFacts { namespace: None, labels: node.metadata.labels.unwrap_or_default(), ports: Vec::new() };
    Ok(Object::Endpoint(EndpointObject { facts, addresses: addresses(doc, "addresses", "address")? }))
}

/// Addresses out of the status, which [`Doc::typed`] leaves out. A node's may be names.
fn addresses(doc: &Doc<'_>, list: &str, field: &str) -> Result<Vec<IpAddr>, ReadError> {
    let Some(items) = doc.document.value.get("status").and_then(|status| status.get(list)).and_then(Value::as_array)
    else {
        return Ok(Vec::new());
    };
    let mut all = Vec::new();
    for (at, item) in items.iter().enumerate() {
        let text = item.get(field).and_then(Value::as_str).unwrap_or_default();
        let is_name = item.get("type").and_then(Value::as_str).is_some_and(|kind| !kind.ends_with("IP"));
        match text.parse() {
            Ok(address) => all.push(address),
            Err(_) if is_name => {}
            Err(_) => {
                let path = format!("status.{list}[{at}].{field}");
                return Err(doc.refuse(&path, format!("\"{text}\" is no address")));
            }
        }
    }
    Ok(all)
}
