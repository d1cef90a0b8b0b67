//! What becomes of a packet that no socket hook saw: from outside, or from a pod whose sockets are out of reach.
