//! Recording the first calls of kernel functions, on the VMM's clock.
//!
//! The first byte of each function is replaced by `out dx, al`, which causes an exit with the instruction pointer at
//! the function. The VMM restores the byte and the function runs: one exit per function, and none for later calls. A
//! breakpoint (INT3) would also work on hardware, but QEMU's emulation of SVM does not intercept it: the exception is
//! raised inside the guest, so that marks would not work in the lab. Besides, the INT3 instructions of the kernel
//! itself are not affected.
//!
//! No port is reserved. Whatever DX contains, an exit is a mark if its instruction pointer is that of a mark; only
//! accesses to ports that KVM handles itself would be lost, and a machine without the PC's interrupt controllers has
//! none.

use crate::boot::elf::{Elf, ElfError};
use crate::bus::lock;
use crate::config::{BootSource, ConfigError, InterruptControllers, read_bounded};
use crate::memory::{GuestMemory, MemoryError};
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use vm_memory::GuestAddress;

/// Maximum number of marked functions; a kernel has some hundreds of initcalls.
pub const FUNCTIONS_MAX: usize = 4096;
/// Maximum size in bytes of a file with that many addresses and names.
const FILE_MAX: u64 = 256 * 1024;
/// `out dx, al`.
const OUT: u8 = 0xee;
/// Virtual base address of the kernel image of x86-64 kernels (`__START_KERNEL_map`).
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

/// Why functions of a kernel cannot be marked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MarkError {
    /// The kernel's file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
    /// The kernel's file does not contain the addresses of its segments.
    #[error("functions can be marked in an uncompressed kernel (vmlinux) only; {} is not one", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: ElfError,
    },
    /// An address outside of the kernel's segments.
    #[error(
        "{0:#x} is not an address in this kernel's segments: take addresses from the System.map beside its vmlinux"
    )]
    Outside(u64),
    /// Too many addresses.
    #[error("{0} functions are too many to mark; name at most {FUNCTIONS_MAX}")]
    TooMany(usize),
    /// The machine has interrupt controllers whose ports KVM handles itself.
    #[error(
        "functions can be marked in images only (--image): with a PC's interrupt controllers some would be lost"
    )]
    Controllers,
    /// Guest memory is not accessible at the address.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// Reads a list of functions: one per line, which starts with the virtual address in hexadecimal digits; the rest of
/// the line is ignored.
///
/// # Errors
/// Names the file and the invalid line.
pub fn functions_from_file(path: &Path) -> Result<Vec<u64>, ConfigError> {
    let bytes = read_bounded(path, FILE_MAX)?;
    let address = |(number, line): (usize, &str)| {
        let word = line.split_whitespace().next()?;
        let digits = word.strip_prefix("0x").unwrap_or(word);
        Some(u64::from_str_radix(digits, 16).map_err(|_| ConfigError::Json {
            path: path.into(),
            message: format!("line {} does not begin with a hexadecimal address", number + 1),
        }))
    };
    String::from_utf8_lossy(&bytes).lines().enumerate().filter_map(address).collect()
}

/// The marked functions of a kernel in guest memory.
#[derive(Debug)]
pub(crate) struct FunctionMarks {
    memory: GuestMemory,
    /// The original byte at each physical address; `None` once it has been restored.
    first_bytes: Mutex<HashMap<u64, Option<u8>>>,
}

impl FunctionMarks {
    /// Marks functions of the kernel that was loaded into `memory`.
    pub(crate) fn plant(
        memory: &GuestMemory,
        source: &BootSource,
        functions: &[u64],
    ) -> Result<Self, MarkError> {
        if source.interrupt_controllers != InterruptControllers::IoApic {
            return Err(MarkError::Controllers);
        }
        if functions.len() > FUNCTIONS_MAX {
            return Err(MarkError::TooMany(functions.len()));
        }
        let elf = headers(&source.kernel_image_path)?;
        let mut first_bytes = HashMap::new();
        for &function in functions {
            let address = physical(function);
            let in_file = elf.segments.iter().any(|segment| {
                (segment.address..segment.address.saturating_add(segment.file_size)).contains(&address)
            });
            if function < KERNEL_MAP || !in_file {
                return Err(MarkError::Outside(function));
            }
            let mut byte = [0];
            memory.read(GuestAddress(address), &mut byte)?;
            // A function that begins with this instruction is not marked, and one that is named twice is marked once.
            if byte != [OUT] {
                memory.write(GuestAddress(address), &[OUT])?;
                first_bytes.insert(address, Some(byte[0]));
            }
        }
        Ok(Self { memory: memory.clone(), first_bytes: Mutex::new(first_bytes) })
    }

    /// Whether the instruction at this address was a mark, whose original byte has been restored. If two vCPUs execute
    /// it concurrently, it is a mark for both.
    pub(crate) fn remove(&self, instruction: u64) -> bool {
        let address = physical(instruction);
        let mut first_bytes = lock(&self.first_bytes);
        let Some(entry) = first_bytes.get_mut(&address) else { return false };
        // Guest memory that existed when the mark was set still exists.
        entry.take().is_none_or(|byte| self.memory.write(GuestAddress(address), &[byte]).is_ok())
    }
}

fn headers(path: &Path) -> Result<Elf, MarkError> {
    let failed = |source| MarkError::Read { path: path.into(), source };
    let file = File::open(path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    Elf::parse(&file, length).map_err(|source| MarkError::Kernel { path: path.into(), source })
}

/// The physical address of an instruction of the kernel, which initially runs at physical addresses.
const fn physical(address: u64) -> u64 {
    if address < KERNEL_MAP { address } else { address - KERNEL_MAP }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u64 = 0x10_0000;

    /// An ELF file with one segment of these bytes at 1 MiB, as specified by the System V ABI.
    fn kernel(directory: &Path, code: &[u8]) -> BootSource {
        let mut file = vec![0; 4096];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        (file[16], file[18], file[32], file[54], file[56], file[64]) = (2, 62, 64, 56, 1, 1);
        let size = code.len() as u64;
        for (at, value) in [(24, START), (72, 4096), (88, START), (96, size), (104, size + 4096)] {
            file[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        file.extend(code);
        let path = directory.join("vmlinux");
        std::fs::write(&path, file).unwrap();
        let interrupt_controllers = InterruptControllers::IoApic;
        BootSource { interrupt_controllers, ..BootSource::kernel(path) }
    }

    fn memory(code: &[u8]) -> GuestMemory {
        let memory = GuestMemory::anonymous(16 << 20).unwrap();
        memory.write(GuestAddress(START), code).unwrap();
        memory
    }

    fn content(memory: &GuestMemory) -> [u8; 4] {
        let mut bytes = [0; 4];
        memory.read(GuestAddress(START), &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn marks_are_set_and_removed_on_the_first_call() {
        let directory = tempfile::tempdir().unwrap();
        let code = [0x55, 0x53, OUT, 0xc3];
        let (source, memory) = (kernel(directory.path(), &code), memory(&code));
        let start = KERNEL_MAP + START;
        let marks =
            FunctionMarks::plant(&memory, &source, &[start, start + 1, start + 1, start + 2]).unwrap();
        assert_eq!(content(&memory), [OUT, OUT, OUT, 0xc3]);
        assert!(marks.remove(start + 1));
        assert_eq!(content(&memory), [OUT, 0x53, OUT, 0xc3]);
        // Another vCPU executes it as well, and the first instructions of a kernel run at physical addresses.
        assert!(marks.remove(start + 1));
        assert!(marks.remove(START));
        assert_eq!(content(&memory), code);
        // An `out` of the kernel itself is not a mark.
        assert!(!marks.remove(start + 2));
        assert!(!marks.remove(start + 3));
    }

    #[test]
    fn errors_name_invalid_addresses() {
        let directory = tempfile::tempdir().unwrap();
        let source = kernel(directory.path(), &[0x90; 4]);
        let memory = memory(&[0x90; 4]);
        for address in [0, START, KERNEL_MAP, KERNEL_MAP + START - 1, KERNEL_MAP + START + 4, u64::MAX] {
            let error = FunctionMarks::plant(&memory, &source, &[address]).unwrap_err().to_string();
            assert!(error.contains(&format!("{address:#x} is not an address")), "{error}");
        }
        assert_eq!(content(&memory), [0x90; 4]);
        let many = vec![KERNEL_MAP + START; FUNCTIONS_MAX + 1];
        let error = FunctionMarks::plant(&memory, &source, &many).unwrap_err().to_string();
        assert!(error.starts_with("4097 functions are too many"), "{error}");
        let pc = BootSource { interrupt_controllers: InterruptControllers::Pc, ..source.clone() };
        assert!(matches!(FunctionMarks::plant(&memory, &pc, &[]), Err(MarkError::Controllers)));
        std::fs::write(&source.kernel_image_path, "MZ").unwrap();
        let error = FunctionMarks::plant(&memory, &source, &[]).unwrap_err();
        assert!(matches!(error, MarkError::Kernel { .. }), "{error}");
    }

    #[test]
    fn lists_are_parsed_and_errors_name_the_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("functions");
        std::fs::write(&path, "ffffffff81000000 T _text\n\n0x10\n").unwrap();
        assert_eq!(functions_from_file(&path).unwrap(), [0xffff_ffff_8100_0000, 0x10]);
        for (text, line) in [("_text", 1), ("10\n-1\n", 2), ("10000000000000000", 1)] {
            std::fs::write(&path, text).unwrap();
            let error = functions_from_file(&path).unwrap_err().to_string();
            assert!(error.contains(&format!("line {line} does not begin with")), "{error}");
        }
        std::fs::write(&path, " ".repeat(300_000)).unwrap();
        assert!(matches!(functions_from_file(&path), Err(ConfigError::FileTooLarge { .. })));
    }
}
