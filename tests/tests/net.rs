//! Networking between a guest and its host, through a tap device or through passt, which needs no root.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use tests::guest_console::GuestConsole;
use tests::network::{
    TAP, enter_host_network, enter_network_namespace, enter_tap_network, make_tap, pattern, receive,
    serve_http, set_tap_owner, shell, with_network_programs,
};
use tests::user::User;
use tests::{Image, TIMEOUT, boot, is_from_prebooted_kernel, run, start};

const MIB: usize = 1 << 20;

/// A guest with a network card on a tap device.
fn on_tap(script: &str) -> Command {
    let mut command = boot();
    command.args(["--net", TAP, "--", "/bin/sh", "-c", script]);
    command
}

#[test]
fn init_configures_address_default_route_and_name_server() {
    enter_tap_network();
    let script = "ip -4 addr show eth0 | grep -o 'inet [0-9./]*'; ip route; cat /etc/resolv.conf; ping -c 1 10.9.0.1 >/dev/null && echo pong";
    let outcome = run(&mut on_tap(script));
    let lines: Vec<&str> = outcome.expect_status(0).stdout.lines().map(str::trim_end).collect();
    assert_eq!(
        lines,
        [
            "inet 10.9.0.2/24",
            "default via 10.9.0.1 dev eth0",
            "10.9.0.0/24 dev eth0 scope link  src 10.9.0.2",
            "nameserver 10.9.0.1",
            "pong"
        ],
        "{outcome}"
    );
    assert_eq!(outcome.stderr, "", "{outcome}");
}

#[test]
fn tcp_streams_pass_a_tap_in_both_directions() {
    enter_tap_network();
    let bytes = pattern(8 * MIB);
    let server = serve_http("10.9.0.1:5001", bytes.clone());
    let client = receive("10.9.0.1:5002", || {});
    let script = "wget -q -O /tmp/f http://10.9.0.1:5001/ && nc 10.9.0.1 5002 < /tmp/f";
    run(&mut on_tap(script)).expect_status(0);
    server.join().unwrap();
    assert!(client.join().unwrap() == bytes);
}

#[test]
fn a_tcp_stream_survives_its_tap_going_down_and_up() {
    enter_tap_network();
    let toggle = || shell("ifconfig tap0 down; ifconfig tap0 up");
    let client = receive("10.9.0.1:5002", toggle);
    let script = "head -c 4194304 /dev/urandom > /tmp/f; sha256sum < /tmp/f; nc 10.9.0.1 5002 < /tmp/f";
    let outcome = run(&mut on_tap(script));
    let sum = outcome.expect_status(0).stdout.clone();
    assert_eq!(sum, sha256(&client.join().unwrap()));
}

fn sha256(bytes: &[u8]) -> String {
    let mut child =
        Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("no sha256sum");
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap()
}

#[test]
fn removing_the_tap_takes_the_guests_link_down() {
    enter_tap_network();
    // Once while the guest is running, and once before its driver reads the link status.
    for is_up in [true, false] {
        let script = "echo up; while ip link show eth0 | grep -q LOWER_UP; do sleep 0; done; echo gone";
        let mut guest = GuestConsole::start(&mut on_tap(script));
        if is_up {
            guest.expect("up");
        } else {
            shell("while ! ifconfig tap0 | grep -q RUNNING; do sleep 0; done");
        }
        shell("ip link del tap0");
        guest.expect("gone");
        guest.expect_status(0);
        make_tap("tap0", "10.9.0.1");
    }
}

/// A guest with a network card on passt.
fn on_passt(options: &[&str], script: &str) -> Command {
    let mut command = with_network_programs(boot());
    command.args(["--net", "user"]).args(options).args(["--", "/bin/sh", "-c", script]);
    command
}

#[test]
fn a_guest_from_a_prebooted_kernel_has_a_network_card_on_a_tap() {
    enter_tap_network();
    let image = Image::copy_of("busybox");
    // Pre-booting does not require the tap device to exist.
    let outcome = run(image.command("preboot").args(["--net", "tap9,mac=06:00:0a:09:00:02"]));
    outcome.expect_status(0).expect_stderr("preboot/1-128-n; `kindling boot` continues from it");
    let bytes = pattern(MIB);
    // Each guest has its own IP address.
    for address in ["10.9.0.2", "10.9.0.3"] {
        let client = receive("10.9.0.1:5002", || {});
        let server = serve_http("10.9.0.1:5001", bytes.clone());
        let net = format!("tap0,mac=06:00:0a:09:00:02,ip={address}/24,gw=10.9.0.1");
        let script = "ip -4 addr show eth0 | grep -o 'inet [0-9./]*'; ip link show eth0 | grep -o 'ether [0-9a-f:]*'; \
                      wget -q -O /tmp/f http://10.9.0.1:5001/ && nc 10.9.0.1 5002 < /tmp/f";
        let outcome = image.prebooted_shell(&["--net", &net], script);
        let expected = format!("inet {address}/24\nether 06:00:0a:09:00:02\n");
        assert_eq!(outcome.expect_status(0).stdout, expected, "{outcome}");
        assert_eq!(outcome.stderr, "", "{outcome}");
        server.join().unwrap();
        assert!(client.join().unwrap() == bytes);
    }
    // The kernel reads the card's MAC address only once, so another address needs another boot.
    let report = image.path().join("report.json");
    let mut command = image.command("boot");
    let outcome = run(command.arg("--report-json").arg(&report).args(["--net", TAP, "--", "true"]));
    outcome.expect_status(0).expect_stderr("booting without it");
    assert!(!is_from_prebooted_kernel(&report), "{outcome}");
}

#[test]
fn a_guest_from_a_prebooted_kernel_has_a_network_card_on_passt() {
    enter_host_network();
    let image = Image::copy_of("busybox");
    let outcome = run(image.command("preboot").args(["--net", "user"]));
    outcome.expect_status(0).expect_stderr("preboot/1-128-n; `kindling boot` continues from it");
    assert!(!passt_runs(), "passt must not run without a guest");
    let report = image.path().join("report.json");
    let mut command = with_network_programs(image.command("boot"));
    command.args(["--net", "user", "-p", "8080:80", "--report-json"]).arg(&report);
    let script = "wget -q -O - http://192.0.2.1:5001/ | wc -c; nc -l -p 80 -e /bin/cat & \
                  while ! netstat -ltn | grep -q ':80 '; do sleep 0; done; echo ready; wait";
    let server = serve_http("192.0.2.1:5001", pattern(MIB));
    let mut guest = GuestConsole::start(command.args(["--", "/bin/sh", "-c", script]));
    assert_eq!(guest.expect(""), MIB.to_string());
    server.join().unwrap();
    guest.expect("ready");
    let mut stream = TcpStream::connect("127.0.0.1:8080").unwrap();
    let mut back = [0; 4];
    stream.write_all(b"word").unwrap();
    stream.read_exact(&mut back).unwrap();
    assert_eq!(back, *b"word");
    drop(stream);
    guest.expect_status(0);
    assert!(is_from_prebooted_kernel(&report), "it booted");
    wait_for_exit_of_passt();
}

/// Whether any passt process is running.
fn passt_runs() -> bool {
    ["passt", "passt.avx2"].iter().any(|name| !tests::processes(name).is_empty())
}

/// Waits until passt has exited after its guest.
fn wait_for_exit_of_passt() {
    let limit = std::time::Instant::now() + TIMEOUT;
    while passt_runs() {
        assert!(std::time::Instant::now() < limit, "passt is still running after its guest");
        std::thread::yield_now();
    }
}

#[test]
fn tcp_streams_pass_passt_in_both_directions() {
    enter_host_network();
    let bytes = pattern(4 * MIB);
    let server = serve_http("192.0.2.1:5001", bytes.clone());
    let client = receive("192.0.2.1:5002", || {});
    let script = "ip -4 addr show eth0 | grep -o 'inet [0-9./]*'; cat /etc/resolv.conf; \
                  wget -q -O /tmp/f http://192.0.2.1:5001/ && nc 192.0.2.1 5002 < /tmp/f";
    let outcome = run(&mut on_passt(&[], script));
    assert_eq!(outcome.expect_status(0).stdout, "inet 10.0.2.15/24\nnameserver 10.0.2.3\n", "{outcome}");
    assert_eq!(outcome.stderr, "", "{outcome}");
    server.join().unwrap();
    assert!(client.join().unwrap() == bytes);
    wait_for_exit_of_passt();
}

/// The root filesystem is a disk, in which /etc/resolv.conf is a dangling link.
#[test]
fn a_container_has_resolv_conf_and_an_entry_for_its_hostname() {
    enter_host_network();
    let user = User::new();
    let mut command = with_network_programs(user.run(&["--net", "user", "--name", "box"]));
    let outcome =
        run(command.args(["sh", "-c", "cat /etc/resolv.conf /etc/hosts; stat -c %F /etc/resolv.conf"]));
    let expected = "nameserver 10.0.2.3\n127.0.0.1\tlocalhost\n10.0.2.15\tbox\nregular file\n";
    assert_eq!(outcome.expect_status(0).stdout, expected, "{outcome}");
    wait_for_exit_of_passt();
}

#[test]
fn a_published_port_is_forwarded_to_the_guest() {
    enter_host_network();
    // The guest prints a line when it listens, and echoes its input.
    let script = "nc -l -p 80 -e /bin/cat & while ! netstat -ltn | grep -q ':80 '; do sleep 0; done; \
                  echo ready; wait";
    let mut guest = GuestConsole::start(&mut on_passt(&["-p", "8080:80"], script));
    guest.expect("ready");
    let bytes = pattern(MIB);
    let mut stream = TcpStream::connect("127.0.0.1:8080").unwrap();
    let (mut writer, sent) = (stream.try_clone().unwrap(), bytes.clone());
    let writer = std::thread::spawn(move || writer.write_all(&sent).unwrap());
    // The connection is not half-closed: Debian's passt would lose data in flight.
    let mut back = vec![0; bytes.len()];
    stream.read_exact(&mut back).unwrap();
    writer.join().unwrap();
    drop(stream);
    assert!(back == bytes);
    guest.expect_status(0);
    wait_for_exit_of_passt();
}

#[test]
fn guests_that_start_at_the_same_time_get_different_ports_of_a_range() {
    enter_host_network();
    let user = User::new();
    // The first run pre-boots the kernel with a network card.
    run(with_network_programs(user.run(&["--net", "user"])).arg("true")).expect_status(0);
    let names = ["one", "two", "three"];
    let starts = names.map(|name| {
        let guest = user.run(&["-d", "--name", name, "-p", "8000-8010:80"]);
        start(with_network_programs(guest).args(["sleep", "100000"]))
    });
    for started in starts {
        started.finish_within(TIMEOUT).expect_status(0);
    }
    let ports =
        names.map(|name| run(user.command("port").args([name, "80"])).expect_status(0).stdout.clone());
    run(user.command("rm").arg("-f").args(names)).expect_status(0);
    let mut sorted = ports.clone();
    sorted.sort();
    assert_eq!(sorted, ["0.0.0.0:8000\n", "0.0.0.0:8001\n", "0.0.0.0:8002\n"], "{ports:?}");
    wait_for_exit_of_passt();
}

#[test]
fn passt_exits_when_its_vmm_is_killed() {
    enter_host_network();
    let mut guest = GuestConsole::start(&mut on_passt(&[], "echo ready; sleep 1000"));
    guest.expect("ready");
    assert!(passt_runs());
    // Dropping the guest kills it.
    drop(guest);
    wait_for_exit_of_passt();
}

#[test]
fn an_error_of_passt_is_reported_on_one_line() {
    // passt requires a default route.
    enter_network_namespace();
    let outcome = run(&mut on_passt(&[], "true"));
    outcome.expect_status(2).expect_stderr("user cannot be the other end of a network card: passt: ");
    assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
    wait_for_exit_of_passt();
}

#[test]
fn an_error_names_the_tap_that_cannot_be_used() {
    enter_tap_network();
    let refused = |net: &str, expected: &str| {
        let outcome = run(boot().args(["--net", net, "--", "true"]));
        outcome.expect_status(2).expect_stderr(expected);
        assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
    };
    refused("tap7", "no such interface on the host; create it with `ip tuntap add tap7 mode tap");
    refused("lo", "it is not a tap device");
    // The first card of the same guest already uses the tap.
    let outcome = run(boot().args(["--net", "tap0", "--net", "tap0", "--", "true"]));
    outcome.expect_status(2).expect_stderr("it is in use by another process");
}

#[test]
fn a_tap_of_another_user_is_refused() {
    enter_tap_network();
    set_tap_owner("tap0", 1001);
    shell("chmod 666 /dev/net/tun");
    let boot_as = |user: u32| run(boot().args(["--net", "tap0", "--", "true"]).uid(user));
    let outcome = boot_as(1000);
    outcome
        .expect_status(2)
        .expect_stderr("it belongs to another user; create it with `ip tuntap add tap0 mode tap user");
    assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
    // The owner may use the tap; any further error is unrelated.
    let outcome = boot_as(1001);
    assert!(!outcome.stderr.contains("tap0"), "{outcome}");
}
