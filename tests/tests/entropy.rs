//! The entropy device.

use std::collections::BTreeSet;
use tests::{boot, run};

#[test]
fn hwrng_returns_different_bytes_on_each_read() {
    let script = "for i in 1 2 3; do dd if=/dev/hwrng bs=1024 count=4 2>/dev/null > /tmp/$i; \
                  wc -c < /tmp/$i; md5sum < /tmp/$i; done";
    let outcome = run(boot().args(["--entropy", "--", "/bin/sh", "-c", script]));
    let lines: Vec<&str> = outcome.expect_status(0).stdout.lines().collect();
    assert_eq!(lines.iter().filter(|line| **line == "4096").count(), 3, "{outcome}");
    let digests: BTreeSet<_> = lines.iter().filter(|line| line.contains(" -")).collect();
    assert_eq!(digests.len(), 3, "{outcome}");
}

#[test]
fn without_the_option_there_is_no_entropy_device() {
    let script = "dd if=/dev/hwrng bs=16 count=1 2>/dev/null | wc -c";
    let outcome = run(boot().args(["--", "/bin/sh", "-c", script]));
    assert_eq!(outcome.expect_status(0).stdout.trim(), "0", "{outcome}");
}
