//! The one socket between a front and its monitor, `kindling-vmm`: the front sends a configuration with everything open
//! that it names, and requests; the monitor sends events.
//!
//! Both ends are of one version and one machine, and a frame is one value in postcard's encoding ([`channel`]). The
//! front believes the monitor nothing: its guest may have taken it over. All that the monitor sends has a bound, and is
//! text, numbers and the kind of what happened.

pub(crate) mod channel;
mod front;
mod handle;
mod monitor;

pub use channel::ControlError;
pub use front::{Monitor, PrebootDraft, Stopper};
pub(crate) use handle::Control;
pub use monitor::serve;

use crate::config::Config;
use crate::devices::virtio::balloon;
use crate::exit::Exit;
use crate::timeline::Timeline;
use serde::{Deserialize, Serialize};

/// What a front asks its monitor for.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) enum Request {
    /// Start a machine. This or [`Self::Preboot`] is the first request, and is sent once.
    Start(Box<Start>),
    /// Boot a kernel as far as init, and write it to a file from which later machines continue.
    Preboot(Box<Start>),
    /// Stop the machine. So does the end of the socket, unless the machine is detached.
    Stop,
    /// Make all vCPUs leave the guest and wait. Devices still serve the host's side.
    Pause,
    /// Let the vCPUs enter the guest again.
    Resume,
    /// Report statistics.
    Statistics,
    /// Run on when the socket ends. Two descriptors come with it: a file whose lock the front holds, and the file for the
    /// exit status.
    Detach,
    /// Make the balloon this many MiB large.
    SetBalloon(u64),
}

/// A machine to start. Its descriptors come with the frame.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Start {
    /// The front's version.
    version: String,
    config: Config,
    /// The front's part of the timeline.
    timeline: Timeline,
    /// What the descriptors are, in their order.
    descriptors: Vec<Role>,
}

/// What a descriptor is for.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(crate) enum Role {
    /// /dev/kvm.
    Kvm,
    /// The file of the kernel.
    Kernel,
    /// The file of the initrd.
    Initrd,
    /// The file of the pre-booted kernel: to continue from, or to write to.
    Preboot,
    /// A file that the monitor holds a lock on as long as it lives, by which others know its process.
    Lock,
    /// Behind the next device that has a descriptor. A shared folder has two: its server's socket, and where its server
    /// says why it ends.
    Device,
}

/// What a monitor tells its front.
#[derive(Debug, Deserialize, Serialize)]
#[non_exhaustive]
pub enum Event {
    /// The machine does not continue from its pre-booted kernel, for this reason, and boots.
    PrebootRefused(String),
    /// The pre-booted kernel is written, and guests have continued from it. The last event.
    Prebooted,
    /// The guest's agent accepts connections. The timeline has the steps up to the first entry into the guest; the
    /// guest's own steps come with [`Self::Stopped`].
    Started(Timeline),
    /// All vCPUs have left the guest.
    Paused,
    /// The vCPUs may enter the guest again.
    Resumed,
    /// The answer to a request for statistics.
    Statistics(Box<Statistics>),
    /// A device has failed, and why; each device fails once at most.
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
    /// Whether all vCPUs wait outside the guest.
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
    /// Memory statistics that the guest reports, where the balloon polls them.
    pub guest: balloon::Statistics,
}

/// Why a monitor could not start a machine.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Failure {
    /// Whether asking for something else can help, rather than the host.
    pub is_users: bool,
    /// Whether it is for KVM.
    pub is_kvm: bool,
    /// Whether the machine could not continue from its pre-booted kernel: booting may work.
    pub is_preboot: bool,
    /// The error and what led to it.
    pub message: String,
}

/// Bytes of a request: arguments and environment have 2 MiB, and the rest of a configuration is small.
const REQUEST_MAX: usize = 4 << 20;
/// Bytes of an event: what a guest's end is described with, 20 lines of its console among it. In this process's memory it
/// becomes 20 times as large at most.
const EVENT_MAX: usize = 256 << 10;

/// Takes bytes for a request and for an event, as they would come over the socket.
#[cfg(fuzzing)]
pub fn decode(bytes: &[u8]) {
    let _ = postcard::from_bytes::<Request>(bytes);
    let _ = postcard::from_bytes::<Event>(bytes);
}
