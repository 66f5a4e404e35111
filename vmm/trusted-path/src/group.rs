//! Groups without other members, and users that are not mapped in this user namespace. These are checked only for files
//! that would be refused otherwise, so that the databases are rarely read.

use std::fs::File;
use std::io::Read;

/// Maximum number of bytes that are read of a user or group database.
const FILE_MAX: u64 = 1 << 20;

/// Whether only this user and root are in a group. Many distributions create a private group for each user, and set a
/// umask that makes files writable by the group.
pub(crate) fn is_private_group(gid: u32) -> bool {
    let (user, group) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    gid == 0 || (gid == group && is_private(user, gid, &read("/etc/passwd"), &read("/etc/group")))
}

/// Whether the group exists, has no other members, and is not the primary group of another user.
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

/// Whether a user is not mapped in this user namespace, as the host's root usually is not.
pub(crate) fn is_unmapped(uid: u32) -> bool {
    /// The mapping of the initial namespace: all UIDs to themselves (`uid_m_show` in kernel/user_namespace.c).
    const ALL: [&str; 3] = ["0", "0", "4294967295"];
    let map = || read("/proc/self/uid_map");
    let overflow = || read("/proc/sys/kernel/overflowuid").trim().parse() == Ok(uid);
    uid != 0 && overflow() && !map().split_whitespace().eq(ALL)
}

/// Reads the beginning of a text file, or an empty string if it cannot be read.
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
        assert!(!is_private(1000, 100, passwd, "users:x:100:\n"), "it is the primary group of bob");
    }
}
