//! A root filesystem that does not match image.json is refused before the boot.

use std::fs::File;
use std::path::Path;
use std::process::Stdio;
use tests::{Image, kindling, run, testbed};

/// Runs `kindling boot` of an image and checks its one-line error.
#[track_caller]
fn refused(image: &Path, options: &[&str], expected: &str) {
    let outcome = run(kindling().args(["boot", "--image"]).arg(image).args(options).stdin(Stdio::null()));
    outcome.expect_status(2).expect_stderr(expected);
    assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
}

#[test]
fn a_root_of_another_size_content_or_file_type_is_refused() {
    let image = Image::copy_of("root");
    let root = image.path().join("root.erofs");
    let file = File::options().write(true).open(&root).unwrap();
    let size = file.metadata().unwrap().len();
    file.set_len(size - 4096).unwrap();
    let expected = format!("root.erofs is not the file that image.json describes: it has {}", size - 4096);
    refused(image.path(), &[], &expected);
    // The original size, with zeroes at the end.
    file.set_len(size).unwrap();
    refused(
        image.path(),
        &["--verify"],
        "root.erofs is not the file that image.json describes: its SHA-256 is",
    );
    std::fs::remove_file(&root).unwrap();
    refused(image.path(), &[], "root.erofs: No such file");
    std::os::unix::fs::symlink(testbed("images/root/root.erofs"), &root).unwrap();
    refused(image.path(), &[], "it is not a regular file");
}
