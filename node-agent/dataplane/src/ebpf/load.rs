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
}

impl Sizes {
    pub const INITIAL: Self = Self { frontends: 1 << 14, slots: 1 << 16, services: 1 << 14 };

    pub fn hold(&self, needed: &Self) -> bool {
        self.frontends >= needed.frontends && self.slots >= needed.slots && self.services >= needed.services
    }

    /// Room for `needed` and a quarter more, never less than before.
    pub fn grown(&self, needed: &Self) -> Self {
        let grow = |have: u32, need: u32| if have >= need { have } else { need.saturating_add(need / 4).next_power_of_two() };
        Self {
            frontends: grow(self.frontends, needed.frontends),
            slots: grow(self.slots, needed.slots),
            services: grow(self.services, needed.services),
        }
    }
}

const TABLE_MAPS: [&str; 4] = ["frontends", "cluster_ips", "slots", "counters"];
/// Maps that outlive a change of size, with how many elements they hold.
const SHARED_MAPS: [(&str, u32); 11] = [
    ("node_addresses", 4096),
    ("source_ranges", 1 << 16),
    ("affinity", 1 << 15),
    ("datagrams", 1 << 15),
    ("peers", 0),
    ("uplinks", 64),
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

/// Where classic tc filters of ours hang: before those that ask for no place of their own.
const FILTER_PRIORITY: u16 = 10;
const FILTER_HANDLE: u16 = 0x4f52;

/// Why the object that was built in can't be used, when it can't.
pub fn unusable() -> Option<&'static str> {
    if OBJECT.is_empty() {
        return Some(NOT_BUILT);
    }
    let marker = outrigger_abi::MARKER;
    (!OBJECT.windows(marker.len()).any(|window| window == marker)).then_some(OUTDATED)
}

/// Programs in the kernel, attached to nothing yet. Dropping them leaves what was attached and pinned.
pub struct Programs {
    ebpf: Ebpf,
}

impl Programs {
    /// Loads the programs around the maps pinned in `tables` and `shared`; maps that aren't there yet are made and pinned.
    pub fn load(tables: &Path, shared: &Path, sizes: &Sizes, host_namespace: u64) -> Result<Self> {
        let mut loader = EbpfLoader::new();
        // There are no more cluster IPs than frontends.
        let sizes = [sizes.frontends, sizes.frontends, sizes.slots, sizes.services];
        for (name, size) in TABLE_MAPS.into_iter().zip(sizes) {
            loader.map_max_entries(name, size).map_pin_path(name, tables.join(name));
        }
        for (name, size) in SHARED_MAPS.into_iter().chain([EVENTS]) {
            loader.map_pin_path(name, shared.join(name));
            if size != 0 {
                loader.map_max_entries(name, size);
            }
        }
        Self::load_with(&mut loader, &host_namespace)
    }

    /// Loads everything unpinned and minimal, to learn whether this kernel takes it.
    pub fn try_load() -> Result<Self> {
        let mut loader = EbpfLoader::new();
        for (name, _) in SHARED_MAPS.into_iter().filter(|(_, size)| *size != 0) {
            loader.map_max_entries(name, 64);
        }
        TABLE_MAPS.into_iter().for_each(|name| _ = loader.map_max_entries(name, 64));
        Self::load_with(&mut loader, &0)
    }

    fn load_with<'a>(loader: &mut EbpfLoader<'a>, host_namespace: &'a u64) -> Result<Self> {
        if let Some(reason) = unusable() {
            return Err(BackendError::failed("load the eBPF programs", reason));
        }
        let failed = |what: String, error: &dyn std::error::Error| BackendError::failed(what, chain(error));
        let mut ebpf = loader
            .override_global("HOST_NAMESPACE", host_namespace, true)
            .load(OBJECT)
            .map_err(|error| failed("load the eBPF object".into(), &error))?;
        for (name, program) in ebpf.programs_mut() {
            let loaded = match program {
                aya::programs::Program::CgroupSockAddr(program) => program.load(),
                aya::programs::Program::SchedClassifier(program) => program.load(),
                aya::programs::Program::SockOps(program) => program.load(),
                _ => continue,
            };
            loaded.map_err(|error| failed(format!("load the eBPF program {name}"), &error))?;
        }
        Ok(Self { ebpf })
    }

    /// Hangs a packet program on an interface by the classic tc filter, in the former one's place.
    pub fn attach_classic(&mut self, name: &str, interface: &str, ingress: bool) -> Result<()> {
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
        let (priority, handle) = (FILTER_PRIORITY, TcHandle::new(0, FILTER_HANDLE));
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

    pub fn program(&self, name: &str) -> Result<BorrowedFd<'_>> {
        let missing = || BackendError::failed("find an eBPF program", format!("the object has no {name}"));
        let program = self.ebpf.program(name).ok_or_else(missing)?;
        let fd = match program {
            aya::programs::Program::CgroupSockAddr(program) => program.fd(),
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
