//! Source text to tokens.
use crate::issues::Issues;

#[derive(Clone, Debug, PartialEq)]
pub enum Token {
    Ident(String),
    Int(String),
    Uint(String),
    Double(f64),
    String(String),
    Bytes(Vec<u8>),
    /// An operator or a piece of punctuation.
    Sign(&'static str),
    End,
}

/// Longer ones first.
const SIGNS: &[&str] =
    &["&&", "||", "<=", ">=", "==", "!=", "<", ">", "+", "-", "*", "/", "%", "!", "?", ":", ".", ",", "(", ")", "[", "]", "{", "}"];

/// All tokens with their byte offsets; the last is [`Token::End`].
pub fn tokens(source: &str) -> Result<Vec<(usize, Token)>, Issues> {
    let mut lexer = Lexer { source, at: 0 };
    let mut found = Vec::new();
    loop {
        lexer.skip_blank();
        let at = lexer.at;
        let token = lexer.next().map_err(|message| Issues::one(source, at, format!("Syntax error: {message}")))?;
        let end = token == Token::End;
        found.push((at, token));
        if end {
            return Ok(found);
        }
    }
}

struct Lexer<'a> {
    source: &'a str,
    at: usize,
}

impl<'a> Lexer<'a> {
    fn rest(&self) -> &'a str {
        &self.source[self.at..]
    }

    fn take(&mut self, count: usize) -> &'a str {
        let taken = &self.source[self.at..self.at + count];
        self.at += count;
        taken
    }

    fn skip_blank(&mut self) {
        loop {
            let rest = self.rest();
            let trimmed = rest.trim_start_matches([' ', '\t', '\n', '\r', '\u{c}']);
            self.at += rest.len() - trimmed.len();
            if !trimmed.starts_with("//") {
                return;
            }
            self.at += trimmed.find('\n').unwrap_or(trimmed.len());
        }
    }

    fn next(&mut self) -> Result<Token, String> {
        let rest = self.rest();
        let Some(first) = rest.chars().next() else { return Ok(Token::End) };
        if let Some(token) = self.text()? {
            return Ok(token);
        }
        let fraction = first == '.' && rest[1..].starts_with(|c: char| c.is_ascii_digit());
        if first.is_ascii_digit() || fraction {
            return self.number();
        }
        if first.is_ascii_alphabetic() || first == '_' {
            let length = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
            return Ok(Token::Ident(self.take(length).into()));
        }
        match SIGNS.iter().find(|sign| rest.starts_with(**sign)) {
            Some(sign) => {
                self.at += sign.len();
                Ok(Token::Sign(sign))
            }
            None => Err(format!("token recognition error at: '{first}'")),
        }
    }

    fn number(&mut self) -> Result<Token, String> {
        let rest = self.rest();
        if let Some(hex) = rest.strip_prefix("0x").or_else(|| rest.strip_prefix("0X")) {
            let length = hex.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(hex.len());
            let text = self.take(2 + length).to_string();
            return Ok(self.integer(text));
        }
        let digits = |text: &str| text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let mut length = digits(rest);
        let mut whole = true;
        if rest[length..].starts_with('.') && digits(&rest[length + 1..]) > 0 {
            length += 1 + digits(&rest[length + 1..]);
            whole = false;
        }
        if rest[length..].starts_with(['e', 'E']) {
            let exponent = &rest[length + 1..];
            let sign = usize::from(exponent.starts_with(['+', '-']));
            if digits(&exponent[sign..]) > 0 {
                length += 1 + sign + digits(&exponent[sign..]);
                whole = false;
            }
        }
        let text = self.take(length).to_string();
        if whole {
            return Ok(self.integer(text));
        }
        text.parse().map(Token::Double).map_err(|_| "invalid double literal".into())
    }

    fn integer(&mut self, text: String) -> Token {
        if self.rest().starts_with(['u', 'U']) {
            self.at += 1;
            return Token::Uint(text);
        }
        Token::Int(text)
    }

    /// A string or bytes literal, if one starts here.
    fn text(&mut self) -> Result<Option<Token>, String> {
        let rest = self.rest();
        let prefix = rest.char_indices().take(3).find(|(_, c)| matches!(c, '"' | '\'')).map(|(at, _)| at);
        let Some(prefix) = prefix.filter(|length| rest[..*length].chars().all(|c| matches!(c, 'r' | 'R' | 'b' | 'B'))) else {
            return Ok(None);
        };
        let marks = rest[..prefix].to_ascii_lowercase();
        let (raw, bytes) = (marks.contains('r'), marks.contains('b'));
        if (prefix == 2 && !(raw && bytes)) || marks.len() != prefix {
            return Ok(None);
        }
        let body = &rest[prefix..];
        let quote = &body[..1];
        let triple = quote.repeat(3);
        let quote = if body.starts_with(&triple) { triple } else { quote.to_string() };
        let start = prefix + quote.len();
        let end = closing(&rest[start..], &quote, raw).ok_or("token recognition error: unterminated string")?;
        let content = &rest[start..start + end];
        self.at += start + end + quote.len();
        if bytes {
            return Ok(Some(Token::Bytes(if raw { content.as_bytes().to_vec() } else { unescape(content, true)? })));
        }
        let text = if raw { content.to_string() } else { String::from_utf8(unescape(content, false)?).map_err(|e| e.to_string())? };
        Ok(Some(Token::String(text)))
    }
}

/// Where the quote that ends a literal stands.
fn closing(text: &str, quote: &str, raw: bool) -> Option<usize> {
    let mut at = 0;
    while at < text.len() {
        let rest = &text[at..];
        if rest.starts_with(quote) {
            return Some(at);
        }
        let first = rest.chars().next()?;
        if first == '\n' && quote.len() == 1 {
            return None;
        }
        at += first.len_utf8();
        if first == '\\' && !raw {
            at += text[at..].chars().next()?.len_utf8();
        }
    }
    None
}

fn unescape(text: &str, bytes: bool) -> Result<Vec<u8>, String> {
    let mut out = Vec::with_capacity(text.len());
    let mut chars = text.char_indices();
    while let Some((_, c)) = chars.next() {
        if c != '\\' {
            out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
            continue;
        }
        let Some((at, escaped)) = chars.next() else { return Err("unable to unescape string".into()) };
        let mut number = |start: usize, digits: usize, radix: u32| {
            let text = text.get(start..start + digits).ok_or("unable to unescape string")?;
            for _ in at + 1..start + digits {
                chars.next();
            }
            u32::from_str_radix(text, radix).map_err(|_| "unable to unescape string".to_string())
        };
        let code = match escaped {
            'a' => 7,
            'b' => 8,
            'f' => 12,
            'n' => 10,
            'r' => 13,
            't' => 9,
            'v' => 11,
            '\\' | '\'' | '"' | '`' | '?' => escaped as u32,
            'x' | 'X' => number(at + 1, 2, 16)?,
            'u' if !bytes => number(at + 1, 4, 16)?,
            'U' if !bytes => number(at + 1, 8, 16)?,
            '0'..='3' => number(at, 3, 8)?,
            _ => return Err("unable to unescape string".into()),
        };
        match u8::try_from(code) {
            Ok(byte) if bytes => out.push(byte),
            _ => {
                let c = char::from_u32(code).ok_or("invalid unicode code point")?;
                out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
            }
        }
    }
    Ok(out)
}
