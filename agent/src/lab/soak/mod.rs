//! soak
use crate::cli::SoakArgs;
/// x
///
/// # Errors
/// x
pub fn run(_args: &SoakArgs) -> Result<(), Box<dyn std::error::Error>> {
    Ok(())
}
