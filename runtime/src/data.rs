//! The user's directories for what outlives a command: data, and the cache.

use std::path::PathBuf;
use trusted_path::Owners;

/// The directory of this name in the user's data (`$XDG_DATA_HOME/kindling` or `~/.local/share/kindling`), which need not exist.
/// `None` if neither variable is an absolute path.
///
/// # Errors
/// When other users can change the directory, and so could replace a file in it by a link to a file of the user.
pub(crate) fn folder(name: &str) -> Result<Option<PathBuf>, trusted_path::Error> {
    let Some(data) = user_directory("XDG_DATA_HOME", ".local/share") else { return Ok(None) };
    let folder = data.join(name);
    match trusted_path::folder(&folder, Owners::own()) {
        Err(error) if !error.is_absent() => Err(error),
        _ => Ok(Some(folder)),
    }
}

/// Kindling's directory in the one that a variable names, or else in this one of the user's home.
pub(crate) fn user_directory(variable: &str, in_home: &str) -> Option<PathBuf> {
    let given = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let directory = given(variable).or_else(|| Some(given("HOME")?.join(in_home)))?;
    Some(directory.join("kindling"))
}
