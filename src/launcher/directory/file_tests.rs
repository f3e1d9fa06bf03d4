//! The folder source on real folders.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use tempfile::TempDir;
use tokio::time::timeout;

use super::*;
use crate::exit::{Exit, ExitCode as _};
use crate::launcher::keys::keygen;
use crate::proto::noise::Suite;
use crate::proto::routing::Class;

/// Promised bound on the time from a change to its telling, on a machine that has a moment for us.
const PROMPT: Duration = Duration::from_millis(50);
/// The bound where a test is about what is told, not about when.
const SEEN: Duration = Duration::from_secs(2);
/// Nothing is told for this long: beyond the longest burst.
const SILENCE: Duration = Duration::from_millis(250);

struct Rig {
    dir: TempDir,
    source: FileSource,
    entries: Vec<IpAddr>,
}

fn pod(name: &str, address: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop}}\n\
         status: {{phase: Running, podIP: {address}}}\n"
    )
}

fn key() -> ProjectKey {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), keygen().unwrap().as_bytes()).unwrap();
    ProjectKey::read(file.path(), "shop", Suite::default()).unwrap()
}

fn follow(dir: &std::path::Path) -> (FileSource, Vec<Change>) {
    let source =
        Manifests::open(&[dir.to_owned()]).unwrap().follow(key(), vec!["10.0.0.1".parse().unwrap()]).unwrap();
    let changes = source.whole();
    (source, changes)
}

impl Rig {
    /// A followed folder that holds `a.yaml` with 10.0.0.2 and `b.yml` with 10.0.0.3.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let manifests = dir.path().join("d");
        fs::create_dir(&manifests).unwrap();
        fs::write(manifests.join("a.yaml"), pod("a", "10.0.0.2")).unwrap();
        fs::write(manifests.join("b.yml"), pod("b", "10.0.0.3")).unwrap();
        let (source, changes) = follow(&manifests);
        let mut rig = Self { dir, source, entries: Vec::new() };
        rig.apply(changes);
        rig.is(&["10.0.0.2", "10.0.0.3"]);
        rig
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("d").join(name)
    }

    /// Writes in place, like a shell's `>`.
    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    fn apply(&mut self, changes: Vec<Change>) {
        for change in changes {
            match change {
                Change::SetWorkload(w) => self.entries.push(w.address),
                Change::RemoveWorkload(a) => self.entries.retain(|e| *e != a),
                _ => {}
            }
        }
        self.entries.sort();
    }

    #[track_caller]
    fn is(&self, addresses: &[&str]) {
        let addresses: Vec<IpAddr> = addresses.iter().map(|a| a.parse().unwrap()).collect();
        assert_eq!(self.entries, addresses);
    }

    /// One telling, in time.
    async fn told(&mut self) {
        let changes = timeout(SEEN, self.source.next()).await.expect("told").changes;
        self.apply(changes);
    }

    async fn silent(&mut self) {
        let told = timeout(SILENCE, self.source.next()).await;
        assert!(told.is_err(), "told {told:?}");
    }
}

#[tokio::test]
async fn a_new_file_is_told_within_50_ms() {
    let mut rig = Rig::new();
    rig.silent().await;
    let mut times = Vec::new();
    for n in 4..24 {
        rig.write(
            &format!("{n}.yaml"),
            &pod("c", &format!("10.0.0.{n}")).replace("name: c", &format!("name: c{n}")),
        );
        let written = Instant::now();
        rig.told().await;
        times.push(written.elapsed());
        assert_eq!(rig.entries.len(), n - 1);
    }
    times.sort();
    assert!(times[times.len() / 2] < PROMPT, "{times:?}");
}

#[tokio::test]
async fn a_changed_file_is_told_with_what_changed_only() {
    let mut rig = Rig::new();
    rig.write("a.yaml", &pod("a", "10.0.0.4"));
    let changes = timeout(SEEN, rig.source.next()).await.unwrap().changes;
    assert!(
        matches!(&changes[..], [Change::RemoveWorkload(old), Change::SetWorkload(new)]
            if old.to_string() == "10.0.0.2" && new.address.to_string() == "10.0.0.4"),
        "{changes:?}"
    );
    rig.write("a.yaml", &format!("# a remark\n{}", pod("a", "10.0.0.4")));
    rig.silent().await;
}

#[tokio::test]
async fn a_change_of_equal_length_in_the_same_instant_is_seen() {
    let mut rig = Rig::new();
    for n in 4..9 {
        rig.write("a.yaml", &pod("a", &format!("10.0.0.{n}")));
        rig.told().await;
        rig.is(&["10.0.0.3", &format!("10.0.0.{n}")]);
    }
}

#[tokio::test]
async fn a_deleted_file_takes_its_objects_along() {
    let mut rig = Rig::new();
    fs::remove_file(rig.path("a.yaml")).unwrap();
    rig.told().await;
    rig.is(&["10.0.0.3"]);
}

#[tokio::test]
async fn an_emptied_folder_removes_nothing() {
    let mut rig = Rig::new();
    fs::remove_file(rig.path("a.yaml")).unwrap();
    fs::remove_file(rig.path("b.yml")).unwrap();
    rig.silent().await;
    rig.is(&["10.0.0.2", "10.0.0.3"]);
}

#[tokio::test]
async fn a_folder_that_is_emptied_slowly_removes_nothing() {
    // After a pause of the machine half of it is all there is, rightly: then once more.
    for _ in 0..10 {
        if emptied_slowly().await {
            return;
        }
    }
    panic!("ten times the machine paused");
}

/// False where the machine made a pause that may be taken for the end of the deletions.
async fn emptied_slowly() -> bool {
    let mut rig = Rig::new();
    for n in 0..20 {
        rig.write(&format!("n{n}.yaml"), &pod(&format!("n{n}"), &format!("10.0.1.{n}")));
    }
    while rig.entries.len() < 22 {
        rig.told().await;
    }
    let before = rig.entries.clone();
    for entry in fs::read_dir(rig.path("")).unwrap() {
        let began = Instant::now();
        fs::remove_file(entry.unwrap().path()).unwrap();
        let told = timeout(Duration::from_millis(15), rig.source.next()).await;
        if began.elapsed() > Duration::from_millis(50) {
            return false;
        }
        assert!(told.is_err(), "half of it was told: {told:?}");
    }
    rig.silent().await;
    assert_eq!(rig.entries, before);
    // And it comes back as slowly.
    for n in 0..3 {
        let began = Instant::now();
        rig.write(&format!("n{n}.yaml"), &pod(&format!("n{n}"), &format!("10.0.1.{n}")));
        let told = timeout(Duration::from_millis(600), rig.source.next()).await;
        if began.elapsed() > Duration::from_millis(800) {
            return false;
        }
        assert!(told.is_err(), "{told:?}");
    }
    rig.told().await;
    assert_eq!(rig.entries.len(), 3, "what never came back is gone");
    true
}

#[tokio::test]
async fn a_folder_that_names_nothing_of_the_project_any_more_removes_nothing() {
    let mut rig = Rig::new();
    rig.write("a.yaml", "{apiVersion: v1, kind: List, items: []}");
    rig.write("b.yml", "{apiVersion: v1, kind: List, items: []}");
    rig.silent().await;
    rig.is(&["10.0.0.2", "10.0.0.3"]);
    rig.write("b.yml", &pod("b", "10.0.0.3"));
    rig.told().await;
    rig.is(&["10.0.0.3"]);
}

#[tokio::test]
async fn a_folder_that_vanishes_and_returns_is_followed_again() {
    let mut rig = Rig::new();
    fs::remove_dir_all(rig.dir.path().join("d")).unwrap();
    rig.silent().await;
    rig.is(&["10.0.0.2", "10.0.0.3"]);
    fs::create_dir(rig.path("")).unwrap();
    rig.silent().await;
    rig.write("a.yaml", &pod("a", "10.0.0.2"));
    rig.silent().await;
    rig.write("c.yaml", &pod("c", "10.0.0.4"));
    rig.told().await;
    rig.is(&["10.0.0.2", "10.0.0.3", "10.0.0.4"]);
    let changes =
        timeout(Duration::from_secs(2), rig.source.next()).await.expect("b.yml is missing for good").changes;
    rig.apply(changes);
    rig.is(&["10.0.0.2", "10.0.0.4"]);
}

#[tokio::test]
async fn a_folder_exchanged_by_renaming_is_followed() {
    let mut rig = Rig::new();
    let next = rig.dir.path().join("next");
    fs::create_dir(&next).unwrap();
    fs::write(next.join("c.yaml"), pod("c", "10.0.0.4")).unwrap();
    fs::rename(rig.dir.path().join("d"), rig.dir.path().join("old")).unwrap();
    fs::rename(&next, rig.dir.path().join("d")).unwrap();
    rig.told().await;
    rig.is(&["10.0.0.4"]);
    rig.write("d.yaml", &pod("d", "10.0.0.5"));
    rig.told().await;
    rig.is(&["10.0.0.4", "10.0.0.5"]);
}

#[tokio::test]
async fn a_malformed_file_keeps_what_it_said_before() {
    let mut rig = Rig::new();
    let cut_off = ["apiVersion: v1\nkind: PodList\n", "apiVersion: v1\nkind: List\nitems:\n"];
    for text in
        ["{", "", "status: {phase", "{apiVersion: v1, kind: Pod, metadata: {}}"].iter().chain(&cut_off)
    {
        rig.write("a.yaml", text);
        rig.silent().await;
        rig.is(&["10.0.0.2", "10.0.0.3"]);
    }
    rig.write("b.yml", &pod("b", "10.0.0.5"));
    rig.told().await;
    rig.is(&["10.0.0.2", "10.0.0.5"]);
    rig.write("a.yaml", &pod("a", "10.0.0.4"));
    rig.told().await;
    rig.is(&["10.0.0.4", "10.0.0.5"]);
}

#[test]
fn a_malformed_manifest_stops_the_start_and_is_named() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.yaml"), "{").unwrap();
    fs::write(dir.path().join("c.yaml"), pod("c", "10.0.0.2")).unwrap();
    let Err(error) = Manifests::open(&[dir.path().to_owned()]) else { panic!("started") };
    assert!(error.to_string().contains("a.yaml") && error.exit() == Exit::Usage, "{error}");
}

#[tokio::test]
async fn files_that_are_no_manifests_are_left_alone() {
    let mut rig = Rig::new();
    let text = pod("x", "10.0.0.9");
    for name in [".hidden.yaml", "a.yaml~", "a.yaml.swp", "notes.txt", ".#a.yaml", "#a.yaml#", "yaml"] {
        rig.write(name, &text);
    }
    fs::create_dir(rig.path("folder.yaml")).unwrap();
    nix::unistd::mkfifo(&rig.path("fifo.yaml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    symlink("nowhere", rig.path("dangling.yaml")).unwrap();
    rig.silent().await;
}

#[tokio::test]
async fn a_file_is_taken_when_its_writer_closes_it() {
    use std::io::Write;
    let mut rig = Rig::new();
    let mut file = fs::File::create(rig.path("a.yaml")).unwrap();
    let (first, second) = (pod("a", "10.0.0.2"), pod("c", "10.0.0.4"));
    file.write_all(pod("z", "10.0.0.9").as_bytes()).unwrap();
    rig.silent().await;
    rig.write("b.yml", &pod("b", "10.0.0.5"));
    rig.told().await;
    rig.is(&["10.0.0.2", "10.0.0.5"]);
    write!(file, "---\n{first}---\n{second}").unwrap();
    rig.silent().await;
    drop(file);
    rig.told().await;
    rig.is(&["10.0.0.2", "10.0.0.4", "10.0.0.5", "10.0.0.9"]);
}

#[tokio::test]
async fn changes_of_one_burst_are_told_together() {
    let mut rig = Rig::new();
    rig.write("a.yaml", &pod("a", "10.0.0.4"));
    fs::remove_file(rig.path("b.yml")).unwrap();
    rig.write("c.json", r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"c","namespace":"shop"},"status":{"phase":"Running","podIP":"10.0.0.5"}}"#);
    rig.told().await;
    rig.is(&["10.0.0.4", "10.0.0.5"]);
    rig.silent().await;
}

#[tokio::test]
async fn an_object_that_moves_between_files_stays() {
    let mut rig = Rig::new();
    fs::rename(rig.path("a.yaml"), rig.path("z.yaml")).unwrap();
    rig.silent().await;
    rig.is(&["10.0.0.2", "10.0.0.3"]);
}

#[tokio::test]
async fn a_config_map_mount_is_followed_through_its_atomic_exchange() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir(at("..1")).unwrap();
    fs::write(at("..1/a.yaml"), pod("a", "10.0.0.2")).unwrap();
    symlink("..1", at("..data")).unwrap();
    symlink("..data/a.yaml", at("a.yaml")).unwrap();
    let (mut source, changes) = follow(dir.path());
    assert_eq!(changes.len(), 1);
    for n in 2..6 {
        let folder = format!("..{n}");
        fs::create_dir(at(&folder)).unwrap();
        fs::write(at(&folder).join("a.yaml"), pod("a", &format!("10.0.1.{n}"))).unwrap();
        symlink(&folder, at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
        fs::remove_dir_all(at(&format!("..{}", n - 1))).unwrap();
        let changes = timeout(SEEN, source.next()).await.unwrap().changes;
        assert!(
            matches!(&changes[..], [Change::RemoveWorkload(_), Change::SetWorkload(new)]
                if new.address.to_string() == format!("10.0.1.{n}")),
            "{changes:?}"
        );
    }
}

#[tokio::test]
async fn a_cancelled_wait_loses_nothing() {
    let mut rig = Rig::new();
    rig.write("a.yaml", &pod("a", "10.0.0.4"));
    for _ in 0..10 {
        let told = timeout(Duration::from_millis(1), rig.source.next()).await;
        if let Ok(news) = told {
            rig.apply(news.changes);
        }
    }
    if rig.entries.len() == 2 && rig.entries[0].to_string() == "10.0.0.2" {
        rig.told().await;
    }
    rig.is(&["10.0.0.3", "10.0.0.4"]);
}

#[tokio::test]
async fn what_is_written_between_reading_and_following_is_told() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.yaml"), pod("a", "10.0.0.2")).unwrap();
    let manifests = Manifests::open(&[dir.path().to_owned()]).unwrap();
    assert_eq!(manifests.objects().pods.len(), 1);
    fs::write(dir.path().join("b.yaml"), pod("b", "10.0.0.3")).unwrap();
    let mut source = manifests.follow(key(), vec!["10.0.0.1".parse().unwrap()]).unwrap();
    let changes = source.whole();
    assert_eq!(changes.len(), 1);
    let changes = timeout(SEEN, source.next()).await.unwrap().changes;
    assert!(matches!(&changes[..], [Change::SetWorkload(w)] if w.address.to_string() == "10.0.0.3"));
}

#[tokio::test]
async fn several_folders_are_one_directory_and_others_objects_vouch_for_addresses() {
    let (shop, bank) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::write(shop.path().join("a.yaml"), pod("a", "10.0.0.2")).unwrap();
    fs::write(bank.path().join("a.yaml"), pod("a", "10.0.0.7").replace("shop", "bank")).unwrap();
    let dirs = [shop.path().to_owned(), bank.path().to_owned()];
    let manifests = Manifests::open(&dirs).unwrap();
    let mut source = manifests.follow(key(), vec!["10.0.0.1".parse().unwrap()]).unwrap();
    let class = |source: &FileSource, address: &str| source.outside().class(address.parse().unwrap());
    assert_eq!(class(&source, "10.0.0.2"), Class::Own);
    assert_eq!(class(&source, "10.0.0.7"), Class::Outside);
    assert_eq!(class(&source, "10.0.0.8"), Class::Unknown);
    fs::write(bank.path().join("b.yaml"), pod("b", "10.0.0.8").replace("shop", "bank")).unwrap();
    let news = timeout(SEEN, source.next()).await.unwrap();
    assert!(news.outside && news.changes.is_empty(), "{news:?}");
    assert_eq!(class(&source, "10.0.0.8"), Class::Outside);
    fs::write(shop.path().join("b.yaml"), pod("b", "10.0.0.8")).unwrap();
    let news = timeout(SEEN, source.next()).await.unwrap();
    assert!(matches!(&news.changes[..], [Change::SetWorkload(_)]), "{news:?}");
    assert_eq!(class(&source, "10.0.0.8"), Class::Own, "an address of the project is never vouched for");
}

#[test]
fn a_missing_directory_is_a_clear_error() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    for path in [dir.path().join("none"), file] {
        let Err(error) = Manifests::open(std::slice::from_ref(&path)) else {
            panic!("{} opened", path.display())
        };
        assert_eq!(error.exit(), Exit::Usage);
        assert!(error.to_string().contains(path.to_str().unwrap()));
    }
}

#[test]
fn a_problem_is_reported_once_per_content() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.yaml");
    let now = std::time::Instant::now();
    fs::write(&file, pod("a", "10.0.0.1")).unwrap();
    let (mut folder, scan) = Folder::open(dir.path(), now).unwrap();
    assert!(scan.problems.is_empty());
    let mut problems = |text: &str| {
        fs::write(&file, text).unwrap();
        folder.scan(now).problems.len()
    };
    assert_eq!(problems("{"), 1);
    assert_eq!(problems("{"), 0);
    assert_eq!(problems("["), 1);
    assert_eq!(problems("["), 0);
    assert_eq!(problems(&pod("a", "10.0.0.2")), 0);
    assert_eq!(problems("["), 1);
    fs::remove_file(&file).unwrap();
    assert_eq!(folder.scan(now).problems, [Problem::Empty]);
    assert_eq!(folder.scan(now).problems, []);
    assert_eq!(folder.objects().pods.len(), 1);
}

#[test]
fn lost_events_lead_to_a_full_reading() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.yaml"), pod("a", "10.0.0.2")).unwrap();
    let now = std::time::Instant::now();
    let (mut folder, _) = Folder::open(dir.path(), now).unwrap();
    // The default queue holds 16,384 events.
    let (here, there) = (dir.path().join("here"), dir.path().join("there"));
    fs::write(&here, "x").unwrap();
    for _ in 0..5_000 {
        fs::rename(&here, &there).unwrap();
        fs::rename(&there, &here).unwrap();
    }
    fs::write(dir.path().join("a.yaml"), pod("a", "10.0.0.3")).unwrap();
    let scan = folder.scan(now);
    assert!(scan.changed && scan.problems.is_empty());
}

#[test]
fn a_manifest_beyond_the_size_cap_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let file = fs::File::create(dir.path().join("a.yaml")).unwrap();
    file.set_len(crate::launcher::directory::manifest::MANIFEST_MAX + 1).unwrap();
    let Err(error) = Folder::open(dir.path(), std::time::Instant::now()) else { panic!("read") };
    assert!(error.to_string().contains("16 MiB"), "{error}");
}
