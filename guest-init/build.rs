//! Links init without the C runtime, because it has its own entry point.
#![allow(missing_docs, clippy::print_stdout, reason = "a build script speaks to cargo on stdout")]

fn main() {
    for argument in
        ["-nostartfiles", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-z,norelro"]
    {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
    println!("cargo::rerun-if-changed=build.rs");
}
