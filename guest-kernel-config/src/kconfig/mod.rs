//! A reader of the kernel's Kconfig files, good enough to answer "why is this symbol not set?".
//!
//! It keeps what decides a symbol's value: where it is defined, what it depends on, who selects it,
//! whether a person can set it. It runs no compiler tests: what hangs on one stays
//! [`Truth::Unknown`] and is never blamed.

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
        /// Where it is sourced; `None` for the top file.
        from: Option<Location>,
        /// What the system said.
        source: io::Error,
    },
    /// A file is larger than [`MAX_KCONFIG_BYTES`].
    #[error("{file}: more than {MAX_KCONFIG_BYTES} bytes, which is no Kconfig file")]
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
    /// Files source each other too deeply, or in a circle.
    #[error("{at}: {file} is sourced more than {limit} files deep")]
    TooDeep {
        /// The `source` statement.
        at: Location,
        /// The file it names.
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
        /// The file it names.
        file: String,
    },
    /// A file name with a macro whose value is not known.
    #[error("{at}: the value of {text:?} is not known here")]
    Unexpandable {
        /// The statement.
        at: Location,
        /// The file name.
        text: String,
    },
    /// A character that the language does not have.
    #[error("{at}: {character:?} means nothing here")]
    BadCharacter {
        /// Where.
        at: Location,
        /// The character.
        character: char,
    },
    /// A string without its closing quote.
    #[error("{at}: a string does not end on its line")]
    OpenString {
        /// Where.
        at: Location,
    },
    /// A macro reference without its closing parenthesis.
    #[error("{at}: a $( has no closing parenthesis on its line")]
    OpenMacro {
        /// Where.
        at: Location,
    },
    /// Something else should have stood here.
    #[error("{at}: expected {expected}, found {found}")]
    Expected {
        /// Where.
        at: Location,
        /// What should have stood there.
        expected: &'static str,
        /// What did.
        found: String,
    },
    /// Parentheses nest too deeply.
    #[error("{at}: more than {limit} parentheses inside each other")]
    TooNested {
        /// Where.
        at: Location,
        /// The limit.
        limit: usize,
    },
    /// Blocks nest too deeply.
    #[error("{at}: more than {limit} menus, choices and ifs inside each other")]
    TooManyBlocks {
        /// Where.
        at: Location,
        /// The limit.
        limit: usize,
    },
    /// A keyword that the language does not have.
    #[error("{at}: {word:?} is no Kconfig statement")]
    UnknownStatement {
        /// Where.
        at: Location,
        /// The keyword.
        word: String,
    },
    /// A keyword that does not belong to the entry before it.
    #[error("{at}: {word:?} belongs to no entry")]
    Misplaced {
        /// Where.
        at: Location,
        /// The keyword.
        word: String,
    },
    /// An `end...` that closes nothing, or something else.
    #[error("{at}: {word} closes nothing that was opened in this file")]
    NothingToClose {
        /// Where.
        at: Location,
        /// The keyword.
        word: String,
    },
    /// A block that its file does not close.
    #[error("{at}: this {block} is never closed")]
    NotClosed {
        /// Where it was opened.
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
    /// The file, from the top of the kernel tree.
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

/// Something that must hold, and where it is written. Many definitions share one.
#[derive(Debug, PartialEq, Eq)]
pub struct Condition {
    /// What must hold.
    pub expr: Expr,
    /// The `depends on`, `if` or `visible if` that says so.
    pub at: Location,
}

/// A list of conditions that must all hold.
pub type Conditions = Vec<Arc<Condition>>;

/// The question that lets a person set a symbol.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// The question.
    pub text: String,
    /// When it is asked, beyond what the definition depends on.
    pub when: Conditions,
}

/// A default, or the bounds of a number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guarded<T> {
    /// What applies.
    pub what: T,
    /// When; `None` is always.
    pub when: Option<Expr>,
}

/// One `config` entry of a symbol.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Definition {
    /// Where it stands.
    pub at: Location,
    /// The type, if this entry gives it.
    pub kind: Option<Kind>,
    /// The question, if this entry asks one.
    pub prompt: Option<Prompt>,
    /// What the entry depends on, its enclosing menus, ifs and choice included.
    pub depends: Conditions,
    /// The defaults, of which the first that applies counts.
    pub defaults: Vec<Guarded<Expr>>,
    /// The bounds of a number, of which the first that apply count.
    pub ranges: Vec<Guarded<(Term, Term)>>,
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
    /// When it does, beyond being set itself.
    pub when: Conditions,
    /// Where it says so.
    pub at: Location,
}

/// All that the Kconfig files say about one symbol.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Symbol {
    /// Its entries, in the order in which they are read; empty if it is only referred to.
    pub definitions: Vec<Definition>,
    /// Who selects it.
    pub selected_by: Vec<Selection>,
    /// Who implies it: sets it unless somebody says n.
    pub implied_by: Vec<Selection>,
}

impl Symbol {
    /// The type, which usually the first entry gives.
    #[must_use]
    pub fn kind(&self) -> Option<Kind> {
        self.definitions.iter().find_map(|definition| definition.kind)
    }

    /// The entries that let a person set the symbol.
    pub fn prompts(&self) -> impl Iterator<Item = (&Definition, &Prompt)> {
        self.definitions.iter().filter_map(|d| d.prompt.as_ref().map(|prompt| (d, prompt)))
    }

    /// The help text, if any entry has one.
    #[must_use]
    pub fn help(&self) -> Option<&str> {
        self.definitions.iter().find_map(|definition| definition.help.as_deref())
    }
}

/// A `choice`: of its members exactly one is y.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// Where it stands.
    pub at: Location,
    /// Its question.
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
    /// Reads all Kconfig files of a kernel, as an x86 build sees them, from the top one on.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, or the first line that is not understood.
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

/// Parses one expression, which tests write as text.
#[cfg(test)]
pub(crate) fn parse_expr(text: &str) -> Result<Expr, KconfigError> {
    let mut variables = lexer::Variables::default();
    // A word before the expression keeps a leading $( from being a preprocessor line.
    let line = format!("if {text}");
    let (at, line) = lexer::Lexer::new("expr".into(), &line).next_line(&mut variables)?.unwrap();
    let lexer::Line::Statement(tokens) = line else { panic!("{text} is no expression") };
    let mut cursor = parser::Cursor::new(&at, &tokens[1..]);
    let expr = cursor.expr()?;
    cursor.end()?;
    Ok(expr)
}
