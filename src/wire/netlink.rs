//! The messages of one datagram from the kernel's netlink, and nothing of what they say.
//!
//! Source: netlink(7), Documentation/userspace-api/netlink/intro.rst.

/// nlmsghdr: length, type, flags, sequence number, port.
const HEADER_LEN: usize = 16;

/// One message: its header's fields, and its bytes.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    /// Type: NLMSG_ERROR, NLMSG_DONE or one of the protocol's own.
    pub kind: u16,
    /// Sequence number of the request that it answers.
    pub sequence: u32,
    /// Header and payload.
    pub bytes: &'a [u8],
}

impl<'a> Message<'a> {
    /// What follows the header.
    #[must_use]
    pub fn payload(&self) -> &'a [u8] {
        &self.bytes[HEADER_LEN..]
    }

    /// The error code of an NLMSG_ERROR: 0 (an acknowledgement) or negative. `None` where it is cut off.
    #[must_use]
    pub fn error(&self) -> Option<i32> {
        self.payload().first_chunk().map(|code| i32::from_ne_bytes(*code))
    }
}

/// Each message of `datagram`; a message that is cut off, or shorter than a header, ends them.
pub fn messages(datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let length = usize::try_from(u32::from_ne_bytes(*rest.first_chunk()?)).ok()?;
        let bytes = rest.get(..length).filter(|bytes| bytes.len() >= HEADER_LEN)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        let kind = u16::from_ne_bytes(*bytes[4..].first_chunk()?);
        let sequence = u32::from_ne_bytes(*bytes[8..].first_chunk()?);
        Some(Message { kind, sequence, bytes })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message whose header claims `length` bytes, and has `payload` behind it.
    fn message(length: u32, kind: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 2]);
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(payload);
        bytes
    }

    #[test]
    fn messages_stand_on_four_byte_boundaries() {
        let mut bytes = message(17, 2, 7, &[1, 0, 0, 0]);
        bytes.extend(message(20, 3, 8, &(-2_i32).to_ne_bytes()));
        let found: Vec<_> = messages(&bytes).map(|m| (m.kind, m.sequence, m.payload(), m.error())).collect();
        assert_eq!(found, [(2, 7, &[1][..], None), (3, 8, &(-2_i32).to_ne_bytes()[..], Some(-2))]);
    }

    #[test]
    fn a_cut_off_datagram_ends_the_messages() {
        let whole = message(20, 2, 7, &[0; 4]);
        assert!((0..20).all(|len| messages(&whole[..len]).count() == 0));
        for length in [0, 4, 15, 21, u32::MAX] {
            assert_eq!(messages(&message(length, 2, 7, &[0; 4])).count(), 0, "{length}");
        }
        let two = [whole.clone(), message(99, 2, 8, &[])].concat();
        assert_eq!(messages(&two).count(), 1);
    }
}
