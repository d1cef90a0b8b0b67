//! The kubelet: runs the pods bound to this node through the CRI.
pub mod cri;
