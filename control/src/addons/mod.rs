//! Keeps the objects in `kube-system` and the roles that every node relies on: what is deleted or changed comes back.
mod manifests;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use kube::Client;
use outrigger_controllers::Informers;
use serde_json::Value;
use tokio::sync::Notify;
use tracing::{info, warn};

/// A change that no watch told of is found by looking again after this time.
const RECHECK: Duration = Duration::from_secs(60);
/// How soon a failed pass is tried again: at first, and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

/// An object to keep, by its collection's path and its name.
pub struct Addon {
    pub collection: &'static str,
    pub name: &'static str,
    pub object: Value,
}

/// Which address of the Service range answers DNS: upstream's installers take the tenth.
pub fn dns_address(range: &IpNet) -> Option<IpAddr> {
    match range {
        IpNet::V4(range) => {
            Some(IpAddr::V4((u32::from(range.network()).checked_add(10)?).into())).filter(|ip| IpNet::V4(*range).contains(ip))
        }
        IpNet::V6(range) => {
            Some(IpAddr::V6((u128::from(range.network()).checked_add(10)?).into())).filter(|ip| IpNet::V6(*range).contains(ip))
        }
    }
}

/// Applies the addons and keeps them, for ever. `informers` only says when to look.
pub async fn keep(client: Client, informers: Arc<Informers>, service_range: Option<IpNet>) {
    let addons = manifests::all(service_range.as_ref().and_then(dns_address));
    let changed = Arc::new(Notify::new());
    wake_on_changes(&informers, &changed, &addons);
    let mut delay = RETRY.0;
    loop {
        let mut failed = false;
        for addon in &addons {
            match apply(&client, addon).await {
                Ok(None) => {}
                Ok(Some(action)) => info!(addon = addon.name, action, "addon applied"),
                Err(error) => {
                    failed = true;
                    if delay > RETRY.0 * 16 {
                        warn!(addon = addon.name, %error, "can't apply the addon; it is tried again");
                    }
                }
            }
        }
        let pause = if failed { delay } else { RECHECK };
        delay = if failed { (delay * 2).min(RETRY.1) } else { RETRY.0 };
        tokio::select! { () = changed.notified(), if !failed => {}, () = tokio::time::sleep(pause) => {} }
    }
}

fn wake_on_changes(informers: &Informers, changed: &Arc<Notify>, addons: &[Addon]) {
    let names: Vec<&'static str> = addons.iter().map(|addon| addon.name).collect();
    let (wake, kept) = (changed.clone(), names.clone());
    informers.services.on_change(move |old, new| {
        if new.or(old).and_then(|service| service.metadata.name.as_deref()).is_some_and(|name| kept.contains(&name)) {
            wake.notify_one();
        }
    });
    let wake = changed.clone();
    informers.cluster_roles.on_change(move |old, new| {
        if new.or(old).and_then(|role| role.metadata.name.as_deref()).is_some_and(|name| names.contains(&name)) {
            wake.notify_one();
        }
    });
}

/// Creates, corrects or leaves one object; what was done, if anything.
async fn apply(client: &Client, addon: &Addon) -> Result<Option<&'static str>, kube::Error> {
    let path = format!("{}/{}", addon.collection, addon.name);
    let live: Value = match client.request(request("GET", &path, None)?).await {
        Ok(live) => live,
        Err(kube::Error::Api(status)) if status.code == 404 => {
            client.request::<Value>(request("POST", addon.collection, Some(&addon.object))?).await?;
            return Ok(Some("created"));
        }
        Err(error) => return Err(error),
    };
    if covers(&live, &addon.object) {
        return Ok(None);
    }
    match client.request::<Value>(request("PATCH", &path, Some(&addon.object))?).await {
        Ok(_) => Ok(Some("corrected")),
        // A field that can't change (an address, a roleRef): only a new object can be right.
        Err(kube::Error::Api(status)) if status.code == 422 => {
            client.request::<Value>(request("DELETE", &path, None)?).await?;
            client.request::<Value>(request("POST", addon.collection, Some(&addon.object))?).await?;
            Ok(Some("replaced"))
        }
        Err(error) => Err(error),
    }
}

fn request(method: &str, path: &str, body: Option<&Value>) -> Result<http::Request<Vec<u8>>, kube::Error> {
    let content = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
    let body = body.map_or_else(Vec::new, |body| body.to_string().into_bytes());
    let request =
        http::Request::builder().method(method).uri(path).header("accept", "application/json").header("content-type", content).body(body);
    request.map_err(kube::Error::HttpError)
}

/// Whether `live` has all that is wanted; what the server or others added besides is theirs. Lists must be equal
/// in length, since a merge replaces them whole.
fn covers(live: &Value, wanted: &Value) -> bool {
    match (live, wanted) {
        (Value::Object(live), Value::Object(wanted)) => {
            wanted.iter().all(|(key, value)| covers(live.get(key).unwrap_or(&Value::Null), value))
        }
        (Value::Array(live), Value::Array(wanted)) => {
            live.len() == wanted.len() && live.iter().zip(wanted).all(|(live, wanted)| covers(live, wanted))
        }
        (live, wanted) => live == wanted,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn dns_has_the_tenth_address() {
        let cases = [
            ("10.96.0.0/12", Some("10.96.0.10")),
            ("10.0.0.0/24", Some("10.0.0.10")),
            ("fd00::/112", Some("fd00::a")),
            ("10.0.0.0/29", None),
        ];
        for (range, expected) in cases {
            assert_eq!(dns_address(&range.parse().unwrap()).map(|ip| ip.to_string()).as_deref(), expected, "{range}");
        }
    }

    #[test]
    fn only_what_is_wanted_must_be_there() {
        let wanted = json!({"metadata": {"labels": {"a": "1"}}, "spec": {"ports": [{"port": 53}]}});
        let live = json!({"metadata": {"uid": "x", "labels": {"a": "1", "b": "2"}}, "spec": {"ports": [{"port": 53, "targetPort": 53}]}});
        assert!(covers(&live, &wanted));
        assert!(!covers(&json!({"metadata": {"labels": {"a": "2"}}, "spec": {"ports": [{"port": 53}]}}), &wanted));
        assert!(!covers(&json!({"metadata": {"labels": {"a": "1"}}, "spec": {"ports": []}}), &wanted));
    }

    #[test]
    fn without_an_address_for_dns_there_is_no_dns_service() {
        let names = |address: Option<&str>| {
            manifests::all(address.map(|ip| ip.parse().unwrap())).iter().map(|addon| addon.name).collect::<Vec<_>>()
        };
        assert_eq!(names(Some("10.96.0.10")), ["outrigger:node-agent", "outrigger:node-agent", "kube-dns"]);
        assert_eq!(names(None), ["outrigger:node-agent", "outrigger:node-agent"]);
    }
}
