//! PID 1 of a Kindling guest, in the order it happens: mark the first instruction, mount, set the
//! system up, ask for the configuration, enter the image's root where it is a disk, mount what the host adds, run
//! the payload, report its exit.
//!
//! There is no C library below it and nothing above it but the payload.
#![no_std]
#![no_main]

extern crate alloc;

mod agent;
mod copy;
mod greeting;
mod heap;
mod kernel_log;
mod limits;
mod machine;
mod mem;
mod mounts;
mod names;
mod network;
mod payload;
mod program;
mod question;
mod renewal;
mod root;
mod setup;
mod start;
mod syscall;
mod voice;

use guest_protocol::{BootMark, ExitStatus};

/// The life of the guest's user space. `start` calls this once, on the kernel's initial stack.
fn main() -> ! {
    if !rustix::process::getpid().is_init() {
        // A payload like any other: one that ends at once, which is all that a kernel's trial asks for.
        syscall::exit(0);
    }
    heap::init();
    setup::mount_filesystems();
    setup::complete_devices();
    machine::mark(BootMark::FilesystemsMounted);
    setup::open_console();
    network::bring_up_loopback();
    machine::mark(BootMark::SystemReady);

    // Nothing before this line depends on the image or on the payload.
    let answer = question::ask();
    renewal::renew(&answer.spec.renewal);
    setup::set_hostname(answer.spec.hostname.as_deref());
    network::configure(&answer.spec.networks);
    machine::mark(BootMark::Configured);
    if let Some(device) = &answer.spec.root_device {
        root::enter(device, &answer.spec);
        machine::mark(BootMark::RootEntered);
    } else {
        names::write(&answer.spec);
    }
    let written = mounts::mount_all(&answer.spec.mounts);
    if answer.spec.is_root_read_only {
        root::make_read_only();
    }

    let code = if answer.spec.agent {
        limits::raise();
        agent::serve(&answer.spec)
    } else if answer.spec.arguments.is_empty() {
        greeting::print(&answer);
        0
    } else {
        payload::run(&answer.spec)
    };
    written.leave();
    if answer.spec.kernel_log {
        kernel_log::send();
    }
    machine::end(ExitStatus::Payload(code))
}
