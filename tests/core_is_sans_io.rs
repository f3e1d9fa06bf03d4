//! The shape of the source: the core is sans-IO, and `unsafe` stays where it belongs.
//!
//! 1. every file under `src/` is read, its comments and literals blanked
//! 2. in `proto/` and `wire/` nothing but tests may name a clock, a socket, a thread, the environment, a file,
//!    the operating system's randomness or a module that touches the kernel
//! 3. `unsafe` appears in `src/sys/` alone
//!
//! Lints hold the same rules where they can; this test holds the rest, also against `#[expect]`.

use std::fs;
use std::path::{Path, PathBuf};

/// What the core must not name, and why.
const FORBIDDEN: &[(&str, &str)] = &[
    ("Instant::now", "clock"),
    ("SystemTime", "clock"),
    (".elapsed(", "clock"),
    ("UdpSocket", "socket"),
    ("TcpStream", "socket"),
    ("TcpListener", "socket"),
    ("UnixStream", "socket"),
    ("UnixDatagram", "socket"),
    ("socket2", "socket"),
    ("netlink_", "socket"),
    ("OwnedFd", "descriptor"),
    ("BorrowedFd", "descriptor"),
    ("RawFd", "descriptor"),
    ("thread::", "thread"),
    ("tokio", "runtime"),
    ("async fn", "runtime"),
    ("Mutex", "lock"),
    ("RwLock", "lock"),
    ("mpsc", "channel"),
    ("env::", "environment"),
    ("fs::", "file"),
    ("File::", "file"),
    ("std::process", "process"),
    ("nix::", "kernel"),
    ("rustix::", "kernel"),
    ("libc::", "kernel"),
    ("crate::agent", "kernel"),
    ("crate::launcher", "kernel"),
    ("crate::sys", "kernel"),
    ("OsRng", "randomness of the system"),
    ("SysRng", "randomness of the system"),
    ("ThreadRng", "randomness of the system"),
    ("thread_rng", "randomness of the system"),
    ("getrandom", "randomness of the system"),
    ("from_os_rng", "randomness of the system"),
    ("rand::rng(", "randomness of the system"),
    ("rand::random", "randomness of the system"),
    ("SystemRandom", "randomness of the system"),
    ("println!", "output"),
    ("unsafe", "unsafe"),
];

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("readable folder") {
        let path = entry.expect("readable entry").path();
        if path.is_dir() {
            found.extend(rust_files(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn source_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// The text with comments, strings and character literals blanked; line breaks stay, so line numbers hold.
fn code_only(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut i = 0;
    let blank = |c: char| if c == '\n' { '\n' } else { ' ' };
    let ident = |c: char| c.is_alphanumeric() || c == '_';
    while i < chars.len() {
        let c = chars[i];
        let next = chars.get(i + 1).copied();
        let start = i;
        if c == '/' && next == Some('/') {
            while i < chars.len() && chars[i] != '\n' {
                i += 1;
            }
        } else if c == '/' && next == Some('*') {
            let mut depth = 0;
            while i < chars.len() {
                match (chars[i], chars.get(i + 1)) {
                    ('/', Some('*')) => (depth, i) = (depth + 1, i + 2),
                    ('*', Some('/')) => (depth, i) = (depth - 1, i + 2),
                    _ => i += 1,
                }
                if depth == 0 {
                    break;
                }
            }
        } else if c == 'r'
            && matches!(next, Some('"' | '#'))
            && !(i > 0 && ident(chars[i - 1]) && chars[i - 1] != 'b')
        {
            let hashes = chars[i + 1..].iter().take_while(|c| **c == '#').count();
            if chars.get(i + 1 + hashes) == Some(&'"') {
                i += hashes + 2;
                while i < chars.len() {
                    if chars[i] == '"'
                        && chars[i + 1..].iter().take(hashes).filter(|c| **c == '#').count() == hashes
                    {
                        i += 1 + hashes;
                        break;
                    }
                    i += 1;
                }
            } else {
                out.push(c);
                i += 1;
                continue;
            }
        } else if c == '"' {
            i += 1;
            while i < chars.len() && chars[i] != '"' {
                i += if chars[i] == '\\' { 2 } else { 1 };
            }
            i += 1;
        } else if c == '\'' && (next == Some('\\') || chars.get(i + 2) == Some(&'\'')) {
            i += if next == Some('\\') { 3 } else { 2 };
            while i < chars.len() && chars[i] != '\'' {
                i += 1;
            }
            i += 1;
        } else {
            out.push(c);
            i += 1;
            continue;
        }
        out.extend(chars[start..i.min(chars.len())].iter().map(|c| blank(*c)));
    }
    out
}

/// The code without the items marked `#[cfg(test)]`: tests may read files and clocks.
fn without_tests(code: &str) -> String {
    const MARK: &str = "#[cfg(test)]";
    let mut out = String::new();
    let mut rest = code;
    while let Some(at) = rest.find(MARK) {
        out.push_str(&rest[..at]);
        let item = &rest[at..];
        let mut depth = 0usize;
        let mut end = item.len();
        for (i, c) in item.char_indices().skip(MARK.len()) {
            match c {
                ';' if depth == 0 => end = i + 1,
                '{' => depth += 1,
                '}' if depth == 1 => end = i + 1,
                '}' => depth = depth.saturating_sub(1),
                _ => continue,
            }
            if end != item.len() {
                break;
            }
        }
        out.extend(item[..end].chars().filter(|c| *c == '\n'));
        rest = &item[end..];
    }
    out.push_str(rest);
    out
}

/// Every forbidden word in `code`, as `file:line word (why)`.
fn violations(file: &str, code: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (number, line) in code.lines().enumerate() {
        for (word, why) in FORBIDDEN {
            if names(line, word) {
                found.push(format!("{file}:{}: {word} ({why})", number + 1));
            }
        }
    }
    found
}

/// Whether the line has the word, not as the tail or head of a longer identifier.
fn names(line: &str, word: &str) -> bool {
    let ident = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + word.len()..].chars().next();
        let head_is_free = !word.starts_with(ident) || !before.is_some_and(ident);
        let tail_is_free = !word.ends_with(ident) || word.ends_with('_') || !after.is_some_and(ident);
        head_is_free && tail_is_free
    })
}

/// A module file that only tests compile: `tests.rs`, or anything in a folder `tests`.
fn is_test_file(path: &Path) -> bool {
    path.file_stem().is_some_and(|s| s == "tests" || s == "testing")
        || path.components().any(|c| c.as_os_str() == "tests")
}

#[test]
fn core_names_no_clock_socket_thread_environment_file_or_system_randomness() {
    let root = source_root();
    let mut found = Vec::new();
    let mut seen = 0;
    for folder in ["proto", "wire"] {
        for path in rust_files(&root.join(folder)) {
            let relative = path.strip_prefix(&root).expect("below the root");
            if is_test_file(relative) {
                continue;
            }
            seen += 1;
            let text = fs::read_to_string(&path).expect("readable source");
            found.extend(violations(&relative.display().to_string(), &without_tests(&code_only(&text))));
        }
    }
    assert!(seen > 2, "the core was not found below {}", root.display());
    // `#![forbid(unsafe_code)]` names the word as part of a lint, which `names` does not match.
    assert!(found.is_empty(), "the core does input or output:\n{}", found.join("\n"));
}

#[test]
fn core_modules_forbid_unsafe_and_deny_the_disallowed_lists() {
    for folder in ["proto", "wire"] {
        let text = fs::read_to_string(source_root().join(folder).join("mod.rs")).expect("readable source");
        let code = code_only(&text);
        assert!(code.contains("#![forbid(unsafe_code)]"), "{folder}/mod.rs does not forbid unsafe code");
        for lint in ["clippy::disallowed_methods", "clippy::disallowed_types"] {
            assert!(code.contains(lint), "{folder}/mod.rs does not deny {lint}");
        }
    }
}

#[test]
fn unsafe_appears_in_sys_alone() {
    let root = source_root();
    let mut found = Vec::new();
    for path in rust_files(&root) {
        let relative = path.strip_prefix(&root).expect("below the root");
        if relative.starts_with("sys") {
            continue;
        }
        let code = code_only(&fs::read_to_string(&path).expect("readable source"));
        for (number, line) in code.lines().enumerate().filter(|(_, line)| names(line, "unsafe")) {
            found.push(format!("{}:{}: {}", relative.display(), number + 1, line.trim()));
        }
    }
    assert!(found.is_empty(), "unsafe outside src/sys:\n{}", found.join("\n"));
}

/// The positive control: what the three tests above look for is found when it is there.
#[test]
fn planted_violations_are_found_and_comments_are_not() {
    let planted = "let t = Instant::now();\nuse std::thread::spawn;\nunsafe { f() }\nstd::env::var(\"X\")\n";
    assert_eq!(violations("planted", &code_only(planted)).len(), 4);
    let quiet = "// Instant::now()\n/* unsafe /* nested */ OsRng */\nlet s = \"Mutex\";\nlet r = r#\"fs::\"#; let c = '\"';\n\
                 let unsafe_code = b'\\''; fn not_unsafe_at_all<'a>(x: &'a str) {}\n";
    assert_eq!(violations("quiet", &code_only(quiet)), Vec::<String>::new());
    let test_only =
        "fn a() {}\n#[cfg(test)]\nmod tests { fn b() { let t = Instant::now(); } }\nfn c() { OsRng }\n";
    assert_eq!(
        violations("test_only", &without_tests(&code_only(test_only))),
        ["test_only:4: OsRng (randomness of the system)"]
    );
}
