//! Small facts about objects that several controllers need: keys, owners, selectors, pod phases, names.
use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ObjectReference, Pod, PodCondition, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference, Time};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::Resource;
use rand::Rng;

pub type Labels = BTreeMap<String, String>;

/// `namespace/name`; the namespace is empty for cluster-scoped kinds. Ordered by namespace first, so that one
/// namespace's objects are neighbours in a store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    pub namespace: String,
    pub name: String,
}

impl Key {
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }

    pub fn of<K: Resource>(object: &K) -> Self {
        Self::of_meta(object.meta())
    }

    pub fn of_meta(meta: &ObjectMeta) -> Self {
        Self::new(meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default())
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.namespace.is_empty() { f.write_str(&self.name) } else { write!(f, "{}/{}", self.namespace, self.name) }
    }
}

/// The current time at the API's precision, so that a value survives its own round trip.
pub fn now() -> Time {
    seconds(Timestamp::now())
}

pub fn seconds(time: Timestamp) -> Time {
    Time(Timestamp::from_second(time.as_second()).unwrap_or(time))
}

pub fn uid(meta: &ObjectMeta) -> &str {
    meta.uid.as_deref().unwrap_or_default()
}

pub fn name(meta: &ObjectMeta) -> &str {
    meta.name.as_deref().unwrap_or_default()
}

pub fn namespace(meta: &ObjectMeta) -> &str {
    meta.namespace.as_deref().unwrap_or_default()
}

pub fn labels(meta: &ObjectMeta) -> &Labels {
    static NONE: Labels = Labels::new();
    meta.labels.as_ref().unwrap_or(&NONE)
}

pub fn annotation<'a>(meta: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    meta.annotations.as_ref()?.get(key).map(String::as_str)
}

pub fn has_finalizer(meta: &ObjectMeta, finalizer: &str) -> bool {
    meta.finalizers.iter().flatten().any(|entry| entry == finalizer)
}

/// A reference by which `object` controls another one.
pub fn controller_ref<K: Resource<DynamicType = ()>>(object: &K) -> OwnerReference {
    OwnerReference {
        api_version: K::api_version(&()).into_owned(),
        kind: K::kind(&()).into_owned(),
        name: name(object.meta()).to_owned(),
        uid: uid(object.meta()).to_owned(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

pub fn controller_of(meta: &ObjectMeta) -> Option<&OwnerReference> {
    meta.owner_references.iter().flatten().find(|reference| reference.controller == Some(true))
}

pub fn is_controlled_by(meta: &ObjectMeta, owner_uid: &str) -> bool {
    controller_of(meta).is_some_and(|reference| reference.uid == owner_uid)
}

pub fn reference<K: Resource<DynamicType = ()>>(object: &K) -> ObjectReference {
    let meta = object.meta();
    ObjectReference {
        api_version: Some(K::api_version(&()).into_owned()),
        kind: Some(K::kind(&()).into_owned()),
        namespace: meta.namespace.clone(),
        name: meta.name.clone(),
        uid: meta.uid.clone(),
        resource_version: meta.resource_version.clone(),
        field_path: None,
    }
}

/// Whether a label selector selects `labels`. An absent selector selects nothing, an empty one everything.
pub fn selects(selector: Option<&LabelSelector>, labels: &Labels) -> bool {
    let Some(selector) = selector else { return false };
    let equal = selector.match_labels.iter().flatten().all(|(key, value)| labels.get(key) == Some(value));
    equal
        && selector.match_expressions.iter().flatten().all(|requirement| {
            let value = labels.get(&requirement.key);
            let listed = || value.is_some_and(|value| requirement.values.iter().flatten().any(|entry| entry == value));
            match requirement.operator.as_str() {
                "In" => listed(),
                "NotIn" => !listed(),
                "Exists" => value.is_some(),
                "DoesNotExist" => value.is_none(),
                _ => false,
            }
        })
}

pub fn selects_everything(selector: &LabelSelector) -> bool {
    selector.match_labels.as_ref().is_none_or(BTreeMap::is_empty) && selector.match_expressions.as_ref().is_none_or(Vec::is_empty)
}

/// A plain equality selector (Service, ReplicationController); an empty one selects nothing.
pub fn selects_all_of(selector: Option<&Labels>, labels: &Labels) -> bool {
    selector.is_some_and(|selector| !selector.is_empty() && selector.iter().all(|(key, value)| labels.get(key) == Some(value)))
}

pub fn label_selector(match_labels: Labels) -> LabelSelector {
    LabelSelector { match_labels: Some(match_labels), match_expressions: None }
}

pub fn pod_phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

pub fn is_terminal(pod: &Pod) -> bool {
    matches!(pod_phase(pod), "Succeeded" | "Failed")
}

pub fn is_terminating(meta: &ObjectMeta) -> bool {
    meta.deletion_timestamp.is_some()
}

/// Neither finished nor on its way out.
pub fn is_active(pod: &Pod) -> bool {
    !is_terminal(pod) && !is_terminating(&pod.metadata)
}

pub fn pod_condition<'a>(pod: &'a Pod, kind: &str) -> Option<&'a PodCondition> {
    pod.status.as_ref()?.conditions.iter().flatten().find(|condition| condition.type_ == kind)
}

pub fn is_ready(pod: &Pod) -> bool {
    pod_condition(pod, "Ready").is_some_and(|condition| condition.status == "True")
}

/// Ready for at least `min_ready_seconds`.
pub fn is_available(pod: &Pod, min_ready_seconds: i32, now: Timestamp) -> bool {
    available_in(pod, min_ready_seconds, now) == Some(0)
}

/// Seconds until a ready pod counts as available (0 when it already does); None when it isn't ready.
pub fn available_in(pod: &Pod, min_ready_seconds: i32, now: Timestamp) -> Option<i64> {
    let condition = pod_condition(pod, "Ready").filter(|condition| condition.status == "True")?;
    if min_ready_seconds <= 0 {
        return Some(0);
    }
    let since = condition.last_transition_time.as_ref()?.0;
    Some((since.as_second() + i64::from(min_ready_seconds) - now.as_second()).max(0))
}

pub fn pod_node(pod: &Pod) -> &str {
    pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or_default()
}

/// A count that may be given as a percentage of `total`. None for what is neither.
pub fn scaled(value: Option<&IntOrString>, total: i32, round_up: bool) -> Option<i32> {
    match value? {
        IntOrString::Int(number) => Some(*number),
        IntOrString::String(text) => {
            let percent: i64 = text.strip_suffix('%')?.parse().ok()?;
            let product = percent * i64::from(total);
            let value = if round_up { (product + 99).div_euclid(100) } else { product.div_euclid(100) };
            i32::try_from(value).ok()
        }
    }
}

/// Oldest first; names decide between objects of one second.
pub fn by_creation(left: &ObjectMeta, right: &ObjectMeta) -> std::cmp::Ordering {
    left.creation_timestamp.cmp(&right.creation_timestamp).then_with(|| left.name.cmp(&right.name))
}

const SAFE: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

/// Random letters that spell no words, as the suffixes of generated names.
pub fn random_suffix(length: usize) -> String {
    let mut rng = rand::rng();
    (0..length).map(|_| char::from(SAFE[rng.random_range(0..SAFE.len())])).collect()
}

/// Maps a number's decimal digits into the safe alphabet.
pub fn safe_encode(text: &str) -> String {
    text.bytes().map(|byte| char::from(SAFE[usize::from(byte) % SAFE.len()])).collect()
}

/// FNV-1a over the JSON form. Upstream hashes its own dump of the Go value, so the numbers differ, but they are
/// as stable: a template's hash is only ever compared with those that the same cluster wrote.
pub fn stable_hash<T: serde::Serialize>(value: &T, collision_count: Option<i32>) -> u32 {
    let mut hash: u32 = 0x811c_9dc5;
    let mut eat = |bytes: &[u8]| {
        for byte in bytes {
            hash ^= u32::from(*byte);
            hash = hash.wrapping_mul(0x0100_0193);
        }
    };
    eat(&serde_json::to_vec(value).unwrap_or_default());
    if let Some(count) = collision_count {
        eat(&count.to_le_bytes());
    }
    hash
}

/// The value of the `pod-template-hash` label and the suffix of a ReplicaSet's name.
pub fn template_hash(template: &PodTemplateSpec, collision_count: Option<i32>) -> String {
    safe_encode(&stable_hash(template, collision_count).to_string())
}

/// Cuts a generated name's prefix so that a five letter suffix still fits the limit of 63.
pub fn name_prefix(owner: &str) -> String {
    let prefix = format!("{owner}-");
    if prefix.len() > 58 { owner.chars().take(58).collect() } else { prefix }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelectorRequirement;

    use super::*;

    fn map(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn label_selectors_select_as_upstream_does() {
        let requirement = |operator: &str, values: &[&str]| LabelSelector {
            match_labels: None,
            match_expressions: Some(vec![LabelSelectorRequirement {
                key: "app".into(),
                operator: operator.into(),
                values: Some(values.iter().map(|value| (*value).to_owned()).collect()),
            }]),
        };
        let cases = [
            (label_selector(map(&[("app", "web")])), map(&[("app", "web"), ("x", "y")]), true),
            (label_selector(map(&[("app", "web")])), map(&[]), false),
            (requirement("In", &["web", "db"]), map(&[("app", "db")]), true),
            (requirement("In", &["web"]), map(&[]), false),
            (requirement("NotIn", &["web"]), map(&[]), true),
            (requirement("Exists", &[]), map(&[("app", "")]), true),
            (requirement("DoesNotExist", &[]), map(&[("app", "")]), false),
            (LabelSelector::default(), map(&[]), true),
        ];
        for (selector, labels, expected) in cases {
            assert_eq!(selects(Some(&selector), &labels), expected, "{selector:?} {labels:?}");
        }
        assert!(!selects(None, &map(&[])));
        assert!(!selects_all_of(Some(&map(&[])), &map(&[("a", "b")])));
    }

    #[test]
    fn percentages_round_as_asked() {
        let text = |text: &str| IntOrString::String(text.into());
        let cases = [
            (text("25%"), 10, true, Some(3)),
            (text("25%"), 10, false, Some(2)),
            (text("0%"), 5, true, Some(0)),
            (text("5"), 5, true, None),
        ];
        for (value, total, up, expected) in cases {
            assert_eq!(scaled(Some(&value), total, up), expected);
        }
        assert_eq!(scaled(Some(&IntOrString::Int(7)), 1, true), Some(7));
        assert_eq!(scaled(None, 1, true), None);
    }

    #[test]
    fn hashes_depend_on_the_template_and_the_collision_count_only() {
        let mut template = PodTemplateSpec::default();
        let first = template_hash(&template, None);
        assert_eq!(first, template_hash(&template.clone(), None));
        assert_ne!(first, template_hash(&template, Some(1)));
        template.metadata = Some(ObjectMeta { labels: Some(map(&[("a", "b")])), ..Default::default() });
        assert_ne!(first, template_hash(&template, None));
        assert!(first.bytes().all(|byte| SAFE.contains(&byte)));
        assert_eq!(random_suffix(5).len(), 5);
    }

    #[test]
    fn availability_counts_from_the_last_transition() {
        let mut pod = Pod::default();
        let now = Timestamp::from_second(100).unwrap();
        assert_eq!(available_in(&pod, 10, now), None);
        pod.status.get_or_insert_default().conditions = Some(vec![PodCondition {
            type_: "Ready".into(),
            status: "True".into(),
            last_transition_time: Some(Time(Timestamp::from_second(95).unwrap())),
            ..Default::default()
        }]);
        assert_eq!(available_in(&pod, 10, now), Some(5));
        assert!(is_available(&pod, 0, now) && is_available(&pod, 5, now) && !is_available(&pod, 6, now));
    }
}
