//! What the kernel's table does with one frontend, read back from it: single elements, never the whole.
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;

use outrigger_desired::{Family, Frontend};

use super::ops::{Fact, Key, Rule, Set, Whom, first_slot};
use super::plan::dial;
use crate::backend::{BackendError, Result};

/// `None` when the table knows nothing of the frontend.
pub(super) fn lookup(table: &str, rules: &BTreeSet<(Family, Rule)>, frontend: Frontend, outside: bool) -> Result<Option<Vec<SocketAddr>>> {
    let family = frontend.address.family();
    let (by, dial) = dial(frontend);
    let get = |set: Set, keys: &[Key]| get(table, set, family, keys);
    let all = |fact| Set::Of(fact, by, Whom::All);
    // The kernel refuses and drops before it translates; only strangers are kept out by `drop-outside`.
    let refused = get(all(Fact::NoEndpoints), &[Key::Frontend(dial)])?;
    if refused.is_some_and(|text| outside || !text.contains("drop-outside")) {
        return Ok(Some(Vec::new()));
    }
    let split = !outside && get(all(Fact::Split), &[Key::Frontend(dial)])?.is_some();
    let whom = if split { Whom::Inside } else { Whom::All };
    for (_, rule) in rules.iter().filter(|(of, _)| *of == family) {
        let (fact, slots) = match rule {
            Rule::Spread { slots } => (Fact::Endpoints, *slots),
            Rule::Stick { slots, .. } => (Fact::Choices, *slots),
            Rule::Recall { .. } => continue,
        };
        let set = Set::Of(fact, by, whom);
        let key = |slot| Key::With(dial, first_slot(slots) + slot);
        if get(set, &[key(0)])?.is_none() {
            continue;
        }
        let Some(mut text) = get(set, &(0..slots).map(key).collect::<Vec<_>>())? else { continue };
        if fact == Fact::Choices {
            let numbers: Vec<_> = values(&text).filter_map(number).map(Key::Number).collect();
            text = get(Set::Numbered, &numbers)?.unwrap_or_default();
        }
        let found: BTreeSet<SocketAddr> = values(&text).filter_map(endpoint).collect();
        return Ok(Some(found.into_iter().collect()));
    }
    Ok(None)
}

/// What follows the colon of each element.
fn values(text: &str) -> impl Iterator<Item = &str> {
    let elements = text.split_once("elements = {").map_or("", |(_, rest)| rest.split('}').next().unwrap_or_default());
    elements.split(',').filter_map(|element| Some(element.split_once(" : ")?.1.trim()))
}

fn endpoint(value: &str) -> Option<SocketAddr> {
    let (ip, port) = value.split_once(" . ")?;
    Some(SocketAddr::new(ip.trim().parse::<IpAddr>().ok()?, port.trim().parse().ok()?))
}

fn number(value: &str) -> Option<u32> {
    value.strip_prefix("0x").map_or_else(|| value.parse().ok(), |hex| u32::from_str_radix(hex, 16).ok())
}

/// `None` when one of the elements isn't there.
fn get(table: &str, set: Set, family: Family, keys: &[Key]) -> Result<Option<String>> {
    let keys = keys.iter().map(Key::to_string).collect::<Vec<_>>().join(", ");
    let command = format!("get element inet {table} {} {{ {keys} }}", set.name(family));
    let output = Command::new("nft").args(["--numeric", &command]).output().map_err(|error| BackendError::kernel("run nft", error))?;
    Ok(output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_from_elements() {
        let text = "table inet t {\n\tmap endpoints4 {\n\t\ttype ipv4_addr . inet_proto . inet_service . mark : ipv4_addr . inet_service\n\t\telements = { 10.96.0.1 . 6 . 80 . 0x00020000 : 10.0.0.1 . 8080,\n\t\t\t     10.96.0.1 . 6 . 80 . 0x00020001 : 10.0.0.2 . 8080 }\n\t}\n}";
        let found: Vec<_> = values(text).filter_map(endpoint).map(|endpoint| endpoint.to_string()).collect();
        assert_eq!(found, ["10.0.0.1:8080", "10.0.0.2:8080"]);
        assert_eq!(endpoint("fd00::1 . 80").unwrap().to_string(), "[fd00::1]:80");
        let text = "elements = { 10.96.0.1 . 6 . 80 . 0x00020000 : 0x0000001f }";
        assert_eq!(values(text).filter_map(number).collect::<Vec<_>>(), [31]);
    }
}
