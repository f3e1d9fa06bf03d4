//! The descriptors that the loop waits for.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use crate::proto::dns::{QueryId, StreamId};

/// Who a ready descriptor belongs to.
#[derive(Clone, Copy, Debug)]
pub(super) enum Source {
    Tun,
    Socket(usize),
    Launchers,
    Channel,
    Applier,
    Helper,
    Listener(usize),
    Arp,
    Watch,
    /// Events of the guard about unknown addresses.
    Asks,
    Query(QueryId),
    Stream(StreamId),
}

/// Every descriptor that is waited for, by the token its events bear.
pub(super) struct Sources {
    pub(super) epoll: Epoll,
    pub(super) by_token: BTreeMap<u64, Source>,
    next: u64,
}

impl Sources {
    pub(super) fn new() -> nix::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        Ok(Self { epoll, by_token: BTreeMap::new(), next: 0 })
    }

    /// Waits for `flags` of `fd`; a closed descriptor leaves by itself, its token by [`Self::remove`].
    pub(super) fn add(&mut self, source: Source, fd: BorrowedFd<'_>, flags: EpollFlags) -> nix::Result<u64> {
        let token = self.next;
        self.next += 1;
        self.epoll.add(fd, EpollEvent::new(flags, token))?;
        self.by_token.insert(token, source);
        Ok(token)
    }

    pub(super) fn remove(&mut self, token: u64) {
        self.by_token.remove(&token);
    }

    pub(super) fn get(&self, token: u64) -> Option<Source> {
        self.by_token.get(&token).copied()
    }
}
