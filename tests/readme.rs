//! What the README says of tests is so: each test that it names exists.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The words of `text` that begin as the name of a promise's test does.
fn promises(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let names = words.filter(|word| {
        let number = word.strip_prefix("promise_").and_then(|rest| rest.split_once('_'));
        number.is_some_and(|(number, _)| number.parse::<u8>().is_ok())
    });
    names.map(str::to_owned).collect()
}

fn read(path: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(path).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            read(&path, found);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            found.extend(promises(&fs::read_to_string(path).expect("a source file")));
        }
    }
}

#[test]
fn each_test_that_the_readme_names_exists_and_each_promise_has_one() {
    let named = promises(&fs::read_to_string(Path::new(ROOT).join("README.md")).unwrap());
    let mut tests = BTreeSet::new();
    for folder in ["src", "tests"] {
        read(&Path::new(ROOT).join(folder), &mut tests);
    }
    for name in &named {
        assert!(tests.contains(name), "{name}");
    }
    for promise in 1..=13 {
        let prefix = format!("promise_{promise}_");
        assert!(named.iter().any(|name| name.starts_with(&prefix)), "promise {promise}");
    }
}
