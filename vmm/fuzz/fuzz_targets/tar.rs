//! Fuzzes the reader of layers, which are tar archives, compressed or not, and the merge of layers: any entries, in headers of
//! each format, and arbitrary bytes are converted or refused.
#![no_main]

#[path = "../common/layout.rs"]
mod layout;

use layout::Layout;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

/// An entry, whose header has a valid checksum: libFuzzer seldom finds one.
#[derive(Arbitrary, Debug)]
struct Entry<'a> {
    /// A file, a link, a list of attributes, a long name, ...
    flag: u8,
    name: &'a [u8],
    link: &'a [u8],
    /// Other sizes than that of the data.
    size: Option<[u8; 12]>,
    /// Mode, owner, group.
    numbers: Option<[u8; 24]>,
    format: u8,
    /// The end of the header: owners' names, devices, prefix, maps of sparse files.
    rest: &'a [u8],
    data: &'a [u8],
}

fuzz_target!(|layers: (Vec<Entry<'_>>, Vec<Entry<'_>>, &[u8])| {
    let [first, second] = [&layers.0, &layers.1].map(|entries| {
        let mut archive = Vec::new();
        for entry in entries {
            archive.extend(entry.header());
            archive.extend(entry.data);
            archive.resize(archive.len().next_multiple_of(512), 0);
        }
        archive.extend([0; 1024]);
        archive
    });
    let _ = Layout::image(&[&first, &second]).convert();
    let _ = Layout::image(&[layers.2]).convert();
});

impl Entry<'_> {
    fn header(&self) -> [u8; 512] {
        let mut header = [0; 512];
        let mut put = |at: usize, max: usize, bytes: &[u8]| {
            let length = bytes.len().min(max);
            header[at..at + length].copy_from_slice(&bytes[..length]);
        };
        put(0, 100, self.name);
        put(100, 24, &self.numbers.unwrap_or(*b"0000644\x000000000\x000000000\0"));
        put(124, 12, &self.size.unwrap_or_else(|| std::array::from_fn(|at| octal(self.data.len(), at))));
        put(136, 12, b"00000000000\0");
        put(156, 1, &[self.flag]);
        put(157, 100, self.link);
        put(257, 8, [&b"ustar\x0000"[..], b"ustar  \0", b""][usize::from(self.format % 3)]);
        put(265, 247, self.rest);
        put(148, 8, b"        ");
        let sum: u32 = header.iter().map(|&byte: &u8| u32::from(byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        header
    }
}

/// A digit of a number of eleven.
fn octal(number: usize, at: usize) -> u8 {
    if at < 11 { b'0' + (number >> (3 * (10 - at)) & 7) as u8 } else { 0 }
}
