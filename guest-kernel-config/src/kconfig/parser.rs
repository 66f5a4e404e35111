//! Parses the tokens of a statement.

use super::expr::{Comparison, Expr, Term, is_plain_constant};
use super::lexer::Token;
use super::{KconfigError, Location};

/// Maximum nesting of parentheses. The kernel's own files need four.
const MAX_EXPR_DEPTH: usize = 64;

/// Cursor over the tokens of one statement.
#[derive(Debug)]
pub(super) struct Cursor<'a> {
    at: &'a Location,
    rest: std::slice::Iter<'a, Token>,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(at: &'a Location, tokens: &'a [Token]) -> Self {
        Self { at, rest: tokens.iter() }
    }

    fn peek(&self) -> Option<&'a Token> {
        self.rest.as_slice().first()
    }

    /// Consumes the next token if it is this operator.
    fn accept(&mut self, operator: &str) -> bool {
        let found = matches!(self.peek(), Some(Token::Operator(found)) if *found == operator);
        if found {
            self.rest.next();
        }
        found
    }

    /// Consumes the next token if it is this word.
    fn accept_word(&mut self, word: &str) -> bool {
        let found = matches!(self.peek(), Some(Token::Word(found)) if found == word);
        if found {
            self.rest.next();
        }
        found
    }

    /// Expects this word.
    pub(super) fn keyword(&mut self, word: &str, quoted: &'static str) -> Result<(), KconfigError> {
        if self.accept_word(word) { Ok(()) } else { Err(self.expected(quoted)) }
    }

    /// The error for an unexpected token.
    fn expected(&self, expected: &'static str) -> KconfigError {
        let found = match self.peek() {
            None => "the end of the line".to_owned(),
            Some(Token::Word(text) | Token::Unknown(text)) => text.clone(),
            Some(Token::Quoted(text)) => format!("{text:?}"),
            Some(Token::Operator(operator)) => (*operator).to_owned(),
        };
        KconfigError::Expected { at: self.at.clone(), expected, found }
    }

    /// Expects a word, such as a symbol's name.
    pub(super) fn word(&mut self, expected: &'static str) -> Result<&'a str, KconfigError> {
        match self.peek() {
            Some(Token::Word(word)) => {
                self.rest.next();
                Ok(word)
            }
            _ => Err(self.expected(expected)),
        }
    }

    /// Expects a string. A string with an unknown macro is returned unexpanded.
    pub(super) fn string(&mut self, expected: &'static str) -> Result<&'a str, KconfigError> {
        match self.peek() {
            Some(Token::Quoted(text) | Token::Unknown(text)) => {
                self.rest.next();
                Ok(text)
            }
            _ => Err(self.expected(expected)),
        }
    }

    /// Expects a string without unknown macros.
    pub(super) fn path(&mut self) -> Result<&'a str, KconfigError> {
        match self.peek() {
            Some(Token::Unknown(text)) => {
                Err(KconfigError::Unexpandable { at: self.at.clone(), text: text.clone() })
            }
            _ => self.string("a file name in quotes"),
        }
    }

    /// Expects the end of the statement.
    pub(super) fn end(&self) -> Result<(), KconfigError> {
        if self.rest.as_slice().is_empty() { Ok(()) } else { Err(self.expected("nothing more")) }
    }

    pub(super) fn is_at_end(&self) -> bool {
        self.rest.as_slice().is_empty()
    }

    /// Parses an optional `if` with its condition, and expects the end of the statement.
    pub(super) fn condition(&mut self) -> Result<Option<Expr>, KconfigError> {
        let condition = if self.accept_word("if") { Some(self.expr()?) } else { None };
        self.end()?;
        Ok(condition)
    }

    pub(super) fn expr(&mut self) -> Result<Expr, KconfigError> {
        self.or(0)
    }

    fn or(&mut self, depth: usize) -> Result<Expr, KconfigError> {
        if depth > MAX_EXPR_DEPTH {
            return Err(KconfigError::TooNested { at: self.at.clone(), limit: MAX_EXPR_DEPTH });
        }
        let mut parts = Vec::new();
        loop {
            match self.and(depth)? {
                // Flattens nested chains of the same operator.
                Expr::Or(inner) => parts.extend(inner),
                part => parts.push(part),
            }
            if !self.accept("||") {
                return Ok(joined(parts, Expr::Or));
            }
        }
    }

    fn and(&mut self, depth: usize) -> Result<Expr, KconfigError> {
        let mut parts = Vec::new();
        loop {
            match self.not(depth)? {
                Expr::And(inner) => parts.extend(inner),
                part => parts.push(part),
            }
            if !self.accept("&&") {
                return Ok(joined(parts, Expr::And));
            }
        }
    }

    fn not(&mut self, depth: usize) -> Result<Expr, KconfigError> {
        let mut negations = 0_usize;
        while self.accept("!") {
            negations += 1;
        }
        let expr = self.primary(depth)?;
        // Two negations cancel out, also for m.
        Ok(if negations % 2 == 1 { Expr::Not(Box::new(expr)) } else { expr })
    }

    fn primary(&mut self, depth: usize) -> Result<Expr, KconfigError> {
        if self.accept("(") {
            let inner = self.or(depth + 1)?;
            if !self.accept(")") {
                return Err(self.expected("a closing parenthesis"));
            }
            return Ok(inner);
        }
        let left = self.term()?;
        let comparison = match self.peek() {
            Some(Token::Operator(operator)) => Comparison::from_operator(operator),
            _ => None,
        };
        if let Some(comparison) = comparison {
            self.rest.next();
            return Ok(Expr::Compare(left, comparison, self.term()?));
        }
        if left == Term::Constant("m".to_owned()) {
            // The kernel evaluates a constant m as `m && MODULES`.
            let modules = Term::Symbol("MODULES".to_owned());
            return Ok(Expr::And(vec![Expr::Term(left), Expr::Term(modules)]));
        }
        Ok(Expr::Term(left))
    }

    /// Parses a symbol, a constant or a macro.
    pub(super) fn term(&mut self) -> Result<Term, KconfigError> {
        let term = match self.peek() {
            Some(Token::Word(word)) if is_plain_constant(word) => Term::Constant(word.clone()),
            Some(Token::Word(word)) => Term::Symbol(word.clone()),
            Some(Token::Quoted(text)) => Term::Constant(text.clone()),
            Some(Token::Unknown(text)) => Term::Unknown(text.clone()),
            _ => return Err(self.expected("a symbol or a value")),
        };
        self.rest.next();
        Ok(term)
    }
}

/// Joins the parts to one expression. A single part is returned unchanged.
fn joined(mut parts: Vec<Expr>, join: fn(Vec<Expr>) -> Expr) -> Expr {
    if parts.len() == 1 { parts.remove(0) } else { join(parts) }
}
