//! The parts of init that need no guest: they are tested like any library.
#![no_std]

extern crate alloc;

pub mod interpreter;
pub mod payload_spec;
pub mod strings;
