//! The first protection of a VM whose disk holds something already: it is copied while the VM runs; interrupted, the copy
//! goes on where it was; holes stay holes.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use agent::control::{EventKind, Request};
use understudy_tests::{Cluster, Options, VM, VmFile, wait};

use crate::PROGRAM;
use crate::kill::{check_disk, check_survived, more_answers};

const MIB: u64 = 1 << 20;
/// The disk, and the part of it that holds something. What the guest writes lies before that.
pub const DISK: u64 = 2048 * MIB;
const DATA: std::ops::Range<u64> = 512 * MIB..768 * MIB;

pub fn fill(path: &Path) {
    let file = File::options().write(true).open(path).unwrap();
    let mut random = 0x5eed_u64;
    let mut piece = vec![0; MIB as usize];
    for at in DATA.step_by(piece.len()) {
        for word in piece.chunks_exact_mut(8) {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            word.copy_from_slice(&random.to_le_bytes());
        }
        file.write_all_at(&piece, at).unwrap();
    }
}

/// The mirror of the VM's disk at a backup.
fn mirror(cluster: &Cluster, host: &str) -> PathBuf {
    let mut dirs = vec![cluster.path(host)];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).unwrap().map(Result::unwrap) {
            match entry.file_type().unwrap().is_dir() {
                true => dirs.push(entry.path()),
                false if entry.file_name() == "disk0.img" => return entry.path(),
                false => {}
            }
        }
    }
    panic!("{host} has no mirror")
}

pub fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

pub fn check_same_data(one: &Path, other: &Path) {
    let open = |path| File::open(path).unwrap();
    let (one, other) = (open(one), open(other));
    let (mut a, mut b) = (vec![0; MIB as usize], vec![0; MIB as usize]);
    for at in (DATA.start - 16 * MIB..DATA.end + 16 * MIB).step_by(a.len()) {
        one.read_exact_at(&mut a, at).unwrap();
        other.read_exact_at(&mut b, at).unwrap();
        assert!(a == b, "the mirror differs at {} MiB", at / MIB);
    }
}

/// The MiB that the backups had already when protection began last, as the event says.
fn had(cluster: &Cluster) -> u64 {
    let events = cluster.events("a");
    let last = events.iter().rfind(|e| e.kind == EventKind::Protected);
    let text = &last.expect("it is protected").text;
    let before = text.split(" MiB were there already").next().unwrap();
    let number = before.rsplit(' ').next().unwrap();
    number
        .parse()
        .unwrap_or_else(|_| panic!("nothing was there, says: {text}"))
}

#[test]
fn i3_an_interrupted_first_copy_of_a_disk_goes_on_where_it_was_and_stays_sparse() {
    let mut cluster = Cluster::launch(PROGRAM, Options::of(&["a", "b"]));
    let vm = VmFile {
        disk_bytes: DISK,
        ..VmFile::default()
    };
    let toml = vm.write(cluster.dir());
    let image = cluster.path("vm.img");
    fill(&image);
    assert!(
        allocated(&image) < DISK / 2,
        "this test needs a temporary directory on a file system with holes"
    );
    cluster.start_vm(toml);
    let client = cluster.client();
    let order = Request::Protect {
        vm: VM.into(),
        backups: vec!["b".into()],
    };
    cluster.control("a").order(&order).unwrap();
    let copied = wait("the copy to be on its way", || {
        let status = cluster.status("a")?;
        let enough =
            |sync: &agent::epoch::figures::SyncFigures| sync.disk_done - sync.disk_equal > 64 * MIB;
        // Protected already, on a machine that copies faster than it is looked at: then all of it is there.
        match status.sync {
            Some(sync) => enough(&sync).then_some(sync.disk_done - sync.disk_equal),
            None => status.protected.then_some(DATA.end - DATA.start),
        }
    });
    cluster.kill("b");
    more_answers(&client, 50);
    cluster.start_agent("b", None);
    cluster.wait_protected("a", &["b"]);
    // What was queued when the backup died may be gone; the holes are always there.
    let (had, holes) = (had(&cluster) * MIB, DISK - (DATA.end - DATA.start));
    println!(
        "{} MiB were copied, then {} MiB there",
        copied / MIB,
        had / MIB
    );
    assert!(
        had > holes + copied / 2,
        "{copied} bytes were copied and {holes} are holes, but it says that {had} were there"
    );
    let mirror = mirror(&cluster, "b");
    assert!(
        allocated(&mirror) < allocated(&image) + 64 * MIB,
        "the mirror takes {} MiB, the image {}",
        allocated(&mirror) / MIB,
        allocated(&image) / MIB
    );
    more_answers(&client, 50);
    cluster.kill("a");
    cluster.wait_owner("b");
    more_answers(&client, 100);
    check_disk(&client);
    check_survived(&cluster.stop_client(client));
    check_same_data(&image, &mirror);
}
