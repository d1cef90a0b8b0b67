//! Names: the pod's hostname, its resolv.conf, its /etc/hosts.
use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{HostAlias, Pod};

use super::meta::{host_network, name_of, namespace_of, spec};
use crate::cri::v1::DnsConfig;

/// What a resolver reads at most.
const MAX_NAMESERVERS: usize = 3;
const MAX_SEARCHES: usize = 32;
const HOSTNAME_LIMIT: usize = 63;
/// The kernel's `__NEW_UTS_LEN`.
const KERNEL_NAME_LIMIT: usize = 64;

/// Hostname and, when the pod has a subdomain, the domain that makes it a full name.
pub fn hostname(pod: &Pod, cluster_domain: &str) -> (String, Option<String>) {
    let spec = spec(pod);
    if let Some(name) = spec.hostname_override.as_deref().filter(|name| !name.is_empty()) {
        return (name.to_owned(), None);
    }
    let name = spec.hostname.as_deref().filter(|name| !name.is_empty()).unwrap_or_else(|| name_of(pod));
    let cut: String = name.chars().take(HOSTNAME_LIMIT).collect();
    let domain = spec.subdomain.as_deref().filter(|name| !name.is_empty());
    (cut.trim_end_matches(['-', '.']).to_owned(), domain.map(|sub| format!("{sub}.{}.svc.{cluster_domain}", namespace_of(pod))))
}

/// The name that the kernel is told.
pub fn kernel_hostname(pod: &Pod, cluster_domain: &str) -> Result<String, String> {
    let (name, domain) = hostname(pod, cluster_domain);
    match domain {
        Some(domain) if spec(pod).set_hostname_as_fqdn == Some(true) => {
            let full = format!("{name}.{domain}");
            if full.len() > KERNEL_NAME_LIMIT {
                return Err(format!(
                    "failed to construct FQDN from pod hostname and cluster domain, FQDN {full} is too long ({KERNEL_NAME_LIMIT} characters is the max, {} characters requested)",
                    full.len()
                ));
            }
            Ok(full)
        }
        _ => Ok(name),
    }
}

/// What the node's own resolv.conf says.
pub fn parse_resolv_conf(text: &str) -> DnsConfig {
    let mut config = DnsConfig::default();
    for line in text.lines().map(str::trim) {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => config.servers.extend(words.next().map(str::to_owned)),
            Some("search") => config.searches = words.map(str::to_owned).collect(),
            Some("domain") => config.searches = words.take(1).map(str::to_owned).collect(),
            Some("options") => config.options.extend(words.map(str::to_owned)),
            _ => {}
        }
    }
    config
}

/// The pod's resolver settings by its dnsPolicy and dnsConfig; `node` is the node's own.
pub fn resolver(pod: &Pod, node: &DnsConfig, cluster_dns: &[IpAddr], cluster_domain: &str) -> DnsConfig {
    let spec = spec(pod);
    let mut config = match spec.dns_policy.as_deref().unwrap_or("ClusterFirst") {
        "None" => DnsConfig::default(),
        "Default" => node.clone(),
        "ClusterFirst" if host_network(pod) => node.clone(),
        _ if cluster_dns.is_empty() => node.clone(),
        _ => {
            let namespace = namespace_of(pod);
            let mut searches =
                vec![format!("{namespace}.svc.{cluster_domain}"), format!("svc.{cluster_domain}"), cluster_domain.to_owned()];
            searches.extend(node.searches.iter().cloned());
            DnsConfig { servers: cluster_dns.iter().map(ToString::to_string).collect(), searches, options: vec!["ndots:5".into()] }
        }
    };
    if let Some(own) = &spec.dns_config {
        config.servers.extend(own.nameservers.iter().flatten().cloned());
        config.searches.extend(own.searches.iter().flatten().cloned());
        let mut options: BTreeMap<String, String> = BTreeMap::new();
        for option in &config.options {
            let (name, value) = option.split_once(':').unwrap_or((option, ""));
            options.insert(name.into(), value.into());
        }
        for option in own.options.iter().flatten() {
            options.insert(option.name.clone().unwrap_or_default(), option.value.clone().unwrap_or_default());
        }
        config.options = options.into_iter().map(|(name, value)| if value.is_empty() { name } else { format!("{name}:{value}") }).collect();
    }
    config.servers = distinct(config.servers, MAX_NAMESERVERS);
    config.searches = distinct(config.searches, MAX_SEARCHES);
    config
}

fn distinct(list: Vec<String>, limit: usize) -> Vec<String> {
    let mut kept: Vec<String> = Vec::new();
    for entry in list {
        if !kept.contains(&entry) {
            kept.push(entry);
        }
    }
    kept.truncate(limit);
    kept
}

/// The text of the pod's own /etc/hosts.
pub fn hosts_file(pod: &Pod, ips: &[String], cluster_domain: &str) -> String {
    let (name, domain) = hostname(pod, cluster_domain);
    let mut text = String::from(
        "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n",
    );
    for ip in ips {
        match &domain {
            Some(domain) => text.push_str(&format!("{ip}\t{name}.{domain}\t{name}\n")),
            None => text.push_str(&format!("{ip}\t{name}\n")),
        }
    }
    text + &aliases(pod)
}

/// /etc/hosts of a pod in the host's network: the node's own and the aliases.
pub fn host_network_hosts_file(pod: &Pod, node_hosts: &str) -> String {
    format!("# Kubernetes-managed hosts file (host network).\n{node_hosts}{}", aliases(pod))
}

fn aliases(pod: &Pod) -> String {
    let spec = spec(pod);
    let list: &[HostAlias] = spec.host_aliases.as_deref().unwrap_or_default();
    if list.is_empty() {
        return String::new();
    }
    let lines: String =
        list.iter().map(|alias| format!("{}\t{}\n", alias.ip, alias.hostnames.as_deref().unwrap_or_default().join("\t"))).collect();
    format!("\n# Entries added by HostAliases.\n{lines}")
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{PodDNSConfig, PodDNSConfigOption, PodSpec};

    use super::*;

    fn pod(spec: PodSpec) -> Pod {
        let mut pod = Pod { spec: Some(spec), ..Pod::default() };
        pod.metadata.name = Some("web-0".into());
        pod.metadata.namespace = Some("shop".into());
        pod
    }

    fn node() -> DnsConfig {
        parse_resolv_conf("nameserver 192.0.2.53\nsearch example.com\noptions edns0\n")
    }

    #[test]
    fn policies() {
        let resolve = |spec: PodSpec| resolver(&pod(spec), &node(), &["10.96.0.10".parse().unwrap()], "cluster.local");
        let first = resolve(PodSpec::default());
        assert_eq!(first.servers, ["10.96.0.10"]);
        assert_eq!(first.searches, ["shop.svc.cluster.local", "svc.cluster.local", "cluster.local", "example.com"]);
        assert_eq!(first.options, ["ndots:5"]);
        assert_eq!(resolve(PodSpec { host_network: Some(true), ..PodSpec::default() }), node());
        let policy = |name: &str| Some(name.to_owned());
        assert_eq!(resolve(PodSpec { dns_policy: policy("Default"), ..PodSpec::default() }), node());
        let own = resolve(PodSpec {
            dns_policy: policy("None"),
            dns_config: Some(PodDNSConfig {
                nameservers: Some(vec!["1.1.1.1".into(), "1.1.1.1".into()]),
                searches: Some(vec!["resolv.conf.local".into()]),
                options: Some(vec![PodDNSConfigOption { name: Some("ndots".into()), value: Some("2".into()) }]),
            }),
            ..PodSpec::default()
        });
        assert_eq!(
            (own.servers, own.searches, own.options),
            (vec!["1.1.1.1".into()], vec!["resolv.conf.local".into()], vec!["ndots:2".into()])
        );
    }

    #[test]
    fn hosts_name_the_pod_and_its_aliases() {
        let text = hosts_file(
            &pod(PodSpec {
                subdomain: Some("web".into()),
                host_aliases: Some(vec![HostAlias { ip: "192.0.2.9".into(), hostnames: Some(vec!["a".into(), "b".into()]) }]),
                ..PodSpec::default()
            }),
            &["10.0.0.1".into()],
            "cluster.local",
        );
        assert!(text.ends_with("10.0.0.1\tweb-0.web.shop.svc.cluster.local\tweb-0\n\n# Entries added by HostAliases.\n192.0.2.9\ta\tb\n"));
    }

    #[test]
    fn long_names_are_cut_and_long_full_names_refused() {
        let mut long = pod(PodSpec { subdomain: Some("sub".into()), set_hostname_as_fqdn: Some(true), ..PodSpec::default() });
        long.metadata.name = Some("x".repeat(62) + "-yz");
        assert_eq!(hostname(&long, "cluster.local").0, "x".repeat(62));
        assert!(kernel_hostname(&long, "cluster.local").is_err());
    }
}
