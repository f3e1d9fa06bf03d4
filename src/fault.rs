//! Faults that tests inject. Does nothing unless built with `--features fault-injection`.
//!
//! `TENCRYPT_FAULT` holds words separated by commas: `netlink-delay-ms=N` (each route batch is applied N ms late),
//! `no-dns-gate` (answers are released at once: shows what the gate is for).

/// Waits before a route batch is applied.
#[cfg(not(feature = "fault-injection"))]
pub fn delay_netlink() {}

/// Whether answers wait for their routes.
#[cfg(not(feature = "fault-injection"))]
#[must_use]
pub fn dns_gate() -> bool {
    true
}

#[cfg(feature = "fault-injection")]
pub use injected::{delay_netlink, dns_gate};

#[cfg(feature = "fault-injection")]
mod injected {
    use std::time::Duration;

    fn words() -> String {
        std::env::var("TENCRYPT_FAULT").unwrap_or_default()
    }

    /// Waits before a route batch is applied.
    pub fn delay_netlink() {
        let words = words();
        let delay = words.split(',').find_map(|word| word.strip_prefix("netlink-delay-ms="));
        if let Some(ms) = delay.and_then(|ms| ms.parse().ok()) {
            std::thread::sleep(Duration::from_millis(ms));
        }
    }

    /// Whether answers wait for their routes.
    #[must_use]
    pub fn dns_gate() -> bool {
        !words().split(',').any(|word| word == "no-dns-gate")
    }
}
