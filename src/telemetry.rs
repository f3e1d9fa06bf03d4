//! Logs: one line per event on stderr, for launcher and agent alike.
//!
//! The filter is `TENCRYPT_LOG` if set, else follows `-v`. The launcher hands its filter to the agent in that same
//! variable, the only one of an agent's environment. May touch: the environment (read), stderr.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Environment variable with the log filter.
pub const LOG_VARIABLE: &str = "TENCRYPT_LOG";

/// The filter that applies: the environment's, else one for `verbose` times `-v`.
#[must_use]
pub fn filter(verbose: u8) -> String {
    match std::env::var(LOG_VARIABLE) {
        Ok(text) if !text.is_empty() => text,
        _ => match verbose {
            0 => "warn,tencrypt=info".to_owned(),
            1 => "info,tencrypt=debug".to_owned(),
            _ => "debug,tencrypt=trace".to_owned(),
        },
    }
}

/// Starts logging. Makes no thread.
///
/// # Errors
/// The filter is malformed, or logging was started before.
pub fn start(filter: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter)
        .map_err(|e| anyhow::anyhow!("{LOG_VARIABLE}: {e}: use for example `info` or `tencrypt=debug`"))?;
    tracing_subscriber::fmt()
        .compact()
        // Its own complaints go to stderr with a macro that panics: an agent whose log reader is gone must live on.
        .log_internal_errors(false)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(filter)
        .try_init()
        .map_err(|e| anyhow::anyhow!("logging: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_of_verbosity_is_a_valid_filter() {
        for verbose in 0..4 {
            EnvFilter::try_new(filter(verbose)).unwrap();
        }
        let error = start("tencrypt=loud").unwrap_err().to_string();
        assert!(error.contains(LOG_VARIABLE), "{error}");
    }
}
