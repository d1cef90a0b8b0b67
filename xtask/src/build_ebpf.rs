//! `cargo xtask build-ebpf`: installs the two tools it lacks into the cache, compiles `ebpf/programs`, says what it did.
//!
//! The toolchain and the system's package sources are never touched: everything lands under `$OUTRIGGER_CACHE` (or
//! `~/.cache/outrigger`), one folder per tool and version. Each folder appears by one rename, so an interrupted run leaves
//! nothing half-made; a lock makes parallel runs take turns.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::debian::{self, Part};
use crate::paths;

const BPF_LINKER: &str = "0.13.0";
/// The Debian suite that carries `rust-src` for the pinned toolchain.
const DEBIAN_SUITE: &str = "trixie-backports";
const TARGET: &str = "bpfel-unknown-none";
/// Sources whose change makes the object stale.
const SOURCES: [&str; 3] = ["ebpf/abi", "ebpf/logic", "ebpf/programs"];
/// The objects, by the names of their binaries.
const OBJECTS: [&str; 2] = ["outrigger", "outrigger-police"];

/// Builds the eBPF objects unless they are up to date. Idempotent, safe to interrupt and to run in parallel.
pub fn run() -> Result<()> {
    let workspace = paths::workspace();
    let rust = Rust::probe(&workspace)?;
    let cache = paths::cache();
    let out = workspace.join("target/bpf");
    fs::create_dir_all(&cache).with_context(|| format!("create the cache folder {}", cache.display()))?;
    fs::create_dir_all(&out).with_context(|| format!("create {}", out.display()))?;
    let lock_path = cache.join("build-ebpf.lock");
    let lock = File::create(&lock_path).with_context(|| format!("create {}", lock_path.display()))?;
    lock.lock().with_context(|| format!("lock {}", lock_path.display()))?;

    let library = ensure_rust_src(&cache, &rust)?;
    let linker = ensure_bpf_linker(&cache, &rust)?;
    build(&workspace, &out, &rust, &library, &linker)
}

/// What the installed compiler says about itself.
struct Rust {
    release: String,
    verbose: String,
    sysroot: PathBuf,
}

impl Rust {
    fn probe(workspace: &Path) -> Result<Self> {
        let verbose = output(Command::new("rustc").arg("-vV").current_dir(workspace), "ask rustc for its version")?;
        let release = verbose
            .lines()
            .find_map(|line| line.strip_prefix("release: "))
            .context("rustc -vV names no release; is `rustc` in PATH the real compiler?")?
            .to_owned();
        let sysroot = output(Command::new("rustc").args(["--print", "sysroot"]).current_dir(workspace), "ask rustc for its sysroot")?;
        Ok(Self { release, verbose, sysroot: PathBuf::from(sysroot.trim()) })
    }

    /// `libLLVM` as shipped with rustc: bpf-linker must be of the same LLVM as the compiler whose bitcode it reads.
    fn lib_llvm(&self) -> Result<PathBuf> {
        let lib = self.sysroot.join("lib");
        let found = fs::read_dir(&lib)
            .with_context(|| format!("list {}", lib.display()))?
            .filter_map(|entry| entry.ok().map(|entry| entry.path()))
            .find(|path| path.file_name().and_then(OsStr::to_str).is_some_and(|name| name.starts_with("libLLVM.so.")));
        found.with_context(|| {
            format!(
                "{} holds no libLLVM.so.*: this rustc links LLVM statically; install the toolchain by rustup (1.95 or later)",
                lib.display()
            )
        })
    }

    fn llvm_major(&self) -> Result<u32> {
        let version =
            self.verbose.lines().find_map(|line| line.strip_prefix("LLVM version: ")).context("rustc -vV names no LLVM version")?;
        let major = version.split('.').next().and_then(|major| major.parse().ok());
        major.with_context(|| format!("LLVM version {version:?} is not a number"))
    }
}

/// The library source that `-Z build-std` compiles `core` from. Order: the toolchain's own component, the cache, Debian's
/// package, and a private rustup home.
fn ensure_rust_src(cache: &Path, rust: &Rust) -> Result<PathBuf> {
    let component = rust.sysroot.join("lib/rustlib/src/rust/library");
    if component.join("Cargo.lock").is_file() {
        say(&format!("rust-src {}: the toolchain's own component", rust.release));
        return Ok(component);
    }
    let library = cache.join("rust-src").join(&rust.release).join("library");
    if library.join("Cargo.lock").is_file() {
        say(&format!("rust-src {}: up to date", rust.release));
        return Ok(library);
    }
    say(&format!("rust-src {}: missing, installing (about 45 MB)", rust.release));
    let start = Instant::now();
    let install = Install::begin(&cache.join("rust-src").join(&rust.release))?;
    let origin = match rust_src_from_debian(&install.partial, &rust.release) {
        Ok(()) => format!("Debian's {DEBIAN_SUITE}"),
        Err(debian) => {
            say(&format!("rust-src {}: not from Debian ({debian:#}); trying rustup in a home of its own", rust.release));
            rust_src_from_rustup(&install.partial, &rust.release).with_context(|| {
                format!(
                    "rust-src {0} is in reach neither by apt ({debian:#}) nor by rustup.\n\
                     Next: run `rustup component add rust-src`, or unpack the library folder of Rust {0}'s source to {1}",
                    rust.release,
                    library.display()
                )
            })?;
            "rustup".to_owned()
        }
    };
    install.commit()?;
    say(&format!("rust-src {}: installed from {origin} in {}", rust.release, seconds(start)));
    Ok(library)
}

fn rust_src_from_debian(into: &Path, release: &str) -> Result<()> {
    let apt = into.join("apt");
    let deb = debian::download(&apt, DEBIAN_SUITE, Part::Binary, "rust-src")?;
    let version = output(Command::new("dpkg-deb").arg("-f").arg(&deb).arg("Version"), "read the package's version")?;
    ensure!(version.starts_with(&format!("{release}+")), "the suite has rust-src {}, the compiler is {release}", version.trim());
    output(Command::new("dpkg").arg("-x").arg(&deb).arg(apt.join("unpacked")), "unpack rust-src")?;
    let library = apt.join(format!("unpacked/usr/src/rustc-{release}/library"));
    fs::rename(&library, into.join("library")).with_context(|| format!("move {} into the cache", library.display()))?;
    fs::remove_dir_all(&apt).context("remove the throwaway apt state")
}

fn rust_src_from_rustup(into: &Path, release: &str) -> Result<()> {
    let home = into.join("rustup");
    let mut command = Command::new("rustup");
    command.env("RUSTUP_HOME", &home).args(["toolchain", "install", release, "--no-self-update", "--profile", "minimal", "-c", "rust-src"]);
    output(&mut command, "install rust-src into a rustup home of its own")?;
    let toolchain = fs::read_dir(home.join("toolchains")).context("list the private rustup home")?.next();
    let toolchain = toolchain.context("rustup installed no toolchain")?.context("read the private rustup home")?.path();
    fs::rename(toolchain.join("lib/rustlib/src/rust/library"), into.join("library")).context("move the library source into the cache")?;
    fs::remove_dir_all(&home).context("remove the private rustup home")
}

/// `bpf-linker`, linked against the LLVM of the very rustc that makes the bitcode.
fn ensure_bpf_linker(cache: &Path, rust: &Rust) -> Result<PathBuf> {
    let folder = cache.join("bpf-linker").join(format!("{BPF_LINKER}+rust{}", rust.release));
    let linker = folder.join("bin/bpf-linker");
    let works = || Command::new(&linker).arg("--version").stdin(Stdio::null()).output().is_ok_and(|output| output.status.success());
    if linker.is_file() {
        if works() {
            say(&format!("bpf-linker {BPF_LINKER}: up to date"));
            return Ok(linker);
        }
        say(&format!("bpf-linker {BPF_LINKER}: does not start (was the toolchain moved?), installing it again"));
        fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))?;
    } else {
        say(&format!("bpf-linker {BPF_LINKER}: missing, installing (about half a minute)"));
    }
    let start = Instant::now();
    let install = Install::begin(&folder)?;
    // The links live in the final folder's place once renamed; the linker finds libLLVM through them at run time too, so
    // they are absolute to the toolchain.
    let lib = install.partial.join("llvm/lib");
    fs::create_dir_all(&lib).context("create the LLVM prefix")?;
    let lib_llvm = rust.lib_llvm()?;
    let name = lib_llvm.file_name().context("libLLVM has no file name")?;
    for link in [name, OsStr::new("libLLVM.so")] {
        std::os::unix::fs::symlink(&lib_llvm, lib.join(link)).context("link libLLVM into the prefix")?;
    }
    let mut command = Command::new("cargo");
    command
        .args(["install", &format!("bpf-linker@{BPF_LINKER}"), "--locked", "--debug", "--no-default-features"])
        .args(["--features", &format!("llvm-{}", rust.llvm_major()?)])
        .arg("--root")
        .arg(&install.partial)
        .arg("--target-dir")
        .arg(install.partial.join("build"))
        .env("LLVM_PREFIX", install.partial.join("llvm"))
        .env("CARGO_PROFILE_DEV_DEBUG", "0")
        .env("RUSTFLAGS", format!("-Clink-arg=-Wl,-rpath,{}", rust.sysroot.join("lib").display()));
    clean_cargo_env(&mut command);
    output(&mut command, "install bpf-linker (it needs crates.io, a C++ linker and libLLVM of the toolchain)")?;
    let _ = fs::remove_dir_all(install.partial.join("build"));
    install.commit()?;
    ensure!(works(), "{} was built but does not start: run it by hand to see what is missing", linker.display());
    say(&format!("bpf-linker {BPF_LINKER}: installed in {}", seconds(start)));
    Ok(linker)
}

fn build(workspace: &Path, out: &Path, rust: &Rust, library: &Path, linker: &Path) -> Result<()> {
    let objects = OBJECTS.map(|name| (name, out.join(format!("{name}.bpf.o"))));
    let stamp = out.join("outrigger.bpf.fingerprint");
    let fingerprint = fingerprint(workspace, rust)?;
    let whole = objects.iter().all(|(_, object)| fs::metadata(object).is_ok_and(|meta| meta.len() > 0));
    if whole && fs::read_to_string(&stamp).is_ok_and(|old| old == fingerprint) {
        objects.iter().for_each(|(_, object)| say(&format!("{}: up to date", object.display())));
        return Ok(());
    }
    let start = Instant::now();
    let target_dir = out.join("build");
    let mut command = Command::new("cargo");
    command
        .current_dir(workspace.join("ebpf/programs"))
        .args(["build", "--release", "--locked", "--bins", "--target", TARGET, "-Z", "build-std=core"])
        .arg("--target-dir")
        .arg(&target_dir);
    clean_cargo_env(&mut command);
    command
        .env("RUSTC_BOOTSTRAP", "1")
        .env("__CARGO_TESTS_ONLY_SRC_ROOT", library)
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", linker)
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags());
    let status = command.stdin(Stdio::null()).status().context("start cargo for the eBPF programs")?;
    ensure!(
        status.success(),
        "the eBPF programs did not compile: see above (sources in ebpf/programs, shared with ebpf/logic and ebpf/abi)"
    );
    for (name, object) in &objects {
        let built = target_dir.join(TARGET).join("release").join(name);
        let partial = object.with_extension("partial");
        fs::copy(&built, &partial).with_context(|| format!("copy {}", built.display()))?;
        fs::rename(&partial, object).with_context(|| format!("put {} in place", object.display()))?;
        let size = fs::metadata(object).map(|meta| meta.len()).unwrap_or_default();
        say(&format!("{}: built in {} ({} KiB)", object.display(), seconds(start), size.div_ceil(1024)));
    }
    // An old stamp beside new objects would only cost a rebuild; a new stamp beside an old object would hide a change.
    fs::write(&stamp, fingerprint).with_context(|| format!("write {}", stamp.display()))?;
    Ok(())
}

fn rustflags() -> String {
    // aya-ebpf picks register layouts by the architecture that will run the programs. BTF comes from debug info.
    let arch = format!("--cfg=bpf_target_arch=\"{}\"", std::env::consts::ARCH);
    [arch.as_str(), "-Cdebuginfo=2", "-Clink-arg=--btf", "-Ctarget-cpu=v3"].join("\x1f")
}

/// Hash of every source file, the compiler and the tools' versions.
fn fingerprint(workspace: &Path, rust: &Rust) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(rust.verbose.as_bytes());
    hash.update(BPF_LINKER.as_bytes());
    hash.update(rustflags().as_bytes());
    let mut files = Vec::new();
    for source in SOURCES {
        list_files(&workspace.join(source), &mut files)?;
    }
    files.sort();
    for path in files {
        let bytes = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        hash.update(path.strip_prefix(workspace).unwrap_or(&path).as_os_str().as_encoded_bytes());
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(&bytes);
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn list_files(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
        let path = entry.with_context(|| format!("list {}", dir.display()))?.path();
        if path.is_dir() {
            if path.file_name() != Some(OsStr::new("target")) {
                list_files(&path, files)?;
            }
        } else {
            files.push(path);
        }
    }
    Ok(())
}

/// A folder that appears whole or not at all.
struct Install {
    partial: PathBuf,
    folder: PathBuf,
}

impl Install {
    /// Clears what an interrupted run left; the caller holds the cache's lock.
    fn begin(folder: &Path) -> Result<Self> {
        let mut name = folder.file_name().context("a cache folder needs a name")?.to_os_string();
        name.push(".partial");
        let partial = folder.with_file_name(name);
        for stale in [partial.as_path(), folder] {
            if stale.exists() {
                fs::remove_dir_all(stale).with_context(|| format!("remove the remains in {}", stale.display()))?;
            }
        }
        fs::create_dir_all(&partial).with_context(|| format!("create {}", partial.display()))?;
        Ok(Self { partial, folder: folder.to_path_buf() })
    }

    fn commit(self) -> Result<()> {
        fs::rename(&self.partial, &self.folder).with_context(|| format!("put {} in place", self.folder.display()))
    }
}

/// The outer cargo's variables would bend the inner one: target folder, flags and wrappers are set by hand.
fn clean_cargo_env(command: &mut Command) {
    for key in [
        "CARGO_TARGET_DIR",
        "CARGO_BUILD_TARGET",
        "CARGO_BUILD_TARGET_DIR",
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_INCREMENTAL",
        "RUSTC",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
    ] {
        command.env_remove(key);
    }
    if command.get_envs().all(|(key, _)| key != OsStr::new("RUSTFLAGS")) {
        command.env_remove("RUSTFLAGS");
    }
}

/// Runs to the end and hands back its output; on failure the error carries what it printed.
fn output(command: &mut Command, what: &str) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let done = match command.stdin(Stdio::null()).output() {
        Ok(done) => done,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => bail!("{what}: `{name}` is not installed or not in PATH"),
        Err(error) => return Err(error).with_context(|| format!("{what}: start `{name}`")),
    };
    if !done.status.success() {
        let stderr = String::from_utf8_lossy(&done.stderr);
        let tail: Vec<&str> = stderr.lines().rev().take(15).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        bail!("{what}: `{name}` ended with {}:\n{}", done.status, tail.join("\n"));
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

fn seconds(since: Instant) -> String {
    format!("{:.1} s", since.elapsed().as_secs_f32())
}

fn say(message: &str) {
    eprintln!("build-ebpf: {message}");
}
