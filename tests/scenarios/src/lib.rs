//! One list of Service scenarios, run over every backend in real network namespaces.
//!
//! [`list`] says what must hold, [`world`] builds the namespaces, [`run`] plays a scenario in it. What happens inside a
//! namespace is done by a process of the `outrigger-scenario-host` program ([`host`]), so that it's in the right cgroup too.
pub mod host;
pub mod list;
pub mod netns;
pub mod run;
pub mod talk;
pub mod world;
