//! kube-proxy's flags: those that mean something here, and those that are taken with a word about why they don't.
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};
use ipnet::IpNet;

use super::duration::go_duration;

#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Service proxy (as kube-proxy has them)")]
pub struct ProxyFlags {
    /// A KubeProxyConfiguration file (kubeproxy.config.k8s.io/v1alpha1); it takes the place of the flags below
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// How Services are carried: auto, ebpf, nftables or userspace
    #[arg(long)]
    pub proxy_mode: Option<String>,
    /// The ranges of all pods
    #[arg(long, value_delimiter = ',')]
    pub cluster_cidr: Vec<IpNet>,
    /// How pods' traffic is told from others': ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix
    #[arg(long)]
    pub detect_local_mode: Option<String>,
    /// The pods' bridge, for BridgeInterface
    #[arg(long)]
    pub pod_bridge_interface: Option<String>,
    /// How the names of pods' interfaces begin, for InterfaceNamePrefix
    #[arg(long)]
    pub pod_interface_name_prefix: Option<String>,
    /// Where NodePorts answer: ranges, or "primary" for the Node's own addresses; everywhere when not given
    #[arg(long, value_delimiter = ',')]
    pub nodeport_addresses: Vec<String>,
    /// The node's primary address, instead of what its Node object says
    #[arg(long)]
    pub bind_address: Option<IpAddr>,
    /// Where /healthz and /livez are served; empty for nowhere [default: 0.0.0.0:10256]
    #[arg(long)]
    pub healthz_bind_address: Option<String>,
    /// Where /metrics, /proxyMode and /configz are served; empty for nowhere [default: 127.0.0.1:10249]
    #[arg(long)]
    pub metrics_bind_address: Option<String>,
    /// End when one of them can't be listened on
    #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_value_t, default_missing_value = "true")]
    pub bind_address_hard_fail: bool,
    /// Masquerade everything that goes to cluster IPs
    #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_value_t, default_missing_value = "true")]
    pub masquerade_all: bool,
    /// The least time between two changes of the kernel [default: 0s, each change at once]
    #[arg(long, aliases = ["iptables-min-sync-period", "ipvs-min-sync-period"], value_parser = go_duration)]
    pub min_sync_period: Option<Duration>,
    #[arg(long)]
    pub conntrack_max_per_core: Option<u32>,
    #[arg(long)]
    pub conntrack_min: Option<u32>,
    #[arg(long, value_parser = go_duration)]
    pub conntrack_tcp_timeout_established: Option<Duration>,
    #[arg(long, value_parser = go_duration)]
    pub conntrack_tcp_timeout_close_wait: Option<Duration>,
    #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_value_t, default_missing_value = "true")]
    pub conntrack_tcp_be_liberal: bool,
    #[arg(long, value_parser = go_duration)]
    pub conntrack_udp_timeout: Option<Duration>,
    #[arg(long, value_parser = go_duration)]
    pub conntrack_udp_timeout_stream: Option<Duration>,
    #[arg(long, allow_negative_numbers = true)]
    pub oom_score_adj: Option<i32>,
    /// Take everything that a proxy of ours has put into the kernel away, and end
    #[arg(long, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_value_t, default_missing_value = "true")]
    pub cleanup: bool,
    #[command(flatten)]
    pub meaningless: Meaningless,
}

impl ProxyFlags {
    /// The flags in use whose place a configuration file takes.
    pub fn overridden(&self) -> Vec<&'static str> {
        let given = [
            ("proxy-mode", self.proxy_mode.is_some()),
            ("cluster-cidr", !self.cluster_cidr.is_empty()),
            ("detect-local-mode", self.detect_local_mode.is_some()),
            ("pod-bridge-interface", self.pod_bridge_interface.is_some()),
            ("pod-interface-name-prefix", self.pod_interface_name_prefix.is_some()),
            ("nodeport-addresses", !self.nodeport_addresses.is_empty()),
            ("bind-address", self.bind_address.is_some()),
            ("healthz-bind-address", self.healthz_bind_address.is_some()),
            ("metrics-bind-address", self.metrics_bind_address.is_some()),
            ("bind-address-hard-fail", self.bind_address_hard_fail),
            ("masquerade-all", self.masquerade_all),
            ("min-sync-period", self.min_sync_period.is_some()),
            ("conntrack-max-per-core", self.conntrack_max_per_core.is_some()),
            ("conntrack-min", self.conntrack_min.is_some()),
            ("conntrack-tcp-timeout-established", self.conntrack_tcp_timeout_established.is_some()),
            ("conntrack-tcp-timeout-close-wait", self.conntrack_tcp_timeout_close_wait.is_some()),
            ("conntrack-tcp-be-liberal", self.conntrack_tcp_be_liberal),
            ("conntrack-udp-timeout", self.conntrack_udp_timeout.is_some()),
            ("conntrack-udp-timeout-stream", self.conntrack_udp_timeout_stream.is_some()),
            ("oom-score-adj", self.oom_score_adj.is_some()),
        ];
        given.into_iter().filter(|(_, given)| *given).map(|(name, _)| name).collect()
    }
}

const LOGGING: &str = "the environment variable RUST_LOG says what is logged";
const CLIENT: &str = "the watches need no limit, and speak JSON";
const IPVS: &str = "there is no IPVS mode here";
const RESYNC: &str = "what the kernel has is kept as it is known, there is nothing to write again";

/// Flag, whether it takes a value, and why it means nothing here.
const MEANINGLESS: [(&str, bool, &str); 27] = [
    ("iptables-sync-period", true, RESYNC),
    ("ipvs-sync-period", true, RESYNC),
    ("config-sync-period", true, "a watch that breaks off is taken up with a new list"),
    ("iptables-masquerade-bit", true, "the mark is 0x4000, bit 14"),
    ("iptables-localhost-nodeports", false, "eBPF serves NodePorts on localhost, nftables can't"),
    ("ipvs-scheduler", true, IPVS),
    ("ipvs-exclude-cidrs", true, IPVS),
    ("ipvs-strict-arp", false, IPVS),
    ("ipvs-tcp-timeout", true, IPVS),
    ("ipvs-tcpfin-timeout", true, IPVS),
    ("ipvs-udp-timeout", true, IPVS),
    ("kube-api-content-type", true, CLIENT),
    ("kube-api-qps", true, CLIENT),
    ("kube-api-burst", true, CLIENT),
    ("profiling", false, "there is no Go runtime to profile"),
    ("feature-gates", true, "upstream's gates name upstream's code"),
    ("show-hidden-metrics-for-version", true, "no metric is hidden"),
    ("init-only", false, "the proxy needs its privileges for as long as it runs"),
    ("write-config-to", true, "/configz shows the configuration in use"),
    ("v", true, LOGGING),
    ("vmodule", true, LOGGING),
    ("logging-format", true, LOGGING),
    ("log-flush-frequency", true, LOGGING),
    ("log-json-split-stream", false, LOGGING),
    ("log-text-split-stream", false, LOGGING),
    ("logtostderr", false, LOGGING),
    ("alsologtostderr", false, LOGGING),
];

/// The flags in use that mean nothing here.
#[derive(Clone, Debug, Default)]
pub struct Meaningless(Vec<&'static str>);

impl Meaningless {
    /// Each with its reason.
    pub fn words(&self) -> impl Iterator<Item = String> {
        let reason = |name: &str| MEANINGLESS.iter().find(|(known, ..)| *known == name).map_or("", |(.., reason)| reason);
        self.0.iter().map(move |name| format!("--{name} means nothing here: {}", reason(name)))
    }
}

impl Args for Meaningless {
    fn augment_args(command: Command) -> Command {
        MEANINGLESS.iter().fold(command, |command, (name, takes_value, _)| {
            let arg = Arg::new(*name).long(*name).hide(true).action(ArgAction::Append);
            let arg = if *name == "v" { arg.short('v') } else { arg };
            let arg = if *takes_value { arg.num_args(1) } else { arg.num_args(0..=1).require_equals(true).default_missing_value("true") };
            command.arg(arg)
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Meaningless {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        Ok(Self(MEANINGLESS.iter().map(|(name, ..)| *name).filter(|name| matches.value_source(name).is_some()).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
