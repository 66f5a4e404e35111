//! Splits the text of a Kconfig file into lines, tokens and help texts, and expands variables.
//!
//! The rules are those of the kernel's scripts/kconfig/lexer.l and preprocess.c, except that functions such as
//! `$(cc-option,...)` are not evaluated: their value is unknown.

use std::collections::HashMap;
use std::sync::Arc;

use super::{KconfigError, Location};

/// One word of a statement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Token {
    /// A keyword, a symbol or a number.
    Word(String),
    /// A string, without quotes and escapes.
    Quoted(String),
    /// A word or a string with a macro whose value is unknown, unexpanded.
    Unknown(String),
    /// An operator or a parenthesis.
    Operator(&'static str),
}

/// An operator precedes its own prefixes.
const OPERATORS: [&str; 11] = ["&&", "||", "!=", "<=", ">=", "=", "<", ">", "!", "(", ")"];

/// A logical line.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// A keyword with its arguments.
    Statement(Vec<Token>),
    /// `name = value`, `name := value` or `name += value`, or a bare macro call.
    Preprocessor,
}

/// Variables for references `$(name)`.
#[derive(Debug, Default)]
pub(super) struct Variables {
    /// `None` for a variable with an unknown value.
    values: HashMap<String, Option<String>>,
}

impl Variables {
    pub(super) fn new(known: &[(&str, &str)]) -> Self {
        let values = known.iter().map(|&(name, value)| (name.to_owned(), Some(value.to_owned()))).collect();
        Self { values }
    }

    /// Assigns a variable. Its value is known only if it contains no reference, which suffices for paths.
    fn assign(&mut self, name: &str, operator: &str, value: &str) {
        let known = operator != "+=" && !value.contains('$');
        self.values.insert(name.to_owned(), known.then(|| value.to_owned()));
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name)?.as_deref()
    }
}

/// Iterates over the logical lines of a file.
#[derive(Debug)]
pub(super) struct Lexer<'a> {
    file: Arc<str>,
    lines: std::iter::Peekable<std::iter::Enumerate<std::str::Lines<'a>>>,
}

impl<'a> Lexer<'a> {
    pub(super) fn new(file: Arc<str>, text: &'a str) -> Self {
        Self { file, lines: text.lines().enumerate().peekable() }
    }

    /// The next logical line that is neither blank nor a comment, with its location.
    pub(super) fn next_line(
        &mut self,
        variables: &mut Variables,
    ) -> Result<Option<(Location, Line)>, KconfigError> {
        let mut tokens = Vec::new();
        let mut start: Option<Location> = None;
        while let Some((index, text)) = self.lines.next() {
            let at = Location { file: Arc::clone(&self.file), line: index + 1 };
            if start.is_none() && is_preprocessor(text, variables) {
                return Ok(Some((at, Line::Preprocessor)));
            }
            let continued = LineLexer { rest: text, at: &at }.tokens(variables, &mut tokens)?;
            let at = start.unwrap_or(at);
            let is_last = self.lines.peek().is_none();
            if (!continued || is_last) && !tokens.is_empty() {
                return Ok(Some((at, Line::Statement(tokens))));
            }
            start = continued.then_some(at);
        }
        Ok(None)
    }

    /// The help text that begins on the next line. It ends before a line that is indented less than its first line.
    pub(super) fn help(&mut self) -> String {
        let mut help = String::new();
        let mut first_indent = None;
        while let Some((_, line)) = self.lines.peek() {
            let text = line.trim();
            if !text.is_empty() {
                let indent = indent_of(line);
                if indent == 0 || first_indent.is_some_and(|first| indent < first) {
                    break;
                }
                let first = *first_indent.get_or_insert(indent);
                help.extend(std::iter::repeat_n(' ', indent - first));
            }
            help.push_str(text);
            help.push('\n');
            self.lines.next();
        }
        help.trim_matches('\n').to_owned()
    }
}

/// The indentation of a line, with tab stops every 8 columns.
fn indent_of(line: &str) -> usize {
    let mut width = 0;
    for byte in line.bytes() {
        match byte {
            b' ' => width += 1,
            b'\t' => width = (width & !7) + 8,
            _ => break,
        }
    }
    width
}

/// Whether a line is a preprocessor line. Records an assignment.
fn is_preprocessor(line: &str, variables: &mut Variables) -> bool {
    let line = line.trim_start();
    if line.starts_with("$(") {
        return true;
    }
    let (name, rest) = line.split_at(word_length(line));
    let rest = rest.trim_start();
    let operator = [":=", "+=", "="].into_iter().find(|operator| rest.starts_with(operator));
    match operator {
        Some(operator) if !name.is_empty() => {
            variables.assign(name, operator, rest[operator.len()..].trim_start());
            true
        }
        _ => false,
    }
}

/// Length of the word at the start of `text`.
fn word_length(text: &str) -> usize {
    text.bytes().take_while(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-')).count()
}

/// Splits one physical line into tokens.
struct LineLexer<'a> {
    rest: &'a str,
    at: &'a Location,
}

impl LineLexer<'_> {
    /// Appends the line's tokens. Returns whether a backslash continues it on the next line.
    fn tokens(mut self, variables: &Variables, tokens: &mut Vec<Token>) -> Result<bool, KconfigError> {
        loop {
            self.rest = self.rest.trim_start();
            let Some(first) = self.rest.chars().next() else { return Ok(false) };
            if first == '#' {
                return Ok(false);
            }
            if self.rest == "\\" {
                return Ok(true);
            }
            if first == '"' || first == '\'' {
                tokens.push(self.string(first, variables)?);
            } else if first == '$' || word_length(self.rest) > 0 {
                tokens.push(self.word(variables)?);
            } else if let Some(op) = OPERATORS.into_iter().find(|op| self.rest.starts_with(op)) {
                self.rest = &self.rest[op.len()..];
                tokens.push(Token::Operator(op));
            } else {
                return Err(KconfigError::BadCharacter { at: self.at.clone(), character: first });
            }
        }
    }

    /// Reads a word: letters, digits, `_`, `-` and macro references.
    fn word(&mut self, variables: &Variables) -> Result<Token, KconfigError> {
        let whole = self.rest;
        let mut known = Some(String::new());
        loop {
            let length = word_length(self.rest);
            if length > 0 {
                let (plain, rest) = self.rest.split_at(length);
                push(&mut known, Some(plain));
                self.rest = rest;
            } else if self.rest.starts_with('$') {
                let value = self.reference(variables)?;
                push(&mut known, value);
            } else {
                break;
            }
        }
        let written = &whole[..whole.len() - self.rest.len()];
        Ok(known.map_or_else(|| Token::Unknown(written.to_owned()), Token::Word))
    }

    /// Reads a string with its quotes.
    fn string(&mut self, quote: char, variables: &Variables) -> Result<Token, KconfigError> {
        let whole = &self.rest[1..];
        self.rest = whole;
        let mut known = Some(String::new());
        loop {
            let plain = self.rest.find([quote, '\\', '$']);
            let Some(plain) = plain else {
                return Err(KconfigError::OpenString { at: self.at.clone() });
            };
            push(&mut known, Some(&self.rest[..plain]));
            self.rest = &self.rest[plain..];
            if self.rest.starts_with('$') {
                let value = self.reference(variables)?;
                push(&mut known, value);
            } else if let Some(rest) = self.rest.strip_prefix('\\') {
                let escaped = rest.chars().next().map_or(0, char::len_utf8);
                push(&mut known, Some(&rest[..escaped]));
                self.rest = &rest[escaped..];
            } else {
                break;
            }
        }
        let written = &whole[..whole.len() - self.rest.len()];
        self.rest = &self.rest[1..];
        Ok(known.map_or_else(|| Token::Unknown(written.to_owned()), Token::Quoted))
    }

    /// Consumes the `$` or the `$(...)` at the start of the rest. Returns its value, if it is known.
    fn reference<'v>(&mut self, variables: &'v Variables) -> Result<Option<&'v str>, KconfigError> {
        let Some(inner) = self.rest.strip_prefix("$(") else {
            self.rest = &self.rest[1..];
            return Ok(Some("$"));
        };
        let mut depth = 0_usize;
        for (index, byte) in inner.bytes().enumerate() {
            match byte {
                b'(' => depth += 1,
                b')' if depth == 0 => {
                    self.rest = &inner[index + 1..];
                    return Ok(variables.get(&inner[..index]));
                }
                b')' => depth -= 1,
                _ => {}
            }
        }
        Err(KconfigError::OpenMacro { at: self.at.clone() })
    }
}

/// Appends a part to a text. The text becomes unknown if the part is.
fn push(text: &mut Option<String>, part: Option<&str>) {
    match (text.as_mut(), part) {
        (Some(text), Some(part)) => text.push_str(part),
        _ => *text = None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Result<Vec<(usize, Line)>, KconfigError> {
        let mut variables = Variables::new(&[("SRCARCH", "x86")]);
        let mut lexer = Lexer::new("Kconfig".into(), text);
        let mut lines = Vec::new();
        while let Some((at, line)) = lexer.next_line(&mut variables)? {
            lines.push((at.line, line));
        }
        Ok(lines)
    }

    fn statement(text: &str) -> Vec<Token> {
        match lines(text).unwrap().pop() {
            Some((_, Line::Statement(tokens))) => tokens,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn words_strings_operators_and_comments() {
        use Token::{Operator, Quoted, Word};
        let tokens = statement("\tdepends on !A&&(B>=64||C!=\"it's \\\"x\\\"\") # why\n");
        let expected = [
            Word("depends".into()),
            Word("on".into()),
            Operator("!"),
            Word("A".into()),
            Operator("&&"),
            Operator("("),
            Word("B".into()),
            Operator(">="),
            Word("64".into()),
            Operator("||"),
            Word("C".into()),
            Operator("!="),
            Quoted("it's \"x\"".into()),
            Operator(")"),
        ];
        assert_eq!(tokens, expected);
    }

    #[test]
    fn a_backslash_continues_a_line() {
        let read = lines("# c\n\nif A \\\n  && B\nx\n").unwrap();
        assert_eq!(read[0].0, 3);
        assert_eq!(read[0].1, Line::Statement(statement("if A && B")));
        assert_eq!(read[1], (5, Line::Statement(statement("x"))));
        assert_eq!(lines("if A \\").unwrap()[0].1, Line::Statement(statement("if A")));
    }

    #[test]
    fn macros_are_expanded_or_stay_unknown() {
        let cases = [
            ("source \"arch/$(SRCARCH)/Kconfig\"", Token::Quoted("arch/x86/Kconfig".into())),
            ("depends $(SRCARCH)_64", Token::Word("x86_64".into())),
            (
                "def_bool $(success,test \"$(CC)\" = (gcc))",
                Token::Unknown("$(success,test \"$(CC)\" = (gcc))".into()),
            ),
            ("default \"$(CC_VERSION_TEXT)\"", Token::Unknown("$(CC_VERSION_TEXT)".into())),
            ("default \"a$b\"", Token::Quoted("a$b".into())),
        ];
        for (text, token) in cases {
            let tokens = statement(text);
            assert_eq!(tokens.last(), Some(&token), "{text}");
        }
    }

    #[test]
    fn assignments_are_recorded() {
        let text = "comma := ,\nname = x\nother := $(shell,id)\n$(error-if,n,{)\na \"$(name)-$(comma)\"\nb $(other)\n";
        let read = lines(text).unwrap();
        assert_eq!(read.len(), 6);
        assert!(read[..4].iter().all(|(_, line)| *line == Line::Preprocessor));
        assert_eq!(read[4].1, Line::Statement(statement("a \"x-,\"")));
        let unknown = vec![Token::Word("b".into()), Token::Unknown("$(other)".into())];
        assert_eq!(read[5].1, Line::Statement(unknown));
    }

    #[test]
    fn help_ends_with_its_indentation() {
        let text = "\t  First.\n\n\t    Indented.\n\t  Last.\n\n\n\tdepends on A\n";
        let mut lexer = Lexer::new("Kconfig".into(), text);
        assert_eq!(lexer.help(), "First.\n\n  Indented.\nLast.");
        let (at, _) = lexer.next_line(&mut Variables::default()).unwrap().unwrap();
        assert_eq!(at.line, 7);

        // Tabs and spaces up to the same column are the same indentation.
        assert_eq!(Lexer::new("K".into(), "        a\n\tb\n    \tc\n").help(), "a\nb\nc");
        for empty in ["", "config A\n", "\n\nconfig A\n"] {
            assert_eq!(Lexer::new("K".into(), empty).help(), "");
        }
    }

    #[test]
    fn errors_name_the_location() {
        let cases = [
            ("a\nb ;\n", "Kconfig:2: unexpected character ';'"),
            ("a \"b\n", "Kconfig:1: missing closing quote"),
            ("a \"b\\", "Kconfig:1: missing closing quote"),
            ("a $(b", "Kconfig:1: missing closing parenthesis of $("),
            ("a \"$(b", "Kconfig:1: missing closing parenthesis of $("),
            ("a \\ \n", "Kconfig:1: unexpected character '\\\\'"),
        ];
        for (text, message) in cases {
            assert_eq!(lines(text).unwrap_err().to_string(), message, "{text:?}");
        }
    }
}
