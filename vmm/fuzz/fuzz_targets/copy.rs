//! Fuzzes the stream of `kindling cp` from a guest: nothing appears outside of the destination.
#![no_main]

use guest_copy::{Destination, Sender, receive};
use libfuzzer_sys::fuzz_target;
use std::fs::{File, create_dir, read_dir};
use std::io::{Seek, Write};
use std::os::unix::ffi::OsStrExt;

fuzz_target!(|bytes: &[u8]| {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let inside = folder.path().join("destination");
    create_dir(&inside).unwrap();
    let mut stream: File = tempfile::tempfile_in("/dev/shm").unwrap();
    stream.write_all(bytes).unwrap();
    stream.rewind().unwrap();
    let destination = Destination {
        path: inside.as_os_str().as_bytes(),
        sender: Sender::Untrusted,
        name: None,
        keeps_owners: false,
        mode_bits: 0o777,
    };
    let _ = receive(destination, &stream);
    assert_eq!(read_dir(folder.path()).unwrap().count(), 1);
});
