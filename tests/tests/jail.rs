//! Attempts to break out of the monitor's jail, as by a guest that has taken over its monitor.
//!
//! Each attempt is made three times, in processes of root: in the jail of a monitor, with only the layer that is meant to
//! refuse it, and without a jail. `docs/jail.md` has the table of all attempts.
#![expect(unsafe_code, reason = "the attempts are system calls that have no safe interface")]

use kindling_vmm::jail::{self, Jail, Layer, Limits, OnRefusal, Thread};
use std::fmt::Write as _;
use std::io;

/// The layer that is meant to refuse an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Layer(Layer),
    /// The seccomp filter of the event loop, which allows the most system calls while a guest runs.
    Filter,
}

const PATHS: By = By::Layer(Layer::Paths);
const NETWORK: By = By::Layer(Layer::Network);
const SCOPES: By = By::Layer(Layer::Scopes);
const CAPABILITIES: By = By::Layer(Layer::Capabilities);
const LIMITS: By = By::Layer(Layer::Limits);
const FILTER: By = By::Filter;

/// What confines the process that makes an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Confinement {
    Jail,
    LayerAlone,
    /// The filter of system calls of this kind of thread, alone.
    Thread(Thread),
    /// The same with `--seccomp log`.
    Logging(Thread),
    None,
}

/// The outcome of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// The host refused it for missing rights, or ended the process.
    Refused,
    /// It succeeded, or failed for another reason.
    Executed,
}

type Attempt = (&'static str, By, fn() -> i64);

/// A system call with up to six arguments.
macro_rules! call {
    ($name:ident $(, $argument:expr)*) => {{
        // SAFETY: the process is a child that ends after the call, and buffers are large enough or absent.
        unsafe { libc::syscall(libc::$name $(, $argument)*) }
    }};
}

/// A path or name for the kernel.
macro_rules! text {
    ($text:literal) => {
        concat!($text, "\0").as_ptr()
    };
}

const AT: libc::c_int = libc::AT_FDCWD;
const NONE: usize = 0;

fn socket(family: libc::c_int, kind: libc::c_int) -> i64 {
    call!(SYS_socket, family, kind, 0)
}

fn tcp(number: libc::c_long) -> i64 {
    let descriptor = socket(libc::AF_INET, libc::SOCK_STREAM);
    let address = libc::sockaddr_in {
        sin_family: 2,
        sin_port: 4242_u16.to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes([127, 0, 0, 1]) },
        sin_zero: [0; 8],
    };
    // SAFETY: the address lives until the call returns.
    unsafe { libc::syscall(number, descriptor, &raw const address, size_of_val(&address)) }
}

fn abstract_socket() -> i64 {
    let descriptor = socket(libc::AF_UNIX, libc::SOCK_STREAM);
    let mut address = libc::sockaddr_un { sun_family: 1, sun_path: [0; 108] };
    for (to, from) in address.sun_path[1..].iter_mut().zip(ABSTRACT.bytes()) {
        *to = from.cast_signed();
    }
    // SAFETY: the address lives until the call returns.
    unsafe { libc::syscall(libc::SYS_connect, descriptor, &raw const address, 3 + ABSTRACT.len()) }
}

const ABSTRACT: &str = "kindling-jail-test";
/// PID 1, which is the target of attempts.
const INIT: libc::c_int = 1;

#[rustfmt::skip]
const ATTEMPTS: &[Attempt] = &[
    ("read a file of the host", PATHS, || call!(SYS_openat, AT, text!("/tmp/jail-victim"), libc::O_RDONLY)),
    ("open the memory of this process", PATHS, || call!(SYS_openat, AT, text!("/proc/self/mem"), libc::O_RDWR)),
    ("read the environment of another process", PATHS, || call!(SYS_openat, AT, text!("/proc/1/environ"), libc::O_RDONLY)),
    ("open KVM once more", PATHS, || call!(SYS_openat, AT, text!("/dev/kvm"), libc::O_RDWR)),
    ("open a descriptor again through /proc", PATHS, || call!(SYS_openat, AT, text!("/proc/self/fd/900"), libc::O_RDWR)),
    ("list a directory", PATHS, || call!(SYS_openat, AT, text!("/"), libc::O_RDONLY | libc::O_DIRECTORY)),
    ("create a file", PATHS, || call!(SYS_openat, AT, text!("/tmp/jail-file"), libc::O_CREAT | libc::O_WRONLY, 0o600)),
    ("create a directory", PATHS, || call!(SYS_mkdirat, AT, text!("/tmp/jail-folder"), 0o700)),
    ("create a symbolic link", PATHS, || call!(SYS_symlinkat, text!("/etc"), AT, text!("/tmp/jail-link"))),
    ("create a device node", PATHS, || call!(SYS_mknodat, AT, text!("/tmp/jail-node"), libc::S_IFCHR | 0o600, 0x103)),
    ("create a named pipe", PATHS, || call!(SYS_mknodat, AT, text!("/tmp/jail-pipe"), libc::S_IFIFO | 0o600, 0)),
    ("remove a file", PATHS, || call!(SYS_unlinkat, AT, text!("/tmp/jail-victim"), 0)),
    ("rename a file", PATHS, || call!(SYS_renameat, AT, text!("/tmp/jail-victim"), AT, text!("/tmp/jail-renamed"))),
    ("truncate a file", PATHS, || call!(SYS_truncate, text!("/tmp/jail-victim"), 0)),
    ("execute a program", PATHS, || call!(SYS_execve, text!("/proc/self/exe"), [text!("jail"), text!("--list"), std::ptr::null()].as_ptr(), NONE)),
    ("listen on a TCP port", NETWORK, || tcp(libc::SYS_bind)),
    ("connect to a TCP port", NETWORK, || tcp(libc::SYS_connect)),
    ("send a signal to another process", SCOPES, || call!(SYS_kill, INIT, 0)),
    ("connect to an abstract socket", SCOPES, abstract_socket),
    ("mount a filesystem", CAPABILITIES, || call!(SYS_mount, text!("none"), text!("/tmp"), text!("nothing"), 0, NONE)),
    ("unmount a filesystem", CAPABILITIES, || call!(SYS_umount2, text!("/tmp"), 0)),
    ("change the root directory", CAPABILITIES, || call!(SYS_chroot, text!("/"))),
    ("create a network namespace", CAPABILITIES, || call!(SYS_unshare, libc::CLONE_NEWNET)),
    ("change the hostname", CAPABILITIES, || call!(SYS_sethostname, text!("jail"), 4)),
    ("change the clock", CAPABILITIES, || call!(SYS_adjtimex, [[8_u64; 1].as_slice(), &[0; 25]].concat().as_ptr())),
    ("become another user", CAPABILITIES, || call!(SYS_setuid, 4242)),
    ("become another group", CAPABILITIES, || call!(SYS_setgid, 4242)),
    ("open a raw socket", CAPABILITIES, || call!(SYS_socket, libc::AF_INET, libc::SOCK_RAW, 1)),
    ("open a packet socket", CAPABILITIES, || socket(libc::AF_PACKET, libc::SOCK_RAW)),
    ("access I/O ports", CAPABILITIES, || call!(SYS_iopl, 3)),
    ("load a kernel module", CAPABILITIES, || call!(SYS_init_module, NONE, 0, text!(""))),
    ("load another kernel", CAPABILITIES, || call!(SYS_kexec_load, 0, 0, NONE, 0)),
    ("configure a reboot", CAPABILITIES, || call!(SYS_reboot, 0xfee1_dead_u32, 672_274_793, 0, NONE)),
    ("clear the kernel's log", CAPABILITIES, || call!(SYS_syslog, 5, NONE, 0)),
    ("raise the priority", CAPABILITIES, || call!(SYS_setpriority, 0, 0, -20)),
    ("watch the files of all", CAPABILITIES, || call!(SYS_fanotify_init, 0, 0)),
    ("open a file by its handle", CAPABILITIES, || call!(SYS_open_by_handle_at, AT, &[8_u32, 1, 0, 0], 0)),
    ("account processes", CAPABILITIES, || call!(SYS_acct, NONE)),
    ("hang up the terminal", CAPABILITIES, || call!(SYS_vhangup)),
    ("trace another process", CAPABILITIES, || call!(SYS_ptrace, 0x4206, INIT, 0, 0)),
    ("read the memory of another process", CAPABILITIES, || {
        let mut byte = [0_u8; 1];
        let local = [byte.as_mut_ptr() as usize, 1];
        call!(SYS_process_vm_readv, INIT, local.as_ptr(), 1, [0x1000_usize, 1].as_ptr(), 1, 0)
    }),
    ("enter another namespace", CAPABILITIES, || {
        let process = call!(SYS_pidfd_open, INIT, 0);
        call!(SYS_setns, process, libc::CLONE_NEWNS)
    }),
    ("write beyond the largest disk", LIMITS, || call!(SYS_pwrite64, VICTIM, text!("x"), 1, 1_i64 << 30)),
    ("take more memory than the guest's and its own", LIMITS, || {
        let end = call!(SYS_brk, 0);
        if call!(SYS_brk, end + (2 << 30)) > end {
            return 0;
        }
        // On failure, brk returns the unchanged end of the heap instead of an error.
        // SAFETY: the variable of this thread.
        unsafe { *libc::__errno_location() = libc::ENOMEM };
        -1
    }),
    ("open a Unix socket", FILTER, || socket(libc::AF_UNIX, libc::SOCK_STREAM)),
    ("open a pair of sockets", FILTER, || call!(SYS_socketpair, libc::AF_UNIX, libc::SOCK_STREAM, 0, &[0_i32; 2])),
    ("open a vsock of the host", FILTER, || socket(libc::AF_VSOCK, libc::SOCK_STREAM)),
    ("open a netlink socket", FILTER, || socket(libc::AF_NETLINK, libc::SOCK_RAW)),
    ("open a UDP socket", FILTER, || socket(libc::AF_INET, libc::SOCK_DGRAM)),
    ("open a socket of the crypto interface", FILTER, || socket(libc::AF_ALG, libc::SOCK_SEQPACKET)),
    ("start a process", FILTER, || call!(SYS_clone, libc::SIGCHLD, 0, 0, 0, 0)),
    ("start a thread", FILTER, || call!(SYS_clone3, NONE, 0)),
    ("execute what is open", FILTER, || call!(SYS_execveat, VICTIM, text!(""), NONE, NONE, libc::AT_EMPTY_PATH)),
    ("map executable memory", FILTER, || call!(SYS_mmap, 0, 4096, libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)),
    ("make memory executable", FILTER, || call!(SYS_mprotect, 0, 4096, libc::PROT_EXEC)),
    ("create an io_uring", FILTER, || call!(SYS_io_uring_setup, 1, &[0_u64; 15])),
    ("configure an io_uring", FILTER, || call!(SYS_io_uring_register, -1, 12, NONE, 0)),
    ("handle page faults of its own", FILTER, || call!(SYS_userfaultfd, libc::O_CLOEXEC | 1)),
    ("load a program into the kernel", FILTER, || call!(SYS_bpf, 0, &[2_u32, 4, 4, 1, 0, 0, 0, 0], 32)),
    ("count events of the processor", FILTER, || call!(SYS_perf_event_open, &[0_u64; 16], 0, -1, -1, 0)),
    ("use the keys of the kernel", FILTER, || call!(SYS_keyctl, 0, -3, 0)),
    ("add a key", FILTER, || call!(SYS_add_key, text!("user"), text!("a"), text!("b"), 1, -2)),
    ("create a file in memory", FILTER, || call!(SYS_memfd_create, text!("a"), 0)),
    ("open a process", FILTER, || call!(SYS_pidfd_open, INIT, 0)),
    ("take a descriptor of another process", FILTER, || call!(SYS_pidfd_getfd, -1, 0, 0)),
    ("allow core dumps again", FILTER, || call!(SYS_prctl, libc::PR_SET_DUMPABLE, 1)),
    ("raise a limit", FILTER, || call!(SYS_prlimit64, 0, 4, &[0_u64, 0], NONE)),
    ("handle the signal of the filter", FILTER, || call!(SYS_rt_sigaction, libc::SIGSYS, NONE, NONE, 8)),
    ("install another filter", FILTER, || call!(SYS_seccomp, 2, 0, NONE)),
    ("type into a terminal", FILTER, || call!(SYS_ioctl, 0, libc::TIOCSTI, text!("x"))),
    ("create another VM", FILTER, || call!(SYS_ioctl, KVM, 0xae01, 0)),
    ("create a device of KVM", FILTER, || call!(SYS_ioctl, VM, 0xc00c_aee0_u32, &[KVM_DEV_TYPE_VFIO, 0, 0])),
    ("change the memory of the guest", FILTER, || {
        // Slot and flags, address in the guest, size, and address in this process.
        call!(SYS_ioctl, VM, 0x4020_ae46, &[7_u64, 0, 4096, PAGE.0.as_ptr() as u64])
    }),
    ("let the kernel send signals", FILTER, || call!(SYS_fcntl, 0, libc::F_SETOWN, INIT)),
    ("send a signal to a thread outside", FILTER, || call!(SYS_tgkill, INIT, INIT, 0)),
    ("read where a link leads", FILTER, || call!(SYS_readlinkat, AT, text!("/proc/self/exe"), [0_u8; 64].as_mut_ptr(), 64)),
    ("change how it is executed", FILTER, || call!(SYS_personality, 0x0004_0000)),
    ("change its segments", FILTER, || call!(SYS_modify_ldt, 0, NONE, 0)),
    ("resize what is open", FILTER, || call!(SYS_ftruncate, VICTIM, 10)),
    ("change the mode of what is open", FILTER, || call!(SYS_fchmod, VICTIM, 0o777)),
    ("choose its processors", FILTER, || call!(SYS_sched_setaffinity, 0, 8, &[1_u64])),
    ("create shared memory", FILTER, || call!(SYS_shmget, 0, 4096, 0o600)),
    ("create a message queue", FILTER, || call!(SYS_msgget, 0, 0o600)),
    ("create a timer", FILTER, || call!(SYS_timer_create, 1, NONE, &[0_i32])),
    ("watch files", FILTER, || call!(SYS_inotify_init1, 0)),
    ("move data between pipes", FILTER, || call!(SYS_splice, 0, NONE, 1, NONE, 1, 0)),
    ("learn the names of the host", FILTER, || call!(SYS_uname, [0_u8; 512].as_mut_ptr())),
];

/// The descriptor of a file that is opened before the jail is entered.
const VICTIM: libc::c_int = 900;
/// The descriptors of KVM and of a virtual machine.
const KVM: libc::c_int = 901;
const VM: libc::c_int = 902;
/// A device that connects a machine with devices of the host (include/uapi/linux/kvm.h).
const KVM_DEV_TYPE_VFIO: u32 = 4;

/// Memory of this process that a machine can get.
#[repr(align(4096))]
struct Page([u8; 4096]);
static PAGE: Page = Page([0; 4096]);

/// Opens KVM and creates a virtual machine, with known descriptors.
fn open_kvm() {
    use std::os::fd::AsRawFd;
    let kvm = std::fs::File::options().read(true).write(true).open("/dev/kvm").unwrap();
    let vm = call!(SYS_ioctl, kvm.as_raw_fd(), 0xae01, 0);
    assert!(vm >= 0, "{}", io::Error::last_os_error());
    for (descriptor, number) in [(kvm.as_raw_fd(), KVM), (vm.try_into().unwrap(), VM)] {
        // SAFETY: no other descriptor has this number.
        assert_eq!(unsafe { libc::dup2(descriptor, number) }, number);
    }
}

/// Confines the calling process, which has one thread.
fn confine(by: By, confinement: Confinement) {
    const LIMITED: Limits = Limits { file: Some(1 << 20), memory: Some(1 << 30) };
    match (confinement, by) {
        (Confinement::None, _) => {}
        (Confinement::LayerAlone, By::Layer(layer)) => {
            // Landlock requires no_new_privs or a privilege.
            assert!(jail::enter(&[layer], LIMITED).is_empty());
        }
        (Confinement::LayerAlone, By::Filter) => Jail::default().confine_thread(Thread::EventLoop).unwrap(),
        (Confinement::Thread(thread), _) => Jail::default().confine_thread(thread).unwrap(),
        (Confinement::Logging(thread), _) => {
            let mut jail = Jail::default();
            jail.on_refusal = OnRefusal::Log;
            jail.confine_thread(thread).unwrap();
        }
        (Confinement::Jail, _) => {
            assert!(Jail::default().confine_process(LIMITED).unwrap().is_empty());
            Jail::default().confine_thread(Thread::EventLoop).unwrap();
        }
    }
}

/// Makes an attempt in a child process.
fn attempt((_, by, attempt): &Attempt, confinement: Confinement) -> Outcome {
    /// Exit statuses of the child.
    const EXECUTED: libc::c_int = 10;
    const REFUSED: libc::c_int = 11;
    // SAFETY: the child has one thread, and does nothing but system calls before it ends.
    let child = unsafe { libc::fork() };
    if child == 0 {
        confine(*by, confinement);
        let result = attempt();
        let error = io::Error::last_os_error().raw_os_error();
        let rights = [libc::EPERM, libc::EACCES, libc::EFBIG, libc::EBADF, libc::EMFILE, libc::ENOMEM];
        let is_refused = match *by {
            // The other errors count as a refusal only if the layer is that of the limits.
            LIMITS => error.is_some_and(|error| rights[2..].contains(&error)),
            // The filter of a pre-boot lets some calls fail as if the kernel did not have them.
            FILTER if error == Some(libc::ENOSYS) => true,
            _ => error.is_some_and(|error| rights[..2].contains(&error)),
        };
        let status = if result == -1 && is_refused { REFUSED } else { EXECUTED };
        // SAFETY: ends the child immediately.
        unsafe { libc::_exit(status) };
    }
    assert!(child > 0);
    let mut status = 0;
    // SAFETY: the call writes the status.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    let exited = libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status));
    match exited {
        // A program that was executed may end with any status, but not by SIGSYS, the filter's signal.
        Some(status) if status == REFUSED || status == 128 + libc::SIGSYS => Outcome::Refused,
        Some(_) => Outcome::Executed,
        // SIGXFSZ is the effect of the limit of file sizes.
        None => {
            assert_eq!((*by, libc::WTERMSIG(status)), (LIMITS, libc::SIGXFSZ));
            Outcome::Refused
        }
    }
}

/// A guest may take over any thread. A monitor that pre-boots runs one trial guest after the other, and so has to create
/// machines and threads.
#[test]
fn the_filter_of_each_thread_refuses_what_it_is_meant_to() {
    const ALLOWED_TO_PREBOOT: [&str; 6] = [
        "create a file in memory",
        "create another VM",
        "change the memory of the guest",
        "read where a link leads",
        "resize what is open",
        "watch files",
    ];
    open_kvm();
    for thread in Thread::ALL {
        for each in ATTEMPTS.iter().filter(|(_, by, _)| *by == FILTER) {
            victim();
            let is_allowed = thread == Thread::Preboot && ALLOWED_TO_PREBOOT.contains(&each.0);
            let expected = if is_allowed { Outcome::Executed } else { Outcome::Refused };
            assert_eq!(attempt(each, Confinement::Thread(thread)), expected, "{thread:?}: {}", each.0);
        }
    }
}

#[test]
fn what_a_filter_refuses_is_executed_and_logged_if_it_is_only_to_log() {
    /// The filter's decision in the kernel's record (SECCOMP_RET_LOG).
    const RECORD: &str = "type=1326 ";
    const DECISION: &str = "code=0x7ffc0000";
    open_kvm();
    victim();
    let kernel_log = || {
        let output = std::process::Command::new("dmesg").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines().filter(|line| line.contains(RECORD) && line.contains(DECISION)).count()
    };
    let before = kernel_log();
    let call: Attempt = ("ask for the parent", FILTER, || call!(SYS_getppid));
    for thread in Thread::ALL {
        assert_eq!(attempt(&call, Confinement::Logging(thread)), Outcome::Executed, "{thread:?}");
        assert_eq!(attempt(&call, Confinement::Thread(thread)), Outcome::Refused, "{thread:?}");
    }
    // The kernel limits the rate of records, and other tests have caused some.
    let since = std::time::Instant::now();
    while kernel_log() <= before {
        assert!(since.elapsed() < tests::TIMEOUT, "no record in the kernel's log");
        attempt(&call, Confinement::Logging(Thread::Vcpu));
    }
}

/// Makes a system call of a command and its descendants fail as on a host that does not have it.
fn without_call(command: &mut std::process::Command, number: libc::c_long) {
    use std::os::unix::process::CommandExt;
    let number = u32::try_from(number).unwrap();
    let statement =
        |code: u32, k, jt, jf| libc::sock_filter { code: u16::try_from(code).unwrap(), jt, jf, k };
    let filter = move || {
        let mut instructions = [
            // The number is the first word of the filter's input (struct seccomp_data).
            statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
            statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, number, 0, 1),
            statement(
                libc::BPF_RET | libc::BPF_K,
                libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs(),
                0,
                0,
            ),
            statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0),
        ];
        let program = libc::sock_fprog { len: 4, filter: instructions.as_mut_ptr() };
        // SAFETY: the program has four instructions, which the kernel copies.
        match unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: the closure makes one system call.
    unsafe { command.pre_exec(filter) };
}

#[test]
fn a_layer_that_the_host_lacks_is_an_error_unless_it_may_be_left_out() {
    let user = tests::user::User::new();
    let run = |call, jail: &str| {
        let mut command = user.run(&["--jail", jail]);
        without_call(command.args(["echo", "ok"]), call);
        tests::run(&mut command)
    };
    for (call, what) in [
        (libc::SYS_landlock_create_ruleset, "deny all paths by Landlock"),
        (libc::SYS_seccomp, "filter system calls by seccomp"),
    ] {
        for jail in ["require", "full"] {
            let outcome = run(call, jail);
            assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
            outcome.expect_status(2).expect_stderr(&format!(
                "this host cannot {what} for the jail of the guest; `--jail best-effort`"
            ));
        }
        for jail in ["best-effort", "off"] {
            let outcome = run(call, jail);
            assert_eq!(outcome.expect_status(0).stdout, "ok\n", "{what}");
            let expected =
                if jail == "off" { String::new() } else { format!("kindling: this host cannot {what}") };
            assert!(
                outcome.stderr.starts_with(&expected) && outcome.stderr.is_empty() == expected.is_empty(),
                "{outcome}"
            );
        }
        // The default requires what every supported kernel has.
        let mut command = user.run(&[]);
        without_call(command.args(["echo", "ok"]), call);
        tests::run(&mut command).expect_status(2).expect_stderr(what);
    }
    run(libc::SYS_unshare, "full").expect_status(2).expect_stderr("cannot create namespaces");
    assert_eq!(run(libc::SYS_unshare, "require").expect_status(0).stdout, "ok\n");
    assert!(user.has_no_guests());
}

#[test]
fn each_attempt_is_refused_by_its_layer_and_executed_without_it() {
    let _listener = listener();
    open_kvm();
    let mut table = String::new();
    let mut wrong = Vec::new();
    for each in ATTEMPTS {
        let (name, by, _) = each;
        victim();
        let outcomes = [Confinement::Jail, Confinement::LayerAlone, Confinement::None]
            .map(|confinement| attempt(each, confinement));
        let by = match by {
            By::Layer(layer) => format!("{layer:?}"),
            By::Filter => "system calls".to_owned(),
        };
        let [jailed, alone, outside] = outcomes.map(|outcome| format!("{outcome:?}").to_lowercase());
        let row = format!("| {name} | {by} | {jailed} | {alone} | {outside} |");
        let _ = writeln!(table, "{row}");
        if outcomes != [Outcome::Refused, Outcome::Refused, Outcome::Executed] {
            wrong.push(row);
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(ATTEMPTS.len() >= 60);
    assert!(
        include_str!("../../docs/jail.md").contains(&table),
        "docs/jail.md is not current; the table is\n{table}"
    );
}

/// Creates the file that attempts change, and opens it with a known number.
fn victim() {
    use std::os::fd::AsRawFd;
    let file = std::fs::File::create("/tmp/jail-victim").unwrap();
    // Executable, but not a program: without a jail, execve fails with ENOEXEC.
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    // SAFETY: no other descriptor has this number.
    assert_eq!(unsafe { libc::dup2(file.as_raw_fd(), VICTIM) }, VICTIM);
    for name in ["file", "link", "node", "pipe", "renamed"] {
        let _ = std::fs::remove_file(format!("/tmp/jail-{name}"));
    }
    let _ = std::fs::remove_dir("/tmp/jail-folder");
}

/// Listens on the abstract socket.
fn listener() -> std::os::unix::net::UnixListener {
    use std::os::linux::net::SocketAddrExt;
    let address = std::os::unix::net::SocketAddr::from_abstract_name(ABSTRACT).unwrap();
    std::os::unix::net::UnixListener::bind_addr(&address).unwrap()
}

/// Runs two guests for each user and kind of jail: the first one may pre-boot the kernel.
#[test]
fn guests_run_in_each_jail_as_root_and_as_another_user() {
    use std::os::unix::process::CommandExt;
    for id in [0, 1000] {
        let user = tests::user::User::new();
        std::os::unix::fs::chown(user.folder(), Some(id), Some(id)).unwrap();
        for jail in ["off", "best-effort", "require", "full"].into_iter().chain(["full"]) {
            let mut run = user.run(&["--jail", jail]);
            run.args(["echo", jail]).uid(id).gid(id).env("XDG_CACHE_HOME", user.folder().join("cache"));
            let output = run.output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            assert_eq!(text, format!("{jail}\n"), "as {id}: {}", String::from_utf8_lossy(&output.stderr));
            assert!(output.stderr.is_empty() && output.status.success());
        }
        assert!(user.has_no_guests());
    }
}

/// Each thread of the monitor of a running guest is confined, and the monitor has only the descriptors that it needs.
#[test]
fn a_running_monitor_is_confined_in_each_thread() {
    for (jail, is_spare) in [("require", false), ("full", false), ("require", true), ("full", true)] {
        let user = tests::user::User::new();
        // Not close-on-exec, like a descriptor that the caller leaked.
        let left_open = std::fs::File::open("/").unwrap();
        // SAFETY: the descriptor is open.
        assert_eq!(unsafe { libc::fcntl(std::os::fd::AsRawFd::as_raw_fd(&left_open), libc::F_SETFD, 0) }, 0);
        let run = |script: &str| {
            let mut run = user.run(&["--jail", jail, "--cpus", "2", "-v", "data:/data", "--name", "box"]);
            // No other test has the same spares.
            run.env("XDG_CACHE_HOME", user.folder().join("cache"));
            run.args(["sh", "-c", script]);
            run
        };
        let mut guest_run = run("echo ready; read -r line");
        if is_spare {
            guest_run.env("KINDLING_SPARE", "1");
            tests::run(run("true").env("KINDLING_SPARE", "1")).expect_status(0);
            tests::spare::wait_for("there is no spare", || {
                tests::spare::spares_of(user.folder()).first().copied()
            });
        }
        let mut guest = tests::guest_console::GuestConsole::start(&mut guest_run);
        guest.expect("ready");
        let inspected = tests::run(user.command("inspect").arg("box"));
        let record: serde_json::Value = serde_json::from_str(&inspected.expect_status(0).stdout).unwrap();
        let monitor = std::path::PathBuf::from(format!("/proc/{}", record["pid"]));
        // The front has not started a spare.
        assert_eq!(guest.process() == monitor, !is_spare, "{jail}");
        let mut threads = 0;
        for task in std::fs::read_dir(monitor.join("task")).unwrap() {
            let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            if is_spare && status.starts_with("Name:\tkvm-nx-lpage-re") {
                // A thread of KVM, which executes no program. It was started when the spare was made, before the filters.
                continue;
            }
            for line in
                ["Seccomp:\t2", "NoNewPrivs:\t1", "CapPrm:\t0000000000000000", "CapEff:\t0000000000000000"]
            {
                assert!(status.contains(line), "{jail}: {line} is missing in {status}");
            }
            threads += 1;
        }
        // The event loop, two vCPUs, and KVM's.
        assert_eq!(threads, if is_spare { 3 } else { 4 });
        expect_limits(&monitor);
        for descriptor in std::fs::read_dir(monitor.join("fd")).unwrap() {
            let target = std::fs::read_link(descriptor.unwrap().path()).unwrap();
            let text = target.to_string_lossy();
            let is_known =
                ["socket:", "pipe:", "anon_inode:", "/dev/null"].iter().any(|kind| text.starts_with(kind));
            // The guest's disks, its pre-booted kernel, and the file that is locked while the monitor lives.
            let is_file =
                ["busybox.erofs", "/volumes/data", "/monitor"].iter().any(|name| text.ends_with(name));
            assert!(is_known || is_file || text.contains("/preboot/"), "{jail}: {text} is open");
            assert!(!target.is_dir(), "{jail}: the directory {text} is open");
        }
        guest.send_line();
        guest.expect_status(0);
    }
}

/// The limits of a monitor whose guest has the default memory of 512 MiB and a volume of 10 GiB, and what it has of its
/// environment.
fn expect_limits(monitor: &std::path::Path) {
    let read = |name: &str| std::fs::read_to_string(monitor.join(name)).unwrap();
    let limits = read("limits");
    let limit = |name: &str| {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        let mut values = line[name.len()..].split_whitespace();
        let soft: u64 = values.next().unwrap().parse().unwrap();
        assert_eq!(values.next(), Some(&*soft.to_string()), "{line}");
        soft
    };
    assert_eq!(limit("Max core file size"), 0);
    // The root filesystem is in a window of 64 MiB.
    let root = std::fs::metadata(tests::testbed("busybox.erofs")).unwrap().len();
    assert_eq!(limit("Max address space"), (512 << 20) + (1 << 30) + (64 << 20) + root);
    assert_eq!(limit("Max file size"), 10 << 30);
    assert!(limit("Max open files") <= 1 << 16);
    assert_eq!(read("environ"), "");
}

/// The files of a process in /proc, as another process reads them.
#[derive(Debug, PartialEq, Eq)]
struct ProcFiles {
    namespaces: Vec<std::path::PathBuf>,
    root: std::path::PathBuf,
    /// The lines Uid, Gid, Groups and CapPrm of /proc/PID/status.
    status: Vec<String>,
}

fn read_proc_files(process: libc::pid_t) -> ProcFiles {
    let path = |name: &str| std::path::PathBuf::from(format!("/proc/{process}/{name}"));
    let link = |name: &str| std::fs::read_link(path(name)).unwrap();
    let status = std::fs::read_to_string(path("status")).unwrap();
    let lines = status
        .lines()
        .filter(|line| ["Uid:", "Gid:", "Groups:", "CapPrm:"].iter().any(|name| line.starts_with(name)));
    ProcFiles {
        namespaces: ["net", "ipc", "uts", "cgroup", "user"].map(|name| link(&format!("ns/{name}"))).into(),
        root: link("root"),
        status: lines.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect(),
    }
}

/// The files in /proc of a process that entered the full jail as this user.
fn proc_files_in_full_jail(user: u32) -> ProcFiles {
    let (ours, its) = std::os::unix::net::UnixStream::pair().unwrap();
    // SAFETY: the child has one thread, and calls _exit.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // Otherwise the read below would never reach EOF.
        drop(ours);
        // SAFETY: the calls change this process only. A program that the user starts can read its own folder in /proc.
        let is_user = unsafe { libc::setuid(user) == 0 && libc::prctl(libc::PR_SET_DUMPABLE, 1) == 0 };
        let jail = serde_json::from_str::<Jail>(r#"{"strictness": "Full", "on_refusal": "End"}"#).unwrap();
        let left_out = jail.confine_process(Limits::default()).map_err(|error| error.to_string());
        let result = jail.enter_root().map_err(|error| error.to_string());
        let message = format!("{is_user} {left_out:?} {result:?}\n");
        let _ = io::Write::write_all(&mut &its, message.as_bytes());
        let _ = io::Read::read(&mut &its, &mut [0]);
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(0) };
    }
    drop(its);
    let mut message = String::new();
    io::BufRead::read_line(&mut io::BufReader::new(&ours), &mut message).unwrap();
    let files = read_proc_files(child);
    drop(ours);
    // SAFETY: the call reaps the child.
    assert_eq!(unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) }, child);
    assert_eq!(message, "true Ok([]) Ok(())\n");
    assert_eq!(files.root, std::path::PathBuf::from(format!("/proc/{child}/fdinfo")));
    if user == 0 {
        let id = 0x7000_0000 + child.unsigned_abs();
        assert_eq!(files.status[0], format!("Uid: {id} {id} {id} {id}"));
        assert_eq!(files.status[1], format!("Gid: {id} {id} {id} {id}"));
        assert_eq!(files.status[2], "Groups:");
    }
    assert_eq!(files.status[3], "CapPrm: 0000000000000000");
    files
}

#[test]
fn the_full_jail_has_namespaces_and_a_root_directory_of_its_own() {
    // SAFETY: the call has no effect.
    let own = read_proc_files(unsafe { libc::getpid() });
    let (root, user) = (proc_files_in_full_jail(0), proc_files_in_full_jail(1000));
    for (at, name) in ["net", "ipc", "uts", "cgroup"].into_iter().enumerate() {
        assert_ne!(root.namespaces[at], own.namespaces[at], "{name}");
        assert_ne!(user.namespaces[at], own.namespaces[at], "{name}");
        assert_ne!(user.namespaces[at], root.namespaces[at], "{name}");
    }
    assert_eq!(root.namespaces[4], own.namespaces[4], "root becomes another user instead");
    assert_ne!(user.namespaces[4], own.namespaces[4]);
}
