//! Ends the kernel connection-tracking entries of gone backends.
