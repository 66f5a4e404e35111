//! The smallest payload: it prints one line and exits, or waits for a byte of standard input before it exits.

/// The line that the payload prints, without its end: the console's terminal inserts a carriage return there.
pub(super) const TEXT: &str = "the payload runs";
/// The payload's path in the guest.
pub(crate) const PATH: &str = "/bin/payload";
/// The path of the payload that exercises devices.
pub(crate) const IO_PATH: &str = "/bin/io-payload";
/// The argument that makes it wait for a byte of standard input.
pub(super) const WAIT: &str = "wait";

/// The load address of the file.
const ADDRESS: u64 = 0x40_0000;
/// Sizes of the ELF header and of the program header, which the code follows.
const HEADERS: u64 = 64 + 56;

/// The program: an ELF file (System V ABI) with one segment.
pub(super) fn program() -> Vec<u8> {
    let code = code();
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(16, 0);
    bytes.extend(2_u16.to_le_bytes()); // executable
    bytes.extend(62_u16.to_le_bytes()); // x86-64
    bytes.extend(1_u32.to_le_bytes());
    for value in [ADDRESS + HEADERS, 64, 0] {
        bytes.extend(value.to_le_bytes()); // entry, program headers, section headers
    }
    bytes.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 0, 0, 0] {
        bytes.extend(half.to_le_bytes());
    }
    let size = HEADERS + code.len() as u64;
    bytes.extend(1_u32.to_le_bytes()); // load
    bytes.extend(5_u32.to_le_bytes()); // read and execute
    for value in [0, ADDRESS, ADDRESS, size, size, 4096] {
        bytes.extend(value.to_le_bytes());
    }
    bytes.extend(code);
    bytes
}

/// The instructions, followed by the text.
fn code() -> Vec<u8> {
    let length = TEXT.len().to_le_bytes()[0] + 1;
    let instructions: [&[u8]; 16] = [
        &[0x8b, 0x1c, 0x24],              // mov ebx, [rsp]: the number of arguments
        &[0xb8, 1, 0, 0, 0],              // mov eax, 1: write
        &[0xbf, 1, 0, 0, 0],              // mov edi, 1
        &[0x48, 0x8d, 0x35, 35, 0, 0, 0], // lea rsi, [rip + 35]: the text
        &[0xba, length, 0, 0, 0],         // mov edx, length
        &[0x0f, 0x05],                    // syscall
        &[0x83, 0xfb, 1],                 // cmp ebx, 1
        &[0x74, 14],                      // je over the read
        &[0x31, 0xc0],                    // xor eax, eax: read
        &[0x31, 0xff],                    // xor edi, edi
        &[0x48, 0x89, 0xe6],              // mov rsi, rsp
        &[0xba, 1, 0, 0, 0],              // mov edx, 1
        &[0x0f, 0x05],                    // syscall
        &[0xb8, 60, 0, 0, 0],             // mov eax, 60: exit
        &[0x31, 0xff],                    // xor edi, edi
        &[0x0f, 0x05],                    // syscall
    ];
    [&instructions.concat(), TEXT.as_bytes(), b"\n"].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;
    use std::process::{Command, Stdio};

    #[test]
    fn the_payload_prints_its_line_and_exits_or_waits_for_a_byte() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("payload");
        std::fs::write(&path, program()).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        // A shell retries the start: another test's fork may still hold the file open for writing (ETXTBSY).
        let run = |argument: &str| {
            let program = path.display();
            let script =
                format!("for i in 1 2 3 4 5; do {program} {argument} && exit; sleep 0.1; done; exit 1");
            let mut command = Command::new("sh");
            command.args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped());
            command.stderr(Stdio::null()).spawn().unwrap()
        };
        let mut speaking = run("");
        // Its standard input stays open, so that a read would block.
        let input = speaking.stdin.take();
        let ended = (0..500).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            speaking.try_wait().unwrap().is_some()
        });
        drop(input);
        assert!(ended, "it waits for input");
        let output = speaking.wait_with_output().unwrap();
        assert!(output.status.success());
        assert_eq!(String::from_utf8_lossy(&output.stdout), format!("{TEXT}\n"));

        let mut waiting = run(WAIT);
        let mut line = String::new();
        let mut reader = std::io::BufReader::new(waiting.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut reader, &mut line).unwrap();
        assert_eq!(line.trim_end(), TEXT);
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(waiting.try_wait().unwrap().is_none(), "it waits");
        waiting.stdin.take().unwrap().write_all(b"\n").unwrap();
        assert!(waiting.wait().unwrap().success());
    }
}
