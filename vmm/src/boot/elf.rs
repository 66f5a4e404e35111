//! Loading of an uncompressed kernel: an ELF file whose segments are read to their physical addresses.
//!
//! Mapping the segments copy-on-write from the page cache is slower: a booting kernel patches its own code
//! (alternatives, paravirtual calls, lock prefixes) nearly everywhere, so that most pages of code are faulted in one by
//! one and copied. In the exact lab a mapped kernel is loaded 7 ms sooner and reaches init 24 ms later than one that is
//! read into anonymous memory with huge pages.
//!
//! Sources are the chapter "Object Files" of the System V ABI (ELF-64), and the 64-bit boot protocol
//! (Documentation/arch/x86/boot.rst): the kernel's ELF entry point is its 64-bit entry point, and its segments are
//! loaded at their physical addresses.

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
    /// The file is shorter than its headers state.
    #[error("the file is truncated: {what} ends at byte {end}, the file at byte {length}")]
    Truncated {
        /// The truncated part.
        what: &'static str,
        /// End of that part in bytes; the largest number if it overflows.
        end: u64,
        /// Length of the file in bytes.
        length: u64,
    },
    /// The file could not be read.
    #[error("reading it failed: {0}")]
    Read(String),
    /// Not an ELF file.
    #[error("it is not an ELF file")]
    NotElf,
    /// A 32-bit or unknown ELF class.
    #[error("it is a 32-bit ELF file; the guest starts in 64-bit mode")]
    Not64Bit,
    /// A big-endian file.
    #[error("it is a big-endian ELF file")]
    BigEndian,
    /// A program for another processor architecture.
    #[error("it is for another processor (ELF machine {0} instead of 62, x86-64)")]
    Machine(u16),
    /// An object file, a shared library or a position-independent program.
    #[error("it is not an executable (ELF type {0} instead of 2)")]
    NotExecutable(u16),
    /// Program headers that are not plausible for a kernel.
    #[error("its {count} program headers of {size} bytes are not those of a kernel")]
    ProgramHeaders {
        /// Number of program headers.
        count: u16,
        /// Size of a program header in bytes.
        size: u16,
    },
    /// No loadable segment.
    #[error("it has no loadable segment")]
    NoSegments,
    /// A segment larger in the file than in memory, or whose end overflows.
    #[error(
        "the segment at {address:#x} has impossible sizes: {file_size} bytes in the file, {memory_size} in memory"
    )]
    SegmentSize {
        /// Physical address of the segment.
        address: u64,
        /// Length in the file in bytes.
        file_size: u64,
        /// Length in memory in bytes.
        memory_size: u64,
    },
    /// A segment below 1 MiB, where the boot tables are.
    #[error("the segment at {0:#x} lies below 1 MiB, where the boot tables are")]
    SegmentTooLow(u64),
    /// Two overlapping segments.
    #[error("the segments at {first:#x} and {second:#x} overlap")]
    Overlap {
        /// Physical address of the first segment.
        first: u64,
        /// Physical address of the second segment.
        second: u64,
    },
    /// An entry point outside of all segments.
    #[error("its entry point {0:#x} is outside of its segments")]
    Entry(u64),
}

/// The error of loading an ELF kernel.
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

/// A source of bytes that can be read at an offset: a file, or a slice in a test.
pub trait ReadAt {
    /// Fills `buffer` with the bytes at `offset`.
    ///
    /// # Errors
    /// When there are fewer bytes, or they cannot be read.
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
    /// Offset of its bytes in the file.
    pub file_offset: u64,
    /// Length of its bytes in the file.
    pub file_size: u64,
    /// Guest-physical address.
    pub address: u64,
    /// Length in memory in bytes; bytes beyond `file_size` are zero.
    pub memory_size: u64,
}

impl Segment {
    const fn end(&self) -> u64 {
        self.address + self.memory_size
    }
}

/// The headers of a kernel's ELF file, validated such that no sum of its fields overflows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elf {
    /// Physical address of the first instruction.
    pub entry: u64,
    /// The segments in ascending order of their addresses; none is empty, and none overlaps another.
    pub segments: Vec<Segment>,
}

impl Elf {
    /// Reads and validates the headers of a file of `length` bytes.
    ///
    /// # Errors
    /// The first property that is not that of a 64-bit x86 kernel.
    pub fn parse<F: ReadAt + ?Sized>(file: &F, length: u64) -> Result<Self, ElfError> {
        let header: [u8; HEADER_LEN] = read(file, length, "the ELF header", 0)?;
        let (entry, table, count) = parse_header(&header)?;
        let mut segments = Vec::new();
        for index in 0..count {
            // An end that overflows saturates, and is then beyond the end of the file.
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

    /// First address after all segments.
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

/// The segment of a program header; `None` if it is empty or not loadable.
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

/// Reads the segments of a kernel file into guest memory.
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

/// Minimum number of kernel bytes in a huge page that make the huge page worthwhile: clearing it takes about as long as
/// 80 page faults of 4 KiB (exact lab).
const DENSE: u64 = 80 * layout::PAGE_SIZE;

/// The huge pages of guest memory that contain only few bytes of the kernel. The last one is excluded, because the
/// memory after the kernel is used like any other.
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

    /// A tiny kernel: one segment with `code` at 1 MiB, whose bytes are at file offset 4096.
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
    fn sparse_huge_pages_are_found() {
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
    fn errors_name_the_truncated_part() {
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
    fn each_invalid_field_has_its_own_error() {
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
    fn overlapping_segments_are_refused() {
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
    fn segments_of_any_alignment_are_loaded() {
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
            assert!(seen[20_000..].iter().all(|&byte| byte == 0), "bytes after those of the file are zero");
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
        fn no_header_causes_a_panic(
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
