//! Random archives: each entry is in the image, or the image is refused.

mod support;

use proptest::prelude::*;
use proptest::sample::Index;
use support::reader::{list, paths};
use support::{Layer, Packing, Workspace};
use tar::{EntryType, Header};

/// An entry and the peculiarities of its writer.
#[derive(Clone, Debug)]
struct Entry {
    kind: u8,
    /// The size in the header of an entry without data.
    size: u64,
    data: Vec<u8>,
    format: Format,
    /// The encoding of numbers.
    filler: u8,
    name: Name,
}

#[derive(Clone, Copy, Debug)]
enum Format {
    V7,
    Ustar,
    Gnu,
}

#[derive(Clone, Copy, Debug)]
enum Name {
    InHeader,
    Pax,
    Gnu,
    PaxWithoutValue,
}

fn entry() -> impl Strategy<Value = Entry> {
    let format = prop::sample::select(vec![Format::V7, Format::Ustar, Format::Gnu]);
    let name = prop::sample::select(vec![Name::InHeader, Name::Pax, Name::Gnu, Name::PaxWithoutValue]);
    let data = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..1500),
        // Records that look like the end of the archive.
        (0_usize..3).prop_map(|records| vec![0; records * 512]),
    ];
    let sizes = prop_oneof![Just(0), 1_u64..2000, Just(512), Just(1024), any::<u32>().prop_map(u64::from)];
    (
        prop::sample::select(b"\x00012345670".to_vec()),
        sizes,
        data,
        format,
        prop::sample::select(b"0 \0".to_vec()),
        name,
    )
        .prop_map(|(kind, size, data, format, filler, name)| Entry {
            kind,
            size,
            data,
            format,
            filler,
            name,
        })
}

const fn has_data(kind: u8) -> bool {
    !matches!(kind, b'1'..=b'6')
}

/// The bytes of an entry, and the number of them that may be missing at the end of an archive.
fn bytes(entry: &Entry, number: usize) -> (Vec<u8>, usize) {
    let name = format!("f{number}");
    let data: &[u8] = if has_data(entry.kind) { &entry.data } else { b"" };
    let size = if has_data(entry.kind) { data.len() as u64 } else { entry.size };
    let shown = if matches!(entry.name, Name::InHeader | Name::PaxWithoutValue) { &*name } else { "x" };
    let mut header = Header::new_gnu();
    if let Format::Ustar = entry.format {
        header = Header::new_ustar();
    }
    let old = header.as_old_mut();
    if let Format::V7 = entry.format {
        old.pad.fill(0);
    }
    old.name[..shown.len()].copy_from_slice(shown.as_bytes());
    // The target of every link is a file that always exists.
    old.linkname[..1].copy_from_slice(b"0");
    for field in [&mut old.mode[..], &mut old.uid, &mut old.gid, &mut old.mtime] {
        field.fill(entry.filler);
    }
    header.as_old_mut().linkflag = [entry.kind];
    header.set_size(size);
    let layer = Layer::new();
    let layer = match entry.name {
        Name::InHeader => layer,
        Name::Pax => layer.pax(&[("path", name.as_bytes())]),
        Name::PaxWithoutValue => layer.pax(&[("path", b""), ("size", b"")]),
        Name::Gnu => layer.raw(
            Layer::header(EntryType::GNULongName, b"././@LongLink", 0o644, name.len() as u64),
            name.as_bytes(),
        ),
    };
    (layer.raw(header, data).without_end(), data.len().next_multiple_of(512) - data.len())
}

/// The paths of the image, or none if it is refused.
fn names(archive: Vec<u8>) -> Result<Option<Vec<String>>, TestCaseError> {
    let workspace = Workspace::new();
    workspace.layout().write_bytes(&[archive], Packing::Plain);
    match workspace.prepare("image") {
        Ok(prepared) => {
            support::check(&prepared.rootfs);
            Ok(Some(paths(&list(&prepared.rootfs)).into_iter().map(str::to_owned).collect()))
        }
        Err(error) => {
            prop_assert!(error.is_user_error(), "{:?}", error);
            Ok(None)
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn every_entry_is_kept_or_the_image_is_refused(
        entries in prop::collection::vec(entry(), 1..12),
        end in prop::sample::select(vec![0_usize, 512, 1024, 1024 + 77, 20_480]),
        cut in any::<Index>(),
        is_cut in any::<bool>(),
    ) {
        let first = Layer::new().file("0", "first").without_end();
        let parts: Vec<_> = (0..).zip(&entries).map(|(number, entry)| bytes(entry, number)).collect();
        let whole: Vec<u8> = [first.clone(), parts.iter().flat_map(|(bytes, _)| bytes.clone()).collect()].concat();
        if !is_cut {
            let names = names([whole, vec![0; end]].concat())?;
            let expected = (0..entries.len()).map(|number| format!("/f{number}"));
            let names = names.ok_or_else(|| TestCaseError::fail("refused"))?;
            for name in expected {
                prop_assert!(names.contains(&name), "{} is lost", name);
            }
            return Ok(());
        }
        let cut = first.len() + cut.index(whole.len() - first.len());
        let Some(names) = names(whole[..cut].to_vec())? else { return Ok(()) };
        // Every entry that begins before the cut is complete, except for its padding.
        let mut at = first.len();
        for (number, (bytes, padding)) in parts.iter().enumerate() {
            if at < cut {
                prop_assert!(names.contains(&format!("/f{number}")), "f{} is lost", number);
                prop_assert!(cut >= at + bytes.len() - padding, "f{} is cut off", number);
            }
            at += bytes.len();
        }
    }

    #[test]
    fn records_of_zeroes_between_entries_lose_nothing_silently(
        entries in prop::collection::vec(entry(), 1..8),
        workspace in any::<Index>(),
    ) {
        let mut parts: Vec<_> = (0..).zip(&entries).map(|(number, entry)| bytes(entry, number).0).collect();
        parts.insert(0, Layer::new().file("0", "first").without_end());
        parts.insert(1 + workspace.index(entries.len()), vec![0; 512]);
        prop_assert_eq!(names(parts.concat())?, None);
    }
}
