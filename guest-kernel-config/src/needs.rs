//! Finds the unmet terms of a condition.

use std::fmt;

use crate::compose::{Composed, Request};
use crate::config::KernelConfig;
use crate::kconfig::{Comparison, Condition, Expr, Kconfig, Symbol, Term, Truth};
use crate::value::Value;

/// Maximum number of alternatives or names in a message; the rest is only counted.
const MAX_LISTED: usize = 4;

/// One change that a condition needs to hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Need {
    /// A symbol must be set.
    On {
        /// The symbol, without `CONFIG_`.
        symbol: String,
        /// The actual value.
        actual: Value,
        /// How it can be set.
        remedy: Remedy,
    },
    /// A symbol must not be set.
    Off {
        /// The symbol, without `CONFIG_`.
        symbol: String,
        /// The actual value.
        actual: Value,
        /// Location of the request for it, as `file:line`.
        requested_at: Option<String>,
    },
    /// A comparison must hold.
    Compare {
        /// The left side.
        left: Term,
        /// The operator.
        comparison: Comparison,
        /// The right side.
        right: Term,
        /// The value of the left side, if that is a symbol.
        actual: Option<Value>,
    },
    /// A macro must be `y`, which is unknown here: a compiler test, for example.
    Unknown(String),
    /// The condition is the constant `n`.
    Never,
    /// All needs of one of these lists must be met.
    Any(Vec<Vec<Need>>),
}

/// How a needed symbol can be set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Remedy {
    /// By a request for it.
    Request,
    /// By removing the request for `n` at this `file:line`.
    RemoveRequest(String),
    /// Only by these other symbols, which select it, or by its default if the list is empty.
    Select(Vec<String>),
    /// It cannot be set, because this kernel does not define it.
    None,
}

impl Need {
    /// Whether this is certainly unmet. A need that depends only on a macro may be met.
    #[must_use]
    pub fn is_certain(&self) -> bool {
        match self {
            Self::Unknown(_) => false,
            Self::Any(alternatives) => alternatives.iter().all(|needs| needs.iter().any(Self::is_certain)),
            _ => true,
        }
    }

    /// Whether no configuration of this kernel can meet it.
    fn is_impossible(&self) -> bool {
        matches!(self, Self::Never | Self::On { remedy: Remedy::None, .. })
    }
}

/// Finds the unmet terms of conditions in a configuration.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Diagnosis<'a> {
    pub(crate) config: &'a KernelConfig,
    pub(crate) kconfig: &'a Kconfig,
    /// The requests, for the locations of conflicting ones.
    pub(crate) requests: Option<&'a Composed>,
    /// Minimum value of a condition: `m` suffices for a bool; a tristate can be `y` only if its condition is.
    pub(crate) level: Truth,
}

impl Diagnosis<'_> {
    /// All unmet terms of a list of conditions, without duplicates.
    pub(crate) fn conditions<'c>(&self, list: impl Iterator<Item = &'c Condition>) -> Vec<Need> {
        unique(list.flat_map(|condition| self.expr(&condition.expr, true)).collect())
    }

    /// The changes that make an expression true, or false if not `wanted`. Empty if it already is.
    pub(crate) fn expr(&self, expr: &Expr, wanted: bool) -> Vec<Need> {
        let truth = expr.truth(self.config);
        if (if wanted { truth } else { !truth }) >= self.level {
            return Vec::new();
        }
        match expr {
            Expr::Not(inner) => self.expr(inner, !wanted),
            // De Morgan: an && is false if one part is false, an || if all parts are.
            Expr::And(parts) if wanted => self.all(parts, wanted),
            Expr::Or(parts) if !wanted => self.all(parts, wanted),
            Expr::And(parts) | Expr::Or(parts) => self.any(parts, wanted),
            Expr::Compare(left, comparison, right) => {
                let comparison = if wanted { *comparison } else { comparison.opposite() };
                vec![self.comparison(left, comparison, right)]
            }
            Expr::Term(term) => vec![self.term(term, wanted)],
        }
    }

    fn all(&self, parts: &[Expr], wanted: bool) -> Vec<Need> {
        unique(parts.iter().flat_map(|part| self.expr(part, wanted)).collect())
    }

    fn any(&self, parts: &[Expr], wanted: bool) -> Vec<Need> {
        let mut alternatives: Vec<Vec<Need>> = parts.iter().map(|part| self.expr(part, wanted)).collect();
        if let Some(first) = alternatives.first().cloned() {
            alternatives.retain(|needs| !needs.iter().any(Need::is_impossible));
            if alternatives.is_empty() {
                return first;
            }
        }
        // "A, or A and B" is "A": after sorting by length, drop alternatives that contain a shorter one.
        alternatives.sort_by_key(Vec::len);
        let mut minimal: Vec<Vec<Need>> = Vec::new();
        for needs in alternatives {
            if !minimal.iter().any(|shorter| shorter.iter().all(|need| needs.contains(need))) {
                minimal.push(needs);
            }
        }
        if minimal.len() == 1 { minimal.remove(0) } else { vec![Need::Any(minimal)] }
    }

    fn term(&self, term: &Term, wanted: bool) -> Need {
        match term {
            Term::Symbol(symbol) => self.symbol(symbol, wanted),
            Term::Constant(_) => Need::Never,
            Term::Unknown(text) => Need::Unknown(text.clone()),
        }
    }

    fn symbol(&self, name: &str, wanted: bool) -> Need {
        let (symbol, actual) = (name.to_owned(), self.config.value(name).clone());
        let request = self.requests.and_then(|requests| requests.request(name));
        if !wanted {
            let requested_at = request.filter(|request| request.value.is_set()).map(Request::location);
            return Need::Off { symbol, actual, requested_at };
        }
        let remedy = match (self.kconfig.symbol(name), request) {
            (None, _) => Remedy::None,
            (Some(_), Some(request)) if !request.value.is_set() => Remedy::RemoveRequest(request.location()),
            (Some(symbol), _) if symbol.prompts().next().is_some() => Remedy::Request,
            (Some(symbol), _) => Remedy::Select(selectors(symbol)),
        };
        Need::On { symbol, actual, remedy }
    }

    fn comparison(&self, left: &Term, comparison: Comparison, right: &Term) -> Need {
        if matches!(left, Term::Unknown(_)) || matches!(right, Term::Unknown(_)) {
            return Need::Unknown(format!("{left} {comparison} {right}"));
        }
        // Most comparisons only test whether a symbol is set.
        match (left, comparison, right) {
            (Term::Symbol(symbol), Comparison::Equal, Term::Constant(c)) if c == "y" => {
                return self.symbol(symbol, true);
            }
            (Term::Symbol(symbol), Comparison::NotEqual, Term::Constant(c)) if c == "n" => {
                return self.symbol(symbol, true);
            }
            (Term::Symbol(symbol), Comparison::Equal, Term::Constant(c)) if c == "n" => {
                return self.symbol(symbol, false);
            }
            _ => {}
        }
        let actual = match left {
            Term::Symbol(symbol) => Some(self.config.value(symbol).clone()),
            _ => None,
        };
        Need::Compare { left: left.clone(), comparison, right: right.clone(), actual }
    }
}

fn unique(needs: Vec<Need>) -> Vec<Need> {
    let mut unique = Vec::with_capacity(needs.len());
    for need in needs {
        if !unique.contains(&need) {
            unique.push(need);
        }
    }
    unique
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::On { symbol, actual, remedy } => {
                write!(f, "CONFIG_{symbol} ({}", state(actual))?;
                match remedy {
                    Remedy::Request => {}
                    Remedy::RemoveRequest(at) => write!(f, "; {at} requests n")?,
                    Remedy::Select(names) if names.is_empty() => f.write_str("; it has no prompt")?,
                    Remedy::Select(names) => {
                        let verb = if names.len() == 1 { "selects" } else { "select" };
                        write!(f, "; {} {verb} it", listed(&prefixed(names), "or"))?;
                    }
                    Remedy::None => f.write_str("; this kernel does not have it")?,
                }
                f.write_str(")")
            }
            Self::Off { symbol, actual, requested_at } => {
                write!(f, "CONFIG_{symbol} off ({}", state(actual))?;
                match requested_at {
                    Some(at) => write!(f, "; requested at {at})"),
                    None => f.write_str(")"),
                }
            }
            Self::Compare { left, comparison, right, actual } => {
                write!(f, "{} {comparison} {}", full_name(left), full_name(right))?;
                actual.as_ref().map_or(Ok(()), |actual| write!(f, " ({})", state(actual)))
            }
            Self::Unknown(text) => write!(f, "{text} (a test that is not run here)"),
            Self::Never => f.write_str("a condition that is always false"),
            Self::Any(alternatives) => fmt_alternatives(f, alternatives),
        }
    }
}

fn fmt_alternatives(f: &mut fmt::Formatter<'_>, alternatives: &[Vec<Need>]) -> fmt::Result {
    let texts: Vec<String> = alternatives
        .iter()
        .map(|needs| match needs.as_slice() {
            [need] => need.to_string(),
            needs => format!("({})", NeedList(needs)),
        })
        .collect();
    f.write_str(&listed(&texts, "or"))
}

/// Formats several needs: `A, B and C`.
pub(crate) struct NeedList<'a>(pub(crate) &'a [Need]);

impl fmt::Display for NeedList<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts: Vec<String> = self
            .0
            .iter()
            .map(|need| match need {
                // "A and B or C" is ambiguous without parentheses.
                Need::Any(_) if self.0.len() > 1 => format!("({need})"),
                need => need.to_string(),
            })
            .collect();
        f.write_str(&listed(&texts, "and"))
    }
}

/// Formats `A, B and C`. A long list is truncated.
pub(crate) fn listed(texts: &[String], conjunction: &str) -> String {
    match texts {
        [] => String::new(),
        [only] => only.clone(),
        texts if texts.len() > MAX_LISTED + 1 => {
            let shown = texts[..MAX_LISTED].join(", ");
            format!("{shown} {conjunction} {} others", texts.len() - MAX_LISTED)
        }
        [first @ .., last] => format!("{} {conjunction} {last}", first.join(", ")),
    }
}

/// The symbols that select another, without duplicates.
pub(crate) fn selectors(symbol: &Symbol) -> Vec<String> {
    let mut names: Vec<String> = symbol.selected_by.iter().map(|s| s.by.clone()).collect();
    names.sort();
    names.dedup();
    names
}

/// Names of symbols with `CONFIG_`.
pub(crate) fn prefixed(names: &[String]) -> Vec<String> {
    names.iter().map(|name| format!("CONFIG_{name}")).collect()
}

/// Describes the value of a symbol.
pub(crate) fn state(value: &Value) -> String {
    match value {
        Value::No => "is not set".to_owned(),
        value => format!("is {value}"),
    }
}

fn full_name(term: &Term) -> String {
    match term {
        Term::Symbol(symbol) => format!("CONFIG_{symbol}"),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compose;
    use crate::fragment::{Fragment, Origin};
    use crate::kconfig::parse_expr;

    const KCONFIG: &str = "\
config A
	bool \"a\"
config B
	bool \"b\"
config Y
	bool \"y\"
config M
	tristate \"m\"
config HAVE_IT
	bool
config HAVE_NONE
	bool
config REFUSED
	bool \"refused\"
config SELECTOR
	bool \"selector\"
	select HAVE_IT
";

    fn needs(expr: &str, level: Truth) -> String {
        let kconfig = Kconfig::read(&|_: &str| Ok(KCONFIG.into())).unwrap();
        let config = "CONFIG_Y=y\nCONFIG_M=m\nCONFIG_N=4\n";
        let config = KernelConfig::parse(config).unwrap();
        let fragment = b"CONFIG_REFUSED=n\nCONFIG_Y=y\n";
        let fragment = Fragment::parse("my.config", fragment, Origin::User).unwrap();
        let requests = compose(&[fragment]).unwrap();
        let requests = Some(&requests);
        let diagnosis = Diagnosis { config: &config, kconfig: &kconfig, requests, level };
        NeedList(&diagnosis.expr(&parse_expr(expr).unwrap(), true)).to_string()
    }

    #[test]
    fn only_unmet_terms_are_listed() {
        let cases = [
            ("Y && M", ""),
            ("Y && A", "CONFIG_A (is not set)"),
            ("A && Y && B", "CONFIG_A (is not set) and CONFIG_B (is not set)"),
            (
                "A && (A || B)",
                "CONFIG_A (is not set) and \
              (CONFIG_A (is not set) or CONFIG_B (is not set))",
            ),
            ("A || B && Y", "CONFIG_A (is not set) or CONFIG_B (is not set)"),
            ("A || A && B", "CONFIG_A (is not set)"),
            ("A || n", "CONFIG_A (is not set)"),
            ("n", "a condition that is always false"),
            ("!Y", "CONFIG_Y off (is y; requested at my.config:2)"),
            ("!(Y || A)", "CONFIG_Y off (is y; requested at my.config:2)"),
            ("!(Y && !A)", "CONFIG_Y off (is y; requested at my.config:2) or CONFIG_A (is not set)"),
            ("HAVE_IT", "CONFIG_HAVE_IT (is not set; CONFIG_SELECTOR selects it)"),
            ("OTHER", "CONFIG_OTHER (is not set; this kernel does not have it)"),
            ("N > 8", "CONFIG_N > 8 (is 4)"),
            ("!(N < 8)", "CONFIG_N >= 8 (is 4)"),
            ("HAVE_NONE", "CONFIG_HAVE_NONE (is not set; it has no prompt)"),
            ("REFUSED", "CONFIG_REFUSED (is not set; my.config:1 requests n)"),
            ("OTHER || OTHER && A", "CONFIG_OTHER (is not set; this kernel does not have it)"),
            ("OTHER || B", "CONFIG_B (is not set)"),
            ("A && A = y && A != n", "CONFIG_A (is not set)"),
            ("Y = n", "CONFIG_Y off (is y; requested at my.config:2)"),
            ("M = A", "CONFIG_M = CONFIG_A (is m)"),
            (
                "$(success,x) && A",
                "$(success,x) (a test that is not run here) \
              and CONFIG_A (is not set)",
            ),
        ];
        for (expr, expected) in cases {
            assert_eq!(needs(expr, Truth::Module), expected, "{expr}");
        }
    }

    #[test]
    fn a_module_suffices_for_a_bool_but_not_for_y() {
        assert_eq!(needs("M", Truth::Module), "");
        assert_eq!(needs("M", Truth::Yes), "CONFIG_M (is m)");
    }

    #[test]
    fn macros_are_not_certain() {
        let unknown = || vec![Need::Unknown("$(x)".into())];
        let off = || vec![Need::Off { symbol: "A".into(), actual: Value::Yes, requested_at: None }];
        assert!(!Need::Any(vec![off(), unknown()]).is_certain());
        assert!(Need::Any(vec![off(), [off(), unknown()].concat()]).is_certain());
    }

    #[test]
    fn long_lists_are_truncated() {
        let texts: Vec<String> = ["A", "B", "C", "D", "E", "F"].map(str::to_owned).into();
        assert_eq!(listed(&texts[..5], "and"), "A, B, C, D and E");
        assert_eq!(listed(&texts, "and"), "A, B, C, D and 2 others");
    }
}
