//! PID 1 of a Kindling guest. In this order, init marks its first instruction, mounts filesystems, sets up the system,
//! reads its configuration, enters the image's root filesystem if that is a disk, mounts volumes and shared folders,
//! runs the payload and reports its exit status.
//!
//! Init uses no C library.
#![no_std]
#![no_main]

extern crate alloc;

mod agent;
mod configuration;
mod console;
mod copy;
mod etc_files;
mod files;
mod greeting;
mod heap;
mod kernel_log;
mod limits;
mod machine;
mod mem;
mod mounts;
mod network;
mod panic;
mod payload;
mod program;
mod renewal;
mod reseed;
mod root;
mod setup;
mod start;
mod syscall;

use guest_protocol::{BootMark, ExitStatus};

/// Runs the guest's user space. `start` calls this once, on the kernel's initial stack.
fn main() -> ! {
    if !rustix::process::getpid().is_init() {
        // Init's program run as a payload exits immediately. The trial guests of a pre-booted kernel run it.
        syscall::exit(0);
    }
    heap::init();
    setup::mount_filesystems();
    setup::complete_devices();
    machine::mark(BootMark::FilesystemsMounted);
    setup::open_console();
    network::bring_up_loopback();
    machine::mark(BootMark::SystemReady);

    // Nothing above this line depends on the image or the payload.
    let configuration = configuration::read();
    let guest = &configuration.guest;
    if let Some(reseed) = &configuration.boot.reseed {
        reseed::apply(reseed);
    }
    setup::set_hostname(guest.hostname.as_deref());
    network::configure(&guest.networks);
    machine::mark(BootMark::Configured);
    if let Some(device) = &guest.root_device {
        root::enter(device, guest);
        machine::mark(BootMark::RootEntered);
    } else {
        etc_files::write(guest);
    }
    let volumes = mounts::mount_all(&guest.mounts);
    if guest.is_root_read_only {
        root::make_read_only();
    }

    if let Some(max) = guest.max_processes {
        limits::limit_processes(max);
    }
    let code = if guest.agent {
        limits::raise();
        agent::serve(guest)
    } else if guest.arguments.is_empty() {
        greeting::print(&configuration);
        0
    } else {
        payload::run(guest)
    };
    volumes.unmount();
    if configuration.boot.kernel_log {
        kernel_log::send();
    }
    machine::end(ExitStatus::Payload(code))
}
