//! Every ICMP error of the switch, byte by byte, against what scapy builds from the same facts (RFC 792, 1191, 1812, 4443).

use serde_json::Value;
use xtask::lab;

use crate::{add_pod, assert_balanced, bench};

const CONFIG: &str = r#"
[uplink]
link = "wire"
[[network]]
name = "pods"
vni = 1
ranges = ["10.244.1.0/24", "fd00:10:244:1::/64"]
[[peer]]
name = "other"
vtep = "192.0.2.2"
[[route]]
network = "pods"
prefix = "10.244.2.0/24"
peer = "other"
[[route]]
network = "pods"
prefix = "fd00:10:244:2::/64"
peer = "other"
[[peer]]
name = "dark"
vtep = "192.0.2.99"
[[route]]
network = "pods"
prefix = "10.244.3.0/24"
peer = "dark"
"#;

/// Sends packets and compares what comes back with what scapy says it must be. Prints a list of cases.
const SCRIPT: &str = r#"
import json, sys, time
from scapy.all import *
conf.verb = 0
mac, v4, v6 = get_if_hwaddr("eth0"), sys.argv[1], sys.argv[2]
gate = "02:76:73:77:00:01"
r4, r6 = "10.244.1.1", "fd00:10:244:1::1"
data = bytes(i * 7 % 256 for i in range(3000))

def e4(to, ttl=9, l4=None, size=900, df=0, options=[]):
    l4 = l4 if l4 is not None else UDP(sport=1000, dport=2000)
    return IP(src=v4, dst=to, ttl=ttl, flags=df and "DF", id=77, options=options) / l4 / Raw(data[:size])
def e6(to, hlim=9, l4=None, size=900, src=None, nh=None):
    l4 = l4 if l4 is not None else UDP(sport=1000, dport=2000)
    p = IPv6(src=src or v6, dst=to, hlim=hlim) / l4 / Raw(data[:size])
    if nh is not None: p.nh = nh
    return p

cases = [
    ("time exceeded", e4("10.244.1.3", ttl=1), 11, 0, 0),
    ("time exceeded, with options", e4("10.244.1.3", ttl=1, options=[IPOption_RR(length=11, routers=["0.0.0.0", "0.0.0.0"])]), 11, 0, 0),
    ("time exceeded, short", e4("10.244.1.3", ttl=1, size=3), 11, 0, 0),
    ("net unreachable", e4("8.8.8.8"), 3, 0, 0),
    ("host unreachable, nobody", e4("10.244.1.200"), 3, 1, 0),
    ("host unreachable, peer", e4("10.244.3.7"), 3, 1, 0),
    ("protocol unreachable", e4("169.254.1.1", l4=b"", size=40), 3, 2, 0),
    ("port unreachable, UDP", e4(r4), 3, 3, 0),
    ("port unreachable, TCP", e4(r4, l4=TCP(sport=1, dport=2)), 3, 3, 0),
    ("fragmentation needed", e4("10.244.2.7", size=2000, df=1), 3, 4, 1450),
    ("v6 time exceeded", e6("fd00:10:244:1::3", hlim=1), 3, 0, 0),
    ("v6 time exceeded, long", e6("fd00:10:244:1::3", hlim=1, size=2500), 3, 0, 0),
    ("v6 no route", e6("2001:db8:99::1"), 1, 0, 0),
    ("v6 beyond scope", e6("2001:db8:99::1", src="fe80::5"), 1, 2, 0),
    ("v6 address unreachable", e6("fd00:10:244:1::77"), 1, 3, 0),
    ("v6 port unreachable", e6(r6), 1, 4, 0),
    ("v6 packet too big", e6("fd00:10:244:2::7", size=2000), 2, 0, 1450),
    ("v6 unknown next header", e6(r6, l4=b"", size=40, nh=200), 4, 1, 6),
]
ll = [a for a in in6_getifaddr() if a[2] == "eth0" and a[0].startswith("fe80")][0][0]
socket2 = conf.L2socket(iface="eth0")
out = []
for name, packet, kind, code, word in cases:
    if IPv6 in packet and packet[IPv6].src == "fe80::5": packet[IPv6].src = ll
    if IP in packet and packet[IP].proto == 0: packet[IP].proto = 253
    sent = bytes(packet)
    sniffer = AsyncSniffer(iface="eth0", store=True, lfilter=lambda p: p.src == gate and p.dst == mac and (ICMP in p or ICMPv6Unknown in p or (IPv6 in p and p[IPv6].nh == 58)))
    sniffer.start(); time.sleep(0.15)
    socket2.send(Ether(src=mac, dst=gate, type=0x800 if IP in packet else 0x86dd) / sent)
    time.sleep(0.3)
    got = None
    for p in sniffer.stop() or []:
        if IPv6 in p and p.haslayer(ICMPv6ND_NS): continue
        got = bytes(p)[14:]
    if IP in packet:
        head = bytes([kind, code, 0, 0]) + word.to_bytes(4, "big")
        body = head + sent[:576 - 28]
        ck = checksum(body)
        body = body[:2] + ck.to_bytes(2, "big") + body[4:]
        want = bytes(IP(src=r4, dst=v4, ttl=64, tos=0xc0, id=0, flags="DF", proto=1) / Raw(body))
    else:
        head = bytes([kind, code, 0, 0]) + word.to_bytes(4, "big")
        body = head + sent[:1280 - 48]
        base = IPv6(src=r6, dst=packet[IPv6].src, hlim=64, nh=58)
        ck = in6_chksum(58, base, body)
        body = body[:2] + ck.to_bytes(2, "big") + body[4:]
        want = bytes(base / Raw(body))
    # Scapy reads it back by itself: fields, the quote's ends, and the checksums that it would write.
    read, shown = None, "nothing"
    if got:
        p = (IP if IP in packet else IPv6)(got)
        shown, message, again = p.summary(), p.payload, p.copy()
        if IP in packet: del again.chksum; del again.payload.chksum
        else: del again.payload.cksum
        quote = message.payload
        read = [message.type, message.code, p.src, p.dst, quote.src, quote.dst, bytes(again) == got]
    ip = packet[IP] if IP in packet else packet[IPv6]
    expected = [kind, code, r4 if IP in packet else r6, ip.src, ip.src, ip.dst, True]
    out.append({"case": name, "same": got == want, "read": read == expected, "fields": read, "shown": shown, "got": (got or b"").hex()[:160], "want": want.hex()[:160]})
print(json.dumps(out))
"#;

#[test]
fn every_error_is_right_to_the_byte() {
    let Some(mut bench) = bench("icmp") else { return };
    let lab = &mut bench.lab;
    let (node, other) = (lab.namespace("node").unwrap(), lab.namespace("other").unwrap());
    lab.wire([(&node, "wire", &["192.0.2.1/24"]), (&other, "wire", &["192.0.2.2/24"])], 1500).unwrap();
    let daemon = lab.daemon(&node, "node", CONFIG).unwrap();
    let (pod, addresses) = add_pod(lab, &daemon, "pod");
    let (_there, _) = add_pod(lab, &daemon, "there");
    lab::wait_for(10, || daemon.ctl(&["status"]).unwrap()["peers_reachable"] == 1).unwrap();
    let printed = pod.run(60, &["/usr/bin/python3", "-c", SCRIPT, &addresses[0], &addresses[1]]).unwrap();
    let cases: Vec<Value> = serde_json::from_str(printed.lines().last().unwrap()).unwrap();
    for case in &cases {
        println!("{}: {}", case["case"].as_str().unwrap(), case["shown"].as_str().unwrap());
    }
    let wrong: Vec<&Value> = cases.iter().filter(|case| case["same"] != true || case["read"] != true).collect();
    assert!(wrong.is_empty() && cases.len() == 18, "{wrong:#?}");
    assert_balanced(&daemon);
}
