//! Work on a pod's files and cgroups that goes on although whoever asked for it was given up: it has to end before they are taken away.
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};

use tokio::sync::{OwnedRwLockWriteGuard, RwLock};

/// One lock per pod: shared by those who write, alone for whoever takes away.
#[derive(Default)]
pub struct InFlight(Mutex<HashMap<String, Arc<RwLock<()>>>>);

impl InFlight {
    fn lock_of(&self, uid: &str) -> Arc<RwLock<()>> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).entry(uid.to_owned()).or_default().clone()
    }

    /// Does the work on a thread that may block. Dropping the future doesn't end it, but [`quiet`](Self::quiet) waits for it.
    pub async fn run<T: Send + 'static>(&self, uid: &str, work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
        let guard = self.lock_of(uid).read_owned().await;
        let done = tokio::task::spawn_blocking(move || {
            let _guard = guard;
            work()
        });
        done.await.map_err(io::Error::other)?
    }

    /// Resolves once nobody works on the pod any more, and keeps others off while the guard lives.
    pub async fn quiet(&self, uid: &str) -> OwnedRwLockWriteGuard<()> {
        self.lock_of(uid).write_owned().await
    }

    pub fn forget(&self, uid: &str) {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).remove(uid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn taking_away_waits_for_work_that_was_given_up() {
        let in_flight = InFlight::default();
        let (begun, wait_begun) = std::sync::mpsc::channel();
        let (release, released) = std::sync::mpsc::channel::<()>();
        let file = tempfile::tempdir().unwrap().keep().join("f");
        let target = file.clone();
        let mut work = Box::pin(in_flight.run("uid", move || {
            begun.send(()).map_err(io::Error::other)?;
            released.recv().map_err(io::Error::other)?;
            std::fs::write(target, "x")
        }));
        assert!(futures::poll!(&mut work).is_pending());
        wait_begun.recv().unwrap();
        drop(work);
        let mut quiet = Box::pin(in_flight.quiet("uid"));
        assert!(futures::poll!(&mut quiet).is_pending());
        release.send(()).unwrap();
        quiet.await;
        assert!(file.exists());
        std::fs::remove_dir_all(file.parent().unwrap()).unwrap();
    }
}
