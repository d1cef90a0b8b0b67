//! Aggregated API servers: groups and versions that an APIService gives to a server behind a Service. Their requests are passed on with the
//! caller's name in headers that the front-proxy's certificate vouches for; their discovery and OpenAPI join this server's own.

pub mod available;
pub mod local;
mod proxy;

use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};

use base64::Engine as _;
use outrigger_access::pki::Identity;
use outrigger_api::resource::compare_versions;
use outrigger_api::{Catalog, Status, meta};
use rustls::ClientConfig;
use serde_json::{Map, Value};

use crate::cache::split_key;
use crate::engine::Engine;
use crate::feed::Listener;
use crate::proxy::{Trust, client_tls};

pub use proxy::pass_on;

pub const GROUP: &str = "apiregistration.k8s.io";
pub const PLURAL: &str = "apiservices";
pub const PREFIX: &str = "apiregistration.k8s.io/apiservices";

/// One group and version served elsewhere.
#[derive(Debug)]
pub struct Remote {
    /// The APIService's name.
    pub name: String,
    pub group: String,
    pub version: String,
    pub namespace: String,
    pub service: String,
    pub port: u16,
    group_priority: i64,
    version_priority: i64,
    available: bool,
    /// How its server is trusted; or why it can't be.
    tls: Result<Arc<ClientConfig>, String>,
}

impl Remote {
    pub fn is_available(&self) -> bool {
        self.available
    }
}

/// What a remote server said of itself when it was last asked.
#[derive(Debug, Default, PartialEq)]
pub struct Found {
    /// Its resources as aggregated discovery shows them.
    pub resources: Vec<Value>,
    /// Where its v3 document is, with its hash.
    pub openapi_v3: Option<String>,
    /// Its part of the v2 document.
    pub definitions: Map<String, Value>,
    pub paths: Map<String, Value>,
}

/// Findings by APIService.
pub type AllFound = BTreeMap<String, Arc<Found>>;

pub struct Aggregator {
    identity: Identity,
    remotes: RwLock<Arc<Vec<Arc<Remote>>>>,
    found: RwLock<Arc<AllFound>>,
}

impl Aggregator {
    /// `identity` is the front-proxy client's.
    pub fn new(identity: Identity) -> Self {
        Self { identity, remotes: RwLock::default(), found: RwLock::default() }
    }

    pub fn remotes(&self) -> Arc<Vec<Arc<Remote>>> {
        self.remotes.read().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    pub fn found(&self) -> Arc<AllFound> {
        self.found.read().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    /// Whether another server has the group and version.
    pub fn serves(&self, catalog: &Catalog, group: &str, version: &str) -> bool {
        !catalog.versions(group).contains(&version) && self.remote(group, version).is_some()
    }

    fn remote(&self, group: &str, version: &str) -> Option<Arc<Remote>> {
        self.remotes().iter().find(|remote| remote.group == group && remote.version == version).cloned()
    }

    fn read(&self, object: &Value) -> Remote {
        let spec = &object["spec"];
        let available = meta::items(object, "status.conditions").iter().any(|c| c["type"] == "Available" && c["status"] == "True");
        Remote {
            name: meta::name(object).to_string(),
            group: meta::text(spec, "group").to_string(),
            version: meta::text(spec, "version").to_string(),
            namespace: meta::text(spec, "service.namespace").to_string(),
            service: meta::text(spec, "service.name").to_string(),
            port: meta::get(spec, "service.port").as_u64().and_then(|port| u16::try_from(port).ok()).unwrap_or(443),
            group_priority: spec["groupPriorityMinimum"].as_i64().unwrap_or_default(),
            version_priority: spec["versionPriority"].as_i64().unwrap_or_default(),
            available,
            tls: self.tls(spec),
        }
    }

    fn tls(&self, spec: &Value) -> Result<Arc<ClientConfig>, String> {
        let bundle = base64::engine::general_purpose::STANDARD.decode(meta::text(spec, "caBundle")).map_err(|error| error.to_string())?;
        let trust = if spec["insecureSkipTLSVerify"] == true { Ok(Trust::Anybody) } else { Trust::bundle(&bundle) };
        trust.and_then(|trust| client_tls(trust, Some(&self.identity))).map(Arc::new).map_err(|error| error.to_string())
    }

    /// Replaces what is known of one server; the readers' view changes only if that does.
    pub fn learn(&self, name: &str, found: Option<Found>) {
        let mut all = self.found.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        if all.get(name).map(|known| &**known) == found.as_ref() {
            return;
        }
        let mut next = AllFound::clone(&all);
        match found {
            Some(found) => drop(next.insert(name.to_string(), Arc::new(found))),
            None => drop(next.remove(name)),
        }
        *all = Arc::new(next);
    }
}

/// Keeps the aggregator in step with the stored APIServices.
pub struct AggregatorListener(pub Arc<Aggregator>);

impl Listener for AggregatorListener {
    fn changed(&self, key: &str, _revision: u64, value: Option<&[u8]>) {
        let Some((PREFIX, name)) = split_key(key) else { return };
        let object = value.and_then(|bytes| serde_json::from_slice::<Value>(bytes).ok());
        let object = object.filter(|object| meta::get(object, "spec.service").is_object());
        let mut remotes = self.0.remotes.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        if object.is_none() && !remotes.iter().any(|remote| remote.name == name) {
            return;
        }
        let mut next: Vec<Arc<Remote>> = remotes.iter().filter(|remote| remote.name != name).cloned().collect();
        next.extend(object.map(|object| Arc::new(self.0.read(&object))));
        *remotes = Arc::new(next);
    }
}

/// The remote server whose group and version a path lies in; one that is not known yet may come from an APIService just written.
pub async fn serving(engine: &Engine, path: &str) -> Result<Option<Arc<Remote>>, Status> {
    let mut segments = path.split('/').skip(1);
    let (Some("apis"), Some(group), Some(version)) = (segments.next(), segments.next(), segments.next()) else { return Ok(None) };
    let is_local = || engine.catalog().versions(group).contains(&version);
    if is_local() {
        return Ok(None);
    }
    if let Some(remote) = engine.aggregator.remote(group, version) {
        return Ok(Some(remote));
    }
    engine.fresh().await?;
    Ok(engine.aggregator.remote(group, version).filter(|_| !is_local()))
}

/// A served group, of this server, of others, or both.
pub struct Group {
    pub name: String,
    /// Preferred first; with the remote server of those that are not served here.
    pub versions: Vec<(String, Option<Arc<Remote>>)>,
}

/// All groups but the core one, in order of priority.
pub fn groups(engine: &Engine, catalog: &Catalog) -> Vec<Group> {
    // (version priority, version, remote server)
    type Versions = Vec<(i64, String, Option<Arc<Remote>>)>;
    let mut all: BTreeMap<&str, (i64, Versions)> = BTreeMap::new();
    let remotes = engine.aggregator.remotes();
    for group in catalog.groups().filter(|group| !group.is_empty()) {
        let entry = all.entry(group).or_insert((local::group_priority(catalog, group), Vec::new()));
        entry.1.extend(
            catalog.versions(group).iter().map(|version| (local::version_priority(catalog, group, version), version.to_string(), None)),
        );
    }
    for remote in remotes.iter() {
        let entry = all.entry(&remote.group).or_insert((0, Vec::new()));
        entry.0 = entry.0.max(remote.group_priority);
        if !entry.1.iter().any(|(_, version, _)| *version == remote.version) {
            entry.1.push((remote.version_priority, remote.version.clone(), Some(remote.clone())));
        }
    }
    let mut groups: Vec<(i64, Group)> = all
        .into_iter()
        .map(|(name, (priority, mut versions))| {
            versions.sort_by(|left, right| right.0.cmp(&left.0).then_with(|| compare_versions(&right.1, &left.1)));
            let versions = versions.into_iter().map(|(_, version, remote)| (version, remote)).collect();
            (priority, Group { name: name.to_string(), versions })
        })
        .collect();
    groups.sort_by_key(|(priority, _)| -priority);
    groups.into_iter().map(|(_, group)| group).collect()
}
