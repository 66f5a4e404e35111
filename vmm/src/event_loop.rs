//! The one loop that waits for everything that is not a vCPU: console input, devices, the end of a vCPU,
//! and the wish to stop.

use crate::bus::lock;
use crate::control::{Control, Event, Request, Statistics};
use crate::devices::console::EscapeFilter;
use crate::devices::serial::SerialPort;
use crate::devices::virtio::{Transport, Watcher};
use crate::memory::{self, BackingFile};
use crate::poll::borrow;
use crate::timeline::Instant;
use crate::vcpu_threads::{KICK_INTERVAL, VcpuThreads};
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::{Errno, read};
use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, TryLockError};
use vmm_sys_util::eventfd::EventFd;

/// Console input on its way to the serial port.
#[derive(Debug)]
pub(crate) struct Input {
    source: File,
    /// Readable when the guest has read what it was given.
    drained: EventFd,
    /// Ctrl-A x means something only where a person types it.
    escape: Option<EscapeFilter>,
    /// Bytes that were read and do not fit the port yet: one read's worth, or what was typed ahead.
    waiting: Vec<u8>,
    state: SourceState,
}

/// How the loop learns that there is input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SourceState {
    /// The source is watched.
    Watched,
    /// The port is full: the source is not watched until the guest has read.
    Paused,
    /// A regular file, which epoll does not take, and which always has input until its end.
    AlwaysReady,
    /// There is no more input.
    Ended,
}

impl Input {
    const READ_SIZE: usize = 64;
    /// Keys that a terminal may be ahead of its guest.
    const TYPED_AHEAD: usize = 4096;

    pub(crate) fn new(source: File, drained: EventFd) -> Self {
        let escape = source.is_terminal().then(EscapeFilter::default);
        Self { source, drained, escape, waiting: Vec::new(), state: SourceState::Watched }
    }
}

/// Why the loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LoopEnd {
    /// A vCPU has ended.
    VcpuEnded,
    /// Somebody told the machine to stop.
    Stopped,
    /// The person at the terminal asked to leave.
    Left,
    /// A file that is guest memory has become shorter.
    MemoryLost,
}

const VCPU_ENDED: u64 = 0;
const STOP: u64 = 1;
const SOURCE: u64 = 2;
const DRAINED: u64 = 3;
/// A file that is guest memory has changed.
const MEMORY: u64 = 5;
/// Not an event: the port was busy, and input is offered again.
const RETRY: u64 = 4;
/// A request of the front.
const CONTROL: u64 = 6;
/// How long to wait before that, in nanoseconds.
const RETRY_INTERVAL: u64 = 5_000_000;
/// Events that are taken at once.
const EVENTS: usize = 16;

/// The loop's descriptors, registered before any vCPU runs.
#[derive(Debug)]
pub(crate) struct EventLoop {
    epoll: Arc<OwnedFd>,
    input: Option<Input>,
    /// The front, where it is another process.
    control: Option<Control>,
    /// The front waits for all vCPUs to leave the guest.
    is_pausing: bool,
    /// Input waits for a port that was busy.
    retry: bool,
    devices: Vec<Arc<Mutex<Transport>>>,
    /// Files that are guest memory, and what tells of changes of theirs.
    files: Vec<Arc<BackingFile>>,
    changes: Option<OwnedFd>,
    /// When each device wants to be called at the latest.
    deadlines: Vec<Option<Instant>>,
    /// Devices whose failure the front knows.
    reported: Vec<bool>,
}

impl EventLoop {
    pub(crate) fn new(
        ended: &EventFd,
        stop: &EventFd,
        input: Option<Input>,
        control: Option<Control>,
        devices: Vec<Arc<Mutex<Transport>>>,
        files: Vec<Arc<BackingFile>>,
    ) -> io::Result<Self> {
        let epoll = Arc::new(epoll::create(CreateFlags::CLOEXEC)?);
        watch(&epoll, borrow(ended), VCPU_ENDED)?;
        watch(&epoll, borrow(stop), STOP)?;
        for (number, device) in (1..).zip(&devices) {
            lock(device).watch(Watcher::new(Arc::clone(&epoll), number))?;
        }
        let (deadlines, reported) = (vec![None; devices.len()], vec![false; devices.len()]);
        // Without a watch the guest runs as well, as long as nobody makes its files shorter.
        let changes = memory::watch(&files).unwrap_or(None);
        if let Some(changes) = &changes {
            watch(&epoll, changes.as_fd(), MEMORY)?;
        }
        let mut this = Self {
            epoll,
            input,
            control,
            is_pausing: false,
            retry: false,
            devices,
            files,
            changes,
            deadlines,
            reported,
        };
        if let Some(control) = &this.control {
            watch(&this.epoll, control.as_fd(), CONTROL)?;
        }
        if let Some(input) = &mut this.input {
            watch(&this.epoll, borrow(&input.drained), DRAINED)?;
            input.state = match watch(&this.epoll, input.source.as_fd(), SOURCE) {
                Ok(()) => SourceState::Watched,
                // epoll refuses what is always readable: regular files, /dev/null.
                Err(Errno::PERM) => SourceState::AlwaysReady,
                Err(error) => return Err(error.into()),
            };
        }
        Ok(this)
    }

    /// Runs until something ends the machine.
    pub(crate) fn run(&mut self, serial: &Mutex<SerialPort>, vcpus: &VcpuThreads) -> LoopEnd {
        let mut events = Vec::with_capacity(EVENTS);
        if self.serve_ready_source(serial) {
            return LoopEnd::Left;
        }
        loop {
            events.clear();
            let limit = self.limit();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), limit.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                // epoll_wait fails only for wrong arguments; a loop that cannot wait must not spin.
                Err(_) => return LoopEnd::Stopped,
            }
            if events.is_empty() && self.retry && self.serve_input(serial, RETRY) {
                return LoopEnd::Left;
            }
            self.serve_deadlines();
            self.finish_pause(vcpus);
            for event in &events {
                let data: EventData = event.data;
                if let Some(device) = (data.u64() >> 32).checked_sub(1) {
                    self.serve_device(device, data.u64(), event.flags);
                    continue;
                }
                match data.u64() {
                    VCPU_ENDED => return LoopEnd::VcpuEnded,
                    STOP => return LoopEnd::Stopped,
                    CONTROL if !self.serve_control(vcpus) => return LoopEnd::Stopped,
                    MEMORY if self.has_lost_memory() => return LoopEnd::MemoryLost,
                    SOURCE | DRAINED if self.serve_input(serial, data.u64()) => return LoopEnd::Left,
                    _ => {}
                }
            }
        }
    }

    /// The front, where it is another process.
    pub(crate) const fn control(&self) -> Option<&Control> {
        self.control.as_ref()
    }

    /// What tells of changes of files that are guest memory. Its end waits for SRCU (`fsnotify_destroy_group` in
    /// fs/notify/group.c).
    pub(crate) fn changes(&self) -> Option<BorrowedFd<'_>> {
        self.changes.as_ref().map(AsFd::as_fd)
    }

    fn has_lost_memory(&self) -> bool {
        // What happened says nothing that is not seen in the files.
        let mut happened = [0; 4096];
        while self.changes.as_ref().is_some_and(|changes| read(changes, &mut happened).is_ok()) {}
        self.files.iter().any(|file| file.is_shorter())
    }

    /// How long to wait at most.
    fn limit(&self) -> Option<Timespec> {
        let earliest = self.deadlines.iter().flatten().min();
        let until = earliest.map(|deadline| deadline.0.saturating_sub(Instant::now().0));
        let retry = self.retry.then_some(RETRY_INTERVAL);
        let kick = self.is_pausing.then_some(u64::from(KICK_INTERVAL.subsec_nanos()));
        let nanoseconds = until.into_iter().chain(retry).chain(kick).min()?;
        let (seconds, rest) = (nanoseconds / 1_000_000_000, nanoseconds % 1_000_000_000);
        Some(Timespec { tv_sec: seconds.try_into().ok()?, tv_nsec: rest.try_into().ok()? })
    }

    /// Calls a device for one of its descriptors.
    fn serve_device(&mut self, device: u64, token: u64, flags: EventFlags) {
        let Ok(device) = usize::try_from(device) else { return };
        let token = u32::try_from(token & u64::from(u32::MAX)).unwrap_or(u32::MAX);
        let mut transport = lock(&self.devices[device]);
        transport.serve(token, flags);
        self.deadlines[device] = transport.deadline();
        drop(transport);
        self.report_failure(device);
    }

    /// Calls the devices whose time has come.
    fn serve_deadlines(&mut self) {
        if self.deadlines.iter().all(Option::is_none) {
            return;
        }
        let now = Instant::now();
        for (device, deadline) in self.devices.iter().zip(&mut self.deadlines) {
            if deadline.is_some_and(|deadline| deadline.0 <= now.0) {
                let mut transport = lock(device);
                transport.serve_deadline();
                *deadline = transport.deadline();
            }
        }
    }

    /// Tells the front of a device that has failed, once. A failure on a vCPU's thread is reported with the device's next
    /// event, or with the machine's end.
    fn report_failure(&mut self, device: usize) {
        if let Some(control) = &self.control
            && !self.reported[device]
            && let Some(failure) = lock(&self.devices[device]).failure()
        {
            control.tell(&Event::DeviceFailed(failure));
            self.reported[device] = true;
        }
    }

    /// Serves a request of the front; whether the machine continues. It stops when the front is gone, unless the front
    /// detached it before, or sends something that is no request.
    fn serve_control(&mut self, vcpus: &VcpuThreads) -> bool {
        let Some(control) = &mut self.control else { return true };
        match control.receive() {
            Some(Request::Pause) => {
                vcpus.pause();
                vcpus.kick();
                self.is_pausing = true;
            }
            Some(Request::Resume) => {
                vcpus.resume();
                self.is_pausing = false;
                control.tell(&Event::Resumed);
            }
            Some(Request::Statistics) => {
                let device_failures = self.devices.iter().filter_map(|device| lock(device).failure());
                let (is_paused, balloon) = (vcpus.is_paused(), control.balloon());
                let statistics =
                    Statistics { is_paused, balloon, device_failures: device_failures.collect() };
                control.tell(&Event::Statistics(Box::new(statistics)));
            }
            Some(Request::SetBalloon(mib)) => control.set_balloon(mib),
            Some(Request::Detach) => {}
            None if control.is_detached() => {
                let _ = epoll::delete(&self.epoll, control.as_fd());
            }
            None | Some(Request::Start(_) | Request::Preboot(_) | Request::Stop) => return false,
        }
        true
    }

    /// Tells the front when all vCPUs have left the guest after a request to pause, and interrupts those that have not.
    fn finish_pause(&mut self, vcpus: &VcpuThreads) {
        if !self.is_pausing {
            return;
        }
        if vcpus.is_paused() {
            self.is_pausing = false;
            self.control.iter().for_each(|control| control.tell(&Event::Paused));
        } else {
            vcpus.kick();
        }
    }

    /// Input from a regular file is there before any event.
    fn serve_ready_source(&mut self, serial: &Mutex<SerialPort>) -> bool {
        let ready = self.input.as_ref().is_some_and(|input| input.state == SourceState::AlwaysReady);
        ready && self.serve_input(serial, DRAINED)
    }

    /// Moves input to the port; `true` when the person at the terminal asked to leave.
    fn serve_input(&mut self, serial: &Mutex<SerialPort>, event: u64) -> bool {
        let Some(input) = &mut self.input else { return false };
        if event == DRAINED {
            // The counter only has to be reset; that it had a value is why we are here.
            let _ = input.drained.read();
        }
        // Only a source that said so, or one that is always ready, can be read without waiting.
        let readable = event == SOURCE || input.state == SourceState::AlwaysReady;
        let left = readable && input.wants_more() && input.read_source();
        self.retry = input.give_to(serial);
        self.watch_source_again();
        left
    }

    /// Watches the source exactly while the port has taken all that was read.
    fn watch_source_again(&mut self) {
        let Some(input) = &mut self.input else { return };
        match (input.state, input.wants_more()) {
            // Not masked but removed: a closed pipe is reported even where nothing is asked for.
            (SourceState::Watched, false) => {
                let _ = epoll::delete(&self.epoll, &input.source);
                input.state = SourceState::Paused;
            }
            (SourceState::Paused, true) => {
                let watched = watch(&self.epoll, input.source.as_fd(), SOURCE).is_ok();
                input.state = if watched { SourceState::Watched } else { SourceState::Ended };
            }
            (SourceState::Ended, _) => {
                let _ = epoll::delete(&self.epoll, &input.source);
            }
            _ => {}
        }
    }
}

impl Input {
    /// Whether to read on. Input waits in its source until the guest has taken what was read; only
    /// a terminal is always read, because its user may want to leave a guest that reads nothing.
    const fn wants_more(&self) -> bool {
        self.escape.is_some() || self.waiting.is_empty()
    }

    /// Reads once; `true` when that held the escape.
    fn read_source(&mut self) -> bool {
        let mut buffer = [0; Self::READ_SIZE];
        match self.source.read(&mut buffer) {
            Ok(0) => self.state = SourceState::Ended,
            Ok(length) => match &mut self.escape {
                Some(filter) => {
                    let left = filter.filter(&buffer[..length], &mut self.waiting);
                    // Keys that nobody reads are lost, as on a real line.
                    self.waiting.truncate(Self::TYPED_AHEAD);
                    return left;
                }
                None => self.waiting.extend(&buffer[..length]),
            },
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(_) => self.state = SourceState::Ended,
        }
        false
    }

    /// Gives the port what it takes; `true` when the port is busy. A vCPU may hold it while it
    /// waits for whoever reads its output, and this loop must not wait with it.
    fn give_to(&mut self, serial: &Mutex<SerialPort>) -> bool {
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

fn watch(epoll: &OwnedFd, source: BorrowedFd<'_>, token: u64) -> Result<(), Errno> {
    epoll::add(epoll, source, EventData::new_u64(token), EventFlags::IN)
}
