//! cgroup v2: what limits a guest, and how long a process waits to be moved into a limit.

use super::kernel::Version;
use super::{Finding, Sources, is_plain};

const MOUNTS: &str = "/proc/self/mountinfo";
/// What limits on guests are made of.
const NEEDED_CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// Linux 6.0 made moves between cgroups slow in favour of fork and exit; `favordynmods` undoes it.
const FIRST_WITH_SLOW_MOVES: Version = Version::new(6, 0, 0);

/// A mounted cgroup v2 hierarchy.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    /// Which cgroup is at the mount point.
    cgroup: String,
    mount_point: String,
    favors_moves: bool,
}

/// Finds the hierarchy in the text of `/proc/self/mountinfo`, and whether there is one of version 1.
fn parse_mounts(text: &str) -> (Option<Mount>, bool) {
    let mut found = None;
    let mut has_version_1 = false;
    for line in text.lines() {
        // A variable number of optional fields ends with a lone hyphen.
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
        // It will be put into a command.
        if !is_plain(mount_point) {
            continue;
        }
        found = Some(Mount {
            cgroup: cgroup.into(),
            mount_point: mount_point.into(),
            favors_moves: options.split(',').any(|option| option == "favordynmods"),
        });
    }
    (found, has_version_1)
}

/// Whether the hierarchy is mounted with `favordynmods`.
pub(super) fn favors_moves(sources: &Sources) -> bool {
    let mount = sources.read(MOUNTS).ok().and_then(|text| parse_mounts(&text).0);
    mount.is_some_and(|mount| mount.favors_moves)
}

/// The lowest memory limit of this process's cgroup and those above it that can be seen.
pub(super) fn memory_limit(sources: &Sources) -> Option<u64> {
    let mount = parse_mounts(&sources.read(MOUNTS).ok()?).0?;
    let cgroups = sources.read("/proc/self/cgroup").ok()?;
    let own = cgroups.lines().find_map(|line| line.strip_prefix("0::"))?;
    // Without a cgroup namespace a container sees the whole path and only its own part mounted.
    let own = own.strip_prefix(mount.cgroup.trim_end_matches('/')).unwrap_or(own).trim_matches('/');
    if own.split('/').any(|part| part == "..") {
        return None;
    }
    let mut lowest = None;
    let mut directory = mount.mount_point;
    for part in std::iter::once("").chain(own.split('/').filter(|part| !part.is_empty())) {
        if !part.is_empty() {
            directory = format!("{directory}/{part}");
        }
        if let Ok(limit) = sources.number(&format!("{directory}/memory.max")) {
            lowest = Some(lowest.map_or(limit, |lowest: u64| lowest.min(limit)));
        }
    }
    lowest
}

const NAME: &str = "cgroup";
const LIMITS: &str = "cgroup v2 is what holds a guest to its share of processors and memory";
const USE_VERSION_2: &str = "boot the host with `systemd.unified_cgroup_hierarchy=1` on its kernel command line, or \
     with `cgroup_no_v1=all` where there is no systemd";

/// Whether guests can be limited, and moved into their limits without waiting.
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

/// The same where cgroup v2 is mounted.
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
    } else {
        fact += &format!(" without the controllers {}", missing.join(", "));
        meanings.push(format!("{LIMITS}: without its controllers guests run unlimited."));
        advice.push(if has_version_1 {
            format!("to take the controllers from cgroup v1, {USE_VERSION_2}")
        } else {
            "have these controllers delegated: in systemd, `Delegate=yes` for the service".into()
        });
    }
    if mount.favors_moves {
        fact += "; favordynmods is on";
        meanings.push("With favordynmods, moving a process into a cgroup does not wait for RCU.".into());
    } else if kernel.is_none_or(|kernel| kernel >= FIRST_WITH_SLOW_MOVES) {
        fact += "; favordynmods is off";
        let who_waits = if kernel.is_some_and(Version::recovers_huge_pages_cheaply) {
            "Moving a process into a cgroup waits"
        } else {
            "Creating a VM and moving a process into a cgroup wait"
        };
        meanings.push(format!("{who_waits} for a grace period of RCU (reported: 20 to 40 ms)."));
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
            Mount { cgroup: "/a".into(), mount_point: "/sys/fs/cgroup".into(), favors_moves: true };
        assert_eq!(parse_mounts(text), (Some(expected), false));
    }

    #[test]
    fn the_option_is_not_found_inside_another_word() {
        let text = "30 23 0:26 / /c rw - cgroup2 favordynmods rw,nofavordynmods";
        assert!(!parse_mounts(text).0.unwrap().favors_moves);
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in "([ -~]| - |cgroup2|\\n){0,200}") {
            let _ = parse_mounts(&text);
        }
    }
}
