//! What a launcher answers on its sockets.

mod status;

pub(super) use status::StatusServer;
