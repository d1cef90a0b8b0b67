//! Following a store: subscribers get commits through bounded queues; one that falls behind is cut off and catches up from history.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use futures::StreamExt;
use tokio::sync::mpsc;

use crate::{Event, Revision, StoreError, WatchBatch, WatchRequest, WatchStream};

/// Batches a subscriber may lag behind before it's sent back to history.
const QUEUE: usize = 256;
/// About how many changes one history read takes.
const HISTORY_CHUNK: usize = 512;

/// Events of the past, read from where the store keeps them.
pub(crate) trait History: Send + Sync + 'static {
    /// Events under `prefix` of the revisions `from..=to`, whole revisions, looking at about `max` changes; and the revision reached.
    fn events(&self, prefix: &str, from: Revision, to: Revision, max: usize) -> Result<(Vec<Event>, Revision), StoreError>;

    /// The newest revision that was compacted away.
    fn compacted(&self) -> Result<Revision, StoreError>;
}

/// Hands commits to subscribers, in revision order.
pub(crate) struct Hub {
    state: Mutex<State>,
}

struct State {
    /// The last published revision.
    revision: Revision,
    subscribers: Vec<Subscriber>,
    closed: bool,
}

struct Subscriber {
    prefix: String,
    queue: mpsc::Sender<WatchBatch>,
}

impl Hub {
    pub(crate) fn new(revision: Revision) -> Self {
        Self { state: Mutex::new(State { revision, subscribers: Vec::new(), closed: false }) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn revision(&self) -> Revision {
        self.state().revision
    }

    /// Announces a commit: its events in revision order, the last of them at `revision`.
    pub(crate) fn publish(&self, revision: Revision, events: &[Event]) {
        let mut state = self.state();
        state.revision = revision;
        state.subscribers.retain(|subscriber| {
            let events: Vec<Event> = events.iter().filter(|event| event.key().starts_with(&subscriber.prefix)).cloned().collect();
            if events.is_empty() {
                return !subscriber.queue.is_closed();
            }
            subscriber.queue.try_send(WatchBatch { revision, events }).is_ok()
        });
    }

    /// Sends every subscriber an empty batch at the present revision. One whose queue is full has batches to come anyway.
    pub(crate) fn progress(&self) {
        let mut state = self.state();
        let revision = state.revision;
        state.subscribers.retain(|subscriber| {
            !matches!(subscriber.queue.try_send(WatchBatch { revision, events: Vec::new() }), Err(mpsc::error::TrySendError::Closed(_)))
        });
    }

    pub(crate) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        state.subscribers.clear();
    }

    /// Queues everything after the returned revision. `None`: the store is closed.
    fn subscribe(&self, prefix: &str) -> Option<(Revision, mpsc::Receiver<WatchBatch>)> {
        let mut state = self.state();
        if state.closed {
            return None;
        }
        let (sender, receiver) = mpsc::channel(QUEUE);
        state.subscribers.push(Subscriber { prefix: prefix.to_owned(), queue: sender });
        Some((state.revision, receiver))
    }
}

/// Opens a watch: history first, then the live queue.
pub(crate) fn open<H: History>(history: &Arc<H>, hub: &Arc<Hub>, request: WatchRequest) -> Result<WatchStream, StoreError> {
    let (current, queue) = hub.subscribe(&request.prefix).ok_or(StoreError::Closed)?;
    let next = if request.from_revision == 0 { current + 1 } else { request.from_revision };
    let compacted = history.compacted()?;
    if next <= compacted {
        return Err(StoreError::Compacted { requested: next, compacted });
    }
    let follower = Follower {
        history: Arc::downgrade(history),
        hub: Arc::clone(hub),
        prefix: request.prefix,
        next,
        catch_up_to: Some(current),
        queue,
    };
    let stream = futures::stream::unfold(Some(follower), |state| async move {
        let mut follower = state?;
        match follower.step().await {
            Ok(batch) => Some((Ok(batch), Some(follower))),
            Err(error) => Some((Err(error), None)),
        }
    });
    Ok(stream.boxed())
}

/// One watch's position.
struct Follower<H> {
    /// Weak, so that an open watch doesn't keep the database open.
    history: Weak<H>,
    hub: Arc<Hub>,
    prefix: String,
    /// The first revision not delivered yet.
    next: Revision,
    /// Set while history has to be read.
    catch_up_to: Option<Revision>,
    queue: mpsc::Receiver<WatchBatch>,
}

impl<H: History> Follower<H> {
    async fn step(&mut self) -> Result<WatchBatch, StoreError> {
        loop {
            if let Some(to) = self.catch_up_to {
                if let Some(batch) = self.replay(to)? {
                    return Ok(batch);
                }
                continue;
            }
            match self.queue.recv().await {
                Some(mut batch) if batch.revision >= self.next || batch.events.is_empty() => {
                    batch.events.retain(|event| event.revision() >= self.next);
                    self.next = self.next.max(batch.revision + 1);
                    return Ok(batch);
                }
                // Already delivered from history, or before a start in the future.
                Some(_) => {}
                None => {
                    let (current, queue) = self.hub.subscribe(&self.prefix).ok_or(StoreError::Closed)?;
                    self.queue = queue;
                    self.catch_up_to = Some(current);
                }
            }
        }
    }

    fn replay(&mut self, to: Revision) -> Result<Option<WatchBatch>, StoreError> {
        if self.next > to {
            self.catch_up_to = None;
            return Ok(None);
        }
        let history = self.history.upgrade().ok_or(StoreError::Closed)?;
        let (events, reached) = history.events(&self.prefix, self.next, to, HISTORY_CHUNK)?;
        self.next = reached + 1;
        if events.is_empty() && reached < to {
            return Ok(None);
        }
        Ok(Some(WatchBatch { revision: reached, events }))
    }
}
