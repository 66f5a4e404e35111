//! Hands the linker the order of this program's code and what it leaves out: `boot-code.ld` and `no-unwinding.ld` say
//! why.

use std::env;

fn main() {
    let script = |name: &str| {
        println!("cargo:rerun-if-changed={name}");
        println!("cargo:rustc-link-arg-bins=-T{}/{name}", env!("CARGO_MANIFEST_DIR"));
    };
    script("boot-code.ld");
    // A page fault maps the 16 pages around it, from one multiple of 64 KiB to the next. The code of a boot starts at
    // one, so that it ends in as few of them as it can (the kernel keeps a program's alignment: `maximum_alignment` in
    // fs/binfmt_elf.c).
    println!("cargo:rustc-link-arg-bins=-Wl,-z,max-page-size=65536,-z,separate-loadable-segments");
    // Tests unwind where they fail, and only a release aborts.
    if env::var_os("PROFILE").is_some_and(|profile| profile == "release") {
        script("no-unwinding.ld");
        println!("cargo:rustc-link-arg-bins=-Wl,--no-eh-frame-hdr");
    }
}
