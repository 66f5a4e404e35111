//! Guests that run a command for the calling process, as `docker run` does: the process forwards its streams and signals, and
//! gets the exit status. [`Guest::builder`](crate::Guest::builder) starts guests without a command.
//!
//! ```no_run
//! use kindling::attach::{SignalSource, Streams};
//! use kindling::foreground::Foreground;
//! use kindling::launch::{self, LaunchError, LaunchOptions};
//! use kindling::timeline::{Instant, Timeline};
//!
//! fn run(options: &LaunchOptions, signals: &mut dyn SignalSource, streams: Streams) -> Result<u8, LaunchError> {
//!     let timeline = Timeline::starting_at(Instant::now());
//!     // The monitor starts while this process prepares the guest.
//!     let monitor = launch::spawn_monitor()?;
//!     let image = kindling::image::prepare(&options.image, None, "missing")?;
//!     let guest = kindling::guest::GuestDir::create(None)?;
//!     let run = || {
//!         let notify = std::sync::Arc::new(|message: &str| eprintln!("{message}"));
//!         let mut foreground = Foreground::new(options, &guest, &image, signals, notify)?;
//!         foreground.preboot(&mut |cause| {
//!             guest.forget();
//!             std::process::exit(cause.status().into());
//!         })?;
//!         let serve = |attachment: &mut kindling::attach::Attachment<'_>, process| attachment.serve(process, streams);
//!         Ok(foreground.run(Some(monitor), &timeline, serve)?.status())
//!     };
//!     let result = run();
//!     // Also after an error.
//!     guest.remove();
//!     result
//! }
//! ```

mod outcome;

pub use crate::launch::start::MachineEnd;
pub use kindling_vmm::control::ControlError;
pub use kindling_vmm::{Exit, ExitReason};
pub use outcome::Outcome;

use crate::attach::{Attachment, Notify, SignalSource, StopCause};
use crate::guest::GuestDir;
use crate::image::Prepared;
use crate::launch::{Launch, LaunchError, LaunchOptions, StartObserver, Started, end_of};
use kindling_vmm::Timeline;
use kindling_vmm::agent::{AgentError, Process};
use kindling_vmm::control::{Event, Monitor, Stopper};
use std::cell::{Cell, RefCell};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A guest with a command in the foreground. Dropping it stops the machine, if it still runs, and waits for the monitor.
pub struct Foreground<'a> {
    launch: Launch<'a>,
    signals: &'a mut dyn SignalSource,
    notify: Notify,
    /// Time after which [`Self::run`] stops the guest. `None` by default.
    pub timeout: Option<Duration>,
    /// Whether [`Self::run`] waits for the end of the machine even if it has no effect on the outcome. `false` by default.
    pub waits_for_machine: bool,
    /// Whether no program waits for the command, so that [`Self::run`] starts the spare monitor for the next guest with this one,
    /// if the guest uses spares. `false` by default.
    pub is_detached: bool,
}

impl fmt::Debug for Foreground<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Foreground").field("launch", &self.launch).finish_non_exhaustive()
    }
}

impl<'a> Foreground<'a> {
    /// Creates the configuration of a guest and its missing volumes, and opens the files of its devices. The signals must be
    /// blocked already: threads and processes that are started for the guest must not receive them.
    ///
    /// # Errors
    /// When an option is invalid, the kernel is missing, or a volume, network or folder cannot be used.
    pub fn new(
        options: &LaunchOptions,
        guest: &'a GuestDir,
        prepared: &Prepared,
        signals: &'a mut dyn SignalSource,
        notify: Notify,
    ) -> Result<Self, LaunchError> {
        let launch = Launch::new(options, guest, prepared)?;
        Ok(Self { launch, signals, notify, timeout: None, waits_for_machine: false, is_detached: false })
    }

    /// Writes the guest's record, by which other processes find the guest, and pre-boots the kernel, unless a pre-booted one
    /// exists. If that fails, the guest boots its kernel. `stop` is called for a signal that ends the guest: it ends the
    /// process after [`GuestDir::forget`], or the signal is lost.
    ///
    /// # Errors
    /// When the record cannot be written, other users can change the cache of kernels, or KVM cannot be used.
    pub fn preboot(&mut self, stop: &mut dyn FnMut(StopCause)) -> Result<(), LaunchError> {
        let Self { launch, signals, notify, .. } = self;
        let mut attachment = Attachment::new(&mut **signals, stop, notify.clone());
        launch.preboot(&**notify, |monitor| attachment.event(monitor))
    }

    /// Runs the machine in its monitor, which [`spawn_monitor`](crate::launch::spawn_monitor) has started, or else in a spare
    /// or new one. `serve` is called
    /// with the guest's command once the guest runs, and returns the exit status: [`Attachment::serve`]. Returns when command
    /// and machine have ended, or when the command has succeeded and the end of the machine need not be waited for.
    ///
    /// # Errors
    /// When a file cannot be opened, or the monitor cannot build the machine.
    pub fn run(
        self,
        monitor: Option<Monitor>,
        timeline: &Timeline,
        serve: impl FnOnce(&mut Attachment<'_>, Process) -> Result<u8, AgentError>,
    ) -> Result<Outcome, LaunchError> {
        let Self { mut launch, signals, notify, timeout, waits_for_machine, is_detached } = self;
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let (stopper, stopped_by) = (RefCell::new(None), Cell::new(None));
        let mut stop = |cause| {
            stopped_by.set(Some(cause));
            stopper.borrow().iter().for_each(Stopper::stop);
        };
        let mut attachment = Attachment::new(signals, &mut stop, Arc::clone(&notify));
        attachment.set_deadline(deadline);
        let mut start = Start { attachment: &mut attachment, stopper: &stopper, stopped_by: &stopped_by };
        let monitor = monitor.map_or_else(|| launch.new_monitor(), Ok)?;
        let mut machine = match launch.start(monitor, timeline, &*notify, &mut start)? {
            Started::Running(_) => None,
            Started::Ended(end) => Some(end),
        };
        if is_detached && let Some(spare) = launch.next_spare() {
            spare.start();
        }
        let command = match &machine {
            None => {
                Process::payload(&launch.guest.socket()).and_then(|process| serve(&mut attachment, process))
            }
            Some(_) => Err(AgentError::Lost),
        };
        let is_private = launch.config.devices.are_private();
        if matches!(command, Ok(0)) && !waits_for_machine && is_private {
            // The output is delivered, and the machine has no disk, folder or network that must be left consistent.
            if let Some(monitor) = launch.monitor.take() {
                report_failures_so_far(&monitor, &notify);
                monitor.forget();
            }
            let spare = launch.next_spare();
            return Ok(Outcome { machine: None, command, stopped_by: stopped_by.get(), spare });
        }
        if let (Err(error), None) = (&command, &machine) {
            attachment.abandon(error);
        }
        while let (None, Some(monitor)) = (&machine, &launch.monitor) {
            machine = end_of(attachment.event(monitor), &*notify)?;
        }
        if matches!(machine, Some(MachineEnd::Stopped(_))) && is_private {
            launch.monitor.take().into_iter().for_each(Monitor::forget);
        }
        let spare = launch.next_spare();
        Ok(Outcome { machine, command, stopped_by: stopped_by.get(), spare })
    }
}

/// Forwards signals while the guest starts.
struct Start<'a, 'b> {
    attachment: &'a mut Attachment<'b>,
    /// Stops the machine.
    stopper: &'a RefCell<Option<Stopper>>,
    stopped_by: &'a Cell<Option<StopCause>>,
}

impl StartObserver for Start<'_, '_> {
    fn starting(&mut self, monitor: &Monitor) -> Result<(), LaunchError> {
        let stopper = monitor.stopper().map_err(|error| LaunchError::Host("duplicate a socket", error))?;
        self.stopper.replace(Some(stopper));
        Ok(())
    }

    fn next_event(&mut self, monitor: &Monitor) -> Result<Event, ControlError> {
        match self.attachment.event(monitor) {
            // A guest that was stopped is not started a second time.
            Ok(Event::Failed(failure)) if failure.is_restore_error && self.stopped_by.get().is_some() => {
                Err(ControlError::Ended)
            }
            Err(ControlError::Disconnected | ControlError::Version) if self.stopped_by.get().is_some() => {
                Err(ControlError::Ended)
            }
            event => event,
        }
    }
}

/// Reports the failures of devices that have arrived.
fn report_failures_so_far(monitor: &Monitor, notify: &Notify) {
    while let Ok(Some(event)) = monitor.event_before(Instant::now()) {
        match event {
            Event::DeviceFailed(failure) => notify(&failure),
            Event::Stopped(_) | Event::Failed(_) => return,
            _ => {}
        }
    }
}
