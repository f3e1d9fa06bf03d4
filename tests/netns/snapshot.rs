//! The state of a network namespace that a clean tear-down must give back exactly.
//!
//! Addresses, links, routes of all tables, rules, nft rulesets without counters, and every `net` sysctl,
//! as text, in sections; life times that run by themselves are blanked. May touch: reads only.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::pod;

/// One namespace's state, by section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot(BTreeMap<&'static str, String>);

const SECTIONS: &[(&str, &str)] = &[
    ("links", "ip -d link show"),
    ("addresses", "ip addr show"),
    ("routes4", "ip -4 route show table all"),
    ("routes6", "ip -6 route show table all"),
    ("rules4", "ip -4 rule show"),
    ("rules6", "ip -6 rule show"),
    ("nft", "nft -s list ruleset"),
];

impl Snapshot {
    /// Takes the state of the namespace behind `netns`.
    pub fn of(netns: &Path) -> Self {
        pod::enter(netns, || {
            let mut sections: BTreeMap<_, _> = SECTIONS
                .iter()
                .map(|(name, command)| {
                    let words: Vec<_> = command.split(' ').collect();
                    let out = Command::new(words[0]).args(&words[1..]).output();
                    let out = out.unwrap_or_else(|e| panic!("{command}: {e}"));
                    assert!(out.status.success(), "{command}: {}", String::from_utf8_lossy(&out.stderr));
                    (*name, settled(&String::from_utf8_lossy(&out.stdout)))
                })
                .collect();
            sections.insert("sysctls", sysctls());
            Self(sections)
        })
    }

    /// Only the `net` sysctls, which nothing may ever differ in.
    pub fn sysctls_of(netns: &Path) -> Self {
        pod::enter(netns, || Self(BTreeMap::from([("sysctls", sysctls())])))
    }

    /// The lines that only one of the two has, by section.
    pub fn difference(&self, after: &Self) -> Vec<String> {
        let mut found = Vec::new();
        for (section, before) in &self.0 {
            let now = after.0.get(section).map_or("", String::as_str);
            let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
            let (old, new) = (lines(before), lines(now));
            found.extend(old.iter().filter(|l| !new.contains(l)).map(|l| format!("{section}: - {l}")));
            found.extend(new.iter().filter(|l| !old.contains(l)).map(|l| format!("{section}: + {l}")));
        }
        found
    }
}

/// The text without the numbers that change by themselves.
fn settled(text: &str) -> String {
    let mut words = Vec::new();
    let mut skip = false;
    for line in text.lines() {
        let mut kept = Vec::new();
        for word in line.split_whitespace() {
            if skip {
                skip = false;
                continue;
            }
            skip = matches!(
                word,
                "expires" | "valid_lft" | "preferred_lft" | "qlen" | "promiscuity" | "allmulti"
            );
            if !skip {
                kept.push(word);
            }
        }
        words.push(kept.join(" "));
    }
    words.join("\n")
}

fn sysctls() -> String {
    let mut lines = Vec::new();
    walk(Path::new("/proc/sys/net"), &mut lines);
    lines.sort();
    lines.join("\n")
}

fn walk(folder: &Path, lines: &mut Vec<String>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() {
            walk(&path, lines);
        // The kernel draws the key of fast open when a program first uses it.
        } else if !path.ends_with("nf_conntrack_count")
            && !path.ends_with("tcp_fastopen_key")
            && let Ok(value) = fs::read_to_string(&path)
        {
            lines.push(format!("{} = {}", path.display(), value.trim()));
        }
    }
}
