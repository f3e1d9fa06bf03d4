//! Faults that tests inject. Does nothing unless built with `--features fault-injection`.
//!
//! `TENCRYPT_FAULT` holds words separated by commas: `netlink-delay-ms=N` (each route batch is applied N ms late),
//! `no-dns-gate` (answers are released at once: shows what the gate is for),
//! `kill=SIDE:DIRECTION:MESSAGE:N:SIGNAL:WHO:FILE` (at the N-th such message of the channel, SIDE (`launcher` or `agent`) sends
//! SIGNAL (`KILL` or `STOP`) to itself; with WHO `both`, a launcher sends it to its agents first. `send` comes before the
//! message leaves, `receive` after it was read. Nothing counts while FILE is empty; each occurrence appends a byte to it, so
//! that a fault comes once, whichever process of the pod meets it).

/// Waits before a route batch is applied.
#[cfg(not(feature = "fault-injection"))]
pub fn delay_netlink() {}

/// Whether answers wait for their routes.
#[cfg(not(feature = "fault-injection"))]
#[must_use]
pub fn dns_gate() -> bool {
    true
}

/// How much shorter limits of time are: a test waits for many of them.
#[cfg(feature = "fault-injection")]
pub const HASTE: u64 = 5;
/// How much shorter limits of time are.
#[cfg(not(feature = "fault-injection"))]
pub const HASTE: u64 = 1;

#[cfg(feature = "fault-injection")]
pub use injected::{at_message, delay_netlink, dns_gate};

#[cfg(feature = "fault-injection")]
mod injected {
    use std::fs::{File, read_dir, read_to_string};
    use std::io::Write as _;
    use std::sync::OnceLock;
    use std::time::Duration;

    use nix::sys::signal as raise;
    use rustix::process::{Pid, Signal, getpid, kill_process};

    fn words() -> String {
        std::env::var("TENCRYPT_FAULT").unwrap_or_default()
    }

    /// The fault of the channel.
    struct Kill {
        side: String,
        direction: String,
        message: String,
        occurrence: u64,
        signal: Signal,
        both: bool,
        /// Opened at the first message: later an agent may open no file.
        count: File,
    }

    fn kill() -> Option<&'static Kill> {
        static KILL: OnceLock<Option<Kill>> = OnceLock::new();
        KILL.get_or_init(|| words().split(',').find_map(|word| parse(word.strip_prefix("kill=")?))).as_ref()
    }

    fn parse(word: &str) -> Option<Kill> {
        let fields: Vec<&str> = word.split(':').collect();
        let [side, direction, message, occurrence, signal, who, file] = fields[..] else { return None };
        Some(Kill {
            side: side.to_owned(),
            direction: direction.to_owned(),
            message: message.to_owned(),
            occurrence: occurrence.parse().ok()?,
            signal: if signal == "STOP" { Signal::STOP } else { Signal::KILL },
            both: who == "both",
            count: File::options().append(true).read(true).open(file).ok()?,
        })
    }

    /// At a message: `direction` is `send` or `receive`, `peer` the process at the other end.
    pub fn at_message<M: std::fmt::Debug>(direction: &str, message: &M, peer: Option<Pid>) {
        let Some(kill) = kill() else { return };
        let to_agent = std::any::type_name::<M>().ends_with("ToAgent");
        let side = if to_agent == (direction == "send") { "launcher" } else { "agent" };
        let text = format!("{message:?}");
        let name = text.split(|c: char| !c.is_ascii_alphanumeric()).next().unwrap_or_default();
        if side != kill.side || direction != kill.direction || name != kill.message {
            return;
        }
        let counted = || kill.count.metadata().map_or(0, |file| file.len());
        if counted() == 0 || (&kill.count).write_all(b".").is_err() || counted() != kill.occurrence + 1 {
            return;
        }
        if kill.both {
            for agent in peer.filter(|peer| *peer != getpid()).into_iter().chain(children()) {
                // One that has ended meanwhile is what it was to be.
                let _ = kill_process(agent, kill.signal);
            }
        }
        signal_self(kill.signal);
    }

    fn children() -> Vec<Pid> {
        let parent = format!("\nPPid:\t{}\n", getpid().as_raw_nonzero());
        let processes = read_dir("/proc").into_iter().flatten().flatten();
        let ours = processes.filter(|process| {
            read_to_string(process.path().join("status")).is_ok_and(|status| status.contains(&parent))
        });
        ours.filter_map(|process| Pid::from_raw(process.file_name().to_str()?.parse().ok()?)).collect()
    }

    /// The one call for it that an agent may make.
    fn signal_self(signal: Signal) {
        let signal = if signal == Signal::STOP { raise::Signal::SIGSTOP } else { raise::Signal::SIGKILL };
        // It ends or stops here.
        let _ = raise::raise(signal);
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
