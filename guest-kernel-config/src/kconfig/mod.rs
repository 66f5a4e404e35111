//! A parser of the kernel's Kconfig files, for the question why a symbol is not set.
//!
//! It records what determines a symbol's value: definitions, dependencies, selections and prompts. It does not run
//! compiler tests: an expression that depends on one is [`Truth::Unknown`] and is never reported as the reason.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::Arc;

use thiserror::Error;

mod expr;
mod lexer;
mod parser;
mod reader;
mod source;
#[cfg(test)]
mod tests;

pub(crate) use expr::truth_of;
pub use expr::{Annotated, Comparison, Expr, Term, Truth};
pub use source::{KernelTree, MAX_KCONFIG_BYTES, Source};

use crate::value::bare;

/// Why a kernel's Kconfig files cannot be read.
#[derive(Debug, Error)]
pub enum KconfigError {
    /// A file could not be read.
    #[error("{file}: cannot be read{}", sourced(.from))]
    Read {
        /// The file.
        file: String,
        /// The `source` statement; `None` for the top file.
        from: Option<Location>,
        /// The error of the system.
        source: io::Error,
    },
    /// A file is larger than [`MAX_KCONFIG_BYTES`].
    #[error("{file}: larger than {MAX_KCONFIG_BYTES} bytes, not a Kconfig file")]
    TooBig {
        /// The file.
        file: String,
    },
    /// A file is not UTF-8.
    #[error("{file}: not text")]
    NotText {
        /// The file.
        file: String,
    },
    /// Files source each other too deeply, or in a cycle.
    #[error("{at}: {file} is sourced more than {limit} files deep")]
    TooDeep {
        /// The `source` statement.
        at: Location,
        /// The file.
        file: String,
        /// The limit.
        limit: usize,
    },
    /// Too many files are sourced.
    #[error("{at}: more than {limit} files are sourced")]
    TooManyFiles {
        /// The `source` statement that passes the limit.
        at: Location,
        /// The limit.
        limit: usize,
    },
    /// A `source` statement points outside the kernel tree.
    #[error("{at}: {file:?} is outside the kernel tree")]
    OutsideTree {
        /// The `source` statement.
        at: Location,
        /// The file.
        file: String,
    },
    /// A file name with a macro whose value is unknown.
    #[error("{at}: the value of {text:?} is unknown")]
    Unexpandable {
        /// The statement.
        at: Location,
        /// The file name.
        text: String,
    },
    /// A character that is not part of the language.
    #[error("{at}: unexpected character {character:?}")]
    BadCharacter {
        /// The location.
        at: Location,
        /// The character.
        character: char,
    },
    /// A string without its closing quote.
    #[error("{at}: missing closing quote")]
    OpenString {
        /// The location.
        at: Location,
    },
    /// A macro reference without its closing parenthesis.
    #[error("{at}: missing closing parenthesis of $(")]
    OpenMacro {
        /// The location.
        at: Location,
    },
    /// An unexpected token.
    #[error("{at}: expected {expected}, found {found}")]
    Expected {
        /// The location.
        at: Location,
        /// The expected token.
        expected: &'static str,
        /// The actual token.
        found: String,
    },
    /// Parentheses nest too deeply.
    #[error("{at}: more than {limit} nested parentheses")]
    TooNested {
        /// The location.
        at: Location,
        /// The limit.
        limit: usize,
    },
    /// Blocks nest too deeply.
    #[error("{at}: more than {limit} nested menus, choices and ifs")]
    TooManyBlocks {
        /// The location.
        at: Location,
        /// The limit.
        limit: usize,
    },
    /// An unknown keyword.
    #[error("{at}: {word:?} is not a Kconfig statement")]
    UnknownStatement {
        /// The location.
        at: Location,
        /// The keyword.
        word: String,
    },
    /// A property that the preceding entry cannot have.
    #[error("{at}: {word:?} outside of an entry that can have it")]
    Misplaced {
        /// The location.
        at: Location,
        /// The keyword.
        word: String,
    },
    /// An `end...` without the matching block.
    #[error("{at}: {word} without a matching block in this file")]
    NothingToClose {
        /// The location.
        at: Location,
        /// The keyword.
        word: String,
    },
    /// A block that is not closed in its file.
    #[error("{at}: this {block} is not closed")]
    NotClosed {
        /// The start of the block.
        at: Location,
        /// `if`, `menu` or `choice`.
        block: &'static str,
    },
}

fn sourced(from: &Option<Location>) -> String {
    from.as_ref().map_or_else(String::new, |at| format!(" (sourced at {at})"))
}

/// A line of a Kconfig file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// The file, relative to the top of the kernel tree.
    pub file: Arc<str>,
    /// The line, counted from 1.
    pub line: usize,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// The type of a symbol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// y or n.
    Bool,
    /// y, m or n.
    Tristate,
    /// A decimal number.
    Int,
    /// A hexadecimal number.
    Hex,
    /// A string.
    Text,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bool => "bool",
            Self::Tristate => "tristate",
            Self::Int => "int",
            Self::Hex => "hex",
            Self::Text => "string",
        })
    }
}

/// A condition and its location. Definitions share conditions of enclosing blocks.
#[derive(Debug, PartialEq, Eq)]
pub struct Condition {
    /// The expression that must hold.
    pub expr: Expr,
    /// Location of the `depends on`, `if` or `visible if`.
    pub at: Location,
}

/// A list of conditions that must all hold.
pub type Conditions = Vec<Arc<Condition>>;

/// The prompt of a symbol, which makes it settable by a user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// The text.
    pub text: String,
    /// Its conditions, in addition to the dependencies of the definition.
    pub when: Conditions,
}

/// A default or a range with an optional condition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conditional<T> {
    /// The default or range.
    pub value: T,
    /// The condition; `None` if it always applies.
    pub when: Option<Expr>,
}

/// One `config` entry of a symbol.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Definition {
    /// Its location.
    pub at: Location,
    /// The type, if this entry has one.
    pub kind: Option<Kind>,
    /// The prompt, if this entry has one.
    pub prompt: Option<Prompt>,
    /// The dependencies, including those of the enclosing menus, ifs and choice.
    pub depends: Conditions,
    /// The defaults. The first one that applies counts.
    pub defaults: Vec<Conditional<Expr>>,
    /// The ranges of a number. The first one that applies counts.
    pub ranges: Vec<Conditional<(Term, Term)>>,
    /// The help text, if there is one.
    pub help: Option<String>,
    /// The choice that the entry is a member of: an index for [`Kconfig::choice`].
    pub choice: Option<usize>,
}

/// A `select` or `imply`, seen from the symbol that it sets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    /// The symbol that selects, without `CONFIG_`.
    pub by: String,
    /// Conditions, in addition to the symbol being set.
    pub when: Conditions,
    /// Location of the `select` or `imply`.
    pub at: Location,
}

/// A symbol of the Kconfig files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Symbol {
    /// Its entries, in reading order. Empty if it is only referred to.
    pub definitions: Vec<Definition>,
    /// The selections of this symbol.
    pub selected_by: Vec<Selection>,
    /// The symbols that imply this one: they set it unless a user sets it to `n`.
    pub implied_by: Vec<Selection>,
}

impl Symbol {
    /// The type of the first entry that has one.
    #[must_use]
    pub fn kind(&self) -> Option<Kind> {
        self.definitions.iter().find_map(|definition| definition.kind)
    }

    /// The entries with a prompt.
    pub fn prompts(&self) -> impl Iterator<Item = (&Definition, &Prompt)> {
        self.definitions.iter().filter_map(|d| d.prompt.as_ref().map(|prompt| (d, prompt)))
    }

    /// The help text, if any entry has one.
    #[must_use]
    pub fn help(&self) -> Option<&str> {
        self.definitions.iter().find_map(|definition| definition.help.as_deref())
    }
}

/// A `choice`: exactly one of its members is `y`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// Its location.
    pub at: Location,
    /// Its prompt.
    pub prompt: String,
    /// Its members, in order, without `CONFIG_`.
    pub members: Vec<String>,
}

/// The Kconfig files of one kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Kconfig {
    symbols: BTreeMap<String, Symbol>,
    choices: Vec<Choice>,
}

impl Kconfig {
    /// Reads all Kconfig files of a kernel, as for an x86 build, starting with the top file.
    ///
    /// # Errors
    ///
    /// When a file cannot be read, or at the first invalid line.
    pub fn read(source: &dyn Source) -> Result<Self, KconfigError> {
        reader::read(source)
    }

    /// A symbol (with or without `CONFIG_`), if this kernel defines it.
    #[must_use]
    pub fn symbol(&self, name: &str) -> Option<&Symbol> {
        self.symbols.get(bare(name)).filter(|symbol| !symbol.definitions.is_empty())
    }

    /// All symbols that this kernel defines, sorted by name.
    pub fn symbols(&self) -> impl Iterator<Item = (&str, &Symbol)> {
        self.symbols
            .iter()
            .filter(|(_, symbol)| !symbol.definitions.is_empty())
            .map(|(name, symbol)| (name.as_str(), symbol))
    }

    /// The choice that [`Definition::choice`] points to.
    #[must_use]
    pub fn choice(&self, index: usize) -> Option<&Choice> {
        self.choices.get(index)
    }
}

/// Parses an expression, for tests.
#[cfg(test)]
pub(crate) fn parse_expr(text: &str) -> Result<Expr, KconfigError> {
    let mut variables = lexer::Variables::default();
    // Without a word before the expression, a leading $( would be a preprocessor line.
    let line = format!("if {text}");
    let (at, line) = lexer::Lexer::new("expr".into(), &line).next_line(&mut variables)?.unwrap();
    let lexer::Line::Statement(tokens) = line else { panic!("{text} is not an expression") };
    let mut cursor = parser::Cursor::new(&at, &tokens[1..]);
    let expr = cursor.expr()?;
    cursor.end()?;
    Ok(expr)
}
