//! One request on its way through the registry: who asks for what, with which options, and the warnings gathered for the answer.

use std::sync::{Arc, Mutex};

use outrigger_access::UserInfo;
use outrigger_api::{FieldError, Resource, Status};
use serde_json::Value;

use crate::negotiate::Accept;
use crate::request::{Query, RequestInfo};

/// How unknown and duplicate fields are treated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FieldValidation {
    Ignore,
    #[default]
    Warn,
    Strict,
}

pub struct Call {
    pub user: UserInfo,
    pub info: RequestInfo,
    pub query: Query,
    pub accept: Accept,
    pub resource: Arc<Resource>,
    pub dry_run: bool,
    pub field_validation: FieldValidation,
    /// Whom managed fields name for this write.
    pub manager: String,
    warnings: Mutex<Vec<String>>,
}

/// Longest name of a field manager.
const MANAGER_LIMIT: usize = 128;

/// Warnings gathered for one answer.
const MAX_WARNINGS: usize = 256;
/// Letters that an answer's warnings may have together, and each of them when they have more: headers have their limits.
const WARNINGS_LETTERS: usize = 4 * 1024;
const WARNING_LETTERS: usize = 256;

fn limited(warnings: Vec<String>) -> Vec<String> {
    let letters = |text: &String| text.chars().count();
    if warnings.iter().map(letters).sum::<usize>() <= WARNINGS_LETTERS {
        return warnings;
    }
    let cut = warnings.into_iter().map(|text| text.chars().take(WARNING_LETTERS).collect::<String>());
    let mut written = 0;
    cut.take_while(|text| {
        written += letters(text);
        written <= WARNINGS_LETTERS
    })
    .collect()
}

/// The field manager: as given, else the client's program; clients in this process are known by their user.
pub fn manager(query: &Query, agent: &str, user: &UserInfo) -> String {
    let given = query.text("fieldManager");
    if !given.is_empty() {
        return given.to_string();
    }
    let program = agent.split('/').next().unwrap_or_default();
    let program: String = program.chars().filter(|letter| !letter.is_control()).take(MANAGER_LIMIT).collect();
    match user.name.rsplit_once(':') {
        Some((_, last)) if program.is_empty() => last.to_string(),
        _ if program.is_empty() => "unknown".to_string(),
        _ => program,
    }
}

impl Call {
    pub fn new(
        user: UserInfo,
        info: RequestInfo,
        query: Query,
        agent: &str,
        accept: Accept,
        resource: Arc<Resource>,
    ) -> Result<Self, Status> {
        let manager = manager(&query, agent, &user);
        if manager.len() > MANAGER_LIMIT {
            let error = FieldError::too_long("fieldManager", MANAGER_LIMIT);
            return Err(Status::invalid("meta.k8s.io", options_kind(&info.verb), "", &[error]));
        }
        let dry_run = parse_dry_run(query.all("dryRun"), &info.verb)?;
        let field_validation = match query.text("fieldValidation") {
            "" | "Warn" => FieldValidation::Warn,
            "Ignore" => FieldValidation::Ignore,
            "Strict" => FieldValidation::Strict,
            other => {
                let error = FieldError::not_supported("fieldValidation", other, &["", "Ignore", "Strict", "Warn"]);
                return Err(Status::invalid("meta.k8s.io", options_kind(&info.verb), "", &[error]));
            }
        };
        Ok(Self { user, info, query, accept, resource, dry_run, field_validation, manager, warnings: Mutex::default() })
    }

    /// The same caller turned to another object, for the writes that one request causes in other kinds.
    pub fn derived(&self, resource: Arc<Resource>, verb: &str, namespace: &str, name: &str) -> Self {
        let info = RequestInfo {
            is_resource: true,
            verb: verb.into(),
            group: resource.group.to_string(),
            version: resource.version.to_string(),
            resource: resource.plural.to_string(),
            namespace: namespace.into(),
            name: name.into(),
            ..Default::default()
        };
        Self {
            user: self.user.clone(),
            info,
            query: Query::default(),
            accept: Accept::default(),
            resource,
            dry_run: self.dry_run,
            field_validation: FieldValidation::Ignore,
            manager: self.manager.clone(),
            warnings: Mutex::default(),
        }
    }

    /// The server's own write, outside of any request.
    pub fn internal(resource: Arc<Resource>, verb: &str, namespace: &str, name: &str) -> Self {
        let info = RequestInfo {
            is_resource: true,
            verb: verb.into(),
            group: resource.group.to_string(),
            version: resource.version.to_string(),
            resource: resource.plural.to_string(),
            namespace: namespace.into(),
            name: name.into(),
            ..Default::default()
        };
        Self {
            user: UserInfo::api_server(),
            info,
            query: Query::default(),
            accept: Accept::default(),
            resource,
            dry_run: false,
            field_validation: FieldValidation::Ignore,
            manager: "kube-apiserver".into(),
            warnings: Mutex::default(),
        }
    }

    pub fn warn(&self, text: impl Into<String>) {
        let text = text.into();
        let mut warnings = self.warnings.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if warnings.len() < MAX_WARNINGS && !warnings.contains(&text) {
            warnings.push(text);
        }
    }

    pub fn take_warnings(&self) -> Vec<String> {
        limited(std::mem::take(&mut *self.warnings.lock().unwrap_or_else(|poisoned| poisoned.into_inner())))
    }

    pub fn namespace(&self) -> &str {
        &self.info.namespace
    }

    /// The namespace as store keys and validation want it.
    pub fn scope(&self) -> Option<&str> {
        self.resource.namespaced.then_some(self.info.namespace.as_str())
    }

    pub fn key(&self, name: &str) -> String {
        self.resource.key(self.scope(), Some(name))
    }

    pub fn not_found(&self, name: &str) -> Status {
        Status::not_found(&self.resource.group, &self.resource.plural, name)
    }

    pub fn invalid(&self, name: &str, errors: &[FieldError]) -> Status {
        Status::invalid(&self.resource.group, &self.resource.kind, name, errors)
    }

    pub fn forbidden(&self, name: &str, why: &str) -> Status {
        Status::forbidden(&self.resource.group, &self.resource.plural, name, why)
    }

    pub fn conflict(&self, name: &str, why: &str) -> Status {
        Status::conflict(&self.resource.group, &self.resource.plural, name, why)
    }
}

fn options_kind(verb: &str) -> &'static str {
    match verb {
        "create" => "CreateOptions",
        "update" => "UpdateOptions",
        "patch" => "PatchOptions",
        _ => "DeleteOptions",
    }
}

pub fn parse_dry_run(values: &[String], verb: &str) -> Result<bool, Status> {
    for value in values.iter().filter(|v| !v.is_empty()) {
        if value != "All" {
            let shown = Value::Array(values.iter().map(|v| v.as_str().into()).collect());
            let error = FieldError::not_supported("dryRun", shown, &["All"]);
            return Err(Status::invalid("meta.k8s.io", options_kind(verb), "", &[error]));
        }
    }
    Ok(values.iter().any(|v| v == "All"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_are_cut_only_when_they_are_too_long_together() {
        let one = vec!["x".repeat(1000)];
        assert_eq!(limited(one.clone()), one);
        let many = limited(vec!["é".repeat(1000); 20]);
        assert_eq!((many.len(), many[0].chars().count()), (16, 256));
    }
}
