//! Debian's own PostgreSQL clients, on the client's side of the guest LAN.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use understudy_tests::stock::given;
use understudy_tests::{Cluster, GUEST, patience};

/// TPC-B's transaction in two requests, so that a host may die while one is open. The client numbers its transactions,
/// the number goes into the row, and what was acknowledged is noted when the server has said COMMIT, not before.
const SCRIPT: &str = r"\set n :n + 1
\set aid random(1, 10000)
\set tid random(1, 10)
\set delta random(-5000, 5000)
BEGIN \; UPDATE pgbench_accounts SET abalance = abalance + :delta WHERE aid = :aid \; SELECT abalance FROM pgbench_accounts WHERE aid = :aid;
UPDATE pgbench_tellers SET tbalance = tbalance + :delta WHERE tid = :tid \; UPDATE pgbench_branches SET bbalance = bbalance + :delta WHERE bid = 1 \; INSERT INTO pgbench_history (tid, bid, aid, delta, mtime, filler) VALUES (:tid, 1, :aid, :delta, CURRENT_TIMESTAMP, :client_id || ' ' || :n) \; END;
\shell echo :client_id :n >>";

/// Every transaction's client and number, as noted in its row.
pub const ROWS: &str =
    "SELECT rtrim(filler) FROM pgbench_history ORDER BY split_part(filler, ' ', 2)::int";
/// What TPC-B keeps: all balances changed by the same amount.
pub const SUMS: &str = "SELECT (SELECT sum(delta) FROM pgbench_history), (SELECT sum(abalance) FROM pgbench_accounts), \
     (SELECT sum(tbalance) FROM pgbench_tellers), (SELECT sum(bbalance) FROM pgbench_branches)";

/// One of Debian's client programs, not yet told what to do.
fn program(name: &str) -> Command {
    let mut command = Command::new("timeout");
    command
        // Nothing waits for a guest for ever.
        .arg(format!("{}", 4 * patience().as_secs()))
        .arg(given("UNDERSTUDY_PG_BIN").join(name))
        .args(["-h", &GUEST.to_string(), "-U", "postgres"])
        .env("LD_LIBRARY_PATH", given("UNDERSTUDY_PG_LIB"))
        .env("PGSSLMODE", "disable")
        .env("PGGSSENCMODE", "disable")
        .env("PGCONNECT_TIMEOUT", "30")
        .stdin(Stdio::null());
    command
}

/// Runs `sql`, a transaction each, on a connection of its own.
pub fn psql(cluster: &Cluster, sql: &[&str]) -> Output {
    let mut command = program("psql");
    command.args(["-XAtq", "-v", "ON_ERROR_STOP=1"]);
    command.args(sql.iter().flat_map(|sql| ["-c", sql]));
    command.arg("postgres");
    cluster
        .network()
        .within("client", || command.output())
        .expect("running psql")
}

/// As [`psql`]; what it printed.
///
/// # Panics
/// If the server does not answer, or with an error.
pub fn query(cluster: &Cluster, sql: &[&str]) -> String {
    let output = psql(cluster, sql);
    assert!(
        output.status.success(),
        "{sql:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Transactions of each client, by its number.
pub type Counts = BTreeMap<u64, u64>;

/// A running pgbench: a connection per client, each from begin to end. It never connects again: one that breaks is the
/// end of its client, which [`Pgbench::acked`] notices.
#[derive(Debug)]
pub struct Pgbench {
    child: Child,
    acked: PathBuf,
    said: PathBuf,
    clients: u64,
}

impl Pgbench {
    /// Starts `clients` clients, which begin `rate` transactions a second together.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start(cluster: &Cluster, clients: u64, rate: u64) -> Self {
        let [script, acked, said] =
            ["pgbench.sql", "pgbench.acked", "pgbench.log"].map(|f| cluster.path(f));
        fs::write(&script, format!("{SCRIPT}{}\n", acked.display())).expect("pgbench's script");
        File::create(&acked).expect("a file for what is acknowledged");
        let log = File::create(&said).expect("pgbench's log");
        let mut command = program("pgbench");
        command
            .arg("-n")
            .arg("-f")
            .arg(&script)
            .args(["-D", "n=0", "-T", "100000"])
            .args(["-c", &clients.to_string(), "-R", &rate.to_string()])
            .arg("postgres")
            .stdout(log.try_clone().expect("pgbench's log"))
            .stderr(log);
        let child = cluster
            .network()
            .within("client", || command.spawn())
            .expect("starting pgbench");
        Self {
            child,
            acked,
            said,
            clients,
        }
    }

    /// What has been acknowledged to each client.
    ///
    /// # Panics
    /// With its own words if a client has ended, or has had an error.
    pub fn acked(&mut self) -> Counts {
        let said = fs::read_to_string(&self.said).expect("pgbench's log");
        let ended = self.child.try_wait().expect("waiting for pgbench");
        assert!(
            ended.is_none() && !said.contains("error") && !said.contains("aborted"),
            "pgbench has failed ({ended:?}): {said}"
        );
        self.noted()
    }

    fn noted(&self) -> Counts {
        let none = (0..self.clients).map(|client| (client, 0)).collect();
        count(
            none,
            &fs::read_to_string(&self.acked).expect("what was acknowledged"),
        )
    }

    /// Ends it in the middle of whatever it does; returns what was acknowledged.
    ///
    /// # Panics
    /// If a client had ended before.
    pub fn stop(mut self) -> Counts {
        self.acked();
        self.end();
        self.noted()
    }

    fn end(&mut self) {
        // `timeout` passes it on; SIGKILL would leave pgbench behind.
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

impl Drop for Pgbench {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.end();
        }
        if std::thread::panicking() {
            let said = fs::read_to_string(&self.said).unwrap_or_default();
            eprintln!("acknowledged: {:?}; pgbench said: {said}", self.noted());
        }
    }
}

/// Counts lines "CLIENT NUMBER", which have to be numbered 1, 2, 3, ... for each client, each once, in this order.
///
/// # Panics
/// Naming the line that is not.
pub fn count(mut counts: Counts, lines: &str) -> Counts {
    for line in lines.lines() {
        let (client, number) = line
            .split_once(' ')
            .and_then(|(c, n)| Some((c.parse().ok()?, n.parse::<u64>().ok()?)))
            .unwrap_or_else(|| panic!("not a client's number and a transaction's: {line:?}"));
        let so_far = counts.entry(client).or_default();
        *so_far += 1;
        assert_eq!(
            number, *so_far,
            "client {client}'s transactions are not all there, each once"
        );
    }
    counts
}

/// `rows` (of [`ROWS`]) hold everything that is in `acked`, each once, and at most what was under way besides; `sums`
/// (of [`SUMS`]) agree.
///
/// # Panics
/// If not.
pub fn check(wher: &str, acked: &Counts, rows: &str, sums: &str) {
    let there = count(Counts::new(), rows);
    for (client, acked) in acked {
        let there = there.get(client).copied().unwrap_or_default();
        assert!(
            there == *acked || there == acked + 1,
            "{wher}: client {client} was told of {acked} transactions, {there} are there"
        );
    }
    let all: Vec<&str> = sums.trim().split('|').collect();
    assert!(
        all.len() == 4 && all.iter().all(|sum| *sum == all[0]),
        "{wher}: history, accounts, tellers and branches do not agree: {sums}"
    );
}
