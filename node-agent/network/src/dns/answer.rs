//! Answers by the Kubernetes DNS specification, version 1.1.0: a pure function of the records and the question.
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::rdata::{A, AAAA, CNAME, NS, PTR, SOA, SRV, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use outrigger_cluster::mirror::Key;

use super::records::{Records, cluster_ips};

/// Version of the specification that the answers follow, as the `dns-version` record tells it.
const SPECIFICATION: &str = "1.1.0";
/// Seconds for what changes only with the Service itself.
const STABLE_TTL: u32 = 30;
/// Seconds for what changes with the pods, and for "no such name".
const VOLATILE_TTL: u32 = 5;
/// How many CNAMEs are followed inside the zone before it counts as a loop.
const MAX_ALIASES: usize = 8;

/// The zone and who serves it.
#[derive(Clone, Debug)]
pub struct Zone {
    /// Lower case, no dot at the end.
    name: String,
    origin: Name,
    servers: Vec<IpAddr>,
}

impl Zone {
    pub fn new(domain: &str, servers: Vec<IpAddr>) -> Result<Self, hickory_proto::ProtoError> {
        let name = domain.trim_end_matches('.').to_ascii_lowercase();
        let origin = Name::from_str(&format!("{name}."))?;
        Ok(Self { name, origin, servers })
    }

    fn soa(&self) -> Record {
        let (server, mail) = (self.child("ns.dns"), self.child("hostmaster"));
        // The serial matters to secondaries only, and there is none.
        let soa = SOA::new(server, mail, 1, 7200, 1800, 86400, VOLATILE_TTL);
        Record::from_rdata(self.origin.clone(), VOLATILE_TTL, RData::SOA(soa))
    }

    /// `labels` below the zone; names come from the API, where each is a valid label, so a failure means an odd object.
    fn child(&self, labels: &str) -> Name {
        Name::from_str(&format!("{labels}.{}.", self.name)).unwrap_or_else(|_| self.origin.clone())
    }

    fn service_name(&self, service: &Key) -> Name {
        self.child(&format!("{}.{}.svc", service.name, service.namespace))
    }

    fn endpoint_name(&self, service: &Key, endpoint: &str) -> Name {
        self.child(&format!("{endpoint}.{}.{}.svc", service.name, service.namespace))
    }
}

/// What to tell the asker.
#[derive(Debug, PartialEq)]
pub enum Answer {
    /// Not ours: somebody upstream has to be asked.
    Foreign,
    Authoritative(Reply),
}

#[derive(Debug, PartialEq)]
pub struct Reply {
    pub code: ResponseCode,
    pub answers: Vec<Record>,
    pub authorities: Vec<Record>,
    pub additionals: Vec<Record>,
    /// The last answer is a CNAME to this name outside the zone, whose records would complete the reply.
    pub unresolved: Option<Name>,
}

impl Reply {
    fn found(answers: Vec<Record>) -> Self {
        Self { code: ResponseCode::NoError, answers, authorities: Vec::new(), additionals: Vec::new(), unresolved: None }
    }

    /// The name has no record of this type (`NoError`), or doesn't exist (`NXDomain`).
    fn nothing(zone: &Zone, code: ResponseCode) -> Self {
        Self { code, answers: Vec::new(), authorities: vec![zone.soa()], additionals: Vec::new(), unresolved: None }
    }

    fn of(zone: &Zone, exists: bool, answers: Vec<Record>) -> Self {
        match (answers.is_empty(), exists) {
            (false, _) => Self::found(answers),
            (true, true) => Self::nothing(zone, ResponseCode::NoError),
            (true, false) => Self::nothing(zone, ResponseCode::NXDomain),
        }
    }
}

/// Answers one question. Owner names keep the asker's spelling.
pub fn answer(zone: &Zone, records: &Records, name: &Name, kind: RecordType) -> Answer {
    let question = Question { zone, records, name, kind };
    if let Some(address) = reverse_address(name) {
        return question.reverse(address);
    }
    let text = name.to_ascii().to_ascii_lowercase();
    let text = text.trim_end_matches('.');
    let inner = match text.strip_suffix(&zone.name) {
        Some("") => "",
        Some(inner) if inner.ends_with('.') => &inner[..inner.len() - 1],
        _ => return Answer::Foreign,
    };
    let labels: Vec<&str> = if inner.is_empty() { Vec::new() } else { inner.rsplit('.').collect() };
    Answer::Authoritative(question.inside(&labels, 0))
}

struct Question<'a> {
    zone: &'a Zone,
    records: &'a Records,
    name: &'a Name,
    kind: RecordType,
}

impl Question<'_> {
    /// `labels` are those before the zone, the last one first.
    fn inside(&self, labels: &[&str], aliases: usize) -> Reply {
        let empty = |exists: bool| Reply::of(self.zone, exists, Vec::new());
        match labels {
            [] => self.apex(),
            ["dns-version"] => {
                Reply::of(self.zone, true, self.when(RecordType::TXT, || RData::TXT(TXT::new(vec![SPECIFICATION.to_owned()]))))
            }
            ["dns", "ns"] => {
                Reply::of(self.zone, true, self.zone.servers.iter().filter_map(|server| self.address(*server, STABLE_TTL)).collect())
            }
            ["dns" | "svc" | "pod"] | ["pod", _] => empty(true),
            ["pod", _, dashed] => self.pod(dashed),
            ["svc", namespace] => empty(self.records.has_namespace(namespace)),
            ["svc", namespace, name, rest @ ..] => self.service(&Key::new(*namespace, *name), rest, aliases),
            _ => empty(false),
        }
    }

    fn apex(&self) -> Reply {
        let answers = match self.kind {
            RecordType::SOA => vec![self.zone.soa()],
            RecordType::NS => self.when(RecordType::NS, || RData::NS(NS(self.zone.child("ns.dns")))),
            _ => Vec::new(),
        };
        Reply::of(self.zone, true, answers)
    }

    fn service(&self, key: &Key, rest: &[&str], aliases: usize) -> Reply {
        let Some(service) = self.records.service(key) else { return Reply::of(self.zone, false, Vec::new()) };
        let spec = service.spec.as_ref();
        if spec.and_then(|spec| spec.type_.as_deref()) == Some("ExternalName") {
            let target = spec.and_then(|spec| spec.external_name.as_deref()).unwrap_or_default();
            return if rest.is_empty() { self.external(target, aliases) } else { Reply::of(self.zone, false, Vec::new()) };
        }
        match rest {
            [] => self.whole_service(key, service),
            [protocol, port] if protocol.starts_with('_') && port.starts_with('_') => self.port(key, service, &port[1..], &protocol[1..]),
            [protocol] if protocol.starts_with('_') => {
                let ports = spec.and_then(|spec| spec.ports.as_ref()).into_iter().flatten();
                let has = |wanted: &str| {
                    ports.clone().any(|port| port.name.is_some() && port.protocol.as_deref().unwrap_or("TCP").eq_ignore_ascii_case(wanted))
                };
                Reply::of(self.zone, has(&protocol[1..]), Vec::new())
            }
            [endpoint] => self.endpoint(key, service, endpoint),
            _ => Reply::of(self.zone, false, Vec::new()),
        }
    }

    fn external(&self, target: &str, aliases: usize) -> Reply {
        let Ok(target) = Name::from_str(&format!("{}.", target.trim_end_matches('.'))) else {
            return Reply::of(self.zone, true, Vec::new());
        };
        let alias = Record::from_rdata(self.name.clone(), STABLE_TTL, RData::CNAME(CNAME(target.clone())));
        if self.kind == RecordType::CNAME || aliases >= MAX_ALIASES {
            return Reply::found(vec![alias]);
        }
        let next = Question { name: &target, ..*self };
        match next.follow(aliases + 1) {
            Some(mut reply) => {
                reply.answers.insert(0, alias);
                reply
            }
            None => Reply { unresolved: Some(target), ..Reply::found(vec![alias]) },
        }
    }

    fn follow(&self, aliases: usize) -> Option<Reply> {
        let text = self.name.to_ascii().to_ascii_lowercase();
        let inner = text.trim_end_matches('.').strip_suffix(&self.zone.name)?.strip_suffix('.')?.to_owned();
        Some(self.inside(&inner.rsplit('.').collect::<Vec<_>>(), aliases))
    }

    /// The Service's own name: its cluster IPs, or its endpoints when it is headless.
    fn whole_service(&self, key: &Key, service: &Service) -> Reply {
        if self.kind == RecordType::SRV {
            return self.ports(key, service, |_, _| true);
        }
        let addresses = cluster_ips(service);
        if !addresses.is_empty() {
            return Reply::of(self.zone, true, addresses.into_iter().filter_map(|address| self.address(address, STABLE_TTL)).collect());
        }
        let mut exists = false;
        let mut answers: Vec<Record> = Vec::new();
        for (_, endpoint) in self.records.endpoints(key, service) {
            exists = true;
            push_new(&mut answers, addresses_of(endpoint).filter_map(|address| self.address(address, VOLATILE_TTL)));
        }
        Reply::of(self.zone, exists, answers)
    }

    fn endpoint(&self, key: &Key, service: &Service, wanted: &str) -> Reply {
        let mut exists = false;
        let mut answers: Vec<Record> = Vec::new();
        for (_, endpoint) in self.records.endpoints(key, service) {
            for address in addresses_of(endpoint).filter(|address| endpoint_label(endpoint, *address).eq_ignore_ascii_case(wanted)) {
                exists = true;
                push_new(&mut answers, self.address(address, VOLATILE_TTL));
            }
        }
        Reply::of(self.zone, exists, answers)
    }

    fn port(&self, key: &Key, service: &Service, port: &str, protocol: &str) -> Reply {
        let reply = self.ports(key, service, |name, transport| name.eq_ignore_ascii_case(port) && transport.eq_ignore_ascii_case(protocol));
        let exists = reply.code == ResponseCode::NoError;
        if self.kind == RecordType::SRV { reply } else { Reply::of(self.zone, exists, Vec::new()) }
    }

    /// SRV records of the ports that `wanted` takes by name and protocol.
    fn ports(&self, key: &Key, service: &Service, wanted: impl Fn(&str, &str) -> bool) -> Reply {
        let addresses = cluster_ips(service);
        let mut targets: Vec<(u16, Name, Vec<IpAddr>)> = Vec::new();
        if addresses.is_empty() {
            for (slice, endpoint) in self.records.endpoints(key, service) {
                self.endpoint_ports(key, slice, endpoint, &wanted, &mut targets);
            }
        } else {
            let ports = service.spec.as_ref().and_then(|spec| spec.ports.as_ref()).into_iter().flatten();
            for port in ports.filter(|port| wanted(port.name.as_deref().unwrap_or_default(), port.protocol.as_deref().unwrap_or("TCP"))) {
                targets.push((port.port as u16, self.zone.service_name(key), addresses.clone()));
            }
        }
        self.srv_reply(targets, if addresses.is_empty() { VOLATILE_TTL } else { STABLE_TTL })
    }

    fn endpoint_ports(
        &self,
        key: &Key,
        slice: &EndpointSlice,
        endpoint: &Endpoint,
        wanted: &impl Fn(&str, &str) -> bool,
        targets: &mut Vec<(u16, Name, Vec<IpAddr>)>,
    ) {
        for port in slice.ports.iter().flatten() {
            let Some(number) = port.port.and_then(|number| u16::try_from(number).ok()) else { continue };
            if !wanted(port.name.as_deref().unwrap_or_default(), port.protocol.as_deref().unwrap_or("TCP")) {
                continue;
            }
            for address in addresses_of(endpoint) {
                targets.push((number, self.zone.endpoint_name(key, &endpoint_label(endpoint, address)), vec![address]));
            }
        }
    }

    fn srv_reply(&self, targets: Vec<(u16, Name, Vec<IpAddr>)>, ttl: u32) -> Reply {
        // Equal shares of a hundred, which is what clients of upstream's DNS see.
        let weight = u16::try_from(100 / targets.len().max(1)).unwrap_or_default().max(1);
        let (mut answers, mut additionals) = (Vec::new(), Vec::new());
        for (port, target, addresses) in targets {
            push_new(&mut answers, [Record::from_rdata(self.name.clone(), ttl, RData::SRV(SRV::new(0, weight, port, target.clone())))]);
            push_new(&mut additionals, addresses.into_iter().map(|address| Record::from_rdata(target.clone(), ttl, address_data(address))));
        }
        Reply { additionals, ..Reply::of(self.zone, false, answers) }
    }

    /// `a-b-c-d.namespace.pod`: the address is in the name itself.
    fn pod(&self, dashed: &str) -> Reply {
        let address = Ipv4Addr::from_str(&dashed.replace('-', ".")).map(IpAddr::V4);
        let address = address.or_else(|_| Ipv6Addr::from_str(&dashed.replace('-', ":")).map(IpAddr::V6));
        match address {
            Ok(address) => Reply::of(self.zone, true, self.address(address, VOLATILE_TTL).into_iter().collect()),
            Err(_) => Reply::of(self.zone, false, Vec::new()),
        }
    }

    /// Addresses that the cluster doesn't name may have one upstream.
    fn reverse(&self, address: IpAddr) -> Answer {
        let targets: Vec<Name> = match self.records.by_cluster_ip(address) {
            Some(service) => vec![self.zone.service_name(service)],
            None => self.records.by_endpoint(address).map(|named| self.zone.endpoint_name(&named.service, &named.hostname)).collect(),
        };
        if targets.is_empty() {
            return Answer::Foreign;
        }
        let records = targets.into_iter().map(|target| Record::from_rdata(self.name.clone(), VOLATILE_TTL, RData::PTR(PTR(target))));
        let records = if self.kind == RecordType::PTR || self.kind == RecordType::ANY { records.collect() } else { Vec::new() };
        Answer::Authoritative(Reply::of(self.zone, true, records))
    }

    /// A record of the address, if it is of the type that was asked for.
    fn address(&self, address: IpAddr, ttl: u32) -> Option<Record> {
        let wanted = match self.kind {
            RecordType::ANY => true,
            RecordType::A => address.is_ipv4(),
            RecordType::AAAA => address.is_ipv6(),
            _ => false,
        };
        wanted.then(|| Record::from_rdata(self.name.clone(), ttl, address_data(address)))
    }

    fn when(&self, kind: RecordType, data: impl FnOnce() -> RData) -> Vec<Record> {
        if self.kind == kind || self.kind == RecordType::ANY {
            vec![Record::from_rdata(self.name.clone(), STABLE_TTL, data())]
        } else {
            Vec::new()
        }
    }
}

fn push_new(records: &mut Vec<Record>, new: impl IntoIterator<Item = Record>) {
    for record in new {
        if !records.contains(&record) {
            records.push(record);
        }
    }
}

fn address_data(address: IpAddr) -> RData {
    match address {
        IpAddr::V4(address) => RData::A(A(address)),
        IpAddr::V6(address) => RData::AAAA(AAAA(address)),
    }
}

fn addresses_of(endpoint: &Endpoint) -> impl Iterator<Item = IpAddr> {
    endpoint.addresses.iter().filter_map(|address| address.parse().ok())
}

/// The endpoint's label below its Service: its hostname, or else its address with dashes.
fn endpoint_label(endpoint: &Endpoint, address: IpAddr) -> String {
    match &endpoint.hostname {
        Some(hostname) if !hostname.is_empty() => hostname.clone(),
        _ => address.to_string().replace(['.', ':'], "-"),
    }
}

/// The address that an `in-addr.arpa` or `ip6.arpa` name spells out in full.
fn reverse_address(name: &Name) -> Option<IpAddr> {
    let text = name.to_ascii().to_ascii_lowercase();
    let text = text.trim_end_matches('.');
    if let Some(inner) = text.strip_suffix(".in-addr.arpa") {
        let mut octets: Vec<&str> = inner.split('.').collect();
        octets.reverse();
        return Ipv4Addr::from_str(&octets.join(".")).ok().map(IpAddr::V4);
    }
    let inner = text.strip_suffix(".ip6.arpa")?;
    let nibbles: Vec<u128> = inner
        .split('.')
        .map(|nibble| u8::from_str_radix(nibble, 16).ok().filter(|_| nibble.len() == 1).map(u128::from))
        .collect::<Option<_>>()?;
    let number = nibbles.iter().rev().fold(0, |number, nibble| number << 4 | nibble);
    (nibbles.len() == 32).then(|| IpAddr::V6(Ipv6Addr::from(number)))
}
