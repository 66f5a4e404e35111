//! `kindling cp` copies files into and out of a running guest, completely or not at all.

use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, UNIX_EPOCH};
use tests::guest_console::GuestConsole;
use tests::user::User;
use tests::{Outcome, run};

/// A running guest, and a folder on the host.
struct Guest {
    user: User,
    conversation: GuestConsole,
}

impl Guest {
    fn start(options: &[&str]) -> Self {
        let user = User::new();
        let options = [&["--name", "one"], options].concat();
        let mut command = user.run(&options);
        let mut conversation = GuestConsole::start(command.args(["sh", "-c", "echo ready; read -r line"]));
        conversation.expect("ready");
        fs::create_dir(user.folder().join("here")).expect("cannot make a folder");
        Self { user, conversation }
    }

    fn here(&self, name: &str) -> PathBuf {
        self.user.folder().join("here").join(name)
    }

    /// `kindling cp`, started in the host's folder.
    fn cp(&self, arguments: &[&str]) -> Command {
        let mut command = self.user.command("cp");
        command.args(arguments).current_dir(self.here(""));
        command
    }

    #[track_caller]
    fn copied(&self, arguments: &[&str]) {
        let outcome = run(&mut self.cp(arguments));
        outcome.expect_status(0);
        assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("", ""));
    }

    /// A copy that fails with a one-line message.
    #[track_caller]
    fn refused(&self, arguments: &[&str], status: i32, text: &str) {
        expect_line(&run(&mut self.cp(arguments)), status, text);
    }

    #[track_caller]
    fn shell(&self, script: &str) -> String {
        run(self.user.command("exec").args(["one", "sh", "-c", script])).expect_status(0).stdout.clone()
    }
}

#[track_caller]
fn expect_line(outcome: &Outcome, status: i32, text: &str) {
    outcome.expect_status(status).expect_stderr(text);
    assert_eq!((outcome.stdout.as_str(), outcome.stderr.lines().count()), ("", 1), "{outcome}");
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("cannot set a mode");
}

/// Names, modes (with types), modification times, sizes and hashes of all files below a folder.
fn list(folder: &Path) -> Vec<String> {
    let mut paths: Vec<_> =
        fs::read_dir(folder).expect("no folder").map(|entry| entry.expect("no entry").path()).collect();
    paths.sort();
    let mut lines = Vec::new();
    for path in paths {
        let data = path.symlink_metadata().expect("no metadata");
        let content = match data.file_type() {
            kind if kind.is_symlink() => {
                fs::read_link(&path).expect("no link").into_os_string().into_encoded_bytes()
            }
            kind if kind.is_file() => fs::read(&path).expect("cannot read"),
            _ => Vec::new(),
        };
        let name = path.strip_prefix(folder).expect("a prefix");
        let (mode, seconds, nanoseconds) = (data.mode(), data.mtime(), data.mtime_nsec());
        let mut hasher = DefaultHasher::new();
        hasher.write(&content);
        let (length, hash) = (content.len(), hasher.finish());
        lines.push(format!("{name:?} {mode:o} {seconds}.{nanoseconds:09} {length} bytes, {hash:x}"));
        if data.is_dir() {
            lines.extend(list(&path));
        }
    }
    lines
}

#[test]
fn trees_are_copied_unchanged_in_both_directions() {
    let guest = Guest::start(&[]);
    let tree = guest.here("tree");
    fs::create_dir_all(tree.join("deep/er")).unwrap();
    fs::create_dir(tree.join("empty")).unwrap();
    fs::write(tree.join("deep/er/file"), "content").unwrap();
    fs::write(tree.join("nothing"), "").unwrap();
    fs::write(tree.join("long"), vec![9; 200_000]).unwrap();
    fs::write(tree.join(std::ffi::OsStr::from_bytes(b"odd \xff\n")), "odd").unwrap();
    symlink("/nowhere", tree.join("link")).unwrap();
    let file = fs::File::options().write(true).open(tree.join("nothing")).unwrap();
    file.set_modified(UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789)).unwrap();
    mode(&tree.join("nothing"), 0o640);
    mode(&tree.join("deep"), 0o711);
    let before = list(&tree);

    guest.copied(&["tree", "one:/srv"]);
    let seen = guest.shell("cd /srv; stat -c '%n %a %u %g %Y' nothing deep; readlink link; cat deep/er/file");
    let words: Vec<_> = seen.split_whitespace().collect();
    assert_eq!(words[..5], ["nothing", "640", "0", "0", "1000000000"]);
    assert_eq!((&words[5..9], &words[10..]), (&["deep", "711", "0", "0"][..], &["/nowhere", "content"][..]));
    guest.copied(&["one:/srv", "back"]);
    assert_eq!(list(&guest.here("back")), before);
    // Into an existing directory, and over existing files.
    guest.copied(&["one:srv", "back"]);
    assert_eq!(list(&guest.here("back/srv")), before);
    fs::remove_dir_all(guest.here("back/srv")).unwrap();
    fs::write(guest.here("back/long"), "other").unwrap();
    guest.copied(&["one:/srv/.", "back/"]);
    assert_eq!(list(&guest.here("back")), before);
    guest.copied(&["tree/.", "one:/srv"]);
    guest.copied(&["tree", "one:/srv/"]);
    assert_eq!(guest.shell("cd /srv; ls -d tree/deep/er; ls | wc -l"), "tree/deep/er\n7\n");
}

#[test]
fn archive_mode_keeps_owners_and_set_id_bits_never_reach_the_host() {
    let guest = Guest::start(&[]);
    let file = guest.here("file");
    fs::write(&file, "x").unwrap();
    let is_root = std::os::unix::fs::chown(&file, Some(5), Some(6)).is_ok();
    mode(&file, 0o4755);
    guest.copied(&["file", "one:/tmp/plain"]);
    guest.copied(&["-a", "file", "one:/tmp/kept"]);
    let owner = file.metadata().map(|data| format!("{}:{}", data.uid(), data.gid())).unwrap();
    assert_eq!(guest.shell("stat -c '%u:%g %a' /tmp/plain /tmp/kept"), format!("0:0 4755\n{owner} 4755\n"));
    guest
        .shell("cp /bin/busybox /tmp/tool; chown 7:8 /tmp/tool; chmod 6755 /tmp/tool; mknod /tmp/null c 1 3");
    guest.copied(&["one:/tmp/tool", "."]);
    let data = guest.here("tool").metadata().unwrap();
    assert_eq!(data.mode() & 0o7777, 0o755);
    assert_eq!(data.uid(), guest.here("").metadata().unwrap().uid());
    if is_root {
        guest.copied(&["-a", "one:/tmp/tool", "kept"]);
        let data = guest.here("kept").metadata().unwrap();
        assert_eq!((data.uid(), data.gid(), data.mode() & 0o7777), (7, 8, 0o755));
    }
    guest.refused(&["one:/tmp/null", "."], 1, "in the guest one: /tmp/null is neither");
    let outcome = run(&mut guest.cp(&["one:/tmp", "all"]));
    outcome.expect_status(0).expect_stderr("skipped special files, for example /tmp/null");
    assert!(guest.here("all/kept").exists() && !guest.here("all/null").exists());
}

#[test]
fn links_in_the_guest_are_resolved_in_the_guest() {
    let guest = Guest::start(&[]);
    guest.shell("mkdir /data; ln -s /data /short; ln -s /data/target /data/link; echo old > /data/target");
    fs::write(guest.here("file"), "new").unwrap();
    guest.copied(&["file", "one:/short"]);
    guest.copied(&["file", "one:/short/link"]);
    assert_eq!(guest.shell("cat /data/file /data/target; readlink /data/link"), "newnew/data/target\n");
    guest.copied(&["one:/short", "link"]);
    assert_eq!(fs::read_link(guest.here("link")).unwrap(), Path::new("/data"));
    guest.copied(&["-L", "one:/short", "followed"]);
    assert_eq!(fs::read(guest.here("followed/file")).unwrap(), b"new");
    guest.copied(&["one:/short/.", "contents"]);
    assert_eq!(fs::read(guest.here("contents/file")).unwrap(), b"new");
}

/// A guest cannot write outside the destination on the host by means of symbolic links.
#[test]
fn links_copied_from_a_guest_are_not_followed_on_the_host() {
    let guest = Guest::start(&[]);
    let outside = guest.user.folder().join("outside");
    fs::create_dir(&outside).unwrap();
    guest.shell(&format!("mkdir -p /a /b/way; ln -s {} /a/way; echo bad > /b/way/file", outside.display()));
    guest.copied(&["one:/a/.", "to"]);
    guest.refused(&["one:/b/.", "to"], 1, "to/way exists and is not a directory");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
}

/// The last component of a destination is not followed either: it may be a link from an earlier copy, or one that the
/// guest created in a shared folder.
#[test]
fn a_destination_that_is_a_link_from_a_guest_is_not_followed() {
    let guest = Guest::start(&[]);
    let (home, rc) = (guest.user.folder().to_owned(), guest.user.folder().join("rc"));
    fs::write(&rc, "old").unwrap();
    // The same command twice: first for a link, then for a file or a tree in place of the link.
    guest.shell("ln -s ../rc /r.txt; ln -s .. /out");
    guest.copied(&["one:/r.txt", "."]);
    guest.copied(&["one:/out", "."]);
    guest.shell("rm /r.txt /out; echo bad > /r.txt; mkdir /out; echo bad > /out/rc");
    guest.copied(&["one:/r.txt", "r.txt"]);
    assert_eq!(fs::read(guest.here("r.txt")).unwrap(), b"bad\n");
    for (source, destination) in
        [("one:/out/.", "out"), ("one:/out/.", "out/"), ("one:/out/.", "out/."), ("one:/r.txt", "out")]
    {
        guest.refused(&[source, destination], 1, " is a symbolic link, which is not followed");
    }
    guest.refused(&["one:/out", "."], 1, "out exists and is not a directory");
    assert_eq!(fs::read(&rc).unwrap(), b"old");
    assert!(!home.join("r.txt").exists());
}

#[test]
fn links_in_a_shared_folder_do_not_lead_out_of_it() {
    let home = tempfile::tempdir().unwrap();
    let shared = home.path().join("shared");
    fs::create_dir(&shared).unwrap();
    let guest = Guest::start(&["-v", &format!("{}:/shared", shared.display())]);
    guest.shell("ln -s .. /shared/out; ln -s ../rc /shared/r.txt; mkdir /tree; echo bad > /tree/rc");
    let to = |name: &str| shared.join(name).into_os_string().into_string().unwrap();
    guest.refused(&["one:/tree/.", &to("out")], 1, "is a symbolic link");
    guest.copied(&["one:/tree/rc", &to("r.txt")]);
    assert_eq!(fs::read(shared.join("r.txt")).unwrap(), b"bad\n");
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1);
}

#[test]
fn existing_directories_keep_their_mode_and_new_files_obey_the_umask() {
    let guest = Guest::start(&[]);
    fs::create_dir_all(guest.here("home/.ssh")).unwrap();
    mode(&guest.here("home/.ssh"), 0o700);
    guest.shell("mkdir -p /home/.ssh /home/new; echo x > /home/new/file; chmod -R 0777 /home");
    let mut masked = Command::new("sh");
    let cp = guest.cp(&["one:/home/.", "home"]);
    masked.args(["-c", "umask 027; exec \"$@\"", "sh"]).arg(cp.get_program()).args(cp.get_args());
    masked.current_dir(guest.here("")).envs(cp.get_envs().filter_map(|(name, value)| Some((name, value?))));
    run(&mut masked).expect_status(0);
    let mode = |name: &str| guest.here(name).metadata().unwrap().mode() & 0o7777;
    assert_eq!([mode("home/.ssh"), mode("home/new"), mode("home/new/file")], [0o700, 0o750, 0o750]);
}

#[test]
fn each_failed_copy_names_the_file_and_the_reason() {
    let guest = Guest::start(&[]);
    fs::write(guest.here("file"), "x").unwrap();
    fs::create_dir(guest.here("tree")).unwrap();
    guest.shell("mkdir /there; echo x > /file");
    for (arguments, status, text) in [
        (&["file", "tree"][..], 2, "must be NAME:PATH"),
        (&["one:/a", "one:/b"], 2, "must be NAME:PATH"),
        (&["-", "one:/a"], 2, "tar stream"),
        (&["two:/a", "b"], 2, "no guest named two"),
        (&["nothing", "one:/a"], 1, "kindling: cannot open nothing: No such file"),
        (&["one:/nothing", "a"], 1, "in the guest one: cannot open /nothing: No such file"),
        (&["file", "one:/no/where"], 1, "in the guest one: cannot open /no: No such file"),
        (&["one:/file", "no/where"], 1, "kindling: cannot open no: No such file"),
        (&["file", "one:/missing/"], 1, "directory /missing/ does not exist"),
        (&["tree", "one:/file"], 1, "/file exists and is not a directory"),
        (&["one:/there", "file"], 1, "file exists and is not a directory"),
        (&["file/", "one:/a"], 1, "Not a directory"),
        (&["file", "one:/proc/x"], 1, "in the guest one: cannot create /proc/x"),
    ] {
        guest.refused(arguments, status, text);
    }
    assert_eq!(fs::read_dir(guest.here("")).unwrap().count(), 2);
}

/// Pseudorandom data, so that misplaced bytes are detected.
struct Noise(u64);

impl Read for Noise {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let mut filled = 0;
        for word in buffer.chunks_exact_mut(8) {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            word.copy_from_slice(&self.0.to_le_bytes());
            filled += 8;
        }
        Ok(filled)
    }
}

const MIB: u64 = 1 << 20;

/// The peak resident memory of a process in KiB.
#[expect(unsafe_code, reason = "wait4 has no safe wrapper in std")]
#[expect(clippy::zombie_processes, reason = "wait4 waits for it")]
fn peak_of(mut command: Command) -> i64 {
    let child = command.spawn().expect("cannot start");
    let (mut status, mut usage) = (0, std::mem::MaybeUninit::<libc::rusage>::zeroed());
    let pid = i32::try_from(child.id()).expect("a process id");
    // SAFETY: the kernel writes both, which live as long as the call; an all-zero rusage is valid.
    let usage = unsafe {
        assert_eq!(libc::wait4(pid, &raw mut status, 0, usage.as_mut_ptr()), pid);
        usage.assume_init()
    };
    assert_eq!(status, 0, "the command failed");
    usage.ru_maxrss
}

/// Resident memory of the VMM in KiB without guest memory, which is in its large mappings.
fn vmm_kib(guest: &Guest) -> u64 {
    let smaps = fs::read_to_string(guest.conversation.process().join("smaps")).expect("the VMM has ended");
    let numbers = |name: &str| -> Vec<u64> {
        let lines = smaps.lines().filter_map(|line| line.strip_prefix(name));
        lines.map(|line| line.trim().trim_end_matches(" kB").parse().expect("no number")).collect()
    };
    const LARGE: u64 = 4 << 10;
    numbers("Size:").iter().zip(numbers("Rss:")).filter(|(size, _)| **size < LARGE).map(|(_, rss)| rss).sum()
}

#[test]
fn a_large_copy_does_not_grow_the_memory_of_client_and_vmm() {
    const SIZE: u64 = 16 * MIB;
    // With a pre-booted kernel, part of guest memory would be a mapping of its file.
    let guest = Guest::start(&["--memory", "1024", "--cold"]);
    let mut file = fs::File::create(guest.here("large")).unwrap();
    std::io::copy(&mut Noise(1).take(SIZE), &mut file).unwrap();
    let small = guest.here("small");
    fs::write(&small, "x").unwrap();
    guest.copied(&["small", "one:/tmp/small"]);
    let before = vmm_kib(&guest);
    let client = peak_of(guest.cp(&["large", "one:/tmp/large"]));
    let in_vmm = vmm_kib(&guest);
    fs::remove_file(guest.here("large")).unwrap();
    let client_back = peak_of(guest.cp(&["one:/tmp/large", "large"]));
    let out_vmm = vmm_kib(&guest);
    assert!(client.max(client_back) < 8 << 10, "{client} and {client_back} KiB");
    assert!(in_vmm.max(out_vmm) < before + 1024, "{before}, then {in_vmm} and {out_vmm} KiB");
    let mut expected = Noise(1);
    let (mut file, mut left) = (fs::File::open(guest.here("large")).unwrap(), SIZE);
    let (mut found, mut wanted) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    while left > 0 {
        file.read_exact(&mut found).unwrap();
        expected.read_exact(&mut wanted).unwrap();
        assert!(found == wanted, "unexpected content {left} bytes before the end");
        left -= MIB;
    }
    assert_eq!(file.read(&mut found).unwrap(), 0);
}

impl Guest {
    /// Starts to copy 30 MB from the guest over an existing file, and returns while the copy is running.
    fn fetching(&self) -> Child {
        self.shell("head -c 30000000 /dev/zero > /tmp/large");
        fs::write(self.here("large"), "old").unwrap();
        let mut command = self.cp(&["one:/tmp/large", "large"]);
        let child = command.stderr(Stdio::piped()).spawn().expect("cannot start");
        while !self.has_draft() {
            std::thread::yield_now();
        }
        child
    }

    fn has_draft(&self) -> bool {
        let mut entries = fs::read_dir(self.here("")).expect("no folder");
        entries.any(|entry| entry.expect("no entry").file_name().as_bytes().starts_with(b".kindling-cp"))
    }

    /// Waits for an interrupted copy, checks that it has changed nothing, and returns its outcome.
    #[track_caller]
    fn unfinished(&self, child: Child) -> Outcome {
        let output = child.wait_with_output().expect("cannot wait");
        assert_eq!(fs::read(self.here("large")).unwrap(), b"old");
        assert!(!self.has_draft());
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Outcome { status: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }
}

#[test]
fn a_copy_from_a_guest_that_dies_leaves_no_partial_file() {
    let guest = Guest::start(&["--memory", "1024"]);
    let child = guest.fetching();
    guest.conversation.signal(libc::SIGKILL);
    let outcome = guest.unfinished(child);
    expect_line(&outcome, 1, "the guest ended, or its agent closed the connection");
}

#[test]
fn an_interrupted_copy_leaves_no_partial_file() {
    let guest = Guest::start(&["--memory", "1024"]);
    let child = guest.fetching();
    tests::kill(child.id(), libc::SIGTERM);
    let outcome = guest.unfinished(child);
    assert_eq!((outcome.status, outcome.stderr.as_str()), (Some(128 + libc::SIGTERM), ""));
    // Into the guest: the agent removes its partial file when the connection closes.
    let file = fs::File::create(guest.here("endless")).unwrap();
    file.set_len(1).unwrap();
    std::io::copy(&mut Noise(3).take(48 * MIB), &mut &file).unwrap();
    guest.shell("mkdir /to; rm /tmp/large");
    let child = guest.cp(&["endless", "one:/to"]).stderr(Stdio::piped()).spawn().unwrap();
    guest.shell("until [ -n \"$(ls -A /to)\" ]; do usleep 1000; done");
    tests::kill(child.id(), libc::SIGINT);
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), &output.stderr[..]), (Some(128 + libc::SIGINT), &b""[..]));
    guest.shell("while [ -n \"$(ls -A /to)\" ]; do usleep 1000; done");
}

#[test]
fn a_full_disk_is_reported_and_leaves_no_partial_file() {
    let guest = Guest::start(&[]);
    let mut file = fs::File::create(guest.here("large")).unwrap();
    file.write_all(&vec![1; 3 << 20]).unwrap();
    guest.shell("mkdir /full; mount -t tmpfs -o size=1m none /full; echo old > /full/large");
    let text = "in the guest one: cannot write /full/large: No space left on device";
    guest.refused(&["large", "one:/full"], 1, text);
    assert_eq!(guest.shell("ls -A /full; cat /full/large"), "large\nold\n");
    // On the host, a file size limit simulates a full disk.
    guest.copied(&["large", "one:/tmp"]);
    fs::remove_file(guest.here("large")).unwrap();
    let mut limited = Command::new("sh");
    let cp = guest.cp(&["one:/tmp/large", "."]);
    limited.args(["-c", "trap '' XFSZ; ulimit -f 64; exec \"$@\"", "sh"]).arg(cp.get_program());
    limited.args(cp.get_args()).current_dir(guest.here(""));
    limited.envs(cp.get_envs().filter_map(|(name, value)| Some((name, value?))));
    expect_line(&run(&mut limited), 1, "kindling: cannot write ./large: File too large");
    assert_eq!(fs::read_dir(guest.here("")).unwrap().count(), 0);
}
