//! Walks over one or two values by their type: check, list the fields, compare, merge, remove.
use serde_json::{Map, Value};

use super::schema::{Form, Keyed, Type};
use super::set::{Element, FieldSet, path_text};

const NULL: &Value = &Value::Null;

/// What differs between two values, by field; no field is in two of the sets.
#[derive(Clone, Debug, Default)]
pub struct Comparison {
    pub removed: FieldSet,
    pub modified: FieldSet,
    pub added: FieldSet,
}

impl Comparison {
    pub fn without(self, ignored: &FieldSet) -> Comparison {
        Comparison { removed: self.removed.without(ignored), modified: self.modified.without(ignored), added: self.added.without(ignored) }
    }
}

fn field(key: &str) -> Element {
    Element::Field(key.to_string())
}

fn entries(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flatten()
}

fn items(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

/// Empty, null or absent: such lists and maps are leaves.
fn nothing_in(value: Option<&Value>) -> bool {
    match value {
        Some(Value::Object(map)) => map.is_empty(),
        Some(Value::Array(items)) => items.is_empty(),
        _ => true,
    }
}

/// The message about a value that its type does not allow, if there is one: upstream's texts.
pub fn check(ty: Type<'_>, value: &Value) -> Result<(), String> {
    let mut errors = Vec::new();
    check_at(ty, value, &mut Vec::new(), &mut errors);
    match errors.as_slice() {
        [] => Ok(()),
        [one] => Err(one.clone()),
        many => Err(format!("errors:\n  {}", many.join("\n  "))),
    }
}

fn check_at(ty: Type<'_>, value: &Value, path: &mut Vec<Element>, errors: &mut Vec<String>) {
    let complain = |path: &[Element], what: String| match path {
        [] => what,
        path => format!("{}: {what}", path_text(path)),
    };
    match (ty.form(value), value) {
        (_, Value::Null) => {}
        (Form::Map { .. }, Value::Object(map)) => {
            for (key, value) in map {
                path.push(field(key));
                match ty.child(key) {
                    Some((child, _)) => check_at(child, value, path, errors),
                    None => errors.push(complain(path, "field not declared in schema".into())),
                }
                path.pop();
            }
        }
        (Form::Map { .. }, other) => errors.push(complain(path, format!("expected map, got {other}"))),
        (Form::List { item, keyed }, Value::Array(items)) => {
            let mut seen = Vec::new();
            for (index, value) in items.iter().enumerate() {
                match keyed.element(item, index, value) {
                    Err(error) => errors.push(complain(path, format!("element {index}: {error}"))),
                    Ok(element) => {
                        if seen.contains(&element) {
                            errors.push(complain(path, format!("duplicate entries for key {element}")));
                        }
                        path.push(element.clone());
                        seen.push(element);
                        check_at(item, value, path, errors);
                        path.pop();
                    }
                }
            }
        }
        (Form::List { .. }, other) => errors.push(complain(path, format!("expected list, got {other}"))),
        (Form::Scalar, Value::Object(_) | Value::Array(_)) => errors.push(complain(path, format!("expected any scalar, got {value}"))),
        (Form::Scalar, _) => {}
    }
}

/// The fields of a value.
pub fn fields(ty: Type<'_>, value: &Value) -> FieldSet {
    let mut set = FieldSet::default();
    fields_at(ty, value, &mut Vec::new(), &mut set);
    set
}

fn fields_at(ty: Type<'_>, value: &Value, path: &mut Vec<Element>, set: &mut FieldSet) {
    match ty.form(value) {
        Form::Scalar | Form::Map { atomic: true } | Form::List { keyed: Keyed::Atomic, .. } => set.insert(path),
        Form::Map { .. } => {
            for (key, value) in entries(value) {
                let (child, declared) = ty.child(key).unwrap_or((Type::Deduced, false));
                path.push(field(key));
                fields_at(child, value, path, set);
                if !declared || value.is_null() || value.as_object().is_some_and(Map::is_empty) {
                    set.insert(path);
                }
                path.pop();
            }
        }
        Form::List { item, keyed } => {
            for (element, same) in grouped(items(value), item, &keyed) {
                path.push(element);
                if let [value] = same.as_slice() {
                    fields_at(item, value, path, set);
                }
                set.insert(path);
                path.pop();
            }
        }
    }
}

/// A list's items by what they are known by, in order of first sight; items known by nothing are left out.
fn grouped<'v>(list: &'v [Value], item: Type<'_>, keyed: &Keyed<'_>) -> Vec<(Element, Vec<&'v Value>)> {
    let mut groups: Vec<(Element, Vec<&Value>)> = Vec::with_capacity(list.len());
    let mut known = std::collections::HashMap::with_capacity(list.len());
    for (index, value) in list.iter().enumerate() {
        let Ok(element) = keyed.element(item, index, value) else { continue };
        let text = element.to_string();
        match known.get(&text) {
            Some(place) => {
                let (_, same): &mut (Element, Vec<&Value>) = &mut groups[*place];
                same.push(value);
            }
            None => {
                known.insert(text, groups.len());
                groups.push((element, vec![value]));
            }
        }
    }
    groups
}

/// What changes from `old` to `new`.
pub fn compare(ty: Type<'_>, old: &Value, new: &Value) -> Comparison {
    let mut comparison = Comparison::default();
    compare_at(ty, Some(old), Some(new), &mut Vec::new(), &mut comparison);
    comparison
}

fn compare_at(ty: Type<'_>, old: Option<&Value>, new: Option<&Value>, path: &mut Vec<Element>, out: &mut Comparison) {
    let is_leaf = match ty.form(new.or(old).unwrap_or(NULL)) {
        Form::Scalar | Form::Map { atomic: true } | Form::List { keyed: Keyed::Atomic, .. } => true,
        _ if nothing_in(old) && nothing_in(new) => true,
        Form::Map { .. } => {
            compare_maps(ty, old.unwrap_or(NULL), new.unwrap_or(NULL), path, out);
            false
        }
        Form::List { item, keyed } => {
            compare_lists(item, &keyed, old.unwrap_or(NULL), new.unwrap_or(NULL), path, out);
            false
        }
    };
    match (old, new) {
        (None, _) => out.added.insert(path),
        (_, None) => out.removed.insert(path),
        (Some(old), Some(new)) if is_leaf && old != new => out.modified.insert(path),
        _ => {}
    }
}

fn compare_maps(ty: Type<'_>, old: &Value, new: &Value, path: &mut Vec<Element>, out: &mut Comparison) {
    let gone = entries(old).filter(|(key, _)| new.get(key.as_str()).is_none()).map(|(key, value)| (key, Some(value), None));
    let here = entries(new).map(|(key, value)| (key, old.get(key.as_str()), Some(value)));
    for (key, before, after) in here.chain(gone) {
        if before == after {
            continue;
        }
        let (child, _) = ty.child(key).unwrap_or((Type::Deduced, false));
        path.push(field(key));
        compare_at(child, before, after, path, out);
        path.pop();
    }
}

/// Items that occur more than once are compared as one, and owned as such.
fn compare_lists(item: Type<'_>, keyed: &Keyed<'_>, old: &Value, new: &Value, path: &mut Vec<Element>, out: &mut Comparison) {
    let before = grouped(items(old), item, keyed);
    let after = grouped(items(new), item, keyed);
    let find = |groups: &[(Element, Vec<&Value>)], element: &Element| groups.iter().position(|(known, _)| known == element);
    let gone = before.iter().filter(|(element, _)| find(&after, element).is_none()).map(|(element, _)| element);
    for element in after.iter().map(|(element, _)| element).chain(gone) {
        let left = find(&before, element).map(|place| before[place].1.as_slice()).unwrap_or_default();
        let right = find(&after, element).map(|place| after[place].1.as_slice()).unwrap_or_default();
        path.push(element.clone());
        match (left, right) {
            ([] | [_], [] | [_]) => compare_at(item, left.first().copied(), right.first().copied(), path, out),
            ([_, _, ..], [_, _, ..]) => {
                if left != right {
                    out.modified.insert(path);
                }
            }
            ([_, _, ..], _) => {
                if let Some(value) = right.first() {
                    compare_at(item, None, Some(value), path, out);
                }
                out.removed.insert(path);
            }
            (_, _) => {
                if let Some(value) = left.first() {
                    compare_at(item, Some(value), None, path, out);
                }
                out.added.insert(path);
            }
        }
        path.pop();
    }
}

/// `live` with `config` on it; none where both are absent or nothing is left.
pub fn merge(ty: Type<'_>, live: Option<&Value>, config: Option<&Value>) -> Option<Value> {
    let chosen = config.or(live);
    match ty.form(chosen.unwrap_or(NULL)) {
        Form::Scalar | Form::Map { atomic: true } | Form::List { keyed: Keyed::Atomic, .. } => chosen.cloned(),
        _ if nothing_in(live) && nothing_in(config) => chosen.cloned(),
        Form::Map { .. } => {
            let (live, config) = (live.unwrap_or(NULL), config.unwrap_or(NULL));
            let new = entries(config).filter(|(key, _)| live.get(key.as_str()).is_none()).map(|(key, value)| (key, None, Some(value)));
            let kept = entries(live).map(|(key, value)| (key, Some(value), config.get(key.as_str())));
            let merged = kept.chain(new).filter_map(|(key, live, config)| {
                let (child, _) = ty.child(key).unwrap_or((Type::Deduced, false));
                Some((key.clone(), merge(child, live, config)?))
            });
            let map: Map<String, Value> = merged.collect();
            (!map.is_empty()).then_some(Value::Object(map))
        }
        Form::List { item, keyed } => {
            let list = merge_lists(item, &keyed, items(live.unwrap_or(NULL)), items(config.unwrap_or(NULL)));
            (!list.is_empty()).then_some(Value::Array(list))
        }
    }
}

/// Items of both keep the configuration's order, those of `live` alone stay beside their neighbours.
fn merge_lists(item: Type<'_>, keyed: &Keyed<'_>, live: &[Value], config: &[Value]) -> Vec<Value> {
    let named = |list: &[Value]| -> Vec<Element> {
        list.iter().enumerate().map(|(index, value)| keyed.element(item, index, value).unwrap_or(Element::Index(index))).collect()
    };
    let (left, right) = (named(live), named(config));
    // A duplicate of the live list is not merged, but replaced.
    let lone = |element: &Element| {
        let mut places = left.iter().enumerate().filter(|(_, known)| *known == element).map(|(place, _)| place);
        places.next().filter(|_| places.next().is_none()).map(|place| &live[place])
    };
    let mut shared = right.iter().filter(|element| left.contains(element));
    let mut next = shared.next();
    let mut done: Vec<&Element> = Vec::new();
    let mut out = Vec::with_capacity(left.len().max(right.len()));
    let (mut l, mut r) = (0, 0);
    while l < left.len() || r < right.len() {
        if l < left.len() && r < right.len() {
            if left[l] == right[r] {
                done.push(&right[r]);
                out.extend(merge(item, lone(&right[r]), Some(&config[r])));
                (l, r) = (l + 1, r + 1);
                next = shared.next();
                continue;
            }
            if right.contains(&left[l]) && next.is_some_and(|next| *next != left[l]) {
                l += 1;
                continue;
            }
        }
        if l < left.len() {
            if !right.contains(&left[l]) {
                out.extend(merge(item, Some(&live[l]), None));
                l += 1;
                continue;
            }
            if done.contains(&&left[l]) {
                l += 1;
            }
        }
        if r < right.len() {
            done.push(&right[r]);
            out.extend(merge(item, lone(&right[r]), Some(&config[r])));
            if next == Some(&right[r]) {
                next = shared.next();
            }
            r += 1;
        }
    }
    out
}

/// The value without the fields of the set; none if nothing is left.
pub fn remove(ty: Type<'_>, value: &Value, gone: &FieldSet) -> Option<Value> {
    match ty.form(value) {
        Form::Scalar => Some(value.clone()),
        Form::Map { atomic: true } | Form::List { keyed: Keyed::Atomic, .. } => None,
        Form::Map { .. } => {
            let kept = entries(value).filter_map(|(key, value)| {
                let (child, _) = ty.child(key).unwrap_or((Type::Deduced, false));
                Some((key.clone(), kept(child, value, &field(key), gone)?))
            });
            let map: Map<String, Value> = kept.collect();
            (!map.is_empty()).then_some(Value::Object(map))
        }
        Form::List { item, keyed } => {
            let kept = items(value).iter().enumerate().filter_map(|(index, value)| {
                let element = keyed.element(item, index, value).unwrap_or(Element::Index(index));
                kept(item, value, &element, gone)
            });
            let list: Vec<Value> = kept.collect();
            (!list.is_empty()).then_some(Value::Array(list))
        }
    }
}

/// What stays of one field or item.
fn kept(ty: Type<'_>, value: &Value, element: &Element, gone: &FieldSet) -> Option<Value> {
    if gone.has(std::slice::from_ref(element)) {
        return None;
    }
    match gone.below(element) {
        Some(below) => Some(remove(ty, value, below).unwrap_or(Value::Null)),
        None => Some(value.clone()),
    }
}

/// The set with the declared fields that lead to its members as members too.
pub fn with_parents(ty: Type<'_>, set: &FieldSet) -> FieldSet {
    let child = |element: &Element| match element {
        Element::Field(key) => ty.child(key),
        _ => match ty.form(&Value::Array(Vec::new())) {
            Form::List { item, .. } => Some((item, false)),
            _ => None,
        },
    };
    let is_map = matches!(ty.form(&Value::Object(Map::new())), Form::Map { .. });
    let wanted = |element: &Element| is_map && matches!(element, Element::Field(_)) && child(element).is_some_and(|(_, declared)| declared);
    set.close(&wanted, &|element, below| with_parents(child(element).map_or(Type::Deduced, |(ty, _)| ty), below))
}
