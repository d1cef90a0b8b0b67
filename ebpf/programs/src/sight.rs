//! Counting, and telling whoever watches. A TCP socket that was led somewhere asks the kernel to be called when its state changes: three
//! calls in its life, none per packet, and none for other sockets beyond the look at what happens.

use core::ptr::{addr_of, from_ref, null_mut};

use aya_ebpf::bindings::{BPF_F_NO_PREALLOC, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, bpf_sock_ops};
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_ktime_get_ns, bpf_sk_storage_get, bpf_sock_ops_cb_flags_set};
use aya_ebpf::macros::{map, sock_ops};
use aya_ebpf::maps::{Array, HashMap, RingBuf};
use aya_ebpf::programs::SockOpsContext;
use outrigger_abi::sight::{BUCKETS, DropKey, Event, Latency, Reason, Traffic, TrafficKey, Watched, event_kind};
use outrigger_abi::{Addr, Endpoint, Peer, Port, TCP, Tuple};
use outrigger_logic::service::Tables;
use outrigger_logic::sight::{Turn, bucket, turn};

use crate::maps::{Kernel, atomic_add, count, peers};

#[map(name = "traffic")]
static TRAFFIC: HashMap<TrafficKey, Traffic> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);
#[map(name = "drops")]
static DROPS: HashMap<DropKey, u64> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);
#[map(name = "watched")]
static WATCHED: Array<Watched> = Array::with_max_entries(1, 0);
#[map(name = "events")]
static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 12, 0);

/// In the object's data: the stack has no room for it.
static NONE_YET: Traffic =
    Traffic { connections: 0, failed: 0, sent: 0, received: 0, connect: Latency { nanoseconds: 0, buckets: [0; BUCKETS] } };

const AF_INET: u32 = 2;
const NO_EXIST: u64 = 1;

#[sock_ops]
pub fn outrigger_sock_ops(ctx: SockOpsContext) -> u32 {
    let ops = ctx.ops;
    // SAFETY: the context is valid for the whole call; the kernel allows reading these words for every kind of call.
    match unsafe { addr_of!((*ops).op).read_volatile() } {
        BPF_SOCK_OPS_TCP_CONNECT_CB => follow(ops),
        BPF_SOCK_OPS_STATE_CB => turned(ops),
        _ => {}
    }
    1
}

/// The connect of a socket that was led somewhere: its changes of state are asked for.
#[inline(always)]
fn follow(ops: *mut bpf_sock_ops) {
    if peer(ops).is_some_and(|peer| peer.protocol == TCP as u16) {
        // SAFETY: as in the program.
        unsafe {
            let flags = addr_of!((*ops).bpf_sock_ops_cb_flags).read_volatile() | BPF_SOCK_OPS_STATE_CB_FLAG;
            bpf_sock_ops_cb_flags_set(ops, flags as i32);
        }
    }
}

#[inline(always)]
fn turned(ops: *mut bpf_sock_ops) {
    // SAFETY: as in the program.
    let (from, to) = unsafe {
        let args = addr_of!((*ops).__bindgen_anon_1.args);
        (addr_of!((*args)[0]).read_volatile(), addr_of!((*args)[1]).read_volatile())
    };
    let turn = turn(from, to);
    if turn == Turn::Nothing {
        return;
    }
    let Some(peer) = peer(ops) else { return };
    let (kind, reason, sent, received) = match turn {
        Turn::Opened => {
            let took = now().wrapping_sub(peer.seen);
            with_traffic(peer.service, peer.backend, |traffic| opened(traffic, took));
            (event_kind::OPENED, 0, 0, 0)
        }
        Turn::Failed => {
            refused(peer.service, Reason::ConnectFailed);
            with_traffic(peer.service, peer.backend, |traffic| add(&traffic.failed, 1));
            (event_kind::REFUSED, Reason::ConnectFailed as u8, 0, 0)
        }
        Turn::Closed { acked: no_data, received: no_data_received } => {
            // SAFETY: as in the program.
            let (acked, received) =
                unsafe { (addr_of!((*ops).bytes_acked).read_volatile(), addr_of!((*ops).bytes_received).read_volatile()) };
            let (sent, received) = (acked.saturating_sub(no_data), received.saturating_sub(no_data_received));
            with_traffic(peer.service, peer.backend, |traffic| {
                add(&traffic.sent, sent);
                add(&traffic.received, received);
            });
            (event_kind::CLOSED, 0, sent, received)
        }
        Turn::Nothing => return,
    };
    if is_watched() {
        tell(|| Event {
            // SAFETY: the helper takes this program's context.
            namespace: unsafe { bpf_get_netns_cookie(ops.cast()) },
            sent,
            received,
            nanoseconds: now().wrapping_sub(peer.seen),
            source: source(ops),
            frontend: peer.frontend,
            backend: peer.backend,
            service: peer.service,
            kind,
            reason,
            protocol: TCP,
            zero: [0; 5],
        });
    }
}

#[inline(always)]
fn opened(traffic: &Traffic, took: u64) {
    add(&traffic.connect.nanoseconds, took);
    if let Some(bucket) = traffic.connect.buckets.get(bucket(took)) {
        add(bucket, 1);
    }
}

/// What the socket's connect left on it.
#[inline(always)]
fn peer(ops: *mut bpf_sock_ops) -> Option<&'static Peer> {
    // SAFETY: map and socket are valid; without the create flag no initial value is read. The storage lives as long as the socket,
    // which outlives the call.
    unsafe {
        let sock = addr_of!((*ops).__bindgen_anon_2.sk).read_volatile();
        if sock.is_null() {
            return None;
        }
        bpf_sk_storage_get(peers(), sock.cast(), null_mut(), 0).cast::<Peer>().as_ref()
    }
}

#[inline(always)]
fn source(ops: *mut bpf_sock_ops) -> Endpoint {
    // SAFETY: as in the program.
    unsafe {
        let port = Port::new(addr_of!((*ops).local_port).read_volatile() as u16);
        // Read before the question: of a read on either side the compiler would make one that the kernel refuses.
        let v4 = addr_of!((*ops).local_ip4).read_volatile();
        let word = |index: usize| addr_of!((*ops).local_ip6[index]).read_volatile();
        let v6 = Addr([word(0), word(1), word(2), word(3)]);
        let addr = if addr_of!((*ops).family).read_volatile() == AF_INET { Addr::from_v4_word(v4) } else { v6 };
        Endpoint::new(addr, port)
    }
}

/// Nanoseconds of the monotonic clock.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: takes no argument.
    unsafe { bpf_ktime_get_ns() }
}

#[inline(always)]
fn add(counter: &u64, more: u64) {
    // SAFETY: the counter is in a map's element, which stays while the program runs, and is written by such additions only.
    unsafe { atomic_add(from_ref(counter).cast_mut(), more) };
}

/// A full map counts for nobody new; the agent takes away what Services no longer have.
#[inline(always)]
fn with_traffic(service: u32, backend: Endpoint, update: impl FnOnce(&Traffic)) {
    let key = TrafficKey { service, backend };
    // SAFETY: the map isn't preallocated, so the element isn't reused while this program runs.
    if let Some(traffic) = unsafe { TRAFFIC.get(&key) } {
        update(traffic);
    }
}

/// A new connection to a backend.
#[inline(always)]
pub fn connected(service: u32, backend: Endpoint) {
    count(service, |counters| counters.connections += 1);
    let key = TrafficKey { service, backend };
    // SAFETY: as above.
    let mut traffic = unsafe { TRAFFIC.get(&key) };
    if traffic.is_none() {
        // Another CPU's connection may have been the first.
        let _ = TRAFFIC.insert(&key, &NONE_YET, NO_EXIST);
        // SAFETY: as above.
        traffic = unsafe { TRAFFIC.get(&key) };
    }
    if let Some(traffic) = traffic {
        add(&traffic.connections, 1);
    }
}

#[inline(always)]
pub fn refused(service: u32, reason: Reason) {
    count(service, |counters| counters.refused += 1);
    let key = DropKey { service, reason: reason as u32 };
    // SAFETY: as above.
    match unsafe { DROPS.get(&key) } {
        Some(drops) => add(drops, 1),
        // When two CPUs see the first one at once, one is not counted.
        None => _ = DROPS.insert(&key, &1, NO_EXIST),
    }
}

/// Of the packet that began a connection.
#[inline(always)]
pub fn of_packet(tuple: &Tuple) -> Event {
    let (source, frontend) = (Endpoint::new(tuple.src, tuple.sport), Endpoint::new(tuple.dst, tuple.dport));
    Event { source, frontend, protocol: tuple.protocol, ..Event::default() }
}

#[inline(always)]
pub fn is_watched() -> bool {
    WATCHED.get(0).is_some_and(|watched| watched.until > Kernel.now())
}

/// What to tell is asked when there is a place for it, so that it needn't wait on the stack.
#[inline(always)]
pub fn tell(told: impl FnOnce() -> Event) {
    let Some(mut event) = EVENTS.reserve::<Event>(0) else {
        if let Some(watched) = WATCHED.get(0) {
            add(&watched.lost, 1);
        }
        return;
    };
    event.write(told());
    event.submit(0);
}
