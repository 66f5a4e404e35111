//! Options of a process in a guest, which `kindling run` and `kindling exec` have in common.

use crate::command_line::{Opt, Store, flag, option};
use crate::terminal;
use kindling::TerminalSize;
use std::ffi::OsString;
use std::path::PathBuf;

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct ProcessArguments {
    pub(crate) env: Vec<OsString>,
    pub(crate) env_file: Vec<PathBuf>,
    pub(crate) workdir: Option<OsString>,
    pub(crate) user: Option<String>,
    pub(crate) tty: bool,
    pub(crate) interactive: bool,
}

/// The options of a command whose arguments are `A`.
pub(crate) struct ProcessOptions<A>(std::marker::PhantomData<A>);

impl<A: AsMut<ProcessArguments> + 'static> ProcessOptions<A> {
    #[rustfmt::skip]
    pub(crate) const TABLE: &'static [Opt<A>] = &[
        option("e", "env", "NAME[=VALUE]", |all, word| all.as_mut().env.store(word),
            "Set an environment variable; NAME alone takes the value from the environment of kindling \
             (repeatable)"),
        option("", "env-file", "FILE", |all, word| all.as_mut().env_file.store(word),
            "Read environment variables from a file, one a line; --env overrides them (repeatable)"),
        option("w", "workdir", "DIR", |all, word| all.as_mut().workdir.store(word),
            "Working directory in the guest [default: that of the image or the running guest]"),
        option("u", "user", "USER[:GROUP]", |all, word| all.as_mut().user.store(word),
            "User and group, as names of the image or numbers [default: those of the image or the running guest]"),
        flag("t", "tty", |all| all.as_mut().tty = true,
            "Allocate a terminal for the command"),
        flag("i", "interactive", |all| all.as_mut().interactive = true,
            "Ignored: the standard input is always attached"),
    ];
}

impl ProcessArguments {
    /// The initial size of the process's terminal, if it has one.
    pub(crate) fn terminal(&self) -> Option<TerminalSize> {
        self.tty.then(terminal::new_terminal_size)
    }
}
