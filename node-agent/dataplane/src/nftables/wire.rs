//! Steps as the kernel takes them: nf_tables messages in a batch, which takes effect as a whole or not at all.
//!
//! nft the program would read names of all chains and sets before each transaction, and can't express all that is needed here.
use std::net::IpAddr;

use outrigger_desired::Family;

use super::ops::{Chain, Dial, Element, Key, Op, Rule, Set, Value};
use super::rules::expressions;
use crate::netlink::{self, Builder};

const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
/// NFNL_SUBSYS_NFTABLES.
const SUBSYSTEM: u16 = 10;
const NEW_TABLE: u16 = SUBSYSTEM << 8;
const DELETE_TABLE: u16 = SUBSYSTEM << 8 | 2;
const NEW_RULE: u16 = SUBSYSTEM << 8 | 6;
const NEW_ELEMENT: u16 = SUBSYSTEM << 8 | 12;
const DELETE_ELEMENT: u16 = SUBSYSTEM << 8 | 14;
const APPEND: u16 = 0x800;

const TABLE_NAME: u16 = 1;
const TABLE_FLAGS: u16 = 2;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const LIST_TABLE: u16 = 1;
const LIST_SET: u16 = 2;
const LIST_ELEMENTS: u16 = 3;
const LIST_ELEMENT: u16 = 1;
const ELEMENT_KEY: u16 = 1;
const ELEMENT_DATA: u16 = 2;
const ELEMENT_KEY_END: u16 = 10;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
const VERDICT_CHAIN: u16 = 2;
const GOTO: i32 = -4;
/// A list of elements is one attribute, whose length has 16 bits.
const LIST_LIMIT: usize = 60_000;

/// NFPROTO_INET, or none for the ends of a batch; the subsystem in network byte order.
fn header(family: u8, subsystem: u16) -> [u8; 4] {
    let [high, low] = subsystem.to_be_bytes();
    [family, 0, high, low]
}

/// Steps of one transaction in the making.
pub(super) struct Batch {
    builder: Builder,
    table: String,
}

impl Batch {
    pub fn new(table: &str) -> Self {
        let mut builder = Builder::default();
        builder.begin(BATCH_BEGIN, 0, &header(0, SUBSYSTEM));
        builder.end();
        Self { builder, table: table.into() }
    }

    pub fn push(&mut self, ops: &[Op]) {
        let mut rest = ops;
        while let Some(first) = rest.first() {
            rest = match first {
                Op::AddRule(family, rule) => {
                    self.rule(*family, *rule);
                    &rest[1..]
                }
                Op::Add(element) | Op::Delete(element) => {
                    let kind = if matches!(first, Op::Add(_)) { NEW_ELEMENT } else { DELETE_ELEMENT };
                    self.elements(kind, element.set, element.family, rest)
                }
            };
        }
    }

    /// As many elements of one set as come in a row and fit; returns the others.
    fn elements<'a>(&mut self, kind: u16, set: Set, family: Family, ops: &'a [Op]) -> &'a [Op] {
        let flags = if kind == NEW_ELEMENT { netlink::CREATE } else { 0 };
        self.builder.begin(kind, flags, &header(libc::NFPROTO_INET as u8, 0));
        self.builder.text(LIST_TABLE, &self.table);
        self.builder.text(LIST_SET, &set.name(family));
        let mut taken = 0;
        self.builder.nest(LIST_ELEMENTS, |list| {
            let start = list.len();
            for op in ops {
                let element = match op {
                    Op::Add(element) if kind == NEW_ELEMENT => element,
                    Op::Delete(element) if kind == DELETE_ELEMENT => element,
                    _ => break,
                };
                if (element.set, element.family) != (set, family) || list.len() - start > LIST_LIMIT {
                    break;
                }
                list.nest(LIST_ELEMENT, |body| write_element(body, element, kind == NEW_ELEMENT));
                taken += 1;
            }
        });
        self.builder.end();
        &ops[taken..]
    }

    fn rule(&mut self, family: Family, rule: Rule) {
        for chain in Chain::all(family) {
            self.builder.begin(NEW_RULE, netlink::CREATE | APPEND, &header(libc::NFPROTO_INET as u8, 0));
            self.builder.text(RULE_TABLE, &self.table);
            self.builder.text(RULE_CHAIN, &chain.name());
            self.builder.nest(RULE_EXPRESSIONS, |list| expressions(list, chain, rule));
            self.builder.end();
        }
    }

    /// The table takes effect.
    pub fn wake(&mut self) {
        self.builder.begin(NEW_TABLE, 0, &header(libc::NFPROTO_INET as u8, 0));
        self.builder.text(TABLE_NAME, &self.table);
        self.builder.attribute(TABLE_FLAGS, &0_u32.to_be_bytes());
        self.builder.end();
    }

    pub fn delete_table(&mut self, name: &str) {
        self.builder.begin(DELETE_TABLE, 0, &header(libc::NFPROTO_INET as u8, 0));
        self.builder.text(TABLE_NAME, name);
        self.builder.end();
    }

    /// The bytes to send; the last step before the batch's end asks for an acknowledgement.
    pub fn finish(mut self) -> Vec<u8> {
        self.builder.ask();
        self.builder.begin(BATCH_END, 0, &header(0, SUBSYSTEM));
        self.builder.end();
        self.builder.take()
    }
}

fn write_element(body: &mut Builder, element: &Element, add: bool) {
    let (first, last) = key(&element.key);
    body.nest(ELEMENT_KEY, |key| key.attribute(DATA_VALUE, &first));
    if let Some(last) = last {
        body.nest(ELEMENT_KEY_END, |key| key.attribute(DATA_VALUE, &last));
    }
    let Some(value) = element.value.filter(|_| add) else { return };
    body.nest(ELEMENT_DATA, |data| match value {
        Value::Goto(chain) => goto(data, chain),
        Value::Endpoint(address, port_number) => {
            let mut bytes = ip(address);
            bytes.extend(port(port_number));
            data.attribute(DATA_VALUE, &bytes);
        }
        Value::Number(number) => data.attribute(DATA_VALUE, &number.to_ne_bytes()),
    });
}

fn goto(data: &mut Builder, chain: &str) {
    data.nest(DATA_VERDICT, |verdict| {
        verdict.attribute(VERDICT_CODE, &GOTO.to_be_bytes());
        verdict.text(VERDICT_CHAIN, chain);
    });
}

/// The key as it lies in registers: each part fills whole words. The second is the end of an interval.
fn key(key: &Key) -> (Vec<u8>, Option<Vec<u8>>) {
    let bytes = match *key {
        Key::Ip(address) => ip(address),
        Key::Twice(address) => ip(address).repeat(2),
        Key::Frontend(dial) => frontend(dial),
        Key::With(dial, number) => [&frontend(dial)[..], &number.to_ne_bytes()].concat(),
        Key::Allowed(dial, net) => {
            let with = |address| [frontend(dial), ip(address)].concat();
            return (with(net.network()), Some(with(net.broadcast())));
        }
        Key::Number(number) => number.to_ne_bytes().to_vec(),
    };
    (bytes, None)
}

fn frontend(dial: Dial) -> Vec<u8> {
    let mut bytes = dial.ip.map(ip).unwrap_or_default();
    bytes.extend([dial.protocol.number(), 0, 0, 0]);
    bytes.extend(port(dial.port));
    bytes
}

fn ip(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn port(port: u16) -> [u8; 4] {
    let [high, low] = port.to_be_bytes();
    [high, low, 0, 0]
}
