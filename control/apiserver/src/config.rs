//! What the API server is told at start.

use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;
use outrigger_access::authn::AuthenticatorConfig;
use outrigger_access::pki::Pki;

pub struct Config {
    /// "v1.35.4", as /version and discovery show it.
    pub git_version: String,
    /// Ranges of ClusterIPs, the preferred family first; one or two.
    pub service_cidrs: Vec<IpNet>,
    pub node_ports: RangeInclusive<u16>,
    /// Where the `kubernetes` Service leads.
    pub advertise_address: IpAddr,
    pub secure_port: u16,
    /// Issuer of service account tokens, also their default audience.
    pub issuer: String,
    pub api_audiences: Vec<String>,
    pub authentication: AuthenticatorConfig,
    pub pki: Pki,
}

impl Config {
    /// A cluster's usual values; the caller changes what it has been told.
    pub fn new(pki: Pki, service_cidrs: Vec<IpNet>, advertise_address: IpAddr, secure_port: u16) -> Self {
        Self {
            git_version: "v1.35.4".into(),
            service_cidrs,
            node_ports: 30000..=32767,
            advertise_address,
            secure_port,
            issuer: "https://kubernetes.default.svc.cluster.local".into(),
            api_audiences: Vec::new(),
            authentication: AuthenticatorConfig { anonymous: Default::default(), static_tokens: Vec::new(), bootstrap_tokens: true },
            pki,
        }
    }
}
