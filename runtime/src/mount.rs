//! `-v`: what of the host's a guest has in its root, as its user writes it.

use kindling_vmm::config::devices::{Drive, SharedFolder};
use kindling_vmm::config::{Config, Mount, MountKind};
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

/// What is wrong with the text behind `-v`.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("--volume {text}: {what}")]
pub struct MountError {
    text: String,
    what: &'static str,
}

/// One `-v`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MountRequest {
    pub(crate) source: Source,
    /// An absolute path without `.`, `..` and needless slashes.
    pub(crate) target: PathBuf,
    pub(crate) is_read_only: bool,
}

/// Where it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// A folder of the host's, as it was written.
    Folder(PathBuf),
    /// A volume of this name.
    Volume(String),
}

impl MountRequest {
    /// Name of its volume, if it is one.
    pub(crate) fn volume(&self) -> Option<&str> {
        match &self.source {
            Source::Volume(name) => Some(name),
            Source::Folder(_) => None,
        }
    }
}

/// Understands all `-v` of a command line. What lies inside another comes behind it.
pub(crate) fn parse_all(texts: &[OsString]) -> Result<Vec<MountRequest>, MountError> {
    let mut all: Vec<MountRequest> = Vec::new();
    for text in texts {
        let wrong = |what| MountError { text: text.to_string_lossy().into_owned(), what };
        let wanted = parse(text.as_bytes()).map_err(wrong)?;
        if all.iter().any(|other| other.target == wanted.target) {
            return Err(wrong("something else is mounted there already"));
        }
        if wanted.volume().is_some() && all.iter().any(|other| other.volume() == wanted.volume()) {
            return Err(wrong("this volume is mounted elsewhere already"));
        }
        all.push(wanted);
    }
    all.sort_by(|a, b| a.target.cmp(&b.target));
    Ok(all)
}

fn parse(text: &[u8]) -> Result<MountRequest, &'static str> {
    const FORM: &str = "it is not of the form NAME:/GUEST, /HOST:/GUEST, or one of both with :ro behind it";
    let (text, is_read_only) = match (text.strip_suffix(b":ro"), text.strip_suffix(b":rw")) {
        (Some(text), _) => (text, true),
        (_, Some(text)) => (text, false),
        _ => (text, false),
    };
    // Names of the host's may have colons, those in the guest not: behind one may stand what nobody knows here.
    let colon = text.iter().rposition(|&byte| byte == b':').ok_or(FORM)?;
    let (source, target) = (&text[..colon], &text[colon + 1..]);
    if !target.starts_with(b"/") {
        return Err(if target.is_empty() {
            FORM
        } else {
            "behind the last colon stands a path in the guest, ro or rw"
        });
    }
    let source = match source {
        [b'/' | b'.' | b'~', ..] => Source::Folder(Path::new(std::ffi::OsStr::from_bytes(source)).to_owned()),
        _ => Source::Volume(volume_name(source).ok_or(
            "a volume's name has letters, digits, '.', '_' and '-', at most 64, and the first a letter or digit; \
             a folder of the host begins with / or .",
        )?),
    };
    let mut normal = PathBuf::from("/");
    for component in Path::new(std::ffi::OsStr::from_bytes(target)).components() {
        match component {
            Component::Normal(name) => normal.push(name),
            Component::ParentDir => return Err("its path in the guest has .. in it"),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    if normal == Path::new("/") {
        return Err("the guest's / is the image's");
    }
    Ok(MountRequest { source, target: normal, is_read_only })
}

/// A name that a volume can have.
pub(crate) fn volume_name(name: &[u8]) -> Option<String> {
    const LONGEST: usize = 64;
    let is_fine = name.len() <= LONGEST
        && name.iter().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(byte))
        && name.first()?.is_ascii_alphanumeric();
    is_fine.then(|| String::from_utf8_lossy(name).into_owned())
}

/// Gives a machine a volume's disk, which its guest mounts.
pub(crate) fn add_volume(config: &mut Config, disk: PathBuf, wanted: &MountRequest) {
    let number = config.devices.drives.len();
    // As many letters as there can be drives: the configuration is checked afterwards.
    let letter = ('a'..='z').nth(number).unwrap_or('z');
    let is_read_only = wanted.is_read_only;
    config.devices.drives.push(Drive { is_read_only, ..Drive::new(format!("volume{number}"), disk) });
    config.guest.mounts.push(Mount {
        kind: MountKind::Volume,
        is_read_only,
        source: format!("/dev/vd{letter}").into_bytes(),
        target: wanted.target.as_os_str().as_bytes().to_vec(),
    });
}

/// Gives a machine a folder of the host's, whose files belong to the user that its program runs as.
pub(crate) fn add_folder(config: &mut Config, path: &Path, wanted: &MountRequest) {
    // The tag is known to kernels that were booted before, and the same for all first, second and third folders.
    let tag = format!("folder{}", config.devices.shared_folders.len());
    let is_read_only = wanted.is_read_only;
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
        target: wanted.target.as_os_str().as_bytes().to_vec(),
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
    fn volumes_and_folders_are_told_apart() {
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
    fn what_lies_inside_comes_later() {
        let wanted = all(&["c:/x/y", "a:/xy", "b:/x", "d:/x/y/z"]).unwrap();
        let targets: Vec<_> = wanted.iter().map(|one| one.target.to_str().unwrap()).collect();
        assert_eq!(targets, ["/x", "/x/y", "/x/y/z", "/xy"]);
    }

    #[test]
    fn mistakes_are_named() {
        for (texts, expected) in [
            (&["data"][..], "--volume data: it is not of the form NAME:/GUEST"),
            (&["/data"], "it is not of the form"),
            (&["data:"], "it is not of the form"),
            (&["data:ro"], "it is not of the form"),
            (&[":/x"], "a volume's name has letters"),
            (&["-a:/x"], "a volume's name has letters"),
            (&["a b:/x"], "a volume's name has letters"),
            (&["a/b:/x"], "a folder of the host begins with / or ."),
            (&["ä:/x"], "a volume's name has letters"),
            (&["data:x"], "behind the last colon stands a path in the guest, ro or rw"),
            (&["data:/x:z"], "behind the last colon stands a path in the guest, ro or rw"),
            (&["data:/x:ro:ro"], "behind the last colon stands a path in the guest, ro or rw"),
            (&["data:/"], "the guest's / is the image's"),
            (&["data://./"], "the guest's / is the image's"),
            (&["data:/x/../y"], "its path in the guest has .. in it"),
            (&["a:/x/", "b:/x"], "--volume b:/x: something else is mounted there already"),
        ] {
            let message = all(texts).unwrap_err();
            assert!(message.contains(expected), "{message:?} should say {expected:?}");
        }
        let long = "x".repeat(64);
        assert!(all(&[&format!("{long}:/x")]).is_ok() && all(&[&format!("{long}x:/x")]).is_err());
    }
}
