//! The host's support for networking and jails.

use super::kernel::Version;
use super::{Finding, Sources};
use std::io;

/// Whether tap devices are usable.
pub(super) fn tun(sources: &Sources) -> Finding {
    tun_finding(sources.open_device(TUN))
}

const TUN: &str = "/dev/net/tun";

fn tun_finding(opened: io::Result<()>) -> Finding {
    const NAME: &str = "tun";
    let Err(error) = opened else {
        return Finding::good(
            NAME,
            format!("{TUN} opens"),
            "Guests can have network devices. Making a tap device takes CAP_NET_ADMIN; using one that was \
             made for this user does not.",
        );
    };
    let meaning = "Guests cannot have network devices that are tap devices of the host.";
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => Finding::improvable(
            NAME,
            format!("{TUN} does not exist, or has no driver"),
            meaning,
            format!("`sudo modprobe tun`; in a container, pass the device in (`--device {TUN}`)"),
        ),
        Some(libc::EACCES | libc::EPERM) => Finding::improvable(
            NAME,
            format!("this user has no permission to open {TUN}"),
            meaning,
            format!(
                "`sudo chmod 0666 {TUN}` (its usual mode: the kernel checks rights when a tap device is made)"
            ),
        ),
        _ => Finding::unknown(
            NAME,
            format!("{TUN} cannot be opened: {error}"),
            "Whether guests can have network devices cannot be told.",
            format!("see `ls -l {TUN}`: it is a character device with the numbers 10, 200"),
        ),
    }
}

/// Whether users other than root can create namespaces, according to the settings. The system call filter of a
/// container may nevertheless forbid it.
pub(super) fn user_namespaces(sources: &Sources) -> Finding {
    const NAME: &str = "user_namespaces";
    const OFF: &str =
        "Without user namespaces only root can put a guest's VMM into a jail, or give it a network.";
    let most = match sources.number("/proc/sys/user/max_user_namespaces") {
        Ok(most) => most,
        Err(why) => {
            return Finding::unknown(
                NAME,
                why,
                "Whether a jail and a network can be made without root cannot be told.",
                "see whether `unshare --user true` succeeds",
            );
        }
    };
    if most == 0 {
        let advice = "`sudo sysctl user.max_user_namespaces=10000`";
        return Finding::improvable(NAME, "none are allowed (user.max_user_namespaces=0)", OFF, advice);
    }
    // A setting of the kernels of Debian and its derivatives.
    if sources.number("/proc/sys/kernel/unprivileged_userns_clone") == Ok(0) {
        let fact = "only root may make them (kernel.unprivileged_userns_clone=0)";
        return Finding::improvable(NAME, fact, OFF, "`sudo sysctl kernel.unprivileged_userns_clone=1`");
    }
    // A setting of Ubuntu's kernels: namespaces can be created, but without any capabilities in them.
    if sources.number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == Ok(1) {
        return Finding::improvable(
            NAME,
            "AppArmor restricts them (kernel.apparmor_restrict_unprivileged_userns=1)",
            OFF,
            "an AppArmor profile for kindling with the rule `userns,`, or for all programs \
             `sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0`",
        );
    }
    Finding::good(
        NAME,
        format!("allowed, at most {most}"),
        "A guest's VMM can be put into a jail, and be given a network, without root.",
    )
}

/// The layers of the monitor's jail that the kernel has (`docs/security.md`).
pub(super) fn jail(sources: &Sources) -> Finding {
    const NAME: &str = "jail";
    const REFUSED: &str =
        "`kindling run` starts no guest here, except with `--jail best-effort` or `--jail off`.";
    const UNTOLD: &str = "Whether a guest's VMM can be put into a jail cannot be told.";
    const MODULES: &str = "/sys/kernel/security/lsm";
    const ACTIONS: &str = "/proc/sys/kernel/seccomp/actions_avail";
    let (actions, modules) = match (sources.read(ACTIONS), sources.read(MODULES)) {
        (Ok(actions), Ok(modules)) => (actions, modules),
        (Err(why), _) | (_, Err(why)) => {
            let advice = "see whether `kindling run --jail require` starts a guest";
            return Finding::unknown(NAME, why.to_string(), UNTOLD, advice);
        }
    };
    let Some(version) = Version::of(sources) else {
        let why = "the version of the kernel is unknown";
        return Finding::unknown(NAME, why, UNTOLD, "see `uname -r`: Landlock exists from Linux 5.13");
    };
    if !actions.split_whitespace().any(|action| action == "trap") {
        let fact = "the kernel has no seccomp filters";
        return Finding::bad(NAME, fact, REFUSED, "a kernel with CONFIG_SECCOMP_FILTER");
    }
    if version < Version::new(5, 13, 0) {
        let fact = format!("Linux {version} has no Landlock");
        return Finding::bad(NAME, fact, REFUSED, "Linux 5.13 or newer");
    }
    if !modules.split(',').any(|module| module.trim() == "landlock") {
        return Finding::bad(
            NAME,
            format!("Landlock is off ({MODULES} does not list it)"),
            REFUSED,
            format!("boot with `lsm=landlock,{modules}`"),
        );
    }
    let missing = match version {
        version if version < Version::new(6, 7, 0) => "TCP ports, signals and abstract sockets",
        version if version < Version::new(6, 12, 0) => "signals and abstract sockets",
        _ => {
            return Finding::good(
                NAME,
                "the kernel has seccomp, and Landlock with all that is used of it",
                "A guest that takes over its VMM gets no further.",
            );
        }
    };
    Finding::improvable(
        NAME,
        format!("Landlock of Linux {version} has no rules for {missing}"),
        "The jail of a guest's VMM lacks this layer; its filter of system calls refuses the same.",
        "Linux 6.12 or newer",
    )
}

#[cfg(test)]
mod tests {
    use super::tun_finding;
    use crate::host::Status;
    use std::io;

    #[test]
    fn errors_of_the_device_are_distinguished() {
        for (errno, status, advice) in [
            (libc::ENOENT, Status::Improvable, "modprobe tun"),
            (libc::ENODEV, Status::Improvable, "modprobe tun"),
            (libc::EACCES, Status::Improvable, "chmod 0666"),
            (libc::EPERM, Status::Improvable, "chmod 0666"),
            (libc::EBUSY, Status::Unknown, "ls -l"),
        ] {
            let finding = tun_finding(Err(io::Error::from_raw_os_error(errno)));
            assert_eq!(finding.status, status, "{errno}");
            assert!(finding.advice.unwrap().contains(advice), "{errno}");
        }
        assert_eq!(tun_finding(Ok(())).status, Status::Good);
    }
}
