//! Whether the programs have flows to look for: they write it when they make one, and only the agent sees that none is left.
use std::io;
use std::num::NonZeroUsize;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use outrigger_abi::activity::{DOUBTED, KINDS, NONE, SOME};

use super::sys;
use crate::backend::{BackendError, Result};

/// The map `activity`, shared with the programs word by word. A write through `bpf(2)` could undo what a program has written between the
/// agent's look and its write.
pub struct Activity {
    page: NonNull<libc::c_void>,
}

/// The kernel maps whole pages.
const LENGTH: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

// SAFETY: the page is only read and written as atomic words, and unmapped when the owner is dropped.
unsafe impl Send for Activity {}
// SAFETY: as above.
unsafe impl Sync for Activity {}

impl Activity {
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("activity");
        let what = |error| BackendError::kernel(format!("open the map {}", path.display()), error);
        let fd = sys::get_pinned(&path).map_err(what)?;
        // SAFETY: a new mapping of its own; the kernel checks that the map has such a page.
        let page = unsafe { mmap(None, LENGTH, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, &fd, 0) };
        page.map(|page| Self { page }).map_err(|error| what(io::Error::from(error)))
    }

    fn words(&self) -> &[AtomicU32] {
        // SAFETY: elements of an array map lie 8 bytes apart from the page's beginning, and the page lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.page.as_ptr().cast(), KINDS as usize * 2) }
    }

    fn kinds(&self) -> impl Iterator<Item = (u32, &AtomicU32)> {
        (0..KINDS).zip(self.words().iter().step_by(2))
    }

    /// From now on a kind counts as used only if the programs make a flow of it, or if one is found.
    pub fn doubt(&self) {
        for (_, state) in self.kinds() {
            let _ = state.compare_exchange(SOME, DOUBTED, Ordering::SeqCst, Ordering::SeqCst);
        }
    }

    /// Ends the doubt. `is_used` says of which kinds flows were found since it began.
    pub fn settle(&self, is_used: impl Fn(u32) -> bool) {
        for (kind, state) in self.kinds() {
            let found = if is_used(kind) { SOME } else { NONE };
            let _ = state.compare_exchange(DOUBTED, found, Ordering::SeqCst, Ordering::SeqCst);
        }
    }
}

impl Drop for Activity {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `open` made, and nobody borrows it any more.
        let _ = unsafe { munmap(self.page, LENGTH.get()) };
    }
}
