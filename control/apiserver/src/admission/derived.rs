//! What is made of all objects of a kind, kept until one of them changes: configuration that every request is checked against.

use std::sync::{Arc, Mutex};

use serde_json::Value;

use crate::engine::Engine;

pub struct Derived<T> {
    /// Storage prefix of the kind.
    prefix: &'static str,
    make: fn(&[Value]) -> T,
    /// With the revision of the kind's last change.
    kept: Mutex<Option<(u64, Arc<T>)>>,
}

impl<T> Derived<T> {
    pub fn new(prefix: &'static str, make: fn(&[Value]) -> T) -> Self {
        Self { prefix, make, kept: Mutex::new(None) }
    }

    pub fn get(&self, engine: &Engine) -> Arc<T> {
        let cache = engine.hub.cache(self.prefix);
        let mut kept = self.kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match &*kept {
            Some((revision, made)) if *revision == cache.last_change() => made.clone(),
            _ => {
                // In the order of names, as the cache is.
                let snapshot = cache.range("", None);
                let objects: Vec<Value> = snapshot.entries.iter().map(|entry| entry.object()).collect();
                let made = Arc::new((self.make)(&objects));
                *kept = Some((snapshot.last_change, made.clone()));
                made
            }
        }
    }
}
