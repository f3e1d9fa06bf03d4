//! The enforcement ladder.

use serde::{Deserialize, Serialize};

/// How strictly the project's traffic is kept to the tunnel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// Everything of the project is sealed or dropped.
    #[default]
    Strict,
    /// Sealed where both ends are able, else carried by the platform and counted.
    Permissive,
    /// As permissive, with a record of each flow that strict would drop.
    Audit,
}
