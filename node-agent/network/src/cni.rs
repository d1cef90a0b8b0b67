//! The CNI plugin, run by the container runtime as a process of its own: environment and stdin in, one JSON document out.
//!
//! Specification 1.1.0; results also in the shapes of 0.3.0 to 1.0.0, which the runtime chooses by `cniVersion`.
//! Host ports are no business of the plugin: the data path knows them from the pods.
mod agent;
pub mod attach;
pub mod message;

use std::collections::HashSet;
use std::io::Read;
use std::path::PathBuf;

use message::{Error, NetConfig, Result, Version};

use crate::ipam::{self, Ipam, Owner, Record};
use crate::netns;

/// The name under which the agent's binary acts as the plugin, and `type` in the configuration.
pub const PLUGIN_NAME: &str = "outrigger-cni";
/// The other plugin that the binary acts as: runtimes run one of this name for every sandbox, whatever the configuration.
pub const LOOPBACK_NAME: &str = "loopback";

/// Whether a program called by this path is to be [`cni_main`].
pub fn is_plugin(called_as: &std::path::Path) -> bool {
    called_as.file_name().is_some_and(|name| name == PLUGIN_NAME || name == LOOPBACK_NAME)
}

/// The runtime's order, from the environment.
struct Order {
    command: String,
    container_id: String,
    namespace: Option<PathBuf>,
    interface: String,
    /// `namespace/name` of the sandbox's pod.
    pod: Option<String>,
}

/// The plugin's `main`: returns the process's exit code.
pub fn cni_main() -> i32 {
    let mut input = Vec::new();
    let read = std::io::stdin().lock().read_to_end(&mut input);
    let (version, result) = match read {
        Ok(_) => run(&input, |name| std::env::var(name).ok()),
        Err(error) => (Version::NEWEST, Err(Error::new(message::IO_FAILURE, "can't read the configuration", error))),
    };
    match result {
        Ok(Some(document)) => {
            println!("{document}");
            0
        }
        Ok(None) => 0,
        Err(error) => {
            println!("{}", error.document(version));
            1
        }
    }
}

/// Carries out one order in the calling thread's network namespace; the version is the one that the answer is to be written in.
pub fn run(input: &[u8], environment: impl Fn(&str) -> Option<String>) -> (Version, Result<Option<serde_json::Value>>) {
    if environment("CNI_COMMAND").as_deref() == Some("VERSION") {
        return (Version::NEWEST, Ok(Some(message::version_document(input))));
    }
    let config = match NetConfig::parse(input) {
        Ok(config) => config,
        Err(error) => return (Version::NEWEST, Err(error)),
    };
    let version = config.version;
    (
        version,
        read_order(environment).and_then(|order| if config.is_loopback { loopback(&order, &config) } else { carry_out(&order, &config) }),
    )
}

fn read_order(environment: impl Fn(&str) -> Option<String>) -> Result<Order> {
    let value = |name: &str| environment(name).filter(|value| !value.is_empty());
    let command = value("CNI_COMMAND").ok_or_else(|| Error::environment("required env variables [CNI_COMMAND] missing"))?;
    let per_interface = matches!(command.as_str(), "ADD" | "DEL" | "CHECK");
    let required: &[&str] = match command.as_str() {
        "ADD" | "CHECK" => &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"],
        "DEL" => &["CNI_CONTAINERID", "CNI_IFNAME"],
        _ => &[],
    };
    let missing: Vec<&str> = required.iter().copied().filter(|name| value(name).is_none()).collect();
    if !missing.is_empty() {
        return Err(Error::environment(format!("required env variables [{}] missing", missing.join(","))));
    }
    let order = Order {
        command,
        container_id: value("CNI_CONTAINERID").unwrap_or_default(),
        namespace: value("CNI_NETNS").map(PathBuf::from),
        interface: value("CNI_IFNAME").unwrap_or_default(),
        pod: value("CNI_ARGS").and_then(|arguments| message::pod_name(&arguments)),
    };
    if per_interface && !message::is_container_id(&order.container_id) {
        return Err(Error::environment("invalid characters in containerID"));
    }
    if per_interface && !message::is_interface_name(&order.interface) {
        return Err(Error::environment(format!("invalid interface name {:?}", order.interface)));
    }
    Ok(order)
}

fn carry_out(order: &Order, config: &NetConfig) -> Result<Option<serde_json::Value>> {
    match order.command.as_str() {
        "ADD" => add(order, config).map(Some),
        "DEL" => delete(order, config).map(|()| None),
        "CHECK" => check(order, config).map(|()| None),
        "GC" => collect(config).map(|()| None),
        "STATUS" => status(config).map(|()| None),
        other => Err(Error::environment(format!("unknown CNI_COMMAND: {other}"))),
    }
}

/// The sandbox's own `lo`: up is all that it has to be.
fn loopback(order: &Order, config: &NetConfig) -> Result<Option<serde_json::Value>> {
    let Some(namespace) = order.namespace.as_deref().filter(|_| matches!(order.command.as_str(), "ADD" | "CHECK")) else { return Ok(None) };
    attach::raise_loopback(namespace)?;
    Ok((order.command == "ADD").then(|| attach::loopback_result(config.version, namespace)))
}

fn add(order: &Order, config: &NetConfig) -> Result<serde_json::Value> {
    status(config)?;
    let owner = Owner::new(&order.container_id, &order.interface);
    let namespace = order.namespace.as_deref().ok_or_else(|| Error::environment("CNI_NETNS is missing"))?;
    let store = Ipam::new(&config.data_dir);
    let agent = config.agent()?;
    let addresses = allocate(&store, config, &Record { owner: owner.clone(), pod: order.pod.clone() })?;
    let plan = attach::Plan::new(&owner, addresses, config.mtu);
    if let Err(error) = attach::connect(&plan, namespace, || agent::admit(agent, &owner)) {
        // A half-made interface must not keep an address; the runtime sends no DEL when it dies here.
        let _ = netns::block_on(attach::delete_link(&plan.host_interface));
        let _ = store.lock().and_then(|store| store.release(&owner));
        return Err(error);
    }
    Ok(plan.result(config.version, namespace))
}

/// When the range is used up, allocations whose interface is gone are taken back before giving up: a runtime that
/// crashed between the two never sent DEL.
fn allocate(store: &Ipam, config: &NetConfig, record: &Record) -> Result<Vec<std::net::IpAddr>> {
    let locked = store.lock()?;
    match locked.allocate(&config.pod_cidrs, record) {
        Err(ipam::Error::Exhausted(_)) => {
            netns::block_on(reclaim(&locked))??;
            Ok(locked.allocate(&config.pod_cidrs, record)?)
        }
        other => Ok(other?),
    }
}

/// Releases addresses whose host interface no longer exists. Young ones are left: their ADD may still be at work.
pub async fn reclaim(store: &ipam::Locked) -> Result<usize> {
    let links = attach::link_names().await?;
    let mut gone = HashSet::new();
    for (address, owner) in store.allocations()? {
        let old = store.age(address).is_none_or(|age| age.as_secs() >= 60);
        if old && !links.contains(&attach::host_interface(&owner)) {
            gone.insert(owner);
        }
    }
    Ok(store.release_where(|owner| gone.contains(owner))?.len())
}

/// Deleting what is not there is a success: the runtime repeats DEL until it gets one.
fn delete(order: &Order, config: &NetConfig) -> Result<()> {
    let owner = Owner::new(&order.container_id, &order.interface);
    netns::block_on(attach::delete_link(&attach::host_interface(&owner)))??;
    Ipam::new(&config.data_dir).lock()?.release(&owner)?;
    agent::tell(config);
    Ok(())
}

fn check(order: &Order, config: &NetConfig) -> Result<()> {
    let owner = Owner::new(&order.container_id, &order.interface);
    let namespace = order.namespace.as_deref().ok_or_else(|| Error::environment("CNI_NETNS is missing"))?;
    let held: Vec<std::net::IpAddr> = {
        let locked = Ipam::new(&config.data_dir).lock()?;
        locked.allocations()?.into_iter().filter(|(_, holder)| *holder == owner).map(|(address, _)| address).collect()
    };
    let expected = match &config.previous {
        Some(previous) => previous.addresses_of(&order.interface),
        None => held.clone(),
    };
    if expected.is_empty() || expected.iter().any(|address| !held.contains(address)) {
        return Err(Error::check(format!("{} holds {held:?}, expected {expected:?}", order.container_id)));
    }
    attach::verify(&attach::Plan::new(&owner, expected, config.mtu), namespace)
}

/// Frees everything that the runtime doesn't list as alive.
fn collect(config: &NetConfig) -> Result<()> {
    let alive: HashSet<Owner> = config.valid_attachments.iter().cloned().collect();
    let store = Ipam::new(&config.data_dir).lock()?;
    let gone: HashSet<Owner> = store.allocations()?.into_values().filter(|owner| !alive.contains(owner)).collect();
    for owner in &gone {
        netns::block_on(attach::delete_link(&attach::host_interface(owner)))??;
    }
    store.release_where(|owner| gone.contains(owner))?;
    drop(store);
    agent::tell(config);
    Ok(())
}

fn status(config: &NetConfig) -> Result<()> {
    if config.pod_cidrs.is_empty() {
        return Err(Error::new(message::NOT_AVAILABLE, "the node has no pod CIDR yet", ""));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(command: &[(&str, &str)], input: &str) -> serde_json::Value {
        let command: std::collections::HashMap<String, String> =
            command.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let (version, result) = run(input.as_bytes(), |name| command.get(name).cloned());
        match result {
            Ok(document) => document.unwrap_or(serde_json::Value::Null),
            Err(error) => error.document(version),
        }
    }

    #[test]
    fn refuses_what_it_cannot_do_with_the_specified_codes() {
        let good = r#"{"cniVersion":"1.0.0","name":"n","type":"outrigger-cni","dataDir":"/nonexistent/x","podCIDRs":[]}"#;
        let add = [("CNI_COMMAND", "ADD"), ("CNI_CONTAINERID", "abc"), ("CNI_NETNS", "/x"), ("CNI_IFNAME", "eth0")];
        let cases: Vec<(&[(&str, &str)], &str, u64)> = vec![
            (&add, "not json", 6),
            (&add, r#"{"cniVersion":"9.0.0","name":"n","type":"t"}"#, 1),
            (&add[..1], good, 4),
            (&[("CNI_COMMAND", "DANCE")], good, 4),
            (&[("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", "../x"), ("CNI_IFNAME", "eth0")], good, 4),
            (&[("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", "abc"), ("CNI_IFNAME", "a/b")], good, 4),
            (&add, good, 50),
            (&add, r#"{"cniVersion":"1.0.0","name":"n","type":"outrigger-cni","dataDir":"/nonexistent/x","podCIDRs":["10.0.0.0/24"]}"#, 7),
            (&[("CNI_COMMAND", "STATUS")], good, 50),
        ];
        for (command, input, code) in cases {
            let document = answer(command, input);
            assert_eq!(document["code"], code, "{command:?} {input}: {document}");
            assert!(document["msg"].as_str().is_some_and(|text| !text.is_empty()));
        }
    }

    #[test]
    fn tells_its_versions() {
        let document = answer(&[("CNI_COMMAND", "VERSION")], r#"{"cniVersion":"1.0.0"}"#);
        assert_eq!(document["cniVersion"], "1.0.0");
        assert_eq!(document["supportedVersions"], serde_json::json!(["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]));
    }
}
