//! The numbers and names that every layer speaks in.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

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
macro_rules! uuid {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(
            /// The 128 bits, the first of the text the highest.
            pub u128,
        );

        impl $name {
            /// Nobody's.
            pub const NIL: Self = Self(0);

            /// A new one, of version 4: 122 random bits of the kernel's.
            ///
            /// # Panics
            /// If the kernel has no random numbers to give, which it has from soon after its start.
            #[must_use]
            pub fn random() -> Self {
                let mut bytes = [0u8; 16];
                getrandom::fill(&mut bytes).expect("the kernel gives random numbers");
                let bits = u128::from_be_bytes(bytes);
                Self((bits & !VERSION_AND_VARIANT) | VERSION_4_VARIANT_1)
            }

            /// The lower and the upper half, as formats hold them.
            #[must_use]
            pub const fn halves(self) -> (u64, u64) {
                (self.0 as u64, (self.0 >> 64) as u64)
            }

            /// From the lower and the upper half.
            #[must_use]
            pub const fn from_halves(low: u64, high: u64) -> Self {
                Self(low as u128 | (high as u128) << 64)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let hex = format!("{:032x}", self.0);
                let (a, b, c) = (&hex[..8], &hex[8..12], &hex[12..16]);
                f.pad(&format!("{a}-{b}-{c}-{}-{}", &hex[16..20], &hex[20..]))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl FromStr for $name {
            type Err = UuidError;

            fn from_str(text: &str) -> Result<Self, UuidError> {
                parse_uuid(text).map(Self)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                if to.is_human_readable() {
                    to.collect_str(self)
                } else {
                    self.0.serialize(to)
                }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                if from.is_human_readable() {
                    let text = String::deserialize(from)?;
                    text.parse().map_err(serde::de::Error::custom)
                } else {
                    u128::deserialize(from).map(Self)
                }
            }
        }
    };
}

/// The bits of a UUID that RFC 9562 fixes for version 4, and what they are.
const VERSION_AND_VARIANT: u128 = 0xf << 76 | 0b11 << 62;
const VERSION_4_VARIANT_1: u128 = 0x4 << 76 | 0b10 << 62;

/// Why a text is not a UUID.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a UUID like 01234567-89ab-4cde-8f01-23456789abcd")]
pub struct UuidError(String);

fn parse_uuid(text: &str) -> Result<u128, UuidError> {
    let wrong = || UuidError(text.chars().take(80).collect());
    let groups: Vec<&str> = text.split('-').collect();
    let lengths: Vec<usize> = groups.iter().map(|g| g.len()).collect();
    let hex = groups.concat();
    if lengths != [8, 4, 4, 4, 12] || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(wrong());
    }
    u128::from_str_radix(&hex, 16).map_err(|_| wrong())
}

uuid! {
    /// A VM, in every life and cluster: its UUID, drawn by the agent that registers it. One that is registered anew under
    /// the same name is another VM.
    VmId
}
uuid! {
    /// A cluster: what one master has decided since its record was begun.
    ClusterId
}
uuid! {
    /// A host's own identity, drawn when its agent first started with its data directory: tells two hosts of one name apart.
    HostUuid
}
uuid! {
    /// A request to the master: asked again under the same id it is the same request.
    RequestId
}

impl VmId {
    /// 32 bits for names that have room for no more (a tap's). The master grants no id whose short form another VM has.
    #[must_use]
    pub const fn short(self) -> u32 {
        // Folded: of a random id all words are random, of a small number only the last says anything.
        let n = self.0;
        n as u32 ^ (n >> 32) as u32 ^ (n >> 64) as u32 ^ (n >> 96) as u32
    }
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
    fn a_uuid_comes_back_from_text_from_halves_and_from_bytes() {
        for vm in [VmId::NIL, VmId(7), VmId(u128::MAX), VmId::random()] {
            assert_eq!(vm.to_string().parse(), Ok(vm));
            let (low, high) = vm.halves();
            assert_eq!(VmId::from_halves(low, high), vm);
            let bytes = crate::codec::to_bytes(&vm, 64).unwrap();
            assert_eq!(crate::codec::from_bytes::<VmId>(&bytes, 64).unwrap(), vm);
        }
        let text = "01234567-89ab-4cde-8f01-23456789abcd";
        assert_eq!(text.parse::<ClusterId>().unwrap().to_string(), text);
        for bad in ["", "7", "0123456789ab4cde8f0123456789abcd", &text[1..]] {
            assert!(bad.parse::<VmId>().is_err(), "{bad:?} must be refused");
        }
        assert!(
            "+1234567-89ab-4cde-8f01-23456789abcd"
                .parse::<VmId>()
                .is_err()
        );
    }

    #[test]
    fn random_ids_are_of_version_4_and_differ() {
        let ids: Vec<VmId> = (0..100).map(|_| VmId::random()).collect();
        for (i, id) in ids.iter().enumerate() {
            let text = id.to_string();
            assert_eq!(&text[14..15], "4", "{text}");
            assert!("89ab".contains(&text[19..20]), "{text}");
            assert!(!ids[..i].contains(id), "{text} twice");
        }
        assert_eq!(VmId(7).short(), 7);
        assert_ne!(ids[0].short(), ids[1].short());
    }

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
