//! Sets of fields, and their form in managed fields (`FieldsV1`).
use std::collections::BTreeMap;
use std::fmt;

use serde_json::{Map, Value};

/// One step of a path. Keys and values are kept as the JSON text of their serialized form.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Element {
    Field(String),
    /// An item of a keyed list, by its key fields in name order: `{"name":"a"}`.
    Key(String),
    /// An item of a set.
    Value(String),
    Index(usize),
}

impl Element {
    fn parse(text: &str) -> Option<Element> {
        let (kind, rest) = text.split_once(':')?;
        let canonical = || serde_json::from_str::<Value>(rest).ok().map(|value| value.to_string());
        Some(match kind {
            "f" => Element::Field(rest.to_string()),
            "k" => {
                let mut fields: Vec<(String, Value)> = serde_json::from_str::<Map<String, Value>>(rest).ok()?.into_iter().collect();
                fields.sort_by(|left, right| left.0.cmp(&right.0));
                Element::Key(Value::Object(fields.into_iter().collect()).to_string())
            }
            "v" => Element::Value(canonical()?),
            "i" => Element::Index(rest.parse().ok()?),
            _ => return None,
        })
    }

    fn text(&self) -> String {
        match self {
            Element::Field(name) => format!("f:{name}"),
            Element::Key(key) => format!("k:{key}"),
            Element::Value(value) => format!("v:{value}"),
            Element::Index(index) => format!("i:{index}"),
        }
    }
}

impl fmt::Display for Element {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Element::Field(name) => write!(out, ".{name}"),
            Element::Key(key) => {
                let fields: Map<String, Value> = serde_json::from_str(key).unwrap_or_default();
                let parts: Vec<String> = fields.iter().map(|(name, value)| format!("{name}={value}")).collect();
                write!(out, "[{}]", parts.join(","))
            }
            Element::Value(value) => write!(out, "[={value}]"),
            Element::Index(index) => write!(out, "[{index}]"),
        }
    }
}

/// A path as messages show it: `.spec.containers[name="a"].image`.
pub fn path_text(path: &[Element]) -> String {
    path.iter().map(Element::to_string).collect()
}

/// A set of paths, as a tree. No node is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldSet(BTreeMap<Element, Node>);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Node {
    /// The path that ends here is in the set.
    member: bool,
    children: FieldSet,
}

impl Node {
    fn is_empty(&self) -> bool {
        !self.member && self.children.is_empty()
    }
}

impl FieldSet {
    /// The set of these dotted paths of fields.
    pub fn of(paths: &[&str]) -> FieldSet {
        let mut set = FieldSet::default();
        for path in paths {
            let elements: Vec<Element> = path.split('.').map(|name| Element::Field(name.into())).collect();
            set.insert(&elements);
        }
        set
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn insert(&mut self, path: &[Element]) {
        let Some((first, rest)) = path.split_first() else { return };
        let node = self.0.entry(first.clone()).or_default();
        if rest.is_empty() {
            node.member = true;
        } else {
            node.children.insert(rest);
        }
    }

    pub fn has(&self, path: &[Element]) -> bool {
        match path {
            [] => false,
            [last] => self.0.get(last).is_some_and(|node| node.member),
            [first, rest @ ..] => self.0.get(first).is_some_and(|node| node.children.has(rest)),
        }
    }

    /// The part of the set below an element.
    pub fn below(&self, element: &Element) -> Option<&FieldSet> {
        self.0.get(element).map(|node| &node.children).filter(|children| !children.is_empty())
    }

    pub fn union(&self, other: &FieldSet) -> FieldSet {
        let mut out = self.clone();
        for (element, node) in &other.0 {
            let target = out.0.entry(element.clone()).or_default();
            target.member |= node.member;
            target.children = target.children.union(&node.children);
        }
        out
    }

    fn combine(&self, combined: impl Fn(&Element, &Node) -> Node) -> FieldSet {
        let nodes = self.0.iter().map(|(element, node)| (element.clone(), combined(element, node)));
        FieldSet(nodes.filter(|(_, node)| !node.is_empty()).collect())
    }

    pub fn intersection(&self, other: &FieldSet) -> FieldSet {
        self.combine(|element, node| match other.0.get(element) {
            Some(theirs) => Node { member: node.member && theirs.member, children: node.children.intersection(&theirs.children) },
            None => Node::default(),
        })
    }

    /// What is in this set only. A parent in the other one takes no children away.
    pub fn difference(&self, other: &FieldSet) -> FieldSet {
        self.combine(|element, node| match other.0.get(element) {
            Some(theirs) => Node { member: node.member && !theirs.member, children: node.children.difference(&theirs.children) },
            None => node.clone(),
        })
    }

    /// The same, but members of the other set go with all that is below them.
    pub fn without(&self, other: &FieldSet) -> FieldSet {
        self.combine(|element, node| match other.0.get(element) {
            Some(theirs) if theirs.member => Node::default(),
            Some(theirs) => Node { member: node.member, children: node.children.without(&theirs.children) },
            None => node.clone(),
        })
    }

    /// Makes inner nodes members where `wanted` says so of them and their own subset is closed by `below`.
    pub fn close(&self, wanted: &dyn Fn(&Element) -> bool, below: &dyn Fn(&Element, &FieldSet) -> FieldSet) -> FieldSet {
        self.combine(|element, node| Node {
            member: node.member || (!node.children.is_empty() && wanted(element)),
            children: below(element, &node.children),
        })
    }

    /// All paths: at each level members first.
    pub fn paths(&self) -> Vec<Vec<Element>> {
        let mut out = Vec::new();
        self.collect(&mut Vec::new(), &mut out);
        out
    }

    fn collect(&self, prefix: &mut Vec<Element>, out: &mut Vec<Vec<Element>>) {
        for element in self.0.iter().filter(|(_, node)| node.member).map(|(element, _)| element) {
            let mut path = prefix.clone();
            path.push(element.clone());
            out.push(path);
        }
        for (element, node) in &self.0 {
            prefix.push(element.clone());
            node.children.collect(prefix, out);
            prefix.pop();
        }
    }

    /// Reads `fieldsV1`; none if it is malformed.
    pub fn read(value: &Value) -> Option<FieldSet> {
        let mut set = FieldSet::default();
        for (key, inner) in value.as_object()? {
            if key == "." {
                continue;
            }
            let map = inner.as_object()?;
            let node = Node { member: map.is_empty() || map.contains_key("."), children: FieldSet::read(inner)? };
            set.0.insert(Element::parse(key)?, node);
        }
        Some(set)
    }

    pub fn to_value(&self) -> Value {
        let mut map = Map::new();
        for (element, node) in &self.0 {
            let mut inner = Map::new();
            if node.member && !node.children.is_empty() {
                inner.insert(".".into(), Value::Object(Map::new()));
            }
            if let Value::Object(children) = node.children.to_value() {
                inner.extend(children);
            }
            map.insert(element.text(), Value::Object(inner));
        }
        Value::Object(map)
    }
}
