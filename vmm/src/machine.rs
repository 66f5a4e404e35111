//! From a configuration to a machine that runs: the recipe, in the order it happens.

use crate::boot::Hardware;
use crate::boot::{self, BootError};
use crate::bus::{Buses, lock};
use crate::config::{Config, ConfigError, Console, InterruptControllers};
use crate::devices::boot_mark::BootMarks;
use crate::devices::configuration::Configuration;
use crate::devices::console::ConsoleOutput;
use crate::devices::exit_port::ExitPort;
use crate::devices::io_apic::IoApic;
use crate::devices::kernel_log::KernelLog;
use crate::devices::legacy::{AbsentClock, KeyboardController, ResetControl};
use crate::devices::serial::SerialPort;
use crate::event_loop::Input;
use crate::function_marks::{FunctionMarks, MarkError};
use crate::kvm::{Hypervisor, KvmError, Vcpu, Vm};
use crate::layout::{self, Gsi};
use crate::memory::{GuestMemory, MemoryError};
use crate::profile::Recorder;
use crate::running::Running;
use crate::timeline::{Instant, Timeline};
use guest_protocol::port;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use vmm_sys_util::eventfd::EventFd;

/// Why a machine could not be built or started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The kernel or initrd cannot be booted.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The functions to record cannot be marked.
    #[error(transparent)]
    Mark(#[from] MarkError),
    /// KVM is missing or refused something.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest memory could not be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The console's file cannot be written.
    #[error("cannot write the console to {}", path.display())]
    Console {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The host has no descriptors, threads or the like left.
    #[error("the host refused to {what}")]
    Host {
        /// What was asked of it.
        what: &'static str,
        /// Its answer.
        source: io::Error,
    },
}

impl Error {
    /// Whether the user can mend this by asking for something else, or by making KVM available.
    #[must_use]
    pub const fn is_users(&self) -> bool {
        !matches!(self, Self::Host { .. } | Self::Kvm(KvmError::Ioctl { .. } | KvmError::Open(_)))
    }

    pub(crate) const fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}

/// Interrupt lines that lead to a device.
const LINES: [Gsi; 1] = [layout::SERIAL_GSI];

/// A machine that is built and not running: memory holds the kernel, devices wait, vCPUs are at
/// their first instruction.
#[derive(Debug)]
pub struct Machine {
    pub(crate) vcpus: Vec<Vcpu>,
    pub(crate) devices: Devices,
    pub(crate) timeline: Timeline,
    pub(crate) stopping: Arc<AtomicBool>,
    /// Descriptors and memory that the vCPUs need; dropped after them, in this order.
    pub(crate) vm: Vm,
    pub(crate) _memory: GuestMemory,
}

/// The devices of a machine, on their bus and by name where somebody outside the bus needs them.
#[derive(Debug)]
pub(crate) struct Devices {
    pub(crate) buses: Arc<Buses>,
    pub(crate) marks: Arc<Mutex<BootMarks>>,
    pub(crate) serial: Arc<Mutex<SerialPort>>,
    /// Where init sends the kernel's log, if the boot is profiled.
    pub(crate) kernel_log: Option<Arc<Mutex<KernelLog>>>,
    pub(crate) input: Option<Input>,
}

impl Machine {
    /// Builds the machine. `timeline` counts from the moment the caller chose and receives each
    /// step.
    ///
    /// # Errors
    /// When the configuration, one of its files, KVM or the host stands in the way.
    pub fn new(config: &Config, mut timeline: Timeline) -> Result<Self, Error> {
        config.validate()?;
        timeline.reached("configuration checked");

        // What the user can get wrong comes first, so that it is named even where there is no KVM.
        let vcpu_count = config.machine.vcpu_count;
        let memory = GuestMemory::anonymous(config.machine.mem_size_mib * layout::MIB)?;
        let controllers = config.boot_source.interrupt_controllers;
        let hardware = Hardware { vcpus: vcpu_count, lines: &LINES, controllers };
        let entry = boot::load(&memory, &config.boot_source, hardware)?;
        let marks = mark_functions(config, &memory)?;
        timeline.reached("kernel loaded");

        let hypervisor = Hypervisor::open()?;
        timeline.reached("KVM opened");

        let vm = Vm::new(hypervisor, controllers)?;
        let created = Instant::now();
        attach_memory(&vm, &memory)?;
        timeline.reached("VM created");

        let stopping = Arc::new(AtomicBool::new(false));
        let devices = build_devices(config, &vm, created, &stopping)?;
        timeline.reached("devices built");

        let mut vcpus =
            (0..vcpu_count).map(|id| vm.create_vcpu(id, vcpu_count)).collect::<Result<Vec<_>, _>>()?;
        for (id, vcpu) in (0..).zip(&mut vcpus) {
            vcpu.recorder = config.profile.as_ref().map(|profile| Recorder::new(profile, id));
            vcpu.memory = config.profile.as_ref().map(|_| memory.clone());
            vcpu.marks.clone_from(&marks);
        }
        vcpus[0].set_entry(entry)?;
        timeline.reached("vCPUs created");

        Ok(Self { vcpus, devices, timeline, stopping, vm, _memory: memory })
    }

    /// Starts the vCPUs.
    ///
    /// # Errors
    /// When the host refuses a thread or a descriptor.
    pub fn start(self) -> Result<Running, Error> {
        Running::start(self)
    }
}

/// Marks the functions that a profile records, if there are any.
fn mark_functions(config: &Config, memory: &GuestMemory) -> Result<Option<Arc<FunctionMarks>>, MarkError> {
    let functions = config.profile.as_ref().map_or(&[][..], |profile| &profile.functions);
    if functions.is_empty() {
        return Ok(None);
    }
    Ok(Some(Arc::new(FunctionMarks::plant(memory, &config.boot_source, functions)?)))
}

#[expect(unsafe_code, reason = "gives guest memory to KVM")]
fn attach_memory(vm: &Vm, memory: &GuestMemory) -> Result<(), KvmError> {
    // SAFETY: `Machine`, and `Running` after it, drop their vCPUs before their memory.
    unsafe { vm.set_memory(memory) }
}

fn build_devices(
    config: &Config,
    vm: &Vm,
    created: Instant,
    stopping: &Arc<AtomicBool>,
) -> Result<Devices, Error> {
    let drained =
        EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::host("make an eventfd"))?;
    let (target, input) = open_console(&config.console, &drained)?;
    let output = ConsoleOutput::new(target, Arc::clone(stopping));
    let serial = SerialPort::new(vm.interrupt(layout::SERIAL_GSI)?, drained, output);
    let serial = Arc::new(Mutex::new(serial));
    let marks = Arc::new(Mutex::new(BootMarks::default()));
    let wants_log = config.profile.is_some();
    let configuration = Configuration::new(config.guest.clone(), created, wants_log)
        .map_err(|_| ConfigError::PayloadTooLong)?;

    let mut buses = Buses::default();
    if config.boot_source.interrupt_controllers == InterruptControllers::IoApic {
        let device = Arc::new(Mutex::new(IoApic::new(&LINES, vm.message_routes())));
        let start = layout::IO_APIC.0;
        buses.memory.claim(start..=start + layout::PAGE_SIZE - 1, device);
    }
    let bus = &mut buses.ports;
    let one = |port: u16| port..=port;
    bus.claim(layout::SERIAL_PORT..=layout::SERIAL_PORT + 7, serial.clone());
    bus.claim(one(port::BOOT_MARK), marks.clone());
    bus.claim(port::CONFIG_LENGTH..=port::CONFIG_DATA, Arc::new(Mutex::new(configuration)));
    bus.claim(one(port::EXIT), Arc::new(Mutex::new(ExitPort)));
    bus.claim(one(layout::KEYBOARD_CONTROLLER_PORT), Arc::new(Mutex::new(KeyboardController)));
    bus.claim(one(layout::RESET_CONTROL_PORT), Arc::new(Mutex::new(ResetControl)));
    bus.claim(one(layout::RTC_DATA_PORT), Arc::new(Mutex::new(AbsentClock)));
    let kernel_log = wants_log.then(Arc::<Mutex<KernelLog>>::default);
    if let Some(log) = &kernel_log {
        bus.claim(one(port::KERNEL_LOG), log.clone());
    }
    Ok(Devices { buses: Arc::new(buses), marks, serial, kernel_log, input })
}

/// Where console output goes and where its input comes from.
fn open_console(console: &Console, drained: &EventFd) -> Result<(Option<File>, Option<Input>), Error> {
    match console {
        Console::Null => Ok((None, None)),
        Console::File(path) => {
            let file = File::create(path).map_err(|source| Error::Console { path: path.clone(), source })?;
            Ok((Some(file), None))
        }
        Console::Stdio => {
            let duplicate = |fd: std::os::fd::BorrowedFd<'_>| {
                fd.try_clone_to_owned().map_err(Error::host("duplicate a standard stream"))
            };
            let output = duplicate(io::stdout().as_fd())?;
            let input = duplicate(io::stdin().as_fd())?;
            let drained = drained.try_clone().map_err(Error::host("duplicate an eventfd"))?;
            Ok((Some(File::from(output)), Some(Input::new(File::from(input), drained))))
        }
    }
}

impl Devices {
    /// Marks of the guest, with their names, at the end of a timeline.
    pub(crate) fn add_marks(&self, timeline: &mut Timeline) {
        for mark in lock(&self.marks).marks() {
            let name = guest_protocol::BootMark::from_byte(mark.stage)
                .map_or("unknown mark", guest_protocol::BootMark::name);
            timeline.reached_at(name, mark.at);
        }
    }
}
