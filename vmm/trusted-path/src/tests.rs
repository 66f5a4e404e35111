use super::*;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use tempfile::TempDir;

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// A temporary directory of this user with the file `a/b/file`.
fn test_dir() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a/b/file");
    make_folder(path.parent().unwrap()).unwrap();
    fs::write(&path, "content").unwrap();
    mode(&path, 0o644);
    (folder, path)
}

#[test]
fn files_of_this_user_are_trusted() {
    let (dir, path) = test_dir();
    file(&path, Owners::own()).unwrap();
    folder(&dir.path().join("a/./b/../b"), Owners::own()).unwrap();
    let made = dir.path().join("a").metadata().unwrap();
    assert_eq!(made.mode() & 0o7777, 0o700);
    assert!(file(&path.with_file_name("no"), Owners::own()).unwrap_err().is_absent());
    assert!(folder(&dir.path().join("no/no"), Owners::own()).unwrap_err().is_absent());
}

#[test]
fn files_that_others_can_write_are_refused_at_any_depth() {
    let (dir, path) = test_dir();
    let b = path.parent().unwrap();
    let refused = |at: &Path| match file(&path, Owners::own()) {
        Err(Error::Writable(path)) => assert_eq!(path, at),
        result => panic!("{result:?}"),
    };
    for at in [&path, b, b.parent().unwrap()] {
        let before = at.metadata().unwrap().mode();
        mode(at, before | 0o002);
        refused(at);
        mode(at, before);
        file(&path, Owners::own()).unwrap();
    }
    // Others cannot replace an entry of a directory with the sticky bit, but can add entries to it.
    mode(b, 0o1777);
    file(&path, Owners::own()).unwrap();
    assert!(matches!(folder(b, Owners::own()), Err(Error::Writable(_))));
    assert!(matches!(make_folder(b), Err(Error::Writable(_))));
    make_folder(&b.join("new/newer")).unwrap();
    drop(dir);
}

#[test]
fn files_of_others_are_refused() {
    let (dir, path) = test_dir();
    let a = dir.path().join("a");
    let (own, stranger) = (rustix::process::geteuid().as_raw(), 12345);
    // For another user, the files of this user belong to a stranger, unless this user is root.
    let owners = Owners { user: stranger, other: None };
    if own != 0 {
        assert!(matches!(file(&path, owners), Err(Error::Owner { uid, .. }) if uid == own));
        file(&path, Owners { other: Some(own), ..owners }).unwrap();
        return;
    }
    let refused = |path: &Path, at: &Path| match file(path, Owners::own()) {
        Err(Error::Owner { path, uid }) => assert_eq!((path.as_path(), uid), (at, stranger)),
        result => panic!("{result:?}"),
    };
    let link = dir.path().join("link");
    symlink("a/b/file", &link).unwrap();
    file(&link, Owners::own()).unwrap();
    for at in [&path, &a, &link] {
        std::os::unix::fs::lchown(at, Some(stranger), None).unwrap();
        let through = if *at == link { &link } else { &path };
        refused(through, at);
        file(through, Owners { other: Some(stranger), ..Owners::own() }).unwrap();
        std::os::unix::fs::lchown(at, Some(0), None).unwrap();
    }
}

#[test]
fn links_to_trusted_files_are_followed() {
    let (dir, path) = test_dir();
    let at = |name: &str| dir.path().join(name);
    symlink("a", at("relative")).unwrap();
    symlink(at("a"), at("absolute")).unwrap();
    symlink("relative/b/../b", at("chain")).unwrap();
    symlink("loop", at("loop")).unwrap();
    symlink("no", at("dangling")).unwrap();
    for link in ["relative/b/file", "absolute/b/file", "chain/file"] {
        file(&at(link), Owners::own()).unwrap();
    }
    mode(path.parent().unwrap(), 0o707);
    assert!(matches!(file(&at("chain/file"), Owners::own()), Err(Error::Writable(_))));
    assert!(matches!(file(&at("loop/x"), Owners::own()), Err(Error::Host { .. })));
    assert!(file(&at("dangling"), Owners::own()).unwrap_err().is_absent());
    // The target of the link is created in a directory of this user.
    make_folder(&at("dangling/x")).unwrap();
    assert!(at("no/x").is_dir());
}

#[test]
fn other_file_types_are_refused() {
    let (_dir, path) = test_dir();
    let wrong =
        |result: Result<OwnedFd, Error>| assert!(matches!(result, Err(Error::Kind { .. })), "{result:?}");
    wrong(folder(&path, Owners::own()));
    wrong(file(path.parent().unwrap(), Owners::own()));
    wrong(make_folder(&path));
    assert!(matches!(file(&path.join("x"), Owners::own()), Err(Error::Host { .. })));
    folder(Path::new("/"), Owners::own()).unwrap();
}

#[test]
fn opening_a_lock_file_changes_no_other_file() {
    let (dir, path) = test_dir();
    lock_file(&path).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"content");
    let link = dir.path().join("lock");
    symlink(&path, &link).unwrap();
    lock_file(&link).unwrap_err();
    symlink(dir.path().join("new"), dir.path().join("lock2")).unwrap();
    lock_file(&dir.path().join("lock2")).unwrap_err();
    assert!(!dir.path().join("new").exists());
    lock_file(dir.path()).unwrap_err();
    assert_eq!(lock_file(&dir.path().join("lock3")).unwrap().metadata().unwrap().mode() & 0o7777, 0o600);
}

#[test]
fn programs_are_found_in_the_system_directories() {
    assert_eq!(program("sh"), Some("/usr/bin/sh".into()));
    assert_eq!(program("no-such-program"), None);
}
