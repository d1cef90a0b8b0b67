//! Subresources: status and its like are updates with a scope; scale, binding, eviction and token have bodies of their own.

use std::sync::Arc;

use jiff::Timestamp;
use outrigger_api::selector::LabelSelector;
use outrigger_api::{FieldError, Status, meta, scale};
use serde_json::{Value, json};

use crate::admission::{Attributes, Operation};
use crate::body::Request;
use crate::call::Call;
use crate::engine::Engine;
use crate::proxy;
use crate::registry::delete::{DeleteOptions, delete};
use crate::registry::patch::{self, Patch, PatchType};
use crate::registry::{body_object, cached, check_kind, current, decode_value, managed, read, read_body, update, versions};
use crate::reply::Reply;

pub async fn dispatch(engine: &Arc<Engine>, call: &Call, request: Request) -> Result<Reply, Status> {
    match call.info.subresource.as_str() {
        "scale" => scale_of(engine, call, request).await,
        "binding" => {
            let body = plain_body(call, request, "v1", "Binding").await?;
            bind(engine, call, &call.info.name, body).await
        }
        "eviction" => evict(engine, call, request).await,
        "token" => token(engine, call, request).await,
        "log" => proxy::pod::log(engine, call, request).await,
        "exec" | "attach" | "portforward" => proxy::pod::stream(engine, call, request).await,
        "proxy" => proxy::forward::subresource(engine, call, request).await,
        _ => part(engine, call, request).await,
    }
}

/// status, finalize, approval, ephemeralcontainers, resize: the object itself, of which only a part changes.
async fn part(engine: &Arc<Engine>, call: &Call, request: Request) -> Result<Reply, Status> {
    let name = call.info.name.as_str();
    let updated = match call.info.verb.as_str() {
        "get" => return read::get(engine, call).await,
        "update" => {
            let mut object = body_object(engine, call, request).await?;
            crate::registry::create::settle_namespace(call, &mut object)?;
            let said = meta::name(&object);
            if !said.is_empty() && said != name {
                return Err(Status::bad_request(format!("the name of the object ({said}) does not match the name on the URL ({name})")));
            }
            update::change(engine, call, name, Operation::Update, |_| Ok(object.clone())).await?
        }
        "patch" => patch::handle(engine, call, request).await?.1,
        _ => return Err(Status::method_not_allowed()),
    };
    read::reply(engine, call, 200, updated)
}

/// A body of another kind than the resource's.
async fn plain_body(call: &Call, request: Request, api_version: &str, kind: &str) -> Result<Value, Status> {
    let (parts, body) = request.into_parts();
    let bytes = read_body(body).await?;
    let mut object = decode_value(call, &parts.headers, &bytes)?;
    check_kind(&mut object, api_version, kind)?;
    Ok(object)
}

async fn scale_of(engine: &Arc<Engine>, call: &Call, request: Request) -> Result<Reply, Status> {
    let name = call.info.name.as_str();
    let show = |object: &Value| scale::read(&call.resource, object).ok_or_else(Status::path_not_found);
    match call.info.verb.as_str() {
        "get" => {
            let entry = current(engine, call, name).await?.ok_or_else(|| call.not_found(name))?;
            Ok(Reply::Object(200, show(&versions::object(engine, &call.resource, &entry).await?)?))
        }
        "update" => {
            let wanted = plain_body(call, request, "autoscaling/v1", "Scale").await?;
            check_scale_name(name, &wanted)?;
            let updated = update::change(engine, call, name, Operation::Update, |current| scaled(call, current, &wanted)).await?;
            Ok(Reply::Object(200, show(&updated)?))
        }
        _ => {
            let (parts, body) = request.into_parts();
            let bytes = read_body(body).await?;
            let patch = Patch::decode(call, &parts.headers, &bytes, true)?;
            if patch.kind == PatchType::Apply {
                let updated = managed::apply(engine, call, applied_scale(call, patch.body)?).await?.1;
                return Ok(Reply::Object(200, show(&updated)?));
            }
            let make = |current: &Value| {
                let mut wanted = show(current)?;
                match patch.kind {
                    PatchType::Json => outrigger_api::patch::json(&mut wanted, &patch.body)?,
                    // A strategic patch of a Scale has no lists to merge: it is a merge patch.
                    _ => outrigger_api::patch::merge(&mut wanted, &patch.body),
                }
                scaled(call, current, &wanted)
            };
            let updated = update::change(engine, call, name, Operation::Update, make).await?;
            Ok(Reply::Object(200, show(&updated)?))
        }
    }
}

/// An applied Scale as a configuration of the object that it scales.
fn applied_scale(call: &Call, mut wanted: Value) -> Result<Value, Status> {
    check_kind(&mut wanted, "autoscaling/v1", "Scale")?;
    check_scale_name(&call.info.name, &wanted)?;
    let mut config = json!({"apiVersion": call.resource.api_version(), "kind": call.resource.kind, "metadata": {}});
    if !meta::get(&wanted, "spec.replicas").is_null() {
        scale::write(&call.resource, &mut config, &wanted)?;
    }
    Ok(config)
}

fn check_scale_name(name: &str, wanted: &Value) -> Result<(), Status> {
    let said = meta::name(wanted);
    if said.is_empty() || said == name {
        return Ok(());
    }
    Err(Status::bad_request(format!("the name of the object ({said}) does not match the name on the URL ({name})")))
}

fn scaled(call: &Call, current: &Value, wanted: &Value) -> Result<Value, Status> {
    let replicas = meta::get(wanted, "spec.replicas").as_i64().unwrap_or_default();
    if replicas < 0 {
        let error = FieldError::invalid("spec.replicas", replicas, "must be greater than or equal to 0");
        return Err(Status::invalid("autoscaling", "Scale", &call.info.name, &[error]));
    }
    let mut object = current.clone();
    scale::write(&call.resource, &mut object, wanted)?;
    let version = meta::resource_version(wanted);
    if !version.is_empty() {
        meta::set_resource_version(&mut object, version);
    }
    Ok(object)
}

/// Assigns a pod to a node.
pub async fn bind(engine: &Engine, call: &Call, pod: &str, mut binding: Value) -> Result<Reply, Status> {
    engine.fresh().await?;
    engine.admission.admit(engine, &Attributes::new(call, Operation::Create, pod), &mut binding).await?;
    let binding = &binding;
    let node = meta::text(binding, "target.name");
    if node.is_empty() {
        let error = FieldError::required("target.name", "");
        return Err(Status::invalid("", "Binding", pod, &[error]));
    }
    if !matches!(meta::text(binding, "target.kind"), "" | "Node") {
        let error = FieldError::not_supported("target.kind", meta::text(binding, "target.kind"), &["Node", "<empty>"]);
        return Err(Status::invalid("", "Binding", pod, &[error]));
    }
    let pods = engine.builtin("", "v1", "pods");
    let mut inner = call.derived(pods, "patch", call.namespace(), pod);
    inner.info.subresource = "binding".into();
    let uid = meta::uid(binding).to_string();
    update::change_unchecked(engine, &inner, pod, |current| {
        let conflict = |why: &str| Err(Status::conflict("", "pods/binding", pod, why));
        if !uid.is_empty() && uid != meta::uid(current) {
            return conflict(&format!("Precondition failed: UID in precondition: {uid}, UID in object meta: {}", meta::uid(current)));
        }
        if meta::is_deleting(current) {
            return conflict(&format!("pod {pod} is being deleted, cannot be assigned to a host"));
        }
        let bound = meta::text(current, "spec.nodeName");
        if !bound.is_empty() {
            return conflict(&format!("pod {pod} is already assigned to node {bound:?}"));
        }
        if !meta::is_empty(meta::get(current, "spec.schedulingGates")) {
            return conflict(&format!("pod {pod} has non-empty .spec.schedulingGates"));
        }
        let mut object = current.clone();
        meta::set(&mut object, "spec.nodeName", node);
        for (key, value) in meta::annotations(binding) {
            meta::map_mut(meta::child_mut(&mut object, "metadata").entry("annotations").or_insert(Value::Null))
                .insert(key.into(), value.into());
        }
        set_condition(&mut object, json!({"type": "PodScheduled", "status": "True"}));
        Ok(object)
    })
    .await?;
    Ok(Reply::Object(201, Status::success(201).to_value()))
}

/// Adds or replaces a status condition; its transition time moves only when its status does.
pub fn set_condition(object: &mut Value, mut condition: Value) {
    let now = outrigger_api::time::format(Timestamp::now());
    let mut conditions = meta::items(object, "status.conditions").to_vec();
    let kind = condition["type"].clone();
    let known = conditions.iter_mut().find(|c| c["type"] == kind);
    let same = known.as_ref().is_some_and(|c| c["status"] == condition["status"]);
    condition["lastTransitionTime"] = match &known {
        Some(known) if same => known["lastTransitionTime"].clone(),
        _ => now.into(),
    };
    match known {
        Some(known) => *known = condition,
        None => conditions.push(condition),
    }
    meta::set(object, "status.conditions", conditions);
}

async fn evict(engine: &Engine, call: &Call, request: Request) -> Result<Reply, Status> {
    let name = call.info.name.as_str();
    let mut body = plain_body(call, request, "policy/v1", "Eviction").await?;
    let said = meta::name(&body);
    if !said.is_empty() && said != name {
        return Err(Status::bad_request("name in URL does not match name in Eviction object"));
    }
    engine.fresh().await?;
    engine.admission.admit(engine, &Attributes::new(call, Operation::Create, name), &mut body).await?;
    let mut options = DeleteOptions { dry_run: call.dry_run, admitted: true, ..Default::default() };
    if body["deleteOptions"].is_object() {
        options.read(&json!({
            "gracePeriodSeconds": body["deleteOptions"]["gracePeriodSeconds"],
            "preconditions": body["deleteOptions"]["preconditions"],
            "propagationPolicy": body["deleteOptions"]["propagationPolicy"],
            "dryRun": body["deleteOptions"]["dryRun"],
        }))?;
    }
    let entry = current(engine, call, name).await?.ok_or_else(|| call.not_found(name))?;
    let pod = entry.object();
    let finished = matches!(meta::text(&pod, "status.phase"), "Succeeded" | "Failed" | "Pending") || meta::is_deleting(&pod);
    if !finished {
        spend_budget(engine, call, &pod, options.dry_run).await?;
    }
    if !meta::is_deleting(&pod) && !options.dry_run {
        mark_disrupted(engine, call, name).await?;
    }
    let inner = call.derived(call.resource.clone(), "delete", call.namespace(), name);
    delete(engine, &inner, name, &options).await?;
    Ok(Reply::Object(201, Status::success(201).to_value()))
}

/// Says in the pod's status why it is about to end, for whoever judges its failure.
async fn mark_disrupted(engine: &Engine, call: &Call, name: &str) -> Result<(), Status> {
    let mut inner = call.derived(call.resource.clone(), "patch", call.namespace(), name);
    inner.info.subresource = "status".into();
    update::change_unchecked(engine, &inner, name, |current| {
        let mut object = current.clone();
        let why =
            json!({"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "Eviction API: evicting"});
        set_condition(&mut object, why);
        Ok(object)
    })
    .await
}

/// Takes one disruption from the pod's budget, or refuses with 429.
async fn spend_budget(engine: &Engine, call: &Call, pod: &Value, dry_run: bool) -> Result<(), Status> {
    let budgets = engine.builtin("policy", "v1", "poddisruptionbudgets");
    let snapshot = engine.hub.cache(&budgets.storage_prefix).range(&format!("{}/", call.namespace()), None);
    let labels = meta::get(pod, "metadata.labels");
    let matching: Vec<_> = snapshot
        .entries
        .iter()
        .filter(|entry| LabelSelector::from_object(meta::get(&entry.object(), "spec.selector")).is_ok_and(|s| s.matches(labels)))
        .collect();
    let budget = match matching.as_slice() {
        [] => return Ok(()),
        [one] => one,
        _ => {
            return Err(Status::internal(
                "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.",
            ));
        }
    };
    let ready = meta::items(pod, "status.conditions").iter().any(|c| c["type"] == "Ready" && c["status"] == "True");
    let object = budget.object();
    let number = |object: &Value, field: &str| meta::get(object, &format!("status.{field}")).as_i64().unwrap_or_default();
    if !ready {
        let always = meta::text(&object, "spec.unhealthyPodEvictionPolicy") == "AlwaysAllow";
        if always || (number(&object, "currentHealthy") >= number(&object, "desiredHealthy") && number(&object, "desiredHealthy") > 0) {
            return Ok(());
        }
    }
    let mut inner = call.derived(budgets, "patch", call.namespace(), budget.name());
    inner.dry_run |= dry_run;
    inner.info.subresource = "status".into();
    let pod_name = meta::name(pod).to_string();
    let now = outrigger_api::time::format(Timestamp::now());
    update::change(engine, &inner, budget.name(), Operation::Update, |current| {
        let refused = |message: &str| {
            Status::too_many_requests("Cannot evict pod as it would violate the pod's disruption budget.", 10).with_cause(
                "DisruptionBudget",
                message,
                "",
            )
        };
        if number(current, "observedGeneration") < meta::generation(current) {
            return Err(refused(&format!("The disruption budget {} is still being processed by the server.", budget.name())));
        }
        let allowed = number(current, "disruptionsAllowed");
        if allowed <= 0 {
            let (needs, has) = (number(current, "desiredHealthy"), number(current, "currentHealthy"));
            return Err(refused(&format!("The disruption budget {} needs {needs} healthy pods and has {has} currently", budget.name())));
        }
        let mut object = current.clone();
        meta::set(&mut object, "status.disruptionsAllowed", allowed - 1);
        let status = meta::child_mut(&mut object, "status");
        meta::map_mut(status.entry("disruptedPods").or_insert(Value::Null)).insert(pod_name.clone(), now.clone().into());
        Ok(object)
    })
    .await?;
    Ok(())
}

async fn token(engine: &Engine, call: &Call, request: Request) -> Result<Reply, Status> {
    use outrigger_access::token::{Bound, ObjectRef, TokenWish};
    let name = call.info.name.as_str();
    let mut body = plain_body(call, request, "authentication.k8s.io/v1", "TokenRequest").await?;
    let account = current(engine, call, name).await?.ok_or_else(|| call.not_found(name))?.object();
    engine.admission.admit(engine, &Attributes::new(call, Operation::Create, name), &mut body).await?;
    let invalid = |error: FieldError| Status::invalid("authentication.k8s.io", "TokenRequest", "", &[error]);
    let expiration = meta::get(&body, "spec.expirationSeconds").as_i64().unwrap_or(3600);
    if expiration < 600 {
        return Err(invalid(FieldError::invalid("spec.expirationSeconds", expiration, "may not specify a duration less than 10 minutes")));
    }
    if expiration > 1 << 32 {
        return Err(invalid(FieldError::invalid(
            "spec.expirationSeconds",
            expiration,
            "may not specify a duration larger than 2^32 seconds",
        )));
    }
    let bound = match meta::get(&body, "spec.boundObjectRef") {
        Value::Object(_) => Some(bound_object(engine, call, meta::get(&body, "spec.boundObjectRef"))?),
        _ => None,
    };
    let wish = TokenWish {
        namespace: call.namespace().into(),
        service_account: ObjectRef { name: name.into(), uid: meta::uid(&account).into() },
        audiences: meta::items(&body, "spec.audiences").iter().filter_map(|v| v.as_str().map(String::from)).collect(),
        expiration_seconds: Some(expiration),
        bound: bound.clone(),
    };
    if let Some(Bound::Pod { .. }) = &bound
        && let Value::String(pod) = meta::get(&body, "spec.boundObjectRef.name")
    {
        let entry = cached(engine, &call.derived(engine.builtin("", "v1", "pods"), "get", call.namespace(), pod), pod);
        let uses = entry.map(|e| meta::text(&e.object(), "spec.serviceAccountName").to_string()).unwrap_or_default();
        if uses != name {
            return Err(Status::bad_request(format!(
                "cannot bind token for serviceaccount {name:?} to pod running with different serviceaccount name."
            )));
        }
    }
    let issued = engine.tokens.issue(&wish).map_err(Status::internal)?;
    if meta::is_empty(meta::get(&body, "spec.audiences")) {
        meta::set(&mut body, "spec.audiences", engine.tokens.audiences().to_vec());
    }
    meta::set(&mut body, "spec.expirationSeconds", expiration);
    meta::set(&mut body, "metadata.name", name);
    meta::set(&mut body, "metadata.namespace", call.namespace());
    meta::set(&mut body, "metadata.creationTimestamp", outrigger_api::time::format(Timestamp::now()));
    body["status"] = json!({"token": issued.token, "expirationTimestamp": outrigger_api::time::format(issued.expires)});
    Ok(Reply::Object(201, body))
}

/// The object a token is bound to, which must exist with the uid asked for.
fn bound_object(engine: &Engine, call: &Call, reference: &Value) -> Result<outrigger_access::token::Bound, Status> {
    use outrigger_access::token::{Bound, ObjectRef};
    let (kind, name, uid) = (meta::text(reference, "kind"), meta::text(reference, "name"), meta::text(reference, "uid"));
    let find = |plural: &str, namespace: &str| -> Result<Value, Status> {
        let resource = engine.builtin("", "v1", plural);
        let target = call.derived(resource, "get", namespace, name);
        let object = cached(engine, &target, name).ok_or_else(|| target.not_found(name))?.object();
        if !uid.is_empty() && uid != meta::uid(&object) {
            let why = format!(
                "the UID in the bound object reference ({uid}) does not match the UID in record. The object might have been deleted and then recreated"
            );
            return Err(Status::conflict("", plural, name, &why));
        }
        Ok(object)
    };
    let reference = |object: &Value| ObjectRef { name: meta::name(object).into(), uid: meta::uid(object).into() };
    match kind {
        "Pod" => {
            let pod = find("pods", call.namespace())?;
            let node = meta::text(&pod, "spec.nodeName");
            let node = (!node.is_empty()).then(|| {
                let target = call.derived(engine.builtin("", "v1", "nodes"), "get", "", node);
                let uid = cached(engine, &target, node).map(|e| meta::uid(&e.object()).to_string()).unwrap_or_default();
                ObjectRef { name: node.into(), uid }
            });
            Ok(Bound::Pod { pod: reference(&pod), node })
        }
        "Node" => Ok(Bound::Node(reference(&find("nodes", "")?))),
        "Secret" => Ok(Bound::Secret(reference(&find("secrets", call.namespace())?))),
        _ => Err(Status::bad_request(format!(
            "cannot bind token for serviceaccount to object of kind {kind:?}; supported are Pod, Node, Secret"
        ))),
    }
}
