//! What becomes of the pod's own connections when an address is protected, passed, or leaves the directory.
//!
//! - strict, an address is protected for the first time: connections that are older than guard and route end
//!   (`preexisting`), after both are in place, so that no new one slips in between
//! - the directory removes an address: connections to it, and those through a VIP to it, end (`peer_gone`) before the route
//!   becomes `prohibit`
//! - below strict, an address is captured or passed: each flow of a connected socket is pinned to the path that it has,
//!   before the route changes; pins end with their sockets, looked at every five seconds while there are pins
//!
//! One listing of the sockets before a batch and one after it, each only where it is needed. A connection that is opened
//! between the listing and the change of the route moves with its address. So do the flows for which there is no pin left:
//! every pin is a rule that each look-up of the pod walks past.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use tracing::{debug, warn};

use super::netlink::{self, Netlink};
use super::sockets::{self, Socket, Sockets};
use crate::proto::ladder::Mode;
use crate::proto::nat::Tuple;
use crate::proto::routing::{Batch, RouteChange};

/// Most flows that keep their path at one time.
const PINS: usize = 1024;
/// Between two looks for pins whose socket is gone.
pub(super) const SWEEP: Duration = Duration::from_secs(5);

/// Flows that ended or moved with a batch.
#[derive(Debug, Default)]
pub(super) struct Ended {
    /// Older than the protection of their address.
    pub(super) preexisting: u64,
    /// To a peer that is gone.
    pub(super) gone: u64,
    /// Moved, because there was no pin left.
    pub(super) unpinned: u64,
    /// Addresses whose older connections the kernel cannot destroy.
    pub(super) undestroyed: Vec<IpAddr>,
}

/// The pod's connections, as far as the control thread is concerned with them.
pub(super) struct Flows {
    sockets: Sockets,
    mode: Mode,
    /// Whether each address with a guard element is captured, else passed.
    captured: BTreeMap<IpAddr, bool>,
    /// Whether each pinned flow is sealed.
    pins: BTreeMap<Tuple, bool>,
    ended: Ended,
}

impl Flows {
    /// Takes over what a former agent left: addresses of table T, and pins.
    ///
    /// # Errors
    /// No sock_diag socket, or routes and rules that cannot be listed.
    pub(super) fn open(netlink: &mut Netlink, mode: Mode) -> anyhow::Result<Self> {
        let mut captured: BTreeMap<_, _> = netlink.protected()?.into_iter().map(|a| (a, true)).collect();
        captured.extend(netlink.passed()?.into_iter().map(|a| (a, false)));
        let mut flows = Self {
            sockets: Sockets::open()?,
            mode,
            captured,
            pins: netlink.pins()?.into_iter().collect(),
            ended: Ended::default(),
        };
        if mode == Mode::Strict {
            netlink.unpin(std::mem::take(&mut flows.pins))?;
        }
        Ok(flows)
    }

    /// Before the changes of a batch: ends what leads to peers that are gone, pins what would move.
    ///
    /// # Errors
    /// The kernel refused a rule.
    pub(super) fn prepare(&mut self, netlink: &mut Netlink, batch: &Batch) -> Result<(), netlink::Error> {
        let mut gone = BTreeSet::new();
        let mut moving = BTreeMap::new();
        for change in &batch.changes {
            match *change {
                RouteChange::Prohibit(address) => _ = gone.insert(address),
                RouteChange::Protect(address) => _ = moving.insert(address, true),
                RouteChange::Pass(address) => _ = moving.insert(address, false),
                _ => {}
            }
        }
        if self.mode == Mode::Strict {
            moving.clear();
        }
        // What nobody protected so far went in clear.
        moving.retain(|address, capture| self.is_captured(*address) != *capture);
        if gone.is_empty() && moving.is_empty() && batch.resets.is_empty() {
            return Ok(());
        }
        let Some(sockets) = self.list() else { return Ok(()) };
        let resets: BTreeSet<_> = batch.resets.iter().copied().collect();
        for socket in sockets.iter().filter(|socket| socket.is_tcp() && socket.is_live()) {
            let clear = self.pins.get(&socket.tuple) == Some(&false);
            let lost = gone.contains(&socket.tuple.remote.0) || resets.contains(&socket.tuple);
            if lost && !clear && self.destroy(socket) {
                self.ended.gone += 1;
            }
        }
        let mut wanted: Vec<_> = sockets
            .iter()
            .filter(|socket| socket.is_live() && !self.pins.contains_key(&socket.tuple))
            .filter_map(|socket| Some((socket.tuple, !moving.get(&socket.tuple.remote.0)?)))
            .collect();
        if self.pins.len() + wanted.len() > PINS {
            self.unpin_closed(netlink, &sockets)?;
            let room = PINS.saturating_sub(self.pins.len());
            self.ended.unpinned += wanted.len().saturating_sub(room) as u64;
            wanted.truncate(room);
        }
        netlink.pin(wanted.iter().copied())?;
        self.pins.extend(wanted);
        Ok(())
    }

    /// After the changes of a batch: notes them, and ends what is older than the protection of its address. `named`: addresses
    /// that were to be retired and stayed.
    pub(super) fn conclude(&mut self, batch: &Batch, named: &[IpAddr]) {
        let mut fresh = BTreeSet::new();
        for change in &batch.changes {
            match *change {
                RouteChange::Protect(address) if self.captured.insert(address, true) != Some(true) => {
                    fresh.insert(address);
                }
                RouteChange::Pass(address) => _ = self.captured.insert(address, false),
                RouteChange::Release(address) => _ = self.captured.remove(&address),
                RouteChange::Retire(address) if !named.contains(&address) => {
                    _ = self.captured.remove(&address)
                }
                _ => {}
            }
        }
        if self.mode != Mode::Strict || fresh.is_empty() {
            return;
        }
        let Some(sockets) = self.list() else {
            self.ended.undestroyed.extend(fresh);
            return;
        };
        for socket in sockets.iter().filter(|socket| socket.is_tcp() && socket.is_live()) {
            let address = socket.tuple.remote.0;
            if !fresh.contains(&address) {
                continue;
            }
            if self.destroy(socket) {
                self.ended.preexisting += 1;
            }
        }
    }

    /// Splits addresses into those that a socket of the pod names and those that none does.
    pub(super) fn split_named(&mut self, addresses: Vec<IpAddr>) -> (Vec<IpAddr>, Vec<IpAddr>) {
        // A list that cannot be had names every address.
        let Some(sockets) = self.list() else { return (addresses, Vec::new()) };
        // Those that only wait for stray segments would answer one.
        let named: BTreeSet<_> = sockets.iter().map(|socket| socket.tuple.remote.0).collect();
        addresses.into_iter().partition(|address| named.contains(address))
    }

    /// Addresses that sockets of the pod name.
    pub(super) fn spoken_to(&mut self) -> Vec<IpAddr> {
        let sockets = self.list().unwrap_or_default();
        let remote = sockets.iter().filter(|socket| socket.is_live()).map(|socket| socket.tuple.remote.0);
        remote.collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// What ended since it was asked last.
    pub(super) fn ended(&mut self) -> Ended {
        std::mem::take(&mut self.ended)
    }

    /// Whether there is something to sweep.
    pub(super) fn has_pins(&self) -> bool {
        !self.pins.is_empty()
    }

    /// Lets go of flows whose socket is gone.
    pub(super) fn sweep(&mut self, netlink: &mut Netlink) {
        let Some(sockets) = self.list() else { return };
        if let Err(error) = self.unpin_closed(netlink, &sockets) {
            warn!(%error, "cannot remove the rules of flows that ended");
        }
    }

    fn unpin_closed(&mut self, netlink: &mut Netlink, sockets: &[Socket]) -> Result<(), netlink::Error> {
        let open = sockets.iter().filter(|socket| socket.is_live()).map(|socket| socket.tuple);
        let open: BTreeSet<_> = open.collect();
        let closed: Vec<_> =
            self.pins.iter().filter(|(tuple, _)| !open.contains(tuple)).map(|(t, s)| (*t, *s)).collect();
        netlink.unpin(closed.iter().copied())?;
        self.pins.retain(|tuple, _| open.contains(tuple));
        Ok(())
    }

    fn is_captured(&self, address: IpAddr) -> bool {
        self.captured.get(&address).copied().unwrap_or(false)
    }

    fn list(&mut self) -> Option<Vec<Socket>> {
        let listed = self.sockets.list();
        listed.inspect_err(|error| warn!(%error, "the pod's connections are not known")).ok()
    }

    /// Whether it ended because of us. Where the kernel cannot do it, its address is remembered.
    fn destroy(&mut self, socket: &Socket) -> bool {
        match self.sockets.destroy(socket) {
            Ok(ended) => ended,
            Err(error) => {
                match error {
                    sockets::Error::Unsupported => debug!(%error, "older connections are refused instead"),
                    _ => warn!(%error, "a connection could not be ended"),
                }
                self.ended.undestroyed.push(socket.tuple.remote.0);
                false
            }
        }
    }
}
