//! The signals of the operator.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// SIGTERM, SIGINT: remove everything.
    Stop,
    /// SIGQUIT: the launcher alone ends, the pod stays protected.
    Leave,
    /// SIGHUP: read key file and resolv.conf again, and replace the agent by one of the program that is on the disk now.
    Renew,
}

/// The signals that a launcher obeys.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    quit: Signal,
    hangup: Signal,
}

impl Signals {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            quit: signal(SignalKind::quit())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Cancel safe.
    pub(super) async fn next(&mut self) -> Order {
        tokio::select! {
            _ = self.terminate.recv() => Order::Stop,
            _ = self.interrupt.recv() => Order::Stop,
            _ = self.quit.recv() => Order::Leave,
            _ = self.hangup.recv() => Order::Renew,
        }
    }

    /// Waits for an order to stop: nothing else is obeyed before the pod is protected.
    pub(super) async fn stop(&mut self) {
        while self.next().await != Order::Stop {}
    }
}
