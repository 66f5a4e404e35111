//! An uncompressed kernel: an ELF file whose segments are read to where they run.
//!
//! Mapping the segments copy-on-write from the page cache looks cheaper and is not: a booting
//! kernel patches its own code (alternatives, paravirtual calls, lock prefixes) nearly everywhere,
//! so that most pages of code are faulted in one by one and copied after all. In the exact lab a
//! mapped kernel is loaded 7 ms sooner and reaches init 24 ms later than one that is read into
//! anonymous memory with huge pages.
//!
//! Facts are those of the System V ABI's "Object Files" chapter (ELF-64) and of the 64-bit boot
//! protocol (Documentation/arch/x86/boot.rst): the kernel's ELF entry point is its 64-bit entry,
//! and its segments go to their physical addresses.

use super::Kernel;
use crate::layout;
use crate::memory::{GuestMemory, MemoryError};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use vm_memory::GuestAddress;

pub(super) const MAGIC: [u8; 4] = *b"\x7fELF";
const HEADER_LEN: usize = 64;
const PROGRAM_HEADER_LEN: usize = 56;
/// A kernel has about five program headers.
const PROGRAM_HEADERS_MAX: u16 = 64;

/// Why an ELF file is not a kernel for this machine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ElfError {
    /// The file ends before something it announces.
    #[error("the file is truncated: {what} ends at byte {end}, the file at byte {length}")]
    Truncated {
        /// What is cut off.
        what: &'static str,
        /// Where it would end; the largest number where that overflows.
        end: u64,
        /// Length of the file in bytes.
        length: u64,
    },
    /// The file could not be read.
    #[error("reading it failed: {0}")]
    Read(String),
    /// Not an ELF file at all.
    #[error("it is not an ELF file")]
    NotElf,
    /// A 32-bit or unknown ELF class.
    #[error("it is a 32-bit ELF file; the guest starts in 64-bit mode")]
    Not64Bit,
    /// A big-endian file.
    #[error("it is a big-endian ELF file")]
    BigEndian,
    /// A program for another kind of processor.
    #[error("it is for another processor (ELF machine {0} instead of 62, x86-64)")]
    Machine(u16),
    /// An object file, a shared library or a position-independent program.
    #[error("it is not an executable (ELF type {0} instead of 2)")]
    NotExecutable(u16),
    /// Program headers in a form that no kernel has.
    #[error("its {count} program headers of {size} bytes are not those of a kernel")]
    ProgramHeaders {
        /// How many there are.
        count: u16,
        /// Size of each in bytes.
        size: u16,
    },
    /// No segment at all.
    #[error("it has no loadable segment")]
    NoSegments,
    /// A segment larger in the file than in memory, or whose end overflows.
    #[error(
        "the segment at {address:#x} has impossible sizes: {file_size} bytes in the file, {memory_size} in memory"
    )]
    SegmentSize {
        /// Its physical address.
        address: u64,
        /// Its bytes in the file.
        file_size: u64,
        /// Its bytes in memory.
        memory_size: u64,
    },
    /// A segment below the first MiB, where tables are.
    #[error("the segment at {0:#x} lies below 1 MiB, where the boot tables are")]
    SegmentTooLow(u64),
    /// Two segments in one place.
    #[error("the segments at {first:#x} and {second:#x} overlap")]
    Overlap {
        /// Physical address of the one.
        first: u64,
        /// Physical address of the other.
        second: u64,
    },
    /// An entry point outside every segment.
    #[error("its entry point {0:#x} is in none of its segments")]
    Entry(u64),
}

/// Why an ELF kernel was not loaded.
#[derive(Debug)]
pub(super) enum LoadError {
    Elf(ElfError),
    TooLarge { end: u64 },
    Memory(MemoryError),
}

impl From<ElfError> for LoadError {
    fn from(error: ElfError) -> Self {
        Self::Elf(error)
    }
}

impl From<MemoryError> for LoadError {
    fn from(error: MemoryError) -> Self {
        Self::Memory(error)
    }
}

/// Something that can be read at an offset: a file, or bytes in a test.
pub trait ReadAt {
    /// Fills `buffer` from `offset` on.
    ///
    /// # Errors
    /// When there are not that many bytes, or they cannot be read.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

impl ReadAt for File {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buffer, offset)
    }
}

impl ReadAt for [u8] {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..)?.get(..buffer.len()))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(bytes);
        Ok(())
    }
}

/// A loadable segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where its bytes are in the file.
    pub file_offset: u64,
    /// How many there are.
    pub file_size: u64,
    /// Where they go in guest-physical memory.
    pub address: u64,
    /// How many bytes it takes there; those behind `file_size` are zero.
    pub memory_size: u64,
}

impl Segment {
    const fn end(&self) -> u64 {
        self.address + self.memory_size
    }
}

/// What a kernel's ELF file says: validated, so that no sum of its fields overflows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elf {
    /// Physical address of the first instruction.
    pub entry: u64,
    /// The segments by address; none is empty, none overlaps another.
    pub segments: Vec<Segment>,
}

impl Elf {
    /// Reads and checks the headers of a file of `length` bytes.
    ///
    /// # Errors
    /// Names the first thing that is not as in a 64-bit x86 kernel.
    pub fn parse<F: ReadAt + ?Sized>(file: &F, length: u64) -> Result<Self, ElfError> {
        let header: [u8; HEADER_LEN] = read(file, length, "the ELF header", 0)?;
        let (entry, table, count) = parse_header(&header)?;
        let mut segments = Vec::new();
        for index in 0..count {
            // A table near the end of the 64-bit range saturates, and is then behind the file.
            let offset = table.saturating_add(u64::from(index) * PROGRAM_HEADER_LEN as u64);
            let header: [u8; PROGRAM_HEADER_LEN] = read(file, length, "a program header", offset)?;
            segments.extend(parse_segment(&header, length)?);
        }
        segments.sort_by_key(|segment| segment.address);
        if segments.is_empty() {
            return Err(ElfError::NoSegments);
        }
        for pair in segments.windows(2) {
            if pair[0].end() > pair[1].address {
                return Err(ElfError::Overlap { first: pair[0].address, second: pair[1].address });
            }
        }
        if !segments.iter().any(|segment| (segment.address..segment.end()).contains(&entry)) {
            return Err(ElfError::Entry(entry));
        }
        Ok(Self { entry, segments })
    }

    /// First address behind all segments.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.segments.iter().map(Segment::end).max().unwrap_or(0)
    }
}

fn read<const N: usize, F: ReadAt + ?Sized>(
    file: &F,
    length: u64,
    what: &'static str,
    offset: u64,
) -> Result<[u8; N], ElfError> {
    let end = offset.saturating_add(N as u64);
    if end > length {
        return Err(ElfError::Truncated { what, end, length });
    }
    let mut bytes = [0; N];
    file.read_exact_at(&mut bytes, offset).map_err(|error| ElfError::Read(error.to_string()))?;
    Ok(bytes)
}

fn half(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|index| bytes[at + index]))
}

fn double(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|index| bytes[at + index]))
}

/// Entry point, offset of the program headers and their number.
fn parse_header(header: &[u8; HEADER_LEN]) -> Result<(u64, u64, u16), ElfError> {
    const CLASS_64: u8 = 2;
    const LITTLE_ENDIAN: u8 = 1;
    const EXECUTABLE: u16 = 2;
    const X86_64: u16 = 62;
    if header[..4] != MAGIC {
        return Err(ElfError::NotElf);
    }
    if header[4] != CLASS_64 {
        return Err(ElfError::Not64Bit);
    }
    if header[5] != LITTLE_ENDIAN {
        return Err(ElfError::BigEndian);
    }
    let (kind, machine) = (half(header, 16), half(header, 18));
    if machine != X86_64 {
        return Err(ElfError::Machine(machine));
    }
    if kind != EXECUTABLE {
        return Err(ElfError::NotExecutable(kind));
    }
    let (size, count) = (half(header, 54), half(header, 56));
    if usize::from(size) != PROGRAM_HEADER_LEN || !(1..=PROGRAM_HEADERS_MAX).contains(&count) {
        return Err(ElfError::ProgramHeaders { count, size });
    }
    Ok((double(header, 24), double(header, 32), count))
}

/// The segment that a program header describes, if it is one to load and not empty.
fn parse_segment(header: &[u8; PROGRAM_HEADER_LEN], length: u64) -> Result<Option<Segment>, ElfError> {
    const LOAD: u32 = 1;
    if word(header, 0) != LOAD {
        return Ok(None);
    }
    let segment = Segment {
        file_offset: double(header, 8),
        file_size: double(header, 32),
        address: double(header, 24),
        memory_size: double(header, 40),
    };
    let Segment { file_offset, file_size, address, memory_size } = segment;
    if file_size > memory_size || address.checked_add(memory_size).is_none() {
        return Err(ElfError::SegmentSize { address, file_size, memory_size });
    }
    let end = file_offset.saturating_add(file_size);
    if end > length {
        return Err(ElfError::Truncated { what: "a segment", end, length });
    }
    if memory_size > 0 && address < layout::HIGH_MEMORY.0 {
        return Err(ElfError::SegmentTooLow(address));
    }
    Ok((memory_size > 0).then_some(segment))
}

/// Puts the segments of a kernel file into guest memory.
pub(super) fn load(memory: &GuestMemory, file: &File, length: u64) -> Result<Kernel, LoadError> {
    let elf = Elf::parse(file, length)?;
    let end = elf.end();
    if end > super::kernel_limit(memory) {
        return Err(LoadError::TooLarge { end });
    }
    for region in sparse_regions(&elf.segments) {
        memory.use_small_pages(region)?;
    }
    for segment in &elf.segments {
        memory.read_file(GuestAddress(segment.address), file, segment.file_offset, segment.file_size)?;
    }
    Ok(Kernel { entry: GuestAddress(elf.entry), end: GuestAddress(end), setup_header: None })
}

/// Bytes of a kernel in a huge page from which on the huge page pays: clearing it costs about as much
/// as 80 faults of 4 KiB (exact lab).
const DENSE: u64 = 80 * layout::PAGE_SIZE;

/// The huge pages of guest memory in which a kernel has something, but little. The last one is not
/// among them: what lies behind the kernel there is memory like any other.
fn sparse_regions(segments: &[Segment]) -> Vec<Range<u64>> {
    let mut used: BTreeMap<u64, u64> = BTreeMap::new();
    for segment in segments {
        let mut start = segment.address;
        while start < segment.end() {
            let region = start - start % layout::HUGE_PAGE_SIZE;
            let end = segment.end().min(region + layout::HUGE_PAGE_SIZE);
            *used.entry(region).or_default() += end - start;
            start = end;
        }
    }
    used.pop_last();
    let sparse = used.into_iter().filter(|(_, bytes)| *bytes < DENSE);
    sparse.map(|(region, _)| region..region + layout::HUGE_PAGE_SIZE).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vm_memory::Bytes;

    const MIB: u64 = 1 << 20;

    /// A tiny kernel: one segment of `code` at 1 MiB, its bytes at file offset 4096.
    fn tiny(code: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 4096];
        file[..4].copy_from_slice(b"\x7fELF");
        file[4] = 2;
        file[5] = 1;
        file[16] = 2;
        file[18] = 62;
        file[24..32].copy_from_slice(&MIB.to_le_bytes());
        file[32] = 64;
        file[54] = 56;
        file[56] = 1;
        file[64] = 1;
        let size = code.len() as u64;
        for (at, value) in [(8, 4096), (24, MIB), (32, size), (40, size)] {
            file[64 + at..64 + at + 8].copy_from_slice(&value.to_le_bytes());
        }
        file.extend(code);
        file
    }

    fn parse(bytes: &[u8]) -> Result<Elf, ElfError> {
        Elf::parse(bytes, bytes.len() as u64)
    }

    #[test]
    fn huge_pages_with_little_in_them_are_found() {
        let segment = |address, memory_size| Segment { file_offset: 0, file_size: 0, address, memory_size };
        let segments =
            [segment(16 * MIB, 4 * MIB + 4096), segment(24 * MIB + 4096, MIB), segment(26 * MIB, 1)];
        let regions = sparse_regions(&segments);
        assert_eq!(regions.iter().map(|region| region.start).collect::<Vec<_>>(), [20 * MIB]);
        assert!(sparse_regions(&[]).is_empty());
    }

    #[test]
    fn a_tiny_kernel_is_read() {
        let elf = parse(&tiny(&[0xf4; 10])).unwrap();
        let segment = Segment { file_offset: 4096, file_size: 10, address: MIB, memory_size: 10 };
        assert_eq!(elf, Elf { entry: MIB, segments: vec![segment] });
    }

    #[test]
    fn every_truncation_is_named() {
        let file = tiny(&[0xf4; 10]);
        for length in 0..file.len() {
            let error = parse(&file[..length]).unwrap_err();
            let what = match length {
                0..64 => "the ELF header",
                64..120 => "a program header",
                _ => "a segment",
            };
            assert!(
                matches!(&error, ElfError::Truncated { what: w, length: l, .. } if *w == what && *l == length as u64),
                "{length}: {error}"
            );
        }
    }

    /// Changes one field of a tiny kernel: offset in the file and new bytes.
    fn changed(at: usize, bytes: &[u8]) -> Result<Elf, ElfError> {
        let mut file = tiny(&[0xf4; 10]);
        file[at..at + bytes.len()].copy_from_slice(bytes);
        parse(&file)
    }

    #[test]
    fn each_wrong_field_has_its_error() {
        let max = &u64::MAX.to_le_bytes();
        let size =
            |file_size, memory_size, address| ElfError::SegmentSize { address, file_size, memory_size };
        let table: [(usize, &[u8], ElfError); 14] = [
            (0, b"\x7fELG", ElfError::NotElf),
            (4, &[1], ElfError::Not64Bit),
            (5, &[2], ElfError::BigEndian),
            (16, &[3], ElfError::NotExecutable(3)),
            (18, &[3], ElfError::Machine(3)),
            (54, &[32], ElfError::ProgramHeaders { count: 1, size: 32 }),
            (56, &[0, 0], ElfError::ProgramHeaders { count: 0, size: 56 }),
            (56, &[0xff, 0xff], ElfError::ProgramHeaders { count: 0xffff, size: 56 }),
            (64, &[4], ElfError::NoSegments),
            (64 + 24, max, size(10, 10, u64::MAX)),
            (64 + 40, &[9], size(10, 9, MIB)),
            (64 + 24, &[0, 0xf0, 0x0f], ElfError::SegmentTooLow(0xff000)),
            (24, &[0x0a], ElfError::Entry(MIB + 10)),
            (24, &0_u64.to_le_bytes(), ElfError::Entry(0)),
        ];
        for (at, bytes, expected) in table {
            assert_eq!(changed(at, bytes), Err(expected), "byte {at} = {bytes:?}");
        }
        for (at, what) in [(32, "a program header"), (64 + 8, "a segment")] {
            let error = changed(at, max).unwrap_err();
            let end = u64::MAX;
            assert_eq!(error, ElfError::Truncated { what, end, length: 4106 });
        }
    }

    #[test]
    fn overlapping_segments_are_named() {
        let mut file = tiny(&[0xf4; 10]);
        let header: Vec<u8> = file[64..120].into();
        file[120..176].copy_from_slice(&header);
        file[56] = 2;
        file[120 + 24] = 9;
        let expected = ElfError::Overlap { first: MIB, second: MIB + 9 };
        assert_eq!(parse(&file), Err(expected));
        file[120 + 24] = 10;
        assert_eq!(parse(&file).unwrap().segments.len(), 2);
    }

    fn load_bytes(bytes: &[u8]) -> Result<(GuestMemory, Kernel), LoadError> {
        let memory = GuestMemory::anonymous(16 * MIB).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        let kernel = load(&memory, &file, bytes.len() as u64)?;
        Ok((memory, kernel))
    }

    #[test]
    fn segments_arrive_whatever_their_alignment() {
        let code: Vec<u8> = (0..20_000_u32).map(|index| index.to_le_bytes()[0] ^ 0x5a).collect();
        // Low bits of the address: those of the file offset, or others.
        for (address, offset) in [(0, 4096), (0x123, 4096 + 0x123), (0x10, 4096), (0xfff, 4096 + 0xfff)] {
            let mut bytes = tiny(&[]);
            bytes.resize(offset, 0xee);
            bytes.extend(&code);
            bytes.extend([0xee; 5000]);
            for (at, value) in [
                (24, MIB + address),
                (64 + 8, offset as u64),
                (64 + 24, MIB + address),
                (64 + 32, 20_000),
                (64 + 40, 30_000),
            ] {
                bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
            }
            let (memory, kernel) = load_bytes(&bytes).unwrap();
            let mut seen = vec![0xff; 40_000];
            let start = GuestAddress(MIB + address);
            memory.inner().read_slice(&mut seen, start).unwrap();
            assert_eq!(seen[..20_000], code, "{address:#x}");
            assert!(seen[20_000..].iter().all(|&byte| byte == 0), "behind the file's bytes is zero");
            assert_eq!(kernel.entry, start);
            assert_eq!(kernel.end.0, MIB + address + 30_000);
        }
    }

    #[test]
    fn a_kernel_beyond_memory_is_refused() {
        let mut bytes = tiny(&[0xf4; 10]);
        bytes[64 + 40..64 + 48].copy_from_slice(&(16 * MIB).to_le_bytes());
        let error = load_bytes(&bytes).err();
        assert!(matches!(error, Some(LoadError::TooLarge { end }) if end == 17 * MIB));
    }

    proptest! {
        #[test]
        fn no_header_does_harm(
            changes in prop::collection::vec((0_usize..180, any::<u8>()), 0..12),
            length in 0_usize..5000,
        ) {
            let mut file = tiny(&[0xf4; 10]);
            for (at, byte) in changes {
                file[at] = byte;
            }
            file.resize(length, 0);
            if let Ok(elf) = parse(&file) {
                prop_assert!(elf.segments.iter().all(|segment| segment.address >= MIB));
                let _ = load_bytes(&file);
            }
        }
    }
}
