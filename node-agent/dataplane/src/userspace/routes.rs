//! Service addresses made local to the node, by routes of a protocol number of their own.
use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use netlink_sys::constants::NETLINK_ROUTE;
use outrigger_desired::Family;

use crate::netlink::{self, Attributes, Builder, Connection};

/// Marks our routes in the kernel; not in use by any known routing program.
const PROTOCOL: u8 = 79;
const NEW_ROUTE: u16 = 24;
const DELETE_ROUTE: u16 = 25;
const GET_ROUTE: u16 = 26;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const LOOPBACK_INDEX: u32 = 1;

pub(super) struct Routes {
    connection: Mutex<Connection>,
    held: Mutex<HashMap<IpAddr, u32>>,
    /// Left by a former agent, and not held yet.
    found: Mutex<HashSet<IpAddr>>,
}

/// Keeps an address local for as long as it lives.
pub(super) struct Lease {
    routes: Arc<Routes>,
    ip: IpAddr,
}

impl Routes {
    pub fn open() -> io::Result<Self> {
        Ok(Self { connection: Mutex::new(Connection::open(NETLINK_ROUTE)?), held: Mutex::default(), found: Mutex::default() })
    }

    /// Finds what a former agent left; returns how many.
    pub fn restore(&self) -> io::Result<usize> {
        let mut found = HashSet::new();
        for family in Family::ALL {
            let mut builder = Builder::default();
            builder.begin(GET_ROUTE, netlink::DUMP, &header(family, 0, 0));
            builder.end();
            let take = |message: netlink::Message<'_>| found.extend(read(message.body));
            lock(&self.connection).dump(&builder.take(), take)?;
        }
        let count = found.len();
        *lock(&self.found) = found;
        Ok(count)
    }

    /// Deletes what was found and isn't held.
    pub fn prune(&self) -> io::Result<()> {
        let found = std::mem::take(&mut *lock(&self.found));
        found.into_iter().filter(|ip| !lock(&self.held).contains_key(ip)).try_for_each(|ip| self.change(DELETE_ROUTE, ip))
    }

    pub fn hold(self: &Arc<Self>, ip: IpAddr) -> io::Result<Lease> {
        let mut held = lock(&self.held);
        if !held.contains_key(&ip) {
            self.change(NEW_ROUTE, ip)?;
        }
        *held.entry(ip).or_default() += 1;
        Ok(Lease { routes: self.clone(), ip })
    }

    fn change(&self, kind: u16, ip: IpAddr) -> io::Result<()> {
        let flags = netlink::ACK | if kind == NEW_ROUTE { netlink::CREATE | netlink::REPLACE } else { 0 };
        let mut builder = Builder::default();
        let (bits, octets) = match ip {
            IpAddr::V4(ip) => (32, ip.octets().to_vec()),
            IpAddr::V6(ip) => (128, ip.octets().to_vec()),
        };
        builder.begin(kind, flags, &header(Family::of(ip), bits, PROTOCOL));
        builder.attribute(RTA_DST, &octets);
        builder.attribute(RTA_OIF, &LOOPBACK_INDEX.to_ne_bytes());
        builder.end();
        match lock(&self.connection).request(&builder.take()) {
            // Gone already, with the interface or by somebody's hand.
            Err(error) if kind == DELETE_ROUTE && error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            outcome => outcome,
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut held = lock(&self.routes.held);
        let Some(users) = held.get_mut(&self.ip) else { return };
        *users -= 1;
        if *users == 0 {
            held.remove(&self.ip);
            if let Err(error) = self.routes.change(DELETE_ROUTE, self.ip) {
                tracing::warn!(ip = %self.ip, %error, "the route of a Service's address stays");
            }
        }
    }
}

/// `struct rtmsg`: a route of type local in table local, with scope host.
fn header(family: Family, bits: u8, protocol: u8) -> [u8; 12] {
    let family = match family {
        Family::V4 => libc::AF_INET,
        Family::V6 => libc::AF_INET6,
    };
    [family as u8, bits, 0, 0, libc::RT_TABLE_LOCAL, protocol, libc::RT_SCOPE_HOST, libc::RTN_LOCAL, 0, 0, 0, 0]
}

/// The address of one of our routes.
fn read(body: &[u8]) -> Option<IpAddr> {
    if *body.get(5)? != PROTOCOL {
        return None;
    }
    let address = Attributes(body.get(12..)?).find(|attribute| attribute.kind == RTA_DST)?;
    match address.value.len() {
        4 => address.value.first_chunk::<4>().map(|octets| Ipv4Addr::from(*octets).into()),
        16 => address.value.first_chunk::<16>().map(|octets| Ipv6Addr::from(*octets).into()),
        _ => None,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
