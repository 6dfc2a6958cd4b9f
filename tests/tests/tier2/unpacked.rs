//! A guest's disk, looked at without the guest.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A command that has to succeed; what it printed.
///
/// # Panics
/// With what it said if it does not.
pub fn run(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}: {said}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    said
}

/// The stock guest's root from `image`, which is not changed, with PostgreSQL ready to be started in it.
#[derive(Debug)]
pub struct Unpacked {
    root: PathBuf,
    user: String,
}

impl Unpacked {
    /// Unpacks it to `root`, which must not be there yet.
    ///
    /// # Panics
    /// Naming the command that failed.
    pub fn of(image: &Path, root: &Path) -> Self {
        fs::create_dir(root).expect("a directory to unpack to");
        run(Command::new("debugfs")
            .arg("-R")
            .arg(format!("rdump / {}", root.display()))
            .arg(image));
        let data = fs::metadata(root.join("pgdata")).expect("the database cluster");
        run(Command::new("mknod")
            .args(["-m", "666"])
            .arg(root.join("dev/null"))
            .args(["c", "1", "3"]));
        for (dir, mode) in [("", 0o755), ("dev/shm", 0o1777), ("s", 0o1777)] {
            let dir = root.join(dir);
            fs::create_dir_all(&dir).expect("a directory for PostgreSQL");
            fs::set_permissions(&dir, fs::Permissions::from_mode(mode)).expect("its mode");
        }
        Self {
            root: root.into(),
            user: format!("--userspec={}:{}", data.uid(), data.gid()),
        }
    }

    /// Runs one of the programs in the guest's /bin there, as the server's user.
    ///
    /// # Panics
    /// If it does not succeed.
    pub fn run(&self, words: &[&str]) -> String {
        run(Command::new("chroot")
            .arg(&self.user)
            .arg(&self.root)
            .arg(format!("/bin/{}", words[0]))
            .args(&words[1..])
            .stdin(Stdio::null()))
    }
}
