//! MutatingAdmissionWebhook and ValidatingAdmissionWebhook: servers of the users' that are asked about requests.

mod review;

use std::collections::BTreeSet;
use std::time::Duration;

use futures::future::join_all;
use outrigger_api::{Status, meta, patch};
use serde_json::Value;

use super::Attributes;
use super::derived::Derived;
use super::expressions::{Conditions, Inputs, request};
use super::matching::{Scope, View, is_exempt, refit};
use crate::engine::Engine;
use crate::registry::versions::between;
use crate::webhook::post;
use review::Answer;

/// One webhook of a configuration.
struct Hook {
    /// Configuration, name and how often it occurred before: what a second round knows it by.
    id: String,
    name: String,
    scope: Scope,
    conditions: Conditions,
    client: Value,
    limit: Duration,
    /// A webhook that doesn't answer is no obstacle.
    ignores_failure: bool,
    reinvocable: bool,
    side_effects: Option<String>,
    /// The first of its review versions that is known here.
    version: Option<String>,
}

impl Hook {
    fn new(configuration: &str, webhook: &Value, repetition: usize) -> Self {
        let name = meta::text(webhook, "name").to_string();
        let version = meta::items(webhook, "admissionReviewVersions").iter().filter_map(Value::as_str);
        Self {
            id: format!("{configuration}/{name}/{repetition}"),
            name,
            scope: Scope::of_webhook(webhook),
            conditions: Conditions::of(webhook, false),
            client: webhook["clientConfig"].clone(),
            limit: Duration::from_secs(webhook["timeoutSeconds"].as_u64().unwrap_or(10)),
            ignores_failure: meta::text(webhook, "failurePolicy") == "Ignore",
            reinvocable: meta::text(webhook, "reinvocationPolicy") == "IfNeeded",
            side_effects: webhook["sideEffects"].as_str().map(String::from),
            version: version.into_iter().find(|version| review::VERSIONS.contains(version)).map(String::from),
        }
    }
}

/// All webhooks of the configurations, which come in the order of their names.
fn hooks(configurations: &[Value]) -> Vec<Hook> {
    let mut all: Vec<Hook> = Vec::new();
    for configuration in configurations {
        let own = meta::name(configuration);
        let before = all.len();
        for webhook in meta::items(configuration, "webhooks") {
            let name = meta::text(webhook, "name");
            let repetition = all[before..].iter().filter(|hook| hook.name == name).count();
            all.push(Hook::new(own, webhook, repetition));
        }
    }
    all
}

/// Why a webhook did not let a request pass.
enum Failure {
    /// It could not be asked, or gave no proper answer: the failure policy decides.
    Calling(String),
    /// It said no, or the request can't be shown to it.
    Refused(Status),
}

pub struct Webhooks {
    mutating: Derived<Vec<Hook>>,
    validating: Derived<Vec<Hook>>,
}

impl Default for Webhooks {
    fn default() -> Self {
        Self {
            mutating: Derived::new("admissionregistration.k8s.io/mutatingwebhookconfigurations", hooks),
            validating: Derived::new("admissionregistration.k8s.io/validatingwebhookconfigurations", hooks),
        }
    }
}

/// What the first round of mutations leaves to a second one.
#[derive(Default)]
pub struct Rounds {
    second: bool,
    changed: bool,
    /// Asked so far, and to be asked again should the object change after that.
    asked: BTreeSet<String>,
    due: BTreeSet<String>,
    /// The object when the last one had seen it.
    left: Option<Value>,
}

impl Rounds {
    /// Whether a second round is needed; there is never a third.
    pub fn again(&mut self) -> bool {
        let again = self.changed && !self.second;
        self.second = true;
        again
    }

    /// In the second round, what others have changed meanwhile is news to all.
    pub fn begin(&mut self, object: Option<&Value>) {
        if self.second && self.left.as_ref() != object {
            self.due.append(&mut self.asked);
        }
    }

    /// Whether it is this one's turn.
    pub fn asks(&self, id: &str) -> bool {
        !self.second || self.due.contains(id)
    }

    /// This one has been asked; a change of its own is news to those before it.
    pub fn asked(&mut self, id: String, changed: bool, reinvocable: bool) {
        if changed {
            self.changed = true;
            self.due.append(&mut self.asked);
        }
        if reinvocable {
            self.asked.insert(id);
        }
    }

    pub fn end(&mut self, object: Option<&Value>) {
        self.left = object.cloned();
    }
}

impl Webhooks {
    /// Asks the mutating webhooks one after the other, each about what the one before left.
    pub async fn mutate(
        &self,
        engine: &Engine,
        attributes: &Attributes<'_>,
        mut object: Option<&mut Value>,
        rounds: &mut Rounds,
    ) -> Result<(), Status> {
        let hooks = self.mutating.get(engine);
        if hooks.is_empty() || is_exempt(attributes) {
            return Ok(());
        }
        rounds.begin(object.as_deref());
        for hook in hooks.iter() {
            let Some(seen) = hook.scope.find(engine, attributes, object.as_deref())? else { continue };
            if !rounds.asks(&hook.id) {
                continue;
            }
            let view = View::new(engine, attributes, seen, object.as_deref()).await?;
            if !hook.wants(engine, attributes, &view)? {
                continue;
            }
            let changed = match hook.ask(engine, attributes, &view, true).await {
                Ok(answer) => hook.apply(engine, attributes, answer, view, object.as_deref_mut()).await,
                Err(failure) => Err(failure),
            };
            let changed = hook.settle(changed)? == Some(true);
            rounds.asked(hook.id.clone(), changed, hook.reinvocable);
        }
        rounds.end(object.as_deref());
        Ok(())
    }

    /// Asks all validating webhooks at once.
    pub async fn validate(&self, engine: &Engine, attributes: &Attributes<'_>, object: Option<&Value>) -> Result<(), Status> {
        let hooks = self.validating.get(engine);
        if hooks.is_empty() || is_exempt(attributes) {
            return Ok(());
        }
        let mut asked = Vec::new();
        for hook in hooks.iter() {
            if let Some(seen) = hook.scope.find(engine, attributes, object)? {
                let view = View::new(engine, attributes, seen, object).await?;
                if hook.wants(engine, attributes, &view)? {
                    asked.push((hook, view));
                }
            }
        }
        let answers = join_all(asked.iter().map(|(hook, view)| hook.ask(engine, attributes, view, false))).await;
        for ((hook, _), answer) in asked.iter().zip(answers) {
            hook.settle(answer)?;
        }
        Ok(())
    }
}

impl Hook {
    /// Whether the match conditions hold.
    fn wants(&self, engine: &Engine, attributes: &Attributes<'_>, view: &View) -> Result<bool, Status> {
        if self.conditions.is_empty() {
            return Ok(true);
        }
        self.conditions.hold(&Inputs::new(engine, attributes, view, None)).map_err(|why| attributes.forbidden(why))
    }

    /// One review; an answer that allows the request.
    async fn ask(&self, engine: &Engine, attributes: &Attributes<'_>, view: &View, mutating: bool) -> Result<Answer, Failure> {
        if attributes.dry_run && !matches!(self.side_effects.as_deref(), Some("None" | "NoneOnDryRun")) {
            let why = format!("admission webhook {:?} does not support dry run", self.name);
            return Err(Failure::Refused(Status::bad_request(why)));
        }
        let version = self.version.as_deref();
        let version =
            version.ok_or_else(|| Failure::Calling(format!("could not create admission objects: {}", review::UNKNOWN_VERSIONS)))?;
        let uid = uuid::Uuid::new_v4().to_string();
        let (object, old) = (view.object.clone().unwrap_or_default(), view.old.clone().unwrap_or_default());
        let review = review::review(version, &uid, request(attributes, &view.seen), object, old);
        let answer = post(engine, &self.client, &review, self.limit).await;
        let answer = answer.map_err(|error| Failure::Calling(format!("failed to call webhook: {}", error.reason)))?;
        let answer = review::answer(version, &uid, mutating, &answer);
        let answer = answer.map_err(|why| Failure::Calling(format!("received invalid webhook response: {why}")))?;
        answer.warnings.iter().for_each(|warning| attributes.call.warn(warning.as_str()));
        if answer.allowed { Ok(answer) } else { Err(Failure::Refused(review::refusal(&self.name, &answer.result))) }
    }

    /// Puts the answer's patch onto the object. Whether it changed.
    async fn apply(
        &self,
        engine: &Engine,
        attributes: &Attributes<'_>,
        answer: Answer,
        view: View,
        object: Option<&mut Value>,
    ) -> Result<bool, Failure> {
        let Some(operations) = answer.patch.filter(|patch| patch.as_array().is_none_or(|list| !list.is_empty())) else { return Ok(false) };
        let internal = |why: String| Failure::Refused(Status::internal(why));
        let (Some(target), Some(before)) = (object, view.object) else {
            let why = "attempted to modify the object, which is not supported for this operation";
            return Err(internal(format!("admission webhook {:?} {why}", self.name)));
        };
        let mut after = before.clone();
        patch::json(&mut after, &operations).map_err(|status| internal(explained(status)))?;
        refit(attributes, &view.seen, &mut after).map_err(Failure::Refused)?;
        if after == before {
            return Ok(false);
        }
        if attributes.kind_in(&view.seen) != attributes.kind_in(attributes.resource) {
            after = between(engine, &view.seen, attributes.resource, after).await.map_err(Failure::Refused)?;
        }
        *target = after;
        Ok(true)
    }

    /// What a call came to; none when its failure is to be ignored.
    fn settle<T>(&self, outcome: Result<T, Failure>) -> Result<Option<T>, Status> {
        match outcome {
            Ok(done) => Ok(Some(done)),
            Err(Failure::Refused(status)) => Err(status),
            Err(Failure::Calling(why)) => {
                let why = format!("failed calling webhook {:?}: {why}", self.name);
                if self.ignores_failure {
                    tracing::warn!(webhook = self.name, why, "a webhook failed and is ignored");
                    return Ok(None);
                }
                Err(Status::internal(why))
            }
        }
    }
}

pub fn explained(status: Status) -> String {
    let cause = status.details.as_ref().and_then(|details| details["causes"][0]["message"].as_str().map(String::from));
    cause.unwrap_or(status.message)
}
