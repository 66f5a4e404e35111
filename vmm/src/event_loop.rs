//! The event loop: it waits for console input, device events, the end of a vCPU, control requests, and the request to
//! stop.

mod requests;

use crate::bus::lock;
use crate::control::{Asker, Control, Event};
use crate::devices::serial::SerialPort;
use crate::devices::virtio::{Transport, Watcher};
use crate::input::{Input, SourceState};
use crate::jail::Jail;
use crate::machine::Machine;
use crate::memory::{self, BackingFile};
use crate::poll::borrow;
use crate::timeline::Instant;
use crate::vcpu_threads::{KICK_INTERVAL, VcpuThreads};
use requests::Requested;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::{Errno, read};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

/// Why the loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LoopEnd {
    /// A vCPU has ended.
    VcpuEnded,
    /// The machine was requested to stop.
    Stopped,
    /// The user typed Ctrl-A x.
    TerminalEscape,
    /// A file that is mapped as guest memory was truncated.
    MemoryLost,
}

const VCPU_ENDED: u64 = 0;
const STOP: u64 = 1;
const SOURCE: u64 = 2;
const DRAINED: u64 = 3;
/// A file that is mapped as guest memory has changed.
const MEMORY: u64 = 5;
/// Not an event: the port was busy, and the input is offered again.
const RETRY: u64 = 4;
/// A request from the front-end process.
const CONTROL: u64 = 6;
/// The guest's agent accepts connections.
const STARTED: u64 = 7;
/// A connection to the socket of requests.
const REQUESTS: u64 = 8;
/// A request of the program with the number in the other bits.
const REQUEST: u64 = 1 << 31;
/// Interval of these attempts in nanoseconds.
const RETRY_INTERVAL: u64 = 5_000_000;
/// Maximum number of events per wait.
const EVENTS: usize = 16;

/// The event loop, whose descriptors are registered before any vCPU runs.
#[derive(Debug)]
pub(crate) struct EventLoop {
    epoll: Arc<OwnedFd>,
    input: Option<Input>,
    /// The connection to the front-end process, if there is one.
    control: Option<Control>,
    /// Whether the last request was to pause, not to resume.
    is_paused: bool,
    /// The programs that wait for all vCPUs to leave the guest.
    pausing: Vec<Asker>,
    /// The snapshot that was requested.
    snapshot: Option<Requested>,
    /// Whether the vCPUs save their states for it.
    is_saving: bool,
    /// Whether input waits for a port that was busy.
    retry: bool,
    devices: Vec<Arc<Mutex<Transport>>>,
    /// Files that are mapped as guest memory, and the inotify descriptor for their changes.
    files: Vec<Arc<BackingFile>>,
    changes: Option<OwnedFd>,
    /// The deadline of each device.
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
        jail: Jail,
    ) -> io::Result<Self> {
        let epoll = Arc::new(epoll::create(CreateFlags::CLOEXEC)?);
        watch(&epoll, borrow(ended), VCPU_ENDED)?;
        watch(&epoll, borrow(stop), STOP)?;
        for (number, device) in (1..).zip(&devices) {
            let mut device = lock(device);
            device.watch(Watcher::new(Arc::clone(&epoll), number))?;
            if jail.is_on() {
                device.prepare(jail)?;
            }
        }
        let (deadlines, reported) = (vec![None; devices.len()], vec![false; devices.len()]);
        // Without the watch, the guest runs until it accesses a truncated file.
        let changes = memory::watch(&files).unwrap_or(None);
        if let Some(changes) = &changes {
            watch(&epoll, changes.as_fd(), MEMORY)?;
        }
        let mut this = Self {
            epoll,
            input,
            control,
            is_paused: false,
            pausing: Vec::new(),
            snapshot: None,
            is_saving: false,
            retry: false,
            devices,
            files,
            changes,
            deadlines,
            reported,
        };
        if let Some(control) = &this.control {
            watch(&this.epoll, control.as_fd(), CONTROL)?;
            if let Some(doorbell) = control.start_doorbell() {
                watch(&this.epoll, doorbell, STARTED)?;
            }
            if let Some(requests) = &control.requests {
                watch(&this.epoll, requests.as_fd(), REQUESTS)?;
            }
        }
        if let Some(input) = &mut this.input {
            watch(&this.epoll, borrow(&input.drained), DRAINED)?;
            input.state = match watch(&this.epoll, input.source.as_fd(), SOURCE) {
                Ok(()) => SourceState::Watched,
                // epoll refuses descriptors that are always readable: regular files, /dev/null.
                Err(Errno::PERM) => SourceState::AlwaysReady,
                Err(error) => return Err(error.into()),
            };
        }
        Ok(this)
    }

    /// Runs until an event ends the machine.
    pub(crate) fn run(&mut self, machine: &Machine, vcpus: &VcpuThreads) -> LoopEnd {
        let serial = &*machine.devices.serial;
        let mut events = Vec::with_capacity(EVENTS);
        let mut is_ended = false;
        if self.serve_ready_source(serial) {
            return LoopEnd::TerminalEscape;
        }
        loop {
            // Once more after the end: what the guest sent before it, such as the exit status of a process, is served.
            let is_last = is_ended;
            let limit = if is_last { Some(Timespec { tv_sec: 0, tv_nsec: 0 }) } else { self.limit() };
            if !self.wait(&mut events, limit) {
                return LoopEnd::Stopped;
            }
            if events.is_empty() && self.retry && self.serve_input(serial, RETRY) {
                return LoopEnd::TerminalEscape;
            }
            self.serve_deadlines();
            self.finish_pause(vcpus);
            self.finish_snapshot(machine, vcpus);
            for event in &events {
                let data: EventData = event.data;
                match data.u64() {
                    _ if self.serve_device(event) => {}
                    VCPU_ENDED => is_ended = true,
                    STARTED => self.serve_doorbell(vcpus),
                    _ if is_last => {}
                    STOP => return LoopEnd::Stopped,
                    CONTROL if !self.serve_control(vcpus) => return LoopEnd::Stopped,
                    REQUESTS => self.accept_requests(),
                    data if data & REQUEST != 0 => self.serve_request(data, machine, vcpus),
                    MEMORY if self.has_lost_memory() => return LoopEnd::MemoryLost,
                    SOURCE | DRAINED if self.serve_input(serial, data.u64()) => {
                        return LoopEnd::TerminalEscape;
                    }
                    _ => {}
                }
            }
            if is_last {
                return LoopEnd::VcpuEnded;
            }
        }
    }

    /// Serves the devices until none has a request in flight, after the vCPUs have stopped; at most for this time.
    pub(crate) fn complete_requests(&mut self, limit: Duration) {
        let until = Instant::now().0.saturating_add(u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX));
        let mut events = Vec::with_capacity(EVENTS);
        while Instant::now().0 < until {
            self.devices.iter().for_each(|device| lock(device).give_back());
            if self.devices.iter().all(|device| lock(device).requests() == 0) {
                return;
            }
            if !self.wait(&mut events, Some(Timespec { tv_sec: 0, tv_nsec: 10_000_000 })) {
                return;
            }
            self.serve_deadlines();
            for event in &events {
                self.serve_device(event);
            }
        }
    }

    /// Waits for events, at most for this time. Returns whether the host can wait.
    fn wait(&self, events: &mut Vec<epoll::Event>, limit: Option<Timespec>) -> bool {
        events.clear();
        // epoll_wait fails only for invalid arguments; the loop must not spin in that case.
        matches!(
            epoll::wait(&self.epoll, rustix::buffer::spare_capacity(events), limit.as_ref()),
            Ok(_) | Err(Errno::INTR)
        )
    }

    /// The front, where it is another process.
    pub(crate) const fn control(&self) -> Option<&Control> {
        self.control.as_ref()
    }

    /// The inotify descriptor for changes of mapped files. Closing it waits for SRCU (`fsnotify_destroy_group` in
    /// fs/notify/group.c).
    pub(crate) fn changes(&self) -> Option<BorrowedFd<'_>> {
        self.changes.as_ref().map(AsFd::as_fd)
    }

    fn has_lost_memory(&self) -> bool {
        // The inotify events are not needed, because the files show their state.
        let mut inotify_events = [0; 4096];
        while self.changes.as_ref().is_some_and(|changes| read(changes, &mut inotify_events).is_ok()) {}
        self.files.iter().any(|file| file.is_truncated())
    }

    /// The timeout of the next wait.
    fn limit(&self) -> Option<Timespec> {
        let earliest = self.deadlines.iter().flatten().min();
        let until = earliest.map(|deadline| deadline.0.saturating_sub(Instant::now().0));
        let retry = self.retry.then_some(RETRY_INTERVAL);
        let waits = !self.pausing.is_empty() || self.is_saving;
        let kick = waits.then_some(u64::from(KICK_INTERVAL.subsec_nanos()));
        let nanoseconds = until.into_iter().chain(retry).chain(kick).min()?;
        let (seconds, rest) = (nanoseconds / 1_000_000_000, nanoseconds % 1_000_000_000);
        Some(Timespec { tv_sec: seconds.try_into().ok()?, tv_nsec: rest.try_into().ok()? })
    }

    /// Calls a device if the event is of one of its descriptors. Returns whether it is.
    fn serve_device(&mut self, event: &epoll::Event) -> bool {
        let data: EventData = event.data;
        let data = data.u64();
        let Some(device) = (data >> 32).checked_sub(1).and_then(|device| usize::try_from(device).ok()) else {
            return false;
        };
        let token = u32::try_from(data & u64::from(u32::MAX)).unwrap_or(u32::MAX);
        let mut transport = lock(&self.devices[device]);
        transport.serve(token, event.flags);
        self.deadlines[device] = transport.deadline();
        // A failure on a vCPU's thread is reported with the device's next event, or with the machine's end.
        if let Some(control) = self.control.as_ref().filter(|_| !self.reported[device]) {
            let failure = transport.failure();
            drop(transport);
            self.reported[device] = failure.is_some();
            failure.into_iter().for_each(|failure| control.send(&Event::DeviceFailed(failure)));
        }
        true
    }

    /// Calls the devices whose deadline has expired.
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

    /// A regular file causes no event, so that it is read before the first wait.
    fn serve_ready_source(&mut self, serial: &Mutex<SerialPort>) -> bool {
        let ready = self.input.as_ref().is_some_and(|input| input.state == SourceState::AlwaysReady);
        ready && self.serve_input(serial, DRAINED)
    }

    /// Moves input to the port; returns `true` when the user typed Ctrl-A x.
    fn serve_input(&mut self, serial: &Mutex<SerialPort>, event: u64) -> bool {
        let Some(input) = &mut self.input else { return false };
        if event == DRAINED {
            // The read only resets the counter.
            let _ = input.drained.read();
        }
        // A read of any other source could block.
        let readable = event == SOURCE || input.state == SourceState::AlwaysReady;
        let escaped = readable && input.accepts_more() && input.read_source();
        self.retry = input.enqueue(serial);
        self.update_source_watch();
        escaped
    }

    /// Watches the source exactly while the port has accepted all that was read.
    fn update_source_watch(&mut self) {
        let Some(input) = &mut self.input else { return };
        match (input.state, input.accepts_more()) {
            // Removed, not only masked: epoll reports a hangup even for an empty set of events.
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

fn watch(epoll: &OwnedFd, source: BorrowedFd<'_>, token: u64) -> Result<(), Errno> {
    epoll::add(epoll, source, EventData::new_u64(token), EventFlags::IN)
}
