//! A KubeProxyConfiguration file (v1alpha1), read leniently as kube-proxy does: what isn't known is told and left aside.
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::duration::go_duration;

const VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
const KIND: &str = "KubeProxyConfiguration";

const RESYNC: &str = "what the kernel has is kept as it is known, there is nothing to write again";
const MASK: &str = "the mark is 0x4000, bit 14";

/// Fields (or their parents) that mean nothing here when they are set, and why.
const MEANINGLESS: [(&str, &str); 15] = [
    ("/clientConnection", "the watches need no limit, and speak JSON"),
    ("/logging", "the environment variable RUST_LOG says what is logged"),
    ("/featureGates", "upstream's gates name upstream's code"),
    ("/enableProfiling", "there is no Go runtime to profile"),
    ("/showHiddenMetricsForVersion", "no metric is hidden"),
    ("/configSyncPeriod", "a watch that breaks off is taken up with a new list"),
    ("/portRange", "kube-proxy itself doesn't use it any more"),
    ("/winkernel", "this is Linux"),
    ("/windowsRunAsService", "this is Linux"),
    ("/ipvs", "there is no IPVS mode here"),
    ("/iptables/localhostNodePorts", "eBPF serves NodePorts on localhost, nftables can't"),
    ("/iptables/masqueradeBit", MASK),
    ("/nftables/masqueradeBit", MASK),
    ("/iptables/syncPeriod", RESYNC),
    ("/nftables/syncPeriod", RESYNC),
];

/// Sections of modes; the one that isn't in use is left aside without a word.
const SECTIONS: [&str; 3] = ["/iptables", "/nftables", "/ipvs"];

#[derive(Debug)]
pub struct File {
    content: Value,
    read: BTreeSet<String>,
}

impl File {
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("read {}", path.display()))
    }

    pub fn parse(text: &str) -> Result<Self> {
        let content: Value = serde_yaml_ng::from_str(text).context("it is no YAML")?;
        let (version, kind) = (content["apiVersion"].as_str().unwrap_or_default(), content["kind"].as_str().unwrap_or_default());
        ensure!(
            version == VERSION && kind == KIND,
            "no kind {kind:?} is registered for version {version:?}: expected apiVersion {VERSION} and kind {KIND}"
        );
        Ok(Self { content, read: ["/apiVersion".into(), "/kind".into()].into() })
    }

    /// The value at a JSON pointer; `None` where it is absent or null.
    fn value(&mut self, pointer: &str) -> Option<&Value> {
        self.read.insert(pointer.to_owned());
        self.content.pointer(pointer).filter(|value| !value.is_null())
    }

    /// `None` when it is empty, too: that is how kube-proxy says "the default".
    pub fn text(&mut self, pointer: &str) -> Result<Option<String>> {
        match self.value(pointer) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone()).filter(|text| !text.is_empty())),
            Some(other) => bail!("{pointer}: expected a string, found {other}"),
        }
    }

    pub fn texts(&mut self, pointer: &str) -> Result<Vec<String>> {
        match self.value(pointer) {
            None => Ok(Vec::new()),
            Some(Value::Array(all)) if all.iter().all(Value::is_string) => {
                Ok(all.iter().filter_map(|one| one.as_str().map(str::to_owned)).collect())
            }
            Some(other) => bail!("{pointer}: expected a list of strings, found {other}"),
        }
    }

    pub fn flag(&mut self, pointer: &str) -> Result<bool> {
        match self.value(pointer) {
            None => Ok(false),
            Some(Value::Bool(set)) => Ok(*set),
            Some(other) => bail!("{pointer}: expected true or false, found {other}"),
        }
    }

    pub fn number<N: TryFrom<i64>>(&mut self, pointer: &str) -> Result<Option<N>> {
        match self.value(pointer) {
            None => Ok(None),
            Some(value) => match value.as_i64().and_then(|number| N::try_from(number).ok()) {
                Some(number) => Ok(Some(number)),
                None => bail!("{pointer}: the number {value} can't be"),
            },
        }
    }

    /// `None` when it is zero, too.
    pub fn duration(&mut self, pointer: &str) -> Result<Option<Duration>> {
        let Some(text) = self.text(pointer)? else { return Ok(None) };
        let duration = go_duration(&text).map_err(|error| anyhow::anyhow!("{pointer}: {error}"))?;
        Ok(Some(duration).filter(|duration| !duration.is_zero()))
    }

    /// What is set and was not read, each with its reason.
    pub fn words(&self, section: &str) -> Vec<String> {
        let mut leaves = Vec::new();
        collect("", &self.content, &mut leaves);
        let mut words = Vec::new();
        for pointer in leaves.into_iter().filter(|pointer| !self.read.contains(pointer)) {
            let below = |root: &str| pointer == root || pointer.strip_prefix(root).is_some_and(|rest| rest.starts_with('/'));
            if SECTIONS.iter().any(|other| *other != section && below(other)) {
                continue;
            }
            let field = pointer.trim_start_matches('/').replace('/', ".");
            let word = match MEANINGLESS.iter().find(|(known, _)| below(known)) {
                Some((_, reason)) => format!("{field} means nothing here: {reason}"),
                None => format!("unknown field {field:?}"),
            };
            words.push(word);
        }
        words
    }
}

/// Pointers of all that is set to something: zero values are what a file is filled up with.
fn collect(at: &str, value: &Value, leaves: &mut Vec<String>) {
    match value {
        Value::Object(fields) => fields.iter().for_each(|(name, value)| collect(&format!("{at}/{name}"), value, leaves)),
        Value::Null | Value::Bool(false) => {}
        Value::String(text) if text.is_empty() || text == "0s" => {}
        Value::Number(number) if number.as_f64() == Some(0.0) => {}
        Value::Array(all) if all.is_empty() => {}
        _ => leaves.push(at.to_owned()),
    }
}
