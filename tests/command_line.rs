//! The program as a person meets it: exit codes, what goes to which stream, and what it refuses. Needs no privilege.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Output};

fn tencrypt(line: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tencrypt"))
        .args(line.split_whitespace())
        .env_remove("TENCRYPT_LOG")
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn what_is_not_there_yet_ends_with_2_and_names_itself() {
    for (line, name) in [
        ("launch --netns a --project-key-file k --directory d --config f", "--config"),
        ("launch --config=f", "--config"),
        ("peers -o json", "peers"),
        ("node", "node"),
    ] {
        let output = tencrypt(line);
        assert_eq!(output.status.code(), Some(2), "{line}");
        assert!(stderr(&output).contains(&format!("`{name}` is not there yet")), "{}", stderr(&output));
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn help_and_version_go_to_standard_output_and_end_with_0() {
    for line in ["--help", "--version", "launch --help"] {
        let output = tencrypt(line);
        assert_eq!(output.status.code(), Some(0), "{line}");
        assert!(output.stderr.is_empty() && !output.stdout.is_empty());
    }
}

#[test]
fn keygen_prints_a_new_key_that_launch_would_take() {
    let keys: Vec<_> = (0..2).map(|_| tencrypt("keygen")).collect();
    for output in &keys {
        assert_eq!(output.status.code(), Some(0));
        assert!(output.stderr.is_empty());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let mut file =
            std::fs::File::options().create(true).truncate(true).write(true).mode(0o600).open(&path).unwrap();
        file.write_all(&output.stdout).unwrap();
        tencrypt::launcher::keys::ProjectKey::read(&path, "shop", Default::default()).unwrap();
    }
    assert_ne!(keys[0].stdout, keys[1].stdout);
}

#[test]
fn a_malformed_log_filter_ends_with_2() {
    let output = Command::new(env!("CARGO_BIN_EXE_tencrypt"))
        .arg("keygen")
        .env("TENCRYPT_LOG", "tencrypt=loud")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("TENCRYPT_LOG"));
}

#[test]
fn an_agent_without_a_launcher_ends_with_3_and_touches_nothing() {
    // Its descriptors are not open, or are not what they are said to be.
    let output = tencrypt("agent --netns-fd 1001 --listener-fd 1002");
    assert_eq!(output.status.code(), Some(3));
    assert!(stderr(&output).contains("--netns-fd"), "{}", stderr(&output));
}
