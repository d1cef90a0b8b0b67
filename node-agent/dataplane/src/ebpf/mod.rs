//! Service traffic by eBPF.
use crate::backend::{Backend, BackendError, Result};
use crate::config::{Config, Mode};

/// The first feature that this kernel or build lacks, or `None` when eBPF can carry Service traffic here.
pub fn missing(_config: &Config) -> Option<String> {
    Some("the eBPF programs are not part of this build".into())
}

pub fn open(config: &Config) -> Result<Box<dyn Backend>> {
    Err(BackendError::Unsupported { mode: Mode::Ebpf, missing: missing(config).unwrap_or_default() })
}
