//! Images on the node: names, pulling with policy, credentials and back-off.
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod, Secret};
use outrigger_cluster::Writer;
use outrigger_cluster::status::events::Kind;
use tokio::sync::Semaphore;

use crate::cri::{Cri, v1};
use crate::pod::StartError;
use crate::pod::backoff::Backoff;
use crate::pod::meta::{container_reference, uid_of};

/// Pulls under way at the same time, when they aren't serialised.
const PARALLEL_PULLS: usize = 8;

pub struct Images {
    cri: Cri,
    writer: Writer,
    backoff: Backoff,
    last_errors: Mutex<HashMap<(String, String), String>>,
    pulls: Semaphore,
}

/// An image reference in its parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    pub registry: String,
    pub path: String,
    pub tag: Option<String>,
    pub digest: Option<String>,
}

impl Reference {
    /// `[registry/]path[:tag][@digest]`; the error is what upstream's parser says.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let invalid = "invalid reference format";
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest)),
            None => (text, None),
        };
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (rest, None),
        };
        let first = name.split('/').next().unwrap_or_default();
        let has_registry =
            name.contains('/') && (first.contains(['.', ':']) || first == "localhost" || first.chars().any(char::is_uppercase));
        let (registry, path) = match name.split_once('/') {
            Some((registry, path)) if has_registry => (registry.to_owned(), path.to_owned()),
            _ if name.contains('/') => ("docker.io".to_owned(), name.to_owned()),
            _ => ("docker.io".to_owned(), format!("library/{name}")),
        };
        if path.chars().any(char::is_uppercase) {
            return Err("invalid reference format: repository name must be lowercase");
        }
        let component = |part: &str| {
            let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
            edge(part.chars().next())
                && edge(part.chars().last())
                && part.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '_' | '-'))
        };
        let registry_ok = registry.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '[' | ']'));
        let tag_ok = tag.is_none_or(|tag| {
            !tag.is_empty()
                && tag.len() <= 128
                && !tag.starts_with(['.', '-'])
                && tag.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
        });
        let digest_ok = digest.is_none_or(|digest| {
            digest
                .split_once(':')
                .is_some_and(|(kind, hex)| !kind.is_empty() && hex.len() >= 32 && hex.chars().all(|c| c.is_ascii_hexdigit()))
        });
        if !path.split('/').all(component) || !registry_ok || !tag_ok || !digest_ok {
            return Err(invalid);
        }
        Ok(Self { registry, path, tag: tag.map(str::to_owned), digest: digest.map(str::to_owned) })
    }
}

/// The name with `:latest` where it says neither tag nor digest.
fn with_tag(image: &str) -> Result<String, String> {
    let reference = Reference::parse(image).map_err(|error| format!("couldn't parse image name \"{image}\": {error}"))?;
    Ok(if reference.tag.is_none() && reference.digest.is_none() { format!("{image}:latest") } else { image.to_owned() })
}

impl Images {
    pub fn new(cri: Cri, writer: Writer, serialize: bool) -> Self {
        let pulls = Semaphore::new(if serialize { 1 } else { PARALLEL_PULLS });
        Self { cri, writer, backoff: Backoff::default(), last_errors: Mutex::default(), pulls }
    }

    pub fn forget_pod(&self, uid: &str) {
        self.backoff.forget_pod(uid);
        self.last_errors().retain(|(pod, _), _| pod != uid);
    }

    fn last_errors(&self) -> std::sync::MutexGuard<'_, HashMap<(String, String), String>> {
        self.last_errors.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn event(&self, pod: &Pod, container: &Container, kind: Kind, reason: &str, message: String) {
        self.writer.event(&container_reference(pod, &container.name), kind, reason, message);
    }

    /// The runtime's reference of the container's image, pulled where the policy says so.
    pub async fn ensure(
        &self,
        pod: &Pod,
        container: &Container,
        secrets: &[Arc<Secret>],
        sandbox_config: &v1::PodSandboxConfig,
    ) -> Result<String, StartError> {
        let wanted = container.image.clone().unwrap_or_default();
        let image = with_tag(&wanted).map_err(|error| {
            let message = format!("Failed to apply default image tag \"{wanted}\": {error}");
            self.event(pod, container, Kind::Warning, "InspectFailed", message.clone());
            StartError::new("InvalidImageName", message)
        })?;
        let spec = v1::ImageSpec { image: image.clone(), user_specified_image: wanted.clone(), ..v1::ImageSpec::default() };
        let present = self.cri.image_status(spec.clone()).await.map_err(|error| {
            let message = format!("Failed to inspect image \"{wanted}\": {error}");
            self.event(pod, container, Kind::Warning, "InspectFailed", message.clone());
            StartError::new("ImageInspectError", message)
        })?;
        let latest = image.ends_with(":latest");
        let policy = container.image_pull_policy.as_deref().unwrap_or(if latest { "Always" } else { "IfNotPresent" });
        match (policy, present) {
            ("IfNotPresent" | "Never", Some(present)) => {
                let message = format!("Container image \"{wanted}\" already present on machine and can be accessed by the pod");
                self.event(pod, container, Kind::Normal, "Pulled", message);
                Ok(present.id)
            }
            ("Never", None) => {
                let message = format!("Container image \"{wanted}\" is not present with pull policy of Never");
                self.event(pod, container, Kind::Warning, "ErrImageNeverPull", message.clone());
                Err(StartError::new("ErrImageNeverPull", message))
            }
            _ => self.pull(pod, container, spec, secrets, sandbox_config).await,
        }
    }

    async fn pull(
        &self,
        pod: &Pod,
        container: &Container,
        spec: v1::ImageSpec,
        secrets: &[Arc<Secret>],
        sandbox_config: &v1::PodSandboxConfig,
    ) -> Result<String, StartError> {
        let (uid, wanted) = (uid_of(pod), spec.user_specified_image.clone());
        if let Some((left, _)) = self.backoff.remaining_since_advance(uid, &wanted, Timestamp::now()) {
            let mut message = format!("Back-off pulling image \"{wanted}\"");
            self.event(pod, container, Kind::Normal, "BackOff", message.clone());
            if let Some(last) = self.last_errors().get(&(uid.to_owned(), wanted.clone())) {
                message = format!("{message}: {last}");
            }
            return Err(StartError { retry_after: Some(left), ..StartError::new("ImagePullBackOff", message) });
        }
        self.event(pod, container, Kind::Normal, "Pulling", format!("Pulling image \"{wanted}\""));
        let asked = Instant::now();
        // Closed never; a permit always comes.
        let _permit = self.pulls.acquire().await;
        let began = Instant::now();
        match self.pull_with_credentials(&spec, secrets, sandbox_config).await {
            Ok(id) => {
                self.backoff.reset(uid, &wanted);
                self.last_errors().remove(&(uid.to_owned(), wanted.clone()));
                let size = self.cri.image_status(spec).await.ok().flatten().map_or(0, |image| image.size);
                let message = format!(
                    "Successfully pulled image \"{wanted}\" in {} ({} including waiting). Image size: {size} bytes.",
                    millis(began.elapsed()),
                    millis(asked.elapsed())
                );
                self.event(pod, container, Kind::Normal, "Pulled", message);
                Ok(id)
            }
            Err(error) => {
                self.event(pod, container, Kind::Warning, "Failed", format!("Failed to pull image \"{wanted}\": {error}"));
                let now = Timestamp::now();
                let pause = self.backoff.advance(uid, &wanted, now, now);
                self.last_errors().insert((uid.to_owned(), wanted), format!("ErrImagePull: {error}"));
                // Soon looked at again, to show ImagePullBackOff as upstream does on its next pass.
                let soon = pause.min(Duration::from_secs(1));
                Err(StartError { retry_after: Some(soon), ..StartError::new("ErrImagePull", error.to_string()) })
            }
        }
    }

    async fn pull_with_credentials(
        &self,
        spec: &v1::ImageSpec,
        secrets: &[Arc<Secret>],
        sandbox_config: &v1::PodSandboxConfig,
    ) -> crate::cri::Result<String> {
        let mut last = None;
        for auth in credentials(&spec.image, secrets) {
            match self.cri.pull_image(spec.clone(), Some(auth), Some(sandbox_config.clone())).await {
                Ok(reference) => return Ok(reference),
                Err(error) => last = Some(error),
            }
        }
        match last {
            Some(error) => Err(error),
            None => self.cri.pull_image(spec.clone(), None, Some(sandbox_config.clone())).await,
        }
    }
}

/// As Go prints a duration cut to milliseconds.
fn millis(duration: Duration) -> String {
    let millis = duration.as_millis();
    if millis < 1000 {
        return format!("{millis}ms");
    }
    let text = format!("{}.{:03}", millis / 1000, millis % 1000);
    format!("{}s", text.trim_end_matches('0').trim_end_matches('.'))
}

/// The entries of the pull secrets that fit the image's registry, the most specific first.
pub fn credentials(image: &str, secrets: &[Arc<Secret>]) -> Vec<v1::AuthConfig> {
    let Ok(reference) = Reference::parse(image) else { return Vec::new() };
    let mut found: Vec<(usize, v1::AuthConfig)> = Vec::new();
    for secret in secrets {
        let data = secret.data.clone().unwrap_or_default();
        let entries = if let Some(json) = data.get(".dockerconfigjson") {
            serde_json::from_slice::<serde_json::Value>(&json.0).ok().and_then(|config| config.get("auths").cloned())
        } else {
            data.get(".dockercfg").and_then(|json| serde_json::from_slice(&json.0).ok())
        };
        let Some(serde_json::Value::Object(entries)) = entries else { continue };
        for (key, entry) in entries {
            if let (Some(rank), Some(auth)) = (fits(&key, &reference), auth(&entry)) {
                found.push((rank, auth));
            }
        }
    }
    found.sort_by_key(|(rank, _)| std::cmp::Reverse(*rank));
    found.into_iter().map(|(_, auth)| auth).collect()
}

fn auth(entry: &serde_json::Value) -> Option<v1::AuthConfig> {
    let text = |name: &str| entry.get(name).and_then(serde_json::Value::as_str).unwrap_or_default().to_owned();
    let mut auth = v1::AuthConfig { username: text("username"), password: text("password"), ..v1::AuthConfig::default() };
    let encoded = text("auth");
    if !encoded.is_empty() {
        let plain = base64::engine::general_purpose::STANDARD.decode(encoded.trim()).ok()?;
        let plain = String::from_utf8(plain).ok()?;
        let (user, password) = plain.split_once(':')?;
        auth.username = user.into();
        auth.password = password.trim_end_matches('\0').into();
    }
    (!auth.username.is_empty()).then_some(auth)
}

/// How well a registry key (`https://index.docker.io/v1/`, `*.example.com`, `example.com/team`) fits; longer is better.
fn fits(key: &str, reference: &Reference) -> Option<usize> {
    let bare = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let (host, path) = bare.split_once('/').unwrap_or((bare, ""));
    let path = path.trim_end_matches('/');
    let path = if path == "v1" || path == "v2" { "" } else { path };
    let host = if host == "index.docker.io" { "docker.io" } else { host };
    let host_fits = host.split('.').count() == reference.registry.split('.').count()
        && host.split('.').zip(reference.registry.split('.')).all(|(pattern, part)| glob(pattern, part));
    let path_fits = path.is_empty() || reference.path == path || reference.path.starts_with(&format!("{path}/"));
    (host_fits && path_fits).then_some(bare.len())
}

fn glob(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((before, after)) => text.len() >= before.len() + after.len() && text.starts_with(before) && text.ends_with(after),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::ByteString;

    use super::*;

    #[test]
    fn references() {
        let parts = |text: &str| Reference::parse(text).map(|reference| (reference.registry, reference.path, reference.tag));
        assert_eq!(parts("busybox"), Ok(("docker.io".into(), "library/busybox".into(), None)));
        assert_eq!(parts("localhost:5000/a/b:v1"), Ok(("localhost:5000".into(), "a/b".into(), Some("v1".into()))));
        assert_eq!(parts("registry.k8s.io/pause:3.10"), Ok(("registry.k8s.io".into(), "pause".into(), Some("3.10".into()))));
        for bad in ["", "a//b", "Busybox", "a:b:c d", "a@sha256:xyz", "-x", "a/b:"] {
            assert!(Reference::parse(bad).is_err(), "{bad}");
        }
        assert_eq!(with_tag("busybox").unwrap(), "busybox:latest");
        assert_eq!(with_tag("a:1").unwrap(), "a:1");
    }

    #[test]
    fn pull_secrets_fit_by_registry_and_path() {
        let config = r#"{"auths":{"https://index.docker.io/v1/":{"auth":"dTpw"},"*.example.com":{"username":"x","password":"y"},"reg.example.com/team":{"username":"t","password":"y"}}}"#;
        let secret = Secret { data: Some([(".dockerconfigjson".to_owned(), ByteString(config.into()))].into()), ..Secret::default() };
        let users = |image: &str| -> Vec<String> {
            credentials(image, &[Arc::new(secret.clone())]).into_iter().map(|auth| format!("{}:{}", auth.username, auth.password)).collect()
        };
        assert_eq!(users("busybox"), ["u:p"]);
        assert_eq!(users("reg.example.com/team/app:1"), ["t:y", "x:y"]);
        assert_eq!(users("reg.example.com/other"), ["x:y"]);
        assert!(users("quay.io/a").is_empty());
    }

    #[test]
    fn short_durations() {
        assert_eq!(millis(Duration::from_millis(12)), "12ms");
        assert_eq!(millis(Duration::from_millis(1230)), "1.23s");
    }
}
