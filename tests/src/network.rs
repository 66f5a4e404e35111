//! Network namespaces with tap devices for tests, and streams through them.
#![expect(unsafe_code, reason = "namespaces and ioctls")]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::thread::JoinHandle;

/// Moves this thread and its children into a new network namespace that contains only loopback.
///
/// # Panics
/// When the test does not run as root.
pub fn enter_network_namespace() {
    // SAFETY: unshare changes the network namespace of this thread and does not access memory.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(result, 0, "a network namespace requires root: {}", std::io::Error::last_os_error());
    shell("ifconfig lo up");
}

/// Runs a shell script on the host.
///
/// # Panics
/// When it fails.
#[track_caller]
pub fn shell(script: &str) {
    let status = Command::new("/bin/sh").args(["-ec", script]).status().expect("no shell");
    assert!(status.success(), "{script}: {status}");
}

/// Creates a persistent tap device with an address.
///
/// # Panics
/// When it cannot be created.
pub fn make_tap(name: &str, address: &str) {
    const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;
    change_tap(name, TUNSETPERSIST, 1);
    shell(&format!("ifconfig {name} {address} netmask 255.255.255.0 up"));
}

/// Sets the owner of a tap device.
///
/// # Panics
/// When that fails.
pub fn set_tap_owner(name: &str, user: u32) {
    const TUNSETOWNER: libc::c_ulong = 0x4004_54cc;
    change_tap(name, TUNSETOWNER, user);
}

/// Attaches to a tap device, creates it if necessary, and performs an ioctl; the constants are from linux/if_tun.h.
fn change_tap(name: &str, what: libc::c_ulong, value: u32) {
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    const TAP_WITHOUT_PACKET_INFORMATION: u16 = 0x1002;
    let tun = File::options().read(true).write(true).open("/dev/net/tun").expect("no tun");
    let mut request = [0_u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[16..18].copy_from_slice(&TAP_WITHOUT_PACKET_INFORMATION.to_le_bytes());
    // SAFETY: TUNSETIFF takes a struct ifreq of 40 bytes, the others a number.
    let results = unsafe {
        [
            libc::ioctl(tun.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()),
            libc::ioctl(tun.as_raw_fd(), what, libc::c_ulong::from(value)),
        ]
    };
    assert_eq!(results, [0, 0], "{}", std::io::Error::last_os_error());
}

/// The argument of `--net` for the tap device of [`enter_tap_network`].
pub const TAP: &str = "tap0,ip=10.9.0.2/24,gw=10.9.0.1,dns=10.9.0.1";

/// Enters a network namespace with a tap device for the guest.
///
/// # Panics
/// When it cannot be created.
pub fn enter_tap_network() {
    enter_network_namespace();
    make_tap("tap0", "10.9.0.1");
}

/// Enters a network namespace with a default route, which passt requires.
///
/// # Panics
/// When it cannot be created.
pub fn enter_host_network() {
    enter_network_namespace();
    make_tap("up0", "192.0.2.1");
    shell("route add default gw 192.0.2.254");
}

/// Makes the testbed's passt, iperf3 and curl executable: the lab has no C library.
///
/// # Panics
/// When that fails.
#[must_use]
pub fn with_network_programs(mut command: Command) -> Command {
    let folder = crate::testbed("network");
    if !Path::new("/lib64").exists() {
        std::fs::create_dir_all("/lib").expect("cannot make a folder");
        symlink(&folder, "/lib64").expect("cannot link");
        symlink(&folder, "/lib/x86_64-linux-gnu").expect("cannot link");
        std::fs::create_dir_all("/etc").expect("cannot make a folder");
        // passt changes its user to nobody when it is started as root.
        std::fs::write("/etc/passwd", "nobody:x:65534:65534::/:/bin/sh\n").expect("cannot write");
    }
    command.env("PATH", format!("{}:/bin:/usr/bin", folder.display()));
    command
}

/// Pseudorandom bytes (xorshift64).
#[must_use]
pub fn pattern(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Serves these bytes over HTTP to one client.
///
/// # Panics
/// When it cannot listen.
pub fn serve_http(address: &str, bytes: Vec<u8>) -> JoinHandle<()> {
    let listener = TcpListener::bind(address).expect("cannot listen");
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().expect("no client connected");
        let request = BufReader::new(&stream).lines().map_while(Result::ok);
        assert!(request.take_while(|line| !line.is_empty()).count() > 0, "the client sent no request");
        write!(&stream, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", bytes.len()).expect("cannot send");
        (&stream).write_all(&bytes).expect("cannot send");
    })
}

/// Receives all bytes of one client. `on_first` is called when the first bytes have arrived.
///
/// # Panics
/// When it cannot listen.
pub fn receive(address: &str, on_first: impl FnOnce() + Send + 'static) -> JoinHandle<Vec<u8>> {
    let listener = TcpListener::bind(address).expect("cannot listen");
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().expect("no client connected");
        let mut bytes = vec![0; 1 << 16];
        (&stream).read_exact(&mut bytes).expect("the stream ended early");
        on_first();
        receive_rest(stream, &mut bytes);
        bytes
    })
}

fn receive_rest(mut stream: TcpStream, bytes: &mut Vec<u8>) {
    stream.read_to_end(bytes).expect("cannot receive");
}
