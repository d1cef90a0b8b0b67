//! Hooks of the cgroup: sockets are led to backends when they connect or send, and see the frontend's name afterwards.

use aya_ebpf::bindings::{bpf_sock, bpf_sock_addr};
use aya_ebpf::helpers::generated::{
    bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval, bpf_sk_storage_delete, bpf_sk_storage_get,
};
use aya_ebpf::macros::{cgroup_sock, cgroup_sock_addr};
use aya_ebpf::programs::{SockAddrContext, SockContext};
use core::ptr::{addr_of, addr_of_mut, null_mut};
use outrigger_abi::sight::{Event, Reason, event_kind};
use outrigger_abi::{Addr, Datagram, DatagramKey, Endpoint, Peer, Port, UDP};
use outrigger_logic::service::{Client, Tables, Verdict};
use outrigger_logic::sight::without_backend;
use outrigger_logic::socket::{self, Socket};

use crate::maps::{DATAGRAMS, Kernel, host_namespace, peers};
use crate::sight;

const ALLOW: i32 = 1;
const DENY: i32 = 0;
const ECONNREFUSED: i32 = 111;
const ETIMEDOUT: i32 = 110;
const CREATE: u64 = 1;

#[cgroup_sock_addr(connect4)]
pub fn outrigger_connect4(ctx: SockAddrContext) -> i32 {
    connect(&Hook::v4(&ctx))
}

#[cgroup_sock_addr(connect6)]
pub fn outrigger_connect6(ctx: SockAddrContext) -> i32 {
    connect(&Hook::v6(&ctx))
}

#[cgroup_sock_addr(sendmsg4)]
pub fn outrigger_sendmsg4(ctx: SockAddrContext) -> i32 {
    send(&Hook::v4(&ctx))
}

#[cgroup_sock_addr(sendmsg6)]
pub fn outrigger_sendmsg6(ctx: SockAddrContext) -> i32 {
    send(&Hook::v6(&ctx))
}

#[cgroup_sock_addr(recvmsg4)]
pub fn outrigger_recvmsg4(ctx: SockAddrContext) -> i32 {
    receive(&Hook::v4(&ctx))
}

#[cgroup_sock_addr(recvmsg6)]
pub fn outrigger_recvmsg6(ctx: SockAddrContext) -> i32 {
    receive(&Hook::v6(&ctx))
}

#[cgroup_sock_addr(getpeername4)]
pub fn outrigger_getpeername4(ctx: SockAddrContext) -> i32 {
    peer_name(&Hook::v4(&ctx))
}

#[cgroup_sock_addr(getpeername6)]
pub fn outrigger_getpeername6(ctx: SockAddrContext) -> i32 {
    peer_name(&Hook::v6(&ctx))
}

/// A program has closed a socket. Most were never led anywhere, and cost one look.
#[cgroup_sock(sock_release)]
pub fn outrigger_release(ctx: SockContext) -> i32 {
    if let Some(peer) = stored(ctx.sock, 0) {
        socket::leave(&Kernel, peer);
    }
    ALLOW
}

#[inline(always)]
fn connect(hook: &Hook) -> i32 {
    let Some(protocol) = socket::protocol(hook.protocol()) else { return ALLOW };
    let (dest, client) = (hook.endpoint(), hook.client());
    match socket::connect(&Kernel, dest, protocol, client) {
        Verdict::To(choice) => {
            if let Some(peer) = hook.note() {
                socket::leave(&Kernel, peer);
                // How long a connect takes is measured from here.
                let now = if protocol == UDP { Kernel.now() } else { sight::now() };
                socket::note(peer, dest, protocol, &choice, now);
                socket::enter(&Kernel, peer, &choice);
            }
            if protocol == UDP {
                socket::note_connected(hook, dest, choice.backend, Kernel.now());
                hook.opened(dest, choice.backend, choice.service, protocol);
            }
            hook.set_endpoint(choice.backend);
            sight::connected(choice.service, choice.backend);
            ALLOW
        }
        Verdict::Refuse(service) if socket::fails_at_once(protocol, client) => {
            refuse(hook, protocol, service, without_backend(service), ECONNREFUSED)
        }
        Verdict::Drop(service, reason) if socket::fails_at_once(protocol, client) => refuse(hook, protocol, service, reason, ETIMEDOUT),
        Verdict::Pass | Verdict::Refuse(_) | Verdict::Drop(..) => {
            // The socket may have been led somewhere by an earlier connect.
            hook.forget();
            ALLOW
        }
    }
}

#[inline(always)]
fn send(hook: &Hook) -> i32 {
    let Some(protocol) = socket::protocol(hook.protocol()) else { return ALLOW };
    let dest = hook.endpoint();
    let noted = hook.noted();
    match socket::send(&Kernel, hook, dest, protocol, hook.client(), noted) {
        Verdict::Pass => ALLOW,
        Verdict::To(choice) => {
            let first = noted.is_none();
            socket::note_datagram(hook, noted, dest, choice.backend, Kernel.now());
            if let Some(peer) = hook.note() {
                socket::leave(&Kernel, peer);
                socket::note(peer, dest, protocol, &choice, Kernel.now());
            }
            hook.set_endpoint(choice.backend);
            if first {
                sight::connected(choice.service, choice.backend);
                hook.opened(dest, choice.backend, choice.service, protocol);
            }
            ALLOW
        }
        Verdict::Refuse(service) => refuse(hook, protocol, service, without_backend(service), ECONNREFUSED),
        // A datagram that is dropped looks like one that was lost.
        Verdict::Drop(service, reason) => refuse(hook, protocol, service, reason, ECONNREFUSED),
    }
}

#[inline(always)]
fn receive(hook: &Hook) -> i32 {
    if let Some(frontend) = socket::receive(hook, hook.endpoint(), hook.noted()) {
        hook.set_endpoint(frontend);
    }
    ALLOW
}

#[inline(always)]
fn peer_name(hook: &Hook) -> i32 {
    if let Some(frontend) = socket::peer_name(hook.endpoint(), hook.noted()) {
        hook.set_endpoint(frontend);
    }
    ALLOW
}

#[inline(always)]
fn refuse(hook: &Hook, protocol: u8, service: u32, reason: Reason, errno: i32) -> i32 {
    sight::refused(service, reason);
    if sight::is_watched() {
        hook.tell(|| Event {
            frontend: hook.endpoint(),
            service,
            kind: event_kind::REFUSED,
            reason: reason as u8,
            protocol,
            ..Event::default()
        });
    }
    // SAFETY: takes a number; the hook kinds used here all have a return value to set.
    unsafe { bpf_set_retval(-errno) };
    DENY
}

/// One call of a hook. The kernel checks each access to the context by its offset and width, so words are read one by one.
struct Hook {
    ctx: *mut bpf_sock_addr,
    v4: bool,
}

impl Hook {
    #[inline(always)]
    fn v4(ctx: &SockAddrContext) -> Self {
        Self { ctx: ctx.sock_addr, v4: true }
    }

    #[inline(always)]
    fn v6(ctx: &SockAddrContext) -> Self {
        Self { ctx: ctx.sock_addr, v4: false }
    }

    #[inline(always)]
    fn protocol(&self) -> u32 {
        // SAFETY: the context is valid for the whole call.
        unsafe { addr_of!((*self.ctx).protocol).read_volatile() }
    }

    #[inline(always)]
    fn endpoint(&self) -> Endpoint {
        // SAFETY: the context is valid for the whole call, and the kernel allows reading these words in every hook used here.
        unsafe {
            let port = Port(addr_of!((*self.ctx).user_port).read_volatile() as u16);
            let addr = if self.v4 {
                Addr::from_v4_word(addr_of!((*self.ctx).user_ip4).read_volatile())
            } else {
                let word = |index: usize| addr_of!((*self.ctx).user_ip6[index]).read_volatile();
                Addr([word(0), word(1), word(2), word(3)])
            };
            Endpoint::new(addr, port)
        }
    }

    #[inline(always)]
    fn set_endpoint(&self, endpoint: Endpoint) {
        // SAFETY: as above, for writing.
        unsafe {
            addr_of_mut!((*self.ctx).user_port).write_volatile(endpoint.port.0 as u32);
            if self.v4 {
                addr_of_mut!((*self.ctx).user_ip4).write_volatile(endpoint.addr.v4_word());
            } else {
                let Addr([a, b, c, d]) = endpoint.addr;
                addr_of_mut!((*self.ctx).user_ip6[0]).write_volatile(a);
                addr_of_mut!((*self.ctx).user_ip6[1]).write_volatile(b);
                addr_of_mut!((*self.ctx).user_ip6[2]).write_volatile(c);
                addr_of_mut!((*self.ctx).user_ip6[3]).write_volatile(d);
            }
        }
    }

    #[inline(always)]
    fn client(&self) -> Client {
        // SAFETY: the helper takes this hook's context.
        let namespace = unsafe { bpf_get_netns_cookie(self.ctx.cast()) };
        Client::Socket { namespace, host: namespace == host_namespace() }
    }

    /// For sockets whose connect is no moment of its own.
    #[inline(always)]
    fn opened(&self, frontend: Endpoint, backend: Endpoint, service: u32, protocol: u8) {
        if sight::is_watched() {
            self.tell(|| Event { frontend, backend, service, kind: event_kind::OPENED, protocol, ..Event::default() });
        }
    }

    /// The socket has no source yet, but its namespace says whose it is.
    #[inline(always)]
    fn tell(&self, told: impl FnOnce() -> Event) {
        // SAFETY: the helper takes this hook's context.
        sight::tell(|| Event { namespace: unsafe { bpf_get_netns_cookie(self.ctx.cast()) }, ..told() });
    }

    #[inline(always)]
    fn sock(&self) -> *mut bpf_sock {
        // SAFETY: the context is valid; the kernel guarantees a full socket here.
        unsafe { addr_of!((*self.ctx).__bindgen_anon_1.sk).read_volatile() }
    }

    #[inline(always)]
    fn noted(&self) -> Option<&Peer> {
        stored(self.sock(), 0).map(|peer| &*peer)
    }

    /// The socket's storage, to be written to. Two threads that send on one socket at once may mix their notes; the next send
    /// mends that.
    #[inline(always)]
    fn note(&self) -> Option<&mut Peer> {
        stored(self.sock(), CREATE)
    }

    #[inline(always)]
    fn forget(&self) {
        if let Some(peer) = stored(self.sock(), 0) {
            socket::leave(&Kernel, peer);
            // SAFETY: map and socket are valid.
            unsafe { bpf_sk_storage_delete(peers(), self.sock().cast()) };
        }
    }
}

/// The socket's storage.
#[inline(always)]
fn stored<'a>(sock: *mut bpf_sock, flags: u64) -> Option<&'a mut Peer> {
    // SAFETY: map and socket are valid; without an initial value the storage starts as zeros.
    let peer = unsafe { bpf_sk_storage_get(peers(), sock.cast(), null_mut(), flags) }.cast::<Peer>();
    // SAFETY: the storage lives as long as the socket, which outlives the call; any bit pattern is a peer.
    unsafe { peer.as_mut() }
}

impl Socket for Hook {
    #[inline(always)]
    fn cookie(&self) -> u64 {
        // SAFETY: the helper takes this hook's context.
        unsafe { bpf_get_socket_cookie(self.ctx.cast()) }
    }

    #[inline(always)]
    fn datagram(&self, key: &DatagramKey) -> Option<&Datagram> {
        // SAFETY: an element that is evicted meanwhile may be read torn: one datagram gets a wrong name, as if it was late.
        unsafe { DATAGRAMS.get(key) }
    }

    #[inline(always)]
    fn set_datagram(&self, key: &DatagramKey, value: &Datagram) {
        // A full LRU map evicts.
        let _ = DATAGRAMS.insert(key, value, 0);
    }
}
