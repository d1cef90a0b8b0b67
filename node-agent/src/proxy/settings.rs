//! What flags and file come to: defaults, names and refusals are kube-proxy's.
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use ipnet::IpNet;
use outrigger_dataplane::{Mode, ModeChoice, PodInterfaces};
use serde_json::{Value, json};

use super::file::File;
use super::flags::ProxyFlags;

const HEALTHZ_PORT: u16 = 10256;
const METRICS_PORT: u16 = 10249;

/// How pods' traffic is told from others'.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DetectLocal {
    Cidrs(Vec<IpNet>),
    /// The Node's own `podCIDRs`.
    NodeCidr,
    Interfaces(PodInterfaces),
}

/// Where NodePorts answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodePorts {
    Everywhere,
    /// On the Node object's own addresses.
    Primary,
    Ranges(Vec<IpNet>),
}

/// The proxy's configuration, resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    pub kubeconfig: Option<PathBuf>,
    pub hostname_override: Option<String>,
    pub bind_address: Option<IpAddr>,
    pub mode: ModeChoice,
    pub detect_local: DetectLocal,
    pub node_ports: NodePorts,
    pub healthz: Option<SocketAddr>,
    pub metrics: Option<SocketAddr>,
    pub hard_fail: bool,
    pub masquerade_all: bool,
    pub min_sync_period: Duration,
    pub conntrack: Conntrack,
    pub oom_score_adj: Option<i32>,
    /// What the operator should know: settings that mean nothing here, with the reason.
    pub words: Vec<String>,
}

/// Limits of the kernel's connection tracking; what isn't set stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conntrack {
    pub max_per_core: Option<u32>,
    pub min: Option<u32>,
    pub tcp_established: Option<Duration>,
    pub tcp_close_wait: Option<Duration>,
    pub tcp_be_liberal: bool,
    pub udp: Option<Duration>,
    pub udp_stream: Option<Duration>,
}

/// The settings as they are written, before they are checked.
#[derive(Default)]
struct Written {
    mode: Option<String>,
    detect_local_mode: Option<String>,
    cluster_cidrs: Vec<IpNet>,
    bridge: Option<String>,
    prefix: Option<String>,
    node_ports: Vec<String>,
    healthz: Option<String>,
    metrics: Option<String>,
}

impl Settings {
    pub fn resolve(flags: &ProxyFlags) -> Result<Self> {
        let mut words: Vec<String> = flags.meaningless.words().collect();
        let Some(path) = &flags.config else {
            return Self::from_flags(flags, words);
        };
        words.extend(flags.overridden().iter().map(|name| format!("--{name} is left aside: {} says it all", path.display())));
        Self::from_file(File::read(path)?, words).with_context(|| format!("read {}", path.display()))
    }

    fn from_flags(flags: &ProxyFlags, words: Vec<String>) -> Result<Self> {
        let written = Written {
            mode: flags.proxy_mode.clone(),
            detect_local_mode: flags.detect_local_mode.clone(),
            cluster_cidrs: flags.cluster_cidr.clone(),
            bridge: flags.pod_bridge_interface.clone(),
            prefix: flags.pod_interface_name_prefix.clone(),
            node_ports: flags.nodeport_addresses.clone(),
            healthz: flags.healthz_bind_address.clone(),
            metrics: flags.metrics_bind_address.clone(),
        };
        let mut settings = Self::checked(written, flags.bind_address, words)?;
        settings.hard_fail = flags.bind_address_hard_fail;
        settings.masquerade_all = flags.masquerade_all;
        settings.min_sync_period = flags.min_sync_period.unwrap_or_default();
        settings.oom_score_adj = flags.oom_score_adj;
        settings.conntrack = Conntrack {
            max_per_core: flags.conntrack_max_per_core,
            min: flags.conntrack_min,
            tcp_established: flags.conntrack_tcp_timeout_established,
            tcp_close_wait: flags.conntrack_tcp_timeout_close_wait,
            tcp_be_liberal: flags.conntrack_tcp_be_liberal,
            udp: flags.conntrack_udp_timeout,
            udp_stream: flags.conntrack_udp_timeout_stream,
        };
        settings.validated()
    }

    fn from_file(mut file: File, words: Vec<String>) -> Result<Self> {
        let mode = file.text("/mode")?;
        let section = match mode.as_deref() {
            Some("nftables") => "/nftables",
            Some("ipvs") => "/ipvs",
            _ => "/iptables",
        };
        let ranges = file.text("/clusterCIDR")?.unwrap_or_default();
        let written = Written {
            detect_local_mode: file.text("/detectLocalMode")?,
            cluster_cidrs: cidrs("clusterCIDR", ranges.split(',').filter(|range| !range.is_empty()))?,
            bridge: file.text("/detectLocal/bridgeInterface")?,
            prefix: file.text("/detectLocal/interfaceNamePrefix")?,
            node_ports: file.texts("/nodePortAddresses")?,
            healthz: file.text("/healthzBindAddress")?,
            metrics: file.text("/metricsBindAddress")?,
            mode,
        };
        let bind_address =
            file.text("/bindAddress")?.map(|text| text.parse().with_context(|| format!("bindAddress {text:?}"))).transpose()?;
        let mut settings = Self::checked(written, bind_address, words)?;
        settings.kubeconfig = file.text("/clientConnection/kubeconfig")?.map(PathBuf::from);
        settings.hostname_override = file.text("/hostnameOverride")?;
        settings.hard_fail = file.flag("/bindAddressHardFail")?;
        settings.masquerade_all = file.flag(&format!("{section}/masqueradeAll"))?;
        settings.min_sync_period = file.duration(&format!("{section}/minSyncPeriod"))?.unwrap_or_default();
        settings.oom_score_adj = file.number("/oomScoreAdj")?;
        settings.conntrack = Conntrack {
            max_per_core: file.number("/conntrack/maxPerCore")?,
            min: file.number("/conntrack/min")?,
            tcp_established: file.duration("/conntrack/tcpEstablishedTimeout")?,
            tcp_close_wait: file.duration("/conntrack/tcpCloseWaitTimeout")?,
            tcp_be_liberal: file.flag("/conntrack/tcpBeLiberal")?,
            udp: file.duration("/conntrack/udpTimeout")?,
            udp_stream: file.duration("/conntrack/udpStreamTimeout")?,
        };
        settings.words.extend(file.words(section));
        settings.validated()
    }

    fn checked(written: Written, bind_address: Option<IpAddr>, mut words: Vec<String>) -> Result<Self> {
        let v6 = bind_address.is_some_and(|ip| ip.is_ipv6());
        let everywhere: IpAddr = if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
        let here: IpAddr = if v6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
        Ok(Self {
            kubeconfig: None,
            hostname_override: None,
            bind_address: bind_address.filter(|ip| !ip.is_unspecified()),
            mode: mode(written.mode.as_deref(), &mut words)?,
            detect_local: detect_local(&written, &mut words)?,
            node_ports: node_ports(&written.node_ports)?,
            healthz: address("healthz-bind-address", written.healthz.as_deref(), everywhere, HEALTHZ_PORT)?,
            metrics: address("metrics-bind-address", written.metrics.as_deref(), here, METRICS_PORT)?,
            hard_fail: false,
            masquerade_all: false,
            min_sync_period: Duration::ZERO,
            conntrack: Conntrack::default(),
            oom_score_adj: None,
            words,
        })
    }

    fn validated(self) -> Result<Self> {
        ensure!(
            self.oom_score_adj.is_none_or(|score| (-1000..=1000).contains(&score)),
            "oom-score-adj must be within the range [-1000, 1000]"
        );
        Ok(self)
    }

    /// The configuration in use in the shape of a KubeProxyConfiguration, for `/configz`.
    pub fn configz(&self, node_name: &str, mode: Mode) -> Value {
        let seconds = |duration: Option<Duration>| duration.map(|duration| format!("{}s", duration.as_secs_f64()));
        let address = |address: Option<SocketAddr>| address.map(|address| address.to_string()).unwrap_or_default();
        let texts = |nets: &[IpNet]| nets.iter().map(IpNet::to_string).collect::<Vec<_>>();
        let (detect, cidrs, bridge, prefix) = match &self.detect_local {
            DetectLocal::Cidrs(all) => ("ClusterCIDR", texts(all), "", ""),
            DetectLocal::NodeCidr => ("NodeCIDR", Vec::new(), "", ""),
            DetectLocal::Interfaces(PodInterfaces::Bridge(name)) => ("BridgeInterface", Vec::new(), name.as_str(), ""),
            DetectLocal::Interfaces(PodInterfaces::Prefix(prefix)) => ("InterfaceNamePrefix", Vec::new(), "", prefix.as_str()),
        };
        let node_ports = match &self.node_ports {
            NodePorts::Everywhere => Vec::new(),
            NodePorts::Primary => vec!["primary".to_owned()],
            NodePorts::Ranges(all) => texts(all),
        };
        json!({"kubeproxy.config.k8s.io": {
            "BindAddress": self.bind_address.unwrap_or(Ipv4Addr::UNSPECIFIED.into()),
            "BindAddressHardFail": self.hard_fail,
            "ClientConnection": {"Kubeconfig": self.kubeconfig.clone().unwrap_or_default()},
            "HostnameOverride": node_name,
            "HealthzBindAddress": address(self.healthz),
            "MetricsBindAddress": address(self.metrics),
            "Mode": mode.to_string(),
            "DetectLocalMode": detect,
            "DetectLocal": {"BridgeInterface": bridge, "ClusterCIDRs": cidrs, "InterfaceNamePrefix": prefix},
            "NodePortAddresses": node_ports,
            "MinSyncPeriod": seconds(Some(self.min_sync_period)),
            "Linux": {
                "MasqueradeAll": self.masquerade_all,
                "OOMScoreAdj": self.oom_score_adj,
                "Conntrack": {
                    "MaxPerCore": self.conntrack.max_per_core,
                    "Min": self.conntrack.min,
                    "TCPEstablishedTimeout": seconds(self.conntrack.tcp_established),
                    "TCPCloseWaitTimeout": seconds(self.conntrack.tcp_close_wait),
                    "TCPBeLiberal": self.conntrack.tcp_be_liberal,
                    "UDPTimeout": seconds(self.conntrack.udp),
                    "UDPStreamTimeout": seconds(self.conntrack.udp_stream),
                },
            },
        }})
    }
}

fn mode(written: Option<&str>, words: &mut Vec<String>) -> Result<ModeChoice> {
    match written {
        None => Ok(ModeChoice::Auto),
        // Whoever asks for these wants Services carried, and by what they know.
        Some(other @ ("iptables" | "ipvs")) => {
            words.push(format!("mode {other} is not one of ours: the best that this kernel can do is taken"));
            Ok(ModeChoice::Auto)
        }
        Some(text) => text.parse().map_err(|_| {
            anyhow::anyhow!("unknown proxy mode {text:?}: expected auto, ebpf, nftables or userspace (iptables and ipvs are read as auto)")
        }),
    }
}

fn detect_local(written: &Written, words: &mut Vec<String>) -> Result<DetectLocal> {
    let needed = |name: &Option<String>, flag: &str, mode: &str| {
        name.clone().filter(|name| !name.is_empty()).with_context(|| format!("detect-local-mode {mode} needs {flag}: it must not be empty"))
    };
    Ok(match written.detect_local_mode.as_deref() {
        None | Some("" | "ClusterCIDR") => {
            if written.cluster_cidrs.is_empty() {
                words.push("no cluster-cidr is known: nobody is masqueraded on the way to a cluster IP".into());
            }
            DetectLocal::Cidrs(written.cluster_cidrs.clone())
        }
        Some("NodeCIDR") => DetectLocal::NodeCidr,
        Some(mode @ "BridgeInterface") => {
            DetectLocal::Interfaces(PodInterfaces::Bridge(needed(&written.bridge, "pod-bridge-interface", mode)?))
        }
        Some(mode @ "InterfaceNamePrefix") => {
            DetectLocal::Interfaces(PodInterfaces::Prefix(needed(&written.prefix, "pod-interface-name-prefix", mode)?))
        }
        Some(other) => {
            bail!("Unsupported value: {other:?}: detect-local-mode is one of ClusterCIDR, NodeCIDR, BridgeInterface, InterfaceNamePrefix")
        }
    })
}

fn node_ports(written: &[String]) -> Result<NodePorts> {
    match written {
        [] => Ok(NodePorts::Everywhere),
        [only] if only == "primary" => Ok(NodePorts::Primary),
        all => {
            ensure!(!all.iter().any(|one| one == "primary"), "nodeport-addresses: can't use both 'primary' and CIDRs");
            cidrs("nodeport-addresses", all.iter().map(String::as_str)).map(NodePorts::Ranges)
        }
    }
}

fn cidrs<'a>(what: &str, texts: impl Iterator<Item = &'a str>) -> Result<Vec<IpNet>> {
    texts.map(|text| text.trim().parse().map_err(|_| anyhow::anyhow!("{what}: {text:?} must be a valid CIDR"))).collect()
}

/// `IP:port`, or an address without a port, which then is the default one; given but empty means nowhere.
fn address(what: &str, written: Option<&str>, default: IpAddr, port: u16) -> Result<Option<SocketAddr>> {
    match written {
        None => Ok(Some(SocketAddr::new(default, port))),
        Some("") => Ok(None),
        Some(text) => {
            let address = text.parse::<SocketAddr>().or_else(|_| text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, port)));
            let address = address.map_err(|_| anyhow::anyhow!("{what}: {text:?} must be IP:port"))?;
            ensure!(address.port() != 0, "{what}: {text:?} must be a valid port");
            Ok(Some(address))
        }
    }
}

#[cfg(test)]
#[path = "settings_tests.rs"]
mod tests;
