//! How a client's traffic ended.

use serde::Serialize;

/// The client's end.
#[derive(Clone, Debug, Default, Serialize)]
pub struct End {
    /// Acknowledged requests.
    pub acked: u64,
    /// Acknowledged requests that the guest does not know any more.
    pub lost: u64,
    /// Requests answered with an error.
    pub failed: u64,
    /// Connections broken.
    pub broken: u64,
    /// Whether the guest could be asked at the end.
    pub verified: bool,
    /// Verified, nothing lost, nothing broken.
    pub survived: bool,
    /// What went wrong.
    pub errors: Vec<String>,
}
