//! Groups that nobody else is in, and users that this user namespace does not know. Only what looks wrong at first asks
//! for these, so that their files are rarely read.

use std::fs::File;
use std::io::Read;

/// Bytes that are read of a file of users or groups.
const FILE_MAX: u64 = 1 << 20;

/// Whether what a group may write is written by this user or root alone: many distributions give each user a group of
/// their own, and a umask that lets it write.
pub(crate) fn is_of_this_user_alone(gid: u32) -> bool {
    let (user, group) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    gid == 0 || (gid == group && is_private(user, gid, &read("/etc/passwd"), &read("/etc/group")))
}

/// Whether the group is known, has no other member, and is no other user's own.
fn is_private(user: u32, gid: u32, passwd: &str, group: &str) -> bool {
    // passwd(5) and group(5): fields between colons, the third a number.
    fn rows(text: &str) -> impl Iterator<Item = Vec<&str>> {
        text.lines().map(|line| line.split(':').collect::<Vec<_>>()).filter(|fields| fields.len() >= 4)
    }
    let is = |field: &str, number: u32| field.parse() == Ok(number);
    let names: Vec<_> =
        rows(passwd).filter(|user_row| is(user_row[2], user)).map(|fields| fields[0]).collect();
    let is_others = rows(passwd).any(|fields| is(fields[3], gid) && !is(fields[2], user));
    let mut groups = rows(group).filter(|fields| is(fields[2], gid)).peekable();
    let is_known = groups.peek().is_some();
    let mut members = groups.flat_map(|fields| fields[3].split(',').filter(|name| !name.is_empty()));
    is_known && !is_others && members.all(|name| names.contains(&name))
}

/// Whether a user is one that this user namespace has no number for: the host's root is, in most of them.
pub(crate) fn is_unmapped(uid: u32) -> bool {
    /// The numbers of the initial namespace: all of them, as they are (`uid_m_show` in kernel/user_namespace.c).
    const ALL: [&str; 3] = ["0", "0", "4294967295"];
    let map = || read("/proc/self/uid_map");
    let overflow = || read("/proc/sys/kernel/overflowuid").trim().parse() == Ok(uid);
    uid != 0 && overflow() && !map().split_whitespace().eq(ALL)
}

/// The beginning of a text file; nothing where it cannot be read.
fn read(path: &str) -> String {
    let mut bytes = Vec::new();
    let _ = File::open(path).and_then(|file| file.take(FILE_MAX).read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_private_group_has_one_user() {
        let passwd =
            "root:x:0:0::/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\nbob:x:1001:100::/:/bin/sh\n";
        for (group, is_one) in [
            ("ann:x:1000:\n", true),
            ("root:x:0:\nann:x:1000:ann\n", true),
            ("ann:x:1000:bob\n", false),
            ("ann:x:1000:ann,bob\n", false),
            ("ann:x:1000:\nann2:x:1000:bob\n", false),
            ("", false),
            ("ann:x:1000\n", false),
        ] {
            assert_eq!(is_private(1000, 1000, passwd, group), is_one, "{group}");
        }
        assert!(!is_private(1000, 100, passwd, "users:x:100:\n"), "it is bob's own");
    }
}
