//! Lookup of users in the image's /etc/passwd and /etc/group.

use oci_protocol::User;
use serde::{Deserialize, Serialize};

/// Maximum size of such a file, in bytes.
pub(crate) const MAX_FILE: u64 = 16 << 20;

/// Why a user or group is not found.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// /etc/passwd does not have this user.
    #[error("no user {0:?} in the image's /etc/passwd; a numeric UID needs no entry")]
    User(String),
    /// /etc/group does not have this group.
    #[error("no group {0:?} in the image's /etc/group; a numeric GID needs no entry")]
    Group(String),
}

/// The user and group databases of an image.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Users {
    /// Content of /etc/passwd.
    pub passwd: String,
    /// Content of /etc/group.
    pub group: String,
}

impl Users {
    /// Looks up `NAME`, `UID`, `NAME:GROUP` or `UID:GID`; an empty text is root.
    ///
    /// # Errors
    /// If a name has no entry.
    pub fn find(&self, text: &str) -> Result<User, Error> {
        let (user, group) = text.split_once(':').map_or((text, None), |(user, group)| (user, Some(group)));
        let user = if user.is_empty() { "0" } else { user };
        // An entry with this name takes precedence over one with this UID.
        let number = id(user);
        let entries = || self.passwd.lines().filter_map(Entry::parse);
        let entry = entries()
            .find(|entry| entry.name == user)
            .or_else(|| entries().find(|entry| Some(entry.uid) == number));
        let (name, uid, gid, home) = match (entry, number) {
            (Some(entry), _) => (entry.name, entry.uid, entry.gid, entry.home),
            (None, Some(uid)) => ("", uid, 0, ""),
            (None, None) => return Err(Error::User(user.to_owned())),
        };
        let (gid, groups) = match group.filter(|group| !group.is_empty()) {
            Some(group) => {
                let gid = self.group_id(group)?;
                (gid, vec![gid])
            }
            None => (gid, self.groups_of(name, gid)),
        };
        let home = if home.is_empty() { "/" } else { home };
        Ok(User { uid, gid, groups, home: Some(home.to_owned()), name: name.to_owned() })
    }

    fn group_id(&self, group: &str) -> Result<u32, Error> {
        let named = self.group.lines().filter_map(group_entry).find(|(name, ..)| *name == group);
        named.map(|(_, gid, _)| gid).or_else(|| id(group)).ok_or_else(|| Error::Group(group.to_owned()))
    }

    /// The primary group, followed by the groups that have the user as a member.
    fn groups_of(&self, user: &str, gid: u32) -> Vec<u32> {
        let mut groups = vec![gid];
        for (_, gid, members) in self.group.lines().filter_map(group_entry) {
            if !user.is_empty() && members.split(',').any(|member| member == user) && !groups.contains(&gid) {
                groups.push(gid);
            }
        }
        groups
    }
}

/// Parses a UID or GID. The highest number is invalid: it is -1 to system calls, "no change".
fn id(text: &str) -> Option<u32> {
    text.parse().ok().filter(|&id| id != u32::MAX)
}

/// An entry of /etc/passwd.
#[derive(Debug)]
struct Entry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl<'a> Entry<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let uid = id(fields.nth(1)?)?;
        let gid = id(fields.next()?)?;
        Some(Self { name, uid, gid, home: fields.nth(1).unwrap_or_default() })
    }
}

/// Name, GID and members of an entry of /etc/group.
fn group_entry(line: &str) -> Option<(&str, u32, &str)> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty())?;
    let gid = id(fields.nth(1)?)?;
    Some((name, gid, fields.next().unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(text: &str) -> (u32, u32, Vec<u32>, String, String) {
        let users = Users {
            passwd: "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:33:web:/var/www:/bin/false\n\
                     12:x:77:78::/twelve:\n"
                .to_owned(),
            group: "root:x:0:\nweb:x:33:\nlog:x:4:web,root\nmail:x:8:web\n".to_owned(),
        };
        let User { uid, gid, groups, home, name } = users.find(text).unwrap();
        (uid, gid, groups, home.unwrap(), name)
    }

    #[test]
    fn users_are_found_by_name_and_number() {
        let is = |text, uid, gid, groups: &[u32], home: &str, name: &str| {
            assert_eq!(find(text), (uid, gid, groups.to_vec(), home.to_owned(), name.to_owned()), "{text:?}");
        };
        for root in ["", "0", "root", ":"] {
            is(root, 0, 0, &[0, 4], "/root", "root");
        }
        is("web", 33, 33, &[33, 4, 8], "/var/www", "web");
        is("33", 33, 33, &[33, 4, 8], "/var/www", "web");
        is("web:log", 33, 4, &[4], "/var/www", "web");
        is("web:1000", 33, 1000, &[1000], "/var/www", "web");
        is("1000", 1000, 0, &[0], "/", "");
        is("1000:mail", 1000, 8, &[8], "/", "");
        is("12", 77, 78, &[78], "/twelve", "12");
    }

    #[test]
    fn missing_users_and_groups_are_reported() {
        let error = |text| Users::default().find(text).unwrap_err().to_string();
        assert!(error("nobody").starts_with("no user \"nobody\" in the image's /etc/passwd"));
        assert!(error("-1").starts_with("no user \"-1\" in the image's /etc/passwd"));
        assert!(error("4294967295").starts_with("no user \"4294967295\" in the image's"));
        assert!(error("0:wheel").starts_with("no group \"wheel\" in the image's /etc/group"));
    }
}
