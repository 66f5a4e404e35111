//! Volumes: disks that outlive the guests that mount them. A volume is a file with an ext4 filesystem in the user's data
//! directory; the name of the file is the volume's.
//!
//! The file is locked as every drive is: one guest may mount it writable, or any number read-only.

use crate::guest::guests;
use crate::size;
use rustix::fs::{FlockOperation, RenameFlags, flock, renameat_with};
use rustix::io::Errno;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// An error of a volume.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VolumeError {
    /// The name is invalid.
    #[error(
        "invalid volume name {0:?}: use up to 64 letters, digits, '.', '_' and '-', and start with a letter or digit"
    )]
    Name(String),
    /// No volume has this name.
    #[error("no volume named {0}; `kindling volume ls` lists all volumes")]
    Unknown(String),
    /// A volume of this name exists.
    #[error("a volume named {0} exists already")]
    Taken(String),
    /// A guest has mounted the volume, and one of the two mounts is writable.
    #[error("the volume {name} is in use{}", guest.as_ref().map(|guest| format!(" by the guest {guest}")).unwrap_or_default())]
    InUse {
        /// Name of the volume.
        name: String,
        /// Name of a guest that has mounted the volume, if known.
        guest: Option<String>,
    },
    /// The volume was not unmounted cleanly, and its journal must be recovered before a read-only mount.
    #[error(
        "the volume {0} was not unmounted cleanly; mount it writable in a guest once, which recovers its journal"
    )]
    NotClean(String),
    /// The size is invalid.
    #[error("invalid volume size {0:?}: use 16M to 16T, in bytes or with the suffix K, M, G or T")]
    Size(String),
    /// The program `mke2fs` is not installed.
    #[error("cannot create a volume without mke2fs; install the package e2fsprogs")]
    NoMke2fs,
    /// `mke2fs` failed.
    #[error("mke2fs cannot create the volume {name}: {message}")]
    Mke2fs {
        /// Name of the volume.
        name: String,
        /// Last line of mke2fs's standard error.
        message: String,
    },
    /// Other users can change the directory of volumes.
    #[error("cannot use the directory of volumes")]
    Untrusted(#[from] trusted_path::Error),
    /// The user has no data directory.
    #[error("cannot find the directory of volumes; set XDG_DATA_HOME or HOME to an absolute path")]
    NoHome,
    /// An operation on a file of the host failed.
    #[error("cannot {what} {}", path.display())]
    Host {
        /// The operation.
        what: &'static str,
        /// Path of the file.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
}

impl VolumeError {
    /// Returns whether the request is at fault, rather than the host.
    #[must_use]
    pub const fn is_user_error(&self) -> bool {
        !matches!(self, Self::Host { .. } | Self::Mke2fs { .. })
    }
}

fn host(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> VolumeError {
    move |source| VolumeError::Host { what, path: path.to_owned(), source }
}

/// Default size of a volume in bytes. The file is sparse: unused blocks take no space on the host.
pub const DEFAULT_SIZE: u64 = 10 << 30;
const SIZES: std::ops::RangeInclusive<u64> = 16 << 20..=16 << 40;

/// An existing volume.
#[derive(Debug)]
pub struct Volume {
    /// Name.
    pub name: String,
    /// Path of the file with the filesystem.
    pub path: PathBuf,
}

impl Volume {
    /// Opens the volume of this name.
    ///
    /// # Errors
    /// When the name is invalid, or the user has no volume of this name.
    pub fn named(name: &str) -> Result<Self, VolumeError> {
        Self::at(path_of(name)?, name)
    }

    fn at(path: PathBuf, name: &str) -> Result<Self, VolumeError> {
        match path.symlink_metadata() {
            Ok(metadata) if metadata.is_file() => Ok(Self { name: name.to_owned(), path }),
            Ok(_) => Err(VolumeError::Unknown(name.to_owned())),
            Err(error) if error.kind() == ErrorKind::NotFound => Err(VolumeError::Unknown(name.to_owned())),
            Err(error) => Err(host("look at", &path)(error)),
        }
    }

    /// Returns all volumes of the user, sorted by name.
    ///
    /// # Errors
    /// When the directory of volumes cannot be read.
    pub fn all() -> Result<Vec<Self>, VolumeError> {
        let folder = folder()?;
        let entries = match folder.read_dir() {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            result => result.map_err(host("read", &folder))?,
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let (names, others): (Vec<_>, Vec<_>) =
            names.partition(|name| crate::mount::volume_name(name.as_bytes()).is_some());
        for name in others.iter().filter(|name| is_draft_name(name)) {
            remove_abandoned_draft(&folder.join(name));
        }
        let volume = |name: &String| Self::at(folder.join(name), name).ok();
        let mut all: Vec<_> = names.iter().filter_map(volume).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// Creates a volume with an empty ext4 filesystem; `size` is in bytes, as [`parse_size`] returns it.
    ///
    /// # Errors
    /// When the name is invalid or taken, mke2fs is missing or fails, or the host cannot create the file.
    pub fn create(name: &str, size: u64) -> Result<Self, VolumeError> {
        let path = path_of(name)?;
        let folder = path.parent().unwrap_or(&path);
        trusted_path::make_folder(folder)?;
        if path.exists() {
            return Err(VolumeError::Taken(name.to_owned()));
        }
        // No volume has a name that starts with a dot.
        let draft = Draft(folder.join(format!(".{:016x}.{name}", crate::token())));
        // The lock of the file is held until it has its name.
        let _file = make_filesystem(name, &draft.0, size)?;
        match renameat_with(rustix::fs::CWD, &draft.0, rustix::fs::CWD, &path, RenameFlags::NOREPLACE) {
            Ok(()) => {}
            Err(Errno::EXIST) => return Err(VolumeError::Taken(name.to_owned())),
            // The filesystem does not support RENAME_NOREPLACE.
            Err(Errno::INVAL | Errno::NOSYS) => {
                std::fs::hard_link(&draft.0, &path).map_err(|error| match error.kind() {
                    ErrorKind::AlreadyExists => VolumeError::Taken(name.to_owned()),
                    _ => host("create", &path)(error),
                })?;
            }
            Err(error) => return Err(host("create", &path)(error.into())),
        }
        Ok(Self { name: name.to_owned(), path })
    }

    /// Returns the size of the disk and the space that its file takes on the host, both in bytes.
    ///
    /// # Errors
    /// When the attributes of the file cannot be read.
    pub fn size(&self) -> Result<(u64, u64), VolumeError> {
        let metadata = self.path.metadata().map_err(host("look at", &self.path))?;
        Ok((metadata.len(), metadata.blocks() * 512))
    }

    /// Removes the volume and its content.
    ///
    /// # Errors
    /// When a guest has mounted the volume, or the host cannot remove the file.
    pub fn remove(self) -> Result<(), VolumeError> {
        let _file = self.lock(FlockOperation::NonBlockingLockExclusive)?;
        std::fs::remove_file(&self.path).map_err(host("remove", &self.path))
    }

    /// Opens and locks the file. If it is locked but no guest that mounts it runs, this waits for a limited time: the lock
    /// may be that of a monitor whose front was killed, and which is about to end.
    fn lock(&self, lock: FlockOperation) -> Result<File, VolumeError> {
        const LOCK_TIMEOUT: Duration = Duration::from_secs(2);
        const INTERVAL: Duration = Duration::from_millis(5);
        let file = File::open(&self.path).map_err(host("open", &self.path))?;
        let until = Instant::now() + LOCK_TIMEOUT;
        while flock(&file, lock) == Err(Errno::WOULDBLOCK) {
            let guest = self.guests().into_iter().next();
            if guest.is_some() || Instant::now() >= until {
                return Err(VolumeError::InUse { name: self.name.clone(), guest });
            }
            std::thread::sleep(INTERVAL);
        }
        // Other errors are ignored: some filesystems do not support locks.
        Ok(file)
    }

    /// Returns the names of the running guests that mount the volume.
    pub fn guests(&self) -> Vec<String> {
        let all = guests().unwrap_or_default().into_iter();
        all.filter(|guest| guest.is_alive && guest.record.volumes.contains(&self.name))
            .map(|guest| guest.name)
            .collect()
    }
}

/// Returns the path of a volume's disk for a guest. A missing volume is created, unless it would be mounted read-only. The
/// lock that is taken here is released at once, so that an error names the volume; the monitor locks the disk when it
/// opens it.
///
/// # Errors
/// When the volume is in use, cannot be created, or needs recovery before a read-only mount.
pub fn for_guest(name: &str, is_read_only: bool) -> Result<PathBuf, VolumeError> {
    let volume = match Volume::named(name) {
        Err(VolumeError::Unknown(_)) if !is_read_only => match Volume::create(name, DEFAULT_SIZE) {
            // Another process has created the volume in between.
            Err(VolumeError::Taken(_)) => Volume::named(name),
            result => result,
        },
        result => result,
    }?;
    if is_read_only {
        let file = volume.lock(FlockOperation::NonBlockingLockShared)?;
        if needs_recovery(&file).map_err(host("read", &volume.path))? {
            return Err(VolumeError::NotClean(volume.name));
        }
    } else {
        volume.lock(FlockOperation::NonBlockingLockExclusive)?;
    }
    Ok(volume.path)
}

/// Whether the filesystem's journal must be replayed, for which the disk must be writable (`s_feature_incompat` of
/// `struct ext4_super_block`, EXT4_FEATURE_INCOMPAT_RECOVER).
fn needs_recovery(file: &File) -> io::Result<bool> {
    const OFFSET: u64 = 1024 + 0x60;
    const RECOVER: u8 = 4;
    let mut byte = [0];
    file.read_exact_at(&mut byte, OFFSET)?;
    Ok(byte[0] & RECOVER != 0)
}

/// Whether a file has the superblock of an ext4 filesystem (`s_magic` in fs/ext4/ext4.h).
fn has_superblock(file: &File) -> io::Result<bool> {
    const OFFSET: u64 = 1024 + 0x38;
    let mut magic = [0; 2];
    file.read_exact_at(&mut magic, OFFSET)?;
    Ok(u16::from_le_bytes(magic) == 0xef53)
}

/// A file that is removed on drop, unless it was renamed.
struct Draft(PathBuf);

impl Drop for Draft {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Whether a file has the name of a draft: a dot, 16 hexadecimal digits, a dot, and the name of the volume.
fn is_draft_name(name: &str) -> bool {
    let parts = name.strip_prefix('.').and_then(|name| name.split_once('.'));
    parts.is_some_and(|(number, _)| number.len() == 16 && number.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Removes a draft that a killed process has left: no process has locked it, and it is too old to be locked soon.
fn remove_abandoned_draft(path: &Path) {
    const AGE: Duration = Duration::from_secs(60);
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let Ok(file) = options.open(path) else { return };
    let age =
        file.metadata().and_then(|metadata| metadata.modified()).ok().and_then(|time| time.elapsed().ok());
    if age.is_some_and(|age| age > AGE) && flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
        let _ = std::fs::remove_file(path);
    }
}

/// Features of the filesystem, independent of the host's mke2fs.conf. All guest kernels support them.
const FEATURES: &str = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,\
                        large_file,huge_file,dir_nlink,extra_isize,metadata_csum";

/// Creates a file with an empty filesystem, and returns it, locked. Inode tables and journal need not be initialized: they are holes of the file,
/// which read as zeroes.
fn make_filesystem(name: &str, path: &Path, size: u64) -> Result<File, VolumeError> {
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
    let file = file.and_then(|file| file.set_len(size).map(|()| file)).map_err(host("create", path))?;
    // Some filesystems do not support locks; drafts of killed processes remain there.
    let _ = flock(&file, FlockOperation::NonBlockingLockExclusive);
    let mut command = Command::new(trusted_path::program("mke2fs").ok_or(VolumeError::NoMke2fs)?);
    command
        .env_clear()
        .env("MKE2FS_CONFIG", "/dev/null")
        .args(["-q", "-F", "-b", "4096", "-I", "256", "-i", "16384"]);
    command.args(["-m", "0", "-e", "remount-ro", "-O", FEATURES, "-E"]);
    command.arg("nodiscard,root_owner=0:0,lazy_itable_init=1,lazy_journal_init=1").arg(path);
    let output = command.stdin(Stdio::null()).output().map_err(host("create a filesystem in", path))?;
    // mke2fs does not report every error: if it cannot read a block, it may leave out the superblock.
    if !output.status.success() || !has_superblock(&file).map_err(host("read", path))? {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let message =
            text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it failed without a message");
        return Err(VolumeError::Mke2fs { name: name.to_owned(), message: message.to_owned() });
    }
    file.sync_all().map_err(host("write", path))?;
    Ok(file)
}

/// The path of the file of a volume.
fn path_of(name: &str) -> Result<PathBuf, VolumeError> {
    let name =
        crate::mount::volume_name(name.as_bytes()).ok_or_else(|| VolumeError::Name(name.to_owned()))?;
    Ok(folder()?.join(name))
}

/// The user's directory of volumes.
fn folder() -> Result<PathBuf, VolumeError> {
    crate::data::folder("volumes")?.ok_or(VolumeError::NoHome)
}

/// Parses the size of a volume: bytes, or a number with the suffix K, M, G or T (powers of 1024), from 16M to 16T. Returns
/// bytes, rounded down to a multiple of 4096.
///
/// # Errors
/// When the text is not a size, or out of range.
pub fn parse_size(text: &str) -> Result<u64, VolumeError> {
    let size = size::parse(text, size::BYTES).filter(|size| SIZES.contains(size));
    let size = size.ok_or_else(|| VolumeError::Size(text.to_owned()))?;
    // Disks consist of whole blocks.
    Ok(size & !4095)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::SystemTime;

    #[test]
    fn only_old_drafts_that_no_process_has_locked_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let draft = |name: &str, age: u64| {
            let path = folder.path().join(name);
            let file = File::create(&path).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
            (path, file)
        };
        let (old, _) = draft(".0000000000000001.data", 120);
        let (new, _) = draft(".0000000000000002.data", 0);
        let (locked, file) = draft(".0000000000000003.data", 120);
        flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
        for path in [&old, &new, &locked] {
            remove_abandoned_draft(path);
        }
        assert_eq!([&old, &new, &locked].map(|path| path.exists()), [false, true, true]);
        assert!(is_draft_name(".0123456789abcdef.data") && is_draft_name(".0123456789abcdef.a.b"));
        for name in [
            "data",
            ".data",
            ".1.data",
            "0123456789abcdef.data",
            ".0123456789abcdeg.data",
            ".0123456789abcdef",
        ] {
            assert!(!is_draft_name(name), "{name}");
        }
    }

    #[test]
    fn sizes_have_units() {
        for (text, size) in [
            ("16777217", 16 << 20),
            ("16m", 16 << 20),
            ("20480K", 20 << 20),
            ("10G", 10 << 30),
            ("16T", 16 << 40),
        ] {
            assert_eq!(parse_size(text).unwrap(), size, "{text}");
        }
        for text in [
            "",
            "G",
            "15M",
            "17T",
            "+5G",
            "-5G",
            "5 G",
            "5GB",
            "5P",
            "1e9",
            "99999999999999999999",
            "20000000000000T",
        ] {
            let message = parse_size(text).unwrap_err().to_string();
            assert!(message.contains("invalid volume size"), "{message}");
        }
    }

    #[test]
    fn the_superblock_says_whether_the_journal_needs_recovery() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        assert!(!needs_recovery(&file).unwrap());
        file.write_all_at(&[0xc2 | 4], 1024 + 0x60).unwrap();
        assert!(needs_recovery(&file).unwrap());
        file.set_len(1024).unwrap();
        assert!(needs_recovery(&file).is_err());
    }
}
