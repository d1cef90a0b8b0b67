//! SPDY/3.1 frames to and from bytes, with no I/O and bounded memory whatever the peer sends.
//!
//! A data frame may announce 16 MiB: its bytes are handed on as they arrive, so nothing of that size is ever held. Header
//! blocks are limited before and after decompression.
use bytes::{Buf, BufMut, Bytes, BytesMut};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

/// What header blocks are compressed against, as SPDY/3 fixes it.
const DICTIONARY: &[u8] = include_bytes!("dictionary.bin");
const VERSION: u16 = 3;
const FRAME_HEADER: usize = 8;
/// Control frames of Kubernetes' peers have some hundred bytes.
const MAX_CONTROL_FRAME: usize = 64 * 1024;
const MAX_HEADER_BLOCK: usize = 256 * 1024;
/// The longest piece in which a data frame is handed on.
const MAX_PIECE: usize = 32 * 1024;
const FLAG_FIN: u8 = 1;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const SETTINGS: u16 = 4;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;
const WINDOW_UPDATE: u16 = 9;

/// Name and value pairs; names are lower case.
pub type Headers = Vec<(String, String)>;

/// The value of a header, by its name in lower case.
pub fn header<'a>(headers: &'a Headers, name: &str) -> Option<&'a str> {
    headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    SynStream {
        id: u32,
        fin: bool,
        headers: Headers,
    },
    SynReply {
        id: u32,
        fin: bool,
        headers: Headers,
    },
    Reset {
        id: u32,
        status: u32,
    },
    Ping {
        id: u32,
    },
    GoAway {
        last: u32,
        status: u32,
    },
    Headers {
        id: u32,
        fin: bool,
        headers: Headers,
    },
    /// A whole data frame, or one piece of it; `fin` is on the last piece only.
    Data {
        id: u32,
        fin: bool,
        data: Bytes,
    },
    /// Settings, window updates and unknown control frames: nothing depends on them, since Kubernetes' peers
    /// have no flow control of their own and rely on the connection's.
    Ignored,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("SPDY version {0} instead of 3")]
    Version(u16),
    #[error("SPDY frame of {0} bytes is too long")]
    TooLong(usize),
    #[error("SPDY frame of type {0} is too short")]
    TooShort(u16),
    #[error("SPDY header block can't be decompressed")]
    Compression,
    #[error("SPDY header block is malformed")]
    Headers,
}

/// The receiving side's state.
pub struct Decoder {
    inflate: Decompress,
    data: Option<PartialData>,
}

struct PartialData {
    id: u32,
    fin: bool,
    remaining: usize,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { inflate: Decompress::new(true), data: None }
    }
}

impl Decoder {
    /// Takes the next frame out of `buffer`; `None` when it needs more bytes. After an error the connection is of no use.
    pub fn decode(&mut self, buffer: &mut BytesMut) -> Result<Option<Frame>, Error> {
        if self.data.is_some() {
            return Ok(self.piece(buffer));
        }
        if buffer.len() < FRAME_HEADER {
            return Ok(None);
        }
        let word = u32::from_be_bytes([buffer[0], buffer[1], buffer[2], buffer[3]]);
        let flags = buffer[4];
        let length = usize::from(buffer[5]) << 16 | usize::from(buffer[6]) << 8 | usize::from(buffer[7]);
        if word >> 31 == 0 {
            buffer.advance(FRAME_HEADER);
            self.data = Some(PartialData { id: word, fin: flags & FLAG_FIN != 0, remaining: length });
            return Ok(self.piece(buffer));
        }
        let version = (word >> 16) as u16 & 0x7fff;
        if version != VERSION {
            return Err(Error::Version(version));
        }
        if length > MAX_CONTROL_FRAME {
            return Err(Error::TooLong(length));
        }
        if buffer.len() < FRAME_HEADER + length {
            return Ok(None);
        }
        buffer.advance(FRAME_HEADER);
        let body = buffer.split_to(length).freeze();
        self.control(word as u16, flags & FLAG_FIN != 0, body).map(Some)
    }

    fn piece(&mut self, buffer: &mut BytesMut) -> Option<Frame> {
        let partial = self.data.as_mut()?;
        if buffer.is_empty() && partial.remaining > 0 {
            return None;
        }
        let data = buffer.split_to(partial.remaining.min(buffer.len()).min(MAX_PIECE)).freeze();
        partial.remaining -= data.len();
        let last = partial.remaining == 0;
        let frame = Frame::Data { id: partial.id, fin: last && partial.fin, data };
        if last {
            self.data = None;
        }
        Some(frame)
    }

    fn control(&mut self, kind: u16, fin: bool, mut body: Bytes) -> Result<Frame, Error> {
        let needed = match kind {
            SYN_STREAM => 10,
            SYN_REPLY | HEADERS | PING => 4,
            RST_STREAM | GOAWAY => 8,
            _ => 0,
        };
        if body.len() < needed {
            return Err(Error::TooShort(kind));
        }
        let mut word = || body.get_u32();
        Ok(match kind {
            SYN_STREAM => {
                let id = word() & 0x7fff_ffff;
                // The associated stream, the priority and the slot.
                body.advance(6);
                Frame::SynStream { id, fin, headers: self.headers(&body)? }
            }
            SYN_REPLY => Frame::SynReply { id: word() & 0x7fff_ffff, fin, headers: self.headers(&body)? },
            HEADERS => Frame::Headers { id: word() & 0x7fff_ffff, fin, headers: self.headers(&body)? },
            RST_STREAM => Frame::Reset { id: word() & 0x7fff_ffff, status: word() },
            PING => Frame::Ping { id: word() },
            GOAWAY => Frame::GoAway { last: word() & 0x7fff_ffff, status: word() },
            SETTINGS | WINDOW_UPDATE => Frame::Ignored,
            _ => Frame::Ignored,
        })
    }

    fn headers(&mut self, compressed: &[u8]) -> Result<Headers, Error> {
        let block = self.inflate(compressed)?;
        parse_headers(&block).ok_or(Error::Headers)
    }

    fn inflate(&mut self, mut input: &[u8]) -> Result<Vec<u8>, Error> {
        let mut output = Vec::with_capacity(1024);
        loop {
            output.reserve(1024);
            let before = (self.inflate.total_in(), self.inflate.total_out());
            let result = self.inflate.decompress_vec(input, &mut output, FlushDecompress::Sync);
            let consumed = usize::try_from(self.inflate.total_in() - before.0).map_err(|_| Error::Compression)?;
            input = input.get(consumed..).ok_or(Error::Compression)?;
            match result {
                Ok(Status::StreamEnd) => return Err(Error::Compression),
                Ok(_) => {}
                Err(error) if error.needs_dictionary().is_some() => {
                    self.inflate.set_dictionary(DICTIONARY).map_err(|_| Error::Compression)?;
                    continue;
                }
                Err(_) => return Err(Error::Compression),
            }
            if output.len() > MAX_HEADER_BLOCK {
                return Err(Error::TooLong(output.len()));
            }
            let stuck = before == (self.inflate.total_in(), self.inflate.total_out());
            if input.is_empty() && (stuck || output.len() < output.capacity()) {
                return Ok(output);
            }
            if stuck {
                return Err(Error::Compression);
            }
        }
    }
}

fn parse_headers(mut block: &[u8]) -> Option<Headers> {
    let text = |block: &mut &[u8]| {
        let length = usize::try_from(block.try_get_u32().ok()?).ok()?;
        let (text, rest) = block.split_at_checked(length)?;
        *block = rest;
        Some(String::from_utf8_lossy(text).into_owned())
    };
    let count = block.try_get_u32().ok()?;
    let mut headers = Headers::new();
    for _ in 0..count {
        let name = text(&mut block)?.to_ascii_lowercase();
        headers.push((name, text(&mut block)?));
    }
    Some(headers)
}

/// The sending side's state.
pub struct Encoder {
    deflate: Compress,
    begun: bool,
}

impl Default for Encoder {
    fn default() -> Self {
        Self { deflate: Compress::new(Compression::default(), true), begun: false }
    }
}

impl Encoder {
    /// Appends the frame to `output`.
    pub fn encode(&mut self, frame: &Frame, output: &mut BytesMut) -> Result<(), Error> {
        let mut body = BytesMut::new();
        let (kind, fin) = match frame {
            Frame::Data { id, fin, data } => {
                output.put_u32(id & 0x7fff_ffff);
                put_flags_and_length(output, *fin, data.len())?;
                output.put_slice(data);
                return Ok(());
            }
            Frame::Ignored => return Ok(()),
            Frame::SynStream { id, fin, headers } => {
                body.put_u32(*id);
                body.put_bytes(0, 6);
                self.put_headers(headers, &mut body)?;
                (SYN_STREAM, *fin)
            }
            Frame::SynReply { id, fin, headers } => {
                body.put_u32(*id);
                self.put_headers(headers, &mut body)?;
                (SYN_REPLY, *fin)
            }
            Frame::Headers { id, fin, headers } => {
                body.put_u32(*id);
                self.put_headers(headers, &mut body)?;
                (HEADERS, *fin)
            }
            Frame::Reset { id, status } => {
                body.put_u32(*id);
                body.put_u32(*status);
                (RST_STREAM, false)
            }
            Frame::Ping { id } => {
                body.put_u32(*id);
                (PING, false)
            }
            Frame::GoAway { last, status } => {
                body.put_u32(*last);
                body.put_u32(*status);
                (GOAWAY, false)
            }
        };
        output.put_u32(1 << 31 | u32::from(VERSION) << 16 | u32::from(kind));
        put_flags_and_length(output, fin, body.len())?;
        output.put_slice(&body);
        Ok(())
    }

    fn put_headers(&mut self, headers: &Headers, output: &mut BytesMut) -> Result<(), Error> {
        let mut block = Vec::new();
        let length = |length: usize| u32::try_from(length).map_err(|_| Error::TooLong(length));
        block.put_u32(length(headers.len())?);
        for (name, value) in headers {
            for text in [name.to_ascii_lowercase().as_bytes(), value.as_bytes()] {
                block.put_u32(length(text.len())?);
                block.put_slice(text);
            }
        }
        if !self.begun {
            self.deflate.set_dictionary(DICTIONARY).map_err(|_| Error::Compression)?;
            self.begun = true;
        }
        output.put_slice(&self.deflate(&block)?);
        Ok(())
    }

    fn deflate(&mut self, mut input: &[u8]) -> Result<Vec<u8>, Error> {
        let mut output = Vec::with_capacity(input.len() + 64);
        loop {
            output.reserve(64);
            let before = self.deflate.total_in();
            self.deflate.compress_vec(input, &mut output, FlushCompress::Sync).map_err(|_| Error::Compression)?;
            let consumed = usize::try_from(self.deflate.total_in() - before).map_err(|_| Error::Compression)?;
            input = input.get(consumed..).ok_or(Error::Compression)?;
            // Room left over means that everything, the flush's end mark included, has been written.
            if input.is_empty() && output.len() < output.capacity() {
                return Ok(output);
            }
        }
    }
}

fn put_flags_and_length(output: &mut BytesMut, fin: bool, length: usize) -> Result<(), Error> {
    let length = u32::try_from(length).ok().filter(|length| *length < 1 << 24).ok_or(Error::TooLong(length))?;
    output.put_u32(if fin { u32::from(FLAG_FIN) << 24 | length } else { length });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Vec<Frame> {
        let headers =
            |pairs: &[(&str, &str)]| pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect::<Headers>();
        vec![
            Frame::SynStream { id: 1, fin: false, headers: headers(&[("streamtype", "stdin")]) },
            Frame::SynReply { id: 1, fin: false, headers: headers(&[]) },
            Frame::SynStream {
                id: 3,
                fin: true,
                headers: headers(&[("streamtype", "error"), ("port", "8080"), ("requestid", &"x".repeat(5000))]),
            },
            Frame::Data { id: 1, fin: false, data: Bytes::from_static(b"hello") },
            Frame::Data { id: 1, fin: true, data: Bytes::new() },
            Frame::Ping { id: 7 },
            Frame::Reset { id: 3, status: 5 },
            Frame::GoAway { last: 3, status: 0 },
            Frame::Headers { id: 3, fin: false, headers: headers(&[("a", "b")]) },
        ]
    }

    fn encoded(frames: &[Frame]) -> BytesMut {
        let (mut encoder, mut bytes) = (Encoder::default(), BytesMut::new());
        for frame in frames {
            encoder.encode(frame, &mut bytes).unwrap();
        }
        bytes
    }

    #[test]
    fn frames_survive_any_division() {
        let frames = samples();
        let bytes = encoded(&frames);
        for step in [1, 2, 7, 64, bytes.len()] {
            let (mut decoder, mut buffer, mut seen) = (Decoder::default(), BytesMut::new(), Vec::new());
            for piece in bytes.chunks(step) {
                buffer.extend_from_slice(piece);
                while let Some(frame) = decoder.decode(&mut buffer).unwrap() {
                    match (seen.last_mut(), frame) {
                        (Some(Frame::Data { id, fin: false, data }), Frame::Data { id: same, fin, data: more })
                            if *id == same && !more.is_empty() =>
                        {
                            *data = [data.as_ref(), more.as_ref()].concat().into();
                            assert!(!fin);
                        }
                        (_, frame) => seen.push(frame),
                    }
                }
            }
            assert_eq!(seen, frames, "in steps of {step}");
        }
    }

    #[test]
    fn bad_frames_are_errors() {
        let cases: [(&[u8], &str); 5] = [
            (&[0x80, 2, 0, 1, 0, 0, 0, 0], "SPDY version 2 instead of 3"),
            (&[0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff], "SPDY frame of 16777215 bytes is too long"),
            (&[0x80, 3, 0, 1, 0, 0, 0, 2, 0, 0], "SPDY frame of type 1 is too short"),
            (&[0x80, 3, 0, 2, 0, 0, 0, 8, 0, 0, 0, 1, 1, 2, 3, 4], "SPDY header block can't be decompressed"),
            (&[0x80, 3, 0, 6, 0, 0, 0, 0], "SPDY frame of type 6 is too short"),
        ];
        for (bytes, message) in cases {
            let error = Decoder::default().decode(&mut BytesMut::from(bytes)).unwrap_err();
            assert_eq!(error.to_string(), message);
        }
    }

    #[test]
    fn a_bomb_of_headers_is_refused() {
        let headers = vec![("a".to_owned(), "x".repeat(MAX_HEADER_BLOCK + 10_000))];
        let mut bytes = encoded(&[Frame::SynStream { id: 1, fin: false, headers }]);
        assert!(bytes.len() < MAX_CONTROL_FRAME);
        assert!(matches!(Decoder::default().decode(&mut bytes), Err(Error::TooLong(_))));
    }

    #[test]
    fn no_bytes_make_it_panic() {
        // A fixed generator: failures must repeat.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let valid = encoded(&samples());
        for round in 0..20_000 {
            let mut bytes = BytesMut::from(&valid[..]);
            if round % 4 == 0 {
                bytes = (0..random() % 200).map(|_| random() as u8).collect::<Vec<_>>().as_slice().into();
            } else {
                for _ in 0..=random() % 4 {
                    let at = (random() % bytes.len() as u64) as usize;
                    bytes[at] = random() as u8;
                }
            }
            let (mut decoder, mut total) = (Decoder::default(), 0);
            while let Ok(Some(frame)) = decoder.decode(&mut bytes) {
                total += 1;
                if let Frame::Data { data, .. } = frame {
                    assert!(data.len() <= MAX_PIECE);
                }
                assert!(total < 10_000);
            }
        }
    }
}
