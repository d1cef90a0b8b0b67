//! The little of netlink that the Service path speaks itself: messages built and read as bytes, one request at a time.
//!
//! Conntrack deletions and local routes are a few fixed shapes each; a general library would cost more than the shapes do,
//! and has none of the first.
use std::io;

use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt};

pub const REQUEST: u16 = 1;
pub const ACK: u16 = 4;
pub const REPLACE: u16 = 0x100;
pub const EXCLUSIVE: u16 = 0x200;
pub const CREATE: u16 = 0x400;
pub const DUMP: u16 = 0x300;

const ERROR: u16 = 2;
const DONE: u16 = 3;
const HEADER: usize = 16;
const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;

/// Builds one or more messages back to back.
#[derive(Debug, Default)]
pub struct Builder {
    bytes: Vec<u8>,
    message: usize,
    sequence: u32,
}

impl Builder {
    /// Begins a message; `family_header` is what the protocol has between the netlink header and the attributes.
    pub fn begin(&mut self, kind: u16, flags: u16, family_header: &[u8]) {
        self.message = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&(flags | REQUEST).to_ne_bytes());
        self.bytes.extend_from_slice(&self.sequence.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.sequence += 1;
        self.bytes.extend_from_slice(family_header);
    }

    pub fn end(&mut self) {
        let length = (self.bytes.len() - self.message) as u32;
        self.bytes[self.message..self.message + 4].copy_from_slice(&length.to_ne_bytes());
    }

    pub fn attribute(&mut self, kind: u16, value: &[u8]) {
        let length = (value.len() + 4) as u16;
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.pad();
    }

    pub fn text(&mut self, kind: u16, text: &str) {
        self.attribute(kind, &[text.as_bytes(), &[0]].concat());
    }

    /// An attribute made of attributes.
    pub fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes.extend_from_slice(&(kind | NESTED).to_ne_bytes());
        fill(self);
        let length = (self.bytes.len() - start) as u16;
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    }

    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Lets the message that was ended last ask for an acknowledgement.
    pub fn ask(&mut self) {
        let flags = &mut self.bytes[self.message + 6..self.message + 8];
        let asked = u16::from_ne_bytes([flags[0], flags[1]]) | ACK;
        flags.copy_from_slice(&asked.to_ne_bytes());
    }

    /// Attributes that have been built before, with their padding.
    pub fn raw(&mut self, attributes: &[u8]) {
        self.bytes.extend_from_slice(attributes);
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    pub fn take(&mut self) -> Vec<u8> {
        self.message = 0;
        std::mem::take(&mut self.bytes)
    }
}

pub struct Connection {
    socket: Socket,
}

impl Connection {
    pub fn open(protocol: isize) -> io::Result<Self> {
        let socket = Socket::new(protocol)?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket })
    }

    /// Hears what the kernel tells to these multicast groups (a bit each), and never waits for it.
    pub fn listen(protocol: isize, groups: u32) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind(&SocketAddr::new(0, groups))?;
        socket.set_non_blocking(true)?;
        Ok(Self { socket })
    }

    /// What has been told since; false when some of it was lost.
    pub fn heard(&self, mut take: impl FnMut(Message<'_>)) -> io::Result<bool> {
        let mut whole = true;
        loop {
            match self.socket.recv_from_full() {
                Ok((datagram, _)) => Messages(&datagram).for_each(&mut take),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(whole),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => whole = false,
                Err(error) => return Err(error),
            }
        }
    }

    /// Room for what comes between two looks; without the privilege for that the system's limit stays.
    pub fn allow_many_messages(&self) -> io::Result<()> {
        setsockopt(&self.socket, sockopt::RcvBufForce, &(1 << 22)).or_else(|error| match error {
            nix::errno::Errno::EPERM => Ok(()),
            other => Err(other.into()),
        })
    }

    /// One message that asks for an acknowledgement.
    pub fn request(&self, message: &[u8]) -> io::Result<()> {
        self.socket.send(message, 0)?;
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            for message in Messages(&datagram) {
                if message.kind == ERROR {
                    return message.error();
                }
            }
        }
    }

    /// Lets one message be as long as it likes; without the privilege for that the system's limit stays.
    pub fn allow_large_messages(&self) -> io::Result<()> {
        let size = libc::c_int::MAX / 4;
        setsockopt(&self.socket, sockopt::SndBufForce, &(size as usize)).or_else(|error| match error {
            nix::errno::Errno::EPERM => Ok(()),
            other => Err(other.into()),
        })
    }

    /// A batch whose last message asks for an acknowledgement. The kernel has worked it off, and answered, when it is sent.
    pub fn batch(&self, messages: &[u8]) -> io::Result<()> {
        self.socket.send(messages, 0)?;
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            if let Some(answer) = Messages(&datagram).find(|message| message.kind == ERROR) {
                let outcome = answer.error();
                // A failed batch has an answer for each message that failed.
                return if outcome.is_ok() { outcome } else { self.drain().and(outcome) };
            }
        }
    }

    /// Takes the answers that nobody waits for.
    fn drain(&self) -> io::Result<()> {
        self.socket.set_non_blocking(true)?;
        while self.socket.recv_from_full().is_ok() {}
        self.socket.set_non_blocking(false)
    }

    /// One message that asks for a dump; each answer's body goes to `take`.
    pub fn dump(&self, message: &[u8], mut take: impl FnMut(Message<'_>)) -> io::Result<()> {
        self.socket.send(message, 0)?;
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            for message in Messages(&datagram) {
                match message.kind {
                    DONE => return Ok(()),
                    ERROR => return message.error(),
                    _ => take(message),
                }
            }
        }
    }
}

pub struct Message<'a> {
    pub kind: u16,
    pub body: &'a [u8],
}

impl Message<'_> {
    /// The outcome that an error message carries; zero is an acknowledgement.
    pub fn error(&self) -> io::Result<()> {
        match self.body.first_chunk().map(|code| i32::from_ne_bytes(*code)) {
            Some(0) => Ok(()),
            Some(code) => Err(io::Error::from_raw_os_error(-code)),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// The messages of a datagram.
pub struct Messages<'a>(pub &'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        let length = u32::from_ne_bytes(*self.0.first_chunk()?) as usize;
        let kind = u16::from_ne_bytes(*self.0.get(4..)?.first_chunk()?);
        let body = self.0.get(HEADER..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Message { kind, body })
    }
}

pub struct Attribute<'a> {
    pub kind: u16,
    pub value: &'a [u8],
    /// With header and padding.
    pub whole: &'a [u8],
}

pub struct Attributes<'a>(pub &'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = Attribute<'a>;

    fn next(&mut self) -> Option<Attribute<'a>> {
        let length = usize::from(u16::from_ne_bytes(*self.0.first_chunk()?));
        let kind = u16::from_ne_bytes(*self.0.get(2..)?.first_chunk()?) & TYPE_MASK;
        let value = self.0.get(4..length)?;
        let (whole, rest) = self.0.split_at(length.next_multiple_of(4).min(self.0.len()));
        self.0 = rest;
        Some(Attribute { kind, value, whole })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_built_can_be_read() {
        let mut builder = Builder::default();
        builder.begin(7, ACK, &[1, 2, 3, 4]);
        builder.attribute(2, b"abc\0");
        builder.attribute(3, &[1, 2, 3, 4, 5]);
        builder.end();
        builder.begin(8, 0, &[]);
        builder.end();
        let bytes = builder.take();
        let messages: Vec<_> = Messages(&bytes).collect();
        assert_eq!(messages.iter().map(|message| message.kind).collect::<Vec<_>>(), [7, 8]);
        let attributes: Vec<_> = Attributes(&messages[0].body[4..]).map(|attribute| (attribute.kind, attribute.value.to_vec())).collect();
        assert_eq!(attributes, [(2, b"abc\0".to_vec()), (3, vec![1, 2, 3, 4, 5])]);
    }

    #[test]
    fn truncated_input_ends_the_iteration() {
        assert_eq!(Messages(&[200, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).count(), 0);
        assert_eq!(Attributes(&[9, 0, 1, 0, 1]).count(), 0);
        assert_eq!(Attributes(&[0, 0]).count(), 0);
    }
}
