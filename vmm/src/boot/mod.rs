//! Loading a kernel: everything that must be in guest memory before the first instruction, and the entry point.

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

/// Why a guest cannot be booted from the configured files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// A file that cannot be opened or read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
    /// A path of a directory, a device or another file that is not regular.
    #[error("{} is not a file", .0.display())]
    NotAFile(PathBuf),
    /// A kernel file in an unknown format.
    #[error("{} is not a Linux kernel: it is neither an ELF file (vmlinux) nor a bzImage", .0.display())]
    UnknownFormat(PathBuf),
    /// An ELF file that is not a kernel for this machine.
    #[error("{} cannot be booted", path.display())]
    Elf {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: elf::ElfError,
    },
    /// A bzImage that is invalid or too old.
    #[error("{} cannot be booted: {problem}", path.display())]
    BzImage {
        /// The file.
        path: PathBuf,
        /// The reason.
        problem: String,
    },
    /// A kernel that needs more memory than the machine has.
    #[error("the kernel needs {needed_mib} MiB of memory; give the machine more than {given_mib} MiB")]
    KernelTooLarge {
        /// End address of the kernel in MiB, rounded up.
        needed_mib: u64,
        /// Available memory in MiB: below the device gap, and within the initial page tables.
        given_mib: u64,
    },
    /// An initrd that does not fit into memory after the kernel.
    #[error("{} has {size} bytes; {free} are free after the kernel: give the machine more memory", path.display())]
    InitrdTooLarge {
        /// The file.
        path: PathBuf,
        /// Size of the initrd in bytes.
        size: u64,
        /// Number of bytes between the end of the kernel and the end of memory.
        free: u64,
    },
    /// Guest memory that cannot be written.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// The entry point of the boot vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Guest-physical address of the first instruction, run in 64-bit mode.
    pub instruction: GuestAddress,
}

/// A kernel that was loaded into guest memory.
struct Kernel {
    entry: GuestAddress,
    /// First address after the memory that the kernel uses before it manages memory itself.
    end: GuestAddress,
    /// The setup header, if the kernel is a bzImage.
    setup_header: Option<linux_loader::bootparam::setup_header>,
}

/// The hardware that the boot tables describe.
#[derive(Clone, Copy, Debug)]
pub struct Hardware<'a> {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Interrupt lines with a device.
    pub lines: &'a [Gsi],
    /// Number of virtio devices.
    pub devices: usize,
    /// The interrupt controllers.
    pub controllers: InterruptControllers,
}

/// The open files of a boot source.
#[derive(Debug)]
pub struct BootFiles {
    pub(crate) kernel: File,
    pub(crate) initrd: Option<File>,
}

impl BootFiles {
    /// Opens the files.
    ///
    /// # Errors
    /// When a file cannot be opened, or is not a regular file.
    pub fn open(source: &BootSource) -> Result<Self, BootError> {
        let kernel = open(&source.kernel_image_path)?;
        Ok(Self { kernel, initrd: source.initrd_path.as_deref().map(open).transpose()? })
    }

    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        let initrd = self.initrd.as_ref().map(File::try_clone).transpose()?;
        Ok(Self { kernel: self.kernel.try_clone()?, initrd })
    }
}

/// Loads the kernel, the initrd, the command line and all tables into guest memory.
///
/// # Errors
/// When a file is invalid, or does not fit into memory.
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

/// Determines the format of the kernel from its first bytes, and loads it. An invalid file keeps the error of its
/// format.
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

/// The maximum end address of a kernel.
fn kernel_limit(memory: &GuestMemory) -> u64 {
    memory.low_end().0.min(layout::IDENTITY_MAP_END.0)
}

/// Opens a regular file; any other file could block, be endless, or change its length.
fn open(path: &Path) -> Result<File, BootError> {
    let failed = |source| BootError::Read { path: path.into(), source };
    // The type is checked before opening, because opening a FIFO blocks until it has a writer.
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
