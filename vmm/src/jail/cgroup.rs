//! A cgroup (v2) for one process, below a cgroup that was delegated to the user: limits of processor time, memory and threads
//! that hold whatever the process does (Documentation/admin-guide/cgroup-v2.rst).

use crate::host;
use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Where the hierarchy is mounted.
const HIERARCHY: &str = "/sys/fs/cgroup";
/// The start of the names of all cgroups that are created here.
const PREFIX: &str = "kindling-";
/// How often a cgroup is created again that others remove.
const ATTEMPTS_MAX: usize = 10;
/// The period of the limit of processor time in microseconds, which is the kernel's default.
const PERIOD: u64 = 100_000;

/// Why a process cannot be limited by a cgroup.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CgroupError {
    /// There is no hierarchy of version 2, or this process cannot see its place in it.
    #[error(
        "this host has no cgroup v2 at /sys/fs/cgroup, or hides it; `kindling doctor` explains what is there"
    )]
    NoHierarchy,
    /// No cgroup above this process is delegated to the user.
    #[error(
        "no cgroup of this process is delegated to the user, with the controllers {0}: start it by `systemd-run --user \
         --scope -p Delegate=yes`, or name a delegated cgroup with --cgroup-parent"
    )]
    NotDelegated(String),
    /// The cgroup above has not enabled controllers for this one.
    #[error("{} has no controllers {controllers}: enable them in cgroup.subtree_control of the cgroup above it", .path.display())]
    Unavailable {
        /// The cgroup that was to have others in it.
        path: PathBuf,
        /// The missing controllers.
        controllers: String,
    },
    /// Another process is in the cgroup.
    #[error("another program runs in the cgroup {}", .0.display())]
    Taken(PathBuf),
    /// A file or directory of a cgroup refused an operation.
    #[error("cannot {what} {}", .path.display())]
    Refused {
        /// The operation, as a phrase after "cannot".
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
}

impl CgroupError {
    /// Returns whether the request is at fault: it names a cgroup that does not exist.
    #[must_use]
    pub fn is_user_error(&self) -> bool {
        match self {
            Self::Refused { source, .. } => source.kind() == io::ErrorKind::NotFound,
            Self::Unavailable { .. } | Self::Taken(_) => true,
            _ => false,
        }
    }
}

/// The limits of a cgroup.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CgroupLimits {
    /// Existing cgroup in which the new one is created. By default the nearest one to this process's own that is delegated to
    /// the user and can have others in it.
    pub parent: Option<PathBuf>,
    /// Processor time in thousandths of a processor.
    pub cpu_millis: Option<u64>,
    /// Memory in bytes, with the page cache of files that the process uses, which the kernel frees before it kills the
    /// process.
    pub memory: Option<u64>,
    /// Processes and threads.
    pub processes: Option<u64>,
}

impl CgroupLimits {
    /// The files of the cgroup and their contents.
    fn settings(&self) -> Vec<(String, String)> {
        let mut settings = Vec::new();
        let mut add = |file: &str, value: Option<String>| {
            settings.extend(value.map(|value| (file.to_owned(), value)));
        };
        // The kernel's minimum is 1 ms (`max_bw_runtime` and `tg_set_cfs_bandwidth` in kernel/sched/core.c).
        let quota = |millis: u64| (millis.saturating_mul(PERIOD) / 1000).max(1000);
        add("cpu.max", self.cpu_millis.map(|millis| format!("{} {PERIOD}", quota(millis))));
        add("memory.max", self.memory.map(|bytes| bytes.to_string()));
        add("pids.max", self.processes.map(|count| count.to_string()));
        settings
    }
}

/// A cgroup with one process, which is removed on drop, after the process has ended.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    /// It, unless it existed, and the cgroups above it that were created for it, from the outermost one.
    created: Vec<PathBuf>,
}

impl Cgroup {
    /// Creates a cgroup for a process, and moves it there. `name` becomes a part of the cgroup's name. Empty cgroups of
    /// processes that have ended are removed.
    ///
    /// # Errors
    /// When no cgroup is delegated to the user, or the kernel refuses a limit.
    pub fn create(limits: &CgroupLimits, name: &str, process: Pid) -> Result<Self, CgroupError> {
        let settings = limits.settings();
        if let Some(parent) = &limits.parent {
            return Self::create_in(parent, &settings, name, process);
        }
        let mut result = None;
        for parent in host::delegated_cgroups().ok_or(CgroupError::NoHierarchy)?.into_iter().rev() {
            match Self::create_in(&parent, &settings, name, process) {
                // In a cgroup with processes, for instance, no other can have controllers.
                Err(error @ (CgroupError::Refused { .. } | CgroupError::Unavailable { .. })) => {
                    result = result.or(Some(error));
                }
                other => return other,
            }
        }
        let controllers: Vec<_> = controllers(&settings).collect();
        Err(result.unwrap_or_else(|| CgroupError::NotDelegated(controllers.join(", "))))
    }

    /// Creates a cgroup in `parent`, with settings: names of its files and their contents.
    fn create_in(
        parent: &Path,
        settings: &[(String, String)],
        name: &str,
        process: Pid,
    ) -> Result<Self, CgroupError> {
        enable(parent, controllers(settings))?;
        remove_ended(parent);
        let path = parent.join(format!("{PREFIX}{name}-{process}"));
        for _ in 0..ATTEMPTS_MAX {
            match Self::create_at(&path, settings, process) {
                // Another start has removed it while it was empty.
                Err(CgroupError::Refused { source, .. }) if is_removed(&source) => {}
                result => return result,
            }
        }
        Self::create_at(&path, settings, process)
    }

    /// Limits a process by the cgroup at a path in the hierarchy. It is created, with the cgroups above it, where it does not
    /// exist, and what was created is removed on drop. Settings are names of its files and their contents. The caller must be
    /// root.
    ///
    /// # Errors
    /// When the cgroup has a process already, or the kernel refuses a setting.
    pub fn create_named(
        path: &Path,
        settings: &[(String, String)],
        process: Pid,
    ) -> Result<Self, CgroupError> {
        for _ in 0..ATTEMPTS_MAX {
            match Self::try_create_named(path, settings, process) {
                // Another start has removed a cgroup above while it was empty.
                Err(CgroupError::Refused { source, .. }) if is_removed(&source) => {}
                result => return result,
            }
        }
        Self::try_create_named(path, settings, process)
    }

    fn try_create_named(
        path: &Path,
        settings: &[(String, String)],
        process: Pid,
    ) -> Result<Self, CgroupError> {
        let mut cgroup = Self { path: PathBuf::from(HIERARCHY), created: Vec::new() };
        for name in path {
            enable(&cgroup.path, controllers(settings))?;
            cgroup.path.push(name);
            match fs::create_dir(&cgroup.path) {
                Ok(()) => cgroup.created.push(cgroup.path.clone()),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(refused("create the cgroup", &cgroup.path)(error)),
            }
        }
        let processes = cgroup.path.join("cgroup.procs");
        let members = fs::read_to_string(&processes).map_err(refused("read", &processes))?;
        if !members.is_empty() {
            return Err(CgroupError::Taken(cgroup.path.clone()));
        }
        cgroup.set(settings, process)?;
        Ok(cgroup)
    }

    fn create_at(path: &Path, settings: &[(String, String)], process: Pid) -> Result<Self, CgroupError> {
        fs::create_dir(path).map_err(refused("create the cgroup", path))?;
        let cgroup = Self { path: path.to_owned(), created: vec![path.to_owned()] };
        cgroup.set(settings, process)?;
        Ok(cgroup)
    }

    /// Writes the settings, and moves the process.
    fn set(&self, settings: &[(String, String)], process: Pid) -> Result<(), CgroupError> {
        for (file, value) in settings {
            self.write(file, value)?;
        }
        match self.write("cgroup.procs", &process.to_string()) {
            // The process has ended, for which there is another message.
            Err(CgroupError::Refused { source, .. })
                if source.raw_os_error() == Some(Errno::SRCH.raw_os_error()) =>
            {
                Ok(())
            }
            result => result,
        }
    }

    fn write(&self, file: &str, value: &str) -> Result<(), CgroupError> {
        let path = self.path.join(file);
        // Without O_CREAT: a setting that does not exist is a missing file.
        let written =
            File::options().write(true).open(&path).and_then(|mut file| file.write_all(value.as_bytes()));
        written.map_err(refused("write to", &path))
    }

    /// Kills all processes of the cgroup (from Linux 5.14).
    pub fn kill(&self) {
        let _ = self.write("cgroup.kill", "1");
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for path in self.created.iter().rev() {
            // One whose process still runs stays, and so does one in which another start has created a cgroup.
            let _ = fs::remove_dir(path);
        }
    }
}

/// Whether an operation failed because its cgroup was removed.
fn is_removed(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::NODEV.raw_os_error())
}

fn refused(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::Refused { what, path, source }
}

/// The controllers of files such as `memory.max`, each once.
fn controllers(settings: &[(String, String)]) -> impl Iterator<Item = &str> {
    let mut names: Vec<_> = settings
        .iter()
        .filter_map(|(file, _)| file.split_once('.').map(|(name, _)| name))
        .filter(|name| *name != "cgroup")
        .collect();
    names.sort_unstable();
    names.dedup();
    names.into_iter()
}

/// Enables controllers for the cgroups in a cgroup, unless they are enabled already.
fn enable<'a>(parent: &Path, controllers: impl Iterator<Item = &'a str>) -> Result<(), CgroupError> {
    let path = parent.join("cgroup.subtree_control");
    let enabled = fs::read_to_string(&path).map_err(refused("read", &path))?;
    let missing: Vec<_> =
        controllers.filter(|name| !enabled.split_whitespace().any(|other| other == *name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let available = parent.join("cgroup.controllers");
    let available = fs::read_to_string(&available).map_err(refused("read", &available))?;
    let absent = |name: &&&str| !available.split_whitespace().any(|other| other == **name);
    let absent: Vec<_> = missing.iter().filter(absent).copied().collect();
    if !absent.is_empty() {
        return Err(CgroupError::Unavailable { path: parent.to_owned(), controllers: absent.join(", ") });
    }
    let words: Vec<_> = missing.iter().map(|name| format!("+{name}")).collect();
    fs::write(&path, words.join(" ")).map_err(refused("enable controllers in", &path))
}

/// Removes cgroups of processes that have ended: of starts that were killed.
fn remove_ended(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let process =
            name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.rsplit_once('-')?.1.parse().ok());
        // EPERM: it runs, as another user.
        let has_ended = process
            .and_then(Pid::from_raw)
            .is_some_and(|process| test_kill_process(process) == Err(Errno::SRCH));
        if has_ended {
            // The kernel refuses it while there is a process.
            let _ = fs::remove_dir(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_the_contents_of_the_cgroups_files() {
        let limits = CgroupLimits {
            cpu_millis: Some(1500),
            memory: Some(1 << 30),
            processes: Some(10),
            ..CgroupLimits::default()
        };
        let text = |settings: Vec<(String, String)>| {
            settings.into_iter().map(|(file, value)| format!("{file}={value}")).collect::<Vec<_>>().join(",")
        };
        assert_eq!(text(limits.settings()), "cpu.max=150000 100000,memory.max=1073741824,pids.max=10");
        let least = CgroupLimits { cpu_millis: Some(1), ..CgroupLimits::default() };
        assert_eq!(text(least.settings()), "cpu.max=1000 100000");
        assert_eq!(text(CgroupLimits::default().settings()), "");
        assert_eq!(controllers(&limits.settings()).collect::<Vec<_>>(), ["cpu", "memory", "pids"]);
        let files = ["memory.low", "memory.max", "cgroup.max.depth", "io.max", "hugetlb.2MB.max"];
        let settings: Vec<_> = files.iter().map(|file| ((*file).to_owned(), String::new())).collect();
        assert_eq!(controllers(&settings).collect::<Vec<_>>(), ["hugetlb", "io", "memory"]);
    }
}
