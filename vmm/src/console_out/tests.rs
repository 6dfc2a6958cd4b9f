use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::*;

fn print(out: &ConsoleOut, bytes: &[u8]) {
    out.writer().write_all(bytes).expect("never fails");
}

#[test]
fn a_fifo_that_nobody_reads_blocks_neither_the_start_nor_the_guest() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("console");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("a FIFO");
    let out = ConsoleOut::file(&path).expect("opens without a reader");
    let printed = 4 * BACKLOG as u64;
    for _ in 0..4 * 16 {
        print(&out, &[b'x'; BACKLOG / 16]);
    }
    // A FIFO holds 64 KiB by default (and at most 1 MiB), the thread one piece, the backlog its limit.
    assert!(out.dropped() >= printed / 4, "{} dropped", out.dropped());
}

#[test]
fn the_oldest_output_is_dropped_and_a_burst_is_said_once() {
    let mut backlog = Backlog::new(4);
    assert!(!backlog.push(b"abcd"));
    assert!(backlog.push(b"e"), "a burst begins");
    assert!(!backlog.push(b"f"), "and goes on");
    assert_eq!(backlog.take(), (b"cdef".to_vec(), 2));
    assert!(backlog.push(b"12345"), "the next burst");
    assert_eq!(backlog.take(), (b"2345".to_vec(), 1));
    assert_eq!(backlog.dropped(), 3);
}

#[test]
fn a_console_file_is_private_and_holds_everything_after_the_end() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("console");
    let out = ConsoleOut::file(&path).expect("opens");
    print(&out, b"hello\n");
    drop(out);
    assert_eq!(fs::read(&path).expect("is there"), b"hello\n");
    let mode = fs::metadata(&path).expect("is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn a_full_file_is_put_aside_and_a_renamed_one_is_opened_again() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("console");
    let mut target = Target::file(&path, 10).expect("opens");
    let mut write = |bytes: &[u8]| target.write(bytes, || false).expect("writes");
    write(b"12345678");
    write(b"abcdef");
    let old = dir.path().join("console.1");
    assert_eq!(fs::read(&old).expect("put aside"), b"12345678");
    assert_eq!(fs::read(&path).expect("begun anew"), b"abcdef");
    fs::rename(&path, dir.path().join("elsewhere")).expect("renames");
    write(b"gh");
    assert_eq!(fs::read(&path).expect("made again"), b"gh");
    assert_eq!(fs::read(&old).expect("untouched"), b"12345678");
}

#[test]
fn output_that_a_full_disk_refuses_is_counted_and_harms_nobody() {
    let out = ConsoleOut::file(Path::new("/dev/full")).expect("opens");
    print(&out, b"lost");
    let shared = Arc::clone(&out.0);
    drop(out);
    assert_eq!(shared.lock().backlog.dropped(), 4);
}
