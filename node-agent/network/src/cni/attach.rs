//! One pod's interface in the kernel: a veth pair, made with its far end already in the pod's namespace.
//!
//! The pod has its address as /32 (or /128) and one gateway that is the same on every node; the host has a route to
//! exactly that address. Neighbour entries are permanent on both ends, so no packet waits for ARP and nothing in
//! the pod can answer for somebody else's address.
use std::collections::HashSet;
use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::path::Path;

use futures::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags};
use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkAttribute, LinkMessage};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope};
use rtnetlink::{Handle, LinkUnspec, LinkVeth, RouteMessageBuilder};

use super::message::{self, Error, Interface, Result, Version};
use crate::ipam::Owner;
use crate::netns;

/// The pods' gateway: a link-local address that nothing owns.
const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The host end's MAC, the same everywhere: each veth is a link of its own, so it meets no other.
const HOST_MAC: [u8; 6] = [0xee; 6];
/// The link-local address that the kernel derives from [`HOST_MAC`] (EUI-64).
const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0xecee, 0xeeff, 0xfeee, 0xeeee);
/// Marks the host's routes to pods as ours (`ip route show proto 151`); see `routes.rs` for the other number.
pub const POD_ROUTE_PROTOCOL: u8 = 151;
const DEFAULT_MTU: u32 = 1500;

/// Everything that ADD makes and CHECK looks for.
pub struct Plan {
    pub host_interface: String,
    interface: String,
    addresses: Vec<IpAddr>,
    pod_mac: [u8; 6],
    mtu: u32,
}

impl Plan {
    /// `mtu` 0 stands for Ethernet's.
    pub fn new(owner: &Owner, addresses: Vec<IpAddr>, mtu: u32) -> Self {
        let host_interface = host_interface(owner);
        let pod_mac = pod_mac(&addresses, &host_interface);
        let mtu = if mtu == 0 { DEFAULT_MTU } else { mtu };
        Self { host_interface, interface: owner.interface.clone(), addresses, pod_mac, mtu }
    }

    pub fn result(&self, version: Version, namespace: &Path) -> serde_json::Value {
        let sandbox = namespace.to_string_lossy();
        let interfaces = [
            Interface { name: &self.host_interface, mac: mac_text(HOST_MAC), mtu: self.mtu, sandbox: None },
            Interface { name: &self.interface, mac: mac_text(self.pod_mac), mtu: self.mtu, sandbox: Some(&sandbox) },
        ];
        let addresses: Vec<(IpNet, Option<IpAddr>)> =
            self.addresses.iter().map(|address| (IpNet::from(*address), Some(gateway(*address)))).collect();
        message::result(version, &interfaces, &addresses)
    }
}

/// The host end's name, from its owner alone: DEL finds it with no memory of ADD.
pub fn host_interface(owner: &Owner) -> String {
    // FNV-1a: names need no secrecy, only to be the same in every release.
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for byte in owner.container_id.bytes().chain([0]).chain(owner.interface.bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    format!("veth{:011x}", hash & 0xfff_ffff_ffff)
}

/// From the v4 address, so that a neighbour entry left over elsewhere stays right; else from the interface's name.
fn pod_mac(addresses: &[IpAddr], host_interface: &str) -> [u8; 6] {
    let v4 = addresses.iter().find_map(|address| match address {
        IpAddr::V4(address) => Some(address.octets()),
        IpAddr::V6(_) => None,
    });
    let tail = v4.unwrap_or_else(|| {
        let number = u64::from_str_radix(host_interface.trim_start_matches("veth"), 16).unwrap_or_default();
        [(number >> 24) as u8, (number >> 16) as u8, (number >> 8) as u8, number as u8]
    });
    [0x0a, 0x58, tail[0], tail[1], tail[2], tail[3]]
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn gateway(address: IpAddr) -> IpAddr {
    if address.is_ipv4() { GATEWAY_V4.into() } else { GATEWAY_V6.into() }
}

/// A netlink handle of the calling thread's namespace; needs a running tokio runtime.
pub fn netlink() -> Result<Handle> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    tokio::spawn(connection);
    Ok(handle)
}

/// Makes the pair and sets both ends up. Nothing passes before the host's end is up, and that waits for `admit`.
pub fn connect(plan: &Plan, namespace: &Path, admit: impl FnOnce() -> Result<()>) -> Result<()> {
    let namespace = File::open(namespace).map_err(|error| {
        Error::new(message::INVALID_ENVIRONMENT, format!("failed to open netns {:?}: {error}", namespace.display()), "")
    })?;
    netns::block_on(make_pair(plan, &namespace))??;
    netns::within_file(&namespace, || netns::block_on(set_up_pod_end(plan)))??;
    admit()?;
    netns::block_on(set_up_host_end(plan))??;
    Ok(())
}

async fn make_pair(plan: &Plan, namespace: &File) -> Result<()> {
    let handle = netlink()?;
    let mut request = add_pair(&handle, plan, namespace).execute().await;
    if is(&request, libc::EEXIST) {
        // Left by an ADD that died: its far end may be in a namespace that is gone.
        delete_link(&plan.host_interface).await?;
        request = add_pair(&handle, plan, namespace).execute().await;
    }
    request.map_err(|error| Error::kernel(format!("make the pair {} - {}", plan.host_interface, plan.interface), text(error)))
}

fn add_pair(handle: &Handle, plan: &Plan, namespace: &File) -> rtnetlink::LinkAddRequest {
    let peer = rtnetlink::LinkMessageBuilder::<LinkUnspec>::new()
        .name(plan.interface.clone())
        .mtu(plan.mtu)
        .address(plan.pod_mac.to_vec())
        .setns_by_fd(namespace.as_raw_fd())
        .build();
    let pair = LinkVeth::new(&plan.host_interface, &plan.interface)
        .mtu(plan.mtu)
        .address(HOST_MAC.to_vec())
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
        .build();
    handle.link().add(pair)
}

async fn set_up_pod_end(plan: &Plan) -> Result<()> {
    let handle = netlink()?;
    bring_up(&handle, 1).await?;
    let index = link_index(&handle, &plan.interface).await?.ok_or_else(|| Error::kernel("find the pod's interface", &plan.interface))?;
    if plan.addresses.iter().any(IpAddr::is_ipv6) {
        write_sysctl(&format!("net/ipv6/conf/{}/accept_ra", plan.interface), "0")?;
        write_sysctl(&format!("net/ipv6/conf/{}/disable_ipv6", plan.interface), "0")?;
    }
    for address in &plan.addresses {
        add_address(&handle, index, *address).await?;
    }
    bring_up(&handle, index).await?;
    for address in &plan.addresses {
        let gateway = gateway(*address);
        add_neighbour(&handle, index, gateway, &HOST_MAC).await?;
        if gateway.is_ipv4() {
            add_route(&handle, host_route(gateway, index)).await?;
        }
        add_route(&handle, default_route(gateway, index)).await?;
    }
    Ok(())
}

async fn set_up_host_end(plan: &Plan) -> Result<()> {
    let handle = netlink()?;
    let index =
        link_index(&handle, &plan.host_interface).await?.ok_or_else(|| Error::kernel("find the host's interface", &plan.host_interface))?;
    // Strict reverse path: a pod can't send from an address that isn't routed to it.
    write_sysctl(&format!("net/ipv4/conf/{}/rp_filter", plan.host_interface), "1")?;
    write_sysctl(&format!("net/ipv4/conf/{}/forwarding", plan.host_interface), "1")?;
    if plan.addresses.iter().any(IpAddr::is_ipv6) {
        write_sysctl(&format!("net/ipv6/conf/{}/accept_ra", plan.host_interface), "0")?;
        write_sysctl(&format!("net/ipv6/conf/{}/accept_dad", plan.host_interface), "0")?;
    }
    bring_up(&handle, index).await?;
    for address in &plan.addresses {
        add_neighbour(&handle, index, *address, &plan.pod_mac).await?;
        let mut route = host_route(*address, index);
        route.header.protocol = RouteProtocol::Other(POD_ROUTE_PROTOCOL);
        add_route(&handle, route).await?;
    }
    Ok(())
}

async fn bring_up(handle: &Handle, index: u32) -> Result<()> {
    let message = rtnetlink::LinkMessageBuilder::<LinkUnspec>::new().index(index).up().build();
    handle.link().set(message).execute().await.map_err(|error| Error::kernel(format!("bring up link {index}"), text(error)))
}

async fn add_address(handle: &Handle, index: u32, address: IpAddr) -> Result<()> {
    let mut request = handle.address().add(index, address, IpNet::from(address).prefix_len());
    if address.is_ipv6() {
        // Addresses come from our own store: waiting a second for duplicates would only delay the pod.
        request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    request.execute().await.map_err(|error| Error::kernel(format!("add the address {address}"), text(error)))
}

async fn add_neighbour(handle: &Handle, index: u32, address: IpAddr, mac: &[u8; 6]) -> Result<()> {
    let request = handle.neighbours().add(index, address).link_layer_address(mac).replace();
    request.execute().await.map_err(|error| Error::kernel(format!("add the neighbour {address}"), text(error)))
}

async fn add_route(handle: &Handle, route: RouteMessage) -> Result<()> {
    handle.route().add(route).replace().execute().await.map_err(|error| Error::kernel("add a route", text(error)))
}

/// A route to one address that is right behind the link.
fn host_route(address: IpAddr, index: u32) -> RouteMessage {
    match address {
        IpAddr::V4(address) => {
            RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(address, 32).output_interface(index).scope(RouteScope::Link).build()
        }
        IpAddr::V6(address) => RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(address, 128).output_interface(index).build(),
    }
}

fn default_route(gateway: IpAddr, index: u32) -> RouteMessage {
    match gateway {
        IpAddr::V4(gateway) => RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).output_interface(index).build(),
        IpAddr::V6(gateway) => RouteMessageBuilder::<Ipv6Addr>::new().gateway(gateway).output_interface(index).build(),
    }
}

/// Removes the link if it is there; its far end goes with it, and routes and neighbours with both.
pub async fn delete_link(name: &str) -> Result<()> {
    let handle = netlink()?;
    let Some(index) = link_index(&handle, name).await? else { return Ok(()) };
    let result = handle.link().del(index).execute().await;
    if is(&result, libc::ENODEV) {
        return Ok(());
    }
    result.map_err(|error| Error::kernel(format!("delete the link {name}"), text(error)))
}

pub async fn link_index(handle: &Handle, name: &str) -> Result<Option<u32>> {
    let found = handle.link().get().match_name(name).execute().try_next().await;
    if is(&found, libc::ENODEV) {
        return Ok(None);
    }
    let found = found.map_err(|error| Error::kernel(format!("look up the link {name}"), text(error)))?;
    Ok(found.map(|link| link.header.index))
}

/// The names of all links in the current namespace.
pub async fn link_names() -> Result<HashSet<String>> {
    let handle = netlink()?;
    let links: Vec<LinkMessage> =
        handle.link().get().execute().try_collect().await.map_err(|error| Error::kernel("list the links", text(error)))?;
    Ok(links.iter().filter_map(link_name).collect())
}

fn link_name(link: &LinkMessage) -> Option<String> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    })
}

/// Brings up the namespace's `lo`.
pub fn raise_loopback(namespace: &Path) -> Result<()> {
    netns::within(namespace, || netns::block_on(async { bring_up(&netlink()?, 1).await }))??;
    Ok(())
}

pub fn loopback_result(version: Version, namespace: &Path) -> serde_json::Value {
    let sandbox = namespace.to_string_lossy();
    let interface = Interface { name: "lo", mac: mac_text([0; 6]), mtu: 65536, sandbox: Some(&sandbox) };
    let address = |address: IpAddr, length| IpNet::new(address, length).map(|net| (net, None));
    let addresses: Vec<_> =
        [address(Ipv4Addr::LOCALHOST.into(), 8), address(Ipv6Addr::LOCALHOST.into(), 128)].into_iter().flatten().collect();
    message::result(version, &[interface], &addresses)
}

/// CHECK: the interface, its addresses and the default routes in the pod, and the routes to it on the host.
pub fn verify(plan: &Plan, namespace: &Path) -> Result<()> {
    netns::within(namespace, || netns::block_on(verify_pod_end(plan)))??;
    netns::block_on(verify_host_end(plan))?
}

async fn verify_pod_end(plan: &Plan) -> Result<()> {
    let handle = netlink()?;
    let index =
        link_index(&handle, &plan.interface).await?.ok_or_else(|| Error::check(format!("the pod has no interface {}", plan.interface)))?;
    let present: Vec<_> = handle
        .address()
        .get()
        .set_link_index_filter(index)
        .execute()
        .try_collect::<Vec<_>>()
        .await
        .map_err(|error| Error::kernel("list the addresses", text(error)))?
        .into_iter()
        .flat_map(|message| message.attributes)
        .collect();
    for address in &plan.addresses {
        let has = present.iter().any(|attribute| matches!(attribute, AddressAttribute::Address(found) if found == address));
        if !has {
            return Err(Error::check(format!("the pod's {} lacks the address {address}", plan.interface)));
        }
        let gateway = gateway(*address);
        let routes = routes(&handle, default_route(gateway, index)).await?;
        if !routes.iter().any(|route| route.header.destination_prefix_length == 0 && goes_by(route, gateway)) {
            return Err(Error::check(format!("the pod lacks the default route by {gateway}")));
        }
    }
    Ok(())
}

async fn verify_host_end(plan: &Plan) -> Result<()> {
    let handle = netlink()?;
    let index = link_index(&handle, &plan.host_interface)
        .await?
        .ok_or_else(|| Error::check(format!("the host has no interface {}", plan.host_interface)))?;
    for address in &plan.addresses {
        let wanted = host_route(*address, index);
        let present = routes(&handle, wanted.clone()).await?.iter().any(|route| {
            route.header.destination_prefix_length == wanted.header.destination_prefix_length
                && wanted.attributes.iter().all(|attribute| route.attributes.contains(attribute))
        });
        if !present {
            return Err(Error::check(format!("the host lacks the route to {address} by {}", plan.host_interface)));
        }
    }
    Ok(())
}

/// All routes of the message's family.
async fn routes(handle: &Handle, like: RouteMessage) -> Result<Vec<RouteMessage>> {
    let mut filter = RouteMessage::default();
    filter.header.address_family = like.header.address_family;
    handle.route().get(filter).execute().try_collect().await.map_err(|error| Error::kernel("list the routes", text(error)))
}

fn goes_by(route: &RouteMessage, gateway: IpAddr) -> bool {
    let gateway = match gateway {
        IpAddr::V4(address) => RouteAddress::Inet(address),
        IpAddr::V6(address) => RouteAddress::Inet6(address),
    };
    route.attributes.contains(&RouteAttribute::Gateway(gateway))
}

/// Writes a setting of the calling thread's network namespace; one that this kernel lacks is left alone.
pub fn write_sysctl(name: &str, value: &str) -> Result<()> {
    // The kernel resolves `/proc/sys/net` by the task that opens it, so a thread gets its own namespace's.
    let path = format!("/proc/sys/{name}");
    match fs::read_to_string(&path) {
        Ok(current) if current.trim() == value => Ok(()),
        Ok(_) => fs::write(&path, value).map_err(|error| Error::kernel(format!("set {name}"), error)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::kernel(format!("read {name}"), error)),
    }
}

/// Whether the kernel refused with this error number.
pub fn is<T>(result: &std::result::Result<T, rtnetlink::Error>, errno: i32) -> bool {
    matches!(result, Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -errno)
}

/// The kernel's own words where there are any.
pub fn text(error: rtnetlink::Error) -> String {
    match error {
        rtnetlink::Error::NetlinkError(error) => error.to_io().to_string(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_addresses_follow_from_the_owner() {
        let plan = Plan::new(&Owner::new("0123abc", "eth0"), vec!["10.244.1.5".parse().unwrap()], 0);
        assert_eq!(plan.host_interface, host_interface(&Owner::new("0123abc", "eth0")));
        assert_eq!(plan.host_interface.len(), 15);
        assert_ne!(plan.host_interface, host_interface(&Owner::new("0123abc", "eth1")));
        assert_eq!((mac_text(plan.pod_mac), plan.mtu), ("0a:58:0a:f4:01:05".to_owned(), 1500));
    }
}
