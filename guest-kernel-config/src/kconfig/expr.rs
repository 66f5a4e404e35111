//! Expressions of the Kconfig language, and their evaluation in a configuration.

use std::cmp::Ordering;
use std::fmt;

use crate::config::KernelConfig;
use crate::value::Value;

/// The value of an expression. The order is that of the kernel: `&&` is the minimum, `||` the maximum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Truth {
    /// `n`.
    No,
    /// Depends on a macro that is not evaluated here, such as a compiler test.
    Unknown,
    /// `m`.
    Module,
    /// `y`.
    Yes,
}

impl std::ops::Not for Truth {
    type Output = Self;

    fn not(self) -> Self {
        match self {
            Self::No => Self::Yes,
            Self::Yes => Self::No,
            // !m is m.
            same => same,
        }
    }
}

/// A leaf of an expression.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Term {
    /// A symbol, without `CONFIG_`.
    Symbol(String),
    /// `y`, `m`, `n`, a number or a string.
    Constant(String),
    /// Unexpanded text with a macro: `$(cc-option,-foo)`.
    Unknown(String),
}

/// A comparison operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    /// `=`
    Equal,
    /// `!=`
    NotEqual,
    /// `<`
    Less,
    /// `<=`
    LessOrEqual,
    /// `>`
    Greater,
    /// `>=`
    GreaterOrEqual,
}

/// An expression.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expr {
    /// A single term.
    Term(Term),
    /// `!a`
    Not(Box<Expr>),
    /// `a && b && ...`
    And(Vec<Expr>),
    /// `a || b || ...`
    Or(Vec<Expr>),
    /// `a = b`, `a < b` and so on.
    Compare(Term, Comparison, Term),
}

impl Comparison {
    pub(super) fn from_operator(operator: &str) -> Option<Self> {
        Some(match operator {
            "=" => Self::Equal,
            "!=" => Self::NotEqual,
            "<" => Self::Less,
            "<=" => Self::LessOrEqual,
            ">" => Self::Greater,
            ">=" => Self::GreaterOrEqual,
            _ => return None,
        })
    }

    /// The comparison that holds exactly when this one does not.
    pub(crate) fn opposite(self) -> Self {
        match self {
            Self::Equal => Self::NotEqual,
            Self::NotEqual => Self::Equal,
            Self::Less => Self::GreaterOrEqual,
            Self::LessOrEqual => Self::Greater,
            Self::Greater => Self::LessOrEqual,
            Self::GreaterOrEqual => Self::Less,
        }
    }

    fn holds(self, ordering: Ordering) -> bool {
        match self {
            Self::Equal => ordering.is_eq(),
            Self::NotEqual => ordering.is_ne(),
            Self::Less => ordering.is_lt(),
            Self::LessOrEqual => ordering.is_le(),
            Self::Greater => ordering.is_gt(),
            Self::GreaterOrEqual => ordering.is_ge(),
        }
    }
}

impl Term {
    /// The value of a term as an expression.
    #[must_use]
    pub fn truth(&self, config: &KernelConfig) -> Truth {
        match self {
            Self::Symbol(name) => truth_of(config.value(name)),
            Self::Constant(text) => match text.as_str() {
                "y" => Truth::Yes,
                "m" => Truth::Module,
                _ => Truth::No,
            },
            Self::Unknown(_) => Truth::Unknown,
        }
    }

    /// The term as the string that comparisons look at; `None` if it is not known.
    fn text(&self, config: &KernelConfig) -> Option<String> {
        match self {
            Self::Symbol(name) => Some(match config.value(name) {
                Value::Text(text) => text.clone(),
                value => value.to_string(),
            }),
            Self::Constant(text) => Some(text.clone()),
            Self::Unknown(_) => None,
        }
    }

    /// The term as a number, if it is one.
    pub(crate) fn number(&self, config: &KernelConfig) -> Option<i128> {
        number(&self.text(config)?)
    }
}

/// What a value is worth where an expression asks for yes or no.
pub(crate) fn truth_of(value: &Value) -> Truth {
    match value {
        Value::Yes => Truth::Yes,
        Value::Module => Truth::Module,
        _ => Truth::No,
    }
}

fn number(text: &str) -> Option<i128> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => i128::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// Position in the order `n < m < y`, which is not the alphabetical one.
fn rank(text: &str) -> Option<usize> {
    ["n", "m", "y"].iter().position(|value| *value == text)
}

/// Compares two terms. Returns [`Truth::Unknown`] if one of them is unknown.
fn compare(left: &Term, comparison: Comparison, right: &Term, config: &KernelConfig) -> Truth {
    let (Some(left), Some(right)) = (left.text(config), right.text(config)) else {
        return Truth::Unknown;
    };
    let ordering = match (number(&left).zip(number(&right)), rank(&left).zip(rank(&right))) {
        (Some((left, right)), _) => left.cmp(&right),
        (_, Some((left, right))) => left.cmp(&right),
        // An unset symbol is "n" here, but is the empty string if its type is string.
        _ if (left == "n" && right.is_empty()) || (left.is_empty() && right == "n") => Ordering::Equal,
        _ => left.cmp(&right),
    };
    if comparison.holds(ordering) { Truth::Yes } else { Truth::No }
}

impl Expr {
    /// Evaluates the expression in a configuration.
    #[must_use]
    pub fn truth(&self, config: &KernelConfig) -> Truth {
        match self {
            Self::Term(term) => term.truth(config),
            Self::Not(inner) => !inner.truth(config),
            Self::And(parts) => parts.iter().map(|e| e.truth(config)).min().unwrap_or(Truth::Yes),
            Self::Or(parts) => parts.iter().map(|e| e.truth(config)).max().unwrap_or(Truth::No),
            Self::Compare(left, comparison, right) => compare(left, *comparison, right, config),
        }
    }

    /// The expression with the value of each symbol, as in menuconfig: `A [=y] && B [=n]`. Without a configuration,
    /// only the expression.
    #[must_use]
    pub fn annotated<'a>(&'a self, config: Option<&'a KernelConfig>) -> Annotated<'a> {
        Annotated { expr: self, config }
    }
}

/// Formats an expression with the values of its symbols; see [`Expr::annotated`].
#[derive(Debug, Clone, Copy)]
pub struct Annotated<'a> {
    expr: &'a Expr,
    config: Option<&'a KernelConfig>,
}

impl<'a> Annotated<'a> {
    fn part(self, expr: &'a Expr, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = Self { expr, ..self };
        match expr {
            Expr::And(_) | Expr::Or(_) => write!(f, "({part})"),
            _ => write!(f, "{part}"),
        }
    }

    fn list(self, parts: &'a [Expr], operator: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, part) in parts.iter().enumerate() {
            if index > 0 {
                write!(f, " {operator} ")?;
            }
            self.part(part, f)?;
        }
        Ok(())
    }

    fn term(self, term: &Term, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{term}")?;
        match (term, self.config) {
            (Term::Symbol(symbol), Some(config)) => write!(f, " [={}]", config.value(symbol)),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Annotated<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.expr {
            Expr::Term(term) => self.term(term, f),
            Expr::Not(inner) => {
                f.write_str("!")?;
                // !A=B is parsed as !(A=B), but looks like (!A)=B.
                if let Expr::Compare(..) = **inner {
                    return write!(f, "({})", Self { expr: inner, ..*self });
                }
                self.part(inner, f)
            }
            Expr::And(parts) => self.list(parts, "&&", f),
            Expr::Or(parts) => self.list(parts, "||", f),
            Expr::Compare(left, comparison, right) => {
                self.term(left, f)?;
                write!(f, " {comparison} ")?;
                self.term(right, f)
            }
        }
    }
}

/// Formats the expression as in Kconfig files.
impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.annotated(None))
    }
}

/// Formats the term as in Kconfig files; strings are quoted if necessary.
impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Symbol(text) | Self::Unknown(text) => f.write_str(text),
            Self::Constant(text) if is_plain_constant(text) => f.write_str(text),
            Self::Constant(text) => write!(f, "{text:?}"),
        }
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Equal => "=",
            Self::NotEqual => "!=",
            Self::Less => "<",
            Self::LessOrEqual => "<=",
            Self::Greater => ">",
            Self::GreaterOrEqual => ">=",
        })
    }
}

/// Whether an unquoted word is a constant and not a symbol.
///
/// Symbols may begin with a digit (`64BIT`), so that only a complete number is a constant.
pub(super) fn is_plain_constant(word: &str) -> bool {
    matches!(word, "y" | "m" | "n") || number(word).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kconfig::parse_expr;

    const CONFIG: &str =
        "CONFIG_Y=y\nCONFIG_M=m\nCONFIG_MODULES=y\nCONFIG_N16=16\nCONFIG_HEX=0x10\nCONFIG_S=\"x\"\n";

    #[test]
    fn expressions_evaluate_as_in_the_kernel() {
        use Truth::{Module, No, Unknown, Yes};
        let cases = [
            ("Y", Yes),
            ("M", Module),
            ("ABSENT", No),
            ("N16", No),
            ("y", Yes),
            ("m", Module),
            ("!M", Module),
            ("!ABSENT && Y", Yes),
            ("Y && M", Module),
            ("ABSENT || M", Module),
            ("Y || ABSENT && ABSENT", Yes),
            ("(Y || ABSENT) && ABSENT", No),
            ("!Y || !(ABSENT || M)", Module),
            ("Y=y", Yes),
            ("ABSENT=n", Yes),
            ("ABSENT=\"\"", Yes),
            ("M != y", Yes),
            ("Y >= M && M > ABSENT", Yes),
            ("ABSENT >= M", No),
            ("!Y=n", Yes),
            ("S = \"x\"", Yes),
            ("N16 >= 16 && N16 < 17", Yes),
            ("N16 > 9", Yes),
            ("HEX = 16", Yes),
            ("N16 <= 0xf", No),
            ("$(cc-option,-x)", Unknown),
            ("Y && $(cc-option,-x)", Unknown),
            ("ABSENT && $(cc-option,-x)", No),
            ("Y || !$(cc-option,-x)", Yes),
            ("$(cc-version) > 5", Unknown),
        ];
        let config = KernelConfig::parse(CONFIG).unwrap();
        for (text, truth) in cases {
            assert_eq!(parse_expr(text).unwrap().truth(&config), truth, "{text}");
        }
    }

    #[test]
    fn expressions_are_formatted_unambiguously() {
        let cases = [
            ("A&&B||C", "(A && B) || C"),
            ("A&&(B||C)&&D", "A && (B || C) && D"),
            ("!(A&&B)", "!(A && B)"),
            ("!A=B", "!(A = B)"),
            ("((A))", "A"),
            ("A=\"a b\"", "A = \"a b\""),
            ("m && A", "m && MODULES && A"),
            ("A||(B||(C||D))", "A || B || C || D"),
        ];
        for (text, written) in cases {
            assert_eq!(parse_expr(text).unwrap().to_string(), written);
        }
    }

    #[test]
    fn annotations_show_values() {
        let config = KernelConfig::parse(CONFIG).unwrap();
        let expr = parse_expr("Y && (!M || N16 > 8) && ABSENT").unwrap();
        assert_eq!(
            expr.annotated(Some(&config)).to_string(),
            "Y [=y] && (!M [=m] || N16 [=16] > 8) && ABSENT [=n]"
        );
    }

    #[test]
    fn numbers_are_constants_and_symbols_may_begin_with_a_digit() {
        for (word, constant) in [("64", true), ("0x40", true), ("-1", true), ("64BIT", false)] {
            assert_eq!(is_plain_constant(word), constant, "{word}");
        }
    }
}
