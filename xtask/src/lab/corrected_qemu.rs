//! A patched copy of QEMU in the cache, whose VMRUN delivers an injected interrupt exactly once.
//!
//! QEMU's `helper_vmrun` (target/i386/tcg/sysemu/svm_helper.c) stores the vector of an interrupt that a hypervisor
//! injects in `CPUState::exception_index`, delivers it with `do_interrupt_x86_hardirq` and does not clear the vector.
//! If the emulator leaves its loop before the guest's next exit, it takes the vector for a new exception and delivers
//! the same interrupt a second time, in the middle of its handler, with interrupts disabled. A handler that holds a
//! spinlock then deadlocks, and the lab hangs. All versions up to 11 have this line.
//!
//! The patch adds one instruction before the delivery: "no exception is pending". The function is exported and is
//! followed by enough padding. The program is patched only if every byte is the expected one.

use crate::cache;
use anyhow::{Context, Result, ensure};
use kindling_vmm::config::image::sha256;
use object::read::elf::ElfFile64;
use object::{LittleEndian, Object, ObjectSegment, ObjectSymbol};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The emulator's file name.
const NAME: &str = "qemu-system-x86_64";

/// The QEMU of a lab: the patched copy, or the installed program if it is not the expected one.
pub(super) fn program() -> PathBuf {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    let choose = || {
        let installed = installed()?;
        patched_copy(&installed, &cache::subdirectory("qemu")?)
            .with_context(|| format!("{} runs unpatched, and a lab may hang", installed.display()))
    };
    let program = PROGRAM.get_or_init(|| {
        choose().unwrap_or_else(|error| {
            eprintln!("{error:#}");
            NAME.into()
        })
    });
    program.clone()
}

/// The first QEMU in `PATH`.
fn installed() -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut files = std::env::split_paths(&path).map(|folder| folder.join(NAME));
    files.find(|file| file.is_file()).with_context(|| format!("{NAME} not found in PATH"))
}

/// The folders with firmware and modules that QEMU looks up relative to its program.
const DATA_FOLDERS: [&str; 2] = ["share", "lib"];

/// The patched copy of `installed`, in a folder named by the original's digest, with links to its [`DATA_FOLDERS`]
/// folders.
fn patched_copy(installed: &Path, cache: &Path) -> Result<PathBuf> {
    let original = fs::read(installed).with_context(|| format!("cannot read {}", installed.display()))?;
    let digest = sha256(&original);
    let target = cache.join(&digest[..32]);
    let program = target.join("bin").join(NAME);
    if program.exists() {
        return Ok(program);
    }
    let _lock = cache::lock(&format!("qemu-{}", &digest[..32]))?;
    if program.exists() {
        return Ok(program);
    }
    let patched = patched(original)?;
    let real = installed.canonicalize()?;
    let prefix = real.parent().and_then(Path::parent).context("the path of QEMU has no prefix")?;
    let draft = cache::Draft::beside(&target)?;
    fs::create_dir(draft.path().join("bin"))?;
    let file = draft.path().join("bin").join(NAME);
    fs::write(&file, patched).with_context(|| format!("cannot write {}", file.display()))?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
    for folder in DATA_FOLDERS {
        symlink(prefix.join(folder), draft.path().join(folder))?;
    }
    draft.publish(&target)?;
    Ok(program)
}

/// The function that delivers a hardware interrupt; its first argument is `CPUX86State`, a part of the `CPUState`.
const DELIVER: &str = "do_interrupt_x86_hardirq";
/// The function to which it jumps at its end.
const DELIVER_ALL: &str = "do_interrupt_all";
/// A function whose first store sets `CPUState::exception_index` to "none".
const LEAVE_LOOP: &str = "cpu_loop_exit_noexc";

/// The opcode of `movl $-1, offset(%rdi)`; offset and value follow.
const STORE: [u8; 2] = [0xc7, 0x87];
const NONE: [u8; 4] = [0xff; 4];
const JUMP: u8 = 0xe9;
/// The length of `movl $-1, offset(%rdi)`.
const STORE_LEN: usize = 10;
/// The length of the function with its padding, which the patched function fills.
const DELIVER_LEN: usize = 32;
/// The offset of the function's last instruction: a jump to [`DELIVER_ALL`] of five bytes.
const JUMP_AT: usize = 17;
const JUMP_END: usize = JUMP_AT + 5;
/// The compiler's padding up to the next function: `cs nopw 0x0(%rax,%rax,1)`.
const PADDING: [u8; DELIVER_LEN - JUMP_END] = [0x66, 0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0];

/// Patches the program; an error says what is unexpected in it.
fn patched(mut program: Vec<u8>) -> Result<Vec<u8>> {
    let (at, code) = {
        let elf = ElfFile64::<LittleEndian>::parse(&*program).context("it is not an ELF program")?;
        let deliver = function(&elf, DELIVER)?;
        let target = function(&elf, DELIVER_ALL)?;
        let leave = function(&elf, LEAVE_LOOP)?;
        let bytes = |function: &Function, length| {
            let end = function.offset.checked_add(length);
            end.and_then(|end| program.get(function.offset..end)).context("a function is truncated")
        };
        let store = exception_index_store(bytes(&leave, 14)?)?;
        let distance = target.address.wrapping_sub(deliver.address);
        (deliver.offset, patched_delivery(bytes(&deliver, DELIVER_LEN)?, store, distance)?)
    };
    program[at..at + DELIVER_LEN].copy_from_slice(&code);
    Ok(program)
}

/// A function of the program.
struct Function {
    address: u64,
    /// The file offset of its code.
    offset: usize,
}

fn function(elf: &ElfFile64<'_, LittleEndian>, name: &str) -> Result<Function> {
    let symbol = elf.dynamic_symbols().find(|symbol| symbol.name() == Ok(name) && symbol.is_definition());
    let address = symbol.with_context(|| format!("the program does not export {name}"))?.address();
    let offset = elf.segments().find_map(|segment| {
        let (start, length) = segment.file_range();
        let inside = address.checked_sub(segment.address()).filter(|inside| *inside < length)?;
        usize::try_from(start.checked_add(inside)?).ok()
    });
    Ok(Function { address, offset: offset.with_context(|| format!("{name} is outside the file"))? })
}

/// The instruction that sets `CPUState::exception_index` to "none", from the start of [`LEAVE_LOOP`]:
/// `sub $8, %rsp`, and the store.
fn exception_index_store(code: &[u8]) -> Result<[u8; STORE_LEN]> {
    let store = code.strip_prefix(&[0x48, 0x83, 0xec, 0x08]);
    let store: Option<[u8; STORE_LEN]> = store.and_then(|code| code.get(..STORE_LEN)?.try_into().ok());
    let expected = |store: &[u8; STORE_LEN]| store.starts_with(&STORE) && store.ends_with(&NONE);
    store.filter(expected).with_context(|| format!("{LEAVE_LOOP} is not as expected"))
}

/// The code of [`DELIVER`] with the store. `distance` is from its start to [`DELIVER_ALL`].
fn patched_delivery(code: &[u8], store: [u8; STORE_LEN], distance: u64) -> Result<[u8; DELIVER_LEN]> {
    let code: &[u8; DELIVER_LEN] = code.try_into()?;
    // mov %edx, %r9d; sub $offset, %rdi (CPUX86State to CPUState); xor %r8d, %r8d; xor %ecx, %ecx; xor %edx, %edx
    let known = code.starts_with(&[0x41, 0x89, 0xd1, 0x48, 0x81, 0xef])
        && code[10..JUMP_AT] == [0x45, 0x31, 0xc0, 0x31, 0xc9, 0x31, 0xd2];
    ensure!(known && code[JUMP_AT] == JUMP && code[JUMP_END..] == PADDING, "{DELIVER} is not as expected");
    let jump = i32::from_le_bytes(code[JUMP_AT + 1..JUMP_END].try_into()?);
    let reached = (JUMP_END as u64).wrapping_add_signed(jump.into());
    ensure!(reached == distance, "{DELIVER} does not jump to {DELIVER_ALL}");
    let moved = jump.checked_sub(i32::try_from(STORE_LEN)?).context("the jump is too long")?;
    let mut patched = [0; DELIVER_LEN];
    patched[..JUMP_AT].copy_from_slice(&code[..JUMP_AT]);
    patched[JUMP_AT..JUMP_AT + STORE_LEN].copy_from_slice(&store);
    patched[JUMP_AT + STORE_LEN] = JUMP;
    patched[JUMP_AT + STORE_LEN + 1..].copy_from_slice(&moved.to_le_bytes());
    Ok(patched)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The functions of QEMU 7.2.22 in Debian 12, at 0x6b0260 and 0x7d7e90; the first jumps to 0x6adfb0.
    const CODE: [u8; DELIVER_LEN] = [
        0x41, 0x89, 0xd1, 0x48, 0x81, 0xef, 0xb0, 0x13, 0, 0, 0x45, 0x31, 0xc0, 0x31, 0xc9, 0x31, 0xd2, 0xe9,
        0x3a, 0xdd, 0xff, 0xff, 0x66, 0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0,
    ];
    const LEAVE: [u8; 14] = [0x48, 0x83, 0xec, 8, 0xc7, 0x87, 4, 3, 0, 0, 0xff, 0xff, 0xff, 0xff];
    const DISTANCE: u64 = 0x6a_dfb0_u64.wrapping_sub(0x6b_0260);

    #[test]
    fn the_store_precedes_the_jump_and_the_jump_keeps_its_target() {
        let store = exception_index_store(&LEAVE).unwrap();
        let patched = patched_delivery(&CODE, store, DISTANCE).unwrap();
        let expected = [
            0x41, 0x89, 0xd1, 0x48, 0x81, 0xef, 0xb0, 0x13, 0, 0, 0x45, 0x31, 0xc0, 0x31, 0xc9, 0x31, 0xd2,
            0xc7, 0x87, 4, 3, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xe9, 0x30, 0xdd, 0xff, 0xff,
        ];
        assert_eq!(patched, expected);
        // 0x6b0260 + 32 - 0x22d0 = 0x6adfb0.
        assert_eq!(0x6b_0260 + 32 + i64::from(i32::from_le_bytes([0x30, 0xdd, 0xff, 0xff])), 0x6a_dfb0);
    }

    #[test]
    fn code_that_differs_in_any_byte_is_not_patched() {
        let store = exception_index_store(&LEAVE).unwrap();
        for at in 0..DELIVER_LEN {
            let mut code = CODE;
            code[at] ^= 0x10;
            // The offset from CPUX86State to CPUState differs between builds and is kept.
            let is_offset = (6..10).contains(&at);
            assert_eq!(patched_delivery(&code, store, DISTANCE).is_ok(), is_offset, "byte {at}");
        }
        assert!(patched_delivery(&CODE, store, DISTANCE + 1).is_err());
        assert!(patched_delivery(&CODE[1..], store, DISTANCE).is_err());
        for at in 0..LEAVE.len() {
            let mut code = LEAVE;
            code[at] ^= 0x10;
            assert_eq!(exception_index_store(&code).is_ok(), (6..10).contains(&at), "byte {at}");
        }
        assert!(exception_index_store(&LEAVE[..13]).is_err());
    }

    #[test]
    fn other_files_are_not_patched() {
        assert!(patched(b"#!/bin/sh\n".to_vec()).is_err());
        let this_program = fs::read("/proc/self/exe").unwrap();
        let error = patched(this_program).unwrap_err();
        assert!(error.to_string().contains(DELIVER), "{error:#}");
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join(NAME);
        fs::write(&file, "#!/bin/sh\n").unwrap();
        assert!(patched_copy(&file, scratch.path()).is_err());
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1, "no partial copy is left");
    }
}
