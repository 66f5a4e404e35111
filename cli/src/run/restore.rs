//! `kindling restore`: a guest that continues from a snapshot, with its own command.

use super::arguments::{TIMEOUT_SECONDS, on_refusal, some_in, strictness};
use super::{Arguments, run};
use crate::command_line::{Argument, Command, Opt, Store, flag, one, option, store_as};

pub(crate) const COMMAND: Command<Arguments> = Command::new(
    "restore",
    "Start a guest from a snapshot of `kindling snapshot`; its command and its other processes continue",
    run,
)
.options(OPTIONS)
.arguments(ARGUMENTS);

#[rustfmt::skip]
const OPTIONS: &[Opt<Arguments>] = &[
    flag("d", "detach", |all| all.detach = true,
        "Run in the background, and print the name of the guest; `kindling logs` prints its output"),
    flag("i", "interactive", |all| all.process.interactive = true,
        "Forward standard input to the command"),
    flag("t", "tty", |all| all.process.tty = true,
        "Use this terminal for the command, which must have one"),
    option("", "timeout", "SECONDS", |all, word| store_as(&mut all.timeout, word, some_in(TIMEOUT_SECONDS)),
        "Kill the guest after this time, with exit status 124"),
    option("", "name", "NAME", |all, word| all.name.store(word),
        "Name of the guest, for `kindling exec` and others [default: random]"),
    option("", "hostname", "NAME", |all, word| all.hostname.store(word),
        "Hostname of the guest [default: the name of the guest]"),
    flag("", "rm", |all| all.rm = true,
        "Remove a detached guest when it ends; a guest in the foreground is always removed"),
    option("p", "publish", "[[ADDRESS:][HOST]:]GUEST[/tcp|/udp]", |all, word| all.publish.store(word),
        "Publish a port of the guest on the host; the guest must have had --net user (repeatable)"),
    option("", "jail", "require|full|best-effort|off", |all, word| store_as(&mut all.jail.strictness, word, strictness),
        "As of `kindling run`"),
    option("", "seccomp", "end|log", |all, word| store_as(&mut all.jail.on_refusal, word, on_refusal),
        "As of `kindling run`"),
    flag("", "report", |all| all.report = true,
        "Print the times of the steps on standard error at the end"),
];

const ARGUMENTS: &[Argument<Arguments>] =
    &[one("DIR", |all, word| all.snapshot.store(word), "Directory of the snapshot")];
