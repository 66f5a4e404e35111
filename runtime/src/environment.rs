//! The environment of a process: the variables of its image or guest, overridden by those of files, overridden by those of
//! options.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// Maximum size of an environment file in bytes: that of an environment.
const MAX_FILE_LEN: u64 = 2 << 20;

/// An error of an environment file (`--env-file`).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnvironmentError {
    /// The file cannot be read.
    #[error("cannot read the environment file {}", path.display())]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
    /// The file is larger than 2 MiB, the limit of an environment.
    #[error("the environment file {} is larger than 2 MiB", .0.display())]
    Long(PathBuf),
    /// A line has no name before the `=`.
    #[error("{}:{line}: no variable name before the =", path.display())]
    NoName {
        /// Path of the file.
        path: PathBuf,
        /// Line number, from 1.
        line: usize,
    },
    /// The name of a variable contains whitespace.
    #[error("{}:{line}: a variable name cannot contain whitespace", path.display())]
    BlankInName {
        /// Path of the file.
        path: PathBuf,
        /// Line number, from 1.
        line: usize,
    },
}

/// Sets the variables of files, one a line, and then further ones, as `docker run --env-file` and `-e` do.
///
/// Quotes and backslashes in a file are literal. Empty lines and lines that start with `#` are ignored.
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
            // Files that were written on Windows end lines with CR and LF.
            let text = text.strip_suffix(b"\r").unwrap_or(text).trim_ascii_start();
            match text {
                [] | [b'#', ..] => {}
                [b'=', ..] => return Err(EnvironmentError::NoName { path: path.clone(), line }),
                _ if text.split(|&byte| byte == b'=').next().is_some_and(has_whitespace) => {
                    return Err(EnvironmentError::BlankInName { path: path.clone(), line });
                }
                _ => environment.set(OsStr::from_bytes(text)),
            }
        }
    }
    entries.iter().for_each(|entry| environment.set(entry));
    Ok(())
}

fn has_whitespace(name: &[u8]) -> bool {
    name.iter().any(u8::is_ascii_whitespace)
}

fn read(path: &PathBuf) -> Result<Vec<u8>, EnvironmentError> {
    let mut text = Vec::new();
    let file = std::fs::File::open(path).and_then(|file| file.take(MAX_FILE_LEN + 1).read_to_end(&mut text));
    match file {
        Err(source) => Err(EnvironmentError::Read { path: path.clone(), source }),
        Ok(_) if text.len() as u64 > MAX_FILE_LEN => Err(EnvironmentError::Long(path.clone())),
        Ok(_) => Ok(text),
    }
}

/// Sets a variable: `NAME=VALUE`, or `NAME` for the value that the calling process has. Without such a value, nothing
/// changes.
pub(crate) fn set(environment: &mut Vec<Vec<u8>>, entry: &OsStr) {
    Indexed::of(environment).set(entry);
}

/// An environment with an index by name: it may have 100,000 variables.
struct Indexed<'a> {
    entries: &'a mut Vec<Vec<u8>>,
    index: HashMap<Vec<u8>, usize>,
}

impl<'a> Indexed<'a> {
    fn of(entries: &'a mut Vec<Vec<u8>>) -> Self {
        let mut index = HashMap::new();
        for (number, entry) in entries.iter().enumerate() {
            index.entry(name(entry).to_vec()).or_insert(number);
        }
        Self { entries, index }
    }

    fn set(&mut self, entry: &OsStr) {
        let mut text = entry.as_bytes().to_vec();
        if !text.contains(&b'=') {
            let Some(value) = std::env::var_os(entry) else { return };
            text.push(b'=');
            text.extend_from_slice(value.as_bytes());
        }
        match self.index.get(name(&text)) {
            Some(&number) => self.entries[number] = text,
            None => {
                self.index.insert(name(&text).to_vec(), self.entries.len());
                self.entries.push(text);
            }
        }
    }
}

/// Returns `NAME=VALUE`.
pub(crate) fn entry(name: &OsStr, value: &OsStr) -> OsString {
    let mut entry = name.to_owned();
    entry.push("=");
    entry.push(value);
    entry
}

/// The name of an entry: the part before the first `=`.
fn name(entry: &[u8]) -> &[u8] {
    entry.split(|&byte| byte == b'=').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_override_files_and_later_variables_override_earlier_ones() {
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
    fn invalid_files_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("env");
        let refused = || set_all(&mut Vec::new(), std::slice::from_ref(&path), &[]).unwrap_err().to_string();
        assert!(refused().starts_with("cannot read the environment file "), "{}", refused());
        std::fs::write(&path, "A=1\n=2\n").unwrap();
        assert!(refused().ends_with("env:2: no variable name before the ="), "{}", refused());
        for line in ["export A=1", "a line of prose", "A =1"] {
            std::fs::write(&path, line).unwrap();
            assert!(refused().ends_with("env:1: a variable name cannot contain whitespace"), "{}", refused());
        }
        std::fs::write(&path, vec![b'\n'; (2 << 20) + 1]).unwrap();
        assert!(refused().ends_with("is larger than 2 MiB"), "{}", refused());
    }
}
