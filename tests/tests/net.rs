//! A network card is a network card: packets, streams and names pass between the guest and its host, through a
//! tap device or without root.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use tests::conversation::Conversation;
use tests::network::{
    TAP, enter_host_network, enter_new, enter_tap_network, give, give_tap, make_tap, pattern, shell, take,
    with_network_programs,
};
use tests::user::User;
use tests::{Image, PATIENCE, boot, has_continued, run};

const MIB: usize = 1 << 20;

/// A guest on a tap device.
fn on_tap(script: &str) -> Command {
    let mut command = boot();
    command.args(["--net", TAP, "--", "/bin/sh", "-c", script]);
    command
}

#[test]
fn init_sets_the_address_the_way_out_and_the_name_server() {
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
fn streams_pass_a_tap_both_ways() {
    enter_tap_network();
    let bytes = pattern(8 * MIB);
    let server = give("10.9.0.1:5001", bytes.clone());
    let client = take("10.9.0.1:5002", || {});
    let script = "wget -q -O /tmp/f http://10.9.0.1:5001/ && nc 10.9.0.1 5002 < /tmp/f";
    run(&mut on_tap(script)).expect_status(0);
    server.join().unwrap();
    assert!(client.join().unwrap() == bytes);
}

#[test]
fn a_tap_that_goes_down_and_up_breaks_no_stream() {
    enter_tap_network();
    let toggle = || shell("ifconfig tap0 down; ifconfig tap0 up");
    let client = take("10.9.0.1:5002", toggle);
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
fn a_tap_that_is_removed_is_a_cable_that_was_pulled() {
    enter_tap_network();
    // Once when the guest is up, and once before it comes to look at its card.
    for is_up in [true, false] {
        let script = "echo up; while ip link show eth0 | grep -q LOWER_UP; do sleep 0; done; echo gone";
        let mut guest = Conversation::start(&mut on_tap(script));
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

/// A guest behind passt.
fn on_passt(options: &[&str], script: &str) -> Command {
    let mut command = with_network_programs(boot());
    command.args(["--net", "user"]).args(options).args(["--", "/bin/sh", "-c", script]);
    command
}

#[test]
fn a_prebooted_kernel_goes_on_with_a_card_on_a_tap() {
    enter_tap_network();
    let image = Image::copy_of("busybox");
    // There is no such tap, and nobody needs one before there is a guest.
    let outcome = run(image.command("preboot").args(["--net", "tap9,mac=06:00:0a:09:00:02"]));
    outcome.expect_status(0).expect_stderr("preboot/1-128-n is there");
    let bytes = pattern(MIB);
    // Every guest has an address of its own.
    for address in ["10.9.0.2", "10.9.0.3"] {
        let client = take("10.9.0.1:5002", || {});
        let server = give("10.9.0.1:5001", bytes.clone());
        let net = format!("tap0,mac=06:00:0a:09:00:02,ip={address}/24,gw=10.9.0.1");
        let script = "ip -4 addr show eth0 | grep -o 'inet [0-9./]*'; ip link show eth0 | grep -o 'ether [0-9a-f:]*'; \
                      wget -q -O /tmp/f http://10.9.0.1:5001/ && nc 10.9.0.1 5002 < /tmp/f";
        let outcome = image.continued_shell(&["--net", &net], script);
        let expected = format!("inet {address}/24\nether 06:00:0a:09:00:02\n");
        assert_eq!(outcome.expect_status(0).stdout, expected, "{outcome}");
        assert_eq!(outcome.stderr, "", "{outcome}");
        server.join().unwrap();
        assert!(client.join().unwrap() == bytes);
    }
    // A kernel reads the address of its card once.
    let report = image.path().join("report.json");
    let mut command = image.command("boot");
    let outcome = run(command.arg("--report-json").arg(&report).args(["--net", TAP, "--", "true"]));
    outcome.expect_status(0).expect_stderr("booting without it");
    assert!(!has_continued(&report), "{outcome}");
}

#[test]
fn a_prebooted_kernel_goes_on_with_a_card_on_passt() {
    enter_host_network();
    let image = Image::copy_of("busybox");
    let outcome = run(image.command("preboot").args(["--net", "user"]));
    outcome.expect_status(0).expect_stderr("preboot/1-128-n is there");
    assert!(!passt_runs(), "nobody is there for whom it would work");
    let report = image.path().join("report.json");
    let mut command = with_network_programs(image.command("boot"));
    command.args(["--net", "user", "-p", "8080:80", "--report-json"]).arg(&report);
    let script = "wget -q -O - http://192.0.2.1:5001/ | wc -c; nc -l -p 80 -e /bin/cat & \
                  while ! netstat -ltn | grep -q ':80 '; do sleep 0; done; echo ready; wait";
    let server = give("192.0.2.1:5001", pattern(MIB));
    let mut guest = Conversation::start(command.args(["--", "/bin/sh", "-c", script]));
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
    assert!(has_continued(&report), "it booted");
    wait_for_end_of_passt();
}

/// Whether a passt runs.
fn passt_runs() -> bool {
    let processes = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let names = processes.filter_map(|process| std::fs::read_to_string(process.path().join("comm")).ok());
    names.into_iter().any(|name| ["passt", "passt.avx2"].contains(&name.trim_end()))
}

/// Waits for passt's end: it follows that of its machine.
fn wait_for_end_of_passt() {
    let limit = std::time::Instant::now() + PATIENCE;
    while passt_runs() {
        assert!(std::time::Instant::now() < limit, "passt outlives its machine");
        std::thread::yield_now();
    }
}

#[test]
fn streams_pass_passt_both_ways() {
    enter_host_network();
    let bytes = pattern(4 * MIB);
    let server = give("192.0.2.1:5001", bytes.clone());
    let client = take("192.0.2.1:5002", || {});
    let script = "ip -4 addr show eth0 | grep -o 'inet [0-9./]*'; cat /etc/resolv.conf; \
                  wget -q -O /tmp/f http://192.0.2.1:5001/ && nc 192.0.2.1 5002 < /tmp/f";
    let outcome = run(&mut on_passt(&[], script));
    assert_eq!(outcome.expect_status(0).stdout, "inet 10.0.2.15/24\nnameserver 10.0.2.3\n", "{outcome}");
    assert_eq!(outcome.stderr, "", "{outcome}");
    server.join().unwrap();
    assert!(client.join().unwrap() == bytes);
    wait_for_end_of_passt();
}

/// Its root filesystem is a disk, with a link in the file's place.
#[test]
fn a_container_learns_of_its_name_server_and_its_own_name() {
    enter_host_network();
    let user = User::new();
    let mut command = with_network_programs(user.run(&["--net", "user", "--name", "box"]));
    let outcome =
        run(command.args(["sh", "-c", "cat /etc/resolv.conf /etc/hosts; stat -c %F /etc/resolv.conf"]));
    let expected = "nameserver 10.0.2.3\n127.0.0.1\tlocalhost\n10.0.2.15\tbox\nregular file\n";
    assert_eq!(outcome.expect_status(0).stdout, expected, "{outcome}");
    wait_for_end_of_passt();
}

#[test]
fn a_port_of_the_host_leads_into_the_guest() {
    enter_host_network();
    // The guest says when it listens, and gives back what it gets.
    let script = "nc -l -p 80 -e /bin/cat & while ! netstat -ltn | grep -q ':80 '; do sleep 0; done; \
                  echo ready; wait";
    let mut guest = Conversation::start(&mut on_passt(&["-p", "8080:80"], script));
    guest.expect("ready");
    let bytes = pattern(MIB);
    let mut stream = TcpStream::connect("127.0.0.1:8080").unwrap();
    let (mut writer, sent) = (stream.try_clone().unwrap(), bytes.clone());
    let writer = std::thread::spawn(move || writer.write_all(&sent).unwrap());
    // Nobody closes half of the connection: Debian's passt loses what is on its way then.
    let mut back = vec![0; bytes.len()];
    stream.read_exact(&mut back).unwrap();
    writer.join().unwrap();
    drop(stream);
    assert!(back == bytes);
    guest.expect_status(0);
    wait_for_end_of_passt();
}

#[test]
fn passt_ends_with_a_machine_that_is_killed() {
    enter_host_network();
    let mut guest = Conversation::start(&mut on_passt(&[], "echo ready; sleep 1000"));
    guest.expect("ready");
    assert!(passt_runs());
    // Kills it.
    drop(guest);
    wait_for_end_of_passt();
}

#[test]
fn what_passt_refuses_is_said_in_a_line() {
    // There is no way out, which passt wants to know before anything else.
    enter_new();
    let outcome = run(&mut on_passt(&[], "true"));
    outcome.expect_status(2).expect_stderr("user cannot be the other end of a network card: passt: ");
    assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
    wait_for_end_of_passt();
}

#[test]
fn taps_that_cannot_be_used_are_named() {
    enter_tap_network();
    let refused = |net: &str, expected: &str| {
        let outcome = run(boot().args(["--net", net, "--", "true"]));
        outcome.expect_status(2).expect_stderr(expected);
        assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
    };
    refused("tap7", "no such interface on the host; create it with `ip tuntap add tap7 mode tap");
    refused("lo", "it is not a tap device");
    // The second card of the same guest finds its tap in use by the first.
    let outcome = run(boot().args(["--net", "tap0", "--net", "tap0", "--", "true"]));
    outcome.expect_status(2).expect_stderr("it is in use by another process");
}

#[test]
fn a_tap_of_another_user_is_named() {
    enter_tap_network();
    give_tap("tap0", 1001);
    shell("chmod 666 /dev/net/tun");
    let boot_as = |user: u32| run(boot().args(["--net", "tap0", "--", "true"]).uid(user));
    let outcome = boot_as(1000);
    outcome
        .expect_status(2)
        .expect_stderr("it belongs to another user; create it with `ip tuntap add tap0 mode tap user");
    assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
    // Whatever its owner may not use then, it is not the tap.
    let outcome = boot_as(1001);
    assert!(!outcome.stderr.contains("tap0"), "{outcome}");
}
