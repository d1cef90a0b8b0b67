//! CEL as admission speaks it: Kubernetes' own functions, the variables of webhooks and policies, and their checks.
mod authorizer;
mod formats;
mod network;
mod quantity;
mod semver;
mod structures;

use std::sync::{Arc, LazyLock};

use outrigger_cel::{Env, Functions, Program, Type};

pub use authorizer::{Authority, Authorizer, Check, Decision};
pub use outrigger_cel as language;
pub use structures::{kind_type, patch_list, patch_object};

/// What the expressions of one request may cost, in steps.
pub const BUDGET: u64 = 1_000_000;
pub const MATCH_CONDITIONS_BUDGET: u64 = 250_000;

static FUNCTIONS: LazyLock<Arc<Functions>> = LazyLock::new(|| {
    let libraries = [
        authorizer::AUTHORIZERS,
        formats::FORMATS,
        network::ADDRESSES,
        network::URLS,
        quantity::QUANTITIES,
        semver::VERSIONS,
        structures::PATCHES,
    ];
    Arc::new(Functions::new(&libraries))
});

/// What an expression of a webhook or policy may name.
#[derive(Clone, Default)]
pub struct Scope {
    pub params: bool,
    /// The types of patches: `Object`, `Object.spec`, `JSONPatch`.
    pub patches: bool,
    /// Type of `object` and `oldObject`, where it is known.
    pub object: Option<Type>,
    pub params_type: Option<Type>,
    /// `variables.*`, by name.
    pub variables: Vec<(String, Type)>,
}

impl Scope {
    fn env(&self) -> Env {
        let object = || self.object.clone().unwrap_or(Type::Dyn);
        let mut env = Env::new(FUNCTIONS.clone())
            .with("object", object())
            .with("oldObject", object())
            .with("request", structures::request())
            .with("namespaceObject", structures::namespace())
            .with("authorizer", Type::Opaque(authorizer::AUTHORIZER))
            .with("authorizer.requestResource", Type::Opaque(authorizer::RESOURCE_CHECK));
        if self.params {
            env = env.with("params", self.params_type.clone().unwrap_or(Type::Dyn));
        }
        if !self.variables.is_empty() {
            env = env.with("variables", structures::fixed("kubernetes.variables", self.variables.clone()));
        }
        if self.patches {
            env = env.with_structs(Arc::new(structures::patch_type));
        }
        env
    }

    /// Compiles an expression whose value is of one of the wanted types; any will do if there are none. The error is validation's.
    pub fn compile(&self, expression: &str, wanted: &[Type]) -> Result<Program, String> {
        let program = self.env().compile(expression).map_err(|issues| format!("compilation failed: {issues}"))?;
        let result = program.result();
        if wanted.is_empty() || wanted.contains(result) {
            return Ok(program);
        }
        Err(match wanted {
            [one] => format!("must evaluate to {one} but got {result}"),
            many => {
                let names: Vec<String> = many.iter().map(Type::to_string).collect();
                format!("must evaluate to one of [{}] but got {result}", names.join(" "))
            }
        })
    }

    /// Compiles a variable, which later expressions may then name.
    pub fn add_variable(&mut self, name: &str, expression: &str) -> Result<Program, String> {
        let compiled = self.compile(expression, &[]);
        let kind = compiled.as_ref().map_or(Type::Dyn, |program| program.result().clone());
        self.variables.push((name.into(), kind));
        compiled
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrigger_cel::{Bindings, Context, Value};
    use serde_json::json;

    #[track_caller]
    fn all_true(expressions: &[&str]) {
        let object = json!({"metadata": {"name": "a"}, "spec": {"memory": "1Gi", "replicas": 2}});
        let bindings = Bindings::from([("object".to_string(), Value::from(&object))]);
        for expression in expressions {
            let program = Scope::default().compile(expression, &[Type::Bool]).unwrap_or_else(|error| panic!("{expression}: {error}"));
            assert_eq!(program.eval(&Context::new(&bindings, BUDGET)), Ok(Value::Bool(true)), "{expression}");
        }
    }

    #[test]
    fn kubernetes_functions() {
        all_true(&[
            "quantity(object.spec.memory).isGreaterThan(quantity('500Mi')) && quantity('1').add(1).compareTo(quantity('2')) == 0",
            "isQuantity('1.5Gi') && !isQuantity('x') && quantity('2k').asInteger() == 2000 && quantity('-1').sign() == -1",
            "ip('10.0.0.1').family() == 4 && ip('::1').isLoopback() && isIP('1.2.3.4') && !isIP('1.2.3') && string(ip('::1')) == '::1'",
            "cidr('10.0.0.0/8').containsIP('10.1.2.3') && cidr('10.0.0.0/8').containsCIDR(cidr('10.1.0.0/16'))",
            "cidr('10.1.2.3/8').masked() == cidr('10.0.0.0/8') && cidr('10.0.0.0/8').prefixLength() == 8 && isCIDR('::/0')",
            "ip.isCanonical('127.0.0.1') && !ip.isCanonical('::0001')",
            "url('https://u.io:8080/a/b?x=1&x=2').getHost() == 'u.io:8080' && url('https://u.io/a').getScheme() == 'https'",
            "url('https://u.io:80/p?k=v').getQuery() == {'k': ['v']} && url('https://[::1]:80/').getHostname() == '::1' && isURL('/x')",
            "semver('1.2.3').isLessThan(semver('1.10.0')) && isSemver('1.0.0-rc.1') && !isSemver('v1') && semver('1.2.3').minor() == 2",
            "semver('v1.2', true).compareTo(semver('1.2.0')) == 0",
            "!format.dns1123Label().validate('abc').hasValue() && format.named('dns1123Label').value().validate('A_B').hasValue()",
            "has(object.metadata) && 'got ' + string(object.spec.replicas) == 'got 2'",
        ]);
    }

    #[test]
    fn results_must_be_of_the_wanted_type() {
        let error = |expression: &str, wanted: &[Type]| Scope::default().compile(expression, wanted).err().unwrap_or_default();
        assert_eq!(error("1", &[Type::Bool]), "must evaluate to bool but got int");
        assert_eq!(error("1", &[Type::String, Type::Null]), "must evaluate to one of [string null] but got int");
        assert!(error("... [] bad", &[]).starts_with("compilation failed: ERROR: <input>:1:2: Syntax error"));
        assert!(error("request.nope", &[]).contains("undefined field 'nope'"));
        assert!(error("params.x", &[]).contains("undeclared reference to 'params'"));
        assert!(error("authorizer.group('apps').resource('deployments').check('get').allowed()", &[Type::Bool]).is_empty());
        assert!(error("authorizer.requestResource.check('create').allowed()", &[Type::Bool]).is_empty());
    }

    #[test]
    fn variables_keep_their_types() {
        let mut scope = Scope::default();
        scope.add_variable("replicas", "object.spec.replicas").expect("compiles");
        scope.add_variable("odd", "variables.replicas % 2 == 1").expect("compiles");
        assert!(scope.compile("variables.odd", &[Type::Bool]).is_ok());
        assert!(scope.compile("variables.later", &[]).unwrap_err().contains("undefined field 'later'"));
        let patches = Scope { patches: true, ..Scope::default() };
        let object = patches.compile("Object{spec: Object.spec{replicas: object.spec.replicas + 1}}", &[]).expect("compiles");
        assert_eq!(object.result().to_string(), "Object");
        assert!(patches.compile("[JSONPatch{op: 'add', path: '/x', value: 1}]", &[]).is_ok());
        assert!(patches.compile("Object{spec: Object.metadata{}}", &[]).is_err());
    }
}
