use super::*;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use tempfile::TempDir;

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// A folder of this user's with `a/b/file` in it.
fn place() -> (TempDir, PathBuf) {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("a/b/file");
    make_folder(path.parent().unwrap()).unwrap();
    fs::write(&path, "content").unwrap();
    mode(&path, 0o644);
    (place, path)
}

#[test]
fn what_this_user_made_is_trusted() {
    let (place, path) = place();
    file(&path, Owners::own()).unwrap();
    folder(&place.path().join("a/./b/../b"), Owners::own()).unwrap();
    let made = place.path().join("a").metadata().unwrap();
    assert_eq!(made.mode() & 0o7777, 0o700);
    assert!(file(&path.with_file_name("no"), Owners::own()).unwrap_err().is_absent());
    assert!(folder(&place.path().join("no/no"), Owners::own()).unwrap_err().is_absent());
}

#[test]
fn what_others_can_write_is_refused_wherever_it_lies() {
    let (place, path) = place();
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
    // Others cannot replace an entry of a folder with the sticky bit; the folder itself is theirs as much.
    mode(b, 0o1777);
    file(&path, Owners::own()).unwrap();
    assert!(matches!(folder(b, Owners::own()), Err(Error::Writable(_))));
    assert!(matches!(make_folder(b), Err(Error::Writable(_))));
    make_folder(&b.join("new/newer")).unwrap();
    drop(place);
}

#[test]
fn what_belongs_to_others_is_refused() {
    let (place, path) = place();
    let a = place.path().join("a");
    let (own, stranger) = (rustix::process::geteuid().as_raw(), 12345);
    // Seen with the eyes of another user, what this user made is a stranger's, unless this user is root.
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
    let link = place.path().join("link");
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
fn links_are_followed_where_they_lead_to_what_is_trusted() {
    let (place, path) = place();
    let at = |name: &str| place.path().join(name);
    symlink("a", at("relative")).unwrap();
    symlink(at("a"), at("absolute")).unwrap();
    symlink("relative/b/../b", at("chain")).unwrap();
    symlink("loop", at("loop")).unwrap();
    symlink("no", at("dangling")).unwrap();
    for way in ["relative/b/file", "absolute/b/file", "chain/file"] {
        file(&at(way), Owners::own()).unwrap();
    }
    mode(path.parent().unwrap(), 0o707);
    assert!(matches!(file(&at("chain/file"), Owners::own()), Err(Error::Writable(_))));
    assert!(matches!(file(&at("loop/x"), Owners::own()), Err(Error::Host { .. })));
    assert!(file(&at("dangling"), Owners::own()).unwrap_err().is_absent());
    // A folder appears where the link leads, which is this user's.
    make_folder(&at("dangling/x")).unwrap();
    assert!(at("no/x").is_dir());
}

#[test]
fn kinds_are_told_apart() {
    let (_place, path) = place();
    let wrong =
        |result: Result<OwnedFd, Error>| assert!(matches!(result, Err(Error::Kind { .. })), "{result:?}");
    wrong(folder(&path, Owners::own()));
    wrong(file(path.parent().unwrap(), Owners::own()));
    wrong(make_folder(&path));
    assert!(matches!(file(&path.join("x"), Owners::own()), Err(Error::Host { .. })));
    folder(Path::new("/"), Owners::own()).unwrap();
}

#[test]
fn a_lock_file_changes_nothing_else() {
    let (place, path) = place();
    lock_file(&path).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"content");
    let link = place.path().join("lock");
    symlink(&path, &link).unwrap();
    lock_file(&link).unwrap_err();
    symlink(place.path().join("new"), place.path().join("lock2")).unwrap();
    lock_file(&place.path().join("lock2")).unwrap_err();
    assert!(!place.path().join("new").exists());
    lock_file(place.path()).unwrap_err();
    assert_eq!(lock_file(&place.path().join("lock3")).unwrap().metadata().unwrap().mode() & 0o7777, 0o600);
}

#[test]
fn programs_are_the_systems_own() {
    assert_eq!(program("sh"), Some("/usr/bin/sh".into()));
    assert_eq!(program("no-such-program"), None);
}
