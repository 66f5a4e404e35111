//! Packs a vmlinux for an image: only its loadable content.
//!
//! The linker aligns text, entry code, read-only data and data to 2 MiB, in memory and in the file, so that more than
//! half of a `vmlinux` is padding. A monitor would read the padding and touch huge pages of guest memory for it. The
//! packed file has the same segments at the same addresses, without long runs of padding.

use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::Path;

const HEADER_LEN: usize = 64;
const PROGRAM_HEADER_LEN: usize = 56;
const LOAD: u32 = 1;
const NOTE: u32 = 4;
const PAGE: usize = 4096;
/// The minimal length of a run of padding at which a segment is split.
const LONG_RUN: usize = 64 * 1024;
/// The linker's padding of text (arch/x86/kernel/vmlinux.lds.S): INT3, which is never executed.
const TEXT_PADDING: u8 = 0xcc;

/// A program header, with the bytes that it describes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Segment<'a> {
    kind: u32,
    flags: u32,
    virtual_address: u64,
    physical_address: u64,
    bytes: &'a [u8],
    memory_size: u64,
}

/// Packs the kernel `built` into `packed`.
pub(crate) fn pack(built: &Path, packed: &Path) -> Result<()> {
    let file = fs::read(built).with_context(|| format!("cannot read {}", built.display()))?;
    let bytes = packed_bytes(&file).with_context(|| format!("{} is not a kernel", built.display()))?;
    fs::write(packed, bytes).with_context(|| format!("cannot write {}", packed.display()))
}

fn packed_bytes(file: &[u8]) -> Result<Vec<u8>> {
    let segments = read_segments(file)?;
    let mut parts: Vec<Segment<'_>> =
        segments.iter().filter(|segment| segment.kind == LOAD).flat_map(split).collect();
    let loaded = parts.len();
    parts.extend(segments.into_iter().filter(|segment| segment.kind == NOTE));

    let mut out = file[..HEADER_LEN].to_vec();
    set(&mut out, 32, &(HEADER_LEN as u64).to_le_bytes());
    set(&mut out, 56, &u16::try_from(parts.len())?.to_le_bytes());
    // No sections: their table's offset, entry size, number and name table.
    set(&mut out, 40, &[0; 8]);
    set(&mut out, 58, &[0; 6]);
    out.resize((HEADER_LEN + parts.len() * PROGRAM_HEADER_LEN).next_multiple_of(PAGE), 0);
    let mut offsets: Vec<u64> = Vec::new();
    for part in &parts[..loaded] {
        offsets.push(out.len() as u64);
        out.extend(part.bytes);
        out.resize(out.len().next_multiple_of(PAGE), 0);
    }
    for note in &parts[loaded..] {
        let inside = parts[..loaded].iter().zip(&offsets).find_map(|(part, offset)| {
            let start = note.virtual_address.checked_sub(part.virtual_address)?;
            (start + note.bytes.len() as u64 <= part.bytes.len() as u64).then_some(offset + start)
        });
        offsets.push(inside.context("its notes are outside its loadable segments")?);
    }
    for (index, (part, offset)) in parts.iter().zip(offsets).enumerate() {
        let header = program_header(part, offset);
        set(&mut out, HEADER_LEN + index * PROGRAM_HEADER_LEN, &header);
    }
    Ok(out)
}

fn set(out: &mut [u8], at: usize, bytes: &[u8]) {
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn read_segments(file: &[u8]) -> Result<Vec<Segment<'_>>> {
    ensure!(file.len() >= HEADER_LEN && file[..5] == *b"\x7fELF\x02", "it is not a 64-bit ELF file");
    let table = usize::try_from(number(&file[32..40]))?;
    let count = usize::try_from(number(&file[56..58]))?;
    let headers = table
        .checked_add(count * PROGRAM_HEADER_LEN)
        .and_then(|end| file.get(table..end))
        .context("its program headers are truncated")?;
    let mut segments = Vec::new();
    for header in headers.chunks_exact(PROGRAM_HEADER_LEN) {
        let field = |at: usize| number(&header[at..at + 8]);
        let (offset, size) = (usize::try_from(field(8))?, usize::try_from(field(32))?);
        let bytes = offset.checked_add(size).and_then(|end| file.get(offset..end));
        let (kind, flags) = (u32::try_from(number(&header[..4]))?, u32::try_from(number(&header[4..8]))?);
        if [LOAD, NOTE].contains(&kind) {
            segments.push(Segment {
                kind,
                flags,
                virtual_address: field(16),
                physical_address: field(24),
                bytes: bytes.context("a segment is truncated")?,
                memory_size: field(40),
            });
        }
    }
    if !segments.iter().any(|segment| segment.kind == LOAD) {
        bail!("it has no loadable segment");
    }
    Ok(segments)
}

/// Whether a page consists of padding. Zeroes need no file content, because guest memory is initially zero, and the
/// padding of text is never used.
fn is_padding(page: &[u8]) -> bool {
    page.iter().all(|&byte| byte == 0) || page.iter().all(|&byte| byte == TEXT_PADDING)
}

/// Splits a segment at long runs of padding. The last part keeps the segment's end in memory.
fn split<'a>(segment: &Segment<'a>) -> Vec<Segment<'a>> {
    let mut parts: Vec<(usize, usize)> = Vec::new();
    for (index, page) in segment.bytes.chunks(PAGE).enumerate() {
        if is_padding(page) {
            continue;
        }
        let (start, end) = (index * PAGE, index * PAGE + page.len());
        match parts.last_mut() {
            Some(part) if start - part.1 < LONG_RUN => part.1 = end,
            _ => parts.push((start, end)),
        }
    }
    if parts.is_empty() {
        parts.push((0, 0));
    }
    let last = parts.len() - 1;
    let part = |(index, &(start, end)): (usize, &(usize, usize))| Segment {
        virtual_address: segment.virtual_address + start as u64,
        physical_address: segment.physical_address + start as u64,
        bytes: &segment.bytes[start..end],
        memory_size: if index == last { segment.memory_size - start as u64 } else { (end - start) as u64 },
        ..segment.clone()
    };
    parts.iter().enumerate().map(part).collect()
}

fn program_header(segment: &Segment<'_>, offset: u64) -> [u8; PROGRAM_HEADER_LEN] {
    let mut header = [0; PROGRAM_HEADER_LEN];
    set(&mut header, 0, &segment.kind.to_le_bytes());
    set(&mut header, 4, &segment.flags.to_le_bytes());
    let alignment = if segment.kind == LOAD { PAGE as u64 } else { 4 };
    let fields = [
        offset,
        segment.virtual_address,
        segment.physical_address,
        segment.bytes.len() as u64,
        segment.memory_size,
        alignment,
    ];
    for (index, field) in fields.into_iter().enumerate() {
        set(&mut header, 8 + index * 8, &field.to_le_bytes());
    }
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel with one segment at 16 MiB, 32 KiB longer in memory than in the file, and a note
    /// at `note`, as an offset into the segment.
    fn kernel(content: &[u8], note: usize) -> Vec<u8> {
        let mut file = vec![0; PAGE];
        file[..5].copy_from_slice(b"\x7fELF\x02");
        set(&mut file, 32, &64_u64.to_le_bytes());
        set(&mut file, 40, &[0xff; 8]);
        set(&mut file, 56, &2_u16.to_le_bytes());
        let load = Segment {
            kind: LOAD,
            flags: 5,
            virtual_address: 0xffff_ffff_8100_0000,
            physical_address: 0x100_0000,
            bytes: content,
            memory_size: content.len() as u64 + 32_768,
        };
        let start = note as u64;
        let note = Segment {
            kind: NOTE,
            virtual_address: load.virtual_address + start,
            bytes: &content[note..note + 8],
            memory_size: 8,
            ..load.clone()
        };
        set(&mut file, 64, &program_header(&load, PAGE as u64));
        set(&mut file, 64 + 56, &program_header(&note, PAGE as u64 + start));
        file.extend(content);
        file
    }

    /// The address and value of every loaded byte that is not padding.
    fn memory(file: &[u8]) -> Vec<(u64, u8)> {
        let mut bytes: Vec<_> = read_segments(file)
            .unwrap()
            .iter()
            .filter(|segment| segment.kind == LOAD)
            .flat_map(|segment| (segment.physical_address..).zip(segment.bytes.iter().copied()))
            .filter(|(_, byte)| ![0, TEXT_PADDING].contains(byte))
            .collect();
        bytes.sort_unstable();
        bytes
    }

    #[test]
    fn a_packed_kernel_loads_the_same_memory_without_long_padding() {
        let mut content = vec![0; 1 << 20];
        content[400_000..600_000].fill(TEXT_PADDING);
        for at in [0, 5000, 300_000, 300_007, 700_000, (1 << 20) - 10] {
            content[at] = 7;
        }
        let file = kernel(&content, 300_000);
        let packed = packed_bytes(&file).unwrap();
        assert_eq!(memory(&packed), memory(&file));
        assert!(packed.len() < 64 * 1024, "{}", packed.len());
        let segments = read_segments(&packed).unwrap();
        let end = segments.iter().map(|s| s.physical_address + s.memory_size).max();
        assert_eq!(end, Some(0x100_0000 + (1 << 20) + 32_768));
        let note = segments.iter().find(|segment| segment.kind == NOTE).unwrap();
        assert_eq!(note.bytes, &content[300_000..300_008]);
    }

    #[test]
    fn files_that_are_not_kernels_are_refused() {
        let file = kernel(&[1; 100], 0);
        for length in 0..file.len() {
            assert!(packed_bytes(&file[..length]).is_err(), "{length}");
        }
        assert!(packed_bytes(b"not ELF").is_err());
    }
}
