//! What the process before this one has not let go of yet: the kernel takes its time to end a VM, or an agent.

use std::time::{Duration, Instant};

/// How long it is waited for; then somebody else has it.
const PATIENCE: Duration = Duration::from_secs(3);
const RETRY: Duration = Duration::from_millis(10);

/// Opens something, again and again while it is `busy`.
///
/// # Errors
/// The last attempt's.
pub(crate) fn once_free<T, E>(
    busy: impl Fn(&E) -> bool,
    mut open: impl FnMut() -> Result<T, E>,
) -> Result<T, E> {
    let until = Instant::now() + PATIENCE;
    loop {
        match open() {
            Err(e) if busy(&e) && Instant::now() < until => std::thread::sleep(RETRY),
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_busy_is_waited_for_and_nothing_else() {
        let mut left = 3;
        let opened = once_free(
            |e: &&str| *e == "busy",
            || {
                left -= 1;
                if left > 0 { Err("busy") } else { Ok(7) }
            },
        );
        assert_eq!((opened, left), (Ok(7), 0));
        let mut tries = 0;
        let refused = once_free(
            |e: &&str| *e == "busy",
            || {
                tries += 1;
                Err::<(), _>("missing")
            },
        );
        assert_eq!((refused, tries), (Err("missing"), 1));
    }
}
