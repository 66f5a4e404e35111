//! Tar archives of many programs, which are read as by Go's archive/tar: the result has the same files as in docker,
//! containerd and podman, and nothing is lost silently.

mod support;

use support::reader::{line, paths};
use support::{Layer, Workspace};
use tar::{EntryType, Header};

/// The type flags of entries without data.
const WITHOUT_DATA: [u8; 6] = *b"123456";

/// Changes a header.
fn with(mut header: Header, change: impl FnOnce(&mut Header)) -> Header {
    change(&mut header);
    header
}

fn header(kind: u8, name: &str, size: u64) -> Header {
    Layer::header(EntryType::new(kind), name.as_bytes(), 0o755, size)
}

#[test]
fn the_size_of_an_entry_without_data_is_ignored() {
    for kind in WITHOUT_DATA {
        for size in [1, 20, 511, 512, 513, 64_700, 1 << 33] {
            let odd = with(header(kind, "d/odd", size), |header| {
                header.as_old_mut().linkname[..3].copy_from_slice(b"d/a");
            });
            let layer = Layer::new().folder("d", 0o755).file("d/a", &"x".repeat(700));
            // The size is in the header, and then also in an extended header.
            let extended = odd.clone();
            let layer = layer.raw(odd, b"").file("d/after", "after");
            let layer = layer.pax(&[("size", b"4096")]).raw(extended, b"").file("last", "last");
            let lines = Workspace::listed(&[layer.bytes()]);
            let expected = ["/", "/d", "/d/a", "/d/after", "/d/odd", "/last"];
            assert_eq!(paths(&lines), expected, "{} {size}", char::from(kind));
            assert!(line(&lines, "/d/after").ends_with("\"after\""));
        }
    }
}

#[test]
fn data_of_an_entry_without_data_is_refused() {
    // Data after a hard link, as some programs write it, is not data for readers in Go.
    for kind in WITHOUT_DATA {
        let odd = with(header(kind, "odd", 5), |header| header.as_old_mut().linkname[0] = b'a');
        let layer = Layer::new().file("a", "").raw(odd, b"data!").file("b", "");
        let line = Workspace::refused(&[layer.bytes()]);
        assert_eq!(line, "layer 1 of 1: byte 1024: no valid header; not a tar archive, or a damaged one");
    }
}

#[test]
fn an_old_directory_is_a_file_whose_name_ends_with_a_slash() {
    let old = |kind, name, size| {
        with(header(kind, name, size), |header| {
            header.as_old_mut().pad.fill(0);
            header.as_old_mut().linkflag = [kind];
        })
    };
    let layer = Layer::new()
        .raw(old(0, "a/", 0), b"")
        .raw(old(0, "b/", 512), b"")
        .raw(old(b'0', "c/", 0), b"")
        .raw(old(b'0', "d/", 4), b"data")
        .file("last", "");
    let lines = Workspace::listed(&[layer.bytes()]);
    assert_eq!(paths(&lines), ["/", "/a", "/b", "/c", "/d", "/last"]);
    for path in ["/a", "/b", "/c"] {
        assert!(line(&lines, path).contains(" 40755 "), "{lines:#?}");
    }
    assert!(line(&lines, "/d").ends_with("\"data\""));
}

#[test]
fn old_archives_of_go_have_prefixes_in_gnu_headers() {
    // archive/tar before Go 1.8 wrote them for names that it split, if another field needed GNU's format.
    let split = |folder: &str, name: &str, size: u64| {
        with(header(b'0', name, size), |header| {
            header.as_mut_bytes()[345..345 + folder.len()].copy_from_slice(folder.as_bytes());
        })
    };
    let layer = Layer::new()
        .raw(split("usr/share/one", "index.html", 3), b"one")
        .raw(split("usr/share/two", "index.html", 3), b"two")
        .file("index.html", "root");
    let lines = Workspace::listed(&[layer.bytes()]);
    for (path, content) in [
        ("/usr/share/one/index.html", "\"one\""),
        ("/usr/share/two/index.html", "\"two\""),
        ("/index.html", "\"root\""),
    ] {
        assert!(line(&lines, path).ends_with(content), "{lines:#?}");
    }
}

fn two() -> Layer {
    Layer::new().file("a", "first").file("b", "second")
}

#[test]
fn an_archive_ends_in_many_ways() {
    let zeroes = |length: usize| vec![0; length];
    for (what, end) in [
        ("nothing", vec![]),
        ("one record", zeroes(512)),
        ("many records", zeroes(512 * 40)),
        ("part of a record", zeroes(1024 + 77)),
        ("something else", [zeroes(1024), b"junk".repeat(1000)].concat()),
        ("another archive", [zeroes(1024), Layer::new().file("c", "third").bytes()].concat()),
    ] {
        let lines = Workspace::listed(&[[two().without_end(), end].concat()]);
        assert_eq!(paths(&lines), ["/", "/a", "/b"], "{what}");
    }
    // Without the padding of the last file, or with a part of it.
    let whole = two().without_end();
    for missing in [1, 412, 506] {
        let lines = Workspace::listed(&[whole[..whole.len() - missing].to_vec()]);
        assert!(line(&lines, "/b").ends_with("\"second\""), "{missing}");
    }
    assert_eq!(paths(&Workspace::listed(&[vec![]])), ["/"]);
}

#[test]
fn an_archive_that_may_be_incomplete_is_refused() {
    let refused = |archive: Vec<u8>| Workspace::refused(&[archive]).replace("layer 1 of 1: ", "");
    let single =
        "byte 512: a single record of zeroes in the middle of the archive, which is damaged or malformed";
    let file = |name| Layer::new().file(name, "").without_end();
    for behind in [file("b"), b"junk".repeat(128), Layer::new().pax(&[("path", b"b")]).bytes()] {
        assert_eq!(refused([file("a"), vec![0; 512], behind].concat()), single);
    }
    let cut = "the archive ends in the middle of a file";
    let large = Layer::new().file("a", &"x".repeat(5000)).bytes();
    let pax = Layer::new().pax(&[("path", &[b'x'; 600])]).without_end();
    let zeroes = [two().without_end(), vec![0; 77]].concat();
    let zeroes_behind_one = [two().without_end(), vec![0; 512 + 77]].concat();
    for archive in [
        two().bytes()[..300].to_vec(),
        two().bytes()[..1024 + 300].to_vec(),
        two().bytes()[..1024 + 512 + 5].to_vec(),
        large[..3000].to_vec(),
        pax[..512 + 100].to_vec(),
        zeroes,
        zeroes_behind_one,
    ] {
        assert_eq!(refused(archive), cut);
    }
    let ghost = "an extended header at the end of the archive, without the file that it describes";
    let long = Layer::header(EntryType::GNULongName, b"././@LongLink", 0o644, 6);
    for layer in [two().pax(&[("path", b"ghost")]), two().raw(long, b"ghost\0")] {
        assert_eq!(refused(layer.bytes()), format!("byte 2048: {ghost}"));
    }
}

#[test]
fn numbers_may_be_blank_or_negative_or_in_base_256() {
    let blank = |byte: u8| {
        with(header(b'0', if byte == 0 { "empty" } else { "blank" }, 0), |header| {
            let old = header.as_old_mut();
            for field in [&mut old.mode[..], &mut old.uid, &mut old.gid, &mut old.size, &mut old.mtime] {
                field.fill(byte);
            }
        })
    };
    let device = with(header(b'3', "device", 0), |header| header.as_gnu_mut().unwrap().dev_major.fill(b' '));
    let base_256 = |name, uid: i64, mtime: i64, size: u8| {
        with(header(b'0', name, 0), |header| {
            let old = header.as_old_mut();
            let sign = if mtime < 0 { 0xff } else { 0x80 };
            (old.uid, old.gid) = (uid.to_be_bytes(), uid.to_be_bytes());
            old.uid[0] |= 0x80;
            old.gid[0] |= 0x80;
            old.mtime = [[sign; 4].as_slice(), &mtime.to_be_bytes()].concat().try_into().unwrap();
            old.mtime[1..4].fill(if mtime < 0 { 0xff } else { 0 });
            old.size = [0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, size];
        })
    };
    let layer = Layer::new()
        .raw(blank(0), b"")
        .raw(blank(b' '), b"")
        .raw(device, b"")
        .raw(base_256("nobody", -2, i64::MIN, 4), b"data")
        .raw(base_256("unchanged", -1, -1, 4), b"data")
        .raw(base_256("large", 4_294_967_294, 32_503_680_000, 4), b"data");
    let lines = Workspace::listed(&[layer.bytes()]);
    for (path, expected) in [
        ("/empty", "100000 0:0 1 0.0 \"\""),
        ("/blank", "100000 0:0 1 0.0 \"\""),
        ("/device", "20755 0:0 1 1700000000.0 device 0x0"),
        ("/nobody", "100755 4294967294:4294967294 1 -9223372036854775808.0 \"data\""),
        ("/unchanged", "100755 0:0 1 -1.0 \"data\""),
        ("/large", "100755 4294967294:4294967294 1 32503680000.0 \"data\""),
    ] {
        assert_eq!(line(&lines, path), format!("{path} {expected}"));
    }
}

#[test]
fn values_of_extended_headers_may_be_empty_or_out_of_range() {
    let empty: [(&str, &[u8]); 8] = [
        ("path", b""),
        ("linkpath", b""),
        ("mtime", b""),
        ("uid", b""),
        ("gid", b""),
        ("size", b""),
        ("comment", b""),
        ("GNU.sparse.major", b""),
    ];
    let cancelled: [(&str, &[u8]); 4] = [("path", b"no"), ("uid", b"7"), ("path", b""), ("uid", b"")];
    let layer = Layer::new()
        .pax(&empty)
        .file("empty", "1")
        .pax(&cancelled)
        .file("cancelled", "2")
        .pax(&[("SCHILY.xattr.user.overlay.origin", b""), ("uid", b"-2"), ("gid", b"+5")])
        .file("attribute", "3")
        .pax(&[("mtime", b"-9223372036854775808"), ("uid", b"4294967295")])
        .file("least", "4")
        .pax(&[("mtime", b"99999999999999999999999999999999999999999999.5")])
        .file("most", "5")
        // A second extended header replaces the first.
        .pax(&[("path", b"first"), ("uid", b"7")])
        .pax(&[("path", b"second")])
        .file("x", "6")
        .pax(&[("path", b"pax"), ("mtime", b"1.5")])
        .raw(Layer::header(EntryType::GNULongName, b"././@LongLink", 0o644, 4), b"gnu\0")
        .file("y", "7");
    let lines = Workspace::listed(&[layer.bytes()]);
    for (path, expected) in [
        ("/empty", "0:0 1 1700000000.0 \"1\""),
        ("/cancelled", "0:0 1 1700000000.0 \"2\""),
        ("/attribute", "4294967294:5 1 1700000000.0 \"3\" user.overlay.origin=\"\""),
        ("/least", "0:0 1 -9223372036854775808.0 \"4\""),
        ("/most", "0:0 1 9223372036854775807.0 \"5\""),
        ("/second", "0:0 1 1700000000.0 \"6\""),
        ("/gnu", "0:0 1 1.500000000 \"7\""),
    ] {
        assert_eq!(line(&lines, path), format!("{path} 100644 {expected}"));
    }
    assert_eq!(lines.len(), 8);
}

#[test]
fn global_headers_are_ignored() {
    let global = |records: &[u8]| {
        let header =
            Layer::header(EntryType::XGlobalHeader, b"pax_global_header", 0o644, records.len() as u64);
        Layer::new().raw(header, records).without_end()
    };
    let file = Layer::new().pax(&[("path", b"long")]).without_end();
    // Any number of global headers, also between an extended header and its file.
    let many = global(b"16 comment=abcd\n").repeat(20);
    let lines =
        Workspace::listed(&[
            [file, many, global(b"9 uid=12\n"), Layer::new().file("x", "1").bytes()].concat()
        ]);
    assert_eq!(line(&lines, "/long"), "/long 100644 0:0 1 1700000000.0 \"1\"");
}

#[test]
fn invalid_numbers_are_refused_with_the_name_of_the_file() {
    let wrong = |change: fn(&mut Header)| {
        let layer = Layer::new().file("a", "").raw(with(header(b'0', "odd", 0), change), b"");
        Workspace::refused(&[layer.bytes()]).replace("layer 1 of 1: odd: ", "")
    };
    let invalid_number = |what| format!("invalid {what} in its header");
    assert_eq!(wrong(|header| header.as_old_mut().size[..3].copy_from_slice(b"9zz")), invalid_number("size"));
    assert_eq!(wrong(|header| header.as_old_mut().size.fill(0xff)), invalid_number("size"));
    assert_eq!(wrong(|header| header.as_old_mut().uid[..2].copy_from_slice(b"-2")), invalid_number("owner"));
    assert_eq!(
        wrong(|header| header.as_old_mut().gid[..2].copy_from_slice(&[0x80, 1])),
        invalid_number("group")
    );
    assert_eq!(wrong(|header| header.as_old_mut().mode[..2].copy_from_slice(b"rw")), invalid_number("mode"));
    assert_eq!(
        wrong(|header| header.as_old_mut().mtime[..4].copy_from_slice(b"soon")),
        invalid_number("modification time")
    );
    let major = |header: &mut Header| header.as_gnu_mut().unwrap().dev_major.copy_from_slice(b"7777777\0");
    let layer = Layer::new().raw(with(header(b'4', "odd", 0), major), b"");
    assert_eq!(
        Workspace::refused(&[layer.bytes()]),
        format!("layer 1 of 1: odd: {}", invalid_number("major device number"))
    );
    for value in [&b"-1"[..], b"9223372036854775808", b"340282366920938463463374607431768211456"] {
        let line = Workspace::refused(&[Layer::new().pax(&[("size", value)]).file("odd", "").bytes()]);
        assert_eq!(line, format!("layer 1 of 1: odd: {}", invalid_number("size")));
    }
}
