//! The socket between a front and its monitor, `kindling-vmm`. The front sends a configuration with descriptors of all
//! files that it names, and then requests; the monitor sends events.
//!
//! Both ends have the same version and run on the same host. A frame is one value in postcard's encoding (`channel.rs`).
//! The front does not trust the monitor, because the guest may have taken it over: every event has a maximum length,
//! and contains only text, numbers and the kind of event.

pub(crate) mod channel;
mod front;
mod handle;
mod monitor;
mod requests;
mod waiting;

pub use channel::ControlError;
pub use front::{Endpoints, Monitor, PrebootDraft, Stopper};
pub(crate) use handle::{Asker, Control};
pub use monitor::serve;
pub(crate) use requests::PART_MAX;
pub use requests::{Receiver, Requester, listen};

use crate::config::Config;
use crate::devices::virtio::backend::BackendKind;
use crate::devices::virtio::balloon;
use crate::exit::Exit;
use crate::timeline::Timeline;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Exit status of a monitor whose front sent something that is no request.
pub const STATUS_INVALID_REQUEST: u8 = 125;

/// A request of a front to its monitor.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) enum Request {
    /// Start a machine. This, [`Self::Snapshot`], [`Self::Spare`] or [`Self::Preboot`] is the first request, and is sent once.
    Start(Box<Start>),
    /// Make a spare machine, and wait at most for this time at a socket for a front, which sends [`Self::Start`].
    Spare(Box<Start>, Duration),
    /// Start a machine, and when its guest has frozen its processes, write it to a file as a snapshot, and end.
    Snapshot(Box<Start>),
    /// Boot a kernel as far as init, and write it to a file from which later machines continue.
    Preboot(Box<Start>),
    /// Stop the machine. Closing the socket has the same effect, unless the front has detached.
    Stop,
    /// Set the target size of the balloon, in MiB.
    SetBalloon(u64),
    /// Do something and answer, with the same number.
    Query(u32, Query),
}

/// A request that is answered.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(crate) enum Query {
    /// Make all vCPUs leave the guest and wait. The host's side of the devices is still served.
    Pause,
    /// Let the vCPUs enter the guest again.
    Resume,
    /// Report statistics.
    Statistics,
    /// Take a snapshot when the guest has frozen its processes, and send it to the program that asked.
    Snapshot {
        /// Whether the machine stays paused then.
        pauses: bool,
    },
    /// Continue when the socket is closed. Descriptors are attached: the file for the exit status, and files whose locks
    /// the monitor keeps.
    Detach,
}

/// The answer to a query: pause, resume, statistics, snapshot or detach.
#[derive(Debug, Deserialize, Serialize)]
#[non_exhaustive]
pub enum Answer {
    /// It is done.
    Done,
    /// The statistics.
    Statistics(Box<Statistics>),
    /// It is not possible, for this reason.
    Refused(String),
}

/// A machine to start. Its descriptors are attached to the frame.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Start {
    /// The front's version.
    version: String,
    config: Config,
    /// The timeline so far, with the front's steps.
    timeline: Timeline,
    /// The roles of the descriptors, in the order of the descriptors.
    descriptors: Vec<Role>,
    /// The backends of the devices, in the order of the devices. They own the descriptors with [`Role::Device`].
    backends: Vec<BackendKind>,
}

/// The role of a descriptor.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(crate) enum Role {
    /// /dev/kvm.
    Kvm,
    /// The kernel's file.
    Kernel,
    /// The initrd's file.
    Initrd,
    /// The file of the pre-booted kernel, or of the snapshot from which the machine continues: read by [`Request::Start`],
    /// written by [`Request::Preboot`].
    Preboot,
    /// The file that [`Request::Snapshot`] writes.
    Snapshot,
    /// A file that the monitor locks until it exits. Other processes read the monitor's process ID from the lock.
    Lock,
    /// The socket at which a spare monitor waits for its front.
    Listener,
    /// The socket of requests of other programs.
    Requests,
    /// The standard error of a spare monitor from here on.
    Stderr,
    /// A descriptor of a device's backend.
    Device,
}

/// An event that a monitor sends to its front.
#[derive(Debug, Deserialize, Serialize)]
#[non_exhaustive]
pub enum Event {
    /// The machine boots instead of continuing from its pre-booted kernel, for this reason.
    PrebootRefused(String),
    /// The host lacks layers of the jail, without which the guest runs (`--jail best-effort`): a sentence.
    JailReduced(String),
    /// The pre-booted kernel is written, and its trial guests have ended successfully. The last event.
    Prebooted,
    /// The snapshot is written. The last event.
    Saved,
    /// The guest's agent accepts connections. The timeline contains the steps up to the first entry into the guest;
    /// [`Self::Stopped`] has the guest's own steps.
    Started(Timeline),
    /// The answer to the query of this number.
    Answer(u32, Answer),
    /// A device has failed, for this reason. Each device is reported at most once.
    DeviceFailed(String),
    /// The machine has stopped. The last event.
    Stopped(Box<Exit>),
    /// The machine could not be built or started. The last event.
    Failed(Failure),
}

/// Statistics of a running machine.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Statistics {
    /// Whether all vCPUs are paused.
    pub is_paused: bool,
    /// The balloon, if the machine has one.
    pub balloon: Option<BalloonStatistics>,
    /// A sentence for each device that has failed.
    pub device_failures: Vec<String>,
}

/// The balloon of a running machine.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct BalloonStatistics {
    /// Requested size in MiB.
    pub target_mib: u64,
    /// Size in MiB that the guest reports.
    pub actual_mib: u64,
    /// Memory statistics that the guest reports, if the balloon polls them.
    pub guest: balloon::Statistics,
}

/// The error of a monitor that could not build or start a machine.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Failure {
    /// Whether the user can fix the error, see [`crate::Error::is_user_error`].
    pub is_user_error: bool,
    /// Whether KVM is the cause.
    pub is_kvm_error: bool,
    /// Whether the host lacks a layer of the jail.
    pub is_jail_error: bool,
    /// Whether restoring the pre-booted kernel, or the use of a spare machine, failed; another start may succeed.
    pub is_restore_error: bool,
    /// The error and its sources, on one line.
    pub message: String,
}

/// The version of the protocol, which depends on the sources of this package (build.rs).
pub const PROTOCOL: &str = env!("KINDLING_PROTOCOL");

/// Maximum size of a request in bytes: arguments and environment have at most 2 MiB, and the rest of a configuration is
/// small.
const REQUEST_MAX: usize = 4 << 20;
/// Maximum size of an event in bytes. The largest is [`Event::Stopped`], which includes 20 lines of the console.
/// Decoded, an event takes at most 20 times as much memory.
const EVENT_MAX: usize = 256 << 10;

/// Decodes bytes as a request and as an event, as received over the socket.
#[cfg(fuzzing)]
pub fn decode(bytes: &[u8]) {
    let _ = postcard::from_bytes::<Request>(bytes);
    let _ = postcard::from_bytes::<Event>(bytes);
    let _ = requests::query_of(bytes);
    let _ = postcard::from_bytes::<Answer>(bytes);
}
