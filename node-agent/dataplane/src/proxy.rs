//! The loop: watched changes in, the kernel brought up to date, one backend at a time, switchable while traffic flows.
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use outrigger_desired::{Change, Delta, State, Table, Touched, Watched};
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use crate::backend::{Applied, Backend, BackendError, Parting, Result};
use crate::config::{Config, Mode, ModeChoice};
use crate::health::Checks;
use crate::metrics::Metrics;
use crate::probe::{self, Choice};
use crate::sight::Event;

/// The longest pause between attempts after a failed apply.
const MAX_RETRY: Duration = Duration::from_secs(30);
const FIRST_RETRY: Duration = Duration::from_millis(100);

/// How often those who watch are told.
const TELL_INTERVAL: Duration = Duration::from_millis(50);
/// A watcher that is so far behind misses the oldest.
const MAX_EVENTS: usize = 1 << 14;

/// How the proxy is doing, for health endpoints and tests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// Every watched kind has been listed and the kernel has been brought up to it.
    pub synced: bool,
    /// Number of successful applies.
    pub applies: u64,
    /// The last failure, until an apply succeeds.
    pub error: Option<String>,
    /// When the oldest change came that the kernel doesn't have yet.
    pub pending_since: Option<SystemTime>,
    /// When the kernel was last brought up to date.
    pub updated: Option<SystemTime>,
}

/// A change that the kernel doesn't have after this time makes the proxy unhealthy: twice kube-proxy's sync period.
const PATIENCE: Duration = Duration::from_secs(60);

impl Health {
    /// Whether the kernel keeps up with what is watched. While nothing was written yet the proxy is starting, which is no illness.
    pub fn is_healthy(&self, now: SystemTime) -> bool {
        let waiting = self.pending_since.filter(|_| self.updated.is_some());
        waiting.is_none_or(|since| now.duration_since(since).unwrap_or_default() < PATIENCE)
    }
}

/// What a question gets to see of a running proxy.
pub struct View<'a> {
    pub config: &'a Config,
    pub table: &'a Table,
    pub backend: &'a dyn Backend,
}

type Question = Box<dyn FnOnce(&View<'_>) + Send>;

enum Command {
    SetMode(ModeChoice, oneshot::Sender<Result<Choice>>),
    Settle(oneshot::Sender<Health>),
    Ask(Question),
    Stop(Parting, oneshot::Sender<Result<()>>),
}

/// Handle to a running proxy. Dropping it stops the loop and leaves the kernel as it is.
#[derive(Clone)]
pub struct ProxyHandle {
    commands: mpsc::Sender<Command>,
    choice: watch::Receiver<Choice>,
    health: watch::Receiver<Health>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    metrics: Mutex<Metrics>,
    /// Where those who watch are told; `None` while nobody does.
    watchers: Mutex<Option<broadcast::Sender<Event>>>,
}

pub struct Proxy {
    config: Config,
    backend: Box<dyn Backend>,
    state: State,
    table: Table,
    touched: Touched,
    awaited: Awaited,
    /// The kernel's content isn't what `table` says: the next delta is full.
    unknown: bool,
    retry: Duration,
    /// What former agents left in other modes has been looked for.
    alone: bool,
    /// When the last apply ended; see `Config::min_sync_period`.
    last_sync: Option<Instant>,
    choice: watch::Sender<Choice>,
    health: watch::Sender<Health>,
    checks: Checks,
    shared: Arc<Shared>,
}

/// The kinds whose first list hasn't come yet. Nothing is written, so nothing is deleted, before all have.
struct Awaited {
    services: bool,
    slices: bool,
    node: bool,
    pods: bool,
}

impl Awaited {
    fn arrived(&mut self, change: &Change) {
        match change {
            Change::Service(Watched::Replaced(_)) => self.services = false,
            Change::EndpointSlice(Watched::Replaced(_)) => self.slices = false,
            Change::Node(Watched::Replaced(_)) => self.node = false,
            Change::Pod(Watched::Replaced(_)) => self.pods = false,
            _ => {}
        }
    }

    fn any(&self) -> bool {
        self.services || self.slices || self.node || self.pods
    }
}

impl Proxy {
    /// Probes, opens the backend, reads the kernel back and starts the loop. `changes` carries all four watched kinds, each
    /// beginning with its whole list.
    pub async fn start(config: Config, changes: mpsc::UnboundedReceiver<Change>) -> Result<ProxyHandle> {
        let (choice, backend) = probe::probe(&config, config.mode, None)?;
        let mut backend = backend.ok_or_else(|| BackendError::failed("choose a proxy mode", "none was opened"))?;
        restore(&mut *backend, &choice).await?;
        Ok(Self::run_with(config, choice, backend, changes))
    }

    fn run_with(config: Config, choice: Choice, backend: Box<dyn Backend>, changes: mpsc::UnboundedReceiver<Change>) -> ProxyHandle {
        let (commands, inbox) = mpsc::channel(4);
        let shared = Arc::new(Shared::default());
        let health = watch::Sender::new(Health::default());
        let checks = Checks::new(&config.nodeport_addresses, health.subscribe());
        let proxy = Self {
            state: State::new(&config.node_name),
            config,
            backend,
            table: Table::default(),
            touched: Touched::default(),
            awaited: Awaited { services: true, slices: true, node: true, pods: true },
            unknown: true,
            retry: FIRST_RETRY,
            alone: false,
            last_sync: None,
            choice: watch::Sender::new(choice),
            health,
            checks,
            shared: shared.clone(),
        };
        let handle = ProxyHandle { commands, choice: proxy.choice.subscribe(), health: proxy.health.subscribe(), shared };
        tokio::spawn(proxy.run(changes, inbox));
        handle
    }

    async fn run(mut self, mut changes: mpsc::UnboundedReceiver<Change>, mut inbox: mpsc::Receiver<Command>) {
        let mut wake_at: Option<Instant> = None;
        let mut watching = true;
        loop {
            let wake = async {
                match wake_at {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                command = inbox.recv() => match command {
                    None => return,
                    Some(Command::Stop(parting, reply)) => {
                        // The caller may be gone; there is nobody else to tell.
                        let _ = reply.send(self.backend.teardown(parting).await);
                        return;
                    }
                    Some(Command::SetMode(wanted, reply)) => {
                        let _ = reply.send(self.switch(wanted).await);
                    }
                    Some(Command::Settle(reply)) => {
                        let since = Instant::now();
                        while let Ok(change) = changes.try_recv() {
                            self.take(&change);
                        }
                        wake_at = self.sync(since).await;
                        self.backend.finish().await;
                        let _ = reply.send(self.health.borrow().clone());
                    }
                    Some(Command::Ask(question)) => {
                        question(&View { config: &self.config, table: &self.table, backend: &*self.backend });
                    }
                },
                change = changes.recv(), if watching => match change {
                    Some(change) => {
                        let since = Instant::now();
                        self.take(&change);
                        // What piled up during the last apply goes in one step; a lone change goes at once.
                        while let Ok(change) = changes.try_recv() {
                            self.take(&change);
                        }
                        wake_at = self.sync(since).await;
                    }
                    // The watches are over (the agent is stopping); traffic is carried on by what is in the kernel.
                    None => watching = false,
                },
                () = wake => wake_at = self.sync(Instant::now()).await,
            }
        }
    }

    fn take(&mut self, change: &Change) {
        self.awaited.arrived(change);
        let mut touched = self.state.apply(change);
        touched.warnings.drain(..).for_each(|warning| tracing::warn!("{warning}"));
        if touched.is_empty() {
            return;
        }
        self.touched.merge(touched);
        self.metrics(|metrics| metrics.received(change));
        if self.health.borrow().pending_since.is_none() {
            self.health.send_modify(|health| health.pending_since = Some(SystemTime::now()));
        }
    }

    /// Brings the kernel up to date; says when to come back.
    async fn sync(&mut self, since: Instant) -> Option<Instant> {
        if self.awaited.any() || (self.touched.is_empty() && !self.unknown) {
            return self.tidy().await;
        }
        if let Some(earliest) = self.last_sync.map(|last| last + self.config.min_sync_period)
            && earliest > Instant::now()
        {
            return Some(earliest);
        }
        let touched = std::mem::take(&mut self.touched);
        let table = &mut self.table;
        let delta = if self.unknown { table.update_unknown(&self.state, &touched) } else { table.update(&self.state, &touched) };
        self.checks.settle(self.table.health_checks());
        if delta.is_empty() {
            self.metrics(Metrics::settled);
            self.updated();
            return self.tidy().await;
        }
        self.apply(&delta, since).await
    }

    async fn apply(&mut self, delta: &Delta, since: Instant) -> Option<Instant> {
        match self.backend.apply(&self.table, delta).await {
            Ok(applied) => {
                self.unknown = false;
                self.retry = FIRST_RETRY;
                self.last_sync = Some(Instant::now());
                self.report(delta, &applied, since.elapsed());
                self.retire_former().await;
                self.tidy().await
            }
            Err(error) => {
                tracing::error!(mode = %self.backend.mode(), %error, retry_in = ?self.retry, "Service rules not applied");
                self.unknown = true;
                self.health.send_modify(|health| health.error = Some(error.to_string()));
                self.metrics(|metrics| metrics.failures += 1);
                let at = Instant::now() + self.retry;
                self.retry = (self.retry * 2).min(MAX_RETRY);
                Some(at)
            }
        }
    }

    fn report(&self, delta: &Delta, applied: &Applied, took: Duration) {
        tracing::debug!(
            mode = %self.backend.mode(), upserted = applied.upserted, removed = applied.removed, ended = applied.ended,
            frontends = self.table.len(), ?took, "Service rules applied"
        );
        let table = &self.table;
        self.metrics(|metrics| metrics.applied(table, delta, applied, took));
        self.health.send_modify(|health| {
            health.synced = true;
            health.applies += 1;
            health.error = None;
        });
        self.updated();
    }

    fn updated(&self) {
        self.health.send_modify(|health| {
            health.pending_since = None;
            health.updated = Some(SystemTime::now());
        });
    }

    /// An agent that ran in another mode has left that mode in the kernel: once this one carries everything, it has to let go of
    /// new connections, as in a switch.
    async fn retire_former(&mut self) {
        if std::mem::replace(&mut self.alone, true) {
            return;
        }
        let former: Vec<Mode> = probe::left(&self.config, self.backend.mode()).collect();
        for mode in former {
            let retired = async {
                let mut backend = probe::open(&self.config, mode)?;
                backend.restore().await?;
                backend.teardown(Parting::Handover).await
            };
            match retired.await {
                Ok(()) => tracing::info!(%mode, "a former agent's mode has been handed over"),
                Err(error) => tracing::warn!(%mode, %error, "a former agent's mode is still in the kernel"),
            }
        }
    }

    async fn tidy(&mut self) -> Option<Instant> {
        let ended = self.backend.ended();
        if ended > 0 {
            tracing::debug!(mode = %self.backend.mode(), ended, "connections of gone backends ended");
            self.metrics(|metrics| metrics.ended += ended as u64);
        }
        self.backend.tidy().await.map(|after| Instant::now() + after)
    }

    /// The new backend takes over whole before the old one lets go of new connections; what lives stays with the old one.
    async fn switch(&mut self, wanted: ModeChoice) -> Result<Choice> {
        let (choice, next) = probe::probe(&self.config, wanted, Some(self.backend.mode()))?;
        if let Some(mut next) = next {
            restore(&mut *next, &choice).await?;
            if !self.awaited.any() {
                next.apply(&self.table, &Delta::full(&self.table)).await?;
            }
            let mut last = std::mem::replace(&mut self.backend, next);
            if let Err(error) = last.teardown(Parting::Handover).await {
                tracing::warn!(mode = %last.mode(), %error, "the former proxy mode left something behind");
            }
            self.metrics(|metrics| metrics.switches += 1);
        }
        self.choice.send_replace(choice.clone());
        Ok(choice)
    }

    fn metrics(&self, change: impl FnOnce(&mut Metrics)) {
        change(&mut self.shared.metrics.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    }
}

async fn restore(backend: &mut dyn Backend, choice: &Choice) -> Result<()> {
    let restored = backend.restore().await?;
    tracing::info!(mode = %choice.mode, reason = %choice.reason, found = restored.frontends, "proxy mode chosen");
    Ok(())
}

/// Tells the watchers until none is left.
async fn tell(proxy: ProxyHandle) {
    let mut ticks = tokio::time::interval(TELL_INTERVAL);
    loop {
        ticks.tick().await;
        let asked = proxy.ask(|view| view.backend.events(view.table)).await;
        let mut watchers = proxy.shared.watchers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let Some(sender) = watchers.as_ref().filter(|sender| sender.receiver_count() > 0 && asked.is_some()) else {
            *watchers = None;
            break;
        };
        match asked {
            // Each may have gone meanwhile.
            Some(Ok(events)) => events.into_iter().for_each(|event| _ = sender.send(event)),
            Some(Err(error)) => tracing::warn!(%error, "those who watch connections miss some"),
            None => {}
        }
    }
    proxy.ask(|view| view.backend.quiet()).await;
}

impl ProxyHandle {
    pub fn choice(&self) -> Choice {
        self.choice.borrow().clone()
    }

    /// The choice as it changes.
    pub fn choices(&self) -> watch::Receiver<Choice> {
        self.choice.clone()
    }

    pub fn mode(&self) -> Mode {
        self.choice.borrow().mode
    }

    pub fn health(&self) -> Health {
        self.health.borrow().clone()
    }

    pub fn metrics(&self) -> Metrics {
        self.shared.metrics.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// Has the loop answer a question about what it holds, between two of its steps; `None` when it has stopped.
    pub async fn ask<T: Send + 'static>(&self, question: impl FnOnce(&View<'_>) -> T + Send + 'static) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        let question: Question = Box::new(move |view| {
            // Who asked may have gone away.
            let _ = reply.send(question(view));
        });
        self.commands.send(Command::Ask(question)).await.ok()?;
        answer.await.ok()
    }

    /// What happens to connections from now on. One task asks the backend in use for all who watch, for as long as somebody does.
    pub fn watch(&self) -> broadcast::Receiver<Event> {
        let mut watchers = self.shared.watchers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(sender) = &*watchers {
            return sender.subscribe();
        }
        let (sender, receiver) = broadcast::channel(MAX_EVENTS);
        *watchers = Some(sender);
        tokio::spawn(tell(self.clone()));
        receiver
    }

    /// Resolves once the kernel carries what was listed first.
    pub async fn synced(&self) {
        // An error means that the loop has ended; then there is nothing to wait for.
        let _ = self.health.clone().wait_for(|health| health.synced).await;
    }

    /// A receiver that changes whenever the kernel has been brought up to date.
    pub fn watch_health(&self) -> watch::Receiver<Health> {
        self.health.clone()
    }

    /// Resolves once everything that was sent before is in the kernel, or has failed to get there, and connections of gone backends
    /// have been ended.
    pub async fn settle(&self) -> Health {
        let (reply, answer) = oneshot::channel();
        if self.commands.send(Command::Settle(reply)).await.is_err() {
            return self.health();
        }
        answer.await.unwrap_or_else(|_| self.health())
    }

    /// Switches while traffic flows; live connections go on.
    pub async fn set_mode(&self, wanted: ModeChoice) -> Result<Choice> {
        let (reply, answer) = oneshot::channel();
        let stopped = || BackendError::failed("switch the proxy mode", "the proxy has stopped");
        self.commands.send(Command::SetMode(wanted, reply)).await.map_err(|_| stopped())?;
        answer.await.map_err(|_| stopped())?
    }

    /// Stops the loop and takes everything out of the kernel.
    pub async fn teardown(&self) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        if self.commands.send(Command::Stop(Parting::Final, reply)).await.is_err() {
            return Ok(());
        }
        answer.await.unwrap_or(Ok(()))
    }
}
