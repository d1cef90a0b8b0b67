//! The one loop under every controller: a queue of keys, each synced by one worker at a time, retried with back-off.
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::fmt::{Debug, Display};
use std::future::Future;
use std::hash::Hash;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::{debug, error, warn};

use crate::error::SyncError;

const FIRST_DELAY: Duration = Duration::from_millis(5);
const LAST_DELAY: Duration = Duration::from_secs(1000);

/// What can be queued.
pub trait Item: Clone + Eq + Hash + Ord + Debug + Send + Sync + 'static {}
impl<T: Clone + Eq + Hash + Ord + Debug + Send + Sync + 'static> Item for T {}

struct State<T> {
    ready: VecDeque<T>,
    /// Ready, or to become ready when its running sync ends.
    dirty: HashSet<T>,
    running: HashSet<T>,
    /// By due time; the number keeps equal times apart.
    delayed: BTreeMap<(Instant, u64), T>,
    due: HashMap<T, (Instant, u64)>,
    failures: HashMap<T, u32>,
    counter: u64,
}

impl<T: Item> State<T> {
    fn add(&mut self, item: T) {
        if self.dirty.insert(item.clone()) && !self.running.contains(&item) {
            self.ready.push_back(item);
        }
    }

    fn add_at(&mut self, item: T, at: Instant) {
        if let Some(place) = self.due.get(&item) {
            if place.0 <= at {
                return;
            }
            self.delayed.remove(place);
        }
        self.counter += 1;
        let place = (at, self.counter);
        self.delayed.insert(place, item.clone());
        self.due.insert(item, place);
    }

    /// Moves what is due to the ready end; the next due time.
    fn promote(&mut self, now: Instant) -> Option<Instant> {
        while let Some((&place, _)) = self.delayed.first_key_value() {
            if place.0 > now {
                return Some(place.0);
            }
            if let Some(item) = self.delayed.remove(&place) {
                self.due.remove(&item);
                self.add(item);
            }
        }
        None
    }

    fn take(&mut self) -> Option<T> {
        let item = self.ready.pop_front()?;
        self.dirty.remove(&item);
        self.running.insert(item.clone());
        Some(item)
    }

    fn done(&mut self, item: &T) {
        self.running.remove(item);
        if self.dirty.contains(item) {
            self.ready.push_back(item.clone());
        }
    }

    fn fail(&mut self, item: &T) -> Duration {
        let failures = self.failures.entry(item.clone()).or_default();
        let delay = FIRST_DELAY.saturating_mul(1u32.checked_shl(*failures).unwrap_or(u32::MAX)).min(LAST_DELAY);
        *failures = (*failures + 1).min(31);
        delay
    }
}

struct Inner<T> {
    state: Mutex<State<T>>,
    changed: Notify,
}

/// A queue without duplicates: an item that is added while it is being worked on is worked on once more.
pub struct Queue<T>(Arc<Inner<T>>);

impl<T> Clone for Queue<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T: Item> Default for Queue<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Item> Queue<T> {
    pub fn new() -> Self {
        let state = State {
            ready: VecDeque::new(),
            dirty: HashSet::new(),
            running: HashSet::new(),
            delayed: BTreeMap::new(),
            due: HashMap::new(),
            failures: HashMap::new(),
            counter: 0,
        };
        Self(Arc::new(Inner { state: Mutex::new(state), changed: Notify::new() }))
    }

    pub fn add(&self, item: T) {
        self.state().add(item);
        self.0.changed.notify_one();
    }

    /// An earlier time already set for the item stays.
    pub fn add_after(&self, item: T, delay: Duration) {
        if delay.is_zero() {
            return self.add(item);
        }
        self.state().add_at(item, Instant::now() + delay);
        self.0.changed.notify_one();
    }

    pub fn failures(&self, item: &T) -> u32 {
        self.state().failures.get(item).copied().unwrap_or(0)
    }

    async fn next(&self) -> T {
        loop {
            let (item, more, due) = {
                let mut state = self.state();
                let due = state.promote(Instant::now());
                let item = state.take();
                (item, !state.ready.is_empty(), due)
            };
            if let Some(item) = item {
                if more {
                    self.0.changed.notify_one();
                }
                return item;
            }
            match due {
                Some(due) => tokio::select! { () = self.0.changed.notified() => {}, () = tokio::time::sleep_until(due) => {} },
                None => self.0.changed.notified().await,
            }
        }
    }

    fn succeeded(&self, item: &T, again: Option<Duration>) {
        let mut state = self.state();
        state.failures.remove(item);
        if let Some(delay) = again {
            state.add_at(item.clone(), Instant::now() + delay);
        }
        state.done(item);
        drop(state);
        self.0.changed.notify_one();
    }

    fn failed(&self, item: &T) {
        let mut state = self.state();
        let delay = state.fail(item);
        state.add_at(item.clone(), Instant::now() + delay);
        state.done(item);
        drop(state);
        self.0.changed.notify_one();
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a sync returns: when to look again, if ever.
pub type Outcome = Result<Option<Duration>, SyncError>;

/// Works the queue off with `workers` at a time, for ever. A panic of one sync is that sync's failure.
pub async fn run<T, F, Fut>(controller: &'static str, queue: Queue<T>, workers: usize, sync: F)
where
    T: Item + Display,
    F: Fn(T) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Outcome> + Send + 'static,
{
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..workers {
        let (queue, sync) = (queue.clone(), sync.clone());
        tasks.spawn(async move {
            loop {
                let item = queue.next().await;
                let begun = Instant::now();
                let outcome = AssertUnwindSafe(async { sync(item.clone()).await }).catch_unwind().await;
                match outcome {
                    Ok(Ok(again)) => {
                        debug!(controller, %item, took = ?begun.elapsed(), "synced");
                        queue.succeeded(&item, again);
                    }
                    Ok(Err(problem)) => {
                        if problem.is_conflict() || problem.is_namespace_terminating() || problem.is_not_found() {
                            debug!(controller, %item, error = %problem.message(), "sync is tried again");
                        } else {
                            warn!(controller, %item, error = %problem.message(), "sync failed; it is tried again");
                        }
                        queue.failed(&item);
                    }
                    Err(_) => {
                        error!(controller, %item, "sync panicked; it is tried again");
                        queue.failed(&item);
                    }
                }
            }
        });
    }
    join_all(&mut tasks).await;
}

/// Waits until every task has ended; the panic of one is passed on at once, since without it the others only seem to work.
pub async fn join_all(tasks: &mut tokio::task::JoinSet<()>) {
    while let Some(outcome) = tasks.join_next().await {
        if let Err(error) = outcome
            && error.is_panic()
        {
            std::panic::resume_unwind(error.into_panic());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    #[should_panic(expected = "gone")]
    async fn the_panic_of_a_task_is_passed_on() {
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(async {});
        tasks.spawn(std::future::pending());
        tasks.spawn(async { panic!("gone") });
        join_all(&mut tasks).await;
    }

    #[tokio::test]
    async fn an_item_added_while_it_runs_runs_again_and_never_twice_at_once() {
        let queue = Queue::new();
        queue.add("a");
        queue.add("a");
        let item = queue.next().await;
        queue.add("a");
        assert!(queue.next().now_or_never().is_none(), "it is being worked on");
        queue.succeeded(&item, None);
        assert_eq!(queue.next().await, "a");
        queue.succeeded(&"a", None);
        assert!(queue.next().now_or_never().is_none());
    }

    #[test]
    fn the_earliest_of_several_delays_counts() {
        let queue = Queue::new();
        let mut state = queue.state();
        let begun = Instant::now();
        let second = |number| begun + Duration::from_secs(number);
        state.add_at("late", second(9));
        state.add_at("a", second(5));
        state.add_at("a", second(1));
        state.add_at("a", second(7));
        assert_eq!(state.promote(begun), Some(second(1)));
        assert_eq!(state.promote(second(1)), Some(second(9)));
        assert_eq!(state.take(), Some("a"));
        assert_eq!(state.promote(second(9)), None);
        assert_eq!(state.take(), Some("late"));
    }

    #[test]
    fn failures_wait_twice_as_long_each_time() {
        let queue = Queue::new();
        let mut state = queue.state();
        let delays: Vec<u64> = (0..20).map(|_| state.fail(&"a").as_millis() as u64).collect();
        assert_eq!(&delays[..4], [5, 10, 20, 40]);
        assert_eq!(delays[19], 1_000_000);
    }
}
