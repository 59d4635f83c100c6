//! Policies, endpoints, connections and flow events: their commands, and how the answers look.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use clap::{ArgGroup, Args, Subcommand};
use saphyr::{Mapping, Scalar, Yaml, YamlEmitter};
use serde_json::Value;
use similar::TextDiff;
use vswitch_api::{
    Answer, ChangeInfo, Client, ConnectionFilter, ConnectionsInfo, EndpointInfo, EndpointName, EndpointSpec,
    ExplainInfo, ExplainSpec, FlowEvent, MAX_LINE_BYTES, NamedPort, ObjectName, ObserveFilter, PolicyDetail,
    PolicyDocument, PolicyInfo, Protocol, Request,
};

use crate::arguments::{Format, parse_label};
use crate::output::{ends, or_dash, row, table};

/// How often `observe` asks for what is new.
const OBSERVE_INTERVAL: Duration = Duration::from_millis(200);

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// All objects: policies in the order that they are asked in, then tiers, namespaces, pods and nodes.
    List,
    /// One object: its rules with what they did, the ports here that it is about, and its text.
    Show(Name),
    /// Adds and replaces the objects of files: all of them, or none.
    Apply {
        /// A file, a directory of *.yaml, *.yml and *.json, or - for standard input; may be repeated.
        #[arg(short, long = "file", value_name = "FILE", required = true)]
        files: Vec<PathBuf>,
    },
    /// Removes objects: one by name, or those that files name.
    #[command(group(ArgGroup::new("which").required(true).args(["kind", "files"])))]
    Delete {
        /// Its kind, as NetworkPolicy or netpol.
        #[arg(requires = "name")]
        kind: Option<String>,
        /// Its name.
        name: Option<String>,
        /// Its namespace, for kinds that have one.
        #[arg(short, long, default_value = "default")]
        namespace: String,
        /// Files with the objects to remove.
        #[arg(short, long = "file", value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// What `apply` would change.
    Diff {
        /// As for `apply`.
        #[arg(short, long = "file", value_name = "FILE", required = true)]
        files: Vec<PathBuf>,
    },
    /// Whether a connection may begin: the verdict, the rule, its file and line, and what would have to change.
    Explain {
        /// Who begins: NAMESPACE/POD, a link, an address, or host.
        #[arg(long)]
        from: String,
        /// Who answers.
        #[arg(long)]
        to: String,
        /// What for: tcp/80, udp/53, sctp/7, icmp, icmp/8/0, or a protocol's number.
        #[arg(long)]
        port: String,
        /// Show every rule that was looked at, too.
        #[arg(long, short)]
        verbose: bool,
    },
}

/// What an object is called.
#[derive(Debug, Args)]
pub(crate) struct Name {
    /// Its kind, as NetworkPolicy or netpol.
    kind: String,
    /// Its name.
    name: String,
    /// Its namespace, for kinds that have one.
    #[arg(short, long, default_value = "default")]
    namespace: String,
}

#[derive(Debug, Subcommand)]
pub(crate) enum EndpointCommand {
    /// All pods and nodes that policies know, with their identities.
    List,
    /// Tells of a pod, here or elsewhere, or replaces what was told.
    Set(EndpointSet),
    /// Forgets a pod or a node.
    Del {
        /// NAMESPACE/POD, or the name of a node.
        name: String,
    },
}

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("which").required(true).args(["name", "file"])))]
pub(crate) struct EndpointSet {
    /// NAMESPACE/POD, or the name of a node.
    name: Option<String>,
    /// A file with a JSON list of endpoints as `endpoint list -o json` names their fields, or - for standard input.
    #[arg(short, long, conflicts_with_all = ["labels", "ips", "ports", "network"])]
    file: Option<PathBuf>,
    /// A label; may be repeated.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = parse_label)]
    labels: Vec<(String, String)>,
    /// An address; those of a pod here are known.
    #[arg(long = "ip", value_name = "ADDRESS")]
    ips: Vec<IpAddr>,
    /// A port with a name, as http=tcp/8080.
    #[arg(long = "named-port", value_name = "NAME=PROTOCOL/PORT", value_parser = named_port)]
    ports: Vec<NamedPort>,
    /// The network of its addresses; the first one unless named.
    #[arg(long)]
    network: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConnectionCommand {
    /// Connections, and the table that they are in.
    List {
        #[command(flatten)]
        filter: Filter,
        /// Most to show.
        #[arg(long, default_value_t = 1000)]
        limit: usize,
    },
    /// Forgets connections. Between ends with policies TCP must then begin anew.
    Delete {
        #[command(flatten)]
        filter: Filter,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Filter {
    /// Of a network.
    #[arg(long)]
    network: Option<String>,
    /// With an end of this address.
    #[arg(long)]
    address: Option<IpAddr>,
    /// With an end of this port; with --address, the same end.
    #[arg(long)]
    port: Option<u16>,
    /// Of a protocol: tcp, udp, sctp, icmp, icmpv6 or a number.
    #[arg(long)]
    protocol: Option<String>,
    /// In a state, as established or syn-sent.
    #[arg(long)]
    state: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Observe {
    /// Of NAMESPACE/POD, of a namespace (NAMESPACE/), a link, an address, or host.
    #[arg(long)]
    endpoint: Option<String>,
    /// denied or allowed.
    #[arg(long)]
    verdict: Option<String>,
    /// Dropped for a reason, as `drops` names them.
    #[arg(long)]
    reason: Option<String>,
    /// Print what is known and end, instead of waiting for more.
    #[arg(long)]
    last: bool,
}

impl Filter {
    fn request(&self) -> ConnectionFilter {
        ConnectionFilter {
            network: self.network.clone(),
            address: self.address,
            port: self.port,
            protocol: self.protocol.clone(),
            state: self.state.clone(),
        }
    }
}

impl Name {
    fn object(&self) -> ObjectName {
        object_name(&self.kind, &self.namespace, &self.name)
    }
}

/// A name as it is asked for, or as `list` prints it: NAMESPACE/NAME.
fn object_name(kind: &str, namespace: &str, name: &str) -> ObjectName {
    let (namespace, name) = name.split_once('/').unwrap_or((namespace, name));
    ObjectName { kind: kind.to_owned(), namespace: Some(namespace.to_owned()), name: name.to_owned() }
}

/// Sends what a command asks.
pub(crate) fn policy(client: &mut Client, command: &PolicyCommand) -> anyhow::Result<Answer> {
    let request = match command {
        PolicyCommand::List => Request::PolicyList,
        PolicyCommand::Show(name) => Request::PolicyShow(name.object()),
        PolicyCommand::Apply { files } => Request::PolicyApply { documents: documents(files)?, dry_run: false },
        PolicyCommand::Diff { files } => Request::PolicyApply { documents: documents(files)?, dry_run: true },
        PolicyCommand::Delete { kind: Some(kind), name, namespace, .. } => {
            let object = object_name(kind, namespace, name.as_deref().unwrap_or_default());
            Request::PolicyDelete { objects: vec![object] }
        }
        PolicyCommand::Delete { files, .. } => {
            // The daemon reads the texts; here only the names are wanted.
            let read = Request::PolicyApply { documents: documents(files)?, dry_run: true };
            let Answer::Changes { changes } = client.call(read)? else {
                anyhow::bail!("the daemon answered something else")
            };
            Request::PolicyDelete { objects: changes.into_iter().map(|change| change.name).collect() }
        }
        PolicyCommand::Explain { from, to, port, .. } => {
            Request::PolicyExplain(ExplainSpec { from: from.clone(), to: to.clone(), port: port.clone() })
        }
    };
    Ok(client.call(request)?)
}

/// Sends what a command asks.
pub(crate) fn endpoint(client: &mut Client, command: &EndpointCommand) -> anyhow::Result<Answer> {
    let request = match command {
        EndpointCommand::List => Request::EndpointList,
        EndpointCommand::Set(set) => Request::EndpointSet { endpoints: set.endpoints()? },
        EndpointCommand::Del { name } => Request::EndpointDel { endpoints: vec![endpoint_name(name)] },
    };
    Ok(client.call(request)?)
}

/// Sends what a command asks.
pub(crate) fn connection(client: &mut Client, command: &ConnectionCommand) -> anyhow::Result<Answer> {
    let request = match command {
        ConnectionCommand::List { filter, limit } => {
            Request::ConnectionList { filter: filter.request(), limit: *limit }
        }
        ConnectionCommand::Delete { filter } => Request::ConnectionDel { filter: filter.request() },
    };
    Ok(client.call(request)?)
}

/// Prints flow events as they come, until the daemon or the reader is gone.
pub(crate) fn observe(client: &mut Client, observe: &Observe, format: Format) -> anyhow::Result<()> {
    let filter = ObserveFilter {
        endpoint: observe.endpoint.clone(),
        verdict: observe.verdict.clone(),
        reason: observe.reason.clone(),
    };
    let (mut after, mut known_lost) = (None, None);
    loop {
        let Answer::Events { events, last, lost } = client.call(Request::Observe { after, filter: filter.clone() })?
        else {
            anyhow::bail!("the daemon answered something else")
        };
        let mut out = io::stdout().lock();
        for event in &events {
            match format {
                Format::Json => writeln!(out, "{}", serde_json::to_string(event)?)?,
                Format::Text => print_event(&mut out, event)?,
            }
        }
        let before = known_lost.replace(lost).unwrap_or(if observe.last { 0 } else { lost });
        if lost > before {
            eprintln!("{} more that were not told: too many at once", lost - before);
        }
        out.flush()?;
        drop(out);
        if observe.last {
            return Ok(());
        }
        after = Some(last);
        #[expect(clippy::disallowed_methods, reason = "somebody watches; nothing waits for this")]
        std::thread::sleep(OBSERVE_INTERVAL);
    }
}

impl EndpointSet {
    fn endpoints(&self) -> anyhow::Result<Vec<EndpointSpec>> {
        if let Some(file) = &self.file {
            let text = read(file)?;
            return endpoints_of(&text).with_context(|| {
                format!("{}: no list of endpoints, as [{{\"namespace\":\"x\",\"name\":\"a\"}}]", file.display())
            });
        }
        let EndpointName { namespace, name } = endpoint_name(self.name.as_deref().unwrap_or_default());
        Ok(vec![EndpointSpec {
            namespace,
            name,
            network: self.network.clone(),
            labels: self.labels.iter().cloned().collect(),
            addresses: self.ips.clone(),
            ports: self.ports.clone(),
        }])
    }
}

/// A list of endpoints, or what `endpoint list -o json` prints.
fn endpoints_of(text: &str) -> anyhow::Result<Vec<EndpointSpec>> {
    let value: Value = serde_json::from_str(text)?;
    let listed = value.get("endpoints").cloned().unwrap_or(value);
    let mut list: Vec<Value> = serde_json::from_value(listed)?;
    for endpoint in list.iter_mut().filter_map(Value::as_object_mut) {
        // What the list tells beside what can be told.
        ["identity", "link", "is_isolated"].iter().for_each(|field| drop(endpoint.remove(*field)));
    }
    Ok(serde_json::from_value(Value::Array(list))?)
}

fn endpoint_name(text: &str) -> EndpointName {
    match text.split_once('/') {
        Some((namespace, name)) => EndpointName { namespace: Some(namespace.to_owned()), name: name.to_owned() },
        None => EndpointName { namespace: None, name: text.to_owned() },
    }
}

/// `NAME=PROTOCOL/PORT`.
pub(crate) fn named_port(text: &str) -> Result<NamedPort, String> {
    const WRONG: &str = "write NAME=PROTOCOL/PORT, as http=tcp/8080";
    let (name, port) = text.split_once('=').ok_or(WRONG)?;
    let (protocol, port) = port.split_once('/').ok_or(WRONG)?;
    let protocol: Protocol = serde_json::from_value(protocol.into()).map_err(|_| WRONG)?;
    Ok(NamedPort { name: name.to_owned(), protocol, port: port.parse().map_err(|_| WRONG)? })
}

/// The texts of files, and of the files of directories.
fn documents(paths: &[PathBuf]) -> anyhow::Result<Vec<PolicyDocument>> {
    let mut all = Vec::new();
    for path in paths {
        if !path.is_dir() {
            all.push(PolicyDocument { file: path.display().to_string(), text: read(path)? });
            continue;
        }
        let entries = fs::read_dir(path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut files: Vec<PathBuf> = entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
        files.retain(|file| matches!(file.extension().and_then(|end| end.to_str()), Some("yaml" | "yml" | "json")));
        files.sort();
        anyhow::ensure!(!files.is_empty(), "no *.yaml, *.yml or *.json in {}", path.display());
        for file in files {
            all.push(PolicyDocument { text: read(&file)?, file: file.display().to_string() });
        }
    }
    let bytes: usize = all.iter().map(|document| document.text.len()).sum();
    // Quotes and line ends take more room in a request.
    let most = MAX_LINE_BYTES * 3 / 4;
    anyhow::ensure!(bytes < most, "{bytes} bytes of objects are too many at once: at most {most}; apply them in parts");
    Ok(all)
}

fn read(path: &Path) -> anyhow::Result<String> {
    if path == Path::new("-") {
        let mut text = String::new();
        io::stdin().read_to_string(&mut text).context("cannot read standard input")?;
        return Ok(text);
    }
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Prints an answer about policies; false if it is about something else.
pub(crate) fn print(out: &mut impl Write, answer: &Answer, is_verbose: bool) -> io::Result<bool> {
    match answer {
        Answer::Changes { changes } => changes.iter().try_for_each(|change| print_change(out, change, is_verbose))?,
        Answer::Policies { policies } => table(
            out,
            ["KIND", "NAME", "TIER", "ORDER", "SUBJECT", "INGRESS", "EGRESS", "PORTS", "ALLOWED", "DENIED", "FROM"],
            policies.iter().map(policy_row),
        )?,
        Answer::Policy(policy) => print_policy(out, policy)?,
        Answer::Explained(explained) => print_explained(out, explained, is_verbose)?,
        Answer::Endpoints { endpoints } => table(
            out,
            ["ENDPOINT", "IDENTITY", "LINK", "NETWORK", "ADDRESSES", "LABELS", "NAMED PORTS", "POLICIES FOR"],
            endpoints.iter().map(endpoint_row),
        )?,
        Answer::Connections(info) => print_connections(out, info)?,
        Answer::Forgotten { count } => writeln!(out, "{count} connections forgotten")?,
        _ => return Ok(false),
    }
    Ok(true)
}

fn policy_row(policy: &PolicyInfo) -> Vec<String> {
    let name = match &policy.name.namespace {
        Some(namespace) => format!("{namespace}/{}", policy.name.name),
        None => policy.name.name.clone(),
    };
    row([
        &policy.name.kind,
        &name,
        &or_dash(policy.tier.as_deref()),
        &or_dash(policy.order),
        &policy.subject,
        &or_dash(policy.ingress),
        &or_dash(policy.egress),
        &policy.ports,
        &policy.connections,
        &policy.denied,
        &format!("{}:{}", policy.file, policy.line),
    ])
}

fn endpoint_row(endpoint: &EndpointInfo) -> Vec<String> {
    let labels: Vec<String> = endpoint.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let ports: Vec<String> =
        endpoint.ports.iter().map(|port| format!("{}={}/{}", port.name, port.protocol.name(), port.port)).collect();
    let addresses: Vec<String> = endpoint.addresses.iter().map(ToString::to_string).collect();
    let isolated = match endpoint.is_isolated {
        [true, true] => "both",
        [true, false] => "ingress",
        [false, true] => "egress",
        [false, false] => "-",
    };
    row([
        &endpoint.name,
        &endpoint.identity,
        &or_dash(endpoint.link.as_deref()),
        &endpoint.network,
        &addresses.join(","),
        &labels.join(","),
        &ports.join(","),
        &isolated,
    ])
}

fn print_change(out: &mut impl Write, change: &ChangeInfo, is_diff: bool) -> io::Result<()> {
    let word = if is_diff && change.change != "unchanged" { "would be " } else { "" };
    writeln!(out, "{} {word}{}", change.name, change.change)?;
    if !is_diff || change.change == "unchanged" {
        return Ok(());
    }
    let text = |value: &Option<Value>| value.as_ref().map(to_yaml).unwrap_or_default();
    let (before, after) = (text(&change.before), text(&change.after));
    write!(out, "{}", TextDiff::from_lines(&before, &after).unified_diff().context_radius(3))
}

fn print_policy(out: &mut impl Write, policy: &PolicyDetail) -> io::Result<()> {
    let PolicyInfo { name, file, line, tier, order, subject, connections, denied, .. } = &policy.info;
    writeln!(out, "{name}, from {file}:{line}")?;
    if let (Some(tier), Some(order)) = (tier, order) {
        writeln!(out, "  tier {tier}, order {order}; for {subject}")?;
        let links = if policy.links.is_empty() { "none".to_owned() } else { policy.links.join(", ") };
        writeln!(out, "  ports here: {links}")?;
        writeln!(out, "  {connections} connections allowed, {denied} packets denied")?;
    }
    if !policy.rules.is_empty() {
        let rules = policy.rules.iter().map(|rule| {
            row([&rule.path, &rule.line, &rule.action, &or_dash(rule.name.as_deref()), &rule.connections, &rule.denied])
        });
        table(out, ["RULE", "LINE", "ACTION", "NAME", "ALLOWED", "DENIED"], rules)?;
    }
    write!(out, "{}", to_yaml(&policy.object))
}

fn print_explained(out: &mut impl Write, explained: &ExplainInfo, is_verbose: bool) -> io::Result<()> {
    let ExplainInfo { is_allowed, from, to, port, ends, remedy } = explained;
    writeln!(out, "{}: {from} to {to}, {port}", if *is_allowed { "allowed" } else { "denied" })?;
    for end in ends {
        let verdict = if end.is_allowed { "allowed" } else { "denied" };
        writeln!(out, "  {} of {}: {verdict}: {}", end.direction, end.endpoint, end.reason)?;
        for rule in end.rules.iter().filter(|_| is_verbose) {
            let mark = if rule.is_match { '+' } else { '-' };
            writeln!(
                out,
                "    {mark} {} {} {} ({}:{}): {}",
                rule.action, rule.object, rule.path, rule.file, rule.line, rule.why
            )?;
        }
    }
    match remedy {
        Some(remedy) => writeln!(out, "  to allow it: {remedy}"),
        None => Ok(()),
    }
}

fn print_connections(out: &mut impl Write, info: &ConnectionsInfo) -> io::Result<()> {
    table(
        out,
        ["NETWORK", "PROTOCOL", "SOURCE", "DESTINATION", "STATE", "AGE", "IDLE", "EXPIRES", "RULES"],
        info.connections.iter().map(|one| {
            let state = if one.is_picked_up { format!("{}, picked up", one.state) } else { one.state.clone() };
            let [source, destination] = ends([&one.source, &one.destination], one.leaves_as.as_ref());
            row([
                &one.network,
                &one.protocol,
                &source,
                &destination,
                &state,
                &format!("{} s", one.age_seconds),
                &format!("{} s", one.idle_seconds),
                &format!("{} s", one.expires_seconds),
                &if one.rules.is_empty() { "-".to_owned() } else { one.rules.join("; ") },
            ])
        }),
    )?;
    writeln!(
        out,
        "{} of at most {} connections, {} KiB; {} made room unanswered, {} ended in silence",
        info.count,
        info.limit,
        info.memory_bytes >> 10,
        info.evicted,
        info.expired
    )
}

fn print_event(out: &mut impl Write, event: &FlowEvent) -> io::Result<()> {
    let FlowEvent { time_ms, verdict, from, source, to, destination, protocol, reason, rule, .. } = event;
    let (hours, minutes) = (time_ms / 3_600_000 % 24, time_ms / 60_000 % 60);
    let (seconds, ms) = (time_ms / 1000 % 60, time_ms % 1000);
    write!(out, "{hours:02}:{minutes:02}:{seconds:02}.{ms:03}Z {verdict} {protocol} ")?;
    write!(out, "{from} ({source}) -> {to} ({destination})")?;
    if let Some(reason) = reason {
        write!(out, ": {reason}")?;
    }
    match rule {
        Some(rule) => writeln!(out, ", {rule}"),
        None => writeln!(out),
    }
}

/// An object as people write it.
fn to_yaml(value: &Value) -> String {
    let mut text = String::new();
    // Writing into a string cannot fail.
    let _ = YamlEmitter::new(&mut text).dump(&yaml_of(value));
    let text = text.strip_prefix("---\n").unwrap_or(&text);
    format!("{text}\n")
}

fn yaml_of(value: &Value) -> Yaml<'_> {
    match value {
        Value::Null => Yaml::Value(Scalar::Null),
        Value::Bool(yes) => Yaml::Value(Scalar::Boolean(*yes)),
        Value::Number(number) => match number.as_i64() {
            Some(whole) => Yaml::Value(Scalar::Integer(whole)),
            None => Yaml::Value(Scalar::FloatingPoint(number.as_f64().unwrap_or_default().into())),
        },
        Value::String(text) => Yaml::Value(Scalar::String(text.into())),
        Value::Array(items) => Yaml::Sequence(items.iter().map(yaml_of).collect()),
        Value::Object(fields) => {
            let ordered: BTreeMap<usize, (&String, &Value)> = fields
                .iter()
                .enumerate()
                .map(|(at, field)| {
                    // Who an object is comes before what it says.
                    let place = ["apiVersion", "kind", "metadata"].iter().position(|first| first == field.0);
                    (place.unwrap_or(at + 3), field)
                })
                .collect();
            let mut mapping = Mapping::new();
            for (key, value) in ordered.into_values() {
                mapping.insert(Yaml::Value(Scalar::String(key.into())), yaml_of(value));
            }
            Yaml::Mapping(mapping)
        }
    }
}
