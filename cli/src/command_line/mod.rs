//! The grammar of the command line: one table of options and arguments for each command, which the parser and the help
//! text both read.
//!
//! `run` and `exec` are part of each start. The tables are constants, so that nothing is built before the first word is
//! parsed: clap's description of one command alone costs a `run` 0.2 ms.

mod help;
mod value;

pub(crate) use value::{Store, in_range, store_as};

use kindling::timeline::Instant;
use lexopt::{Arg, Parser};
use std::ffi::{OsStr, OsString};
use std::fmt::{self, Display, Formatter};

/// A command: its words, and the function that runs it with the arguments `A`.
pub(crate) struct Command<A: 'static> {
    name: &'static str,
    about: &'static str,
    /// Text after the options in the help.
    notes: &'static str,
    /// Its own options, and those that it shares with other commands.
    options: [&'static [Opt<A>]; 2],
    arguments: &'static [Argument<A>],
    /// Checks the arguments as a whole.
    check: fn(&A) -> Result<(), String>,
    run: fn(&A, Instant) -> u8,
}

/// Stores a value, or tells why it is invalid.
type Set<A> = fn(&mut A, OsString) -> Result<(), String>;

/// An option. One without a help text is not listed.
pub(crate) struct Opt<A> {
    long: &'static str,
    /// A letter, or empty.
    short: &'static str,
    help: &'static str,
    action: Action<A>,
}

enum Action<A> {
    Flag(fn(&mut A)),
    /// The name of the value in the help, and what stores it.
    Value(&'static str, Set<A>),
}

/// A positional argument.
pub(crate) struct Argument<A> {
    name: &'static str,
    help: &'static str,
    count: Count,
    store: Set<A>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Count {
    One,
    /// One or none; further arguments follow.
    Optional,
    OneOrMore,
    Any,
    /// All words that follow, options of another program among them; a `--` before them is skipped.
    Rest {
        is_required: bool,
    },
    /// All words that follow `--`.
    AfterDashes,
}

impl<A> Command<A> {
    pub(crate) const fn new(name: &'static str, about: &'static str, run: fn(&A, Instant) -> u8) -> Self {
        Self { name, about, notes: "", options: [&[], &[]], arguments: &[], check: |_| Ok(()), run }
    }

    pub(crate) const fn options(self, options: &'static [Opt<A>]) -> Self {
        Self { options: [options, self.options[1]], ..self }
    }

    /// Adds options that other commands have too.
    pub(crate) const fn more_options(self, options: &'static [Opt<A>]) -> Self {
        Self { options: [self.options[0], options], ..self }
    }

    pub(crate) const fn arguments(self, arguments: &'static [Argument<A>]) -> Self {
        Self { arguments, ..self }
    }

    pub(crate) const fn check(self, check: fn(&A) -> Result<(), String>) -> Self {
        Self { check, ..self }
    }

    pub(crate) const fn notes(self, notes: &'static str) -> Self {
        Self { notes, ..self }
    }
}

/// An option without a value. A repeated one has no further effect.
pub(crate) const fn flag<A>(
    short: &'static str,
    long: &'static str,
    set: fn(&mut A),
    help: &'static str,
) -> Opt<A> {
    Opt { short, long, help, action: Action::Flag(set) }
}

/// An option with a value. Of a repeated one, the last value counts, or all of them for a list.
pub(crate) const fn option<A>(
    short: &'static str,
    long: &'static str,
    value: &'static str,
    store: Set<A>,
    help: &'static str,
) -> Opt<A> {
    Opt { short, long, help, action: Action::Value(value, store) }
}

/// A required argument.
pub(crate) const fn one<A>(name: &'static str, store: Set<A>, help: &'static str) -> Argument<A> {
    Argument { name, help, count: Count::One, store }
}

/// One argument, or none.
pub(crate) const fn optional<A>(name: &'static str, store: Set<A>, help: &'static str) -> Argument<A> {
    Argument { name, help, count: Count::Optional, store }
}

/// One argument or more.
pub(crate) const fn one_or_more<A>(name: &'static str, store: Set<A>, help: &'static str) -> Argument<A> {
    Argument { name, help, count: Count::OneOrMore, store }
}

/// Any number of arguments.
pub(crate) const fn any<A>(name: &'static str, store: Set<A>, help: &'static str) -> Argument<A> {
    Argument { name, help, count: Count::Any, store }
}

/// A command for another program: all words that follow.
pub(crate) const fn rest<A>(name: &'static str, store: Set<A>, help: &'static str) -> Argument<A> {
    Argument { name, help, count: Count::Rest { is_required: false }, store }
}

/// A command for another program, which must be there.
pub(crate) const fn rest_required<A>(name: &'static str, store: Set<A>, help: &'static str) -> Argument<A> {
    Argument { name, help, count: Count::Rest { is_required: true }, store }
}

/// A command for another program: all arguments after `--`.
pub(crate) const fn after_dashes<A>(name: &'static str, store: Set<A>, help: &'static str) -> Argument<A> {
    Argument { name, help, count: Count::AfterDashes, store }
}

/// Why no command is run: help was requested, or the command line is invalid.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Stop {
    /// A text to print: the help or the version.
    #[error("{0}")]
    Help(String),
    #[error("unknown option {0}{1}")]
    UnknownOption(String, Suggestion),
    #[error("unknown command {0:?}{1}")]
    UnknownCommand(String, Suggestion),
    #[error("{0} needs a value, {0} {1}; one that starts with a hyphen is written {0}=VALUE")]
    NoValue(String, &'static str),
    #[error("{0} has no value")]
    UnexpectedValue(String),
    #[error("{0} {1:?}: {2}")]
    InvalidValue(String, String, String),
    #[error("unexpected argument {0:?}")]
    UnexpectedArgument(String),
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error("{0}")]
    Check(String),
    /// No command is given. The text is the list of commands.
    #[error("{0}")]
    NoCommand(String),
    /// The arguments of a command are invalid.
    #[error("{1}; see `kindling {0} --help`")]
    Invalid(&'static str, Box<Stop>),
}

/// The known name that is most similar to an unknown one, if any is similar enough.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Suggestion(Option<String>);

impl Suggestion {
    /// Selects the name that is most similar to `word`.
    fn for_word(word: &str, names: impl Iterator<Item = String>) -> Self {
        let rated = names.map(|name| (strsim::damerau_levenshtein(word, &name), name));
        // One typing error for three letters.
        let similar = rated.filter(|(distance, _)| 3 * distance <= word.len());
        Self(similar.min().map(|(_, name)| name))
    }
}

impl Display for Suggestion {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        self.0.as_ref().map_or(Ok(()), |name| write!(f, "; did you mean {name}?"))
    }
}

impl<A: Default> Command<A> {
    /// Parses the arguments after the name of the command.
    ///
    /// # Errors
    /// If they are invalid, or request help.
    pub(crate) fn parse(&self, words: impl IntoIterator<Item = OsString>) -> Result<A, Stop> {
        let mut parsed = A::default();
        let mut parser = Parser::from_args(words.into_iter().collect::<Vec<_>>());
        let mut arguments = self.arguments;
        let mut is_given = false;
        loop {
            let argument = arguments.first();
            if let Some(argument) = argument.filter(|argument| argument.count == Count::AfterDashes)
                && skip_dashes(&mut parser)
            {
                argument.store_rest(&mut parsed, &mut parser)?;
                break;
            }
            let word = match parser.next().map_err(|error| unexpected_value(&error))? {
                None => break,
                Some(Arg::Value(word)) => word,
                Some(Arg::Short('h') | Arg::Long("help")) => return Err(Stop::Help(self.help())),
                Some(option) => {
                    let name = as_written(&option);
                    self.store_option(&mut parsed, &name, &mut parser)?;
                    continue;
                }
            };
            let Some(argument) = argument.filter(|argument| argument.count != Count::AfterDashes) else {
                return Err(Stop::UnexpectedArgument(word.to_string_lossy().into_owned()));
            };
            argument.store(&mut parsed, word)?;
            is_given = !argument.count.is_single();
            if argument.is_rest() {
                argument.store_rest(&mut parsed, &mut parser)?;
            } else if argument.count.is_single() {
                arguments = &arguments[1..];
                if let Some(command) = arguments.first().filter(|next| next.is_rest()) {
                    skip_dashes(&mut parser);
                    is_given = command.store_rest(&mut parsed, &mut parser)?;
                }
            }
        }
        match arguments.first() {
            Some(Argument { name, count, .. }) if !is_given && count.is_required() => {
                Err(Stop::Missing(name))
            }
            _ => (self.check)(&parsed).map_err(Stop::Check).map(|()| parsed),
        }
    }

    /// Stores an option, whose value is the rest of its word or the next one.
    fn store_option(&self, parsed: &mut A, given: &str, parser: &mut Parser) -> Result<(), Stop> {
        let Some(option) = self.options.into_iter().flatten().find(|option| option.is(given)) else {
            let names = self.listed_options().map(|option| format!("--{}", option.long));
            return Err(Stop::UnknownOption(given.to_owned(), Suggestion::for_word(given, names)));
        };
        match option.action {
            Action::Flag(set) => set(parsed),
            Action::Value(name, store) => {
                let value = match parser.optional_value() {
                    Some(value) => value,
                    None => next_value(parser).ok_or_else(|| Stop::NoValue(given.to_owned(), name))?,
                };
                checked(given, value, |value| store(parsed, value))?;
            }
        }
        Ok(())
    }
}

impl<A> Command<A> {
    fn listed_options(&self) -> impl Iterator<Item = &Opt<A>> {
        self.options.into_iter().flatten().filter(|option| !option.help.is_empty())
    }
}

impl<A> Opt<A> {
    /// Whether `given` is this option, such as `--env` or `-e`.
    fn is(&self, given: &str) -> bool {
        match given.strip_prefix("--") {
            Some(long) => long == self.long,
            None => given.strip_prefix('-').is_some_and(|letter| letter == self.short),
        }
    }
}

impl Count {
    const fn is_single(self) -> bool {
        matches!(self, Self::One | Self::Optional)
    }

    const fn is_required(self) -> bool {
        matches!(self, Self::One | Self::OneOrMore | Self::Rest { is_required: true })
    }
}

impl<A> Argument<A> {
    const fn is_rest(&self) -> bool {
        matches!(self.count, Count::Rest { .. })
    }

    fn store(&self, parsed: &mut A, word: OsString) -> Result<(), Stop> {
        checked(self.name, word, |word| (self.store)(parsed, word))
    }

    /// Stores all words that are left. Returns whether there are any.
    fn store_rest(&self, parsed: &mut A, parser: &mut Parser) -> Result<bool, Stop> {
        let mut is_any = false;
        while let Some(word) = parser.try_raw_args().and_then(|mut words| words.next()) {
            self.store(parsed, word)?;
            is_any = true;
        }
        Ok(is_any)
    }
}

/// Skips the next word if it is `--`.
fn skip_dashes(parser: &mut Parser) -> bool {
    parser.try_raw_args().is_some_and(|mut words| words.next_if(|word| word == "--").is_some())
}

/// The next word, unless it is an option: a forgotten value must not swallow it.
fn next_value(parser: &mut Parser) -> Option<OsString> {
    let is_value = |word: &OsStr| word == "-" || !word.as_encoded_bytes().starts_with(b"-");
    parser.try_raw_args()?.next_if(is_value)
}

/// Stores a value. An error names its option or argument.
fn checked(
    name: &str,
    value: OsString,
    store: impl FnOnce(OsString) -> Result<(), String>,
) -> Result<(), Stop> {
    let text = value.to_string_lossy().into_owned();
    store(value).map_err(|reason| Stop::InvalidValue(name.to_owned(), text, reason))
}

/// The option as it was written, such as `--env` or `-e`.
fn as_written(option: &Arg) -> String {
    match option {
        Arg::Long(name) => format!("--{name}"),
        Arg::Short(letter) => format!("-{letter}"),
        Arg::Value(word) => word.to_string_lossy().into_owned(),
    }
}

fn unexpected_value(error: &lexopt::Error) -> Stop {
    match error {
        lexopt::Error::UnexpectedValue { option, .. } => Stop::UnexpectedValue(option.clone()),
        error => Stop::Check(error.to_string()),
    }
}

/// An entry of the list of commands: a [`Command`] of any argument type, or a [`Group`].
pub(crate) trait Entry: Sync {
    fn name(&self) -> &'static str;
    fn about(&self) -> &'static str;
    /// Parses the arguments after the name, and runs the command. Returns the exit status.
    fn execute(&self, words: Vec<OsString>, started: Instant) -> Result<u8, Stop>;
}

impl<A: Default> Entry for Command<A> {
    fn name(&self) -> &'static str {
        self.name.rsplit(' ').next().unwrap_or_default()
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn execute(&self, words: Vec<OsString>, started: Instant) -> Result<u8, Stop> {
        let parsed = self.parse(words).map_err(|stop| match stop {
            Stop::Help(text) => Stop::Help(text),
            error => Stop::Invalid(self.name, Box::new(error)),
        })?;
        Ok((self.run)(&parsed, started))
    }
}

/// Commands with a common first word, such as `kindling volume`, or all commands.
pub(crate) struct Group {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    pub(crate) commands: &'static [&'static dyn Entry],
}

impl Entry for Group {
    fn name(&self) -> &'static str {
        self.name
    }

    fn about(&self) -> &'static str {
        self.about
    }

    /// Runs the command that the first word names.
    fn execute(&self, mut words: Vec<OsString>, started: Instant) -> Result<u8, Stop> {
        if words.is_empty() {
            return Err(Stop::NoCommand(self.help()));
        }
        let word = words.remove(0);
        let name = word.to_string_lossy();
        match &*name {
            "-h" | "--help" => return Err(Stop::Help(self.help())),
            "-V" | "--version" if self.name.is_empty() => {
                return Err(Stop::Help(concat!("kindling ", env!("CARGO_PKG_VERSION"), "\n").to_owned()));
            }
            // `kindling help run` is `kindling run --help`.
            "help" => {
                words.push("--help".into());
                return self.execute(words, started);
            }
            _ => {}
        }
        if let Some(command) = self.commands.iter().find(|command| command.name() == name) {
            return command.execute(words, started);
        }
        if name.starts_with('-') {
            return Err(Stop::UnknownOption(name.into_owned(), Suggestion(None)));
        }
        let names = self.listed().map(|command| command.name().to_owned());
        Err(Stop::UnknownCommand(name.clone().into_owned(), Suggestion::for_word(&name, names)))
    }
}

impl Group {
    fn listed(&self) -> impl Iterator<Item = &&'static dyn Entry> {
        self.commands.iter().filter(|command| !command.about().is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Default, PartialEq, Eq)]
    struct Arguments {
        env: Vec<OsString>,
        memory: u64,
        tty: bool,
        image: String,
        command: Vec<OsString>,
    }

    const OPTIONS: &[Opt<Arguments>] = &[
        option("e", "env", "NAME", |all, word| all.env.store(word), "Set a variable"),
        option("m", "memory", "MIB", |all, word| all.memory.store(word), "Set the memory"),
        option("", "secret", "WORD", |all, word| all.image.store(word), ""),
        flag("t", "tty", |all| all.tty = true, "Allocate a terminal"),
    ];
    const IMAGE: Argument<Arguments> = one("IMAGE", |all, word| all.image.store(word), "Image");
    const RUN: Command<Arguments> = Command::new("run", "Run a command", |_, _| 0)
        .options(OPTIONS)
        .arguments(&[IMAGE, rest("COMMAND", |all, word| all.command.store(word), "Command")]);
    const BOOT: Command<Arguments> = Command::new("boot", "Boot a kernel", |_, _| 0)
        .options(OPTIONS)
        .arguments(&[after_dashes("COMMAND", |all, word| all.command.store(word), "Command")])
        .check(|all| if all.memory == 13 { Err("unlucky".to_owned()) } else { Ok(()) });
    const NAMES: Command<Arguments> = Command::new("names", "Name guests", |_, _| 0)
        .options(OPTIONS)
        .arguments(&[one_or_more("NAME", |all, word| all.command.store(word), "Names")]);

    fn parse(command: &Command<Arguments>, line: &str) -> Result<Arguments, Stop> {
        command.parse(line.split_terminator(' ').map(OsString::from))
    }

    fn words(line: &str) -> Vec<OsString> {
        line.split_terminator(' ').map(OsString::from).collect()
    }

    #[test]
    fn options_have_the_forms_that_other_commands_accept() {
        let expected = Arguments {
            env: words("A=1 B"),
            memory: 64,
            tty: true,
            image: "image".into(),
            command: words("sh -c -e"),
        };
        for line in [
            "--env A=1 --env B --memory 64 --tty image sh -c -e",
            "--env=A=1 -e B -m 64 -t image sh -c -e",
            "-eA=1 -e=B -tm64 image -- sh -c -e",
            "-t -m 1 -m 64 -t -te A=1 -e B image sh -c -e",
            "-t -m 64 -e A=1 -e B -- image sh -c -e",
        ] {
            assert_eq!(parse(&RUN, line), Ok(Arguments { ..copy(&expected) }), "{line}");
        }
    }

    fn copy(arguments: &Arguments) -> Arguments {
        Arguments {
            env: arguments.env.clone(),
            image: arguments.image.clone(),
            command: arguments.command.clone(),
            ..*arguments
        }
    }

    #[test]
    fn the_words_of_a_command_are_not_options() {
        for (line, command) in [
            ("image", ""),
            ("image --", ""),
            ("image -t", "-t"),
            ("image --help", "--help"),
            ("image -- sh -c -- -e", "sh -c -- -e"),
            ("image sh -- --", "sh -- --"),
        ] {
            let expected =
                Arguments { image: "image".into(), command: words(command), ..Arguments::default() };
            assert_eq!(parse(&RUN, line), Ok(expected), "{line}");
        }
        let boot = Arguments { memory: 1, command: words("-t -- x"), ..Arguments::default() };
        assert_eq!(parse(&BOOT, "-m 1 -- -t -- x"), Ok(boot));
        let names = Arguments { tty: true, command: words("a b -c"), ..Arguments::default() };
        assert_eq!(parse(&NAMES, "a -t b -- -c"), Ok(names));
    }

    #[test]
    fn errors_name_the_word_and_what_is_expected() {
        for (command, line, message) in [
            (&RUN, "", "IMAGE is missing"),
            (&RUN, "--", "IMAGE is missing"),
            (&NAMES, "-t", "NAME is missing"),
            (&RUN, "--memroy 5 image", "unknown option --memroy; did you mean --memory?"),
            (&RUN, "--secrte 5 image", "unknown option --secrte"),
            (&RUN, "-x image", "unknown option -x"),
            (&RUN, "-tx image", "unknown option -x"),
            (
                &RUN,
                "--env --tty image",
                "--env needs a value, --env NAME; one that starts with a hyphen is written --env=VALUE",
            ),
            (&RUN, "-m", "-m needs a value, -m MIB; one that starts with a hyphen is written -m=VALUE"),
            (&RUN, "--tty=yes image", "--tty has no value"),
            (&RUN, "-m +5 image", "-m \"+5\": expected a number from 0 to 18446744073709551615"),
            (&RUN, "--memory= image", "--memory \"\": expected a number from 0 to 18446744073709551615"),
            (&BOOT, "word", "unexpected argument \"word\""),
            (&BOOT, "-m 13", "unlucky"),
        ] {
            assert_eq!(parse(command, line).map_err(|stop| stop.to_string()), Err(message.into()), "{line}");
        }
    }

    #[test]
    fn values_may_be_a_hyphen_and_bytes_that_are_not_text() {
        use std::os::unix::ffi::OsStringExt;
        let bytes = OsString::from_vec(vec![b'A', b'=', 0xff]);
        let parsed = RUN.parse(["-e".into(), "-".into(), "-e".into(), bytes.clone(), "image".into()]);
        assert_eq!(parsed.map(|all| all.env), Ok(vec!["-".into(), bytes.clone()]));
        assert_eq!(
            RUN.parse([bytes]).map_err(|stop| stop.to_string()),
            Err("IMAGE \"A=\u{fffd}\": expected text in UTF-8".into())
        );
    }

    #[test]
    fn the_help_lists_what_is_not_hidden() {
        for line in ["--help", "-th", "-m 5 --help image"] {
            let Err(Stop::Help(text)) = parse(&RUN, line) else { panic!("{line} prints no help") };
            assert!(text.starts_with("Run a command\n\nUsage: kindling run [OPTIONS] IMAGE [COMMAND]...\n"));
            assert!(text.contains("\n  -m, --memory MIB              Set the memory\n"), "{text}");
            assert!(!text.contains("secret"), "{text}");
        }
    }

    #[test]
    fn a_group_runs_the_command_that_the_first_word_names() {
        const HIDDEN: Command<()> = Command::new("group hidden", "", |(), _| 5);
        const GROUP: Group = Group { name: "group", about: "A group", commands: &[&RUN, &NAMES, &HIDDEN] };
        let execute = |line: &str| GROUP.execute(words(line), Instant::now());
        assert_eq!(execute("run image"), Ok(0));
        assert_eq!(execute("hidden"), Ok(5));
        let message = |line: &str| execute(line).unwrap_err().to_string();
        assert_eq!(message(""), message("help"));
        assert_eq!(message("run -x"), "unknown option -x; see `kindling run --help`");
        assert_eq!(message("rum"), "unknown command \"rum\"; did you mean run?");
        assert_eq!(message("hiden"), "unknown command \"hiden\"");
        assert_eq!(message("--x"), "unknown option --x");
        assert_eq!(message("help run"), message("run --help"));
        assert_eq!(message("help"), message("--help"));
        assert!(message("help").contains("\n  run         Run a command\n"), "{}", message("help"));
        assert!(!message("help").contains("hidden"));
    }

    proptest! {
        /// No arguments make the parser panic, and the arguments of the guest's command are stored unchanged.
        #[test]
        fn words_of_a_command_arrive_unchanged(
            before in prop::collection::vec(prop::sample::select(vec![
                "-t", "--tty", "-e", "--env", "--env=", "-m", "5", "a", "--", "-", "", "é", "-é", "--é=", "--help", "-tm5",
            ]), 0..5),
            command in prop::collection::vec(prop::sample::select(vec!["a", "-t", "--", "-", "", "--env", "é"]), 0..5),
        ) {
            for grammar in [&RUN, &BOOT, &NAMES] {
                let _ = grammar.parse(before.iter().chain(&command).map(OsString::from));
            }
            let line = ["-t", "image", "--"].into_iter().chain(command.iter().copied());
            let parsed = RUN.parse(line.map(OsString::from)).unwrap();
            prop_assert_eq!(parsed.command, command.iter().map(OsString::from).collect::<Vec<_>>());
        }
    }
}
