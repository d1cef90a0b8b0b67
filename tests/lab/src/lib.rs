//! The lab: hosts made of namespaces on one machine, for `cargo xtask up`, the end-to-end tests and the benches.
//!
//! A host is a process tree in network, mount, PID, UTS and IPC namespaces of its own, below one cgroup. Its first
//! process ([`init`]) keeps the host's programs running. Hosts hang on a bridge in a namespace (the switch) that has
//! no route out. Nothing of the machine's own network is touched, and nothing needs a name in the file system to
//! live: when the lab's first process dies, the kernel takes processes, mounts, namespaces, interfaces and pinned
//! BPF objects away, and [`Lab::destroy`] removes what is left: cgroups and the lab's directory.
pub mod cgroup;
pub mod host;
pub mod init;
mod lab;
pub mod netns;

pub use host::{Host, HostSpec, Program};
pub use lab::{Lab, LabSpec, Running, SUBNET_PREFIX, SWITCH, check_name};
