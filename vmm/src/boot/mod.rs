//! From a kernel file to the first instruction: everything that has to be in guest memory, and
//! where the first vCPU starts.

mod bzimage;
pub mod elf;
mod initrd;
mod mp_table;
mod tables;
mod zero_page;

pub(crate) use tables::{CODE_SEGMENT, DATA_SEGMENT, GDT_ENTRIES, write as write_tables};

use crate::config::{BootSource, InterruptControllers};
use crate::layout::{self, Gsi};
use crate::memory::{GuestMemory, MemoryError};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use vm_memory::GuestAddress;

/// Why a guest cannot be booted from these files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// A file that cannot be opened or read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A path that leads to a directory, a device or the like.
    #[error("{} is not a file", .0.display())]
    NotAFile(PathBuf),
    /// A kernel file in neither of the known formats.
    #[error("{} is not a Linux kernel: it is neither an ELF file (vmlinux) nor a bzImage", .0.display())]
    UnknownFormat(PathBuf),
    /// An ELF file that is not a kernel this machine can run.
    #[error("{} cannot be booted: {source}", path.display())]
    Elf {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: elf::ElfError,
    },
    /// A bzImage that is broken or too old.
    #[error("{} cannot be booted: {problem}", path.display())]
    BzImage {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A kernel that needs more memory than the machine has.
    #[error("the kernel needs {needed_mib} MiB of memory; give the machine more than {given_mib} MiB")]
    KernelTooLarge {
        /// MiB up to the end of the kernel, rounded up.
        needed_mib: u64,
        /// MiB that there are below the device gap and within reach of the first page tables.
        given_mib: u64,
    },
    /// An initrd that does not fit beside the kernel.
    #[error("{} has {size} bytes; {free} are free behind the kernel: give the machine more memory", path.display())]
    InitrdTooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// Bytes between the end of the kernel and the end of memory.
        free: u64,
    },
    /// Guest memory that cannot be written.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// Where the first vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Guest-physical address of the first instruction, run in 64-bit mode.
    pub instruction: GuestAddress,
}

/// A kernel in guest memory.
struct Kernel {
    entry: GuestAddress,
    /// First byte behind everything that the kernel uses before it manages memory itself.
    end: GuestAddress,
    /// The setup header of a bzImage.
    setup_header: Option<linux_loader::bootparam::setup_header>,
}

/// What the boot tables say of the machine.
#[derive(Clone, Copy, Debug)]
pub struct Hardware<'a> {
    /// vCPUs.
    pub vcpus: u8,
    /// Interrupt lines that lead to a device.
    pub lines: &'a [Gsi],
    /// virtio devices.
    pub devices: usize,
    /// The interrupt controllers.
    pub controllers: InterruptControllers,
}

/// The files of a boot source, open.
#[derive(Debug)]
pub struct BootFiles {
    pub(crate) kernel: File,
    pub(crate) initrd: Option<File>,
}

impl BootFiles {
    /// Opens them.
    ///
    /// # Errors
    /// When one cannot be opened, or is no file.
    pub fn open(source: &BootSource) -> Result<Self, BootError> {
        let kernel = open(&source.kernel_image_path)?;
        Ok(Self { kernel, initrd: source.initrd_path.as_deref().map(open).transpose()? })
    }

    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        let initrd = self.initrd.as_ref().map(File::try_clone).transpose()?;
        Ok(Self { kernel: self.kernel.try_clone()?, initrd })
    }
}

/// Puts the kernel, the initrd, the command line and every table into guest memory.
///
/// # Errors
/// When a file is not what it should be, or does not fit.
pub fn load(
    memory: &GuestMemory,
    source: &BootSource,
    files: BootFiles,
    hardware: Hardware<'_>,
) -> Result<Entry, BootError> {
    let kernel = load_kernel(memory, files.kernel, &source.kernel_image_path)?;
    let initrd = match (files.initrd, &source.initrd_path) {
        (Some(file), Some(path)) => initrd::load(memory, file, path, kernel.end)?,
        _ => None,
    };
    let line = layout::virtio_mmio_parameters(hardware.devices) + &source.boot_args;
    write_command_line(memory, &line)?;
    zero_page::write(memory, &kernel, initrd, &line)?;
    tables::write(memory)?;
    mp_table::write(memory, hardware)?;
    Ok(Entry { instruction: kernel.entry })
}

/// Reads the first bytes of the kernel's file to see what it is. A file of the one format that is
/// broken keeps that format's error.
fn load_kernel(memory: &GuestMemory, file: File, path: &Path) -> Result<Kernel, BootError> {
    let length = length(&file, path)?;
    let mut magic = [0; 4];
    let starts_with = |offset, expected: &[u8; 4], magic: &mut [u8; 4]| {
        file.read_exact_at(magic, offset).is_ok() && magic == expected
    };
    if starts_with(0, &elf::MAGIC, &mut magic) {
        elf::load(memory, &file, length).map_err(|error| match error {
            elf::LoadError::Elf(source) => BootError::Elf { path: path.into(), source },
            elf::LoadError::TooLarge { end } => too_large(memory, end),
            elf::LoadError::Memory(error) => error.into(),
        })
    } else if starts_with(bzimage::MAGIC_OFFSET, &bzimage::MAGIC, &mut magic) {
        bzimage::load(memory, file, length, path)
    } else {
        Err(BootError::UnknownFormat(path.into()))
    }
}

/// The error of a kernel that would end at `end`.
fn too_large(memory: &GuestMemory, end: u64) -> BootError {
    BootError::KernelTooLarge {
        needed_mib: end.div_ceil(layout::MIB),
        given_mib: kernel_limit(memory) / layout::MIB,
    }
}

/// No kernel may end above this address.
fn kernel_limit(memory: &GuestMemory) -> u64 {
    memory.low_end().0.min(layout::IDENTITY_MAP_END.0)
}

/// Opens a regular file; anything else could block, never end, or change its length.
fn open(path: &Path) -> Result<File, BootError> {
    let failed = |source| BootError::Read { path: path.into(), source };
    // The type is checked before opening, because opening a FIFO waits for its writer.
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(BootError::NotAFile(path.into()));
    }
    File::open(path).map_err(failed)
}

fn length(file: &File, path: &Path) -> Result<u64, BootError> {
    let metadata = file.metadata().map_err(|source| BootError::Read { path: path.into(), source })?;
    Ok(metadata.len())
}

fn write_command_line(memory: &GuestMemory, line: &str) -> Result<(), MemoryError> {
    let mut bytes = line.as_bytes().to_vec();
    bytes.push(0);
    memory.write(layout::COMMAND_LINE, &bytes)
}
