//! Debian's programs talk to a guest as to any machine: curl to nginx, iperf3 to itself, across a tap device and
//! across passt.

use std::io::Write;
use std::process::{Command, Stdio};
use tests::conversation::Conversation;
use tests::network::{TAP, enter_host_network, enter_tap_network, with_network_programs};
use tests::{kindling, run, testbed};

/// A guest with programs of Debian.
fn guest(network: &[&str], script: &str) -> Command {
    let mut command = with_network_programs(kindling());
    command.arg("boot").arg("--image").arg(testbed("images/network")).args(network);
    command.args(["--", "/bin/sh", "-c", script]).stdin(Stdio::null());
    command
}

/// Lets curl read from nginx in a guest, which is at this address.
fn curl_reads_from_nginx(network: &[&str], address: &str) {
    let script = "cd /tmp; head -c 4194304 /dev/urandom > f; sha256sum < f; echo word > g; \
        echo 'user root; daemon off; pid pid; events {} http { access_log off; client_body_temp_path b; \
            proxy_temp_path p; fastcgi_temp_path c; uwsgi_temp_path u; scgi_temp_path s; \
            server { listen 80; root /tmp; } }' > conf; \
        /lib64/nginx -p /tmp -e stderr -c conf & \
        while ! netstat -ltn | grep -q ':80 '; do sleep 0; done; echo ready; wait";
    let mut guest = Conversation::start(&mut guest(network, script));
    let sum = guest.expect("");
    guest.expect("ready");
    let host = |script: &str| {
        let mut command = with_network_programs(Command::new("/bin/sh"));
        run(command.args(["-c", script]).env("FROM", format!("http://{address}")))
    };
    // Four at once, and each whole.
    let outcome = host("for i in 1 2 3 4; do curl -sSf $FROM/f | sha256sum & done; wait");
    assert_eq!(outcome.expect_status(0).stdout, format!("{sum}\n").repeat(4), "{outcome}");
    // Several in one connection; then a part.
    let outcome = host("curl -sSf -w '%{num_connects}\n' $FROM/g $FROM/g; curl -sSf -r 1-2 $FROM/g");
    assert_eq!(outcome.expect_status(0).stdout, "word\n1\nword\n0\nor", "{outcome}");
    // curl's exit status for errors of HTTP.
    host("curl -sSf $FROM/absent").expect_status(22).expect_stderr("404");
}

#[test]
fn curl_reads_from_a_guests_nginx_across_a_tap() {
    enter_tap_network();
    curl_reads_from_nginx(&["--net", TAP], "10.9.0.2");
}

#[test]
fn curl_reads_from_a_guests_nginx_across_passt() {
    enter_host_network();
    curl_reads_from_nginx(&["--net", "user", "-p", "8080:80"], "127.0.0.1:8080");
}

/// Measures with iperf3 what passes between a guest and its host, which is at this address, and prints it.
fn iperf3_measures(name: &str, network: &[&str], address: &str) {
    let mut server =
        Conversation::start(with_network_programs(Command::new("iperf3")).args(["-s", "--forceflush"]));
    server.expect("Server listening");
    // Out, in, several streams both ways at once, and datagrams.
    const WAYS: [(&str, &str); 5] = [
        ("TCP, guest to host", "-n 16M"),
        ("TCP, host to guest", "-R -n 16M"),
        ("TCP, both ways, 4 streams", "-P 4 --bidir -n 8M"),
        ("UDP, guest to host", "-u -b 100M -l 1400 -n 8M"),
        ("UDP, host to guest", "-u -R -b 100M -l 1400 -n 8M"),
    ];
    let clients: Vec<_> = WAYS
        .iter()
        .map(|(_, how)| format!("/lib64/iperf3 -c {address} -f m {how} || exit 1; echo next"))
        .collect();
    let outcome = run(&mut guest(network, &clients.join("; ")));
    let parts: Vec<_> = outcome.expect_status(0).stdout.split("next\n").collect();
    let _ = writeln!(std::io::stderr());
    for ((way, _), part) in WAYS.iter().zip(parts) {
        assert!(part.contains("iperf Done."), "{outcome}");
        // What iperf3 counts has to have arrived: the receivers' lines, or those of their sum.
        let receivers: Vec<_> = part.lines().filter(|line| line.ends_with("receiver")).collect();
        let sums: Vec<_> = receivers.iter().filter(|line| line.starts_with("[SUM]")).collect();
        let rate = |line: &str| -> f64 {
            let (before, _) = line.split_once(" Mbits/sec").unwrap_or_else(|| panic!("{outcome}"));
            before
                .split_whitespace()
                .last()
                .and_then(|word| word.parse().ok())
                .unwrap_or_else(|| panic!("{outcome}"))
        };
        let rates: Vec<_> = if sums.is_empty() {
            receivers.iter().map(|line| rate(line)).collect()
        } else {
            sums.iter().map(|line| rate(line)).collect()
        };
        assert!(!rates.is_empty() && rates.iter().all(|&rate| rate > 0.0), "nothing arrived: {outcome}");
        let rates: Vec<_> = rates.iter().map(|rate| format!("{rate:.0} Mbit/s")).collect();
        tests::say(&format!("{name}, {way}: {}", rates.join(" and ")));
    }
}

#[test]
fn iperf3_measures_a_tap() {
    enter_tap_network();
    iperf3_measures("tap", &["--net", TAP], "10.9.0.1");
}

#[test]
fn iperf3_measures_passt() {
    enter_host_network();
    iperf3_measures("passt", &["--net", "user"], "192.0.2.1");
}
