//! Passes linker scripts that order a program's code (`boot-code.ld`) and remove its unwind tables (`no-unwinding.ld`);
//! the scripts give the reasons. This is the build script of both programs that run machines, `kindling-vmm` and
//! `kindling`.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

fn main() {
    // Cargo sets it. The value when this script was compiled would be wrong in a moved or copied workspace.
    let package = env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    if env::var("CARGO_PKG_NAME").is_ok_and(|name| name == "kindling-vmm") {
        println!("cargo:rustc-env=KINDLING_PROTOCOL={:016x}", protocol_version(Path::new(&package)));
    }
    let script = |path: String| {
        println!("cargo:rerun-if-changed={path}");
        println!("cargo:rustc-link-arg-bins=-T{path}");
    };
    script(format!("{package}/boot-code.ld"));
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
        script(format!("{package}/../vmm/no-unwinding.ld"));
        println!("cargo:rustc-link-arg-bins=-Wl,--no-eh-frame-hdr");
    }
}

/// What front and monitor compare before they exchange anything else: a hash (FNV-1a) of the sources of the types in their
/// messages, which are all over the package. The version of the package is the same in different builds.
fn protocol_version(package: &Path) -> u64 {
    const SOURCES: [&str; 2] = ["src", "../guest-init/protocol/src"];
    let mut files: Vec<_> = SOURCES.iter().flat_map(|source| files_in(&package.join(source))).collect();
    files.sort();
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for file in files {
        println!("cargo:rerun-if-changed={}", file.display());
        for byte in fs::read(file).unwrap_or_default() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    hash
}

/// A file, or all files in a directory and those below it.
fn files_in(path: &Path) -> Vec<PathBuf> {
    match fs::read_dir(path) {
        Ok(entries) => entries.flatten().flat_map(|entry| files_in(&entry.path())).collect(),
        Err(_) => vec![path.to_owned()],
    }
}
