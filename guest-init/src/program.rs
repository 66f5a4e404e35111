//! A program to become: its strings, its user, its directory, and what its end says.
#![expect(unsafe_code, reason = "exec")]

use crate::limits;
use crate::machine;
use crate::mounts::make_directories;
use crate::syscall::{self, SignalSet};
use crate::voice::{Words, say};
use alloc::ffi::CString;
use alloc::vec::Vec;
use core::ffi::CStr;
use guest_init::interpreter;
use guest_init::payload_spec::PayloadSpec;
use rustix::fd::OwnedFd;
use rustix::fs::{Access, FileType, Mode, OFlags, access, fchmod, fchown, fstat, open};
use rustix::io::Errno;
use rustix::process::{Gid, Uid, WaitStatus};

const DEFAULT_ENVIRONMENT: [&CStr; 3] =
    [c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", c"HOME=/root", c"TERM=linux"];

/// Exit statuses of what could not be executed, as shells have them.
const NOT_FOUND: u8 = 127;
pub(crate) const NOT_EXECUTABLE: u8 = 126;
const SIGNAL_BASE: i32 = 128;

/// The exit status that stands for a process's end: 128 + signal when one killed it.
pub(crate) fn exit_code(status: WaitStatus) -> u8 {
    let code = status
        .exit_status()
        .or_else(|| status.terminating_signal().map(|signal| SIGNAL_BASE + signal))
        .unwrap_or(255);
    code.to_le_bytes()[0]
}

/// The payload's strings in the form that execve takes: lists of pointers that end with null.
pub(crate) struct Program<'a> {
    spec: &'a PayloadSpec,
    arguments: Vec<*const u8>,
    environment: Vec<*const u8>,
    path: &'a [u8],
}

impl<'a> Program<'a> {
    /// The program of a specification, unless one of its strings has a NUL in it.
    pub(crate) fn new(spec: &'a PayloadSpec) -> Option<Self> {
        if spec.arguments.has_inner_nul() || spec.environment.has_inner_nul() {
            return None;
        }
        // TERM says what a terminal can do; at a pipe there is none.
        let has_terminal = !spec.agent || spec.terminal.is_some();
        let defaults = DEFAULT_ENVIRONMENT.into_iter().take(if has_terminal { 3 } else { 2 });
        let missing: Vec<&CStr> = defaults
            .filter(|entry| {
                let name = entry.to_bytes().split_inclusive(|&byte| byte == b'=').next().unwrap_or_default();
                !spec.environment.iter().any(|given| given.starts_with(name))
            })
            .collect();
        let entries = || spec.environment.iter().chain(missing.iter().map(|entry| entry.to_bytes_with_nul()));
        let path = entries().find_map(|entry| entry.strip_prefix(b"PATH=")?.strip_suffix(&[0]));
        Some(Self {
            spec,
            arguments: pointers(spec.arguments.iter(), spec.arguments.len()),
            environment: pointers(entries(), spec.environment.len() + missing.len()),
            path: path.unwrap_or_default(),
        })
    }

    /// Becomes the payload. Runs in the child; what fails is said and becomes its exit status, and a byte in `failed`.
    pub(crate) fn execute(&self, failed: Option<OwnedFd>) -> ! {
        let spec = self.spec;
        machine::drop_ports();
        if spec.agent {
            limits::limit_program();
        }
        let code = match become_user(spec) {
            Ok(()) => self.try_paths(),
            Err((what, name, error)) => {
                let name = alloc::string::String::from_utf8_lossy(name);
                say(format_args!("init: cannot {what}{name}: {}\n", Words(error)));
                NOT_EXECUTABLE
            }
        };
        if let Some(failed) = failed {
            let _ = rustix::io::write(failed, &[code]);
        }
        syscall::exit(code)
    }

    /// Executes the program where it is, or in the first directory of PATH that has it. Returns only when that
    /// failed everywhere, and with the exit status for it.
    fn try_paths(&self) -> u8 {
        let program = self.spec.arguments.iter().next().and_then(|program| program.strip_suffix(&[0]));
        let program = program.unwrap_or_default();
        let name = alloc::string::String::from_utf8_lossy(program);
        let is_path = program.contains(&b'/');
        let mut result = Errno::NOENT;
        for directory in self.path.split(|&byte| byte == b':') {
            let candidate = match is_path {
                true => CString::new(program),
                false => CString::new([directory, b"/", program].concat()),
            };
            let Ok(candidate) = candidate else { continue };
            match self.execve(&candidate) {
                Errno::NOENT | Errno::NOTDIR if access(&candidate, Access::EXISTS).is_ok() => {
                    say_what_it_needs(&name, &candidate);
                    return NOT_FOUND;
                }
                Errno::NOENT | Errno::NOTDIR => {}
                error => result = error,
            }
            if is_path {
                break;
            }
        }
        if result == Errno::NOENT {
            say(format_args!("init: {name}: not found\n"));
            return NOT_FOUND;
        }
        say(format_args!("init: {name}: cannot execute: {}\n", Words(result)));
        NOT_EXECUTABLE
    }

    fn execve(&self, path: &CStr) -> Errno {
        // SAFETY: both vectors end with a null pointer and point to strings that end with NUL and
        // live as long as the specification, or for ever.
        unsafe { syscall::execve(path, self.arguments.as_ptr(), self.environment.as_ptr()) }
    }
}

fn pointers<'a>(strings: impl Iterator<Item = &'a [u8]>, count: usize) -> Vec<*const u8> {
    let mut pointers = Vec::with_capacity(count + 1);
    pointers.extend(strings.map(<[u8]>::as_ptr).chain([core::ptr::null()]));
    pointers
}

/// The program is there, and the kernel did not find what it names in turn.
fn say_what_it_needs(name: &str, path: &CStr) {
    let mut head = [0; interpreter::HEAD];
    let file = open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let length = file.and_then(|file| rustix::io::read(file, &mut head)).unwrap_or(0);
    let needed = interpreter::of(&head[..length]).unwrap_or(b"an interpreter");
    let needed = alloc::string::String::from_utf8_lossy(needed);
    say(format_args!("init: {name}: needs {needed}, which is not there\n"));
}

/// Directory, user and signal mask of the payload; what cannot be done, to what, and why.
fn become_user(spec: &PayloadSpec) -> Result<(), (&'static str, &[u8], Errno)> {
    if let Some(directory) = &spec.working_directory {
        if spec.agent {
            make_directories(directory);
        }
        rustix::process::chdir(directory.as_slice())
            .map_err(|error| ("enter the working directory ", directory.as_slice(), error))?;
    }
    if [spec.user_id, spec.group_id].contains(&u32::MAX) || spec.groups.contains(&u32::MAX) {
        return Err(("set the user", &[], Errno::INVAL));
    }
    let (uid, gid) = (Uid::from_raw(spec.user_id), Gid::from_raw(spec.group_id));
    own_streams(uid);
    if !(uid.is_root() && gid.is_root() && spec.groups.is_empty()) {
        let groups: Vec<Gid> = spec.groups.iter().map(|&id| Gid::from_raw(id)).collect();
        rustix::thread::set_thread_groups(&groups).map_err(|error| ("set the groups", &[][..], error))?;
        rustix::thread::set_thread_res_gid(gid, gid, gid)
            .map_err(|error| ("set the group", &[][..], error))?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)
            .map_err(|error| ("set the user", &[][..], error))?;
    }
    SignalSet::of([]).block().map_err(|error| ("unblock signals", &[][..], error))?;
    Ok(())
}

/// Makes the standard streams the user's. /dev/stdout is a link to /proc/self/fd/1, and the kernel opens what that leads
/// to with the permissions of the pipe or terminal.
fn own_streams(user: Uid) {
    /// A pipe has no name: a process can only open one that it holds already. So everybody may, and a program that
    /// changes its user later still can.
    const PIPE: Mode = Mode::from_raw_mode(0o666);
    for stream in syscall::standard_streams() {
        let Ok(stat) = fstat(stream) else { continue };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Fifo => {
                let _ = fchown(stream, Some(user), None).and_then(|()| fchmod(stream, PIPE));
            }
            // A terminal has a name in /dev/pts, by which other users could read what is typed.
            FileType::CharacterDevice if rustix::termios::isatty(stream) => {
                let _ = fchown(stream, Some(user), None);
            }
            // /dev/null belongs to all.
            _ => {}
        }
    }
}
