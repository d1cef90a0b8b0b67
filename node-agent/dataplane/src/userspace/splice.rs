//! Bytes from socket to socket: copied while there are few, spliced through a pipe, without coming up to this process, when there are many.
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::OFlag;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::sight::Moved;

/// Below this a direction is copied: short exchanges are quicker without the two descriptors of a pipe.
const COPY: usize = 4096;
/// What a pipe holds by default; more is asked for and may be refused.
const PIPE: usize = 1 << 18;

/// Until both directions have ended, each by its own end of stream. An error on either side breaks both.
pub(super) async fn both_ways(client: &TcpStream, backend: &TcpStream, moved: &Moved) -> io::Result<()> {
    tokio::try_join!(one_way(client, backend, &moved.sent), one_way(backend, client, &moved.received)).map(|_| ())
}

/// Closes with a reset instead of an orderly end, so that the peer knows that something was lost.
pub(super) fn reset(stream: TcpStream) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    if let Err(error) = setsockopt(&stream, sockopt::Linger, &linger) {
        tracing::debug!(%error, "the connection ends without a reset");
    }
}

async fn one_way(from: &TcpStream, to: &TcpStream, moved: &AtomicU64) -> io::Result<()> {
    if copy_while_small(from, to, moved).await? {
        splice_all(from, to, moved).await?;
    }
    nix::sys::socket::shutdown(to.as_raw_fd(), nix::sys::socket::Shutdown::Write).or_else(|error| match error {
        // The other side is gone already; its own direction says how.
        nix::errno::Errno::ENOTCONN => Ok(()),
        other => Err(other.into()),
    })
}

/// False at the end of the stream; true when a whole buffer was filled at once, so that there is likely more.
async fn copy_while_small(from: &TcpStream, to: &TcpStream, moved: &AtomicU64) -> io::Result<bool> {
    let mut buffer = vec![0; COPY].into_boxed_slice();
    loop {
        from.readable().await?;
        let length = match from.try_read(&mut buffer) {
            Ok(0) => return Ok(false),
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        };
        let mut rest = &buffer[..length];
        while !rest.is_empty() {
            match to.try_write(rest) {
                Ok(written) => rest = &rest[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => to.writable().await?,
                Err(error) => return Err(error),
            }
        }
        moved.fetch_add(length as u64, Ordering::Relaxed);
        if length == COPY {
            return Ok(true);
        }
    }
}

async fn splice_all(from: &TcpStream, to: &TcpStream, moved: &AtomicU64) -> io::Result<()> {
    let (output, input) = nix::unistd::pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)?;
    // Unprivileged processes are limited in total; the default size works too.
    let _ = nix::fcntl::fcntl(&input, nix::fcntl::FcntlArg::F_SETPIPE_SZ(PIPE as libc::c_int));
    loop {
        let mut held = pull(from, &input).await?;
        if held == 0 {
            return Ok(());
        }
        moved.fetch_add(held as u64, Ordering::Relaxed);
        while held > 0 {
            held -= push(&output, to, held).await?;
        }
    }
}

/// From the socket into the empty pipe; zero at the end of the stream.
async fn pull(from: &TcpStream, input: &OwnedFd) -> io::Result<usize> {
    from.async_io(Interest::READABLE, || splice(from.as_raw_fd(), input.as_raw_fd(), PIPE)).await
}

async fn push(output: &OwnedFd, to: &TcpStream, held: usize) -> io::Result<usize> {
    match to.async_io(Interest::WRITABLE, || splice(output.as_raw_fd(), to.as_raw_fd(), held)).await? {
        0 => Err(io::ErrorKind::WriteZero.into()),
        moved => Ok(moved),
    }
}

fn splice(from: libc::c_int, to: libc::c_int, length: usize) -> io::Result<usize> {
    let flags = libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK;
    // SAFETY: both descriptors are open (their owners outlive the call), and null offsets are what sockets and pipes want.
    let moved = unsafe { libc::splice(from, std::ptr::null_mut(), to, std::ptr::null_mut(), length, flags) };
    usize::try_from(moved).map_err(|_| io::Error::last_os_error())
}
