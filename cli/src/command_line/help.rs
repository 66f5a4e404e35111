//! The help texts.

use super::{Action, Argument, Command, Count, Group, Opt};
use crate::text::{WIDTH, wrapped};
use std::fmt::Write;

/// The column at which descriptions start.
const TEXT_COLUMN: usize = 32;
/// The column at which they start in a list of commands.
const COMMAND_COLUMN: usize = 14;

impl<A> Command<A> {
    /// The help text.
    pub(super) fn help(&self) -> String {
        let mut text = wrapped(self.about, 0, WIDTH);
        let _ = write!(text, "\n\nUsage: kindling {} [OPTIONS]", self.name);
        for argument in self.arguments {
            let _ = write!(text, " {}", argument.usage());
        }
        text.push('\n');
        if !self.arguments.is_empty() {
            text += "\nArguments:\n";
            for argument in self.arguments {
                row(&mut text, TEXT_COLUMN, argument.name, argument.help);
            }
        }
        text += "\nOptions:\n";
        for option in self.listed_options() {
            row(&mut text, TEXT_COLUMN, &option.usage(), option.help);
        }
        row(&mut text, TEXT_COLUMN, "-h, --help", "Print this help");
        if !self.notes.is_empty() {
            let _ = write!(text, "\n{}\n", wrapped(self.notes, 0, WIDTH));
        }
        text
    }
}

impl<A> Argument<A> {
    fn usage(&self) -> String {
        let name = self.name;
        match self.count {
            Count::One => name.to_owned(),
            Count::Optional => format!("[{name}]"),
            Count::OneOrMore | Count::Rest { is_required: true } => format!("{name}..."),
            Count::Any | Count::Rest { is_required: false } => format!("[{name}]..."),
            Count::AfterDashes => format!("[-- {name}...]"),
        }
    }
}

impl<A> Opt<A> {
    fn usage(&self) -> String {
        let letter = if self.short.is_empty() { "    ".to_owned() } else { format!("-{}, ", self.short) };
        let value = if let Action::Value(name, _) = self.action { format!(" {name}") } else { String::new() };
        format!("{letter}--{}{value}", self.long)
    }
}

impl Group {
    /// The list of commands.
    pub(super) fn help(&self) -> String {
        let words = [self.name, "COMMAND"].join(" ");
        let mut text = format!("{}\n\nUsage: kindling {}\n\nCommands:\n", self.about, words.trim_start());
        for command in self.listed() {
            row(&mut text, COMMAND_COLUMN, command.name(), command.about());
        }
        let _ = write!(text, "\n`kindling {} --help` describes a command.\n", words.trim_start());
        text
    }
}

/// A name, and its description in a column beside it, or below it if the name is long.
fn row(text: &mut String, column: usize, name: &str, description: &str) {
    let description = wrapped(description, column, WIDTH);
    let _ = if name.chars().count() + 4 <= column {
        writeln!(text, "  {name:0$}{1}", column - 2, description.trim_start())
    } else {
        writeln!(text, "  {name}\n{description}")
    };
}
