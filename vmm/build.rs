//! Hands the linker the order of this program's code: `boot-code.ld` says why there is one.

fn main() {
    const ORDER: &str = "boot-code.ld";
    println!("cargo:rerun-if-changed={ORDER}");
    println!("cargo:rustc-link-arg-bins=-T{}/{ORDER}", env!("CARGO_MANIFEST_DIR"));
}
