//! What is counted of the traffic, and what is told of it to whoever watches.
use crate::Endpoint;

/// Why a connection came to nothing.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// The Service has no endpoint.
    NoEndpoint = 0,
    /// A cluster IP was dialled at a port that no Service has there.
    NoPort = 1,
    /// The client is outside `loadBalancerSourceRanges`.
    SourceRange = 2,
    /// Policy Local, and no endpoint is on this node.
    LocalPolicy = 3,
    /// The packet was to be sent on and had no hop left.
    Ttl = 4,
    /// There is no route to the backend, or no address of this node on it.
    NoRoute = 5,
    /// No port of this node was free for a connection that is masqueraded.
    NoSourcePort = 6,
    /// The packet couldn't be rewritten.
    Malformed = 7,
    /// The backend refused, or didn't answer in time.
    ConnectFailed = 8,
}

impl Reason {
    pub const ALL: [Self; 9] = [
        Self::NoEndpoint,
        Self::NoPort,
        Self::SourceRange,
        Self::LocalPolicy,
        Self::Ttl,
        Self::NoRoute,
        Self::NoSourcePort,
        Self::Malformed,
        Self::ConnectFailed,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Self::NoEndpoint => "no_endpoint",
            Self::NoPort => "no_port",
            Self::SourceRange => "source_range",
            Self::LocalPolicy => "local_policy",
            Self::Ttl => "ttl",
            Self::NoRoute => "no_route",
            Self::NoSourcePort => "no_source_port",
            Self::Malformed => "malformed",
            Self::ConnectFailed => "connect_failed",
        }
    }

    /// Whether the client isn't told.
    pub const fn is_silent(self) -> bool {
        !matches!(self, Self::NoEndpoint | Self::NoPort | Self::ConnectFailed)
    }
}

impl TryFrom<u32> for Reason {
    type Error = u32;

    fn try_from(number: u32) -> Result<Self, u32> {
        Self::ALL.get(number as usize).copied().ok_or(number)
    }
}

/// Key of the map `drops`, whose values are counts. Service port 0 is nobody's.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DropKey {
    pub service: u32,
    /// A [`Reason`].
    pub reason: u32,
}

/// Key of the map `traffic`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct TrafficKey {
    pub service: u32,
    pub backend: Endpoint,
}

/// Upper bounds of all but the last of [`Latency::buckets`] are `FIRST_BOUND << index` nanoseconds: 33 µs to 1.1 s.
pub const FIRST_BOUND: u64 = 1 << 15;
pub const BUCKETS: usize = 17;

/// How long connects took.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Latency {
    pub nanoseconds: u64,
    pub buckets: [u64; BUCKETS],
}

/// Value of the map `traffic`, which has an element for each backend that was used. Elements are added to by several CPUs at once.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    pub connections: u64,
    /// Those that the backend refused or didn't answer.
    pub failed: u64,
    /// From clients to the backend, of connections that are over.
    pub sent: u64,
    /// From the backend to clients.
    pub received: u64,
    pub connect: Latency,
}

/// The only element of the array `watched`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Watched {
    /// Events are told until this time (nanoseconds of the coarse monotonic clock), so that nobody has to end it.
    pub until: u64,
    /// Events that found no room.
    pub lost: u64,
}

/// What the ring buffer `events` is made of.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// The cookie of the client's network namespace; 0 for packets.
    pub namespace: u64,
    /// In bytes; of connections that are over.
    pub sent: u64,
    pub received: u64,
    /// How long the connect took (opened), or the connection lived (closed).
    pub nanoseconds: u64,
    /// All zero where the socket has no address yet.
    pub source: Endpoint,
    pub frontend: Endpoint,
    pub backend: Endpoint,
    pub service: u32,
    /// `event_kind`.
    pub kind: u8,
    /// A [`Reason`], for what came to nothing.
    pub reason: u8,
    pub protocol: u8,
    pub zero: [u8; 5],
}

pub mod event_kind {
    pub const OPENED: u8 = 1;
    pub const CLOSED: u8 = 2;
    /// Came to nothing.
    pub const REFUSED: u8 = 3;
}

const _: () = {
    assert!(size_of::<DropKey>() == 8);
    assert!(size_of::<TrafficKey>() == 24);
    assert!(size_of::<Latency>() == 144);
    assert!(size_of::<Traffic>() == 176);
    assert!(size_of::<Watched>() == 16);
    assert!(size_of::<Event>() == 104);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_found_by_their_numbers() {
        for (number, reason) in (0..).zip(Reason::ALL) {
            assert_eq!((reason as u32, Reason::try_from(number)), (number, Ok(reason)));
        }
        assert!(Reason::try_from(Reason::ALL.len() as u32).is_err());
    }
}
