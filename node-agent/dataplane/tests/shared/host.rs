//! Another host of a test: a network namespace of its own.
use std::process::Command;
use std::sync::mpsc;

use nix::sched::{CloneFlags, unshare};

pub fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().expect("iproute2");
    assert!(status.success(), "ip {arguments}");
}

/// A network namespace, held by a thread that does what it is told.
pub struct Host {
    /// By it `ip` names the namespace.
    pub thread: i32,
    jobs: mpsc::Sender<Box<dyn FnOnce() + Send>>,
}

impl Host {
    pub fn new() -> Self {
        let (jobs, todo) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        let (ready, thread) = mpsc::channel();
        std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            ip("link set lo up");
            ready.send(nix::unistd::gettid().as_raw()).unwrap();
            todo.into_iter().for_each(|job| job());
        });
        Self { thread: thread.recv().unwrap(), jobs }
    }

    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = mpsc::channel();
        self.jobs.send(Box::new(move || _ = done.send(job()))).unwrap();
        result.recv().expect("the job ends well")
    }

    pub fn ip(&self, commands: &[&str]) {
        let commands: Vec<_> = commands.iter().map(|command| command.to_string()).collect();
        self.run(move || commands.iter().for_each(|command| ip(command)));
    }
}
