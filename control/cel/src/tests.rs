//! Source in, value or message out.
use std::sync::Arc;

use serde_json::json;

use crate::{Bindings, Context, Env, Functions, Structure, Type, Value};

fn env() -> Env {
    Env::new(Arc::new(Functions::new(&[]))).with("object", Type::Dyn).with("n", Type::Int).with("spec", Type::Struct(Arc::new(Spec)))
}

/// A struct that contains itself.
struct Spec;

impl Structure for Spec {
    fn name(&self) -> String {
        "Spec".into()
    }

    fn field(&self, name: &str) -> Option<Type> {
        match name {
            "replicas" => Some(Type::Int),
            "inner" => Some(Type::Struct(Arc::new(Spec))),
            _ => None,
        }
    }
}

fn eval(source: &str) -> Result<serde_json::Value, String> {
    let program = env().compile(source).map_err(|issues| issues.to_string())?;
    let object = json!({
        "metadata": {"name": "web", "labels": {"app": "x", "tier": "front"}},
        "spec": {"replicas": 3, "ratio": 0.5, "list": [1, 2, 3], "names": ["b", "a"], "empty": []},
    });
    let bindings = Bindings::from([("object".to_string(), Value::from(&object)), ("n".to_string(), Value::Int(7))]);
    let value = program.eval(&Context::new(&bindings, 10_000)).map_err(|error| error.message)?;
    Ok(value.to_json().unwrap_or_else(|| format!("{value:?}").into()))
}

#[track_caller]
fn all_true(sources: &[&str]) {
    for source in sources {
        assert_eq!(eval(source), Ok(true.into()), "{source}");
    }
}

#[test]
fn operators_and_precedence() {
    all_true(&[
        "1 + 2 * 3 == 7 && -n == -7 && !(n < 7)",
        "7 / 2 == 3 && 7 % 2 == 1 && -7 / 2 == -3 && 1.5 * 2.0 == 3.0",
        "n > 1 ? true : false",
        "1 < 2.5 && 2u > 1 && dyn(1) == dyn(1.0) && dyn('1') != dyn(1)",
        "'a' + 'b' == 'ab' && [1] + [2] == [1, 2] && b'ab' == b'a' + b'b'",
        "2 in [1, 2] && 'a' in {'a': 1} && !('b' in {'a': 1})",
        "0x1F == 31 && -9223372036854775808 < 0 && 1e3 == 1000.0",
        r#""\u00e9\n" == "é\n" && r'\d' == '\\d' && '''a'b''' == "a'b" && '\x41' == 'A'"#,
        "{'a': [{'b': 1}, {'b': 2}]}.a[1].b == 2 // a comment",
        "type(1) == int && type('') == string && type(null) == null_type",
    ]);
}

#[test]
fn objects_and_macros() {
    all_true(&[
        "object.spec.replicas > 1 && object.metadata.labels['app'] == 'x'",
        "has(object.spec.replicas) && !has(object.spec.nothing)",
        "object.spec.list.all(x, x > 0) && object.spec.list.exists(x, x == 2) && object.spec.list.exists_one(x, x > 2)",
        "object.spec.list.map(x, x * 2) == [2, 4, 6] && object.spec.list.map(x, x > 1, x * 2) == [4, 6]",
        "object.spec.list.filter(x, x % 2 == 1) == [1, 3] && object.metadata.labels.all(k, k != '')",
        "object.spec.list.all(i, v, i + 1 == v) && object.spec.list.transformList(i, v, i * v) == [0, 2, 6]",
        "object.metadata.labels.transformMap(k, v, k + v) == {'app': 'appx', 'tier': 'tierfront'}",
        "object.?spec.?nothing.orValue(5) == 5 && object.?spec.?replicas.value() == 3 && !object[?'x'].hasValue()",
        "[?optional.none(), ?optional.of(1)] == [1] && {?'a': optional.none()} == {}",
        "object.?spec.?replicas.optMap(r, r + 1).value() == 4",
        "cel.bind(x, object.spec.replicas, x * x) == 9",
        "false && object.nothing || true",
        "[1, 2].exists(x, object.nothing == x || x == 2)",
        "spec.?replicas == optional.none() || true",
    ]);
}

#[test]
fn libraries() {
    all_true(&[
        "'hello'.charAt(1) == 'e' && 'hello'.indexOf('l') == 2 && 'hello'.lastIndexOf('l') == 3 && 'hello'.indexOf('l', 3) == 3",
        "'a-b-c'.split('-') == ['a', 'b', 'c'] && 'a-b-c'.split('-', 2) == ['a', 'b-c'] && ['a', 'b'].join('-') == 'a-b'",
        "'Hello'.substring(1, 3) == 'el' && ' x '.trim() == 'x' && 'aXa'.replace('a', 'b') == 'bXb' && 'A'.lowerAscii() == 'a'",
        "'abc123'.matches('[a-z]+[0-9]+') && 'abc 123'.find('[0-9]+') == '123' && '1 2 3'.findAll('[0-9]', 2) == ['1', '2']",
        "'%s is %d, %.2f, %x, %s'.format([dyn('a'), 3, 1.5, 255, [1, 2]]) == 'a is 3, 1.50, ff, [1, 2]'",
        "[1, 2, 3].sum() == 6 && [3, 1].min() == 1 && ['b', 'a'].max() == 'b' && [1, 2].isSorted() && [1, 2, 1].lastIndexOf(1) == 2",
        "[3, 1, 2].sort() == [1, 2, 3] && [1, 1, 2].distinct() == [1, 2] && [[1], [2, 3]].flatten() == [1, 2, 3]",
        "['bb', 'a'].sortBy(x, x.size()) == ['a', 'bb'] && [1, 2, 3].slice(1, 3) == [2, 3] && lists.range(3) == [0, 1, 2]",
        "[1, 2].first().value() == 1 && ![].last().hasValue() && sets.contains([1, 2], [2]) && sets.equivalent([1, 1], [1])",
        "timestamp('2024-02-29T12:30:00Z').getDayOfYear() == 59 && timestamp('2024-01-01T00:00:00Z').getHours('+02:00') == 2",
        "duration('1h30m') > duration('89m') && duration('90m').getHours() == 1 && string(duration('1500ms')) == '1.5s'",
        "timestamp('2024-01-02T00:00:00Z') - timestamp('2024-01-01T00:00:00Z') == duration('24h')",
        "int('42') == 42 && string(1.5) == '1.5' && double('2') == 2.0 && bool('true') && uint(3) == 3u && size('é') == 1",
        "strings.quote('a\"b') == '\"a\\\\\"b\"'",
    ]);
}

#[test]
fn failures_of_evaluation() {
    for (source, message) in [
        ("object.nothing", "no such key: nothing"),
        ("object.spec.list[3]", "index out of bounds: 3"),
        ("1 / 0", "division by zero"),
        ("9223372036854775807 + 1", "integer overflow"),
        ("object.spec.replicas + 'a'", "no such overload"),
        ("object.nothing && true", "no such key: nothing"),
        ("optional.none().value()", "optional.none() dereference"),
        ("[1,2,3,4,5,6,7,8,9,10].all(a, lists.range(5000).all(b, b >= 0))", "operation cancelled: actual cost limit exceeded"),
    ] {
        assert_eq!(eval(source), Err(message.to_string()), "{source}");
    }
}

#[test]
fn mistakes_are_told_as_cel_go_tells_them() {
    for (source, message) in [
        (
            "spec.replicas > '1'",
            "ERROR: <input>:1:15: found no matching overload for '_>_' applied to '(int, string)'\n | spec.replicas > '1'\n | ..............^",
        ),
        ("spec.inner.inner.nope < 10", "undefined field 'nope'"),
        ("'got ' + spec.replicas", "found no matching overload for '_+_' applied to '(string, int)'"),
        ("'a'.startsWith(1)", "found no matching overload for 'startsWith' applied to 'string.(int)'"),
        ("nothing == 1", "undeclared reference to 'nothing' (in container '')"),
        ("nothing(1)", "undeclared reference to 'nothing' (in container '')"),
        ("... [] bad", "ERROR: <input>:1:2: Syntax error: mismatched input '.'"),
        ("1 +", "Syntax error: mismatched input '<EOF>'"),
        ("'abc", "Syntax error: token recognition error: unterminated string"),
        ("has(object)", "invalid argument to has() macro"),
        ("[1, 'a']", "expected type 'int' but found 'string'"),
        ("n.all(x, true)", "cannot be range of a comprehension"),
        ("n.field", "type 'int' does not support field selection"),
        ("Nope{a: 1}", "undeclared reference to 'Nope'"),
        ("1 && true", "found no matching overload for '_&&_' applied to '(int, bool)'"),
    ] {
        let error = env().compile(source).expect_err(source).to_string();
        assert!(error.contains(message), "{source}: {error}");
    }
}

#[test]
fn types_follow_the_values() {
    for (source, kind) in [
        ("n > 1", "bool"),
        ("object.spec", "dyn"),
        ("[1].map(x, string(x))", "list(string)"),
        ("{'a': 1}", "map(string, int)"),
        ("n > 1 ? [1] : []", "list(int)"),
        ("spec.inner", "Spec"),
        ("optional.of(n).orValue(2)", "int"),
    ] {
        let program = env().compile(source).unwrap_or_else(|error| panic!("{source}: {error}"));
        assert_eq!(program.result().to_string(), kind, "{source}");
    }
}

/// On the stack of a server's thread, which is as large as a test's.
#[test]
fn trees_are_only_so_high() {
    let within = [
        vec!["object.spec.replicas == 3"; 3000].join(" || "),
        vec!["n > 0"; 2000].join(" && "),
        vec!["n"; 240].join(" + "),
        format!("{}true{}", "(".repeat(90), ")".repeat(90)),
        format!("{}true", "!".repeat(90)),
        format!("{}1{}", "[".repeat(90), "]".repeat(90)),
    ];
    for source in &within {
        assert!(eval(source).is_ok(), "{}: {:?}", &source[..20], eval(source));
    }
    let beyond = [
        vec!["n"; 20_000].join("+"),
        format!("object{}", ".a".repeat(40_000)),
        format!("object{}", "[0]".repeat(30_000)),
        format!("n{}", ".a()".repeat(20_000)),
        format!("{}n{}", "(".repeat(90), format!("{})", ".a".repeat(200)).repeat(90)),
        format!("{}1{}", "[".repeat(40_000), "]".repeat(40_000)),
        format!("{}true", "!".repeat(90_000)),
        format!("{}n", "true ? n : ".repeat(5_000)),
    ];
    for source in &beyond {
        let error = eval(source).expect_err("is refused");
        assert!(error.contains("recursion"), "{}: {}", &source[..20], &error[..60]);
    }
}
