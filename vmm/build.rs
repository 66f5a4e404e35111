//! Passes linker scripts that order a program's code (`boot-code.ld`) and remove its unwind tables (`no-unwinding.ld`);
//! the scripts give the reasons. This is the build script of both programs that run machines, `kindling-vmm` and
//! `kindling`.

use std::env;

fn main() {
    // Cargo sets it. The value when this script was compiled would be wrong in a moved or copied workspace.
    let package = env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    let script = |name: &str| {
        let path = format!("{package}/../vmm/{name}");
        println!("cargo:rerun-if-changed={path}");
        println!("cargo:rustc-link-arg-bins=-T{path}");
    };
    script("boot-code.ld");
    // A page fault maps the 16 pages around it, from one multiple of 64 KiB to the next. The code of a boot starts at
    // such a multiple, so that it spans as few of these blocks as possible (the kernel preserves a program's alignment:
    // `maximum_alignment` in fs/binfmt_elf.c).
    //
    // A position-independent program relocates itself first. Its packed relocations take 1 KiB instead of 77 KiB.
    println!(
        "cargo:rustc-link-arg-bins=-Wl,-z,max-page-size=65536,-z,separate-loadable-segments,-z,pack-relative-relocs"
    );
    // Tests unwind when they fail, so that only a release build discards the tables.
    if env::var_os("PROFILE").is_some_and(|profile| profile == "release") {
        script("no-unwinding.ld");
        println!("cargo:rustc-link-arg-bins=-Wl,--no-eh-frame-hdr");
    }
}
