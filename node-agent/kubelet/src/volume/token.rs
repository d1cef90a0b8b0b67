//! Service account tokens of pods: asked for when needed, kept until four fifths of their life are over.
use std::collections::HashMap;
use std::sync::Mutex;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use outrigger_cluster::Writer;

use crate::pod::meta::{name_of, namespace_of, spec, uid_of};

/// No token is used longer than this, however long it would last.
const LONGEST_USE_SECONDS: i64 = 24 * 3600;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Wanted {
    pod_uid: String,
    audience: String,
    seconds: i64,
}

#[derive(Clone, Debug)]
struct Held {
    token: String,
    refresh_at: Timestamp,
    expires_at: Timestamp,
}

pub struct Tokens {
    writer: Writer,
    held: Mutex<HashMap<Wanted, Held>>,
}

/// When a token of that life is to be replaced.
fn refresh_at(issued: Timestamp, expires: Timestamp) -> Timestamp {
    let life = expires.as_second() - issued.as_second();
    let usable = (life * 4 / 5).min(LONGEST_USE_SECONDS);
    Timestamp::from_second(issued.as_second() + usable).unwrap_or(expires)
}

impl Tokens {
    pub fn new(writer: Writer) -> Self {
        Self { writer, held: Mutex::default() }
    }

    fn held(&self) -> std::sync::MutexGuard<'_, HashMap<Wanted, Held>> {
        self.held.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub fn forget_pod(&self, uid: &str) {
        self.held().retain(|wanted, _| wanted.pod_uid != uid);
    }

    pub async fn token(&self, pod: &Pod, audience: &str, seconds: i64) -> Result<String, String> {
        let wanted = Wanted { pod_uid: uid_of(pod).into(), audience: audience.into(), seconds };
        let now = Timestamp::now();
        let held = self.held().get(&wanted).cloned();
        if let Some(held) = held.as_ref().filter(|held| now < held.refresh_at) {
            return Ok(held.token.clone());
        }
        let account = spec(pod).service_account_name.clone().filter(|name| !name.is_empty()).unwrap_or_else(|| "default".into());
        let audiences = if audience.is_empty() { Vec::new() } else { vec![audience.to_owned()] };
        let answer = self.writer.request_token(namespace_of(pod), &account, (name_of(pod), uid_of(pod)), audiences, seconds).await;
        match answer {
            Ok((token, expires)) => {
                let fresh = Held { token: token.clone(), refresh_at: refresh_at(now, expires.0), expires_at: expires.0 };
                self.held().insert(wanted, fresh);
                Ok(token)
            }
            // The old one still works for a while.
            Err(error) => match held.filter(|held| now < held.expires_at) {
                Some(held) => {
                    tracing::warn!(pod = name_of(pod), %error, "couldn't renew the pod's token yet");
                    Ok(held.token)
                }
                None => Err(format!("failed to fetch token: {error}")),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_renewed_at_four_fifths_or_a_day() {
        let at = |seconds: i64| Timestamp::from_second(seconds).unwrap();
        assert_eq!(refresh_at(at(0), at(3600)), at(2880));
        assert_eq!(refresh_at(at(0), at(3600 * 24 * 365)), at(LONGEST_USE_SECONDS));
    }
}
