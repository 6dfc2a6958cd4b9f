//! What the kernel and a FUSE file system say to each other, as far as a lab's disk needs it (linux/fuse.h, 7.31): all
//! little endian, as this program's only processor.

use std::io;
use std::os::unix::fs::MetadataExt;

/// Length of a request's header.
pub const IN_HEADER: usize = 40;
/// Largest write that the kernel may send at once.
pub const MAX_WRITE: u32 = 1 << 20;
/// Seconds that the kernel may go by what it was told of a file.
const VALID_S: u64 = 1;
/// FUSE_BIG_WRITES and FUSE_MAX_PAGES.
const INIT_FLAGS: u32 = 1 << 5 | 1 << 22;

/// Operations (enum fuse_opcode).
pub mod op {
    #![allow(missing_docs)]
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
}

/// A request: its header's fields, and what follows it.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Which operation, of [`op`].
    pub opcode: u32,
    /// The request's number.
    pub unique: u64,
    /// The file or directory it is about.
    pub node: u64,
    /// Its arguments.
    pub body: &'a [u8],
}

impl<'a> Request<'a> {
    /// Parses what one read from /dev/fuse gave.
    #[must_use]
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let header = Arguments(bytes);
        let len = header.u32(0).ok()? as usize;
        Some(Self {
            opcode: header.u32(4).ok()?,
            unique: header.u64(8).ok()?,
            node: header.u64(16).ok()?,
            body: bytes.get(IN_HEADER..len)?,
        })
    }

    /// The arguments, to be taken apart.
    #[must_use]
    pub fn arguments(&self) -> Arguments<'a> {
        Arguments(self.body)
    }
}

/// Numbers and names in a request.
#[derive(Clone, Copy, Debug)]
pub struct Arguments<'a>(&'a [u8]);

fn malformed() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

impl<'a> Arguments<'a> {
    fn array<const N: usize>(&self, at: usize) -> io::Result<[u8; N]> {
        let bytes = self.0.get(at..at + N).ok_or_else(malformed)?;
        bytes.try_into().map_err(|_| malformed())
    }

    /// The number at that offset.
    ///
    /// # Errors
    /// `EINVAL` if the request ends before it; so do the others.
    pub fn u32(&self, at: usize) -> io::Result<u32> {
        self.array(at).map(u32::from_le_bytes)
    }

    /// The same, twice as long.
    ///
    /// # Errors
    /// As [`Arguments::u32`].
    pub fn u64(&self, at: usize) -> io::Result<u64> {
        self.array(at).map(u64::from_le_bytes)
    }

    /// What is there from that offset on.
    ///
    /// # Errors
    /// As [`Arguments::u32`].
    pub fn rest(&self, at: usize) -> io::Result<&'a [u8]> {
        self.0.get(at..).ok_or_else(malformed)
    }

    /// The `n`-th NUL-terminated name from that offset on.
    ///
    /// # Errors
    /// As [`Arguments::u32`].
    pub fn name(&self, at: usize, n: usize) -> io::Result<&'a [u8]> {
        let mut names = self.rest(at)?.split(|b| *b == 0);
        names
            .nth(n)
            .filter(|name| !name.is_empty() && !name.contains(&b'/') && *name != b"..")
            .ok_or_else(malformed)
    }
}

/// An answer: the header (fuse_out_header), and what follows it.
#[must_use]
pub fn answer(unique: u64, outcome: &io::Result<Vec<u8>>) -> Vec<u8> {
    let (error, body): (i32, &[u8]) = match outcome {
        Ok(body) => (0, body),
        Err(e) => (-e.raw_os_error().unwrap_or(libc::EIO), &[]),
    };
    let mut out = Vec::with_capacity(16 + body.len());
    out.extend((16 + body.len() as u32).to_le_bytes());
    out.extend(error.to_le_bytes());
    out.extend(unique.to_le_bytes());
    out.extend(body);
    out
}

/// fuse_init_out, for what the kernel said it speaks.
#[must_use]
pub fn init(read_ahead: u32) -> Vec<u8> {
    let mut out = Vec::with_capacity(64);
    for word in [7, 31, read_ahead, INIT_FLAGS] {
        out.extend(u32::to_le_bytes(word));
    }
    out.extend([0; 4]); // background requests: the kernel's choice
    out.extend(MAX_WRITE.to_le_bytes());
    out.extend(1u32.to_le_bytes()); // time granularity, ns
    out.extend(((MAX_WRITE / 4096) as u16).to_le_bytes());
    out.resize(64, 0);
    out
}

/// fuse_attr.
fn attr(out: &mut Vec<u8>, node: u64, meta: &std::fs::Metadata) {
    for word in [
        node,
        meta.size(),
        meta.blocks(),
        meta.atime() as u64,
        meta.mtime() as u64,
        meta.ctime() as u64,
    ] {
        out.extend(word.to_le_bytes());
    }
    for word in [
        meta.atime_nsec() as u32,
        meta.mtime_nsec() as u32,
        meta.ctime_nsec() as u32,
        meta.mode(),
        meta.nlink() as u32,
        meta.uid(),
        meta.gid(),
        0, // device number: none here
        meta.blksize() as u32,
        0,
    ] {
        out.extend(word.to_le_bytes());
    }
}

/// fuse_attr_out.
#[must_use]
pub fn attr_out(node: u64, meta: &std::fs::Metadata) -> Vec<u8> {
    let mut out = Vec::with_capacity(104);
    out.extend(VALID_S.to_le_bytes());
    out.extend([0; 8]);
    attr(&mut out, node, meta);
    out
}

/// fuse_entry_out.
#[must_use]
pub fn entry_out(node: u64, meta: &std::fs::Metadata) -> Vec<u8> {
    let mut out = Vec::with_capacity(128);
    for word in [node, 0, VALID_S, VALID_S, 0] {
        out.extend(u64::to_le_bytes(word));
    }
    attr(&mut out, node, meta);
    out
}

/// fuse_open_out.
#[must_use]
pub fn open_out(handle: u64) -> Vec<u8> {
    let mut out = handle.to_le_bytes().to_vec();
    out.extend([0; 8]);
    out
}

/// Adds one name of a directory (fuse_dirent) if it fits into `size`; says whether it did. `next` is the offset that
/// the kernel goes on from.
pub fn dirent(
    out: &mut Vec<u8>,
    size: usize,
    next: u64,
    node: u64,
    kind: u32,
    name: &[u8],
) -> bool {
    let len = (24 + name.len()).next_multiple_of(8);
    if out.len() + len > size {
        return false;
    }
    let end = out.len() + len;
    out.extend(node.to_le_bytes());
    out.extend(next.to_le_bytes());
    out.extend((name.len() as u32).to_le_bytes());
    out.extend(kind.to_le_bytes());
    out.extend(name);
    out.resize(end, 0);
    true
}

/// fuse_statfs_out.
#[must_use]
pub fn statfs_out(stat: &nix::sys::statvfs::Statvfs) -> Vec<u8> {
    let mut out = Vec::with_capacity(80);
    for word in [
        stat.blocks(),
        stat.blocks_free(),
        stat.blocks_available(),
        stat.files(),
        stat.files_free(),
    ] {
        out.extend(word.to_le_bytes());
    }
    for word in [
        stat.block_size() as u32,
        stat.name_max() as u32,
        stat.fragment_size() as u32,
    ] {
        out.extend(word.to_le_bytes());
    }
    out.resize(80, 0);
    out
}
