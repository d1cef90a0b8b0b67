//! The bpf(2) calls that aya has no way to make: batches, adoption of pinned objects, atomic replacement of links.
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const MAP_CREATE: u32 = 0;
const MAP_LOOKUP_ELEM: u32 = 1;
const MAP_UPDATE_ELEM: u32 = 2;
const MAP_DELETE_ELEM: u32 = 3;
const OBJ_PIN: u32 = 6;
const OBJ_GET: u32 = 7;
const MAP_GET_FD_BY_ID: u32 = 14;
const OBJ_GET_INFO_BY_FD: u32 = 15;
const MAP_LOOKUP_BATCH: u32 = 24;
const MAP_UPDATE_BATCH: u32 = 26;
const MAP_DELETE_BATCH: u32 = 27;
const LINK_CREATE: u32 = 28;
const LINK_UPDATE: u32 = 29;
const LINK_DETACH: u32 = 34;

/// One call. `attr` is the command's part of `union bpf_attr`; the kernel reads no further than its size.
fn bpf<A>(command: u32, attr: &mut A) -> io::Result<i32> {
    // SAFETY: `attr` is a plain struct of the command's layout whose pointers, if any, outlive the call (each caller's duty,
    // met by borrowing in the public functions below).
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<A>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the kernel has just handed out this descriptor, to us alone.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn path_string(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a path with a NUL byte"))
}

fn address<T: ?Sized>(value: &T) -> u64 {
    std::ptr::from_ref(value).cast::<u8>() as u64
}

#[repr(C)]
#[derive(Default)]
struct ObjAttr {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// Opens a pinned map, program or link.
pub fn get_pinned(path: &Path) -> io::Result<OwnedFd> {
    let name = path_string(path)?;
    let mut attr = ObjAttr { pathname: name.as_ptr() as u64, ..ObjAttr::default() };
    bpf(OBJ_GET, &mut attr).map(owned)
}

pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let name = path_string(path)?;
    let mut attr = ObjAttr { pathname: name.as_ptr() as u64, bpf_fd: object.as_raw_fd() as u32, file_flags: 0 };
    bpf(OBJ_PIN, &mut attr).map(drop)
}

#[repr(C)]
struct CreateAttr {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    name: [u8; 16],
}

/// Makes a map that can be an element of a map of maps; `template` says what it is like but for its size.
pub(super) fn map_create(name: &str, template: &MapInfo, max_entries: u32) -> io::Result<OwnedFd> {
    let mut attr = CreateAttr {
        kind: template.kind,
        key_size: template.key_size,
        value_size: template.value_size,
        max_entries,
        map_flags: template.map_flags,
        inner_map_fd: 0,
        numa_node: 0,
        name: [0; 16],
    };
    // The last byte stays zero.
    attr.name.iter_mut().zip(name.bytes().take(15)).for_each(|(to, byte)| *to = byte);
    bpf(MAP_CREATE, &mut attr).map(owned)
}

#[repr(C)]
#[derive(Default)]
struct IdAttr {
    id: u32,
    next_id: u32,
    open_flags: u32,
}

/// The map that a map of maps has at `index`; its elements read as ids.
pub(super) fn inner_map(outer: &OwnedFd, index: u32) -> io::Result<Option<OwnedFd>> {
    let mut attr = IdAttr::default();
    if !lookup(outer, &index, &mut attr.id)? {
        return Ok(None);
    }
    bpf(MAP_GET_FD_BY_ID, &mut attr).map(owned).map(Some)
}

#[repr(C)]
#[derive(Default)]
struct InfoAttr {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// The head of `struct bpf_map_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct MapInfo {
    pub kind: u32,
    pub id: u32,
    pub key_size: u32,
    pub value_size: u32,
    pub max_entries: u32,
    pub map_flags: u32,
}

pub fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    let mut info = MapInfo::default();
    let mut attr = InfoAttr { bpf_fd: map.as_raw_fd() as u32, info_len: size_of::<MapInfo>() as u32, info: &raw mut info as u64 };
    bpf(OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(info)
}

/// The head of `struct bpf_link_info` for links to a cgroup or (tcx) an interface: `target` is the cgroup's id, whose low half is
/// the interface index for tcx.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct LinkInfo {
    pub kind: u32,
    pub id: u32,
    pub program: u32,
    pad: u32,
    pub target: u64,
    pub attach_type: u32,
    pad2: u32,
}

pub fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let mut info = LinkInfo::default();
    let mut attr = InfoAttr { bpf_fd: link.as_raw_fd() as u32, info_len: size_of::<LinkInfo>() as u32, info: &raw mut info as u64 };
    bpf(OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(info)
}

#[repr(C)]
#[derive(Default)]
struct LinkCreateAttr {
    prog_fd: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    /// For tcx: `relative_fd`, padding and `expected_revision`, all "anywhere".
    rest: [u32; 4],
}

/// Before all other programs of the interface's hook.
pub const FIRST: u32 = 1 << 3;
/// Behind them.
pub const LAST: u32 = 1 << 4;

/// Attaches a program to a cgroup (`target` is its descriptor) or an interface (its index).
pub fn link_create(program: BorrowedFd<'_>, target: u32, attach_type: u32, flags: u32) -> io::Result<OwnedFd> {
    let mut attr = LinkCreateAttr { prog_fd: program.as_raw_fd() as u32, target, attach_type, flags, ..LinkCreateAttr::default() };
    bpf(LINK_CREATE, &mut attr).map(owned)
}

#[repr(C)]
#[derive(Default)]
struct LinkUpdateAttr {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// Replaces the program of a link; no packet and no connect falls between the two.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr =
        LinkUpdateAttr { link_fd: link.as_raw_fd() as u32, new_prog_fd: program.as_raw_fd() as u32, ..LinkUpdateAttr::default() };
    bpf(LINK_UPDATE, &mut attr).map(drop)
}

/// Ends a link at once; closing the last descriptor of it would do so a little later.
pub fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    bpf(LINK_DETACH, &mut (link.as_raw_fd() as u32)).map(drop)
}

#[repr(C)]
#[derive(Default)]
struct ElemAttr {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Reads one element into `value`; false when there is none. The caller keeps key and value of the map's sizes.
pub(crate) fn lookup<K, V>(map: &OwnedFd, key: &K, value: &mut V) -> io::Result<bool> {
    let mut attr = ElemAttr { map_fd: map.as_raw_fd() as u32, key: address(key), value: address(value), ..ElemAttr::default() };
    match bpf(MAP_LOOKUP_ELEM, &mut attr) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

pub(crate) fn update<K, V: ?Sized>(map: &OwnedFd, key: &K, value: &V) -> io::Result<()> {
    let mut attr = ElemAttr { map_fd: map.as_raw_fd() as u32, key: address(key), value: address(value), ..ElemAttr::default() };
    bpf(MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// False when there was no such element.
pub(crate) fn delete<K>(map: &OwnedFd, key: &K) -> io::Result<bool> {
    let mut attr = ElemAttr { map_fd: map.as_raw_fd() as u32, key: address(key), ..ElemAttr::default() };
    match bpf(MAP_DELETE_ELEM, &mut attr) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

#[repr(C)]
#[derive(Default)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Writes all elements in one call; where each CPU has its own, an element has that many values.
pub(crate) fn update_batch<K, V>(map: &OwnedFd, keys: &[K], values: &[V]) -> io::Result<()> {
    if keys.is_empty() {
        return Ok(());
    }
    debug_assert!(values.len().is_multiple_of(keys.len()));
    let mut attr = BatchAttr {
        keys: address(keys),
        values: address(values),
        count: keys.len() as u32,
        map_fd: map.as_raw_fd() as u32,
        ..BatchAttr::default()
    };
    bpf(MAP_UPDATE_BATCH, &mut attr).map(drop)
}

/// Deletes all elements in one call, those that there are.
pub(super) fn delete_batch<K>(map: &OwnedFd, mut keys: &[K]) -> io::Result<()> {
    while !keys.is_empty() {
        let mut attr = BatchAttr { keys: address(keys), count: keys.len() as u32, map_fd: map.as_raw_fd() as u32, ..BatchAttr::default() };
        match bpf(MAP_DELETE_BATCH, &mut attr) {
            Ok(_) => return Ok(()),
            // The one after those that were deleted isn't there.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => keys = keys.get(attr.count as usize + 1..).unwrap_or_default(),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Where a batched read goes on.
#[derive(Default)]
pub(crate) struct Cursor {
    token: Option<[u64; 4]>,
}

/// Reads up to `keys.len()` elements; the count, and whether that was the end. Hash maps hand out whole buckets, and answer
/// ENOSPC when one doesn't fit.
pub(crate) fn lookup_batch<K, V>(map: &OwnedFd, cursor: &mut Cursor, keys: &mut [K], values: &mut [V]) -> io::Result<(usize, bool)> {
    let last = cursor.token;
    let mut next = [0_u64; 4];
    let mut attr = BatchAttr {
        in_batch: last.as_ref().map_or(0, address),
        out_batch: &raw mut next as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count: keys.len().min(values.len()) as u32,
        map_fd: map.as_fd().as_raw_fd() as u32,
        ..BatchAttr::default()
    };
    let end = match bpf(MAP_LOOKUP_BATCH, &mut attr) {
        Ok(_) => false,
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
        Err(error) => return Err(error),
    };
    cursor.token = Some(next);
    Ok((attr.count as usize, end))
}

/// Returns when no program runs any more that ran before. Where the kernel has no such call, programs that are so slow may still read
/// what is deleted next.
pub(crate) fn wait_for_programs() {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: the call takes numbers; it waits for an RCU grace period, which programs keep from ending.
    unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
}

/// The clock that the programs use: coarse and monotonic, in nanoseconds.
pub(crate) fn now() -> u64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC_COARSE);
    time.map_or(0, |time| time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}
