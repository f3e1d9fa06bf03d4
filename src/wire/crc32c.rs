//! CRC32c of SCTP: verification, and the change that a change of ports makes.
//!
//! A CRC is linear: the CRCs of two packets of one length differ by the (raw) CRC of their difference. An update
//! therefore needs no look at the old value, and a wrong CRC stays wrong.
//! Source: RFC 9260 §6.8 and appendix A (reflected polynomial 0x82f63b78, stored little-endian at offset 8).

/// Where the CRC stands in the SCTP common header.
pub(super) const SCTP_FIELD: usize = 8;

const TABLE: [u32; 256] = table();

#[expect(clippy::cast_possible_truncation, reason = "the index is below 256")]
const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut crc = index as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[index] = crc;
        index += 1;
    }
    table
}

/// One step of the CRC register.
fn step(crc: u32, byte: u8) -> u32 {
    let [low, ..] = crc.to_le_bytes();
    TABLE[usize::from(low ^ byte)] ^ (crc >> 8)
}

fn steps(crc: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(crc, |crc, byte| step(crc, *byte))
}

/// CRC32c of `bytes`.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    !steps(u32::MAX, bytes)
}

/// The stored and the computed CRC of an SCTP packet; `None` where the common header is cut off.
#[must_use]
pub fn sctp(packet: &[u8]) -> Option<(u32, u32)> {
    let before = packet.get(..SCTP_FIELD)?;
    let (stored, after) = packet.get(SCTP_FIELD..)?.split_first_chunk()?;
    let computed = !steps(steps(steps(u32::MAX, before), &[0; 4]), after);
    Some((u32::from_le_bytes(*stored), computed))
}

/// What to XOR to the CRC when the first four bytes change by `difference` (XOR) and `following` bytes come after.
#[must_use]
pub fn change(difference: [u8; 4], following: usize) -> u32 {
    (0..following).fold(steps(0, &difference), |crc, _| step(crc, 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 3720 appendix B.4.
    #[test]
    fn known_answers_of_the_iscsi_specification_hold() {
        let ascending: Vec<u8> = (0..32).collect();
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(&ascending), 0x46dd_794e);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn change_of_the_first_bytes_is_linear() {
        let mut packet: Vec<u8> = (0..=255).cycle().take(777).collect();
        let before = crc32c(&packet);
        let difference = [1, 0xfe, 0x80, 0x55];
        for (byte, d) in packet.iter_mut().zip(difference) {
            *byte ^= d;
        }
        assert_eq!(before ^ change(difference, packet.len() - 4), crc32c(&packet));
    }
}
