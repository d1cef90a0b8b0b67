//! Types of the variables: the request, namespaces, built-in kinds, custom resources, and the objects that patches are made of.
use std::sync::Arc;

use outrigger_cel::{Library, Structure, Type, Value};

use crate::resource::Resource;
use crate::types::{self, Shape, TypeId};

/// A struct whose fields are listed.
struct Fixed {
    name: &'static str,
    fields: Vec<(String, Type)>,
}

impl Structure for Fixed {
    fn name(&self) -> String {
        self.name.into()
    }

    fn field(&self, name: &str) -> Option<Type> {
        self.fields.iter().find(|(field, _)| field == name).map(|(_, kind)| kind.clone())
    }
}

pub fn fixed(name: &'static str, fields: Vec<(String, Type)>) -> Type {
    Type::Struct(Arc::new(Fixed { name, fields }))
}

fn named(name: &'static str, fields: &[(&str, Type)]) -> Type {
    fixed(name, fields.iter().map(|(field, kind)| (field.to_string(), kind.clone())).collect())
}

/// `request`
pub fn request() -> Type {
    use Type::{Bool, Dyn, String};
    let kind = named("kubernetes.GroupVersionKind", &[("group", String), ("version", String), ("kind", String)]);
    let resource = named("kubernetes.GroupVersionResource", &[("group", String), ("version", String), ("resource", String)]);
    let extra = Type::map(Type::list(String));
    let user = named("kubernetes.UserInfo", &[("username", String), ("uid", String), ("groups", Type::list(String)), ("extra", extra)]);
    named(
        "kubernetes.AdmissionRequest",
        &[
            ("kind", kind.clone()),
            ("resource", resource.clone()),
            ("subResource", String),
            ("requestKind", kind),
            ("requestResource", resource),
            ("requestSubResource", String),
            ("name", String),
            ("namespace", String),
            ("operation", String),
            ("userInfo", user),
            ("dryRun", Bool),
            ("options", Dyn),
        ],
    )
}

/// `namespaceObject`: what of a Namespace is shown.
pub fn namespace() -> Type {
    use Type::{Int, String, Timestamp};
    let (strings, labels) = (Type::list(String), Type::map(String));
    let metadata = named(
        "kubernetes.NamespaceMetadata",
        &[
            ("name", String),
            ("generateName", String),
            ("namespace", String),
            ("labels", labels.clone()),
            ("annotations", labels),
            ("UID", String),
            ("creationTimestamp", Timestamp),
            ("deletionGracePeriodSeconds", Int),
            ("deletionTimestamp", Timestamp),
            ("generation", Int),
            ("resourceVersion", String),
            ("finalizers", strings.clone()),
        ],
    );
    let condition = named(
        "kubernetes.NamespaceCondition",
        &[("status", String), ("type", String), ("lastTransitionTime", Timestamp), ("message", String), ("reason", String)],
    );
    let spec = named("kubernetes.NamespaceSpec", &[("finalizers", strings)]);
    let status = named("kubernetes.NamespaceStatus", &[("conditions", Type::list(condition)), ("phase", String)]);
    named("kubernetes.Namespace", &[("metadata", metadata), ("spec", spec), ("status", status)])
}

/// The type of a kind's objects; none where there is no schema.
pub fn kind_type(resource: &Resource) -> Option<Type> {
    match &resource.custom {
        None => types::by_kind(&resource.group, &resource.version, &resource.kind).map(|found| Type::Struct(Arc::new(BuiltIn(found.id)))),
        Some(facts) => {
            let schema = facts.schema.clone()?;
            Some(Type::Struct(Arc::new(Schema { name: resource.kind.to_string(), schema, is_resource: true })))
        }
    }
}

/// A struct of the built-in kinds.
struct BuiltIn(TypeId);

impl Structure for BuiltIn {
    fn name(&self) -> String {
        let found = &types::graph().types[self.0];
        format!("{}.{}", found.package, found.name)
    }

    fn field(&self, name: &str) -> Option<Type> {
        types::graph().types[self.0].field(name).map(|field| shape_type(&field.shape))
    }
}

fn shape_type(shape: &Shape) -> Type {
    match shape {
        Shape::String | Shape::Quantity => Type::String,
        Shape::Int32 | Shape::Int64 => Type::Int,
        Shape::Double => Type::Double,
        Shape::Bool => Type::Bool,
        Shape::Bytes => Type::Bytes,
        Shape::Time | Shape::MicroTime => Type::Timestamp,
        Shape::IntOrString | Shape::Any | Shape::Embedded => Type::Dyn,
        Shape::Struct(id) => Type::Struct(Arc::new(BuiltIn(*id))),
        Shape::List(item) => Type::list(shape_type(item)),
        Shape::Map(item) => Type::map(shape_type(item)),
    }
}

/// An object of a structural schema.
struct Schema {
    name: String,
    schema: serde_json::Value,
    /// Has metadata, whatever the schema says.
    is_resource: bool,
}

impl Structure for Schema {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn field(&self, name: &str) -> Option<Type> {
        if self.is_resource {
            match name {
                "apiVersion" | "kind" => return Some(Type::String),
                "metadata" => {
                    return types::graph().by_name("meta/v1", "ObjectMeta").map(|found| Type::Struct(Arc::new(BuiltIn(found.id))));
                }
                _ => {}
            }
        }
        let property = self.schema.get("properties").and_then(|properties| properties.get(name))?;
        Some(schema_type(&format!("{}.{name}", self.name), property))
    }
}

fn schema_type(name: &str, schema: &serde_json::Value) -> Type {
    let flag = |key: &str| schema.get(key) == Some(&serde_json::Value::Bool(true));
    if flag("x-kubernetes-int-or-string") {
        return Type::Dyn;
    }
    let text = |key: &str| schema.get(key).and_then(serde_json::Value::as_str).unwrap_or_default();
    match (text("type"), text("format")) {
        ("string", "date" | "date-time" | "datetime") => Type::Timestamp,
        ("string", "duration") => Type::Duration,
        ("string", "byte") => Type::Bytes,
        ("string", _) => Type::String,
        ("integer", _) => Type::Int,
        ("number", _) => Type::Double,
        ("boolean", _) => Type::Bool,
        ("array", _) => Type::list(schema.get("items").map_or(Type::Dyn, |items| schema_type(&format!("{name}.@items"), items))),
        ("object", _) if schema.get("properties").is_some_and(|properties| !crate::meta::is_empty(properties)) => {
            let is_resource = flag("x-kubernetes-embedded-resource");
            Type::Struct(Arc::new(Schema { name: name.into(), schema: schema.clone(), is_resource }))
        }
        ("object", _) => match schema.get("additionalProperties").filter(|extra| extra.is_object()) {
            Some(extra) => Type::map(schema_type(&format!("{name}.@values"), extra)),
            None => Type::Dyn,
        },
        _ => Type::Dyn,
    }
}

/// `Object` and, by the path of the field it is for, `Object.spec.template`: any fields of any type, but structs must be at their place.
struct Patch(String);

impl Structure for Patch {
    fn name(&self) -> String {
        self.0.clone()
    }

    fn field(&self, name: &str) -> Option<Type> {
        Some(Type::Struct(Arc::new(PatchField(format!("{}.{name}", self.0)))))
    }
}

/// What may stand in a patch's field: its struct, a list of them, or anything plain. Their names say where they belong.
struct PatchField(String);

impl Structure for PatchField {
    fn name(&self) -> String {
        self.0.clone()
    }

    fn field(&self, _name: &str) -> Option<Type> {
        Some(Type::Dyn)
    }

    fn accepts(&self, other: &Type) -> bool {
        match other {
            Type::Struct(structure) => structure.name() == self.0 || !structure.name().starts_with("Object"),
            Type::List(item) => self.accepts(item),
            _ => true,
        }
    }
}

/// The types that mutations may construct.
pub fn patch_type(name: &str) -> Option<Type> {
    if name == "JSONPatch" {
        return Some(named("JSONPatch", &[("op", Type::String), ("path", Type::String), ("from", Type::String), ("value", Type::Dyn)]));
    }
    (name == "Object" || name.starts_with("Object.")).then(|| Type::Struct(Arc::new(Patch(name.into()))))
}

/// What an ApplyConfiguration evaluates to.
pub fn patch_object() -> Type {
    Type::Struct(Arc::new(Patch("Object".into())))
}

/// What a JSONPatch evaluates to.
pub fn patch_list() -> Type {
    Type::list(fixed("JSONPatch", Vec::new()))
}

pub const PATCHES: Library = &[("jsonpatch.escapeKey(string) -> string", |a| {
    Ok(Value::from(a[0].as_str().unwrap_or_default().replace('~', "~0").replace('/', "~1")))
})];
