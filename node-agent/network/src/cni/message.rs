//! CNI's documents: the network configuration, results and errors, in every supported version of the specification.
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::ipam::{self, Owner};

// Error codes of the specification, section "Error".
pub const INCOMPATIBLE_VERSION: u32 = 1;
pub const INVALID_ENVIRONMENT: u32 = 4;
pub const IO_FAILURE: u32 = 5;
pub const UNDECODABLE: u32 = 6;
pub const INVALID_CONFIG: u32 = 7;
pub const TRY_LATER: u32 = 11;
pub const NOT_AVAILABLE: u32 = 50;
/// Codes from 100 on are the plugin's own.
pub const KERNEL_REFUSED: u32 = 100;
pub const CHECK_FAILED: u32 = 101;

pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, as the runtime gets it.
#[derive(Debug)]
pub struct Error {
    code: u32,
    message: String,
    details: String,
}

impl Error {
    pub fn new(code: u32, message: impl Into<String>, details: impl fmt::Display) -> Self {
        Self { code, message: message.into(), details: details.to_string() }
    }

    pub fn environment(message: impl Into<String>) -> Self {
        Self::new(INVALID_ENVIRONMENT, message, "")
    }

    pub fn check(message: impl Into<String>) -> Self {
        Self::new(CHECK_FAILED, message, "")
    }

    /// A refused kernel request: `action` in the infinitive, as in "add the route".
    pub fn kernel(action: impl fmt::Display, error: impl fmt::Display) -> Self {
        Self::new(KERNEL_REFUSED, format!("failed to {action}: {error}"), "")
    }

    pub fn document(&self, version: Version) -> Value {
        let mut document = json!({"cniVersion": version.as_str(), "code": self.code, "msg": self.message});
        if !self.details.is_empty() {
            document["details"] = json!(self.details);
        }
        document
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if self.details.is_empty() { Ok(()) } else { write!(f, ": {}", self.details) }
    }
}

impl std::error::Error for Error {}

impl From<ipam::Error> for Error {
    fn from(error: ipam::Error) -> Self {
        match error {
            ipam::Error::Exhausted(_) => Self::new(TRY_LATER, error.to_string(), ""),
            ipam::Error::Io { .. } => Self::new(IO_FAILURE, error.to_string(), ""),
        }
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        Self::new(IO_FAILURE, error.to_string(), "")
    }
}

/// A version of the specification whose results the plugin can write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(usize);

const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

impl Version {
    pub const NEWEST: Self = Self(4);
    const V1_0: Self = Self(3);

    fn parse(text: &str) -> Option<Self> {
        VERSIONS.iter().position(|known| *known == text).map(Self)
    }

    pub fn as_str(self) -> &'static str {
        VERSIONS[self.0]
    }
}

/// The answer to VERSION: in the version that the runtime asked in, if it said one.
pub fn version_document(input: &[u8]) -> Value {
    let asked = serde_json::from_slice::<Value>(input).ok();
    let asked = asked.as_ref().and_then(|input| input["cniVersion"].as_str()).unwrap_or(Version::NEWEST.as_str());
    json!({"cniVersion": asked, "supportedVersions": VERSIONS})
}

/// The plugin's configuration, as the runtime hands it over.
#[derive(Debug)]
pub struct NetConfig {
    pub version: Version,
    /// The runtime's own configuration for `lo`.
    pub is_loopback: bool,
    pub pod_cidrs: Vec<IpNet>,
    pub data_dir: PathBuf,
    agent_socket: Option<PathBuf>,
    pub mtu: u32,
    pub previous: Option<Previous>,
    pub valid_attachments: Vec<Owner>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawConfig {
    #[serde(default)]
    cni_version: String,
    #[serde(default)]
    name: String,
    #[serde(default, rename = "type")]
    kind: String,
    #[serde(default, rename = "podCIDRs")]
    pod_cidrs: Vec<IpNet>,
    #[serde(default)]
    data_dir: PathBuf,
    agent_socket: Option<PathBuf>,
    #[serde(default)]
    mtu: u32,
    prev_result: Option<Previous>,
    #[serde(default, rename = "cni.dev/valid-attachments")]
    valid_attachments: Vec<RawAttachment>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawAttachment {
    #[serde(rename = "containerID")]
    container_id: String,
    ifname: String,
}

impl NetConfig {
    pub fn parse(input: &[u8]) -> Result<Self> {
        let raw: RawConfig =
            serde_json::from_slice(input).map_err(|error| Error::new(UNDECODABLE, "failed to decode the network configuration", error))?;
        let version = Version::parse(&raw.cni_version).ok_or_else(|| {
            let details = format!("config is {:?}, plugin supports {VERSIONS:?}", raw.cni_version);
            Error::new(INCOMPATIBLE_VERSION, "incompatible CNI versions", details)
        })?;
        if raw.name.is_empty() {
            return Err(Error::new(INVALID_CONFIG, "missing network name", ""));
        }
        let is_loopback = raw.kind == super::LOOPBACK_NAME;
        if raw.data_dir.as_os_str().is_empty() && !is_loopback {
            return Err(Error::new(INVALID_CONFIG, "missing dataDir", ""));
        }
        Ok(Self {
            version,
            is_loopback,
            pod_cidrs: raw.pod_cidrs,
            data_dir: raw.data_dir,
            agent_socket: raw.agent_socket,
            mtu: raw.mtu,
            previous: raw.prev_result,
            valid_attachments: raw.valid_attachments.into_iter().map(|one| Owner::new(one.container_id, one.ifname)).collect(),
        })
    }
}

impl NetConfig {
    /// Where the running agent answers.
    pub fn agent(&self) -> Result<&Path> {
        self.agent_socket.as_deref().ok_or_else(|| Error::new(INVALID_CONFIG, "missing agentSocket", ""))
    }
}

/// The parts of an earlier ADD's result that CHECK compares with.
#[derive(Debug, Deserialize)]
pub struct Previous {
    #[serde(default)]
    interfaces: Vec<PreviousInterface>,
    #[serde(default)]
    ips: Vec<PreviousAddress>,
}

#[derive(Debug, Deserialize)]
struct PreviousInterface {
    name: String,
    #[serde(default)]
    sandbox: String,
}

#[derive(Debug, Deserialize)]
struct PreviousAddress {
    address: IpNet,
    interface: Option<usize>,
}

impl Previous {
    /// The addresses that the result gives to the sandbox's interface `name`.
    pub fn addresses_of(&self, name: &str) -> Vec<IpAddr> {
        let on_interface = |address: &&PreviousAddress| {
            let interface = address.interface.and_then(|index| self.interfaces.get(index));
            interface.is_none_or(|interface| interface.name == name && !interface.sandbox.is_empty())
        };
        self.ips.iter().filter(on_interface).map(|address| address.address.addr()).collect()
    }
}

/// One interface in a result.
pub struct Interface<'a> {
    pub name: &'a str,
    pub mac: String,
    pub mtu: u32,
    /// The namespace's path; `None` on the host.
    pub sandbox: Option<&'a str>,
}

/// The result of ADD: `addresses`, each with its gateway, belong to the last of `interfaces`.
pub fn result(version: Version, interfaces: &[Interface<'_>], addresses: &[(IpNet, Option<IpAddr>)]) -> Value {
    let last = interfaces.len().saturating_sub(1);
    let interfaces: Vec<Value> = interfaces
        .iter()
        .map(|interface| {
            let mut value = json!({"name": interface.name, "mac": interface.mac});
            if version > Version::V1_0 {
                value["mtu"] = json!(interface.mtu);
            }
            if let Some(sandbox) = interface.sandbox {
                value["sandbox"] = json!(sandbox);
            }
            value
        })
        .collect();
    let ips: Vec<Value> = addresses
        .iter()
        .map(|(address, gateway)| {
            let mut value = json!({"interface": last, "address": address.to_string()});
            if let Some(gateway) = gateway {
                value["gateway"] = json!(gateway.to_string());
            }
            if version < Version::V1_0 {
                value["version"] = json!(if address.addr().is_ipv4() { "4" } else { "6" });
            }
            value
        })
        .collect();
    let route = |(address, gateway): &(IpNet, Option<IpAddr>)| {
        let everywhere = if address.addr().is_ipv4() { "0.0.0.0/0" } else { "::/0" };
        gateway.map(|gateway| json!({"dst": everywhere, "gw": gateway.to_string()}))
    };
    let routes: Vec<Value> = addresses.iter().filter_map(route).collect();
    json!({"cniVersion": version.as_str(), "interfaces": interfaces, "ips": ips, "routes": routes, "dns": {}})
}

/// `namespace/name` from CNI_ARGS (`K8S_POD_NAMESPACE=…;K8S_POD_NAME=…`), which Kubernetes' runtimes give.
pub fn pod_name(arguments: &str) -> Option<String> {
    let value = |name: &str| arguments.split(';').filter_map(|pair| pair.split_once('=')).find(|(key, _)| *key == name);
    let ((_, namespace), (_, pod)) = (value("K8S_POD_NAMESPACE")?, value("K8S_POD_NAME")?);
    let is_name = |text: &str| !text.is_empty() && !text.contains(|character: char| character == '/' || character.is_whitespace());
    (is_name(namespace) && is_name(pod)).then(|| format!("{namespace}/{pod}"))
}

/// As libcni checks it: a letter or digit first, then also `_`, `.` and `-`.
pub fn is_container_id(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

/// What the kernel takes as an interface's name.
pub fn is_interface_name(text: &str) -> bool {
    !matches!(text, "" | "." | "..")
        && text.len() <= 15
        && !text.contains(|character: char| matches!(character, '/' | ':') || character.is_whitespace())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_have_the_shape_of_their_version() {
        let interfaces = |sandbox| {
            [
                Interface { name: "veth1", mac: "aa".into(), mtu: 1500, sandbox: None },
                Interface { name: "eth0", mac: "bb".into(), mtu: 1500, sandbox: Some(sandbox) },
            ]
        };
        let addresses = [("10.0.0.5/32".parse().unwrap(), Some("169.254.1.1".parse().unwrap()))];
        let new = result(Version::parse("1.1.0").unwrap(), &interfaces("/ns"), &addresses);
        assert_eq!(
            new,
            json!({
                "cniVersion": "1.1.0",
                "interfaces": [{"name": "veth1", "mac": "aa", "mtu": 1500}, {"name": "eth0", "mac": "bb", "mtu": 1500, "sandbox": "/ns"}],
                "ips": [{"interface": 1, "address": "10.0.0.5/32", "gateway": "169.254.1.1"}],
                "routes": [{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}],
                "dns": {}
            })
        );
        let old = result(Version::parse("0.4.0").unwrap(), &interfaces("/ns"), &addresses);
        assert_eq!(old["ips"][0]["version"], "4");
        assert_eq!(old["interfaces"][1], json!({"name": "eth0", "mac": "bb", "sandbox": "/ns"}));
    }

    #[test]
    fn arguments_name_the_pod() {
        for (arguments, expected) in [
            ("IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=web-0;K8S_POD_UID=x", Some("ns/web-0")),
            ("K8S_POD_NAME=web-0", None),
            ("K8S_POD_NAMESPACE=ns;K8S_POD_NAME=", None),
            ("K8S_POD_NAMESPACE=ns;K8S_POD_NAME=a\nb", None),
            ("", None),
        ] {
            assert_eq!(pod_name(arguments).as_deref(), expected, "{arguments:?}");
        }
    }

    #[test]
    fn reads_the_previous_result() {
        let input = json!({
            "cniVersion": "1.0.0", "name": "n", "dataDir": "/d", "podCIDRs": ["10.0.0.0/24"], "mtu": 1400,
            "prevResult": {
                "interfaces": [{"name": "veth1"}, {"name": "eth0", "sandbox": "/ns"}],
                "ips": [{"interface": 1, "address": "10.0.0.5/32"}, {"interface": 0, "address": "10.0.0.6/32"}]
            },
            "cni.dev/valid-attachments": [{"containerID": "a", "ifname": "eth0"}]
        });
        let config = NetConfig::parse(input.to_string().as_bytes()).unwrap();
        assert_eq!(config.previous.unwrap().addresses_of("eth0"), ["10.0.0.5".parse::<IpAddr>().unwrap()]);
        assert_eq!(config.valid_attachments, [Owner::new("a", "eth0")]);
        assert_eq!((config.mtu, config.pod_cidrs), (1400, vec!["10.0.0.0/24".parse().unwrap()]));
    }
}
