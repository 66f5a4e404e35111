//! Volumes: disks that outlive the guests that have them. Each is a file with an ext4 filesystem in the user's data
//! directory, named as the volume.
//!
//! Its lock is that of every drive: one guest writes, or any number read.

use crate::guest::guests;
use rustix::fs::{FlockOperation, RenameFlags, flock, renameat_with};
use rustix::io::Errno;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Why a volume cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VolumeError {
    /// A name that none can have.
    #[error(
        "{0:?} is no name for a volume: letters, digits, '.', '_' and '-', at most 64, and the first a letter or digit"
    )]
    Name(String),
    /// No volume has this name.
    #[error("there is no volume named {0}; `kindling volume ls` lists them")]
    Unknown(String),
    /// A volume has it already.
    #[error("there is a volume named {0} already")]
    Taken(String),
    /// Guests have it, or one that writes.
    #[error("the volume {name} is in use{}", guest.as_ref().map(|guest| format!(" by the guest {guest}")).unwrap_or_default())]
    InUse {
        /// The volume.
        name: String,
        /// A guest that has it.
        guest: Option<String>,
    },
    /// A guest that wrote to it did not end in order.
    #[error(
        "the guest that had the volume {0} last did not end in order; one that may write to it, once, mends that"
    )]
    NotClean(String),
    /// Something that is no size, or none of a volume.
    #[error("{0:?} is no size of a volume: 16M to 16T, in bytes or with K, M, G or T behind it")]
    Size(String),
    /// The program that makes filesystems is missing.
    #[error("making a volume takes mke2fs, of the package e2fsprogs")]
    NoMke2fs,
    /// That program said why not.
    #[error("mke2fs cannot make the volume {name}: {message}")]
    Mke2fs {
        /// The volume.
        name: String,
        /// Its last line.
        message: String,
    },
    /// Nothing says where volumes are.
    #[error("neither XDG_DATA_HOME nor HOME says where volumes are kept")]
    NoHome,
    /// The host refused something.
    #[error("cannot {what} {}", path.display())]
    Host {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
}

impl VolumeError {
    /// Whether asking for something else can help, rather than the host.
    #[must_use]
    pub const fn is_users(&self) -> bool {
        !matches!(self, Self::Host { .. } | Self::Mke2fs { .. })
    }
}

fn host(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> VolumeError {
    move |source| VolumeError::Host { what, path: path.to_owned(), source }
}

/// Bytes of a volume for which nobody chose. What its guest does not use takes no room on the host.
pub const DEFAULT_SIZE: u64 = 10 << 30;
const SIZES: std::ops::RangeInclusive<u64> = 16 << 20..=16 << 40;

/// A volume that exists.
#[derive(Debug)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// The file with its filesystem.
    pub path: PathBuf,
}

impl Volume {
    /// The volume of a name.
    pub fn named(name: &str) -> Result<Self, VolumeError> {
        let path = place_of(name)?;
        match path.symlink_metadata() {
            Ok(metadata) if metadata.is_file() => Ok(Self { name: name.to_owned(), path }),
            Ok(_) => Err(VolumeError::Unknown(name.to_owned())),
            Err(error) if error.kind() == ErrorKind::NotFound => Err(VolumeError::Unknown(name.to_owned())),
            Err(error) => Err(host("look at", &path)(error)),
        }
    }

    /// All volumes of this user, by name.
    pub fn all() -> Result<Vec<Self>, VolumeError> {
        let folder = folder()?;
        let entries = match folder.read_dir() {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            result => result.map_err(host("read", &folder))?,
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut all: Vec<_> = names.filter_map(|name| Self::named(&name).ok()).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// Makes an empty one.
    pub fn create(name: &str, size: u64) -> Result<Self, VolumeError> {
        let path = place_of(name)?;
        let folder = folder()?;
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .map_err(host("make the folder", &folder))?;
        if path.exists() {
            return Err(VolumeError::Taken(name.to_owned()));
        }
        // No volume can have a name with a dot in front.
        let draft = Draft(folder.join(format!(".{}.{}.{name}", std::process::id(), next_number())));
        make_filesystem(name, &draft.0, size)?;
        match renameat_with(rustix::fs::CWD, &draft.0, rustix::fs::CWD, &path, RenameFlags::NOREPLACE) {
            Ok(()) => {}
            Err(Errno::EXIST) => return Err(VolumeError::Taken(name.to_owned())),
            // A filesystem that knows no such renaming.
            Err(Errno::INVAL | Errno::NOSYS) => {
                std::fs::hard_link(&draft.0, &path).map_err(|error| match error.kind() {
                    ErrorKind::AlreadyExists => VolumeError::Taken(name.to_owned()),
                    _ => host("make", &path)(error),
                })?;
            }
            Err(error) => return Err(host("make", &path)(error.into())),
        }
        Ok(Self { name: name.to_owned(), path })
    }

    /// Bytes that it can hold, with what the filesystem needs itself, and bytes that it takes on the host.
    ///
    /// # Errors
    /// When the host refuses it.
    pub fn size(&self) -> Result<(u64, u64), VolumeError> {
        let metadata = self.path.metadata().map_err(host("look at", &self.path))?;
        Ok((metadata.len(), metadata.blocks() * 512))
    }

    /// Removes it, unless a guest has it.
    pub fn remove(self) -> Result<(), VolumeError> {
        let _file = self.lock(FlockOperation::NonBlockingLockExclusive)?;
        std::fs::remove_file(&self.path).map_err(host("remove", &self.path))
    }

    /// Opens it with a lock, which others have until their end. Where none of them runs, it may be the monitor of a guest
    /// whose front was killed, which ends in a moment.
    fn lock(&self, lock: FlockOperation) -> Result<File, VolumeError> {
        const PATIENCE: Duration = Duration::from_secs(2);
        const INTERVAL: Duration = Duration::from_millis(5);
        let file = File::open(&self.path).map_err(host("open", &self.path))?;
        let until = Instant::now() + PATIENCE;
        while flock(&file, lock) == Err(Errno::WOULDBLOCK) {
            let guest = self.guests().into_iter().next();
            if guest.is_some() || Instant::now() >= until {
                return Err(VolumeError::InUse { name: self.name.clone(), guest });
            }
            std::thread::sleep(INTERVAL);
        }
        // Some filesystems have no locks.
        Ok(file)
    }

    /// Guests that run and have it.
    pub fn guests(&self) -> Vec<String> {
        let all = guests().unwrap_or_default().into_iter();
        all.filter(|guest| guest.is_alive && guest.record.volumes.contains(&self.name))
            .map(|guest| guest.name)
            .collect()
    }
}

/// The disk of a volume for a guest, which is made where it is missing and can be filled. That it is free is seen
/// again, and for good, when the disk is opened.
pub fn for_guest(name: &str, is_read_only: bool) -> Result<PathBuf, VolumeError> {
    let volume = match Volume::named(name) {
        Err(VolumeError::Unknown(_)) if !is_read_only => match Volume::create(name, DEFAULT_SIZE) {
            // Somebody else was faster.
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

/// Whether a filesystem's journal has something that is to be written elsewhere, for which its disk must be writable
/// (`s_feature_incompat` of `struct ext4_super_block`, EXT4_FEATURE_INCOMPAT_RECOVER).
fn needs_recovery(file: &File) -> io::Result<bool> {
    const AT: u64 = 1024 + 0x60;
    const RECOVER: u8 = 4;
    let mut byte = [0];
    file.read_exact_at(&mut byte, AT)?;
    Ok(byte[0] & RECOVER != 0)
}

/// A number that this process has given to nothing else.
fn next_number() -> u64 {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    COUNT.fetch_add(1, Ordering::Relaxed)
}

/// A file that goes unless it was renamed.
struct Draft(PathBuf);

impl Drop for Draft {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Features of the filesystem, whatever this host's mke2fs.conf says: those that every kernel of guests knows.
const FEATURES: &str = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,\
                        large_file,huge_file,dir_nlink,extra_isize,metadata_csum";

/// Writes an empty filesystem into a new file. Tables of inodes and the journal need no zeroes: they are holes, and
/// read as such.
fn make_filesystem(name: &str, path: &Path, size: u64) -> Result<(), VolumeError> {
    // One of a process that had this one's number.
    let _ = std::fs::remove_file(path);
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let file = file.and_then(|file| file.set_len(size).map(|()| file)).map_err(host("make", path))?;
    let mut command = Command::new(trusted_path::program("mke2fs").ok_or(VolumeError::NoMke2fs)?);
    command.env("MKE2FS_CONFIG", "/dev/null").args(["-q", "-F", "-b", "4096", "-I", "256", "-i", "16384"]);
    command.args(["-m", "0", "-e", "remount-ro", "-O", FEATURES, "-E"]);
    command.arg("nodiscard,root_owner=0:0,lazy_itable_init=1,lazy_journal_init=1").arg(path);
    let output = command.stdin(Stdio::null()).output().map_err(host("make a filesystem in", path))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let message = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it ended without a word");
        return Err(VolumeError::Mke2fs { name: name.to_owned(), message: message.to_owned() });
    }
    file.sync_all().map_err(host("write", path))
}

/// The file of a volume with this name.
fn place_of(name: &str) -> Result<PathBuf, VolumeError> {
    let name =
        crate::mount::volume_name(name.as_bytes()).ok_or_else(|| VolumeError::Name(name.to_owned()))?;
    Ok(folder()?.join(name))
}

/// Where this user's volumes are.
fn folder() -> Result<PathBuf, VolumeError> {
    let given = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let data = given("XDG_DATA_HOME").or_else(|| Some(given("HOME")?.join(".local/share")));
    Ok(data.ok_or(VolumeError::NoHome)?.join("kindling/volumes"))
}

/// A size as users write it, in bytes.
pub fn parse_size(text: &str) -> Result<u64, VolumeError> {
    let wrong = || VolumeError::Size(text.to_owned());
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        _ => return Err(wrong()),
    };
    let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    let number: u64 = digits.parse().ok().filter(|_| is_number).ok_or_else(wrong)?;
    let size = number.checked_mul(1 << shift).filter(|size| SIZES.contains(size)).ok_or_else(wrong)?;
    // Disks have whole blocks.
    Ok(size & !4095)
}

#[cfg(test)]
mod tests {
    use super::*;

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
            assert!(message.contains("is no size of a volume"), "{message}");
        }
    }

    #[test]
    fn a_volume_whose_guest_was_killed_is_known_by_its_superblock() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        assert!(!needs_recovery(&file).unwrap());
        file.write_all_at(&[0xc2 | 4], 1024 + 0x60).unwrap();
        assert!(needs_recovery(&file).unwrap());
        file.set_len(1024).unwrap();
        assert!(needs_recovery(&file).is_err());
    }
}
