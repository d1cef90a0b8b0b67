//! Flags and files in, settings and words out.
use clap::Parser;

use super::*;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    flags: ProxyFlags,
}

fn flags(words: &str) -> Result<Settings> {
    let words = std::iter::once("proxy").chain(words.split_whitespace());
    Settings::resolve(&Cli::try_parse_from(words)?.flags)
}

fn file(text: &str) -> Result<Settings> {
    let text = format!("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n{text}");
    Settings::from_file(File::parse(&text)?, Vec::new())
}

#[test]
fn defaults_are_those_of_kube_proxy() {
    let settings = flags("--cluster-cidr 10.0.0.0/8").unwrap();
    assert_eq!(settings.healthz, Some("0.0.0.0:10256".parse().unwrap()));
    assert_eq!(settings.metrics, Some("127.0.0.1:10249".parse().unwrap()));
    assert_eq!((settings.mode, settings.node_ports.clone()), (ModeChoice::Auto, NodePorts::Everywhere));
    assert_eq!(settings.words, Vec::<String>::new());
    let v6 = flags("--cluster-cidr fd00::/8 --bind-address ::").unwrap();
    assert_eq!((v6.healthz, v6.metrics), (Some("[::]:10256".parse().unwrap()), Some("[::1]:10249".parse().unwrap())));
}

#[test]
fn flags_are_written_as_upstreams_manifests_have_them() {
    let settings = flags(
        "--cluster-cidr=10.0.0.0/8,fd00::/48 --masquerade-all --iptables-min-sync-period=2s --nodeport-addresses=primary \
         --healthz-bind-address=0.0.0.0 --metrics-bind-address= --bind-address-hard-fail=true --conntrack-max-per-core=0 \
         --conntrack-tcp-timeout-established=1h30m --oom-score-adj=-999 --v=2 --iptables-sync-period 30s --profiling",
    )
    .unwrap();
    assert!(settings.masquerade_all && settings.hard_fail);
    assert_eq!(settings.min_sync_period, Duration::from_secs(2));
    assert_eq!(settings.node_ports, NodePorts::Primary);
    assert_eq!((settings.healthz, settings.metrics), (Some("0.0.0.0:10256".parse().unwrap()), None));
    assert_eq!(settings.oom_score_adj, Some(-999));
    assert_eq!(settings.conntrack.tcp_established, Some(Duration::from_secs(5400)));
    let named: Vec<&str> = settings.words.iter().filter_map(|word| word.split(' ').next()).collect();
    assert_eq!(named, ["--iptables-sync-period", "--profiling", "--v"]);
}

#[test]
fn what_cannot_be_is_refused() {
    let cases = [
        ("--proxy-mode bpf", "unknown proxy mode \"bpf\""),
        ("--detect-local-mode Everyone", "Unsupported value: \"Everyone\""),
        ("--detect-local-mode BridgeInterface", "needs pod-bridge-interface"),
        ("--nodeport-addresses primary,10.0.0.0/8", "can't use both"),
        ("--nodeport-addresses 10.0.0.1", "must be a valid CIDR"),
        ("--healthz-bind-address localhost:1", "must be IP:port"),
        ("--oom-score-adj 2000", "[-1000, 1000]"),
        ("--min-sync-period 5", "invalid duration"),
        ("--no-such-flag", "unexpected argument '--no-such-flag'"),
    ];
    for (words, message) in cases {
        let error = format!("{:#}", flags(words).expect_err(words));
        assert!(error.contains(message), "{words}: {error}");
    }
}

#[test]
fn pods_are_known_by_address_or_interface() {
    assert_eq!(flags("--detect-local-mode NodeCIDR").unwrap().detect_local, DetectLocal::NodeCidr);
    let by_prefix = flags("--detect-local-mode InterfaceNamePrefix --pod-interface-name-prefix cali").unwrap();
    assert_eq!(by_prefix.detect_local, DetectLocal::Interfaces(PodInterfaces::Prefix("cali".into())));
    let unknown = flags("").unwrap();
    assert!(unknown.words[0].contains("no cluster-cidr"), "{:?}", unknown.words);
}

#[test]
fn a_file_as_kubeadm_writes_it_is_read_without_a_word() {
    let settings = file(
        "bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection: {acceptContentTypes: '', burst: 0, contentType: '', kubeconfig: /var/lib/kube-proxy/kubeconfig.conf, qps: 0}
clusterCIDR: 10.244.0.0/16
configSyncPeriod: 0s
conntrack: {maxPerCore: null, min: null, tcpCloseWaitTimeout: null, tcpEstablishedTimeout: null, udpTimeout: 0s}
detectLocal: {bridgeInterface: '', interfaceNamePrefix: ''}
detectLocalMode: ''
enableProfiling: false
healthzBindAddress: ''
hostnameOverride: ''
iptables: {localhostNodePorts: null, masqueradeAll: false, masqueradeBit: null, minSyncPeriod: 0s, syncPeriod: 0s}
ipvs: {excludeCIDRs: null, minSyncPeriod: 0s, scheduler: '', strictARP: false}
logging: {flushFrequency: 0, options: {json: {infoBufferSize: '0'}}, verbosity: 0}
metricsBindAddress: ''
mode: ''
nodePortAddresses: null
oomScoreAdj: null
",
    )
    .unwrap();
    assert_eq!(settings.kubeconfig, Some("/var/lib/kube-proxy/kubeconfig.conf".into()));
    assert_eq!(settings.healthz, Some("0.0.0.0:10256".parse().unwrap()));
    let words: Vec<_> = settings.words.iter().filter(|word| !word.starts_with("logging")).collect();
    assert!(words.is_empty(), "{words:?}");
}

#[test]
fn a_files_settings_are_honoured_and_the_rest_is_named() {
    let settings = file(
        "mode: nftables
hostnameOverride: node-7
nftables: {masqueradeAll: true, minSyncPeriod: 500ms}
iptables: {masqueradeBit: 3, minSyncPeriod: 9s}
metricsBindAddress: 0.0.0.0:9249
nodePortAddresses: [10.0.0.0/8]
ipvs: {scheduler: rr}
featureGates: {SomeGate: true}
nodePortAdresses: [10.0.0.0/8]
",
    )
    .unwrap();
    assert_eq!(settings.mode, ModeChoice::Only(Mode::Nftables));
    assert_eq!((settings.hostname_override.as_deref(), settings.masquerade_all), (Some("node-7"), true));
    assert_eq!(settings.min_sync_period, Duration::from_millis(500));
    assert_eq!(settings.metrics, Some("0.0.0.0:9249".parse().unwrap()));
    assert_eq!(settings.node_ports, NodePorts::Ranges(vec!["10.0.0.0/8".parse().unwrap()]));
    assert!(settings.words.iter().any(|word| word.starts_with("featureGates.SomeGate means nothing here")), "{:?}", settings.words);
    assert!(settings.words.iter().any(|word| word == "unknown field \"nodePortAdresses\""), "{:?}", settings.words);
}

#[test]
fn a_file_of_another_kind_or_with_wrong_values_is_refused() {
    let error = File::parse("apiVersion: v1\nkind: ConfigMap\n").unwrap_err().to_string();
    assert!(error.contains("no kind \"ConfigMap\" is registered for version \"v1\""), "{error}");
    for (text, message) in [
        ("mode: quick", "unknown proxy mode"),
        ("clusterCIDR: 10", "expected a string"),
        ("clusterCIDR: 10.0.0.0", "must be a valid CIDR"),
        ("oomScoreAdj: lots", "the number"),
    ] {
        let error = format!("{:#}", file(text).expect_err(text));
        assert!(error.contains(message), "{text}: {error}");
    }
}
