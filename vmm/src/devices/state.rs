//! Device states in and out of a checkpoint, through the one codec.

use checkpoint::codec;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::devices::{DeviceError, DeviceState};

/// Largest encoded state of one device, bytes.
pub const LIMIT: usize = 1 << 20;

/// Encodes `value` as the state of `name`.
///
/// # Errors
/// [`DeviceError::State`] if it is too large.
pub fn encode<T: Serialize>(
    name: &str,
    version: u16,
    value: &T,
) -> Result<DeviceState, DeviceError> {
    Ok(DeviceState {
        name: name.to_owned(),
        version,
        state: to_bytes(name, value)?,
    })
}

/// Decodes the state of `name`, which must be of `version`.
///
/// # Errors
/// [`DeviceError::State`] if it is another device's, of another version, or malformed.
pub fn decode<T: DeserializeOwned>(
    saved: &DeviceState,
    name: &str,
    version: u16,
) -> Result<T, DeviceError> {
    let wrong = |why: String| DeviceError::State {
        name: name.to_owned(),
        why,
    };
    if saved.name != name {
        return Err(wrong(format!("is the state of {}", saved.name)));
    }
    if saved.version != version {
        return Err(wrong(format!(
            "has version {}, this program reads {version}",
            saved.version
        )));
    }
    from_bytes(name, &saved.state)
}

/// Encodes a part of a state.
///
/// # Errors
/// As [`encode`].
pub fn to_bytes<T: Serialize>(name: &str, value: &T) -> Result<Vec<u8>, DeviceError> {
    codec::to_bytes(value, LIMIT).map_err(|e| DeviceError::State {
        name: name.to_owned(),
        why: e.to_string(),
    })
}

/// Decodes a part of a state.
///
/// # Errors
/// As [`decode`].
pub fn from_bytes<T: DeserializeOwned>(name: &str, bytes: &[u8]) -> Result<T, DeviceError> {
    codec::from_bytes(bytes, LIMIT).map_err(|e| DeviceError::State {
        name: name.to_owned(),
        why: e.to_string(),
    })
}
