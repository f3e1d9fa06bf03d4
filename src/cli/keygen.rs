//! `tencrypt keygen`.

use std::io::{self, Write};

use anyhow::Context;

use crate::exit::{Exit, Failure};
use crate::launcher::keys;

/// Prints a new project key.
///
/// # Errors
/// The kernel gives no random bytes; standard output is closed.
pub fn keygen() -> Result<Exit, Failure> {
    let key = keys::keygen()?;
    writeln!(io::stdout(), "{}", key.as_str()).context("cannot print the key").map_err(Failure::kernel)?;
    Ok(Exit::Good)
}
