//! Files by content, over real connections.

use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::sync::mpsc;
use std::time::Duration;

use chain::wire::{self, Frame, Kind, Payload};
use chain::{FetchError, FileDigest, Member, fetch};

use crate::cluster::{Cluster, PATIENCE, host};

fn digest(content: &[u8]) -> FileDigest {
    FileDigest::of(content, |_| Ok(())).unwrap()
}

#[test]
fn l6_a_host_gives_what_is_asked_for_by_digest_and_nothing_else() {
    let cluster = Cluster::bare(1, 6);
    let content: Vec<u8> = (0..3_000_000u32).map(|i| (i % 239) as u8).collect();
    let dir = cluster.hosts[0].dir().join("files");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join(digest(&content).to_string()), &content).unwrap();
    let member = &cluster.hosts[0].member;
    let mut got = Vec::new();
    let n = fetch(
        member,
        &cluster.view,
        &host("x"),
        digest(&content),
        &mut got,
    )
    .unwrap();
    assert_eq!((n, &got), (content.len() as u64, &content));
    // What it has not.
    let missing = fetch(member, &cluster.view, &host("x"), digest(b"no"), Vec::new());
    let Err(FetchError::Host { why, .. }) = missing else {
        panic!("{missing:?}")
    };
    assert!(why.contains("has no file"), "{why}");
    // What is there under the name and is something else.
    std::fs::write(dir.join(digest(b"one").to_string()), b"another").unwrap();
    let other = fetch(
        member,
        &cluster.view,
        &host("x"),
        digest(b"one"),
        Vec::new(),
    );
    assert!(
        matches!(other, Err(FetchError::Content { .. })),
        "{other:?}"
    );
    // Whoever is there is not the one meant.
    let mut wrong = member.clone();
    wrong.host = host("other");
    let stranger = fetch(
        &wrong,
        &cluster.view,
        &host("x"),
        digest(&content),
        Vec::new(),
    );
    assert!(
        matches!(&stranger, Err(FetchError::Host { why, .. }) if why.contains("answers as host")),
        "{stranger:?}"
    );
}

/// Takes one connection, greets well, and then sends a piece of a file, but hardly ever a byte of it.
fn dripping() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let (mut peer, _) = listener.accept().unwrap();
        let mut payload = Payload::default();
        let hello = wire::read(&mut peer, &mut payload).unwrap();
        let answer = |kind| Frame { kind, ..hello };
        wire::write(&mut peer, &answer(Kind::HelloOk), &[]).unwrap();
        wire::read(&mut peer, &mut payload).unwrap();
        let mut piece = Vec::new();
        wire::write(&mut piece, &answer(Kind::FilePart), &[0; 1 << 20]).unwrap();
        for byte in piece {
            if peer.write_all(&[byte]).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(300));
        }
    });
    addr
}

#[test]
fn a_host_that_hardly_sends_anything_is_not_waited_for_for_ever() {
    let cluster = Cluster::bare(1, 6);
    let member = Member::new(host("r0"), dripping());
    let (sender, ended) = mpsc::channel();
    let view = cluster.view.clone();
    std::thread::spawn(move || {
        let fetched = fetch(&member, &view, &host("x"), digest(b"no"), Vec::new());
        let _ = sender.send(fetched);
    });
    let fetched = ended.recv_timeout(PATIENCE).expect("it ends");
    assert!(
        matches!(fetched, Err(FetchError::Host { .. })),
        "{fetched:?}"
    );
}
