//! Server-side apply: who owns which field of an object, and what an applied configuration makes of it.
//!
//! [`schema`] says how a value merges, from the same facts that decoding, defaults and strategic patches use; [`walk`] compares, merges and
//! prunes by it; [`set`] holds the fields; [`tracker`] keeps `metadata.managedFields`.
mod managers;
mod schema;
mod set;
mod tracker;
mod walk;

pub use managers::keep_times;
pub use tracker::Tracker;

#[cfg(test)]
mod tests;
