//! Policy cases as data: a world of nine pods, policies, and who may reach whom.
//!
//! `tests/cases/README.md` describes the files. [`cases`] reads them; `tests/mem/policy_cases.rs` runs them with packets
//! in memory and `tests/netns/policy_cases.rs` with real sockets.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use vswitch_api::{EndpointSpec, NamedPort, PolicyDocument, Protocol, Request};

/// The namespaces, and the pods of each.
pub const NAMESPACES: [&str; 3] = ["x", "y", "z"];
/// See [`NAMESPACES`].
pub const PODS: [&str; 3] = ["a", "b", "c"];

/// More files, besides those in `tests/cases`, separated by colons.
pub const MORE_CASES: &str = "VSWITCH_CASES";

/// A pod of the world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its namespace.
    pub namespace: &'static str,
    /// Its name.
    pub name: &'static str,
    /// From 1 to 9.
    pub number: u8,
}

/// A protocol and port that every pod serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Service {
    /// The protocol.
    pub protocol: Protocol,
    /// The port.
    pub port: u16,
}

/// One case.
#[derive(Clone, Debug)]
pub struct Case {
    /// The file and the case's number or name there.
    pub name: String,
    /// The policies, as texts.
    pub policies: Vec<String>,
    /// The order of the marks.
    pub services: Vec<Service>,
    /// Whether the policies name IPv4 addresses, so that IPv6 is another matter.
    pub is_v4_only: bool,
    /// Who may reach whom.
    pub tables: Tables,
}

/// Marks by source and destination: true for allowed, in the order of the services.
type Table = BTreeMap<(u8, u8), Vec<bool>>;

/// What is expected.
#[derive(Clone, Debug, Default)]
pub struct Tables {
    /// By the policies of who answers.
    pub ingress: Option<Table>,
    /// By the policies of who begins.
    pub egress: Option<Table>,
    /// By both.
    pub combined: Table,
}

/// A line of a `.jsonl` file, as the reference evaluator writes it.
#[derive(Deserialize)]
struct Line {
    case: serde_json::Value,
    name: String,
    steps: Vec<Step>,
}

#[derive(Deserialize)]
struct Step {
    policies: Vec<String>,
    ports: Vec<String>,
    expected_ingress: Option<Marks>,
    expected_egress: Option<Marks>,
    expected_combined: Marks,
}

type Marks = BTreeMap<String, BTreeMap<String, String>>;

/// A case of a `.json` file: statements, of which the last that speaks of a connection counts.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    name: String,
    policies: Vec<String>,
    #[serde(default)]
    v4_only: bool,
    expect: Vec<Statement>,
}

/// From whom, to whom and for what; `*` stands for all, `x/*` for a namespace.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Statement {
    #[serde(default = "all")]
    from: String,
    #[serde(default = "all")]
    to: String,
    #[serde(default = "all")]
    ports: String,
    is: String,
}

fn all() -> String {
    "*".to_owned()
}

impl Pod {
    /// `x/a`.
    pub fn title(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Its IPv4 and its IPv6 address.
    pub fn addresses(&self) -> [String; 2] {
        [format!("192.168.1.{}", self.number), format!("fd00:192:168:1::{:x}", self.number)]
    }

    /// What is told of it.
    pub fn endpoint(&self) -> EndpointSpec {
        EndpointSpec {
            namespace: Some(self.namespace.to_owned()),
            name: self.name.to_owned(),
            network: None,
            labels: BTreeMap::from([("pod".to_owned(), self.name.to_owned())]),
            addresses: Vec::new(),
            ports: services().map(Service::named).to_vec(),
        }
    }
}

impl Service {
    /// As policies name it.
    fn named(self) -> NamedPort {
        NamedPort {
            name: format!("serve-{}-{}", self.port, self.protocol.name()),
            protocol: self.protocol,
            port: self.port,
        }
    }

    /// As `policy_explain` takes it.
    pub fn text(self) -> String {
        format!("{}/{}", self.protocol.name(), self.port)
    }
}

/// The nine pods.
pub fn world() -> Vec<Pod> {
    let all = NAMESPACES.iter().flat_map(|&namespace| PODS.iter().map(move |&name| (namespace, name)));
    all.zip(1..).map(|((namespace, name), number)| Pod { namespace, name, number }).collect()
}

/// What every pod serves.
pub fn services() -> [Service; 6] {
    let of = |protocol| [80, 81].map(|port| Service { protocol, port });
    let [[a, b], [c, d], [e, f]] = [Protocol::Sctp, Protocol::Tcp, Protocol::Udp].map(of);
    [a, b, c, d, e, f]
}

/// The namespaces' labels and the pods', as requests.
pub fn inventory() -> Vec<Request> {
    let namespace = |name: &&str| {
        format!("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {name}\n  labels:\n    ns: \"{name}\"\n")
    };
    let text = NAMESPACES.iter().map(namespace).collect::<Vec<_>>().join("---\n");
    let document = PolicyDocument { file: "world".to_owned(), text };
    let endpoints = world().iter().map(Pod::endpoint).collect();
    vec![Request::PolicyApply { documents: vec![document], dry_run: false }, Request::EndpointSet { endpoints }]
}

impl Case {
    /// The policies as one request.
    pub fn apply(&self) -> Request {
        let document =
            |(at, text): (usize, &String)| PolicyDocument { file: format!("policy {at}"), text: text.clone() };
        Request::PolicyApply { documents: self.policies.iter().enumerate().map(document).collect(), dry_run: false }
    }
}

/// All cases of the files in `tests/cases`, and of those that [`MORE_CASES`] names.
///
/// # Panics
///
/// If a file is not as `tests/cases/README.md` says.
pub fn cases() -> Vec<Case> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("cases");
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(&own).expect("tests/cases").map(|entry| entry.expect("an entry").path()).collect();
    files.retain(|file| file.extension().is_some_and(|end| end == "jsonl" || end == "json"));
    files.sort();
    let more = std::env::var_os(MORE_CASES).unwrap_or_default();
    files.extend(std::env::split_paths(&more).filter(|path| !path.as_os_str().is_empty()));
    files.iter().flat_map(|file| read(file)).collect()
}

fn read(path: &Path) -> Vec<Case> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    if path.extension().is_some_and(|end| end == "json") {
        let written: Vec<Written> =
            serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        return written.into_iter().map(|case| case.expand(&file)).collect();
    }
    let line = |(at, line): (usize, &str)| {
        let line: Line =
            serde_json::from_str(line).unwrap_or_else(|error| panic!("{}:{}: {error}", path.display(), at + 1));
        line.steps
            .into_iter()
            .map(|step| step.case(&format!("{file} {}: {}", line.case, line.name)))
            .collect::<Vec<_>>()
    };
    text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).flat_map(line).collect()
}

impl Step {
    fn case(self, name: &str) -> Case {
        Case {
            name: name.to_owned(),
            is_v4_only: self.policies.iter().any(|policy| policy.contains("ipBlock")),
            policies: self.policies.iter().map(|text| as_object(text)).collect(),
            services: self.ports.iter().map(|port| service(port)).collect(),
            tables: Tables {
                ingress: self.expected_ingress.as_ref().map(table),
                egress: self.expected_egress.as_ref().map(table),
                combined: table(&self.expected_combined),
            },
        }
    }
}

impl Written {
    fn expand(self, file: &str) -> Case {
        let pods = world();
        let is_meant = |words: &str, pod: &Pod| {
            words
                .split_whitespace()
                .any(|word| word == "*" || word == pod.title() || word.strip_suffix("/*") == Some(pod.namespace))
        };
        let mut combined = Table::new();
        for from in &pods {
            for to in &pods {
                let mark = |service: &Service| {
                    let of_service = |words: &str| {
                        words.split_whitespace().any(|word| {
                            let (protocol, port) = word.split_once('/').unwrap_or((word, "*"));
                            let is_protocol = protocol == "*" || protocol.eq_ignore_ascii_case(service.protocol.name());
                            is_protocol && (port == "*" || port == service.port.to_string())
                        })
                    };
                    let spoken = self.expect.iter().rev().find(|statement| {
                        is_meant(&statement.from, from) && is_meant(&statement.to, to) && of_service(&statement.ports)
                    });
                    match spoken.map_or("allowed", |statement| &statement.is) {
                        "allowed" => true,
                        "denied" => false,
                        other => panic!("{file}: {}: \"{other}\" is neither allowed nor denied", self.name),
                    }
                };
                combined.insert((from.number, to.number), services().iter().map(mark).collect());
            }
        }
        Case {
            name: format!("{file}: {}", self.name),
            policies: self.policies,
            services: services().to_vec(),
            is_v4_only: self.v4_only,
            tables: Tables { ingress: None, egress: None, combined },
        }
    }
}

fn table(marks: &Marks) -> Table {
    let number = |title: &str| {
        let pod = world().into_iter().find(|pod| pod.title() == title);
        pod.unwrap_or_else(|| panic!("no pod {title} in the world")).number
    };
    let mut table = Table::new();
    for (from, row) in marks {
        for (to, marks) in row {
            let mark = |mark: char| match mark {
                '.' => true,
                'X' => false,
                other => panic!("'{other}' is no mark"),
            };
            table.insert((number(from), number(to)), marks.chars().map(mark).collect());
        }
    }
    assert_eq!(table.len(), 81, "a table has a mark for every pair");
    table
}

/// A policy of the evaluator as an object: its own remark on a case ("0 wrong, 0 ignored, 81 correct") stands behind some,
/// and some do not say what they are.
fn as_object(policy: &str) -> String {
    let is_remark = |line: &&str| line.contains(" wrong, ") && line.ends_with(" correct");
    let mut lines: Vec<&str> = policy.lines().filter(|line| !is_remark(line)).collect();
    if !lines.iter().any(|line| line.starts_with("kind:")) {
        lines.splice(0..0, ["apiVersion: networking.k8s.io/v1", "kind: NetworkPolicy"]);
    }
    lines.join("\n")
}

fn service(text: &str) -> Service {
    let (protocol, port) = text.split_once('/').unwrap_or_else(|| panic!("\"{text}\" is no port"));
    let protocol = serde_json::from_value(protocol.to_lowercase().into()).expect("a protocol");
    Service { protocol, port: port.parse().expect("a port") }
}
