//! The one socket between a front and its monitor, `kindling-vmm`: the front sends a configuration with everything open
//! that it names, and requests; the monitor sends events.
//!
//! Both ends are of one version and one machine, and a frame is one value in postcard's encoding ([`channel`]). The
//! front believes the monitor nothing: its guest may have taken it over. All that the monitor sends has a bound, and is
//! text, numbers and the kind of what happened.

mod channel;
mod front;
mod monitor;

pub use channel::ControlError;
pub use front::{Monitor, Stopper};
pub(crate) use monitor::Control;
pub use monitor::serve;

use crate::config::Config;
use crate::exit::Exit;
use crate::timeline::Timeline;
use serde::{Deserialize, Serialize};

/// What a front asks its monitor for.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) enum Request {
    /// Start the machine; the first request, and once.
    Start(Box<Start>),
    /// Stop it. So does the end of the socket.
    Stop,
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
    /// The file of the pre-booted kernel.
    Preboot,
    /// A file that the monitor holds a lock on as long as it lives, by which others know its process.
    Lock,
    /// Behind the next device that has a descriptor. A shared folder has two: its server's socket, and where its server
    /// says why it ends.
    Device,
}

/// What a monitor tells its front.
#[derive(Debug, Deserialize, Serialize)]
pub enum Event {
    /// The machine does not continue from its pre-booted kernel, for this reason, and boots.
    PrebootRefused(String),
    /// The guest's agent can be connected to.
    AgentReady,
    /// The machine has stopped. The last event.
    Stopped(Box<Exit>),
    /// The machine could not be built or started. The last event.
    Failed(Failure),
}

/// Why a monitor could not start a machine.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Failure {
    /// Whether asking for something else can help, rather than the host.
    pub is_users: bool,
    /// Whether it is for KVM.
    pub is_kvm: bool,
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
