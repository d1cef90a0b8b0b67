//! The object that `cargo xtask build-ebpf` made, loaded with maps of the needed sizes or with pinned ones.
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use aya::{Ebpf, EbpfLoader};

use crate::backend::{BackendError, Result};

static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("OUTRIGGER_BPF_OBJECT"));

const NOT_BUILT: &str = "built without its eBPF programs: run `cargo xtask build-ebpf` and build again";
const OUTDATED: &str = "built with eBPF programs of another version: run `cargo xtask build-ebpf` and build again";

/// How many elements the maps of the table have room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    pub frontends: u32,
    pub slots: u32,
    pub services: u32,
    /// Blocks of Maglev tables: 2 KiB for a set of up to 10 backends, 16 KiB up to 81, 128 KiB beyond.
    pub maglev: u32,
}

impl Sizes {
    /// Maglev tables take room once there are any.
    pub const INITIAL: Self = Self { frontends: 1 << 14, slots: 1 << 16, services: 1 << 14, maglev: 0 };
}

/// The maps of maps that hold the table.
const TABLE_MAPS: [&str; 5] = ["frontends", "cluster_ips", "slots", "counters", "maglev"];
/// Maps of one size, with how many elements they hold.
const FIXED_MAPS: [(&str, u32); 13] = [
    ("node_addresses", 4096),
    ("source_ranges", 1 << 16),
    ("affinity", 1 << 15),
    ("datagrams", 1 << 15),
    // Backends of Services that ask for the one with the fewest connections.
    ("connections", 1 << 13),
    ("peers", 0),
    ("uplinks", 64),
    ("activity", 0),
    // Two for each connection from outside.
    ("flows", 1 << 16),
    // Datagrams whose parts are on their way.
    ("fragments", 1 << 12),
    // One for each backend that was used: its memory is taken when it is.
    ("traffic", 1 << 16),
    ("drops", 1 << 16),
    ("watched", 1),
];
/// The ring buffer, with its size in bytes: what happens between two looks of a listener.
pub const EVENTS: (&str, u32) = ("events", 1 << 19);

/// Where classic tc filters of ours hang.
const FILTER_HANDLE: u16 = 0x4f52;

/// Why the object that was built in can't be used, when it can't.
pub fn unusable() -> Option<&'static str> {
    flaw(OBJECT, &outrigger_abi::MARKER)
}

pub(crate) fn flaw(object: &[u8], marker: &[u8]) -> Option<&'static str> {
    if object.is_empty() {
        return Some(NOT_BUILT);
    }
    (!object.windows(marker.len()).any(|window| window == marker)).then_some(OUTDATED)
}

/// Programs in the kernel, attached to nothing yet. Dropping them leaves what was attached and pinned.
pub struct Programs {
    ebpf: Ebpf,
}

impl Programs {
    /// Loads the programs around the maps pinned in `folder`; maps that aren't there yet are made and pinned.
    pub fn load(folder: &Path, host_namespace: u64) -> Result<Self> {
        let mut loader = EbpfLoader::new();
        TABLE_MAPS.into_iter().for_each(|name| _ = loader.map_pin_path(name, folder.join(name)));
        for (name, size) in FIXED_MAPS.into_iter().chain([EVENTS]) {
            loader.map_pin_path(name, folder.join(name));
            if size != 0 {
                loader.map_max_entries(name, size);
            }
        }
        if let Some(reason) = unusable() {
            return Err(BackendError::failed("load the eBPF programs", reason));
        }
        Self::load_object(loader.override_global("HOST_NAMESPACE", &host_namespace, true), OBJECT)
    }

    pub(crate) fn load_object(loader: &mut EbpfLoader<'_>, object: &[u8]) -> Result<Self> {
        let failed = |what: String, error: &dyn std::error::Error| BackendError::failed(what, chain(error));
        let mut ebpf = loader.load(object).map_err(|error| failed("load the eBPF object".into(), &error))?;
        for (name, program) in ebpf.programs_mut() {
            let loaded = match program {
                aya::programs::Program::CgroupSockAddr(program) => program.load(),
                aya::programs::Program::CgroupSock(program) => program.load(),
                aya::programs::Program::SchedClassifier(program) => program.load(),
                aya::programs::Program::SockOps(program) => program.load(),
                _ => continue,
            };
            loaded.map_err(|error| failed(format!("load the eBPF program {name}"), &error))?;
        }
        Ok(Self { ebpf })
    }

    /// Hangs a packet program on an interface by the classic tc filter, in the former one's place.
    pub fn attach_classic(&mut self, name: &str, interface: &str, ingress: bool, priority: u16) -> Result<()> {
        use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcAttachType, TcError, TcHandle, qdisc_add_clsact};
        let failed = |error: &dyn std::error::Error| {
            BackendError::failed(format!("attach the eBPF program {name} to the interface {interface} by a tc filter"), chain(error))
        };
        match qdisc_add_clsact(interface) {
            Err(TcError::AlreadyAttached) | Ok(()) => {}
            Err(error) => return Err(failed(&error)),
        }
        let program: &mut aya::programs::SchedClassifier = self
            .ebpf
            .program_mut(name)
            .ok_or_else(|| BackendError::failed("find an eBPF program", format!("the object has no {name}")))?
            .try_into()
            .map_err(|error: aya::programs::ProgramError| failed(&error))?;
        let direction = if ingress { TcAttachType::Ingress } else { TcAttachType::Egress };
        let handle = TcHandle::new(0, FILTER_HANDLE);
        let options = NlOptions { priority, handle, classid: None };
        let link = match program.attach_with_options(interface, direction, TcAttachOptions::Netlink(options)) {
            Ok(link) => link,
            // A former agent's: replaced in place.
            Err(_) => {
                let former = SchedClassifierLink::attached(interface, direction, priority, handle, None).map_err(|error| failed(&error))?;
                program.attach_to_link(former).map_err(|error| failed(&error))?
            }
        };
        // The filter stays when this agent goes.
        std::mem::forget(program.take_link(link).map_err(|error| failed(&error))?);
        Ok(())
    }

    /// Takes a packet program off an interface, where it hangs there by a classic tc filter.
    pub(crate) fn detach_classic(interface: &str, ingress: bool, priority: u16) {
        use aya::programs::links::Link;
        use aya::programs::tc::{SchedClassifierLink, TcAttachType, TcHandle};
        let direction = if ingress { TcAttachType::Ingress } else { TcAttachType::Egress };
        // Where there is no filter there is nothing to do.
        if let Ok(link) = SchedClassifierLink::attached(interface, direction, priority, TcHandle::new(0, FILTER_HANDLE), None) {
            let _ = link.detach();
        }
    }

    pub fn program(&self, name: &str) -> Result<BorrowedFd<'_>> {
        let missing = || BackendError::failed("find an eBPF program", format!("the object has no {name}"));
        let program = self.ebpf.program(name).ok_or_else(missing)?;
        let fd = match program {
            aya::programs::Program::CgroupSockAddr(program) => program.fd(),
            aya::programs::Program::CgroupSock(program) => program.fd(),
            aya::programs::Program::SchedClassifier(program) => program.fd(),
            aya::programs::Program::SockOps(program) => program.fd(),
            _ => return Err(missing()),
        };
        fd.map(|fd| fd.as_fd()).map_err(|error| BackendError::failed(format!("find the eBPF program {name}"), chain(&error)))
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        source = error.source();
    }
    text
}
