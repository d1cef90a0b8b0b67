//! Pins and links: what holds the programs in their places while no agent runs.
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, CGROUP2_SUPER_MAGIC, statfs};

use super::load::Programs;
use super::sys;
use crate::backend::{BackendError, Result};

/// The hooks of the cgroup: program, and `enum bpf_attach_type`.
const HOOKS: [(&str, u32); 10] = [
    ("sock_ops", 3),
    // Replies are translated back before requests are led anywhere.
    ("recvmsg4", 19),
    ("recvmsg6", 20),
    ("getpeername4", 29),
    ("getpeername6", 30),
    ("connect4", 10),
    ("connect6", 11),
    ("sendmsg4", 14),
    ("sendmsg6", 15),
    ("release", 34),
];

/// A node's folder in the bpf file system.
#[derive(Clone, Debug)]
pub struct Pins {
    root: PathBuf,
}

impl Pins {
    /// Mounts the bpf file system where it is missing, and makes the folders.
    pub fn open(root: &Path) -> Result<Self> {
        Self::mount(root)?;
        // Another layout's maps aren't touched until this one has taken over.
        let pins = Self::at(root);
        create_folder(&pins.links())?;
        create_folder(&pins.maps())?;
        Ok(pins)
    }

    /// Names the places without looking at them.
    pub fn at(root: &Path) -> Self {
        Self { root: root.to_path_buf() }
    }

    /// Mounts the bpf file system that `root` is to be in, where that is missing.
    pub fn mount(root: &Path) -> Result<()> {
        mount_bpf_fs(root)
    }

    fn version(&self) -> PathBuf {
        self.root.join(format!("v{}", outrigger_abi::VERSION))
    }

    pub fn links(&self) -> PathBuf {
        self.root.join("links")
    }

    pub fn maps(&self) -> PathBuf {
        self.version().join("maps")
    }

    /// Of the programs that police pods; they outlive the Service path.
    pub fn policy(&self) -> PathBuf {
        self.root.join("policy")
    }

    /// What agents of another layout left.
    pub fn remove_other_versions(&self) -> Result<()> {
        let keep = [self.version(), self.links(), self.policy()];
        for path in children(&self.root)? {
            if !keep.contains(&path) {
                remove_folder(&path)?;
            }
        }
        Ok(())
    }

    /// Forgets the maps of this layout.
    pub fn remove_maps(&self) -> Result<()> {
        remove_folder(&self.version())
    }

    /// Detaches everything and forgets every map.
    pub fn remove(&self) -> Result<()> {
        for path in children(&self.links())? {
            detach(&path)?;
        }
        for path in children(&self.root)?.into_iter().filter(|path| *path != self.policy()) {
            remove_folder(&path)?;
        }
        self.remove_root()
    }

    /// Goes with the last that is in it.
    pub fn remove_root(&self) -> Result<()> {
        match fs::remove_dir(&self.root) {
            Err(error) if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => {
                Err(BackendError::kernel(format!("remove {}", self.root.display()), error))
            }
            _ => Ok(()),
        }
    }
}

/// Ends a pinned link at once; others may hold it too.
pub(crate) fn detach(pin: &Path) -> Result<()> {
    let detached = sys::get_pinned(pin).and_then(|link| sys::link_detach(link.as_fd())).and_then(|()| fs::remove_file(pin));
    detached.map_err(|error| BackendError::kernel(format!("detach {}", pin.display()), error))
}

pub(crate) fn create_folder(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(|error| BackendError::kernel(format!("create {}", folder.display()), error))
}

pub(crate) fn children(folder: &Path) -> Result<Vec<PathBuf>> {
    let what = |error| BackendError::kernel(format!("list {}", folder.display()), error);
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(what)?,
    };
    entries.map(|entry| entry.map(|entry| entry.path()).map_err(what)).collect()
}

/// Unpins what is in there; the file system has no recursive removal of its own.
pub(crate) fn remove_folder(folder: &Path) -> Result<()> {
    for path in children(folder)? {
        if path.is_dir() {
            remove_folder(&path)?;
        } else {
            fs::remove_file(&path).map_err(|error| BackendError::kernel(format!("unpin {}", path.display()), error))?;
        }
    }
    match fs::remove_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(BackendError::kernel(format!("remove {}", folder.display()), error)),
        _ => Ok(()),
    }
}

fn mount_bpf_fs(below: &Path) -> Result<()> {
    let is_bpf = |path: &Path| statfs(path).is_ok_and(|found| found.filesystem_type() == BPF_FS_MAGIC);
    if below.ancestors().any(is_bpf) {
        return Ok(());
    }
    let target = Path::new("/sys/fs/bpf");
    if !below.starts_with(target) {
        return Err(BackendError::failed("prepare the folder for pinned maps", format!("{} is in no bpf file system", below.display())));
    }
    mount(Some("bpffs"), target, Some("bpf"), MsFlags::empty(), None::<&str>)
        .map_err(|error| BackendError::kernel("mount the bpf file system on /sys/fs/bpf", error.into()))
}

/// Opens the node's cgroup2 folder.
pub fn open_cgroup(path: &Path) -> Result<File> {
    let what = || format!("open the node's cgroup2 folder {}", path.display());
    let found = statfs(path).map_err(|error| BackendError::kernel(what(), error.into()))?;
    if found.filesystem_type() != CGROUP2_SUPER_MAGIC {
        return Err(BackendError::failed(what(), "it is in no cgroup2 file system"));
    }
    File::open(path).map_err(|error| BackendError::kernel(what(), error))
}

/// Puts the programs in their places, each in the former one's stead by one atomic step.
pub fn attach_cgroup(programs: &Programs, cgroup: &File, pins: &Pins) -> Result<()> {
    let id = cgroup.metadata().map_err(|error| BackendError::kernel("read the cgroup's id", error))?.ino();
    for (hook, attach_type) in HOOKS {
        let program = programs.program(&format!("outrigger_{hook}"))?;
        let pin = pins.links().join(hook);
        attach(program, cgroup.as_raw_fd() as u32, attach_type, 0, &pin, |info| info.target == id)
            .map_err(|error| BackendError::kernel(format!("attach the eBPF program {hook} to the node's cgroup"), error))?;
    }
    Ok(())
}

/// An interface of the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub index: u32,
}

/// A hook of an interface, and the program for it.
pub(crate) struct InterfaceHook {
    pub name: &'static str,
    pub ingress: bool,
    /// Where among the programs of the hook: `sys::FIRST` or `sys::LAST`.
    pub place: u32,
    /// The same among classic filters, which run by their priority.
    pub priority: u16,
}

/// Answers are renamed before requests are led anywhere. Pods are policed by the addresses behind Services: between.
const INTERFACE_HOOKS: [InterfaceHook; 2] = [
    InterfaceHook { name: "leave", ingress: false, place: sys::LAST, priority: 10 },
    InterfaceHook { name: "arrive", ingress: true, place: sys::FIRST, priority: 10 },
];

/// Puts a program on an interface, and pins it there. False when the interface has gone meanwhile. To be called in the node's network
/// namespace.
pub(crate) fn attach_interface(programs: &mut Programs, interface: &Interface, hook: &InterfaceHook, pin: &Path) -> Result<bool> {
    /// `enum bpf_attach_type`.
    const TCX_INGRESS: u32 = 46;
    const TCX_EGRESS: u32 = 47;
    let name = format!("outrigger_{}", hook.name);
    let attach_type = if hook.ingress { TCX_INGRESS } else { TCX_EGRESS };
    // The low half of the target is the interface's index.
    let is_target = |info: &sys::LinkInfo| info.target as u32 == interface.index;
    match attach(programs.program(&name)?, interface.index, attach_type, hook.place, pin, is_target) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(false),
        // Before Linux 6.6 there are no links to interfaces.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            programs.attach_classic(&name, &interface.name, hook.ingress, hook.priority).map(|()| true)
        }
        Err(error) => {
            Err(BackendError::kernel(format!("attach the eBPF program {} to the interface {}", hook.name, interface.name), error))
        }
    }
}

/// Puts the packet programs on interfaces, and forgets interfaces that are gone. To be called in the node's network namespace.
pub fn attach_interfaces(programs: &mut Programs, interfaces: &[Interface], pins: &Pins) -> Result<()> {
    let pin_of = |interface: &Interface, hook: &InterfaceHook| pins.links().join(format!("interface_{}_{}", interface.index, hook.name));
    for interface in interfaces {
        for hook in &INTERFACE_HOOKS {
            if !attach_interface(programs, interface, hook, &pin_of(interface, hook))? {
                break;
            }
        }
    }
    let wanted: Vec<_> = interfaces.iter().flat_map(|interface| INTERFACE_HOOKS.iter().map(|hook| pin_of(interface, hook))).collect();
    for path in children(&pins.links())? {
        let is_interface = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"interface_"));
        if is_interface && !wanted.contains(&path) {
            fs::remove_file(&path).map_err(|error| BackendError::kernel(format!("unpin {}", path.display()), error))?;
        }
    }
    Ok(())
}

fn attach(
    program: BorrowedFd<'_>,
    target: u32,
    attach_type: u32,
    flags: u32,
    pin: &Path,
    is_target: impl Fn(&sys::LinkInfo) -> bool,
) -> io::Result<()> {
    match sys::get_pinned(pin) {
        Ok(link) if is_target(&sys::link_info(link.as_fd())?) => match sys::link_update(link.as_fd(), program) {
            // The cgroup or interface that it hung on is gone, and a new one has its name.
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {}
            result => return result,
        },
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let link = sys::link_create(program, target, attach_type, flags)?;
    match fs::remove_file(pin) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    sys::pin(link.as_fd(), pin)
}
