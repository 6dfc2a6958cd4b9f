//! Files that hosts give each other by content: what a VM boots from. Only what lies in one directory under the name of its
//! digest is given, and whoever fetches one checks what comes.
//!
//! ```text
//! File:      | digest [32] | offset u64 |                  asks for a piece
//! FilePart:  | length of the whole file u64 | piece ... |  answers; an empty piece: there is no more
//! ```

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::str::FromStr;
use std::time::{Duration, Instant};

use checkpoint::{Epoch, HostId, codec};
use serde::{Deserialize, Serialize};

use crate::greet::{GreetError, Role, greet};
use crate::link::{HELLO_LIMIT, Link};
use crate::probe::Until;
use crate::view::{Member, View};
use crate::wire::{self, Frame, Kind, Payload, WireError};

/// Longest piece in bytes.
const PIECE: usize = 1 << 20;
/// How long a piece may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a whole file may take: this, and this for each MiB of it.
const WHOLE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(1));
/// Longest file in bytes.
pub const FILE_MAX: u64 = 4 << 30;

/// A file's BLAKE3 digest; in text 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FileDigest([u8; 32]);

/// Why a text is no digest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a BLAKE3 digest: 64 hex digits, as `b3sum` prints them")]
pub struct DigestError(String);

impl FileDigest {
    /// Of everything that `file` gives; `each` gets it piece by piece.
    ///
    /// # Errors
    /// Of reading, or of `each`.
    pub fn of(
        mut file: impl Read,
        mut each: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<Self> {
        let mut hasher = blake3::Hasher::new();
        let mut piece = vec![0; PIECE];
        loop {
            let n = match file.read(&mut piece) {
                Ok(0) => return Ok(Self(*hasher.finalize().as_bytes())),
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            hasher.update(&piece[..n]);
            each(&piece[..n])?;
        }
    }

    /// Itself.
    #[must_use]
    pub fn bytes(self) -> [u8; 32] {
        self.0
    }
}

impl fmt::Display for FileDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for FileDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for FileDigest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let wrong = || DigestError(text.chars().take(80).collect());
        // blake3's own reader takes capital letters too; a file has one name.
        if text.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(wrong());
        }
        let hash = blake3::Hash::from_hex(text).map_err(|_| wrong())?;
        Ok(Self(*hash.as_bytes()))
    }
}

impl TryFrom<String> for FileDigest {
    type Error = DigestError;

    fn try_from(text: String) -> Result<Self, DigestError> {
        text.parse()
    }
}

impl From<FileDigest> for String {
    fn from(digest: FileDigest) -> Self {
        digest.to_string()
    }
}

/// Why a file could not be had from a host.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The host does not answer, or has another wire version.
    #[error("{host}: {why}")]
    Host {
        /// Which.
        host: HostId,
        /// In words.
        why: String,
    },
    /// What it sent is not what was asked for.
    #[error("{host} sent something else than the file of that digest")]
    Content {
        /// Which.
        host: HostId,
    },
    /// It cannot be written here.
    #[error("writing it here: {0}")]
    Write(#[from] io::Error),
}

/// Fetches a file of `view`'s VM from `member`'s host into `out`, for the host `from`. What was written counts only if this
/// succeeds.
///
/// # Errors
/// [`FetchError`].
pub fn fetch(
    member: &Member,
    view: &View,
    from: &HostId,
    digest: FileDigest,
    mut out: impl Write,
) -> Result<u64, FetchError> {
    let host = &member.host;
    let failed = |why: String| FetchError::Host {
        host: host.clone(),
        why,
    };
    let peer = greet(member, view, Role::File, from);
    let peer = peer.map_err(|e: GreetError| failed(e.to_string()))?;
    let begun = Instant::now();
    let mut payload = Payload::default();
    let mut hasher = blake3::Hasher::new();
    let mut have = 0;
    loop {
        let asked = ask(&peer.link, &peer.stream, view, digest, have, &mut payload);
        let length = asked.map_err(|e| failed(e.to_string()))?;
        let piece = &payload[8..];
        let allowed = WHOLE.0 + WHOLE.1 * u32::try_from(length >> 20).unwrap_or(u32::MAX);
        if begun.elapsed() > allowed {
            let took = begun.elapsed().as_secs();
            return Err(failed(format!("sent {have} of {length} bytes in {took} s")));
        }
        if length > FILE_MAX || have + piece.len() as u64 > length {
            return Err(FetchError::Content { host: host.clone() });
        }
        if piece.is_empty() {
            break;
        }
        hasher.update(piece);
        out.write_all(piece)?;
        have += piece.len() as u64;
    }
    match *hasher.finalize().as_bytes() == digest.0 {
        true => Ok(have),
        false => Err(FetchError::Content { host: host.clone() }),
    }
}

/// One piece: the file's length, the piece itself in `payload` after that.
fn ask(
    link: &Link,
    stream: &TcpStream,
    view: &View,
    digest: FileDigest,
    offset: u64,
    payload: &mut Payload,
) -> Result<u64, WireError> {
    let until = Instant::now() + PATIENCE;
    let frame = Frame {
        kind: Kind::File,
        vm: view.vm,
        generation: view.generation,
        epoch: Epoch::ZERO,
        flags: 0,
    };
    let mut question = digest.0.to_vec();
    question.extend_from_slice(&offset.to_le_bytes());
    link.send(&frame, &question)?;
    let frame = wire::read(&mut Until { stream, until }, payload)?;
    match frame.kind {
        Kind::FilePart => {
            let length = payload.first_chunk::<8>();
            let length = length.ok_or(WireError::Payload(Kind::FilePart))?;
            Ok(u64::from_le_bytes(*length))
        }
        Kind::NotReady => {
            let (_, why): (HostId, String) = codec::from_bytes(payload, HELLO_LIMIT)
                .map_err(|_| WireError::Payload(Kind::NotReady))?;
            Err(io::Error::new(io::ErrorKind::NotFound, why).into())
        }
        kind => Err(WireError::OutOfPlace(
            kind,
            "it does not answer a request for a file",
        )),
    }
}

/// Serves a connection that greeted for files, until it ends.
pub(crate) fn serve(
    dir: Option<&Path>,
    host: &HostId,
    mut stream: &TcpStream,
    link: &Link,
) -> Result<(), WireError> {
    let mut payload = Payload::default();
    loop {
        let frame = wire::read(&mut stream, &mut payload)?;
        let (digest, offset) = question(frame.kind, &payload)?;
        let answer = |kind| Frame {
            kind,
            epoch: Epoch::ZERO,
            flags: 0,
            ..frame
        };
        let found = match dir {
            Some(dir) => piece(dir, digest, offset),
            None => Err(io::ErrorKind::NotFound.into()),
        };
        match found {
            Ok(piece) => link.send(&answer(Kind::FilePart), &piece)?,
            Err(e) => {
                let why = (host, format!("has no file {digest}: {e}"));
                let why = codec::to_bytes(&why, HELLO_LIMIT).unwrap_or_default();
                link.send(&answer(Kind::NotReady), &why)?;
            }
        }
    }
}

fn question(kind: Kind, payload: &[u8]) -> Result<(FileDigest, u64), WireError> {
    if kind != Kind::File {
        return Err(WireError::OutOfPlace(
            kind,
            "this connection is for files only",
        ));
    }
    let malformed = WireError::Payload(Kind::File);
    let Some((digest, offset)) = payload.split_first_chunk::<32>() else {
        return Err(malformed);
    };
    match offset.try_into() {
        Ok(offset) => Ok((FileDigest(*digest), u64::from_le_bytes(offset))),
        Err(_) => Err(malformed),
    }
}

/// The file's length and up to [`PIECE`] bytes from `offset` on.
fn piece(dir: &Path, digest: FileDigest, offset: u64) -> io::Result<Vec<u8>> {
    let file = File::options()
        .read(true)
        .custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK)
        .open(dir.join(digest.to_string()))?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::ErrorKind::NotFound.into());
    }
    let length = metadata.len();
    let n = usize::try_from(length.saturating_sub(offset)).unwrap_or(PIECE);
    let mut answer = vec![0; 8 + n.min(PIECE)];
    answer[..8].copy_from_slice(&length.to_le_bytes());
    file.read_exact_at(&mut answer[8..], offset)?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_text_that_comes_back_and_nothing_else_is() {
        let digest = FileDigest::of(&b"kernel"[..], |_| Ok(())).unwrap();
        let text = digest.to_string();
        assert_eq!(text.len(), 64);
        assert_eq!(text.parse(), Ok(digest));
        for wrong in ["", "../../etc/shadow", &text[1..], &text.to_uppercase()] {
            assert!(wrong.parse::<FileDigest>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn pieces_make_the_file_and_only_a_file_is_given() {
        let dir = tempfile::tempdir().unwrap();
        let content: Vec<u8> = (0..PIECE * 2 + 5).map(|i| (i % 251) as u8).collect();
        let digest = FileDigest::of(&content[..], |_| Ok(())).unwrap();
        std::fs::write(dir.path().join(digest.to_string()), &content).unwrap();
        let mut got = Vec::new();
        loop {
            let answer = piece(dir.path(), digest, got.len() as u64).unwrap();
            assert_eq!(answer[..8], (content.len() as u64).to_le_bytes());
            if answer.len() == 8 {
                break;
            }
            got.extend_from_slice(&answer[8..]);
        }
        assert_eq!(got, content);
        assert_eq!(piece(dir.path(), digest, u64::MAX).unwrap().len(), 8);
        // What is there under a digest's name and is no file is not followed.
        let other = FileDigest::of(&b"other"[..], |_| Ok(())).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join(other.to_string())).unwrap();
        assert!(piece(dir.path(), other, 0).is_err());
    }
}
