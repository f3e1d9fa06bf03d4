//! What the fuzz targets do with their bytes: plain functions over the public interface, so that `tests/corpora.rs` replays
//! what was found.
//!
//! | target | its bytes are | what must hold |
//! |---|---|---|
//! | `message_parser` | a datagram from anywhere | refused; nothing is sent, no timer moves, the session goes on |
//! | `session_open` | deliveries and edits of sealed records | a record opens once, inside the window, and only as it was sealed |
//! | `handshake` | operations on two transports and the wire between them | see there |
//! | `control_channel` | one packet of the launcher-agent channel | a message that survives sending it again, or refused |
//! | `dns_answer` | a query and its answer | no panic |
//! | `inner_packet` | an opened packet | no panic; every range lies inside |

mod handshake;
mod parsers;
mod transport;

pub use handshake::handshake;
pub use parsers::{control_channel, dns_answer, inner_packet};
pub use transport::{message_parser, session_open};
