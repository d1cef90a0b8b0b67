//! Generates the CRI client and containerd's event messages from their protocol files; no `protoc` is needed.
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["proto/runtime/v1/api.proto", "proto/containerd/events.proto", "proto/grpc/health.proto"];
    for file in files {
        println!("cargo::rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure().build_server(false).disable_comments(["."]).compile_fds(descriptors)?;
    Ok(())
}
