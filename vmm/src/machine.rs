//! Builds a machine from a configuration: memory, kernel, VM, devices and vCPUs, in this order.

use crate::attach::DeviceSet;
use crate::boot::{self, BootFiles, Entry, Hardware};
use crate::bus::{BusDevice, Buses, lock};
use crate::config::{Config, ConfigError, Console, GuestConfig, InterruptControllers};
use crate::control::Control;
use crate::devices::boot_mark::BootMarks;
use crate::devices::configuration::Configuration;
use crate::devices::console::ConsoleOutput;
use crate::devices::exit_port::ExitPort;
use crate::devices::io_apic::{self, IoApic};
use crate::devices::kernel_log::KernelLog;
use crate::devices::legacy::{AbsentClock, KeyboardController, ResetControl};
use crate::devices::serial::SerialPort;
use crate::devices::virtio::{Transport, balloon};
use crate::error::Error;
use crate::event_loop::Input;
use crate::function_marks::{FunctionMarks, MarkError};
use crate::jail::Jail;
use crate::kvm::{Hypervisor, KvmError, Vcpu, Vm};
use crate::layout;
use crate::memory::GuestMemory;
use crate::preboot::error::PrebootError;
use crate::preboot::kernel::Preboot;
use crate::preboot::state::State;
use crate::profile::Recorder;
use crate::resources::{Backing, Resources};
use crate::start_latch::StartLatch;
use crate::timeline::{Instant, Timeline};
use guest_protocol::{BootMark, port};
use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::AsFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

/// A machine that is built and not running: memory contains the kernel, the devices are connected, and the vCPUs are at
/// their first instruction.
#[derive(Debug)]
pub struct Machine {
    pub(crate) vcpus: Vec<Vcpu>,
    /// All vCPUs except one wait at this latch, if the machine continues from a pre-booted kernel.
    pub(crate) latch: Option<Arc<StartLatch>>,
    pub(crate) devices: Devices,
    pub(crate) timeline: Timeline,
    pub(crate) stopping: Arc<AtomicBool>,
    /// Descriptors and memory that the vCPUs need; dropped after them, in this order.
    pub(crate) vm: Vm,
    pub(crate) memory: GuestMemory,
    /// Whether the machine is captured when it stops, as a pre-booted kernel.
    pub(crate) is_captured: bool,
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
        let resources = Resources::open(config, Backing::Configured)?;
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
        let (origin, device_set) = Origin::select(config, resources)?;
        let path = origin.preboot.as_ref().map(|preboot| preboot.path().to_owned());
        let result = Self::assemble(config, origin, device_set, timeline, purpose);
        result.map_err(|error| match path {
            Some(path) => Preboot::restore_error(path, error).into(),
            None => error,
        })
    }

    /// Builds a machine that continues from a new pre-booted kernel, as a trial.
    pub(crate) fn continue_from(
        config: &Config,
        resources: Resources,
        preboot: Preboot,
        timeline: Timeline,
    ) -> Result<Self, Error> {
        let origin = Origin { preboot: Some(preboot), ..Origin::default() };
        Self::assemble(config, origin, DeviceSet::new(config, resources)?, timeline, Purpose::Run)
    }

    fn assemble(
        config: &Config,
        origin: Origin,
        mut device_set: DeviceSet,
        mut timeline: Timeline,
        purpose: Purpose,
    ) -> Result<Self, Error> {
        // Steps that fail on a user's error come first, so that the error is reported on hosts without KVM too.
        let Origin { preboot, hypervisor, refusal } = origin;
        let memory = GuestMemory::anonymous(config.machine.mem_size_mib * layout::MIB)?;
        let controllers = config.boot_source.interrupt_controllers;
        let entry = if let Some(preboot) = &preboot {
            preboot.fill(&memory)?;
            timeline.reached("pre-booted kernel loaded");
            None
        } else {
            let entry = load_kernel(config, &mut device_set, &memory)?;
            timeline.reached("kernel loaded");
            Some(entry)
        };
        let marks = mark_functions(config, &memory)?;

        let hypervisor = match (hypervisor, device_set.kvm.take()) {
            (Some(hypervisor), _) => hypervisor,
            (None, Some(descriptor)) => Hypervisor::from_descriptor(descriptor)?,
            (None, None) => Hypervisor::open()?,
        };
        timeline.reached("KVM opened");

        let vm = Vm::new(hypervisor, controllers)?;
        let created = Instant::now();
        attach_memory(&vm, &memory)?;
        timeline.reached("VM created");

        let stopping = Arc::new(AtomicBool::new(false));
        let state = preboot.as_ref().map(|preboot| &preboot.state);
        let devices = DevicesBuilder {
            config,
            vm: &vm,
            memory: &memory,
            device_set,
            created,
            stopping: &stopping,
            capture_at: purpose.capture_at(),
            state,
        };
        let devices = devices.build()?;
        let latch =
            preboot.as_ref().map(|preboot| preboot.open_latch_at_init(&memory, &mut lock(&devices.marks)));
        timeline.reached("devices built");

        let vcpus = create_vcpus(config, &vm, &memory, marks.as_ref())?;
        if let Some(entry) = entry {
            vcpus[0].set_entry(entry)?;
        }
        if let Some(state) = state {
            state.restore(&vm, &vcpus)?;
        }
        timeline.reached("vCPUs created");

        Ok(Self {
            vcpus,
            latch,
            devices,
            timeline,
            stopping,
            vm,
            memory,
            is_captured: purpose.capture_at().is_some(),
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

/// What a machine starts from: a pre-booted kernel, or otherwise its boot source.
#[derive(Debug, Default)]
struct Origin {
    preboot: Option<Preboot>,
    /// KVM, if it was opened to compare its CPUID with the pre-booted kernel's.
    hypervisor: Option<Hypervisor>,
    /// Why the pre-booted kernel that the configuration names is not used.
    refusal: Option<PrebootError>,
}

impl Origin {
    /// Opens and checks the pre-booted kernel, if there is one, and builds the devices.
    fn select(config: &Config, mut resources: Resources) -> Result<(Self, DeviceSet), Error> {
        let file = resources.preboot.take();
        let mut device_set = DeviceSet::new(config, resources)?;
        // A profile of functions records the boot, which a pre-booted kernel has completed.
        if config.profile.as_ref().is_some_and(|profile| !profile.functions.is_empty()) {
            return Ok((Self::default(), device_set));
        }
        let preboot = match Preboot::open(config, file) {
            Ok(Some(preboot)) => preboot,
            Ok(None) => return Ok((Self::default(), device_set)),
            Err(error) => return Ok((Self { refusal: Some(error), ..Self::default() }, device_set)),
        };
        let hypervisor = device_set.kvm.take().map_or_else(Hypervisor::open, Hypervisor::from_descriptor)?;
        let refusal =
            preboot.check_devices(device_set.identities()).or_else(|| preboot.check_host(&hypervisor));
        let preboot = refusal.is_none().then_some(preboot);
        Ok((Self { preboot, hypervisor: Some(hypervisor), refusal }, device_set))
    }
}

/// The purpose of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Run its guest.
    Run,
    /// Stop when the guest reaches this stage, and be captured as a pre-booted kernel.
    Capture(BootMark),
}

impl Purpose {
    const fn capture_at(self) -> Option<BootMark> {
        match self {
            Self::Run => None,
            Self::Capture(stage) => Some(stage),
        }
    }
}

/// Loads the kernel into memory, and returns its entry point.
fn load_kernel(config: &Config, device_set: &mut DeviceSet, memory: &GuestMemory) -> Result<Entry, Error> {
    let source = &config.boot_source;
    let files = device_set.boot.take().map_or_else(|| BootFiles::open(source), Ok)?;
    let hardware = Hardware {
        vcpus: config.machine.vcpu_count,
        lines: &device_set.lines(),
        devices: device_set.count(),
        controllers: source.interrupt_controllers,
    };
    Ok(boot::load(memory, source, files, hardware)?)
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

/// The inputs of the devices.
struct DevicesBuilder<'a> {
    config: &'a Config,
    vm: &'a Vm,
    memory: &'a GuestMemory,
    device_set: DeviceSet,
    created: Instant,
    stopping: &'a Arc<AtomicBool>,
    capture_at: Option<BootMark>,
    /// The state to restore, if the machine continues from a pre-booted kernel.
    state: Option<&'a State>,
}

impl DevicesBuilder<'_> {
    fn build(self) -> Result<Devices, Error> {
        let Self { config, vm, memory, device_set, created, stopping, capture_at, state } = self;
        let drained =
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::host("create an eventfd"))?;
        let (output, input) = open_console(&config.console, &drained, stopping)?;
        let interrupt = vm.interrupt(layout::SERIAL_GSI)?;
        let serial = match state {
            Some(state) => SerialPort::restored(&state.serial, interrupt, drained, output)
                .map_err(Error::host("raise an interrupt"))?,
            None => SerialPort::new(interrupt, drained, output),
        };
        let serial = Arc::new(Mutex::new(serial));
        let marks = capture_at.map_or_else(BootMarks::default, |stage| BootMarks::capturing_at(stage as u8));
        let marks = Arc::new(Mutex::new(marks));
        let wants_log = config.profile.is_some();
        let configuration = Configuration::new(guest_config(config), created, wants_log, state.is_some())
            .map_err(ConfigError::from)?;

        let mut buses = Buses::default();
        let mut io_apic = None;
        if config.boot_source.interrupt_controllers == InterruptControllers::IoApic {
            let mut device = IoApic::new(&device_set.lines(), vm.message_routes());
            let start = layout::IO_APIC.0;
            if let Some(state) = state {
                device.restore(&state.io_apic).map_err(Error::host("route interrupts"))?;
            } else {
                // The selected index is not used before the data register is accessed.
                vm.coalesce_writes(GuestAddress(start + u64::from(io_apic::SELECT)), 4);
            }
            let device = Arc::new(Mutex::new(device));
            buses.memory.claim(start..=start + layout::PAGE_SIZE - 1, device.clone());
            io_apic = Some(device);
        }
        let states = state.map_or(&[][..], |state| &state.virtio);
        let balloon = device_set.balloon.clone();
        let virtio = device_set.connect(vm, memory, &mut buses.memory, states)?;
        let bus = &mut buses.ports;
        let one = |port: u16| port..=port;
        bus.claim(layout::SERIAL_PORT..=layout::SERIAL_PORT + 7, serial.clone());
        bus.claim(one(port::BOOT_MARK), marks.clone());
        bus.claim(port::CONFIG_REQUEST..=port::CONFIG_DATA, Arc::new(Mutex::new(configuration)));
        bus.claim(one(port::EXIT), Arc::new(Mutex::new(ExitPort)));
        bus.claim(one(layout::KEYBOARD_CONTROLLER_PORT), Arc::new(Mutex::new(KeyboardController)));
        bus.claim(one(layout::RESET_CONTROL_PORT), Arc::new(Mutex::new(ResetControl)));
        bus.claim(one(layout::RTC_DATA_PORT), Arc::new(Mutex::new(AbsentClock)));
        let kernel_log = wants_log.then(Arc::<Mutex<KernelLog>>::default);
        if let Some(log) = &kernel_log {
            bus.claim(one(port::KERNEL_LOG), log.clone());
        }
        Ok(Devices { buses: Arc::new(buses), marks, serial, io_apic, kernel_log, virtio, balloon, input })
    }
}

/// The configuration that init requests: the guest's part of the machine's configuration, with the device of the root
/// filesystem and the addresses of the network cards.
fn guest_config(config: &Config) -> GuestConfig {
    let mut guest = config.guest.clone();
    let of_image = || Some(config.devices.root_drive()?.1.into_bytes());
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
            let file = File::create(path).map_err(|source| Error::Console { path: path.clone(), source })?;
            Ok((ConsoleOutput::to_file(file, stopping), None))
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
