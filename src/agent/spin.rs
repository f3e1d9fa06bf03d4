//! The wait before the wait: for a moment after the last packet the loop asks again instead of going to sleep, so that an
//! answer on its way finds it awake.
//!
//! Asking costs a processor, so it is bounded twice: by [`Spin::limit`], and by what the last eight waits were like. Only while
//! half of them ended within the limit is the next one begun awake; a pod that is idle, or speaks seldom, sleeps at once.
//! So does one that moves much at a time: it saves no wake-up that matters, and others have use for the processor.
//! No decisions about packets; touches nothing.

use std::time::Duration;

/// The longest limit: beyond it the sleep that is saved costs less than the processor.
pub(super) const LONGEST: Duration = Duration::from_micros(30);

/// Waits of the recent past that must have been short.
const ENOUGH: u32 = 4;

/// Decides whether to wait awake.
#[derive(Debug)]
pub(super) struct Spin {
    limit: Duration,
    /// The last eight waits, the newest in the lowest bit: 1 for one that ended within the limit.
    short: u8,
}

impl Spin {
    /// Waits awake for `limit`, at most [`LONGEST`]; never, if that is zero.
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit: limit.min(LONGEST), short: 0 }
    }

    /// How long to wait awake now.
    pub(super) fn limit(&self) -> Option<Duration> {
        (!self.limit.is_zero() && self.short.count_ones() >= ENOUGH).then_some(self.limit)
    }

    /// Throughput is what is wanted at the moment.
    pub(super) fn forget(&mut self) {
        self.short = 0;
    }

    /// Whether anybody wants to know how long waits are.
    pub(super) fn is_on(&self) -> bool {
        !self.limit.is_zero()
    }

    /// A wait has ended after `waited`.
    pub(super) fn note(&mut self, waited: Duration) {
        self.short = self.short << 1 | u8::from(waited <= self.limit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_micros(20);
    const LONG: Duration = Duration::from_millis(1);

    #[test]
    fn it_waits_awake_only_while_half_of_the_recent_waits_were_short() {
        let mut spin = Spin::new(LONGEST);
        assert_eq!(spin.limit(), None, "nothing is known yet");
        (0..3).for_each(|_| spin.note(SHORT));
        assert_eq!(spin.limit(), None);
        spin.note(SHORT);
        assert_eq!(spin.limit(), Some(LONGEST));
        (0..4).for_each(|_| spin.note(LONG));
        assert_eq!(spin.limit(), Some(LONGEST));
        spin.note(LONG);
        assert_eq!(spin.limit(), None, "an idle pod sleeps");
        (0..8).for_each(|_| spin.note(SHORT));
        spin.forget();
        assert_eq!(spin.limit(), None, "and one under load");
    }

    #[test]
    fn it_never_waits_awake_where_it_is_off_nor_longer_than_the_bound() {
        let mut off = Spin::new(Duration::ZERO);
        let mut on = Spin::new(Duration::from_secs(1));
        (0..8).for_each(|_| {
            off.note(Duration::ZERO);
            on.note(SHORT);
        });
        assert_eq!((off.limit(), off.is_on()), (None, false));
        assert_eq!(on.limit(), Some(LONGEST));
    }
}
