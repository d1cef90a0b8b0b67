//! Packets as the hooks of interfaces see them, and what their IP headers say.

use core::mem::MaybeUninit;
use core::ptr::{addr_of, from_mut};

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::bpf_skb_load_bytes;
use outrigger_abi::Addr;

/// On to other programs of the interface, then to the stack.
pub const NEXT: i32 = -1;
pub const DROP: i32 = 2;
/// Length of an Ethernet header; tags are kept beside the packet.
pub const L3: u32 = 14;
pub const IPV4: u32 = 0x0800_u16.to_be() as u32;
pub const IPV6: u32 = 0x86dd_u16.to_be() as u32;

pub const ICMP: u8 = 1;
pub const ICMPV6: u8 = 58;
const FRAGMENT_HEADER: u8 = 44;

#[inline(always)]
pub fn ifindex(skb: *mut __sk_buff) -> u32 {
    // SAFETY: the context is valid for the whole call.
    unsafe { addr_of!((*skb).ifindex).read_volatile() }
}

#[inline(always)]
pub fn load<T>(skb: *mut __sk_buff, offset: u32) -> Option<T> {
    let mut value = MaybeUninit::<T>::uninit();
    // SAFETY: the helper fills the whole value or fails; `T` is made of integers here.
    unsafe {
        let result = bpf_skb_load_bytes(skb.cast(), offset, from_mut(&mut value).cast(), size_of::<T>() as u32);
        if result == 0 { Some(value.assume_init()) } else { None }
    }
}

#[inline(always)]
pub fn ethertype(skb: *mut __sk_buff) -> u32 {
    // SAFETY: the context is valid for the whole call.
    unsafe { addr_of!((*skb).protocol).read_volatile() }
}

/// Unreachable, time exceeded, bad header; IPv6 has its own for packets that are too big.
#[inline(always)]
pub fn is_error(kind: u8, v4: bool) -> bool {
    if v4 { kind == 3 || kind == 11 || kind == 12 } else { (1..=4).contains(&kind) }
}

/// An IP header's addresses and what it carries.
pub struct Header {
    pub src: Addr,
    pub dst: Addr,
    pub protocol: u8,
    pub length: u32,
    /// The IPv4 header's time to live and protocol, or the IPv6 header's next header and hop limit, as one word of the wire.
    pub lifetime: u16,
    /// The fragment's id, offset and whether more follow; all zero in a whole packet.
    pub id: u32,
    pub offset: u16,
    pub more: bool,
}

#[inline(always)]
pub fn header(skb: *mut __sk_buff, at: u32, v4: bool) -> Option<Header> {
    if v4 {
        let words: [u32; 5] = load(skb, at)?;
        let fragment = u16::from_be((words[1] >> 16) as u16);
        return Some(Header {
            src: Addr::from_v4_word(words[3]),
            dst: Addr::from_v4_word(words[4]),
            protocol: (words[2] >> 8) as u8,
            length: (words[0] & 0xf) * 4,
            lifetime: words[2] as u16,
            id: words[1] & 0xffff,
            offset: fragment & 0x1fff,
            more: fragment & 0x2000 != 0,
        });
    }
    let words: [u32; 10] = load(skb, at)?;
    let lifetime = (words[1] >> 16) as u16;
    let (mut protocol, mut length, mut id, mut offset, mut more) = (lifetime as u8, 40, 0, 0, false);
    if protocol == FRAGMENT_HEADER {
        let extension: [u32; 2] = load(skb, at + 40)?;
        let fragment = u16::from_be((extension[0] >> 16) as u16);
        (protocol, length, id) = (extension[0] as u8, 48, extension[1]);
        (offset, more) = (fragment >> 3, fragment & 1 != 0);
    }
    let src = Addr([words[2], words[3], words[4], words[5]]);
    let dst = Addr([words[6], words[7], words[8], words[9]]);
    Some(Header { src, dst, protocol, length, lifetime, id, offset, more })
}
