//! The books of one client: what was asked, what was acknowledged, and whether the guest still knows.
//!
//! Plain state machine. The guest adds one to a counter for every INCR it executes and answers with the new value. A
//! machine resumed from a checkpoint older than an answer that was let out has forgotten requests it acknowledged: its
//! counter falls behind. Every counter seen afterwards shows it, since acknowledged values may only be passed, never
//! given out again.

use std::collections::VecDeque;
use std::time::Instant;

use guest::proto::{Op, Response, Status};
use thiserror::Error;

use super::timeline::{Sample, Timeline};

/// Acknowledged counter values remembered, to tell how many a counter that went back has lost.
const MAX_LINE: usize = 1_000_000;

/// An answer no guest that keeps to the protocol gives. The connection is of no use afterwards.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum LedgerError {
    /// Nothing was asked.
    #[error("an answer (seq {0}) to no request")]
    Unasked(u64),
    /// Answers come in the order of the requests.
    #[error("an answer to request {got}, where {want} is next")]
    OutOfOrder {
        /// The answer's number.
        got: u64,
        /// The oldest unanswered request's.
        want: u64,
    },
    /// The answer is to another operation.
    #[error("request {seq} is answered as operation {op}")]
    WrongOp {
        /// The request's number.
        seq: u64,
        /// The operation the answer names.
        op: u16,
    },
}

/// What one client asked and was told.
#[derive(Debug, Default)]
pub struct Ledger {
    pending: VecDeque<(u64, Instant)>,
    /// Counter before the first request.
    base: Option<u64>,
    /// Newest counter seen.
    last: u64,
    /// Counter values acknowledged and not lost, growing.
    line: VecDeque<u64>,
    /// Requests of broken connections, whose fate is unknown, that the counter may yet show.
    uncertain: u64,
    timeline: Timeline,
    sent: u64,
    acked: u64,
    failed: u64,
    unacknowledged: u64,
    lost: u64,
    went_back: u64,
    extra: u64,
    broken: u64,
}

impl Ledger {
    /// An empty ledger.
    pub fn new() -> Ledger {
        Ledger::default()
    }

    /// The guest's counter was read while no request was outstanding: at the start, and at every other time.
    pub fn counter_read(&mut self, counter: u64) {
        if self.base.is_none() {
            self.base = Some(counter);
            self.last = counter;
            return;
        }
        if counter < self.last {
            self.rewound_to(counter);
        } else {
            self.grew_by(counter - self.last);
        }
        self.last = counter;
    }

    /// The INCR numbered `seq` was sent.
    pub fn incr_sent(&mut self, seq: u64, now: Instant) {
        self.sent += 1;
        self.pending.push_back((seq, now));
    }

    /// An INCR was answered.
    ///
    /// # Errors
    /// [`LedgerError`]; then nothing was booked.
    pub fn incr_answered(&mut self, answer: &Response, now: Instant) -> Result<(), LedgerError> {
        let Some(&(seq, sent)) = self.pending.front() else {
            return Err(LedgerError::Unasked(answer.seq));
        };
        if answer.seq != seq {
            return Err(LedgerError::OutOfOrder {
                got: answer.seq,
                want: seq,
            });
        }
        if answer.op != Op::Incr as u16 {
            return Err(LedgerError::WrongOp { seq, op: answer.op });
        }
        self.pending.pop_front();
        // Executed, with or without success on the disk, this request made the counter what it is; so the value must be
        // a new one.
        if answer.counter <= self.last && self.base.is_some() {
            self.rewound_to(answer.counter.saturating_sub(1));
        } else if self.base.is_some() {
            self.grew_by(answer.counter - self.last - 1);
        } else {
            self.base = Some(answer.counter.saturating_sub(1));
        }
        self.last = answer.counter;
        if answer.status != Status::Ok as u16 {
            self.failed += 1;
            return Ok(());
        }
        self.acked += 1;
        if self.line.len() == MAX_LINE {
            self.line.pop_front();
        }
        self.line.push_back(answer.counter);
        self.timeline.push(Sample {
            seq,
            counter: answer.counter,
            sent,
            received: now,
        });
        Ok(())
    }

    /// The connection is gone. Whether the guest executed what was outstanding is unknown; it was never acknowledged.
    pub fn connection_broken(&mut self) {
        self.broken += 1;
        let open = self.pending.len() as u64;
        self.unacknowledged += open;
        self.uncertain += open;
        self.pending.clear();
    }

    /// The counter is (again) only `counter`: acknowledged values above it are lost.
    fn rewound_to(&mut self, counter: u64) {
        self.went_back += 1;
        while self.line.pop_back_if(|v| *v > counter).is_some() {
            self.lost += 1;
        }
    }

    /// The counter grew by so much more than this connection's own requests.
    fn grew_by(&mut self, more: u64) {
        let explained = more.min(self.uncertain);
        self.uncertain -= explained;
        self.extra += more - explained;
    }

    /// INCRs sent.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// INCRs acknowledged with success.
    pub fn acked(&self) -> u64 {
        self.acked
    }

    /// INCRs answered with another status.
    pub fn failed(&self) -> u64 {
        self.failed
    }

    /// INCRs sent and not answered yet.
    pub fn outstanding(&self) -> usize {
        self.pending.len()
    }

    /// INCRs that were outstanding when their connection broke.
    pub fn unacknowledged(&self) -> u64 {
        self.unacknowledged
    }

    /// Acknowledged INCRs the guest does not know any more. Exact while this is the only client that increments;
    /// with others it is a lower bound.
    pub fn lost(&self) -> u64 {
        let behind = self
            .base
            .unwrap_or(0)
            .saturating_add(self.acked)
            .saturating_sub(self.last);
        self.lost.max(behind)
    }

    /// Times the counter went back.
    pub fn went_back(&self) -> u64 {
        self.went_back
    }

    /// Increments nobody here asked for: another client's, or a request executed twice.
    pub fn extra(&self) -> u64 {
        self.extra
    }

    /// Connections that broke.
    pub fn broken(&self) -> u64 {
        self.broken
    }

    /// The counter before the first request, if known.
    pub fn base(&self) -> Option<u64> {
        self.base
    }

    /// The newest counter seen.
    pub fn counter(&self) -> u64 {
        self.last
    }

    /// When the acknowledgements came.
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(seq: u64, counter: u64) -> Response {
        Response {
            op: Op::Incr as u16,
            status: 0,
            seq,
            counter,
            passes: 0,
            disk_counter: 0,
            uptime_us: 0,
        }
    }

    /// Requests 0.. answered with these counters, one by one.
    fn ledger(base: u64, counters: &[u64]) -> Ledger {
        let mut l = Ledger::new();
        l.counter_read(base);
        for (seq, c) in counters.iter().enumerate() {
            l.incr_sent(seq as u64, Instant::now());
            l.incr_answered(&answer(seq as u64, *c), Instant::now())
                .expect("in order");
        }
        l
    }

    #[test]
    fn a_counter_that_goes_on_loses_nothing() {
        let mut l = ledger(40, &[41, 42, 43]);
        l.counter_read(43);
        assert_eq!(
            (l.lost(), l.extra(), l.went_back(), l.acked()),
            (0, 0, 0, 3)
        );
    }

    #[test]
    fn values_given_out_again_are_lost_requests() {
        // 43 and 44 were acknowledged, then the guest was back at 42.
        let l = ledger(40, &[41, 42, 43, 44, 43, 44, 45]);
        assert_eq!((l.lost(), l.went_back()), (2, 1));
        // Once more, to below the first loss.
        let l = ledger(40, &[41, 42, 43, 42, 43, 41]);
        assert_eq!((l.lost(), l.went_back()), (5, 2));
    }

    #[test]
    fn others_increments_hide_no_loss() {
        // 2, 3 and 4 are another client's. 5 and 6 were acknowledged and are given out again; four requests were
        // acknowledged and the counter is 4, so that the sum alone would show nothing.
        let l = ledger(0, &[1, 5, 6, 4]);
        assert_eq!((l.lost(), l.extra()), (2, 3));
    }

    #[test]
    fn a_loss_the_last_read_shows_counts() {
        let mut l = ledger(0, &[1, 2, 3]);
        l.counter_read(1);
        assert_eq!((l.lost(), l.went_back()), (2, 1));
    }

    #[test]
    fn a_loss_hidden_by_requests_of_unknown_fate_shows_when_it_can() {
        let mut l = ledger(0, &[1, 2, 3]);
        for seq in 3..6 {
            l.incr_sent(seq, Instant::now());
        }
        l.connection_broken();
        assert_eq!((l.broken(), l.unacknowledged(), l.outstanding()), (1, 3, 0));
        // Two of the three were executed.
        l.incr_sent(6, Instant::now());
        l.incr_answered(&answer(6, 6), Instant::now()).expect("ok");
        assert_eq!((l.lost(), l.extra()), (0, 0));
        l.incr_sent(7, Instant::now());
        l.incr_answered(&answer(7, 9), Instant::now()).expect("ok");
        assert_eq!(l.extra(), 1, "one of the two more is explained");
    }

    #[test]
    fn executed_twice_is_seen() {
        assert_eq!(ledger(0, &[1, 2, 4, 5]).extra(), 1);
    }

    #[test]
    fn a_failed_request_is_not_acknowledged() {
        let mut l = ledger(0, &[1]);
        l.incr_sent(1, Instant::now());
        let mut a = answer(1, 2);
        a.status = Status::DiskError as u16;
        l.incr_answered(&a, Instant::now()).expect("in order");
        assert_eq!((l.acked(), l.failed(), l.lost(), l.extra()), (1, 1, 0, 0));
    }

    #[test]
    fn answers_out_of_protocol_are_refused_and_not_booked() {
        let mut l = ledger(0, &[]);
        let now = Instant::now();
        assert_eq!(
            l.incr_answered(&answer(0, 1), now),
            Err(LedgerError::Unasked(0))
        );
        l.incr_sent(0, now);
        assert!(matches!(
            l.incr_answered(&answer(1, 1), now),
            Err(LedgerError::OutOfOrder { got: 1, want: 0 })
        ));
        let mut a = answer(0, 1);
        a.op = 2;
        assert!(matches!(
            l.incr_answered(&a, now),
            Err(LedgerError::WrongOp { .. })
        ));
        assert_eq!((l.acked(), l.outstanding(), l.counter()), (0, 1, 0));
        // A hostile counter overflows nothing.
        l.incr_answered(&answer(0, u64::MAX), now)
            .expect("in order");
        l.incr_sent(1, now);
        l.incr_answered(&answer(1, 0), now).expect("in order");
        assert_eq!(l.lost(), 2, "neither is in a counter of 0");
    }
}
