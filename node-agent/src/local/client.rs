//! The asking side: the commands beside `run`.
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// Prints a line; when nobody reads any more (`| head`), enough was said.
macro_rules! say {
    ($($words:tt)*) => {
        if writeln!(std::io::stdout(), $($words)*).is_err() {
            std::process::exit(0)
        }
    };
}

/// Which agent to ask, and how to show the answer.
#[derive(clap::Args, Clone, Debug)]
pub struct Socket {
    /// The running agent's data directory
    #[arg(long, default_value = "/var/lib/outrigger")]
    data_dir: PathBuf,
    /// As JSON instead of text for people
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args, Clone, Debug)]
pub struct Mode {
    /// auto, ebpf, nftables or userspace
    to: String,
    #[command(flatten)]
    socket: Socket,
}

#[derive(clap::Args, Clone, Debug)]
pub struct Services {
    /// Only those whose namespace/name begins so
    #[arg(default_value = "")]
    service: String,
    #[command(flatten)]
    socket: Socket,
}

#[derive(clap::Args, Clone, Debug)]
pub struct Trace {
    /// A pod of this node (namespace/name), or an address; with a client's port (IP:PORT) also which backend that one gets
    #[arg(long)]
    from: String,
    /// IP:PORT
    #[arg(long)]
    to: String,
    #[arg(long, default_value = "TCP")]
    protocol: String,
    #[command(flatten)]
    socket: Socket,
}

#[derive(clap::Args, Clone, Debug)]
pub struct Monitor {
    /// Only Services whose namespace/name begins so
    #[arg(long)]
    service: Option<String>,
    /// Only from this address (or the beginning of one)
    #[arg(long)]
    from: Option<String>,
    /// Only what is translated, or refused
    #[arg(long)]
    verdict: Option<String>,
    #[arg(long, value_parser = ["TCP", "UDP", "SCTP"], ignore_case = true)]
    protocol: Option<String>,
    /// How often to look, in milliseconds
    #[arg(long, default_value_t = 1000)]
    millis: u64,
    #[command(flatten)]
    socket: Socket,
}

impl Socket {
    /// Asks; the answer's body is still to be read.
    fn ask(&self, method: &str, path: &str) -> Result<BufReader<UnixStream>> {
        let socket = super::path(&self.data_dir);
        let connect = || format!("no agent answers at {} (run as root, with the agent's --data-dir)", socket.display());
        let mut stream = UnixStream::connect(&socket).with_context(connect)?;
        // With HTTP/1.0 the body ends with the connection.
        write!(stream, "{method} {path} HTTP/1.0\r\n\r\n").with_context(connect)?;
        let mut reader = BufReader::new(stream);
        let mut status = String::new();
        reader.read_line(&mut status).with_context(connect)?;
        let mut header = String::new();
        while reader.read_line(&mut header).with_context(connect)? > 2 {
            header.clear();
        }
        if status.split(' ').nth(1) != Some("200") {
            let mut message = String::new();
            reader.read_to_string(&mut message)?;
            bail!("{}", if message.is_empty() { status.trim().to_owned() } else { message });
        }
        Ok(reader)
    }

    fn get(&self, path: &str) -> Result<Value> {
        serde_json::from_reader(self.ask("GET", path)?).context("read the agent's answer")
    }

    fn show(&self, answer: &Value, text: impl FnOnce(&Value)) {
        if self.json { say!("{answer:#}") } else { text(answer) }
    }
}

/// A value for a query: everything but what is plain is escaped.
fn escaped(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/:".contains(&byte);
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or("-")
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// Every part with its health; fails when one is ill.
pub fn status(socket: &Socket) -> Result<()> {
    let answer = socket.get("/status")?;
    let parts = answer["parts"].as_object().cloned().unwrap_or_default();
    socket.show(&answer, |answer| {
        for (name, part) in &parts {
            say!("{name:<8} {}", part["message"].as_str().unwrap_or("healthy"));
        }
        if !answer["proxy"].is_null() {
            say!("Services by {} ({})", text(&answer["proxy"], "mode"), text(&answer["proxy"], "reason"));
        }
        if answer["networkPolicies"]["enforced"] == false {
            say!("NetworkPolicies are not enforced: {}", text(&answer["networkPolicies"], "reason"));
        }
    });
    ensure!(parts.values().all(|part| part["healthy"] == true), "not every part is healthy");
    Ok(())
}

/// Switches while traffic flows.
pub fn mode(options: &Mode) -> Result<()> {
    let answer = options.socket.ask("POST", &format!("/mode?to={}", escaped(&options.to)))?;
    let answer: Value = serde_json::from_reader(answer).context("read the agent's answer")?;
    options.socket.show(&answer, |answer| say!("Services by {} ({})", text(answer, "mode"), text(answer, "reason")));
    Ok(())
}

pub fn services(options: &Services) -> Result<()> {
    let answer = options.socket.get(&format!("/services?service={}", escaped(&options.service)))?;
    options.socket.show(&answer, |answer| {
        for port in list(answer) {
            let colon = if text(port, "port").is_empty() { "" } else { ":" };
            let counted = &port["counted"];
            let counts = if counted.is_null() {
                String::new()
            } else {
                format!("  {} connections, {} refused", counted["connections"], counted["refused"])
            };
            say!("{}{colon}{}{counts}", text(port, "service"), text(port, "port"));
            for frontend in list(&port["frontends"]) {
                say!("  {:<12} {} -> {}", text(frontend, "kind"), text(frontend, "frontend"), backends(frontend));
            }
        }
    });
    Ok(())
}

fn backends(frontend: &Value) -> String {
    let words = |all: &Value| {
        let word = |one: &Value| format!("{}{}", text(one, "address"), if one["local"] == true { "*" } else { "" });
        list(all).iter().map(word).collect::<Vec<_>>().join(" ")
    };
    let own = words(&frontend["backends"]);
    let own = if own.is_empty() { text(frontend, "withoutBackends").to_lowercase() } else { own };
    let inside = frontend["insideBackends"].as_array().map(|_| format!(", from inside {}", words(&frontend["insideBackends"])));
    own + &inside.unwrap_or_default()
}

/// Fails when the kernel doesn't do what is meant.
pub fn trace(options: &Trace) -> Result<()> {
    let query = format!("/trace?from={}&to={}&protocol={}", escaped(&options.from), escaped(&options.to), escaped(&options.protocol));
    let answer = options.socket.get(&query)?;
    options.socket.show(&answer, |answer| {
        let join = |all: &Value| list(all).iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" ");
        let (flow, meant, kernel) = (&answer["flow"], &answer["meant"], &answer["kernel"]);
        say!("{} {} -> {}", text(flow, "protocol"), text(flow, "source"), text(flow, "destination"));
        let masquerade = if meant["masquerade"] == true { ", masqueraded" } else { "" };
        say!("meant:  {} {}{masquerade}", text(meant, "verdict"), join(&meant["backends"]));
        list(&meant["reasons"]).iter().filter_map(Value::as_str).for_each(|reason| say!("        {reason}"));
        let found = match (kernel["error"].as_str(), kernel["known"].as_bool()) {
            (Some(error), _) => format!("can't be read: {error}"),
            (None, Some(true)) if list(&kernel["backends"]).is_empty() => "no backend".into(),
            (None, Some(true)) => match kernel["chosen"].as_str() {
                Some(chosen) => format!("to {chosen}, of {}", join(&kernel["backends"])),
                None => format!("to {}", join(&kernel["backends"])),
            },
            _ => "knows nothing of it".into(),
        };
        say!("kernel: {found} (by {})", text(kernel, "mode"));
    });
    ensure!(answer["agree"] == true, "what is meant and what the kernel does differ");
    Ok(())
}

pub fn monitor(options: &Monitor) -> Result<()> {
    for line in options.socket.ask("GET", &format!("/monitor?millis={}", options.millis))?.lines() {
        let line = line.context("the agent has ended")?;
        let event: Value = serde_json::from_str(&line).context("read the agent's answer")?;
        if !is_wanted(options, &event) {
            continue;
        }
        match text(&event, "event") {
            _ if options.socket.json => say!("{line}"),
            "count" => say!("{:<6} {} x{} {}", "", text(&event, "service"), event["connections"], text(&event, "verdict")),
            "error" => say!("error  {}", text(&event, "message")),
            what => say!(
                "{what:<6} {} {} {} -> {} -> {}",
                text(&event, "protocol"),
                text(&event, "service"),
                text(&event, "source"),
                text(&event, "frontend"),
                text(&event, "backend")
            ),
        }
    }
    Ok(())
}

fn is_wanted(options: &Monitor, event: &Value) -> bool {
    let begins = |name: &str, wanted: &Option<String>| {
        wanted.as_ref().is_none_or(|wanted| event[name].as_str().is_some_and(|text| text.starts_with(wanted.as_str())))
    };
    let equals = |name: &str, wanted: &Option<String>| {
        wanted.as_ref().is_none_or(|wanted| event[name].as_str().is_some_and(|text| text.eq_ignore_ascii_case(wanted)))
    };
    event["event"] == "error"
        || (begins("service", &options.service)
            && begins("source", &options.from)
            && equals("verdict", &options.verdict)
            && equals("protocol", &options.protocol))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_escaped() {
        assert_eq!(escaped("default/web"), "default/web");
        assert_eq!(escaped("[fd00::1]:80&x=y"), "%5Bfd00::1%5D:80%26x%3Dy");
    }
}
