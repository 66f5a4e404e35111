//! Shared by commands that measure: atomic file writes, and colours.

use anyhow::{Context, Result};
use std::fs::Permissions;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// A palette for viewers with impaired colour vision (Okabe and Ito).
pub(crate) const COLOURS: [&str; 7] =
    ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8a8a8a"];

/// The folder of a file.
pub(crate) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Writes a file atomically.
pub(crate) fn write(path: &Path, content: &str) -> Result<()> {
    let failed = || format!("cannot write {}", path.display());
    let mut draft = tempfile::Builder::new()
        .prefix(".draft-")
        // The default of temporary files is 0600.
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(folder_of(path))
        .with_context(failed)?;
    draft.write_all(content.as_bytes()).with_context(failed)?;
    draft.persist(path).with_context(failed)?;
    Ok(())
}
