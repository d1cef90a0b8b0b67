//! The plugin's word to the running agent: no pod gets a network before the kernel knows its policies.
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::message::{Error, NetConfig, Result, TRY_LATER};
use crate::ipam::Owner;

/// The runtime kills a plugin that takes too long, and then doesn't know why.
const PATIENCE: Duration = Duration::from_secs(10);

/// Returns once the kernel carries the policies of the owner's pod. What stands in the store is what the agent goes by, so the
/// allocation has to be there.
pub fn admit(socket: &Path, owner: &Owner) -> Result<()> {
    let refused = |reason: String| Error::new(TRY_LATER, format!("the node agent hasn't admitted the pod to the network: {reason}"), "");
    match ask(socket, &format!("/attachments?admit={}", owner.key())) {
        Ok(None) => Ok(()),
        Ok(Some(refusal)) => Err(refused(refusal)),
        Err(error) => Err(refused(format!("{}: {error}", socket.display()))),
    }
}

/// Says that the store has changed. An agent that isn't there reads it when it starts.
pub fn tell(config: &NetConfig) {
    if let Ok(socket) = config.agent() {
        let _ = ask(socket, "/attachments");
    }
}

/// Posts; the answer's text where it isn't yes.
fn ask(socket: &Path, path: &str) -> io::Result<Option<String>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    // With HTTP/1.0 the body ends with the connection.
    write!(stream, "POST {path} HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.lines().next().unwrap_or_default();
    Ok((status.split(' ').nth(1) != Some("200")).then(|| if body.is_empty() { status.to_owned() } else { body.to_owned() }))
}
