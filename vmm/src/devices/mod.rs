//! The devices of a machine. Each knows its registers and nothing about KVM, the bus or another
//! device.

pub mod boot_mark;
pub mod configuration;
pub mod console;
pub mod exit_port;
pub mod io_apic;
pub mod kernel_log;
pub mod legacy;
pub mod serial;
pub mod virtio;
