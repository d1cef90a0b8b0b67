//! Routes to the other nodes' pods, kept by comparing with the kernel: only routes that carry our protocol number are
//! ever touched.
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteType};
use rtnetlink::{Handle, RouteMessageBuilder};

use crate::cni::attach;
use crate::cni::message::{Error, Result};

/// `ip route show proto 150`.
const PROTOCOL: RouteProtocol = RouteProtocol::Other(150);

/// What a destination gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    Via(IpAddr),
    /// The own pods' range: an address without a pod is refused at once, instead of leaving by the default route.
    Unreachable,
}

pub type Table = BTreeMap<IpNet, Target>;

/// One change to make in the kernel.
#[derive(Debug, PartialEq, Eq)]
enum Change {
    Set(IpNet, Target),
    Remove(IpNet),
}

/// What the table should hold.
pub fn desired(own_cidrs: &[IpNet], others: &BTreeMap<IpNet, IpAddr>) -> Table {
    let mut table: Table = others.iter().map(|(cidr, via)| (*cidr, Target::Via(*via))).collect();
    table.extend(own_cidrs.iter().map(|cidr| (cidr.trunc(), Target::Unreachable)));
    table
}

fn diff(present: &Table, desired: &Table) -> Vec<Change> {
    let gone = present.keys().filter(|cidr| !desired.contains_key(cidr)).map(|cidr| Change::Remove(*cidr));
    let set = desired.iter().filter(|(cidr, target)| present.get(cidr) != Some(target)).map(|(cidr, target)| Change::Set(*cidr, *target));
    gone.chain(set).collect()
}

/// Makes the kernel's table equal to `desired`; returns how many routes changed. All that can be set is set before
/// the first error is returned.
pub async fn sync(desired: &Table) -> Result<usize> {
    let handle = attach::netlink()?;
    let changes = diff(&read(&handle).await?, desired);
    let mut failure = None;
    for change in &changes {
        if let Err(error) = apply(&handle, change).await {
            failure.get_or_insert(error);
        }
    }
    failure.map_or(Ok(changes.len()), Err)
}

async fn apply(handle: &Handle, change: &Change) -> Result<()> {
    match change {
        Change::Set(cidr, target) => {
            let request = handle.route().add(message(*cidr, Some(*target))).replace();
            request.execute().await.map_err(|error| Error::kernel(format!("route {cidr} {target:?}"), attach::text(error)))
        }
        Change::Remove(cidr) => {
            let result = handle.route().del(message(*cidr, None)).execute().await;
            if attach::is(&result, libc::ESRCH) {
                return Ok(());
            }
            result.map_err(|error| Error::kernel(format!("remove the route {cidr}"), attach::text(error)))
        }
    }
}

fn message(cidr: IpNet, target: Option<Target>) -> RouteMessage {
    let mut message = match cidr {
        IpNet::V4(cidr) => {
            let builder = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(cidr.network(), cidr.prefix_len()).protocol(PROTOCOL);
            match target {
                Some(Target::Via(IpAddr::V4(via))) => builder.gateway(via).build(),
                _ => builder.build(),
            }
        }
        IpNet::V6(cidr) => {
            let builder = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(cidr.network(), cidr.prefix_len()).protocol(PROTOCOL);
            match target {
                Some(Target::Via(IpAddr::V6(via))) => builder.gateway(via).build(),
                _ => builder.build(),
            }
        }
    };
    message.header.kind = match target {
        Some(Target::Via(_)) => RouteType::Unicast,
        Some(Target::Unreachable) => RouteType::Unreachable,
        // Removal matches by destination and protocol, whatever the kind.
        None => RouteType::Unspec,
    };
    if target.is_none() {
        message.header.scope = rtnetlink::packet_route::route::RouteScope::NoWhere;
    }
    message
}

/// Our routes in the kernel.
async fn read(handle: &Handle) -> Result<Table> {
    let mut table = Table::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut filter = RouteMessage::default();
        filter.header.address_family = family;
        let routes: Vec<RouteMessage> = handle
            .route()
            .get(filter)
            .execute()
            .try_collect()
            .await
            .map_err(|error| Error::kernel("list the routes", attach::text(error)))?;
        table.extend(routes.iter().filter(|route| route.header.protocol == PROTOCOL).filter_map(entry));
    }
    Ok(table)
}

fn entry(route: &RouteMessage) -> Option<(IpNet, Target)> {
    let address = |address: &RouteAddress| match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    };
    let mut destination = None;
    let mut via = None;
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(found) => destination = address(found),
            RouteAttribute::Gateway(found) => via = address(found),
            _ => {}
        }
    }
    let cidr = IpNet::new(destination?, route.header.destination_prefix_length).ok()?;
    Some((cidr, via.map_or(Target::Unreachable, Target::Via)))
}

/// The MTU of the link that carries one of `addresses`, or of the first link that is up and no loopback.
pub async fn uplink_mtu(addresses: &[IpAddr]) -> Result<u32> {
    let handle = attach::netlink()?;
    let carried: Vec<_> =
        handle.address().get().execute().try_collect().await.map_err(|error| Error::kernel("list the addresses", attach::text(error)))?;
    let carrier = carried.iter().find(|message| {
        message.attributes.iter().any(|attribute| {
            matches!(attribute, rtnetlink::packet_route::address::AddressAttribute::Address(found) if addresses.contains(found))
        })
    });
    let links: Vec<_> =
        handle.link().get().execute().try_collect().await.map_err(|error| Error::kernel("list the links", attach::text(error)))?;
    let wanted = carrier.map(|message| message.header.index);
    let link = links.iter().find(|link| wanted.map_or(link.header.index != 1, |wanted| link.header.index == wanted));
    let mtu = link.and_then(|link| {
        link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Mtu(mtu) => Some(*mtu),
            _ => None,
        })
    });
    // A node whose only address is on the loopback would hand 65536 to its pods.
    Ok(mtu.filter(|mtu| *mtu <= 9216).unwrap_or(1500))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_only_what_differs() {
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        let via = |text: &str| Target::Via(text.parse().unwrap());
        let present = Table::from([
            (net("10.0.1.0/24"), via("192.168.0.1")),
            (net("10.0.2.0/24"), via("192.168.0.2")),
            (net("10.0.3.0/24"), via("192.168.0.3")),
        ]);
        let others =
            BTreeMap::from([(net("10.0.1.0/24"), "192.168.0.1".parse().unwrap()), (net("10.0.2.0/24"), "192.168.0.9".parse().unwrap())]);
        let desired = desired(&[net("10.0.0.0/24")], &others);
        let expected = vec![
            Change::Remove(net("10.0.3.0/24")),
            Change::Set(net("10.0.0.0/24"), Target::Unreachable),
            Change::Set(net("10.0.2.0/24"), via("192.168.0.9")),
        ];
        assert_eq!(diff(&present, &desired), expected);
        assert_eq!(diff(&desired, &desired), vec![]);
    }
}
