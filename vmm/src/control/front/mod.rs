//! The front's end of the socket: starts the monitor, sends requests and receives events.

mod events;
mod process;

use super::channel::Channel;
use super::{
    Answer, ControlError, Event, PROTOCOL, Query, REQUEST_MAX, Request, Role, STATUS_INVALID_REQUEST, Start,
    Statistics, waiting,
};
use crate::bus::lock;
use crate::config::Config;
use crate::devices::virtio::backend::Kept;
use crate::error::Error;
use crate::jail::{self, Cgroup, CgroupError, CgroupLimits, STATUS_REFUSED};
use crate::kvm::Hypervisor;
use crate::layout;
use crate::poll::wait_readable;
use crate::preboot::destination::Destination;
use crate::preboot::error::PrebootError;
use crate::preboot::{capture, verified};
use crate::resources::Resources;
use crate::timeline::Timeline;
use events::Events;
use process::{End, Process};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Timeout for the rest of a frame whose first byte has arrived.
const FRAME_TIMEOUT: Duration = Duration::from_secs(1);

/// A monitor: a process `kindling-vmm`. Dropping it stops its machine and waits for the process.
#[derive(Debug)]
pub struct Monitor {
    channel: Channel,
    /// `None` when the process is left to a thread that reaps it.
    process: Mutex<Option<Process>>,
    /// What the devices' backends need in this process.
    kept: Kept,
    events: Mutex<Events>,
    is_detached: bool,
    /// Removed after the process has ended.
    cgroup: Option<Cgroup>,
    /// What a spare monitor gets as its standard error.
    stderr: Option<OwnedFd>,
}

/// How other programs find a monitor.
#[derive(Debug, Default)]
pub struct Endpoints {
    /// A file that the monitor locks while it lives: fcntl(2) returns the process ID of the lock's owner.
    pub lock: Option<OwnedFd>,
    /// The socket of [`listen`](super::listen).
    pub requests: Option<OwnedFd>,
}

impl Monitor {
    /// Starts the process, which waits for its first request.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub fn spawn(program: &Path) -> io::Result<Self> {
        let (ours, its) = UnixStream::pair()?;
        let process = Command::new(program)
            .stdin(OwnedFd::from(its))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .env_clear()
            .current_dir("/")
            .spawn()?;
        Ok(Self::with(ours, Process::Child(process), None))
    }

    fn with(socket: UnixStream, process: Process, stderr: Option<OwnedFd>) -> Self {
        Self {
            channel: Channel::with_frame_timeout(socket, FRAME_TIMEOUT),
            process: Mutex::new(Some(process)),
            kept: Kept::default(),
            events: Mutex::default(),
            is_detached: false,
            cgroup: None,
            stderr,
        }
    }

    /// Takes the spare monitor of this name. Returns `None` if there is none, or another process has taken it.
    #[must_use]
    #[inline(never)]
    pub fn take_spare(name: &str) -> Option<Self> {
        let stream = waiting::take(name)?;
        let (stderr, its_stderr) = io::pipe().ok()?;
        let process = Process::of_peer(&stream, stderr).ok()?;
        Some(Self::with(stream, process, Some(its_stderr.into())))
    }

    /// Starts a spare monitor of this name, unless it exists. It waits for a front with this configuration of machine, boot
    /// source, devices and jail, at most for the time `idle`. If it cannot build the machine, it ends, and reports nothing. It does
    /// not end with this process; it is returned to be reaped.
    ///
    /// # Errors
    /// When the process cannot be started, or a file of the machine cannot be opened.
    #[inline(never)]
    pub fn spawn_spare(
        program: &Path,
        config: &Config,
        name: &str,
        idle: Duration,
    ) -> Result<Option<Child>, Error> {
        let socket = waiting::socket(name).map_err(Error::host("create a socket"))?;
        let Some(socket) = socket else { return Ok(None) };
        let mut config = capture::configuration(config);
        let mut resources = Resources::open_for_spare(&config)?;
        resources.open_boot_files(&mut config)?;
        let mut monitor = Self::spawn(program).map_err(Error::host("execute kindling-vmm"))?;
        let timeline = Timeline::starting_at(crate::timeline::Instant::now());
        let descriptors = [(Role::Listener, Some(socket))];
        monitor.send_start(&config, resources, descriptors, timeline, |start| Request::Spare(start, idle))?;
        // It has no front: the socket is closed.
        monitor.is_detached = true;
        match lock(&monitor.process).take() {
            Some(Process::Child(child)) => Ok(Some(child)),
            _ => Err(Error::from(ControlError::Disconnected)),
        }
    }

    /// Whether this is a spare monitor, whose machine is built already: it needs only the resources of the devices.
    #[must_use]
    pub const fn is_spare(&self) -> bool {
        self.stderr.is_some()
    }

    /// Limits the process by a cgroup of its own, which is removed at its end. `name` becomes a part of the cgroup's name.
    ///
    /// # Errors
    /// When no cgroup is delegated to the user, or the kernel refuses a limit.
    pub fn limit(&mut self, limits: &CgroupLimits, name: &str) -> Result<(), CgroupError> {
        if let Some(process) = &*lock(&self.process) {
            self.cgroup = Some(Cgroup::create(limits, name, process.id())?);
        }
        Ok(())
    }

    /// Starts a machine with opened resources. [`Event::Started`], [`Event::Stopped`] or [`Event::Failed`] follows.
    ///
    /// # Errors
    /// When a process that was started for a device fails, the host has no descriptor left, or the monitor has exited.
    pub fn start(
        &mut self,
        config: &Config,
        resources: Resources,
        endpoints: Endpoints,
        timeline: Timeline,
    ) -> Result<(), Error> {
        let stderr = self.stderr.as_ref().map(OwnedFd::try_clone).transpose();
        let stderr = stderr.map_err(Error::host("duplicate a descriptor"))?;
        let Endpoints { lock, requests } = endpoints;
        let descriptors = [(Role::Lock, lock), (Role::Requests, requests), (Role::Stderr, stderr)];
        self.send_start(config, resources, descriptors, timeline, Request::Start)
    }

    /// Starts a machine as [`Self::start`] does, and takes a snapshot: when the guest has frozen its processes
    /// ([`crate::agent::Process::freeze`]), its state is written to `file`, and the machine ends. [`Event::Started`] follows, then
    /// [`Event::Saved`] or [`Event::Failed`].
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_for_snapshot(
        &mut self,
        config: &Config,
        resources: Resources,
        endpoints: Endpoints,
        timeline: Timeline,
        file: File,
    ) -> Result<(), Error> {
        let Endpoints { lock, requests } = endpoints;
        let file = (Role::Snapshot, Some(file.into()));
        let descriptors = [(Role::Lock, lock), (Role::Requests, requests), file];
        self.send_start(config, resources, descriptors, timeline, Request::Snapshot)
    }

    /// Pre-boots a kernel for the machines of a configuration, and runs trial guests from it. The console, the payload
    /// and the contents of the disks are not used. The digests of kernel and initrd are compared with the image's
    /// first, and the compared copies are booted. [`Event::Prebooted`] or [`Event::Failed`] follows. The monitor ends with
    /// the thread that called [`Self::spawn`].
    ///
    /// # Errors
    /// When kernel or initrd do not match the image's digests, a file cannot be opened or created, or the monitor has
    /// exited.
    pub fn start_preboot(&mut self, config: &Config, path: &Path) -> Result<PrebootDraft, Error> {
        config.validate()?;
        let config = Config { preboot: Some(path.into()), ..capture::configuration(config) };
        let digests = config.boot_source.image_digests.as_ref().ok_or(PrebootError::NotAnImage)?;
        // A kernel or initrd that is larger than guest memory cannot be booted, and is not read to its end.
        let max = config.machine.mem_size_mib.saturating_mul(layout::MIB);
        let boot = verified::read(&config.boot_source, digests, max)?;
        let failed = |source| PrebootError::Write { path: path.into(), source };
        let destination = Destination::open(path).map_err(failed)?;
        let file = destination.create_unnamed_file().map_err(failed)?;
        let copy = file.try_clone().map_err(failed)?;
        let kvm = Some(Hypervisor::open_descriptor()?);
        let resources = Resources::open_placeholders(&config)?;
        let resources = Resources { kvm, boot: Some(boot), preboot: Some(copy), ..resources };
        let timeline = Timeline::starting_at(crate::timeline::Instant::now());
        self.send_start(&config, resources, [], timeline, Request::Preboot)?;
        Ok(PrebootDraft { destination, file, path: path.into() })
    }

    fn send_start(
        &mut self,
        config: &Config,
        resources: Resources,
        others: impl IntoIterator<Item = (Role, Option<OwnedFd>)>,
        timeline: Timeline,
        request: impl FnOnce(Box<Start>) -> Request,
    ) -> Result<(), Error> {
        let Resources { kvm, boot, preboot, backends } = resources;
        let (mut roles, mut descriptors) = (Vec::new(), Vec::new());
        let mut add = |role, descriptor: Option<OwnedFd>| {
            if let Some(descriptor) = descriptor {
                roles.push(role);
                descriptors.push(descriptor);
            }
        };
        add(Role::Kvm, kvm);
        if let Some(boot) = boot {
            add(Role::Kernel, Some(boot.kernel.into()));
            add(Role::Initrd, boot.initrd.map(Into::into));
        }
        add(Role::Preboot, preboot.map(Into::into));
        others.into_iter().for_each(|(role, descriptor)| add(role, descriptor));
        let mut kinds = Vec::new();
        for backend in backends {
            let (kind, sent) = backend.send(&mut self.kept)?;
            sent.into_iter().for_each(|descriptor| add(Role::Device, Some(descriptor)));
            kinds.push(kind);
        }
        let start = Start {
            version: PROTOCOL.to_owned(),
            config: config.clone(),
            timeline,
            descriptors: roles,
            backends: kinds,
        };
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        Ok(self.channel.send(&request(Box::new(start)), REQUEST_MAX, &descriptors)?)
    }

    /// Stops the machine; [`Event::Stopped`] follows. Has no effect if the monitor has exited.
    pub fn stop(&self) {
        let _ = self.channel.try_send(&Request::Stop, REQUEST_MAX, &[]);
    }

    /// Sets the target size of the guest's balloon, if there is one.
    pub fn set_balloon(&self, mib: u64) {
        let _ = self.channel.try_send(&Request::SetBalloon(mib), REQUEST_MAX, &[]);
    }

    /// Pauses all vCPUs, and waits until they have left the guest. The host's side of the devices is still served:
    /// connections to the guest are accepted, and wait for the guest.
    ///
    /// # Errors
    /// When the monitor does not answer before `until`, or has exited.
    pub fn pause(&self, until: Instant) -> Result<(), ControlError> {
        self.query(Query::Pause, &[], until).map(drop)
    }

    /// Resumes paused vCPUs.
    ///
    /// # Errors
    /// As [`Self::pause`].
    pub fn resume(&self, until: Instant) -> Result<(), ControlError> {
        self.query(Query::Resume, &[], until).map(drop)
    }

    /// Requests the statistics of the machine.
    ///
    /// # Errors
    /// As [`Self::pause`].
    pub fn statistics(&self, until: Instant) -> Result<Statistics, ControlError> {
        match self.query(Query::Statistics, &[], until)? {
            Answer::Statistics(statistics) => Ok(*statistics),
            _ => Err(ControlError::Version),
        }
    }

    /// Detaches from the machine, which continues when this is dropped, and after this process has exited. The monitor
    /// writes the exit status to the beginning of `status`, in decimal digits, and keeps the files in `kept` open, whose
    /// flock(2) locks show that the guest runs. A thread of this process reaps the monitor.
    ///
    /// # Errors
    /// When the machine has ended, or the monitor does not answer before `until`.
    pub fn detach(
        &mut self,
        status: BorrowedFd<'_>,
        kept: &[BorrowedFd<'_>],
        until: Instant,
    ) -> Result<(), ControlError> {
        self.query(Query::Detach, &[&[status], kept].concat(), until)?;
        self.is_detached = true;
        Ok(())
    }

    /// Drops the handle without waiting for the monitor, for a front that exits now. The machine stops, if it still
    /// runs, when the exit closes the socket. A monitor with a cgroup is waited for.
    pub fn forget(mut self) {
        if self.cgroup.is_some() {
            return;
        }
        // The monitor is not killed: it still delivers what the guest sent to other programs before its end. The servers of
        // shared folders exit with it; waiting for them is not necessary.
        self.kept.sockets.clear();
        std::mem::forget(self);
    }

    /// Creates a handle that stops the machine from another thread.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn stopper(&self) -> io::Result<Stopper> {
        self.channel.try_clone().map(Stopper)
    }

    /// Waits for the next event. The descriptor of [`AsFd`] is readable when an event arrives.
    ///
    /// # Errors
    /// When the monitor has exited, or sends an invalid event.
    pub fn next_event(&self) -> Result<Event, ControlError> {
        self.event(None).and_then(|event| event.ok_or(ControlError::Timeout))
    }

    /// Waits for an event until a time. Returns `None` if none has arrived.
    ///
    /// # Errors
    /// As [`Self::next_event`].
    pub fn event_before(&self, until: Instant) -> Result<Option<Event>, ControlError> {
        self.event(Some(until))
    }

    /// Waits for an event. The lock of the events is not held during the wait, so that queries of other threads are answered.
    fn event(&self, until: Option<Instant>) -> Result<Option<Event>, ControlError> {
        loop {
            let mut events = lock(&self.events);
            if let Some(event) = events.pop() {
                return Ok(Some(event));
            }
            if wait_readable(self.channel.as_fd(), Some(Instant::now()))? {
                match self.receive(&mut events)? {
                    // The answer to a query whose wait has timed out.
                    Event::Answer(..) => continue,
                    event => return Ok(Some(event)),
                }
            }
            drop(events);
            if !wait_readable(self.channel.as_fd(), until)? {
                return Ok(None);
            }
        }
    }

    /// Sends a query and waits for its answer. Other events are queued for [`Self::next_event`].
    fn query(
        &self,
        query: Query,
        descriptors: &[BorrowedFd<'_>],
        until: Instant,
    ) -> Result<Answer, ControlError> {
        let mut events = lock(&self.events);
        if events.is_over() {
            return Err(ControlError::Ended);
        }
        let number = events.new_query();
        self.channel.try_send(&Request::Query(number, query), REQUEST_MAX, descriptors)?;
        while wait_readable(self.channel.as_fd(), Some(until))? {
            match self.receive(&mut events)? {
                Event::Answer(answered, answer) if answered == number => return Ok(answer),
                // The answer to an earlier query whose wait has timed out.
                Event::Answer(..) => {}
                event => events.push(event),
            }
            if events.is_over() {
                return Err(ControlError::Ended);
            }
        }
        Err(ControlError::Timeout)
    }

    fn receive(&self, events: &mut Events) -> Result<Event, ControlError> {
        match events.receive(&self.channel) {
            Err(ControlError::Disconnected) => Err(self.exit_cause()),
            result => result,
        }
    }

    /// Why a monitor has closed its socket, from its exit status.
    fn exit_cause(&self) -> ControlError {
        let mut process = lock(&self.process);
        let Some(end) = process.as_mut().and_then(Process::wait_or_kill) else {
            return ControlError::StopTimeout;
        };
        let status = match end {
            End::Exited(status) => Some(status),
            End::Unknown => None,
        };
        let code = status.and_then(|status| status.code());
        if code == Some(STATUS_INVALID_REQUEST.into()) {
            return ControlError::Version;
        }
        let last_line = process.as_mut().and_then(Process::last_stderr_line);
        if let Some(call) = last_line.as_deref().and_then(jail::describe)
            && (status.is_none() || code == Some(STATUS_REFUSED.into()))
        {
            return ControlError::Refused(call);
        }
        match (status.and_then(|status| status.signal()), last_line) {
            (_, Some(line)) => ControlError::Crashed(line),
            (Some(signal), None) => ControlError::Killed(signal),
            (None, None) => ControlError::Disconnected,
        }
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let process = lock(&self.process).take();
        if self.is_detached {
            let servers = std::mem::take(&mut self.kept).release().into_iter().map(Process::Child);
            reap(process.into_iter().chain(servers).collect(), self.cgroup.take());
            return;
        }
        self.kept.sockets.clear();
        let _ = self.channel.shut_down();
        process.map(|mut process| process.wait_or_kill());
    }
}

/// Waits for the exit of child processes that end by themselves, in a thread, and removes their cgroup.
fn reap(processes: Vec<Process>, cgroup: Option<Cgroup>) {
    if processes.is_empty() && cgroup.is_none() {
        return;
    }
    let wait = move || {
        processes.into_iter().for_each(Process::wait);
        drop(cgroup);
    };
    // Without a thread they stay zombies until this process exits.
    let _ = std::thread::Builder::new().name("reaper".to_owned()).spawn(wait);
}

/// Stops the machine of a monitor.
#[derive(Debug)]
pub struct Stopper(Channel);

impl Stopper {
    /// As [`Monitor::stop`].
    pub fn stop(&self) {
        let _ = self.0.try_send(&Request::Stop, REQUEST_MAX, &[]);
    }
}

/// A pre-booted kernel that a monitor writes. Its file has no name before it is published: if the draft is dropped, the
/// kernel deletes the file.
#[must_use = "the file appears with `publish`"]
#[derive(Debug)]
pub struct PrebootDraft {
    destination: Destination,
    file: File,
    path: PathBuf,
}

impl PrebootDraft {
    /// Syncs the file and gives it its name, after [`Event::Prebooted`].
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn publish(self) -> Result<(), Error> {
        let failed = |source| PrebootError::Write { path: self.path.clone(), source };
        Ok(self.destination.publish(&self.file).map_err(failed)?)
    }
}
