//! The devices of the microVM. Each device implements its registers and does not depend on KVM, on the bus or on
//! another device.

pub mod boot_mark;
pub mod configuration;
pub mod console;
pub mod exit_port;
pub mod io_apic;
pub mod kernel_log;
pub mod legacy;
pub mod serial;
pub mod virtio;
