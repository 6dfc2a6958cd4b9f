//! The numbers and names that every layer speaks in.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        pub struct $name(
            /// The number itself.
            pub u64,
        );

        impl $name {
            /// The number before the first.
            pub const ZERO: Self = Self(0);

            /// The number after this one (it stays at the largest, which no VM lives to see).
            #[must_use]
            pub const fn next(self) -> Self {
                Self(self.0.saturating_add(1))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number! {
    /// A stretch of guest execution; only grows over a VM's life, across owners.
    Epoch
}
number! {
    /// A VM's configuration; raised by the master at every change of owner or chain.
    Generation
}
number! {
    /// A VM's number, given by the master.
    VmId
}

/// Why a text is not a host's (or VM's) name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Empty or too long.
    #[error("a name has 1 to 64 characters, {0:?} has {1}")]
    Length(String, usize),
    /// A character outside the set.
    #[error("{0:?}: the character {1:?} is not one of A-Z a-z 0-9 . _ -")]
    Character(String, char),
    /// A leading dot or dash would be mistaken for a hidden file or an option.
    #[error("{0:?}: a name begins with a letter or a digit")]
    Start(String),
}

/// A host's name: 1 to 64 bytes of `[A-Za-z0-9._-]`, beginning with a letter or digit; safe as a file name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostId(String);

impl HostId {
    /// Checks `name`.
    ///
    /// # Errors
    /// [`NameError`] naming what is wrong with it.
    pub fn new(name: &str) -> Result<Self, NameError> {
        if name.is_empty() || name.len() > 64 {
            return Err(NameError::Length(
                name.chars().take(80).collect(),
                name.len(),
            ));
        }
        if let Some(c) = name
            .chars()
            .find(|c| !(c.is_ascii_alphanumeric() || ".-_".contains(*c)))
        {
            return Err(NameError::Character(name.into(), c));
        }
        if !name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
            return Err(NameError::Start(name.into()));
        }
        Ok(Self(name.into()))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for HostId {
    type Error = NameError;
    fn try_from(name: String) -> Result<Self, NameError> {
        Self::new(&name)
    }
}

impl From<HostId> for String {
    fn from(id: HostId) -> Self {
        id.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for good in ["a", "host-1.example_x", "0"] {
            assert_eq!(HostId::new(good).unwrap().as_str(), good);
        }
        for bad in ["", "a b", "../x", "-a", ".a", "ä", &"x".repeat(65)] {
            assert!(HostId::new(bad).is_err(), "{bad:?} must be refused");
        }
    }
}
