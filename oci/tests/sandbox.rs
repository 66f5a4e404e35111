//! The program is in its sandbox before it reads an image or an answer of a registry.

mod support;

use landlock::{AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr};
use std::fs;
use std::io::{PipeWriter, Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use support::{Layer, Packing, Workspace};

/// CAP_DAC_READ_SEARCH as a bit.
const READ_SEARCH: u64 = 1 << 2;

fn program(workspace: &Workspace, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kindling-oci"));
    command.args(words).current_dir(workspace.folder.path()).env("KINDLING_CACHE", workspace.path("cache"));
    command
}

/// The value of a line of a process's status.
fn status(child: &Child, name: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap().trim().to_owned()
}

/// Checks the layers of a process that can be seen from outside; `capabilities` are all that it has.
fn check(child: &Child, capabilities: u64) {
    for (name, value) in [("NoNewPrivs", "1"), ("Seccomp", "2")] {
        assert_eq!(status(child, name), value, "{name}");
    }
    for name in ["CapEff", "CapPrm"] {
        assert_eq!(u64::from_str_radix(&status(child, name), 16).unwrap(), capabilities, "{name}");
    }
    let limits = fs::read_to_string(format!("/proc/{}/limits", child.id())).unwrap();
    let limit = |name: &str, hard: u64| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        let found = line.split_whitespace().nth(1).unwrap();
        assert!(found.parse::<u64>().is_ok_and(|found| found <= hard), "{name}: {found}");
    };
    limit("Max core file size", 0);
    limit("Max address space", 4 << 30);
    limit("Max file size", 2 << 40);
    limit("Max open files", 256);
    limit("Max cpu time", 86_400);
}

/// A pipe that is full, so that a process that writes to it waits.
fn full_pipe() -> (std::io::PipeReader, PipeWriter) {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let bytes = rustix::pipe::fcntl_getpipe_size(&writer).unwrap();
    writer.write_all(&vec![0; bytes]).unwrap();
    (reader, writer)
}

/// Runs the program until it prints its result, checks it, and lets it end.
fn check_until_it_prints(workspace: &Workspace, words: &[&str], capabilities: u64) {
    let (mut reader, writer) = full_pipe();
    let mut child = program(workspace, words).stdout(writer).spawn().unwrap();
    let start = Instant::now();
    // It waits in write(1, ...).
    let syscall = |child: &Child| fs::read_to_string(format!("/proc/{}/syscall", child.id())).unwrap();
    while !syscall(&child).starts_with("1 0x1 ") {
        assert!(
            start.elapsed() < Duration::from_secs(60) && child.try_wait().unwrap().is_none(),
            "{words:?}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    check(&child, capabilities);
    reader.read_to_end(&mut Vec::new()).unwrap();
    assert!(child.wait().unwrap().success(), "{words:?}");
}

#[test]
fn every_command_is_in_the_sandbox() {
    let workspace = Workspace::new();
    workspace.layout().write(vec![Layer::new().file("a", "b")], Packing::Gzip);
    check_until_it_prints(&workspace, &["prepare", "./image"], 0);
    check_until_it_prints(&workspace, &["prepare", "./image"], 0);
    check_until_it_prints(&workspace, &["ls"], 0);
    check_until_it_prints(&workspace, &["rm", "./image"], 0);
    check_until_it_prints(&workspace, &["prepare", "./image"], 0);
    check_until_it_prints(&workspace, &["prune", "--unused", "0"], 0);
}

#[test]
fn a_registry_meets_the_sandbox() {
    let workspace = Workspace::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let image = format!("{}/app", listener.local_addr().unwrap());
    let mut child = program(&workspace, &["prepare", &image]).stderr(Stdio::piped()).spawn().unwrap();
    let (mut connection, _) = listener.accept().unwrap();
    connection.read_exact(&mut [0; 4]).unwrap();
    check(&child, 0);
    connection.write_all(b"HTTP/1.1 404 X\r\nContent-Length: 0\r\n\r\n").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(2));
}

#[test]
#[expect(clippy::print_stdout, reason = "says which test is skipped")]
fn root_reads_an_image_that_only_another_user_can_read() {
    if !rustix::process::geteuid().is_root() {
        println!("only root can read the files of others");
        return;
    }
    let workspace = Workspace::new();
    workspace.layout().write(vec![Layer::new().file("a", "b")], Packing::Gzip);
    fs::set_permissions(workspace.path("image"), fs::Permissions::from_mode(0o700)).unwrap();
    chown(workspace.path("image"), Some(12345), None).unwrap();
    check_until_it_prints(&workspace, &["prepare", "./image"], READ_SEARCH);
}

#[test]
#[expect(clippy::print_stdout, reason = "says which test is skipped")]
fn links_of_an_image_lead_nowhere_else() {
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    if ruleset.handle_access(AccessFs::ReadFile).is_err() {
        println!("links may lead to other files: the kernel has no Landlock");
        return;
    }
    let workspace = Workspace::new();
    workspace.layout().write(vec![Layer::new().file("a", "b")], Packing::Gzip);
    fs::rename(workspace.path("image/index.json"), workspace.path("index.json")).unwrap();
    symlink("../index.json", workspace.path("image/index.json")).unwrap();
    let output = program(&workspace, &["prepare", "./image"]).output().unwrap();
    let line = String::from_utf8(output.stderr).unwrap();
    assert!(line.contains("links that lead out of an image are not followed"), "{line}");
    fs::rename(workspace.path("index.json"), workspace.path("image/inside.json")).unwrap();
    fs::remove_file(workspace.path("image/index.json")).unwrap();
    symlink("inside.json", workspace.path("image/index.json")).unwrap();
    assert!(program(&workspace, &["prepare", "./image"]).status().unwrap().success());
}
