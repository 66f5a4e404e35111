//! Debian's network programs work with a guest: curl with nginx, and iperf3, over a tap device and over passt.

use std::io::Write;
use std::process::{Command, Stdio};
use tests::guest_console::GuestConsole;
use tests::network::{TAP, enter_host_network, enter_tap_network, with_network_programs};
use tests::{kindling, run, testbed};

/// A guest of the image with Debian's network programs.
fn guest(network: &[&str], script: &str) -> Command {
    let mut command = with_network_programs(kindling());
    command.arg("boot").arg("--image").arg(testbed("images/network")).args(network);
    command.args(["--", "/bin/sh", "-c", script]).stdin(Stdio::null());
    command
}

/// Fetches files with curl from nginx in a guest with this address.
fn curl_fetches_from_nginx(network: &[&str], address: &str) {
    let script = "cd /tmp; head -c 4194304 /dev/urandom > f; sha256sum < f; echo word > g; \
        echo 'user root; daemon off; pid pid; events {} http { access_log off; client_body_temp_path b; \
            proxy_temp_path p; fastcgi_temp_path c; uwsgi_temp_path u; scgi_temp_path s; \
            server { listen 80; root /tmp; } }' > conf; \
        /lib64/nginx -p /tmp -e stderr -c conf & \
        while ! netstat -ltn | grep -q ':80 '; do sleep 0; done; echo ready; wait";
    let mut guest = GuestConsole::start(&mut guest(network, script));
    let sum = guest.expect("");
    guest.expect("ready");
    let host = |script: &str| {
        let mut command = with_network_programs(Command::new("/bin/sh"));
        run(command.args(["-c", script]).env("FROM", format!("http://{address}")))
    };
    // Four concurrent downloads, each complete.
    let outcome = host("for i in 1 2 3 4; do curl -sSf $FROM/f | sha256sum & done; wait");
    assert_eq!(outcome.expect_status(0).stdout, format!("{sum}\n").repeat(4), "{outcome}");
    // Several requests over one connection; then a range.
    let outcome = host("curl -sSf -w '%{num_connects}\n' $FROM/g $FROM/g; curl -sSf -r 1-2 $FROM/g");
    assert_eq!(outcome.expect_status(0).stdout, "word\n1\nword\n0\nor", "{outcome}");
    // 22 is curl's exit status for HTTP errors.
    host("curl -sSf $FROM/absent").expect_status(22).expect_stderr("404");
}

#[test]
fn curl_fetches_from_nginx_in_a_guest_over_a_tap() {
    enter_tap_network();
    curl_fetches_from_nginx(&["--net", TAP], "10.9.0.2");
}

#[test]
fn curl_fetches_from_nginx_in_a_guest_over_passt() {
    enter_host_network();
    curl_fetches_from_nginx(&["--net", "user", "-p", "8080:80"], "127.0.0.1:8080");
}

/// Measures the throughput between a guest and its host, which has this address, with iperf3 and prints it.
fn iperf3_measures(name: &str, network: &[&str], address: &str) {
    let mut server =
        GuestConsole::start(with_network_programs(Command::new("iperf3")).args(["-s", "--forceflush"]));
    server.expect("Server listening");
    // Sending, receiving, several streams in both directions, and datagrams.
    const TRANSFERS: [(&str, &str); 5] = [
        ("TCP, guest to host", "-n 16M"),
        ("TCP, host to guest", "-R -n 16M"),
        ("TCP, both directions, 4 streams", "-P 4 --bidir -n 8M"),
        ("UDP, guest to host", "-u -b 100M -l 1400 -n 8M"),
        ("UDP, host to guest", "-u -R -b 100M -l 1400 -n 8M"),
    ];
    let clients: Vec<_> = TRANSFERS
        .iter()
        .map(|(_, how)| format!("/lib64/iperf3 -c {address} -f m {how} || exit 1; echo next"))
        .collect();
    let outcome = run(&mut guest(network, &clients.join("; ")));
    let parts: Vec<_> = outcome.expect_status(0).stdout.split("next\n").collect();
    let _ = writeln!(std::io::stderr());
    for ((transfer, _), part) in TRANSFERS.iter().zip(parts) {
        assert!(part.contains("iperf Done."), "{outcome}");
        // The receivers' lines, or those of their sum, show that data has arrived.
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
        assert!(!rates.is_empty() && rates.iter().all(|&rate| rate > 0.0), "no data arrived: {outcome}");
        let rates: Vec<_> = rates.iter().map(|rate| format!("{rate:.0} Mbit/s")).collect();
        tests::print_progress(&format!("{name}, {transfer}: {}", rates.join(" and ")));
    }
}

#[test]
fn iperf3_transfers_data_over_a_tap() {
    enter_tap_network();
    iperf3_measures("tap", &["--net", TAP], "10.9.0.1");
}

#[test]
fn iperf3_transfers_data_over_passt() {
    enter_host_network();
    iperf3_measures("passt", &["--net", "user"], "192.0.2.1");
}
