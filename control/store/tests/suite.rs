//! What every store must do, run over each implementation.

// Helpers of tests, which clippy tells from tests.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use outrigger_store::embedded::{self, EmbeddedConfig};
use outrigger_store::{
    Event, Expect, KeyValue, Op, RangeRequest, Revision, Store, StoreError, TxnOutcome, WatchBatch, WatchRequest, WatchStream,
    WriteOutcome, memory,
};

/// A store under test and what has to live as long.
struct Subject {
    store: Arc<dyn Store>,
    _folder: Option<tempfile::TempDir>,
}

fn in_memory() -> Subject {
    Subject { store: memory::open(), _folder: None }
}

fn on_disk() -> Subject {
    let folder = tempfile::tempdir().unwrap();
    let store = embedded::open(EmbeddedConfig::new(folder.path().join("store.redb"))).unwrap();
    Subject { store, _folder: Some(folder) }
}

macro_rules! suite {
    ($($case:ident),* $(,)?) => {
        mod memory_store {
            $(#[tokio::test] async fn $case() {
                let subject = super::in_memory();
                super::$case(subject.store.clone()).await;
            })*
        }
        mod embedded_store {
            $(#[tokio::test] async fn $case() {
                let subject = super::on_disk();
                super::$case(subject.store.clone()).await;
            })*
        }
    };
}

suite![
    revisions_count_changing_transactions,
    key_carries_its_history,
    failed_expectations_return_what_stands,
    delete_returns_what_was_there,
    deleted_key_starts_anew,
    transaction_is_all_or_nothing,
    transaction_refuses_a_key_twice,
    range_is_ordered_and_bounded_by_prefix,
    range_pages_at_one_revision,
    range_of_the_future_is_refused,
    old_snapshots_are_read_until_compacted,
    compaction_keeps_what_is_current,
    compaction_has_bounds,
    watch_follows_with_previous_values,
    watch_replays_history,
    watch_replays_more_than_one_chunk,
    watch_from_a_compacted_revision_is_refused,
    watch_waits_for_a_future_revision,
    watch_sees_only_its_prefix_but_progresses,
    slow_watch_misses_nothing,
    concurrent_writers_get_distinct_revisions,
    compare_and_swap_counts_right,
    expired_keys_are_deleted,
    rewriting_moves_or_ends_the_expiry,
];

fn value(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

async fn done(store: &dyn Store, op: Op) -> (Revision, Option<KeyValue>, Option<KeyValue>) {
    match store.write(op).await.unwrap() {
        WriteOutcome::Done { revision, written } => (revision, written.current, written.previous),
        WriteOutcome::Conflict { .. } => panic!("unexpected conflict"),
    }
}

async fn put(store: &dyn Store, key: &str, text: &str) -> Revision {
    done(store, Op::put(key, value(text))).await.0
}

async fn keys(store: &dyn Store, request: RangeRequest) -> Vec<String> {
    store.range(request).await.unwrap().kvs.iter().map(|kv| kv.key.to_string()).collect()
}

/// Takes batches until `count` events came.
async fn take(stream: &mut WatchStream, count: usize) -> Vec<Event> {
    let mut events = Vec::new();
    while events.len() < count {
        let batch = stream.next().await.expect("the watch goes on").unwrap();
        assert!(batch.events.iter().all(|event| event.revision() <= batch.revision), "batch goes beyond its revision");
        events.extend(batch.events);
    }
    assert!(events.is_sorted_by_key(Event::revision), "events out of order");
    events
}

async fn take_progress(stream: &mut WatchStream, revision: Revision) -> WatchBatch {
    loop {
        let batch = stream.next().await.expect("the watch goes on").unwrap();
        if batch.revision >= revision {
            return batch;
        }
    }
}

async fn revisions_count_changing_transactions(store: Arc<dyn Store>) {
    let start = store.revision().await.unwrap();
    assert_eq!(put(&*store, "/a", "1").await, start + 1);
    assert_eq!(put(&*store, "/a", "1").await, start + 2);
    let (revision, ..) = done(&*store, Op::delete("/missing", Expect::Any)).await;
    assert_eq!(revision, start + 2, "deleting nothing changes nothing");
    assert_eq!(store.revision().await.unwrap(), start + 2);
}

async fn key_carries_its_history(store: Arc<dyn Store>) {
    let created = put(&*store, "/a", "1").await;
    put(&*store, "/b", "x").await;
    let updated = put(&*store, "/a", "2").await;
    let (kv, revision) = store.get("/a").await.unwrap();
    let kv = kv.unwrap();
    assert_eq!((kv.create_revision, kv.mod_revision, kv.version, &*kv.value), (created, updated, 2, &b"2"[..]));
    assert_eq!(revision, updated);
}

async fn failed_expectations_return_what_stands(store: Arc<dyn Store>) {
    let stands = put(&*store, "/a", "1").await;
    let cases = [
        (Op::create("/a", value("2")), Some(stands)),
        (Op::update("/a", value("2"), stands - 1), Some(stands)),
        (Op::update("/none", value("2"), stands), None),
        (Op::delete("/a", Expect::ModRevision(stands + 7)), Some(stands)),
        (Op::delete("/none", Expect::ModRevision(stands)), None),
    ];
    for (op, expected) in cases {
        let text = format!("{op:?}");
        let WriteOutcome::Conflict { current, revision } = store.write(op).await.unwrap() else { panic!("{text} went through") };
        assert_eq!(current.map(|kv| kv.mod_revision), expected, "{text}");
        assert_eq!(revision, stands, "{text}");
    }
    done(&*store, Op::update("/a", value("2"), stands)).await;
    done(&*store, Op::create("/none", value("2"))).await;
}

async fn delete_returns_what_was_there(store: Arc<dyn Store>) {
    let written = put(&*store, "/a", "1").await;
    let (revision, current, previous) = done(&*store, Op::delete("/a", Expect::ModRevision(written))).await;
    assert_eq!(revision, written + 1);
    assert_eq!(current, None);
    assert_eq!(previous.unwrap().value, value("1"));
    assert_eq!(store.get("/a").await.unwrap().0, None);
}

async fn deleted_key_starts_anew(store: Arc<dyn Store>) {
    put(&*store, "/a", "1").await;
    done(&*store, Op::delete("/a", Expect::Any)).await;
    let (revision, current, previous) = done(&*store, Op::create("/a", value("2"))).await;
    let kv = current.unwrap();
    assert_eq!((kv.create_revision, kv.mod_revision, kv.version), (revision, revision, 1));
    assert_eq!(previous, None);
}

async fn transaction_is_all_or_nothing(store: Arc<dyn Store>) {
    let before = put(&*store, "/a", "1").await;
    let refused = store.txn(vec![Op::put("/b", value("1")), Op::create("/a", value("2"))]).await.unwrap();
    assert!(matches!(refused, TxnOutcome::Conflict { index: 1, .. }), "{refused:?}");
    assert_eq!(store.get("/b").await.unwrap(), (None, before));
    let mut watch = store.watch(WatchRequest::new("/", before + 1)).await.unwrap();
    let ops = vec![Op::put("/b", value("1")), Op::delete("/a", Expect::ModRevision(before)), Op::create("/c", value("1"))];
    let TxnOutcome::Done { revision, results } = store.txn(ops).await.unwrap() else { panic!("conflict") };
    assert_eq!((revision, results.len()), (before + 1, 3));
    let batch = watch.next().await.unwrap().unwrap();
    let seen: Vec<(&str, Revision)> = batch.events.iter().map(|event| (&**event.key(), event.revision())).collect();
    assert_eq!(seen, [("/b", revision), ("/a", revision), ("/c", revision)]);
}

async fn transaction_refuses_a_key_twice(store: Arc<dyn Store>) {
    let refused = store.txn(vec![Op::put("/a", value("1")), Op::delete("/a", Expect::Any)]).await;
    assert!(matches!(refused, Err(StoreError::DuplicateKey(key)) if key == "/a"));
}

async fn range_is_ordered_and_bounded_by_prefix(store: Arc<dyn Store>) {
    for key in ["/pods/b", "/pods/a/x", "/podsx", "/pods", "/pods/c", "/poda"] {
        put(&*store, key, "1").await;
    }
    assert_eq!(keys(&*store, RangeRequest::prefix("/pods/")).await, ["/pods/a/x", "/pods/b", "/pods/c"]);
    assert_eq!(keys(&*store, RangeRequest::key("/pods")).await, ["/pods"]);
    let before = RangeRequest { start: "/pods/".into(), end: outrigger_store::RangeEnd::Before("/pods/c".into()), ..Default::default() };
    assert_eq!(keys(&*store, before).await, ["/pods/a/x", "/pods/b"]);
    let counted = store.range(RangeRequest::prefix("/pods/").count_only()).await.unwrap();
    assert_eq!((counted.count, counted.kvs.len(), counted.more), (3, 0, false));
}

async fn range_pages_at_one_revision(store: Arc<dyn Store>) {
    for number in 0..5 {
        put(&*store, &format!("/k/{number}"), "1").await;
    }
    let first = store.range(RangeRequest::prefix("/k/").limit(2)).await.unwrap();
    assert_eq!((first.kvs.len(), first.more, first.count), (2, true, 5));
    done(&*store, Op::delete("/k/3", Expect::Any)).await;
    put(&*store, "/k/2a", "1").await;
    let next = format!("{}\0", first.kvs[1].key);
    let second = store.range(RangeRequest::continued("/k/", next).at(first.revision)).await.unwrap();
    let names: Vec<&str> = second.kvs.iter().map(|kv| &*kv.key).collect();
    assert_eq!((names, second.more, second.revision), (vec!["/k/2", "/k/3", "/k/4"], false, first.revision));
}

async fn range_of_the_future_is_refused(store: Arc<dyn Store>) {
    let current = put(&*store, "/a", "1").await;
    let refused = store.range(RangeRequest::prefix("/").at(current + 1)).await;
    assert!(matches!(refused, Err(StoreError::FutureRevision { requested, .. }) if requested == current + 1));
}

async fn old_snapshots_are_read_until_compacted(store: Arc<dyn Store>) {
    let first = put(&*store, "/a", "1").await;
    put(&*store, "/b", "1").await;
    let third = put(&*store, "/a", "2").await;
    done(&*store, Op::delete("/b", Expect::Any)).await;
    let old = store.range(RangeRequest::key("/a").at(first)).await.unwrap();
    assert_eq!(old.kvs[0].value, value("1"));
    assert_eq!(keys(&*store, RangeRequest::prefix("/").at(first)).await, ["/a"]);
    assert_eq!(keys(&*store, RangeRequest::prefix("/").at(third)).await, ["/a", "/b"]);
    assert_eq!(keys(&*store, RangeRequest::prefix("/")).await, ["/a"]);
    store.compact(third).await.unwrap();
    let refused = store.range(RangeRequest::prefix("/").at(first)).await;
    assert!(matches!(refused, Err(StoreError::Compacted { .. })), "{refused:?}");
    assert_eq!(keys(&*store, RangeRequest::prefix("/").at(third)).await, ["/a", "/b"]);
}

async fn compaction_keeps_what_is_current(store: Arc<dyn Store>) {
    for number in 0..30 {
        put(&*store, &format!("/k/{}", number % 3), &number.to_string()).await;
    }
    done(&*store, Op::delete("/k/1", Expect::Any)).await;
    let last = store.revision().await.unwrap();
    store.compact(last).await.unwrap();
    let all = store.range(RangeRequest::prefix("/k/")).await.unwrap();
    let found: Vec<(&str, &[u8], u64)> = all.kvs.iter().map(|kv| (&*kv.key, &*kv.value, kv.version)).collect();
    assert_eq!(found, [("/k/0", &b"27"[..], 10), ("/k/2", &b"29"[..], 10)]);
    // Written on as if nothing had happened.
    let (_, current, previous) = done(&*store, Op::put("/k/2", value("x"))).await;
    assert_eq!((current.unwrap().version, previous.unwrap().version), (11, 10));
    let (_, current, _) = done(&*store, Op::create("/k/1", value("x"))).await;
    assert_eq!(current.unwrap().version, 1);
}

async fn compaction_has_bounds(store: Arc<dyn Store>) {
    let last = put(&*store, "/a", "1").await;
    assert!(matches!(store.compact(last + 1).await, Err(StoreError::FutureRevision { .. })));
    store.compact(last).await.unwrap();
    assert!(matches!(store.compact(last).await, Err(StoreError::Compacted { .. })));
}

async fn watch_follows_with_previous_values(store: Arc<dyn Store>) {
    let mut watch = store.watch(WatchRequest::new("/a", 0)).await.unwrap();
    put(&*store, "/a", "1").await;
    put(&*store, "/a", "2").await;
    done(&*store, Op::delete("/a", Expect::Any)).await;
    let events = take(&mut watch, 3).await;
    let previous: Vec<Option<&[u8]>> = events.iter().map(|event| event.previous().map(|kv| &*kv.value)).collect();
    assert_eq!(previous, [None, Some(&b"1"[..]), Some(&b"2"[..])]);
    assert!(matches!(&events[1], Event::Put { kv, .. } if *kv.value == *b"2"));
    assert!(matches!(&events[2], Event::Delete { key, .. } if **key == *"/a"));
}

async fn watch_replays_history(store: Arc<dyn Store>) {
    put(&*store, "/a", "1").await;
    let from = put(&*store, "/a", "2").await;
    done(&*store, Op::delete("/a", Expect::Any)).await;
    put(&*store, "/a", "3").await;
    let mut watch = store.watch(WatchRequest::new("/a", from)).await.unwrap();
    put(&*store, "/a", "4").await;
    let events = take(&mut watch, 4).await;
    let revisions: Vec<Revision> = events.iter().map(Event::revision).collect();
    assert_eq!(revisions, [from, from + 1, from + 2, from + 3]);
    let previous: Vec<Option<&[u8]>> = events.iter().map(|event| event.previous().map(|kv| &*kv.value)).collect();
    assert_eq!(previous, [Some(&b"1"[..]), Some(&b"2"[..]), None, Some(&b"3"[..])]);
}

async fn watch_replays_more_than_one_chunk(store: Arc<dyn Store>) {
    let start = store.revision().await.unwrap();
    let mut expected = Vec::new();
    for group in 0..40 {
        let ops = (0..50).map(|number| Op::put(format!("/k/{group}-{number}"), value("1"))).collect();
        let TxnOutcome::Done { revision, .. } = store.txn(ops).await.unwrap() else { panic!("conflict") };
        expected.extend(std::iter::repeat_n(revision, 50));
    }
    let mut watch = store.watch(WatchRequest::new("/k/", start + 1)).await.unwrap();
    let mut seen = Vec::new();
    while seen.len() < expected.len() {
        let batch = watch.next().await.unwrap().unwrap();
        assert_eq!(batch.events.len() % 50, 0, "a revision was torn apart");
        seen.extend(batch.events.iter().map(Event::revision));
    }
    assert_eq!(seen, expected);
}

async fn watch_from_a_compacted_revision_is_refused(store: Arc<dyn Store>) {
    let first = put(&*store, "/a", "1").await;
    put(&*store, "/a", "2").await;
    let last = put(&*store, "/a", "3").await;
    store.compact(last).await.unwrap();
    let refused = store.watch(WatchRequest::new("/", first)).await.err();
    assert!(matches!(refused, Some(StoreError::Compacted { .. })), "{refused:?}");
    let mut watch = store.watch(WatchRequest::new("/", last + 1)).await.unwrap();
    put(&*store, "/a", "4").await;
    assert_eq!(take(&mut watch, 1).await[0].previous().unwrap().value, value("3"));
}

async fn watch_waits_for_a_future_revision(store: Arc<dyn Store>) {
    let current = put(&*store, "/a", "1").await;
    let mut watch = store.watch(WatchRequest::new("/a", current + 3)).await.unwrap();
    for text in ["2", "3", "4"] {
        put(&*store, "/a", text).await;
    }
    assert_eq!(take(&mut watch, 1).await[0].revision(), current + 3);
}

async fn watch_sees_only_its_prefix_but_progresses(store: Arc<dyn Store>) {
    let mut watch = store.watch(WatchRequest::new("/a/", 0)).await.unwrap();
    put(&*store, "/b/1", "1").await;
    let last = put(&*store, "/a", "1").await;
    store.request_progress().await.unwrap();
    let batch = take_progress(&mut watch, last).await;
    assert_eq!(batch, WatchBatch { revision: last, events: Vec::new() });
    let mine = put(&*store, "/a/1", "1").await;
    assert_eq!(take(&mut watch, 1).await[0].revision(), mine);
}

async fn slow_watch_misses_nothing(store: Arc<dyn Store>) {
    let start = store.revision().await.unwrap();
    let mut watch = store.watch(WatchRequest::new("/k", start + 1)).await.unwrap();
    // More than any queue holds, before the first read.
    let writers: Vec<_> = (0..1000)
        .map(|number| {
            let store = Arc::clone(&store);
            tokio::spawn(async move { put(&*store, &format!("/k/{}", number % 7), "1").await })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    let revisions: Vec<Revision> = take(&mut watch, 1000).await.iter().map(Event::revision).collect();
    assert_eq!(revisions, (start + 1..=start + 1000).collect::<Vec<_>>());
    let next = put(&*store, "/k", "live again").await;
    assert_eq!(take(&mut watch, 1).await[0].revision(), next);
}

async fn concurrent_writers_get_distinct_revisions(store: Arc<dyn Store>) {
    let start = store.revision().await.unwrap();
    let writers: Vec<_> = (0..200)
        .map(|number| {
            let store = Arc::clone(&store);
            tokio::spawn(async move { put(&*store, &format!("/k/{number}"), "1").await })
        })
        .collect();
    let mut revisions = Vec::new();
    for writer in writers {
        revisions.push(writer.await.unwrap());
    }
    revisions.sort_unstable();
    assert_eq!(revisions, (start + 1..=start + 200).collect::<Vec<_>>());
}

async fn compare_and_swap_counts_right(store: Arc<dyn Store>) {
    done(&*store, Op::create("/n", value("0"))).await;
    let add = |store: Arc<dyn Store>| async move {
        for _ in 0..20 {
            let mut kv = store.get("/n").await.unwrap().0;
            loop {
                let now = kv.expect("the counter stands");
                let number: u64 = std::str::from_utf8(&now.value).unwrap().parse().unwrap();
                match store.write(Op::update("/n", value(&(number + 1).to_string()), now.mod_revision)).await.unwrap() {
                    WriteOutcome::Done { .. } => break,
                    WriteOutcome::Conflict { current, .. } => kv = current,
                }
            }
        }
    };
    let adders: Vec<_> = (0..5).map(|_| tokio::spawn(add(Arc::clone(&store)))).collect();
    for adder in adders {
        adder.await.unwrap();
    }
    assert_eq!(store.get("/n").await.unwrap().0.unwrap().value, value("100"));
}

async fn expired_keys_are_deleted(store: Arc<dyn Store>) {
    let mut watch = store.watch(WatchRequest::new("/e", 0)).await.unwrap();
    let ttl = Some(Duration::from_secs(1));
    let put = done(&*store, Op::put("/e/1", value("1")).expiring(ttl)).await.0;
    done(&*store, Op::put("/e/2", value("1"))).await;
    let events = take(&mut watch, 3).await;
    let Event::Delete { key, revision, previous } = &events[2] else { panic!("{events:?}") };
    assert_eq!((&**key, *revision, previous.as_ref().unwrap().mod_revision), ("/e/1", put + 2, put));
    assert_eq!(keys(&*store, RangeRequest::prefix("/e/")).await, ["/e/2"]);
}

async fn rewriting_moves_or_ends_the_expiry(store: Arc<dyn Store>) {
    let mut watch = store.watch(WatchRequest::new("/e", 0)).await.unwrap();
    let ttl = Some(Duration::from_secs(2));
    done(&*store, Op::put("/e/kept", value("1")).expiring(ttl)).await;
    done(&*store, Op::put("/e/kept", value("2"))).await;
    done(&*store, Op::put("/e/moved", value("1")).expiring(ttl)).await;
    done(&*store, Op::put("/e/moved", value("2")).expiring(Some(Duration::from_secs(3600)))).await;
    done(&*store, Op::put("/e/gone", value("1")).expiring(ttl)).await;
    let events = take(&mut watch, 6).await;
    assert_eq!(&**events[5].key(), "/e/gone", "the only one whose time came");
    assert_eq!(keys(&*store, RangeRequest::prefix("/e/")).await, ["/e/kept", "/e/moved"]);
}
