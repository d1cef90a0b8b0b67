//! What this kernel can do, and the mode that follows from it.
use crate::backend::{Backend, BackendError, Result};
use crate::config::{Config, Mode, ModeChoice};
use crate::{ebpf, nftables, userspace};

/// The mode in use and why it is that one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    pub mode: Mode,
    /// For the log, the metrics and the Node's annotations: names the feature that a better mode lacked.
    pub reason: String,
}

/// Tries the modes from best to least, or only the one that was asked for, and hands back what the first that works is. `attempt` says
/// what a mode lacks here.
fn choose<T>(wanted: ModeChoice, attempt: impl Fn(Mode) -> std::result::Result<T, String>) -> Result<(Choice, T)> {
    if let ModeChoice::Only(mode) = wanted {
        return match attempt(mode) {
            Ok(found) => Ok((Choice { mode, reason: format!("--proxy-mode={mode}") }, found)),
            Err(missing) => Err(BackendError::Unsupported { mode, missing }),
        };
    }
    let mut passed_over = Vec::new();
    for mode in Mode::ALL {
        match attempt(mode) {
            Ok(found) => {
                let reason = if passed_over.is_empty() { "the kernel has all it takes".into() } else { passed_over.join("; ") };
                return Ok((Choice { mode, reason }, found));
            }
            Err(missing) => passed_over.push(format!("no {mode}: {missing}")),
        }
    }
    Err(BackendError::Unsupported { mode: Mode::Userspace, missing: passed_over.join("; ") })
}

/// The mode to be in, and its backend, unless that is the one `in_use`: what is running needs no proof. A backend is tried by opening it,
/// so that nothing is loaded twice.
pub fn probe(config: &Config, wanted: ModeChoice, in_use: Option<Mode>) -> Result<(Choice, Option<Box<dyn Backend>>)> {
    choose(wanted, |mode| {
        if in_use == Some(mode) {
            return Ok(None);
        }
        if let Some(missing) = missing(mode) {
            return Err(missing);
        }
        match open(config, mode) {
            Err(BackendError::Unsupported { missing, .. }) => Err(missing),
            opened => opened.map(Some).map_err(|error| error.to_string()),
        }
    })
}

/// What a mode lacks that opening it wouldn't tell.
fn missing(mode: Mode) -> Option<String> {
    match mode {
        Mode::Ebpf => None,
        Mode::Nftables => nftables::missing(),
        Mode::Userspace => userspace::missing(),
    }
}

/// Other modes than the one in use that a former agent has left in the kernel, where they still lead traffic.
pub fn left(config: &Config, in_use: Mode) -> impl Iterator<Item = Mode> {
    let is_left = |mode: &Mode| match mode {
        Mode::Ebpf => ebpf::is_left(config),
        Mode::Nftables => nftables::is_left(),
        Mode::Userspace => userspace::is_left(),
    };
    Mode::ALL.into_iter().filter(move |mode| *mode != in_use).filter(is_left)
}

pub fn open(config: &Config, mode: Mode) -> Result<Box<dyn Backend>> {
    match mode {
        Mode::Ebpf => ebpf::open(config),
        Mode::Nftables => nftables::open(config),
        Mode::Userspace => userspace::open(config),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lacking(modes: &'static [Mode]) -> impl Fn(Mode) -> std::result::Result<(), String> {
        move |mode| if modes.contains(&mode) { Err(format!("{mode} feature")) } else { Ok(()) }
    }

    #[test]
    fn auto_takes_the_best_and_names_what_better_ones_lack() {
        let (choice, ()) = choose(ModeChoice::Auto, lacking(&[])).unwrap();
        assert_eq!((choice.mode, choice.reason.as_str()), (Mode::Ebpf, "the kernel has all it takes"));
        let (choice, ()) = choose(ModeChoice::Auto, lacking(&[Mode::Ebpf])).unwrap();
        assert_eq!((choice.mode, choice.reason.as_str()), (Mode::Nftables, "no ebpf: ebpf feature"));
        let (choice, ()) = choose(ModeChoice::Auto, lacking(&[Mode::Ebpf, Mode::Nftables])).unwrap();
        assert_eq!((choice.mode, choice.reason.as_str()), (Mode::Userspace, "no ebpf: ebpf feature; no nftables: nftables feature"));
    }

    #[test]
    fn a_mode_that_was_asked_for_is_not_replaced() {
        assert_eq!(choose(ModeChoice::Only(Mode::Userspace), lacking(&[])).unwrap().0.mode, Mode::Userspace);
        let error = choose(ModeChoice::Only(Mode::Nftables), lacking(&[Mode::Nftables])).unwrap_err();
        assert_eq!(error.to_string(), "nftables can't run here: nftables feature");
    }
}
