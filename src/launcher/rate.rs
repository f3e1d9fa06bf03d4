//! How often something may happen: so many times at once, then once per interval.
//!
//! The supervisor asks it before it does what an agent can make it do: load the guard, write a log line. Sans-IO: the time
//! is an argument.

use std::time::{Duration, Instant};

/// A limit, and how much of it is used.
#[derive(Clone, Debug)]
pub(super) struct Rate {
    at_once: u32,
    every: Duration,
    /// When nothing of it will be in use any more; none: it was never used.
    idle_at: Option<Instant>,
}

impl Rate {
    /// `at_once` times, then once per `every`.
    pub(super) const fn new(at_once: u32, every: Duration) -> Self {
        Self { at_once, every, idle_at: None }
    }

    /// Whether it may happen now; it is then counted.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let idle_at = self.after(now);
        let may = idle_at.saturating_duration_since(now) <= self.every * self.at_once;
        if may {
            self.idle_at = Some(idle_at);
        }
        may
    }

    /// When it may happen again: `now`, or later.
    pub(super) fn next(&self, now: Instant) -> Instant {
        let over = self.after(now).saturating_duration_since(now).saturating_sub(self.every * self.at_once);
        now + over
    }

    /// When nothing would be in use any more if it happened now.
    fn after(&self, now: Instant) -> Instant {
        self.idle_at.map_or(now, |at| at.max(now)) + self.every
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn so_many_happen_at_once_then_one_per_interval() {
        let (mut rate, start) = (Rate::new(20, 100 * MS), Instant::now());
        assert_eq!((0..1_000).filter(|_| rate.take(start)).count(), 20);
        let later = (1..=10_000).filter(|n| rate.take(start + *n * MS)).count();
        assert_eq!(later, 100);
    }

    #[test]
    fn after_a_rest_as_many_as_at_first_happen_at_once() {
        let (mut rate, start) = (Rate::new(3, 1_000 * MS), Instant::now());
        for begin in [start, start + 3_000 * MS, start + 60_000 * MS] {
            assert_eq!((0..10).filter(|_| rate.take(begin)).count(), 3);
        }
    }

    #[test]
    fn what_was_refused_may_happen_at_the_moment_that_is_told() {
        let (mut rate, start) = (Rate::new(2, 100 * MS), Instant::now());
        assert_eq!(rate.next(start), start);
        while rate.take(start) {}
        let next = rate.next(start + 30 * MS);
        assert_eq!(next, start + 100 * MS);
        assert!(!rate.take(next - MS) && rate.take(next));
    }
}
