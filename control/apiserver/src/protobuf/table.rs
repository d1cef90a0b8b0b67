//! The table of messages, read once from `messages.txt` (made by `tools/proto-fields.py` from upstream's generated.proto files).

use std::collections::HashMap;
use std::sync::LazyLock;

use outrigger_api::resource::split_api_version;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scalar {
    Text,
    Integer,
    Boolean,
    Double,
    Bytes,
}

/// Messages whose JSON form is not an object of their fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    Quantity,
    IntOrString,
    Time,
    MicroTime,
    /// Raw JSON bytes in field 1.
    Raw,
    Duration,
    /// A list of strings in field 1.
    Strings,
    SchemaOrArray,
    SchemaOrBool,
    SchemaOrStrings,
}

#[derive(Clone, Copy, Debug)]
pub enum Shape {
    Scalar(Scalar),
    Special(Special),
    Message(&'static str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Many {
    One,
    List,
    Map,
}

#[derive(Clone, Copy, Debug)]
pub struct Field {
    pub number: u32,
    pub name: &'static str,
    pub shape: Shape,
    pub many: Many,
    /// A zero value means that the field is absent.
    pub omit_zero: bool,
    /// The message's fields are those of the struct around it.
    pub inline: bool,
}

#[derive(Debug)]
pub struct Message {
    pub fields: Vec<Field>,
}

type Table = HashMap<&'static str, Message>;

static TABLE: LazyLock<Table> = LazyLock::new(|| {
    let mut table = Table::new();
    let mut current: Option<(&'static str, &'static str)> = None;
    for line in include_str!("messages.txt").lines() {
        match line.strip_prefix(' ') {
            None => {
                let (package, _) = line.split_once(' ').unwrap_or((line, ""));
                current = Some((line, package));
                table.insert(line, Message { fields: Vec::new() });
            }
            Some(text) => {
                if let Some((name, package)) = current
                    && let Some(field) = field(text, package)
                    && let Some(message) = table.get_mut(name)
                {
                    message.fields.push(field);
                }
            }
        }
    }
    table
});

fn field(text: &'static str, package: &str) -> Option<Field> {
    let mut words = text.split(' ');
    let (number, name, shape) = (words.next()?.parse().ok()?, words.next()?, words.next()?);
    let flags: Vec<&str> = words.collect();
    let (many, shape) = match (shape.strip_prefix("[]"), shape.strip_prefix("{}")) {
        (Some(rest), _) => (Many::List, rest),
        (_, Some(rest)) => (Many::Map, rest),
        _ => (Many::One, shape),
    };
    Some(Field { number, name, shape: self::shape(shape, package), many, omit_zero: flags.contains(&"o"), inline: flags.contains(&"~") })
}

fn shape(text: &'static str, package: &str) -> Shape {
    let short = text.rsplit('.').next().unwrap_or(text);
    match short {
        "s" => Shape::Scalar(Scalar::Text),
        "i" => Shape::Scalar(Scalar::Integer),
        "b" => Shape::Scalar(Scalar::Boolean),
        "d" => Shape::Scalar(Scalar::Double),
        "y" => Shape::Scalar(Scalar::Bytes),
        "Quantity" => Shape::Special(Special::Quantity),
        "IntOrString" => Shape::Special(Special::IntOrString),
        "Time" => Shape::Special(Special::Time),
        "MicroTime" => Shape::Special(Special::MicroTime),
        "RawExtension" | "JSON" | "FieldsV1" => Shape::Special(Special::Raw),
        "Duration" => Shape::Special(Special::Duration),
        "Verbs" | "ExtraValue" => Shape::Special(Special::Strings),
        "JSONSchemaPropsOrArray" => Shape::Special(Special::SchemaOrArray),
        "JSONSchemaPropsOrBool" => Shape::Special(Special::SchemaOrBool),
        "JSONSchemaPropsOrStringArray" => Shape::Special(Special::SchemaOrStrings),
        _ => Shape::Message(resolve(text, package)),
    }
}

/// The table's key of a referred message: "package Name". Leaked once per table, which lives as long as the process.
fn resolve(text: &'static str, package: &str) -> &'static str {
    let key = match text.rsplit_once('.') {
        Some((other, name)) => format!("{other} {name}"),
        None => format!("{package} {text}"),
    };
    Box::leak(key.into_boxed_str())
}

pub fn find(key: &str) -> Option<&'static Message> {
    TABLE.get(key)
}

/// The message of a kind; options and Status belong to the meta group under any version.
pub fn of_kind(api_version: &str, kind: &str) -> Option<&'static Message> {
    if matches!(
        kind,
        "Status"
            | "DeleteOptions"
            | "CreateOptions"
            | "UpdateOptions"
            | "PatchOptions"
            | "ListOptions"
            | "APIResourceList"
            | "APIGroup"
            | "APIGroupList"
            | "APIVersions"
    ) {
        return find(&format!("meta/v1 {kind}"));
    }
    let (group, version) = split_api_version(api_version);
    let package = match group {
        "" => "core",
        group => group.split('.').next().unwrap_or(group),
    };
    find(&format!("{package}/{version} {kind}"))
}

#[cfg(test)]
pub fn unresolved() -> Vec<String> {
    let fields = TABLE.iter().flat_map(|(name, message)| message.fields.iter().map(move |field| (name, field)));
    fields
        .filter_map(|(name, field)| match field.shape {
            Shape::Message(target) if find(target).is_none() => Some(format!("{name}.{} -> {target}", field.name)),
            _ => None,
        })
        .collect()
}
