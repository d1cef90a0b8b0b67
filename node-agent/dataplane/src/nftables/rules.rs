//! The rules that translate, as expressions of the kernel's machine.
//!
//! Registers are words of four bytes. A rule loads what the connection dials and a slot by chance, and looks the endpoint up by both;
//! where a lookup finds nothing the rule is over and the next one is tried.
use outrigger_desired::Family;

use super::ops::{By, Chain, Fact, Rule, Set, first_slot};
use crate::netlink::Builder;

const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const LIST_ELEMENT: u16 = 1;
const DATA_VALUE: u16 = 1;

/// The first of the words (NFT_REG32_00); the frontend is loaded there.
const KEY: u32 = 8;
/// An endpoint, or its number.
const ENDPOINT: u32 = KEY + 10;
/// A client, and behind it the frontend.
const CLIENT: u32 = KEY;

const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
const META_PRIORITY: u32 = 2;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;
const RANDOM: u32 = 1;
const DNAT: u32 = 1;
const DYNSET_UPDATE: u32 = 1;
const DYNSET_DELETE: u32 = 2;

pub(super) fn expressions(list: &mut Builder, chain: Chain, rule: Rule) {
    let mut program = Program { list, chain };
    program.only_family();
    match rule {
        Rule::Spread { slots } => {
            let slot = program.load_frontend(KEY);
            program.random(slot, slots);
            program.lookup(chain.set(Fact::Endpoints), KEY, Some(ENDPOINT));
        }
        Rule::Recall { seconds } => {
            program.sticks(seconds);
            program.load_client();
            program.lookup(chain.set(Fact::Affinity), CLIENT, Some(ENDPOINT));
            program.keep_number();
            program.resolve();
            program.remember(seconds, &[DYNSET_UPDATE]);
            program.resolve();
        }
        Rule::Stick { seconds, slots } => {
            program.sticks(seconds);
            let slot = program.load_frontend(KEY);
            program.random(slot, slots);
            program.lookup(chain.set(Fact::Choices), KEY, Some(ENDPOINT));
            program.keep_number();
            // Updating would leave an endpoint that is gone in its place.
            program.remember(seconds, &[DYNSET_DELETE, DYNSET_UPDATE]);
            program.resolve();
        }
    }
    program.translate();
}

struct Program<'a> {
    list: &'a mut Builder,
    chain: Chain,
}

impl Program<'_> {
    fn expression(&mut self, name: &str, data: impl FnOnce(&mut Builder)) {
        self.list.nest(LIST_ELEMENT, |expression| {
            expression.text(EXPRESSION_NAME, name);
            expression.nest(EXPRESSION_DATA, data);
        });
    }

    /// An expression whose data is numbers.
    fn numbers(&mut self, name: &str, numbers: &[(u16, u32)]) {
        self.expression(name, |data| numbers.iter().for_each(|(kind, value)| data.attribute(*kind, &value.to_be_bytes())));
    }

    fn is_v4(&self) -> bool {
        self.chain.family == Family::V4
    }

    fn address_words(&self) -> u32 {
        if self.is_v4() { 1 } else { 4 }
    }

    fn protocol_family(&self) -> libc::c_int {
        if self.is_v4() { libc::NFPROTO_IPV4 } else { libc::NFPROTO_IPV6 }
    }

    /// The way to the chain says so already; this tells it to those who list the rule.
    fn only_family(&mut self) {
        self.numbers("meta", &[(1, KEY), (2, META_NFPROTO)]);
        let family = self.protocol_family() as u8;
        self.expression("cmp", |data| {
            data.attribute(1, &KEY.to_be_bytes());
            data.attribute(2, &0_u32.to_be_bytes());
            data.nest(3, |value| value.attribute(DATA_VALUE, &[family]));
        });
    }

    fn lookup(&mut self, set: Set, key: u32, value: Option<u32>) {
        let name = set.name(self.chain.family);
        self.expression("lookup", |data| {
            data.text(1, &name);
            data.attribute(2, &key.to_be_bytes());
            if let Some(value) = value {
                data.attribute(3, &value.to_be_bytes());
            }
        });
    }

    /// What is dialled; returns the word behind it.
    fn load_frontend(&mut self, mut register: u32) -> u32 {
        if self.chain.by == By::Address {
            let (offset, length) = if self.is_v4() { (16, 4) } else { (24, 16) };
            self.numbers("payload", &[(1, register), (2, NETWORK_HEADER), (3, offset), (4, length)]);
            register += self.address_words();
        }
        self.numbers("meta", &[(1, register), (2, META_L4PROTO)]);
        self.numbers("payload", &[(1, register + 1), (2, TRANSPORT_HEADER), (3, 2), (4, 2)]);
        register + 2
    }

    fn random(&mut self, register: u32, slots: u32) {
        self.numbers("numgen", &[(1, register), (2, slots), (3, RANDOM), (4, first_slot(slots))]);
    }

    /// Goes on when the frontend's clients stick for so many seconds.
    fn sticks(&mut self, seconds: u32) {
        let register = self.load_frontend(KEY);
        self.expression("immediate", |data| {
            data.attribute(1, &register.to_be_bytes());
            data.nest(2, |value| value.attribute(DATA_VALUE, &seconds.to_ne_bytes()));
        });
        self.lookup(self.chain.set(Fact::Sticky), KEY, None);
    }

    fn load_client(&mut self) {
        let (offset, length) = if self.is_v4() { (12, 4) } else { (8, 16) };
        self.numbers("payload", &[(1, CLIENT), (2, NETWORK_HEADER), (3, offset), (4, length)]);
        self.load_frontend(CLIENT + self.address_words());
    }

    /// The endpoint's number waits in the packet's priority. A register would do, but nft (1.0.6) can't list rules that use what a map
    /// gave as part of a key; forwarding sets the priority anew, and only a connection's first packet comes here.
    fn keep_number(&mut self) {
        self.numbers("meta", &[(2, META_PRIORITY), (3, ENDPOINT)]);
    }

    fn resolve(&mut self) {
        self.numbers("meta", &[(1, ENDPOINT), (2, META_PRIORITY)]);
        self.lookup(Set::Numbered, ENDPOINT, Some(ENDPOINT));
    }

    fn remember(&mut self, seconds: u32, steps: &[u32]) {
        self.load_client();
        self.numbers("meta", &[(1, ENDPOINT), (2, META_PRIORITY)]);
        let name = self.chain.set(Fact::Affinity).name(self.chain.family);
        for step in steps {
            self.expression("dynset", |data| {
                data.text(1, &name);
                for (kind, value) in [(3, *step), (4, CLIENT), (5, ENDPOINT)] {
                    data.attribute(kind, &value.to_be_bytes());
                }
                if *step == DYNSET_UPDATE {
                    data.attribute(6, &(u64::from(seconds) * 1000).to_be_bytes());
                }
            });
        }
    }

    fn translate(&mut self) {
        let (family, port) = (self.protocol_family() as u32, ENDPOINT + self.address_words());
        self.numbers("nat", &[(1, DNAT), (2, family), (3, ENDPOINT), (5, port)]);
    }
}
