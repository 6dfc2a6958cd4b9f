//! What VMs boot from, kept by content: `data_dir/boot/<BLAKE3>`. A kernel or initrd is copied there when its VM is first
//! configured, and travels to every host that backs the VM up; no path of another host counts from then on (FIELD L6).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use chain::{FileDigest, Member, VmRecord};
use checkpoint::HostId;

use super::env::{Env, lock};
use super::process::config_of;
use crate::config::VmConfig;

/// A file that no VM names is left for this long: it may be that of a VM which is being defined.
const YOUNG: Duration = Duration::from_secs(3600);

/// Why a file is not kept.
#[derive(Debug, thiserror::Error)]
pub(super) enum BootFileError {
    /// It cannot be read.
    #[error("{what} {path}: {source}")]
    Read {
        /// Kernel or initrd.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// There is no room, for example.
    #[error("keeping it in {dir}: {source}")]
    Keep {
        /// The directory.
        dir: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The file is another one than the configuration says.
    #[error(
        "{what} {path} is not the one that the configuration names: its BLAKE3 is {found}, not {wanted}"
    )]
    Other {
        /// Kernel or initrd.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What it is.
        found: FileDigest,
        /// What it should be.
        wanted: FileDigest,
    },
    /// Nobody has it.
    #[error(
        "{what} {path} (BLAKE3 {digest}) is not on this host, and not to be had from others: {why}. Copy it to that path here"
    )]
    Nowhere {
        /// Kernel or initrd.
        what: &'static str,
        /// Where it was.
        path: PathBuf,
        /// Which.
        digest: FileDigest,
        /// Who was asked, and what each said.
        why: String,
    },
}

/// The directory.
#[derive(Debug)]
pub(super) struct BootFiles {
    dir: PathBuf,
    /// Those that had the right content, as they were then: hashing hundreds of megabytes for each of many VMs takes its time.
    /// Whoever boots one looks again.
    seen: Mutex<BTreeMap<FileDigest, Stamp>>,
}

/// Which file it was, and when it was written: inode, length, time of the last change (seconds and nanoseconds).
type Stamp = (u64, u64, i64, i64);

/// Opens a regular file; anything else that may be there is not waited for.
fn open(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    let options = options.read(true).custom_flags(libc::O_NONBLOCK);
    let file = options.open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("it is no regular file")),
    }
}

/// What a file of this host is.
fn digest(path: &Path) -> io::Result<FileDigest> {
    FileDigest::of(open(path)?, |_| Ok(()))
}

impl BootFiles {
    pub fn new(dir: PathBuf) -> Self {
        Self {
            dir,
            seen: Mutex::default(),
        }
    }

    pub fn path(&self, digest: FileDigest) -> PathBuf {
        self.dir.join(digest.to_string())
    }

    /// Whether it is there, and what its name says. One that has rotted is as good as none.
    fn has(&self, digest: FileDigest) -> bool {
        let path = self.path(digest);
        match self.looks_right(&path, digest) {
            Ok(true) => true,
            Ok(false) => {
                tracing::warn!("{}: its content is not what its name says", path.display());
                false
            }
            Err(e) => {
                if e.kind() != io::ErrorKind::NotFound {
                    tracing::warn!("{}: {e}", path.display());
                }
                false
            }
        }
    }

    fn looks_right(&self, path: &Path, digest: FileDigest) -> io::Result<bool> {
        let file = open(path)?;
        let found = file.metadata()?;
        let stamp = (found.ino(), found.len(), found.ctime(), found.ctime_nsec());
        if lock(&self.seen).get(&digest) == Some(&stamp) {
            return Ok(true);
        }
        let right = FileDigest::of(file, |_| Ok(()))? == digest;
        if right {
            lock(&self.seen).insert(digest, stamp);
        }
        Ok(right)
    }

    /// Keeps what `fill` writes, under the digest that it returns.
    fn keep<E>(
        &self,
        fill: impl FnOnce(&mut File) -> Result<FileDigest, E>,
        failed: impl Fn(io::Error) -> E,
    ) -> Result<FileDigest, E> {
        let (temporary, mut file) = self.temporary().map_err(&failed)?;
        let kept = fill(&mut file).and_then(|digest| {
            let put = || {
                file.sync_all()?;
                fs::rename(&temporary, self.path(digest))?;
                File::open(&self.dir)?.sync_all()
            };
            put().map_err(&failed)?;
            Ok(digest)
        });
        if kept.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        kept
    }

    /// A file that nobody else has.
    fn temporary(&self) -> io::Result<(PathBuf, File)> {
        let path = self
            .dir
            .join(format!("new-{}", checkpoint::RequestId::random()));
        let mut options = File::options();
        options.write(true).create_new(true).mode(0o600);
        let file = options.open(&path)?;
        Ok((path, file))
    }

    /// Copies a file of this host.
    fn keep_copy(&self, what: &'static str, path: &Path) -> Result<FileDigest, BootFileError> {
        let read = |source| BootFileError::Read {
            what,
            path: path.into(),
            source,
        };
        let from = open(path).map_err(read)?;
        let mut full = None;
        let fill = |to: &mut File| {
            let copied = FileDigest::of(&from, |piece| {
                to.write_all(piece).map_err(|e| {
                    let kind = e.kind();
                    full = Some(e);
                    kind.into()
                })
            });
            copied.map_err(|e| match full.take() {
                Some(source) => self.not_kept(source),
                None => read(e),
            })
        };
        self.keep(fill, |source| self.not_kept(source))
    }

    fn not_kept(&self, source: io::Error) -> BootFileError {
        BootFileError::Keep {
            dir: self.dir.clone(),
            source,
        }
    }

    /// Notes in a configuration which files it means, and keeps them. A path that leads to nothing here means what it did in
    /// `before`, the VM's configuration so far.
    ///
    /// # Errors
    /// [`BootFileError`].
    pub fn resolve(
        &self,
        config: &mut VmConfig,
        before: Option<&VmConfig>,
    ) -> Result<(), BootFileError> {
        let mut before = before.cloned();
        let before = before.iter_mut().flat_map(VmConfig::boot_files);
        let before: Vec<_> = before
            .map(|file| (file.what, file.path.clone(), *file.digest))
            .collect();
        for file in config.boot_files() {
            let (what, path) = (file.what, file.path.clone());
            let same = |(w, p, _): &&(&str, PathBuf, Option<FileDigest>)| *w == what && *p == path;
            let known = before.iter().find(same).and_then(|(_, _, digest)| *digest);
            let wanted = *file.digest;
            match self.keep_copy(what, &path) {
                Ok(found) if wanted.is_some_and(|wanted| wanted != found) => {
                    let wanted = wanted.unwrap_or(found);
                    return Err(BootFileError::Other {
                        what,
                        path,
                        found,
                        wanted,
                    });
                }
                Ok(found) => *file.digest = Some(found),
                Err(e @ BootFileError::Keep { .. }) => return Err(e),
                Err(e) => match wanted.or(known) {
                    Some(digest) => *file.digest = Some(digest),
                    None => return Err(e),
                },
            }
        }
        Ok(())
    }

    /// The same configuration with this host's paths, for the VM's process.
    pub fn localised(&self, config: &VmConfig) -> VmConfig {
        let mut config = config.clone();
        for file in config.boot_files() {
            if let Some(digest) = *file.digest {
                *file.path = self.path(digest);
            }
        }
        config
    }

    /// Removes what none of these names.
    pub fn sweep<'a>(&self, records: impl IntoIterator<Item = &'a VmRecord>) -> io::Result<()> {
        let mut wanted = BTreeSet::new();
        for record in records {
            // One that this version cannot read may name any of them.
            let Ok(mut config) = config_of(record) else {
                return Ok(());
            };
            let named = config
                .boot_files()
                .into_iter()
                .filter_map(|file| *file.digest);
            wanted.extend(named.map(|digest| digest.to_string()));
        }
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let made = entry.metadata()?.modified()?;
            let age = SystemTime::now().duration_since(made).unwrap_or_default();
            if age >= YOUNG && !wanted.contains(&name) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

/// Makes sure that this host has what the VM boots from: its own copy, the file at the configured path if that is the same, or
/// another host's.
///
/// # Errors
/// [`BootFileError`], which names the file.
pub(super) fn ensure(env: &Env, record: &VmRecord) -> Result<(), String> {
    let mut config = config_of(record)?;
    let files = &env.boot_files;
    for file in config.boot_files() {
        let Some(digest) = *file.digest else { continue };
        if files.has(digest) {
            continue;
        }
        // One that is another file is not copied again and again.
        let here = self::digest(file.path).is_ok_and(|found| found == digest);
        if here
            && files
                .keep_copy(file.what, file.path)
                .is_ok_and(|found| found == digest)
        {
            continue;
        }
        let fetched = fetch(env, record, digest);
        fetched.map_err(|why| {
            let nowhere = BootFileError::Nowhere {
                what: file.what,
                path: file.path.clone(),
                digest,
                why,
            };
            nowhere.to_string()
        })?;
    }
    Ok(())
}

/// From whoever may have it: the owner, its backups, all that have had a part.
fn fetch(env: &Env, record: &VmRecord, digest: FileDigest) -> Result<(), String> {
    let view = &record.view;
    let members = view.chain.iter().chain(&view.joining).map(|m| &m.host);
    let mut hosts: Vec<&HostId> = std::iter::once(&view.owner)
        .chain(members)
        .chain(&record.hosts)
        .filter(|host| **host != env.host)
        .collect();
    let mut seen = BTreeSet::new();
    hosts.retain(|host| seen.insert(*host));
    let mut said = Vec::new();
    for host in hosts {
        let Some(addr) = env.peers.get(host) else {
            said.push(format!("{host} is not among this host's [peers]"));
            continue;
        };
        let member = Member::new(host.clone(), *addr);
        let files = &env.boot_files;
        let fill = |to: &mut File| {
            chain::fetch(&member, view, &env.host, digest, to)
                .map(|_| digest)
                .map_err(|e| e.to_string())
        };
        match files.keep(fill, |e| files.not_kept(e).to_string()) {
            Ok(_) => return Ok(()),
            Err(why) => said.push(why),
        }
    }
    if said.is_empty() {
        said.push("no other host has had a part in the VM".into());
    }
    Err(said.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(kernel: &Path, more: &str) -> VmConfig {
        let text = format!("name = \"vm\"\nmemory_mib = 32\nkernel = {kernel:?}\n{more}");
        VmConfig::from_text(Path::new("vm.toml"), &text).unwrap_or_else(|e| panic!("{e}"))
    }

    fn files() -> (tempfile::TempDir, BootFiles, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let boot = dir.path().join("boot");
        fs::create_dir(&boot).unwrap();
        let kernel = dir.path().join("vmlinuz");
        fs::write(&kernel, b"a kernel").unwrap();
        (dir, BootFiles::new(boot), kernel)
    }

    #[test]
    fn l6_a_configuration_means_the_file_and_not_its_path() {
        let (_dir, files, path) = files();
        let mut first = config(&path, "");
        files.resolve(&mut first, None).unwrap();
        let digest = first.kernel_blake3.expect("a digest");
        let here = files.localised(&first);
        assert_eq!(here.kernel, files.path(digest));
        assert_eq!(fs::read(&here.kernel).unwrap(), b"a kernel");
        // Another file at that path is another kernel; the VM's is kept.
        fs::write(&path, b"a newer kernel").unwrap();
        let mut second = config(&path, "");
        files.resolve(&mut second, Some(&first)).unwrap();
        assert_ne!(second.kernel_blake3, Some(digest));
        assert_eq!(fs::read(files.path(digest)).unwrap(), b"a kernel");
        // Whoever says which one he means is held to it.
        let said = format!("kernel_blake3 = \"{digest}\"");
        let wrong = files.resolve(&mut config(&path, &said), None).unwrap_err();
        assert!(matches!(wrong, BootFileError::Other { .. }), "{wrong}");
        // Where there is no such file, it is the one that it was.
        fs::remove_file(&path).unwrap();
        let mut third = config(&path, "");
        files.resolve(&mut third, Some(&first)).unwrap();
        assert_eq!(third.kernel_blake3, Some(digest));
        let nothing = files.resolve(&mut config(&path, ""), None).unwrap_err();
        assert!(nothing.to_string().contains("vmlinuz"), "{nothing}");
        assert!(fs::read_dir(&files.dir).unwrap().all(|e| {
            let name = e.unwrap().file_name();
            !name.to_string_lossy().starts_with("new-")
        }));
    }

    #[test]
    fn a_file_that_has_rotted_or_is_of_another_kind_is_not_there() {
        let (_dir, files, path) = files();
        let mut config = config(&path, "");
        files.resolve(&mut config, None).unwrap();
        let digest = config.kernel_blake3.unwrap();
        assert!(files.has(digest));
        fs::write(files.path(digest), b"a kerneX").unwrap();
        assert!(!files.has(digest));
        files.resolve(&mut config, None).unwrap();
        assert!(files.has(digest), "it is put right");
        for path in [&path, &files.path(digest)] {
            fs::remove_file(path).unwrap();
            // Whoever opens it for reading waits for a writer.
            nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        }
        assert!(!files.has(digest));
        let fifo = files.resolve(&mut self::config(&path, ""), None);
        let said = fifo.unwrap_err().to_string();
        assert!(said.contains("vmlinuz: it is no regular file"), "{said}");
    }

    #[test]
    fn l6_what_no_vm_names_any_more_is_removed_and_nothing_else() {
        let (_dir, files, path) = files();
        let mut named = config(&path, "");
        files.resolve(&mut named, None).unwrap();
        fs::write(&path, b"another").unwrap();
        let mut old = config(&path, "");
        files.resolve(&mut old, None).unwrap();
        let old = files.path(old.kernel_blake3.unwrap());
        let kept = files.path(named.kernel_blake3.unwrap());
        let record = record_of(&named);
        files.sweep([&record]).unwrap();
        assert!(old.exists(), "it is young");
        let long_ago = SystemTime::now() - 2 * YOUNG;
        for path in [&old, &kept] {
            File::open(path).unwrap().set_modified(long_ago).unwrap();
        }
        files.sweep([&record]).unwrap();
        assert!(!old.exists() && kept.exists());
    }

    fn record_of(config: &VmConfig) -> VmRecord {
        let shape = chain::VmShape {
            ram: vec![],
            vcpus: 1,
            cpu: Default::default(),
            disks: vec![],
            config_toml: toml::to_string(config).unwrap(),
        };
        let register = chain::master::Command::Register {
            vm: checkpoint::VmId(1),
            life: chain::Life::On,
            name: "vm".into(),
            owner: HostId::new("a").unwrap(),
            shape,
        };
        chain::master::MasterState::default()
            .apply(&register)
            .unwrap()
    }
}
