//! A memo of what `kindling-oci` answered: which converted image a request names. The program takes 2 ms to say that
//! again, a quarter of a whole start.
//!
//! An answer counts while nothing that it was made from has changed: the file that decided which image it is (the archive, or
//! the cache's file for a name of a registry, which each pull of another image replaces), the converted image, and the
//! program itself. Otherwise the program is asked again. An image may have taken the program over: what it answers is
//! remembered for its own request only, and only if it depends on files that this request can name.

use super::{Prepared, is_converted};
use crate::kernel;
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, utimensat};
use serde::{Deserialize, Serialize};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, SystemTime};
use trusted_path::Owners;

/// Maximum length of a memo in bytes. Few images have a longer description; those are asked for each time.
const LENGTH_MAX: u64 = 256 << 10;
/// Maximum number of memos. When there are more, all are removed.
const MEMOS_MAX: usize = 256;

/// A file that changed less than this before the program was started may change again without a later time.
const CLOCK_TICK: Duration = Duration::from_millis(20);

/// What a request for an image consists of, `--pull` apart.
#[derive(Debug, Hash, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Request {
    image: OsString,
    /// The directory from which relative paths count; empty for an image with an absolute path.
    directory: PathBuf,
    user: Option<String>,
    /// The directory of all converted images.
    cache: PathBuf,
    /// The program that answers.
    program: Version,
}

/// The version of a file: device, inode, length, and the times of the last changes.
#[derive(Clone, Debug, Hash, PartialEq, Eq, Serialize, Deserialize)]
struct Version([u64; 3], [(i64, i64); 2]);

impl Version {
    fn of(path: &Path) -> Option<Self> {
        let file = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
        let times = [(file.mtime(), file.mtime_nsec()), (file.ctime(), file.ctime_nsec())];
        Some(Self([file.dev(), file.ino(), file.len()], times))
    }

    /// Whether the file was last changed before this time, by more than the granularity of clocks.
    fn is_older_than(&self, time: SystemTime) -> bool {
        let Some(time) = time.checked_sub(CLOCK_TICK) else { return false };
        let time = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let Ok(seconds) = i64::try_from(time.as_secs()) else { return false };
        self.1.iter().all(|&changed| changed < (seconds, time.subsec_nanos().into()))
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Memo {
    request: Request,
    /// The version of the source in [`Prepared::depends`].
    source: Version,
    /// The version of [`Prepared::rootfs`].
    rootfs: Version,
    prepared: Prepared,
}

impl Request {
    /// The request for an image; `None` if it cannot be remembered.
    pub(super) fn new(directory: &Path, image: &OsStr, user: Option<&str>, program: &Path) -> Option<Self> {
        // As `kindling-oci` finds it.
        let given = std::env::var_os("KINDLING_CACHE").filter(|folder| !folder.is_empty());
        let cache = given.map(PathBuf::from).or_else(kernel::cache)?;
        Self::in_cache(&cache, directory, image, user, program)
    }

    fn in_cache(
        cache: &Path,
        directory: &Path,
        image: &OsStr,
        user: Option<&str>,
        program: &Path,
    ) -> Option<Self> {
        let directory = match Path::new(image).is_absolute() {
            true => PathBuf::new(),
            false => std::path::absolute(directory).ok()?,
        };
        Some(Self {
            image: image.to_owned(),
            directory,
            user: user.map(str::to_owned),
            cache: Some(cache.join("oci")).filter(|cache| cache.is_absolute())?,
            program: Version::of(program)?,
        })
    }

    /// The answer to this request, if it is known and still valid.
    pub(super) fn recall(&self, folder: &Path) -> Option<Prepared> {
        let path = folder.join(self.name());
        trusted_path::file(&path, Owners::own()).ok()?;
        let memo = read(&path)?;
        let Prepared { rootfs, depends, .. } = &memo.prepared;
        let is_valid = memo.request == *self
            && Version::of(&depends.source)? == memo.source
            && !depends.absent.iter().any(|path| path.symlink_metadata().is_ok())
            && Version::of(rootfs)? == memo.rootfs;
        if !is_valid {
            return None;
        }
        // The file's time is that of the image's last use.
        let unchanged = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        let times = Timestamps { last_access: unchanged, last_modification: now };
        let _ = utimensat(CWD, rootfs.with_file_name("names"), &times, AtFlags::SYMLINK_NOFOLLOW);
        Some(memo.prepared)
    }

    /// Remembers the answer that a program gave which was started at this time. Without a memo, the next request takes
    /// longer, so that no failure is reported.
    pub(super) fn remember(self, folder: &Path, prepared: &Prepared, started: SystemTime) {
        let _ = self.write(folder, prepared, started);
    }

    fn write(self, folder: &Path, prepared: &Prepared, started: SystemTime) -> Option<()> {
        let source = &prepared.depends.source;
        if !self.has_image(&prepared.rootfs) || !self.can_name(source) {
            return None;
        }
        let source = Version::of(source).filter(|file| file.is_older_than(started))?;
        let rootfs = Version::of(&prepared.rootfs)?;
        let name = self.name();
        let text =
            serde_json::to_vec(&Memo { request: self, source, rootfs, prepared: prepared.clone() }).ok()?;
        if text.len() as u64 > LENGTH_MAX {
            return None;
        }
        trusted_path::make_folder(folder).ok()?;
        let memos: Vec<_> = fs::read_dir(folder).ok()?.flatten().collect();
        if memos.len() >= MEMOS_MAX {
            memos.into_iter().for_each(|memo| drop(fs::remove_file(memo.path())));
        }
        // Complete at once, for other readers. Two writers write the same.
        let draft = folder.join(format!("{name}.{}", std::process::id()));
        let written = File::create_new(&draft).and_then(|mut file| file.write_all(&text));
        let renamed = written.and_then(|()| fs::rename(&draft, folder.join(&name)));
        if renamed.is_err() {
            let _ = fs::remove_file(draft);
        }
        renamed.ok()
    }

    /// Whether a path is that of a converted image in the cache: `CACHE/VERSION/DIGEST/root.erofs`.
    fn has_image(&self, rootfs: &Path) -> bool {
        is_plain(rootfs) && is_converted(rootfs) && rootfs.ancestors().nth(3) == Some(&self.cache)
    }

    /// Whether the answer may depend on this file: the one that the words of the request name, or the cache's file for a name
    /// of a registry, `CACHE/VERSION/DIGEST.name`.
    fn can_name(&self, source: &Path) -> bool {
        if is_plain(source) && source.ancestors().nth(2) == Some(&self.cache) {
            return source.extension() == Some(OsStr::new("name"));
        }
        let words = self.image.as_bytes();
        let prefixes = [&b""[..], b"oci:", b"oci-archive:", b"docker-archive:"];
        let paths = prefixes.into_iter().filter_map(|prefix| words.strip_prefix(prefix)).flat_map(|path| {
            let ends = path.iter().enumerate().filter(|(_, byte)| **byte == b':').map(|(at, _)| at);
            ends.chain([path.len()]).map(|end| Path::new(OsStr::from_bytes(&path[..end])))
        });
        let mut paths = paths.filter_map(|path| std::path::absolute(self.directory.join(path)).ok());
        paths.any(|path| source == path || source == path.join("index.json"))
    }

    /// The name of the file.
    fn name(&self) -> String {
        let mut hasher = DefaultHasher::new();
        (&self.image, &self.directory, &self.user, &self.cache).hash(&mut hasher);
        format!("{:016x}", hasher.finish())
    }
}

/// Whether a path is absolute and has no `..`.
fn is_plain(path: &Path) -> bool {
    path.is_absolute() && !path.components().any(|component| component == Component::ParentDir)
}

/// The directory of memos.
pub(super) fn folder() -> Option<PathBuf> {
    Some(kernel::cache()?.join("images"))
}

fn read(path: &Path) -> Option<Memo> {
    let mut text = Vec::new();
    File::open(path).ok()?.take(LENGTH_MAX).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::ImageConfig;
    use oci_protocol::Depends;

    /// An archive, its converted image, and a program.
    struct Files(tempfile::TempDir);

    impl Files {
        fn new() -> Self {
            let this = Self(tempfile::tempdir().unwrap());
            fs::create_dir(this.path("memos")).unwrap();
            fs::create_dir_all(this.rootfs().parent().unwrap()).unwrap();
            for file in [this.path("a.tar"), this.path("program"), this.rootfs()] {
                fs::write(&file, "1").unwrap();
                File::open(&file).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
            }
            fs::write(this.rootfs().with_file_name("names"), "a.tar").unwrap();
            this
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn rootfs(&self) -> PathBuf {
            self.path("cache/oci/v2").join("0123456789abcdef".repeat(4)).join("root.erofs")
        }

        fn request(&self, image: &str, user: Option<&str>) -> Request {
            self.request_in(self.0.path(), image, user)
        }

        fn request_in(&self, directory: &Path, image: &str, user: Option<&str>) -> Request {
            let program = self.path("program");
            Request::in_cache(&self.path("cache"), directory, image.as_ref(), user, &program).unwrap()
        }

        fn prepared(&self) -> Prepared {
            Prepared {
                rootfs: self.rootfs(),
                digest: "sha256:1".to_owned(),
                config: ImageConfig { cmd: vec!["sh".to_owned()], ..ImageConfig::default() },
                depends: Depends { source: self.path("a.tar"), absent: vec![self.path("a.tar:b")] },
            }
        }

        /// Remembers the image as if the program had been started in a while, so that all files are old.
        fn remember(&self) {
            let later = SystemTime::now() + Duration::from_secs(10);
            self.request("a.tar", None).remember(&self.path("memos"), &self.prepared(), later);
        }

        fn recall(&self) -> Option<Prepared> {
            self.request("a.tar", None).recall(&self.path("memos"))
        }
    }

    #[test]
    fn an_answer_is_remembered_for_the_same_request() {
        let files = Files::new();
        assert_eq!(files.recall(), None);
        files.remember();
        let names = files.rootfs().with_file_name("names");
        File::open(&names).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(files.recall(), Some(files.prepared()));
        assert!(fs::metadata(names).unwrap().modified().unwrap() > SystemTime::UNIX_EPOCH, "the last use");
        let memos = files.path("memos");
        assert_eq!(files.request("b.tar", None).recall(&memos), None);
        assert_eq!(files.request("a.tar", Some("web")).recall(&memos), None);
        assert_eq!(files.request_in(Path::new("/"), "a.tar", None).recall(&memos), None);
        // A file of the memo's name for another request.
        let other = files.request("b.tar", None);
        fs::copy(memos.join(files.request("a.tar", None).name()), memos.join(other.name())).unwrap();
        assert_eq!(other.recall(&memos), None);
        assert_eq!(fs::read_dir(memos).unwrap().count(), 2, "no draft is left");
    }

    #[test]
    fn a_change_makes_an_answer_invalid() {
        let is_forgotten = |change: fn(&Files)| {
            let files = Files::new();
            files.remember();
            assert!(files.recall().is_some());
            change(&files);
            files.recall().is_none()
        };
        assert!(is_forgotten(|files| fs::write(files.path("a.tar"), "2").unwrap()));
        assert!(is_forgotten(|files| fs::remove_file(files.path("a.tar")).unwrap()));
        assert!(is_forgotten(|files| fs::write(files.path("a.tar:b"), "2").unwrap()));
        assert!(is_forgotten(|files| fs::write(files.rootfs(), "2").unwrap()));
        assert!(is_forgotten(|files| fs::remove_dir_all(files.rootfs().parent().unwrap()).unwrap()));
        assert!(is_forgotten(|files| fs::write(files.path("program"), "2").unwrap()));
        // Of the same length, with the time of the old one: another inode.
        assert!(is_forgotten(|files| {
            fs::write(files.path("new"), "2").unwrap();
            File::open(files.path("new")).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
            fs::rename(files.path("new"), files.path("a.tar")).unwrap();
        }));
        // A damaged memo, and one that other users can change.
        assert!(is_forgotten(|files| {
            let memo = files.path("memos").join(files.request("a.tar", None).name());
            fs::write(&memo, &fs::read(&memo).unwrap()[1..]).unwrap();
        }));
        assert!(is_forgotten(|files| {
            use std::os::unix::fs::PermissionsExt;
            fs::set_permissions(files.path("memos"), fs::Permissions::from_mode(0o777)).unwrap();
        }));
    }

    #[test]
    fn what_may_have_changed_meanwhile_is_not_remembered() {
        let files = Files::new();
        files.request("a.tar", None).remember(&files.path("memos"), &files.prepared(), SystemTime::now());
        assert_eq!(files.recall(), None, "the archive was written just before the program was started");
        let prepared = Prepared { depends: Depends::default(), ..files.prepared() };
        let later = SystemTime::now() + Duration::from_secs(10);
        files.request("a.tar", None).remember(&files.path("memos"), &prepared, later);
        assert_eq!(files.recall(), None, "the program does not say what the answer depends on");
    }

    #[test]
    fn answers_that_the_request_cannot_have_are_not_remembered() {
        let files = Files::new();
        let (memos, later) = (files.path("memos"), SystemTime::now() + Duration::from_secs(10));
        let is_remembered = |change: &dyn Fn(&mut Prepared)| {
            let mut prepared = files.prepared();
            change(&mut prepared);
            files.request("a.tar", None).remember(&memos, &prepared, later);
            let found = files.recall();
            let _ = fs::remove_file(memos.join(files.request("a.tar", None).name()));
            found.is_some()
        };
        assert!(is_remembered(&|_| {}));
        // Files that exist and do not change.
        fs::copy(files.rootfs(), files.path("b.tar")).unwrap();
        let elsewhere = files.path("other").join("0123456789abcdef".repeat(4)).join("root.erofs");
        fs::create_dir_all(elsewhere.parent().unwrap()).unwrap();
        fs::copy(files.rootfs(), &elsewhere).unwrap();
        assert!(!is_remembered(&|prepared| prepared.depends.source = files.path("b.tar")));
        assert!(!is_remembered(&|prepared| prepared.depends.source = "/etc/hostname".into()));
        assert!(!is_remembered(&|prepared| prepared.rootfs.clone_from(&elsewhere)));
        assert!(!is_remembered(&|prepared| {
            prepared.rootfs =
                files.path("cache/oci/..").join(elsewhere.strip_prefix(files.0.path()).unwrap());
        }));
    }

    #[test]
    fn a_request_can_name_its_files() {
        let files = Files::new();
        let can_name = |image: &str, source: &str| files.request(image, None).can_name(&files.path(source));
        assert!(
            can_name("./a.tar", "a.tar") && can_name("a.tar:tag", "a.tar") && can_name("oci:a:b:c", "a:b")
        );
        assert!(
            can_name("./layout:python", "layout/index.json") && can_name("busybox", "cache/oci/v2/1.name")
        );
        assert!(!can_name("a.tar", "b.tar") && !can_name("busybox", "cache/oci/v2/1/root.erofs"));
    }

    #[test]
    fn the_number_of_memos_is_bounded() {
        let files = Files::new();
        let memos = files.path("memos");
        for number in 0..MEMOS_MAX {
            fs::write(memos.join(number.to_string()), "").unwrap();
        }
        files.remember();
        assert!(files.recall().is_some());
        assert_eq!(fs::read_dir(memos).unwrap().count(), 1);
    }
}
