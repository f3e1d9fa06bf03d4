//! Command line: what a person may write, and what becomes of it when it is wrong.
//!
//! 1. [`parse`] turns argv into a [`Cli`], or into a [`Refusal`] with text and exit code
//! 2. a name that is planned but not built is refused as such, before anything is done
//! 3. an unknown name is refused with the nearest known one
//!
//! The sub-commands that start nothing are here too: [`status()`] and [`keygen()`].
//!
//! Exit codes are [`Exit`]. Parsing touches nothing; the caller prints what it refuses.

use std::ffi::OsString;
use std::fmt;
use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

use ipnet::IpNet;

use crate::control::Inject;
use crate::exit::Exit;
use crate::launcher::pod::guard::Exemption;
use crate::proto::ladder::Mode;
use crate::proto::noise::Suite;
use crate::proto::ranges::Ranges;

mod ask;
mod keygen;
mod status;
mod table;

pub use keygen::keygen;
pub use status::status;

/// UDP port of the tunnel unless the key domain uses another: WireGuard's customary one.
pub const DEFAULT_PORT: u16 = 51_820;

/// Sub-commands that are planned.
const PLANNED_COMMANDS: [&str; 8] =
    ["node", "peers", "flows", "drops", "check", "verify", "gather", "completion"];

/// Flags of `launch` that are planned.
const PLANNED_FLAGS: [&str; 1] = ["--config"];

/// Values of flags that are planned: flag and value.
const PLANNED_VALUES: [(&str, &str); 1] = [("--output", "wide")];

/// Transparent, authenticated encryption of the traffic between a project's own pods.
#[derive(Debug, Parser)]
#[command(name = "tencrypt", version, propagate_version = true)]
#[command(after_help = "Exit codes: 0 good, 1 a check failed, 2 usage or configuration, 3 the kernel or a \
                        privilege refused.\nTENCRYPT_LOG sets the log filter, for example `tencrypt=debug`.")]
pub struct Cli {
    /// More log lines on stderr; twice for even more.
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The sub-commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Protect one pod, in the foreground; SIGTERM or SIGINT stops and cleans up, SIGHUP renews key and agent, SIGQUIT
    /// ends the launcher alone.
    Launch(Box<Launch>),
    /// Remove everything from a pod that no launcher holds and whose launch keeps failing: it speaks in clear from then on.
    Clear(Clear),
    /// Print a new project key.
    Keygen,
    /// Show how a pod is, or every pod; exit code 1 unless all are protected.
    Status(Status),
    /// The process inside a pod's network namespace; started by the launcher only.
    #[command(hide = true)]
    Agent(Agent),
}

/// `tencrypt launch`.
#[derive(Clone, Debug, Args)]
pub struct Launch {
    /// The pod's network namespace: a name under /run/netns, a path, or pid:N.
    #[arg(long, value_name = "NAME|PATH|pid:N", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub netns: String,
    /// File with the project key (mode 0600), as `tencrypt keygen` prints it.
    #[arg(long, value_name = "FILE")]
    pub project_key_file: PathBuf,
    /// Folder of Pod, Service, EndpointSlice and Node manifests (YAML or JSON); watched. May be repeated: the objects of other
    /// namespaces vouch for addresses that are not the project's.
    #[arg(long, value_name = "DIR", required = true)]
    pub directory: Vec<PathBuf>,
    /// The project; by default the namespace of the one Pod of the directory that has this pod's address.
    #[arg(long, value_name = "NAME")]
    pub project: Option<String>,
    /// UDP port of the tunnel; the same for the whole project.
    #[arg(long, value_name = "N", default_value_t = DEFAULT_PORT, value_parser = clap::value_parser!(u16).range(1..))]
    pub port: u16,
    /// The pod's resolv.conf; by default the one that belongs to the namespace.
    #[arg(long, value_name = "FILE")]
    pub resolv_conf: Option<PathBuf>,
    /// How strictly the project's traffic is kept to the tunnel.
    #[arg(long, value_name = "MODE", value_enum, default_value_t = Rung::Strict)]
    pub mode: Rung,
    /// What the tunnel encrypts with; the same for the whole project.
    #[arg(long, value_name = "CIPHER", value_enum, default_value_t = Cipher::Chacha20poly1305)]
    pub cipher: Cipher,
    /// Range of the cluster's pod addresses; may be repeated. Within the ranges only addresses that something vouches for are
    /// spoken to in clear. Without any, an address that nobody names passes.
    #[arg(long, value_name = "CIDR")]
    pub pod_cidr: Vec<IpNet>,
    /// Range of the cluster's Service addresses; may be repeated.
    #[arg(long, value_name = "CIDR")]
    pub service_cidr: Vec<IpNet>,
    /// Further addresses of nodes, for example of their tunnels; may be repeated.
    #[arg(long, value_name = "CIDR")]
    pub node_cidr: Vec<IpNet>,
    /// Addresses within the ranges that may be spoken to in clear, for example the API server's; may be repeated.
    #[arg(long, value_name = "CIDR[:PORT]")]
    pub exempt: Vec<Exemption>,
    /// What becomes of an address within the ranges that no object names. `pass` gives up the promise that nothing leaves in
    /// clear.
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = Unclassified::Drop)]
    pub unclassified: Unclassified,
    /// Let link-local addresses, multicast and broadcast pass in clear.
    #[arg(long)]
    pub allow_link_scope: bool,
    /// Let a DHCP client of the pod pass.
    #[arg(long)]
    pub allow_dhcp: bool,
    /// How packets from peers are handed to the pod's stack.
    #[arg(long, value_name = "WAY", value_enum, default_value_t = InjectWay::Auto)]
    pub inject: InjectWay,
    /// Close the pod first, before anything else is known, and open it when it is protected.
    #[arg(long)]
    pub guard_first: bool,
    /// How many microseconds (0 to 30) the agent waits awake for the next packet while packets come close together: shorter
    /// round trips for processor time.
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 30, value_parser = clap::value_parser!(u8).range(..=30))]
    pub spin: u8,
    /// Rekey sooner than the protocol's 120 s. For tests.
    #[arg(long, value_name = "SECONDS", hide = true, value_parser = clap::value_parser!(u64).range(1..=120))]
    pub rekey_after: Option<u64>,
}

impl Launch {
    /// The ranges within which an address has to be vouched for; none where the operator gave that up.
    #[must_use]
    pub fn ranges(&self) -> Ranges {
        match self.unclassified {
            Unclassified::Drop => self.pod_cidr.iter().chain(&self.service_cidr).copied().collect(),
            Unclassified::Pass => Ranges::default(),
        }
    }
}

/// `--unclassified`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Unclassified {
    /// Dropped until something vouches for it.
    Drop,
    /// Passed in clear.
    Pass,
}

/// `tencrypt clear`.
#[derive(Clone, Debug, Args)]
pub struct Clear {
    /// The pod, named as for `launch --netns`.
    #[arg(value_name = "NAME")]
    pub netns: String,
}

/// `--mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Rung {
    /// Everything of the project is sealed or dropped.
    Strict,
    /// Sealed where both ends are able, else left to the platform and counted.
    Permissive,
    /// As permissive, with a record of each flow that strict would drop.
    Audit,
}

impl From<Rung> for Mode {
    fn from(rung: Rung) -> Self {
        match rung {
            Rung::Strict => Self::Strict,
            Rung::Permissive => Self::Permissive,
            Rung::Audit => Self::Audit,
        }
    }
}

/// `--cipher`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Cipher {
    /// WireGuard's own.
    Chacha20poly1305,
    /// The same protocol with AES-256-GCM: faster where the processor has instructions for it.
    Aes256gcm,
}

impl From<Cipher> for Suite {
    fn from(cipher: Cipher) -> Self {
        match cipher {
            Cipher::Chacha20poly1305 => Self::ChaCha20Poly1305,
            Cipher::Aes256gcm => Self::Aes256Gcm,
        }
    }
}

/// `--inject`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum InjectWay {
    /// TUN where the kernel allows it.
    Auto,
    /// Written to tenc0, as super-packets.
    Tun,
    /// Through raw sockets on lo.
    Raw,
}

impl From<InjectWay> for Inject {
    fn from(way: InjectWay) -> Self {
        match way {
            InjectWay::Auto => Self::Auto,
            InjectWay::Tun => Self::Tun,
            InjectWay::Raw => Self::Raw,
        }
    }
}

/// `tencrypt status`.
#[derive(Clone, Debug, Args)]
pub struct Status {
    /// One pod only, named as for `launch --netns`.
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
    /// Table, or the documents of the pods' launchers.
    #[arg(short, long, value_name = "FORMAT", value_enum, default_value_t = Output::Table)]
    pub output: Output,
    /// Print the JSON schema of the documents, which describes each field, and ask no launcher.
    #[arg(long, conflicts_with_all = ["name", "output"])]
    pub schema: bool,
}

/// `--output`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// One line per pod.
    Table,
    /// Everything.
    Json,
}

/// `tencrypt agent`: inherited descriptors, by number.
#[derive(Debug, Args)]
pub struct Agent {
    /// The network namespace to enter.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(RawFd).range(3..))]
    pub netns_fd: RawFd,
    /// Where launchers connect.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(RawFd).range(3..))]
    pub listener_fd: RawFd,
}

/// Why there is nothing to run: a usage error, or help that was asked for.
#[derive(Debug)]
pub enum Refusal {
    /// A name that is known but has no code behind it yet.
    Planned {
        /// The sub-command or flag as written.
        name: String,
    },
    /// Everything else that the parser has to say, help and version included.
    Parser(clap::Error),
}

impl Refusal {
    /// How the process should end.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Parser(error) if !error.use_stderr() => Exit::Good,
            Self::Planned { .. } | Self::Parser(_) => Exit::Usage,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Planned { name } => writeln!(
                f,
                "error: `{name}` is not there yet: this version of tencrypt knows the name, not the feature\n\n\
                 For more information, try '--help'."
            ),
            Self::Parser(error) => write!(f, "{}", error.render()),
        }
    }
}

/// Parses argv, the program's name first.
///
/// # Errors
/// [`Refusal`]; also where help or the version was asked for.
pub fn parse<I, T>(argv: I) -> Result<Cli, Refusal>
where
    I: IntoIterator<Item = T>,
    T: Into<OsString> + Clone,
{
    Cli::try_parse_from(argv).map_err(|error| match planned(&error) {
        Some(name) => Refusal::Planned { name },
        None => Refusal::Parser(error),
    })
}

/// The planned name that `error` calls unknown.
fn planned(error: &clap::Error) -> Option<String> {
    let (kind, known): (_, &[&str]) = match error.kind() {
        ErrorKind::UnknownArgument => (ContextKind::InvalidArg, &PLANNED_FLAGS),
        ErrorKind::InvalidSubcommand => (ContextKind::InvalidSubcommand, &PLANNED_COMMANDS),
        ErrorKind::InvalidValue => return planned_value(error),
        _ => return None,
    };
    match error.get(kind)? {
        ContextValue::String(name) if known.contains(&name.as_str()) => Some(name.clone()),
        _ => None,
    }
}

/// The planned value that `error` calls invalid, with its flag.
fn planned_value(error: &clap::Error) -> Option<String> {
    let (Some(ContextValue::String(flag)), Some(ContextValue::String(value))) =
        (error.get(ContextKind::InvalidArg), error.get(ContextKind::InvalidValue))
    else {
        return None;
    };
    let (flag, _) = flag.split_once(' ')?;
    PLANNED_VALUES.contains(&(flag, value.as_str())).then(|| format!("{flag} {value}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAUNCH: &str = "tencrypt launch --netns pod --project-key-file k --directory d";

    fn words(line: &str) -> Vec<&str> {
        line.split(' ').collect()
    }

    fn launch(extra: &str) -> Launch {
        let cli = parse(words(format!("{LAUNCH} {extra}").trim_end())).unwrap();
        let Command::Launch(launch) = cli.command else { panic!("{cli:?}") };
        *launch
    }

    fn refused(line: &str) -> (Exit, String) {
        let refusal = parse(words(line)).unwrap_err();
        (refusal.exit(), refusal.to_string())
    }

    #[test]
    fn launch_takes_every_flag_of_its_grammar() {
        let got = launch(
            "--project shop --port 4500 --resolv-conf r --inject raw --mode audit --guard-first --rekey-after 2",
        );
        assert_eq!((got.netns.as_str(), got.project.as_deref(), got.port), ("pod", Some("shop"), 4500));
        assert_eq!(
            (got.resolv_conf, got.inject, got.mode, got.guard_first, got.rekey_after),
            (Some("r".into()), InjectWay::Raw, Rung::Audit, true, Some(2))
        );
    }

    #[test]
    fn launch_needs_three_flags_and_defaults_the_rest() {
        let got = launch("");
        assert_eq!((got.project, got.port, got.inject), (None, 51_820, InjectWay::Auto));
        assert_eq!(Mode::from(got.mode), Mode::Strict);
        assert!(!got.guard_first);
        for missing in ["--netns pod ", "--project-key-file k ", "--directory d"] {
            let (exit, text) = refused(LAUNCH.replace(missing, "").trim_end());
            assert_eq!(exit, Exit::Usage);
            assert!(text.contains(missing.split(' ').next().unwrap()), "{text}");
        }
    }

    #[test]
    fn ranges_exemptions_and_directories_may_be_repeated() {
        let got = launch(
            "--directory e --pod-cidr 10.1.0.0/16 --pod-cidr fd00:1::/64 --service-cidr 10.96.0.0/12 \
             --node-cidr 172.16.0.0/24 --exempt 10.96.0.1/32:443 --exempt [fd00:5::/64]:53 --exempt 10.5.0.0/16",
        );
        assert_eq!(got.directory, [PathBuf::from("d"), PathBuf::from("e")]);
        let ranges: Vec<_> = got.ranges().iter().map(|net| net.to_string()).collect();
        assert_eq!(ranges, ["10.1.0.0/16", "10.96.0.0/12", "fd00:1::/64"]);
        assert_eq!(got.node_cidr, ["172.16.0.0/24".parse::<IpNet>().unwrap()]);
        let exempt: Vec<_> = got.exempt.iter().map(ToString::to_string).collect();
        assert_eq!(exempt, ["10.96.0.1/32:443", "[fd00:5::/64]:53", "10.5.0.0/16"]);
    }

    #[test]
    fn flags_that_loosen_the_guard_are_off_unless_given() {
        let got = launch("");
        assert_eq!(got.unclassified, Unclassified::Drop);
        assert!(
            !got.allow_link_scope && !got.allow_dhcp && got.exempt.is_empty() && got.node_cidr.is_empty()
        );
        assert!(got.ranges().is_empty());
        let got = launch("--allow-link-scope --allow-dhcp --unclassified pass --pod-cidr 10.1.0.0/16");
        assert!(got.allow_link_scope && got.allow_dhcp);
        assert_eq!(got.unclassified, Unclassified::Pass);
        assert!(got.ranges().is_empty(), "no address is asked about");
        assert!(!launch("--unclassified drop --pod-cidr 10.1.0.0/16").ranges().is_empty());
    }

    #[test]
    fn ranges_and_exemptions_that_mean_nothing_are_refused_with_their_flag() {
        for (flag, value) in [
            ("--pod-cidr", "10.1.0.0"),
            ("--pod-cidr", "10.1.0.0/33"),
            ("--pod-cidr", "pods"),
            ("--service-cidr", "fd00::/129"),
            ("--service-cidr", "10.96.0.0/12,10.97.0.0/16"),
            ("--node-cidr", "172.16.0.0/"),
            ("--exempt", "10.5.0.0"),
            ("--exempt", "10.5.0.7/32:0"),
            ("--exempt", "10.5.0.7/32:https"),
            ("--exempt", "[fd00:5::/64]443"),
            ("--unclassified", "ask"),
        ] {
            let (exit, text) = refused(&format!("{LAUNCH} {flag} {value}"));
            assert_eq!(exit, Exit::Usage, "{flag} {value}");
            assert!(text.contains(flag) && text.contains(value), "{text}");
        }
        let (_, text) = refused(&format!("{LAUNCH} --exempt 10.5.0.0"));
        assert!(text.contains("for example 10.5.0.0/16"), "{text}");
        assert_eq!(refused(&format!("{LAUNCH} --capture 10.0.0.0/8")).0, Exit::Usage);
    }

    #[test]
    fn clear_takes_the_name_of_one_pod() {
        let cleared = |line: &str| match parse(words(line)).unwrap().command {
            Command::Clear(clear) => clear.netns,
            other => panic!("{other:?}"),
        };
        assert_eq!(cleared("tencrypt clear shop-client"), "shop-client");
        assert_eq!(cleared("tencrypt clear pid:7"), "pid:7");
        for line in ["tencrypt clear", "tencrypt clear a b", "tencrypt clear --netns a"] {
            assert_eq!(refused(line).0, Exit::Usage, "{line}");
        }
    }

    #[test]
    fn planned_flags_are_refused_by_name_in_either_spelling() {
        for flag in PLANNED_FLAGS {
            for line in [
                format!("{LAUNCH} {flag}"),
                format!("{LAUNCH} {flag}=x"),
                format!("tencrypt launch {flag} x"),
            ] {
                let (exit, text) = refused(&line);
                assert_eq!(exit, Exit::Usage);
                assert!(text.contains(&format!("`{flag}` is not there yet")), "{line}: {text}");
            }
        }
    }

    #[test]
    fn planned_sub_commands_are_refused_by_name() {
        for command in PLANNED_COMMANDS {
            let (exit, text) = refused(&format!("tencrypt {command} -o json"));
            assert_eq!(exit, Exit::Usage);
            assert!(text.contains(&format!("`{command}` is not there yet")), "{text}");
        }
    }

    #[test]
    fn status_takes_a_name_and_a_format_and_refuses_the_planned_one() {
        let status = |line: &str| match parse(words(line)).unwrap().command {
            Command::Status(status) => (status.name, status.output),
            other => panic!("{other:?}"),
        };
        assert_eq!(status("tencrypt status"), (None, Output::Table));
        assert_eq!(status("tencrypt status pod -o json"), (Some("pod".to_owned()), Output::Json));
        assert_eq!(status("tencrypt status --output=table"), (None, Output::Table));
        for line in ["tencrypt status -o wide", "tencrypt status pod --output=wide"] {
            let (exit, text) = refused(line);
            assert_eq!(exit, Exit::Usage);
            assert!(text.contains("`--output wide` is not there yet"), "{text}");
        }
        let (exit, text) = refused("tencrypt status -o yaml");
        assert_eq!(exit, Exit::Usage);
        assert!(text.contains("json") && !text.contains("not there yet"), "{text}");
        for line in ["tencrypt status pod --schema", "tencrypt status --schema -o table"] {
            assert_eq!(refused(line).0, Exit::Usage, "{line}");
        }
    }

    #[test]
    fn unknown_names_get_the_nearest_known_one() {
        for (line, wrong, near) in [
            (format!("{LAUNCH} --projct x"), "--projct", "--project"),
            (format!("{LAUNCH} --resolvconf x"), "--resolvconf", "--resolv-conf"),
            ("tencrypt luanch".to_owned(), "luanch", "launch"),
            ("tencrypt keygne".to_owned(), "keygne", "keygen"),
            (format!("{LAUNCH} --inject aut"), "aut", "auto"),
        ] {
            let (exit, text) = refused(&line);
            assert_eq!(exit, Exit::Usage);
            assert!(
                text.contains(wrong) && text.contains(near) && text.contains("similar"),
                "{line}: {text}"
            );
            assert!(!text.contains("not there yet"), "{text}");
        }
    }

    #[test]
    fn values_out_of_range_are_usage_errors() {
        for wrong in [
            "--port 0",
            "--port 65536",
            "--port x",
            "--rekey-after 0",
            "--rekey-after 121",
            "--netns pod",
            "--netns=",
        ] {
            assert_eq!(refused(&format!("{LAUNCH} {wrong}")).0, Exit::Usage, "{wrong}");
        }
        assert_eq!(refused("tencrypt").0, Exit::Usage);
        assert_eq!(refused("tencrypt agent --netns-fd 2 --channel-fd 3 --lock-fd 4").0, Exit::Usage);
    }

    #[test]
    fn help_and_version_are_good_ends_and_hide_what_is_not_for_people() {
        for line in ["tencrypt --version", "tencrypt --help", "tencrypt launch --help", "tencrypt help"] {
            assert_eq!(refused(line).0, Exit::Good, "{line}");
        }
        let (_, text) = refused("tencrypt --help");
        assert!(text.contains("launch") && text.contains("keygen") && !text.contains("agent "), "{text}");
        for command in PLANNED_COMMANDS {
            assert!(!text.lines().any(|l| l.trim_start().starts_with(command)), "{text}");
        }
        let (_, text) = refused("tencrypt launch --help");
        assert!(!text.contains("rekey"), "{text}");
    }
}
