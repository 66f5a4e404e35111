//! `kindling boot` on a terminal: raw mode, the escape sequence Ctrl-A x, and restored settings.

use tests::terminal::Terminal;
use tests::{boot, kindling};

const RAW: u32 = 0;

fn line_flags(flags: u32) -> u32 {
    flags & (libc::ECHO | libc::ICANON | libc::ISIG)
}

#[test]
fn ctrl_c_reaches_the_guest_and_ctrl_a_x_leaves() {
    let mut terminal = Terminal::open();
    let before = terminal.flags();
    assert_ne!(line_flags(before), RAW);
    let script = "trap 'echo inter''rupted' INT; echo rea''dy; while :; do sleep 1; done";
    let mut child = terminal.start(boot().args(["--", "/bin/sh", "-c", script]));
    terminal.wait_for("ready");
    assert_eq!(line_flags(terminal.flags()), RAW);
    terminal.type_keys(b"\x03");
    terminal.wait_for("interrupted");
    terminal.type_keys(b"\x01x");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(terminal.flags(), before);
}

#[test]
fn the_terminal_is_restored_after_a_signal_and_after_a_failure() {
    let mut terminal = Terminal::open();
    let before = terminal.flags();
    let mut child = terminal.start(boot().args(["--", "/bin/sh", "-c", "echo rea''dy; sleep 1000"]));
    terminal.wait_for("ready");
    tests::kill(child.id(), libc::SIGTERM);
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert_eq!(terminal.flags(), before);

    let mut child = terminal.start(boot().args(["--", "/bin/sh", "-c", "echo rea''dy; sleep 1000"]));
    terminal.wait_for("ready");
    tests::kill(child.id(), libc::SIGABRT);
    assert_eq!(child.wait().unwrap().code(), None);
    assert_eq!(terminal.flags(), before);
}

#[test]
fn the_terminal_is_restored_after_a_normal_exit_and_untouched_by_usage_errors() {
    let terminal = Terminal::open();
    let before = terminal.flags();
    let mut child = terminal.start(boot().args(["--", "true"]));
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(terminal.flags(), before);
    // A boot that cannot start never changes the settings.
    let mut child = terminal.start(kindling().args(["boot", "--kernel", "/nonexistent"]));
    assert_eq!(child.wait().unwrap().code(), Some(2));
    assert_eq!(terminal.flags(), before);
}
