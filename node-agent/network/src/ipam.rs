//! Pod addresses, handed out of the node's pod CIDRs.
//!
//! One file per address under one directory, named by the address and holding its owner. A lock file serializes the
//! plugin's processes and the agent; a file appears by rename, so a crash leaves either a whole allocation or none.
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;

/// Who holds an address: one interface of one sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Owner {
    pub container_id: String,
    pub interface: String,
}

impl Owner {
    pub fn new(container_id: impl Into<String>, interface: impl Into<String>) -> Self {
        Self { container_id: container_id.into(), interface: interface.into() }
    }

    /// Names the attachment in one word.
    pub fn key(&self) -> String {
        format!("{}-{}", self.container_id, self.interface)
    }
}

/// What is written down of an allocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub owner: Owner,
    /// `namespace/name`, where the runtime said whose sandbox it is. Older releases didn't note it.
    pub pod: Option<String>,
}

impl Record {
    fn encode(&self) -> String {
        let Owner { container_id, interface } = &self.owner;
        let pod = self.pod.as_ref().map(|pod| format!("{pod}\n")).unwrap_or_default();
        format!("{container_id}\n{interface}\n{pod}")
    }

    fn decode(text: &str) -> Option<Self> {
        let mut lines = text.lines().map(str::trim_end);
        let owner = Owner::new(lines.next()?, lines.next()?);
        Some(Self { owner, pod: lines.next().filter(|pod| !pod.is_empty()).map(str::to_owned) })
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no addresses available in range {0}")]
    Exhausted(IpNet),
    #[error("address store {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
}

/// The directory of allocations.
#[derive(Clone, Debug)]
pub struct Ipam {
    directory: PathBuf,
}

impl Ipam {
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self { directory: directory.into() }
    }

    /// Takes the lock; everything else is done through the returned guard.
    pub fn lock(&self) -> Result<Locked, Error> {
        let lock = (|| {
            fs::create_dir_all(&self.directory)?;
            let file = File::options().create(true).truncate(false).write(true).open(self.directory.join("lock"))?;
            file.lock()?;
            Ok(file)
        })();
        let lock = lock.map_err(|source| Error::Io { path: self.directory.clone(), source })?;
        Ok(Locked { directory: self.directory.clone(), _lock: lock })
    }
}

/// The store while its lock is held.
pub struct Locked {
    directory: PathBuf,
    _lock: File,
}

impl Locked {
    /// Every allocation, by address.
    pub fn allocations(&self) -> Result<BTreeMap<IpAddr, Owner>, Error> {
        Ok(self.records()?.into_iter().map(|(address, record)| (address, record.owner)).collect())
    }

    /// The same with all that is known of each.
    pub fn records(&self) -> Result<BTreeMap<IpAddr, Record>, Error> {
        let mut records = BTreeMap::new();
        let entries = fs::read_dir(&self.directory).map_err(|error| self.failed(error))?;
        for entry in entries {
            let entry = entry.map_err(|error| self.failed(error))?;
            let Some(address) = entry.file_name().to_str().and_then(parse_address) else { continue };
            let text = fs::read_to_string(entry.path()).map_err(|error| self.failed(error))?;
            if let Some(record) = Record::decode(&text) {
                records.insert(address, record);
            }
        }
        Ok(records)
    }

    /// One address per range for the record's owner: those that it holds already, or else free ones. Addresses go round, so
    /// that one just released is not given to the next pod while others still have it cached.
    pub fn allocate(&self, ranges: &[IpNet], record: &Record) -> Result<Vec<IpAddr>, Error> {
        let owner = &record.owner;
        let mut taken = self.allocations()?;
        let mut addresses = Vec::with_capacity(ranges.len());
        for range in ranges {
            let held = taken.iter().find(|(address, holder)| *holder == owner && range.contains(*address));
            let address = match held {
                Some((address, _)) => *address,
                None => self.take(*range, &taken, record)?,
            };
            taken.insert(address, owner.clone());
            addresses.push(address);
        }
        Ok(addresses)
    }

    fn take(&self, range: IpNet, taken: &BTreeMap<IpAddr, Owner>, record: &Record) -> Result<IpAddr, Error> {
        let last_path = self.directory.join(if range.addr().is_ipv4() { "last.v4" } else { "last.v6" });
        let last = fs::read_to_string(&last_path).ok().and_then(|text| text.trim().parse().ok());
        let address = next_free(range, last, |address| taken.contains_key(&address)).ok_or(Error::Exhausted(range))?;
        self.write(&self.directory.join(file_name(address)), &record.encode())?;
        self.write(&last_path, &address.to_string())?;
        Ok(address)
    }

    /// Frees what `owner` holds; returns the addresses.
    pub fn release(&self, owner: &Owner) -> Result<Vec<IpAddr>, Error> {
        self.release_where(|holder| holder == owner)
    }

    /// Frees every allocation whose owner `gone` accepts; returns the addresses.
    pub fn release_where(&self, gone: impl Fn(&Owner) -> bool) -> Result<Vec<IpAddr>, Error> {
        let mut released = Vec::new();
        for (address, owner) in self.allocations()? {
            if gone(&owner) {
                fs::remove_file(self.directory.join(file_name(address))).map_err(|error| self.failed(error))?;
                released.push(address);
            }
        }
        Ok(released)
    }

    /// How long ago `address` was handed out.
    pub fn age(&self, address: IpAddr) -> Option<Duration> {
        fs::metadata(self.directory.join(file_name(address))).ok()?.modified().ok()?.elapsed().ok()
    }

    fn write(&self, path: &Path, text: &str) -> Result<(), Error> {
        let temporary = self.directory.join(".new");
        (|| {
            let mut file = File::create(&temporary)?;
            file.write_all(text.as_bytes())?;
            fs::rename(&temporary, path)
        })()
        .map_err(|source| Error::Io { path: path.to_owned(), source })
    }

    fn failed(&self, source: io::Error) -> Error {
        Error::Io { path: self.directory.clone(), source }
    }
}

/// Colons are fine in Linux file names, but not on every filesystem that a user mounts.
fn file_name(address: IpAddr) -> String {
    address.to_string().replace(':', "_")
}

fn parse_address(name: &str) -> Option<IpAddr> {
    name.replace('_', ":").parse().ok()
}

/// The first usable address of `range` after `last` that is not taken, going round once.
///
/// The network address is never used, nor is the last one of a v4 range with more than two.
fn next_free(range: IpNet, last: Option<IpAddr>, taken: impl Fn(IpAddr) -> bool) -> Option<IpAddr> {
    let (first, end) = usable(range);
    let start = last.map(number).filter(|last| (first..end).contains(last)).map_or(first, |last| last + 1);
    // A v6 range is practically endless; nobody runs this many pods on a node.
    let limit = (end - first).saturating_add(1).min(1 << 20);
    let mut candidate = start;
    for _ in 0..limit {
        let address = denumber(candidate, range);
        if !taken(address) {
            return Some(address);
        }
        candidate = if candidate >= end { first } else { candidate + 1 };
    }
    None
}

fn usable(range: IpNet) -> (u128, u128) {
    let (network, broadcast) = (number(range.network()), number(range.broadcast()));
    match broadcast - network {
        0 => (network, network),
        1 => (network, broadcast),
        _ if range.addr().is_ipv4() => (network + 1, broadcast - 1),
        _ => (network + 1, broadcast),
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(u32::from(address)),
        IpAddr::V6(address) => u128::from(address),
    }
}

fn denumber(number: u128, range: IpNet) -> IpAddr {
    match range {
        // A v4 range's numbers have 32 bits by construction.
        IpNet::V4(_) => IpAddr::V4(Ipv4Addr::from(number as u32)),
        IpNet::V6(_) => IpAddr::V6(Ipv6Addr::from(number)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn addresses_go_round_and_skip_the_taken() {
        let cases: [(&str, Option<&str>, &[&str], Option<&str>); 9] = [
            ("10.0.0.0/24", None, &[], Some("10.0.0.1")),
            ("10.0.0.0/24", Some("10.0.0.1"), &[], Some("10.0.0.2")),
            ("10.0.0.0/24", Some("10.0.0.254"), &[], Some("10.0.0.1")),
            ("10.0.0.0/24", Some("10.0.0.254"), &["10.0.0.1", "10.0.0.2"], Some("10.0.0.3")),
            ("10.0.0.0/24", Some("192.168.0.1"), &[], Some("10.0.0.1")),
            ("10.0.0.0/30", None, &["10.0.0.1", "10.0.0.2"], None),
            ("10.0.0.0/31", None, &["10.0.0.0"], Some("10.0.0.1")),
            ("10.0.0.7/32", None, &[], Some("10.0.0.7")),
            ("fd00::/64", Some("fd00::5"), &["fd00::6"], Some("fd00::7")),
        ];
        for (range, last, taken, expected) in cases {
            let taken: Vec<IpAddr> = taken.iter().map(|address| address.parse().unwrap()).collect();
            let found = next_free(net(range), last.map(|last| last.parse().unwrap()), |address| taken.contains(&address));
            assert_eq!(found, expected.map(|address| address.parse().unwrap()), "{range} after {last:?} without {taken:?}");
        }
    }

    #[test]
    fn an_allocation_is_kept_until_released() {
        let directory = tempfile::tempdir().unwrap();
        let store = Ipam::new(directory.path());
        let record = |id: &str, pod: Option<&str>| Record { owner: Owner::new(id, "eth0"), pod: pod.map(str::to_owned) };
        let (one, two) = (record("aaa", Some("ns/a")), record("bbb", None));
        let ranges = [net("10.0.0.0/24"), net("fd00::/64")];
        let first = store.lock().unwrap().allocate(&ranges, &one).unwrap();
        assert_eq!(first, ["10.0.0.1".parse::<IpAddr>().unwrap(), "fd00::1".parse().unwrap()]);
        assert_eq!(store.lock().unwrap().allocate(&ranges, &one).unwrap(), first, "asking again gives the same");
        let second = store.lock().unwrap().allocate(&ranges[..1], &two).unwrap();
        assert_eq!(second, ["10.0.0.2".parse::<IpAddr>().unwrap()]);
        let records = store.lock().unwrap().records().unwrap();
        assert_eq!((&records[&first[0]], &records[&second[0]]), (&one, &two));
        assert_eq!(store.lock().unwrap().release(&one.owner).unwrap(), first);
        assert_eq!(store.lock().unwrap().release(&one.owner).unwrap(), Vec::<IpAddr>::new());
        assert_eq!(store.lock().unwrap().allocations().unwrap(), BTreeMap::from([(second[0], two.owner)]));
    }

    #[test]
    fn a_full_range_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let store = Ipam::new(directory.path());
        let range = [net("10.0.0.0/30")];
        let record = |id: &str| Record { owner: Owner::new(id, "eth0"), pod: None };
        for id in ["a", "b"] {
            store.lock().unwrap().allocate(&range, &record(id)).unwrap();
        }
        let error = store.lock().unwrap().allocate(&range, &record("c")).unwrap_err();
        assert_eq!(error.to_string(), "no addresses available in range 10.0.0.0/30");
    }
}
