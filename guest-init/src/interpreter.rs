//! The interpreter of a script or the dynamic loader of an ELF program, for error messages: execve fails with ENOENT
//! without telling whether the program or its interpreter is missing.

/// Bytes of a program that are examined. The kernel reads 256 bytes of a script; linkers place the name of the
/// dynamic loader after the ELF headers.
pub const HEAD: usize = 4096;

/// The path after `#!`, or the dynamic loader of a 64-bit ELF program, if the first bytes contain it.
#[must_use]
pub fn of(head: &[u8]) -> Option<&[u8]> {
    match head {
        [b'#', b'!', line @ ..] => {
            let line = line.split(|&byte| byte == b'\n').next()?.trim_ascii_start();
            line.split(|byte| matches!(byte, b' ' | b'\t')).next().filter(|path| !path.is_empty())
        }
        [0x7f, b'E', b'L', b'F', 2, 1, ..] => loader(head),
        _ => None,
    }
}

/// Reads PT_INTERP, by `struct elf64_hdr` and `struct elf64_phdr` of linux/elf.h.
fn loader(elf: &[u8]) -> Option<&[u8]> {
    const INTERPRETER: [u8; 4] = 3_u32.to_le_bytes();
    let short = |at: usize| elf.get(at..)?.first_chunk().copied().map(u16::from_le_bytes).map(usize::from);
    let long = |at: usize| {
        let bytes = elf.get(at..)?.first_chunk().copied()?;
        usize::try_from(u64::from_le_bytes(bytes)).ok()
    };
    let (table, size, count) = (long(32)?, short(54)?, short(56)?);
    let mut headers = (0..count).filter_map(|number| table.checked_add(size.checked_mul(number)?));
    let header = headers.find(|&at| elf.get(at..).is_some_and(|header| header.starts_with(&INTERPRETER)))?;
    let (offset, length) = (long(header.checked_add(8)?)?, long(header.checked_add(32)?)?);
    let name = elf.get(offset..offset.checked_add(length)?)?;
    name.strip_suffix(b"\0").filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    #[test]
    fn scripts_name_their_interpreter() {
        for (head, expected) in [
            (&b"#!/bin/bash\necho"[..], Some(&b"/bin/bash"[..])),
            (b"#! /usr/bin/env -S x\n", Some(b"/usr/bin/env")),
            (b"#!\n", None),
            (b"#!", None),
            (b"echo", None),
            (b"", None),
        ] {
            assert_eq!(of(head), expected, "{head:?}");
        }
    }

    /// An ELF header, a program header of another type, a PT_INTERP header, and the loader's path.
    fn elf() -> Vec<u8> {
        let mut bytes = vec![0; 64 + 2 * 56];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        (bytes[32], bytes[54], bytes[56]) = (64, 56, 2);
        bytes[64] = 6;
        bytes[120] = 3;
        (bytes[128], bytes[152]) = (176, 7);
        bytes.extend(b"/ld.so\0");
        bytes
    }

    #[test]
    fn programs_name_their_loader() {
        assert_eq!(of(&elf()), Some(&b"/ld.so"[..]));
        for length in 0..elf().len() {
            assert_eq!(of(&elf()[..length]), None, "{length}");
        }
    }

    proptest! {
        #[test]
        fn any_program_is_parsed_without_panic(changes in prop::collection::vec((0..elf().len(), any::<u8>()), 0..16)) {
            let mut bytes = elf();
            for (at, byte) in changes {
                bytes[at] = byte;
            }
            let _ = of(&bytes);
        }
    }
}
