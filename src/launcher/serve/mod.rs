//! What a launcher answers on its sockets.

pub(crate) mod collect;
mod status;

pub(super) use status::StatusServer;
