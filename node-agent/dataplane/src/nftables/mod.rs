//! Service traffic by nftables.
use crate::backend::{Backend, BackendError, Result};
use crate::config::{Config, Mode};

pub fn missing() -> Option<String> {
    Some("not built yet".into())
}

pub fn open(_config: &Config) -> Result<Box<dyn Backend>> {
    Err(BackendError::Unsupported { mode: Mode::Nftables, missing: missing().unwrap_or_default() })
}
