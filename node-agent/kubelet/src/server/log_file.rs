//! Container logs in CRI's format, from the oldest rotated file to the end of the current one and, on request, on from there.
//!
//! A line is `time stream tag text`; tag `P` marks a piece of a longer line.
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use flate2::read::MultiGzDecoder;
use jiff::Timestamp;
use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecursiveMode, Watcher};
use tokio::sync::mpsc;

/// What the client asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    pub tail: Option<u64>,
    pub limit: Option<u64>,
    pub since: Option<Timestamp>,
    pub follow: bool,
    pub timestamps: bool,
    pub stdout: bool,
    pub stderr: bool,
}

/// As much goes to the client at once when there is more.
const CHUNK: usize = 32 * 1024;
/// Runtimes split at 16 KiB; a longer line is no CRI log.
const MAX_LINE: u64 = 1024 * 1024;
/// How often a followed file is looked at with no event: inotify may be exhausted, or lose events.
const RECHECK: Duration = Duration::from_secs(1);

/// Copies the log at `path` to `out`. While following, `is_running` tells whether the container may still write.
pub async fn copy<R>(path: &Path, options: &Options, is_running: impl Fn() -> R, out: mpsc::Sender<Bytes>) -> io::Result<()>
where
    R: Future<Output = bool>,
{
    let path = path.to_owned();
    // The watch begins before the first read: nothing written in between is missed.
    let mut changes = if options.follow { Some(Changes::watch(&path)) } else { None };
    let (wanted, sender) = (options.clone(), out.clone());
    let opened = path.clone();
    let mut tail = blocking(move || Tail::open(&opened, wanted, sender).map(Box::new)).await?;
    loop {
        tail = match blocking(move || tail.drain()).await? {
            Drained::Finished => return Ok(()),
            Drained::AtEnd(tail) => tail,
        };
        let Some(changes) = changes.as_mut() else { return Ok(()) };
        if !is_running().await {
            // Everything was written before the container ended, and the end is known now: one last look.
            blocking(move || tail.drain()).await?;
            return Ok(());
        }
        tokio::select! {
            () = changes.next() => {}
            () = out.closed() => return Ok(()),
        }
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

/// Events of one log file: writes, the writer closing it, rotation.
struct Changes {
    events: mpsc::Receiver<()>,
    _watcher: Option<notify::RecommendedWatcher>,
}

impl Changes {
    fn watch(path: &Path) -> Self {
        let (sender, events) = mpsc::channel(1);
        let name: OsString = path.file_name().unwrap_or_default().to_owned();
        let handler = move |event: notify::Result<notify::Event>| {
            let Ok(event) = event else { return };
            let matters = match event.kind {
                EventKind::Access(kind) => kind == AccessKind::Close(AccessMode::Write),
                EventKind::Create(_) | EventKind::Modify(_) | EventKind::Remove(_) => true,
                EventKind::Any | EventKind::Other => false,
            };
            if matters && event.paths.iter().any(|path| path.file_name() == Some(name.as_os_str())) {
                // A full channel holds a wake-up already.
                let _ = sender.try_send(());
            }
        };
        let watcher = notify::recommended_watcher(handler).and_then(|mut watcher| {
            let directory = path.parent().unwrap_or(Path::new("/"));
            watcher.watch(directory, RecursiveMode::NonRecursive)?;
            Ok(watcher)
        });
        let watcher = watcher.inspect_err(|error| tracing::debug!(%error, "the log is followed without inotify")).ok();
        Self { events, _watcher: watcher }
    }

    async fn next(&mut self) {
        // A closed channel means that there is no watcher: the time decides alone.
        let event = async {
            if self.events.recv().await.is_none() {
                std::future::pending::<()>().await
            }
        };
        let _ = tokio::time::timeout(RECHECK, event).await;
    }
}

enum Drained {
    /// The client has all that it wanted, or is gone.
    Finished,
    AtEnd(Box<Tail>),
}

/// The place in the current file up to which the client has everything.
struct Tail {
    path: PathBuf,
    file: BufReader<File>,
    inode: u64,
    line: Vec<u8>,
    format: Format,
    finished: bool,
}

impl Tail {
    /// Opens the log where the options begin; what rotated files contribute is sent at once.
    fn open(path: &Path, options: Options, out: mpsc::Sender<Bytes>) -> io::Result<Self> {
        let path = path.canonicalize().map_err(|error| named("failed to try resolving symlinks in path", path, &error))?;
        let file = File::open(&path).map_err(|error| named("failed to open log file", &path, &error))?;
        let inode = file.metadata()?.ino();
        let mut file = BufReader::with_capacity(CHUNK, file);
        let mut tail = options.tail;
        let start = match tail {
            Some(lines) => {
                let (start, found) = tail_start(file.get_mut(), lines)?;
                tail = Some(lines - found);
                start
            }
            None => 0,
        };
        let mut format = Format::new(options, out);
        let mut finished = false;
        if start == 0 && tail != Some(0) {
            finished = !send_rotated(&path, tail, &mut format)?;
        }
        file.seek(SeekFrom::Start(start))?;
        Ok(Self { path, file, inode, line: Vec::new(), format, finished })
    }

    /// Sends everything up to the end of the file, and of the next one when the runtime has changed over to it.
    fn drain(mut self: Box<Self>) -> io::Result<Drained> {
        loop {
            if self.finished || !self.read_to_end()? {
                return Ok(Drained::Finished);
            }
            let Some(next) = self.successor()? else { break };
            // The runtime has stopped writing to the old file by now: what came since is read before it's left.
            if !self.read_to_end()? {
                return Ok(Drained::Finished);
            }
            self.inode = next.metadata()?.ino();
            self.file = BufReader::with_capacity(CHUNK, next);
            self.line.clear();
        }
        if !self.format.options.follow && !self.line.is_empty() {
            let line = std::mem::take(&mut self.line);
            self.finished = !self.format.line(&line);
        }
        if !self.format.flush() || self.finished {
            return Ok(Drained::Finished);
        }
        Ok(Drained::AtEnd(self))
    }

    /// Whether the client wants more. An unfinished last line stays in `line`.
    fn read_to_end(&mut self) -> io::Result<bool> {
        loop {
            let room = MAX_LINE.saturating_sub(self.line.len() as u64);
            if room == 0 {
                self.line.clear();
                continue;
            }
            if self.file.by_ref().take(room).read_until(b'\n', &mut self.line)? == 0 {
                return Ok(true);
            }
            if self.line.last() == Some(&b'\n') {
                if !self.format.line(&self.line) {
                    return Ok(false);
                }
                self.line.clear();
            }
        }
    }

    /// The file that has taken the path over since.
    fn successor(&self) -> io::Result<Option<File>> {
        match File::open(&self.path) {
            Ok(file) => Ok(Some(file).filter(|file| file.metadata().is_ok_and(|metadata| metadata.ino() != self.inode))),
            // Between the rename and the new file, or after the pod's end.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn named(what: &str, path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what} {path:?}: {error}"))
}

/// Where the last `lines` lines begin, and how many there are; an unfinished line counts.
fn tail_start(file: &mut File, lines: u64) -> io::Result<(u64, u64)> {
    let length = file.metadata()?.len();
    let mut found = 0;
    let mut end = length;
    let mut block = vec![0; CHUNK];
    if lines == 0 {
        return Ok((length, 0));
    }
    while end > 0 {
        let start = end.saturating_sub(CHUNK as u64);
        let block = &mut block[..usize::try_from(end - start).unwrap_or(CHUNK)];
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(block)?;
        for (offset, byte) in block.iter().enumerate().rev() {
            let position = start + offset as u64;
            // The newline at the very end closes the last line and begins none.
            if *byte == b'\n' && position + 1 < length {
                found += 1;
                if found == lines {
                    return Ok((position + 1, lines));
                }
            }
        }
        end = start;
    }
    Ok((0, if length > 0 { found + 1 } else { 0 }))
}

/// Sends the end of what rotation has put aside; returns whether the client wants more.
fn send_rotated(path: &Path, tail: Option<u64>, format: &mut Format) -> io::Result<bool> {
    let files = rotated(path)?;
    let (mut first, mut skip) = (0, 0);
    if let Some(mut missing) = tail {
        first = files.len();
        while missing > 0 && first > 0 {
            first -= 1;
            let lines = count_lines(&files[first])?;
            skip = lines.saturating_sub(missing);
            missing = missing.saturating_sub(lines);
        }
    }
    for file in &files[first..] {
        let mut reader = open_rotated(file)?;
        let mut line = Vec::new();
        while reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line)? > 0 {
            if skip > 0 {
                skip -= 1;
            } else if !format.line(&line) {
                return Ok(false);
            }
            line.clear();
        }
    }
    Ok(true)
}

/// Rotated files, the oldest first: they carry the time of their rotation behind the log's name.
fn rotated(path: &Path) -> io::Result<Vec<PathBuf>> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else { return Ok(Vec::new()) };
    let mut files = Vec::new();
    for entry in directory.read_dir()? {
        let entry = entry?;
        let is_rotated = entry
            .file_name()
            .to_str()
            .and_then(|other| other.strip_prefix(name)?.strip_prefix('.'))
            .is_some_and(|suffix| suffix.starts_with(|first: char| first.is_ascii_digit()) && !suffix.ends_with(".tmp"));
        if is_rotated {
            files.push(entry.path());
        }
    }
    files.sort();
    Ok(files)
}

fn open_rotated(path: &Path) -> io::Result<Box<dyn BufRead>> {
    let file = File::open(path)?;
    if path.extension().is_some_and(|extension| extension == "gz") {
        return Ok(Box::new(BufReader::new(MultiGzDecoder::new(file))));
    }
    Ok(Box::new(BufReader::with_capacity(CHUNK, file)))
}

fn count_lines(path: &Path) -> io::Result<u64> {
    let mut reader = open_rotated(path)?;
    let mut lines = 0;
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            return Ok(lines);
        }
        lines += buffer.iter().filter(|byte| **byte == b'\n').count() as u64;
        let length = buffer.len();
        reader.consume(length);
    }
}

/// One line's parts.
#[derive(Debug, PartialEq, Eq)]
struct Line<'a> {
    time: &'a str,
    is_stdout: bool,
    /// With the newline, unless it is a piece of a longer line.
    text: &'a [u8],
}

fn parse(line: &[u8]) -> Option<Line<'_>> {
    let mut parts = line.splitn(4, |byte| *byte == b' ');
    let time = std::str::from_utf8(parts.next()?).ok()?;
    let is_stdout = match parts.next()? {
        b"stdout" => true,
        b"stderr" => false,
        _ => return None,
    };
    let is_piece = parts.next()?.split(|byte| *byte == b':').next() == Some(b"P");
    let text = parts.next()?;
    Some(Line { time, is_stdout, text: if is_piece { text.strip_suffix(b"\n").unwrap_or(text) } else { text } })
}

/// Writes lines in the way that the options ask for.
struct Format {
    options: Options,
    out: mpsc::Sender<Bytes>,
    pending: BytesMut,
    remaining: u64,
    /// Whether the next text begins a line of the program's output.
    at_line_start: bool,
}

impl Format {
    fn new(options: Options, out: mpsc::Sender<Bytes>) -> Self {
        let remaining = options.limit.unwrap_or(u64::MAX);
        Self { options, out, pending: BytesMut::new(), remaining, at_line_start: true }
    }

    /// Returns whether the client wants more. Lines that can't be parsed are left out.
    fn line(&mut self, line: &[u8]) -> bool {
        let Some(line) = parse(line) else { return true };
        let begins = std::mem::replace(&mut self.at_line_start, line.text.is_empty() || line.text.ends_with(b"\n"));
        if let Some(since) = self.options.since
            && line.time.parse::<Timestamp>().is_ok_and(|time| time < since)
        {
            return true;
        }
        if !(if line.is_stdout { self.options.stdout } else { self.options.stderr }) {
            return true;
        }
        if self.options.timestamps && begins {
            self.put(fixed_width(line.time).as_bytes());
            self.put(b" ");
        }
        self.put(line.text);
        if self.remaining == 0 {
            self.flush();
            return false;
        }
        self.pending.len() < CHUNK || self.flush()
    }

    fn put(&mut self, bytes: &[u8]) {
        let length = usize::try_from(self.remaining).unwrap_or(usize::MAX).min(bytes.len());
        self.pending.put_slice(&bytes[..length]);
        self.remaining -= length as u64;
    }

    /// Whether the client is still there.
    fn flush(&mut self) -> bool {
        self.pending.is_empty() || self.out.blocking_send(self.pending.split().freeze()).is_ok()
    }
}

/// Nine digits of a second's fraction, which Go's runtime writes without trailing zeros.
fn fixed_width(time: &str) -> String {
    let zone = time.find(['Z', '+']).or_else(|| time.rfind('-').filter(|position| *position > 10)).unwrap_or(time.len());
    let (clock, zone) = time.split_at(zone);
    let (seconds, fraction) = clock.split_once('.').unwrap_or((clock, ""));
    format!("{seconds}.{fraction:0<9}{zone}")
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    const LOG: &str = "2026-01-01T00:00:01.5Z stdout F one\n2026-01-01T00:00:02Z stderr F two\n2026-01-01T00:00:03Z stdout P thr\n2026-01-01T00:00:03Z stdout F ee\nnonsense\n2026-01-01T00:00:04Z stdout F four\n";

    fn all() -> Options {
        Options { tail: None, limit: None, since: None, follow: false, timestamps: false, stdout: true, stderr: true }
    }

    async fn read(path: &Path, options: &Options) -> String {
        let (sender, mut receiver) = mpsc::channel(64);
        copy(path, options, async || false, sender).await.unwrap();
        let mut text = Vec::new();
        while let Some(piece) = receiver.recv().await {
            text.extend_from_slice(&piece);
        }
        String::from_utf8(text).unwrap()
    }

    #[tokio::test]
    async fn options_choose_what_is_shown() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("0.log");
        std::fs::write(&path, LOG).unwrap();
        let cases = [
            (all(), "one\ntwo\nthree\nfour\n"),
            (Options { tail: Some(1), ..all() }, "four\n"),
            (Options { tail: Some(0), ..all() }, ""),
            (Options { tail: Some(3), ..all() }, "ee\nfour\n"),
            (Options { tail: Some(99), ..all() }, "one\ntwo\nthree\nfour\n"),
            (Options { limit: Some(6), ..all() }, "one\ntw"),
            (Options { since: Some("2026-01-01T00:00:02.5Z".parse().unwrap()), ..all() }, "three\nfour\n"),
            (Options { stdout: false, ..all() }, "two\n"),
            (
                Options { timestamps: true, limit: Some(80), ..all() },
                "2026-01-01T00:00:01.500000000Z one\n2026-01-01T00:00:02.000000000Z two\n2026-01-01",
            ),
            (Options { follow: true, ..all() }, "one\ntwo\nthree\nfour\n"),
        ];
        for (options, expected) in cases {
            assert_eq!(read(&path, &options).await, expected, "{options:?}");
        }
    }

    #[tokio::test]
    async fn rotated_files_come_first() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("0.log");
        let line = |text: &str| format!("2026-01-01T00:00:01Z stdout F {text}\n");
        let mut oldest = flate2::write::GzEncoder::new(
            File::create(directory.path().join("0.log.20260101-000000.gz")).unwrap(),
            flate2::Compression::fast(),
        );
        oldest.write_all((line("1") + &line("2")).as_bytes()).unwrap();
        oldest.finish().unwrap();
        std::fs::write(directory.path().join("0.log.20260101-000100"), line("3") + &line("4")).unwrap();
        std::fs::write(directory.path().join("0.log.20260101-000200.tmp"), line("unfinished")).unwrap();
        std::fs::write(directory.path().join("1.log"), line("other")).unwrap();
        std::fs::write(&path, line("5")).unwrap();
        let cases =
            [(None, "1\n2\n3\n4\n5\n"), (Some(1), "5\n"), (Some(2), "4\n5\n"), (Some(4), "2\n3\n4\n5\n"), (Some(9), "1\n2\n3\n4\n5\n")];
        for (tail, expected) in cases {
            assert_eq!(read(&path, &Options { tail, ..all() }).await, expected, "tail {tail:?}");
        }
    }

    #[tokio::test]
    async fn following_survives_rotation_and_ends_with_the_container() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("0.log");
        let line = |text: &str| format!("2026-01-01T00:00:01Z stdout F {text}\n");
        let append = |text: &str| File::options().append(true).create(true).open(&path).unwrap().write_all(text.as_bytes()).unwrap();
        append(&line("1"));
        let running = std::sync::Arc::new(AtomicBool::new(true));
        let (sender, mut receiver) = mpsc::channel(64);
        let follower = tokio::spawn({
            let (path, running) = (path.clone(), running.clone());
            async move { copy(&path, &Options { follow: true, ..all() }, async || running.load(Ordering::SeqCst), sender).await }
        });
        let mut expect = async |text: &str| assert_eq!(receiver.recv().await.as_deref(), Some(text.as_bytes()));
        expect("1\n").await;
        // In two writes: half a line must wait for its rest.
        append("2026-01-01T00:00:01Z std");
        append("out F 2\n");
        expect("2\n").await;
        std::fs::rename(&path, directory.path().join("0.log.20260101-000000")).unwrap();
        append(&line("3"));
        expect("3\n").await;
        running.store(false, Ordering::SeqCst);
        append(&line("4"));
        expect("4\n").await;
        assert_eq!(receiver.recv().await, None);
        follower.await.unwrap().unwrap();
    }

    #[test]
    fn times_get_nine_digits() {
        let cases = [
            ("2026-01-01T00:00:01Z", "2026-01-01T00:00:01.000000000Z"),
            ("2026-01-01T00:00:01.25+02:00", "2026-01-01T00:00:01.250000000+02:00"),
            ("2026-01-01T00:00:01.123456789-07:00", "2026-01-01T00:00:01.123456789-07:00"),
        ];
        for (time, expected) in cases {
            assert_eq!(fixed_width(time), expected);
        }
    }
}
