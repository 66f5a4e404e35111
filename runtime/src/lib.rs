//! Container images in microVMs: images, guests by their names, processes in them, volumes.
//!
//! The command `kindling` is written with this library alone. The machine below is [`vmm`].

mod builder;
pub mod command;
pub mod copy;
mod environment;
pub mod exec;
pub mod guest;
pub mod image;
pub mod kernel;
pub mod launch;
pub mod log;
mod mount;
pub mod network;
pub mod signal;
pub mod volume;

pub use builder::GuestBuilder;
pub use command::{Child, Command, ExitStatus, Output, Stdio};
pub use environment::EnvironmentError;
pub use guest::{Guest, guests};
pub use guest_protocol::agent::TerminalSize;
pub use image::Image;
pub use kindling_vmm as vmm;
pub use mount::MountError;

/// A number that no other process of a guest has, but for one chance in 2^64.
fn token() -> u64 {
    let mut bytes = [0; 8];
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    u64::from_le_bytes(bytes).max(1)
}
