//! `tencrypt status`: what is asked for, what is printed, and the exit code.
//!
//! The documents are printed as they came, or a table of them; for one pod with its peers, flows and records.
//!
//! Exit code 0 if every pod is protected, 1 if one is not, 2 for a name that nothing protects.
//! May touch: what [`super::ask`] may.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, anyhow};

use super::ask::{Answer, pods};
use super::table;
use crate::cli::{self, Exit, Output};
use crate::exit::Failure;
use crate::launcher::pod::files::RUN_DIR;
use crate::launcher::pod::netns::Target;
use crate::status::{API_VERSION, State, schema};

/// Prints how one pod is, or every pod; or the schema of what it prints as JSON.
///
/// # Errors
/// Nothing protects the one that was named; the runtime files cannot be read; standard output is closed.
pub fn status(arguments: &cli::Status) -> Result<Exit, Failure> {
    if arguments.schema {
        print(&(schema() + "\n"))?;
        return Ok(Exit::Good);
    }
    let mut pods = pods(Path::new(RUN_DIR))
        .with_context(|| format!("cannot read {RUN_DIR}: run as root"))
        .map_err(Failure::kernel)?;
    if let Some(name) = &arguments.name {
        let target: Target = name.parse()?;
        let found = fs::metadata(target.path()).ok().map(|found| (found.dev(), found.ino()));
        pods.retain(|pod| Some(pod.owner.identity) == found);
        if pods.is_empty() {
            return Err(Failure::usage(anyhow!("nothing protects {name}")));
        }
    }
    let answers: Vec<_> = pods.iter().map(Answer::of).collect();
    let text = match arguments.output {
        Output::Table => table(&answers, arguments.name.is_some()),
        Output::Json => json(&answers, arguments.name.is_some()),
    };
    print(&text)?;
    Ok(exit(&answers))
}

fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout();
    let printed = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    printed.context("cannot print the status").map_err(Failure::failed)
}

fn exit(answers: &[Answer]) -> Exit {
    let all = answers.iter().all(|answer| answer.status.state == State::Protected);
    if all { Exit::Good } else { Exit::Failed }
}

/// The one document that was asked for, or a list.
fn json(answers: &[Answer], one: bool) -> String {
    if let (true, [answer]) = (one, answers) {
        return format!("{}\n", answer.text);
    }
    // No string of a document holds a line break as it is: each one only separates.
    let items: Vec<_> = answers.iter().map(|answer| answer.text.replace('\n', "\n    ")).collect();
    let items = if items.is_empty() { String::new() } else { format!("\n    {}\n  ", items.join(",\n    ")) };
    format!(
        "{{\n  \"apiVersion\": \"{API_VERSION}\",\n  \"kind\": \"PodStatusList\",\n  \"items\": [{items}]\n}}\n"
    )
}

/// A line per pod, and everything about the one that was asked for.
fn table(answers: &[Answer], one: bool) -> String {
    let mut text = table::pods(answers.iter().map(|answer| &answer.status));
    if let (true, [answer]) = (one, answers) {
        text += &table::details(&answer.status);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launcher::serve::collect::tests::protected;
    use crate::status::PodStatus;

    fn answers(statuses: Vec<PodStatus>) -> Vec<Answer> {
        statuses.into_iter().map(Answer::from).collect()
    }

    fn closed() -> PodStatus {
        PodStatus::closed("b".to_owned(), "no launcher")
    }

    #[test]
    fn one_pod_that_is_not_protected_is_a_failed_check() {
        let unprotected = PodStatus { state: State::Unprotected, ..protected("a") };
        for (statuses, wanted) in [
            (vec![], Exit::Good),
            (vec![protected("a"), protected("b")], Exit::Good),
            (vec![protected("a"), closed()], Exit::Failed),
            (vec![unprotected, protected("b")], Exit::Failed),
        ] {
            assert_eq!(exit(&answers(statuses)), wanted);
        }
    }

    #[test]
    fn json_is_one_document_for_a_name_and_a_list_otherwise() {
        let pair = answers(vec![protected("a"), closed()]);
        let one: PodStatus = serde_json::from_str(&json(&pair[..1], true)).unwrap();
        assert_eq!(one, protected("a"));
        for answers in [&pair[..], &pair[..1], &[]] {
            let list: serde_json::Value = serde_json::from_str(&json(answers, false)).unwrap();
            assert_eq!((&list["kind"], &list["apiVersion"]), (&"PodStatusList".into(), &API_VERSION.into()));
            let items: Vec<PodStatus> = serde_json::from_value(list["items"].clone()).unwrap();
            assert_eq!(items, answers.iter().map(|answer| answer.status.clone()).collect::<Vec<_>>());
        }
    }
}
