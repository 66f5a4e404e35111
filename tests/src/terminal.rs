//! A pseudo-terminal for programs under test.
#![expect(unsafe_code, reason = "pseudo-terminals have no safe wrapper in std")]

use crate::TIMEOUT;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

/// Both ends of a pseudo-terminal.
#[derive(Debug)]
pub struct Terminal {
    master: File,
    slave: OwnedFd,
}

impl Terminal {
    /// Opens a new pseudo-terminal.
    ///
    /// # Panics
    /// When openpty fails.
    #[must_use]
    pub fn open() -> Self {
        let (mut master, mut slave) = (-1, -1);
        let null = std::ptr::null_mut();
        // SAFETY: openpty writes two descriptors, which `Self` then owns.
        unsafe {
            assert_eq!(libc::openpty(&raw mut master, &raw mut slave, null, null.cast(), null.cast()), 0);
            Self { master: File::from_raw_fd(master), slave: OwnedFd::from_raw_fd(slave) }
        }
    }

    /// The local flags (`c_lflag`): echo, canonical mode, signals.
    ///
    /// # Panics
    /// When they cannot be read.
    #[must_use]
    pub fn flags(&self) -> u32 {
        // SAFETY: an all-zero termios is valid and tcgetattr fills it.
        unsafe {
            let mut settings: libc::termios = std::mem::zeroed();
            assert_eq!(libc::tcgetattr(self.slave.as_raw_fd(), &raw mut settings), 0);
            settings.c_lflag
        }
    }

    /// Sets the window size.
    ///
    /// # Panics
    /// When the ioctl fails.
    pub fn resize(&self, rows: u16, columns: u16) {
        let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: TIOCSWINSZ reads a winsize.
        assert_eq!(unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }, 0);
    }

    /// Starts a program with this as its controlling terminal.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start(&self, command: &mut Command) -> Child {
        let stream = || Stdio::from(self.slave.try_clone().unwrap());
        command.stdin(stream()).stdout(stream()).stderr(stream());
        // SAFETY: setsid and ioctl are async-signal-safe.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                libc::ioctl(0, libc::TIOCSCTTY, 0);
                Ok(())
            });
        }
        command.spawn().unwrap()
    }

    /// Reads the output until it ends with a text; returns the output.
    ///
    /// # Panics
    /// When the text does not appear in time; the message has the output.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) -> String {
        let mut screen = Vec::new();
        let mut byte = [0];
        let timeout = TIMEOUT.as_millis().try_into().unwrap_or(i32::MAX);
        while !screen.ends_with(text.as_bytes()) {
            let mut readable = libc::pollfd { fd: self.master.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: poll reads and writes one pollfd.
            let ready = unsafe { libc::poll(&raw mut readable, 1, timeout) };
            let is_read = ready == 1 && self.master.read(&mut byte).is_ok_and(|count| count == 1);
            assert!(is_read, "no {text:?}: {:?}", String::from_utf8_lossy(&screen));
            screen.push(byte[0]);
        }
        String::from_utf8_lossy(&screen).into_owned()
    }

    /// Writes keystrokes.
    ///
    /// # Panics
    /// When writing fails.
    pub fn type_keys(&mut self, keys: &[u8]) {
        self.master.write_all(keys).unwrap();
    }
}
