//! Hands the linker the order of this program's code and what it leaves out: `boot-code.ld` and `no-unwinding.ld` say
//! why.

use std::env;

fn main() {
    let script = |name: &str| {
        println!("cargo:rerun-if-changed={name}");
        println!("cargo:rustc-link-arg-bins=-T{}/{name}", env!("CARGO_MANIFEST_DIR"));
    };
    script("boot-code.ld");
    // Tests unwind where they fail, and only a release aborts.
    if env::var_os("PROFILE").is_some_and(|profile| profile == "release") {
        script("no-unwinding.ld");
        println!("cargo:rustc-link-arg-bins=-Wl,--no-eh-frame-hdr");
    }
}
