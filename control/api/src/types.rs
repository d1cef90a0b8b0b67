//! The built-in kinds' structs: which fields each has, of what type, and how lists merge. Read from `types.txt`, which
//! `tools/type-graph.py` makes of upstream's swagger.json.
use std::collections::HashMap;
use std::sync::LazyLock;

pub use crate::decode::{Decoded, Notes, Tracking, decode, decode_as, decode_metadata, in_document_order, parse_json};

/// Index into [`graph`]'s types.
pub type TypeId = usize;

/// One struct.
#[derive(Debug)]
pub struct Type {
    pub id: TypeId,
    /// Last word of the package and version, as in `core/v1`.
    pub package: &'static str,
    /// `PodSpec`
    pub name: &'static str,
    /// The struct is replaced as a whole by server-side apply.
    pub atomic: bool,
    /// Sorted by name.
    pub fields: Vec<Field>,
}

/// One field of a struct.
#[derive(Debug)]
pub struct Field {
    pub name: &'static str,
    pub shape: Shape,
    /// Zero values (empty text, list or map, 0, false) are left out, as Go leaves out what is no pointer.
    pub omit_zero: bool,
    /// Zero values are written also when the field is absent, as Go writes what is neither a pointer nor left out by omitempty.
    pub write_zero: bool,
    pub merge: Merge,
}

/// The JSON form of a field.
#[derive(Clone, Debug, PartialEq)]
pub enum Shape {
    String,
    Int32,
    Int64,
    Double,
    Bool,
    /// Base64 text.
    Bytes,
    Time,
    MicroTime,
    Quantity,
    IntOrString,
    /// Any JSON value.
    Any,
    /// Any object (RawExtension).
    Embedded,
    Struct(TypeId),
    List(Box<Shape>),
    Map(Box<Shape>),
}

/// How patches and server-side apply merge a field.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Merge {
    /// Strategic merge of list items by this key.
    pub patch_key: Option<&'static str>,
    /// Strategic merge of a list of scalars.
    pub patch_scalars: bool,
    pub retain_keys: bool,
    /// Strategic patches replace the field.
    pub replace: bool,
    pub list: ListType,
}

/// `x-kubernetes-list-type`, or `x-kubernetes-map-type: atomic`.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum ListType {
    #[default]
    Unset,
    Atomic,
    Set,
    Map(Vec<&'static str>),
}

impl Type {
    pub fn field(&self, name: &str) -> Option<&Field> {
        self.fields.binary_search_by(|field| field.name.cmp(name)).ok().map(|index| &self.fields[index])
    }
}

/// All structs, by id and by name.
#[derive(Debug)]
pub struct Graph {
    pub types: Vec<Type>,
    by_name: HashMap<(&'static str, &'static str), TypeId>,
}

static GRAPH: LazyLock<Graph> = LazyLock::new(|| Graph::read(include_str!("types.txt")));

/// The graph of the built-in kinds.
pub fn graph() -> &'static Graph {
    &GRAPH
}

/// The struct of a kind, if built in. `group` as in URLs, empty for core.
pub fn by_kind(group: &str, version: &str, kind: &str) -> Option<&'static Type> {
    let word = if group.is_empty() { "core" } else { group.split('.').next().unwrap_or(group) };
    GRAPH.by_name(&format!("{word}/{version}"), kind)
}

impl Graph {
    /// `package` as `core/v1`.
    pub fn by_name(&self, package: &str, name: &str) -> Option<&Type> {
        self.by_name.get(&(package, name)).map(|id| &self.types[*id])
    }

    fn read(text: &'static str) -> Graph {
        let headers = text.lines().filter(|line| !line.starts_with(' '));
        let mut graph = Graph { types: Vec::new(), by_name: HashMap::new() };
        for (id, line) in headers.enumerate() {
            let mut words = line.split(' ');
            let (package, name) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            graph.types.push(Type { id, package, name, atomic: words.next() == Some("a"), fields: Vec::new() });
            graph.by_name.insert((package, name), id);
        }
        let mut owner = 0;
        let mut next = 0;
        for line in text.lines() {
            match line.strip_prefix(' ') {
                None => {
                    owner = next;
                    next += 1;
                }
                Some(line) => {
                    let field = graph.field(graph.types[owner].package, line);
                    graph.types[owner].fields.push(field);
                }
            }
        }
        graph
    }

    fn field(&self, package: &'static str, line: &'static str) -> Field {
        let mut words = line.split(' ');
        let name = words.next().unwrap_or_default();
        let shape = self.shape(package, words.next().unwrap_or_default());
        let (mut merge, mut omit_zero, mut write_zero) = (Merge::default(), false, false);
        for fact in words {
            match fact.split_once('=') {
                Some(("p", key)) => merge.patch_key = Some(key),
                Some(("m", keys)) => merge.list = ListType::Map(keys.split(',').collect()),
                _ => match fact {
                    "o" => omit_zero = true,
                    "w" => write_zero = true,
                    "p" => merge.patch_scalars = true,
                    "k" => merge.retain_keys = true,
                    "r" => merge.replace = true,
                    "u" => merge.list = ListType::Set,
                    _ => merge.list = ListType::Atomic,
                },
            }
        }
        Field { name, shape, omit_zero, write_zero, merge }
    }

    fn shape(&self, package: &'static str, text: &'static str) -> Shape {
        if let Some(item) = text.strip_prefix("[]") {
            return Shape::List(Box::new(self.shape(package, item)));
        }
        if let Some(item) = text.strip_prefix("{}") {
            return Shape::Map(Box::new(self.shape(package, item)));
        }
        match text {
            "s" => Shape::String,
            "i" => Shape::Int32,
            "l" => Shape::Int64,
            "d" => Shape::Double,
            "b" => Shape::Bool,
            "y" => Shape::Bytes,
            "t" => Shape::Time,
            "T" => Shape::MicroTime,
            "q" => Shape::Quantity,
            "I" => Shape::IntOrString,
            "j" => Shape::Any,
            "R" => Shape::Embedded,
            name => {
                let key = name.split_once('.').unwrap_or((package, name));
                self.by_name.get(&key).map_or(Shape::Any, |id| Shape::Struct(*id))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_graph_resolves_every_reference() {
        for package_and_name in include_str!("types.txt").lines().filter_map(|line| line.strip_prefix(' ')) {
            let shape = package_and_name.split(' ').nth(1).expect("a shape").trim_start_matches(['[', ']', '{', '}']);
            let scalar = shape.len() == 1;
            let (package, name) = shape.split_once('.').unwrap_or(("", shape));
            let known = graph().types.iter().any(|found| found.name == name && (package.is_empty() || found.package == package));
            assert!(scalar || known, "{package_and_name}");
        }
        for found in &graph().types {
            assert!(found.fields.is_sorted_by(|left, right| left.name < right.name), "{}", found.name);
        }
    }

    #[test]
    fn facts_are_read() {
        let service = graph().by_name("core/v1", "ServiceSpec").expect("known");
        let ports = service.field("ports").expect("known");
        assert_eq!(ports.merge.patch_key, Some("port"));
        assert_eq!(ports.merge.list, ListType::Map(vec!["port", "protocol"]));
        let meta = graph().by_name("meta/v1", "ObjectMeta").expect("known");
        assert!(meta.field("finalizers").expect("known").merge.patch_scalars);
        assert!(by_kind("rbac.authorization.k8s.io", "v1", "Role").is_some());
    }
}
