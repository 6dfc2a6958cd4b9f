//! The client against guests that keep their promises and guests that do not.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use guest::proto::{Op, Request, Status};

use super::fake::{Fake, Fault};
use super::*;

/// Long enough for any machine: a test that waits this long has found a hang.
const LIVENESS: Duration = Duration::from_secs(60);

fn config(fake: &Fake) -> ProbeConfig {
    ProbeConfig {
        interval: Duration::from_micros(200),
        ..ProbeConfig::new(fake.addr)
    }
}

/// A client that has `n` acknowledgements, stopped.
fn run(fake: &Fake, n: u64) -> ProbeReport {
    let client = ProbeClient::start(config(fake), LIVENESS).expect("a client");
    assert!(client.wait_acked(n, LIVENESS), "{client:?}");
    client.stop(LIVENESS)
}

#[test]
fn an_honest_guest_loses_nothing() {
    let fake = Fake::start(1000, &[]);
    let r = run(&fake, 500);
    assert!(r.survived(), "{r:?}");
    assert_eq!(
        (r.sent, r.unacknowledged, r.extra, r.failed),
        (r.acked, 0, 0, 0)
    );
    assert_eq!((r.counter_before, r.counter_after), (1000, fake.counter()));
    assert_eq!(r.latency.count as u64, r.acked);
    assert!(r.latency.p50_us <= r.latency.p99_us && r.latency.p99_us <= r.latency.max_us);
}

#[test]
fn a_lost_request_is_detected() {
    let fake = Fake::start(0, &[Fault::Forget(100, 1)]);
    let r = run(&fake, 300);
    assert_eq!((r.lost, r.went_back, r.broken, r.verified), (1, 1, 0, true));
    assert!(!r.survived());
}

#[test]
fn many_lost_requests_are_all_counted() {
    let fake = Fake::start(7, &[Fault::Forget(100, 30), Fault::Forget(200, 5)]);
    let r = run(&fake, 300);
    assert_eq!((r.lost, r.went_back), (35, 2));
}

#[test]
fn a_request_lost_after_the_last_answer_is_detected() {
    let fake = Fake::start(0, &[]);
    let config = ProbeConfig {
        interval: Duration::from_secs(3600),
        ..ProbeConfig::new(fake.addr)
    };
    let client = ProbeClient::start(config, LIVENESS).expect("a client");
    assert!(client.wait_acked(1, LIVENESS));
    fake.set_counter(|c| c - 1);
    let r = client.stop(LIVENESS);
    assert_eq!((r.sent, r.lost), (1, 1));
}

#[test]
fn a_reset_connection_is_counted_and_made_anew() {
    let fake = Fake::start(0, &[Fault::Reset(50)]);
    let r = run(&fake, 200);
    assert_eq!((r.broken, r.lost, r.verified), (1, 0, true), "{r:?}");
    assert!(r.unacknowledged >= 1 && r.sent == r.acked + r.unacknowledged);
    assert_eq!(r.errors.len(), 1);
    assert!(r.errors[0].contains("broke"), "{:?}", r.errors);
    assert!(!r.survived());
}

#[test]
fn a_reset_does_not_hide_a_loss() {
    let fake = Fake::start(0, &[Fault::Reset(50), Fault::Forget(49, 40)]);
    let r = run(&fake, 200);
    assert_eq!((r.broken, r.lost), (1, 40), "{r:?}");
}

#[test]
fn answers_out_of_protocol_break_the_connection() {
    for (fault, says) in [
        (Fault::Garbage(20), "not a probe message"),
        (Fault::WrongSeq(20), "where"),
    ] {
        let fake = Fake::start(0, &[fault]);
        let r = run(&fake, 100);
        assert_eq!((r.broken, r.lost), (1, 0), "{fault:?}");
        assert!(r.errors[0].contains(says), "{:?}", r.errors);
    }
}

#[test]
fn a_request_executed_twice_is_seen() {
    let fake = Fake::start(0, &[Fault::Twice(20)]);
    let r = run(&fake, 100);
    assert_eq!((r.extra, r.lost, r.broken), (1, 0, 0));
}

#[test]
fn a_failed_request_is_told_apart() {
    let fake = Fake::start(0, &[Fault::DiskError(20)]);
    let r = run(&fake, 100);
    assert_eq!((r.failed, r.lost, r.extra, r.sent), (1, 0, 0, r.acked + 1));
}

#[test]
fn an_answer_in_pieces_is_put_together() {
    let fake = Fake::start(0, &[Fault::Torn(20), Fault::Torn(40)]);
    assert!(run(&fake, 100).survived());
}

#[test]
fn silence_is_a_gap_and_the_window_bounds_what_is_outstanding() {
    let fake = Fake::start(0, &[Fault::Hang(50)]);
    let config = ProbeConfig {
        window: 8,
        ..config(&fake)
    };
    let client = ProbeClient::start(config, LIVENESS).expect("a client");
    let deadline = Instant::now() + LIVENESS;
    while !(fake.is_hanging() && client.progress().outstanding == 8) {
        assert!(Instant::now() < deadline, "{client:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
    let down = Instant::now();
    assert_eq!(client.progress().sent, client.progress().acked + 8);
    assert_eq!(client.first_reply_after(down), None);
    let asked = client.stats(Duration::from_millis(20));
    assert!(matches!(asked, Err(ProbeError::NoAnswer(_))), "{asked:?}");
    let up = Instant::now();
    fake.resume();
    let first = client.wait_reply_after(down, LIVENESS).expect("it goes on");
    assert!(first >= up);
    let gap = client.longest_gap_after(down).expect("a gap");
    assert!(gap.from < down && gap.to == first);
    let r = client.stop(LIVENESS);
    assert!(r.survived(), "{r:?}");
    assert!(u128::from(r.longest_gap_us) >= (up - down).as_micros());
}

#[test]
fn a_guest_that_stays_silent_cannot_be_verified() {
    let fake = Fake::start(0, &[Fault::Hang(5)]);
    let client = ProbeClient::start(config(&fake), LIVENESS).expect("a client");
    let deadline = Instant::now() + LIVENESS;
    while !fake.is_hanging() {
        assert!(Instant::now() < deadline, "{client:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
    let r = client.stop(Duration::from_millis(100));
    assert!(!r.verified && !r.survived());
    assert!(r.unacknowledged > 0);
    fake.resume();
}

#[test]
fn load_and_stats_go_over_the_same_connection() {
    let fake = Fake::start(0, &[]);
    let client = ProbeClient::start(config(&fake), LIVENESS).expect("a client");
    assert_eq!(client.set_load(4096, 10, LIVENESS).expect("load"), 1000);
    let before = client.progress().acked;
    let s = client.stats(LIVENESS).expect("stats");
    assert!(s.counter >= before);
    let disk = client
        .call(Request::new(Op::ReadDisk, 0), LIVENESS)
        .expect("an answer");
    assert_eq!(disk.status, Status::NoDisk as u16);
    let r = client.stop(LIVENESS);
    assert!(r.survived() && r.extra == 0, "{r:?}");
}

#[test]
fn an_interval_of_zero_asks_as_fast_as_answers_come() {
    let fake = Fake::start(0, &[]);
    let config = ProbeConfig {
        window: 1,
        interval: Duration::ZERO,
        ..ProbeConfig::new(fake.addr)
    };
    let client = ProbeClient::start(config, LIVENESS).expect("a client");
    assert!(client.wait_acked(2000, LIVENESS));
    assert!(client.stop(LIVENESS).survived());
}

#[test]
fn one_question_at_a_time() {
    let fake = Fake::start(3, &[Fault::Garbage(3)]);
    let mut c = ProbeConn::connect(fake.addr, LIVENESS).expect("a connection");
    assert_eq!(c.incr().expect("incr"), 4);
    assert_eq!(c.stats().expect("stats").counter, 4);
    assert_eq!(c.set_load(5, 1).expect("load"), 5);
    let odd = Request {
        op: 77,
        ..Request::new(Op::Read, 0)
    };
    assert_eq!(c.call(odd).expect("an answer").status, Status::BadOp as u16);
    assert_eq!(c.incr().expect("incr"), 5);
    assert!(matches!(c.incr(), Err(ProbeError::BadMagic(_))));
}

#[test]
fn a_guest_that_is_not_there_yet_is_waited_for() {
    let port = TcpListener::bind("127.0.0.1:0").expect("a socket");
    let addr = port.local_addr().expect("its address");
    drop(port);
    let e = ProbeConn::connect(addr, Duration::from_millis(50)).expect_err("nobody there");
    assert!(e.to_string().contains(&addr.to_string()), "{e}");
    let late = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        TcpListener::bind(addr)
            .and_then(|l| l.accept())
            .expect("the client comes")
    });
    ProbeConn::connect(addr, LIVENESS).expect("it came up");
    late.join().expect("the listener");
}

#[test]
fn a_guest_that_says_nothing_is_given_up_on() {
    let silent = TcpListener::bind("127.0.0.1:0").expect("a socket");
    let config = ProbeConfig::new(silent.local_addr().expect("its address"));
    let e = ProbeClient::start(config, Duration::from_millis(50)).expect_err("no answer");
    assert!(matches!(e, ProbeError::NoAnswer(_)), "{e}");
}
