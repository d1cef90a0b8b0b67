//! What a Service is given by the server: ClusterIPs, node ports and a health check port; taken before the write, kept or given back after it.

use std::collections::HashMap;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Mutex;

use ipnet::IpNet;
use outrigger_api::{FieldError, Resource, Status, meta};
use rand::Rng;
use serde_json::{Value, json};

use crate::call::Call;
use crate::engine::Engine;

/// Which addresses and ports are taken, and by which Service ("namespace/name").
pub struct ServiceAllocator {
    ranges: Vec<IpNet>,
    ports: RangeInclusive<u16>,
    taken: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    ips: HashMap<IpAddr, String>,
    ports: HashMap<u16, String>,
}

/// What one write has taken and will give up. Dropped without `keep`, it gives back what it took.
pub struct Allocation<'a> {
    allocator: Option<&'a ServiceAllocator>,
    ips: Vec<IpAddr>,
    ports: Vec<u16>,
    old_ips: Vec<IpAddr>,
    old_ports: Vec<u16>,
}

impl Allocation<'_> {
    const fn none() -> Self {
        Self { allocator: None, ips: Vec::new(), ports: Vec::new(), old_ips: Vec::new(), old_ports: Vec::new() }
    }

    /// The write happened: what the Service no longer uses is free.
    pub fn keep(mut self) {
        if let Some(allocator) = self.allocator.take() {
            allocator.release(&self.old_ips, &self.old_ports);
        }
    }
}

impl Drop for Allocation<'_> {
    fn drop(&mut self) {
        if let Some(allocator) = self.allocator {
            allocator.release(&self.ips, &self.ports);
        }
    }
}

fn family(ip: &IpAddr) -> &'static str {
    if ip.is_ipv4() { "IPv4" } else { "IPv6" }
}

fn range_family(range: &IpNet) -> &'static str {
    family(&range.addr())
}

impl ServiceAllocator {
    pub fn new(ranges: Vec<IpNet>, ports: RangeInclusive<u16>) -> Self {
        Self { ranges, ports, taken: Mutex::default() }
    }

    /// The address of the `kubernetes` Service: the first of the range.
    pub fn first(&self) -> Option<IpAddr> {
        self.ranges.first().and_then(|range| range.hosts().next())
    }

    /// Learns what stored Services hold.
    pub fn learn<'a>(&self, services: impl Iterator<Item = &'a Value>) {
        let mut taken = self.lock();
        for service in services {
            let owner = owner(service);
            for ip in ips_of(service) {
                taken.ips.insert(ip, owner.clone());
            }
            for port in ports_of(service) {
                taken.ports.insert(port, owner.clone());
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn release(&self, ips: &[IpAddr], ports: &[u16]) {
        let mut taken = self.lock();
        for ip in ips {
            taken.ips.remove(ip);
        }
        for port in ports {
            taken.ports.remove(port);
        }
    }

    fn take_ip(&self, ip: IpAddr, owner: &str) -> Result<(), String> {
        let Some(range) = self.ranges.iter().find(|range| range.contains(&ip)) else {
            let ranges: Vec<String> =
                self.ranges.iter().filter(|r| range_family(r) == family(&ip)).map(|r| r.trunc().to_string()).collect();
            return Err(format!("the provided IP ({ip}) is not in the valid range. The range of valid IPs is {}", ranges.join(", ")));
        };
        if ip == range.network() || (ip == range.broadcast() && ip.is_ipv4()) {
            return Err(format!("the provided IP ({ip}) is not in the valid range. The range of valid IPs is {}", range.trunc()));
        }
        let mut taken = self.lock();
        if taken.ips.contains_key(&ip) {
            return Err("provided IP is already allocated".into());
        }
        taken.ips.insert(ip, owner.into());
        Ok(())
    }

    /// A free address of the family; from the upper band first, so that the lower one stays for those who ask by address.
    fn take_any_ip(&self, wanted: &str, owner: &str) -> Result<IpAddr, String> {
        let range =
            self.ranges.iter().find(|r| range_family(r) == wanted).ok_or_else(|| format!("range of family {wanted} is not configured"))?;
        let bits = u32::from(range.max_prefix_len() - range.prefix_len()).min(32);
        let size = 1u64 << bits;
        let reserved = (size / 16).clamp(16, 256).min(size / 2);
        let last = if range.addr().is_ipv4() { size.saturating_sub(2) } else { size.saturating_sub(1) };
        let mut taken = self.lock();
        let bands = [(reserved, last), (1, reserved.saturating_sub(1))];
        for (from, to) in bands.into_iter().filter(|(from, to)| from <= to) {
            let span = to - from + 1;
            let start = rand::rng().random_range(0..span);
            for step in 0..span.min(1 << 20) {
                let ip = offset(range.network(), from + (start + step) % span);
                if let std::collections::hash_map::Entry::Vacant(free) = taken.ips.entry(ip) {
                    free.insert(owner.into());
                    return Ok(ip);
                }
            }
        }
        Err("range is full".into())
    }

    fn take_port(&self, port: u16, owner: &str) -> Result<(), String> {
        if !self.ports.contains(&port) {
            return Err(format!(
                "provided port is not in the valid range. The range of valid ports is {}-{}",
                self.ports.start(),
                self.ports.end()
            ));
        }
        let mut taken = self.lock();
        if taken.ports.contains_key(&port) {
            return Err("provided port is already allocated".into());
        }
        taken.ports.insert(port, owner.into());
        Ok(())
    }

    fn take_any_port(&self, owner: &str) -> Result<u16, String> {
        let (first, last) = (u32::from(*self.ports.start()), u32::from(*self.ports.end()));
        let size = last - first + 1;
        let reserved = (size / 32).clamp(16, 128).min(size / 2);
        let span = size - reserved;
        let start = rand::rng().random_range(0..span);
        let mut taken = self.lock();
        let upper = (0..span).map(|step| first + reserved + (start + step) % span);
        for port in upper.chain(first..first + reserved) {
            let port = port as u16;
            if let std::collections::hash_map::Entry::Vacant(free) = taken.ports.entry(port) {
                free.insert(owner.into());
                return Ok(port);
            }
        }
        Err("range is full".into())
    }
}

fn offset(base: IpAddr, by: u64) -> IpAddr {
    match base {
        IpAddr::V4(v4) => IpAddr::from((u32::from(v4) + by as u32).to_be_bytes()),
        IpAddr::V6(v6) => IpAddr::from((u128::from(v6) + u128::from(by)).to_be_bytes()),
    }
}

fn owner(service: &Value) -> String {
    format!("{}/{}", meta::namespace(service), meta::name(service))
}

fn is_external(service: &Value) -> bool {
    meta::text(service, "spec.type") == "ExternalName"
}

fn needs_node_ports(service: &Value) -> bool {
    match meta::text(service, "spec.type") {
        "NodePort" => true,
        "LoadBalancer" => meta::get(service, "spec.allocateLoadBalancerNodePorts").as_bool().unwrap_or(true),
        _ => false,
    }
}

fn needs_health_port(service: &Value) -> bool {
    meta::text(service, "spec.type") == "LoadBalancer" && meta::text(service, "spec.externalTrafficPolicy") == "Local"
}

fn ips_of(service: &Value) -> Vec<IpAddr> {
    let mut texts: Vec<&str> = meta::items(service, "spec.clusterIPs").iter().filter_map(Value::as_str).collect();
    if texts.is_empty() {
        texts.push(meta::text(service, "spec.clusterIP"));
    }
    texts.iter().filter_map(|text| text.parse().ok()).collect()
}

fn ports_of(service: &Value) -> Vec<u16> {
    let ports = meta::items(service, "spec.ports").iter().map(|port| &port["nodePort"]);
    let all = ports.chain([meta::get(service, "spec.healthCheckNodePort")]);
    let mut ports: Vec<u16> = all.filter_map(|port| u16::try_from(port.as_u64()?).ok()).filter(|port| *port != 0).collect();
    ports.sort_unstable();
    ports.dedup();
    ports
}

fn is_service(resource: &Resource) -> bool {
    resource.is("", "Service")
}

pub fn on_create<'a>(engine: &'a Engine, call: &Call, service: &mut Value) -> Result<Allocation<'a>, Status> {
    if !is_service(&call.resource) {
        return Ok(Allocation::none());
    }
    engine.services.settle(call, service, None)
}

pub fn on_update<'a>(engine: &'a Engine, call: &Call, new: &mut Value, old: &Value) -> Result<Allocation<'a>, Status> {
    if !is_service(&call.resource) || call.info.subresource == "status" {
        return Ok(Allocation::none());
    }
    engine.services.settle(call, new, Some(old))
}

pub fn on_delete(engine: &Engine, resource: &Resource, service: &Value) {
    if is_service(resource) {
        engine.services.release(&ips_of(service), &ports_of(service));
    }
}

/// Before validation of an update: what the server had given stays when the request leaves it out.
pub fn carry_over(resource: &Resource, new: &mut Value, old: &Value) {
    if !is_service(resource) {
        return;
    }
    if !is_external(new) && !is_external(old) {
        if meta::text(new, "spec.clusterIP").is_empty() && meta::items(new, "spec.clusterIPs").is_empty() {
            meta::set(new, "spec.clusterIP", meta::get(old, "spec.clusterIP").clone());
            meta::set(new, "spec.clusterIPs", meta::get(old, "spec.clusterIPs").clone());
        } else if meta::items(new, "spec.clusterIPs").is_empty() && meta::text(new, "spec.clusterIP") == meta::text(old, "spec.clusterIP") {
            meta::set(new, "spec.clusterIPs", meta::get(old, "spec.clusterIPs").clone());
        }
        for field in ["spec.ipFamilies", "spec.ipFamilyPolicy"] {
            if meta::get(new, field).is_null() && !meta::get(old, field).is_null() {
                meta::set(new, field, meta::get(old, field).clone());
            }
        }
    } else if is_external(new) && !is_external(old) {
        drop_cluster_fields(new, old);
    }
    if needs_node_ports(new) && needs_node_ports(old) {
        carry_node_ports(new, old);
    } else if !needs_node_ports(new) && needs_node_ports(old) {
        drop_node_ports(new, old);
    }
    let health = "spec.healthCheckNodePort";
    if needs_health_port(old) {
        if needs_health_port(new) && meta::is_empty(meta::get(new, health)) {
            meta::set(new, health, meta::get(old, health).clone());
        } else if !needs_health_port(new) && meta::get(new, health) == meta::get(old, health) {
            meta::remove(new, health);
        }
    }
}

/// A type change drops the values of the old type that the request only repeats.
fn drop_cluster_fields(new: &mut Value, old: &Value) {
    for field in ["spec.clusterIP", "spec.clusterIPs", "spec.ipFamilies", "spec.ipFamilyPolicy"] {
        if meta::get(new, field) == meta::get(old, field) {
            meta::remove(new, field);
        }
    }
}

fn same_port(a: &Value, b: &Value) -> bool {
    a["port"] == b["port"] && a["protocol"].as_str().unwrap_or("TCP") == b["protocol"].as_str().unwrap_or("TCP")
}

fn carry_node_ports(new: &mut Value, old: &Value) {
    let before = meta::items(old, "spec.ports").to_vec();
    let Some(ports) = new.pointer_mut("/spec/ports").and_then(Value::as_array_mut) else { return };
    for port in ports.iter_mut().filter(|port| meta::is_empty(&port["nodePort"])) {
        if let Some(known) = before.iter().find(|b| same_port(b, port)).filter(|b| !b["nodePort"].is_null()) {
            port["nodePort"] = known["nodePort"].clone();
        }
    }
}

fn drop_node_ports(new: &mut Value, old: &Value) {
    let before = ports_of(old);
    let Some(ports) = new.pointer_mut("/spec/ports").and_then(Value::as_array_mut) else { return };
    for port in ports {
        let repeated = port["nodePort"].as_u64().and_then(|n| u16::try_from(n).ok()).is_some_and(|n| before.contains(&n));
        if repeated && let Some(map) = port.as_object_mut() {
            map.shift_remove("nodePort");
        }
    }
}

impl ServiceAllocator {
    /// Gives the Service all it needs and lacks.
    fn settle(&self, call: &Call, service: &mut Value, old: Option<&Value>) -> Result<Allocation<'_>, Status> {
        let mut allocation = Allocation::none();
        allocation.allocator = Some(self);
        let (had_ips, had_ports) = old.map(|old| (ips_of(old), ports_of(old))).unwrap_or_default();
        if !is_external(service) {
            self.settle_ips(call, service, &had_ips, &mut allocation)?;
        }
        self.settle_ports(call, service, &had_ports, &mut allocation)?;
        let (ips, ports) = (ips_of(service), ports_of(service));
        allocation.old_ips = had_ips.into_iter().filter(|ip| !ips.contains(ip)).collect();
        allocation.old_ports = had_ports.into_iter().filter(|port| !ports.contains(port)).collect();
        Ok(allocation)
    }

    fn settle_ips(&self, call: &Call, service: &mut Value, had: &[IpAddr], allocation: &mut Allocation<'_>) -> Result<(), Status> {
        let families = self.settle_families(call, service)?;
        if meta::text(service, "spec.clusterIP") == "None" {
            meta::set(service, "spec.clusterIPs", json!(["None"]));
            return Ok(());
        }
        let owner = owner(service);
        let mut asked: Vec<String> = meta::items(service, "spec.clusterIPs").iter().filter_map(|v| v.as_str().map(String::from)).collect();
        let single = meta::text(service, "spec.clusterIP").to_string();
        if asked.is_empty() && !single.is_empty() {
            asked.push(single);
        }
        let fail = |asked: &[String], why: String| {
            let error = FieldError::invalid("spec.clusterIPs", json!(asked), why);
            Status::invalid("", "Service", meta::name(service), &[error])
        };
        let mut ips = Vec::new();
        for (i, family) in families.iter().enumerate() {
            let ip = match asked.get(i).and_then(|text| text.parse::<IpAddr>().ok()) {
                Some(ip) if had.contains(&ip) => ip,
                Some(ip) => {
                    self.take_ip(ip, &owner).map_err(|why| fail(&asked, format!("failed to allocate IP {ip}: {why}")))?;
                    allocation.ips.push(ip);
                    ip
                }
                None => {
                    let ip = self
                        .take_any_ip(family, &owner)
                        .map_err(|why| Status::internal(format!("failed to allocate a serviceIP: {why}")))?;
                    allocation.ips.push(ip);
                    ip
                }
            };
            ips.push(ip.to_string());
        }
        if let Some(first) = ips.first() {
            meta::set(service, "spec.clusterIP", first.as_str());
        }
        meta::set(service, "spec.clusterIPs", ips);
        Ok(())
    }

    /// `ipFamilies` and `ipFamilyPolicy`, from what the request says, its addresses, and the cluster's ranges.
    fn settle_families(&self, call: &Call, service: &mut Value) -> Result<Vec<String>, Status> {
        let configured: Vec<&str> = self.ranges.iter().map(range_family).collect();
        let mut families: Vec<String> =
            meta::items(service, "spec.ipFamilies").iter().filter_map(|v| v.as_str().map(String::from)).collect();
        let headless = meta::text(service, "spec.clusterIP") == "None";
        let selectorless = meta::is_empty(meta::get(service, "spec.selector"));
        for (i, ip) in ips_of(service).iter().enumerate() {
            if families.len() <= i {
                families.push(family(ip).into());
            }
        }
        let policy = match meta::text(service, "spec.ipFamilyPolicy") {
            "" if families.len() > 1 => "RequireDualStack",
            "" => "SingleStack",
            policy => policy,
        }
        .to_string();
        let fail = |field: &str, value: Value, why: &str| Err(call.invalid(meta::name(service), &[FieldError::invalid(field, value, why)]));
        if policy == "RequireDualStack" && configured.len() < 2 && !(headless && selectorless) {
            return fail("spec.ipFamilyPolicy", policy.into(), "this cluster is not configured for dual-stack services");
        }
        if !(headless && selectorless)
            && let Some(i) = families.iter().position(|f| !configured.contains(&f.as_str()))
        {
            let why = "not configured on this cluster";
            return fail(&format!("spec.ipFamilies[{i}]"), families[i].as_str().into(), why);
        }
        if families.is_empty() {
            families.extend(configured.first().map(|f| f.to_string()));
        }
        let wants_two = policy != "SingleStack" && (configured.len() > 1 || (headless && selectorless && policy == "RequireDualStack"));
        if wants_two && families.len() < 2 {
            families.push(if families[0] == "IPv4" { "IPv6" } else { "IPv4" }.into());
        }
        if policy == "SingleStack" {
            families.truncate(1);
        }
        meta::set(service, "spec.ipFamilies", families.clone());
        meta::set(service, "spec.ipFamilyPolicy", policy);
        Ok(families)
    }

    fn settle_ports(&self, call: &Call, service: &mut Value, had: &[u16], allocation: &mut Allocation<'_>) -> Result<(), Status> {
        let owner = owner(service);
        let name = meta::name(service).to_string();
        let fail = |field: String, port: u16, why: String| call.invalid(&name, &[FieldError::invalid(field, port, why)]);
        if needs_node_ports(service)
            && let Some(ports) = service.pointer_mut("/spec/ports").and_then(Value::as_array_mut)
        {
            let mut given: Vec<(u16, u64)> = Vec::new();
            for (i, port) in ports.iter_mut().enumerate() {
                let field = format!("spec.ports[{i}].nodePort");
                let number = port["port"].as_u64().unwrap_or_default();
                let asked = port["nodePort"].as_u64().and_then(|n| u16::try_from(n).ok()).unwrap_or_default();
                // The same port by another protocol shares its node port.
                let shared = given.iter().find(|(_, n)| *n == number).map(|(node_port, _)| *node_port);
                let node_port = match (asked, shared) {
                    (0, Some(shared)) => shared,
                    (0, None) => {
                        let taken = self.take_any_port(&owner).map_err(|why| fail(field, 0, why))?;
                        allocation.ports.push(taken);
                        taken
                    }
                    (asked, _) if had.contains(&asked) || allocation.ports.contains(&asked) => asked,
                    (asked, _) => {
                        self.take_port(asked, &owner).map_err(|why| fail(field, asked, why))?;
                        allocation.ports.push(asked);
                        asked
                    }
                };
                given.push((node_port, number));
                port["nodePort"] = node_port.into();
            }
        }
        if needs_health_port(service) {
            let field = "spec.healthCheckNodePort";
            let asked = meta::get(service, field).as_u64().and_then(|n| u16::try_from(n).ok()).unwrap_or_default();
            if asked == 0 {
                let port = self.take_any_port(&owner).map_err(|why| fail(field.into(), 0, why))?;
                allocation.ports.push(port);
                meta::set(service, field, port);
            } else if !had.contains(&asked) {
                self.take_port(asked, &owner).map_err(|why| fail(field.into(), asked, why))?;
                allocation.ports.push(asked);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allocator() -> ServiceAllocator {
        ServiceAllocator::new(vec!["10.96.0.0/28".parse().unwrap()], 30000..=30003)
    }

    #[test]
    fn addresses_run_out_and_come_back() {
        let allocator = allocator();
        let mut ips = Vec::new();
        while let Ok(ip) = allocator.take_any_ip("IPv4", "a/b") {
            ips.push(ip);
        }
        assert_eq!(ips.len(), 14);
        assert_eq!(allocator.take_ip(ips[0], "x").unwrap_err(), "provided IP is already allocated");
        allocator.release(&ips[..1], &[]);
        assert_eq!(allocator.take_any_ip("IPv4", "a/b").unwrap(), ips[0]);
        assert!(allocator.take_ip("10.0.0.1".parse().unwrap(), "x").unwrap_err().contains("not in the valid range"));
    }

    #[test]
    fn what_was_given_is_carried_over() {
        let resource = outrigger_api::builtin::by_kind("", "v1", "Service").unwrap();
        let old = json!({"spec": {"type": "NodePort", "clusterIP": "10.96.0.3", "clusterIPs": ["10.96.0.3"], "ports": [{"port": 80, "nodePort": 30001}]}});
        let mut new = json!({"spec": {"type": "NodePort", "ports": [{"port": 80}, {"port": 81}]}});
        carry_over(resource, &mut new, &old);
        assert_eq!(new["spec"]["clusterIP"], "10.96.0.3");
        assert_eq!(new["spec"]["ports"][0]["nodePort"], 30001);
        let mut plain = json!({"spec": {"type": "ClusterIP", "clusterIP": "10.96.0.3", "ports": [{"port": 80, "nodePort": 30001}]}});
        carry_over(resource, &mut plain, &old);
        assert!(plain["spec"]["ports"][0].get("nodePort").is_none());
    }
}
