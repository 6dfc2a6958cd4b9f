//! What clients saw of one VM's counter, and whether a single counter that nobody ever set back explains it.
//!
//! A client adds one and is told the new value, or asks for the value. The history is linearizable if the operations can
//! be put into one order, each between its call and its answer, in which a counter gives these answers. An operation that
//! was never answered may have happened at any time after its call, or not at all.
//!
//! Because every addition gives a value of its own, the order is known: by value, an addition before the questions that
//! saw it. What is left to check is that it agrees with time, and that the values nobody was told are explained by
//! additions whose answers never came. That is exact, and takes no search (the tests compare it with one that does).

use std::collections::BTreeMap;

/// What was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Add one; the answer is the new value.
    Add,
    /// The answer is the value.
    Read,
}

/// One operation. Times are nanoseconds since the same moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Op {
    /// What.
    pub ask: Ask,
    /// When it was called.
    pub from: u64,
    /// When its answer came, and the value; none: never.
    pub answer: Option<(u64, u64)>,
}

/// Why no counter explains a history.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A value was given out again: the addition that had it first is lost.
    #[error("the value {0} was the answer to two additions")]
    Twice(u64),
    /// The counter had been further already.
    #[error("a reply from the past: {} was answered {value}, called after {seen} had been answered", name(.ask))]
    Past {
        /// To what.
        ask: Ask,
        /// The answer.
        value: u64,
        /// What somebody had been told before it was called.
        seen: u64,
    },
    /// More than was ever added.
    #[error("the value {0} has no addition that could have made it by then")]
    Nowhere(u64),
}

fn name(ask: &Ask) -> &'static str {
    match ask {
        Ask::Add => "an addition",
        Ask::Read => "a question",
    }
}

/// Checks a history of a counter that was `base` at first.
///
/// # Errors
/// The first [`Violation`] found.
pub fn check(base: u64, ops: &[Op]) -> Result<(), Violation> {
    in_time(base, ops)?;
    explained(base, ops)
}

/// Whoever is called after an answer sees no less than it.
fn in_time(base: u64, ops: &[Op]) -> Result<(), Violation> {
    let mut calls: Vec<&Op> = ops.iter().filter(|op| op.answer.is_some()).collect();
    calls.sort_by_key(|op| op.from);
    let mut answers: Vec<(u64, u64)> = ops.iter().filter_map(|op| op.answer).collect();
    answers.sort_unstable();
    let mut answers = answers.into_iter().peekable();
    let mut seen = base;
    for op in calls {
        while let Some((_, value)) = answers.next_if(|(at, _)| *at < op.from) {
            seen = seen.max(value);
        }
        let Some((_, value)) = op.answer else {
            continue;
        };
        let fits = match op.ask {
            Ask::Add => value > seen,
            Ask::Read => value >= seen,
        };
        if !fits {
            let ask = op.ask;
            return Err(Violation::Past { ask, value, seen });
        }
    }
    Ok(())
}

/// Every value up to the highest has an addition of its own: one that was told so, or one that was never answered and
/// was called before anybody saw that value or a later one.
fn explained(base: u64, ops: &[Op]) -> Result<(), Violation> {
    let mut told: BTreeMap<u64, ()> = BTreeMap::new();
    // When each value was first seen, and values that only questions saw.
    let mut first_seen: BTreeMap<u64, u64> = BTreeMap::new();
    let mut silent: Vec<u64> = Vec::new();
    for op in ops {
        match (op.answer, op.ask) {
            (None, Ask::Add) => silent.push(op.from),
            (None, Ask::Read) => {}
            (Some((at, value)), ask) => {
                if ask == Ask::Add && told.insert(value, ()).is_some() {
                    return Err(Violation::Twice(value));
                }
                let seen = first_seen.entry(value).or_insert(at);
                *seen = at.min(*seen);
            }
        }
    }
    silent.sort_unstable();
    // The time by which the addition of a value has been called never gets later as values get lower.
    let mut by = u64::MAX;
    let mut deadlines: Vec<(u64, u64)> = Vec::new();
    for (value, seen) in first_seen.into_iter().rev() {
        by = by.min(seen);
        deadlines.push((value, by));
    }
    let mut silent = silent.into_iter();
    let mut next = base + 1;
    for (value, _) in deadlines.iter().rev() {
        while next <= *value {
            if !told.contains_key(&next) {
                // Seen by all that is at it or above.
                let at = deadlines.partition_point(|(v, _)| *v >= next);
                let by = at.checked_sub(1).map_or(u64::MAX, |i| deadlines[i].1);
                if silent.next().is_none_or(|from| from > by) {
                    return Err(Violation::Nowhere(next));
                }
            }
            next += 1;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn add(from: u64, to: u64, value: u64) -> Op {
        Op {
            ask: Ask::Add,
            from,
            answer: Some((to, value)),
        }
    }

    fn read(from: u64, to: u64, value: u64) -> Op {
        Op {
            ask: Ask::Read,
            from,
            answer: Some((to, value)),
        }
    }

    fn unanswered(from: u64) -> Op {
        Op {
            ask: Ask::Add,
            from,
            answer: None,
        }
    }

    #[test]
    fn a_counter_that_goes_on_is_fine() {
        let ops = [
            add(0, 10, 6),
            read(5, 12, 6),
            add(11, 20, 7),
            read(13, 14, 6),
            read(21, 22, 7),
        ];
        assert_eq!(check(5, &ops), Ok(()));
    }

    #[test]
    fn an_acknowledged_addition_that_is_lost_is_found() {
        // A machine of before 7 goes on: 7 is given out again.
        assert!(check(5, &[add(0, 1, 6), add(2, 3, 7), add(4, 5, 7)]).is_err());
        // And if both were under way at once.
        assert_eq!(
            check(5, &[add(0, 9, 6), add(1, 8, 6)]),
            Err(Violation::Twice(6))
        );
    }

    #[test]
    fn a_reply_from_the_past_is_found() {
        let past = Violation::Past {
            ask: Ask::Read,
            value: 6,
            seen: 7,
        };
        assert_eq!(
            check(5, &[add(0, 1, 6), add(2, 3, 7), read(4, 5, 6)]),
            Err(past)
        );
        // While the addition is not answered yet, either is right; and what was seen once stays.
        assert_eq!(
            check(5, &[add(0, 9, 6), read(1, 2, 6), read(3, 4, 6)]),
            Ok(())
        );
        assert!(check(5, &[add(0, 9, 6), read(1, 2, 6), read(3, 4, 5)]).is_err());
    }

    #[test]
    fn what_nobody_added_is_found() {
        assert_eq!(check(5, &[add(0, 1, 7)]), Err(Violation::Nowhere(6)));
        assert_eq!(check(5, &[add(0, 1, 7), unanswered(0)]), Ok(()));
        // Called too late to have been seen.
        assert_eq!(
            check(5, &[read(0, 1, 6), unanswered(2)]),
            Err(Violation::Nowhere(6))
        );
        assert_eq!(check(5, &[read(0, 1, 5), unanswered(2)]), Ok(()));
    }

    /// The definition itself: tries all orders.
    fn search(value: u64, ops: &[Op]) -> bool {
        if ops.iter().all(|op| op.answer.is_none()) {
            return true;
        }
        let ended = |op: &Op| op.answer.map_or(u64::MAX, |(at, _)| at);
        let first = ops.iter().map(ended).min().unwrap_or(u64::MAX);
        (0..ops.len()).any(|i| {
            let op = ops[i];
            // Nothing that has been answered before it was called is left.
            let next = value + u64::from(op.ask == Ask::Add);
            let fits = op.answer.is_none_or(|(_, v)| v == next);
            let mut rest = ops.to_vec();
            rest.remove(i);
            op.from <= first && fits && search(next, &rest)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]

        #[test]
        fn the_check_is_exact(
            ops in proptest::collection::vec((any::<bool>(), 0u64..12, 0u64..8, 0u64..4, 0u8..4), 0..6)
        ) {
            let ops: Vec<Op> = ops
                .into_iter()
                .map(|(adds, from, takes, value, answered)| Op {
                    ask: if adds { Ask::Add } else { Ask::Read },
                    from,
                    answer: (answered > 0).then_some((from + takes, value + 1)),
                })
                .collect();
            prop_assert_eq!(check(1, &ops).is_ok(), search(1, &ops), "{:?}", ops);
        }
    }
}
