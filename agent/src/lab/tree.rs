//! The files behind a lab's disk: a directory, under the numbers that the kernel knows its files by.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, RenameFlags};
use nix::unistd::{Whence, lseek64};

use super::fuse::{self, Arguments, Request, op};

/// The number of the directory itself.
const ROOT: u64 = 1;
/// Which of fuse_setattr_in's fields count.
const SET_MODE: u32 = 1;
const SET_SIZE: u32 = 1 << 3;

/// An open file or directory.
#[derive(Debug)]
enum Handle {
    File(u64, File),
    /// Names with their numbers and kinds, as they were when it was opened.
    Dir(Vec<(u64, u32, OsString)>),
}

/// See the module's head. Paths are relative to the directory.
#[derive(Debug)]
pub struct Tree {
    root: PathBuf,
    paths: HashMap<u64, PathBuf>,
    nodes: BTreeMap<PathBuf, u64>,
    handles: HashMap<u64, Handle>,
    next: u64,
}

impl Tree {
    /// The files in `root`.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        Self {
            root: root.into(),
            paths: HashMap::from([(ROOT, PathBuf::new())]),
            nodes: BTreeMap::from([(PathBuf::new(), ROOT)]),
            handles: HashMap::new(),
            next: ROOT + 1,
        }
    }

    /// Does what is asked.
    ///
    /// # Errors
    /// The file system's below; `ENOSYS` for what no agent does.
    pub fn serve(&mut self, request: &Request<'_>) -> io::Result<Vec<u8>> {
        let a = request.arguments();
        let node = request.node;
        match request.opcode {
            op::INIT => Ok(fuse::init(a.u32(8)?)),
            op::LOOKUP => self.entry(self.child(node, a.name(0, 0)?)?),
            op::GETATTR => Ok(fuse::attr_out(node, &self.metadata(node)?)),
            op::SETATTR => self.set_attributes(node, a),
            op::OPEN => self.open(node, a.u32(0)?),
            op::CREATE => self.create(node, a),
            op::READ => self.read(a),
            op::WRITE => self.write(a),
            op::FSYNC => self.sync(a),
            op::FLUSH | op::FSYNCDIR | op::DESTROY => Ok(Vec::new()),
            op::FALLOCATE => self.allocate(a),
            op::LSEEK => self.seek(a),
            op::RELEASE | op::RELEASEDIR => {
                self.handles.remove(&a.u64(0)?);
                Ok(Vec::new())
            }
            op::OPENDIR => self.open_dir(node),
            op::READDIR => self.read_dir(a),
            op::MKDIR => {
                let path = self.child(node, a.name(8, 0)?)?;
                let mode = a.u32(0)? & 0o7777;
                fs::DirBuilder::new()
                    .mode(mode)
                    .create(self.root.join(&path))?;
                self.entry(path)
            }
            op::MKNOD => self.make_node(node, a),
            op::UNLINK => {
                let path = self.child(node, a.name(0, 0)?)?;
                fs::remove_file(self.root.join(&path))?;
                self.forget(&path)
            }
            op::RMDIR => {
                let path = self.child(node, a.name(0, 0)?)?;
                fs::remove_dir(self.root.join(&path))?;
                self.forget(&path)
            }
            op::RENAME => self.rename(node, a, 8, 0),
            op::RENAME2 => self.rename(node, a, 16, a.u32(8)?),
            op::LINK => {
                let from = self.path(a.u64(0)?)?.to_owned();
                let path = self.child(node, a.name(8, 0)?)?;
                fs::hard_link(self.root.join(from), self.root.join(&path))?;
                self.entry(path)
            }
            op::STATFS => Ok(fuse::statfs_out(&nix::sys::statvfs::statvfs(&self.root)?)),
            _ => Err(io::Error::from_raw_os_error(libc::ENOSYS)),
        }
    }

    fn path(&self, node: u64) -> io::Result<&Path> {
        let path = self.paths.get(&node).map(PathBuf::as_path);
        path.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))
    }

    fn child(&self, node: u64, name: &[u8]) -> io::Result<PathBuf> {
        Ok(self.path(node)?.join(OsStr::from_bytes(name)))
    }

    fn number(&mut self, path: &Path) -> u64 {
        if let Some(node) = self.nodes.get(path) {
            return *node;
        }
        let node = self.next;
        self.next += 1;
        self.nodes.insert(path.into(), node);
        self.paths.insert(node, path.into());
        node
    }

    fn entry(&mut self, path: PathBuf) -> io::Result<Vec<u8>> {
        let meta = fs::symlink_metadata(self.root.join(&path))?;
        Ok(fuse::entry_out(self.number(&path), &meta))
    }

    /// A name is gone; what is open under its number stays so.
    fn forget(&mut self, path: &Path) -> io::Result<Vec<u8>> {
        if let Some(node) = self.nodes.remove(path) {
            self.paths.remove(&node);
        }
        Ok(Vec::new())
    }

    fn metadata(&self, node: u64) -> io::Result<Metadata> {
        if let Ok(path) = self.path(node) {
            return fs::symlink_metadata(self.root.join(path));
        }
        let open = self.handles.values().find_map(|h| match h {
            Handle::File(n, file) if *n == node => Some(file),
            _ => None,
        });
        open.map_or_else(
            || Err(io::Error::from_raw_os_error(libc::ENOENT)),
            File::metadata,
        )
    }

    fn set_attributes(&mut self, node: u64, a: Arguments<'_>) -> io::Result<Vec<u8>> {
        let which = a.u32(0)?;
        if which & SET_SIZE != 0 {
            let size = a.u64(16)?;
            match self.path(node) {
                Ok(path) => {
                    let path = self.root.join(path);
                    OpenOptions::new().write(true).open(path)?.set_len(size)?;
                }
                Err(_) => self.file(a.u64(8)?)?.set_len(size)?,
            }
        }
        if which & SET_MODE != 0 {
            let mode = fs::Permissions::from_mode(a.u32(68)? & 0o7777);
            fs::set_permissions(self.root.join(self.path(node)?), mode)?;
        }
        Ok(fuse::attr_out(node, &self.metadata(node)?))
    }

    fn keep(&mut self, handle: Handle) -> u64 {
        let number = self.next;
        self.next += 1;
        self.handles.insert(number, handle);
        number
    }

    fn file(&self, handle: u64) -> io::Result<&File> {
        match self.handles.get(&handle) {
            Some(Handle::File(_, file)) => Ok(file),
            _ => Err(io::Error::from_raw_os_error(libc::EBADF)),
        }
    }

    fn open(&mut self, node: u64, flags: u32) -> io::Result<Vec<u8>> {
        let file = options(flags).open(self.root.join(self.path(node)?))?;
        Ok(fuse::open_out(self.keep(Handle::File(node, file))))
    }

    fn create(&mut self, node: u64, a: Arguments<'_>) -> io::Result<Vec<u8>> {
        let (flags, mode) = (a.u32(0)?, a.u32(4)?);
        let path = self.child(node, a.name(16, 0)?)?;
        let exclusive = flags as libc::c_int & libc::O_EXCL != 0;
        let file = options(flags)
            .create(true)
            .create_new(exclusive)
            .mode(mode & 0o7777)
            .open(self.root.join(&path))?;
        let mut out = self.entry(path.clone())?;
        let node = self.number(&path);
        out.extend(fuse::open_out(self.keep(Handle::File(node, file))));
        Ok(out)
    }

    fn make_node(&mut self, node: u64, a: Arguments<'_>) -> io::Result<Vec<u8>> {
        let mode = a.u32(0)?;
        if mode & libc::S_IFMT != libc::S_IFREG {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        let path = self.child(node, a.name(16, 0)?)?;
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode & 0o7777)
            .open(self.root.join(&path))?;
        self.entry(path)
    }

    fn read(&self, a: Arguments<'_>) -> io::Result<Vec<u8>> {
        let file = self.file(a.u64(0)?)?;
        let offset = a.u64(8)?;
        let mut data = vec![0; (a.u32(16)? as usize).min(MAX_READ)];
        let mut have = 0;
        while have < data.len() {
            match file.read_at(&mut data[have..], offset + have as u64)? {
                0 => break,
                n => have += n,
            }
        }
        data.truncate(have);
        Ok(data)
    }

    fn write(&self, a: Arguments<'_>) -> io::Result<Vec<u8>> {
        let len = a.u32(16)?;
        let data = a.rest(40)?;
        let data = data.get(..len as usize).unwrap_or(data);
        self.file(a.u64(0)?)?.write_all_at(data, a.u64(8)?)?;
        let mut out = (data.len() as u32).to_le_bytes().to_vec();
        out.extend([0; 4]);
        Ok(out)
    }

    fn sync(&self, a: Arguments<'_>) -> io::Result<Vec<u8>> {
        // Only what a file system of its own would have to do: that lab hosts lose power is played with SIGKILL.
        self.file(a.u64(0)?)?.sync_data()?;
        Ok(Vec::new())
    }

    fn allocate(&self, a: Arguments<'_>) -> io::Result<Vec<u8>> {
        let flags = FallocateFlags::from_bits_truncate(a.u32(24)? as libc::c_int);
        let file = self.file(a.u64(0)?)?;
        nix::fcntl::fallocate(file, flags, a.u64(8)? as i64, a.u64(16)? as i64)?;
        Ok(Vec::new())
    }

    fn seek(&self, a: Arguments<'_>) -> io::Result<Vec<u8>> {
        let whence = match a.u32(16)? as libc::c_int {
            libc::SEEK_DATA => Whence::SeekData,
            libc::SEEK_HOLE => Whence::SeekHole,
            _ => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
        };
        let at = lseek64(self.file(a.u64(0)?)?, a.u64(8)? as i64, whence)?;
        Ok(at.to_le_bytes().to_vec())
    }

    fn open_dir(&mut self, node: u64) -> io::Result<Vec<u8>> {
        let path = self.path(node)?.to_owned();
        let mut names = Vec::new();
        for entry in fs::read_dir(self.root.join(&path))? {
            let entry = entry?;
            // What readdir(3) calls d_type: the mode's highest four bits.
            let kind = (entry.metadata()?.mode() & libc::S_IFMT) >> 12;
            let node = self.number(&path.join(entry.file_name()));
            names.push((node, kind, entry.file_name()));
        }
        Ok(fuse::open_out(self.keep(Handle::Dir(names))))
    }

    fn read_dir(&self, a: Arguments<'_>) -> io::Result<Vec<u8>> {
        let Some(Handle::Dir(names)) = self.handles.get(&a.u64(0)?) else {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        };
        let (begin, size) = (a.u64(8)?, a.u32(16)? as usize);
        let mut out = Vec::new();
        for (next, (node, kind, name)) in (1..).zip(names).skip(begin as usize) {
            if !fuse::dirent(&mut out, size, next, *node, *kind, name.as_bytes()) {
                break;
            }
        }
        Ok(out)
    }

    fn rename(
        &mut self,
        node: u64,
        a: Arguments<'_>,
        names: usize,
        flags: u32,
    ) -> io::Result<Vec<u8>> {
        let from = self.child(node, a.name(names, 0)?)?;
        let to = self.child(a.u64(0)?, a.name(names, 1)?)?;
        let flags = RenameFlags::from_bits_truncate(flags);
        if flags.contains(RenameFlags::RENAME_EXCHANGE) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let (old, new) = (self.root.join(&from), self.root.join(&to));
        nix::fcntl::renameat2(
            nix::fcntl::AT_FDCWD,
            &old,
            nix::fcntl::AT_FDCWD,
            &new,
            flags,
        )?;
        self.forget(&to)?;
        // A directory takes what is in it along.
        let moved: Vec<PathBuf> = self
            .nodes
            .keys()
            .filter(|path| path.starts_with(&from))
            .cloned()
            .collect();
        for path in moved {
            let Some(node) = self.nodes.remove(&path) else {
                continue;
            };
            let rest = path.strip_prefix(&from).unwrap_or(Path::new(""));
            let path = match rest.as_os_str().is_empty() {
                true => to.clone(),
                false => to.join(rest),
            };
            self.nodes.insert(path.clone(), node);
            self.paths.insert(node, path);
        }
        Ok(Vec::new())
    }
}

/// Longest answer to a read; the kernel asks for less.
const MAX_READ: usize = fuse::MAX_WRITE as usize;

/// As the other side opened it; what the kernel does itself (appending, cutting off, going past its cache) is left out.
fn options(flags: u32) -> OpenOptions {
    let flags = flags as libc::c_int;
    let mode = flags & libc::O_ACCMODE;
    let mut options = OpenOptions::new();
    options
        .read(mode != libc::O_WRONLY)
        .write(mode != libc::O_RDONLY)
        .custom_flags(flags & (libc::O_SYNC | libc::O_DSYNC));
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(opcode: u32, node: u64, body: &[u8]) -> io::Result<Request<'_>> {
        Ok(Request {
            opcode,
            unique: 1,
            node,
            body,
        })
    }

    fn node_of(entry: &[u8]) -> u64 {
        u64::from_le_bytes(entry[..8].try_into().unwrap())
    }

    #[test]
    fn a_number_means_its_file_wherever_it_is_moved_and_a_new_one_never_an_old_one() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("one"), b"1").unwrap();
        fs::create_dir(dir.path().join("d")).unwrap();
        let mut tree = Tree::new(dir.path());
        let mut serve = |op, node, body: &[u8]| tree.serve(&request(op, node, body).unwrap());
        let one = node_of(&serve(op::LOOKUP, ROOT, b"one\0").unwrap());
        let d = node_of(&serve(op::LOOKUP, ROOT, b"d\0").unwrap());
        let mut body = d.to_le_bytes().to_vec();
        body.extend(b"one\0two\0");
        serve(op::RENAME, ROOT, &body).unwrap();
        assert_eq!(node_of(&serve(op::LOOKUP, d, b"two\0").unwrap()), one);
        let mut body = ROOT.to_le_bytes().to_vec();
        body.extend(b"d\0e\0");
        serve(op::RENAME, ROOT, &body).unwrap();
        assert_eq!(node_of(&serve(op::LOOKUP, d, b"two\0").unwrap()), one);
        assert!(dir.path().join("e/two").exists());
        serve(op::UNLINK, d, b"two\0").unwrap();
        fs::write(dir.path().join("e/two"), b"2").unwrap();
        assert_ne!(node_of(&serve(op::LOOKUP, d, b"two\0").unwrap()), one);
        for name in [&b"..\0"[..], b"a/b\0", b"\0"] {
            assert!(serve(op::LOOKUP, ROOT, name).is_err(), "{name:?}");
        }
    }
}
