//! One manifest, from text to the objects of the directory.
//!
//! 1. YAML (any number of documents) or JSON becomes untyped documents, within a budget
//! 2. lists (`v1/List`, `PodList`, …) are opened; kinds that the directory does not use are passed over
//! 3. the fields it does not use are cut off, so that nothing in them can make a manifest malformed
//! 4. the rest is read with Kubernetes' own types, and checked
//!
//! A manifest is good or malformed as a whole. Touches nothing.

use std::net::IpAddr;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Id, NamedPort, Objects, Pod, Service, Slice, SliceEndpoint};
use crate::proto::directory::Protocol;

/// `kubectl get` of a large project is a few MiB; a file beyond this is not a manifest.
pub const MANIFEST_MAX: u64 = 16 * 1024 * 1024;
/// Nodes (mappings, sequences, scalars) of one file: a pod has about 500, a slice endpoint 10.
const NODES_MAX: usize = 4_000_000;
/// Documents of one file, where each object stands in a document of its own.
const DOCUMENTS_MAX: usize = 20_000;
/// Where an object does not name its namespace, Kubernetes takes this one.
const DEFAULT_NAMESPACE: &str = "default";
/// The label that ties a slice to its Service.
const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// Why a manifest is malformed. `Display` is for any log: it shows no name and no value; `Debug` does.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not YAML, or beyond the budget.
    #[error("not YAML: {0}")]
    Yaml(String),
    /// Not JSON.
    #[error("not JSON: {0}")]
    Json(String),
    /// No document at all: the output of a command that failed.
    #[error("it holds no object")]
    Empty,
    /// A document that is no Kubernetes object.
    #[error("a document has no apiVersion and kind")]
    NoKind,
    /// An object without a name.
    #[error("a {kind} has no metadata.name")]
    NoName {
        /// Its kind.
        kind: &'static str,
    },
    /// A list without its items: it was cut off.
    #[error("a {0} has no array of items")]
    Items(String),
    /// An object that does not have the shape of its kind.
    #[error("a {kind} does not have the shape of its kind")]
    Shape {
        /// Its kind.
        kind: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// A value that means nothing.
    #[error("a {kind} has a value that is not {expected}")]
    Value {
        /// The object's kind.
        kind: &'static str,
        /// The object's name.
        name: String,
        /// The value.
        value: String,
        /// What stands there in a good manifest.
        expected: &'static str,
    },
}

/// The syntax of a manifest, by its file's extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Syntax {
    /// `.yaml`, `.yml`.
    Yaml,
    /// `.json`.
    Json,
}

/// Reads one manifest.
///
/// # Errors
///
/// If any part of it is malformed.
pub fn parse(text: &[u8], syntax: Syntax) -> Result<Objects, ManifestError> {
    let mut objects = Objects::default();
    let documents = documents(text, syntax)?;
    if documents.iter().all(Value::is_null) {
        return Err(ManifestError::Empty);
    }
    for document in documents {
        add_document(document, None, &mut objects)?;
    }
    Ok(objects)
}

fn documents(text: &[u8], syntax: Syntax) -> Result<Vec<Value>, ManifestError> {
    match syntax {
        Syntax::Yaml => {
            // Without the snippet, which would carry the tenant's text into the log.
            let options = serde_saphyr::options! {
                with_snippet: false,
                strict_booleans: true,
                budget: serde_saphyr::budget! {
                    max_events: 2 * NODES_MAX,
                    max_nodes: NODES_MAX,
                    max_documents: DOCUMENTS_MAX,
                    max_aliases: 1_000,
                },
            };
            serde_saphyr::from_slice_multiple_with_options(text, options)
                .map_err(|error| ManifestError::Yaml(error.to_string()))
        }
        Syntax::Json => serde_json::Deserializer::from_slice(text)
            .into_iter()
            .collect::<Result<_, _>>()
            .map_err(|error| ManifestError::Json(error.to_string())),
    }
}

/// `inherited` is the (apiVersion, kind) that the items of a typed list leave out.
fn add_document(
    mut document: Value,
    inherited: Option<(&str, &str)>,
    objects: &mut Objects,
) -> Result<(), ManifestError> {
    if document.is_null() {
        return Ok(());
    }
    let field = |name| document.get(name).and_then(Value::as_str).map(str::to_owned);
    let (api_version, kind) = match (field("apiVersion"), field("kind"), inherited) {
        (Some(api_version), Some(kind), _) => (api_version, kind),
        (None, None, Some((api_version, kind))) => (api_version.to_owned(), kind.to_owned()),
        _ => return Err(ManifestError::NoKind),
    };
    match (api_version.as_str(), kind.as_str()) {
        ("v1", "Pod") => add_pod(document, objects),
        ("v1", "Service") => add_service(document, objects),
        ("v1", "Node") => add_node(document, objects),
        ("discovery.k8s.io/v1", "EndpointSlice") => add_slice(document, objects),
        _ => {
            let Some(item_kind) = kind.strip_suffix("List") else { return Ok(()) };
            let inherited = (!item_kind.is_empty()).then_some((api_version.as_str(), item_kind));
            match document.get_mut("items").map(Value::take) {
                Some(Value::Array(items)) => {
                    items.into_iter().try_for_each(|item| add_document(item, inherited, objects))
                }
                _ if ["", "Pod", "Service", "Node", "EndpointSlice"].contains(&item_kind) => {
                    Err(ManifestError::Items(kind))
                }
                _ => Ok(()),
            }
        }
    }
}

fn add_pod(mut value: Value, objects: &mut Objects) -> Result<(), ManifestError> {
    const KIND: &str = "Pod";
    let host_ports = host_ports(&mut value);
    keep(&mut value, "/spec", &["hostNetwork"]);
    keep(&mut value, "/status", &["phase", "podIP", "podIPs", "hostIP", "hostIPs"]);
    let pod: core::Pod = typed(KIND, value)?;
    let id = id(KIND, pod.metadata)?;
    let status = pod.status.unwrap_or_default();
    let pod_ips = status.pod_ips.unwrap_or_default().into_iter().map(|ip| ip.ip).chain(status.pod_ip);
    let host_ips = status.host_ips.unwrap_or_default().into_iter().map(|ip| ip.ip).chain(status.host_ip);
    let pod = Pod {
        host_network: pod.spec.and_then(|spec| spec.host_network).unwrap_or(false),
        live: matches!(status.phase.as_deref(), Some("Pending" | "Running")),
        addresses: addresses(KIND, &id, pod_ips)?,
        host_addresses: addresses(KIND, &id, host_ips)?,
        host_ports,
    };
    objects.pods.insert(id, pod);
    Ok(())
}

/// hostPorts of all containers; what does not have the shape of one is none.
fn host_ports(pod: &mut Value) -> Vec<(Protocol, u16)> {
    let lists = ["containers", "initContainers"].map(|kind| pod.pointer(&format!("/spec/{kind}")));
    let containers = lists.into_iter().flatten().filter_map(Value::as_array).flatten();
    let ports = containers.filter_map(|container| container.get("ports")?.as_array()).flatten();
    ports
        .filter_map(|port| {
            let number = u16::try_from(port.get("hostPort")?.as_u64()?).ok().filter(|port| *port > 0)?;
            let protocol = port.get("protocol").and_then(Value::as_str);
            Some((transport(protocol)?, number))
        })
        .collect()
}

fn add_service(value: Value, objects: &mut Objects) -> Result<(), ManifestError> {
    const KIND: &str = "Service";
    let service: core::Service = typed(KIND, value)?;
    let id = id(KIND, service.metadata)?;
    let spec = service.spec.unwrap_or_default();
    let ingress = service.status.and_then(|status| status.load_balancer?.ingress).unwrap_or_default();
    let (proxied, ingress): (Vec<_>, Vec<_>) =
        ingress.into_iter().partition(|ingress| ingress.ip_mode.as_deref() == Some("Proxy"));
    let is_external_name = spec.type_.as_deref() == Some("ExternalName");
    let mut service = Service { is_external_name, ..Service::default() };
    if !is_external_name {
        let cluster_ips = spec.cluster_ips.unwrap_or_default().into_iter().chain(spec.cluster_ip);
        let cluster_ips = cluster_ips.filter(|ip| !matches!(ip.as_str(), "None" | ""));
        service.cluster_addresses = addresses(KIND, &id, cluster_ips)?;
        service.ingress_addresses = addresses(KIND, &id, ingress.into_iter().filter_map(|i| i.ip))?;
        service.proxied_addresses = addresses(KIND, &id, proxied.into_iter().filter_map(|i| i.ip))?;
        service.external_addresses = addresses(KIND, &id, spec.external_ips.unwrap_or_default())?;
    }
    for port in spec.ports.unwrap_or_default() {
        if let Some(number) = port.node_port.filter(|number| *number != 0) {
            let port = named_port(KIND, &id, None, port.protocol.clone(), number)?;
            service.node_ports.push((port.protocol, port.number));
        }
        service.ports.push(named_port(KIND, &id, port.name, port.protocol, port.port)?);
    }
    service.client_ip_affinity = spec.session_affinity.as_deref() == Some("ClientIP");
    objects.services.insert(id, service);
    Ok(())
}

fn add_node(mut value: Value, objects: &mut Objects) -> Result<(), ManifestError> {
    const KIND: &str = "Node";
    keep(&mut value, "/spec", &[]);
    keep(&mut value, "/status", &["addresses"]);
    let node: core::Node = typed(KIND, value)?;
    let name = id(KIND, node.metadata)?.name;
    let addresses = node.status.and_then(|status| status.addresses).unwrap_or_default();
    // The list holds host names too.
    objects.nodes.insert(name, addresses.iter().filter_map(|a| a.address.parse().ok()).collect());
    Ok(())
}

fn add_slice(value: Value, objects: &mut Objects) -> Result<(), ManifestError> {
    const KIND: &str = "EndpointSlice";
    let mut slice: discovery::EndpointSlice = typed(KIND, value)?;
    let service = slice.metadata.labels.take().and_then(|mut labels| labels.remove(SERVICE_NAME_LABEL));
    let id = id(KIND, slice.metadata)?;
    let ipv4 = match slice.address_type.as_str() {
        "IPv4" => true,
        "IPv6" => false,
        // Names are nobody's addresses.
        "FQDN" => return Ok(()),
        other => return Err(bad_value(KIND, &id, other, "IPv4, IPv6 or FQDN")),
    };
    // A slice of no Service has no VIP.
    let Some(service) = service else { return Ok(()) };
    let mut ports = Vec::new();
    for port in slice.ports.unwrap_or_default() {
        if let Some(number) = port.port {
            ports.push(named_port(KIND, &id, port.name, port.protocol, number)?);
        }
    }
    let mut endpoints = Vec::with_capacity(slice.endpoints.len());
    for endpoint in slice.endpoints {
        let addresses = addresses(KIND, &id, endpoint.addresses)?;
        if let Some(other) = addresses.iter().find(|address| address.is_ipv4() != ipv4) {
            return Err(bad_value(KIND, &id, &other.to_string(), "of the slice's addressType"));
        }
        let pod = endpoint.target_ref.filter(|target| target.kind.as_deref() == Some("Pod"));
        endpoints.push(SliceEndpoint {
            addresses,
            // Absent means ready (Kubernetes API reference, EndpointConditions).
            ready: endpoint.conditions.and_then(|c| c.ready).unwrap_or(true),
            pod: pod.map(|target| Id {
                namespace: target.namespace.unwrap_or_else(|| id.namespace.clone()),
                name: target.name.unwrap_or_default(),
            }),
        });
    }
    objects.slices.insert(id, Slice { service, ports, endpoints });
    Ok(())
}

/// Reads an object of which `metadata` is cut down to what identifies it.
fn typed<T: DeserializeOwned>(kind: &'static str, mut value: Value) -> Result<T, ManifestError> {
    keep(&mut value, "/metadata", &["name", "namespace", "labels"]);
    serde_json::from_value(value).map_err(|error| ManifestError::Shape { kind, reason: error.to_string() })
}

/// Removes every field but `fields` from the mapping at `pointer`.
fn keep(value: &mut Value, pointer: &str, fields: &[&str]) {
    if let Some(Value::Object(map)) = value.pointer_mut(pointer) {
        map.retain(|key, _| fields.contains(&key.as_str()));
    }
}

fn id(kind: &'static str, metadata: ObjectMeta) -> Result<Id, ManifestError> {
    let name = metadata.name.filter(|name| !name.is_empty()).ok_or(ManifestError::NoName { kind })?;
    Ok(Id { namespace: metadata.namespace.unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned()), name })
}

/// The addresses without repetitions, in their order.
fn addresses(
    kind: &'static str,
    id: &Id,
    texts: impl IntoIterator<Item = String>,
) -> Result<Vec<IpAddr>, ManifestError> {
    let mut addresses = Vec::new();
    for text in texts.into_iter().filter(|text| !text.is_empty()) {
        let address = text.parse().map_err(|_| bad_value(kind, id, &text, "an IP address"))?;
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    Ok(addresses)
}

fn named_port(
    kind: &'static str,
    id: &Id,
    name: Option<String>,
    protocol: Option<String>,
    number: i32,
) -> Result<NamedPort, ManifestError> {
    let protocol = transport(protocol.as_deref())
        .ok_or_else(|| bad_value(kind, id, protocol.as_deref().unwrap_or_default(), "TCP, UDP or SCTP"))?;
    match u16::try_from(number) {
        Ok(number) if number > 0 => Ok(NamedPort { name: name.unwrap_or_default(), protocol, number }),
        _ => Err(bad_value(kind, id, &number.to_string(), "a port")),
    }
}

fn transport(protocol: Option<&str>) -> Option<Protocol> {
    match protocol {
        None | Some("" | "TCP") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some("SCTP") => Some(Protocol::Sctp),
        Some(_) => None,
    }
}

fn bad_value(kind: &'static str, id: &Id, value: &str, expected: &'static str) -> ManifestError {
    ManifestError::Value { kind, name: id.name.clone(), value: value.to_owned(), expected }
}
