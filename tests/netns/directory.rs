//! Directory trouble: whatever happens to the folder, what was known stays, and works.
//!
//! One application works through all of it (`load`): no connection of it may end, no datagram be lost, nothing go in clear.
//! The folder's own tests (`src/launcher/directory`) hold each case by itself; here they meet a running project.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::Case;
use crate::lab::{Lab, PROJECT, PROTECTED, pool_vips};
use crate::load::{Size, await_route, route_to, under_load};
use crate::services::{Service, replace};

/// The cases of this file.
pub const CASES: &[Case] =
    &[Case::new("directory_trouble_changes_nothing_of_what_is_known", trouble).sealed().seconds(600)];

/// The Service that comes and goes; the nodes lead its VIPs to the web pods, so that a way around the tunnel would be seen.
const EXTRA: u16 = 9_700;
/// Beyond a burst, a retry and the time that deletions take.
const SETTLED: Duration = Duration::from_millis(500);

type Files = BTreeMap<String, String>;

fn read(directory: &Path) -> Files {
    let entries = fs::read_dir(directory).expect("the directory").flatten();
    entries
        .map(|entry| {
            let name = entry.file_name().into_string().expect("a name");
            (name, fs::read_to_string(entry.path()).expect("a manifest"))
        })
        .collect()
}

fn write(directory: &Path, files: &Files) {
    files.iter().for_each(|(name, text)| fs::write(directory.join(name), text).expect("a manifest"));
}

fn empty(directory: &Path) {
    for name in read(directory).keys() {
        fs::remove_file(directory.join(name)).expect("remove a manifest");
    }
}

/// How often the launchers of all protected pods said so.
fn said(lab: &Lab, text: &str) -> Vec<usize> {
    let log = |pod| fs::read_to_string(lab.run_dir().join(format!("log/launch-{pod}.err"))).expect("a log");
    PROTECTED.iter().map(|pod| log(pod).lines().filter(|line| line.contains(text)).count()).collect()
}

/// Makes trouble, waits until every launcher has said `text`, and lets it last: none says it again.
fn reported_once(lab: &Lab, text: &str, lasts: Duration, trouble: impl FnOnce()) {
    let before = said(lab, text);
    trouble();
    let wanted: Vec<_> = before.iter().map(|n| n + 1).collect();
    let end = Instant::now() + Duration::from_secs(10);
    while said(lab, text) != wanted {
        assert!(Instant::now() < end, "{text:?} not said once by each: {before:?}, {:?}", said(lab, text));
        thread::sleep(Duration::from_millis(20));
    }
    thread::sleep(lasts);
    assert_eq!(said(lab, text), wanted, "{text:?} was said again");
}

fn trouble(lab: &Lab) {
    let directory = &lab.directory(PROJECT);
    let saved = read(directory);
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let canary = under_load(lab, Size::SMALL, |load| {
            let check = |what: &str| {
                crate::say(what);
                load.assert_connections_go_on();
            };
            unfinished(lab, directory);
            check("half-written files");
            gone(lab, directory);
            check("an empty folder, and none");
            disordered(directory);
            check("renamed, reordered, repeated and invalid files");
            stale(lab, directory);
            check("an old version");
        });
        assert!(canary.sent > 1_000 && (canary.lost, canary.twice) == (0, 0), "{canary:?}");
    }));
    empty(directory);
    write(directory, &saved);
    outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

/// A file that its writer has not closed is not read; one that ends in the middle is not taken.
fn unfinished(lab: &Lab, directory: &Path) {
    let name = "pod-shop-web2.yaml";
    let text = fs::read_to_string(directory.join(name)).expect("its manifest");
    let whole = text.split_once("status:").expect("a status").0;
    let torn = format!("{whole}status: {{ podIPs: [").into_bytes();
    let (first, second) = torn.split_at(torn.len() / 2);
    let mut file = fs::File::create(directory.join(name)).expect("truncated");
    file.write_all(first).expect("write");
    thread::sleep(SETTLED);
    reported_once(lab, name, SETTLED, || {
        file.write_all(second).expect("write");
        drop(file);
    });
    replace(&directory.join(name), &text);
    thread::sleep(SETTLED);
}

/// Emptied and filled again; taken away and put back.
fn gone(lab: &Lab, directory: &Path) {
    let files = read(directory);
    reported_once(lab, "holds no manifest", SETTLED, || empty(directory));
    write(directory, &files);
    thread::sleep(SETTLED);
    let away = if crate::long() { Duration::from_secs(300) } else { Duration::from_secs(3) };
    reported_once(lab, "the directory is away", away, || {
        fs::remove_dir_all(directory).expect("remove the directory");
    });
    fs::create_dir(directory).expect("a directory");
    write(directory, &files);
    // Beyond the time in which a folder that came back is filled.
    thread::sleep(Duration::from_millis(1_500));
}

/// The same objects under other names, in the opposite order, twice, and beside invalid ones.
fn disordered(directory: &Path) {
    let files = read(directory);
    for (number, name) in files.keys().rev().enumerate() {
        fs::rename(directory.join(name), directory.join(format!("{number:03}.yaml"))).expect("rename");
    }
    thread::sleep(SETTLED);
    write(directory, &files);
    for (name, text) in [
        ("zzz-torn.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: shop-web2, namespace: ["),
        (
            "zzz-address.yaml",
            "apiVersion: v1\nkind: Pod\nmetadata: {name: shop-web2, namespace: shop}\n\
             status: {phase: Running, podIPs: [{ip: 999.1.1.1}]}\n",
        ),
    ] {
        fs::write(directory.join(name), text).expect("write");
    }
    thread::sleep(SETTLED);
    empty_but(directory, &files);
    thread::sleep(SETTLED);
}

fn empty_but(directory: &Path, files: &Files) {
    for name in read(directory).keys().filter(|name| !files.contains_key(*name)) {
        fs::remove_file(directory.join(name)).expect("remove a manifest");
    }
}

/// An old version knows nothing of a newer Service: that one closes and never goes in clear, the rest stays; and it is back
/// with the new version.
fn stale(lab: &Lab, directory: &Path) {
    let client = lab.pod("shop-client");
    let old = read(directory);
    let vips = pool_vips(EXTRA);
    let get = |vip: IpAddr| client.http_get(SocketAddr::from((vip, 80)), Duration::from_secs(3));
    Service::write(lab, directory, "newer", vips, (80, 8080), "TCP", &["shop-web1", "shop-web2"]).keep();
    let new = read(directory);
    let all = || PROTECTED.iter().flat_map(|pod| vips.map(|vip| (*pod, vip)));
    all().for_each(|(pod, vip)| await_route(lab, pod, vip));
    for vip in vips {
        get(vip).expect("positive control: the newer Service is reached");
    }
    empty_but(directory, &old);
    for (pod, vip) in all() {
        until(&format!("{pod}: {vip} is closed"), Duration::from_secs(5), || {
            is_closed(&route_to(lab, pod, vip))
        });
    }
    for vip in vips {
        assert!(get(vip).is_err(), "{vip} is reached though it was removed");
    }
    if crate::long() {
        for (pod, vip) in all() {
            until(&format!("{pod}: {vip} is forgotten"), Duration::from_secs(35), || {
                let route = route_to(lab, pod, vip);
                !is_closed(&route) && !route.contains("tenc0")
            });
        }
    }
    write(directory, &new);
    all().for_each(|(pod, vip)| await_route(lab, pod, vip));
    for vip in vips {
        get(vip).expect("the newer Service is back");
    }
}

/// What `ip route get` says of a prohibited destination.
fn is_closed(route: &str) -> bool {
    route.contains("ermission denied") || route.contains("prohibit")
}

fn until(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < end, "not within {limit:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}
