//! Builds a machine from a configuration: memory, kernel, VM, devices and vCPUs, in this order.

use crate::attach::DeviceSet;
use crate::boot::{self, BootFiles, Entry, Hardware};
use crate::bus::{BusDevice, Buses, MemoryBus, PortBus, lock};
use crate::config::{Config, ConfigError, Console, GuestConfig, InterruptControllers};
use crate::control::Control;
use crate::devices::boot_mark::BootMarks;
use crate::devices::configuration::Configuration;
use crate::devices::console::{self, ConsoleOutput};
use crate::devices::exit_port::ExitPort;
use crate::devices::io_apic::{self, IoApic};
use crate::devices::kernel_log::KernelLog;
use crate::devices::legacy::{AbsentClock, KeyboardController, ResetControl};
use crate::devices::serial::SerialPort;
use crate::devices::virtio::{Transport, balloon};
use crate::error::Error;
use crate::function_marks::{FunctionMarks, MarkError};
use crate::input::Input;
use crate::jail::Jail;
use crate::kvm::{Hypervisor, KvmError, Vcpu, Vm};
use crate::layout::{self, Gsi};
use crate::memory::GuestMemory;
use crate::preboot::error::PrebootError;
use crate::preboot::kernel::Preboot;
use crate::preboot::pages::PagesInAdvance;
use crate::preboot::state::State;
use crate::profile::Recorder;
use crate::resources::Resources;
use crate::start_latch::StartLatch;
use crate::timeline::{Instant, Timeline};
use crate::vcpu_threads::IdleThreads;
use guest_protocol::{BootMark, port};
use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

/// A machine that is built and not running: memory contains the kernel, the devices are connected, and the vCPUs are at
/// their first instruction.
#[derive(Debug)]
pub struct Machine {
    pub(crate) vcpus: Vec<Vcpu>,
    /// Threads in which the vCPUs have run before.
    pub(crate) threads: IdleThreads,
    /// All vCPUs except one wait at this latch, if the machine continues from a pre-booted kernel.
    pub(crate) latch: Option<Arc<StartLatch>>,
    pub(crate) devices: Devices,
    pub(crate) timeline: Timeline,
    pub(crate) stopping: Arc<AtomicBool>,
    /// Descriptors and memory that the vCPUs need; dropped after them, in this order.
    pub(crate) vm: Vm,
    pub(crate) memory: GuestMemory,
    pub(crate) purpose: Purpose,
    /// Pages that are prepared before the guest uses them.
    pages: PagesInAdvance,
    /// The connection to the front, if it is another process.
    pub(crate) control: Option<Control>,
    /// What confines the threads while the guest runs.
    pub(crate) jail: Jail,
    /// Why the machine does not continue from the pre-booted kernel that its configuration names.
    preboot_refusal: Option<PrebootError>,
}

/// The devices of a machine: on their buses, and by name those that are accessed elsewhere too.
#[derive(Debug)]
pub(crate) struct Devices {
    pub(crate) buses: Arc<Buses>,
    pub(crate) marks: Arc<Mutex<BootMarks>>,
    pub(crate) serial: Arc<Mutex<SerialPort>>,
    /// From which init requests its configuration.
    pub(crate) configuration: Arc<Mutex<Configuration>>,
    pub(crate) io_apic: Option<Arc<Mutex<IoApic>>>,
    /// Receives the kernel's log from init, if the boot is profiled.
    pub(crate) kernel_log: Option<Arc<Mutex<KernelLog>>>,
    /// The virtio devices, in the order of their registers.
    pub(crate) virtio: Vec<Arc<Mutex<Transport>>>,
    pub(crate) balloon: Option<balloon::Control>,
    pub(crate) input: Option<Input>,
}

impl Machine {
    /// Builds the machine. `timeline` starts at a time of the caller's choice, and each step is added to it.
    ///
    /// # Errors
    /// When the configuration or one of its files is invalid, or KVM or the host fails.
    pub fn new(config: &Config, mut timeline: Timeline) -> Result<Self, Error> {
        config.validate()?;
        timeline.reached("configuration checked");
        let resources = Resources::open(config)?;
        match Self::with_resources(config, resources, timeline.clone(), Purpose::Run) {
            // A failure to restore the pre-booted kernel must not prevent a boot.
            Err(Error::Preboot(refusal @ PrebootError::Restore { .. })) => {
                let cold = Config { preboot: None, ..config.clone() };
                let resources = Resources::reopen_devices(&cold)?;
                let machine = Self::with_resources(&cold, resources, timeline, Purpose::Run)?;
                Ok(Self { preboot_refusal: Some(refusal), ..machine })
            }
            result => result,
        }
    }

    /// Builds the machine from opened resources. If its pre-booted kernel matches and cannot be restored all the same,
    /// the error is [`PrebootError::Restore`].
    pub(crate) fn with_resources(
        config: &Config,
        resources: Resources,
        timeline: Timeline,
        purpose: Purpose,
    ) -> Result<Self, Error> {
        let Resources { kvm, boot, preboot, backends } = resources;
        let device_set = DeviceSet::new(config, backends)?;
        let origin = Origin { kvm, boot, ..Origin::default() }.select(config, preboot, &device_set)?;
        let path = origin.preboot.as_ref().map(|preboot| preboot.path().to_owned());
        let result = Self::build(config, origin, device_set, timeline, purpose);
        result.and_then(Self::with_pages_of_snapshot).map_err(|error| match path {
            Some(path) => Preboot::restore_error(path, error).into(),
            None => error,
        })
    }

    /// Prepares the pages of a snapshot. A pre-booted kernel starts a program first, and has its pages copied meanwhile.
    fn with_pages_of_snapshot(mut self) -> Result<Self, Error> {
        if self.pages.are_of_snapshot() {
            self.pages.copy(&self.memory, self.vcpus.first())?;
            self.timeline.reached("pages copied");
        }
        Ok(self)
    }

    /// Builds a machine that continues from a new pre-booted kernel or snapshot, as a trial.
    pub(crate) fn continue_from(
        config: &Config,
        resources: Resources,
        preboot: Preboot,
        timeline: Timeline,
        purpose: Purpose,
    ) -> Result<Self, Error> {
        let Resources { kvm, backends, .. } = resources;
        let origin = Origin { kvm, preboot: Some(preboot), ..Origin::default() };
        Self::build(config, origin, DeviceSet::new(config, backends)?, timeline, purpose)
    }

    /// The recipe: the steps of every machine, in their order, whether it boots a kernel or continues from a pre-booted
    /// one. Steps that fail on a user's error come first, so that the error is reported on hosts without KVM too.
    fn build(
        config: &Config,
        origin: Origin,
        device_set: DeviceSet,
        mut timeline: Timeline,
        purpose: Purpose,
    ) -> Result<Self, Error> {
        let Origin { preboot, hypervisor, kvm, boot, refusal } = origin;
        let state = preboot.as_ref().map(|preboot| &preboot.state);

        // 1. Guest memory, with a kernel or with the pages of a pre-booted one.
        let memory = GuestMemory::anonymous(config.machine.mem_size_mib * layout::MIB)?;
        let entry = match &preboot {
            Some(preboot) => preboot.fill(&memory).map(|()| None)?,
            None => Some(load_kernel(config, boot, &device_set, &memory)?),
        };
        timeline.reached(if entry.is_some() { "kernel loaded" } else { "pre-booted kernel loaded" });
        let functions = mark_functions(config, &memory)?;

        // 2. KVM.
        let hypervisor = hypervisor.map_or_else(|| open_kvm(kvm), Ok)?;
        timeline.reached("KVM opened");

        // 3. The VM, with its memory and interrupt controllers.
        let vm = Vm::new(hypervisor, config.boot_source.interrupt_controllers)?;
        let created = Instant::now();
        attach_memory(&vm, &memory)?;
        timeline.reached("VM created");

        // 4. The devices, on their buses.
        let stopping = Arc::new(AtomicBool::new(false));
        let mut buses = Buses::default();
        let (serial, input) = create_serial_port(config, &vm, &stopping, state)?;
        let marks = Arc::new(Mutex::new(purpose.boot_marks()));
        let configuration = match purpose {
            Purpose::Wait => Configuration::unknown(),
            _ => create_configuration(config, created, state.is_some())?,
        };
        let configuration = Arc::new(Mutex::new(configuration));
        let io_apic = create_io_apic(config, &vm, &device_set.lines(), &mut buses.memory, state)?;
        let balloon = device_set.balloon.clone();
        let virtio = device_set.connect(&vm, &memory, &mut buses.memory, state)?;
        let kernel_log = config.profile.as_ref().map(|_| Arc::default());
        claim_ports(&mut buses.ports, &serial, &marks, configuration.clone(), kernel_log.as_ref());
        let is_spare = purpose == Purpose::Wait;
        let pages = preboot.as_ref().map(|preboot| preboot.in_advance(is_spare)).unwrap_or_default();
        let open = |preboot: &Preboot| preboot.open_latch_at_init(&memory, &pages, &mut lock(&marks));
        let latch = preboot.as_ref().map(open);
        timeline.reached("devices built");

        // 5. The vCPUs, at the kernel's entry or where the pre-booted one was stopped.
        let vcpus = create_vcpus(config, &vm, &memory, functions.as_ref())?;
        if let Some(entry) = entry {
            vcpus[0].set_entry(entry)?;
        }
        if let Some(state) = state {
            state.restore(&vm, &vcpus)?;
        }
        timeline.reached("vCPUs created");

        let buses = Arc::new(buses);
        let devices =
            Devices { buses, marks, serial, configuration, io_apic, kernel_log, virtio, balloon, input };
        Ok(Self {
            vcpus,
            threads: IdleThreads::default(),
            latch,
            devices,
            timeline,
            stopping,
            vm,
            memory,
            pages,
            purpose,
            control: None,
            jail: Jail::OFF,
            preboot_refusal: refusal,
        })
    }

    /// Why this machine boots although its configuration names a pre-booted kernel: the file is damaged, or was made
    /// for another configuration or host.
    #[must_use]
    pub const fn preboot_refusal(&self) -> Option<&PrebootError> {
        self.preboot_refusal.as_ref()
    }

    /// Enters the pages of a pre-booted kernel into the guest's page tables in KVM, so that the guest takes no faults on them.
    /// They stay shared with other guests. Without effect on hosts that do not support it.
    pub(crate) fn prefault(&self) {
        self.pages.enter(&self.memory, self.vcpus.first());
    }

    /// Registers a callback for the first boot mark of `stage`. It runs on the thread of the vCPU that writes the mark,
    /// before the guest continues.
    pub fn at_mark(&self, stage: BootMark, action: impl FnOnce() + Send + 'static) {
        lock(&self.devices.marks).call_at(stage as u8, action);
    }

    /// Adds a device of the embedding program at these I/O ports, in place of the machine's own devices.
    pub fn add_port_device(&mut self, ports: RangeInclusive<u16>, device: Arc<Mutex<dyn BusDevice>>) {
        // No vCPU thread exists yet, so that this is the only reference to the buses.
        if let Some(buses) = Arc::get_mut(&mut self.devices.buses) {
            buses.ports.override_claims(ports, device);
        }
    }
}

/// The origin of a machine: a pre-booted kernel, or otherwise its boot source.
#[derive(Debug, Default)]
struct Origin {
    preboot: Option<Preboot>,
    /// KVM, if it was opened to compare its CPUID with the pre-booted kernel's.
    hypervisor: Option<Hypervisor>,
    /// /dev/kvm, if it is open already.
    kvm: Option<OwnedFd>,
    /// Kernel and initrd, if they are open already.
    boot: Option<BootFiles>,
    /// Why the pre-booted kernel that the configuration names is not used.
    refusal: Option<PrebootError>,
}

impl Origin {
    /// Selects the pre-booted kernel of the configuration, if there is one and it matches. `file` is its file, if it is
    /// open already.
    fn select(mut self, config: &Config, file: Option<File>, device_set: &DeviceSet) -> Result<Self, Error> {
        // A profile of functions records the boot, which a pre-booted kernel has completed.
        if config.profile.as_ref().is_some_and(|profile| !profile.functions.is_empty()) {
            return Ok(self);
        }
        if let Some(path) = &config.snapshot {
            let snapshot = Preboot::open_snapshot(path, config, file)?;
            let hypervisor = open_kvm(self.kvm.take())?;
            snapshot.check_machine(device_set.identities(), &hypervisor)?;
            return Ok(Self { preboot: Some(snapshot), hypervisor: Some(hypervisor), ..self });
        }
        match Preboot::open(config, file) {
            Ok(None) => {}
            Ok(Some(preboot)) => {
                let hypervisor = open_kvm(self.kvm.take())?;
                self.refusal = preboot.check_machine(device_set.identities(), &hypervisor).err();
                self.preboot = self.refusal.is_none().then_some(preboot);
                self.hypervisor = Some(hypervisor);
            }
            Err(error) => self.refusal = Some(error),
        }
        Ok(self)
    }
}

/// The purpose of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Run its guest.
    Run,
    /// Stop when the guest reaches this stage, and be captured, as a pre-booted kernel or a snapshot.
    Capture(BootMark),
    /// Stop when init requests its configuration, and wait for one.
    Wait,
}

impl Purpose {
    fn boot_marks(self) -> BootMarks {
        match self {
            Self::Run | Self::Wait => BootMarks::default(),
            Self::Capture(stage) => BootMarks::capturing_at(stage as u8),
        }
    }
}

/// Loads the kernel into memory, and returns its entry point.
fn load_kernel(
    config: &Config,
    files: Option<BootFiles>,
    device_set: &DeviceSet,
    memory: &GuestMemory,
) -> Result<Entry, Error> {
    let source = &config.boot_source;
    let files = files.map_or_else(|| BootFiles::open(source), Ok)?;
    let hardware = Hardware {
        vcpus: config.machine.vcpu_count,
        lines: &device_set.lines(),
        devices: device_set.count(),
        controllers: source.interrupt_controllers,
    };
    Ok(boot::load(memory, source, files, hardware)?)
}

fn open_kvm(descriptor: Option<OwnedFd>) -> Result<Hypervisor, KvmError> {
    descriptor.map_or_else(Hypervisor::open, Hypervisor::from_descriptor)
}

/// Creates the vCPUs, with their recorders if the boot is profiled.
fn create_vcpus(
    config: &Config,
    vm: &Vm,
    memory: &GuestMemory,
    marks: Option<&Arc<FunctionMarks>>,
) -> Result<Vec<Vcpu>, KvmError> {
    let count = config.machine.vcpu_count;
    let create = |id| {
        let mut vcpu = vm.create_vcpu(id, count)?;
        vcpu.recorder = config.profile.as_ref().map(|profile| Recorder::new(profile, id));
        vcpu.memory = config.profile.as_ref().map(|_| memory.clone());
        vcpu.marks = marks.cloned();
        Ok(vcpu)
    };
    (0..count).map(create).collect()
}

/// Marks the functions that a profile records, if it records any.
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

/// Creates the serial port with its console, and the console's input.
fn create_serial_port(
    config: &Config,
    vm: &Vm,
    stopping: &Arc<AtomicBool>,
    state: Option<&State>,
) -> Result<(Arc<Mutex<SerialPort>>, Option<Input>), Error> {
    let drained =
        EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::host("create an eventfd"))?;
    let (output, input) = open_console(&config.console, &drained, stopping)?;
    let interrupt = vm.interrupt(layout::SERIAL_GSI)?;
    let serial = match state {
        Some(state) => SerialPort::restored(&state.serial, interrupt, drained, output)
            .map_err(Error::host("raise an interrupt"))?,
        None => SerialPort::new(interrupt, drained, output),
    };
    Ok((Arc::new(Mutex::new(serial)), input))
}

/// Creates the device from which init requests its configuration.
fn create_configuration(
    config: &Config,
    created: Instant,
    is_restored: bool,
) -> Result<Configuration, ConfigError> {
    let wants_log = config.profile.is_some();
    Ok(Configuration::new(guest_config(config), created, wants_log, is_restored)?)
}

/// Creates the I/O APIC, unless KVM emulates it.
fn create_io_apic(
    config: &Config,
    vm: &Vm,
    lines: &[Gsi],
    bus: &mut MemoryBus,
    state: Option<&State>,
) -> Result<Option<Arc<Mutex<IoApic>>>, Error> {
    if config.boot_source.interrupt_controllers != InterruptControllers::IoApic {
        return Ok(None);
    }
    let mut device = IoApic::new(lines, vm.message_routes());
    let start = layout::IO_APIC.0;
    if let Some(state) = state {
        device.restore(&state.io_apic).map_err(Error::host("route interrupts"))?;
    } else {
        // The selected index is not used before the data register is accessed.
        vm.coalesce_writes(GuestAddress(start + u64::from(io_apic::SELECT)), 4);
    }
    let device = Arc::new(Mutex::new(device));
    bus.claim(start..=start + layout::PAGE_SIZE - 1, device.clone());
    Ok(Some(device))
}

/// Connects the devices with I/O ports to their bus.
fn claim_ports(
    bus: &mut PortBus,
    serial: &Arc<Mutex<SerialPort>>,
    marks: &Arc<Mutex<BootMarks>>,
    configuration: Arc<Mutex<Configuration>>,
    kernel_log: Option<&Arc<Mutex<KernelLog>>>,
) {
    let one = |port: u16| port..=port;
    bus.claim(layout::SERIAL_PORT..=layout::SERIAL_PORT + 7, serial.clone());
    bus.claim(one(port::BOOT_MARK), marks.clone());
    bus.claim(port::CONFIG_REQUEST..=port::CONFIG_DATA, configuration);
    bus.claim(one(port::EXIT), Arc::new(Mutex::new(ExitPort)));
    bus.claim(one(layout::KEYBOARD_CONTROLLER_PORT), Arc::new(Mutex::new(KeyboardController)));
    bus.claim(one(layout::RESET_CONTROL_PORT), Arc::new(Mutex::new(ResetControl)));
    bus.claim(one(layout::RTC_DATA_PORT), Arc::new(Mutex::new(AbsentClock)));
    if let Some(log) = kernel_log {
        bus.claim(one(port::KERNEL_LOG), log.clone());
    }
}

/// The configuration that init requests: the guest's part of the machine's configuration, with the device of the root
/// filesystem and the addresses of the network cards.
pub(crate) fn guest_config(config: &Config) -> GuestConfig {
    let mut guest = config.guest.clone();
    let of_image = || config.devices.root_name().map(String::into_bytes);
    guest.root_device = guest.root_device.or_else(of_image);
    guest.networks.splice(..0, config.devices.guest_networks());
    guest
}

/// Opens the output and the input of the console.
fn open_console(
    console: &Console,
    drained: &EventFd,
    stopping: &Arc<AtomicBool>,
) -> Result<(ConsoleOutput, Option<Input>), Error> {
    let stopping = Arc::clone(stopping);
    match console {
        Console::Null => Ok((ConsoleOutput::new(None, stopping), None)),
        Console::File(path) => {
            let failed = |source| Error::Console { path: path.clone(), source };
            Ok((ConsoleOutput::to_file(console::open(path).map_err(failed)?, stopping), None))
        }
        Console::Stdio => {
            let duplicate = |fd: std::os::fd::BorrowedFd<'_>| {
                fd.try_clone_to_owned().map_err(Error::host("duplicate a standard stream"))
            };
            let output = duplicate(io::stdout().as_fd())?;
            let input = duplicate(io::stdin().as_fd())?;
            let drained = drained.try_clone().map_err(Error::host("duplicate an eventfd"))?;
            let output = ConsoleOutput::new(Some(File::from(output)), stopping);
            Ok((output, Some(Input::new(File::from(input), drained))))
        }
    }
}

impl Devices {
    /// Adds the guest's boot marks, with their names, to a timeline.
    pub(crate) fn add_marks(&self, timeline: &mut Timeline) {
        for mark in lock(&self.marks).marks() {
            let name = guest_protocol::BootMark::from_byte(mark.stage)
                .map_or("unknown mark", guest_protocol::BootMark::name);
            timeline.reached_at(name, mark.at);
        }
    }
}
