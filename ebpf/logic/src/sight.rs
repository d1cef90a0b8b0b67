//! What is counted: into which bucket, under which reason.
use outrigger_abi::sight::{BUCKETS, FIRST_BOUND, Reason};

/// `enum` of the kernel's TCP states.
pub mod tcp_state {
    pub const ESTABLISHED: u32 = 1;
    pub const SYN_SENT: u32 = 2;
    pub const FIN_WAIT2: u32 = 5;
    pub const CLOSE: u32 = 7;
    pub const CLOSE_WAIT: u32 = 8;
    pub const LAST_ACK: u32 = 9;
    pub const CLOSING: u32 = 11;
}

/// What a change of a led TCP socket's state means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    Opened,
    Failed,
    /// With how much of what was acknowledged and of what was received is no data: SYN and FIN count one each, but the SYN that comes.
    Closed {
        acked: u64,
        received: u64,
    },
    Nothing,
}

#[inline(always)]
pub const fn turn(from: u32, to: u32) -> Turn {
    use tcp_state::{CLOSE, CLOSE_WAIT, CLOSING, ESTABLISHED, FIN_WAIT2, LAST_ACK, SYN_SENT};
    match (from, to) {
        (SYN_SENT, ESTABLISHED) => Turn::Opened,
        (SYN_SENT, CLOSE) => Turn::Failed,
        (LAST_ACK | CLOSING, CLOSE) => Turn::Closed { acked: 2, received: 1 },
        // The backend's FIN may have come with what acknowledged the client's, or later, when the kernel has given the socket up.
        (FIN_WAIT2, CLOSE) => Turn::Closed { acked: 2, received: 0 },
        (CLOSE_WAIT, CLOSE) => Turn::Closed { acked: 1, received: 1 },
        (_, CLOSE) => Turn::Closed { acked: 1, received: 0 },
        _ => Turn::Nothing,
    }
}

/// Which of `Latency::buckets` counts a connect that took so many nanoseconds.
#[inline(always)]
pub const fn bucket(nanoseconds: u64) -> usize {
    let first = FIRST_BOUND.trailing_zeros();
    // The exponent of the next power of two.
    let exponent = 64 - nanoseconds.saturating_sub(1).leading_zeros();
    let index = exponent.saturating_sub(first) as usize;
    if index < BUCKETS { index } else { BUCKETS - 1 }
}

/// Why there is no backend: `service` is 0 where an address has no such port.
#[inline(always)]
pub const fn without_backend(service: u32) -> Reason {
    if service == 0 { Reason::NoPort } else { Reason::NoEndpoint }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_holds_what_is_at_most_its_bound() {
        for index in 0..BUCKETS - 1 {
            let bound = FIRST_BOUND << index;
            assert_eq!((bucket(bound), bucket(bound + 1)), (index, index + 1));
        }
        assert_eq!((bucket(0), bucket(u64::MAX)), (0, BUCKETS - 1));
    }

    #[test]
    fn connections_end_in_many_ways() {
        use tcp_state::{CLOSE, ESTABLISHED, FIN_WAIT2, LAST_ACK, SYN_SENT};
        assert_eq!(turn(SYN_SENT, ESTABLISHED), Turn::Opened);
        assert_eq!(turn(SYN_SENT, CLOSE), Turn::Failed);
        assert_eq!(turn(ESTABLISHED, CLOSE), Turn::Closed { acked: 1, received: 0 }, "a reset");
        assert_eq!(turn(FIN_WAIT2, CLOSE), Turn::Closed { acked: 2, received: 0 });
        assert_eq!(turn(LAST_ACK, CLOSE), Turn::Closed { acked: 2, received: 1 });
        assert_eq!(turn(ESTABLISHED, FIN_WAIT2), Turn::Nothing);
    }
}
