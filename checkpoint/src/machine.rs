//! Machine state: everything of a VM that is neither RAM nor disk.
//!
//! ```text
//! | magic "UMST" u32 | version u16 | reserved u16 = 0 | length u32 | CRC32C u32 of the body | body (bincode) |
//! ```

use serde::{Deserialize, Serialize};

use crate::codec::{self, CodecError};

/// One stretch of guest physical memory that is RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamRange {
    /// Guest physical address, a multiple of the page size.
    pub start: u64,
    /// Length in bytes, a multiple of the page size.
    pub len: u64,
}

/// State of one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// `net0`, `blk0`, `rng0`, `serial`, `rtc`.
    pub name: String,
    /// Version of `state`'s form.
    pub version: u16,
    /// The device's own encoding.
    pub state: Vec<u8>,
}

/// vCPU, VM and device state at one instant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineState {
    /// RAM layout: a state fits only a VM of the same layout.
    pub ram: Vec<RamRange>,
    /// Interrupt controllers, timers, clock.
    pub vm: Vec<u8>,
    /// One blob per vCPU, in order.
    pub vcpus: Vec<Vec<u8>>,
    /// Devices.
    pub devices: Vec<DeviceState>,
}

/// Longest encoded machine state, in bytes.
pub const MACHINE_LIMIT: usize = 64 << 20;
const MAGIC: u32 = u32::from_le_bytes(*b"UMST");
const VERSION: u16 = 1;
const HEADER: usize = 16;

/// Why bytes are not a machine state.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The first bytes are not a machine state's.
    #[error("not a machine state (magic {0:#010x})")]
    Magic(u32),
    /// Written by another version.
    #[error(
        "machine state of version {0}; this program reads version {VERSION} (use the same version on all hosts)"
    )]
    Version(u16),
    /// Cut off, or longer than it says.
    #[error("machine state says {said} bytes of body, {found} are there")]
    Length {
        /// As the header says.
        said: usize,
        /// As found.
        found: usize,
    },
    /// Damaged.
    #[error("machine state is damaged (its checksum is wrong)")]
    Checksum,
    /// The body.
    #[error("machine state: {0}")]
    Codec(#[from] CodecError),
}

impl MachineState {
    /// Encodes with header and checksum.
    ///
    /// # Errors
    /// [`MachineError::Codec`] over [`MACHINE_LIMIT`].
    pub fn encode(&self) -> Result<Vec<u8>, MachineError> {
        let body = codec::to_bytes(self, MACHINE_LIMIT - HEADER)?;
        let mut out = Vec::with_capacity(HEADER + body.len());
        out.extend_from_slice(&MAGIC.to_le_bytes());
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&(body.len() as u32).to_le_bytes());
        out.extend_from_slice(&crc32c::crc32c(&body).to_le_bytes());
        out.extend_from_slice(&body);
        Ok(out)
    }

    /// Decodes what [`MachineState::encode`] made.
    ///
    /// # Errors
    /// [`MachineError`]; never panics.
    pub fn decode(bytes: &[u8]) -> Result<Self, MachineError> {
        let Some((header, body)) = bytes.split_at_checked(HEADER) else {
            return Err(MachineError::Length {
                said: HEADER,
                found: bytes.len(),
            });
        };
        let word = |at: usize| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        if word(0) != MAGIC {
            return Err(MachineError::Magic(word(0)));
        }
        let version = word(4) as u16;
        if version != VERSION || word(4) >> 16 != 0 {
            return Err(MachineError::Version(version));
        }
        if word(8) as usize != body.len() {
            return Err(MachineError::Length {
                said: word(8) as usize,
                found: body.len(),
            });
        }
        if word(12) != crc32c::crc32c(body) {
            return Err(MachineError::Checksum);
        }
        Ok(codec::from_bytes(body, MACHINE_LIMIT)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> MachineState {
        MachineState {
            ram: vec![RamRange {
                start: 0,
                len: 1 << 20,
            }],
            vm: vec![1, 2, 3],
            vcpus: vec![vec![4; 100], vec![5; 100]],
            devices: vec![DeviceState {
                name: "net0".into(),
                version: 1,
                state: vec![6; 10],
            }],
        }
    }

    #[test]
    fn a_round_trip_is_exact() {
        assert_eq!(
            MachineState::decode(&sample().encode().unwrap()).unwrap(),
            sample()
        );
    }

    proptest! {
        #[test]
        fn damage_is_always_found(bit in 0usize..4000, cut in 0usize..400) {
            let good = sample().encode().unwrap();
            let mut flipped = good.clone();
            let bit = bit % (good.len() * 8);
            flipped[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(MachineState::decode(&flipped).is_err());
            let cut = cut % good.len();
            prop_assert!(MachineState::decode(&good[..cut]).is_err());
        }
    }
}
