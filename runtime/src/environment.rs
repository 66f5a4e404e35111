//! The environment of a program: what its image or its guest has, then files of entries, then entries.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// Bytes of a file of entries: more than an environment may have.
const LONGEST: u64 = 2 << 20;

/// A file of entries cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnvironmentError {
    /// It cannot be read.
    #[error("cannot read the file of entries {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// It is longer than an environment may be.
    #[error("the file of entries {} has more than 2 MiB", .0.display())]
    Long(PathBuf),
    /// A line begins with `=`.
    #[error("{}:{line}: an entry begins with its name", path.display())]
    NoName {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
    },
    /// A name has blanks in it.
    #[error("{}:{line}: a name has no blanks in it", path.display())]
    BlankInName {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
    },
}

/// Sets the entries of files, a line each, and then others, as `docker run --env-file` and `-e` do.
///
/// Of a line nothing is undone, neither quotes nor backslashes; empty ones and those that begin with `#` are none.
pub(crate) fn set_all(
    environment: &mut Vec<Vec<u8>>,
    files: &[PathBuf],
    entries: &[OsString],
) -> Result<(), EnvironmentError> {
    if files.is_empty() && entries.is_empty() {
        return Ok(());
    }
    let mut environment = Indexed::of(environment);
    for path in files {
        for (line, text) in (1..).zip(read(path)?.split(|&byte| byte == b'\n')) {
            // Files that were written on Windows end their lines otherwise.
            let text = text.strip_suffix(b"\r").unwrap_or(text).trim_ascii_start();
            match text {
                [] | [b'#', ..] => {}
                [b'=', ..] => return Err(EnvironmentError::NoName { path: path.clone(), line }),
                _ if text.split(|&byte| byte == b'=').next().is_some_and(has_blank) => {
                    return Err(EnvironmentError::BlankInName { path: path.clone(), line });
                }
                _ => environment.set(OsStr::from_bytes(text)),
            }
        }
    }
    entries.iter().for_each(|entry| environment.set(entry));
    Ok(())
}

fn has_blank(name: &[u8]) -> bool {
    name.iter().any(u8::is_ascii_whitespace)
}

fn read(path: &PathBuf) -> Result<Vec<u8>, EnvironmentError> {
    let mut text = Vec::new();
    let file = std::fs::File::open(path).and_then(|file| file.take(LONGEST + 1).read_to_end(&mut text));
    match file {
        Err(source) => Err(EnvironmentError::Read { path: path.clone(), source }),
        Ok(_) if text.len() as u64 > LONGEST => Err(EnvironmentError::Long(path.clone())),
        Ok(_) => Ok(text),
    }
}

/// Sets an entry: `NAME=VALUE`, or `NAME` for what it is here, if it is set here.
pub(crate) fn set(environment: &mut Vec<Vec<u8>>, entry: &OsStr) {
    Indexed::of(environment).set(entry);
}

/// An environment, and where each of its names is: there may be 100,000.
struct Indexed<'a> {
    entries: &'a mut Vec<Vec<u8>>,
    places: HashMap<Vec<u8>, usize>,
}

impl<'a> Indexed<'a> {
    fn of(entries: &'a mut Vec<Vec<u8>>) -> Self {
        let mut places = HashMap::new();
        for (place, entry) in entries.iter().enumerate() {
            places.entry(name(entry).to_vec()).or_insert(place);
        }
        Self { entries, places }
    }

    fn set(&mut self, entry: &OsStr) {
        let mut text = entry.as_bytes().to_vec();
        if !text.contains(&b'=') {
            let Some(value) = std::env::var_os(entry) else { return };
            text.push(b'=');
            text.extend_from_slice(value.as_bytes());
        }
        match self.places.get(name(&text)) {
            Some(&place) => self.entries[place] = text,
            None => {
                self.places.insert(name(&text).to_vec(), self.entries.len());
                self.entries.push(text);
            }
        }
    }
}

/// The entry that sets a name to a value.
pub(crate) fn entry(name: &OsStr, value: &OsStr) -> OsString {
    let mut entry = name.to_owned();
    entry.push("=");
    entry.push(value);
    entry
}

/// What stands before the first `=` of an entry.
fn name(entry: &[u8]) -> &[u8] {
    entry.split(|&byte| byte == b'=').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_come_before_entries_and_later_ones_win() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("env");
        std::fs::write(&path, "# a comment\n\nA=1\r\n  B=\"two words\" \nB2\nC=3\nPATH\n").unwrap();
        let mut environment = vec![b"A=image".to_vec(), b"Z=image".to_vec()];
        set_all(&mut environment, &[path], &["C=4".into(), "D=5".into()]).unwrap();
        let path = format!("PATH={}", std::env::var("PATH").unwrap());
        let expected = ["A=1", "Z=image", "B=\"two words\" ", "C=4", &path, "D=5"];
        assert_eq!(environment, expected.map(|entry| entry.as_bytes().to_vec()));
    }

    #[test]
    fn files_that_are_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("env");
        let refused = || set_all(&mut Vec::new(), std::slice::from_ref(&path), &[]).unwrap_err().to_string();
        assert!(refused().starts_with("cannot read the file of entries "), "{}", refused());
        std::fs::write(&path, "A=1\n=2\n").unwrap();
        assert!(refused().ends_with("env:2: an entry begins with its name"), "{}", refused());
        for line in ["export A=1", "a line of prose", "A =1"] {
            std::fs::write(&path, line).unwrap();
            assert!(refused().ends_with("env:1: a name has no blanks in it"), "{}", refused());
        }
        std::fs::write(&path, vec![b'\n'; (2 << 20) + 1]).unwrap();
        assert!(refused().ends_with("has more than 2 MiB"), "{}", refused());
    }
}
