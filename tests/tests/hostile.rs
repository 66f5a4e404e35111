//! Hostile guests: the VMM's memory does not grow, and the VMM can always be stopped.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tests::machine_code::{exit, kernel};
use tests::{Started, TIMEOUT, kindling, run, start};

fn command(code: &[u8]) -> (tempfile::NamedTempFile, Command) {
    let kernel = kernel(code);
    let mut command = kindling();
    command.args(["boot", "--console", "null", "--kernel"]).arg(kernel.path()).stdin(Stdio::null());
    (kernel, command)
}

/// Anonymous memory of the process in KiB, guest memory included. File mappings are not counted, because the host maps
/// the program's code 16 pages at a time as more of it is executed.
fn anonymous_kib(started: &Started) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", started.child.id())).unwrap();
    let kib = text.lines().find_map(|line| line.strip_prefix("Anonymous:")).unwrap();
    kib.trim().trim_end_matches(" kB").parse().unwrap()
}

/// User and system time of the process in clock ticks, which grows while the guest runs.
fn cpu_time(started: &Started) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/stat", started.child.id())).unwrap();
    let fields: Vec<&str> = text.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

/// Waits until the guest has used 0.2 s of processor time.
fn wait_for_cpu_time(started: &Started) {
    let start = cpu_time(started);
    let ticks = 20;
    while cpu_time(started) < start + ticks {
        std::thread::yield_now();
    }
}

/// Runs a guest that never ends: memory does not grow, and SIGTERM stops it within a second.
#[track_caller]
fn memory_is_bounded_and_sigterm_stops(code: &[u8]) {
    let (_kernel, mut command) = command(code);
    let started = start(&mut command);
    wait_for_cpu_time(&started);
    let before = anonymous_kib(&started);
    wait_for_cpu_time(&started);
    let after = anonymous_kib(&started);
    let signalled = Instant::now();
    started.signal(libc::SIGTERM);
    let outcome = started.finish_within(TIMEOUT);
    outcome.expect_status(143);
    assert!(after <= before + 64, "memory grew from {before} to {after} KiB");
    assert!(signalled.elapsed() < Duration::from_secs(1), "stopping took {:?}", signalled.elapsed());
}

#[test]
fn access_to_every_port_except_exit_is_harmless() {
    // xor edx, edx
    // 1: mov al, 0; out dx, al; out dx, ax; out dx, eax; in al, dx; in ax, dx; in eax, dx
    //    inc dx; jmp 1b
    memory_is_bounded_and_sigterm_stops(&[
        0x31, 0xd2, // xor edx, edx
        0x31, 0xc0, // 1: xor eax, eax
        0x66, 0x81, 0xfa, 0x54, 0x05, // cmp dx, 0x554
        0x74, 0x0a, // je skip
        0xee, 0x66, 0xef, 0xef, // out al, ax, eax
        0xec, 0x66, 0xed, 0xed, // in al, ax, eax
        0x90, 0x90, // nops
        0x66, 0xff, 0xc2, // skip: inc dx
        0xeb, 0xe8, // jmp 1b
    ]);
}

#[test]
fn string_output_to_every_port_is_harmless() {
    // The code outputs its own first 16 bytes to each port.
    memory_is_bounded_and_sigterm_stops(&[
        0x31, 0xd2, // xor edx, edx
        0xbe, 0x00, 0x00, 0x10, 0x00, // 1: mov esi, 0x100000
        0xb9, 0x10, 0x00, 0x00, 0x00, // mov ecx, 16
        0x66, 0x81, 0xfa, 0x54, 0x05, // cmp dx, 0x554
        0x74, 0x0c, // je skip
        0x66, 0x81, 0xfa, 0xf9, 0x0c, // cmp dx, 0xcf9
        0x74, 0x05, // je skip
        0xf3, 0x6e, // rep outsb
        0x90, 0x90, 0x90, // nops
        0x66, 0xff, 0xc2, // skip: inc dx
        0xeb, 0xde, // jmp 1b
    ]);
}

#[test]
fn access_to_every_unmapped_page_is_harmless() {
    // mov rbx, 0x8000000 (128 MiB: the end of memory); 1: mov eax, [rbx]; mov [rbx], eax;
    // add rbx, 4096; and ebx, 0x3fffffff; or ebx, 0x8000000; jmp 1b
    memory_is_bounded_and_sigterm_stops(&[
        0xbb, 0x00, 0x00, 0x00, 0x08, // mov ebx, 0x8000000
        0x8b, 0x03, // 1: mov eax, [rbx]
        0x89, 0x03, // mov [rbx], eax
        0x81, 0xc3, 0x00, 0x10, 0x00, 0x00, // add ebx, 4096
        0x81, 0xe3, 0xff, 0xff, 0xff, 0x3f, // and ebx, 0x3fffffff
        0x81, 0xcb, 0x00, 0x00, 0x00, 0x08, // or ebx, 0x8000000
        0xeb, 0xe8, // jmp 1b
    ]);
}

#[test]
fn flooding_the_console_is_harmless() {
    // mov dx, 0x3f8; mov al, 'x'; 1: out dx, al; jmp 1b
    memory_is_bounded_and_sigterm_stops(&[0x66, 0xba, 0xf8, 0x03, 0xb0, b'x', 0xee, 0xeb, 0xfd]);
}

#[test]
fn a_guest_that_fills_an_unread_console_pipe_can_be_stopped() {
    // Writes only; then also reads, which make the VMM check for input each time.
    stops_with_a_full_pipe(&[0x66, 0xba, 0xf8, 0x03, 0xb0, b'x', 0xee, 0xeb, 0xfd], Stdio::null());
    stops_with_a_full_pipe(&[0x66, 0xba, 0xf8, 0x03, 0xec, 0xb0, b'x', 0xee, 0xeb, 0xfa], Stdio::piped());
}

/// A guest that fills its output pipe is stopped by SIGTERM within a second.
#[track_caller]
fn stops_with_a_full_pipe(code: &[u8], input: Stdio) {
    let kernel = kernel(code);
    let mut command = kindling();
    command.args(["boot", "--kernel"]).arg(kernel.path()).stdin(input).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // The unread pipe of 64 KiB fills up, and the vCPU thread blocks in write.
    let waiting = || {
        std::fs::read_dir(format!("/proc/{}/task", child.id())).unwrap().filter_map(Result::ok).any(|task| {
            std::fs::read_to_string(task.path().join("syscall")).is_ok_and(|call| call.starts_with("1 "))
        })
    };
    while !waiting() {
        std::thread::yield_now();
    }
    let signalled = Instant::now();
    let pid = i32::try_from(child.id()).unwrap();
    #[expect(unsafe_code, reason = "kill has no safe wrapper in std")]
    // SAFETY: kill does not access memory, and the child has not been waited for.
    unsafe {
        libc::kill(pid, libc::SIGTERM);
    }
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if signalled.elapsed() < TIMEOUT => std::thread::yield_now(),
            None => {
                child.kill().unwrap();
                panic!("SIGTERM did not stop the VMM within {TIMEOUT:?}");
            }
        }
    };
    assert_eq!(status.code(), Some(143));
    assert!(signalled.elapsed() < Duration::from_secs(1), "stopping took {:?}", signalled.elapsed());
}

#[test]
fn a_guest_in_a_busy_loop_or_halted_without_interrupts_can_be_stopped() {
    memory_is_bounded_and_sigterm_stops(&tests::machine_code::INFINITE_LOOP);
    // cli; hlt uses no processor time, so memory is not measured.
    let (_kernel, mut command) = command(&[0xfa, 0xf4]);
    let started = start(command.args(["--report"]));
    let path = format!("/proc/{}/task", started.child.id());
    while std::fs::read_dir(&path).unwrap().count() < 2 {
        std::thread::yield_now();
    }
    started.signal(libc::SIGTERM);
    let outcome = started.finish_within(Duration::from_secs(20));
    assert!(outcome.status == Some(143) || outcome.status.is_none(), "{outcome}");
}

#[test]
fn unread_console_input_uses_no_processor_time() {
    // The guest halts without reading, and the writer of its input has closed the pipe.
    let kernel = kernel(&[0xfa, 0xf4]);
    let mut command = kindling();
    command.args(["boot", "--kernel"]).arg(kernel.path()).stdin(Stdio::piped());
    let mut started = start(&mut command);
    std::io::Write::write_all(&mut started.child.stdin.take().unwrap(), b"nobody reads this").unwrap();
    let path = format!("/proc/{}/syscall", started.child.id());
    // The event loop sleeps once it has buffered the input: epoll_wait is 232, epoll_pwait 281.
    let asleep = || {
        std::fs::read_to_string(&path).is_ok_and(|call| call.starts_with("232 ") || call.starts_with("281 "))
    };
    let mut quiet = 0;
    while quiet < 1000 {
        quiet = if asleep() { quiet + 1 } else { 0 };
    }
    started.signal(libc::SIGTERM);
    started.finish_within(TIMEOUT).expect_status(143);
}

#[test]
fn the_number_of_recorded_boot_marks_is_bounded() {
    // mov dx, 0x550; mov al, 0x10; mov ecx, 100000; 1: out dx, al; dec ecx; jnz 1b; exit
    let mut code = vec![0x66, 0xba, 0x50, 0x05, 0xb0, 0x10, 0xb9, 0x00, 0x10, 0x00, 0x00];
    code.extend([0xee, 0xff, 0xc9, 0x75, 0xfb]);
    code.extend(exit(6));
    let (_kernel, mut command) = command(&code);
    let outcome = start(command.args(["--report"])).finish_within(TIMEOUT);
    assert_eq!(outcome.expect_status(6).stderr.matches("init: first instruction").count(), 64);
}

/// `mov ecx, REGISTER; rdmsr`, and the end of the guest. A fault ends it as well: it has no handler.
#[test]
fn registers_that_a_guest_has_no_business_with_cannot_be_read() {
    let read = |register: u32| {
        let code = [&[0xb9][..], &register.to_le_bytes(), &[0x0f, 0x32], &exit(7)].concat();
        let (_kernel, mut command) = command(&code);
        run(&mut command)
    };
    // The time stamp counter.
    read(0x10).expect_status(7);
    // Performance counters of Intel and of AMD, which KVM reads as zero otherwise; VMX's; Hyper-V's.
    for register in [0xc1, 0x186, 0xc001_0000, 0xc001_0004, 0x480, 0x4000_0000] {
        read(register).expect_status(122).expect_stderr("triple fault");
    }
}
