//! Files by content, over real connections.

use chain::{FetchError, FileDigest, fetch};

use crate::cluster::{Cluster, host};

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
