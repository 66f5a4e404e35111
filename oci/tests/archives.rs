//! Tar archives as many programs write them, read as Go's archive/tar reads them: what docker, containerd and podman
//! find in an archive is found here, and nothing is lost without a word.

mod support;

use support::reader::{line, paths};
use support::{Layer, Place};
use tar::{EntryType, Header};

/// Entries that have no data, by the byte of their kind.
const WITHOUT_DATA: [u8; 6] = *b"123456";

/// The header with a field of its own.
fn with(mut header: Header, change: impl FnOnce(&mut Header)) -> Header {
    change(&mut header);
    header
}

fn header(kind: u8, name: &str, size: u64) -> Header {
    Layer::header(EntryType::new(kind), name.as_bytes(), 0o755, size)
}

#[test]
fn a_size_of_an_entry_without_data_hides_nothing() {
    for kind in WITHOUT_DATA {
        for size in [1, 20, 511, 512, 513, 64_700, 1 << 33] {
            let odd = with(header(kind, "d/odd", size), |header| {
                header.as_old_mut().linkname[..3].copy_from_slice(b"d/a");
            });
            let layer = Layer::new().folder("d", 0o755).file("d/a", &"x".repeat(700));
            // The size is in the header, and once more in an extended one.
            let extended = odd.clone();
            let layer = layer.raw(odd, b"").file("d/after", "after");
            let layer = layer.pax(&[("size", b"4096")]).raw(extended, b"").file("last", "last");
            let lines = Place::made(&[layer.bytes()]);
            let expected = ["/", "/d", "/d/a", "/d/after", "/d/odd", "/last"];
            assert_eq!(paths(&lines), expected, "{} {size}", char::from(kind));
            assert!(line(&lines, "/d/after").ends_with("\"after\""));
        }
    }
}

#[test]
fn data_where_no_data_can_be_is_no_entry() {
    // Data behind a hard link, as some programs write it: no reader in Go takes it for data.
    for kind in WITHOUT_DATA {
        let odd = with(header(kind, "odd", 5), |header| header.as_old_mut().linkname[0] = b'a');
        let layer = Layer::new().file("a", "").raw(odd, b"data!").file("b", "");
        let line = Place::refused(&[layer.bytes()]);
        assert_eq!(line, "layer 1 of 1: byte 1024 begins no file: not a tar archive, or a damaged one");
    }
}

#[test]
fn an_old_directory_is_a_file_with_a_slash_behind_its_name() {
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
    let lines = Place::made(&[layer.bytes()]);
    assert_eq!(paths(&lines), ["/", "/a", "/b", "/c", "/d", "/last"]);
    for path in ["/a", "/b", "/c"] {
        assert!(line(&lines, path).contains(" 40755 "), "{lines:#?}");
    }
    assert!(line(&lines, "/d").ends_with("\"data\""));
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
        let lines = Place::made(&[[two().without_end(), end].concat()]);
        assert_eq!(paths(&lines), ["/", "/a", "/b"], "{what}");
    }
    // Without the padding of the last file, and with a part of it.
    let whole = two().without_end();
    for missing in [1, 412, 506] {
        let lines = Place::made(&[whole[..whole.len() - missing].to_vec()]);
        assert!(line(&lines, "/b").ends_with("\"second\""), "{missing}");
    }
    assert_eq!(paths(&Place::made(&[vec![]])), ["/"]);
}

#[test]
fn an_archive_that_may_have_lost_something_is_refused() {
    let refused = |archive: Vec<u8>| Place::refused(&[archive]).replace("layer 1 of 1: ", "");
    let single =
        "byte 512: a single record of zeroes in the middle of the archive, which is damaged or written wrong";
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
fn numbers_are_blank_or_negative_or_in_base_256() {
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
    let lines = Place::made(&[layer.bytes()]);
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
fn extended_headers_may_be_empty_or_beyond_what_can_be() {
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
    let taken_back: [(&str, &[u8]); 4] = [("path", b"no"), ("uid", b"7"), ("path", b""), ("uid", b"")];
    let layer = Layer::new()
        .pax(&empty)
        .file("empty", "1")
        .pax(&taken_back)
        .file("taken-back", "2")
        .pax(&[("SCHILY.xattr.user.overlay.origin", b""), ("uid", b"-2"), ("gid", b"+5")])
        .file("attribute", "3")
        .pax(&[("mtime", b"-9223372036854775808"), ("uid", b"4294967295")])
        .file("least", "4")
        .pax(&[("mtime", b"99999999999999999999999999999999999999999999.5")])
        .file("most", "5")
        // A second header takes the place of the first, and what is said of all files counts for none.
        .pax(&[("path", b"first"), ("uid", b"7")])
        .pax(&[("path", b"second")])
        .file("x", "6")
        .pax(&[("path", b"pax"), ("mtime", b"1.5")])
        .raw(Layer::header(EntryType::GNULongName, b"././@LongLink", 0o644, 4), b"gnu\0")
        .file("y", "7");
    let lines = Place::made(&[layer.bytes()]);
    for (path, expected) in [
        ("/empty", "0:0 1 1700000000.0 \"1\""),
        ("/taken-back", "0:0 1 1700000000.0 \"2\""),
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
fn what_is_said_of_all_files_changes_none() {
    let global = |records: &[u8]| {
        let header =
            Layer::header(EntryType::XGlobalHeader, b"pax_global_header", 0o644, records.len() as u64);
        Layer::new().raw(header, records).without_end()
    };
    let file = Layer::new().pax(&[("path", b"long")]).without_end();
    // Between a file and its extended header, too, and any number of them.
    let many = global(b"16 comment=abcd\n").repeat(20);
    let lines =
        Place::made(&[[file, many, global(b"9 uid=12\n"), Layer::new().file("x", "1").bytes()].concat()]);
    assert_eq!(line(&lines, "/long"), "/long 100644 0:0 1 1700000000.0 \"1\"");
}

#[test]
fn numbers_that_can_be_none_are_refused_with_the_name_of_the_file() {
    let wrong = |change: fn(&mut Header)| {
        let layer = Layer::new().file("a", "").raw(with(header(b'0', "odd", 0), change), b"");
        Place::refused(&[layer.bytes()]).replace("layer 1 of 1: odd: ", "")
    };
    let is_no_number = |what| format!("{what} in its header is not a number that it can be");
    assert_eq!(
        wrong(|header| header.as_old_mut().size[..3].copy_from_slice(b"9zz")),
        is_no_number("the size")
    );
    assert_eq!(wrong(|header| header.as_old_mut().size.fill(0xff)), is_no_number("the size"));
    assert_eq!(
        wrong(|header| header.as_old_mut().uid[..2].copy_from_slice(b"-2")),
        is_no_number("the owner")
    );
    assert_eq!(
        wrong(|header| header.as_old_mut().gid[..2].copy_from_slice(&[0x80, 1])),
        is_no_number("the group")
    );
    assert_eq!(
        wrong(|header| header.as_old_mut().mode[..2].copy_from_slice(b"rw")),
        is_no_number("the mode")
    );
    assert_eq!(
        wrong(|header| header.as_old_mut().mtime[..4].copy_from_slice(b"soon")),
        is_no_number("the time")
    );
    let major = |header: &mut Header| header.as_gnu_mut().unwrap().dev_major.copy_from_slice(b"7777777\0");
    let layer = Layer::new().raw(with(header(b'4', "odd", 0), major), b"");
    assert_eq!(
        Place::refused(&[layer.bytes()]),
        format!("layer 1 of 1: odd: {}", is_no_number("the device's major number"))
    );
    for value in [&b"-1"[..], b"9223372036854775808", b"340282366920938463463374607431768211456"] {
        let line = Place::refused(&[Layer::new().pax(&[("size", value)]).file("odd", "").bytes()]);
        assert_eq!(line, format!("layer 1 of 1: odd: {}", is_no_number("the size")));
    }
}
