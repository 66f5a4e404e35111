//! cgroup v2: resource limits of guests, and the delay of moving a process into a cgroup.

use super::kernel::Version;
use super::{Finding, Sources, is_safe_in_command};
use rustix::fs::{Access, access};

const MOUNTS: &str = "/proc/self/mountinfo";
/// The controllers that limit guests.
const NEEDED_CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// Linux 6.0 made moves between cgroups slower to speed up fork and exit; `favordynmods` reverts this.
const FIRST_WITH_SLOW_MOVES: Version = Version::new(6, 0, 0);

/// A mounted cgroup v2 hierarchy.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    /// Path of the cgroup at the mount point.
    cgroup: String,
    mount_point: String,
    has_favordynmods: bool,
}

/// Finds the cgroup v2 hierarchy in the text of `/proc/self/mountinfo`; also returns whether a v1 hierarchy is mounted.
fn parse_mounts(text: &str) -> (Option<Mount>, bool) {
    let mut found = None;
    let mut has_version_1 = false;
    for line in text.lines() {
        // A variable number of optional fields ends with a single hyphen.
        let Some((mount, file_system)) = line.split_once(" - ") else { continue };
        let mut file_system = file_system.split(' ');
        let kind = file_system.next();
        has_version_1 |= kind == Some("cgroup");
        if kind != Some("cgroup2") || found.is_some() {
            continue;
        }
        let options = file_system.nth(1).unwrap_or_default();
        let mut mount = mount.split(' ').skip(3);
        let (Some(cgroup), Some(mount_point)) = (mount.next(), mount.next()) else { continue };
        // The path becomes a part of a command.
        if !is_safe_in_command(mount_point) {
            continue;
        }
        found = Some(Mount {
            cgroup: cgroup.into(),
            mount_point: mount_point.into(),
            has_favordynmods: options.split(',').any(|option| option == "favordynmods"),
        });
    }
    (found, has_version_1)
}

/// Whether the hierarchy is mounted with `favordynmods`.
pub(super) fn has_favordynmods(sources: &Sources) -> bool {
    let mount = sources.read(MOUNTS).ok().and_then(|text| parse_mounts(&text).0);
    mount.is_some_and(|mount| mount.has_favordynmods)
}

/// The directories of this process's cgroup and its visible ancestors, from the mount point downwards.
fn directories(sources: &Sources) -> Option<Vec<String>> {
    let mount = parse_mounts(&sources.read(MOUNTS).ok()?).0?;
    let cgroups = sources.read("/proc/self/cgroup").ok()?;
    let own = cgroups.lines().find_map(|line| line.strip_prefix("0::"))?;
    // Without a cgroup namespace, a container sees its full path, but only its own subtree is mounted.
    let own = own.strip_prefix(mount.cgroup.trim_end_matches('/')).unwrap_or(own).trim_matches('/');
    if own.split('/').any(|part| part == "..") {
        return None;
    }
    let mut directories = vec![mount.mount_point];
    for part in own.split('/').filter(|part| !part.is_empty()) {
        directories.push(format!("{}/{part}", directories[directories.len() - 1]));
    }
    Some(directories)
}

/// The directories of the cgroups in which this user can create others and move own processes there, from the topmost one.
/// `None` if the place of this process in the hierarchy is unknown.
pub(super) fn delegated(sources: &Sources) -> Option<Vec<String>> {
    let is_writable = |path: &str| access(sources.path(path), Access::WRITE_OK).is_ok();
    let is_delegated =
        |directory: &String| is_writable(directory) && is_writable(&format!("{directory}/cgroup.procs"));
    Some(directories(sources)?.into_iter().filter(is_delegated).collect())
}

/// The lowest memory limit in bytes of this process's cgroup and its visible ancestors.
pub(super) fn memory_limit(sources: &Sources) -> Option<u64> {
    let limit = |directory: &String| sources.number(&format!("{directory}/memory.max")).ok();
    directories(sources)?.iter().filter_map(limit).min()
}

const NAME: &str = "cgroup";
const LIMITS: &str = "cgroup v2 is what holds a guest to its share of processors and memory";
const USE_VERSION_2: &str = "boot the host with `systemd.unified_cgroup_hierarchy=1` on its kernel command line, or \
     with `cgroup_no_v1=all` where there is no systemd";

/// Whether guests can be limited, and moved into their cgroups without a delay.
pub(super) fn cgroup(sources: &Sources) -> Finding {
    let mounts = match sources.read(MOUNTS) {
        Ok(mounts) => mounts,
        Err(error) => {
            let meaning = format!("{LIMITS}; whether it is there cannot be told.");
            return Finding::unknown(NAME, error.to_string(), meaning, "look for it with `mount -t cgroup2`");
        }
    };
    let (mount, has_version_1) = parse_mounts(&mounts);
    let Some(mount) = mount else {
        let meaning = format!("{LIMITS}: without it guests run unlimited.");
        return if has_version_1 {
            Finding::improvable(NAME, "only cgroup v1 is mounted", meaning, USE_VERSION_2)
        } else {
            let mount = "`sudo mount -t cgroup2 none /sys/fs/cgroup`";
            Finding::improvable(NAME, "no cgroup file system is mounted", meaning, mount)
        };
    };

    mounted(sources, &mount, has_version_1)
}

/// The finding for a mounted cgroup v2 hierarchy.
fn mounted(sources: &Sources, mount: &Mount, has_version_1: bool) -> Finding {
    let at = &mount.mount_point;
    let controllers = sources.read(&format!("{at}/cgroup.controllers")).unwrap_or_default();
    let missing: Vec<_> = NEEDED_CONTROLLERS
        .into_iter()
        .filter(|needed| controllers.split(' ').all(|controller| controller != *needed))
        .collect();
    let kernel = Version::of(sources);
    let mut fact = format!("cgroup v2 at {at}");
    let mut meanings = Vec::new();
    let mut advice = Vec::new();
    if missing.is_empty() {
        meanings.push(format!("{LIMITS}."));
        match delegated(sources).and_then(|all| all.into_iter().next()) {
            Some(directory) => fact += &format!("; {directory} is delegated to this user"),
            None => {
                fact += "; none is delegated to this user";
                meanings.push(
                    "`kindling run` cannot limit a guest's VMM (`--cpus 1.5`, `--cgroup-parent`).".into(),
                );
                advice.push("start it by `systemd-run --user --scope -p Delegate=yes`".into());
            }
        }
    } else {
        fact += &format!(" without the controllers {}", missing.join(", "));
        meanings.push(format!("{LIMITS}: without its controllers guests run unlimited."));
        advice.push(if has_version_1 {
            format!("to take the controllers from cgroup v1, {USE_VERSION_2}")
        } else {
            "have these controllers delegated: in systemd, `Delegate=yes` for the service".into()
        });
    }
    if mount.has_favordynmods {
        fact += "; favordynmods is on";
        meanings.push("With favordynmods, moving a process into a cgroup does not wait for RCU.".into());
    } else if kernel.is_none_or(|kernel| kernel >= FIRST_WITH_SLOW_MOVES) {
        fact += "; favordynmods is off";
        let delayed_operations = if kernel.is_some_and(Version::recovers_huge_pages_cheaply) {
            "Moving a process into a cgroup waits"
        } else {
            "Creating a VM and moving a process into a cgroup wait"
        };
        meanings.push(format!("{delayed_operations} for a grace period of RCU (reported: 20 to 40 ms)."));
        advice.push(format!(
            "`sudo mount -o remount,favordynmods {at}`, on the host itself, or from Linux 6.7 on boot it with \
             `cgroup_favordynmods=true`"
        ));
    }
    let meaning = meanings.join(" ");
    if advice.is_empty() {
        Finding::good(NAME, fact, meaning)
    } else {
        Finding::improvable(NAME, fact, meaning, advice.join("; and "))
    }
}

#[cfg(test)]
mod tests {
    use super::{Mount, parse_mounts};
    use proptest::prelude::*;

    #[test]
    fn a_line_with_optional_fields_is_read() {
        let text = "22 1 254:0 / / rw - ext4 /dev/vda rw\n\
            30 23 0:26 /a /sys/fs/cgroup rw,nosuid shared:4 master:1 - cgroup2 cgroup2 rw,nsdelegate,favordynmods";
        let expected =
            Mount { cgroup: "/a".into(), mount_point: "/sys/fs/cgroup".into(), has_favordynmods: true };
        assert_eq!(parse_mounts(text), (Some(expected), false));
    }

    #[test]
    fn the_option_is_not_found_inside_another_word() {
        let text = "30 23 0:26 / /c rw - cgroup2 favordynmods rw,nofavordynmods";
        assert!(!parse_mounts(text).0.unwrap().has_favordynmods);
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in "([ -~]| - |cgroup2|\\n){0,200}") {
            let _ = parse_mounts(&text);
        }
    }
}
