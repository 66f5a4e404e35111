//! A guest that does its worst leaves the VMM's memory flat and the VMM able to stop.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tests::machine_code::{exit, kernel};
use tests::{PATIENCE, Started, kindling, start};

fn command(code: &[u8]) -> (tempfile::NamedTempFile, Command) {
    let kernel = kernel(code);
    let mut command = kindling();
    command.args(["boot", "--console", "null", "--kernel"]).arg(kernel.path()).stdin(Stdio::null());
    (kernel, command)
}

/// KiB of memory that no file has: what the process allocated or wrote, the guest's included. Its program's
/// code does not count, which the host maps 16 pages at a time when a guest reaches more of it.
fn anonymous_kib(started: &Started) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", started.child.id())).unwrap();
    let kib = text.lines().find_map(|line| line.strip_prefix("Anonymous:")).unwrap();
    kib.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Voluntary and other context switches plus the time used: grows while the guest runs.
fn cpu_time(started: &Started) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/stat", started.child.id())).unwrap();
    let fields: Vec<&str> = text.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

/// Lets the guest use a fifth of a second of processor time.
fn let_it_run(started: &Started) {
    let start = cpu_time(started);
    let ticks = 20;
    while cpu_time(started) < start + ticks {
        std::thread::yield_now();
    }
}

/// Runs an endless guest: memory stays flat, SIGTERM ends it within a second.
#[track_caller]
fn stays_flat_and_stops(code: &[u8]) {
    let (_kernel, mut command) = command(code);
    let started = start(&mut command);
    let_it_run(&started);
    let before = anonymous_kib(&started);
    let_it_run(&started);
    let after = anonymous_kib(&started);
    let told = Instant::now();
    started.signal(libc::SIGTERM);
    let outcome = started.finish_within(PATIENCE);
    outcome.expect_status(143);
    assert!(after <= before + 64, "memory grew from {before} to {after} KiB");
    assert!(told.elapsed() < Duration::from_secs(1), "stopping took {:?}", told.elapsed());
}

#[test]
fn writing_to_every_port_but_the_exits() {
    // xor edx, edx
    // 1: mov al, 0; out dx, al; out dx, ax; out dx, eax; in al, dx; in ax, dx; in eax, dx
    //    inc dx; jmp 1b
    stays_flat_and_stops(&[
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
fn string_output_to_every_port() {
    // Reads its own code as data, the same 16 bytes for each port.
    stays_flat_and_stops(&[
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
fn reading_every_unmapped_address() {
    // mov rbx, 0x8000000 (128 MiB: the end of memory); 1: mov eax, [rbx]; mov [rbx], eax;
    // add rbx, 4096; and ebx, 0x3fffffff; or ebx, 0x8000000; jmp 1b
    stays_flat_and_stops(&[
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
fn flooding_the_console() {
    // mov dx, 0x3f8; mov al, 'x'; 1: out dx, al; jmp 1b
    stays_flat_and_stops(&[0x66, 0xba, 0xf8, 0x03, 0xb0, b'x', 0xee, 0xeb, 0xfd]);
}

#[test]
fn flooding_a_console_that_nobody_reads() {
    // Only written to; and read as well, which makes the VMM look for input each time.
    stops_with_a_full_pipe(&[0x66, 0xba, 0xf8, 0x03, 0xb0, b'x', 0xee, 0xeb, 0xfd], Stdio::null());
    stops_with_a_full_pipe(&[0x66, 0xba, 0xf8, 0x03, 0xec, 0xb0, b'x', 0xee, 0xeb, 0xfa], Stdio::piped());
}

/// A guest that fills the pipe of its output is stopped by SIGTERM within a second.
#[track_caller]
fn stops_with_a_full_pipe(code: &[u8], input: Stdio) {
    let kernel = kernel(code);
    let mut command = kindling();
    command.args(["boot", "--kernel"]).arg(kernel.path()).stdin(input).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // The pipe is not read: its 64 KiB fill up and the vCPU's thread waits in write.
    let waiting = || {
        std::fs::read_dir(format!("/proc/{}/task", child.id())).unwrap().filter_map(Result::ok).any(|task| {
            std::fs::read_to_string(task.path().join("syscall")).is_ok_and(|call| call.starts_with("1 "))
        })
    };
    while !waiting() {
        std::thread::yield_now();
    }
    let told = Instant::now();
    let pid = i32::try_from(child.id()).unwrap();
    #[expect(unsafe_code, reason = "kill has no safe wrapper in std")]
    // SAFETY: kill has no memory effects, and the child has not been waited for.
    unsafe {
        libc::kill(pid, libc::SIGTERM);
    }
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if told.elapsed() < PATIENCE => std::thread::yield_now(),
            None => {
                child.kill().unwrap();
                panic!("SIGTERM did not end it within {PATIENCE:?}");
            }
        }
    };
    assert_eq!(status.code(), Some(143));
    assert!(told.elapsed() < Duration::from_secs(1), "stopping took {:?}", told.elapsed());
}

#[test]
fn never_halting_and_halting_for_ever() {
    stays_flat_and_stops(&tests::machine_code::FOREVER);
    // cli; hlt never uses processor time, so it is only stopped.
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
fn input_that_nobody_takes_costs_nothing() {
    // The guest halts without ever receiving, and the writer of its input is gone.
    let kernel = kernel(&[0xfa, 0xf4]);
    let mut command = kindling();
    command.args(["boot", "--kernel"]).arg(kernel.path()).stdin(Stdio::piped());
    let mut started = start(&mut command);
    std::io::Write::write_all(&mut started.child.stdin.take().unwrap(), b"nobody reads this").unwrap();
    let path = format!("/proc/{}/syscall", started.child.id());
    // Once the event loop has taken the input it sleeps: epoll_wait is 232, epoll_pwait 281.
    let asleep = || {
        std::fs::read_to_string(&path).is_ok_and(|call| call.starts_with("232 ") || call.starts_with("281 "))
    };
    let mut quiet = 0;
    while quiet < 1000 {
        quiet = if asleep() { quiet + 1 } else { 0 };
    }
    started.signal(libc::SIGTERM);
    started.finish_within(PATIENCE).expect_status(143);
}

#[test]
fn marks_without_end_are_bounded() {
    // mov dx, 0x550; mov al, 0x10; mov ecx, 100000; 1: out dx, al; dec ecx; jnz 1b; exit
    let mut code = vec![0x66, 0xba, 0x50, 0x05, 0xb0, 0x10, 0xb9, 0x00, 0x10, 0x00, 0x00];
    code.extend([0xee, 0xff, 0xc9, 0x75, 0xfb]);
    code.extend(exit(6));
    let (_kernel, mut command) = command(&code);
    let outcome = start(command.args(["--report"])).finish_within(PATIENCE);
    assert_eq!(outcome.expect_status(6).stderr.matches("init: first instruction").count(), 64);
}
