//! The control thread: puts the engine's route batches into the kernel, in order, while packets go on.
//!
//! One thread, blocking netlink sockets, one batch at a time: for an address to be protected first its guard element,
//! then its route; to be released the other way round. What becomes of connections in being: flows.rs. The driver is woken through an eventfd when a batch is done.

use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;

use anyhow::Context as _;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::flows::{self, Ended, Flows};
use super::guard::Guard;
use super::netlink::{Netlink, ProtectedRoute};
use crate::proto::ladder::Mode;
use crate::proto::mtu::inner_mtu;
use crate::proto::routing::{Batch, BatchId, RouteChange};

/// A finished batch, or why it could not be.
pub(super) struct Applied {
    pub(super) id: BatchId,
    pub(super) outcome: anyhow::Result<()>,
    /// Flows that ended or moved with it, in either case.
    pub(super) ended: Ended,
}

/// The driver's handle on the thread.
pub(super) struct Applier {
    batches: Option<Sender<Batch>>,
    applied: Receiver<Applied>,
    event: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

/// What a protected route depends on.
#[derive(Clone)]
pub(super) struct RouteFacts {
    /// Our own addresses.
    pub(super) own: Vec<IpAddr>,
    /// MTU of the pod's link.
    pub(super) link_mtu: u32,
}

impl Applier {
    /// Starts the thread in the calling thread's namespace.
    ///
    /// # Errors
    /// No eventfd, no thread, or the kernel does not say what a former agent left.
    pub(super) fn start(
        guard: Guard,
        mut netlink: Netlink,
        facts: RouteFacts,
        mode: Mode,
    ) -> anyhow::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).context("eventfd")?;
        let event = Arc::new(event);
        let (batches, inbox) = channel::<Batch>();
        let (outbox, applied) = channel();
        let wake = Arc::clone(&event);
        let flows = Flows::open(&mut netlink, mode).context("look at the pod's connections")?;
        let mut kernel = Kernel { guard, netlink, facts, flows };
        let thread = std::thread::Builder::new().name("applier".into()).spawn(move || {
            loop {
                let batch = match kernel.next(&inbox) {
                    Ok(batch) => batch,
                    Err(RecvTimeoutError::Timeout) => {
                        kernel.flows.sweep(&mut kernel.netlink);
                        continue;
                    }
                    Err(RecvTimeoutError::Disconnected) => return,
                };
                let outcome = kernel.apply(&batch);
                let ended = kernel.flows.ended();
                if outbox.send(Applied { id: batch.id, outcome, ended }).is_err() || wake.write(1).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            batches: Some(batches),
            applied,
            event,
            thread: Some(thread.context("start the control thread")?),
        })
    }

    /// Hands over a batch.
    pub(super) fn submit(&self, batch: Batch) {
        if let Some(batches) = &self.batches {
            // The thread ends only after this sender; a batch lost in between is never applied: closed.
            let _ = batches.send(batch);
        }
    }

    /// The next finished batch.
    pub(super) fn poll(&self) -> Option<Applied> {
        let _ = self.event.read();
        self.applied.try_recv().ok()
    }

    /// Waits for what was handed over, and ends the thread.
    pub(super) fn finish(mut self) {
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl AsFd for Applier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

struct Kernel {
    guard: Guard,
    netlink: Netlink,
    facts: RouteFacts,
    flows: Flows,
}

impl Kernel {
    /// Waits for a batch; a time-out means that pins are to be swept.
    fn next(&self, inbox: &Receiver<Batch>) -> Result<Batch, RecvTimeoutError> {
        if self.flows.has_pins() {
            inbox.recv_timeout(flows::SWEEP)
        } else {
            inbox.recv().map_err(|_| RecvTimeoutError::Disconnected)
        }
    }

    fn apply(&mut self, batch: &Batch) -> anyhow::Result<()> {
        crate::fault::delay_netlink();
        self.flows.prepare(&mut self.netlink, batch)?;
        for run in batch.changes.chunk_by(|a, b| std::mem::discriminant(a) == std::mem::discriminant(b)) {
            let addresses: Vec<IpAddr> = run.iter().map(RouteChange::address).collect();
            match run[0] {
                RouteChange::Protect(_) => {
                    self.guard.add(&addresses)?;
                    let routes: Vec<_> = addresses.iter().filter_map(|to| self.route(*to)).collect();
                    self.netlink.protect(&routes)?;
                }
                RouteChange::Pass(_) => {
                    self.guard.add(&addresses)?;
                    self.netlink.pass(&self.routed(&addresses))?;
                }
                RouteChange::Prohibit(_) => self.netlink.prohibit(&self.routed(&addresses))?,
                RouteChange::Release(_) => {
                    self.netlink.unprotect(&self.routed(&addresses))?;
                    self.guard.remove(&addresses)?;
                }
            }
        }
        self.flows.conclude(batch);
        Ok(())
    }

    /// The addresses that have routes.
    fn routed(&self, addresses: &[IpAddr]) -> Vec<IpAddr> {
        addresses.iter().copied().filter(|to| self.route(*to).is_some()).collect()
    }

    /// None: an address of a family that we do not have; its guard element alone keeps it closed.
    fn route(&self, to: IpAddr) -> Option<ProtectedRoute> {
        let own = *self.facts.own.iter().find(|own| own.is_ipv4() == to.is_ipv4())?;
        Some(ProtectedRoute { to, own, mtu: inner_mtu(self.facts.link_mtu, to) })
    }
}
