//! Seccomp filters: programs of classic BPF that are made of the table when this program is compiled.
//!
//! The length of a program delays the start of a guest: the kernel translates it to native code when a thread installs it, in
//! five passes, which takes longer than all else in the jail. A comparison for each call is shortest: a bitmap takes three
//! instructions for each word that has bits, and ten to find the bit. Before the translation the kernel interprets the program once for each system call, to
//! cache those that are always allowed (`seccomp_cache_prepare` in kernel/seccomp.c). The cache gains little here, because
//! most calls are ioctls, so that each program begins with an instruction that ends this interpretation.
#![expect(unsafe_code, reason = "installs a program by seccomp(2)")]
#![expect(clippy::cast_possible_truncation, reason = "`TryFrom` is not const; tests execute each program")]

use super::table::{Rule, TABLE, Thread};
use super::{OnRefusal, refusal};
use libc::sock_filter;
use std::io;

/// `AUDIT_ARCH_X86_64` (include/uapi/linux/audit.h).
const ARCHITECTURE: u32 = 0xc000_003e;

/// Offsets in `struct seccomp_data` (include/uapi/linux/seccomp.h).
const NUMBER_OFFSET: u32 = 0;
const ARCHITECTURE_OFFSET: u32 = 4;
const ARGUMENTS_OFFSET: u32 = 16;
const ARGUMENT_LEN: u32 = 8;

/// Instructions (include/uapi/linux/bpf_common.h): A is the accumulator, X the index register, M the memory.
mod code {
    /// A = a word of `seccomp_data`.
    pub(super) const LOAD: u16 = 0x20;
    /// X = A.
    pub(super) const A_TO_X: u16 = 0x07;
    /// Skips jt instructions if A = k, otherwise jf.
    pub(super) const JUMP_EQUAL: u16 = 0x15;
    /// Returns k.
    pub(super) const RETURN: u16 = 0x06;
}

/// Maximum number of instructions of a program.
const CAPACITY: usize = 160;
/// The targets of jumps in a program that is not complete: the last two instructions.
const TO_ALLOW: u8 = 255;
const TO_REFUSE: u8 = 254;
/// The place of the process's ID in a program that is not installed yet.
const OWN_PROCESS: u32 = u32::MAX;

const fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

const ALLOW: sock_filter = instruction(code::RETURN, 0, 0, libc::SECCOMP_RET_ALLOW);

/// The call returns ENOSYS.
const ABSENT: sock_filter =
    instruction(code::RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs());

/// A program.
#[derive(Clone, Copy)]
struct Program {
    instructions: [sock_filter; CAPACITY],
    length: usize,
}

impl Program {
    /// The program of a thread.
    const fn of(thread: Thread, on_refusal: OnRefusal) -> Self {
        let action = match on_refusal {
            // A signal, whose handler reports the call and ends the process. If the handler is gone or the signal
            // blocked, the kernel ends the process.
            OnRefusal::End => libc::SECCOMP_RET_TRAP,
            OnRefusal::Log => libc::SECCOMP_RET_LOG,
        };
        let refuse = instruction(code::RETURN, 0, 0, action);
        let mut this = Self { instructions: [refuse; CAPACITY], length: 0 };
        // Without effect: the kernel follows no program beyond it.
        this.push(code::A_TO_X, 0, 0, 0);
        this.push(code::LOAD, 0, 0, ARCHITECTURE_OFFSET);
        this.push(code::JUMP_EQUAL, 1, 0, ARCHITECTURE);
        this.push(code::RETURN, 0, 0, libc::SECCOMP_RET_KILL_PROCESS);
        this.push(code::LOAD, 0, 0, NUMBER_OFFSET);
        let mut at = 0;
        while at < TABLE.len() {
            let call = &TABLE[at];
            if thread.is_among(call.threads) {
                this.check(call.number, call.rule);
            }
            at += 1;
        }
        this.finish(refuse);
        this.finish(ALLOW);
        this.resolve();
        this
    }

    /// A program that makes the calls fail which the table lists as absent, and allows all others. It is a separate program,
    /// because the kernel logs the calls that the other one refuses.
    const fn of_absent_calls(thread: Thread) -> Self {
        let mut this = Self { instructions: [ALLOW; CAPACITY], length: 0 };
        this.push(code::A_TO_X, 0, 0, 0);
        this.push(code::LOAD, 0, 0, NUMBER_OFFSET);
        let mut at = 0;
        while at < TABLE.len() {
            let call = &TABLE[at];
            if thread.is_among(call.threads) && matches!(call.rule, Rule::Absent) {
                this.push(code::JUMP_EQUAL, 0, 1, call.number);
                this.finish(ABSENT);
            }
            at += 1;
        }
        this.finish(ALLOW);
        this
    }

    const fn push(&mut self, code: u16, jt: u8, jf: u8, k: u32) {
        self.instructions[self.length] = instruction(code, jt, jf, k);
        self.length += 1;
    }

    const fn finish(&mut self, last: sock_filter) {
        self.instructions[self.length] = last;
        self.length += 1;
    }

    /// Checks a call. All arguments that have a rule have 32 bits: the low half, which is first.
    const fn check(&mut self, number: u32, rule: Rule) {
        let start = self.length;
        let argument = match rule {
            Rule::Any | Rule::Absent => {
                self.push(code::JUMP_EQUAL, TO_ALLOW, 0, number);
                return;
            }
            Rule::OneOf(argument, _) | Rule::OwnProcess(argument) => argument,
        };
        self.push(code::JUMP_EQUAL, 0, 0, number);
        self.push(code::LOAD, 0, 0, ARGUMENTS_OFFSET + ARGUMENT_LEN * argument);
        if let Rule::OneOf(_, values) = rule {
            let mut at = 0;
            while at < values.len() {
                let is_last = at + 1 == values.len();
                self.push(code::JUMP_EQUAL, TO_ALLOW, if is_last { TO_REFUSE } else { 0 }, values[at]);
                at += 1;
            }
        } else {
            self.push(code::JUMP_EQUAL, TO_ALLOW, TO_REFUSE, OWN_PROCESS);
        }
        // Another number skips all of this.
        self.instructions[start].jf = (self.length - start - 1) as u8;
    }

    /// Replaces the targets of jumps by distances to the last two instructions.
    const fn resolve(&mut self) {
        let mut at = 0;
        while at < self.length {
            let this = &mut self.instructions[at];
            if this.code == code::JUMP_EQUAL {
                // A jump counts from the next instruction.
                let (refuse, allow) = (self.length - at - 3, self.length - at - 2);
                assert!(allow < TO_REFUSE as usize, "the program is too long for its jumps");
                if this.jt == TO_ALLOW {
                    this.jt = allow as u8;
                }
                if this.jf == TO_REFUSE {
                    this.jf = refuse as u8;
                }
            }
            at += 1;
        }
    }

    /// The instructions, for this process.
    fn into_instructions(mut self) -> ([sock_filter; CAPACITY], usize) {
        let own = rustix::process::getpid().as_raw_pid().unsigned_abs();
        for instruction in &mut self.instructions {
            if instruction.code == code::JUMP_EQUAL && instruction.k == OWN_PROCESS {
                instruction.k = own;
            }
        }
        (self.instructions, self.length)
    }
}

/// The program of a thread, made at compile time.
const fn program(thread: Thread, on_refusal: OnRefusal) -> &'static Program {
    macro_rules! constant {
        ($thread:ident, $action:ident) => {{
            const PROGRAM: Program = Program::of(Thread::$thread, OnRefusal::$action);
            &PROGRAM
        }};
    }
    match (thread, on_refusal) {
        (Thread::Vcpu, OnRefusal::End) => constant!(Vcpu, End),
        (Thread::Vcpu, OnRefusal::Log) => constant!(Vcpu, Log),
        (Thread::EventLoop, OnRefusal::End) => constant!(EventLoop, End),
        (Thread::EventLoop, OnRefusal::Log) => constant!(EventLoop, Log),
        (Thread::Worker, OnRefusal::End) => constant!(Worker, End),
        (Thread::Worker, OnRefusal::Log) => constant!(Worker, Log),
        (Thread::Preboot, OnRefusal::End) => constant!(Preboot, End),
        (Thread::Preboot, OnRefusal::Log) => constant!(Preboot, Log),
    }
}

/// Whether the kernel has filters of system calls.
pub(super) fn is_available() -> bool {
    let action = libc::SECCOMP_RET_TRAP;
    // SAFETY: the call reads an integer.
    unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const action) == 0 }
}

/// Confines the calling thread to its system calls.
pub(super) fn install(thread: Thread, on_refusal: OnRefusal) -> io::Result<()> {
    const ABSENT_OF_PREBOOT: Program = Program::of_absent_calls(Thread::Preboot);
    if on_refusal == OnRefusal::End {
        refusal::prepare(thread)?;
    }
    if thread == Thread::Preboot {
        install_program(&ABSENT_OF_PREBOOT, 0)?;
    }
    install_program(program(thread, on_refusal), libc::SECCOMP_FILTER_FLAG_LOG)
}

fn install_program(program: &Program, flags: libc::c_ulong) -> io::Result<()> {
    let (mut instructions, length) = program.into_instructions();
    let length = u16::try_from(length).map_err(|_| io::ErrorKind::InvalidData)?;
    let program = libc::sock_fprog { len: length, filter: instructions.as_mut_ptr() };
    // SAFETY: the call reads the program, which lives until it returns.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jail::TABLE;

    /// The instructions of a thread's program.
    fn compile(thread: Thread, on_refusal: OnRefusal) -> Vec<sock_filter> {
        let (instructions, length) = program(thread, on_refusal).into_instructions();
        instructions[..length].to_vec()
    }

    /// What a program returns for a call.
    fn run(program: &[sock_filter], number: u32, arguments: [u64; 6]) -> u32 {
        let mut data = [0_u8; 64];
        data[..4].copy_from_slice(&number.to_le_bytes());
        data[4..8].copy_from_slice(&ARCHITECTURE.to_le_bytes());
        for (at, argument) in arguments.iter().enumerate() {
            data[16 + 8 * at..24 + 8 * at].copy_from_slice(&argument.to_le_bytes());
        }
        let (mut at, mut a) = (0_usize, 0_u32);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            match code {
                code::RETURN => return k,
                code::JUMP_EQUAL => at += usize::from(if a == k { jt } else { jf }),
                code::LOAD => a = u32::from_le_bytes(data[k as usize..k as usize + 4].try_into().unwrap()),
                code::A_TO_X => {}
                code => panic!("unknown instruction {code:#x}"),
            }
        }
    }

    #[test]
    fn a_program_allows_exactly_what_the_table_lists() {
        for thread in Thread::ALL {
            let program = compile(thread, OnRefusal::End);
            for number in (0..1024).chain([u32::MAX, 0x4000_0000, 0x4000_0010]) {
                let call = thread.calls().find(|call| call.number == number);
                let expected = match call.map(|call| call.rule) {
                    Some(Rule::Any | Rule::Absent) => libc::SECCOMP_RET_ALLOW,
                    Some(Rule::OneOf(_, values)) if values.contains(&0) => libc::SECCOMP_RET_ALLOW,
                    _ => libc::SECCOMP_RET_TRAP,
                };
                assert_eq!(run(&program, number, [0; 6]), expected, "{thread:?} {number}");
            }
        }
    }

    #[test]
    fn arguments_are_checked() {
        for thread in Thread::ALL {
            let program = compile(thread, OnRefusal::End);
            for call in thread.calls() {
                let allows = |argument: u32, value: u32| {
                    let mut arguments = [0; 6];
                    arguments[argument as usize] = u64::from(value);
                    run(&program, call.number, arguments) == libc::SECCOMP_RET_ALLOW
                };
                match call.rule {
                    Rule::Any | Rule::Absent => assert!(allows(0, 5) && allows(5, u32::MAX)),
                    Rule::OneOf(argument, values) => {
                        assert!(values.iter().all(|value| allows(argument, *value)), "{}", call.name);
                        let others = values.iter().flat_map(|value| [value ^ 1, value ^ (1 << 31)]);
                        let refused = others.filter(|value| !values.contains(value));
                        assert!(refused.into_iter().all(|value| !allows(argument, value)), "{}", call.name);
                    }
                    Rule::OwnProcess(argument) => {
                        assert!(
                            allows(argument, std::process::id()) && !allows(argument, 1),
                            "{}",
                            call.name
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn absent_calls_fail_and_others_are_left_to_the_other_program() {
        for thread in Thread::ALL {
            let (instructions, length) = Program::of_absent_calls(thread).into_instructions();
            for number in 0..1024 {
                let call = thread.calls().find(|call| call.number == number);
                let is_absent = call.is_some_and(|call| call.rule == Rule::Absent);
                let expected = if is_absent { ABSENT.k } else { libc::SECCOMP_RET_ALLOW };
                assert_eq!(run(&instructions[..length], number, [0; 6]), expected, "{thread:?} {number}");
            }
            assert!(thread == Thread::Preboot || thread.calls().all(|call| call.rule != Rule::Absent));
        }
    }

    #[test]
    fn other_architectures_end_the_process() {
        let program = compile(Thread::Vcpu, OnRefusal::Log);
        let mut data = program;
        // The program as it sees a call of 32 bits, whose architecture is another.
        data[2].k ^= 1;
        assert_eq!(run(&data, 0, [0; 6]), libc::SECCOMP_RET_KILL_PROCESS);
    }

    #[test]
    fn programs_are_short() {
        for thread in Thread::ALL {
            let length = compile(thread, OnRefusal::End).len();
            // A pre-boot takes so long that its filter does not matter.
            let max = match thread {
                Thread::Preboot => CAPACITY,
                Thread::EventLoop => 52,
                Thread::Vcpu => 38,
                Thread::Worker => 30,
            };
            assert!(length <= max, "{thread:?}: {length}");
        }
        assert!(TABLE.iter().all(|call| !call.reason.is_empty() && !call.threads.is_empty()));
    }
}
