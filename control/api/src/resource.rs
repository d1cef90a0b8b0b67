//! A resource: one kind in one version, and the facts every handler is driven by. The catalog holds the built-in and the custom ones.
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

/// Text that is static for built-in kinds and owned for custom ones.
pub type Text = Cow<'static, str>;

/// `group` is empty for core/v1.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupVersionKind {
    pub group: Text,
    pub version: Text,
    pub kind: Text,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupVersionResource {
    pub group: Text,
    pub version: Text,
    pub resource: Text,
}

/// Joins group and version as `apiVersion` has them: `v1`, `apps/v1`.
pub fn api_version(group: &str, version: &str) -> String {
    if group.is_empty() { version.to_string() } else { format!("{group}/{version}") }
}

/// Splits an `apiVersion` into group and version; the group is empty for `v1`.
pub fn split_api_version(api_version: &str) -> (&str, &str) {
    api_version.split_once('/').unwrap_or(("", api_version))
}

/// One entry under a resource, such as `pods/exec`, as discovery shows it.
#[derive(Clone, Debug)]
pub struct Subresource {
    /// The last path segment: `status`, `scale`, `exec`.
    pub name: Text,
    /// The kind of the body, with its group and version (`autoscaling/v1 Scale` under `apps/v1`).
    pub body: GroupVersionKind,
    /// Verbs of discovery: create, delete, get, patch, update.
    pub verbs: Vec<&'static str>,
}

/// How an object's name is checked at creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameRule {
    /// RFC 1123 subdomain: most kinds.
    Subdomain,
    /// RFC 1123 label: Namespace.
    Label,
    /// RFC 1035 label: Service.
    ServiceName,
    /// Any path segment without `/`, `%`: RBAC kinds.
    PathSegment,
    /// A canonical IP address: IPAddress.
    IpAddress,
    /// `version.group`: APIService; checked as a path segment here, its form by the kind's own validation.
    ApiService,
}

/// The facts of a kind that decide how writes are treated.
#[derive(Clone, Debug)]
pub struct Strategy {
    /// `status` is reset on create, kept by updates of the main resource, and the only thing `/status` changes.
    pub has_status: bool,
    /// `metadata.generation` is 1 on create and grows when the spec changes.
    pub has_generation: bool,
    /// PUT to a name that does not exist creates it (upstream's AllowCreateOnUpdate).
    pub create_on_update: bool,
    /// An update without resourceVersion is taken as unconditional (upstream's AllowUnconditionalUpdate).
    pub unconditional_update: bool,
    /// Deletion waits for `deletionGracePeriodSeconds` (pods only).
    pub graceful_deletion: bool,
    /// Dependents are orphaned when a v1 client asks for nothing (only ReplicationController upstream; false elsewhere).
    pub orphan_by_default: bool,
    /// Nothing is stored: the object is answered and forgotten (the reviews, Binding).
    pub create_only: bool,
    pub name_rule: NameRule,
}

/// One printer column of a custom resource.
#[derive(Clone, Debug, PartialEq)]
pub struct PrinterColumn {
    pub name: String,
    /// integer, number, string, boolean, date.
    pub kind: String,
    pub format: String,
    pub description: String,
    pub priority: i32,
    pub json_path: String,
}

/// `/scale` of a custom resource: JSON paths such as `.spec.replicas`.
#[derive(Clone, Debug, PartialEq)]
pub struct ScalePaths {
    pub spec_replicas: String,
    pub status_replicas: String,
    pub label_selector: Option<String>,
}

/// What a CustomResourceDefinition's version adds to a resource.
#[derive(Clone, Debug)]
pub struct CustomFacts {
    /// Name of the definition, `plural.group`.
    pub definition: String,
    /// The definition's resourceVersion: what was stored later fits the schema.
    pub since: u64,
    /// The structural schema, `openAPIV3Schema`; absent only for versions without one.
    pub schema: Option<Value>,
    pub preserve_unknown_fields: bool,
    pub columns: Vec<PrinterColumn>,
    pub selectable_fields: Vec<String>,
    pub scale: Option<ScalePaths>,
    /// `spec.conversion`, as is.
    pub conversion: Option<Value>,
    /// Stored objects may be in another version than this one.
    pub several_versions: bool,
}

/// One kind in one served version.
#[derive(Clone, Debug)]
pub struct Resource {
    pub group: Text,
    pub version: Text,
    pub kind: Text,
    pub list_kind: Text,
    pub plural: Text,
    pub singular: Text,
    pub short_names: Vec<Text>,
    pub categories: Vec<Text>,
    pub namespaced: bool,
    /// Verbs of discovery, sorted: create, delete, deletecollection, get, list, patch, update, watch.
    pub verbs: Vec<&'static str>,
    pub subresources: Vec<Subresource>,
    /// Group, version and kind in which objects of this resource are stored; two versions of one kind share it.
    pub storage: GroupVersionKind,
    /// Store key prefix without leading slash, shared by all versions: `pods`, `apps/deployments`; keys go on with `/namespace/name` or `/name`.
    pub storage_prefix: Text,
    /// Deprecation warning to send with every answer, if any.
    pub warning: Option<Text>,
    pub strategy: Strategy,
    /// Field labels beyond `metadata.name` and `metadata.namespace` that field selectors may use.
    pub field_labels: Vec<Text>,
    /// Present for custom resources.
    pub custom: Option<CustomFacts>,
}

impl Resource {
    pub fn api_version(&self) -> String {
        api_version(&self.group, &self.version)
    }

    pub fn gvk(&self) -> GroupVersionKind {
        GroupVersionKind { group: self.group.clone(), version: self.version.clone(), kind: self.kind.clone() }
    }

    pub fn gvr(&self) -> GroupVersionResource {
        GroupVersionResource { group: self.group.clone(), version: self.version.clone(), resource: self.plural.clone() }
    }

    /// `deployments.apps`, or `pods` for core: how messages name a resource.
    pub fn qualified(&self) -> String {
        if self.group.is_empty() { self.plural.to_string() } else { format!("{}.{}", self.plural, self.group) }
    }

    pub fn subresource(&self, name: &str) -> Option<&Subresource> {
        self.subresources.iter().find(|entry| entry.name == name)
    }

    pub fn has_verb(&self, verb: &str) -> bool {
        self.verbs.contains(&verb)
    }

    /// Whether this is the built-in kind `kind` of `group`, in any version.
    pub fn is(&self, group: &str, kind: &str) -> bool {
        self.custom.is_none() && self.group == group && self.kind == kind
    }

    /// Store key of one object, or of a namespace's or the whole resource's range (which end in `/`).
    pub fn key(&self, namespace: Option<&str>, name: Option<&str>) -> String {
        let mut key = format!("{}/", self.storage_prefix);
        if let Some(namespace) = namespace.filter(|_| self.namespaced) {
            key.push_str(namespace);
            key.push('/');
        }
        if let Some(name) = name {
            key.push_str(name);
        }
        key
    }
}

/// Every resource served now. Cheap to clone and to replace as a whole when a definition changes.
#[derive(Clone, Debug, Default)]
pub struct Catalog {
    /// group → version → plural.
    groups: BTreeMap<String, BTreeMap<String, BTreeMap<String, Arc<Resource>>>>,
}

impl Catalog {
    /// The built-in kinds.
    pub fn builtin() -> Catalog {
        let mut catalog = Catalog::default();
        for resource in crate::builtin::resources() {
            catalog.insert(resource.clone());
        }
        catalog
    }

    /// Adds a resource, or replaces the one of the same group, version and plural.
    pub fn insert(&mut self, resource: Arc<Resource>) {
        self.groups
            .entry(resource.group.to_string())
            .or_default()
            .entry(resource.version.to_string())
            .or_default()
            .insert(resource.plural.to_string(), resource);
    }

    /// Removes all versions of a custom resource; built-in kinds stay.
    pub fn remove_custom(&mut self, group: &str, plural: &str) {
        let Some(versions) = self.groups.get_mut(group) else { return };
        for resources in versions.values_mut() {
            if resources.get(plural).is_some_and(|resource| resource.custom.is_some()) {
                resources.remove(plural);
            }
        }
        versions.retain(|_, resources| !resources.is_empty());
        if versions.is_empty() {
            self.groups.remove(group);
        }
    }

    /// By URL: group (empty for core), version, plural.
    pub fn by_path(&self, group: &str, version: &str, plural: &str) -> Option<&Arc<Resource>> {
        self.groups.get(group)?.get(version)?.get(plural)
    }

    /// By body: group, version, kind.
    pub fn by_kind(&self, group: &str, version: &str, kind: &str) -> Option<&Arc<Resource>> {
        self.groups.get(group)?.get(version)?.values().find(|resource| resource.kind == kind)
    }

    /// In whichever version is preferred: for controllers that know only group and plural.
    pub fn preferred(&self, group: &str, plural: &str) -> Option<&Arc<Resource>> {
        self.versions(group).into_iter().find_map(|version| self.by_path(group, version, plural))
    }

    /// Groups that have a resource, in name order; core is the empty one.
    pub fn groups(&self) -> impl Iterator<Item = &str> {
        self.groups.keys().map(String::as_str)
    }

    /// A group's versions, preferred one first: GA before beta before alpha, greater numbers first.
    pub fn versions(&self, group: &str) -> Vec<&str> {
        let mut versions: Vec<&str> = self.groups.get(group).map(|map| map.keys().map(String::as_str).collect()).unwrap_or_default();
        versions.sort_by(|left, right| compare_versions(right, left));
        versions
    }

    /// Resources of one group and version, in name order.
    pub fn resources(&self, group: &str, version: &str) -> impl Iterator<Item = &Arc<Resource>> {
        self.groups.get(group).and_then(|versions| versions.get(version)).into_iter().flat_map(|resources| resources.values())
    }

    /// Everything served.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Resource>> {
        self.groups.values().flat_map(|versions| versions.values()).flat_map(|resources| resources.values())
    }
}

/// Kubernetes' version order: `v2` > `v1` > `v1beta2` > `v1beta1` > `v1alpha1` > anything else by reverse alphabet.
pub fn compare_versions(left: &str, right: &str) -> std::cmp::Ordering {
    match (version_rank(left), version_rank(right)) {
        (Some(left), Some(right)) => left.cmp(&right),
        (Some(_), None) => std::cmp::Ordering::Greater,
        (None, Some(_)) => std::cmp::Ordering::Less,
        (None, None) => right.cmp(left),
    }
}

/// (stability, major, minor); stability 2 is GA, 1 beta, 0 alpha.
fn version_rank(version: &str) -> Option<(u8, u32, u32)> {
    let rest = version.strip_prefix('v')?;
    for (word, stability) in [("alpha", 0), ("beta", 1)] {
        if let Some((major, minor)) = rest.split_once(word) {
            return Some((stability, major.parse().ok()?, minor.parse().ok()?));
        }
    }
    Some((2, rest.parse().ok()?, 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_sort_as_kubectl_expects() {
        let mut versions = ["v1beta1", "foo10", "v2", "v1", "v1alpha2", "v10", "foo1", "v11beta2"];
        versions.sort_by(|left, right| compare_versions(right, left));
        assert_eq!(versions, ["v10", "v2", "v1", "v11beta2", "v1beta1", "v1alpha2", "foo1", "foo10"]);
    }

    #[test]
    fn the_catalog_finds_builtin_kinds() {
        let catalog = Catalog::builtin();
        assert_eq!(catalog.by_path("apps", "v1", "deployments").map(|found| found.kind.to_string()), Some("Deployment".into()));
        assert_eq!(catalog.by_kind("", "v1", "Pod").map(|found| found.key(Some("a"), Some("b"))), Some("pods/a/b".into()));
        assert_eq!(catalog.versions("autoscaling"), ["v2", "v1"]);
    }
}
