//! Container images in microVMs: images, named guests, processes in guests, and volumes.
//!
//! A guest is a running virtual machine with its own Linux kernel. [`Image::open`] prepares a container image,
//! [`Guest::builder`] starts a guest from it, and [`Guest::command`] runs processes in the guest, with the API of
//! [`std::process`]:
//!
//! ```no_run
//! use kindling::{Guest, Image};
//!
//! let guest = Guest::builder(Image::open("python.tar")?).memory_mib(256).start()?;
//! let output = guest.command("python3").args(["-c", "print(1)"]).output()?;
//! assert_eq!(output.stdout, b"1\n");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The command `kindling` uses only this library. The virtual machine monitor below it is [`vmm`].

pub mod attach;
mod builder;
pub mod command;
mod converter;
pub mod copy;
mod data;
mod environment;
pub mod exec;
pub mod foreground;
pub mod guest;
pub mod image;
pub mod installation;
pub mod kernel;
pub mod launch;
pub mod log;
mod mount;
pub mod network;
pub mod signal;
pub mod size;
pub mod snapshot;
pub mod template;
pub mod volume;

pub use builder::GuestBuilder;
pub use command::{Child, Command, ExitStatus, Output, Stdio};
pub use environment::EnvironmentError;
pub use guest::{Guest, guests};
pub use guest_protocol::agent::TerminalSize;
pub use image::{Image, PullPolicy};
pub use kindling_vmm as vmm;
pub use kindling_vmm::{entry, with_causes};
pub use mount::MountError;
pub use template::Template;

/// The times of the steps of a start.
pub mod timeline {
    pub use kindling_vmm::{Instant, Step, Timeline};
}

/// A random number other than zero, which identifies a process in a guest.
fn token() -> u64 {
    let mut bytes = [0; 8];
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    u64::from_le_bytes(bytes).max(1)
}
