//! A KVM virtual machine monitor that boots Linux microVMs within milliseconds.
//!
//! A boot is a chain of types: a [`Config`] describes a machine, a [`Machine`] is built and does not run yet,
//! [`Running`] is the machine with its threads, and an [`Exit`] is the result.
//!
//! ```no_run
//! use kindling_vmm::{Config, Machine, Timeline};
//! use kindling_vmm::config::{BootSource, MachineConfig};
//!
//! # fn main() -> Result<(), kindling_vmm::Error> {
//! let mut config = Config::new(BootSource::kernel("vmlinux"));
//! config.machine = MachineConfig { vcpu_count: 2, mem_size_mib: 256 };
//! let timeline = Timeline::starting_at(kindling_vmm::Instant::now());
//! let exit = Machine::new(&config, timeline)?.start()?.wait();
//! assert_eq!(exit.reason, kindling_vmm::ExitReason::Payload(0));
//! # Ok(())
//! # }
//! ```

pub mod agent;
mod attach;
mod bus;
pub mod config;
pub mod control;
pub mod entry;
mod error;
mod event_loop;
mod exit;
pub mod function_marks;
pub mod host;
mod input;
pub mod jail;
mod kvm;
pub mod layout;
mod machine;
pub mod poll;
pub mod preboot;
mod profile;
mod resources;
mod running;
mod spare;
mod start_latch;
mod timeline;
mod vcpu_threads;

// Public for the fuzz targets, which call the code that parses the input of guests and files.
#[cfg(fuzzing)]
pub mod boot;
#[cfg(not(fuzzing))]
mod boot;
#[cfg(fuzzing)]
pub mod devices;
#[cfg(not(fuzzing))]
mod devices;
#[cfg(fuzzing)]
pub mod memory;
#[cfg(not(fuzzing))]
mod memory;

pub use boot::elf::Elf;
pub use bus::{BusDevice, GuestRequest};
pub use config::{Config, ProfileConfig};
pub use devices::virtio::{BackendError, balloon};
pub use error::{Error, with_causes};
pub use exit::{Exit, ExitReason};
pub use guest_protocol::BootMark;
pub use kvm::{ExitCounts, KvmError, Registers, probe};
pub use machine::Machine;
pub use memory::BackingFile;
pub use profile::{ExitKind, ExitRecord, FunctionMark, Profile, Sample};
pub use resources::Resources;
pub use running::{Running, StopHandle, StoppedMachine};
pub use timeline::{Instant, Step, Timeline};
