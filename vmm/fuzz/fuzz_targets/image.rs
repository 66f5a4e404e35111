//! Fuzzes the documents of images: index, manifest and configuration of an OCI layout, and the list of a docker archive.
#![no_main]

#[path = "../common/layout.rs"]
#[expect(dead_code, reason = "another target uses the rest")]
mod layout;

use layout::{Layout, MANIFEST_TYPE, convert};
use libfuzzer_sys::fuzz_target;

const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";
/// An empty archive.
const LAYER: &[u8] = &[0; 1024];

fuzz_target!(|input: (u8, &[u8])| {
    let (document, bytes) = input;
    let layout = Layout::new();
    let layer = layout.layer(LAYER);
    match document % 5 {
        0 => std::fs::write(layout.path().join("index.json"), bytes).unwrap(),
        1 => layout.index(&[layout.blob(INDEX_TYPE, bytes)]),
        2 => layout.index(&[layout.blob(MANIFEST_TYPE, bytes)]),
        3 => {
            let config = layout.blob("application/vnd.oci.image.config.v1+json", bytes);
            layout.index(&[layout.manifest(&config, &[layer])]);
        }
        _ => {
            let path = layout.path().join("saved.tar");
            std::fs::write(&path, archive(bytes)).unwrap();
            let _ = convert(&path);
            return;
        }
    }
    let _ = layout.convert();
});

/// A docker archive with this list, and the files that it may name.
fn archive(list: &[u8]) -> Vec<u8> {
    const CONFIG: &[u8] = br#"{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[]}}"#;
    let mut archive = Vec::new();
    for (name, bytes) in [("manifest.json", list), ("c", CONFIG), ("l", LAYER)] {
        let mut header = [0; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..107].copy_from_slice(b"0000644");
        header[124..135].copy_from_slice(format!("{:011o}", bytes.len()).as_bytes());
        header[156] = b'0';
        header[257..265].copy_from_slice(b"ustar\x0000");
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|&byte: &u8| u32::from(byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        archive.extend(header);
        archive.extend(bytes);
        archive.resize(archive.len().next_multiple_of(512), 0);
    }
    archive.extend([0; 1024]);
    archive
}
