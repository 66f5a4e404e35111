//! Which terms of a condition fail, and no more than those.

use std::fmt;

use crate::compose::{Asked, Composed};
use crate::config::KernelConfig;
use crate::kconfig::{Comparison, Condition, Expr, Kconfig, Symbol, Term, Truth};
use crate::value::Value;

/// How many alternatives or names a message lists before it only counts the rest.
const SHOWN: usize = 4;

/// One thing that must change before a condition holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Need {
    /// A symbol must be on.
    On {
        /// The symbol, without `CONFIG_`.
        symbol: String,
        /// What it is.
        got: Value,
        /// How it could be set.
        means: Means,
    },
    /// A symbol must be off.
    Off {
        /// The symbol, without `CONFIG_`.
        symbol: String,
        /// What it is.
        got: Value,
        /// Where a fragment asks for it, as `file:line`.
        asked_at: Option<String>,
    },
    /// A comparison must hold.
    Compare {
        /// What is compared.
        left: Term,
        /// How.
        comparison: Comparison,
        /// With what.
        right: Term,
        /// The value of the left side, if that is a symbol.
        got: Option<Value>,
    },
    /// A macro must give yes, which cannot be known here: a compiler test, for example.
    Unknown(String),
    /// The condition is a plain `n`.
    Never,
    /// One of these lists must hold as a whole.
    Any(Vec<Vec<Need>>),
}

/// How a symbol that is needed could be set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Means {
    /// By asking for it.
    Asking,
    /// By no longer asking for `n`, which a fragment does at this `file:line`.
    NotRefusing(String),
    /// Only by these other symbols, which select it; if there are none, by its default.
    Others(Vec<String>),
    /// Not at all: this kernel does not define it.
    Nothing,
}

impl Need {
    /// Whether this certainly fails; what hangs on a macro alone may be fine.
    #[must_use]
    pub fn is_certain(&self) -> bool {
        match self {
            Self::Unknown(_) => false,
            Self::Any(alternatives) => alternatives.iter().all(|needs| needs.iter().any(Self::is_certain)),
            _ => true,
        }
    }

    /// Whether nothing that this kernel has could bring it about.
    fn is_hopeless(&self) -> bool {
        matches!(self, Self::Never | Self::On { means: Means::Nothing, .. })
    }
}

/// Looks for what keeps conditions from holding in a configuration.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Blame<'a> {
    pub(crate) config: &'a KernelConfig,
    pub(crate) kconfig: &'a Kconfig,
    /// What was asked for, to name who stands in the way.
    pub(crate) asked: Option<&'a Composed>,
    /// How true a condition must be: `m` is enough for a bool, a tristate needs `y` to be `y`.
    pub(crate) level: Truth,
}

impl Blame<'_> {
    /// All failing terms of a list of conditions, each once.
    pub(crate) fn conditions<'c>(&self, list: impl Iterator<Item = &'c Condition>) -> Vec<Need> {
        unique(list.flat_map(|condition| self.expr(&condition.expr, true)).collect())
    }

    /// What must change for an expression to hold (or, if not `wanted`, to fail); nothing if it
    /// already does.
    pub(crate) fn expr(&self, expr: &Expr, wanted: bool) -> Vec<Need> {
        let truth = expr.truth(self.config);
        if (if wanted { truth } else { !truth }) >= self.level {
            return Vec::new();
        }
        match expr {
            Expr::Not(inner) => self.expr(inner, !wanted),
            // De Morgan: to make an && fail, one part has to fail, and so on.
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
            alternatives.retain(|needs| !needs.iter().any(Need::is_hopeless));
            if alternatives.is_empty() {
                return first;
            }
        }
        // "A, or A and B" is no more than "A": with the short ones first, drop what contains one.
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
        let (symbol, got) = (name.to_owned(), self.config.value(name).clone());
        let asked = self.asked.and_then(|composed| composed.asked(name));
        if !wanted {
            let asked_at = asked.filter(|asked| asked.value.is_set()).map(Asked::place);
            return Need::Off { symbol, got, asked_at };
        }
        let means = match (self.kconfig.symbol(name), asked) {
            (None, _) => Means::Nothing,
            (Some(_), Some(asked)) if !asked.value.is_set() => Means::NotRefusing(asked.place()),
            (Some(symbol), _) if symbol.prompts().next().is_some() => Means::Asking,
            (Some(symbol), _) => Means::Others(selectors(symbol)),
        };
        Need::On { symbol, got, means }
    }

    fn comparison(&self, left: &Term, comparison: Comparison, right: &Term) -> Need {
        if matches!(left, Term::Unknown(_)) || matches!(right, Term::Unknown(_)) {
            return Need::Unknown(format!("{left} {comparison} {right}"));
        }
        // Most comparisons only ask whether a symbol is on or off.
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
        let got = match left {
            Term::Symbol(symbol) => Some(self.config.value(symbol).clone()),
            _ => None,
        };
        Need::Compare { left: left.clone(), comparison, right: right.clone(), got }
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
            Self::On { symbol, got, means } => {
                write!(f, "CONFIG_{symbol} ({}", state(got))?;
                match means {
                    Means::Asking => {}
                    Means::NotRefusing(at) => write!(f, "; {at} asks for n")?,
                    Means::Others(names) if names.is_empty() => f.write_str("; it has no prompt")?,
                    Means::Others(names) => {
                        let verb = if names.len() == 1 { "selects" } else { "select" };
                        write!(f, "; {} {verb} it", listed(&prefixed(names), "or"))?;
                    }
                    Means::Nothing => f.write_str("; this kernel does not have it")?,
                }
                f.write_str(")")
            }
            Self::Off { symbol, got, asked_at } => {
                write!(f, "CONFIG_{symbol} off ({}", state(got))?;
                match asked_at {
                    Some(at) => write!(f, "; asked for at {at})"),
                    None => f.write_str(")"),
                }
            }
            Self::Compare { left, comparison, right, got } => {
                write!(f, "{} {comparison} {}", full_name(left), full_name(right))?;
                got.as_ref().map_or(Ok(()), |got| write!(f, " ({})", state(got)))
            }
            Self::Unknown(text) => write!(f, "{text} (a test that is not run here)"),
            Self::Never => f.write_str("what no configuration can give"),
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

/// Several needs as one phrase: `A, B and C`.
pub(crate) struct NeedList<'a>(pub(crate) &'a [Need]);

impl fmt::Display for NeedList<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts: Vec<String> = self
            .0
            .iter()
            .map(|need| match need {
                // "A and B or C" could be read either way.
                Need::Any(_) if self.0.len() > 1 => format!("({need})"),
                need => need.to_string(),
            })
            .collect();
        f.write_str(&listed(&texts, "and"))
    }
}

/// `A, B and C`; of a long list only the beginning.
pub(crate) fn listed(texts: &[String], conjunction: &str) -> String {
    match texts {
        [] => String::new(),
        [only] => only.clone(),
        texts if texts.len() > SHOWN + 1 => {
            let shown = texts[..SHOWN].join(", ");
            format!("{shown} {conjunction} {} others", texts.len() - SHOWN)
        }
        [first @ .., last] => format!("{} {conjunction} {last}", first.join(", ")),
    }
}

/// The symbols that select another, each once.
pub(crate) fn selectors(symbol: &Symbol) -> Vec<String> {
    let mut names: Vec<String> = symbol.selected_by.iter().map(|s| s.by.clone()).collect();
    names.sort();
    names.dedup();
    names
}

/// Symbols' names with their `CONFIG_`.
pub(crate) fn prefixed(names: &[String]) -> Vec<String> {
    names.iter().map(|name| format!("CONFIG_{name}")).collect()
}

/// What a symbol is, in words.
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
config GIVER
	bool \"giver\"
	select HAVE_IT
";

    fn needs(expr: &str, level: Truth) -> String {
        let kconfig = Kconfig::read(&|_: &str| Ok(KCONFIG.into())).unwrap();
        let config = "CONFIG_Y=y\nCONFIG_M=m\nCONFIG_N=4\n";
        let config = KernelConfig::parse(config).unwrap();
        let fragment = b"CONFIG_REFUSED=n\nCONFIG_Y=y\n";
        let fragment = Fragment::parse("my.config", fragment, Origin::User).unwrap();
        let asked = compose(&[fragment]).unwrap();
        let asked = Some(&asked);
        let blame = Blame { config: &config, kconfig: &kconfig, asked, level };
        NeedList(&blame.expr(&parse_expr(expr).unwrap(), true)).to_string()
    }

    #[test]
    fn only_failing_terms_are_named() {
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
            ("n", "what no configuration can give"),
            ("!Y", "CONFIG_Y off (is y; asked for at my.config:2)"),
            ("!(Y || A)", "CONFIG_Y off (is y; asked for at my.config:2)"),
            ("!(Y && !A)", "CONFIG_Y off (is y; asked for at my.config:2) or CONFIG_A (is not set)"),
            ("HAVE_IT", "CONFIG_HAVE_IT (is not set; CONFIG_GIVER selects it)"),
            ("OTHER", "CONFIG_OTHER (is not set; this kernel does not have it)"),
            ("N > 8", "CONFIG_N > 8 (is 4)"),
            ("!(N < 8)", "CONFIG_N >= 8 (is 4)"),
            ("HAVE_NONE", "CONFIG_HAVE_NONE (is not set; it has no prompt)"),
            ("REFUSED", "CONFIG_REFUSED (is not set; my.config:1 asks for n)"),
            ("OTHER || OTHER && A", "CONFIG_OTHER (is not set; this kernel does not have it)"),
            ("OTHER || B", "CONFIG_B (is not set)"),
            ("A && A = y && A != n", "CONFIG_A (is not set)"),
            ("Y = n", "CONFIG_Y off (is y; asked for at my.config:2)"),
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
    fn a_module_is_enough_for_a_bool_but_not_for_y() {
        assert_eq!(needs("M", Truth::Module), "");
        assert_eq!(needs("M", Truth::Yes), "CONFIG_M (is m)");
    }

    #[test]
    fn macros_are_not_certain() {
        let unknown = || vec![Need::Unknown("$(x)".into())];
        let off = || vec![Need::Off { symbol: "A".into(), got: Value::Yes, asked_at: None }];
        assert!(!Need::Any(vec![off(), unknown()]).is_certain());
        assert!(Need::Any(vec![off(), [off(), unknown()].concat()]).is_certain());
    }

    #[test]
    fn long_lists_are_cut() {
        let texts: Vec<String> = ["A", "B", "C", "D", "E", "F"].map(str::to_owned).into();
        assert_eq!(listed(&texts[..5], "and"), "A, B, C, D and E");
        assert_eq!(listed(&texts, "and"), "A, B, C, D and 2 others");
    }
}
