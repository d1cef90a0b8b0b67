//! Pods that wait for a node: ready to be tried, waiting after a failure, or set aside until something changes.
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use outrigger_controllers::objects::Key;
use tokio::time::Instant;

use crate::snapshot::PodInfo;

const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const LAST_BACKOFF: Duration = Duration::from_secs(10);
/// After this long a pod is tried again though nothing seems to have changed.
const PATIENCE: Duration = Duration::from_secs(300);

/// Most important first, then longest waiting.
type Order = (Reverse<i32>, Instant, u64);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Active(Order),
    Backoff(Instant, u64),
    Aside {
        concern: u16,
        since: Instant,
    },
    /// Popped, and not yet decided on.
    Running {
        since: u64,
        changed: bool,
    },
}

#[derive(Debug)]
struct Entry {
    pod: Arc<PodInfo>,
    attempts: u32,
    added: Instant,
    place: Place,
}

#[derive(Debug, Default)]
pub struct Waiting {
    entries: HashMap<Key, Entry>,
    active: BTreeMap<Order, Key>,
    backoff: BTreeSet<(Instant, u64, Key)>,
    counter: u64,
    /// Per concern bit, the counter at which something last changed.
    changes: [u64; 16],
}

impl Waiting {
    fn tick(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    /// A pod that is new, or has been changed by its owner in a way that could matter.
    pub fn add(&mut self, pod: Arc<PodInfo>, now: Instant) {
        let key = pod.key();
        if let Some(entry) = self.entries.get_mut(&key)
            && entry.pod.uid() == pod.uid()
        {
            entry.pod = pod;
            return match &mut entry.place {
                Place::Running { changed, .. } => *changed = true,
                Place::Aside { .. } => self.activate(&key, now),
                Place::Active(_) | Place::Backoff(..) => {}
            };
        }
        self.remove(&key);
        self.entries.insert(key.clone(), Entry { pod, attempts: 0, added: now, place: Place::Aside { concern: 0, since: now } });
        self.activate(&key, now);
    }

    /// Newer state of a pod, of no interest for where it can go.
    pub fn refresh(&mut self, pod: Arc<PodInfo>) {
        if let Some(entry) = self.entries.get_mut(&pod.key())
            && entry.pod.uid() == pod.uid()
        {
            entry.pod = pod;
        }
    }

    pub fn contains(&self, key: &Key) -> bool {
        self.entries.contains_key(key)
    }

    pub fn remove(&mut self, key: &Key) {
        if let Some(entry) = self.entries.remove(key) {
            self.leave(key, &entry.place);
        }
    }

    fn leave(&mut self, key: &Key, place: &Place) {
        match place {
            Place::Active(order) => drop(self.active.remove(order)),
            Place::Backoff(at, number) => drop(self.backoff.remove(&(*at, *number, key.clone()))),
            Place::Aside { .. } | Place::Running { .. } => {}
        }
    }

    fn put(&mut self, key: &Key, place: Place) {
        let Some(entry) = self.entries.get_mut(key) else { return };
        let old = std::mem::replace(&mut entry.place, place.clone());
        self.leave(key, &old);
        match place {
            Place::Active(order) => drop(self.active.insert(order, key.clone())),
            Place::Backoff(at, number) => drop(self.backoff.insert((at, number, key.clone()))),
            Place::Aside { .. } | Place::Running { .. } => {}
        }
    }

    fn activate(&mut self, key: &Key, _now: Instant) {
        let number = self.tick();
        if let Some(entry) = self.entries.get(key) {
            let order = (Reverse(entry.pod.priority()), entry.added, number);
            self.put(key, Place::Active(order));
        }
    }

    /// The next pod to try; it stays known until it is assigned, removed or fails.
    pub fn pop(&mut self, now: Instant) -> Option<Arc<PodInfo>> {
        self.wake(now);
        let (_, key) = self.active.pop_first()?;
        let since = self.tick();
        let entry = self.entries.get_mut(&key)?;
        entry.attempts += 1;
        entry.place = Place::Running { since, changed: false };
        Some(entry.pod.clone())
    }

    /// When the next pod's back-off ends.
    pub fn next_due(&self) -> Option<Instant> {
        self.backoff.first().map(|(at, ..)| *at)
    }

    fn wake(&mut self, now: Instant) {
        while let Some((at, _, key)) = self.backoff.first().cloned() {
            if at > now {
                break;
            }
            self.activate(&key, now);
        }
    }

    /// The cycle failed. If what it failed for has changed meanwhile, it is tried again after its back-off;
    /// else it waits for a change.
    pub fn fail(&mut self, key: &Key, concern: u16, now: Instant) {
        let Some(entry) = self.entries.get(key) else { return };
        let missed = match entry.place {
            Place::Running { since, changed } => changed || (0..16).any(|bit| concern & (1 << bit) != 0 && self.changes[bit] > since),
            _ => return,
        };
        if missed { self.back_off(key, now) } else { self.put(key, Place::Aside { concern, since: now }) }
    }

    /// The cycle failed for a reason that isn't the pod's: try again after the back-off.
    pub fn retry(&mut self, key: &Key, now: Instant) {
        self.back_off(key, now);
    }

    fn back_off(&mut self, key: &Key, now: Instant) {
        let number = self.tick();
        let Some(entry) = self.entries.get(key) else { return };
        let doublings = entry.attempts.saturating_sub(1).min(10);
        let delay = FIRST_BACKOFF.saturating_mul(1 << doublings).min(LAST_BACKOFF);
        self.put(key, Place::Backoff(now + delay, number));
    }

    /// Something changed in the cluster; whoever failed for that is tried again.
    pub fn changed(&mut self, concern: u16, now: Instant) {
        let number = self.tick();
        for bit in 0..16 {
            if concern & (1 << bit) != 0 {
                self.changes[bit] = number;
            }
        }
        let helped: Vec<(Key, Instant)> = self
            .entries
            .iter()
            .filter_map(|(key, entry)| match entry.place {
                Place::Aside { concern: failed, since } if failed & concern != 0 => Some((key.clone(), since)),
                _ => None,
            })
            .collect();
        for (key, since) in helped {
            self.after_aside(&key, since, now);
        }
    }

    /// What is left of the back-off since the failure still counts.
    fn after_aside(&mut self, key: &Key, since: Instant, now: Instant) {
        self.back_off(key, since);
        if self.next_due().is_some_and(|due| due <= now) {
            self.wake(now);
        }
    }

    /// Tries those again that have been set aside for long.
    pub fn flush(&mut self, now: Instant) {
        let old: Vec<(Key, Instant)> = self
            .entries
            .iter()
            .filter_map(|(key, entry)| match entry.place {
                Place::Aside { since, .. } if now.duration_since(since) > PATIENCE => Some((key.clone(), since)),
                _ => None,
            })
            .collect();
        for (key, since) in old {
            self.after_aside(&key, since, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{Pod, PodSpec};

    use super::*;

    fn pod(title: &str, priority: i32) -> Arc<PodInfo> {
        let mut pod = Pod { spec: Some(PodSpec { priority: Some(priority), ..Default::default() }), ..Default::default() };
        pod.metadata.name = Some(title.into());
        pod.metadata.uid = Some(title.into());
        Arc::new(PodInfo::new(Arc::new(pod)))
    }

    fn titles(waiting: &mut Waiting, now: Instant) -> Vec<String> {
        std::iter::from_fn(|| waiting.pop(now)).map(|pod| pod.key().name).collect()
    }

    #[test]
    fn important_pods_go_first() {
        let now = Instant::now();
        let mut waiting = Waiting::default();
        for (title, priority) in [("a", 0), ("b", 10), ("c", 0)] {
            waiting.add(pod(title, priority), now);
        }
        assert_eq!(titles(&mut waiting, now), ["b", "a", "c"]);
    }

    #[test]
    fn a_failed_pod_waits_for_a_change_that_concerns_it_and_for_its_back_off() {
        let now = Instant::now();
        let second = |number| now + Duration::from_secs(number);
        let mut waiting = Waiting::default();
        waiting.add(pod("a", 0), now);
        waiting.pop(now);
        waiting.fail(&Key::new("", "a"), 2, now);
        waiting.changed(4, second(5));
        assert!(waiting.pop(second(5)).is_none(), "that was about something else");
        waiting.changed(2, second(5));
        assert_eq!(titles(&mut waiting, second(5)), ["a"], "the back-off is over");
        waiting.fail(&Key::new("", "a"), 2, second(5));
        waiting.changed(2, second(6));
        assert!(waiting.pop(second(6)).is_none(), "two seconds after the second failure");
        assert_eq!(titles(&mut waiting, second(7)), ["a"]);
    }

    #[test]
    fn a_change_during_the_cycle_isnt_missed() {
        let now = Instant::now();
        let mut waiting = Waiting::default();
        waiting.add(pod("a", 0), now);
        waiting.pop(now);
        waiting.changed(2, now);
        waiting.fail(&Key::new("", "a"), 2, now);
        assert_eq!(waiting.next_due(), Some(now + FIRST_BACKOFF));
        waiting.add(pod("b", 0), now);
        waiting.pop(now);
        waiting.fail(&Key::new("", "b"), 2, now);
        waiting.flush(now + PATIENCE + Duration::from_secs(1));
        assert_eq!(titles(&mut waiting, now + PATIENCE + Duration::from_secs(1)).len(), 2);
    }
}
