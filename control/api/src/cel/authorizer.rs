//! `authorizer`: what the requester, or a service account, may do.
use std::fmt;
use std::sync::Arc;

use outrigger_cel::{Error, Library, Opaque, Value};

use crate::names;

pub const AUTHORIZER: &str = "kubernetes.authorization.Authorizer";
pub const RESOURCE_CHECK: &str = "kubernetes.authorization.ResourceCheck";
const PATH_CHECK: &str = "kubernetes.authorization.PathCheck";
const GROUP_CHECK: &str = "kubernetes.authorization.GroupCheck";
const DECISION: &str = "kubernetes.authorization.Decision";

/// What is asked. Of a path only the verb counts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Check {
    pub path: String,
    pub group: String,
    pub resource: String,
    pub subresource: String,
    pub namespace: String,
    pub name: String,
    pub field_selector: String,
    pub label_selector: String,
    pub verb: String,
    /// Namespace and name of the service account asked about, instead of the requester.
    pub account: Option<(String, String)>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decision {
    pub allowed: bool,
    pub reason: String,
}

/// Who decides.
pub trait Authority: Send + Sync {
    fn decide(&self, check: &Check) -> Decision;
}

/// The values of this library: an authorizer and the checks that are built from it step by step.
#[derive(Clone)]
pub struct Authorizer {
    authority: Arc<dyn Authority>,
    check: Check,
    kind: &'static str,
}

impl Authorizer {
    pub fn of_requester(authority: Arc<dyn Authority>) -> Value {
        Value::opaque(Authorizer { authority, check: Check::default(), kind: AUTHORIZER })
    }

    /// `authorizer.requestResource`
    pub fn for_resource(authority: Arc<dyn Authority>, check: Check) -> Value {
        Value::opaque(Authorizer { authority, check, kind: RESOURCE_CHECK })
    }
}

impl fmt::Debug for Authorizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}({:?})", self.kind, self.check)
    }
}

impl Opaque for Authorizer {
    fn type_name(&self) -> &'static str {
        self.kind
    }

    fn equals(&self, other: &dyn Opaque) -> bool {
        other.downcast::<Authorizer>().is_some_and(|other| other.kind == self.kind && other.check == self.check)
    }
}

impl Opaque for Decision {
    fn type_name(&self) -> &'static str {
        DECISION
    }

    fn equals(&self, other: &dyn Opaque) -> bool {
        other.downcast() == Some(self)
    }
}

/// The next step: the same authorizer with one more thing known.
fn step(args: &[Value], kind: &'static str, set: impl FnOnce(&mut Check, &str)) -> Result<Value, Error> {
    let mut next = args[0].downcast::<Authorizer>().ok_or_else(Error::no_overload)?.clone();
    set(&mut next.check, args.get(1).and_then(Value::as_str).unwrap_or_default());
    next.kind = kind;
    Ok(Value::opaque(next))
}

fn decide(args: &[Value]) -> Result<Value, Error> {
    let authorizer = args[0].downcast::<Authorizer>().ok_or_else(Error::no_overload)?;
    let verb = args[1].as_str().unwrap_or_default().to_string();
    Ok(Value::opaque(authorizer.authority.decide(&Check { verb, ..authorizer.check.clone() })))
}

fn decision(value: &Value) -> Result<&Decision, Error> {
    value.downcast().ok_or_else(Error::no_overload)
}

pub const AUTHORIZERS: Library = &[
    ("kubernetes.authorization.Authorizer.path(string) -> kubernetes.authorization.PathCheck", |a| match a[1].as_str() {
        Some(path) if path.trim().is_empty() => Err(Error::new("path must not be empty")),
        _ => step(a, PATH_CHECK, |check, path| check.path = path.into()),
    }),
    ("kubernetes.authorization.Authorizer.group(string) -> kubernetes.authorization.GroupCheck", |a| {
        step(a, GROUP_CHECK, |check, group| check.group = group.into())
    }),
    ("kubernetes.authorization.Authorizer.serviceAccount(string, string) -> kubernetes.authorization.Authorizer", |a| {
        let name = a[2].as_str().unwrap_or_default().to_string();
        if !names::dns_subdomain(&name).is_empty() {
            return Err(Error::new("Invalid service account name"));
        }
        if !names::dns_label(a[1].as_str().unwrap_or_default()).is_empty() {
            return Err(Error::new("Invalid service account namespace"));
        }
        step(a, AUTHORIZER, |check, namespace| check.account = Some((namespace.into(), name)))
    }),
    ("kubernetes.authorization.GroupCheck.resource(string) -> kubernetes.authorization.ResourceCheck", |a| match a[1].as_str() {
        Some(resource) if resource.trim().is_empty() => Err(Error::new("resource must not be empty")),
        _ => step(a, RESOURCE_CHECK, |check, resource| check.resource = resource.into()),
    }),
    ("kubernetes.authorization.ResourceCheck.subresource(string) -> kubernetes.authorization.ResourceCheck", |a| {
        step(a, RESOURCE_CHECK, |check, subresource| check.subresource = subresource.into())
    }),
    ("kubernetes.authorization.ResourceCheck.namespace(string) -> kubernetes.authorization.ResourceCheck", |a| {
        step(a, RESOURCE_CHECK, |check, namespace| check.namespace = namespace.into())
    }),
    ("kubernetes.authorization.ResourceCheck.name(string) -> kubernetes.authorization.ResourceCheck", |a| {
        step(a, RESOURCE_CHECK, |check, name| check.name = name.into())
    }),
    ("kubernetes.authorization.ResourceCheck.fieldSelector(string) -> kubernetes.authorization.ResourceCheck", |a| {
        step(a, RESOURCE_CHECK, |check, selector| check.field_selector = selector.into())
    }),
    ("kubernetes.authorization.ResourceCheck.labelSelector(string) -> kubernetes.authorization.ResourceCheck", |a| {
        step(a, RESOURCE_CHECK, |check, selector| check.label_selector = selector.into())
    }),
    ("kubernetes.authorization.PathCheck.check(string) -> kubernetes.authorization.Decision", decide),
    ("kubernetes.authorization.ResourceCheck.check(string) -> kubernetes.authorization.Decision", decide),
    ("kubernetes.authorization.Decision.allowed() -> bool", |a| Ok(decision(&a[0])?.allowed.into())),
    ("kubernetes.authorization.Decision.reason() -> string", |a| Ok(decision(&a[0])?.reason.as_str().into())),
    // The authorizers here always come to a decision.
    ("kubernetes.authorization.Decision.errored() -> bool", |a| decision(&a[0]).map(|_| false.into())),
    ("kubernetes.authorization.Decision.error() -> string", |a| decision(&a[0]).map(|_| "".into())),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cel::{BUDGET, Scope};
    use outrigger_cel::{Bindings, Context};

    struct OnlyPods;

    impl Authority for OnlyPods {
        fn decide(&self, check: &Check) -> Decision {
            let account = check.account.as_ref().is_none_or(|(namespace, _)| namespace == "n");
            Decision {
                allowed: check.resource == "pods" && check.verb == "get" && account,
                reason: format!("asked in {:?}", check.namespace),
            }
        }
    }

    #[test]
    fn checks_are_built_step_by_step() {
        let authority = Arc::new(OnlyPods);
        let check = Check { resource: "services".into(), ..Check::default() };
        let bindings = Bindings::from([
            ("authorizer".to_string(), Authorizer::of_requester(authority.clone())),
            ("authorizer.requestResource".to_string(), Authorizer::for_resource(authority, check)),
        ]);
        for (expression, expected) in [
            ("authorizer.group('').resource('pods').check('get').allowed()", true),
            ("authorizer.group('').resource('pods').check('list').allowed()", false),
            ("authorizer.group('').resource('pods').namespace('x').check('get').reason() == 'asked in \"x\"'", true),
            ("authorizer.serviceAccount('m', 'a').group('').resource('pods').check('get').allowed()", false),
            ("authorizer.path('/healthz').check('get').allowed()", false),
            ("authorizer.requestResource.check('get').errored()", false),
        ] {
            let program = Scope::default().compile(expression, &[]).unwrap_or_else(|error| panic!("{expression}: {error}"));
            assert_eq!(program.eval(&Context::new(&bindings, BUDGET)), Ok(expected.into()), "{expression}");
        }
    }
}
