//! `[master]` in `host.toml`: which engine decides, and where it is reached.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use checkpoint::HostId;
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use super::{ConfigError, value_error};

/// Where the master is.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MasterConfig {
    /// If set, this agent also serves the master at this address: a single one, or one of `members`. Without it: where
    /// `host` or `members` name this host, at its address in `connect`.
    #[serde(default)]
    pub serve: Option<SocketAddr>,
    /// Whether a record may be begun where there is none: for the first start of a new cluster, as `--init`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub begin: bool,
    /// The host that serves a single master, at `connect`: then the same file can be given to all hosts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Where the master is reached: one address, or those of several members, of which any will do.
    #[serde(default, skip_serializing_if = "Addresses::is_empty")]
    pub connect: Addresses,
    /// The hosts whose masters decide together, three or five, with the addresses at which they talk to each other. The
    /// same on all of them.
    #[serde(default, skip_serializing_if = "Members::is_empty")]
    pub members: Members,
    /// Instead of all of these: client URLs of an etcd cluster's members, in which every agent keeps the decisions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub etcd: Vec<String>,
    /// What the keys in etcd begin with.
    #[serde(default = "default_etcd_prefix")]
    pub etcd_prefix: String,
    /// Who to be in etcd, if it asks.
    #[serde(default)]
    pub etcd_user: Option<String>,
    /// The file with that user's password, on its first line.
    #[serde(default)]
    pub etcd_password_file: Option<PathBuf>,
}

fn default_etcd_prefix() -> String {
    "/understudy".into()
}

/// One address or several.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Addresses(pub Vec<SocketAddr>);

impl Addresses {
    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<'de> Deserialize<'de> for Addresses {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrMore;
        impl<'de> Visitor<'de> for OneOrMore {
            type Value = Addresses;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"address:port\", or a list of such")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Addresses, E> {
                let addr = text
                    .parse()
                    .map_err(|e| E::custom(format!("{text:?} is not \"address:port\": {e}")))?;
                Ok(Addresses(vec![addr]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Addresses, A::Error> {
                let mut list: Vec<SocketAddr> = Vec::new();
                while let Some(addr) = seq.next_element()? {
                    if list.contains(&addr) {
                        return Err(de::Error::custom(format!("{addr} is listed twice")));
                    }
                    list.push(addr);
                }
                if list.is_empty() {
                    return Err(de::Error::custom("at least one address is needed"));
                }
                Ok(Addresses(list))
            }
        }
        deserializer.deserialize_any(OneOrMore)
    }
}

/// Hosts that decide together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Members(pub BTreeMap<HostId, SocketAddr>);

impl Members {
    /// Whether there are none: a single master.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let members = BTreeMap::<HostId, SocketAddr>::deserialize(deserializer)?;
        if members.len() != 3 && members.len() != 5 {
            return Err(de::Error::custom(format!(
                "{} members are named; name 3 or 5, or leave `members` out for a single master",
                members.len()
            )));
        }
        let mut seen = BTreeSet::new();
        if let Some((name, addr)) = members.iter().find(|(_, addr)| !seen.insert(**addr)) {
            return Err(de::Error::custom(format!(
                "{name} has the address {addr} of another member"
            )));
        }
        Ok(Self(members))
    }
}

impl MasterConfig {
    /// Finds out what one file for all hosts leaves open: whether, and where, this one serves the master.
    pub(super) fn derive(&mut self, path: &Path, host: &HostId) -> Result<(), ConfigError> {
        if let Some(single) = &self.host {
            let single =
                HostId::new(single).map_err(|e| value_error(path, "master.host", e.to_string()))?;
            let &[addr] = self.connect.0.as_slice() else {
                let problem =
                    "names the host of a single master: then `connect` is its one address";
                return Err(value_error(path, "master.host", problem));
            };
            if !self.members.is_empty() {
                let problem = "names the host of a single master, and `members` those of several: leave one of them out";
                return Err(value_error(path, "master.host", problem));
            }
            if single == *host && self.serve.is_none() {
                self.serve = Some(addr);
            }
            return Ok(());
        }
        let Some(own) = self.members.0.get(host).copied() else {
            return Ok(());
        };
        if self.serve.is_some() || !self.etcd.is_empty() {
            return Ok(());
        }
        // Where agents find it is at the same host's address.
        let here = self.connect.0.iter().copied();
        let here: Vec<SocketAddr> = here
            .filter(|addr| addr.ip() == own.ip() && *addr != own)
            .collect();
        match here[..] {
            [addr] => self.serve = Some(addr),
            [] => {}
            _ => {
                let problem = format!(
                    "is missing: {host} is one of the members, at {}, and `connect` has {} addresses there: which is its?",
                    own.ip(),
                    here.len()
                );
                return Err(value_error(path, "master.serve", problem));
            }
        }
        Ok(())
    }

    /// What one key alone does not show.
    pub(super) fn check(&self, path: &Path, host: &HostId) -> Result<(), ConfigError> {
        let fail = |key: &str, problem: String| Err(value_error(path, key, problem));
        if !self.etcd.is_empty() {
            return self.check_etcd(path);
        }
        for (key, is_set) in [
            ("master.etcd_user", self.etcd_user.is_some()),
            (
                "master.etcd_password_file",
                self.etcd_password_file.is_some(),
            ),
        ] {
            if is_set {
                return fail(key, "is of no use without `etcd`: where is it?".into());
            }
        }
        let member = self.members.0.contains_key(host);
        if self.connect.is_empty() && self.serve.is_none() {
            return fail("master.connect", "is missing: where is the master?".into());
        }
        if member && self.serve.is_none() {
            return fail(
                "master.serve",
                format!(
                    "is missing: {host} is one of the members; at which address does it serve agents? (None of those in `connect` is at its IP address.)"
                ),
            );
        }
        if self.serve.is_some() && !self.members.is_empty() && !member {
            let names: Vec<String> = self.members.0.keys().map(ToString::to_string).collect();
            return fail(
                "master.serve",
                format!(
                    "this host, {host}, is not one of the members ({}): leave `serve` out, or name it there",
                    names.join(", ")
                ),
            );
        }
        if let (Some(serve), Some(own)) = (self.serve, self.members.0.get(host))
            && serve == *own
        {
            return fail(
                "master.serve",
                format!(
                    "{serve} is the address at which {host} talks to the other members; agents need another"
                ),
            );
        }
        Ok(())
    }

    /// Name and password for etcd, if there are any.
    ///
    /// # Errors
    /// [`ConfigError::Read`] naming the password's file.
    #[cfg(feature = "etcd")]
    pub fn etcd_credentials(&self) -> Result<Option<(String, String)>, ConfigError> {
        let (Some(user), Some(file)) = (&self.etcd_user, &self.etcd_password_file) else {
            return Ok(None);
        };
        let text = std::fs::read_to_string(file).map_err(|source| ConfigError::Read {
            path: file.clone(),
            source,
        })?;
        let password = text.lines().next().unwrap_or_default();
        Ok(Some((user.clone(), password.into())))
    }

    fn check_etcd(&self, path: &Path) -> Result<(), ConfigError> {
        let fail = |key: &str, problem: String| Err(value_error(path, key, problem));
        for (key, is_set) in [
            ("master.serve", self.serve.is_some()),
            ("master.connect", !self.connect.is_empty()),
            ("master.members", !self.members.is_empty()),
            ("master.host", self.host.is_some()),
        ] {
            if is_set {
                return fail(key, "does not go with `etcd`: one of them decides".into());
            }
        }
        for url in &self.etcd {
            let authority = url
                .strip_prefix("http://")
                .map(|rest| rest.trim_end_matches('/'));
            let is_url = authority.is_some_and(|a| {
                let port = a
                    .rsplit_once(':')
                    .map(|(_, port)| port.parse::<u16>().is_ok());
                port == Some(true) && !a.contains('/')
            });
            if !is_url {
                return fail(
                    "master.etcd",
                    format!(
                        "{url:?} is not a client URL like \"http://10.0.0.1:2379\" (https is not built in: keep etcd on a network of its own, or behind a tunnel)"
                    ),
                );
            }
        }
        if !self.etcd_prefix.starts_with('/') || self.etcd_prefix.len() < 2 {
            return fail(
                "master.etcd_prefix",
                "has to be like \"/understudy\"".into(),
            );
        }
        if self.etcd_user.is_some() != self.etcd_password_file.is_some() {
            return fail(
                "master.etcd_user",
                "and `etcd_password_file` are given together, or not at all".into(),
            );
        }
        if !cfg!(feature = "etcd") {
            return fail(
                "master.etcd",
                "this understudy was built without it: build one with `cargo build --release --features etcd` (docs/master.md says what that needs), or name `connect`".into(),
            );
        }
        Ok(())
    }

    /// Where this host's agent asks: its own master first, which is there as long as the agent is.
    #[must_use]
    pub fn addresses(&self) -> Vec<SocketAddr> {
        let own = self.serve.map(|mut addr| {
            if addr.ip().is_unspecified() {
                addr.set_ip(match addr {
                    SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
                    SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
                });
            }
            addr
        });
        let others = self.connect.0.iter().copied();
        let others = others.filter(|addr| Some(*addr) != own && Some(*addr) != self.serve);
        // With a single master `connect` is its address, by whatever name; `serve` may not be reachable.
        if self.members.is_empty() && !self.connect.is_empty() {
            return self.connect.0.clone();
        }
        own.into_iter().chain(others).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::HostConfig;

    fn load(master: &str) -> Result<HostConfig, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("host.toml");
        let text = format!(
            "host = \"a\"\ndata_dir = \"/d\"\nlisten = \"10.0.0.1:7700\"\n[master]\n{master}"
        );
        std::fs::write(&path, text).unwrap();
        HostConfig::load(&path).map_err(|e| e.to_string())
    }

    const THREE: &str =
        "members = { a = \"10.0.0.1:7691\", b = \"10.0.0.2:7691\", c = \"10.0.0.3:7691\" }\n";

    #[test]
    fn one_address_or_several() {
        let one = load("connect = \"10.0.0.3:7690\"\n").unwrap();
        assert_eq!(one.master.addresses(), ["10.0.0.3:7690".parse().unwrap()]);
        let several = load("connect = [\"10.0.0.3:7690\", \"10.0.0.4:7690\"]\n").unwrap();
        assert_eq!(several.master.addresses().len(), 2);
    }

    #[test]
    fn a_member_asks_itself_first() {
        let text = format!(
            "serve = \"0.0.0.0:7690\"\nconnect = [\"10.0.0.2:7690\", \"10.0.0.3:7690\"]\n{THREE}"
        );
        let config = load(&text).unwrap();
        let addresses = config.master.addresses();
        assert_eq!(addresses[0], "127.0.0.1:7690".parse().unwrap());
        assert_eq!(addresses.len(), 3);
        let alone = load(&format!("serve = \"10.0.0.1:7690\"\n{THREE}")).unwrap();
        assert_eq!(alone.master.addresses(), ["10.0.0.1:7690".parse().unwrap()]);
    }

    #[test]
    fn what_cannot_be_is_named_with_its_place() {
        for (text, names) in [
            (
                "connect = \"nowhere\"\n",
                &["line 5, column 11", "nowhere"][..],
            ),
            ("connect = 7690\n", &["line 5, column 11", "address:port"]),
            ("connect = []\n", &["line 5, column 11", "at least one"]),
            (
                "connect = [\"10.0.0.1:1\", \"x\"]\n",
                &["line 5, column 26"],
            ),
            (
                "connect = [\"10.0.0.1:1\", \"10.0.0.1:1\"]\n",
                &["line 5, column 11", "twice"],
            ),
            (
                "connect = \"10.0.0.1:1\"\nmembers = { a = \"10.0.0.1:2\", b = \"10.0.0.2:2\" }\n",
                &["line 6, column 11", "2 members", "3 or 5"],
            ),
            (
                "connect = \"10.0.0.1:1\"\nmembers = { a = \"10.0.0.1:2\", b = \"10.0.0.1:2\", c = \"10.0.0.2:2\" }\n",
                &["line 6, column 11", "another member"],
            ),
            (
                "connect = \"10.0.0.1:1\"\nmembers = { \"../a\" = \"10.0.0.1:2\" }\n",
                &["line 6, column 13"],
            ),
            ("conect = \"10.0.0.1:1\"\n", &["line 5, column 1", "conect"]),
        ] {
            let said = load(text).unwrap_err();
            for name in names {
                assert!(said.contains(name), "{text}{said}");
            }
        }
    }

    #[test]
    fn what_does_not_go_together_names_its_key() {
        for (text, names) in [
            (String::new(), &["master.connect", "missing"][..]),
            (
                "etcd = [\"http://10.0.0.1:2379\"]\nconnect = \"10.0.0.2:1\"\n".into(),
                &["master.connect", "etcd"],
            ),
            (
                "etcd = [\"10.0.0.1:2379\"]\n".into(),
                &["master.etcd", "10.0.0.1:2379", "http://"],
            ),
            (
                "etcd = [\"http://10.0.0.1:2379\"]\netcd_user = \"u\"\n".into(),
                &["master.etcd_user", "etcd_password_file"],
            ),
            (
                "connect = \"10.0.0.2:1\"\netcd_user = \"u\"\n".into(),
                &["master.etcd_user", "without `etcd`"],
            ),
            (
                format!("connect = \"10.0.0.2:1\"\n{THREE}"),
                &["master.serve", "a is one of the members"],
            ),
            (
                format!("serve = \"10.0.0.1:7691\"\n{THREE}"),
                &["master.serve", "10.0.0.1:7691"],
            ),
            (
                format!("serve = \"10.0.0.1:7690\"\n{}", THREE.replace("a =", "d =")),
                &["master.serve", "not one of the members", "b, c, d"],
            ),
        ] {
            let said = load(&text).unwrap_err();
            for name in names {
                assert!(said.contains(name), "{text}{said}");
            }
        }
    }

    #[test]
    fn etcd_needs_a_program_that_has_it() {
        let config = load("etcd = [\"http://10.0.0.1:2379\", \"http://10.0.0.2:2379/\"]\n");
        if cfg!(feature = "etcd") {
            assert_eq!(config.unwrap().master.etcd_prefix, "/understudy");
        } else {
            let said = config.unwrap_err();
            assert!(said.contains("--features etcd"), "{said}");
        }
    }
}
