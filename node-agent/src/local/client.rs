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
    /// Only from this pod of the node, or to it (namespace/name)
    #[arg(long)]
    pod: Option<String>,
    /// Only with a Service or a pod of this namespace
    #[arg(long)]
    namespace: Option<String>,
    /// Only from this address (or the beginning of one)
    #[arg(long)]
    from: Option<String>,
    /// Only to this frontend or backend (or the beginning of one)
    #[arg(long)]
    to: Option<String>,
    /// Only what is opened, closed, refused, dropped, or translated (led to a backend)
    #[arg(long)]
    verdict: Option<String>,
    #[arg(long, value_parser = ["TCP", "UDP", "SCTP"], ignore_case = true)]
    protocol: Option<String>,
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
            let counts = if counted.is_null() { String::new() } else { counts(counted) };
            say!("{}{colon}{}{counts}", text(port, "service"), text(port, "port"));
            for frontend in list(&port["frontends"]) {
                say!("  {:<12} {} -> {}", text(frontend, "kind"), text(frontend, "frontend"), backends(frontend));
            }
            for backend in list(&counted["backends"]) {
                let failed = backend["failed"].as_u64().filter(|failed| *failed > 0).map(|failed| format!(", {failed} failed"));
                let bytes = backend["sent"].as_u64().zip(backend["received"].as_u64());
                let bytes = bytes.map(|(sent, received)| format!(", {sent} B there, {received} B back"));
                let (failed, bytes) = (failed.unwrap_or_default(), bytes.unwrap_or_default());
                say!("  {:<12} {}: {} connections{failed}{bytes}", "Backend", text(backend, "address"), backend["connections"]);
            }
        }
    });
    Ok(())
}

fn counts(counted: &Value) -> String {
    let mut text = format!("  {} connections, {} refused", counted["connections"], counted["refused"]);
    let drops = counted["drops"].as_object().into_iter().flatten().map(|(reason, count)| format!("{reason} {count}"));
    let drops = drops.collect::<Vec<_>>().join(", ");
    if !drops.is_empty() {
        text += &format!(" ({drops})");
    }
    if let Some(seconds) = counted["meanConnectSeconds"].as_f64() {
        text += &format!(", {:.3} ms to connect", seconds * 1000.0);
    }
    text
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

/// What happens to connections, for as long as the agent runs.
pub fn monitor(options: &Monitor) -> Result<()> {
    for line in options.socket.ask("GET", "/monitor")?.lines() {
        let line = line.context("the agent has ended")?;
        let event: Value = serde_json::from_str(&line).context("read the agent's answer")?;
        if !is_wanted(options, &event) {
            continue;
        }
        match text(&event, "event") {
            _ if options.socket.json => say!("{line}"),
            "error" => say!("error    {}", text(&event, "message")),
            what => say!("{what:<8} {}", sentence(&event)),
        }
    }
    Ok(())
}

fn sentence(event: &Value) -> String {
    let named = |address: &str, pod: &str| match event[pod].as_str() {
        Some(pod) => format!("{} ({pod})", text(event, address)),
        None => text(event, address).to_owned(),
    };
    let mut words = vec![text(event, "protocol").to_owned(), text(event, "service").to_owned(), named("source", "sourcePod")];
    words.extend(["->".to_owned(), text(event, "frontend").to_owned()]);
    if !event["backend"].is_null() {
        words.extend(["->".to_owned(), named("backend", "backendPod")]);
    }
    words.extend(event["reason"].as_str().map(|reason| format!("({reason})")));
    words.extend(event["count"].as_u64().map(|count| format!("x{count}")));
    if let (Some(sent), Some(received)) = (event["sent"].as_u64(), event["received"].as_u64()) {
        words.push(format!("{sent} B there, {received} B back"));
    }
    words.extend(event["seconds"].as_f64().map(|seconds| format!("{:.3} ms", seconds * 1000.0)));
    words.join(" ")
}

fn is_wanted(options: &Monitor, event: &Value) -> bool {
    let begins = |names: &[&str], wanted: &Option<String>| {
        let one = |name: &&str, wanted: &str| event[*name].as_str().is_some_and(|text| text.starts_with(wanted));
        wanted.as_ref().is_none_or(|wanted| names.iter().any(|name| one(name, wanted)))
    };
    let equals = |names: &[&str], wanted: &Option<String>| {
        let one = |name: &&str, wanted: &str| event[*name].as_str().is_some_and(|text| text.eq_ignore_ascii_case(wanted));
        wanted.as_ref().is_none_or(|wanted| names.iter().any(|name| one(name, wanted)))
    };
    let namespace = options.namespace.as_ref().map(|namespace| format!("{namespace}/"));
    event["event"] == "error"
        || (begins(&["service"], &options.service)
            && equals(&["sourcePod", "backendPod"], &options.pod)
            && begins(&["service", "sourcePod", "backendPod"], &namespace)
            && begins(&["source"], &options.from)
            && begins(&["frontend", "backend"], &options.to)
            && equals(&["verdict", "event"], &options.verdict)
            && equals(&["protocol"], &options.protocol))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_escaped() {
        assert_eq!(escaped("default/web"), "default/web");
        assert_eq!(escaped("[fd00::1]:80&x=y"), "%5Bfd00::1%5D:80%26x%3Dy");
    }

    #[test]
    fn filters_choose_by_every_side_of_a_connection() {
        let event = serde_json::json!({
            "event": "closed", "verdict": "translated", "service": "shop/web", "protocol": "TCP", "source": "10.0.0.1:4000",
            "sourcePod": "users/client", "frontend": "10.96.0.1:80", "backend": "10.0.0.2:8080", "sent": 3, "received": 4, "seconds": 0.5,
        });
        let wanted = |flags: &str| {
            #[derive(clap::Parser)]
            struct Command {
                #[command(flatten)]
                monitor: Monitor,
            }
            let command = <Command as clap::Parser>::parse_from(std::iter::once("monitor").chain(flags.split_whitespace()));
            is_wanted(&command.monitor, &event)
        };
        let all = "--service shop/ --pod users/client --from 10.0.0.1 --to 10.96 --verdict translated --protocol tcp";
        for flags in ["", all, "--to 10.0.0.2:8080", "--namespace users", "--namespace shop", "--verdict closed"] {
            assert!(wanted(flags), "{flags}");
        }
        for flags in ["--pod users/other", "--namespace user", "--from 10.0.0.2", "--verdict dropped", "--protocol UDP"] {
            assert!(!wanted(flags), "{flags}");
        }
        let text = "TCP shop/web 10.0.0.1:4000 (users/client) -> 10.96.0.1:80 -> 10.0.0.2:8080 3 B there, 4 B back 500.000 ms";
        assert_eq!(sentence(&event), text);
    }
}
