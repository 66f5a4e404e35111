//! When functions of a guest's kernel are first called, on the VMM's clock.
//!
//! The first byte of each function is replaced by `out dx, al`, which leaves the guest with the
//! instruction pointer at the function. The byte is put back and the function runs: one exit each,
//! and none where it is called again. A breakpoint (INT3) would do as well on hardware, but QEMU's
//! emulation of SVM does not intercept it: it raises the exception inside the guest, so that the lab
//! would have no marks. The kernel's own INT3s stay its own this way, too.
//!
//! No port is reserved for this. Whatever DX holds, an exit is a mark when the instruction pointer
//! says so; only the ports that KVM answers itself would be lost, and a machine without the PC's
//! interrupt controllers has none of them.

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

/// Functions that a boot can have marked; a kernel has some hundreds of initcalls.
pub const FUNCTIONS_MAX: usize = 4096;
/// Bytes of a file with that many addresses, and their names beside them.
const FILE_MAX: u64 = 256 * 1024;
/// `out dx, al`.
const OUT: u8 = 0xee;
/// Where x86-64 kernels map their own image (`__START_KERNEL_map`).
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
        /// What the host said.
        source: io::Error,
    },
    /// The kernel's file does not say where its functions are.
    #[error("functions can be marked in an uncompressed kernel (vmlinux) only; {} is none: {source}", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ElfError,
    },
    /// An address that is not one of the kernel's code.
    #[error(
        "{0:#x} is no address in this kernel's segments: take addresses from the System.map beside its vmlinux"
    )]
    Outside(u64),
    /// Too many addresses.
    #[error("{0} functions are too many to mark; name at most {FUNCTIONS_MAX}")]
    TooMany(usize),
    /// KVM would keep some of the marks for itself.
    #[error(
        "functions can be marked in images only (--image): with a PC's interrupt controllers some would be lost"
    )]
    Controllers,
    /// Guest memory cannot be read or written there.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// Reads a list of functions: a line each, the address in hexadecimal digits and then anything.
///
/// # Errors
/// Names the file and the line that is wrong.
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
    /// What belongs at each physical address; `None` once it is back there.
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
            // A function that begins with this very instruction, or that is named twice, has no mark
            // of its own.
            if byte != [OUT] {
                memory.write(GuestAddress(address), &[OUT])?;
                first_bytes.insert(address, Some(byte[0]));
            }
        }
        Ok(Self { memory: memory.clone(), first_bytes: Mutex::new(first_bytes) })
    }

    /// Whether the instruction at this address was a mark; its function is whole again. Two vCPUs
    /// may have met it at once, and then it was one for both.
    pub(crate) fn remove(&self, instruction: u64) -> bool {
        let address = physical(instruction);
        let mut first_bytes = lock(&self.first_bytes);
        let Some(entry) = first_bytes.get_mut(&address) else { return false };
        // Guest memory that was there when the mark was planted is there still.
        entry.take().is_none_or(|byte| self.memory.write(GuestAddress(address), &[byte]).is_ok())
    }
}

fn headers(path: &Path) -> Result<Elf, MarkError> {
    let failed = |source| MarkError::Read { path: path.into(), source };
    let file = File::open(path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    Elf::parse(&file, length).map_err(|source| MarkError::Kernel { path: path.into(), source })
}

/// The physical address of an instruction of the kernel, which runs at physical addresses at first.
const fn physical(address: u64) -> u64 {
    if address < KERNEL_MAP { address } else { address - KERNEL_MAP }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u64 = 0x10_0000;

    /// An ELF file with one segment of these bytes at 1 MiB, as the System V ABI describes it.
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
    fn marks_are_planted_and_each_goes_away_when_it_is_met() {
        let directory = tempfile::tempdir().unwrap();
        let code = [0x55, 0x53, OUT, 0xc3];
        let (source, memory) = (kernel(directory.path(), &code), memory(&code));
        let start = KERNEL_MAP + START;
        let marks =
            FunctionMarks::plant(&memory, &source, &[start, start + 1, start + 1, start + 2]).unwrap();
        assert_eq!(content(&memory), [OUT, OUT, OUT, 0xc3]);
        assert!(marks.remove(start + 1));
        assert_eq!(content(&memory), [OUT, 0x53, OUT, 0xc3]);
        // Another vCPU met it as well, and the first instructions of a kernel run unmapped.
        assert!(marks.remove(start + 1));
        assert!(marks.remove(START));
        assert_eq!(content(&memory), code);
        // What the kernel itself has there is not ours.
        assert!(!marks.remove(start + 2));
        assert!(!marks.remove(start + 3));
    }

    #[test]
    fn what_is_no_function_of_the_kernel_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let source = kernel(directory.path(), &[0x90; 4]);
        let memory = memory(&[0x90; 4]);
        for address in [0, START, KERNEL_MAP, KERNEL_MAP + START - 1, KERNEL_MAP + START + 4, u64::MAX] {
            let error = FunctionMarks::plant(&memory, &source, &[address]).unwrap_err().to_string();
            assert!(error.contains(&format!("{address:#x} is no address")), "{error}");
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
    fn lists_are_read_and_their_mistakes_named() {
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
