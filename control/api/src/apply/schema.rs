//! How a value merges: one view of the built-in structs' facts and of custom resources' schemas.
use serde_json::Value;

use super::set::Element;
use crate::resource::Resource;
use crate::types::{self, ListType, Merge, Shape, TypeId};

static PLAIN: Merge = Merge { patch_key: None, patch_scalars: false, retain_keys: false, replace: false, list: ListType::Unset };

/// A value's type.
#[derive(Clone, Copy, Debug)]
pub enum Type<'a> {
    Struct(TypeId),
    /// A field of a built-in struct, or what its lists and maps hold.
    Field(&'a Shape, &'a Merge),
    /// Of a custom resource; `is_resource` where it has the fields that all objects have.
    Custom {
        schema: &'a Value,
        is_resource: bool,
    },
    /// Nothing is known: maps merge by key, lists as wholes.
    Deduced,
    /// Nothing is known: all is one.
    Whole,
    Text,
}

/// How one value of a type is treated.
#[derive(Clone, Debug)]
pub enum Form<'a> {
    Scalar,
    List { item: Type<'a>, keyed: Keyed<'a> },
    Map { atomic: bool },
}

/// How a list's items are told apart.
#[derive(Clone, Debug)]
pub enum Keyed<'a> {
    /// Not at all: the list is one.
    Atomic,
    Set,
    By(Vec<&'a str>),
}

/// The type of a resource's objects.
pub fn root(resource: &Resource) -> Type<'_> {
    match &resource.custom {
        Some(custom) => match &custom.schema {
            Some(schema) => Type::Custom { schema, is_resource: true },
            None => Type::Custom { schema: &Value::Null, is_resource: true },
        },
        None => types::by_kind(&resource.group, &resource.version, &resource.kind).map_or(Type::Deduced, |found| Type::Struct(found.id)),
    }
}

fn flag(schema: &Value, key: &str) -> bool {
    schema[key] == true
}

/// The field of a struct, if it has it.
fn member<'a>(id: TypeId, key: &str) -> Option<(Type<'a>, bool)> {
    types::graph().types[id].field(key).map(|field| (Type::Field(&field.shape, &field.merge), true))
}

fn object_meta() -> Type<'static> {
    types::graph().by_name("meta/v1", "ObjectMeta").map_or(Type::Deduced, |found| Type::Struct(found.id))
}

impl<'a> Type<'a> {
    pub fn form(self, value: &Value) -> Form<'a> {
        let by_value = |atomic: bool| match value {
            Value::Array(_) => Form::List { item: Type::Whole, keyed: Keyed::Atomic },
            Value::Object(_) => Form::Map { atomic },
            _ => Form::Scalar,
        };
        match self {
            Type::Struct(id) => Form::Map { atomic: types::graph().types[id].atomic },
            Type::Field(shape, merge) => match shape {
                Shape::Struct(id) => Form::Map { atomic: types::graph().types[*id].atomic || merge.list == ListType::Atomic },
                Shape::Map(_) => Form::Map { atomic: merge.list == ListType::Atomic },
                Shape::List(item) => Form::List { item: Type::Field(item, &PLAIN), keyed: Keyed::of(&merge.list) },
                Shape::Embedded => by_value(false),
                Shape::Any => by_value(true),
                _ => Form::Scalar,
            },
            Type::Custom { schema, is_resource } => {
                custom_form(schema, is_resource).unwrap_or_else(|| by_value(!flag(schema, "x-kubernetes-preserve-unknown-fields")))
            }
            Type::Deduced => by_value(false),
            Type::Whole => by_value(true),
            Type::Text => Form::Scalar,
        }
    }

    /// The type of what a map has under a key, and whether the key is a declared field; none if it may not be there.
    pub fn child(self, key: &str) -> Option<(Type<'a>, bool)> {
        match self {
            Type::Struct(id) => member(id, key),
            Type::Field(Shape::Struct(id), _) => member(*id, key),
            Type::Field(Shape::Map(item), _) => Some((Type::Field(item, &PLAIN), false)),
            Type::Field(Shape::Embedded, _) | Type::Deduced => Some((Type::Deduced, false)),
            Type::Custom { schema, is_resource } => {
                custom_child(schema, is_resource || flag(schema, "x-kubernetes-embedded-resource"), key)
            }
            _ => Some((Type::Whole, false)),
        }
    }

    /// The default of a key field that an item leaves out.
    fn key_default(self, key: &str) -> Option<Value> {
        match self {
            Type::Field(Shape::Struct(id), _) => crate::default::constant_of(*id, key).cloned(),
            Type::Custom { schema, .. } => schema["properties"][key].get("default").cloned(),
            _ => None,
        }
    }
}

fn custom_form(schema: &Value, is_resource: bool) -> Option<Form<'_>> {
    if flag(schema, "x-kubernetes-int-or-string") {
        return Some(Form::Scalar);
    }
    match schema["type"].as_str() {
        Some("array") => {
            let item = schema.get("items").map_or(Type::Deduced, |schema| Type::Custom { schema, is_resource: false });
            let keyed = match schema["x-kubernetes-list-type"].as_str() {
                Some("set") => Keyed::Set,
                Some("map") => {
                    let keys = schema["x-kubernetes-list-map-keys"].as_array().into_iter().flatten();
                    Keyed::By(keys.filter_map(Value::as_str).collect())
                }
                _ => Keyed::Atomic,
            };
            Some(Form::List { item, keyed })
        }
        Some("object") => Some(Form::Map { atomic: schema["x-kubernetes-map-type"] == "atomic" }),
        Some(_) => Some(Form::Scalar),
        None if is_resource => Some(Form::Map { atomic: false }),
        None => None,
    }
}

fn custom_child<'a>(schema: &'a Value, is_resource: bool, key: &str) -> Option<(Type<'a>, bool)> {
    if is_resource {
        match key {
            "metadata" => return Some((object_meta(), true)),
            "apiVersion" | "kind" => return Some((Type::Text, true)),
            _ => {}
        }
    }
    let properties = schema.get("properties").and_then(Value::as_object);
    if let Some(schema) = properties.and_then(|properties| properties.get(key)) {
        return Some((Type::Custom { schema, is_resource: false }, true));
    }
    match schema.get("additionalProperties") {
        Some(extra @ Value::Object(_)) => return Some((Type::Custom { schema: extra, is_resource: false }, false)),
        Some(Value::Bool(true)) => return Some((Type::Deduced, false)),
        _ => {}
    }
    let free = flag(schema, "x-kubernetes-preserve-unknown-fields") || properties.is_none_or(serde_json::Map::is_empty);
    free.then_some((Type::Deduced, false))
}

impl<'a> Keyed<'a> {
    fn of(list: &'a ListType) -> Keyed<'a> {
        match list {
            ListType::Unset | ListType::Atomic => Keyed::Atomic,
            ListType::Set => Keyed::Set,
            ListType::Map(keys) => Keyed::By(keys.clone()),
        }
    }

    /// What an item is known by.
    pub fn element(&self, item: Type<'_>, index: usize, value: &Value) -> Result<Element, String> {
        match self {
            Keyed::Atomic => Ok(Element::Index(index)),
            Keyed::Set => match value {
                Value::Object(_) => Err("associative list without keys has an element that's a map type".into()),
                Value::Array(_) => Err("not supported: associative list with lists as elements".into()),
                Value::Null => Err("associative list without keys has an element that's an explicit null".into()),
                value => Ok(Element::Value(value.to_string())),
            },
            Keyed::By(keys) => {
                let Value::Object(map) = value else {
                    let what = if value.is_null() { "a null element" } else { "non-map elements" };
                    return Err(format!("associative list with keys may not have {what}"));
                };
                let found = |key: &&str| map.get(*key).cloned().or_else(|| item.key_default(key)).map(|value| (key.to_string(), value));
                let mut fields: Vec<(String, Value)> = keys.iter().filter_map(found).collect();
                if fields.is_empty() {
                    let names: Vec<String> = keys.iter().map(|key| format!("{key:?}")).collect();
                    return Err(format!(
                        "associative list with keys has an element that omits all key fields [{}] (and doesn't have default values for any key fields)",
                        names.join(" ")
                    ));
                }
                fields.sort_by(|left, right| left.0.cmp(&right.0));
                Ok(Element::Key(Value::Object(fields.into_iter().collect()).to_string()))
            }
        }
    }
}
