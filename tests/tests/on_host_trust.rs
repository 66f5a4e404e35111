//! Files of other users (cache, kernel, helper programs) are not trusted, and set-user-ID copies do not run. No test
//! needs KVM.
#![expect(clippy::print_stdout, reason = "skipped tests are reported")]

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tests::{Outcome, kindling, run, testbed};

const OTHER_USER: u32 = 12345;

/// A folder with the user's cache, and `kindling run` of busybox that uses it.
struct UserFolder(tempfile::TempDir);

impl UserFolder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, program: Command, image: &Path, kernel: &Path) -> Outcome {
        let mut command = program;
        command.args(["run", "--pull", "never"]).arg(image).arg("true").current_dir(self.0.path());
        command.env("XDG_CACHE_HOME", self.path("cache")).env("XDG_RUNTIME_DIR", self.path("runtime"));
        run(command.env("KINDLING_IMAGE", kernel).stdin(Stdio::null()))
    }

    /// Copies the busybox image.
    fn image(&self, name: &str) -> PathBuf {
        let to = self.path(name);
        fs::create_dir(&to).unwrap();
        for entry in fs::read_dir(testbed("images/busybox")).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_file() {
                fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
            }
        }
        to
    }

    /// The number of files in the kernel cache.
    fn kernels(&self) -> usize {
        fn files(folder: &Path) -> usize {
            let Ok(entries) = fs::read_dir(folder) else { return 0 };
            entries
                .map(Result::unwrap)
                .map(|entry| if entry.path().is_dir() { files(&entry.path()) } else { 1 })
                .sum()
        }
        files(&self.path("cache/kindling/kernels"))
    }
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// Kernels are cached by the digest in image.json, so an image with a false digest must not replace the kernel of
/// another image.
#[test]
fn a_kernel_with_a_false_digest_is_not_cached() {
    let scratch = UserFolder::new();
    let evil = scratch.image("evil");
    let kernel = evil.join("vmlinux");
    let mut bytes = fs::read(&kernel).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&kernel, bytes).unwrap();
    let outcome = scratch.run(kindling(), &testbed("busybox.erofs"), &evil);
    outcome
        .expect_status(2)
        .expect_stderr("vmlinux is not the file that image.json describes: its SHA-256 is");
    assert_eq!((outcome.stderr.lines().count(), scratch.kernels()), (1, 0), "{outcome}");
}

/// In a folder that only the user can change, a file may still be one that others can write.
#[test]
fn a_kernel_file_that_others_can_change_is_refused() {
    let scratch = UserFolder::new();
    let image = scratch.image("image");
    for name in ["image.json", "vmlinux", "initramfs.cpio"] {
        let file = image.join(name);
        let refused = |expected: &str| {
            let outcome = scratch.run(kindling(), &testbed("busybox.erofs"), &image);
            outcome.expect_status(2).expect_stderr(expected);
            assert_eq!(scratch.kernels(), 0, "{outcome}");
        };
        mode(&file, 0o666);
        refused(&format!("other users can write to {}", file.display()));
        mode(&file, 0o644);
        if chown(&file, Some(OTHER_USER), None).is_ok() {
            refused("belongs to the user 12345, who is neither this user nor root");
            chown(&file, Some(0), None).unwrap();
        }
    }
}

/// Another user could replace a volume by a link to a file of the user.
#[test]
fn volumes_in_a_directory_that_others_can_write_are_refused() {
    let scratch = UserFolder::new();
    let volume = |line: &str| {
        let mut command = kindling();
        command.arg("volume").args(line.split(' ')).env("XDG_DATA_HOME", scratch.path("data"));
        run(&mut command)
    };
    volume("create --size 16M disk").expect_status(0);
    for folder in ["data", "data/kindling", "data/kindling/volumes"] {
        mode(&scratch.path(folder), 0o777);
        for line in ["ls", "rm disk", "create --size 16M new"] {
            volume(line)
                .expect_status(2)
                .expect_stderr("cannot use the directory of volumes: other users can");
        }
        mode(&scratch.path(folder), 0o700);
    }
    volume("rm disk").expect_status(0);
}

/// The digest is used as part of a path.
#[test]
fn a_digest_that_is_not_hexadecimal_is_refused() {
    let scratch = UserFolder::new();
    let evil = scratch.image("evil");
    let description = fs::read_to_string(evil.join("image.json")).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&description).unwrap();
    json["kernel"]["sha256"] = "../../../../escaped/0000".into();
    fs::write(evil.join("image.json"), json.to_string()).unwrap();
    let outcome = scratch.run(kindling(), &testbed("busybox.erofs"), &evil);
    outcome.expect_status(2).expect_stderr("is not a SHA-256: 64 hexadecimal digits");
    assert_eq!(scratch.kernels(), 0);
}

#[test]
fn a_cache_writable_by_other_users_is_refused() {
    let scratch = UserFolder::new();
    let (image, kernel) = (testbed("busybox.erofs"), testbed("images/busybox"));
    fs::create_dir_all(scratch.path("cache/kindling")).unwrap();
    for folder in ["cache", "cache/kindling"] {
        mode(&scratch.path(folder), 0o777);
        let outcome = scratch.run(kindling(), &image, &kernel);
        outcome
            .expect_status(2)
            .expect_stderr("cannot use the directory of pre-booted kernels: other users can write to ");
        let mut convert = Command::new(testbed("kindling-oci"));
        convert.args(["prepare", "--pull", "never", "debian"]).env("XDG_CACHE_HOME", scratch.path("cache"));
        run(&mut convert)
            .expect_status(2)
            .expect_stderr("the cache cannot be used: other users can write to ");
        mode(&scratch.path(folder), 0o755);
    }
    assert_eq!(scratch.kernels(), 0);
}

#[test]
fn a_helper_program_of_another_user_does_not_run() {
    let scratch = UserFolder::new();
    let (program, helper) = (scratch.path("kindling"), scratch.path("kindling-oci"));
    fs::copy(testbed("kindling"), &program).unwrap();
    fs::write(&helper, format!("#!/bin/sh\ntouch {}\n", scratch.path("ran").display())).unwrap();
    let refused = |expected: &str| {
        let outcome = scratch.run(Command::new(&program), Path::new("debian"), &testbed("images/busybox"));
        outcome.expect_status(2).expect_stderr(expected);
        assert!(!scratch.path("ran").exists(), "{outcome}");
    };
    mode(&helper, 0o777);
    refused("kindling-oci; `chmod go-w");
    mode(&helper, 0o755);
    if chown(&helper, Some(OTHER_USER), None).is_ok() {
        refused("belongs to the user 12345, who is neither this user nor root");
    } else {
        println!("skipped: creating a file of another user requires root");
    }
}

/// The lock's path is a link that another user created.
#[test]
fn creating_a_lock_does_not_truncate_the_target_of_a_link() {
    let scratch = UserFolder::new();
    let precious = scratch.path("precious");
    fs::write(&precious, "content").unwrap();
    let folder = scratch.path("cache/kindling/oci/v1");
    fs::create_dir_all(&folder).unwrap();
    fs::create_dir(folder.join(".draft-key")).unwrap();
    symlink(&precious, folder.join("key.lock")).unwrap();
    let mut prune = Command::new(testbed("kindling-oci"));
    let outcome = run(prune.arg("prune").env("XDG_CACHE_HOME", scratch.path("cache")));
    assert_eq!(fs::read_to_string(&precious).unwrap(), "content", "{outcome}");
}

#[test]
fn copies_with_a_set_id_bit_refuse_to_run() {
    let scratch = UserFolder::new();
    for name in ["kindling", "kindling-vmm", "kindling-oci", "kindling-fs"] {
        let copy = scratch.path(name);
        fs::copy(testbed(name), &copy).unwrap();
        if copy.metadata().unwrap().uid() != 0 || chown(&copy, Some(OTHER_USER), Some(OTHER_USER)).is_err() {
            println!("skipped: creating a set-user-ID file of another user requires root");
            return;
        }
        mode(scratch.0.path(), 0o755);
        for bit in [0o4755, 0o2755] {
            mode(&copy, bit);
            let outcome = run(Command::new(&copy).arg("doctor"));
            outcome.expect_stderr("does not run with the set-user-ID or set-group-ID bit");
            assert_ne!(outcome.status, Some(0), "{outcome}");
        }
    }
}
