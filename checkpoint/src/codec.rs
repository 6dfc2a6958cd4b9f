//! bincode behind one door, always with a size limit.
//!
//! bincode is unmaintained (RUSTSEC-2025-0141); this module is the only place that knows it, and the place to replace
//! it. Fixed-size little-endian integers; an encoding longer than the limit, and bytes after the value, are errors.

use bincode::config;
use bincode::error::DecodeError;
use serde::{Serialize, de::DeserializeOwned};

/// Why a value could not be encoded or decoded.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The value cannot be encoded.
    #[error("cannot encode: {0}")]
    Encode(String),
    /// The bytes are not such a value.
    #[error("malformed: {0}")]
    Decode(String),
    /// Longer than the caller allows.
    #[error("{length} bytes are over the limit of {limit}")]
    TooLong {
        /// The length.
        length: usize,
        /// The limit.
        limit: usize,
    },
    /// Bytes follow the value.
    #[error("{0} bytes follow the value")]
    Trailing(usize),
}

/// Longest value, in bytes, whatever the caller's limit.
const LONGEST: usize = 128 << 20;

/// Encodes `value` in at most `limit` bytes.
///
/// # Errors
/// [`CodecError::TooLong`] or [`CodecError::Encode`].
pub fn to_bytes<T: Serialize>(value: &T, limit: usize) -> Result<Vec<u8>, CodecError> {
    let bytes = bincode::serde::encode_to_vec(value, config::legacy())
        .map_err(|e| CodecError::Encode(e.to_string()))?;
    if bytes.len() > limit {
        return Err(CodecError::TooLong {
            length: bytes.len(),
            limit,
        });
    }
    Ok(bytes)
}

/// Decodes all of `bytes`, which may be at most `limit` long (and at most 128 MiB).
///
/// A length inside the bytes that promises more than follows is found before memory is taken for it, or costs at most
/// 16 times the bytes at hand (64 KiB for a short value).
///
/// # Errors
/// [`CodecError`]; never panics.
pub fn from_bytes<T: DeserializeOwned>(bytes: &[u8], limit: usize) -> Result<T, CodecError> {
    let limit = limit.min(LONGEST);
    if bytes.len() > limit {
        return Err(CodecError::TooLong {
            length: bytes.len(),
            limit,
        });
    }
    // A good value claims as many bytes as it is long. bincode checks claims before it allocates, but wants the bound
    // at compile time, hence steps.
    match bytes.len() {
        0..=0x1_0000 => decode::<T, 0x1_0000>(bytes),
        0x1_0001..=0x10_0000 => decode::<T, 0x10_0000>(bytes),
        0x10_0001..=0x100_0000 => decode::<T, 0x100_0000>(bytes),
        _ => decode::<T, LONGEST>(bytes),
    }
}

fn decode<T: DeserializeOwned, const CLAIM: usize>(bytes: &[u8]) -> Result<T, CodecError> {
    let decoded = bincode::serde::decode_from_slice(bytes, config::legacy().with_limit::<CLAIM>());
    let (value, used) = decoded.map_err(|e: DecodeError| CodecError::Decode(e.to_string()))?;
    if used != bytes.len() {
        return Err(CodecError::Trailing(bytes.len() - used));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn limits_hold_both_ways() {
        let value = vec![7u8; 100];
        assert!(matches!(
            to_bytes(&value, 50),
            Err(CodecError::TooLong { .. })
        ));
        let bytes = to_bytes(&value, 200).unwrap();
        assert_eq!(from_bytes::<Vec<u8>>(&bytes, 200).unwrap(), value);
        assert!(matches!(
            from_bytes::<Vec<u8>>(&bytes, 50),
            Err(CodecError::TooLong { .. })
        ));
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(matches!(
            from_bytes::<Vec<u8>>(&longer, 200),
            Err(CodecError::Trailing(1))
        ));
    }

    #[test]
    fn values_as_long_as_their_step_are_taken() {
        for step in [0x1_0000, 0x10_0000, 0x100_0000] {
            for length in [step - 1, step, step + 1] {
                // The text's own length takes 8 bytes.
                let text = "x".repeat(length - 8);
                let bytes = to_bytes(&text, usize::MAX).unwrap();
                assert_eq!(bytes.len(), length);
                assert!(from_bytes::<String>(&bytes, usize::MAX).unwrap() == text);
                let numbers = vec![7u32; (length - 8) / 4];
                let bytes = to_bytes(&numbers, usize::MAX).unwrap();
                assert!(from_bytes::<Vec<u32>>(&bytes, usize::MAX).unwrap() == numbers);
            }
        }
    }

    #[test]
    fn a_length_that_lies_is_an_error_not_an_allocation() {
        assert!(from_bytes::<Vec<u8>>(&u64::MAX.to_le_bytes(), 1 << 20).is_err());
        assert!(from_bytes::<Vec<u64>>(&(1u64 << 40).to_le_bytes(), 1 << 20).is_err());
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = from_bytes::<(Vec<String>, Option<Vec<u64>>)>(&bytes, 1 << 16);
        }
    }
}
