//! Which peer holds how many entries of the flow table, and which ones: the table gives every peer its share.
//!
//! - the entries of a peer form a list, the oldest first; so a peer's own entries make room for its next one
//! - the counts are kept in order; so a full table knows at once which peer holds the most
//!
//! Both change when an entry begins or ends, never for a packet of a known flow.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use foldhash::quality::FixedState;

use super::nat::MAX_FLOWS;

/// No peer's share is smaller, however many peers there are.
pub(super) const LEAST_SHARE: usize = 1024;
/// The end of a list.
const NONE: u32 = u32::MAX;

/// The entries of one peer.
#[derive(Clone, Copy, Debug)]
struct Holder {
    count: usize,
    first: u32,
    last: u32,
}

/// Neighbours of a slot in the list of its peer.
#[derive(Clone, Copy, Debug)]
struct Link {
    before: u32,
    after: u32,
}

/// Every peer that has an entry.
#[derive(Debug)]
pub(super) struct Holders {
    by_peer: HashMap<IpAddr, Holder, FixedState>,
    by_count: BTreeSet<(usize, IpAddr)>,
    /// By slot.
    links: Vec<Link>,
}

impl Holders {
    pub(super) fn new(state: FixedState) -> Self {
        Self { by_peer: HashMap::with_hasher(state), by_count: BTreeSet::new(), links: Vec::new() }
    }

    /// Entries of `peer`.
    pub(super) fn count(&self, peer: IpAddr) -> usize {
        self.by_peer.get(&peer).map_or(0, |holder| holder.count)
    }

    /// Entries that each peer may have in a table that fills up: equal parts, and one part for a peer without an entry.
    pub(super) fn share(&self) -> usize {
        (MAX_FLOWS / (self.by_peer.len() + 1)).max(LEAST_SHARE)
    }

    /// The peer with the most entries.
    pub(super) fn largest(&self) -> Option<IpAddr> {
        self.by_count.last().map(|(_, peer)| *peer)
    }

    /// `slot` holds an entry of `peer` now, its newest.
    pub(super) fn insert(&mut self, peer: IpAddr, slot: u32) {
        if self.links.len() <= slot as usize {
            self.links.resize(slot as usize + 1, Link { before: NONE, after: NONE });
        }
        let holder = self.by_peer.entry(peer).or_insert(Holder { count: 0, first: NONE, last: NONE });
        self.by_count.remove(&(holder.count, peer));
        holder.count += 1;
        self.by_count.insert((holder.count, peer));
        append(&mut self.links, holder, slot);
    }

    /// `slot`, which held an entry of `peer`, does not any more.
    pub(super) fn remove(&mut self, peer: IpAddr, slot: u32) {
        let Some(holder) = self.by_peer.get_mut(&peer) else { return };
        unlink(&mut self.links, holder, slot);
        self.by_count.remove(&(holder.count, peer));
        holder.count -= 1;
        if holder.count > 0 {
            self.by_count.insert((holder.count, peer));
        } else {
            self.by_peer.remove(&peer);
        }
    }

    /// The oldest entry of `peer`, which becomes its newest: asked again, the next one is named.
    pub(super) fn rotate(&mut self, peer: IpAddr) -> Option<u32> {
        let holder = self.by_peer.get_mut(&peer)?;
        let slot = holder.first;
        unlink(&mut self.links, holder, slot);
        append(&mut self.links, holder, slot);
        Some(slot)
    }
}

fn append(links: &mut [Link], holder: &mut Holder, slot: u32) {
    links[slot as usize] = Link { before: holder.last, after: NONE };
    match holder.last {
        NONE => holder.first = slot,
        last => links[last as usize].after = slot,
    }
    holder.last = slot;
}

fn unlink(links: &mut [Link], holder: &mut Holder, slot: u32) {
    let Link { before, after } = links[slot as usize];
    match before {
        NONE => holder.first = after,
        before => links[before as usize].after = after,
    }
    match after {
        NONE => holder.last = before,
        after => links[after as usize].before = before,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, VecDeque};

    use proptest::prelude::*;

    use super::*;

    fn peer(n: u8) -> IpAddr {
        IpAddr::from([10, 1, 1, n])
    }

    proptest! {
        /// Counts, order and the greatest holder are those of plain lists.
        #[test]
        fn counts_and_lists_are_those_of_a_plain_model(
            steps in prop::collection::vec((0..3u8, 0..4u8, 0..16u32), 1..300)
        ) {
            let mut holders = Holders::new(FixedState::with_seed(1));
            let mut model: BTreeMap<u8, VecDeque<u32>> = BTreeMap::new();
            let mut owner: BTreeMap<u32, u8> = BTreeMap::new();
            for (what, who, slot) in steps {
                match (what, owner.get(&slot).copied()) {
                    (0, None) => {
                        owner.insert(slot, who);
                        model.entry(who).or_default().push_back(slot);
                        holders.insert(peer(who), slot);
                    }
                    (1, Some(who)) => {
                        owner.remove(&slot);
                        model.get_mut(&who).unwrap().retain(|other| *other != slot);
                        holders.remove(peer(who), slot);
                    }
                    _ => {
                        let list = model.entry(who).or_default();
                        let first = list.pop_front();
                        list.extend(first);
                        prop_assert_eq!(holders.rotate(peer(who)), first);
                    }
                }
                model.retain(|_, list| !list.is_empty());
                for who in 0..4 {
                    prop_assert_eq!(holders.count(peer(who)), model.get(&who).map_or(0, VecDeque::len));
                }
                let most = model.values().map(VecDeque::len).max();
                prop_assert_eq!(holders.largest().map(|who| holders.count(who)), most);
                prop_assert_eq!(holders.share(), (MAX_FLOWS / (model.len() + 1)).max(LEAST_SHARE));
            }
        }
    }
}
