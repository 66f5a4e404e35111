//! At a terminal the guest gets every key, Ctrl-A x leaves, and the settings come back.
#![expect(unsafe_code, reason = "pseudo-terminals have no safe wrapper in std")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use tests::{boot, kindling};

struct Terminal {
    master: File,
    slave: OwnedFd,
}

impl Terminal {
    fn open() -> Self {
        let (mut master, mut slave) = (-1, -1);
        let null = std::ptr::null_mut();
        // SAFETY: openpty writes two descriptors, which are owned from here on.
        unsafe {
            assert_eq!(libc::openpty(&raw mut master, &raw mut slave, null, null.cast(), null.cast()), 0);
            Self { master: File::from_raw_fd(master), slave: OwnedFd::from_raw_fd(slave) }
        }
    }

    /// Local flags: echo, line mode, signals.
    fn flags(&self) -> u32 {
        // SAFETY: an all-zero termios is valid and tcgetattr fills it.
        unsafe {
            let mut settings: libc::termios = std::mem::zeroed();
            assert_eq!(libc::tcgetattr(self.slave.as_raw_fd(), &raw mut settings), 0);
            settings.c_lflag
        }
    }

    /// Starts a program in the terminal's foreground.
    fn start(&self, command: &mut Command) -> Child {
        let stream = || Stdio::from(self.slave.try_clone().unwrap());
        command.stdin(stream()).stdout(stream()).stderr(stream());
        // SAFETY: setsid and ioctl are allowed between fork and exec.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                libc::ioctl(0, libc::TIOCSCTTY, 0);
                Ok(())
            });
        }
        command.spawn().unwrap()
    }

    /// Reads the screen until it has this text.
    fn wait_for(&mut self, text: &str) -> String {
        let mut screen = Vec::new();
        let mut byte = [0];
        loop {
            assert_eq!(self.master.read(&mut byte).unwrap(), 1);
            screen.push(byte[0]);
            if screen.ends_with(text.as_bytes()) {
                return String::from_utf8_lossy(&screen).into_owned();
            }
        }
    }

    fn type_keys(&mut self, keys: &[u8]) {
        self.master.write_all(keys).unwrap();
    }
}

const RAW: u32 = 0;

fn line_flags(flags: u32) -> u32 {
    flags & (libc::ECHO | libc::ICANON | libc::ISIG)
}

#[test]
fn ctrl_c_reaches_the_guest_and_ctrl_a_x_leaves() {
    let mut terminal = Terminal::open();
    let before = terminal.flags();
    assert_ne!(line_flags(before), RAW);
    let script = "trap 'echo inter''rupted' INT; echo rea''dy; while :; do sleep 1; done";
    let mut child = terminal.start(boot().args(["--", "/bin/sh", "-c", script]));
    terminal.wait_for("ready");
    assert_eq!(line_flags(terminal.flags()), RAW);
    terminal.type_keys(b"\x03");
    terminal.wait_for("interrupted");
    terminal.type_keys(b"\x01x");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(terminal.flags(), before);
}

#[test]
fn the_terminal_is_restored_after_a_signal_and_after_a_failure() {
    let mut terminal = Terminal::open();
    let before = terminal.flags();
    let mut child = terminal.start(boot().args(["--", "/bin/sh", "-c", "echo rea''dy; sleep 1000"]));
    terminal.wait_for("ready");
    let pid = i32::try_from(child.id()).unwrap();
    // SAFETY: kill has no memory effects, and the child has not been waited for.
    unsafe { libc::kill(pid, libc::SIGTERM) };
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert_eq!(terminal.flags(), before);

    let mut child = terminal.start(boot().args(["--", "/bin/sh", "-c", "echo rea''dy; sleep 1000"]));
    terminal.wait_for("ready");
    let pid = i32::try_from(child.id()).unwrap();
    // SAFETY: as above. This is what an internal failure raises.
    unsafe { libc::kill(pid, libc::SIGABRT) };
    assert_eq!(child.wait().unwrap().code(), None);
    assert_eq!(terminal.flags(), before);
}

#[test]
fn a_guest_that_ends_leaves_the_terminal_as_it_was() {
    let terminal = Terminal::open();
    let before = terminal.flags();
    let mut child = terminal.start(boot().args(["--", "true"]));
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(terminal.flags(), before);
    // A request that cannot be met never touches it.
    let mut child = terminal.start(kindling().args(["boot", "--kernel", "/nonexistent"]));
    assert_eq!(child.wait().unwrap().code(), Some(2));
    assert_eq!(terminal.flags(), before);
}
