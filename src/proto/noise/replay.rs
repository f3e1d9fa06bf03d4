//! Replay window: which counters of a session were accepted already.
//!
//! A ring of 64-bit blocks, one more than the window needs, so that moving forward clears whole blocks and never
//! a bit that is still inside. The session checks, authenticates, then updates.
//! Source: RFC 6479.

use super::constants::REPLAY_WINDOW;
use super::handover::WindowState;

const BLOCKS: u64 = REPLAY_WINDOW / 64 + 1;
#[expect(clippy::cast_possible_truncation, reason = "129")]
const RING: usize = BLOCKS as usize;

/// The greatest counters accepted, as bits.
pub(super) struct ReplayWindow {
    /// Greatest counter accepted, plus one.
    next: u64,
    ring: [u64; RING],
}

impl ReplayWindow {
    /// A window that has seen nothing.
    pub(super) const fn new() -> Self {
        Self { next: 0, ring: [0; RING] }
    }

    pub(super) fn export(&self) -> WindowState {
        WindowState { next: self.next, ring: self.ring.to_vec() }
    }

    /// The window that was exported; `None` where it has another shape.
    pub(super) fn import(state: &WindowState) -> Option<Self> {
        Some(Self { next: state.next, ring: state.ring.as_slice().try_into().ok()? })
    }

    /// Whether `counter` is inside or ahead of the window and was not accepted yet.
    pub(super) fn is_fresh(&self, counter: u64) -> bool {
        if counter >= self.next {
            return true;
        }
        if self.next - counter > REPLAY_WINDOW {
            return false;
        }
        let (slot, bit) = place(counter);
        self.ring[slot] & bit == 0
    }

    /// Marks `counter`, which is fresh and authenticated, as accepted.
    pub(super) fn accept(&mut self, counter: u64) {
        if counter >= self.next {
            let newest = self.next.checked_sub(1).map_or(0, |greatest| greatest / 64);
            let skipped = (counter / 64 - newest).min(BLOCKS);
            for block in 1..=skipped {
                self.ring[place((newest + block) * 64).0] = 0;
            }
            // The hard message limit keeps `counter` below u64::MAX.
            self.next = counter.saturating_add(1);
        }
        let (slot, bit) = place(counter);
        self.ring[slot] |= bit;
    }
}

fn place(counter: u64) -> (usize, u64) {
    let slot = (counter / 64 % BLOCKS) as usize;
    (slot, 1 << (counter % 64))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::proto::noise::constants::REJECT_AFTER_MESSAGES;

    fn take(window: &mut ReplayWindow, counter: u64) -> bool {
        let fresh = window.is_fresh(counter);
        if fresh {
            window.accept(counter);
        }
        fresh
    }

    #[test]
    fn each_counter_is_accepted_once() {
        let mut window = ReplayWindow::new();
        for counter in (0..20_000).rev().step_by(3).take(2_000).chain(20_000..30_000) {
            assert!(take(&mut window, counter), "{counter}");
            assert!(!take(&mut window, counter), "{counter}");
        }
    }

    #[test]
    fn window_is_exactly_8192_counters_wide() {
        for greatest in [8191, 8192, 8193, 8255, 8256, 100_000, 1 << 40, REJECT_AFTER_MESSAGES - 1] {
            let mut window = ReplayWindow::new();
            assert!(take(&mut window, greatest));
            assert!(window.is_fresh(greatest - 8191), "the oldest inside, under {greatest}");
            assert!(take(&mut window, greatest - 8191));
            assert!(!take(&mut window, greatest - 8191));
            if let Some(outside) = greatest.checked_sub(8192) {
                assert!(!window.is_fresh(outside), "the first outside, under {greatest}");
            }
        }
    }

    #[test]
    fn jump_over_the_whole_ring_forgets_every_old_bit() {
        let mut window = ReplayWindow::new();
        (0..9_000).for_each(|counter| assert!(take(&mut window, counter)));
        assert!(take(&mut window, 1 << 32));
        for counter in ((1 << 32) - 8191)..(1 << 32) {
            assert!(take(&mut window, counter), "{counter}");
        }
        assert!(!window.is_fresh(8_999));
    }

    #[test]
    fn window_that_moves_by_one_forgets_nothing_inside_it() {
        let mut window = ReplayWindow::new();
        for counter in 0..20_000 {
            assert!(take(&mut window, counter));
            let oldest = (counter + 1).saturating_sub(REPLAY_WINDOW);
            for seen in [oldest, oldest + 1, oldest + 63, counter].map(|seen| seen.min(counter)) {
                assert!(!window.is_fresh(seen), "{seen} under {counter}");
            }
        }
    }

    #[test]
    fn exported_window_goes_on_where_it_was() {
        let mut window = ReplayWindow::new();
        (0..9_000).step_by(3).for_each(|counter| window.accept(counter));
        let mut state = window.export();
        let mut successor = ReplayWindow::import(&state).unwrap();
        for counter in 0..9_100 {
            assert_eq!(successor.is_fresh(counter), window.is_fresh(counter), "{counter}");
        }
        assert!(!take(&mut successor, 8_997) && take(&mut successor, 8_996));
        state.ring.pop();
        assert!(ReplayWindow::import(&state).is_none(), "another shape");
    }

    proptest! {
        #[test]
        fn window_equals_its_model(counters in prop::collection::vec((0u64..3, 0u64..20_000), 1..400)) {
            let mut window = ReplayWindow::new();
            let mut seen = BTreeSet::new();
            let mut base = 0;
            for (jump, offset) in counters {
                base += jump * 3_000;
                let counter = base + offset;
                let greatest = seen.last().copied();
                let expected = !seen.contains(&counter)
                    && greatest.is_none_or(|greatest: u64| counter > greatest || greatest - counter < REPLAY_WINDOW);
                prop_assert_eq!(take(&mut window, counter), expected);
                if expected {
                    seen.insert(counter);
                }
            }
        }
    }
}
