//! Semantic versions.
use std::cmp::Ordering;

use outrigger_cel::{Error, Library, Opaque, Value};

/// Build metadata is checked and forgotten: it takes part in no comparison.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Version {
    numbers: [u64; 3],
    pre: Vec<String>,
}

impl Opaque for Version {
    fn type_name(&self) -> &'static str {
        "kubernetes.Semver"
    }

    fn equals(&self, other: &dyn Opaque) -> bool {
        other.downcast() == Some(self)
    }
}

impl Version {
    /// Normalizing takes a leading `v`, missing parts and leading zeros.
    fn parse(text: &str, normalize: bool) -> Option<Version> {
        let text = if normalize { text.strip_prefix('v').unwrap_or(text) } else { text };
        let (text, build) = text.split_once('+').map_or((text, None), |(text, build)| (text, Some(build)));
        let (numbers, pre) = text.split_once('-').map_or((text, None), |(numbers, pre)| (numbers, Some(pre)));
        let mut parts: Vec<&str> = numbers.split('.').collect();
        if normalize {
            parts.resize(parts.len().max(3), "0");
        }
        let [major, minor, patch] = parts.as_slice() else { return None };
        let number = |part: &&str| {
            let digits = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
            let plain = normalize || *part == "0" || !part.starts_with('0');
            part.parse().ok().filter(|_| digits && plain)
        };
        let word = |word: &&str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        let pre: Vec<&str> = pre.map(|pre| pre.split('.').collect()).unwrap_or_default();
        let zeros = |word: &&str| word.len() > 1 && word.starts_with('0') && word.bytes().all(|byte| byte.is_ascii_digit());
        let valid = pre.iter().all(|part| word(part) && !zeros(part)) && build.is_none_or(|build| build.split('.').all(|part| word(&part)));
        valid.then_some(Version {
            numbers: [number(major)?, number(minor)?, number(patch)?],
            pre: pre.into_iter().map(String::from).collect(),
        })
    }
}

impl PartialOrd for Version {
    fn partial_cmp(&self, other: &Version) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Version {
    /// A pre-release comes before its release; numbers before words.
    fn cmp(&self, other: &Version) -> Ordering {
        let part = |left: &String, right: &String| match (left.parse::<u64>(), right.parse::<u64>()) {
            (Ok(left), Ok(right)) => left.cmp(&right),
            (Ok(_), Err(_)) => Ordering::Less,
            (Err(_), Ok(_)) => Ordering::Greater,
            _ => left.cmp(right),
        };
        let pre = || match (self.pre.is_empty(), other.pre.is_empty()) {
            (true, true) => Ordering::Equal,
            (true, false) => Ordering::Greater,
            (false, true) => Ordering::Less,
            _ => {
                let differing = self.pre.iter().zip(&other.pre).map(|(left, right)| part(left, right)).find(|order| order.is_ne());
                differing.unwrap_or(self.pre.len().cmp(&other.pre.len()))
            }
        };
        self.numbers.cmp(&other.numbers).then_with(pre)
    }
}

fn parsed(args: &[Value]) -> Result<Version, Error> {
    let normalize = args.get(1).and_then(Value::as_bool).unwrap_or_default();
    Version::parse(args[0].as_str().unwrap_or_default(), normalize).ok_or_else(|| Error::new("invalid semantic version"))
}

fn of(value: &Value) -> Result<&Version, Error> {
    value.downcast().ok_or_else(Error::no_overload)
}

fn number(args: &[Value], at: usize) -> Result<Value, Error> {
    Ok(Value::Int(of(&args[0])?.numbers[at] as i64))
}

pub const VERSIONS: Library = &[
    ("semver(string) -> kubernetes.Semver", |a| parsed(a).map(Value::opaque)),
    ("semver(string, bool) -> kubernetes.Semver", |a| parsed(a).map(Value::opaque)),
    ("isSemver(string) -> bool", |a| Ok(parsed(a).is_ok().into())),
    ("isSemver(string, bool) -> bool", |a| Ok(parsed(a).is_ok().into())),
    ("kubernetes.Semver.compareTo(kubernetes.Semver) -> int", |a| Ok(Value::Int(of(&a[0])?.cmp(of(&a[1])?) as i64))),
    ("kubernetes.Semver.isGreaterThan(kubernetes.Semver) -> bool", |a| Ok((of(&a[0])? > of(&a[1])?).into())),
    ("kubernetes.Semver.isLessThan(kubernetes.Semver) -> bool", |a| Ok((of(&a[0])? < of(&a[1])?).into())),
    ("kubernetes.Semver.major() -> int", |a| number(a, 0)),
    ("kubernetes.Semver.minor() -> int", |a| number(a, 1)),
    ("kubernetes.Semver.patch() -> int", |a| number(a, 2)),
];
