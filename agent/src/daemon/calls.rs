//! Orders under their ids: each is carried out once, however often it is given, and its outcome is kept for a while, for
//! whoever could not wait for it or lost the connection.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use checkpoint::RequestId;

use super::env::lock;
use crate::control::Reply;

/// How many outcomes are kept.
const KEEP: usize = 1000;

/// One order.
#[derive(Default)]
struct Call {
    done: Mutex<Option<(Reply, Instant)>>,
    changed: Condvar,
}

impl Call {
    /// Its outcome, if there is one in time.
    fn wait(&self, limit: Duration) -> Option<Reply> {
        let done = lock(&self.done);
        let waited = self
            .changed
            .wait_timeout_while(done, limit, |done| done.is_none());
        let (done, _) = waited.unwrap_or_else(std::sync::PoisonError::into_inner);
        done.as_ref().map(|(reply, _)| reply.clone())
    }

    fn end(&self, reply: Reply) {
        *lock(&self.done) = Some((reply, Instant::now()));
        self.changed.notify_all();
    }

    fn ended(&self) -> Option<Instant> {
        lock(&self.done).as_ref().map(|(_, at)| *at)
    }
}

/// Ends a call whatever becomes of the thread that carries it out.
struct Ending(Arc<Call>);

impl Drop for Ending {
    fn drop(&mut self) {
        if self.0.ended().is_none() {
            let why = "the agent failed while it carried this out: its log says where";
            self.0.end(Reply::Error(why.into()));
        }
    }
}

/// All that this agent was given.
#[derive(Default)]
pub(super) struct Calls(Mutex<BTreeMap<RequestId, Arc<Call>>>);

impl Calls {
    /// Carries an order out, on a thread of its own, unless one of that id was given before; answers with its outcome, or
    /// after `limit` that it is not known yet.
    pub fn carry_out(
        &self,
        id: RequestId,
        limit: Duration,
        act: impl FnOnce() -> Reply + Send + 'static,
    ) -> Reply {
        let (call, new) = self.begin(id);
        if new {
            let ending = Ending(call.clone());
            let spawned = std::thread::Builder::new()
                .name("order".into())
                .spawn(move || ending.0.end(act()));
            if let Err(e) = spawned {
                call.end(Reply::Error(format!(
                    "starting a thread: {e}; nothing was done"
                )));
            }
        }
        Self::answer(id, &call, limit)
    }

    /// What became of an order that was given before.
    pub fn outcome(&self, id: RequestId, limit: Duration) -> Reply {
        let call = lock(&self.0).get(&id).cloned();
        match call {
            Some(call) => Self::answer(id, &call, limit),
            None => Reply::Unknown {
                id,
                why: "this agent knows of no such request: it was given to another host's, never arrived, or this one was started again since (`understudy status` shows what is)".into(),
            },
        }
    }

    fn answer(id: RequestId, call: &Call, limit: Duration) -> Reply {
        call.wait(limit).unwrap_or_else(|| Reply::Unknown {
            id,
            why: format!(
                "it is being carried out, and has no outcome after {} s",
                limit.as_secs()
            ),
        })
    }

    /// The call of that id, and whether it is new.
    fn begin(&self, id: RequestId) -> (Arc<Call>, bool) {
        let mut calls = lock(&self.0);
        if let Some(call) = calls.get(&id) {
            return (call.clone(), false);
        }
        if calls.len() >= KEEP {
            let ended = calls
                .iter()
                .filter_map(|(id, call)| Some((call.ended()?, *id)));
            if let Some((_, oldest)) = ended.min() {
                calls.remove(&oldest);
            }
        }
        let call = Arc::<Call>::default();
        calls.insert(id, call.clone());
        (call, true)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc::channel;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn l8_an_order_that_is_given_again_is_carried_out_once_and_answered_the_same() {
        let (calls, id) = (Calls::default(), RequestId::random());
        let counter = Arc::new(AtomicU32::new(0));
        for _ in 0..3 {
            let counter = counter.clone();
            let reply = calls.carry_out(id, LONG, move || {
                let n = counter.fetch_add(1, Ordering::Relaxed);
                Reply::Error(format!("refused {n}"))
            });
            assert!(
                matches!(&reply, Reply::Error(why) if why == "refused 0"),
                "{reply:?}"
            );
        }
        assert_eq!(counter.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn l8_what_takes_longer_than_anybody_waits_for_is_unknown_and_can_be_asked_for() {
        let (calls, id) = (Calls::default(), RequestId::random());
        let (go_on, waits) = channel::<()>();
        let reply = calls.carry_out(id, Duration::ZERO, move || {
            let _ = waits.recv();
            Reply::Ok
        });
        assert!(
            matches!(&reply, Reply::Unknown { id: of, .. } if *of == id),
            "{reply:?}"
        );
        assert!(matches!(
            calls.outcome(id, Duration::ZERO),
            Reply::Unknown { .. }
        ));
        go_on.send(()).unwrap();
        assert!(matches!(calls.outcome(id, LONG), Reply::Ok));
        assert!(matches!(
            calls.carry_out(id, LONG, || unreachable!()),
            Reply::Ok
        ));
        let never = calls.outcome(RequestId::random(), LONG);
        assert!(
            matches!(&never, Reply::Unknown { why, .. } if why.contains("knows of no such")),
            "{never:?}"
        );
    }

    #[test]
    fn one_that_panics_is_a_failure_and_keeps_nobody_waiting() {
        let (calls, id) = (Calls::default(), RequestId::random());
        let reply = calls.carry_out(id, LONG, || panic!("a test's"));
        assert!(
            matches!(&reply, Reply::Error(why) if why.contains("failed while")),
            "{reply:?}"
        );
    }

    #[test]
    fn only_so_many_outcomes_are_kept_and_none_that_is_not_known_yet() {
        let calls = Calls::default();
        let (go_on, waits) = channel::<()>();
        let open = RequestId::random();
        calls.carry_out(open, Duration::ZERO, move || {
            let _ = waits.recv();
            Reply::Ok
        });
        let first = RequestId::random();
        calls.carry_out(first, LONG, || Reply::Ok);
        for _ in 0..KEEP {
            calls.carry_out(RequestId::random(), LONG, || Reply::Ok);
        }
        assert!(lock(&calls.0).len() <= KEEP);
        assert!(matches!(
            calls.outcome(first, Duration::ZERO),
            Reply::Unknown { .. }
        ));
        go_on.send(()).unwrap();
        assert!(matches!(calls.outcome(open, LONG), Reply::Ok));
    }
}
