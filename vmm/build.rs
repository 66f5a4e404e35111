//! Hands the linker the order of a program's code and what it leaves out: `boot-code.ld` and `no-unwinding.ld` say
//! why. It is the build script of both programs that run machines, `kindling-vmm` and `kindling`.

use std::env;

fn main() {
    let script = |name: &str| {
        let path = format!("{}/../vmm/{name}", env!("CARGO_MANIFEST_DIR"));
        println!("cargo:rerun-if-changed={path}");
        println!("cargo:rustc-link-arg-bins=-T{path}");
    };
    script("boot-code.ld");
    // A page fault maps the 16 pages around it, from one multiple of 64 KiB to the next. The code of a boot starts at
    // one, so that it ends in as few of them as it can (the kernel keeps a program's alignment: `maximum_alignment` in
    // fs/binfmt_elf.c).
    //
    // A position-independent program relocates itself first. Packed, its relocations are 1 KiB instead of 77.
    println!(
        "cargo:rustc-link-arg-bins=-Wl,-z,max-page-size=65536,-z,separate-loadable-segments,-z,pack-relative-relocs"
    );
    // Tests unwind where they fail, and only a release aborts.
    if env::var_os("PROFILE").is_some_and(|profile| profile == "release") {
        script("no-unwinding.ld");
        println!("cargo:rustc-link-arg-bins=-Wl,--no-eh-frame-hdr");
    }
}
