//! Writes the API: the node, its lease, pod statuses and events.
