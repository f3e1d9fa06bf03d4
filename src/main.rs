//! argv to sub-command to exit code.
//!
//! 1. the command line is parsed; what is wrong with it ends the process here
//! 2. the process is hardened: no core dumps, not readable through /proc by others, in the agent no new privileges
//! 3. `agent` enters its network namespace, before any thread exists
//! 4. the sub-command runs; its failure is one line on stderr and an exit code

use std::fmt::Display;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tencrypt::agent::ExitKind;
use tencrypt::cli::{self, Cli, Command};
use tencrypt::exit::{Exit, Failure};
use tencrypt::{agent, launcher, sys, telemetry};

/// Descriptors an agent may have.
const DESCRIPTORS: u64 = 8_192;

fn main() -> ExitCode {
    let cli = match cli::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(refusal) => {
            let exit = refusal.exit();
            if exit == Exit::Good {
                print(io::stdout(), refusal)
            } else {
                print(io::stderr(), refusal)
            }
            return exit.into();
        }
    };
    match run(&cli) {
        Ok(exit) => exit.into(),
        Err(failure) => {
            print(io::stderr(), format_args!("tencrypt: {:#}\n", failure.error));
            failure.exit.into()
        }
    }
}

/// Writes to a standard stream; one that is closed or full is nobody's loss but its reader's.
fn print(mut stream: impl Write, text: impl Display) {
    let _ = write!(stream, "{text}").and_then(|()| stream.flush());
}

fn run(cli: &Cli) -> Result<Exit, Failure> {
    let filter = telemetry::filter(cli.verbose);
    telemetry::start(&filter).map_err(Failure::usage)?;
    match &cli.command {
        Command::Keygen => cli::keygen(),
        Command::Status(arguments) => cli::status(arguments),
        Command::Launch(arguments) => {
            hide_memory().map_err(Failure::kernel)?;
            sys::fd::keep_to_ourselves();
            launcher::launch(arguments, &filter)
        }
        Command::Clear(arguments) => {
            sys::fd::keep_to_ourselves();
            launcher::clear_by_order(arguments)
        }
        Command::Agent(arguments) => {
            let listener = enter(arguments).map_err(Failure::kernel)?;
            match agent::run(listener).map_err(Failure::kernel)? {
                ExitKind::Stopped => Ok(Exit::Good),
                ExitKind::Failed(code) => Ok(Exit::from_code(code)),
            }
        }
    }
}

/// Keys stay out of core dumps, and out of reach of debuggers without privilege.
fn hide_memory() -> anyhow::Result<()> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0).context("cannot forbid core dumps")?;
    prctl::set_dumpable(false).context("cannot make the process undumpable")
}

/// Turns this process into an agent: hardened, in a session of its own (a terminal's signals are for the launcher, who
/// orders the stop), in the pod's network namespace. Gives the socket where launchers connect.
fn enter(arguments: &cli::Agent) -> anyhow::Result<OwnedFd> {
    hide_memory()?;
    // A socket per DNS query in flight, and up to 1,024 that hold ports: more than the customary soft limit.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).context("cannot read the limit of descriptors")?;
    setrlimit(Resource::RLIMIT_NOFILE, most.min(DESCRIPTORS), most).context("cannot raise it")?;
    // Started through /proc/self/exe, it would be called `exe`.
    prctl::set_name(c"tencrypt-agent").context("cannot set the process's name")?;
    prctl::set_no_new_privs().context("cannot give up new privileges")?;
    nix::unistd::setsid().context("cannot start a session")?;
    let netns = sys::fd::take_inherited(arguments.netns_fd).context("--netns-fd")?;
    let listener = sys::fd::take_inherited(arguments.listener_fd).context("--listener-fd")?;
    enter_network_namespace(netns)?;
    Ok(listener)
}

/// Enters `netns`, and proves it.
fn enter_network_namespace(netns: OwnedFd) -> anyhow::Result<()> {
    let threads = std::fs::read_dir("/proc/self/task").context("cannot count the threads")?.count();
    ensure!(threads == 1, "the process has {threads} threads: setns would move only one");
    let before = inode(&File::open("/proc/self/ns/net")?)?;
    let target = File::from(netns);
    let wanted = inode(&target)?;
    ensure!(wanted != before, "--netns-fd is the namespace of the launcher");
    setns(target.as_fd(), CloneFlags::CLONE_NEWNET)
        .context("cannot enter the network namespace: run as root (needs CAP_SYS_ADMIN)")?;
    let after = inode(&File::open("/proc/self/ns/net")?)?;
    ensure!(after == wanted, "the process is in another network namespace than ordered");
    Ok(())
}

/// Device and inode: the identity of a namespace.
fn inode(file: &File) -> anyhow::Result<(u64, u64)> {
    let metadata = file.metadata().context("cannot identify a namespace")?;
    Ok((metadata.dev(), metadata.ino()))
}
