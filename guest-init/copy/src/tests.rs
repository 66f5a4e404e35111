//! Sender and receiver together, and the receiver with malicious streams.

extern crate std;
use crate::entry::{Entry, Kind};
use crate::{CHUNK, Destination, Failure, FailureKind, MAX_DEPTH, Sender, Source, receive, send};
use alloc::vec;
use alloc::vec::Vec;
use proptest::prelude::*;
use rustix::fs::{CWD, Mode, Timespec, Timestamps, UTIME_OMIT};
use std::fs;
use std::io::{Seek, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::prelude::rust_2024::*;
use std::{format, thread};

fn destination(path: &Path) -> Destination<'_> {
    let path = path.as_os_str().as_bytes();
    Destination { path, sender: Sender::Trusted, name: None, keeps_owners: false, mode_bits: 0o7777 }
}

/// The destination of a copy from a guest to the host.
fn from_guest(path: &[u8]) -> Destination<'_> {
    Destination { path, sender: Sender::Untrusted, name: None, keeps_owners: false, mode_bits: 0o755 }
}

fn copy(from: &Path, name: &str, to: Destination<'_>) -> Result<Option<Failure>, Failure> {
    let (read, write) = rustix::pipe::pipe().unwrap();
    thread::scope(|scope| {
        let sender = scope.spawn(move || {
            let source = Source { path: from.as_os_str().as_bytes(), name: name.as_bytes(), follows: false };
            send(source, write)
        });
        let received = receive(to, read);
        let sent = sender.join().unwrap();
        received.and(sent)
    })
}

/// Receives a stream of these bytes.
fn receive_bytes(bytes: &[u8], to: Destination<'_>) -> Result<(), Failure> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    receive(to, file)
}

fn entry(kind: Kind, name: &[u8]) -> Vec<u8> {
    let name_length = u8::try_from(name.len()).unwrap();
    [&Entry { kind, name_length, mode: 0o644, ..Entry::END_OF_DIRECTORY }.to_bytes()[..], name].concat()
}

fn chunk(offset: u64, bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).unwrap();
    [&offset.to_le_bytes()[..], &length.to_le_bytes(), bytes].concat()
}

fn set_time(path: &Path, seconds: i64, nanoseconds: i64) {
    let times = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: seconds, tv_nsec: nanoseconds },
    };
    rustix::fs::utimensat(CWD, path, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// Names, kinds, modes, times and contents below a folder.
fn list(folder: &Path) -> Vec<std::string::String> {
    let mut lines = Vec::new();
    let mut names: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    for path in names {
        let metadata = path.symlink_metadata().unwrap();
        let content = match metadata.file_type() {
            kind if kind.is_symlink() => fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec(),
            kind if kind.is_file() => fs::read(&path).unwrap(),
            _ => Vec::new(),
        };
        lines.push(format!(
            "{:?} {:o} {}.{:09} {:?}",
            path.file_name().unwrap(),
            metadata.mode(),
            metadata.mtime(),
            metadata.mtime_nsec(),
            content
        ));
        if metadata.is_dir() {
            lines.extend(list(&path));
        }
    }
    lines
}

/// Creates a tree with every kind of file and attribute that is copied.
fn create_tree(root: &Path) {
    fs::create_dir_all(root.join("deep/er")).unwrap();
    fs::write(root.join("deep/er/file"), b"content").unwrap();
    fs::write(root.join("empty"), b"").unwrap();
    fs::write(root.join("long"), vec![7; 3 * CHUNK + 5]).unwrap();
    fs::write(root.join("run"), b"#!").unwrap();
    fs::set_permissions(root.join("run"), Permissions::from_mode(0o4751)).unwrap();
    symlink("/nowhere", root.join("link")).unwrap();
    fs::write(root.join(std::ffi::OsStr::from_bytes(b"\xff\n")), b"odd").unwrap();
    set_time(&root.join("deep/er/file"), 1_000_000_000, 123_456_789);
    set_time(&root.join("link"), -5, 1);
    fs::set_permissions(root.join("deep"), Permissions::from_mode(0o711)).unwrap();
    set_time(&root.join("deep"), 5, 7);
}

use std::fs::Permissions;

#[test]
fn a_tree_is_copied_completely() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("from"), folder.path().join("to"));
    create_tree(&from);
    assert_eq!(copy(&from, "from", destination(&to)), Ok(None));
    assert_eq!(list(&from), list(&to));
    // Again, over the existing tree.
    assert_eq!(copy(&from, ".", destination(&to)), Ok(None));
    assert_eq!(list(&from), list(&to));
    // Into the existing directory.
    assert_eq!(copy(&from, "from", destination(&to)), Ok(None));
    assert_eq!(list(&from), list(&to.join("from")));
}

#[test]
fn mode_bits_outside_the_mask_are_cleared() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("from"), folder.path().join("to"));
    create_tree(&from);
    copy(&from, "from", Destination { mode_bits: 0o777, ..destination(&to) }).unwrap();
    assert_eq!(to.join("run").metadata().unwrap().mode() & 0o7777, 0o751);
}

#[test]
fn holes_are_preserved() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("from"), folder.path().join("to"));
    let mut file = fs::File::create(&from).unwrap();
    file.seek(std::io::SeekFrom::Start(1 << 30)).unwrap();
    file.write_all(b"middle").unwrap();
    file.set_len(1 << 31).unwrap();
    copy(&from, "from", destination(&to)).unwrap();
    let copied = to.metadata().unwrap();
    assert_eq!(copied.len(), 1 << 31);
    assert!(copied.blocks() <= file.metadata().unwrap().blocks().max(64), "{} blocks", copied.blocks());
    let mut bytes = [0; 8];
    std::os::unix::fs::FileExt::read_exact_at(&fs::File::open(&to).unwrap(), &mut bytes, (1 << 30) - 1)
        .unwrap();
    assert_eq!(&bytes, b"\0middle\0");
}

#[test]
fn destinations_resolve_as_in_cp() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::write(path("file"), b"new").unwrap();
    create_tree(&path("tree"));
    fs::create_dir(path("existing")).unwrap();
    let to = |name: &str| copy(&path("file"), "file", destination(&path(name)));
    let tree_to = |name: &str| copy(&path("tree"), "tree", destination(&path(name)));
    // An unused name, and the name of an existing file.
    to("fresh").unwrap();
    fs::write(path("old"), b"old").unwrap();
    to("old").unwrap();
    assert_eq!(fs::read(path("old")).unwrap(), b"new");
    // A directory through a link.
    symlink("existing", path("link")).unwrap();
    to("link").unwrap();
    assert_eq!(fs::read(path("existing/file")).unwrap(), b"new");
    // The target of a link is replaced, the link is kept.
    symlink("fresh", path("indirect")).unwrap();
    fs::write(path("fresh"), b"old").unwrap();
    to("indirect").unwrap();
    assert!(path("indirect").is_symlink());
    assert_eq!(fs::read(path("fresh")).unwrap(), b"new");
    // Invalid destinations.
    let kind = |result: Result<Option<Failure>, Failure>| result.unwrap_err().kind;
    assert_eq!(kind(to("missing/")), FailureKind::MissingDirectory);
    assert_eq!(kind(to("missing/file")), FailureKind::Open);
    assert_eq!(kind(tree_to("old")), FailureKind::NotDirectory);
    fs::create_dir(path("existing/file2")).unwrap();
    assert_eq!(kind(copy(&path("file"), "file2", destination(&path("existing")))), FailureKind::Replace);
    fs::write(path("existing/tree"), b"").unwrap();
    assert_eq!(kind(tree_to("existing")), FailureKind::NotDirectory);
    assert_eq!(
        kind(copy(&path("nothing"), "x", destination(&path("y")))),
        FailureKind::Truncated,
        "the error of the receiver"
    );
    assert_eq!(kind(to("/dev/null")), FailureKind::UnsupportedType);
    assert!(
        !fs::read_dir(folder.path())
            .unwrap()
            .any(|entry| { entry.unwrap().file_name().as_bytes().starts_with(b".kindling") })
    );
}

#[test]
fn an_existing_directory_keeps_its_mode() {
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("to");
    for (sender, mode) in [(Sender::Trusted, 0o777), (Sender::Untrusted, 0o755)] {
        fs::create_dir_all(to.join("there")).unwrap();
        fs::set_permissions(&to, Permissions::from_mode(0o700)).unwrap();
        fs::set_permissions(to.join("there"), Permissions::from_mode(0o700)).unwrap();
        let directory = |name: &[u8]| {
            let name_length = u8::try_from(name.len()).unwrap();
            let open = Entry {
                kind: Kind::Directory,
                name_length,
                mode: 0o777,
                seconds: 5,
                ..Entry::END_OF_DIRECTORY
            };
            [&open.to_bytes()[..], name].concat()
        };
        let end = || entry(Kind::EndOfDirectory, b"");
        let bytes = [directory(b"to"), directory(b"there"), end(), directory(b"new"), end(), end()];
        receive_bytes(
            &bytes.concat(),
            Destination { sender, mode_bits: 0o755 | mode, ..destination(folder.path()) },
        )
        .unwrap();
        let attributes = |name: &str| {
            let data = to.join(name).metadata().unwrap();
            (data.mode() & 0o7777, data.mtime())
        };
        assert_eq!(
            [attributes("."), attributes("there"), attributes("new")],
            [(0o700, 5), (0o700, 5), (u32::from(mode), 5)]
        );
        fs::remove_dir_all(&to).unwrap();
    }
}

/// A guest may have created a link at the destination, with an earlier copy or through a shared folder.
#[test]
fn a_link_at_the_destination_of_a_guests_copy_is_not_followed() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let file = || [entry(Kind::File, b"file"), chunk(0, b"new"), chunk(3, b"")].concat();
    let tree = || [entry(Kind::Directory, b"tree"), file(), entry(Kind::EndOfDirectory, b"")].concat();
    let link = || [entry(Kind::Link, b"link"), chunk(0, b"elsewhere")].concat();
    let plant = |target: &str| {
        let _ = fs::remove_file(path("planted"));
        symlink(target, path("planted")).unwrap();
    };
    for end in ["", "/", "//", "/.", "/./", "/.//./"] {
        fs::create_dir(path("outside")).unwrap();
        fs::write(path("secret"), b"old").unwrap();
        let name = [path("planted").as_os_str().as_bytes(), end.as_bytes()].concat();
        let to = from_guest(&name);
        let contents = Destination { name: Some(b"."), ..to };
        for target in ["outside", "secret", "missing"] {
            for (stream, to) in [(tree(), to), (tree(), contents), (file(), to), (link(), to)] {
                plant(target);
                let is_directory = stream.starts_with(&[2]);
                let result = receive_bytes(&stream, to).map_err(|failure| failure.kind);
                let is_refused =
                    is_directory || stream.starts_with(&[1]) && (target == "outside" || !end.is_empty());
                assert_eq!(
                    result,
                    if is_refused { Err(FailureKind::Symlink) } else { Ok(()) },
                    "{target}{end}"
                );
                let is_link = path("planted").is_symlink();
                assert_eq!(is_link, is_refused || stream.starts_with(&[3]), "{target}{end}");
            }
        }
        assert_eq!(fs::read_dir(path("outside")).unwrap().count(), 0);
        assert_eq!(fs::read(path("secret")).unwrap(), b"old");
        assert!(!path("missing").exists());
        fs::remove_dir(path("outside")).unwrap();
    }
}

/// A link among the directories of the destination may be a guest's too.
#[test]
fn a_link_out_of_its_directory_is_not_followed_on_the_way_to_a_guests_copy() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::create_dir_all(path("shared/inside/deep")).unwrap();
    let stream = || [entry(Kind::File, b"file"), chunk(0, b"new"), chunk(3, b"")].concat();
    let tree = || [entry(Kind::Directory, b"tree"), entry(Kind::EndOfDirectory, b"")].concat();
    for (target, is_followed) in [
        ("..", false),
        ("inside/../..", false),
        ("../shared/inside", false),
        (folder.path().to_str().unwrap(), false),
        ("inside", true),
        ("inside/deep/..", true),
        (".", true),
    ] {
        let _ = fs::remove_file(path("shared/link"));
        symlink(target, path("shared/link")).unwrap();
        for (stream, end) in [
            (stream(), "link/new"),
            (stream(), "./link//new"),
            (stream(), "link/inside/../new"),
            (tree(), "link/new/"),
            (tree(), "link/new"),
        ] {
            let to = path("shared").join(end);
            let result = receive_bytes(&stream, from_guest(to.as_os_str().as_bytes()));
            let kind = result.as_ref().map_err(|failure| failure.kind);
            match is_followed {
                true => assert!(!matches!(kind, Err(FailureKind::LinkAway)), "{target} {end}: {kind:?}"),
                false => {
                    assert_eq!(kind, Err(FailureKind::LinkAway), "{target} {end}");
                    let named = result.unwrap_err().path;
                    assert!(named.ends_with(b"link"), "{:?}", String::from_utf8_lossy(&named));
                }
            }
            let created = ["shared/inside/new", "shared/new", "new", "shared/inside/deep/new"];
            let created: Vec<_> = created.into_iter().filter(|name| path(name).exists()).collect();
            assert!(created.iter().all(|name| is_followed && name.starts_with("shared/")), "{created:?}");
            for name in created {
                let _ = fs::remove_file(path(name)).or_else(|_| fs::remove_dir(path(name)));
            }
        }
    }
}

#[test]
fn a_guest_cannot_send_a_link_or_file_for_a_directorys_content() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let out = Destination { name: Some(b"."), ..from_guest(out.as_os_str().as_bytes()) };
    for stream in [
        [entry(Kind::Link, b"."), chunk(0, b"..")].concat(),
        [entry(Kind::File, b"."), chunk(0, b"")].concat(),
    ] {
        assert_eq!(receive_bytes(&stream, out).unwrap_err().kind, FailureKind::Malformed);
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn trailing_slashes_and_dots_are_removed() {
    for (path, expected) in [
        ("a", "a"),
        ("a/", "a"),
        ("a/b/.", "a/b"),
        ("a/.//./", "a"),
        ("/", "/"),
        ("//.", "/"),
        (".", "."),
        ("./", "."),
    ]
    .into_iter()
    .chain([("..", ".."), ("../.", ".."), ("a/..", "a/.."), (".a/", ".a"), ("a.", "a.")])
    {
        assert_eq!(crate::receive::without_trailing_dots(path.as_bytes()), expected.as_bytes(), "{path}");
    }
}

#[test]
fn special_files_are_skipped() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("from"), folder.path().join("to"));
    fs::create_dir(&from).unwrap();
    fs::write(from.join("file"), b"").unwrap();
    rustix::fs::mknodat(CWD, from.join("pipe"), rustix::fs::FileType::Fifo, Mode::RWXU, 0).unwrap();
    let skipped = copy(&from, "from", destination(&to)).unwrap().unwrap();
    assert_eq!(
        (skipped.kind, &skipped.path[..]),
        (FailureKind::Skipped, from.join("pipe").as_os_str().as_bytes())
    );
    assert_eq!(fs::read_dir(&to).unwrap().count(), 1);
    assert_eq!(copy(&from.join("pipe"), "pipe", destination(&to)).unwrap_err().kind, FailureKind::Truncated);
}

#[test]
fn streams_cannot_write_outside_the_destination() {
    let folder = tempfile::tempdir().unwrap();
    let outside = folder.path().join("outside");
    fs::create_dir(&outside).unwrap();
    let root = || entry(Kind::Directory, b"tree");
    let file = |name: &[u8]| [entry(Kind::File, name), chunk(0, b"bad"), chunk(3, b"")].concat();
    let link = |name: &[u8], target: &[u8]| [entry(Kind::Link, name), chunk(0, target)].concat();
    let end = || entry(Kind::EndOfDirectory, b"");
    let absolute = outside.as_os_str().as_bytes();
    let streams: [(&str, Vec<u8>); 9] = [
        ("the parent", [root(), file(b"..")].concat()),
        ("a path", [root(), file(b"../outside/x")].concat()),
        ("an absolute path", [root(), file(&[absolute, b"/x"].concat())].concat()),
        ("a directory that is the parent", [root(), entry(Kind::Directory, b"..")].concat()),
        ("through a link", [root(), link(b"a", absolute), entry(Kind::Directory, b"a"), file(b"x")].concat()),
        (
            "through a link upwards",
            [root(), link(b"a", b".."), entry(Kind::Directory, b"a"), file(b"x")].concat(),
        ),
        ("more ends than directories", [end()].concat()),
        ("the root is the parent", file(b"..")),
        ("a name with NUL", [root(), file(b"a\0b")].concat()),
    ];
    for (case, bytes) in streams {
        let to = folder.path().join("to");
        fs::create_dir(&to).unwrap();
        let failure = receive_bytes(&bytes, destination(&to)).unwrap_err();
        assert!(
            matches!(failure.kind, FailureKind::Malformed | FailureKind::NotDirectory),
            "{case}: {failure}"
        );
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "{case}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "{case}");
        fs::remove_dir_all(&to).unwrap();
    }
    // An existing link is treated like a link from the stream.
    let to = folder.path().join("to");
    fs::create_dir(&to).unwrap();
    symlink(&outside, to.join("a")).unwrap();
    let bytes = [entry(Kind::Directory, b"."), entry(Kind::Directory, b"a"), file(b"x")].concat();
    let inside = Destination { name: Some(b"."), ..destination(&to) };
    assert_eq!(receive_bytes(&bytes, inside).unwrap_err().kind, FailureKind::NotDirectory);
    // A file replaces the link.
    receive_bytes(&[entry(Kind::Directory, b"."), file(b"a"), end()].concat(), inside).unwrap();
    assert!(to.join("a").symlink_metadata().unwrap().is_file());
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
}

#[test]
fn a_truncated_stream_leaves_the_existing_file() {
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("to");
    fs::write(&to, b"old").unwrap();
    let whole = [entry(Kind::File, b"x"), chunk(0, b"new"), chunk(3, b"")].concat();
    for length in 0..whole.len() {
        assert_eq!(
            receive_bytes(&whole[..length], destination(&to)).unwrap_err().kind,
            FailureKind::Truncated,
            "{length}"
        );
        assert_eq!(fs::read(&to).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
    receive_bytes(&whole, destination(&to)).unwrap();
    assert_eq!(fs::read(&to).unwrap(), b"new");
}

#[test]
fn chunks_are_ascending_and_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("to");
    let result = |chunks: &[Vec<u8>]| {
        receive_bytes(&[entry(Kind::File, b"x"), chunks.concat()].concat(), destination(&to))
            .map_err(|failure| failure.kind)
    };
    assert_eq!(result(&[chunk(5, b"a"), chunk(5, b"b")]), Err(FailureKind::Malformed));
    assert_eq!(result(&[chunk(5, b"a"), chunk(3, b"")]), Err(FailureKind::Malformed));
    assert_eq!(result(&[chunk(u64::MAX, b"a")]), Err(FailureKind::Malformed));
    let long = [&0_u64.to_le_bytes()[..], &u32::MAX.to_le_bytes()].concat();
    assert_eq!(result(&[long]), Err(FailureKind::Malformed));
    assert!(!to.exists());
    assert_eq!(result(&[chunk(1, b"a"), chunk(9, b"")]), Ok(()));
    assert_eq!(fs::read(&to).unwrap(), b"\0a\0\0\0\0\0\0\0");
}

#[test]
fn depth_is_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("to");
    let bytes = entry(Kind::Directory, b"d").repeat(MAX_DEPTH + 1);
    assert_eq!(receive_bytes(&bytes, destination(&to)).unwrap_err().kind, FailureKind::TooDeep);
    assert_eq!(
        copy(&to, "to", destination(&folder.path().join("copy"))).unwrap_err().kind,
        FailureKind::Truncated
    );
    let bytes =
        [entry(Kind::Directory, b"d").repeat(MAX_DEPTH), entry(Kind::EndOfDirectory, b"").repeat(MAX_DEPTH)];
    receive_bytes(&bytes.concat(), destination(&folder.path().join("fits"))).unwrap();
}

/// Valid and invalid pieces of streams.
fn piece() -> impl Strategy<Value = Vec<u8>> {
    let name = prop::sample::select(vec![&b"a"[..], b"b", b"c", b".", b"..", b"a/b", b"/etc", b"a\0"]);
    let kind = prop::sample::select(vec![Kind::File, Kind::Directory, Kind::Directory, Kind::Link]);
    let target = prop::sample::select(vec![&b".."[..], b"/", b"b", b"../outside", b""]);
    prop_oneof![
        (kind, name).prop_map(|(kind, name)| entry(kind, name)),
        Just(entry(Kind::EndOfDirectory, b"")),
        (0_u64..9, prop::collection::vec(any::<u8>(), 0..9))
            .prop_map(|(offset, bytes)| chunk(offset, &bytes)),
        target.prop_map(|target| [entry(Kind::Link, b"a"), chunk(0, target)].concat()),
        Just([entry(Kind::File, b"b"), chunk(0, b"x"), chunk(1, b"")].concat()),
        prop::collection::vec(any::<u8>(), 0..40),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// No stream creates anything outside the destination.
    #[test]
    fn any_stream_stays_inside(pieces in prop::collection::vec(piece(), 0..24)) {
        let folder = tempfile::tempdir().unwrap();
        let outside = folder.path().join("outside");
        fs::create_dir(&outside).unwrap();
        let to = folder.path().join("to");
        fs::create_dir(&to).unwrap();
        let bytes = [entry(Kind::Directory, b"."), pieces.concat()].concat();
        let _ = receive_bytes(&bytes, destination(&to));
        prop_assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
        prop_assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
        // Temporary files are removed.
        for line in list(&to) {
            prop_assert!(!line.contains("kindling-cp"), "{}", line);
        }
    }
}
