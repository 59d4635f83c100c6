//! Policies as an operator meets them: refused whole, explained, counted, observed, kept over a restart; and this node as an
//! endpoint.

use std::collections::BTreeMap;

use vswitch_api::{
    Answer, ApiError, EndpointSpec, ErrorCode, ExplainInfo, ExplainSpec, FlowEvent, ObjectName, ObserveFilter,
    PolicyDetail, PolicyDocument, PolicyInfo, PortSpec, Request,
};
use vswitch_control::{Control, ControlConfig, Failsafe, HOST_PORT};
use vswitch_dataplane::DropReason;
use vswitch_net::{GATEWAY_MAC, MacAddr, PortId};
use vswitch_tests::frames::{Ends, Layer4, packet};
use vswitch_tests::mem::Switch;

use super::mac;

const HOST_MAC: MacAddr = MacAddr([2, 0, 0, 0, 9, 9]);
const SYN: Layer4 = Layer4::Tcp { flags: 2, seq: 1, ack: 0 };

fn network() -> &'static str {
    r#"{"op":"network_add","name":"pods","vni":7,"subnets":["10.0.0.0/8"],"router":["10.1.0.254"]}"#
}

/// Pods `web` and `db` of namespace `shop`, 10.1.0.1 and 10.1.0.2.
fn shop() -> (Switch, [PortId; 2]) {
    let mut switch = Switch::new();
    switch.ask_json(network()).unwrap();
    let ports = [("web", 1_u8), ("db", 2)].map(|(name, number)| add(&mut switch, name, number));
    (switch, ports)
}

fn add(switch: &mut Switch, name: &str, number: u8) -> PortId {
    let mut spec = PortSpec::new(format!("veth-{name}"), mac(number));
    spec.network = Some("pods".to_owned());
    spec.addresses = vec![address(number).parse().unwrap()];
    for (key, value) in [("K8S_POD_NAMESPACE", "shop"), ("K8S_POD_NAME", name), ("app", name)] {
        spec.labels.insert(key.to_owned(), value.to_owned());
    }
    match switch.ask(Request::PortAdd(spec)) {
        Answer::Port(info) => info.id,
        other => panic!("{other:?}"),
    }
}

fn address(number: u8) -> String {
    format!("10.1.0.{number}")
}

fn apply(switch: &mut Switch, text: &str) -> Result<Answer, ApiError> {
    let documents = vec![PolicyDocument { file: "shop.yaml".to_owned(), text: text.to_owned() }];
    switch.try_ask(Request::PolicyApply { documents, dry_run: false })
}

fn send(switch: &mut Switch, from: (PortId, u8), to: u8, ports: (u16, u16), layer4: Layer4) -> Option<DropReason> {
    let ends = Ends { from: mac(from.1), to: GATEWAY_MAC };
    switch.drop_of(from.0, &packet(ends, &address(from.1), &address(to), ports, layer4, b""))
}

fn explain(switch: &mut Switch, from: &str, to: &str, port: &str) -> ExplainInfo {
    let spec = ExplainSpec { from: from.to_owned(), to: to.to_owned(), port: port.to_owned() };
    match switch.ask(Request::PolicyExplain(spec)) {
        Answer::Explained(info) => *info,
        other => panic!("{other:?}"),
    }
}

fn show(switch: &mut Switch, kind: &str, name: &str) -> PolicyDetail {
    let name = ObjectName { kind: kind.to_owned(), namespace: Some("shop".to_owned()), name: name.to_owned() };
    match switch.ask(Request::PolicyShow(name)) {
        Answer::Policy(detail) => *detail,
        other => panic!("{other:?}"),
    }
}

fn list(switch: &mut Switch) -> Vec<PolicyInfo> {
    match switch.ask(Request::PolicyList) {
        Answer::Policies { policies } => policies,
        other => panic!("{other:?}"),
    }
}

fn observe(switch: &mut Switch, filter: ObserveFilter) -> Vec<FlowEvent> {
    match switch.ask(Request::Observe { after: None, filter }) {
        Answer::Events { events, .. } => events,
        other => panic!("{other:?}"),
    }
}

const DB: &str = "\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: db
  namespace: shop
spec:
  podSelector:
    matchLabels:
      app: db
  ingress:
  - from:
    - podSelector:
        matchLabels:
          app: web
    ports:
    - port: 5432
";

#[test]
fn what_is_wrong_is_refused_whole_with_file_line_and_field() {
    let (mut switch, _) = shop();
    apply(&mut switch, DB).unwrap();
    let before = (list(&mut switch), switch.control.take_snapshot().map(|snapshot| snapshot.generation));
    let wrong = |from: &str, to: &str| format!("{DB}---\n{}", DB.replace("name: db", "name: other").replace(from, to));
    let cases = [
        (wrong("app: web", "app: [web]"), "shop.yaml:31: spec.ingress[0].from[0].podSelector.matchLabels.app"),
        (wrong("podSelector:\n    match", "podSelektor:\n    match"), "shop.yaml:24: spec.podSelektor: the schema has no such field"),
        (wrong("matchLabels:\n          app: web", "matchLabel:\n          app: web"), "matchLabel: the schema has no such field"),
        (
            wrong("matchLabels:\n      app: db", "matchExpressions:\n    - {key: app, operator: Is, values: [db]}"),
            "shop.yaml:26: spec.podSelector.matchExpressions[0].operator: there is no operator \"Is\": use In, NotIn, Exists or DoesNotExist",
        ),
        (
            wrong("matchLabels:\n      app: db", "matchExpressions:\n    - {key: app, operator: In}"),
            "spec.podSelector.matchExpressions[0].values: In needs values",
        ),
        (
            wrong("matchLabels:\n      app: db", "matchExpressions:\n    - {key: app, operator: Exists, values: [x]}"),
            "Exists takes no values",
        ),
        (wrong("port: 5432", "port: 70000"), "shop.yaml:33: spec.ingress[0].ports[0].port: 70000 is not allowed; allowed are 1 to 65535"),
        (wrong("port: 5432", "port: Web"), "is no name of a port"),
        (wrong("port: 5432", "port: 80\n      endPort: 79"), "spec.ingress[0].ports[0].endPort: the range ends (79) before it begins (80)"),
        (wrong("port: 5432", "endPort: 79"), "a range needs its first port"),
        (wrong("port: 5432", "port: 1\n      protocol: ICMP"), "\"ICMP\" is not allowed: use TCP, UDP or SCTP"),
        (wrong("- podSelector:", "- ipBlock: {cidr: 10.0.0.0/33}\n      podSelector:"), "an ipBlock stands alone"),
        (
            wrong("- podSelector:\n        matchLabels:\n          app: web", "- ipBlock: {cidr: 10.0.0.0/33}"),
            "shop.yaml:29: spec.ingress[0].from[0].ipBlock.cidr: \"10.0.0.0/33\" is no prefix",
        ),
        (
            wrong("- podSelector:\n        matchLabels:\n          app: web", "- ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/16]}"),
            "11.0.0.0/16 lies not within 10.0.0.0/8",
        ),
        (wrong("- podSelector:\n        matchLabels:\n          app: web", "- {}"), "a peer has `podSelector`, `namespaceSelector` or `ipBlock`"),
        (wrong("kind: NetworkPolicy", "kind: NetworkPolice"), "shop.yaml:19: kind: \"NetworkPolice\" is not known here"),
        (wrong("networking.k8s.io/v1", "networking.k8s.io/v2"), "shop.yaml:18: apiVersion"),
        (wrong("namespace: shop", "namespace: Shop!"), "shop.yaml:22: metadata.namespace: \"Shop!\" is no name"),
        (wrong("spec:", "spec:\n  policyTypes: [Both]"), "spec.policyTypes[0]: \"Both\" is not allowed"),
        (format!("{DB}---\n{DB}"), "NetworkPolicy shop/db is there twice: also at shop.yaml:1"),
        (wrong("app: db", "app: db\n   x: [}"), "this is no YAML"),
        (String::new(), "there is no object in it"),
        ("kind: Tier\napiVersion: vswitch.io/v1alpha1\nmetadata: {name: admin}\nspec: {order: 1}\n".to_owned(), "is always there"),
        (
            "kind: SwitchPolicy\napiVersion: vswitch.io/v1alpha1\nmetadata: {name: x}\nspec: {tier: none, subject: {host: {}}}\n".to_owned(),
            "shop.yaml:4: spec.tier: there is no tier \"none\"",
        ),
        (
            "kind: ClusterNetworkPolicy\napiVersion: policy.networking.k8s.io/v1alpha2\nmetadata: {name: x}\nspec:\n  tier: Admin\n  priority: 1\n  subject: {namespaces: {}}\n  egress:\n  - action: Accept\n    to: [{domainNames: [example.org]}]\n".to_owned(),
            "shop.yaml:10: spec.egress[0].to[0].domainNames: peers by name are not known here",
        ),
        (
            "kind: AdminNetworkPolicy\napiVersion: policy.networking.k8s.io/v1alpha1\nmetadata: {name: x}\nspec: {priority: 1001, subject: {namespaces: {}}}\n".to_owned(),
            "spec.priority: 1001 is not allowed; allowed are 0 to 1000",
        ),
        (
            "kind: BaselineAdminNetworkPolicy\napiVersion: policy.networking.k8s.io/v1alpha1\nmetadata: {name: x}\nspec: {subject: {namespaces: {}}}\n".to_owned(),
            "its name is \"default\"",
        ),
    ];
    for (text, wanted) in cases {
        let error = apply(&mut switch, &text).unwrap_err();
        assert_eq!(error.code, ErrorCode::Invalid, "{error}");
        assert!(error.message.contains(wanted), "{} lacks {wanted}", error.message);
        assert!(!error.message.contains('\n'), "{error}");
    }
    let after = (list(&mut switch), switch.control.take_snapshot().map(|snapshot| snapshot.generation));
    assert_eq!(after, before, "the old generation is untouched");
}

#[test]
fn a_change_is_one_generation() {
    let (mut switch, _) = shop();
    let generation = |switch: &mut Switch| match switch.ask(Request::Status) {
        Answer::Status(status) => status.generation,
        other => panic!("{other:?}"),
    };
    let before = generation(&mut switch);
    let many: String = (0..50).map(|at| format!("---\n{}", DB.replace("name: db", &format!("name: db{at}")))).collect();
    apply(&mut switch, &many).unwrap();
    assert_eq!(generation(&mut switch), before + 1);
    let objects = list(&mut switch).into_iter().map(|policy| policy.name).collect();
    switch.ask(Request::PolicyDelete { objects });
    assert_eq!(generation(&mut switch), before + 2);
    assert_eq!(list(&mut switch), []);
}

#[test]
fn it_says_why_and_what_would_have_to_change() {
    let (mut switch, [web, db]) = shop();
    apply(&mut switch, DB).unwrap();
    let allowed = explain(&mut switch, "shop/web", "shop/db", "tcp/5432");
    assert!(allowed.is_allowed && allowed.remedy.is_none());
    let rule = allowed.ends[1].decided_by.clone().unwrap();
    assert_eq!((rule.path.as_str(), rule.line, rule.file.as_str()), ("spec.ingress[0]", 11, "shop.yaml"));
    assert_eq!(allowed.ends[0].reason, "no policy speaks of egress of shop/web");
    let denied = explain(&mut switch, "shop/web", "veth-db", "tcp/22");
    assert!(!denied.is_allowed);
    assert_eq!(denied.ends[1].reason, "isolated by NetworkPolicy shop/db, and no rule of tier networkpolicy allows it");
    assert_eq!(denied.ends[1].rules[0].why, "port: tcp/22 is none of tcp/5432");
    let remedy = denied.remedy.unwrap();
    assert!(remedy.starts_with("add tcp/22 to the ports of NetworkPolicy shop/db at shop.yaml:11"), "{remedy}");
    let stranger = explain(&mut switch, "10.77.0.1", "shop/db", "tcp/5432");
    assert_eq!(stranger.ends[1].rules[0].why, "peer: it is no pod");
    let own = explain(&mut switch, "shop/db", "shop/db", "icmp");
    assert_eq!(own.ends[1].rules[0].why, "peer: it does not have app=web");
    for (from, port, wanted) in [
        ("shop/nobody", "tcp/1", "from: there is no \"shop/nobody\""),
        ("shop/web", "tcp", "port: \"tcp\" is not understood"),
        ("shop/web", "tcp/80/1", "port:"),
        ("host", "tcp/80", "this node is in no network"),
    ] {
        let spec = ExplainSpec { from: from.to_owned(), to: "shop/db".to_owned(), port: port.to_owned() };
        let error = switch.try_ask(Request::PolicyExplain(spec)).unwrap_err();
        assert!(error.message.contains(wanted), "{error}");
    }
    // Packets say the same, rules count them, and events tell of them.
    assert_eq!(send(&mut switch, (web, 1), 2, (1000, 5432), SYN), None);
    for port in [22, 23, 22] {
        assert_eq!(send(&mut switch, (web, 1), 2, (1000, port), SYN), Some(DropReason::PolicyDenied));
    }
    assert_eq!(switch.take(db).len(), 1);
    let detail = show(&mut switch, "netpol", "db");
    let counts: Vec<_> = detail.rules.iter().map(|rule| (rule.path.as_str(), rule.connections, rule.denied)).collect();
    assert_eq!(counts, [("spec.ingress[0]", 1, 0), ("ingress: no rule matches", 0, 3)]);
    assert_eq!(detail.links, ["veth-db"]);
    let events = observe(&mut switch, ObserveFilter::default());
    assert_eq!(events.len(), 3);
    let FlowEvent { from, to, source, destination, reason, rule, verdict, .. } = &events[0];
    assert_eq!((from.as_str(), to.as_str(), verdict.as_str()), ("shop/web", "shop/db", "denied"));
    assert_eq!((source.as_str(), destination.as_str()), ("10.1.0.1:1000", "10.1.0.2:22"));
    assert_eq!(reason.as_deref(), Some("policy-denied"));
    assert_eq!(rule.as_deref(), Some("NetworkPolicy shop/db ingress: no rule matches (shop.yaml:1)"));
    let filter = |endpoint: &str| ObserveFilter { endpoint: Some(endpoint.to_owned()), ..ObserveFilter::default() };
    let counts = ["shop/db", "shop/", "10.1.0.1", "shop/x", "y/"].map(|end| observe(&mut switch, filter(end)).len());
    assert_eq!(counts, [3, 3, 3, 0, 0]);
}

#[test]
fn log_tells_of_what_is_allowed() {
    let (mut switch, [web, _]) = shop();
    let text = "
apiVersion: vswitch.io/v1alpha1
kind: SwitchPolicy
metadata: {name: watch}
spec:
  subject: {namespaces: {}}
  ingress:
  - {action: Log, protocols: [{tcp: {destinationPort: {number: 80}}}]}
";
    apply(&mut switch, text).unwrap();
    assert_eq!(send(&mut switch, (web, 1), 2, (1000, 80), SYN), None);
    assert_eq!(send(&mut switch, (web, 1), 2, (1000, 81), SYN), None);
    let events = observe(&mut switch, ObserveFilter::default());
    let told: Vec<_> = events.iter().map(|event| (event.verdict.as_str(), event.destination.as_str())).collect();
    assert_eq!(told, [("allowed", "10.1.0.2:80")]);
    assert_eq!(show(&mut switch, "SwitchPolicy", "watch").rules[0].connections, 1, "a rule that logs counts, too");
    // A flood of denied ones is told of within bounds, and the rest is counted.
    apply(&mut switch, &DB.replace("app: web", "app: nobody")).unwrap();
    for port in 0..1000 {
        send(&mut switch, (web, 1), 2, (2000, port), Layer4::Udp);
    }
    let told = observe(&mut switch, ObserveFilter::default()).len() as u64;
    assert!((100..400).contains(&told), "{told}");
    assert!(switch.counters().events_lost >= 600, "{}", switch.counters().events_lost);
}

#[test]
fn endpoints_have_names_labels_and_ports_as_kubernetes_has_them() {
    let (mut switch, _) = shop();
    for (wrong, wanted) in [
        (r#"{"name":"A_b"}"#, "name: \"A_b\" is no name"),
        (r#"{"name":""}"#, "is no name"),
        (r#"{"name":"a","labels":{"a b":"c"}}"#, "labels: \"a b=c\" is no label"),
        (r#"{"name":"a","labels":{"":"c"}}"#, "is no label"),
        (r#"{"name":"a","labels":{"a":"c d"}}"#, "is no label"),
        (r#"{"name":"a","ports":[{"name":"http","port":0}]}"#, "ports: \"http=0\" is no named port"),
        (r#"{"name":"a","addresses":["224.0.0.1"]}"#, "addresses"),
        (r#"{"name":"a","network":"none"}"#, "no network \"none\""),
    ] {
        let error = switch.ask_json(&format!(r#"{{"op":"endpoint_set","endpoints":[{wrong}]}}"#)).unwrap_err();
        assert!(error.message.contains(wanted), "{error}");
    }
    // A tier has a place of its own.
    let tier = "apiVersion: vswitch.io/v1alpha1\nkind: Tier\nmetadata: {name: t}\nspec:\n  order: 1000\n";
    let error = apply(&mut switch, tier).unwrap_err();
    assert!(error.message.contains("shop.yaml:5: spec.order: 1000 is tier \"admin\"'s"), "{error}");
}

#[test]
fn a_diff_changes_nothing() {
    let (mut switch, [web, _]) = shop();
    apply(&mut switch, DB).unwrap();
    let text = format!("{}---\n{}", DB.replace("5432", "5433"), DB.replace("name: db", "name: new"));
    let documents = vec![PolicyDocument { file: "new.yaml".to_owned(), text }];
    let Answer::Changes { changes } = switch.ask(Request::PolicyApply { documents, dry_run: true }) else {
        panic!("no changes")
    };
    let words: Vec<_> = changes.iter().map(|change| (change.name.name.as_str(), change.change.as_str())).collect();
    assert_eq!(words, [("db", "changed"), ("new", "created")]);
    assert_eq!(list(&mut switch).len(), 1);
    assert_eq!(send(&mut switch, (web, 1), 2, (1000, 5432), SYN), None);
}

#[test]
fn a_restart_keeps_policies_and_identities() {
    let (mut switch, _) = shop();
    apply(&mut switch, DB).unwrap();
    apply(&mut switch, "apiVersion: vswitch.io/v1alpha1\nkind: Tier\nmetadata: {name: t}\nspec: {order: 5}\n").unwrap();
    let endpoint = |name: &str, app: &str| EndpointSpec {
        namespace: Some("shop".to_owned()),
        name: name.to_owned(),
        network: None,
        labels: BTreeMap::from([("app".to_owned(), app.to_owned())]),
        addresses: vec!["10.9.0.9".parse().unwrap()],
        ports: Vec::new(),
    };
    switch.ask(Request::EndpointSet { endpoints: vec![endpoint("far", "web"), endpoint("gone", "web")] });
    let gone = vswitch_api::EndpointName { namespace: Some("shop".to_owned()), name: "gone".to_owned() };
    switch.ask(Request::EndpointDel { endpoints: vec![gone] });
    let journal = switch.control.take_journal();
    assert_eq!(switch.control.take_journal(), [], "each is noted once");
    let lines: Vec<String> = journal.iter().map(|entry| serde_json::to_string(entry).unwrap()).collect();
    let state = switch.control.state("boot");
    let before = (list(&mut switch), explain(&mut switch, "shop/far", "shop/db", "tcp/5432"));
    assert!(before.1.is_allowed);
    // Another switch, from what was noted.
    let mut next = Switch::new();
    let journal = lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(next.control.restore_policies(journal, &mut next.backend), Vec::<String>::new());
    assert_eq!(next.control.take_journal(), []);
    next.ask_json(network()).unwrap();
    assert_eq!(next.control.restore(state, &mut next.backend).len(), 1, "the network was there");
    assert_eq!((list(&mut next), explain(&mut next, "shop/far", "shop/db", "tcp/5432")), before);
    assert_eq!(next.control.whole_journal().len(), 3);
}

/// A switch that is joined to its host, whose own address is 10.1.0.254 and 203.0.113.7.
fn joined() -> (Switch, PortId) {
    let config = ControlConfig {
        host_network: Some("pods".to_owned()),
        failsafe: Failsafe { inbound: vec![(6, 22)], outbound: vec![(17, 53)] },
        ..ControlConfig::default()
    };
    let mut switch = Switch::with_host(config, HOST_MAC, network());
    switch.control.set_host_addresses(vec!["203.0.113.7".parse().unwrap()]);
    let pod = add(&mut switch, "db", 2);
    (switch, pod)
}

fn of_host(switch: &mut Switch, source: &str, port: u16, layer4: Layer4) -> Option<DropReason> {
    let ends = Ends { from: HOST_MAC, to: GATEWAY_MAC };
    switch.drop_of(HOST_PORT, &packet(ends, source, "10.1.0.2", (1000, port), layer4, b""))
}

fn to_host(switch: &mut Switch, pod: PortId, destination: &str, port: u16, layer4: Layer4) -> Option<DropReason> {
    let ends = Ends { from: mac(2), to: GATEWAY_MAC };
    switch.drop_of(pod, &packet(ends, "10.1.0.2", destination, (1000, port), layer4, b""))
}

#[test]
fn the_node_reaches_its_pods_whatever_they_say() {
    let (mut switch, pod) = joined();
    apply(&mut switch, &DB.replace("spec:", "spec:\n  policyTypes: [Ingress, Egress]")).unwrap();
    for own in ["10.1.0.254", "203.0.113.7"] {
        assert_eq!(of_host(&mut switch, own, 1, SYN), None, "{own} probes its pod");
        assert_eq!(to_host(&mut switch, pod, own, 7, SYN), None, "{own} is this node");
    }
    assert_eq!(of_host(&mut switch, "198.51.100.1", 5432, SYN), Some(DropReason::PolicyDenied), "others are not");
    assert_eq!(to_host(&mut switch, pod, "198.51.100.1", 80, SYN), Some(DropReason::PolicyDenied));
    // What an administrator forbids pods towards their node is forbidden.
    let admin = "
apiVersion: policy.networking.k8s.io/v1alpha1
kind: AdminNetworkPolicy
metadata: {name: node}
spec:
  priority: 1
  subject: {namespaces: {}}
  ingress: [{action: Deny, from: [{namespaces: {}}]}]
  egress: [{action: Deny, to: [{networks: [203.0.113.0/24]}]}]
";
    apply(&mut switch, admin).unwrap();
    assert_eq!(of_host(&mut switch, "203.0.113.7", 2, SYN), None);
    assert_eq!(to_host(&mut switch, pod, "203.0.113.7", 8, SYN), Some(DropReason::PolicyDenied));
}

#[test]
fn the_node_is_an_endpoint_with_ports_that_nobody_closes() {
    let (mut switch, pod) = joined();
    let host = |forward: bool| {
        format!(
            "
apiVersion: vswitch.io/v1alpha1
kind: SwitchPolicy
metadata: {{name: node}}
spec:
  subject: {{host: {{}}}}
  applyOnForward: {forward}
  ingress:
  - {{action: Allow, from: [{{namespaces: {{}}}}], protocols: [{{tcp: {{destinationPort: {{number: 80}}}}}}]}}
  - {{action: Deny}}
  egress:
  - {{action: Deny, protocols: [{{udp: {{}}}}]}}
"
        )
    };
    apply(&mut switch, &host(false)).unwrap();
    assert_eq!(to_host(&mut switch, pod, "203.0.113.7", 80, SYN), None);
    assert_eq!(to_host(&mut switch, pod, "203.0.113.7", 81, SYN), Some(DropReason::PolicyDenied));
    assert_eq!(to_host(&mut switch, pod, "203.0.113.7", 22, SYN), None, "failsafe");
    assert_eq!(of_host(&mut switch, "203.0.113.7", 5000, Layer4::Udp), Some(DropReason::PolicyDenied));
    assert_eq!(of_host(&mut switch, "203.0.113.7", 53, Layer4::Udp), None, "failsafe");
    // No object can take the place of what keeps them open.
    let other = "apiVersion: vswitch.io/v1alpha1\nkind: SwitchPolicy\nmetadata: {name: failsafe}\nspec: {subject: {namespaces: {}}, ingress: [{action: Log}]}\n";
    apply(&mut switch, other).unwrap();
    switch.ask_json(r#"{"op":"policy_delete","objects":[{"kind":"SwitchPolicy","name":"failsafe"}]}"#).unwrap();
    assert_eq!(to_host(&mut switch, pod, "10.1.0.254", 22, SYN), None, "failsafe");
    let explained = explain(&mut switch, "shop/db", "host", "tcp/22");
    assert!(explained.is_allowed && explained.ends[1].reason.contains("failsafe"), "{explained:?}");
    // What the host only forwards is no business of its own, unless the policy says so.
    assert_eq!(to_host(&mut switch, pod, "198.51.100.1", 81, SYN), None);
    assert_eq!(of_host(&mut switch, "198.51.100.1", 5001, Layer4::Udp), None);
    apply(&mut switch, &host(true)).unwrap();
    assert_eq!(to_host(&mut switch, pod, "198.51.100.1", 82, SYN), Some(DropReason::PolicyDenied));
    assert_eq!(of_host(&mut switch, "198.51.100.1", 5002, Layer4::Udp), Some(DropReason::PolicyDenied));
    let explained = explain(&mut switch, "shop/db", "198.51.100.1", "tcp/82");
    assert!(!explained.is_allowed && explained.ends[1].reason.contains("SwitchPolicy node"), "{explained:?}");
}

#[test]
fn a_pod_of_a_runtime_waits_for_its_labels_where_that_is_wanted() {
    let mut switch = Switch::new();
    switch.control = Control::new(ControlConfig { requires_endpoints: true, ..ControlConfig::default() });
    switch.ask_json(network()).unwrap();
    let mut spec = PortSpec::new("veth", mac(1));
    spec.addresses = vec!["10.1.0.1".parse().unwrap()];
    spec.labels.insert("K8S_POD_NAME".to_owned(), "a".to_owned());
    let error = switch.try_ask(Request::PortAdd(spec.clone())).unwrap_err();
    assert_eq!(error.code, ErrorCode::Unavailable, "CNI says: try again later");
    switch.ask_json(r#"{"op":"endpoint_set","endpoints":[{"namespace":"default","name":"a"}]}"#).unwrap();
    switch.ask(Request::PortAdd(spec));
}

#[test]
fn another_node_does_not_speak_for_pods_that_are_here() {
    let (mut twin, pods) =
        super::vxlan::routed(["192.0.2.1", "192.0.2.2"], vswitch_tests::twin::Wire { loss: 0, reorder: 0 }, 3);
    // A node that somebody has taken over: it sends whatever it likes.
    let add = r#"{"op":"port_add","link":"evil","mac":"02:00:00:00:00:77","network":"pods","addresses":["10.2.0.77"],"check":"none"}"#;
    let Answer::Port(evil) = twin.switches[1].ask_json(add).unwrap() else { panic!("no port") };
    let target = pods[0][1].addresses[0].addr().to_string();
    for (source, reason) in
        [(pods[0][0].addresses[0].addr().to_string(), Some(DropReason::SpoofedAddress)), ("10.2.0.77".to_owned(), None)]
    {
        let ends = Ends { from: mac(0x77), to: GATEWAY_MAC };
        let frame = packet(ends, &source, &target, (1000, 80), Layer4::Udp, b"x");
        assert_eq!(twin.switches[1].drop_of(evil.id, &frame), None);
        let wire = twin.switches[1].take(vswitch_control::UPLINK_PORT);
        assert_eq!(twin.switches[0].drop_of(vswitch_control::UPLINK_PORT, &wire[0]), reason, "{source}");
    }
}

#[test]
fn the_latest_word_on_an_endpoint_counts_before_and_after_a_restart() {
    let pod = |app: &str, phase: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: far, namespace: shop, labels: {{app: {app}}}}}\nspec: {{containers: []}}\nstatus: {{phase: {phase}, podIPs: [{{ip: 10.9.0.9}}]}}\n"
        )
    };
    let told = |app: &str| {
        format!(
            r#"{{"op":"endpoint_set","endpoints":[{{"namespace":"shop","name":"far","labels":{{"app":"{app}"}},"addresses":["10.9.0.9"]}}]}}"#
        )
    };
    let words: [(&str, bool); 4] = [("pod web", true), ("told web", true), ("pod x", false), ("told x", false)];
    for (first, _) in words {
        for (second, expected) in words {
            let (mut switch, _) = shop();
            apply(&mut switch, DB).unwrap();
            for word in [first, second] {
                match word.split_once(' ').unwrap() {
                    ("pod", app) => drop(apply(&mut switch, &pod(app, "Running")).unwrap()),
                    (_, app) => drop(switch.ask_json(&told(app)).unwrap()),
                }
            }
            for is_whole in [false, true] {
                let journal = if is_whole { switch.control.whole_journal() } else { switch.control.take_journal() };
                let (mut next, _) = shop();
                assert_eq!(next.control.restore_policies(journal, &mut next.backend), Vec::<String>::new());
                for one in [&mut switch, &mut next] {
                    let allowed = explain(one, "10.9.0.9", "shop/db", "tcp/5432").is_allowed;
                    assert_eq!(allowed, expected, "{first}, then {second}, {is_whole}");
                }
            }
        }
    }
    // One that has ended has no address any more, and of two the newer one has it.
    let (mut switch, _) = shop();
    apply(&mut switch, DB).unwrap();
    apply(&mut switch, &pod("web", "Succeeded")).unwrap();
    assert!(!explain(&mut switch, "10.9.0.9", "shop/db", "tcp/5432").is_allowed);
    apply(&mut switch, &pod("web", "Running")).unwrap();
    assert!(explain(&mut switch, "10.9.0.9", "shop/db", "tcp/5432").is_allowed);
    apply(&mut switch, &pod("x", "Running").replace("name: far", "name: alater")).unwrap();
    assert!(!explain(&mut switch, "10.9.0.9", "shop/db", "tcp/5432").is_allowed);
}
