//! The one door between the guard's states: what may open the pod, and what may only close it.
//!
//! | call | what it may do |
//! |---|---|
//! | [`Door::prepare`] | load this build's rules before an agent starts: as open as they were found; filling where there were none |
//! | [`Door::close`] | close |
//! | [`Door::refresh`] | load other rules in the same state; closed where the tables are gone |
//! | [`Door::open`] | open: takes the word of an agent that has applied what this launcher told it ([`Ready`]) |
//! | [`Door::undo`] | after a launch that failed: remove the tables if there were none before |
//! | [`Door::remove`] | remove them on an order ([`OrderedStop`]) |
//!
//! Another mode that is less strict is an operator's order, too, but it waits for a ready agent like every opening.
//!
//! A launcher that dies between two of these leaves the pod in the state that is loaded: only `open` was reached through a
//! ready agent, so the next launcher takes anything else for closed.

use std::os::fd::OwnedFd;

use super::{Error, Found, Loaded, SHIELD, Skeleton, State, find, load, remove_tables};
use crate::agent::guard::TABLE;
use crate::control::FromAgent;
use crate::proto::ladder::Mode;

/// An agent has applied what this launcher told it: the pod may be opened.
#[derive(Debug)]
pub struct Ready(());

impl Ready {
    /// What `message` proves, if the launcher's newest whole directory is `generation` and its newest guard `skeleton`.
    #[must_use]
    pub fn of(message: &FromAgent, generation: u64, skeleton: u64) -> Option<Self> {
        let ready = match message {
            FromAgent::Ready { generation: applied, .. } | FromAgent::Committed { generation: applied } => {
                *applied >= generation
            }
            FromAgent::GuardFilled { generation: applied, skeleton: loaded, filled } => {
                *applied >= generation && *loaded == skeleton && *filled
            }
            _ => false,
        };
        ready.then_some(Self(()))
    }
}

/// Somebody with the right to do so ordered that the pod goes unprotected.
#[derive(Debug)]
pub struct OrderedStop(());

impl OrderedStop {
    /// SIGTERM or SIGINT to the launcher, or `tencrypt clear`.
    #[must_use]
    pub const fn by_the_operator() -> Self {
        Self(())
    }
}

/// Whether these rules would let pass what the rules that are loaded drop.
fn loosens(strict: bool, skeleton: &Skeleton) -> bool {
    strict && skeleton.mode != Mode::Strict
}

/// The guard of one pod.
#[derive(Debug)]
pub struct Door {
    netns: OwnedFd,
    found: Found,
    /// What this launcher loaded last.
    loaded: Option<State>,
    /// A launch that fails must leave the pod closed, whatever was found.
    stays_closed: bool,
}

impl Door {
    /// Looks at the guard of a namespace; changes nothing.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn at(netns: OwnedFd) -> Result<Self, Error> {
        let found = find(&netns)?;
        Ok(Self { netns, found, loaded: None, stays_closed: false })
    }

    /// The namespace.
    #[must_use]
    pub fn netns(&self) -> &OwnedFd {
        &self.netns
    }

    /// Whether an earlier launcher left a guard, and so perhaps agents.
    #[must_use]
    pub fn found_any(&self) -> bool {
        self.found != Found::Nothing
    }

    /// Whether an agent was ready when the guard was loaded last.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.loaded.map_or(matches!(self.found, Found::Open { .. }), |state| state == State::Open)
    }

    /// Before an agent starts.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn prepare(&mut self, skeleton: &mut Skeleton) -> Result<Loaded, Error> {
        if self.loaded.is_some() {
            return self.refresh(skeleton);
        }
        let state = match self.found {
            Found::Nothing => State::Filling,
            Found::Open { strict } if !loosens(strict, skeleton) => State::Open,
            Found::Open { .. } | Found::Closed => State::Closed,
        };
        self.load(skeleton, state)
    }

    /// Nothing passes any more but what the agent needs.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn close(&mut self, skeleton: &mut Skeleton) -> Result<Loaded, Error> {
        self.load(skeleton, State::Closed)
    }

    /// As [`Self::close`], for `--guard-first`: from now on a launch that fails leaves the pod closed.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn close_first(&mut self, skeleton: &mut Skeleton) -> Result<Loaded, Error> {
        self.stays_closed = true;
        self.close(skeleton)
    }

    /// Other rules in the same state. Those of a less strict mode wait for [`Self::open`].
    ///
    /// # Errors
    /// See [`Error`].
    pub fn refresh(&mut self, skeleton: &mut Skeleton) -> Result<Loaded, Error> {
        let state = match (find(&self.netns)?, self.loaded) {
            (Found::Nothing, _) => State::Closed,
            (Found::Open { strict }, None) if loosens(strict, skeleton) => return Ok(Loaded::Full),
            (Found::Open { .. }, None | Some(State::Open)) => State::Open,
            (Found::Closed, Some(State::Filling)) => State::Filling,
            _ => State::Closed,
        };
        self.load(skeleton, state)
    }

    /// Every packet is judged from now on.
    ///
    /// # Errors
    /// See [`Error`]: the pod stays as it was.
    pub fn open(&mut self, skeleton: &mut Skeleton, _ready: &Ready) -> Result<Loaded, Error> {
        self.load(skeleton, State::Open)
    }

    fn load(&mut self, skeleton: &mut Skeleton, state: State) -> Result<Loaded, Error> {
        let before = std::mem::replace(&mut skeleton.state, state);
        let loaded = load(&self.netns, skeleton).inspect_err(|_| skeleton.state = before)?;
        self.loaded = Some(state);
        Ok(loaded)
    }

    /// After a launch that failed: the pod is as closed as it was found.
    ///
    /// # Errors
    /// See [`Error`]: the pod stays as it is.
    pub fn undo(&mut self) -> Result<(), Error> {
        if self.found == Found::Nothing && !self.stays_closed && self.loaded.is_some() {
            return remove_tables(&self.netns, &[TABLE, SHIELD]);
        }
        Ok(())
    }

    /// Removes the guard; tables that are not there are fine.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn remove(&mut self, _order: &OrderedStop) -> Result<(), Error> {
        remove_tables(&self.netns, &[TABLE, SHIELD])
    }
}
