//! Growing pauses per key: 10 s doubled up to 300 s, forgotten after a quiet time of twice the longest pause.
use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use jiff::Timestamp;

pub const FIRST: Duration = Duration::from_secs(10);
pub const LAST: Duration = Duration::from_secs(300);

#[derive(Clone, Copy, Debug)]
struct Entry {
    pause: Duration,
    updated: Timestamp,
}

/// Pauses by key (pod UID first, so that a pod's keys can be dropped together).
#[derive(Debug, Default)]
pub struct Backoff {
    entries: Mutex<HashMap<(String, String), Entry>>,
}

fn since(now: Timestamp, then: Timestamp) -> Duration {
    Duration::try_from(now.duration_since(then)).unwrap_or(Duration::ZERO)
}

impl Backoff {
    fn entries(&self) -> std::sync::MutexGuard<'_, HashMap<(String, String), Entry>> {
        self.entries.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// How long the pause that began at `event` still lasts, and its full length.
    pub fn remaining(&self, uid: &str, key: &str, event: Timestamp, now: Timestamp) -> Option<(Duration, Duration)> {
        let entry = self.entries().get(&(uid.to_owned(), key.to_owned())).copied()?;
        if since(event, entry.updated) > LAST * 2 {
            return None;
        }
        let passed = since(now, event);
        (passed < entry.pause).then(|| (entry.pause - passed, entry.pause))
    }

    /// As [`Backoff::remaining`], counted from the last [`Backoff::advance`].
    pub fn remaining_since_advance(&self, uid: &str, key: &str, now: Timestamp) -> Option<(Duration, Duration)> {
        let entry = self.entries().get(&(uid.to_owned(), key.to_owned())).copied()?;
        let passed = since(now, entry.updated);
        (passed < entry.pause).then(|| (entry.pause - passed, entry.pause))
    }

    /// Takes the next pause for the key; `event` is what happened, `now` when it's acted on.
    pub fn advance(&self, uid: &str, key: &str, event: Timestamp, now: Timestamp) -> Duration {
        let mut entries = self.entries();
        let entry = entries.entry((uid.to_owned(), key.to_owned())).or_insert(Entry { pause: Duration::ZERO, updated: now });
        entry.pause = match entry.pause {
            Duration::ZERO => FIRST,
            _ if since(event, entry.updated) > LAST * 2 => FIRST,
            pause => (pause * 2).min(LAST),
        };
        entry.updated = now;
        entry.pause
    }

    pub fn reset(&self, uid: &str, key: &str) {
        self.entries().remove(&(uid.to_owned(), key.to_owned()));
    }

    pub fn forget_pod(&self, uid: &str) {
        self.entries().retain(|(pod, _), _| pod != uid);
    }
}

/// A duration the way Go prints whole seconds: `10s`, `2m40s`, `5m0s`.
pub fn go_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds}s"),
        (0, minutes, seconds) => format!("{minutes}m{seconds}s"),
        (hours, minutes, seconds) => format!("{hours}h{minutes}m{seconds}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    #[test]
    fn pauses_double_and_end() {
        let backoff = Backoff::default();
        assert_eq!(backoff.remaining("u", "c", at(0), at(0)), None);
        let pauses: Vec<u64> = (0..7).map(|_| backoff.advance("u", "c", at(0), at(0)).as_secs()).collect();
        assert_eq!(pauses, [10, 20, 40, 80, 160, 300, 300]);
        assert_eq!(backoff.remaining("u", "c", at(0), at(100)).map(|(left, _)| left.as_secs()), Some(200));
        assert_eq!(backoff.remaining("u", "c", at(0), at(300)), None);
    }

    #[test]
    fn a_long_run_starts_over() {
        let backoff = Backoff::default();
        backoff.advance("u", "c", at(0), at(0));
        backoff.advance("u", "c", at(0), at(0));
        assert_eq!(backoff.advance("u", "c", at(700), at(700)).as_secs(), 10);
    }

    #[test]
    fn durations_print_as_in_go() {
        for (seconds, text) in [(10, "10s"), (80, "1m20s"), (300, "5m0s"), (3600, "1h0m0s")] {
            assert_eq!(go_duration(Duration::from_secs(seconds)), text);
        }
    }
}
