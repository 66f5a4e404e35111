//! The text form of mounts (`-v`): volumes, and folders of the host, at a path of the guest.

use kindling_vmm::config::devices::{Devices, Drive, SharedFolder};
use kindling_vmm::config::{Config, Mount, MountKind};
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// An invalid mount (`-v`). The message names the text and the invalid part.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("--volume {text}: {what}")]
pub struct MountError {
    text: String,
    what: &'static str,
}

/// A requested mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MountRequest {
    pub(crate) source: Source,
    /// Normalized absolute path in the guest: without `.`, `..` and repeated slashes.
    pub(crate) target: PathBuf,
    pub(crate) is_read_only: bool,
}

/// Source of a mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// Path of a folder of the host, as the user wrote it.
    Folder(PathBuf),
    /// Name of a volume.
    Volume(String),
}

impl MountRequest {
    /// Name of the volume, if the source is one.
    pub(crate) fn volume(&self) -> Option<&str> {
        match &self.source {
            Source::Volume(name) => Some(name),
            Source::Folder(_) => None,
        }
    }
}

/// Parses all mounts of a command line, and sorts them by target, so that a mount precedes those below it.
pub(crate) fn parse_all(texts: &[OsString]) -> Result<Vec<MountRequest>, MountError> {
    let mut all: Vec<MountRequest> = Vec::new();
    for text in texts {
        let wrong = |what| MountError { text: text.to_string_lossy().into_owned(), what };
        let request = parse(text.as_bytes()).map_err(wrong)?;
        if all.iter().any(|other| other.target == request.target) {
            return Err(wrong("the path in the guest is a mount point already"));
        }
        if request.volume().is_some() && all.iter().any(|other| other.volume() == request.volume()) {
            return Err(wrong("this volume is mounted at another path already"));
        }
        all.push(request);
    }
    all.sort_by(|a, b| a.target.cmp(&b.target));
    Ok(all)
}

fn parse(text: &[u8]) -> Result<MountRequest, &'static str> {
    const FORM: &str = "it is not of the form NAME:/GUEST[:ro] or /HOST:/GUEST[:ro]";
    let (text, is_read_only) = match (text.strip_suffix(b":ro"), text.strip_suffix(b":rw")) {
        (Some(text), _) => (text, true),
        (_, Some(text)) => (text, false),
        _ => (text, false),
    };
    // Paths of the host may contain colons. Paths in the guest may not, because the word after a colon may be an option
    // of docker that is not supported here.
    let colon = text.iter().rposition(|&byte| byte == b':').ok_or(FORM)?;
    let (source, target) = (&text[..colon], &text[colon + 1..]);
    if !target.starts_with(b"/") {
        return Err(if target.is_empty() {
            FORM
        } else {
            "the last part must be an absolute path in the guest, ro or rw"
        });
    }
    let source = match source {
        [b'/' | b'.' | b'~', ..] => Source::Folder(Path::new(std::ffi::OsStr::from_bytes(source)).to_owned()),
        _ => Source::Volume(volume_name(source).ok_or(
            "a volume's name is up to 64 letters, digits, '.', '_' and '-', and starts with a letter or digit; \
             a folder of the host starts with / or .",
        )?),
    };
    let mut normal = PathBuf::from("/");
    for component in Path::new(std::ffi::OsStr::from_bytes(target)).components() {
        match component {
            Component::Normal(name) => normal.push(name),
            Component::ParentDir => return Err("the path in the guest contains .."),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    if normal == Path::new("/") {
        return Err("the guest's / is the image, and cannot be a mount point");
    }
    Ok(MountRequest { source, target: normal, is_read_only })
}

/// Returns the name as a string if a volume can have it.
pub(crate) fn volume_name(name: &[u8]) -> Option<String> {
    const MAX_NAME_LEN: usize = 64;
    let is_valid = name.len() <= MAX_NAME_LEN
        && name.iter().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(byte))
        && name.first()?.is_ascii_alphanumeric();
    is_valid.then(|| String::from_utf8_lossy(name).into_owned())
}

/// Adds a volume's disk to the devices, and its mount to the guest's configuration.
pub(crate) fn add_volume(config: &mut Config, disk: PathBuf, request: &MountRequest) {
    let number = config.devices.drives.len();
    let is_read_only = request.is_read_only;
    config.devices.drives.push(Drive { is_read_only, ..Drive::new(format!("volume{number}"), disk) });
    config.guest.mounts.push(Mount {
        kind: MountKind::Volume,
        is_read_only,
        source: Devices::drive_name(number).into_bytes(),
        target: request.target.as_os_str().as_bytes().to_vec(),
    });
}

/// Adds a folder of the host to the devices, and its mount to the guest's configuration. The user of the guest's command
/// owns the files.
pub(crate) fn add_folder(config: &mut Config, path: &Path, request: &MountRequest) {
    // Pre-booted kernels have read the tag, so that it depends on the folder's index only.
    let tag = format!("folder{}", config.devices.shared_folders.len());
    let is_read_only = request.is_read_only;
    config.devices.shared_folders.push(SharedFolder {
        tag: tag.clone(),
        path: path.to_owned(),
        read_only: is_read_only,
        owner: (config.guest.user_id, config.guest.group_id),
    });
    config.guest.mounts.push(Mount {
        kind: MountKind::Folder,
        is_read_only,
        source: tag.into_bytes(),
        target: request.target.as_os_str().as_bytes().to_vec(),
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(texts: &[&str]) -> Result<Vec<MountRequest>, String> {
        let texts: Vec<_> = texts.iter().map(OsString::from).collect();
        parse_all(&texts).map_err(|error| error.to_string())
    }

    #[test]
    fn volumes_and_folders_are_distinguished() {
        let volume = |name: &str| Source::Volume(name.to_owned());
        let folder = |path: &str| Source::Folder(path.into());
        for (text, source, target, is_read_only) in [
            ("data:/var/lib/data", volume("data"), "/var/lib/data", false),
            ("a.B_c-1:/x:ro", volume("a.B_c-1"), "/x", true),
            ("0:/x:rw", volume("0"), "/x", false),
            ("ro:/ro", volume("ro"), "/ro", false),
            ("data://var/./lib//x/", volume("data"), "/var/lib/x", false),
            ("/srv:/srv", folder("/srv"), "/srv", false),
            ("./x:/y:ro", folder("./x"), "/y", true),
            ("..:/y", folder(".."), "/y", false),
            ("~/a:b:/y", folder("~/a:b"), "/y", false),
        ] {
            let expected = MountRequest { source, target: target.into(), is_read_only };
            assert_eq!(all(&[text]), Ok(vec![expected]), "{text}");
        }
    }

    #[test]
    fn a_mount_precedes_those_below_it() {
        let request = all(&["c:/x/y", "a:/xy", "b:/x", "d:/x/y/z"]).unwrap();
        let targets: Vec<_> = request.iter().map(|mount| mount.target.to_str().unwrap()).collect();
        assert_eq!(targets, ["/x", "/x/y", "/x/y/z", "/xy"]);
    }

    #[test]
    fn errors_name_the_invalid_part() {
        for (texts, expected) in [
            (&["data"][..], "--volume data: it is not of the form NAME:/GUEST"),
            (&["/data"], "it is not of the form"),
            (&["data:"], "it is not of the form"),
            (&["data:ro"], "it is not of the form"),
            (&[":/x"], "a volume's name is up to 64 letters"),
            (&["-a:/x"], "a volume's name is up to 64 letters"),
            (&["a b:/x"], "a volume's name is up to 64 letters"),
            (&["a/b:/x"], "a folder of the host starts with / or ."),
            (&["ä:/x"], "a volume's name is up to 64 letters"),
            (&["data:x"], "the last part must be an absolute path in the guest, ro or rw"),
            (&["data:/x:z"], "the last part must be an absolute path in the guest, ro or rw"),
            (&["data:/x:ro:ro"], "the last part must be an absolute path in the guest, ro or rw"),
            (&["data:/"], "the guest's / is the image"),
            (&["data://./"], "the guest's / is the image"),
            (&["data:/x/../y"], "the path in the guest contains .."),
            (&["a:/x/", "b:/x"], "--volume b:/x: the path in the guest is a mount point already"),
        ] {
            let message = all(texts).unwrap_err();
            assert!(message.contains(expected), "{message:?} should say {expected:?}");
        }
        let long = "x".repeat(64);
        assert!(all(&[&format!("{long}:/x")]).is_ok() && all(&[&format!("{long}x:/x")]).is_err());
    }
}
