//! Names of things: generational peer ids, and the random indices that datagrams carry.
//!
//! An index leads from a datagram to its peer in one lookup; the peer then compares it with its few sessions.
//! Source: WireGuard paper section 5.4 (sender and receiver indices).

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use foldhash::fast::FixedState;
use rand::Rng;
use rand_chacha::ChaCha20Rng;

/// A peer of this [`super::Transport`]. Ids of removed peers are never met again.
#[derive(Copy, Clone, Eq, PartialEq, Hash, Ord, PartialOrd, Debug)]
pub struct PeerId {
    slot: u32,
    generation: u32,
}

/// Values by [`PeerId`].
pub(super) struct Slab<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
}

struct Slot<T> {
    generation: u32,
    value: Option<Box<T>>,
}

impl<T> Slab<T> {
    pub(super) const fn new() -> Self {
        Self { slots: Vec::new(), free: Vec::new() }
    }

    pub(super) fn insert_with(&mut self, value: impl FnOnce(PeerId) -> T) -> PeerId {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, value: None });
            u32::try_from(self.slots.len() - 1).expect("fewer than 2^32 peers")
        });
        let entry = &mut self.slots[slot as usize];
        let id = PeerId { slot, generation: entry.generation };
        entry.value = Some(Box::new(value(id)));
        id
    }

    pub(super) fn remove(&mut self, id: PeerId) -> Option<Box<T>> {
        let entry = self.slots.get_mut(id.slot as usize).filter(|entry| entry.generation == id.generation)?;
        let value = entry.value.take()?;
        entry.generation = entry.generation.wrapping_add(1);
        self.free.push(id.slot);
        Some(value)
    }

    pub(super) fn get(&self, id: PeerId) -> Option<&T> {
        self.slots.get(id.slot as usize).filter(|entry| entry.generation == id.generation)?.value.as_deref()
    }

    pub(super) fn get_mut(&mut self, id: PeerId) -> Option<&mut T> {
        self.slots
            .get_mut(id.slot as usize)
            .filter(|entry| entry.generation == id.generation)?
            .value
            .as_deref_mut()
    }
}

/// What a peer writes into the receiver field to reach one handshake or session of ours.
#[derive(Copy, Clone, Eq, PartialEq, Hash, Debug)]
pub(super) struct ReceiverIndex(u32);

impl ReceiverIndex {
    pub(super) const fn from_wire(bytes: [u8; 4]) -> Self {
        Self(u32::from_le_bytes(bytes))
    }

    pub(super) const fn to_wire(self) -> [u8; 4] {
        self.0.to_le_bytes()
    }
}

/// Receiver indices in use: random, so that an outsider cannot guess one, and unique.
pub(super) struct IndexTable {
    // The keys are our own random numbers: no sender chooses what collides.
    owners: HashMap<u32, PeerId, FixedState>,
}

impl IndexTable {
    pub(super) fn new(rng: &mut ChaCha20Rng) -> Self {
        Self { owners: HashMap::with_hasher(FixedState::with_seed(rng.next_u64())) }
    }

    pub(super) fn insert(&mut self, owner: PeerId, rng: &mut ChaCha20Rng) -> ReceiverIndex {
        loop {
            let index = rng.next_u32();
            if let Entry::Vacant(entry) = self.owners.entry(index) {
                entry.insert(owner);
                return ReceiverIndex(index);
            }
        }
    }

    /// Gives `owner` an index that a former agent drew; `false` if it is taken.
    pub(super) fn adopt(&mut self, index: ReceiverIndex, owner: PeerId) -> bool {
        match self.owners.entry(index.0) {
            Entry::Vacant(entry) => {
                entry.insert(owner);
                true
            }
            Entry::Occupied(_) => false,
        }
    }

    pub(super) fn remove(&mut self, index: ReceiverIndex) {
        self.owners.remove(&index.0);
    }

    pub(super) fn owner(&self, index: ReceiverIndex) -> Option<PeerId> {
        self.owners.get(&index.0).copied()
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.owners.len()
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn id_of_a_removed_peer_never_names_its_successor() {
        let mut slab = Slab::new();
        let first = slab.insert_with(|_| "first");
        assert_eq!(slab.remove(first).as_deref(), Some(&"first"));
        let second = slab.insert_with(|_| "second");
        assert_ne!(first, second);
        assert!(slab.get_mut(first).is_none() && slab.remove(first).is_none());
        assert_eq!(slab.get_mut(second), Some(&mut "second"));
    }

    #[test]
    fn indices_are_unique_and_free_after_removal() {
        let mut rng = ChaCha20Rng::seed_from_u64(1);
        let mut table = IndexTable::new(&mut rng);
        let mut slab = Slab::new();
        let id = slab.insert_with(|_| ());
        let indices: Vec<_> = (0..1_000).map(|_| table.insert(id, &mut rng)).collect();
        assert_eq!(table.len(), 1_000);
        indices.iter().for_each(|index| assert_eq!(table.owner(*index), Some(id)));
        indices.iter().for_each(|index| table.remove(*index));
        assert_eq!((table.len(), table.owner(indices[0])), (0, None));
    }
}
