//! pmem devices: files of the host mapped as guest memory.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use tests::guest_console::{GuestConsole, PREAMBLE};
use tests::{kindling, run, testbed};

/// Waits for the device, which the kernel probes asynchronously.
const WAIT: &str = "until [ -b /dev/pmem0 ]; do sleep 0.01; done;";

/// `kindling boot` of the image whose kernel has the driver.
fn boot() -> Command {
    let mut command = kindling();
    command.arg("boot").arg("--image").arg(testbed("images/pmem")).stdin(Stdio::null());
    command
}

fn option(path: &Path, flags: &str) -> String {
    format!("{}{flags}", path.display())
}

#[test]
fn a_read_only_file_of_any_size_can_be_read() {
    let file = tempfile::NamedTempFile::new().unwrap();
    // 3 MiB and 5 bytes, with a word at each end and one in the middle.
    for (offset, word) in [(0, "first"), (2 << 20, "middle"), (3 << 20, "last!")] {
        file.as_file().write_all_at(word.as_bytes(), offset).unwrap();
    }
    let script = format!(
        "{WAIT} for at in 0 2 3 4; do dd if=/dev/pmem0 bs=1M skip=$at count=1 2>/dev/null | tr -d '\\0'; \
         echo; done; wc -c < /dev/pmem0"
    );
    let outcome = run(boot().args(["--pmem", &option(file.path(), ":ro"), "--", "/bin/sh", "-c", &script]));
    assert_eq!(outcome.expect_status(0).stdout, "first\nmiddle\nlast!\n\n4194304\n", "{outcome}");
}

#[test]
fn flushed_writes_reach_the_file() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4 << 20).unwrap();
    let script = format!(
        "{WAIT} printf kept | dd of=/dev/pmem0 bs=1 seek=3000000 conv=fsync,notrunc 2>/dev/null && echo written"
    );
    let outcome = run(boot().args(["--pmem", &option(file.path(), ""), "--", "/bin/sh", "-c", &script]));
    assert_eq!(outcome.expect_status(0).stdout, "written\n", "{outcome}");
    let mut bytes = [0; 4];
    file.as_file().read_exact_at(&mut bytes, 3_000_000).unwrap();
    assert_eq!(&bytes, b"kept");
}

#[test]
fn writes_to_a_read_only_device_do_not_reach_the_file() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(2 << 20).unwrap();
    file.as_file().write_all_at(b"old", 0).unwrap();
    let script = format!(
        "{WAIT} echo new | dd of=/dev/pmem0 conv=fsync,notrunc 2>/dev/null; dd if=/dev/pmem0 bs=3 count=1 2>/dev/null"
    );
    let outcome = run(boot().args(["--pmem", &option(file.path(), ":ro"), "--", "/bin/sh", "-c", &script]));
    outcome.expect_status(0);
    let mut bytes = [0; 3];
    file.as_file().read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"old");
}

#[test]
fn guests_that_map_the_same_file_share_its_pages() {
    let path = testbed("pmem.erofs");
    let script = format!(
        "{PREAMBLE} {WAIT} mkdir /tmp/m; mount -t erofs -o ro,dax=always /dev/pmem0 /tmp/m || exit 3; \
         grep -q 'erofs.*dax=always' /proc/mounts || exit 4; \
         cat /tmp/m/word; md5sum < /tmp/m/large; wait_line"
    );
    let start = || {
        let mut command = boot();
        command.args(["--pmem", &option(&path, ":ro"), "--", "/bin/sh", "-c", &script]);
        GuestConsole::start(&mut command)
    };
    let mut guests = [start(), start()];
    let digests = guests.each_mut().map(|guest| {
        guest.expect("a word");
        guest.expect("")
    });
    assert_eq!(digests[0], digests[1]);
    let size = File::open(&path).unwrap().metadata().unwrap().len() / 1024;
    let sum = |field: &str| -> [u64; 2] {
        guests.each_ref().map(|guest| {
            let lines = guest.smaps_of("pmem.erofs").concat();
            let numbers = lines.lines().filter_map(|line| line.strip_prefix(field));
            numbers.map(|text| text.trim().trim_end_matches(" kB").parse::<u64>().unwrap()).sum()
        })
    };
    let (rss, pss) = (sum("Rss:"), sum("Pss:"));
    // Each guest maps nearly the whole file, and half of each page counts for its PSS.
    assert!(rss.iter().all(|rss| rss * 10 > size * 9), "{size} KiB: Rss {rss:?}, Pss {pss:?}");
    assert!(pss.iter().sum::<u64>() * 10 < size * 11, "{size} KiB: Rss {rss:?}, Pss {pss:?}");
    for mut guest in guests {
        guest.send_line();
        guest.expect_status(0);
    }
}

#[test]
fn truncating_the_file_ends_the_guest_with_an_explanation() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4 << 20).unwrap();
    let script =
        format!("{PREAMBLE} {WAIT} echo ready; wait_line; cat /dev/pmem0 > /dev/null; echo still here");
    for flags in ["", ":ro"] {
        let option = option(file.path(), flags);
        let mut guest = GuestConsole::start(boot().args(["--pmem", &option, "--", "/bin/sh", "-c", &script]));
        guest.expect("ready");
        file.as_file().set_len(1 << 20).unwrap();
        guest.send_line();
        let errors = guest.expect_end("exit status: 125");
        let expected = format!("{} is mapped as guest memory and was truncated", file.path().display());
        assert!(errors.contains(&expected), "{errors}");
        file.as_file().set_len(4 << 20).unwrap();
    }
}

#[test]
fn missing_files_and_writable_files_of_an_unaligned_size_are_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(5).unwrap();
    run(boot().args(["--pmem", &option(file.path(), "")]))
        .expect_status(2)
        .expect_stderr("its 5 bytes are not a multiple of 2 MiB; extend it with truncate -s 2M");
    run(boot().args(["--pmem", "/no/such/file"]))
        .expect_status(2)
        .expect_stderr("/no/such/file cannot be a pmem device");
}
