//! Hands the linker the order of this program's code and what it leaves out: `boot-code.ld` and `no-unwinding.ld` say
//! why.

fn main() {
    for script in ["boot-code.ld", "no-unwinding.ld"] {
        println!("cargo:rerun-if-changed={script}");
        println!("cargo:rustc-link-arg-bins=-T{}/{script}", env!("CARGO_MANIFEST_DIR"));
    }
    println!("cargo:rustc-link-arg-bins=-Wl,--no-eh-frame-hdr");
}
