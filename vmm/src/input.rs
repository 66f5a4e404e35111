//! Console input: bytes of a terminal or a file on their way to the serial port.

use crate::devices::console::EscapeFilter;
use crate::devices::serial::SerialPort;
use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::sync::{Mutex, TryLockError};
use vmm_sys_util::eventfd::EventFd;

/// Console input for the serial port.
#[derive(Debug)]
pub(crate) struct Input {
    pub(crate) source: File,
    /// Readable when the guest has emptied the receive FIFO.
    pub(crate) drained: EventFd,
    /// Ctrl-A x is recognized only on a terminal.
    escape: Option<EscapeFilter>,
    /// Bytes that were read and did not fit into the port yet: from one read, or typed ahead.
    waiting: Vec<u8>,
    pub(crate) state: SourceState,
}

/// How the loop is notified of input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SourceState {
    /// The source is watched.
    Watched,
    /// The port is full: the source is watched again when the guest has read.
    Paused,
    /// A regular file, which epoll does not support, and which is readable until its end.
    AlwaysReady,
    /// The end of the input was reached.
    Ended,
}

impl Input {
    const READ_SIZE: usize = 64;
    /// Maximum number of bytes that are typed ahead of the guest.
    const TYPE_AHEAD_MAX: usize = 4096;

    pub(crate) fn new(source: File, drained: EventFd) -> Self {
        let escape = source.is_terminal().then(EscapeFilter::default);
        Self { source, drained, escape, waiting: Vec::new(), state: SourceState::Watched }
    }
}

impl Input {
    /// Whether to read more. Input stays in its source until the guest has read what was delivered; only a terminal is
    /// always read, so that the user can type Ctrl-A x when the guest does not read.
    pub(crate) const fn accepts_more(&self) -> bool {
        self.escape.is_some() || self.waiting.is_empty()
    }

    /// Reads once; returns `true` when the input contained Ctrl-A x.
    pub(crate) fn read_source(&mut self) -> bool {
        let mut buffer = [0; Self::READ_SIZE];
        match self.source.read(&mut buffer) {
            Ok(0) => self.state = SourceState::Ended,
            Ok(length) => match &mut self.escape {
                Some(filter) => {
                    let escaped = filter.filter(&buffer[..length], &mut self.waiting);
                    // Keys that the guest does not read are lost, as on a real line.
                    self.waiting.truncate(Self::TYPE_AHEAD_MAX);
                    return escaped;
                }
                None => self.waiting.extend(&buffer[..length]),
            },
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(_) => self.state = SourceState::Ended,
        }
        false
    }

    /// Enqueues as much as the port accepts; returns `true` when the port is busy. A vCPU may hold its lock while it
    /// waits for the reader of its output, and this loop must not wait for that.
    pub(crate) fn enqueue(&mut self, serial: &Mutex<SerialPort>) -> bool {
        if self.waiting.is_empty() {
            return false;
        }
        let mut serial = match serial.try_lock() {
            Ok(serial) => serial,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return true,
        };
        let count = self.waiting.len().min(serial.input_space());
        if count > 0 {
            serial.put_input(&self.waiting[..count]);
            self.waiting.drain(..count);
        }
        false
    }
}
