//! TCP: how it begins and ends, and what only looks like it.

use vswitch_dataplane::DropReason;
use vswitch_dataplane::connection::{ConnectionConfig, PickUp};
use vswitch_net::checksum;
use vswitch_tests::frames::Layer4;

use super::{ACK, By, FIN, POLICY, PSH, Pair, RST, SECOND, SYN, frame};

#[test]
fn a_connection_opens_talks_and_closes() {
    let mut pair = Pair::new(ConnectionConfig::default());
    assert_eq!(pair.tcp(By::B, SYN, 1, 0, b""), Some(DropReason::PolicyDenied), "not that way round");
    pair.open();
    for _ in 0..3 {
        assert_eq!(pair.tcp(By::A, ACK | PSH, 1001, 5001, b"question"), None);
        assert_eq!(pair.tcp(By::B, ACK | PSH, 5001, 1009, b"answer"), None);
    }
    // Half closed: the other side goes on.
    assert_eq!(pair.tcp(By::A, FIN | ACK, 1009, 5007, b""), None);
    assert_eq!(pair.state(), "fin-wait");
    pair.switch.pass(100 * SECOND);
    assert_eq!(pair.tcp(By::B, ACK | PSH, 5007, 1010, b"still here"), None);
    assert_eq!(pair.tcp(By::B, FIN | ACK, 5017, 1010, b""), None);
    assert_eq!(pair.state(), "time-wait");
    assert_eq!(pair.tcp(By::A, ACK, 1010, 5018, b""), None);
    // The last acknowledgement was lost: the FIN comes again.
    pair.switch.pass(50 * SECOND);
    assert_eq!(pair.tcp(By::B, FIN | ACK, 5017, 1010, b""), None);
    assert_eq!(pair.tcp(By::A, ACK, 1010, 5018, b""), None);
    pair.switch.pass(61 * SECOND);
    assert_eq!(pair.connections(), []);
    assert_eq!(pair.tcp(By::B, ACK, 5018, 1010, b"late"), Some(DropReason::NoConnection));
}

#[test]
fn a_port_in_time_wait_is_used_again_and_judged_again() {
    let mut pair = Pair::new(ConnectionConfig::default());
    pair.open();
    pair.tcp(By::A, FIN | ACK, 1001, 5001, b"");
    pair.tcp(By::B, FIN | ACK, 5001, 1002, b"");
    assert_eq!(pair.state(), "time-wait");
    assert_eq!(pair.tcp(By::A, SYN, 900_000, 0, b""), None);
    assert_eq!(pair.state(), "syn-sent");
    assert_eq!(pair.tcp(By::B, SYN | ACK, 700_000, 900_001, b""), None);
    assert_eq!(pair.tcp(By::A, ACK, 900_001, 700_001, b""), None);
    assert_eq!(pair.state(), "established");
    pair.tcp(By::A, FIN | ACK, 900_001, 700_001, b"");
    pair.tcp(By::B, FIN | ACK, 700_001, 900_002, b"");
    // From the other side it would be another connection, which is not allowed.
    assert_eq!(pair.tcp(By::B, SYN, 1, 0, b""), Some(DropReason::PolicyDenied));
}

#[test]
fn two_syns_that_cross_are_one_connection() {
    let mut pair = Pair::new(ConnectionConfig::default());
    assert_eq!(pair.tcp(By::A, SYN, 1000, 0, b""), None);
    // It is denied as a beginning, but it is none.
    assert_eq!(pair.tcp(By::B, SYN, 5000, 0, b""), None);
    assert_eq!(pair.state(), "syn-received");
    assert_eq!(pair.tcp(By::A, SYN | ACK, 1000, 5001, b""), None);
    assert_eq!(pair.tcp(By::B, SYN | ACK, 5000, 1001, b""), None);
    assert_eq!(pair.state(), "established");
    assert_eq!(pair.tcp(By::B, ACK | PSH, 5001, 1001, b"data"), None);
}

#[test]
fn a_reset_with_a_wrong_number_is_ignored() {
    let mut pair = Pair::new(ConnectionConfig::default());
    pair.open();
    for seq in [1001 + (1 << 28), 0x9000_0000] {
        assert_eq!(pair.tcp(By::A, RST, seq, 0, b""), Some(DropReason::TcpWindow));
        assert_eq!(pair.state(), "established");
    }
    // Far on, by the flow table's way: the numbers that it saw count.
    let mut seq = 1001_u32;
    for _ in 0..2000 {
        assert_eq!(pair.tcp(By::A, ACK | PSH, seq, 5001, &[0; 1000]), None);
        seq = seq.wrapping_add(1000);
    }
    assert_eq!(pair.tcp(By::A, RST, seq.wrapping_add(40_000_000), 0, b""), Some(DropReason::TcpWindow));
    assert_eq!(pair.tcp(By::A, ACK | PSH, seq, 5001, b"still"), None);
    assert_eq!(pair.tcp(By::A, RST | ACK, seq + 5, 5001, b""), None);
    assert_eq!(pair.state(), "closed");
    // An answer to a SYN must know its number.
    let mut pair = Pair::new(ConnectionConfig::default());
    pair.tcp(By::A, SYN, 1000, 0, b"");
    assert_eq!(pair.tcp(By::B, RST | ACK, 0, 77, b""), Some(DropReason::TcpWindow));
    assert_eq!(pair.tcp(By::B, SYN | ACK, 5000, 77, b""), Some(DropReason::TcpWindow));
    assert_eq!(pair.state(), "syn-sent");
    assert_eq!(pair.tcp(By::B, RST | ACK, 0, 1001, b""), None);
    assert_eq!(pair.state(), "closed");
}

#[test]
fn what_is_far_out_of_the_window_is_counted() {
    let mut pair = Pair::new(ConnectionConfig::default());
    pair.open();
    assert_eq!(pair.tcp(By::A, ACK | PSH, 1001, 5001, b"x"), None);
    // Windows are scaled by 128: eight megabytes are as much as may be outstanding.
    assert_eq!(pair.tcp(By::A, ACK | PSH, 1001 + 8_000_000, 5001, b"x"), None);
    assert_eq!(pair.tcp(By::A, ACK | PSH, 1001 + 40_000_000, 5001, b"x"), Some(DropReason::TcpWindow));
    assert_eq!(pair.tcp(By::B, ACK | PSH, 5001 + 40_000_000, 1001, b"x"), Some(DropReason::TcpWindow));
    // Without the option on both sides windows are small.
    let mut pair = Pair::new(ConnectionConfig::default());
    pair.tcp(By::A, SYN, 1000, 0, b"");
    let mut plain = frame(By::B, (1000, 80), Layer4::Tcp { flags: SYN | ACK, seq: 5000, ack: 1001 }, b"");
    // The scale option becomes three that do nothing, and the checksum follows.
    let sum = u16::from_be_bytes([plain[50], plain[51]]);
    let sum = checksum::update(sum, 0x0303, 0x0101);
    let sum = checksum::update(sum, 0x0700, 0x0100);
    plain[54..58].copy_from_slice(&[1, 1, 1, 0]);
    plain[50..52].copy_from_slice(&sum.to_be_bytes());
    assert_eq!(pair.send_frame(By::B, &plain), None);
    assert_eq!(pair.tcp(By::A, ACK, 1001, 5001, b""), None);
    assert_eq!(pair.tcp(By::A, ACK | PSH, 1001 + 60_000, 5001, b"x"), None);
    assert_eq!(pair.tcp(By::A, ACK | PSH, 1001 + 1_000_000, 5001, b"x"), Some(DropReason::TcpWindow));
}

#[test]
fn a_fast_connection_may_send_gigabytes_between_two_judgements() {
    let mut pair = Pair::new(ConnectionConfig::default());
    pair.open();
    let mut seq = 1001_u32;
    // A flow entry lives for five seconds: at 20 Gbit/s the numbers come round thrice.
    for judgement in 0..12 {
        for _ in 0..150 * (judgement % 4) {
            seq = seq.wrapping_add(8_000_000);
            assert_eq!(pair.tcp(By::A, ACK | PSH, seq, 5001, b"x"), None, "{judgement}");
        }
        pair.switch.now_ns += 6 * SECOND;
        seq = seq.wrapping_add(1);
        assert_eq!(pair.tcp(By::A, ACK | PSH, seq, 5001, b"x"), None, "{judgement}");
        assert_eq!(
            pair.tcp(By::A, ACK | PSH, seq.wrapping_add(40_000_000), 5001, b"x"),
            Some(DropReason::TcpWindow),
            "{judgement}"
        );
    }
}

#[test]
fn what_no_stack_sends_is_counted_by_reason() {
    let mut pair = Pair::new(ConnectionConfig::default());
    for flags in [SYN | FIN, SYN | RST, 0, PSH] {
        assert_eq!(pair.tcp(By::A, flags, 1, 0, b""), Some(DropReason::TcpFlags), "{flags:#x}");
    }
    assert_eq!(pair.tcp(By::A, ACK, 1, 1, b"x"), Some(DropReason::NoConnection));
    assert_eq!(pair.tcp(By::A, SYN | ACK, 1, 1, b""), Some(DropReason::NoConnection));
    assert_eq!(pair.tcp(By::A, RST, 1, 1, b""), Some(DropReason::NoConnection));
    let mut damaged = frame(By::A, (1000, 80), Layer4::Tcp { flags: SYN, seq: 1, ack: 0 }, b"");
    damaged[50] ^= 1;
    assert_eq!(pair.send_frame(By::A, &damaged), Some(DropReason::BadChecksum));
    let mut damaged = frame(By::A, (1000, 80), Layer4::Udp, b"hello");
    damaged[43] ^= 1;
    assert_eq!(pair.send_frame(By::A, &damaged), Some(DropReason::BadChecksum));
    // Without a checksum there is none to be wrong (RFC 768).
    let mut without = frame(By::A, (1000, 80), Layer4::Udp, b"hello");
    without[40..42].fill(0);
    assert_eq!(pair.send_frame(By::A, &without), None);
    pair.tcp(By::A, SYN, 1000, 0, b"");
    assert_eq!(pair.tcp(By::A, ACK, 1001, 1, b""), Some(DropReason::TcpState), "nobody has answered yet");
}

#[test]
fn connections_without_a_beginning_are_taken_up_if_that_is_wanted() {
    let mut pair = Pair::new(ConnectionConfig { pick_up: PickUp::Until(60 * SECOND), ..ConnectionConfig::default() });
    assert_eq!(pair.tcp(By::B, ACK | PSH, 5001, 1001, b"x"), None, "an answer of what `a` may have begun");
    assert!(pair.connections()[0].is_picked_up);
    assert_eq!(pair.connections()[0].source, "10.1.0.1:1000", "who began is who may");
    assert_eq!(pair.tcp(By::A, ACK | PSH, 1001, 5001, b"x"), None);
    assert_eq!(
        pair.send_ports(By::B, (1000, 81), Layer4::Tcp { flags: ACK, seq: 1, ack: 1 }, b"x"),
        Some(DropReason::PolicyDenied)
    );
    assert_eq!(
        pair.tcp(By::B, SYN, 1, 0, b""),
        Some(DropReason::PolicyDenied),
        "what begins one is judged, whatever is known"
    );
    pair.switch.pass(61 * SECOND);
    let late = Layer4::Tcp { flags: ACK, seq: 1, ack: 1 };
    assert_eq!(pair.send_ports(By::A, (1002, 80), late, b"x"), Some(DropReason::NoConnection));
}

#[test]
fn a_stray_segment_opens_no_way_for_a_beginning() {
    for pick_up in [PickUp::Never, PickUp::Always] {
        let mut pair = Pair::new(ConnectionConfig { pick_up, ..ConnectionConfig::default() });
        pair.switch.ask_json(r#"{"op":"policy_delete","objects":[{"kind":"SwitchPolicy","name":"b"}]}"#).unwrap();
        let to_22 = |flags| Layer4::Tcp { flags, seq: 1, ack: 0 };
        // Before anybody has a policy, and from the middle.
        assert_eq!(pair.send_ports(By::A, (1001, 22), to_22(ACK), b""), None);
        // `b` lets in nobody at that port, and may go anywhere itself, so that it might have begun this.
        pair.apply(&POLICY.replace("  egress:\n  - action: Deny\n", ""));
        assert_eq!(pair.send_ports(By::A, (1001, 22), to_22(ACK), b"x"), None, "the answer to what `b` may have begun");
        assert_eq!(pair.send_ports(By::A, (1001, 22), to_22(SYN), b""), Some(DropReason::PolicyDenied));
        pair.switch.pass(3600 * SECOND);
        assert_eq!(pair.send_ports(By::A, (1001, 22), to_22(SYN), b""), Some(DropReason::PolicyDenied));
    }
    // Nor does the end of one that the other side had begun.
    let mut pair = Pair::new(ConnectionConfig::default());
    pair.apply(&POLICY.replace("  egress:\n  - action: Deny\n", ""));
    let of_b =
        |pair: &mut Pair, by, flags, seq, ack| pair.send_ports(by, (22, 3000), Layer4::Tcp { flags, seq, ack }, b"");
    assert_eq!(of_b(&mut pair, By::B, SYN, 1, 0), None);
    assert_eq!(of_b(&mut pair, By::A, SYN | ACK, 9, 2), None);
    assert_eq!(of_b(&mut pair, By::B, ACK, 2, 10), None);
    assert_eq!(of_b(&mut pair, By::B, FIN | ACK, 2, 10), None);
    assert_eq!(of_b(&mut pair, By::A, SYN, 77, 0), Some(DropReason::PolicyDenied));
}
