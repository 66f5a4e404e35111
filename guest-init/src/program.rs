//! Execution of a program: its arguments and environment, user, working directory, and exit status.
#![expect(unsafe_code, reason = "exec")]

use crate::console::{ErrnoText, print};
use crate::limits;
use crate::machine;
use crate::mounts::make_directories;
use crate::syscall::{self, SignalSet};
use alloc::ffi::CString;
use alloc::vec::Vec;
use core::ffi::CStr;
use guest_init::GuestConfig;
use guest_init::interpreter;
use rustix::fd::OwnedFd;
use rustix::fs::{Access, FileType, Mode, OFlags, access, fchmod, fchown, fstat, open};
use rustix::io::Errno;
use rustix::process::{Gid, Uid, WaitStatus};

const DEFAULT_ENVIRONMENT: [&CStr; 3] =
    [c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", c"HOME=/root", c"TERM=linux"];

/// Exit statuses of programs that could not be executed, as in shells.
const NOT_FOUND: u8 = 127;
pub(crate) const NOT_EXECUTABLE: u8 = 126;
const SIGNAL_BASE: i32 = 128;

/// The exit status of a process: 128 + signal if a signal killed it.
pub(crate) fn exit_code(status: WaitStatus) -> u8 {
    let code = status
        .exit_status()
        .or_else(|| status.terminating_signal().map(|signal| SIGNAL_BASE + signal))
        .unwrap_or(255);
    code.to_le_bytes()[0]
}

/// A program with its strings in the form that execve takes: null-terminated lists of pointers.
pub(crate) struct Program<'a> {
    config: &'a GuestConfig,
    arguments: Vec<*const u8>,
    environment: Vec<*const u8>,
    path: &'a [u8],
}

impl<'a> Program<'a> {
    /// The program of a configuration. Returns `None` if a string contains a NUL.
    pub(crate) fn new(config: &'a GuestConfig) -> Option<Self> {
        if config.arguments.has_inner_nul() || config.environment.has_inner_nul() {
            return None;
        }
        // TERM names the type of the terminal; a program on pipes has no terminal.
        let has_terminal = !config.agent || config.terminal.is_some();
        let defaults = DEFAULT_ENVIRONMENT.into_iter().take(if has_terminal { 3 } else { 2 });
        let missing: Vec<&CStr> = defaults
            .filter(|entry| {
                let name = entry.to_bytes().split_inclusive(|&byte| byte == b'=').next().unwrap_or_default();
                !config.environment.iter().any(|given| given.starts_with(name))
            })
            .collect();
        let entries =
            || config.environment.iter().chain(missing.iter().map(|entry| entry.to_bytes_with_nul()));
        let path = entries().find_map(|entry| entry.strip_prefix(b"PATH=")?.strip_suffix(&[0]));
        Some(Self {
            config,
            arguments: pointers(config.arguments.iter(), config.arguments.len()),
            environment: pointers(entries(), config.environment.len() + missing.len()),
            path: path.unwrap_or_default(),
        })
    }

    /// Executes the program in this process, a child of init. A failure is printed, becomes the exit status, and is
    /// written to `failed` as one byte.
    pub(crate) fn execute(&self, failed: Option<OwnedFd>) -> ! {
        let config = self.config;
        machine::drop_ports();
        if config.agent {
            limits::limit_program();
        }
        let code = match become_user(config) {
            Ok(()) => self.try_paths(),
            Err((what, name, error)) => {
                let name = alloc::string::String::from_utf8_lossy(name);
                print(format_args!("init: cannot {what}{name}: {}\n", ErrnoText(error)));
                NOT_EXECUTABLE
            }
        };
        if let Some(failed) = failed {
            let _ = rustix::io::write(failed, &[code]);
        }
        syscall::exit(code)
    }

    /// Executes the program by its path, or from the first directory of PATH that contains it. Returns only on failure,
    /// with the exit status.
    fn try_paths(&self) -> u8 {
        let program = self.config.arguments.iter().next().and_then(|program| program.strip_suffix(&[0]));
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
                    print_missing_interpreter(&name, &candidate);
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
            print(format_args!("init: {name}: not found\n"));
            return NOT_FOUND;
        }
        print(format_args!("init: {name}: cannot execute: {}\n", ErrnoText(result)));
        NOT_EXECUTABLE
    }

    fn execve(&self, path: &CStr) -> Errno {
        // SAFETY: both vectors end with a null pointer. They point to NUL-terminated strings, which are static or live
        // as long as the configuration.
        unsafe { syscall::execve(path, self.arguments.as_ptr(), self.environment.as_ptr()) }
    }
}

fn pointers<'a>(strings: impl Iterator<Item = &'a [u8]>, count: usize) -> Vec<*const u8> {
    let mut pointers = Vec::with_capacity(count + 1);
    pointers.extend(strings.map(<[u8]>::as_ptr).chain([core::ptr::null()]));
    pointers
}

/// Prints the interpreter of a program that exists, after execve failed with ENOENT.
fn print_missing_interpreter(name: &str, path: &CStr) {
    let mut head = [0; interpreter::HEAD];
    let file = open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let length = file.and_then(|file| rustix::io::read(file, &mut head)).unwrap_or(0);
    let interpreter = interpreter::of(&head[..length]).unwrap_or(b"(unknown)");
    let interpreter = alloc::string::String::from_utf8_lossy(interpreter);
    print(format_args!("init: {name}: interpreter {interpreter} not found\n"));
}

/// Sets working directory, user and signal mask of the program. An error names the failed operation and its object.
fn become_user(config: &GuestConfig) -> Result<(), (&'static str, &[u8], Errno)> {
    if let Some(directory) = &config.working_directory {
        if config.agent {
            make_directories(directory);
        }
        rustix::process::chdir(directory.as_slice())
            .map_err(|error| ("enter the working directory ", directory.as_slice(), error))?;
    }
    if [config.user_id, config.group_id].contains(&u32::MAX) || config.groups.contains(&u32::MAX) {
        return Err(("set the user", &[], Errno::INVAL));
    }
    let (uid, gid) = (Uid::from_raw(config.user_id), Gid::from_raw(config.group_id));
    own_streams(uid);
    if !(uid.is_root() && gid.is_root() && config.groups.is_empty()) {
        let groups: Vec<Gid> = config.groups.iter().map(|&id| Gid::from_raw(id)).collect();
        rustix::thread::set_thread_groups(&groups).map_err(|error| ("set the groups", &[][..], error))?;
        rustix::thread::set_thread_res_gid(gid, gid, gid)
            .map_err(|error| ("set the group", &[][..], error))?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)
            .map_err(|error| ("set the user", &[][..], error))?;
    }
    SignalSet::of([]).block().map_err(|error| ("unblock signals", &[][..], error))?;
    Ok(())
}

/// Makes the user the owner of the standard streams. /dev/stdout is a link to /proc/self/fd/1, and opening it checks
/// the permissions of the pipe or terminal.
fn own_streams(user: Uid) {
    /// A pipe has no name, and a process can open only pipes that it already holds. All users may open it, so that a
    /// program that changes its user later still can.
    const PIPE: Mode = Mode::from_raw_mode(0o666);
    for stream in syscall::standard_streams() {
        let Ok(stat) = fstat(stream) else { continue };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Fifo => {
                let _ = fchown(stream, Some(user), None).and_then(|()| fchmod(stream, PIPE));
            }
            // A terminal has a name in /dev/pts, through which other users could read its input.
            FileType::CharacterDevice if rustix::termios::isatty(stream) => {
                let _ = fchown(stream, Some(user), None);
            }
            // /dev/null is open to all users already.
            _ => {}
        }
    }
}
