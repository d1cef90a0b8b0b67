//! Addresses, ranges of addresses, and URLs.
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use outrigger_cel::value::Key;
use outrigger_cel::{Error, Library, Opaque, Value};

#[derive(Clone, Copy, Debug, PartialEq)]
struct Ip(IpAddr);

impl Opaque for Ip {
    fn type_name(&self) -> &'static str {
        "net.IP"
    }

    fn equals(&self, other: &dyn Opaque) -> bool {
        other.downcast() == Some(self)
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Cidr {
    address: IpAddr,
    length: u32,
}

impl Opaque for Cidr {
    fn type_name(&self) -> &'static str {
        "net.CIDR"
    }

    fn equals(&self, other: &dyn Opaque) -> bool {
        other.downcast() == Some(self)
    }
}

/// The address's bits at the top of 128, and how many there are.
fn bits(address: IpAddr) -> (u128, u32) {
    match address {
        IpAddr::V4(v4) => (u128::from(u32::from(v4)) << 96, 32),
        IpAddr::V6(v6) => (u128::from(v6), 128),
    }
}

impl Cidr {
    fn parse(text: &str) -> Result<Cidr, Error> {
        let wrong = || Error::new(format!("network address parse error during conversion from string: invalid CIDR address: {text}"));
        let (address, length) = text.split_once('/').ok_or_else(wrong)?;
        let address = parse_ip(address)?;
        let plain = !length.is_empty() && (length == "0" || !length.starts_with('0')) && length.bytes().all(|b| b.is_ascii_digit());
        let length: u32 = length.parse().ok().filter(|_| plain).ok_or_else(wrong)?;
        if length > bits(address).1 { Err(wrong()) } else { Ok(Cidr { address, length }) }
    }

    fn mask(&self) -> u128 {
        u128::MAX.checked_shl(128 - self.length).unwrap_or(0)
    }

    fn contains(&self, address: IpAddr) -> bool {
        let ((own, family), (other, other_family)) = (bits(self.address), bits(address));
        family == other_family && own & self.mask() == other & self.mask()
    }

    fn masked(&self) -> Cidr {
        let kept = bits(self.address).0 & self.mask();
        let address = match self.address {
            IpAddr::V4(_) => IpAddr::V4(((kept >> 96) as u32).into()),
            IpAddr::V6(_) => IpAddr::V6(kept.into()),
        };
        Cidr { address, length: self.length }
    }
}

/// Neither zones nor IPv4 written as IPv6.
fn parse_ip(text: &str) -> Result<IpAddr, Error> {
    let wrong = |why: &str| Error::new(format!("IP Address {text:?} parse error during conversion from string: {why}"));
    let address: IpAddr = text.parse().map_err(|_| wrong("unable to parse IP"))?;
    match address {
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => Err(wrong("IPv4-mapped IPv6 address is not allowed")),
        address => Ok(address),
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn ip(value: &Value) -> Result<IpAddr, Error> {
    match value {
        Value::String(text) => parse_ip(text),
        value => value.downcast::<Ip>().map(|ip| ip.0).ok_or_else(Error::no_overload),
    }
}

fn cidr(value: &Value) -> Result<Cidr, Error> {
    match value {
        Value::String(text) => Cidr::parse(text),
        value => value.downcast::<Cidr>().copied().ok_or_else(Error::no_overload),
    }
}

fn contains_range(args: &[Value]) -> Result<Value, Error> {
    let (outer, inner) = (cidr(&args[0])?, cidr(&args[1])?);
    Ok((outer.length <= inner.length && outer.contains(inner.address)).into())
}

fn contains_address(args: &[Value]) -> Result<Value, Error> {
    Ok(cidr(&args[0])?.contains(ip(&args[1])?).into())
}

pub const ADDRESSES: Library = &[
    ("ip(string) -> net.IP", |a| Ok(Value::opaque(Ip(ip(&a[0])?)))),
    ("isIP(string) -> bool", |a| Ok(ip(&a[0]).is_ok().into())),
    ("ip.isCanonical(string) -> bool", |a| Ok((ip(&a[0])?.to_string() == text(&a[0])).into())),
    ("string(net.IP) -> string", |a| Ok(ip(&a[0])?.to_string().into())),
    ("net.IP.family() -> int", |a| Ok(Value::Int(if ip(&a[0])?.is_ipv4() { 4 } else { 6 }))),
    ("net.IP.isUnspecified() -> bool", |a| Ok(ip(&a[0])?.is_unspecified().into())),
    ("net.IP.isLoopback() -> bool", |a| Ok(ip(&a[0])?.is_loopback().into())),
    ("net.IP.isLinkLocalMulticast() -> bool", |a| Ok(link_local_multicast(ip(&a[0])?).into())),
    ("net.IP.isLinkLocalUnicast() -> bool", |a| Ok(link_local_unicast(ip(&a[0])?).into())),
    ("net.IP.isGlobalUnicast() -> bool", |a| {
        let address = ip(&a[0])?;
        let broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
        let local = address.is_unspecified() || address.is_loopback() || address.is_multicast() || link_local_unicast(address);
        Ok((!broadcast && !local).into())
    }),
    ("cidr(string) -> net.CIDR", |a| Ok(Value::opaque(cidr(&a[0])?))),
    ("isCIDR(string) -> bool", |a| Ok(cidr(&a[0]).is_ok().into())),
    ("string(net.CIDR) -> string", |a| cidr(&a[0]).map(|range| format!("{}/{}", range.address, range.length).into())),
    ("net.CIDR.containsIP(net.IP) -> bool", contains_address),
    ("net.CIDR.containsIP(string) -> bool", contains_address),
    ("net.CIDR.containsCIDR(net.CIDR) -> bool", contains_range),
    ("net.CIDR.containsCIDR(string) -> bool", contains_range),
    ("net.CIDR.ip() -> net.IP", |a| Ok(Value::opaque(Ip(cidr(&a[0])?.address)))),
    ("net.CIDR.masked() -> net.CIDR", |a| Ok(Value::opaque(cidr(&a[0])?.masked()))),
    ("net.CIDR.prefixLength() -> int", |a| Ok(Value::Int(cidr(&a[0])?.length.into()))),
];

fn link_local_multicast(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.octets()[..3] == [224, 0, 0],
        IpAddr::V6(v6) => v6.segments()[0] & 0xff0f == 0xff02,
    }
}

fn link_local_unicast(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

#[derive(Debug, PartialEq)]
struct Url {
    scheme: String,
    /// With the port.
    host: String,
    path: String,
    query: String,
}

impl Opaque for Url {
    fn type_name(&self) -> &'static str {
        "kubernetes.URL"
    }

    fn equals(&self, other: &dyn Opaque) -> bool {
        other.downcast() == Some(self)
    }
}

impl Url {
    /// An absolute URI or an absolute path, as Go's ParseRequestURI takes them.
    fn parse(text: &str) -> Result<Url, Error> {
        let wrong = || Error::new(format!("URL parse error during conversion from string: parse {text:?}: invalid URI for request"));
        if text.is_empty() || text.bytes().any(|byte| byte <= b' ' || byte == 0x7f) {
            return Err(wrong());
        }
        let scheme = text.split_once(':').map(|(scheme, _)| scheme).filter(|scheme| {
            scheme.starts_with(|c: char| c.is_ascii_alphabetic()) && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
        });
        let rest = scheme.map_or(text, |scheme| &text[scheme.len() + 1..]);
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        if !rest.starts_with('/') {
            return Err(wrong());
        }
        let (host, path) = match rest.strip_prefix("//").filter(|_| scheme.is_some()) {
            Some(authority) => authority.split_at(authority.find('/').unwrap_or(authority.len())),
            None => ("", rest),
        };
        let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
        let port = host.rsplit_once(':').filter(|(before, _)| !before.contains('[') || before.ends_with(']')).map(|(_, port)| port);
        if port.is_some_and(|port| !port.bytes().all(|byte| byte.is_ascii_digit())) {
            return Err(wrong());
        }
        Ok(Url { scheme: scheme.unwrap_or_default().to_lowercase(), host: host.into(), path: path.into(), query: query.into() })
    }

    fn split_host(&self) -> (&str, &str) {
        let (host, port) = match self.host.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => (host, port),
            _ => (self.host.as_str(), ""),
        };
        (host.trim_matches(['[', ']']), port)
    }

    fn query(&self) -> Value {
        let mut values: BTreeMap<Key, Vec<Value>> = BTreeMap::new();
        for pair in self.query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            values.entry(Key::String(unescape(key).into())).or_default().push(unescape(value).into());
        }
        Value::Map(Arc::new(values.into_iter().map(|(key, list)| (key, list.into())).collect()))
    }
}

fn unescape(text: &str) -> String {
    let text = text.replace('+', " ");
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let code = after.get(..2).and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        match code.filter(|_| *first == b'%') {
            Some(byte) => {
                out.push(byte);
                rest = &after[2..];
            }
            None => {
                out.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn url(value: &Value) -> Result<&Url, Error> {
    value.downcast().ok_or_else(Error::no_overload)
}

pub const URLS: Library = &[
    ("url(string) -> kubernetes.URL", |a| Url::parse(text(&a[0])).map(Value::opaque)),
    ("isURL(string) -> bool", |a| Ok(Url::parse(text(&a[0])).is_ok().into())),
    ("kubernetes.URL.getScheme() -> string", |a| Ok(url(&a[0])?.scheme.as_str().into())),
    ("kubernetes.URL.getHost() -> string", |a| Ok(url(&a[0])?.host.as_str().into())),
    ("kubernetes.URL.getHostname() -> string", |a| Ok(url(&a[0])?.split_host().0.into())),
    ("kubernetes.URL.getPort() -> string", |a| Ok(url(&a[0])?.split_host().1.into())),
    ("kubernetes.URL.getEscapedPath() -> string", |a| Ok(url(&a[0])?.path.as_str().into())),
    ("kubernetes.URL.getQuery() -> map(string, list(string))", |a| Ok(url(&a[0])?.query())),
];
