//! The parts of init that do not depend on running in a guest, so that unit tests can use them.
#![no_std]

extern crate alloc;

pub mod command_line;
pub mod interpreter;
pub mod strings;

/// The guest's configuration, with strings in the form that execve takes.
pub type GuestConfig = guest_protocol::config::GuestConfig<strings::Strings>;
